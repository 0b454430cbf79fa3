"""log π(target | h) of many tokens without ever holding all of their logits.

For hidden states h (N, D), head weight W (V, D), bias b (V) and temperature τ:

    z = (h Wᵀ + b) / τ        lse = log Σ_v exp z_v        logp = z_target − lse
    p = exp(z − lse)          H = lse − Σ_v p_v z_v        (the entropy, in nats)

    ∂logp/∂z_v = [v = target] − p_v      ∂H/∂z_v = −p_v (z_v − lse + H)      ∂lse/∂z_v = p_v

so a loss L with g = ∂L/∂logp, g_H = ∂L/∂H and g_lse = ∂L/∂lse of a token sends into its logits

    ∂L/∂z_v = [v = target] g + p_v (g_lse − g − g_H (z_v − lse + H))
    ∂L/∂h = ∂L/∂z W / τ        ∂L/∂W = ∂L/∂zᵀ h / τ        ∂L/∂b = Σ ∂L/∂z / τ

Tokens go through in chunks. `linear_logprobs` serves any loss: the forward pass keeps lse and H, the backward
pass recomputes each chunk's logits (four matrix products; three where all logits fit one chunk, and are
kept). `linear_losses` serves losses that are a sum over tokens: g is known as soon as logp is, so the
gradient is formed in the forward pass (three products). Neither's peak memory grows with N·V. After the
matrix product, which TF32 may round where h and W are fp32, all is in fp32 (in fp64 for fp64 inputs).
"""

import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.compiler import compile_or_eager

BUDGET = {"cpu": 2**27, "cuda": 2**31}  # bytes of logits held at once, or a 64th of the memory
LARGE = 8192  # from this vocabulary size on, what is done to each logit is compiled
GROUP = 16  # logits summed at a time in compiled CPU code, so that they are read once, in order


def in_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both rounded to the dtype of the autocast in force; where 16-bit products stay 16-bit, then in fp32."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not hidden.is_cuda and hidden.itemsize == 2:
        hidden, weight = hidden.float(), weight.float()
    return hidden, weight


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for 16-bit a and b in fp32: bf16 logits would put the PPO ratio off by several percent."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.itemsize == 2 else a @ b


def _chunk_size(vocab: int, itemsize: int, device: torch.device) -> int:
    """Tokens whose logits fit the budget, a power of two. All of the machine's memory counts, in use or not:
    sums round by their chunks, and a run that is resumed has to round as before, whoever else is there."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # Windows has none
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = 2**33
    budget = min(BUDGET.get(device.type, 2**27), memory // 64)
    return 1 << max(1, budget // (vocab * itemsize)).bit_length() - 1


say_once = functools.cache(print)


def _chunks(N: int, chunk: int) -> list[slice]:
    """As few equal parts of N tokens as it takes, so that no small remainder is left."""
    parts = -(-N // chunk)
    if parts > 1:
        say_once(f"log-probs: at most {chunk:,} tokens at a time go through the head")
    return [slice(i * N // parts, (i + 1) * N // parts) for i in range(parts)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(n, V); on a CPU column by column, which its matrix products fill half as fast again."""
    z = matmul(hidden, weight.t()) if hidden.is_cuda else matmul(weight, hidden.t()).t()
    if bias is not None:
        z += bias
    return z if temperature == 1 else z.div_(temperature)


def _statistics(z: Tensor, targets: Tensor, with_entropy: bool):
    """Logits (n, V) → logp, lse, entropy (n,); the entropy is 0 unless asked for."""
    in_order = torch.compiler.is_compiling() and not z.is_cuda
    groups = z.unflatten(-1, (-1, GROUP if in_order else z.shape[-1]))
    lse = groups.logsumexp(-1).logsumexp(-1)
    logp = z.gather(-1, targets[:, None]).squeeze(-1) - lse
    if not with_entropy:
        return logp, lse, torch.zeros_like(lse)
    return logp, lse, lse - ((groups - lse[:, None, None]).exp() * groups).sum(-1).sum(-1)


def _into_logits(z, targets, lse, entropy, g, g_lse, g_entropy, temperature: float, with_entropy: bool):
    """Logits z (n, V) become ∂L/∂(h Wᵀ + b), from the gradients into logp, lse and entropy (n,)."""
    z.sub_(lse[:, None])
    slope = (g_lse - g)[:, None]
    if with_entropy:
        slope = slope - g_entropy[:, None] * (z + entropy[:, None])
    z.exp_().mul_(slope)
    if torch.compiler.is_compiling():  # fused with the rest, which a scatter would not be
        z.add_((torch.arange(z.shape[1], device=z.device) == targets[:, None]) * g[:, None])
    else:
        z.scatter_add_(1, targets[:, None], g[:, None])
    if temperature != 1:
        z.div_(temperature)


@functools.cache
def _body(function, vocab_size: int):
    """What is done to a chunk of logits, compiled where the vocabulary is large enough for that to pay. The
    loop over chunks is never compiled: its graph would hold them all."""
    if vocab_size < LARGE:
        return function
    compiled = compile_or_eager(function)
    # copies, because a graph that is given views is bound to the size of what they are views of
    return lambda z, *rest: compiled(z, *(x.clone() if isinstance(x, Tensor) else x for x in rest))


class _Gradients:
    """Of hidden, weight and bias, those that are wanted. Sums over tokens are in fp32."""

    def __init__(self, hidden, weight, bias, wanted):
        self.inputs, fp32 = (hidden, weight), torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=fp32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=fp32) if wanted[2] else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """grad (n, V): what has reached the logits of these tokens."""
        hidden, weight = self.inputs
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = grad @ weight
        if self.weight is not None and hidden.itemsize > 2:
            self.weight.addmm_(grad.t(), hidden[rows])
        elif self.weight is not None:
            self.weight += matmul(grad.t(), hidden[rows])


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropy, chunk):
        N, chunks = hidden.shape[0], _chunks(hidden.shape[0], chunk)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, lse, entropy = (hidden.new_empty(N, dtype=dtype) for _ in range(3))
        body, z = _body(_statistics, weight.shape[0]), None
        for rows in chunks:
            del z  # before the next chunk's are allocated
            z = _logits(hidden[rows], weight, bias, temperature)
            logp[rows], lse[rows], entropy[rows] = body(z, targets[rows], with_entropy)
        ctx.kept = z if len(chunks) == 1 else None  # used up by the first backward pass
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = temperature, with_entropy, chunks
        return logp, entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_entropy, g_lse):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, with_entropy, chunks = ctx.options
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        body = _body(_into_logits, weight.shape[0])
        for rows in chunks:
            z, ctx.kept = ctx.kept, None
            z = _logits(hidden[rows], weight, bias, temperature) if z is None else z
            own = (x[rows] for x in (targets, lse, entropy, g, g_lse, g_entropy))
            body(z, *own, temperature, with_entropy)
            gradients.add(rows, z)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, loss, values, temperature, with_entropy, chunk):
        N, V = hidden.shape[0], weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy = (hidden.new_empty(N, dtype=dtype) for _ in range(2))
        total, z = hidden.new_zeros((), dtype=dtype), None
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for rows in _chunks(N, chunk):
            del z
            z = _logits(hidden[rows], weight, bias, temperature)
            logp[rows], lse, entropy[rows] = _body(_statistics, V)(z, targets[rows], with_entropy)
            with torch.enable_grad():
                own, H = (x[rows].requires_grad_() for x in (logp, entropy))
                part = loss(*(own, H)[: 1 + with_entropy], *(value[rows] for value in values)).sum()
            total += part.detach()
            if any(ctx.needs_input_grad):
                g, g_entropy = torch.autograd.grad(part, (own, H), materialize_grads=True)
                own = (targets[rows], lse, entropy[rows], g, torch.zeros_like(g), g_entropy)
                _body(_into_logits, V)(z, *own, temperature, with_entropy)
                gradients.add(rows, z)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        return *(None if x is None else x * g for x in ctx.saved_tensors), *[None] * 6


def _prepare(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int | None):
    """The operands in autocast's dtype, a large vocabulary padded to what vector and matrix units take."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    hidden, weight = in_autocast(hidden, weight)
    if weight.shape[0] >= LARGE and weight.shape[0] % 64:
        weight, bias = pad_vocabulary(weight, bias, 64)
    return hidden, weight, bias, chunk or _chunk_size(len(weight), max(4, hidden.itemsize), hidden.device)


def pad_vocabulary(weight: Tensor, bias: Tensor | None, multiple: int) -> tuple[Tensor, Tensor]:
    """Weight (V, D) and bias (V,) with V rounded up; the extra tokens have probability 0 and no gradient."""
    extra = -weight.shape[0] % multiple
    bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if bias is None else bias
    return F.pad(weight, (0, 0, 0, extra)), F.pad(bias, (0, extra), value=-1e30)  # not −inf: p z must be 0


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    entropy: bool = False, chunk: int | None = None, lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """log softmax((hidden Wᵀ + bias) / temperature)[target], differentiable in hidden, weight and bias.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) → logp (N,) in nats, fp32 (fp64 for fp64
    input); with `entropy` or `lse` a tuple: logp, then the entropy, then the log-sum-exp, each (N,) and
    differentiable once. chunk: the tokens whose logits exist at one time; by default as many as fit `BUDGET`.
    """
    hidden, weight, bias, chunk = _prepare(hidden, weight, bias, temperature, chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, H, z = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, entropy, chunk)
    outputs = (logp,) + (H,) * entropy + (z,) * lse
    return outputs if len(outputs) > 1 else logp


def linear_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss: Callable[..., Tensor],
    values: tuple[Tensor, ...] = (), bias: Tensor | None = None, temperature: float = 1.0,
    entropy: bool = False, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Σ_i loss(logp_i, values_i …) over the tokens, its gradient formed on the way.

    As `linear_logprobs`; loss(logp (n,), *values (n, …)) → (n,) is called on one chunk of tokens after
    another, with `entropy` as loss(logp, entropy, *values). It must treat each token alone. → the sum, (),
    differentiable once in hidden, weight and bias (and in nothing else); and without gradient logp and
    entropy (N,).
    """
    hidden, weight, bias, chunk = _prepare(hidden, weight, bias, temperature, chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearLosses.apply(hidden, weight, bias, targets, loss, values, temperature, entropy, chunk)
