"""What runs changed on held-out data: their first and last evaluation, and the change over seeds.

    python -m lab.progress out/seed*/sums.metrics.jsonl

Of each metrics file, a seed's, the evaluations at the start and at the end; below, the change in the mean of
the files, ± its standard error over them.
"""

from pathlib import Path

from lab import run_on_paths
from lab.scoreboard import table
from lab.seeds import over_seeds
from nanoalign import UserError
from nanoalign.cli import readable_rows


def main(paths: list[str]) -> None:
    if not paths:
        raise UserError("name the metrics files, such as out/seed0/sums.metrics.jsonl.")
    changes: dict[str, list[float]] = {}
    rows = []
    for path in paths:
        held_out = [row for row in readable_rows(Path(path)) if any(name.startswith("eval_") for name in row)]
        if len(held_out) < 2:
            raise UserError(f"{path} has no two held-out evaluations; --eval-every sets how many there are.")
        first, *_, last = held_out
        names = [name for name in first if name.startswith("eval_") and name in last]
        rows.append([path, *(f"{first[name]:.3f} → {last[name]:.3f}" for name in names)])
        for name in names:
            changes.setdefault(name, []).append(last[name] - first[name])
    rows.append(["change", *map(over_seeds, changes.values())])
    table(["", *(name.removeprefix("eval_") for name in changes)], rows)


if __name__ == "__main__":
    run_on_paths(main)
