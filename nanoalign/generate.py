"""Batched sampling with a KV cache, from ragged prompts that stay right-padded.

Row b's prompt holds `lengths[b]` tokens; its first response token is written at position `lengths[b]`, over
the padding, and so on: every row at its own position. There is no left padding, so a response sits exactly
where the log-prob kernel will find it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError
from nanoalign.compiler import compile_or_eager
from nanoalign.logprobs import last_scored, likelihoods, next_token_logits, token_logprobs
from nanoalign.model import GPT, GPTConfig, KVCache
from nanoalign.packing import packed_hidden
from nanoalign.parallel import gather

CHECK_EVERY = 16  # steps between two looks at which rows have ended: each look is a sync on a GPU
KEEP = 0.75  # rows are dropped once at most this share is left


@dataclass
class Rollout:
    """Prompts with their responses, right-padded: T = longest prompt + longest response."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool: exactly the tokens the row generated, its end token included
    logp: Tensor  # (B, T): of the sampled tokens, under the *untruncated* policy at that temperature; else 0
    ended: Tensor  # (B,) bool: an end token was generated
    rows: Sequence[int] | None = None  # which of those asked for a process has, if it shares them
    group: int = 1  # so many rows that follow each other answer one prompt
    size: int = 0  # how many rows `hidden` reads at one time, where they are no groups; 0: all
    read: dict = field(default_factory=dict, repr=False)  # what models made of it: `read_by`

    def responses(self) -> list[list[int]]:
        """Each row's generated tokens."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids.cpu(), self.mask.cpu())]

    def read_by(self, reader: GPT | None) -> Tensor | None:
        """`logprobs.likelihoods` (B, T, 3) of a frozen model, computed once for all who ask; None of none."""
        if reader is not None and reader not in self.read:
            there = torch.arange(self.ids.shape[1]) <= last_scored(self.scored)[:, None]
            there &= self.scored | (torch.arange(len(there)) % self.group == 0)[:, None]  # a prompt once
            self.read[reader] = likelihoods(reader, self.ids, self.hidden(reader), there)
        return self.read.get(reader)

    @functools.cached_property
    def scored(self) -> Tensor:  # the mask, on the CPU
        return self.mask.cpu()

    @torch.no_grad()
    def hidden(self, model, ids: Tensor | None = None, **values: Tensor | None) -> Tensor:
        """`model.hidden` (B, T, D), also of other ids, and with values (B, T, …). A group's prompt is read
        once; other rows `size` at a time, alike in length, without the padding that they do not need."""
        ids, last, whole = self.ids if ids is None else ids, last_scored(self.scored), None
        if self.group > 1:
            if ids.shape[1] > model.config.context:
                raise UserError(f"{ids.shape[1]} tokens exceed a model's context of {model.config.context}.")
            return packed_hidden(model, ids, self.scored, [self.group] * (len(ids) // self.group), **values)
        if not 0 < self.size < len(last):
            return model.hidden(ids, **values)
        for rows in last.argsort(stable=True).split(self.size):
            at, T = rows.to(self.ids.device, non_blocking=True), int(last[rows].max()) + 1
            own = {name: x if x is None else x[at, :T] for name, x in values.items()}
            part = model.hidden(ids[at, :T], **own)
            whole = part.new_zeros(*ids.shape, part.shape[-1]) if whole is None else whole
            whole[at, :T] = part
        return whole

    def together(self, *values: Tensor | None) -> tuple:
        """This process's rows, with values of each → all rows of all processes, likewise."""
        own = self.ids, self.mask, self.logp, self.ended
        ids, mask, logp, ended, *values = gather(self.rows, *own, *values)
        return Rollout(ids, mask, logp, ended), *values

    def logprobs(self, ref: GPT, temperature: float) -> Tensor:
        """log π_ref of the responses' tokens (B, T), 0 elsewhere; without gradient."""
        if temperature == 1 and ref in self.read:  # some reader of a reward model was the reference
            return self.read[ref][..., 0].masked_fill(~self.mask, 0)
        return token_logprobs(ref, self.ids, self.scored, temperature, hidden=self.hidden(ref))


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with everything outside the k likeliest tokens (ties kept) and the nucleus set to −inf.

    The nucleus is the smallest set of likeliest tokens of together at least top_p (Holtzman et al. 2019).
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


def sample(logits: Tensor, u: Tensor, temperature: float | Tensor, top_k: int, top_p: float):
    """Logits (B, V), uniform numbers u (B,) in [0, 1) → token (B,) and its log-prob (B,) under the
    untruncated policy. The number 0 for a temperature is greedy (log-probs are those at temperature 1)."""
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    logp = (logits := logits.float() / (1.0 if greedy else temperature)).log_softmax(-1)
    if greedy:
        token = logits.argmax(-1)
    else:
        truncated = top_k or top_p < 1
        p = truncate(logits, top_k, top_p).softmax(-1) if truncated else logp.exp()
        # the first token whose cumulative probability exceeds u: unlike multinomial it needs no host sync
        cumulative = p.to(torch.float32 if p.device.type == "mps" else torch.float64).cumsum(-1)
        threshold = u[:, None].to(cumulative) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def decode(model: GPT, token: Tensor, cache: KVCache, position: Tensor, length: int, u: Tensor, how: tuple):
    """The last token (B,), written at position (B,) → the next one and its log-prob, (B,) each."""
    written = torch.arange(length, device=token.device) <= position[:, None, None, None]  # (B, 1, 1, length)
    hidden = model.hidden(token[:, None], position[:, None], written, cache=cache)[:, -1]  # not compiled
    return sample(next_token_logits(model, hidden), u, *how)


@functools.cache
def decoder(rows: int, slots: int, greedy: bool, top_k: int, top_p: float) -> Callable:
    """`decode` as one CUDA graph for so many rows and slots at any temperature but 0, a tensor (). Each is a
    function with code of its own: of one code dynamo makes eight graphs at most, and then runs without."""
    own = FunctionType(decode.__code__.replace(), decode.__globals__, decode.__name__)
    compiled = compile_or_eager(own, mode="reduce-overhead", dynamic=False)

    def step(*args):
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(x.clone() for x in compiled(*args))  # the next run of the graph overwrites its results

    return step


_spare: dict[tuple, KVCache] = {}  # a GPU's cache of the last batch: a graph is bound to where it lies


def take_cache(config: GPTConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """A cache for one batch; on a GPU that of the last batch again, if it has this shape."""
    if spare := _spare.pop((config, rows, slots, device, dtype), None):
        return spare
    _spare.clear()
    cache = KVCache(config, rows, slots, device, dtype)
    if device.type == "cuda":  # the graph writes into it in place
        torch._dynamo.mark_static_address(cache.k)
        torch._dynamo.mark_static_address(cache.v)
    return cache


def bucket(rows: int, device_type: str) -> int:
    """How many rows to decode: on a GPU a power of two, so that few graphs serve all."""
    return 1 << (rows - 1).bit_length() if device_type == "cuda" else rows


def uniform(rows: int, steps: int, seed: int | None, device) -> Tensor:
    """Random numbers (rows, steps): a row's own, whatever becomes of the others. seed None: unlike others."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return torch.rand(rows, steps, generator=generator, device=device)


@torch.no_grad()
def stream(
    model: GPT, prompts: Tensor, lengths: Tensor, max_new_tokens: int, end_id: int | None,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
    stops: Sequence[int] = (), of: Tensor | None = None, numbers: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Yield step by step, (n,) each: the rows still computed, the sampled tokens, their log-probs, and which
    of these rows are still writing.

    of (B,): row b answers prompt of[b], so a prompt that is sampled G times is read once; by default each is
    answered once. A row also stops, without having ended, after any token of `stops`. Rows that have stopped
    are dropped when that makes the batch a good deal smaller. numbers (B, max_new_tokens): in place of those
    of the seed.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise UserError(
            f"cannot sample with temperature {temperature}, top_p {top_p}, top_k {top_k}, max_new_tokens "
            f"{max_new_tokens}: expected temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0 and max_new_tokens ≥ 1."
        )
    (N, P), context, device = prompts.shape, model.config.context, prompts.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.embed.weight.dtype
    if context <= P:
        raise UserError(f"a prompt of {P} tokens leaves no room to answer in a context of {context}.")
    B = N if of is None else len(of)
    u = uniform(B, max_new_tokens, seed, device) if numbers is None else numbers
    more = bucket(B, device.type) - B  # rows that fill up the first batch: the last ones, of no use
    if more:
        of = torch.arange(N, device=device) if of is None else of
        of, u = F.pad(of, (0, more)), F.pad(u, (0, 0, 0, more))
    on_gpu, stops = device.type == "cuda", torch.tensor(stops, device=device)
    slots, heat = min(P + max_new_tokens, context), float(temperature)
    sampling = (torch.tensor(heat, device=device) if on_gpu and heat else heat, top_k, top_p)
    slots += -slots % 64 * on_gpu  # few lengths: few graphs

    key = (model.config, max(N, B + more), slots, device, dtype)
    cache = take_cache(*key)
    rows, position = torch.arange(B + more, device=device), lengths
    hidden = model.hidden(prompts, torch.arange(P, device=device).expand(N, P), cache=cache)
    logits = next_token_logits(model, hidden[torch.arange(N, device=device), lengths - 1])
    if of is not None:
        cache.rearrange(of, P)
        logits, position = logits[of], lengths[of]
    token, logp = sample(logits, u[:, 0], *sampling)
    alive = rows < B
    try:
        for t in range(max_new_tokens):
            yield tuple(x[:B] for x in (rows, token, logp, alive))
            position = position + 1
            alive = alive & (position < context)
            if end_id is not None:
                alive = alive & (token != end_id)
            if len(stops):
                alive = alive & ~torch.isin(token, stops)
            if t + 1 == max_new_tokens:
                return
            if device.type == "cpu" or t % CHECK_EVERY == 0:
                living = int(alive.sum())
                if not living:
                    return
                if (keep := bucket(living, device.type)) <= KEEP * len(rows):
                    kept = (~alive).int().argsort(stable=True)[:keep]  # what fills up stays last
                    cache.rearrange(kept, min(P + t, slots))
                    B = min(B, keep)
                    rows, token, position, alive = (x[kept] for x in (rows, token, position, alive))
            # a row at the limit is no longer alive; what it writes is not looked at
            at, length = position.clamp(max=context) - 1, slots if on_gpu else min(P + t + 1, slots)
            graph = on_gpu and not hasattr(model, "unshard")  # what gathers sharded weights breaks it
            step = decoder(len(rows), slots, not temperature, top_k, top_p) if graph else decode
            token, logp = step(model, token, cache, at, length, u[rows, t + 1], sampling)
    finally:
        if on_gpu:
            _spare[key] = cache


@torch.no_grad()
def generate(
    model: GPT, prompts: Tensor, lengths: Tensor, max_new_tokens: int, end_id: int | None, pad_id: int,
    of: Tensor | None = None, group: int = 1, size: int = 0, **sampling,
) -> Rollout:  # fmt: skip
    """Sample a response for every row → Rollout.

    prompts (N, P) right-padded, lengths (N,); of (B,): the prompt that each row answers, by default one row a
    prompt; group, size: the Rollout's; sampling: temperature, top_k, top_p, seed, stops, numbers. Rows stop
    at their end token, after `max_new_tokens`, or at the model's context; masks at what was generated.
    """
    P, device = prompts.shape[1], prompts.device
    prompts_of, lengths_of = (x if of is None else x[of] for x in (prompts, lengths))
    B, T = len(lengths_of), max(P, min(P + max_new_tokens, model.config.context))
    columns = torch.arange(T, device=device)
    ids = torch.full((B, T + 1), pad_id, device=device)  # the last column takes what is not to be kept
    ids[:, :P] = prompts_of.masked_fill(columns[:P] >= lengths_of[:, None], pad_id)
    logps = torch.zeros(B, T + 1, device=device)
    written, ended = torch.zeros_like(lengths_of), torch.zeros_like(lengths_of, dtype=torch.bool)
    for t, (rows, token, logp, alive) in enumerate(
        stream(model, prompts, lengths, max_new_tokens, end_id, of=of, **sampling)
    ):
        at = torch.where(alive, lengths_of[rows] + t, T)
        ids[rows, at], logps[rows, at] = token, logp.to(logps)
        written[rows] += alive
        if end_id is not None:
            ended[rows] |= alive & (token == end_id)
    longest = int((lengths_of + written).max())
    mask = (columns >= lengths_of[:, None]) & (columns < (lengths_of + written)[:, None])
    return Rollout(ids[:, :longest], mask[:, :longest], logps[:, :longest], ended, None, group, size)
