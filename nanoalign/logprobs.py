"""log π(token | prefix) without ever holding the logits of all tokens.

For hidden states h (N, D), head weight W (V, D), bias b (V) and temperature τ:

    z = (h Wᵀ + b) / τ        lse = log Σ_v exp z_v        logp = z_target − lse
    p = exp(z − lse)          H = lse − Σ_v p_v z_v        (the entropy, in nats)

    ∂logp/∂z_v = [v = target] − p_v                        ∂H/∂z_v = −p_v (z_v − lse + H)

Tokens go through in chunks; the forward pass keeps only lse and H, the backward pass recomputes each chunk's
logits (so four matrix products in all, and a peak memory that does not grow with N·V). Everything after the
matrix product is in fp32 (in fp64 for fp64 inputs), whatever the dtype of h and W.
"""

import functools

import torch
import torch._dynamo.exc
import torch._inductor.exc
import torch.nn as nn
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MB in fp32
COMPILE_FROM_VOCAB = 8192  # a smaller vocabulary's chunk is too cheap to be worth compiling


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated *and returned* in fp32 when a and b are 16 bit (bf16 logits would put the PPO ratio off)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _chunk_forward(z: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, with_entropy: bool):
    z = (z if bias is None else z + bias) / temperature
    lse = z.logsumexp(-1)
    logp = z.gather(-1, targets[:, None]).squeeze(-1) - lse
    entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1) if with_entropy else lse.new_zeros(())
    return logp, lse, entropy


def _chunk_backward(
    z, bias, targets, lse, entropy, grad_logp, grad_entropy, temperature: float, with_entropy: bool
):
    """The gradient with respect to the chunk's logits h Wᵀ, (chunk, V)."""
    z = (z if bias is None else z + bias) / temperature
    shifted = z - lse[:, None]
    p = shifted.exp()
    hit = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    grad = grad_logp[:, None] * (hit.to(p.dtype) - p)
    if with_entropy:
        grad = grad - grad_entropy[:, None] * p * (shifted + entropy[:, None])
    return grad / temperature


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_compiler_works = True


def compile_or_eager(function):
    """torch.compile(function), or the function itself from the first sign that there is no working compiler."""
    compiled = torch.compile(function, dynamic=True)

    def call(*args):
        global _compiler_works
        if _compiler_works:
            try:
                return compiled(*args)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                _compiler_works = False
                print(
                    f"torch.compile does not work here ({type(error).__name__}: no C compiler?); running eager."
                )
        return function(*args)

    return call


@functools.cache
def _body(function, vocab_size: int):
    """The chunk body to call: compiled where the vocabulary is large enough for that to pay."""
    return compile_or_eager(function) if vocab_size >= COMPILE_FROM_VOCAB else function


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropy, chunk):
        N = hidden.shape[0]
        logp, lse, entropy = (hidden.new_empty(N, dtype=_accumulator(hidden)) for _ in range(3))
        body = _body(_chunk_forward, weight.shape[0])
        for i in range(0, N, chunk):
            rows = slice(i, i + chunk)
            logp[rows], lse[rows], entropy[rows] = body(
                _matmul(hidden[rows], weight.t()), bias, targets[rows], temperature, with_entropy
            )
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = temperature, with_entropy, chunk
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, with_entropy, chunk = ctx.options
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_accumulator(weight)) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_accumulator(bias)) if want_bias else None
        body = _body(_chunk_backward, weight.shape[0])
        for i in range(0, hidden.shape[0], chunk):
            rows = slice(i, i + chunk)
            h = hidden[rows]
            grad = body(
                _matmul(h, weight.t()), bias, targets[rows], lse[rows], entropy[rows],
                grad_logp[rows], grad_entropy[rows], temperature, with_entropy,
            )  # fmt: skip
            if want_hidden:
                grad_hidden[rows] = grad.to(h.dtype) @ weight
            if want_weight:
                grad_weight += _matmul(grad.to(h.dtype).t(), h)
            if want_bias:
                grad_bias += grad.sum(0)
        grad_weight = grad_weight.to(weight.dtype) if want_weight else None
        grad_bias = grad_bias.to(bias.dtype) if want_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax((hidden Wᵀ + bias) / temperature)[target], differentiable in hidden, weight and bias.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) → logp (N,) in nats, fp32 (fp64 for fp64 input);
    with `entropy=True` → (logp, entropy), both (N,), both differentiable once. `chunk` is the number of tokens
    whose logits exist at one time; by default as many as fit `CHUNK_ELEMENTS` logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        logp, h = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, entropy, chunk)
    return (logp, h) if entropy else logp


def token_logprobs(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """logp[b, t] = log π(ids[b, t] | ids[b, :t]), aligned with ids; logp[:, 0] = 0. The only shift there is.

    ids (B, T); mask (B, T) bool: only these positions go through the head, the others are 0. The mask may stay
    on the CPU, which spares a GPU the synchronisation of counting the scored positions.
    With `entropy=True` → (logp, entropy), entropy[b, t] of the distribution that token t was drawn from.
    """
    B, T = ids.shape
    hidden = model.hidden(ids)  # (B, T, D)
    scored = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.clone()
    scored[:, 0] = False  # nothing predicts the first token
    index = scored.flatten().nonzero().squeeze(-1).to(ids.device, non_blocking=True)  # flat (b, t), t ≥ 1
    picked = linear_logprobs(
        hidden.flatten(0, 1)[index - 1], model.head.weight, ids.flatten()[index], None, temperature, entropy
    )
    outputs = picked if entropy else (picked,)
    spread = tuple(x.new_zeros(B * T).index_put((index,), x).view(B, T) for x in outputs)
    return spread if entropy else spread[0]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) where mask (B, T) → (B,). What lies outside the mask, NaN included, has no influence."""
    return x.masked_fill(~mask.to(x.device), 0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) where mask (B, T) → (B,); 0 for a row without any."""
    return masked_sum(x, mask) / mask.to(x.device).sum(-1).clamp(min=1)
