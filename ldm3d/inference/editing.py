"""Editing: inpainting, image-to-image and interpolation, as changes of where and with what sampling goes.

With z the latent of a known image, x_t = alpha_t z + sigma_t noise its noisy version, m the region to make:

    strength   sampling starts at time strength * T from x_t instead of from noise            Meng, section 3
    region     outside m the prediction is replaced by that of a network that knew x_start = z, so that the
               known part follows its own noising backwards, exactly, with every sampler; inside, the network
               sees at every step the known surroundings at the right noise level. Lugmayr replaces x_t
               itself, which is the same for ddpm, and would break the samplers that remember past slopes.
    decoding   out = m (decoded + c) + (1 - m) x: the known voxels are kept bit by bit. c carries what the
               autoencoder got wrong at the border, x - decoded, into m, falling off over a few voxels, so
               that no seam shows. In latent space m is a voxel wider, since latents there have seen its
               inside.
    between    slerp(a, b, w) = (sin((1 - w) r) a + sin(w r) b) / sin r, r the angle of a and b  Shoemake 1985

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
    """Samples made from a known image x (C, *size), in scaled intensities.

    region (*size) bool: what is made anew, the rest is kept exactly; None: everything may change. strength in
    (0, 1]: how much noise the image is given; 1 makes the region from nothing. feather: voxels over which the
    autoencoder's error at the border fades.
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

    def start(self, noise: Tensor, times: list[float], indices: list[int]) -> tuple[Tensor, list[float]]:
        times = last_part(times, self.strength)
        x_t = noisy(self.model, self.z.expand_as(noise), times[0], noise)
        return torch.where(self.inside, noise, x_t) if self.strength == 1 else x_t, times

    def around(self, predict: Predict, noise: Tensor) -> Predict:
        kernel, z = self.model.kernel, self.z.expand_as(noise)

        def masked(x_t: Tensor, t: Tensor) -> Tensor:
            if kernel.process == "flow":
                known = kernel.target(z, t / kernel.num_timesteps, noise)
            else:
                known = kernel.convert(z, x_t, t.long(), "x_start", kernel.config.prediction)
            return torch.where(self.inside, predict(x_t, t).to(known.dtype), known)

        return predict if self.region is None else masked

    def finish(self, x: Tensor) -> Tensor:
        if self.region is None:
            return x
        missing, known = self.x.cpu() - x, ~self.region.cpu()
        correction = missing * known
        for _ in range(self.feather):
            correction = torch.where(known, missing, neighbours(correction, mean_pool))
        return torch.where(known, self.x.cpu(), x + correction)


class Interpolation(Edit):
    """num samples on the way from one end to the other, both included.

    Ends that are numbers are samples of `seed`: the noise in between is spherical. Ends that are images
    (C, *size), in scaled intensities, are encoded; what lies between them is given noise of `strength`, the
    same for all, and made clean. Samplers that draw fresh noise (ddpm, ddim with eta) leave the ends.
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

    def start(self, noise: Tensor, times: list[float], indices: list[int]) -> tuple[Tensor, list[float]]:
        if not 0 <= min(indices) <= max(indices) < self.num:
            raise InputError(f"interpolation: has samples 0 to {self.num - 1}, asked for {max(indices)}")
        between = torch.stack([slerp(*self.ends, i / (self.num - 1)) for i in indices])
        if not self.images:
            return between, times
        times = last_part(times, self.strength)
        return noisy(self.model, between, times[0], self.noise.expand_as(between)), times


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """On the great circle from a (weight 0) to b (1), tensors of any equal shape; on the line where they are
    nearly parallel."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = float(torch.arccos(cosine))
    if math.sin(angle) < 1e-4:
        return (1 - weight) * a + weight * b
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


def last_part(times: list[float], strength: float) -> list[float]:
    """The last `strength` of the falling times, at least one."""
    return times[len(times) - max(1, math.ceil(strength * len(times) - 1e-9)) :]


def noisy(model: LatentDiffusion, z: Tensor, t: float, noise: Tensor) -> Tensor:
    """z (B, C_z, *s) at time t."""
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
