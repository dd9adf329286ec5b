#!/usr/bin/env python3
"""Train an autoencoder: stage one of latent diffusion.

CPU or one GPU    python train_vae.py hippocampus
one node          torchrun --nproc_per_node 4 train_vae.py hippocampus
several nodes     torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                      train_vae.py hippocampus
your own data     python train_vae.py hippocampus --data.root FOLDER --data.image "*.nii.gz" \\
                      --data.subject none --run.dir runs/vae-mine

    loss = |recon - x| + gradient_weight * |D recon - D x| + kl_weight * KL(q(z given x) || N(0, 1))

all three means over elements, the KL in nats per latent element. To resume, run the same command again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm3d.config import parse
from ldm3d.data import Data, DataConfig, VolumeDataset, batches, evaluation_batches, open_data
from ldm3d.distributed import is_main, main_first, run_script, setup, wrap
from ldm3d.logger import progress, save_sheet
from ldm3d.losses import gradient_loss, kl_per_element, reconstruction_loss
from ldm3d.memory import Plan, weight_bytes
from ldm3d.metrics import psnr, ssim
from ldm3d.phantoms import write_phantoms
from ldm3d.training import (
    EMA,
    Mean,
    OptimConfig,
    Run,
    RunConfig,
    Speed,
    Stepper,
    autocast,
    keyed_normal,
    micro_batches,
    ranks_share,
    reseed,
    to_device,
)
from ldm3d.vae import AutoencoderKL, Posterior, VAEConfig

# --- Config and presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = ""  # set by the first argument
    batch_size: int = 8  # samples per optimizer step, over all ranks
    micro_batch_size: int | None = None  # samples per rank and forward; none = as many as the rank's share
    reconstruction: Literal["l1", "l2"] = "l1"  # reconstruction loss
    gradient_weight: float = 1.0  # weight of the loss on image gradients (sharp edges); 0 = off
    kl_weight: float = 1e-3  # weight of the KL in nats per latent element
    plan: float | None = None  # GiB of a GPU: only tell how much memory the run needs, and what would fit
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


NUM_PHANTOMS, PHANTOM_SIZE = 128, (40, 48, 40)

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

PRESETS: dict[str, dict[str, Any]] = {
    # Built-in synthetic heads, 40x48x40 at 4.8 mm: the whole pipeline in minutes on 2 CPU cores.
    "phantom": {
        "batch_size": 2,
        "run.steps": 1200,
        "run.eval_every": 600,
        "run.save_every": 300,
        "run.log_every": 100,
        "run.ema_decay": 0.99,
        "data.patch": (32, 32, 32),
        "vae.channels": (32, 64),
        "vae.num_res_blocks": (1,),
        "vae.num_groups": 8,
        "vae.stem": (2,),
        "vae.latent_channels": 8,
        "optim.lr": 2e-3,
        "optim.adam_betas": (0.9, 0.99),
        "optim.warmup_steps": 50,
        "optim.schedule": "cosine",
    },
    # Medical Segmentation Decathlon Task04 at 1 mm: about 20 minutes on 2 CPU cores. The volumes are boxes around the
    # hippocampus of 31x40x24 to 43x59x47; their middle 32x48x32 holds all but 0.03 % of it and hardly any padding.
    "hippocampus": {
        "batch_size": 2,
        "run.steps": 6000,
        "run.eval_every": 1000,
        "run.save_every": 1000,
        "run.log_every": 50,
        "run.ema_decay": 0.995,
        "data.subject": "subjects.csv",
        "data.size": (32, 48, 32),
        "vae.channels": (32, 128),
        "vae.num_res_blocks": (1,),
        "vae.num_groups": 8,
        "vae.stem": (2,),
        "vae.latent_channels": 8,
        "optim.lr": 2e-3,
        "optim.adam_betas": (0.9, 0.99),
        "optim.warmup_steps": 50,
        "optim.schedule": "cosine",
    },
    # Medical Segmentation Decathlon Task01, FLAIR at 1.1 mm, after the 3-D LDM tutorial of MONAI (a sum-weighted KL of
    # 1e-7 is 1.4e-2 per latent element here). Validation on 144x176x112.
    "brats-32g": BRATS | {"batch_size": 2},
    "brats-16g": BRATS | {"batch_size": 2, "micro_batch_size": 1, "vae.checkpointing": True},
}

# --- evaluation ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    net: AutoencoderKL, dataset: VolumeDataset, config: Config, device: torch.device
) -> dict[str, float]:
    """PSNR (dB) and SSIM of the posterior mean's reconstruction, and the loss's terms, over whole validation
    cases."""
    means = Mean()
    for batch in progress(evaluation_batches(dataset, 1), "validation"):
        x = to_device(batch, device)["image"]
        with autocast(config.run.amp, device):
            posterior = net.encode(x)
            recon = net.decode(posterior.mode(), x.shape[2:])
        recon = recon.float()
        means.add(
            psnr=psnr(recon, x, data_range=2.0),
            ssim=ssim(recon, x, data_range=2.0),
            reconstruction=reconstruction_loss(recon, x, config.reconstruction),
            kl=kl_per_element(posterior.mean, posterior.logvar),
        )
    return means.take()


@torch.inference_mode()
def preview(
    net: AutoencoderKL, dataset: VolumeDataset, config: Config, path: Path, device: torch.device
) -> tuple[Path | None, Tensor]:
    """Up to four validation cases there and back: a picture of them, and their latents (B, C_z, *s)."""
    rows, latents = {"original": [], "reconstruction": []}, []
    for i in range(min(4, len(dataset))):
        x = dataset[i, i]["image"][None].to(device)
        with autocast(config.run.amp, device):
            z = net.encode(x).mode()
            recon = net.decode(z, x.shape[2:])
        rows["original"].append(x[0, 0].cpu().numpy())
        rows["reconstruction"].append(recon[0, 0].float().cpu().numpy())
        latents.append(z)
    return save_sheet(path, rows, limits=(-1, 1)), torch.cat(latents)


def open_volumes(config: Config, split: dict[str, list[str]] | None = None) -> Data:
    """The checked data of a run. The preset "phantom" writes its own first, once: an ordinary folder of NIfTI
    files with a cases.csv."""
    root = Path("data/phantom")
    if config.preset == "phantom" and config.data.root is None:
        with main_first():
            if is_main() and not root.exists():
                print(f"{root}: writing {NUM_PHANTOMS} synthetic heads", flush=True)
                write_phantoms(root, NUM_PHANTOMS, size=PHANTOM_SIZE)
    return open_data(config.data, config.preset, config.run.seed, split, config.vae.downsampling)


# --- train --------------------------------------------------------------------------------------------------


def loss_terms(recon: Tensor, posterior: Posterior, x: Tensor, config: Config) -> dict[str, Tensor]:
    """The loss and what it is made of, each (B,), in fp32."""
    terms = {
        "reconstruction": reconstruction_loss(recon, x, config.reconstruction),
        "gradient": gradient_loss(recon, x),
        "kl": kl_per_element(posterior.mean, posterior.logvar),
    }
    weighted = config.gradient_weight * terms["gradient"] + config.kl_weight * terms["kl"]
    return {"loss": terms["reconstruction"] + weighted, **terms}


def plan(config: Config) -> None:
    """--plan: what training and validation need, in memory, and the largest batch and cube that would fit."""
    whole, step = config.data.size or open_volumes(config).state.size, max(config.vae.downsampling)
    micro = min(config.batch_size, config.micro_batch_size or config.batch_size)

    def make() -> AutoencoderKL:
        return AutoencoderKL(config.vae)

    def loss(net: AutoencoderKL, batch: int, size: tuple[int, ...]) -> Tensor:
        x = torch.zeros(batch, config.vae.in_channels, *size)
        recon, posterior = net(x, torch.zeros(batch, *net.latent_shape(size)))
        return loss_terms(recon, posterior, x, config)["loss"].mean()

    def there_and_back(net: AutoencoderKL, batch: int, size: tuple[int, ...]) -> None:
        net.decode(net.encode(torch.zeros(batch, config.vae.in_channels, *size)).mode(), size)

    plan = Plan(config.plan, config.run.amp, config.run.device)
    rounds = -(-config.batch_size // micro)
    plan.training("training", make, loss, micro, config.data.patch or whole, step, rounds)
    plan.inference("validation", make, there_and_back, 1, whole, step, beside=3 * weight_bytes(make()))
    plan.tell()


def train(config: Config, given: dict[str, Any] | None = None) -> Run:
    device = setup(config.run.device)
    run = Run("vae", config, given)
    config = run.config
    run.say()
    if run.finished:
        return run
    micro_batch_size = ranks_share(config.batch_size, config.micro_batch_size)

    reseed(config.run.seed, 0)
    net = AutoencoderKL(config.vae).to(device)
    data = open_volumes(config, run.split())
    train_set, val_set = data.dataset("train", augment=True), data.dataset("val")
    state = {"data": data.state.to_dict(), "split": data.split}
    run.check_data(state["data"])
    logger = run.start(data.split)
    ema, mean, speed = EMA(net, config.run.ema_decay), Mean(), Speed(config.batch_size, device, run.profile())
    stepper = Stepper(net, config.optim, config.run, config.batch_size, device)
    run.restore(net, ema, {"autoencoder": stepper}, mean=mean)
    if config.run.compile:
        net.compile()
    model = wrap(net, device)
    seed = config.run.seed

    def save() -> None:
        run.save(state, net, ema, {"autoencoder": stepper}, mean=mean)

    stream = batches(
        train_set, config.batch_size, micro_batch_size, seed, run.step, config.run.steps, config.run.workers
    )
    bar = progress(speed.watch(stream), "vae", config.run.steps, run.step)
    for group in bar:
        for batch, share in micro_batches(group, model, device, seed, run.step):
            x = batch["image"]
            noise = keyed_normal(seed, batch["position"], net.latent_shape(x.shape[2:]), "posterior")
            with autocast(config.run.amp, device):
                recon, posterior = model(x, noise.to(device))
            terms = loss_terms(recon, posterior, x, config)
            stepper.backward(terms["loss"].mean() * share)
            mean.add(**terms)
        if stepper.step(run.step):
            ema.update(net, run.step)
        run.step += 1
        speed.stop()

        if run.due("log_every"):
            means = mean.take()
            logger.log(run.step, "train", means | stepper.report() | speed.take())
            bar.set_postfix(loss=f"{means['loss']:.4g}")
        if run.due("eval_every"):
            scores = evaluate(ema.net, val_set, config, device)
            logger.log(run.step, "val", scores)
            if is_main():
                path = run.dir / "previews" / f"step_{run.step:07d}.png"
                picture, z = preview(ema.net, val_set, config, path, device)
                logger.picture(run.step, "reconstructions", picture)
                logger.histogram(run.step, "latent", z)
            run.keep_best("psnr", scores["psnr"], state, ema, highest=True)
        if run.due("save_every") or run.out_of_patience:
            save()
        run.check_sigterm(save)
        if run.finished:
            break
    run.finish(logger)
    return run


def main(argv: list[str] | None = None) -> None:
    config, given = parse(Config, argv, PRESETS, __doc__)
    if config.plan is None:
        train(config, given)
    else:
        plan(config)


if __name__ == "__main__":
    sys.exit(run_script(main))
