"""DPO and its variants against closed forms in numpy, and the bookkeeping that their log-probs depend on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_dpo
from nanoalign import UserError
from nanoalign.checkpoint import load, save
from nanoalign.data import collate, pair_examples
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import parse_pair, write_rows
from nanoalign.run import Run
from nanoalign.tokenizer import get_tokenizer
from train_dpo import (
    LOSSES,
    Config,
    dpo_loss,
    ipo_loss,
    pair_logprobs,
    preference_loss,
    robust_dpo_loss,
    simpo_loss,
)

TOKENIZER = get_tokenizer("world")


def minus_log_sigmoid(x):
    return np.logaddexp(0, -np.asarray(x, dtype=np.float64))


def draw(batch=64, scale=20.0, seed=0):
    """Margins (B,) in nats, of both signs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(batch, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.5])
def test_the_loss_is_its_closed_form_one_value_per_pair(beta, epsilon):
    h = draw().numpy()
    expected = (1 - epsilon) * minus_log_sigmoid(beta * h) + epsilon * minus_log_sigmoid(-beta * h)
    loss = dpo_loss(draw(), beta, epsilon)
    assert loss.shape == (64,)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_beta_is_a_tenth_and_nothing_is_smoothed_by_default():
    np.testing.assert_array_equal(dpo_loss(draw()), dpo_loss(draw(), beta=0.1, label_smoothing=0.0))


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_gradient_is_that_of_finite_differences(epsilon):
    h = draw(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, beta=0.3, label_smoothing=epsilon), h)


def test_the_gradient_on_the_margin_is_beta_times_the_error_of_the_model():
    """Rafailov et al. 2023, section 4: the weight of a pair is beta sigma(-beta h)."""
    h = draw().requires_grad_()
    dpo_loss(h, beta=0.2).sum().backward()
    np.testing.assert_allclose(h.grad, -0.2 / (1 + np.exp(0.2 * h.detach().numpy())), rtol=1e-10)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_the_loss_is_ln_2_at_a_margin_of_0(epsilon):
    loss = dpo_loss(torch.zeros(64), label_smoothing=epsilon)
    torch.testing.assert_close(loss, torch.full((64,), math.log(2)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.4])
def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels(epsilon):
    """sigma(beta h) = 1 - epsilon, and the loss there is the entropy of a label."""
    best = math.log((1 - epsilon) / epsilon) / 0.1
    loss = dpo_loss(torch.linspace(best - 5, best + 5, 101, dtype=torch.float64), 0.1, epsilon)
    entropy = -(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon)
    assert loss.argmin() == 50 and loss.min().item() == pytest.approx(entropy)


def test_labels_that_are_coin_flips_make_the_two_sides_exchangeable():
    swapped = dpo_loss(-draw(), label_smoothing=0.5)
    torch.testing.assert_close(dpo_loss(draw(), label_smoothing=0.5), swapped)
    assert not torch.allclose(dpo_loss(draw()), dpo_loss(-draw()))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_extreme_margins_give_a_finite_loss_and_gradient(h, epsilon):
    margin = torch.tensor([h], requires_grad=True)
    loss = dpo_loss(margin, 1.0, epsilon)
    loss.sum().backward()
    wrong_side = 1 - epsilon if h < 0 else epsilon
    assert loss.item() == pytest.approx(1e4 * wrong_side, abs=1e-3)
    assert margin.grad.isfinite().all()


# ------------------------------------------------------------------------------------- robust, IPO and SimPO


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_robust_dpo_over_labels_flipped_at_that_rate_is_the_clean_loss_on_average(beta, epsilon):
    """Which determines it: L(h) and L(−h) are two unknowns in the two equations at h and −h."""
    as_labelled, flipped = (robust_dpo_loss(h, beta, epsilon) for h in (draw(), -draw()))
    expectation = (1 - epsilon) * as_labelled + epsilon * flipped
    assert as_labelled.shape == (64,)
    expected = minus_log_sigmoid(beta * draw().numpy())
    np.testing.assert_allclose(expectation.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_robust_dpo_is_ln_2_at_a_margin_of_0(epsilon):
    loss = robust_dpo_loss(torch.zeros(64, dtype=torch.float64), 0.3, epsilon)
    np.testing.assert_allclose(loss.numpy(), math.log(2), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_and_0_at_a_margin_of_half_of_1_over_beta(beta):
    h = torch.linspace(-8, 12, 81, dtype=torch.float64) / beta / 8  # −1/β … 1.5/β, among them 0.5/β
    loss = ipo_loss(h, beta)
    np.testing.assert_allclose(loss.numpy(), (h.numpy() - 1 / (2 * beta)) ** 2, atol=1e-9)
    assert loss.min() < 1e-12 and h[loss.argmin()].item() == pytest.approx(0.5 / beta)
    assert ipo_loss(torch.zeros(1), beta).item() == pytest.approx(1 / (4 * beta**2))


@pytest.mark.parametrize("beta", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_simpo_asks_for_a_margin_of_gamma_itself_not_gamma_over_beta(beta, gamma):
    h = draw(scale=3.0)
    expected = minus_log_sigmoid(beta * h.numpy() - gamma)
    np.testing.assert_allclose(simpo_loss(h, beta, gamma).numpy(), expected, rtol=1e-12)
    even = simpo_loss(torch.full((4,), gamma / beta, dtype=torch.float64), beta, gamma)  # β h is γ
    np.testing.assert_allclose(even.numpy(), math.log(2), rtol=1e-9)


def test_the_variants_defaults_are_the_papers():
    h = draw(scale=2.0)
    assert torch.equal(robust_dpo_loss(h), robust_dpo_loss(h, beta=0.1, label_smoothing=0.1))
    assert torch.equal(robust_dpo_loss(h, label_smoothing=0.0), dpo_loss(h))
    assert torch.equal(ipo_loss(h), ipo_loss(h, beta=0.1))
    assert torch.equal(simpo_loss(h), simpo_loss(h, beta=2.0, gamma=1.0))


@pytest.mark.parametrize(
    "loss", [lambda h: robust_dpo_loss(h, 0.3, 0.2), lambda h: ipo_loss(h, 0.3), simpo_loss],
    ids=["robust", "ipo", "simpo"],
)  # fmt: skip
def test_each_variants_gradient_is_that_of_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, draw(5, scale=3.0).requires_grad_())


# ---------------------------------------------------------------------------------- what a run makes of them

EACH = pytest.mark.parametrize("loss", LOSSES)


def with_flags(loss, **flags):
    return Config(loss=loss, **{"beta": LOSSES[loss].beta, **flags})


TOKENS = torch.tensor([[4.0, 7.0, 1.0], [9.0, 2.0, 1.0]])
SURE = torch.ones(3)


def sums():
    """Of the policy and of the reference, chosen and rejected: (2, 3) each."""
    torch.manual_seed(0)
    return [-TOKENS.double() * (1 + torch.rand(2, 3, dtype=torch.float64)) for _ in range(2)]


def losses(config, logps, ref_logps, tokens=TOKENS, p=SURE):
    return preference_loss(config, logps, ref_logps, tokens, p)["loss"]


def test_the_losses_are_the_papers_five():
    assert list(LOSSES) == ["dpo", "cdpo", "robust", "ipo", "simpo"]
    assert (Config().loss, Config().gamma, Config().label_smoothing) == ("dpo", 1.0, 0.1)


@EACH
def test_a_run_takes_sums_for_the_dpos_and_means_per_token_for_ipo_and_simpo(loss):
    config = with_flags(loss, beta=0.5, gamma=0.3, label_smoothing=0.2)
    logps, ref_logps = sums()
    if loss == "simpo":
        ref_logps = torch.zeros_like(ref_logps)  # as `measure` has it where there is no reference
    found = preference_loss(config, logps, ref_logps, TOKENS, SURE)
    lengths = TOKENS.numpy() if loss in ("ipo", "simpo") else 1
    (better, worse), (ref_better, ref_worse) = (x.numpy() / lengths for x in (logps, ref_logps))
    h = (better - ref_better) - (worse - ref_worse)
    right, wrong = minus_log_sigmoid(0.5 * h), minus_log_sigmoid(-0.5 * h)
    expected = {
        "dpo": right,  # whatever --label-smoothing
        "cdpo": 0.8 * right + 0.2 * wrong,
        "robust": (0.8 * right - 0.2 * wrong) / 0.6,
        "ipo": (h - 1) ** 2,
        "simpo": minus_log_sigmoid(0.5 * (better - worse) - 0.3),
    }[loss]
    np.testing.assert_allclose(found["loss"].numpy(), expected, rtol=1e-6)
    rewards = 0.5 * (better - ref_better), 0.5 * (worse - ref_worse)
    np.testing.assert_allclose(found["reward_chosen"].numpy(), rewards[0], rtol=1e-6)
    np.testing.assert_allclose(found["reward_rejected"].numpy(), rewards[1], rtol=1e-6)
    np.testing.assert_allclose(found["margin"].numpy(), rewards[0] - rewards[1], rtol=1e-6)
    assert found["accuracy"].tolist() == (rewards[0] > rewards[1]).tolist()
    assert torch.equal(torch.stack((found["logp_chosen"], found["logp_rejected"])), logps)


@EACH
def test_saying_a_response_twice_leaves_ipo_and_simpo_alone_and_changes_the_dpos(loss):
    """Every token again, with the same log-prob: sums double, means stay."""
    config, twice = with_flags(loss), torch.tensor([[2.0], [1.0]])
    before = losses(config, *sums())
    after = losses(config, *(x * twice for x in sums()), TOKENS * twice)
    if loss in ("ipo", "simpo"):
        torch.testing.assert_close(before, after)
    else:
        assert ((before - after).abs() > 1e-3).all()


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo"])
def test_the_loss_falls_with_the_chosen_and_rises_with_the_rejected(loss):
    """IPO's up to a margin of 1/(2β), which these are far from."""
    config, (logps, ref_logps) = with_flags(loss, beta=0.1, label_smoothing=0.01), sums()
    chosen, rejected = torch.tensor([[0.01], [0.0]]), torch.tensor([[0.0], [0.01]])
    before = losses(config, logps, ref_logps)
    assert (losses(config, logps + chosen, ref_logps) < before).all()
    assert (losses(config, logps + rejected, ref_logps) > before).all()
    assert (losses(config, logps, ref_logps + chosen) > before).all()


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust"])
@pytest.mark.parametrize("shifted", [(0, 2), (1, 3), (0, 1), (2, 3)], ids=["w", "l", "policy", "reference"])
def test_a_shift_that_leaves_the_difference_of_log_ratios_alone_leaves_the_loss_alone(shifted, loss):
    """Of policy (0, 1) and reference (2, 3), or of both sides of either."""
    rows = torch.cat(sums())
    moved = torch.stack([row + 7.25 if i in shifted else row for i, row in enumerate(rows)])
    torch.testing.assert_close(losses(with_flags(loss), *moved.split(2)), losses(with_flags(loss), *sums()))


def with_gradients(config, logps, ref_logps, *rest):
    """The loss, and what it pulls both sides' log-probs by (2, 3)."""
    logps = logps.clone().requires_grad_()
    loss = losses(config, logps, ref_logps, *rest)
    return loss.detach(), *torch.autograd.grad(loss.sum(), logps)


@EACH
def test_soft_labels_of_1_and_0_are_the_hard_label_and_the_hard_label_of_the_pair_turned_round(loss):
    config, (logps, ref_logps) = with_flags(loss), sums()
    hard = with_gradients(config, *sums())
    ratios = (logps - ref_logps) / TOKENS if loss in ("ipo", "simpo") else logps - ref_logps
    assert torch.equal(hard[0], LOSSES[loss].of(ratios[0] - ratios[1], config))  # to the last bit
    logps = logps.requires_grad_()
    turned = losses(config, logps.flip(0), ref_logps.flip(0), TOKENS.flip(0))
    expected = turned.detach(), *torch.autograd.grad(turned.sum(), logps)
    torch.testing.assert_close(with_gradients(config, *sums(), TOKENS, torch.zeros(3)), expected)
    assert not torch.allclose(expected[0], hard[0])


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_soft_label_is_met_where_the_implicit_reward_has_its_log_odds(loss):
    """dpo: beta h = log p/(1 - p); ipo: h = (2p - 1)/(2 beta), 1/(2 beta) for a label that is sure."""
    p, beta = torch.tensor([0.5, 0.7, 0.95], dtype=torch.float64), 0.2
    h = (p / (1 - p)).log() / beta if loss == "dpo" else (2 * p - 1) / (2 * beta)
    logps, rest = torch.stack((h, 0 * h)), (torch.zeros(2, 3), torch.ones(2, 3), p)
    config = with_flags(loss, beta=beta)
    logps.requires_grad_()
    found = losses(config, logps, *rest)
    found.sum().backward()
    torch.testing.assert_close(logps.grad, torch.zeros_like(logps))
    with torch.no_grad():
        for off in (-0.1, 0.1):
            assert (losses(config, logps + torch.tensor([[off], [0.0]]), *rest) > found).all()


@EACH
def test_an_sft_term_is_weighed_by_the_label_and_leaves_rewards_and_margin_alone(loss):
    p = torch.tensor([1.0, 0.0, 0.75])
    plain, more = (
        preference_loss(with_flags(loss, sft_weight=weight), *sums(), TOKENS, p) for weight in (0.0, 0.5)
    )
    chosen, rejected = -sums()[0] / TOKENS
    due = plain["loss"] + 0.5 * (p * chosen + (1 - p) * rejected)
    torch.testing.assert_close(more.pop("loss"), due)
    assert all(torch.equal(values, plain[name]) for name, values in more.items())


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_the_step_0_check_knows_where_each_loss_starts(loss, beta):
    config, (logps, _) = with_flags(loss, beta=beta), sums()
    start = losses(config, logps, logps).mean().item()
    assert start == pytest.approx(1 / (4 * beta**2) if loss == "ipo" else math.log(2))
    due = LOSSES[loss].start(beta)

    def check(found):
        run = SimpleNamespace(means=lambda: {"loss": torch.tensor(found)}, bf16=False)
        Run.must_start_at(run, due, "L(0)")

    check(start)
    for wrong in (start + 0.01, start - 0.01, math.nan):
        with pytest.raises(UserError, match="policy and reference disagree"):
            check(wrong)


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
        (chosen, rejected), _ = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        assert chosen.shape == rejected.shape == (3,)
        for i, (prompt, better, worse) in enumerate(PAIRS):
            assert chosen[i].item() == pytest.approx(by_hand(model, prompt, better), rel=1e-4)
            assert rejected[i].item() == pytest.approx(by_hand(model, prompt, worse), rel=1e-4)


def test_a_pairs_logprobs_do_not_depend_on_its_batch_or_padding(model):
    with torch.no_grad():
        together, _ = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        alone = [pair_logprobs(model, examples(p), TOKENIZER, "cpu")[0] for p in PAIRS]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_prompt_shared_by_both_responses_changes_neither_logprobs_nor_gradients(positions):
    torch.manual_seed(0)
    batch = examples(*PAIRS, ("Hi", "word " * 20, "Hello."))
    context = max(len(ids) for pair in batch for ids, _ in pair)  # shared rows, and their padding, are longer
    shape = GPTConfig(
        TOKENIZER.vocab_size, context, layers=2, width=16, heads=4, kv_heads=2, positions=positions
    )
    model = GPT(shape).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, mask = collate([side for pair in batch for side in pair], TOKENIZER.pad)
    plain = masked_sum(token_logprobs(model, ids, mask), mask).view(-1, 2).T  # each side by itself
    results = []
    for logps in (plain, pair_logprobs(model, batch, TOKENIZER, "cpu")[0]):
        weights = torch.arange(1.0, 1 + logps.numel(), dtype=torch.float64).view(2, -1)
        results.append((logps, *torch.autograd.grad((weights * logps).sum(), list(model.parameters()))))
    for plain, shared in zip(*results):
        torch.testing.assert_close(shared, plain)
    read = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    pair_logprobs(model, batch[:1], TOKENIZER, "cpu")
    handle.remove()
    (chosen, _), (_, mask) = batch[0]
    assert read == [(1, len(chosen) + int(mask.sum()))]  # P + R_chosen + R_rejected


def test_swapping_the_sides_swaps_the_logprobs(model):
    with torch.no_grad():
        logps, _ = pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")
        swapped, _ = pair_logprobs(model, examples(*((p, r, c) for p, c, r in PAIRS)), TOKENIZER, "cpu")
    torch.testing.assert_close(logps.flip(0), swapped, rtol=1e-4, atol=1e-4)


def test_only_response_tokens_are_counted_and_each_of_them_once():
    """A model without preferences gives every token -ln V: the sum counts the tokens."""
    flat = GPT(GPTConfig(TOKENIZER.vocab_size, context=96, layers=1, width=8, heads=1))
    torch.nn.init.zeros_(flat.embed.weight)
    for prompt in ("Hi", "What is the capital of France, and why do so many people ask for it?"):
        batch = examples((prompt, "Paris.", "Paris." * 4))
        with torch.no_grad():
            logps, _ = pair_logprobs(flat, batch, TOKENIZER, "cpu")
        counts = [x.item() / -math.log(TOKENIZER.vocab_size) for x in logps]
        tokens = [len(TOKENIZER.response(text)) for text in ("Paris.", "Paris." * 4)]
        assert counts == pytest.approx(tokens, rel=1e-5)


def test_no_gradient_reaches_what_is_masked(model):
    """The log-prob of a prompt token is in neither sum: the same sums come from the response columns only."""
    batch = examples(PAIRS[0])
    for (ids, mask), total in zip(batch[0], pair_logprobs(model, batch, TOKENIZER, "cpu")[0]):
        logp = model(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        picked = [logp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
        assert not mask[: len(ids) - len(picked)].any() and ids[-1] == TOKENIZER.end and mask[-1]
        torch.testing.assert_close(total[0], torch.stack(picked).sum(), rtol=1e-4, atol=1e-4)


def test_response_tokens_are_counted_with_the_end_token_and_without_the_prompt(model):
    due = [[len(TOKENIZER.response(text)) for text in side] for side in list(zip(*PAIRS))[1:]]
    assert pair_logprobs(model, examples(*PAIRS), TOKENIZER, "cpu")[1].tolist() == due


def first_step(model, folder, **flags):
    """The metrics of a run's first optimiser step, over PAIRS."""
    paths = [str(folder / name) for name in ("sft.pt", "pairs.jsonl", "dpo.pt")]
    save(paths[0], model, stage="sft", tokenizer=TOKENIZER, config=Config(), step=0)
    write_rows(paths[1], [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    start, data, out = paths
    flags = {"steps": 1, "max_new_tokens": 4, "device": "cpu", **flags}
    train_dpo.main(Config(init=start, data=data, eval_data=data, out=out, **flags))
    lines = map(json.loads, Path(out).with_suffix(".metrics.jsonl").read_text().splitlines())
    return next(row for row in lines if "loss" in row)


@pytest.mark.parametrize(
    "loss, beta", [("dpo", 0.1), ("cdpo", 0.1), ("robust", 0.1), ("ipo", 0.1), ("simpo", 2)]
)
def test_each_loss_has_the_beta_of_its_paper_unless_another_is_given(model, tmp_path, loss, beta):
    for given, due in ((0.0, beta), (0.7, 0.7)):
        first_step(model, tmp_path, loss=loss, beta=given)
        assert load(tmp_path / "dpo.pt")["config"]["beta"] == due


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_sft_weight_adds_alpha_times_the_mean_nll_of_the_chosen(model, tmp_path, alpha):
    nll = [-by_hand(model, prompt, better) / len(TOKENIZER.response(better)) for prompt, better, _ in PAIRS]
    whole, pieces = (first_step(model, tmp_path, sft_weight=alpha, micro_batch=size) for size in (0, 2))
    assert whole["loss"] == pytest.approx(math.log(2) + alpha * sum(nll) / 3, rel=1e-4)
    for name in ("loss", "grad_norm"):  # micro-batches of two pairs and of one
        assert pieces[name] == pytest.approx(whole[name], rel=1e-4)
    plain = first_step(model, tmp_path)
    assert plain["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert whole["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-2)


def test_simpo_runs_without_a_reference_in_memory(model, tmp_path, capsys):
    row = first_step(model, tmp_path, loss="simpo", gamma=0.4)
    means = [
        [by_hand(model, pair[0], text) / len(TOKENIZER.response(text)) for text in pair[1:]] for pair in PAIRS
    ]
    due = np.mean([minus_log_sigmoid(2 * (better - worse) - 0.4) for better, worse in means])
    assert row["loss"] == pytest.approx(due, rel=1e-4)
    assert "models in memory: policy\n" in capsys.readouterr().out
