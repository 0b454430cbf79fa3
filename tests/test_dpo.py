"""DPO against closed forms written here in numpy, and the bookkeeping that its log-probs depend on."""

import math

import numpy as np
import pytest
import torch

from evaluate import mean_and_error, win_rate
from nanoalign.data import pair_examples
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import parse_pair
from nanoalign.tokenizer import get_tokenizer
from train_dpo import dpo_loss, pair_logprobs

TOKENIZER = get_tokenizer("world")


def minus_log_sigmoid(x):
    return np.logaddexp(0, -np.asarray(x, dtype=np.float64))


def draw(batch=64, scale=20.0, seed=0):
    """chosen, rejected, ref_chosen, ref_rejected: sequence log-probs in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [-scale * torch.rand(batch, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.5])
def test_the_loss_is_its_closed_form_one_value_per_pair(beta, epsilon):
    chosen, rejected, ref_chosen, ref_rejected = draw()
    h = (chosen.numpy() - ref_chosen.numpy()) - (rejected.numpy() - ref_rejected.numpy())
    expected = (1 - epsilon) * minus_log_sigmoid(beta * h) + epsilon * minus_log_sigmoid(-beta * h)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, epsilon)
    assert loss.shape == (64,)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_beta_is_a_tenth_and_nothing_is_smoothed_by_default():
    np.testing.assert_array_equal(dpo_loss(*draw()), dpo_loss(*draw(), beta=0.1, label_smoothing=0.0))


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_gradient_is_that_of_finite_differences(epsilon):
    inputs = [x.requires_grad_() for x in draw(5)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.3, label_smoothing=epsilon), inputs)


def test_the_gradient_on_the_chosen_is_beta_times_the_error_of_the_model():
    """Rafailov et al. 2023, section 4: the weight of a pair is beta sigma(-beta h)."""
    chosen, rejected, ref_chosen, ref_rejected = draw()
    chosen.requires_grad_(), rejected.requires_grad_()
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.2).sum().backward()
    h = ((chosen - ref_chosen) - (rejected - ref_rejected)).detach().numpy()
    np.testing.assert_allclose(chosen.grad, -0.2 / (1 + np.exp(0.2 * h)), rtol=1e-10)
    np.testing.assert_allclose(chosen.grad, -rejected.grad)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_the_loss_is_ln_2_where_policy_and_reference_agree(epsilon):
    chosen, rejected, _, _ = (x.float() for x in draw())
    loss = dpo_loss(chosen, rejected, chosen, rejected, label_smoothing=epsilon)
    torch.testing.assert_close(loss, torch.full((64,), math.log(2)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.4])
def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels(epsilon):
    """sigma(beta h) = 1 - epsilon, and the loss there is the entropy of a label."""
    best = math.log((1 - epsilon) / epsilon) / 0.1
    h = torch.linspace(best - 5, best + 5, 101, dtype=torch.float64)
    zero = torch.zeros_like(h)
    loss = dpo_loss(h, zero, zero, zero, 0.1, epsilon)
    entropy = -(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon)
    assert loss.argmin() == 50 and loss.min().item() == pytest.approx(entropy)


def test_labels_that_are_coin_flips_make_the_two_sides_exchangeable():
    chosen, rejected, ref_chosen, ref_rejected = draw()
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.5)
    torch.testing.assert_close(dpo_loss(*draw(), label_smoothing=0.5), swapped)
    assert not torch.allclose(dpo_loss(*draw()), dpo_loss(rejected, chosen, ref_rejected, ref_chosen))


def test_the_loss_falls_with_the_chosen_and_rises_with_the_rejected():
    chosen, rejected, ref_chosen, ref_rejected = draw()
    assert (dpo_loss(chosen + 1, rejected, ref_chosen, ref_rejected) < dpo_loss(*draw())).all()
    assert (dpo_loss(chosen, rejected + 1, ref_chosen, ref_rejected) > dpo_loss(*draw())).all()
    assert (dpo_loss(chosen, rejected, ref_chosen + 1, ref_rejected) > dpo_loss(*draw())).all()


@pytest.mark.parametrize("shifted", [(0, 2), (1, 3), (0, 1), (2, 3)], ids=["w", "l", "policy", "reference"])
def test_a_shift_that_leaves_the_difference_of_log_ratios_alone_leaves_the_loss_alone(shifted):
    inputs = [x + 7.25 if i in shifted else x for i, x in enumerate(draw())]
    torch.testing.assert_close(dpo_loss(*inputs), dpo_loss(*draw()))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_extreme_log_probs_give_a_finite_loss_and_gradient(h, epsilon):
    chosen = torch.tensor([h], requires_grad=True)
    zero = torch.zeros(1)
    loss = dpo_loss(chosen, zero, zero, zero, 1.0, epsilon)
    loss.sum().backward()
    wrong_side = 1 - epsilon if h < 0 else epsilon
    assert loss.item() == pytest.approx(1e4 * wrong_side, abs=1e-3)
    assert chosen.grad.isfinite().all()


# -------------------------------------------------------------------------------- log-probs of pairs


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context=96, layers=2, width=32, heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that no two tokens are alike
    return model


def examples(*pairs):
    rows = [parse_pair({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in pairs]
    return pair_examples(rows, TOKENIZER, 96)[0]


PAIRS = (
    ("What is the capital of France?", "Paris.", "The capital of France is Rome, as everyone knows."),
    ("Hi", "Hello! How can I help you?", "Leave me alone."),
    ("What is 3 + 4 + 5?", "3 + 4 = 7\n7 + 5 = 12\nAnswer: 12", "12"),
)


def by_hand(model, prompt, response):
    """Sum of log pi over the response and its end token, one token at a time, from the plain logits."""
    opening = TOKENIZER.prompt([{"role": "user", "content": prompt}]).tolist()
    ids, total = list(opening), 0.0
    assert TOKENIZER.response(response)[-1] == TOKENIZER.end
    for token in TOKENIZER.response(response).tolist():
        total += model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[token].item()
        ids.append(token)
    return total


def test_pair_logprobs_are_sums_over_each_response_and_its_end_token(model):
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        assert chosen.shape == rejected.shape == (3,)
        for i, (prompt, better, worse) in enumerate(PAIRS):
            assert chosen[i].item() == pytest.approx(by_hand(model, prompt, better), rel=1e-4)
            assert rejected[i].item() == pytest.approx(by_hand(model, prompt, worse), rel=1e-4)


def test_a_pairs_logprobs_do_not_depend_on_its_batch_or_padding(model):
    with torch.no_grad():
        together = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        alone = [pair_logprobs(model, examples(p), TOKENIZER, "cpu") for p in PAIRS]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_swapping_the_sides_swaps_the_logprobs(model):
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        swapped = pair_logprobs(model, examples(*((p, r, c) for p, c, r in PAIRS)), TOKENIZER, "cpu")
    torch.testing.assert_close(torch.stack((rejected, chosen)), swapped, rtol=1e-4, atol=1e-4)


def test_only_response_tokens_are_counted_and_each_of_them_once():
    """A model without preferences gives every token -ln V: the sum counts the tokens."""
    flat = GPT(GPTConfig(TOKENIZER.vocab_size, context=96, layers=1, width=8, heads=1))
    torch.nn.init.zeros_(flat.embed.weight)
    for prompt in ("Hi", "What is the capital of France, and why do so many people ask for it?"):
        batch = examples((prompt, "Paris.", "Paris." * 4))
        with torch.no_grad():
            counts = [
                x.item() / -math.log(TOKENIZER.vocab_size)
                for x in pair_logprobs(flat, batch, TOKENIZER, "cpu")
            ]
        tokens = [len(TOKENIZER.response(text)) for text in ("Paris.", "Paris." * 4)]
        assert counts == pytest.approx(tokens, rel=1e-5)


def test_no_gradient_reaches_what_is_masked(model):
    """The log-prob of a prompt token is in neither sum: the same sums come from the response columns only."""
    batch = examples(PAIRS[0])
    for (ids, mask), total in zip(batch[0], pair_logprobs(model, batch, TOKENIZER, "cpu")):
        logp = model(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        picked = [logp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
        assert not mask[: len(ids) - len(picked)].any() and ids[-1] == TOKENIZER.end and mask[-1]
        torch.testing.assert_close(total[0], torch.stack(picked).sum(), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- the scorecard's statistics


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
