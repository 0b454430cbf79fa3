"""JSONL files → validated rows.

    python -m nanoalign.rows FILE                # what kind of rows is it, and which tokens are in the loss?

The kinds of rows, and the forms each accepts. A prompt is a string or messages (nanoalign/messages.py says
what they may be); any row may carry a "system" message to come first, and "meta".

    text      {"text"} or a plain text file
    chat      {"messages"}, of which an assistant's may have a "weight" of 0: not learnt from ·
              {"prompt", "completion"} · GSM8K's {"question", "answer"} · a pair's chosen side
    pairs     {"prompt", "chosen", "rejected"}, strings, or sides of messages that go on after the prompt or
              repeat it · {"chosen", "rejected"}, messages or HH transcripts; optionally a "margin", and as a
              soft label the "probability" that chosen is better; 0.5: a tie · {"prompt", "responses": [str…]}
              with a "ranking" (1 = best) or "scores" (such as Likert's), a row per pair of them
    compared  {"prompt", "responses": [a, b], "ended": [bool, bool], "votes": [{"annotator", "p"}…]}, p the
              probability that a is better, 0.5 for a tie, null for a skipped one: collect.py's record
    labelled  {"prompt", "completion", "label": bool} · {"messages", "label"}, of the last message · a pair,
              as one row up and one down · GSM8K's model solutions {"question", NAME: {"solution",
              "is_correct"}}, a row per solution; "unrated": true in place of a label is left out, and counted
    steps     {"prompt", "completions": [str…], "labels": [bool|probability|null…]}, optionally "label": bool,
              of the final answer, and "neutral": [number of a step, from 0…]; lab/convert_steps.py makes such
              rows of PRM800K's, Math-Shepherd's and labelled ones
    prompts   {"prompt"} · {"question"} · whatever a chat or pair row starts with; its "answer" goes into meta

A field that is null is not there. Other names: --fields prompt=instruction,completion=output. What may change
a row's meaning and is not read (`UNREAD`) is refused; docs/data.md shows how such rows are converted.
"""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from nanoalign import UserError
from nanoalign.files import writing
from nanoalign.messages import (
    RowError,
    asked,
    assistant,
    conversations,
    names_of,
    one_of,
    read,
    read_prompt,
    read_response,
    read_side,
    read_talk,
    with_system,
)

UNREAD = (
    "input", "instruction", "context", "history", "system_prompt", "conversation", "conversations", "tools",
    "functions", "image", "images", "videos", "audio", "documents", "unrated",
)  # fmt: skip
NAMES = (  # what --fields may give another name to
    "text", "messages", "system", "prompt", "completion", "question", "answer", "chosen", "rejected",
    "margin", "probability", "responses", "ranking", "scores", "label", "completions", "labels", "neutral",
    "meta",
)  # fmt: skip
JSONL = (".jsonl", ".json", ".ndjson", ".jsonlines")


def named_once(fields: list[tuple]) -> dict:
    row = dict(fields)
    if len(row) < len(fields):
        raise RowError("a field is there twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=named_once)


def parse_json(line: str) -> dict:
    """A line → an object of valid Unicode."""
    try:
        row = DECODER.decode(line)
        spelt = json.dumps(row, ensure_ascii=False) if "\\ud" in line.lower() else ""
    except (ValueError, RecursionError) as error:  # malformed, a number of too many digits, nested too deeply
        raise RowError(f"not valid JSON ({getattr(error, 'msg', error)})") from None
    if re.search(r"[\ud800-\udfff]", spelt):
        raise RowError("a \\ud… escape is half of a character: not valid Unicode")
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {line[:40]!r}")
    return row


def parse_fields(text: str) -> dict[str, str]:
    """--fields "prompt=instruction,completion=output" → {"prompt": "instruction", …}; "" as the second name
    says that a field is to be ignored."""
    names = {}
    for part in filter(None, text.split(",")):
        ours, equals, theirs = (name.strip() for name in part.partition("="))
        if not equals or ours not in (*NAMES, *UNREAD) or ours in names:
            known = f"expected ours=theirs,…, each of ours once, of {', '.join(NAMES)}"
            raise UserError(f"--fields {text!r}: {part!r} is not understood; {known}.")
        names[ours] = theirs
    return names


def renamed(row: dict, names: dict[str, str]) -> dict:
    """The row with its fields under the names that are read here, without those that are null."""
    given = {ours: theirs for ours, theirs in names.items() if not theirs or theirs in row}
    kept = {field: row[field] for field in row if field not in given and field not in given.values()}
    kept |= {ours: row[theirs] for ours, theirs in given.items() if theirs}
    return {field: value for field, value in kept.items() if value is not None}


def check_unread(row: dict) -> None:
    for field in UNREAD:
        if row.get(field):
            how = f"name it by --fields, write it into the prompt, or ignore it by --fields {field}="
            raise RowError(f'field "{field}" is not read, and may change what the row means: {how}')
    if row.get("weight", 1) != 1:
        raise RowError('field "weight": rows have no weight (an assistant\'s message may have one, 0 or 1)')


def read_meta(row: dict) -> dict:
    return read(row, "meta", "an object", {})


def parse_pair(row: dict) -> dict:
    """→ {"prompt": messages, "chosen": str, "rejected": str, "meta"}, and "margin" and "probability" if the
    row has them. A row whose rejected side is the likelier one is turned round."""
    has_prompt = "prompt" in row or "question" in row
    prompt = read_prompt({**row, "system": ""}) if has_prompt else []
    sides = conversations(prompt, [read_side(row, field) for field in ("chosen", "rejected")])
    for field, side in zip(("chosen", "rejected"), sides):
        if len(side) < 2 or side[-1]["role"] != "assistant":
            raise RowError(f'field "{field}": expected to end with an assistant message after a prompt')
    if sides[0][:-1] != sides[1][:-1]:
        what = "the same prompt, differing only in the last message"
        raise RowError(f'fields "chosen" and "rejected": expected {what}')
    if sides[0][-2]["role"] == "assistant":
        what = "one message of the assistant after a prompt, not two"
        raise RowError(f'fields "chosen" and "rejected": expected {what}')
    soft = {"margin": read(row, "margin", "a number", 0.0)}
    soft["probability"] = read(row, "probability", "a number from 0 to 1", 1.0)
    chosen, rejected = (side[-1]["content"] for side in sides)
    if soft["probability"] < 0.5:
        chosen, rejected = rejected, chosen
        soft = {"margin": -soft["margin"], "probability": 1 - soft["probability"]}
    prompt = with_system(row, sides[0][:-1])
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "meta": read_meta(row)}
    return {**pair, **{name: value for name, value in soft.items() if name in row}}


def parse_pairs(row: dict) -> list[dict]:
    """→ rows of `parse_pair`: one, or of K responses with a ranking or scores (null: none) all K(K−1)/2."""
    one_of(row, "chosen", "responses")
    if "responses" not in row:
        return [parse_pair(row)]
    one_of(row, "ranking", "scores")
    responses = read(row, "responses", "a list of strings")
    field = "ranking" if "ranking" in row else "scores"
    values = read(row, field, "a list of numbers or null")
    if len(values) != len(responses):
        raise RowError(f'fields "responses" and "{field}": {len(responses)} responses, {len(values)} values')
    shared, pairs = {"prompt": read_prompt(row), "meta": read_meta(row)}, []
    rated = [(value, text) for value, text in zip(values, responses) if value is not None]
    for one, other in combinations(rated, 2):
        best, worst = (one, other) if (one[0] > other[0]) == (field == "scores") else (other, one)
        tie = {"probability": 0.5} if one[0] == other[0] else {}
        pairs.append(parse_pair({**shared, "chosen": best[1], "rejected": worst[1], **tie}))
    return pairs


def parse_compared(row: dict) -> dict:
    """→ {"prompt": messages, "responses": [str, str], "ended": [bool, bool], "votes": [vote…], "meta"}."""
    read(row, "responses", "a list of two strings")
    read(row, "ended", "a list of two of true or false")
    read(row, "votes", 'a list of {"annotator": string, "p": number from 0 to 1 or null}')
    kept = {field: row[field] for field in ("responses", "ended", "votes")}
    return {"prompt": read_prompt(row), **kept, "meta": read_meta(row)}


def parse_chat(row: dict) -> dict:
    """→ {"messages", "meta"}, with at least one assistant turn to learn from."""
    one_of(row, "messages", "completion")
    if "question" in row:
        one_of(row, "answer", "completion")
    if "messages" in row:
        messages = read_talk(row, weighted=True)
    elif "chosen" in row:
        pair = parse_pair(row)
        messages = [*pair["prompt"], assistant(pair["chosen"])]
    else:
        said = "answer" if "question" in row else "completion"
        messages = [*read_prompt(row), assistant(read_response(row, said))]
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise RowError('field "messages": expected at least one assistant message to learn from')
    if row.get("label") is False:
        what = "expected an answer to imitate (--fields label= takes it for one)"
        raise RowError(f'field "label": false, a thumb down; {what}')
    return {"messages": messages, "meta": read_meta(row)}


def parse_labelled(row: dict) -> list[dict]:
    """→ rows {"prompt": messages, "completion": str, "label": bool, "meta"}, of a pair with the "probability"
    that it is right, if that is given; of a tie none."""
    one_of(row, "messages", "completion", "chosen")
    one_of(row, "label", "chosen", "unrated")
    if "chosen" in row:
        pair = parse_pair(row)
        shared = {name: pair[name] for name in ("prompt", "meta", "probability") if name in pair}
        sides = [] if pair.get("probability") == 0.5 else (("chosen", True), ("rejected", False))
        return [{**shared, "completion": pair[side], "label": label} for side, label in sides]
    if "messages" in row:
        *prompt, last = read_talk(row)
        if not prompt or last["role"] != "assistant":
            raise RowError('field "messages": expected a prompt and, at the end, the assistant\'s message')
        prompt, said = asked(prompt, "messages"), last["content"]
    elif "completion" not in row and "question" in row:
        verdicts = [v for v in row.values() if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()]
        if not verdicts:
            raise RowError('expected a {"solution", "is_correct"} of some model beside the "question"')
        shared = {"prompt": read_prompt(row), "meta": read_meta(row)}
        sides = [{"completion": v["solution"], "label": v["is_correct"]} for v in verdicts]
        return [one for side in sides for one in parse_labelled({**shared, **side})]
    else:
        said, prompt = read_response(row, "completion"), read_prompt(row)
    if read(row, "unrated", "true or false", False):
        return []
    label, meta = read(row, "label", "true or false"), read_meta(row)
    return [{"prompt": prompt, "completion": said, "label": label, "meta": meta}]


def parse_steps(row: dict) -> dict:
    """→ {"prompt": messages, "completions": [str], "labels": [P(it is right) | None], "meta"}, and if given
    "label" (bool, of the final answer) and "neutral" (numbers of steps that are neither right nor wrong)."""
    if "completions" not in row:
        how = "`python -m lab.convert_steps --data X --out Y` makes rows of steps of other formats"
        raise RowError(f'expected "completions", the steps, found only the fields {names_of(row)}; {how}')
    steps = read(row, "completions", "a list of strings")
    labels = read(row, "labels", "a list of true, false, a probability or null")
    if not steps or len(steps) != len(labels):
        raise RowError(f'fields "completions" and "labels": {len(steps)} steps but {len(labels)} labels')
    read(row, "label", "true or false", True)
    if any(number >= len(steps) for number in read(row, "neutral", "a list of numbers of steps", [])):
        raise RowError(f'field "neutral": expected numbers of the {len(steps)} steps, from 0')
    labels = [None if x is None else float(x) for x in labels]
    more = {name: row[name] for name in ("label", "neutral") if name in row}
    prompt, meta = read_prompt(row), read_meta(row)
    return {"prompt": prompt, "completions": steps, "labels": labels, "meta": meta, **more}


def parse_prompt(row: dict) -> dict:
    """→ {"prompt": messages ending with the user, "meta"}. The row's "answer" goes into meta."""
    if "chosen" in row:
        prompt = parse_pair(row)["prompt"]
    elif "messages" in row:
        prompt = [{"role": m["role"], "content": m["content"]} for m in read_talk(row, weighted=True)]
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if not prompt:
            raise RowError("expected a prompt before the first assistant message")
    else:
        prompt = read_prompt(row)
    gold = {"answer": row["answer"]} if "answer" in row else {}
    return {"prompt": prompt, "meta": {**gold, **read_meta(row)}}


PARSERS = {  # a row of JSON → a row, or a list of them
    "text": lambda row: {"text": read(row, "text", "a string")},
    "chat": parse_chat,
    "pairs": parse_pairs,
    "compared": parse_compared,
    "labelled": parse_labelled,
    "steps": parse_steps,
    "prompts": parse_prompt,
}


def read_text(path: str) -> str:
    """A file's content; a byte-order mark is no part of it."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path, or run `make demo` first.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty; expected rows.")
    return content


def numbered_lines(path: str) -> list[tuple[int, str]]:
    """The lines of a file of rows that are not blank, counted from 1."""
    content = read_text(path)
    if content.lstrip().startswith("["):
        how = "`jq -c '.[]' OLD > NEW` writes it so"
        raise UserError(f"{path} is a JSON array; expected one object a line ({how}).")
    return [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]


def read_rows(
    path: str, kind: str, skip_bad_rows: bool = False, fields: str = "", parse: Callable | None = None
) -> list[dict]:
    """Every row of a JSONL file, validated as `kind` (see the module's docstring). "text" also reads plain
    text. fields: other names (`parse_fields`). parse: a parser of one's own instead of the kind's.

    Raises UserError naming file, line, field and what was expected; `skip_bad_rows` drops and counts.
    """
    names = parse_fields(fields)
    if kind == "text" and not path.lower().endswith(JSONL):
        return [{"text": read_text(path)}]
    rows, bad, none, unseen = [], 0, 0, set(filter(None, names.values()))
    lines = numbered_lines(path)
    for number, line in lines:
        try:
            row = parse_json(line)
            unseen -= row.keys()
            row = renamed(row, names)
            parsed = (parse or PARSERS[kind])(row)
            if not parse and kind != "text" and parsed != []:
                check_unread(row)
            rows += parsed if isinstance(parsed, list) else [parsed]
            none += parsed == []
        except RowError as error:
            bad += 1
            if not skip_bad_rows:
                text = f"{path}, line {number}: {error}. (--skip-bad-rows drops such rows.)"
                raise UserError(text) from None
    if unseen:
        raise UserError(f"--fields {fields!r}: no row of {path} has a field {sorted(unseen)[0]!r}.")
    if bad:
        print(f"data: {path}: skipped {bad} bad rows of {len(lines)}")
    if none:
        print(f"data: {path}: {none} rows (ties, unrated or for quality control) were left out")
    if not rows:
        raise UserError(f"{path} has no usable row of kind {kind!r}.")
    return rows


def write_rows(path: str, rows) -> None:
    """Write rows as JSONL, whole or not at all."""
    with writing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    from nanoalign.show_rows import command  # here, for it imports this module

    command()
