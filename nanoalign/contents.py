"""What a checkpoint must hold, looked at before any of it is used.

A file that is foreign, newer, damaged, not to be read or not finite gets a sentence of its own. Nothing in a
file is run, and nothing is unpacked that is larger than the file.
"""

import dataclasses
import hashlib
import math
import os
import pickle
import zipfile

import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.files import reason
from nanoalign.model import GPT, GPTConfig

FORMAT = "nanoalign-1"
LARGEST = 2**22  # of any number of a model's shape: more is a mistake


class DamagedError(UserError):
    """A file that is not as we leave one."""


def damaged(path, what: str) -> DamagedError:
    return DamagedError(f"{path} is damaged: {what}.")


def foreign(path, what: str = "") -> DamagedError:
    return DamagedError(f"{path} is not a nanoalign checkpoint{what}.")


def is_finite(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def is_whole(x) -> bool:
    return type(x) is int and 0 <= x < 2**53


def is_tensor(x) -> bool:
    """A plain tensor on the CPU, no larger than what the file holds of it."""
    return isinstance(x, Tensor) and x.layout is torch.strided and x.is_cpu and x.is_contiguous()


def are_weights(x) -> bool:
    names = isinstance(x, dict) and all(isinstance(name, str) for name in x)
    return names and all(is_tensor(w) and w.dtype == torch.float32 for w in x.values())


def are_rows(x) -> bool:
    """What was logged: numbers by name."""
    rows = isinstance(x, list) and all(isinstance(row, dict) for row in x)
    return rows and all(isinstance(k, str) and type(v) in (int, float) for row in x for k, v in row.items())


def are_flags(x) -> bool:
    return isinstance(x, dict) and all(isinstance(name, str) for name in x)


def are_examples(x) -> bool:
    """Pairs of (ids, mask), nested as you like."""
    return is_tensor(x) or (isinstance(x, (list, tuple)) and all(map(are_examples, x)))


def is_scale(x) -> bool:
    numbers = isinstance(x, dict) and {*x} == {"mean", "std"} and all(map(is_finite, x.values()))
    return numbers and x["std"] > 0


def is_base(x) -> bool:
    """What adapters say of themselves and of the frozen weights that they belong to."""
    kinds = {"base": str, "checksum": str, "rank": int, "alpha": float, "bf16": bool}
    known = isinstance(x, dict) and {name: type(value) for name, value in x.items()} == kinds
    return known and x["rank"] > 0 and is_finite(x["alpha"])


TEXTS = ("stage", "tokenizer", "vocabulary", "chat_format", "system", "checksum", "kind", "data")
FIELDS = {  # what a field has to be
    **dict.fromkeys(TEXTS, lambda x: isinstance(x, str)),
    **dict.fromkeys(("model_config", "config", "flags"), are_flags),
    **dict.fromkeys(("model", "critic"), are_weights),
    "step": is_whole,
    "chat": lambda x: isinstance(x, bool),
    "lora": is_base,
    "normalisation": is_scale,
    "history": are_rows,
    "beta": lambda x: is_finite(x) and x >= 0,
    "fresh": are_examples,
    "optimizer": lambda x: isinstance(x, dict) and {*x} == {"state", "param_groups"},
    "random": lambda x: isinstance(x, dict) and {*x} >= {"torch", "python"},
}
ALWAYS = ("stage", "tokenizer", "model_config", "model", "config", "step")


def unpack(path):
    """What torch.save wrote to a file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file, but a device or a pipe.")
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        if begin != b"PK\x03\x04":
            raise foreign(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise foreign(path, ": it is compressed")
            if sum(member.file_size for member in members) > os.path.getsize(path):
                raise damaged(path, "it says that it holds more than there is")
            if archive.testzip() is not None:  # the checksum of every part
                raise damaged(path, "some of its bytes have changed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise foreign(path, ", or is damaged: it holds no plain data") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from None
    except Exception as error:  # a damaged file can fail in any way
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"there is too little memory to read {path}.") from None
        raise damaged(path, "it was cut short, or is not a nanoalign checkpoint") from None


def check(path, content) -> dict:
    """What a file holds, if it is a checkpoint in which every field is what it should be."""
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        raise foreign(path)
    if content["format"] != FORMAT:
        other, own = f"the format {content['format'][:40]!r}", f"this version of nanoalign reads {FORMAT!r}"
        raise UserError(f"{path} has {other}; {own}: use the one that wrote it.")
    for name in ALWAYS:
        if name not in content:
            raise damaged(path, f'it has no field "{name}"')
    for name, fits in FIELDS.items():
        if name in content and not fits(content[name]):
            raise damaged(path, f'its field "{name}" is not what it should be')
    if not all(weights.isfinite().all() for weights in content["model"].values()):
        raise UserError(f"{path} holds weights that are not a finite number: its training had gone wrong.")
    config_of(path, content)
    of = [A for name, A in content["model"].items() if name.endswith(".A")]
    if "lora" in content and {A.dim() * bool(A.numel()) for A in of} != {2}:
        raise damaged(path, "its adapters are none")
    if content.get("checksum", due := checksum(content)) != due:
        raise damaged(path, "its weights are not those that were saved")
    return content


def config_of(path, content: dict) -> GPTConfig:
    """The shape of the model in a file, if it can be one."""
    given, expected = content["model_config"], dataclasses.asdict(GPTConfig())
    if unknown := given.keys() - expected.keys():
        names = ", ".join(sorted(unknown))[:80]
        raise UserError(f"{path} is of a newer version of nanoalign: this one knows no {names} of a model.")
    for name, value in given.items():
        default = expected[name]
        if isinstance(default, tuple):
            good = isinstance(value, (tuple, list)) and all(is_finite(x) and x > 0 for x in value)
        elif isinstance(default, float):
            good = is_finite(value) and value > 0
        else:
            good = type(value) is type(default) and (type(value) is not int or 0 <= value <= LARGEST)
        if not good:
            raise damaged(path, f"the {name} of its model cannot be {str(value)[:40]!r}")
    if 0 in [given.get(name) for name in ("vocab_size", "context", "width", "heads")]:
        raise damaged(path, "its model has no tokens, no context, no width or no heads")
    if given.get("layers", 1) > len(content["model"]):
        raise damaged(path, "it has fewer weights than layers")
    try:
        return GPTConfig(**given)
    except (UserError, ArithmeticError) as error:
        raise damaged(path, f"its model cannot be built ({str(error).rstrip('.')})") from None


def checksum(content: dict) -> str:
    """Of the model's shape and weights."""
    digest = hashlib.sha256(repr(sorted(content["model_config"].items())).encode())
    for name, weights in sorted(content["model"].items()):
        digest.update(f"{name} {tuple(weights.shape)}".encode())
        whole = weights.detach().cpu().float().contiguous()  # of what is kept in bf16 as well
        digest.update(whole.view(torch.uint8).numpy() if weights.numel() else b"")
    return digest.hexdigest()


def build(path, content: dict, kind: type, what: str):
    """A model of this kind with the weights of a file, which have to be its own. Before it is allocated, the
    weights that every trunk has, and that bound all others, have to be of its size."""
    config, weights = config_of(path, content), content["model"]
    D, L, shape = config.width, range(config.layers), {}
    shape["embed.weight"] = config.vocab_size, D
    shape |= {f"blocks.{i}.attention.out.weight": (D, config.heads * config.head_dim) for i in L}
    shape |= {f"blocks.{i}.mlp.down.weight": (D, config.mlp_width) for i in L}
    shape |= {"position.weight": (config.context, D)} if config.positions == "learned" else {}
    trunk = "gpt." if "gpt.embed.weight" in weights else ""
    shape = {trunk + name: size for name, size in shape.items()}
    if any(name in weights and weights[name].shape != size for name, size in shape.items()):
        raise damaged(path, "its weights do not have the shapes that its model_config says")
    more = (True,) if kind is not GPT and "reader.embed.weight" in weights else ()
    model = kind(config, *more) if shape.keys() <= weights.keys() else None
    if model is None or model.state_dict().keys() != weights.keys():
        raise UserError(f"{path} is a {content['stage']!r} checkpoint, not {what}'s.")
    try:
        model.load_state_dict(content.pop("model"))
    except RuntimeError:
        raise damaged(path, "its weights do not have the shapes that its model_config says") from None
    return model


def check_moments(path, optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """The saved state of an optimiser of the same parameters; its other numbers are those of the flags."""
    own = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        good = sizes == [len(group["params"]) for group in own]
        for i, moments in saved["state"].items():
            shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
            good = good and type(i) is int and i >= 0 and moments.keys() == shapes.keys()
            for name, shape in shapes.items() if good else ():
                x = moments[name]
                good = good and is_tensor(x) and x.shape == shape and x.dtype == torch.float32
                good = good and bool(x.isfinite().all())
    except (TypeError, LookupError, AttributeError):
        good = False
    if not good:
        raise damaged(path, "the state of its optimiser does not fit the model")
    return {"state": saved["state"], "param_groups": own}
