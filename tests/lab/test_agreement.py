"""Agreement by worked examples, biases by planted ones; what the world's people and its judge say exactly."""

import math
import random
import re

import numpy as np
import pytest
from runs import compared

import collect
from lab import agreement
from lab.agreement import (
    against_judge,
    calibration,
    cohen_kappa,
    fleiss_kappa,
    raw_agreement,
    report,
    sway,
)
from nanoalign.rows import write_rows
from nanoalign.world import people
from nanoalign.world.judge import judge
from nanoalign.world.text import answer, request

# -------------------------------------------------------------------------------------------- agreement

RATINGS = np.array(  # 14 raters, 10 subjects, 5 categories: the worked example of Wikipedia's "Fleiss' kappa"
    [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]
)  # fmt: skip


def test_fleiss_kappa_of_the_worked_example():
    assert raw_agreement(RATINGS) == pytest.approx(0.378, abs=5e-4)
    assert fleiss_kappa(RATINGS) == pytest.approx(0.210, abs=5e-4)


def crosstable(both_yes, only_a, only_b, both_no):
    """The answers of two annotators."""
    a = [1] * (both_yes + only_a) + [0] * (only_b + both_no)
    b = [1] * both_yes + [0] * only_a + [1] * only_b + [0] * both_no
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("table", "kappa"), [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304), ((25, 35, 5, 35), 0.2593)]
)
def test_cohens_kappa_of_the_worked_examples(table, kappa):
    assert cohen_kappa(*crosstable(*table)) == pytest.approx(kappa, abs=5e-5)


def test_two_equal_margins_make_fleiss_and_cohen_agree():
    """With two raters of the same margins, chance is the same in both definitions."""
    a, b = crosstable(30, 10, 10, 50)
    counts = np.stack([(a == kind).astype(int) + (b == kind) for kind in (0, 1)], axis=1)
    assert fleiss_kappa(counts) == pytest.approx(cohen_kappa(a, b)) == pytest.approx(1 - 0.2 / 0.48)
    assert raw_agreement(counts) == pytest.approx(0.8)


def test_kappa_is_1_in_agreement_0_by_chance_and_undefined_where_all_say_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (2, 100_000))
    assert cohen_kappa(a, a) == 1 and cohen_kappa(a, b) == pytest.approx(0, abs=0.01)
    assert cohen_kappa(np.array([0, 1]), np.array([1, 0])) == -1
    assert fleiss_kappa(3 * np.eye(4)) == 1
    with np.errstate(all="raise"):  # without a warning
        assert math.isnan(cohen_kappa(np.ones(5), np.ones(5)))
        assert math.isnan(fleiss_kappa(np.array([[3, 0], [3, 0]])))
    assert fleiss_kappa(rng.multinomial(4, [0.2, 0.3, 0.5], 50_000)) == pytest.approx(0, abs=0.01)


def test_items_with_a_single_vote_or_none_change_no_agreement():
    lonely = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert fleiss_kappa(np.vstack((RATINGS, lonely))) == fleiss_kappa(RATINGS)
    assert raw_agreement(np.vstack((RATINGS, lonely))) == raw_agreement(RATINGS)
    assert math.isnan(raw_agreement(lonely)) and math.isnan(fleiss_kappa(lonely))


def test_agreement_counts_pairs_of_votes_item_by_item():
    assert raw_agreement(np.array([[2, 1], [2, 0]])) == pytest.approx((1 / 3 + 1) / 2)


# ------------------------------------------------------------------------------------ what sways someone


def test_planted_biases_of_position_and_length_are_found_within_their_errors():
    """40 annotators; their groups of 4 votes share an opinion, which the errors must allow for."""
    rng, truth, misses, errors = np.random.default_rng(1), np.array([0.4, 0.8]), [], []
    for _ in range(40):
        groups = np.repeat(np.arange(500), 4)
        features = np.stack((np.ones(2000), rng.normal(0, 1, 500)[groups]), axis=1)
        p = 1 / (1 + np.exp(-features @ truth))
        votes = (rng.random(500)[groups] < p).astype(float)  # the four votes of a group are one
        found, error = sway(features, votes, groups)
        misses.append(found - truth), errors.append(error)
    assert np.abs(np.mean(misses, axis=0)).max() < 0.06
    np.testing.assert_allclose(np.std(misses, axis=0), np.mean(errors, axis=0), rtol=0.35)
    assert (np.abs(misses) < 2 * np.array(errors)).mean() > 0.88


def test_a_position_bias_alone_is_the_log_odds_of_the_share_of_firsts():
    votes = np.array([1.0] * 60 + [0.0] * 30 + [0.5] * 10)
    found, error = sway(np.ones((100, 1)), votes, np.arange(100))
    assert found[0] == pytest.approx(math.log(65 / 35), rel=1e-6)
    spread = np.std(votes, ddof=1) / 10 / (0.65 * 0.35)  # the delta method
    assert error[0] == pytest.approx(spread, rel=1e-5)


# -------------------------------------------------------------------------------------------- reports


def test_the_report_names_agreement_and_kappas_of_overlapping_votes(capsys):
    rows = compared(40)
    for i, c in enumerate(rows):  # the crosstable 20, 5, 10, 15 has kappa 0.4
        first = i < 20, i < 10 or 20 <= i < 24
        c["votes"] = [{"annotator": name, "p": float(p)} for name, p in zip(("ann", "bob"), first)]
    rows[0]["votes"].append({"annotator": "cy", "p": None})
    report(rows)
    out = capsys.readouterr().out
    observed, chance = 26 / 40, 0.5 * 14 / 40 + 0.5 * 26 / 40
    assert f"ann and bob agree on 65.0% of 40, Cohen's κ {(observed - chance) / (1 - chance):.2f}" in out
    assert "40 comparisons with several votes: two votes agree on 65.0%" in out
    assert re.search(r"^cy +0 +0 +– +–$", out, re.M) and "cy agree" not in out


def test_two_ties_agree_and_a_tie_and_a_winner_do_not(capsys):
    report(compared(2, [("ann", 0.5), ("bob", 0.5)]) + compared(2, [("ann", 0.5), ("bob", 1.0)]))
    out = capsys.readouterr().out
    assert "4 comparisons with several votes: two votes agree on 50.0%" in out
    assert re.search(r"^ann +4 +4 +– +–$", out, re.M)  # too few votes to say what sways somebody
    assert re.search(r"^bob +4 +2 +– +–$", out, re.M)


def test_the_report_finds_an_annotator_who_likes_what_is_long_and_one_who_likes_what_comes_first(capsys):
    rng, rows = np.random.default_rng(0), compared(3000)
    for c in rows:
        c["responses"] = ["word " * n for n in rng.integers(1, 30, 2)]
        tens = (len(c["responses"][0].split()) - len(c["responses"][1].split())) / 10
        swapped = bool(rng.random() < 0.5)
        for name, x in (("long", 0.7 * tens), ("first", -0.9 if swapped else 0.9)):
            p = float(rng.random() < 1 / (1 + np.exp(-x)))
            c["votes"].append({"annotator": name, "p": p, "swapped": swapped})
    report(rows)
    out = capsys.readouterr().out
    first, long = (
        [float(x) for x in re.search(rf"^{name} .*?([+-]\S+) ± \S+ +([+-]\S+) ± ", out, re.M).groups()]
        for name in ("first", "long")
    )
    assert first == pytest.approx([0.9, 0.0], abs=0.12) and long == pytest.approx([0.0, 0.7], abs=0.12)


# ------------------------------------------------------------------------------------- the labels' noise


def test_sureness_is_compared_with_the_share_that_is_right():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    first = rng.random(200_000) < p
    bins = calibration(p, first)
    assert sum(count for *_, count in bins) == 200_000 and len(bins) == 5
    for k, (sure, share, _) in enumerate(bins):
        assert sure == pytest.approx(0.55 + 0.1 * k, abs=0.002) and share == pytest.approx(sure, abs=0.01)
    assert calibration(np.array([1.0, 0.0, 0.95]), np.array([True, True, False])) == [
        (pytest.approx((1 + 1 + 0.95) / 3), pytest.approx(1 / 3), 3)
    ]
    assert calibration(np.array([0.5, 0.5]), np.array([True, False])) == [(0.5, 0.5, 2)]


def test_labels_are_held_against_the_exact_judge_where_it_prefers_one(capsys):
    meta = {"kind": "fact", "relation": "capital", "subject": "France"}
    rows = compared(10, [("ai:x", 0.8)])
    for i, c in enumerate(rows):
        c["prompt"][0]["content"], c["meta"] = "What is the capital of France?", dict(meta)
        c["responses"] = ["Paris.", "Rome."] if i < 7 else ["Rome.", "Paris."]
    rows[7]["meta"] |= {"kind": "belief", "claimed": "Rome"}
    rows[8]["responses"], rows[8]["ended"] = ["Paris.", "Paris."], [False, True]  # the second is better
    rows[9]["responses"] = ["Rome.", "Berlin."]  # equally bad: says nothing
    assert judge(rows[8], "Paris.", False).utility < 1 == judge(rows[8], "Paris.").utility
    rows[0]["votes"] = [{"annotator": "ai:x", "p": 0.65}, {"annotator": "human", "p": 0.0}]
    rows[1]["votes"] = [{"annotator": "ai:x", "p": 0.5}]
    rows[2]["votes"] = [{"annotator": "ai:x", "p": None}]
    against_judge(rows, "ai:x")
    out = capsys.readouterr().out
    # of 8: right 0, 3 to 6; half right 1; wrong 7 and 8
    assert "ai:x: by the exact judge 68.8% of 8 labels are right (belief 0%, fact 79%)" in out
    assert "0.50 → 0.50 (1)  0.65 → 1.00 (1)  0.80 → 0.67 (6)   expected calibration error 0.144" in out
    against_judge(rows, "ai:y")
    assert capsys.readouterr().out == ""


def test_of_the_worlds_people_agreement_and_ceiling_are_exact(tmp_path, capsys):
    """They are what the crowd's own probabilities say, which collect.py's votes only sample."""
    rng = random.Random(0)
    rows = [request(rng, False) for _ in range(200)]
    drawn = [[(answer(row, rng), True) for _ in range(3)] for row in rows]
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path, crowd = str(tmp_path / "x.votes.jsonl"), people.people(4)
    for votes in (1, 2):
        config = collect.Config("", "", samples=3, votes=votes, crowd=4)
        comparisons, _ = collect.call(people.compare, rows, drawn, config)
        write_rows(path, comparisons)
        agreement.main(agreement.Config(path, crowd=4))
        out = capsys.readouterr().out
        p = [[_prefers(person, c) for person in crowd] for c in comparisons]
        assert f"two people agree on {people.agreement(p):.1%} of pairs (expected, exact)" in out
        best = f"exceed {people.ceiling([sum(x) / 4 for x in p]):.1%} accuracy"
        assert (best in out) == (votes == 1)  # of majorities no ceiling is claimed
        assert re.search(r"^world: by the exact judge \d", out, re.M) and "world:3 " in out
    for c in comparisons:
        c["meta"] = {}
    write_rows(path, comparisons)
    agreement.main(agreement.Config(path))
    assert "exact" not in (out := capsys.readouterr().out) and "Fleiss" in out


def test_a_judges_votes_are_not_those_of_one_whose_name_goes_on(tmp_path, capsys):
    meta = {"kind": "fact", "relation": "capital", "subject": "Peru"}
    row = {"prompt": [{"role": "user", "content": "What is the capital of Peru?"}], "meta": meta}
    texts = ["The capital of Peru is Lima.", "The capital of Peru is Rome."]
    votes = [{"annotator": "ai:m.pt", "p": 0.1}, {"annotator": "ai:m.pt --own 1", "p": 0.95}]
    path = str(tmp_path / "x.votes.jsonl")
    write_rows(path, [{**row, "responses": texts, "ended": [True, True], "votes": votes}] * 2)
    agreement.main(agreement.Config(path, brief=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("- ai:m.pt: by the exact judge 0.0% of 2 labels are right (fact 0%)")
    assert lines[2].startswith("- ai:m.pt --own 1: by the exact judge 100.0% of 2 labels are right")
    assert len(lines) == 4  # and of each how sure it is


def _prefers(person, c):
    a, b = (person.utility(c, *response) for response in zip(c["responses"], c["ended"]))
    return person.prefers(a, b)
