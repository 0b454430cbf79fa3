"""Logits of random-weight models against transformers: the same function, up to fp32 rounding."""

import pytest
import torch

from lab.bench.peers import from_gpt2
from nanoalign.model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

V, CONTEXT = 101, 64
LLAMA = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
}
OURS = {"layers": 3, "width": 48, "heads": 6, "kv_heads": 2, "mlp_width": 80}


def rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


def gpt2():
    theirs = transformers.GPT2Config(vocab_size=V, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=6)
    ours = GPTConfig(V, CONTEXT, 3, 48, 6, norm="layernorm", positions="learned", mlp="gelu", bias=True)
    return transformers.GPT2LMHeadModel(theirs), ours


def llama_untied():
    theirs = transformers.LlamaConfig(**LLAMA, **rope(10_000.0), tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(theirs), GPTConfig(V, CONTEXT, **OURS, tied=False)


def llama_scaled_rope():
    # an old context of 32 and a small θ: fast, medium and slow frequencies are all among the four
    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = rope(100.0, **factors, rope_type="llama3", original_max_position_embeddings=32)
    theirs = transformers.LlamaConfig(**LLAMA, **scaling, tie_word_embeddings=True)
    ours = GPTConfig(V, CONTEXT, **OURS, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 32.0))
    return transformers.LlamaForCausalLM(theirs), ours


def qwen2():
    theirs = transformers.Qwen2Config(
        **{**LLAMA, "rms_norm_eps": 1e-6}, **rope(1e6), tie_word_embeddings=True
    )
    ours = GPTConfig(V, CONTEXT, **OURS, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True)
    return transformers.Qwen2ForCausalLM(theirs), ours


def qwen3():
    theirs = transformers.Qwen3Config(**LLAMA, head_dim=20, **rope(1e6), tie_word_embeddings=True)
    ours = GPTConfig(V, CONTEXT, **OURS, head_dim=20, rope_theta=1e6, qk_norm=True)
    return transformers.Qwen3ForCausalLM(theirs), ours


def from_llama(theirs: dict) -> dict:
    ours = {"embed.weight": theirs["embed_tokens.weight"], "norm.weight": theirs["norm.weight"]}
    for layer in range(LLAMA["num_hidden_layers"]):
        get = {k.removeprefix(p): v for k, v in theirs.items() if k.startswith(p := f"layers.{layer}.")}
        block = {
            "attention_norm.weight": get["input_layernorm.weight"],
            "mlp_norm.weight": get["post_attention_layernorm.weight"],
            "attention.out.weight": get["self_attn.o_proj.weight"],
            "mlp.up.weight": torch.cat([get[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            "mlp.down.weight": get["mlp.down_proj.weight"],
        }
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in get:
                block[f"attention.qkv.{kind}"] = torch.cat([get[f"self_attn.{x}_proj.{kind}"] for x in "qkv"])
        for x in "qk":
            if f"self_attn.{x}_norm.weight" in get:
                block[f"attention.{x}_norm.weight"] = get[f"self_attn.{x}_norm.weight"]
        ours |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    return ours


@pytest.mark.parametrize("family", [gpt2, llama_untied, llama_scaled_rope, qwen2, qwen3])
@torch.no_grad()
def test_logits_equal_those_of_transformers(family):
    torch.manual_seed(0)
    theirs, config = family()
    theirs.eval()
    for parameter in theirs.parameters():  # biases and norms too; large enough that every part matters
        parameter += 0.15 * torch.randn_like(parameter)
    ours = GPT(config)
    mapped = (from_gpt2 if family is gpt2 else from_llama)(theirs.base_model.state_dict())
    ours.load_state_dict({**mapped, "head.weight": theirs.lm_head.weight}, strict=True)
    ids = torch.randint(V, (3, CONTEXT))
    expected = theirs(ids).logits
    assert 0.5 < expected.std() < 5
    assert (ours(ids) - expected).abs().max() <= 1e-4
