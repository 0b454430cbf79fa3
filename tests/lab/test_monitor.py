"""What the monitor says of logs whose drift is known, and of hostile ones."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import command, forked, write_lines

from lab import audit, chats, monitor, simulated_chats
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar
from nanoalign.rows import read_rows

CLEAR = "\x1b[2J\u202e"
REWARD = "def checks(prompt, response, meta):\n    return {'reward': meta['score']}\n"
UP = {"refusals": 1.6, "length (words)": 1.2, "reward": -1.2}


@pytest.fixture
def checks(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    return str(tmp_path / "mine.py")


def simulated(seed, talks, shifts=None, first=0):
    rng = np.random.default_rng(seed)
    return simulated_chats.texts(rng, *simulated_chats.simulated(rng, talks, shifts), first)


def answer(text="Yes.", talk="a", label=None, **meta):
    label = {"unrated": True} if label is None else {"label": label}
    meta = {"conversation": talk, "ended": True, **meta}
    return {"prompt": "Why?", "completion": text, **label, "meta": meta}


def run(log, **config):
    """→ the report of a log, as its file says it."""
    monitor.main(monitor.Config(log=str(log), **config))
    return json.loads(Path(str(log).replace(".jsonl", ".monitor.json")).read_text())


def named(report):
    return {name for name, metric in report["metrics"].items() if metric["mark"]}


# ---------------------------------------------------------------------------------------------- what is said


def test_the_metrics_of_simulated_answers_are_what_was_planted_in_them():
    rng = np.random.default_rng(0)
    values, own = simulated_chats.simulated(rng, 60)
    rows = simulated_chats.texts(rng, values, own)
    found = chats.measured([chats.parse_answer(row) for row in rows])
    for name in ("refusals", "hedging", "flattery", "repetition", "thumbs up"):
        assert 0 < np.nanmean(values[name]) < 1
        np.testing.assert_array_equal(found[name], values[name])
    np.testing.assert_array_equal(found["rated"], ~np.isnan(values["thumbs up"]))
    words = [len(row["completion"].replace(".", "").replace("?", "").split()) for row in rows]
    np.testing.assert_array_equal(found["length (words)"], words)
    assert np.corrcoef(words, values["length (words)"])[0, 1] > 0.95


def test_the_error_of_a_mean_is_that_of_the_means_of_conversations_where_they_are_as_long():
    values = np.random.default_rng(1).normal(size=(12, 3)) + np.arange(12)[:, None]
    values = np.concatenate([values.ravel(), [np.nan, np.nan]])
    talks = np.array([*np.repeat(np.arange(12), 3), 0, 99])
    center, error = chats.mean(values, talks)
    of_talks = values[:36].reshape(12, 3).mean(1)
    assert center == pytest.approx(of_talks.mean())
    assert error == pytest.approx(of_talks.std(ddof=1) / 12**0.5)
    assert error > 1.5 * values[:36].std(ddof=1) / 36**0.5  # as if answers were independent
    few = talks < 4
    assert chats.mean(values[few], talks[few])[0] == pytest.approx(of_talks[:4].mean())
    assert math.isnan(chats.mean(values[few], talks[few])[1])  # four conversations have no error
    assert chats.drift((1.0, 0.3), (3.0, 0.4)) == (-2.0, pytest.approx(0.5))


def test_a_star_is_beyond_two_errors_and_two_are_beyond_what_marks_any_metric_once_in_twenty():
    def tails(z):
        return math.erfc(z / 2**0.5)

    changes = {f"m{i}": (0.0, 1.0) for i in range(5)}
    changes |= {"still": (0.0, 0.0), "unknown": (1.0, math.nan), "missing": (math.nan, math.nan)}
    _, chance = chats.marks(changes)
    assert chance["metrics"] == 5  # those that chance could mark
    assert chance["each"] == pytest.approx(tails(2)) and chance["any"] == pytest.approx(
        1 - (1 - tails(2)) ** 5
    )
    two = chance["two stars"]
    assert 1 - (1 - tails(two)) ** 5 == pytest.approx(0.05)
    sizes = {"m0": 1.99, "m1": -2.01, "m2": two - 0.01, "m3": -two - 0.01}
    marks, _ = chats.marks({**changes, **{name: (x, 1.0) for name, x in sizes.items()}})
    assert [marks[f"m{i}"] for i in range(5)] == ["", "*", "*", "**", ""]
    assert marks["still"] == marks["unknown"] == marks["missing"] == ""


def test_false_alarms_are_as_frequent_as_the_monitor_says_and_would_be_more_if_answers_were_taken_alone():
    rng, count = np.random.default_rng(2), 250
    found = [[*simulated_chats.compared(rng, 60).values()] for _ in range(count)]
    naive = [[*simulated_chats.compared(rng, 60, clustered=False).values()] for _ in range(count)]
    stars, plain = (np.array(each) != "" for each in (found, naive))
    K = stars.shape[1]
    due, any_due = chats.STAR, 1 - (1 - chats.STAR) ** K
    assert abs(stars.mean() - due) < 3 * (due / (count * K)) ** 0.5
    assert abs(stars.any(1).mean() - any_due) < 3 * (any_due * (1 - any_due) / count) ** 0.5
    assert plain.mean() > 1.5 * due
    two = (np.array(found) == "**").any(1).mean()
    assert two < 0.05 + 3 * (0.05 / count) ** 0.5


# --------------------------------------------------------------------------------------------- what drifted


def test_exactly_what_was_planted_in_the_second_half_is_named(checks, tmp_path, capsys):
    false, others = 0, 0
    for seed in range(5):
        rows = simulated(seed, 100) + simulated(100 + seed, 100, UP, first=100)
        report = run(write_lines(tmp_path / "chats.jsonl", rows), checks=checks)
        drifted = {name: metric["mark"] for name, metric in report["metrics"].items()}
        assert all(drifted[name] == "**" for name in UP)
        for name, shift in UP.items():
            change = report["metrics"][name]["change"][0]
            assert change * shift > 0
        others += report["chance"]["metrics"] - len(UP)
        false += len(named(report) - {*UP})
        out = capsys.readouterr().out
        line = next(line for line in out.splitlines() if line.startswith("drifted against"))
        assert line.startswith("drifted against the first half of the conversations: ")
        assert all(f"{name} {'rose' if shift > 0 else 'fell'} by " in line for name, shift in UP.items())
        assert all((f"{name} " in line) == (name in named(report)) for name in ("hedging", "flattery"))
    assert others == 5 * 5 and false <= 4  # of 25, by chance: P(more) < 0.5 %


@pytest.mark.parametrize("shifts", [{"refusals": 1.6}, {"hedging": -2.5}, {"reward": 1.0}], ids=str)
def test_a_log_is_compared_with_another_one(shifts, checks, tmp_path):
    old = write_lines(tmp_path / "old.jsonl", simulated(7, 100))
    new = write_lines(tmp_path / "new.jsonl", simulated(8, 100, shifts))
    report = run(new, against=old, checks=checks)
    assert named(report) == {*shifts}  # with these seeds; one in five others would have a false one
    [name] = shifts
    metric, own, before = report["metrics"][name], [], []
    for path, values in ((new, own), (old, before)):
        talks = monitor.read_log(path, monitor.Config())
        found = chats.measured([row for talk in talks for row in talk])
        scores = [row["meta"]["score"] for talk in talks for row in talk]
        values += scores if name == "reward" else found[name].tolist()
    assert metric["now"][0] == metric["overall"][0] == pytest.approx(np.mean(own))
    assert metric["change"][0] == pytest.approx(np.mean(own) - np.mean(before))
    assert report["answers"] == len(own) and sum(part["answers"] for part in report["parts"]) == len(own)


def test_a_log_has_not_drifted_from_itself(checks, tmp_path, capsys):
    log = write_lines(tmp_path / "chats.jsonl", simulated(9, 30))
    copy = write_lines(tmp_path / "copy.jsonl", simulated(9, 30))
    assert not named(run(log, against=copy, checks=checks))
    out = capsys.readouterr().out
    assert "copy.jsonl: nothing" in out and "has 30 conversations" in out


def test_parts_follow_time_and_no_conversation_is_cut(tmp_path):
    rows = simulated(3, 40)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]  # as several chats write them
    report = run(write_lines(tmp_path / "chats.jsonl", rows), parts=4)
    assert [part["conversations"] for part in report["parts"]] == [10] * 4
    assert sum(part["answers"] for part in report["parts"]) == len(rows)
    for k, part in enumerate(report["parts"]):
        own = [row for row in rows if 10 * k <= int(row["meta"]["conversation"][1:]) < 10 * k + 10]
        assert part["answers"] == len(own) and part["from"] == min(row["meta"]["time"] for row in own)
        said = np.mean(["Perhaps" in row["completion"] for row in own])
        assert report["metrics"]["hedging"]["parts"][k][0] == pytest.approx(said)
    cuts = [part["from"] for part in report["parts"]]
    assert cuts == sorted(cuts)


# -------------------------------------------------------------------------------------------- what is a log


def test_what_was_held_back_is_counted_and_no_more_is_said_of_it(tmp_path):
    rows = [answer("I can't help with that.", f"t{i}", held="rm.pt:0" if i < 3 else None) for i in range(12)]
    rows = [{**row, "meta": {k: v for k, v in row["meta"].items() if v is not None}} for row in rows]
    rows += [answer("Yes.", f"t{i}") for i in range(12)]
    metrics = run(write_lines(tmp_path / "chats.jsonl", rows))["metrics"]
    assert metrics["held back"]["overall"][0] == pytest.approx(3 / 24)
    assert metrics["refusals"]["overall"][0] == pytest.approx(9 / 21)


def test_rows_of_others_have_no_times_and_each_is_a_conversation(tmp_path, capsys):
    rows = [{"prompt": "Hi", "completion": "Perhaps.", "label": i % 4 > 0} for i in range(20)]
    report = run(write_lines(tmp_path / "thumbs.jsonl", rows))
    assert report["conversations"] == 20 and report["thumbs"] == {"up": 15, "down": 5, "none": 0}
    assert report["metrics"]["thumbs up"]["overall"] == pytest.approx([0.75, (0.75 * 0.25 / 19) ** 0.5])
    assert report["metrics"]["hedging"]["overall"] == [1.0, 0.0] and "ended" not in report["metrics"]
    assert "thumbs: 15 up, 5 down, 0 answers without" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "Hi"}, 'field "completion": expected a string'),
        ({"prompt": "Hi", "completion": "A", "label": "good"}, 'field "label": expected true or false'),
        ({"prompt": "Hi", "completion": "A", "meta": {"time": 3}}, '"time": expected a string'),
        ({"prompt": "Hi", "completion": "A", "meta": {"ended": "yes"}}, '"ended": expected true or false'),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row, said, tmp_path):
    log = write_lines(tmp_path / "chats.jsonl", [answer(), row])
    with pytest.raises(UserError, match=f"chats.jsonl, line 2: .*{said}"):
        run(log)
    assert run(log, skip_bad_rows=True)["answers"] == 1


def test_nothing_in_a_log_or_in_a_check_drives_the_terminal_or_the_page(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        f"def checks(prompt, response, meta):\n    return {{{CLEAR + 'x'!r}: 1}}\n"
    )
    rows = [answer(CLEAR, CLEAR, time=f"{CLEAR}{i}", checkpoint=CLEAR) for i in range(8)]
    log = write_lines(tmp_path / "chats.jsonl", rows)
    run(log, checks=str(tmp_path / "mine.py"), audit=2)
    page = monitor.section(str(tmp_path / "chats.monitor.json"))
    sys_in, sys.stdin = sys.stdin, io.StringIO("g\nq\n")
    try:
        audit.main(audit.Config(answers=str(tmp_path / "chats.audit.jsonl")))
    finally:
        sys.stdin = sys_in
    shown = capsys.readouterr().out + str(page)
    assert "\x1b" not in shown and "\u202e" not in shown and "x" in str(page["rows"])


def test_the_section_of_a_page_says_what_the_table_says(tmp_path, checks, capsys):
    log = write_lines(tmp_path / "chats.jsonl", simulated(0, 60) + simulated(1, 60, UP, first=60))
    report = run(log, checks=checks, parts=2)
    out = capsys.readouterr().out
    page = monitor.section(str(tmp_path / "chats.monitor.json"))
    assert page["title"] == f"After deployment: {report['answers']} answers in 120 conversations"
    assert page["header"] == ["", "1: 01-01 00:00", "2: 01-01 10:00", "change"]
    for name, *cells in page["rows"]:
        [line] = [line for line in out.splitlines() if line.startswith(f"{name} ") and "±" in line]
        assert line.split()[-len(" ".join(cells).split()) :] == " ".join(cells).split()
    assert all(note in out for note in page["notes"])
    assert page["rows"][0][0] == "refusals" and page["rows"][0][-1].endswith("**")
    assert page["meaning"]["refusals"] and {row[0] for row in page["rows"]} == {*report["metrics"]}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"metrics": 3}', None])
def test_a_section_of_something_else_is_one_sentence(text, tmp_path):
    path = tmp_path / "x.monitor.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="cannot be read as a monitor's report"):
        monitor.section(str(path))
    whole = {part: {} for part in monitor.PARTS}
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="cannot be read as a monitor's report"):
        monitor.section(str(path))


def test_a_reward_model_scores_the_answers_and_a_function_is_sent_to_checks(tiny, tmp_path, capsys):
    rows = [answer(f"so {'much ' * i}.", f"t{i}") for i in range(6)]
    rows.append({**answer("Late", "t9"), "prompt": "so " * 80})
    report = run(write_lines(tmp_path / "chats.jsonl", rows), reward=f"{tiny}/rm.pt", device="cpu")
    model, tokenizer, _ = load_scalar(f"{tiny}/rm.pt")
    scores = []
    for row in rows[:6]:
        ids = [
            *tokenizer.prompt([{"role": "user", "content": "Why?"}]),
            *tokenizer.response(row["completion"]),
        ]
        scores.append(model(torch.tensor([ids]))[0, -1].item())
    assert report["metrics"]["reward"]["overall"][0] == pytest.approx(np.mean(scores), abs=1e-4)
    assert "1 prompts leave no room in 40 tokens: no reward" in capsys.readouterr().out
    with pytest.raises(UserError, match="functions of your own are for --checks"):
        run(tmp_path / "chats.jsonl", reward="judge", device="cpu")


def test_the_log_may_stand_alone_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = write_lines(tmp_path / "chats.jsonl", simulated(4, 12))
    status, out, errors = forked(lambda: command("-m", "lab.monitor", log, "--parts", "3"))
    assert (status, errors) == (0, "") and "12 conversations" in out
    assert len(json.loads((tmp_path / "chats.monitor.json").read_text())["parts"]) == 3


# ---------------------------------------------------------------------------------------------- the audit


@pytest.fixture
def type_keys(monkeypatch):
    def type_keys(path, keys, name=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
        audit.main(audit.Config(answers=str(path), name=name))

    return type_keys


def test_an_audit_is_a_random_sample_of_what_was_shown_and_is_not_drawn_twice(tmp_path, capsys):
    rows = [answer(f"Answer {i}.", f"t{i}", label=[None, True, False][i % 3]) for i in range(300)]
    for row in rows[:100]:
        row["meta"]["held"] = "rm.pt:0"
    log, path = write_lines(tmp_path / "chats.jsonl", rows), tmp_path / "chats.audit.jsonl"
    run(log, audit=40)
    drawn = [*map(json.loads, path.read_text().splitlines())]
    numbers = [int(row["completion"][7:-1]) for row in drawn]
    assert len({*numbers}) == 40 and min(numbers) >= 100
    assert 170 < np.mean(numbers) < 230 and numbers != sorted(numbers)  # of 100 to 299: 200 ± 9
    assert all("label" in row or row["unrated"] for row in drawn) and all(row["votes"] == [] for row in drawn)
    before = path.read_text()
    capsys.readouterr()
    run(log, audit=40, seed=5)
    assert path.read_text() == before and "is there already, and kept" in capsys.readouterr().out
    path.unlink()
    run(log, audit=40, seed=5)
    assert path.read_text() != before


def test_where_all_was_held_back_there_is_nothing_to_judge(tmp_path, capsys):
    log = write_lines(tmp_path / "chats.jsonl", [answer("A.", f"t{i}", held="rm.pt:0") for i in range(6)])
    assert {*run(log, audit=3)["metrics"]} == {"held back"}
    assert "every answer was held back" in capsys.readouterr().out
    assert not (tmp_path / "chats.audit.jsonl").exists()


def test_verdicts_are_kept_at_every_key_shown_without_thumbs_and_read_by_kto(tmp_path, type_keys, capsys):
    rows = [answer(f"Answer {i}.", f"t{i}", label=[None, True, False][i % 3]) for i in range(6)]
    log = write_lines(tmp_path / "chats.jsonl", rows)
    run(log, audit=6)
    path = tmp_path / "chats.audit.jsonl"
    order = [int(json.loads(line)["completion"][7:-1]) for line in path.read_text().splitlines()]
    capsys.readouterr()
    type_keys(path, "g b s u b g")  # the third is skipped, taken back, and bad; the fourth is good
    out = capsys.readouterr().out
    assert "Answer" in out and "unrated" not in out and "true" not in out.lower()
    said = dict(zip(order, [True, False, False, True]))
    labelled = read_rows(str(tmp_path / "chats.audit.labelled.jsonl"), "labelled")
    assert {int(row["completion"][7:-1]): row["label"] for row in labelled} == said
    found = run(log)["audit"]
    thumbs = {i: row.get("label") for i, row in enumerate(rows)}
    both = [said[i] == thumbs[i] for i in said if thumbs[i] is not None]
    assert found["judged"] == 4 and found["good"][0] == pytest.approx(0.5)
    assert found["thumbs that agree"] == [pytest.approx(np.mean(both)), len(both)] and len(both) > 1
    assert "audit: 0.500 ± – of 4 random answers are good" in capsys.readouterr().out
    type_keys(path, "g g", name="ann")  # somebody else begins at the start, and disagrees once
    votes = [json.loads(line)["votes"] for line in path.read_text().splitlines()]
    assert [v["annotator"] for v in votes[0]] == ["human", "human:ann"] and len(votes[2]) == 1
    labelled = read_rows(str(tmp_path / "chats.audit.labelled.jsonl"), "labelled")
    assert len(labelled) == 3  # a tie is no label


def test_undo_takes_back_ones_own_last_verdict_also_of_an_earlier_session(tmp_path, type_keys, capsys):
    log = write_lines(tmp_path / "chats.jsonl", [answer(f"Answer {i}.", f"t{i}") for i in range(2)])
    run(log, audit=2)
    path = tmp_path / "chats.audit.jsonl"
    type_keys(path, "u g")
    assert "no verdict to take back" in capsys.readouterr().out
    type_keys(path, "b")
    type_keys(path, "u u u g")
    votes = [[vote["p"] for vote in json.loads(line)["votes"]] for line in path.read_text().splitlines()]
    assert votes == [[1.0], []]
    assert audit.audited(tmp_path / "none.jsonl") is None
