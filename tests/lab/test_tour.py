"""The notebook runs from top to bottom, and is kept without what it printed."""

import json
import os

import pytest
from conftest import ROOT

TOUR = ROOT / "docs/tour.ipynb"
CELLS = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_has_no_outputs_and_one_cell_that_installs():
    assert TOUR.stat().st_size < 200_000
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert ["pip" in "".join(cell["source"]) for cell in code].count(True) == 1
    assert not any(word in str(CELLS) for word in ("huggingface", "wget", "curl"))


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[dev]' brings it")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("TOUR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}
    ).execute()
    printed = str([cell.get("outputs") for cell in notebook.cells])
    assert printed.count("<polyline") == 7
    assert all((tmp_path / f"{name}.pt").exists() for name in ("base", "sft", "dpo", "rm", "ppo"))
