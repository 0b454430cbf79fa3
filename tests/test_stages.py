"""Every stage from end to end on the tiny world: what it starts from, what it learns, what it leaves."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from runs import KINDS, WORLD, held_out, metrics, rows, steps, write_lines

import collect
import evaluate
from nanoalign.checkpoint import load
from nanoalign.rows import read_rows


def test_every_stage_learns_and_the_scorecard_compares_them(
    world, base, sft, pairs, thumbs, job, tmp_path, capsys
):
    script, config = job("dpo", epochs=1)
    script.main(config)
    assert [load(path)["stage"] for path in (base, sft, config.out)] == ["base", "sft", "dpo"]
    for path in (base, sft):
        assert metrics(path)[-2]["loss"] < math.log(WORLD.vocab_size)
    assert rows(config.out)[-2]["loss"] < math.log(2) - 0.01 and rows(config.out)[-2]["margin"] > 0
    assert len(read_rows(pairs, "pairs")) > 100 and read_rows(thumbs, "labelled")

    card = tmp_path / "card.json"
    evaluate.main(
        evaluate.Config(
            checkpoints=(base, sft, config.out), prompts=f"{world}/prompts_held_out.jsonl", out=str(card),
            samples=2, max_new_tokens=8, reward="-0.5*length",
        )
    )  # fmt: skip
    report = json.loads(card.read_text())
    overall = {path: report["checkpoints"][path]["overall"] for path in (base, sft, config.out)}
    assert overall[base]["win rate"][0] == 0.5  # against itself
    assert overall[base]["KL to reference"] == [None, None]  # another prompt: no KL to speak of
    assert overall[sft]["KL to reference"] == [0.0, 0.0]  # the reference itself, exactly
    assert overall[config.out]["KL to reference"][0] > 0
    assert all(-4 <= card["reward"][0] < -0.5 for card in overall.values())  # at most eight tokens each
    assert "utility by family" in capsys.readouterr().out


def test_a_stage_starts_where_the_last_one_ended(job, base):
    script, config = job("sft", lr=0.0)
    script.main(config)
    assert all(
        torch.equal(a, b) for a, b in zip(load(config.out)["model"].values(), load(base)["model"].values())
    )


@pytest.mark.parametrize("stage", ["sft", "kto", "orpo", "grpo"])
def test_a_compiled_run_saves_the_same_keys_and_no_traces_of_the_compiler(stage, job, monkeypatch, base):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    fewer = {"epochs": 1 if stage == "sft" else 0.01}
    changes = {"steps": 1, "eval_prompts": 1} if stage == "grpo" else fewer
    script, config = job(stage, compile=True, checkpointing=True, **changes)
    script.main(config)
    assert list(load(config.out)["model"]) == list(load(base)["model"])


@pytest.mark.parametrize(
    "stage, split",
    [(stage, {"micro_batch": 3}) for stage in ("rm", "kto", "orpo", "ppo", *KINDS)]
    + [(stage, {"micro_tokens": 99}) for stage in ("sft", "rm", "prm", "kto", "orpo", "dpo")]
    + [("sft", {"packing": True}), ("sft", {"packing": True, "micro_tokens": 99})],
)
def test_micro_batches_change_nothing(stage, split, job, double):
    fewer = {"kto": 0.3, "orpo": 0.05, "dpo": 0.05, "sft": 0.5, "prm": 0.1, "rm": 0.3}
    kl = "reward" if stage == "rloo" else "k3"
    changes = {"kind": stage, "kl": kl, "steps": 4, "eval_prompts": 1} if stage in KINDS else {}
    changes |= {"steps": 6, "eval_prompts": 1} if stage == "ppo" else {}
    changes |= {"epochs": fewer[stage], "eval_every": 99} if stage in fewer else {}
    runs, logged = [], []
    for flags in ({}, split):
        script, config = job("grpo" if stage in KINDS else stage, **flags, **changes)
        script.main(config)
        runs.append(load(config.out)["model"])
        logged.append(steps(config.out))
    for whole, pieces in zip(*(run.values() for run in runs)):
        torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=1e-5)
    assert all(row["grad_norm"] > 0 and row.get("equal_groups", 0) < 1 for row in logged[0])
    for whole, pieces in zip(*logged):  # Adam would forgive a gradient on another scale
        for name in ("loss", "grad_norm"):
            assert pieces[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo"])
def test_a_number_of_steps_stands_in_for_epochs(stage, job):
    script, config = job(stage, steps=3, epochs=5, eval_every=99)
    script.main(config)
    assert [row["step"] for row in steps(config.out)] == [1, 2, 3]


@pytest.mark.parametrize("stage", ["kto", "orpo", "grpo"])
def test_checkpoints_of_every_method_are_policies_to_collect_from_and_to_score(
    stage, job, world, sft, tmp_path
):
    changes = {"steps": 1, "eval_prompts": 1} if stage == "grpo" else {"epochs": 0.03}
    script, config = job(stage, **changes)
    script.main(config)
    assert load(config.out)["stage"] == stage
    prompts = held_out(world / "prompts_held_out.jsonl", tmp_path, 12)
    evaluate.main(
        evaluate.Config(
            checkpoints=(sft, config.out),
            prompts=prompts,
            out=str(tmp_path / "s.json"),
            samples=2,
            max_new_tokens=8,
        )
    )
    card = json.loads((tmp_path / "s.json").read_text())["checkpoints"][config.out]["overall"]
    assert card["KL to reference"][0] is not None  # asked as a chat model, unlike a base model
    collect.main(
        collect.Config(policy=config.out, prompts=prompts, out=str(tmp_path / "p.jsonl"), max_new_tokens=8)
    )
    assert read_rows(str(tmp_path / "p.jsonl"), "pairs")
    for other in ("kto", "rm"):  # and to go on from
        script, following = job(other, init=config.out, epochs=0.03)
        script.main(following)
        assert load(following.out)["stage"] == other


def test_skip_bad_rows_covers_held_out_rows_too(job, world, tmp_path):
    dirty = tmp_path / "dirty.jsonl"
    dirty.write_text((world / "sft_held_out.jsonl").read_text() + '{"bad": 1}\n')
    script, config = job("sft", data=str(dirty), eval_data=str(dirty), skip_bad_rows=True, epochs=1)
    script.main(config)
    assert Path(config.out).exists()


def test_conversations_may_begin_with_the_assistant(job, tmp_path):
    openings = [{"messages": [{"role": "assistant", "content": f"Welcome, {i}!"}]} for i in range(20)]
    (tmp_path / "openings.jsonl").write_text("\n".join(map(json.dumps, openings)))
    script, config = job("sft", data=str(tmp_path / "openings.jsonl"), epochs=1)
    script.main(config)
    assert Path(config.out).exists()


def test_the_elo_ratings_of_two_checkpoints_are_the_log_odds_of_their_win_rate(
    world, sft, brief, tmp_path, capsys
):
    held_out = write_lines(tmp_path / "p", read_rows(f"{world}/prompts_held_out.jsonl", "prompts")[:20])
    card = tmp_path / "card.json"
    evaluate.main(
        evaluate.Config(
            checkpoints=(sft, brief), prompts=held_out, out=str(card), samples=2, elo=True, max_new_tokens=8
        )
    )
    report = json.loads(card.read_text())
    share, elo = report["checkpoints"][brief]["overall"]["win rate"][0], report["elo"]
    assert 0 < share < 1 and share != 0.5
    gap = elo[brief]["rating"] - elo[sft]["rating"]
    assert gap == pytest.approx(400 * math.log10(share / (1 - share)), abs=0.01)
    printed = capsys.readouterr().out
    for name, path in (("sft", sft), ("brief", brief)):
        assert elo[path]["low"] <= elo[path]["rating"] <= elo[path]["high"]
        assert re.search(rf"{name} +{elo[path]['rating']:.0f} ", printed)


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "orpo"])
def test_held_out_prompts_are_answered_whole_or_left_out_and_counted(
    stage, job, tmp_path, monkeypatch, capsys
):
    """None loses its beginning, where its question may stand, in the samples or in the KL on them."""
    asked = [f"Is it {' very' * n} cold?" for n in (1, 20, 60)]
    rows = [{"prompt": prompt, "chosen": "Yes.", "rejected": "No."} for prompt in asked]
    short, long, too_long = (WORLD.prompt([{"role": "user", "content": prompt}]) for prompt in asked)
    assert len(short) < 20 <= len(long) < 40 < len(too_long)
    script, config = job(
        stage, steps=1, max_length=40, eval_data=write_lines(tmp_path / "held_out.jsonl", rows)
    )
    answered = {}

    def keep(name, call, *args):
        [answered[name]] = [arg for arg in args if isinstance(arg, list)]
        return call(*args)

    for name in {"respond", "sample_kl"} & vars(script).keys():
        monkeypatch.setattr(script, name, functools.partial(keep, name, getattr(script, name)))
    script.main(config)
    said = "1 of 3 held-out prompts are not answered: no room in 40 tokens"
    assert ("2 dropped" if stage == "kto" else said) in capsys.readouterr().out  # its rows, an up and a down
    assert answered.keys() >= ({"respond", "sample_kl"} if stage in ("dpo", "kto") else {"respond"})
    for prompts in answered.values():
        assert [ids.tolist() for ids in prompts] == [short.tolist(), long.tolist()]
