"""The demo's rows, varied: what the claims of docs/claims.md are tried on.

    python -m lab.variants clean --rows out/demo/world/sft.jsonl --out clean.jsonl     # demonstrations, good
    python -m lab.variants part --rows out/demo/pairs.jsonl --share 0.25 --out quarter.jsonl     # of prompts
    python -m lab.variants flip --rows out/demo/pairs.jsonl --share 0.2 --out flipped.jsonl      # of labels
    python -m lab.variants certain --rows out/demo/pairs.jsonl --count 64 --out certain.jsonl    # no noise
    python -m lab.variants lopsided --rows out/demo/pairs.thumbs.jsonl --share 0.9 --out up.jsonl   # thumbs

Held-out prompts keep their place: a prompt's own hash decides (nanoalign/data.py), and whoever trains on a
variant is measured on the rows that it comes from.
"""

import random
from dataclasses import dataclass

from lab import run_command
from lab.weak_to_strong import by_judge
from nanoalign import UserError
from nanoalign.data import prompt_key
from nanoalign.rows import read_rows, write_rows
from nanoalign.world.judge import judge


@dataclass
class Config:
    rows: str = "out/demo/pairs.jsonl"  # what is varied
    out: str = "out/demo/claims/variant.jsonl"  # the rows that come of it
    share: float = 0.5  # of prompts (part), of labels (flip), of thumbs that point up (lopsided)
    count: int = 1200  # rows (clean), prompts (certain)
    seed: int = 0  # of which


def clean(config: Config, rng: random.Random) -> list[dict]:
    """`count` demonstrations to which the exact judge gives the full utility of 1."""
    rows = read_rows(config.rows, "chat")
    rng.shuffle(rows)
    good = []
    for row in rows:
        *prompt, answer = row["messages"]
        if judge({"prompt": prompt, "meta": row["meta"]}, answer["content"]).utility == 1:
            good.append({"messages": row["messages"], "meta": row["meta"]})
    return good[: config.count]


def part(config: Config, rng: random.Random) -> list[dict]:
    """The pairs of a share of the prompts."""
    rows = read_rows(config.rows, "pairs")
    prompts = list(dict.fromkeys(map(prompt_key, rows)))
    kept = set(rng.sample(prompts, round(config.share * len(prompts))))
    return [row for row in rows if prompt_key(row) in kept]


def without_odds(meta: dict) -> dict:
    """What is known of a pair but for the people's odds, which are of the sides as they were."""
    return {name: value for name, value in meta.items() if name != "p_chosen"}


def flip(config: Config, rng: random.Random) -> list[dict]:
    """All pairs, in a share of which the sides have changed places."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "meta": without_odds(row["meta"])}
        if rng.random() < config.share
        else row
        for row in read_rows(config.rows, "pairs")
    ]


def certain(config: Config, rng: random.Random) -> list[dict]:
    """One pair of each of `count` prompts, labelled by the exact judge."""
    rows, found = read_rows(config.rows, "pairs"), {}
    rng.shuffle(rows)
    for row in rows:
        if pair := by_judge(row):
            found.setdefault(prompt_key(row), pair)
    return list(found.values())[: config.count]


def lopsided(config: Config, rng: random.Random) -> list[dict]:
    """Thumbs of which a share points up: as many as there are then."""
    rows = read_rows(config.rows, "labelled")
    rng.shuffle(rows)
    up, down = ([row for row in rows if row["label"] is side] for side in (True, False))
    few = min(len(up) / config.share, len(down) / (1 - config.share)) if 0 < config.share < 1 else 0
    chosen = up[: round(few * config.share)] + down[: round(few * (1 - config.share))]
    rng.shuffle(chosen)
    return chosen


KINDS = {kind.__name__: kind for kind in (clean, part, flip, certain, lopsided)}


def varies(kind):
    def main(config: Config) -> None:
        if not 0 < config.share <= 1 or config.count < 1:
            raise UserError("--share is above 0 and at most 1, --count at least 1.")
        rows = kind(config, random.Random(f"{kind.__name__}-{config.seed}"))
        if not rows:
            raise UserError(f"{config.rows} has no row for {kind.__name__}.")
        write_rows(config.out, rows)
        print(f"{kind.__name__}: {len(rows):,} rows → {config.out}")

    return main, Config


if __name__ == "__main__":
    run_command({name: varies(kind) for name, kind in KINDS.items()}, __doc__)
