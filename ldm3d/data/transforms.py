"""What happens to a volume between its file and the network: intensity scaling, windows, augmentation.

    x = (v - middle) / half,    middle = (high + low) / 2,    half = (high - low) / 2

puts low to -1 and high to 1, per channel. A window that reaches beyond its volume repeats the edge.
Augmentation draws everything from one generator and moves image, source and mask alike, so that pairs stay
pairs; rotations are rigid in mm, whatever the spacing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InputError


def scaling_numbers(
    values: np.ndarray, kind: str, percentiles: tuple[float, float], window: tuple[float, float]
) -> tuple[float, float]:
    """(low, high): the values of one channel that become -1 and 1. Equal if the volume is constant."""
    if kind == "none":
        return -1.0, 1.0
    if kind == "window":
        return window
    low, high = float(values.min()), float(values.max())
    if kind == "percentile":
        a, b = (float(v) for v in np.percentile(values, percentiles))
        return (a, b) if a < b else (low, high)  # an image of few values: its whole range
    if kind == "minmax" or low == high:
        return low, high
    values = _foreground(values) if kind == "zscore" else values
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return mean - std, mean + std


def _foreground(values: np.ndarray) -> np.ndarray:
    """Voxels off the background: the most frequent value, if more than a tenth of the voxels have exactly it.

    The background need not be 0: z-scored files carry a negative constant there.
    """
    some = values.reshape(-1)[:: max(1, values.size // 100_000)]
    candidates, counts = np.unique(some, return_counts=True)
    inside = values[values != candidates[counts.argmax()]]
    return inside if inside.size < 0.9 * values.size and np.ptp(inside) > 0 else values


def _middle_half(low: tuple[float, ...], high: tuple[float, ...], ndim: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(v, dtype=np.float64).reshape(-1, *(1,) * (ndim - 1)) for v in (low, high))
    return ((a + b) / 2).astype(np.float32), ((b - a) / 2).astype(np.float32)


def scale(values: np.ndarray, low: tuple[float, ...], high: tuple[float, ...], clip: bool) -> np.ndarray:
    """File's units (C, *S) -> x (C, *S) float32, clipped to [-1, 1] if asked."""
    middle, half = _middle_half(low, high, values.ndim)
    x = (values - middle) / half
    return np.clip(x, -1, 1, out=x) if clip else x


def unscale(x: np.ndarray, low: tuple[float, ...], high: tuple[float, ...], clipped: bool) -> np.ndarray:
    """The inverse of `scale`, as far as nothing was clipped; what lies beyond a clipped range is cut off."""
    x = x.clip(-1, 1) if clipped else x
    middle, half = _middle_half(low, high, x.ndim)
    return x * half + middle


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training cases, the same for image, source and mask; all off by default."""

    flip_axes: tuple[int, ...] = ()  # axes flipped with probability 1/2 (3-D volumes: 0 is left-right)
    rot90_axes: tuple[int, ...] = ()  # two axes of random quarter turns
    affine: float = 0.0  # probability of a small rotation, scaling and shift
    max_rotation: float = 10.0  # degrees, of affine, about every axis
    max_scale: float = 0.1  # relative, of affine, all axes alike
    max_shift: float = 0.05  # part of the patch, of affine
    elastic: float = 0.0  # probability of a smooth random deformation
    max_elastic: float = 0.03  # part of the patch, of elastic
    intensity: float = 0.0  # probability of a random gain and bias of the scaled intensities
    max_gain: float = 0.1  # relative, of intensity
    max_bias: float = 0.1  # of intensity (the scaled range is 2)
    colour: float = 0.0  # probability of such a gain and bias for each channel of the image by itself

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


def augment(
    images: list[Tensor], mask: Tensor | None, spacing: Tensor, config: AugmentConfig, draw: torch.Generator
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Images (C, *S) of one case and their mask (*S), changed alike; returns them and the new spacing (mm).

    All randomness is from `draw`. A mask keeps its integers. Nothing is clipped here.
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


def _grid(
    size: torch.Size, spacing: Tensor, config: AugmentConfig, uniform: Callable[..., Tensor]
) -> Tensor | None:
    """Where `grid_sample` looks for every voxel, (1, *S, dims); None if nothing moves.

    Its coordinates u run from -1 to 1 along each axis, axes listed backwards, so that a voxel lies u * extent
    / 2 mm from the centre, and a matrix M in mm is D^-1 M D in u, with D = diag(extent / 2).
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
    moved = F.grid_sample(volume[None].float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return moved[0].to(volume.dtype)
