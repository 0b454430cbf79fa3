"""What train_prm.main wires up, against its loss by the formula (wires.py)."""

import copy

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from torch.nn.functional import logsigmoid
from wires import logprobs, padded, policy_at, said, spy, user

import train_prm
from nanoalign import UserError
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "neutral": "ignore", "lm_weight": 0.7, "max_length": 30, "steps": 4, "batch_size": 4,
    "micro_tokens": 60, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5,
    "eval_every": 3, "save_every": 2, "log_every": 1, "device": "cpu:0",
}  # fmt: skip


def solution(i: int, labels: list, **more) -> dict:
    steps = [said(i + k, 1 + (i + k) % 3) for k in range(len(labels))]
    return {
        "prompt": f"Why {said(i, 2 + i % 3)}?",
        "completions": steps,
        "labels": labels,
        "label": i % 2 > 0,
        **more,
    }


LABELS = [
    [True, False],
    [1, None, 0],
    [0.8, 0.3],
    [None, True, True],
    [True],
    [False, False],
    [0.25, True, None],
]
ROWS = [solution(i, labels) for i, labels in enumerate(LABELS)]
ROWS += [
    solution(8, [True, True, False], neutral=[1]),
    solution(9, [None, None]),
    solution(10, [True, False] * 6),
]
HELD_OUT = [
    solution(20 + i, labels)
    for i, labels in enumerate([[True, False], [True, True], [0.7, 0.2, None], [False]])
]


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "data": write_lines(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }
    return train_prm.Config(init=f"{tiny}/policy.pt", **files, **OFF, out=str(tmp_path / "prm.pt"))


def read(rows, config):
    """Rows of steps → (ids, {position: label}, positions of right steps' tokens), those with a label."""
    found = []
    for row in rows:
        ids, at, right = WORLD.prompt(user(row["prompt"])).tolist(), {}, []
        for k, (step, label) in enumerate(zip(row["completions"], row["labels"])):
            words = WORLD.encode(step if k else " " + step)
            if len(ids) + len(words) >= config.max_length:  # its end is cut off
                ids = (ids + words)[: config.max_length]
                break
            if config.neutral == "ignore" and k in row.get("neutral", []):
                label = None
            good = label is not None and label >= 0.5
            if config.outcome:
                good = row["label"]
                label = row["label"] if k + 1 == len(row["labels"]) else None
            right += range(len(ids), len(ids) + len(words)) if good else ()
            ids += [*words, WORLD.step]
            if label is not None:
                at[len(ids) - 1] = float(label)
        if at:
            found.append((ids, at, right))
    return found


@pytest.mark.parametrize(
    "outcome, lm_weight, reader", [(False, 0.7, True), (True, 0.7, False), (False, 0.0, True)]
)
def test_the_process_loss_is_its_formula_from_steps_to_weights_and_log(
    double, config, monkeypatch, capsys, outcome, lm_weight, reader, tiny
):
    config.outcome, config.lm_weight, config.reader = outcome, lm_weight, reader
    config.init = config.init if lm_weight else f"{tiny}/untied.pt"
    names = "load_policy", "BatchOrder", "collate", "evaluate"
    seen = {name: spy(monkeypatch, train_prm, name) for name in names}
    made = spy(monkeypatch, train_prm, "make_optimizer", keep=lambda given: copy.deepcopy(given["model"]))
    splits, pieces = spy(monkeypatch, train_prm, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_prm.main(config)
    out = capsys.readouterr().out

    model, start, trunk = made[0].kept, copy.deepcopy(made[0].kept), policy_at(config.init)
    newline = WORLD.encode("\n")[0]
    assert newline == WORLD.newlines[0]
    with torch.no_grad():
        trunk.embed.weight[WORLD.step] = trunk.embed.weight[newline]
    for name, weight in trunk.state_dict().items():
        assert name == "head.weight" or torch.equal(weight, start.gpt.state_dict()[name]), name
    trunk.head.weight.data[WORLD.step] = trunk.head.weight[newline].detach()  # where it is another matrix
    wires.assert_reads(model, trunk if reader else None)
    assert start.score.weight.std() > 0.1 and not start.score.bias.any()
    examples, held_out = read(ROWS, config), read(HELD_OUT, config)
    [order] = seen["BatchOrder"]
    assert order.lengths == [len(ids) for ids, *_ in examples]
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def probabilities(ids, at):
        z = model(torch.tensor([ids]))[0]
        return [(z[position], label) for position, label in at.items()]

    def cross_entropy(own):
        marks = [mark for ids, at, _ in own for mark in probabilities(ids, at)]
        return sum(-y * logsigmoid(z) - (1 - y) * logsigmoid(-z) for z, y in marks) / len(marks)

    def measure(rows):
        own = [examples[i] for i in rows]
        loss, written = cross_entropy(own), max(1, sum(len(right) for *_, right in own))
        ids, _ = padded([(ids, [True] * len(ids)) for ids, *_ in own])
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (*_, right) in enumerate(own):
            mask[row, right] = True
        nll = -logprobs(lambda ids: model.hidden(ids) @ model.gpt.embed.weight.t(), ids, mask).sum() / written
        logged.append(loss.item())
        return {"loss": loss + config.lm_weight * nll}

    def look():
        marks = [mark for ids, at, _ in held_out for mark in probabilities(ids, at)]
        truth, found = [y >= 0.5 for _, y in marks], [z for z, _ in marks]
        ups = [z for z, y in zip(found, truth) if y]
        downs = [z for z, y in zip(found, truth) if not y]
        auc = sum(float(a > b) + 0.5 * float(a == b) for a in ups for b in downs) / (len(ups) * len(downs))
        accuracy = sum(bool(z >= 0) == y for z, y in zip(found, truth)) / len(truth)
        return {
            "loss": cross_entropy(held_out),
            "auc": auc,
            "accuracy": accuracy,
            "right": sum(truth) / len(truth),
        }

    logged = []
    steps, looks = wires.descend(model, config, order.result, measure, look, order.lengths)
    steps = [
        {**row, "loss": loss} for row, loss in zip(steps, logged)
    ]  # the part of the language is not logged
    wires.assert_logged(config, steps, looks)
    wires.assert_same_weights(load(config.out)["model"], model, moved_from=start)
    wires.assert_on("cpu:0", seen["load_policy"], seen["evaluate"])
    assert len(seen["evaluate"]) == 3
    assert all(call.examples is seen["evaluate"][-1].examples for call in seen["evaluate"])
    wires.assert_pieces(config, order.result, pieces, order.lengths)
    wires.assert_split(splits, "steps")
    assert out.count("held-out solutions") == 1

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("prm", False, 4)
    assert content["kind"] == ("outcome" if outcome else "process")
    assert models(config.out) == ["process reward"] and "step-0 check: AUC" in out


def test_a_head_apart_from_the_embedding_has_no_part_in_the_language_loss(config, tiny):
    config.init = f"{tiny}/untied.pt"
    with pytest.raises(UserError, match="--lm-weight 0"):
        train_prm.main(config)


def test_a_process_model_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_prm, config, tmp_path)


def test_a_process_model_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_prm, config, "GPT")
    others = write_lines(tmp_path / "others.jsonl", ROWS[::-1])
    wires.assert_made_from(monkeypatch, train_prm, config, init=f"{tiny}/reference.pt", data=others)
    config.max_length = 500
    calls = spy(monkeypatch, train_prm, "step_examples")
    wires.made_from(monkeypatch, train_prm, config)
    assert [call.max_length for call in calls] == [wires.SHAPE.context] * 2


def test_a_process_model_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch,
        train_prm,
        config,
        ("chat model", {"init": f"{tiny}/base.pt"}),
        ("--neutral", {"neutral": "bad"}),
        ("", {"neutral": "good"}),
    )
