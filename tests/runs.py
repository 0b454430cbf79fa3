"""What the tests of whole runs share: files to run on, metrics to read, and ways to stop a run."""

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
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

    def action():
        sys.argv = [f"{script.__name__}.py", *flags(config)]
        prepare()
        cli.run(script.main, script.Config, script.__doc__)

    status, out, errors = forked(action)
    print(out, errors)
    return status


def forked(action, encoding="utf-8", input=""):
    """Do this in a process of its own → the exit status, or minus the signal; stdout; stderr.

    It is a copy of this one and has imported everything, which costs a new interpreter seconds. Its streams
    are made as an interpreter makes them; only what depends on an interpreter's start needs another.
    """
    file = tempfile.TemporaryFile
    with file() as given, file() as out, file() as errors:
        given.write(input.encode(encoding))
        given.seek(0)
        if (child := os.fork()) == 0:
            status = 70
            try:
                os.dup2(given.fileno(), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
                sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
                marks = {"encoding": encoding, "errors": "backslashreplace"}
                sys.stderr = open(2, "w", **marks, closefd=False)  # noqa: SIM115
                action()
                status = 0
            except SystemExit as left:
                status = left.code or 0
                if isinstance(left.code, str):
                    status = 1
                    print(left.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        errors.seek(0)
        return status, out.read().decode(encoding), errors.read().decode(encoding)


def command(*words):
    """What `python WORD …` does: a script or, after -m, a module."""
    words = [str(word) for word in words]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
