"""Pictures and tables of the reference bands (docs/bands, by lab.bands), for docs/methods.

    python -m lab.curves              # draws docs/methods/METHOD.svg, all of them
    python -m lab.curves dpo          # prints the first, the middle and the last value of DPO's curves

A line is the mean of the seeds, the area around it where another seed's run lies, two standard deviations.
"""

import json
import sys
from html import escape
from itertools import chain
from pathlib import Path

from lab import run_on_paths
from lab.bands import BANDS, COSTS, MOST
from nanoalign import UserError
from nanoalign.cli import readable_rows
from nanoalign.files import write_text

PANELS = {
    "sft": ("loss", "grad_norm", "eval_loss"),
    "rm": ("loss", "margin", "eval_accuracy", "eval_loss"),
    "dpo": ("loss", "reward_chosen reward_rejected", "logp_chosen logp_rejected", "eval_accuracy"),
    "kto": ("loss", "reward_chosen reward_rejected", "eval_auc", "eval_kl"),
    "orpo": ("nll odds_loss", "log_odds_ratio", "mean_logp_chosen mean_logp_rejected", "eval_accuracy"),
    "ppo": ("score", "kl", "explained_variance", "eval_reward eval_judge"),
    "grpo": ("score", "kl", "entropy", "eval_reward eval_judge"),
    "prm": ("loss", "eval_auc", "eval_exact eval_clean", "eval_ece"),
    "best-of-n": ("pass mean", "majority vote", "prm-min orm", "prm-last prm-product"),
    "cai": ("loss", "reward_chosen reward_rejected", "eval_accuracy", "eval_kl"),
}
WIDE, HIGH, COLOURS = 210, 130, ("#1f6fb4", "#d1622b")  # of a panel, pixels


def read(method: str) -> dict:
    """docs/bands/METHOD.json → {metric: {"step", "low", "mean", "high"}}."""
    try:
        return json.loads((BANDS / f"{method}.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        known = ", ".join(PANELS)
        raise UserError(f"{method} has no band in {BANDS} (lab.bands writes it); known: {known}.") from None


def columns(path: Path) -> dict[str, dict[int, float]]:
    """A run's metrics → {name: {step: value}}."""
    found: dict[str, dict[int, float]] = {}
    if not path.exists():
        raise UserError(f"there is no {path}: a run writes it.")
    for row in readable_rows(path):
        if "step" in row:
            for name in row.keys() - COSTS - {"step"}:
                found.setdefault(name, {})[row["step"]] = row[name]
    return found


def thinned(steps: list[int]) -> list[int]:
    """At most `MOST` of the steps, evenly, the first and the last among them."""
    last = min(len(steps), MOST) - 1
    return [steps[round(i * (len(steps) - 1) / max(1, last))] for i in range(last + 1)]


def of_runs(paths: list[Path]) -> dict:
    """Metrics files → of each metric that all have {"step", "low", "mean", "high"}: the least, the mean
    and the largest."""
    runs, metrics = [columns(path) for path in paths], {}
    for name in sorted(set.intersection(*map(set, runs))):
        steps = thinned(sorted(set.intersection(*(set(run[name]) for run in runs))))
        values = [[run[name][step] for run in runs] for step in steps]
        sides = {"low": min, "mean": lambda own: sum(own) / len(own), "high": max}
        found = {side: [float(f"{of(own):.4g}") for own in values] for side, of in sides.items()}
        if steps:
            metrics[name] = {"step": steps, **found}
    return metrics


def panel(bands: dict, names: list[str], left: int, wide: int = WIDE) -> str:
    """One small picture of one or two metrics, `left` pixels from the edge and so `wide`."""
    known = [bands[name] for name in names]
    low, high = (of(chain(*(b[side] for b in known))) for of, side in ((min, "low"), (max, "high")))
    first, last = (of(chain(*(b["step"] for b in known))) for of in (min, max))
    high, last = high + (high == low), last + (last == first)

    def place(step: float, value: float) -> str:
        x, y = (step - first) / (last - first), (value - low) / (high - low)
        return f"{left + 42 + x * (wide - 60):.1f},{HIGH - 24 - y * (HIGH - 52):.1f}"

    parts = []
    for i, (name, band) in enumerate(zip(names, known)):
        steps, colour = band["step"], COLOURS[i]
        edge = [*zip(steps, band["high"]), *reversed([*zip(steps, band["low"])])]
        around, line = (" ".join(place(*p) for p in ps) for ps in (edge, zip(steps, band["mean"])))
        parts.append(f'<polygon points="{around}" fill="{colour}" fill-opacity="0.2"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        at = left + 42 + i * (wide - 42) // 2
        parts.append(f'<text x="{at}" y="16" fill="{colour}">{escape(name)}</text>')
    for value, y in ((high, 32), (low, HIGH - 22)):
        parts.append(f'<text x="{left + 38}" y="{y}" text-anchor="end">{value:.2g}</text>')
    for step, x, anchor in ((first, 42, "start"), (last, wide - 18, "end")):
        parts.append(f'<text x="{left + x}" y="{HIGH - 8}" text-anchor="{anchor}">{step:,}</text>')
    frame = f'x="{left + 42}" y="26" width="{wide - 60}" height="{HIGH - 50}"'
    return f'<rect {frame} fill="none" stroke="#bbb"/>' + "".join(parts)


def picture(method: str) -> str:
    """An SVG with the panels of a method, side by side; on white, for it is read in light and dark."""
    bands, groups = read(method), [names.split() for names in PANELS[method]]
    panels = "\n".join(panel(bands, names, i * WIDE) for i, names in enumerate(groups))
    size = f'width="{WIDE * len(groups)}" height="{HIGH}" viewBox="0 0 {WIDE * len(groups)} {HIGH}"'
    style = 'font-family="sans-serif" font-size="9" fill="#444"'
    title = f"<title>{escape(method)}: {escape('; '.join(PANELS[method]))}, over steps</title>"
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{title}{back}\n{panels}\n</svg>\n'


def table(method: str) -> None:
    """Print the first, the middle and the last value of what is drawn."""
    bands = read(method)
    print("| mean of the seeds (band of a healthy run) | at first | half way | at last |\n|---|---|---|---|")
    for name in chain(*map(str.split, PANELS[method])):
        cells = []
        for i in (0, len(bands[name]["step"]) // 2, -1):
            step, low, mean, high = (bands[name][side][i] for side in ("step", "low", "mean", "high"))
            cells.append(f"{mean:.3g} ({low:.3g} to {high:.3g}) at {step:,}")
        print(f"| `{name}` | {' | '.join(cells)} |")


def main(methods: list[str]) -> None:
    for method in methods:
        if method not in PANELS:
            raise UserError(f"{method} has no curves; known: {', '.join(PANELS)}.")
        table(method)
    for method in [] if methods else PANELS:
        write_text(f"docs/methods/{method}.svg", picture(method))
        print(f"wrote docs/methods/{method}.svg", file=sys.stderr)


if __name__ == "__main__":
    run_on_paths(main)
