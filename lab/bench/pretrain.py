"""Pretraining the world's base model: held-out loss and processor time, of today's run and of variants.

    python -m lab.bench.pretrain --share 0.25            # of an epoch; half an hour on a thread of its own

Each variant runs train_pretrain.py whole, in a process of its own, one after the other. Held-out loss is of
blocks of 128 tokens, whatever it was trained on; processor seconds are of the steps alone.
"""

import contextlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np

import train_pretrain
from lab.bench.timing import in_child
from lab.scoreboard import table
from nanoalign import UserError, cli, run
from nanoalign.checkpoint import load_policy
from nanoalign.data import read_split, thin
from nanoalign.model import GPT, PRESETS

FASTER = {"lr": 8e-3, "warmup": 100, "shape": {"qk_norm": True}}
VARIANTS = {  # flags of train_pretrain.py; beside them a part of the tokens, AdamW's betas, a model's shape
    "today, half as long": {"part": 0.5},
    "today": {},
    "batch 8": {"batch_size": 8, "warmup": 100},
    "blocks of 64, batch 32": {"context": 64, "batch_size": 32},
    "linear decay, β₂ 0.99": {"betas": (0.9, 0.99), "linear": True},
    "QK norm, lr 8e-3": FASTER,
    "QK norm, lr 8e-3, batch 8": {**FASTER, "batch_size": 8, "warmup": 200},
}


@dataclass
class Config:
    data: str = "out/demo/world/pretrain.jsonl"  # rows of text
    share: float = 0.25  # of an epoch
    only: tuple[str, ...] = tuple(VARIANTS)  # which variants


def child(name: str, data: str, share: float) -> dict:
    """Train one variant → its held-out loss, processor seconds of its steps, their number."""
    flags, times, cosine, make = dict(VARIANTS[name]), [], run.learning_rate, train_pretrain.make_optimizer
    other = {key: flags.pop(key, None) for key in ("part", "betas", "linear", "shape")}
    PRESETS["world-small"] = replace(PRESETS["world-small"], **other["shape"] or {})

    def rate(step: int, steps: int, peak: float, warmup: int) -> float:  # called once a step
        times.append(time.process_time())
        line = peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        return line if other["linear"] else cosine(step, steps, peak, warmup)

    run.learning_rate, betas = rate, other["betas"] or (0.9, 0.95)
    train_pretrain.make_optimizer = lambda *args: make(*args, betas=betas)
    flags |= {"epochs": share * (other["part"] or 1), "eval_every": 10**6, "data": data}
    with tempfile.TemporaryDirectory() as folder:
        config = train_pretrain.Config(out=f"{folder}/base.pt", **flags)
        train_pretrain.main(config)
        trained, tokenizer, _ = load_policy(config.out, chat=False)
    policy = GPT(replace(trained.config, context=128))
    policy.load_state_dict(trained.state_dict())
    blocks = thin(train_pretrain.pack(read_split(config, data, "text")[1], tokenizer, 128), 256)
    loss = train_pretrain.evaluate(policy, np.stack(blocks), config, "cpu")["loss"]
    return {"loss": loss, "seconds": times[-1] - times[0], "steps": len(times)}


def main(config: Config) -> None:
    rows = []
    for name in config.only:
        given = {"name": name, "data": config.data, "share": config.share}
        found = in_child("lab.bench.pretrain", given)
        if "error" in found:
            raise UserError(f"{name}: {found['error']}")
        rows.append([name, str(found["steps"]), f"{found['seconds']:.0f}", f"{found['loss']:.4f}"])
    table(["variant", "steps", "processor s", "held-out loss"], rows)


if __name__ == "__main__":
    if sys.argv[1:] != ["child"]:
        sys.exit(cli.run(main, Config, __doc__))
    with contextlib.redirect_stdout(sys.stderr):
        result = child(**json.load(sys.stdin))
    print(json.dumps(result))
