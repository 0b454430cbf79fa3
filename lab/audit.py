"""A person judges a random sample of what a deployed model said; every key is saved at once.

    python -m lab.monitor chats.jsonl --audit 50
    python -m lab.audit --answers chats.audit.jsonl                  # and again, to go on
    python -m lab.audit --answers chats.audit.jsonl --name ann       # somebody else

Key g is for a good answer, b for a bad one, s to skip, u to undo, q to leave. Thumbs that users gave are not
shown. Users rate what they feel strongly about; a random sample says how good all answers are, and
lab/monitor.py prints it. Answers with a verdict (the majority's, without ties) go to X.labelled.jsonl, as
train_kto.py reads them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.annotate import ask_all, autosave
from lab.chats import mean, parse_answer
from nanoalign import UserError, cli
from nanoalign.files import beside
from nanoalign.messages import read
from nanoalign.rows import read_rows, write_rows
from nanoalign.terminal import visible

KEYS = {"g": "good", "b": "bad", "s": "skip", "u": "undo", "q": "quit"}
SAYS = {"g": 1.0, "b": 0.0, "s": None}  # P(it is good)


@dataclass
class Config:
    answers: str = "chats.audit.jsonl"  # what lab/monitor.py drew; the verdicts are added to it
    name: str = ""  # who judges; recorded as human:NAME, without a name as human

    def outputs(self) -> list[str]:
        return [self.answers, str(beside(self.answers, ".labelled.jsonl"))]

    also_written = ("answers",)


def parse_audited(row: dict) -> dict:
    """→ an answer of a log (lab/chats.py), with its "votes": [{"annotator", "p"}…]."""
    votes = read(row, "votes", 'a list of {"annotator": string, "p": number from 0 to 1 or null}')
    return {**parse_answer(row), "votes": votes}


def judge(answers: list[dict], name: str, save: Callable[[], None]) -> None:
    """Ask for `name`'s verdict on every answer that lacks it, and `save()` after every key."""

    def show(at: int, done: int) -> str:
        said = "".join(f"{m['role']}: {visible(m['content'])}\n" for m in answers[at]["prompt"])
        return f"\n{said}\n→ {visible(answers[at]['completion'])}\n"

    ask_all(answers, name, "answers", "verdict", KEYS, show, lambda at, key: {"p": SAYS[key]}, save)


def verdict(answer: dict) -> float:
    """P(it is good) by the votes that were not skipped; NaN: there is none."""
    votes = [vote["p"] for vote in answer["votes"] if vote["p"] is not None]
    return sum(votes) / len(votes) if votes else float("nan")


def audited(path) -> dict | None:
    """What an audit's file says: how many of its answers were judged, the share that is good with its error,
    and how often a user's thumb, where there is one, agrees; None where nothing was judged."""
    if not Path(path).exists():
        return None
    answers = read_rows(str(path), "answers", parse=parse_audited)
    good = np.array([verdict(answer) for answer in answers])
    if np.isnan(good).all():
        return None
    talks = np.array([str(a["meta"].get("conversation", i)) for i, a in enumerate(answers)])
    both = [(p > 0.5) == a["label"] for p, a in zip(good, answers) if a["label"] is not None and p in (0, 1)]
    share = sum(both) / len(both) if both else float("nan")
    judged = int((~np.isnan(good)).sum())
    return {"judged": judged, "good": mean(good, talks), "thumbs that agree": [share, len(both)]}


def main(config: Config) -> None:
    if not sys.stdin:
        raise UserError("there is nobody to ask: standard input is closed.")
    answers = read_rows(config.answers, "answers", parse=parse_audited)
    save = autosave(Path(config.answers))
    judge(answers, f"human:{config.name}" if config.name else "human", lambda: save(rows_of(answers)))
    labelled = [
        {"prompt": a["prompt"], "completion": a["completion"], "label": verdict(a) > 0.5, "meta": a["meta"]}
        for a in answers
        if verdict(a) == verdict(a) != 0.5
    ]
    if labelled:
        write_rows(config.outputs()[1], labelled)
        print(f"audit: {len(labelled):,} of {len(answers):,} answers have a verdict → {config.outputs()[1]}")


def rows_of(answers: list[dict]) -> list[dict]:
    """Answers as rows again: a label, or "unrated"."""
    rows = []
    for answer in answers:
        label = {"unrated": True} if answer["label"] is None else {"label": answer["label"]}
        rows.append({**{k: v for k, v in answer.items() if k != "label"}, **label})
    return rows


if __name__ == "__main__":
    if sys.stdin:  # None where it is closed
        sys.stdin.reconfigure(errors="replace")  # a terminal may send what is not UTF-8
    cli.run(main, Config, __doc__)
