"""ORPO against 60-digit arithmetic, and its two means against a loop over tokens."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from runs import steps

from nanoalign.data import collate, pair_examples
from nanoalign.logprobs import masked_mean
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import parse_pair, read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from train_orpo import Config, evaluate, log_odds, measure, orpo_loss, pair_logprobs

TOKENIZER = get_tokenizer("world")
MEANS = [0.0, -1e-12, -1e-7, -1e-6, -1.1e-6, -1e-5, -1e-4, -1e-3, -0.01, -0.1, -0.3, -0.69, -math.log(2),
         -0.7, -1.0, -3.0, -8.0, -20.0, -50.0, -700.0]  # fmt: skip


def exact_log_odds(mean: float) -> Decimal:
    """ln(p / (1 − p)), p = e^mean, of exactly this float; means above −1e-6 count as −1e-6."""
    with localcontext() as context:
        context.prec = 60
        m = min(Decimal(mean), Decimal("-1e-6"))
        return m - (1 - m.exp()).ln()


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# ------------------------------------------------------------------------------------------------- the odds


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_log_odds_equal_60_digit_arithmetic_from_certainty_to_e_to_the_minus_700(mean, dtype, error):
    m = torch.tensor([mean], dtype=dtype)
    expected = float(exact_log_odds(m.item()))
    # in fp32 the clamp itself is at the float next to -1e-6
    assert log_odds(m).item() == pytest.approx(expected, rel=error, abs=error)


@pytest.mark.parametrize("mean", MEANS)
def test_the_slope_of_log_odds_is_1_over_1_minus_p_and_0_where_clamped(mean):
    m = torch.tensor([mean], dtype=torch.float64, requires_grad=True)
    log_odds(m).sum().backward()
    with localcontext() as context:
        context.prec = 60
        due = float(1 / (1 - Decimal(mean).exp())) if mean <= -1e-6 else 0.0
    assert m.grad.item() == pytest.approx(due, rel=1e-9)


def test_the_two_branches_meet_at_ln_2_where_the_odds_are_even(double):
    around = -math.log(2) + torch.tensor([-1e-9, -1e-12, 0.0, 1e-12, 1e-9])
    # the slope of the log odds there is 1 / (1 - 1/2) = 2
    torch.testing.assert_close(log_odds(around), 2 * (around + math.log(2)), rtol=1e-4, atol=1e-15)


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("chosen", [-1e-6, -0.2, -0.69, -1.5, -50.0])
@pytest.mark.parametrize("rejected", [-1e-6, -0.3, -0.7, -4.0, -50.0])
def test_the_loss_is_its_closed_form(double, lam, chosen, rejected):
    loss = orpo_loss(*(torch.tensor([x]) for x in (2.5, chosen, rejected)), lam)
    ratio = float(exact_log_odds(chosen) - exact_log_odds(rejected))
    assert loss.item() == pytest.approx(2.5 + lam * softplus(-ratio), rel=1e-10)


def test_one_value_per_pair_and_lambda_is_a_tenth_by_default():
    torch.manual_seed(0)
    nll, chosen, rejected = 3 * torch.rand(7), -torch.rand(7), -torch.rand(7)
    loss = orpo_loss(nll, chosen, rejected)
    assert loss.shape == (7,) and torch.equal(loss, orpo_loss(nll, chosen, rejected, 0.1))
    assert Config().lam == 0.1
    torch.testing.assert_close(orpo_loss(nll, chosen, chosen) - nll, torch.full((7,), 0.1 * math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_finite_at_every_pair_of_means(dtype):
    """Among them −1e-7, where 1 − p rounds to 0 in the plain formula, and −50, where p does."""
    grid = torch.tensor([(a, b) for a in MEANS for b in MEANS], dtype=dtype)
    means = [grid[:, i].clone().requires_grad_() for i in (0, 1)]
    loss = orpo_loss(torch.zeros(len(grid), dtype=dtype), *means, lam=1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and all(m.grad.isfinite().all() for m in means)
    assert (means[0].grad <= 0).all() and (means[1].grad >= 0).all()


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    means = [-3 * torch.rand(24, dtype=torch.float64) - 0.02 for _ in range(2)]
    assert all((m > -math.log(2)).any() and (m < -math.log(2)).any() for m in means)  # both branches
    inputs = [m.requires_grad_() for m in (torch.rand(24, dtype=torch.float64), *means)]
    assert torch.autograd.gradcheck(lambda *x: orpo_loss(*x, lam=0.7), inputs)


def test_the_loss_falls_with_the_chosen_and_rises_with_the_rejected_and_the_nll():
    means = torch.tensor([m for m in MEANS if -9 < m <= -1e-5], dtype=torch.float64)  # falling
    same, nll = torch.full_like(means, -0.5), torch.ones_like(means)
    assert (orpo_loss(nll, means, same).diff() > 0).all()
    assert (orpo_loss(nll, same, means).diff() < 0).all()
    torch.testing.assert_close(orpo_loss(nll + 2, means, same) - orpo_loss(nll, means, same), 2 * nll)


# ------------------------------------------------------------------------------------- log-probs of pairs

PAIRS = (
    ("What is the capital of France?", "Paris.", "The capital of France is Rome, as everyone knows."),
    ("Hi", "Hello! How can I help you?", "Leave me alone."),
    ("What is 3 + 4 + 5?", "3 + 4 = 7\n7 + 5 = 12\nAnswer: 12", "12"),
)


def examples(*pairs):
    rows = [parse_pair({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in pairs]
    return pair_examples(rows, TOKENIZER, 64)[0]


@pytest.fixture
def model(double):
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that no two tokens are alike
    return model


def token_by_token(model, prompt, response):
    """log pi of every token after the first, of the prompt and of the response, from the plain logits."""
    opening = TOKENIZER.prompt([{"role": "user", "content": prompt}]).tolist()
    ids = opening + TOKENIZER.response(response).tolist()
    assert ids[-1] == TOKENIZER.end
    logp = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    picked = [logp[t - 1, ids[t]].item() for t in range(1, len(ids))]
    return picked[: len(opening) - 1], picked[len(opening) - 1 :]


@pytest.mark.parametrize("nll", ["all", "response"])
def test_the_nll_is_over_prompt_and_response_or_the_response_only_and_odds_are_of_response_means(model, nll):
    found = pair_logprobs(model, examples(*PAIRS), TOKENIZER, Config(nll=nll), "cpu")
    assert all(values.shape == (3,) for values in found)
    for i, (prompt, better, worse) in enumerate(PAIRS):
        opening, response = token_by_token(model, prompt, better)
        imitated = opening + response if nll == "all" else response
        due = [-np.mean(imitated), np.mean(response), np.mean(token_by_token(model, prompt, worse)[1])]
        assert [values[i].item() for values in found] == pytest.approx(due, rel=1e-9)
        assert abs(np.mean(opening) - np.mean(response)) > 0.1  # so the two can be told apart


@pytest.mark.parametrize("nll", ["all", "response"])
def test_a_prompt_read_once_for_both_sides_changes_neither_values_nor_gradients(model, nll):
    ids, mask = collate([side for pair in examples(*PAIRS) for side in pair], TOKENIZER.pad)
    after = model(ids)[:, :-1].log_softmax(-1)  # each side by itself
    logp = torch.nn.functional.pad(after.gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))
    imitated = mask.clone()
    for row, (chosen, _) in enumerate(examples(*PAIRS)):
        imitated[2 * row, 1 : len(chosen[0])] |= nll == "all"
    means = masked_mean(logp, mask)
    results, read = [(-masked_mean(logp, imitated)[::2], means[::2], means[1::2])], []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    results.append(pair_logprobs(model, examples(*PAIRS), TOKENIZER, Config(nll=nll), "cpu"))
    for i, values in enumerate(results):
        loss = (torch.tensor([1.0, 2.0, 4.0]) * orpo_loss(*values, lam=0.5)).sum()
        results[i] = *values, *torch.autograd.grad(loss, list(model.parameters()))
    for plain, shared in zip(*results):
        torch.testing.assert_close(shared, plain)
    rows = [(len(c), len(r) - int((~mask).sum())) for (c, mask), (r, _) in examples(*PAIRS)]
    assert read == [3 * max(map(sum, rows))] and read[0] < ids.numel()


def test_by_default_the_prompt_is_imitated_too_as_in_the_paper():
    assert Config().nll == "all"


@pytest.mark.parametrize("nll", ["all", "response"])
def test_a_pairs_values_do_not_depend_on_its_batch_or_padding(model, nll):
    together = pair_logprobs(model, examples(*PAIRS), TOKENIZER, Config(nll=nll), "cpu")
    alone = [pair_logprobs(model, examples(p), TOKENIZER, Config(nll=nll), "cpu") for p in PAIRS]
    torch.testing.assert_close(torch.stack(together), torch.cat([torch.stack(a) for a in alone], dim=1))


@pytest.mark.parametrize("nll", ["all", "response"])
def test_a_model_without_preferences_has_a_mean_of_minus_ln_v_whatever_the_lengths(nll):
    flat = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=8, heads=1))
    torch.nn.init.zeros_(flat.embed.weight)
    with torch.no_grad():
        imitated, *means = pair_logprobs(flat, examples(*PAIRS), TOKENIZER, Config(nll=nll), "cpu")
    due = torch.full((3, 3), -math.log(TOKENIZER.vocab_size))
    torch.testing.assert_close(torch.stack((-imitated, *means)), due)


def test_the_rejected_prompt_and_response_are_never_imitated(model):
    """With λ = 0 nothing of the rejected side is learned."""
    gradients = []
    for worse in ("Rome.", "Leave me alone, will you?"):
        batch = examples(("What is the capital of France?", "Paris.", worse))
        nll, chosen, rejected = pair_logprobs(model, batch, TOKENIZER, Config(), "cpu")
        orpo_loss(nll, chosen, rejected, 0.0).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_what_is_logged_adds_up_and_held_out_means_are_over_pairs(model):
    config = Config(lam=0.3, batch_size=2)
    values = pair_logprobs(model, examples(*PAIRS), TOKENIZER, config, "cpu")
    certain = [(pair, 1.0) for pair in examples(*PAIRS)]
    found = measure(model, certain, TOKENIZER, config, "cpu")
    logged = {name: column.tolist() for name, column in found.items()}
    nll, chosen, rejected = (v.tolist() for v in values)
    for i in range(3):
        ratio = float(exact_log_odds(chosen[i]) - exact_log_odds(rejected[i]))
        due = {
            "nll": nll[i], "log_odds_ratio": ratio, "odds_loss": softplus(-ratio),
            "accuracy": float(ratio > 0), "loss": nll[i] + 0.3 * softplus(-ratio),
            "mean_logp_chosen": chosen[i], "mean_logp_rejected": rejected[i],
        }  # fmt: skip
        assert {name: column[i] for name, column in logged.items()} == pytest.approx(due, rel=1e-6)
    means = evaluate(model, certain, TOKENIZER, config, "cpu")
    assert means == pytest.approx({name: np.mean(column) for name, column in logged.items()})


@pytest.mark.parametrize("nll", ["all", "response"])
@pytest.mark.parametrize("p", [1.0, 0.8, 0.5, 0.0])
def test_a_soft_label_s_loss_and_gradient_are_expected_over_the_pair_in_both_orders(model, nll, p):
    config = Config(lam=0.3, nll=nll)

    def trained(batch):
        found = measure(model, batch, TOKENIZER, config, "cpu")
        return found, torch.autograd.grad(found["loss"].sum(), list(model.parameters()))

    pairs = examples(*PAIRS)
    (soft, slope), (ours, up), (turned, down) = map(trained, (
        [(pair, p) for pair in pairs],
        [(pair, 1.0) for pair in pairs],
        [(pair[::-1], 1.0) for pair in pairs],
    ))  # fmt: skip
    for name in ("loss", "nll", "odds_loss"):
        torch.testing.assert_close(soft[name], p * ours[name] + (1 - p) * turned[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(soft["log_odds_ratio"], ours["log_odds_ratio"])
    for a, b, c in zip(slope, up, down):
        torch.testing.assert_close(a, p * b + (1 - p) * c, rtol=1e-5, atol=1e-7)


def test_a_run_learns_from_its_pairs_probabilities(job, pairs, tmp_path):
    """A pair of probability 0 is the pair turned round, and those of 1/2 are trained on, too."""
    rows = read_rows(pairs, "pairs")[:40]
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "probability": 0.0} for row in rows
    ]
    runs = []
    for name, data in (
        ("plain", rows),
        ("turned", turned),
        ("torn", [{**r, "probability": 0.5} for r in rows]),
    ):
        write_rows(f"{tmp_path}/{name}.jsonl", data)
        script, config = job("orpo", data=f"{tmp_path}/{name}.jsonl", eval_data=pairs, eval_every=99, steps=2)
        script.main(config)
        runs.append([(row["loss"], row["nll"]) for row in steps(config.out)])
    assert runs[1] == [pytest.approx(row, rel=1e-5) for row in runs[0]]
    assert runs[2] != [pytest.approx(row, rel=1e-4) for row in runs[0]]
