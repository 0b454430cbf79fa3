"""Flags from dataclass fields, help from comments, mistakes as sentences, metrics that survive a resume."""

import importlib
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoalign import UserError, cli
from nanoalign.run import Flags

ROOT = Path(__file__).parents[1]
SCRIPTS, LAB = (
    sorted(p.stem for p in ROOT.glob(files) if "class Config" in p.read_text(encoding="utf-8"))
    for files in ("*.py", "lab/*.py")
)
LAB = [f"lab.{name}" for name in LAB]


@dataclass
class Config:
    name: str = "x"  # a name: not a type
    lr: float = 3e-3  # 100 % of a rate,
    # explained on two lines
    steps: int = 5  # how many
    offset: int = -1  # may be negative
    shuffle: bool = True  # or not
    files: tuple = ("a", "b")  # several
    out: str = "out/x.pt"  # where to


def test_every_field_is_a_flag_of_its_own_type():
    assert cli.parse(Config, argv=[]) == Config()
    flags = "--name y --lr 1e-4 --steps 7 --offset -3 --no-shuffle --files p q r --out z.pt"
    assert cli.parse(Config, argv=flags.split()) == Config("y", 1e-4, 7, -3, False, ("p", "q", "r"), "z.pt")


def test_the_help_text_is_the_comment(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Config, "What it does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "What it does." in text and "a name: not a type (default: x)" in text
    assert "100 % of a rate, explained on two lines (default: 0.003)" in text and "--no-shuffle" in text


@dataclass(kw_only=True)
class Shared:
    seed: int = 0  # of everything
    lr: float = 0.1  # the rate of all


@dataclass(kw_only=True)
class Own(Shared):
    data: str = "d"  # what it reads
    lr: float = 0.2


def test_a_classs_own_flags_come_first_and_those_it_shares_are_a_second_group(capsys):
    assert cli.parse(Own, argv=["--seed", "3"]) == Own(data="d", lr=0.2, seed=3)
    with pytest.raises(SystemExit):
        cli.parse(Own, argv=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    own, shared = "--data X what it reads (default: d)", "--lr FLOAT the rate of all (default: 0.2)"
    places = ["[--data X] [--seed", " flags: ", own, "flags that all runs share: ", "--seed INT of", shared]
    assert [text.index(place) for place in places] == sorted(text.index(place) for place in places)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("train_")])
def test_a_training_script_shares_the_flags_of_all_runs_and_takes_keywords_only(script):
    config = importlib.import_module(script).Config
    assert issubclass(config, Flags) and all(field.kw_only for field in fields(config))


@pytest.mark.parametrize("script", [*SCRIPTS, *LAB, "nanoalign.world.__main__"])
def test_every_flag_of_every_script_is_explained(script):
    config = importlib.import_module(script).Config
    comments = cli.field_comments(config)
    assert [f.name for f in fields(config) if len(comments.get(f.name, "")) < 5] == []
    assert list(comments) == [f.name for f in fields(config)]


@pytest.mark.parametrize(
    "flags, key",
    [
        ("--nonsense 1", "--nonsense"),
        ("--step 1", "--step"),  # no abbreviations: a later flag could make them ambiguous
        ("--steps two", "whole number"),
        ("--steps 1.5", "whole number"),
        ("--lr fast", "number"),
        ("--lr nan", "number"),
        ("--lr 1e999", "number"),
        ("--lr -0.1", "≥ 0"),
        ("--steps -1", "≥ 0"),
        ("--steps", "--steps"),
        ("stray", "stray"),
        ("--steps=--", "--steps"),  # which argparse takes for an empty list
        ("--files=--", "--files"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_status_two(flags, key, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Config, argv=flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ")
    assert key in error and error.count("\n") == 1


@dataclass
class Numbers:
    seed: int = 0  # a seed
    count: int = 1  # a count
    samples: int = 1  # what memory is a multiple of
    lr: float = 0.1  # a rate
    score: float = -1.0  # may be negative
    temperature: float = 1.0  # may be 0, but not nearly
    epochs: float = 1.0  # passes


@pytest.mark.parametrize(
    "flag, good, bad",
    [
        ("seed", ["0", "1", str(2**63), str(2**64 - 1)], ["-1", str(2**64), "9" * 5000, "1e3"]),
        (
            "count",
            ["0", "007", "2147483647", "-0"],
            ["-1", str(2**31), "1_000", "０", "٣", " 5", "5 ", "0x10", "5.0"],
        ),
        ("samples", ["0", "100000"], ["100001", "1000000000"]),
        (
            "lr",
            ["0", "1.", ".5", "1E-3", "1.2e-38", "3.4e38"],
            ["-1", "nan", "inf", "1e39", "1e-46", "1e-320", "1e999"],
        ),
        ("lr", ["+1"], ["1_0", "1e", "e3", "", " 1", "0x1p3", "１", "infinity", "1,5"]),
        ("score", ["0", "-3.4e38", "5"], ["-1e39", "1e39", "-1e-46", "nan", "-inf"]),
        ("temperature", ["0", "0.0001", "0.7", "1e9"], ["1e-5", "1e-30", "-1"]),
        ("epochs", ["0.001", "1000000"], ["1e7", "1e38"]),
    ],
)
def test_a_number_is_plain_finite_and_within_what_it_is_for(flag, good, bad, capsys):
    for text in good:
        value = getattr(cli.parse(Numbers, argv=[f"--{flag}={text}"]), flag)
        assert (
            value == type(value)(text)
            and str(value) != "-0.0"
            and type(value) is type(getattr(Numbers, flag))
        )
    for text in bad:
        with pytest.raises(SystemExit):
            cli.parse(Numbers, argv=[f"--{flag}={text}"])
        error = capsys.readouterr().err
        assert f"--{flag}: expected" in error and error.count("\n") == 1 and len(error) < 250


@pytest.mark.parametrize(
    "raised, status, key",
    [
        (UserError("the file is missing."), "error: the file is missing.", ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x.pt"), "error: Permission denied: /x.pt.", ""),
        (OSError(28, "No space left on device"), "error: No space left on device; free some space", ""),
        (torch.OutOfMemoryError(), "error: the GPU ran out of memory; use fewer or shorter", ""),
        (MemoryError(), "error: the machine ran out of memory; use fewer or shorter", ""),
    ],
)
def test_a_users_mistake_is_one_sentence_and_no_traceback(raised, status, key, monkeypatch, capsys):
    def main(config):
        raise raised

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, Config)
    if isinstance(status, int):
        assert stopped.value.code == status
    else:  # sys.exit(text): the text on stderr, and status 1
        assert stopped.value.code.startswith(status) and "\n" not in stopped.value.code
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(10**14), lambda: torch.empty(2**62), lambda: np.empty(10**15)]
)
def test_memory_that_the_machine_does_not_have_is_one_sentence_that_names_what_to_lower(
    allocate, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda config: allocate(), Flags)
    expected = (
        "the machine ran out of memory; use fewer or shorter rows at a time (--micro-batch, --micro-tokens, "
    )
    assert stopped.value.code == f"error: {expected}--batch-size)."


@pytest.mark.parametrize("bug", [lambda: 1 / 0, lambda: torch.ones(2) + torch.ones(3)])
def test_a_bug_is_not_swallowed(bug, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        cli.run(lambda config: bug(), Config)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def metrics(tmp_path):
    """metrics(start_step) → a fresh Metrics of a ten-step run, and the file's path."""

    def make(start_step=0):
        config = Config(out=str(tmp_path / "new" / "x.pt"))
        return cli.Metrics(config, 10, torch.device("cpu"), start_step), tmp_path / "new" / "x.metrics.jsonl"

    return make


def test_metrics_open_with_versions_hardware_and_config(metrics):
    _, path = metrics()
    [header] = read(path)
    assert header["torch"] == torch.__version__ and header["python"] == sys.version.split()[0]
    assert header["device"] == "cpu" and header["hardware"] and header["config"]["lr"] == 3e-3


def test_a_logged_row_holds_plain_numbers_and_shows_step_percent_loss_and_time(metrics, capsys):
    log, path = metrics()
    log.tokens = 1000
    log.log(5, loss=torch.tensor(1.25, requires_grad=True), lr=1e-3, rewards=2)
    log.note(step=5, eval_loss=1.5)
    _, row, evaluation = read(path)
    assert (row["step"], row["loss"], row["lr"], row["rewards"]) == (5, 1.25, 1e-3, 2)
    assert row["tokens_per_s"] > 0 and evaluation == {"step": 5, "eval_loss": 1.5}
    line = capsys.readouterr().out
    assert all(part in line for part in ("5/10", "50%", "loss 1.25", "tok/s", "left"))


@pytest.mark.parametrize("name, value", [("loss", "nan"), ("loss", "inf"), ("grad_norm", "nan")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(metrics, name, value):
    log, path = metrics()
    with pytest.raises(UserError, match=rf"{name} is {value} at step 3.*--lr"):
        log.log(
            3, **{"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0), name: torch.tensor(float(value))}
        )
    assert read(path)[-1]["step"] == 3  # the row that tells why is there


def test_a_resumed_run_forgets_rows_beyond_its_checkpoint(metrics):
    log, path = metrics()
    for step in (2, 4, 6):
        log.log(step, loss=1.0 / step)
        log.note(step=step, eval_loss=9.0)
    log, _ = metrics(start_step=4)
    log.log(6, loss=7.0)
    rows = read(path)
    assert [r["step"] for r in rows if "step" in r] == [2, 2, 4, 4, 6] and rows[-1]["loss"] == 7.0
    assert [r["at_step"] for r in rows if r.get("event") == "start"] == [0, 4]
    metrics(start_step=0)
    assert len(read(path)) == 1  # a fresh run starts a fresh file


def test_a_resume_survives_a_row_that_a_crash_cut_short(metrics):
    log, path = metrics()
    log.log(2, loss=1.0)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    metrics(start_step=2)
    assert [r.get("step") for r in read(path)] == [None, 2, None]


@pytest.mark.parametrize(
    "odd", ["3", "[1]", '"step"', '{"step": "4"}', '{"step": 2, "tokens": [1]}', '{"step": null}'], ids=str
)
def test_a_metrics_file_that_holds_something_else_is_one_sentence(metrics, odd):
    log, path = metrics()
    log.log(2, loss=1.0)
    text = path.read_text(encoding="utf-8") + odd + "\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.metrics\.jsonl, line 3 is no row of a run's metrics"):
        metrics(start_step=2)
    assert path.read_text(encoding="utf-8") == text  # it is as it was


def test_durations_read_like_a_clock():
    assert [cli.duration(s) for s in (0, 59.9, 60, 3599, 3600, 3725)] == [
        "0s", "59s", "1m00s", "59m59s", "1h00m", "1h02m",
    ]  # fmt: skip
