"""The models of a folder, read once, on the CPU; and the prompts that they are asked."""

import contextlib
import functools
import io
from pathlib import Path

import torch
from torch import Tensor

from lab.sections.runs import POLICIES, STAGES
from nanoalign.checkpoint import load_policy, load_scalar
from nanoalign.data import split_rows
from nanoalign.rewards import make_reward, score_texts
from nanoalign.rollouts import respond
from nanoalign.rows import read_rows
from nanoalign.training import freeze
from nanoalign.world.judge import knows

ROOM = 8  # tokens that an answer is to have at least


def quietly(function, *arguments, **options):
    """What a function returns, without what it prints on the way."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **options)


class Models:
    """A folder's checkpoints by the names of STAGES."""

    def __init__(self, folder: Path, per_family: int = 2, seed: int = 0):
        self.folder, self.per_family, self.seed = folder, per_family, seed

    def path(self, name: str) -> Path:
        return self.folder / STAGES[name][0]

    def has(self, *names: str) -> bool:
        return all(self.path(name).is_file() for name in names)

    @functools.cached_property
    def policies(self) -> list[str]:
        return [name for name in POLICIES if self.has(name)]

    @functools.cache  # noqa: B019, a report makes one and ends
    def policy(self, name: str):
        """(model, tokenizer, is it a chat model?)"""
        model, tokenizer, content = quietly(load_policy, str(self.path(name)))
        return freeze(model), tokenizer, content["chat"], content

    @functools.cache  # noqa: B019
    def scalar(self, name: str):
        """(model, tokenizer, the rest of its checkpoint) of a reward or process model."""
        model, tokenizer, content = quietly(load_scalar, str(self.path(name)), "cpu", (name,))
        return freeze(model), tokenizer, content

    @functools.cache  # noqa: B019
    def reward(self):
        return quietly(make_reward, str(self.path("rm")), self.scalar("rm")[1], "cpu")

    def rows(self, name: str, kind: str) -> list[dict]:
        """The rows of a file of the folder; empty where there is none."""
        path = self.folder / name
        return quietly(read_rows, str(path), kind) if path.is_file() else []

    @functools.cached_property
    def held_out_pairs(self) -> list[dict]:
        rows = self.rows("pairs.jsonl", "pairs")
        return quietly(split_rows, rows, "pairs.jsonl")[1] if rows else []

    @functools.cached_property
    def prompts(self) -> list[dict]:
        """Held-out prompt rows that leave room to answer, so many of each family, families together."""
        families: dict[str, list[dict]] = {}
        for row in self.rows("world/prompts_held_out.jsonl", "prompts"):
            families.setdefault(family(row), []).append(row)
        return [row for rows in families.values() for row in filter(self.fits, rows[: self.per_family])]

    def fits(self, row: dict) -> bool:
        """Does a prompt leave room for an answer in every policy's context?"""
        for name in self.policies:
            model, tokenizer, chat, _ = self.policy(name)
            if len(tokenizer.prompt(row["prompt"], not chat)) > model.config.context - ROOM:
                return False
        return True

    def answers(self, name: str, rows: list[dict], tokens: int = 64) -> tuple[list[str], list[bool]]:
        """One sampled answer of a policy to each row, and whether it ended."""
        model, tokenizer, chat, _ = self.policy(name)
        asked = [tokenizer.prompt(row["prompt"], not chat) for row in rows]
        return quietly(respond, model, tokenizer, asked, tokens, self.seed)

    def scores(self, rows: list[dict], texts: list[str], ended: list[bool] | None = None) -> Tensor:
        """The reward model's scores of responses (N,); NaN where there is no room."""
        model, tokenizer, _ = self.scalar("rm")
        with torch.no_grad():
            length = model.config.context
            return quietly(score_texts, self.reward(), rows, texts, tokenizer, length, "cpu", ended=ended)


def family(row: dict) -> str:
    return str((row.get("meta") or {}).get("kind", "all"))


def judged(row: dict) -> bool:
    """Does the world's judge know this row?"""
    return knows({"prompt": row["prompt"], "meta": row.get("meta") or {}})


def last_words(row: dict) -> str:
    """What the person said last."""
    return row["prompt"][-1]["content"]
