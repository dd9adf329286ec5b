"""95 % intervals hold the value that studies of this size have on average in about 95 of 100 studies.

Many studies are simulated, each with an interval from 200 resamples (of sets: 60 half-samples). Counted is
the share of the intervals that hold the true mean or AUC (of sets: the mean of the figure over all studies).
The fast tests count the most common intervals roughly, the slow ones count all of them in more studies, and
see that they are not needlessly wide.

The share of N studies has a standard error of sqrt(0.95 * 0.05 / N): 0.03 for 60, 0.011 for 400, 0.007 for
1,000, 0.005 for 2,000. Besides, the percentiles of 200 resamples leave out (0.025 * 199 + 1) / 201 at either
end, so 0.94 is expected and not 0.95. The bounds are two to four standard errors beside that. An interval
that is known to hold less has its own bound, and the comment there says what was counted.
"""

import math

import numpy as np
import pytest
import torch

from ldm3d.evaluation.sets import BINS, FEWEST, ROUGH, Measured, statistic_of
from ldm3d.evaluation.statistics import (
    auc_interval,
    bootstrap_interval,
    half_sample_intervals,
    t_quantile,
)


def held(intervals, truth: float) -> float:
    """Share of the intervals [(low, high)] that hold the truth."""
    low, high = np.array(intervals).T
    return float(((low <= truth) & (truth <= high)).mean())


def cases_of(kind: str, n: int, draw) -> np.ndarray:
    return {"normal": draw.normal(2, 1, n), "skewed": draw.gamma(4, 0.5, n)}[kind]  # both of mean 2


def means(kind: str, n: int, studies: int) -> float:
    draw = np.random.default_rng(n)
    return held([bootstrap_interval(cases_of(kind, n, draw), 200) for _ in range(studies)], 2.0)


def means_by_subject(subjects: int, studies: int, known: bool = True) -> float:
    """Four cases a subject, whose own mean varies as much as its cases do."""
    draw, found = np.random.default_rng(subjects), []
    groups = np.repeat(np.arange(subjects), 4)
    for _ in range(studies):
        values = draw.normal(2, 1, subjects)[groups] + draw.normal(0, 1, len(groups))
        found.append(bootstrap_interval(values, 200, groups=groups if known else None))
    return held(found, 2.0)


def aucs(n: int, studies: int, paired: bool) -> float:
    """paired: the score of a noise is the same in both classes up to a little, and class 1 is 0.1 higher."""
    draw, found = np.random.default_rng(n), []
    shift, same = (0.1, 0.95) if paired else (1.0, 0.0)
    truth = (1 + math.erf(shift / 2)) / 2  # P(a difference of mean `shift` and variance 2 is above 0)
    for _ in range(studies):
        own = draw.normal(0, 1, (2, n))
        scores = own[0], same * own[0] + np.sqrt(1 - same**2) * own[1] + shift
        found.append(auc_interval(*scores, 200, paired))
    return held(found, truth)


def figures(
    generated: int, real: int, features: int, shift: float, studies: int
) -> dict[str, tuple[float, float]]:
    """{figure: (share of intervals that hold, their mean width over the one that the studies' own spread asks
    for)} of two sets of normal features, one moved by `shift`."""
    found = []
    for seed in range(studies):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(generated + real, features, generator=draw)
        x[:generated] = (0.7 if shift else 1.0) * x[:generated] + shift
        spectra = torch.randn(len(x), 1, 4, generator=draw)
        histograms = torch.randn(len(x), 1, BINS, generator=draw).softmax(2)
        measured = Measured(x, [], histograms, spectra)
        statistic = statistic_of(measured, generated, 1.0, 5)
        counts = (generated, real)
        found.append(half_sample_intervals(statistic, counts, 60, seed, rough=ROUGH))
    shares, t = {}, t_quantile(min(counts) - 1)
    for name in found[0]:
        values, low, high = (np.array([f[name][key] for f in found]) for key in ("value", "low", "high"))
        if values.std() > 0:
            width = (high - low).mean() / (2 * t * values.std())
            shares[name] = held(np.stack([low, high], axis=1), values.mean()), width
    return shares


def test_quantiles_of_students_t_are_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra test) is not installed")
    for degrees in (*range(1, 30), 100, 1000):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3)


def test_intervals_of_means_of_few_cases_hold_in_95_of_100_studies():
    assert means("normal", 5, 400) == pytest.approx(0.95, abs=0.035)


def test_cases_of_one_subject_count_as_one():
    assert means_by_subject(8, 300) == pytest.approx(0.95, abs=0.04)
    assert means_by_subject(8, 300, known=False) < 0.85  # what is wrong with drawing cases


def test_an_auc_of_pairs_from_one_noise_is_that_of_new_samples():
    assert aucs(32, 200, paired=True) >= 0.91


def test_kernel_intervals_of_two_equal_small_sets_hold_and_are_not_too_wide():
    share, width = figures(16, 13, 8, 0.0, 60)["whole/kernel"]
    assert share >= 0.88
    assert 0.7 <= width <= 1.35


def test_halves_have_half_as_many_neighbours(monkeypatch):
    seen, flat = [], torch.zeros(200, 1, 4)
    monkeypatch.setattr(Measured, "figures", lambda self, i, j, width, k: seen.append(k) or {"share": 0.0})
    statistic = statistic_of(Measured(torch.zeros(200, 1), [], flat, flat), 120, 1.0, 5)
    half_sample_intervals(statistic, (120, 80), 4)
    assert seen[0] == 5
    assert set(seen[1:]) == {2.5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("n", [3, 5, 10, 40])
def test_every_interval_of_a_mean_holds(kind, n):
    assert 0.92 <= means(kind, n, 2000) <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("subjects", [5, 10, 30])
def test_every_interval_by_subject_holds(subjects):
    assert 0.92 <= means_by_subject(subjects, 2000) <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True], ids=["apart", "paired"])
@pytest.mark.parametrize("n", [10, 32, 80])
def test_every_interval_of_an_auc_holds(n, paired):
    # Ten noises are few for pairs of pairs: 92 of 100 were counted
    assert (0.9 if paired and n == 10 else 0.92) <= aucs(n, 1000, paired) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize(("generated", "real"), [(16, 13), (50, 60), (100, 80)])
def test_every_interval_of_a_figure_of_sets_holds(generated, real, shift):
    for name, (share, width) in figures(generated, real, 8, shift, 200).items():
        # Counted were 90 to 92 of 100 for kernel distances of moved sets, whose intervals are a tenth too
        # narrow, 91 to 98 for other distances, 93 to 100 for rough figures
        assert share >= 0.88, (name, share)
        if min(generated, real) >= FEWEST:
            assert width <= (3 if name.endswith(ROUGH) else 1.35), (name, width)
