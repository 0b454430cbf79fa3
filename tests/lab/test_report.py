"""The report: its formulas are the project's, its bands tell a usual run from another, its text is text, and
what a folder lacks is said."""

import itertools
import json
import math
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT
from report_formulas import PYTHON
from report_run import HOSTILE, metrics, write_run

import train_dpo
from lab import bands
from lab.report import Config, main
from lab.sections import curves, hacked, pipeline
from lab.sections.charts import ticks
from lab.sections.explorers import enumerated
from lab.sections.formulas import GAE, LOSSES, Slider, explorers
from lab.sections.meanings import FIRST, meaning
from lab.sections.page import Html, data, el, said
from lab.sections.runs import STAGES, read_runs
from nanoalign import UserError
from nanoalign.checkpoint import save
from nanoalign.model import GPT, GPTConfig, parameter_count
from nanoalign.tokenizer import get_tokenizer

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(not NODE, reason="no node, which runs the page's script outside a page")

# ------------------------------------------------------------------------------------------- the formulas


def grid(explorer) -> list[dict]:
    """Both ends, the start and two points between of every slider, with every choice; thinned to 700."""
    axes = []
    for control in explorer.controls:
        if isinstance(control, Slider):
            low, high = control.low, control.high
            values = [low, low + 0.31 * (high - low), control.value, low + 0.77 * (high - low), high]
        else:
            values = list(control.options)
        axes.append([(control.name, value) for value in dict.fromkeys(values)])
    cases = [dict(case) for case in itertools.product(*axes)]
    return cases[:: -(-len(cases) // 700)]


def in_node(cases: list[tuple[str, dict]]) -> list[dict]:
    """What report.js makes of (explorer, values)."""
    code = (
        "const { explorers } = require(process.argv[1]);"
        "const cases = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(cases.map(([name, values]) => explorers[name](values))));"
    )
    command = [NODE, "-e", code, str(ROOT / "lab/report.js")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_every_explorer_computes_what_the_projects_own_functions_do_on_a_grid(double):
    shown = explorers(enumerated())
    assert {explorer.name for explorer in shown} == PYTHON.keys()
    cases = [(e.name, {**case, **e.arrays}) for e in shown for case in grid(e)]
    worst = dict.fromkeys(PYTHON, 0.0)
    for (name, values), found in zip(cases, in_node(cases)):
        for key, value in PYTHON[name](**values).items():
            both = (value, found[key]) if isinstance(value, list) else ([value], [found[key]])
            worst[name] = max(worst[name], *(abs(a - b) / max(1, abs(a)) for a, b in zip(*both)))
    assert max(worst.values()) < 1e-9, worst
    assert len(cases) > 2000


@needs_node
def test_every_output_that_a_section_names_is_one_that_the_script_returns(double):
    shown = explorers(enumerated())
    cases = [(e.name, {**grid(e)[0], **e.arrays}) for e in shown]
    for explorer, found in zip(shown, in_node(cases)):
        plotted = [output for output, _ in (explorer.plot or {}).get("lines", [])]
        assert {*explorer.outputs, *plotted} <= found.keys()
    assert set(train_dpo.LOSSES) == set(LOSSES) and len(GAE["rewards"]) == len(GAE["values"])


# ------------------------------------------------------------------------------------------------ the bands


def test_a_band_holds_a_run_like_its_seeds_and_not_one_that_is_elsewhere():
    steps = [*range(1, 40)]
    noise = torch.randn(4, len(steps), generator=torch.Generator().manual_seed(0)) * 0.1
    seeds = [[10 / step + float(x) for step, x in zip(steps, row)] for row in noise]
    own = bands.band([(steps, values) for values in seeds[:3]])
    assert bands.inside(own, steps, seeds[3]) > 0.85
    assert bands.inside(own, steps, [x + 0.6 for x in seeds[3]]) < 0.2
    assert bands.inside(own, [100, 200], [1.0, 1.0]) is None
    assert [own["step"][0], own["step"][-1]] == [1, 39] and len(own["step"]) <= bands.MOST + 1


def test_seeds_that_end_at_other_steps_end_together():
    assert bands.aligned([([1, 5, 9], [1, 2, 3]), ([1, 5, 11], [4, 5, 6])]) == (
        [1, 5, 9],
        [(1, 4), (2, 5), (3, 6)],
    )
    assert bands.band([([1, 2], [1.0, math.nan]), ([1, 2], [1.0, 2.0])]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_a_run_along_the_band_is_as_usual_one_beside_it_is_not_and_other_settings_get_no_verdict(tmp_path):
    (tmp_path / "scoreboard").mkdir()
    metrics(tmp_path, "dpo")
    metrics(tmp_path, "kto", off=3.0)
    metrics(tmp_path, "rm")
    runs = read_runs(tmp_path)
    runs["rm"].rows[0]["config"] = {**runs["rm"].rows[0]["config"], "lr": 0.77}
    assert curves.against_band(runs["dpo"])[0] == "ok"
    assert curves.against_band(runs["kto"])[0] == "outside"
    kind, sentence = curves.against_band(runs["rm"])
    assert kind == "none" and "lr 0.77, not 0.0005" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_every_metric_of_a_band_has_its_meaning(name):
    band = bands.read_band(name)
    assert band["seeds"] >= 3
    unknown = [
        m for m in band["metrics"] if not meaning(name, m.removesuffix("_error") if m != "kl_error" else m)[0]
    ]
    assert unknown == []
    shown = {metric.removeprefix("eval_") for metric in band["metrics"]}
    assert set(FIRST[name]) <= shown


def test_axes_have_round_ticks():
    assert ticks(0, 1) == [0.0, 0.5, 1.0] and ticks(-6, 6) == [-5.0, 0.0, 5.0]
    assert ticks(0.693, 0.694) and all(0.693 <= t <= 0.694 for t in ticks(0.693, 0.694))


# --------------------------------------------------------------------------------------------------- text


def test_text_is_escaped_unless_it_is_markup_already():
    assert (
        el("p", "<b>", Html("<i>"), class_="x", hidden=False, id='"')
        == '<p class="x" id="&quot;">&lt;b&gt;<i></p>'
    )
    shown = said(HOSTILE)
    assert "<script" not in shown and "<img" not in shown and "\u202e" not in shown and "\u001b" not in shown
    assert shown.startswith('<bdi dir="auto"') and "&amp;amp;" in shown


def test_data_for_the_script_cannot_end_its_element():
    value = {"a": "</script><script>1</script>", "b": ["<!--", "\u2028"]}
    shown = data(value)
    inside = shown.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in inside and json.loads(inside) == value


# ------------------------------------------------------------------------------------------------- the page


def test_a_folder_with_next_to_nothing_in_it_says_of_every_part_what_makes_it(tmp_path, capsys):
    (tmp_path / "base.metrics.jsonl").write_text("")
    main(Config(run=str(tmp_path)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for command in ("make demo", "make hacking", "make cai"):
        assert f"<code>{command}</code> makes it." in page
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    for key in ("summary", "pipeline", "curves", "samples", "tokens", "hacking", "explorers", "comparison"):
        assert f'id="{key}"' in page


def test_a_folder_without_any_run_or_none_at_all_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        main(Config(run=str(tmp_path)))
    with pytest.raises(UserError, match="is no folder"):
        main(Config(run=str(tmp_path / "none")))


def test_damaged_files_do_not_end_the_report(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scorecard.json").write_text("{")
    (copy / "dpo.metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "los')
    main(Config(run=str(copy), prompts=1))
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "scorecard.json" in page and page.count("<h2>") == 9


def test_a_metric_that_was_never_a_number_is_said_to_be_none(tmp_path):
    metrics(tmp_path, "dpo")
    shown = curves.one(read_runs(tmp_path)["dpo"])  # its metric "never" is NaN
    assert shown.count("Never a number.") == 1 and ">never " in shown


def test_the_page_stands_alone_and_holds_no_text_as_markup(folder):
    main(Config(run=str(folder)))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000
    assert (
        "window.owned = 1&lt;/script&gt;" in page
        and "<script>window.owned" not in page
        and "<img" not in page
    )
    assert page.count("<script>") == 1 and "http://www.w3.org/2000/svg" in page
    assert not [
        word
        for word in ("src=", "@import", "url(http", 'href="http', "fetch(")
        if word in page.replace("src=x", "")
    ]


@pytest.mark.parametrize("end, found", [(0.6, True), (0.2, False)])
def test_a_run_is_hacked_where_the_judge_fell_while_the_proxy_rose(end, found):
    looks = [(0.3, 0.1, 0.0), (0.5, 0.6, 0.2), (end, 0.1, 0.9)]
    points = [dict(zip(("proxy", "judge", "kl"), look)) for look in looks]
    text = str(hacked.panel(points, "GRPO"))
    assert "has lost 0.5" in text and (": hacked" in text) == found


def test_parameters_that_models_share_are_counted_once(tmp_path):
    for tied in (True, False):
        model = GPT(GPTConfig(2048, 16, 1, 8, 1, tied=tied))
        more = {"config": train_dpo.Config(), "stage": "sft", "step": 1}
        save(tmp_path / "x.pt", model, tokenizer=get_tokenizer("world"), **more)
        assert pipeline.parameters(tmp_path / "x.pt") == parameter_count(model)
