"""Final answers: a table of what people and models write, and the verdicts of graders on real solutions."""

import json
from fractions import Fraction

import pytest
from conftest import SHARED

from nanoalign import UserError
from nanoalign.answers import answers, final_answer, gold_answer


def right(gold, response: str) -> int:
    row = {"prompt": [{"role": "user", "content": "How many?"}], "meta": {"answer": gold}}
    return int(answers([row], [response], [True])[0])


TABLE = [  # the answer in the row, the response, is it right?
    # marks
    ("5", "2 + 3 = 5\nAnswer: 5", 1),
    ("5", "#### 5", 1),
    ("5", "####5\n", 1),
    ("5", "so 5.\nA: 5", 1),
    ("5", "Final answer: 5", 1),
    ("5", "Final Answer:\n\n5\n\nI hope this helps!", 1),
    ("5", "So the answer is 5.", 1),
    ("5", "The answer is: 5", 1),
    ("5", "The answer is 5. It was easy.", 1),
    ("5", r"Hence $\boxed{5}$.", 1),
    ("5", r"The final answer is $\boxed{x = 5}$.", 1),
    ("5", "<think>6?</think><answer> 5 </answer>", 1),
    # words behind a number that make another one of it, and units that do not
    ("3", "Answer: 3 quarters", 0),
    ("3", "Answer: 3 divided by four", 0),
    ("3", "Answer: 3 out of four", 0),
    ("2000", "Answer: 2 thousand five hundred", 0),
    ("2000", "Answer: 2 thousand", 1),
    ("5", "Answer: 5 point two", 0),
    ("5", "Answer: 5 degrees below zero", 0),
    ("5", "Answer: 5 degrees", 1),
    ("90", r"\boxed{90^\circ}", 1),
    ("90", r"\boxed{90^{\circ}}", 1),
    ("18", "Answer: **18** dollars", 1),
    ("5", "ANSWER = 5", 1),
    ("5", "Answer：５", 1),
    ("5", "It is 5", 0),
    ("5", "5", 0),
    ("5", "Option A: 5", 0),
    ("5", "The answer isn't 5", 0),
    ("5", "The answer is not 5", 0),
    ("6", "Answer: 5\nAnswer: 6", 1),
    ("5", "Answer: 5\nAnswer: 6", 0),
    ("5", "Answer: 5\nAnswer: none", 0),
    ("5", "Answer: 5\nNo, I do not know.\n####", 0),
    # bold, code, LaTeX
    ("5", "**Answer: 5**", 1),
    ("5", "**Answer:** 5", 1),
    ("5", "**Answer**: *5*", 1),
    ("5", "__Answer:__ `5`", 1),
    ("5", "### **Final answer:** **5.**", 1),
    ("-5", "Answer: $-5$", 1),
    ("5", r"Answer: \(5\)", 1),
    ("12000", r"\boxed{12,\!000}", 1),
    ("1234.5", r"\boxed{\$1{,}234.50}", 1),
    ("5", r"\boxed{5\text{ apples}}", 1),
    # signs
    ("5", "Answer: +5", 1),
    ("-5", "Answer: −5", 1),
    ("-5", "Answer: –5", 1),
    ("-5", "Answer: - 5", 1),
    ("-5", "Answer: 5", 0),
    ("5", "Answer: +-5", 0),
    # thousands and decimals
    ("1,234", "Answer: 1234", 1),
    ("1234567", "Answer: 1 234 567", 1),
    ("1234", "Answer: 1\u202f234", 1),
    ("1234", "Answer: 12,34", 0),
    ("1", "Answer: 1 2345", 0),
    ("1.5", "Answer: 1,5", 0),
    ("15", "Answer: 1,5", 0),
    ("0.5", "Answer: .5", 1),
    ("5", "Answer: 5.", 1),
    ("5.0", "Answer: 5", 1),
    ("2.50", "Answer: 2.5", 1),
    ("0.1", "Answer: 0.1000000000000000000001", 0),
    ("5", "Answer: 5.5.5", 0),
    # fractions
    ("1/3", "Answer: 1/3", 1),
    ("1/3", "Answer: 2/6", 1),
    ("1/3", "Answer: 0.3333333333333333", 0),
    ("3.5", "Answer: 3 1/2", 1),
    ("3.5", "Answer: 3½", 1),
    ("3.5", r"Answer: 3\frac{1}{2}", 1),
    ("-0.5", r"\boxed{-\dfrac12}", 1),
    ("1", "Answer: 1/2", 0),
    ("2", "Answer: 1/2", 0),
    ("1", "Answer: 1/0", 0),
    ("5.5", "Answer: 3 5/2", 0),
    # exponents and large numbers
    ("1000", "Answer: 1e3", 1),
    ("1e3", "Answer: 1E+3", 1),
    ("1", "Answer: 1e3", 0),
    ("1200", "Answer: 1.2 × 10^3", 1),
    ("0.0012", r"Answer: $1.2 \times 10^{-3}$", 1),
    ("1200", "Answer: 1.2×10³", 1),
    ("1800000000", "Answer: 1.8 billion", 1),
    ("500000", "Answer: 5 hundred thousand", 1),
    ("5", "Answer: 5 million", 0),
    ("5", "Answer: 5k", 0),
    ("1e999", "Answer: 1e999999999", 0),
    ("9007199254740992", "Answer: 9007199254740993", 0),  # equal as floats
    ("9" * 300, "Answer: " + "9" * 300, 1),
    ("9" * 300, "Answer: " + "9" * 301, 0),
    # percent and dozens: the value, or the number that was asked for
    ("50%", "Answer: 50 %", 1),
    ("50", r"\boxed{50\%}", 1),
    ("0.5", "Answer: 50 percent", 1),
    ("50%", "Answer: 1/2", 1),
    ("100%", "Answer: 1%", 0),
    ("50%", "Answer: 5", 0),
    ("24", "Answer: 2 dozen eggs", 1),
    ("2", "Answer: 2 dozen", 1),
    # currencies and units
    ("18", "The answer is $18 per day.", 1),
    ("$18", "Answer: 18 dollars", 1),
    ("-18", "Answer: -$18.00", 1),
    ("-18", "Answer: $-18", 1),
    ("5", "Answer: 5 €", 1),
    ("5", "Answer: £5", 1),
    ("60", "Answer: 60 km/h", 1),
    ("25", "Answer: 25 m²", 1),
    ("37", "Answer: 37°C", 1),
    ("5", "Answer: 5x", 0),
    ("5", "Answer: 5π", 0),
    ("5", "Answer: 5 and a half", 0),
    ("2", "Answer: 2 thirds", 0),
    # what only begins, or ends, like a number
    ("5", "Answer: 5 or 6", 0),
    ("5", "Answer: 2 + 3 = 5", 0),
    ("5", "Answer: 5, 6", 0),
    ("5", "Answer: 5!", 0),
    ("5", "Answer: 5:30", 0),
    ("5", "Answer: about 5", 0),
    ("16", "Answer: 0x10", 0),
    ("1000", "Answer: 1_000", 0),
    ("5", "Answer: five", 0),
    ("5", "", 0),
    # what a row may state
    (7, "Answer: 7", 1),
    (0.1, "Answer: 0.1", 1),
    (-2.5, "Answer: −5/2", 1),
    (10**30, "Answer: 1e30", 1),
    ("3 + 4 = 7\n#### 7", "Answer: 7", 1),
    ("3 + 4 = <<3+4=7>>7\nA: 7", "Answer: 7", 1),
    (r"so \boxed{7}", "Answer: 7", 1),
]


@pytest.mark.parametrize("gold, response, score", TABLE, ids=range(len(TABLE)))
def test_an_answer_is_right_if_all_of_it_is_the_number_in_the_row(gold, response, score):
    assert right(gold, response) == score


NO_NUMBERS = [None, True, [7], {}, "", "seven", "5 or 6", "#### seven", "A: ", "1/0", "1e999999999", "1,5",
              "nan", float("nan"), float("inf"), "9" * 2000, "16 - 9 = 7", "5\n6"]  # fmt: skip


@pytest.mark.parametrize("gold", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_row_whose_answer_is_not_understood_is_named(gold):
    with pytest.raises(UserError, match="How many") as caught:
        right(gold, "Answer: 7")
    assert "\n" not in str(caught.value)
    assert ("missing" if gold is None else repr(gold)[-20:]) in str(caught.value)


def test_answers_of_any_length_are_read_at_once():
    """A quadratic search would take minutes."""
    parts = [
        "answer ",
        "\n",
        "\\boxed{",
        "\\boxed{{",
        "####",
        "*",
        "1 ",
        "1,",
        "9",
        "\\frac{",
        ". ",
        " a",
        "A:\n",
    ]
    for part in parts:
        assert final_answer(part * 10**5 + "\nAnswer: 5").value == 5
        assert final_answer("Answer: 5" + part * 10**5) in (None, final_answer("Answer: 5"))


def test_the_verdicts_on_real_solutions_are_those_of_their_authors(capsys):
    path = SHARED / "data" / "gsm8k_model_solutions.jsonl"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    agree = total = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for verdict in row.values():
            if isinstance(verdict, dict):
                agree += right(row["ground_truth"], verdict["solution"]) == verdict["is_correct"]
                total += 1
    with capsys.disabled():
        print(f" answer: {agree} of {total} verdicts on GSM8K's model solutions agree, {agree / total:.1%} ")
    assert agree == total == 3200


def test_the_cases_and_all_of_gsm8k_are_understood():
    if not SHARED.exists():
        pytest.skip(f"there is no {SHARED}")
    for line in (SHARED / "cases" / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        assert right(case["gold"], case["response"]) == case["score"], case
    for name in ("train", "test"):
        for line in (SHARED / "data" / f"gsm8k_{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            number = gold_answer({"prompt": [{"content": row["question"]}], "meta": row})
            stated = row["answer"].rsplit("#### ", 1)[1].replace(",", "")
            assert number.value == Fraction(stated) and right(row["answer"], f"A: {stated}")
