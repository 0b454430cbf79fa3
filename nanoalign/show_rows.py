"""Which tokens of my rows are in the loss?

    python -m nanoalign.rows FILE
    python -m nanoalign.rows FILE --kind chat --tokenizer gpt2 --fields prompt=instruction,completion=output

The kind of a file's rows is recognised by their fields. The first ones are printed in full as the model reads
them, with the scored tokens in green, or ⟦so⟧ where there are no colours. The functions that make a training
script's examples make these, too.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from nanoalign import UserError, cli
from nanoalign.data import chat_examples, labelled_examples, pair_examples, prompt_examples
from nanoalign.messages import RowError, names_of
from nanoalign.rows import JSONL, PARSERS, numbered_lines, parse_fields, parse_json, read_rows, renamed
from nanoalign.steps import step_example
from nanoalign.terminal import visible
from nanoalign.tokenizer import Tokenizer, get_tokenizer


@dataclass
class Config:
    data: str = ""  # the file; its name may also stand alone, in front
    kind: str = ""  # text, chat, pairs, compared, labelled, steps or prompts; empty: by the fields
    tokenizer: str = "world"  # world, or the name of a tiktoken encoding
    fields: str = ""  # other field names: prompt=instruction,completion=output
    count: int = 3  # how many rows to print
    max_length: int = 0  # tokens: what a training script's --max-length leaves; 0: all, of a text 1,000
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


READERS = {  # kind → the fields that tell it, in this order, and who trains on it
    "compared": ({"votes"}, "collect.py's record, in no loss"),
    "steps": ({"completions"}, "train_prm.py: a label where each line ends"),
    "pairs": ({"chosen"}, {"responses"}, "train_dpo.py, train_orpo.py, train_rm.py at the last token"),
    "labelled": ({"label"}, "train_kto.py"),
    "chat": ({"messages"}, {"completion"}, {"question", "answer"}, "train_sft.py"),
    "prompts": ({"prompt"}, {"question"}, "train_ppo.py, train_grpo.py: answered, in no loss"),
    "text": ({"text"}, "train_pretrain.py"),
}


def recognise(row: dict) -> str:
    """A row → the first kind whose fields it has."""
    if any(isinstance(value, dict) and {"solution", "is_correct"} <= value.keys() for value in row.values()):
        return "labelled"  # GSM8K's model solutions
    for kind, (*signs, _) in READERS.items():
        if any(sign <= row.keys() for sign in signs):
            return kind
    known = " · ".join(sorted({field for *signs, _ in READERS.values() for sign in signs for field in sign}))
    raise RowError(f"no kind of rows has the fields {names_of(row)}: name some of {known} by --fields")


def kind_of(path: str, fields: str) -> str:
    """The kind of a file, by its first row."""
    if not path.lower().endswith(JSONL):
        return "text"
    number, line = numbered_lines(path)[0]
    try:
        return recognise(renamed(parse_json(line), parse_fields(fields)))
    except RowError as error:
        raise UserError(f"{path}, line {number}: {error} (--kind says which it is).") from None


def examples(kind: str, rows: list[dict], tokenizer: Tokenizer, length: int) -> Iterator[tuple]:
    """Rows → (row, what of it, ids, mask) as they are trained on."""
    if kind == "chat":
        kept = [row for row in rows if tokenizer.render(row["messages"])[1][:length].any()]
        for row, example in zip(kept, chat_examples(rows, tokenizer, length, "shown"), strict=True):
            yield row, "conversation", *example
    elif kind == "pairs":
        for sides, row in zip(*pair_examples(rows, tokenizer, length, "shown")):
            for side, example in zip(("chosen", "rejected"), sides):
                yield row, side, *example
    elif kind == "labelled":
        for example, row in zip(*labelled_examples(rows, tokenizer, length, "shown")):
            yield row, "thumb up" if row["label"] else "thumb down", *example
    elif kind == "steps":
        for row in rows:
            asked = tokenizer.prompt(row["prompt"])
            ids, marks, _ = step_example(asked, row["completions"], tokenizer, length)
            yield row, f"{len(row['completions'])} steps", ids, marks
    elif kind == "text":
        for row in rows:
            ids = np.array([*tokenizer.encode(row["text"]), tokenizer.end])[:length]
            yield row, "text", ids, np.ones(len(ids), bool)
    else:
        for row, ids in zip(*prompt_examples(rows, tokenizer, length)):
            yield row, "prompt", ids, np.zeros(len(ids), bool)


def marked(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, colours: bool) -> str:
    """Ids (T,) and mask (T,) → their text, runs of scored tokens marked."""
    before, after = ("\x1b[32m", "\x1b[0m") if colours else ("⟦", "⟧")
    parts = []
    for scored, run in groupby(zip(ids, mask), key=lambda token: token[1]):
        text = visible(tokenizer.decode([i for i, _ in run], specials=True))
        parts.append(f"{before}{text}{after}" if scored else text)
    return "".join(parts)


def main(config: Config) -> None:
    if not config.data:
        raise UserError("name a file: python -m nanoalign.rows FILE.")
    kind = config.kind or kind_of(config.data, config.fields)
    if kind not in PARSERS:
        raise UserError(f"--kind {kind} is unknown; choose from {', '.join(PARSERS)}.")
    tokenizer = get_tokenizer(config.tokenizer)
    rows = read_rows(config.data, kind, config.skip_bad_rows, config.fields)
    print(f"{visible(config.data)}: {len(rows):,} rows of kind {kind} ({READERS[kind][-1]})")
    length = config.max_length or (1000 if kind == "text" else 10**9)
    shown, colours = rows[: config.count], sys.stdout.isatty()
    for row, what, ids, mask in examples(kind, shown, tokenizer, length):
        number = next(i for i, other in enumerate(rows, 1) if other is row)
        print(f"\n── row {number}, {what}: {int(mask.sum()):,} of {len(ids):,} tokens scored ──")
        print(marked(ids, mask, tokenizer, colours))
        for field in {*row} & {
            "probability",
            "margin",
            "labels",
            "neutral",
            "label",
            "votes",
            "responses",
        }:
            print(visible(f"{field}: {row[field]}"))


def command() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    cli.run(main, Config, __doc__)
