"""The reward model: its loss by closed forms, its batches against pairs one by one, its accuracy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanoalign.data import pair_examples
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import parse_pair
from nanoalign.scalar import ScalarGPT, response_scores
from nanoalign.tokenizer import get_tokenizer
from train_rm import accuracy, bradley_terry_loss, by_prompt, evaluate, normalise, pair_scores

TOKENIZER = get_tokenizer("world")
SMALL = GPTConfig(vocab_size=TOKENIZER.vocab_size, context=64, layers=2, width=16, heads=2)
CPU = torch.device("cpu")


@pytest.fixture
def model(double):
    torch.manual_seed(0)
    return ScalarGPT(SMALL)


@pytest.fixture
def prompts():
    """Three prompts: four ranked responses (six pairs), one pair, two pairs that share a response."""
    ranked = ["Paris.", "It is Paris.", "Rome, I think that it is Rome.", "I do not know."]
    texts = [("A capital?", a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    texts += [("Hi", "Hello!", "Go away."), ("Bye", "See you.", "No."), ("Bye", "Goodbye.", "No.")]
    rows = [parse_pair({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in texts]
    return by_prompt(*pair_examples(rows, TOKENIZER, 64))


# ---------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_ln_2_for_equal_scores_and_falls_with_the_difference():
    loss = bradley_terry_loss(torch.tensor([3.0, 4.0, 2.0]), torch.tensor([3.0, 3.0, 3.0]))
    expected = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert loss.tolist() == pytest.approx(expected)


def test_a_margin_asks_for_a_larger_difference():
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]), margin=torch.tensor([1.0]))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_a_smoothed_loss_is_least_where_the_model_is_as_sure_as_the_labels(double, epsilon):
    difference = torch.tensor([math.log((1 - epsilon) / epsilon)], requires_grad=True)
    loss = bradley_terry_loss(difference, torch.zeros(1), label_smoothing=epsilon)
    loss.backward()
    assert difference.grad.item() == pytest.approx(0, abs=1e-12)
    entropy = -(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon)
    assert loss.item() == pytest.approx(entropy)


def test_centering_pulls_the_sum_to_zero_and_leaves_the_difference_alone(double):
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (2.0, 1.0))
    plain = bradley_terry_loss(chosen, rejected)
    loss = bradley_terry_loss(chosen, rejected, centering=0.01)
    assert (loss - plain).item() == pytest.approx(0.01 * 9)
    up, down = torch.autograd.grad((loss - plain).sum(), (chosen, rejected))
    assert up.item() == down.item() == pytest.approx(2 * 0.01 * 3)


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_scores_give_a_finite_loss_and_gradient(gap):
    chosen = torch.tensor([gap], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(1), label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite()


def with_gradients(chosen, rejected, *rest, **options):
    """The loss, and what it pulls the scores of the first and of the second side by."""
    sides = [x.clone().requires_grad_() for x in (chosen, rejected)]
    loss = bradley_terry_loss(*sides, *rest, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), sides)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_soft_labels_of_1_and_0_are_the_hard_label_and_the_hard_label_of_the_pair_turned_round(
    double, epsilon
):
    torch.manual_seed(0)
    chosen, rejected, margin = 3 * torch.randn(3, 50)
    hard = with_gradients(chosen, rejected, margin, epsilon, 0.01)
    sure = with_gradients(chosen, rejected, margin, epsilon, 0.01, torch.ones(50))
    assert all(torch.equal(a, b) for a, b in zip(hard, sure))  # to the last bit
    loss, down, up = with_gradients(rejected, chosen, -margin, epsilon, 0.01)
    reversed_label = with_gradients(chosen, rejected, margin, epsilon, 0.01, torch.zeros(50))
    torch.testing.assert_close(reversed_label, (loss, up, down))


def test_a_soft_label_asks_for_its_own_log_odds(double):
    p = torch.tensor([0.5, 0.6, 0.9, 0.2])
    difference = (p / (1 - p)).log()
    loss, pull, _ = with_gradients(difference, torch.zeros(4), probability=p)
    torch.testing.assert_close(pull, torch.zeros(4))
    torch.testing.assert_close(loss, -p * p.log() - (1 - p) * (1 - p).log())  # the entropy of the label


def test_the_soft_loss_is_the_mean_hard_loss_over_labels_drawn_from_it(double):
    difference, drawn = torch.tensor([1.3]), torch.rand(200_000) < 0.7
    hard = torch.where(drawn, *(bradley_terry_loss(sign * difference, torch.zeros(1)) for sign in (1, -1)))
    soft = bradley_terry_loss(difference, torch.zeros(1), probability=0.7)
    assert soft.item() == pytest.approx(hard.mean().item(), abs=0.005)


def test_the_held_out_loss_uses_soft_labels(model):
    pair = {"prompt": "A capital?", "chosen": "Paris.", "rejected": "Rome."}
    losses = []
    for p in (1.0, 0.5):
        rows = [parse_pair({**pair, "probability": p})]
        prompts = by_prompt(*pair_examples(rows, TOKENIZER, 64))
        result, (difference,) = evaluate(model, prompts, TOKENIZER, CPU)
        losses.append(result["loss"])
    wrong = losses[0] + difference  # -log sigma(-d) = d - log sigma(d)
    assert abs(difference) > 1e-4 and losses[1] == pytest.approx((losses[0] + wrong) / 2, rel=1e-9)


# ------------------------------------------------------------------------------------- scores and batches


def test_the_score_is_read_at_the_last_scored_token(model):
    ids = torch.randint(0, 1000, (3, 10))
    mask = torch.zeros(3, 10, dtype=torch.bool)
    ends = [4, 9, 6]
    for row, end in enumerate(ends):
        mask[row, 2 : end + 1] = True
    everywhere = model(ids)
    assert response_scores(model, ids, mask).tolist() == [everywhere[b, t].item() for b, t in enumerate(ends)]


def test_what_follows_the_last_scored_token_never_changes_a_score(model):
    ids, mask = torch.randint(0, 1000, (1, 10)), torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 3:6] = True
    score = response_scores(model, ids, mask)
    other = ids.clone()
    other[0, 6:] = TOKENIZER.end
    assert torch.equal(score, response_scores(model, other, mask))
    alone = response_scores(model, ids[:, :6], mask[:, :6])
    torch.testing.assert_close(score, alone)


def test_a_prompts_responses_appear_once_and_all_its_pairs_stay_together(prompts):
    assert [len(p.responses) for p in prompts] == [4, 2, 3]
    assert [len(p.rows) for p in prompts] == [6, 1, 2]
    for prompt in prompts:
        for i, j, row in zip(prompt.chosen, prompt.rejected, prompt.rows):
            for index, side in ((i, "chosen"), (j, "rejected")):
                ids, mask = prompt.responses[index]
                assert TOKENIZER.decode_response(ids[mask]) == row[side]
                assert ids[mask][-1] == TOKENIZER.end


def test_a_batch_of_rankings_equals_its_pairs_scored_one_by_one(model, prompts):
    chosen, rejected, weight = pair_scores(model, prompts, TOKENIZER, CPU)
    (weight * bradley_terry_loss(chosen, rejected, centering=0.01)).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    number = 0
    for prompt in prompts:  # a prompt counts once, however many pairs it has
        for i, j in zip(prompt.chosen, prompt.rejected):
            r = [model(torch.from_numpy(prompt.responses[k][0])[None])[0, -1] for k in (i, j)]
            assert [chosen[number].item(), rejected[number].item()] == pytest.approx([x.item() for x in r])
            loss = F.softplus(r[1] - r[0]) + 0.01 * (r[0] + r[1]) ** 2
            (loss / len(prompt.rows)).backward()
            number += 1
    alone = [p.grad for p in model.parameters()]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_from_the_policys_own_trunk(double, tied):
    torch.manual_seed(0)
    policy = GPT(GPTConfig(vocab_size=50, context=16, layers=2, width=16, heads=2, tied=tied))
    ids = torch.randint(0, 50, (2, 9))
    model = ScalarGPT.from_policy(policy)
    assert torch.equal(model.gpt.hidden(ids), policy.hidden(ids))
    with torch.no_grad():
        model.gpt.embed.weight += 1
    assert not torch.equal(model.gpt.hidden(ids), policy.hidden(ids))  # a copy, not the policy itself


def test_normalised_scores_have_mean_0_and_std_1_and_keep_their_order(model, prompts):
    responses = [example for prompt in prompts for example in prompt.responses]

    def scores():
        return torch.stack([model(torch.from_numpy(ids)[None])[0, -1] for ids, _ in responses]).detach()

    before = scores()
    stored = normalise(model, responses, TOKENIZER, CPU)
    after = scores()
    assert after.mean().item() == pytest.approx(0, abs=1e-6) and after.std().item() == pytest.approx(1)
    torch.testing.assert_close(after * stored["std"] + stored["mean"], before)


# -------------------------------------------------------------------------------------------- the accuracy


def test_accuracy_counts_ties_half_and_its_error_is_over_prompts():
    differences, prompts = np.array([1.0, 2.0, -1.0, 0.0]), np.arange(4)
    right, error = accuracy(differences, prompts)
    assert right == pytest.approx(2.5 / 4)
    assert error == pytest.approx(np.std([1, 1, 0, 0.5], ddof=1) / 2)
    tripled = accuracy(np.repeat(differences, 3), np.repeat(prompts, 3))
    assert tripled == (pytest.approx(right), pytest.approx(error))  # copies of a pair are no new evidence
