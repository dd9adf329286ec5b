"""The tutorial runs as it stands, and its stored outputs are whole."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "ldm3d" / "tutorial.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_every_cell_runs_in_order(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()) or pyplot.close())
    source = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    for full, short in (("STEPS = 600", "STEPS = 3"), ("steps=20", "steps=2"), ("range(160)", "range(152)")):
        assert full in source
        source = source.replace(full, short)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(source, space)
    assert len(shown) == 4
    assert space["images"].shape == (8, 1, 64, 56)
    assert space["images"].isfinite().all()
    assert space["of_class_1"].shape == (4, 1, 64, 56)
    assert (tmp_path / "runs/ldm-heads/best.pt").exists()


def test_the_stored_outputs_hold_pictures_and_no_error():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output["output_type"] == "error"]
