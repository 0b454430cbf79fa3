"""PPO's pure functions against definitions, closed forms and enumeration; then whole iterations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nanoalign.checkpoint import save
from nanoalign.generate import generate
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.scalar import ScalarGPT, ScalarHead
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import load_critic
from train_ppo import (
    Config,
    adapt_beta,
    explained_variance,
    forward,
    gae,
    losses,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)

MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)


@pytest.fixture
def noise(double):
    torch.manual_seed(0)
    return lambda: torch.randn(MASK.shape)


def spans():
    return [(row.nonzero()[0].item(), row.nonzero()[-1].item()) for row in MASK]


# ------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0), (1.0, 1.0)])
def test_gae_equals_its_definition_summed_term_by_term(noise, gamma, lam):
    rewards, values = noise(), noise()
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b, (first, last) in enumerate(spans()):
        v = [*values[b, first : last + 1].tolist(), 0.0]
        delta = [rewards[b, first + i].item() + gamma * v[i + 1] - v[i] for i in range(last - first + 1)]
        for i in range(len(delta)):
            expected = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta)))
            assert advantages[b, first + i].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, first + i].item() == pytest.approx(expected + v[i], abs=1e-12)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_gae_with_lambda_0_is_the_td_error_and_with_lambda_1_the_return_less_the_value(noise):
    rewards, values = noise(), noise()
    one_step, _ = gae(rewards, values, MASK, 0.9, 0.0)
    whole, returns = gae(rewards, values, MASK, 0.9, 1.0)
    for b, (first, last) in enumerate(spans()):
        for t in range(first, last + 1):
            following = values[b, t + 1].item() if t < last else 0.0
            assert one_step[b, t].item() == pytest.approx(rewards[b, t] + 0.9 * following - values[b, t])
            discounted = sum(0.9 ** (s - t) * rewards[b, s].item() for s in range(t, last + 1))
            assert returns[b, t].item() == pytest.approx(discounted)
            assert whole[b, t].item() == pytest.approx(discounted - values[b, t].item())


def test_the_last_advantage_is_the_score_less_the_value(noise):
    values, score, same = noise(), torch.tensor([2.0, -1.0, 0.5]), noise()
    advantages, _ = gae(shape_rewards(score, same, same, MASK, 0.1), values, MASK, 1.0, 0.95)
    for b, (_, last) in enumerate(spans()):
        assert advantages[b, last].item() == pytest.approx(score[b].item() - values[b, last].item())


def test_the_score_falls_on_the_last_response_token_and_the_kl_on_every_one(noise):
    logp, ref_logp, score = noise(), noise(), torch.tensor([2.0, -1.0, 0.5])
    rewards = shape_rewards(score, logp, ref_logp, MASK, 0.3)
    for b, (first, last) in enumerate(spans()):
        for t in range(MASK.shape[1]):
            expected = -0.3 * (logp[b, t] - ref_logp[b, t]) if first <= t <= last else torch.zeros(())
            expected = expected + (score[b] if t == last else 0)
            assert rewards[b, t].item() == pytest.approx(expected.item())


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask(noise):
    x = 5 + 3 * noise()
    white = whiten(x, MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-9)
    assert white[MASK].var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert not white[~MASK].any()


@pytest.mark.parametrize("junk", [0.0, 1e9, math.nan, math.inf])
def test_padding_content_never_changes_advantages_losses_metrics_or_gradients(noise, junk):
    def everything(fill):
        torch.manual_seed(1)
        x = [torch.randn(MASK.shape).masked_fill(~MASK, fill) for _ in range(6)]
        logp, values = x[0].requires_grad_(), x[3].requires_grad_()
        rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), x[1], x[2], MASK, 0.1)
        advantages, returns = gae(rewards, x[4], MASK)
        white = whiten(advantages, MASK)
        pg, vf = policy_loss(logp, x[1], white, MASK), value_loss(values, x[4], returns, MASK)
        (pg + vf).backward()
        variance = explained_variance(values.detach(), returns, MASK)
        return [advantages, returns, white, pg, vf, variance, logp.grad, values.grad]

    for a, b in zip(everything(-7.0), everything(junk)):
        assert torch.equal(a, b)


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant(noise):
    returns = noise()
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1)
    assert explained_variance(torch.ones_like(returns), returns, MASK).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3)


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # too likely already: no more gradient
        (1.5, -2.0, 3.0, 3.0),  # too likely, and bad: full gradient
        (0.5, -2.0, 1.6, 0.0),  # unlikely already
        (0.5, 2.0, -1.0, -1.0),  # unlikely, and good: full gradient
    ],
)
def test_the_clipped_surrogate_by_cases(double, ratio, advantage, loss, slope):
    logp = torch.tensor([[0.0, math.log(ratio) - 1.0]], requires_grad=True)
    old, mask = torch.tensor([[0.0, -1.0]]), torch.tensor([[False, True]])
    value = policy_loss(logp, old, torch.tensor([[9.0, advantage]]), mask, 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logp.grad.tolist() == [[0.0, pytest.approx(slope)]]  # ∂ρ/∂logp = ρ


@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (0.1, 0.0, 1.0, 0.5 * 0.81, -0.9),
        (0.5, 0.0, 1.0, 0.5 * 0.64, 0.0),  # moved far towards the target: the clipped error is larger
        (-0.5, 0.0, 1.0, 0.5 * 2.25, -1.5),  # moved away: the plain error is larger
        (0.5, 0.0, 0.3, 0.5 * 0.04, 0.2),
    ],
)
def test_the_clipped_value_loss_by_cases(double, value, old, target, loss, slope):
    v = torch.tensor([[5.0, value]], requires_grad=True)
    mask = torch.tensor([[False, True]])
    out = value_loss(v, torch.tensor([[0.0, old]]), torch.tensor([[0.0, target]]), mask, 0.2)
    out.backward()
    assert out.item() == pytest.approx(loss) and v.grad.tolist() == [[0.0, pytest.approx(slope)]]


def test_losses_average_over_tokens_not_over_rows(double):
    logp, old = torch.zeros(MASK.shape), torch.zeros(MASK.shape)
    advantages = torch.tensor([[1.0], [10.0], [100.0]]).expand(MASK.shape)
    expected = -(3 * 1 + 5 * 10 + 1 * 100) / 9
    assert policy_loss(logp, old, advantages, MASK).item() == pytest.approx(expected)


def test_what_is_logged_of_a_minibatch_by_hand(double):
    """Three tokens: one clipped, one that moved against its advantage, one that stayed."""
    mask = torch.tensor([[False, True, True, True]])
    logp = torch.tensor([[9.0, math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    values, zero = torch.tensor([[9.0, 0.3, -0.1, 0.0]]), torch.zeros(1, 4)
    found = losses(logp, zero, values, zero, torch.ones(1, 4), torch.ones(1, 4), mask, Config(vf_coef=0.1))
    assert found["loss"].item() == pytest.approx((found["policy_loss"] + 0.1 * found["value_loss"]).item())
    assert found["policy_loss"].item() == pytest.approx(-(1.2 + 0.5 + 1.0) / 3)
    assert found["value_loss"].item() == pytest.approx(0.5 * (0.8**2 + 1.1**2 + 1.0) / 3)
    assert found["ratio"].item() == pytest.approx((1.5 + 0.5 + 1.0) / 3)
    assert found["approxkl"].item() == pytest.approx((math.log(1.5) ** 2 + math.log(0.5) ** 2) / 6)
    assert found["clip_fraction"].item() == found["value_clip_fraction"].item() == pytest.approx(1 / 3)
    logged = [name for name, value in found.items() if not value.requires_grad]
    assert logged == ["value_loss", "ratio", "approxkl", "clip_fraction", "value_clip_fraction"]


@pytest.mark.parametrize(
    "kl, expected", [(6.0, 0.1), (6.6, 0.1 * 1.00256), (60.0, 0.1 * 1.00512), (0.0, 0.1 * 0.99488)]
)
def test_beta_follows_the_published_controller(kl, expected):
    # error clipped to ±0.2, times 256 responses over a horizon of 10,000 (Ziegler et al. 2019, §2.2)
    assert adapt_beta(0.1, kl, 6.0, 256, 10_000) == pytest.approx(expected)


# ------------------------------------------------------------------------ against an enumerated expectation


END, PAD, TINY = 2, 3, GPTConfig(vocab_size=4, context=6, layers=1, width=8, heads=2)


def all_responses(length: int) -> list[list[int]]:
    """Every response over the tokens 0, 1, END of at most `length` tokens; the longest may lack an end."""
    found = []
    for n in range(1, length + 1):
        for body in itertools.product((0, 1), repeat=n - 1):
            found += [[*body, END]] + ([[*body, 0], [*body, 1]] if n == length else [])
    return found


@pytest.fixture
def enumerated(double):
    torch.manual_seed(5)
    policy, ref = GPT(TINY), GPT(TINY)
    for model in (policy, ref):
        model.head.weight = torch.nn.Parameter(torch.randn(4, 8))  # untied, and far from uniform
    responses = all_responses(3)
    ids = torch.full((len(responses), 2 + 3), PAD)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, :2] = torch.tensor([1, 0])
        ids[row, 2 : 2 + len(response)] = torch.tensor(response)
        mask[row, 2 : 2 + len(response)] = True
    return policy, ref, ids, mask, torch.randn(len(responses))


def three_token_logprobs(model, ids, mask):
    """Log-probs under the policy restricted to the tokens 0, 1 and END (an independent path: full logits)."""
    logp = model(ids)[..., :3].log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None].clamp(max=2)).squeeze(-1)
    return F.pad(logp, (1, 0)).masked_fill(~mask, 0)


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_gradient_at_ratio_1_is_that_of_the_enumerated_objective(enumerated, beta, with_baseline):
    """∇ Σ_y π(y) (r(y) − β log π(y)/π_ref(y)), by autodiff of the sum over every response there is."""
    policy, ref, ids, mask, score = enumerated
    logp = three_token_logprobs(policy, ids, mask)
    with torch.no_grad():
        ref_logp = three_token_logprobs(ref, ids, mask)
    probability = logp.sum(-1).exp()
    assert probability.sum().item() == pytest.approx(1)
    objective = (probability * (score - beta * (logp - ref_logp).sum(-1))).sum()
    weights = list(policy.parameters())
    truth = torch.autograd.grad(objective, weights, retain_graph=True, allow_unused=True)

    old = logp.detach()
    values = torch.zeros(ids.shape)
    if with_baseline:  # any function of the prefix alone leaves the expectation as it is
        values = torch.sin(ids.cumsum(-1).double() * 3 + torch.arange(5)).roll(1, dims=-1)
    rewards = shape_rewards(score, old, ref_logp, mask, beta)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    loss = sum(  # each response as often as the policy draws it; its tokens summed
        probability[b].detach() * mask[b].sum()
        * policy_loss(logp[b, None], old[b, None], advantages[b, None], mask[b, None])
        for b in range(len(ids))
    )  # fmt: skip
    for mine, expected in zip(torch.autograd.grad(loss, weights, allow_unused=True), truth):
        if expected is not None:
            torch.testing.assert_close(-mine, expected, atol=1e-10, rtol=1e-8)


# ------------------------------------------------------------------------------------- models and rollouts


@pytest.mark.parametrize("shared", [False, True])
def test_a_value_is_read_before_its_token_is_emitted(double, shared):
    torch.manual_seed(0)
    policy, critic = GPT(TINY), ScalarHead(8) if shared else ScalarGPT(TINY)
    ids, mask = torch.tensor([[1, 0, 1, 0, 2]]), torch.tensor([[False, False, True, True, True]])
    values = [forward(policy, critic, changed, mask, 1.0)[1] for changed in (ids, ids.clone())]
    other = ids.clone()
    other[0, 3] = 1
    changed = forward(policy, critic, other, mask, 1.0)[1]
    assert torch.equal(values[0][0, :4], changed[0, :4])  # V_3 does not see token 3
    assert not torch.isclose(values[0][0, 4], changed[0, 4])


def test_a_critic_starts_from_a_model_with_a_head_that_expects_nothing(tmp_path, capsys):
    tokenizer, shape = get_tokenizer("world"), GPTConfig(2048, context=8, layers=1, width=8, heads=2)
    policy, reward, path = GPT(shape), ScalarGPT(shape), str(tmp_path / "x.pt")
    ids = torch.arange(6)[None]
    for stage, model, trunk in (("rm", reward, reward.gpt), ("sft", policy, policy)):
        save(path, model, stage=stage, tokenizer=tokenizer, config=Config(), step=0)
        critic = load_critic(path, policy, tokenizer, "cpu")
        assert torch.equal(critic.gpt.hidden(ids), trunk.hidden(ids)) and not critic(ids).any()
    head = load_critic("", policy, tokenizer, "cpu")
    assert isinstance(head, ScalarHead) and not head(policy.hidden(ids)).any()
    assert capsys.readouterr().out == 2 * f"critic: starts from {path}\n"


@pytest.mark.parametrize("shared, passes", [(True, 1), (False, 2)])
def test_one_pass_gives_logprobs_entropies_and_of_a_shared_trunk_values(monkeypatch, shared, passes):
    policy, critic, read, hidden = GPT(TINY), ScalarHead(8) if shared else ScalarGPT(TINY), [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, *a, **k: read.append(self) or hidden(self, *a, **k))
    ids, mask = torch.tensor([[1, 0, 1, 0, 2]]), torch.tensor([[False, False, True, True, True]])
    (logp, entropy), values = forward(policy, critic, ids, mask, 1.0, entropy=True)
    assert len(read) == passes and logp.shape == entropy.shape == values.shape == ids.shape


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_log_prob_is_taken_at_the_sampling_temperature(double, temperature):
    torch.manual_seed(0)
    policy = GPT(TINY)
    policy.head.weight = torch.nn.Parameter(torch.randn(4, 8))
    prompts, lengths = torch.tensor([[1, 0], [0, PAD]]), torch.tensor([2, 1])
    rollout = generate(policy, prompts, lengths, 4, END, PAD, temperature=temperature, seed=0)
    logp, _ = forward(policy, ScalarGPT(TINY), rollout.ids, rollout.mask, temperature)
    torch.testing.assert_close(logp, rollout.logp)
    _, entropy = token_logprobs(policy, rollout.ids, rollout.mask, temperature, entropy=True)
    p = (policy(rollout.ids) / temperature).softmax(-1)
    expected = F.pad(-(p * p.log()).sum(-1)[:, :-1], (1, 0)).masked_fill(~rollout.mask, 0)
    torch.testing.assert_close(entropy, expected)
    assert masked_sum(entropy, rollout.mask).min() > 0
