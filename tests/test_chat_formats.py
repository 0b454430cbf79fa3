# ruff: noqa: E501 (templates stand here as people write them)
"""Chat formats: templates that say what the formats say, and which template is which."""

import itertools
import json
import random
import re

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoalign import UserError
from nanoalign.chat_formats import FORMATS, recognise, template

ROLES = {"s": "system", "u": "user", "a": "assistant"}
TEXTS = (
    "Hi",
    "",
    " two  words ",
    "\n",
    "a\n\nb\n",
    "<|im_end|>",
    "{{ x }}{% if %}",
    "'\"\\",
    "é日🏳️‍🌈",
    "<|end|> <|eot_id|>",
)
SYSTEMS = ("", "Be brief.", 'It\'s "quoted"\n\\ {{ x }} %} é日🏳️‍🌈', "0")


def talk(roles: str, rng: random.Random) -> list[dict]:
    return [{"role": ROLES[role], "content": rng.choice(TEXTS)} for role in roles]


def said(name: str, messages: list[dict], system: str, prompt: bool) -> str:
    """What the four formats are, each written down once more."""
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    turns = [(m["role"], m["content"]) for m in messages]
    ends_answered = bool(turns) and turns[-1][0] == "assistant"
    if name == "nanoalign":
        return "".join(f"<|{r}|> {t}<|end|>" for r, t in turns) + "<|assistant|>" * prompt
    if name == "llama3":
        head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
        body = "".join(head(r) + t.strip() + "<|eot_id|>" for r, t in turns)
        return "<|begin_of_text|>" + body + head("assistant") * prompt
    empty = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    rendered = [f"<|im_start|>{r}\n{t}<|im_end|>" for r, t in turns]
    if ends_answered:
        rendered[-1] = f"<|im_start|>assistant\n{empty}{turns[-1][1]}<|im_end|>"
    return "\n".join([*rendered, *[f"<|im_start|>assistant\n{empty}"] * prompt])


def jinja(source: str) -> jinja2.Template:
    """As transformers compiles a chat template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    return environment.from_string(source)


def run(compiled: jinja2.Template, messages: list[dict], prompt: bool) -> str:
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "</s>", "enable_thinking": False}
    return compiled.render(messages=messages, add_generation_prompt=prompt, **special)


# -------------------------------------------------------------------------------------------- to export


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_exported_template_writes_the_format_for_every_conversation(name, system):
    compiled, rng = jinja(template(FORMATS[name], system)), random.Random(0)
    for length in range(5):
        for roles in itertools.product("sua", repeat=length):
            messages = talk("".join(roles), rng)
            for prompt in (False, True):
                assert run(compiled, messages, prompt) == said(name, messages, system, prompt)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_exported_template_is_recognised(name, system):
    assert recognise(template(FORMATS[name], system), "x") == (name, system)


def test_an_exported_template_that_somebody_has_changed_is_refused():
    source = template(FORMATS["chatml"], "Be brief.")
    for old, new in (
        ('"<|im_end|>"', '"<|im_stop|>"'),
        ("loop.last", "loop.first"),
        ("Be brief.", 'Be "brief'),
        ('"Be brief."', "5"),
    ):
        assert old in source
        with pytest.raises(UserError, match="--chat-format"):
            recognise(source.replace(old, new), "x")


# ------------------------------------------------------------------------------------------ to recognise

LOOP = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
FIRST = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'Be brief.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '"}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
THOUGHTS = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
HEADERS = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""
LINES = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {{ message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
    {% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- endif %}
"""
KNOWN = {  # written after those that these models come with
    "trl": (LOOP + ASK, "chatml", ""),
    "raw text": ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}", "chatml", ""),
    "smollm2": (LOOP.replace("%}{{", "%}" + FIRST + "{{", 1) + ASK, "chatml", "Be brief."),
    "lines": (LINES, "chatml", ""),
    "qwen2.5": (TOOLS, "chatml", "Be brief."),
    "qwen3": (THOUGHTS, "qwen3", ""),
    "llama3": (HEADERS, "llama3", ""),
    "llama3, unasked": ("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + HEADERS, "llama3", ""),
    "smollm": ("{# ours #}\n" + LOOP.replace("'", '"') + ASK + "\n", "chatml", ""),
}  # fmt: skip


@pytest.mark.parametrize("source, name, system", KNOWN.values(), ids=KNOWN)
def test_a_known_template_is_recognised_and_says_what_its_format_says(source, name, system):
    assert recognise(source, "x") == (name, system)
    compiled, rng = jinja(source), random.Random(0)
    for roles in ("u", "su", "ua", "sua", "uau", "suaua", "uauaua", "usu"):
        messages = [m | {"content": m["content"].strip("\n") or "a"} for m in talk(roles, rng)]
        for prompt in (False, True):
            expected = said(name, messages, system, prompt)
            ending = "\n" if not prompt and name != "llama3" else ""  # ChatML's belongs to the next turn
            assert run(compiled, messages, prompt) == expected + ending


def test_a_template_that_always_asks_for_an_answer_is_recognised():
    """As that of the first Llama-3."""
    source = re.sub(r"\{% if add_generation_prompt %\}(.*)\{% endif %\}$", r"\1", HEADERS, flags=re.DOTALL)
    assert "add_generation_prompt" not in source and recognise(source, "x") == ("llama3", "")


ODD = {
    "no text": "",
    "only text": "You are a helpful assistant.",
    "no answer": LOOP,
    "no turn": ASK,
    "no newline after a turn": (LOOP + ASK).replace(" + '\\n'}}", "}}"),
    "no newline before the answer": LOOP + ASK.replace("assistant\\n", "assistant"),
    "a start": "{{ bos_token }}" + LOOP + ASK,
    "a spelt start": "<s>" + LOOP + ASK,
    "raw white space": "{{ '' }}\n" + LOOP + ASK,
    "stripped texts": (LOOP + ASK).replace("message['content']", "message['content'] | trim"),
    "stripped texts, set": (LOOP + ASK).replace("message['content']", "content").replace(
        "%}{{", "%}{% set content = message['content'].strip() %}{{", 1
    ),
    "one system prompt or another": LOOP.replace("%}{{", "%}" + FIRST + FIRST.replace("Be", "Do be") + "{{", 1) + ASK,
    "a system prompt always": "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}" + LOOP + ASK,
    "no first message": (LOOP + ASK).replace("in messages", "in messages[1:]"),
    "no first message, set": "{% set messages = messages[1:] %}" + LOOP + ASK,
    "no system message": LOOP.replace("%}{{", "%}{% if message.role == 'user' %}{{", 1).replace(
        "}}{%", "}}{% elif message.role == 'assistant' %}{{ '' }}{% endif %}{%"
    ) + ASK,
    "not everybody": LOOP.replace("%}{{", "%}{% if message.role != 'system' %}{{", 1).replace(
        "}}{%", "}}{% endif %}{%"
    ) + ASK,
    "a macro": "{% macro turn(m) %}{{ m }}{% endmacro %}" + LOOP + ASK,
    "one turn": "{{ '<|im_start|>user\\n' + messages[0]['content'] + '<|im_end|>\\n' }}" + ASK,
    "an end that is missing": (LOOP + ASK).removesuffix("{% endif %}"),
    "many ends that are missing": TOOLS.replace("{%- endfor %}", ""),
    "a choice": LOOP + ASK.replace("'<|im", "'' if x else '<|im"),
    "a thought begun": LOOP + ASK.replace("assistant\\n", "assistant\\n<think>\\n"),
    "thoughts never empty": THOUGHTS.replace("{{- '<think>\\n\\n</think>\\n\\n' }}", ""),
    "phi-4": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "phi-3": "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
    "deepseek": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{% else %}{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
    "llama 3.1": "{{- bos_token }}\n{%- set date_string = '26 Jul 2024' %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}\n{{- '<|eot_id|>' }}\n{%- for message in messages %}\n{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}",
    "llama 3 without a start": HEADERS.replace("bos_token + ", ""),
    "llama 3, not stripped": HEADERS.replace(" | trim", ""),
}  # fmt: skip


@pytest.mark.parametrize("source", ODD.values(), ids=ODD)
def test_what_is_not_plainly_a_known_format_is_refused_with_the_way_out(source):
    with pytest.raises(UserError, match=r"folder.*--chat-format") as caught:
        recognise(source, "folder/tokenizer_config.json")
    assert "\n" not in str(caught.value)


def test_nothing_in_a_template_is_run(tmp_path):
    path = tmp_path / "made"
    source = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        + f"{{% set x = open({str(path)!r}, 'w') %}}"
        + LOOP
        + ASK
    )
    with pytest.raises(UserError):
        recognise(source, "x")
    assert not path.exists()
    for long in ("{% if tools %}" * 50_000, "{{ '" * 50_000, "{#" * 50_000, LOOP + ASK + " " * 10**6):
        with pytest.raises(UserError):  # and soon
            recognise(long, "x")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_an_edited_template_is_refused_or_still_says_what_its_format_says(fuzz):
    """Pieces go and come. Of what is still recognised, and runs, next to nothing says something else: the
    conditions are known ones, but are not looked at together."""
    rng, kept, wrong = random.Random(0), 0, []
    talks = [
        [m | {"content": m["content"].strip("\n") or "a"} for m in talk(r, rng)]
        for r in ("u", "sua", "uauau")
    ]
    for rng in fuzz(1500):
        source = rng.choice(list(KNOWN.values()))[0]
        pieces = re.findall(r"\w+|\s+|<\|\w+\|>|.", source, re.DOTALL)
        i = rng.randrange(len(pieces))
        new = [*rng.choices(pieces, k=rng.randrange(3))]
        pieces[i : i + rng.randrange(3)] = new
        edited = "".join(pieces)
        try:
            name, system = recognise(edited, "x")
            compiled = jinja(edited)
            ran = [(run(compiled, t, p), said(name, t, system, p)) for t in talks for p in (False, True)]
        except (UserError, jinja2.TemplateError, TypeError, ValueError):
            continue
        kept += 1
        if any(one.rstrip("\n") != other.rstrip("\n") for one, other in ran):
            wrong.append(edited)
    assert kept > 100 and len(wrong) <= kept / 50


@pytest.mark.parametrize(
    "whole", [None, 7, [], {}, ["{{ x }}"], b"x", "\0", "\\", "{{ '\\x' }}", '{{ "\\ud800" }}{%', "{% set %}"]
)
def test_what_is_no_template_at_all_is_refused(whole):
    with pytest.raises(UserError):
        recognise(whole, "x")
