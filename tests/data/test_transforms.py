"""Scaling puts two values at -1 and 1; augmentation moves image, source and mask alike, rigidly in mm."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import EVERY_CHANGE

from ldm3d.data import AugmentConfig
from ldm3d.data.transforms import augment, scale, scaling_numbers, unscale
from ldm3d.engine.distributed import keyed_generator

# --- scaling ------------------------------------------------------------------------------------------------


def test_zscore_is_over_the_foreground_and_the_background_need_not_be_zero():
    rng = np.random.default_rng(0)
    inside = rng.normal(3, 2, 4000)
    low, high = scaling_numbers(np.concatenate([np.full(6000, -0.7), inside]), "zscore", (0, 100), (0, 1))
    x = scale(inside[None].astype(np.float32), (low,), (high,), clip=False)
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("minmax", 2, 30), ("window", -5, 25), ("none", -1, 1), ("percentile", 2, 30)]
)
def test_the_other_scalings_put_their_two_values_at_minus_one_and_one(kind, low, high):
    values = np.linspace(2, 30, 1000)
    assert scaling_numbers(values, kind, (0, 100), (-5, 25)) == pytest.approx((low, high))


def test_an_image_of_few_values_is_scaled_by_its_whole_range():
    values = np.zeros(1000)
    values[7] = 3.0  # both percentiles are 0
    assert scaling_numbers(values, "percentile", (0.5, 99.5), (0, 1)) == (0, 3)


def test_the_percentile_example_of_the_docstring_holds():
    values = np.concatenate([np.linspace(20, 1020, 199), [0.0], [3000.0]])
    low, high = scaling_numbers(values, "percentile", (0.5, 99.5), (0, 1))
    assert (low, high) == pytest.approx((20, 1020))
    x = scale(np.array([[520.0, 770.0, 3000.0]], dtype=np.float32), (low,), (high,), clip=True)
    assert x.tolist() == [[0.0, 0.5, 1.0]]


def test_unscale_inverts_scale_per_channel():
    v = np.random.default_rng(0).normal(1000, 300, (2, 4, 5)).astype(np.float32)
    x = scale(v, (200.0, 0.0), (1800.0, 5000.0), clip=False)
    np.testing.assert_allclose(x[0], 2 * (v[0] - 200) / 1600 - 1, atol=1e-5)
    np.testing.assert_allclose(unscale(x, (200.0, 0.0), (1800.0, 5000.0), False), v, rtol=1e-5)


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_image_source_and_mask_are_moved_alike_and_labels_stay_integers(dims):
    labels = torch.randint(0, 2, (5,) * dims, generator=torch.Generator().manual_seed(0))
    labels = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels = labels.repeat_interleave(4, 2) if dims == 3 else labels
    image = labels[None].float()
    config = replace(EVERY_CHANGE, flip_axes=tuple(range(dims)), intensity=0.0)
    changed = 0
    for position in range(6):
        draw = keyed_generator(0, position, "augment")
        (x, y), mask, _ = augment([image, image.clone()], labels, torch.ones(dims), config, draw)
        assert torch.equal(x, y)
        assert mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= {0, 1}
        flat = (x[0] - x[0].round()).abs() < 1e-4  # away from borders linear and nearest agree
        assert torch.equal(x[0].round().long()[flat], mask[flat])
        assert flat.float().mean() > 0.05
        changed += not torch.equal(mask, labels)
    assert changed == 6
    config = replace(config, affine=0.0, elastic=0.0)
    (x,), mask, _ = augment([image], labels, torch.ones(dims), config, keyed_generator(0, 1, "augment"))
    assert torch.equal(x[0].long(), mask)


def test_a_rotation_is_rigid_in_millimetres_on_anisotropic_voxels():
    size, spacing = (60, 40, 20), torch.tensor([1.0, 2.0, 4.0])
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing.tolist(), strict=True)]
    world = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # mm from the centre
    centre = torch.tensor([12.0, -8.0, 10.0])
    ball = torch.exp(-(world - centre.view(3, 1, 1, 1)).square().sum(0) / (2 * 7.0**2))
    config = AugmentConfig(affine=1.0, max_rotation=40.0, max_scale=0.0, max_shift=0.0)
    for position in range(4):
        (x,), _, _ = augment([ball[None]], None, spacing, config, keyed_generator(0, position, "augment"))
        where = (world * x[0]).sum((1, 2, 3)) / x.sum()
        variance = ((world - where.view(3, 1, 1, 1)).square() * x[0]).sum((1, 2, 3)) / x.sum()
        assert float(where.norm()) == pytest.approx(float(centre.norm()), rel=0.03)
        assert (where - centre).norm() > 1
        torch.testing.assert_close(variance.sqrt(), torch.full((3,), 7.0), rtol=0.08, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_shift_is_uniform_up_to_max_shift_of_the_patch(dims):
    size = (40, 60, 50)[:dims]
    ramps = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    middle = (slice(None), *(slice(n // 2, n // 2 + 1) for n in size))  # off the edge, which is repeated
    config = AugmentConfig(affine=1.0, max_rotation=0.0, max_scale=0.0, max_shift=0.2)
    shifts = []
    for position in range(60):
        draw = keyed_generator(0, position, "augment")
        (x,), _, _ = augment([ramps], None, torch.ones(dims), config, draw)
        shifts.append((x - ramps)[middle].flatten() / torch.tensor(size))
    shifts = torch.stack(shifts)  # as fractions of the patch
    assert shifts.abs().max() <= 0.2 + 1e-4
    assert (shifts.abs().amax(0) > 0.18).all()
    torch.testing.assert_close(shifts.std(0), torch.full((dims,), 0.4 / 12**0.5), rtol=0.25, atol=0)


def test_a_scaling_is_up_to_max_scale_and_alike_along_all_axes():
    size = (31, 41)
    world = torch.stack(torch.meshgrid(*(torch.arange(float(n)) - n // 2 for n in size), indexing="ij"))
    config, factors = AugmentConfig(affine=1.0, max_rotation=0.0, max_scale=0.3, max_shift=0.0), []
    for position in range(40):
        draw = keyed_generator(0, position, "augment")
        (x,), _, _ = augment([world], None, torch.ones(2), config, draw)
        along = x[0, 18, 20] / world[0, 18, 20], x[1, 15, 24] / world[1, 15, 24]
        assert float(along[0]) == pytest.approx(float(along[1]), abs=1e-4)
        factors.append(1 / float(along[0]) - 1)  # a voxel 3 from the middle shows what was 3 / factor from it
    assert 0.25 < max(map(abs, factors)) <= 0.3 + 1e-4


def test_an_elastic_deformation_moves_voxels_by_up_to_max_elastic_of_the_patch():
    size, moved = (48, 64), []
    ramps = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    config = AugmentConfig(elastic=1.0, max_elastic=0.1)
    for position in range(20):
        (x,), _, _ = augment([ramps], None, torch.ones(2), config, keyed_generator(0, position, "augment"))
        inner = (x - ramps)[:, 10:-10, 10:-10].flatten(1) / torch.tensor(size)[:, None]
        moved.append(inner.abs().amax(1))
    most = torch.stack(moved).amax(0)
    assert (most <= 0.1 + 1e-4).all()
    assert (most > 0.08).all()


def test_intensity_is_one_gain_and_bias_for_all_images_within_the_bounds():
    image, source = torch.rand(2, 5, 6), torch.rand(1, 5, 6)
    config, found = AugmentConfig(intensity=1.0, max_gain=0.3, max_bias=0.2), []
    for position in range(40):
        draw = keyed_generator(0, position, "augment")
        (x, y), _, _ = augment([image, source], None, torch.ones(2), config, draw)
        gain = float((y[0, 0, 1] - y[0, 0, 0]) / (source[0, 0, 1] - source[0, 0, 0]))
        bias = float(y[0, 0, 0] - gain * source[0, 0, 0])
        torch.testing.assert_close(x, gain * image + bias, rtol=0, atol=1e-3)
        found.append((abs(gain - 1), abs(bias)))
    gains, biases = zip(*found, strict=True)
    assert 0.25 < max(gains) <= 0.3 + 1e-3
    assert 0.17 < max(biases) <= 0.2 + 1e-3


def test_a_quarter_turn_of_anisotropic_voxels_turns_the_spacing_too():
    config, x = AugmentConfig(rot90_axes=(0, 2)), torch.rand(1, 6, 5, 6)
    for position in range(8):
        (y,), _, spacing = augment(
            [x], None, torch.tensor([1.0, 2, 3]), config, keyed_generator(0, position, "a")
        )
        turned = any(torch.equal(y, x.rot90(k, (1, 3))) for k in (1, 3)) and not torch.equal(y, x)
        assert spacing.tolist() == ([3, 2, 1] if turned else [1, 2, 3])


def test_colour_is_a_gain_and_bias_of_each_channel_of_the_image_alone():
    image, source, config = torch.rand(3, 6, 7), torch.rand(1, 6, 7), AugmentConfig(colour=1.0)
    draw = keyed_generator(0, 3, "augment")
    (x, y), _, _ = augment([image, source], None, torch.ones(2), config, draw)
    assert torch.equal(y, source)
    gains = (x[:, 0, 1] - x[:, 0, 0]) / (image[:, 0, 1] - image[:, 0, 0])
    bias = x[:, 0, 0] - gains * image[:, 0, 0]
    assert torch.allclose(x, gains.view(3, 1, 1) * image + bias.view(3, 1, 1), atol=1e-4)
    assert len(set(gains.tolist())) == 3
    assert (gains - 1).abs().max() <= 0.1 + 1e-4
    assert 0 < bias.abs().max() <= 0.1 + 1e-4
