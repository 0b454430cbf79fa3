"""Chat formats: what stands around the texts of a conversation, and the Jinja templates that say the same.
A template is a program, and none is ever run: `recognise` reads what it would write, texts and names in their
order, without the branches for tools and for thoughts that come with a message.
"""

import contextlib
import json
import re
from typing import NamedTuple

from nanoalign import UserError


class ChatFormat(NamedTuple):
    opening: str  # opens a turn, the role in {}
    end: str  # the token that ends one
    lead: str = ""  # stands before each text
    after: str = ""  # stands after an end that another turn follows
    start: str = ""  # stands before all
    answer: str = ""  # stands before the answer that ends a conversation, and in the prompt for one
    trim: bool = False  # texts are stripped


CHATML = ChatFormat("<|im_start|>{}\n", "<|im_end|>", after="\n")
START, HEADER = "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMATS = {
    "nanoalign": ChatFormat("<|{}|>", "<|end|>", lead=" "),
    "chatml": CHATML,
    "qwen3": CHATML._replace(answer="<think>\n\n</think>\n\n"),  # as with enable_thinking=False
    "llama3": ChatFormat(HEADER, "<|eot_id|>", start=START, trim=True),
}
BODY = """
{%- if system and (not messages or messages[0]['role'] != 'system') %}
{%- set messages = [{'role': 'system', 'content': system}] + messages %}{% endif %}
{{- start }}{% for message in messages %}
{{- ('' if loop.first else after) + opening + message['role'] + opened }}
{{- (answer if loop.last and message['role'] == 'assistant' else '') + lead }}
{{- (message['content'] | trim if trim else message['content']) + end }}{% endfor %}
{%- if add_generation_prompt %}{{- (after if messages else '') + opening + 'assistant' + opened + answer }}
{%- endif %}"""
GAPS = r"\{#.*?#\}\n?|(?<!\s)\s+(?=\{[{%]-)|(?<=-[%}]\})\s+|(?<=%\})\n|^[ \t]+(?=\{[%#])|\n\Z"  # Jinja's
TAG = re.compile(r"\{([{%])-?\s*(.*?)\s*-?[%}]\}", re.DOTALL)
TERM = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|([^\s+~'"][^+~'"]*)""", re.DOTALL)
ASIDE = re.compile(r"(?!.*not message\.tool).*(?:tool|reasoning_content is|</think>)", re.DOTALL)
CONDITION = re.compile(  # what the known templates ask
    r"message in (loop_)?messages(\[::-1\])?|(loop\.first and )?messages\[0\]\.role [!=]= 'system'"
    r"|(\(message\.role == '\w+'( and not (loop\.first|message\.tool_calls))?\)( or )?)+|loop\.first"
    r"|loop\.index0 (== 0|> ns\.last_query_index)|loop\.last or \(not loop\.last and reasoning_content\)"
    r"|message\.role == '\w+'|message\.content( is string)?|(not )?add_generation_prompt( is defined)?"
    r"|enable_thinking is defined and enable_thinking is false|"
)
ROLES, LONGEST = ("system", "user", "assistant"), 10_000
THOUGHT = "<think>\n\0reasoning_content.strip(\0\n\0)\0\n</think>\n\n\0content.lstrip(\0\n\0)\0"


def template(form: ChatFormat, system: str = "") -> str:
    """A Jinja template that writes conversations in this format, `system` first if they have no such turn."""
    opening, opened = form.opening.split("{}")
    values = {"system": system, **form._asdict(), "opening": opening, "opened": opened}
    head = (f"{{%- set {name} = {json.dumps(v, ensure_ascii=False)} %}}" for name, v in values.items())
    return "\n".join(head) + BODY


def written(source: str) -> tuple[str, list[str]]:
    """What a template writes, each name between two \\0, and the conditions that decide on it."""
    source = re.sub(GAPS, "", source, flags=re.MULTILINE | re.DOTALL)
    *pieces, text = TAG.split(re.sub(r"\[(['\"])(\w+)\1\]", r".\2", source))
    conditions, kept = [], [True]
    for before, kind, code in zip(pieces[::3], pieces[1::3], pieces[2::3]):
        word, _, rest = code.partition(" ") if kind == "%" else ("", "", "")
        shown = re.match("(?:message|messages|loop_messages|content) = (?s:(.*))", rest * (word == "set"))
        for literal, name in TERM.findall(shown[1] if shown else code * (kind == "{")):
            said = literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            named = "".join(name.split()).replace("messages[0]", "message")
            before += said if literal else START if named == "bos_token" else f"\0{named}\0"
        text += before * kept[-1]
        kept += [True] * (word in ("if", "for"))
        if word in ("if", "for", "elif", "else"):
            kept[-1] = kept[-2] and not ASIDE.match(rest)
            conditions += [rest.replace('"', "'")] * kept[-1]
        elif word in ("endif", "endfor"):
            kept.pop()
        elif word not in ("", "set", "generation", "endgeneration"):
            text += f"\0{word}\0"
    return text + "\0" * (len(kept) > 1), conditions


def recognise(source: str, where: str) -> tuple[str, str]:
    """A folder's chat template → the name of its format, and the system prompt that it puts first where none
    is given. What is not plainly one of the known formats is refused."""
    with contextlib.suppress(ValueError, LookupError, TypeError):  # no template at all
        own = re.match(r"\{%- set system = (.*) %\}\n", source)
        system, (text, conditions) = str(json.loads(own[1])) if own else "", written(source[:LONGEST])
        asked = {*re.findall(r"message\.role == '(\w+)", " ".join(conditions))}
        known = len(source) <= LONGEST and all(map(CONDITION.fullmatch, conditions))
        plain = known and (asked >= {*ROLES} or not asked)
        for name, form in FORMATS.items():
            if source == template(form, system):
                return name, system
            *roles, role = map(form.opening.format, (*ROLES, "\0message.role\0"))
            said, end = f"{form.lead}\0message.content{'|trim' * form.trim}\0", form.end + form.after
            needed = [roles[2], said, end, *filter(None, (form.start, form.answer))]
            pieces = [*needed, *roles, role, "\0content\0", "\0messages\0", *[THOUGHT] * bool(form.answer)]
            first = rf"{re.escape(roles[0])}([^\0<]+){re.escape(end)}"
            whole = re.fullmatch(f"(?:{first}|{'|'.join(map(re.escape, pieces))})*", text)
            found = {"", *re.findall(first, text)}
            fits = plain and whole and all(piece in text for piece in needed) and (asked or role in text)
            if fits and len(found) <= 1 + ("messages[0].role" in "".join(conditions)):
                return name, max(found)
    raise UserError(f"the chat template in {where} is none of {', '.join(FORMATS)}: give --chat-format.")
