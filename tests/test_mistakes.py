"""Mistakes: whatever a user gets wrong, it is one sentence that names it."""

import importlib
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from runs import command, forked

from nanoalign import cli
from nanoalign.checkpoint import load_policy, load_scalar, save
from nanoalign.model import GPT
from nanoalign.run import Flags as Config


@pytest.fixture(scope="module")
def checkpoints(sft, rm, tmp_path_factory):
    """A folder with a policy of another shape, and a reward model whose scores are no numbers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    other, tokenizer, _ = load_policy(sft)
    other = GPT(replace(other.config, layers=1))
    save(folder / "other.pt", other, stage="sft", tokenizer=tokenizer, config=Config(), step=1)
    broken, _, _ = load_scalar(rm)
    torch.nn.init.constant_(broken.score.bias, math.nan)
    save(folder / "nan.pt", broken, stage="rm", tokenizer=tokenizer, config=Config(), step=1)
    return folder


@pytest.fixture
def mistakes(world, base, sft, pairs, thumbs, rm, checkpoints, tmp_path):
    """The names that the table below uses."""
    for path in checkpoints.iterdir():
        shutil.copy(path, tmp_path)
    files = {"empty": "", "rows": '{"text": "a"}\n', "garbage": "hello", "bare": '{"prompt": "Hi"}\n' * 3}
    files["long"] = json.dumps({"prompt": "word " * 200}) + "\n"
    files["other"] = '{"prompt": "Hi", "meta": {"kind": "mine"}}\n' * 3
    files["odd"] = '{"prompt": "Hi", "meta": 3}\n' * 3
    files["thumb"] = '{"prompt": "Hi", "completion": "Hello!", "label": true}\n'
    files["gsm8k"] = '{"question": "1 + 1?", "answer": "#### 2"}\n' * 3
    files["bad.votes.jsonl"] = '{"prompt": "Hi", "responses": ["a"]}'
    vote = {"annotator": "human", "p": 1, "swapped": True}
    files["hand.votes.jsonl"] = json.dumps(
        {"prompt": "Hi", "responses": ["a", "b"], "ended": [True, True], "votes": [vote]}
    )
    files["compact.votes.jsonl"] = files["hand.votes.jsonl"].replace(" ", "")
    files["maybe"] = '{"question": "1 + 1?", "6b": {"solution": "2", "is_correct": "yes"}}\n'
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return {
        **{name: str(tmp_path / name) for name in files}, "none": str(tmp_path / "none"),
        "base": base, "sft": sft, "pairs": pairs, "thumbs": thumbs, "rm": rm,
        "world": str(world), "tmp": str(tmp_path),
    }  # fmt: skip


PRETRAIN = "--model world-tiny --out {tmp}/x.pt --data {world}/pretrain.jsonl "
SFT = "--init {base} --out {tmp}/x.pt --data {world}/sft_held_out.jsonl "
DPO = "--init {sft} --out {tmp}/x.pt --data {pairs} "
RM = "--init {sft} --out {tmp}/x.pt --data {pairs} "
PPO = "--init {sft} --out {tmp}/x.pt --reward {rm} --prompts {world}/prompts.jsonl --steps 1 --batch-size 8 "
GRPO = PPO + "--minibatch 8 "
KTO = "--init {sft} --out {tmp}/x.pt --data {thumbs} "
ORPO = "--init {base} --out {tmp}/x.pt --data {pairs} "
COLLECT = "--policy {sft} --out {tmp}/p.jsonl --prompts {world}/prompts_held_out.jsonl "
CRITIQUE = "--policy {sft} --out {tmp}/r.jsonl --prompts {world}/prompts_held_out.jsonl "
EVALUATE = "--checkpoints {sft} --out {tmp}/s.json --prompts {world}/prompts_held_out.jsonl "
MISTAKES = [  # script, flags, what the sentence names
    ("train_pretrain", PRETRAIN + "--data {none}", ["none", "exist"]),
    ("train_pretrain", PRETRAIN + "--data {empty}", ["empty"]),
    ("train_pretrain", PRETRAIN + "--eval-data {none}", ["none"]),
    ("train_pretrain", PRETRAIN + "--data {rows}", ["--context"]),
    ("train_pretrain", PRETRAIN + "--tokenizer nonsense", ["nonsense", "world"]),
    ("train_pretrain", PRETRAIN + "--model nonsense", ["nonsense", "world-tiny"]),
    ("train_pretrain", PRETRAIN + "--device nonsense", ["nonsense", "--device cpu"]),
    ("train_pretrain", PRETRAIN + "--device hpu", ["hpu", "--device cpu"]),  # torch looks for a module
    ("train_pretrain", PRETRAIN + "--batch-size 0", ["--batch-size"]),
    ("train_pretrain", PRETRAIN + "--context 0", ["context"]),
    ("train_pretrain", PRETRAIN + "--context 1", ["context"]),
    ("train_pretrain", PRETRAIN + "--log-every 0", ["log-every"]),
    ("train_pretrain", PRETRAIN + "--eval-every 0", ["eval-every"]),
    ("train_pretrain", PRETRAIN + "--save-every 0", ["save-every"]),
    ("train_pretrain", PRETRAIN + "--out {rows}/x.pt", ["rows"]),
    ("train_pretrain", PRETRAIN + "--out=", ["--out"]),
    ("train_sft", SFT + "--init {none}", ["none", "checkpoint"]),
    ("train_sft", SFT + "--init {garbage}", ["garbage", "not a nanoalign checkpoint"]),
    ("train_sft", SFT + "--data {world}/prompts.jsonl", ["prompts.jsonl, line 1", "completion"]),
    ("train_sft", SFT + "--max-length 1", ["--max-length"]),
    ("train_sft", SFT + "--save-every 0", ["save-every"]),
    ("train_dpo", DPO + "--init {base}", ["'base'", "'sft'"]),
    ("train_dpo", DPO + "--loss kto", ["kto", "dpo"]),
    ("train_dpo", DPO + "--label-smoothing 0.5", ["--label-smoothing"]),
    ("train_dpo", DPO + "--max-new-tokens 0", ["--max-new-tokens"]),
    ("train_dpo", DPO + "--data {world}/sft.jsonl", ["sft.jsonl, line 1", "chosen"]),
    ("train_dpo", DPO + "--batch-size 0", ["--batch-size"]),
    ("train_dpo", DPO + "--loss robust --label-smoothing 0.5", ["--label-smoothing"]),
    ("train_kto", KTO + "--init {base}", ["'base'", "'sft'"]),
    ("train_kto", KTO + "--init {rm}", ["'rm'", "'sft'"]),
    ("train_kto", KTO + "--batch-size 1", ["--batch-size must be at least 2"]),
    ("train_kto", KTO + "--batch-size 0", ["--batch-size must be at least 2"]),
    ("train_kto", KTO + "--data {thumb} --eval-data {thumbs}", ["a single row", "two"]),
    ("train_kto", KTO + "--data {thumb}", ["--eval-data"]),
    ("train_kto", KTO + "--data {world}/sft.jsonl", ["sft.jsonl, line 1", "label"]),
    ("train_kto", KTO + "--data {gsm8k}", ["gsm8k, line 1", "solution", "is_correct"]),
    ("train_kto", KTO + "--data {maybe}", ["maybe, line 1", "true or false"]),
    ("train_kto", KTO + "--max-length 1", ["--max-length"]),
    ("train_orpo", ORPO + "--nll half", ["half", "response"]),
    ("train_orpo", ORPO + "--init {rm}", ["'rm'", "not a language model"]),
    ("train_orpo", ORPO + "--data {thumbs}", ["thumbs.jsonl, line 1", "chosen"]),
    ("train_orpo", ORPO + "--batch-size 0", ["--batch-size"]),
    ("train_orpo", ORPO + "--max-length 1", ["--max-length"]),
    ("train_rm", RM + "--init {rm}", ["'rm'", "'sft'"]),
    ("train_rm", RM + "--data {world}/sft.jsonl", ["sft.jsonl, line 1", "chosen"]),
    ("train_rm", RM + "--label-smoothing 0.7", ["--label-smoothing"]),
    ("train_ppo", PPO + "--init {base}", ["'base'", "'sft'"]),
    ("train_ppo", PPO + "--reward {sft}", ["'sft'", "'rm'"]),
    ("train_ppo", PPO + "--reward nobody", ["nobody", "judge"]),
    ("train_ppo", PPO + "--reward {tmp}/nan.pt", ["nan.pt", "not a finite number"]),
    ("train_ppo", PPO + "--reference {tmp}/other.pt", ["other.pt", "shape"]),
    ("train_ppo", PPO + "--reference {rm}", ["'rm'"]),
    ("train_ppo", PPO + "--prompts {empty}", ["empty"]),
    ("train_ppo", PPO + "--prompts {none}", ["none", "exist"]),
    ("train_ppo", PPO + "--prompts {long} --eval-data {bare}", ["no prompt leaves room", "--max-new-tokens"]),
    ("train_ppo", PPO + "--watch judge --prompts {bare} --eval-data {bare}", ["judge", "meta"]),
    ("train_ppo", PPO + "--reward judge --prompts {other} --eval-data {other}", ["judge", "meta"]),
    ("train_ppo", PPO + "--max-new-tokens 500", ["--max-new-tokens"]),
    ("train_ppo", PPO + "--temperature 0", ["--temperature"]),
    ("train_ppo", PPO + "--minibatch 0", ["--minibatch"]),
    ("train_ppo", PPO + "--gamma 2", ["--gamma"]),
    ("train_ppo", PPO + "--kl-target 2 --kl-horizon 0", ["--kl-horizon"]),
    ("train_ppo", PPO + "--kl-target 2 --beta 0", ["--beta"]),
    ("train_ppo", PPO + "--critic {none}", ["none", "checkpoint"]),
    ("train_grpo", GRPO + "--init {base}", ["'base'", "'sft'"]),
    ("train_grpo", GRPO + "--kind ppo", ["ppo", "dr_grpo", "rloo"]),
    ("train_grpo", GRPO + "--kl k4", ["k4", "k3"]),
    ("train_grpo", GRPO + "--kind rloo --kl k3", ["k3", "rloo", "reward"]),
    ("train_grpo", GRPO + "--group-size 1", ["--group-size must be at least 2"]),
    ("train_grpo", GRPO + "--group-size 0", ["--group-size must be at least 2"]),
    ("train_grpo", GRPO + "--group-size 3", ["--batch-size 8", "--group-size 3"]),
    ("train_grpo", GRPO + "--group-size 16", ["--batch-size 8", "--group-size 16"]),
    ("train_grpo", GRPO + "--group-size 4 --minibatch 6", ["--minibatch 6", "--group-size 4"]),
    ("train_grpo", GRPO + "--batch-size 0", ["--batch-size"]),
    ("train_grpo", GRPO + "--minibatch 0", ["--minibatch"]),
    ("train_grpo", GRPO + "--steps 0", ["--steps"]),
    ("train_grpo", GRPO + "--epochs 0", ["--epochs"]),
    ("train_grpo", GRPO + "--temperature 0", ["--temperature"]),
    ("train_grpo", GRPO + "--max-new-tokens 500", ["--max-new-tokens"]),
    ("train_grpo", GRPO + "--reward {sft}", ["'sft'", "'rm'"]),
    ("train_grpo", GRPO + "--reward nobody", ["nobody", "answer"]),
    ("train_grpo", GRPO + "--reward {tmp}/nan.pt", ["nan.pt", "not a finite number"]),
    ("train_grpo", GRPO + "--reference {tmp}/other.pt", ["other.pt", "shape"]),
    ("train_grpo", GRPO + "--watch judge --prompts {bare} --eval-data {bare}", ["judge", "--watch"]),
    (
        "train_grpo",
        GRPO + "--reward answer --watch= --prompts {bare} --eval-data {bare}",
        ["answer", "GSM8K"],
    ),
    ("collect", COLLECT + "--policy {base}", ["'base'", "'sft'"]),
    ("collect", COLLECT + "--annotator nobody", ["nobody", "world"]),
    ("collect", COLLECT + "--annotator rm:", ["rm:PATH"]),
    ("collect", COLLECT + "--annotator human:", ["human:", "rm:PATH"]),
    ("collect", COLLECT + "--annotator world:3", ["world:3"]),
    ("collect", COLLECT + "--annotator rm:{none}", ["none", "checkpoint"]),
    ("collect", COLLECT + "--annotator rm:{sft} --count 4", ["'sft'", "'rm'"]),
    ("collect", COLLECT + "--annotator rm:{tmp}/nan.pt --count 4", ["nan.pt", "not a finite number"]),
    ("collect", COLLECT + "--annotator ai:", ["ai:PATH"]),
    ("collect", COLLECT + "--annotator ai:{none}", ["none", "checkpoint"]),
    ("collect", COLLECT + "--annotator ai:{rm} --count 4", ["'rm'", "'sft'"]),
    ("collect", COLLECT + "--annotator ai:{sft} --constitution {none}", ["no constitution", "none"]),
    ("collect", COLLECT + "--annotator ai:{sft} --constitution {empty}", ["empty", "no principle"]),
    ("collect", COLLECT + "--annotator rm:{rm} --resume", ["p.votes.jsonl", "nothing to resume"]),
    ("collect", COLLECT + "--annotator human --resume", ["--resume", "lab.annotate"]),
    ("collect", COLLECT + "--annotator human --out {tmp}/hand.jsonl", ["hand.votes.jsonl", "--resume"]),
    ("collect", COLLECT + "--out {tmp}/hand.jsonl", ["hand.votes.jsonl", "--resume", "--out"]),
    ("collect", COLLECT + "--out {tmp}/compact.jsonl", ["compact.votes.jsonl", "--resume", "--out"]),
    ("collect", COLLECT + "--annotator rm:{rm} --resume --out {tmp}/bad.jsonl", ["bad.votes.jsonl, line 1"]),
    ("collect", COLLECT + "--resume", ["--resume", "rm:PATH"]),
    ("collect", COLLECT + "--votes 9", ["--votes 9", "--crowd of 5"]),
    ("collect", COLLECT + "--votes 0", ["--votes 0"]),
    ("collect", COLLECT + "--min-agreement 2", ["--min-agreement 2"]),
    ("collect", COLLECT + "--annotator human --temperature 0 --count 4", ["alike", "--temperature"]),
    ("collect", COLLECT + "--samples 1", ["--samples"]),
    ("collect", COLLECT + "--prompts {bare}", ["meta"]),
    ("collect", COLLECT + "--prompts {odd}", ["meta"]),
    ("collect", COLLECT + "--prompts {other}", ["other", "meta"]),
    ("collect", COLLECT + "--prompts {long} --annotator human", ["no prompt leaves room", "127"]),
    ("collect", COLLECT + "--top-p 0", ["top_p"]),
    ("collect", COLLECT + "--max-new-tokens 0", ["max_new_tokens"]),
    ("critique", CRITIQUE + "--policy {base}", ["'base'", "'sft'"]),
    ("critique", CRITIQUE + "--policy {none}", ["none", "checkpoint"]),
    ("critique", CRITIQUE + "--constitution {none}", ["no constitution", "none"]),
    ("critique", CRITIQUE + "--constitution {empty}", ["empty", "no principle"]),
    ("critique", CRITIQUE + "--prompts {thumbs}x", ["thumbs.jsonlx", "exist"]),
    ("critique", CRITIQUE + "--prompts {rows}", ["rows, line 1", "prompt"]),
    ("critique", CRITIQUE + "--prompts {long}", ["no prompt leaves room", "127"]),
    ("critique", CRITIQUE + "--watch answer", ["final answer", "meta.answer is missing"]),
    ("critique", CRITIQUE + "--max-new-tokens 0", ["max_new_tokens"]),
    ("critique", CRITIQUE + "--max-new-tokens 1 --count 4", ["round 1", "critique"]),
    ("evaluate", EVALUATE + "--checkpoints {sft} {none}", ["none", "checkpoint"]),
    ("evaluate", EVALUATE + "--prompts {bare}", ["meta"]),
    ("evaluate", EVALUATE + "--prompts {other}", ["other", "meta", "--checks"]),
    ("evaluate", EVALUATE + "--samples 0", ["--samples"]),
    ("evaluate", EVALUATE + "--reference {none}", ["none"]),
    ("evaluate", EVALUATE + "--elo", ["--elo", "--checkpoints"]),
    ("chat", "--checkpoint {none}", ["none", "checkpoint"]),
    ("nanoalign.world.__main__", "--size huge", ["huge", "tiny"]),
]


@pytest.mark.parametrize("script, flags, names", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_sentence_that_names_it(script, flags, names, mistakes, monkeypatch):
    script = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.format(**mistakes).split()])
    with pytest.raises(SystemExit) as stopped:
        cli.run(script.main, script.Config, script.__doc__)
    message = stopped.value.code  # sys.exit(text) prints it to stderr, with status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert all(name in message for name in names), message


def test_a_real_process_ends_a_mistake_without_a_traceback(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    fork = lambda *words: forked(lambda: command(*words))  # noqa: E731
    for start, flags, status, key in [(run, "--data no.txt", 1, "no.txt"), (fork, "--no 1", 2, "--no")]:
        code, _, errors = start("train_pretrain.py", *flags.split())
        assert code == status and errors.startswith("error: ") and key in errors and errors.count("\n") == 1
