"""Scorecards of several seeds → one markdown table, mean ± standard error over seeds.

python -m lab.seeds out/seed0/scorecard.json out/seed1/scorecard.json out/seed2/scorecard.json
python -m lab.seeds out/seed*/scorecard.json utility "win rate"          # some of its rows only
"""

import json
from pathlib import Path
from statistics import mean, stdev

from lab import run_on_paths
from nanoalign import UserError
from nanoalign.terminal import visible


def over_seeds(values: list[float | None]) -> str:
    """One value per seed → "mean ± standard error"; a dash where one is missing."""
    if None in values:
        return "–"
    spread = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def read_report(path, part: str, what: str) -> dict:
    """One part of a JSON report; an error says what it should have been."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))[part]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} cannot be read as {what} writes it.") from None


def scorecards(paths: list) -> list[dict]:
    """Reports of evaluate.py → the checkpoints of each."""
    reports = [read_report(path, "checkpoints", "a scorecard: evaluate.py") for path in paths]
    for path, report in zip(paths, reports):
        cards = report.values() if isinstance(report, dict) else [None]
        if not report or not all(isinstance(card, dict) and is_card(card.get("overall")) for card in cards):
            raise UserError(f"{path} cannot be read as a scorecard: evaluate.py writes it.")
    return reports


def is_card(overall) -> bool:
    """{metric: [mean, standard error]}, null where there is none?"""
    values = overall.values() if isinstance(overall, dict) else [None]
    number = (int, float, type(None))
    return all(isinstance(v, list) and len(v) == 2 and all(isinstance(x, number) for x in v) for v in values)


def main(arguments: list[str]) -> None:
    paths = [path for path in arguments if path.endswith(".json")]
    only = [name for name in arguments if name not in paths]
    if not paths:
        raise UserError("name the scorecards, as written by evaluate.py.")
    reports = scorecards(paths)
    names = [Path(path).stem for path in reports[0]]
    if any([Path(path).stem for path in report] != names for report in reports):
        raise UserError("the scorecards are not of the same checkpoints.")
    checkpoints = [list(report.values()) for report in reports]
    print(visible(f"| {len(paths)} seeds | {' | '.join(names)} |\n|---|{'---|' * len(names)}"))
    metrics = checkpoints[0][0]["overall"]
    if unknown := set(only) - set(metrics):
        raise UserError(f"no scorecard has {min(unknown)!r}; they have {', '.join(metrics)}.")
    for metric in only or metrics:
        cells = [
            over_seeds([card[i]["overall"][metric][0] for card in checkpoints]) for i in range(len(names))
        ]
        print(visible(f"| {metric} | {' | '.join(cells)} |"))


if __name__ == "__main__":
    run_on_paths(main)
