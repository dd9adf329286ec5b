"""Editing: change an image, or a region of it, or go from one image to another, with a trained model.

An edit needs no training. It changes where sampling starts and what the network predicts (the hooks of `Edit`
in latent_diffusion.py, which also has the sampler that calls them). Let z be the latent of the image and
x_t = alpha_t z + sigma_t noise the same latent with noise.

Strength (Meng, section 3). Sampling starts at the time strength * T from x_t instead of at T from noise. The
noise hides the details that are to change. The grid below that time is the sampler's own, and 30 steps at
strength 0.5 are 15: the same strength gives the same noise with every sampler.

Region. A latent voxel outside the region must end at z. There the network's prediction is replaced by the
exact one, which follows from x_start = z. So the outside follows its own noise back to z,
with every sampler, and at every step the network sees the surroundings at the right noise level. (Lugmayr
replaces x_t itself. For ddpm this is the same; a sampler that remembers its last slope would be disturbed.)

The region in latent space. The encoder mixes each voxel with its neighbours, so a latent voxel beside the
region still carries the old content of the region. The region in latent space therefore has every latent
voxel that touches the region, and one more on each side.

Decoding. The autoencoder does not reproduce the image exactly, so the voxels outside are copied from the
image, bit by bit. To hide the seam, the error at the border, x - decoded, is carried into the region, where
it fades over `feather` voxels:

    out = decoded + correction  in the region,   x  outside

Interpolation. The mean of two noises has too little variance to be noise, so noises are interpolated on the
sphere, with r the angle between a and b (Shoemake 1985):

    slerp(a, b, w) = (sin((1 - w) r) a + sin(w r) b) / sin r

For two independent noises r is about 90 degrees, and half-way lies 0.71 a + 0.71 b, again of variance 1.

Meng et al. 2022 (SDEdit) arXiv:2108.01073; Lugmayr et al. 2022 (RePaint) 2201.09865.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditions import label_shares
from ..config import InputError
from ..engine.distributed import keyed_generator
from ..latent_diffusion import Edit, LatentDiffusion, Predict


class ImageEdit(Edit):
    """Samples that start from an image x (C, *size), in scaled intensities.

    region (*size) bool: the part that is sampled anew, while the rest is kept exactly; None: all of the image
    changes. strength in (0, 1]: how much noise hides the image; with 1 nothing of it remains in the region.
    feather: voxels over which the autoencoder's error at the border fades.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        x: Tensor,
        region: Tensor | None = None,
        strength: float = 1.0,
        feather: int = 4,
    ):
        check_image(model, x)
        check_strength(strength)
        if region is not None and tuple(region.shape) != tuple(x.shape[1:]):
            raise InputError(f"region: expected shape {tuple(x.shape[1:])}, got {tuple(region.shape)}")
        if region is not None and not region.any():
            raise InputError("region: is empty, there is nothing to make")
        self.model, self.x, self.strength, self.feather = model, x, strength, feather
        self.region = None if region is None else region.bool()
        with torch.inference_mode():
            self.z = model.encode(x[None].to(model.device)).float()  # (1, C_z, *s)
        self.inside = torch.ones_like(self.z[:, :1], dtype=torch.bool)
        if region is not None:
            shares = label_shares(self.region[None].long(), 2, model.autoencoder.downsampling)[:, 1:]
            self.inside = neighbours(shares > 0, max_pool).to(self.z.device)  # (1, 1, *s)

    def start(self, noise: Tensor, t: float, indices: list[int]) -> Tensor:
        x_t = noisy(self.model, self.z.expand_as(noise), t, noise)
        return torch.where(self.inside, noise, x_t) if self.strength == 1 else x_t

    def around(self, predict: Predict, noise: Tensor) -> Predict:
        kernel, z = self.model.kernel, self.z.expand_as(noise)

        def masked(x_t: Tensor, t: Tensor) -> Tensor:
            """The network's prediction inside; outside, the prediction that leads to z."""
            if kernel.process == "flow":
                outside = kernel.target(z, t / kernel.num_timesteps, noise)
            else:
                outside = kernel.convert(z, x_t, t.long(), "x_start", kernel.config.prediction)
            return torch.where(self.inside, predict(x_t, t).to(outside.dtype), outside)

        return predict if self.region is None else masked

    def finish(self, x: Tensor) -> Tensor:
        if self.region is None:
            return x
        error, outside = self.x.cpu() - x, ~self.region.cpu()
        correction = error * outside
        for _ in range(self.feather):  # each round carries the error one voxel further into the region
            correction = torch.where(outside, error, neighbours(correction, mean_pool))
        return torch.where(outside, self.x.cpu(), x + correction)


class Interpolation(Edit):
    """num samples on the way from one end to the other, both included.

    Two numbers are samples of `seed`, and their noises are interpolated. Two images (C, *size), in scaled
    intensities, are encoded, and their latents are interpolated; each point between them gets noise of
    `strength`, the same noise for all, and is denoised. ddpm, and ddim with eta above 0, draw fresh noise at
    every step; with them the path does not begin and end at the two ends.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        ends: tuple[int, int] | tuple[Tensor, Tensor],
        num: int,
        seed: int = 0,
        strength: float = 0.3,
    ):
        check_strength(strength)
        if num < 2:
            raise InputError(f"num: expected at least 2 with an interpolation, got {num}")
        self.model, self.num, self.images = model, num, isinstance(ends[0], Tensor)
        self.noise = self._draw(0, seed)
        if self.images:
            for x in ends:
                check_image(model, x)
            with torch.inference_mode():
                self.ends = [model.encode(x[None].to(model.device))[0].float() for x in ends]
            self.strength = strength
        else:
            self.ends, self.strength = [self._draw(number, seed) for number in ends], 1.0

    def _draw(self, number: int, seed: int) -> Tensor:
        """The noise that sample `number` starts from, (C_z, *s)."""
        draw = keyed_generator(seed, number, "sample")
        return torch.randn(self.model.latent_shape, generator=draw).to(self.model.device)

    def start(self, noise: Tensor, t: float, indices: list[int]) -> Tensor:
        if not 0 <= min(indices) <= max(indices) < self.num:
            raise InputError(f"interpolation: has samples 0 to {self.num - 1}, asked for {max(indices)}")
        between = torch.stack([slerp(*self.ends, i / (self.num - 1)) for i in indices])
        return noisy(self.model, between, t, self.noise.expand_as(between)) if self.images else between


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point between a (weight 0) and b (weight 1) on their great circle; where a and b are nearly
    parallel, on the line between them. Tensors of any equal shape."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = float(torch.arccos(cosine))
    if math.sin(angle) < 1e-4:
        return (1 - weight) * a + weight * b
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


def noisy(model: LatentDiffusion, z: Tensor, t: float, noise: Tensor) -> Tensor:
    """x_t (B, C_z, *s) of a clean latent z with this noise."""
    dtype = torch.float32 if model.kernel.process == "flow" else torch.int64
    return model.kernel.q_sample(z, torch.full((len(z),), t, dtype=dtype), noise)


def max_pool(x: Tensor, **window: int) -> Tensor:
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    return pool(x.float(), **window).to(x.dtype)


def mean_pool(x: Tensor, **window: int) -> Tensor:
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return pool(x, count_include_pad=False, **window)


def neighbours(x: Tensor, pool: Callable[..., Tensor]) -> Tensor:
    """Each voxel of x (B, C, *S) replaced by the pool of itself and its neighbours."""
    return pool(x, kernel_size=3, stride=1, padding=1)


def check_image(model: LatentDiffusion, x: Tensor) -> None:
    expected = (model.spec.channels, *model.spec.size)
    if tuple(x.shape) != expected:
        raise InputError(f"image: expected shape {expected}, got {tuple(x.shape)}")


def check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise InputError(f"strength: expected above 0 and up to 1, got {strength:g}")
