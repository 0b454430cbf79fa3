"""What a row's fields hold, read or refused: numbers, strings, and conversations in people's layouts.

A conversation is a list of messages {"role", "content"}, or ShareGPT's {"from", "value"}, the content a
string or text parts; or a string: one user message, or HH's "\\n\\nHuman: …\\n\\nAssistant: …". A "system"
beside it comes first. What would change its meaning and is not read (pictures, calls of tools) is refused.
"""

import json
import re
from collections.abc import Callable

from nanoalign.tokenizer import ROLES


class RowError(ValueError):
    """What is wrong with one row: the field, and what was expected."""


# ------------------------------------------------------------------------------------------------ fields


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= 1e30  # fits fp32


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
    "a list of numbers of steps": each(lambda x: is_number(x) and isinstance(x, int) and x >= 0),
}


def read(row: dict, field: str, what: str, otherwise=None):
    """The field's value, if it is what it should be; `otherwise` where there is none."""
    value = row.get(field, otherwise)
    if not FIELDS[what](value):
        names = f"only the fields {names_of(row)} (--fields {field}=NAME reads another)"
        found = shown(row[field]) if field in row else names
        raise RowError(f'field "{field}": expected {what}, found {found}')
    return value


def shown(value) -> str:
    """The beginning of a value as JSON, for an error: in ASCII, so that no text can drive the terminal."""
    return json.dumps(value)[:60]


def names_of(row: dict) -> list[str]:
    """The names of a row's fields, for an error."""
    return [name[:40] for name in sorted(row)[:20]]


def one_of(row: dict, *fields: str) -> None:
    if len(given := [f'"{field}"' for field in fields if field in row]) > 1:
        raise RowError(f"fields {' and '.join(given)}: expected one of them")


# --------------------------------------------------------------------------------------------- messages

SHAREGPT = {"human": "user", "gpt": "assistant"}
TURN = r"(?:^|\n\n)(Human|Assistant):"
TRANSCRIPT = re.compile(r"\s*\n\nHuman:|\s*Human:.*\n\nAssistant:", re.DOTALL)
TEMPLATES = (  # in a conversation that some chat format has made a string of
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<extra_id_1>", "[/INST]", "\n### Response:",
)  # fmt: skip
MEANT = (  # of a message, and what it would say is lost without them
    "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "thinking", "refusal",
    "images", "audio", "train",
)  # fmt: skip


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def is_transcript(value) -> bool:
    return isinstance(value, str) and bool(TRANSCRIPT.match(value))


def transcript(text: str) -> list[dict]:
    """Anthropic HH's "\\n\\nHuman: …\\n\\nAssistant: …" → messages; none if it does not begin so."""
    pieces = re.split(TURN, text.lstrip())
    if pieces[0]:
        return []
    roles = {"Human": user, "Assistant": assistant}
    return [roles[who](said.strip()) for who, said in zip(pieces[1::2], pieces[2::2])]


def read_messages(row: dict, field: str, weighted: bool = False) -> list[dict]:
    """A list of messages with role and content; a plain string is one user message. weighted: keep the
    "weight" of an assistant's message that is not to be learnt from, which is refused otherwise."""
    value = read(row, field, "a string or a list of messages")
    if is_transcript(value):
        return transcript(value)
    if isinstance(value, str):
        if marks := [mark for mark in TEMPLATES if mark in value]:
            what = f"{marks[0]!r}: a conversation in another format; expected messages"
            raise RowError(f'field "{field}": holds {what}')
        return [user(value)]
    messages = [read_message(m, f'field "{field}", message {i}') for i, m in enumerate(value)]
    if not weighted and any("weight" in message for message in messages):
        raise RowError(f'field "{field}": a "weight" of 0 has a meaning in chat rows only')
    return messages


def read_message(message, where: str) -> dict:
    """→ {"role", "content"}, and "weight": 0 if it has that."""
    m = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if "from" in m and "role" not in m:
        m = {**m, "role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m.get("value")}
    if lost := [field for field in MEANT if m.get(field)]:
        raise RowError(f'{where}: "{lost[0]}" is not read, and the message means something else without it')
    role, content = m.get("role"), m.get("content")
    if isinstance(content, list) and content:
        content = "".join(read_part(part, f"{where}, content part {i}") for i, part in enumerate(content))
    if role not in ROLES or not isinstance(content, str):
        what = f'{{"role": {"|".join(ROLES)}, "content": string}}'
        raise RowError(f"{where}: expected {what}, found {shown(message)}")
    if (weight := m.get("weight", 1)) not in (0, 1):
        raise RowError(f'{where}: "weight": expected 0 or 1, found {shown(weight)}')
    kept = {} if weight or role != "assistant" else {"weight": 0}
    return {"role": role, "content": content, **kept}


def read_part(part, where: str) -> str:
    part = part if isinstance(part, dict) else {"type": part}
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        what = '{"type": "text", "text": string}: text is all that is read'
        raise RowError(f"{where}: expected {what}, found {shown(part)}")
    return part["text"]


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages, after those of the row's field "system" if it has one."""
    text = read(row, "system", "a string", "")
    first = {"role": "system", "content": text}
    if not text or messages[:1] == [first]:
        return messages
    if messages and messages[0]["role"] == "system":
        raise RowError('field "system": the conversation begins with another system message')
    return [first, *messages]


def asked(messages: list[dict], field: str) -> list[dict]:
    """A prompt, which an answer follows. An empty assistant's message at its end is that answer's place; one
    that has begun is refused: whether it goes on or another one follows it, the row does not say."""
    *before, last = messages
    if last["role"] != "assistant":
        return messages
    if last["content"].strip():
        found = f"the assistant's {shown(last['content'])}: an answer that has begun belongs to what follows"
        raise RowError(f'field "{field}": expected to end with a user\'s message, found {found}')
    if not before:
        raise RowError(f'field "{field}": expected a prompt before the assistant\'s message')
    return asked(before, field)


def holds(messages: list[dict], piece: list[dict]) -> bool:
    """Do these messages follow each other somewhere in those, but for white space around them?"""
    said, part = ([(m["role"], m["content"].strip()) for m in each] for each in (messages, piece))
    return any(said[i : i + len(part)] == part for i in range(len(said) - len(part) + 1))


def read_talk(row: dict, weighted: bool = False) -> list[dict]:
    """The row's "messages", after its "system"; a "prompt" beside them is a piece of them."""
    messages = read_messages(row, "messages", weighted)
    if "prompt" in row and not holds(messages, read_messages(row, "prompt")):
        what = "messages that hold the prompt (--fields prompt= ignores it)"
        raise RowError(f'fields "prompt" and "messages": expected {what}')
    return with_system(row, messages)


def read_prompt(row: dict) -> list[dict]:
    """The row's "prompt" or GSM8K's "question", after its "system" → messages that do not end with the
    assistant."""
    one_of(row, "prompt", "question")
    field = "question" if "question" in row else "prompt"
    return with_system(row, asked(read_messages(row, field), field))


def read_response(row: dict, field: str) -> str:
    """A string, or a list of one assistant's message. What follows an HH transcript begins with a space that
    is no part of it."""
    value = row.get(field)
    if not isinstance(value, (list, dict)):
        text = read(row, field, "a string")
        return text.strip() if is_transcript(row.get("prompt")) else text
    messages = read_messages({field: [value] if isinstance(value, dict) else value}, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError(f'field "{field}": expected a string or one assistant message, found {shown(value)}')
    return messages[0]["content"]


# ------------------------------------------------------------------------------------------------- pairs


def read_side(row: dict, field: str) -> list[dict]:
    """One side of a pair → messages: a response, or a conversation that ends with one."""
    value = row.get(field)
    if isinstance(value, list):
        return read_messages(row, field)
    if ("prompt" in row or "question" in row) and not str(value).startswith("\n\nHuman:"):
        return [assistant(read_response(row, field))]
    messages = transcript(read(row, field, "a string"))
    if len(messages) < 2:
        what = '"\\n\\nHuman: …\\n\\nAssistant: …" (the row has no "prompt")'
        raise RowError(f'field "{field}": expected {what}')
    return messages


def conversations(prompt: list[dict], sides: list[list[dict]]) -> list[list[dict]]:
    """A pair's prompt and its two sides → two whole conversations, nothing in them twice. The sides go on
    after the prompt, or repeat all of it, or its end, or hold it as a piece."""
    n, shared = len(prompt), []
    for one, other in zip(*(side[:-1] for side in sides)):
        if one != other:
            break
        shared.append(one)
    if holds(shared, prompt):
        return sides
    k = next(k for k in range(min(n, len(shared)), -1, -1) if holds(shared[:k], prompt[n - k :]))
    if k == 0 and shared and shared[0]["role"] in ("system", prompt[-1]["role"]):
        what = "two sides that repeat the prompt or go on after it"
        raise RowError(f'fields "prompt", "chosen" and "rejected": expected {what}')
    return [prompt + side[k:] for side in sides]
