"""What the reports in a seed's folder say, as figures with errors, and differences of them over seeds."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

from lab.agreement import impressions, preferences
from lab.hacking import curve
from lab.plot import read_curves
from lab.scoreboard import cost
from lab.seeds import read_report, scorecards
from nanoalign import UserError
from nanoalign.cli import readable_rows
from nanoalign.world.people import agreement, people

Number = tuple[float, float]  # a figure of one seed, and its standard error within that seed


class Seed:
    """What one seed's folder says."""

    def __init__(self, folder: str):
        self.folder, self.read = Path(folder), {}

    def once(self, path: str, reader: Callable):
        if (path, reader) not in self.read:
            self.read[path, reader] = reader(self.folder / path)
        return self.read[path, reader]

    def card(self, name: str) -> dict:
        """The scorecard of a checkpoint: "sft", "scoreboard/kto", "hacking/judge", …"""
        own, _, stem = name.rpartition("/")
        cards = self.once(f"{own}/scorecard.json".lstrip("/"), scorecard)
        found = {Path(path).stem: card for path, card in cards.items()}
        if stem not in found:
            raise UserError(f"{self.folder}/{own}/scorecard.json has no checkpoint {stem}.")
        return found[stem]

    def value(self, name: str, metric: str) -> Number:
        found, error = self.card(name)["overall"][metric]
        return found, error or 0.0

    def won(self, name: str) -> Number:
        """The win rate against the baseline of the scorecard: SFT, of cai/ the revised model."""
        return self.value(name, "win rate")

    def accuracy(self, path: str, part="expected_accuracy") -> Number:
        """Of a reward model. Models are compared on the same pairs: the error is left to the seeds."""
        return exact(read_report(self.folder / path, part, "lab/reward_report.py"))

    def rows(self, run: str, metric: str) -> list[float]:
        """A metric of a run, in the order it was logged."""
        rows = self.once(f"{run}.metrics.jsonl", readable_rows)
        if found := [row[metric] for row in rows if row.get(metric) is not None]:
            return found
        raise UserError(f"{self.folder}/{run}.metrics.jsonl has no {metric}.")

    def curve(self, run: str) -> list[dict]:
        """The held-out evaluations of a run of `make hacking`: kl, proxy and judge."""
        if found := self.once(f"hacking/{run}.metrics.jsonl", curve):
            return found
        raise UserError(f"{self.folder}/hacking/{run}.metrics.jsonl has no evaluation by the judge.")

    def cost(self, run: str, what: str) -> Number:
        return exact(cost(self.folder / f"{run}.metrics.jsonl")[what])

    def best(self, selector: str, n: int) -> Number:
        """The share right of the best of n, by a selector of best_of_n.py."""
        curves = self.once("best_of_n.csv", read_curves)
        if n not in curves.get(selector, ()):
            raise UserError(f"{self.folder}/best_of_n.csv has no {selector} of {n}.")
        return curves[selector][n]

    @cached_property
    def agreements(self) -> dict[str, float]:
        """How often two of the world's people agree, exactly: on the third of the pairs that differ most by
        the exact judge, on the third that differs least, on all."""
        lines, crowd = (self.folder / "pairs.votes.jsonl").read_text(encoding="utf-8").splitlines(), people(5)
        seen = [impressions(json.loads(line)) for line in lines[::5]]
        found = [(abs(a["judge"] - b["judge"]), preferences(crowd, a, b)) for a, b in seen]
        found.sort(key=lambda pair: pair[0])
        third = len(found) // 3
        parts = {"hard": found[:third], "easy": found[-third:], "all": found}
        return {name: agreement([p for _, p in part]) for name, part in parts.items()}


def scorecard(path: Path) -> dict:
    return scorecards([path])[0]


def less(a: Number, b: Number, times: float = 1.0) -> Number:
    """a − times · b."""
    return a[0] - times * b[0], math.hypot(a[1], times * b[1])


def exact(x: float) -> Number:
    return x, 0.0


def moved(values: list[float]) -> Number:
    """From the mean of the first tenth of a run to that of its last."""
    tenth = max(1, len(values) // 10)
    return exact(mean(values[-tenth:]) - mean(values[:tenth]))


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # so many seeds: the 97.5 % quantile of Student's t


def over_seeds(found: list[Number]) -> Number:
    """Figures of seeds, each with its own standard error → their mean, and half of its 95 % interval: the
    larger of those by the errors within the seeds and by the spread over them. Of one seed whose error is not
    known it is infinite; of more than five seeds a little too wide."""
    values, errors = zip(*found)
    n = len(values)
    within = 1.96 * math.sqrt(sum(error**2 for error in errors)) / n
    between = STUDENT.get(n, 2.78) * stdev(values) / math.sqrt(n) if n > 1 else 0.0 if within else math.inf
    return mean(values), max(within, between)


def side(figure: Number) -> int:
    """1: the interval is above zero; −1: below; 0: neither."""
    value, half = figure
    return 0 if abs(value) <= half else 1 if value > 0 else -1
