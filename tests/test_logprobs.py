"""Log-probs of sequences: the naive definition, the one shift against a plain loop, and what masks hide."""

import pytest
import torch
from test_kernels import assert_close
from torch import Tensor

import train_grpo
import train_orpo
import train_ppo
from nanoalign import logprobs
from nanoalign.kernels import linear_logprobs
from nanoalign.logprobs import masked_mean, masked_sum, naive_logprobs, token_logprobs, token_losses, within
from nanoalign.model import GPT, GPTConfig

PAD = 36

# ---- whole sequences: the one shift there is


def tiny(context: int = 16, seed: int = 0) -> GPT:
    """A float64 model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(PAD + 1, context, layers=2, width=16, heads=2, mlp_width=16)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(PAD, shape, generator=torch.Generator().manual_seed(2))


def by_hand(model, row: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token by token, from the logits that follow each prefix."""
    logp, entropy = (torch.zeros(len(row), dtype=torch.float64) for _ in range(2))
    for t in range(1, len(row)):
        log_p = (model(row[None, :t])[0, -1].detach() / temperature).log_softmax(-1)
        logp[t], entropy[t] = log_p[row[t]], -(log_p.exp() * log_p).sum()
    return logp, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@torch.no_grad()
def test_token_logprobs_equal_a_loop_over_prefixes(temperature):
    model, ids = tiny(), random_ids(3, 9)
    logp, entropy = token_logprobs(model, ids, temperature=temperature, entropy=True)
    assert (logp[:, 0] == 0).all() and (entropy[:, 0] == 0).all()
    for b, row in enumerate(ids):
        for ours, theirs in zip((logp[b], entropy[b]), by_hand(model, row, temperature)):
            assert_close(ours, theirs, torch.float64, 1000)
    torch.testing.assert_close(token_logprobs(model, ids, temperature=temperature), logp)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_token_logprobs_and_their_gradients_equal_the_naive_definition(temperature, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # rounding cannot hide a difference
    model, ids = tiny(), random_ids(4, 12)
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(3)
    weights = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    for mask in (None, torch.rand(4, 12, generator=generator) < 0.5):
        naive = naive_logprobs(model, ids, temperature) * (1 if mask is None else mask)
        logp = token_logprobs(model, ids, mask, temperature)
        assert_close(logp, naive, torch.float64, 1000)
        assert (logp[:, 0] == 0).all() and (logp[:, 1:] < 0).any()
        ours, theirs = (torch.autograd.grad((weights * x).sum(), parameters) for x in (logp, naive))
        for a, b in zip(ours, theirs):
            assert_close(a, b, torch.float64, 1000)


@torch.no_grad()
def test_only_scored_positions_go_through_the_head(monkeypatch):
    model, ids = tiny(), random_ids(3, 9)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:7] = mask[2, [1, 8]] = mask[1, 0] = True  # row 1: only the first token, which nothing predicts
    before, everything, counts = mask.clone(), token_logprobs(model, ids), []

    def counting(hidden, *args):
        counts.append(len(hidden))
        return linear_logprobs(hidden, *args)

    monkeypatch.setattr(logprobs, "linear_logprobs", counting)
    logp = token_logprobs(model, ids, mask)
    assert counts == [5] and torch.equal(mask, before)
    mask[:, 0] = False
    assert torch.equal(logp != 0, mask)
    assert_close(logp[mask], everything[mask], torch.float64)


def test_a_loss_of_scored_tokens_equals_the_same_loss_of_their_logprobs():
    model, ids = tiny(), random_ids(3, 12)
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(4)) < 0.5
    weights = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logp = token_logprobs(model, ids, mask, 0.7)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad((weights * logp.exp())[mask].sum(), parameters)
    total, own = token_losses(model, ids, mask, lambda logp, w: w * logp.exp(), (weights,), 0.7)
    torch.testing.assert_close(own, logp.detach())
    first = mask[:, 0] * weights[:, 0]  # the first token has no log-prob: it is no part of the loss
    torch.testing.assert_close(total, (weights * logp.exp())[mask].sum() - first.sum())
    for ours, theirs in zip(torch.autograd.grad(total, parameters), wanted):
        torch.testing.assert_close(ours, theirs)


def test_padding_never_changes_a_sequence_logprob_or_a_gradient():
    model, content = tiny(), random_ids(2, 6)
    content[0, 3] = PAD  # an honest token that happens to be the pad id is scored like any other
    mask = torch.tensor([[False, False, True, True, True, True], [False, True, True, True, False, False]])

    def run(ids, mask):
        logp = token_logprobs(model, ids, mask)
        total = masked_sum(logp, mask)
        return total, masked_mean(logp, mask), *torch.autograd.grad(total.sum(), list(model.parameters()))

    expected = run(content, mask)
    assert_close(expected[0][0], by_hand(model, content[0])[0][2:].sum(), torch.float64, 1000)
    assert_close(expected[0][1], by_hand(model, content[1, :4])[0][1:].sum(), torch.float64, 1000)
    for pad_id in (PAD, 0, int(content[0, 5])):
        for amount in (0, 1, 10):
            padded = torch.full((2, 6 + amount), pad_id)
            padded[0, :6], padded[1, :4] = content[0], content[1, :4]
            wide = torch.cat((mask, torch.zeros(2, amount, dtype=torch.bool)), dim=1)
            for ours, theirs in zip(run(padded, wide), expected):
                assert_close(ours, theirs, torch.float64, 1000)


def test_a_batch_without_scored_tokens_is_all_zeros_and_can_be_backpropagated():
    model, ids = tiny(), random_ids(2, 5)
    logp = token_logprobs(model, ids, torch.zeros(2, 5, dtype=torch.bool))
    assert logp.shape == (2, 5) and (logp == 0).all()
    logp.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


# ---- masked reductions


def test_masked_sum_and_mean_ignore_everything_outside_the_mask():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1.0, 3.0, inf], [2.0, nan, -inf, 5.0], [nan, nan, nan, nan]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert masked_sum(x, mask).tolist() == [4, 7, 0]
    assert masked_mean(x, mask).tolist() == [2, 3.5, 0]


def test_nothing_outside_the_mask_gets_a_gradient():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]], requires_grad=True)
    masked_mean(x, torch.eye(2).bool()).sum().backward()
    assert x.grad.tolist() == [[1, 0], [0, 1]]


# ---- kept within bounds


def test_what_is_kept_within_bounds_has_its_gradient_there_the_bounds_included():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -3.0, -2.0, -1.9, 0.0, 0.5, 0.6, inf, nan], requires_grad=True)
    kept = within(x, -2, 0.5)
    kept.sum().backward()
    assert kept.tolist()[:-1] == [-2, -2, -2, kept[3].item(), 0, 0.5, 0.5, 0.5] and kept[-1].isnan()
    assert x.grad.tolist()[:-1] == [0, 0, 1, 1, 1, 1, 0, 0]


def clamp_of_later_versions(x, low=-float("inf"), high=float("inf"), *, min=None, max=None):
    """Its gradient is 0 at the bounds, too."""
    low, high = low if min is None else min, high if max is None else max
    return torch.where(x <= low, low, torch.where(x >= high, high, x))


def test_the_losses_gradients_at_their_bounds_do_not_depend_on_the_version_of_torch(monkeypatch, double):
    monkeypatch.setattr(Tensor, "clamp", clamp_of_later_versions)
    mask, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)

    def slope(loss, at):
        x = torch.full((1, 1), at, requires_grad=True)
        loss(x).sum().backward()
        return x.grad.item()

    for a in (-3.0, 3.0):  # a ratio of 1, at both bounds of an ε of 0: d(−a·ratio) = −a
        given = zero, torch.full((1, 1), a), mask
        assert slope(lambda x, given=given: train_ppo.policy_loss(x, *given, 0.0), 0.0) == -a
        assert slope(lambda x, given=given: train_grpo.policy_loss(x, *given, "dapo", 0.0, 0.0)[0], 0.0) == -a
    for at in (-0.5, 0.5):  # a value at the bound of its old one, 0: d ½(v − 2)² = v − 2
        assert slope(lambda x: train_ppo.value_loss(x, zero, zero + 2, mask, 0.5), at) == at - 2
    for mean, due in [(-1e-6, 1e6), (-1.1e-6, 1e6 / 1.1), (-0.9e-6, 0.0)]:  # d log odds = 1 / (1 − p)
        assert slope(train_orpo.log_odds, mean) == pytest.approx(due, rel=1e-5)
