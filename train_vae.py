#!/usr/bin/env python3
"""Train an autoencoder: stage one of latent diffusion.

CPU or one GPU    python train_vae.py hippocampus
one node          torchrun --nproc_per_node 4 train_vae.py hippocampus --batch_size 4
several nodes     torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                      train_vae.py hippocampus --batch_size 8
your own data     python train_vae.py FOLDER

with a codebook   python train_vae.py hippocampus --autoencoder vq --quantizer.codebook_size 1024
discriminator     python train_vae.py hippocampus --disc_weight 0.1 --disc_start 3000

The autoencoder learns to give every image x back from a small latent z: recon = decode(z). Its loss is

    loss = |recon - x| + gradient_weight |D recon - D x| + structure_weight (1 - MS-SSIM(recon, x))
           + kl_weight KL(q(z given x) || N(0, 1))              or the two terms of a codebook (vqvae.py)
           + perceptual_weight LPIPS(recon, x)
           + disc_weight adaptive_weight g_loss + feature_weight |F(recon) - F(x)|       from disc_start on

All terms are means over elements; the KL is in nats per latent element. D is the image gradient. g_loss is
low where the discriminator takes recon for real, F are the discriminator's hidden maps, adaptive_weight
balances the gradients (losses.py). The discriminator has an optimizer of its own, which steps after the
autoencoder's.

To resume a run, give the same command again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm3d import interop
from ldm3d.config import InputError, at_least, parse, to_dict
from ldm3d.data import Data, DataConfig, VolumeDataset, batches, evaluation_batches, open_data
from ldm3d.data.dataset import BothRoles
from ldm3d.data.fingerprint import describe, take
from ldm3d.data.phantoms import phantom_folder
from ldm3d.data.settings import check_crop
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ldm3d.engine.checkpoint import load_weights
from ldm3d.engine.distributed import (
    is_main,
    keyed_generator,
    print0,
    run_script,
    setup,
    world_size,
    wrap,
)
from ldm3d.engine.logger import save_sheet, visible_slices
from ldm3d.engine.machine import cores_of_rank
from ldm3d.engine.memory_plan import MemoryTable, weight_bytes
from ldm3d.engine.runs import Run, goes_on, settings_of_init, with_settings_of_init
from ldm3d.engine.training import (
    EMA,
    Mean,
    OptimConfig,
    RunConfig,
    Stepper,
    autocast,
    check_schedule,
    frozen,
    keyed_normal,
    micro_batches,
    reseed,
    samples_per_forward,
    to_device,
)
from ldm3d.large.streaming import STREAMED
from ldm3d.lora import LoRAConfig, add_adapters
from ldm3d.losses import (
    AdversarialKind,
    PerceptualConfig,
    PerceptualLoss,
    adaptive_weight,
    disc_accuracy,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    gradient_loss,
    kl_per_element,
    last_gradients,
    r1_penalty,
    ramp,
    reconstruction_loss,
)
from ldm3d.metrics import SLAB, SLAB_MAPS, ms_ssim, psnr, ssim
from ldm3d.plan import (
    PLAN_FILE,
    VAE_PASSES,
    Plan,
    Planner,
    check_base,
    machine,
    plan_length,
    plan_vae,
    seconds_per_step,
)
from ldm3d.vae import Autoencoder, Posterior, VAEConfig
from ldm3d.vqvae import Quantized, QuantizerConfig, make_autoencoder, quantizer_loss

# --- Config and presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = ""  # the first argument of the command
    batch_size: int = 8  # samples per optimizer step, over all ranks
    micro_batch_size: int | None = None  # samples per rank and forward pass; none = batch_size / ranks
    autoencoder: Literal["kl", "vq"] = "kl"  # Gaussian posterior (kl), or codebook (vq)
    reconstruction: Literal["l1", "l2"] = "l1"  # reconstruction loss
    gradient_weight: float = 1.0  # weight of the loss on image gradients (sharp edges); 0 = off
    structure_weight: float = 0.0  # weight of 1 - MS-SSIM; 0 = off
    kl_weight: float = 1e-3  # weight of the KL in nats per latent element
    kl_warmup: int = 0  # steps over which that weight rises from 0
    free_bits: float = 0.0  # nats per latent element below which a channel's KL costs nothing
    perceptual_weight: float = 0.0  # weight of LPIPS, which needs perceptual.weights; 0 = off
    disc_weight: float = 0.0  # weight of the adversarial loss; 0, and feature_weight 0: no discriminator
    feature_weight: float = 0.0  # weight of the difference of the discriminator's hidden maps
    disc_start: int = 1000  # step at which the discriminator starts to learn
    disc_ramp: int = 500  # steps after disc_start over which the adversarial weights rise from 0
    disc_loss: AdversarialKind = "hinge"  # objective of discriminator and autoencoder
    disc_adaptive: bool = True  # multiply disc_weight by the ratio of gradients at the last layer
    disc_cap: float = 100.0  # largest ratio of gradients
    disc_init: str | None = None  # file of another library with a discriminator to start from
    r1_weight: float = 0.0  # weight of the discriminator's squared gradient at real images; 0 = off
    r1_every: int = 16  # steps between two R1 penalties, each multiplied by this number
    hours: float | None = None  # to train, where settings are planned; none = 1, on a GPU 12
    plan: bool = False  # only print the plan, and the memory that it needs
    memory: float | None = None  # GiB that validation may use; none = what is free
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    disc: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    disc_optim: OptimConfig = field(default_factory=lambda: OptimConfig(adam_betas=(0.5, 0.9)))

    def __post_init__(self) -> None:
        weights = ("gradient_weight", "structure_weight", "kl_weight", "perceptual_weight", "disc_weight")
        at_least(self, 0, *weights, "feature_weight", "r1_weight", "free_bits", "kl_warmup")
        at_least(self, 0, "disc_start", "disc_ramp", "disc_cap")
        at_least(self, 1, "batch_size", "r1_every")
        if self.disc_init and not self.has_discriminator:
            raise InputError("disc_init: has no effect without disc_weight or feature_weight")
        if self.lora.rank and not self.run.init:
            raise InputError("lora.rank: needs run.init, the run whose weights stay frozen")
        if self.lora.rank and self.disc_weight and self.disc_adaptive:
            raise InputError("lora.rank: the last layer is frozen, so disc_weight needs disc_adaptive false")

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Older versions stored the GiB of a device, or none, as `plan`."""
        return values | ({"plan": values["plan"] is True} if "plan" in values else {})

    @property
    def has_discriminator(self) -> bool:
        return self.disc_weight > 0 or self.feature_weight > 0


BRATS: dict[str, Any] = {
    "run.steps": 100_000,
    "run.eval_every": 2000,
    "run.save_every": 1000,
    "run.log_every": 100,
    "run.workers": 4,
    "data.name": "brats",
    "data.channel": (0,),
    "data.spacing": (1.1, 1.1, 1.1),
    "data.size": (144, 176, 112),
    "data.patch": (112, 128, 80),
    "data.cache": "disk",
    "vae.channels": (64, 128, 256),
    "vae.num_res_blocks": (2,),
    "vae.latent_channels": 8,
    "kl_weight": 1.4e-2,
    "optim.lr": 1e-4,
    "optim.warmup_steps": 1000,
    "optim.schedule": "cosine",
}

SMALL: dict[str, Any] = {  # an autoencoder and its optimizer for minutes on 2 CPU cores
    "vae.num_res_blocks": (1,),
    "vae.num_groups": 8,
    "vae.stem": (2,),
    "vae.upsample": "deconv2",
    "vae.shortcut": True,
    "optim.lr": 4e-3,
    "optim.adam_betas": (0.9, 0.99),
    "optim.warmup_steps": 50,
    "optim.schedule": "cosine",
}

PRESETS: dict[str, dict[str, Any]] = {
    # Built-in synthetic heads, 40x48x40 at 4.8 mm: the whole pipeline in minutes on 2 CPU cores.
    "phantom": SMALL
    | {
        "batch_size": 2,
        "run.steps": 1200,
        "run.eval_every": 600,
        "run.save_every": 300,
        "run.log_every": 100,
        "run.ema_decay": 0.99,
        "data.patch": (32, 32, 32),
        "vae.channels": (32, 64),
        "vae.latent_channels": 8,
    },
    # Medical Segmentation Decathlon Task04 at 1 mm: about 10 CPU minutes in bf16. The volumes are boxes
    # around the hippocampus of 31x40x24 to 43x59x47. Whole cases are padded to the size of the largest.
    "hippocampus": SMALL
    | {
        "batch_size": 2,
        "run.steps": 4500,
        "run.eval_every": 750,
        "run.save_every": 750,
        "run.log_every": 50,
        "run.ema_decay": 0.995,
        "data.subject": "subjects.csv",
        "data.patch": (32, 48, 32),
        "data.crop": "padded",
        "vae.channels": (32, 128),
        "vae.latent_channels": 12,
    },
    # Paired slices of two patients, T1 -> FLAIR. The autoencoder learns both contrasts; patient p19 is the
    # test, the middle slices of p07 are the validation, with two slices left out on both sides.
    "tiff-translation": SMALL
    | {
        "batch_size": 4,
        "run.steps": 1800,
        "run.eval_every": 500,
        "run.save_every": 500,
        "run.log_every": 50,
        "run.ema_decay": 0.995,
        "data.name": "tiff_pairs",
        "data.image": "flair/*.tif",
        "data.source": "t1/*.tif",
        "data.mask": "lesion/*.tif",
        "data.dims": 2,
        "data.subject": r"(p\d+)_",
        "data.test_subjects": ("p19",),
        "data.val_fraction": 0.15,
        "data.val_gap": 2,
        "data.patch": (128, 128),
        "data.learn_sources": True,
        "data.augment.flip_axes": (1,),
        "data.augment.affine": 0.7,
        "vae.dims": 2,
        "vae.channels": (32, 64),  # a third level with 16 channels, which is as many numbers, costs 2 dB
        "vae.latent_channels": 4,
    },
    # Shapes of 64^3 in two classes (MedMNIST adrenal), left ones mirrored: about 10 CPU minutes.
    "adrenal": SMALL
    | {
        "batch_size": 2,
        "run.steps": 2000,
        "run.eval_every": 500,
        "run.save_every": 500,
        "run.log_every": 50,
        "run.ema_decay": 0.99,
        "data.table": "labels.csv",
        "data.scaling": "minmax",
        "data.test_fraction": 0.2,
        "data.patch": (40, 40, 40),
        "data.augment.flip_axes": (0,),
        "vae.channels": (32, 64, 96),
        "vae.latent_channels": 4,
    },
    # Four whole heads with tumours (BRATS 2013, FLAIR, five labels) at 2 mm; z-scored, with a background that
    # is another constant in each, hence percentiles.
    "brats2013": SMALL
    | {
        "batch_size": 2,
        "run.steps": 3000,
        "run.eval_every": 500,
        "run.save_every": 500,
        "run.log_every": 50,
        "run.ema_decay": 0.995,
        "data.image": "*/Flair_subtrMeanDivStd.nii.gz",
        "data.mask": "*/OTMultiClass.nii.gz",
        "data.num_labels": 5,
        "data.val_fraction": 0.25,
        "data.spacing": (2.0, 2.0, 2.0),
        "data.size": (96, 112, 80),
        "data.patch": (64, 64, 64),
        "data.foreground": 0.5,
        "data.augment.flip_axes": (0,),
        "vae.channels": (32, 64),
        "vae.latent_channels": 8,
    },
    # Medical Segmentation Decathlon Task01, FLAIR at 1.1 mm, after the 3-D LDM tutorial of MONAI (a
    # sum-weighted KL of 1e-7 is 1.4e-2 per latent element here). Validation on 144x176x112.
    "brats-32g": BRATS | {"batch_size": 2},
    "brats-16g": BRATS | {"batch_size": 2, "micro_batch_size": 1, "vae.checkpointing": True},
}

SHOWN = ("loss", "psnr", "ssim", "reconstruction", "kl", "perplexity", "d_loss", "g_loss")  # on the console

COMMON: dict[str, str] = {  # the settings of --help; --help all shows every setting
    "your files": "data.root data.image data.table data.dims data.subject data.val_fraction",
    "how they are seen": "data.spacing data.size data.patch data.scaling data.window data.augment.flip_axes"
    " data.augment.affine data.augment.intensity",
    "the autoencoder": "autoencoder vae.channels vae.latent_channels vae.stem",
    "the loss": "kl_weight perceptual_weight disc_weight disc_start",
    "the run": "run.dir run.steps batch_size micro_batch_size optim.lr run.device run.amp run.workers"
    " run.eval_every run.init run.fresh hours plan memory",
}


def with_data(config: Config) -> Config:
    """The defaults that follow from the data: the dimensions and the channels of the networks."""
    shape = {"dims": config.data.dims, "in_channels": len(config.data.channel) or config.vae.in_channels}
    return Config(vae=VAEConfig(**shape), disc=PatchDiscriminatorConfig(**shape))


NETWORK = "autoencoder", "vae.", "quantizer."  # what a run takes over from run.init, where no flag says else
FREE = ("vae.checkpointing",)


def discriminator_of(file: str) -> PatchDiscriminator:
    """The discriminator in a file of another library."""
    try:
        net = interop.load(file)
    except InputError as error:
        raise InputError(f"disc_init: {error}") from None
    if not isinstance(net, PatchDiscriminator):
        raise InputError(f"disc_init: {file} holds a {type(net).__name__}, expected a PatchDiscriminator")
    return net


def settings_of_disc_init(config: Config, image_range: tuple[float, float]) -> dict[str, Any]:
    """The discriminator of disc_init as settings; none for a run that has none, or is resumed. image_range:
    of the autoencoder, since both have learned from the same images."""
    if config.disc_init is None or goes_on("vae", config):
        return {}
    theirs = to_dict(discriminator_of(config.disc_init).config) | {"image_range": image_range}
    return {f"disc.{name}": value for name, value in theirs.items()}


def with_init(config: Config, flags: dict[str, Any]) -> Config:
    """The configuration with the autoencoder of run.init and the discriminator of disc_init."""
    theirs = settings_of_init("vae", config, NETWORK, FREE)
    config = with_settings_of_init(config, {k: v for k, v in theirs.items() if k not in flags})
    theirs = settings_of_disc_init(config, config.vae.image_range)
    theirs = {k: v for k, v in theirs.items() if k not in flags}
    return with_settings_of_init(config, theirs, "disc_init")


# --- evaluation ---------------------------------------------------------------------------------------------


def scores_of(net: Autoencoder, x: Tensor, config: Config) -> dict[str, Tensor]:
    """What `evaluate` takes the means of, each (B,), for images x (B, C, *S)."""
    with autocast(config.run.amp, x.device):
        posterior = net.encode(x)
        recon = net.decode(posterior.mode(), x.shape[2:])
    recon = recon.float()
    scores = {
        "psnr": psnr(recon, x, data_range=2.0),
        "ssim": ssim(recon, x, data_range=2.0),
        "reconstruction": reconstruction_loss(recon, x, config.reconstruction),
    }
    if config.autoencoder == "kl":
        scores["kl"] = kl_per_element(posterior.mean, posterior.logvar)
    return scores


@torch.inference_mode()
def evaluate(
    net: Autoencoder, batches: Iterable[dict[str, Any]], config: Config, device: torch.device
) -> dict[str, float]:
    """PSNR (dB), SSIM and reconstruction loss of decode(latent mean), and the KL: means over whole validation
    cases, those of all ranks. batches: this rank's."""
    means = Mean()
    for batch in batches:
        means.add(**scores_of(net, to_device(batch, device)["image"], config))
    return means.pop()


@torch.inference_mode()
def pictured(
    net: Autoencoder, x: Tensor, config: Config, display: tuple[float, float]
) -> tuple[dict[str, list[np.ndarray]], Tensor]:
    """(Slices of an image x (1, C, *S), of its reconstruction, and of their difference; its latent)."""
    with autocast(config.run.amp, x.device):
        z = net.encode(x).mode()
        recon = net.decode(z, x.shape[2:])
    grey = sum(display) / 2  # where there is no difference
    shown = {"original": x, "reconstruction": recon, "difference": recon - x + grey}
    return {name: visible_slices(image[0], display) for name, image in shown.items()}, z


def preview(
    net: Autoencoder, dataset: VolumeDataset, config: Config, path: Path, device: torch.device
) -> tuple[Path | None, Tensor]:
    """A picture of up to four validation cases and their reconstructions: (its path, the latents (B, C_z,
    *s))."""
    rows, latents = {}, []
    for i in range(min(4, len(dataset))):
        slices, z = pictured(net, dataset[i, i]["image"][None].to(device), config, dataset.spec.display)
        rows = {name: rows.get(name, []) + own for name, own in slices.items()}
        latents.append(z)
    return save_sheet(path, rows, dataset.spec.display), torch.cat(latents)


def validate(run: Run, net: Autoencoder, dataset: VolumeDataset, device: torch.device) -> None:
    """Scores of `net`, the EMA, for the log, a picture, and best.pt if the PSNR is the best so far."""
    config = run.config
    with run.validation():
        rounds = -(-len(dataset) // world_size())
        scores = evaluate(net, run.interruptible(evaluation_batches(dataset, 1), rounds), config, device)
        if is_main():
            picture, z = preview(net, dataset, config, run.preview_path, device)
            run.logger.picture(run.step, "reconstructions", picture)
            run.logger.histogram(run.step, "latent", z)
    # PSNR prefers the blurred images from before the discriminator: they are judged apart
    judged = run.step >= config.disc_start + config.disc_ramp and config.has_discriminator
    name = "psnr with discriminator" if judged else "psnr"
    run.keep_best(name, scores["psnr"], highest=True)
    run.log("val", scores)


def check_flags(config: Config, flags: dict[str, Any]) -> None:
    """Refuse flags without any effect. Stored configurations may hold them: older versions took them."""
    for name in ("kl_weight", "kl_warmup", "free_bits"):
        if config.autoencoder == "vq" and name in flags:
            raise InputError(f"{name}: has no effect with autoencoder vq, whose latents have no KL")
    check_crop(flags, config.data)
    check_schedule(flags, "optim", config.optim)
    check_schedule(flags, "disc_optim", config.disc_optim)


def open_volumes(
    config: Config, split: dict[str, list[str]] | None = None, dataset: Dataset | None = None
) -> Data:
    """The checked data of a run. The preset "phantom" first writes its own, once: a folder of NIfTI files and
    a cases.csv, like any other data."""
    if config.vae.dims != config.data.dims:
        raise InputError(f"vae.dims: {config.vae.dims}, but data.dims is {config.data.dims}")
    for name in ("dims", "in_channels"):
        ours, theirs = getattr(config.disc, name), getattr(config.vae, name)
        if config.has_discriminator and ours != theirs:
            raise InputError(f"disc.{name}: {ours}, but vae.{name} is {theirs}")
    if config.preset == "phantom" and config.data.root is None and dataset is None:
        phantom_folder()
    multiple = config.vae.downsampling
    data = open_data(config.data, config.preset, config.run.seed, split, multiple, items=dataset)
    if config.vae.in_channels != data.spec.channels:
        raise InputError(
            f"vae.in_channels: {config.vae.in_channels}, but the images have {data.spec.channels} channels; "
            f"set --vae.in_channels {data.spec.channels}, or choose some with --data.channel"
        )
    return data


# --- train --------------------------------------------------------------------------------------------------


def loss_terms(
    recon: Tensor, latent: Posterior | Quantized, x: Tensor, config: Config, step: int
) -> dict[str, Tensor]:
    """The loss without perceptual and adversarial terms, and its terms by name, each (B,), in fp32."""
    terms = {"reconstruction": reconstruction_loss(recon, x, config.reconstruction)}
    loss = terms["reconstruction"]
    if config.gradient_weight:
        terms["gradient"] = gradient_loss(recon, x)
        loss = loss + config.gradient_weight * terms["gradient"]
    if config.structure_weight:
        terms["structure"] = 1 - ms_ssim(recon, x, data_range=2.0, dtype=torch.float32)
        loss = loss + config.structure_weight * terms["structure"]
    if isinstance(latent, Quantized):
        terms["codebook"], terms["commitment"] = latent.codebook_loss, latent.commitment_loss
        loss = loss + quantizer_loss(latent, config.quantizer)
    else:
        terms["kl"] = kl_per_element(latent.mean, latent.logvar)
        kl = kl_per_element(latent.mean, latent.logvar, config.free_bits) if config.free_bits else terms["kl"]
        loss = loss + config.kl_weight * ramp(step, 0, config.kl_warmup) * kl
    return {"loss": loss, **terms}


def adversarial_terms(
    discriminator: PatchDiscriminator, recon: Tensor, x: Tensor, config: Config
) -> dict[str, Tensor]:
    """What the autoencoder wants of the discriminator, each (B,), not yet weighted."""
    with frozen(discriminator):
        with autocast(config.run.amp, x.device):
            fake = discriminator(recon)
        terms = {"g_loss": generator_loss(fake.logits, config.disc_loss)}
        if config.feature_weight:
            with torch.no_grad(), autocast(config.run.amp, x.device):
                real = discriminator(x)
            terms["features"] = feature_matching_loss(fake.features, real.features)
    return terms


def last_weight(net: Autoencoder) -> Tensor:
    """The weight of the decoder's last convolution."""
    return [parameter for parameter in net.decoder.parameters() if parameter.ndim > 1][-1]


def gradients_of(net: Autoencoder, terms: dict[str, Tensor], loss_scale: float) -> Tensor:
    """What the adaptive weight compares, (2, *): the gradients of the sum of all other terms and of g_loss at
    the decoder's last convolution. loss_scale: the GradScaler's factor (1 without float16)."""
    return last_gradients(terms["loss"].mean(), terms["g_loss"].mean(), last_weight(net), loss_scale)


def discriminator_terms(
    model: nn.Module, x: Tensor, recon: Tensor, config: Config, step: int
) -> dict[str, Tensor]:
    """The discriminator's loss on images and reconstructions, in one forward, and its parts: each (B,)."""
    penalised = config.r1_weight > 0 and step % config.r1_every == 0
    both = torch.cat([x, recon.to(x.dtype)]).requires_grad_(penalised)
    with autocast("fp32" if penalised else config.run.amp, x.device):  # a gradient's gradient wants fp32
        real, fake = model(both).halves()
    terms = {
        "d_loss": discriminator_loss(real.logits, fake.logits, config.disc_loss),
        "disc_accuracy": disc_accuracy(real.logits, fake.logits, config.disc_loss),
    }
    loss = terms["d_loss"]
    if penalised:
        terms["r1"] = r1_penalty(real.logits, both)[: len(x)]
        loss = loss + config.r1_weight * config.r1_every * terms["r1"]
    return {"loss": loss, **terms}


def memory_table(config: Config) -> MemoryTable:
    """The memory that training and validation need, and how long a step takes."""
    whole, step = config.data.size or open_volumes(config).spec.size, max(config.vae.downsampling)
    micro = samples_per_forward(config.batch_size, config.micro_batch_size)

    def make() -> Autoencoder:
        net = make_autoencoder(config.autoencoder, config.vae, config.quantizer)
        if config.lora.rank:
            add_adapters(net, config.lora.rank)
        return net

    def loss(net: Autoencoder, batch: int, size: tuple[int, ...]) -> Tensor:
        x = torch.zeros(batch, config.vae.in_channels, *size)
        recon, latent = net(x, torch.zeros(batch, *net.latent_shape(size)))
        value = loss_terms(recon, latent, x, config, 0)["loss"]
        if config.has_discriminator:
            value = sum(adversarial_terms(PatchDiscriminator(config.disc), recon, x, config).values(), value)
        return value.mean()

    def disc_loss(discriminator: nn.Module, batch: int, size: tuple[int, ...]) -> Tensor:
        x, recon = torch.zeros(2, batch, config.vae.in_channels, *size)
        return discriminator_terms(discriminator, x, recon, config, 0)["loss"].mean()

    def there_and_back(net: Autoencoder, batch: int, size: tuple[int, ...]) -> None:
        x, coming = torch.zeros(2, batch, config.vae.in_channels, *size)  # a thread reads the next case
        recon = net.decode(net.encode(x).mode(), size)
        torch.empty(SLAB_MAPS * min(SLAB, x.numel()), dtype=torch.float64)  # for PSNR and SSIM of x and recon
        del recon, coming

    table = MemoryTable(config.memory, config.run.amp, config.run.device)
    rounds, patch, own = -(-config.batch_size // micro), config.data.patch or whole, weight_bytes(make())
    beside = weight_bytes(PatchDiscriminator(config.disc)) if config.has_discriminator else 0
    table.training("training", make, loss, micro, patch, step, rounds, beside=2 * beside)  # Adam's moments
    if config.has_discriminator:
        make_disc = functools.partial(PatchDiscriminator, config.disc)
        table.training("its discriminator", make_disc, disc_loss, micro, patch, step, rounds, beside=4 * own)
    if config.perceptual_weight:
        print0("note: the plan leaves the perceptual network out")
    others = 3 * own + 3 * beside
    table.inference("validation", make, there_and_back, 1, whole, step, others, ways=STREAMED)
    return table


def command_of_stage_two(run: Run) -> list[str]:
    """The words of the command that trains a denoiser on this autoencoder."""
    preset = {"brats2013": "brats2013-anatomy"}.get(run.config.preset, run.config.preset)
    planned = (run.dir / PLAN_FILE).exists() or run.config.preset not in PRESETS
    first = [] if planned else [preset, "--vae"]
    return ["python", "train_ldm.py", *first, str(run.dir)]


def make_plan(folder: Path, flags: dict[str, Any], merge: Callable[[dict[str, Any]], Config]) -> Plan:
    """The settings of a run on the images of a folder, by the rules of ldm3d/plan.py."""
    device, found = setup(flags.get("run.device", "auto")), take(folder, flags)
    print0(f"{folder}: {describe(found)}")
    bare = merge({"data.dims": found.dims})
    base = settings_of_init("vae", bare, NETWORK, FREE)
    check_base(base, found, bare.run.init)
    base |= settings_of_disc_init(bare, base.get("vae.image_range", bare.vae.image_range))
    able = machine(device.type == "cuda", flags, lambda values: memory_table(merge(values)))
    with contextlib.redirect_stdout(io.StringIO()):  # what is said of the data, training says again
        plan = plan_vae(found, able, flags, cores_of_rank(), base)
        config = merge(plan.values)
        data = open_volumes(config)
    seconds = seconds_per_step(memory_table(config), config, device, data)
    plan_length(plan, able.hours, seconds, VAE_PASSES, len(data.split["train"]), ema=0.05)
    return plan


def train(
    config: Config,
    flags: dict[str, Any] | None = None,
    planner: Planner | None = None,
    dataset: Dataset | None = None,
) -> Run:
    """flags: what the command line sets. planner: of a command that names a folder. dataset: in place of
    files, dicts with the tensor "image" (ldm3d/data/items.py)."""
    device = setup(config.run.device)
    run = Run("vae", with_init(config, flags or {}), flags)
    config, seed = run.config, run.config.run.seed
    if run.finished:
        return run
    micro_batch_size = samples_per_forward(config.batch_size, config.micro_batch_size)

    reseed(seed, 0)
    net = make_autoencoder(config.autoencoder, config.vae, config.quantizer).to(device)
    perceptual = PerceptualLoss(config.perceptual).to(device) if config.perceptual_weight else None
    data = open_volumes(config, run.split(dataset is not None), dataset)
    train_set, val_set = data.dataset("train", augment=True), data.dataset("val")
    if config.data.learn_sources:
        train_set, val_set = BothRoles(train_set), BothRoles(val_set)
    discriminator = None
    if config.has_discriminator:
        config.disc.check_size(train_set.size)
        discriminator = PatchDiscriminator(config.disc).to(device)
        if config.disc_init and not run.resumed:
            weights = discriminator_of(config.disc_init).state_dict()
            load_weights(discriminator, weights, f"disc_init {config.disc_init}")
    state = {"data": data.spec.to_dict(), **data.state}
    run.check_data(state["data"], data.contents)
    state |= run.resumed["state"] if run.resumed else {}
    run.initialise(net)
    if config.lora.rank:
        add_adapters(net, config.lora.rank)
    run.start(data.split, device, {"autoencoder": net, "discriminator": discriminator}, data.facts(), SHOWN)
    if planner:
        planner.write(run.dir)
    ema, mean = EMA(net, config.run.ema_decay), Mean()
    ema.net.memory = config.memory
    stepper = Stepper(net, config.optim, config.run, config.batch_size, device)
    steppers, others = {"autoencoder": stepper}, {}
    if discriminator is not None:
        disc_stepper = Stepper(discriminator, config.disc_optim, config.run, config.batch_size, device)
        steppers["discriminator"], others["discriminator"] = disc_stepper, discriminator
        disc_model = wrap(discriminator, device)
    run.restore(state, net, ema, steppers, mean, **others)
    if config.run.compile and discriminator is not None and config.disc_adaptive:
        # The adaptive weight goes through the autoencoder's graph a second time
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
    model = wrap(net, device, config.run.compile)

    stream = batches(
        train_set, config.batch_size, micro_batch_size, seed, run.step, config.run.steps, config.run.workers
    )

    def forward(model: nn.Module, batch: dict[str, Any], adversarial: bool) -> tuple[Tensor, Any, dict]:
        """(recon, latent, terms), where terms["loss"] is without the adversarial terms."""
        x, positions = batch["image"], batch["position"]
        noise = keyed_normal(seed, positions, net.latent_shape(x.shape[2:]), "posterior")
        with autocast(config.run.amp, device):
            recon, latent = model(x, noise.to(device))
        terms = loss_terms(recon, latent, x, config, run.step)
        if perceptual is not None:
            draws = [keyed_generator(seed, int(p), "slices") for p in positions]
            with autocast(config.run.amp, device):
                terms["perceptual"] = perceptual(recon, x, draws)
            terms["loss"] = terms["loss"] + config.perceptual_weight * terms["perceptual"]
        if adversarial:
            terms |= adversarial_terms(discriminator, recon, x, config)
        return recon, latent, terms

    if run.owes_validation:
        validate(run, ema.net, val_set, device)
    for group in run.steps(stream):
        adversarial = discriminator is not None and run.step >= config.disc_start
        adaptive = adversarial and config.disc_adaptive and config.disc_weight > 0
        scale = stepper.scaler.get_scale()
        if adaptive and len(group) > 1:
            # One weight for the whole step, from all of its micro-batches: a forward pass of its own
            gradients = torch.zeros((), device=device)
            with frozen(net):
                last_weight(net).requires_grad_(True)
                for batch, fraction in micro_batches(group, model, device, seed, run.step):
                    gradients = gradients + fraction * gradients_of(net, forward(net, batch, True)[2], scale)
            ratio = adaptive_weight(gradients, config.disc_cap)
        pairs, latents = [], []
        for batch, fraction in micro_batches(group, model, device, seed, run.step):
            recon, latent, terms = forward(model, batch, adversarial)
            if adversarial:
                weight = torch.full((1,), config.disc_weight, device=device)
                if adaptive:
                    if len(group) == 1:
                        ratio = adaptive_weight(gradients_of(net, terms, scale), config.disc_cap)
                    terms["adaptive_weight"] = ratio.view(1)
                    weight = weight * ratio
                terms["adversarial"] = weight * terms["g_loss"]
                if config.feature_weight:
                    terms["adversarial"] = terms["adversarial"] + config.feature_weight * terms["features"]
                rise = ramp(run.step, config.disc_start, config.disc_ramp)
                terms["loss"] = terms["loss"] + rise * terms["adversarial"]
                pairs.append({**batch, "recon": recon.detach()})
            stepper.backward(terms["loss"].mean() * fraction)
            mean.add(**terms)
            latents.append(latent)
        if stepper.step(run.step):
            if config.autoencoder == "vq":
                draw = keyed_generator(seed, run.step, "codebook")
                mean.add(**net.quantizer.update(latents, draw, frozen=config.lora.rank > 0))
            ema.update(net, run.step)
        if adversarial:
            for batch, fraction in micro_batches(pairs, disc_model, device, seed, run.step):
                terms = discriminator_terms(disc_model, batch["image"], batch["recon"], config, run.step)
                disc_stepper.backward(terms.pop("loss").mean() * fraction)
                mean.add(**terms)
            disc_stepper.step(run.step)

        run.end_step(**stepper.report())
        run.save_if_due()
        if run.due("eval_every"):
            validate(run, ema.net, val_set, device)
    run.finish(command_of_stage_two(run))
    return run


def main(argv: list[str] | None = None) -> None:
    planner = Planner("vae", Config, make_plan)
    config, flags = parse(Config, argv, PRESETS, __doc__, with_data, COMMON, planner)
    config = with_init(config, flags)
    check_flags(config, flags)
    planner.check(flags)
    if config.plan:
        memory_table(config).print()
    else:
        train(config, flags, planner)


if __name__ == "__main__":
    sys.exit(run_script(main, resumes=True))
