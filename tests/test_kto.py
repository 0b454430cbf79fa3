"""KTO against closed forms in numpy and a loop over mismatched pairs, one sequence at a time."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import held_out

import train_kto
from nanoalign import UserError
from nanoalign.checkpoint import load, save
from nanoalign.data import labelled_examples
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from train_kto import Config, balanced_weights, evaluate, kto_loss, mismatched, reference_point

TOKENIZER = get_tokenizer("world")
UP = torch.tensor([True, False, True, True, False])
R = torch.tensor([-31.0, -2.5, 0.0, 4.0, 17.0], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("z", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 1.0), (1.0, 6.75)])
def test_the_loss_is_its_closed_form_one_value_per_row(double, beta, z, weights):
    loss = kto_loss(R, UP, torch.tensor(z), beta, *weights)
    gain, pain = 1 - sigmoid(beta * (R.numpy() - z)), 1 - sigmoid(beta * (z - R.numpy()))
    expected = np.where(UP.numpy(), weights[0] * gain, weights[1] * pain)
    assert loss.shape == (5,)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_beta_is_a_tenth_and_the_weights_are_one_by_default():
    z = torch.tensor(0.3)
    assert torch.equal(kto_loss(R, UP, z), kto_loss(R, UP, z, 0.1, 1.0, 1.0))


@pytest.mark.parametrize("beta", [0.05, 0.1, 3.0])
def test_a_row_at_the_reference_point_costs_half_its_weight_whatever_beta_is(double, beta):
    """So z is in nats, like r: multiplied by beta once, not twice."""
    for z in (0.0, 2.5, 40.0):
        loss = kto_loss(torch.full((5,), z), UP, torch.tensor(z), beta, 1.5, 4.0)
        assert loss.tolist() == pytest.approx([0.75, 2.0, 0.75, 0.75, 2.0])


def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_reference_point(double):
    r, z = R.clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, UP, z, 0.3, 1.2, 0.8), r)
    kto_loss(r, UP, z, 0.3, 1.2, 0.8).sum().backward()
    assert z.grad is None
    value = sigmoid(0.3 * (R.numpy() - 1.5))
    slope = np.where(UP.numpy(), -1.2, 0.8) * 0.3 * value * (1 - value)
    np.testing.assert_allclose(r.grad, slope, rtol=1e-10)


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_label_only_has_a_finite_loss_and_gradient(label):
    r = R.clone().requires_grad_()
    loss = kto_loss(r, torch.full((5,), label), torch.tensor(0.5))
    loss.sum().backward()
    assert loss.isfinite().all() and r.grad.isfinite().all()
    assert ((r.grad < 0) if label else (r.grad > 0)).all()  # the likelier, the better; or the worse


@pytest.mark.parametrize("r, z", [(1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (3e38, 0.0), (-3e38, 0.0)])
def test_extreme_log_ratios_saturate_and_stay_finite(r, z):
    x = torch.full((2,), r, requires_grad=True)
    loss = kto_loss(x, torch.tensor([True, False]), torch.tensor(z), 1.0, 2.0, 3.0)
    loss.sum().backward()
    assert loss.tolist() == ([0.0, 3.0] if r > z else [2.0, 0.0])
    assert x.grad.isfinite().all()


# ------------------------------------------------------------------------------------ the default weights

COUNTS = [(n, m) for n in (1, 2, 3, 7, 10, 50, 90, 1000) for m in (1, 2, 3, 9, 10, 40, 50, 90, 999)]


@pytest.mark.parametrize("up, down", COUNTS)
def test_the_rule_gives_the_smallest_weights_that_bring_the_ratio_to_between_1_and_4_thirds(up, down):
    ratio = Fraction(up, down)
    if ratio < 1:
        due = (1 / ratio, 1)
    elif ratio > Fraction(4, 3):
        due = (1, ratio * Fraction(3, 4))
    else:
        due = (1, 1)  # nothing to do
    weights = balanced_weights(up, down)
    assert weights == pytest.approx([float(x) for x in due], rel=1e-12) and min(weights) == 1.0
    assert 1 - 1e-12 <= weights[0] * up / (weights[1] * down) <= 4 / 3 + 1e-12


def test_one_kind_only_is_not_weighed():
    assert balanced_weights(10, 0) == balanced_weights(0, 10) == (1.0, 1.0)
    assert balanced_weights(90, 10) == (1.0, 6.75) and balanced_weights(10, 90) == (9.0, 1.0)


# ------------------------------------------------------------------------------------ the reference point


@pytest.mark.parametrize("size", range(2, 10))
def test_mismatched_pairs_are_a_rotation_without_a_fixed_point(size):
    pairs = mismatched([f"x{i}" for i in range(size)], [f"y{i}" for i in range(size)])
    assert [x for x, _ in pairs] == [f"x{i}" for i in range(size)]
    offsets = {(int(y[1:]) - int(x[1:])) % size for x, y in pairs}
    assert len(offsets) == 1 and offsets != {0}


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_of_one_row_is_a_clear_error(size):
    with pytest.raises(UserError, match="--batch-size must be at least 2"):
        mismatched(["x"] * size, ["y"] * size)


ROWS = [  # of all lengths; the longest response does not fit behind the longest prompt
    {"prompt": [{"role": "user", "content": prompt}], "completion": completion, "label": label, "meta": {}}
    for prompt, completion, label in [
        ("Hi", "Hello! How can I help you?", True),
        ("What is the capital of France, and why do so many people ask for it?", "Paris.", True),
        ("What is 3 + 4 + 5?", "3 + 4 = 7\n7 + 5 = 12\nAnswer: 12", False),
        ("Is the sea blue?", "yes", False),
        ("Who are you?", "I am a small model, and I like to talk about the sea.", True),
    ]
]


def models():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # far from uniform, so that no two tokens are alike
        found.append(model)
    return found


def log_ratios_one_by_one(policy, ref, max_length):
    """Of prompt i joined to response i + 1, from the tokenizer and the plain logits."""
    values = []
    for i, row in enumerate(ROWS):
        prompt = TOKENIZER.prompt(row["prompt"]).tolist()
        response = TOKENIZER.response(ROWS[(i + 1) % len(ROWS)]["completion"]).tolist()
        ids = (prompt + response)[:max_length]
        logp, ref_logp = (m(torch.tensor([ids]))[0].log_softmax(-1).detach() for m in (policy, ref))
        values.append(
            sum((logp[t - 1, ids[t]] - ref_logp[t - 1, ids[t]]).item() for t in range(len(prompt), len(ids)))
        )
    return values


def point(policy, ref, max_length, micro_batch=0, batch=None):
    examples = batch or labelled_examples(ROWS, TOKENIZER, max_length)[0]
    config = Config(micro_batch=micro_batch)
    return reference_point(policy, ref, examples, TOKENIZER, config, max_length, "cpu")


@pytest.mark.parametrize("max_length", [64, 26])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_the_reference_point_is_the_mean_over_rebuilt_pairs_clamped_after(double, max_length, micro_batch):
    policy, ref = models()
    values = log_ratios_one_by_one(policy, ref, max_length)
    if sum(values) < 0:
        policy, ref, values = ref, policy, [-value for value in values]
    mean, clamped_first = np.mean(values), np.mean(np.maximum(values, 0))
    assert min(values) < 0 < mean < clamped_first - 0.1  # so the order matters here
    z = point(policy, ref, max_length, micro_batch)
    assert z.shape == () and not z.requires_grad
    assert z.item() == pytest.approx(mean, rel=1e-9)
    assert point(ref, policy, max_length, micro_batch).item() == 0.0  # the mean is negative


def test_the_reference_point_depends_on_lengths_that_truncation_cuts():
    """Otherwise the case above would not test it."""
    prompts, responses = (
        [len(f) for f in side]
        for side in (
            [TOKENIZER.prompt(row["prompt"]) for row in ROWS],
            [TOKENIZER.response(row["completion"]) for row in ROWS],
        )
    )
    joined = [p + responses[(i + 1) % len(ROWS)] for i, p in enumerate(prompts)]
    assert max(prompts) < 26 < max(joined) and min(joined) < 26 and max(joined) <= 64


def test_a_policy_equal_to_its_reference_has_a_reference_point_of_0(double):
    policy, _ = models()
    assert abs(point(policy, policy, 64).item()) < 1e-12


def test_the_reference_point_of_a_single_row_is_a_clear_error():
    with pytest.raises(UserError, match="--batch-size"):
        point(*models(), 64, batch=labelled_examples(ROWS[:1], TOKENIZER, 64)[0])


def test_held_out_accuracy_compares_every_desirable_row_with_every_undesirable_one(double):
    policy, ref = models()
    examples, rows = labelled_examples(ROWS, TOKENIZER, 64)
    labels = torch.tensor([row["label"] for row in rows])
    prompts = [TOKENIZER.prompt(row["prompt"]) for row in rows[:2]]
    rewards = []
    for ids, mask in examples:
        logp, ref_logp = (m(torch.tensor(ids)[None])[0].log_softmax(-1).detach() for m in (policy, ref))
        picked = [(logp - ref_logp)[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
        rewards.append(0.2 * sum(picked))
    up = [r for r, label in zip(rewards, labels) if label]
    down = [r for r, label in zip(rewards, labels) if not label]
    config = Config(beta=0.2, batch_size=2)
    result = evaluate(policy, ref, examples, labels, prompts, TOKENIZER, config, "cpu")
    assert result["auc"] == pytest.approx(np.mean([a > b for a in up for b in down]))
    assert result["margin"] == pytest.approx(np.mean(up) - np.mean(down))
    equal = evaluate(ref, ref, examples, labels, prompts, TOKENIZER, config, "cpu")
    assert equal == pytest.approx({"auc": 0.5, "margin": 0.0, "kl": 0.0}, abs=1e-4)


# ------------------------------------------------------------------------------------------------ whole steps


@pytest.fixture
def trained(tmp_path):
    """trained(labels, **flags) → the metrics of each step of a small run, and its weights."""

    def run(labels, **flags):
        start, data, out = (str(tmp_path / name) for name in ("sft.pt", "rows.jsonl", "kto.pt"))
        save(start, models()[0], stage="sft", tokenizer=TOKENIZER, config=Config(), step=0)
        write_rows(data, [{**row, "label": label} for row, label in zip(ROWS, labels)])
        files = {"init": start, "data": data, "eval_data": data, "out": out, "device": "cpu"}
        usual = {"steps": 3, "batch_size": 5, "lr": 3e-2, "warmup": 0, "clip": 0.0, "log_every": 1}
        train_kto.main(Config(max_length=48, **files, **{**usual, **flags}))
        lines = map(json.loads, Path(out).with_suffix(".metrics.jsonl").read_text().splitlines())
        return [row for row in lines if "loss" in row], load(out)["model"]

    return run


def test_the_reference_point_is_that_of_the_whole_step_not_of_a_micro_batch(double, trained, monkeypatch):
    asked, used = [], []

    def recording_point(policy, ref, batch, *rest):
        asked.append(len(batch))
        return reference_point(policy, ref, batch, *rest)

    def recording_loss(log_ratio, desirable, z, *rest):
        used.append(z.item())
        return kto_loss(log_ratio, desirable, z, *rest)

    monkeypatch.setattr(train_kto, "reference_point", recording_point)
    monkeypatch.setattr(train_kto, "kto_loss", recording_loss)
    labels = [True, True, True, True, False]
    whole, weights = trained(labels)
    assert whole[-1]["z"] > 0.1  # by then the policy has moved
    for micro_batch, parts in ((1, 5), (2, 3)):
        used.clear()
        pieces, same = trained(labels, micro_batch=micro_batch)
        for a, b in zip(whole, pieces):
            assert (b["z"], b["loss"]) == pytest.approx((a["z"], a["loss"]), rel=1e-5, abs=1e-9)
        assert used == pytest.approx([row["z"] for row in whole for _ in range(parts)], rel=1e-4, abs=1e-9)
        assert all(torch.allclose(weights[name], same[name], atol=1e-6) for name in weights)
    assert asked == [5] * 9


@pytest.mark.parametrize("label", [True, False])
def test_a_run_on_one_label_only_starts_at_a_half_and_moves_its_reward_the_right_way(trained, label, capsys):
    steps, _ = trained([label] * 5)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5) and steps[0]["z"] == pytest.approx(0, abs=1e-4)
    rewards = [step["reward_chosen" if label else "reward_rejected"] for step in steps]
    assert all(math.isfinite(step[k]) for step in steps for k in ("loss", "z", "grad_norm"))
    assert (rewards[-1] > 0.01) if label else (rewards[-1] < -0.01)
    other = "rejected" if label else "chosen"
    assert not any(f"{name}_{other}" in step for step in steps for name in ("reward", "logp"))
    said = f"warning: all 5 are {'desirable' if label else 'undesirable'}"
    assert said in capsys.readouterr().out


def test_a_run_on_unbalanced_labels_starts_at_half_the_mean_of_the_rules_weights(trained):
    steps, _ = trained([False, True, False, False, False])
    assert steps[0]["loss"] == pytest.approx((4.0 * 1 + 1.0 * 4) / 5 / 2, abs=1e-4)


def test_a_step_without_rows_of_a_label_logs_no_values_of_it(trained):
    steps, _ = trained([False, True, False, False, False], batch_size=2)
    for step in steps:
        names = {"reward_chosen", "logp_chosen"} if step["desirable"] else set()
        names |= {"reward_rejected", "logp_rejected"} if step["desirable"] < 1 else set()
        assert {name for name in step if name.startswith(("reward_", "logp_"))} == names
    assert {step["desirable"] for step in steps} >= {0.0}


def test_soft_labels_of_pairs_are_said_to_be_taken_for_certain(job, pairs, tmp_path, capsys):
    rows = [{**row, "probability": 0.8 if i < 30 else 1.0} for i, row in enumerate(read_rows(pairs, "pairs"))]
    write_rows(f"{tmp_path}/soft.jsonl", rows)
    script, config = job(
        "kto", data=f"{tmp_path}/soft.jsonl", eval_data=held_out(pairs, tmp_path), eval_every=99, steps=1
    )
    script.main(config)
    assert f'60 of {2 * len(rows):,} labels have a "probability"' in capsys.readouterr().out


def test_pairs_are_learned_from_as_a_thumb_up_and_a_thumb_down(tmp_path):
    path = str(tmp_path / "pairs.jsonl")
    write_rows(path, [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}])
    examples, rows = labelled_examples(read_rows(path, "labelled"), TOKENIZER, 64)
    assert [TOKENIZER.decode_response(ids[mask]) for ids, mask in examples] == ["Hello.", "No."]
    assert [row["label"] for row in rows] == [True, False]
