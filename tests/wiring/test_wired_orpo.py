"""What train_orpo.main wires up, against ORPO by its formulas (wires.py)."""

import math

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from test_wired_dpo import HELD_OUT, PAIRS, sides, written
from torch.nn.functional import logsigmoid
from wires import logprobs, padded, policy_at, spy, user

import train_orpo
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "lam": 0.6, "max_length": 24, "adam_eps": 1e-4, "steps": 4, "batch_size": 4, "micro_tokens": 80,
    "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 3,
    "save_every": 2, "log_every": 1, "device": "cpu:0",
}  # fmt: skip


@pytest.fixture
def config(tiny, tmp_path):
    files = written(tmp_path)
    return train_orpo.Config(init=f"{tiny}/base.pt", **files, **OFF, out=str(tmp_path / "orpo.pt"))


def measured(config, policy, both, p):
    """→ a dict of values (B,) of what is logged."""
    means, nlls = [], []
    for side in both:
        ids, mask = padded(side)
        means.append(logprobs(policy, ids, mask).sum(1) / mask.sum(1))
        lengths = torch.tensor([len(own) for own, _ in side])
        imitated = (torch.arange(ids.shape[1]) < lengths[:, None]) if config.nll == "all" else mask.clone()
        imitated[:, 0] = False
        nlls.append(-logprobs(policy, ids, imitated).sum(1) / imitated.sum(1))
    odds = [m - torch.log(1 - m.exp()) for m in means]
    nll, ratio = p * nlls[0] + (1 - p) * nlls[1], odds[0] - odds[1]
    apart = -p * logsigmoid(ratio) - (1 - p) * logsigmoid(-ratio)
    return {
        "loss": nll + config.lam * apart, "nll": nll, "odds_loss": apart, "log_odds_ratio": ratio,
        "accuracy": (ratio > 0).double(), "mean_logp_chosen": means[0], "mean_logp_rejected": means[1],
    }  # fmt: skip


@pytest.mark.parametrize("nll", ["all", "response"])
def test_orpo_is_its_formulas_from_pairs_to_weights_and_log(double, config, monkeypatch, capsys, nll):
    config.nll = nll
    names = "load_policy", "BatchOrder", "respond", "evaluate", "measure"
    seen = {name: spy(monkeypatch, train_orpo, name) for name in names}
    splits, pieces = spy(monkeypatch, train_orpo, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_orpo.main(config)
    out = capsys.readouterr().out

    policy, start = (policy_at(config.init) for _ in range(2))
    both, p = sides(PAIRS, 24)
    held_out = sides([row for row in HELD_OUT if row.get("probability") != 0.5], 24)
    [order] = seen["BatchOrder"]
    assert list(order.lengths) == [max(map(len, (a[0], b[0]))) for a, b in zip(*both)]
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def mean(both, p):
        return {name: x.mean() for name, x in measured(config, policy, both, p).items()}

    def measure(rows):
        return mean([[side[i] for i in rows] for side in both], p[rows])

    first = measure(order.result[0])["odds_loss"].item()
    sizes = [len(a[0]) + len(b[0]) for a, b in zip(*both)]
    logged = wires.descend(policy, config, order.result, measure, lambda: mean(*held_out), sizes, eps=1e-4)
    wires.assert_logged(config, *logged)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", *(seen[name] for name in ("load_policy", "evaluate", "measure")))
    wires.assert_pieces(config, order.result, pieces, 2 * order.result.lengths)
    wires.assert_split(splits, "pairs", 500)
    asked = list(dict.fromkeys(row["prompt"] for row in HELD_OUT if row.get("probability") != 0.5))
    asked = [prompt for prompt in asked if wires.prompt_length({"prompt": prompt}) < 24]
    asked = [asked[i * len(asked) // 4] for i in range(4)]
    prompts = [WORLD.prompt(user(prompt)) for prompt in asked]
    wires.assert_answered(seen["respond"], seen["load_policy"][0].result[0], prompts, 5, 96)
    wires.assert_shown(out, seen["respond"], asked)
    assert len(seen["respond"]) == 2 and out.count("held-out pairs") == 2

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
    others = write_lines(tmp_path / "others.jsonl", PAIRS[::-1])
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
