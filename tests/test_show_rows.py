"""`python -m nanoalign.rows FILE` tells a file's kind, and marks exactly the tokens that are in the loss."""

import json
import re

import pytest
from runs import command, forked
from test_data import GOOD

from nanoalign import UserError
from nanoalign.rows import PARSERS
from nanoalign.show_rows import Config, main, recognise

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
ROWS = {  # kind → a row, and the texts that are scored in it
    "text": ({"text": "Once."}, ["Once.<|end|>"]),
    "chat": ({"messages": [*TALK, {"role": "user", "content": "And?"}, TALK[1]]}, [" Hello.<|end|>"] * 2),
    "pairs": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, [" Yes.<|end|>", " No.<|end|>"]),
    "labelled": ({"messages": TALK, "label": False}, [" Hello.<|end|>"]),
    "steps": ({"prompt": "Hi", "completions": ["1\n2", "3"], "labels": [True, None]}, ["<|step|>"] * 3),
    "prompts": ({"prompt": "Hi"}, []),
    "compared": (
        {
            "prompt": "Hi",
            "responses": ["a", "b"],
            "ended": [True, True],
            "votes": [{"annotator": "x", "p": 1}],
        },
        [],
    ),
}


@pytest.fixture
def show(tmp_path, capsys):
    """show(row or text, …) → what is printed of a file of them."""

    def show(*rows, name="rows.jsonl", **flags):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        main(Config(data=str(path), **flags))
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("kind", PARSERS)
def test_each_kind_is_recognised_and_the_scored_tokens_are_marked(show, kind):
    row, scored = ROWS[kind]
    out = show(row)
    assert f": 1 rows of kind {kind} (" in out
    assert re.findall("⟦([^⟧]*)⟧", out) == scored


@pytest.mark.parametrize("kind, row, _", [case for case in GOOD if case[0] != "prompts"])
def test_what_a_kind_is_read_from_is_recognised_as_it_or_as_the_kind_that_has_more_fields(kind, row, _):
    also = {"chat": {"pairs"}}
    assert recognise(row) in {kind, *also.get(kind, ())}


def test_a_row_is_shown_in_full_as_the_model_reads_it_with_its_label(show):
    out = show(
        {"system": "Be brief.", "prompt": "x " * 500, "chosen": "a", "rejected": "b", "probability": 0.75}
    )
    assert f"<|system|> Be brief.<|end|><|user|> {'x ' * 500}<|end|><|assistant|>⟦ a<|end|>⟧" in out
    assert "row 1, rejected: 2 of " in out and out.count("probability: 0.75") == 2
    assert "labels: [1.0, None]" in show(ROWS["steps"][0])


def test_so_many_rows_are_shown_and_what_does_not_fit_is_left_out_with_its_number(show):
    rows = [{"prompt": "the " * n, "completion": "yes"} for n in (1, 50, 2, 3)]
    assert re.findall(r"row (\d)", show(*rows, count=2)) == ["1", "2"]
    out = show(*rows, count=4, max_length=20)
    assert re.findall(r"row (\d)", out) == ["1", "3", "4"] and "1 dropped" in out
    assert "⟦ yes<|end|>⟧" in out


def test_other_names_other_kinds_and_other_files(show):
    row = {"instruction": "Hi", "output": "Hello."}
    assert "⟦ Hello.<|end|>⟧" in show(row, fields="prompt=instruction,completion=output")
    assert "of kind labelled" in show(ROWS["pairs"][0], kind="labelled")
    out = show('{"text": "not parsed"}', name="a.txt")
    assert "of kind text" in out and '⟦{"text": "not parsed"}<|end|>⟧' in out


def test_text_of_a_file_cannot_drive_the_terminal(show):
    out = show({"prompt": "\x1b[2J\x07\u202eHi", "completion": "\x1b]0;title\x07", "meta": {}})
    assert not set(out) & set("\x1b\x07\u202e")


@pytest.mark.parametrize(
    "rows, flags, said",
    [
        ([{"a": 1}], {}, r"line 1: no kind of rows.*'a'.*--fields.*--kind"),
        (["", "x"], {}, "line 2: not valid JSON"),
        (['[{"text": "a"}]'], {}, "JSON array"),
        ([" "], {}, "empty"),
        ([{"prompt": "Hi"}], {"kind": "pair"}, "--kind pair is unknown.*pairs"),
        ([{"prompt": "Hi"}], {"tokenizer": "none"}, "no tokenizer"),
        ([{"prompt": "Hi", "chosen": "a"}], {}, 'line 1: field "rejected"'),
        ([{"prompt": "Hi"}], {"fields": "prompt"}, "--fields"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(show, rows, flags, said):
    with pytest.raises(UserError, match=said):
        show(*rows, **flags)


def test_the_command_takes_a_file_and_flags(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["chat"][0]))
    status, out, err = run("-m", "nanoalign.rows", path, "--count", "1")
    assert (status, err) == (0, "") and "⟦ Hello.<|end|>⟧" in out
    assert forked(lambda: command("-m", "nanoalign.rows", "--help"))[1].startswith("usage: -m nanoalign.rows")
    for data, said in ((str(tmp_path / "none.jsonl"), "does not exist"), ("", "name a file")):
        with pytest.raises(UserError, match=said):
            main(Config(data=data))
