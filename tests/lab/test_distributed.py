"""What a process of several takes and sends: computed, against arithmetic by hand, and measured."""

import re
from pathlib import Path

import pytest
import torch
from runs import write_lines
from torch.distributed.run import get_args_parser

from lab import distributed, train_online_dpo
from nanoalign import UserError
from nanoalign.cli import readable_rows
from nanoalign.footprint import Models
from nanoalign.lora import add, without
from nanoalign.model import GPT, GPTConfig
from nanoalign.scalar import ScalarGPT
from nanoalign.training import freeze

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")

# -------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_is_computed(monkeypatch, capsys):
    """Of one shape and two methods, for all of them take half a minute; the others have their rows."""
    [table] = re.findall(r"^<!-- python -m lab.distributed --table -->\n(.*?)^<!-- end", PAGE, re.M | re.S)
    rows = [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")]
    assert all(rows.count(name) == len(distributed.METHODS) + 1 for name in distributed.SHAPES)
    name = "llama-3.2-1b"
    monkeypatch.setattr(distributed, "SHAPES", {name: distributed.SHAPES[name]})
    monkeypatch.setattr(distributed, "METHODS", ("dpo", "ppo"))
    distributed.main(["--table"])
    left_out = re.compile(r"\| (qwen|llama-3\.1)|.*\| (sft|grpo) \|")
    due = [line for line in table.splitlines() if not left_out.match(line)]
    assert capsys.readouterr().out.splitlines() == due
    assert len(due) == 15


def test_flags_that_the_page_names_are_there():
    own = {f"--{name.replace('_', '-')}" for name in train_online_dpo.Config.__dataclass_fields__}
    theirs = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    slurm = {f"--{name}" for name in ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "requeue")}
    slurm |= {"--cpus-per-task", "--time"}
    commands = {"--report", "--table"}
    named = set(re.findall(r"--[a-z][a-z0-9-]+", PAGE))
    assert len(named) > 20 and named <= own | theirs | slurm | commands | {"--shutdown-timeout"}


# -------------------------------------------------------------------------------------------------- by hand

V, D, L, M = 1000, 64, 3, 128  # tokens, width, layers, the MLP's width
BLOCK = 4 * D * D + 3 * D * M + 2 * D  # attention, gate, up and down, two norms
ROOTS = 2 * V * D + D  # embedding, head and norm
P = L * BLOCK + ROOTS
SHAPE = GPTConfig(vocab_size=V, context=1, layers=L, width=D, heads=1, mlp_width=M, tied=False)
BUFFERS = 2 * 4 * D // 2  # of one position
HALVES = 2 * L * (BLOCK - 2 * D)  # copies in bf16, which autocast makes of whole matrices and not of gathered


def models(trained, *held) -> Models:
    return Models.of(trained, held, 2, torch.device("cuda"), chunk=64)


def found(**parts: int) -> dict:
    return {"stepping": {"weights": 10**12, "optimiser": 8 * P, "gradients": 4 * P, **parts}}


def test_a_share_is_an_eighth_and_what_is_gathered_comes_on_top():
    gathered = 4 * ROOTS + 4 * BLOCK
    policy, ref = GPT(SHAPE), freeze(GPT(SHAPE))
    assert distributed.sharded(models(policy), found()) == (16 * P + BUFFERS) / 8 + gathered
    assert distributed.sharded(models(policy), found(activations=77), offload=True) == gathered + 77
    both = distributed.sharded(models(policy, ref), found())
    assert both == (20 * P + 2 * BUFFERS) / 8 + gathered + 4 * ROOTS


def test_gradients_are_there_twice_while_they_are_sent_and_a_policy_samples_whole():
    policy, parts = models(GPT(SHAPE)), {"weights": 0, "optimiser": 8 * P}
    share = (12 * P + BUFFERS) / 8 - HALVES
    backward = distributed.sharded(policy, {"backward": {**parts, "passing": 5}})
    assert backward == share + 12 * ROOTS + 10 * BLOCK + 5
    sampling = distributed.sharded(policy, {"sampling": {**parts, "cache": 3}})
    assert sampling == share + 4 * ROOTS + 2 * L * BLOCK + 3


def test_a_reward_model_is_shared_out_and_adapters_keep_their_base_twice():
    policy, reward = GPT(SHAPE), freeze(ScalarGPT(SHAPE))
    alone = distributed.sharded(models(policy), found())
    more = distributed.sharded(models(policy, reward), found()) - alone
    beside = V * D + D  # which it gathers
    assert more == (4 * (L * BLOCK + beside + D + 1) + BUFFERS) / 8 + 4 * beside
    adapted = add(GPT(SHAPE), 2, 4.0)
    twin = without(adapted)
    one, two = (distributed.sharded(models(adapted, *held), found()) for held in ((), (twin,)))
    assert two - one == (4 * P + BUFFERS) / 8 + 4 * ROOTS


def test_gradients_are_summed_the_largest_by_itself():
    got = distributed.replicated(models(GPT(SHAPE)), {"stepping": {"gradients": 4 * P}})
    assert got == 4 * P + 4 * V * D


def test_eight_billion_numbers_by_hand():
    D, V, M = 4096, 128256, 14336
    P = 2 * V * D + 32 * (D * (D + 2 * 1024) + D * D + 3 * D * M + 2 * D) + D
    assert P == 8_030_261_248  # as published
    work = 6 * 8 * 4096 * P / (0.4 * 989e12)
    row = next(line for line in PAGE.splitlines() if line.startswith("| llama-3.1-8b | 8.03 B"))
    assert f"| {7 * P / 1e9:.0f} / {56 * P / 1e9:.0f} |" in row and row.endswith(f"| {work:.2g} |")
    assert f"| {7 * P / 25e9:.2f} / {56 * P / 25e9:.0f} |" in row
    replicated, sharded = (distributed.speedup(8, shard, 50e9) for shard in (False, True))
    assert replicated == pytest.approx(8 * work / (work + 7 * P / 50e9))
    assert sharded == pytest.approx(8 * work / (56 * P / 50e9))
    assert [distributed.speedup(1, shard, 1.0) for shard in (False, True)] == [1, 1]


# ------------------------------------------------------------------------------------------------- measured


def test_a_process_keeps_sixteen_bytes_a_parameter_and_the_report_says_who_took_most(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    distributed.measure(distributed.Config(model="world-tiny", device="cpu", out=str(out)))
    model = GPT(distributed.preset("world-tiny"))
    numbers, buffers = sum(p.numel() for p in model.parameters()), sum(x.nbytes for x in model.buffers())
    [row] = readable_rows(out)
    assert row["weights"] == 4 * numbers + buffers and row["gradients"] == 4 * numbers
    assert row["moments"] == 8 * numbers + 4 * len([*model.parameters()])  # and how many steps it has made
    other = {**row, "rank": 1, "steps": 5 * 2**30}
    write_lines(out, [row, other, {**row, "rank": 2}])
    distributed.main(["--report", str(out)])
    found = re.findall(r"^\| world-tiny \|  \| 1 \|.*\| (\S+) \|$", capsys.readouterr().out, re.M)
    assert found == ["5.00"]


def test_of_sharded_weights_a_process_counts_its_own_part():
    class Part(torch.Tensor):
        full_tensor, to_local = None, lambda self: torch.ones(3)

    assert distributed.kept([torch.ones(8).as_subclass(Part), torch.ones(2)]) == 4 * 5


def test_the_peak_is_that_since_it_was_last_asked():
    cpu = torch.device("cpu")
    distributed.most(cpu)
    before = distributed.most(cpu)
    torch.ones(2**24)
    assert 2**25 < distributed.most(cpu) - before < 2**27
    assert distributed.most(cpu) - before < 2**25


def test_a_command_that_is_none_is_refused():
    for words in ([], ["--report"], ["--table", "x"]):
        with pytest.raises(UserError, match="name a command"):
            distributed.main(words)
