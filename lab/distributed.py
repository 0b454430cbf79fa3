"""What several processes take and send (docs/distributed.md).

    torchrun --nproc-per-node 2 -m lab.distributed --measure --model qwen2.5-0.5b --shard    # adds to --out
    python -m lab.distributed --report out/distributed.jsonl      # the table of what was measured
    python -m lab.distributed --table                             # computed, of published shapes

Measured is the peak beyond the interpreter's: of the resident set (Linux) or what PyTorch has of a GPU.
Computed is what nanoalign/memory.py counts, divided where it is shared out; and bytes over bandwidth.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab import run_on_paths
from lab.memory import on_card, setting
from nanoalign import UserError, cli, parallel
from nanoalign.footprint import Models, rounded, tensors
from nanoalign.logprobs import token_losses
from nanoalign.model import GPT, PRESETS, GPTConfig, parameter_count, preset
from nanoalign.pieces import dealt
from nanoalign.rows import write_rows
from nanoalign.run import Flags
from nanoalign.sharding import part
from nanoalign.training import make_optimizer, optimizer_step, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    model: str = "smollm2-135m"  # a preset of nanoalign/model.py, with random weights
    out: str = "out/distributed.jsonl"  # where a row for each process is added
    length: int = 64  # tokens of a row
    batch_size: int = 2  # random rows of a step


def most(device: torch.device) -> int:
    """The most bytes that this process has held since it was last asked."""
    if device.type == "cuda":
        peak, _ = torch.cuda.max_memory_allocated(device), torch.cuda.reset_peak_memory_stats(device)
        return peak
    told, _ = Path("/proc/self/status").read_text(), Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", told)[1])


def kept(values) -> int:
    """Bytes of tensors, of sharded ones this process's part."""
    return sum(part(x).nbytes for x in values)


def measure(config: Config) -> None:
    """Two optimiser steps of a random model, by the parts that training scripts are made of."""
    device, autocast = setup(config)
    _, empty = most(device), most(device)
    model, rows = GPT(preset(config.model)).to(device), config.batch_size
    prepare(config, model)
    loading, optimizer = most(device) - empty, make_optimizer(model, config.lr)
    ids = torch.randint(model.config.vocab_size, (rows, config.length)).to(device)
    for _ in range(2):  # in the first there are no moments yet
        for piece, counts in dealt(np.arange(rows), np.full(rows, config.length), config):
            with autocast:
                nll, _ = token_losses(model, ids[piece], None, torch.neg)
            (counts * nll / ids.numel()).backward()
        parallel.add_gradients(model)
        gradients = kept(p.grad for p in model.parameters())
        optimizer_step(model, optimizer, config.lr, config.clip)
    how = [name for name in ("shard", "offload", "checkpointing") if getattr(config, name)]
    row = {**setting(config.seed), "model": config.model, "flags": " ".join(f"--{name}" for name in how)}
    row |= {"processes": parallel.size(), "rank": parallel.rank(), "rows": rows, "length": config.length}
    row |= {"weights": kept([*model.parameters(), *model.buffers()]), "gradients": gradients}
    row |= {"moments": kept(x for own in optimizer.state.values() for x in own.values())}
    row |= {"loading": loading, "steps": most(device) - empty}
    path, new = Path(config.out), parallel.everyone(row)
    write_rows(config.out, (cli.readable_rows(path) if path.exists() else []) + new)
    print(*new, sep="\n")


def head(*cells: str, left: int = 2) -> None:
    """The first two lines of a table, whose other columns are numbers."""
    print("|", " | ".join(cells), "|\n|" + "---|" * left + "--:|" * (len(cells) - left))


def report(paths: list[str]) -> None:
    """One table of all runs: of each the process that took most."""
    columns, runs = ("weights", "gradients", "moments", "loading", "steps"), {}
    for row in (row for path in paths for row in cli.readable_rows(Path(path))):
        key = row["model"], row["processes"], row["flags"]
        runs[key] = max(row, runs.get(key, row), key=lambda row: row["steps"])
    print(f"{row['processor']}; torch {row['torch']}; {row['rows']} rows of {row['length']} tokens a step.\n")
    head("GB, measured", "", "processes", *columns)
    for (model, count, flags), row in sorted(runs.items()):
        cells = " | ".join(f"{row[name] / 2**30:.2f}" for name in columns)
        print(f"| {model} | {flags and f'`{flags}`'} | {count} | {cells} |")


# ------------------------------------------------------------------------------------------------ computed

CARD, COUNT, COUNTS, METHODS = 80, 8, (1, 2, 4, 8, 16), ("sft", "dpo", "grpo", "ppo")  # GB of a GPU; GPUs
SHAPES = {
    "qwen2.5-0.5b": PRESETS["qwen2.5-0.5b"], "llama-3.2-1b": PRESETS["llama-3.2-1b"],
    "qwen2.5-7b": GPTConfig(152064, 8192, 28, 3584, 28, 4, mlp_width=18944, qkv_bias=True, tied=False),
    "llama-3.1-8b": GPTConfig(128256, 8192, 32, 4096, 32, 8, mlp_width=14336, tied=False),
    "qwen2.5-14b": GPTConfig(152064, 8192, 48, 5120, 40, 8, mlp_width=13824, qkv_bias=True, tied=False),
    "qwen2.5-32b": GPTConfig(152064, 8192, 64, 5120, 40, 8, mlp_width=27648, qkv_bias=True, tied=False),
}  # fmt: skip
LINKS = {"NVLink 4": 450e9, "400 Gb/s InfiniBand": 50e9, "PCIe 4": 25e9, "10 Gb/s Ethernet": 1.25e9}
PIECES, TOKENS = 8, 4096  # of a process's step; of a piece
WORK = 6 * PIECES * TOKENS / (0.4 * 989e12)  # s for each parameter: an H100 in bf16, at 40 % of its peak


def numbers(parameters, trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def replicated(models: Models, found: dict) -> float:
    """Bytes of one of several processes: as on one GPU, and the largest gradient again while it is summed."""
    summed = 4 * max(p.numel() for p in models.trained.parameters() if p.requires_grad)
    return max(sum(parts.values()) + summed * (moment == "stepping") for moment, parts in found.items())


def sharded(models: Models, found: dict, offload: bool = False) -> float:
    """Bytes of one of `COUNT` processes that share all weights. What is beside blocks is gathered in fp32 and
    stays, two blocks at a time in bf16; a gradient is there twice while it is sent."""
    gpts = [gpt for model in models.own for gpt in model.modules() if isinstance(gpt, GPT)]
    weights = sum(x.nbytes for model in models.own for x in tensors(model))  # of LoRA's reference twice
    roots = [p for gpt in gpts for name, p in gpt.named_parameters() if not name.startswith("blocks.")]
    block, share, sizes = [*gpts[0].blocks[0].parameters()], (0 if offload else 1 / COUNT), []
    for moment in found:
        blocks = 2 * numbers(gpts[0].blocks.parameters()) if moment == "sampling" else 4 * numbers(block)
        parts = {**found[moment], "gathered": 4 * numbers(roots) + blocks}
        cut = weights + parts.pop("optimiser") + parts.pop("gradients", 0)
        parts["weights"] = share * cut
        if moment != "stepping":  # copies in bf16, which autocast need not make
            parts["copies"] = -rounded(models.learners, 2, graph=moment in ("forward", "backward"))
        parts["sent"] = (8 * numbers(roots, True) + 6 * numbers(block, True)) * (moment == "backward")
        sizes.append(sum(parts.values()))
    return max(sizes)


def memory_row(name: str, method: str) -> str:
    """GB while models are loaded, all weights and with LoRA; of each way without and with checkpointing."""
    cells, hows = [], ({}, {"lora": 16, "base_dtype": "bf16"})
    for again in (False, True):
        full, lora = (on_card(CARD, method, SHAPES[name], **how, checkpointing=again) for how in hows)
        loading = [sum(found.pop("loading").values()) for _, found in (full, lora)]
        ways = replicated(*full), replicated(*lora), sharded(*full), sharded(*lora), sharded(*full, True)
        cells.append([f"{size / 2**30:.0f}" for size in (loading[again], *ways)])
    return f"| {name} | {method} | {' | '.join(map(' / '.join, zip(*cells)))} |"


def sent(count: int, shard: bool) -> float:
    """Bytes for each parameter that a process sends in a step, and receives. Replicated: gradients in fp32
    twice. Sharded, for each piece: weights in bf16 twice, or in fp32 once, and gradients in fp32."""
    return 8 * (count - 1) / count * (PIECES if shard else 1)


def speedup(count: int, shard: bool, link: float) -> float:
    """Rows a second, in those of one process: gradients are summed at the end; parts, at best, meanwhile."""
    way = sent(count, shard) / link
    return count * WORK / (max(WORK, way) if shard else WORK + way)


def table() -> None:
    ways = "replicated", "replicated, LoRA 16", "sharded", "sharded, LoRA 16", "sharded, offloaded"
    head("GB, computed", "", "loading, all / LoRA 16", *ways)
    print(*(memory_row(name, method) for name in SHAPES for method in METHODS), sep="\n")
    print()
    head("sent, computed", "parameters", "GB", *(f"s by {link}" for link in LINKS), "s of work", left=1)
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            P = parameter_count(GPT(shape))
        both, speeds = [P * sent(COUNT, shard) for shard in (False, True)], (1e9, *LINKS.values())
        cells = [[f"{x / v:,.{0 if x / v >= 10 else 2}f}" for x in both] for v in speeds]
        print(f"| {name} | {P / 1e9:.2f} B | {' | '.join(map(' / '.join, cells))} | {P * WORK:.2g} |")
    print()
    head("speed, computed", *(f"N = {count}" for count in COUNTS), left=1)
    for link, speed in LINKS.items():
        cells = [[f"{speedup(count, shard, speed):.2f}" for shard in (False, True)] for count in COUNTS]
        print(f"| {link} | {' | '.join(map(' / '.join, cells))} |")


def main(words: list[str]) -> None:
    if words != ["--table"] and (words[:1] != ["--report"] or len(words) < 2):
        raise UserError("name a command: --measure, --report FILE or --table.")
    table() if words == ["--table"] else report(words[1:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        del sys.argv[1]
        cli.run(measure, Config, __doc__, shared=True)
    else:
        run_on_paths(main)
