"""What a reward model's reader is worth: expected accuracy beside the ceiling, over seeds.

    python -m lab.reader out/seed*/reader

Each folder is one seed's, as `make reader` fills it: reports of lab/reward_report.py on the split's prompts
(X.json) and on pairs about entities and in phrasings that no training prompt has (X.unseen.json). A model
that no folder has is left out. Of the one with a reader also: its accuracy by family, and what restyling a
response changes: its log-odds of being preferred by the model and by people, and the judge's utility.
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
        if not any((Path(folder) / f"{name}.json").exists() for folder in folders):
            continue
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
    for part, first in (("by_family", "of the split, with a reader"), ("probe", "restyled")):
        reports = [read_report(Path(f) / "reader.json", part, "lab/reward_report.py") for f in folders]
        kinds = [kind for kind in reports[0] if all(kind in report for report in reports)]
        names = list(reports[0][kinds[0]])
        cells = {k: [over_seeds([report[k][name] for report in reports]) for name in names] for k in kinds}
        table([first, *names], [[kind, *own] for kind, own in cells.items()])


if __name__ == "__main__":
    run_on_paths(main)
