"""Scorecards of several seeds → one markdown table, mean ± standard error over seeds.

python bench/seeds.py out/seed0/scorecard.json out/seed1/scorecard.json out/seed2/scorecard.json
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev


def over_seeds(values: list[float | None]) -> str:
    """One value per seed → "mean ± standard error"; a dash where one is missing."""
    if None in values:
        return "–"
    spread = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def main(paths: list[str]) -> None:
    if not paths:
        sys.exit("error: name the scorecards, as written by evaluate.py.")
    reports = [json.loads(Path(path).read_text()) for path in paths]
    checkpoints = [list(report["checkpoints"].values()) for report in reports]
    names = [Path(path).stem for path in reports[0]["checkpoints"]]
    print(f"| {len(paths)} seeds | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for metric in checkpoints[0][0]["overall"]:
        cells = [
            over_seeds([card[i]["overall"][metric][0] for card in checkpoints]) for i in range(len(names))
        ]
        print(f"| {metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
