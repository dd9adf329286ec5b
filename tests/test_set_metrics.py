"""Distances of sets equal closed forms for Gaussians, scipy's matrix root, and scikit-learn's kernels and
neighbours."""

import math

import numpy as np
import pytest
import torch

from ldm3d.metrics import (
    cubic_kernel,
    frechet_distance,
    histogram_distance,
    kernel_distance,
    neighbour_scores,
    power_spectrum,
    spectrum_distance,
)


def gaussian(n: int, num: int, seed: int) -> torch.Tensor:
    return torch.randn(n, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: list[float], std: list[float], seed: int) -> torch.Tensor:
    """200 points whose sample mean and covariance are exactly `mean` and diag(std^2)."""
    x = gaussian(200, len(mean), seed)
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(199)
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    return kernel_distance(cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y))


# --- Frechet ------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    x, y = exactly([0, 1, 2], [1, 2, 0.5], 0), exactly([1, 1, 0], [3, 2, 0.25], 1)
    assert frechet_distance(x, y) == pytest.approx(1 + 0 + 4 + (1 - 3) ** 2 + 0 + 0.25**2, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "m"), [(60, 45), (9, 60), (8, 7)], ids=["many", "few and many", "few"])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(n, m):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy (extra test) is not installed")
    mix = gaussian(12, 12, 7)
    x, y = gaussian(n, 12, 0) @ mix, gaussian(m, 12, 1) + 0.3
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    # The matrix under the root is symmetric here, so that scipy's is exact where covariances are singular
    half = linalg.sqrtm(a).real
    root = np.sqrt(np.linalg.eigvalsh(half @ b @ half).clip(0)).sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


# --- kernel -------------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_the_unbiased_formula_with_scikit_learns_kernel():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="scikit-learn is not installed")
    x, y = gaussian(15, 6, 0), gaussian(11, 6, 1) * 1.5 + 0.2
    kxx, kyy, kxy = (pairwise.polynomial_kernel(a, b, degree=3) for a, b in ((x, x), (y, y), (x, y)))
    expected = sum(kxx[i, j] for i in range(15) for j in range(15) if i != j) / (15 * 14)
    expected += sum(kyy[i, j] for i in range(11) for j in range(11) if i != j) / (11 * 10)
    assert mmd(x, y) == pytest.approx(expected - 2 * kxy.mean(), rel=1e-10)


def test_the_kernel_distance_has_no_bias_with_few_cases_where_the_frechet_distance_has():
    kernel = [mmd(gaussian(6, 4, 2 * s), gaussian(6, 4, 2 * s + 1)) for s in range(400)]
    frechet = [frechet_distance(gaussian(6, 4, 2 * s), gaussian(6, 4, 2 * s + 1)) for s in range(40)]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / math.sqrt(400)
    assert np.mean(frechet) > 1


def test_the_kernel_distance_of_shifted_gaussians_is_its_closed_form_in_the_mean():
    # In one dimension, x ~ N(0, 1) and y ~ N(s, 1): E (a b + 1)^3 = E(ab)^3 + 3 E(ab)^2 + 3 E(ab) + 1 = f
    def f(a: float, b: float) -> float:
        first, second, third = (lambda m: m), (lambda m: m**2 + 1), (lambda m: m**3 + 3 * m)
        return third(a) * third(b) + 3 * second(a) * second(b) + 3 * first(a) * first(b) + 1

    s = 0.7
    expected = f(0, 0) + f(s, s) - 2 * f(0, s)
    found = [mmd(gaussian(40, 1, 2 * i), gaussian(40, 1, 2 * i + 1) + s) for i in range(300)]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(300))


# --- neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_neighbour_scores_are_counted_by_hand_with_scikit_learns_neighbours(k):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    real, made = gaussian(30, 3, 0), gaussian(22, 3, 1) * 1.3 + 0.4

    def radii(x):
        fitted = neighbors.NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(x)
        return fitted.kneighbors(x)[0][:, -1]

    real_radius, made_radius = radii(real), radii(made)
    d = neighbors.NearestNeighbors(n_neighbors=22).fit(made).kneighbors_graph(real, mode="distance").toarray()
    expected = {
        "precision": np.mean([any(d[i, j] <= real_radius[i] for i in range(30)) for j in range(22)]),
        "recall": np.mean([any(d[i, j] <= made_radius[j] for j in range(22)) for i in range(30)]),
        "density": sum(d[i, j] <= real_radius[i] for i in range(30) for j in range(22)) / (k * 22),
        "coverage": np.mean([any(d[i, j] <= real_radius[i] for j in range(22)) for i in range(30)]),
    }
    cd = torch.cdist
    assert neighbour_scores(cd(real, real), cd(made, made), cd(real, made), k) == pytest.approx(expected)


def test_a_forgotten_mode_costs_recall_and_coverage_and_not_precision():
    real = torch.cat([gaussian(50, 2, 0), gaussian(50, 2, 1) + 20])
    made, cd = gaussian(60, 2, 2), torch.cdist
    scores = neighbour_scores(cd(real, real), cd(made, made), cd(real, made), 3)
    assert scores["precision"] > 0.9
    assert scores["recall"] < 0.55
    assert scores["coverage"] < 0.55
    assert math.isnan(
        neighbour_scores(cd(made, made), cd(made[:3], made[:3]), cd(made, made[:3]), 3)["recall"]
    )


def test_noise_far_away_is_neither_precise_nor_dense_and_covers_nothing():
    real, made, cd = gaussian(40, 4, 0), gaussian(40, 4, 1) + 100, torch.cdist
    assert set(neighbour_scores(cd(real, real), cd(made, made), cd(real, made)).values()) == {0.0}


# --- intensities and frequencies ----------------------------------------------------------------------------


def test_the_histogram_distance_is_scipys_wasserstein_distance():
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra test) is not installed")
    p, q = (torch.rand(2, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    places = np.arange(20) * 0.1
    expected = np.mean([stats.wasserstein_distance(places, places, p[c], q[c]) for c in range(2)])
    assert histogram_distance(p, q, 0.1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [(96, 80), (32, 28, 36)])
def test_white_noise_has_its_own_level_at_every_frequency(size):
    x = 3 * torch.randn(30, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = power_spectrum(x, 8)
    assert spectrum.shape == (30, 8)
    power = (10 ** (spectrum / 10)).mean(0)
    assert power[1:].tolist() == pytest.approx([9] * 7, rel=0.1)
    assert spectrum_distance(power_spectrum(2 * x, 8), spectrum) == pytest.approx(20 * math.log10(2))


def test_a_wave_stands_in_the_shell_of_its_frequency():
    wave = torch.cos(2 * math.pi * 0.2 * torch.arange(100))[:, None].expand(100, 90)[None]
    assert power_spectrum(wave, 10)[0].argmax() == 4  # 0.2 of 0.5 cycles per voxel


def test_a_wave_that_does_not_end_where_it_began_leaks_into_no_distant_shell():
    wave = torch.sin(2 * math.pi * 0.2253 * torch.arange(100))[:, None].expand(100, 90)[None]
    spectrum = power_spectrum(wave, 10)[0]
    assert spectrum.argmax() == 4
    assert spectrum[[1, 7, 8, 9]].max() < spectrum.max() - 60  # without a window 30 dB at most
    assert torch.allclose(
        power_spectrum(wave.double() + 50, 10), power_spectrum(wave.double(), 10), atol=1e-6
    )


def test_a_frequency_at_the_edge_of_two_shells_belongs_to_the_upper_one():
    wave = torch.cos(2 * math.pi * 15 / 44 * torch.arange(44, dtype=torch.float64))[None]
    assert power_spectrum(wave, 22)[0].argmax() == 15
