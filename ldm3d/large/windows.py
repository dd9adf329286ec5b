"""Windows: what is too large for a network at once is shown to the network part by part.

A window is a box of fixed size. Windows overlap, since a network sees least at the border of a window, and
where windows overlap, their results are averaged with more weight on the middle of each. Along an axis of 10
voxels, windows of 6 that overlap by at least half start at 0, 2 and 4.

Sampling in windows (`Windows`). A denoiser has learned latents of one size, and a larger latent may not fit
the memory. But every part of a larger latent looks like a latent of the trained size. So at each step of
sampling the denoiser predicts in every window F_i x_t, and the predictions are averaged, Bar-Tal et al. 2023
(MultiDiffusion, arXiv 2302.08113), (5), with the weights w of `window_weight`:

    pred = sum_i F_i^-1(w denoiser(F_i x_t, t)) / sum_i F_i^-1(w)

F_i cuts window i from the latent, F_i^-1 puts the window back, with 0 around it. Bar-Tal averages the latents
after the step. Steps of all samplers here are affine in the prediction (`clip_x_start` apart), so both are
the same. Neighbours agree on what they share at every step, hence no seams. What lies farther apart than a
window never meets within one prediction: anatomy at a large scale comes from conditions, or from coordinates
(patches.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import InputError, show


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


def coordinates(size: Sequence[int], step: Sequence[float], device: torch.device) -> Tensor:
    """Where every voxel lies, (1, dims, *size): 0 in the middle, neighbours `step` apart along each axis."""
    along = [(torch.arange(n, device=device) - (n - 1) / 2) * d for n, d in zip(size, step, strict=True)]
    return torch.stack(torch.meshgrid(*along, indexing="ij"))[None]


class Windows:
    """A denoiser that predicts a latent of `size` in windows; it stands in the denoiser's place.

    size, window: latent voxels; a window is cut off where the latent is smaller. overlap: the share of a
    window that its neighbour covers at least. batch_size: windows that are predicted at once. Conditions hold
    for all windows, and those with a value at every latent voxel are cut like the latent; so are coordinates.
    """

    def __init__(
        self, denoiser: Any, size: Sequence[int], window: Sequence[int], overlap: float, batch_size: int = 1
    ):
        self.denoiser, self.size, self.batch_size = denoiser, tuple(size), batch_size
        self.window = tuple(min(n, m) for n, m in zip(size, window, strict=True))
        starts = product(*(window_starts(n, m, overlap) for n, m in zip(self.size, self.window, strict=True)))
        self.boxes = [[slice(s, s + m) for s, m in zip(start, self.window, strict=True)] for start in starts]
        self.conditions = denoiser.conditions

    def encode_conditions(self, conditions: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """The conditions as they are: each window has its own part of them."""
        return conditions

    def __call__(self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, C_z, *size) -> prediction like x_t, float32."""
        return self._average(self.denoiser, x_t, t, conditions or {}, (1,) * len(self.size))

    def label_logits(self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, K, *(factor size)) of the head, averaged over the windows."""
        factor = self.denoiser.head.to_voxels.factor
        return self._average(self.denoiser.label_logits, x_t, t, conditions or {}, factor)

    def _average(
        self,
        predict: Callable[..., Tensor],
        x_t: Tensor,
        t: Tensor,
        conditions: dict[str, Tensor],
        factor: Sequence[int],
    ) -> Tensor:
        """The mean of predict(window, t, conditions), which is `factor` times as fine as the latent."""
        has_place = {c.name for c in self.conditions if c.origin in ("source", "mask")}
        smooth = window_weight([m * f for m, f in zip(self.window, factor, strict=True)]).to(x_t.device)
        size = [n * f for n, f in zip(self.size, factor, strict=True)]
        total, weight = None, torch.zeros(size, device=x_t.device)
        positions = self.denoiser.coordinates(x_t)
        for i in range(0, len(self.boxes), self.batch_size):
            boxes = self.boxes[i : i + self.batch_size]

            def cut(x: Tensor, boxes: list = boxes) -> Tensor:
                return torch.cat([x[(..., *box)] for box in boxes])  # (windows B, C, *window)

            def repeat(x: Tensor, num: int = len(boxes)) -> Tensor:
                return torch.cat([x] * num)

            own = {name: (cut if name in has_place else repeat)(value) for name, value in conditions.items()}
            more = {} if positions is None else {"positions": cut(positions)}
            preds = predict(cut(x_t), repeat(t), own, **more).float().chunk(len(boxes))
            for box, pred in zip(boxes, preds, strict=True):
                place = [slice(f * b.start, f * b.stop) for b, f in zip(box, factor, strict=True)]
                total = pred.new_zeros(*pred.shape[:2], *size) if total is None else total
                total[(..., *place)] += smooth * pred
                weight[(..., *place)] += smooth
        return total / weight
