"""Two results on the same cases: paired by name, differences with intervals and p, subjects as a whole."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ldm3d.evaluation.__main__ import main
from ldm3d.evaluation.statistics import bootstrap_interval, sign_flip_test


@pytest.fixture
def results(tmp_path):
    """results(name, {case: cells}, columns, subjects): a folder of results."""

    def make(name, cells, columns=("dice", "hd95"), subjects=None):
        folder = tmp_path / name
        folder.mkdir()
        lines = [",".join(map(str, (case, *row))) for case, row in cells.items()]
        (folder / "cases.csv").write_text("\n".join([",".join(("case", *columns)), *lines]) + "\n")
        (folder / "report.json").write_text(json.dumps({"subjects": subjects} if subjects else {}))
        return str(folder)

    return make


def report_of(first, second, out, *flags):
    main(["difference", first, second, "--out", str(out), *flags])
    return json.loads((out / "report.json").read_text())


def test_differences_are_taken_case_by_case_with_subjects_as_a_whole(results, tmp_path, capsys):
    rng = np.random.default_rng(0)
    a, step = rng.uniform(0.2, 0.9, 12), rng.normal(0.02, 0.02, 12)
    names = [f"c{k:02d}" for k in range(12)]
    subjects = {name: f"s{k // 2}" for k, name in enumerate(names)}
    first = results("first", {n: (v, 1) for n, v in zip(names, a, strict=True)})
    second = {n: (v, 2) for n, v in zip(names, a + step, strict=True)}
    second = results("second", dict(reversed(second.items())), subjects=subjects)
    report = report_of(first, second, tmp_path / "out", "--resamples", "300")
    found, groups = report["metrics"]["dice"], [subjects[name] for name in names]
    assert (report["cases"], report["subjects"], found["cases"]) == (12, 6, 12)
    assert found["first"] == pytest.approx(a.mean())
    assert found["difference"] == pytest.approx(step.mean())
    assert [found["low"], found["high"]] == pytest.approx(bootstrap_interval(step, 300, groups))
    assert found["p"] == sign_flip_test(step, groups) != sign_flip_test(step)
    assert found["second_higher"] == (step > 0).mean()
    assert report["metrics"]["hd95"]["p"] == 2 / 2**6
    said = capsys.readouterr().out
    assert "12 cases of 6 subjects" in said
    assert "note: " not in said
    lines = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert lines[0] == "case,dice,hd95"
    assert float(lines[1].split(",")[1]) == pytest.approx(step[-1])


def test_the_worked_example_of_five_cases(results, tmp_path, capsys):
    first = results("first", {k: (0.8, 1) for k in range(5)})
    second = results("second", {k: (0.81 + k / 100, 1) for k in range(5)})
    found = report_of(first, second, tmp_path / "out")["metrics"]
    assert found["dice"]["p"] == 2 / 32
    assert "note: p cannot be below 0.0625 with 5 subjects, whatever the scores" in capsys.readouterr().out
    assert (found["hd95"]["p"], found["hd95"]["second_higher"]) == (1, 0.5)


def test_an_error_that_is_lower_is_better_and_of_other_scores_the_higher_is_named(results, tmp_path, capsys):
    columns = ("dice_1", "hd95_1", "mae", "retention_ratio", "raters_dice", "sharpness")
    first = results("first", {k: (0.5, 2, 2, 2, 2, 2) for k in range(4)}, columns)
    second = results("second", {k: (0.6, 1, 1, 1, 1, 3 if k else 1) for k in range(4)}, columns)
    found = report_of(first, second, tmp_path / "out")["metrics"]
    assert [found[name]["better"] for name in columns] == ["higher", "lower", "lower", "lower", None, None]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in columns[:4]:
        assert "better in 1" in lines[name]
    assert "higher in 0 " in lines["raters_dice"]
    assert "higher in 0.75 " in lines["sharpness"]


def test_cells_without_number_and_cases_of_one_table_are_left_out(results, tmp_path, capsys):
    first = results("first", {"a": (0.5, ""), "b": (0.6, 3), "c": (0.7, 4)}, ("dice", "hd95"))
    second = results("second", {"a": (0.6, 1, "x"), "b": (0.8, 5, "y")}, ("dice", "hd95", "who"))
    report = report_of(first, second, tmp_path / "out")
    assert set(report["metrics"]) == {"dice", "hd95"}
    assert (report["metrics"]["dice"]["cases"], report["metrics"]["hd95"]["cases"]) == (2, 1)
    assert report["metrics"]["hd95"]["low"] is None
    assert "1 case of one table alone, such as c, left out" in capsys.readouterr().out


def test_more_than_sixteen_cases_are_exchanged_as_often_as_asked(results, tmp_path):
    first = results("first", {k: (0.8, 1) for k in range(17)})
    second = results("second", {k: (0.9, 1) for k in range(17)})
    found = report_of(first, second, tmp_path / "out", "--exchanges", "49")["metrics"]["dice"]
    assert math.isclose(found["p"], 1 / 50)


def test_mistakes_are_named(results, tmp_path, mistake):
    first, other = results("first", {"a": (1, 2)}), results("other", {"b": (1, 2)})
    named = results("named", {"a": (1,)}, ("iou",))
    twice, binary = results("twice", {"a": (1, 2)}), results("binary", {})
    Path(binary, "cases.csv").write_bytes(b"\xff\xfe")
    with open(f"{twice}/cases.csv", "a") as file:
        file.write("a,3,4\n")
    lines = {
        str(tmp_path): "holds no cases.csv; give a folder of results with scores",
        other: "has none of the cases of",
        named: "has none of the scores of",
        twice: "expected every case once, got 'a' again",
        binary: "cases.csv: cannot be read as a CSV",
    }
    for second, line in lines.items():
        assert line in mistake(main, ["difference", first, second])


def test_how_long_cases_took_is_no_score(results, tmp_path, mistake):
    first = results("first", {"a": (0.5, 1.0)}, ("dice", "seconds"))
    second = results("second", {"a": (2.0,)}, ("seconds",))
    assert "has none of the scores of" in mistake(main, ["difference", first, second])
