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
import torch.nn as nn
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MB in fp32
COMPILE_FROM_VOCAB = 8192  # a smaller vocabulary's chunk is too cheap to be worth compiling


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for 16-bit a and b in fp32 throughout: bf16 logits would put the PPO ratio off."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the autocast in force, if any."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    z = _matmul(hidden, weight.t())
    if bias is not None:
        z += bias
    return z if temperature == 1 else z.div_(temperature)


def _chunk_forward(z: Tensor, targets: Tensor, with_entropy: bool):
    """Logits (chunk, V), theirs to overwrite → logp, lse, entropy (chunk,)."""
    lse = z.logsumexp(-1)
    logp = z.gather(-1, targets[:, None]).squeeze(-1) - lse
    entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1) if with_entropy else lse
    return logp, lse, entropy


def _chunk_backward(
    z: Tensor, lse: Tensor, entropy: Tensor, grad_logp: Tensor, grad_entropy: Tensor, with_entropy: bool
):
    """The softmax part of ∂/∂z, (chunk, V), in place of z: all but the one-hot term of the target."""
    z -= lse[:, None]
    if not with_entropy:
        return z.exp_().mul_(-grad_logp[:, None])
    return z.exp() * -(grad_logp[:, None] + grad_entropy[:, None] * (z + entropy[:, None]))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_compiler_works = True


def compile_or_eager(function):
    """torch.compile(function), or the function itself once there turns out to be no working compiler."""
    compiled = torch.compile(function, dynamic=True)

    def call(*args):
        global _compiler_works
        if _compiler_works:
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                _compiler_works = False
                print(f"torch.compile fails here ({type(error).__name__}: no C compiler?); running eager.")
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
            z = _chunk_logits(hidden[rows], weight, bias, temperature)
            logp[rows], lse[rows], entropy[rows] = body(z, targets[rows], with_entropy)
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
            h, hit = hidden[rows], targets[rows, None]
            grad = body(
                _chunk_logits(h, weight, bias, temperature),
                lse[rows], entropy[rows], grad_logp[rows], grad_entropy[rows], with_entropy,
            )  # fmt: skip
            grad.scatter_add_(1, hit, grad_logp[rows, None])  # the one-hot term
            if temperature != 1:
                grad /= temperature
            if want_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(h.dtype)
            if want_hidden:
                grad_hidden[rows] = grad @ weight
            if want_weight:
                grad_weight += _matmul(grad.t(), h)
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

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) → logp (N,) in nats, fp32 (fp64 for fp64
    input); with `entropy=True` → (logp, entropy), both (N,), both differentiable once. `chunk` is the number
    of tokens whose logits exist at one time; by default as many as fit `CHUNK_ELEMENTS` logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    hidden, weight = _autocast(hidden, weight)
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        logp, h = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, entropy, chunk)
    return (logp, h) if entropy else logp


def next_token_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden (N, D) → logits (N, V) in fp32, rounded as `linear_logprobs` rounds them. For sampling."""
    hidden, weight = _autocast(hidden, model.head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _matmul(hidden, weight.t())


def token_logprobs(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logp[b, t] = log π(ids[b, t] | ids[b, :t]), aligned with ids; logp[:, 0] = 0. The only shift there is.

    ids (B, T); mask (B, T) bool: only these positions go through the head, the others are 0. The mask may
    stay on the CPU, which spares a GPU the synchronisation of counting the scored positions.
    With `entropy=True` → (logp, entropy), entropy[b, t] of the distribution that token t was drawn from.
    hidden (B, T, D): model.hidden(ids), if it is known already.
    """
    B, T = ids.shape
    hidden = model.hidden(ids) if hidden is None else hidden
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
    """Sum of x (B, T) where mask (B, T) → (B,). What lies outside, NaN included, has no influence."""
    return x.masked_fill(~mask.to(x.device, non_blocking=True), 0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) where mask (B, T) → (B,); 0 for a row without any."""
    return masked_sum(x, mask) / mask.to(x.device, non_blocking=True).sum(-1).clamp(min=1)


def last_scored(mask: Tensor) -> Tensor:
    """The position of each row's last scored token (B,): the end token, unless the row was cut short."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(-1)
