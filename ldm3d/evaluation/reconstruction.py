"""How good is an autoencoder? Its reconstructions, and what its latents offer to diffusion.

    python -m ldm3d.evaluation reconstruct runs/vae-hippocampus                   the run's validation cases
    python -m ldm3d.evaluation reconstruct runs/vae-tiff-translation --part test
    python -m ldm3d.evaluation reconstruct runs/vae-hippocampus --data FOLDER     any other images

Every case goes whole, at its own size, through encoder (mean) and decoder. The new folder holds cases.csv (a
row per case: PSNR, SSIM, MS-SSIM, mean absolute error in the unit of the files, sharpness), report.json
(means with bootstrap intervals, all settings, the latent report), reconstructions.png (the first --num cases
beside their reconstructions) and worst.png (those with the lowest PSNR).

The latent report describes each channel over all cases. Diffusion sees z = mean + exp(logvar / 2) * xi:

    noise share   s^2 = E exp(logvar) / Var z: the part of a latent's variance that is noise of the posterior
                  and says nothing about the image
    loss floor    no network can predict that noise. A network that knew the posterior's mean would predict
                  y = c z + d eps from x_t = a z + b eps with the error that conditioning a Gaussian leaves
                  (Var z = s^2, Var eps = 1):
                      Var(y | x_t, mean) = s^2 (a d - b c)^2 / (a^2 s^2 + b^2)
                  The mean of this error over training times and voxels is a floor under every diffusion
                  loss. For flow with shift 1 the floor is s pi / 2. Example: a noise share of 0.01 (s = 0.1)
                  means a floor of 0.157, so a loss of 0.16 cannot be improved by training longer
    dead          a channel that is nearly all noise, or hardly varies
    correlation   of the means of two channels, over all voxels
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import InputError, at_least, to_dict
from ..data import VolumeDataset, open_images
from ..diffusion_kernel import DiffusionKernel, KernelConfig
from ..engine.distributed import gather, is_main, rank, setup, world_size
from ..engine.logger import progress, save_sheet, visible_slices
from ..engine.training import autocast
from ..metrics import ms_ssim, ms_ssim_weights, psnr, sharpness, ssim
from ..pipeline import load_autoencoder
from ..vqvae import VQVAE, perplexity_of
from .openers import autoencoder_path
from .results import Rows, WorstPictures, new_folder, table, write_csv, write_report
from .statistics import interval_words, summarise

# --- Config -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReconstructionConfig:
    data: str | None = None  # folder of images to reconstruct; none = cases of the run itself
    part: Literal["train", "val", "test"] = "val"  # which of the run's own cases
    out: str | None = None  # new folder for the report; none = evaluation-001 (-002, ...) in the run folder
    num: int = 8  # cases shown in reconstructions.png, the first by name
    worst: int = 4  # cases shown in worst.png, those with the lowest PSNR
    resamples: int = 2000  # of the bootstrap
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # precision of the networks
    memory: float | None = None  # GiB that encoding and decoding may use; none = what is free

    def __post_init__(self) -> None:
        at_least(self, 0, "num", "worst")
        if max(self.num, self.worst) > 64:
            raise InputError(f"num, worst: a picture shows at most 64 cases, got {self.num}, {self.worst}")
        at_least(self, 1, "resamples")
        at_least(self, 0, "memory")


# --- latents ------------------------------------------------------------------------------------------------


def loss_floor(noise_share: Tensor, kernel: DiffusionKernel, size: tuple[int, ...]) -> Tensor:
    """The mean squared diffusion loss that no network can fall below, for latents of spatial `size`.

    noise_share: any shape, the variance s^2 of the posterior's noise in latents of unit variance.
    """
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = kernel.t_from_uniform(u, size)
    one = torch.ones(1000, 1, dtype=torch.float64)
    a, b = (v.flatten() for v in kernel.coefficients(t, one))
    c, d = (kernel.target(x, t, y).flatten() for x, y in ((one, 0 * one), (0 * one, one)))
    s2 = noise_share.double()[..., None]
    return (s2 * (a * d - b * c) ** 2 / (a**2 * s2 + b**2).clamp(min=1e-300)).mean(-1)


class LatentStatistics:
    """Collects sums over all voxels of all cases, in float64, for the latent report.

    Variances are also kept as a histogram of their logarithm, since the loss floor is not linear in them.
    """

    edges = torch.linspace(-30, 20, 401, dtype=torch.float64)

    def __init__(self, channels: int):
        self.count = 0
        self.first = torch.zeros(channels, dtype=torch.float64)  # sum of the means
        self.second = torch.zeros(channels, channels, dtype=torch.float64)  # sum of their products
        self.noise = torch.zeros(channels, dtype=torch.float64)  # sum of the variances
        self.histogram = torch.zeros(channels, len(self.edges) - 1, dtype=torch.float64)

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Add one posterior: mean and logvar (1, C_z, *s)."""
        mean, logvar = (v[0].flatten(1).double().cpu() for v in (mean, logvar))  # (C_z, voxels)
        self.count += mean.shape[1]
        self.first += mean.sum(1)
        self.second += mean @ mean.T
        self.noise += logvar.exp().sum(1)
        bins = torch.bucketize(logvar, self.edges[1:-1])
        self.histogram += torch.stack([torch.bincount(b, minlength=self.histogram.shape[1]) for b in bins])

    def merge(self, others: list[LatentStatistics]) -> None:
        """Take the sums over all `others`, such as those of all ranks."""
        for name in ("count", "first", "second", "noise", "histogram"):
            setattr(self, name, sum(getattr(other, name) for other in others))

    def report(self, size: tuple[int, ...]) -> dict[str, Any]:
        """The latent report. size: spatial shape of a latent, which sets the shift of the flow."""
        mean, noise = self.first / self.count, self.noise / self.count
        covariance = self.second / self.count - mean[:, None] * mean
        signal = covariance.diagonal().clamp(min=0)
        variance = signal + noise
        share = noise / variance.clamp(min=1e-300)
        dead = (share > 0.95) | (signal.sqrt() < 1e-3 * signal.sqrt().max())
        weight = self.histogram / self.count  # (C_z, bins)
        centres = ((self.edges[1:] + self.edges[:-1]) / 2).exp()
        # A bin is as wide as 13 % of its variance: scale them so that the channel's mean variance is exact
        exact = noise / (weight @ centres)
        shares = centres * (exact / variance.clamp(min=1e-300))[:, None]
        floors = {}
        for kind in ("flow", "eps", "v"):
            vp = {} if kind == "flow" else {"process": "vp", "prediction": kind}
            kernel = DiffusionKernel(KernelConfig(**vp))
            floors[kind] = float((weight * loss_floor(shares, kernel, size)).sum(1).mean())
        return {
            "size": list(size),
            "mean": mean.tolist(),
            "std": variance.sqrt().tolist(),
            "noise_share": share.tolist(),
            "dead_channels": dead.nonzero().flatten().tolist(),
            "correlation": (covariance / (signal[:, None] * signal).sqrt()).tolist(),
            "loss_floor": floors,
        }


# --- reconstruction -----------------------------------------------------------------------------------------


@torch.inference_mode()
def reconstruct(config: ReconstructionConfig, run: Path) -> Path:
    """Reconstruct all cases and write the report; returns its folder. InputError names what does not fit."""
    device = setup(config.device)
    autoencoder, content = load_autoencoder(autoencoder_path(run))
    autoencoder.to(device).memory = config.memory
    dataset = open_images(content, config.data, "all" if config.data else config.part)
    folder = new_folder(run, config.out, "evaluation")
    rows, worst, first = {}, WorstPictures(config.worst), WorstPictures(config.num)
    grey = sum(dataset.spec.display) / 2  # where there is no difference
    latents, codes = LatentStatistics(autoencoder.config.latent_channels), torch.zeros(1)
    for i in progress(range(rank(), len(dataset), world_size()), "reconstructing"):
        x = dataset[i, i]["image"][None].to(device)
        with autocast(config.amp, device):
            posterior = autoencoder.encode(x)
            recon = autoencoder.decode(posterior.mode(), x.shape[2:])
        recon, name = recon.float(), dataset.cases[i].id
        latents.add(posterior.mean, posterior.logvar)
        if isinstance(autoencoder, VQVAE):
            codes = codes + autoencoder.quantizer.usage(posterior.mean).cpu()
        rows[name] = scores_of(recon, x, dataset, i)
        pictures = [
            s for v in (x, recon, 2 * (recon - x) + grey) for s in visible_slices(v[0], dataset.spec.display)
        ]
        worst.add(name, rows[name]["psnr"], pictures)
        first.add(name, 0.0, pictures)  # equal scores: the order is that of the names
    rows = {k: v for part in gather(rows) for k, v in part.items()}
    worst.gather()
    first.gather()
    latents.merge(gather(latents))
    codes = sum(gather(codes))
    if is_main():
        rows = dict(sorted(rows.items()))
        size = autoencoder.latent_shape(dataset.spec.size)[1:]
        weights = [ms_ssim_weights(dataset.infos[case.id].shape) for case in dataset.cases]
        report = {
            **to_dict(config),
            "run": str(run),
            "step": content["step"],
            "weights": "EMA",
            "cases": len(rows),
            "interval": interval_words(config.resamples),
            "data_range": 2.0,
            "ssim_window": 7,
            "ms_ssim_weights": {len(w): w for w in weights},  # by the number of scales that fit
            "metrics": summarise(rows, config.resamples, {c.id: c.subject for c in dataset.cases}),
            "latent": latents.report(size),
        }
        if isinstance(autoencoder, VQVAE):
            used, perplexity = int((codes > 0).sum()), perplexity_of(codes).item()
            report["codebook"] = {"codes": len(codes), "used": used, "perplexity": perplexity}
        write_csv(folder / "cases.csv", rows)
        write_report(folder / "report.json", report)
        print_summary(report)
        pictures = [draw(folder / "reconstructions.png", first, rows, dataset.spec.display)]
        pictures += [draw(folder / "worst.png", worst, rows, dataset.spec.display)]
        print(", ".join([f"{len(rows)} cases: {folder}", *(str(path) for path in pictures if path)]))
    return folder


def scores_of(recon: Tensor, x: Tensor, dataset: VolumeDataset, index: int) -> dict[str, float]:
    """Scores of one reconstruction and its original (1, C, *S).

    PSNR (dB), SSIM and MS-SSIM are of the scaled intensities, whose range is 2. MAE is in the unit of the
    file, of intensities clipped by the scaling, mean over channels. Sharpness is the mean difference of
    neighbouring voxels, divided by the same of the original: below 1 is a blur; nan if the original is
    constant.
    """
    restored, original = (dataset.restore(index, v[0].cpu()).array.astype(np.float64) for v in (recon, x))
    detail = sharpness(x)
    return {
        "psnr": psnr(recon, x, data_range=2.0).item(),
        "ssim": ssim(recon, x, data_range=2.0).item(),
        "ms_ssim": ms_ssim(recon, x, data_range=2.0).item(),
        "mae": float(np.abs(restored - original).mean()),
        "sharpness": sharpness(recon) / detail if detail else math.nan,
    }


def draw(path: Path, kept: WorstPictures, rows: Rows, display: tuple[float, float]) -> Path | None:
    """Draw the kept cases, a row each; returns the path, None if nothing was drawn."""
    words = "original, reconstruction, twice the difference"
    sheet = kept.sheet(lambda name, _: f"{name}: {rows[name]['psnr']:.2f} dB ({words})")
    return save_sheet(path, sheet, display) if sheet else None


def print_summary(report: dict[str, Any]) -> None:
    """Means and latent report, on the console."""
    lines = [(name, s["mean"], s["low"], s["high"]) for name, s in report["metrics"].items()]
    print(table([("", "mean", "low", "high"), *lines]))
    latent = report["latent"]
    shares = ", ".join(f"{v:.3g}" for v in latent["noise_share"])
    floors = ", ".join(f"{k} {v:.3g}" for k, v in latent["loss_floor"].items())
    if "codebook" in report:
        print(f"codebook  {report['codebook']}")
    print(f"  latent  noise share {shares}; dead channels {latent['dead_channels']}; loss floor {floors}")
