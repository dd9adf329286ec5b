"""What figures mean: intervals, summaries over cases, outliers, distances of two samples.

Every interval is of 95 %: of 100 such studies about 95 have intervals that hold the value which studies of
this size have on average. tests/evaluation/test_coverage.py counts them in simulations.

The mean of a score over n independent cases gets a bootstrap interval: cases are drawn with replacement
(Efron & Tibshirani 1993, chapter 13). The percentiles of these means are too narrow for few cases, so their
distances from the mean are stretched by

    sqrt(n / (n - 1)) t / 1.96          t: 97.5 % quantile of Student's t with n - 1 degrees of freedom

which gives normal scores the width of the t interval (Hesterberg 2015, Am. Stat. 69, section 3.2, shows why).
Example: 1.64 for 5 cases, 1.05 for 40. Cases of one subject are alike: subjects are drawn, each with all of
its cases, and n counts subjects. One case, or one subject, has no interval. With two or three the stretch is
so large that an interval may leave what a score can be, such as a Dice above 1. There it ends at the limit
(`LIMITS`): only impossible values are cut off, so the interval holds the true value as often as before.

A statistic of whole sets, such as the kernel distance, cannot be bootstrapped that way: a case that is drawn
twice would be its own nearest neighbour. Instead the cases are parted into two random halves a and b, many
times (Politis, Romano & Wolf 1999, Subsampling, chapter 2). A statistic of n cases is made of single cases
(its variance falls as v1 / n) and of pairs of cases (v2 / n^2, all that is left of the kernel distance of two
equal sets). A half has the variances 2 v1 / n and 4 v2 / n^2. For a given sample, over all partings,

    var of (a - b) / 2  =  v1 / n + 2 v2 / n^2          the single cases of a and b add up to a constant,
    var of (a + b) / 2  =            v2 / n^2           so their mean varies by pairs alone

and the difference of the two is the variance of the whole: v1 / n + v2 / n^2. The interval is the value plus
or minus t of its roots. Such statistics depend on the number of cases, so the halves lie beside the value of
the whole sets: only how they spread is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .results import Rows

# The values that a score can have, by a word of its name; the first word here that the name holds counts
LIMITS = {
    **dict.fromkeys("retention brier ged".split(), (0.0, 2.0)),
    **dict.fromkeys("dice iou precision sensitivity auroc ece share ratio".split(), (0.0, 1.0)),
    **dict.fromkeys("ssim cosine correlation".split(), (-1.0, 1.0)),
    **dict.fromkeys("hd95 mae mse nll seconds sharpness difference distance".split(), (0.0, math.inf)),
    **dict.fromkeys("seam contrast outside inside voxels votes raters".split(), (0.0, math.inf)),
}


def limits_of(name: str) -> tuple[float, float]:
    """The lowest and highest value of a score: (0, 1) for dice_own_model. Infinite for unknown names."""
    words = name.split("_")
    return next((limits for word, limits in LIMITS.items() if word in words), (-math.inf, math.inf))


# --- intervals ----------------------------------------------------------------------------------------------


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: 12.71 for 1 degree of freedom, 1.96 for many; within 0.5 %.

    Abramowitz & Stegun 1964, equation 26.7.5, whose error is too large for one and two degrees.
    """
    if degrees <= 2:
        return {1: 12.706, 2: 4.303}[degrees]
    z, n = 1.959964, degrees
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / n**power for power, term in enumerate(terms))


def _members(groups: Sequence | None, n: int) -> list[np.ndarray]:
    """The indices of the cases of each subject; each of n cases is a subject of its own without groups."""
    if groups is None:
        return [np.array([i]) for i in range(n)]
    _, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)]


def _stretched(value: float, replicates: Sequence[float] | np.ndarray, subjects: int) -> tuple[float, float]:
    """95 % interval around `value` from bootstrap replicates of so many subjects; see the module."""
    ends = np.percentile(replicates, [2.5, 97.5])
    stretch = math.sqrt(subjects / (subjects - 1)) * t_quantile(subjects - 1) / 1.959964
    return tuple(float(value + stretch * (end - value)) for end in ends)


def bootstrap_interval(
    values: np.ndarray, resamples: int, groups: Sequence | None = None, name: str = ""
) -> tuple[float, float]:
    """The 95 % interval of the mean of values (n,). groups (n,): the subject of each, drawn as a whole. name:
    of the score, whose limits the interval keeps; "" for a difference, which has none.

    (nan, nan) for a single case or subject.
    """
    draw, members = np.random.default_rng(0), _members(groups, len(values))
    if len(members) < 2:
        return math.nan, math.nan
    sums, sizes = (np.array([f(values[m]) for m in members]) for f in (np.sum, len))
    chosen = (draw.integers(len(members), size=len(members)) for _ in range(resamples))
    replicates = [sums[i].sum() / sizes[i].sum() for i in chosen]
    return tuple(np.clip(_stretched(values.mean(), replicates, len(members)), *limits_of(name)).tolist())


def sign_flip_test(values: np.ndarray, groups: Sequence | None = None, draws: int = 20000) -> float:
    """Two-sided p of paired differences (n,), if either sign were as likely: the share of all 2^n choices of
    their signs whose mean is as far from 0 as the mean of `values`, or further.

    groups (n,): the subject of each, whose differences change sign together. Above 16 subjects `draws`
    choices are drawn; that of `values` itself is one of them, so that p is never 0. nan for no values.
    """
    sums = np.array([values[m].sum() for m in _members(groups, len(values))]) if len(values) else values
    if not len(sums):
        return math.nan
    limit = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # rounding: equal sums count
    if len(sums) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= limit).mean())
    draw, further = np.random.default_rng(0), 1
    for some in np.array_split(np.arange(draws), -(-draws // 1000)):
        signs = 1 - 2 * draw.integers(2, size=(len(some), len(sums)))
        further += int((np.abs(signs @ sums) >= limit).sum())
    return further / (draws + 1)


def half_sample_intervals(
    statistic: Callable[..., dict[str, float]],
    counts: Sequence[int],
    resamples: int,
    seed: int = 0,
    groups: Sequence[Sequence | None] | None = None,
    rough: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Figures of whole sets with 95 % intervals from half-samples: {name: {"value", "low", "high"}}.

    statistic: gets, for each set, the indices of the chosen cases; returns {name: value}. counts: cases in
    each set. groups: for each set, the subject of each case or None; subjects are parted as a whole.
    resamples: half-samples, two of each parting. rough: endings of names of statistics that jump, such as
    shares of neighbours. Single cases and pairs do not describe these, so the variance of a half-sample is
    taken as it is: intervals of rough statistics hold more than 95 %. Intervals are nan if a set has fewer
    than four subjects.
    """
    whole = statistic(*(np.arange(n) for n in counts))
    sets = [_members(who, n) for who, n in zip(groups or [None] * len(counts), counts, strict=True)]
    found = {name: {"value": float(v), "low": math.nan, "high": math.nan} for name, v in whole.items()}
    fewest = min(map(len, sets))
    if fewest < 4:
        return found
    draw, pairs = np.random.default_rng(seed), []
    for _ in range(max(2, resamples // 2)):
        orders = [draw.permutation(len(members)) for members in sets]
        half = [len(order) // 2 for order in orders]
        parts = (
            [o[:h] for o, h in zip(orders, half, strict=True)],
            [o[h : 2 * h] for o, h in zip(orders, half, strict=True)],
        )
        pairs.append([statistic(*map(_cases, sets, part)) for part in parts])
    for name, f in found.items():
        a, b = np.array([[one[name] for one in pair] for pair in pairs]).T
        fine = np.isfinite(a) & np.isfinite(b)
        if fine.sum() < 2:
            continue
        apart, together = ((a - b)[fine] / 2).var(), ((a + b)[fine] / 2).var()
        if name.endswith(tuple(rough)):
            variance = apart + together
        else:  # the share of pairs in `apart` is half at most: less is chance
            variance = max(apart - together, apart / 2)
        reach = t_quantile(fewest - 1) * math.sqrt(variance)
        f["low"], f["high"] = f["value"] - reach, f["value"] + reach
    return found


def _cases(members: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """The indices of all cases of the chosen subjects, ascending."""
    return np.sort(np.concatenate([members[k] for k in chosen]))


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
    return f"95 % bootstrap over subjects (cases, if these are unknown), {resamples} resamples, seed 0"


def summarise(
    rows: Rows, resamples: int, subjects: dict[str, str] | None = None
) -> dict[str, dict[str, float | None]]:
    """Column -> {"cases", "mean", "low", "high", "std", "min", "max"}, over the cases with a finite number.

    low and high are the 95 % bootstrap interval of the mean, nan for one case. subjects: the subject of each
    row; without, each row is a subject of its own.
    """
    summary = {}
    groups = np.array([str(subjects[name]) if subjects else name for name in rows])
    for name in next(iter(rows.values())):
        values = np.array([row[name] for row in rows.values()], dtype=np.float64)
        finite = np.isfinite(values)
        values = values[finite]
        if not len(values):
            summary[name] = {"cases": 0} | dict.fromkeys(
                ("mean", "low", "high", "std", "min", "max"), math.nan
            )
            continue
        low, high = bootstrap_interval(values, resamples, groups[finite], name)
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


def auc(negatives: np.ndarray, positives: np.ndarray, paired: bool = False) -> float:
    """P(a positive case scores higher than a negative one), ties counted half: the area under the ROC curve.

    Scores (n,) and (m,). 0.5 is chance, 1 is a perfect order. It is Mann and Whitney's U over n m (Hanley &
    McNeil 1982, Radiology 143). paired: negatives[i] and positives[i] are not independent, such as two
    samples from one noise, and are not compared with each other: what differs between them is the class
    alone, so they are in order much more often than two new samples are.
    """
    return _auc(negatives, positives, np.arange(len(negatives)) if paired else None)


def _auc(negatives: np.ndarray, positives: np.ndarray, noise: np.ndarray | None) -> float:
    """AUC over all pairs of scores; with noise (n,), the number of the noise that negatives[i] and
    positives[i] are from, over the pairs from different noises."""
    if noise is None:  # by ranks, which takes no table of all pairs: there may be 100,000 voxels
        order = np.sort(negatives)
        lower, upper = (np.searchsorted(order, positives, side=side).sum() for side in ("left", "right"))
        return float((lower + upper) / 2 / (len(negatives) * len(positives)))
    difference = positives[:, None] - negatives[None]
    won = (difference > 0) + (difference == 0) / 2
    return float(won[noise[:, None] != noise[None]].mean())


def auc_interval(
    negatives: np.ndarray, positives: np.ndarray, resamples: int, paired: bool = False
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the AUC; cases are drawn with replacement in each class.

    paired: negatives[i] and positives[i] belong together, such as two samples from one noise. They are drawn
    together, and never compared with each other. nan if a class has one case only.
    """
    fewest = min(len(negatives), len(positives))
    if fewest < 2:
        return math.nan, math.nan
    draw, values = np.random.default_rng(0), []
    while len(values) < resamples:
        i, j = (draw.integers(len(scores), size=len(scores)) for scores in (negatives, positives))
        if not paired:
            values.append(_auc(negatives[i], positives[j], None))
        elif i.min() < i.max():  # else one pair was drawn again and again: there is nothing to compare
            values.append(_auc(negatives[i], positives[i], i))
    low, high = _stretched(auc(negatives, positives, paired), values, fewest)
    return max(0.0, low), min(1.0, high)


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
