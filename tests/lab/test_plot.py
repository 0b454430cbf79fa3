"""Pictures of scorecards and of best-of-n tables: what they show, and what cannot be drawn."""

import json
import math
import sys

import pytest

from lab import plot
from nanoalign import UserError

NAN = math.nan


@pytest.fixture
def figures(monkeypatch):
    """matplotlib, with figures left open."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    return plt


@pytest.fixture
def card(tmp_path):
    """The path of a scorecard of two checkpoints of one name."""
    overall = [{"a": [1.0, 0.1], "b": [-2.0, None], "c": [None, None]}, {"a": [3.0, 0.1], "d": [0.5, 0.2]}]
    cards = {f"{i}/x.pt": {"stage": "sft", "overall": one} for i, one in enumerate(overall)}
    (tmp_path / "card.json").write_text(json.dumps({"checkpoints": cards}))
    return str(tmp_path / "card.json")


def test_the_picture_has_a_panel_per_line_and_a_bar_per_checkpoint(card, figures, tmp_path):
    plot.main([card, f"{tmp_path}/new/card.png"])  # two checkpoints of one name stay two
    shown = [axis for axis in figures.gcf().axes if axis.axison]
    assert [axis.get_title() for axis in shown] == ["a", "b", "d"]  # c was never measured
    assert [bar.get_width() for bar in shown[0].patches] == [1.0, 3.0]
    assert shown[0].patches[0].get_y() != shown[0].patches[1].get_y()
    assert (tmp_path / "new" / "card.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_best_of_n_has_a_curve_per_selector(figures, tmp_path):
    (tmp_path / "best.csv").write_text(
        "selector,n,right,error\nmean,1,0.5,0.1\nmean,4,0.5,0.1\norm,1,0.5,0.1\norm,4,0.75,0.2\n"
    )
    plot.main([f"{tmp_path}/best.csv", f"{tmp_path}/best.svg"])
    axes = figures.gcf().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean", "orm"]
    assert axes.containers[1].lines[0].get_xydata().tolist() == [[1.0, 0.5], [4.0, 0.75]]
    assert "<svg" in (tmp_path / "best.svg").read_text()


def test_a_name_that_cannot_be_drawn_is_one_sentence(card, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"card\.txt.*\.png"):
        plot.main([card, f"{tmp_path}/card.txt"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"\.\[plot\]"):
        plot.main([card, f"{tmp_path}/card.svg"])


@pytest.mark.parametrize("name", ["card.json", "best.csv"])
@pytest.mark.parametrize("content", [None, "", "{}", "selector,n\nmean,1"])
def test_what_is_no_result_is_one_sentence(name, content, tmp_path):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        plot.main([f"{tmp_path}/{name}", f"{tmp_path}/x.png"])
    with pytest.raises(UserError, match="and the picture"):
        plot.main([f"{tmp_path}/{name}"])
