"""The second half of an MLP, which keeps only what comes in: the backward pass makes the rest of it again.

autograd keeps silu and its product, or gelu, as well: half of the numbers that an MLP keeps. To make them
again takes no matrix product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def activation(x: Tensor, gated: bool) -> Tensor:
    """(…, 2M) → silu(gate) · up, (…, M), of their halves (SwiGLU); or x → gelu(x) by tanh, as in GPT-2."""
    if not gated:
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class ActivatedLinear(torch.autograd.Function):
    """apply(x, weight (D, M), bias (D,) or None, gated) → F.linear(activation(x, gated), weight, bias)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
        weight = weight.to(x.dtype)  # as autocast would
        ctx.save_for_backward(x, weight)
        ctx.gated, ctx.biased = gated, bias is not None
        return F.linear(activation(x, gated), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, gradient = grad.flatten(0, -2), grad @ weight
        if ctx.gated:
            (gate, up), silu_backward = x.chunk(2, dim=-1), torch.ops.aten.silu_backward
            silu = F.silu(gate)
            of_x = torch.cat((silu_backward(gradient * up, gate), gradient.mul_(silu)), -1)
            y = silu.mul_(up)
        else:
            y = activation(x, False)
            of_x = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return of_x, rows.t() @ y.flatten(0, -2), rows.sum(0) if ctx.biased else None, None
