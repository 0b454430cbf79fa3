"""A chat's log and its gate: every answer is kept once, and nobody sees one that was held back."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import WORLD, forked, write_lines
from wires import policy_at, user

import chat
import train_kto
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar
from nanoalign.deployment import Log, held_back, make_gate, parse_gate
from nanoalign.rows import read_rows

COUNTS = """
def words(rows, texts, ended):
    return [len(text.split()) for text in texts]
def secret(rows, texts, ended):
    return ["secret" in text for text in texts]
def unfinished(rows, texts, ended):
    return [not end for end in ended]
def asks_for_bombs(rows, texts, ended):
    return ["bomb" in row["prompt"][-1]["content"] for row in rows]
"""


@pytest.fixture
def code(tmp_path):
    """A file of one's own checks."""
    (tmp_path / "mine.py").write_text(COUNTS)
    return str(tmp_path / "mine.py")


@pytest.fixture
def converse(monkeypatch, capsys, tiny, tmp_path):
    """converse(lines, answers) → what was printed, the log's rows, the prompts that the model saw. The model
    says the answers in turn; what has no full stop at its end has not ended."""

    def converse(lines, answers, **config):
        seen, path, left = [], tmp_path / "chats.jsonl", iter(answers)

        def stream(policy, prompt, *more, **sampling):
            seen.append(WORLD.decode(prompt[0].tolist(), specials=True))
            answer = next(left)
            ids = WORLD.response(answer)
            for token in ids if answer.endswith(".") else ids[:-1]:
                yield None, torch.tensor([token]), None, torch.tensor([True])

        monkeypatch.setattr(chat, "stream", stream)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        options = {"checkpoint": f"{tiny}/policy.pt", "max_new_tokens": 8, "log": str(path), **config}
        chat.main(chat.Config(**options))
        monkeypatch.undo()
        kept = [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
        return capsys.readouterr().out, kept, seen

    return converse


# -------------------------------------------------------------------------------------------------- the log


def test_every_answer_is_a_row_of_what_the_model_saw_and_said_with_its_thumb(converse):
    lines = ["one", "/good", "two", "three", "/bad", "/reset", "four"]
    out, kept, _ = converse(lines, ["A.", "B", "C.", "D."], system="S")
    system = [{"role": "system", "content": "S"}]
    answer = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    prompts = [[*system, *user("one")]]
    prompts.append([*prompts[0], answer("A."), *user("two")])
    prompts.append([*prompts[1], answer("B"), *user("three")])
    assert [row["prompt"] for row in kept] == [*prompts, [*system, *user("four")]]
    assert [row["completion"] for row in kept] == ["A.", "B", "C.", "D."]
    assert [row.get("label") for row in kept] == [True, None, False, None]
    assert [row.get("unrated") for row in kept] == [None, True, None, True]
    meta = [row["meta"] for row in kept]
    assert [m["turn"] for m in meta] == [0, 1, 2, 3] and [m["ended"] for m in meta] == [
        True,
        False,
        True,
        True,
    ]
    names = [m["conversation"] for m in meta]
    assert names[0] == names[1] == names[2] != names[3]
    assert all(m["checkpoint"].endswith("policy.pt") and m["time"].endswith("+00:00") for m in meta)
    assert "chats.jsonl: /good and /bad" in out and "(kept as good)" in out and "(kept as bad)" in out


def test_the_last_thumb_counts_and_rates_the_last_answer_only(converse):
    out, kept, seen = converse(["/bad", "one", "/good", "/bad", "", "/good", "two"], ["A.", "B."])
    assert [row.get("label") for row in kept] == [True, None] and len(seen) == 2
    assert out.count("there is no answer to rate") == 1  # the first


def test_without_a_log_nothing_is_kept_and_a_thumb_is_told_so(converse, tmp_path):
    out, kept, seen = converse(["one", "/good"], ["A."], log="")
    assert not kept and not list(tmp_path.glob("*.jsonl")) and len(seen) == 1
    assert "nothing is kept: start with --log" in out and "Answers are kept" not in out


def test_kto_trains_on_a_log_as_it_is_and_counts_what_nobody_rated(converse, tiny, tmp_path, capsys):
    lines, answers = [], []
    for i in range(12):
        lines += [f"Say {i}", *{0: ["/good"], 1: ["/bad"], 2: []}[i % 3], "/reset"]
        answers.append(f"so {i}.")
    _, kept, _ = converse(lines, answers)
    log = str(tmp_path / "chats.jsonl")
    rows = read_rows(log, "labelled")
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [
        (user(f"Say {i}"), f"so {i}.", i % 3 == 0) for i in range(12) if i % 3 < 2
    ]
    assert rows[0]["meta"] == kept[0]["meta"]
    few = write_lines(tmp_path / "few.jsonl", kept[:2])
    options = {
        "init": f"{tiny}/policy.pt",
        "out": str(tmp_path / "kto.pt"),
        "eval_data": few,
        "max_length": 32,
    }
    capsys.readouterr()
    train_kto.main(train_kto.Config(data=log, batch_size=3, steps=2, **options))
    out = capsys.readouterr().out
    assert "chats.jsonl: 4 rows (ties, unrated or for quality control) were left out" in out
    assert "labels: 4 desirable × 1, 4 undesirable × 1" in out
    assert not torch.equal(
        policy_at(f"{tiny}/policy.pt").embed.weight, policy_at(options["out"]).embed.weight
    )


def test_no_other_reader_takes_an_unrated_answer_for_a_good_one(converse, tmp_path):
    converse(["one", "/bad", "two"], ["A.", "B."])
    log = str(tmp_path / "chats.jsonl")
    with pytest.raises(UserError, match='line 1: field "label": false, a thumb down'):
        read_rows(log, "chat")
    for kind in ("chat", "prompts"):
        with pytest.raises(UserError, match='line 2: field "unrated" is not read'):
            read_rows(log, kind, fields="label=")
    row = {"prompt": "Hi", "completion": "Yes"}
    for more, said in [
        ({"unrated": True, "label": True}, 'fields "label" and "unrated": expected one'),
        ({"unrated": "yes"}, 'field "unrated": expected true or false, found "yes"'),
        ({"unrated": False}, 'field "label": expected true or false'),
        ({}, 'field "label": expected true or false'),
    ]:
        with pytest.raises(UserError, match=said):
            read_rows(write_lines(tmp_path / "x.jsonl", [{**row, **more}]), "labelled")
    with pytest.raises(UserError, match="no usable row"):
        read_rows(write_lines(tmp_path / "x.jsonl", [{**row, "unrated": True}]), "labelled")


def test_chats_that_share_a_log_do_not_mix_their_lines(tmp_path):
    path, rounds = str(tmp_path / "chats.jsonl"), 150

    def speak(who):
        with Log(path, "x.pt") as log:
            for i in range(rounds):
                log.add(user(f"{who} {i}"), who * 20_000, True)  # of more than a buffer

    children = []
    for who in "abcd":
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                speak(who)
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    lines = Path(path).read_text().splitlines()  # one seen half written got an end
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) == 4 * rounds
    for who in "abcd":
        own = [row for row in rows if row["completion"] == who * 20_000]
        assert [row["prompt"][0]["content"] for row in own] == [f"{who} {i}" for i in range(rounds)]


def test_a_line_that_a_crash_cut_short_takes_no_other_one_with_it(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "Hi", "compl')
    for _ in range(2):
        with Log(str(path), "x.pt") as log:
            log.add(user("Hi"), "Yes.", True)
            log.rate(True)
    assert path.read_text().count("\n") == 3
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_rows(str(path), "labelled")
    assert len(read_rows(str(path), "labelled", skip_bad_rows=True)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_answer_that_waits_for_its_thumb_is_kept_when_the_window_closes(number, tmp_path):
    path = tmp_path / "chats.jsonl"

    def action():
        with Log(str(path), "x.pt") as log:
            log.add(user("Hi"), "Yes.", True)
            log.rate(False)
            os.kill(os.getpid(), number)
            for _ in range(300):  # not pause(): a signal that comes just before it would be slept through
                time.sleep(0.1)

    assert forked(action)[0] == 128 + number
    assert [row["label"] for row in map(json.loads, path.read_text().splitlines())] == [False]


def test_no_text_in_a_log_drives_the_terminal_that_shows_it(tmp_path):
    path = tmp_path / "chats.jsonl"
    with Log(str(path), "x.pt") as log:
        log.add(user("\x1b[2J\u202e日本"), "\x9b31m\u2028\x85", True)
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1 and all(32 <= byte < 127 or byte == 10 for byte in raw)
    assert json.loads(raw)["completion"] == "\x9b31m\u2028\x85"


def test_a_log_that_cannot_be_kept_is_refused_before_the_first_question(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    copy = tmp_path / "policy.pt"
    copy.write_bytes((tiny / "policy.pt").read_bytes())
    for log, said in [
        (str(copy), "--checkpoint reads it"),
        (str(tmp_path), "a folder"),
        ("/dev/null", "device"),
        (str(tmp_path / "rm.pt"), "ends in .jsonl"),
    ]:
        with pytest.raises(UserError, match=said):
            chat.main(chat.Config(checkpoint=str(copy), log=log))
    assert copy.read_bytes() == (tiny / "policy.pt").read_bytes()


# ------------------------------------------------------------------------------------------------- the gate


def test_an_answer_is_held_back_below_the_threshold_and_shown_from_there(converse, code):
    answers = ["one two.", "one two three.", "one two three four."]
    out, kept, seen = converse(["a", "/good", "b", "/good", "c"], answers, gate=f"{code}:words:3")
    assert "one two.\n" not in out and "one two three.\n" in out and "one two three four.\n" in out
    assert out.count("(held back, the question forgotten: ") == 1 and "words:3: 2.00 is less than 3" in out
    assert "there is no answer to rate" in out and out.count("kept as good") == 1
    assert ["held" in row["meta"] for row in kept] == [True, False, False]
    assert [row.get("label") for row in kept] == [None, True, None]
    assert kept[0]["completion"] == "one two." and kept[0]["unrated"]
    assert "<|user|> a" not in seen[1] and "one two three." in seen[2]  # the conversation goes on without it


@pytest.mark.parametrize(
    "function, held",
    [("secret", [0, 1, 0, 0]), ("unfinished", [0, 0, 1, 0]), ("asks_for_bombs", [0, 0, 0, 1])],
)
def test_a_function_of_ones_own_holds_back_of_what_it_says_true(function, held, converse, code):
    answers = ["fine.", "a secret.", "loose end", "fine too."]
    out, kept, _ = converse(["a", "b", "c", "a bomb"], answers, gate=f"{code}:{function}")
    assert ["held" in row["meta"] for row in kept] == [bool(h) for h in held]
    assert [answer in out for answer in answers] == [not h for h in held]
    assert "it says so" in out


def test_no_piece_of_an_answer_is_shown_before_the_gate_has_read_it_all(converse, code, monkeypatch):
    shown = []

    def gated(prompt, answer, ended):
        shown.append(sys.stdout.getvalue())
        return ""

    monkeypatch.setattr(chat, "make_gate", lambda *args: gated)
    for gate, before in [(f"{code}:words:3", False), ("", True)]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            monkeypatch.setattr(chat, "make_gate", lambda *args: gated)
            converse(["a"], ["one two three."], gate=gate)
        assert ("three" in shown[-1]) == before  # without a gate it was streamed by then
        assert out.getvalue().count("one two three.") == 1


def test_a_reward_model_at_the_gate_reads_the_whole_conversation_and_the_end(tiny):
    path = f"{tiny}/rm.pt"
    model, tokenizer, _ = load_scalar(path)
    prompt = [*user("Why so?"), {"role": "assistant", "content": "Yes."}, *user("so much?")]

    def score(ended):
        ids = [*tokenizer.prompt(prompt), *tokenizer.response("We like tea.")]
        return model(torch.tensor([ids]))[0, -1].item()

    score = score(True)
    for least, held in [(score - 1e-3, False), (score + 1e-3, True)]:
        gate = make_gate(f"{path}:{least:.6f}", tokenizer, "cpu", 40)
        why = gate(prompt, "We like tea.", True)
        assert bool(why) == held and (not held or f"{score:.2f} is less than" in why)
    with_room = make_gate(f"{path}:-1e9", tokenizer, "cpu", 40)
    assert not with_room(user("so"), "Yes.", True)
    assert "nan is less" in with_room(user("so " * 60), "Yes.", True)  # what it cannot read does not pass


def test_what_scores_the_threshold_passes_and_what_has_no_score_never_does():
    scores = torch.tensor([-1.0, 0.5, 0.500001, torch.nan, torch.inf])
    assert held_back(scores, 0.5).tolist() == [True, False, False, True, False]
    assert held_back(torch.tensor([0.0, 1.0, torch.nan]), None).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "gate, read",
    [
        ("rm.pt:-1.5", ("rm.pt", -1.5)), ("min:a.pt,b.pt:2", ("min:a.pt,b.pt", 2.0)),
        ("out/x:y/rm.pt:0", ("out/x:y/rm.pt", 0.0)), ("rm.pt - 0.1*length:.5", ("rm.pt - 0.1*length", 0.5)),
    ],
)  # fmt: skip
def test_a_gate_is_an_expression_and_a_threshold(gate, read):
    assert parse_gate(gate) == read


@pytest.mark.parametrize(
    "gate", ["rm.pt", "rm.pt:", "rm.pt:low", "rm.pt:1e999", "length", "judge", "3", ":3 "]
)
def test_a_gate_without_a_threshold_is_refused(gate):
    with pytest.raises(UserError, match="THRESHOLD, or file"):
        parse_gate(gate)


def test_a_function_that_fails_at_the_gate_is_found_out_before_the_chat(tmp_path, tiny, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def broken(rows, texts, ended):\n    return [1 / 0 for _ in rows]\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    with pytest.raises(UserError, match="broken failed: ZeroDivisionError"):
        chat.main(chat.Config(checkpoint=f"{tiny}/policy.pt", gate=f"{tmp_path}/mine.py:broken"))
    assert "/reset forgets" not in capsys.readouterr().out
