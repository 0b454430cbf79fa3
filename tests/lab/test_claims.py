"""A claim is judged by its differences: all clearly above zero, one clearly below, or neither."""

import json

import pytest

from lab import claims
from lab.claims import CLAIMS, verdict
from lab.evidence import Seed, exact, less, moved, over_seeds, side
from nanoalign import UserError


def test_a_figure_is_above_zero_below_or_neither_by_two_errors():
    assert [side(x) for x in [(0.3, 0.1), (-0.3, 0.1), (0.2, 0.1), (0.1, 0.2), (0.0, 0.0)]] == [
        1,
        -1,
        0,
        0,
        0,
    ]
    assert side((0.001, 0.0)) == 1


def test_the_weakest_of_a_claims_differences_decides():
    good, bad, unclear = (1.0, 0.1), (-1.0, 0.1), (0.1, 0.1)
    assert verdict([good, good]) == "holds here"
    assert verdict([good, unclear]) == "cannot be said"
    assert verdict([good, unclear, bad]) == "does not hold here"


def test_the_error_over_seeds_is_the_larger_of_two():
    value, error = over_seeds([(0.1, 0.3), (0.1, 0.4)])
    assert (value, error) == (pytest.approx(0.1), pytest.approx(0.25))  # within: √(0.09 + 0.16) / 2
    value, error = over_seeds([(1.0, 0.0), (3.0, 0.0), (5.0, 0.0)])
    assert (value, error) == (pytest.approx(3.0), pytest.approx(2 / 3**0.5))  # between
    assert over_seeds([(0.4, 0.1)]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert side(over_seeds([exact(5.0)])) == 0  # of one seed nothing is known of it


def test_errors_of_a_difference_add_up_in_squares():
    assert less((1.0, 0.3), (0.4, 0.4)) == (pytest.approx(0.6), pytest.approx(0.5))
    assert less((1.0, 0.3), (0.4, 0.2), 2) == (pytest.approx(0.2), pytest.approx(0.5))
    assert exact(2.0) == (2.0, 0.0)
    assert moved([1.0] * 2 + [9.0] * 16 + [4.0] * 2)[0] == pytest.approx(3.0)


def card(utility, wins):
    return {"overall": {"utility": [utility, 0.01], "win rate": [wins, 0.02], "words": [3, None]}}


def folder(tmp_path, name, **cards):
    path = tmp_path / name
    path.mkdir(parents=True, exist_ok=True)
    checkpoints = {f"out/{stem}.pt": one for stem, one in cards.items()}
    (path / "scorecard.json").write_text(json.dumps({"checkpoints": checkpoints}))


def test_figures_are_read_from_the_reports_of_a_folder(tmp_path):
    folder(tmp_path, ".", sft=card(-0.3, 0.5))
    folder(tmp_path, "board", dpo=card(0.1, 0.6))
    seed = Seed(str(tmp_path))
    assert seed.value("sft", "utility") == (-0.3, 0.01) and seed.won("board/dpo") == (0.6, 0.02)
    assert seed.value("sft", "words") == (3, 0.0)
    with pytest.raises(UserError, match="no checkpoint ppo"):
        seed.card("board/ppo")
    (tmp_path / "run.metrics.jsonl").write_text(
        '{"step": 1, "kl": 0.5}\n{"step": 2}\n{"step": 3, "kl": 0.7}\n'
    )
    assert seed.rows("run", "kl") == [0.5, 0.7]
    table = "selector,n,right,error\nprm-min,16,0.5,0.02\nmajority,16,0.4,0.03\n"
    (tmp_path / "best_of_n.csv").write_text(table)
    assert seed.best("majority", 16) == (0.4, 0.03)


def test_a_claim_that_was_not_measured_says_so(tmp_path, capsys):
    folder(tmp_path, ".", base=card(-1, 0.2), sft=card(-0.3, 0.5))
    claims.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(CLAIMS) + 1
    assert all("not measured" in line for line in lines[2 : 2 + len(CLAIMS)])
    with pytest.raises(UserError, match="name the folders"):
        claims.main([])


def test_claims_are_different_and_named_by_targets_that_there_are():
    from pathlib import Path

    rules = (Path(claims.__file__).with_name("lab.mk")).read_text()
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS) >= 40
    for claim in CLAIMS:
        assert f"\n{claim.how}: " in rules or f" {claim.how}: " in rules or claim.how == "hacking", claim.how
        assert claim.tests
