"""The demo's story is what its reports say, in words."""

import json

import pytest

from lab import progress, reader, story
from nanoalign import UserError


def card(answered, correct, harm, changes=(), won=0.5, kl=None):
    values = {
        "answered": answered, "correct": correct, "harmful compliance": harm, "over-refusal": 0.2,
        "sycophancy": 0.3, "invention": 0.4, "padding (sentences)": 0.5, "win rate": won,
    }  # fmt: skip
    overall = {name: [x, 0.01] for name, x in values.items()}
    overall["KL to reference"] = [kl, 0.1]
    return {"stage": "sft", "overall": overall, "change from the baseline": dict(changes), "families": {}}


@pytest.fixture
def demo(tmp_path):
    changes = {"correct": [0.1, 0.01], "harmful compliance": [-0.1, 0.01], "padding (sentences)": [0.3, 0.1],
               "sycophancy": [-0.02, 0.02], "answered": [0.0, 0.0]}  # fmt: skip
    dpo = card(0.8, 0.6, 0.1, changes, 0.61, 1.234)
    dpo["overall"]["padding (sentences)"] = [0.8, 0.1]
    cards = {"base": card(0.3, 0.05, 0.4), "sft": card(0.8, 0.5, 0.2), "dpo": dpo, "ppo": card(0.8, 0.5, 0.2)}
    report = {"checkpoints": {f"x/{name}.pt": one for name, one in cards.items()}}
    (tmp_path / "scorecard.json").write_text(json.dumps(report))
    (tmp_path / "rm.report.json").write_text('{"expected_accuracy": 0.701, "ceiling": 0.77}')
    rows = (
        "selector,n,right,error",
        "mean,1,0.3,0",
        "majority,8,0.4,0",
        "prm-min,8,0.5,0",
        "prm-last,8,0.45,0",
    )
    (tmp_path / "best_of_8.csv").write_text("\n".join(rows))
    return tmp_path


def test_every_stage_is_told_by_its_figures(demo, capsys):
    story.main([str(demo)])
    out = " ".join(capsys.readouterr().out.split())
    assert "30% of its texts answer, 5% are right" in out
    assert "answers 80%, and 50% are right" in out and "helps with 20% of harm" in out
    assert "70% of held-out pairs" in out and "in more than 77%" in out
    assert (
        "right in 30%, the commonest answer of 8 in 40%" in out and "by its least certain step in 50%" in out
    )


def test_a_change_is_told_where_it_is_certain_and_as_better_or_worse(demo):
    told = dict(story.story(demo))
    assert told["dpo"] == (
        "wins 61% ± 1% against SFT at 1.2 nats: help with harm 20% → 10%, right answers 50% → 60%; "
        "but needless sentences 0.50 → 0.80"
    ) or told["dpo"] == (
        "wins 61% ± 1% against SFT at 1.2 nats: right answers 50% → 60%, help with harm 20% → 10%; "
        "but needless sentences 0.50 → 0.80"
    )
    assert told["ppo"] == "wins 50% ± 1% against SFT: no change to speak of"


def test_a_folder_that_is_no_demos_is_one_sentence(demo, tmp_path):
    (demo / "scorecard.json").write_text(json.dumps({"checkpoints": {"x/ppo.pt": card(1, 1, 1)}}))
    with pytest.raises(UserError, match="no base and no sft"):
        story.main([str(demo)])
    with pytest.raises(UserError, match="name the demo's folder"):
        story.main([])
    with pytest.raises(UserError, match="cannot be read as a scorecard"):
        story.main([str(tmp_path / "nowhere")])


def test_the_readers_tables_are_means_over_seeds_of_the_models_that_there_are(tmp_path, capsys):
    for seed, own in enumerate((0.6, 0.7)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        families = {"fact": {"accuracy": own + 0.1, "pairs": 7 + seed}, "chat": {"accuracy": own, "pairs": 1}}
        if seed:
            del families["chat"]  # too rare to be in all of the seeds: no mean of it
        report = {
            "expected_accuracy": own,
            "ceiling": 0.8,
            "by_family": families,
            "probe": {"padded": {"model": -own}},
        }
        for name in ("plain", "reader"):
            for end in (".json", ".unseen.json"):
                (folder / f"{name}{end}").write_text(json.dumps(report))
    reader.main([str(tmp_path / "0"), str(tmp_path / "1")])
    lines = capsys.readouterr().out.splitlines()
    cells = "| 0.650 ± 0.050 | 0.800 ± 0.000 | 0.150 ± 0.050 " * 2 + "|"
    assert [line.split(" |")[0] for line in lines if line.endswith(cells)] == [
        "| no reader",
        "| with a reader",
    ]
    assert "| fact | 0.750 ± 0.050 | 7.500 ± 0.500 |" in lines
    assert "| padded | -0.650 ± 0.050 |" in lines
    assert not any("chat" in line for line in lines)
    with pytest.raises(UserError, match="name the folders"):
        reader.main([])


def test_what_runs_changed_is_their_last_evaluation_less_their_first(tmp_path, capsys):
    for seed, last in enumerate((0.5, 0.9)):
        rows = [{"step": 0, "eval_reward": 0.25, "eval_kl": 0.0}, {"step": 1, "loss": 3.0}]
        rows += [
            {"step": 2, "eval_reward": 9.0, "eval_kl": 1.0},
            {"step": 3, "eval_reward": last, "eval_kl": 2.0},
        ]
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]
    progress.main(paths)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | reward | kl |"
    assert lines[2] == f"| {paths[0]} | 0.250 → 0.500 | 0.000 → 2.000 |"
    assert lines[4] == "| change | 0.450 ± 0.200 | 2.000 ± 0.000 |"
    (tmp_path / "1.jsonl").write_text(json.dumps({"step": 0, "eval_reward": 0.25}))
    with pytest.raises(UserError, match="no two held-out evaluations"):
        progress.main(paths)
    with pytest.raises(UserError, match="name the metrics files"):
        progress.main([])


def test_runs_that_log_in_another_order_or_more_stand_in_the_right_columns(tmp_path, capsys):
    one = [{"eval_kl": 0.0, "eval_judge": 1.0}, {"eval_kl": 1.0, "eval_judge": 2.0}]
    two = [
        {"eval_judge": 3.0, "eval_rm": 9.0, "eval_kl": 2.0},
        {"eval_rm": 9.0, "eval_judge": 5.0, "eval_kl": 4.0},
    ]
    for name, rows in (("1", one), ("2", two)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    progress.main([str(tmp_path / "1"), str(tmp_path / "2")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | kl | judge |" and lines[3].endswith("| 2.000 → 4.000 | 3.000 → 5.000 |")
    assert lines[4] == "| change | 1.500 ± 0.500 | 1.500 ± 0.500 |"


def test_what_does_not_fit_is_counted():
    assert story.listed(["a", "b"], most=2) == "a, b"
    assert story.listed(list("abcde"), most=2) == "a, b, and 3 more"
    assert story.listed([]) == ""
