"""The pages about the methods say what is so, and what they get wrong is named."""

import json
import re

import pytest
from conftest import ROOT
from runs import STAGES, rows

from lab import curves, docs_check, sweeps
from lab.docs_check import PAGES, problems
from nanoalign import UserError

METHODS = sorted((ROOT / "docs/methods").glob("*.md"))
DPO = (ROOT / "docs/methods/dpo.md").read_text(encoding="utf-8")
CLOCK = {
    "step",
    "lr",
    "tokens",
    "tokens_per_s",
    "elapsed",
    "peak_mb",
    "generation_s",
    "scoring_s",
    "update_s",
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def explained(page: str, header: str) -> set[str]:
    """The names in the first column of a page's tables with that header."""
    found = set()
    for table in re.findall(rf"^\| {header} \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE):
        for row in table.splitlines():
            found |= {*re.findall(r"`([\w-]+)`", row.split("|")[1])}
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_refers_to_what_there_is_and_quotes_what_stands_there(page):
    assert problems(page.read_text(encoding="utf-8"), page.parent) == []


def test_every_test_that_any_page_names_is_there():
    pages = (ROOT / "docs").rglob("*.md")
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert len(named) > 100 and named <= docs_check.tests()


def test_every_method_has_a_page():
    methods = {"sft", "rm", "ppo", "grpo", "dpo", "kto", "orpo", "prm", "best-of-n", "cai"}
    assert {page.stem for page in METHODS} == methods == curves.PANELS.keys() == sweeps.SWEEPS.keys()
    for heading in ("The idea", "The equation", "Implementation details", "What is", "The expected curve"):
        assert all(f"\n## {heading}" in page.read_text(encoding="utf-8") for page in METHODS)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "pretrain"])
def test_exactly_the_metrics_that_a_run_logs_are_explained(stage, job, request):
    fewer = {"eval_prompts": 1} if stage in ("ppo", "grpo") else {}
    fewer |= {"data": request.getfixturevalue("pairs")} if stage == "kto" else {}  # thumbs of both kinds
    script, config = job(stage, steps=2, eval_every=2, **fewer)
    script.main(config)
    logged = {name for row in rows(config.out) for name in row} | {"tokens_per_s", "elapsed", "peak_mb"}
    logged |= {"generation_s", "scoring_s", "update_s"} if stage in ("ppo", "grpo") else set()
    assert explained((ROOT / f"docs/methods/{stage}.md").read_text(encoding="utf-8"), "metric") == logged


def test_the_bands_are_of_metrics_that_are_explained_and_every_selector_is():
    for page in METHODS:
        text, drawn = page.read_text(encoding="utf-8"), set(curves.read(page.stem))
        if page.stem == "best-of-n":
            assert explained(text, "selector") == drawn | {"beam", "dvts"}
        elif page.stem != "cai":
            assert explained(text, "metric") - CLOCK == drawn
    trail = ROOT.joinpath("critique.py").read_text(encoding="utf-8")
    fields = explained((ROOT / "docs/methods/cai.md").read_text(encoding="utf-8"), "field")
    assert len(fields) == 5 and all(f'"{field}"' in trail for field in fields)


FAULTS = [
    ("`train_dpo.py:dpo_loss`", "`train_dpo.py:dpo_losses`", "no train_dpo.py:dpo_losses"),
    ("kept, flipped = -F.logsigmoid(beta * h)", "kept, flipped = F.logsigmoid(beta * h)", "not in train_dpo"),
    ("`test_the_step_0_check_knows_where_each_loss_starts`", "`test_nothing`", "no test test_nothing"),
    ("`--beta` (default `0.0`)", "`--beta` (default `0.1`)", "--beta is 0.0 by default, not 0.1"),
    ("`--lr` by factors", "`--rate` by factors", "no flag --rate"),
    ("../../train_dpo.py", "../../train_dop.py", "no file ../../train_dop.py"),
    ("Only a difference", "Some 73 % of a difference", "by no command"),
    ("it is flat", "it is flat, 0.55", "by no command"),
    ("SimPO's `2.0`", "SimPO's `2.7`", "`2.7` is neither"),
    ("it is flat", "it is 0.56 <!-- sweeps: dpo | --beta 3 | win rate -->", "0.56 is not sweeps"),
    ("| `--beta 3` | 0.", "| `--beta 3` | 1.", "a table is not what its command prints"),
    ("## The paper\n", "## The paper\n" + "\n" * 20, "lines, more than 150"),
]  # fmt: skip


@pytest.mark.parametrize("was, becomes, said", FAULTS, ids=[said for *_, said in FAULTS])
def test_what_a_page_gets_wrong_is_named(was, becomes, said):
    page = DPO.replace("A comparison needs only a difference", "Only a difference")
    assert was in page and problems(page) == []
    assert said in "; ".join(problems(page.replace(was, becomes, 1)))


def test_a_figure_is_right_where_it_is_the_files_own():
    told = json.loads(sweeps.FIGURES.read_text(encoding="utf-8"))["dpo"]["--beta 3"]["win rate"]
    assert problems(DPO.replace("it is flat", f"{told} <!-- sweeps: dpo | --beta 3 | win rate -->")) == []


def test_a_faulty_page_ends_the_command_with_all_its_faults(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("Nothing.\n")
    docs_check.main([str(page)])
    page.write_text("`test_nothing` wins 61.3 % of `--nothing`.\n")
    with pytest.raises(UserError, match=r"no test test_nothing.*no flag --nothing.*by no command"):
        docs_check.main([str(page)])


def test_a_band_is_the_least_the_mean_and_the_largest_of_the_runs(tmp_path):
    for i, name in enumerate("ab"):
        lines = [
            {"event": "start"},
            *({"step": s, "loss": s + i, "tokens": 1, f"own_{i}": 0} for s in (1, 3)),
        ]
        lines.append({"step": 4 + i, "eval_loss": 9.0 + i})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = curves.of_runs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert found == {"loss": {"step": [1, 3], "low": [1, 3], "mean": [1.5, 3.5], "high": [2, 4]}}
    assert curves.thinned([*range(1000)])[::35] == [0, 999] and curves.thinned([7]) == [7]


def test_a_curve_goes_from_its_first_to_its_last_point_inside_its_frame():
    band = {"step": [0, 10], "low": [0.0, 1.0], "mean": [1.0, 2.0], "high": [2.0, 3.0]}
    drawn = curves.panel({"a": band}, ["a"], 100)
    [line] = re.findall(r'polyline points="([^"]*)"', drawn)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert (x1, x2) == (142, 292) and y1 - y2 == pytest.approx((curves.HIGH - 52) / 3, abs=0.1)
    for method in curves.PANELS:
        assert (ROOT / f"docs/methods/{method}.svg").read_text(encoding="utf-8") == curves.picture(method)


def test_a_sweep_says_how_many_seeds_it_is_of_and_what_to_compare_one_seed_with(tmp_path):
    for seed, value in ((0, 0.5), (1, 0.7)):
        folder = tmp_path / f"seed{seed}"
        (folder / "sweeps").mkdir(parents=True)
        (folder / "sft.metrics.jsonl").write_text(f'{{"step": 1, "eval_loss": {value}}}\n')
    (tmp_path / "seed0/sweeps/sft-slow.metrics.jsonl").write_text('{"step": 1, "eval_loss": 0.9}\n')
    found = sweeps.measured([tmp_path / "seed0", tmp_path / "seed1"])["sft"]
    loss = {what: (row["held-out loss"], row["seeds"]) for what, row in found.items()}
    assert loss == {
        "as in the demo": ("0.600 ± 0.100", "2"),
        "as in the demo (seed0 alone)": ("0.500", "1"),
        "--lr 1.5e-4": ("0.900", "1"),
    }


def test_a_folder_adds_the_rows_that_are_missing_and_its_own_first_one(tmp_path):
    for name, value in (("sft", 0.5), ("sweeps/sft-slow", 0.9), ("sweeps/sft-fast", 0.8)):
        path = tmp_path / f"demo/{name}.metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"step": 1, "eval_loss": {value}}}\n')
    have = {"as in the demo": {"held-out loss": "0.6"}, "--lr 1.5e-4": {"held-out loss": "0.7"}}
    found = sweeps.added({"sft": have}, tmp_path / "demo")["sft"]
    assert {what: row["held-out loss"] for what, row in found.items()} == {
        "as in the demo": "0.6",
        "as in the demo (demo alone)": "0.500",
        "--lr 1.5e-3": "0.800",
        "--lr 1.5e-4": "0.7",
    }
    assert [*found][:3] == ["as in the demo", "as in the demo (demo alone)", "--lr 1.5e-3"]
