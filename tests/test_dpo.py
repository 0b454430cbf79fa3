"""DPO and its variants against closed forms in numpy, and the bookkeeping that their log-probs depend on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dpo
from evaluate import mean_and_error, win_rate
from nanoalign import UserError
from nanoalign.checkpoint import save
from nanoalign.data import pair_examples
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import parse_pair, write_rows
from nanoalign.tokenizer import get_tokenizer
from train_dpo import (
    Config,
    check_flags,
    check_start,
    dpo_loss,
    ipo_loss,
    online_pairs,
    pair_logprobs,
    preference_loss,
    response_tokens,
    robust_dpo_loss,
    simpo_loss,
)

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


# ------------------------------------------------------------------------------------- robust, IPO and SimPO


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_robust_dpo_over_labels_flipped_at_that_rate_is_the_clean_loss_on_average(beta, epsilon):
    """Which determines it: L(h) and L(−h) are two unknowns in the two equations at h and −h."""
    chosen, rejected, ref_chosen, ref_rejected = draw()
    as_labelled = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, epsilon)
    flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta, epsilon)
    h = ((chosen - ref_chosen) - (rejected - ref_rejected)).numpy()
    expectation = (1 - epsilon) * as_labelled + epsilon * flipped
    assert as_labelled.shape == (64,)
    np.testing.assert_allclose(expectation.numpy(), minus_log_sigmoid(beta * h), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_robust_dpo_is_ln_2_where_policy_and_reference_agree(epsilon):
    chosen, rejected, _, _ = draw()
    loss = robust_dpo_loss(chosen, rejected, chosen, rejected, 0.3, epsilon)
    np.testing.assert_allclose(loss.numpy(), math.log(2), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_and_0_at_a_margin_of_half_of_1_over_beta(beta):
    h = torch.linspace(-8, 12, 81, dtype=torch.float64) / beta / 8  # −1/β … 1.5/β, among them 0.5/β
    zero = torch.zeros_like(h)
    loss = ipo_loss(h - 3, zero - 1, zero - 2, zero, beta)  # the margin: (h − 3 + 2) − (−1 − 0) = h
    np.testing.assert_allclose(loss.numpy(), (h.numpy() - 1 / (2 * beta)) ** 2, atol=1e-9)
    assert loss.min() < 1e-12 and h[loss.argmin()].item() == pytest.approx(0.5 / beta)
    at_0 = ipo_loss(zero, zero, zero, zero, beta)
    assert at_0[0].item() == pytest.approx(1 / (4 * beta**2))


@pytest.mark.parametrize("beta", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_simpo_asks_for_a_margin_of_gamma_itself_not_gamma_over_beta(beta, gamma):
    chosen, rejected, _, _ = draw(scale=3.0)
    expected = minus_log_sigmoid(beta * (chosen - rejected).numpy() - gamma)
    np.testing.assert_allclose(simpo_loss(chosen, rejected, beta, gamma).numpy(), expected, rtol=1e-12)
    even = simpo_loss(rejected + gamma / beta, rejected, beta, gamma)  # β times the difference is γ
    np.testing.assert_allclose(even.numpy(), math.log(2), rtol=1e-9)


def test_the_variants_defaults_are_the_papers():
    means = draw(scale=2.0)
    assert torch.equal(robust_dpo_loss(*means), dpo_loss(*means, beta=0.1, label_smoothing=0.0))
    assert torch.equal(ipo_loss(*means), ipo_loss(*means, beta=0.1))
    assert torch.equal(simpo_loss(*means[:2]), simpo_loss(*means[:2], beta=2.0, gamma=1.0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda *x: robust_dpo_loss(*x, 0.3, 0.2),
        lambda *x: ipo_loss(*x, 0.3),
        lambda a, b, *_: simpo_loss(a, b),
    ],
    ids=["robust", "ipo", "simpo"],
)
def test_each_variants_gradient_is_that_of_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in draw(5, scale=3.0)])


def with_flags(**flags):
    config = Config(**flags)
    check_flags(config)
    return config


@pytest.mark.parametrize(
    "loss, beta", [("dpo", 0.1), ("cdpo", 0.1), ("robust", 0.1), ("ipo", 0.1), ("simpo", 2)]
)
def test_each_loss_has_the_beta_of_its_paper_unless_another_is_given(loss, beta):
    assert with_flags(loss=loss).beta == beta and with_flags(loss=loss, beta=0.7).beta == 0.7
    assert (with_flags(loss=loss).gamma, with_flags(loss=loss).label_smoothing) == (1.0, 0.1)


TOKENS = torch.tensor([[4.0, 7.0, 1.0], [9.0, 2.0, 1.0]])


def sums():
    """Of the policy and of the reference, chosen and rejected: (2, 3) each."""
    torch.manual_seed(0)
    return [-TOKENS.double() * (1 + torch.rand(2, 3, dtype=torch.float64)) for _ in range(2)]


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo", "simpo"])
def test_a_run_takes_sums_for_the_dpos_and_means_per_token_for_ipo_and_simpo(loss):
    config = with_flags(loss=loss, beta=0.5, gamma=0.3, label_smoothing=0.2)
    found, *rewards = preference_loss(config, *sums(), TOKENS)
    lengths = TOKENS.numpy() if loss in ("ipo", "simpo") else 1
    (better, worse), (ref_better, ref_worse) = (x.numpy() / lengths for x in sums())
    h = (better - ref_better) - (worse - ref_worse)
    right, wrong = minus_log_sigmoid(0.5 * h), minus_log_sigmoid(-0.5 * h)
    expected = {
        "dpo": right,  # whatever --label-smoothing
        "cdpo": 0.8 * right + 0.2 * wrong,
        "robust": (0.8 * right - 0.2 * wrong) / 0.6,
        "ipo": (h - 1) ** 2,
        "simpo": minus_log_sigmoid(0.5 * (better - worse) - 0.3),
    }[loss]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(rewards[0].numpy(), 0.5 * (better - ref_better), rtol=1e-6)
    np.testing.assert_allclose(rewards[1].numpy(), 0.5 * (worse - ref_worse), rtol=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo", "simpo"])
def test_saying_a_response_twice_leaves_ipo_and_simpo_alone_and_changes_the_dpos(loss):
    """Every token again, with the same log-prob: sums double, means stay."""
    config, twice = with_flags(loss=loss), torch.tensor([[2.0], [1.0]])
    before = preference_loss(config, *sums(), TOKENS)[0]
    after = preference_loss(config, *(x * twice for x in sums()), TOKENS * twice)[0]
    if loss in ("ipo", "simpo"):
        torch.testing.assert_close(before, after)
    else:
        assert ((before - after).abs() > 1e-3).all()


def with_gradients(config, logps, ref_logps, *rest):
    """The loss, and what it pulls both sides' log-probs by (2, 3)."""
    logps = logps.clone().requires_grad_()
    loss = preference_loss(config, logps, ref_logps, TOKENS, *rest)[0]
    return loss.detach(), *torch.autograd.grad(loss.sum(), logps)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo", "simpo"])
def test_soft_labels_of_1_and_0_are_the_hard_label_and_the_hard_label_of_the_pair_turned_round(loss):
    config, (logps, ref_logps) = with_flags(loss=loss), sums()
    hard, sure = with_gradients(config, *sums()), with_gradients(config, *sums(), torch.ones(3))
    assert all(torch.equal(a, b) for a, b in zip(hard, sure))  # to the last bit
    logps, ref_logps = logps.requires_grad_(), ref_logps
    turned = preference_loss(config, logps.flip(0), ref_logps.flip(0), TOKENS.flip(0))[0]
    expected = turned.detach(), *torch.autograd.grad(turned.sum(), logps)
    torch.testing.assert_close(with_gradients(config, *sums(), torch.zeros(3)), expected)
    assert not torch.allclose(expected[0], hard[0])


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_soft_label_is_met_where_the_implicit_reward_has_its_log_odds(loss):
    """dpo: beta h = log p/(1 - p); ipo: h = (2p - 1)/(2 beta), 1/(2 beta) for a label that is sure."""
    p, beta = torch.tensor([0.5, 0.7, 0.95], dtype=torch.float64), 0.2
    h = (p / (1 - p)).log() / beta if loss == "dpo" else (2 * p - 1) / (2 * beta)
    logps, ones = torch.stack((h, 0 * h)), torch.ones(2, 3)
    logps.requires_grad_()
    found = preference_loss(with_flags(loss=loss, beta=beta), logps, 0 * logps.detach(), ones, p)[0]
    found.sum().backward()
    torch.testing.assert_close(logps.grad, torch.zeros_like(logps))
    with torch.no_grad():
        for off in (-0.1, 0.1):
            moved = logps + torch.tensor([[off], [0.0]])
            config = with_flags(loss=loss, beta=beta)
            assert (preference_loss(config, moved, 0 * logps, ones, p)[0] > found).all()


def test_no_reference_has_any_influence_on_simpo():
    logps, ref_logps = sums()
    losses = [
        preference_loss(with_flags(loss="simpo"), logps, r, TOKENS)[0] for r in (ref_logps, ref_logps * 9)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_the_step_0_check_knows_where_each_loss_starts(loss, beta):
    config, (logps, _) = with_flags(loss=loss, beta=beta), sums()
    start = preference_loss(config, logps, logps, TOKENS)[0].mean().item()
    assert start == pytest.approx(1 / (4 * beta**2) if loss == "ipo" else math.log(2))
    check_start(start, config, torch.device("cpu"))
    for wrong in (start + 0.01, start - 0.01, math.nan):
        with pytest.raises(UserError, match="policy and reference disagree"):
            check_start(wrong, config, torch.device("cpu"))


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
    results = []
    for share in (False, True):
        logps = pair_logprobs(model, batch, TOKENIZER, "cpu", share)
        weights = torch.arange(1.0, 1 + logps.numel(), dtype=torch.float64).view(2, -1)
        results.append((logps, *torch.autograd.grad((weights * logps).sum(), list(model.parameters()))))
    for plain, shared in zip(*results):
        torch.testing.assert_close(shared, plain)
    read = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    pair_logprobs(model, batch[:1], TOKENIZER, "cpu", share=True)
    handle.remove()
    (chosen, _), (_, mask) = batch[0]
    assert read == [(1, len(chosen) + int(mask.sum()))]  # P + R_chosen + R_rejected


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


def test_response_tokens_are_counted_with_the_end_token_and_without_the_prompt():
    due = [[len(TOKENIZER.response(text)) for text in side] for side in list(zip(*PAIRS))[1:]]
    assert response_tokens(examples(*PAIRS), "cpu").tolist() == due


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


# -------------------------------------------------------------------------------- pairs from fresh samples


@pytest.fixture(scope="module")
def talker():
    """A random model that ends most of its responses within six tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2, tied=False)).eval()
    with torch.no_grad():
        model.embed.weight.normal_()[:, 0] = 4.0
        model.head.weight.normal_(0, 0.3)
        model.head.weight[:, 0] = 0
        model.head.weight[TOKENIZER.end, 0] = 2.5
    return model


def fresh(talker, scale, count=60, seed=0):
    """Pairs of fresh samples, {prompt: (chosen, rejected)}; and what was drawn, {prompt: [(response, score,
    whether it ended), …]}."""
    texts = ["Why? " * (i % 5) + f"{i}" for i in range(count)]
    rows = [{"prompt": [{"role": "user", "content": text}], "meta": {}} for text in texts]
    prompts = [TOKENIZER.prompt(row["prompt"]) for row in rows]
    drawn = {tuple(p.tolist()): [] for p in prompts}

    def reward(batch, rollout):
        scores = [scale * (sum(response) % 4) for response in rollout.responses()]
        drafts = zip(rollout.responses(), scores, rollout.ended.tolist())
        for row, ids, mask, (response, *rest) in zip(batch, rollout.ids, rollout.mask, drafts):
            prompt = tuple(TOKENIZER.prompt(row["prompt"]).tolist())
            assert tuple(ids[: mask.nonzero()[0]].tolist()) == prompt  # rows are those of the responses
            drawn[prompt].append((tuple(response), *rest))
        return torch.tensor(scores)

    pairs, config = {}, Config(max_new_tokens=6)
    for both in online_pairs(talker, rows, prompts, reward, TOKENIZER, config, seed):
        chosen, rejected = (tuple(ids[~mask].tolist()) for ids, mask in both)
        assert chosen == rejected and chosen not in pairs
        for ids, mask in both:  # the prompt, then one run of scored tokens, to the end
            assert mask.tolist() == [i >= len(chosen) for i in range(len(ids))]
        assert both[0][0][-1] == TOKENIZER.end
        pairs[chosen] = tuple(tuple(ids[mask].tolist()) for ids, mask in both)
    return pairs, drawn


@pytest.mark.parametrize("sign", [1, -1])
def test_of_two_fresh_samples_the_finished_and_then_the_much_better_one_is_chosen(talker, sign):
    pairs, drawn = fresh(talker, scale=1000.0 * sign, count=400)
    expected, seen = {}, set()
    for prompt, (first, second) in drawn.items():
        if not (first[2] or second[2]):
            seen.add("neither finished")
            assert prompt not in pairs
        elif first[2] != second[2]:  # whatever the scores
            better, worse = (first, second) if first[2] else (second, first)
            seen.add("the worse paid finished" if better[1] < worse[1] else "one finished")
            expected[prompt] = better[0], worse[0]
        elif first[0] == second[0]:
            seen.add("alike")
            assert prompt not in pairs
        elif first[1] == second[1]:
            seen.add("equally good")
            assert sorted(pairs.pop(prompt)) == sorted((first[0], second[0]))
        else:
            better, worse = (first, second) if first[1] > second[1] else (second, first)
            seen.add("the first" if better is first else "the second")
            expected[prompt] = better[0], worse[0]
    assert len(seen) == 7, seen  # every case came up
    assert pairs == expected


def test_otherwise_a_fresh_sample_is_chosen_as_often_as_bradley_and_terry_say(talker):
    pairs, drawn = fresh(talker, scale=0.6, count=1400)
    wins, due = [], []
    for prompt, (first, second) in drawn.items():
        if first[2] and second[2] and first[0] != second[0]:
            wins.append(pairs[prompt][0] == first[0])
            due.append(1 / (1 + math.exp(second[1] - first[1])))
    wins, due = np.array(wins), np.array(due)
    assert len(wins) > 900 and len(set(due.round(6))) == 7
    for gap in sorted(set(due.round(6))):  # of each difference of scores by itself
        here = np.isclose(due, gap)
        assert abs(wins[here].mean() - gap) < 4 * math.sqrt(gap * (1 - gap) / here.sum())
    better, sure = np.where(due >= 0.5, wins, ~wins), np.maximum(due, 1 - due)
    apart = sure > 0.51
    error = math.sqrt((sure * (1 - sure))[apart].sum())
    assert abs((better - sure)[apart].sum()) < 3 * error < 0.05 * apart.sum()
    assert fresh(talker, 0.6)[0] == fresh(talker, 0.6)[0] != fresh(talker, 0.6, seed=1)[0]


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
