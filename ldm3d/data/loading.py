"""One file of a case, onto the training grid.

The training grid is the grid of the file, or what `data.spacing` (voxels of one size) or `data.resize`
(volumes of one shape) make of it. All later steps, such as windows and scaling, work on that grid.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .geometry import resample, resampled_grid
from .settings import DataConfig
from .volumes import Header, Volume, read, read_header


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
