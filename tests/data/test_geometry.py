"""Windows and grids keep every voxel's value and its position in the world."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import world_image

from ldm3d.config import InputError
from ldm3d.data import Volume, read
from ldm3d.data.geometry import crop_or_pad, resample
from ldm3d.data.volumes import spacing_affine


@pytest.mark.parametrize("dims", [2, 3])
def test_cropping_and_padding_repeat_the_edge_and_move_the_affine(dims: int) -> None:
    affine = spacing_affine((2.0, 0.5, 3.0)[:dims])
    volume = Volume(np.random.default_rng(0).random((2, 6, 7, 8)[: dims + 1]), affine)
    start, size = (-2, 3, 1)[:dims], (9, 9, 4)[:dims]
    box = crop_or_pad(volume, start, size)
    index = [
        np.clip(np.arange(s, s + n), 0, extent - 1)
        for s, n, extent in zip(start, size, volume.shape, strict=True)
    ]
    assert np.array_equal(box.array, volume.array[np.ix_(range(2), *index)])
    assert np.allclose(box.affine[:-1, -1], np.array(start) * volume.spacing)
    back = crop_or_pad(box, tuple(-s for s in start), volume.shape)
    assert np.allclose(back.affine, affine)
    with pytest.raises(InputError, match="misses"):
        crop_or_pad(volume, (6,) * dims, (2,) * dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_refining_the_grid_is_linear_interpolation(dims: int) -> None:
    array = np.random.default_rng(1).random((2, 9, 7, 5)[: dims + 1], dtype=np.float32)
    spacing, fine = (1.0, 2.0, 3.0)[:dims], (0.7, 2.0, 1.25)[:dims]
    out = resample(Volume(array, spacing_affine(spacing)), fine)
    assert out.shape == tuple(
        round(n * a / b) for n, a, b in zip(array.shape[1:], spacing, fine, strict=True)
    )
    # grid_sample over the same world positions
    world = world_image(out.shape, out.affine)
    grid = torch.tensor((2 * world / spacing + 1) / array.shape[1:] - 1, dtype=torch.float32).flip(-1)
    expected = F.grid_sample(
        torch.tensor(array)[None], grid[None], padding_mode="border", align_corners=False
    )
    assert np.allclose(out.array, expected[0].numpy(), atol=1e-5)


def test_coarsening_the_grid_averages_the_linear_interpolant() -> None:
    values = np.random.default_rng(2).random(60)
    out = resample(Volume(values[None, :, None], spacing_affine((1.0, 1.0))), (2.6, 1.0))
    centres = world_image(out.shape, out.affine)[:, 0, 0]
    box = np.linspace(-0.8, 0.8, 4001)  # 2.6 - 1 wide
    expected = [np.interp(centre + box, np.arange(60), values).mean() for centre in centres]
    assert np.allclose(out.array[0, :, 0], expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("spacing", [(0.6, 1.7, 1.0), (2.3, 0.9, 1.0)])
def test_resampled_labels_are_the_nearest_ones_exactly(dtype: type, spacing: tuple[float, ...]) -> None:
    array = np.random.default_rng(3).integers(0, 5, (1, 11, 9, 4)).astype(dtype)
    out = resample(Volume(array, spacing_affine((1.0, 1.0, 1.0))), spacing, is_mask=True)
    nearest = np.rint(world_image(out.shape, out.affine) - 1e-9).astype(int)
    nearest = tuple(np.clip(nearest[..., a], 0, array.shape[a + 1] - 1) for a in range(3))
    assert out.array.dtype == dtype
    assert np.array_equal(out.array[0], array[0][nearest])


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (1.7, 3.0), (9.0, 0.3)])
def test_resampling_keeps_the_outer_corner_of_the_first_voxel(spacing: tuple[float, ...]) -> None:
    volume = Volume(np.zeros((1, 13, 10)), spacing_affine((1.0, 1.2)))
    out = resample(volume, spacing)
    corner = [-0.5, -0.5, 1]
    assert np.allclose(out.affine @ corner, volume.affine @ corner)
    assert np.allclose(out.spacing, spacing)


def test_a_nan_voxel_is_read_and_spreads_no_further_than_its_neighbours(tmp_path: Path) -> None:
    array = np.ones((12, 12, 12), dtype=np.float32)
    array[6, 6, 6] = np.nan
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "nan.nii")
    volume = read(tmp_path / "nan.nii")
    assert np.isnan(volume.array).sum() == 1
    assert np.isnan(resample(volume, (0.5, 0.5, 0.5)).array).sum() == 4**3
    with pytest.raises(InputError, match="nan"):
        read(tmp_path / "nan.nii", dtype=np.uint8)
