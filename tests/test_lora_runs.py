"""Whole runs with --lora: what moves and what stays, what is in memory, and what is saved and read again."""

import copy
import gc
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ON_POLICY, STAGES, WORLD, interrupt, models, same_run, terminate
from wires import SHAPE, spy

import train_pretrain
import train_sft
from nanoalign import UserError, checkpoint
from nanoalign import run as runs
from nanoalign.checkpoint import load, load_policy, load_scalar, partial_path, save
from nanoalign.lora import adapters, add
from nanoalign.model import GPT
from nanoalign.scalar import ScalarGPT

ADAPTED = [stage for stage in STAGES if stage != "pretrain"]
SCALAR = ("rm", "prm")
REFERENCE = ("dpo", "kto", "ppo", "grpo")
RANK = 3
IDS = torch.randint(2, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
FEW = {"steps": 4, "save_every": 2, "lr": 3e-3, "warmup": 0}


def few(stage, **changes):
    """A run of four optimiser steps, or on-policy iterations."""
    less = {"batch_size": 8, "minibatch": 4} if stage in ON_POLICY else {}
    return {"lora": RANK, "eval_every": 4, **FEW, **less, **changes}


def parameters(*modules) -> dict:
    """Of several modules, by owner and name: the very parameters."""
    return {(i, name): weight for i, m in enumerate(modules) for name, weight in m.named_parameters()}


def in_memory() -> dict:
    """All parameters there are, and how many numbers each has a place for, by that place."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]
    return {weight.untyped_storage().data_ptr(): weight.numel() for weight in found if weight.numel()}


@pytest.fixture(scope="module", params=ADAPTED)
def done(request, job):
    """A run with adapters, and what was seen of it."""
    stage = request.param
    script, config = job(stage, **few(stage))
    seen = SimpleNamespace(stage=stage, script=script, config=config, references=[])
    init, update = runs.Run.__init__, runs.Run.update
    before = in_memory()

    def begin(run, *args, **options):
        seen.run = run
        init(run, *args, **options)
        seen.start = {at: weight.detach().clone() for at, weight in parameters(run.trained).items()}
        seen.held = sum(size for place, size in in_memory().items() if place not in before)

    def step(run):
        seen.references.append([call.result(IDS) for call in seen.loaded])
        update(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "__init__", begin)
        patch.setattr(runs.Run, "update", step)
        seen.loaded = spy(patch, script, "load_reference") if stage in REFERENCE else []
        seen.rewards = spy(patch, script, "make_reward") if stage in ON_POLICY else []
        script.main(config)
    return seen


def of_an_adapter(name: str) -> bool:
    return name.endswith((".A", ".B"))


def of_a_head(name: str) -> bool:
    return name.split(".")[-2] in ("score", "read_in")


def test_adapters_and_heads_move_and_nothing_else_does(done):
    moved = set()
    for at, weight in parameters(done.run.trained).items():
        _, name = at
        assert weight.requires_grad == (of_an_adapter(name) or of_a_head(name)), name
        if weight.requires_grad:
            assert not torch.equal(weight, done.start[at]), name
            moved.add(name)
        else:
            assert torch.equal(weight, done.start[at]) and weight.grad is None, name
    layers = done.run.model.config.layers
    trunks = 2 if done.stage == "ppo" else 1  # the policy's and the critic's
    assert sum(map(of_an_adapter, moved)) == trunks * layers * 4 * 2
    assert sum(map(of_a_head, moved)) == (3 if done.stage in (*SCALAR, "ppo") else 0)


def test_what_stays_is_the_base(done):
    base, tokenizer, _ = load_policy(done.config.init)
    model = getattr(done.run.model, "gpt", done.run.model)
    due = base.state_dict()
    if done.stage == "prm":  # <|step|> is read as a line break, whose embedding it has
        due["embed.weight"][tokenizer.step] = due["embed.weight"][tokenizer.newlines[0]]
    for name, weight in model.named_parameters():
        assert of_an_adapter(name) or torch.equal(weight, due[name]), name


def test_the_reference_gives_the_log_probs_of_the_base_at_every_step(done):
    assert len(done.loaded) == (done.stage in REFERENCE) and len(done.references) >= 4
    base = load_policy(done.config.init)[0]
    for found in done.references:
        assert all(torch.equal(logits, base(IDS)) for logits in found) and len(found) == len(done.loaded)
    if done.loaded:
        assert not torch.allclose(done.run.model(IDS), base(IDS), atol=1e-3)


def test_the_reward_model_stays_that_of_its_file_also_where_a_critic_lies_on_it(done):
    for call in done.rewards:
        [reward], due = call.result.held, load_scalar(done.config.reward)[0]
        assert torch.equal(reward(IDS), due(IDS)) and not adapters(reward)
        assert not any(weight.requires_grad for weight in reward.parameters())
    if done.stage == "ppo":
        critic = done.run.trained[1]
        assert critic.gpt.embed.weight is reward.gpt.embed.weight and critic.score is not reward.score
        assert not torch.allclose(critic(IDS), reward(IDS), atol=1e-3)


def test_the_metrics_name_the_models_that_are_in_memory(done):
    reward = getattr(done.config, "reward", "")
    assert models(done.config.out) == {
        "ppo": ["policy", "critic (a head)", reward], "grpo": ["policy", reward], "rm": ["reward"],
        "prm": ["process reward"],
    }.get(done.stage, ["policy"])  # fmt: skip


def test_as_many_weights_are_in_memory_as_these_models_have(done):
    """DPO and KTO hold one policy; PPO that, the reward model, and of the critic adapters and a head."""
    shape = load_policy(done.config.init)[0].config
    policy = sum(weight.numel() for weight in GPT(shape).parameters())
    L, D, Q, M = shape.layers, shape.width, 3 * shape.width, shape.mlp_width
    pairs = L * RANK * (D + Q + D + D + D + 2 * M + M + D)
    head = D + 1
    due = policy + pairs
    if done.stage in SCALAR:  # and its reader
        due += policy + head + 3 * D
    if done.stage in ON_POLICY:  # the reward model, whose reader may be the reference, and its head
        due += policy + head + 3 * D + (policy if done.stage == "grpo" else 0)  # another policy's here
    if done.stage == "ppo":
        due += pairs + head + 3 * D
    assert done.held == due


def test_the_optimiser_holds_moments_of_what_is_trained_alone(done):
    optimised = {id(weight) for group in done.run.optimizer.param_groups for weight in group["params"]}
    assert optimised == {id(w) for w in done.run.trained.parameters() if w.requires_grad}
    assert done.run.optimizer.state.keys() == {w for w in done.run.trained.parameters() if w.requires_grad}


def loaded(stage, path):
    return load_scalar(path, stages=SCALAR)[0] if stage in SCALAR else load_policy(path)[0]


def test_the_checkpoint_holds_adapters_and_heads_and_says_what_they_belong_to(done):
    content, config = load(done.config.out), done.config
    assert content["model"].keys() == adapters(done.run.model).keys()
    for name, weight in content["model"].items():
        assert torch.equal(weight, done.run.model.get_parameter(name)), name
    own = content["lora"]
    assert (own["rank"], own["alpha"], own["bf16"]) == (RANK, 2.0 * RANK, False)
    assert own["base"] == os.path.abspath(config.init) and len(own["checksum"]) == 64
    assert Path(config.out).stat().st_size < Path(config.init).stat().st_size / 3


def test_what_is_loaded_is_a_plain_model_that_does_as_the_trained_one(done, capsys):
    plain, model = loaded(done.stage, done.config.out), done.run.model
    assert capsys.readouterr().out == ""
    assert not adapters(plain) and type(plain) is type(model)
    assert all(
        weight.requires_grad != name.startswith("reader.") for name, weight in plain.named_parameters()
    )
    torch.testing.assert_close(plain(IDS), model(IDS), atol=2e-5, rtol=1e-5)
    if done.stage in SCALAR:
        assert all(map(torch.equal, plain.reader.parameters(), model.reader.parameters()))


def test_a_stopped_run_resumes_bit_for_bit_from_adapters_and_the_state_of_their_optimiser(
    done, job, monkeypatch
):
    script, config = job(done.stage, **few(done.stage, resume=True))
    step = 2 * 2 * (8 // 4) - 1 if done.stage in ON_POLICY else 2  # in the second of four
    with monkeypatch.context() as patch:
        interrupt(patch, step, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    partial = load(partial_path(config.out))
    assert partial["step"] == 2 and partial["model"].keys() == adapters(done.run.model).keys()
    assert partial["lora"] == load(done.config.out)["lora"]
    if done.stage == "ppo":
        names = [name for _, name in done.start if name.startswith("1.")]
        trained = {name[2:] for name in names if of_an_adapter(name) or of_a_head(name)}
        assert partial["critic"].keys() == trained
    moments = sum(x["exp_avg"].numel() for x in partial["optimizer"]["state"].values())
    assert moments == sum(w.numel() for w in done.run.trained.parameters() if w.requires_grad)
    script.main(config)
    same_run(done.config, config)


# --------------------------------------------------------------------------------------------- what is given


def test_pretraining_has_nothing_to_adapt(tmp_path):
    with pytest.raises(UserError, match="--lora adapts a model that is trained already"):
        train_pretrain.main(train_pretrain.Config(lora=4, out=str(tmp_path / "x.pt")))


def test_rank_alpha_and_dtype_are_those_of_the_flags(job):
    for flags, rank, alpha, bf16 in (
        ({"lora": 2}, 2, 4.0, False),
        ({"lora": 5, "lora_alpha": 3.0}, 5, 3.0, False),
        ({"lora": 4, "base_dtype": "bf16", "precision": "bf16"}, 4, 8.0, True),
    ):
        script, config = job("sft", **few("sft", **flags))
        script.main(config)
        own = load(config.out)["lora"]
        assert (own["rank"], own["alpha"], own["bf16"]) == (rank, alpha, bf16)


def test_a_reference_of_its_own_is_a_model_in_memory(job, brief):
    script, config = job("grpo", **few("grpo", reference=brief, steps=1))
    script.main(config)
    assert models(config.out)[:2] == ["policy", "reference"]


@pytest.mark.parametrize("flags, critic", [
    ({}, "critic (a head)"), ({"reward": "-0.5*length"}, "critic (a head)"), ({"lora": 0}, "critic"),
    ({"shared_critic": True}, "critic (a head)"),
    ({"base_dtype": "bf16", "precision": "bf16"}, "critic (a head)"),
])  # fmt: skip
def test_a_critic_lies_on_weights_that_are_in_memory_wherever_it_comes_from(job, flags, critic):
    script, config = job("ppo", **few("ppo", steps=1, **flags))
    script.main(config)
    assert critic in models(config.out)


def test_a_critic_of_other_weights_is_a_model_of_its_own(job, base):
    script, config = job("ppo", **few("ppo", steps=1, critic=base))
    script.main(config)
    assert "critic" in models(config.out)


# ------------------------------------------------------------------------------------------------ the files


@pytest.fixture
def files(job, sft, tmp_path):
    """A base, and adapters that belong to it: (base, X.pt), in a folder of their own."""
    shutil.copy(sft, tmp_path / "base.pt")
    script, config = job("sft", **few("sft", init=str(tmp_path / "base.pt"), out=str(tmp_path / "x.pt")))
    script.main(config)
    return tmp_path / "base.pt", tmp_path / "x.pt"


def refused(path, *words, load=load_policy):
    with pytest.raises(UserError) as caught:
        load(path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_adapters_whose_base_is_gone_are_refused(files):
    base, path = files
    base.unlink()
    refused(path, str(path), "base cannot be read", f"there is no checkpoint {base}")


def test_adapters_whose_base_is_damaged_are_refused(files):
    base, path = files
    base.write_bytes(base.read_bytes()[:1000])
    refused(path, str(path), "base cannot be read", f"{base} is damaged")


def saved_again(path, model):
    save(path, model, tokenizer=WORLD, config=train_sft.Config(), stage="sft", step=1)


def test_adapters_of_another_base_are_refused(files):
    """One weight of one matrix is enough; so is another shape, of which any matrix would fit."""
    base, path = files
    model, _, _ = load_policy(base)
    with torch.no_grad():
        model.blocks[-1].mlp.down.weight[0, 0] += 1e-4
    saved_again(base, model)
    refused(path, str(path), "another base", str(base), "other weights")
    longer = GPT(replace(model.config, context=64))
    longer.load_state_dict(model.state_dict())
    saved_again(base, longer)
    refused(path, str(path), "another base", str(base), "another shape")


def test_adapters_that_do_not_fit_are_refused(files):
    _, path = files
    whole = torch.load(path, weights_only=True)
    del whole["checksum"]
    name = next(iter(whole["model"]))
    for change in (
        {"model": {k: v for k, v in whole["model"].items() if k != name}},
        {"model": {**whole["model"], name: whole["model"][name][:, :5]}},
        {"model": {**whole["model"], name: whole["model"][name][0]}},
        {"model": {**whole["model"], name: torch.zeros(2**40, 0)}},
        {"model": {"norm.weight": torch.ones(64)}},
        {"model": {**whole["model"], name: torch.full_like(whole["model"][name], torch.nan)}},
        {"lora": {**whole["lora"], "rank": RANK + 1}},
        {"lora": {**whole["lora"], "rank": 0}},
        {"lora": {**whole["lora"], "alpha": float("inf")}},
        {"lora": {**whole["lora"], "checksum": 5}},
        {"lora": {"base": whole["lora"]["base"]}},
        {"lora": None},
    ):
        torch.save({**whole, **change}, path)
        refused(path, str(path))


def test_adapters_of_a_policy_are_no_reward_model_and_the_other_way_round(files, job):
    _, path = files
    refused(path, "expected 'rm'", load=load_scalar)
    script, config = job("rm", **few("rm"))
    script.main(config)
    refused(config.out, "'rm' checkpoint, not a language model's")


def test_adapters_may_belong_to_adapters(files, job, pairs):
    base, path = files
    script, config = job("dpo", **few("dpo", init=str(path), data=pairs))
    script.main(config)
    model, _, content = load_policy(config.out)
    assert model.bases == (str(base), str(path)) and "lora" not in content
    below = load_policy(path)[0]
    assert not torch.equal(model(IDS), below(IDS)) and torch.equal(model.embed.weight, below.embed.weight)
    os.unlink(base)
    refused(config.out, config.out, str(path), str(base))


def test_no_run_writes_over_what_its_adapters_belong_to(files, job, pairs):
    """r0 → r1 → r0: the second would take the ground from under both."""
    base, path = files
    before = base.read_bytes()
    script, config = job("dpo", **few("dpo", init=str(path), data=pairs))
    with pytest.raises(UserError, match=r"base\.pt is to be written, but is read"):
        script.main(replace(config, out=str(base)))
    assert base.read_bytes() == before


def test_files_that_are_each_others_base_are_refused(files):
    base, path = files
    shutil.copy(path, base)
    refused(path, str(path), "base cannot be read")


def test_a_base_is_found_whatever_the_working_directory(files, monkeypatch, job):
    base, path = files
    monkeypatch.chdir(base.parent)
    script, config = job("sft", **few("sft", init="base.pt", out="y.pt"))
    script.main(config)
    monkeypatch.chdir("/")
    assert torch.equal(load_policy(base.parent / "y.pt")[0](IDS), load_policy(path)[0](IDS))


def test_a_resumed_run_has_the_same_base(files, job, monkeypatch):
    """Also where the embedding is the same, as it is of whatever adapters have made."""
    base, _ = files
    script, config = job("sft", **few("sft", init=str(base), resume=True))
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    model, _, _ = load_policy(base)
    with torch.no_grad():
        model.blocks[0].attention.out.weight += 1e-3
    saved_again(base, model)
    with pytest.raises(UserError, match="the starting checkpoint changed"):
        script.main(config)


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo"])
def test_so_has_one_whose_reference_comes_from_adapters(stage, job, files, monkeypatch):
    _, path = files
    script, config = job(stage, **few(stage, lora=0, init=str(path), resume=True))
    with monkeypatch.context() as patch:
        interrupt(patch, 1, terminate)
        with pytest.raises(SystemExit):
            script.main(config)
    content = load(path)
    content["model"]["blocks.0.mlp.up.B"] += 1e-3
    torch.save({**content, "checksum": checkpoint.checksum(content)}, path)
    with pytest.raises(UserError, match="the starting checkpoint changed"):
        script.main(config)


def test_merge_writes_a_plain_checkpoint_of_the_same_model(files, run, job, tmp_path):
    _, path = files
    script, config = job("rm", **few("rm", out=str(tmp_path / "rm.pt")))
    script.main(config)
    for name, kind in ((path, load_policy), (config.out, load_scalar)):
        code, out, errors = run("-m", "nanoalign.lora", "merge", name, tmp_path / "plain.pt")
        assert (code, errors) == (0, "") and "saved" in out
        merged, plain = load(name), load(tmp_path / "plain.pt")
        assert "lora" not in plain and {*plain} == {*merged} - {"lora"}
        assert all(plain[k] == merged[k] for k in plain if k not in ("model", "checksum"))
        assert plain["checksum"] != merged["checksum"]
        ours, theirs = kind(tmp_path / "plain.pt")[0], kind(name)[0]
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_merge_refuses_what_it_cannot_do(files, run, tmp_path):
    base, path = files
    whole = base.read_bytes()
    for source, out, said in (
        (base, tmp_path / "y.pt", "holds no adapters"), (path, base, "name another file"),
        (path, path, "name another file"), (tmp_path / "z.pt", tmp_path / "y.pt", "there is no checkpoint"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            checkpoint.merge_file(source, out)
    for words, said in ((("split", path, base), "name two files"), (("merge", path, base), "another file")):
        code, _, errors = run("-m", "nanoalign.lora", *words)
        assert code == 1 and said in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert base.read_bytes() == whole and not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize("stage", ["dpo", "rm", "ppo"])
def test_no_number_of_a_run_in_bf16_changes_where_the_base_is_kept_so(stage, job):
    configs = []
    for base_dtype in ("fp32", "bf16"):
        script, config = job(stage, **few(stage, precision="bf16", base_dtype=base_dtype))
        script.main(config)
        configs.append(config)
    same_run(*configs)


def test_what_was_trained_on_rounded_matrices_is_loaded_with_them(job):
    script, config = job("dpo", **few("dpo", base_dtype="bf16", precision="bf16"))
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(patch, script, "make_optimizer")
        script.main(config)
    model, plain = seen[0].model, load_policy(config.out)[0]
    rounded = load_policy(config.init)[0]
    for ours, base, layer in zip(*(list(checkpoint.matrices(m)) for m in (plain, rounded, model))):
        due = base.weight.bfloat16().float() + 2 * layer.B @ layer.A
        torch.testing.assert_close(ours.weight, due, atol=1e-6, rtol=0)
        assert ours.weight.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16


def test_adapters_are_the_same_on_every_device():
    """They are drawn on the CPU, so a run goes on elsewhere, too."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    torch.manual_seed(0)
    other = copy.deepcopy(model).to("meta")
    torch.manual_seed(1)
    add(model, RANK, 1.0)
    after = torch.rand(1)
    torch.manual_seed(1)
    add(other, RANK, 1.0)
    assert torch.equal(torch.rand(1), after) and other.blocks[0].mlp.up.A.is_meta


def test_a_scalar_models_file_without_a_reader_gives_none(job):
    script, config = job("rm", **few("rm", reader=False))
    script.main(config)
    model, _, _ = load_scalar(config.out)
    assert isinstance(model, ScalarGPT) and model.reader is None
