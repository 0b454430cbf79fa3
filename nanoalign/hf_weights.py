"""Hugging Face folders ↔ GPT: GPT-2, Llama (SmolLM2, Mistral), Qwen2, Qwen3; their weights and config.json.

    model = load_folder(resolve("hf:ORG/NAME"))    # or any folder that transformers' save_pretrained wrote
    save_folder(model, "out/folder", torch.bfloat16)

`places` says which part of which of our tensors each of theirs is: reading copies one way, writing the other.
Nothing in a folder is run, and whatever makes another function of the same weights is refused by its name.
"""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.files import reason, regular, writing
from nanoalign.hf_config import read_config, refused, write_config
from nanoalign.model import GPT, rope_angles
from nanoalign.scalar import ScalarGPT

NAMES = {  # of tensors; ours: theirs, which in ours stand one below the other, and GPT-2's
    "embed": ("embed_tokens", "wte"), "position": ("", "wpe"), "norm": ("norm", "ln_f"),
    "attention_norm": ("input_layernorm", "ln_1"), "mlp_norm": ("post_attention_layernorm", "ln_2"),
    "attention.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn"),
    "attention.q_norm": ("self_attn.q_norm", ""), "attention.k_norm": ("self_attn.k_norm", ""),
    "attention.out": ("self_attn.o_proj", "attn.c_proj"), "mlp.down": ("mlp.down_proj", "mlp.c_proj"),
    "mlp.up": ("mlp.gate_proj mlp.up_proj", "mlp.c_fc"), "head": ("lm_head", "lm_head"),
}  # fmt: skip
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old files: no weights
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = "model.safetensors.index.json"
WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # of a hub: no code, no pickles,
UNWANTED = ["*/*", "consolidated*"]  # and no weights twice
INSTALL = "takes a package more: pip install -e '.[hf]'"


def places(model: GPT | ScalarGPT) -> dict[str, Tensor]:
    """Their name of each tensor → where it is in ours: a view of the same memory, in their shape."""
    gpt = model if isinstance(model, GPT) else model.gpt
    config, gpt2 = gpt.config, gpt.config.bias
    found = {"score.weight": model.score.weight.detach()} if gpt is not model else {}
    qkv = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    for name, weights in gpt.state_dict().items():
        place, kind = name.rsplit(".", 1)
        prefix = "" if place == "head" else "transformer." if gpt2 else "model."
        if place.startswith("blocks."):
            _, layer, place = place.split(".", 2)
            prefix += f"h.{layer}." if gpt2 else f"layers.{layer}."
            weights = weights.t() if gpt2 else weights  # Conv1D stores (in, out)
        parts = NAMES[place][gpt2].split() if prefix or not config.tied else []
        pieces = weights.split(qkv) if len(parts) == 3 else weights.chunk(max(1, len(parts)))
        found |= {f"{prefix}{part}.{kind}": piece for part, piece in zip(parts, pieces)}
    return found


def read_json(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        return {**json.loads(text, parse_int=lambda x: int(x) if len(x) < 20 else float(x))}
    except OSError as error:
        raise refused(path, reason(error)) from None
    except (ValueError, TypeError, RecursionError):
        raise refused(path, "it is no JSON object") from None


@contextmanager
def opened(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"to read {file} {INSTALL}") from None
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise refused(file, f"it is missing, cut short or no safetensors ({str(error)[:100]})") from None


def weight_files(folder: Path) -> list[Path]:
    """As in transformers, model.safetensors goes before an index; without either, all there are."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        return sorted(folder.glob("*.safetensors"))
    listed = read_json(folder / INDEX).get("weight_map")
    names = sorted({*map(str, listed.values())}) if isinstance(listed, dict) else []
    for name in names or ["shards"]:
        if Path(name).name != name or not (folder / name).is_file():
            raise refused(folder, f"its {INDEX} names {name[:80]}, of which there are none in it")
    return [folder / name for name in names]


def stored(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """The name of each tensor in a folder → its file and shape."""
    held = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                if name.endswith(CONSTANTS):
                    continue
                if name in held:
                    raise refused(folder, f"{name[:80]} is in {held[name][0].name} and in {file.name}")
                if part.get_dtype() not in DTYPES.values():
                    raise refused(file, f"{name[:80]} is of dtype {part.get_dtype()}, no plain float of ours")
                held[name] = file, part.get_shape()
    if not held:
        raise refused(folder, "it has no *.safetensors (.bin files, pickles that can run code, are not read)")
    return held


def fetch(name: str, file: Path) -> Tensor:
    """A tensor of a file, which is opened anew: the pages that were read stay until it is closed."""
    with opened(file) as tensors:
        weights = tensors.get_tensor(name)
    if not all(map(torch.isfinite, weights.aminmax())):
        raise refused(file, f"{name} holds numbers that are not finite")
    return weights


def load_folder(folder) -> GPT:
    """The language model in a folder, fp32, on the CPU. Strict: every tensor is there, of its shape, finite;
    none is left over. It takes the memory of its weights once, and not before all this is known."""
    folder = Path(folder)
    config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    held = stored(folder)
    with torch.device("meta"):  # of no memory yet
        model = GPT(config)
    base = "transformer." if config.bias else "model."
    bare = "" if any(name.startswith(base) for name in held) else base  # GPT-2's folder on the hub
    shapes = {name.removeprefix(bare): [*place.shape] for name, place in places(model).items()}
    twin = held.pop("lm_head.weight", None) if config.tied else None
    for name, shape in shapes.items():
        if name not in held:
            raise refused(folder, f"the tensor {name} is missing")
        if held[name][1] != shape:
            raise refused(held[name][0], f"the tensor {name} is of shape {held[name][1]}, not {shape}")
    if left := held.keys() - shapes.keys():
        raise refused(folder, f"there is no place for its tensor {min(left)[:80]!r}")
    model.to_empty(device="cpu")
    if config.tied:
        model.head.weight = model.embed.weight
    if config.positions == "rope":
        angles = rope_angles(config)
        model.cos, model.sin = angles.cos().float(), angles.sin().float()
    for name, place in zip(shapes, places(model).values()):
        place.copy_(fetch(name, held[name][0]))
    if twin and not torch.equal(fetch("lm_head.weight", twin[0]).to(place), model.embed.weight):
        raise refused(folder, "its tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return model


def write_tensors(file, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """As safetensors: the length of a header, the header, the numbers; of one tensor after the other, so that
    there is no second copy of the model."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, place in tensors.items():
        begin, end = end, end + place.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": [*place.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, place in tensors.items():
        weights = place.to("cpu", dtype).contiguous()
        if not all(map(torch.isfinite, weights.aminmax())):
            raise UserError(f"the model cannot be written: {name} has numbers that {dtype} cannot hold.")
        file.write(weights.view(torch.uint8).numpy())


def save_folder(
    model: GPT | ScalarGPT, folder, dtype=torch.float32, config_extra: dict | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Write what transformers, vLLM and llama.cpp's converter read. config_extra: more for config.json, such
    as the ids of special tokens. What was there stays until all is written, and config.json gets to its place
    last: without it nothing half-done looks whole."""
    scalar, folder, shards, room = isinstance(model, ScalarGPT), Path(folder), [], 0
    if scalar and model.reader is not None:
        raise UserError("transformers has no class for a reward model with a reader: train one --no-reader.")
    config = write_config((model.gpt if scalar else model).config, str(dtype).removeprefix("torch."), scalar)
    if scalar and (bias := model.score.bias.item()):
        print(f"note: transformers' head has no bias; its scores are ours less score_bias, {bias:.6g}")
        config["score_bias"] = bias
    tensors = places(model)
    for name, place in tensors.items():
        if (size := place.numel() * dtype.itemsize) > room:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][name], room = place, room - size
    count, texts = len(shards), {"config.json": config | (config_extra or {})}
    files = {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}
    if count == 1:
        files = {"model.safetensors": tensors}
    else:
        names = {name: file for file, part in files.items() for name in part}
        texts[INDEX] = {"metadata": {}, "weight_map": names}
    with ExitStack() as whole:  # what is opened first gets to its place last
        new = {name: whole.enter_context(writing(folder / name, "wb")) for name in (*texts, *files)}
        for name, text in texts.items():
            new[name].write(json.dumps(text, indent=2).encode())
        for name, part in files.items():
            write_tensors(new[name], part, dtype)
        for file in new.values():
            file.flush()
        for old in [*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")]:
            old.unlink() if old.name not in new else None
        regular(folder / "config.json").unlink(missing_ok=True)


def resolve(name: str) -> Path:
    """A folder, or hf:ORG/NAME, of which what is needed is downloaded → the folder."""
    if not name.startswith("hf:"):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name[3:], allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except ImportError:
        raise UserError(f"to download {name} {INSTALL}") from None
    except Exception as error:  # of the network, of the hub, of its libraries
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} cannot be downloaded: {what[:200]}") from None
