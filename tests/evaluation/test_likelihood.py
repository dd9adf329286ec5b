"""Densities of Gaussians, whose exact network is known, come out right; strange images are told apart."""

import itertools
import json
import math

import pytest
import torch

from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig, make_prediction
from ldm3d.evaluation import likelihood
from ldm3d.evaluation.__main__ import main
from ldm3d.evaluation.likelihood import (
    bits_per_dimension,
    change,
    figures,
    flow_times,
    log_likelihood,
    probes_of,
)

KINDS = [("flow", "velocity"), ("flow", "x_start"), ("vp", "v"), ("vp", "eps")]
SHAPE = (2, 3, 2)  # of a latent: 12 numbers


def make_oracle(kernel, cov):
    """The exact network of latents (B, *SHAPE) from N(0, cov)."""

    def model(x_t, time):
        t = float(time[0]) / 1000 if kernel.process == "flow" else int(time[0])
        alpha, sigma = kernel.signal_and_noise(t)
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(cov)).double())
        x_start = (x_t.flatten(1) @ gain.T).view_as(x_t)
        noise = (x_t - alpha * x_start) / sigma
        return make_prediction(kernel.config.prediction, x_start, noise, alpha, sigma)

    return model


def gaussian(spread):
    """(covariance, in which neighbours are alike, with this standard deviation; latents from it)."""
    place = torch.arange(12, dtype=torch.float64)
    cov = spread**2 * (torch.exp(-((place[:, None] - place) ** 2) / 4) + 0.5 * torch.eye(12)) / 1.5
    noise = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return cov, noise @ torch.linalg.cholesky(cov).T


def make_kernel(process, prediction):
    return DiffusionKernel(KernelConfig(process=process, prediction=prediction))


@pytest.mark.parametrize(("process", "prediction"), KINDS)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_bits_per_dimension_of_a_gaussian_are_right_to_a_thousandth(process, prediction, spread):
    kernel, (cov, z) = make_kernel(process, prediction), gaussian(spread)
    times = flow_times(kernel, 120)
    alpha, sigma = kernel.signal_and_noise(times[0])
    noisy = cov + (sigma / alpha) ** 2 * torch.eye(12).double()  # what log_likelihood is the density of
    exact = torch.distributions.MultivariateNormal(torch.zeros(12).double(), noisy).log_prob(z)
    unit = probes_of(SHAPE, 0, torch.Generator())
    found = log_likelihood(kernel, make_oracle(kernel, cov), z.view(-1, *SHAPE), times, unit)
    off = bits_per_dimension(found, 12) - bits_per_dimension(exact, 12)
    assert off.abs().max() < 1e-3
    if process == "flow":  # whose noise at the first time is next to none
        clean = torch.distributions.MultivariateNormal(torch.zeros(12).double(), cov).log_prob(z)
        assert (bits_per_dimension(found, 12) - bits_per_dimension(clean, 12)).abs().max() < 1e-3


def test_hutchinsons_estimate_has_the_exact_value_as_its_mean():
    kernel, (cov, z) = make_kernel("flow", "velocity"), gaussian(0.5)
    model, times, z = make_oracle(kernel, cov), flow_times(kernel, 12), z[:1].view(1, *SHAPE)
    exact = log_likelihood(kernel, model, z, times, probes_of(SHAPE, 0, torch.Generator()))
    generator = torch.Generator().manual_seed(1)
    probes = torch.cat(probes_of(SHAPE, 900, generator)) * 30  # undo the division: one for each copy
    single = log_likelihood(kernel, model, z.expand(900, *SHAPE), times, [probes])
    error = single.std() / 30
    assert (single.mean() - exact).abs() < 4 * error
    many = log_likelihood(kernel, model, z, times, probes_of(SHAPE, 100, generator))
    assert (many - exact).abs() < 4 * single.std() / 10


def test_the_density_of_standard_latents_is_that_of_the_guide():
    kernel = make_kernel("flow", "velocity")
    z = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = make_oracle(kernel, torch.eye(12).double())
    found = log_likelihood(kernel, model, z, flow_times(kernel, 60), probes_of(SHAPE, 1, torch.Generator()))
    mean = float(bits_per_dimension(found, 12).mean())
    assert mean == pytest.approx(0.5 * math.log2(2 * math.pi * math.e), abs=0.05)


@pytest.mark.parametrize("process", ["flow", "vp"])
def test_times_rise_from_the_cleanest_to_noise(process):
    kernel = make_kernel(process, "v")
    times = flow_times(kernel, 30)
    assert all(a < b for a, b in itertools.pairwise(times))
    assert (times[0], times[-1]) == ((1e-3, 1.0) if process == "flow" else (0, 999))
    assert 20 <= len(times) <= 32


def test_changes_spoil_an_image():
    x = torch.rand(1, 1, 4, 4, 6)
    cut, roll, flip = (change(x, kind) for kind in ("cut", "roll", "flip"))
    assert torch.equal(cut[..., :3], x[..., :3])
    assert (cut[..., 3:] == x.min()).all()
    assert torch.equal(roll[..., 0], x[..., 3])
    assert torch.equal(flip[..., 0], x[..., 5])


def test_too_likely_counts_as_atypical():
    bits = {"val": [1.0, 1.1, 0.9, 1.05], "simple": [0.1, 0.2, 0.15]}
    rows = {
        f"{name}{i}": {"set": name, "bits_per_dimension": v}
        for name, values in bits.items()
        for i, v in enumerate(values)
    }
    found = figures(rows, list(bits), 20)["simple"]
    assert found["auc_unlikely"]["value"] == 0
    assert found["auc_atypical"]["value"] == 1


def test_the_command_compares_the_sets_that_it_is_asked_for(conditional_run, heads, tmp_path, monkeypatch):
    asked, whole = [], likelihood.log_likelihood

    def watched(kernel, model, z, times, probes):
        asked.append((len(z), len(times), len(probes)))
        return whole(kernel, model, z, times, probes)

    monkeypatch.setattr(likelihood, "log_likelihood", watched)
    flags = "--changes flip,cut --steps 3 --subset 2 --resamples 5 --batch_size 2".split()
    words = ["likelihood", str(conditional_run), "--data", str(heads / "images"), *flags]
    main([*words, "--out", str(tmp_path / "a")])
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["sets"]) == ["val", "flip", "cut", "data"]
    assert {row["bits_per_dimension"]["cases"] for row in report["sets"].values()} == {2}
    assert asked == [(2, 4, 60)] * 4  # latents of 3 x 4 x 5 numbers: the exact trace
    asked.clear()
    main([*words, "--probes", "2", "--batch_size", "1", "--seed", "1", "--out", str(tmp_path / "b")])
    assert asked == [(1, 4, 2)] * 8
    a, b = ((tmp_path / name / "cases.csv").read_text() for name in ("a", "b"))
    assert a != b
