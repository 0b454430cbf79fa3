"""Stopping and resuming: whatever ends a run, it goes on from its last partial checkpoint bit for bit."""

import importlib
import os
import random
import signal
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from runs import (
    ON_POLICY,
    STAGES,
    WORLD,
    Killed,
    crash,
    forked,
    hang_up,
    in_a_process,
    interrupt,
    kill,
    same_run,
    same_weights,
    terminate,
    write_lines,
)

from nanoalign import UserError, checkpoint, cli
from nanoalign.checkpoint import load, load_scalar, partial_path, resume, save, save_partial
from nanoalign.model import GPT, preset
from nanoalign.rows import read_rows
from nanoalign.run import Flags
from nanoalign.training import make_optimizer, pick_device


@pytest.fixture(scope="module", params=STAGES)
def whole(request, job):
    """A stage's name, and the Config of a run of it that was never interrupted."""
    script, config = job(request.param)
    script.main(config)
    assert load(config.out)["step"] > 9
    return request.param, config


@pytest.mark.parametrize("step, action, left_at", [(1, terminate, 1), (6, hang_up, 6), (7, crash, 4)])
def test_a_stopped_run_resumes_bit_for_bit(whole, step, action, left_at, job, monkeypatch, capsys):
    stage, uninterrupted = whole
    script, config = job(stage, resume=True)  # nothing to resume yet: it starts afresh
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * step if stage in ON_POLICY else step, action)
        with pytest.raises((SystemExit, Killed)) as stopped:
            script.main(config)
    if action is not crash:
        assert stopped.value.code == 128 + (signal.SIGTERM if action is terminate else signal.SIGHUP)
        assert f"saved in {partial_path(config.out)}" in capsys.readouterr().err
    assert load(partial_path(config.out))["step"] == left_at and not Path(config.out).exists()
    script.main(config)
    same_run(uninterrupted, config)
    assert not partial_path(config.out).exists()


SIGNALLED = """
import os, sys
import train_pretrain
from nanoalign import cli, run
from runs import interrupt
from pytest import MonkeyPatch

number = int(sys.argv.pop(1))
interrupt(MonkeyPatch(), 6, lambda: os.kill(os.getpid(), number))
cli.run(train_pretrain.main, train_pretrain.Config)
"""


def signalled(script, number, flags):
    interrupt(pytest.MonkeyPatch(), 6, lambda: os.kill(os.getpid(), number))
    sys.argv = ["train_pretrain.py", "--resume", *flags]
    cli.run(script.main, script.Config)


@pytest.mark.parametrize(
    "number, status, left_at",
    [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 6), (signal.SIGHUP, 129, 6), (signal.SIGKILL, -9, 4)],
)
def test_a_real_process_stops_cleanly_and_resumes_bit_for_bit(number, status, left_at, job, run):
    """It is signalled in the middle of its sixth step: no clock decides how far it has come."""
    script, whole = job("pretrain")
    script.main(whole)
    _, config = job("pretrain", resume=True)
    flags = {k: v for k, v in asdict(config).items() if not isinstance(v, bool) and v != ""}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    if number == signal.SIGTERM:  # from a fresh interpreter; the others are copies of this process
        code, _, errors = run("-c", SIGNALLED, int(number), "--resume", *flags)
    else:
        code, _, errors = forked(lambda: signalled(script, number, flags))
    assert code == status and "Traceback" not in errors
    if number != signal.SIGKILL:
        assert "saved in" in errors and "--resume" in errors
    assert load(partial_path(config.out))["step"] == left_at and not Path(config.out).exists()
    script.main(config)
    same_run(whole, config)


def at_step(patch, number):
    """Kill in the middle of this optimiser step."""
    interrupt(patch, number, kill)


def at_save(patch, number, name, moment):
    """Kill at the save of this number of a file of this name: half-way through its bytes, when they are all
    there under another name, or just after it has its own."""
    count, replace, write = iter(range(1, 1000)), os.replace, torch.save

    def half(content, file):
        if moment == "half" and saving[0] and next(count) == number:
            file.write(b"PK half a file")
            file.flush()
            kill()
        return write(content, file)

    def rename(source, target):
        mine = Path(target).name == name and moment != "half" and next(count) == number
        if mine and moment == "whole":
            kill()
        replace(source, target)
        if mine:
            kill()

    def content(path, *rest, original=checkpoint.write):
        saving[0] = Path(path).name == name
        original(path, *rest)

    saving = [False]
    patch.setattr(torch, "save", half)
    patch.setattr(os, "replace", rename)
    patch.setattr(checkpoint, "write", content)


def test_a_run_that_is_killed_again_and_again_resumes_bit_for_bit(whole, job, monkeypatch):
    """kill -9 of real processes, at random: in a step, in a save on the way, in the last one of all. No lock
    and no half a file stands in the way of the next, and nothing is left."""
    stage, uninterrupted = whole
    script, config = job(stage, resume=True)
    folder, rng = Path(config.out).parent, random.Random(f"kill {stage}")
    steps = rng.randint(1, 16 if stage in ON_POLICY else 8)
    on_the_way, at_the_end = rng.choices(("half", "whole", "after"), k=2)
    kills = [
        lambda: at_step(monkeypatch, steps),
        lambda: at_save(monkeypatch, 1, "x.partial.pt", on_the_way),
        lambda: at_save(monkeypatch, 1, "x.pt", at_the_end),
    ]
    for prepare in kills:
        assert in_a_process(script, config, prepare) == -signal.SIGKILL
        assert (folder / "x.pt.lock").exists()
    assert partial_path(config.out).exists()  # whatever became of the finished one
    assert in_a_process(script, config) == 0
    same_run(uninterrupted, config)
    assert sorted(os.listdir(folder)) == ["x.metrics.jsonl", "x.pt"]


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_with_other_flags_or_data_is_an_error_that_names_the_change(
    stage, job, monkeypatch, tmp_path
):
    data, name = tmp_path / "data.jsonl", "prompts" if stage in ON_POLICY else "data"
    lines = Path(getattr(job(stage)[1], name)).read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines), encoding="utf-8")
    script, config = job(stage, **{name: str(data)})
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    with pytest.raises(UserError, match=r"--lr was .* and is 0\.5") as caught:
        script.main(replace(config, lr=0.5, epochs=3, resume=True))
    assert "--epochs was" in str(caught.value) and "--batch-size" not in str(caught.value)
    data.write_text("\n".join(lines[8:]), encoding="utf-8")  # at most six of them are pairs of one prompt
    with pytest.raises(UserError, match="the data"):
        script.main(replace(config, resume=True))


def test_what_no_weight_depends_on_may_change_at_a_resume(whole, job, monkeypatch):
    """How often it logs, looks and saves; where it runs; how its paths are spelled."""
    stage, uninterrupted = whole
    script, config = job(stage)
    with monkeypatch.context() as patch:
        interrupt(patch, 12 if stage in ON_POLICY else 6, hang_up)
        with pytest.raises(SystemExit):
            script.main(config)
    paths = [name for name, value in asdict(config).items() if isinstance(value, str) and os.sep in value]
    spelled = {name: os.path.relpath(getattr(config, name)) for name in paths}
    assert "out" in spelled and len(spelled) > 1
    often = {"log_every": 5, "eval_every": 4, "save_every": 7, "device": pick_device("auto").type}
    script.main(replace(config, **spelled, **often, resume=True))
    same_weights(uninterrupted, config)


@pytest.mark.parametrize("stage", STAGES)
def test_any_other_flag_that_changes_refuses_a_resume(stage, tmp_path):
    config = importlib.import_module(f"train_{stage}").Config(out=str(tmp_path / "x.pt"), resume=True)
    model = GPT(preset("world-tiny", vocab_size=WORLD.vocab_size, context=8, layers=1))
    optimizer = make_optimizer(model, 0.1)
    save_partial(config, model, optimizer, stage=stage, tokenizer=WORLD, step=3, data="abc")

    def resumed(**change):
        return resume(replace(config, **change), model, optimizer, stage=stage, data="abc")["step"]

    elsewhere = {"device": "cpu", "shard": True, "offload": True, "timeout": 1.0}
    often = {"log_every": 77, "eval_every": 77, "save_every": 77}
    for name, value in {**often, **elsewhere, "plan": True}.items():
        assert resumed(**{name: value}) == 3
    depended_on = {field.name for field in fields(config)} - {"out", "resume", "plan", *often, *elsewhere}
    assert {"lr", "seed", "batch_size", "steps", "warmup", "compile", "eval_data"} <= depended_on
    for name in depended_on:
        value = getattr(config, name)
        other = not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was"):
            resumed(**{name: other})


def test_other_soft_labels_are_other_data_to_a_resumed_run(job, pairs, tmp_path):
    for stage in ("dpo", "rm"):
        rows = read_rows(pairs, "pairs")[:90]
        data = write_lines(tmp_path / "soft.jsonl", rows)
        script, config = job(stage, data=data, save_every=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanoalign.run.finish", lambda *a, **k: None)  # leaves its partial checkpoint
            script.main(config)
        write_lines(tmp_path / "soft.jsonl", [*rows[:-1], {**rows[-1], "probability": 0.9}])
        with pytest.raises(UserError, match=r"data .* changed"):
            script.main(replace(config, resume=True))


@pytest.mark.parametrize("stage", ON_POLICY)
def test_a_run_does_not_resume_against_a_retrained_reward(stage, job, rm, monkeypatch, tmp_path):
    reward = tmp_path / "rm.pt"
    reward.write_bytes(Path(rm).read_bytes())
    changes = {"reward": f"{reward} - 0.01*length", "resume": True}
    script, config = job(stage, **changes, **({"shared_critic": True} if stage == "ppo" else {}))
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    model, tokenizer, _ = load_scalar(rm)
    torch.nn.init.zeros_(model.score.weight)
    save(reward, model, stage="rm", tokenizer=tokenizer, config=Flags(), step=1)
    with pytest.raises(UserError, match="the data or the starting checkpoint changed"):
        script.main(config)


def test_resuming_a_finished_run_does_nothing(job, capsys):
    script, config = job("sft", epochs=1, resume=True)
    script.main(config)
    before = Path(config.out).stat().st_mtime_ns
    script.main(config)
    assert "finished" in capsys.readouterr().out and Path(config.out).stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_last_partial(stage, job, monkeypatch):
    script, config = job(stage)
    poisoned = lambda step, *rest: float("nan") if step == 5 else 1e-3  # noqa: E731
    monkeypatch.setattr("nanoalign.run.learning_rate", poisoned)
    with pytest.raises(UserError, match=r"is nan at step [67]"):
        script.main(config)
    partial = load(partial_path(config.out))
    assert partial["step"] == 4 and all(weight.isfinite().all() for weight in partial["model"].values())
    assert not Path(config.out).exists()
