"""Windows: what is too large for a network at once is shown to the network part by part.

A window is a box of fixed size. Windows overlap, since a network sees least at the border of a window, and
where windows overlap, their results are averaged with more weight on the middle of each. Along an axis of 10
voxels, windows of 6 that overlap by at least half start at 0, 2 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import InputError, show


def check_window(window: Sequence[int] | None, dims: int) -> None:
    """InputError unless the window is None or has a size for each of `dims` axes."""
    if window is not None and (len(window) != dims or min(window) < 1):
        raise InputError(f"window: expected {dims} numbers from 1 on, got {show(tuple(window))}")


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of windows that cover `size` voxels and overlap by at least the share `overlap`."""
    room = size - window
    count = 1 + math.ceil(room / max(1, int(window * (1 - overlap)))) if room > 0 else 1
    return [round(room * i / max(1, count - 1)) for i in range(count)]


def window_weight(window: Sequence[int]) -> Tensor:
    """How much each voxel of a window counts, (*window): sin^2 along every axis, above 0 at the border."""
    weight = torch.ones(())
    for m in window:
        along = torch.sin((torch.arange(m) + 0.5) / m * math.pi).square().clamp(min=1e-3)
        weight = weight[..., None] * along
    return weight
