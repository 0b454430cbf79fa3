"""Real preference pairs, short enough for a laptop; a quarter of the prompts is held out.

    python -m lab.real_rows --tokenizer out/real/smollm2.pt --out out/real/hh.jsonl    # and hh.held_out.jsonl

--rows names the file (Anthropic's HH transcripts, say); without one the harmless test pairs come from
`datasets` (pip install -e '.[hf]').
"""

import os
from dataclasses import dataclass

from nanoalign import UserError, cli
from nanoalign.checkpoint import load
from nanoalign.data import place
from nanoalign.files import beside
from nanoalign.hf import tokenizer_of
from nanoalign.rows import read_rows, write_rows

HUB = {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "split": "test"}


@dataclass
class Config:
    rows: str = ""  # pair rows; empty, or no such file: from the hub
    tokenizer: str = "out/real/smollm2.pt"  # the checkpoint whose tokens are counted
    max_length: int = 192  # of prompt and response together
    held_out: float = 0.25  # the share of prompts to measure on
    out: str = "out/real/hh.jsonl"  # the pairs to train on
    beside_out = (".held_out.jsonl",)


def from_hub(path: str) -> str:
    """Download the rows to `path`."""
    try:
        from datasets import load_dataset

        write_rows(path, load_dataset(**HUB))
    except ImportError:
        raise UserError(
            "there are no --rows here; to download some: .venv/bin/pip install -e '.[hf]'"
        ) from None
    except Exception as error:  # of the network, of the hub
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{HUB['path']} cannot be downloaded ({what}); name a file with --rows.") from None
    return path


def main(config: Config) -> None:
    path = config.rows if os.path.exists(config.rows) else from_hub(str(beside(config.out, ".hub.jsonl")))
    tokenizer = tokenizer_of(load(config.tokenizer))
    rows, parts = read_rows(path, "pairs", True), ([], [])
    for row in rows:
        longer = max(len(tokenizer.response(row[side])) for side in ("chosen", "rejected"))
        if len(tokenizer.prompt(row["prompt"])) + longer <= config.max_length:
            pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            parts[place(row) < config.held_out].append(pair)
    for name, part in zip((config.out, beside(config.out, ".held_out.jsonl")), parts):
        write_rows(name, part)
    train, held_out = map(len, parts)
    print(f"{train:,} pairs to train on, {held_out:,} held out; {len(rows) - train - held_out:,} too long")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
