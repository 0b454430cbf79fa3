"""Several sequences in one row: responses behind the prompt they share, or whole conversations one by one.

    row        x x x a a a b b         a prompt x, read once, and the responses a and b to it
    positions  0 1 2 3 4 5 3 4         each response stands where it would alone
    segments   0 0 0 1 1 1 2 2         a token sees what stands before it, of segment 0 and of its own

What comes back is laid out as if nothing had been packed, so nobody else has to know.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence

from nanoalign.logprobs import likelihoods

FLEX_FROM = {"cuda": 1024}  # tokens in a row from which skipping what is masked pays


def packed_hidden(model: nn.Module, ids: Tensor, own: Tensor, sizes: list[int], seen=None) -> Tensor:
    """`model.hidden(ids)` (B, T, D), computed in fewer rows: `sizes[0]` rows of ids become one, and so on.

    own (B, T) bool, on the CPU: in each row one run of tokens. Those before it are a prompt, the same for all
    the rows that become one, which it then opens, once; their own tokens follow. With no prompt it is whole
    rows that are packed. Beyond a row's own tokens what comes back means nothing. seen (B, T, 3): what a
    scalar model's reader makes of ids, if it is known already.
    """
    (B, T), packs = ids.shape, torch.tensor(sizes)
    row, position = torch.arange(B)[:, None], torch.arange(T)
    pack = torch.arange(len(packs)).repeat_interleave(packs)[:, None]  # (B, 1)
    first = (packs.cumsum(0) - packs)[pack]  # (B, 1) the first row of each row's pack
    prompt = position < own.int().argmax(1, keepdim=True)  # (B, T)
    kept = own | (prompt & (row == first))
    counts = [int(part.sum()) for part in kept.split(sizes)]

    def packed(values: Tensor, fill: int) -> Tensor:  # (B, T) → (packs, the longest of them)
        rows = pad_sequence(values[kept].split(counts), batch_first=True, padding_value=fill)
        return rows.to(ids.device, non_blocking=True)

    source, segments = packed(T * row + position, 0), packed(torch.where(prompt, 0, row + 1), B + 1)
    rank = kept.flatten().cumsum(0).view(B, T)
    place = pack * max(counts) + torch.where(prompt, position, rank - rank[first, 0])
    positions = segment_positions(segments).clamp(max=model.config.context - 1)  # of padding
    if seen is None and (reader := getattr(model, "reader", None)):  # it reads the same rows
        seen = likelihoods(reader, ids, packed_hidden(reader, ids, own, sizes))
    more = {} if seen is None else {"seen": seen.flatten(0, 1)[source]}
    hidden = model.hidden(ids.flatten()[source], positions, segment_mask(segments), **more)
    return hidden.flatten(0, 1)[place.to(ids.device, non_blocking=True)]


def segment_positions(segments: Tensor) -> Tensor:
    """segments (B, T), ascending → the position (B, T) each token would have alone behind segment 0."""
    prompt = (segments == 0).sum(1, keepdim=True)
    begins = torch.searchsorted(segments, segments)  # where a token's segment does
    return torch.arange(segments.shape[1], device=segments.device) - begins + prompt * (segments > 0)


def segment_mask(segments: Tensor) -> Tensor | BlockMask:
    """segments (B, T), ascending → what each token sees: up to itself, segment 0 and its own.

    Dense, (B, 1, T, T) bool; where `FLEX_FROM` says so, blocks for FlexAttention, which skips what is masked.
    """
    B, T = segments.shape

    def sees(b, _, q, k):
        return (k <= q) & ((segments[b, k] == 0) | (segments[b, k] == segments[b, q]))

    if FLEX_FROM.get(segments.device.type, math.inf) <= T:
        return create_block_mask(sees, B, None, T, T, device=segments.device)
    at = torch.arange(max(B, T), device=segments.device)
    return sees(at[:B, None, None, None], 0, at[:T, None], at[:T])
