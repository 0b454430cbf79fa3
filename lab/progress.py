"""What runs changed on held-out data: their first and last evaluation, and the change over seeds.

    python -m lab.progress out/seed*/sums.metrics.jsonl

Of each metrics file, a seed's, what all of them evaluated at the start and at the end; below, the change in
the mean of the files, ± its standard error over them.
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
    ends = []
    for path in paths:
        held_out = [row for row in readable_rows(Path(path)) if any(name.startswith("eval_") for name in row)]
        if len(held_out) < 2:
            raise UserError(f"{path} has no two held-out evaluations; --eval-every sets how many there are.")
        ends.append((held_out[0], held_out[-1]))
    of_all = set.intersection(*(set(end) for both in ends for end in both))
    names = [name for name in ends[0][0] if name.startswith("eval_") and name in of_all]
    rows = [
        [path, *(f"{first[name]:.3f} → {last[name]:.3f}" for name in names)]
        for path, (first, last) in zip(paths, ends)
    ]
    rows.append(
        ["change", *(over_seeds([last[name] - first[name] for first, last in ends]) for name in names)]
    )
    table(["", *(name.removeprefix("eval_") for name in names)], rows)


if __name__ == "__main__":
    run_on_paths(main)
