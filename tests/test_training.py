"""One optimisation step: decay, clipping, schedule, and gradient accumulation that changes nothing."""

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch

import train_dpo
import train_pretrain
import train_sft
from nanoalign import UserError, training
from nanoalign.checkpoint import load
from nanoalign.generate import generate
from nanoalign.model import GPT, preset
from nanoalign.optimizer import AdamW
from nanoalign.packing import segment_mask, segment_positions
from nanoalign.run import already_finished, fingerprint
from nanoalign.training import (
    compile_hidden,
    freeze,
    learning_rate,
    make_optimizer,
    optimizer_step,
    pick_device,
)

TINY = preset("world-tiny", vocab_size=64, context=16, norm="layernorm", bias=True)


def test_weight_decay_shrinks_matrices_only():
    model = GPT(TINY)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)  # nothing but decay moves a weight
    optimizer_step(model, make_optimizer(model, 1.0, weight_decay=0.1), lr=0.5, clip=1.0)
    for name, parameter in model.named_parameters():
        expected = 1 - 0.5 * 0.1 if parameter.dim() == 2 else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


def test_every_parameter_is_optimised_once():
    model = GPT(TINY)
    groups = make_optimizer(model, 1.0, weight_decay=0.1).param_groups
    assert sorted(p.data_ptr() for g in groups for p in g["params"]) == sorted(
        p.data_ptr() for p in model.parameters()
    )


def test_a_step_is_adamw_on_the_clipped_gradient_and_reports_the_norm_before():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    for clip, gradient in [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])]:  # 0: no clipping
        model.weight.data, model.weight.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        assert optimizer_step(model, optimizer, lr=0.1, clip=clip).item() == 5.0
        expected = torch.tensor([[1.0, 2.0]]) - 0.1 * torch.tensor([gradient])
        torch.testing.assert_close(model.weight.data, expected)
        assert model.weight.grad is None  # zeroed for the next step


def test_the_learning_rate_warms_up_linearly_and_falls_to_zero_by_half_a_cosine():
    rate = [learning_rate(step, steps=110, peak=2.0, warmup=10) for step in range(111)]
    assert rate[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(rate) == rate[9] == rate[10] == 2.0
    assert rate[110] == pytest.approx(0) and rate == sorted(rate[:10]) + sorted(rate[10:], reverse=True)
    assert rate[60] == pytest.approx(1.0) and rate[35] == pytest.approx(1 + math.cos(math.pi / 4))


def test_a_schedule_shorter_than_its_warmup_or_without_one_is_sane():
    assert learning_rate(0, 1, 1.0, warmup=0) == 1.0
    assert [learning_rate(s, 2, 1.0, warmup=4) for s in range(2)] == [0.25, 0.5]
    assert learning_rate(500, 100, 1.0, warmup=10) == pytest.approx(0.0)  # past the end


def test_a_compiled_forward_still_separates_the_responses_that_share_a_row(monkeypatch, double):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    model, ids = GPT(TINY), torch.randint(64, (2, 9))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 2, 2, 3, 3]])
    packed = {"positions": segment_positions(segments), "visible": segment_mask(segments)}
    due = model.hidden(ids), model.hidden(ids, **packed)
    compile_hidden(model)
    torch.testing.assert_close((model.hidden(ids), model.hidden(ids, **packed)), due)
    assert not torch.allclose(*due)


def test_sampling_leaves_the_compiled_forward_alone(monkeypatch):
    """A cache that grows would use up dynamo's graphs of one function, and training run eager."""
    model, calls = GPT(TINY), []
    monkeypatch.setattr(
        training, "compile_or_eager", lambda f: lambda *a, **more: calls.append(1) or f(*a, **more)
    )
    compile_hidden(model)
    generate(model, torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 2]), 5, None, 0, seed=0)
    assert not calls
    model.hidden(torch.ones(1, 3, dtype=torch.long))
    assert calls


def test_a_frozen_model_has_no_gradients():
    model = freeze(GPT(TINY))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_an_unknown_or_absent_device_is_a_user_error():
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


def test_the_tests_run_as_if_there_were_no_gpu(request, run):
    """On one a run is in bf16, a fork fails, and a tensor of the test's own lies elsewhere."""
    if request.config.getoption("gpu"):
        pytest.skip("they are to see it")
    code = "import os, torch; print(os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.is_available())"
    assert run("-c", code)[1] == " False\n" and pick_device("auto").type != "cuda"


def test_a_fingerprint_tells_data_and_weights_apart():
    weights = torch.arange(4.0)
    assert fingerprint("a", weights) == fingerprint("a", weights.clone())
    different = [
        fingerprint("b", weights),
        fingerprint("a", weights + 1e-6),
        fingerprint("a", weights.numpy()[:3]),
    ]
    assert fingerprint("a", weights) not in different


def test_resume_of_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    config = train_sft.Config(out=str(tmp_path / "x.pt"), resume=True)
    assert not already_finished(config)
    (tmp_path / "x.pt").touch()
    assert already_finished(config) and "finished" in capsys.readouterr().out
    (tmp_path / "x.partial.pt").touch()
    assert not already_finished(config)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_gradient_accumulation_equals_the_one_big_batch(stage, tmp_path, world, sft, pairs, double):
    script, inputs = {
        "pretrain": (
            train_pretrain,
            {"data": f"{world}/pretrain.jsonl", "model": "world-tiny", "context": 32},
        ),
        "sft": (train_sft, {"data": f"{world}/sft.jsonl", "init": sft}),
        "dpo": (train_dpo, {"data": pairs, "init": sft}),
    }[stage]
    weights, rows = [], []
    for micro_batch in (0, 3):  # 8 = 3 + 3 + 2 rows of different lengths
        out = str(tmp_path / f"{micro_batch}.pt")
        schedule = {"batch_size": 8, "micro_batch": micro_batch, "warmup": 0, "log_every": 1}
        script.main(
            script.Config(**inputs, **schedule, out=out, epochs=0.015 if stage == "pretrain" else 0.1)
        )
        weights.append(load(out)["model"])
        lines = Path(out).with_suffix(".metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows.append([row for line in lines if "lr" in (row := json.loads(line))])
    assert len(rows[0]) >= 3
    for whole, pieces in zip(*rows):
        assert (pieces["loss"], pieces["grad_norm"]) == pytest.approx(
            (whole["loss"], whole["grad_norm"]), rel=1e-5
        )
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole)  # to fp32's rounding: the weights are stored so


def test_the_optimiser_is_torchs_bit_for_bit():
    """Also where it goes on from a state."""
    torch.manual_seed(0)
    start, ended = GPT(preset("world-tiny", vocab_size=64, context=8)), []
    for kind in (AdamW, torch.optim.AdamW):
        model, state = copy.deepcopy(start), None
        for _ in range(2):
            optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
            if state:
                optimizer.load_state_dict(state)
            for _ in range(3):
                model(torch.arange(8)[None]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            state = copy.deepcopy(optimizer.state_dict())
        ended.append(model.state_dict())
    ours, theirs = ended
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert torch.is_grad_enabled() and not torch.equal(ours["embed.weight"], start.embed.weight)
