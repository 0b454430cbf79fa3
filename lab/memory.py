"""What runs take, against what they said they would (nanoalign/memory.py, docs/memory.md).

    python -m lab.memory measure --out out/memory.jsonl       # a process a run; what the file has is kept
    python -m lab.memory report out/memory.jsonl              # their table, of one file or several
    python -m lab.memory table                                # of published shapes, computed for one GPU

Measured is the peak of the resident set (Linux), less that of a run of the same vocabulary and precision with
a model of next to nothing: the interpreter, PyTorch, its buffers. glibc keeps what is freed in pieces below
32 MB for later, where it may stay unused; the column that is compared gives back what is above 256 kB, by
MALLOC_MMAP_THRESHOLD_. The other is what the same run takes without that. Models named wide have GPT-2's
vocabulary, which tiktoken downloads unless TIKTOKEN_CACHE_DIR has it.
"""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn as nn

import train_dpo
import train_grpo
import train_kto
import train_orpo
import train_ppo
import train_rm
import train_sft
from lab import run_on_paths
from nanoalign import UserError, cli
from nanoalign.checkpoint import save
from nanoalign.cli import readable_rows
from nanoalign.data import BatchOrder
from nanoalign.extent import largest
from nanoalign.footprint import Models
from nanoalign.kernels import BUDGET
from nanoalign.lora import without
from nanoalign.memory import moments
from nanoalign.model import GPT, PRESETS, GPTConfig
from nanoalign.rows import write_rows
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import freeze, load_reference, prepare

# ------------------------------------------------------------------------------------------------ measured

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
SHAPES = {  # of models; the vocabulary is the world's or, of `wide`, GPT-2's 50,257 tokens
    "nano": GPTConfig(context=512, layers=1, width=16, heads=1),
    "wide-nano": GPTConfig(context=512, layers=1, width=16, heads=1),
    "llama": GPTConfig(context=512, layers=4, width=512, heads=8),
    "slim": GPTConfig(context=1024, layers=8, width=256, heads=4, kv_heads=2),
    "gpt2": GPTConfig(context=512, layers=6, width=512, heads=8, **GPT2),
    "wide": GPTConfig(context=512, layers=2, width=320, heads=5),
}
LORA = "--lora 16 --precision bf16 --base-dtype bf16"
CASES = (  # script, model, flags
    ("pretrain", "world-large", "--context 256 --batch-size 16"),
    ("sft", "llama", "--micro-batch 8"),
    ("sft", "slim", "--batch-size 16 --checkpointing"),
    ("sft", "gpt2", "--batch-size 8 --packing"),
    ("sft", "slim", "--batch-size 8 --precision bf16"),
    ("sft", "wide", f"--batch-size 8 {LORA}"),
    ("rm", "llama", "--batch-size 8"),
    ("rm", "slim", "--batch-size 8 --no-reader --lora 16"),
    ("dpo", "llama", "--batch-size 8"),
    ("dpo", "llama", "--batch-size 8 --lora 16"),
    ("dpo", "slim", "--batch-size 8 --micro-batch 4 --precision bf16"),
    ("dpo", "wide", "--batch-size 8"),
    ("kto", "gpt2", "--batch-size 16"),
    ("kto", "gpt2", "--batch-size 16 --micro-tokens 1024 --lora 16"),
    ("orpo", "slim", "--batch-size 8"),
    ("orpo", "wide", "--batch-size 8 --checkpointing"),
    ("ppo", "slim", "--micro-batch 8 --shared-critic"),
    ("ppo", "llama", "--lora 16"),
    ("grpo", "wide", "--group-size 8"),
    ("grpo", "gpt2", "--group-size 8 --lora 16 --checkpointing"),
    ("prm", "llama", "--batch-size 16"),
)
SHARED = "--steps 2 --warmup 1 --eval-every 1000 --max-length 512"
SAMPLED = "--steps 2 --warmup 1 --batch-size 32 --minibatch 16 --max-new-tokens 64 --eval-prompts 4"
ROWS = {"sft": "chats", "rm": "pairs", "dpo": "pairs", "orpo": "pairs", "kto": "labelled", "prm": "steps"}
WATCHED = """
import atexit, re, runpy, sys
atexit.register(lambda: print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
del sys.argv[0]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Config:
    out: str = "out/memory.jsonl"  # a row for each run
    only: str = ""  # runs whose command holds this
    seed: int = 0  # of weights and rows


def said(number: int, words: int) -> str:
    every = "the tea is hot and we like it so much".split()  # noqa: SIM905
    return " ".join(every[(number * 7 + i * (1 + number % 3)) % 10] for i in range(words))


def write_data(folder: str, count: int = 64) -> None:
    """Rows of every kind, of some 200 tokens."""
    n, prompts = range(count), [said(i, 100 + 10 * (i % 4)) for i in range(count)]
    first, second = [said(i + 1, 100) for i in n], [said(i + 2, 90) for i in n]
    steps = [[said(i + k, 30) for k in range(3)] for i in n]
    rows = {
        "texts": [{"text": said(i, 600)} for i in n],
        "prompts": [{"prompt": prompts[i], "meta": {}} for i in n],
        "chats": [{"prompt": prompts[i], "completion": first[i]} for i in n],
        "pairs": [{"prompt": prompts[i], "chosen": first[i], "rejected": second[i]} for i in n],
        "labelled": [{"prompt": prompts[i], "completion": first[i], "label": i % 2 == 0} for i in n],
        "steps": [{"prompt": prompts[i], "completions": steps[i], "labels": [1, 1, i % 2]} for i in n],
    }
    for name, own in rows.items():
        write_rows(f"{folder}/{name}.jsonl", own)


def write_model(folder: str, name: str) -> None:
    """A random policy of a shape, and a reward model of its size."""
    tokenizer = get_tokenizer("r50k_base" if name.startswith("wide") else "world")
    policy = GPT(replace(SHAPES[name], vocab_size=tokenizer.vocab_size))
    reward, own = ScalarGPT.from_policy(policy, name != "gpt2"), {"tokenizer": tokenizer, "step": 0}
    scale = {"stage": "rm", "chat": False, "normalisation": {"mean": 0.0, "std": 1.0}}
    save(f"{folder}/{name}.pt", policy, config=train_sft.Config(), stage="sft", **own)
    save(f"{folder}/{name}-rm.pt", reward, config=train_sft.Config(), **scale, **own)


def command(folder: str, script: str, model: str, flags: str, seed: int) -> list[str]:
    words = [f"train_{script}.py", "--out", f"{folder}/out.pt", "--device", "cpu", "--seed", str(seed)]
    if script == "pretrain":
        words += ["--data", f"{folder}/texts.jsonl", "--model", model]
        return [*words, *SHARED.replace(" --max-length 512", "").split(), *flags.split()]
    words += ["--init", f"{folder}/{model}.pt"]
    if script in ("ppo", "grpo"):
        words += ["--reward", f"{folder}/{model}-rm.pt", "--prompts", f"{folder}/prompts.jsonl"]
        return [*words, "--doctor", "", *SAMPLED.split(), *flags.split()]
    return [*words, "--data", f"{folder}/{ROWS[script]}.jsonl", *SHARED.split(), *flags.split()]


def run(words: list[str], **environment: str) -> tuple[float, dict]:
    """→ the peak of the resident set, in MB, and what the run had planned, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    program = [sys.executable, "-c", WATCHED, *words]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed: {done.stderr.strip()[-300:]}")
    rows = readable_rows(Path(words[2].replace(".pt", ".metrics.jsonl")))
    planned = next(row for row in rows if row.get("event") == "memory")
    return int(done.stdout.split()[-1]) / 1024, planned


def total(planned: dict) -> float:
    """MB."""
    return sum(n for name, n in planned.items() if name not in ("event", "moment")) / 2**20


def measure(config: Config) -> None:
    if not Path("/proc/self/status").exists():
        raise UserError("the peak of a process is read from /proc, which only Linux has.")
    ways = {"peak": {"MALLOC_MMAP_THRESHOLD_": "262144"}, "as it is": {}}
    rows = readable_rows(Path(config.out)) if Path(config.out).exists() else [setting(config.seed)]
    there = [(row["script"], row["model"], row["flags"]) for row in rows[1:]]
    due = [case for case in CASES if config.only in " ".join(case) and case not in there]
    torch.manual_seed(config.seed)
    with TemporaryDirectory() as folder:
        write_data(folder)
        for name in {"nano", "wide-nano", *(model for _, model, _ in due)} & SHAPES.keys():
            write_model(folder, name)

        @functools.cache
        def empty(model: str, precision: str, way: str) -> float:
            flags = f"--batch-size 2 --precision {precision}"
            peak, planned = run(command(folder, "sft", model, flags, config.seed), **ways[way])
            return peak - total(planned)

        for script, model, flags in due:
            own = "wide-nano" if model == "wide" else "nano", "bf16" if "bf16" in flags else "fp32"
            row = {"script": script, "model": model, "flags": flags}
            for way, environment in ways.items():
                peak, planned = run(command(folder, script, model, flags, config.seed), **environment)
                row |= {way: round(peak - empty(*own, way)), "planned": round(total(planned))}
            rows.append(row | {"while": planned["moment"], "empty": round(empty(*own, "peak"))})
            write_rows(config.out, rows)
            print(json.dumps(rows[-1]), flush=True)


def setting(seed: int) -> dict:
    name = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"processor": name[1] if name else platform.machine(), "torch": torch.__version__, "seed": seed}


def report(paths: list[str]) -> None:
    """One table of all files."""
    where = readable_rows(Path(paths[0]))[0]
    rows = [row for path in paths for row in readable_rows(Path(path))[1:]]
    off = [row["planned"] / row["peak"] - 1 for row in rows]
    empty, kept = [row["empty"] for row in rows], [row["as it is"] / row["peak"] for row in rows]
    print(f"{where['processor']}, one thread; torch {where['torch']}; seed {where['seed']}; MB.\n")
    print("| script | model | flags | planned, at its largest | measured | off by | nothing set |")
    print("|---|---|---|--:|--:|--:|--:|")
    for row, part in zip(rows, off):
        cells = f"{row['planned']:,}, {row['while']} | {row['peak']:,} | {part:+.0%} | {row['as it is']:,}"
        print(f"| {row['script']} | {row['model']} | `{row['flags']}` | {cells} |")
    within = sum(abs(row["planned"] / row["as it is"] - 1) <= 0.25 for row in rows)
    told = f"{min(kept):.2f} to {max(kept):.2f} times as much, and {within} plans are within 25 %"
    print(f"\n{len(rows)} runs: off by {min(off):+.0%} to {max(off):+.0%}. With nothing set they take")
    print(f"{told}. On top comes a run without a model: {min(empty)} to {max(empty)} MB.")


# ------------------------------------------------------------------------------------------------ computed

SIZES = ("gpt2", "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b")  # of model.py's presets
PROMPT, ANSWER, CARD = 512, 512, 24  # tokens, tokens, GB
SCRIPTS = {
    "sft": train_sft, "orpo": train_orpo, "kto": train_kto, "dpo": train_dpo, "rm": train_rm,
    "grpo": train_grpo, "ppo": train_ppo,
}  # fmt: skip
WAYS = {
    "full": {}, "full, checkpointing": {"checkpointing": True},
    "LoRA 16": {"lora": 16, "base_dtype": "bf16"},
    "LoRA 16, checkpointing": {"lora": 16, "base_dtype": "bf16", "checkpointing": True},
}  # fmt: skip


def models(script: str, shape: GPTConfig, config) -> tuple[nn.Module, tuple]:
    """What a script trains, and what it holds beside, of no memory: as its main makes them."""
    device = torch.device("meta")
    with device:
        policy, held = GPT(shape), ()
        trained = policy
        if script == "rm":
            trained = ScalarGPT(shape)
            prepare(config, trained.gpt)
        elif script in ("sft", "orpo"):
            prepare(config, policy)
        else:
            held = [load_reference(config, policy, None, device)]
            prepare(config, policy, *held)
        if script == "ppo":
            held.append(freeze(ScalarGPT(shape)))
            critic = ScalarGPT(shape)
            critic.gpt = without(held[1].gpt).train() if config.lora else critic.gpt
            prepare(config, critic.gpt)
            trained = nn.ModuleList((policy, critic))
    return trained, held


def on_card(card: int, script: str, shape: GPTConfig, **flags) -> tuple[Models, dict]:
    """A run on one GPU of so many GB in bf16 → its models, and its moments in bytes (memory.py)."""
    own = {"minibatch": 32, "max_new_tokens": ANSWER} if script in ("ppo", "grpo") else {}
    config = SCRIPTS[script].Config(batch_size=32, micro_batch=4, **own, **flags)
    side = np.zeros(PROMPT + ANSWER, int), np.arange(PROMPT + ANSWER) >= PROMPT
    example = side if script in ("sft", "kto") else ([side, side],)
    lengths = np.full(64, PROMPT if own else PROMPT + ANSWER)
    batch = largest(config, script, BatchOrder(lengths, 32, 0), [example] * 64, 1)
    budget = min(BUDGET["cuda"], card * 2**30 // 64)  # of logits, as in kernels.py
    chunk = 1 << (budget // (4 * shape.vocab_size)).bit_length() - 1
    trained, held = models(script, shape, config)
    found = Models.of(trained, held, 2, torch.device("cuda"), chunk)
    return found, moments(config, script, found, batch)


def computed(script: str, shape: GPTConfig, **flags) -> int:
    """Bytes that a run needs at most on a GPU of `CARD` GB."""
    _, found = on_card(CARD, script, shape, **flags)
    return max(sum(parts.values()) for parts in found.values())


def table() -> None:
    print(f"| GB, computed | | {' | '.join(SIZES)} |\n|---|---|{'--:|' * len(SIZES)}")
    for script in SCRIPTS:
        for way, flags in WAYS.items():
            cells = [computed(script, PRESETS[name], **flags) / 2**30 for name in SIZES]
            print(f"| {script} | {way} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def main(words: list[str]) -> None:
    if words == ["table"]:
        return table()
    if words[:1] == ["report"]:
        return report(words[1:])
    raise UserError("name a command: measure, report FILE or table.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        del sys.argv[1]
        cli.run(measure, Config, __doc__)
    else:
        run_on_paths(main)
