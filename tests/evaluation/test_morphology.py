"""Components, holes and thresholds are scipy's and scikit-image's; lengths are those of known shapes."""

import math

import numpy as np
import pytest

from ldm3d.evaluation.morphology import (
    fill_holes,
    heights_and_widths,
    label_components,
    largest_component,
    orientation,
    otsu_threshold,
    rigid_between,
)

SHAPES = {2: (23, 31), 3: (11, 13, 12)}


def blobs(dims: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(SHAPES[dims]) < density


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("density", [0.2, 0.35, 0.6, 1.0, 0.0])
def test_components_are_those_of_scipy(dims, density):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy (extra test) is not installed")
    for seed in range(5):
        mask = blobs(dims, density, seed)
        expected, num = ndimage.label(mask)
        labels = label_components(mask)
        assert labels.max() == num
        assert len(np.unique(np.stack([labels[mask], expected[mask]], 1), axis=0)) == num  # one to one
        assert not labels[~mask].any()


def test_a_spiral_is_one_component():
    spiral = np.zeros((15, 15), dtype=bool)
    for k in range(0, 7, 2):
        spiral[k, k : 15 - k] = spiral[k : 15 - k, 14 - k] = spiral[14 - k, k : 15 - k] = True
        spiral[k + 2 : 15 - k, k] = True
        spiral[k + 2, k : k + 3] = True
    assert label_components(spiral).max() == 1
    assert largest_component(spiral).sum() == spiral.sum()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_largest_component_has_most_voxels_and_nothing_stays_nothing(dims):
    mask = np.zeros(SHAPES[dims], dtype=bool)
    mask[1:3, 1:3], mask[5:9, 2:8] = True, True
    largest = largest_component(mask)
    assert not largest[:4].any()
    assert largest[5:9, 2:8].all()
    assert not largest_component(np.zeros(SHAPES[dims], dtype=bool)).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_holes_are_filled_as_by_scipy(dims):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy (extra test) is not installed")
    for seed in range(5):
        mask = blobs(dims, 0.6, seed)
        assert np.array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_the_threshold_is_scikit_images():
    filters = pytest.importorskip("skimage.filters", reason="scikit-image (extra test) is not installed")
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(10, 6, 3000), draw.normal(40, 9, 3000)]).astype(np.float32)
    assert otsu_threshold(values) == pytest.approx(filters.threshold_otsu(values), rel=1e-5)


@pytest.mark.parametrize("value", [0, 7.5, -3])
def test_what_has_one_value_has_no_threshold(value):
    assert math.isnan(otsu_threshold(np.full((4, 5), value, np.float32)))


# --- lengths ------------------------------------------------------------------------------------------------


def test_height_and_widths_of_a_triangle_and_a_box_are_known():
    rows, columns = np.mgrid[:40, :60]
    triangle = (rows < 40) & (np.abs(columns - 30) * 2 <= rows)  # a tip at the top, 39 wide at the base
    found = heights_and_widths(triangle, (2.0, 0.5), axis=0)
    assert found["height"] == 80
    assert [found[f"width_{q}"] for q in (25, 50, 75)] == pytest.approx([5.5, 10.5, 15.5], abs=0.6)
    box = np.zeros((20, 20, 20), dtype=bool)
    box[3:9, 4:14, 5:17] = True
    found = heights_and_widths(box, (1, 2, 3), axis=2)
    assert found["height"] == 36
    assert {found[f"width0_{q}"] for q in (25, 50, 75)} == {6}
    assert {found[f"width1_{q}"] for q in (25, 50, 75)} == {20}
    empty = heights_and_widths(np.zeros((4, 4), dtype=bool), (1, 1), axis=0)
    assert all(math.isnan(v) for v in empty.values())


def tilted(
    degrees: float, centre: tuple[float, float] = (40, 40), size: tuple[int, int] = (60, 20)
) -> np.ndarray:
    """An ellipse of these lengths, its long axis turned from the rows' axis."""
    r, c = (v - m for v, m in zip(np.mgrid[:80, :80], centre, strict=True))
    a = math.radians(degrees)
    along, across = r * math.cos(a) + c * math.sin(a), c * math.cos(a) - r * math.sin(a)
    return (2 * along / size[0]) ** 2 + (2 * across / size[1]) ** 2 <= 1


@pytest.mark.parametrize("degrees", [0, 20, 50])
def test_upright_heights_do_not_depend_on_the_tilt(degrees):
    found = heights_and_widths(tilted(degrees), (1, 1), axis=0, upright=True)
    assert found["height"] == pytest.approx(60, abs=2)
    assert found["width_50"] == pytest.approx(20, abs=2)
    assert found["width_25"] == pytest.approx(20 * math.sqrt(0.75), abs=2)


def test_the_orientation_is_scikit_images():
    measure = pytest.importorskip("skimage.measure", reason="scikit-image (extra test) is not installed")
    mask = tilted(33, (35, 42))
    region = measure.regionprops(mask.astype(int))[0]
    centre, axes, spread = orientation(mask, (1, 1))
    assert centre == pytest.approx(region.centroid)
    angle = math.atan2(axes[0][1], axes[0][0])
    assert math.sin(angle - region.orientation) == pytest.approx(0, abs=1e-6)
    assert 4 * spread[0] == pytest.approx(region.axis_major_length, rel=1e-2)


def test_the_rigid_motion_between_two_masks_is_recovered():
    fixed, moving = tilted(10, (40, 40)), tilted(35, (44, 37))
    turn, shift = rigid_between(moving, fixed, (1, 1), rotate=True)
    assert turn @ np.array([40, 40]) + shift == pytest.approx([44, 37], abs=0.3)
    assert math.degrees(math.acos(turn[0, 0])) == pytest.approx(25, abs=1)
    assert np.linalg.det(turn) == pytest.approx(1)
    only, _ = rigid_between(moving, fixed, (1, 1), rotate=False)
    assert np.array_equal(only, np.eye(2))
    disc = tilted(0, size=(30, 30))
    assert np.array_equal(rigid_between(disc, tilted(30, size=(31, 30)), (1, 1), rotate=True)[0], np.eye(2))
