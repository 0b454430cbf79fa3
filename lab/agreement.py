"""How far annotators agree, what sways each, and of the world's prompts how often they are right.

    python -m lab.agreement --votes out/demo/pairs.votes.jsonl
    python collect.py --annotator rm:out/demo/rm.pt --resume        # first: one more annotator's votes

It reads the votes that collect.py and lab/annotate.py write. Printed of each annotator: the log-odds of
preferring what is shown first (where that was recorded), and what is 10 words longer (a bias only as far as
longer responses are not better: compare annotators); where votes overlap, agreement, also beyond chance (κ).

Of the world's prompts it prints how often the votes are for the response that the exact judge prefers: the
labels' noise. Of the world's people, whom it knows, it computes exactly, not by an estimate, how often two of
them agree and, where one of them votes on a pair, the best accuracy that a reward model could reach on these
labels.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nanoalign import cli
from nanoalign.data import prompt_key
from nanoalign.rows import read_rows
from nanoalign.statistics import clustered, logistic
from nanoalign.terminal import visible
from nanoalign.world.judge import judge, knows
from nanoalign.world.people import Annotator, agreement, ceiling, impression, people


@dataclass
class Config:
    votes: str = "out/demo/pairs.votes.jsonl"  # comparisons and the votes on them
    crowd: int = 5  # how many people the world has: collect.py's --crowd
    brief: bool = False  # print no more than how often labels are right, as a list in markdown


# -------------------------------------------------------------------------------------------- statistics


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


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def sway(features: np.ndarray, votes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What sways an annotator: features (N, D) of first less second, votes (N,) for the first in [0, 1],
    groups (N,) → log-odds of preferring the first per unit of each feature (D,), and their standard errors.

    The errors allow for votes of a group (a prompt) that depend on each other (Liang & Zeger 1986).
    """
    theta = logistic(features, votes)
    p = sigmoid(features @ theta)
    inverse = np.linalg.inv((p * (1 - p) * features.T) @ features + 1e-6 * np.eye(len(theta)))
    spread = inverse @ clustered((votes - p)[:, None] * features, groups) @ inverse
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


# ----------------------------------------------------------------------------------------------- reports


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
    prompts = np.unique([prompt_key(c) for c in comparisons], return_inverse=True)[1]
    tens = np.array([len(a.split()) - len(b.split()) for a, b in (c["responses"] for c in comparisons)]) / 10
    names = [visible(name) for name in names]
    width = max(len(name) for name in (*names, "annotator")) + 2
    print(f"{'annotator':{width}}{'votes':>6}{'ties':>6}   shown first   10 words longer   (log-odds)")
    for k, name in enumerate(names):
        voted = ~np.isnan(p[:, k])
        first, longer = log_odds(p[voted, k], order[voted, k], tens[voted], prompts[voted])
        ties = (p[voted, k] == 0.5).sum()
        print(f"{name:{width}}{voted.sum():6,}{ties:6,}{first:>14}{longer:>18}")
    report_agreement(names, np.sign(p - 0.5))


def log_odds(votes: np.ndarray, order: np.ndarray, longer: np.ndarray, prompts: np.ndarray) -> list[str]:
    """An annotator's votes (N,), their order, tens of words more (N,) → log-odds of the two, as text."""
    known = not np.isnan(order).any()
    features = np.stack((order, longer), axis=1) if known else longer[:, None]
    if len(votes) < 10:
        return ["–", "–"]
    cells = [
        f"{x:+.2f} ± {error:.2f}" if error < 5 and abs(x) < 8 else "–"
        for x, error in zip(*sway(features, votes, prompts))
    ]
    return cells if known else ["–", *cells]


def report_agreement(names: list[str], kinds: np.ndarray) -> None:
    """Votes (comparisons, annotators): 1, 0 or −1 for the first, a tie, the second; NaN for none."""
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


def against_judge(comparisons: list[dict], name: str, mark: str = "") -> None:
    """Print how often the mean vote of one annotator, or of all people of the world, is for the response that
    the exact judge prefers: in all, by kind of request, and by how sure the vote is. What the judge likes
    equally well is left out."""
    utilities, p, first, kinds = {}, [], [], []
    for c in comparisons:
        votes = by_people(c) if name == "world" else [v for v in c["votes"] if v["annotator"] == name]
        own = [vote["p"] for vote in votes if vote["p"] is not None]
        said = [(prompt_key(c), *response) for response in zip(c["responses"], c["ended"])]
        for key in said:
            if key not in utilities:
                utilities[key] = judge(c, *key[1:]).utility
        a, b = (utilities[key] for key in said)
        if own and a != b:
            p.append(sum(own) / len(own))
            first.append(a > b)
            kinds.append(c["meta"]["kind"])
    if not p:
        return
    p, first, kinds = map(np.array, (p, first, kinds))
    right = np.where(p == 0.5, 0.5, (p > 0.5) == first)
    each = ", ".join(
        f"{visible(kind)} {right[kinds == kind].mean():.0%}" for kind in sorted({*kinds.tolist()})
    )
    print(f"{mark}{name}: by the exact judge {right.mean():.1%} of {len(p):,} labels are right ({each})")
    if not {*p.tolist()} <= {0.0, 0.5, 1.0}:
        bins = calibration(p, first)
        gap = sum(count * abs(sure - share) for sure, share, count in bins) / len(p)
        told = "  ".join(f"{sure:.2f} → {share:.2f} ({count:,})" for sure, share, count in bins)
        print(f"{mark}{name}: how sure → share right: {told}   expected calibration error {gap:.3f}")


def impressions(comparison: dict) -> list[dict]:
    """What a person takes in of either response."""
    return [impression(comparison, *said) for said in zip(comparison["responses"], comparison["ended"])]


def preferences(crowd: list[Annotator], a: dict, b: dict) -> list[float]:
    """Each person's P(the first is better), of what they take in of both."""
    return [person.prefers(person.weigh(a), person.weigh(b)) for person in crowd]


def exactly(comparisons: list[dict], crowd: int) -> None:
    """Print what follows from knowing the world's people: two people's agreement, and the ceiling."""
    members = people(crowd)
    probabilities = [preferences(members, *impressions(c)) for c in comparisons]
    print(f"two people agree on {agreement(probabilities):.1%} of pairs (expected, exact)")
    if all(len(by_people(c)) == 1 for c in comparisons):
        best = ceiling([sum(p) / len(p) for p in probabilities])
        print(f"no reward model can exceed {best:.1%} accuracy on these labels (ceiling, exact)")


def by_people(comparison: dict) -> list[dict]:
    """The votes of the world's people."""
    return [vote for vote in comparison["votes"] if vote["annotator"].startswith("world:")]


def main(config: Config) -> None:
    comparisons = read_rows(config.votes, "compared")
    if not config.brief:
        report(comparisons)
    if not all(map(knows, comparisons)):
        return
    names = {vote["annotator"] for c in comparisons for vote in c["votes"]}
    for name in sorted({"world" if name.startswith("world:") else name for name in names}):
        against_judge(comparisons, name, "- " * config.brief)
    if all(map(by_people, comparisons)) and not config.brief:
        exactly(comparisons, config.crowd)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
