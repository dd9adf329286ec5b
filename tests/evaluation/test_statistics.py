"""Intervals are as wide as the statistic really varies; outliers are those of the definitions."""

import math

import numpy as np
import pytest
import torch

from ldm3d.evaluation.statistics import (
    auc,
    auc_interval,
    bootstrap_interval,
    half_sample_intervals,
    ks_distance,
    outliers,
    sign_flip_test,
    summarise,
    wasserstein_distance,
)
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


def test_a_bias_that_depends_on_the_number_of_cases_moves_the_interval_and_does_not_widen_it():
    values = np.random.default_rng(0).normal(3.0, 2.0, 50)

    def statistic(i: np.ndarray) -> dict[str, float]:
        return {"plain": values[i].mean(), "biased": values[i].mean() + 100 / len(i)}  # halves: 2 more

    found = half_sample_intervals(statistic, [50], 200)
    for end in ("value", "low", "high"):
        assert found["biased"][end] == pytest.approx(found["plain"][end] + 2)


def test_a_set_too_small_to_be_halved_has_a_value_and_no_interval():
    found = half_sample_intervals(lambda i, j: {"n": len(i) + len(j)}, [3, 50], 10)["n"]
    assert found["value"] == 53
    assert math.isnan(found["low"])


def test_outliers_are_beyond_the_quartiles_or_three_deviations():
    values = np.array([*np.linspace(0, 1, 101), 1.8, -0.7, math.nan])  # quartiles near 1/4 and 3/4
    assert values[outliers(values)[0]].tolist() == [1.8, -0.7]  # beyond 1.5 and -0.5
    values = np.array([*np.linspace(-1, 1, 101), *[5.0, -5.0] * 20, 7.5])  # of standard deviation 2.7
    assert not outliers(values)[1].any()
    values[-1] = 9.0
    assert values[outliers(values)[1]].tolist() == [9.0]
    assert not outliers(np.array([1.0]))[0].any()


def test_an_interval_of_two_cases_stays_within_what_the_score_can_be():
    values = {
        "votes_dice": (0.8, 0.9),
        "hd95_1": (2.0, 9.0),
        "retention_ratio": (0.9, 1.2),
        "psnr": (1.0, 9.0),
    }
    rows = {str(i): {name: pair[i] for name, pair in values.items()} for i in range(2)}
    found = {name: (s["low"], s["high"]) for name, s in summarise(rows, 200).items()}
    wide = {name: bootstrap_interval(np.array(pair), 200) for name, pair in values.items()}
    assert wide["votes_dice"][1] > 1  # a difference of such scores keeps its width
    assert wide["hd95_1"][0] < 0
    assert found["votes_dice"] == (pytest.approx(wide["votes_dice"][0]), 1)
    assert found["hd95_1"] == (0, pytest.approx(wide["hd95_1"][1]))
    assert found["retention_ratio"] == (0, 2)
    assert found["psnr"] == wide["psnr"]


def test_a_summary_leaves_out_what_is_not_a_number_and_says_how_many_are_left():
    rows = {str(i): {"a": v, "b": math.nan} for i, v in enumerate((1.0, math.inf, 3.0))}
    summary = summarise(rows, 10)
    assert (summary["a"]["mean"], summary["a"]["cases"]) == (2.0, 2)
    assert summary["b"]["cases"] == 0


# --- two samples --------------------------------------------------------------------------------------------


def test_the_auc_is_scikit_learns_with_ties():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = np.random.default_rng(0)
    zeros, ones = draw.integers(0, 20, 30).astype(float), draw.integers(5, 25, 50).astype(float)
    truth = np.repeat([0, 1], [30, 50])
    assert auc(zeros, ones) == pytest.approx(metrics.roc_auc_score(truth, np.concatenate([zeros, ones])))
    low, high = np.zeros(3), np.ones(4)
    assert (auc(low, high), auc(high, low), auc(low, low)) == (1, 0, 0.5)


def test_the_interval_of_the_auc_is_as_wide_as_hanley_and_mcneils_and_pairs_are_drawn_together():
    draw = np.random.default_rng(1)
    zeros, ones = draw.normal(0, 1, 80), draw.normal(1, 1, 60)
    low, high = auc_interval(zeros, ones, 1000)
    a = auc(zeros, ones)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + 59 * (q1 - a * a) + 79 * (q2 - a * a)) / (60 * 80))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    shifted = zeros + 0.3  # each a little above its partner: together they always keep their order
    together, apart = (auc_interval(zeros, shifted, 300, paired) for paired in (True, False))
    assert together[1] - together[0] < 0.3 * (apart[1] - apart[0])


def test_a_paired_auc_compares_no_sample_with_the_one_from_its_own_noise():
    zeros = np.random.default_rng(0).normal(0, 1, 6)
    ones = zeros + 1e-6  # always in order with its own partner, and with no other
    others = [(p > n) for i, n in enumerate(zeros) for j, p in enumerate(ones) if i != j]
    assert auc(zeros, ones, paired=True) == pytest.approx(np.mean(others)) == 0.5
    low, high = auc_interval(zeros, ones, 50, paired=True)
    assert (low, high) == (0.5, 0.5)  # and neither does a case that is drawn twice
    assert all(math.isnan(end) for end in auc_interval(zeros[:1], ones[:1], 50))


@pytest.mark.parametrize("sizes", [(30, 30), (7, 50), (1, 2)])
def test_distances_of_two_samples_are_scipys(sizes):
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra test) is not installed")
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, sizes[0]).astype(float), draw.normal(4, 2, sizes[1])
    assert wasserstein_distance(a, b) == pytest.approx(stats.wasserstein_distance(a, b))
    assert ks_distance(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic)


def test_the_sign_flip_test_is_scipys_for_few_and_for_many_cases():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for n in (2, 5, 11):
        values = rng.normal(0.4, 1, n).round(1)  # rounded: sums that are equal but for rounding errors
        values[0] = 0.0
        theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_test(values) == pytest.approx(theirs.pvalue, abs=1e-12)
    values = rng.normal(0.3, 1, 60)
    found, expected = sign_flip_test(values), stats.ttest_1samp(values, 0).pvalue  # nearly the same law
    assert found == pytest.approx(expected, abs=0.01)
    assert sign_flip_test(np.full(60, 0.1)) == pytest.approx(1 / 20001)


def test_cases_of_one_subject_change_sign_together():
    values, subjects = np.array([1.0, 2.0, 3.0, -0.5]), ["a", "a", "b", "c"]
    assert sign_flip_test(values, subjects) == sign_flip_test(np.array([3.0, 3.0, -0.5]))
    assert sign_flip_test(np.repeat(values, 9), np.repeat(range(4), 9)) == sign_flip_test(values)
    assert math.isnan(sign_flip_test(np.array([])))


def test_a_true_hypothesis_is_rejected_as_often_as_p_says():
    rng = np.random.default_rng(0)
    found = [sign_flip_test(rng.normal(size=20) ** 3, draws=400) for _ in range(400)]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.04)
