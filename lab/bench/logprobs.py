"""From hidden states to the loss and its gradients, nine ways: time, peak memory, error against float64.

    python -m lab.bench.logprobs                                # N = 8192, D = 256, V = 50257, fp32 and bf16
    python -m lab.bench.logprobs --n 2048 --dtypes fp32 --rounds 9
    python -m lab.bench.logprobs --short                        # a minute

Every row of the table below computes L = −1/N Σ log softmax(h Wᵀ)[target] and ∂L/∂h, ∂L/∂W from hidden states
h (N, D) and a head W (V, D). Times alternate in one process; memory is of a second call in a process of its
own, beyond h and W; errors are the largest, relative to the largest element, on 512 tokens, against float64
on the same (rounded) h and W. Compilation is not in any figure.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.bench.timing import alternate, extra_memory, finish, in_child, timed
from nanoalign import UserError, cli
from nanoalign.logprobs import linear_logprobs, linear_losses
from nanoalign.training import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    n: int = 8192  # N, tokens
    width: int = 256  # D
    vocab: int = 50257  # V
    dtypes: tuple[str, ...] = ("fp32", "bf16")  # of h and W
    only: tuple[str, ...] = ()  # run these implementations only, by the names in the table
    rounds: int = 5  # timings of each
    short: bool = False  # N = 1024, fp32, three rounds
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table
    seed: int = 0  # of h, W and the targets


# ---------------------------------------------------- the implementations: h, W, targets → loss, ∂L/∂h, ∂L/∂W


def by_autograd(loss_of):
    """loss_of(h, W, targets) → L, as a function that returns its gradients too."""

    def step(hidden: Tensor, weight: Tensor, targets: Tensor):
        loss = loss_of(hidden, weight, targets)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return step


def full_logits(hidden, weight, targets):
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits  # as transformers does
    return -logits.log_softmax(-1).gather(-1, targets[:, None]).mean()


def cross_entropy(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def linear_cross_entropy(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def implementations(device: torch.device) -> dict:
    """All that run here, by name; the first is the baseline."""
    table = {
        "full logits, eager": by_autograd(full_logits),
        "full logits, compiled": by_autograd(torch.compile(full_logits)),
        "cross-entropy, compiled": by_autograd(torch.compile(cross_entropy)),
        "nanoalign, any loss": by_autograd(lambda h, w, t: -linear_logprobs(h, w, t).mean()),
        "nanoalign, separable": by_autograd(lambda h, w, t: linear_losses(h, w, t, torch.neg)[0] / len(h)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch ≥ 2.13
        table["torch's linear_cross_entropy"] = by_autograd(linear_cross_entropy)
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        print("trl is not installed (make parity installs it): its rows are left out.")
    else:
        table["trl's selective log-softmax"] = by_autograd(
            lambda h, w, t: -selective_log_softmax(h @ w.T, t).float().mean()
        )
        options = 1.0, 32768, None, 1.0, ("log_probs",)  # temperature, chunk as in trl's trainers, outputs
        table["trl's fused head"] = by_autograd(
            lambda h, w, t: -ChunkedLogProbFunction.apply(h, w, None, t, *options)[0].mean()
        )
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            table["Liger's fused cross-entropy"] = by_autograd(lambda h, w, t: liger(w, h, t))
        except ImportError:
            print("liger_kernel is not installed: its row is left out.")
    return table


# ------------------------------------------------------------------------------------------- measurements


def inputs(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """h of unit variance and W such that logits have a standard deviation of 2, as a trained model's."""
    torch.manual_seed(config.seed)
    hidden = torch.randn(config.n, config.width, device=device).to(dtype).requires_grad_()
    weight = 2 * torch.randn(config.vocab, config.width, device=device) / config.width**0.5
    targets = torch.randint(config.vocab, (config.n,), device=device)
    return hidden, weight.to(dtype).requires_grad_(), targets


def once(step, *given) -> None:
    """The step, without keeping its gradients."""
    step(*given)


def errors(step, config: Config, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The error of the loss and the largest of the gradients, relative, against float64."""
    hidden, weight, targets = inputs(replace(config, n=min(config.n, 512)), dtype, device)
    exact = by_autograd(full_logits)(hidden.double(), weight.double(), targets)
    off = [(x.double() - y).abs().max() / y.abs().max() for x, y in zip(step(hidden, weight, targets), exact)]
    return off[0].item(), max(off[1:]).item()


def child(config: dict, name: str, dtype: str) -> dict:
    """Peak memory and errors of one implementation, in a process that has run no other."""
    config = Config(**config)
    device = pick_device(config.device)
    step = implementations(device)[name]
    given = inputs(config, DTYPES[dtype], device)
    mb = extra_memory(partial(step, *given), device)
    loss, grad = errors(step, config, DTYPES[dtype], device)
    return {"mb": mb, "note": f"error: loss {loss:.0e}, gradients {grad:.0e}"}


def main(config: Config) -> None:
    if config.short:
        config = replace(config, n=1024, dtypes=("fp32",), rounds=3)
    if unknown := set(config.dtypes) - DTYPES.keys():
        raise UserError(f"--dtypes takes fp32 and bf16, not {unknown.pop()}.")
    device = pick_device(config.device)
    torch.set_float32_matmul_precision("high")
    table = implementations(device)
    if unknown := set(config.only) - table.keys():
        raise UserError(f"--only {unknown.pop()!r} does not run here; choose from {', '.join(table)}.")
    table = {name: step for name, step in table.items() if name in (config.only or table)}
    results = []
    for dtype in config.dtypes:
        given = inputs(config, DTYPES[dtype], device)
        for step in table.values():
            step(*given)  # compiles
        runs = {name: partial(timed, partial(once, step, *given), device) for name, step in table.items()}
        found = alternate(runs, config.rounds, f"log-probs, {dtype}")
        case = f"log-probs, {dtype}, N {config.n}, D {config.width}, V {config.vocab}"
        for name in table:
            spec = {"config": asdict(config), "name": name, "dtype": dtype}
            measured = in_child("lab.bench.logprobs", spec)
            times = [seconds for seconds, _ in found[name]]
            rates = [config.n / seconds for seconds in times]
            results.append({"case": case, "name": name, "seconds": times, "rates": rates, **measured})
    finish(results, device, config.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        torch.set_float32_matmul_precision("high")
        print(json.dumps(child(**json.load(sys.stdin))))
    else:
        cli.run(main, Config, __doc__)
