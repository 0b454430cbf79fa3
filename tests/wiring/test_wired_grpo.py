"""What train_grpo.main wires up, against GRPO by its formulas (wires.py)."""

import numpy as np
import pytest
import torch
import wires
from runs import models, steps, write_lines
from wires import asked, assert_close, entropies, logprobs, policy_at, spy

import train_grpo
from nanoalign import UserError
from nanoalign.checkpoint import load
from nanoalign.run import Run

OFF = {  # every flag that has a say in what is computed, off its default
    "beta": 0.3, "group_size": 3, "clip_low": 0.04, "clip_high": 0.07, "steps": 3, "batch_size": 9,
    "epochs": 2, "minibatch": 6, "micro_batch": 3, "missing_eos_score": -0.6, "max_new_tokens": 5,
    "temperature": 0.7, "lr": 0.01, "warmup": 2, "weight_decay": 0.3,
    "clip": 0.4, "seed": 5, "eval_every": 2, "eval_prompts": 3, "save_every": 2, "device": "cpu:0",
}  # fmt: skip

ASKED = [*asked(4), wires.prompt_of(35), wires.prompt_of(36)]  # the last leaves no room


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "init": f"{tiny}/policy.pt", "reference": f"{tiny}/reference.pt", "watch": "length",
        "reward": f"{tiny}/rm.pt - 0.05*length", "prompts": write_lines(tmp_path / "asked.jsonl", ASKED),
        "eval_data": write_lines(tmp_path / "held.jsonl", asked(4, first=50)),
    }  # fmt: skip
    files["doctor"] = wires.write_doctor(tmp_path)
    return train_grpo.Config(**files, **OFF, out=str(tmp_path / "grpo.pt"))


def estimate(logp, ref_logp, kind):
    """The k's of Schulman (2020), r = π_ref/π."""
    r = (ref_logp - logp).exp()
    return {"k1": -r.log(), "k2": r.log().square() / 2, "k3": r - 1 - r.log()}[kind]


def by_hand(config, rollouts, batches, rewards, policy, ref):
    """GRPO on rollouts and minibatches that a run has drawn → what it must have logged, a dict a step."""
    T, G, low, high = config.temperature, config.group_size, config.clip_low, config.clip_high
    trainer, logged = wires.Trainer(policy, config, eps=1e-5), []
    for step, (drawn, batch, scores) in enumerate(zip(rollouts, batches, rewards)):
        ids, mask, B = drawn.ids, drawn.mask, len(drawn.ids)
        with torch.no_grad():
            old, ref_logp = (logprobs(model, ids, mask, T) for model in (policy, ref))
            entropy = entropies(policy, ids, mask, T)
        score = torch.where(drawn.ended, scores, config.missing_eos_score).double()
        kl = (old - ref_logp).sum(1)
        worth = (score - config.beta * kl if config.kl == "reward" else score).view(-1, G)
        A = torch.stack([own - own.mean() for own in worth])
        if config.kind == "rloo":
            A = torch.stack([own - (own.sum() - own) / (G - 1) for own in worth])
        elif config.kind in ("grpo", "dapo"):
            spread = score.view(-1, G).std(1)
            some = spread[spread > 1e-9]
            spread[spread <= 1e-9] = some.mean() if len(some) else 1.0
            A = A / (spread[:, None] + 1e-4)
        A = A.flatten()
        row = {
            "score": score.mean(), "kl": kl.mean(), "entropy": entropy.sum() / mask.sum(),
            "kl_error": wires.clustered(kl, [i // G for i in range(B)]),
            "ended": drawn.ended.double().mean(), "length": mask.sum() / B,
            "at_limit": (mask.sum(1) >= config.max_new_tokens).double().mean(),
            "equal_groups": np.mean([len(set(own.tolist())) == 1 for own in score.view(-1, G)]),
        }  # fmt: skip
        sums, lr = {}, wires.schedule(step, config, config.steps)
        for pieces in batch.steps:
            rows = torch.from_numpy(np.concatenate(pieces))
            m, a, length = mask[rows], A[rows, None], mask[rows].sum(1, keepdim=True)
            logp = logprobs(policy, ids[rows], m, T)
            log_ratio = logp - old[rows]
            if config.kind == "rloo":
                log_ratio = log_ratio.sum(1, keepdim=True) * m
            ratio, n = log_ratio.exp(), len(rows)
            weight = {"grpo": m / (n * length), "rloo": m / (n * length), "dapo": m / m.sum(),
                      "dr_grpo": m / (n * config.max_new_tokens)}[config.kind]  # fmt: skip
            gain = torch.minimum(a * ratio, a * ratio.clamp(1 - low, 1 + high))
            kl_loss = torch.zeros(())
            if config.kl != "reward":
                kl_loss = (weight * estimate(logp, ref_logp[rows], config.kl)).sum()
            loss, share = config.beta * kl_loss - (weight * gain).sum(), weight / weight.sum()
            beyond = torch.where(a > 0, ratio > 1 + high, ratio < 1 - low) & (a != 0)
            found = {
                "loss": loss, "kl_loss": kl_loss, "ratio": (share * ratio).sum(),
                "approxkl": (share * (logp - old[rows]).square()).sum() / 2,
                "clip_fraction": (share * beyond).sum(),
            }  # fmt: skip
            sums = {name: sums.get(name, 0) + value.item() for name, value in found.items()}
            norm = trainer.step(loss, lr)
        means = {name: total / len(batch.steps) for name, total in sums.items()}
        logged.append({**row, **means, "lr": lr, "grad_norm": norm})
    return logged


@pytest.mark.parametrize(
    "kind, kl", [("dapo", "reward"), ("dr_grpo", "reward"), ("rloo", "reward"), ("grpo", "k3")]
)
def test_grpo_is_its_formulas_from_rollout_to_weights_and_log(double, config, monkeypatch, capsys, kind, kl):
    config.kind, config.kl = kind, kl
    seen = wires.watch_all(monkeypatch, train_grpo)
    packed = spy(monkeypatch, train_grpo, "packed_hidden")
    updates, check = [], Run.must_be_on_policy
    monkeypatch.setattr(Run, "must_be_on_policy", lambda run, *a: updates.append(run.count) or check(run, *a))
    train_grpo.main(config)
    out = capsys.readouterr().out
    assert updates == [0] and out.count("step-0 check: ratio 1") == 1

    policy, ref = policy_at(config.init), policy_at(config.reference)
    rollouts, scores = wires.assert_sampled(config, seen)
    wires.assert_batches(config, seen, group=3)
    expected = by_hand(config, rollouts, seen["batches"], scores, policy, ref)
    found = steps(config.out)
    assert len(found) == len(expected) == 3
    for row, due in zip(found, expected):
        assert_close(row, due)
        assert row["ratio_error"] < 1e-9
    assert any(row["clip_fraction"] > 0 for row in found) and any(0 < row["ended"] < 1 for row in found)

    start = policy_at(config.init)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_unmoved(seen["load_reference"][0].result, policy_at(config.reference))

    assert packed and all(
        call.sizes == [3] * (len(call.ids) // 3) for call in packed
    )  # prompts are read once
    assert out.count("ratio 1, off by at most") == 1 and out.count("doctor: seen") == 3
    assert out.count("\nheld out ") == 1  # the table of all looks
    wires.assert_counted(config, found, seen)
    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("grpo", True, 3)
    assert models(config.out) == ["policy", "reference", config.reward.split()[0]]
    shown = next(line for line in out.splitlines() if ": step " in line)
    assert all(f" {name} " in shown for name in train_grpo.SHOWN) and " entropy " not in shown
    order = seen["BatchOrder"][0]
    assert (order.batch_size, order.seed, order.pool) == (3, 5, 1)
    assert order.lengths == [wires.prompt_length(row) for row in ASKED[:-1]]


def test_grpo_is_watched_on_held_out_prompts(double, config, monkeypatch):
    wires.assert_watched(monkeypatch, train_grpo, config)


def test_grpo_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_grpo, config, tmp_path, step=5)


def test_grpo_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init", "reference", "reward")
    others = {"init": f"{tiny}/reference.pt", "reference": f"{tiny}/policy.pt", "reward": f"{tiny}/critic.pt"}
    others["prompts"] = write_lines(tmp_path / "others.jsonl", asked(5, first=1))
    wires.assert_made_from(monkeypatch, train_grpo, config, **others)
    wires.assert_prepared(monkeypatch, train_grpo, config, "GPT", "GPT", "GPT")


def test_grpo_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch, train_grpo, config, ("lab.train_grpo_steps", {"reward": f"prm-steps:{tiny}/prm.pt"}),
        ("--group-size", {"group_size": 1}), ("multiples", {"minibatch": 4}), ("--kl", {"kl": "k4"}),
        ("chat model", {"init": f"{tiny}/base.pt"}),
    )  # fmt: skip


def test_grpo_starts_at_its_reference_and_from_the_log_probs_of_the_rollout_or_not_at_all(
    config, monkeypatch
):
    own = wires.replaced(config, reference="", steps=1)
    train_grpo.main(own)
    assert steps(own.out)[0]["kl"] == pytest.approx(0, abs=1e-5)
    original = train_grpo.token_logprobs

    def token_logprobs(*args, **options):
        found = original(*args, **options)
        return 1.1 * found if torch.is_grad_enabled() else found

    monkeypatch.setattr(train_grpo, "token_logprobs", token_logprobs)
    with pytest.raises(UserError, match="ratio must start at 1"):
        train_grpo.main(own)
