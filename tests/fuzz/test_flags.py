"""Flags of every script, with values that people mistype and that overflow, where none of the script's files
exists: the flags are refused, or the files are found missing, in one sentence."""

import argparse
import dataclasses
import importlib
import resource
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from nanoalign import cli

NAMES = [path.stem for path in sorted(ROOT.glob("*.py"))]
NAMES += [
    f"lab.{path.stem}" for path in sorted(ROOT.glob("lab/*.py")) if "cli.run(main" in path.read_text("utf-8")
]
READ_NO_FILE = ("lab.oracle", "lab.mutation", "lab.tips")  # so they would begin their work
COMMANDS = [(name, "main", "Config") for name in NAMES if name not in READ_NO_FILE]
COMMANDS += [
    ("lab.hacking", "draw", "Config"),
    ("lab.prm", "curves", "Curves"),
    ("lab.prm", "policies", "Policies"),
]
COMMANDS += [("lab.pareto", "mix", "Mix"), ("lab.pareto", "report", "Report")]
COMMANDS += [("lab.weak_to_strong", "split", "Split"), ("lab.weak_to_strong", "train", "Student")]

DIGITS = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "1000",
    "007",
    "9" * 30,
    "9" * 5000,
    f"{2**31}",
    f"{2**63}",
    f"{2**64}",
    "1000000000",
]
NUMBERS = [
    "1e-320",
    "1e-46",
    "1e-38",
    "1e-8",
    "0.5",
    ".5",
    "5.",
    "5.5",
    "1e3",
    "1e10",
    "1e38",
    "1e39",
    "1e300",
    "1e999",
]
WORDS = [
    "nan",
    "inf",
    "-inf",
    "1_000",
    "０",
    "٣",
    " 5",
    "5 ",
    "0x10",
    "1,5",
    "",
    " ",
    "five",
    "None",
    "True",
    "-",
    "--",
    "1e",
]
WORDS += [
    "a" * 300,
    "a\nb",
    "\x1b[2J",
    "%s%(prog)s",
    "é",
    "..",
    "/",
    "no/such/file.pt",
    "cpu:-1",
    "hpu",
    "meta",
    "cuda:99",
]
WORDS += ["judge", "min:*.pt", "x.py:f", "rm:x.pt", "world:3", "prompt=a,b=c", "=", ","]
VALUES = [*DIGITS, *NUMBERS, *WORDS]


def arguments(rng, config_class) -> list[str]:
    given = []
    fields = dataclasses.fields(config_class)
    for field in rng.sample(fields, k=min(len(fields), rng.randint(1, 4))):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            given += [rng.choice([flag, flag.replace("--", "--no-"), f"{flag}=1"])]
        elif isinstance(field.default, tuple):
            given += [flag, *rng.choices(VALUES, k=rng.randint(0, 2))]
        else:
            given += [f"{flag}={rng.choice(VALUES)}"]
    return given


def test_whatever_the_flags_are_a_script_without_its_files_ends_in_one_sentence(
    fuzz, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = set()
    for rng in fuzz(400):
        name, main, config = rng.choice(COMMANDS)
        module = importlib.import_module(name)
        given = arguments(rng, getattr(module, config))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        with pytest.raises(SystemExit) as stopped:
            cli.run(getattr(module, main), getattr(module, config), module.__doc__)
        sentence, status = stopped.value.code, 1
        errors = capsys.readouterr().err
        if not isinstance(sentence, str):
            sentence, status = errors.removesuffix("\n"), stopped.value.code
        assert (status, sentence[:7]) in [(1, "error: "), (2, "error: ")], (name, given, sentence)
        assert sentence.isprintable(), (name, given, sentence)
        outcomes.add(status)
    assert outcomes == {1, 2}
    assert not [path for path in Path().rglob("*") if path.is_file() and path.stat().st_size]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB


@pytest.mark.parametrize("name, main, config", COMMANDS)
def test_every_number_of_every_script_is_refused_or_plain_and_within_bounds(name, main, config):
    for field in dataclasses.fields(getattr(importlib.import_module(name), config)):
        if isinstance(field.default, bool) or not isinstance(field.default, (int, float)):
            continue
        taken = {}
        for text in VALUES:
            try:
                value = taken[text] = cli.number(text, field.name, field.default)
            except argparse.ArgumentTypeError as error:
                assert str(error).isprintable() and len(str(error)) < 200
                continue
            assert value == 0 or 1e-38 < abs(value) < (2**64 if field.name == "seed" else 3.5e38)
            assert value < 2**31 or not isinstance(value, int) or field.name == "seed"
            assert value >= 0 or field.default < 0
        assert {"0", "1", "2"} <= taken.keys()
