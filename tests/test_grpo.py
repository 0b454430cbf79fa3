"""GRPO and its kin against loops of Python's own statistics, and against enumerated expectations."""

import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_grpo
from nanoalign import UserError, generate
from nanoalign.checkpoint import load, save
from nanoalign.data import BatchOrder
from nanoalign.logprobs import likelihoods, masked_sum, token_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.rollouts import rollout
from nanoalign.rows import write_rows
from nanoalign.run import Run
from nanoalign.scalar import ScalarGPT, response_scores
from nanoalign.tokenizer import get_tokenizer
from train_grpo import (
    KINDS,
    Config,
    check_flags,
    group_advantages,
    group_logprobs,
    kl_estimate,
    losses,
    policy_loss,
    token_weights,
)

TOKENIZER = get_tokenizer("world")
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()


# -------------------------------------------------------------------------------------------- advantages


def advantages_by_loop(scores, size, kind):
    found = []
    for start in range(0, len(scores), size):
        group = scores[start : start + size]
        for i, score in enumerate(group):
            others = group[:i] + group[i + 1 :]
            baseline = statistics.fmean(others if kind == "rloo" else group)
            spread = statistics.stdev(group) + 1e-4 if kind in ("grpo", "dapo") else 1.0
            found.append((score - baseline) / spread)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])  # the smallest shows the 1e-4 beside the std
def test_advantages_equal_a_loop_over_each_group(double, kind, size, scale):
    torch.manual_seed(0)
    scores = scale * torch.randn(4 * size) + 2
    advantages = group_advantages(scores, size, kind)
    assert advantages.shape == scores.shape
    assert advantages.tolist() == pytest.approx(advantages_by_loop(scores.tolist(), size, kind), abs=1e-9)


def test_advantages_by_hand():
    one_right, e = torch.tensor([1.0, 0.0, 0.0, 0.0]), 1e-4  # mean 1/4, unbiased variance 1/4
    scaled = [0.75 / (0.5 + e), *[-0.25 / (0.5 + e)] * 3]
    assert group_advantages(one_right, 4).tolist() == pytest.approx(scaled)
    assert group_advantages(one_right, 4, "dr_grpo").tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert group_advantages(one_right, 4, "rloo").tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert torch.equal(group_advantages(one_right, 4), group_advantages(one_right, 4, "dapo"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_price_of_kl_is_compared_within_the_group_on_the_scale_of_the_rewards(double, kind):
    torch.manual_seed(0)
    scores, price, G = torch.randn(16), torch.randn(16), 4
    scores[4:8], scores[12:] = 0.7, -1.0  # two groups of equal rewards
    found = group_advantages(scores, G, kind, price).view(-1, G).tolist()
    groups = [scores[i : i + G].tolist() for i in range(0, 16, G)]
    spreads = [statistics.stdev(groups[0]), statistics.stdev(groups[2])]
    scales = [spreads[0], sum(spreads) / 2, spreads[1], sum(spreads) / 2]
    for g, group in enumerate(groups):
        worth = [r - p for r, p in zip(group, price[g * G :].tolist())]
        for i, own in enumerate(worth):
            others = worth[:i] + worth[i + 1 :]
            due = own - statistics.mean(others if kind == "rloo" else worth)
            due /= scales[g] + 1e-4 if kind in ("grpo", "dapo") else 1
            assert found[g][i] == pytest.approx(due, abs=1e-9)
    alone = group_advantages(scores[4:8], G, kind, price[4:8]) / group_advantages(
        0 * price[4:8], G, kind, price[4:8]
    )
    torch.testing.assert_close(alone, torch.ones(4))  # all equal: the scale is 1, whatever they are
    torch.testing.assert_close(
        group_advantages(scores, G, kind, 0 * price), group_advantages(scores, G, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [0.0, 1.0, -2.5, 0.1])
def test_rewards_that_are_all_equal_teach_nothing_instead_of_nan(kind, score):
    advantages = group_advantages(torch.full((16,), score), 8, kind)
    assert advantages.abs().max() < 1e-3  # 0 but for the rounding of a mean in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 0, -2])
def test_a_group_of_one_is_an_error(kind, size):
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4), size, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_never_leak_into_each_other(double, kind):
    torch.manual_seed(0)
    scores = torch.randn(12)
    before = group_advantages(scores, 4, kind)
    assert before.view(3, 4).sum(1).abs().max() < 1e-9
    changed = torch.cat((scores[:4], 100 * scores[4:8] + 7, scores[8:]))
    after = group_advantages(changed, 4, kind)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[8:], after[8:])
    swapped = group_advantages(scores.view(3, 4).flip(0).flatten(), 4, kind).view(3, 4).flip(0).flatten()
    torch.testing.assert_close(swapped, before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_advantage_ignores_a_shift_of_its_group_and_grpos_ignores_its_scale(double, kind):
    torch.manual_seed(0)
    scores, scaled = torch.randn(8), 3.0 if kind in ("dr_grpo", "rloo") else 1.0
    torch.testing.assert_close(group_advantages(scores + 5, 4, kind), group_advantages(scores, 4, kind))
    stretched = group_advantages(3 * scores, 4, kind)
    torch.testing.assert_close(stretched, scaled * group_advantages(scores, 4, kind), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------- what a token weighs


@pytest.mark.parametrize("kind", KINDS)
def test_token_weights_are_their_definition_token_by_token(kind):
    weights, lengths = token_weights(MASK, kind, max_new_tokens=9), [3, 5, 1, 2]
    for b, t in itertools.product(range(4), range(6)):
        due = {"grpo": 1 / (4 * lengths[b]), "rloo": 1 / (4 * lengths[b]), "dapo": 1 / 11, "dr_grpo": 1 / 36}
        assert weights[b, t].item() == pytest.approx(due[kind] if MASK[b, t] else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_token_weights_add_up_to_the_documented_normaliser(kind):
    weights = token_weights(MASK, kind, max_new_tokens=9)
    assert weights.sum().item() == pytest.approx(11 / 36 if kind == "dr_grpo" else 1.0)
    rows = {"grpo": [1 / 4] * 4, "rloo": [1 / 4] * 4, "dapo": [3 / 11, 5 / 11, 1 / 11, 2 / 11],
            "dr_grpo": [3 / 36, 5 / 36, 1 / 36, 2 / 36]}[kind]  # fmt: skip
    assert weights.sum(1).tolist() == pytest.approx(rows)


def test_only_dr_grpo_looks_at_the_length_limit_and_never_at_the_padding():
    for kind in KINDS:
        a, b = token_weights(MASK, kind, 9), token_weights(MASK, kind, 18)
        torch.testing.assert_close(a, 2 * b if kind == "dr_grpo" else b)
        padded = torch.cat((MASK, torch.zeros(4, 7, dtype=torch.bool)), dim=1)
        assert torch.equal(token_weights(padded, kind, 9)[:, :6], a)


# ------------------------------------------------------------------------------------------ the surrogate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",  # the ratio may fall to 0.8 and rise to 1.28
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # beyond 1.2, within 1.28
        (1.5, 2.0, -2.56, 0.0),  # too likely already: no more gradient
        (1.5, -2.0, 3.0, 3.0),  # too likely, and bad: full gradient
        (0.75, -2.0, 1.6, 0.0),  # within 1 − 0.28, but beyond 0.8: unlikely already
        (0.75, 2.0, -1.5, -1.5),  # unlikely, and good: full gradient
        (0.85, -2.0, 1.7, 1.7),
    ],
)
def test_the_surrogate_by_cases_clips_low_and_high_at_their_own_distances(
    double, kind, ratio, advantage, loss, slope
):
    logp = torch.tensor([[3.0, math.log(ratio) - 1.0]], requires_grad=True)
    old, mask = torch.tensor([[0.0, -1.0]]), torch.tensor([[False, True]])
    values, ratios = policy_loss(logp, old, torch.tensor([advantage]), mask, kind, 0.2, 0.28)
    masked_sum(values, mask).sum().backward()
    assert values[0, 1].item() == pytest.approx(loss) and ratios.tolist() == [[1.0, pytest.approx(ratio)]]
    assert logp.grad.tolist() == [[0.0, pytest.approx(slope)]]  # ∂ρ/∂logp = ρ


def test_a_token_has_its_own_ratio_and_in_rloo_that_of_its_response(double):
    torch.manual_seed(0)
    logp, old, a = 0.1 * torch.randn(MASK.shape), 0.1 * torch.randn(MASK.shape), torch.ones(4)
    for kind in KINDS:
        loss, ratio = policy_loss(logp, old, a, MASK, kind, 0.9, 9.0)
        for b, t in itertools.product(range(4), range(6)):
            steps = [(logp[b, s] - old[b, s]).item() for s in range(6) if MASK[b, s]]
            due = math.exp(sum(steps)) if kind == "rloo" else math.exp(logp[b, t] - old[b, t])
            assert ratio[b, t].item() == pytest.approx(due if MASK[b, t] else 1.0)
            assert not MASK[b, t] or loss[b, t].item() == pytest.approx(-due)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(double, kind):
    torch.manual_seed(1)
    old, a = torch.randn(MASK.shape), torch.randn(4)
    logp = (old + 0.4 * torch.randn(MASK.shape)).requires_grad_()
    weights = token_weights(MASK, kind, 9)

    def loss(x):
        values, _ = policy_loss(x, old, a, MASK, kind, 0.2, 0.28)
        return masked_sum(values * weights, MASK).sum()

    ratio = policy_loss(logp, old, a, MASK, kind, 0.2, 0.28)[1]
    assert ((ratio < 0.8) | (ratio > 1.28)).any()  # some are clipped
    assert torch.autograd.gradcheck(loss, logp)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [1e9, math.nan, math.inf])
def test_what_lies_outside_the_mask_never_changes_loss_ratio_gradient_or_metrics(kind, junk):
    def everything(fill):
        torch.manual_seed(1)
        logp, old = (torch.randn(MASK.shape).masked_fill(~MASK, fill) for _ in range(2))
        logp.requires_grad_()
        weight, a = token_weights(MASK, kind, 9), torch.randn(4)
        ratio = policy_loss(logp, old, a, MASK, kind, 0.2, 0.28)[1]
        config = Config(kind=kind, clip_high=0.28)
        found = losses(logp, old, old + 1, a[:, None], weight, weight, MASK, config)
        found["loss"].backward()
        return [ratio, logp.grad, *found.values()]

    for a, b in zip(everything(-7.0), everything(junk)):
        assert torch.equal(a, b)


def test_metrics_are_weighed_like_the_loss(double):
    logp = torch.tensor([[0.0, math.log(1.5), math.log(0.5)], [0.0, math.log(1.5), 9.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    a, zero, weight = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 3), token_weights(mask, "grpo", 9)
    squares = [math.log(1.5) ** 2 / 2, math.log(0.5) ** 2 / 2, math.log(1.5) ** 2 / 2]
    squares = (squares[0] + squares[1]) / 4 + squares[2] / 2
    loss = (-1.2 - 0.5) / 4 + 1.5 / 2
    for kl, price in (("reward", 0.0), ("k2", squares)):
        found = losses(logp, zero, zero, a, weight, weight, mask, check(kl=kl, beta=0.3))
        assert found["approxkl"].item() == pytest.approx(squares)
        # of the three tokens only the first is clipped: the others move the way their advantage does not
        assert found["clip_fraction"].item() == pytest.approx(0.25)
        assert found["ratio"].item() == pytest.approx((1.5 + 0.5) / 4 + 1.5 / 2)
        assert found["kl_loss"].item() == pytest.approx(price)
        assert found["loss"].item() == pytest.approx(loss + 0.3 * price)
    tenfold = losses(logp, zero, zero, a, 10 * weight, weight, mask, check())  # the loss alone is weighed
    assert tenfold["loss"].item() == pytest.approx(10 * loss)
    assert tenfold["approxkl"].item() == pytest.approx(squares)


# --------------------------------------------------------------------- against an enumerated expectation


END, PAD, TINY = 2, 3, GPTConfig(vocab_size=4, context=6, layers=1, width=8, heads=2)


@pytest.fixture
def enumerated(double):
    """Two policies, and every response of at most 2 tokens over 0, 1, END; the longest may lack an end."""
    torch.manual_seed(5)
    models = [GPT(TINY), GPT(TINY)]
    for model in models:
        model.head.weight = torch.nn.Parameter(torch.randn(4, 8))  # untied, and far from uniform
    responses = [[END], [0, END], [1, END], [0, 0], [0, 1], [1, 0], [1, 1]]
    ids, mask = torch.full((7, 4), PAD), torch.zeros(7, 4, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : 2 + len(response)] = torch.tensor([1, 0, *response])
        mask[row, 2 : 2 + len(response)] = True

    def logprobs(model):  # restricted to 0, 1 and END, by plain logits
        logp = model(ids)[..., :3].log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None].clamp(max=2))
        return torch.nn.functional.pad(logp.squeeze(-1), (1, 0)).masked_fill(~mask, 0)

    return models, logprobs, mask, torch.randn(7)


def expected_loss(logp, old, shaped, mask, kind, low=0.2, high=0.2):
    """The mean loss of a step of one group of two, over every pair of responses drawn from the old policy."""
    probability, total = old.sum(-1).exp(), 0.0
    assert probability.sum().item() == pytest.approx(1)
    for pair in itertools.product(range(7), repeat=2):
        pair = list(pair)
        advantages = group_advantages(shaped[pair], 2, kind)
        loss, _ = policy_loss(logp[pair], old[pair], advantages, mask[pair], kind, low, high)
        weight = token_weights(mask[pair], kind, max_new_tokens=4)
        total = total + probability[pair].prod() * masked_sum(loss * weight, mask[pair]).sum()
    return total


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("kind, share", [("rloo", 1), ("dr_grpo", 1 / 8)])
def test_at_ratio_1_rloos_expected_gradient_is_that_of_the_objective_and_dr_grpos_along_it(
    enumerated, kind, share, beta
):
    """∇ Σ_y π(y) (r(y) − β log π(y)/π_ref(y)), by autodiff of the sum over every response there is.

    A baseline that includes one's own score halves it (G = 2), and Dr. GRPO divides by L_max = 4.
    """
    (policy, ref), logprobs, mask, score = enumerated
    logp, ref_logp = logprobs(policy), logprobs(ref).detach()
    weights, probability = list(policy.parameters()), logp.sum(-1).exp()
    objective = (probability * (score - beta * (logp - ref_logp).sum(-1))).sum()
    truth = torch.autograd.grad(objective, weights, retain_graph=True, allow_unused=True)

    shaped = score - beta * (logp - ref_logp).sum(-1).detach()
    loss = expected_loss(logp, logp.detach(), shaped, mask, kind)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    truth, found = (torch.cat([g.flatten() for g in side if g is not None]) for side in (truth, found))
    torch.testing.assert_close(-found, share * truth, atol=1e-12, rtol=1e-8)


def test_off_policy_rloos_ratio_is_the_whole_importance_weight(enumerated):
    """Unclipped, Σ π_old(y) π_old(y') ρ(y) (r(y) − r(y')) is the improvement itself: E_π r − E_old r."""
    (policy, old), logprobs, mask, score = enumerated
    logp, old_logp = logprobs(policy).detach(), logprobs(old).detach()
    improvement = ((logp.sum(-1).exp() - old_logp.sum(-1).exp()) * score).sum()
    loss = expected_loss(logp, old_logp, score, mask, "rloo", low=1.0, high=1e9)
    assert loss.item() == pytest.approx(-improvement.item(), abs=1e-12) and abs(improvement) > 0.01
    by_token = expected_loss(logp, old_logp, score, mask, "dr_grpo", low=1.0, high=1e9) * 8
    assert by_token.item() != pytest.approx(-improvement.item(), rel=1e-2)


def test_kl_estimates_against_the_enumerated_kl_and_its_gradient(double):
    torch.manual_seed(3)
    theta, ref = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    logp = theta.log_softmax(0)
    p, kl = logp.detach().exp(), (logp.exp() * (logp - ref)).sum()
    [truth] = torch.autograd.grad(kl, theta, retain_graph=True)
    terms = {kind: kl_estimate(logp, ref, kind) for kind in ("k1", "k2", "k3")}
    slopes = {k: torch.autograd.grad((p * t).sum(), theta, retain_graph=True)[0] for k, t in terms.items()}
    d = (ref - logp).detach().numpy()
    np.testing.assert_allclose(terms["k1"].detach(), -d)
    np.testing.assert_allclose(terms["k2"].detach(), d**2 / 2)
    np.testing.assert_allclose(terms["k3"].detach(), np.expm1(d) - d)
    assert (p * terms["k1"]).sum().item() == pytest.approx(kl.item())
    assert (p * terms["k3"]).sum().item() == pytest.approx(kl.item()) and (terms["k3"] >= 0).all()
    torch.testing.assert_close(slopes["k2"], truth)
    torch.testing.assert_close(slopes["k1"], torch.zeros(5))
    assert not torch.allclose(slopes["k3"], truth, rtol=1e-2)


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_k3_keeps_small_differences_in_fp32_and_is_never_negative(size):
    """e^d − 1 − d: 1 + d rounds d itself away."""
    d = size * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    k3, exact = kl_estimate(-d, torch.zeros_like(d), "k3"), d.double() ** 2 / 2
    for power in range(3, 30):
        exact += d.double() ** power / float(math.factorial(power))
    assert (k3 >= 0).all()
    two_roundings = 2 * 2**-23 * (d.abs() + exact)  # of e^d − 1, and of the difference
    assert ((k3 - exact).abs() <= two_roundings).all()
    assert size < 1e-6 or k3.double().mean().item() == pytest.approx(exact.mean().item(), rel=0.02)


# --------------------------------------------------------------------------------------- flags and checks


def check(**changes):
    config = Config(**changes)
    check_flags(config)
    return config


@pytest.mark.parametrize("kind, high", [("grpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28), ("rloo", 0.2)])
def test_each_kind_has_its_papers_clip_and_takes_kl_off_the_reward(kind, high):
    config = check(kind=kind)
    assert (config.clip_low, config.clip_high, config.kl) == (0.2, high, "reward")
    assert check(kind=kind, clip_high=0.5).clip_high == 0.5


@pytest.mark.parametrize(
    "flags, names",
    [
        ({"group_size": 1}, "--group-size must be at least 2"),
        ({"kind": "ppo"}, "--kind ppo is unknown"),
        ({"kl": "k4"}, "--kl k4"),
        ({"kind": "rloo", "kl": "k3"}, "--kl k3 is not for --kind rloo"),
        ({"batch_size": 60}, "--batch-size 60 and --minibatch 64 must be multiples"),
        ({"minibatch": 4}, "must be multiples of --group-size 8"),
        ({"temperature": 0.0}, "--temperature"),
        ({"steps": 0}, "--steps at least 1"),
        ({"epochs": 0}, "--epochs must be positive"),
        ({"minibatch": 0}, "--minibatch must be at least 1"),
        ({"eval_prompts": 0}, "--eval-prompts must be at least 1"),
        ({"reward": "prm-steps:x.pt"}, "python -m lab.train_grpo_steps"),
    ],
)
def test_flags_that_do_not_go_together_are_a_sentence(flags, names):
    """Before anything is loaded: there are no such files."""
    with pytest.raises(UserError, match=names):
        train_grpo.main(Config(init="no.pt", out="no/file.pt", **flags))


def test_the_check_of_the_first_minibatch_stops_a_ratio_off_1_a_kl_off_0_and_nan():
    ratio, kl = torch.zeros(5), torch.zeros(3)

    def start(ratio, kl, step=0, **flags):
        run = SimpleNamespace(step=step, config=Config(**flags), bf16=False)
        Run.must_be_on_policy(run, ratio, kl, torch.ones(3, 1))

    start(ratio, kl)
    start(ratio, kl + 1, reference="other.pt")  # another reference may be far away
    start(ratio, kl + 1, step=7)  # and so is a resumed policy
    for off, far in [(0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01), (math.nan, 0.0), (0.0, math.nan)]:
        with pytest.raises(UserError, match="two different paths"):
            start(ratio + off, kl + far)


@pytest.mark.parametrize("group, limits", [(1, (0, 0)), (4, (0, 0)), (1, (5, 0)), (4, (5, 0)), (4, (0, 40))])
def test_minibatches_show_each_response_once_an_epoch_and_groups_whole(group, limits):
    lengths, seen = np.random.default_rng(0).integers(3, 30, 24), []
    config = Config(minibatch=8, epochs=2, micro_batch=limits[0], micro_tokens=limits[1])
    run = object.__new__(Run)
    run.config, run.step, run.metrics = config, 3, SimpleNamespace(tokens=0)
    steps = [(step, [*pieces]) for step, pieces in run.minibatches(lengths, group)]
    assert len(steps) == 6
    for step, pieces in steps:
        rows = np.concatenate(pieces)
        assert sorted(rows) == sorted(step)
        seen += rows.tolist()
        assert len(rows) == 8 and len({*(rows // group)}) == 8 // group
        for piece in pieces:
            assert len(piece) <= (limits[0] or 8)
            assert len(piece) == 1 or not limits[1] or len(piece) * lengths[piece].max() <= limits[1]
            due = np.sort(piece) if group > 1 else piece[np.argsort(lengths[piece], kind="stable")]
            assert (lengths[piece] == lengths[due]).all() and (group == 1 or (piece == due).all())
    assert sorted(seen[:24]) == sorted(seen[24:]) == [*range(24)] and seen[:24] != seen[24:]


# ------------------------------------------------------------------------------------------ whole iterations

QUESTIONS = ("Hi", "Who?", "What is 3 + 4?", "What is the capital of France?", "Is it?", "Why?", "And then?")
ROWS = [{"prompt": [{"role": "user", "content": q}], "meta": {"number": i}} for i, q in enumerate(QUESTIONS)]


def talker(seed=0):
    """A random model that ends one response in four, token by token: in 40 tokens nearly every one."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2, tied=False)).eval()
    with torch.no_grad():
        model.embed.weight.normal_()[:, 0] = 4.0
        model.head.weight.normal_(0, 0.3)
        model.head.weight[:, 0] = 0
        model.head.weight[TOKENIZER.end, 0] = 2.2
    return model


def test_a_group_stays_together_though_prompts_of_one_length_are_sampled_together():
    prompts = [TOKENIZER.prompt(row["prompt"]) for row in ROWS]
    lengths = [len(prompt) for prompt in prompts]
    assert len(set(lengths)) > 3 and len(set(lengths)) < len(lengths) and lengths != sorted(lengths)
    asked = [prompt for prompt in prompts for _ in range(4)]
    drawn = rollout(talker(), TOKENIZER, asked, 6, seed=0)
    for start in range(0, 28, 4):
        for ids, mask in zip(drawn.ids[start : start + 4], drawn.mask[start : start + 4]):
            first = mask.nonzero()[0].item()
            assert ids[:first].tolist() == prompts[start // 4].tolist()
        assert len({tuple(r) for r in drawn.responses()[start : start + 4]}) > 1


@pytest.mark.parametrize("picked", [range(28), (0, 1, 2, 5, 11, 12, 14), (3,)])
def test_a_prompt_read_once_for_its_group_changes_neither_logprobs_nor_gradients(double, picked):
    """Of whole groups, and of what a micro-batch cuts out of them."""
    asked = [TOKENIZER.prompt(row["prompt"]) for row in ROWS for _ in range(4)]
    model, rows = talker(), torch.tensor(picked)
    drawn = rollout(model, TOKENIZER, asked, 20, seed=0, temperature=0.7)
    ids, mask, group = drawn.ids[rows], drawn.mask[rows], np.array(picked) // 4
    read, results = [], []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    plain = token_logprobs(model, ids, mask, 0.7)
    shared = group_logprobs(model, ids, mask, group, 0.7)
    for found in (plain, shared):
        weighed = (torch.arange(1.0, 1 + found.numel()).view(found.shape) * found).sum()
        results.append((found, *torch.autograd.grad(weighed, list(model.parameters()))))
    for plain, shared in zip(*results):
        torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(results[1][0], drawn.logp[rows].double(), rtol=1e-5, atol=1e-5)  # of fp32
    whole = [mask[group == g].sum() + int(mask[group == g][0].int().argmax()) for g in sorted({*group})]
    assert read == [ids.shape, (len(whole), max(whole))]


def test_a_rollout_of_groups_is_scored_with_each_prompt_read_once(double):
    """By the policy, and by a reward model, whether its reader is known already or not."""
    asked = [TOKENIZER.prompt(row["prompt"]) for row in ROWS[:3] for _ in range(4)]
    model, read = talker(), []
    drawn = rollout(model, TOKENIZER, asked, 20, seed=0, group=4)
    ids, mask = drawn.ids, drawn.mask
    reward, told = ScalarGPT.from_policy(model, reader=True), drawn.read_by(model)
    due = [*token_logprobs(model, ids, mask, 0.7, entropy=True), response_scores(reward, ids, mask)]
    torch.testing.assert_close(told[mask], likelihoods(model, ids)[mask])
    for one in (model, reward.gpt):
        one.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    found = [*token_logprobs(model, ids, mask, 0.7, True, drawn.hidden(model))]
    for seen in (None, told):
        score = response_scores(reward, ids, mask, drawn.hidden(reward, seen=seen))
        for x, y in zip((*found, score), due):
            torch.testing.assert_close(x, y)
    assert read == [3, 3, 3]


def test_a_reward_model_of_a_shorter_context_is_a_sentence_for_groups_as_for_rows(double):
    drawn = rollout(talker(), TOKENIZER, [TOKENIZER.prompt(ROWS[0]["prompt"])] * 4, 20, seed=0, group=4)
    short = ScalarGPT(replace(talker().config, context=drawn.ids.shape[1] - 1))
    for drawn.group in (4, 1):
        with pytest.raises(UserError, match="context of"):
            drawn.hidden(short)


class LongestFirst(BatchOrder):
    """Prompts in another order than that in which they are sampled; the whole batches before the rest."""

    def __getitem__(self, step):
        epoch = [super(LongestFirst, self).__getitem__(s)[::-1] for s in range(self.steps_per_epoch)]
        return sorted(epoch, key=len)[-1 - step % self.steps_per_epoch]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(reward, **flags) → the metrics of each iteration of a small run, and its weights."""

    def run(reward, **flags):
        def checked(rows, rollout):  # rows and responses must belong together
            for row, ids, mask in zip(rows, rollout.ids, rollout.mask):
                first = mask.nonzero()[0].item()
                assert ids[:first].tolist() == TOKENIZER.prompt(row["prompt"]).tolist()
            return torch.tensor([float(reward(row, r)) for row, r in zip(rows, rollout.responses())])

        monkeypatch.setattr(train_grpo, "BatchOrder", LongestFirst)
        checked.files = checked.models = checked.held = []
        monkeypatch.setattr(train_grpo, "make_reward", lambda *_: checked)
        start, other, data, out = (str(tmp_path / n) for n in ("sft.pt", "ref.pt", "rows.jsonl", "grpo.pt"))
        for path, seed in ((start, 0), (other, 1)):
            save(path, talker(seed), stage="sft", tokenizer=TOKENIZER, config=Config(), step=0)
        write_rows(data, ROWS)
        defaults = {"init": start, "prompts": data, "eval_data": data, "out": out, "device": "cpu"}
        defaults |= {"group_size": 4, "batch_size": 24, "minibatch": 12, "max_new_tokens": 40, "steps": 1}
        defaults |= {"warmup": 0, "lr": 1e-2, "eval_prompts": 2, "watch": ""}
        if flags.pop("other_reference", False):
            defaults["reference"] = other
        train_grpo.main(Config(**{**defaults, **flags}))
        lines = map(json.loads, Path(out).with_suffix(".metrics.jsonl").read_text().splitlines())
        return [row for row in lines if "loss" in row], load(out)["model"]

    return run


def by_content(row, response):
    return sum(response) % 7


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(double, trained, kind):
    """Rows of different lengths: what a token weighs is decided by the whole minibatch."""
    flags = {"kind": kind, "kl": "reward" if kind == "rloo" else "k3", "other_reference": True, "epochs": 1}
    [whole], weights = trained(by_content, **flags)
    assert whole["grad_norm"] > 1e-2 and whole["equal_groups"] < 0.5
    for limits in ({"micro_batch": 1}, {"micro_batch": 5}, {"micro_tokens": 90}):
        [pieces], same = trained(by_content, **limits, **flags)
        for name in ("loss", "grad_norm", "approxkl", "clip_fraction", "ratio", "kl_loss", "entropy"):
            assert pieces[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-9), name
        assert all(torch.allclose(weights[name], same[name], atol=1e-6) for name in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_each_prompt_once_changes_nothing(double, trained, kind, monkeypatch):
    flags = {"kind": kind, "other_reference": True, "micro_batch": 5, "epochs": 2}
    [shared], same = trained(by_content, **flags)
    monkeypatch.setattr(train_grpo, "packed_hidden", lambda model, ids, *_: model.hidden(ids))
    [plain], weights = trained(by_content, **flags)
    for name in ("loss", "grad_norm", "approxkl", "clip_fraction", "ratio", "kl", "entropy", "ratio_error"):
        assert shared[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-9), name
    assert all(torch.allclose(weights[name], same[name], atol=1e-6) for name in weights)


def test_minibatches_are_whole_groups(trained, monkeypatch):
    read, packed = [], train_grpo.packed_hidden
    for module in (train_grpo, generate):
        monkeypatch.setattr(module, "packed_hidden", lambda *a: read.append(a[3]) or packed(*a))
    trained(by_content, epochs=3)
    # all of them are scored, by policy and reference; there are two minibatches an epoch
    assert read == [[4] * 6] * 2 + [[4] * 3] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_of_the_prompt_alone_teaches_nothing_so_groups_are_groups(trained, kind, capsys):
    """Responses of another prompt in a group would give it spread."""
    [row], weights = trained(lambda row, response: row["meta"]["number"], kind=kind, beta=0.0)
    assert row["ended"] == 1.0 and row["equal_groups"] == 1.0 and row["grad_norm"] < 1e-4
    assert "most groups teach nothing" in capsys.readouterr().out
    before = talker().state_dict()
    assert all(torch.allclose(before[name], weights[name], atol=1e-3) for name in weights)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_kl_in_the_loss_is_beta_times_its_estimate_and_added(double, trained, kind, kl):
    flags = {"kind": kind, "kl": kl, "other_reference": True, "minibatch": 24, "epochs": 1}
    [row], _ = trained(lambda row, response: 1.0, beta=0.3, **flags)
    assert row["kl_loss"] > 0.01 and row["loss"] == pytest.approx(0.3 * row["kl_loss"], rel=1e-4)


def test_kl_in_the_reward_is_taken_off_it_response_by_response(double, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(train_grpo, "group_advantages", lambda *a: seen.append(a) or group_advantages(*a))
    [row], _ = trained(by_content, kind="rloo", beta=0.3, other_reference=True)
    [(scores, size, kind, price)] = seen
    assert (size, kind) == (4, "rloo") and row["kl_loss"] == 0 and row["kl"] > 0.1
    assert scores.mean().item() == pytest.approx(row["score"], rel=1e-4)
    assert price.mean().item() == pytest.approx(0.3 * row["kl"], rel=1e-4)
    assert price.std() > 0.01  # not the mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3, 1e-2])
def test_a_group_of_nearly_equal_rewards_does_not_drown_the_others(double, kind, spread):
    """Over a spread of almost nothing the price of KL would be a hundred times what others' rewards are."""
    torch.manual_seed(0)
    scores, price = torch.randn(64), 0.2 * torch.rand(64)
    scores[:8] = 0.5 + spread * torch.linspace(-1, 1, 8)
    found = group_advantages(scores, 8, kind, price).view(8, 8)
    assert 0.01 < found[0].norm() / found[1:].norm(dim=1).mean() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_rewards_are_equal_the_gradient_is_proportional_to_beta(double, trained, kind):
    """Divided by its own spread the KL would be noise of unit size, whatever β is."""
    flags = {"kind": kind, "other_reference": True, "minibatch": 24, "epochs": 1, "clip": 1e9}
    betas, norms = (0.2, 0.002, 0.0002), []
    for beta in betas:
        [row], _ = trained(lambda row, response: 1.0, beta=beta, **flags)
        assert row["equal_groups"] == 1 and row["kl"] > 0.1
        norms.append(row["grad_norm"])
    assert norms[0] > 1e-3
    for beta, norm in zip(betas, norms):
        assert norm / norms[0] == pytest.approx(beta / betas[0], rel=1e-3)


def test_the_policy_learns_what_pays(trained):
    rows, _ = trained(lambda row, response: -len(response), kind="rloo", beta=0.0, steps=6, lr=3e-2)
    assert rows[-1]["score"] > rows[0]["score"] + 1


def test_a_response_without_an_end_token_gets_the_missing_eos_score(trained):
    flags = {"max_new_tokens": 3, "missing_eos_score": -5.0}
    [row], _ = trained(lambda row, response: 2.0, **flags)
    assert 0 < row["ended"] < 1 and row["score"] == pytest.approx(7 * row["ended"] - 5, abs=1e-4)
