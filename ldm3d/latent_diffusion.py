"""Latent diffusion: a frozen autoencoder, the statistics of its latents, a denoiser, and a diffusion kernel.

    z       = (encode(x).mean - latent_mean) / latent_std        per channel, measured over the training set
    loss    = kernel loss of the denoiser at z_t, with z drawn afresh from the posterior at every step
    sample  = decode(latent_std * kernel.sample(denoiser, noise) + latent_mean)

Stage two trains from a cache of (mean, logvar), so that the encoder runs once a case and not once a step; the
variance of the posterior is not lost, since z is drawn from it. Rombach et al. 2022 (2112.10752), section 3;
the measured per-channel scale replaces their single 1 / std of the first batch (section G). With a VQ
autoencoder z is the latent before quantisation, whose posterior has no width, and `decode` quantises it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checkpoint import load_run, load_weights, save
from .config import InputError, from_dict
from .data import DataConfig, DataState, VolumeDataset
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .distributed import all_reduce_sum, barrier, is_main, keyed_generator, rank, world_size
from .logger import progress
from .training import autocast
from .unet import UNetConfig
from .vae import AutoencoderKL, VAEConfig
from .vqvae import VQVAE, QuantizerConfig

Autoencoder = AutoencoderKL | VQVAE


def make_autoencoder(kind: str, vae: VAEConfig, quantizer: QuantizerConfig) -> Autoencoder:
    """A new autoencoder: "kl", or "vq" with the same trunks and a codebook."""
    return VQVAE(vae, quantizer) if kind == "vq" else AutoencoderKL(vae)


def load_autoencoder(run: str | Path) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder (EMA weights, frozen, eval mode, on the CPU) of a run or checkpoint, and the
    checkpoint's content."""
    content = load_run(run, "vae")
    config = content["config"]
    autoencoder = make_autoencoder(
        config.get("autoencoder", "kl"),
        from_dict(VAEConfig, config["vae"], "vae"),
        from_dict(QuantizerConfig, config.get("quantizer", {}), "quantizer"),
    )
    load_weights(autoencoder, content["ema"], str(run))
    return autoencoder.eval().requires_grad_(False), content


# --- cached latents -----------------------------------------------------------------------------------------


def cache_key(autoencoder: Autoencoder, data: DataConfig, state: DataState, files: list[str]) -> str:
    """A hash of all that a cached latent depends on: encoder weights, data settings, and the files' paths,
    sizes, times."""
    digest = hashlib.sha256()
    for name, value in autoencoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    try:
        stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    except OSError as e:
        raise InputError(f"{e.filename}: is gone, it was there when the data were checked") from None
    digest.update(repr((data, state.to_dict(), stats)).encode())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def cache_latents(
    autoencoder: Autoencoder,
    dataset: VolumeDataset,
    folder: Path,
    num_variants: int,
    device: torch.device,
    amp: str = "fp32",
) -> np.ndarray:
    """(cases, variants, 2, C_z, *s) float32 memory map of (mean, logvar); made once, rank-sharded, then read.

    Variant v of case i is the dataset's item (v * cases + i, i): with augmentation on, each is another draw.
    """
    path = folder / "latents.npy"
    shape = (len(dataset), num_variants, 2, *autoencoder.latent_shape(dataset[0, 0]["image"].shape[1:]))
    if not path.exists():
        temporary = folder / "latents.npy.partial"
        if is_main():
            reserve(temporary, shape)
        barrier()
        table = np.lib.format.open_memmap(temporary, "r+")
        jobs = [(v, i) for v in range(num_variants) for i in range(len(dataset))][rank() :: world_size()]
        for v, i in progress(jobs, "encoding"):
            x = dataset[v * len(dataset) + i, i]["image"][None].to(device)
            with autocast(amp, device):
                posterior = autoencoder.encode(x)
            table[i, v] = torch.stack([posterior.mean[0], posterior.logvar[0]]).float().cpu().numpy()
        table.flush()
        barrier()
        if is_main():
            os.replace(temporary, path)
        barrier()
    table = np.load(path, mmap_mode="r")
    assert table.shape == shape, (table.shape, shape)
    return table


def reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Make an empty float32 .npy file whose room on the disk is certain: a memory map that runs out of it
    later would kill the process without a word."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        with suppress(OSError):
            path.unlink()
        gib = 4 * math.prod(shape) / 2**30
        raise InputError(f"{path}: no room for {gib:.2g} GiB of latents ({e.strerror or e})") from None


class LatentDataset(Dataset):
    """Cached posteriors. Item (position, index): mean and logvar (C_z, *s) of one variant, chosen by the
    position."""

    def __init__(self, table: np.ndarray, seed: int):
        self.table, self.seed = table, seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        variants = self.table.shape[1]
        draw = keyed_generator(self.seed, position, "variant")
        v = int(torch.randint(variants, (1,), generator=draw)) if variants > 1 else 0
        mean, logvar = torch.from_numpy(np.array(self.table[index, v]))
        return {"mean": mean, "logvar": logvar, "position": position, "index": index}


def latent_statistics(table: np.ndarray) -> tuple[Tensor, Tensor]:
    """(latent_mean, latent_std), each (C_z,), of z = mean + std * noise over all cached cases, in float64.

    The posterior's own variance is added in closed form: Var z = Var mean + E exp(logvar). Reduced over
    ranks.
    """
    channels = table.shape[3]
    sums = torch.zeros(4, channels, dtype=torch.float64)
    for i in range(rank(), len(table), world_size()):
        mean, logvar = torch.from_numpy(np.array(table[i])).double().transpose(0, 1)  # (variants, C_z, *s)
        over = [d for d in range(mean.ndim) if d != 1]
        sums[0] += mean.sum(over)
        sums[1] += mean.square().sum(over)
        sums[2] += logvar.exp().sum(over)
        sums[3] += mean.numel() / channels
    total, squares, noise, count = all_reduce_sum(sums)
    mean = total / count
    variance = squares / count - mean.square() + noise / count
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


# --- the model ----------------------------------------------------------------------------------------------


class LatentDiffusion:
    """What samples: autoencoder, denoiser and kernel with the latent statistics and the data's geometry.

    latent_mean, latent_std: (C_z,). `state` tells the size, spacing and intensity of the volumes it makes.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        kernel: DiffusionKernel,
        latent_mean: Tensor,
        latent_std: Tensor,
        state: DataState,
    ):
        self.autoencoder, self.denoiser, self.kernel, self.state = autoencoder, denoiser, kernel, state
        per_channel = (1, -1) + (1,) * len(state.size)
        self.latent_mean, self.latent_std = latent_mean.view(per_channel), latent_std.view(per_channel)

    @classmethod
    def load(cls, run: str | Path, device: str | torch.device = "cpu") -> LatentDiffusion:
        """From the run folder of train_ldm.py (best.pt, else the newest checkpoint) or a checkpoint in it."""
        run = Path(run)
        content = load_run(run, "ldm")
        folder = run if run.is_dir() else run.parent
        autoencoder, _ = load_autoencoder(folder / "autoencoder.pt")
        denoiser = Denoiser(from_dict(UNetConfig, content["config"]["unet"], "unet"))
        load_weights(denoiser, content["ema"], str(run))
        kernel = DiffusionKernel(from_dict(KernelConfig, content["config"]["kernel"], "kernel"))
        state = content["state"]
        return cls(
            autoencoder.to(device),
            denoiser.to(device).eval().requires_grad_(False),
            kernel,
            state["latent_mean"].to(device),
            state["latent_std"].to(device),
            DataState.from_dict(state["data"]),
        )

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C_z, *s) of a volume of the run's size."""
        return self.autoencoder.latent_shape(self.state.size)

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.latent_mean) / self.latent_std

    def encode(self, x: Tensor) -> Tensor:
        """x (B, C, *S), scaled intensities -> normalised latent (B, C_z, *s), the posterior's mean."""
        return self.normalise(self.autoencoder.encode(x).mean)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latent (B, C_z, *s) -> x (B, C, *size)."""
        return self.autoencoder.decode(z * self.latent_std + self.latent_mean, self.state.size)

    def loss(
        self, model: Any, mean: Tensor, logvar: Tensor, z_noise: Tensor, u: Tensor, noise: Tensor
    ) -> Tensor:
        """(B,) diffusion loss of `model` (the denoiser, bare or in DDP) on cached posteriors.

        z_noise draws z from the posterior, noise is the diffusion's, u (B,) in [0, 1) sets t; all keyed by
        the sample.
        """
        z = self.normalise(mean + torch.exp(0.5 * logvar) * z_noise)
        t = self.kernel.t_from_uniform(u, z.shape[2:])
        return self.kernel.losses(model, z, t, noise)

    @torch.inference_mode()
    def sample(
        self,
        num: int = 1,
        steps: int = 30,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 4,
        eta: float = 0.0,
        first: int = 0,
        amp: str = "fp32",
    ) -> Tensor:
        """New volumes (num, C, *size) on the CPU, in scaled intensities.

        Sample i has its own CPU generator keyed by (seed, i), so that it does not depend on batch size, rank
        or device (to rounding). `first` numbers the first one: sample(2, first=4) gives samples 4 and 5.
        """
        indices = range(first, first + num)
        batches = [x for x, _ in self.stream(indices, steps, sampler, seed, batch_size, eta, amp)]
        return torch.cat(batches) if batches else torch.empty(0, self.state.channels, *self.state.size)

    def stream(
        self,
        indices: range | list[int],
        steps: int,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 4,
        eta: float = 0.0,
        amp: str = "fp32",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`sample` batch by batch, for the samples with these indices: (volumes on the CPU, their normalised
        latents)."""
        sampler = sampler or self.default_sampler
        self.kernel.check_sampler(sampler, eta)
        for start in range(0, len(indices), batch_size):
            with torch.inference_mode(), autocast(amp, self.device):
                generators = [keyed_generator(seed, i, "sample") for i in indices[start : start + batch_size]]

                def draw(shape: torch.Size, generators: list = generators) -> Tensor:
                    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])

                noise = draw((len(generators), *self.latent_shape)).to(self.device)
                z = self.kernel.sample(self.denoiser, noise, steps, sampler, eta=eta, draw=draw)
                x = torch.cat([self.decode(one).float().cpu() for one in z.split(1)])  # least memory
            yield x, z

    @property
    def default_sampler(self) -> str:
        return "heun" if self.kernel.process == "flow" else "dpmpp"


def copy_autoencoder(source: str | Path, run_dir: Path) -> None:
    """Put the autoencoder's EMA weights into a stage-two folder, once, so that the folder is complete."""
    target = run_dir / "autoencoder.pt"
    if target.exists() or not is_main():
        return
    content = load_run(source, "vae")
    keep = ("kind", "config", "state", "ema", "step", "best")
    save(target, {k: content[k] for k in keep})
