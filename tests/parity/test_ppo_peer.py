"""PPO's benchmark compares what is the same: train_ppo.py and Ziegler et al. on transformers' models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoalign import UserError

pytest.importorskip("transformers")
from lab.bench import ppo, ziegler
from nanoalign.cli import readable_rows
from nanoalign.rows import read_rows
from nanoalign.tokenizer import get_tokenizer

pytestmark = pytest.mark.parity
CPU, WORLD = torch.device("cpu"), get_tokenizer("world")


@pytest.fixture
def config(sft, world, tmp_path):
    sizes = {"batch_size": 6, "minibatch": 3, "micro_batch": 2, "max_new_tokens": 6, "steps": 2, "rounds": 2}
    return ppo.Config(sft, f"{world}/prompts.jsonl", **sizes, out=f"{tmp_path}/results.jsonl", device="cpu")


def test_both_sides_make_the_same_of_the_same_responses_or_nothing_is_timed(config, tmp_path, capsys):
    given = ppo.prepare(config, str(tmp_path))
    rows = read_rows(config.prompts, "prompts")[:6]
    prompts = [WORLD.prompt(row["prompt"]) for row in rows]
    ppo.check(given, str(tmp_path), prompts, WORLD, CPU)
    assert "gradient norm" in capsys.readouterr().out
    experience = ziegler.experience
    for name, value in (("lam", 0.9), ("missing_eos_score", 0.0), ("temperature", 1.1)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="do not compute the same"):
            other = replace(given, **{name: value})
            patch.setattr(ziegler, "experience", lambda *args, other=other: experience(*args[:-1], other))
            ppo.check(given, str(tmp_path), prompts, WORLD, CPU)


def test_a_whole_run_of_either_side_answers_the_same_prompts(config):
    ppo.main(config)
    rows = readable_rows(Path(config.out))
    assert [row["name"] for row in rows] == ["transformers, Ziegler et al.", "nanoalign"]
    assert all(len(row["seconds"]) == len(row["rates"]) == 2 for row in rows)
