"""Ratings by planted strengths, and by the likelihood that they maximise; errors by simulated truths."""

import math

import numpy as np
import pytest
import torch

from evaluate import win_rate
from nanoalign.generate import Rollout
from nanoalign.statistics import POINTS, clustered_error, elo, logistic, mean_and_error, pairwise_wins
from nanoalign.watch import Watch

# ---------------------------------------------------------------------------------------------- ratings


def games(*wins):
    """Wins of (i, j) in one group each → (N, P, P)."""
    P = 1 + max(max(pair) for pair, _ in wins)
    table = np.zeros((len(wins), P, P))
    for group, ((i, j), count) in enumerate(wins):
        table[group, i, j] = count
    return table


@pytest.mark.parametrize(("won", "lost"), [(3, 1), (50, 50), (999, 1), (7.5, 2.5)])
def test_two_players_differ_by_the_log_odds_of_their_games(won, lost):
    ratings, _ = elo(games(((0, 1), won), ((1, 0), lost)), draws=2)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(won / lost), abs=1e-2)
    assert ratings.mean() == pytest.approx(1000)


def test_ten_to_one_is_400_points_and_chains_add_up():
    chain = games(((0, 1), 10), ((1, 0), 1), ((1, 2), 10), ((2, 1), 1))
    np.testing.assert_allclose(elo(chain, draws=2)[0], [1400, 1000, 600], atol=0.01)


def test_the_likelihood_has_no_slope_at_the_ratings():
    """At the maximum each player's expected wins are its wins (Zermelo 1929)."""
    wins = np.random.default_rng(0).integers(1, 20, (1, 6, 6)) * (1 - np.eye(6))
    ratings, _ = elo(wins, draws=2)
    p = 1 / (1 + 10 ** ((ratings[None, :] - ratings[:, None]) / 400))
    total = wins[0] + wins[0].T
    np.testing.assert_allclose((total * p).sum(1), wins[0].sum(1), atol=1e-3)


def simulated(strengths, prompts, rng):
    """One game of each pair for each prompt, between players of these log-odds: (N, P, P)."""
    p = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    first = np.triu(rng.random((prompts, *p.shape)) < p, 1)
    return first + np.triu(1 - first, 1).transpose(0, 2, 1)


def test_planted_strengths_are_recovered_and_covered_by_their_intervals():
    rng, strengths = np.random.default_rng(2), np.array([-1.2, -0.3, 0.0, 0.4, 1.1])
    truth = 1000 + POINTS * (strengths - strengths.mean())
    np.testing.assert_allclose(elo(simulated(strengths, 20_000, rng), draws=2)[0], truth, atol=8)
    covered = []
    for _ in range(60):
        ratings, (low, high) = elo(simulated(strengths, 150, rng), draws=200)
        assert (low < ratings).all() and (ratings < high).all()
        covered.append((low < truth) & (truth < high))
    assert 0.89 < np.mean(covered) < 0.99  # 300 intervals of 95 %


def test_intervals_are_over_prompts_copies_of_a_prompts_games_add_nothing():
    wins = simulated(np.array([0.0, 0.5]), 100, np.random.default_rng(3))
    (ratings, around), (same, again) = elo(wins), elo(5 * wins)
    np.testing.assert_allclose(ratings, same, atol=1e-3)
    np.testing.assert_allclose(around, again, atol=1e-3)


def test_a_player_who_never_loses_gets_a_finite_rating_far_above():
    wins = games(((0, 1), 10), ((1, 2), 5), ((2, 1), 5))
    ratings, intervals = elo(wins, draws=50)
    assert np.isfinite(ratings).all() and np.isfinite(intervals).all()
    assert ratings[0] - ratings[1] > 1500 and ratings[1] == pytest.approx(ratings[2], abs=0.01)


def test_many_fits_at_once_equal_each_alone():
    rng = np.random.default_rng(4)
    features, wins = rng.normal(size=(30, 3)), rng.random((5, 30))
    together = logistic(features, wins)
    for one, alone in zip(together, wins):
        np.testing.assert_allclose(one, logistic(features, alone), atol=1e-8)


def test_wins_are_shares_of_sample_pairs_with_ties_half():
    utilities = np.array([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 5.0]]])  # players, prompts, samples
    wins = pairwise_wins(utilities)
    assert wins[:, 0, 1].tolist() == [0.75, 0.25] and wins[:, 1, 0].tolist() == [0.25, 0.75]
    three = np.random.default_rng(5).integers(0, 3, (3, 4, 2)).astype(float)
    off = pairwise_wins(three)[:, [0, 0, 1], [1, 2, 2]] + pairwise_wins(three)[:, [1, 2, 2], [0, 0, 1]]
    np.testing.assert_allclose(off, 1)


def test_the_win_rate_compares_all_samples_of_a_prompt_and_splits_ties():
    assert win_rate(np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]]))[0] == 0.5
    assert win_rate(np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]]))[0] == pytest.approx(0.75)
    utility = np.random.default_rng(0).normal(size=(40, 3))
    assert win_rate(utility, utility)[0] == pytest.approx(0.5)
    a, b = utility, np.random.default_rng(1).normal(size=(40, 2))
    assert win_rate(a, b)[0] + win_rate(b, a)[0] == pytest.approx(1)
    by_hand = np.mean([[x > y for x in p for y in q] for p, q in zip(a, b)])
    assert win_rate(a, b)[0] == pytest.approx(by_hand)


def test_the_standard_error_is_over_prompts_not_samples():
    values = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    mean, error = mean_and_error(values)
    assert (mean, error) == pytest.approx((0.5, math.sqrt(0.5) / math.sqrt(2)))
    assert mean_and_error(np.repeat(values, 100, axis=1)) == pytest.approx((mean, error))
    assert math.isnan(mean_and_error(np.ones((1, 5)))[1])


def test_the_standard_error_is_over_prompts():
    mean, error = mean_and_error(np.array([[1.0, 3.0], [4.0, 4.0], [6.0, 0.0]]))  # means 2, 4, 3
    assert mean == 3 and error == pytest.approx(1 / math.sqrt(3))  # std of 2, 4, 3 is 1
    assert math.isnan(mean_and_error(np.array([[1.0, 2.0]]))[1])


def test_the_win_rate_counts_all_pairs_of_samples_and_ties_half():
    policy = np.array([[1.0, 0.0], [2.0, 2.0]])
    baseline = np.array([[0.0, 0.5], [2.0, 3.0]])
    rate, error = win_rate(policy, baseline)  # (1 + 1 + ½ + 0)/4 and (½ + 0 + ½ + 0)/4
    assert rate == pytest.approx((0.625 + 0.25) / 2) and error == pytest.approx((0.625 - 0.25) / 2)
    assert win_rate(policy, policy)[0] == 0.5


# ------------------------------------------------------------------------------ errors of correlated values


def test_a_clustered_error_is_the_plain_one_of_single_values_and_of_groups_of_one_size():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(12, 4))
    assert clustered_error(values[:, 0], range(12)) == pytest.approx(values[:, 0].std(ddof=1) / 12**0.5)
    groups = np.repeat([f"prompt {i}" for i in range(12)], 4)
    of_means = values.mean(1).std(ddof=1) / 12**0.5
    assert clustered_error(values.flatten(), groups) == pytest.approx(of_means)
    order = rng.permutation(48)  # groups need not lie together
    assert clustered_error(values.flatten()[order], groups[order]) == pytest.approx(of_means)
    assert clustered_error(np.tile(values.flatten(), 5), np.tile(groups, 5)) == pytest.approx(of_means)
    assert math.isnan(clustered_error(values[0], [0] * 4))


def test_a_clustered_error_is_how_far_the_mean_of_correlated_values_strays():
    """Groups of 1 to 8 values that share half of their variance: 2,000 data sets, and the mean of each."""
    rng, sizes = np.random.default_rng(7), 1 + np.arange(40) % 8
    groups = np.repeat(np.arange(40), sizes)
    means, errors, plain = [], [], []
    for _ in range(2000):
        values = np.repeat(rng.normal(size=40), sizes) + rng.normal(size=len(groups))
        means.append(values.mean())
        errors.append(clustered_error(values, groups))
        plain.append(values.std(ddof=1) / len(values) ** 0.5)
    truth = ((sizes**2).sum() + sizes.sum()) ** 0.5 / sizes.sum()  # the closed form
    assert np.std(means) == pytest.approx(truth, rel=0.05)
    assert np.mean(np.square(errors)) ** 0.5 == pytest.approx(truth, rel=0.05)
    assert np.mean(plain) < 0.7 * truth


def test_the_logged_errors_of_kl_allow_for_responses_to_one_prompt():
    """Four copies of every response are no new evidence, wherever they stand in the batch."""
    rng = np.random.default_rng(8)
    kl, watch = torch.tensor(rng.normal(size=16)), Watch.__new__(Watch)
    watch.sampling = {"max_new_tokens": 3}

    def logged(at):
        asked = [np.array([3, 0, int(i)]) for i in at]
        mask, ended = torch.ones(len(at), 2, dtype=torch.bool), torch.ones(len(at), dtype=torch.bool)
        drawn = Rollout(mask.long(), mask, mask.float(), ended)
        return watch.describe(drawn, asked, kl[at], kl[at], mask.float())["kl_error"]

    once = logged(np.arange(16))
    assert once == pytest.approx(kl.std().item() / 4)
    assert logged(np.repeat(np.arange(16), 4)) == pytest.approx(once)
    assert logged(rng.permutation(np.repeat(np.arange(16), 4))) == pytest.approx(once)
