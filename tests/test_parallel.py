"""Several processes compute what one computes: every script, replicated and sharded, over gloo."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import rows, write_lines
from wires import asked, said, user

from nanoalign import UserError, parallel
from nanoalign.checkpoint import load, partial_path
from nanoalign.pieces import dealt, share
from nanoalign.run import Flags
from nanoalign.training import check

ROOT = Path(__file__).parents[1]
SEVERAL = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*command):
    """A program by this interpreter → what became of it."""
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=600)


def files(folder) -> dict:
    """Rows of every kind, few enough that steps do not come out even among two processes."""
    prompts = [row["prompt"] for row in asked(9)]
    kinds = {"text": [{"text": said(i, 3 + 2 * i)} for i in range(12)], "prompts": asked(9), "one": asked(1)}
    for i, prompt in enumerate(prompts):
        first, second = said(i, 1 + i % 6), said(i + 3, 2 + i % 5)
        pair = {"prompt": prompt, "chosen": first, "rejected": second}
        messages = [*user(prompt), {"role": "assistant", "content": first}]
        steps = {"completions": [first, second], "labels": [1, i % 2], "label": bool(i % 2)}
        found = {
            "chat": [{"messages": messages}],
            "pairs": [pair, {**pair, "chosen": said(i, 7), "probability": 0.75}][: 1 + i % 2],
            "thumbs": [{"prompt": prompt, "completion": first, "label": i % 3 > 0}],
            "steps": [{"prompt": prompt, **steps}],
        }
        for kind, some in found.items():
            kinds.setdefault(kind, []).extend(some)
    return {kind: write_lines(folder / f"{kind}.jsonl", lines) for kind, lines in kinds.items()}


def training(tiny, data) -> dict:
    """A run of three steps by every script: its module and flags."""
    policy, reward, steps = str(tiny / "policy.pt"), str(tiny / "rm.pt"), f"prm-steps:{tiny / 'prm.pt'}"
    on_policy = {
        "init": policy, "reference": str(tiny / "reference.pt"), "reward": f"{reward} - 0.1*length",
        "prompts": data["prompts"], "eval_data": data["one"], "doctor": "",
        "batch_size": 12, "minibatch": 8, "max_new_tokens": 9, "warmup": 0,
    }  # fmt: skip
    groups = {**on_policy, "group_size": 4}
    text = {"data": data["text"], "model": "world-nano", "context": 12, "batch_size": 3}
    pairs, chat = {"init": policy, "data": data["pairs"]}, {"init": policy, "data": data["chat"]}
    methods = {
        "pretrain": ("train_pretrain", text),
        "sft": ("train_sft", chat),
        "alone": ("train_sft", {**chat, "batch_size": 1}),  # one row a step: a process without any
        "dpo": ("train_dpo", {**pairs, "micro_tokens": 90}),
        "adapters": ("train_dpo", {**pairs, "lora": 2}),
        "online": ("lab.train_online_dpo", {**pairs, "reward": reward, "max_new_tokens": 9}),
        "orpo": ("train_orpo", {**pairs, "nll": "all"}),
        "rm": ("train_rm", pairs),
        "kto": ("train_kto", {"init": policy, "data": data["thumbs"], "micro_tokens": 60}),
        "prm": ("train_prm", {"init": policy, "data": data["steps"]}),
        "ppo": ("train_ppo", {**on_policy, "kl_target": 0.1, "kl_horizon": 50.0, "micro_batch": 3}),
        "shared": ("train_ppo", {**on_policy, "shared_critic": True}),
        "grpo": ("train_grpo", groups),
        "few": ("train_grpo", {**groups, "batch_size": 4, "minibatch": 4}),  # one prompt
        "steps": ("lab.train_grpo_steps", {**groups, "init": str(tiny / "solver.pt"), "reward": steps}),
    }
    usual = {"steps": 3, "lr": 3e-3, "warmup": 1, "log_every": 1, "eval_every": 3, "save_every": 2}
    found = {}
    for name, (module, flags) in methods.items():
        held_out = {"eval_data": flags.get("eval_data", flags.get("data"))}
        found[name] = module, {**usual, "device": "cpu", "batch_size": 5, **flags, **held_out}
    return found


def sampling(tiny, data) -> dict:
    """collect, best_of_n and evaluate: each module and its flags."""
    policy, prompts = str(tiny / "policy.pt"), data["prompts"]
    problems = {"policy": str(tiny / "solver.pt"), "prm": str(tiny / "prm.pt"), "problems": prompts}
    usual = {"max_new_tokens": 9, "device": "cpu", "seed": 1, "samples": 3}
    search = {"search": ["beam", "dvts"], "width": 2, "expansions": 2, "depth": 3, "subsets": 20}
    judged = {"reward": str(tiny / "rm.pt"), "checkpoints": [policy, str(tiny / "base.pt")]}
    pairs = {"policy": policy, "annotator": f"rm:{tiny / 'rm.pt'}"}
    return {
        "collect": ("collect", {**usual, **pairs, "prompts": prompts}),
        "best": ("best_of_n", {**usual, **search, **problems}),
        "card": ("evaluate", {**usual, **judged, "reference": policy, "prompts": prompts}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """All of these on one process, and on two, where all training is done sharded, too, and two runs go on
    with what one process has left → their folder."""
    folder = tmp_path_factory.mktemp("processes")
    data = files(folder)
    runs, others = training(tiny, data), sampling(tiny, data)
    jobs = [[name, *job, "float64"] for name, job in {**runs, **others}.items()]
    jobs += [[f"{name}-single", *runs[name], "float32"] for name in ("dpo", "ppo")]
    half = {**runs["sft"][1], "precision": "bf16"}
    jobs += [["half", runs["sft"][0], half, "float32"]]
    more = [
        [f"{name}-parts", module, {**flags, "shard": True, "offload": name == "ppo"}, dtype]
        for name, module, flags, dtype in jobs
        if "steps" in flags
    ]
    more += [[f"{name}-single+", *runs[name], "float32"] for name in ("dpo", "ppo")]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    told = start("tests/processes.py", folder)
    assert told.returncode == 0, told.stderr[-3000:]
    (folder / "jobs.json").write_text(json.dumps(jobs + more))
    told = start(*SEVERAL, "tests/processes.py", folder)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.count("saved") == len(runs) * 2 + 6 + 2, "only the first process prints"
    return folder


def same(found: Path, due: Path, tolerance: float) -> None:
    """The weights of two runs, and all that they logged, to the six digits that are."""
    weights, others = (torch.load(path.with_suffix(".weights.pt")) for path in (found, due))
    assert weights.keys() == others.keys()
    for name, x in weights.items():
        torch.testing.assert_close(x, others[name], rtol=tolerance, atol=tolerance, msg=name)
    logged, expected = rows(found), rows(due)
    assert len(logged) == len(expected) > 3
    for row, other in zip(logged, expected):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("parts", ["", "-parts"], ids=["replicated", "sharded"])
@pytest.mark.parametrize("name", training(Path(), defaultdict(str)))
def test_two_processes_train_what_one_trains(name, parts, ran):
    same(ran / "2" / f"{name}{parts}.pt", ran / "1" / f"{name}.pt", 1e-10)


@pytest.mark.parametrize("parts", ["", "-parts"], ids=["replicated", "sharded"])
@pytest.mark.parametrize("name", ["dpo-single", "ppo-single"])
def test_in_single_precision_to_rounding(name, parts, ran):
    same(ran / "2" / f"{name}{parts}.pt", ran / "1" / f"{name}.pt", 1e-5)


@pytest.mark.parametrize("name", ["dpo-single", "ppo-single"])
def test_two_processes_go_on_with_a_run_of_one(name, ran):
    same(ran / "2" / f"{name}+.pt", ran / "1" / f"{name}.pt", 1e-5)


@pytest.mark.parametrize("name", ["dpo-single", "ppo-single-parts"])
def test_one_process_goes_on_with_a_run_of_two(name, ran, tmp_path):
    jobs = {job[0]: job[1:] for job in json.loads((ran / "jobs.json").read_text())}
    module, flags, _ = jobs[name.removesuffix("-parts")]
    out = tmp_path / "x.pt"
    partial_path(str(out)).write_bytes((ran / "2" / f"{name}.kept.pt").read_bytes())
    script = importlib.import_module(module)
    script.main(script.Config(**flags, out=str(out), resume=True))
    ours, theirs = load(out)["model"], load(ran / "1" / f"{name.removesuffix('-parts')}.pt")["model"]
    for weight, x in ours.items():
        torch.testing.assert_close(x, theirs[weight], rtol=1e-5, atol=1e-5)


def test_sharded_bf16_is_near_replicated_bf16(ran):
    loss = [
        [row["loss"] for row in rows(ran / "2" / f"{name}.pt") if "loss" in row]
        for name in ("half", "half-parts")
    ]
    assert loss[0] == pytest.approx(loss[1], rel=0.01) and loss[0] != loss[1]


@pytest.mark.parametrize("name", sampling(Path(), defaultdict(str)))
def test_two_processes_sample_what_one_samples_in_its_order(name, ran):
    found, due = ((ran / count / f"{name}.pt").read_text() for count in "21")
    numbers = r"-?[0-9]+\.[0-9]+"
    assert (
        re.split(numbers, found.replace(f"{ran}/2", f"{ran}/1")) == re.split(numbers, due) and len(due) > 300
    )
    assert [*map(float, re.findall(numbers, found))] == pytest.approx([*map(float, re.findall(numbers, due))])


def test_training_moves_what_is_trained(ran, tiny):
    """Runs that do nothing would be alike, too."""
    before = load(tiny / "policy.pt")["model"]
    for name in ("sft", "dpo", "kto", "orpo", "ppo", "grpo", "few", "alone", "online", "shared"):
        after = torch.load(ran / "2" / f"{name}.weights.pt")
        assert all((after[key] - x).abs().max() > 1e-4 for key, x in before.items()), name


# ------------------------------------------------------------------------------------------------ mistakes


def error_lines(told) -> list[str]:
    return [line for line in told.stderr.splitlines() if line.startswith("error:")]


def test_what_all_processes_find_wrong_one_of_them_says(tmp_path):
    told = start(*SEVERAL, "train_sft.py", "--init", tmp_path / "none.pt", "--out", tmp_path / "x.pt")
    assert told.returncode != 0
    assert [line.split(";")[0] for line in error_lines(told)] == [
        f"error: there is no checkpoint {tmp_path}/none.pt"
    ]


def test_a_process_that_dies_ends_the_others_with_a_sentence(tiny, tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "def once(rows, texts, ended):\n"
        "    if os.environ['RANK'] == '1' and len(rows) > 1:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [0.0] * len(rows)\n"
    )
    prompts = write_lines(tmp_path / "prompts.jsonl", asked(4))
    eval_data = write_lines(tmp_path / "one.jsonl", asked(1))
    paths = {"init": tiny / "policy.pt", "prompts": prompts, "eval-data": eval_data, "out": tmp_path / "x.pt"}
    numbers = {"batch-size": 4, "minibatch": 4, "max-new-tokens": 4, "device": "cpu", "timeout": 1}
    reward = {"reward": f"{tmp_path}/deadly.py:once", "doctor": ""}
    flags = [text for name, value in {**paths, **numbers, **reward}.items() for text in (f"--{name}", value)]
    told = start(*SEVERAL, "train_ppo.py", *flags)
    assert told.returncode != 0 and not (tmp_path / "x.pt").exists()
    [line] = error_lines(told)
    assert line.startswith("error: another process of this run has ended")


@pytest.mark.parametrize(
    "launched, shared, sentence", [(False, True, "--shard is for several"), (True, False, "in one process")]
)
def test_what_cannot_be_is_said(launched, shared, sentence, monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_torchelastic_launched", lambda: launched)
    with pytest.raises(UserError, match=sentence), parallel.joined(Flags(shard=True), shared):
        pass


def test_more_processes_than_gpus_are_a_sentence(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no GPU 2"), parallel.joined(Flags(), shared=True):
        pass


@pytest.mark.parametrize(
    "flags, sentence",
    [({"offload": True}, "for --shard"), ({"shard": True, "compile": True}, "leave one out")],
)
def test_flags_that_do_not_go_together_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check(Flags(**flags))


# ---------------------------------------------------------------------------------------- who does what


@pytest.fixture
def of(monkeypatch):
    """of(rank, size): pretend to be one of so many."""

    def pretend(rank, size):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "size", lambda: size)

    return pretend


@pytest.mark.parametrize("count, size, unit", [(7, 2, 1), (1, 3, 1), (8, 3, 2), (4, 4, 4), (12, 1, 3)])
def test_shares_are_equal_whole_and_all_rows_together(count, size, unit, of):
    shares = []
    for rank in range(size):
        of(rank, size)
        shares.append(share(count, unit))
    assert len({len(mine) for mine in shares}) == 1
    assert {*np.concatenate(shares).tolist()} == {*range(count)}
    assert len(shares[0]) == -(-count // unit // size) * unit
    for mine in shares:
        assert (mine.reshape(-1, unit) - mine[::unit, None] == np.arange(unit)).all()


@pytest.mark.parametrize("group, tokens", [(1, 0), (1, 20), (3, 0), (3, 20)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_that_count_are_all_rows_once_and_equally_many(group, tokens, size, of):
    lengths, order = np.random.default_rng(0).integers(2, 12, 24), np.arange(6, 18)
    config, seen, counts = SimpleNamespace(micro_batch=4, micro_tokens=tokens), [], []
    for rank in range(size):
        of(rank, size)
        pieces = dealt(order, lengths, config, group)
        counts.append(len(pieces))
        for piece, own in pieces:
            assert 1 <= len(piece) <= 4
            assert not tokens or len(piece) == 1 or len(piece) * lengths[piece].max() <= tokens
            seen += piece.tolist() * own
    assert sorted(seen) == order.tolist() and len({*counts}) == 1
