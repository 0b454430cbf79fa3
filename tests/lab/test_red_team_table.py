"""The tables of several red teams: kinds of attack, exploits counted, means by hand."""

import json

import pytest

from lab.red_team_table import KINDS, kind, main
from nanoalign import UserError


def attack(exploit, fooled, reward):
    return {"pattern": "{}", "exploit": exploit, "fooled": [fooled, 0.1], "reward": [reward, 0.1]}


@pytest.fixture
def folders(tmp_path):
    """Two seeds' reports."""
    for seed, shift in ((0, 0.0), (1, 0.2)):
        policies = {
            f"out/{name}.pt": {"no attack": {"helped": [low + shift, 0.1]}, "search": {"helped": [0.5, 0.1]}}
            for name, low in (("sft", 0.1), ("ppo", 0.3))
        }
        before = {
            "another sample": attack(False, 0.1, 0.0),
            "template 1": attack(True, 0.2 + shift, 1.0),
            "template 2": attack(False, 0.4 + shift, -1.0),
            "gap": attack(True, 0.5, 1.0),
        }
        after = {
            **before,
            "old template 1": attack(False, 0.0, -2.0),
            "gap-again": attack(seed == 1, 0.3, 0.1),
        }
        (tmp_path / str(seed)).mkdir()
        for name, found in (("policies", policies), ("before", before), ("after", after)):
            (tmp_path / str(seed) / f"{name}.json").write_text(json.dumps({"config": {}, "found": found}))
    return [str(tmp_path / "0"), str(tmp_path / "1")]


def test_attacks_are_sorted_by_kind_and_the_two_trained_ones_are_told_apart():
    names = (
        "search 1",
        "whole text 3",
        "old search 1",
        "old whole text 2",
        "gap",
        "gap-again",
        "template 10",
    )
    kinds = ("search", "whole text", "old", "old", "gap", "gap-again", "template")
    assert tuple(map(kind, names)) == kinds and set(kinds) <= set(KINDS)


def test_the_tables_hold_means_over_seeds_and_each_seeds_count_of_exploits(folders, capsys):
    main(folders)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    rows = {cells[0]: cells[1:] for cells in lines if cells}
    assert rows["no attack"] == ["0.200 ± 0.100", "0.400 ± 0.100"]  # 0.1, 0.3 and 0.3, 0.5
    assert rows["search"] == ["0.500 ± 0.000"] * 2
    assert rows["templates"][:3] == ["1 of 2, 1 of 2", "0.400 ± 0.100", "0.000 ± 0.000"]
    assert rows["another sample (no attack)"][0] == "–"
    assert rows["what fooled it before"] == ["–"] * 3 + ["0 of 1, 0 of 1", "0.000 ± 0.000", "-2.000 ± 0.000"]
    assert rows["a policy trained against this one"][3] == "0 of 1, 1 of 1"


def test_a_missing_or_broken_report_is_one_sentence(folders, tmp_path):
    (tmp_path / "1" / "after.json").write_text("{}")
    for wrong in (folders, [str(tmp_path / "none")], []):
        with pytest.raises(UserError):
            main(wrong)
