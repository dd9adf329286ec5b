"""Segmentation by diffusion in a handful of steps: generator, few-step posterior, votes, a critic's hints.

A label map is one-hot in [-1, 1]: y (B, K, *S), K labels with the background. Few and large steps need a
denoiser that makes a whole label map at once: a denoising GAN [1]; with an image as condition and a critic's
attention it is cDAL [2].

    schedule     alpha_bar(tau) = exp(-tau^2 (beta_max - beta_min) / 2 - tau beta_min)        vp [3]
                 alpha_bar(tau) = 1 - beta_min (beta_max / beta_min)^tau                      geometric
                 beta_0 = 1e-8,    beta_i = 1 - alpha_bar(tau_i) / alpha_bar(tau_i-1),    i = 1 .. T
                 tau_i = 0.001 + 0.999 i / T
    pair         x_t = A_t y + S_t noise,    x_next = sqrt(1 - beta_t+1) x_t + sqrt(beta_t+1) noise'
                 A_i = prod_j<=i sqrt(1 - beta_j),    S_i = sqrt(1 - A_i^2),    t = 0 .. T - 1
    generator    pred_x_start = G(x_next, t, image, z), z a Gaussian vector drawn anew at every step
    posterior    x_t ~ q(x_t | x_start, x_next), without beta_0; at t = 0 it is x_start itself      [1] eq. 6
    inference    x_T = noise; for t = T - 1 .. 0: x_t ~ q(x_t | G(x_t+1, t, image, z), x_t+1); V votes, and
                 their mean (x_0 + 1) / 2 is the probability; its entropy / log K is the uncertainty

In [2] the critic D(x_t, t, x_next) guides training by attention alone, the mean over channels of one of its
hidden maps: the generator sees the label map times attention, noised, and pays mean (pred_x_start - y)^2.
Switches beyond that: attention of mean 1, or as a weight of the loss; a critic that sees the image; a true
adversarial term; Dice and cross-entropy; and training at x_next made from the generator's own first estimate,
since x_next of a true label map tells so much of it that the generator need not look at the image, while in
inference there is no true label map.

[1] Xiao et al. 2022, arXiv 2112.07804. [2] Hejrati et al. 2025, arXiv 2502.06997. [3] Song et al. 2021, arXiv
2011.13456. Left out: FIR re-sampling and progressive inputs of [2]'s generator, whose blocks are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import DepthToSpace, Encoder, SpaceToDepth, crop_to, pad_to_multiple, per_level
from .config import InputError, at_least, show
from .diffusion_kernel import posterior_coefficients
from .engine.distributed import keyed_generator
from .losses import (
    cross_entropy_loss,
    dice_loss,
    disc_accuracy,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from .unet import UNet, UNetConfig

Draw = Callable[..., Tensor]  # draw(purpose, *shape) -> (B, *shape) Gaussian, each sample's own

# --- few steps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewStepConfig:
    num_timesteps: int = 2  # steps T
    schedule: Literal["vp", "geometric"] = "vp"  # how noise grows with time
    beta_min: float = 0.1  # of the schedule
    beta_max: float = 20.0  # of the schedule; geometric: the variance at the end, below 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_timesteps <= 8:
            raise InputError(f"num_timesteps: expected 1 to 8, got {self.num_timesteps}")
        limit = 1.0 if self.schedule == "geometric" else math.inf
        if not 0 < self.beta_min < self.beta_max < limit:
            raise InputError(
                f"beta_max: expected 0 < beta_min < beta_max < {limit:g} ({self.schedule}), got "
                f"{self.beta_min} and {self.beta_max}"
            )


class FewStepKernel:
    """The process of the module's docstring; tables in float64, arithmetic in float32. Times are given on the
    CPU, where the tables are, whatever the device of the maps.

    Index i of betas, sqrt_alphas_cumprod (A) and sqrt_one_minus_alphas_cumprod (S) runs from 0 to T, index t
    of the posterior's tables from 0 to T - 1.
    """

    def __init__(self, config: FewStepConfig):
        self.num_timesteps = T = config.num_timesteps
        tau = 1e-3 + (1 - 1e-3) * torch.arange(T + 1, dtype=torch.float64) / T
        low, high = config.beta_min, config.beta_max
        if config.schedule == "geometric":
            alpha_bar = 1 - low * (high / low) ** tau
        else:
            alpha_bar = torch.exp(-(tau**2) * (high - low) / 2 - tau * low)
        first = torch.full((1,), 1e-8, dtype=torch.float64)
        self.betas = torch.cat([first, 1 - alpha_bar[1:] / alpha_bar[:-1]])
        self.sqrt_alphas_cumprod = (1 - self.betas).cumprod(0).sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.sqrt_alphas_cumprod**2).sqrt()
        cumprod = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas[1:]).cumprod(0)])
        self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance = (
            posterior_coefficients(cumprod[1:], cumprod[:-1])
        )

    def q_sample(self, x_start: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """x_i (B, K, *S) for i (B,) from 0 to T."""
        alpha, sigma = self.sqrt_alphas_cumprod[i], self.sqrt_one_minus_alphas_cumprod[i]
        return _column(alpha, x_start) * x_start + _column(sigma, x_start) * noise

    def q_next(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_next at t + 1, from x_t at t."""
        beta = self.betas[t + 1]
        return _column((1 - beta).sqrt(), x_t) * x_t + _column(beta.sqrt(), x_t) * noise

    def q_posterior(self, x_start: Tensor, x_next: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, K, *S) and variance (B, 1, ...) of x_t, given x_start and x_next at t + 1."""
        tables = self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance
        coef1, coef2, variance = (_column(table[t], x_next) for table in tables)
        return coef1 * x_start + coef2 * x_next, variance

    def step(self, x_start: Tensor, x_next: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t drawn from the posterior."""
        mean, variance = self.q_posterior(x_start, x_next, t)
        return mean + variance.sqrt() * noise


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(-1, *(1,) * (like.ndim - 1))


# --- generator ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratorConfig:
    encoder_channels: int = 16  # width of the image encoder, which runs once a case
    encoder_blocks: int = 2  # its residual blocks
    stem: tuple[int, ...] = (1,)  # space-to-depth factor (1 or 2) per axis, or one for all; exact and cheap
    latent_dim: int = 0  # numbers of the latent z; 0 = none
    mapping_layers: int = 3  # layers from z to the embedding, beside the first
    output: Literal["softmax", "tanh"] = "softmax"  # how the output becomes x_start; tanh: as published

    def __post_init__(self) -> None:
        at_least(self, 1, "encoder_channels")
        at_least(self, 0, "encoder_blocks", "latent_dim", "mapping_layers")


class MappingNetwork(nn.Module):
    """z (B, latent_dim) -> embedding (B, emb_dim), which drives the adaptive norms of every block.

    z is divided by its root mean square first. Karras et al. 2019 (arXiv 1812.04948), section 2.
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
    """x_next (B, K, *S), t (B,), image (B, C, *S), z (B, latent_dim) -> (B, K, *S) before softmax or tanh.

    The image encoder's map joins x_next in front of the U-Net's first convolution, which is the same as
    adding a convolution of it to that of x_next. Any size works.
    """

    def __init__(self, config: GeneratorConfig, unet: UNetConfig, image_channels: int, num_labels: int):
        super().__init__()
        self.config = c = config
        dims, self.stem = unet.dims, per_level(c.stem, unet.dims)
        if len(self.stem) != dims or not set(self.stem) <= {1, 2}:
            raise InputError(f"generator.stem: expected 1 or 2 for each of {dims} axes, got {c.stem}")
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
        with torch.no_grad():  # at first it looks at the image alone: noise would only hold up learning
            self.unet.conv_in.weight[:, :parts] = 0
        self.to_parts, self.from_parts = SpaceToDepth(self.stem), DepthToSpace(self.stem)

    def encode(self, image: Tensor) -> Tensor:
        """(B, C, *S) -> (B, encoder_channels, *s): what `predict` wants of the image."""
        return self.encoder(pad_to_multiple(image, self.stem))

    def predict(self, x_next: Tensor, t: Tensor, features: Tensor, z: Tensor | None) -> Tensor:
        size = x_next.shape[2:]
        emb = None if self.mapping is None else self.mapping(z)
        if max(self.stem) == 1:
            return self.unet(torch.cat([x_next, features], dim=1), t, emb=emb)
        parts = self.to_parts(pad_to_multiple(x_next, self.stem))
        h = self.unet(torch.cat([parts, features], dim=1), t, emb=emb)
        return crop_to(self.from_parts(h), size)

    def forward(self, x_next: Tensor, t: Tensor, image: Tensor, z: Tensor | None = None) -> Tensor:
        return self.predict(x_next, t, self.encode(image), z)

    def to_x_start(self, output: Tensor) -> Tensor:
        """The output (B, K, *S) as pred_x_start in [-1, 1], float32."""
        output = output.float()
        return output.tanh() if self.config.output == "tanh" else 2 * output.softmax(1) - 1


# --- attention ----------------------------------------------------------------------------------------------


def attention_map(features: Tensor, size: Sequence[int], normalise: bool) -> Tensor:
    """(B, 1, *size): the mean over channels of a critic's hidden map (B, C, *s), up-sampled linearly.

    As it is, it has any sign and scale, as published. `normalise`: standardised over the voxels of a sample,
    through a sigmoid, divided by its mean: positive, of mean 1.
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
    diffusion: bool = True  # false: a plain network, whose x_next and z are zero and which runs once
    kernel: FewStepConfig = field(default_factory=FewStepConfig)
    noisiest: float | None = None  # share of the training samples at t = T - 1; none = 1 / T
    own_estimate: bool = True  # train at t < T - 1 on noised estimates of the generator, not on noised truth
    mse_weight: float = 0.0  # of the squared error of x_start
    ce_weight: float = 1.0  # of the cross-entropy
    dice_weight: float = 1.0  # of the Dice loss
    adversarial_weight: float = 0.0  # of the critic's judgement of x_t made from x_start
    attention: Literal["none", "input", "loss"] = "none"  # of the critic: on the noised labels, or on losses
    attention_normalised: bool = True  # positive and of mean 1, instead of a raw mean over channels
    attention_layer: int = -1  # block of the critic that it is taken from
    critic_sees_image: bool = True  # beside x_t and x_next
    r1_weight: float = 0.5  # of the critic's squared gradient at real x_t
    r1_every: int = 10  # steps from one of these to the next, each counting for all between

    def __post_init__(self) -> None:
        if self.noisiest is not None and not 0 <= self.noisiest <= 1:
            raise InputError(f"noisiest: expected a share from 0 to 1, got {self.noisiest}")
        at_least(self, 0, "mse_weight", "ce_weight", "dice_weight", "adversarial_weight", "r1_weight")
        if max(self.mse_weight, self.ce_weight, self.dice_weight) == 0:
            raise InputError("mse_weight: one of mse_weight, ce_weight, dice_weight must be above 0")
        at_least(self, 1, "r1_every")
        if self.attention == "input" and self.own_estimate:
            raise InputError("attention: input changes noised labels; own_estimate must be false")
        if self.attention == "loss" and not self.attention_normalised:
            raise InputError("attention: loss needs attention_normalised, or weights would be negative")
        if self.has_critic and not self.diffusion:
            raise InputError("diffusion: false has no critic: attention none, adversarial_weight 0")

    @property
    def has_critic(self) -> bool:
        return self.attention != "none" or self.adversarial_weight > 0


class CDAL:
    """Training losses and inference around a generator; it has no parameters.

    `net` is the bare generator, `model` what training calls: net, or net in DDP. The same for critics.
    """

    def __init__(self, config: CDALConfig, num_labels: int):
        self.config, self.num_labels = config, num_labels
        kernel = config.kernel if config.diffusion else replace(config.kernel, num_timesteps=1)
        self.kernel = FewStepKernel(kernel)

    # Parts

    def t_from_uniform(self, u: Tensor) -> Tensor:
        """Training times (B,) int64 in [0, T) from u (B,) in [0, 1)."""
        T, share = self.kernel.num_timesteps, self.config.noisiest
        if share is None or T == 1:
            return (u.double() * T).long().clamp(max=T - 1)
        rest = (u.double() - share) / max(1 - share, 1e-9)
        return torch.where(u < share, T - 1, (rest * (T - 1)).long().clamp(0, T - 2))

    def one_hot(self, labels: Tensor) -> Tensor:
        """Labels (B, *S) int64 -> y (B, K, *S) float32 in {-1, 1}."""
        return 2 * F.one_hot(labels, self.num_labels).movedim(-1, 1).float() - 1

    def probability(self, x_start: Tensor) -> Tensor:
        """x_start (B, K, *S) in [-1, 1] -> (B, K, *S), adding up to 1."""
        p = ((x_start + 1) / 2).clamp(1e-6, 1)
        return p / p.sum(1, keepdim=True)

    def overlap_terms(
        self, output: Tensor, x_start: Tensor, labels: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `loss` is made of, and `loss`, each (B,); weight (B, *S) is of mean 1."""
        c, y = self.config, self.one_hot(labels)
        square = (x_start - y).square()
        terms = {
            "mse": (square if weight is None else square * weight[:, None]).flatten(1).mean(1),
            "ce": cross_entropy_loss(output, labels, weight),
            "dice": dice_loss(self.probability(x_start), (y + 1) / 2, weight),
        }
        loss = c.mse_weight * terms["mse"] + c.ce_weight * terms["ce"] + c.dice_weight * terms["dice"]
        return {**terms, "loss": loss}

    # Training

    def losses(
        self,
        model: nn.Module,
        net: Generator,
        critic: nn.Module | None,
        image: Tensor,
        labels: Tensor,
        u: Tensor,
        draw: Draw,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the generator's `loss` and what it is made of, each (B,); what `critic_losses` needs).

        image (B, C, *S), labels (B, *S) in 0 .. K - 1, u (B,) uniform in [0, 1), which sets t. The critic is
        called bare, and left as it is: the caller freezes it.
        """
        c, y = self.config, self.one_hot(labels)
        t = self.t_from_uniform(u.cpu())
        times = t.to(image.device)
        z = draw("z", net.config.latent_dim) if net.mapping is not None else None
        if not c.diffusion:
            output = model(torch.zeros_like(y), times.float(), image, None if z is None else 0 * z)
            return self.overlap_terms(output, net.to_x_start(output), labels), {}
        shape = y.shape[1:]
        x_t = self.kernel.q_sample(y, t, draw("x_t", *shape))
        x_next = self.kernel.q_next(x_t, t, draw("x_next", *shape))
        seen, weight = x_next, None
        if c.attention != "none":
            with torch.no_grad():
                hidden = critic(x_t, times, x_next, self._shown(image)).features[c.attention_layer]
            a = attention_map(hidden, y.shape[2:], c.attention_normalised)
            if c.attention == "input":
                seen = self.kernel.q_sample(a * y, t + 1, draw("attended", *shape))
            else:
                weight = a[:, 0]
        if c.own_estimate:
            seen = self._own_estimate(net, image, seen, t, draw)
        output = model(seen, times.float(), image, z)
        x_start = net.to_x_start(output)
        terms = self.overlap_terms(output, x_start, labels, weight)
        if not c.has_critic:
            return terms, {}
        noise = draw("posterior", *shape)  # true and made pairs share x_next: the critic is to tell x_t apart
        made = self.kernel.step(x_start, x_next, t, noise)
        if c.adversarial_weight:
            terms["g_loss"] = generator_loss(
                critic(made, times, x_next, self._shown(image)).logits, "non_saturating"
            )
            terms["loss"] = terms["loss"] + c.adversarial_weight * terms["g_loss"]
        if c.attention == "input":  # the critic learns from what is made without its hints
            made = self.kernel.step(self._estimate(net, x_next, t, image, z), x_next, t, noise)
        return terms, {"x_t": x_t, "x_next": x_next, "t": times, "made": made.detach()}

    @torch.no_grad()
    def _estimate(self, net: Generator, x_next: Tensor, t: Tensor, image: Tensor, z: Tensor | None) -> Tensor:
        """pred_x_start without gradients; never compiled, since its batches differ in size."""
        return net.to_x_start(net.predict(x_next, t.to(image.device).float(), net.encode(image), z))

    def _own_estimate(self, net: Generator, image: Tensor, x_next: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """x_next as inference has it: at t < T - 1 noised from the generator's estimate at t = T - 1."""
        last = self.kernel.num_timesteps - 1
        some = (t < last).nonzero().flatten()  # on the CPU
        if not len(some):
            return x_next
        shape = x_next.shape[1:]
        z = draw("z of the estimate", net.config.latent_dim)[some] if net.mapping is not None else None
        times = torch.full_like(some, last)
        estimate = self._estimate(net, draw("x_T", *shape)[some], times, image[some], z)
        noise = draw("x_next of the estimate", *shape)[some]
        estimate = self.kernel.q_sample(estimate, t[some] + 1, noise)
        return x_next.index_copy(0, some.to(x_next.device), estimate)

    def _shown(self, image: Tensor) -> Tensor | None:
        return image if self.config.critic_sees_image else None

    def critic_losses(
        self, model: nn.Module, image: Tensor, pair: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """The critic's `loss` on true and made pairs, in one forward, and what it is made of, each (B,).

        Every r1_every steps R1 is in it, times r1_every; then it wants fp32 (`penalised`).
        """
        c = self.config
        both = torch.cat([pair["x_t"], pair["made"]]).requires_grad_(self.penalised(step))
        t, x_next = (torch.cat([pair[name]] * 2) for name in ("t", "x_next"))
        shown = torch.cat([image] * 2) if c.critic_sees_image else None
        real, fake = model(both, t, x_next, shown, parts=2).halves()
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
        """Is R1 in the critic's loss of this step?"""
        return self.config.r1_weight > 0 and step % self.config.r1_every == 0

    # Inference

    def vote(self, net: Generator, features: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Probabilities (V, K, *S) of V votes on the image whose `encode` is features (1, ...), in one batch.

        noise (V, T, K, *S): x_T, then that of each posterior but the last; z (V, T, latent_dim).
        """
        features = features.expand(len(noise), *features.shape[1:])
        x, T = noise[:, 0], self.kernel.num_timesteps
        for i, t in enumerate(reversed(range(T))):
            times = torch.full((len(x),), t)
            own_z = z[:, i] if net.mapping is not None else None
            x_start = net.to_x_start(net.predict(x, times.to(x.device).float(), features, own_z))
            x = self.kernel.step(x_start, x, times, noise[:, i + 1]) if t else x_start
        return self.probability(x)

    def draw_votes(
        self, net: Generator, votes: int, size: Sequence[int], seed: int, key: str
    ) -> tuple[Tensor, Tensor]:
        """(noise, z) of `vote` on the CPU; those of a vote depend on (seed, its number, key) alone."""
        T = self.kernel.num_timesteps
        noise, z = torch.zeros(votes, T, self.num_labels, *size), torch.zeros(votes, T, net.config.latent_dim)
        for v in range(votes if self.config.diffusion else 0):
            generator = keyed_generator(seed, v, f"vote {key}")
            noise[v].normal_(generator=generator)
            z[v].normal_(generator=generator)
        return noise, z

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
    ) -> Tensor:
        """Image (C, *S) of any size -> mean probability (K, *S) of the votes, on the CPU.

        Images larger than `window` are covered by windows that overlap by at least `overlap` of their length,
        weighted smoothly. The noise of a vote is periodic with the window, so that it is Gaussian and
        independent within each, and the same voxel has the same noise in all of them. `key` names the case;
        `batch_size` votes run at once.
        """
        check_window(window, image.ndim - 1)
        votes = votes if self.config.diffusion else 1
        size = tuple(image.shape[1:])
        window = size if window is None else tuple(min(n, m) for n, m in zip(size, window, strict=True))
        starts = list(product(*(window_starts(n, m, overlap) for n, m in zip(size, window, strict=True))))
        smooth = window_weight(window) if len(starts) > 1 else torch.ones(window)
        total, weight = torch.zeros(self.num_labels, *size), torch.zeros(size)
        noise, z = self.draw_votes(net, votes, window, seed, key)
        for start in starts:
            place = tuple(slice(s, s + m) for s, m in zip(start, window, strict=True))
            features = net.encode(image[(slice(None), *place)][None])
            shift, axes = [-s for s in start], tuple(range(3, noise.ndim))
            for some, some_z in zip(noise.split(batch_size), z.split(batch_size), strict=True):
                own = some.roll(shift, axes).to(image.device)
                p = self.vote(net, features, own, some_z.to(image.device)).sum(0).cpu()
                total[(slice(None), *place)] += smooth * p
            weight[place] += votes * smooth
        return total / weight


def check_window(window: Sequence[int] | None, dims: int) -> None:
    """InputError unless there is none or it has a size for each of `dims` axes."""
    if window is not None and (len(window) != dims or min(window) < 1):
        raise InputError(f"window: expected {dims} numbers from 1 on, got {show(tuple(window))}")


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of windows that cover `size` voxels, evenly spread, overlapping by at least `overlap`."""
    room = size - window
    count = 1 + math.ceil(room / max(1, int(window * (1 - overlap)))) if room > 0 else 1
    return [round(room * i / max(1, count - 1)) for i in range(count)]


def window_weight(window: Sequence[int]) -> Tensor:
    """(*window): sin^2 along every axis, highest in the middle, above 0 everywhere."""
    weight = torch.ones(())
    for m in window:
        along = torch.sin((torch.arange(m) + 0.5) / m * math.pi).square().clamp(min=1e-3)
        weight = weight[..., None] * along
    return weight


def uncertainty(probability: Tensor) -> Tensor:
    """(K, *S) -> (*S) in [0, 1]: the entropy of the mean vote over that of K equal probabilities."""
    p = probability.clamp(min=1e-12)
    return -(p * p.log()).sum(0) / math.log(len(p))
