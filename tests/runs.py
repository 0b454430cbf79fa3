"""What the tests of whole runs share: files to run on, metrics to read, and ways to stop a run."""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from nanoalign import cli, run
from nanoalign.checkpoint import load
from nanoalign.tokenizer import get_tokenizer

WORLD = get_tokenizer("world")
STAGES = ["pretrain", "sft", "dpo", "kto", "orpo", "rm", "prm", "ppo", "grpo"]
ON_POLICY = ("ppo", "grpo")
KINDS = ["grpo", "dr_grpo", "dapo", "rloo"]

# ----------------------------------------------------------------------------------------------- files


def write_lines(path, lines):
    """Write dicts as JSONL; returns the path as a string."""
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def held_out(path, tmp_path, number=4):
    """The first rows of a file, as a file of their own: cheap to evaluate on."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:number]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "held_out.jsonl")


def compared(count, votes=()):
    """Comparisons of "good {i}" and "bad {i}", with the same votes each: (annotator, p)."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "responses": [f"good {i}", f"bad {i}"],
            "ended": [True, True],
            "votes": [{"annotator": name, "p": p} for name, p in votes],
            "meta": {},
        }
        for i in range(count)
    ]


def by(comparisons, name):
    """That annotator's p of every comparison; "none" where it has not voted."""
    return [next((v["p"] for v in c["votes"] if v["annotator"] == name), "none") for c in comparisons]


def clear_pairs(tmp_path):
    """Pairs that are easily told apart; each chosen side has as many tokens as the next."""
    sides = [
        {"prompt": f"{i} + 1?", "chosen": "Yes, sure.", "rejected": f"No idea, {i}."} for i in range(100)
    ]
    return write_lines(tmp_path / "clear.jsonl", sides)


# --------------------------------------------------------------------------------------------- metrics


def metrics(out):
    """All rows of a run's metrics."""
    return [*map(json.loads, Path(out).with_suffix(".metrics.jsonl").read_text("utf-8").splitlines())]


def rows(out):
    """The metrics of a run's steps and evaluations, without what depends on the clock."""
    clock = ("tokens_per_s", "elapsed", "peak_mb", "generation_s", "scoring_s", "update_s")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics(out) if "step" in row]


def steps(out):
    """The metrics of a run's steps."""
    return [row for row in rows(out) if "loss" in row]


def models(out):
    """The models that a run held in memory."""
    return next(row["names"] for row in metrics(out) if row.get("event") == "models")


def same_weights(a, b):
    """Equal bit for bit."""
    ours, theirs = load(a.out)["model"], load(b.out)["model"]
    assert all(torch.equal(weights, theirs[name]) for name, weights in ours.items())


def same_run(a, b):
    """Equal metrics and, bit for bit, equal weights."""
    same_weights(a, b)
    assert load(a.out).get("history") == load(b.out).get("history")
    assert rows(a.out) == rows(b.out)


# -------------------------------------------------------------------------------------------- stopping


class Killed(BaseException):
    """Stands for a crash, a power cut, SIGKILL: nothing of the script runs after it."""


def crash():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)


def interrupt(monkeypatch, step, action):
    """Do `action` in the middle of optimiser step number `step`."""
    original, count = run.optimizer_step, iter(range(1, 1000))

    def optimizer_step(*args):
        if next(count) == step:
            action()
        return original(*args)

    monkeypatch.setattr(run, "optimizer_step", optimizer_step)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def flags(config):
    """A Config as the flags of a command line."""
    words = []
    for name, value in asdict(config).items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def in_a_process(script, config, prepare=lambda: None):
    """Run a script by its command line in a process of its own → the exit status, or minus the signal."""
    if (child := os.fork()) == 0:
        status = 70
        try:
            sys.argv = [f"{script.__name__}.py", *flags(config)]
            prepare()
            cli.run(script.main, script.Config, script.__doc__)
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
            print(left.code)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
