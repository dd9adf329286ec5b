"""Intensities from the units of a file to [-1, 1] and back, and random changes of training samples.

**Scaling** is linear, with two numbers per channel: `low` becomes -1, `high` becomes 1.

    x = (v - middle) / half,    middle = (high + low) / 2,    half = (high - low) / 2

Every kind of scaling uses this line. The kinds differ only in where the two numbers come from:

    percentile  two percentiles of the volume, x clipped     minmax   the minimum and maximum of the volume
    window      the setting, such as HU, x clipped           none     -1 and 1, so that x = v
    zscore      mean -+ std of the foreground: x has         dataset  mean -+ std of all voxels of the
                mean 0 and std 1 there                                training set, one pair for all cases

Example, percentile: the values of a volume go from 0 to 3000; half a percent of the voxels lie below 20 and
half a percent above 1020. Then low = 20, high = 1020, middle = 520, half = 500. A voxel of 520 becomes 0, a
voxel of 770 becomes 0.5, and the few bright vessels at 3000 are clipped to 1.

**Augmentation** draws every random number from one generator and moves image, source and mask alike, so that
pairs stay pairs. Rotations are rigid in mm, whatever the spacing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InputError

# --- scaling ------------------------------------------------------------------------------------------------


def _foreground(values: np.ndarray) -> np.ndarray:
    """The voxels without the background, or all voxels if there is no clear background.

    The background is the most frequent value, if more than a tenth of the voxels have exactly this value. The
    background need not be 0: files that were z-scored carry a negative constant there.
    """
    some = values.reshape(-1)[:: max(1, values.size // 100_000)]
    candidates, counts = np.unique(some, return_counts=True)
    inside = values[values != candidates[counts.argmax()]]
    return inside if inside.size < 0.9 * values.size and np.ptp(inside) > 0 else values


def scaling_numbers(
    values: np.ndarray, kind: str, percentiles: tuple[float, float], window: tuple[float, float]
) -> tuple[float, float]:
    """The values of one channel that become -1 and 1: (low, high). Equal if the channel is constant."""
    if kind == "none":
        return -1.0, 1.0
    if kind == "window":
        return window
    low, high = float(values.min()), float(values.max())
    if kind == "percentile":
        a, b = (float(v) for v in np.percentile(values, percentiles))
        return (a, b) if a < b else (low, high)  # an image of few values, such as a mask: the whole range
    if kind == "minmax" or low == high:
        return low, high
    values = _foreground(values) if kind == "zscore" else values
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return mean - std, mean + std


def _middle_half(low: tuple[float, ...], high: tuple[float, ...], ndim: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(v, dtype=np.float64).reshape(-1, *(1,) * (ndim - 1)) for v in (low, high))
    return ((a + b) / 2).astype(np.float32), ((b - a) / 2).astype(np.float32)


def scale(values: np.ndarray, low: tuple[float, ...], high: tuple[float, ...], clip: bool) -> np.ndarray:
    """Values (C, *S) in the units of the file -> x (C, *S) float32. low, high: one number per channel."""
    middle, half = _middle_half(low, high, values.ndim)
    x = (values - middle) / half
    return np.clip(x, -1, 1, out=x) if clip else x


def unscale(x: np.ndarray, low: tuple[float, ...], high: tuple[float, ...], clipped: bool) -> np.ndarray:
    """The inverse of `scale`, except for values that were clipped. `clipped`: x is first cut to [-1, 1]."""
    x = x.clip(-1, 1) if clipped else x
    middle, half = _middle_half(low, high, x.ndim)
    return x * half + middle


# --- augmentation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training samples, the same for image, source and mask; all off by default."""

    flip_axes: tuple[int, ...] = ()  # axes flipped with probability 1/2 (3-D volumes: 0 is left-right)
    rot90_axes: tuple[int, ...] = ()  # two axes of random quarter turns
    affine: float = 0.0  # probability of a small rotation, scaling and shift
    max_rotation: float = 10.0  # degrees, of affine, about every axis
    max_scale: float = 0.1  # relative, of affine, all axes alike
    max_shift: float = 0.05  # fraction of the patch, of affine
    elastic: float = 0.0  # probability of a smooth random deformation
    max_elastic: float = 0.03  # fraction of the patch, of elastic
    intensity: float = 0.0  # probability of a random gain and bias of the scaled intensities
    max_gain: float = 0.1  # relative, of intensity
    max_bias: float = 0.1  # of intensity (the scaled range is 2)
    colour: float = 0.0  # probability of a gain and bias drawn for each channel of the image separately

    def __post_init__(self) -> None:
        if len(self.rot90_axes) not in (0, 2) or len(set(self.rot90_axes)) != len(self.rot90_axes):
            raise InputError(f"rot90_axes: expected two different axes, got {self.rot90_axes}")
        for name in ("affine", "elastic", "intensity", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a probability, got {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        probabilities = self.affine, self.elastic, self.intensity, self.colour
        return bool(self.flip_axes or self.rot90_axes or any(probabilities))


def _grid(
    size: torch.Size, spacing: Tensor, config: AugmentConfig, uniform: Callable[..., Tensor]
) -> Tensor | None:
    """Where `grid_sample` reads the volume for every voxel, (1, *S, dims); None if nothing moves.

    `grid_sample` counts in u, which runs from -1 to 1 along each axis (axes listed backwards). A point u lies
    u * half mm from the centre, with half = extent / 2 per axis. So `matrix`, a rotation of points in mm, is
    `matrix * half / half[:, None]` in u. In u the patch is 2 wide: a shift by max_shift of the patch is
    2 * max_shift. Example: 40 voxels and max_shift 0.05 shift by up to 2 voxels, which is 0.1 in u.
    """
    affine = bool(config.affine) and bool(uniform(0, 1) < config.affine)
    elastic = bool(config.elastic) and bool(uniform(0, 1) < config.elastic)
    if not affine and not elastic:
        return None
    dims = len(size)
    matrix, shift = torch.eye(dims), torch.zeros(dims)
    if affine:
        for a, b in [(0, 1), (0, 2), (1, 2)][: dims * (dims - 1) // 2]:
            angle = torch.deg2rad(uniform(-config.max_rotation, config.max_rotation))
            turn = torch.eye(dims)
            turn[a, a] = turn[b, b] = angle.cos()
            turn[b, a], turn[a, b] = angle.sin(), -angle.sin()
            matrix = matrix @ turn
        matrix = matrix / (1 + uniform(-config.max_scale, config.max_scale))
        shift = uniform(-2 * config.max_shift, 2 * config.max_shift, dims)
    half = torch.tensor(size) * spacing / 2
    theta = torch.cat([(matrix * half / half[:, None]).flip(0, 1), shift.flip(0)[:, None]], dim=1)
    grid = F.affine_grid(theta[None], [1, 1, *size], align_corners=False)
    if elastic:
        knots = uniform(-2 * config.max_elastic, 2 * config.max_elastic, 1, dims, *(5,) * dims)
        field = F.interpolate(knots, size=tuple(size), mode="bilinear" if dims == 2 else "trilinear")
        grid = grid + field.movedim(1, -1)
    return grid


def _warp(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    """The volume (C, *S) read at the points of `grid`; outside, the edge is repeated."""
    moved = F.grid_sample(volume[None].float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return moved[0].to(volume.dtype)


def augment(
    images: list[Tensor], mask: Tensor | None, spacing: Tensor, config: AugmentConfig, draw: torch.Generator
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """The images (C, *S) of one case and its mask (*S), changed alike, and the new spacing in mm.

    The order is: affine and elastic in one interpolation (nearest for the mask, so that labels stay labels),
    flips, quarter turns, intensity. A quarter turn exchanges two axes of the array, and their spacings too;
    where the two axes differ in size, only half turns happen. All randomness is from `draw`. Nothing is
    clipped here.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=draw) * (high - low) + low

    size = images[0].shape[1:]
    volumes = images if mask is None else [*images, mask[None]]
    grid = _grid(size, spacing, config, uniform)
    if grid is not None:
        modes = ["bilinear"] * len(images) + ["nearest"]
        volumes = [_warp(volume, grid, mode) for volume, mode in zip(volumes, modes, strict=False)]
    if flips := [axis + 1 for axis in config.flip_axes if uniform(0, 1) < 0.5]:
        volumes = [volume.flip(flips) for volume in volumes]
    if config.rot90_axes:
        a, b = config.rot90_axes
        turns = int(uniform(0, 4))
        turns = turns if size[a] == size[b] else turns // 2 * 2  # the patch keeps its shape
        volumes = [volume.rot90(turns, (a + 1, b + 1)) for volume in volumes]
        if turns % 2:
            spacing = spacing.clone()
            spacing[[a, b]] = spacing[[b, a]]
    images = volumes[: len(images)]
    if config.intensity and uniform(0, 1) < config.intensity:
        gain, bias = uniform(-config.max_gain, config.max_gain), uniform(-config.max_bias, config.max_bias)
        images = [x * (1 + gain) + bias for x in images]
    if config.colour and uniform(0, 1) < config.colour:
        column = (len(images[0]), *(1,) * len(size))
        gain, bias = (uniform(-most, most, *column) for most in (config.max_gain, config.max_bias))
        images = [images[0] * (1 + gain) + bias, *images[1:]]
    return images, None if mask is None else volumes[-1][0], spacing
