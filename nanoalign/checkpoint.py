"""One file per checkpoint: atomic save, strict load, nothing in it can execute code.

A finished stage writes `X.pt`. While it runs it writes `X.partial.pt`, which also holds the optimiser and
the random state; `--resume` continues from there bit for bit, and the finished `X.pt` replaces it.
"""

import dataclasses
import errno
import os
import random
from pathlib import Path

import torch

from nanoalign import UserError
from nanoalign.contents import (
    FORMAT,
    DamagedError,
    build,
    check,
    check_moments,
    checksum,
    damaged,
    unpack,
)
from nanoalign.expressions import spelled_out
from nanoalign.files import beside, writing
from nanoalign.model import GPT
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import Tokenizer, get_tokenizer

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
    """Write model weights (fp32, uncompiled), shapes, tokenizer name, run config and the rest to `path`.

    chat: is it a policy that answers, not one that continues a text? rest: stage and step, and whatever else
    the stage needs to continue (tensors and plain values).
    """
    weights = {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    shape, flags = dataclasses.asdict(model.config), dataclasses.asdict(config)
    head = {"format": FORMAT, "chat": chat, "tokenizer": tokenizer.name, "model_config": shape}
    content = {**head, "model": weights, "config": flags, **rest}
    write(Path(path), {**content, "checksum": checksum(content)})


def load(path, stages: tuple[str, ...] = ()) -> dict:
    """Read a checkpoint onto the CPU, checked; `stages`: the kinds the caller can use (empty: any)."""
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}; train it first, or check the path.")
    content = check(path, unpack(path))
    if stages and content["stage"] not in stages:
        expected = " or ".join(map(repr, stages))
        raise UserError(f"{path} is a {content['stage']!r} checkpoint; expected {expected}.")
    content.setdefault("chat", content["stage"] not in NO_CHAT)
    return content


def _load_model(kind, path, device, content: dict, what: str):
    model = build(path, content, kind, what)
    try:
        tokenizer = get_tokenizer(content["tokenizer"])
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
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
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
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
        model.load_state_dict(content.pop("model"))
        optimizer.load_state_dict(check_moments(path, optimizer, content.pop("optimizer")))
        set_random_state(content.pop("random"))
    except (UserError, RuntimeError, TypeError, ValueError, LookupError, OverflowError, AttributeError):
        sentence = f"{path} is damaged: its model, optimiser or random numbers do not fit this run's."
        raise UserError(f"{sentence} Delete it to start afresh.") from None
    print(f"resume: {path} at step {content['step']:,}")
    return content
