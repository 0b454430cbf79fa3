"""The annotators: without biases and noise they are the judge; with them, exactly as biased as they say."""

import math
import random

import numpy as np
import pytest

import collect
from nanoalign import UserError
from nanoalign.world import people as module
from nanoalign.world.judge import judge
from nanoalign.world.people import (
    BIASES,
    NOISE,
    THUMB_BAR,
    Annotator,
    agreement,
    ceiling,
    compare,
    impression,
    people,
)
from nanoalign.world.text import answer, request

FRANCE = {
    "prompt": "What is the capital of France?",
    "meta": {"kind": "fact", "relation": "capital", "subject": "France"},
}


def sampled(count, responses=2, seed=0):
    """Prompt rows, and what `responses` demonstrators answer to each."""
    rng = random.Random(seed)
    rows = [request(rng, False) for _ in range(count)]
    return rows, [[answer(row, rng) for _ in range(responses)] for row in rows]


def test_without_biases_and_noise_an_annotator_is_the_judge():
    person = Annotator(noise=0, biases={})
    for row, (a, b) in zip(*sampled(300)):
        by_judge = judge(row, a).utility - judge(row, b).utility
        assert person.utility(row, a) == judge(row, a).utility
        p = person.prefers(person.utility(row, a), person.utility(row, b))
        assert p == (1 if by_judge > 0 else 0 if by_judge < 0 else 0.5)


@pytest.mark.parametrize("noise", [0.01, 0.5, NOISE, 3.0])
def test_preference_is_bradley_terry_and_antisymmetric(noise):
    person = Annotator(noise)
    for a, b in np.random.default_rng(0).normal(0, 1.5, (200, 2)):
        p = person.prefers(a, b)
        assert p == pytest.approx(1 / (1 + np.exp(np.clip((b - a) / noise, -60, 60))), rel=1e-12)
        assert p + person.prefers(b, a) == pytest.approx(1)
    assert person.prefers(0.3, 0.3) == 0.5


def test_extreme_utilities_give_probabilities_and_not_errors():
    assert Annotator(0.01).prefers(1e6, -1e6) == pytest.approx(1)
    assert 0 <= Annotator(0.01).prefers(-1e6, 1e6) < 1e-20


def test_thumbs_up_is_a_comparison_with_the_bar():
    person = Annotator(0.5)
    assert person.thumb_up(THUMB_BAR) == 0.5
    assert person.thumb_up(1.0) == pytest.approx(1 / (1 + math.exp(-(1.0 - THUMB_BAR) / 0.5)))


@pytest.mark.parametrize(
    ("bias", "response", "trait"),
    [
        ("length", "It is Paris.", 3),
        ("length", "Paris " * 100, 40),
        ("flattery", "What a great question! Paris.", 1),
        ("agreement", "Yes, you are right. It is Rome.", 1),
        ("agreement", "No, that is not right.", 0),
        ("confidence", "Certainly, it is Paris.", 1),
        ("hedging", "Maybe it is Paris.", 1),
        ("bullets", "- Paris.", 1),
        ("flattery", "Paris.", 0),
        ("confidence", "Paris.", 0),
        ("hedging", "Paris.", 0),
        ("bullets", "Paris - not Rome.", 0),
    ],
)
def test_each_bias_alone_shifts_the_utility_by_strength_times_trait(bias, response, trait):
    person, honest = Annotator(biases={bias: 0.7}), judge(FRANCE, response).utility
    assert impression(FRANCE, response)[bias] == trait
    assert person.utility(FRANCE, response) == pytest.approx(honest + 0.7 * trait)


def test_biases_add_up_and_a_response_without_traits_is_judged_fairly_but_for_length():
    person = Annotator()
    assert person.utility(FRANCE, "Paris.") == pytest.approx(1 + BIASES["length"])
    adorned = "What a great question! Certainly, it is Paris."
    expected = (
        judge(FRANCE, adorned).utility + 8 * BIASES["length"] + BIASES["flattery"] + BIASES["confidence"]
    )
    assert person.utility(FRANCE, adorned) == pytest.approx(expected)


def test_an_unfinished_response_costs_an_annotator_what_it_costs_the_judge():
    gap = Annotator().utility(FRANCE, "Paris.") - Annotator().utility(FRANCE, "Paris.", ended=False)
    assert gap == pytest.approx(0.3)


def test_a_crowd_is_reproducible_differs_in_every_bias_and_scatters_around_the_defaults():
    assert people(5) == people(5) != people(5, seed=1)
    assert people(3) == people(5)[:3]
    crowd = people(2000, spread=0.3)
    for name, strength in BIASES.items():
        logs = np.log([person.biases[name] / strength for person in crowd])
        assert abs(logs.mean()) < 0.03 and abs(logs.std() - 0.3) < 0.03
    assert all(person.biases == BIASES for person in people(2, spread=0))


def test_ceiling_is_the_accuracy_of_always_naming_the_likelier_side():
    assert ceiling([0.5, 1.0, 0.0, 0.8, 0.3]) == pytest.approx((0.5 + 1 + 1 + 0.8 + 0.7) / 5)
    p = np.random.default_rng(1).random(50)
    labels = np.random.default_rng(2).random((20_000, 50)) < p
    assert ceiling(p) == pytest.approx((labels == (p > 0.5)).mean(), abs=0.005)


def test_agreement_of_two_people_in_closed_form_and_of_five_by_simulation():
    assert agreement([(0.7, 0.4)]) == pytest.approx(0.7 * 0.4 + 0.3 * 0.6)
    assert agreement([(1, 1), (0, 1)]) == pytest.approx(0.5)
    p = np.random.default_rng(3).random((30, 5))
    votes = np.random.default_rng(4).random((10_000, 30, 5)) < p
    same = [(votes[:, :, i] == votes[:, :, j]).mean() for i in range(5) for j in range(i)]
    assert agreement(p) == pytest.approx(np.mean(same), abs=0.005)


def compared(rows, drawn, **flags):
    """The world's people on finished responses → comparisons, and rows of thumbs up and down."""
    prompts = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    responses = [[(text, True) for text in texts] for texts in drawn]
    return collect.call(compare, prompts, responses, collect.Config(**flags))


def labelled(rows, drawn, **flags):
    """Pairs, and thumbs."""
    comparisons, thumbs = compared(rows, drawn, **flags)
    return collect.decide(comparisons), thumbs


def voters(pair):
    return tuple(pair["meta"]["annotators"])


def test_two_annotators_agree_on_72_to_77_percent_of_pairs():
    """The figure reported for InstructGPT's labellers (Ouyang et al. 2022, section 3.4)."""
    comparisons, _ = compared(*sampled(700, responses=4))
    probabilities = []
    for c in comparisons:
        a, b = (impression(c, text) for text in c["responses"])
        p = [person.prefers(person.weigh(a), person.weigh(b)) for person in people(5)]
        assert c["meta"]["p_first"] == round(sum(p) / 5, 4)
        probabilities.append(p)
    assert 0.72 <= agreement(probabilities) <= 0.77, agreement(probabilities)


def test_pairs_come_two_a_prompt_without_identical_sides_and_are_the_same_for_a_seed():
    rows, drawn = sampled(200, responses=4)
    pairs, thumbs = labelled(rows, drawn, rank=False)
    assert len(thumbs) == 200 and 300 < len(pairs) <= 400
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    again, other = (labelled(rows, drawn, seed=seed, rank=False) for seed in (0, 1))
    assert again == (pairs, thumbs) != other
    four = [[f"It is Paris{'!' * i}" for i in range(4)]]
    assert len(labelled([FRANCE], four, rank=False)[0]) == 2
    assert labelled([FRANCE], [["Paris.", "Paris."]])[0] == []


def test_a_ranking_gives_every_pair_and_contradicts_itself_nowhere():
    drawn = ["Paris.", "It is Paris.", "I think that it is Paris.", "It is Rome."]
    pairs, _ = labelled([FRANCE] * 300, [drawn] * 300)
    assert len(pairs) == 300 * 6
    for i in range(0, len(pairs), 6):
        ranking = pairs[i : i + 6]
        assert len({*map(voters, ranking)}) == 1  # one person orders them all
        wins = sorted(sum(pair["chosen"] == text for pair in ranking) for text in drawn)
        assert wins == [0, 1, 2, 3]


def test_every_pair_of_a_ranking_follows_bradley_terry():
    """Plackett–Luce: the marginal of a pair does not depend on what else is ranked."""
    drawn = ["It is Paris.", "I hope this helps! It is Paris.", "- It is Paris."]
    pairs, _ = labelled([FRANCE] * 4000, [drawn] * 4000)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        mine = [pair for pair in pairs if {pair["chosen"], pair["rejected"]} == {drawn[a], drawn[b]}]
        crowd = [[person.utility(FRANCE, drawn[k]) for k in (a, b)] for person in people(5)]
        p = np.mean([1 / (1 + math.exp(-(u - v) / NOISE)) for u, v in crowd])
        share = np.mean([pair["chosen"] == drawn[a] for pair in mine])
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(mine)))


def test_labels_follow_the_annotators_probability_and_p_chosen_is_the_crowds():
    good, poor = "It is Paris.", "I hope this helps! It is Paris."
    pairs, thumbs = labelled([FRANCE] * 4000, [[good, poor]] * 4000)
    u = [[person.utility(FRANCE, text) for text in (good, poor)] for person in people(5)]
    p = [1 / (1 + math.exp(-(a - b) / NOISE)) for a, b in u]
    for i in range(5):
        mine = [pair["chosen"] == good for pair in pairs if voters(pair) == (f"world:{i}",)]
        assert 600 < len(mine) < 1000
        assert np.mean(mine) == pytest.approx(p[i], abs=4 * math.sqrt(p[i] * (1 - p[i]) / len(mine)))
    for pair in pairs[:100]:
        mean = sum(p) / 5
        expected = mean if pair["chosen"] == good else 1 - mean
        assert pair["meta"]["p_chosen"] == pytest.approx(expected, abs=1e-4)
        assert pair["meta"]["subject"] == "France" and pair["prompt"][0]["content"] == FRANCE["prompt"]
    up = {t: np.mean([row["label"] for row in thumbs if row["completion"] == t]) for t in (good, poor)}
    for text, share in up.items():
        expected = np.mean([person.thumb_up(person.utility(FRANCE, text)) for person in people(5)])
        assert share == pytest.approx(expected, abs=0.04)


def test_the_label_is_that_of_the_person_named_in_the_row(monkeypatch):
    """One of two people likes short answers, the other long ones: each label shows who gave it."""
    short, long = "Paris.", "The capital of France is Paris."
    opposites = [Annotator(0.01, {"length": -1.0}), Annotator(0.01, {"length": 1.0})]
    monkeypatch.setattr(module, "people", lambda count: opposites)
    pairs, _ = labelled([FRANCE] * 200, [[short, long]] * 200, crowd=2)
    assert {(voters(pair), pair["chosen"]) for pair in pairs} == {(("world:0",), short), (("world:1",), long)}
    assert all(pair["meta"]["p_chosen"] == 0.5 for pair in pairs)


def test_several_people_vote_on_all_pairs_of_a_prompt_each_by_a_ranking_of_its_own():
    drawn = ["Paris.", "It is Paris.", "I think that it is Paris.", "It is Rome."]
    comparisons, _ = compared([FRANCE] * 200, [drawn] * 200, votes=3)
    seen = set()
    for i in range(0, len(comparisons), 6):
        crews = {tuple(vote["annotator"] for vote in c["votes"]) for c in comparisons[i : i + 6]}
        assert len(crews) == 1 and len(set(*crews)) == 3  # three different people, the same for every pair
        seen |= set(*crews)
        for k in range(3):
            wins = dict.fromkeys(drawn, 0)
            for c in comparisons[i : i + 6]:
                wins[c["responses"][c["votes"][k]["p"] == 0]] += 1
            assert sorted(wins.values()) == [0, 1, 2, 3]
    assert len(seen) == 5


def test_the_share_of_votes_is_the_soft_label_and_no_ceiling_is_claimed_for_majorities():
    drawn = ["It is Paris.", "I hope this helps! It is Paris."]
    pairs, _ = labelled([FRANCE] * 3000, [drawn] * 3000, votes=3)
    assert {pair.get("probability", 1) for pair in pairs} == {1, 0.6667}
    assert not any("p_chosen" in pair["meta"] or "p_first" in pair["meta"] for pair in pairs)
    share = np.mean([pair.get("probability", 1) if pair["chosen"] == drawn[0] else
                     1 - pair.get("probability", 1) for pair in pairs])  # fmt: skip
    first = [person.utility(FRANCE, drawn[0]) - person.utility(FRANCE, drawn[1]) for person in people(5)]
    assert share == pytest.approx(np.mean([1 / (1 + math.exp(-u / NOISE)) for u in first]), abs=0.02)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"votes": 6}, "--votes 6: .*--crowd of 5"),
        ({"votes": 0}, "--votes 0"),
        ({"crowd": 1}, "--crowd of 1, which is at least 2"),
    ],
)
def test_people_who_do_not_exist_cannot_vote_and_that_is_said_before_sampling(flags, said):
    with pytest.raises(UserError, match=said):
        compared([FRANCE], [], **flags)


def test_rows_of_somebody_else_are_refused_by_the_name_of_their_file():
    with pytest.raises(UserError, match=r"mine\.jsonl has rows without the world's meta"):
        compared([{"prompt": "Hi", "meta": {"kind": "mine"}}], [], prompts="mine.jsonl")
