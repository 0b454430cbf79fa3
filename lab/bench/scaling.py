"""How time and memory grow: with batch, length, vocabulary and group size.

    python -m lab.bench.scaling                      # five minutes on two CPU cores
    python -m lab.bench.scaling --scale 16           # for a GPU: every size 16 times as large
    python -m lab.bench.scaling --short              # a minute

One size at a time is doubled while the others stand at their middle value; t ∝ nᵃ and m ∝ nᵇ are fitted by
least squares of the logarithms to the medians. The work is the scripts' own: an optimiser step of DPO
(train_dpo.py), sampling (nanoalign/generate.py), an iteration of GRPO (train_grpo.py: sample, score, update).
An exponent below 1 means overhead that does not grow; attention would bring that of the length to 2.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

import train_dpo
import train_grpo
from lab.bench.timing import alternate, extra_memory, finish, timed
from nanoalign import UserError, cli
from nanoalign.generate import generate
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import GPT, preset
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import freeze, make_optimizer, optimizer_step, pick_device

TOKENIZER = get_tokenizer("world")  # only its padding is used
SIZES = {"batch": 8, "length": 64, "vocab": 4096, "group": 8}  # the middle values


@dataclass
class Config:
    layers: int = 4  # of the GPT
    width: int = 128  # its D
    scale: int = 1  # multiplies batch and length: for machines that such small work leaves idle
    points: int = 5  # sizes on each axis, each twice the last
    rounds: int = 5  # timings of each
    short: bool = False  # three points, three rounds
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table
    seed: int = 0  # of weights and rows


def exponent(sizes, values) -> float:
    """The a of values ∝ sizesᵃ, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ----------------------------------------------------- the work: sizes → a function, and its tokens


def dpo(policy: GPT, autocast, batch: int, length: int, **_):
    """An optimiser step on pairs of this length, half of it response."""
    device, ref = policy.embed.weight.device, freeze(copy.deepcopy(policy))
    rng, optimizer = np.random.default_rng(0), make_optimizer(policy, 1e-4)
    mask, config = np.arange(length) >= length // 2, train_dpo.Config(beta=0.1)
    pairs = [[(rng.integers(1000, size=length), mask) for _ in range(2)] for _ in range(batch)]
    soft = torch.ones(batch, device=device)

    def step():
        with autocast:
            found = train_dpo.measure(policy, ref, pairs, soft, TOKENIZER, config, device)
        found["loss"].mean().backward()
        optimizer_step(policy, optimizer, 1e-4, 1.0)

    return step, 2 * batch * length


def sample(policy: GPT, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Responses of `length` tokens to prompts of 16 → ids and mask."""
    device = policy.embed.weight.device
    prompts, lengths = torch.ones(batch, 16, dtype=torch.long, device=device), torch.full((batch,), 16)
    rollout = generate(policy, prompts, lengths.to(device), length, None, TOKENIZER.pad, seed=0)
    return rollout.ids, rollout.mask


def sampling(policy: GPT, autocast, batch: int, length: int, **_):
    def step():
        with autocast:
            sample(policy, batch, length)

    return step, batch * length


def grpo(policy: GPT, autocast, batch: int, length: int, group: int, **_):
    """Two prompts, `group` responses each: sample, score, compare, one update."""
    ref, optimizer, B = freeze(copy.deepcopy(policy)), make_optimizer(policy, 1e-4), 2 * group

    def step():
        with autocast:
            ids, mask = sample(policy, B, length)
            with torch.no_grad():
                old, reference = (token_logprobs(model, ids, mask.cpu()) for model in (policy, ref))
            score = ids.float().sum(1) - 0.1 * masked_sum(old - reference, mask)
            advantages = train_grpo.group_advantages(score, group)
            logp = token_logprobs(policy, ids, mask.cpu())
        loss, _ = train_grpo.policy_loss(logp, old, advantages, mask, "grpo", 0.2, 0.2)
        masked_sum(loss * train_grpo.token_weights(mask, "grpo", length), mask).sum().backward()
        optimizer_step(policy, optimizer, 1e-4, 1.0)

    return step, B * length


WORK = {"DPO step": dpo, "sampling": sampling, "GRPO iteration": grpo}
AXES = [(what, axis) for what in ("DPO step", "sampling") for axis in ("batch", "length", "vocab")]
AXES += [("GRPO iteration", "group")]


def main(config: Config) -> None:
    if config.short:
        config = replace(config, points=3, rounds=3)
    if not 2 <= config.points <= 5:
        raise UserError(f"--points must be 2 to 5, not {config.points}: beyond, a group has one response.")
    device, results = pick_device(config.device), []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    torch.set_float32_matmul_precision("high")
    for what, axis in AXES:
        middle = {name: size * (1 if name == "vocab" else config.scale) for name, size in SIZES.items()}
        sizes = [int(middle[axis] * 2.0 ** (i - config.points // 2)) for i in range(config.points)]
        runs, tokens = {}, {}
        for n in sizes:
            at = middle | {axis: n}
            torch.manual_seed(config.seed)
            shape = {"layers": config.layers, "width": config.width, "context": at["length"] + 16}
            policy = GPT(preset("world-small", vocab_size=at["vocab"], **shape)).to(device)
            runs[n], tokens[n] = WORK[what](policy, autocast, **at)
            runs[n]()  # compiles
        calls = alternate({n: partial(timed, run, device) for n, run in runs.items()}, config.rounds, what)
        times = {n: [seconds for seconds, _ in calls[n]] for n in sizes}
        mb = [extra_memory(runs[n], device) for n in sizes]
        medians, last = [median(times[n]) for n in sizes], sizes[-1]
        grown = f"{exponent(sizes, mb):.2f}" if min(mb) > 0 else "–"
        results.append({
            "case": f"scaling, {what}, {axis} {sizes[0]} to {last}", "name": "nanoalign", "mb": mb[-1],
            "seconds": times[last], "rates": [tokens[last] / seconds for seconds in times[last]],
            "note": f"time ∝ n^{exponent(sizes, medians):.2f}, memory ∝ n^{grown}; ms at each size: "
            + ", ".join(f"{1000 * m:.4g}" for m in medians),
        })  # fmt: skip
    finish(results, device, config.out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
