"""What a reward model's reader is worth: expected accuracy beside the ceiling, over seeds.

    python -m lab.reader out/seed*/reader

Each folder is one seed's, as `make reader` fills it: reports of lab/reward_report.py on the split's prompts
(X.json) and on pairs about entities and in phrasings that no training prompt has (X.unseen.json).
"""

from pathlib import Path

from lab import run_on_paths
from lab.scoreboard import table
from lab.seeds import over_seeds, read_report
from nanoalign import UserError

MODELS = {
    "plain": "no reader",
    "deep": "no reader, twice the layers",
    "reader": "with a reader",
    "more": "with a reader, pairs of 8 responses instead of 4",
}


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0/reader.")
    rows = []
    for name, what in MODELS.items():
        cells = []
        for end in (".json", ".unseen.json"):
            parts = {
                part: [read_report(Path(f) / f"{name}{end}", part, "lab/reward_report.py") for f in folders]
                for part in ("expected_accuracy", "ceiling")
            }
            below = [best - own for own, best in zip(*parts.values())]
            cells += map(over_seeds, (*parts.values(), below))
        rows.append([what, *cells])
    heads = [
        f"{kind}: {part}" for kind in ("split", "unseen") for part in ("accuracy", "ceiling", "below it")
    ]
    table([f"seeds: {len(folders)}", *heads], rows)


if __name__ == "__main__":
    run_on_paths(main)
