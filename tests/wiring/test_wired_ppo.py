"""What train_ppo.main wires up, against PPO by its formulas (wires.py)."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wires
from runs import models, steps, write_lines
from torch import nn
from wires import asked, assert_close, entropies, logprobs, policy_at, spy

import train_ppo
from nanoalign import UserError
from nanoalign.checkpoint import load, load_scalar
from nanoalign.lora import adapters
from nanoalign.run import Run

OFF = {  # every flag that has a say in what is computed, off its default
    "beta": 0.3, "gamma": 0.9, "lam": 0.7, "clip_ratio": 0.05, "clip_value": 0.04, "vf_coef": 0.6,
    "kl_target": 0.12, "kl_horizon": 9.0, "steps": 3, "batch_size": 6, "epochs": 2, "minibatch": 4,
    "micro_batch": 3, "missing_eos_score": -0.6, "max_new_tokens": 7, "temperature": 0.7,
    "lr": 0.01, "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 2,
    "eval_prompts": 3, "save_every": 2, "device": "cpu:0",
}  # fmt: skip

ASKED = [*asked(8), wires.prompt_of(33), wires.prompt_of(34)]  # the last leaves no room


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "init": f"{tiny}/policy.pt", "reference": f"{tiny}/reference.pt", "critic": f"{tiny}/critic.pt",
        "reward": f"{tiny}/rm.pt - 0.05*length", "watch": "length",
        "prompts": write_lines(tmp_path / "asked.jsonl", ASKED),
        "eval_data": write_lines(tmp_path / "held.jsonl", asked(4, first=50)),
    }  # fmt: skip
    files["doctor"] = wires.write_doctor(tmp_path)
    return train_ppo.Config(**files, **OFF, out=str(tmp_path / "ppo.pt"))


def values(critic, ids, policy):
    """V_t (B, T), read at position t − 1."""
    read = critic(policy.hidden(ids) if isinstance(critic, nn.Linear) else ids)
    return F.pad(read[:, :-1], (1, 0))


def advantages_of(rewards, V, mask, gamma, lam):
    """GAE by its recursion, from a row's last token to its first."""
    found = torch.zeros_like(V)
    for b in range(len(V)):
        later = following = 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            delta = rewards[b, t] + gamma * following - V[b, t]
            found[b, t] = later = delta + gamma * lam * later
            following = V[b, t]
    return found


def by_hand(config, rollouts, batches, rewards, policy, ref, critic):
    """PPO on rollouts and minibatches that a run has drawn → what it must have logged, a dict a step."""
    T, eps, epsV, beta = config.temperature, config.clip_ratio, config.clip_value, config.beta
    trainer = wires.Trainer(nn.ModuleList((policy, critic)), config, eps=1e-5)
    logged = []
    for step, (drawn, batch, scores) in enumerate(zip(rollouts, batches, rewards)):
        ids, mask, B = drawn.ids, drawn.mask, len(drawn.ids)
        with torch.no_grad():
            old, ref_logp = (logprobs(model, ids, mask, T) for model in (policy, ref))
            V, entropy = values(critic, ids, policy) * mask, entropies(policy, ids, mask, T)
        kl = (old - ref_logp).sum(1)
        R, score = -beta * (old - ref_logp), torch.zeros(B)
        for b in range(B):
            last, own = mask[b].nonzero().max(), torch.zeros(mask.shape[1])
            if not drawn.ended[b]:
                own[last] = config.missing_eos_score
            elif scores.dim() == 2:  # one at every step's end
                own += scores[b]
            else:
                own[last] = scores[b]
            R[b], score[b] = R[b] + own, own.sum()
        A = advantages_of(R, V, mask, config.gamma, config.lam)
        G = (A + V) * mask
        spread = G[mask] - V[mask]
        row = {
            "score": score.mean(), "kl": kl.mean(), "beta": beta, "entropy": entropy.sum() / mask.sum(),
            "ended": drawn.ended.double().mean(), "length": mask.sum() / B, "kl_error": kl.std() / B**0.5,
            "at_limit": (mask.sum(1) >= config.max_new_tokens).double().mean(),
            "explained_variance": 1 - spread.var() / G[mask].var(),
        }  # fmt: skip
        A = (A - A[mask].mean()) / A[mask].std(correction=0)
        sums, highest, lr = {}, 0.0, wires.schedule(step, config, config.steps)
        for pieces in batch.steps:
            rows = torch.from_numpy(np.concatenate(pieces))
            m, a, v_old, g = (x[rows] for x in (mask, A, V, G))
            logp, v = logprobs(policy, ids[rows], m, T), values(critic, ids[rows], policy)
            ratio = (logp - old[rows]).exp()
            gain = torch.minimum(a * ratio, a * ratio.clamp(1 - eps, 1 + eps))
            near = v_old + (v - v_old).clamp(-epsV, epsV)
            error = torch.maximum((v - g).square(), (near - g).square())
            pg, vf = -gain[m].mean(), error[m].mean() / 2
            beyond = torch.where(a > 0, ratio > 1 + eps, ratio < 1 - eps) & (a != 0)
            found = {
                "loss": pg + config.vf_coef * vf, "policy_loss": pg, "value_loss": vf,
                "ratio": ratio[m].mean(), "approxkl": (logp - old[rows])[m].square().mean() / 2,
                "clip_fraction": beyond[m].double().mean(),
                "value_clip_fraction": ((v - v_old).abs() > epsV)[m].double().mean(),
            }  # fmt: skip
            sums = {name: sums.get(name, 0) + value.item() for name, value in found.items()}
            highest = max(highest, ratio[m].max().item())
            norm = trainer.step(found["loss"], lr)
        means = {name: total / len(batch.steps) for name, total in sums.items()}
        logged.append({**row, **means, "ratio_max": highest, "lr": lr, "grad_norm": norm})
        if config.kl_target:
            off = min(0.2, max(-0.2, row["kl"].item() / config.kl_target - 1))
            beta *= 1 + off * B / config.kl_horizon
    return logged


@pytest.mark.parametrize("shared", [False, True], ids=["critic", "head and dense reward"])
def test_ppo_is_its_formulas_from_rollout_to_weights_and_log(
    double, config, monkeypatch, capsys, tiny, shared
):
    if shared:
        config.shared_critic, config.kl_target = True, 0.0
        config.micro_batch, config.micro_tokens = 0, 50
        config.init, config.reward = f"{tiny}/solver.pt", f"prm-steps:{tiny}/prm.pt - 0.05*length"
    seen = wires.watch_all(monkeypatch, train_ppo)
    updates, check = [], Run.must_be_on_policy
    monkeypatch.setattr(Run, "must_be_on_policy", lambda run, *a: updates.append(run.count) or check(run, *a))
    train_ppo.main(config)
    out = capsys.readouterr().out
    assert updates == [0] and out.count("step-0 check: ratio 1") == 1

    policy, ref = policy_at(config.init), policy_at(config.reference)
    if shared:
        critic = nn.Linear(wires.SHAPE.width, 1)
        read = lambda hidden: F.linear(hidden, critic.weight, critic.bias).squeeze(-1)  # noqa: E731
        critic.forward = read
        critic_start = copy.deepcopy(critic)
    else:
        critic = load_scalar(config.critic)[0]
        critic_start = copy.deepcopy(critic)
    for weight in (critic if shared else critic.score).parameters():
        nn.init.zeros_(weight)

    rollouts, scores = wires.assert_sampled(config, seen)
    if not shared:
        wires.assert_batches(config, seen)
    expected = by_hand(config, rollouts, seen["batches"], scores, policy, ref, critic)
    found = steps(config.out)
    assert len(found) == len(expected) == 3
    for row, due in zip(found, expected):
        assert_close(row, due)
        assert row["ratio_error"] < 1e-9
    assert any(row["clip_fraction"] > 0 for row in found) and any(
        row["value_clip_fraction"] > 0 for row in found
    )
    assert any(0 < row["ended"] < 1 for row in found)

    # what moved, and what did not
    start = policy_at(config.init)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    critic_after = seen["load_critic"][0].result
    for (name, weight), due in zip(critic_after.named_parameters(), critic.parameters()):
        torch.testing.assert_close(weight, due, atol=1e-7, rtol=1e-6, msg=name)
    both = zip(critic_after.parameters(), critic_start.parameters())
    assert all((a - b).abs().max() > 1e-5 for a, b in both if a.requires_grad)
    if not shared:  # the critic reads along with whom it came with, the reward model with the reference
        wires.assert_unmoved(critic_after.reader, load_scalar(config.critic)[0].reader)
    wires.assert_unmoved(seen["load_reference"][0].result, policy_at(config.reference))

    # what is kept, and said
    assert out.count("ratio 1, off by at most") == 1 and out.count("doctor: seen") == 3
    assert out.count("\nheld out ") == 1  # the table of all looks
    wires.assert_counted(config, found, seen)
    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("ppo", True, 3)
    head = "critic (a head)" if shared else "critic"
    assert models(config.out) == [
        "policy",
        "reference",
        head,
        f"{tiny}/prm.pt" if shared else f"{tiny}/rm.pt",
    ]
    shown = next(line for line in out.splitlines() if ": step " in line)
    assert all(f" {name} " in shown for name in train_ppo.SHOWN) and " entropy " not in shown
    order = seen["BatchOrder"][0]
    assert (order.batch_size, order.seed, order.pool) == (6, 5, 1)
    assert order.lengths == [wires.prompt_length(row) for row in ASKED[:-1]]


def test_ppo_with_adapters_is_its_formulas_measured_from_the_base(double, config, monkeypatch):
    """The reference is the policy with its adapters off; the critic has adapters of its own."""
    config.reference, config.lora, config.lora_alpha = "", 2, 3.0
    made = spy(monkeypatch, train_ppo, "make_optimizer", keep=lambda given: copy.deepcopy(given["model"]))
    seen = wires.watch_all(monkeypatch, train_ppo)
    train_ppo.main(config)
    (policy, critic), ref = made[0].kept, policy_at(config.init)
    rollouts, scores = wires.assert_sampled(config, seen)
    for row, due in zip(
        steps(config.out), by_hand(config, rollouts, seen["batches"], scores, policy, ref, critic)
    ):
        assert_close(row, due)
    found = load(config.out)["model"]
    assert found.keys() == adapters(policy).keys()
    for name, weight in adapters(policy).items():
        torch.testing.assert_close(found[name].double(), weight, atol=2e-6, rtol=1e-5, msg=name)
    critic_after = seen["load_critic"][0].result
    for (name, weight), due in zip(critic_after.named_parameters(), critic.parameters()):
        torch.testing.assert_close(weight, due, atol=1e-7, rtol=1e-6, msg=name)
    wires.assert_unmoved(seen["load_reference"][0].result, ref)


def test_ppo_is_watched_on_held_out_prompts(double, config, monkeypatch):
    wires.assert_watched(monkeypatch, train_ppo, config)


def test_ppo_resumes_with_beta_critic_and_history(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_ppo, config, tmp_path, step=5)


def test_ppo_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init", "reference", "critic", "reward")
    others = {flag: f"{tiny}/{name}.pt" for flag, name in [("init", "reference"), ("reference", "policy"),
              ("critic", "rm"), ("reward", "critic")]}  # fmt: skip
    others["prompts"] = write_lines(tmp_path / "others.jsonl", asked(9, first=1))
    wires.assert_made_from(monkeypatch, train_ppo, config, **others)
    wires.assert_prepared(monkeypatch, train_ppo, config, *4 * ["GPT"])  # policy, reference, reward, critic


def test_ppo_starts_its_critic_from_the_reward_model_or_else_from_the_policy(config, monkeypatch, tiny):
    for changes, start in [({}, f"{tiny}/critic.pt"), ({"critic": ""}, f"{tiny}/rm.pt"),
                           ({"critic": "", "reward": "length"}, f"{tiny}/policy.pt"),
                           ({"shared_critic": True}, "")]:  # fmt: skip
        with monkeypatch.context() as patch:
            calls = spy(patch, train_ppo, "load_critic")
            wires.made_from(patch, train_ppo, wires.replaced(config, **changes))
        assert [call.path for call in calls] == [start]


def test_ppo_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    at_bounds = {"gamma": 1.0, "lam": 1.0, "kl_horizon": 6.0}
    wires.assert_refused(
        monkeypatch, train_ppo, config,
        ("--kl-target", {"beta": 0.0}), ("--kl-target", {"kl_horizon": 5.0}),
        ("", {"kl_target": 0.0, "beta": 0.0}), ("--gamma", {"gamma": 0.0}), ("--gamma", {"gamma": 1.5}),
        ("--lam", {"lam": -0.1}), ("--lam", {"lam": 1.5}),
        ("", at_bounds), ("", {"lam": 0.0}), ("chat model", {"init": f"{tiny}/base.pt"}),
    )  # fmt: skip


def test_ppo_starts_at_its_reference_and_from_the_log_probs_of_the_rollout_or_not_at_all(config, monkeypatch):
    own = wires.replaced(config, reference="", steps=1)
    train_ppo.main(own)
    assert steps(own.out)[0]["kl"] == pytest.approx(0, abs=1e-5)
    original = train_ppo.token_logprobs

    def token_logprobs(*args, **options):
        found = original(*args, **options)
        return 1.1 * found if torch.is_grad_enabled() else found

    monkeypatch.setattr(train_ppo, "token_logprobs", token_logprobs)
    with pytest.raises(UserError, match="ratio must start at 1"):
        train_ppo.main(own)
