"""Reference bands: where a healthy run's curves lie, by the runs of several seeds.

    python -m lab.bands out/seed0 out/seed1 out/seed2        # writes docs/bands/METHOD.json, a few kB each

Each folder is a demo's (`make results` makes three). A band is, of every logged metric and step, the mean over
the seeds (a running median of 3, which leaves a trend as it is and takes off single spikes) and 2 standard
deviations of a new run from it: sd √(1 + 1/n), the variance between the seeds pooled over five neighbouring
steps. With the band stands the config that it is of: a run with other settings is told so and gets no verdict.
"""

import json
import math
from pathlib import Path
from statistics import mean, median, variance

from lab import run_on_paths
from lab.sections.runs import Run, read_runs
from nanoalign import UserError
from nanoalign.files import write_text

BANDS = Path(__file__).parents[1] / "docs/bands"
MOST = 36  # points of a band's curve
COSTS = {"tokens_per_s", "elapsed", "peak_mb", "generation_s", "scoring_s", "update_s", "tokens", "lr"}
# flags that say where and how a run ran, not what it is
PLACES = {
    "eval_data", "micro_batch", "micro_tokens", "log_every", "eval_every", "save_every", "seed", "device",
    "compile", "checkpointing", "resume", "skip_bad_rows", "fields", "init", "data", "out", "prompts", "reward",
    "reference", "critic", "watch", "doctor", "eval_prompts", "tokenizer", "precision", "base_dtype",
}  # fmt: skip


def settings(run: Run) -> dict:
    """What a run's curves depend on: its flags, and its number of steps."""
    kept = {name: value for name, value in run.config.items() if name not in PLACES}
    return {**kept, "steps": run.last.get("step", 0)}


def rounded(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def aligned(columns: list[tuple[list, list]]) -> tuple[list, list[tuple]]:
    """(steps, values) of every seed → the steps that all have, and the values there of each. The last steps are
    one, whatever their numbers: worlds of other seeds have a few rows more or fewer."""
    ends = [steps[-1] for steps, _ in columns]
    found = [
        {min(ends) if step == end else step: value for step, value in zip(*column) if step == end or step < min(ends)}
        for column, end in zip(columns, ends)
    ]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, [tuple(own[step] for own in found) for step in steps]


def band(columns: list[tuple[list, list]]) -> dict | None:
    """A metric's (steps, values) of every seed → {"step", "centre", "spread"}; None if there is none of all."""
    if not all(steps for steps, _ in columns):
        return None
    steps, rows = aligned(columns)
    if not all(math.isfinite(x) for row in rows for x in row):
        return None
    centre = [mean(row) for row in rows]
    smooth = [median(centre[max(0, i - 1) : i + 2]) if 0 < i < len(rows) - 1 else x for i, x in enumerate(centre)]
    between = [variance(row) for row in rows]
    new = 2 * math.sqrt(1 + 1 / len(columns))
    spread = [new * math.sqrt(mean(between[max(0, i - 2) : i + 3])) for i in range(len(rows))]
    every = -(-len(rows) // MOST)
    kept = sorted({*range(0, len(rows), every), len(rows) - 1})
    parts = ("centre", smooth, 4), ("spread", spread, 3)
    found = {name: [rounded(own[i], digits) for i in kept] for name, own, digits in parts}
    return {"step": [steps[i] for i in kept], **found}


def read_band(name: str) -> dict | None:
    """docs/bands/NAME.json → its content; None where there is none. Metrics logged at the same steps share them."""
    path = BANDS / f"{name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    for own in content["metrics"].values():
        own["step"] = content["steps"][own["step"]]
    return content


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
    """The share of a run's values that lie in the band of that metric; None where they have no step in common."""
    hits = []
    for step, value in zip(steps, values):
        centre, spread = (at(own["step"], own[name], step) for name in ("centre", "spread"))
        if centre is not None:
            hits.append(abs(value - centre) <= spread + 1e-3 * abs(centre) + 1e-9)
    return sum(hits) / len(hits) if hits else None


def different(settings_of_band: dict, run: Run) -> list[str]:
    """What of a run's settings is not the band's: "lr 0.001, not 0.0005". A tenth more or fewer steps is
    another seed's world, not another setting."""
    own, found = settings(run), []
    for name, value in settings_of_band.items():
        alike = own.get(name, value) == value
        if name == "steps" and own[name] and value:
            alike = abs(own[name] / value - 1) < 0.1
        if not alike:
            found.append(f"{name.replace('_', ' ')} {own[name]}, not {value}")
    return found


def main(folders: list[str]) -> None:
    if len(folders) < 2:
        raise UserError("name the folders of two seeds or more, such as out/seed0 out/seed1 out/seed2.")
    seeds = [read_runs(Path(folder)) for folder in folders]
    for name in seeds[0]:
        runs = [seed[name] for seed in seeds]
        if not all(run.rows for run in runs):
            print(f"{name}: left out, not every folder has its metrics")
            continue
        if any(different(settings(runs[0]), run) for run in runs):
            raise UserError(f"{name}: the seeds were trained with different settings; a band is of one.")
        found = {metric: band([run.column(metric) for run in runs]) for metric in runs[0].metrics}
        found = {metric: own for metric, own in found.items() if own and metric not in COSTS}
        steps = []
        for own in found.values():
            steps += [own["step"]] if own["step"] not in steps else []
            own["step"] = steps.index(own["step"])
        content = {"seeds": len(runs), "settings": settings(runs[0]), "steps": steps, "metrics": found}
        path = BANDS / f"{name}.json"
        write_text(str(path), json.dumps(content, separators=(",", ":")) + "\n")
        print(f"{path.relative_to(BANDS.parents[1])}: {len(found)} metrics, {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    run_on_paths(main)
