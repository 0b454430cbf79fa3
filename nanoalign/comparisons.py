"""What comparisons say: how far annotators agree, what sways an annotator."""

import math
from itertools import combinations

import numpy as np

from nanoalign.data import prompt_key
from nanoalign.statistics import logistic, sigmoid


def raw_agreement(counts: np.ndarray) -> float:
    """Votes for each category (N, C) → how often two votes on the same item agree (Fleiss 1971, eqs. 2, 3).

    Items with fewer than two votes say nothing; NaN where all are such.
    """
    n = counts.sum(axis=1)
    counts, n = counts[n >= 2], n[n >= 2]
    return float(((counts * (counts - 1)).sum(axis=1) / (n * (n - 1))).mean()) if len(n) else float("nan")


def fleiss_kappa(counts: np.ndarray) -> float:
    """Votes for each category (N, C) → Fleiss' κ: agreement above chance (Fleiss 1971, eq. 7), 1 at best.

    Items may have different numbers of votes; those with fewer than two are left out. NaN where all votes are
    for one category: chance alone would agree.
    """
    counts = counts[counts.sum(axis=1) >= 2]
    share = counts.sum(axis=0) / max(1, counts.sum())
    return above_chance(raw_agreement(counts), (share**2).sum())


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Two annotators' categories of the same items (N,) → Cohen's κ (Cohen 1960, eq. 1)."""
    by_chance = sum((a == kind).mean() * (b == kind).mean() for kind in np.union1d(a, b))
    return above_chance((a == b).mean(), by_chance)


def above_chance(observed: float, by_chance: float) -> float:
    return float((observed - by_chance) / (1 - by_chance)) if by_chance < 1 else float("nan")


def sway(features: np.ndarray, votes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What sways an annotator: features (N, D) of first less second, votes (N,) for the first in [0, 1],
    groups (N,) → log-odds of preferring the first per unit of each feature (D,), and their standard errors.

    The errors allow for votes of a group (a prompt) that depend on each other (Liang & Zeger 1986).
    """
    theta = logistic(features, votes)
    p, (_, group) = sigmoid(features @ theta), np.unique(groups, return_inverse=True)
    pull = np.zeros((group.max() + 1, len(theta)))
    np.add.at(pull, group, (votes - p)[:, None] * features)
    inverse = np.linalg.inv((p * (1 - p) * features.T) @ features + 1e-6 * np.eye(len(theta)))
    spread = inverse @ pull.T @ pull @ inverse * len(pull) / max(1, len(pull) - 1)
    return theta, np.sqrt(np.diag(spread))


def calibration(p: np.ndarray, right: np.ndarray, bins: int = 5) -> list[tuple[float, float, int]]:
    """P(first is better) (N,), and whether it is (N,) → for `bins` equal ranges of how sure p is, from 1/2 to
    1: the mean sureness, the share that is right (a tie half), the number. Empty ranges are left out."""
    sure = np.maximum(p, 1 - p)
    hit = np.where(p == 0.5, 0.5, (p > 0.5) == right)
    own = np.minimum((2 * bins * (sure - 0.5)).astype(int), bins - 1)
    return [
        (float(sure[own == k].mean()), float(hit[own == k].mean()), int((own == k).sum()))
        for k in range(bins)
        if (own == k).any()
    ]


def report(comparisons: list[dict]) -> None:
    """Rows of kind "compared" (nanoalign/rows.py): print who voted, what sways whom, how far they agree."""
    names = sorted({vote["annotator"] for c in comparisons for vote in c["votes"]})
    p = np.full((len(comparisons), len(names)), np.nan)  # of the first response; NaN: no vote, or skipped
    order = np.full(p.shape, np.nan)  # 1: the first response was shown first, −1: second; NaN: both at once
    for i, c in enumerate(comparisons):
        for vote in c["votes"]:
            k = names.index(vote["annotator"])
            p[i, k] = np.nan if vote["p"] is None else vote["p"]
            order[i, k] = 1 - 2 * vote["swapped"] if "swapped" in vote else np.nan
    longer = np.array([len(a.split()) - len(b.split()) for a, b in (c["responses"] for c in comparisons)])
    prompts = np.unique([prompt_key(c) for c in comparisons], return_inverse=True)[1]
    width = max(len(name) for name in (*names, "annotator")) + 2
    print(f"{'annotator':{width}}{'votes':>6}{'ties':>6}   shown first   10 words longer   (log-odds)")
    for k, name in enumerate(names):
        voted = ~np.isnan(p[:, k])
        features, cells = longer[voted, None] / 10, []
        if not np.isnan(order[voted, k]).any():
            features = np.stack((order[voted, k], longer[voted] / 10), axis=1)
        if voted.sum() >= 10:
            cells = [
                f"{x:+.2f} ± {error:.2f}" if error < 5 and abs(x) < 8 else "–"
                for x, error in zip(*sway(features, p[voted, k], prompts[voted]))
            ]
        cells = ["–"] * (2 - len(cells)) + cells
        ties = (p[voted, k] == 0.5).sum()
        print(f"{name:{width}}{voted.sum():6,}{ties:6,}{cells[0]:>14}{cells[1]:>18}")
    kinds = np.sign(p - 0.5)  # 1, 0 or −1: the first, a tie, the second
    counts = np.stack([(kinds == kind).sum(axis=1) for kind in (-1, 0, 1)], axis=1)
    several = int((counts.sum(axis=1) >= 2).sum())
    if several:
        print(
            f"{several:,} comparisons with several votes: two votes agree on "
            f"{raw_agreement(counts):.1%}, Fleiss' κ {fleiss_kappa(counts):.2f}"
        )
    for i, j in combinations(range(len(names)), 2):
        both = ~np.isnan(kinds[:, [i, j]]).any(axis=1)
        if both.any():
            a, b = kinds[both, i], kinds[both, j]
            line = f"{names[i]} and {names[j]} agree on {(a == b).mean():.1%} of {both.sum():,}"
            print(f"{line}, Cohen's κ {cohen_kappa(a, b):.2f}")


def print_table(header: list[str], lines: list[tuple[str, list]]) -> None:
    """A cell is (mean, standard error), and a mark if there is one."""

    def text(cell) -> str:
        if cell is None or math.isnan(cell[0]):
            return "– "
        error = "–" if math.isnan(cell[1]) else f"{cell[1]:.3f}"
        return f"{cell[0]:.3f} ± {error}{cell[2] if cell[2:] else ' '}"

    width = max(17, *(len(name) + 3 for name in header))
    print(f"{'':24}" + "".join(f"{name + ' ':>{width}}" for name in header))
    for name, cells in lines:
        print(f"{name:24}" + "".join(f"{text(cell):>{width}}" for cell in cells))


def starred(cell, change):
    """The cell of a table, marked if the change is more than twice its standard error."""
    return (*cell, "*" if abs(change[0]) > 2 * change[1] else " ") if cell else cell
