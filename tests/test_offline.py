"""DPO, KTO and ORPO from end to end: where they start, what they log, what their flags do."""

import math
from dataclasses import replace

import pytest
import torch
from runs import WORLD, clear_pairs, held_out, models, rows, steps, write_lines

from nanoalign.checkpoint import load
from nanoalign.rows import read_rows

# -------------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize(
    "loss, beta, due",
    [
        ("dpo", 0.1, math.log(2)),
        ("cdpo", 0.1, math.log(2)),
        ("robust", 0.1, math.log(2)),
        ("ipo", 0.1, 25.0),
        ("ipo", 0.5, 1.0),
    ],
)
def test_a_preference_loss_starts_where_theory_says_with_rewards_of_zero(job, loss, beta, due, capsys):
    script, config = job("dpo", loss=loss, beta=beta, epochs=0.03)
    script.main(config)
    assert f"step-0 check: loss {due:.6f}" in capsys.readouterr().out
    first = rows(config.out)[0]
    assert first["loss"] == pytest.approx(due, abs=1e-5)
    assert first["reward_chosen"] == pytest.approx(0, abs=1e-5) == first["margin"]
    assert first["logp_chosen"] < 0 and first["logp_rejected"] < 0
    assert models(config.out) == ["policy", "reference"]


def test_simpo_holds_no_reference_and_promises_nothing_of_its_start(job, capsys):
    script, config = job("dpo", loss="simpo", epochs=0.03)
    script.main(config)
    assert models(config.out) == ["policy"] and "step-0 check" not in capsys.readouterr().out
    assert all(row["reward_chosen"] < 0 for row in steps(config.out))  # β m_w, not a difference
    [evaluation] = [row for row in rows(config.out) if "eval_loss" in row]
    assert "eval_kl" not in evaluation and load(config.out)["config"]["beta"] == 2


def test_an_sft_weight_adds_that_much_of_the_chosen_responses_mean_nll(job, tmp_path, capsys):
    def logged(weight):
        script, config = job("dpo", data=clear_pairs(tmp_path), sft_weight=weight, epochs=0.6, eval_every=99)
        script.main(config)
        return steps(config.out)

    plain, half, whole = (logged(weight) for weight in (0.0, 0.5, 1.0))
    nll = -whole[0]["logp_chosen"] / len(WORLD.response("Yes, sure."))
    assert whole[0]["loss"] == pytest.approx(math.log(2) + nll, rel=1e-4)
    assert half[0]["loss"] == pytest.approx(math.log(2) + 0.5 * nll, rel=1e-4)
    assert whole[-1]["logp_chosen"] > plain[-1]["logp_chosen"] + 1  # what it is for
    assert capsys.readouterr().out.count("step-0 check") == 1  # the sum has no value that it must start at


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_soft_labels_of_0_and_1_train_the_weights_of_hard_labels_and_others_do_not(
    stage, job, pairs, tmp_path
):
    def trained(change):
        rows = [{**row, **change(row)} for row in read_rows(pairs, "pairs")[:120]]
        script, config = job(stage, data=write_lines(tmp_path / "soft.jsonl", rows), steps=4)
        script.main(replace(config, sft_weight=0.3) if stage == "dpo" else config)
        return load(config.out)["model"]

    def swapped(row):
        return {"chosen": row["rejected"], "rejected": row["chosen"], "probability": 0}

    hard = trained(lambda row: {})
    for change in (swapped, lambda row: {"probability": 1.0}):
        soft = trained(change)
        assert all(torch.equal(soft[name], weight) for name, weight in hard.items())
    soft = trained(lambda row: {"probability": 0.7})
    assert not all(torch.equal(soft[name], weight) for name, weight in hard.items())


def test_an_sft_weight_imitates_each_side_as_likely_as_it_is_the_better_one(job, tmp_path):
    sides = {"chosen": "Yes, sure.", "rejected": "No idea at all."}
    rows = [{"prompt": f"{i} + 1?", **sides, "probability": 0.75} for i in range(100)]
    script, config = job("dpo", data=write_lines(tmp_path / "soft.jsonl", rows), sft_weight=0.5, epochs=0.05)
    script.main(config)
    first = steps(config.out)[0]
    chosen, rejected = (-first[f"logp_{side}"] / len(WORLD.response(text)) for side, text in sides.items())
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * (0.75 * chosen + 0.25 * rejected), rel=1e-4)


# -------------------------------------------------------------------------------------------------- KTO


def test_kto_starts_at_half_the_weight_and_learns_from_pairs_split_in_two(job, tmp_path, capsys):
    script, config = job("kto", data=clear_pairs(tmp_path), epochs=2, eval_every=99)
    script.main(config)
    out, logged = capsys.readouterr().out, steps(config.out)
    assert "labels: 96 desirable × 1, 96 undesirable × 1: λ_D n_D / (λ_U n_U) = 1 " in out
    assert "step-0 check: loss 0.500000" in out and logged[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    start = [value for name, value in logged[0].items() if name in ("z", "reward_chosen", "reward_rejected")]
    assert len(start) > 1 and start == pytest.approx([0] * len(start), abs=1e-5)
    assert all(row["z"] >= 0 for row in logged) and any(row["z"] > 0 for row in logged)
    assert sum(row["loss"] for row in logged[-16:]) < 16 * 0.4  # 0.5 where a batch has one label alone
    last = rows(config.out)[-1]
    assert last["eval_auc"] > 0.95 and last["eval_margin"] > 0.5 and last["eval_kl"] > 0
    assert models(config.out) == ["policy", "reference"]


def test_kto_learns_from_verdicts_on_a_models_solutions(job, tmp_path, capsys):
    """OpenAI's GSM8K file of model solutions: several models' verdicts in one row."""
    verdicts = [
        {
            "question": f"What is {i} + 1?", "ground_truth": f"#### {i + 1}",
            "6b_finetuning": {"solution": f"No, {i} is hard.", "is_correct": False},
            "6b_verification": {"solution": f"It is {i + 1}. #### {i + 1}", "is_correct": True},
            "175b_verification": {"solution": "No idea.", "is_correct": False},
        }
        for i in range(24)
    ]  # fmt: skip
    data = write_lines(tmp_path / "solutions.jsonl", verdicts)
    script, config = job("kto", data=data, epochs=2, eval_every=99)
    script.main(config)
    assert "22 desirable × 2, 44 undesirable × 1: " in capsys.readouterr().out  # two questions are held out
    last = rows(config.out)[-1]
    assert last["eval_auc"] > 0.95 and last["eval_margin"] > 0.5


def labelled(tmp_path, labels):
    """A file with a row for each label, of many lengths."""
    return write_lines(
        tmp_path / f"labelled{len(labels)}.jsonl",
        [{"prompt": "Hi." * (i % 5 + 1), "completion": "Yes. " * (i % 7 + 1), "label": y}
         for i, y in enumerate(labels)],
    )  # fmt: skip


@pytest.mark.parametrize(
    "up, down, weights, ratio",
    [
        (90, 10, "90 desirable × 1, 10 undesirable × 6.75", 1.33),
        (6, 18, "6 desirable × 3, 18 undesirable × 1", 1),
    ],
)
def test_kto_weighs_unbalanced_labels_by_the_papers_rule(up, down, weights, ratio, job, tmp_path, capsys):
    data = labelled(tmp_path, [True] * up + [False] * down)
    few = held_out(data, tmp_path)
    script, config = job("kto", data=data, eval_data=few, epochs=0.1)
    script.main(config)
    out, first = capsys.readouterr().out, steps(config.out)[0]
    assert f"{weights}: λ_D n_D / (λ_U n_U) = {ratio}" in out
    heavy = {90: (1, 6.75), 6: (3, 1)}[up]
    share = first["desirable"]  # of the batch
    assert first["loss"] == pytest.approx((heavy[0] * share + heavy[1] * (1 - share)) / 2, abs=1e-5)
    script, config = job(
        "kto", data=data, eval_data=few, epochs=0.1, desirable_weight=2.0, undesirable_weight=0.5
    )
    script.main(config)  # named weights win over the rule
    share, loss = (steps(config.out)[0][name] for name in ("desirable", "loss"))
    assert loss == pytest.approx((2 * share + 0.5 * (1 - share)) / 2, abs=1e-5)


@pytest.mark.parametrize(
    "rows, batch_size, micro_batch, expected", [(15, 7, 0, 2), (15, 7, 3, 2), (3, 2, 1, 1), (10, 3, 0, 3)]
)
def test_kto_gives_a_remainder_of_one_row_to_the_batch_before(
    rows, batch_size, micro_batch, expected, job, tmp_path
):
    data = labelled(tmp_path, [i % 2 == 0 for i in range(rows)])
    script, config = job(
        "kto", data=data, eval_data=held_out(data, tmp_path), epochs=1, batch_size=batch_size,
        micro_batch=micro_batch,
    )  # fmt: skip
    script.main(config)
    logged = steps(config.out)
    assert len(logged) == expected and all(math.isfinite(v) for row in logged for v in row.values())
    lengths = [
        len(WORLD.prompt(row["prompt"])) + len(WORLD.response(row["completion"]))
        for row in read_rows(data, "labelled")
    ]
    assert logged[-1]["tokens"] == sum(lengths)  # an epoch sees every row once


@pytest.mark.parametrize("label", [True, False])
def test_kto_stays_finite_where_all_labels_are_the_same(label, job, tmp_path, capsys):
    data = labelled(tmp_path, [label] * 24)
    script, config = job("kto", data=data, epochs=2, lr=1e-2)
    script.main(config)
    out = capsys.readouterr().out
    assert "desirable × 1, " in out and "undesirable × 1: " in out
    logged = steps(config.out)
    assert all(row["desirable"] == label for row in logged)
    assert all(math.isfinite(v) for row in rows(config.out) for v in row.values())
    assert logged[0]["loss"] == pytest.approx(0.5, abs=1e-5) and "eval_auc" not in rows(config.out)[-1]
    assert all(weight.isfinite().all() for weight in load(config.out)["model"].values())


# ------------------------------------------------------------------------------------------------- ORPO


def test_orpo_teaches_a_base_model_both_parts_without_a_reference(job, base, capsys):
    script, config = job("orpo", epochs=0.2, lam=0.5, eval_every=99)
    script.main(config)
    assert load(base)["stage"] == "base" and models(config.out) == ["policy"]
    assert "step-0 check: odds part" in capsys.readouterr().out
    logged = steps(config.out)
    for row in logged:
        assert row["loss"] == pytest.approx(row["nll"] + 0.5 * row["odds_loss"], rel=1e-4)
    assert logged[-1]["nll"] < logged[0]["nll"] - 0.1
    assert logged[-1]["mean_logp_chosen"] > logged[0]["mean_logp_chosen"]
    assert {"eval_nll", "eval_odds_loss"} <= rows(config.out)[-1].keys() and "eval_kl" not in rows(
        config.out
    )[-1]


def test_orpo_pushes_the_odds_apart_by_its_weight(job, tmp_path):
    def ratio(lam):
        script, config = job("orpo", data=clear_pairs(tmp_path), lam=lam, warmup=2, epochs=0.6, eval_every=99)
        script.main(config)
        return rows(config.out)[-1]["eval_log_odds_ratio"]

    none, some, much = (ratio(lam) for lam in (0.0, 1.0, 4.0))
    assert none + 0.1 < some and some + 0.1 < much


@pytest.mark.parametrize("init", ["base", "sft"])
def test_orpo_imitates_the_response_alone_where_told(init, job, request):
    script, config = job("orpo", epochs=0.03, nll="response", init=request.getfixturevalue(init))
    script.main(config)
    assert all(row["nll"] == pytest.approx(-row["mean_logp_chosen"], rel=1e-5) for row in steps(config.out))
    script, config = job("orpo", epochs=0.03, init=request.getfixturevalue(init))
    script.main(config)
    assert all(abs(row["nll"] + row["mean_logp_chosen"]) > 1e-3 for row in steps(config.out))
