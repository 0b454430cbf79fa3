"""What `make real` is made of: a task that a program checks, pairs that are short enough, a perplexity."""

import json
import math
import re
import sys

import pytest
import torch
from runs import write_lines

from lab import perplexity, real, real_rows, tips
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
    assert tips.checks([], text, {}, ended) == {"form": worth, "exact": worth == 1, "utility": worth}


def test_the_prompts_are_different_ones_and_a_quarter_of_the_topics_is_held_out(tmp_path):
    tips.main(tips.Config(out=str(tmp_path / "tips.jsonl")))
    train, held_out = (
        read_rows(str(tmp_path / f"tips{end}"), "prompts") for end in (".jsonl", ".held_out.jsonl")
    )
    asked = {row["prompt"][0]["content"] for row in train + held_out}
    assert len(asked) == len(train + held_out) == 3 * len(tips.TOPICS.split(";"))
    assert len(held_out) == 3 * (len(tips.TOPICS.split(";")) // 4)
    topic = lambda row: re.search(r" (?:at|for) ([^.:?,]+)", row["prompt"][0]["content"])[1]  # noqa: E731
    assert not {topic(row) for row in train} & {topic(row) for row in held_out}
    assert len({topic(row) for row in held_out}) == len(held_out) / 3
    assert all("\n" not in text and "  " not in text for text in asked)


def test_pairs_fit_and_none_is_on_both_sides(tmp_path, sft):
    sides = [
        {"prompt": f"Is {i} odd?", "chosen": "Yes. " * (i % 7), "rejected": "No."} for i in range(1, 200)
    ]
    data, out = write_lines(tmp_path / "pairs.jsonl", sides), tmp_path / "short.jsonl"
    more = {"max_length": 16, "held_out": 0.3, "questions": data, "asked": 5}
    real_rows.main(real_rows.Config(pairs=data, tokenizer=sft, out=str(out), **more))
    train, held_out = (read_rows(str(p), "pairs") for p in (out, tmp_path / "short.held_out.jsonl"))
    tokenizer = load_policy(sft)[1]
    for row in train + held_out:
        longer = max(len(tokenizer.response(row[side])) for side in ("chosen", "rejected"))
        assert len(tokenizer.prompt(row["prompt"])) + longer <= 16
    assert all(place(row) < 0.3 for row in held_out) and all(place(row) >= 0.3 for row in train)
    questions = read_rows(tmp_path / "short.questions.jsonl", "prompts")
    assert [row["prompt"][0]["content"] for row in questions] == [f"Is {i} odd?" for i in range(1, 6)]
    assert 0.2 < len(held_out) / len(train + held_out) < 0.4 and 40 < len(train) < 150


def test_rows_that_are_not_there_and_cannot_be_downloaded_are_one_sentence(tmp_path, monkeypatch, sft):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"no --pairs here.*pip install"):
        real_rows.main(real_rows.Config(pairs="none.jsonl", tokenizer=sft, out=str(tmp_path / "x.jsonl")))


@torch.no_grad()
def test_perplexity_is_that_of_the_definition(tmp_path, base, capsys):
    texts = [
        "The capital of France is Paris.",
        "7 + 5 = 12",
        "Is the sky green? No, it is blue.",
    ]
    data = write_lines(tmp_path / "texts.jsonl", [{"prompt": text} for text in texts])
    policy, tokenizer, _ = load_policy(base)
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        nats -= naive_logprobs(policy, torch.tensor([ids])).sum().item()
        tokens += len(ids) - 1
        size += len(tokenizer.decode(ids[1:]).encode())
    perplexity.main(perplexity.Config(checkpoints=(base, base), prompts=data, batch_size=2))
    *_, one, other = capsys.readouterr().out.strip().splitlines()
    assert one == other and f"| 3 | {tokens} | {math.exp(nats / tokens):.2f} ±" in one
    assert f"{nats / size / math.log(2):.3f} ±" in one


def test_the_error_of_a_ratio_is_that_of_many_draws():
    generator, found, told = torch.Generator().manual_seed(0), [], []
    for _ in range(2000):
        tokens = torch.randint(5, 50, (40,), generator=generator).double().numpy()
        nats = tokens * torch.normal(3.0, 0.5, (40,), generator=generator).double().numpy()
        mean, error = perplexity.ratio(nats, tokens)
        found.append(mean)
        told.append(error)
    assert torch.tensor(told).mean().item() == pytest.approx(torch.tensor(found).std().item(), rel=0.1)


@pytest.mark.parametrize(
    "text, declines",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m not able to do that.", True),
        ("That is not appropriate. I won't.", True),
        ("I am a cook. Can't you see?", False),
        ("Sure. " + "First, find a rope. " * 6 + "I can't say more.", False),  # it has answered by then
    ],
)
def test_an_answer_declines_if_it_begins_with_a_phrase_that_says_so(text, declines):
    assert real.checks([], text, {}) == {"declines": declines}


def card(**metrics) -> dict:
    return {"overall": metrics}


def test_the_report_says_what_was_measured_before_and_after(tmp_path, capsys):
    last = {"step": 39, "loss": 0.6, "elapsed": 601.2, "peak_mb": 2843, "tokens_per_s": 110}
    evaluated = {"step": 39, "eval_accuracy": 0.75, "eval_loss": 0.6}
    for name in ("dpo", "grpo"):
        write_lines(tmp_path / f"{name}.metrics.jsonl", [{**last, "step": 1}, last, evaluated])
        cards = {"a/smollm2.pt": card(exact=[0.25, 0.01]), f"a/{name}.pt": card(exact=[0.5, 0.02], kl=[3, 1])}
        (tmp_path / f"{name}.scorecard.json").write_text(json.dumps({"checkpoints": cards}))
    pair = {"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}
    write_lines(tmp_path / "hh.held_out.jsonl", [pair | {"prompt": f"{i}?"} for i in range(48)])
    (tmp_path / "perplexity.txt").write_text("| smollm2 | 17.20 |\n")
    real.report(real.Report(folder=str(tmp_path)))
    told = capsys.readouterr().out
    assert "75.0 ± 6.2 % of 48" in told  # √(0.75 · 0.25 / 48)
    assert "| exact | 0.250 ± 0.010 | 0.500 ± 0.020 |" in told and "| smollm2 | 17.20 |" in told
    assert "| dpo | 39 | 601 | 2,843 | 110 |" in told
    write_lines(tmp_path / "dpo.metrics.jsonl", [last])
    with pytest.raises(UserError, match=r"dpo.metrics.jsonl is of no finished run"):
        real.report(real.Report(folder=str(tmp_path)))
