"""Do two results on the same cases differ by more than chance? The paired test of two reports.

    python -m ldm3d.evaluation difference FIRST SECOND

FIRST and SECOND are folders with a cases.csv: of sample.py --reference, or of another evaluation. Cases are
paired by name. Some cases are hard for every method, so that scores spread widely. The difference between two
methods on one case spreads much less, and only the differences are looked at. For every score that both
tables have:

    difference      mean over cases of (second - first), with its 95 % bootstrap interval
    p               of all ways to exchange FIRST and SECOND in some of the cases, the share whose mean
                    difference is as far from 0 as the one found, or further: the sign-flip test of Fisher
                    1935 (The design of experiments, section 21). Between equals, names would not matter
    second is       better in this share of the cases: higher, or lower where the score is an error; equal
                    scores count half. Of scores that are neither good nor bad, such as sharpness: higher

Example: 5 cases all have a higher Dice with SECOND. There are 2^5 = 32 ways to exchange names. Only two are
as extreme: no exchange, and that of all. So p = 2 / 32 = 0.06: five cases cannot show that SECOND is better.

Cases of one subject are alike: where report.json names the subjects, a subject is drawn, and exchanged, with
all of its cases. The more scores are looked at, the sooner one of them has a low p: choose the score first.

The new folder holds cases.csv (the differences) and report.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError, at_least, read_json, to_dict
from ..data.cases import read_csv
from ..engine.distributed import print0
from ..engine.logger import plural
from .pairs import LOWER_IS_BETTER
from .results import Rows, check_out, new_folder, table, write_csv, write_report
from .statistics import bootstrap_interval, interval_words, sign_flip_test

# Scores by words of their names: dice_2, psnr_fitted. Of all others no direction is the better one
ERRORS = {*LOWER_IS_BETTER, "hd95", "ece", "brier", "nll", "ged"}
GOOD = {"dice", "iou", "psnr", "ssim", "precision", "sensitivity"}
FEW = 5  # subjects, with which no difference has a p below 0.05


@dataclass(frozen=True)
class DifferenceConfig:
    resamples: int = 2000  # of the bootstrap
    exchanges: int = 20000  # drawn for p, if there are more subjects than 16; else all are taken
    out: str | None = None  # new folder for the report; none = difference-001 (-002, ...) in SECOND

    def __post_init__(self) -> None:
        at_least(self, 1, "resamples", "exchanges")


def read_scores(location: str, key: str) -> tuple[Rows, dict[str, str]]:
    """({case: {score: number}}, {case: subject}, empty if unknown) of a folder of results. An empty cell is
    nan, as is a word."""
    path = Path(location) / "cases.csv"
    if not path.is_file():
        raise InputError(f"{key}: {location}: holds no cases.csv; give a folder of results with scores")
    rows: Rows = {}
    for line in read_csv(path, ["case"]):
        name = line.pop("case")
        if name in rows:
            raise InputError(f"{key}: {path}: expected every case once, got {name!r} again")
        rows[name] = {column: _number(cell) for column, cell in line.items()}
    report = Path(location) / "report.json"
    subjects = read_json(report).get("subjects") if report.is_file() else None
    return rows, subjects if isinstance(subjects, dict) else {}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def better(column: str) -> str | None:
    """Which of two scores of this name is the better one, "higher" or "lower"; None: neither."""
    words = set(column.split("_"))
    if words & {"votes", "raters"}:  # how alike these are among themselves
        return None
    if words & ERRORS or column in ("retention_area", "retention_ratio"):
        return "lower"
    return "higher" if words & GOOD or column == "error_correlation" else None


def differences_of(first: Rows, second: Rows) -> Rows:
    """{case: {score: second - first}} of the cases and scores that both have."""
    shared = [c for c in next(iter(second.values())) if c in next(iter(first.values()))]
    columns = [c for c in shared if c != "seconds"]  # how long a case took is no score
    names = [name for name in second if name in first]
    return {name: {c: second[name][c] - first[name][c] for c in columns} for name in names}


def summary_of(
    first: Rows, second: Rows, subjects: dict[str, str], config: DifferenceConfig
) -> dict[str, dict[str, Any]]:
    """{score: cases, means of both, difference, low, high, p, second_higher, better (see there)}."""
    rows, found = differences_of(first, second), {}
    for column in next(iter(rows.values())):
        values = np.array([row[column] for row in rows.values()])
        kept = np.isfinite(values)
        names, values = [name for name, fine in zip(rows, kept, strict=True) if fine], values[kept]
        if not len(values):
            continue
        groups = np.array([str(subjects.get(name, name)) for name in names])
        low, high = bootstrap_interval(values, config.resamples, groups)
        found[column] = {
            "cases": len(values),
            "first": float(np.mean([first[name][column] for name in names])),
            "second": float(np.mean([second[name][column] for name in names])),
            "difference": float(values.mean()),
            "low": low,
            "high": high,
            "p": sign_flip_test(values, groups, config.exchanges),
            "second_higher": float(((values > 0) + (values == 0) / 2).mean()),
            "better": better(column),
        }
    return found


def second_is(m: dict[str, Any]) -> str:
    """In how many of the cases SECOND is better, or higher, in words. m: of a score, from `summary_of`."""
    share = 1 - m["second_higher"] if m["better"] == "lower" else m["second_higher"]
    return f"{'better' if m['better'] else 'higher'} in {share:.3g}"


def compare_results(config: DifferenceConfig, first: str, second: str) -> Path:
    """Compare two folders of results case by case and write the report; returns its folder."""
    (rows, own), (others, theirs) = read_scores(first, "FIRST"), read_scores(second, "SECOND")
    shared = rows.keys() & others.keys()
    if not shared:
        raise InputError(f"SECOND: {second} has none of the cases of {first}")
    if alone := (rows.keys() | others.keys()) - shared:
        print0(f"note: {plural(len(alone), 'case')} of one table alone, such as {min(alone)}, left out")
    rows, others = ({name: part[name] for name in part if name in shared} for part in (rows, others))
    check_out(config.out)
    subjects = theirs | own
    metrics = summary_of(rows, others, subjects, config)
    if not metrics:
        raise InputError(f"SECOND: {second} has none of the scores of {first}")
    folder = new_folder(Path(second), config.out, "difference")
    write_csv(folder / "cases.csv", differences_of(rows, others))
    report = {**to_dict(config), "first": first, "second": second, "cases": len(shared)}
    report |= {"subjects": len({subjects.get(name, name) for name in shared})}
    report |= {"interval": interval_words(config.resamples), "metrics": metrics}
    write_report(folder / "report.json", report)
    columns = ("first", "second", "difference", "low", "high", "p")
    lines = [[name, *(m[c] for c in columns), second_is(m), m["cases"]] for name, m in metrics.items()]
    print(table([["", *columns, "second is", "cases"], *lines]))
    if (num := report["subjects"]) <= FEW:
        print(
            f"note: p cannot be below {2.0 ** (1 - num):g} with {plural(num, 'subject')}, whatever the scores"
        )
    print(f"{plural(len(shared), 'case')} of {plural(report['subjects'], 'subject')}: {folder}")
    return folder
