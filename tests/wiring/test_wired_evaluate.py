"""What evaluate.main wires up: the scorecard, again from what was sampled (wires.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import wires
from runs import WORLD, write_lines
from wires import asked, logprobs, policy_at, spy

import evaluate
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar

CHECKS = """
def checks(prompt, response, meta):
    return {"utility": float(len(response) % 5), "number": meta.get("answer", 0) + 0.5}
"""
OFF = {  # every flag that has a say in what is computed, off its default
    "samples": 3, "count": 4, "show": 2, "max_new_tokens": 6, "temperature": 0.7, "seed": 4, "elo": True,
    "device": "cpu:0",
}  # fmt: skip


@pytest.fixture
def config(tiny, tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)
    rows = [{**row, "meta": {**row["meta"], "kind": "ab"[i % 2]}} for i, row in enumerate(asked(5))]
    prompts = write_lines(tmp_path / "asked.jsonl", [*rows, wires.prompt_of(39), wires.prompt_of(40)])
    return evaluate.Config(
        checkpoints=tuple(f"{tiny}/{name}.pt" for name in ("base", "policy", "untied")),
        baseline=f"{tiny}/policy.pt", reference=f"{tiny}/reference.pt",
        reward=f"{tiny}/rm.pt - 0.05*length", prompts=prompts,
        checks=f"{tmp_path}/checks.py", **OFF, out=f"{tmp_path}/card.json",
    )  # fmt: skip


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture
def sampled(monkeypatch):
    batches, original = [], evaluate.rollouts

    def rollouts(model, tokenizer, prompts, limit, seed, **how):
        for indices, drawn in original(model, tokenizer, prompts, limit, seed, **how):
            batches.append((model, prompts, limit, seed, how, indices, drawn))
            yield indices, drawn

    monkeypatch.setattr(evaluate, "rollouts", rollouts)
    return batches


def mean_and_error(values):
    """Values (prompts, samples) → the mean, and the standard error of the prompts' means."""
    each = values.mean(1)
    return each.mean(), each.std(ddof=1) / len(each) ** 0.5


def test_the_scorecard_is_what_was_sampled(config, sampled, monkeypatch, capsys):
    loads = [spy(monkeypatch, evaluate, name) for name in ("load_policy", "make_reward")]
    evaluate.main(config)
    out = capsys.readouterr().out
    wires.assert_on("cpu:0", *loads)
    card = read(config.out)
    rows = [*map(json.loads, Path(config.prompts).read_text().splitlines())]
    rows = [row for row in rows if len(WORLD.prompt(wires.user(row["prompt"]))) < 40][:6]
    rows = [rows[i * len(rows) // 4] for i in range(4)]  # --count of those that fit
    policies = [policy_at(path) for path in config.checkpoints]
    ref, rm = policy_at(config.reference), load_scalar(f"{config.reward.split()[0]}")[0]
    assert len(sampled) == 3 and len({batch[3] for batch in sampled}) == 3  # each with its own random numbers
    utilities, kls, rewards, ends = (np.zeros((3, 4, 3)) for _ in range(4))
    for n, (model, prompts, limit, seed, how, indices, new) in enumerate(sampled):
        plain = n == 0  # the base model goes on from text
        spelt = [WORLD.prompt(wires.user(row["prompt"]), plain).tolist() for row in rows for _ in range(3)]
        assert [prompt.tolist() for prompt in prompts] == spelt
        assert (limit, how["temperature"]) == (6, 0.7) and seed != 4
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), policies[n].parameters()))
        for i, ids, mask in zip(indices, new.ids, new.mask):
            at = n, i // 3, i % 3
            with torch.no_grad():
                logp, ref_logp = (logprobs(m, ids[None], mask[None], 0.7) for m in (model, ref))
                last = mask.nonzero().max()
                rewards[at] = rm(ids[None])[0, last].item() - 0.05 * mask.sum().item()
            kls[at] = (logp - ref_logp).sum().item()
            text = WORLD.decode_response(ids[mask])
            utilities[at], ends[at] = len(text) % 5, ids[last] == WORLD.end
    for n, path in enumerate(config.checkpoints):
        found = card["checkpoints"][path]["overall"]
        assert found["utility"] == pytest.approx(mean_and_error(utilities[n]))
        assert found["reward"] == pytest.approx(mean_and_error(rewards[n]), rel=1e-4)
        assert found["ended"] == pytest.approx(mean_and_error(ends[n]))
        due = [None, None] if n == 0 else pytest.approx(mean_and_error(kls[n]), rel=1e-4)
        assert found["KL to reference"] == due
        wins = [[np.mean([(a > b) + 0.5 * (a == b) for a in own for b in theirs])]
                for own, theirs in zip(utilities[n], utilities[1])]  # fmt: skip
        if n != 1:
            assert found["win rate"] == pytest.approx(mean_and_error(np.array(wins)))
        change = card["checkpoints"][path]["change from the baseline"]["utility"]
        assert change == pytest.approx(mean_and_error((utilities[n] - utilities[1]).mean(1, keepdims=True)))
        stage = card["checkpoints"][path]["stage"]
        assert stage == ("base" if n == 0 else "sft")
    assert card["reference"] == config.reference and card["baseline"] == config.baseline
    assert card["elo"].keys() == set(config.checkpoints)
    assert "4 held-out prompts × 3 samples" in out and "1 of 7 prompts dropped" in out


@pytest.mark.parametrize("temperature, told", [(0.0, False), (1.3, True)])
def test_greedy_answers_are_no_sample_to_measure_kl_on(config, temperature, told, tiny):
    own = wires.replaced(
        config, temperature=temperature, samples=1, elo=False, checkpoints=(f"{tiny}/policy.pt",)
    )
    evaluate.main(own)
    [card] = read(config.out)["checkpoints"].values()
    assert (card["overall"]["KL to reference"][0] is not None) == told


def test_the_reference_is_the_last_sft_checkpoint_unless_named(config, tiny, monkeypatch):
    for named, due in [("", "untied"), (f"{tiny}/policy.pt", "policy")]:
        evaluate.main(wires.replaced(config, reference=named, elo=False, samples=1))
        assert read(config.out)["reference"] == f"{tiny}/{due}.pt"
    evaluate.main(
        wires.replaced(config, reference="", baseline="", elo=False, checkpoints=(f"{tiny}/base.pt",))
    )
    report = read(config.out)
    assert report["reference"] == "" and report["baseline"] == f"{tiny}/base.pt"


def test_evaluate_refuses_what_it_cannot_do(config, tiny):
    for word, changes in [
        ("--samples", {"samples": 0}), ("--elo", {"checkpoints": (config.baseline,)}),
        ("--baseline", {"baseline": f"{tiny}/rm.pt"}),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word):
            evaluate.main(wires.replaced(config, **changes))


def test_a_dense_reward_counts_as_the_sum_of_its_steps(config, tiny, sampled):
    alone = {"checkpoints": (config.baseline,), "elo": False}
    evaluate.main(wires.replaced(config, reward=f"prm-steps:{tiny}/prm.pt", **alone))
    [(_, _, _, _, _, indices, drawn)] = sampled
    model, due = load_scalar(f"{tiny}/prm.pt", stages=("prm",))[0], np.zeros(len(indices))
    for at, ids, mask in zip(indices, drawn.ids, drawn.mask):
        ends = [t for t in mask.nonzero().flatten().tolist() if ids[t] in (*WORLD.newlines, WORLD.end)]
        marked = ids.clone()
        marked[ends] = WORLD.step
        with torch.no_grad():
            due[at] = torch.sigmoid(model(marked[None])[0, ends]).sum()
    card = read(config.out)["checkpoints"][config.baseline]["overall"]
    assert due.std() > 0.01 and card["reward"][0] == pytest.approx(due.mean(), abs=1e-5)
