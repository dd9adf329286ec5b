"""KL autoencoder: a volume becomes a small latent with a Gaussian posterior, and the latent a volume again.

Diffusion on voxels is expensive: a head of 192 x 224 x 192 voxels has 8.3 million of them. So an autoencoder
comes first. Its encoder compresses the volume to a latent with a sixteenth of the values, at a 64th of the
positions; its decoder restores the volume; and diffusion (latent_diffusion.py) need only learn to make
latents. With the default settings (three levels, hence two down-samplings by 2) a voxel takes this way:

    x           (B, 1, 192, 224, 192)   the image, intensities scaled to about [-1, 1]
    encoder     (B, 4, 48, 56, 48)      residual blocks and two strided convolutions (blocks.Encoder)
    quant_conv  (B, 8, 48, 56, 48)      a 1x1 convolution to mean and logvar of every latent element
    z           (B, 4, 48, 56, 48)      drawn from the posterior, as below; latent voxel (i, j, k) describes
                                        the image around voxels 4i..4i+3, 4j..4j+3, 4k..4k+3
    post_quant_conv, decoder            back to (B, 1, 192, 224, 192), with two up-samplings (blocks.Decoder)

    q(z given x) = N(mean(x), diag(exp(logvar(x))))                             the posterior     [1] eq. 9
    z     = mean + exp(logvar / 2) * noise,   noise ~ N(0, 1)                   a draw from it    [1] sec. 2.4
    recon = decode(z)
    loss  = reconstruction + kl_weight * KL(q || N(0, 1))                       in losses.py      [1] eq. 10

The noise in z makes near latents decode to like volumes, and the KL term keeps latents near N(0, 1). Such a
space is what a diffusion model can learn.

Any image size works. `encode` repeats the last plane of each axis up to a multiple of `downsampling`, and
`decode` crops. An image of 5 x 8 x 8 voxels is padded to 8 x 8 x 8, has a latent of 2 x 2 x 2, and comes back
as 5 x 8 x 8.

The architecture is the first stage of Rombach et al. 2022 [2], with MONAI's choices as defaults: no SiLU
before the last convolutions, down-sampling padded at the end of each axis. `trunk="plain"` is the older and
cheaper one of the first VQ-VAE [3], without norms and attention. With `shortcut` a linear map runs beside
encoder and decoder, from the 4 x 4 x 4 voxels of a latent voxel to this voxel and back (blocks.Encoder):
networks that train for minutes need it, since they learn slowly what a linear map learns at once. Volumes
that memory does not hold are encoded and decoded in slabs, exactly (large/streaming.py). Not here: losses and
training.

[1] Kingma & Welling 2014, arXiv 1312.6114. [2] arXiv 2112.10752. [3] arXiv 1711.00937.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from .blocks import (
    Conv,
    Decoder,
    DepthToSpace,
    Encoder,
    SpaceToDepth,
    check_levels,
    crop_to,
    level_strides,
    pad_to_multiple,
    per_level,
    plain_decoder,
    plain_encoder,
    total_strides,
    trunk_options,
)
from .config import InputError, at_least
from .large.streaming import run_trunk, trunk_planes

PLAIN_ONLY = ("res_channels",)  # settings of one kind of trunk alone
NORM_ONLY = (
    *("attention_levels", "strides", "stem", "mid_attention", "decoder_mid_attention", "num_groups"),
    *("gn_eps", "final_silu", "attn_out_proj", "upsample", "down_pad", "extra_up_block", "shortcut"),
)


@dataclass(frozen=True)
class VAEConfig:
    dims: Literal[2, 3] = 3  # spatial axes of the images
    in_channels: int = 1  # channels of the images
    latent_channels: int = 4  # channels of the latent z
    channels: tuple[int, ...] = (32, 64, 64)  # width of each level, finest first
    num_res_blocks: tuple[int, ...] = (2,)  # residual blocks at each level, or one number for all
    attention_levels: tuple[bool, ...] = (False,)  # self-attention at each level, or one value for all
    strides: tuple[tuple[int, ...], ...] | None = None  # 1 or 2 per axis, for each down-sampling; none = 2
    stem: tuple[int, ...] = (1,)  # space-to-depth factor (1 or 2) per axis, or one for all: exact, cheap
    mid_attention: bool = False  # ResBlock, attention, ResBlock at the coarsest level
    decoder_mid_attention: bool | None = None  # the same in the decoder; none = as in the encoder
    trunk: Literal["norm", "plain"] = "norm"  # plain: ReLU, no norms, one more down-sampling (VQ-VAE)
    res_channels: tuple[int, ...] | None = None  # trunk plain: width within residual blocks; none = level's
    num_groups: int = 32  # groups of the norms (fewer where the channels do not divide)
    gn_eps: float = 1e-6  # epsilon of the norms
    final_silu: bool = False  # SiLU between the last norm and the last convolution
    attn_out_proj: bool = True  # linear layer after attention
    upsample: Literal["nearest", "trilinear", "deconv2", "deconv3"] = "nearest"  # up-sampling of the decoder
    down_pad: Literal["asym", "sym"] = "asym"  # zeros at the end only, or on both sides, of each strided axis
    double_z: bool = False  # the encoder ends in 2 * latent_channels (CompVis), not in 1 * (MONAI)
    quant_conv: bool = True  # 1x1 convolutions on both sides of the latent (without: double_z)
    extra_up_block: bool = False  # one residual block more per level in the decoder
    image_range: tuple[float, float] = (-1.0, 1.0)  # intensities within the network, for -1 and 1 outside
    shortcut: bool = False  # a linear map beside the layers, from voxels to latent and back: learns sooner
    checkpointing: bool = False  # recompute each block in backward: less memory, more time

    def __post_init__(self):
        check_levels(self)
        self._check_trunk()
        if not -math.inf < self.image_range[0] < self.image_range[1] < math.inf:
            raise InputError(f"image_range: expected low < high, got {self.image_range}")
        at_least(self, 1, "in_channels", "latent_channels", "num_groups")
        if len(self.stem) not in (1, self.dims) or not set(self.stem) <= {1, 2}:
            raise InputError(f"stem: expected 1 or 2 for each of {self.dims} axes, got {self.stem}")

    def _check_trunk(self) -> None:
        """InputError for a setting that the trunk does not have."""
        levels, widths = len(self.channels), self.res_channels
        if widths is not None and (len(widths) not in (1, levels) or min(widths) < 1):
            raise InputError(f"res_channels: expected 1 or {levels} positive widths, got {widths}")
        others = PLAIN_ONLY if self.trunk == "norm" else NORM_ONLY
        for name, usual in ((f.name, f.default) for f in fields(self) if f.name in others):
            value = getattr(self, name)
            alike = isinstance(usual, tuple) and set(value) == set(usual)  # one value for all levels, or each
            if value != usual and not alike:
                raise InputError(f"{name}: got {value}, has no effect with trunk {self.trunk}")

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Total factor per axis between image and latent."""
        return total_strides(per_level(self.stem, self.dims), *level_strides(self))


@dataclass(frozen=True)
class Posterior:
    """The Gaussian q(z given x) that the encoder predicts; mean and logvar are (B, C_z, *s)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """From moments (B, 2 C_z, *s): the mean, then the log-variance; both in fp32.

        The log-variance is clamped to [-30, 20], so that exp stays finite. The clamp limits the value but not
        the gradient: the KL can bring back a log-variance that has left the range.
        """
        mean, raw = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        return cls(mean, raw + (raw.clamp(-30.0, 20.0) - raw).detach())

    @classmethod
    def point(cls, mean: Tensor) -> Posterior:
        """All mass at `mean`: a Gaussian of variance exp(-inf) = 0, for encoders without noise."""
        return cls(mean, torch.full_like(mean, -math.inf))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """z drawn from the posterior, with standard Gaussian noise of the shape of `mean`."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most probable z."""
        return self.mean


class Autoencoder(nn.Module):
    """What every autoencoder is made of: encoder, `quant_conv`, `post_quant_conv`, decoder; any image size.

    A subclass builds the parts, in the order in which checkpoints and optimizers keep their parameters, and
    says in `posterior` how the encoder's output becomes a distribution of latents.

    memory: GiB that `encode` and `decode` may use; none = what is free when they are called.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.memory: float | None = None

    def build_encoder(self, width: int, num_moments: int) -> None:
        """Encoder that ends in `width` channels, then the 1x1 `quant_conv` to `num_moments` channels."""
        c = self.config
        if c.trunk == "plain":
            self.encoder: nn.Module = plain_encoder(c, width)
        else:
            self.encoder = Encoder(c.dims, c.in_channels, width, **trunk_options(c), down_pad=c.down_pad)
        if not c.quant_conv and width != num_moments:
            raise InputError(
                f"quant_conv: the encoder must end in {num_moments} channels without it, not {width}"
            )
        self.quant_conv = Conv(c.dims, width, num_moments, kernel=1) if c.quant_conv else nn.Identity()

    def build_decoder(self) -> None:
        """The 1x1 `post_quant_conv`, then the decoder."""
        c, z = self.config, self.config.latent_channels
        self.post_quant_conv = Conv(c.dims, z, z, kernel=1) if c.quant_conv else nn.Identity()
        if c.trunk == "plain":
            self.decoder: nn.Module = plain_decoder(c)
            return
        options = trunk_options(c)
        if c.decoder_mid_attention is not None:
            options["mid_attention"] = c.decoder_mid_attention
        self.decoder = Decoder(
            c.dims,
            z,
            c.in_channels,
            **options,
            upsample=c.upsample,
            extra_up_block=c.extra_up_block,
        )

    def fresh_copy(self) -> Autoencoder:
        """Another autoencoder with the same settings and newly initialised weights."""
        return type(self)(self.config)

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Image voxels per latent voxel along each axis."""
        return self.config.downsampling

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """The shape (C_z, *s) of the latent of one image of `size` voxels."""
        latent_size = (math.ceil(n / f) for n, f in zip(size, self.downsampling, strict=True))
        return (self.config.latent_channels, *latent_size)

    def posterior(self, moments: Tensor) -> Posterior:
        """The distribution of latents that the output of `quant_conv` stands for."""
        raise NotImplementedError

    def encode(self, x: Tensor, memory: float | None = None) -> Posterior:
        """Image x (B, C, *S) of any size -> posterior of its latent, (B, C_z, *s).

        memory: GiB that may be used beside image and latent; none = `self.memory`, and if that is none too,
        what is free. An image that needs more is encoded slab by slab, with the same result
        (large/streaming.py).
        """
        self._check(x, self.config.in_channels, "image")
        x, memory = pad_to_multiple(x, self.downsampling), self.memory if memory is None else memory
        return self.posterior(self.quant_conv(run_trunk(self.encoder, x, memory)))

    def decode(self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None) -> Tensor:
        """Latent z (B, C_z, *s) -> image (B, C, *(s * downsampling)), cropped to `size` where given.

        memory: as in `encode`.
        """
        self._check(z, self.config.latent_channels, "latent")
        z = self.post_quant_conv(z.to(next(self.decoder.parameters()).dtype))
        x = run_trunk(self.decoder, z, self.memory if memory is None else memory)
        return x if size is None else crop_to(x, size)

    def decode_planes(
        self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """`decode` of one latent z (1, C_z, *s), some planes of the first axis at a time: (first plane,
        planes (1, C, n, ...)), without gradients. So an image need not fit the memory as a whole."""
        self._check(z, self.config.latent_channels, "latent")
        z = self.post_quant_conv(z.to(next(self.decoder.parameters()).dtype))
        for start, part in trunk_planes(self.decoder, z, self.memory if memory is None else memory):
            if size is None:
                yield start, part
            elif start < size[0]:
                yield start, crop_to(part, (min(part.shape[2], size[0] - start), *size[1:]))

    def _check(self, x: Tensor, channels: int, what: str) -> None:
        if x.ndim != self.config.dims + 2 or x.shape[1] != channels:
            raise InputError(
                f"{what}: expected (B, {channels}, {self.config.dims} axes), got shape {tuple(x.shape)}"
            )


class PixelStem(Autoencoder):
    """No autoencoder, for diffusion on pixels: the voxels of a block become the channels of one position, and
    back. Nothing is lost: decode(encode(x)) is x, bit for bit. There are no weights, and no memory is needed
    beside image and latent.

    Example: stem 2 makes (1, 64, 64, 64) voxels (8, 32, 32, 32) "latents", stem 1 leaves the image as it is.
    """

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.down, self.up = SpaceToDepth(self.downsampling), DepthToSpace(self.downsampling)

    @staticmethod
    def config_of(dims: int, channels: int, stem: int) -> VAEConfig:
        """The settings for images of `channels`. stem: 1 or 2, voxels per axis of a block."""
        width = channels * stem**dims
        return VAEConfig(
            dims=dims, in_channels=channels, latent_channels=width, channels=(width,), stem=(stem,)
        )

    def encode(self, x: Tensor, memory: float | None = None) -> Posterior:
        self._check(x, self.config.in_channels, "image")
        return Posterior.point(self.down(pad_to_multiple(x, self.downsampling)))

    def decode(self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None) -> Tensor:
        self._check(z, self.config.latent_channels, "latent")
        x = self.up(z)
        return x if size is None else crop_to(x, size)

    def decode_planes(
        self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.decode(z, size)


class AutoencoderKL(Autoencoder):
    """The autoencoder whose posterior is a Gaussian, kept near N(0, 1) by the KL term of its loss."""

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.build_encoder(config.latent_channels * (1 + config.double_z), 2 * config.latent_channels)
        self.build_decoder()

    def posterior(self, moments: Tensor) -> Posterior:
        return Posterior.from_moments(moments)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Image to latent and back: (recon, posterior) with recon = decode(mean + std * noise).

        Without noise, recon = decode(mean).
        """
        posterior = self.encode(x)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(z, x.shape[2:]), posterior
