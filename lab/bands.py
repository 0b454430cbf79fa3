"""What healthy runs look like: each metric's least, mean and largest value over seeds, step by step.

    python -m lab.bands out/seed0 out/seed1 out/seed2        # writes docs/bands/METHOD.json

A few kB a method: {"runs": [paths], "metrics": {name: {"step": […], "low": […], "mean": […], "high": […]}}},
of the steps that all runs logged, at most 40 of them, without what depends on the clock. In best-of-n.json a
selector is a metric and n the step.
"""

import json
from pathlib import Path

from lab import run_on_paths
from lab.plot import read_curves
from nanoalign import UserError
from nanoalign.cli import readable_rows
from nanoalign.files import write_text

BANDS, MOST = Path("docs/bands"), 40
RUNS = {
    "sft": "sft", "rm": "rm", "dpo": "dpo", "ppo": "ppo", "prm": "prm", "kto": "scoreboard/kto",
    "orpo": "scoreboard/orpo", "grpo": "scoreboard/grpo", "cai": "cai/ai",
}  # fmt: skip
CLOCK = {
    "step",
    "lr",
    "tokens",
    "tokens_per_s",
    "elapsed",
    "peak_mb",
    "generation_s",
    "scoring_s",
    "update_s",
}


def columns(path: Path) -> dict[str, dict[int, float]]:
    """A run's metrics → {name: {step: value}}; of best_of_n.csv {selector: {n: share right}}."""
    if path.suffix == ".csv":
        return {
            name: {n: right for n, (right, _) in curve.items()} for name, curve in read_curves(path).items()
        }
    found: dict[str, dict[int, float]] = {}
    if not path.exists():
        raise UserError(f"there is no {path}: make results scoreboard prm cai SEEDS=3 writes it.")
    for row in readable_rows(path):
        if "step" in row:
            for name in row.keys() - CLOCK:
                found.setdefault(name, {})[row["step"]] = row[name]
    return found


def thinned(steps: list[int]) -> list[int]:
    """At most `MOST` of the steps, evenly, the first and the last among them."""
    last = min(len(steps), MOST) - 1
    return [steps[round(i * (len(steps) - 1) / max(1, last))] for i in range(last + 1)]


def band(paths: list[Path]) -> dict:
    """Metrics files of several seeds → the band of each metric that all of them have."""
    runs, metrics = [columns(path) for path in paths], {}
    for name in sorted(set.intersection(*map(set, runs))):
        steps = thinned(sorted(set.intersection(*(set(run[name]) for run in runs))))
        values = [[run[name][step] for run in runs] for step in steps]
        sides = {"low": min, "mean": lambda own: sum(own) / len(own), "high": max}
        found = {side: [float(f"{of(own):.4g}") for own in values] for side, of in sides.items()}
        if steps:
            metrics[name] = {"step": steps, **found}
    return {"runs": [path.as_posix() for path in paths], "metrics": metrics}


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders of the seeds, such as out/seed0 out/seed1 out/seed2.")
    BANDS.mkdir(parents=True, exist_ok=True)
    files = {method: f"{run}.metrics.jsonl" for method, run in RUNS.items()} | {"best-of-n": "best_of_n.csv"}
    for method, file in files.items():
        found = band([Path(folder) / file for folder in folders])
        write_text(BANDS / f"{method}.json", json.dumps(found) + "\n")
        print(f"wrote {BANDS / f'{method}.json'}")


if __name__ == "__main__":
    run_on_paths(main)
