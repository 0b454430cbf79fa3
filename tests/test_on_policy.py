"""PPO and GRPO from end to end: where they start, what they log, what their flags do."""

import json
from itertools import pairwise

import pytest
import torch
from runs import KINDS, WORLD, interrupt, models, rows, steps, terminate, write_lines

from lab.doctor import diagnose_rows
from nanoalign import UserError, cli
from nanoalign.checkpoint import load
from nanoalign.watch import MOST, Watch


@pytest.fixture(scope="module")
def pulled(job):
    """A policy that PPO has pulled away from its reference, as the Config of its run."""
    script, config = job("ppo", steps=6, lr=1e-3)
    script.main(config)
    return config


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_response_without_an_end_token_gets_the_missing_eos_score(stage, job, capsys):
    script, config = job(stage, steps=2, max_new_tokens=1, missing_eos_score=-7.0)
    script.main(config)
    seen = [row for row in rows(config.out) if row.get("ended") == 0]
    assert seen and all(row["score"] == -7 for row in seen)
    assert stage == "ppo" or all(row["equal_groups"] == 1 for row in seen)
    out = capsys.readouterr().out
    assert out.count("warning: all lengths are at the limit") == 1  # once a run, not once an iteration
    assert out.count("warning: the end-token rate collapses") == 1
    assert out.count("warning: most groups teach nothing") == (stage == "grpo")


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_held_out_reward_is_raw_and_has_another_name_than_the_score_that_is_trained_on(stage, job):
    script, config = job(
        stage, steps=1, max_new_tokens=1, missing_eos_score=-7.0, reward="0*length", watch=""
    )
    script.main(config)
    looks = [row for row in rows(config.out) if "eval_ended" in row]
    assert len(looks) == 2 and all(row["eval_reward"] == 0 and row["eval_ended"] < 0.5 for row in looks)
    [step] = steps(config.out)
    assert step["score"] == pytest.approx(-7 * (1 - step["ended"])) and step["ended"] < 0.5
    assert "eval_score" not in looks[0] and not any("eval_" in name for name in steps(config.out)[0])


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_training_samples_cannot_be_truncated(stage, job, monkeypatch, capsys):
    """Their log π − log π_ref would be no KL, and an adaptive β would steer by it."""
    script, config = job(stage)
    assert config.sampling.keys() == {"max_new_tokens", "temperature", "size"}
    for flag in ("--top-k=5", "--top-p=0.9"):
        monkeypatch.setattr("sys.argv", ["train.py", flag])
        with pytest.raises(SystemExit):
            cli.run(script.main, script.Config)
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_ppo_takes_kl_off_the_reward_weighed_by_beta(job, pulled):
    def first_update(**changes):
        once = {"steps": 1, "epochs": 1, "minibatch": 8, "init": pulled.out, "reference": pulled.init}
        script, config = job("ppo", **once, shared_critic=True, kl_target=0.0, **changes)
        script.main(config)
        row = next(row for row in rows(config.out) if "policy_loss" in row)
        return row["loss"] - row["policy_loss"] - 0.1 * row["value_loss"], row

    (one, a), (three, b) = (first_update(beta=beta) for beta in (1.0, 3.0))
    assert one == pytest.approx(0, abs=1e-5) == three  # the loss knows nothing of β …
    assert a["value_loss"] != b["value_loss"]  # … but the returns do


def test_ppo_goes_on_from_another_policy_with_the_old_reference(job, pulled):
    script, second = job("ppo", steps=1, init=pulled.out, reference=pulled.init)
    script.main(second)
    start = next(row for row in rows(second.out) if "eval_kl" in row)
    end = [row for row in rows(pulled.out) if "eval_kl" in row][-1]
    assert start["eval_kl"] == pytest.approx(end["eval_kl"], abs=1e-4) != 0


# ------------------------------------------------------------------------------------------------- GRPO


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_checks_that_ratios_start_at_one_and_again_after_a_resume(kind, job, monkeypatch, capsys):
    script, config = job("grpo", kind=kind, steps=2, eval_prompts=1, resume=True)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    assert "step-0 check: ratio 1, off by at most " in capsys.readouterr().out
    script.main(config)
    assert "first minibatch: ratio 1, off by at most " in capsys.readouterr().out
    for row in steps(config.out):
        assert row["ratio_error"] < 1e-3 and row["ratio"] == pytest.approx(1, abs=0.2)
    assert load(config.out)["config"]["clip_high"] == (0.28 if kind == "dapo" else 0.2)  # by the papers
    assert models(config.out) == ["policy", "reference", config.reward]


def test_grpo_refuses_to_start_with_log_probs_from_two_paths(job, monkeypatch):
    script, config = job("grpo", steps=1, eval_prompts=1)
    original = script.token_logprobs
    updating = lambda *args, **kw: original(*args, **kw) * (1.1 if torch.is_grad_enabled() else 1)  # noqa: E731
    monkeypatch.setattr(script, "token_logprobs", updating)
    with pytest.raises(UserError, match="ratio must start at 1"):
        script.main(config)


def test_grpo_compares_the_answers_to_one_prompt(job, tmp_path, monkeypatch):
    """What the reward is shown: groups of G next to each other, each of one prompt, no prompt in two, though
    the prompts are of one length and rollouts are sorted by it."""
    asked, shown = [{"prompt": f"What is {i} + {j}?"} for i in range(2, 8) for j in range(2, 8)], []
    assert len({len(WORLD.prompt([{"role": "user", "content": row["prompt"]}])) for row in asked}) == 1

    def reward(rows, rollout):
        if len(rows) == 8:  # two groups of four; held-out prompts come alone
            shown.append([(json.dumps(row["prompt"]), ids[~mask].tolist()) for row, ids, mask in zip(
                rows, rollout.ids, rollout.mask)])  # fmt: skip
        return rollout.mask.sum(-1).float()

    script, config = job(
        "grpo", steps=3, eval_prompts=1, watch="", prompts=write_lines(tmp_path / "asked.jsonl", asked)
    )
    reward.files = reward.models = reward.held = []
    monkeypatch.setattr(script, "make_reward", lambda *args: reward)
    script.main(config)
    assert len(shown) == 3
    for batch in shown:
        first, second = batch[:4], batch[4:]
        for group in (first, second):
            assert len({prompt for prompt, _ in group}) == 1
            for prompt, ids in group:
                spelt = WORLD.prompt(json.loads(prompt)).tolist()
                assert ids[: len(spelt)] == spelt and set(ids[len(spelt) :]) <= {WORLD.pad}
        assert first[0][0] != second[0][0]


@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_grpo_puts_kl_into_the_loss_or_takes_it_off_the_reward(kl, job, pulled):
    def first_update(beta):
        once = {"steps": 1, "epochs": 1, "minibatch": 8, "init": pulled.out, "reference": pulled.init}
        script, config = job("grpo", **once, kind="dr_grpo", kl=kl, beta=beta, eval_prompts=1)
        script.main(config)
        return steps(config.out)[0]

    none, one, three = (first_update(beta) for beta in (0.0, 1.0, 3.0))
    assert none["score"] == one["score"] == three["score"] and one["kl"] == three["kl"] != 0
    assert one["kl_loss"] == three["kl_loss"] and (one["kl_loss"] == 0) == (kl == "reward")
    if kl == "reward":  # at the first update the advantages are the gradient: they have changed
        assert one["grad_norm"] != pytest.approx(none["grad_norm"], rel=1e-2)
    else:
        assert kl == "k1" or one["kl_loss"] > 0
        assert three["loss"] - one["loss"] == pytest.approx(2 * one["kl_loss"], rel=1e-3, abs=1e-6)


def test_a_verifiable_reward_pays_for_right_sums(world, job):
    script, config = job(
        "grpo", reward="answer", watch="", prompts=f"{world}/problems.jsonl", steps=2, max_new_tokens=32,
        eval_data=f"{world}/problems_held_out.jsonl", missing_eos_score=0.0,
    )  # fmt: skip
    script.main(config)
    assert all(0 <= row["score"] <= 1 and 0 <= row["equal_groups"] <= 1 for row in steps(config.out))
    looks = [row for row in rows(config.out) if "eval_reward" in row]
    assert len(looks) == 2 and all(0 <= row["eval_reward"] <= 1 for row in looks)
    assert models(config.out) == ["policy", "reference"]  # no reward model


@pytest.mark.parametrize("kind", KINDS)
def test_groups_without_spread_are_counted_and_teach_nothing(kind, job, capsys):
    script, config = job(
        "grpo",
        kind=kind,
        reward="0*length",
        missing_eos_score=0.0,
        beta=0.0,
        steps=1,
        eval_prompts=1,
        lr=1e-2,
    )
    script.main(config)
    [row] = steps(config.out)
    assert row["equal_groups"] == 1 and row["grad_norm"] == 0
    assert "warning: most groups teach nothing" in capsys.readouterr().out
    before, after = load(config.init)["model"], load(config.out)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------ warnings


@pytest.fixture
def warner():
    """warner(diagnose) → a Watch that asks this doctor, and has looked never."""

    def warner(diagnose):
        watch = Watch.__new__(Watch)
        watch.diagnose, watch.history, watch.warned = diagnose, [], set()
        watch.seen, watch.count, watch.every = [], 0, 1
        return watch

    return warner


def test_an_iteration_s_warnings_cost_the_same_however_long_the_run(warner):
    """The rows that the doctor is shown are few, evenly spaced, and end with the newest."""
    shown = []
    watch = warner(lambda rows: shown.append([row["step"] for row in rows if "step" in row]) or ())
    for step in range(3000):
        if step % 5 == 0:
            watch.history.append({"kl": float(step)})
        watch.warn({"step": step})
    assert max(map(len, shown)) <= MOST and len(watch.seen) < MOST
    assert all(asked == list(range(len(asked))) for asked in shown[:MOST])  # at first it is shown them all
    for newest, asked in enumerate(shown):
        *before, last = asked
        assert last == newest and len({b - a for a, b in pairwise(before)}) <= 1
        assert newest < MOST or len(asked) > MOST / 2


def test_the_first_look_and_the_latest_ones_are_shown_to_the_doctor(warner):
    shown = []
    watch = warner(lambda rows: shown.append([row["eval_kl"] for row in rows if "eval_kl" in row]) or ())
    watch.history = [{"kl": float(step)} for step in range(1000)]
    watch.warn({"step": 1})
    assert shown == [[0.0, *map(float, range(1000 - MOST, 1000))]]


def test_a_sickness_is_named_as_soon_as_it_shows_and_once(warner, capsys):
    """Of responses that double in length at step 1301: once they are more than half of the last quarter."""
    watch, long = warner(diagnose_rows), []
    for step in range(1500):
        watch.warn({"step": step, "ratio_error": 0.5 if step == 1203 else 0.0, "length": 1.0 + (step > 1300)})
        said = capsys.readouterr().out
        assert ("off 1 at the first minibatch" in said) == (step == 1203)
        long += [step] * ("responses grow long" in said)
    assert len(long) == 1 and abs(long[0] - 1300 * 8 / 7) < 20
