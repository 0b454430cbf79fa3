"""Real rows: every one parses, and a few steps of each stage run on them with GPT-2's vocabulary."""

import itertools
import json
from pathlib import Path

import pytest

import collect
import evaluate
import nanoalign.kernels
import train_dpo
import train_pretrain
import train_rm
import train_sft
from nanoalign import UserError
from nanoalign.checkpoint import load
from nanoalign.data import pair_examples
from nanoalign.rows import read_rows

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real rows are not in {DATA}")
HH = DATA / "hh_harmless.jsonl"
UNEQUAL = 1255  # an annotation artefact: its two sides differ in more than the last message


def test_every_hh_transcript_parses_but_the_one_whose_sides_have_different_prompts(capsys):
    with pytest.raises(UserError, match=f"line {UNEQUAL}.*same prompt"):
        read_rows(str(HH), "pairs")
    pairs = read_rows(str(HH), "pairs", skip_bad_rows=True)
    assert len(pairs) == 1499 and "skipped 1 bad rows of 1500" in capsys.readouterr().out
    raw = [json.loads(line) for line in HH.read_text(encoding="utf-8").split("\n") if line]
    del raw[UNEQUAL - 1]
    for row, pair in zip(raw, pairs):
        assert row["chosen"].endswith(pair["chosen"]) or row["chosen"].strip().endswith(pair["chosen"])
        turns = sum(row["chosen"].count(f"\n\n{who}:") for who in ("Human", "Assistant"))
        assert len(pair["prompt"]) == turns - 1 and pair["prompt"][-1]["role"] == "user"


def test_hh_pairs_become_examples_with_a_common_prompt(r50k):
    rows = read_rows(str(HH), "pairs", skip_bad_rows=True)[:300]
    examples, _ = pair_examples(rows, r50k, 512)
    assert len(examples) > 280
    for chosen, rejected in examples:
        assert (chosen[0][~chosen[1]] == rejected[0][~rejected[1]]).all()
        assert chosen[1].any() and rejected[1].any()


def test_gsm8k_rows_are_chat_rows_and_prompts_as_they_are(r50k):
    for name, count in (("train", 3000), ("test", 600)):
        rows = read_rows(str(DATA / f"gsm8k_{name}.jsonl"), "chat")
        assert len(rows) == count
        assert all("####" in row["messages"][1]["content"] for row in rows)
    ids, mask = r50k.render(rows[0]["messages"])
    assert r50k.decode(ids[mask], specials=True) == f" {rows[0]['messages'][1]['content']}<|end|>"
    prompts = read_rows(str(DATA / "gsm8k_test.jsonl"), "prompts")
    assert [p["prompt"] for p in prompts] == [row["messages"][:1] for row in rows]


def test_shakespeare_and_hh_run_through_every_stage(tmp_path, r50k, monkeypatch):
    monkeypatch.setattr(nanoalign.kernels, "LARGE", 10**9)  # compiling is not what is tested
    with (DATA / "tinyshakespeare.txt").open(encoding="utf-8") as file:
        (tmp_path / "text.txt").write_text(file.read(6_000), encoding="utf-8")
    with HH.open(encoding="utf-8") as file:
        short = sorted(itertools.islice(file, 100), key=len)[:12]  # a scored token costs 50,257 logits
    (tmp_path / "hh.jsonl").write_text("".join(short), encoding="utf-8")
    base, sft, dpo, rm = (str(tmp_path / f"{stage}.pt") for stage in ("base", "sft", "dpo", "rm"))
    hh, pairs, card = (str(tmp_path / name) for name in ("hh.jsonl", "by_rm.jsonl", "card.json"))
    few = {"batch_size": 2, "warmup": 0, "epochs": 0.5}

    model = {"model": "world-tiny", "tokenizer": "r50k_base"}
    train_pretrain.main(train_pretrain.Config(data=str(tmp_path / "text.txt"), out=base, **model, **few))
    train_sft.main(train_sft.Config(init=base, data=hh, out=sft, **few))
    train_dpo.main(train_dpo.Config(init=sft, data=hh, out=dpo, **few))
    train_rm.main(train_rm.Config(init=sft, data=hh, out=rm, **few))
    sampling = {"skip_bad_rows": True, "count": 6, "max_new_tokens": 8}
    collect.main(collect.Config(policy=sft, prompts=str(HH), out=pairs, annotator=f"rm:{rm}", **sampling))
    assert all(0.5 <= row["probability"] <= 1 for row in read_rows(pairs, "pairs"))
    judged = {"checkpoints": (sft, dpo), "prompts": hh, "reward": rm}
    evaluate.main(evaluate.Config(**judged, out=card, samples=1, max_new_tokens=8))
    assert 0 < json.loads(Path(card).read_text())["checkpoints"][dpo]["overall"]["win rate"][0] < 1
    for path, stage in ((base, "base"), (sft, "sft"), (dpo, "dpo")):
        content = load(path, (stage,))
        assert content["tokenizer"] == "r50k_base" and content["step"] > 1
        assert all(weight.isfinite().all() for weight in content["model"].values())
