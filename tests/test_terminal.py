"""Text that did not come from the code drives no terminal, and no encoding ends a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_help_and_errors_appear_whatever_the_encoding(encoding):
    """Also in a locale that has no other characters than English ones."""
    surroundings = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    for command, status, key in (
        (["train_sft.py", "--help"], 0, "usage"),
        (["-m", "lab.seeds", "--help"], 0, "seeds"),
        (["train_sft.py", "--init", "nothing → π.pt"], 1, "there is no checkpoint nothing"),
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=surroundings, capture_output=True)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr and key.encode() in done.stdout + done.stderr
    arrow = "→ π" if encoding == "utf-8" else "\\u2192 \\u03c0"
    assert arrow.encode() in done.stderr


def test_an_error_shows_no_escape_sequence_of_a_file_name(run):
    code, _, errors = run("chat.py", "--checkpoint", "no\x1b[2J\nsuch.pt")
    assert code == 1 and "\x1b" not in errors and errors.count("\n") == 1 and "such.pt" in errors
