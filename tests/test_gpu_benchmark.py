"""tests/benchmarks/gpu.py: all parts can be tried without a GPU, and figures are kept."""

import json
import sys

import pytest
from tiny import ROOT, start

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import gpu


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parity
def test_every_part_runs_tiny_on_a_cpu_and_writes_figures(tmp_path, real_data, monkeypatch):
    monkeypatch.setenv("LDM3D_DATA", str(real_data))
    script = ROOT / "tests" / "benchmarks" / "gpu.py"
    process = start(script, "--device", "cpu", "--tiny", "--work", tmp_path)
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    rows = rows_of(tmp_path / "figures.jsonl")
    for part in gpu.PARTS:
        assert [row for row in rows if row["part"] == part and row.get("done")], part
        assert [row for row in rows if row["part"] == part and not row.get("done")], f"{part}: no figures"


def test_a_failing_part_keeps_its_figures_and_the_next_one_is_measured(tmp_path, monkeypatch, capsys):
    def breaks(setup):
        yield {"value": 1}
        raise RuntimeError("the GPU is gone")

    parts = {
        "breaks": (1.0, breaks),
        "works": (1.0, lambda setup: iter([{"value": 2}])),
        "long": (9.0, breaks),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    flags = ["--device", "cpu", "--work", str(tmp_path), "--minutes", "5"]
    with pytest.raises(SystemExit, match="failed: breaks"):
        gpu.main(flags)
    rows = rows_of(tmp_path / "figures.jsonl")
    assert [(row["part"], row.get("value")) for row in rows if "value" in row] == [
        ("breaks", 1),
        ("works", 2),
    ]
    assert "the GPU is gone" in rows[1]["failed"]
    assert "long: may take 9 minutes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(flags)  # only what has no figures yet: not "works"
    assert [row["part"] for row in rows_of(tmp_path / "figures.jsonl")[len(rows) :]] == ["breaks", "breaks"]
