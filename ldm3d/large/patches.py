"""Stage two on patches of latents, each of which knows where it lies.

Attention over a large latent takes memory and time with the square of its voxels. Patch Diffusion (Wang et
al. 2023, arXiv 2304.12526) trains the denoiser on random patches of random sizes instead, and on whole
latents in a share of the steps. A patch alone does not tell which part of the body it shows, so coordinates
stand beside x_t as further input channels, and the denoiser learns what belongs where (section 3.1).

    size        the largest patch, such as 16,16,16 latent voxels; patches of half the size are as frequent
    position    where a latent voxel lies, in mm from the middle of the volume, over half of the longest side
                of a training volume: 0 in the middle, -1 and 1 at the ends of the longest axis
    sampling    whole, where whole latents were trained on; else in windows as large as the largest patch
                (windows.py), each with its own coordinates
    other data  a run that starts from another (--run.init) keeps the longest side of that one's volumes, so
                that a place in mm has the position that the denoiser has learned for it

Example: volumes of 128 x 160 x 128 voxels of 1 mm and an autoencoder of factor 4 make latents of
32 x 40 x 32. Half of 160 mm is 1, so neighbours along each axis are 4 / 80 = 0.05 apart, in patches and in
larger samples alike, and the positions along the second axis go from -0.975 to 0.975.

All samples of a step have patches of one size, drawn from (seed, step); each sample has its own place, drawn
from (seed, position of the sample). So a data set of cached latents knows which part of a latent a sample
takes, and reads that part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import pad_to_multiple
from ..config import InputError, at_least, show
from ..engine.training import keyed_uniform

CUT = ("mean", "logvar", "source", "labels")  # what has a value at every latent voxel
Box = tuple[slice, ...]  # the part of a latent that a patch shows


@dataclass(frozen=True)
class PatchConfig:
    size: tuple[int, ...] | None = None  # latent voxels of the largest patch; none = train on whole latents
    halvings: int = 1  # patches of half the size too, of a quarter with 2, ..., all equally often
    share: float = 0.5  # fraction of the steps that take whole latents; 0: these need not fit the memory

    def __post_init__(self) -> None:
        at_least(self, 0, "halvings")
        if self.size is not None and min(self.size, default=0) < 1:
            raise InputError(f"size: expected latent voxels from 1 on, got {show(self.size)}")
        if not 0 <= self.share < 1:
            raise InputError(f"share: expected a fraction from 0 to below 1, got {self.share}")
        for name in ("halvings", "share"):
            if self.size is None and getattr(self, name) != getattr(PatchConfig, name):
                raise InputError(f"{name}: has no effect without patch.size")

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The sizes of patches, the largest first."""
        return [tuple(n // 2**k for n in self.size) for k in range(self.halvings + 1)] if self.size else []

    @property
    def window(self) -> tuple[int, ...] | None:
        """The most that the denoiser sees at once: None = whole latents."""
        return self.size if self.size and self.share == 0 else None

    def mix(self, latent: Sequence[int]) -> list[tuple[float, tuple[int, ...]]]:
        """(the fraction of the steps, the size that these take) of whole latents and of patches."""
        share, num = (self.share, len(self.sizes)) if self.size else (1.0, 1)
        each = [((1 - share) / num, size) for size in self.sizes]
        return [(share, tuple(latent)), *each] if share else each

    def check(self, latent: Sequence[int], downsampling: Sequence[int]) -> None:
        """InputError unless latents of spatial shape `latent` have such patches, and the smallest of them as
        many voxels as a U-Net of this down-sampling needs."""
        if self.size is None:
            return
        if len(self.size) != len(latent):
            raise InputError(
                f"patch.size: expected {len(latent)} numbers, one an axis, got {show(self.size)}"
            )
        if any(n > m for n, m in zip(self.size, latent, strict=True)):
            expected = f"at most {show(tuple(latent))}, the latent"
            raise InputError(f"patch.size: expected {expected}, got {show(self.size)}")
        if any(n < f for n, f in zip(self.sizes[-1], downsampling, strict=True)):
            least = tuple(f * 2**self.halvings for f in downsampling)
            expected = f"at least {show(least)} with patch.halvings {self.halvings}"
            raise InputError(f"patch.size: expected {expected}, got {show(self.size)}")


def longest_side(size: Sequence[int], spacing: Sequence[float]) -> float:
    """mm along the longest axis of volumes of these voxels."""
    return max(n * mm for n, mm in zip(size, spacing, strict=True))


def position_step(
    config: PatchConfig, longest: float, spacing: Sequence[float], factor: Sequence[int]
) -> tuple[float, ...]:
    """The difference in position of two neighbours along each axis of a latent; empty without patches.

    longest: mm of the longest side of a training volume; spacing: mm of a voxel; factor: voxels in a latent
    voxel."""
    if config.size is None:
        return ()
    return tuple(f * mm / (longest / 2) for f, mm in zip(factor, spacing, strict=True))


def draw_size(config: PatchConfig, seed: int, step: int) -> tuple[int, ...] | None:
    """The size of the patches of a step; None: whole latents."""
    if config.size is None:
        return None
    u = float(keyed_uniform(seed, torch.tensor([step]), "patch size"))
    if u < config.share:
        return None
    return config.sizes[int((u - config.share) / (1 - config.share) * len(config.sizes))]


def draw_boxes(size: Sequence[int], latent: Sequence[int], seed: int, positions: Tensor) -> list[Box]:
    """Where each sample's patch lies in its latent, all places equally likely."""
    u = [keyed_uniform(seed, positions, f"patch axis {axis}") for axis in range(len(size))]
    room = [m - n + 1 for n, m in zip(size, latent, strict=True)]
    corners = [[int(v * r) for v, r in zip(own, room, strict=True)] for own in zip(*u, strict=True)]
    return [tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True)) for corner in corners]


def draw_box(
    config: PatchConfig, latent: Sequence[int], seed: int, batch_size: int, position: int
) -> Box | None:
    """The part of its latent that the sample at this position of the run takes; None: all of it."""
    size = draw_size(config, seed, position // batch_size)
    return draw_boxes(size, latent, seed, torch.tensor([position]))[0] if size else None


def voxels_of(box: Box, factor: Sequence[int]) -> Box:
    """The box in the volume, whose voxels are finer by `factor`."""
    return tuple(slice(f * b.start, f * b.stop) for b, f in zip(box, factor, strict=True))


def cut(x: Tensor, boxes: Sequence[Box]) -> Tensor:
    """The patches (B, C, *size) of x (B, C, *s), or of (1, C, *s) the same for all."""
    x = x.expand(len(boxes), *x.shape[1:])
    return torch.stack([one[(..., *box)] for one, box in zip(x, boxes, strict=True)])


def cut_batch(batch: dict[str, Tensor], boxes: Sequence[Box], factor: Sequence[int]) -> dict[str, Tensor]:
    """What changes in a batch of whole latents (`encode_batch`) when patches are cut from it. factor: voxels
    of a mask in a latent voxel."""
    own = {name: cut(batch[name], boxes) for name in CUT if name in batch}
    if "mask" in batch:
        mask = pad_to_multiple(batch["mask"][:, None], factor)
        own["mask"] = cut(mask, [voxels_of(box, factor) for box in boxes])[:, 0]
    return own
