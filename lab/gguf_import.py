"""A GGUF file of llama.cpp (a Llama-family model, byte-level BPE) → a checkpoint, its tokenizer included.

    python -m lab.gguf_import SmolLM2-135M-Instruct.Q4_1.gguf out/real/smollm2.pt

Quantised weights are written out in fp32, as they round; the file is only read. Needs `pip install gguf`.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.chat_formats import recognise
from nanoalign.checkpoint import save
from nanoalign.model import GPT, GPTConfig
from nanoalign.tokenizer import OWN, Tokenizer
from nanoalign.vocabulary import read_vocabulary

FIELDS = {  # ours: theirs, behind "llama."
    "context": "context_length", "layers": "block_count", "width": "embedding_length",
    "heads": "attention.head_count", "kv_heads": "attention.head_count_kv",
    "mlp_width": "feed_forward_length", "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}  # fmt: skip
PARTS = {  # of a block: ours → theirs, one below the other
    "attention_norm": ["attn_norm"], "attention.qkv": ["attn_q", "attn_k", "attn_v"],
    "attention.out": ["attn_output"], "mlp_norm": ["ffn_norm"], "mlp.up": ["ffn_gate", "ffn_up"],
    "mlp.down": ["ffn_down"],
}  # fmt: skip
SPLITS = {  # how llama.cpp names what stands in tokenizer.json as a list of pre-tokenizers
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False},
    ],
}
CONTROL = 3  # the type of a special token


@dataclass(kw_only=True)
class Config:
    gguf: str = ""  # the file
    out: str = ""  # the checkpoint to write


def read(path: str) -> tuple[dict, dict[str, Tensor]]:
    """A file's fields and its tensors, fp32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError("GGUF files need a package: .venv/bin/pip install gguf") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        arrays = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} cannot be read as GGUF ({type(error).__name__}: {error}).") from None
    return fields, {name: torch.from_numpy(np.array(x, dtype=np.float32)) for name, x in arrays.items()}


def halves_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k: llama.cpp rotates neighbours, (x₀, x₁), and stores them so; GPT (x₀, x_{d/2})."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_config(fields: dict, tensors: dict) -> GPTConfig:
    if (kind := fields.get("general.architecture")) != "llama":
        raise UserError(f"a GGUF file of architecture {str(kind)[:40]!r} is not read; only 'llama' is.")
    if odd := [name for name in fields if re.match(r"llama\.(rope\.scaling|expert_count)", name)]:
        raise UserError(f"a GGUF file with {odd[0]} is not read.")
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in tensors:
            raise UserError(f"the GGUF file has no tensor {name!r}.")
    if missing := [name for name in FIELDS.values() if f"llama.{name}" not in fields]:
        raise UserError(f"the GGUF file has no field llama.{missing[0]}.")
    shape = {ours: fields[f"llama.{theirs}"] for ours, theirs in FIELDS.items()}
    shape["norm_eps"] = float(f"{shape['norm_eps']:.6g}")  # 1e-5 in fp32
    return GPTConfig(
        vocab_size=len(tensors["token_embd.weight"]), **shape, tied="output.weight" not in tensors
    )


def read_model(fields: dict, tensors: dict[str, Tensor]) -> GPT:
    config, theirs = read_config(fields, tensors), dict(tensors)
    ours = {"embed.weight": theirs.pop("token_embd.weight"), "norm.weight": theirs.pop("output_norm.weight")}
    ours["head.weight"] = theirs.pop("output.weight", ours["embed.weight"])
    try:
        for layer, (name, parts) in itertools.product(range(config.layers), PARTS.items()):
            found = [theirs.pop(f"blk.{layer}.{part}.weight") for part in parts]
            if len(found) == 3:
                found[0] = halves_together(found[0], config.heads)
                found[1] = halves_together(found[1], config.kv_heads)
            ours[f"blocks.{layer}.{name}.weight"] = torch.cat(found)
    except KeyError as error:
        raise UserError(f"the GGUF file has no tensor {error}.") from None
    if theirs:
        raise UserError(f"the GGUF file has a tensor {next(iter(theirs))}, for which GPT has no place.")
    model = GPT(config)
    model.load_state_dict(ours)
    return model


def read_tokenizer(fields: dict) -> Tokenizer:
    get = {name.removeprefix("tokenizer."): value for name, value in fields.items()}
    tokens, split = get["ggml.tokens"], SPLITS.get(get.get("ggml.pre"))
    if get.get("ggml.model") != "gpt2" or split is None:
        raise UserError(f"a GGUF tokenizer {get.get('ggml.model')!r}, {get.get('ggml.pre')!r} is not read.")
    special = [(i, token) for i, token in enumerate(tokens) if get["ggml.token_type"][i] == CONTROL]
    spec = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "added_tokens": [{"id": i, "content": token, "special": True} for i, token in special],
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": get["ggml.merges"],
        },
    }
    vocabulary = read_vocabulary(spec, "the GGUF file")
    template = get.get("chat_template")
    return Tokenizer(vocabulary, *(recognise(template, "the GGUF file") if template else (OWN,)))


def main(config: Config) -> None:
    fields, tensors = read(config.gguf)
    model, tokenizer = read_model(fields, tensors), read_tokenizer(fields)
    more = {"stage": "sft" if tokenizer.chat_format != OWN else "base", "step": 0}
    save(config.out, model, tokenizer=tokenizer, config=config, chat=tokenizer.chat_format != OWN, **more)
    print(f"wrote {config.out}: {model.config}, chat format {tokenizer.chat_format}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
