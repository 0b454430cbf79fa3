"""Weak-to-strong: the gap recovered of planted accuracies, the judge's labels, the split."""

import json
import math
from collections import Counter

import pytest
import torch

import train_rm
from collect import Config as Collect
from collect import main as collect
from lab import weak_to_strong
from lab.weak_to_strong import (
    MODELS,
    Split,
    Student,
    by_judge,
    confident_labels,
    gap_recovered,
    report,
    split,
    train,
)
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar
from nanoalign.data import prompt_key
from nanoalign.rows import read_rows
from nanoalign.world.judge import judge
from train_rm import bradley_terry_loss


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
    split(Split(pairs, str(folder)))
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
    files = {"data": f"{tmp_path}/labels.jsonl", "eval_data": f"{folder}/test.jsonl"}
    train(Student(init=sft, **files, out=f"{tmp_path}/naive.pt", confidence=0.5, epochs=0.1))
    load_scalar(f"{tmp_path}/naive.pt")  # a reward model like any other
    for name in MODELS:
        for ending in (".pt", ".metrics.jsonl"):
            (tmp_path / f"{name}{ending}").write_bytes((tmp_path / f"naive{ending}").read_bytes())
    report([str(tmp_path)])


@pytest.mark.parametrize("meta", [{}, {"kind": "mine"}])
def test_rows_that_are_not_the_worlds_cannot_be_judged(meta, tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "meta": meta}))
    with pytest.raises(UserError, match="the world's prompts"):
        split(Split(str(path), str(tmp_path)))


def test_the_report_is_over_seeds_and_takes_each_gap_on_its_own(tmp_path, capsys):
    planted = {"weak": (0.6, 0.5), "naive": (0.7, 0.6), "confident": (0.75, 0.7), "ceiling": (0.8, 0.7)}
    for name, found in planted.items():
        for seed, accuracy in enumerate(found):
            rows = [{"event": "start"}, {"step": 1, "eval_accuracy": 0.1}]  # not the last evaluation
            rows.append({"step": 9, "tokens": 1, "elapsed": 30.0 + seed, "peak_mb": 1})
            rows.append({"step": 9, "eval_accuracy": accuracy})
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            lines = "\n".join(map(json.dumps, rows))
            (tmp_path / str(seed) / f"{name}.metrics.jsonl").write_text(lines)
            (tmp_path / str(seed) / f"{name}.pt").touch()
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    report(folders)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| seeds: 2 | held-out accuracy | PGR |"
    assert lines[2].endswith("| 0.550 ± 0.050 | 0.000 ± 0.000 |")
    assert lines[3].endswith("| 0.650 ± 0.050 | 0.500 ± 0.000 |")
    assert lines[4].endswith("| 0.725 ± 0.025 | 0.875 ± 0.125 |")
    assert lines[5].endswith("| 0.750 ± 0.050 | 1.000 ± 0.000 |")
    assert lines[-1] == "training took 2m02s a seed, of 4 models"
    (tmp_path / "1" / "naive.pt").unlink()  # it is still running
    with pytest.raises(UserError, match=r"naive.metrics.jsonl has no final"):
        report(folders)
    (tmp_path / "1" / "naive.metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"naive.metrics.jsonl cannot be read"):
        report(folders)


# ------------------------------------------------------------------------------------------- the student


def with_gradients(chosen, rejected, p, confidence):
    """The student's loss, and what it pulls the scores of the first and of the second side by."""
    sides = [x.clone().requires_grad_() for x in (chosen, rejected)]
    soft = confident_labels(p, sides[0] - sides[1], confidence)
    loss = bradley_terry_loss(*sides, probability=soft)
    return loss.detach(), *torch.autograd.grad(loss.sum(), sides)


SURE = [(d, p, a) for d in (-3.0, -0.2, 0.7, 40.0) for p in (0.0, 0.4, 1.0) for a in (0.0, 0.3, 1.0)]


@pytest.mark.parametrize("gap, p, alpha", SURE)
def test_the_confidence_loss_mixes_the_labels_loss_with_that_of_the_models_own_guess(double, gap, p, alpha):
    """By hand, and so is its gradient: the guess is a constant."""

    def softplus(x):  # -log sigma(-x)
        return max(x, 0) + math.log1p(math.exp(-abs(x)))

    smoothed, guess = 0.9 * p + 0.1 * (1 - p), float(gap > 0)
    towards = [q * softplus(-gap) + (1 - q) * softplus(gap) for q in (smoothed, guess)]
    loss, up, down = with_gradients(torch.tensor([gap + 1]), torch.ones(1), torch.tensor([smoothed]), alpha)
    assert loss.item() == pytest.approx((1 - alpha) * towards[0] + alpha * towards[1], rel=1e-12)
    pull = 1 / (1 + math.exp(-gap)) - (1 - alpha) * smoothed - alpha * guess
    assert up.item() == -down.item() == pytest.approx(pull, abs=1e-12)


def test_without_confidence_the_label_stays_and_with_nothing_else_it_does_not_matter(double):
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    p, margin = torch.linspace(0, 1, 50), chosen - rejected
    assert torch.equal(confident_labels(p, margin, 0.0), p)
    torch.testing.assert_close(confident_labels(p, margin, 1e-9), p, rtol=0, atol=1e-8)
    alone = [confident_labels(torch.as_tensor(q), margin, 1.0) for q in (p, 1 - p, 1.0)]
    losses = [bradley_terry_loss(chosen, rejected, probability=soft) for soft in alone]
    assert all(torch.equal(losses[0], other) for other in losses)
    torch.testing.assert_close(losses[0], (1 + (-margin.abs()).exp()).log())


def test_the_confidence_loss_does_not_care_which_side_is_called_first(double):
    """So hardened labels are balanced at the threshold 1/2; a tie takes no side."""
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 0.5, 3.0])
    p = torch.tensor([0.3, 0.9, 0.5, 0.8])
    loss, first, second = with_gradients(chosen, rejected, p, 0.6)
    swapped = with_gradients(rejected, chosen, 1 - p, 0.6)
    torch.testing.assert_close(swapped, (loss, second, first))
    assert first[2] == 0 and first[3].item() == pytest.approx(-0.4 * 0.3)


def test_confidence_is_warmed_up_over_the_first_fifth_of_the_steps(sft, pairs, tmp_path, monkeypatch):
    given, smoothed = [], []

    def spy(p, margin, confidence):
        given.append(confidence)
        smoothed.append(p)
        return confident_labels(p, margin, confidence)

    monkeypatch.setattr(weak_to_strong, "confident_labels", spy)
    flags = {"batch_size": 8, "confidence": 0.6, "label_smoothing": 0.1, "steps": 15}
    train(Student(init=sft, data=pairs, out=f"{tmp_path}/rm.pt", **flags))
    assert len(given) == 15 and given == pytest.approx([0.0, 0.2, 0.4] + 12 * [0.6])
    torch.testing.assert_close(torch.cat(smoothed).unique(), torch.tensor([0.9]))  # of labels that are 1


def test_a_student_without_confidence_is_train_rms(sft, pairs, tmp_path):
    flags = {
        "init": sft,
        "data": pairs,
        "steps": 4,
        "batch_size": 8,
        "micro_batch": 3,
        "label_smoothing": 0.1,
    }
    both = [f"{tmp_path}/{name}.pt" for name in ("student", "plain")]
    train(Student(out=both[0], confidence=0.0, **flags))
    train_rm.main(train_rm.Config(out=both[1], **flags))
    student, plain = (load_scalar(path)[0].state_dict() for path in both)
    for name, weights in plain.items():
        torch.testing.assert_close(student[name], weights, rtol=1e-4, atol=1e-5)


def test_a_confidence_above_1_is_one_clear_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--confidence 1.5 .* at most 1"):
        train(Student(out=f"{tmp_path}/x.pt", confidence=1.5))
