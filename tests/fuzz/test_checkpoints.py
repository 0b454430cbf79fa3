"""Edited checkpoints and partial ones: read, or refused in one sentence; nothing in them is run."""

import copy
import os
import zipfile
from functools import partial

import pytest
import torch

from nanoalign import UserError
from nanoalign.checkpoint import load, load_policy, load_scalar, partial_path, resume, save, save_partial
from nanoalign.lora import add
from nanoalign.model import GPT, preset
from nanoalign.run import Flags
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import make_optimizer

WORLD = get_tokenizer("world")
SHAPE = preset("world-nano", vocab_size=WORLD.vocab_size, context=8, width=8, layers=2)
ODD = [None, True, -1, 0, 3, 10**30, 2**63, 1.5, float("nan"), float("inf"), "", "x" * 300, "\x1b[2J\n", b"y"]
ODD += [
    [],
    [1, [2]],
    {},
    {"a": {"b": 1}},
    (),
    {1, 2},
    torch.zeros(3),
    torch.zeros(0),
    torch.zeros((), dtype=int),
]


class Bomb:
    """What unpickling would run, if it ran anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Crater:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.path!r})",)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The contents of a policy, of a reward model, and of a run of each that was stopped; and of adapters the
    same."""
    folder, found = tmp_path_factory.mktemp("kept"), []
    out, config = str(folder / "x.pt"), Flags()
    config.out, config.init = out, str(folder / "base.pt")
    save(config.init, GPT(SHAPE), tokenizer=WORLD, config=config, stage="sft", step=1)
    for kind, stage, lora in ((GPT, "sft", 0), (ScalarGPT, "rm", 0), (GPT, "sft", 2), (ScalarGPT, "rm", 2)):
        make = partial(start, kind, lora, config.init)
        model = make()
        optimizer = make_optimizer(model, 0.1)
        model(torch.zeros(2, 4, dtype=torch.long)).square().mean().backward()
        optimizer.step()
        shared = {"stage": stage, "tokenizer": WORLD, "chat": stage == "sft"}
        scale = {"normalisation": {"mean": 0.5, "std": 2.0}, "history": [{"step": 1, "kl": 0.5}]}
        save(out, model, config=config, step=3, **shared, **scale)
        found.append((stage, load(out), make))
        rest = {"beta": 0.2, "critic": model.state_dict(), "history": [{"step": 1, "kl": 0.5}]}
        config.save_every, config.resume = 1, True
        save_partial(config, model, optimizer, step=2, data="abc", **shared, **rest)
        found.append((stage, load(partial_path(out)), make))
    return found


def start(kind, lora: int, base: str):
    """A model to train, or with adapters to, from a policy."""
    torch.manual_seed(0)
    model = kind(SHAPE)
    if not lora:
        return model
    model = load_policy(base)[0] if kind is GPT else ScalarGPT.from_policy(load_policy(base)[0])
    return add(model, lora, 4.0)


def places(value, path=()):
    """Every key and index inside a nested content, as paths."""
    yield path
    if isinstance(value, (dict, list, tuple)) and len(value) < 700:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def edited(rng, content, crater):
    """A copy with one to three edits."""
    for _ in range(rng.randint(1, 3)):
        every = [place for place in places(content) if place]
        *above, key = rng.choice(every)
        inside = content
        for step in above:
            inside = inside[step]
        if isinstance(inside, tuple):
            continue
        value, what = inside[key], rng.randrange(8)
        if what == 0:
            del inside[key]
        elif what == 1 and isinstance(inside, dict):
            inside[rng.choice(["new", 7, f"{key}2"])] = inside.pop(key)
        elif what == 2:
            inside[key] = (
                rng.choice([Bomb(crater), Crater(crater)]) if rng.random() < 0.1 else rng.choice(ODD)
            )
        elif isinstance(value, torch.Tensor):
            inside[key] = tensor(rng, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            inside[key] = rng.choice([value * 10**6, -value, value + 1, float(value), str(value), 10**12])
        else:
            inside[key] = rng.choice(ODD)
    if rng.random() < 0.7:
        content.pop("checksum", None)
    return content


def tensor(rng, x):
    """Another tensor in the place of one."""
    if x.is_floating_point() and x.numel() and rng.random() < 0.3:
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), 1e38, 0.0])
        return x
    return rng.choice([
        x.double(), x.half(), x.bool(), x.reshape(-1), x[None], x.reshape(-1)[:1],
        x.new_zeros(1).expand(9**9),
        x.to_sparse(), x.t() if x.dim() == 2 else x, x.to(torch.complex64), torch.nn.Parameter(x.float()),
    ])  # fmt: skip


def spoilt(rng, path):
    """The file itself: bytes flipped, cut off or added, a part of it replaced, packed otherwise."""
    whole, what = path.read_bytes(), rng.randrange(6)
    if what == 0:
        whole = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(whole)
    elif what == 1:
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif what == 2:
        path.write_bytes(
            rng.choice([b"", b"PK\x03\x04", b"\x80\x02.", bytes(100)]) + whole[rng.randrange(99) :]
        )
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        victim = rng.choice(sorted(parts))
        parts[victim] = rng.choice(
            [b"", b"\x80\x02.", b"\x80\x02K\x01K\x02s.", bytes(10**6), parts[victim][:-3]]
        )
        if what == 3:
            del parts[victim]
        kind = zipfile.ZIP_DEFLATED if what == 4 else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)


@pytest.mark.filterwarnings("ignore")  # torch's own, of old pickles and of numbers without an imaginary part
def test_an_edited_checkpoint_is_read_or_refused_in_one_sentence(fuzz, kept, tmp_path):
    crater, outcomes = tmp_path / "crater", {"read": 0, "refused": 0}
    for i, rng in enumerate(fuzz(240)):
        stage, content, make = copy.deepcopy(kept[i % 8])
        config = Flags(resume=True)
        config.out = str(tmp_path / "x.pt")
        path = partial_path(config.out) if "optimizer" in content else tmp_path / "x.pt"
        by_bytes = rng.random() < 0.3
        torch.save(content if by_bytes else edited(rng, content, str(crater)), path)
        if by_bytes:
            spoilt(rng, path)
        try:
            use(stage, path, config, make)
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error).replace("\x1b[2J\n", "") and str(path.name) in str(error), error
        assert not crater.exists()
    assert outcomes["refused"] > outcomes["read"] > 0


def use(stage, path, config, make):
    """What a script does with such a file, and with the model in it."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    if path.name == "x.pt":
        loaded, _, content = load_policy(path, chat=True) if stage == "sft" else load_scalar(path)
        loaded(ids[:, : loaded.config.context])
        f"{content['stage']} {content['step']:,} {content.get('normalisation', {}).get('std')}"
        return
    model = make()
    optimizer = make_optimizer(model, 0.1)
    content = resume(config, model, optimizer, stage=stage, data="abc")
    model(ids).square().mean().backward()
    optimizer.step()
    sum(value for row in content.get("history", []) for value in row.values())
    range(content["step"], 10)
