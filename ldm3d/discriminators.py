"""Critics: networks that tell real images from made ones, patch by patch.

    conv k4 s2 - LeakyReLU, num_layers x [conv k4 (s2, the last s1) - norm - LeakyReLU], conv k4 s1 -> logits

Every logit judges one patch, 70 voxels wide with three layers: Isola et al. 2017 (arXiv 1611.07004, appendix
6.1.2), with the widths and the order of strides of MONAI's PatchDiscriminator. `num_scales` copies of it look
at the image and at versions of it averaged over 2, 4, ... voxels: Wang et al. 2018 (arXiv 1711.11585), sec.
3.2. Spectral norm: Miyato et al. 2018 (arXiv 1802.05957). There is no batch norm, so that real and fake
images may share a batch and ranks need no exchange.

The objectives are in losses.py. Left out: minibatch statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .blocks import GroupNorm
from .config import InputError
from .metrics import halve


class CriticOutput(NamedTuple):
    """What a critic says of (B, C, *S)."""

    logits: tuple[Tensor, ...]  # one (B, 1, *patches) per scale; above 0: real
    features: tuple[Tensor, ...]  # the hidden maps (B, C', *s) of all scales, finest scale first

    def halves(self) -> tuple[CriticOutput, CriticOutput]:
        """Those of the first and of the second half of the batch: real and fake images in one forward."""
        first, second = (tuple(tuple(t.chunk(2)[i] for t in maps) for maps in self) for i in (0, 1))
        return CriticOutput(*first), CriticOutput(*second)


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    dims: Literal[2, 3] = 3  # spatial axes of the images
    in_channels: int = 1  # channels of the images
    channels: int = 32  # width of the first layer; every next has twice the width of the one before
    num_layers: int = 3  # layers after the first: 3 judge patches 70 voxels wide, 2 34, 1 16
    norm: Literal["instance", "group", "none"] = "instance"  # of the layers between the first and the last
    num_scales: int = 1  # critics, each on an image half as fine as the one before
    spectral_norm: bool = False  # divide every weight by its largest singular value

    def __post_init__(self) -> None:
        for name in ("in_channels", "channels", "num_layers", "num_scales"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def min_size(self) -> int:
        """The smallest image, in voxels along every axis, that leaves two values a channel to every norm."""
        size = 2  # of the last norm, and enough for the last convolution, which makes n - 1 of n
        for stride in reversed(self.strides):
            size = size * 2 if stride == 2 else size + 1
        return size * 2 ** (self.num_scales - 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all layers but the last."""
        return (2,) * self.num_layers + (1,)


def make_layers(config: PatchDiscriminatorConfig) -> nn.ModuleList:
    """The hidden layers, each to be followed by LeakyReLU, and the last convolution; weights N(0, 0.02^2)."""
    c = config
    conv, instance = (nn.Conv2d, nn.InstanceNorm2d) if c.dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    layers, width = [], c.in_channels
    for i, stride in enumerate((*c.strides, 1)):
        last = i == len(c.strides)
        out = 1 if last else c.channels * 2**i
        norm = "none" if i == 0 or last else c.norm
        # A bias before a norm of single channels would be taken away again
        layer = conv(width, out, 4, stride, 1, bias=norm == "none")
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        parts = [spectral_norm(layer) if c.spectral_norm else layer]
        parts += {"instance": [instance(out)], "group": [GroupNorm(out)], "none": []}[norm]
        layers.append(nn.Sequential(*parts))
        width = out
    return nn.ModuleList(layers)


class PatchDiscriminator(nn.Module):
    """(B, C, *S) -> CriticOutput."""

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(make_layers(config) for _ in range(config.num_scales))

    def check_size(self, size: Sequence[int]) -> None:
        """InputError if images of `size` voxels are too small for the layers."""
        c = self.config
        if min(size) < c.min_size:
            raise InputError(
                f"num_layers: {c.num_layers} layers at {c.num_scales} scales need images of {c.min_size} "
                f"voxels along every axis, got {tuple(size)}; fewer layers or scales do with less"
            )

    def forward(self, x: Tensor) -> CriticOutput:
        c = self.config
        if x.ndim != c.dims + 2 or x.shape[1] != c.in_channels:
            raise InputError(
                f"image: expected (B, {c.in_channels}, {c.dims} axes), got shape {tuple(x.shape)}"
            )
        self.check_size(x.shape[2:])
        logits, features = [], []
        for i, layers in enumerate(self.scales):
            if i > 0:
                x = halve(x)
            h = x
            for layer in layers[:-1]:
                h = F.leaky_relu(layer(h), 0.2)
                features.append(h)
            logits.append(layers[-1](h))
        return CriticOutput(tuple(logits), tuple(features))
