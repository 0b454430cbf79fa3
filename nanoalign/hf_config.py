"""config.json of a Hugging Face folder ↔ GPTConfig: GPT-2, Llama, Mistral, Qwen2 and Qwen3.

The same weights under another setting are another model: whatever GPT has not is refused by its name. Dropout
is none of it, for it is there in training alone; nor are settings of how a model is computed, not of what.
"""

from nanoalign import UserError
from nanoalign.contents import config_of, is_finite, is_whole
from nanoalign.model import GPTConfig

LLAMA = {"kv_heads": 0, "head_dim": 0, "norm_eps": 1e-6, "tied": False}
STYLE = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
FAMILIES = {  # model_type: what it fixes, and what transformers takes for a field that config.json lacks
    "gpt2": {**STYLE, "mlp_width": 0, "norm_eps": 1e-5, "tied": True},
    "llama": LLAMA,
    "mistral": {**LLAMA, "kv_heads": 8},
    "qwen2": {**LLAMA, "kv_heads": 32, "qkv_bias": True},
    "qwen3": {**LLAMA, "kv_heads": 32, "qk_norm": True, "head_dim": 128},
}
FIELDS = {  # of config.json; ours: theirs
    "vocab_size": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
    "width": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}  # fmt: skip
GPT2_FIELDS = {
    "vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer", "width": "n_embd",
    "heads": "n_head", "mlp_width": "n_inner", "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}  # fmt: skip
ONLY = {  # settings that GPT has one way, and the words for it (it has no dropout, which training alone has)
    "hidden_act": ("silu", "swish"), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attention_bias": (False, None), "mlp_bias": (False, None), "use_sliding_window": (False, None),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None), "auto_map": (None,), "quantization_config": (None,),
}  # fmt: skip
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def refused(where, what: str) -> UserError:
    return UserError(f"{where} cannot be read: {what}.")


def read_config(theirs: dict, where: str) -> GPTConfig:
    """What a config.json holds → the shape of the model. where: the file, for the sentence of a refusal."""
    kind = theirs.get("model_type")
    if kind not in [*FAMILIES]:
        raise refused(where, f"its model_type is {str(kind)[:40]!r}, none of {', '.join(FAMILIES)}")
    for name, good in ONLY.items():
        if name in theirs and theirs[name] not in good:
            raise refused(where, f"{name} is {str(theirs[name])[:60]!r}, which GPT cannot be")
    fields = FAMILIES[kind] | (read_rope(theirs, where) if kind != "gpt2" else {})
    for ours, name in (GPT2_FIELDS if kind == "gpt2" else FIELDS).items():
        if name in theirs:
            fields[ours] = 0 if theirs[name] is None else theirs[name]  # 0: to be derived, if it can be
        elif ours not in fields:
            raise refused(where, f"it has no {name}")
    config = config_of(where, {"model_config": fields, "model": range(1000)})  # so many layers at most
    if theirs.get("layer_types") not in (None, ["full_attention"] * config.layers):
        raise refused(where, "its layer_types are not all full_attention (GPT has no sliding windows)")
    window = theirs.get("sliding_window", 4096) if kind == "mistral" else None
    if window is not None and not (is_whole(window) and window >= config.context):
        what = f"its sliding_window of {str(window)[:20]} tokens is shorter than its context"
        raise refused(where, f"{what}; lower max_position_embeddings to it, if that is context enough")
    return config


def read_rope(theirs: dict, where: str) -> dict:
    """rope_theta and rope_scaling of transformers 4, or rope_parameters of 5 → two fields of GPTConfig."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # 5 looks in this order, too
    rope = {name: theirs[name] for name in ("rope_theta", "partial_rotary_factor") if name in theirs}
    rope |= given if isinstance(given, dict) else {"rope_type": given}
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), ()
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE}
    good = rope.keys() <= known and rope.get("partial_rotary_factor", 1) in (1, None)
    if kind == "llama3":
        scaling = tuple(map(rope.get, ROPE))
        good = good and all(map(is_finite, scaling)) and 0 < scaling[1] < scaling[2]
    if not good or kind not in ("default", "llama3"):
        raise refused(where, f"its positions, {str(rope)[:200]}, are neither the default's nor llama3's")
    return {"rope_theta": rope.get("rope_theta", 10_000.0), "rope_scaling": scaling}


def write_config(config: GPTConfig, dtype: str, scalar: bool = False) -> dict:
    """The inverse, in words that transformers 4 and 5 read. dtype: such as "float32". scalar: as a classifier
    with one label. The ids of special tokens are null, where transformers would guess some."""
    kind = "gpt2" if config.bias else "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    name, names = ("GPT2", GPT2_FIELDS) if kind == "gpt2" else (kind.capitalize(), FIELDS)
    name += "ForSequenceClassification" if scalar else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    theirs = {"architectures": [name], "model_type": kind, "torch_dtype": dtype}
    theirs |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    theirs |= {name: getattr(config, ours) for ours, name in names.items()}
    theirs |= {"rope_theta": config.rope_theta, "hidden_act": "silu"} if kind != "gpt2" else {}
    theirs |= {"id2label": {"0": "score"}, "label2id": {"score": 0}} if scalar else {}
    if config.rope_scaling:
        *factors, old_context = config.rope_scaling
        theirs["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE, (*factors, int(old_context))))}
    if read_config(theirs, "what is to be written") != config:
        raise UserError(f"transformers has no class for a model of this shape: {config}.")
    return theirs
