"""A person's keys become votes; no vote of a person is ever lost."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import by, command, compared, forked

from lab import annotate
from nanoalign import UserError
from nanoalign.rows import read_rows, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def type_keys(monkeypatch):
    """type_keys(rows, keys, …) → annotate them with these lines as input; every saved state."""

    def type_keys(rows, keys, name="human", seed=0):
        states = []
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
        annotate.annotate(rows, name, lambda: states.append(json.loads(json.dumps(rows))), seed)
        return states

    return type_keys


def test_a_key_says_which_of_the_shown_sides_is_better_and_the_order_is_recorded(type_keys, capsys):
    rows = compared(100)
    type_keys(rows, "1 2 " * 50)
    shown = re.findall(r"^(good|bad) (\d+) +│ (good|bad) \2", capsys.readouterr().out, re.M)
    assert len(shown) == 100
    for i, (c, (left, number, right)) in enumerate(zip(rows, shown)):
        (vote,) = c["votes"]
        assert int(number) == i and vote["swapped"] == (left == "bad") and left != right
        assert vote["p"] == float((left if i % 2 == 0 else right) == "good")
    swapped = [c["votes"][0]["swapped"] for c in rows]
    assert 30 < sum(swapped) < 70
    others = compared(100), compared(100)
    type_keys(others[0], "1 " * 100, seed=1), type_keys(others[1], "1 " * 100, name="human:ann")
    for other in others:  # drawn anew for another seed and for another person
        assert [c["votes"][0]["swapped"] for c in other] != swapped


def test_ties_and_skips_are_recorded_and_not_asked_again(type_keys, capsys):
    rows = compared(4)
    type_keys(rows, "t skip tie")
    assert by(rows, "human") == [0.5, None, 0.5, "none"]
    capsys.readouterr()
    type_keys(rows, "q")
    assert "4 of 4" in (out := capsys.readouterr().out) and "Question 3?" in out and "Question 1?" not in out


def test_every_key_is_saved_before_the_next_question(type_keys):
    states = type_keys(compared(3), "t u s t t u")
    counts = [sum(vote != "none" for vote in by(state, "human")) for state in states]
    assert counts == [1, 0, 1, 2, 3, 2]


def test_undo_takes_back_the_last_vote_also_of_an_earlier_session_and_only_ones_own(type_keys, capsys):
    rows = compared(3, [("human:ann", 1.0)])
    type_keys(rows, "t t")
    first = type_keys(rows, "u s u u u t")[0]  # back to the start, and no further
    assert by(first, "human") == [0.5, "none", "none"]  # it is saved too
    assert by(rows, "human") == [0.5, "none", "none"] and by(rows, "human:ann") == [1.0] * 3
    assert "no vote to take back" in capsys.readouterr().out


def test_the_last_vote_can_be_taken_back_too(type_keys, capsys):
    rows = compared(2)
    type_keys(rows, "t t u s")
    assert by(rows, "human") == [0.5, None]
    type_keys(rows, "u t")
    assert by(rows, "human") == [0.5, 0.5] and "all 2 comparisons have your vote" in capsys.readouterr().out


def test_an_undone_question_stands_in_the_same_order_again(type_keys, capsys):
    type_keys(compared(20), "1 u " * 10)
    shown = re.findall(r"^(good|bad) 0 ", capsys.readouterr().out, re.M)
    assert len(shown) == 11 and len(set(shown)) == 1


def test_other_keys_ask_again_and_change_nothing(type_keys, capsys):
    rows = compared(2)
    states = type_keys(rows, "3 10 left! q")
    assert states == [] and by(rows, "human") == ["none", "none"]
    assert capsys.readouterr().out.count("none of these keys") == 3


def test_ctrl_c_leaves_with_all_votes(monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self):
            return super().readline() or signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stdin", Interrupted("1\nt\n"))
    rows, saved = compared(3), []
    annotate.annotate(rows, "human", lambda: saved.append(len(saved)))
    assert saved == [0, 1] and by(rows, "human")[1:] == [0.5, "none"]


def test_text_cannot_move_the_cursor_and_an_unfinished_response_is_marked(type_keys, capsys):
    rows = compared(1)
    rows[0]["responses"] = ["\x1b[2Jred\tapple\r\n\n  indented", "x" * 300]
    rows[0]["ended"] = [True, False]
    rows[0]["prompt"][0]["content"] = "clear\x1b[H\u202eme"
    type_keys(rows, "q")
    out = capsys.readouterr().out
    assert not set("\x1b\r\t\u202e") & set(out)
    assert "red" in out and "  indented" in out and out.count("[…]") == 1 and out.count("x") >= 300


def test_two_sessions_at_once_do_not_overwrite_each_others_votes(tmp_path, monkeypatch):
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3))

    class Meanwhile(io.StringIO):  # while the first person thinks, a second one votes
        def readline(self):
            monkeypatch.setattr(sys, "stdin", io.StringIO("t\nt\nt\n"))
            annotate.main(annotate.Config(record, out, "ann"))
            return "t\n"

    monkeypatch.setattr(sys, "stdin", Meanwhile())
    with pytest.raises(UserError, match="changed by another run"):
        annotate.main(annotate.Config(record, out, "bob"))
    assert by(read_rows(record, "compared"), "human:ann") == [0.5] * 3


def test_leaving_without_a_vote_is_no_mistake_and_writes_no_pairs(tmp_path, monkeypatch, capsys):
    out, record = tmp_path / "mine.jsonl", str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    annotate.main(annotate.Config(record, str(out)))
    said = capsys.readouterr().out
    assert not out.exists() and f"3 pairs wait in {record}: the same command goes on" in said


def test_pairs_are_decided_by_all_votes_and_agreement_is_printed(tmp_path, monkeypatch, capsys):
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3, [("rm:x", 0.8)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("t\nt\n"))
    annotate.main(annotate.Config(record, out, "ann"))
    printed = capsys.readouterr().out
    assert "2 comparisons with several votes" in printed and "1 pairs wait" in printed
    pairs = read_rows(out, "pairs")
    assert [pair["probability"] for pair in pairs] == [0.65, 0.65, 0.8]
    assert pairs[0]["meta"]["annotators"] == ["rm:x", "human:ann"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("t\n"))
    annotate.main(annotate.Config(record, out, "ann", min_agreement=0.7))
    assert "pairs wait" not in capsys.readouterr().out and read_rows(out, "pairs") == pairs


def test_without_a_standard_input_and_for_a_share_above_one_there_is_one_sentence(tmp_path):
    def closed():
        os.close(0)
        sys.stdin = None  # which an interpreter makes of it
        command("-m", "lab.annotate", "--votes", f"{tmp_path}/x.votes.jsonl")

    status, _, errors = forked(closed)
    assert status == 1 and errors.startswith("error: ") and "nobody to ask" in errors
    for flags, said in (({"min_agreement": 2.0}, "--min-agreement 2"), ({}, "does not exist")):
        with pytest.raises(UserError, match=said):
            annotate.main(annotate.Config(votes=f"{tmp_path}/x.votes.jsonl", **flags))


def test_a_killed_session_at_a_terminal_loses_no_key_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    """Keys without Enter through a pseudo-terminal; SIGKILL; then the rest line by line, with an undo."""
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(6))
    command = ["-m", "lab.annotate", "--votes", record, "--out", out]
    terminal, inner = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdin=inner, stdout=inner, stderr=inner
    )
    os.close(inner)
    screen = b""
    try:
        for asked, key in ((1, b"1"), (2, b"t"), (3, b"s"), (4, b"")):
            while f"Question {asked - 1}?".encode() not in screen or not screen.rstrip().endswith(b">"):
                assert select.select([terminal], [], [], 60)[0], screen  # it waits for more than a key
                screen += os.read(terminal, 4096)
            os.write(terminal, key)
            screen = screen if key == b"" else b""
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    before = read_rows(record, "compared")
    assert by(before, "human")[1:] == [0.5, None, "none", "none", "none"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("u\n2\n1\n2\n1\n"))
    annotate.main(annotate.Config(record, out))
    assert "Question 2?" in (printed := capsys.readouterr().out) and "Question 1?" not in printed
    after = read_rows(record, "compared")
    assert after[:2] == before[:2] and len(after) == 6
    keys = [1, 0.5, 0, 1, 0, 1]  # of the left side: what was typed in the end
    for c, key in zip(after, keys):
        (vote,) = c["votes"]
        assert vote["p"] == (1 - key if vote["swapped"] else key)
    pairs = read_rows(out, "pairs")
    assert len(pairs) == 6 and [pair.get("probability", 1) for pair in pairs] == [1, 0.5, 1, 1, 1, 1]
