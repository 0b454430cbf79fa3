"""LoRA (Hu et al. 2021): each matrix of the blocks stays as it is, and learns a product of rank r beside it.

    y = W x + c + (α/r) B A x          W (out, in) and c frozen; A (r, in) and B (out, r) trained

B starts at 0, so the first policy is the base; A as in the authors' code and in peft, uniform in ±1/√in (the
paper says Gaussian, and not how wide). q, k and v are one matrix here, gate and up another: they share one A,
where peft, unless it is of a GPT-2, gives each part an adapter of its own.

    python -m nanoalign.lora merge X.pt Y.pt          # a checkpoint of adapters → one of plain weights
"""

import copy
import math
import sys
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanoalign.sharding import like


class LoRA(nn.Linear):
    """A linear layer with an adapter, A and B, beside it; without one where they are None."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.A is None else y + self.alpha / self.rank * F.linear(F.linear(x, self.A), self.B)


def matrices(model: nn.Module) -> Iterator[nn.Linear]:
    """Those of the blocks of a GPT, or of a scalar model's trunk."""
    for block in getattr(model, "gpt", model).blocks:
        yield from (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)


def add(model: nn.Module, rank: int, alpha: float, bf16: bool = False) -> nn.Module:
    """Freeze a GPT, or a scalar model's trunk, and add adapters. bf16: keep its matrices so; it then needs
    autocast, which would round them anyway."""
    getattr(model, "gpt", model).requires_grad_(False)
    for layer in matrices(model):
        layer.__class__, layer.rank, layer.alpha = LoRA, rank, alpha
        A, B = torch.empty(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # on the CPU: the same whatever the device
        layer.A, layer.B = (nn.Parameter(x.to(layer.weight.device)) for x in (A, B))
        layer.weight.data = layer.weight.data.bfloat16() if bf16 else layer.weight.data
    return model


def without(model: nn.Module) -> nn.Module:
    """A model with its adapters off, or before it has any: frozen, of the model's own weights, so that it
    takes no memory of its own and stays what it is while adapters are trained."""
    twin = copy.deepcopy(model, {id(own): own for own in (*model.parameters(), *model.buffers())})
    twin.__dict__.pop("hidden", None)  # the model's own, where it is compiled
    for layer in matrices(twin):
        layer.A = layer.B = None
    return twin.eval()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a model with adapters: these and, of a scalar model, its head. {} without any."""
    found = {name: own.detach() for name, own in model.named_parameters() if own.requires_grad}
    return found if any(name.endswith(".A") for name in found) else {}


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load all weights of a model, or what `adapters` gave; a RuntimeError where they do not fit."""
    model.load_state_dict(like(model.state_dict(), weights), strict=weights.keys() != adapters(model).keys())


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A plain model again, of W + (α/r) B A."""
    for layer in matrices(model):
        merged = layer.weight.to(layer.A.dtype) + layer.alpha / layer.rank * layer.B @ layer.A
        layer.weight, layer.__class__ = nn.Parameter(merged), nn.Linear
        del layer.A, layer.B, layer.rank, layer.alpha
    getattr(model, "gpt", model).requires_grad_(True)
    return model


if __name__ == "__main__":
    from nanoalign import UserError, checkpoint, cli  # which read adapters by what stands above

    with cli.sentences():
        if sys.argv[1:2] != ["merge"] or len(sys.argv) != 4:
            raise UserError("name two files: python -m nanoalign.lora merge X.pt Y.pt.")
        checkpoint.merge_file(*sys.argv[2:])
