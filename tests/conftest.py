"""What the tests share: one thread, scripts as subprocesses, a real vocabulary, a tiny run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # tiny tensors; and a subprocess can then be compared bit for bit


@pytest.fixture(autouse=True)
def leave_signals_as_they_were():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def double():
    """Everything in float64, so that rounding cannot hide, or feign, a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def start():
    """start(script, *arguments) → a running subprocess with pipes."""

    def start(*command, **options):
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def run(start):
    """run(script, *arguments, input=…) → (exit status, stdout, stderr)."""

    def run(*command, input=None):
        process = start(*command)
        out, err = process.communicate(input, timeout=120)
        return process.returncode, out, err

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

    path = str(world / "base.pt")
    main(
        Config(f"{world}/pretrain.jsonl", f"{world}/pretrain_held_out.jsonl", path, "world-tiny", epochs=0.3)
    )
    return path


@pytest.fixture(scope="session")
def sft(world, base):
    """An SFT checkpoint that has seen a few batches."""
    from train_sft import Config, main

    path = str(world / "sft.pt")
    main(Config(base, f"{world}/sft.jsonl", f"{world}/sft_held_out.jsonl", path))
    return path


@pytest.fixture(scope="session")
def pairs(world, sft):
    """Pairs collected from it."""
    from collect import Config, main

    path = str(world / "pairs.jsonl")
    main(Config(sft, f"{world}/prompts.jsonl", path, max_new_tokens=24))
    return path


@pytest.fixture(scope="session")
def rm(world, sft, pairs):
    """A reward model of them."""
    from train_rm import Config, main

    path = str(world / "rm.pt")
    main(Config(sft, pairs, out=path))
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
