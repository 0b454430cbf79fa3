"""PRM800K's raw rows, Math-Shepherd's rows and whole solutions → rows of steps, which train_prm.py reads.

    python -m lab.convert_steps --data prm800k.jsonl --out steps.jsonl
    python -m lab.convert_steps --data math-shepherd.jsonl --out steps.jsonl
    python -m lab.convert_steps --data gsm8k_model_solutions.jsonl --out steps.jsonl

A row is recognised by its fields; rows of steps stay as they are.

PRM800K (Lightman et al. 2023): the chain of chosen completions with their ratings, and each alternative as a
row of its own. A rating of 0 counts as right; its step is "neutral", for train_prm.py --neutral ignore.
Rows for quality control are left out.

Math-Shepherd (Wang et al. 2024): {"input", "label"}, every step with + or −.

Whole solutions: any labelled row (nanoalign/rows.py), whose lines become the steps and whose label is that of
the final answer. Lines of GSM8K solutions carry their own check, <<48/2=24>>: a line is labelled wrong if
such an equation is false, right if all are true. That finds slips in reckoning only: GSM8K's models had a
calculator, and their mistakes lie in what they chose to reckon, which nothing in the line gives away.
"""

import ast
import operator
import re
from dataclasses import dataclass

from nanoalign import UserError, cli
from nanoalign.messages import names_of, shown
from nanoalign.rows import RowError, check_unread, parse_labelled, parse_steps, read_rows, write_rows


@dataclass
class Config:
    data: str = ""  # the rows to convert
    out: str = "out/steps.jsonl"  # rows of steps
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output


def convert(row: dict) -> list[dict]:
    """A row of any of these formats → rows of steps; of a quality-control row none."""
    if isinstance(row.get("label"), dict):
        rows = prm800k(row)
    elif "input" in row:
        rows = [math_shepherd(row)]
    else:
        known = {"completions", "completion", "messages", "question", "chosen"}
        if not known & row.keys():
            raise RowError(f"no format that is known here: found only the fields {names_of(row)}")
        rows = [row] if "completions" in row else [by_line(one) for one in parse_labelled(row)]
        check_unread(row)
    return [parse_steps({"meta": row.get("meta", {}), **one}) for one in rows]


# ---------------------------------------------------------------------------------------------- PRM800K


def prm800k(row: dict) -> list[dict]:
    """The chain of chosen completions, and each alternative after the steps that it was offered to follow,
    which are not labelled again."""
    if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
        return []
    try:
        problem, stages = row["question"]["problem"], row["label"]["steps"]
        chain, ratings, rows = [], [], []
        for number, stage in enumerate(stages):
            offered, chosen = stage.get("completions") or [], stage.get("chosen_completion")
            where = f'field "label", "steps", step {number}'
            rated = [rated_step(one, f"{where}, completion {i}") for i, one in enumerate(offered)]
            for i, (text, rating) in enumerate(rated):
                if i != chosen:
                    rows.append(([*chain, text], [*[None] * len(chain), rating]))
            one = stage.get("human_completion")
            if chosen is None and one is None:  # no continuation was good enough: the solution ends here
                break
            text, rating = rated_step(one, f"{where}, human_completion") if chosen is None else rated[chosen]
            chain, ratings = [*chain, text], [*ratings, rating]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RowError(f"not PRM800K's format ({type(error).__name__}: {error})") from None
    rated = [(steps, found) for steps, found in [(chain, ratings), *rows] if set(found) - {None}]
    return [rated_steps(problem, *one) for one in rated]


def rated_step(one: dict, where: str) -> tuple[str, int | None]:
    text, rating = one["text"], one.get("rating")
    if not isinstance(text, str):
        raise RowError(f'{where}, "text": expected a string, found {shown(text)}')
    if rating not in (-1, 0, 1, None):
        raise RowError(f'{where}, "rating": expected -1, 0, 1 or null, found {shown(rating)}')
    return text, rating


def rated_steps(problem: str, steps: list[str], ratings: list) -> dict:
    value = {None: None, -1: 0.0, 0: 1.0, 1: 1.0}
    labels = [value[rating] for rating in ratings]
    neutral = [i for i, rating in enumerate(ratings) if rating == 0]
    return {"prompt": problem, "completions": steps, "labels": labels, "neutral": neutral}


# ----------------------------------------------------------------------------------------- Math-Shepherd


def math_shepherd(row: dict) -> dict:
    """ "label" is "input" with each "ки" that ends a step replaced by + or −; a "ки" that is still there is
    text."""
    given, judged = row["input"], row.get("label")
    if not isinstance(given, str) or not isinstance(judged, str):
        raise RowError('fields "input" and "label": expected two strings, Math-Shepherd\'s format')
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
    steps = [step.strip() for step in (marker + first, *pieces[1:])]
    return {"prompt": question.strip(), "completions": steps, "labels": labels}


# --------------------------------------------------------------------------------------- whole solutions


def by_line(row: dict) -> dict:
    """A labelled row → its lines as steps, labelled by their <<a*b=c>> annotations, if any."""
    lines = row["completion"].split("\n")
    return {**row, "completions": lines, "labels": [check_calculator(line) for line in lines]}


def check_calculator(line: str) -> float | None:
    """0.0 if a <<expression=value>> of GSM8K's calculator in the line is false to the digits given, 1.0 if
    all are true; None where there is none that can be worked out. It says whether the sum is right, not
    whether it is the right sum."""
    verdicts = [is_equal(*equation) for equation in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", line)]
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(all(known)) if known else None


def is_equal(expression: str, stated: str) -> bool | None:
    try:
        value = calculate(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
        number = float(stated.replace(",", ""))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    decimals = len(stated.strip().partition(".")[2])
    rounding = 0.5 * 10**-decimals if decimals else 0.0  # a whole number is meant to be exact
    return abs(value - number) <= rounding + 1e-9 * abs(value)


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(node) -> float:
    """The value of a sum of numbers with + − * / and brackets."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -calculate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](calculate(left), calculate(right))
    raise ValueError("not a sum")


def main(config: Config) -> None:
    if not config.data:
        raise UserError("name the rows to convert: --data prm800k.jsonl.")
    rows = read_rows(config.data, "steps", config.skip_bad_rows, config.fields, convert)
    write_rows(config.out, rows)
    labelled = sum(label is not None for row in rows for label in row["labels"])
    print(f"convert_steps: {len(rows):,} solutions, {labelled:,} labelled steps → {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
