"""Weak-to-strong generalisation: a small reward model's labels supervise a larger one (Burns et al. 2023).

    python bench/weak_to_strong.py split --pairs out/demo/pairs.jsonl --out out/demo/weak-to-strong
    python bench/weak_to_strong.py report out/seed*/weak-to-strong

`split` has the world's exact judge, not its people, say which side of each pair is better (ties are left out)
and deals the prompts out: 40 % to train the weak model (weak.jsonl), 40 % for the strong one, 20 % to test
both (test.jsonl). The strong one's pairs are written twice: with the judge's labels (ceiling.jsonl), and in
random order for the weak model to vote on (unlabelled.jsonl: `collect.py --resume` goes on from there).

`report` reads a folder per seed with X.metrics.jsonl of the reward models of `make weak-to-strong`: weak;
naive, the strong model on the weak one's labels; confident, the same with --confidence; ceiling, the strong
model on the judge's labels. It prints their held-out accuracy and the performance gap recovered,

    PGR = (weak-to-strong − weak) / (ceiling − weak)
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.scoreboard import print_time, table
from bench.seeds import over_seeds
from collect import comparison
from nanoalign import UserError, cli
from nanoalign.data import prompt_key
from nanoalign.rows import read_rows, write_rows
from nanoalign.world.judge import judge, knows

MODELS = {
    "weak": "weak, the judge's labels",
    "naive": "strong, the weak model's labels",
    "confident": "strong, the same and its own confidence",
    "ceiling": "strong, the judge's labels",
}


@dataclass
class Config:
    pairs: str = "out/demo/pairs.jsonl"  # pair rows of the world
    out: str = "out/demo/weak-to-strong"  # the folder to write to
    seed: int = 0  # of the split, and of the order in which the weak model sees two responses


def by_judge(pair: dict) -> dict | None:
    """The pair with the side first that the exact judge prefers, without what people said; None for a tie."""
    chosen, rejected = (judge(pair, pair[side]).utility for side in ("chosen", "rejected"))
    if chosen == rejected:
        return None
    sides = ("chosen", "rejected") if chosen > rejected else ("rejected", "chosen")
    meta = {k: v for k, v in pair["meta"].items() if k not in ("annotator", "annotators", "p_chosen")}
    return {"prompt": pair["prompt"], "chosen": pair[sides[0]], "rejected": pair[sides[1]], "meta": meta}


def split(config: Config) -> None:
    pairs = read_rows(config.pairs, "pairs")
    if not all(map(knows, pairs)):
        raise UserError(f"{config.pairs} has rows without meta: the judge only knows the world's prompts.")
    judged = [pair for pair in map(by_judge, pairs) if pair]
    rng, parts = random.Random(f"weak-to-strong-{config.seed}"), {"weak": [], "ceiling": [], "test": []}
    keys = list(dict.fromkeys(map(prompt_key, judged)))
    if len(keys) < 5:
        raise UserError(f"{config.pairs} has {len(keys)} prompts with a better response; five are needed.")
    rng.shuffle(keys)
    place = {key: ("weak", "ceiling", "test")[5 * i // len(keys) // 2] for i, key in enumerate(keys)}
    for pair in judged:
        parts[place[prompt_key(pair)]].append(pair)
    votes = []
    for pair in parts["ceiling"]:
        sides = [(pair["chosen"], True), (pair["rejected"], True)]
        rng.shuffle(sides)
        votes.append(comparison(pair, *sides))
    for name, rows in {**parts, "unlabelled": votes}.items():
        write_rows(f"{config.out}/{name}.jsonl", rows)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items())
    print(f"split: {len(judged):,} of {len(pairs):,} pairs have a better side: {counts} → {config.out}")


def gap_recovered(weak: float, student: float, ceiling: float) -> float | None:
    """PGR (Burns et al. 2023, §3): 0 as good as its supervisor, 1 as good as on true labels; None where there
    is no gap to recover."""
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def held_out_accuracy(folder: str, name: str) -> float:
    path = Path(folder) / f"{name}.metrics.jsonl"
    found = [row["eval_accuracy"] for row in cli.readable_rows(path) if "ece" in row]
    if not found:
        raise UserError(f"{path} has no final evaluation: the run has not finished; `make weak-to-strong`.")
    return found[-1]


def report(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0/weak-to-strong.")
    accuracy = {name: [held_out_accuracy(folder, name) for folder in folders] for name in MODELS}
    rows = []
    for name, what in MODELS.items():
        recovered = list(map(gap_recovered, accuracy["weak"], accuracy[name], accuracy["ceiling"]))
        rows.append([what, over_seeds(accuracy[name]), over_seeds(recovered)])
    table([f"seeds: {len(folders)}", "held-out accuracy", "PGR"], rows)
    print_time(folders)


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        try:
            report(sys.argv[2:])
        except UserError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            sys.exit(f"error: {error.filename} cannot be read; `make weak-to-strong` writes it.")
    elif sys.argv[1:2] == ["split"]:
        del sys.argv[1]
        cli.run(split, Config, __doc__)
    else:
        sys.exit("error: name a command: split or report (python bench/weak_to_strong.py split --help).")
