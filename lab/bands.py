"""Reference bands: where a healthy run's curves lie, by the runs of several seeds.

    python -m lab.bands out/seed0 out/seed1 out/seed2        # writes docs/bands/NAME.json, a few kB each

Each folder is a demo's (`make results` makes three); where all have them, what `make cai` and `make prm` add
is taken in too. A band is, of every logged metric and step, the mean over the seeds (a running median of 3,
which leaves a trend as it is and takes off single spikes) and 2 standard deviations of a new run from it: sd
√(1 + 1/n), the variance between the seeds pooled over five neighbouring steps. With the band stands the
config that it is of: a run with other settings is told so and gets no verdict. In best-of-n.json a selector
is a metric and n the step.

    {"seeds": n, "settings": {flag: value},
     "metrics": {name: {"step": […], "low": […], "mean": […], "high": […]}}}
"""

import json
import math
from pathlib import Path
from statistics import mean, median, variance

from lab import run_on_paths
from lab.plot import read_curves
from lab.sections.runs import Run, metrics_of, read_runs, spaced
from nanoalign import UserError
from nanoalign.files import write_text

BANDS = Path(__file__).parents[1] / "docs/bands"
MOST = 36  # points of a band's curve
COSTS = {"tokens_per_s", "elapsed", "peak_mb", "generation_s", "scoring_s", "update_s", "tokens", "lr"}
# flags that say where and how a run ran, not what it is
PLACES = {
    "eval_data", "micro_batch", "micro_tokens", "log_every", "eval_every", "save_every", "seed", "device",
    "compile", "checkpointing", "resume", "skip_bad_rows", "fields", "init", "data", "out", "prompts",
        "reward",
    "reference", "critic", "watch", "doctor", "eval_prompts", "tokenizer", "precision", "base_dtype",
}  # fmt: skip
Columns = tuple[list, list]  # the steps at which a metric was logged, and its values


def settings(run: Run) -> dict:
    """What a run's curves depend on: its flags, and its number of steps."""
    kept = {name: value for name, value in run.config.items() if name not in PLACES}
    return {**kept, "steps": run.last.get("step", 0)}


def aligned(columns: list[Columns]) -> tuple[list, list[tuple]]:
    """A metric of every seed → the steps that all have, and the values there of each. The last steps are one,
    whatever their numbers: worlds of other seeds have a few rows more or fewer."""
    ends = [steps[-1] for steps, _ in columns]
    found = [
        {
            min(ends) if step == end else step: value
            for step, value in zip(*column)
            if step == end or step < min(ends)
        }
        for column, end in zip(columns, ends)
    ]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, [tuple(own[step] for own in found) for step in steps]


def band(columns: list[Columns]) -> dict | None:
    """A metric of every seed → {"step", "low", "mean", "high"}; None where a seed lacks it, or has NaN."""
    if not all(steps for steps, _ in columns):
        return None
    steps, rows = aligned(columns)
    if not all(math.isfinite(x) for row in rows for x in row):
        return None
    middle = [mean(row) for row in rows]
    smooth = [
        median(middle[max(0, i - 1) : i + 2]) if 0 < i < len(rows) - 1 else x for i, x in enumerate(middle)
    ]
    between = [variance(row) for row in rows]
    new = 2 * math.sqrt(1 + 1 / len(columns))
    spread = [new * math.sqrt(mean(between[max(0, i - 2) : i + 3])) for i in range(len(rows))]
    kept = spaced(len(rows), MOST)
    found = {side: [float(f"{smooth[i] + sign * spread[i]:.4g}") for i in kept]
             for side, sign in (("low", -1), ("mean", 0), ("high", 1))}  # fmt: skip
    return {"step": [steps[i] for i in kept], **found}


def read_band(name: str) -> dict | None:
    """docs/bands/NAME.json; None where there is none."""
    path = BANDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def at(steps: list, values: list, step: float) -> float | None:
    """A band's value at a step, between its points by interpolation; None outside it."""
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    i = next(i for i, s in enumerate(steps) if s >= step)
    if steps[i] == step:
        return values[i]
    part = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
    return values[i - 1] + part * (values[i] - values[i - 1])


def inside(own: dict, steps: list, values: list) -> float | None:
    """The share of a run's values that lie in a metric's band; None where they have no step in common."""
    hits = []
    for step, value in zip(steps, values):
        low, high = (at(own["step"], own[side], step) for side in ("low", "high"))
        if low is not None:
            rounding = 1e-3 * max(abs(low), abs(high)) + 1e-6
            hits.append(low - rounding <= value <= high + rounding)
    return sum(hits) / len(hits) if hits else None


def different(of_band: dict, run: Run) -> list[str]:
    """What of a run's settings is not the band's: "lr 0.001, not 0.0005". A tenth more or fewer steps is
    another seed's world, not another setting."""
    own, found = settings(run), []
    for name, value in of_band.items():
        alike = own.get(name, value) == value
        if name == "steps" and own[name] and value:
            alike = abs(own[name] / value - 1) < 0.1
        if not alike:
            found.append(f"{name.replace('_', ' ')} {own[name]}, not {value}")
    return found


def write(name: str, content: dict) -> None:
    path = BANDS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")
    print(f"docs/bands/{path.name}: {len(content['metrics'])} metrics, {path.stat().st_size / 1000:.1f} kB")


def of_runs(name: str, runs: list[Run]) -> None:
    """Runs of one stage, a seed each → its band."""
    if not all(run.rows for run in runs):
        return print(f"{name}: left out, not every folder has its metrics")
    if any(different(settings(runs[0]), run) for run in runs):
        raise UserError(f"{name}: the seeds were trained with different settings; a band is of one.")
    found = {metric: band([run.column(metric) for run in runs]) for metric in runs[0].metrics}
    found = {metric: own for metric, own in found.items() if own and metric not in COSTS}
    write(name, {"seeds": len(runs), "settings": settings(runs[0]), "metrics": found})


def main(folders: list[str]) -> None:
    if len(folders) < 2:
        raise UserError("name the folders of two seeds or more, such as out/seed0 out/seed1 out/seed2.")
    paths = [Path(folder) for folder in folders]
    seeds = [read_runs(path) for path in paths]
    for name in seeds[0]:
        of_runs(name, [seed[name] for seed in seeds])
    ai = [path / "cai/ai.pt" for path in paths]
    of_runs(
        "cai",
        [Run("cai", "dpo", "CAI", "", own, [], metrics_of(own.with_suffix(".metrics.jsonl"))) for own in ai],
    )
    tables = [path / "best_of_n.csv" for path in paths]
    if not all(path.is_file() for path in tables):
        return print("best-of-n: left out, not every folder has best_of_n.csv")
    curves = [read_curves(str(path)) for path in tables]
    columns = {name: [(list(own[name]), [right for right, _ in own[name].values()]) for own in curves]
               for name in curves[0] if all(name in own for own in curves)}  # fmt: skip
    found = {name: own for name, column in columns.items() if (own := band(column))}
    write("best-of-n", {"seeds": len(paths), "settings": {}, "metrics": found})


if __name__ == "__main__":
    run_on_paths(main)
