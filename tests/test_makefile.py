"""speedrun.sh is `make demo` in plain commands; and what make would run exists, and knows the flags.

Both are run by bash with a `python` that only notes its arguments.
"""

import dataclasses
import importlib
import os
import re
import subprocess

import pytest
from conftest import ROOT

EFFECTS = "cat cd cp grep awk make mkdir rm source touch"  # what the scripts call beside python
NOTE = """python() { printf '%s\\x1f' "$@" >> "$NOTES"; echo >> "$NOTES"; }\n"""
NOTE += "".join(f"{name}() {{ :; }}\n" for name in EFFECTS.split())
LAB = "results scoreboard sums prm prm-hacking cai hacking iterate red-team pareto gate weak-to-strong reader"
TARGETS = ["demo", *LAB.split(), "report", "claims", "sweeps", "exercise", "docs-check", "real", "bench"]
SPEEDRUN = (ROOT / "speedrun.sh").read_text()


def commands(text: str, folder, **variables) -> set[tuple]:
    """A bash script → the arguments of every `python` in it."""
    text = re.sub(r" >>? \S+", "", text)  # nothing is written
    (folder / "note.sh").write_text(NOTE)
    (folder / "notes").write_text("")
    variables |= {"BASH_ENV": str(folder / "note.sh"), "NOTES": str(folder / "notes")}
    environment = {**os.environ, **variables}
    subprocess.run(["bash", "-e"], input=text, cwd=folder, env=environment, text=True, check=True)
    found = {tuple(line.split("\x1f")[:-1]) for line in (folder / "notes").read_text().splitlines()}
    setup = [("-c",), ("-m", "venv"), ("-m", "pip")]  # where .venv is out of date
    return {command for command in found if not any(command[: len(own)] == own for own in setup)}


def by_make(target: str, folder, size: str) -> set[tuple]:
    """What make would run for a target, from nothing."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SEEDS")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    flags = ["--dry-run", "--no-print-directory", f"SIZE={size}", f"OUT={folder}/out", "PY=python"]
    command = ["make", target, *flags, "PYTHON=python", "HH=hh.jsonl", "JOBS=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return commands(done.stdout, folder)


def by_speedrun(text: str, folder, size: str) -> set[tuple]:
    return commands(text, folder, SIZE=size, OUT=f"{folder}/out")


def meaning(command: tuple) -> tuple[str, dict]:
    """A command → its program and {flag: values}, "" for words before the first; without --resume, and
    without flags that say what is the default."""
    program, *words = command[1:] if command[0] == "-m" else command
    flags, name = {"": []}, ""
    for word in words:
        if word.startswith("--"):
            name = word
            flags[name] = []
        else:
            flags[name].append(word)
    for name, value in (("", []), ("--resume", []), ("--seed", ["0"]), ("--device", ["auto"])):
        if flags.get(name) == value:
            del flags[name]
    return program, flags


def meanings(found: set[tuple]) -> list:
    return sorted((program, sorted(flags.items())) for program, flags in map(meaning, found))


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_speedrun_and_make_demo_run_the_same_commands(size, tmp_path):
    made = meanings(by_make("demo", tmp_path, size))
    assert len(made) > 15 and meanings(by_speedrun(SPEEDRUN, tmp_path, size)) == made


@pytest.mark.parametrize(
    "was, becomes",
    [
        ("--lr 1e-4", "--lr 2e-4"),
        ("--watch judge", ""),
        ("--steps $kto", "--steps 1"),
        ("--epochs 0.5", "--epochs 0.3"),
        ("python train_dpo.py", "true train_dpo.py"),
        ("dpo,scoreboard/kto,", "dpo,"),
    ],
)
def test_a_difference_between_them_is_noticed(was, becomes, tmp_path):
    assert was in SPEEDRUN
    other = by_speedrun(SPEEDRUN.replace(was, becomes, 1), tmp_path, "small")
    assert meanings(other) != meanings(by_make("demo", tmp_path, "small"))


@pytest.mark.parametrize("target", TARGETS)
def test_what_make_runs_exists_and_knows_its_flags(target, tmp_path):
    """The fields of a program's dataclasses are its flags."""
    for program, flags in map(meaning, by_make(target, tmp_path, "tiny")):
        name = program.removesuffix(".py")
        if (ROOT / name.replace(".", "/") / "__main__.py").exists():
            name += ".__main__"
        known = {
            f"--{field.name.replace('_', '-')}"
            for config in vars(importlib.import_module(name)).values()
            if isinstance(config, type) and dataclasses.is_dataclass(config)
            for field in dataclasses.fields(config)
        }
        named = {re.sub("^--no-", "--", flag) for flag in flags if flag}  # a switch and its opposite
        assert named <= known, f"{target}: {program}"


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {*re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)}
    others = {"help", "setup", "test", "lint", "parity", "pretend-gpu", "browser", "clean"}
    assert listed == {*TARGETS, *others}


def test_pyproject_bounds_no_version_from_above_and_the_tested_ones_are_those_that_make_installs():
    """A torch that is newer than the tests' own is nobody's mistake."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(
        r'"([A-Za-z][\w-]*)([<>=!~,.\d]*)"', project.split("[tool.")[0].split("dependencies = [", 1)[1]
    )
    assert {"torch", "numpy", "tiktoken", "pytest", "trl"} < {name for name, _ in needed}
    assert [bound for _, bound in needed if not re.fullmatch(r"(>=[\d.]+)?", bound)] == []
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(re.match(r"([\w-]+)==([\d.]+)", line).groups() for line in lines if line[0] != "#")
    optional = {"matplotlib", "huggingface_hub", "datasets"}  # no test needs them
    assert {name for name, _ in needed} - optional == tested.keys()
    for target in (".venv/installed", ".venv/parity", ".venv-gpu/installed"):
        flags = ["--dry-run", "--always-make", "--no-print-directory"]
        done = subprocess.run(["make", target, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
        text = done.stdout.replace("\\\n", "")
        installs = [line for line in text.splitlines() if "pip install" in line]
        assert installs and all("--constraint constraints.txt" in line for line in installs)
