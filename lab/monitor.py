"""What a deployed model says, over time: what drifted, how people rated it, and a sample for an audit.

    python -m lab.monitor chats.jsonl
    python -m lab.monitor chats.jsonl --reward out/demo/rm.pt --against old.jsonl
    python -m lab.monitor chats.jsonl --checks my_checks.py --audit 50

It reads the log of `chat.py --log`, or any rows {"prompt", "completion"} with or without a "label", and
prints every metric over parts of the log that hold as many conversations each. Standard errors are clustered:
the answers of one conversation depend on each other, conversations do not. Refusals, hedging and flattery are
found by patterns of English (nanoalign/world/wording.py); --checks adds your own, as in evaluate.py.

A star marks what drifted: the whole log less --against, or without it the second half of the conversations
less the first, is beyond two standard errors. A metric that did not move has a star once in 22 comparisons;
of K metrics at least one has in at most 1 − 0.9545^K (Šidák 1967), which is printed. Two stars: beyond what
would mark any of the K in 5 % of comparisons. Both hold for some 50 conversations or more on either side:
docs/deployment.md says how often with fewer.

Everything goes to X.monitor.json. --audit draws answers for a person to judge: lab/audit.py asks about them.
"""

import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.audit import audited, rows_of
from lab.chats import LEAST, LINES, compare, read_log, span
from lab.seeds import read_report
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_scalar
from nanoalign.expressions import parse_reward
from nanoalign.files import beside
from nanoalign.rewards import load_function, make_reward, score_texts
from nanoalign.rows import write_rows
from nanoalign.statistics import print_table
from nanoalign.terminal import visible
from nanoalign.training import setup


@dataclass
class Config:
    log: str = "chats.jsonl"  # what chat.py --log keeps; X.monitor.json goes beside it
    against: str = ""  # the log to compare with; empty: the first half of its own conversations
    reward: str = ""  # also this reward's scores: rm.pt, or an expression of such
    checks: str = ""  # also checks of your own: a Python file, which is run
    parts: int = 4  # of the log, in order, of as many conversations each
    audit: int = 0  # draw so many answers for a person to judge: X.audit.jsonl
    seed: int = 0  # of the draw
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=question,completion=answer

    def outputs(self) -> list[str]:
        return [str(beside(self.log, end)) for end in (".monitor.json", *[".audit.jsonl"] * (self.audit > 0))]


# ----------------------------------------------------------------------------------------------- the page


def words(metric: dict, name: str) -> str:
    """A metric that drifted, as a line."""
    (change, error), before, now = metric["change"], metric["before"][0], metric["now"][0]
    went = "rose" if change > 0 else "fell"
    return (
        f"{name} {went} by {abs(change):.3f} ± {error:.3f}, from {before:.3f} to {now:.3f} {metric['mark']}"
    )


def told(report: dict) -> list[str]:
    """What a report says in sentences."""
    chance, against = report["chance"], report["against"] or "the first half of the conversations"
    drifted = [words(metric, name) for name, metric in report["metrics"].items() if metric["mark"]]
    lines = [f"drifted against {against}: {'; '.join(drifted) or 'nothing'}"]
    if chance["metrics"]:
        stars = f"* beyond two standard errors, ** beyond {chance['two stars']:.2f}: where nothing moved"
        often = f"in at most {chance['any']:.0%} and 5% of comparisons"
        lines.append(f"{stars}, one or more of {chance['metrics']} metrics have them {often}")
    if report["least"] < 50:
        few = f"the smaller side has {report['least']} conversations"
        lines.append(f"{few}: below {LEAST} there is no error, below 50 chance gives more stars")
    thumbs = report["thumbs"]
    lines.append(f"thumbs: {thumbs['up']:,} up, {thumbs['down']:,} down, {thumbs['none']:,} answers without")
    if audit := report["audit"]:
        good, n = cell(audit["good"]), audit["judged"]
        lines.append(f"audit: {good} of {n} random answers are good, by a person's judgement")
    return lines


def section(path: str) -> dict:
    """X.monitor.json → what a page shows of it, as plain text: {"title", "header": [column…], "rows":
    [[metric, cell…]…], "meaning": {metric: text}, "notes": [sentence…]}."""
    report = undone({part: read_report(path, part, "a monitor's report: lab/monitor.py") for part in PARTS})
    try:
        header = ["", *columns(report)]
        rows = [
            [name, *map(cell, metric["parts"]), cell(metric["change"]) + metric["mark"]]
            for name, metric in report["metrics"].items()
        ]
        notes = told(report)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} cannot be read as a monitor's report: lab/monitor.py writes it.") from None
    meaning = {name: text for name, text in LINES.items() if name in report["metrics"]}
    name = f"After deployment: {report['answers']:,} answers in {report['conversations']:,} conversations"
    clean = [[visible(x) for x in row] for row in rows]
    texts = {"header": list(map(visible, header)), "rows": clean, "notes": list(map(visible, notes))}
    return {"title": visible(name), **texts, "meaning": meaning}


PARTS = (
    "log", "against", "answers", "conversations", "metrics", "parts", "chance", "least", "thumbs", "audit",
)  # fmt: skip


def undone(found):
    """null in a report → NaN in its numbers, (mean, error)."""
    if isinstance(found, dict):
        return {key: undone(value) for key, value in found.items()}
    if isinstance(found, list):
        return [math.nan if x is None else undone(x) for x in found]
    return found


def cell(value) -> str:
    value, error = value
    return "–" if math.isnan(value) else f"{value:.3f} ± {'–' if math.isnan(error) else f'{error:.3f}'}"


def columns(report: dict) -> list[str]:
    """The names of the parts of a log, by their first answer's time."""
    found = [re.match(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d)", part["from"] or "") for part in report["parts"]]
    names = [f"{i}: {when[1]} {when[2]}" if when else f"part {i}" for i, when in enumerate(found, 1)]
    return [*names, "change"]


def scorer(expression: str, device):
    """--reward → score(rows) → scores (N,); NaN where there is no room."""
    if not (models := [file for t in parse_reward(expression) if t.kind != "function" for file in t.files]):
        raise UserError(f"--reward {expression} names no checkpoint; functions of your own are for --checks.")
    tokenizer = load_scalar(models[0], device)[1]
    reward = make_reward(expression, tokenizer, device)

    def score(rows: list[dict]) -> np.ndarray:
        texts, ended = ([row["completion"] for row in rows], [row["meta"].get("ended", True) for row in rows])
        room = min(model.config.context for model in reward.held)
        found = score_texts(reward, rows, texts, tokenizer, room, device, "reward", ended).numpy()
        if missing := int(np.isnan(found).sum()):
            print(f"monitor: {missing:,} prompts leave no room in {room} tokens: no reward")
        return found

    return score


def draw(config: Config, talks: list) -> None:
    """Write answers for an audit, drawn from all that were shown; not over one that somebody has begun."""
    path = Path(beside(config.log, ".audit.jsonl"))
    shown = [row for talk in talks for row in talk if "held" not in row["meta"]]
    if not shown:
        print("monitor: every answer was held back: there is none to judge")
        return
    if path.exists():
        print(f"monitor: {path} is there already, and kept: move it away to draw another sample")
    else:
        drawn = random.Random(f"{config.seed}-audit").sample(shown, min(config.audit, len(shown)))
        write_rows(str(path), ({**row, "votes": []} for row in rows_of(drawn)))
    print(f"monitor: to judge them: python -m lab.audit --answers {path}")


def main(config: Config) -> None:
    if config.parts < 1:
        raise UserError("--parts must be at least 1.")
    device, autocast = setup(config)
    checks = load_function(f"{config.checks}:checks") if config.checks else None
    talks = read_log(config.log, config)
    reference = read_log(config.against, config) if config.against else None
    with autocast:
        score = scorer(config.reward, device) if config.reward else None
        report = compare(talks, reference, config.parts, checks, score)
    labels = [row["label"] for talk in talks for row in talk]
    report = {
        "log": config.log, "against": config.against, "answers": len(labels), "conversations": len(talks),
        **span(talks), **report, "reward": config.reward, "checks": config.checks,
        "least": len(talks) // 2 if reference is None else min(len(talks), len(reference)),
        "thumbs": {"up": labels.count(True), "down": labels.count(False), "none": labels.count(None)},
        "audit": audited(beside(config.log, ".audit.jsonl")),
    }  # fmt: skip
    table = [
        (name, [*metric["parts"], (*metric["change"], metric["mark"] or " ")])
        for name, metric in report["metrics"].items()
    ]
    print(f"monitor: {len(labels):,} answers in {len(talks):,} conversations; mean ± standard error")
    print_table(columns(report), table)
    print(visible("\n".join(told(report))))
    cli.write_json(config.outputs()[0], report)
    print(f"wrote {config.outputs()[0]}")
    if config.audit:
        draw(config, talks)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):  # the log may stand alone
        sys.argv.insert(1, "--log")
    cli.run(main, Config, __doc__)
