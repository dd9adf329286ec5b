"""The folder of results that an evaluation makes: report.json, a table of cases, pictures of the worst ones.

Every command that writes results (evaluation, sampling, segmentation, reports, benchmarks) uses these
functions. So folders are numbered in one way, no older result is ever overwritten, and numbers look the same
everywhere.
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
from ..engine.checkpoint import is_occupied, write_text
from ..engine.distributed import broadcast, gather, is_main
from ..engine.logger import new_figure, save_figure

Rows = dict[str, dict[str, Any]]  # name of a case -> column -> value


# --- the folder ---------------------------------------------------------------------------------------------


def check_out(out: str | None) -> None:
    """InputError if the folder `out` holds anything. Call it before long work, not only after."""
    if out and is_occupied(Path(out)):
        raise InputError(f"out: {Path(out)} exists and is not empty; nothing is overwritten")


def new_folder(run: Path, out: str | None, what: str) -> Path:
    """A new folder for results: `out`, or else <what>-001, <what>-002 ... in the folder of the run.

    run: a run folder, or a checkpoint in one. Rank 0 makes the folder, all ranks get its path. InputError if
    `out` is not empty or cannot be made.
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
    error, folder = broadcast((error, folder))
    if error:
        raise InputError(error)
    return folder


# --- numbers ------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """The value with None in place of every inf and nan, which JSON does not know."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a JSON file, in which inf and nan become null."""
    try:
        write_text(path, json.dumps(finite(report), indent=1) + "\n")
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e})") from None


def write_csv(path: Path, rows: Rows | Sequence[dict[str, Any]], digits: int | None = None) -> None:
    """Write a CSV file with a header and one line per row. None is left blank.

    rows: dicts with the same keys; or {case: dict}, then "case" is the first column. digits: significant
    digits of floats; None writes all of them.
    """
    lines = [{"case": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else ["case"])
        writer.writeheader()
        for line in lines:
            short = {k: f"{v:.{digits}g}" for k, v in line.items() if digits and isinstance(v, float)}
            writer.writerow(line | short)


def table(rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """A table as aligned text, or in Markdown. The first row is the header. Floats get four digits.

    In aligned text the first column is flush left, all others are flush right.
    """
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)


def with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A figure and its interval as text: 0.912 [0.871, 0.944]."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# --- pictures -----------------------------------------------------------------------------------------------


def draw_reliability(
    path: Path, bins: np.ndarray, names: tuple[str, str], labels: tuple[str, str]
) -> dict[str, list[float]]:
    """Draw mean q against mean p (with matplotlib), with these labels: {"voxels", names of p and q: a number
    for each bin that has voxels}. bins (3, N): of `metrics.reliability_bins`."""
    voxels, p, q = bins[:, bins[0] > 0]
    curve = {"voxels": voxels.tolist(), names[0]: (p / voxels).tolist(), names[1]: (q / voxels).tolist()}
    if (figure := new_figure(figsize=(4, 4), dpi=100, layout="constrained")) is not None:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], "0.7")
        ax.plot(curve[names[0]], curve[names[1]], "o-")
        ax.set(title="reliability near labels", xlabel=labels[0], ylabel=labels[1])
        save_figure(figure, path)
    return curve


class WorstPictures:
    """Keeps the pictures of the `count` cases with the lowest scores, while cases come one at a time.

    So an evaluation of thousands of volumes holds a handful of them in memory. nan is no low score.
    """

    def __init__(self, count: int):
        self.count = count
        self.kept: dict[str, tuple[float, list[np.ndarray]]] = {}

    def add(self, case: str, score: float, pictures: list[np.ndarray]) -> None:
        self.kept[case] = (score, pictures)
        self._drop()

    def gather(self) -> None:
        """Keep the worst cases of all ranks, on every rank."""
        self.kept = {case: entry for part in gather(self.kept) for case, entry in part.items()}
        self._drop()

    def _drop(self) -> None:
        """Sort by score, then by name; forget all but the first `count`."""
        order = sorted(self.kept, key=lambda case: (math.isnan(s := self.kept[case][0]), s, case))
        self.kept = {case: self.kept[case] for case in order[: self.count]}

    def sheet(self, title: Callable[[str, float], str]) -> dict[str, list[np.ndarray]]:
        """{title(case, score): pictures} of the kept cases, the worst first, as `save_sheet` takes them."""
        return {title(case, score): pictures for case, (score, pictures) in self.kept.items()}
