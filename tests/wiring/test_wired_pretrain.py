"""What train_pretrain.main wires up, against cross-entropy on blocks of text (wires.py)."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import wires
from runs import WORLD, models, write_lines
from wires import logprobs, said, spy

import train_pretrain
from nanoalign import UserError
from nanoalign.checkpoint import load
from nanoalign.data import place

OFF = {  # every flag that has a say in what is computed, off its default
    "model": "world-nano", "context": 12, "steps": 4, "batch_size": 4, "micro_tokens": 30, "lr": 0.02,
    "warmup": 2, "weight_decay": 0.3, "clip": 0.4, "seed": 5, "eval_every": 3, "save_every": 2,
    "log_every": 1, "device": "cpu:0",
}  # fmt: skip
ROWS = [{"text": said(i, 6 + i)} for i in range(18)]
HELD_OUT = [{"text": said(i, 9)} for i in range(30, 40)]


@pytest.fixture
def config(tmp_path):
    files = {
        "data": write_lines(tmp_path / "rows.jsonl", ROWS),
        "eval_data": write_lines(tmp_path / "held.jsonl", HELD_OUT),
    }
    return train_pretrain.Config(**files, **OFF, out=str(tmp_path / "base.pt"))


def blocks_of(rows, context=12):
    """The stream of all texts, in blocks that share a token with the next one."""
    stream = [token for row in rows for token in (*WORLD.encode(row["text"]), WORLD.end)]
    starts = range(0, len(stream) - context + 1, context - 1)
    return torch.tensor([stream[at : at + context] for at in starts])


@pytest.mark.parametrize("apart", [True, False], ids=["held-out file", "last twentieth"])
def test_pretraining_is_cross_entropy_from_text_to_weights_and_log(
    double, config, monkeypatch, capsys, apart
):
    rows = ROWS
    if not apart:  # of a single text the end is held out
        rows = [{"text": " ".join(row["text"] for row in ROWS)}]
        config.data, config.eval_data = write_lines(Path(config.data).with_name("one.jsonl"), rows), ""
    names = "BatchOrder", "respond", "evaluate", "preset"
    seen = {name: spy(monkeypatch, train_pretrain, name) for name in names}
    made = spy(
        monkeypatch, train_pretrain, "make_optimizer", keep=lambda given: copy.deepcopy(given["model"])
    )
    pieces = spy(monkeypatch, train_pretrain, "token_losses")
    batches = wires.spy_on_pieces(monkeypatch)
    train_pretrain.main(config)
    out = capsys.readouterr().out

    policy = made[0].kept
    start = copy.deepcopy(policy)
    assert policy.config == train_pretrain.preset("world-nano", vocab_size=WORLD.vocab_size, context=12)
    blocks, held_out = blocks_of(rows), blocks_of(HELD_OUT)
    if not apart:
        number = max(1, len(blocks) // 20)
        blocks, held_out = blocks[:-number], blocks[-number:]
    [order] = seen["BatchOrder"]
    assert order.lengths.tolist() == [12] * len(blocks)
    assert (order.batch_size, order.seed, order.pool, order.least) == (4, 5, 8, 1)

    def loss_of(ids):
        return -logprobs(policy, ids, torch.ones_like(ids)).sum() / ids[:, 1:].numel()

    def look():
        loss = loss_of(held_out)
        return {"loss": loss, "perplexity": loss.exp()}

    logged = wires.descend(
        policy, config, order.result, lambda rows: {"loss": loss_of(blocks[rows])}, look, order.lengths
    )
    wires.assert_logged(config, *logged)
    wires.assert_same_weights(load(config.out)["model"], policy, moved_from=start)
    wires.assert_on("cpu:0", seen["evaluate"])
    wires.assert_pieces(config, order.result, batches, order.lengths)
    assert len(pieces) == len(batches) and pieces[0].ids.shape == (2, 12)
    wires.assert_answered(seen["respond"], made[0].model, [held_out[0, :6].tolist()], 5, 64)
    assert len(seen["respond"]) == 2
    [first, *later] = seen["evaluate"]
    assert len(later) == 2 and np.array_equal(first.blocks, held_out[:16])

    content = load(config.out)
    assert (content["stage"], content["chat"], content["step"]) == ("base", False, 4)
    assert models(config.out) == ["policy"]
    predicted = f"{blocks.numel():,} tokens to train on, {held_out.numel():,} held out"
    assert predicted in out and f"ln(vocabulary) = {math.log(WORLD.vocab_size):.3f}" in out
    text = WORLD.decode(held_out[0, :6].tolist())
    assert f"  sample: {text!r} → {seen['respond'][0].result[0][0]!r}\n" in out


@pytest.mark.parametrize("off, refused", [(0.104, False), (0.109, True), (-0.104, False), (-0.109, True)])
def test_pretraining_starts_at_ln_vocabulary_or_not_at_all(config, monkeypatch, off, refused):
    """Half a nano model's variance adds 0.0064 to the room of 0.1."""
    monkeypatch.setattr(train_pretrain, "evaluate", lambda *args: {"loss": math.log(WORLD.vocab_size) + off})
    config.steps = 1
    if refused:
        with pytest.raises(UserError, match="must start at ln"):
            train_pretrain.main(config)
    else:
        train_pretrain.main(config)


def test_pretraining_resumes(config, monkeypatch, tmp_path):
    wires.assert_resumes(monkeypatch, train_pretrain, config, tmp_path)


def test_pretraining_resumes_only_what_was_made_from_the_same_text(config, monkeypatch, tmp_path):
    wires.assert_prepared(monkeypatch, train_pretrain, config, "GPT")
    others = write_lines(tmp_path / "others.jsonl", ROWS[::-1])
    wires.assert_made_from(monkeypatch, train_pretrain, config, data=others)


def test_of_several_texts_those_that_the_hash_picks_are_held_out(config, monkeypatch, tmp_path):
    rows = [{"text": said(i, 25)} for i in range(60)]
    picked = [row for row in rows if place(row) < 0.05]
    assert 0 < len(picked) < 10
    config.data, config.eval_data = write_lines(tmp_path / "texts.jsonl", rows), ""
    config.steps = 1
    made, read = spy(monkeypatch, train_pretrain, "BatchOrder"), spy(monkeypatch, train_pretrain, "evaluate")
    train_pretrain.main(config)
    assert np.array_equal(read[-1].blocks, blocks_of(picked))
    assert len(made[0].lengths) == len(blocks_of([row for row in rows if row not in picked]))


def test_of_two_texts_one_is_held_out(config, monkeypatch, tmp_path):
    rows = [{"text": said(i, 60)} for i in range(2)]
    config.data, config.eval_data = write_lines(tmp_path / "texts.jsonl", rows), ""
    config.steps = 1
    read = spy(monkeypatch, train_pretrain, "evaluate")
    train_pretrain.main(config)
    assert np.array_equal(read[-1].blocks, blocks_of([min(rows, key=place)]))


def test_of_a_single_text_the_last_twentieth_of_the_blocks_is_held_out(config, monkeypatch, tmp_path):
    text = [{"text": said(1, 1000)}]
    blocks = blocks_of(text)
    assert len(blocks) // 20 > len(blocks) // 21 > 1
    config.data, config.eval_data = write_lines(tmp_path / "text.jsonl", text), ""
    config.steps = 1
    read = spy(monkeypatch, train_pretrain, "evaluate")
    train_pretrain.main(config)
    assert np.array_equal(read[-1].blocks, blocks[-(len(blocks) // 20) :])


def test_at_most_256_blocks_are_held_out_and_samples_go_on_from_at_most_half_of_one(
    config, monkeypatch, tmp_path
):
    many = [{"text": said(i, 60)} for i in range(190)]
    config.data = config.eval_data = write_lines(tmp_path / "many.jsonl", many)
    config.context, config.micro_tokens, config.steps = 40, 0, 1
    read, answered = spy(monkeypatch, train_pretrain, "evaluate"), spy(monkeypatch, train_pretrain, "respond")
    train_pretrain.main(config)
    wide = len(blocks_of(many, 40))
    assert (
        wide > 256 and [len(call.blocks) for call in read] == [16, 256] and len(answered[0].prompts[0]) == 16
    )
