"""What train_dpo.main wires up, against its losses by their formulas (wires.py)."""

import copy
import math

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from torch.nn.functional import logsigmoid
from wires import example, logprobs, padded, policy_at, said, spy, user

import train_dpo
from nanoalign.checkpoint import load
from nanoalign.lora import adapters

OFF = {  # every flag that has a say in what is computed, off its default
    "beta": 0.3, "gamma": 0.4, "label_smoothing": 0.2, "sft_weight": 0.5, "max_length": 24,
    "max_new_tokens": 6, "steps": 4, "batch_size": 4, "micro_tokens": 80, "lr": 0.01, "warmup": 2,
    "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 3, "save_every": 2, "log_every": 1,
    "device": "cpu:0",
}  # fmt: skip
PAIRS = [
    {"prompt": f"Why {said(i, 2 + i % 3)}?", "chosen": said(i + 1, 2 + i % 4), "rejected": said(i, 4 - i % 3)}
    for i in range(8)
]
for i, p in {1: 0.8, 2: 0.6, 5: 0.9}.items():
    PAIRS[i]["probability"] = p
PAIRS.insert(3, {"prompt": said(1, 40), "chosen": "Yes", "rejected": "no", "probability": 0.7})  # has no room
PAIRS.append({"prompt": said(2, 9), "chosen": said(3, 18), "rejected": said(4, 17)})  # is truncated
HELD_OUT = [
    {"prompt": f"How {said(i // 2, 3)}?", "chosen": said(i + 3, 3), "rejected": said(i + 5, 1 + i % 3)}
    for i in range(10)
]
HELD_OUT[1]["probability"], HELD_OUT[4]["probability"], HELD_OUT[6]["probability"] = 0.75, 0.5, 0.6
HELD_OUT.insert(2, {"prompt": said(5, 40), "chosen": "Yes", "rejected": "no", "probability": 0.9})


def written(tmp_path) -> dict:
    return {
        "data": write_lines(tmp_path / "pairs.jsonl", PAIRS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }


@pytest.fixture
def config(tiny, tmp_path):
    return train_dpo.Config(
        init=f"{tiny}/policy.pt", **written(tmp_path), **OFF, out=str(tmp_path / "dpo.pt")
    )


def sides(rows, max_length):
    """Pair rows that leave room for a response → examples of both sides, and the probabilities."""
    kept = [row for row in rows if len(WORLD.prompt(user(row["prompt"]))) < max_length]
    both = [
        [example(user(row["prompt"]), row[side], max_length) for row in kept]
        for side in ("chosen", "rejected")
    ]
    return both, torch.tensor([row.get("probability", 1.0) for row in kept])


def loss_of(config, h):
    beta, eps = config.beta, config.label_smoothing
    kept, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    return {
        "dpo": kept, "cdpo": (1 - eps) * kept + eps * flipped, "ipo": (h - 1 / (2 * beta)) ** 2,
        "robust": ((1 - eps) * kept - eps * flipped) / (1 - 2 * eps),
        "simpo": -logsigmoid(beta * h - config.gamma),
    }[config.loss]  # fmt: skip


def measured(config, policy, ref, both, p, sft_weight):
    """→ a dict of values (B,) of what is logged."""
    logps, ratios, means = [], [], []
    for ids, mask in map(padded, both):
        own = logprobs(policy, ids, mask).sum(1)
        with torch.no_grad():
            theirs = 0 if config.loss == "simpo" else logprobs(ref, ids, mask).sum(1)
        by = mask.sum(1) if config.loss in ("ipo", "simpo") else 1
        logps.append(own)
        ratios.append((own - theirs) / by)
        means.append(own / mask.sum(1))
    h = ratios[0] - ratios[1]
    loss = p * loss_of(config, h) + (1 - p) * loss_of(config, -h)
    loss = loss - sft_weight * (p * means[0] + (1 - p) * means[1])
    return {
        "loss": loss, "reward_chosen": config.beta * ratios[0], "reward_rejected": config.beta * ratios[1],
        "margin": config.beta * h, "accuracy": (h > 0).double(), "logp_chosen": logps[0],
        "logp_rejected": logps[1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "loss, sft_weight", [("cdpo", 0.5), ("dpo", 0.0), ("simpo", 0.0), ("ipo", 0.0), ("robust", 0.0)]
)
def test_dpo_is_its_formulas_from_pairs_to_weights_and_log(
    double, config, monkeypatch, capsys, loss, sft_weight
):
    config.loss, config.sft_weight = loss, sft_weight
    names = "load_policy", "BatchOrder", "collate", "respond", "sample_kl"
    told = "load_policy", "evaluate", "measure", "soft_labels"
    seen = {name: spy(monkeypatch, train_dpo, name) for name in {*names, *told}}
    splits, pieces = spy(monkeypatch, train_dpo, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_dpo.main(config)
    out = capsys.readouterr().out

    policy, ref, start = (policy_at(config.init) for _ in range(3))
    both, p = sides(PAIRS, 24)
    held_out, q = sides([row for row in HELD_OUT if row.get("probability") != 0.5], 24)
    [order] = seen["BatchOrder"]
    assert list(order.lengths) == [max(map(len, (a[0], b[0]))) for a, b in zip(*both)]
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def measure(rows):
        own = [[side[i] for i in rows] for side in both]
        return {name: x.mean() for name, x in measured(config, policy, ref, own, p[rows], sft_weight).items()}

    def look():
        found = measured(config, policy, ref, held_out, q, 0.0)
        kl = {} if loss == "simpo" else {"kl": seen["sample_kl"][len(kls)].result.mean()}
        kls.append(kl)
        return {"loss": found["loss"].mean(), "accuracy": found["accuracy"].mean(), **kl}

    sizes, kls = [len(a[0]) + len(b[0]) for a, b in zip(*both)], []
    wires.assert_logged(config, *wires.descend(policy, config, order.result, measure, look, sizes))
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", *(seen[name] for name in told))
    wires.assert_pieces(config, order.result, pieces, 2 * order.result.lengths)
    wires.assert_split(splits, "pairs", 500)
    ours = seen["load_policy"][0].result[0]
    asked = list(dict.fromkeys(row["prompt"] for row in HELD_OUT))
    asked = [prompt for prompt in asked if wires.prompt_length({"prompt": prompt}) < 24]
    prompts = [WORLD.prompt(user(prompt)) for prompt in asked]
    wires.assert_answered(seen["respond"], ours, prompts[:4], 5, 6)
    wires.assert_shown(out, seen["respond"], asked)
    assert len(seen["respond"]) == 2 and len(seen["sample_kl"]) == (0 if loss == "simpo" else 2)
    for call in seen["sample_kl"]:
        assert call.policy is ours and (call.max_new_tokens, call.seed) == (6, 5)
        wires.assert_unmoved(call.ref, start)
        assert [list(x) for x in call.prompts] == [list(x) for x in prompts]

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("dpo", True, 4)
    assert models(config.out) == (["policy"] if loss == "simpo" else ["policy", "reference"])
    assert out.count("held-out pairs") == 2
    assert out.count("step-0 check: loss") == (loss != "simpo" and not sft_weight)
    begin = {"ipo": 1 / (4 * 0.3**2)}.get(loss, math.log(2))
    assert loss == "simpo" or sft_weight or f"= {begin:.6f}\n" in out


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_with_adapters_is_its_formulas_measured_from_the_base(double, config, monkeypatch, loss):
    config.loss, config.sft_weight, config.lora, config.lora_alpha = loss, 0.0, 2, 3.0
    made = spy(monkeypatch, train_dpo, "make_optimizer", keep=lambda given: copy.deepcopy(given["model"]))
    orders, kl = (spy(monkeypatch, train_dpo, name) for name in ("BatchOrder", "sample_kl"))
    train_dpo.main(config)

    policy, ref, looked = made[0].kept, policy_at(config.init), []
    both, p = sides(PAIRS, 24)
    held_out, q = sides([row for row in HELD_OUT if row.get("probability") != 0.5], 24)

    def measure(rows):
        own = [[side[i] for i in rows] for side in both]
        return {name: x.mean() for name, x in measured(config, policy, ref, own, p[rows], 0.0).items()}

    def look():
        found = measured(config, policy, ref, held_out, q, 0.0)
        looked.append(kl[len(looked)].result.mean())
        return {"loss": found["loss"].mean(), "accuracy": found["accuracy"].mean(), "kl": looked[-1]}

    sizes = [len(a[0]) + len(b[0]) for a, b in zip(*both)]
    wires.assert_logged(config, *wires.descend(policy, config, orders[0].result, measure, look, sizes))
    found = load(config.out)["model"]
    assert found.keys() == adapters(policy).keys()
    for name, weight in adapters(policy).items():
        torch.testing.assert_close(found[name].double(), weight, atol=2e-6, rtol=1e-5, msg=name)
    for call in kl:
        wires.assert_unmoved(call.ref, ref)


def test_dpo_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_dpo, config, tmp_path)


def test_dpo_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_dpo, config, "GPT", "GPT")
    wires.assert_prepared(monkeypatch, train_dpo, wires.replaced(config, loss="simpo"), "GPT")
    surer = [{**row, "probability": 0.95} if "probability" in row else row for row in PAIRS]
    wires.assert_made_from(monkeypatch, train_dpo, config, init=f"{tiny}/reference.pt",
                           data=write_lines(tmp_path / "surer.jsonl", surer))  # fmt: skip
    others = write_lines(tmp_path / "others.jsonl", [{**row, "chosen": "Yes"} for row in PAIRS])
    wires.assert_made_from(monkeypatch, train_dpo, config, data=others)


def test_dpo_takes_beta_from_the_paper_and_never_more_tokens_than_the_model_reads(config, monkeypatch):
    for loss, beta in [("dpo", 0.1), ("ipo", 0.1), ("simpo", 2.0)]:
        own = wires.replaced(config, loss=loss, beta=0.0, max_length=500)
        with monkeypatch.context() as patch:
            calls = spy(patch, train_dpo, "pair_examples")
            wires.made_from(patch, train_dpo, own)
        assert own.beta == beta and [call.max_length for call in calls] == [wires.SHAPE.context] * 2


def test_dpo_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch,
        train_dpo,
        config,
        ("chat model", {"init": f"{tiny}/base.pt"}),
        ("--loss", {"loss": "hinge"}),
        ("--max-new", {"max_new_tokens": 0}),
        ("", {"max_new_tokens": 1}),
    )
