"""GRPO on rewards of steps: the advantages against a loop, then a whole iteration."""

import json

import numpy as np
import pytest
import torch

import train_prm
from lab import train_grpo_steps
from lab.train_grpo_steps import Config, step_advantages
from nanoalign import UserError
from nanoalign.checkpoint import load
from nanoalign.logprobs import masked_sum
from nanoalign.rewards import on_last_token
from nanoalign.tokenizer import get_tokenizer
from train_grpo import group_advantages

TOKENIZER = get_tokenizer("world")


def test_step_advantages_are_those_of_a_loop_over_groups_steps_and_tokens():
    torch.manual_seed(0)
    ends = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    rewards = torch.rand(4, 5).masked_fill(~ends, 0)
    for kind in ("grpo", "dr_grpo", "dapo"):
        found = step_advantages(rewards, ends, 2, kind)
        for g in (0, 2):
            values = [rewards[b, t].item() for b in (g, g + 1) for t in range(5) if ends[b, t]]
            mean = np.mean(values)
            scale = 1.0 if kind == "dr_grpo" else np.std(values, ddof=1) + 1e-4
            for b in (g, g + 1):
                for t in range(5):
                    due = sum((rewards[b, s].item() - mean) / scale for s in range(t, 5) if ends[b, s])
                    assert found[b, t].item() == pytest.approx(due, abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_one_step_a_response_makes_process_and_outcome_advantages_equal(kind):
    scores = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.0, 1.0])
    mask = torch.arange(5) < torch.tensor([2, 5, 3, 1, 4, 5])[:, None]
    dense = on_last_token(scores, mask)
    found = step_advantages(dense, on_last_token(torch.ones(6), mask) > 0, 3, kind)
    due = group_advantages(scores, 3, kind)
    torch.testing.assert_close(found.masked_fill(~mask, 0), (due[:, None] * mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_where_the_rewards_of_all_steps_are_equal_the_price_of_kl_keeps_its_size(kind):
    mask = torch.arange(5) < torch.tensor([2, 5, 3, 4])[:, None]
    last = on_last_token(torch.ones(4), mask)
    rewards, price = 0.1 * last, on_last_token(torch.tensor([0.3, -0.2, 0.5, 0.1]), mask)
    due = step_advantages(rewards, last > 0, 2, kind, price)
    torch.testing.assert_close(
        due, step_advantages(0 * rewards, last > 0, 2, "dr_grpo", price), rtol=2e-4, atol=0
    )
    torch.testing.assert_close(step_advantages(rewards, last > 0, 2, kind, price / 100), due / 100)
    half = rewards + torch.tensor([0.0, 0.0, 0.4, 0.0])[:, None] * last  # the second group's have a spread:
    scale = 0.4 / 2**0.5 + 1e-4  # of two numbers 0.4 apart; the first group takes it, too
    torch.testing.assert_close(
        step_advantages(half, last > 0, 2, kind, price)[:2], due[:2] * (1 + 1e-4) / scale
    )


def test_the_steps_of_two_groups_never_mix():
    torch.manual_seed(0)
    ends = torch.rand(6, 7) < 0.4
    ends[:, -1] = True
    rewards = torch.rand(6, 7).masked_fill(~ends, 0)
    found = step_advantages(rewards, ends, 3)
    for half in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(step_advantages(rewards[half], ends[half], 3), found[half])
    first = masked_sum(found, ends.cumsum(1) == 0)  # before a response's first step all of it is ahead
    assert first.isfinite().all() and not found.isnan().any()


# ---------------------------------------------------------------------------------------- whole iterations


@pytest.fixture
def trained(world, sft, brief, steps_file, tmp_path, monkeypatch):
    """trained(**flags) → the metrics of an iteration on a process model's reward, what advantages it was
    given, and what steps they were of."""
    prm, seen = str(tmp_path / "prm.pt"), []
    train_prm.main(train_prm.Config(init=sft, data=steps_file, out=prm, batch_size=16, epochs=0.2))
    keep = lambda *a: seen.append((*a, step_advantages(*a))) or seen[-1][-1]  # noqa: E731
    monkeypatch.setattr(train_grpo_steps, "step_advantages", keep)

    def run(**flags):
        out = str(tmp_path / "x.pt")
        defaults = {"init": brief, "reward": f"prm-steps:{prm}", "prompts": f"{world}/problems.jsonl"}
        defaults |= {"eval_data": f"{world}/problems_held_out.jsonl", "group_size": 4, "batch_size": 16}
        defaults |= {"minibatch": 8, "max_new_tokens": 24, "eval_prompts": 2, "steps": 1, "warmup": 0}
        train_grpo_steps.main(Config(**{**defaults, "out": out, "device": "cpu", **flags}))
        lines = map(json.loads, (tmp_path / "x.metrics.jsonl").read_text().splitlines())
        return [row for row in lines if "loss" in row], seen, load(out)

    return run


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_an_iteration_is_paid_by_steps_less_the_kl_on_the_last(trained, kind, capsys):
    rows, seen, saved = trained(kind=kind, steps=2, beta=0.5, missing_eos_score=-1.0, lr=1e-2)
    assert "step-0 check: ratio 1" in capsys.readouterr().out and saved["stage"] == "grpo"
    assert saved["config"]["kind"] == kind and len(rows) == len(seen) == 2
    for row, (score, ends, size, used, price, advantages) in zip(rows, seen):
        worth = score - price
        assert (size, used) == (4, kind) and advantages.shape == worth.shape == ends.shape
        paid = worth.sum().item() / 16  # what is not at the end of a step is worth nothing
        assert paid == pytest.approx(row["score"] - 0.5 * row["kl"], rel=1e-4, abs=1e-5)
        assert not worth[~ends].any() and ends.any(1).all()
        assert row["grad_norm"] > 0 and row["kl_loss"] == 0
    assert rows[0]["kl"] == 0 != rows[1]["kl"]


def test_pieces_of_a_minibatch_change_nothing(double, trained):
    flags = {"epochs": 1, "kl": "k3", "minibatch": 16}
    [whole], _, first = trained(**flags)
    for limits in ({"micro_batch": 3}, {"micro_tokens": 150}):
        [pieces], _, same = trained(**limits, **flags)
        for name in ("loss", "grad_norm", "approxkl", "ratio", "entropy", "score"):
            assert pieces[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-9), name
        assert all(torch.allclose(v, same["model"][name], atol=1e-6) for name, v in first["model"].items())


@pytest.mark.parametrize(
    "flags, names",
    [
        ({"kind": "rloo"}, "prm-min: in place of prm-steps:"),
        ({"reward": "answer"}, "train_grpo.py"),
        ({"group_size": 1}, "--group-size must be at least 2"),
    ],
)
def test_flags_that_do_not_go_together_are_a_sentence(flags, names):
    with pytest.raises(UserError, match=names):
        train_grpo_steps.main(Config(**flags))
