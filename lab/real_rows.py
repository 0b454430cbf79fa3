"""Real preference pairs, short enough for a laptop, a quarter of the prompts held out; and real questions.

    python -m lab.real_rows --tokenizer out/real/smollm2.pt --out out/real/hh.jsonl
    # also writes hh.held_out.jsonl and hh.questions.jsonl

--pairs and --questions name files (Anthropic's HH transcripts, GSM8K's test rows). Where there is none, rows
come from the hub by `datasets` (pip install -e '.[hf]').
"""

import os
from dataclasses import dataclass

from nanoalign import UserError, cli
from nanoalign.checkpoint import load
from nanoalign.data import place
from nanoalign.files import beside
from nanoalign.hf import tokenizer_of
from nanoalign.rows import read_rows, write_rows

HUB = {
    "pairs": {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "split": "test"},
    "questions": {"path": "openai/gsm8k", "name": "main", "split": "test"},
}


@dataclass
class Config:
    pairs: str = ""  # pair rows; empty, or no such file: from the hub
    questions: str = ""  # prompt rows, likewise
    count: int = 0  # how many of the pairs; 0: all
    asked: int = 100  # how many of the questions
    tokenizer: str = "out/real/smollm2.pt"  # the checkpoint whose tokens are counted
    max_length: int = 192  # of prompt and response together
    held_out: float = 0.25  # the share of prompts to measure on
    out: str = "out/real/hh.jsonl"  # the pairs to train on
    beside_out = (".held_out.jsonl", ".questions.jsonl")


def rows_of(kind: str, config: Config) -> list[dict]:
    """Of the file that is named, else of the hub."""
    path = getattr(config, kind)
    if not os.path.exists(path):
        path = str(beside(config.out, f".{kind}.hub.jsonl"))
        try:
            from datasets import load_dataset

            write_rows(path, load_dataset(**HUB[kind]))
        except ImportError:
            how = "to download some: .venv/bin/pip install -e '.[hf]'"
            raise UserError(f"there are no --{kind} here; {how}") from None
        except Exception as error:  # of the network, of the hub
            what = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            name = HUB[kind]["path"]
            raise UserError(f"{name} cannot be downloaded ({what}); name a file with --{kind}.") from None
    return read_rows(path, "pairs" if kind == "pairs" else "prompts", True)


def main(config: Config) -> None:
    tokenizer = tokenizer_of(load(config.tokenizer))
    rows, parts = rows_of("pairs", config)[: config.count or None], ([], [])
    for row in rows:
        longer = max(len(tokenizer.response(row[side])) for side in ("chosen", "rejected"))
        if len(tokenizer.prompt(row["prompt"])) + longer <= config.max_length:
            pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            parts[place(row) < config.held_out].append(pair)
    for name, part in zip((config.out, beside(config.out, ".held_out.jsonl")), parts):
        write_rows(name, part)
    asked = [{"prompt": row["prompt"]} for row in rows_of("questions", config)[: config.asked]]
    write_rows(beside(config.out, ".questions.jsonl"), asked)
    train, held_out = map(len, parts)
    print(f"{train:,} pairs to train on, {held_out:,} held out; {len(rows) - train - held_out:,} too long")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
