"""What the log of a run says: curves to draw, and the facts that a reader wants first.

A line of log.jsonl is one JSON object: "step", "split" (train or val), "seconds", and any number of figures.
"""

from __future__ import annotations

import itertools
import re
import statistics
from typing import Any

from ..engine.logger import duration

MAX_POINTS = 800  # of a curve in the page; longer curves are thinned
FIRST = ("loss", "psnr", "ssim")  # curves that come first
COST = ("samples_per_s", "data_wait", "peak_gib", "lr", "grad_norm", "skipped_steps")  # not about quality
TITLES = {
    "samples_per_s": "samples per second",
    "data_wait": "share of time spent waiting for data",
    "peak_gib": "peak memory, GiB",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "skipped_steps": "skipped steps",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "kl": "KL, nats per latent element",
}

Lines = list[dict[str, Any]]  # of log.jsonl


def curves(lines: Lines) -> list[dict[str, Any]]:
    """One chart per figure: {"name", "title", "lines": {label: [[step, seconds, value] ...]}}.

    Training and validation share a chart. So do the figures of one name at several noise levels, such as
    loss_u0.2 and loss_u0.4. A figure that never changes has no chart.
    """
    charts: dict[str, dict[str, list]] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("step", "seconds") or not isinstance(value, (int, float)):
                continue
            level = re.fullmatch(r"(.+)_u([\d.]+)", key)
            name, label = (f"{level[1]} at u", f"u = {level[2]}") if level else (key, line["split"])
            points = charts.setdefault(name, {}).setdefault(label, [])
            points.append([line["step"], line["seconds"], value])
    changing = [n for n, c in charts.items() if len({p[2] for points in c.values() for p in points}) > 1]
    ordered = sorted(changing, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n in COST))
    return [
        {
            "name": name,
            "title": TITLES.get(name, name.replace("_", " ").replace(" at u", " by noise level u")),
            "lines": {label: thin(points) for label, points in charts[name].items()},
        }
        for name in ordered
    ]


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most MAX_POINTS points: each the mean of an equal part of the curve. Numbers keep five digits."""
    ends = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(ends)]
    parts = parts if len(points) > MAX_POINTS else [[p] for p in points]
    return [[float(f"{sum(column) / len(part):.5g}") for column in zip(*part, strict=True)] for part in parts]


def best_validation(lines: Lines) -> str:
    """The validation with the highest PSNR; without PSNR the highest Dice; without both the lowest loss (at
    high noise, which judges a ControlNet)."""
    kinds = (
        ("psnr", max, "PSNR {:.2f} dB"),
        ("dice", max, "Dice {:.3f}"),
        ("loss_high_noise", min, "loss at high noise {:.4g}"),
        ("loss", min, "loss {:.4g}"),
    )
    for key, pick, words in kinds:
        found = [line for line in lines if line["split"] == "val" and line.get(key) is not None]
        if found:
            line = pick(found, key=lambda line, key=key: line[key])
            return f"{words.format(line[key])} at step {line['step']:,}"
    return "none yet"


def facts_of(config: dict[str, Any], lines: Lines, split: dict[str, list]) -> dict[str, str]:
    """What stands at the top of the report: progress, best validation, speed, memory, cases."""
    train = [line for line in lines if line["split"] == "train"]

    def logged(key: str) -> list[float]:
        return [line[key] for line in train if line.get(key) is not None]

    facts = {}
    if lines:
        facts["step"] = f"{lines[-1]['step']:,} of {config['run']['steps']:,}"
        facts["training time"] = duration(lines[-1]["seconds"])
        facts["best validation"] = best_validation(lines)
    if values := logged("samples_per_s"):
        facts["samples per second"] = f"{statistics.median(values):.4g} (median)"
    if values := logged("data_wait"):
        facts["waiting for data"] = f"{statistics.mean(values):.1%} of the time"
    if values := logged("peak_gib"):
        facts["peak memory"] = f"{max(values):.3g} GiB"
    if values := logged("skipped_steps"):
        facts["skipped steps"] = f"{values[-1]:g}"
    if split:
        facts["cases"] = ", ".join(f"{len(names)} {part}" for part, names in split.items() if names)
    return facts
