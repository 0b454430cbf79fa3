"""Batched sampling with a KV cache, from ragged prompts that stay right-padded.

Row b's prompt holds `lengths[b]` tokens; its first response token is written at position `lengths[b]`, over
the padding, and so on: every row at its own position. There is no left padding, so a response sits exactly
where the log-prob kernel will find it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.cli import Progress
from nanoalign.logprobs import next_token_logits, token_logprobs
from nanoalign.model import GPT, KVCache
from nanoalign.tokenizer import Tokenizer

CHECK_EVERY = 16  # steps between two looks at whether every row has ended: each look is a sync on a GPU


@dataclass
class Rollout:
    """Prompts with their responses, right-padded: T = longest prompt + longest response."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool: exactly the tokens the row generated, its end token included
    logp: Tensor  # (B, T): of the sampled tokens, under the *untruncated* policy at that temperature; else 0
    ended: Tensor  # (B,) bool: an end token was generated

    def responses(self) -> list[list[int]]:
        """Each row's generated tokens."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids.cpu(), self.mask.cpu())]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with everything outside the k likeliest tokens (ties kept) and the nucleus set to −inf.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al.
    2019).
    """
    if top_k and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the mass before this token already reaches top_p
        logits = ordered.masked_fill(beyond, -torch.inf).gather(-1, order.argsort(-1))
    return logits


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None):
    """Logits (B, V) → token (B,) and its log-prob (B,) under the untruncated policy. Temperature 0 is greedy
    (and its log-probs are those at temperature 1)."""
    logits = logits.float() / (temperature or 1.0)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        p = truncate(logits, top_k, top_p).softmax(-1)
        # argmax p/Exp(1) is a draw from p, and unlike multinomial needs no host sync
        token = (p / torch.empty_like(p).exponential_(1, generator=generator)).argmax(-1)
    return token, logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    end_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stops: Sequence[int] = (),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield step by step the sampled token, its log-prob and which rows are still writing, each (B,).

    A row also stops, without having ended, after any token of `stops`.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise UserError(
            f"cannot sample with temperature {temperature}, top_p {top_p}, top_k {top_k}, max_new_tokens "
            f"{max_new_tokens}: expected temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0 and max_new_tokens ≥ 1."
        )
    (B, P), context, device = prompts.shape, model.config.context, prompts.device
    if context <= P:
        raise UserError(f"a prompt of {P} tokens leaves no room to answer in a context of {context}.")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = KVCache(model.config, B, min(P + max_new_tokens, context), device, model.embed.weight.dtype)
    positions = torch.arange(P, device=device).expand(B, P)
    hidden = model.hidden(prompts, cache, positions)[cache.rows[:, 0], lengths - 1]  # (B, D)
    alive, stops = torch.ones(B, dtype=torch.bool, device=device), torch.tensor(stops, device=device)
    for t in range(max_new_tokens):
        position = lengths + t
        alive = alive & (position < context)
        if (device.type == "cpu" or t % CHECK_EVERY == 0) and not alive.any():
            return
        token, logp = sample(next_token_logits(model, hidden), temperature, top_k, top_p, generator)
        yield token, logp, alive
        if end_id is not None:
            alive = alive & (token != end_id)
        if len(stops):
            alive = alive & ~torch.isin(token, stops)
        if t + 1 < max_new_tokens:
            position = position.clamp(max=context - 1)[:, None]  # a row at the limit is no longer alive
            hidden = model.hidden(token[:, None], cache, position, length=min(P + t + 1, context))[:, -1]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    end_id: int | None,
    pad_id: int,
    **sampling,
):
    """Sample a response for every row → Rollout.

    prompts (B, P) right-padded, lengths (B,); sampling: temperature, top_k, top_p, seed, stops. Rows stop at
    their end token, after `max_new_tokens`, or at the model's context; their masks stop at what they
    generated.
    """
    B, P = prompts.shape
    T = min(P + max_new_tokens, model.config.context)
    columns = torch.arange(T, device=prompts.device)
    ids = torch.full((B, T), pad_id, device=prompts.device)
    ids[:, :P] = prompts.masked_fill(columns[:P] >= lengths[:, None], pad_id)
    logps = torch.zeros(B, T, device=prompts.device)
    written, ended = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.bool)
    for t, (token, logp, alive) in enumerate(
        stream(model, prompts, lengths, max_new_tokens, end_id, **sampling)
    ):
        here = (columns == (lengths + t)[:, None]) & alive[:, None]  # (B, T): one true per living row
        ids = torch.where(here, token[:, None], ids)
        logps = torch.where(here, logp[:, None], logps)
        written += alive
        if end_id is not None:
            ended |= alive & (token == end_id)
    longest = int((lengths + written).max())
    mask = (columns >= lengths[:, None]) & (columns < (lengths + written)[:, None])
    return Rollout(ids[:, :longest], mask[:, :longest], logps[:, :longest], ended)


def rollouts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    seed: int,
    batch_size: int = 256,
    what: str = "",
    **sampling,
) -> Iterator[tuple[list[int], Rollout]]:
    """Sample one response per prompt (ids), a batch at a time → the batch's indices into `prompts`, its
    Rollout.

    Prompts of similar length share a batch. `what`: a name for the progress line; empty for none.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if order and not len(prompts[order[0]]):
        raise UserError("a prompt is empty: there is nothing to answer.")
    progress, device = Progress(what, len(prompts)) if what else None, model.embed.weight.device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(prompts[i]) for i in rows], True, tokenizer.pad).to(device)
        lengths = torch.tensor([len(prompts[i]) for i in rows], device=device)
        end, pad = tokenizer.end, tokenizer.pad
        yield rows, generate(model, ids, lengths, max_new_tokens, end, pad, seed=seed + start, **sampling)
        if progress:
            progress.advance(len(rows))


def respond(
    model: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int, **options
):
    """Answer every prompt (ids) → texts, and whether each ended by itself, both in the prompts' order."""
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    for rows, rollout in rollouts(model, tokenizer, prompts, max_new_tokens, seed, **options):
        for i, response, has_ended in zip(rows, rollout.responses(), rollout.ended.tolist()):
            texts[i], ended[i] = tokenizer.decode_response(response), has_ended
    return texts, ended


@torch.no_grad()
def sample_kl(
    policy: GPT, ref: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int
):
    """Sequence KL(policy ‖ ref) in nats, an unbiased estimate per prompt: log π − log π_ref of a sample.

    → (N,), in no particular order.
    """
    parts = []
    for _, rollout in rollouts(policy, tokenizer, prompts, max_new_tokens, seed):
        parts.append((rollout.logp - token_logprobs(ref, rollout.ids, rollout.mask)).sum(-1))
    return torch.cat(parts)
