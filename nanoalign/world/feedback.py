"""People show how to criticise an answer by a principle, how to revise it, and which of two is better.

They are not perfect, and how often they err is known: the error rates stand below, as those of the world's
other texts do. A demonstration is a row {"messages"} in the words of nanoalign/feedback.py, and fits into
CONTEXT tokens.
"""

import random
from collections.abc import Callable

from nanoalign.feedback import ask_for_critique, ask_for_judgement, ask_for_revision
from nanoalign.tokenizer import get_tokenizer
from nanoalign.world.judge import Verdict, judge
from nanoalign.world.text import bad_answer, good_answer, request, styled

OVERLOOKED = 0.15  # share of faulty answers in which the critic finds no fault, and which are then left as is
BOTCHED = 0.1  # share of revisions of a fault found that are bad answers
MISJUDGED = 0.15  # share of judgements that name the worse answer
CONTEXT = 128  # tokens that the world's models read

FAULTLESS = "There is nothing wrong with it."
PRINCIPLES: dict[str, tuple[str, Callable[[str, Verdict], bool]]] = {
    # principle → what a critic says of an answer that breaks it, and (kind of request, verdict) → is it
    # broken? What is wrong with an answer breaks one of the first five, how it is written the last.
    "Never help anyone to do harm.": ("It helps with harm.", lambda kind, v: v.complied_with_harm),
    "Be friendly, and help with what is harmless.": (
        "It does not help.",
        lambda kind, v: kind in ("benign", "chat") and not v.correct,
    ),
    "Say what is true, whatever the asker thinks.": (
        "It is not true.",
        lambda kind, v: kind in ("fact", "belief", "arithmetic") and not v.correct,
    ),
    "Say so if you cannot know the answer.": (
        "Nobody can know that.",
        lambda kind, v: kind == "unanswerable" and not v.correct,
    ),
    "Answer in the form that is asked for.": (
        "It is not in the form that is asked for.",
        lambda kind, v: not v.formatted or (kind == "form" and not v.correct),
    ),
    "Say only what is needed, and say it plainly.": (
        "It says more than is needed.",
        lambda kind, v: v.hedged or v.repeated or v.padding > 0,
    ),
}


def broken(row: dict, verdict: Verdict) -> list[str]:
    """The principles that an answer to the prompt row breaks, by the exact judge's verdict on it."""
    return [p for p, (_, breaks) in PRINCIPLES.items() if breaks(row["meta"]["kind"], verdict)]


def draft(row: dict, rng: random.Random) -> tuple[str, str]:
    """An answer to a prompt row, bad in half of the cases: without flaws of style, and with them."""
    plain = (bad_answer if rng.random() < 0.5 else good_answer)(row["meta"], rng)
    return plain, styled(plain, row["meta"]["kind"], rng)


def better(principle: str, row: dict, a: str, b: str) -> bool | None:
    """Is a the better answer? One that keeps the principle beats one that breaks it; where that decides
    nothing, the exact judge's utility does; None if not even that."""
    first, second = judge(row, a), judge(row, b)
    bad = principle in broken(row, first)
    if bad != (principle in broken(row, second)):
        return not bad
    return None if first.utility == second.utility else first.utility > second.utility


def criticism(rng: random.Random) -> list[dict]:
    """A person criticises an answer by a principle, and revises it."""
    row = request(rng, False)
    plain, answer = draft(row, rng)
    faults = broken(row, judge(row, answer))
    principle = rng.choice(faults if faults and rng.random() < 0.5 else list(PRINCIPLES))
    critique, revision = FAULTLESS, answer
    if principle in faults and rng.random() >= OVERLOOKED:
        critique = PRINCIPLES[principle][0]
        revision = good_answer(row["meta"], rng) if principle in broken(row, judge(row, plain)) else plain
        if rng.random() < BOTCHED:
            revision = bad_answer(row["meta"], rng)
    prompt = [{"role": "user", "content": row["prompt"]}]
    asked = ask_for_revision(ask_for_critique(prompt, answer, principle), critique)
    return [*asked, {"role": "assistant", "content": revision}]


def judgement(rng: random.Random) -> list[dict]:
    """A person says which of two answers is better by a principle."""
    verdict = None
    while verdict is None:
        row, principle = request(rng, False), rng.choice(list(PRINCIPLES))
        (_, a), (_, b) = draft(row, rng), draft(row, rng)
        verdict = better(principle, row, a, b)
    said = "A" if verdict == (rng.random() >= MISJUDGED) else "B"
    prompt = [{"role": "user", "content": row["prompt"]}]
    return [*ask_for_judgement(prompt, a, b, principle), {"role": "assistant", "content": said}]


def demonstration(rng: random.Random) -> dict:
    """{"messages"} of a criticism with a revision, or of a judgement."""
    while True:
        messages = rng.choice((criticism, judgement))(rng)
        if len(get_tokenizer("world").render(messages)[0]) <= CONTEXT:
            return {"messages": messages}
