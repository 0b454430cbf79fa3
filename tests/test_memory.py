"""Will it fit? Every term beside what torch really holds, and whole runs beside the profiler's peak."""

import copy
import importlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lab.memory import SHAPES, command, total, write_data, write_model
from nanoalign import UserError, cli, kernels, memory
from nanoalign.cli import readable_rows
from nanoalign.data import BatchOrder
from nanoalign.extent import Batch, largest
from nanoalign.footprint import Head, Models, activations, rounded
from nanoalign.lora import add, matrices, without
from nanoalign.model import GPT, GPTConfig, KVCache
from nanoalign.packing import segment_mask, segment_positions
from nanoalign.scalar import ScalarGPT
from nanoalign.training import freeze, make_optimizer, optimizer_step
from train_dpo import Config

CPU, SMALL = torch.device("cpu"), {"vocab_size": 100, "layers": 3, "width": 64, "heads": 4}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
FAMILIES = {"llama": {}, "gpt2": GPT2, "grouped": {"kv_heads": 2, "head_dim": 32}, "qwen3": {"qk_norm": True}}
ONE = Batch(2, 10, 20, 12, 1, 40, 0, 16, 40, 3, 21, 15)
STAGES = ["pretrain", "sft", "dpo", "kto", "orpo", "rm", "prm", "ppo", "grpo"]


def nbytes(tensors) -> int:
    """Of different places in memory."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


# --------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("together", [False, True], ids=["alone", "sharing rows"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_forward_pass_keeps_is_what_autograd_saves(family, lora, bf16, together):
    torch.manual_seed(0)
    model, saved, size = GPT(GPTConfig(**SMALL, **FAMILIES[family])), [], 2 if bf16 else 4
    if lora:
        add(model, lora, 8.0)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    segments, how = torch.tensor([[0] * 40 + [1] * 30 + [2] * 26] * 3), {}
    if together:
        how = {"positions": segment_positions(segments), "visible": segment_mask(segments)}
    with (
        saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.hidden(torch.randint(0, 100, segments.shape), **how)
    real = nbytes(x for x in saved if x.untyped_storage().data_ptr() not in own)
    block, beside = activations(model, 96, size, masked=together)
    due = segments.numel() * (3 * block + beside) + rounded([model], size, graph=True)
    assert 0.97 * real < due < 1.05 * real


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_weights_gradients_and_moments_are_those_that_are_there(lora):
    """LoRA's reference takes nothing of its own, and only adapters have gradients and moments."""
    policy = GPT(GPTConfig(**SMALL))
    ref = without(policy) if lora else freeze(copy.deepcopy(policy))
    if lora:
        add(policy, lora, 8.0, bf16=True)
    found = memory.moments(Config(), "dpo", Models.of(policy, (ref,), 4, CPU), ONE)
    optimizer = make_optimizer(policy, 1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=lora > 0):
        policy(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    gradients = nbytes(p.grad for p in policy.parameters() if p.grad is not None)
    optimizer_step(policy, optimizer, 1e-3, 1.0)
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    both = [x for model in (policy, ref) for x in (*model.parameters(), *model.buffers())]
    assert found["stepping"]["gradients"] == gradients
    assert found["stepping"]["optimiser"] == nbytes(moments)
    assert found["stepping"]["weights"] == nbytes(both)
    adapters = sum(p.nbytes for name, p in policy.named_parameters() if name.endswith((".A", ".B")))
    assert not lora or gradients == adapters


@pytest.mark.parametrize("scored", [1, 64, 65, 200])
def test_logits_are_those_of_the_largest_chunk(scored, monkeypatch):
    made, logits = [], kernels._logits
    monkeypatch.setattr(kernels, "_logits", lambda *a: made.append(logits(*a)) or made[-1])
    hidden, weight = torch.randn(scored, 8), torch.randn(50, 8)
    kernels.linear_logprobs(hidden, weight, torch.zeros(scored, dtype=torch.long), chunk=64)
    assert Head(weight, 4, CPU, 64).logits(scored) == max(z.nbytes for z in made)


def test_the_cache_is_the_one_that_sampling_allocates():
    shape = GPTConfig(**SMALL, kv_heads=2)
    for size, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        cache = KVCache(shape, ONE.drawn, ONE.slots, CPU, dtype)
        found = memory.moments(Config(), "sft", Models.of(GPT(shape), (), size, CPU), ONE)
        assert found["sampling"]["cache"] == cache.k.nbytes + cache.v.nbytes


def test_a_critic_with_adapters_on_the_reward_model_costs_its_adapters_and_its_head():
    shape = GPTConfig(**SMALL)
    policy, reward = GPT(shape), freeze(ScalarGPT(shape))
    critic = ScalarGPT(shape)
    critic.gpt = without(reward.gpt).train()
    alone = memory.moments(Config(), "ppo", Models.of(policy, (reward,), 4, CPU), ONE)
    add(critic, 2, 4.0)
    both = Models.of(torch.nn.ModuleList((policy, critic)), (reward,), 4, CPU)
    more = memory.moments(Config(), "ppo", both, ONE)["stepping"]["weights"] - alone["stepping"]["weights"]
    assert more == 4 * sum(p.numel() for p in critic.parameters() if p.requires_grad)


def test_frozen_matrices_in_bf16_need_no_second_copy_in_bf16():
    found = []
    for bf16 in (False, True):
        models = Models.of(add(GPT(GPTConfig(**SMALL)), 2, 4.0, bf16), (), 2, CPU)
        found.append(memory.moments(Config(), "sft", models, ONE)["forward"])
    frozen = sum(layer.weight.numel() for layer in matrices(models.trained))
    assert found[0]["activations"] - found[1]["activations"] == 2 * frozen
    assert found[0]["weights"] - found[1]["weights"] == 2 * frozen


def test_a_file_is_there_twice_while_it_is_read_and_a_folder_is_not(tmp_path):
    policy = GPT(GPTConfig(**SMALL))
    found = [
        memory.moments(Config(init=str(init)), "sft", Models.of(policy, (), 4, CPU), ONE)["loading"]
        for init in ("x.pt", tmp_path)
    ]
    assert found[0] == {
        "weights": nbytes((*policy.parameters(), *policy.buffers())),
        "files": found[0]["weights"],
    }
    assert found[1]["files"] == 0


def test_checkpointing_keeps_the_stream_and_one_block():
    shape, found = GPTConfig(**{**SMALL, "layers": 10}), {}
    for checkpointing in (False, True):
        policy = GPT(shape)
        policy.checkpointing = checkpointing
        found[checkpointing] = memory.moments(Config(), "sft", Models.of(policy, (), 4, CPU), ONE)
    block, _ = activations(policy, ONE.length)
    less = found[False]["forward"]["activations"] - found[True]["forward"]["activations"]
    assert less == ONE.rows * ONE.length * 10 * (block - 4 * SMALL["width"])


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of every kind, a policy and a reward model."""
    path = str(tmp_path_factory.mktemp("memory"))
    with pytest.MonkeyPatch.context() as patch:
        shape = GPTConfig(context=512, layers=2, width=64, heads=4, kv_heads=2)
        patch.setitem(SHAPES, "small", shape)
        write_data(path, 40)
        write_model(path, "small")
    return path


def job(folder: str, stage: str, flags: str = ""):
    script = importlib.import_module(f"train_{stage}")
    model = "world-tiny" if stage == "pretrain" else "small"
    words = command(folder, stage, model, flags, 0)[1:]
    return script, cli.parse(script.Config, "", words)


def live_peak(main, config) -> int:
    """The most bytes that tensors held at one time, by torch's profiler."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        main(config)
    events = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(events).max())


LESS = "--max-new-tokens 8"


@pytest.mark.parametrize("stage, flags", [
    ("sft", "--batch-size 8"), ("sft", "--batch-size 16 --packing --lora 4"),
    ("sft", "--batch-size 4 --precision bf16 --lora 4 --base-dtype bf16"),
    ("pretrain", "--context 64 --batch-size 32 --micro-batch 16"), ("orpo", "--batch-size 4 --checkpointing"),
    ("dpo", f"--batch-size 4 {LESS}"), ("dpo", f"--batch-size 8 --lora 4 --micro-batch 2 {LESS}"),
    ("kto", "--batch-size 8 --micro-tokens 800"), ("rm", "--batch-size 4"), ("prm", "--no-reader"),
    ("rm", "--batch-size 2 --no-reader"), ("rm", "--batch-size 40 --no-reader --checkpointing"),
    ("ppo", f"{LESS} --lora 4"), ("ppo", f"{LESS} --micro-batch 8"), ("grpo", f"{LESS} --group-size 4"),
], ids=str)  # fmt: skip
def test_a_run_takes_what_it_said(stage, flags, folder, capsys):
    script, config = job(folder, stage, flags)
    real = live_peak(script.main, config)
    planned = next(row for row in readable_rows(cli.beside(config.out, ".metrics.jsonl")) if "moment" in row)
    assert 0.9 * real < 2**20 * total(planned) < 1.2 * real
    assert f"memory: at most {total(planned):,.0f} MB, {planned['moment']}" in capsys.readouterr().out


@pytest.mark.parametrize("stage, flags", [
    ("dpo", "--batch-size 8 --micro-batch 4"), ("sft", "--packing --batch-size 8"), ("rm", "--batch-size 8"),
    ("kto", "--micro-tokens 800"), ("grpo", f"{LESS} --group-size 4 --micro-batch 8"),
])  # fmt: skip
def test_the_largest_batch_is_the_largest_that_models_are_given(stage, flags, folder, monkeypatch):
    seen, planned, hidden = [0], [], GPT.hidden

    def watched(model, ids, *rest, **more):
        if torch.is_grad_enabled():
            seen.append(ids.shape[0] * ids.shape[1] if ids.dim() == 2 else 0)
        return hidden(model, ids, *rest, **more)

    monkeypatch.setattr(GPT, "hidden", watched)
    monkeypatch.setattr(memory, "largest", lambda *a: planned.append(largest(*a)) or planned[0])
    script, config = job(folder, stage, flags)
    script.main(config)
    [batch] = planned
    assert max(seen) <= batch.rows * batch.length
    assert max(seen) == batch.rows * batch.length or stage == "grpo"  # whose answers may end


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("stage", STAGES)
def test_plan_says_all_moments_and_stops_before_anything_is_written(stage, folder, capsys):
    script, config = job(folder, stage)
    config = replace(config, plan=True, out=f"{folder}/planned.pt")
    before = sorted(os.listdir(folder))
    with pytest.raises(SystemExit) as stop:
        script.main(config)
    assert not stop.value.code and sorted(os.listdir(folder)) == before
    said = capsys.readouterr().out
    assert all(name in said for name in ("loading", "forward", "backward", "stepping", "sampling", "reading"))


def test_plan_of_what_is_not_there_is_one_sentence(folder):
    script, config = job(folder, "dpo")
    with pytest.raises(UserError, match="there is no checkpoint nowhere"):
        script.main(replace(config, plan=True, init="nowhere.pt"))


def test_a_plan_does_not_keep_a_run_from_being_resumed(folder, monkeypatch, capsys):
    script, config = job(folder, "sft", "--save-every 1")
    config = replace(config, out=f"{folder}/resumed.pt")

    def stop(*rest, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanoalign.run.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    with pytest.raises(SystemExit):
        script.main(replace(config, resume=True, plan=True))
    assert os.path.exists(f"{folder}/resumed.partial.pt")
    script.main(replace(config, resume=True))
    assert "resume:" in capsys.readouterr().out and os.path.exists(config.out)


def test_eval_data_of_unknown_size_is_taken_to_fill_its_batches(folder):
    examples = [(np.arange(10), np.arange(10) >= 4)] * 40
    order = BatchOrder([10] * 40, 8, 0)
    own = largest(Config(batch_size=8), "kto", order, examples, 5)
    other = largest(Config(batch_size=8, eval_data="x"), "kto", order, examples, 5)
    assert own.drawn == 3 and other.drawn == 128 and other.read == 128 * (4 + Config.max_new_tokens)
