"""Rows of all kinds, edited at random: each is read and made an example of, or refused in one sentence that
names its file and line. Nothing else may come out: no traceback, no row that the next stage dies of."""

import copy
import json

import numpy as np
import pytest
from test_data import GOOD

from lab.convert_steps import convert
from nanoalign import UserError
from nanoalign.data import place
from nanoalign.rows import NAMES, PARSERS, UNREAD, parse_prompt, read_rows
from nanoalign.show_rows import examples, marked, recognise
from nanoalign.terminal import visible
from nanoalign.tokenizer import get_tokenizer
from train_prm import UNLABELLED, step_examples

WORLD = get_tokenizer("world")
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "weight": 0}]
PRM800K = {
    "question": {"problem": "Q"},
    "label": {
        "steps": [
            {
                "completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": -1}],
                "chosen_completion": 0,
            },
            {"completions": [], "chosen_completion": None, "human_completion": {"text": "c", "rating": None}},
        ]
    },
}
SEEDS = [
    *(row for _, row, _ in GOOD),
    {"system": "Be brief.", "messages": [*MESSAGES, *MESSAGES], "label": True},
    {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 1}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "completion": [MESSAGES[1]]},
    {"prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"},
    {"question": "Hi", "6b": {"solution": "1\n2", "is_correct": True}},
    {"prompt": "Hi", "completions": ["a\n", "b"], "labels": [1, 0.5], "neutral": [0], "label": True},
    {"input": "Q Step 1: a ки\nStep 2: b ки", "label": "Q Step 1: a +\nStep 2: b -"},
    PRM800K,
]
STRINGS = (
    "", " ", "\n", "\0", "\x1b[2J", "\ufeff", "\u2028", "\u202e", "a" * 3000, " " * 60_000, "\n\nHuman: a",
    "Human: a\n\nAssistant:", "\n\nAssistant: ", "<|im_start|>", "<|end|>", "<|step|>", "ки", "Step 1:",
    "日本", "e\u0301", "🏳️‍🌈", "NaN", "null", "assistant", "system", "human", "text", "1", "\\ud800", "[", "{",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, 1.5, -0.0, 1e30, 1e31, -1e300, 1e308, 10**30, 2**63, 10**400, True, False)
DEEP = [
    open * n + close * n for open, close in ("[]", ('{"a":', "}")) for n in (330, 500, 900, 990, 1000, 3000)
]
RAW = (
    *DEEP,
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    '"\\ud800"',
    '"\\udc00\\ud800"',
    "1" * 5000,
    '"\t"',
    "01",
    "",
)


def some(rng, depth=0):
    """Any value of JSON."""
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind < 2:
        return rng.choice(STRINGS)
    if kind == 2:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice((None, [], {}, "Hi", MESSAGES, MESSAGES[0]))
    if kind == 4:
        return [some(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice((*NAMES, "role", "content", *STRINGS)): some(rng, depth + 1) for _ in range(3)}
    value = some(rng, depth + 1)
    for _ in range(rng.choice((1, 10, 100))):
        value = [value]
    return value


def places(value, path=()):
    """The paths of all values in a value of JSON."""
    yield path
    children = (
        enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def edited(rng, row: dict) -> dict:
    """The row with a value replaced, removed, doubled, renamed or put in from another row."""
    row = copy.deepcopy(row)
    if not row or rng.random() < 0.2:
        return {**row, rng.choice((*NAMES, *UNREAD, "votes", "ended", rng.choice(STRINGS))): some(rng)}
    if rng.random() < 0.2:
        return {**row, **dict(rng.sample(sorted(rng.choice(SEEDS).items()), 1))}
    path = rng.choice([path for path in places(row) if path])
    *parents, last = path
    inner = row
    for key in parents:
        inner = inner[key]
    what = rng.randrange(4)
    if what == 0:
        del inner[last]
    elif what == 1 and isinstance(inner, list):
        inner.insert(last, some(rng) if rng.random() < 0.5 else copy.deepcopy(inner[last]))
    elif what == 2 and isinstance(inner, dict):
        inner[rng.choice((*NAMES, "role", "content", "weight", "type"))] = inner.pop(last)
    else:
        inner[last] = some(rng)
    return row


def line(rng, row: dict) -> str:
    """The row as a line of JSON, at times a broken one."""
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(RAW) + text[at + rng.randrange(3) :]
    if rng.random() < 0.05:
        return text.replace('"Hi"', rng.choice(RAW))
    return text


@pytest.mark.parametrize("kind", [*PARSERS, "converted"])
def test_an_edited_row_is_read_or_refused_in_one_sentence(kind, fuzz, tmp_path, capsys):
    path, parse = str(tmp_path / "rows.jsonl"), convert if kind == "converted" else None
    kind = kind.replace("converted", "steps")
    seeds = [row for own, row, _ in GOOD if own == kind] + SEEDS
    read = refused = 0
    for rng in fuzz(60):
        row = rng.choice(seeds)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            row = edited(rng, row)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write("\n" + line(rng, row))
        names = rng.choice(("", "", "", "prompt=Hi", "prompt=question", "input=", "messages=,text=prompt"))
        try:
            rows = read_rows(path, kind, fields=names, parse=parse)
        except UserError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said and said.isprintable() and path in said and len(said) < 2000, said
            assert ", line 2: " in said or "JSON array" in said or "--fields" in said or "no usable" in said
            continue
        read += 1
        check(kind, rows)
        capsys.readouterr()
    assert read and refused


def check(kind: str, rows: list[dict]) -> None:
    """What was read goes through every function that makes examples of it."""
    json.dumps(rows, allow_nan=False)
    assert all(0 <= place(row) < 1 for row in rows)  # of the split
    if kind == "chat":  # train_sft.py shows answers to these
        assert all(parse_prompt(row) for row in rows if row["messages"][0]["role"] != "assistant")
    try:
        for _, _, ids, mask in examples(kind, rows, WORLD, 10**6):
            assert ids.dtype == np.int64 and mask.dtype == bool and len(ids) == len(mask)
            assert mask.any() == (kind not in ("prompts", "compared"))
            assert visible(text := marked(ids, mask, WORLD, False)) == text
        if kind == "steps":
            for how in ("good", "ignore"):
                for _, labels, _ in step_examples(rows, WORLD, 10**6, False, how):
                    known = labels[labels != UNLABELLED]
                    assert len(known) and (known >= 0).all() and (known <= 1).all()
    except UserError as error:
        assert str(error).startswith(("none of ", "no step of the")) and "\n" not in str(error)


def test_the_kind_of_any_row_is_recognised_or_refused(fuzz):
    for rng in fuzz(200):
        row = edited(rng, rng.choice(SEEDS))
        try:
            assert recognise(row) in PARSERS
        except ValueError as error:
            assert "no kind of rows" in str(error)
