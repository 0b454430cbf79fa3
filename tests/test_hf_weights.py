"""Hugging Face folders: which tensor is which, what is refused, how much memory it takes, and crashes.

tests/parity/test_hf.py compares with transformers; here nothing but safetensors is needed, for most.
"""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanoalign import UserError
from nanoalign import hf_weights as hf
from nanoalign.model import GPT, GPTConfig, preset
from nanoalign.scalar import ScalarGPT

ROOT = Path(__file__).parents[1]
SMALL = GPTConfig(
    vocab_size=31, context=16, layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, tied=False
)
GPT2 = GPTConfig(31, 16, 2, 16, 4, norm="layernorm", positions="learned", mlp="gelu", bias=True)
SIZE = {
    "vocab_size": 31, "max_position_embeddings": 16, "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
}  # fmt: skip
CONFIGS = {name: {"model_type": name, **SIZE} for name in ("llama", "mistral", "qwen2", "qwen3")}
CONFIGS["mistral"]["sliding_window"] = None
CONFIGS["gpt2"] = {
    "model_type": "gpt2", "vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4,
}  # fmt: skip
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **SCALING}


def random_gpt(config: GPTConfig, kind=GPT):
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    return model


@pytest.fixture
def tensors():
    """tensors.load_file, tensors.save_file"""
    return pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra hf)")


@pytest.fixture
def folder(tensors, tmp_path):
    """folder(config) → a folder with random weights."""

    def folder(config: GPTConfig = SMALL, **options) -> Path:
        hf.save_folder(random_gpt(config), tmp_path / "model", **options)
        return tmp_path / "model"

    return folder


def change(folder: Path, tensors, **changed) -> None:
    """Replace tensors of a folder in one file; None takes one away; in names, __ stands for a dot."""
    file = folder / "model.safetensors"
    held = tensors.load_file(file) | {name.replace("__", "."): x for name, x in changed.items()}
    tensors.save_file({name: x.contiguous() for name, x in held.items() if x is not None}, file)


def says(path: Path, **fields) -> None:
    path = path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --------------------------------------------------------------------------------------------- which is which


def test_a_llama_folder_holds_these_tensors_of_these_shapes(folder, tensors):
    config = replace(SMALL, head_dim=6, layers=1)
    own, block = random_gpt(config).state_dict(), "model.layers.0."
    held = tensors.load_file(folder(config) / "model.safetensors")
    q, k, v = own["blocks.0.attention.qkv.weight"].split([4 * 6, 2 * 6, 2 * 6])
    gate, up = own["blocks.0.mlp.up.weight"].split(24)
    expected = {
        "model.embed_tokens.weight": own["embed.weight"], "model.norm.weight": own["norm.weight"],
        "lm_head.weight": own["head.weight"], block + "self_attn.q_proj.weight": q,
        block + "self_attn.k_proj.weight": k, block + "self_attn.v_proj.weight": v,
        block + "self_attn.o_proj.weight": own["blocks.0.attention.out.weight"],
        block + "mlp.gate_proj.weight": gate, block + "mlp.up_proj.weight": up,
        block + "mlp.down_proj.weight": own["blocks.0.mlp.down.weight"],
        block + "input_layernorm.weight": own["blocks.0.attention_norm.weight"],
        block + "post_attention_layernorm.weight": own["blocks.0.mlp_norm.weight"],
    }  # fmt: skip
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weights) for name, weights in expected.items())


def test_a_gpt2_folder_holds_its_matrices_transposed_and_no_head(folder, tensors):
    own = random_gpt(GPT2).state_dict()
    held = tensors.load_file(folder(GPT2) / "model.safetensors")
    assert "lm_head.weight" not in held and len(held) == 4 + 2 * 12
    assert torch.equal(held["transformer.wpe.weight"], own["position.weight"])
    assert torch.equal(held["transformer.ln_f.bias"], own["norm.bias"])
    for theirs, ours in {"attn.c_attn": "attention.qkv", "mlp.c_proj": "mlp.down"}.items():
        weights, bias = (held[f"transformer.h.1.{theirs}.{kind}"] for kind in ("weight", "bias"))
        assert torch.equal(weights, own[f"blocks.1.{ours}.weight"].T)
        assert torch.equal(bias, own[f"blocks.1.{ours}.bias"])


SHAPES = {
    "gpt2": GPT2,
    "untied": SMALL,
    "tied": replace(SMALL, tied=True),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen3": replace(SMALL, qk_norm=True, head_dim=6, rope_theta=1e6),
    "rope": replace(SMALL, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 8.0)),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_what_was_written_is_read_bit_for_bit_and_computes_the_same(name, shard_bytes, folder):
    where = folder(SHAPES[name], shard_bytes=shard_bytes)
    files = sorted(path.name for path in where.iterdir())
    assert (files == ["config.json", "model.safetensors"]) == (shard_bytes == 10**9)
    model, expected = hf.load_folder(where), random_gpt(SHAPES[name])
    assert model.config == expected.config and type(model) is GPT
    own, other = model.state_dict(), expected.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids), expected(ids))
    assert (model.head.weight is model.embed.weight) == model.config.tied
    parameters = list(model.parameters())
    assert len(parameters) == len(list(expected.parameters()))
    assert all(p.requires_grad and p.is_contiguous() and p.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_numbers_of_a_rounded_folder_are_those_it_was_rounded_to(dtype, folder):
    model = hf.load_folder(folder(GPT2, dtype=dtype))
    for name, weights in random_gpt(GPT2).state_dict().items():
        assert torch.equal(model.state_dict()[name], weights.to(dtype).float())


def test_no_file_but_a_tensor_larger_than_it_is_larger_than_a_shard_and_the_index_names_each(folder, tensors):
    where = folder(shard_bytes=3000)
    index = json.loads((where / hf.INDEX).read_text())["weight_map"]
    files = sorted(where.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = tensors.load_file(file)
        assert sum(x.nbytes for x in held.values()) <= 3000 or len(held) == 1
        assert all(index.pop(name) == file.name for name in held)
    assert not index


def test_shards_without_an_index_and_one_file_of_any_name_are_read(folder):
    where = folder(shard_bytes=3000)
    (where / hf.INDEX).unlink()
    expected = random_gpt(SMALL).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in hf.load_folder(where).state_dict().items())


def test_weights_of_another_name_beside_the_index_are_not_read(folder, tensors):
    where = folder(shard_bytes=3000)
    tensors.save_file({"tok_embeddings.weight": torch.zeros(2)}, where / "consolidated.safetensors")
    assert hf.load_folder(where).config == SMALL


def test_a_head_beside_a_tied_embedding_is_read_where_it_is_the_same(folder, tensors):
    where = folder(replace(SMALL, tied=True))
    embedding = tensors.load_file(where / "model.safetensors")["model.embed_tokens.weight"]
    change(where, tensors, lm_head__weight=embedding.clone())
    assert hf.load_folder(where).config.tied


def test_loading_draws_no_random_number(folder):
    where = folder()
    before = torch.get_rng_state()
    hf.load_folder(where)
    assert torch.equal(torch.get_rng_state(), before)


PUBLISHED = {  # what the config.json of these models says, as it stands on the hub
    "gpt2": """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null,
        "task_specific_params": {"text-generation": {"do_sample": true}}, "vocab_size": 50257}""",
    "smollm2-135m": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152}""",
    "llama-3.2-1b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": false,
        "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
        "original_max_position_embeddings": 8192}, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "vocab_size": 128256}""",
    "qwen2.5-0.5b": """{"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "qwen3-0.6b": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
        "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_of_a_preset_is_read_as_the_preset(name):
    assert hf.read_config(json.loads(PUBLISHED[name]), "config.json") == preset(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_of_a_preset_says_what_the_published_config_says(name):
    theirs = json.loads(json.dumps(hf.write_config(preset(name), "float32")))
    assert hf.read_config(theirs, "config.json") == preset(name)
    published = json.loads(PUBLISHED[name])
    for key in theirs.keys() & published.keys() - {"bos_token_id", "eos_token_id", "torch_dtype"}:
        assert theirs[key] == published[key], key


@pytest.mark.parametrize(
    "odd",
    [
        {"norm": "layernorm"}, {"positions": "learned"}, {"mlp": "gelu"}, {"bias": True},
        {"qkv_bias": True, "qk_norm": True}, {"rope_scaling": (8.0, 1.0, 4.0, 8.5)},
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_that_no_class_of_transformers_has_is_not_written(odd, tmp_path):
    with pytest.raises(UserError, match="no class"):
        hf.save_folder(GPT(replace(SMALL, **odd)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------- what is refused

GOOD = [  # family, settings that change nothing
    ("llama", {"hidden_act": "swish", "mlp_bias": False, "attention_bias": None, "attention_dropout": 0.1}),
    ("llama", {"rope_scaling": None, "pretraining_tp": 2, "quantization_config": None, "head_dim": None}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh", "n_inner": None, "reorder_and_upcast_attn": True}),
]


@pytest.mark.parametrize(("family", "settings"), GOOD, ids=str)
def test_settings_that_change_nothing_are_read(family, settings):
    expected = hf.read_config(CONFIGS[family], "config.json")
    assert hf.read_config(CONFIGS[family] | settings, "config.json") == expected


BAD = [  # family, settings that make another model (None: of no size), what the sentence names
    ("llama", {"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ("llama", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
    ("llama", {"model_type": None}, "model_type is 'None'"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
    ("llama", {"attention_bias": True}, "attention_bias is 'True'"),
    ("llama", {"mlp_bias": True}, "mlp_bias is 'True'"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ("llama", {"auto_map": {"AutoModel": "mine.Model"}}, "auto_map is .*mine"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor': 0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "partial_rotary"),
    ("llama", {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    *[
        ("llama", {"rope_scaling": {"type": kind, "factor": 2.0}}, f"positions.*{kind}")
        for kind in ("linear", "dynamic", "yarn", "longrope", "su", "mrope")
    ],
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "'yarn'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "positions.*full_attention"),
    ("llama", {"rope_scaling": "llama3"}, "positions"),
    ("llama", {"rope_scaling": [8.0]}, "positions"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "positions"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": "8"}}, "positions"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "positions"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": -8.0}}, "rope_scaling"),
    ("llama", {"rope_theta": "big"}, "rope_theta"),
    ("llama", {"rope_theta": float("inf")}, "rope_theta"),
    ("mistral", {"sliding_window": 8}, "sliding_window of 8 tokens"),
    ("mistral", {"sliding_window": "all"}, "sliding_window"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"layer_types": 3}, "layer_types"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("llama", {"vocab_size": "31"}, "vocab_size .*'31'"),
    ("llama", {"hidden_size": 16.0}, "width .*16.0"),
    ("llama", {"hidden_size": -16}, "width .*-16"),
    ("llama", {"hidden_size": 10**12}, "width"),
    ("llama", {"num_hidden_layers": 10**6}, "layers"),
    ("llama", {"num_attention_heads": 0}, "heads"),
    ("llama", {"num_attention_heads": True}, "heads"),
    ("llama", {"num_key_value_heads": 3}, "kv_heads"),
    ("llama", {"max_position_embeddings": None}, "context"),
    ("llama", {"rms_norm_eps": None}, "norm_eps"),
    ("llama", {"rms_norm_eps": float("nan")}, "norm_eps"),
    ("llama", {"tie_word_embeddings": "yes"}, "tied"),
    ("gpt2", {"n_layer": [2]}, "layers"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings", "names"), BAD, ids=str)
def test_a_config_of_another_function_is_one_sentence_that_names_why(family, settings, names):
    with pytest.raises(UserError, match=names) as refusal:
        hf.read_config(CONFIGS[family] | settings, "some/config.json")
    sentence = str(refusal.value)
    assert sentence.startswith("some/config.json ") and sentence.endswith(".") and "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_without_one_of_its_sizes_is_refused(family):
    sizes = {*CONFIGS[family]} - {"model_type", "num_key_value_heads", "sliding_window"}
    assert len(sizes) == (5 if family == "gpt2" else 6)
    for name in sizes:
        rest = {key: value for key, value in CONFIGS[family].items() if key != name}
        with pytest.raises(UserError, match=f"it has no {name}"):
            hf.read_config(rest, "config.json")


def refused(folder, names: str) -> None:
    with pytest.raises(UserError, match=names) as refusal:
        hf.load_folder(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "3", '"llama"', "", "[" * 100_000, b"\xff\xfe{}"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, "config.json cannot be read: it is no JSON object")


def test_a_folder_without_config_and_what_is_no_folder_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "a.txt"):
        refused(path, "config.json cannot be read: (No such file|Not a directory)")


def test_without_safetensors_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    hf.save_folder(GPT(SMALL), tmp_path)  # writing needs none
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(tmp_path, re.escape("pip install -e '.[hf]'"))


def test_pickles_are_not_read(folder):
    where = folder()
    (where / "model.safetensors").rename(where / "pytorch_model.bin")
    refused(where, r"no \*\.safetensors.*pickle")


def test_a_missing_shard_is_refused_with_and_without_an_index(folder):
    where = folder(shard_bytes=3000)
    shard = sorted(where.glob("*.safetensors"))[1]
    shard.unlink()
    refused(where, f"names {shard.name}")
    (where / hf.INDEX).unlink()
    refused(where, "the tensor model.layers.0.* is missing")


@pytest.mark.parametrize(
    ("index", "names"),
    [
        ("{", "no JSON object"), ("{}", "shards"), ('{"weight_map": 3}', "shards"),
        ('{"weight_map": {"a": "../model/config.json"}}', "names ../model/config.json"),
        ('{"weight_map": {"a": 3}}', "names 3"), ('{"weight_map": {"a": "/etc/hosts"}}', "names /etc/hosts"),
        ('{"weight_map": {"a": "config.json"}}', "config.json cannot be read"),
    ],
)  # fmt: skip
def test_an_index_that_names_no_shards_of_this_folder_is_refused(index, names, folder):
    where = folder(shard_bytes=3000)
    (where / hf.INDEX).write_text(index)
    refused(where, names)


def test_tensors_that_are_missing_left_over_twice_or_of_another_shape_are_refused(folder, tensors):
    where, bias = folder(), "model__layers__1__self_attn__q_proj__bias"
    change(where, tensors, **{bias: torch.zeros(16)})
    refused(where, "no place for its tensor 'model.layers.1.self_attn.q_proj.bias'")
    change(where, tensors, **{bias: None}, model__norm__weight=None)
    refused(where, "the tensor model.norm.weight is missing")
    change(where, tensors, model__norm__weight=torch.zeros(4, 4))
    refused(where, r"the tensor model.norm.weight is of shape \[4, 4\], not \[16\]")
    change(where, tensors, model__norm__weight=torch.zeros(16))
    hf.load_folder(where)
    tensors.save_file({"model.norm.weight": torch.ones(16)}, where / "model-2.safetensors")
    (where / "model.safetensors").rename(where / "model-1.safetensors")
    refused(where, "model.norm.weight is in model-1.safetensors and in model-2.safetensors")


def test_a_head_that_is_missing_or_that_a_tied_embedding_contradicts_is_refused(folder, tensors):
    where = folder()
    says(where, tie_word_embeddings=True)
    refused(where, "tie_word_embeddings is true, but lm_head.weight is not the embedding")
    change(where, tensors, lm_head__weight=torch.zeros(3))
    refused(where, "lm_head.weight is not the embedding")
    change(where, tensors, lm_head__weight=None)
    assert hf.load_folder(where).config.tied
    says(where, tie_word_embeddings=False)
    refused(where, "the tensor lm_head.weight is missing")


def test_a_larger_config_than_its_weights_is_refused_before_memory_is_taken(folder):
    where = folder()
    says(where, hidden_size=2**22, vocab_size=2**22)  # 64 TiB
    refused(where, "embed_tokens.weight is of shape")
    says(where, hidden_size=10**400)
    refused(where, "the width of its model cannot be 'inf'")
    says(where, hidden_size=16, vocab_size=31, num_hidden_layers=3)
    refused(where, "model.layers.2.* is missing")
    says(where, num_hidden_layers=1)
    refused(where, "no place for its tensor 'model.layers.1.")


DTYPES = ["float64", "int8", "uint8", "int64", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_plain_floats_are_refused(dtype, folder, tensors):
    where = folder()
    change(where, tensors, model__norm__weight=torch.ones(16).to(getattr(torch, dtype)))
    refused(where, "model.safetensors cannot be read: model.norm.weight is of dtype [A-Z]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_weights_that_are_not_finite_are_refused_and_not_written(value, dtype, folder, tensors):
    where, weights = folder(), torch.ones(16, dtype=dtype)
    weights[7] = value
    change(where, tensors, model__norm__weight=weights)
    refused(where, "model.norm.weight holds numbers that are not finite")
    model = random_gpt(SMALL)
    model.norm.weight.data[3] = value
    with pytest.raises(UserError, match=r"model.norm.weight .* cannot hold"):
        hf.save_folder(model, where / "new", dtype)
    assert not [*(where / "new").iterdir()]


def test_numbers_that_do_not_fit_into_half_precision_are_not_written(tmp_path):
    model = random_gpt(SMALL)
    model.embed.weight.data[3, 3] = 70_000.0
    with pytest.raises(UserError, match=r"embed_tokens.weight has numbers that torch.float16 cannot hold"):
        hf.save_folder(model, tmp_path, torch.float16)
    hf.save_folder(model, tmp_path, torch.bfloat16)


def test_files_that_are_cut_short_or_something_else_are_refused(folder):
    where = folder()
    file = where / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    for content in (
        whole[:-1],
        whole[:-3000],
        whole[:50],
        whole[:4],
        b"",
        pointer,
        whole + b"\0",
        b"PK\3\4" * 99,
    ):
        file.write_bytes(content)
        refused(where, "model.safetensors cannot be read: .*cut short")
    file.unlink()
    file.mkdir()
    refused(where, "model.safetensors cannot be read")


# ---------------------------------------------------------------------------------------------- reward models


def test_a_reward_model_is_a_classifier_with_one_label_and_its_bias_is_not_dropped_in_silence(
    tensors, tmp_path, capsys
):
    model = random_gpt(SMALL, ScalarGPT)
    model.score.bias.data.fill_(0.25)
    hf.save_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["score_bias"] == 0.25 and "0.25" in capsys.readouterr().out
    held = tensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["score.weight"], model.score.weight) and "lm_head.weight" not in held
    refused(tmp_path, "no place for its tensor 'score.weight'")  # it is no language model
    model.score.bias.data.zero_()
    hf.save_folder(model, tmp_path)
    assert "score_bias" not in (tmp_path / "config.json").read_text() and not capsys.readouterr().out


def test_a_reward_model_with_a_reader_is_refused(tmp_path):
    with pytest.raises(UserError, match="reader"):
        hf.save_folder(ScalarGPT(SMALL, reader=True), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------- whole or not at all


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_crash_while_writing_leaves_the_old_folder_or_none(error, tmp_path, monkeypatch):
    old, new, write, calls = tmp_path / "old", tmp_path / "new", hf.write_tensors, []
    hf.save_folder(random_gpt(SMALL), old, shard_bytes=3000)
    before = contents(old)

    def fails(*arguments):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise error
        write(*arguments)

    monkeypatch.setattr(hf, "write_tensors", fails)
    for folder in (old, new):
        with pytest.raises((KeyboardInterrupt, UserError), match=r"No space left|^$"):
            hf.save_folder(random_gpt(GPT2), folder, shard_bytes=3000)
    assert contents(old) == before and contents(new) == {}


@pytest.mark.parametrize("moved", range(3))
def test_a_crash_while_files_take_their_places_leaves_no_folder_that_looks_whole(
    moved, tmp_path, monkeypatch
):
    hf.save_folder(random_gpt(SMALL), tmp_path, shard_bytes=3000)
    replaced, calls = os.replace, []

    def fails(*arguments):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(replaced(*arguments))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        hf.save_folder(random_gpt(replace(SMALL, rope_theta=5.0)), tmp_path, shard_bytes=3000)
    assert len(calls) == moved and not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_written_anew_keeps_nothing_of_the_old_model_and_all_that_is_not_of_it(folder):
    where = folder(shard_bytes=3000)
    (where / "tokenizer.json").write_text("{}")
    hf.save_folder(random_gpt(GPT2), where, config_extra={"eos_token_id": 7})
    assert contents(where).keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert hf.load_folder(where).config == GPT2
    assert json.loads((where / "config.json").read_text())["eos_token_id"] == 7
    hf.save_folder(random_gpt(SMALL), where, shard_bytes=3000)
    assert hf.INDEX in contents(where) and "model.safetensors" not in contents(where)
    assert hf.load_folder(where).config == SMALL


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        hf.save_folder(GPT(SMALL), tmp_path / "file")


# ----------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from nanoalign import hf_weights as hf

def memory(what):  # in bytes
    return int(open("/proc/self/status").read().split(what + ":")[1].split()[0]) * 1024

def grown(action):  # by how much memory exceeds at its peak what it was before
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = memory("VmRSS")
    result = action()
    return memory("VmHWM") - before, result

import safetensors
torch.empty(1, device="meta").normal_()  # has torch import its compiler, 80 MB, whatever the model's size
load, model = grown(lambda: hf.load_folder(sys.argv[1]))
save, _ = grown(lambda: hf.save_folder(model, sys.argv[1] + "-2", torch.bfloat16))
print(load, save, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory to read here")
def test_loading_takes_the_memory_of_the_weights_once_and_writing_takes_a_tensors(tensors, tmp_path):
    """Weights of 167 MB in fp32, stored in bf16, in one file and in five. A second copy would be 2 times
    that, the weights beside a whole file or all shards 1.5 times; the largest tensor is 0.1 times that."""
    with torch.device("meta"):
        model = GPT(GPTConfig(8000, 512, 8, 512, 8, mlp_width=2048, tied=False))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for shard_bytes in (20_000_000, 10**9):
        folder = tmp_path / str(shard_bytes)
        hf.save_folder(model, folder, torch.bfloat16, shard_bytes=shard_bytes)
        assert (len([*folder.glob("*.safetensors")]) == 5) == (shard_bytes < 10**9)
        command = [sys.executable, "-c", MEASURE, str(folder)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
        load, save, weights = map(int, done.stdout.split())
        assert weights > 160e6
        assert 0.95 < load / weights < 1.2, f"loaded: {load / weights:.2f} times the weights"
        assert 0.0 < save / weights < 0.2, f"saved: {save / weights:.2f} times the weights"


# ------------------------------------------------------------------------------------------------- from a hub


def test_a_folders_name_is_itself(tmp_path):
    assert hf.resolve("some/folder") == Path("some/folder")
    assert hf.resolve(str(tmp_path)) == tmp_path


def test_a_model_of_a_hub_is_downloaded_by_its_library(monkeypatch):
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **how: asked.append((name, how)) or "/cache/it")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert hf.resolve("hf:ORG/NAME") == Path("/cache/it")
    [(name, how)] = asked
    assert name == "ORG/NAME" and "*.safetensors" in how["allow_patterns"]
    assert not [pattern for pattern in how["allow_patterns"] if re.search("py|bin|pt|pkl", pattern)]


def test_without_the_library_or_a_network_it_is_one_sentence(monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("no route to host\nand many lines more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf:ORG/NAME .*pip install -e '\.\[hf\]'"):
        hf.resolve("hf:ORG/NAME")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fails))
    with pytest.raises(UserError, match=r"^hf:ORG/NAME cannot be downloaded: no route to host$"):
        hf.resolve("hf:ORG/NAME")
