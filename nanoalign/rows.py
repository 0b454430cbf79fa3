"""JSONL files → validated rows.

The kinds of rows, and the forms each accepts (any row may carry "meta"):

    text      {"text"} or a plain text file
    chat      {"messages"} · {"prompt", "completion"} · GSM8K's {"question", "answer"} · a pair's chosen side
    pairs     {"prompt", "chosen", "rejected"}, strings or messages · HH transcripts {"chosen", "rejected"};
              optionally a "margin", and as a soft label the "probability" that chosen is better; 0.5: a tie ·
              {"prompt", "responses": [str…]} with a "ranking" (1 = best) or "scores" (such as Likert's) of
              the responses, a row per pair of them
    compared  {"prompt", "responses": [a, b], "ended": [bool, bool], "votes": [{"annotator", "p"}…]}, p the
              probability that a is better, 0.5 for a tie, null for a skipped one: collect.py's record
    labelled  {"prompt", "completion", "label": bool} · a pair, as one row up and one down · GSM8K's model
              solutions {"question", NAME: {"solution", "is_correct"}}, a row per solution
    steps     {"prompt", "completions": [str…], "labels": [bool|probability|null…]}, optionally "label": bool,
              of the final answer, and "neutral": [number of a step, from 0…]; lab/convert_steps.py makes such
              rows of PRM800K's, Math-Shepherd's and labelled ones
    prompts   {"prompt"} as a string or messages · {"question"} · whatever a chat or pair row starts with
"""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from nanoalign import UserError
from nanoalign.tokenizer import ROLES


class RowError(ValueError):
    """What is wrong with one row: the field, and what was expected."""


def parse_json(line: str) -> dict:
    """A line → an object of valid Unicode."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, a number of too many digits, nested too deeply
        raise RowError(f"not valid JSON ({getattr(error, 'msg', error)})") from None
    if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise RowError("a \\ud… escape is half of a character: not valid Unicode")
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {line[:40]!r}")
    return row


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= 1e300


def is_share(x) -> bool:
    return is_number(x) and 0 <= x <= 1


def is_vote(x) -> bool:
    good = isinstance(x, dict) and isinstance(x.get("annotator"), str) and "p" in x
    return good and (x["p"] is None or is_share(x["p"])) and isinstance(x.get("swapped", False), bool)


def each(good: type | Callable, count: int = 0) -> Callable:
    """Is something a list, every value of which is good, and are there `count`? (0: any number.)"""
    fits = (lambda x: isinstance(x, good)) if isinstance(good, type) else good
    return lambda x: isinstance(x, list) and all(map(fits, x)) and len(x) == (count or len(x))


FIELDS = {  # what a field is expected to be, in the words of the error
    "a string": lambda x: isinstance(x, str),
    "a string or a list of messages": lambda x: isinstance(x, (str, list)) and x != [],
    "an object": lambda x: isinstance(x, dict),
    "true or false": lambda x: isinstance(x, bool),
    "a number": is_number,
    "a number from 0 to 1": is_share,
    "a list of strings": each(str),
    "a list of numbers or null": each(lambda x: x is None or is_number(x)),
    "a list of two strings": each(str, 2),
    "a list of two of true or false": each(bool, 2),
    'a list of {"annotator": string, "p": number from 0 to 1 or null}': each(is_vote),
    "a list of true, false, a probability or null": each(lambda x: x in (None, True, False) or is_share(x)),
    "a list of numbers of steps": each(int),
}


def read(row: dict, field: str, what: str, otherwise=None):
    """The field's value, if it is what it should be; `otherwise` where there is none."""
    value = row.get(field, otherwise)
    if not FIELDS[what](value):
        found = json.dumps(row[field])[:60] if field in row else f"only the fields {sorted(row)}"
        raise RowError(f'field "{field}": expected {what}, found {found}')
    return value


def read_meta(row: dict) -> dict:
    return read(row, "meta", "an object", {})


def read_messages(row: dict, field: str) -> list[dict]:
    """A list of messages with role and content; a plain string is one user message."""
    value = read(row, field, "a string or a list of messages")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    for i, message in enumerate(value):
        good = isinstance(message, dict) and message.get("role") in ROLES
        if not good or not isinstance(message.get("content"), str):
            what = f'{{"role": {"|".join(ROLES)}, "content": string}}'
            raise RowError(f'field "{field}", message {i}: expected {what}, found {json.dumps(message)[:60]}')
    return [{"role": m["role"], "content": m["content"]} for m in value]


def read_side(row: dict, field: str) -> list[dict]:
    """One side of a pair: a response, messages, or Anthropic HH's "\\n\\nHuman: …\\n\\nAssistant: …"."""
    if isinstance(row.get(field), list):
        return read_messages(row, field)
    text = read(row, field, "a string")
    if "prompt" in row:
        return [{"role": "assistant", "content": text}]
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 5 or pieces[0].strip():
        what = '"\\n\\nHuman: …\\n\\nAssistant: …" (the row has no "prompt")'
        raise RowError(f'field "{field}": expected {what}')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(pieces[1::2], pieces[2::2])]


def parse_pair(row: dict) -> dict:
    """→ {"prompt": messages, "chosen": str, "rejected": str, "meta"}, and "margin" and "probability" if the
    row has them. A row whose rejected side is the likelier one is turned round."""
    prompt = read_messages(row, "prompt") if "prompt" in row else []
    sides = [prompt + read_side(row, field) for field in ("chosen", "rejected")]
    if prompt and all(side[: 2 * len(prompt)] == prompt * 2 for side in sides):  # each repeats the prompt
        sides = [side[len(prompt) :] for side in sides]
    for field, side in zip(("chosen", "rejected"), sides):
        if len(side) < 2 or side[-1]["role"] != "assistant":
            raise RowError(f'field "{field}": expected to end with an assistant message after a prompt')
    if sides[0][:-1] != sides[1][:-1]:
        what = "the same prompt, differing only in the last message"
        raise RowError(f'fields "chosen" and "rejected": expected {what}')
    soft = {"margin": read(row, "margin", "a number", 0.0)}
    soft["probability"] = read(row, "probability", "a number from 0 to 1", 1.0)
    chosen, rejected = (side[-1]["content"] for side in sides)
    if soft["probability"] < 0.5:
        chosen, rejected = rejected, chosen
        soft = {"margin": -soft["margin"], "probability": 1 - soft["probability"]}
    pair = {"prompt": sides[0][:-1], "chosen": chosen, "rejected": rejected, "meta": read_meta(row)}
    return {**pair, **{name: value for name, value in soft.items() if name in row}}


def parse_pairs(row: dict) -> list[dict]:
    """→ rows of `parse_pair`: one, or of K responses with a ranking or scores (null: none) all K(K−1)/2."""
    if "responses" not in row:
        return [parse_pair(row)]
    responses = read(row, "responses", "a list of strings")
    field = "ranking" if "ranking" in row else "scores"
    values = read(row, field, "a list of numbers or null")
    if len(values) != len(responses):
        raise RowError(f'fields "responses" and "{field}": {len(responses)} responses, {len(values)} values')
    shared, pairs = {"prompt": read_messages(row, "prompt"), "meta": read_meta(row)}, []
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
    return {"prompt": read_messages(row, "prompt"), **kept, "meta": read_meta(row)}


def parse_chat(row: dict) -> dict:
    """→ {"messages", "meta"}, with at least one assistant turn to learn from."""
    if "messages" in row:
        messages = read_messages(row, "messages")
    elif "chosen" in row:
        pair = parse_pair(row)
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    else:
        asked, said = ("question", "answer") if "question" in row else ("prompt", "completion")
        prompt = read_messages(row, asked)
        messages = [*prompt, {"role": "assistant", "content": read(row, said, "a string")}]
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError('field "messages": expected at least one assistant message to learn from')
    return {"messages": messages, "meta": read_meta(row)}


def parse_labelled(row: dict) -> list[dict]:
    """→ rows {"prompt": messages, "completion": str, "label": bool, "meta"}; of a tie none."""
    if "chosen" in row:
        pair = parse_pair(row)
        shared = {"prompt": pair["prompt"], "meta": pair["meta"]}
        sides = [] if pair.get("probability") == 0.5 else (("chosen", True), ("rejected", False))
        return [{**shared, "completion": pair[side], "label": label} for side, label in sides]
    if "question" in row:
        verdicts = [v for v in row.values() if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()]
        if not verdicts:
            raise RowError('expected a {"solution", "is_correct"} of some model beside the "question"')
        shared = {"prompt": row["question"], "meta": read_meta(row)}
        sides = [{"completion": v["solution"], "label": v["is_correct"]} for v in verdicts]
        return [one for side in sides for one in parse_labelled({**shared, **side})]
    said, label = read(row, "completion", "a string"), read(row, "label", "true or false")
    prompt, meta = read_messages(row, "prompt"), read_meta(row)
    return [{"prompt": prompt, "completion": said, "label": label, "meta": meta}]


def parse_steps(row: dict) -> dict:
    """→ {"prompt": messages, "completions": [str], "labels": [P(it is right) | None], "meta"}, and if given
    "label" (bool, of the final answer) and "neutral" (numbers of steps that are neither right nor wrong)."""
    if "completions" not in row:
        how = "`python -m lab.convert_steps --data X --out Y` makes rows of steps of other formats"
        raise RowError(f'expected "completions", the steps, found only the fields {sorted(row)}; {how}')
    steps = read(row, "completions", "a list of strings")
    labels = read(row, "labels", "a list of true, false, a probability or null")
    if not steps or len(steps) != len(labels):
        raise RowError(f'fields "completions" and "labels": {len(steps)} steps but {len(labels)} labels')
    read(row, "label", "true or false", True)
    read(row, "neutral", "a list of numbers of steps", [])
    labels = [None if x is None else float(x) for x in labels]
    more = {name: row[name] for name in ("label", "neutral") if name in row}
    prompt, meta = read_messages(row, "prompt"), read_meta(row)
    return {"prompt": prompt, "completions": steps, "labels": labels, "meta": meta, **more}


def parse_prompt(row: dict) -> dict:
    """→ {"prompt": messages ending with the user, "meta"}. The answer of a GSM8K row goes into meta."""
    if "chosen" in row:
        prompt = parse_pair(row)["prompt"]
    elif "messages" in row:
        prompt = read_messages(row, "messages")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    else:
        prompt = read_messages(row, "question" if "question" in row else "prompt")
    if not prompt:
        raise RowError("expected a prompt before the first assistant message")
    gold = {"answer": row["answer"]} if "question" in row and "answer" in row else {}
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


def read_rows(path: str, kind: str, skip_bad_rows: bool = False, parse: Callable | None = None) -> list[dict]:
    """Every row of a JSONL file, validated as `kind` (see the module's docstring). "text" also reads plain
    text. parse: a parser of one's own instead of the kind's.

    Raises UserError naming file, line, field and what was expected; `skip_bad_rows` drops and counts.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path, or run `make demo` first.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty; expected rows of kind {kind!r}.")
    if kind == "text" and not path.endswith((".jsonl", ".json")):
        return [{"text": content}]
    rows, bad, none = [], 0, 0
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            parsed = (parse or PARSERS[kind])(parse_json(line))
            rows += parsed if isinstance(parsed, list) else [parsed]
            none += parsed == []
        except RowError as error:
            bad += 1
            if not skip_bad_rows:
                text = f"{path}, line {number}: {error}. (--skip-bad-rows drops such rows.)"
                raise UserError(text) from None
    if bad:
        print(f"data: {path}: skipped {bad} bad rows of {len(lines)}")
    if none:
        print(f"data: {path}: {none} rows (ties, unrated or for quality control) were left out")
    if not rows:
        raise UserError(f"{path} has no usable row of kind {kind!r}.")
    return rows


def write_rows(path: str, rows) -> None:
    """Write rows as JSONL, whole or not at all: to a temporary name, then renamed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.writing")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)
