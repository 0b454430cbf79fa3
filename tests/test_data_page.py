"""docs/data.md: each row on the page is read as it says, by the flags that it gives or its line of Python.
Rows of public data sets as they come are read right too, or refused by file, line and field.
"""

import json
import re

import pytest
from conftest import ROOT

from nanoalign import UserError
from nanoalign.rows import read_rows
from nanoalign.show_rows import kind_of

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"`--kind (\w+)(?: --fields (\S+))?`.*?\n```jsonl\n(.*?)```", PAGE, re.DOTALL)
BIRD, DUCK, STONE = "user: Which bird swims?", "A duck.", "A stone."
BRIEF = "system: Be brief."
SUM = "user: What is 2 + 2 + 3?"
GREETED = ["user: Hi", "assistant: Hello.", BIRD]
NATALIA = "Natalia sold 48 clips in April and half as many in May. How many in all?"
DUE = [  # of each block the rows, as `told` tells them
    ["A duck can swim and fly. A stone can do neither."],
    [
        [BIRD, f"assistant: {DUCK}"],
        [f"user: {NATALIA}", "assistant: 48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"],
        ["user: Hi", "assistant, not learnt from: What?", BIRD, f"assistant: {DUCK}"],
        [BRIEF, BIRD, f"assistant: {DUCK}"],
    ],
    [
        ([BIRD], DUCK, STONE, 0.8),
        ([BIRD], DUCK, STONE, 1),
        ([BIRD], DUCK, STONE, 1),
        (GREETED, DUCK, STONE, 1),
        ([BRIEF, BIRD], DUCK, STONE, 1),
        ([BIRD], "A swan.", STONE, 1),
        ([BIRD], DUCK, "A swan.", 1),
        ([BIRD], DUCK, STONE, 1),
    ],
    [
        ([BIRD], DUCK, True),
        ([BIRD], STONE, False),
        ([BIRD], DUCK, True),
        ([SUM], "2 + 2 = 4\n4 + 3 = 8\nA: 8", False),
    ],
    [([SUM], ["2 + 2 = 4", "4 + 3 = 8", "Answer: 8"], [1.0, 0.0, 0.1], False)],
    [
        ([BIRD], {"kind": "animal"}),
        ([BRIEF, BIRD], {}),
        (GREETED, {}),
        ([SUM], {"answer": "2 + 2 = 4, 4 + 3 = 7\n#### 7"}),
    ],
    [["user: Name a bird that swims.", f"assistant: {DUCK}"]],
    [[BIRD, f"assistant: {DUCK}"]],
    [[BRIEF, BIRD, f"assistant: {DUCK}"]],
    [[BIRD, f"assistant: {DUCK}"]],
    [([BRIEF, BIRD], DUCK, STONE, 1)],
    [([BIRD], DUCK, STONE, 1)],
]


def told(row: dict):
    """What a row says, in short."""
    if "text" in row:
        return row["text"]
    silent = ("", ", not learnt from")
    talk = row.get("messages") or row["prompt"]
    said = [f"{m['role']}{silent[m.get('weight') == 0]}: {m['content']}" for m in talk]
    if "messages" in row:
        return said
    if "chosen" in row:
        return said, row["chosen"], row["rejected"], row.get("probability", 1)
    if "completions" in row:
        return said, row["completions"], row["labels"], row["label"]
    return (said, row["completion"], row["label"]) if "label" in row else (said, row["meta"])


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        return str(path)

    return write


def test_every_block_of_rows_on_the_page_says_its_kind():
    assert len(BLOCKS) == PAGE.count("```jsonl") == len(DUE)
    assert {kind for kind, _, _ in BLOCKS} == {"text", "chat", "pairs", "labelled", "steps", "prompts"}


@pytest.mark.parametrize("block, due", [*zip(BLOCKS, DUE)])
def test_each_row_on_the_page_is_read_as_it_says(file, block, due):
    kind, fields, lines = block
    rows = read_rows(file(lines), kind, fields=fields)
    assert [told(row) for row in rows] == due
    for line in lines.splitlines():
        also = {"prompts": "chat"}  # GSM8K's rows are both
        assert kind_of(file(line), fields) in (kind, also.get(kind))


# ------------------------------------------------------------------------------------- by a line of Python

QUESTION = {"full_text": "Which bird swims?", "id": "x", "dataset": "eli5"}
REPLIES = [
    {"text": "A swan.", "role": "assistant", "rank": 1, "replies": []},
    {"text": DUCK, "role": "assistant", "rank": 0, "replies": []},
    {"text": "?", "role": "assistant", "replies": []},  # nobody has ranked it
]
PREFERRED = [([BIRD], DUCK, STONE, 1)]
THEIRS = {  # a row as it comes → what it says
    "alpaca": (
        {"instruction": "Name the bird that swims.", "input": "A duck, a stone.", "output": DUCK},
        "chat", [["user: Name the bird that swims.\n\nA duck, a stone.", f"assistant: {DUCK}"]],
    ),
    "dolly": (
        {"instruction": "Who swims?", "context": "Ducks swim.", "response": "Ducks."},
        "chat", [["user: Ducks swim.\n\nWho swims?", "assistant: Ducks."]],
    ),
    "helpsteer": (
        {"prompt": "Which bird swims?", "response": STONE, "helpfulness": 1, "correctness": 0},
        "labelled", [([BIRD], STONE, False)],
    ),
    "helpsteer3": (
        {"domain": "general", "language": "english", "overall_preference": -2, "response1": DUCK,
         "response2": STONE, "context": [{"role": "user", "content": "Which bird swims?"}]},
        "pairs", PREFERRED,
    ),
    "nectar": (
        {"prompt": "\n\nHuman: Which bird swims?\n\nAssistant: ", "turns": 1,
         "answers": [{"answer": STONE, "rank": 2.0}, {"answer": DUCK, "model": "a", "rank": 1.0}]},
        "pairs", PREFERRED,
    ),
    "oasst": (
        {"message_tree_id": "x",
         "prompt": {"text": "Which bird swims?", "role": "prompter", "replies": REPLIES}},
        "pairs", [([BIRD], DUCK, "A swan.", 1)],
    ),
    "pku": (
        {"prompt": "Which bird swims?", "response_0": STONE, "response_1": DUCK, "is_response_0_safe": True,
         "better_response_id": 1, "safer_response_id": 0},
        "pairs", PREFERRED,
    ),
    "shp": (
        {"post_id": "x", "domain": "askscience", "history": "Which bird swims?", "human_ref_A": STONE,
         "human_ref_B": DUCK, "labels": 0, "score_ratio": 2.0},
        "pairs", PREFERRED,
    ),
    "summarize": (
        {"info": {"id": "x", "post": "Ducks swim.", "subreddit": "birds"}, "choice": 1, "worker": "y",
         "summaries": [{"text": STONE, "policy": "sup1"}, {"text": DUCK, "policy": "ref"}]},
        "pairs", [(["user: Ducks swim.\n\nTL;DR:"], DUCK, STONE, 1)],
    ),
    "ultrafeedback": (
        {"source": "evol", "instruction": "Which bird swims?", "models": ["a", "b"],
         "completions": [{"response": STONE, "model": "a", "overall_score": 2.0},
                         {"response": DUCK, "model": "b", "overall_score": 8.5}]},
        "pairs", PREFERRED,
    ),
    "webgpt": (
        {"question": QUESTION, "answer_0": DUCK, "answer_1": STONE, "score_0": 0.5, "score_1": -0.5,
         "tokens_0": {}, "quotes_0": {}},
        "pairs", PREFERRED,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def converters():
    names = {}
    exec(re.search(r"```python\n(import json, sys\n.*?)```", PAGE, re.DOTALL)[1], {"__name__": "page"}, names)
    return names["CONVERT"]


def test_every_line_of_python_on_the_page_has_a_row_here(converters):
    assert converters.keys() == THEIRS.keys()


@pytest.mark.parametrize("name", THEIRS)
def test_a_row_of_a_public_data_set_becomes_what_it_says_by_a_line_of_python(file, converters, name):
    row, kind, due = THEIRS[name]
    assert [told(one) for one in read_rows(file(converters[name](row)), kind)] == due


@pytest.mark.parametrize("name", THEIRS)
def test_the_same_row_as_it_comes_is_refused_by_line_and_field(file, name):
    row, kind, _ = THEIRS[name]
    with pytest.raises(UserError, match=r'rows.jsonl, line 1: field "[a-z_]+": expected .*, found .*'):
        read_rows(file(row), kind)


# -------------------------------------------------------------------------------------------- as they come


def message(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = [message("user", "Which bird swims?")]
SIDES = {"chosen": [*ASKED, message("assistant", DUCK)], "rejected": [*ASKED, message("assistant", STONE)]}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    "row",
    [
        {**SIDES, "prompt": "Which bird swims?", "prompt_id": "x", "messages": SIDES["chosen"],
         "score_chosen": 8.0, "score_rejected": 2.0},  # UltraFeedback-binarized
        {**SIDES, "id": "x", "source": "y", "prompt": "Which bird swims?", "chosen_model": "a"},  # Tulu 3
        {**SIDES, "source": "magpie"},  # Skywork
        {**SIDES, "dataset": "capybara", "chosen_rating": 5.0, "rejected_rating": 4.0},  # DPO-mix
    ],
)  # fmt: skip
def test_rows_of_preferences_with_scores_and_sources_beside_them_are_read_as_they_come(file, row):
    assert [told(one) for one in read_rows(file(row), "pairs")] == PREFERRED
    assert [told(one) for one in read_rows(file(row), "chat", fields="prompt=")] == [
        [BIRD, f"assistant: {DUCK}"]
    ]


@pytest.mark.parametrize(
    "kind, row, field",
    [
        ("chat", {"messages": [*ASKED, message("assistant", None, tool_calls=[CALL])]}, "messages"),
        ("chat", {"messages": [*SIDES["chosen"]], "tools": [{"type": "function"}]}, "tools"),
        ("chat", {"messages": [*SIDES["chosen"], message("tool", "x", tool_call_id="1")]}, "messages"),
        ("chat", {"messages": SIDES["chosen"], "images": ["x.png"]}, "images"),
        ("chat", {"messages": [SIDES["chosen"], SIDES["rejected"]]}, "messages"),  # two conversations
        (
            "chat",
            {"prompt": "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nOh", "completion": "x"},
            "prompt",
        ),
        ("pairs", {**SIDES, "chosen": {"from": "gpt", "value": DUCK}, "conversations": []}, "chosen"),
        ("labelled", {"prompt": "Hi", "completion": "x", "label": 1}, "label"),
        ("labelled", {"prompt": "Hi", "response": "x", "label": True}, "completion"),
        ("steps", {"prompt": "Hi", "completions": [{"response": "x"}], "labels": [1]}, "completions"),
        ("prompts", {"instruction": "Hi", "prompt": "Ho"}, "instruction"),
        ("text", {"content": "Once."}, "text"),
    ],
)
def test_what_is_not_understood_is_refused_by_line_and_field(file, kind, row, field):
    with pytest.raises(UserError, match=rf'rows.jsonl, line 1: fields? "{field}"'):
        read_rows(file(row), kind)
