"""The autoencoder's losses equal torch.distributions and brute-force differences, sample by sample."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm3d.losses import gradient_loss, kl_per_element, reconstruction_loss

SHAPES = {2: (3, 2, 9, 8), 3: (3, 2, 9, 8, 5)}


@pytest.fixture(params=[2, 3], ids="{}d".format)
def pair(request):
    generator = torch.Generator().manual_seed(request.param)
    return tuple(
        torch.randn(SHAPES[request.param], dtype=torch.float64, generator=generator) for _ in range(2)
    )


def test_kl_is_that_of_torch_distributions_in_nats_per_element(pair):
    mean, logvar = pair
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl_per_element(mean, logvar), expected, rtol=1e-10, atol=1e-10)


def test_kl_is_zero_for_a_standard_normal_and_keeps_its_gradient_when_it_is_huge():
    zeros = torch.zeros(1, 2, 3, 3)
    assert kl_per_element(zeros, zeros).item() == 0
    mean = torch.full((1, 2, 3, 3), 1e3, requires_grad=True)
    kl_per_element(mean, zeros).sum().backward()
    torch.testing.assert_close(mean.grad, torch.full_like(mean, 1e3 / mean.numel()))


def test_kl_of_a_tiny_difference_survives_float32():
    logvar = torch.full((1, 1, 4, 4), 1e-3)
    expected = (torch.expm1(logvar.double()) - logvar.double()).mean() / 2
    torch.testing.assert_close(
        kl_per_element(torch.zeros_like(logvar), logvar)[0].double(), expected, rtol=1e-3, atol=0
    )


def test_reconstruction_loss_is_the_mean_error_of_each_sample(pair):
    recon, x = pair
    for kind, reduce in (("l1", torch.nn.functional.l1_loss), ("l2", torch.nn.functional.mse_loss)):
        expected = torch.stack([reduce(a, b) for a, b in zip(recon, x, strict=True)])
        torch.testing.assert_close(reconstruction_loss(recon, x, kind), expected, rtol=1e-12, atol=1e-12)


def brute_force_gradient_loss(recon, x, num_scales):
    """One sample (C, *S): loops over scales, axes and neighbours."""
    terms = []
    for _ in range(num_scales):
        for axis in range(1, x.ndim):
            steps = range(x.shape[axis] - 1)
            differ = [
                (recon.select(axis, i + 1) - recon.select(axis, i))
                - (x.select(axis, i + 1) - x.select(axis, i))
                for i in steps
            ]
            terms.append(torch.stack(differ).abs().mean())
        for axis in range(1, x.ndim):
            if x.shape[axis] >= 4:
                even = x.shape[axis] // 2 * 2
                recon, x = (
                    (v.narrow(axis, 0, even).unfold(axis, 2, 2).mean(-1) if v.shape[axis] >= 4 else v)
                    for v in (recon, x)
                )
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_gradient_loss_is_the_brute_force_sum_over_axes_and_scales(pair, num_scales):
    recon, x = pair
    expected = torch.stack(
        [brute_force_gradient_loss(a, b, num_scales) for a, b in zip(recon, x, strict=True)]
    )
    if num_scales == 3:  # the axis of 5 voxels is halved once only, the others twice
        assert min(x.shape[2:]) in (5, 8)
    torch.testing.assert_close(gradient_loss(recon, x, num_scales), expected, rtol=1e-12, atol=1e-12)


def test_gradient_loss_ignores_an_offset_and_sees_the_blur_that_keeps_the_mean_error(pair):
    _, x = pair
    assert gradient_loss(x + 3, x).abs().max() < 1e-12
    edge = (torch.arange(16) >= 8).double().expand(1, 1, 16, 16)
    shifted = edge + 0.125  # the same mean absolute error as a blurred edge, but sharp
    blurred = edge.clone()
    blurred[..., 6:10] = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(reconstruction_loss(shifted, edge), reconstruction_loss(blurred, edge))
    assert gradient_loss(blurred, edge) > gradient_loss(shifted, edge) + 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3, 1), (1, 1, 1)])
def test_gradient_loss_of_flat_and_tiny_images_is_finite(size):
    x = torch.randn(2, 1, *size)
    loss = gradient_loss(torch.zeros_like(x), x)
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_half_precision_inputs_are_reduced_in_float32():
    x = torch.randn(2, 1, 32, 32).bfloat16()
    for loss in (reconstruction_loss(x * 0, x, "l2"), gradient_loss(x * 0, x), kl_per_element(x, x)):
        assert loss.dtype == torch.float32
    assert torch.equal(
        reconstruction_loss(x * 0, x, "l2"), reconstruction_loss(x.float() * 0, x.float(), "l2")
    )
