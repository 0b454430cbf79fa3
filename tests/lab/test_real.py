"""What `make real` is made of: a task that a program checks, pairs that are short enough, a perplexity."""

import math
import sys

import pytest
import torch
from runs import write_lines

from lab import perplexity, real_rows, tips
from nanoalign import UserError
from nanoalign.checkpoint import load_policy
from nanoalign.data import place
from nanoalign.logprobs import naive_logprobs
from nanoalign.rows import read_rows

GOOD = "1. Keep a regular hour.\n2. Avoid coffee at night.\n3. Keep the room dark."


@pytest.mark.parametrize(
    "text, ended, worth",
    [
        (GOOD, True, 1.0),
        (GOOD.replace("\n", "\n\n"), True, 1.0),  # blank lines between them are how many models write
        (GOOD, False, 0.75),  # it might have gone on
        (GOOD + "\nGood night!", True, 0.75),
        ("Here are three tips:\n" + GOOD, True, 0.0),  # none is in its place
        ("\n".join(GOOD.split("\n")[:2]), True, 0.5),
        ("1. Sleep well.\n2. Sleep well.\n3. Sleep well.", True, 0.75),  # one tip, three times
        ("1. Sleep\n2. Rest well.\n3. Dream well.", True, 0.5),  # a word is no tip
        ("1. " + "well " * 21 + "\n2. Rest well.\n3. Dream well.", True, 0.5),
        ("- Rest well.\n- Sleep well.\n- Dream well.", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_an_answer_is_worth_a_quarter_for_each_tip_in_its_place_and_for_nothing_else(text, ended, worth):
    assert tips.form([{}], [text], [ended]) == [worth]
    assert tips.exact([{}], [text], [ended]) == [float(worth == 1)]


def test_the_prompts_are_different_ones_and_rows_that_training_reads(tmp_path):
    tips.main(tips.Config(out=str(tmp_path / "tips.jsonl")))
    rows = read_rows(str(tmp_path / "tips.jsonl"), "prompts")
    asked = {row["prompt"][0]["content"] for row in rows}
    assert len(asked) == len(rows) == 3 * len(tips.TOPICS.split(";"))
    assert all("\n" not in text and "  " not in text for text in asked)
    assert 5 < sum(place(row) < 0.05 for row in rows) < 30  # held out, by the hash of all stages


def test_pairs_fit_and_none_is_on_both_sides(tmp_path, sft):
    sides = [
        {"prompt": f"Is {i} odd?", "chosen": "Yes. " * (i % 7), "rejected": "No."} for i in range(1, 200)
    ]
    data, out = write_lines(tmp_path / "pairs.jsonl", sides), tmp_path / "short.jsonl"
    real_rows.main(real_rows.Config(rows=data, tokenizer=sft, max_length=16, held_out=0.3, out=str(out)))
    train, held_out = (read_rows(str(p), "pairs") for p in (out, tmp_path / "short.held_out.jsonl"))
    tokenizer = load_policy(sft)[1]
    for row in train + held_out:
        longer = max(len(tokenizer.response(row[side])) for side in ("chosen", "rejected"))
        assert len(tokenizer.prompt(row["prompt"])) + longer <= 16
    assert all(place(row) < 0.3 for row in held_out) and all(place(row) >= 0.3 for row in train)
    assert 0.2 < len(held_out) / len(train + held_out) < 0.4 and 40 < len(train) < 150


def test_rows_that_are_not_there_and_cannot_be_downloaded_are_one_sentence(tmp_path, monkeypatch, sft):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"no --rows here.*pip install"):
        real_rows.main(real_rows.Config(rows="none.jsonl", tokenizer=sft, out=str(tmp_path / "x.jsonl")))


@torch.no_grad()
def test_perplexity_is_that_of_the_definition(tmp_path, base, capsys):
    texts = [
        "The capital of France is Paris.",
        "7 + 5 = 12",
        "Is the sky green? No, it is blue.",
    ]
    data = write_lines(tmp_path / "texts.jsonl", [{"question": text} for text in texts])
    policy, tokenizer, _ = load_policy(base)
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        nats -= naive_logprobs(policy, torch.tensor([ids])).sum().item()
        tokens += len(ids) - 1
        size += len(tokenizer.decode(ids[1:]).encode())
    perplexity.main(perplexity.Config(checkpoint=base, data=data, field="question", batch_size=2))
    told = capsys.readouterr().out
    assert f"3 texts, {tokens} tokens: perplexity {math.exp(nats / tokens):.2f} ±" in told
    assert f"{nats / size / math.log(2):.3f} ±" in told
    with pytest.raises(UserError, match=r"no texts in 'text'"):
        perplexity.main(perplexity.Config(checkpoint=base, data=data))


def test_the_error_of_a_ratio_is_that_of_many_draws():
    generator, found, told = torch.Generator().manual_seed(0), [], []
    for _ in range(2000):
        tokens = torch.randint(5, 50, (40,), generator=generator).double().numpy()
        nats = tokens * torch.normal(3.0, 0.5, (40,), generator=generator).double().numpy()
        mean, error = perplexity.ratio(nats, tokens)
        found.append(mean)
        told.append(error)
    assert torch.tensor(told).mean().item() == pytest.approx(torch.tensor(found).std().item(), rel=0.1)
