"""Sampling against transformers' generate: tokens/s of the same random weights, from the same prompts.

    python -m lab.bench.generate --vs hf                 # 4 layers, D 256, V 1024; batches of 1, 64, 512
    python -m lab.bench.generate --vs hf --batches 64 --new-tokens 256
    python -m lab.bench.generate --short                 # two minutes

First with fixed lengths: every prompt of --prompt-tokens, every response of --new-tokens, no end token. Then
with real ones: ragged prompts of a quarter to all of --prompt-tokens (left-padded for transformers), and
responses that end at a mean of a third of --new-tokens; only tokens up to the end count. Greedy decoding must
agree token for token first. nanoalign also returns the log-prob of each token; transformers does not.

The last column says how much of the measured copy bandwidth a step's weights and cached keys and values take.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from lab.bench.peers import twins
from lab.bench.timing import alternate, copy_bandwidth, finish, timed
from nanoalign import UserError, cli
from nanoalign.generate import generate
from nanoalign.model import GPT, preset
from nanoalign.training import pick_device


@dataclass
class Config:
    vs: str = "hf"  # the peer: hf
    layers: int = 4  # of the GPT-2
    width: int = 256  # its D
    heads: int = 4  # its attention heads
    vocab: int = 1024  # its V
    batches: tuple[str, ...] = ("1", "64", "512")  # prompts at once
    prompt_tokens: int = 32  # tokens of a prompt, at most
    new_tokens: int = 64  # tokens of a response, at most
    dtype: str = "auto"  # of the weights: fp32, bf16, or auto, which is bf16 on a GPU
    rounds: int = 5  # timings of each
    short: bool = False  # batch 64 only, three rounds
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table
    seed: int = 0  # of weights, prompts and samples


# -------------------------------------------------- the implementations: prompts, lengths, end → token count


def nanoalign(model: GPT, n: int, greedy: bool = False):
    """→ run(prompts, lengths, end or None) → the number of response tokens; with `greedy` the tokens."""

    def run(prompts: Tensor, lengths: Tensor, end: int | None):
        temperature = 0.0 if greedy else 1.0
        rollout = generate(model, prompts, lengths, n, end, pad_id=0, temperature=temperature)
        return rollout.ids[rollout.mask] if greedy else int(rollout.mask.sum())

    return run


def hf(model, n: int, greedy: bool = False, **options):
    """The same of model.generate, which wants prompts left-padded: done outside the clock by `batch`."""

    def run(prompts: Tensor, attention: Tensor, end: int | None):
        ids = model.generate(
            input_ids=prompts, attention_mask=attention, do_sample=not greedy, max_new_tokens=n,
            eos_token_id=end, pad_token_id=0, **({} if greedy else {"top_k": 0}), **options,
        )[:, prompts.shape[1] :]  # fmt: skip
        if greedy:
            return ids.flatten()
        before_end = (ids == end).cumsum(1) - (ids == end).long() == 0 if end is not None else ids >= 0
        return int(before_end.sum())

    return run


def implementations(ours: GPT, theirs, config: Config, device: torch.device) -> dict:
    """All by name; the first is the baseline."""
    from transformers import CompileConfig

    compiled = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    compiled._compile_all_devices = True  # transformers leaves a CPU eager otherwise
    table = {
        "transformers": hf(theirs, config.new_tokens),
        "transformers, static cache": hf(
            theirs, config.new_tokens, cache_implementation="static", disable_compile=True
        ),
        "transformers, static, compiled": hf(
            theirs, config.new_tokens, cache_implementation="static", compile_config=compiled
        ),
        "nanoalign": nanoalign(ours, config.new_tokens),
    }
    if device.type == "cuda":  # as the training scripts run it
        policy = nanoalign(copy.deepcopy(ours).float(), config.new_tokens)
        table["nanoalign, fp32 weights, autocast"] = torch.autocast("cuda", torch.bfloat16)(policy)
    return table


# ------------------------------------------------------------------------------------------- measurements


def batch(B: int, config: Config, device: torch.device, ragged: bool):
    """→ prompts right-padded (B, P) and lengths (B,), and the same left-padded with its attention mask."""
    g, P = torch.Generator().manual_seed(config.seed), config.prompt_tokens
    ids = torch.randint(2, config.vocab, (B, P), generator=g)  # 0 pads, 1 ends
    lengths = torch.randint(max(1, P // 4), P + 1, (B,), generator=g) if ragged else torch.full((B,), P)
    lengths[0] = P
    right = ids.masked_fill(torch.arange(P) >= lengths[:, None], 0)
    left = torch.stack([row.roll(P - n) for row, n in zip(right, lengths.tolist())])
    attention = (torch.arange(P) >= P - lengths[:, None]).long()
    return tuple(x.to(device) for x in (right, lengths)), tuple(x.to(device) for x in (left, attention))


def bytes_per_step(model: GPT, B: int, mean_position: float) -> float:
    """What one decoding step must read: every matrix once, and the keys and values of every row so far."""
    config, size = model.config, model.head.weight.element_size()
    tables = [model.position.weight] if config.tied else [model.position.weight, model.embed.weight]
    weights = sum(p.numel() for p in model.parameters()) - sum(t.numel() for t in tables)
    cache = 2 * config.layers * B * config.kv_heads * config.head_dim * mean_position
    return (weights + cache) * size


def check_greedy(ours: GPT, theirs, config: Config, device: torch.device) -> None:
    """Before any timing: both must say the same, whichever side the padding is on."""
    right, left = batch(8, config, device, ragged=True)
    found = nanoalign(ours, config.new_tokens, greedy=True)(*right, None)
    expected = hf(theirs, config.new_tokens, greedy=True)(*left, None)
    agree = (found == expected).float().mean().item()
    print(f"check: greedy decoding agrees in {agree:.1%} of {len(found)} tokens")
    if agree < (1.0 if ours.head.weight.dtype == torch.float32 else 0.5):  # in bf16 near-ties fall either way
        raise UserError("the two do not decode the same: no timing would mean anything.")


@torch.inference_mode()
def main(config: Config) -> None:
    if config.vs != "hf":
        raise UserError(f"--vs {config.vs} is unknown; the only peer here is hf.")
    if config.short:
        config = replace(config, batches=("64",), rounds=3)
    device = pick_device(config.device)
    if config.dtype == "auto":
        config = replace(config, dtype="bf16" if device.type == "cuda" else "fp32")
    size = {"layers": config.layers, "width": config.width, "heads": config.heads, "vocab_size": config.vocab}
    shape = preset("gpt2", context=config.prompt_tokens + config.new_tokens, **size)
    models = twins(shape, end=1, mean_length=max(2, config.new_tokens // 3))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    ours, theirs = (model.to(device, dtype).eval() for model in models)
    check_greedy(ours, theirs, config, device)
    bandwidth, results = copy_bandwidth(device), []
    for end in (None, 1):
        for B in map(int, config.batches):
            right, left = batch(B, config, device, ragged=end is not None)
            runs = {}
            for name, run in implementations(ours, theirs, config, device).items():
                runs[name] = partial(run, *(right if name.startswith("nanoalign") else left), end)
            for run in runs.values():
                run()  # compiles
            what = f"generate, {'fixed lengths' if end is None else 'real end tokens'}, batch {B}"
            runs = {name: partial(timed, run, device) for name, run in runs.items()}
            for name, calls in alternate(runs, config.rounds, what).items():
                times, rates = [seconds for seconds, _ in calls], [n / seconds for seconds, n in calls]
                row = {"case": what, "name": name, "seconds": times}
                if end is None:
                    step = bytes_per_step(ours, B, config.prompt_tokens + config.new_tokens / 2)
                    share = step * config.new_tokens / median(times) / bandwidth
                    row["note"] = f"{share:.0%} of {bandwidth / 1e9:,.0f} GB/s"
                results.append({**row, "rates": rates})
    finish(results, device, config.out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
