"""Online DPO: how fresh pairs are made and labelled, and whole runs that make theirs as they go."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Killed, crash, interrupt, models, same_run, steps, terminate

from lab import train_online_dpo as script
from lab.train_online_dpo import Collections, Config, online_pairs
from nanoalign import UserError, cli
from nanoalign.checkpoint import load, load_policy, load_scalar, partial_path, save
from nanoalign.model import GPT, GPTConfig
from nanoalign.run import Flags
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("world")


# ----------------------------------------------------------------------------------------- the pairs


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
    pairs, drawn = fresh(talker, scale=0.6, count=1600)
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


# ------------------------------------------------------------------------------------------------- the order


def test_a_collections_pairs_are_dealt_to_the_steps_that_follow_it():
    order = Collections([np.zeros(3)] * 50, Config(batch_size=4, online_every=3))
    assert order.steps_per_epoch == 3 * 4  # of 12 prompts, and a rest of 14
    side = np.arange(5), np.arange(5) > 2
    order.take([(side, side)] * 8)
    assert [order[step].tolist() for step in (6, 7, 8)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert order.lengths.tolist() == [10] * 8
    asked = [i for n in range(4) for i in order.asked[n]]
    assert sorted(asked) == list(range(50))


def test_a_rest_of_prompts_too_small_to_collect_from_joins_the_others():
    """114 prompts would be a collection of 112 and one of 2, too few for 4 steps of a pair each."""
    order = Collections([np.zeros(3)] * 114, Config(batch_size=28, online_every=4))
    assert order.steps_per_epoch == 4 and len(order.asked[0]) == 114


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="session")
def rm(world, brief):
    """A reward model that has learnt nothing: it likes what it likes."""
    torch.manual_seed(0)
    policy, tokenizer, _ = load_policy(brief)
    model, path = ScalarGPT.from_policy(policy), str(world / "likes.pt")
    save(path, model, stage="rm", tokenizer=tokenizer, config=Flags(), step=1)
    return path


@pytest.fixture(scope="session")
def online(pairs, brief, rm, tmp_path_factory):
    """online(**changes) → the Config of a run of a dozen small steps into a folder of its own."""

    def make(**changes):
        files = {"data": pairs, "init": brief, "reward": rm}
        schedule = {"batch_size": 8, "log_every": 1, "eval_every": 6, "save_every": 4, "epochs": 0.75}
        out = str(tmp_path_factory.mktemp("online") / "x.pt")
        return Config(**{**files, **schedule, "online_every": 4, "max_new_tokens": 24, "out": out, **changes})

    return make


@pytest.fixture(scope="module")
def whole(online):
    """The Config of a run that was never interrupted."""
    config = online()
    script.main(config)
    assert load(config.out)["step"] > 9
    return config


def test_a_run_starts_where_theory_says_and_learns_from_its_own_pairs(whole, rm):
    logged = steps(whole.out)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [row["step"] for row in logged] == list(range(1, len(logged) + 1))
    assert models(whole.out) == ["policy", "reference", rm]
    assert load(whole.out)["stage"] == "dpo" and load(whole.out)["chat"]


def test_online_pairs_come_from_the_policy_and_are_labelled_by_the_reward(online, monkeypatch):
    def collected(reward):
        collections = []
        keep = lambda *args: collections.append(online_pairs(*args)) or collections[-1]  # noqa: E731
        config = online(reward=reward, epochs=0.5, max_new_tokens=6, eval_every=99)
        with monkeypatch.context() as patch:
            patch.setattr(script, "online_pairs", keep)
            script.main(config)
        assert len(collections) == 2 and len(steps(config.out)) == 8  # --online-every 4
        assert models(config.out) == ["policy", "reference"]
        pairs = [pair for pairs in collections for pair in pairs]
        prompts = {tuple(ids[~said]) for (ids, said), _ in pairs}
        assert len(prompts) == len(pairs) > 20  # a fresh pair or none for each prompt of an epoch
        for (chosen, said), (rejected, other) in pairs:
            assert chosen[~said].tolist() == rejected[~other].tolist()
            assert chosen.tolist() != rejected.tolist()
            assert chosen[-1] == TOKENIZER.end  # an unfinished response loses, however long
        ended = [pair for pair in pairs if pair[1][0][-1] == TOKENIZER.end]
        assert len(ended) < len(pairs)
        return [int(said.sum()) - int(other.sum()) for (_, said), (_, other) in ended]

    assert all(longer >= 0 for longer in collected("100*length"))
    close = collected("0.1*length")  # the odds of a token more are e^0.1
    assert any(longer > 0 for longer in close) and any(longer < 0 for longer in close)


@pytest.mark.parametrize("split", [{"micro_batch": 3}, {"micro_tokens": 99}])
def test_micro_batches_change_nothing(split, online, double):
    runs, logged = [], []
    for flags in ({}, split):
        config = online(epochs=0.25, eval_every=99, **flags)
        script.main(config)
        runs.append(load(config.out)["model"])
        logged.append(steps(config.out))
    for whole, pieces in zip(*(run.values() for run in runs)):
        torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=1e-5)
    for whole, pieces in zip(*logged):  # Adam would forgive a gradient on another scale
        assert whole["grad_norm"] > 0
        for name in ("loss", "grad_norm"):
            assert pieces[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-8)


def test_a_number_of_steps_stands_in_for_epochs(online):
    config = online(steps=3, epochs=5, eval_every=99)
    script.main(config)
    assert [row["step"] for row in steps(config.out)] == [1, 2, 3]


def test_simpo_holds_no_reference(online):
    config = online(loss="simpo", steps=1, reward="length")
    script.main(config)
    assert models(config.out) == ["policy"] and load(config.out)["config"]["beta"] == 2


# ------------------------------------------------------------------------------------- stopping and mistakes


@pytest.mark.parametrize("step, action, left_at", [(1, terminate, 1), (6, terminate, 6), (7, crash, 4)])
def test_a_stopped_run_resumes_bit_for_bit(whole, step, action, left_at, online, monkeypatch):
    """Also amid the steps that a collection is dealt to: its pairs are in the partial checkpoint."""
    config = online(resume=True)  # nothing to resume yet: it starts afresh
    with monkeypatch.context() as patch:
        interrupt(patch, step, action)
        with pytest.raises((SystemExit, Killed)):
            script.main(config)
    assert load(partial_path(config.out))["step"] == left_at and not Path(config.out).exists()
    script.main(config)
    same_run(whole, config)
    assert not partial_path(config.out).exists()


def test_a_run_stopped_twice_within_a_collection_still_has_its_pairs(whole, online, monkeypatch):
    config = online(resume=True)
    for step in (1, 2):  # of the process: after steps 1 and 3 of the run
        with monkeypatch.context() as patch:
            interrupt(patch, step, terminate)
            with pytest.raises(SystemExit):
                script.main(config)
    assert load(partial_path(config.out))["step"] == 3
    script.main(config)
    same_run(whole, config)


def test_resuming_with_other_flags_is_an_error_that_names_the_change(online, monkeypatch):
    config = online()
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    with pytest.raises(UserError, match=r"--online-every was 4 and is 2"):
        script.main(replace(config, online_every=2, resume=True))


def test_a_run_does_not_resume_against_a_retrained_reward(online, rm, monkeypatch, tmp_path):
    reward = tmp_path / "rm.pt"
    reward.write_bytes(Path(rm).read_bytes())
    config = online(reward=f"{reward} - 0.01*length", resume=True)
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    model, tokenizer, _ = load_scalar(rm)
    torch.nn.init.zeros_(model.score.weight)
    save(reward, model, stage="rm", tokenizer=tokenizer, config=Flags(), step=1)
    with pytest.raises(UserError, match="the data or the starting checkpoint changed"):
        script.main(config)


def test_a_run_that_runs_out_of_pairs_after_a_resume_says_so(online, monkeypatch):
    config = online(resume=True)
    monkeypatch.setattr(script, "online_pairs", lambda *args: online_pairs(*args)[:2])  # all others are ties
    with monkeypatch.context() as patch:
        interrupt(patch, 2, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    with pytest.raises(UserError, match="only 2 gave two"):
        script.main(config)


MISTAKES = [  # flags, what the sentence names
    ("--init {base}", ["'base'", "'sft'"]),
    ("--loss kto", ["kto", "dpo"]),
    ("--reward {sft}", ["'sft'", "'rm'"]),
    ("--reward nobody", ["nobody", "judge"]),
    ("--reward {tmp}/none.pt", ["none.pt", "checkpoint"]),
    ("--reward {tmp}/nan.pt --max-new-tokens 24", ["nan.pt", "not a finite number"]),
    ("--reward {rm} --online-every 0", ["--online-every"]),
    ("--reward {rm} --max-new-tokens 0", ["--max-new-tokens"]),
    ("--reward {rm} --max-new-tokens 500", ["no prompt leaves room", "--max-new-tokens"]),
    ("--reward length --max-new-tokens 1", ["finished samples", "--batch-size"]),
    ("--reward answer", ["answer", "meta"]),
    ("--reward {rm} --batch-size 0", ["--batch-size"]),
]


@pytest.mark.parametrize("flags, names", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(
    flags, names, base, sft, brief, pairs, rm, tmp_path, monkeypatch
):
    broken, tokenizer, _ = load_scalar(rm)
    torch.nn.init.constant_(broken.score.bias, math.nan)
    save(tmp_path / "nan.pt", broken, stage="rm", tokenizer=tokenizer, config=Flags(), step=1)
    files = {"base": base, "sft": sft, "rm": rm, "tmp": tmp_path}
    init = sft if "length" in flags else brief  # which has not learnt to end at once
    given = f"--init {init} --data {pairs} --out {tmp_path}/x.pt {flags.format(**files)}"
    monkeypatch.setattr(sys, "argv", ["train_online_dpo.py", *given.split()])
    with pytest.raises(SystemExit) as caught:
        cli.run(script.main, Config, script.__doc__)
    message = str(caught.value)
    assert message.startswith("error: ") and all(name in message for name in names), message
