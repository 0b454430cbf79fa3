"""One file per checkpoint: atomic save, strict load, nothing in it can execute code. Folders: hf.py.

A finished stage writes `X.pt`. While it runs it writes `X.partial.pt`, which also holds the optimiser and
the random state; `--resume` continues from there bit for bit, and the finished `X.pt` replaces it.
"""

import contextlib
import dataclasses
import errno
import os
import random
from pathlib import Path

import torch

from nanoalign import UserError, parallel
from nanoalign.contents import FORMAT, DamagedError, build, check, check_moments, checksum, damaged, unpack
from nanoalign.expressions import spelled_out
from nanoalign.files import beside, same_file, writing
from nanoalign.hf import is_folder, load_folder, read_folder, saved, tokenizer_of
from nanoalign.lora import adapters, add, matrices, merge, restore
from nanoalign.model import GPT
from nanoalign.scalar import ScalarGPT
from nanoalign.sharding import full, moments_like, part
from nanoalign.steps import read_as_line_breaks
from nanoalign.tokenizer import Tokenizer

FULL = (errno.ENOSPC, "the disk may be full")
NO_CHAT = ("base", "rm", "prm")  # in files that do not say yet whether they hold a chat model


def partial_path(path: str) -> Path:
    return beside(path, ".partial.pt")


def write(path: Path, content: dict) -> None:
    """torch.save, whole or not at all: a crash or a full disk leaves the old file as it was."""
    with writing(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's word for a file that it could not write
            raise (error.__context__ if isinstance(error.__context__, OSError) else OSError(*FULL)) from None


def save(path, model, *, tokenizer: Tokenizer, config, chat: bool = True, **rest) -> None:
    """Write model weights (fp32, uncompiled), shapes, tokenizer name, run config and the rest to `path`; of a
    model with adapters these, and what they belong to.

    chat: is it a policy that answers, not one that continues a text? rest: stage and step, and whatever else
    the stage needs to continue (tensors and plain values).
    """
    own = adapters(model)
    weights = full(own or dict(model.state_dict()))
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    shape, flags = dataclasses.asdict(model.config), dataclasses.asdict(config)
    head = {"format": FORMAT, "chat": chat, "model_config": shape, **saved(tokenizer)}
    head |= {"lora": base_of(model, config.init)} if own else {}
    content = {**head, "model": weights, "config": flags, **full(rest)}
    write(Path(path), {**content, "checksum": checksum(content)})


def load(path, stages: tuple[str, ...] = ()) -> dict:
    """Read a checkpoint onto the CPU, checked, of a folder all but the weights; `stages`: the kinds the
    caller can use (empty: any)."""
    if is_folder(path):
        content = read_folder(path)
    elif not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}; train it first, or check the path.")
    else:
        content = check(path, unpack(path))
    if stages and content["stage"] not in stages:
        expected = " or ".join(map(repr, stages))
        raise UserError(f"{path} is a {content['stage']!r} checkpoint; expected {expected}.")
    content.setdefault("chat", content["stage"] not in NO_CHAT)
    return content


def base_of(model, path: str) -> dict:
    """What a file of adapters says of them, and of the frozen weights that they belong to."""
    layer, shape = next(matrices(model)), dataclasses.asdict(model.config)
    frozen = full({name: own for name, own in model.named_parameters() if not own.requires_grad})
    path = os.path.abspath(path) if os.path.exists(path) else path
    own = {"rank": layer.rank, "alpha": float(layer.alpha), "bf16": layer.weight.dtype == torch.bfloat16}
    return {**own, "base": path, "checksum": checksum({"model_config": shape, "model": frozen})}


def merged(path, content: dict, kind: type, what: str):
    """A plain model: the adapters of a file, in the base that they belong to. Its `bases`: all such files."""
    own, weights = content.pop("lora"), content.pop("model")
    if (kind is GPT) == ("score.weight" in weights):
        raise UserError(f"{path} is a {content['stage']!r} checkpoint, not {what}'s.")
    try:
        model, tokenizer, _ = load_policy(own["base"])
    except (UserError, RecursionError) as error:  # files that are each other's base have no end
        raise UserError(f"{path} holds adapters whose base cannot be read: {str(error)[:300]}") from None
    bases, same = getattr(model, "bases", ()), dataclasses.asdict(model.config) == content["model_config"]
    if content["stage"] == "prm":
        read_as_line_breaks(model, tokenizer)
    if kind is ScalarGPT:
        with contextlib.redirect_stdout(None):  # that its reader is new
            model = ScalarGPT.from_policy(model, "read_in.weight" in weights)
    add(model, max(len(A) for name, A in weights.items() if name.endswith(".A")), own["alpha"], own["bf16"])
    if base_of(model, own["base"]) != own:
        differs = "other weights" if same else "another shape"
        raise UserError(f"{path} holds adapters of another base: {own['base']} has {differs} than that had.")
    try:
        restore(model, weights)
    except RuntimeError:
        raise damaged(path, "its adapters do not fit its model") from None
    model.bases = (*bases, own["base"])
    return merge(model)


def must_not_be_read(out: str, files: tuple[str, ...]) -> None:
    """Complain about an output over what is read, if only as the base of adapters."""
    if any(same_file(out, path) for path in files):
        raise UserError(f"{out} is to be written, but is read, or adapters need it; name another file.")


def merge_file(path: str, out: str) -> None:
    """A checkpoint of adapters → one of plain weights: `python -m nanoalign.lora merge X.pt Y.pt`."""
    content = load(path)
    if "lora" not in content:
        raise UserError(f"{path} holds no adapters: there is nothing to merge.")
    model = merged(path, content, ScalarGPT if "score.weight" in content["model"] else GPT, "a model")
    must_not_be_read(out, (path, *model.bases))
    content["model"] = model.state_dict()
    write(Path(out), {**content, "checksum": checksum(content)})
    print(f"saved {out}")


def _load_model(kind, path, device, content: dict, what: str):
    try:
        tokenizer = tokenizer_of(content)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    if "folder" in content:
        model = load_folder(content["folder"], tokenizer.vocab_size)
    else:
        model = (merged if "lora" in content else build)(path, content, kind, what)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise damaged(path, f"its model has fewer tokens than {content['tokenizer']!r}")
    return model.to(device), tokenizer, content


def load_policy(path, device="cpu", chat: bool = False) -> tuple[GPT, Tokenizer, dict]:
    """A language model with its tokenizer and the rest of its checkpoint (without the weights). Strict.

    chat: it has to be a chat model, whichever stage it comes from.
    """
    content = load(path)
    if chat and not content["chat"]:
        raise UserError(
            f"{path} is a {content['stage']!r} checkpoint and no chat model: "
            "expected what train_sft.py ('sft') or a stage after it has written."
        )
    return _load_model(GPT, path, device, content, "a language model")


def load_scalar(path, device="cpu", stages: tuple[str, ...] = ("rm",)) -> tuple[ScalarGPT, Tokenizer, dict]:
    """A reward model with its tokenizer and the rest of its checkpoint (without the weights). Strict."""
    return _load_model(ScalarGPT, path, device, load(path, stages), "a reward model")


def random_state() -> dict:
    """The state of every random number generator a script may draw from."""
    cuda = {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {}
    return {"torch": torch.get_rng_state(), "python": random.getstate(), **cuda}


def set_random_state(state: dict) -> None:
    """Put `random_state()` back."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.device_count() == len(state.get("cuda", ())) > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


IDLE = ("out", "resume", "device", "plan", "log_every", "eval_every", "save_every")  # no weight needs them
IDLE += ("shard", "offload", "timeout")


def flags_that_count(config) -> dict:
    """The flags that the weights depend on, every path in them in full."""
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in IDLE}
    return {name: spelled_out(value) if isinstance(value, str) else value for name, value in flags.items()}


def save_partial(config, model, optimizer, *, step: int, data: str, **rest) -> None:
    """Save all that continuing after `step` steps needs. `data`: the fingerprint of what it trains on."""
    must_be_finite(model, step)
    state = {"optimizer": optimizer.state_dict(), "random": random_state(), "flags": flags_that_count(config)}
    save(partial_path(config.out), model, config=config, step=step, data=data, **state, **rest)


def must_be_finite(model, step: int) -> None:
    finite = [part(weights).isfinite().all() for weights in model.state_dict().values()]
    if parallel.meet(not torch.stack(finite).all()):  # one wait for a GPU, not one a tensor
        raise UserError(
            f"the model's weights are no longer finite numbers at step {step}; nothing was saved since the "
            "last checkpoint. Lower --lr, lengthen --warmup, or look for broken rows in the data."
        )


def finish(config, model, *, step: int, **rest) -> None:
    """Write the finished stage to `config.out` and remove its partial checkpoint."""
    must_be_finite(model, step)
    save(config.out, model, config=config, step=step, **rest)
    partial_path(config.out).unlink(missing_ok=True)
    print(f"saved {config.out}")


def resume(config, model, optimizer, *, stage: str, data: str) -> dict:
    """With --resume, continue from the partial checkpoint → its content; {"step": 0} where there is none.

    Loads weights, optimiser and random state in place. A partial from other flags or data is an error:
    silently mixing two runs would be worse than stopping.
    """
    path = partial_path(config.out)
    if not config.resume or not path.exists():
        return {"step": 0}
    try:
        content = load(path, (stage,))
        if missing := [name for name in ("data", "optimizer", "random") if name not in content]:
            raise damaged(path, f'it has no field "{missing[0]}"')
    except DamagedError as error:
        raise UserError(f"{error} Delete it to start afresh.") from None
    before, given = content.get("flags", content["config"]), dataclasses.asdict(config)
    changed = [
        f"--{name.replace('_', '-')} was {content['config'].get(name)!r} and is {given[name]!r}"
        for name, value in flags_that_count(config).items()
        if before.get(name) != value and content["config"].get(name) != given[name]
    ]
    if content["data"] != data:
        changed.append("the data or the starting checkpoint changed")
    if changed:
        raise UserError(f"cannot resume {path}: {'; '.join(changed)}. Delete it to start afresh.")
    try:
        restore(model, content.pop("model"))
        moments = check_moments(path, optimizer, content.pop("optimizer"))
        optimizer.load_state_dict(moments_like(optimizer, moments))
        set_random_state(content.pop("random"))
    except (UserError, RuntimeError, TypeError, ValueError, LookupError, OverflowError, AttributeError):
        sentence = f"{path} is damaged: its model, optimiser or random numbers do not fit this run's."
        raise UserError(f"{sentence} Delete it to start afresh.") from None
    print(f"resume: {path} at step {content['step']:,}")
    return content
