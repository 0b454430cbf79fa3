"""What stands between a model and the people who talk to it: a log of its answers, and a gate before them.

A row of the log is {"prompt", "completion", "meta"}, and the "label" of its thumb or else "unrated": true:
train_kto.py reads it as it is, and counts what is unrated. Its meta: "conversation", "turn", "time" (UTC),
"checkpoint", "ended", and of an answer that was held back and nobody has seen "held", the reason.
"""

import json
import math
import os
import re
import signal
import sys
import uuid
from collections.abc import Callable
from datetime import datetime, timezone

from torch import Tensor

from nanoalign import UserError
from nanoalign.expressions import NUMBER, parse_reward
from nanoalign.rewards import make_reward, score_texts
from nanoalign.terminal import visible


class Log:
    """The rows of a chat, at the end of a file ("": none is kept). The last one waits for its thumb until the
    next one, or the end. Each is one write: chats may share a file, and who reads it sees whole lines."""

    def __init__(self, path: str, checkpoint: str):
        self.checkpoint, self.waiting, self.turn = checkpoint, None, 0
        self.reset()
        if path and not path.endswith(".jsonl"):  # a checkpoint that --gate reads, say
            raise UserError(f"--log {path}: expected a name that ends in .jsonl.")
        self.file = open(path, "ab+", buffering=0) if path else None  # noqa: SIM115
        if path and self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a crash has cut the last line short: no other one goes with it
                self.file.write(b"\n")

    def __enter__(self) -> "Log":
        if self.file:
            print(visible(f"Answers are kept in {self.file.name}: /good and /bad rate the last one."))
        for name in ("SIGTERM", "SIGHUP") if self.file else ():  # the window is closed: the answer stays
            number = getattr(signal, name, None)  # Windows lacks one
            if number and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        return self

    def __exit__(self, *error) -> None:
        self.write()

    def reset(self) -> None:
        """Another conversation begins."""
        self.conversation = uuid.uuid4().hex

    def write(self) -> None:
        """Write what waits."""
        row, self.waiting = self.waiting, None
        line = json.dumps(row).encode() + b"\n"  # ASCII: no text in it drives the terminal that shows it
        if self.file and row and self.file.write(line) < len(line):
            raise UserError(f"{self.file.name}: no space is left, and its last line is cut short.")

    def add(self, prompt: list[dict], answer: str, ended: bool, held: str = "") -> None:
        """An answer, and why it was held back, if it was."""
        self.write()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        meta = {"conversation": self.conversation, "turn": self.turn, "time": now}
        meta |= {"checkpoint": self.checkpoint, "ended": ended, **({"held": held} if held else {})}
        self.waiting = {"prompt": list(prompt), "completion": answer, "unrated": True, "meta": meta}
        self.turn += 1

    def rate(self, good: bool) -> str:
        """Label the row that waits → what to tell who did it."""
        if not self.file:
            return "nothing is kept: start with --log chats.jsonl"
        if not self.waiting or "held" in self.waiting["meta"]:
            return "there is no answer to rate"
        self.waiting.pop("unrated", None)
        self.waiting["label"] = good
        return "kept as good" if good else "kept as bad"


def parse_gate(text: str) -> tuple[str, float | None]:
    """--gate → a reward expression, and the least score that passes; None: it says true of what does not."""
    expression, _, least = text.rpartition(":")
    if expression and re.fullmatch(f"[+-]?{NUMBER}", least) and math.isfinite(float(least)):
        return expression, float(least)
    if not re.search(r"\.py:\w", text) or [term.kind for term in parse_reward(text)] != ["function"]:
        raise UserError(f"--gate {text!r}: expected rm.pt:THRESHOLD, or file.py:function.")
    return text, None


def held_back(scores: Tensor, least: float | None) -> Tensor:
    """Which of these scores (N,) a gate does not let pass; NaN, of what has no room to be read, never."""
    return scores != 0 if least is None else ~(scores >= least)


def make_gate(text: str, tokenizer, device, context: int) -> Callable[[list[dict], str, bool], str]:
    """--gate → gate(prompt, answer, ended) → why the answer is held back, or "". It reads as many tokens of
    both as fit the shortest context, in fp32."""
    if not text:
        return lambda prompt, answer, ended: ""
    expression, least = parse_gate(text)
    reward = make_reward(expression, tokenizer, device)
    room = min([context, *(model.config.context for model in reward.held)])

    def gate(prompt: list[dict], answer: str, ended: bool) -> str:
        row = {"prompt": prompt, "meta": {}}
        score = score_texts(reward, [row], [answer], tokenizer, room, device, ended=[ended])
        why = f"{score.item():.2f} is less than {least:g}" if least is not None else "it says so"
        return visible(f"{text}: {why}") if held_back(score, least).item() else ""

    gate([{"role": "user", "content": "Hi"}], "Hi.", True)  # what it refuses, it refuses before the chat
    return gate
