"""The reward model's report: calibration of known margins, accuracy by length, the probe; its file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.reward_report import STYLES, Config, by_length, calibration, main, probe
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar, save
from nanoalign.data import pair_examples, read_split, without_ties
from nanoalign.model import GPTConfig
from nanoalign.rows import parse_pair
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer
from nanoalign.world.people import ceiling
from train_rm import Config as Training
from train_rm import by_prompt, evaluate

TOKENIZER = get_tokenizer("world")
CPU = torch.device("cpu")


@pytest.fixture
def model(double):
    torch.manual_seed(0)
    return ScalarGPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, context=64, layers=2, width=16, heads=2))


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 200_000)
    difference = np.log(p / (1 - p)) * np.where(rng.random(len(p)) < p, 1, -1)  # right with probability p
    error, table = calibration(difference)
    assert error < 0.005
    assert sum(count for count, _, _ in table) == len(p)
    for low, (_, sure, right) in zip((0.5, 0.6, 0.7, 0.8, 0.9), table):
        assert low <= sure <= low + 0.1 and right == pytest.approx(sure, abs=0.01)
    sharp, _ = calibration(3 * difference)
    confident = 1 / (1 + ((1 - p) / p) ** 3)
    assert sharp == pytest.approx((confident - p).mean(), abs=0.01)


@pytest.mark.parametrize("meta", [{}, {"kind": "mine"}, {"kind": "fact"}])
def test_the_probe_of_rows_that_are_not_the_worlds_says_what_the_model_likes_and_nothing_of_people(
    model, meta
):
    row = {**parse_pair({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}), "meta": meta}
    changes = probe(model, [row], TOKENIZER, 0, CPU)
    assert set(changes) == set(STYLES)
    for own, *others in changes.values():
        assert math.isfinite(own) and all(map(math.isnan, others))


def test_accuracy_by_length_is_that_of_the_pairs_whose_chosen_side_is_so_much_longer():
    sides = [
        ("Yes.", "No, I do not think so."),
        ("Yes.", "No."),
        ("I do think so, yes.", "No."),
        ("No.", "Yes."),
    ]
    rows = [parse_pair({"prompt": f"{i}?", "chosen": a, "rejected": b}) for i, (a, b) in enumerate(sides)]
    prompts = by_prompt(*pair_examples(rows, TOKENIZER, 64))
    assert by_length(np.array([1.0, -1.0, 1.0, 0.0]), prompts) == {
        "1 to 10 shorter": {"accuracy": 1.0, "pairs": 1},
        "alike": {"accuracy": 0.25, "pairs": 2},
        "1 to 10 longer": {"accuracy": 1.0, "pairs": 1},
    }


def test_the_report_of_a_checkpoint_is_in_nats_and_written_beside_it(rm, pairs, tmp_path, capsys):
    path = tmp_path / "rm.pt"
    path.write_bytes(Path(rm).read_bytes())
    main(Config(model=str(path), data=pairs))
    said = capsys.readouterr().out
    assert all(
        part in said for part in ("accuracy", "ceiling", "by family", "ECE", "by length", "flattering")
    )
    found = json.loads((tmp_path / "rm.report.json").read_text())

    model, tokenizer, content = load_scalar(rm)
    _, rows = read_split(Config(), pairs, "pairs")
    prompts = by_prompt(*pair_examples(without_ties(rows), tokenizer, 128))
    normalised, margins = evaluate(model, prompts, tokenizer, CPU)
    nats = margins * content["normalisation"]["std"]
    assert found["accuracy"] == normalised["accuracy"] and found["pairs"] == len(margins)
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-nats)).mean(), rel=1e-5)
    assert found["ece"] == pytest.approx(calibration(nats)[0], abs=1e-5)
    p = [row["meta"]["p_chosen"] for prompt in prompts for row in prompt.rows]
    assert found["ceiling"] == pytest.approx(ceiling(p))
    assert sum(one["pairs"] for one in found["by_family"].values()) == len(p)
    assert sum(one["pairs"] for one in found["by_length"].values()) == len(p)
    assert found["probe"].keys() <= set(STYLES) and found["probe"]["padded"].keys() == {
        "model",
        "people",
        "judge",
    }


def test_the_report_of_pairs_that_are_not_the_worlds_has_no_ceiling_and_is_still_json(rm, tmp_path, capsys):
    path = tmp_path / "rm.pt"
    path.write_bytes(Path(rm).read_bytes())
    sides = [{"prompt": f"{i} + 1?", "chosen": "Yes, sure.", "rejected": f"No, {i}."} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, sides)))
    main(Config(model=str(path), data=str(tmp_path / "own.jsonl")))
    assert "ceiling" not in capsys.readouterr().out

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "rm.report.json").read_text(), parse_constant=no_constants)
    assert "ceiling" not in found and found["pairs"] == 2
    assert all(one["people"] is None and one["judge"] is None for one in found["probe"].values())


def test_a_model_without_a_scale_cannot_be_reported_on(rm, pairs, tmp_path):
    model, tokenizer, _ = load_scalar(rm)
    path = str(tmp_path / "unfinished.pt")
    save(path, model, stage="rm", tokenizer=tokenizer, config=Training(), chat=False, step=1)
    with pytest.raises(UserError, match="no scale"):
        main(Config(model=path, data=pairs))
