"""Safety against helpfulness: which policies no other one beats at both?

    python -m lab.pareto mix --share 0.2 --out mixed.jsonl
    python -m lab.pareto report --folders out/seed*/pareto --plot pareto.png

`mix` writes pair rows of which a given share is about harmful requests; where there are too few, they come
again, each as often as the others. `report` reads a folder per seed, as `make pareto` fills it: a scorecard
of policies that differ in that share (share-…), in DPO's β (beta-…), or in the weight of harmlessness in
GRPO's reward (weight-…). It prints, as means ± standard errors over seeds, or of one seed over prompts:

    helpfulness          the judge's utility, mean over the families of harmless requests
    harmful compliance   how often a harmful request is complied with
    over-refusal         how often a request that only sounds dangerous is refused

and which policies are on the Pareto front: no other one is as good at both and better at one. `front` is that
of helpfulness and harmful compliance, `refusals` that of over-refusal and harmful compliance. The front of
noisy means is noisy: beside it stands in how many seeds a policy is on the seed's own. Every figure goes to
pareto.csv in the first folder.
"""

import csv
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import pyplot, run_command
from lab.plot import write
from lab.scoreboard import print_time, table
from lab.seeds import scorecards
from nanoalign import UserError
from nanoalign.files import writing
from nanoalign.rows import read_rows, write_rows

BETTER = {"helpfulness": 1, "harmful compliance": -1, "over-refusal": -1, "KL to reference": 0}
FRONTS = {"front": ("helpfulness", "harmful compliance"), "refusals": ("over-refusal", "harmful compliance")}


@dataclass
class Mix:
    helpful: str = "out/demo/pareto/helpful.jsonl"  # pair rows about harmless requests
    harmless: str = "out/demo/pareto/harmless.jsonl"  # pair rows about harmful ones
    share: float = 0.5  # of the second kind
    count: int = 4224  # rows to write
    out: str = "out/demo/pareto/mixed.jsonl"  # pair rows
    seed: int = 0  # of which rows, and of their order


@dataclass
class Report:
    folders: tuple[str, ...] = ("out/demo/pareto",)  # one per seed, with a scorecard.json each
    plot: str = ""  # a picture of both fronts to write (needs the `plot` extra)

    def outputs(self) -> list[str]:
        return [f"{self.folders[0]}/pareto.csv", *filter(None, [self.plot])]


def mix(config: Mix) -> None:
    if config.share > 1 or config.count < 1:
        raise UserError(f"--share {config.share} must be at most 1, and --count at least 1.")
    rng, mixed = random.Random(f"mix-{config.seed}"), []
    many = round(config.share * config.count)
    for path, count in ((config.harmless, many), (config.helpful, config.count - many)):
        rows = read_rows(path, "pairs") if count else []
        rng.shuffle(rows)
        mixed += [rows[i % len(rows)] for i in range(count)]
    rng.shuffle(mixed)
    write_rows(config.out, mixed)
    print(f"mix: {many:,} of {config.count:,} pairs are of {config.harmless} → {config.out}")


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Points (N, D), more is better → bool (N,): no other point is as good in every coordinate and better in
    one. Equal points share their fate."""
    a, b = points[:, None], points[None]
    dominates = (a >= b).all(-1) & (a > b).any(-1)  # (N, N)
    return ~dominates.any(0)


def front(values: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """What the policies (N, measures) reach → bool (N,): on the front of these measures."""
    columns = [list(BETTER).index(name) for name in names]
    return pareto_front(values[:, columns] * [BETTER[name] for name in names])


def measures(checkpoint: dict) -> list:
    """A checkpoint of a scorecard → [mean, standard error over prompts] of each of BETTER, in its order."""
    families = [card["utility"] for kind, card in checkpoint["families"].items() if kind != "harm"]
    means, errors = np.array(families, dtype=float).T
    helpfulness = [means.mean(), np.sqrt((errors**2).sum()) / len(families)]
    return [helpfulness, *(checkpoint["overall"][name] for name in list(BETTER)[1:])]


def report(config: Report) -> None:
    if config.plot:
        pyplot(config.plot)
    cards = scorecards([Path(folder) / "scorecard.json" for folder in config.folders])
    names = [Path(path).stem for path in cards[0]]
    if any([Path(path).stem for path in card] != names for card in cards):
        raise UserError("the folders' scorecards are not of the same policies; run `make pareto` again.")
    found = np.array([[measures(c) for c in card.values()] for card in cards], dtype=float)
    values, errors = found[..., 0], found[..., 1]  # (seeds, policies, measures)
    seeds, means = len(cards), values.mean(0)
    error = values.std(0, ddof=1) / seeds**0.5 if seeds > 1 else errors[0]
    on = {name: front(means, of) for name, of in FRONTS.items()}
    often = {name: np.sum([front(own, of) for own in values], axis=0) for name, of in FRONTS.items()}
    rows = [
        [
            policy,
            *(f"{x:.3f} ± {e:.3f}" for x, e in zip(means[i], error[i])),
            *(f"{'yes' if on[name][i] else '–'} ({often[name][i]} of {seeds})" for name in FRONTS),
        ]
        for i, policy in enumerate(names)
    ]
    table([f"seeds: {seeds}", *BETTER, *FRONTS], rows)
    print_time(config.folders)
    (path, *_) = config.outputs()
    with writing(path) as file:
        lines = csv.writer(file)
        lines.writerow(("policy", "seed", *(name for m in BETTER for name in (m, "error"))))
        for seed, own in enumerate(found):
            lines.writerows((name, seed, *row.round(5).flatten()) for name, row in zip(names, own))
    print(f"wrote {path}", file=sys.stderr)
    if config.plot:
        plot(names, means, error, config.plot)


def plot(names: list[str], means: np.ndarray, error: np.ndarray, path: str) -> None:
    """Two panels, a point per policy (N, measures), and the front as a line."""
    plt = pyplot(path)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    sweeps = np.array([name.partition("-")[0] for name in names])
    for axis, of in zip(axes, FRONTS.values()):
        i, j = (list(BETTER).index(name) for name in of)
        for sweep in dict.fromkeys(sweeps):
            own = sweeps == sweep
            x, y, x_error, y_error = means[own, i], means[own, j], error[own, i], error[own, j]
            axis.errorbar(x, y, y_error, x_error, "o", label=sweep, capsize=2, lw=0.7)
        for name, x, y in zip(names, means[:, i], means[:, j]):
            label = name.partition("-")[2] or name
            axis.annotate(label, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
        best = means[front(means, of)][:, [i, j]]
        best = best[best[:, 0].argsort()]
        axis.plot(*best.T, "k--", lw=1, zorder=0, label="front")
        axis.set(xlabel=of[0], ylabel=of[1], title="better is up and to the right")
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()  # better is up and right
    axes[1].invert_xaxis()
    axes[1].invert_yaxis()
    axes[0].legend(fontsize=8)
    write(figure, path)


if __name__ == "__main__":
    run_command({"mix": (mix, Mix), "report": (report, Report)}, __doc__)
