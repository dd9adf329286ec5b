"""Intervals are as wide as the statistic really varies; outliers are those of the definitions."""

import math

import numpy as np
import pytest
import torch

from ldm3d.evaluation.statistics import half_sample_intervals, outliers, summarise
from ldm3d.metrics import cubic_kernel, kernel_distance


def test_the_half_sample_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3.0, 2.0, 200)
    found = half_sample_intervals(lambda i: {"mean": values[i].mean()}, [200], 2000)["mean"]
    half = 1.96 * values.std() / math.sqrt(200)
    assert found["value"] == values.mean()
    assert (found["low"], found["high"]) == pytest.approx(
        (found["value"] - half, found["value"] + half), abs=0.1 * half
    )


def test_the_half_sample_interval_of_the_kernel_distance_is_as_wide_as_it_varies():
    def sets(seed):
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(40, 4, generator=draw), torch.randn(40, 4, generator=draw) + 0.5

    def distance(x, y):
        return kernel_distance(cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y))

    varies = np.std([distance(*sets(seed)) for seed in range(200)])
    widths = []
    for seed in range(10):
        x, y = sets(seed)
        found = half_sample_intervals(lambda i, j, x=x, y=y: {"d": distance(x[i], y[j])}, [40, 40], 100)["d"]
        widths.append(found["high"] - found["low"])
    assert np.mean(widths) == pytest.approx(2 * 1.96 * varies, rel=0.35)


def test_a_set_too_small_to_be_halved_has_a_value_and_no_interval():
    found = half_sample_intervals(lambda i, j: {"n": len(i) + len(j)}, [3, 50], 10)["n"]
    assert found["value"] == 53
    assert math.isnan(found["low"])


def test_outliers_are_beyond_the_quartiles_or_three_deviations():
    values = np.array([*np.linspace(0, 1, 40), 2.6, math.nan])
    first, third = np.percentile(values[:41], [25, 75])
    beyond, far = outliers(values)
    assert values[beyond].tolist() == [2.6]
    assert third + 1.5 * (third - first) < 2.6
    assert far.tolist() == [False] * 40 + [True, False]
    assert not outliers(np.array([1.0]))[0].any()


def test_a_summary_leaves_out_what_is_not_a_number_and_says_how_many_are_left():
    rows = {str(i): {"a": v, "b": math.nan} for i, v in enumerate((1.0, math.inf, 3.0))}
    summary = summarise(rows, 10)
    assert (summary["a"]["mean"], summary["a"]["cases"]) == (2.0, 2)
    assert summary["b"]["cases"] == 0
