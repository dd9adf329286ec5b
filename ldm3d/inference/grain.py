"""Grain: what the decoder leaves out of a volume, drawn anew for every sample.

Many images have the same latent z: they differ in the noise of the scanner and in the finest texture. An
autoencoder learns their mean, so reconstructions and samples are smoother than images. A draw from all images
that z may stand for is the mean and a residual. `Grain` is the simplest model of this residual: Gaussian
noise with the power spectrum that residuals have, and with the standard deviation that they have where the
mean has this intensity:

    x = mean + std(mean) n,      n = filter * w

w is white noise, * a convolution, and n has variance 1. The filter is the inverse Fourier transform of the
square root of the residuals' mean power spectrum, cut to RADIUS voxels each way. The table std holds the root
mean square residual at LEVELS intensities from -1 to 1, and is linear in between.
    Example: where the mean is -1 (air), residuals are 0, and so is the grain. Where it is 0, they have a
    standard deviation of 0.12: a voxel becomes 0 + 0.12 n, and its neighbour gets a similar n, because the
    residuals of neighbours are alike.

Both are measured on validation cases when a denoiser is trained, and kept in its checkpoints. Left out: all
that depends on place. A residual follows the edges that the decoder blurs; the grain does not know of edges.
The channels' grains are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import InputError
from ..engine.distributed import keyed_generator
from ..engine.logger import progress
from ..engine.training import autocast
from ..pipeline import LatentDiffusionPipeline
from ..vae import Autoencoder

RADIUS = 8  # voxels that the filter reaches
LEVELS = 16  # intensities at which the standard deviation is measured
CASES = 16  # validation cases to measure on, at most
SIDE = 96  # voxels of a case that are decoded along each axis, at most


@dataclass(frozen=True)
class Grain:
    """filter: (C, *k), odd sizes, its squares sum to 1 in each channel; std: (C, LEVELS)."""

    filter: Tensor
    std: Tensor

    @staticmethod
    def of(pipeline: LatentDiffusionPipeline) -> Grain:
        """The grain that a run has measured; InputError if it has measured none."""
        state, run = pipeline.content["state"], pipeline.run
        if "grain" not in state:
            remedy = f"sample without it, or train on in a new run (--run.init {run}), which measures it"
            raise InputError(
                f"grain: {run} has measured none, being imported or of an older version; {remedy}"
            )
        if state["grain"] is None:
            raise InputError(f"grain: the autoencoder of {run} leaves nothing out; sample without it")
        return Grain(state["grain"]["filter"], state["grain"]["std"])

    @property
    def strength(self) -> str:
        """How strong it is, in words: its standard deviation in % of the range from -1 to 1."""
        low, high = (100 * float(value) / 2 for value in (self.std.min(), self.std.max()))
        return f"a standard deviation of {low:.2g} to {high:.2g} % of the range, by intensity"

    def noise(self, size: Sequence[int], seed: int, index: int, start: int, stop: int) -> Tensor:
        """n (C, stop - start, *size[1:]): planes `start` to `stop` of the first axis, for sample `index`.

        Each plane of w has a generator of its own, so that a volume has the same grain in one piece and in
        slabs. Along the other axes the noise is periodic.
        """
        reach = self.filter.shape[1] // 2
        planes = range(start - reach, stop + reach)
        draws = [keyed_generator(seed, index, f"grain of plane {p}") for p in planes]
        w = torch.stack([torch.randn(len(self.filter), *size[1:], generator=g) for g in draws], 1)
        around = [  # where the filter lies if its middle lies at voxel 0, and the axes are circles
            torch.arange(-(taps // 2), taps // 2 + 1) % n
            for taps, n in zip(self.filter.shape[1:], w.shape[1:], strict=True)
        ]
        channels = torch.arange(len(w))
        places = torch.meshgrid(channels, *around, indexing="ij")
        kernel = torch.zeros_like(w).index_put_(places, self.filter, accumulate=True)
        axes = tuple(range(1, w.ndim))
        n = torch.fft.irfftn(torch.fft.rfftn(w, dim=axes) * torch.fft.rfftn(kernel, dim=axes), w.shape[1:])
        return n[:, reach : reach + stop - start]

    def deviation(self, x: Tensor) -> Tensor:
        """std(x) of intensities x (C, ...)."""
        level = (x.clamp(-1, 1) + 1) / 2 * (LEVELS - 1)
        low = level.long().clamp(max=LEVELS - 2)
        below, above = (self.std.gather(1, (low + k).flatten(1)).view_as(x) for k in (0, 1))
        return torch.lerp(below, above, level - low)

    def add(self, x: Tensor, size: Sequence[int], seed: int, index: int, start: int = 0) -> Tensor:
        """x (C, n, ...), float32 on the CPU, planes from `start` on of a decoded volume of `size`, with its
        grain."""
        return x + self.deviation(x) * self.noise(size, seed, index, start, start + x.shape[1])


# --- measuring ----------------------------------------------------------------------------------------------


def grain_of_residuals(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor] | None:
    """The filter and the standard deviations of pairs (image, its reconstruction), all (C, *S) of one size;
    None if there is no pair, or no residual."""
    power, squares, counts = 0.0, 0.0, 0.0
    for x, recon in pairs:
        residual = (x - recon).double()
        axes = tuple(range(1, x.ndim))
        power = power + torch.fft.fftn(residual - residual.mean(axes, keepdim=True), dim=axes).abs().square()
        level = ((recon.clamp(-1, 1) + 1) / 2 * (LEVELS - 1)).round().long().flatten(1)
        zero = torch.zeros(len(x), LEVELS, dtype=torch.float64)
        squares = squares + zero.scatter_add(1, level, residual.square().flatten(1))
        counts = counts + zero.scatter_add(1, level, torch.ones_like(level, dtype=torch.float64))
    if not isinstance(power, Tensor) or not power.sum() > 0:
        return None
    axes = tuple(range(1, power.ndim))
    kernel = torch.fft.fftshift(torch.fft.ifftn(power.sqrt(), dim=axes).real, dim=axes)
    for axis in axes:
        reach = min(RADIUS, (kernel.shape[axis] - 1) // 2)
        kernel = kernel.narrow(axis, kernel.shape[axis] // 2 - reach, 2 * reach + 1)
    kernel = kernel / kernel.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
    return {"filter": kernel.float(), "std": _deviations(squares.numpy(), counts.numpy())}


def _deviations(squares: np.ndarray, counts: np.ndarray) -> Tensor:
    """The root mean square at each level (C, LEVELS); a level without voxels lies between its neighbours."""
    rows, levels = [], np.arange(LEVELS)
    for total, count in zip(squares, counts, strict=True):
        seen = count > 0
        rows.append(np.interp(levels, levels[seen], np.sqrt(total[seen] / count[seen])))
    return torch.tensor(np.array(rows), dtype=torch.float32)


def _middle(x: Tensor, z: Tensor, factors: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image (C, *S) and its latent (1, C_z, *s), cut to the same middle of SIDE voxels where an axis is
    longer: decoding whole volumes may take hours, and there is as much to learn from a part."""
    for axis, (n, factor) in enumerate(zip(z.shape[2:], factors, strict=True)):
        if x.shape[1 + axis] > SIDE:
            length = SIDE // factor
            start = (n - length) // 2
            z = z.narrow(2 + axis, start, length)
            x = x.narrow(1 + axis, start * factor, length * factor)
    return x, z


@torch.inference_mode()
def measure_grain(
    autoencoder: Autoencoder, latents: Dataset, images: Dataset, amp: str, device: torch.device
) -> dict[str, Any] | None:
    """`grain_of_residuals` of the middle of the first CASES cases. latents, images: data sets of the same
    cases, with "mean" and "image"."""

    def pairs() -> Iterable[tuple[Tensor, Tensor]]:
        for i in progress(range(min(CASES, len(images))), "measuring grain"):
            whole = images[i, i]["image"].float()
            x, z = _middle(whole, torch.as_tensor(latents[i, i]["mean"])[None], autoencoder.downsampling)
            with autocast(amp, device):
                recon = autoencoder.decode(z.to(device), x.shape[1:])[0].float().cpu()
            for axis, (n, length) in enumerate(zip(x.shape[1:], whole.shape[1:], strict=True), start=1):
                if n < length:  # at a cut the decoder lacks the neighbours
                    x, recon = (t.narrow(axis, RADIUS, n - 2 * RADIUS) for t in (x, recon))
            yield x, recon

    return grain_of_residuals(pairs())
