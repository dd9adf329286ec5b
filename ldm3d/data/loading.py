"""One file of a case onto the training grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .settings import DataConfig
from .volumes import Header, Volume, read, read_header, resample


def load_role(path: Path, role: str, config: DataConfig) -> Volume:
    """The whole volume of a role on the training grid: float32 in the file's units, or int32 labels of a
    mask."""
    volume = read(path, **read_options(role, config))
    if role == "mask":
        values = np.rint(volume.array).astype(np.int32)  # files with a slope read as 0.9999999
        labels = np.zeros_like(values)
        for label, value in enumerate(config.label_values):
            labels[values == value] = label
        volume = replace(volume, array=labels if config.label_values else values)
    spacing = _new_spacing(volume.shape, volume.spacing, config)
    return volume if spacing is None else resample(volume, spacing, labels=role == "mask")


def read_options(role: str, config: DataConfig) -> dict[str, Any]:
    """How the files of a role are read."""
    channel = {"image": config.channel, "source": config.source_channel, "mask": ()}[role] or None
    return {"channel": channel, "spacing": config.file_spacing, "dims": config.dims}


def _new_spacing(
    shape: tuple[int, ...], spacing: tuple[float, ...], config: DataConfig
) -> tuple[float, ...] | None:
    """Of the training grid, mm; None if the file's grid stays. A stretched case keeps its field of view."""
    if config.resize:
        wanted = tuple(n * d / m for n, d, m in zip(shape, spacing, config.size, strict=True))
    else:
        wanted = config.spacing or spacing
    return None if np.allclose(wanted, spacing, rtol=1e-4, atol=0) else wanted


def keeps_grid(path: Path, role: str, config: DataConfig) -> bool:
    """Is the training grid of a file its own?"""
    header = read_header(path, **read_options(role, config))
    return _new_spacing(header.shape, header.spacing, config) is None


def training_grid(
    header: Header, config: DataConfig
) -> tuple[tuple[int, ...], tuple[float, ...], np.ndarray]:
    """Shape, spacing and affine of the training grid, from the header alone: those of what `load_role`
    returns."""
    spacing = _new_spacing(header.shape, header.spacing, config)
    if spacing is None:
        return header.shape, header.spacing, header.affine
    ratios = np.asarray(spacing) / header.spacing
    shape = tuple(max(1, round(n / ratio)) for n, ratio in zip(header.shape, ratios, strict=True))
    affine = header.affine.copy()
    affine[:-1, :-1] *= ratios
    affine[:-1, -1] += header.affine[:-1, :-1] @ ((ratios - 1) / 2)  # the first voxel's outer corner stays
    return shape, spacing, affine
