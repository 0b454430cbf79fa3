"""What a model takes: weights, what a forward pass keeps and what it only passes through (docs/memory.md)."""

import torch.nn as nn
from torch import Tensor

from nanoalign.model import GPT

UP = {"swiglu": 2, "gelu": 1}  # what the MLP's first matrix makes of a token, in widths of the MLP


def tensors(*models: nn.Module) -> list[Tensor]:
    """Their weights and buffers, shared ones once."""
    every = [x for model in models for x in (*model.parameters(), *model.buffers())]
    return list({x.data_ptr() or id(x): x for x in every}.values())


def in_fp32(*models: nn.Module) -> int:
    return sum(4 * x.numel() for x in tensors(*models))


def activations(model: GPT, length: int, size: int = 4, fused=False, masked=False) -> tuple[int, int]:
    """Bytes per token of a row that a forward pass keeps: in a block, and beside the blocks.

    size: bytes of a number in a matrix product. fused: RMSNorm is one kernel, as on a GPU; a CPU also keeps
    x / rms, where it trains the gain. masked: each block has numbers of its own for who sees whom, length of
    them, as where sequences share a row.
    """
    config, D, d = model.config, model.config.width, model.config.head_dim
    H, K, rank = config.heads, config.kv_heads, getattr(model.blocks[0].mlp.up, "rank", 0)
    apart = config.norm == "rmsnorm" and model.norm.weight.requires_grad and not fused
    norm = 4 * D * (1 + apart) + size * D  # what goes in, what comes out
    attention = size * d * 2 * (H + K) + 4 * H  # q, k, v, what comes out; its log-sum-exp
    if config.positions == "rope":
        attention += size * d * (2 * H + K)  # q and k rotated; what comes out, before heads are joined
    if config.qk_norm:
        attention += 4 * d * (H + K) * (apart + (size == 2))
    mlp = 2 * UP[config.mlp] * config.mlp_width  # gate, up, silu and product; or up and gelu
    block = 2 * norm + attention + size * (mlp + length * masked + 4 * rank)
    return block, 4 * D * (2 + apart)


def rounded(models: list[GPT], size: int, graph: bool) -> int:
    """Bytes of the bf16 copies that autocast makes of matrices: in a graph of all, else of trained ones."""
    found = [(p, graph and not model.checkpointing) for model in models for p in model.blocks.parameters()]
    found = [p for p, kept in found if p.dim() == 2 and p.itemsize > size and (kept or p.requires_grad)]
    return sum(size * p.numel() for p in found)


def passing(model: GPT, size: int) -> int:
    """Bytes per token that a block makes and drops again; half as many again of gradients. An adapter's
    matrix makes three of each number: W x, B A x and their sum."""
    config, adapted = model.config, hasattr(model.blocks[0].mlp.up, "rank")
    return 12 * config.width + size * config.mlp_width * UP[config.mlp] * (3 if adapted else 2)
