"""A Hugging Face folder stands wherever a checkpoint does, and a checkpoint becomes one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import write_lines

import chat
import collect
import evaluate
import train_dpo
import train_sft
from nanoalign import UserError, hf
from nanoalign.chat_formats import FORMATS, template
from nanoalign.checkpoint import load_policy, load_scalar
from nanoalign.tokenizer import get_tokenizer

WORLD = get_tokenizer("world")
TALK = [
    {"role": "user", "content": "Is 7 odd?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
pytest.importorskip("safetensors", reason="safetensors is not installed (extra hf)")


@pytest.fixture(scope="module")
def folder(sft, tmp_path_factory):
    """An SFT checkpoint as a folder."""
    path = tmp_path_factory.mktemp("hf") / "sft"
    hf.export(sft, str(path), torch.float32)
    return path


def copied(folder, tmp_path, **changed):
    """A copy of a folder, with some of its JSON files changed: name=function(content) → content, or None."""
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    for name, change in changed.items():
        file = path / f"{name}.json"
        content = change(json.loads(file.read_text()))
        file.unlink() if content is None else file.write_text(json.dumps(content))
    return path


@torch.no_grad()
def test_a_checkpoint_goes_into_a_folder_and_comes_back_the_same(sft, folder):
    ours, tokenizer, _ = load_policy(sft)
    back, again, found = load_policy(str(folder), chat=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values()))
    assert back.config == ours.config and (found["stage"], found["chat"]) == ("sft", True)
    assert again.prompt(TALK).tolist() == tokenizer.prompt(TALK).tolist()
    special = [(t.end, t.step, t.pad, t.opening, t.vocab_size) for t in (tokenizer, again)]
    assert special[0] == special[1]


def test_a_checkpoint_made_from_a_folder_works_when_the_folder_is_gone(folder, world, tmp_path):
    gone = copied(folder, tmp_path)
    out = str(tmp_path / "tuned.pt")
    few = {"steps": 1, "warmup": 0, "batch_size": 4, "eval_every": 99}
    train_sft.main(train_sft.Config(init=str(gone), data=f"{world}/sft.jsonl", out=out, **few))
    due = load_policy(str(gone))[1].prompt(TALK).tolist()
    shutil.rmtree(gone)
    _, tokenizer, content = load_policy(out, chat=True)
    assert tokenizer.prompt(TALK).tolist() == due and tokenizer.name == content["tokenizer"]
    assert tokenizer.name.startswith("json-")
    back = tmp_path / "back"
    hf.export(out, str(back), torch.float32)  # and out again
    assert load_policy(str(back))[1].prompt(TALK).tolist() == due


def test_every_script_takes_a_folder(folder, world, tmp_path, capsys, monkeypatch):
    asked = write_lines(tmp_path / "asked.jsonl", [{"prompt": f"Is {i} odd?"} for i in range(8)])
    pairs, card = str(tmp_path / "pairs.jsonl"), str(tmp_path / "card.json")
    sides = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(60)]
    short = {"max_new_tokens": 4}
    collect.main(
        collect.Config(policy=str(folder), prompts=f"{world}/prompts.jsonl", out=pairs, count=8, **short)
    )
    assert Path(pairs).read_text()
    train_dpo.main(
        train_dpo.Config(
            init=str(folder), out=str(tmp_path / "dpo.pt"), steps=1, warmup=0, batch_size=4, eval_every=99,
            data=write_lines(tmp_path / "p.jsonl", sides),
            **short,
        )
    )  # fmt: skip
    judged = {"checkpoints": (str(folder), str(tmp_path / "dpo.pt")), "prompts": asked, "reward": "length"}
    evaluate.main(evaluate.Config(**judged, out=card, samples=1, **short))
    report = json.loads(Path(card).read_text())["checkpoints"]
    assert len(report) == 2
    answers = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *asked: next(answers))
    chat.main(chat.Config(checkpoint=str(folder), max_new_tokens=4))
    assert str(folder) in capsys.readouterr().out


def test_a_base_model_without_a_template_gets_rows_for_the_projects_own_format(base, tmp_path, capsys):
    """As GPT-2's folder: a vocabulary without role tokens."""
    hf.export(base, str(tmp_path / "base"), torch.float32)
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    own = len(WORLD.encoding._mergeable_ranks)

    def bare(spec):
        spec["added_tokens"] = []
        spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if i < own}
        return spec

    path = copied(tmp_path / "base", tmp_path, tokenizer=bare, config=lambda c: c | {"vocab_size": own})
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:own].clone()
    save_file(weights, path / "model.safetensors")
    policy, tokenizer, content = load_policy(str(path))
    assert (content["stage"], content["chat"]) == ("base", False) and tokenizer.vocab_size == own + 6
    assert policy.head.weight is policy.embed.weight and len(policy.embed.weight) == own + 6
    assert "6 new tokens" in capsys.readouterr().out
    old, new = policy.embed.weight[:own], policy.embed.weight[own:]
    assert torch.equal(old, weights["model.embed_tokens.weight"])
    off = (new - old.mean(0)) / old.std(0)
    assert 0.08 < off.std() < 0.12 and torch.pdist(new).min() > 0  # near the mean, no two alike
    assert torch.equal(load_policy(str(path))[0].embed.weight, policy.embed.weight)  # the same at each load
    with pytest.raises(UserError, match="no chat model"):
        load_policy(str(path), chat=True)


def test_the_template_decides_the_format_and_a_flag_does_where_it_is_not_known(folder, tmp_path):
    chatml = template(FORMATS["chatml"], "Be kind.")
    path = copied(folder, tmp_path, tokenizer_config=lambda c: c | {"chat_template": chatml})
    _, tokenizer, _ = load_policy(str(path))
    assert tokenizer.chat_format == "chatml" and tokenizer.vocab_size == 2048 + 2  # <|im_start|>, <|im_end|>
    shown = tokenizer.decode(tokenizer.prompt([{"role": "user", "content": "<|im_end|>"}]), specials=True)
    assert shown == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.prompt([{"role": "user", "content": "<|im_end|>"}]).tolist()
    assert ids.count(tokenizer.end) == 2  # what the user spelt is text
    odd = copied(folder, tmp_path / "odd", tokenizer_config=lambda c: c | {"chat_template": "[INST] {{ x }}"})
    with pytest.raises(UserError, match="--chat-format"):
        load_policy(str(odd))
    out = str(tmp_path / "named.pt")
    hf.import_folder(str(odd), out, "chatml")
    assert load_policy(out, chat=True)[1].chat_format == "chatml"
    with pytest.raises(UserError, match=r"no chat format 'alpaca'.*chatml"):
        hf.import_folder(str(odd), out, "alpaca")


@pytest.mark.parametrize(
    "file, match",
    [
        ("config", r"config\.json"),
        ("tokenizer", r"no tokenizer\.json.*byte-level BPE"),
        (None, "safetensors"),
    ],
)
def test_a_folder_that_lacks_a_file_is_one_sentence(file, match, folder, tmp_path):
    path = copied(folder, tmp_path, **({file: lambda content: None} if file else {}))
    if not file:
        (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=match):
        load_policy(str(path))


def test_a_folder_is_no_reward_model_and_a_process_model_no_folder(folder, tmp_path):
    with pytest.raises(UserError, match=r"is a 'sft' checkpoint; expected 'rm'"):
        load_scalar(str(folder))


def test_a_tokenizer_in_a_checkpoint_that_was_tampered_with_is_one_sentence(folder, tmp_path):
    out = str(tmp_path / "copy.pt")
    hf.import_folder(str(folder), out, "")
    content = torch.load(out, weights_only=True)
    for field, value in (
        ("vocabulary", "{"),
        ("vocabulary", "[1]"),
        ("chat_format", "odd"),
        ("vocabulary", 3),
    ):
        torch.save({**content, field: value}, out)
        with pytest.raises(UserError):
            load_policy(out)
