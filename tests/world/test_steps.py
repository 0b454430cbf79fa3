"""Sums of several steps: what follows from what, slips, and demonstrations that have some."""

import random

import pytest

from nanoalign.world.steps import check_steps, problem, solution


def test_every_worked_step_follows_and_every_slip_is_found():
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(200):
            meta = problem(rng, held_out)["meta"]
            steps = [*meta["steps"], f"Answer: {meta['answer']}"]
            assert all(check_steps(meta, steps)) and 4 <= len(steps) <= 6
            i = rng.randrange(len(steps))
            head, _, result = steps[i].rpartition(" ")
            slip = [*steps[:i], f"{head} {int(result) + 1}", *steps[i + 1 :]]
            verdicts = check_steps(meta, slip)
            assert verdicts[:i] == [True] * i and not verdicts[i]


META = {"answer": 32, "steps": ["7 + 5 = 12", "12 * 3 = 36", "36 - 4 = 32"]}


@pytest.mark.parametrize(
    "steps, verdicts",
    [
        (["5 + 7 = 12", "3 * 12 = 36", "36 - 4 = 32", "Answer: 32"], "1111"),
        (["7 + 5 = 13", "13 * 3 = 39", "39 - 4 = 35", "Answer: 35"], "0111"),  # reckons on correctly
        (["7 + 5 = 13", "13 * 3 = 39", "39 - 4 = 35", "Answer: 32"], "0110"),  # right for no reason
        (["7 + 5 = 13", "12 * 3 = 36", "36 - 4 = 32", "Answer: 32"], "0011"),  # not what stands before it
        (["7 + 5 = 12", "36 - 4 = 32", "Answer: 32"], "100"),  # a step is missing
        (["7 + 5 = 12", "12 * 3 = 36", "4 - 36 = -32"], "110"),
        (["7 + 5 = 12", "12 * 3 = 36", "Answer: 36"], "110"),  # too early
        (["Answer: 32"], "0"),
        (["7 + 5 = 12", "7 + 5 = 12", "12 * 3 = 36"], "100"),  # repeated
        (["7 + 5 = 12", "", "12 * 3 = 36"], "101"),
        (["7 + 5 = 12", "12 * 3 = 36", "36 - 4 = 32", "Answer: 32", "Answer: 32"], "11110"),
        (["so 7 + 5 = 12"], "0"),
    ],
)
def test_a_step_follows_only_from_what_stands_before_it(steps, verdicts):
    assert check_steps(META, steps) == [v == "1" for v in verdicts]


def test_demonstrations_slip_as_often_as_stated_and_some_state_the_right_answer_all_the_same():
    rng, slipped, lucky = random.Random(1), 0, 0
    for _ in range(1000):
        meta = problem(rng, False)["meta"]
        steps = solution(meta, rng).split("\n")
        wrong = not all(check_steps(meta, steps))
        slipped += wrong
        lucky += wrong and steps[-1] == f"Answer: {meta['answer']}"
    assert 0.16 < slipped / 1000 < 0.24 and 0.35 < lucky / slipped < 0.65
