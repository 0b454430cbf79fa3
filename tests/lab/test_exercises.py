"""Each of the twelve bugs can be planted, and the test that the page names falls."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import held_out

from lab import exercises
from lab.exercises import BUGS, RUNS, Config
from nanoalign import UserError

TWELVE = pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])


@TWELVE
def test_a_bug_is_one_change_of_code_that_still_compiles(bug):
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.was) == 1 and bug.was != bug.becomes
    compile(text.replace(bug.was, bug.becomes), bug.file, "exec")


@TWELVE
def test_its_test_and_its_metrics_are_there(bug):
    file, name = bug.test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    page = (ROOT / f"docs/methods/{bug.run}.md").read_text(encoding="utf-8")
    assert all(f"`{metric}`" in page for metric in bug.curves.split())


@pytest.mark.parametrize("run", RUNS)
def test_what_an_exercise_runs_is_known_to_the_script(run):
    script, *words = RUNS[run].split()
    flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    config = importlib.import_module(script.removesuffix(".py")).Config
    assert flags <= {field.name for field in dataclasses.fields(config)}


def test_the_named_tests_fall_in_a_copy_with_the_bugs_in_it(tmp_path):
    """Those of formulas, which are quick; all at once, for they are in different functions."""
    planted = [bug for bug in BUGS if bug.name in (
        "a thumb down is taken for a thumb up", "the preferred side is the other one",
        "the price of KL is a prize", "the hopeful side of the clip",
    )]  # fmt: skip
    exercises.plant(planted, tmp_path / "copy")
    where = {**os.environ, "PYTHONPATH": f"{tmp_path}/copy:{tmp_path}/copy/tests", "OMP_NUM_THREADS": "1"}
    names = [bug.test for bug in planted]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf", *names]
    done = subprocess.run(command, cwd=tmp_path / "copy", env=where, capture_output=True, text=True)
    fell = {line.split()[1].split("[")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert len(planted) == 4 and fell == {*names}, done.stdout


def test_an_exercise_draws_the_healthy_run_beside_the_broken_one(world, pairs, tmp_path, monkeypatch, capsys):
    brief = "train_dpo.py --data {of}/pairs.jsonl --init {of}/sft.pt --steps 3 --log-every 1 --eval-every 3"
    few = held_out(pairs, tmp_path)
    monkeypatch.setitem(RUNS, "dpo", f"{brief} --eval-data {few} --lr 1e-2 --warmup 0 --max-new-tokens 4")
    exercises.main(Config(n=2, of=str(world), out=str(tmp_path / "exercise1")))
    said = capsys.readouterr().out
    assert "loss: healthy 0.693 → 0." in said and "broken 0.693 → 0.693" in said
    picture = (tmp_path / "exercise1/exercise2.svg").read_text(encoding="utf-8")
    assert picture.count("<polyline") == 4 and "healthy: eval_kl" in picture and "broken: loss" in picture
    monkeypatch.setattr(exercises, "BUGS", BUGS[1:2])
    exercises.gather(exercises.Gathered(of=str(tmp_path), out=str(tmp_path / "figures.json")))
    [(name, lines)] = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")).items()
    assert name == BUGS[1].name and all(line in said for line in lines) and len(lines) == 2
    assert "ref_logps = pair_logprobs(ref, batch" in (ROOT / "train_dpo.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change, said", [({"n": 13}, "must be 1 to 12"), ({"out": "docs"}, "not under out/")]
)
def test_what_is_no_exercise_is_refused_before_anything_is_deleted(change, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=said):
        exercises.main(Config(**change))
    assert (ROOT / "docs/exercises.md").exists()
