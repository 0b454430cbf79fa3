"""Published models in and out: a Hugging Face folder stands wherever a checkpoint does.

    python train_dpo.py --init SmolLM2-135M-Instruct …                # a folder
    python train_dpo.py --init hf:Qwen/Qwen2.5-0.5B-Instruct …        # downloaded (pip install -e '.[hf]')
    python -m nanoalign.hf import FOLDER model.pt --chat-format llama3    # in another format
    python -m nanoalign.hf export out/dpo.pt FOLDER --dtype bf16          # for transformers, vLLM, llama.cpp

Read are GPT-2, Llama 2 and 3, Mistral without a sliding window, Qwen2 and Qwen3 (hf_weights.py),
tokenizer.json of byte-level BPE (vocabulary.py), and the chat formats of chat_formats.py. A checkpoint made
from a folder holds all of it: the folder may go.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch

from nanoalign import UserError, cli, hf_weights
from nanoalign.chat_formats import FORMATS, recognise, template
from nanoalign.files import write_json, write_text
from nanoalign.hf_config import read_config
from nanoalign.hf_weights import read_json, resolve, save_folder
from nanoalign.model import GPT
from nanoalign.tokenizer import OWN, Tokenizer, get_tokenizer
from nanoalign.vocabulary import read_vocabulary, write_vocabulary


def is_folder(path) -> bool:
    return str(path).startswith("hf:") or Path(path).is_dir()


# ----------------------------------------------------------------------------------------- the tokenizer


def saved(tokenizer: Tokenizer) -> dict:
    """What a checkpoint keeps of a tokenizer: its name, and of a folder's the whole vocabulary."""
    found = {"tokenizer": tokenizer.name}
    if tokenizer.name.startswith("json-"):
        found |= {"vocabulary": json.dumps(write_vocabulary(tokenizer.vocabulary), ensure_ascii=False)}
        found |= {"chat_format": tokenizer.chat_format, "system": tokenizer.system}
    return found


def tokenizer_of(content: dict) -> Tokenizer:
    """The inverse: that of a checkpoint."""
    if "vocabulary" not in content:
        return get_tokenizer(content["tokenizer"])
    form = content.get("chat_format", OWN), content.get("system", "")
    return make_tokenizer(content["vocabulary"], *form, "its vocabulary")


@functools.cache
def make_tokenizer(vocabulary: str, chat_format: str, system: str, where: str) -> Tokenizer:
    """A tokenizer.json (text), a chat format, a system prompt → the tokenizer. where: what an error names."""
    if chat_format not in FORMATS:
        raise UserError(f"there is no chat format {chat_format[:40]!r}; choose from {', '.join(FORMATS)}.")
    try:
        spec = json.loads(vocabulary)
    except (ValueError, RecursionError):
        raise UserError(f"{where} holds no tokenizer.json that is JSON.") from None
    return Tokenizer(read_vocabulary(spec, where), chat_format, system)


def read_tokenizer(folder: Path, chat_format: str = "") -> tuple[Tokenizer, bool]:
    """A folder's vocabulary with the chat format of its template, or the one that is named; and whether
    there is one, so that the model is one to chat with."""
    settings = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    )
    chat = settings.get("chat_template") or ""
    if (folder / "chat_template.jinja").exists():
        chat = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if isinstance(chat, list):  # several by name
        named = {one.get("name"): one.get("template") for one in chat if isinstance(one, dict)}
        chat = named.get("default") or ""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: only byte-level BPE in that file is read.")
    spec = (folder / "tokenizer.json").read_text(encoding="utf-8", errors="replace")
    form, system = (chat_format or OWN, "")
    if chat and not chat_format:
        form, system = recognise(str(chat), str(folder))
    return make_tokenizer(spec, form, system, str(folder)), bool(chat) or form != OWN


def read_folder(path, chat_format: str = "") -> dict:
    """A folder → what checkpoint.load gives of a checkpoint, without the weights."""
    folder = resolve(str(path))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is a folder without config.json: no checkpoint, and no published model.")
    config = read_config(read_json(folder / "config.json"), str(folder))
    tokenizer, chat = read_tokenizer(folder, chat_format)
    return {
        "stage": "sft" if chat else "base", "chat": chat, "config": {}, "step": 0, "folder": str(folder),
        "model_config": dataclasses.asdict(config), **saved(tokenizer),
    }  # fmt: skip


@torch.no_grad()
def load_folder(folder: str, vocab_size: int) -> GPT:
    """The model of a folder, fp32, on the CPU, with at least so many tokens. A new one's row is the mean of
    all, plus a tenth of their spread at random, the same at each load: no two alike."""
    model = hf_weights.load_folder(folder)
    if (new := vocab_size - model.config.vocab_size) <= 0:
        return model
    print(f"{folder}: {new} new tokens for the chat format; they are learnt in training")
    generator = torch.Generator().manual_seed(0)
    for module in (model.embed, model.head)[: 1 if model.config.tied else 2]:
        old = module.weight
        noise = torch.randn(new, old.shape[1], generator=generator) * old.std(0) / 10
        module.weight = torch.nn.Parameter(torch.cat((old, old.mean(0) + noise)))
    if model.config.tied:
        model.head.weight = model.embed.weight
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    model.embed.num_embeddings = model.head.out_features = vocab_size
    return model


def export(path: str, folder: str, dtype: torch.dtype) -> None:
    """A checkpoint → a folder that transformers, vLLM and llama.cpp's converter read."""
    from nanoalign.checkpoint import load, load_policy, load_scalar

    stage = load(path)["stage"]
    if stage == "prm":
        raise UserError(f"{path} is a process reward model, which transformers has no class for.")
    model, tokenizer, content = load_scalar(path) if stage == "rm" else load_policy(path)
    name = {i: token for token, i in tokenizer.encoding._special_tokens.items()}
    ids = {"bos_token_id": (tokenizer.start or [None])[0]}
    ids |= {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"eos_token": name[tokenizer.end], "pad_token": name[tokenizer.pad]}
    if content["chat"] or stage == "rm":
        settings["chat_template"] = template(tokenizer.format, tokenizer.system)
    save_folder(model, folder, dtype, ids)
    whole = write_vocabulary(tokenizer.vocabulary._replace(encoding=tokenizer.encoding))
    write_text(Path(folder, "tokenizer.json"), json.dumps(whole, ensure_ascii=False))
    write_json(Path(folder, "tokenizer_config.json"), settings)
    if stage != "rm":
        write_json(Path(folder, "generation_config.json"), ids)
    print(f"wrote {folder}: {stage!r}, {str(dtype).removeprefix('torch.')}")


@dataclasses.dataclass
class Imported:
    folder: str
    chat_format: str = ""  # in place of its template's


def import_folder(path: str, out: str, chat_format: str = "") -> None:
    """A folder → a checkpoint."""
    from nanoalign.checkpoint import save

    content = read_folder(path, chat_format)
    tokenizer = tokenizer_of(content)
    model = load_folder(content["folder"], tokenizer.vocab_size)
    kind = {name: content[name] for name in ("stage", "chat", "step")}
    save(out, model, tokenizer=tokenizer, config=Imported(path, chat_format), **kind)
    print(f"wrote {out}: {kind['stage']!r}, chat format {tokenizer.chat_format}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nanoalign.hf", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a checkpoint → a folder")
    out.add_argument("checkpoint")
    out.add_argument("folder")
    out.add_argument("--dtype", choices=DTYPES, default="fp32")
    into = commands.add_parser("import", help="a folder → a checkpoint")
    into.add_argument("folder")
    into.add_argument("checkpoint")
    into.add_argument(
        "--chat-format", default="", help=f"{', '.join(FORMATS)}; by default that of its template"
    )
    flags = parser.parse_args()
    with cli.sentences():
        if flags.command == "export":
            export(flags.checkpoint, flags.folder, DTYPES[flags.dtype])
        else:
            import_folder(flags.folder, flags.checkpoint, flags.chat_format)


if __name__ == "__main__":
    sys.exit(main())
