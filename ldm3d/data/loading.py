"""One file of a case, onto the training grid.

The training grid is the grid of the file, or what `data.spacing` (voxels of one size) or `data.resize`
(volumes of one shape) make of it. All later steps, such as windows and scaling, work on that grid.

A data set keeps volumes in the type of their files, and makes float32 of the patch that is cut: a CT of
512 x 512 x 256 voxels of 16 bits takes 128 MiB so, and not 256 MiB. `DecodedVolume` is such a volume in
memory, `PreparedVolume` (prepared.py) one on the disk. Both give values where they are sliced.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.machine import cores_of_rank, free_bytes
from .geometry import resample, resampled_grid
from .settings import DataConfig
from .volumes import Header, NoFile, Volume, read, read_header, read_stored, values_of


def num_reading_threads(num_bytes: float = 0.0) -> int:
    """Threads that read files at a time: one for each core of this rank, at most 8, and no more than half of
    the free memory holds where each needs `num_bytes`."""
    num = min(8, cores_of_rank())
    return max(1, min(num, int(free_bytes(torch.device("cpu")) / 2 / num_bytes))) if num_bytes else num


def read_options(role: str, config: DataConfig) -> dict[str, Any]:
    """The arguments of `volumes.read` for the files of a role."""
    channel = {"image": config.channel, "source": config.source_channel, "mask": ()}[role] or None
    series = {"image": config.series, "source": config.source_series, "mask": None}[role]
    options = {"channel": channel, "spacing": config.file_spacing, "dims": config.dims}
    return options if series is None else options | {"series": series}  # caches are keyed by these options


def _new_spacing(
    shape: tuple[int, ...], spacing: tuple[float, ...], config: DataConfig
) -> tuple[float, ...] | None:
    """Spacing of the training grid in mm; None if the file keeps its grid.

    data.resize keeps the field of view: 100 voxels of 1 mm stretched to data.size 80 have 1.25 mm.
    """
    if config.resize:
        wanted = tuple(n * d / m for n, d, m in zip(shape, spacing, config.size, strict=True))
    else:
        wanted = config.spacing or spacing
    return None if np.allclose(wanted, spacing, rtol=1e-4, atol=0) else wanted


def training_grid(
    header: Header, config: DataConfig
) -> tuple[tuple[int, ...], tuple[float, ...], np.ndarray]:
    """The grid that `load_role` will return, from the header alone: (shape, spacing in mm, affine)."""
    spacing = _new_spacing(header.shape, header.spacing, config)
    if spacing is None:
        return header.shape, header.spacing, header.affine
    shape, affine = resampled_grid(header.shape, header.affine, spacing)
    return shape, spacing, affine


def keeps_grid(path: Path, role: str, config: DataConfig) -> bool:
    """Is the training grid of this file the file's own grid?"""
    header = read_header(path, **read_options(role, config))
    return _new_spacing(header.shape, header.spacing, config) is None


def load_role(path: Path, role: str, config: DataConfig) -> Volume:
    """The whole file on the training grid: float32 intensities as stored, or an int32 mask."""
    volume = read(path, **read_options(role, config))
    if role == "mask":
        values = np.rint(volume.array).astype(np.int32)  # a file with a slope may store 0.9999999
        mask = np.zeros_like(values)
        for label, value in enumerate(config.label_values):
            mask[values == value] = label
        volume = replace(volume, array=mask if config.label_values else values)
    spacing = _new_spacing(volume.shape, volume.spacing, config)
    return volume if spacing is None else resample(volume, spacing, is_mask=role == "mask")


# --- volumes that are kept ----------------------------------------------------------------------------------


def label_type(num_labels: int) -> np.dtype:
    """The type of a label map that is kept."""
    return np.dtype(np.uint8 if num_labels <= 256 else np.int32)


def stored_type(path: Path | NoFile, role: str, config: DataConfig, num_labels: int | None) -> np.dtype:
    """The type of the voxels that `decode` keeps, from the header alone."""
    if role == "mask":
        return label_type(num_labels)
    if isinstance(path, NoFile):
        return np.dtype(np.float32)  # at most: an item may be costly, and is not made for its type alone
    header = read_header(path, **read_options(role, config))
    resampled = _new_spacing(header.shape, header.spacing, config) is not None
    return np.dtype(np.float32) if resampled else header.stored


def values(stored: np.ndarray, slope_inter: tuple[float, float] | None) -> np.ndarray:
    """What `load_role` gives for voxels that are kept: float32 intensities, or labels (slope_inter None)."""
    return stored if slope_inter is None else values_of(stored, slope_inter)


class DecodedVolume:
    """A volume (C, *S) on the training grid, in memory. `volume[:, 3:5, :, 7:9]` are its values there."""

    def __init__(self, stored: np.ndarray, slope_inter: tuple[float, float] | None):
        self.stored, self.slope_inter, self.shape = stored, slope_inter, stored.shape

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        return values(self.stored[window], self.slope_inter)

    @cached_property
    def labelled(self) -> np.ndarray:
        """How many voxels are not 0 in each plane across the first axis of a label map, (D,)."""
        return np.count_nonzero(self.stored[0].reshape(self.shape[1], -1), axis=1)


def decode(path: Path | NoFile, role: str, config: DataConfig, num_labels: int | None) -> DecodedVolume:
    """The whole file on the training grid, as a data set keeps it: in the type of the file, or float32 where
    it is resampled. num_labels: of a mask."""
    if role == "mask":
        labels = load_role(path, role, config).array
        return DecodedVolume(labels.astype(label_type(num_labels)), None)
    if not keeps_grid(path, role, config):
        return DecodedVolume(load_role(path, role, config).array, (1.0, 0.0))
    volume, slope_inter = read_stored(path, **read_options(role, config))
    return DecodedVolume(volume.array, slope_inter)
