"""Safety against helpfulness: fronts of planted points, mixtures by their counts, the report by hand."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lab.pareto import Mix, Report, mix, pareto_front, report
from lab.seeds import main as seeds
from nanoalign import UserError
from nanoalign.rows import read_rows, write_rows


def test_who_is_beaten_at_both_is_not_on_the_front():
    points = [(0, 3), (1, 2), (2, 0), (1, 1), (0, 0), (2, -1), (-1, 3)]
    assert pareto_front(np.array(points)).tolist() == [True, True, True, False, False, False, False]


def test_equal_points_are_on_the_front_together_or_not_at_all():
    points = np.array([(1, 1), (1, 1), (0, 2), (0, 1), (0, 1)])
    assert pareto_front(points).tolist() == [True, True, True, False, False]
    assert pareto_front(np.zeros((3, 2))).all()


def test_the_front_is_the_one_that_a_sweep_from_the_right_finds():
    """Sorted by the first coordinate, the front is where the second one rises above all before it."""
    rng = np.random.default_rng(0)
    for points in (*rng.integers(0, 6, (50, 20, 2)), *rng.normal(size=(20, 20, 2))):
        found, highest = set(), -np.inf
        for x in sorted({x for x, _ in points.tolist()}, reverse=True):
            y = max(b for a, b in points.tolist() if a == x)
            if y > highest:
                found.add((x, y))
                highest = y
        assert [tuple(p) in found for p in points.tolist()] == pareto_front(points).tolist()


# ------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture
def files(tmp_path):
    """Seven pairs about harmless requests, three about harmful ones."""
    for name, count in (("helpful", 7), ("harmless", 3)):
        rows = [{"prompt": f"{name} {i}?", "chosen": "a", "rejected": "b"} for i in range(count)]
        write_rows(f"{tmp_path}/{name}.jsonl", rows)
    return {"helpful": f"{tmp_path}/helpful.jsonl", "harmless": f"{tmp_path}/harmless.jsonl"}


def prompts(path):
    return [row["prompt"][0]["content"] for row in read_rows(path, "pairs")]


@pytest.mark.parametrize("share, expected", [(0, (28, 0)), (0.25, (21, 7)), (1, (0, 28))])
def test_a_mixture_has_the_share_asked_for_and_repeats_its_rows_evenly(files, tmp_path, share, expected):
    out = str(tmp_path / "mixed.jsonl")
    mix(Mix(**files, share=share, count=28, out=out))
    counts = Counter(prompts(out))
    for (name, size), many in zip((("helpful", 7), ("harmless", 3)), expected):
        own = [n for prompt, n in counts.items() if prompt.startswith(name)]
        assert sum(own) == many and len(own) == min(many, size) and (not own or max(own) - min(own) <= 1)


def test_a_mixture_is_shuffled_and_depends_on_its_seed_alone(files, tmp_path):
    said = []
    for seed in (0, 0, 1):
        mix(Mix(**files, share=0.5, count=20, out=f"{tmp_path}/x.jsonl", seed=seed))
        said.append(prompts(f"{tmp_path}/x.jsonl"))
    assert said[0] == said[1] != said[2]
    halves = [sum(p.startswith("harmless") for p in half) for half in (said[0][:10], said[0][10:])]
    assert min(halves) > 0


def test_a_share_above_1_is_a_sentence(files, tmp_path):
    with pytest.raises(UserError, match="at most 1"):
        mix(Mix(**files, share=1.5, out=f"{tmp_path}/x.jsonl"))


# ------------------------------------------------------------------------------------------------ the report


def card(helpful, harm, refusal):
    """A checkpoint of a scorecard whose harmless families have these utilities."""
    families = {str(i): {"utility": [x, 0.3]} for i, x in enumerate(helpful)}
    overall = {
        "harmful compliance": [harm, 0.1],
        "over-refusal": [refusal, 0.2],
        "KL to reference": [1.0, 0.0],
    }
    return {"families": {**families, "harm": {"utility": [-9.0, 0.3]}}, "overall": overall}


@pytest.fixture
def folders(tmp_path):
    """Two seeds: share-1 is safest, beta-1 most helpful, sft beaten by both, weight-0 by beta-1 in one."""
    seeds = [
        {
            "sft": card((0.0, 0.0), 0.5, 0.5),
            "share-1": card((0.2, 0.0), 0.0, 0.4),
            "beta-1": card((0.4, 0.6), 0.3, 0.2),
            "weight-0": card((0.4, 0.4), 0.2 + 0.4 * seed, 0.3),
        }
        for seed in (0, 1)
    ]
    for seed, cards in enumerate(seeds):
        (tmp_path / str(seed)).mkdir()
        checkpoints = {f"out/{name}.pt": own for name, own in cards.items()}
        (tmp_path / str(seed) / "scorecard.json").write_text(json.dumps({"checkpoints": checkpoints}))
    return str(tmp_path / "0"), str(tmp_path / "1")


def test_the_report_gives_means_over_seeds_and_marks_both_fronts(folders, capsys):
    report(Report(folders))
    lines = capsys.readouterr().out.splitlines()
    kl = "1.000 ± 0.000"
    assert lines[2] == (
        f"| sft | 0.000 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | {kl} | – (0 of 2) | – (0 of 2) |"
    )
    assert lines[3] == (
        f"| share-1 | 0.100 ± 0.000 | 0.000 ± 0.000 | 0.400 ± 0.000 | {kl} | yes (2 of 2) | yes (2 of 2) |"
    )
    assert lines[4] == (
        f"| beta-1 | 0.500 ± 0.000 | 0.300 ± 0.000 | 0.200 ± 0.000 | {kl} | yes (2 of 2) | yes (2 of 2) |"
    )
    assert lines[5] == (
        f"| weight-0 | 0.400 ± 0.000 | 0.400 ± 0.200 | 0.300 ± 0.000 | {kl} | – (1 of 2) | – (1 of 2) |"
    )
    table = Path(folders[0], "pareto.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 4 and table[8].startswith("weight-0,1,0.4,0.21213,0.6,0.1,0.3,0.2,")


def test_of_one_seed_the_errors_are_those_over_prompts(folders, capsys):
    report(Report(folders[:1]))
    assert "| share-1 | 0.100 ± 0.212 | 0.000 ± 0.100 | 0.400 ± 0.200 |" in capsys.readouterr().out


def test_scorecards_that_are_missing_or_do_not_match_are_a_sentence(folders, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/scorecard.json cannot be read"):
        report(Report((f"{tmp_path}/nowhere",)))
    (tmp_path / "scorecard.json").write_text('{"checkpoints')
    for read in (lambda: report(Report((str(tmp_path),))), lambda: seeds([f"{tmp_path}/scorecard.json"])):
        with pytest.raises(UserError, match=r"scorecard.json cannot be read as a scorecard"):
            read()
    path = tmp_path / "1" / "scorecard.json"
    checkpoints = json.loads(path.read_text())["checkpoints"]
    del checkpoints["out/sft.pt"]
    path.write_text(json.dumps({"checkpoints": checkpoints}))
    with pytest.raises(UserError, match="not of the same policies"):
        report(Report(folders))
    with pytest.raises(UserError, match="not of the same checkpoints"):
        seeds([f"{folder}/scorecard.json" for folder in folders])


def test_a_table_over_seeds_has_all_rows_or_those_that_are_named(folders, capsys):
    cards = [f"{folder}/scorecard.json" for folder in folders]
    seeds(cards)
    every = capsys.readouterr().out.splitlines()
    seeds([*cards, "over-refusal"])
    assert capsys.readouterr().out.splitlines() == [
        *every[:2],
        *(r for r in every if "| over-refusal |" in r),
    ]
    assert len(every) > 3
    with pytest.raises(UserError, match="no scorecard has 'overrefusal'; they have "):
        seeds([*cards, "overrefusal"])


def test_the_picture_has_a_point_per_policy_and_the_front_as_a_line(folders, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report(Report(folders, f"{tmp_path}/new/pareto.png"))
    assert (tmp_path / "new" / "pareto.png").stat().st_size > 10_000
    for axis, best in zip(drawn[0].axes, ([(0.1, 0.0), (0.5, 0.3)], [(0.2, 0.3), (0.4, 0.0)])):
        (front,) = [line for line in axis.lines if line.get_label() == "front"]
        assert front.get_xydata().tolist() == pytest.approx(np.array(best))
        assert sorted(text.get_text() for text in axis.texts) == ["0", "1", "1", "sft"]
        assert axis.yaxis_inverted() and axis.xaxis_inverted() == (axis is drawn[0].axes[1])
