"""The benchmarks' arithmetic: ratios, exponents, FLOPs, bytes and memory, each against something counted."""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import command, forked
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab.bench import generate, logprobs, scaling, timing, train, ziegler
from nanoalign import UserError
from nanoalign.data import thin
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import read_rows, write_rows

CPU = torch.device("cpu")
LLAMA = {"vocab_size": 40, "context": 16, "layers": 2, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 8}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}

# ---------------------------------------------------------------------------------- rounds, ratios, exponents


def test_rounds_alternate_and_no_function_always_comes_first():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert timing.alternate(runs, 3, "") == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(calls) == "abcbcacab"


def test_a_ratio_is_taken_within_a_round():
    """The machine halves its speed after each round: medians of times would be of different machines."""
    slow = {"case": "c", "name": "slow", "rates": [8.0, 4.0, 2.0], "seconds": [1.0, 2.0, 4.0]}
    fast = {**slow, "name": "fast", "rates": [24.0, 12.0, 5.0], "seconds": [1 / 3, 2 / 3, 8 / 5]}
    cells = timing.cells(fast, slow)
    assert cells[2:5] == ["667 (333 – 1,600)", "12", "3 (2.5 – 3)"]
    assert timing.cells(slow, slow)[4] == "1"


def test_a_failure_is_a_row_of_the_table_and_the_others_are_still_compared(capsys):
    row = {"case": "c", "machine": "m", "seconds": [1.0]}
    results = [{"case": "c", "machine": "m", "name": "peer", "error": "no compiler"}]
    results += [{**row, "name": "ours", "rates": [2.0]}, {**row, "name": "other", "rates": [6.0]}]
    timing.show(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "m" and "no compiler" in lines[4] and "| – |" in lines[5]


def test_the_fit_recovers_a_planted_exponent():
    sizes = [2, 4, 8, 16, 32]
    assert scaling.exponent(sizes, [0.3 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    off = [1.1, 0.9, 1.0, 0.9, 1.1]  # symmetric, so without a slope of its own
    assert scaling.exponent(sizes, [5 * n**-0.5 * x for n, x in zip(sizes, off)]) == pytest.approx(-0.5)


# ----------------------------------------------------------------------------------- FLOPs, bytes, memory


@pytest.mark.parametrize("style", [{}, GPT2])
def test_flops_are_those_that_torch_counts(style):
    config = GPTConfig(**LLAMA, **style)
    model, ids = GPT(config), torch.randint(40, (3, 11))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(ids)
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert forward == train.forward_flops(config, [11, 11, 11], scored=33)
    assert counter.get_total_flops() == 3 * forward  # what PASSES calls 3


def test_flops_leave_padding_and_unscored_tokens_out():
    config = GPTConfig(**LLAMA)
    both = train.forward_flops(config, [4, 9], scored=5)
    assert both == train.forward_flops(config, [4], 2) + train.forward_flops(config, [9], 3)
    assert both - train.forward_flops(config, [4, 9], 0) == 5 * 2 * 24 * 40


def test_every_stage_counts_the_tokens_that_it_trains_on():
    def side(prompt, response):
        return np.zeros(prompt + response, dtype=np.int64), np.arange(prompt + response) >= prompt

    pairs, chats = [(side(3, 2), side(3, 4)), (side(5, 1), side(5, 6))], [side(3, 2), side(5, 1)]
    expected = {
        "sft": [[(6, 1)], [(5, 2)]],
        "dpo": [[(6, 1), (11, 6)], [(5, 2), (7, 4)]],
        "orpo": [[(6, 5), (11, 6)], [(5, 4), (7, 4)]],
        "rm": [[(6, 0), (11, 0)], [(5, 0), (7, 0)]],
        "kto": [[(7, 4)], [(5, 2)]],  # rows 1 and 0 are both sides of the first pair
    }
    for stage, found in expected.items():
        assert train.counts(stage, {}, [[1], [0]], pairs, chats) == found
    assert train.counts("grpo", {"sampled": [[(3, 2), (3, 7)]]}, [], pairs, []) == [[(5, 2), (10, 7)]]


def test_a_decoding_step_reads_every_matrix_but_the_tables_and_the_cache_so_far():
    config = GPTConfig(**LLAMA | {"kv_heads": 4}, **GPT2)
    model = GPT(config)
    block = 2 * 2 * 24 + (24 + 1) * 96 + (32 + 1) * 24 + (24 + 1) * 96 + (96 + 1) * 24
    weights = 2 * block + 2 * 24 + 40 * 24  # two blocks, the last norm, the head; no positions
    cache = 2 * 2 * 5 * 4 * 8 * 7  # keys and values, layers, rows, heads, head_dim, positions
    assert generate.bytes_per_step(model, 5, 7) == 4 * (weights + cache)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_sees_what_a_call_frees_again_and_nothing_from_before():
    def work(mb: int):
        blocks = [torch.ones(2**14) for _ in range(16 * mb)]  # 64 kB each: the C allocator keeps such blocks
        return torch.ones(2**14), len(blocks)

    last, _ = work(200)  # it lies above the blocks, which are free now, and hides those used again
    assert timing.extra_memory(lambda: work(100), CPU) == pytest.approx(100, abs=8)
    assert timing.extra_memory(lambda: work(0), CPU) == pytest.approx(0, abs=8)
    assert len(last)


# ----------------------------------------------------------------------------------- the implementations


def test_all_ways_to_the_loss_are_one_function():
    config = logprobs.Config(n=20, width=8, vocab=50)
    table = logprobs.implementations(CPU)
    for name in (name for name in table if "compiled" not in name):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
            assert max(logprobs.errors(table[name], config, dtype, CPU)) < bound, name
    broken = logprobs.by_autograd(lambda h, w, t: logprobs.full_logits(h, 1.01 * w, t))
    assert max(logprobs.errors(broken, config, torch.float32, CPU)) > 1e-3


def test_left_padded_prompts_hold_the_same_tokens_as_right_padded_ones():
    config = generate.Config(vocab=30, prompt_tokens=9)
    (right, lengths), (left, attention) = generate.batch(6, config, CPU, ragged=True)
    assert len(set(lengths.tolist())) > 1 and attention.sum(1).equal(lengths)
    for row, n, other, seen in zip(right, lengths, left, attention):
        assert row[:n].equal(other[-n:]) and row[:n].equal(other[seen.bool()]) and not row[n:].any()


def test_only_tokens_up_to_the_end_count():
    said = torch.tensor([[7, 7, 5, 1, 0, 0], [7, 7, 1, 1, 5, 5], [7, 7, 5, 5, 5, 5]])
    model = SimpleNamespace(generate=lambda **_: said)
    assert generate.hf(model, 4)(said[:, :2], None, 1) == 2 + 1 + 4
    assert generate.hf(model, 4)(said[:, :2], None, None) == 12


def test_losses_are_compared_where_trls_means_are_the_same():
    def pair(prompt, response):
        side = np.zeros(prompt + response), np.arange(prompt + response) >= prompt
        return side, side

    pairs = [pair(3, 5), pair(2, 6), pair(3, 2)]
    assert train.alike("dpo", [0, 1, 2], pairs) == [0, 1, 2]
    assert train.alike("orpo", [0, 1, 2], pairs) == [0, 1]
    assert train.alike("grpo", [0, 1, 2], pairs) == [0, 2]


# ------------------------------------------------------------------------------------------------ a whole run


def test_results_of_several_runs_become_one_table(tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(scaling, "AXES", [("DPO step", "batch"), ("GRPO iteration", "group")])
    monkeypatch.setattr(scaling, "SIZES", {"batch": 2, "length": 4, "vocab": 1100, "group": 4})
    config = scaling.Config(layers=1, width=16, points=2, rounds=2, out=str(out))
    scaling.main(config)
    scaling.main(config)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(torch.__version__ in row["machine"] for row in rows)
    assert all(len(row["seconds"]) == 2 and "time ∝ n^" in row["note"] for row in rows)
    status, printed, _ = forked(lambda: command("-m", "lab.bench.timing", out))
    assert status == 0 and printed.count("| case |") == 1 and printed.count("DPO step") == 2


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_script_runs_whole_and_its_peer_learns_what_it_drew(stage, tmp_path, sft, pairs, monkeypatch):
    """One batch a step, however often the script reads it, and of GRPO the answers to its prompts."""
    monkeypatch.chdir(ROOT)  # where the child finds its module
    shutil.copy(sft, tmp_path / "init.pt")
    rows = thin(read_rows(pairs, "pairs"), 12)
    for name, kept in (("data", rows[2:]), ("eval", rows[:2])):
        write_rows(f"{tmp_path}/{name}.jsonl", kept)
    sizes = {"batch_size": 3, "group_size": 2, "max_new_tokens": 8, "max_length": 64}
    config = train.Config(**sizes, steps=2, warmup=1, device="cpu")
    given = {**dataclasses.asdict(config), "steps": 3, "log_every": 1}
    spec = {"stage": stage, "given": given, "folder": str(tmp_path)}
    found = timing.in_child("lab.bench.peers", spec)
    assert len(found["losses"]) == len(found["norms"]) == len(found["batches"]) == 3, found
    assert all(len({*batch}) == 3 for batch in found["batches"])
    answered = [len({str(prompt) for prompt, _ in step}) for step in found["answers"]]
    assert answered == ([3, 3, 3] if stage == "grpo" else [])
    assert [len(step) for step in found["sampled"]] == [6] * len(answered)
    assert found["seconds"] > 0 and found["mb"] > 0


def test_prompts_that_are_padded_on_the_left_end_where_the_response_begins():
    prompts = [np.array([5, 6, 7]), np.array([8])]
    assert ziegler.left_padded(prompts, 0, CPU).tolist() == [[5, 6, 7], [0, 0, 8]]


def test_a_peer_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="`make parity` installs it"):
        ziegler.load("folder", CPU, 0, 1)


@pytest.mark.parametrize(
    "script, flags, sentence",
    [
        (train, {}, "name pair rows with --data"),
        (train, {"data": "x.jsonl", "stages": ("ppo",)}, "--stages are of sft, dpo"),
        (train, {"data": "x.jsonl", "peers": ("verl",)}, "--peers are of trl, defaults"),
        (scaling, {"points": 7}, "must be 2 to 5"),
        (generate, {"vs": "vllm"}, "the only peer here is hf"),
        (logprobs, {"dtypes": ("fp8",)}, "takes fp32 and bf16, not fp8"),
        (logprobs, {"n": 4, "vocab": 9, "only": ("magic",)}, "choose from full logits, eager"),
    ],
)
def test_a_users_mistake_is_one_sentence(script, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        script.main(script.Config(**flags))
