"""What every evaluation does with its numbers: intervals, outliers, a table, a JSON file, a new folder to
hold them.

Mean of independent cases: percentile bootstrap (Efron & Tibshirani 1993, chapter 13). Statistics of whole
sets (distances of distributions, shares of neighbours) cannot be bootstrapped so: a case drawn twice is its
own nearest neighbour. For them half of the cases is drawn without replacement, again and again. The
variance of a mean over half of n cases, drawn so, is (s^2 / (n / 2)) (1 - 1/2) = s^2 / n, that of the mean
over all, so the spread needs no scaling (Politis, Romano & Wolf 1999, Subsampling, chapter 2). It is laid
around the value of the whole sets, since such statistics depend on the number of cases.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError
from ..engine.checkpoint import write_text
from ..engine.distributed import is_main, share

Rows = dict[str, dict[str, Any]]  # case -> column -> value


# --- intervals ----------------------------------------------------------------------------------------------


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values (n,), each mean of n drawn with replacement."""
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def half_sample_intervals(
    statistic: Callable[..., dict[str, float]], counts: Sequence[int], resamples: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{name: {"value", "low", "high"}} of `statistic`, which gets the indices
    of the cases taken of each set and returns {name: value}.

    counts: cases in each set. 95 % intervals; nan where a set has fewer than four cases to be halved.
    """
    whole = statistic(*(np.arange(n) for n in counts))
    low, high = dict.fromkeys(whole, math.nan), dict.fromkeys(whole, math.nan)
    if min(counts) >= 4:
        draw = np.random.default_rng(seed)
        halves = [[np.sort(draw.permutation(n)[: n // 2]) for n in counts] for _ in range(resamples)]
        replicates = [statistic(*half) for half in halves]
        for name, value in whole.items():
            values = np.array([replicate[name] for replicate in replicates])
            values = values[np.isfinite(values)]
            if len(values):
                ends = np.percentile(values - values.mean(), [97.5, 2.5])
                low[name], high[name] = (float(value - end) for end in ends)
    return {name: {"value": float(v), "low": low[name], "high": high[name]} for name, v in whole.items()}


def summarise(rows: Rows, resamples: int) -> dict[str, dict[str, float | None]]:
    """Column -> mean over the cases that have a finite number there, 95 % interval, standard deviation,
    extremes."""
    summary = {}
    for name in next(iter(rows.values())):
        values = np.array([row[name] for row in rows.values()], dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            summary[name] = {"cases": 0} | dict.fromkeys(
                ("mean", "low", "high", "std", "min", "max"), math.nan
            )
            continue
        low, high = bootstrap_interval(values, resamples)
        summary[name] = {
            "cases": len(values),
            "mean": float(values.mean()),
            "low": low,
            "high": high,
            "std": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return summary


def outliers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of values (n,) lie outside: (more than 1.5 interquartile ranges beyond the quartiles, |z| > 3).

    Tukey 1977, section 2D; z with the sample's standard deviation. What is not finite is no outlier.
    """
    values = np.asarray(values, dtype=np.float64)
    fine = np.isfinite(values)
    if fine.sum() < 2:
        return np.zeros_like(fine), np.zeros_like(fine)
    kept = np.where(fine, values, np.median(values[fine]))
    first, third = np.percentile(values[fine], [25, 75])
    reach = 1.5 * (third - first)
    mean, std = values[fine].mean(), values[fine].std(ddof=1)
    beyond = (kept < first - reach) | (kept > third + reach)
    return beyond & fine, (np.abs(kept - mean) > 3 * std) & fine


# --- files --------------------------------------------------------------------------------------------------


def check_out(out: str | None) -> None:
    """InputError where the folder `out` holds something; to be called before the work, too."""
    folder = Path(out) if out else None
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out: {folder} exists and is not empty; nothing is overwritten")


def new_folder(run: Path, out: str | None, what: str) -> Path:
    """The folder to write to, made by rank 0: `out`, or <what>-001 and so on in the run's folder.

    One that holds something is never taken.
    """
    base = run if run.is_dir() else run.parent
    error, folder = None, None
    if is_main():
        number = 1
        while (base / f"{what}-{number:03d}").exists():
            number += 1
        folder = Path(out) if out else base / f"{what}-{number:03d}"
        try:
            check_out(out)
            folder.mkdir(parents=True, exist_ok=True)
        except InputError as e:
            error = str(e)
        except OSError as e:
            error = f"out: {folder} cannot be made ({e.strerror})"
    error, folder = share((error, folder))
    if error:
        raise InputError(error)
    return folder


def finite(value: Any) -> Any:
    """JSON has no inf and nan: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: Rows) -> None:
    """A CSV with a line a case."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *next(iter(rows.values()), {})])
        writer.writerows([name, *row.values()] for name, row in rows.items())


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The JSON file; what is not finite becomes null."""
    write_text(path, json.dumps(finite(report), indent=1) + "\n")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text: the first column to the left, the others to the right, floats with four digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)
