"""A claim is judged by its differences: all clearly above zero, one clearly below, or neither."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lab import claims
from lab.claims import CLAIMS, verdict
from lab.evidence import Seed, exact, less, moved, over_seeds, side
from nanoalign import UserError
from nanoalign.world import verdicts


def test_a_figure_is_above_zero_below_or_neither_by_its_interval():
    figures = [(0.3, 0.2), (-0.3, 0.2), (0.2, 0.2), (0.1, 0.2), (0.0, 0.0), (0.001, 0.0)]
    assert list(map(side, figures)) == [1, -1, 0, 0, 0, 1]


def test_the_weakest_of_a_claims_differences_decides():
    good, bad, unclear = (1.0, 0.1), (-1.0, 0.1), (0.1, 0.1)
    assert verdict([good, good]) == "holds here"
    assert verdict([good, unclear]) == "cannot be said"
    assert verdict([good, unclear, bad]) == "does not hold here"


def test_the_interval_over_seeds_is_the_wider_of_two():
    value, half = over_seeds([(0.1, 0.3), (0.1, 0.4)])
    assert (value, half) == (pytest.approx(0.1), pytest.approx(1.96 * 0.25))  # within: √(0.09 + 0.16) / 2
    value, half = over_seeds([(1.0, 0.0), (3.0, 0.0), (5.0, 0.0)])
    assert (value, half) == (pytest.approx(3.0), pytest.approx(4.30 * 2 / 3**0.5))  # between
    assert over_seeds([(0.4, 0.1)]) == (pytest.approx(0.4), pytest.approx(0.196))
    assert side(over_seeds([exact(5.0)])) == 0  # of one seed nothing is known of it


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_of_noise_alone_five_in_a_hundred_intervals_leave_zero_out(seeds):
    drawn = np.random.default_rng(0).normal(size=(4000, seeds))
    outside = np.mean([side(over_seeds(list(map(exact, row)))) != 0 for row in drawn])
    assert abs(outside - 0.05) < 0.012  # 3.5 errors


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
    (tmp_path / "hacking").mkdir()
    (tmp_path / "hacking" / "run.metrics.jsonl").write_text(
        '{"step": 0, "eval_kl": 0.1, "eval_rm": 2.0, "eval_judge": 3.0}\n{"step": 1, "kl": 0.5}\n'
    )
    assert seed.rows("hacking/run", "eval_rm") == [2.0]
    assert seed.curve("run") == [{"kl": 0.1, "proxy": 2.0, "judge": 3.0}]


def test_a_claim_that_was_not_measured_says_so(tmp_path, capsys):
    folder(tmp_path, ".", base=card(-1, 0.2), sft=card(-0.3, 0.5))
    (tmp_path / "claims").mkdir()
    with pytest.raises(KeyError, match="answered"):  # it is there, and is not what it should be
        claims.main([str(tmp_path)])
    (tmp_path / "scorecard.json").unlink()
    claims.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(CLAIMS) + 1
    assert all("not measured" in line for line in lines[2 : 2 + len(CLAIMS)])
    with pytest.raises(UserError, match="name the folders"):
        claims.main([])


def test_a_claim_is_tried_on_the_seeds_that_were_measured_and_names_the_others(tmp_path):
    for name, answered in (("a", 0.3), ("b", 0.4)):
        folder(tmp_path / name, ".", base={"overall": {"answered": [answered, 0.01]}})
    (tmp_path / "c").mkdir()
    seeds = [Seed(tmp_path / name) for name in "abc"]
    told, found = claims.tried(CLAIMS[0], seeds)
    assert "+0.300 ± 1.271" in told  # of 0.4 and 0.2: 12.71 standard errors of a mean of two
    assert f"(without {tmp_path}/c)" in told and found == "cannot be said"
    assert "without" not in claims.tried(CLAIMS[0], seeds[:2])[0]
    assert claims.tried(CLAIMS[0], seeds[1:])[1] == "holds here (one seed)"


class Told:
    """A seed that says what it is told to, and remembers what it was asked."""

    def __init__(self, **told):
        self.told, self.asked, self.agreements = told, set(), {"easy": 0.9, "hard": 0.6}

    def value(self, name, metric):
        self.asked.add((name, metric))
        return self.told.get(f"{name} {metric}", 0.5), 0.01

    def won(self, name):
        return self.value(name, "win rate")

    def accuracy(self, path, part="expected_accuracy"):
        return self.told.get(f"{path} {part}", 0.7), 0.0

    def rows(self, run, metric):
        return self.told.get(f"{run} {metric}", [0.0] * 20)

    def curve(self, run):
        judge = self.told.get(run, [0.0] * 20)
        return [{"kl": float(i), "judge": value} for i, value in enumerate(judge)]

    def cost(self, run, what):
        return self.told.get(f"{run} {what}", 1.0), 0.0

    def best(self, selector, n):
        return self.told.get(f"{selector} {n}", 0.5), 0.01


def tried(text: str, **told) -> list[float]:
    [claim] = [claim for claim in CLAIMS if claim.text.startswith(text)]
    return [test(Told(**told))[0] for test in claim.tests.values()]


MORE_PAIRS = {"claims/rm-eighth": 0.65, "claims/rm-quarter": 0.71, "claims/rm-half": 0.73, "rm.report": 0.74}
RISING, FALLING = [i / 20 for i in range(20)], [1 - abs(i - 6) / 10 for i in range(20)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("PPO beats SFT", {"scoreboard/ppo win rate": 0.6}),
        ("ORPO does more", {"scoreboard/orpo win rate": 0.6}),
        ("β too low", {"claims/dpo-loose win rate": 0.4}),
        ("KTO stands", {"claims/kto-lopsided win rate": 0.6}),
        ("DPO is cheaper", {"scoreboard/ppo seconds": 2.0, "scoreboard/ppo MB": 2.0}),
        ("DPO is more stable", {"claims/ppo-fast win rate": 0.2}),
        ("Under DPO both", {f"scoreboard/dpo logp_{side}": RISING[::-1] for side in ("chosen", "rejected")}),
        ("A critic lowers", {"scoreboard/ppo explained_variance": [0.3] * 20}),
        ("Without the KL penalty", {"hacking/beta-0-long eval_rm": RISING, "beta-0-long": FALLING}),
        ("A length penalty", {"length-long": RISING}),
        ("An ensemble helps", {"ensemble-long": RISING}),
        ("A second round", {"hacking/iterated eval_judge": RISING}),
        ("A process model beats an outcome", {"prm-min 16": 0.6}),
        ("A process model beats the commonest", {f"prm-min {n}": 0.6 for n in (4, 16, 64)}),
        ("More comparisons", {f"{path}.json expected_accuracy": value for path, value in MORE_PAIRS.items()}),
        ("Filtering by agreement", {"claims/rm-agreed.json expected_accuracy": 0.75}),
        ("A reward model's accuracy", {"rm.report.json accuracy": 0.6}),
        ("AI labels do", {"cai/ai win rate": 0.6}),
        ("Critique and revision", {"cai/sl-cai harmful compliance": 0.1}),
        ("Over-refusal rises", {"pareto/share-0.5 over-refusal": 0.7}),
        ("A weak supervisor", {"weak-to-strong/naive eval_accuracy": [0.8]}),
    ],
)  # fmt: skip
def test_a_claim_holds_where_it_was_made_to_and_not_where_all_is_alike(text, told):
    assert min(tried(text, **told)) > 0
    assert min(tried(text)) <= 1e-9


def test_a_judge_that_does_not_fall_does_not_look_as_if_it_fell():
    rng = np.random.default_rng(0)
    flat = [
        tried("Without the KL penalty", **{"beta-0-long": list(row)})[1]
        for row in rng.normal(size=(4000, 20))
    ]
    assert abs(np.mean(flat)) < 3.5 * np.std(flat) / len(flat) ** 0.5
    assert tried("Without the KL penalty", **{"beta-0-long": RISING})[1] <= 0


def test_claims_ask_for_what_scorecards_have_of_models_that_make_knows():
    root, seed = Path(claims.__file__).parent.parent, Told()
    for claim in CLAIMS:
        for test in claim.tests.values():
            test(seed)
    assert {metric for _, metric in seed.asked} <= {*verdicts.METRICS, "win rate", "KL to reference"}
    made = set(re.findall(r"[\w.-]+", (root / "Makefile").read_text() + (root / "lab/lab.mk").read_text()))
    for name, _ in seed.asked:
        stem = name.split("/")[-1]
        assert {stem, f"{stem}.pt", f"claim-{stem}"} & made or {
            "share-",
            stem.removeprefix("share-"),
        } <= made, name


def test_claims_are_different_and_named_by_targets_that_there_are():
    rules = (Path(claims.__file__).with_name("lab.mk")).read_text()
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS) >= 40
    for claim in CLAIMS:
        assert f"\n{claim.how}: " in rules or f" {claim.how}: " in rules or claim.how == "hacking", claim.how
        assert claim.tests
