"""What train_orpo.main wires up, against ORPO by its formulas (wires.py)."""

import math

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from test_wired_dpo import HELD_OUT, PAIRS
from torch.nn.functional import logsigmoid
from wires import example, logprobs, padded, policy_at, spy, user

import train_orpo
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "lam": 0.6, "max_length": 24, "adam_eps": 1e-4, "steps": 4, "batch_size": 4, "micro_tokens": 80,
    "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 3,
    "save_every": 2, "log_every": 1, "device": "cpu:0",
}  # fmt: skip
SURE = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in PAIRS]


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "data": write_lines(tmp_path / "pairs.jsonl", SURE),
        "eval_data": write_lines(
            tmp_path / "held.jsonl", [row for row in HELD_OUT if "probability" not in row]
        ),
    }
    return train_orpo.Config(init=f"{tiny}/base.pt", **files, **OFF, out=str(tmp_path / "orpo.pt"))


def sides(rows, max_length):
    kept = [row for row in rows if len(WORLD.prompt(user(row["prompt"]))) < max_length]
    return [
        [example(user(row["prompt"]), row[side], max_length) for row in kept]
        for side in ("chosen", "rejected")
    ]


def measured(config, policy, both):
    """→ a dict of values (B,) of what is logged."""
    means = []
    for ids, mask in map(padded, both):
        means.append(logprobs(policy, ids, mask).sum(1) / mask.sum(1))
    odds = [m - torch.log(1 - m.exp()) for m in means]
    nll, ratio = -means[0], odds[0] - odds[1]
    if config.nll == "all":
        ids, _ = padded(both[0])
        real = torch.arange(ids.shape[1]) < torch.tensor([len(own) for own, _ in both[0]])[:, None]
        real[:, 0] = False
        own = logprobs(policy, ids, real)
        counted = torch.arange(ids.shape[1]) < torch.tensor([len(own) for own, _ in both[0]])[:, None]
        nll = -own.sum(1) / (counted.sum(1) - 1)
    return {
        "loss": nll - config.lam * logsigmoid(ratio), "nll": nll, "odds_loss": -logsigmoid(ratio),
        "log_odds_ratio": ratio, "accuracy": (ratio > 0).double(), "mean_logp_chosen": means[0],
        "mean_logp_rejected": means[1],
    }  # fmt: skip


@pytest.mark.parametrize("nll", ["all", "response"])
def test_orpo_is_its_formulas_from_pairs_to_weights_and_log(double, config, monkeypatch, capsys, nll):
    config.nll = nll
    names = "load_policy", "BatchOrder", "collate", "respond", "evaluate", "measure"
    seen = {name: spy(monkeypatch, train_orpo, name) for name in names}
    train_orpo.main(config)
    out = capsys.readouterr().out

    policy, start = (policy_at(config.init) for _ in range(2))
    both, held_out = sides(SURE, 24), sides([row for row in HELD_OUT if "probability" not in row], 24)
    [order] = seen["BatchOrder"]
    assert list(order.lengths) == [max(map(len, (a[0], b[0]))) for a, b in zip(*both)]
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def mean(sides):
        return {name: x.mean() for name, x in measured(config, policy, sides).items()}

    first = mean([[side[i] for i in order.result[0]] for side in both])["odds_loss"].item()
    logged = wires.descend(
        policy, config, order.result, lambda rows: mean([[side[i] for i in rows] for side in both]),
        lambda: mean(held_out), eps=1e-4,
    )  # fmt: skip
    wires.assert_logged(config, *logged)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", *(seen[name] for name in ("load_policy", "evaluate", "measure")))
    wires.assert_pieces(config, seen["collate"][:2])
    asked = list(dict.fromkeys(row["prompt"] for row in HELD_OUT if "probability" not in row))
    prompts = [WORLD.prompt(user(prompt))[-12:] for prompt in asked][:4]
    wires.assert_answered(seen["respond"], seen["load_policy"][0].result[0], prompts, 5, 96)
    assert len(seen["respond"]) == 2

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("orpo", True, 4)
    assert models(config.out) == ["policy"]
    assert out.count(f"step-0 check: odds part {first:.4f}, near ln 2 = {math.log(2):.4f}") == 1
    assert out.count("step-0 check") == 1


def test_orpo_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_orpo, config, tmp_path)


def test_orpo_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_orpo, config, "GPT")
    others = write_lines(tmp_path / "others.jsonl", SURE[::-1])
    wires.assert_made_from(monkeypatch, train_orpo, config, init=f"{tiny}/reference.pt", data=others)
    config.max_length = 500
    calls = spy(monkeypatch, train_orpo, "pair_examples")
    wires.made_from(monkeypatch, train_orpo, config)
    assert [call.max_length for call in calls] == [wires.SHAPE.context] * 2


def test_orpo_starts_from_any_policy_and_knows_two_kinds_of_nll(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch, train_orpo, config, ("", {"init": f"{tiny}/policy.pt"}), ("--nll", {"nll": "none"}),
        ("", {"nll": "response"}),
    )  # fmt: skip
