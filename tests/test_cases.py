"""Layouts of rows that people have: each is read right, or refused by file, line and field; never misread.

The small inputs of ../shared/cases are run where they are; the same kinds stand here as rows of this file.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHARED

from nanoalign import UserError
from nanoalign.data import chat_examples, labelled_examples, read_split
from nanoalign.rows import parse_prompt, read_rows
from nanoalign.tokenizer import get_tokenizer
from nanoalign.vocabulary import RUN

WORLD = get_tokenizer("world")
CASES = SHARED / "cases"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(prompt, chosen, rejected, **meta):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "meta": meta}


@pytest.fixture
def file(tmp_path):
    """file(row or line, …, name=…) → the path of a file of those lines."""

    def write(*rows, name="rows.jsonl", start=""):
        path = tmp_path / name
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        path.write_text(start + text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def case():
    """case(name) → the path of that file of ../shared/cases."""

    def path(name):
        if not CASES.exists():
            pytest.skip(f"no cases in {CASES}")
        return str(CASES / name)

    return path


def refused(path, kind, *names, **options):
    with pytest.raises(UserError) as caught:
        read_rows(path, kind, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (path, *names)), message


def scored(row, kind="chat"):
    """The text of the tokens that are in the loss."""
    if kind == "chat":
        ids, mask = chat_examples([row], WORLD, 10**7)[0]
    else:
        ids, mask = labelled_examples([row], WORLD, 10**7)[0][0]
    return WORLD.decode(ids[mask], specials=True)


# ---------------------------------------------------------------------------------------- prompts of pairs

BIRD, FLIES = user("Which bird swims?"), user("And flies?")
DUCK, STONE = assistant("A duck."), assistant("A stone.")
BRIEF = system("Be brief.")


@pytest.mark.parametrize(
    "prompt, before, whole",
    [
        ("Which bird swims?", [BRIEF, BIRD], [BRIEF, BIRD]),  # a piece at the end
        ("Which bird swims?", [BIRD, DUCK, FLIES], [BIRD, DUCK, FLIES]),  # at the beginning
        ("And flies?", [BIRD, DUCK, FLIES], [BIRD, DUCK, FLIES]),
        ([BIRD, DUCK], [BRIEF, BIRD, DUCK, FLIES], [BRIEF, BIRD, DUCK, FLIES]),  # in the middle
        ([BRIEF, BIRD], [BIRD], [BRIEF, BIRD]),  # the sides repeat the prompt's end
        ([BRIEF, BIRD], [BRIEF, BIRD, DUCK, FLIES], [BRIEF, BIRD, DUCK, FLIES]),
        ([BRIEF], [BIRD], [BRIEF, BIRD]),  # the sides go on after it
        ([BRIEF, BIRD], [], [BRIEF, BIRD]),
        ("Which bird swims?", [DUCK, FLIES], [BIRD, DUCK, FLIES]),
        (" Which bird swims?\n", [BRIEF, BIRD], [BRIEF, BIRD]),  # but for white space around it
    ],
)
def test_what_the_sides_share_is_the_prompt_and_nothing_stands_in_it_twice(file, prompt, before, whole):
    if [m["role"] for m in ([user(prompt)] if isinstance(prompt, str) else prompt)][-1] == "assistant":
        prompt = prompt[:-1]
    path = file(pair(prompt, [*before, DUCK], [*before, STONE]))
    assert read_rows(path, "pairs") == [pair(whole, "A duck.", "A stone.")]
    assert read_rows(path, "prompts") == [{"prompt": whole, "meta": {}}]
    assert [row["prompt"] for row in read_rows(path, "labelled")] == [whole, whole]


@pytest.mark.parametrize(
    "row, names",
    [
        (pair("Who?", [BIRD, DUCK], [BIRD, STONE]), ["prompt", "chosen", "rejected"]),
        (
            pair([BRIEF, BIRD], [system("Be long."), BIRD, DUCK], [system("Be long."), BIRD, STONE]),
            ["prompt"],
        ),
        (pair("Which bird swims?", [BIRD, DUCK], [FLIES, STONE]), ["same prompt"]),
        (
            {"chosen": [BIRD, DUCK, STONE], "rejected": [BIRD, DUCK, DUCK]},
            ["chosen", "rejected", "one message"],
        ),
    ],
)
def test_sides_that_do_not_fit_the_prompt_are_refused(file, row, names):
    refused(file(row), "pairs", "line 1", *names)


def test_the_cases_of_prompts_that_are_pieces(case):
    rows = read_rows(case("prompt_is_a_piece.jsonl"), "pairs")
    assert [row["prompt"] for row in rows] == [[BRIEF, BIRD], [BIRD, DUCK, FLIES]]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("A duck.", "A stone."), ("A duck too.", "A stone."),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- system messages


def test_a_system_column_comes_first_in_every_kind(file):
    both = {"system": "Be brief."}
    answer = {"completion": "A duck."}
    steps = {"completions": ["A duck."], "labels": [True]}
    path = file({**both, "prompt": "Which bird swims?", "chosen": "A duck.", "rejected": "A stone."})
    assert read_rows(path, "pairs")[0]["prompt"] == [BRIEF, BIRD]
    assert read_rows(path, "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    assert read_rows(path, "prompts")[0]["prompt"] == [BRIEF, BIRD]
    path = file({**both, "messages": [BIRD, DUCK], "label": True})
    assert read_rows(path, "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    assert read_rows(path, "labelled")[0]["prompt"] == [BRIEF, BIRD]
    assert read_rows(path, "prompts")[0]["prompt"] == [BRIEF, BIRD]
    path = file({**both, "prompt": [BIRD], **answer, "label": True})
    assert read_rows(path, "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    assert read_rows(path, "labelled")[0]["prompt"] == [BRIEF, BIRD]
    path = file({**both, "question": "Which bird swims?", **steps})
    assert read_rows(path, "steps")[0]["prompt"] == [BRIEF, BIRD]
    path = file({**both, "question": "Which bird swims?", "6b": {"solution": "x", "is_correct": True}})
    assert read_rows(path, "labelled")[0]["prompt"] == [BRIEF, BIRD]
    path = file({**both, "prompt": "Which bird swims?", "responses": ["a", "b"], "scores": [1, 2]})
    assert read_rows(path, "pairs")[0]["prompt"] == [BRIEF, BIRD]
    sides = {"chosen": [BIRD, DUCK], "rejected": [BIRD, STONE]}
    assert read_rows(file({**both, **sides}), "pairs")[0]["prompt"] == [BRIEF, BIRD]


def test_a_system_column_that_the_messages_repeat_is_there_once_and_another_one_is_refused(file):
    row = {"system": "Be brief.", "messages": [BRIEF, BIRD, DUCK]}
    assert read_rows(file(row), "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    assert read_rows(file({**row, "system": ""}), "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    refused(file({**row, "system": "Be long."}), "chat", "line 1", '"system"')
    refused(file({**row, "system": ["Be brief."]}), "chat", "line 1", '"system"', "a string")


def test_an_assistant_may_speak_first_after_a_system_message(file):
    path = file({"messages": [BRIEF, DUCK]}, {"system": "Be brief.", "messages": [DUCK]})
    assert [row["messages"] for row in read_rows(path, "chat")] == [[BRIEF, DUCK]] * 2
    assert [parse_prompt(row) for row in read_rows(path, "chat")] == read_rows(path, "prompts")
    assert read_rows(path, "prompts") == [{"prompt": [BRIEF], "meta": {}}] * 2


def test_the_cases_of_a_system_column(case):
    dog = system("You are a dog.")
    rows = read_rows(case("system_column.jsonl"), "chat")
    assert [row["messages"] for row in rows] == [[dog, user("Who are you?"), assistant("A dog.")]] * 2
    [row] = read_rows(case("system_column.jsonl"), "pairs", skip_bad_rows=True)
    assert row == pair([dog, user("Who are you?")], "A dog.", "A cat.")


# -------------------------------------------------------------------------------- an answer that has begun


@pytest.mark.parametrize("kind", ["chat", "pairs", "labelled", "prompts", "steps"])
@pytest.mark.parametrize("prompt", [[BIRD, DUCK], "\n\nHuman: Which bird swims?\n\nAssistant: A duck"])
def test_a_prompt_that_ends_with_an_answer_is_refused_in_every_kind(file, kind, prompt):
    row = {"prompt": prompt, "completion": "x", "label": True, "completions": ["x"], "labels": [True]}
    if kind == "pairs":
        row |= {"chosen": "x", "rejected": "y"}
    refused(file(row), kind, "line 1", '"prompt"', "user", "A duck")


def test_an_empty_assistants_message_at_the_end_of_a_prompt_is_the_answers_place(file):
    row = {"prompt": [BIRD, assistant(" ")], "completion": "A duck."}
    assert read_rows(file(row), "chat")[0]["messages"] == [BIRD, DUCK]
    refused(file({"prompt": [assistant("")]}), "prompts", "line 1", '"prompt"')


def test_the_case_of_an_answer_that_has_begun(case):
    for kind in ("chat", "prompts"):
        refused(case("prefill.jsonl"), kind, "line 1", '"prompt"', "Sure,")


# --------------------------------------------------------------------------------------------- transcripts

HH = "\n\nHuman: One?\n\nAssistant: One.\n\nHuman: Two?\n\nAssistant:"
TALK = [user("One?"), assistant("One."), user("Two?")]


@pytest.mark.parametrize("prompt", [HH, HH + " ", HH.strip(), HH.removesuffix("\n\nAssistant:")])
def test_a_transcript_as_a_prompt_is_the_conversation_that_it_spells(file, prompt):
    path = file({"prompt": prompt, "chosen": " Two.", "rejected": " Three."})
    assert read_rows(path, "pairs") == [pair(TALK, "Two.", "Three.")]
    assert read_rows(path, "prompts") == [{"prompt": TALK, "meta": {}}]
    row = {"prompt": prompt, "completion": " Two.", "label": True}
    assert read_rows(file(row), "labelled")[0]["completion"] == "Two."
    assert read_rows(file(row), "chat")[0]["messages"] == [*TALK, assistant("Two.")]
    path = file({"prompt": prompt, "chosen": HH + " Two.", "rejected": HH + " Three."})
    assert read_rows(path, "pairs") == [pair(TALK, "Two.", "Three.")]


@pytest.mark.parametrize(
    "text", ["Human: or not?", "Say:\n\nHuman: Hi\n\nAssistant: Ho", "Humans: why?\n\nAssistant: x"]
)
def test_a_prompt_that_only_mentions_human_and_assistant_is_one_message(file, text):
    assert read_rows(file({"prompt": text}), "prompts")[0]["prompt"] == [user(text)]
    answer = "Human: Hi\n\nAssistant: Ho"  # asked for a dialogue
    assert read_rows(file(pair("Write!", answer, "x")), "pairs")[0]["chosen"] == answer


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Hi [/INST]",
        "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nAnd?",
        "Below is an instruction.\n\n### Instruction:\nHi\n\n### Response:",
    ],
)
def test_a_conversation_in_another_chat_format_is_refused_as_a_prompt_and_read_as_a_message(file, text):
    refused(file({"prompt": text}), "prompts", "line 1", '"prompt"', "another format", "messages")
    assert read_rows(file({"prompt": [user(text)]}), "prompts")[0]["prompt"] == [user(text)]


def test_the_case_of_a_transcript_in_the_prompt(case):
    assert read_rows(case("transcript_in_prompt.jsonl"), "pairs") == [pair(TALK, "Two.", "Three.")]


# ------------------------------------------------------------------------------------------------ messages


def test_a_message_of_weight_0_is_read_and_not_learnt_from(file):
    talk = [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]
    [row] = read_rows(file({"messages": talk}), "chat")
    assert scored(row) == " good<|end|>"
    whole = WORLD.render([{"role": m["role"], "content": m["content"]} for m in talk])[0]
    assert chat_examples([row], WORLD, 100)[0][0].tolist() == whole.tolist()  # the tokens are all there
    assert read_rows(file({"messages": talk[:3]}), "prompts", True)[0]["prompt"][1] == assistant("bad")


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", [0]])
def test_a_weight_that_is_neither_0_nor_1_is_refused(file, weight):
    path = file({"messages": [user("a"), assistant("b", weight=weight)]})
    refused(path, "chat", "line 1", '"messages", message 1', "weight", "0 or 1")


def test_weights_are_refused_where_they_mean_nothing_and_where_nothing_is_left_to_learn(file):
    silent = assistant("b", weight=0)
    refused(file({"messages": [user("a"), silent]}), "chat", "line 1", "learn from")
    refused(file({"messages": [user("a"), silent], "label": True}), "labelled", "line 1", "weight")
    refused(file(pair("a", [silent], [assistant("c")])), "pairs", "line 1", '"chosen"', "weight")
    assert read_rows(file({"messages": [{**user("a"), "weight": 0}, assistant("b")]}), "chat")


def test_text_parts_are_read_as_one_text_and_a_picture_is_refused_by_line_and_field(file):
    parts = [{"type": "text", "text": "Which bird"}, {"type": "text", "text": " swims?", "image": None}]
    [row] = read_rows(file({"messages": [user(parts), DUCK]}), "chat")
    assert row["messages"] == [BIRD, DUCK]
    assert read_rows(file({"prompt": [user(parts)]}), "prompts")[0]["prompt"] == [BIRD]
    for part in ({"type": "image_url", "image_url": "x"}, {"type": "text"}, "text", None, {"text": "a"}):
        path = file({"messages": [user([parts[0], part]), DUCK]})
        refused(path, "chat", "line 1", '"messages", message 0, content part 1', "text")
    refused(file({"messages": [user([]), DUCK]}), "chat", "line 1", '"messages", message 0')


def test_sharegpts_names_of_roles_and_texts_are_understood(file):
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Which bird swims?"},
        {"from": "gpt", "value": "A duck.", "weight": None},
    ]
    path = file({"conversations": talk, "source": "x"})
    assert read_rows(path, "chat", fields="messages=conversations")[0]["messages"] == [BRIEF, BIRD, DUCK]
    refused(path, "chat", "line 1", "conversations")
    bad = [talk[1], {"from": "function_call", "value": "{}"}]
    refused(file({"messages": bad}), "chat", "line 1", "message 1", "function_call", "user|assistant")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": "x", "reasoning_content": "y"},
        {"role": "assistant", "content": "x", "train": True},
        {"role": "assistant"},
        {"role": ["assistant"], "content": "x"},
        {"from": ["gpt"], "value": "x"},
    ],
)
def test_a_message_that_means_more_than_its_text_is_refused(file, message):
    refused(file({"messages": [BIRD, message]}), "chat", "line 1", '"messages", message 1')


def test_completions_may_be_messages_and_messages_may_have_a_label(file):
    due = {"prompt": [BIRD], "completion": "A duck.", "label": True, "meta": {}}
    for row in (
        {"prompt": [BIRD], "completion": [DUCK], "label": True},
        {"prompt": "Which bird swims?", "completion": DUCK, "label": True},
        {"messages": [BIRD, DUCK], "label": True},
    ):
        assert read_rows(file(row), "labelled") == [due]
        assert read_rows(file(row), "chat") == [{"messages": [BIRD, DUCK], "meta": {}}]
    assert scored(due, "labelled") == " A duck.<|end|>"
    row = {"prompt": [BIRD], "label": True}
    refused(file({**row, "completion": [BIRD]}), "labelled", "line 1", '"completion"', "assistant")
    refused(file({**row, "completion": [DUCK, FLIES]}), "labelled", "line 1", '"completion"')
    refused(file({**row, "completion": []}), "labelled", "line 1", '"completion"')
    refused(file({"messages": [BIRD], "label": True}), "labelled", "line 1", '"messages"')
    refused(file({"messages": [DUCK], "label": True}), "labelled", "line 1", '"messages"')
    refused(file({"messages": [BIRD, DUCK, DUCK], "label": True}), "labelled", "line 1", '"messages"')


def test_the_cases_of_messages(case, capsys):
    [row] = read_rows(case("message_weight.jsonl"), "chat")
    assert scored(row) == " good<|end|>"
    rows = read_rows(case("completion_as_messages.jsonl"), "labelled")
    assert [(r["prompt"], r["completion"], r["label"]) for r in rows] == [
        ([BIRD], "A duck.", True), ([BIRD], "A stone.", False),
    ]  # fmt: skip
    [row] = read_rows(case("messages_with_label.jsonl"), "labelled")
    assert (row["prompt"], row["completion"], row["label"]) == ([BIRD], "A duck.", True)
    refused(case("content_parts.jsonl"), "chat", "line 2", '"messages", message 0, content part 0', "image")
    [row] = read_rows(case("content_parts.jsonl"), "chat", skip_bad_rows=True)
    assert row["messages"] == [BIRD, DUCK] and "skipped 1 bad rows of 2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- fields and files


def test_a_field_that_is_null_is_not_there(file):
    row = {"messages": None, "prompt": "Hi", "completion": "Hello.", "meta": None, "system": None}
    assert read_rows(file(row), "chat") == [{"messages": [user("Hi"), assistant("Hello.")], "meta": {}}]
    row = {**pair("Hi", "A", "B"), "margin": None, "probability": None, "responses": None, "meta": None}
    assert read_rows(file(row), "pairs") == [pair([user("Hi")], "A", "B")]
    row = {"prompt": "Hi", "completions": ["a"], "labels": [None], "label": None, "neutral": None}
    assert read_rows(file(row), "steps")[0].keys() == {"prompt", "completions", "labels", "meta"}
    row = {"text": None, "prompt": "Hi", "input": None, "tools": None, "question": None}
    assert read_rows(file(row), "prompts") == [{"prompt": [user("Hi")], "meta": {}}]


def test_the_cases_of_nulls(case):
    [row] = read_rows(case("nulls.jsonl"), "pairs", skip_bad_rows=True)
    assert row == pair([BIRD], "A duck.", "A stone.")
    rows = read_rows(case("nulls.jsonl"), "chat")
    assert [row["messages"] for row in rows] == [[BIRD, DUCK]] * 2


UNREAD = {
    "input": "7", "instruction": "Add.", "context": "A text.", "history": [["a", "b"]],
    "system_prompt": "Be.", "conversations": [{"from": "human", "value": "x"}], "tools": [{"name": "f"}],
    "images": ["x.png"],
}  # fmt: skip


@pytest.mark.parametrize("field", UNREAD)
def test_a_column_that_may_change_the_meaning_is_refused_unless_it_is_empty_or_to_be_ignored(file, field):
    row = {"prompt": "Hi", "completion": "Hello.", "chosen": "A", "rejected": "B"}
    for kind in ("chat", "pairs", "prompts"):
        refused(file({**row, field: UNREAD[field]}), kind, "line 1", f'"{field}"', f"--fields {field}=")
        rows = read_rows(file({**row, field: UNREAD[field]}), kind, fields=f"{field}=")
        assert rows == read_rows(file({**row, field: type(UNREAD[field])()}), kind)
        assert rows == read_rows(file({**row, "prompt_id": 3, "source": "x"}), kind)


def test_a_prompt_beside_messages_is_a_piece_of_them_or_refused(file):
    row = {"messages": [BRIEF, BIRD, DUCK], "label": True}
    for prompt in ("Which bird swims? ", [BIRD], [BRIEF, BIRD], [BRIEF]):
        assert read_rows(file({**row, "prompt": prompt}), "chat")[0]["messages"] == [BRIEF, BIRD, DUCK]
    for kind in ("chat", "labelled", "prompts"):
        path = file({**row, "prompt": "You are a dog."})
        refused(path, kind, "line 1", '"prompt" and "messages"', "--fields prompt=")
        assert read_rows(path, kind, fields="prompt=") == read_rows(file(row), kind)


def test_a_thumb_down_is_no_demonstration(file):
    rows = [{"prompt": "Hi", "completion": "Hello.", "label": label} for label in (True, False)]
    refused(file(*rows), "chat", "line 2", '"label"', "thumb down", "--fields label=")
    assert len(read_rows(file(*rows), "chat", skip_bad_rows=True)) == 1
    assert len(read_rows(file(*rows), "chat", fields="label=")) == 2
    assert len(read_rows(file(*rows), "prompts")) == 2


def test_a_field_that_is_there_twice_is_refused(file):
    refused(file('{"prompt": "a", "completion": "b", "prompt": "c"}'), "chat", "line 1", "twice")
    refused(
        file('{"messages": [{"role": "user", "content": "a", "content": "b"}]}'), "chat", "line 1", "twice"
    )


@pytest.mark.parametrize(
    "kind, row, names",
    [
        ("chat", {"messages": [BIRD, DUCK], "completion": "x", "prompt": "y"}, ["messages", "completion"]),
        ("chat", {"prompt": "a", "question": "b", "completion": "c"}, ["prompt", "question"]),
        ("pairs", {**pair("a", "b", "c"), "responses": ["d"], "scores": [1]}, ["chosen", "responses"]),
        ("pairs", {"prompt": "a", "responses": ["b"], "scores": [1], "ranking": [1]}, ["ranking", "scores"]),
        ("labelled", {"messages": [BIRD, DUCK], **pair("a", "b", "c")}, ["messages", "chosen"]),
        ("steps", {"prompt": "a", "completions": ["b"], "labels": [1], "neutral": [1]}, ["neutral"]),
        ("steps", {"prompt": "a", "completions": ["b"], "labels": [1], "neutral": [-1]}, ["neutral"]),
    ],
)
def test_two_fields_that_say_the_same_thing_are_refused(file, kind, row, names):
    row = {**row, "labels": [True]} if "labels" in row else row
    refused(file(row), kind, "line 1", *(f'"{name}"' for name in names))


def test_a_byte_order_mark_is_no_part_of_a_row_or_of_a_text(file):
    row = {"messages": [user("a"), assistant("b")]}
    rows = read_rows(file(row, row, start="\ufeff"), "chat")
    assert len(rows) == 2 and "\ufeff" not in json.dumps(rows, ensure_ascii=False)
    assert read_rows(file("Once.", name="a.txt", start="\ufeff"), "text") == [{"text": "Once."}]
    assert read_rows(file("O\ufeffnce.", name="a.txt"), "text") == [{"text": "O\ufeffnce."}]


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.NDJSON", "a.Json", "a.jsonlines"])
def test_lines_of_json_are_known_by_any_of_their_endings(file, name):
    rows = [{"text": "A duck swims."}, {"text": "A stone does not."}]
    assert read_rows(file(*rows, name=name), "text") == rows


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_refused_in_a_sentence_that_says_what_to_do(file, indent):
    array = json.dumps([{"text": "a"}, {"text": "b"}], indent=indent)
    refused(file(array), "text", "JSON array", "one object a line", "jq")


def test_the_cases_of_files(case, tmp_path):
    rows = read_rows(case("bom.jsonl"), "chat")
    assert len(rows) == 2 and "\ufeff" not in json.dumps(rows, ensure_ascii=False)
    refused(case("array.json"), "chat", "is a JSON array; expected one object a line")
    content = Path(case("rows.ndjson")).read_text(encoding="utf-8")
    for name in ("rows.ndjson", "rows.JSONL", "rows.NDJSON"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        texts = read_rows(str(tmp_path / name), "text")
        assert [row["text"] for row in texts] == ["A duck swims.", "A stone does not."]


@pytest.mark.parametrize("space", [" ", "\n", "\t \r\n", "\u3000"])
def test_a_million_spaces_are_encoded_and_come_back(file, space):
    answer = "a" + space * (1_000_000 // len(space)) + "b"
    [row] = read_rows(file({"prompt": "Hi", "completion": answer}), "chat")
    assert scored(row) == f" {answer}<|end|>"


def test_a_run_of_white_space_is_cut_into_the_fewest_pieces_and_shorter_ones_are_left_alone():
    word = "the " * (RUN // 2)
    assert WORLD.encode(word) == WORLD.encoding.encode_ordinary(word)
    text = word + " " * (2 * RUN) + "the"
    pieces = [word[:-1] + " " * RUN, " " * RUN, " the"]
    assert "".join(pieces) == text
    assert WORLD.encode(text) == [t for piece in pieces for t in WORLD.encoding.encode_ordinary(piece)]


# -------------------------------------------------------------------------------------------- other names


def test_fields_may_have_other_names_and_what_they_hide_is_gone(file):
    row = {"instruction": "Hi", "output": "Hello.", "prompt": "not this", "id": 3}
    path = file(row, {"prompt": "Hi", "completion": "Hello."})  # one row has the names of this house
    names = "prompt=instruction, completion=output"
    due = {"messages": [user("Hi"), assistant("Hello.")], "meta": {}}
    assert read_rows(path, "chat", fields=names) == [due, due]
    swapped = read_rows(file(pair("Hi", "A", "B")), "pairs", fields="chosen=rejected,rejected=chosen")
    assert swapped == [pair([user("Hi")], "B", "A")]
    assert read_rows(file({"content": "Once."}), "text", fields="text=content") == [{"text": "Once."}]
    row = {"prompt": "Hi", "system_prompt": None}
    assert read_rows(file(row), "prompts", fields="system=system_prompt")[0]["prompt"] == [user("Hi")]
    row = {"input": "What?", "system": "Be brief.", "chosen": "A", "rejected": "B"}
    assert read_rows(file(row), "pairs", fields="prompt=input")[0]["prompt"] == [BRIEF, user("What?")]


@pytest.mark.parametrize(
    "names, said",
    [
        ("prompt=instructions", "no row of .*'instructions'"),
        ("promt=instruction", "'promt=instruction'.*prompt"),
        ("prompt:instruction", "'prompt:instruction'"),
        ("prompt=instruction,prompt=output", "'prompt=output'.*once"),
        ("=output", "'=output'"),
    ],
)
def test_names_of_no_field_are_refused_also_where_bad_rows_are_skipped(file, names, said):
    path = file({"output": "Hello.", "prompt": "Hi", "completion": "Hello."})
    for skip in (False, True):
        with pytest.raises(UserError, match=f"--fields '{names}'.*{said}"):
            read_rows(path, "chat", skip, names)


def test_a_missing_field_names_the_flag_that_reads_another(file):
    refused(
        file({"instruction": "Hi", "output": "x"}), "chat", "line 1", "'instruction'", "--fields prompt=NAME"
    )


def test_a_script_that_skips_bad_rows_also_takes_names_of_fields_and_hands_both_on():
    """By their source: no class has the one flag without the other, and no call."""
    flags = {"skip_bad_rows", "fields"}
    paths = [
        *ROOT.glob("*.py"),
        *ROOT.glob("lab/*.py"),
        ROOT / "nanoalign/data.py",
        ROOT / "nanoalign/run.py",
    ]
    found = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)} & flags
                assert own in (set(), flags), (path, node.name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "read_rows":
                own = [part for part in map(ast.unparse, node.args) if part.removeprefix("config.") in flags]
                assert own in ([], ["config.skip_bad_rows", "config.fields"]), (path, ast.unparse(node))
                found += own != []
    assert found >= 11


def test_names_of_fields_hold_for_held_out_rows_too(file):
    train = file({"q": "a", "a": "b"}, name="train.jsonl")
    config = SimpleNamespace(
        skip_bad_rows=False, fields="prompt=q,completion=a", eval_data=file({"q": "c", "a": "d"})
    )
    rows, held_out = read_split(config, train, "chat")
    assert [row["messages"][0]["content"] for row in (*rows, *held_out)] == ["a", "c"]
