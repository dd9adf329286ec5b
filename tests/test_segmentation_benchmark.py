"""tests/benchmarks/segmentation.py: what a row needs is said in one line, before anything is trained."""

import sys

import pytest
from tiny import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import segmentation


def test_a_row_of_another_seed_names_the_row_whose_split_it_takes_over(tmp_path, monkeypatch, capsys):
    words = ["hippocampus", "--rows", "deep, seed 1", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *words])
    with pytest.raises(SystemExit) as stopped:
        segmentation.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("--rows: 'deep, seed 1' takes over the split of the first row; name 'deep' first")
    assert not list(tmp_path.iterdir())
