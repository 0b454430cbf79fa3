"""What models take: weights, what a forward pass keeps, what it passes through, logits (docs/memory.md)."""

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from nanoalign.hf import is_folder
from nanoalign.kernels import LARGE, _chunk_size
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
    x / rms, where it trains the gain. masked: there are numbers for who sees whom, length of them a token, as
    where sequences share a row.
    """
    config, D, d = model.config, model.config.width, model.config.head_dim
    H, K, rank = config.heads, config.kv_heads, getattr(model.blocks[0].mlp.up, "rank", 0)
    learnt = model.norm.weight.requires_grad  # or frozen under adapters, as is what goes into the first block
    apart = config.norm == "rmsnorm" and learnt and not fused
    norm = 4 * D * (1 + apart) + size * D  # what goes in, what comes out
    attention = size * d * 2 * (H + K) + 4 * H  # q, k, v, what comes out; its log-sum-exp
    if config.positions == "rope":
        attention += size * d * (2 * H + K)  # q and k rotated; what comes out, before heads are joined
    if config.qk_norm:
        attention += 4 * d * (H + K) * (apart + (size == 2))
    mlp = (1 + (rank > 0)) * UP[config.mlp] * config.mlp_width  # adapters: silu and product, or gelu, too
    block = 2 * norm + attention + size * (mlp + 4 * rank)
    return block, 4 * D * (1 + learnt + apart) + size * length * masked


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


class Head:
    """The output head, through which tokens go in equal chunks (kernels.py). weights (V, D). size: bytes of a
    number in a matrix product. chunk: tokens at one time; by default as many as kernels.py takes."""

    def __init__(self, weights: Tensor, size: int, device, chunk: int = 0):
        self.tokens, self.eager = len(weights), len(weights) < LARGE
        self.chunk = chunk or _chunk_size(self.tokens, 4, device)
        rounds = size == 2 or (not self.eager and self.tokens % 64)  # to bf16, or V up to a multiple of 64
        self.copy = weights.numel() * (size if device.type == "cuda" else 4) * bool(rounds)
        self.gradient = weights.nbytes * weights.requires_grad

    def logits(self, scored: int) -> int:
        """Bytes of a chunk's logits, fp32."""
        return 4 * self.tokens * -(-scored // max(1, -(-scored // self.chunk)))

    def passing(self, scored: int, numbers: int) -> int:
        """Bytes while log-probs are made of a chunk's logits: so many numbers for each; where the vocabulary
        is large, one, for then a compiled kernel makes them."""
        return (scored > 0) * (self.copy + self.logits(scored) * (numbers if self.eager else 1))

    def kept(self, scored: int) -> int:
        """Bytes that stay for the backward pass: the logits if one chunk has them all."""
        return (scored > 0) * (self.copy + self.logits(scored) * (scored <= self.chunk))


class Models(NamedTuple):
    """The models of a run, and in what it computes."""

    trained: nn.Module
    own: list[nn.Module]  # it, or its parts, and what is held beside
    size: int  # bytes of a number in a matrix product
    head: Head
    block: int  # bytes per token that a block passes through
    on_gpu: bool

    @classmethod
    def of(cls, trained: nn.Module, held, size: int, device, chunk: int = 0) -> "Models":
        """chunk: tokens whose logits exist at one time; 0: as many as kernels.py takes on the device."""
        own = [*(trained if isinstance(trained, nn.ModuleList) else [trained]), *filter(None, held)]
        found = [part for model in own for part in model.modules() if isinstance(part, GPT)]
        head = Head(found[0].head.weight, size, device, chunk)
        block = max(passing(gpt, size) for gpt in found)
        return cls(trained, own, size, head, block, device.type == "cuda")

    @property
    def learners(self) -> list[GPT]:  # those that a backward pass goes through
        parts = [part for part in self.trained.modules() if isinstance(part, GPT)]
        return [gpt for gpt in parts if any(p.requires_grad for p in gpt.parameters())]


def from_files(config, trained: nn.Module, own: list[nn.Module]) -> int:
    """Bytes that loading takes beside all weights: those of one file, and of a scalar model what it shares as
    soon as it is there. A folder is read one tensor after another."""
    more, every = [0], in_fp32(*own)
    for model in own:
        if isinstance(model, GPT):
            more += [0 if is_folder(getattr(config, "init", "hf:")) else in_fp32(model)]
        elif model is trained:  # a copy of a language model
            more += [in_fp32(model.gpt)]
        else:
            shared = in_fp32(model) + in_fp32(*(x for x in own if x is not model)) - every
            more += [in_fp32(model) + shared]
    return max(more)
