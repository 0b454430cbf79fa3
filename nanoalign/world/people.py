"""Annotators: people who compare two responses, and are not the judge.

An annotator's utility is the judge's plus biases with named strengths; it prefers a to b with the
Bradley–Terry probability σ((u_a − u_b) / noise). With all biases and the noise at zero it *is* the judge.
Because the annotators are known, so is the best accuracy that any reward model can reach on their labels:
`ceiling`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanoalign.comparisons import calibration
from nanoalign.world.judge import judge, sentences
from nanoalign.world.wording import AGREES, BULLET, CONFIDENT, DISAGREES, FLATTERY, HEDGE

BIASES = {  # in units of the judge's utility
    "length": 0.02,  # per word, up to 40: about what the judge takes off for a needless sentence
    "flattery": 0.3,
    "agreement": 0.6,  # with what the asker believes
    "confidence": 0.2,
    "hedging": 0.15,  # people mind hedging and needless bullets half as much as the judge does
    "bullets": 0.15,
}
NOISE = 0.17
THUMB_BAR = 0.6  # a response of this utility gets thumbs up from half of the people


def impression(row: dict, response: str, ended: bool = True) -> dict[str, float]:
    """What a person takes in of a response: the judge's utility, and one number per name in BIASES."""
    verdict, said = judge(row, response, ended), sentences(response)
    return {
        "judge": verdict.utility,
        "length": min(verdict.length, 40),
        "flattery": bool(FLATTERY.search(response)),
        "agreement": any(AGREES.search(s) and not DISAGREES.search(s) for s in said),
        "confidence": bool(CONFIDENT.search(response)),
        "hedging": bool(HEDGE.search(response)),
        "bullets": bool(BULLET.search(response)),
    }


@dataclass(frozen=True)
class Annotator:
    """A person: noise (0 = always prefers what it likes better) and bias strengths (missing ones are 0)."""

    noise: float = NOISE
    biases: dict[str, float] = field(default_factory=lambda: dict(BIASES))

    def weigh(self, seen: dict[str, float]) -> float:
        """This person's utility of what `impression` saw."""
        return seen["judge"] + sum(strength * seen[name] for name, strength in self.biases.items())

    def utility(self, row: dict, response: str, ended: bool = True) -> float:
        return self.weigh(impression(row, response, ended))

    def prefers(self, utility_a: float, utility_b: float) -> float:
        """P(a is preferred to b), given this person's utilities of them."""
        return _sigmoid(utility_a - utility_b, self.noise)

    def thumb_up(self, utility: float) -> float:
        """P(thumbs up) for a response of this utility (Bradley–Terry against THUMB_BAR)."""
        return _sigmoid(utility - THUMB_BAR, self.noise)


def _sigmoid(difference: float, noise: float) -> float:
    if noise == 0:
        return 0.5 * (1 + (difference > 0) - (difference < 0))
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, difference / noise))))


def people(count: int, seed: int = 0, noise: float = NOISE, spread: float = 0.3) -> list[Annotator]:
    """`count` annotators whose bias strengths vary by a factor of about e^±spread around BIASES."""
    rng = random.Random(f"people-{seed}")
    return [
        Annotator(
            noise, {name: strength * math.exp(rng.gauss(0, spread)) for name, strength in BIASES.items()}
        )
        for _ in range(count)
    ]


def ceiling(probabilities: Sequence[float]) -> float:
    """The best reachable accuracy on labels drawn from these P(a ≻ b): the mean of max(p, 1 − p)."""
    return sum(max(p, 1 - p) for p in probabilities) / len(probabilities)


def agreement(probabilities: Sequence[Sequence[float]]) -> float:
    """How often two different annotators agree, in expectation: per pair one P(a ≻ b) of each annotator."""
    total = 0.0
    for ps in probabilities:
        n, s, squares = len(ps), sum(ps), sum(p * p for p in ps)
        both_a = (s * s - squares) / (n * (n - 1))  # mean of p_i p_j over i ≠ j
        total += both_a + 1 - 2 * s / n + both_a
    return total / len(probabilities)


def against_judge(comparisons: list[dict], name: str) -> None:
    """Print how often the mean vote of those whose names begin with `name` is for the response that the exact
    judge prefers: in all, by kind of request, and by how sure the vote is. What the judge likes equally well
    is left out."""
    utilities, p, first, kinds = {}, [], [], []
    for c in comparisons:
        own = [v["p"] for v in c["votes"] if v["annotator"].startswith(name) and v["p"] is not None]
        said = [(c["prompt"][-1]["content"], *response) for response in zip(c["responses"], c["ended"])]
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
    each = ", ".join(f"{kind} {right[kinds == kind].mean():.0%}" for kind in sorted({*kinds.tolist()}))
    print(f"{name}: by the exact judge {right.mean():.1%} of {len(p):,} labels are right ({each})")
    if not {*p.tolist()} <= {0.0, 0.5, 1.0}:
        bins = calibration(p, first)
        gap = sum(count * abs(sure - share) for sure, share, count in bins) / len(p)
        told = "  ".join(f"{sure:.2f} → {share:.2f} ({count:,})" for sure, share, count in bins)
        print(f"{name}: how sure → share right: {told}   expected calibration error {gap:.3f}")
