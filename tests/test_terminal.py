"""Text that did not come from the code drives no terminal, and no encoding ends a run."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import command, compared, forked

import best_of_n
import chat
import evaluate
from lab import agreement, scoreboard, seeds
from nanoalign.statistics import print_table
from nanoalign.terminal import visible

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J\x1b]0;title\x07", "\x9b31m", "a\rb", "a\bb", "\x00\x7f", "\x85",
        "\u202a\u202b\u202c\u202d\u202e", "\u2066\u2067\u2068\u2069", "\u200e\u200f\u061c",
        "\u2028\u2029", "\ufeff\u200b\u2060", "\U000e0041", "\ud800", "\udcff",
    ],
    ids=ascii,
)  # fmt: skip
def test_what_moves_the_cursor_reorders_or_hides_is_shown_as_a_mark(text):
    shown = visible(f"one {text} two")
    assert "�" in shown and shown.startswith("one ") and shown.endswith(" two")
    assert all(c.isprintable() for c in shown) and shown.encode("utf-8")


def test_what_people_write_stays_as_it_is():
    text = "naïve 日本\u3000語, café\u00a0!\nمی\u200cخواهم 👩\u200d🚀 → π ✓"
    assert visible(text) == text
    assert visible("a\tb\r\nc") == "a   b\nc"


HELP = [
    ("cp1252", ["train_ppo.py", "--help"], 0, "\\u03bb of the advantage"),
    ("ascii", ["-m", "lab.seeds", "--help"], 0, "seeds \\u2192 one"),
    ("utf-8", ["chat.py", "--checkpoint", "no → π.pt"], 1, "no checkpoint no → π.pt"),
]


@pytest.mark.parametrize("encoding, words, status, shown", HELP)
def test_help_and_errors_appear_whatever_the_encoding(encoding, words, status, shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, errors = forked(lambda: command(*words), encoding)
    assert code == status, errors
    assert "Traceback" not in errors and shown in out + errors


def test_errors_appear_in_a_locale_that_has_no_other_characters_than_english_ones():
    """From a fresh interpreter, which takes its flags and its streams from there."""
    words = ["chat.py", "--checkpoint", "no → π.pt"]
    surroundings = {**os.environ, "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=surroundings, capture_output=True)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"no checkpoint no \\u2192 \\u03c0.pt" in done.stderr


def test_an_error_shows_no_escape_sequence_of_a_file_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, errors = forked(lambda: command("chat.py", "--checkpoint", "no\x1b[2J\nsuch.pt"))
    assert code == 1 and "\x1b" not in errors and errors.count("\n") == 1 and "such.pt" in errors


CLEAR = "\x1b[2J\u202e"  # clears the screen, and turns what follows round


def test_neither_a_model_nor_a_row_nor_a_name_in_a_file_drives_the_terminal(capsys, tmp_path, monkeypatch):
    """Each place that shows text in full: what the model says, prompts, steps, annotators, metrics, kinds."""
    chat.say(*speaker(monkeypatch), chat.Config(), 0, "cpu", contextlib.nullcontext())
    row = {"prompt": [{"role": "user", "content": f"{CLEAR}Why?"}], "meta": {}}
    drawn = {"texts": f"{CLEAR}one\ntwo", "steps": [0.1, 0.9], "right": True}
    drawn = {name: np.array([[value, None]], dtype=object) for name, value in drawn.items()}
    best_of_n.print_steps(row, drawn, 0, "")
    texts, values = np.array([[f"{CLEAR}hm"]], dtype=object), np.zeros((1, 1))
    found = [(texts, {f"check{CLEAR}": values}, values, values)]
    row = {**row, "meta": {"kind": f"family{CLEAR}"}}
    evaluate.report(evaluate.Config(checkpoints=("x.pt",)), [row], found, {"x.pt": "sft"}, "")
    print_table([f"policy{CLEAR}"], [(f"kind{CLEAR}", [(0.5, 0.1)])])
    agreement.report(compared(3, [(f"ann{CLEAR}", 1.0)]))
    scoreboard.table([f"name{CLEAR}"], [[f"cell{CLEAR}"]])
    card = {"checkpoints": {f"a{CLEAR}.pt": {"overall": {f"metric{CLEAR}": [0.5, 0.1]}}}}
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    seeds.main([str(tmp_path / "card.json")])
    shown = capsys.readouterr().out
    for word in (
        "Why?",
        "one",
        "hm",
        "check",
        "family",
        "policy",
        "kind",
        "ann",
        "name",
        "cell",
        "a�",
        "metric",
        "said",
    ):
        assert word in shown
    assert "\x1b" not in shown and "\u202e" not in shown


def speaker(monkeypatch):
    """A model that says something which clears the screen; a word is a token."""
    words = [f"{CLEAR}said ", "\x9b2J", "so\u2028"]
    spoken = [(None, torch.tensor([i]), None, torch.tensor([True])) for i in range(len(words))]
    monkeypatch.setattr(chat, "stream", lambda *args, **more: iter(spoken))
    decode = lambda ids: "".join(words[i] for i in ids)  # noqa: E731
    return None, SimpleNamespace(end=99, decode_response=decode), torch.zeros(1).numpy()
