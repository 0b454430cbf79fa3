"""The rules of the house (docs/architecture.md): who may import whom, and how long a file may be."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS, TRAINING = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("train_*.py"))
PACKAGE, WORLD = sorted(ROOT.glob("nanoalign/*.py")), sorted(ROOT.glob("nanoalign/world/*.py"))
LAB = sorted(ROOT.glob("lab/**/*.py"))
NAMES = {path.stem for path in SCRIPTS}

# Lines, all of them. A budget may fall and never rises: what outgrows its own is in the wrong room.
BUDGETS = {
    "train_pretrain.py": 125, "train_sft.py": 112, "train_rm.py": 218, "train_prm.py": 204,
    "train_dpo.py": 211, "train_kto.py": 206, "train_orpo.py": 169, "train_ppo.py": 272,
    "train_grpo.py": 280, "collect.py": 264, "critique.py": 146, "best_of_n.py": 272, "evaluate.py": 264,
    "chat.py": 130,
    "nanoalign/__init__.py": 5, "nanoalign/activations.py": 45, "nanoalign/answers.py": 152,
    "nanoalign/checkpoint.py": 248, "nanoalign/cli.py": 283,
    "nanoalign/expressions.py": 155,
    "nanoalign/compiler.py": 27, "nanoalign/contents.py": 242, "nanoalign/data.py": 268,
    "nanoalign/deployment.py": 115, "nanoalign/feedback.py": 160, "nanoalign/files.py": 258,
    "nanoalign/generate.py": 291, "nanoalign/kernels.py": 255, "nanoalign/logprobs.py": 111,
    "nanoalign/hf.py": 190, "nanoalign/hf_weights.py": 230, "nanoalign/hf_config.py": 100,
    "nanoalign/memory.py": 105, "nanoalign/footprint.py": 123, "nanoalign/extent.py": 88,
    "nanoalign/vocabulary.py": 150, "nanoalign/chat_formats.py": 110, "nanoalign/lora.py": 90,
    "nanoalign/messages.py": 254, "nanoalign/show_rows.py": 141,
    "nanoalign/model.py": 281, "nanoalign/packing.py": 74, "nanoalign/rewards.py": 235,
    "nanoalign/optimizer.py": 16, "nanoalign/rows.py": 344, "nanoalign/run.py": 292,
    "nanoalign/statistics.py": 122,
    "nanoalign/scalar.py": 91, "nanoalign/seeds.py": 13, "nanoalign/steps.py": 80,
    "nanoalign/tokenizer.py": 180,
    "nanoalign/terminal.py": 24, "nanoalign/training.py": 168, "nanoalign/watch.py": 141,
    "nanoalign/parallel.py": 130, "nanoalign/sharding.py": 100, "nanoalign/pieces.py": 56,
    "nanoalign/rollouts.py": 88, "nanoalign/stopping.py": 39,
    "Makefile": 135, "README.md": 110, "speedrun.sh": 50,
}  # fmt: skip


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(path: Path) -> list[str]:
    """Every dotted name that a file imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def reaches(path: Path, *rooms: str) -> list[str]:
    return [name for name in imported(path) for room in rooms if f"{name}.".startswith(f"{room}.")]


def short(paths: list[Path]) -> dict:
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


# ----------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("path", **short(SCRIPTS))
def test_a_script_imports_no_script_no_laboratory_no_world_and_at_most_twenty_names(path):
    assert not reaches(path, *NAMES, "lab", "nanoalign.world")
    assert len(reaches(path, "nanoalign")) <= 20


@pytest.mark.parametrize("path", **short(PACKAGE))
def test_the_package_imports_no_script_no_laboratory_and_no_world(path):
    assert not reaches(path, *NAMES, "lab", "nanoalign.world")


@pytest.mark.parametrize("path", **short(WORLD))
def test_the_world_imports_no_script_and_no_laboratory(path):
    assert not reaches(path, *NAMES, "lab")


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """One that has imported DPO and PPO, said which modules that were, and imported all scripts."""
    folder, scripts = tmp_path_factory.mktemp("interpreter"), ", ".join(sorted(NAMES))
    code = f"""import sys, train_dpo, train_ppo; print([*sys.modules])
import {scripts}, nanoalign.world.__main__, nanoalign.world.bpe
import torch, nanoalign.training
model = torch.nn.Linear(1, 1)
optimizer = nanoalign.training.make_optimizer(model, lr=0.1)
model(torch.ones(1)).backward()
nanoalign.training.optimizer_step(model, optimizer, lr=0.1, clip=1.0)
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules  # which takes longer than many a run"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True), folder


def test_what_dpo_and_ppo_import_leads_to_neither_world_nor_laboratory(interpreter):
    """By the interpreter, which also sees what the syntax tree hides."""
    modules = ast.literal_eval(interpreter[0].stdout)
    assert "nanoalign.run" in modules
    assert not [name for name in modules if f"{name}.".startswith(("lab.", "nanoalign.world."))]


def test_importing_a_script_prints_nothing_and_creates_nothing(interpreter):
    done, folder = interpreter
    assert (done.returncode, done.stderr) == (0, "") and not os.listdir(folder)
    assert done.stdout.startswith("[") and done.stdout.endswith("]\n") and done.stdout.count("\n") == 1


def test_no_two_files_of_tests_have_the_same_name():
    """Of two that do, pytest collects neither: it imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_tests_of_parity_are_those_of_one_folder():
    """`make parity` looks nowhere else, and `make test` not there: their imports take as long as the rest."""
    mark = re.compile(r"^(pytestmark = \[?| *@)pytest\.mark\.parity\b", re.MULTILINE)
    tests = {*(ROOT / "tests").rglob("test_*.py")}
    marked = {path for path in tests if mark.search(path.read_text(encoding="utf-8"))}
    assert marked and marked == {path for path in tests if path.parent.name == "parity"}


# ------------------------------------------------------------------------------------------------- lines


def test_every_file_has_a_budget_and_keeps_it():
    files = {str(path.relative_to(ROOT)): lines(path) for path in [*SCRIPTS, *PACKAGE]}
    files |= {name: lines(ROOT / name) for name in ("Makefile", "README.md", "speedrun.sh")}
    assert {name: n for name, n in files.items() if n > BUDGETS.get(name, 0)} == {}
    assert BUDGETS.keys() == files.keys()
    assert max(BUDGETS[path.name] for path in SCRIPTS) <= 280
    assert {str(path): lines(path) for path in LAB if lines(path) > 300} == {}


def test_the_training_scripts_are_at_most_1800_lines_together():
    assert len(TRAINING) == 9 and sum(map(lines, TRAINING)) <= 1800


LATER = ("hf", "hf_weights", "hf_config", "vocabulary", "chat_formats", "lora")
LATER += ("activations", "memory", "footprint", "extent", "parallel", "sharding", "optimizer", "deployment")


def test_the_package_is_at_most_5030_lines_without_the_world_and_the_rooms_that_came_later():
    """To come down to 2,600, of which it is far away. 270 of them are what these rooms need in the others:
    flags, checkpoints of adapters, a critic on weights that are there, a chat format's turns, and to share
    out rows, to bring together what became of them, and to write once, where several processes are one run.
    """
    assert sum(lines(path) for path in PACKAGE if path.stem not in LATER) <= 5030


def code_lines(path: Path) -> list[str]:
    """The lines of a file but for docstrings, comments and blank ones."""
    text, documented = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    numbered = enumerate(text.splitlines(), 1)
    return [line for i, line in numbered if i not in documented and line.strip() and line.strip()[0] != "#"]


@pytest.mark.parametrize("paths", [SCRIPTS, PACKAGE], ids=["scripts", "package"])
def test_lines_are_no_longer_for_being_fewer(paths):
    lengths = [len(line) for path in paths for line in code_lines(path)]
    assert sum(lengths) / len(lengths) <= 56


@pytest.mark.parametrize("path", **short([*SCRIPTS, *PACKAGE, *WORLD, *LAB]))
def test_a_line_holds_one_statement(path):
    starts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt):
            decorators = getattr(node, "decorator_list", [])
            starts.append(min(part.lineno for part in [node, *decorators]))
    assert len(starts) == len(set(starts))
