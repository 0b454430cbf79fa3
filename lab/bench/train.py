"""Training steps against trl: tokens/s and peak memory of the same weights, rows, batches and precision.

    python -m lab.bench.train --vs trl --data hh_harmless.jsonl                    # a 4-layer, 256-wide GPT-2
    python -m lab.bench.train --vs trl --data hh_harmless.jsonl --model gpt2 --stages dpo grpo
    python -m lab.bench.train --data hh_harmless.jsonl --short                     # DPO only, four minutes

The rows are Anthropic's HH pairs (unpack harmless-base/test.jsonl.gz of
huggingface.co/datasets/Anthropic/hh-rlhf), at their real lengths; longer ones than --max-length are left out.
Nothing is fetched, but for tiktoken's vocabulary on first use.

Both sides run whole (lab/bench/peers.py): `main` of train_X.py and trl's trainer, in fp32 on a CPU and under
bf16 autocast on a GPU, each run in a process of its own. First the losses and gradient norms of three steps
must agree; then each run times --steps steps after --warmup others, which compile. Memory is the peak over
those steps, beyond what the process held after its imports.

MFU counts the FLOPs that a method needs (forward 1, backward 2, a reference 1, attention in full), neither
padding nor anything computed twice: of a large matrix product in the same run, and on a GPU of 989 TFLOP/s.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from lab.bench.peers import OURS, PEERS, twins
from lab.bench.timing import alternate, finish, in_child, matmul_flops
from nanoalign import UserError, cli
from nanoalign.checkpoint import save
from nanoalign.data import chat_examples, one_per_prompt, pair_examples, thin
from nanoalign.model import GPTConfig, preset
from nanoalign.rows import read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import pick_device

PASSES = {"sft": 3, "dpo": 4, "kto": 6, "orpo": 3, "rm": 3, "grpo": 6}  # in forward passes' FLOPs
ITEMS = {"sft": "conversations", "kto": "rows", "grpo": "responses"}  # what a batch is counted in; else pairs
CHECK = {"warmup": 1, "steps": 3, "log_every": 1, "batch_size": 3}  # few rows are alike


@dataclass
class Config:
    data: str = ""  # pair rows: HH transcripts
    vs: str = "trl"  # the peer: trl
    peers: tuple[str, ...] = PEERS[:2]  # its settings; "trl, fast, bf16" is for a CPU, and another precision
    stages: tuple[str, ...] = tuple(OURS)  # which scripts: sft dpo kto orpo rm grpo
    model: str = "small"  # small (4 layers, D 256) or a GPT-2 of nanoalign/model.py: gpt2, gpt2-medium, …
    max_length: int = 512  # tokens of prompt and response, at most
    batch_size: int = 8  # conversations, pairs or labelled rows per step; of GRPO the prompts
    group_size: int = 8  # responses to each prompt of GRPO
    max_new_tokens: int = 64  # length limit of a response of GRPO
    steps: int = 8  # optimiser steps that are timed
    warmup: int = 3  # steps before them: they compile
    rounds: int = 5  # runs of each
    short: bool = False  # DPO, two rounds of two steps, four pairs of at most 256 tokens
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table


def forward_flops(config: GPTConfig, lengths: list[int], scored: int) -> int:
    """FLOPs of the matrix products of a forward pass over rows of these lengths, without padding; `scored`
    tokens go through the head. Attention counts in full, though half of it is masked (as in PaLM)."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = (3 if config.mlp == "swiglu" else 2) * config.mlp_width
    linear = sum(lengths) * 2 * config.width * (2 * heads + 2 * kv_heads + mlp)
    attention = sum(4 * heads * n * n for n in lengths)
    return config.layers * (linear + attention) + 2 * config.width * config.vocab_size * scored


def counts(stage: str, run: dict, batches: list, pairs: list, chats: list) -> list[list[tuple[int, int]]]:
    """The (tokens, tokens through the head) of every row of each step."""
    if stage == "grpo":
        return [[(n + m, m) for n, m in step] for step in run["sampled"]]
    both = [[(len(ids), int(mask.sum())) for ids, mask in pair] for pair in pairs]
    rows = {
        "sft": [[(len(ids), int(mask.sum()))] for ids, mask in chats],
        "dpo": both,
        "kto": [[side] for pair in both for side in pair],
        "orpo": [[(n, n - 1), rejected] for (n, _), rejected in both],  # its NLL is of the prompt too
        "rm": [[(n, 0) for n, _ in pair] for pair in both],
    }[stage]
    return [[side for i in batch for side in rows[i]] for batch in batches]


def alike(stage: str, rows: list[dict], pairs: list) -> list[dict]:
    """The rows on which losses are compared. ORPO's must be of chosen sides of one length, for trl weighs
    them by their tokens; GRPO's of prompts of one length, for trl pads these on the left and does not tell
    GPT-2 where they begin."""
    size = {"orpo": lambda pair: len(pair[0][0]), "grpo": lambda pair: int((~pair[0][1]).sum())}.get(stage)
    if not size:
        return rows
    sizes = [size(pair) for pair in pairs]
    common = max(set(sizes), key=sizes.count)
    return [row for row, n in zip(rows, sizes) if n == common]


def write_data(folder: str, rows: list[dict], count: int) -> list[dict]:
    """`count` rows to train on, and two held-out ones, which the scripts ask for."""
    if len(rows) < count + 2:
        raise UserError(f"{count + 2} rows are needed and {len(rows)} fit; lower --steps or --batch-size.")
    rows = thin(rows, count + 2)
    write_rows(f"{folder}/data.jsonl", rows[2:])
    write_rows(f"{folder}/eval.jsonl", rows[:2])
    return rows[2:]


def run(spec: dict, **more) -> dict:
    return in_child("lab.bench.peers", {**spec, **more})


def check(stage: str, spec: dict, peers, exact: bool) -> None:
    """The same rows on the same weights must give the same losses and gradients, three steps long."""
    ours = run(spec)
    if "error" in ours:
        raise UserError(f"train_{stage}.py fails: {ours['error']}")
    for name in peers:
        theirs = run(spec, name=name, batches=ours["batches"], answers=ours["answers"])
        if "error" in theirs:
            continue  # the table will say so
        off = [
            abs(a - b) / max(1, abs(b)) for key in ("losses", "norms") for a, b in zip(ours[key], theirs[key])
        ]
        print(f"check: {stage}: losses and gradient norms of {name} differ by at most {max(off):.0e}")
        if not max(off) <= (1e-3 if exact and "bf16" not in name else 5e-2):
            raise UserError(f"{name} and train_{stage}.py do not compute the same: {ours} against {theirs}.")


def compare(stage: str, config: Config, shape: GPTConfig, folder: str, rows, pairs, tokenizer) -> list[dict]:
    """Check, then alternate → a result for each side, trl's defaults first."""
    device = pick_device(config.device)
    given = {**asdict(config), "log_every": config.warmup, "steps": config.warmup + config.steps}
    spec = {"stage": stage, "given": given, "folder": folder}
    write_data(folder, alike(stage, rows, pairs), CHECK["steps"] * CHECK["batch_size"])
    check(stage, {**spec, "given": given | CHECK}, config.peers, exact=device.type == "cpu")
    kept = write_data(folder, rows, given["steps"] * config.batch_size)
    batches: list = []

    def ours():
        found = run(spec)
        batches[:] = found.pop("batches", [])
        return found

    runs = {"nanoalign": ours}  # the first to run: it draws the batches
    runs |= {
        name: lambda name=name: run(spec, name=name, batches=batches, answers=[]) for name in config.peers
    }
    found = alternate(runs, config.rounds, f"train, {stage}")
    kept_pairs, chats = pair_examples(kept, tokenizer, config.max_length)[0], []
    if stage == "sft":
        chats = chat_examples(read_rows(f"{folder}/data.jsonl", "chat"), tokenizer, config.max_length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results, best = [], matmul_flops(device, dtype)
    for name in (*config.peers, "nanoalign"):
        row = {"case": f"train, {stage}, {config.model}, batch {config.batch_size}", "name": name}
        failed = [one["error"] for one in found[name] if "error" in one]
        if failed:
            results.append({**row, "error": failed[0]})
            continue
        rates, used = [], []
        for one in found[name]:
            steps = counts(stage, one, batches, kept_pairs, chats)[config.warmup : given["steps"]]
            sides = [side for step in steps for side in step]
            flops = PASSES[stage] * forward_flops(shape, [n for n, _ in sides], sum(m for _, m in sides))
            rates.append(sum(n for n, _ in sides) / one["seconds"])
            used.append(flops / one["seconds"])
        per_step = [one["seconds"] / config.steps for one in found[name]]
        items = config.batch_size * (config.group_size if stage == "grpo" else 1) / median(per_step)
        note = f"{items:.3g} {ITEMS.get(stage, 'pairs')}/s, MFU {median(used) / best:.0%} of a matrix product"
        note += f", {median(used) / 989e12:.1%} of 989 TFLOP/s" if device.type == "cuda" else ""
        mb = median(one["mb"] for one in found[name])
        results.append({**row, "seconds": per_step, "rates": rates, "mb": mb, "note": note})
    return results


def main(config: Config) -> None:
    if config.short:
        config = replace(config, stages=("dpo",), max_length=256, batch_size=4, rounds=2, steps=2, warmup=2)
    if config.vs != "trl" or set(config.stages) - OURS.keys() or set(config.peers) - set(PEERS):
        raise UserError(f"--vs is trl; --stages are of {', '.join(OURS)}; --peers are of {', '.join(PEERS)}.")
    if not config.data:
        raise UserError("name pair rows with --data: `--help` says where HH's are.")
    tokenizer, device = get_tokenizer("gpt2"), pick_device(config.device)
    size = {"layers": 4, "width": 256, "heads": 4} if config.model == "small" else {}
    shape = preset("gpt2" if size else config.model, vocab_size=tokenizer.vocab_size, **size)
    pairs, rows = pair_examples(one_per_prompt(read_rows(config.data, "pairs", True)), tokenizer, 10**6)
    fits = [i for i, pair in enumerate(pairs) if max(len(ids) for ids, _ in pair) <= config.max_length]
    print(f"data: {len(fits):,} pairs of at most {config.max_length} tokens")
    rows, pairs = [rows[i] for i in fits], [pairs[i] for i in fits]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = twins(shape, tokenizer.end, max(2, config.max_new_tokens // 2))
        save(f"{folder}/init.pt", ours, stage="sft", tokenizer=tokenizer, config=config, step=0)
        theirs.save_pretrained(f"{folder}/hf")
        del ours, theirs
        for stage in config.stages:
            results += compare(stage, config, shape, folder, rows, pairs, tokenizer)
    finish(results, device, config.out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
