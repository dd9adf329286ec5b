"""Editing: change an image, or a region of it, or go from one image to another, with a trained model.

An edit needs no training. It changes where sampling starts and what the network predicts (the hooks of `Edit`
in latent_diffusion.py, which also has the sampler that calls them). Let z be the latent of the image and
x_t = alpha_t z + sigma_t noise the same latent with noise.

Strength (Meng, section 3). Sampling starts at the time strength * T from x_t instead of at T from noise. The
noise hides the details that are to change. The grid below that time is the sampler's own, and 30 steps at
strength 0.5 are 15: the same strength gives the same noise with every sampler.

Inversion (Song, section 5.3). Noise that is drawn hides the image at random. Inversion finds the one noise
that the image is made of: deterministic sampling, run backwards under the conditions that the image has. From
that noise, the same conditions give the image back, and others change what differs between the conditions: a
counterfactual. Example: an image with a lesion is inverted under class 1, and sampled under class 0.

Region. A latent voxel outside the region must end at z. There the network's prediction is replaced by the
exact one, which follows from x_start = z. So the outside follows its own noise back to z with every sampler,
and at every step the network sees the surroundings at the right noise level. (Lugmayr replaces x_t itself.
For ddpm the result is the same; a sampler that remembers its last slope would be disturbed.)

What is replaced must not be seen. The encoder mixes each voxel with its neighbours, and its norms mix all
voxels, so the latent of the whole image carries the old content far beyond the region: from the kept latents
alone a linear classifier could say whether there had been a lesion. So z is the latent of the image with the
region filled from its surroundings (`filled`), and no latent has seen the old content. Latent voxels that the
filling changes are sampled anew (`reached`): those that touch the region, one more on each side, and as many
more as the encoder reaches.

Fitting in. At high noise the network decides what the region will hold while the surroundings, at the same
noise, say little. That decision may not fit the surroundings. So each step is taken `resample` times: x_t
gets its noise back, and the step is taken again with the surroundings in view (Lugmayr, Algorithm 1).
Example: a field of eight correlated Gaussian voxels, of which four are kept, sampled with the exact network.
Beside the seam the variance is 5 times what it should be with resample 1, 2 times with 4, and 1.3 times with
10. More steps do not help: with 80 steps and resample 1 it is 5 times as well.

Decoding. The autoencoder does not reproduce the image exactly, so the voxels outside are copied from the
image, bit by bit. To hide the seam, the error at the border, x - decoded, is carried into the region, where
it fades over `feather` voxels:

    out = decoded + correction  in the region,   x  outside

Interpolation. The mean of two noises has too little variance to be noise, so noises are interpolated on the
sphere, with r the angle between a and b (Shoemake 1985):

    slerp(a, b, w) = (sin((1 - w) r) a + sin(w r) b) / sin r

For two independent noises r is about 90 degrees, and half-way lies 0.71 a + 0.71 b, again of variance 1.

Meng et al. 2022 (SDEdit) arXiv:2108.01073; Lugmayr et al. 2022 (RePaint) 2201.09865; Song et al. 2021 (DDIM)
2010.02502.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditions import label_shares
from ..config import InputError
from ..engine.distributed import keyed_generator
from ..guidance import Guidance, Predict, guided
from ..latent_diffusion import Edit, LatentDiffusion


class ImageEdit(Edit):
    """Samples that start from an image x (C, *size), in scaled intensities.

    region (*size) bool: the part that is sampled anew, while the rest is kept exactly; None: all of the image
    changes. strength in (0, 1]: how much noise hides the image; with 1 nothing of it remains in the region.
    feather: voxels over which the autoencoder's error at the border fades. resample: how often each step is
    taken, so that the region fits its surroundings; 1 is fastest. own: the image's own conditions (by name,
    (1, ...), as `LatentDiffusion.prepare` gives them): its noise is found by inversion, and not drawn.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        x: Tensor,
        region: Tensor | None = None,
        strength: float = 1.0,
        feather: int = 4,
        resample: int = 4,
        own: dict[str, Tensor] | None = None,
    ):
        check_image(model, x)
        check_strength(strength)
        if own is not None and region is not None:
            raise InputError("own: the conditions of an image, expected no region")
        if resample < 1:
            raise InputError(f"resample: expected 1 or more, got {resample}")
        if region is not None and tuple(region.shape) != tuple(x.shape[1:]):
            raise InputError(f"region: expected shape {tuple(x.shape[1:])}, got {tuple(region.shape)}")
        if region is not None and not region.any():
            raise InputError("region: is empty, there is nothing to make")
        self.model, self.x, self.strength, self.feather, self.own = model, x, strength, feather, own
        self.region, self.resample = None if region is None else region.bool(), 1
        self.inside = torch.ones((1, 1, *model.latent_shape[1:]), dtype=torch.bool, device=model.device)
        if region is None:
            self.z = encoded(model, x)  # (1, C_z, *s): what is kept
        else:
            around = filled(x[None], self.region[None, None])[0]
            self.z, self.resample = encoded(model, around), resample
            self.inside = reached(model, around, self.z, self.region)
        # What noise is added to: the old content too, if the noise is to leave something of it
        self.origin = self.z if strength == 1 or region is None else encoded(model, x)

    def start(self, noise: Tensor, times: Sequence[float], indices: list[int]) -> Tensor:
        if self.own is not None:
            return inverted(self.model, self.z, times, self.own).expand_as(noise)
        around = torch.where(self.inside, self.origin, self.z).expand_as(noise)
        x_t = noisy(self.model, around, times[0], noise)
        return torch.where(self.inside, noise, x_t) if self.strength == 1 else x_t

    def around(self, predict: Predict) -> Predict:
        kernel = self.model.kernel

        def masked(x_t: Tensor, t: Tensor) -> Tensor:
            """The network's prediction inside; outside, the prediction that leads to z."""
            time = t / kernel.num_timesteps if kernel.process == "flow" else t.long()
            outside = kernel.convert(self.z, x_t, time, "x_start", kernel.config.prediction)
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
            self.ends, self.strength = [encoded(model, x)[0] for x in ends], strength
        else:
            self.ends, self.strength = [self._draw(number, seed) for number in ends], 1.0

    def _draw(self, number: int, seed: int) -> Tensor:
        """The noise that sample `number` starts from, (C_z, *s)."""
        draw = keyed_generator(seed, number, "sample")
        return torch.randn(self.model.latent_shape, generator=draw).to(self.model.device)

    def start(self, noise: Tensor, times: Sequence[float], indices: list[int]) -> Tensor:
        if not 0 <= min(indices) <= max(indices) < self.num:
            raise InputError(f"interpolation: has samples 0 to {self.num - 1}, asked for {max(indices)}")
        between = torch.stack([slerp(*self.ends, i / (self.num - 1)) for i in indices])
        return noisy(self.model, between, times[0], self.noise.expand_as(between)) if self.images else between


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


def inverted(model: LatentDiffusion, z: Tensor, times: Sequence[float], own: dict[str, Tensor]) -> Tensor:
    """x_t (1, C_z, *s) at times[0] from which sampling at these times under the conditions `own` leads to the
    latent z (1, C_z, *s)."""
    net = model.denoiser_for(z.shape[2:])
    cond = {name: value.to(model.device) for name, value in own.items()}
    predict = guided(net, cond, z, Guidance(), model.kernel.num_timesteps)
    return model.kernel.invert(predict, z, times)


def encoded(model: LatentDiffusion, x: Tensor) -> Tensor:
    """The latent (1, C_z, *s) of an image (C, *size)."""
    with torch.inference_mode():
        return model.encode(x[None].to(model.device)).float()


def filled(x: Tensor, hole: Tensor) -> Tensor:
    """x (B, C, *S) with the voxels of hole (B, 1, *S) replaced by a smooth continuation of the others.

    A coarse image, of half the size, has the means of what is there; its own holes are filled in the same
    way, and the interpolated coarse image fills the hole. A hole that is everything becomes 0.
    """
    if not hole.any() or hole.all():
        return x.masked_fill(hole, 0)
    weight = (~hole).to(x)
    halves = {"kernel_size": 2, "ceil_mode": True}
    share = mean_pool(weight, **halves)
    coarse = filled(mean_pool(x * weight, **halves) / share.clamp(min=1e-6), share == 0)
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return torch.where(hole, F.interpolate(coarse, x.shape[2:], mode=mode), x)


def reached(model: LatentDiffusion, x: Tensor, z: Tensor, region: Tensor) -> Tensor:
    """The latent voxels (1, 1, *s) bool that the content of region (*size) has a part in. z: the latent of x.

    Those that touch the region, their neighbours, and those that an extreme region, of -1 or 1, changes by
    more than a quarter of the latent's standard deviation and a tenth of the largest change. (Norms take
    their statistics from all voxels, so all latents change a little.)
    """
    shares = label_shares(region[None].long(), 2, model.autoencoder.downsampling)[:, 1:]
    inside = neighbours(shares > 0, max_pool).to(model.device)
    for value in (-1.0, 1.0):
        far = encoded(model, x.masked_fill(region.to(x.device), value))
        change = (far - z).abs().amax(1, keepdim=True)
        inside = inside | (change > max(0.25, 0.1 * change.max().item()))
    return inside


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
