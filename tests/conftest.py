"""What the tests share: one thread, scripts as subprocesses, a real vocabulary, a tiny run."""

import importlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ON_POLICY, write_lines

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # tiny tensors; and a subprocess can then be compared bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # in subprocesses: two threads for tiny tensors mostly wait


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, help="cases of each test in tests/fuzz; 0: a few hundred")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, and only them")


def pytest_configure(config):
    """Without --gpu there is none, nor in any process that a test starts: --device auto is then the CPU, in
    fp32, on every machine, and a test may fork."""
    if not config.getoption("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("gpu"):
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and pytest --gpu"))


@pytest.fixture(autouse=True)
def products_in_fp32():
    """A run in bf16 lets those that stay in fp32 be rounded to TF32, in all of its process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def fuzz(request):
    """fuzz(count) → so many seeded random.Random's; in a long run as many as --fuzz says."""
    return lambda count: map(random.Random, range(request.config.getoption("fuzz") or count))


# before any test or fixture, and whatever nohup or a test runner has ignored
HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
HANDLERS[signal.SIGINT] = signal.default_int_handler


@pytest.fixture(autouse=True)
def signals_as_an_interpreter_has_them():
    """Each test starts with these: what came before, a fixture of the session too, may have been a run."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def double():
    """Everything in float64, so that rounding cannot hide, or feign, a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def run():
    """run(script, *arguments, input=…) → (exit status, stdout, stderr)."""
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def run(*command, input=""):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=surroundings, input=input,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def r50k():
    """GPT-2's vocabulary, from the shared folder: nothing is downloaded."""
    folder = SHARED / "tiktoken"
    if not folder.exists():
        pytest.skip(f"no vocabulary in {folder}")
    from nanoalign.tokenizer import get_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        return get_tokenizer("r50k_base")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the tiny world's files."""
    from nanoalign.world.__main__ import Config, main

    folder = tmp_path_factory.mktemp("world")
    main(Config(out=str(folder), size="tiny"))
    return folder


@pytest.fixture(scope="session")
def base(world):
    """A base checkpoint that has seen a few batches."""
    from train_pretrain import Config, main

    path, data = str(world / "base.pt"), {"eval_data": f"{world}/pretrain_held_out.jsonl"}
    main(Config(data=f"{world}/pretrain.jsonl", **data, out=path, model="world-tiny", epochs=0.3))
    return path


@pytest.fixture(scope="session")
def sft(world, base):
    """An SFT checkpoint that has seen a few batches."""
    from train_sft import Config, main

    path, data = str(world / "sft.pt"), {"eval_data": f"{world}/sft_held_out.jsonl"}
    main(Config(init=base, data=f"{world}/sft.jsonl", **data, out=path))
    return path


@pytest.fixture(scope="session")
def brief(world, sft):
    """A policy that has learnt to end after a few words: what it says can be compared."""
    from nanoalign.rows import read_rows
    from train_sft import Config, main

    words, path = ("Yes", "No", "Maybe", "Fine"), str(world / "brief.pt")
    said = [
        {**row, "completion": " ".join(words[(i * k + i) % 4] for k in range(i % 3 + 1)) + "."}
        for i, row in enumerate(read_rows(f"{world}/prompts.jsonl", "prompts"))
    ]
    data = write_lines(world / "brief.jsonl", said)
    main(Config(init=sft, data=data, out=path, epochs=3, lr=1e-2, batch_size=16, warmup=2))
    return path


@pytest.fixture(scope="session")
def pairs(world, sft):
    """Pairs collected from it."""
    from collect import Config, main

    path = str(world / "pairs.jsonl")
    main(Config(policy=sft, prompts=f"{world}/prompts.jsonl", out=path, max_new_tokens=24))
    return path


@pytest.fixture(scope="session")
def few_pairs(world, pairs):
    """The pairs of half as many prompts: a reward model reads them all at its end."""
    from nanoalign.rows import read_rows

    rows = read_rows(pairs, "pairs")
    half = rows[len(rows) // 2]["prompt"]
    return write_lines(world / "few_pairs.jsonl", rows[: [row["prompt"] for row in rows].index(half)])


@pytest.fixture(scope="session")
def thumbs(pairs):
    """The path of the thumbs up and down that were collected with the pairs."""
    return pairs.removesuffix(".jsonl") + ".thumbs.jsonl"


@pytest.fixture(scope="session")
def rm(world, sft, pairs):
    """A reward model of them."""
    from train_rm import Config, main

    path = str(world / "rm.pt")
    main(Config(init=sft, data=pairs, out=path))
    return path


@pytest.fixture(scope="session")
def steps_file(world):
    """Rows of steps, labelled by the world's checker: its demonstrated solutions."""
    from nanoalign.rows import read_rows, write_rows
    from nanoalign.world.steps import check_steps

    rows, path = [], str(world / "steps.jsonl")
    for row in read_rows(f"{world}/solutions.jsonl", "chat"):
        *prompt, answer = row["messages"]
        steps, gold = answer["content"].split("\n"), f"Answer: {row['meta']['answer']}"
        labels = check_steps(row["meta"], steps)
        rows.append({"prompt": prompt, "completions": steps, "labels": labels, "label": steps[-1] == gold})
    write_rows(path, rows)
    return path


@pytest.fixture(scope="session")
def prm(world, sft, steps_file):
    """A process reward model of them."""
    from train_prm import Config, main

    path = str(world / "prm.pt")
    main(Config(init=sft, data=steps_file, out=path, batch_size=16, epochs=2))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of checkpoints of some thousand parameters (wires.py)."""
    from wires import write_models

    folder, dtype = tmp_path_factory.mktemp("tiny"), torch.get_default_dtype()
    write_models(folder)
    torch.set_default_dtype(dtype)
    return folder


STAGES = {  # which files a stage reads, by the fixtures that make them, and its other flags
    "pretrain": ({}, {"model": "world-tiny", "context": 32, "epochs": 0.75}),
    "sft": ({"init": "base"}, {"epochs": 2}),
    "dpo": ({"init": "sft", "data": "pairs"}, {"lr": 1e-3, "max_new_tokens": 24, "epochs": 0.14}),
    "kto": ({"init": "sft", "data": "thumbs"}, {"lr": 1e-3, "warmup": 2, "epochs": 0.8}),
    "orpo": ({"init": "base", "data": "pairs"}, {"epochs": 0.14}),
    "rm": ({"init": "sft", "data": "few_pairs"}, {"batch_size": 4, "epochs": 0.9}),
    "prm": ({"init": "sft", "data": "steps_file"}, {"lr": 1e-3, "epochs": 0.5}),
    "ppo": ({"init": "sft", "reward": "rm"}, {"kl_target": 0.1, "kl_horizon": 50.0}),
    "grpo": ({"init": "brief", "reward": "rm"}, {"group_size": 4}),
}


@pytest.fixture(scope="session")
def job(request, tmp_path_factory):
    """job(stage) → the script, and the Config of a run of a dozen small steps into a folder of its own."""

    def make(stage, **changes):
        script, world = importlib.import_module(f"train_{stage}"), request.getfixturevalue("world")
        files, flags = STAGES[stage]
        files = {flag: request.getfixturevalue(fixture) for flag, fixture in files.items()}
        if stage in ("pretrain", "sft"):
            files["data"] = f"{world}/{stage}_held_out.jsonl"
        schedule = {"batch_size": 8, "log_every": 1, "eval_every": 6, "save_every": 4}
        if stage in ON_POLICY:  # every iteration makes two optimiser steps
            schedule |= {"steps": 12, "epochs": 2, "minibatch": 8, "max_new_tokens": 12}
            files |= {"prompts": f"{world}/prompts.jsonl", "watch": "judge"}
        out = str(tmp_path_factory.mktemp(stage) / "x.pt")
        return script, script.Config(**{**files, **schedule, **flags, "out": out, **changes})

    return make
