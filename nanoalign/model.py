"""One GPT. GPT-2 and the Llama family (Llama, Qwen2, Qwen3, SmolLM) differ only in the fields of `GPTConfig`.

    GPT(config)(ids)         -> logits (B, T, V)
    GPT(config).hidden(ids)  -> (B, T, D), after the final norm: what the log-prob kernel takes

Rows are right-padded and attention is causal, so padding can never reach a real token: no mask is needed.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from nanoalign import UserError
from nanoalign.activations import ActivatedLinear, activation
from nanoalign.compiler import compile_or_eager

flex = compile_or_eager(flex_attention)
CHOICES = {"norm": ("rmsnorm", "layernorm"), "positions": ("rope", "learned"), "mlp": ("swiglu", "gelu")}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are the Llama family's; `PRESETS` names whole models."""

    vocab_size: int = 1024
    context: int = 256  # the longest sequence, in tokens
    layers: int = 4
    width: int = 128  # D, the residual stream
    heads: int = 4
    kv_heads: int = 0  # grouped-query attention when fewer than heads; 0 means heads
    head_dim: int = 0  # 0 means width / heads
    mlp_width: int = 0  # 0 means 4·width (GELU), or 8/3·width rounded up to 64 (SwiGLU)
    norm: str = "rmsnorm"  # these three: one of CHOICES
    norm_eps: float = 1e-5
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # Llama 3: (factor, low_freq_factor, high_freq_factor, old_context)
    mlp: str = "swiglu"
    bias: bool = False  # biases in every linear layer (GPT-2)
    qkv_bias: bool = False  # biases in the query, key and value projections only (Qwen2)
    qk_norm: bool = False  # RMSNorm on queries and keys, per head (Qwen3)
    tied: bool = True  # the output head shares the embedding's weight

    def __post_init__(self):
        derive = object.__setattr__  # fill the zeros in, so that every reader sees plain numbers
        derive(self, "kv_heads", self.kv_heads or self.heads)
        derive(self, "head_dim", self.head_dim or self.width // max(1, self.heads))
        default_mlp = 4 * self.width if self.mlp == "gelu" else math.ceil(self.width * 8 / 3 / 64) * 64
        derive(self, "mlp_width", self.mlp_width or default_mlp)
        derive(self, "rope_scaling", tuple(self.rope_scaling))
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if self.head_dim < 1 or (self.positions == "rope" and self.head_dim % 2):
            raise UserError(f"head_dim must be positive, and even for RoPE, not {self.head_dim}.")
        if len(self.rope_scaling) not in (0, 4):
            raise UserError("rope_scaling takes four numbers: factor, low, high, old_context.")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(f"{field}={getattr(self, field)!r} is unknown; choose from {allowed}.")


def _gpt2(layers: int, width: int, heads: int) -> GPTConfig:
    style = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
    return GPTConfig(50257, 1024, layers, width, heads, **style)


PRESETS = {
    # the built-in world's models, and a few million parameters for real text on a laptop
    "world-nano": GPTConfig(layers=1, width=16, heads=1),
    "world-tiny": GPTConfig(layers=2, width=64, heads=2),
    "world-small": GPTConfig(layers=4, width=128, heads=4),
    "world-deep": GPTConfig(layers=8, width=128, heads=4),
    "world-large": GPTConfig(layers=8, width=384, heads=6),
    "mini": GPTConfig(vocab_size=50257, context=512, layers=4, width=128, heads=4),
    # published shapes
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "smollm2-135m": GPTConfig(49152, 8192, 30, 576, 9, 3, mlp_width=1536, rope_theta=1e5),
    "llama-3.2-1b": GPTConfig(
        128256, 131072, 16, 2048, 32, 8, mlp_width=8192, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192.0)
    ),
    "qwen2.5-0.5b": GPTConfig(
        151936, 32768, 24, 896, 14, 2, mlp_width=4864, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True
    ),
    "qwen3-0.6b": GPTConfig(
        151936, 40960, 28, 1024, 16, 8, 128, mlp_width=3072, norm_eps=1e-6, rope_theta=1e6, qk_norm=True
    ),
}


def preset(name: str, **overrides) -> GPTConfig:
    """The named configuration with some fields replaced, such as `vocab_size`. Widths that follow from others
    (kv_heads, head_dim, mlp_width) are derived anew when `width`, `heads` or `mlp` is replaced."""
    if name not in PRESETS:
        raise UserError(f"there is no model preset {name!r}; choose from {', '.join(PRESETS)}.")
    if overrides.keys() & {"width", "heads", "mlp"}:
        overrides = {"kv_heads": 0, "head_dim": 0, "mlp_width": 0, **overrides}
    return replace(PRESETS[name], **overrides)


class KVCache:
    """Keys and values of every layer, allocated once: (L, B, kv_heads, S, head_dim) each.

    Every row writes at its own positions, so ragged prompts stay right-padded: what padding wrote beyond a
    row's length is overwritten before any query can see it. A batch of fewer rows uses the first ones.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, device, dtype=torch.float32):
        shape = (config.layers, batch, config.kv_heads, length, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.rows = torch.arange(batch, device=device)[:, None]

    def rearrange(self, rows: Tensor, length: int) -> None:
        """Row i becomes what rows[i] was, in its first `length` positions; in place, for CUDA graphs."""
        for x in (*self.k, *self.v):
            x[: len(rows), :, :length] = x[rows, :, :length]


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def rope_angles(config: GPTConfig) -> Tensor:
    """Rotation angles (context, head_dim / 2), float64 (RoFormer: Su et al. 2021, eq. 15; Llama 3)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-exponents
    if config.rope_scaling:
        factor, low, high, old_context = config.rope_scaling
        turns = old_context * frequency / (2 * math.pi)  # full turns within the context it was trained on
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, left alone; 0: slow, stretched
        frequency = keep * frequency + (1 - keep) * frequency / factor
    return torch.outer(torch.arange(config.context, dtype=torch.float64), frequency)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x (B, H, T, d); cos and sin are (B or 1, 1, T, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.width, qkv_width, bias=config.bias or config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=config.bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope, layer_cache, visible: Tensor | BlockMask | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if layer_cache is not None:
            keys, values, rows, positions = layer_cache
            keys[rows[:B], :, positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows[:B], :, positions] = v.transpose(1, 2).to(values.dtype)
            if visible is not None:  # decoding: attend to everything written so far
                k, v = (x[:B, :, : visible.shape[-1]] for x in (keys, values))
        grouped = self.kv_heads < self.heads
        if isinstance(visible, BlockMask):
            y = flex(q.to(v.dtype), k.to(v.dtype), v, None, visible, None, grouped)
        else:
            y = F.scaled_dot_product_attention(q, k, v, visible, 0.0, visible is None, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.width, config.mlp_width * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if type(self.down) is nn.Linear:  # no adapters, which keep what comes in anyway
            return ActivatedLinear.apply(x, self.down.weight, self.down.bias, self.gated)
        return self.down(activation(x, self.gated))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, layer_cache, visible: Tensor | BlockMask | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, layer_cache, visible)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    checkpointing = False  # recompute each block's activations in the backward pass

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position = nn.Embedding(config.context, config.width)
        else:
            angles = rope_angles(config)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()
        if config.tied:
            self.head.weight = self.embed.weight

    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02); the projections into the residual stream shrunk by √(2L)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, visible: Tensor | BlockMask | None = None,
        cache: KVCache | None = None, extra: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """ids (B, T) → the final normed hidden states (B, T, D). By default a plain causal forward pass.

        positions (B or 1, T): where each token stands, if not at 0 … T − 1. visible: what each token sees, if
        not all before it: bool, broadcast over (B, heads, T, S), or blocks for FlexAttention. With a cache,
        keys and values are written at `positions`; with `visible` too, its first S slots are what is seen.
        extra (B, T, D) is added to the embeddings.
        """
        T, context = ids.shape[1], self.config.context
        if positions is None:
            if context < T:
                what = f"a sequence of {T} tokens exceeds the model's context of {context}"
                raise UserError(f"{what}: shorten it, or use a model with a longer context.")
            positions = torch.arange(T, device=ids.device)[None]
        x = self.embed(ids) if extra is None else self.embed(ids) + extra
        rope = None
        if self.config.positions == "learned":
            x = x + self.position(positions)
        else:
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, head_dim / 2)
        if isinstance(visible, Tensor):  # as a term of the scores: made once, and kept once, for all blocks
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            visible = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else (cache.k[i], cache.v[i], cache.rows, positions)
            if self.checkpointing and torch.is_grad_enabled():  # keep x only: the rest is computed again
                x = checkpoint(block, x, rope, layer_cache, visible, use_reentrant=False)
            else:
                x = block(x, rope, layer_cache, visible)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → logits (B, T, V). Training goes through `logprobs.py`, which never builds this."""
        return self.head(self.hidden(ids))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())
