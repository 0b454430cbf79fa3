"""Simulated chats, whose drift is known: how often are the stars of lab/monitor.py wrong?

    python -m lab.simulated_chats                # a table for docs/deployment.md
    python -m lab.simulated_chats chats.jsonl    # or a log of 200 conversations, to look at

A conversation has an inclination of its own to each kind of answer, so that its answers depend on each other:
the log-odds of an answer are normal around the mean's, with standard deviation 1, and so are the lengths and
scores of a conversation around theirs.
"""

import numpy as np

from lab import run_on_paths
from lab.chats import drift, marks, mean
from lab.scoreboard import table
from nanoalign.rows import write_rows

SHARES = {"refusals": 0.1, "hedging": 0.2, "flattery": 0.15, "repetition": 0.05, "thumbs up": 0.6}
SIZES = {
    "length (words)": (12.0, 3.0),
    "reward": (0.0, 0.7),
}  # mean, spread within a conversation and between
TURNS = 4  # answers in a conversation, at most
COMPARISONS = 1000
SENTENCES = {
    "refusals": "I can't help with that.",
    "hedging": "Perhaps it is so.",
    "flattery": "What a great question!",
    "repetition": "The sky is blue. The sky is blue.",
}


def simulated(rng, talks: int, shifts: dict | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Conversations with shifts of their log-odds, or of their mean in units of its spread → {metric: values
    (N,)} and whose they are (N,)."""
    shifts, turns = shifts or {}, rng.integers(1, TURNS + 1, talks)
    own, values = np.repeat(np.arange(talks), turns), {}
    for name, share in SHARES.items():
        odds = np.log(share / (1 - share)) + shifts.get(name, 0.0) + rng.normal(size=talks)
        values[name] = (rng.random(len(own)) < 1 / (1 + np.exp(-odds[own]))).astype(float)
    for name, (center, spread) in SIZES.items():
        between, within = rng.normal(size=talks)[own], rng.normal(size=len(own))
        values[name] = center + spread * (shifts.get(name, 0.0) + between + within)
    values["thumbs up"][rng.random(len(own)) < 0.5] = np.nan  # no thumb
    return values, own


def compared(rng, talks: int, shifts: dict | None = None, clustered=True) -> dict[str, str]:
    """Two logs of so many conversations, the second one with shifts → the mark of each metric."""
    changes = {}
    (before, first), (now, second) = simulated(rng, talks), simulated(rng, talks, shifts)
    if not clustered:
        first, second = np.arange(len(first)), np.arange(len(second))
    for name in before:
        changes[name] = drift(mean(now[name], second), mean(before[name], first))
    return marks(changes)[0]


def texts(rng, values: dict[str, np.ndarray], own: np.ndarray, first: int = 0) -> list[dict]:
    """Simulated values as rows of a log, whose texts say so; "score" in their meta is the reward. A text is
    as long as its length says, or as its sentences are."""
    rows, turn = [], 0
    for i, talk in enumerate(own):
        turn = turn + 1 if i and own[i - 1] == talk else 0
        said = " ".join(text for name, text in SENTENCES.items() if values[name][i])
        missing = max(0, round(values["length (words)"][i]) - len(said.split()))
        filler = " ".join(rng.permutation(FILLER)[:missing])
        minutes = 10 * (first + int(talk)) + turn
        meta = {"conversation": f"c{first + talk}", "turn": turn, "time": moment(minutes)}
        meta |= {"ended": True, "score": float(values["reward"][i])}
        label = {"unrated": True}
        if not np.isnan(values["thumbs up"][i]):
            label = {"label": bool(values["thumbs up"][i])}
        prompt = [{"role": "user", "content": f"Question {talk}, {turn}?"}]
        rows.append(
            {"prompt": prompt, "completion": f"{said} {filler}".strip() or "Yes", **label, "meta": meta}
        )
    return rows


FILLER = [
    f"{a}{b}" for a in ("tea", "rain", "book", "lamp", "road") for b in ("", "s", "ing", "er", "ed", "y")
]


def moment(minutes: int) -> str:
    return str(np.datetime64("2026-01-01T00:00:00") + np.timedelta64(minutes, "m")) + "+00:00"


def false_alarms(talks: int, seed: int = 0) -> list[str]:
    """Comparisons in which nothing moved → a line: how often a metric has a star, any of them has, any has
    two; and how often one has by errors that take the answers of a conversation for independent."""
    rng = np.random.default_rng([seed, talks])
    found = [compared(rng, talks) for _ in range(COMPARISONS)]
    naive = [compared(rng, talks, clustered=False) for _ in range(COMPARISONS)]
    each = np.array([[mark != "" for mark in one.values()] for one in found])
    two = np.array([[mark == "**" for mark in one.values()] for one in found])
    plain = np.array([[mark != "" for mark in one.values()] for one in naive])
    return [f"{x:.1%}" for x in (each.mean(), each.any(1).mean(), two.any(1).mean(), plain.mean())]


def found(talks: int, seed: int = 1) -> str:
    """How often a rise of refusals from a tenth to a fifth, by their median, has a star."""
    rng = np.random.default_rng([seed, talks])
    shift = {"refusals": float(np.log(0.2 / 0.8) - np.log(0.1 / 0.9))}
    return f"{np.mean([compared(rng, talks, shift)['refusals'] != '' for _ in range(COMPARISONS // 2)]):.0%}"


def main(arguments: list[str]) -> None:
    if arguments:
        rng = np.random.default_rng(0)
        write_rows(arguments[0], texts(rng, *simulated(rng, 200)))
        return
    names = ["a star", "any of 7", "any of 7, two stars", "a star, unclustered", "planted: found"]
    lines = [[str(talks), *false_alarms(talks), found(talks)] for talks in (10, 25, 50, 200)]
    table(["conversations a side", *names], lines)


if __name__ == "__main__":
    run_on_paths(main)
