"""Every training script on a pretended GPU: it computes there what it computes on a CPU, and seldom waits."""

from itertools import pairwise

import pytest
import torch
from runs import ON_POLICY, STAGES, interrupt, same_run, steps, terminate

if torch.version.cuda is None:
    pytest.skip("torch is a CPU build: make pretend-gpu installs the other", allow_module_level=True)

from pretended import pretended_gpu

from nanoalign.checkpoint import load, partial_path
from nanoalign.optimizer import AdamW

FEW = {"steps": 3, "warmup": 0, "eval_every": 3, "save_every": 2, "lr": 1e-3}
LORA = [(stage, rank) for stage in STAGES for rank in (0, 4) if rank == 0 or stage != "pretrain"]
SMALL = {  # models of some thousand parameters, which end after a few words
    **{stage: {"init": "policy.pt"} for stage in ("sft", "rm", "prm", "dpo", "kto", "orpo")},
    **{stage: {"init": "policy.pt", "reward": "rm.pt"} for stage in ON_POLICY},
    "pretrain": {},
}


@pytest.fixture
def start(job, tiny):
    """start(stage, …) → the script, and the Config of a run of a few steps of small models."""

    def make(stage, **changes):
        files = {name: f"{tiny}/{file}" for name, file in SMALL[stage].items()}
        return job(stage, **{**FEW, **files, **changes})

    return make


def near(ours: list[dict], theirs: list[dict], **tolerance) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert {name: b[name] for name in a} == pytest.approx(a, **tolerance)


@pytest.mark.parametrize("stage, lora", LORA)
def test_a_run_on_a_gpu_is_that_on_a_cpu(stage, lora, start):
    """In fp32, to rounding: samples, scores, losses, gradients, evaluations and weights, three steps on."""
    script, here = start(stage, device="cpu", lora=lora)
    script.main(here)
    script, there = start(stage, device="cuda", precision="fp32", lora=lora)
    with pretended_gpu():
        script.main(there)
    near(steps(here.out), steps(there.out), rel=1e-3, abs=1e-5)
    ours, theirs = load(here.out)["model"], load(there.out)["model"]
    for name, weights in ours.items():
        torch.testing.assert_close(theirs[name], weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage, lora", LORA)
def test_in_bf16_it_starts_where_theory_says_and_stays_near_fp32(stage, lora, start):
    found = []
    for precision in ("fp32", ""):  # on a GPU bf16 is the default
        script, config = start(stage, device="auto", precision=precision, lora=lora)
        with pretended_gpu() as gpu:
            script.main(config)  # the step-0 checks hold
        found.append(steps(config.out))
    for exact, rounded in zip(*found, strict=True):
        if stage in ON_POLICY:  # a token on the edge is drawn otherwise, and so is all after it
            assert rounded["entropy"] == pytest.approx(exact["entropy"], rel=0.06)
            assert rounded["ratio_error"] < 0.03
        else:
            assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.01)
            assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    forward = [line for dtype, line in gpu.products if dtype == torch.float32 and "backward" not in line]
    assert {line.split(":")[0] for line in forward} <= {"nanoalign/scalar.py"}  # a scalar head's


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_on_a_gpu_bit_for_bit_and_its_file_goes_to_a_cpu(stage, start, monkeypatch):
    script, whole = start(stage, device="cuda", steps=4)
    script, config = start(stage, device="cuda", steps=4, resume=True)
    with pretended_gpu():
        script.main(whole)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt(patch, 3, terminate)
            script.main(config)
        partial = load(partial_path(config.out))
        script.main(config)
    assert len(partial["random"]["cuda"]) == 1
    same_run(whole, config)
    assert {weights.device.type for weights in load(config.out)["model"].values()} == {"cpu"}


def waits_by_step(script, config, monkeypatch) -> list[dict]:
    """Of a run on a pretended GPU: the waits between each update of the weights and the next."""
    passed, step = [], AdamW.step
    with pretended_gpu() as gpu:

        def count(*args, **options):
            passed.append(gpu.waits.copy())
            return step(*args, **options)

        monkeypatch.setattr(AdamW, "step", count)
        script.main(config)
    return [dict(after - before) for before, after in pairwise(passed)]


RARE = {"log_every": 100, "eval_every": 100, "save_every": 100, "steps": 5, "micro_batch": 4}


EACH = [
    (stage, every, due) for stage in STAGES if stage not in ON_POLICY for every, due in ((100, 0), (1, 1))
]


@pytest.mark.parametrize("stage, log_every, due", EACH)
def test_a_step_never_waits_for_the_gpu_and_a_logged_one_once(stage, log_every, due, start, monkeypatch):
    script, config = start(stage, device="cuda", **{**RARE, "log_every": log_every})
    for found in waits_by_step(script, config, monkeypatch)[1:]:  # the first step's is logged, and checked
        assert sum(found.values()) == due, found


@pytest.mark.parametrize("stage", ON_POLICY)
def test_the_updates_of_an_iteration_do_not_wait_for_the_gpu(stage, start, monkeypatch):
    more = {"micro_batch": 0, "epochs": 3, "batch_size": 16, "minibatch": 8}
    script, config = start(stage, device="cuda", **{**RARE, **more})
    waits = waits_by_step(script, config, monkeypatch)
    assert len(waits) == 5 * 6 - 1
    for update, found in enumerate(waits, 1):  # 6 updates an iteration; between two iterations it waits
        assert not found or update % 6 == 0, (update, found)
        assert sum(found.values()) <= 20, found


@pytest.mark.parametrize("flags", [{"checkpointing": True}, {"compile": True}, {"micro_tokens": 64}], ids=str)
def test_what_saves_memory_or_time_does_not_change_the_run(flags, start):
    """Compiled code is not: the flag is."""
    found = []
    for more in ({}, flags):
        script, config = start("dpo", device="cuda", precision="fp32", **more)
        with pretended_gpu():
            script.main(config)
        found.append(steps(config.out))
    near(*found, rel=1e-3, abs=1e-5)
