"""Agreement by worked examples, biases by planted ones, votes from keys to pair rows."""

import math

import numpy as np
import pytest

from nanoalign.comparisons import cohen_kappa, fleiss_kappa, raw_agreement, sway

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
