"""Training steps against trl: tokens/s and peak memory of the same weights, rows, batches and precision.

    python bench/train.py --vs trl --data hh_harmless.jsonl                    # a 4-layer, 256-wide GPT-2
    python bench/train.py --vs trl --data hh_harmless.jsonl --model gpt2 --stages dpo grpo
    python bench/train.py --data hh_harmless.jsonl --short                     # DPO only, four minutes

The rows are pairs such as Anthropic's HH (the file harmless-base/test.jsonl.gz of
https://huggingface.co/datasets/Anthropic/hh-rlhf, unpacked), at their real lengths; longer ones than
--max-length are left out. Nothing is fetched, but for tiktoken's r50k_base on first use.

nanoalign's side is `main` of train_X.py, untouched: a clock stands in the method that logs. trl's side is its
trainer's `train`, which gets the batches that the script has drawn, in the same order; fp32 on a CPU, bf16
autocast on a GPU, whatever trl's default. Before any timing the losses and gradient norms of three steps must
agree. A run is a process of its own; each times --steps steps after --warmup untimed ones. Memory is the peak
over those steps, beyond what the process held after its imports.

MFU counts the FLOPs that the method needs (forward 1, backward 2, reference 1; attention in full, as PaLM
does), not padding nor recomputed logits: of the peak of an H100 or H200 in bf16 (989 TFLOP/s), and of a
square matrix product measured beside it.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.peers import trainer, twins
from bench.timing import alternate, finish, forget_peak, in_child, matmul_flops, memory
from nanoalign import UserError, cli
from nanoalign.checkpoint import save
from nanoalign.data import BatchOrder, chat_examples, one_per_prompt, pair_examples, thin
from nanoalign.model import GPTConfig, preset
from nanoalign.rows import read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import pick_device

PEERS = ("trl, defaults", "trl, fast")
OURS = {  # the flags in which the papers' defaults, or trl's, differ from the scripts'
    "sft": {"adam_eps": 1e-8},
    "orpo": {"adam_eps": 1e-8},
    "dpo": {},
    "kto": {},
    "rm": {"centering": 0.0},
    "grpo": {
        "kind": "dapo", "clip_high": 0.2, "kl": "k3", "beta": 0.04, "epochs": 1, "reward": "length",
        "watch": "", "eval_prompts": 1,
    },
}  # fmt: skip
PASSES = {"sft": 3, "orpo": 3, "rm": 3, "dpo": 4, "kto": 6, "grpo": 6}  # forward passes' worth of FLOPs


@dataclass
class Config:
    data: str = ""  # pair rows: HH transcripts
    vs: str = "trl"  # the peer: trl
    stages: tuple[str, ...] = tuple(OURS)  # which scripts: sft orpo dpo kto rm grpo
    model: str = "small"  # small (4 layers, D 256) or a GPT-2 of nanoalign/model.py: gpt2, gpt2-medium, …
    max_length: int = 512  # tokens of prompt and response
    batch_size: int = 8  # conversations, pairs or labelled rows per step; of GRPO the prompts
    group_size: int = 8  # responses to each prompt of GRPO
    max_new_tokens: int = 64  # length limit of a response of GRPO
    steps: int = 8  # optimiser steps that are timed
    warmup: int = 3  # steps before them: they compile
    rounds: int = 5  # runs of each
    short: bool = False  # DPO only: two rounds of three steps, four pairs of at most 256 tokens
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table


# ------------------------------------------------------------------------------------------ what both do


class Clock:
    """What a run shows of itself at the end of its steps; memory and time from `warmup` on."""

    def __init__(self, config: dict):
        self.device, self.config = pick_device(config["device"]), config
        self.last = config["warmup"] + config["steps"]
        import torch._inductor.compile_fx  # noqa: F401  an import of either side, and no memory of a step

        self.before, self.result = memory(self.device), {"losses": [], "norms": []}

    def step(self, step: int) -> None:
        if step not in (self.config["warmup"], self.last):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if step == self.config["warmup"]:
            forget_peak(self.device)
            self.start = time.perf_counter()
        else:
            self.result["seconds"] = time.perf_counter() - self.start
            self.result["mb"] = memory(self.device, peak=True) - self.before


class Enough(Exception):
    """The last step that counts is done."""


def nanoalign(stage: str, config: dict, folder: str) -> dict:
    """Run train_<stage>.py's main → seconds, MB, losses; the batches it drew, the responses it sampled."""
    script, batches, answers = importlib.import_module(f"train_{stage}"), [], []
    responses = config["batch_size"] * config["group_size"]
    given = {
        "init": f"{folder}/init.pt", "data": f"{folder}/data.jsonl", "prompts": f"{folder}/data.jsonl",
        "eval_data": f"{folder}/eval.jsonl", "out": f"{folder}/{stage}.pt", "max_length": config["max_length"],
        "batch_size": responses if stage == "grpo" else config["batch_size"], "minibatch": responses,
        "group_size": config["group_size"], "max_new_tokens": config["max_new_tokens"], "lr": 1e-4, "warmup": 0,
        "steps": config["warmup"] + config["steps"], "log_every": config["log_every"], "eval_every": 10**6,
        "save_every": 10**6, "device": config["device"], **OURS[stage],
    }  # fmt: skip
    known = {field.name for field in fields(script.Config)}
    clock, log, draw = Clock(config), cli.Metrics.log, BatchOrder.__getitem__

    def logged(metrics, step, **values):
        values = log(metrics, step, **values)
        clock.result["losses"].append(values["loss"])
        clock.result["norms"].append(values["grad_norm"])
        clock.step(step)
        if step == clock.last:
            raise Enough

    def drawn(order, step):
        batches.append(draw(order, step))
        return batches[-1]

    def sampled(*args, **options):
        for indices, rollout in rollouts(*args, **options):
            if len(indices) == responses:  # and not those of the held-out prompts
                answers.append([(len(args[2][i]), r) for i, r in zip(indices, rollout.responses())])
            yield indices, rollout

    cli.Metrics.log, BatchOrder.__getitem__ = logged, drawn
    if stage == "grpo":
        rollouts, script.rollouts = script.rollouts, sampled
    with contextlib.suppress(Enough), contextlib.redirect_stdout(sys.stderr):
        script.main(script.Config(**{k: v for k, v in given.items() if k in known}))
    batches = [batch.tolist() for batch in batches]
    return {**clock.result, "batches": batches, "answers": answers}


def trl(stage: str, config: dict, folder: str, name: str, batches: list, answers: list) -> dict:
    """Run trl's trainer on those batches; with `answers`, on those responses too."""
    os.environ.update(CI="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with contextlib.redirect_stdout(sys.stderr):
        peer, callback = trainer(stage, config, folder, name == "trl, fast", batches, answers)
        clock = Clock(config)

        class Look(callback):
            def on_step_end(self, args, state, control, **_):
                clock.step(state.global_step)

            def on_log(self, args, state, control, logs, **_):
                if "grad_norm" in logs:
                    clock.result["losses"].append(logs["loss"])
                    clock.result["norms"].append(logs["grad_norm"])

        peer.add_callback(Look())
        peer.train()
    return clock.result


# ------------------------------------------------------------------------------------------------ FLOPs


def forward_flops(config: GPTConfig, lengths: list[int], scored: int) -> float:
    """FLOPs of the matrix products of one forward pass over rows of these lengths, without padding; `scored`
    tokens go through the head. Attention counts in full, though half of it is masked."""
    attention = config.heads * config.head_dim
    qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
    mlp = (3 if config.mlp == "swiglu" else 2) * config.mlp_width
    block = sum(lengths) * 2 * config.width * (qkv + attention + mlp) + 4 * attention * sum(n * n for n in lengths)
    return config.layers * block + 2 * config.width * config.vocab_size * scored


def sides(stage: str, run: dict, pairs: list, chats: list) -> list[list[tuple[int, int]]]:
    """For each step that a run took, the (length, scored tokens) of every row."""
    if stage == "grpo":
        return [[(n + len(r), len(r)) for n, r in step] for step in run["answers"]]
    both = [[(len(ids), int(mask.sum())) for ids, mask in pair] for pair in pairs]
    whole = [[(chosen[0], chosen[0] - 1), rejected] for chosen, rejected in both]
    rows = {
        "sft": [[(len(ids), int(mask.sum()))] for ids, mask in chats],
        "kto": [[side] for pair in both for side in pair],
        "orpo": whole,
        "rm": [[(n, 0) for n, _ in pair] for pair in both],
    }.get(stage, both)
    return [[side for i in batch for side in rows[i]] for batch in run["batches"]]


# ------------------------------------------------------------------------------------------- measurements


def prepare(config: Config, rows: list[dict], folder: str, tokenizer, shape: GPTConfig, alike: bool) -> dict:
    """Write the rows that the steps need, and the weights of both sides → what FLOPs are counted from."""
    folder_steps = config.warmup + config.steps
    if alike:  # chosen sides of one length: else trl's NLL of ORPO weighs rows by their tokens
        lengths = [len(chosen[0]) for (chosen, _), _ in rows]
        common = max(set(lengths), key=lengths.count)
        rows = sorted(rows, key=lambda row: abs(len(row[0][0][0]) - common))
    rows = rows[: folder_steps * config.batch_size + 2] if alike else thin(rows, folder_steps * config.batch_size + 2)
    write_rows(f"{folder}/data.jsonl", [row for _, row in rows[2:]])
    write_rows(f"{folder}/eval.jsonl", [row for _, row in rows[:2]])
    return rows
