"""You compare: two responses side by side at the terminal; every key is saved at once.

    python collect.py --annotator human --samples 2 --count 50 --out mine.jsonl     # samples the responses
    python -m lab.annotate --votes mine.votes.jsonl --out mine.jsonl                # and again, to go on
    python -m lab.annotate --votes mine.votes.jsonl --name ann --out mine.jsonl     # somebody else
    python collect.py --annotator rm:out/demo/rm.pt --resume --out mine.jsonl       # does the model agree?

Keys 1 and 2 choose a side, t is for a tie, s to skip, u to undo, q to leave. The sides are drawn at random,
and how they stood is recorded. When you leave, all votes so far, whoever's they are, decide the pairs, and it
is printed how far annotators agree (lab/agreement.py).
"""

import contextlib
import random
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

try:
    import termios
    import tty
except ImportError:  # Windows, whose terminal hands over lines
    termios = None

from collect import decide
from lab.agreement import report
from nanoalign import UserError, cli
from nanoalign.cli import duration
from nanoalign.rows import read_rows, write_rows
from nanoalign.terminal import visible


@dataclass
class Config:
    votes: str = "mine.votes.jsonl"  # comparisons, as collect.py writes them; the votes are added to it
    out: str = "mine.jsonl"  # pair rows
    name: str = ""  # who votes; recorded as human:NAME, without a name as human
    min_agreement: float = 0.0  # leave out pairs whose chosen side has a smaller share of the votes
    soft: bool = True  # that share is the label's "probability"; --no-soft: the majority's label, no ties
    seed: int = 0  # of the sides on which responses stand

    also_written = ("votes",)


KEYS = {"1": "left", "2": "right", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
LEFT = {"1": 1.0, "2": 0.0, "t": 0.5, "s": None}  # what a key says of the left response: P(it is better)


def annotate(comparisons: list[dict], name: str, save: Callable[[], None], seed: int = 0) -> None:
    """Ask for `name`'s vote on every comparison that lacks it, in order, and `save()` after every key.

    A vote is {"annotator": name, "p": 1, 0, 1/2 or null (skipped) for the first of the responses, "swapped":
    whether that one stood on the right}; the sides are drawn at random.
    """
    start, given = time.monotonic(), 0

    def swapped(at: int) -> bool:
        return random.Random(f"{seed}-{name}-{at}").random() < 0.5

    def show(at: int, done: int) -> str:
        N, pace = len(comparisons), (time.monotonic() - start) / max(1, given)  # seconds a vote
        left = f"  {duration(pace * (N - done))} left" if given else ""
        return f"  {done / N:.0%}{left}\n{question(comparisons[at], swapped(at))}"

    def vote(at: int, key: str) -> dict:
        nonlocal given
        given += 1
        p = LEFT[key] if not swapped(at) or LEFT[key] is None else 1 - LEFT[key]
        return {"p": p, "swapped": swapped(at)}

    ask_all(comparisons, name, "comparisons", "vote", KEYS, show, vote, save)


def ask_all(
    items: list[dict], name: str, things: str, noun: str, keys: dict[str, str],
    show: Callable[[int, int], str], vote: Callable[[int, str], dict], save: Callable[[], None],
) -> None:  # fmt: skip
    """Ask for `name`'s vote on every item that lacks it, in order, and `save()` after every key.

    things, noun: what items and votes are called; keys: what each is called, "u" and "q" the last of them;
    show(i, how many are done) → what follows on an item's number; vote(i, key) → the vote but for its name.
    "u" takes the last one back, also one of an earlier session; "q", Ctrl-C and the end of the input leave.
    """
    with single_keys(), contextlib.suppress(KeyboardInterrupt):
        while True:
            voted = [any(own["annotator"] == name for own in item["votes"]) for item in items]
            done = sum(voted)
            if done < len(voted):
                at = voted.index(False)
                print(f"\n─── {done + 1:,} of {len(voted):,}{show(at, done)}")
            else:
                print(f"\nall {done:,} {things} have your {noun}")
            match key := ask("".join(keys) if done < len(voted) else "uq", keys):
                case "q":
                    return
                case "u" if not done:
                    print(f"there is no {noun} to take back")
                case "u":
                    last = items[max(i for i, has in enumerate(voted) if has)]
                    last["votes"] = [own for own in last["votes"] if own["annotator"] != name]
                case _:
                    items[at]["votes"].append({"annotator": name, **vote(at, key)})
            save()


def question(comparison: dict, swapped: bool) -> str:
    """The conversation, and below it the two responses side by side."""
    asked = "\n".join(f"{m['role']}: {visible(m['content'])}" for m in comparison["prompt"])
    column = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    sides = []
    for text, ended in zip(comparison["responses"], comparison["ended"]):
        text = visible(text) + ("" if ended else " […]")
        sides.append([line for part in text.split("\n") for line in textwrap.wrap(part, column) or [""]])
    rows = zip_longest(["1", *sides[swapped]], ["2", *sides[not swapped]], fillvalue="")
    return asked + "\n\n" + "\n".join(f"{left:<{column}} │ {right}" for left, right in rows)


def ask(keys: str, names: dict[str, str]) -> str:
    """The next of these keys: a key of a terminal, a line (the key or its name) of anything else."""
    print("  ".join(f"{key} {names[key]}" for key in keys), end="  > ", flush=True)
    while True:
        typed = sys.stdin.read(1) if sys.stdin.isatty() and termios else sys.stdin.readline()
        word = typed.strip().lower() if typed not in ("", "\x04") else "q"
        for key in keys:
            if word in (key, names[key]):
                print(names[key])
                return key
        print(f"{visible(word)!r} is none of these keys", end="  > ", flush=True)


@contextlib.contextmanager
def single_keys():
    """While this lasts a terminal hands over each key at once, without Enter."""
    if not (sys.stdin.isatty() and termios):
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def autosave(path: Path) -> Callable[[list[dict]], None]:
    """→ save(rows), which writes them to `path`, whole or not at all.

    The file must be as this process last left or found it: two people who vote on one file at the same time
    would undo each other's votes.
    """

    def state() -> tuple[int, int]:
        return path.stat().st_ino, path.stat().st_mtime_ns

    def save(rows: list[dict]) -> None:
        nonlocal seen
        if seen != state():
            raise UserError(f"{path} was changed by another run: one at a time. The same command goes on.")
        write_rows(str(path), rows)
        seen = state()

    seen = state()
    return save


def main(config: Config) -> None:
    if not sys.stdin:
        raise UserError("there is nobody to ask: standard input is closed.")
    if config.min_agreement > 1:
        raise UserError(f"--min-agreement {config.min_agreement} is a share of votes: at most 1.")
    who = f"human:{config.name}" if config.name else "human"
    comparisons = read_rows(config.votes, "compared")
    save = autosave(Path(config.votes))
    annotate(comparisons, who, lambda: save(comparisons), config.seed)
    votes = [[vote["annotator"] for vote in c["votes"]] for c in comparisons]
    if any(votes):
        report(comparisons)
    if pending := sum(who not in names for names in votes):
        print(f"annotate: {pending:,} pairs wait in {config.votes}: the same command goes on with them")
    pairs = decide(comparisons, config.min_agreement, config.soft)
    if pairs:
        write_rows(config.out, pairs)
        print(f"annotate: labels of {len(pairs):,} of {len(comparisons):,} pairs → {config.out}")


if __name__ == "__main__":
    if sys.stdin:  # None where it is closed
        sys.stdin.reconfigure(errors="replace")  # a terminal may send what is not UTF-8
    cli.run(main, Config, __doc__)
