"""A folder of results holds what was measured: numbers survive the CSV and the JSON, and the worst cases are
those shown."""

import csv
import json
import math

import numpy as np
import pytest

from ldm3d.config import InputError
from ldm3d.evaluation.results import WorstPictures, finite, table, with_interval, write_csv, write_report


def test_a_table_of_cases_is_read_back_as_it_was(tmp_path):
    rows = {"a, b": {"psnr": 1 / 3, "n": None}, "c": {"psnr": math.inf, "n": 2}}
    write_csv(tmp_path / "full.csv", rows)
    first, second = csv.DictReader((tmp_path / "full.csv").open())
    assert first == {"case": "a, b", "psnr": repr(1 / 3), "n": ""}
    assert second == {"case": "c", "psnr": "inf", "n": "2"}
    write_csv(tmp_path / "short.csv", [{"x": 1 / 3, "n": 1234567}], digits=3)
    assert (tmp_path / "short.csv").read_text().splitlines() == ["x,n", "0.333,1234567"]
    write_csv(tmp_path / "none.csv", {})
    assert (tmp_path / "none.csv").read_text().splitlines() == ["case"]


def test_a_report_has_null_where_json_has_no_word(tmp_path):
    write_report(tmp_path / "r.json", {"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], "c": "x"})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1.0, None, [None, {"b": None}]], "c": "x"}
    assert finite(0.0) == 0.0
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "nowhere" / "r.json", {})


def test_a_table_is_aligned_or_markdown():
    rows = [("", "x"), ("long", 1.23456)]
    assert table(rows).splitlines() == ["          x", "long  1.235"]
    assert table(rows, markdown=True).splitlines() == ["|  | x |", "|---|---|", "| long | 1.235 |"]
    assert with_interval(0.91249, 0.8, 1, digits=2) == "0.91 [0.80, 1.00]"


def test_the_pictures_kept_are_those_of_the_lowest_scores_and_the_lowest_comes_first():
    worst = WorstPictures(3)
    for case, score in {"b": 5.0, "e": 1.0, "a": math.nan, "d": 3.0, "c": 3.0, "f": 9.0}.items():
        worst.add(case, score, [np.full((2, 2), score)])
    sheet = worst.sheet(lambda case, score: f"{case}: {score:g}")
    assert list(sheet) == ["e: 1", "c: 3", "d: 3"]
    assert sheet["c: 3"][0][0, 0] == 3
