"""Folders of small volumes, and what tests of the data do with them."""

import time

import nibabel as nib
import numpy as np
import pytest
import torch

from ldm3d.config import InputError
from ldm3d.data import AugmentConfig, DataConfig, open_data

OBLIQUE = np.array(
    [[-1.8, 0.3, 0.1, 30.0], [0.2, -1.1, 0.4, -20.0], [0.1, 0.5, 2.4, 10.0], [0, 0, 0, 1.0]]
)  # LPS


ROLES = {"image": "images/*.nii.gz", "mask": "labels/*.nii.gz", "source": "sources/*.nii.gz"}
SHAPE = (8, 9, 7)
EVERY_CHANGE = AugmentConfig(
    flip_axes=(0, 1, 2),
    rot90_axes=(0, 1),
    affine=1.0,
    elastic=1.0,
    intensity=1.0,
    max_rotation=30,
    max_elastic=0.1,
)


def save(path, array, affine=None):
    """Writes a NIfTI file, by default with voxels of 1 mm in RAS order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def make_folder(root, num=6, size=(11, 12, 9), affine=None, masks=True):
    """images/, sources/, labels/ with `num` cases of slightly different shapes."""
    rng = np.random.default_rng(0)
    for i in range(num):
        shape = tuple(n + (i + axis) % 3 for axis, n in enumerate(size))
        save(
            root / f"images/case_{i}.nii.gz", rng.normal(100 * (i + 1), 20, shape).astype(np.float32), affine
        )
        save(root / f"sources/case_{i}.nii.gz", rng.gamma(2, 50, shape).astype(np.float32), affine)
        if masks:
            save(root / f"labels/case_{i}.nii.gz", rng.integers(0, 4, shape, dtype=np.uint8), affine)
    return root


def opened(config, **kwargs):
    """`open_data` with the split of seed 0."""
    return open_data(config, "none", seed=0, **kwargs)


def equal(a, b):
    """Are two items equal in every entry?"""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def image(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def mask(shape=SHAPE):
    return np.random.default_rng(1).integers(0, 3, shape, dtype=np.uint8)


def fresh_settings(fresh, **changes):
    """The settings of the fixture `fresh`."""
    options = {
        "image": "images/*.nii.gz",
        "mask": "labels/*.nii.gz",
        "cache_dir": str(fresh.parent / "cache"),
    }
    return DataConfig(root=str(fresh), **(options | changes))


def refused(config, *parts):
    """open_data must fail within a second of computing, in one line that holds all `parts`."""
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        open_data(config, "heads", seed=0)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def oblique_affine(codes: str, spacing: tuple[float, ...], angle: float = 0.3) -> np.ndarray:
    """Axes named by `codes`, then turned by `angle` about two axes, with the spacing of each file axis."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    axes = np.zeros((3, 3))
    for column, code in enumerate(codes):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        axes[row, column] = sign * spacing[column]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ axes, (11.0, -7.5, 40.0)
    return affine


def world_image(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """(*shape, dims): each voxel holds its own position in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:-1, :-1].T + affine[:-1, -1]
