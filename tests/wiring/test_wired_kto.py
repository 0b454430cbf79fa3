"""What train_kto.main wires up, against KTO by its formulas (wires.py)."""

import math

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from wires import example, logprobs, padded, policy_at, said, spy, user

import train_kto
from nanoalign import UserError
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.7, "max_length": 20, "steps": 4,
    "batch_size": 5, "micro_tokens": 50, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "clip": 0.4,
    "seed": 7, "eval_every": 3, "save_every": 2, "log_every": 1, "device": "cpu:0",
}  # fmt: skip
ROWS = [
    {"prompt": f"Why {said(i, 2 + i % 3)}?", "completion": said(i + 1, 1 + i % 4), "label": i % 3 > 0}
    for i in range(9)
]
ROWS.insert(3, {"prompt": said(1, 40), "completion": "Yes", "label": True})  # has no room
ROWS.append({"prompt": said(2, 9), "completion": said(3, 18), "label": False})  # is truncated
HELD_OUT = [
    {"prompt": f"How {said(i // 2, 3)}?", "completion": said(i + 3, 1 + i % 3), "label": i % 2 > 0}
    for i in range(10)
]
HELD_OUT.insert(2, {"prompt": said(5, 40), "completion": "Yes", "label": True})


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "data": write_lines(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }
    return train_kto.Config(init=f"{tiny}/policy.pt", **files, **OFF, out=str(tmp_path / "kto.pt"))


def usable(rows, max_length):
    kept = [row for row in rows if len(WORLD.prompt(user(row["prompt"]))) < max_length]
    made = [example(user(row["prompt"]), row["completion"], max_length) for row in kept]
    return made, torch.tensor([row["label"] for row in kept]), kept


@pytest.mark.parametrize("by_rule", [False, True], ids=["weighed by flags", "weighed by rule"])
def test_kto_is_its_formulas_from_rows_to_weights_and_log(double, config, monkeypatch, capsys, by_rule):
    if by_rule:
        config.desirable_weight = config.undesirable_weight = 0.0
    names = "load_policy", "BatchOrder", "collate", "respond", "sample_kl"
    told = "load_policy", "evaluate", "reference_point", "sequence_log_ratios"
    seen = {name: spy(monkeypatch, train_kto, name) for name in {*names, *told}}
    splits, pieces = spy(monkeypatch, train_kto, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_kto.main(config)
    out = capsys.readouterr().out

    policy, ref, start = (policy_at(config.init) for _ in range(3))
    examples, labels, _ = usable(ROWS, 20)
    held_out, eval_labels, _ = usable(HELD_OUT, 20)
    up, down = int(labels.sum()), int((~labels).sum())
    weights = (max(1, down / up), max(1, 0.75 * up / down)) if by_rule else (1.4, 0.7)
    [order] = seen["BatchOrder"]
    assert list(order.lengths) == [len(ids) for ids, _ in examples]
    assert (order.batch_size, order.seed, order.pool, order.least) == (5, 7, 8, 2)

    def ratios(made):
        ids, mask = padded(made)
        logp = logprobs(policy, ids, mask).sum(1)
        with torch.no_grad():
            ref_logp = logprobs(ref, ids, mask).sum(1)
        return logp, logp - ref_logp

    def measure(rows):
        own, label = [examples[i] for i in rows], labels[rows]
        joined = []
        for i in range(len(own)):
            prompt = [t for t, scored in zip(*own[i]) if not scored]
            response = [t for t, scored in zip(*own[(i + 1) % len(own)]) if scored]
            ids = (prompt + response)[:20]
            joined.append((ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))))
        z = max(0.0, ratios(joined)[1].mean().item())
        zs.append(z)
        logp, r = ratios(own)
        better = 1 - torch.sigmoid(config.beta * (r - z))
        worse = 1 - torch.sigmoid(config.beta * (z - r))
        loss = torch.where(label, weights[0] * better, weights[1] * worse).mean()
        kinds = {"chosen": label, "rejected": ~label}
        parts = {f"reward_{kind}": config.beta * r[of].mean() for kind, of in kinds.items()}
        parts |= {f"logp_{kind}": logp[of].mean() for kind, of in kinds.items()}
        return {"loss": loss, "z": z, "desirable": label.double().mean(), **parts}

    def look():
        r = config.beta * ratios(held_out)[1]
        above = [float(a > b) + 0.5 * float(a == b) for a in r[eval_labels] for b in r[~eval_labels]]
        margin = r[eval_labels].mean() - r[~eval_labels].mean()
        kls.append(seen["sample_kl"][len(kls)].result.mean())
        return {"auc": sum(above) / len(above), "margin": margin, "kl": kls[-1]}

    kls, zs = [], []
    wires.assert_logged(config, *wires.descend(policy, config, order.result, measure, look, order.lengths))
    assert zs[0] == 0 and sum(z > 0 for z in zs) >= 2  # or the clamp would hide it
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", *(seen[name] for name in told))
    wires.assert_pieces(config, order.result, pieces, order.lengths)
    wires.assert_split(splits, "labelled", 1000)
    ours = seen["load_policy"][0].result[0]
    _, _, kept = usable(HELD_OUT, 20)
    asked = list(dict.fromkeys(row["prompt"] for row in kept))
    prompts = [WORLD.prompt(user(prompt)) for prompt in asked]
    wires.assert_answered(seen["respond"], ours, prompts[:4], 7, 96)
    wires.assert_shown(out, seen["respond"], asked)
    assert out.count("held-out labelled rows") == 1 and out.count("step-0 check") == 1
    assert len(seen["respond"]) == len(seen["sample_kl"]) == 2
    for call in seen["sample_kl"]:
        assert call.policy is ours and call.seed == 7
        wires.assert_unmoved(call.ref, start)
        assert [list(x) for x in call.prompts] == [list(x) for x in prompts]

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("kto", True, 4)
    assert models(config.out) == ["policy", "reference"]
    due = torch.where(labels[order.result[0]], *map(float, weights)).mean().item() / 2
    assert f"step-0 check: loss {due:.6f}, half the mean weight = {due:.6f}" in out and math.isfinite(due)


def test_kto_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_kto, config, tmp_path)


def test_kto_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_kto, config, "GPT", "GPT")
    turned = write_lines(tmp_path / "turned.jsonl", [{**row, "label": not row["label"]} for row in ROWS])
    wires.assert_made_from(monkeypatch, train_kto, config, init=f"{tiny}/reference.pt", data=turned)
    others = write_lines(tmp_path / "others.jsonl", [{**row, "completion": "Yes"} for row in ROWS])
    wires.assert_made_from(monkeypatch, train_kto, config, data=others)


def test_kto_never_reads_more_tokens_than_the_model_and_needs_two_rows(config, monkeypatch, tmp_path):
    config.max_length = 500
    with monkeypatch.context() as patch:
        calls = spy(patch, train_kto, "labelled_examples")
        wires.made_from(patch, train_kto, config)
    assert [call.max_length for call in calls] == [wires.SHAPE.context] * 2
    config.data, config.max_length = write_lines(tmp_path / "two.jsonl", [ROWS[0], ROWS[3]]), 20
    with pytest.raises(UserError, match="single row"):
        train_kto.main(config)
    config.data, config.batch_size = write_lines(tmp_path / "both.jsonl", ROWS[:2]), 2
    wires.made_from(monkeypatch, train_kto, config)


def test_kto_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch,
        train_kto,
        config,
        ("chat model", {"init": f"{tiny}/base.pt"}),
        ("--batch-size", {"batch_size": 1}),
        ("", {"batch_size": 2}),
    )
