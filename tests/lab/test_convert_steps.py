"""Other formats become rows of steps: PRM800K's, Math-Shepherd's, and solutions that check themselves."""

import json

import pytest
from conftest import SHARED

from lab.convert_steps import Config, check_calculator, convert, main
from nanoalign import UserError
from nanoalign.rows import RowError, read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from train_prm import UNLABELLED, labels_of, step_examples

WORLD = get_tokenizer("world")


def asked(text):
    return [{"role": "user", "content": text}]


def test_alternatives_of_prm800k_are_siblings_and_never_chained():
    def offered(*texts, chosen=None, human=None):
        completions = [{"text": text, "rating": rating} for text, rating in texts]
        return {"completions": completions, "chosen_completion": chosen, "human_completion": human}

    stages = [
        offered(("a", 1), ("a2", -1), chosen=0),
        offered(("b", -1), ("b2", 0), human={"text": "h", "rating": None}),
        offered(("c", -1), ("c2", None)),
    ]
    row = {"question": {"problem": "Q"}, "label": {"steps": stages, "finish_reason": "found_error"}}
    rows = convert(row)
    found = [(r["completions"], r["labels"], r["neutral"]) for r in rows]
    assert found == [
        (["a", "h"], [1.0, None], []),
        (["a2"], [0.0], []),
        (["a", "b"], [None, 0.0], []),
        (["a", "b2"], [None, 1.0], [1]),
        (["a", "h", "c"], [None, None, 0.0], []),  # c2 was not rated
    ]
    assert all(r["prompt"] == asked("Q") for r in rows)
    left = {how: len(step_examples([rows[3], rows[1]], WORLD, 64, False, how)) for how in ("good", "ignore")}
    assert left == {"good": 2, "ignore": 1}


def test_quality_control_rows_of_prm800k_are_left_out_and_counted(tmp_path, capsys):
    good = {
        "question": {"problem": "Q"},
        "label": {"steps": [{"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0}]},
    }
    path = str(tmp_path / "prm800k.jsonl")
    write_rows(
        path,
        [
            good,
            {**good, "is_quality_control_question": True},
            {**good, "is_initial_screening_question": True},
        ],
    )
    main(Config(data=path, out=str(tmp_path / "steps.jsonl")))
    assert len(read_rows(str(tmp_path / "steps.jsonl"), "steps")) == 1
    assert "2 rows (ties, unrated or for quality control) were left out" in capsys.readouterr().out


def test_a_bad_rating_of_prm800k_is_named():
    step = {"completions": [{"text": "a", "rating": 2}], "chosen_completion": 0}
    with pytest.raises(RowError, match='step 0, completion 0, "rating": expected -1, 0, 1 or null, found 2'):
        convert({"question": {"problem": "Q"}, "label": {"steps": [step]}})
    for broken in ({}, {"steps": 3}, {"steps": [{"completions": [{"rating": 1}], "chosen_completion": 0}]}):
        with pytest.raises(RowError, match="PRM800K"):
            convert({"question": {"problem": "Q"}, "label": broken})


@pytest.mark.parametrize("text", [None, 3, ["a"], {"text": "a"}])
def test_a_text_of_prm800k_that_is_no_string_is_named_by_file_line_and_field(tmp_path, capsys, text):
    def row(text, human="b"):
        offered = [{"text": "a", "rating": 1}, {"text": text, "rating": -1}]
        stages = [{"completions": offered, "chosen_completion": 0}]
        stages.append({"completions": [], "human_completion": {"text": human, "rating": None}})
        return {"question": {"problem": "Q"}, "label": {"steps": stages}}

    path, out = str(tmp_path / "prm800k.jsonl"), str(tmp_path / "steps.jsonl")
    for bad, where in (
        (row(text), "step 0, completion 1"), (row("a", text), "step 1, human_completion")
    ):  # fmt: skip
        write_rows(path, [row("a"), bad])
        with pytest.raises(
            UserError, match=f'line 2: field "label", "steps", {where}, "text": expected a string'
        ):
            main(Config(data=path, out=out))
        main(Config(data=path, out=out, skip_bad_rows=True))
        assert len(read_rows(out, "steps")) == 2 and "skipped 1 bad rows of 2" in capsys.readouterr().out


def test_the_case_of_a_text_of_prm800k_that_is_no_string(tmp_path):
    path = SHARED / "cases" / "prm800k_bad_text.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    with pytest.raises(
        UserError, match=r'prm800k_bad_text.jsonl, line 1: .*completion 0, "text".*found null'
    ):
        main(Config(data=str(path), out=str(tmp_path / "steps.jsonl")))


def test_math_shepherds_marks_become_labels_and_its_separator_in_a_question_stays_text():
    given = "Сказки and руки? Step 1: 1 + 1 = 2 ки\nStep 2: 2 + 2 = 5 ки\nStep 3: The answer is: 5 ки"
    marks = iter("+--")
    head, _, tail = given.partition("Step 1:")
    judged = head + "Step 1:" + "".join(next(marks) if c == "\0" else c for c in tail.replace("ки", "\0"))
    row = convert({"input": given, "label": judged, "task": "GSM8K"})[0]
    assert row["prompt"] == asked("Сказки and руки?")
    assert row["completions"] == ["Step 1: 1 + 1 = 2", "Step 2: 2 + 2 = 5", "Step 3: The answer is: 5"]
    assert row["labels"] == [1.0, 0.0, 0.0]
    with pytest.raises(RowError, match="Step 1"):
        convert({"input": "No steps.", "label": "No steps."})


@pytest.mark.parametrize(
    "line, verdict",
    [
        ("48/2 = <<48/2=24>>24", 1.0),
        ("<<48/2=23>>23", 0.0),
        ("<<1/3=0.33>>0.33 and <<2*3=6>>", 1.0),
        ("<<1/3=0.34>>", 0.0),
        ("<<7/2=3>>", 0.0),
        ("<<1,000*2=2,000>>", 1.0),
        ("<<3-(2-5)*2=9>>", 1.0),
        ("<<2*3=6>> <<2*3=7>>", 0.0),
        ("<<x*.25=19.5>>", None),
        ("<<1/0=5>>", None),
        ("<<__import__('os')=5>>", None),
        ("<<9**9**9=5>>", None),
        ("no sum", None),
    ],
)
def test_a_line_of_gsm8k_is_checked_by_its_own_equations(line, verdict):
    assert check_calculator(line) == verdict


def test_a_labelled_solution_becomes_its_lines_with_the_verdict_at_the_end_for_an_outcome_model():
    row = {"question": "Q", "6b": {"solution": "<<1+1=2>>2\nso\nA: 3", "is_correct": False}}
    [parsed] = convert(row)
    assert (parsed["completions"], parsed["labels"]) == (["<<1+1=2>>2", "so", "A: 3"], [1.0, None, None])
    assert labels_of(parsed, True, "good") == [UNLABELLED, UNLABELLED, 0.0]


STAGE = {"completions": [{"text": "a", "rating": 0}], "chosen_completion": 0}
OTHERS = [
    {"question": {"problem": "Q"}, "label": {"steps": [STAGE]}},
    {"input": "Q Step 1: a ки", "label": "Q Step 1: a -", "task": "GSM8K"},
    {"question": "Q", "6b": {"solution": "1\n2", "is_correct": True}},
    {"prompt": "Q", "completion": "1\n2", "label": False, "meta": {"a": 1}},
]


@pytest.mark.parametrize("row", OTHERS, ids=["PRM800K", "Math-Shepherd", "GSM8K", "labelled"])
def test_what_a_converter_is_for_is_refused_where_steps_are_read_and_the_converter_named(row, tmp_path):
    path, out = str(tmp_path / "other.jsonl"), str(tmp_path / "steps.jsonl")
    write_rows(path, [row])
    with pytest.raises(
        UserError, match=r"line 1: .*completions.*python -m lab.convert_steps --data X --out Y"
    ):
        read_rows(path, "steps")
    main(Config(data=path, out=out))
    assert read_rows(out, "steps") == convert(row)  # nothing is lost in the file
    main(Config(data=out, out=str(tmp_path / "again.jsonl")))  # rows of steps stay as they are
    assert read_rows(str(tmp_path / "again.jsonl"), "steps") == convert(row)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "Q"}, "line 1: no format .*prompt"),
        ({"input": "Q", "label": 3}, "line 1: .*Math-Shepherd"),
        ({"question": "Q"}, "line 1: .*is_correct"),
        ({**OTHERS[3], "label": "yes"}, "line 1: .*true or false"),
        ({**OTHERS[3], "meta": 3}, "line 1: .*meta"),
        ({**OTHERS[3], "context": "A text."}, "line 1: .*context"),
        (None, "--data"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_sentence(row, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=said):
        main(Config(data=str(path) if row else "", out=str(tmp_path / "steps.jsonl")))
