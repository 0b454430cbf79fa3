"""log π of tokens, aligned with the tokens. What it means, in five lines:

    logits = model(ids)                                             (B, T, V)
    logp = logits[:, :-1].float().log_softmax(-1)                   of the next token, at every position
    logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)            (B, T − 1)
    logp = F.pad(logp, (1, 0))                                      (B, T): aligned, logp[:, 0] = 0

`naive_logprobs` is these lines, and what the tests hold the rest to. `token_logprobs` gives the same number
and `token_losses` the sum of a loss of it, without the logits: only scored positions go through the head, a
chunk at a time (kernels.py).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanoalign.kernels import in_autocast, linear_logprobs, linear_losses, matmul


def naive_logprobs(model: nn.Module, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """ids (B, T) → log π(ids[b, t] | ids[b, :t]) (B, T), 0 at t = 0: the definition, in memory B T V."""
    logits = model(ids)[:, :-1].float() / temperature  # (B, T − 1, V)
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return F.pad(logp, (1, 0))


def token_logprobs(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0,
    entropy: bool = False, hidden: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """logp[b, t] = log π(ids[b, t] | ids[b, :t]), aligned with ids; logp[:, 0] = 0. The only shift there is.

    ids (B, T); mask (B, T) bool: only these positions go through the head, the others are 0. The mask may
    stay on the CPU, which spares a GPU the synchronisation of counting the scored positions.
    With `entropy=True` → (logp, entropy), entropy[b, t] of the distribution that token t was drawn from.
    hidden (B, T, D): model.hidden(ids), if it is known already.
    """
    index, *operands = _scored(model, ids, mask, hidden)
    picked = linear_logprobs(*operands, None, temperature, entropy)
    spread = tuple(_spread(x, index, ids) for x in (picked if entropy else (picked,)))
    return spread if entropy else spread[0]


@torch.no_grad()
def likelihoods(model: nn.Module, ids: Tensor, hidden: Tensor | None = None, mask=None) -> Tensor:
    """What a frozen model makes of each of ids (B, T): log p, the entropy H of the distribution that the
    token was drawn from, and log p + H, in nats, (B, T, 3) fp32. The first token is drawn from none: zeros.

    Of the model's own samples E[log p] = −H, so that the sum says by how much a token surprised it.
    """
    logp, entropy = token_logprobs(model, ids, mask, entropy=True, hidden=hidden)
    return torch.stack((logp, entropy, logp + entropy), -1)


def _scored(model: nn.Module, ids: Tensor, mask: Tensor | None, hidden: Tensor | None):
    """→ flat indices b T + t of the scored tokens, t ≥ 1; what predicts each; the head; the tokens."""
    hidden = model.hidden(ids) if hidden is None else hidden
    scored = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.clone()
    scored[:, 0] = False  # nothing predicts the first token
    index = scored.flatten().nonzero().squeeze(-1).to(ids.device, non_blocking=True)
    return index, hidden.flatten(0, 1)[index - 1], model.head.weight, ids.flatten()[index]


def _spread(x: Tensor, index: Tensor, ids: Tensor) -> Tensor:
    """Values at flat indices → (B, T), 0 elsewhere."""
    return x.new_zeros(ids.numel()).index_put((index,), x).view(ids.shape)


def token_losses(
    model: nn.Module, ids: Tensor, mask: Tensor | None, loss: Callable[..., Tensor],
    values: tuple[Tensor, ...] = (), temperature: float = 1.0, hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σ loss(logp, *values) over the scored tokens (`linear_losses`) → the sum, (); logp (B, T), detached.

    ids, mask, hidden and logp as in `token_logprobs`; values (B, T): what the loss needs beside logp.
    """
    index, *operands = _scored(model, ids, mask, hidden)
    picked = tuple(value.flatten()[index] for value in values)
    total, logp, _ = linear_losses(*operands, loss, picked, None, temperature)
    return total, _spread(logp, index, ids)


def next_token_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden (N, D) → logits (N, V) in fp32, rounded as `linear_logprobs` rounds them. For sampling."""
    hidden, weight = in_autocast(hidden, model.head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return matmul(hidden, weight.t())


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) where mask (B, T) → (B,). What lies outside, NaN included, has no influence."""
    return x.masked_fill(~mask.to(x.device, non_blocking=True), 0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) where mask (B, T) → (B,); 0 for a row without any."""
    return masked_sum(x, mask) / mask.to(x.device, non_blocking=True).sum(-1).clamp(min=1)


def within(x: Tensor, low: float, high: float) -> Tensor:
    """x kept between low and high. Its gradient is 1 there, at low and high too, and 0 beyond. (That of
    torch's clamp at low and high is 1 up to torch 2.13, and 0 since.)"""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def last_scored(mask: Tensor) -> Tensor:
    """The position of each row's last scored token (B,): the end token, unless the row was cut short."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(-1)
