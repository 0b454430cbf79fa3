"""Annotators: people who compare two responses, and are not the judge.

An annotator's utility is the judge's plus biases with named strengths; it prefers a to b with the
Bradley–Terry probability σ((u_a − u_b) / noise). With all biases and the noise at zero it *is* the judge.
Because the annotators are known, so is the best accuracy that any reward model can reach on their labels:
`ceiling`. They compare what collect.py samples: `compare`.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanoalign import UserError
from nanoalign.world.judge import judge, knows, sentences
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


def compare(
    rows: list[dict], drawn: list, pairs: Callable, flags, crowd: list[Annotator] | None = None
) -> tuple[list[dict], list[dict]]:
    """An annotator of collect.py: people drawn from a crowd, by default `people`, → comparisons with their
    votes and, as "p_first", the whole crowd's P(first); and a row of thumbs up or down for one response to
    each prompt.

    Each of flags.votes people orders the responses to a prompt by utility / noise plus Gumbel noise (Plackett
    & Luce), so that every pair of the ranking follows Bradley–Terry exactly. Raises UserError for rows that
    are not the world's.
    """
    if not all(map(knows, rows)):
        raise UserError(
            f"{flags.prompts} has rows without the world's meta: its people judge its own prompts only."
        )
    if not 1 <= flags.votes <= flags.crowd or flags.crowd < 2:
        raise UserError(
            f"--votes {flags.votes}: from 1 to the --crowd of {flags.crowd}, which is at least 2."
        )
    rng, crowd = random.Random(f"label-{flags.seed}"), crowd or people(flags.crowd)
    comparisons, thumbs = [], []
    for row, responses in zip(rows, drawn):
        rng.shuffle(responses)
        seen = [impression(row, text, ended) for text, ended in responses]
        utilities = [[person.weigh(what) for what in seen] for person in crowd]  # (people, K)
        thumb = rng.randrange(len(crowd))
        up = rng.random() < crowd[thumb].thumb_up(utilities[thumb][0])
        text = responses[0][0]
        thumbs.append({"prompt": row["prompt"], "completion": text, "label": up, "meta": row["meta"]})

        liked = {}
        for k in rng.sample(range(len(crowd)), flags.votes):
            liked[k] = [u + crowd[k].noise * gumbel(rng) for u in utilities[k]]
        for i, j, comparison in pairs(row, responses):
            for k, u in liked.items():
                comparison["votes"].append({"annotator": f"world:{k}", "p": float(u[i] > u[j])})
            p = [person.prefers(u[i], u[j]) for person, u in zip(crowd, utilities)]
            comparison["meta"]["p_first"] = round(sum(p) / len(p), 4)
            comparisons.append(comparison)
    return comparisons, thumbs


def gumbel(rng: random.Random) -> float:
    """A draw from the standard Gumbel distribution: the difference of two is logistic."""
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))
