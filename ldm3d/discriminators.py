"""Discriminators: networks that learn to tell real from generated, so that a generator learns to avoid it.

An autoencoder that minimises a mean error blurs what it is unsure of: the mean of two sharp edges has the
smallest error. A discriminator sees real images and reconstructions, learns that blur is a mark of the
latter, and hands this knowledge to the autoencoder as a gradient. The objectives are in losses.py.

PatchDiscriminator judges images patch by patch (stage one):

    conv k4 s2 - LeakyReLU, num_layers x [conv k4 (s2, the last s1) - norm - LeakyReLU], conv k4 s1 -> logits

Every logit judges one patch: 70 voxels wide with three layers (Isola et al. 2017, arXiv 1611.07004, appendix
6.1.2; widths and order of strides as in MONAI's PatchDiscriminator). An image of 64 x 64 voxels and three
layers give 6 x 6 logits. `num_scales` such networks look at the image itself and at the image averaged over
2, 4, ... voxels (Wang et al. 2018, arXiv 1711.11585, section 3.2); MONAI's look at one image, each deeper
than the one before (`scale_by`). Spectral norm: Miyato et al. 2018 (arXiv
1802.05957). There is no batch norm, so real and fake images may share a batch.

TimeDiscriminator judges one step of a diffusion (cdal.py): whether x_t is a plausible successor of the
noisier x_prev at time t. It is made of residual blocks without norms, after Xiao et al. 2022 (arXiv
2112.07804, appendix), with emb an embedding of t:

    h = conv1(lrelu(x)) + W emb;  h = conv2(down(lrelu(h)));  block = (h + skip(down(x))) / sqrt(2)
    logits = linear(mean over voxels of lrelu(conv_out(h ++ minibatch statistic)))

The minibatch statistic shows the discriminator how varied a batch is, so that it recognises a generator that
always makes the same: one more channel, everywhere the standard deviation over the batch, averaged over
channels and voxels (Karras et al. 2018, arXiv 1710.10196, section 3). `down` averages neighbouring voxels. A
logit is a mean over voxels, not a sum, so that its scale does not depend on the image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .blocks import SCALED, Conv, GroupNorm, Rescale, pad_to_multiple, timestep_embedding
from .config import InputError, at_least
from .metrics import halve


class DiscriminatorOutput(NamedTuple):
    """The judgement of images (B, C, *S), and the hidden maps that led to it."""

    logits: tuple[Tensor, ...]  # one (B, 1, *patches) per scale; high where the patch looks real
    features: tuple[Tensor, ...]  # the hidden maps (B, C', *s) of all scales, finest scale first

    def halves(self) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
        """The outputs of the first and of the second half of the batch, such as real and fake images."""
        first, second = (tuple(tuple(t.chunk(2)[i] for t in maps) for maps in self) for i in (0, 1))
        return DiscriminatorOutput(*first), DiscriminatorOutput(*second)


def strides_of(num_layers: int) -> tuple[int, ...]:
    """The strides of all layers but the last."""
    return (2,) * num_layers + (1,)


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    dims: Literal[2, 3] = 3  # spatial axes of the images
    in_channels: int = 1  # channels of the images
    channels: int = 32  # width of the first layer; every further layer doubles the width
    num_layers: int = 3  # layers after the first; 3: patches 70 voxels wide, 2: 34, 1: 16
    norm: Literal["instance", "group", "none"] = "instance"  # in the layers between the first and the last
    num_scales: int = 1  # discriminators, each on an image half as fine as that of the one before
    scale_by: Literal["image", "depth"] = "image"  # depth: all see one image, each with num_layers more
    last_kernel: Literal[1, 4] = 4  # of the last convolution
    spectral_norm: bool = False  # divide every weight by its largest singular value
    image_range: tuple[float, float] = (-1.0, 1.0)  # intensities within the network, for -1 and 1 outside

    def __post_init__(self) -> None:
        if not -math.inf < self.image_range[0] < self.image_range[1] < math.inf:
            raise InputError(f"image_range: expected low < high, got {self.image_range}")
        at_least(self, 1, "in_channels", "channels", "num_layers", "num_scales")
        if self.num_layers > 7:  # 128 times the width of the first
            raise InputError(f"num_layers: expected 1 to 7, got {self.num_layers}")
        if max(self.depths) > 7:
            raise InputError(f"num_scales: the last scale has {max(self.depths)} layers, expected at most 7")

    @property
    def depths(self) -> tuple[int, ...]:
        """`num_layers` of each scale."""
        deeper = self.scale_by == "depth"
        return tuple(self.num_layers * (i + 1 if deeper else 1) for i in range(self.num_scales))

    @property
    def min_size(self) -> int:
        """Voxels along every axis of the smallest image that the layers can judge.

        A norm needs at least two values per axis. Walking back from the last norm, where the size is 2, every
        layer of stride 2 doubles the size and every layer of stride 1 adds one (kernel 4, padding 1).
        """
        size = 2
        for stride in reversed(strides_of(max(self.depths))):
            size = size * 2 if stride == 2 else size + 1
        return size * 2 ** (self.num_scales - 1 if self.scale_by == "image" else 0)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise InputError if images of `size` voxels are too small for the layers."""
        if min(size) < self.min_size:
            raise InputError(
                f"disc.num_layers: {self.num_layers} layers at {self.num_scales} scales need images of "
                f"{self.min_size} voxels along every axis, got {tuple(size)}; fewer layers or scales need "
                "less"
            )


def make_layers(config: PatchDiscriminatorConfig, num_layers: int) -> nn.ModuleList:
    """The hidden layers, without their LeakyReLU, and the last convolution; weights are N(0, 0.02^2)."""
    c, strides = config, strides_of(num_layers)
    conv, instance = (nn.Conv2d, nn.InstanceNorm2d) if c.dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    layers, width = [], c.in_channels
    for i, stride in enumerate((*strides, 1)):
        last = i == len(strides)
        kernel, padding = (1, 0) if last and c.last_kernel == 1 else (4, 1)
        out = 1 if last else c.channels * 2**i
        norm = "none" if i == 0 or last else c.norm
        # The norm after the convolution subtracts the channel's mean, and with it any bias
        layer = conv(width, out, kernel, stride, padding, bias=norm == "none")
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        parts = [spectral_norm(layer) if c.spectral_norm else layer]
        parts += {"instance": [instance(out)], "group": [GroupNorm(out)], "none": []}[norm]
        layers.append(nn.Sequential(*parts))
        width = out
    return nn.ModuleList(layers)


class PatchDiscriminator(nn.Module):
    """Images (B, C, *S) -> DiscriminatorOutput with a logit for every patch."""

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(make_layers(config, num) for num in config.depths)
        self.rescale = nn.Identity() if config.image_range == SCALED else Rescale(SCALED, config.image_range)

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        c = self.config
        if x.ndim != c.dims + 2 or x.shape[1] != c.in_channels:
            raise InputError(
                f"image: expected (B, {c.in_channels}, {c.dims} axes), got shape {tuple(x.shape)}"
            )
        c.check_size(x.shape[2:])
        x, logits, features = self.rescale(x), [], []
        for i, layers in enumerate(self.scales):
            if i > 0 and c.scale_by == "image":
                x = halve(x)
            h = x
            for layer in layers[:-1]:
                h = F.leaky_relu(layer(h), 0.2)
                features.append(h)
            logits.append(layers[-1](h))
        return DiscriminatorOutput(tuple(logits), tuple(features))


# --- the discriminator of a diffusion step ------------------------------------------------------------------


@dataclass(frozen=True)
class TimeDiscriminatorConfig:
    dims: Literal[2, 3] = 3  # spatial axes
    in_channels: int = 4  # channels of x_t and x_prev together, plus those of the image if it is shown
    channels: tuple[int, ...] = (32, 64, 128, 128)  # width of each block; all but the first halve the axes
    halve_first: bool = False  # the first block halves the axes too, for large images
    emb_dim: int = 128  # width of the time embedding

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise InputError(f"channels: expected one positive width per block, got {self.channels}")
        at_least(self, 2, "emb_dim")


def minibatch_statistic(h: Tensor, parts: int = 1) -> Tensor:
    """How varied the samples h (B, C, *s) are, as one channel (B, 1, *s) that is the same everywhere.

    The value is the standard deviation over samples, averaged over channels and voxels. The batch is cut into
    `parts` equal parts (real and generated pairs), and each part has a value of its own. A part of a single
    sample has nearly 0, with a gradient of 0.
    """
    groups = h.float().unflatten(0, (parts, -1))  # (parts, b, C, *s)
    variance = groups.var(dim=1, correction=0)
    std = (variance + 1e-8).sqrt().flatten(1).mean(1)  # (parts,)
    std = std.repeat_interleave(len(h) // parts).view(-1, 1, *(1,) * (h.ndim - 2))
    return std.to(h.dtype).expand(-1, -1, *h.shape[2:])


class TimeBlock(nn.Module):
    """The residual block of TimeDiscriminator: (B, C_in, *S) -> (B, C_out, *S), half the size with `down`."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, emb_dim: int, down: bool):
        super().__init__()
        self.down = down
        self.conv1 = Conv(dims, in_channels, out_channels)
        self.emb_proj = nn.Linear(emb_dim, out_channels)
        self.conv2 = Conv(dims, out_channels, out_channels, zero_init=True)
        self.skip = Conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, 0.2))
        emb = self.emb_proj(emb)
        h = F.leaky_relu(h + emb.view(*emb.shape, *(1,) * (x.ndim - 2)), 0.2)
        if self.down:
            h, x = (halve(pad_to_multiple(v, (2,) * (v.ndim - 2))) for v in (h, x))
        return (self.conv2(h) + self.skip(x)) / 2**0.5


class TimeDiscriminator(nn.Module):
    """A diffusion step from x_prev to the less noisy x_t, both (B, K, *S), at t (B,) -> logits (B, 1)."""

    def __init__(self, config: TimeDiscriminatorConfig):
        super().__init__()
        self.config = c = config
        self.time_embed = nn.Sequential(
            nn.Linear(c.emb_dim, c.emb_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(c.emb_dim, c.emb_dim),
            nn.LeakyReLU(0.2),
        )
        self.conv_in = Conv(c.dims, c.in_channels, c.channels[0], kernel=1)
        widths = (c.channels[0], *c.channels)
        self.blocks = nn.ModuleList(
            TimeBlock(c.dims, a, b, c.emb_dim, down=i > 0 or c.halve_first)
            for i, (a, b) in enumerate(zip(widths, c.channels, strict=False))
        )
        self.conv_out = Conv(c.dims, c.channels[-1] + 1, c.channels[-1])
        self.linear = nn.Linear(c.channels[-1], 1)

    def forward(
        self, x_t: Tensor, t: Tensor, x_prev: Tensor, image: Tensor | None = None, parts: int = 1
    ) -> DiscriminatorOutput:
        """image (B, C, *S) is shown beside the pair where `in_channels` counts it; parts of the batch have
        minibatch statistics of their own."""
        c = self.config
        h = torch.cat([x_t, x_prev] if image is None else [x_t, x_prev, image], dim=1)
        if h.ndim != c.dims + 2 or h.shape[1] != c.in_channels:
            raise InputError(f"pair: expected (B, {c.in_channels}, {c.dims} axes), got {tuple(h.shape)}")
        emb = self.time_embed(timestep_embedding(t, c.emb_dim).to(self.linear.weight.dtype))
        h, features = self.conv_in(h), []
        for block in self.blocks:
            h = block(h, emb)
            features.append(h)
        h = self.conv_out(torch.cat([h, minibatch_statistic(h, parts)], dim=1))
        logits = self.linear(F.leaky_relu(h, 0.2).flatten(2).mean(2))  # (B, 1)
        return DiscriminatorOutput((logits,), tuple(features))
