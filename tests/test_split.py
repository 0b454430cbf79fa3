"""What is held out is a property of the prompt, the same in every file, stage and run."""

import json

import numpy as np
import pytest
from conftest import SHARED

from nanoalign import UserError
from nanoalign.data import held_out, read_split, split_rows, thin
from nanoalign.rows import read_rows

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.fixture
def file(tmp_path):
    """file(row, …) → the path of a JSONL file with those rows."""
    numbers = iter(range(1000))

    def write(*rows):
        path = tmp_path / f"rows{next(numbers)}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(path)

    return write


def asking(number, **rest):
    return {"prompt": [{**USER, "content": f"question {number}"}], **rest}


@pytest.fixture(scope="module")
def chosen():
    """Numbers of questions that are held out, and of some that are not."""
    out = [i for i in range(2000) if held_out(f"question {i}")]
    return out, [i for i in range(200) if i not in out]


def test_one_prompt_in_twenty_is_held_out(chosen):
    assert abs(len(chosen[0]) - 100) <= 3 * (2000 * 0.05 * 0.95) ** 0.5


def test_a_prompt_is_on_the_same_side_in_every_file_kind_and_spelling(chosen, file):
    out, kept = chosen
    for number in out[:5] + kept[:5]:
        text, told = f"question {number}", number in out
        transcript = f"\n\nHuman: {text}\n\nAssistant: "
        layouts = [
            ("chat", {"prompt": text, "completion": "a"}),
            ("chat", {"messages": [{**USER, "content": text}, ASSISTANT]}),
            ("chat", {"question": text, "answer": "1 #### 1"}),
            ("pairs", {"prompt": text, "chosen": "a", "rejected": "b"}),
            ("pairs", {"chosen": f"{transcript}a", "rejected": f"{transcript}b"}),
            ("labelled", {"prompt": text + " ", "completion": "a", "label": True}),
            ("steps", {"prompt": text, "completions": ["a"], "labels": [True]}),
            ("prompts", {"prompt": [{**USER, "content": text}]}),
            # a conversation is on the side of its beginning, of which another row may hold more
            ("prompts", {"messages": [{**USER, "content": text}, ASSISTANT, {**USER, "content": "more?"}]}),
        ]
        for kind, row in layouts:
            [parsed] = read_rows(file(row), kind)
            one, other = ({"prompt": [{**USER, "content": f"question {n}"}]} for n in (out[-1], kept[-1]))
            assert parsed in split_rows([parsed, one, other], "x")[told]
        assert held_out(text) == held_out([{**USER, "content": text}]) == told


def test_the_split_loses_no_row_and_reads_no_order(chosen):
    rows = [asking(i % 300, meta={"row": i}) for i in range(900)]
    train, out = split_rows(rows, "x")
    assert [row for row in rows if row in out] == out and len(train) + len(out) == 900
    numbers = {int(row["prompt"][0]["content"].split()[1]) for row in out}
    assert numbers == {i for i in chosen[0] if i < 300}
    again, _ = split_rows(rows[::-1], "y")
    assert again == train[::-1]


def test_texts_are_split_by_what_they_say():
    texts = [{"text": f"text {i}"} for i in range(400)]
    out, later = (split_rows(part, "x")[1] for part in (texts, texts[200:]))
    assert 5 <= len(out) <= 40 and later == [row for row in out if row in texts[200:]]


def test_of_too_few_prompts_one_is_held_out_and_said_to_be_in_this_stage_alone(chosen, capsys):
    rows = [asking(i) for i in chosen[1][:3]]
    train, out = split_rows(rows, "few.jsonl")
    assert (len(train), len(out)) == (2, 1)
    assert "few.jsonl has too few prompts" in capsys.readouterr().out


def test_a_file_that_cannot_be_split_asks_for_held_out_rows(chosen):
    for rows in ([asking(chosen[1][0])] * 9, [asking(i) for i in chosen[0][:3]], [{"text": "a"}]):
        with pytest.raises(UserError, match=r"x\.jsonl has .*--eval-data"):
            split_rows(rows, "x.jsonl")


def test_a_prompt_with_more_than_a_tenth_of_the_rows_is_named(chosen, capsys):
    kept = chosen[1]
    rows = [asking(kept[1])] * 90 + [asking(i) for i in kept[2:11] + chosen[0][:1]]
    train, _ = split_rows(rows, "x.jsonl")
    said = capsys.readouterr().out
    assert len(train) == 99
    assert f"90 of 100 rows in x.jsonl ask or say the same, trained on: 'question {kept[1]}'" in said
    split_rows([asking(i) for i in range(100)], "x.jsonl")
    assert capsys.readouterr().out == ""


def test_a_file_of_ninety_rows_of_one_prompt_still_trains_on_them(capsys):
    path = SHARED / "cases" / "many_of_one_prompt.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    train, out = split_rows(read_rows(str(path), "pairs"), str(path))
    assert len(train) >= 85 and out and "warning: 90 of 100 rows" in capsys.readouterr().out


def test_held_out_rows_can_be_those_of_a_file_and_are_compared_with_the_others(file, capsys):
    class Config:
        skip_bad_rows = False
        fields = ""
        eval_data = file({"text": "b"}, {"text": "a"}, {"text": "c"})

    rows = file({"text": "a"})
    assert read_split(Config, rows, "text") == ([{"text": "a"}], [{"text": t} for t in "bac"])
    assert "prompts of 1 of 3 held-out rows are trained on, too" in capsys.readouterr().out
    assert len(read_split(Config, rows, "text", 2)[1]) == 2


@pytest.mark.parametrize("count", [1, 3, 10, 30])
def test_thinned_rows_are_at_most_as_many_in_order_and_from_the_whole_file(count):
    for size in (0, 1, count - 1, count, 2 * count, 7 * count):
        kept = thin(list(range(size)), count)
        assert len(kept) == min(size, count) and kept == sorted(set(kept))
        assert size <= count or max(np.diff([-1, *kept, size])) <= size // count


def test_a_file_sorted_by_kind_is_thinned_evenly_whatever_its_length():
    for b in (1, 50, 99, 100, 350):
        kept = thin(["a"] * 100 + ["b"] * b, 100)
        assert len(kept) == 100 and abs(kept.count("b") - 100 * b / (100 + b)) <= 1
