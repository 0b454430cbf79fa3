"""What train_sft.main wires up, against cross-entropy on the answers (wires.py)."""

import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from wires import logprobs, padded, policy_at, said, spy, user

import train_sft
from nanoalign.checkpoint import load

OFF = {  # every flag that has a say in what is computed, off its default
    "max_length": 24, "adam_eps": 1e-4, "steps": 4, "batch_size": 4, "micro_tokens": 50, "lr": 0.02,
    "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 3, "save_every": 2,
    "log_every": 1, "device": "cpu:0",
}  # fmt: skip


def chat(i: int, first: int, second=0, turns=1) -> dict:
    messages = []
    for turn in range(turns):
        messages += [
            *user(f"Why {said(i + turn, first)}?"),
            {"role": "assistant", "content": said(i + 7, 1 + second)},
        ]
    return {"messages": messages}


ROWS = [chat(i, 1 + i % 3, i % 4, turns=1 + i % 2) for i in range(9)]
ROWS.insert(3, chat(2, 40))  # has no room
ROWS.append(chat(3, 4, 20))  # is truncated
HELD_OUT = [chat(20 + i, 1 + i % 4, i % 3) for i in range(6)]
HELD_OUT.insert(1, {"messages": [{"role": "assistant", "content": "Yes"}]})  # nobody has asked
HELD_OUT.append(chat(31, 20, 1))


@pytest.fixture
def config(tiny, tmp_path):
    files = {
        "data": write_lines(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }
    return train_sft.Config(init=f"{tiny}/base.pt", **files, **OFF, out=str(tmp_path / "sft.pt"))


def rendered(rows, max_length=24):
    """Conversations → ids and mask, cut; those without an answer in it are dropped."""
    made = []
    for row in rows:
        ids, mask = [], []
        for message in row["messages"]:
            body = WORLD.response(message["content"]).tolist()
            ids += [*WORLD.opening[message["role"]], *body]
            mask += [False, *[message["role"] == "assistant"] * len(body)]
        made.append((ids[:max_length], mask[:max_length]))
    return [example for example in made if any(example[1])]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_is_cross_entropy_on_answers_from_chats_to_weights_and_log(
    double, config, monkeypatch, capsys, packing
):
    config.packing = packing
    names = "load_policy", "BatchOrder", "collate", "respond", "packed_hidden", "evaluate"
    seen = {name: spy(monkeypatch, train_sft, name) for name in names}
    splits, pieces = spy(monkeypatch, train_sft, "read_split"), wires.spy_on_pieces(monkeypatch)
    train_sft.main(config)
    out = capsys.readouterr().out

    policy, start = (policy_at(config.init) for _ in range(2))
    examples, held_out = rendered(ROWS), rendered(HELD_OUT)
    [order] = seen["BatchOrder"]
    assert list(order.lengths) == [len(ids) for ids, _ in examples]
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def loss_of(made):
        ids, mask = padded(made)
        return {"loss": -logprobs(policy, ids, mask).sum() / mask.sum()}

    def measure(rows):
        return loss_of([examples[i] for i in rows])

    logged = wires.descend(
        policy, config, order.result, measure, lambda: loss_of(held_out), order.lengths, eps=1e-4
    )
    wires.assert_logged(config, *logged)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", seen["load_policy"], seen["evaluate"])
    wires.assert_pieces(config, order.result, pieces, order.lengths)
    wires.assert_split(splits, "chat", 500)
    asked = [row["messages"][:-1] for row in HELD_OUT if row["messages"][0]["role"] == "user"]
    asked = [messages for messages in asked if len(WORLD.prompt(messages)) < 24]
    asked = [asked[i * len(asked) // 4] for i in range(4)]
    prompts = [WORLD.prompt(messages) for messages in asked]
    wires.assert_answered(seen["respond"], seen["load_policy"][0].result[0], prompts, 5, 64)
    wires.assert_shown(out, seen["respond"], [messages[-1]["content"] for messages in asked])
    assert len(seen["respond"]) == 2 and out.count("held-out chat rows") == 1

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("sft", True, 4)
    assert models(config.out) == ["policy"]
    whole = sum(len(ids) < 24 for ids, _ in examples)
    assert f"step-0 check: {whole} of {whole} closing end tokens are scored" in out


def test_sft_packs_whole_conversations_and_nothing_else(config, monkeypatch):
    for packing in (False, True):
        with monkeypatch.context() as patch:
            calls, read = spy(patch, train_sft, "packed_hidden"), spy(patch, train_sft, "token_losses")
            train_sft.main(wires.replaced(config, packing=packing))
        assert len(calls) == packing * len(read) and len(read) > config.steps
        for call in calls:
            lengths = call.own.sum(1)
            assert (
                call.sizes == [len(call.ids)]
                and torch.equal(call.own, call.ids != WORLD.pad)
                and lengths.min() > 0
            )


def test_sft_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_sft, config, tmp_path)


def test_sft_resumes_only_what_was_made_from_the_same_files(config, monkeypatch, tmp_path, tiny):
    config = wires.copied(config, tmp_path, "init")
    wires.assert_prepared(monkeypatch, train_sft, config, "GPT")
    others = write_lines(tmp_path / "others.jsonl", ROWS[::-1])
    wires.assert_made_from(monkeypatch, train_sft, config, init=f"{tiny}/reference.pt", data=others)
    config.max_length = 500
    calls = spy(monkeypatch, train_sft, "chat_examples")
    wires.made_from(monkeypatch, train_sft, config)
    assert [call.max_length for call in calls] == [wires.SHAPE.context] * 2
