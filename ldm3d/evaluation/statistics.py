"""What figures mean: intervals, summaries over cases, outliers, distances of two samples.

A mean over independent cases gets a percentile bootstrap interval: cases are drawn with replacement
(Efron & Tibshirani 1993, chapter 13).

A statistic of whole sets, such as the kernel distance, cannot be bootstrapped that way: a case that is drawn
twice would be its own nearest neighbour. Instead half of the cases is drawn without replacement, many times
(Politis, Romano & Wolf 1999, Subsampling, chapter 2). The spread of the half-samples needs no scaling, since
the mean over half of n cases, drawn like this, varies as much as the mean over n independent cases does:

    (s^2 / (n / 2)) (1 - 1/2) = s^2 / n

Such statistics depend on the number of cases, so the half-samples lie beside the value of the whole sets.
Only their spread is used: it is centred, then laid around the value of the whole sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .results import Rows

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
    """Figures of whole sets with 95 % intervals from half-samples: {name: {"value", "low", "high"}}.

    statistic: gets, for each set, the indices of the chosen cases; returns {name: value}. counts: cases in
    each set. Intervals are nan if a set has fewer than four cases.
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


def finite_means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Column -> mean over the rows that have a finite number there; nan if none has."""
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows], dtype=np.float64)
        finite = values[np.isfinite(values)]
        found[name] = float(finite.mean()) if len(finite) else math.nan
    return found


def interval_words(resamples: int) -> str:
    """How a report names the intervals of `summarise`."""
    return f"95 % percentile bootstrap over cases, {resamples} resamples, seed 0"


def summarise(rows: Rows, resamples: int) -> dict[str, dict[str, float | None]]:
    """Column -> {"cases", "mean", "low", "high", "std", "min", "max"}, over the cases with a finite number.

    low and high are the 95 % bootstrap interval of the mean.
    """
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
    """Two boolean masks of values (n,): (by quartiles, by standard deviations).

    The first marks values more than 1.5 interquartile ranges below the first or above the third quartile
    (Tukey 1977, section 2D), the second those with |z| > 3. inf and nan are no outliers.
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


# --- two samples --------------------------------------------------------------------------------------------


def auc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """P(a positive case scores higher than a negative one), ties counted half: the area under the ROC curve.

    Scores (n,) and (m,). 0.5 is chance, 1 is a perfect order. It is Mann and Whitney's U over n m (Hanley &
    McNeil 1982, Radiology 143).
    """
    difference = positives[:, None] - negatives[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def auc_interval(
    negatives: np.ndarray, positives: np.ndarray, resamples: int, paired: bool = False, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the AUC; cases are drawn with replacement in each class.

    paired: negatives[i] and positives[i] belong together, such as two samples from one noise, and are drawn
    together.
    """
    draw, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        i, j = (draw.integers(len(scores), size=len(scores)) for scores in (negatives, positives))
        values.append(auc(negatives[i], positives[i if paired else j]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _steps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All values (n + m,), ascending, and the difference of the two distribution functions at each value."""
    values = np.sort(np.concatenate([a, b]))
    share_a, share_b = (np.searchsorted(np.sort(v), values, side="right") / len(v) for v in (a, b))
    return values, share_a - share_b


def wasserstein_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of two samples (n,) and (m,), in their unit: the area between the two distribution functions."""
    values, difference = _steps(a, b)
    return float((np.abs(difference[:-1]) * np.diff(values)).sum())


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of two samples (n,) and (m,): the largest difference of the distribution functions, 0 to 1
    (Kolmogorov-Smirnov)."""
    return float(np.abs(_steps(a, b)[1]).max())
