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
              of the final answer · PRM800K's raw rows · Math-Shepherd's {"input", "label"} · a labelled row,
              whose lines are the steps
    prompts   {"prompt"} as a string or messages · {"question"} · whatever a chat or pair row starts with
"""

import ast
import json
import operator
import re
from itertools import combinations
from pathlib import Path

from nanoalign import UserError
from nanoalign.tokenizer import ROLES


class RowError(ValueError):
    """What is wrong with one row: the field, and what was expected."""


def _parse_json(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, a number of too many digits, nested too deeply
        raise RowError(f"not valid JSON ({getattr(error, 'msg', error)})") from None
    if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise RowError("a \\ud… escape is half of a character: not valid Unicode")
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {line[:40]!r}")
    return row


def _meta(row: dict) -> dict:
    if not isinstance(row.get("meta", {}), dict):
        raise RowError(f'field "meta": expected an object, found {_describe(row, "meta")}')
    return row.get("meta", {})


def _text(row: dict, field: str) -> str:
    if not isinstance(row.get(field), str):
        raise RowError(f'field "{field}": expected a string, found {_describe(row, field)}')
    return row[field]


def _describe(row: dict, field: str) -> str:
    return f"{json.dumps(row[field])[:60]}" if field in row else f"only the fields {sorted(row)}"


def _messages(row: dict, field: str) -> list[dict]:
    """A list of messages with role and content; a plain string is one user message."""
    value = row.get(field)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(
            f'field "{field}": expected a string or a list of messages, found {_describe(row, field)}'
        )
    for i, message in enumerate(value):
        good = (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        )
        if not good:
            raise RowError(
                f'field "{field}", message {i}: expected {{"role": {"|".join(ROLES)}, "content": string}}, '
                f"found {json.dumps(message)[:60]}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _transcript(row: dict, field: str) -> list[dict]:
    """An Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …" → messages."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", _text(row, field))
    if len(pieces) < 5 or pieces[0].strip():
        raise RowError(
            f'field "{field}": expected "\\n\\nHuman: …\\n\\nAssistant: …" (the row has no "prompt")'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(pieces[1::2], pieces[2::2])]


def _side(row: dict, field: str) -> list[dict]:
    if isinstance(row.get(field), list):
        return _messages(row, field)
    if "prompt" in row:
        return [{"role": "assistant", "content": _text(row, field)}]
    return _transcript(row, field)


def _number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= 1e300


def parse_pair(row: dict) -> dict:
    """→ {"prompt": messages, "chosen": str, "rejected": str, "meta"}, and "margin" and "probability" if the
    row has them. A row whose rejected side is the likelier one is turned round."""
    prompt = _messages(row, "prompt") if "prompt" in row else []
    sides = [prompt + _side(row, field) for field in ("chosen", "rejected")]
    repeated = [side[: 2 * len(prompt)] == prompt * 2 for side in sides]
    if prompt and all(repeated):  # each side repeats the prompt
        sides = [side[len(prompt) :] for side in sides]
    for field, side in zip(("chosen", "rejected"), sides):
        if len(side) < 2 or side[-1]["role"] != "assistant":
            raise RowError(f'field "{field}": expected to end with an assistant message after a prompt')
    if sides[0][:-1] != sides[1][:-1]:
        raise RowError(
            'fields "chosen" and "rejected": expected the same prompt, differing only in the last message'
        )
    if not _number(row.get("margin", 0.0)):
        raise RowError(f'field "margin": expected a number, found {_describe(row, "margin")}')
    if not _number(p := row.get("probability", 1.0)) or not 0 <= p <= 1:
        raise RowError(
            f'field "probability": expected a number from 0 to 1, found {_describe(row, "probability")}'
        )
    chosen, rejected = (side[-1]["content"] for side in sides)
    soft = {name: row[name] for name in ("margin", "probability") if name in row}
    if p < 0.5:
        chosen, rejected = rejected, chosen
        soft = {name: 1 - p if name == "probability" else -value for name, value in soft.items()}
    return {"prompt": sides[0][:-1], "chosen": chosen, "rejected": rejected, "meta": _meta(row), **soft}


def parse_pairs(row: dict) -> list[dict]:
    """→ rows of `parse_pair`: one, or of K responses with a ranking or scores all K(K−1)/2.

    A response of rank or score null takes part in none.
    """
    if "responses" not in row:
        return [parse_pair(row)]
    responses, field = row["responses"], "ranking" if "ranking" in row else "scores"
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise RowError(f'field "responses": expected a list of strings, found {_describe(row, "responses")}')
    values = row.get(field)
    if not isinstance(values, list) or not all(x is None or _number(x) for x in values):
        raise RowError(f'field "{field}": expected a list of numbers or null, found {_describe(row, field)}')
    if len(values) != len(responses):
        raise RowError(f'fields "responses" and "{field}": {len(responses)} responses, {len(values)} values')
    shared, pairs = {"prompt": _messages(row, "prompt"), "meta": _meta(row)}, []
    for one, other in combinations([(v, text) for v, text in zip(values, responses) if v is not None], 2):
        best, worst = (one, other) if (one[0] > other[0]) == (field == "scores") else (other, one)
        tie = {"probability": 0.5} if one[0] == other[0] else {}
        pairs.append(parse_pair({**shared, "chosen": best[1], "rejected": worst[1], **tie}))
    return pairs


def parse_compared(row: dict) -> dict:
    """→ {"prompt": messages, "responses": [str, str], "ended": [bool, bool], "votes": [vote…], "meta"}."""
    for field, kind, what in (("responses", str, "two strings"), ("ended", bool, "two of true or false")):
        values = row.get(field)
        if not isinstance(values, list) or [type(value) for value in values] != [kind, kind]:
            raise RowError(f'field "{field}": expected a list of {what}, found {_describe(row, field)}')
    votes = row.get("votes")
    if not isinstance(votes, list) or not all(map(_is_vote, votes)):
        raise RowError(
            'field "votes": expected a list of {"annotator": string, "p": number from 0 to 1 or null}, found '
            f"{_describe(row, 'votes')}"
        )
    kept = {field: row[field] for field in ("responses", "ended", "votes")}
    return {"prompt": _messages(row, "prompt"), **kept, "meta": _meta(row)}


def _is_vote(vote) -> bool:
    if not isinstance(vote, dict) or not isinstance(vote.get("annotator"), str) or "p" not in vote:
        return False
    good = vote["p"] is None or (_number(vote["p"]) and 0 <= vote["p"] <= 1)
    return good and isinstance(vote.get("swapped", False), bool)


def parse_chat(row: dict) -> dict:
    """→ {"messages", "meta"}, with at least one assistant turn to learn from."""
    if "messages" in row:
        messages = _messages(row, "messages")
    elif "chosen" in row:
        pair = parse_pair(row)
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    elif "question" in row:
        messages = [*_messages(row, "question"), {"role": "assistant", "content": _text(row, "answer")}]
    else:
        messages = [*_messages(row, "prompt"), {"role": "assistant", "content": _text(row, "completion")}]
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError('field "messages": expected at least one assistant message to learn from')
    return {"messages": messages, "meta": _meta(row)}


def parse_labelled(row: dict) -> list[dict]:
    """→ rows {"prompt": messages, "completion": str, "label": bool, "meta"}: one, or as many as are in it
    (none in a tie)."""
    if "chosen" in row:
        pair = parse_pair(row)
        if pair.get("probability") == 0.5:
            return []
        sides = ((pair["chosen"], True), (pair["rejected"], False))
        return [
            {"prompt": pair["prompt"], "completion": c, "label": y, "meta": pair["meta"]} for c, y in sides
        ]
    if "question" in row:
        verdicts = [v for v in row.values() if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()]
        if not verdicts:
            raise RowError('expected a {"solution", "is_correct"} of some model beside the "question"')
        sides = [{"completion": v["solution"], "label": v["is_correct"]} for v in verdicts]
        shared = {"prompt": row["question"], "meta": _meta(row)}
        return [one for side in sides for one in parse_labelled({**shared, **side})]
    if not isinstance(row.get("label"), bool):
        raise RowError(f'field "label": expected true or false, found {_describe(row, "label")}')
    prompt, completion = _messages(row, "prompt"), _text(row, "completion")
    return [{"prompt": prompt, "completion": completion, "label": row["label"], "meta": _meta(row)}]


def parse_steps(row: dict) -> list[dict]:
    """→ rows {"prompt": messages, "completions": [str], "labels": [probability of being right | None],
    "meta"}.

    "label": bool is there where a verdict on the final answer is known, "neutral": [index of a step] in
    PRM800K's, whose neutral steps count as right. A quality-control row has no rows.
    """
    if isinstance(row.get("label"), dict):
        return _prm800k(row)
    if "input" in row:
        return [_math_shepherd(row)]
    if "completions" not in row and ("question" in row or "completion" in row):
        return [_by_line(one) for one in parse_labelled(row)]
    steps, labels = row.get("completions"), row.get("labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise RowError(
            f'field "completions": expected a list of strings, found {_describe(row, "completions")}'
        )
    if not isinstance(labels, list) or not all(x is None or _probability(x) for x in labels):
        raise RowError(
            'field "labels": expected a list of true, false, a probability or null, found '
            f"{_describe(row, 'labels')}"
        )
    if len(steps) != len(labels):
        raise RowError(f'fields "completions" and "labels": {len(steps)} steps but {len(labels)} labels')
    if not isinstance(row.get("label", True), bool):
        raise RowError(f'field "label": expected true or false, found {_describe(row, "label")}')
    outcome = {"label": row["label"]} if "label" in row else {}
    labels = [None if x is None else float(x) for x in labels]
    return [_steps(row, _messages(row, "prompt"), steps, labels, **outcome)]


def _probability(x) -> bool:
    return isinstance(x, (bool, int, float)) and 0 <= x <= 1


def _steps(row: dict, prompt: list[dict], steps: list[str], labels: list, **more) -> dict:
    return {"prompt": prompt, "completions": steps, "labels": labels, "meta": _meta(row), **more}


def _prm800k(row: dict) -> list[dict]:
    """PRM800K's raw rows (Lightman et al. 2023): the chain of chosen completions with their ratings, and each
    alternative as a row of its own after the steps it was offered to follow, which are not labelled again."""
    if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
        return []
    try:
        prompt, stages = _messages(row["question"], "problem"), row["label"]["steps"]
        chain, ratings, rows = [], [], []
        for stage in stages:
            offered, chosen = stage.get("completions") or [], stage.get("chosen_completion")
            for i, one in enumerate(offered):
                if one.get("rating") not in (-1, 0, 1, None):
                    raise RowError(f"a step has rating {one['rating']!r}: expected -1, 0, 1 or null")
                if i != chosen:
                    rows.append(([*chain, one["text"]], [*[None] * len(chain), one.get("rating")]))
            one = stage.get("human_completion") if chosen is None else offered[chosen]
            if one is None:  # no continuation was good enough: the solution ends here
                break
            chain, ratings = [*chain, one["text"]], [*ratings, one.get("rating")]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RowError(f"not PRM800K's format ({type(error).__name__}: {error})") from None
    value = {None: None, -1: 0.0, 0: 1.0, 1: 1.0}
    return [
        _steps(
            row, prompt, steps, [value[r] for r in rated], neutral=[i for i, r in enumerate(rated) if r == 0]
        )
        for steps, rated in [(chain, ratings), *rows]
        if any(r is not None for r in rated)
    ]


def _math_shepherd(row: dict) -> dict:
    """Math-Shepherd's rows (Wang et al. 2024): "label" is "input" with each "ки" that ends a step replaced by
    + or −; a "ки" that is still there is text."""
    given, judged = _text(row, "input"), _text(row, "label")
    pieces, labels, text, at = [], [], "", 0
    for piece in given.split("ки"):
        text += piece
        at += len(piece)
        if judged[at : at + 1] in ("+", "-"):
            pieces.append(text)
            labels.append(float(judged[at] == "+"))
            text, at = "", at + 1
        elif judged[at : at + 2] == "ки":
            text, at = text + "ки", at + 2
    question, marker, first = (pieces or [""])[0].partition("Step 1:")
    if not marker:
        raise RowError('field "input": expected a question, "Step 1:" and steps that end in "ки"')
    steps = [s.strip() for s in (marker + first, *pieces[1:])]
    return _steps(row, [{"role": "user", "content": question.strip()}], steps, labels)


def _by_line(row: dict) -> dict:
    """A whole solution with a verdict → its lines as steps, labelled by their <<a*b=c>> annotations, if
    any."""
    lines = row["completion"].split("\n")
    labels = [check_calculator(line) for line in lines]
    return _steps(row, row["prompt"], lines, labels, label=row["label"])


def check_calculator(line: str) -> float | None:
    """0.0 if a <<expression=value>> of GSM8K's calculator in the line is false to the digits given, 1.0 if
    all are true; None where there is none that can be worked out. It says whether the sum is right, not
    whether it is the right sum."""
    verdicts = [_is_equal(*equation) for equation in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", line)]
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(all(known)) if known else None


def _is_equal(expression: str, stated: str) -> bool | None:
    try:
        value = _calculate(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
        number = float(stated.replace(",", ""))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    decimals = len(stated.strip().partition(".")[2])
    rounding = 0.5 * 10**-decimals if decimals else 0.0  # a whole number is meant to be exact
    return abs(value - number) <= rounding + 1e-9 * abs(value)


def _calculate(node) -> float:
    """The value of a sum of numbers with + − * / and brackets."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_calculate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_calculate(left), _calculate(right))
    raise ValueError("not a sum")


_OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def parse_prompt(row: dict) -> dict:
    """→ {"prompt": messages ending with the user, "meta"}. The answer of a GSM8K row goes into meta."""
    if "chosen" in row:
        prompt = parse_pair(row)["prompt"]
    elif "messages" in row:
        prompt = _messages(row, "messages")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    else:
        prompt = _messages(row, "question" if "question" in row else "prompt")
    if not prompt:
        raise RowError("expected a prompt before the first assistant message")
    gold = {"answer": row["answer"]} if "question" in row and "answer" in row else {}
    return {"prompt": prompt, "meta": {**gold, **_meta(row)}}


def parse_text(row: dict) -> dict:
    """→ {"text": str}."""
    return {"text": _text(row, "text")}


PARSERS = {
    "text": parse_text,
    "chat": parse_chat,
    "pairs": parse_pairs,
    "compared": parse_compared,
    "labelled": parse_labelled,
    "steps": parse_steps,
    "prompts": parse_prompt,
}

# ---------------------------------------------------------------------------------------------- a file


def read_rows(path: str, kind: str, skip_bad_rows: bool = False) -> list[dict]:
    """Every row of a JSONL file, validated as `kind` (see the module's docstring). "text" also reads plain
    text.

    Raises UserError naming file, line, field and what was expected; with `skip_bad_rows` drops and counts
    instead.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; check the path, or run `make demo` to build the world's."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty; expected rows of kind {kind!r}.")
    if kind == "text" and not path.endswith((".jsonl", ".json")):
        return [{"text": content}]
    rows, good, bad, none = [], 0, 0, 0
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parsed = PARSERS[kind](_parse_json(line))
            rows += parsed if isinstance(parsed, list) else [parsed]
            good, none = good + 1, none + (parsed == [])
        except RowError as error:
            bad += 1
            if not skip_bad_rows:
                raise UserError(
                    f"{path}, line {number}: {error}. (--skip-bad-rows drops such rows.)"
                ) from None
    if bad:
        print(f"data: {path}: skipped {bad} bad rows of {bad + good}")
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
