"""Windows and grids: cut a box out of a volume, or put the volume on voxels of another size.

A window may reach beyond its volume: there it repeats the edge voxels. Cutting at `start` moves the origin of
the affine to the world position of voxel `start`. Resampling from voxels of s mm to voxels of s' mm keeps the
outer corner of the first voxel, so that

    new index i' lies at old index (i' + 1/2) s' / s - 1/2

Example: 10 voxels of 1 mm reach from -0.5 mm to 9.5 mm. On voxels of 2.5 mm they become 4, whose centres lie
at 0.75, 3.25, 5.75 and 8.25 mm, again from -0.5 mm to 9.5 mm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..config import InputError
from .volumes import Volume, affine_spacing

# --- windows ------------------------------------------------------------------------------------------------


def centred(shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """First voxel of the window of `size` in the middle of `shape`; negative where the window is larger."""
    return tuple((n - m) // 2 for n, m in zip(shape, size, strict=True))


def cut(array: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """The window (C, *size) of an array (C, *S) from voxel `start` on; outside, the edge is repeated.

    array: or a volume of loading.py or prepared.py, of which no more is read than the window."""
    inside = [slice(max(0, s), max(0, s + m)) for s, m in zip(start, size, strict=True)]
    window = array[(slice(None), *inside)]
    before = [max(0, -s) for s in start]
    after = [m - b - n for m, b, n in zip(size, before, window.shape[1:], strict=True)]
    return np.pad(window, [(0, 0), *zip(before, after, strict=True)], mode="edge")


def crop_or_pad(volume: Volume, start: tuple[int, ...], size: tuple[int, ...]) -> Volume:
    """`cut` for a volume, whose affine moves along. InputError if the window misses the volume."""
    for first, length, extent in zip(start, size, volume.shape, strict=True):
        if max(first, 0) >= min(first + length, extent):
            raise InputError(f"the box at {start} of size {size} misses the volume of shape {volume.shape}")
    affine = volume.affine.copy()
    affine[:-1, -1] += affine[:-1, :-1] @ np.asarray(start, dtype=np.float64)
    return replace(volume, array=cut(volume.array, start, size), affine=affine)


# --- grids --------------------------------------------------------------------------------------------------


def resampled_grid(
    shape: tuple[int, ...], affine: np.ndarray, spacing: tuple[float, ...]
) -> tuple[tuple[int, ...], np.ndarray]:
    """The same field of view on voxels of `spacing` mm, as (shape, affine).

    An axis gets max(1, round(extent / spacing)) voxels. Spacing and the outer corner of the first voxel are
    exact, so that the far end may move by half a new voxel.
    """
    ratios = np.asarray(spacing, dtype=np.float64) / affine_spacing(affine)
    grid = affine.copy()
    grid[:-1, :-1] *= ratios
    grid[:-1, -1] += affine[:-1, :-1] @ ((ratios - 1) / 2)
    return tuple(max(1, round(n / ratio)) for n, ratio in zip(shape, ratios, strict=True)), grid


def _taps(start: int, stop: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """For the samples start .. stop - 1, `ratio` old voxels apart: the old voxels that each of them is made
    of, and their weights, both (samples, taps). Old voxels may lie outside the volume.

    Linear interpolation; where the grid gets coarser (ratio > 1), the mean of the interpolated values over a
    width of ratio - 1 old voxels, so that fine detail is averaged and not aliased. A linear ramp stays the
    same ramp, so structures stay where they are.
    """
    centres, half = (np.arange(start, stop) + 0.5) * ratio - 0.5, max(0.0, ratio - 1) / 2
    num_taps = int(np.floor(2 * (1 + half))) + 1
    taps = np.floor(centres - 1 - half).astype(int)[:, None] + 1 + np.arange(num_taps)
    offset = centres[:, None] - taps
    if half > 1e-6:  # the integral of max(0, 1 - |u|) from -1 to u is 1/2 + u - u |u| / 2
        upper, lower = (np.clip(offset + side, -1, 1) for side in (half, -half))
        weights = (upper - upper * np.abs(upper) / 2 - lower + lower * np.abs(lower) / 2) / (2 * half)
    else:
        weights = np.clip(1 - np.abs(offset), 0, None)
    return taps, weights


def _weighted(array: np.ndarray, axis: int, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Along one axis of an array the weighted sums of the voxels `taps` (samples, taps)."""
    size, column = len(taps), [1] * array.ndim
    column[axis] = size
    out = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), dtype=array.dtype)
    for tap in range(taps.shape[1]):
        weight = weights[:, tap].astype(array.dtype).reshape(column)
        # `where`, because 0 * NaN is NaN: a NaN spreads to the voxels that weigh it, and to no others
        out += np.where(weight > 0, weight * array.take(taps[:, tap], axis), 0)
    return out


def _resample_axis(array: np.ndarray, axis: int, size: int, ratio: float, is_mask: bool) -> np.ndarray:
    """One axis of an array onto `size` samples, `ratio` old voxels apart; outside, the edge is repeated.
    Masks: the nearest voxel. Images: `_taps`."""
    last = array.shape[axis] - 1
    if is_mask:
        edges = np.arange(size) + 0.5
        return array.take(np.clip(np.floor(edges * ratio).astype(int), 0, last), axis)
    taps, weights = _taps(0, size, ratio)
    return _weighted(array, axis, taps.clip(0, last), weights)


def resampled_planes(
    read: Callable[[int, int], np.ndarray],
    shape: tuple[int, ...],
    ratios: Sequence[float],
    start: int,
    stop: int,
) -> np.ndarray:
    """Planes start .. stop - 1, along the first axis, of what `resample` makes of an image of `shape`.

    read(first, last) gives planes first .. last - 1 of the image, (C, planes, ...). ratios: new spacing / old
    spacing of each axis.
    """
    if abs(ratios[0] - 1) > 1e-6:
        taps, weights = _taps(start, stop, ratios[0])
        taps = taps.clip(0, shape[0] - 1)
        first = taps.min()
        array = _weighted(read(first, taps.max() + 1), 1, taps - first, weights)
    else:
        array = read(start, stop)
    for axis, (n, ratio) in enumerate(zip(shape, ratios, strict=True)):
        if axis > 0 and abs(ratio - 1) > 1e-6:
            array = _resample_axis(array, axis + 1, max(1, round(n / ratio)), ratio, is_mask=False)
    return array


def resample(volume: Volume, spacing: tuple[float, ...], is_mask: bool = False) -> Volume:
    """The volume on the `resampled_grid` of `spacing` mm; images become float32, masks keep their dtype.

    Images: linear interpolation, averaged where the grid gets coarser; masks: the nearest voxel.
    """
    if len(spacing) != volume.dims or min(spacing) <= 0:
        raise InputError(f"spacing {tuple(spacing)}, expected {volume.dims} positive numbers (mm)")
    shape, affine = resampled_grid(volume.shape, volume.affine, spacing)
    array = volume.array if is_mask else volume.array.astype(np.float32)
    for axis, ratio in enumerate(np.asarray(spacing, dtype=np.float64) / volume.spacing):
        if abs(ratio - 1) > 1e-6:
            array = _resample_axis(array, axis + 1, shape[axis], ratio, is_mask)
    return replace(volume, array=array, affine=affine)
