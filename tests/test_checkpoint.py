"""Checkpoints: whole or not at all, harmless to open, strict, fp32, and random state that comes back."""

import os
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass, replace

import pytest
import torch

from nanoalign import UserError
from nanoalign.checkpoint import (
    finish,
    load,
    load_policy,
    partial_path,
    random_state,
    resume,
    save,
    save_partial,
    set_random_state,
)
from nanoalign.contents import checksum
from nanoalign.model import GPT, preset
from nanoalign.tokenizer import get_tokenizer
from nanoalign.training import compile_hidden, make_optimizer

WORLD = get_tokenizer("world")


@dataclass
class Config:
    out: str
    lr: float = 0.1
    device: str = "cpu"
    resume: bool = True


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(preset("world-tiny", vocab_size=WORLD.vocab_size, context=16))


@pytest.fixture
def saved(tmp_path):
    """A model and the path of its checkpoint."""
    model, path = tiny(), tmp_path / "runs" / "sft.pt"
    save(
        path,
        model,
        stage="sft",
        tokenizer=WORLD,
        config=Config(str(path)),
        step=7,
        extra_tensor=torch.ones(2),
    )
    return model, path


def test_a_checkpoint_holds_weights_shapes_tokenizer_stage_config_and_step(saved):
    model, path = saved
    loaded, tokenizer, content = load_policy(path)
    assert loaded.config == model.config and tokenizer is WORLD
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert (content["stage"], content["step"], content["config"]["lr"]) == ("sft", 7, 0.1)
    assert torch.equal(content["extra_tensor"], torch.ones(2))
    assert os.listdir(path.parent) == ["sft.pt"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_checkpoint_says_whether_it_is_a_chat_model_whatever_its_stage(tmp_path, chat):
    path = tmp_path / "x.pt"
    save(path, tiny(), stage="a stage to come", tokenizer=WORLD, config=Config(""), step=1, chat=chat)
    assert load(path)["chat"] is load_policy(path)[2]["chat"] is chat  # either continues a text …
    if chat:
        load_policy(path, chat=True)
    else:  # … and one that answers is asked for
        with pytest.raises(UserError, match=r"'a stage to come' checkpoint and no chat model.*'sft'"):
            load_policy(path, chat=True)


@pytest.mark.parametrize("stage", ["base", "rm", "prm", "sft", "dpo", "kto", "orpo", "ppo", "grpo"])
def test_a_file_from_before_the_flag_is_a_chat_model_by_its_stage(saved, stage):
    _, path = saved
    content = {**load(path), "stage": stage}
    del content["chat"]
    torch.save(content, path)
    assert load(path)["chat"] == (stage not in ("base", "rm", "prm"))
    assert load_policy(path)[0].config == saved[0].config


def test_weights_are_stored_in_fp32_whatever_the_model_is_in(tmp_path):
    save(tmp_path / "x.pt", tiny().bfloat16(), stage="sft", tokenizer=WORLD, config=Config(""), step=0)
    assert {w.dtype for w in load(tmp_path / "x.pt")["model"].values()} == {torch.float32}


def test_a_compiled_model_saves_the_same_keys(tmp_path):
    model = tiny()
    keys = list(model.state_dict())
    compile_hidden(model)
    save(tmp_path / "x.pt", model, stage="sft", tokenizer=WORLD, config=Config(""), step=0)
    assert list(load(tmp_path / "x.pt")["model"]) == keys
    load_policy(tmp_path / "x.pt")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error):
    model, path = saved
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half a file")
        file.flush()
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"sft\.pt") as caught:
        save(path, model, stage="sft", tokenizer=WORLD, config=Config(""), step=8)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["sft.pt"]


def test_a_disk_that_really_fills_up_leaves_the_old_file(saved):
    _, path = saved
    before = path.read_bytes()
    code = f"""
import resource, signal
from nanoalign.checkpoint import save, load_policy
from nanoalign import UserError
from test_checkpoint import Config, tiny, WORLD
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save({str(path)!r}, tiny(seed=1), stage="sft", tokenizer=WORLD, config=Config(""), step=8)
except UserError as error:
    print(error)
"""
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here}:{os.path.dirname(here)}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "could not write" in done.stdout and len(done.stdout.splitlines()) == 1
    assert path.read_bytes() == before and os.listdir(path.parent) == ["sft.pt"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_execute_code_is_refused_and_not_executed(tmp_path, dump):
    path, crater = tmp_path / "evil.pt", tmp_path / "crater"
    dump({"format": "nanoalign-1", "stage": "sft", "model": Bomb(str(crater))}, path)
    with pytest.raises(UserError, match=r"evil\.pt"):
        load(path)
    assert not crater.exists()


def test_a_missing_file_and_another_stage_are_errors_that_name_them(saved):
    _, path = saved
    with pytest.raises(UserError, match=r"there is no checkpoint .*none\.pt"):
        load(path.with_name("none.pt"))
    with pytest.raises(UserError, match=r"'sft' checkpoint; expected 'base' or 'rm'"):
        load(path, ("base", "rm"))


def test_a_damaged_or_foreign_file_is_one_sentence(saved):
    _, path = saved
    whole = path.read_bytes()
    foreign = path.with_name("foreign.pt")
    torch.save({"weights": torch.ones(2)}, foreign)
    others = [b"", b"hello", b"\x80\x04K\x01.", whole[1000:], foreign.read_bytes()]
    for content in [*others, whole[: len(whole) // 2]]:
        path.write_bytes(content)
        what = "is not a nanoalign checkpoint" if content in others else "is damaged: it was cut short"
        with pytest.raises(UserError, match=rf"sft\.pt {what}") as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "program",
    [b"\x80\x02.", b"\x80\x02K\x01K\x02K\x03s.", b"\x80\x02K\x01K\x02a.", b"\x80\x02"],
    ids=["pops nothing", "sets an item of a number", "appends to a number", "never ends"],
)
def test_a_pickle_that_makes_no_sense_is_one_sentence(saved, program):
    _, path = saved
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match=r"is not a nanoalign checkpoint|is damaged"):
        load(path)


@pytest.mark.parametrize("change", ["missing", "additional"])
def test_loading_is_strict(saved, change):
    _, path = saved
    content = load(path)
    if change == "missing":
        del content["model"]["norm.weight"]
    else:
        content["model"]["score.weight"] = torch.ones(1)
    torch.save({**content, "checksum": checksum(content)}, path)
    with pytest.raises(UserError, match="not a language model"):
        load_policy(path)


def test_the_random_state_comes_back():
    draw = lambda: (random.random(), random.gauss(0, 1), torch.rand(3).tolist(), torch.randn(3).tolist())  # noqa: E731
    draw()
    state = pickle.loads(pickle.dumps(random_state()))
    expected = [draw(), draw()]
    set_random_state(state)
    assert [draw(), draw()] == expected


def train_a_little(model, optimizer):
    for _ in range(2):
        model(torch.randint(0, 99, (2, 8))).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_partial_checkpoint_brings_back_weights_optimizer_randomness_and_extras(tmp_path):
    config, model = Config(str(tmp_path / "x.pt")), tiny()
    optimizer = make_optimizer(model, 0.1)
    train_a_little(model, optimizer)
    save_partial(config, model, optimizer, stage="sft", tokenizer=WORLD, step=2, data="abc", beta=0.3)
    train_a_little(model, optimizer)

    twin = tiny(seed=1)
    twin_optimizer = make_optimizer(twin, 0.1)
    content = resume(config, twin, twin_optimizer, stage="sft", data="abc")
    assert (content["step"], content["beta"]) == (2, 0.3)
    train_a_little(twin, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))

    finish(config, model, stage="sft", tokenizer=WORLD, step=4)
    assert os.listdir(tmp_path) == ["x.pt"] and load(config.out)["step"] == 4


def test_a_partial_from_other_flags_or_data_is_an_error_that_names_what_changed(tmp_path):
    config, model = Config(str(tmp_path / "x.pt")), tiny()
    optimizer = make_optimizer(model, 0.1)
    assert resume(config, model, optimizer, stage="sft", data="abc") == {"step": 0}  # nothing to resume
    save_partial(config, model, optimizer, stage="sft", tokenizer=WORLD, step=2, data="abc")
    assert resume(Config(config.out, resume=False), model, optimizer, stage="sft", data="x") == {"step": 0}
    with pytest.raises(UserError, match=r"--lr was 0\.1 and is 0\.2"):
        resume(Config(config.out, lr=0.2), model, optimizer, stage="sft", data="abc")
    with pytest.raises(UserError, match="the data"):
        resume(config, model, optimizer, stage="sft", data="abd")
    with pytest.raises(UserError, match=r"'sft'.*'dpo'"):
        resume(config, model, optimizer, stage="dpo", data="abc")
    partial_path(config.out).write_bytes(b"half")
    with pytest.raises(UserError, match=r"not a nanoalign checkpoint\. Delete it to start afresh\."):
        resume(config, model, optimizer, stage="sft", data="abc")


@dataclass
class Flags(Config):
    data: str = ""
    reward: str = ""
    log_every: int = 1
    eval_every: int = 1
    save_every: int = 1


def test_flags_that_no_weight_depends_on_and_other_spellings_of_a_path_do_not_refuse(tmp_path, monkeypatch):
    (tmp_path / "my rows").mkdir()
    for name in ("x.jsonl", "my rows/a, b.jsonl", "rm.pt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    flags = Flags("x.pt", data="x.jsonl", reward="0.5*rm.pt - 0.02*length", device="cpu")
    model = tiny()
    optimizer = make_optimizer(model, 0.1)

    def resumed(before, **changes):
        save_partial(before, model, optimizer, stage="sft", tokenizer=WORLD, step=2, data="abc")
        return resume(replace(before, **changes), model, optimizer, stage="sft", data="abc")["step"] == 2

    full = str(tmp_path)
    for changes in (
        {"log_every": 7},
        {"eval_every": 7, "save_every": 7},
        {"device": "auto"},
        {"out": "./x.pt"},
        {"out": f"{full}/x.pt"},
        {"data": "./x.jsonl"},
        {"data": f"{full}/my rows/../x.jsonl"},
        {"reward": "0.5*./rm.pt - 0.02*length"},
        {"reward": f"0.5*{full}/rm.pt - 0.02*length"},
    ):
        assert resumed(flags, **changes), changes
    assert resumed(replace(flags, data="my rows/a, b.jsonl"), data=f"{full}/my rows/a, b.jsonl")
    for changes, name in (
        ({"lr": 0.2}, "--lr"),
        ({"data": "rm.pt"}, "--data"),
        ({"data": "y.jsonl"}, "--data"),
        ({"reward": "0.6*rm.pt - 0.02*length"}, "--reward"),
        ({"reward": "0.5*x.jsonl - 0.02*length"}, "--reward"),
    ):
        with pytest.raises(UserError, match=f"{name} was"):
            resumed(flags, **changes)


# ------------------------------------------------------------------------------------- what a file must hold


def kept(path):
    """What a checkpoint holds, to be edited and written again without a checksum, as an older version did."""
    content = torch.load(path, weights_only=True)
    del content["checksum"]
    return content


def test_an_older_file_without_a_checksum_is_read(saved):
    model, path = saved
    torch.save(kept(path), path)
    assert all(map(torch.equal, load_policy(path)[0].parameters(), model.parameters()))


def test_a_byte_that_has_changed_anywhere_in_the_weights_is_noticed(saved):
    _, path = saved
    whole, rng = path.read_bytes(), random.Random(0)
    for at in [
        len(whole) // 3,
        len(whole) // 2,
        *(rng.randrange(5000, len(whole) - 5000) for _ in range(20)),
    ]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            load(path)


def test_weights_that_are_not_those_that_were_saved_are_noticed_in_a_sound_file(saved):
    _, path = saved
    content = load(path)
    content["model"]["norm.weight"][0] += 1e-6
    torch.save(content, path)
    with pytest.raises(UserError, match="its weights are not those that were saved"):
        load(path)
    content = {**load_again(saved), "model_config": {**content["model_config"], "norm_eps": 1e-3}}
    torch.save(content, path)
    with pytest.raises(UserError, match="its weights are not those that were saved"):
        load(path)


def load_again(saved):
    model, path = saved
    save(path, model, stage="sft", tokenizer=WORLD, config=Config(str(path)), step=7)
    return load(path)


def peak(function):
    """The most bytes that Python held while the function ran."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            function()
        return tracemalloc.get_traced_memory()[1], str(caught.value)
    finally:
        tracemalloc.stop()


def test_a_file_that_would_unpack_to_more_than_it_is_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"format": "nanoalign-1", "model": {"a": torch.zeros(20_000_000)}}, tmp_path / "zeros.pt")
    with (
        zipfile.ZipFile(tmp_path / "zeros.pt") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    (tmp_path / "zeros.pt").unlink()
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    most, message = peak(lambda: load(tmp_path / "bomb.pt"))
    assert most < 5_000_000 and "not a nanoalign checkpoint: it is compressed" in message


@pytest.mark.parametrize(
    "changes",
    [{"width": 10**6, "layers": 2, "vocab_size": 10**6}, {"context": 2**40}, {"layers": 10**9},
     {"heads": 2**30, "head_dim": 2**30}, {"mlp_width": 2**30}, {"vocab_size": 2**30}],
    ids=str,
)  # fmt: skip
def test_a_shape_of_which_no_machine_could_hold_the_model_is_refused_before_it_is_built(saved, changes):
    _, path = saved
    content = kept(path)
    content["model_config"].update(changes)
    torch.save(content, path)
    with pytest.raises(UserError, match="is damaged"):
        load_policy(path)


EDITS = [  # of a field, and what the sentence names
    ("stage", None, '"stage"'), ("stage", 3, '"stage"'), ("tokenizer", ["world"], '"tokenizer"'),
    ("tokenizer", "nonsense", "no tokenizer 'nonsense'"), ("tokenizer", ..., '"tokenizer"'),
    ("step", ..., '"step"'), ("step", -1, '"step"'), ("step", "7", '"step"'), ("step", 1.5, '"step"'),
    ("chat", "yes", '"chat"'), ("config", [1], '"config"'), ("config", ..., '"config"'),
    ("model", ..., '"model"'), ("model", [], '"model"'), ("model", {"a": 1}, '"model"'),
    ("model_config", 3, '"model_config"'), ("normalisation", {"mean": 0.0}, '"normalisation"'),
    ("normalisation", {"mean": 0.0, "std": float("nan")}, '"normalisation"'), ("beta", "high", '"beta"'),
    ("history", [{"step": "1"}], '"history"'), ("history", 3, '"history"'), ("critic", {"w": 1}, '"critic"'),
    ("optimizer", [], '"optimizer"'), ("random", {}, '"random"'), ("checksum", 3, '"checksum"'),
    ("format", "nanoalign-2", "format 'nanoalign-2'.*use the one that wrote it"),
    ("format", ..., "not a nanoalign checkpoint"), ("format", 1, "not a nanoalign checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, what", EDITS, ids=str)
def test_a_field_that_is_missing_or_of_another_kind_is_one_sentence(saved, name, value, what):
    _, path = saved
    content = kept(path)
    content.pop(name, None)
    torch.save(content if value is ... else {**content, name: value}, path)
    with pytest.raises(UserError, match=what) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"sliding_window": 4}, "newer version.*sliding_window"),
        ({"width": "64"}, "width"),
        ({"width": 64.0}, "width"),
        ({"width": -64}, "width"),
        ({"context": 0}, "no context"),
        ({"tied": 1}, "tied"),
        ({"norm": 3}, "norm"),
        ({"norm": "batchnorm"}, "batchnorm"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": ["a"]}, "rope_scaling"),
        ({"heads": 3, "kv_heads": 2}, "multiple"),
        ({"heads": 0, "kv_heads": 0}, "is damaged"),
        ({"width": 32}, "shapes"),
        ({"mlp_width": 320}, "shapes"),
        ({"head_dim": 16}, "shapes"),
        ({"qkv_bias": True}, "not a language model's"),
        ({"kv_heads": 1}, "shapes"),
        ({"layers": 1}, "not a language model's"),
        ({"layers": 3}, "not a language model's"),
    ],
    ids=str,
)
def test_a_shape_that_is_no_models_is_one_sentence(saved, changes, what):
    _, path = saved
    content = kept(path)
    content["model_config"].update(changes)
    torch.save(content, path)
    with pytest.raises(UserError, match=what) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.double(), lambda w: w.bfloat16(), lambda w: w.to(torch.complex64), lambda w: w.int(),
        lambda w: w.to_sparse(), lambda w: w.new_zeros(1).expand(10**12), lambda w: w.to("meta"),
        lambda w: w.tolist(),
    ],
    ids=["double", "bfloat16", "complex", "int", "sparse", "expanded", "meta", "a list"],
)  # fmt: skip
def test_weights_of_another_kind_are_one_sentence(saved, edit):
    _, path = saved
    content = kept(path)
    content["model"]["norm.weight"] = edit(content["model"]["norm.weight"])
    torch.save(content, path)
    with pytest.raises(UserError, match=r'"model" is not what it should be|is damaged|not a nanoalign'):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_saved(tmp_path, value):
    model, config = tiny(), Config(str(tmp_path / "x.pt"))
    with torch.no_grad():
        model.norm.weight[3] = value
    for write in (
        lambda: finish(config, model, stage="sft", tokenizer=WORLD, step=12),
        lambda: save_partial(
            config, model, make_optimizer(model, 0.1), stage="sft", tokenizer=WORLD, step=12, data=""
        ),
    ):
        with pytest.raises(UserError, match="no longer finite numbers at step 12"):
            write()
    assert os.listdir(tmp_path) == []
    save(config.out, model, stage="sft", tokenizer=WORLD, config=config, step=12)
    with pytest.raises(UserError, match="weights that are not a finite number"):
        load(config.out)


def test_a_file_that_cannot_be_read_is_not_called_damaged(saved, monkeypatch):
    _, path = saved
    with pytest.raises(UserError, match=r"runs is a folder without config\.json"):
        load(path.parent)
    for error, what in (
        (PermissionError(13, "Permission denied"), r"cannot be read \(Permission denied\)"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (MemoryError(), "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "too little memory"),
    ):

        def refuse(*args, error=error, **more):
            raise error

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(UserError, match=what) as caught:
            load(path)
        assert "damaged" not in str(caught.value)


def a_partial(tmp_path):
    config, model = Config(str(tmp_path / "x.pt")), tiny()
    optimizer = make_optimizer(model, 0.1)
    train_a_little(model, optimizer)
    save_partial(config, model, optimizer, stage="sft", tokenizer=WORLD, step=2, data="abc")
    return config, model, optimizer, torch.load(partial_path(config.out), weights_only=True)


def drop(name):
    return lambda content: content.pop(name)


DAMAGES = {
    "no optimizer": drop("optimizer"),
    "no random": drop("random"),
    "no data": drop("data"),
    "one moment less": lambda c: c["optimizer"]["state"][0].pop("exp_avg"),
    "another shape": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "not finite": lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(float("nan")),
    "no such parameter": lambda c: c["optimizer"]["state"].update({99: c["optimizer"]["state"][0]}),
    "no number": lambda c: c["optimizer"]["state"].update({-1: c["optimizer"]["state"][0]}),
    "a group more": lambda c: c["optimizer"]["param_groups"].append({"params": [77]}),
    "no groups": lambda c: c["optimizer"].update(param_groups=3),
    "random numbers": lambda c: c["random"].update(torch=torch.zeros(3)),
    "python's": lambda c: c["random"].update(python=(3, (1, 2), None)),
    "nothing of python's": lambda c: c["random"].update(python=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_partial_is_one_sentence_that_says_to_delete_it(damage, tmp_path):
    config, model, optimizer, content = a_partial(tmp_path)
    damage(content)
    torch.save(content, partial_path(config.out))
    with pytest.raises(UserError, match=r"x\.partial\.pt .*Delete it to start afresh\.$") as caught:
        resume(config, model, optimizer, stage="sft", data="abc")
    assert "\n" not in str(caught.value)


def test_hyperparameters_of_a_resumed_optimiser_are_those_of_the_flags(tmp_path):
    config, model, optimizer, content = a_partial(tmp_path)
    for group in content["optimizer"]["param_groups"]:
        group.update(betas="odd", eps=None, lr=7.0)
    torch.save(content, partial_path(config.out))
    resume(config, model, optimizer, stage="sft", data="abc")
    assert [(g["betas"], g["lr"]) for g in optimizer.param_groups] == [((0.9, 0.95), 0.1)] * 2
    train_a_little(model, optimizer)
