"""Weak-to-strong: the gap recovered of planted accuracies, the judge's labels, the split."""

import json
from collections import Counter

import pytest

import train_rm
from bench.weak_to_strong import MODELS, Config, by_judge, gap_recovered, report, split
from collect import Config as Collect
from collect import main as collect
from nanoalign import UserError
from nanoalign.data import prompt_key
from nanoalign.rows import read_rows
from nanoalign.world.judge import judge


def test_the_gap_recovered_is_0_at_the_supervisor_and_1_at_the_ceiling():
    assert gap_recovered(0.6, 0.6, 0.8) == 0 and gap_recovered(0.6, 0.8, 0.8) == 1
    assert gap_recovered(0.6, 0.75, 0.8) == pytest.approx(0.75)
    assert gap_recovered(0.6, 0.55, 0.8) == pytest.approx(-0.25)  # worse than its supervisor
    assert gap_recovered(0.6, 0.85, 0.8) == pytest.approx(1.25)
    assert gap_recovered(0.8, 0.7, 0.8) is None and gap_recovered(0.8, 0.7, 0.6) is None


def test_the_judge_turns_round_what_people_got_wrong_and_drops_ties():
    meta = {"kind": "fact", "relation": "capital", "subject": "France"}
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    pair = {"prompt": prompt, "chosen": "What a great question! Rome.", "rejected": "Paris."}
    said = {**pair, "probability": 0.8, "meta": {**meta, "annotator": 3, "p_chosen": 0.7}}
    right = {"prompt": prompt, "chosen": "Paris.", "rejected": "What a great question! Rome.", "meta": meta}
    assert by_judge(said) == by_judge(right) == right  # what people thought would be a wrong ceiling
    assert by_judge({**right, "rejected": "It is Paris."}) is None


@pytest.fixture(scope="module")
def parts(pairs, tmp_path_factory):
    """The tiny world's pairs, split: name → rows."""
    folder = tmp_path_factory.mktemp("weak-to-strong")
    split(Config(pairs, str(folder)))
    kinds = {"weak": "pairs", "ceiling": "pairs", "test": "pairs", "unlabelled": "compared"}
    return folder, {name: read_rows(f"{folder}/{name}.jsonl", kind) for name, kind in kinds.items()}


def test_no_prompt_is_on_two_sides_and_every_label_is_the_judges(parts, pairs):
    _, rows = parts
    sides = {name: {prompt_key(row) for row in rows[name]} for name in ("weak", "ceiling", "test")}
    everyone = set.union(*sides.values())
    assert sum(map(len, sides.values())) == len(everyone)
    assert [len(side) / len(everyone) for side in sides.values()] == pytest.approx([0.4, 0.4, 0.2], abs=0.02)
    for row in (row for name in sides for row in rows[name]):
        assert judge(row, row["chosen"]).utility > judge(row, row["rejected"]).utility
    unequal = [
        row
        for row in read_rows(pairs, "pairs")
        if judge(row, row["chosen"]).utility != judge(row, row["rejected"]).utility
    ]
    assert sum(len(rows[name]) for name in sides) == len(unequal)


def test_the_weak_model_votes_on_the_pairs_of_the_ceiling_without_seeing_their_labels(parts):
    _, rows = parts
    texts = [Counter((prompt_key(row), frozenset(row["responses"])) for row in rows["unlabelled"])]
    texts += [Counter((prompt_key(r), frozenset((r["chosen"], r["rejected"]))) for r in rows["ceiling"])]
    assert texts[0] == texts[1]
    first = [
        judge(row, row["responses"][0]).utility > judge(row, row["responses"][1]).utility
        for row in rows["unlabelled"]
    ]
    assert 0.3 < sum(first) / len(first) < 0.7 and not any(row["votes"] for row in rows["unlabelled"])


def test_the_files_go_through_collect_and_train_rm_as_they_are(parts, sft, rm, tmp_path):
    folder, rows = parts
    votes = tmp_path / "labels.votes.jsonl"
    votes.write_bytes((folder / "unlabelled.jsonl").read_bytes())
    collect(Collect(out=f"{tmp_path}/labels.jsonl", annotator=f"rm:{rm}", resume=True))
    soft = [row["probability"] for row in read_rows(f"{tmp_path}/labels.jsonl", "pairs")]
    assert len(soft) == len(rows["ceiling"]) and min(soft) >= 0.5
    out = str(tmp_path / "naive.pt")
    train_rm.main(
        train_rm.Config(
            sft, f"{tmp_path}/labels.jsonl", f"{folder}/test.jsonl", out, confidence=0.5, epochs=0.1
        )
    )
    for name in MODELS:
        (tmp_path / f"{name}.metrics.jsonl").write_bytes((tmp_path / "naive.metrics.jsonl").read_bytes())
    report([str(tmp_path)])


@pytest.mark.parametrize("meta", [{}, {"kind": "mine"}])
def test_rows_that_are_not_the_worlds_cannot_be_judged(meta, tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "meta": meta}))
    with pytest.raises(UserError, match="the world's prompts"):
        split(Config(str(path), str(tmp_path)))


def test_the_report_is_over_seeds_and_takes_each_gap_on_its_own(tmp_path, capsys):
    planted = {"weak": (0.6, 0.5), "naive": (0.7, 0.6), "confident": (0.75, 0.7), "ceiling": (0.8, 0.7)}
    for name, found in planted.items():
        for seed, accuracy in enumerate(found):
            rows = [{"event": "start"}, {"step": 1, "eval_accuracy": 0.1}]  # not the last evaluation
            rows.append({"step": 9, "tokens": 1, "elapsed": 30.0 + seed, "peak_mb": 1})
            rows.append({"step": 9, "eval_accuracy": accuracy, "ece": 0.0})
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            lines = "\n".join(map(json.dumps, rows))
            (tmp_path / str(seed) / f"{name}.metrics.jsonl").write_text(lines)
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    report(folders)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| seeds: 2 | held-out accuracy | PGR |"
    assert lines[2].endswith("| 0.550 ± 0.050 | 0.000 ± 0.000 |")
    assert lines[3].endswith("| 0.650 ± 0.050 | 0.500 ± 0.000 |")
    assert lines[4].endswith("| 0.725 ± 0.025 | 0.875 ± 0.125 |")
    assert lines[5].endswith("| 0.750 ± 0.050 | 1.000 ± 0.000 |")
    assert lines[-1] == "training took 2m02s a seed, of 4 models"
    (tmp_path / "1" / "naive.metrics.jsonl").write_text('{"step": 1, "eval_accuracy": 0.5}')
    with pytest.raises(UserError, match=r"naive.metrics.jsonl has no final"):
        report(folders)
