"""What train_rm.main wires up, against the Bradley–Terry loss by its formula (wires.py)."""

import copy

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from torch.nn.functional import logsigmoid
from wires import example, policy_at, said, spy, user

import train_rm
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "label_smoothing": 0.15, "centering": 0.2, "max_length": 24, "steps": 4, "batch_size": 3,
    "micro_tokens": 100, "lr": 0.02, "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5,
    "eval_every": 3, "save_every": 2, "log_every": 1, "device": "cpu:0",
}  # fmt: skip


def pair(i: int, prompt: int, **more) -> dict:
    words = said(i + 1, 2 + i % 4), said(i + 2, 1 + i % 3)
    return {
        "prompt": f"Why {said(prompt, 2 + prompt % 3)}?",
        "chosen": words[0],
        "rejected": words[1],
        **more,
    }


PAIRS = [pair(i, i // 2 if i < 8 else i) for i in range(12)]
for i, more in {1: {"margin": 0.7}, 2: {"probability": 0.8}, 6: {"margin": 0.3, "probability": 0.6}}.items():
    PAIRS[i] |= more
PAIRS.insert(3, {"prompt": said(1, 40), "chosen": "Yes", "rejected": "no", "probability": 0.7})  # has no room
PAIRS.append({"prompt": said(2, 9), "chosen": said(3, 18), "rejected": said(4, 17)})  # is truncated
HELD_OUT = [pair(i + 20, i // 2 + 30) for i in range(8)]
HELD_OUT[1]["probability"], HELD_OUT[4]["probability"], HELD_OUT[6]["margin"] = 0.75, 0.5, 0.9


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "data": write_lines(tmp_path / "pairs.jsonl", PAIRS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }
    return train_rm.Config(init=f"{tiny}/policy.pt", **files, **OFF, out=str(tmp_path / "rm.pt"))


def grouped(rows):
    """Pair rows that leave room for a response → of each prompt [(row, chosen, rejected)]."""
    prompts = {}
    for row in rows:
        if len(WORLD.prompt(user(row["prompt"]))) < 24:
            sides = [example(user(row["prompt"]), row[side], 24) for side in ("chosen", "rejected")]
            prompts.setdefault(row["prompt"], []).append((row, *sides))
    return list(prompts.values())


def score(model, one):
    """The head's output at an example's last token, read alone."""
    return model(torch.tensor([one[0]]))[0, -1]


def distinct(prompt):
    return {tuple(side[0]): side for _, *sides in prompt for side in sides}


def test_the_reward_loss_is_its_formula_from_pairs_to_weights_and_log(double, config, monkeypatch, capsys):
    names = "load_policy", "BatchOrder", "collate", "normalise", "evaluate"
    seen = {name: spy(monkeypatch, train_rm, name) for name in names}
    made = spy(monkeypatch, train_rm, "make_optimizer", keep=lambda given: copy.deepcopy(given["model"]))
    splits, pieces = spy(monkeypatch, train_rm, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_rm.main(config)
    out = capsys.readouterr().out

    model, start, trunk = made[0].kept, copy.deepcopy(made[0].kept), policy_at(config.init)
    for name, weight in trunk.state_dict().items():
        assert torch.equal(weight, start.gpt.state_dict()[name]), name  # it reads as the policy did …
    assert start.score.weight.std() > 0.1 and not start.score.bias.any()  # … and has a head of its own
    prompts, held_out = grouped(PAIRS), grouped([row for row in HELD_OUT if row.get("probability") != 0.5])
    [order] = seen["BatchOrder"]
    assert order.lengths == [max(len(side[0]) for _, *sides in p for side in sides) for p in prompts]
    assert (order.batch_size, order.seed, order.pool, order.least) == (3, 5, 1, 1)

    def bradley_terry(chosen, rejected, margin, p, smoothing, centering):
        p = (1 - smoothing) * p + smoothing * (1 - p)
        d = chosen - rejected - margin
        return -p * logsigmoid(d) - (1 - p) * logsigmoid(-d) + centering * (chosen + rejected) ** 2

    def measure(rows):
        sums = {}
        for i in rows:
            for row, chosen, rejected in prompts[i]:
                a, b = score(model, chosen), score(model, rejected)
                p, m = row.get("probability", 1.0), row.get("margin", 0.0)
                found = {
                    "loss": bradley_terry(a, b, m, p, 0.15, 0.2),
                    "accuracy": 1.0 * (a > b),
                    "margin": a - b,
                }
                for name, value in {**found, "score": (a + b) / 2}.items():
                    sums[name] = sums.get(name, 0) + value / len(prompts[i]) / len(rows)
        return sums

    def look():
        hits, groups, losses = [], [], []
        for number, prompt in enumerate(held_out):
            for row, chosen, rejected in prompt:
                a, b = score(model, chosen), score(model, rejected)
                hits.append(1.0 * (a > b))
                groups.append(number)
                losses.append(bradley_terry(a, b, 0.0, row.get("probability", 1.0), 0.0, 0.0))
        hits = torch.tensor(hits)
        return {
            "accuracy": hits.mean(),
            "accuracy_error": wires.clustered(hits, groups),
            "loss": sum(losses) / len(losses),
        }

    sizes = [sum(len(ids) for ids, _ in distinct(prompt).values()) for prompt in prompts]
    wires.assert_logged(config, *wires.descend(model, config, order.result, measure, look, sizes))
    every = [side for prompt in prompts for side in distinct(prompt).values()]
    with torch.no_grad():
        raw = torch.stack([score(model, one) for one in every])
        assert len(seen["normalise"][0].responses) == len(every)
        mean, std = raw.mean(), raw.std()
        model.score.weight /= std
        model.score.bias.sub_(mean).div_(std)
    content = load(config.out)
    wires.assert_same_weights(content["model"], model, moved_from=start)
    assert content["normalisation"] == pytest.approx({"mean": mean.item(), "std": std.item()}, rel=1e-6)
    wires.assert_on("cpu:0", seen["load_policy"], seen["normalise"], seen["evaluate"])
    assert len(seen["evaluate"]) == 3  # with a random head, too
    assert all(call.prompts is seen["evaluate"][-1].prompts for call in seen["evaluate"])
    costs = order.result.lengths * [len(distinct(prompt)) for prompt in prompts]  # each response a row
    wires.assert_pieces(config, order.result, pieces, costs)
    wires.assert_split(splits, "pairs")
    assert out.count("held-out pairs") == 2

    assert (content["stage"], content["chat"], content["step"]) == ("rm", False, 4)
    assert models(config.out) == ["reward"]
    ended = sum(one[0][-1] == WORLD.end for one in every)
    assert f"step-0 check: {ended:,} of {len(every):,} responses scored at their end token" in out


def test_scores_are_normalised_on_the_first_2000_responses(config, monkeypatch, tmp_path):
    many = [{"prompt": f"{i}?", "chosen": said(i, 2), "rejected": said(i + 1, 1)} for i in range(1010)]
    config.data, config.steps, config.micro_tokens = write_lines(tmp_path / "many.jsonl", many), 1, 0
    calls = spy(monkeypatch, train_rm, "normalise")
    train_rm.main(config)
    assert len(calls[0].responses) == 2000


def test_a_reward_model_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_rm, config, tmp_path)


def test_a_reward_model_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_rm, config, "GPT")
    others = write_lines(tmp_path / "others.jsonl", PAIRS[::-1])
    wires.assert_made_from(monkeypatch, train_rm, config, init=f"{tiny}/reference.pt", data=others)
    config.max_length = 500
    calls = spy(monkeypatch, train_rm, "pair_examples")
    wires.made_from(monkeypatch, train_rm, config)
    assert [call.max_length for call in calls] == [wires.SHAPE.context] * 2


def test_a_reward_model_refuses_what_it_cannot_do(config, monkeypatch, tiny):
    wires.assert_refused(
        monkeypatch,
        train_rm,
        config,
        ("chat model", {"init": f"{tiny}/base.pt"}),
    )
