"""cDAL: segmentation by diffusion in a handful of steps.

A diffusion model that makes masks of an image can be asked several times. Every answer is a vote, one
plausible mask. The mean of the votes is the probability of each label; where the votes differ, the case is
uncertain. A mask y (B, K, *S) is one-hot in {-1, 1}, with K labels, background included.

Why few steps are a problem, and the way out [1]. With a thousand small steps, x_t given the noisier x_prev is
nearly Gaussian, and a network need only predict its mean. With two or four large steps many different masks
are possible at once, and their mean is a blur. So the generator G makes one whole mask, and a random z may
choose which one. Once x_start is given, x_t is Gaussian however large the step, and is drawn from the
posterior q(x_t given x_start, x_prev). Noise and posterior are those of diffusion_kernel.py; only the betas
are special (`few_step_betas`).

    levels      from x_0, nearly a mask, to x_T, nearly noise. Step t = T - 1 .. 0 goes from x_prev at level
                t + 1 to x_t at level t
    training    x_t = q_sample(y, t),  x_prev = q_step(x_t, t + 1),  pred_x_start = G(x_prev, t, image, z);
                the loss compares pred_x_start with y
    inference   x_T = noise; for t = T - 1 .. 0: pred_x_start = G(x_prev, t, image, z), and x_t is drawn from
                the posterior, which has no noise at t = 0 and ends in pred_x_start
    votes       probability = mean of (pred_x_start + 1) / 2;  uncertainty = its entropy / log K

    Example: T = 2, one voxel, one label. x_2 = -0.5 is noise, and G says pred_x_start = 1. The posterior has
    mean 0.280 * 1 + 0.022 * (-0.5) = 0.270 and variance 0.921, so that x_1 = 0.270 + 0.960 noise. From x_1
    the generator makes its second mask, which is the vote.

The discriminator D(x_t, t, x_prev) learns whether x_t was made from a true mask (real) or a generated one
(fake). cDAL [2] uses its attention alone, the mean over channels of one of its hidden maps: G sees the true
mask times the attention, noised, and the loss is mean (pred_x_start - y)^2. `CDALConfig` has more choices:
    attention of mean 1, or as a weight of the loss; a discriminator that sees the image; an adversarial
    loss; Dice and cross-entropy
    own_estimate: x_prev of a true mask shows so much of the mask that G can ignore the image, but inference
    has no true mask. So x_prev is made from the generator's own first estimate, as in inference

Several raters. Where they differ, a vote should be what one of them could have drawn, and not the mean of
all. The estimate of a generator that learns from all raters is their mean, so its own estimate is no help:
train on the true mask (own_estimate false) in many steps, with cross-entropy alone, whose best pred_x_start
is the probability of each label given x_prev. A mask is decided early: even at much noise, an average over
neighbours shows it. A mask multiplied by input_scale b is hidden better [4], so that outlines are decided
over many steps: x_t = q_sample(b y, t), and G sees x_prev at variance 1.

    Example: a border of 200 voxels, b = 1, alpha_bar = 0.01. The signal-to-noise ratio of a voxel is 0.01,
    but that of the border, which moves as one, is 200 * 0.01 = 2: it is decided. With b = 0.2 it is 0.08.

[1] Xiao et al. 2022 (denoising diffusion GANs), arXiv 2112.07804, the posterior is eq. 6. [2] Hejrati et al.
2025, arXiv 2502.06997. [3] Song et al. 2021, arXiv 2011.13456. [4] Input scaling: Chen 2023, arXiv
2301.10972, eq. 2; of masks, arXiv 2504.05977. [5] Lee et al. 2015, arXiv 1409.5185; as in nnU-Net, Isensee
et al. 2021. Left out: FIR re-sampling and progressive inputs of the generator of [2]; the blocks here are the
library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import DepthToSpace, Encoder, SpaceToDepth, crop_to, pad_to_multiple, per_level
from .config import InputError, at_least
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .engine.distributed import keyed_generator, print0
from .engine.machine import free_bytes
from .engine.memory_plan import GIB, USABLE, peak_bytes
from .large.windows import check_window, window_starts, window_weight
from .losses import (
    cross_entropy_loss,
    dice_loss,
    disc_accuracy,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from .normconv import Conv
from .unet import SLOW_ATTENTION, UNet, UNetConfig

FEW = 8  # training patches that are segmented as one image without a look at the memory

# draw(purpose, *shape) -> (B, *shape) Gaussian, each sample's own. The purpose is part of the seed: another
# word for it would make other numbers. So the noise of x_prev keeps its first purpose, "x_next".
Draw = Callable[..., Tensor]

# --- few steps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewStepConfig:
    num_timesteps: int = 2  # steps T
    schedule: Literal["vp", "geometric"] = "vp"  # how noise grows with time
    beta_min: float = 0.1  # noise per unit of time at the start; geometric: the variance there
    beta_max: float = 20.0  # noise per unit of time at the end; geometric: the variance there, below 1
    input_scale: float = 1.0  # factor of the mask before noise is added; below 1: more of the mask is hidden

    def __post_init__(self) -> None:
        if not 1 <= self.num_timesteps <= 64:
            raise InputError(f"num_timesteps: expected 1 to 64, got {self.num_timesteps}")
        if not 0 < self.input_scale <= 1:
            raise InputError(f"input_scale: expected 0 < input_scale <= 1, got {self.input_scale}")
        limit = 1.0 if self.schedule == "geometric" else math.inf
        if not 0 < self.beta_min < self.beta_max < limit:
            raise InputError(
                f"beta_max: expected 0 < beta_min < beta_max < {limit:g} ({self.schedule}), got "
                f"{self.beta_min} and {self.beta_max}"
            )


def few_step_betas(config: FewStepConfig) -> Tensor:
    """betas (T + 1,) float64: the variance of the noise that each level adds, level 0 included.

    The trace of noise at level 0, beta_0 = 1e-8, is as published. Without it a true mask at level 0 would
    have two values only, which no generated mask has.
    """
    T, low, high = config.num_timesteps, config.beta_min, config.beta_max
    tau = 1e-3 + (1 - 1e-3) * torch.arange(T + 1, dtype=torch.float64) / T
    if config.schedule == "geometric":
        alpha_bar = 1 - low * (high / low) ** tau
    else:
        alpha_bar = torch.exp(-(tau**2) * (high - low) / 2 - tau * low)  # [3], the integral of its VP SDE
    first = torch.full((1,), 1e-8, dtype=torch.float64)
    return torch.cat([first, 1 - alpha_bar[1:] / alpha_bar[:-1]])


# --- generator ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratorConfig:
    encoder_channels: int = 16  # width of the image encoder, which runs once a case
    encoder_blocks: int = 2  # residual blocks of the image encoder
    stem: tuple[int, ...] = (1,)  # space-to-depth factor (1 or 2) per axis, or one for all; exact and cheap
    latent_dim: int = 0  # length of the random vector z; 0 = no z
    mapping_layers: int = 3  # layers from z to the embedding, beside the first
    output: Literal["softmax", "tanh"] = "softmax"  # how the output becomes x_start; tanh: as published
    deep_supervision: bool = False  # coarser levels of the U-Net also learn to give the mask

    def __post_init__(self) -> None:
        at_least(self, 1, "encoder_channels")
        at_least(self, 0, "encoder_blocks", "latent_dim", "mapping_layers")


class MappingNetwork(nn.Module):
    """How z chooses among plausible masks: z (B, latent_dim) -> embedding (B, emb_dim).

    The embedding drives the adaptive norms of every block of the U-Net. First z is divided by its root mean
    square. Karras et al. 2019 (arXiv 1812.04948), section 2.
    """

    def __init__(self, latent_dim: int, emb_dim: int, num_layers: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(latent_dim, emb_dim)]
        for _ in range(num_layers):
            layers += [nn.SiLU(), nn.Linear(emb_dim, emb_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))


class Generator(nn.Module):
    """Makes a whole mask from a noisy one and an image.

    x_prev (B, K, *S) noisy mask, t (B,), image (B, C, *S), z (B, latent_dim) -> (B, K, *S), of which
    `to_x_start` makes the mask. An encoder turns the image into features, once a case; the U-Net gets x_prev
    and the features as channels, at every step. Any size works.
    """

    def __init__(self, config: GeneratorConfig, unet: UNetConfig, image_channels: int, num_labels: int):
        super().__init__()
        self.config = c = config
        dims, self.stem = unet.dims, per_level(c.stem, unet.dims)
        if len(self.stem) != dims or not set(self.stem) <= {1, 2}:
            raise InputError(f"generator.stem: expected 1 or 2 for each of {dims} axes, got {c.stem}")
        if c.deep_supervision and len(unet.channels) == 1:
            raise InputError("generator.deep_supervision: needs unet.channels of two levels or more")
        self.encoder = Encoder(
            dims,
            image_channels,
            c.encoder_channels,
            channels=(c.encoder_channels,),
            num_res_blocks=(c.encoder_blocks,),
            attention_levels=(False,),
            strides=(),
            stem=self.stem,
            num_groups=unet.num_groups,
            final_silu=True,
            checkpointing=unet.checkpointing,
        )
        parts = num_labels * math.prod(self.stem)
        unet = replace(unet, in_channels=parts + c.encoder_channels, out_channels=parts)
        self.mapping = MappingNetwork(c.latent_dim, unet.emb_dim, c.mapping_layers) if c.latent_dim else None
        self.unet = UNet(unet)
        with torch.no_grad():  # at first only the image counts: the noise would slow learning down
            self.unet.conv_in.weight[:, :parts] = 0
        widths = reversed(unet.channels[1:]) if c.deep_supervision else ()
        self.heads = nn.ModuleList(Conv(dims, width, num_labels, kernel=1) for width in widths)
        self.to_parts, self.from_parts = SpaceToDepth(self.stem), DepthToSpace(self.stem)

    def encode(self, image: Tensor) -> Tensor:
        """The features of the image (B, C, *S) that `predict` gets: (B, encoder_channels, *s)."""
        return self.encoder(pad_to_multiple(image, self.stem))

    def attended(self, size: Sequence[int]) -> int:
        """`UNetConfig.attended` for images of this size."""
        return self.unet.config.attended([-(-n // f) for n, f in zip(size, self.stem, strict=True)])

    def predict(
        self,
        x_prev: Tensor,
        t: Tensor,
        features: Tensor,
        z: Tensor | None,
        coarse: list[Tensor] | None = None,
    ) -> Tensor:
        """`forward` for an image that is encoded already. A list `coarse` is filled as by `UNet.features`."""
        emb = None if self.mapping is None else self.mapping(z)
        parts = x_prev if max(self.stem) == 1 else self.to_parts(pad_to_multiple(x_prev, self.stem))
        h = self.unet.features(torch.cat([parts, features], dim=1), t, emb=emb, coarse=coarse)
        output = self.unet.output(h, parts.shape[2:])
        return output if max(self.stem) == 1 else crop_to(self.from_parts(output), x_prev.shape[2:])

    def forward(
        self, x_prev: Tensor, t: Tensor, image: Tensor, z: Tensor | None = None, deep: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """deep: also the outputs of the coarser levels, (B, K, *s) each, coarsest first; none without
        deep_supervision."""
        if not deep:
            return self.predict(x_prev, t, self.encode(image), z)
        coarse: list[Tensor] = []
        output = self.predict(x_prev, t, self.encode(image), z, coarse)
        return output, [head(h) for head, h in zip(self.heads, coarse if self.heads else (), strict=True)]

    def to_x_start(self, output: Tensor) -> Tensor:
        """The output (B, K, *S) as pred_x_start in [-1, 1], float32."""
        output = output.float()
        return output.tanh() if self.config.output == "tanh" else 2 * output.softmax(1) - 1


# --- attention ----------------------------------------------------------------------------------------------


def attention_map(features: Tensor, size: Sequence[int], normalise: bool) -> Tensor:
    """Where the discriminator looks: the mean over channels of its hidden map (B, C, *s), as (B, 1, *size).

    The plain mean has any sign and scale, as published. `normalise` standardises it over the voxels of a
    sample, applies a sigmoid and divides by the mean: every value is above 0, and their mean is 1.
    """
    mode = "bilinear" if len(size) == 2 else "trilinear"
    a = F.interpolate(features.float().mean(1, keepdim=True), size=tuple(size), mode=mode)
    if not normalise:
        return a
    axes = tuple(range(1, a.ndim))
    a = a - a.mean(axes, keepdim=True)
    a = torch.sigmoid(a / (a.square().mean(axes, keepdim=True).sqrt() + 1e-6))
    return a / a.mean(axes, keepdim=True)


# --- the method ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CDALConfig:
    diffusion: bool = True  # false: a plain network that runs once, with zeros for x_prev and z
    kernel: FewStepConfig = field(default_factory=FewStepConfig)
    noisiest: float | None = None  # share of the training samples at t = T - 1; none = 1 / T
    own_estimate: bool = True  # train at t < T - 1 on the generator's own mask, noised, not on the true one
    mse_weight: float = 0.0  # weight of the squared error of pred_x_start
    ce_weight: float = 1.0  # weight of the cross-entropy
    dice_weight: float = 1.0  # weight of the Dice loss
    adversarial_weight: float = 0.0  # weight of g_loss: the discriminator should take the fake x_t for real
    attention: Literal["none", "input", "loss"] = "none"  # the discriminator's, on the true mask or the loss
    attention_normalised: bool = True  # attention positive and of mean 1, instead of a raw mean over channels
    attention_layer: int = -1  # block of the discriminator that the attention is taken from
    disc_sees_image: bool = True  # the discriminator sees the image beside x_t and x_prev
    r1_weight: float = 0.5  # weight of R1, the discriminator's squared gradient at real x_t
    r1_every: int = 10  # R1 is computed every so many steps, and multiplied by this number

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Settings of older versions: critic_sees_image is now disc_sees_image."""
        if "critic_sees_image" in values:
            values["disc_sees_image"] = values.pop("critic_sees_image")
        return values

    def __post_init__(self) -> None:
        if self.noisiest is not None and not 0 <= self.noisiest <= 1:
            raise InputError(f"noisiest: expected a share from 0 to 1, got {self.noisiest}")
        at_least(self, 0, "mse_weight", "ce_weight", "dice_weight", "adversarial_weight", "r1_weight")
        if max(self.mse_weight, self.ce_weight, self.dice_weight) == 0:
            raise InputError("mse_weight: one of mse_weight, ce_weight, dice_weight must be above 0")
        at_least(self, 1, "r1_every")
        if self.attention == "input" and self.own_estimate:
            raise InputError("attention: input changes the noised true mask; own_estimate must be false")
        if self.attention == "loss" and not self.attention_normalised:
            raise InputError("attention: loss needs attention_normalised, or weights would be negative")
        if self.has_discriminator and not self.diffusion:
            raise InputError("diffusion: false has no discriminator: attention none, adversarial_weight 0")

    @property
    def has_discriminator(self) -> bool:
        return self.attention != "none" or self.adversarial_weight > 0


class CDAL:
    """Losses of a generator and a discriminator, and votes of a generator. Has no parameters of its own.

    `net` is the bare generator; `model` is what training calls, net itself or net in DDP.
    """

    def __init__(self, config: CDALConfig, num_labels: int):
        self.config, self.num_labels = config, num_labels
        few = config.kernel if config.diffusion else replace(config.kernel, num_timesteps=1)
        betas, self.num_timesteps, self.scale = few_step_betas(few), few.num_timesteps, few.input_scale
        kind = KernelConfig(process="vp", prediction="x_start")
        self.kernel = DiffusionKernel(kind, betas)  # adds noise; its timestep i is level i, 0 to T
        # Without beta_0, so that clean comes right after level 1; its timestep t is level t + 1
        self.posterior = DiffusionKernel(kind, betas[1:])
        self.counted: dict[tuple, int] = {}  # votes and patch -> bytes, of `window_in_memory`
        self.too_large: set[tuple[int, ...]] = set()  # sizes of images that are segmented in windows

    # Parts

    def step(self, x_start: Tensor, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, K, *S) drawn from q(x_t given x_start, x_prev) with this noise; at t = 0 scaled x_start."""
        mean, variance = self.posterior.q_posterior(self.scale * x_start, x_prev, t)
        return mean + variance.sqrt() * noise

    def unit(self, x_prev: Tensor, t: Tensor) -> Tensor:
        """x_prev at level t + 1 with variance 1, as the generator sees it; a scaled mask makes it smaller."""
        if self.scale == 1:
            return x_prev
        signal = self.kernel.alphas_cumprod[t.cpu() + 1]
        variance = self.scale**2 * signal + 1 - signal
        return x_prev * variance.rsqrt().to(x_prev).view(-1, *(1,) * (x_prev.ndim - 1))

    def t_from_uniform(self, u: Tensor) -> Tensor:
        """Training times (B,) int64 in [0, T) from u (B,) in [0, 1)."""
        T, share = self.num_timesteps, self.config.noisiest
        if share is None or T == 1:
            return (u.double() * T).long().clamp(max=T - 1)
        rest = (u.double() - share) / max(1 - share, 1e-9)
        return torch.where(u < share, T - 1, (rest * (T - 1)).long().clamp(0, T - 2))

    def one_hot(self, mask: Tensor) -> Tensor:
        """mask (B, *S) int64 -> y (B, K, *S) float32 in {-1, 1}."""
        return 2 * F.one_hot(mask, self.num_labels).movedim(-1, 1).float() - 1

    def probability(self, x_start: Tensor) -> Tensor:
        """x_start (B, K, *S) in [-1, 1] -> probabilities (B, K, *S), whose sum over K is 1."""
        p = ((x_start + 1) / 2).clamp(1e-6, 1)
        return p / p.sum(1, keepdim=True)

    def overlap_terms(
        self, output: Tensor, x_start: Tensor, mask: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms mse, ce and dice, and `loss`, their weighted sum, each (B,).

        weight (B, *S), of mean 1, multiplies every voxel.
        """
        c, y = self.config, self.one_hot(mask)
        square = (x_start - y).square()
        terms = {
            "mse": (square if weight is None else square * weight[:, None]).flatten(1).mean(1),
            "ce": cross_entropy_loss(output, mask, weight),
            "dice": dice_loss(self.probability(x_start), (y + 1) / 2, weight),
        }
        loss = c.mse_weight * terms["mse"] + c.ce_weight * terms["ce"] + c.dice_weight * terms["dice"]
        return {**terms, "loss": loss}

    def add_coarse(
        self, terms: dict[str, Tensor], net: Generator, coarse: Sequence[Tensor], mask: Tensor
    ) -> None:
        """Deep supervision [5]: `loss` gets the losses of the coarser levels too, 1/2 of that of the second
        finest level, 1/4 of the third, and so on; their sum is the term `coarse`. coarse: the outputs (B, K,
        *s) of the levels, coarsest first. A level learns the mask at the middles of its own voxels.
        """
        if not coarse:
            return
        steps = [a * b for a, b in zip(net.stem, net.unet.config.downsampling, strict=True)]
        whole, losses = pad_to_multiple(mask[:, None].float(), steps), []
        for level, output in enumerate(reversed(coarse), start=1):
            own = F.interpolate(whole, output.shape[2:], mode="nearest-exact")[:, 0].long()
            losses.append(self.overlap_terms(output, net.to_x_start(output), own)["loss"] / 2**level)
        terms["coarse"] = sum(losses)
        terms["loss"] = terms["loss"] + terms["coarse"]

    # Training

    def losses(
        self,
        model: nn.Module,
        net: Generator,
        discriminator: nn.Module | None,
        image: Tensor,
        mask: Tensor,
        u: Tensor,
        draw: Draw,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The generator's training loss: (terms with `loss`, each (B,); the pair for `discriminator_losses`).

        image (B, C, *S), mask (B, *S) in 0 .. K - 1, u (B,) uniform in [0, 1), from which t follows. The
        discriminator is called bare; the caller freezes it.
        """
        c, y = self.config, self.one_hot(mask)
        t = self.t_from_uniform(u.cpu())  # on the CPU, where the tables are
        times = t.to(image.device)
        z = draw("z", net.config.latent_dim) if net.mapping is not None else None
        if not c.diffusion:
            z = None if z is None else 0 * z
            output, coarse = model(torch.zeros_like(y), times.float(), image, z, deep=True)
            terms = self.overlap_terms(output, net.to_x_start(output), mask)
            self.add_coarse(terms, net, coarse, mask)
            return terms, {}
        shape, y = y.shape[1:], self.scale * y
        x_t = self.kernel.q_sample(y, t, draw("x_t", *shape))
        x_prev = self.kernel.q_step(x_t, t + 1, draw("x_next", *shape))
        # What the generator sees: x_prev, unless a setting says otherwise
        seen, weight = x_prev, None
        if c.attention != "none":
            with torch.no_grad():
                hidden = discriminator(x_t, times, x_prev, self._shown(image)).features[c.attention_layer]
            a = attention_map(hidden, y.shape[2:], c.attention_normalised)
            if c.attention == "input":
                seen = self.kernel.q_sample(a * y, t + 1, draw("attended", *shape))
            else:
                weight = a[:, 0]
        if c.own_estimate:
            seen = self._own_estimate(net, image, seen, t, draw)
        output, coarse = model(self.unit(seen, t), times.float(), image, z, deep=True)
        x_start = net.to_x_start(output)
        terms = self.overlap_terms(output, x_start, mask, weight)
        self.add_coarse(terms, net, coarse, mask)
        if not c.has_discriminator:
            return terms, {}
        # The real and the fake pair share x_prev, so that the discriminator has to look at x_t
        noise = draw("posterior", *shape)
        fake = self.step(x_start, x_prev, t, noise)
        if c.adversarial_weight:
            judged = discriminator(fake, times, x_prev, self._shown(image))
            terms["g_loss"] = generator_loss(judged.logits, "non_saturating")
            terms["loss"] = terms["loss"] + c.adversarial_weight * terms["g_loss"]
        if c.attention == "input":  # the discriminator learns from masks made without the attention's hints
            fake = self.step(self._estimate(net, x_prev, t, image, z), x_prev, t, noise)
        return terms, {"x_t": x_t, "x_prev": x_prev, "t": times, "fake": fake.detach()}

    @torch.no_grad()
    def _estimate(self, net: Generator, x_prev: Tensor, t: Tensor, image: Tensor, z: Tensor | None) -> Tensor:
        """pred_x_start without gradients; never compiled, since its batches differ in size."""
        times, x_prev = t.to(image.device).float(), self.unit(x_prev, t)
        return net.to_x_start(net.predict(x_prev, times, net.encode(image), z))

    def _own_estimate(self, net: Generator, image: Tensor, x_prev: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """x_prev as in inference: for t < T - 1 the generator's mask from pure noise, noised to level t + 1.

        At t = T - 1 x_prev is nearly noise anyway and stays as it is.
        """
        last = self.num_timesteps - 1
        some = (t < last).nonzero().flatten()  # on the CPU
        if not len(some):
            return x_prev
        shape = x_prev.shape[1:]
        z = draw("z of the estimate", net.config.latent_dim)[some] if net.mapping is not None else None
        times = torch.full_like(some, last)
        estimate = self._estimate(net, draw("x_T", *shape)[some], times, image[some], z)
        noise = draw("x_next of the estimate", *shape)[some]
        estimate = self.kernel.q_sample(self.scale * estimate, t[some] + 1, noise)
        return x_prev.index_copy(0, some.to(x_prev.device), estimate)

    def _shown(self, image: Tensor) -> Tensor | None:
        return image if self.config.disc_sees_image else None

    def discriminator_losses(
        self, model: nn.Module, image: Tensor, pair: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """The discriminator's `loss` on real and fake x_t, in one forward, and its terms, each (B,).

        Every r1_every steps R1 is part of the loss, times r1_every; such a step needs fp32 (`penalised`).
        """
        c = self.config
        both = torch.cat([pair["x_t"], pair["fake"]]).requires_grad_(self.penalised(step))
        t, x_prev = (torch.cat([pair[name]] * 2) for name in ("t", "x_prev"))
        shown = torch.cat([image] * 2) if c.disc_sees_image else None
        real, fake = model(both, t, x_prev, shown, parts=2).halves()
        terms = {
            "d_loss": discriminator_loss(real.logits, fake.logits, "non_saturating"),
            "disc_accuracy": disc_accuracy(real.logits, fake.logits, "non_saturating"),
        }
        loss = terms["d_loss"]
        if self.penalised(step):
            terms["r1"] = r1_penalty(real.logits, both)[: len(image)]
            loss = loss + c.r1_weight * c.r1_every * terms["r1"]
        return {**terms, "loss": loss}

    def penalised(self, step: int) -> bool:
        """Is R1 part of the discriminator's loss in this step?"""
        return self.config.r1_weight > 0 and step % self.config.r1_every == 0

    # Inference

    def vote(self, net: Generator, features: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Probabilities (V, K, *S) of V votes on W images of one size, V / W votes on each, in one batch.

        features (W, encoder_channels, *s): `Generator.encode` of the images. noise (V, T, K, *S): x_T, then
        the noise of every posterior that has any. z (V, T, latent_dim). The votes on the first image come
        first.
        """
        each = len(noise) // len(features)
        features = features[:, None].expand(-1, each, *features.shape[1:]).flatten(0, 1)
        x, T = noise[:, 0], self.num_timesteps
        for i, t in enumerate(reversed(range(T))):
            times = torch.full((len(x),), t)
            own_z = z[:, i] if net.mapping is not None else None
            x_start = net.to_x_start(
                net.predict(self.unit(x, times), times.to(x.device).float(), features, own_z)
            )
            x = self.step(x_start, x, times, noise[:, i + 1]) if t else x_start
        return self.probability(x)

    def room_for_votes(self, net: Generator, votes: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Zeros of the shapes of `draw_votes`."""
        T = self.num_timesteps
        return torch.zeros(votes, T, self.num_labels, *size), torch.zeros(votes, T, net.config.latent_dim)

    def draw_votes(
        self, net: Generator, votes: int, size: Sequence[int], seed: int, key: str
    ) -> tuple[Tensor, Tensor]:
        """The random numbers of votes: (noise, z) for `vote`, on the CPU. They depend on seed, key and the
        number of the vote alone."""
        noise, z = self.room_for_votes(net, votes, size)
        for v in range(votes if self.config.diffusion else 0):
            generator = keyed_generator(seed, v, f"vote {key}")
            noise[v].normal_(generator=generator)
            z[v].normal_(generator=generator)
        return noise, z

    def window_in_memory(
        self, net: Generator, image: Tensor, votes: int, patch: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        """The window to segment an image (C, *S) in where none is asked for: none if the memory holds the
        whole image, and attention over all of it does not take a CPU minutes. Else it is the training patch;
        with a note, since windows give other numbers than the whole.

        The memory is counted on a patch, once, and grows with the voxels. An image of a few patches always
        fits: training keeps more of a patch than inference does. A size that was once too large stays so,
        since the scores of a run's validations are compared with each other.
        """
        size = tuple(image.shape[1:])
        patches = math.prod(size) / math.prod(patch or size)

        def in_windows(why: str) -> tuple[int, ...]:
            if size not in self.too_large:
                self.too_large.add(size)
                whole, window = ("x".join(map(str, v)) for v in (size, patch))
                print0(f"note: {whole} voxels whole {why}; windows of {window}")
            return tuple(patch)

        slow = patches > 1 and image.device.type == "cpu" and math.prod(size) > SLOW_ATTENTION
        if slow and (positions := net.attended(size)) > SLOW_ATTENTION:
            return in_windows(f"are {positions} positions that attend to each other, which takes minutes")
        if patches <= FEW:
            return None

        def vote(net: Generator) -> Tensor:
            noise = image.new_zeros(votes, self.num_timesteps, self.num_labels, *patch)
            z = image.new_zeros(votes, self.num_timesteps, net.config.latent_dim)
            return self.vote(net, net.encode(image.new_zeros(1, len(image), *patch)), noise, z)

        key = votes, tuple(patch)
        if key not in self.counted:
            _, self.counted[key] = peak_bytes(lambda: net, vote, gpu=False)
        need, room = patches * self.counted[key] / GIB, USABLE * free_bytes(image.device) / GIB
        if need <= room and size not in self.too_large:
            return None
        return in_windows(f"take {need:.2g} GiB, {room:.2g} to use")

    def segment_planes(
        self,
        net: Generator,
        image: Tensor,
        votes: int = 1,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        seed: int = 0,
        key: str = "",
        batch_size: int = 8,
        separate: bool = False,
        flip_axes: Sequence[int] = (),
    ) -> Iterator[tuple[int, Tensor]]:
        """`segment` for images whose result memory should not hold: yields (start, p), first plane and mean
        probability (K, planes, ...) of some planes along the first axis, from the first plane to the last.
        separate: not the mean, but the probabilities of every vote, (votes * K, planes, ...), one after the
        other. flip_axes: a vote is the mean over all mirrored windows, eight for three axes, mirrored back.

        Windows advance along the first axis. Planes that no later window touches are finished and are
        yielded, so that no more planes than a window has are kept.
        """
        check_window(window, image.ndim - 1)
        votes = votes if self.config.diffusion else 1
        size = tuple(image.shape[1:])
        window = size if window is None else tuple(min(n, m) for n, m in zip(size, window, strict=True))
        first, *others = (window_starts(n, m, overlap) for n, m in zip(size, window, strict=True))
        single = len(first) * math.prod(map(len, others)) == 1
        smooth = torch.ones(window) if single else window_weight(window)
        noise, z = self.draw_votes(net, votes, window, seed, key)
        num_means = votes if separate else 1
        flips = [some for n in range(len(flip_axes) + 1) for some in combinations(flip_axes, n)]
        total = torch.zeros(num_means * self.num_labels, window[0], *size[1:])
        weight = torch.zeros(window[0], *size[1:])
        for at, after in zip(first, [*first[1:], size[0]], strict=True):
            row = list(product([at], *others))
            num = max(1, batch_size // votes)  # windows at once
            for some in (row[i : i + num] for i in range(0, len(row), num)):
                sums = self._window_sums(net, image, some, noise, z, batch_size, separate, flips)
                for start, p in zip(some, sums, strict=True):
                    box = tuple(slice(s, s + m) for s, m in zip((0, *start[1:]), window, strict=True))
                    total[(slice(None), *box)] += smooth * p
                    weight[box] += votes / num_means * smooth
            n = after - at  # planes that are finished
            yield at, total[:, :n] / weight[:n]
            for sums in (total, weight[None]):  # plane by plane, in place: a copy would take as much again
                for i in range(window[0] - n):
                    sums[:, i] = sums[:, i + n]
                sums[:, window[0] - n :] = 0

    def _window_sums(
        self,
        net: Generator,
        image: Tensor,
        starts: Sequence[tuple[int, ...]],
        noise: Tensor,
        z: Tensor,
        batch_size: int,
        separate: bool,
        flips: Sequence[tuple[int, ...]],
    ) -> Tensor:
        """The sum of the probabilities of all votes in each window: (W, K, *window), on the CPU; `separate`:
        those of every vote, (W, votes * K, *window).

        starts: the first voxels of the W windows. noise, z: `draw_votes`. A voxel has the same noise in every
        window that holds it: the noise repeats with the period of a window, so that within one window all
        values are independent. flips: the axes of each mirrored copy of a window, () for the window itself.
        Its noise is mirrored too, so that a voxel has the same noise in every copy.
        """
        window, axes = noise.shape[3:], tuple(range(3, noise.ndim))
        boxes = [tuple(slice(s, s + m) for s, m in zip(start, window, strict=True)) for start in starts]
        windows = torch.stack([image[(slice(None), *box)] for box in boxes])
        total = torch.zeros(len(starts), len(noise) if separate else 1, self.num_labels, *window)
        for flip in flips:
            features = net.encode(windows.flip([2 + axis for axis in flip]))
            for at in range(0, len(noise), batch_size):
                some = slice(at, at + batch_size)
                own = torch.cat([noise[some].roll([-s for s in start], axes) for start in starts])
                own = own.flip([3 + axis for axis in flip])
                own_z = z[some].repeat(len(starts), 1, 1)
                p = self.vote(net, features, own.to(image.device), own_z.to(image.device))
                p = p.flip([2 + axis for axis in flip]).unflatten(0, (len(starts), -1)) / len(flips)
                if separate:
                    total[:, some] += p.cpu()  # (W, votes, K, *window)
                else:
                    total += p.sum(1, keepdim=True).cpu()
        return total.flatten(1, 2)

    def segment(
        self,
        net: Generator,
        image: Tensor,
        votes: int = 1,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        seed: int = 0,
        key: str = "",
        batch_size: int = 8,
        separate: bool = False,
        flip_axes: Sequence[int] = (),
    ) -> Tensor:
        """Image (C, *S) of any size -> mean probability (K, *S) of the votes, on the CPU; `separate`: the
        probabilities of every vote, (votes * K, *S).

        An image larger than `window` is covered by windows that overlap by at least the share `overlap` of
        their length; where windows overlap, their probabilities are averaged, with more weight on the middle
        of a window. `key` names the case. `batch_size` votes run at once, those of several windows where one
        window has fewer. `flip_axes`: every window is also segmented mirrored along each of these axes, and
        each combination of them, and a vote is the mean.
        """
        p = torch.empty(0)
        how = (votes, window, overlap, seed, key, batch_size, separate, flip_axes)
        for start, part in self.segment_planes(net, image, *how):
            p = p if len(p) else torch.empty(len(part), *image.shape[1:])
            p[:, start : start + part.shape[1]] = part
        return p


def uncertainty(probability: Tensor) -> Tensor:
    """How far the votes differ: probability (K, *S) -> (*S) entropy / log K, 0 certain, 1 all alike."""
    p = probability.clamp(min=1e-12)
    return -(p * p.log()).sum(0) / math.log(len(p))


def level_sets(probability: Tensor, num: int) -> Tensor:
    """`num` label maps (num, *S), from the widest to the narrowest, of probabilities (K, *S): as raters draw
    who differ in how much they count as an object.

    Map v has an object where 1 - probability[0] > (v + 1/2) / num, and there the most probable label. So the
    share of the maps with an object is the probability of an object, rounded to 1 / num.
    """
    thresholds = (torch.arange(num, device=probability.device) + 0.5) / num
    inside = 1 - probability[0] > thresholds.view(-1, *(1,) * (probability.ndim - 1))
    return inside * (probability[1:].argmax(0) + 1)
