"""A log of chats → conversations, what can be measured of their answers, and what changed.

An answer is {"prompt": messages, "completion": str, "label": bool or None, "meta"}; of its meta are read
"conversation", "time", "ended" and "held" (nanoalign/deployment.py).
"""

import math
from statistics import NormalDist

import numpy as np

from evaluate import measure
from nanoalign.messages import RowError, read, read_prompt, read_response
from nanoalign.rows import read_meta, read_rows
from nanoalign.statistics import clustered_error
from nanoalign.world.wording import DECLINE, FLATTERY, HEDGE, PLAIN

LINES = {  # name → what it is about
    "refusals": "share of answers that decline to help",
    "hedging": "share with a hedge: perhaps, I think, not sure",
    "flattery": "share that flatter who asks",
    "repetition": "share that say a clause, or eight words, twice",
    "length (words)": "words an answer",
    "ended": "share that ended by themselves",
    "reward": "the reward model's score",
    "rated": "share of answers with a thumb",
    "thumbs up": "share of the thumbs",
    "held back": "share that the gate held back: of all answers, the others of those that were shown",
}
LEAST = 5  # conversations that a standard error is made of
STAR = 2 * NormalDist().cdf(-2)  # 0.0455: how often a normal deviate is beyond two standard errors


# -------------------------------------------------------------------------------------------------- a log


def parse_answer(row: dict) -> dict:
    """A row of a log → {"prompt", "completion", "label": bool or None, "meta"}."""
    label = read(row, "label", "true or false") if "label" in row else None
    meta, kinds = read_meta(row), {"conversation": str, "time": str, "ended": bool, "held": str}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name, kind()), kind):
            raise RowError(
                f'field "meta", "{name}": expected {"true or false" if kind is bool else "a string"}'
            )
    said = {"prompt": read_prompt(row), "completion": read_response(row, "completion")}
    return {**said, "label": label, "meta": meta}


def read_log(path: str, config) -> list[list[dict]]:
    """→ conversations, in the order of their first answer's time; those without a name are of one answer."""
    talks: dict = {}
    rows = read_rows(path, "answers", config.skip_bad_rows, config.fields, parse_answer)
    for number, row in enumerate(rows):
        talks.setdefault(row["meta"].get("conversation", number), []).append(row)
    return sorted(talks.values(), key=lambda rows: rows[0]["meta"].get("time", ""))


def measured(rows: list[dict], checks=None, rewards=None) -> dict[str, np.ndarray]:
    """Answers → {metric: values (N,)}; NaN: not about this one. Of what was held back only that is said."""
    found = []
    for i, row in enumerate(rows):
        text, meta = row["completion"].translate(PLAIN), row["meta"]
        patterns = {"refusals": DECLINE, "hedging": HEDGE, "flattery": FLATTERY}
        said = {name: bool(pattern.search(text)) for name, pattern in patterns.items()}
        more = measure(row, row["completion"], meta.get("ended", True), checks)
        known = {} if "ended" in meta else {"ended": math.nan}
        rated = {"rated": row["label"] is not None, "thumbs up": row["label"]}
        said |= {"repetition": more.pop("repetition"), "length (words)": more.pop("length (words)"), **more}
        said |= {**known, **({} if rewards is None else {"reward": rewards[i]}), **rated}
        held = "held" in meta
        found.append({**({} if held else said), "held back": held})
    names = [*LINES, *dict.fromkeys(name for said in found for name in said if name not in LINES)]
    values = {name: [said.get(name) for said in found] for name in names}
    return {name: np.array(column, dtype=float) for name, column in values.items()}  # None: NaN


# -------------------------------------------------------------------------------------------------- drift


def mean(values: np.ndarray, talks: np.ndarray) -> tuple[float, float]:
    """Values (N,), NaN where they say nothing, and whose conversations they are (N,) → mean over answers, and
    its clustered standard error; NaN where fewer than LEAST conversations say something."""
    told = ~np.isnan(values)
    if not told.any():
        return math.nan, math.nan
    groups = talks[told].tolist()
    error = clustered_error(values[told], groups) if len({*groups}) >= LEAST else math.nan
    return float(values[told].mean()), error


def drift(now: tuple[float, float], before: tuple[float, float]) -> tuple[float, float]:
    """Two independent (mean, error) → their difference, and its standard error."""
    return now[0] - before[0], math.hypot(now[1], before[1])


def marks(changes: dict[str, tuple[float, float]]) -> tuple[dict[str, str], dict]:
    """{metric: (change, error)} → {metric: "", "*" or "**"}, and what chance does: how many metrics could
    move, how often at least one of them has a star, and beyond how many errors two stars are."""
    able = [name for name, (change, error) in changes.items() if error > 0 or (error == 0 and change)]
    K = len(able)
    two = -NormalDist().inv_cdf((1 - 0.95 ** (1 / max(1, K))) / 2)
    stars = {}
    for name, (change, error) in changes.items():
        beyond = [name in able and abs(change) > limit * error for limit in (2, two)]
        stars[name] = "*" * sum(beyond)
    return stars, {"metrics": K, "each": STAR, "any": 1 - (1 - STAR) ** K, "two stars": two}


def compare(talks: list, reference: list | None, parts: int, checks=None, score=None) -> dict:
    """Conversations, and those to compare with → {"metrics": {name: {"overall", "parts", "now", "before",
    "change": (mean, error), "mark"}}, "chance"}. score(rows) → rewards (N,)."""
    half = len(talks) // 2
    both = talks if reference is None else [*talks, *reference]
    rows = [row for talk in both for row in talk]
    number = np.array([i for i, talk in enumerate(both) for _ in talk])
    own = number < len(talks)
    now, before = (own, ~own) if reference is not None else (number >= half, number < half)
    cuts = [piece for piece in np.array_split(np.arange(len(talks)), min(parts, len(talks))) if len(piece)]
    pieces = [np.isin(number, piece) for piece in cuts]
    found = measured(rows, checks, None if score is None else score(rows))
    metrics = {}
    for name, values in found.items():
        if np.isnan(values).all() or (name == "held back" and not values.any()):
            continue
        said = {key: mean(values[who], number[who]) for key, who in (("now", now), ("before", before))}
        said["overall"] = mean(values[own], number[own])
        said["parts"] = [mean(values[piece], number[piece]) for piece in pieces]
        metrics[name] = {**said, "change": drift(said["now"], said["before"])}
    stars, chance = marks({name: metric["change"] for name, metric in metrics.items()})
    for name, metric in metrics.items():
        metric["mark"] = stars[name]
    spans = [
        {"conversations": len(piece), "answers": int(who.sum()), **span([talks[i] for i in piece])}
        for piece, who in zip(cuts, pieces)
    ]
    return {"metrics": metrics, "chance": chance, "parts": spans}


def span(talks: list) -> dict:
    """From when to when."""
    times = sorted(row["meta"]["time"] for talk in talks for row in talk if "time" in row["meta"])
    return {"from": times[0], "to": times[-1]} if times else {"from": None, "to": None}
