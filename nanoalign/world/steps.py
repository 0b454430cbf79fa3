"""Sums of several steps, and whether each step of a solution follows from what stands before it.

Start with 7, add 5, multiply by 3 and subtract 4. What do you get?

7 + 5 = 12
12 * 3 = 36
36 - 4 = 32
Answer: 32
"""

import random
import re

from nanoalign import UserError

SLIPS = 0.2  # share of demonstrated solutions with a wrong step
FUDGES = 0.5  # share of those whose author knows the answer and writes it down all the same

_WORDS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}", "/": "divide by {}"}
_OPENINGS = {  # and closings: any of the one with any of the other
    False: ("Start with", "Take", "Think of", "Pick", "The number is", "You have", "Let it be", "There are"),
    True: ("Begin with",),
}
_CLOSINGS = {
    False: (
        "What do you get?", "What is the result?", "What is it then?", "Where do you end?", "What comes out?",
        "How much is it now?", "What is left?", "Say what it is.",
    ),
    True: ("Which number is that?",),
}  # fmt: skip
_EQUATION = re.compile(r"(?:\d*x = )?(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)")


def _apply(a: int, op: str, b: int) -> int | None:
    """a op b, or None where that is no whole number."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def problem(rng: random.Random, held_out: bool) -> dict:
    """{"prompt", "meta"} of three to five steps. A fifth of the number combinations is held out, and a
    phrasing."""
    while True:
        start, steps = rng.randint(2, 12), rng.choice((3, 4, 5))
        value, ops, lines = start, [], []
        while len(ops) < steps:
            op, n = rng.choice("+-*/"), rng.randint(2, 12)
            result = _apply(value, op, n)
            if result is None or not 0 < result < 100 or result == value:
                continue
            ops.append((op, n))
            lines.append(f"{value} {op} {n} = {result}")
            value = result
        if ((start + 3 * ops[0][1] + 7 * ops[1][1]) % 5 == 4) == held_out:
            break
    *most, last = (_WORDS[op].format(n) for op, n in ops)
    opening, closing = rng.choice(_OPENINGS[held_out]), rng.choice(_CLOSINGS[held_out])
    prompt = f"{opening} {start}, {', '.join(most)} and {last}. {closing}"
    return {"prompt": prompt, "meta": {"kind": "arithmetic", "answer": value, "steps": lines}}


def solution(meta: dict, rng: random.Random) -> str:
    """A worked solution by a person, who sometimes slips, and goes on from there: usually to a wrong answer,
    sometimes to the right one against their own reckoning."""
    slip = rng.randrange(len(meta["steps"])) if rng.random() < SLIPS else -1
    value, lines = None, []
    for i, step in enumerate(meta["steps"]):
        a, op, n, _ = _EQUATION.fullmatch(step).groups()
        value = int(a) if value is None else value
        result = _apply(value, op, int(n))
        if result is None:  # after a slip a division need not come out even
            result = value // int(n)
        if i == slip:
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        lines.append(f"{value} {op} {n} = {result}")
        value = result
    return "\n".join([*lines, f"Answer: {meta['answer'] if slip >= 0 and rng.random() < FUDGES else value}"])


def check_steps(meta: dict, steps: list[str]) -> list[bool]:
    """Does each step follow? → a verdict per step, whatever the final answer is worth.

    meta["steps"] are the equations to be worked through, in order. A step follows if it applies the next
    operation to the value reached so far, as stated, and the equation is true; `Answer: n` follows if nothing
    is left to do and n is that value. So after a slip, steps that reckon on correctly follow again, and a
    right answer that contradicts the line before it does not. Raises UserError for what is no such problem.
    """
    given = meta.get("steps")
    found = [_EQUATION.fullmatch(str(step)) for step in given] if isinstance(given, list) else []
    if not found or None in found:
        what = "a list of equations such as 7 + 5 = 12"
        raise UserError(
            f"the world's checker knows its sums only: expected meta.steps, {what}, not {given!r:.60}."
        )
    todo = [equation.groups() for equation in found]
    value, answered, verdicts = int(todo[0][0]), False, []
    for step in steps:
        equation, final = _EQUATION.fullmatch(step), re.fullmatch(r"Answer: (-?\d+)", step)
        if answered or not (equation or final):
            verdicts.append(False)
        elif final:
            answered = True
            verdicts.append(not todo and int(final[1]) == value)
        else:
            a, op, b, result = equation[1], equation[2], equation[3], int(equation[4])
            operands, follows = {(int(a), int(b))} | ({(int(b), int(a))} if op in "+*" else set()), False
            if todo:
                _, due, n, _ = todo.pop(0)
                follows = op == due and (value, int(n)) in operands and _apply(int(a), op, int(b)) == result
            verdicts.append(follows)
            value = result
    return verdicts
