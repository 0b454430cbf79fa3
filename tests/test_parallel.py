"""Several processes compute what one computes: every script, replicated and sharded, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write_lines
from wires import asked, said, user

ROOT = Path(__file__).parents[1]
LOCAL = ("--standalone", "--nproc-per-node")


def files(folder, tiny):
    """Rows of every kind, few enough that steps do not come out even among two processes."""
    rows = asked(9)
    pairs = [
        {"prompt": row["prompt"], "chosen": said(i, 2 + i % 4), "rejected": said(i + 3, 1 + i % 5), **more}
        for i, row in enumerate(rows)
        for more in ({}, {"probability": 0.75})[: 1 + i % 2]
    ]
    steps = [
        {"prompt": row["prompt"], "completions": [said(i, 2), said(i + 1, 3)], "labels": [1, i % 2], "label": True}
        for i, row in enumerate(rows)
    ]
    kinds = {
        "text": [{"text": said(i, 3 + 2 * i)} for i in range(12)],
        "chat": [{"messages": user(row["prompt"]) + [{"role": "assistant", "content": said(i, 1 + i % 6)}]} for i, row in enumerate(rows)],
        "pairs": pairs,
        "thumbs": [{"prompt": row["prompt"], "completion": said(i, 1 + i % 5), "label": i % 3 > 0} for i, row in enumerate(rows)],
        "steps": steps,
        "prompts": rows,
        "one": rows[:1],
    }
    return {kind: write_lines(folder / f"{kind}.jsonl", lines) for kind, lines in kinds.items()}


def training(tiny, data) -> dict:
    """A run of three steps by every script: its module and flags."""
    policy, reward = str(tiny / "policy.pt"), str(tiny / "rm.pt")
    sampled = {
        "init": policy, "prompts": data["prompts"], "eval_data": data["one"], "reward": f"{reward} - 0.1*length",
        "batch_size": 12, "minibatch": 8, "max_new_tokens": 9, "doctor": "", "warmup": 0, "reference": str(tiny / "reference.pt"),
    }  # fmt: skip
    methods = {
        "pretrain": ("train_pretrain", {"data": data["text"], "eval_data": data["text"], "model": "world-nano", "context": 12, "batch_size": 3}),
        "sft": ("train_sft", {"init": policy, "data": data["chat"]}),
        "packed": ("train_sft", {"init": policy, "data": data["chat"], "packing": True}),
        "dpo": ("train_dpo", {"init": policy, "data": data["pairs"], "micro_tokens": 90}),
        "kto": ("train_kto", {"init": policy, "data": data["thumbs"], "micro_tokens": 60}),
        "orpo": ("train_orpo", {"init": policy, "data": data["pairs"], "nll": "all"}),
        "rm": ("train_rm", {"init": policy, "data": data["pairs"]}),
        "prm": ("train_prm", {"init": policy, "data": data["steps"]}),
        "adapters": ("train_dpo", {"init": policy, "data": data["pairs"], "lora": 2}),
        "alone": ("train_sft", {"init": policy, "data": data["chat"], "batch_size": 1}),
        "online": ("lab.train_online_dpo", {"init": policy, "data": data["pairs"], "reward": reward, "max_new_tokens": 9}),
        "ppo": ("train_ppo", {**sampled, "kl_target": 0.1, "kl_horizon": 50.0, "micro_batch": 3}),
        "shared": ("train_ppo", {**sampled, "shared_critic": True}),
        "grpo": ("train_grpo", {**sampled, "group_size": 4}),
        "few": ("train_grpo", {**sampled, "group_size": 4, "batch_size": 4, "minibatch": 4}),
        "steps": ("lab.train_grpo_steps", {**sampled, "init": str(tiny / "solver.pt"), "group_size": 4, "reward": f"prm-steps:{tiny / 'prm.pt'}"}),
    }  # fmt: skip
    usual = {"eval_every": 2, "steps": 3, "lr": 3e-3, "warmup": 1, "log_every": 1, "device": "cpu", "save_every": 2}
    found = {}
    for name, (module, flags) in methods.items():
        more = {} if "eval_data" in flags else {"eval_data": flags["data"]}
        found[name] = module, {**usual, "batch_size": 5, **more, **flags}
    return found


def sampling(tiny, data) -> dict:
    """collect, best_of_n and evaluate: each module and its flags."""
    policy, solver = str(tiny / "policy.pt"), str(tiny / "solver.pt")
    usual = {"max_new_tokens": 9, "device": "cpu", "seed": 1}
    search = {"search": ["beam", "dvts"], "width": 2, "expansions": 2, "depth": 3, "subsets": 20}
    judged = {"reward": str(tiny / "rm.pt"), "checks": "nanoalign/world/verdicts.py", "elo": False}
    return {
        "collect": ("collect", {"policy": policy, "prompts": data["prompts"], "annotator": f"rm:{tiny / 'rm.pt'}", "samples": 3, **usual}),
        "best": ("best_of_n", {"policy": solver, "prm": str(tiny / "prm.pt"), "problems": data["prompts"], "samples": 3, **search, **usual}),
        "card": ("evaluate", {"checkpoints": [policy, str(tiny / "base.pt")], "reference": policy, "prompts": data["prompts"], "samples": 1, **judged, **usual}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """All of these on one process, and on two; the runs of the latter sharded, too. → their folder."""
    folder = tmp_path_factory.mktemp("processes")
    data = files(folder, tiny)
    runs, others = training(tiny, data), sampling(tiny, data)
    jobs = [[name, *job, "float64"] for name, job in {**runs, **others}.items()]
    jobs += [[f"{name}-single", *runs[name], "float32"] for name in ("sft", "dpo", "ppo")]
    parts = [[f"{name}-parts", module, {**flags, "shard": True}, dtype] for name, module, flags, dtype in jobs if "steps" in flags]
    python = [sys.executable]
    for count, work in ((1, jobs), (2, jobs + parts)):
        (folder / "jobs.json").write_text(json.dumps(work))
        several = ["-m", "torch.distributed.run", *LOCAL, "2"] if count == 2 else []
        done = subprocess.run([*python, *several, "tests/processes.py", folder], cwd=ROOT, capture_output=True, text=True, env=surroundings())
        assert done.returncode == 0, done.stderr[-3000:]
    return folder
