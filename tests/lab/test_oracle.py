"""Every method on a world where the best policy is known exactly: trained until it is there.

lab/oracle.py has the world and the training, with the loss functions of the scripts and the real GPT; here
are the right answers. A loss whose optimum has no closed form is minimised once more by a generic optimiser
over the table of all conditional probabilities, with the objective written out anew.
"""

import math

import pytest
import torch

import train_dpo
import train_grpo
import train_kto
import train_orpo
from lab.oracle import BETA, END, LONGEST, World, copy_of, dpo, grpo, minimise, ppo, reward_model
from nanoalign.generate import generate
from nanoalign.logprobs import masked_mean, masked_sum

CLOSE = 0.01  # total variation


@pytest.fixture
def world(double):
    return World()


def policy_of(world, model):
    return world.sequence(model).detach().exp()


def test_every_response_is_enumerated_once(world):
    assert len(world.said) == len(set(world.said)) == 15
    p = policy_of(world, world.ref).view(2, -1)
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert world.distance(policy_of(world, world.ref), world.optimum()) > 0.25  # there is a way to go


def test_the_optimum_is_where_reward_less_the_price_of_kl_is_highest(world):
    """J(π) = E[r] − β KL: no change of the table improves on π*, and J(π*) = β log Z."""
    ref, best = world.sequence(world.ref), world.optimum()

    def value(p):
        return (p * (world.reward - BETA * (p.log() - ref))).sum()

    log_z = (ref + world.reward / BETA).view(2, -1).logsumexp(1)
    torch.testing.assert_close(value(best), BETA * log_z.sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = (best.log() + 0.1 * torch.randn(30, generator=generator)).view(2, -1).softmax(-1).flatten()
        assert value(other) < value(best)


# ------------------------------------------------------------------- methods that claim the same optimum


def test_dpo_on_exact_pairs_ends_at_the_optimum(world):
    assert world.distance(policy_of(world, dpo(world)), world.optimum()) < 1e-4


def test_robust_dpo_ends_at_the_optimum_although_labels_are_flipped_and_dpo_does_not(world):
    robust = dpo(world, train_dpo.robust_dpo_loss, flipped=0.2, label_smoothing=0.2)
    assert world.distance(policy_of(world, robust), world.optimum()) < 1e-4
    misled = dpo(world, flipped=0.2)
    assert world.distance(policy_of(world, misled), world.optimum()) > 0.05


def test_ppo_ends_at_the_optimum(world):
    policy, _ = ppo(world, steps=120)
    assert world.distance(policy_of(world, policy), world.optimum()) < CLOSE


@pytest.mark.parametrize("kind", train_grpo.KINDS)
def test_group_methods_with_kl_in_the_reward_end_at_the_optimum(world, kind):
    policy, _ = grpo(world, kind, steps=120)
    assert world.distance(policy_of(world, policy), world.optimum()) < CLOSE


@pytest.mark.parametrize("kl, least, most", [("k1", 0.5, 1.0), ("k2", 0.02, 0.1), ("k3", 0.1, 0.3)])
def test_kl_as_a_loss_per_token_ends_somewhere_else(world, kl, least, most):
    """k1 has no gradient in expectation, so nothing holds the policy; k2 leaves out what a token does to the
    KL of those that follow; k3 has another gradient altogether."""
    policy, _ = grpo(world, "dr_grpo", kl, steps=100)
    assert least < world.distance(policy_of(world, policy), world.optimum()) < most


def test_a_reward_model_of_exact_pairs_is_the_reward_up_to_a_constant_per_prompt(world):
    off = (reward_model(world) - world.reward).view(2, -1)
    torch.testing.assert_close(off - off.mean(1, keepdim=True), torch.zeros(2, 15), rtol=0, atol=1e-4)


# ------------------------------------------- methods with an optimum of their own, found a second time


class Table(torch.nn.Module):
    """A policy as a table: logits of the next token after every prefix."""

    def __init__(self, world):
        super().__init__()
        rows = [(x, *y) for x in (0, 1) for y in world.said]
        prefixes = sorted({row[:t] for row in rows for t in range(1, len(row))})
        self.logits = torch.nn.Parameter(torch.zeros(len(prefixes), 3))
        uses = [
            (n, prefixes.index(row[:t]), row[t]) for n, row in enumerate(rows) for t in range(1, len(row))
        ]
        self.row, self.prefix, self.token = torch.tensor(uses).T

    def sequence(self):
        """log π(y|x) (N,), a sum over prefixes, in the order of the world's rows."""
        steps = self.logits.log_softmax(-1)[self.prefix, self.token]
        return torch.zeros(30).index_add(0, self.row, steps)


def mean_logprobs(world, policy):
    return masked_mean(world.logp(policy), world.mask)


def ipo_by_script(world, policy):
    ratio, (i, j, p) = mean_logprobs(world, policy) - mean_logprobs(world, world.ref), world.pairs()
    return (p * train_dpo.ipo_loss(ratio[i] - ratio[j], beta=2.0)).sum() / p.sum()


def ipo_by_hand(world, logp):
    n, ref, (i, j, p) = world.mask.sum(1), world.sequence(world.ref), world.pairs()
    h = (logp - ref) / n
    return (p * (h[i] - h[j] - 0.25) ** 2).sum() / p.sum()


def simpo_by_script(world, policy):
    (i, j, p), logp = world.pairs(), mean_logprobs(world, policy)
    return (p * train_dpo.simpo_loss(logp[i] - logp[j], beta=2.0, gamma=0.5)).sum() / p.sum()


def simpo_by_hand(world, logp):
    (i, j, p), m = world.pairs(), logp / world.mask.sum(1)
    return (p * torch.log1p(torch.exp(0.5 - 2 * (m[i] - m[j])))).sum() / p.sum()


def orpo_by_script(world, policy):
    (i, j, p), logp = world.pairs(), mean_logprobs(world, policy)
    return (p * train_orpo.orpo_loss(-logp[i], logp[i], logp[j], lam=0.5)).sum() / p.sum()


def orpo_by_hand(world, logp):
    (i, j, p), m = world.pairs(), logp / world.mask.sum(1)
    odds = m.exp() / (1 - m.exp())
    return (p * (-m[i] + 0.5 * torch.log1p(odds[j] / odds[i]))).sum() / p.sum()


@pytest.mark.parametrize(
    "by_script, by_hand",
    [(ipo_by_script, ipo_by_hand), (simpo_by_script, simpo_by_hand), (orpo_by_script, orpo_by_hand)],
    ids=["ipo", "simpo", "orpo"],
)
def test_a_loss_of_pairs_ends_at_the_optimum_of_its_own_objective(world, by_script, by_hand):
    policy, table = copy_of(world.ref), Table(world)
    least = minimise(table, lambda: by_hand(world, table.sequence()))
    reached = minimise(policy, lambda: by_script(world, policy))
    assert reached == pytest.approx(least, abs=1e-5)
    assert world.distance(policy_of(world, policy), table.sequence().detach().exp()) < CLOSE


def test_kto_ends_at_the_fixed_point_of_its_own_objective(world):
    """z is a constant to the gradient, but follows the policy. Thumbs go up with probability σ(r); all
    responses of the batch are equally likely mismatched ones. The optimum lies at infinity (what most people
    dislike is to vanish), so both are followed downhill from the reference."""
    up, ref, beta = torch.sigmoid(world.reward), world.sequence(world.ref), 0.3
    weights = train_kto.balanced_weights(int(1000 * up.sum()), int(1000 * (1 - up).sum()))

    def by_hand(logp, z):
        r = logp - ref
        gain, loss = 1 / (1 + torch.exp(beta * (r - z))), 1 / (1 + torch.exp(beta * (z - r)))
        return (up * weights[0] * gain + (1 - up) * weights[1] * loss).mean()

    def by_script(logp, z):
        yes, no = torch.ones(30, dtype=torch.bool), torch.zeros(30, dtype=torch.bool)
        losses = [train_kto.kto_loss(logp - ref, label, z, beta, *weights) for label in (yes, no)]
        return (up * losses[0] + (1 - up) * losses[1]).mean()

    def descend(model, sequence, objective, lr, steps):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            logp = sequence()
            loss = objective(logp, (logp - ref).mean().clamp(min=0).detach())
            loss.backward()
            optimizer.step()
        return loss.item()

    policy, table = copy_of(world.ref), Table(world)
    minimise(table, lambda: (table.sequence() - ref).square().sum())
    start = by_hand(ref, torch.tensor(0.0)).item()
    least = descend(table, table.sequence, by_hand, 0.1, 1500)
    reached = descend(policy, lambda: world.sequence(policy), by_script, 2e-3, 600)
    assert reached == pytest.approx(least, abs=0.01 * (start - least))
    assert world.distance(policy_of(world, policy), table.sequence().detach().exp()) < 2 * CLOSE


# --------------------------------------------------------------------------- estimators and best of n


def test_kl_estimates_of_whole_responses_against_the_enumerated_kl_and_its_gradient(world):
    """k1 and k3 average to the KL; as a loss only k2 has its gradient; in the reward k1 has it."""
    kl_estimate = train_grpo.kl_estimate
    policy, ref = copy_of(world.ref), world.sequence(world.ref)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    parameters = list(policy.parameters())

    def gradient(value):
        parts = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([p.flatten() for p in parts if p is not None])

    logp = world.sequence(policy)
    p = logp.detach().exp()
    exact = (logp.exp() * (logp - ref)).sum()
    means = {k: (p * kl_estimate(logp, ref, k)).sum() for k in ("k1", "k2", "k3")}
    assert exact > 0.01
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    true = gradient((world.sequence(policy).exp() * (world.sequence(policy) - ref)).sum())
    as_loss = {k: gradient((p * kl_estimate(world.sequence(policy), ref, k)).sum()) for k in means}
    torch.testing.assert_close(as_loss["k1"], torch.zeros_like(true), rtol=0, atol=1e-12)
    torch.testing.assert_close(as_loss["k2"], true)
    assert (as_loss["k3"] - true).norm() > 0.01 * true.norm()
    in_reward = gradient((p * (p.log() - ref) * world.sequence(policy)).sum())
    torch.testing.assert_close(in_reward, true)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_of_the_sampler_has_the_enumerated_distribution(world, n):
    """P(best = y) = F(r_y)^n − F(just below r_y)^n, F the distribution of the reward under the policy."""
    p, trials = policy_of(world, world.ref).view(2, -1)[0], 4000
    reward = world.reward.view(2, -1)[0]
    below = (p * (reward < reward[:, None])).sum(1)
    exact = (below + p) ** n - below**n
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0))
    kl = (exact * (exact.log() - p.log())).nansum()
    assert kl <= math.log(n) - (n - 1) / n + 1e-12  # a bound

    prompts, lengths = torch.zeros(trials * n, 1, dtype=torch.long), torch.ones(trials * n, dtype=torch.long)
    rollout = generate(world.ref, prompts, lengths, LONGEST, END, END, seed=n)
    number = {y: k for k, y in enumerate(world.said)}
    drawn = torch.tensor([number[tuple(y)] for y in rollout.responses()]).view(trials, n)
    best = drawn.gather(1, reward[drawn].argmax(1, keepdim=True)).squeeze(1)
    found = torch.bincount(best, minlength=15) / trials
    error = (exact * (1 - exact) / trials).sqrt()
    assert ((found - exact).abs() < 4.5 * error + 1e-3).all()


def test_the_expected_group_gradient_is_that_of_the_enumerated_objective(world):
    """Over all groups of two: rloo's expected gradient is that of J; dr_grpo's is (G − 1)/G of it."""
    policy, ref = copy_of(world.ref), world.sequence(world.ref)
    parameters = list(policy.parameters())
    logp = world.sequence(policy)
    score = world.reward - BETA * (logp.detach() - ref)
    exact = torch.autograd.grad((logp.exp() * score).sum(), parameters, allow_unused=True)
    p = logp.detach().exp()
    i, j = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    i, j = (k[world.x[i] == world.x[j]] for k in (i, j))
    rows = torch.stack((i, j), 1).flatten()  # every group of two, its members next to each other
    for kind, share in (("rloo", 1.0), ("dr_grpo", 0.5)):
        old, mask = world.logp(policy).detach(), world.mask
        advantages = train_grpo.group_advantages(score[rows], 2, kind)
        loss, _ = train_grpo.policy_loss(
            world.logp(policy)[rows], old[rows], advantages, mask[rows], kind, 0.2, 0.2
        )
        per_token = 1 / mask[rows].sum(1, keepdim=True) if kind == "rloo" else 1.0
        weights = (p[i] * p[j]).repeat_interleave(2)[:, None] * per_token / 2
        found = torch.autograd.grad(
            masked_sum(loss * weights, mask[rows]).sum(), parameters, allow_unused=True
        )
        for a, b in zip(exact, found):
            if a is not None:
                torch.testing.assert_close(-b, share * a, rtol=1e-6, atol=1e-10)
