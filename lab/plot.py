"""Pictures of what evaluate.py and best_of_n.py have written (needs the `plot` extra).

python -m lab.plot out/demo/scorecard.json scorecard.png     # a panel per line, a bar per checkpoint
python -m lab.plot out/demo/best_of_n.csv best_of_n.png      # a curve per selector
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np

from lab import pyplot, run_on_paths
from lab.seeds import read_report
from nanoalign import UserError
from nanoalign.files import same_file, writing


def write(figure, path: str) -> None:
    figure.tight_layout()
    with writing(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)
    pyplot(path).close(figure)
    print(f"wrote {path}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- the scorecard


def read_cards(path: str) -> tuple[list[str], list[dict]]:
    """scorecard.json → names of checkpoints, and of each its lines {name: (mean, standard error)}."""
    found = read_report(path, "checkpoints", "a scorecard: evaluate.py")
    cards = [
        {name: [math.nan if x is None else x for x in cell] for name, cell in one["overall"].items()}
        for one in found.values()
    ]
    return [Path(checkpoint).stem for checkpoint in found], cards


def plot_cards(names: list[str], cards: list[dict], path: str) -> None:
    """A panel per metric, a bar per checkpoint, with its standard error."""
    plt = pyplot(path)
    lines = dict.fromkeys(line for card in cards for line in card if not math.isnan(card[line][0]))
    wide, bars = 4, range(len(names))
    high = -(-len(lines) // wide)
    size = (3 * wide, high * (0.8 + 0.2 * len(names)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharey=True, squeeze=False)
    for axis, line in zip(axes.flat, lines):
        cells = [card.get(line, (math.nan, math.nan)) for card in cards]
        means, errors = np.array(cells).T
        axis.barh(bars, means, xerr=errors, color=[f"C{i % 10}" for i in bars], capsize=2)
        axis.set_yticks(bars, names)
        axis.set_title(line, fontsize="medium")
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    axes[0, 0].invert_yaxis()
    write(figure, path)


# ------------------------------------------------------------------------------------------- the best of n


def read_curves(path: str) -> dict[str, dict[int, tuple[float, float]]]:
    """best_of_n.csv → {selector: {n: (share right, standard error)}}."""
    table: dict[str, dict[int, tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                cell = float(row["right"]), float(row["error"])
                table.setdefault(row["selector"], {})[int(row["n"])] = cell
    except (OSError, ValueError, KeyError, TypeError):
        table = {}
    if not table:
        raise UserError(f"{path} is missing or no table of best_of_n.py.")
    return table


def plot_curves(table: dict[str, dict[int, tuple[float, float]]], path: str) -> None:
    """A curve per selector over n; what chooses nothing is dashed."""
    plt = pyplot(path)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, curve in table.items():
        means, errors = np.array(list(curve.values())).T
        style = "--" if name in ("pass", "mean") else "-"
        axes.errorbar(list(curve), means, errors, label=name, capsize=2, ls=style)
    axes.set(xscale="log", xlabel="n: solutions drawn", ylabel="share of problems right")
    sizes = list(next(iter(table.values())))
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.legend(fontsize="small")
    write(figure, path)


def main(paths: list[str]) -> None:
    if len(paths) != 2:
        raise UserError("name a scorecard.json or a best_of_n.csv, and the picture to draw of it.")
    source, picture = paths
    pyplot(picture)
    if same_file(source, picture):
        raise UserError(f"{picture} is what is drawn; name another file for the picture.")
    if source.endswith(".csv"):
        plot_curves(read_curves(source), picture)
    else:
        plot_cards(*read_cards(source), picture)


if __name__ == "__main__":
    run_on_paths(main)
