"""How likely is an image under a diffusion model, in bits per number of its latent? Which images are strange?

    python -m ldm3d.evaluation likelihood runs/ldm-phantom                        the run's validation cases
    python -m ldm3d.evaluation likelihood runs/ldm-phantom --data FOLDER          and other images beside them
    python -m ldm3d.evaluation likelihood runs/ldm-phantom --changes cut,roll,flip

Divided by alpha_t + sigma_t, every process is a flow: y = (1 - s) x_start + s noise, with s from 0 = clean to
1 = noise. The probability flow takes the distribution of y along, without any randomness:

    d y / d s = v(y, s) = noise - x_start, as the network estimates them at y                Song (13)
    d log p(y) / d s = - trace(d v / d y)                                                    Song (39)

So log p of an image is log p of the Gaussian noise at its end, plus the trace added up on the way. The steps
are Heun's, for y and for log p, with times that lie closer together near s = 0.

The trace needs d backward passes for a latent of d numbers. Hutchinson's estimator needs one for each random
vector r of signs: the mean of r^T (d v / d y) r is the trace. The vectors stay the same all the way.

A density needs noise: the network has seen no latent without any. z is drawn from the posterior of the
autoencoder, as in training, and gets noise of the standard deviation s / (1 - s) of the first time: 0.001 for
flow; for vp that of the first timestep, 0.04 with the usual schedule. The density is that of this noisy z, in
normalised latents, without conditions. bits per dimension = - log2 p / d. Example: standard Gaussian latents
have 1/2 log2(2 pi e) = 2.05, and latents a tenth as wide 2.05 - log2(10) = -1.27. Fewer bits: more likely.

Strange images need not be unlikely. Large even areas are simple, and simple images may be likelier than any
real one (Nalisnick et al. 2019). So there are two AUC beside the run's own cases: of the bits per dimension,
and of their distance from the median of the run's cases (`atypical`), in which too likely counts as strange.

--changes spoils the run's own cases along their last axis, which a useful model must notice: cut (the upper
half is empty; in 2-D, where the last axis is the column, the right half), roll (moved by half of the axis,
around its end), flip (upside down; in 2-D left and right).

Song et al. 2021 arXiv:2011.13456; Grathwohl et al. 2019 (FFJORD) 1810.01367; Nalisnick et al. 2019
1906.02994.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import at_least, to_dict
from ..data import VolumeDataset, open_images
from ..diffusion_kernel import DiffusionKernel, solve_prediction
from ..engine.distributed import gather, is_main, keyed_generator, rank, setup, world_size
from ..engine.logger import progress
from ..engine.training import autocast
from ..latent_diffusion import LatentDiffusion
from ..pipeline import LatentDiffusionPipeline
from .results import Rows, new_folder, table, with_interval, write_csv, write_report
from .statistics import auc, auc_interval, interval_words, summarise

FIRST = 1e-3  # the cleanest time of flow
EXACT = 64  # latents of at most so many numbers get the exact trace, unless asked otherwise


@dataclass(frozen=True)
class LikelihoodConfig:
    data: str | None = None  # folder of images to compare with the run's cases; none = no others
    part: Literal["train", "val", "test"] = "val"  # which of the run's own cases
    changes: tuple[Literal["cut", "roll", "flip"], ...] = ()  # spoil the run's cases, and compare these too
    steps: int = 32  # of the probability flow; the network is asked, and differentiated, twice a step
    probes: int | None = None  # random vectors of the trace; 0 = exact; none = exact up to 64 numbers, else 1
    subset: int | None = None  # take only this many cases of each set
    seed: int = 0  # of noise and random vectors
    out: str | None = None  # new folder for the report; none = likelihood-001 (-002, ...) in the run folder
    resamples: int = 2000  # of the bootstrap
    batch_size: int = 8  # images at once
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # precision of the networks

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "subset", "resamples", "batch_size")
        at_least(self, 0, "probes")


# --- the probability flow -----------------------------------------------------------------------------------


def flow_times(kernel: DiffusionKernel, steps: int) -> list[float]:
    """Rising times t, of about `steps` intervals, closer together where s = sigma / (alpha + sigma) is small:
    s grows with the square of the position. Of vp, timesteps, without duplicates."""
    position = torch.linspace(0, 1, steps + 1, dtype=torch.float64).square()
    if kernel.process == "flow":
        return (FIRST + (1 - FIRST) * position).tolist()
    alpha, sigma = kernel.sqrt_alphas_cumprod, kernel.sqrt_one_minus_alphas_cumprod
    share = sigma / (alpha + sigma)
    wanted = share[0] + (share[-1] - share[0]) * position
    return sorted({*(wanted[:, None] - share).abs().argmin(1).tolist(), 0, len(share) - 1})


def probes_of(shape: Sequence[int], num: int, generator: torch.Generator) -> list[Tensor]:
    """Vectors (1, *shape) whose sum of r^T A r is the trace of A: the unit vectors with num = 0, or `num`
    vectors of random signs, divided by sqrt(num)."""
    if num:
        signs = torch.randint(0, 2, (num, 1, *shape), generator=generator).double() * 2 - 1
        return list(signs / math.sqrt(num))
    count = math.prod(shape)
    return list(torch.eye(count, dtype=torch.float64).view(count, 1, *shape))


def log_likelihood(
    kernel: DiffusionKernel,
    model: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    times: Sequence[float],
    probes: Sequence[Tensor],
) -> Tensor:
    """log p (B,), float64, in nats, of z (B, C, *S), which holds the noise of the first time, see above.

    model(x_t, time (B,) on 0..T) -> prediction. times: rising, the last one noise. probes (1 or B, C, *S):
    see `probes_of`.
    """
    levels = [kernel.signal_and_noise(t) for t in times]

    def slope(y: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(v, trace of d v / d y (B,)) at y and times[i]."""
        (alpha, sigma), time = levels[i], kernel.to_network_time(y.new_full((len(y),), times[i]))
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x_t = y * (alpha + sigma)
            pred = model(x_t, time).to(y.dtype)
            pred_x_start, noise = solve_prediction(kernel.config.prediction, pred, x_t, alpha, sigma)
            velocity, trace = noise - pred_x_start, 0.0
            for probe in probes:
                probe = probe.to(y).expand_as(y)
                (row,) = torch.autograd.grad(velocity, y, probe, retain_graph=True)
                trace = trace + (row * probe).flatten(1).double().sum(1)
        return velocity.detach(), trace

    numbers = z[0].numel()
    (alpha, sigma), (last_alpha, last_sigma) = levels[0], levels[-1]
    y = z * alpha / (alpha + sigma)
    change = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    shares = [sigma / (alpha + sigma) for alpha, sigma in levels]
    for i in range(len(times) - 1):
        step = shares[i + 1] - shares[i]
        velocity, trace = slope(y, i)
        velocity_next, trace_next = slope(y + step * velocity, i + 1)
        y = y + step / 2 * (velocity + velocity_next)
        change += step / 2 * (trace + trace_next)
    x = (y * (last_alpha + last_sigma)).flatten(1).double()
    gaussian = -0.5 * (x.square().sum(1) + numbers * math.log(2 * math.pi))
    # From the density of x at the last time to that of y, and from that of y to that of z at the first
    scales = math.log(last_alpha + last_sigma) + math.log(alpha / (alpha + sigma))
    return gaussian + change + numbers * scales


def bits_per_dimension(log_p: Tensor, numbers: int) -> Tensor:
    """- log2 p / d."""
    return -log_p / (numbers * math.log(2))


@torch.no_grad()
def bits_of(model: LatentDiffusion, x: Tensor, config: LikelihoodConfig, keys: Sequence[int]) -> Tensor:
    """Bits per dimension (B,) of volumes x (B, C, *size). keys: the numbers that key the noise of each."""
    kernel, times = model.kernel, flow_times(model.kernel, config.steps)
    draws = [keyed_generator(config.seed, key, "likelihood") for key in keys]
    posterior = model.autoencoder.encode(x.to(model.device))
    shape = posterior.mean.shape[1:]
    first, second = (
        torch.stack([torch.randn(shape, generator=g) for g in draws]).to(model.device) for _ in range(2)
    )
    z = posterior.mean if posterior.logvar is None else posterior.mean + (posterior.logvar / 2).exp() * first
    alpha, sigma = kernel.signal_and_noise(times[0])
    z = model.normalise(z).float() + sigma / alpha * second
    numbers = math.prod(shape)
    num = config.probes if config.probes is not None else int(numbers > EXACT)
    each = [probes_of(shape, num, g) for g in draws]
    probes = [torch.cat(some) for some in zip(*each, strict=True)]
    net = model.denoiser_for(z.shape[2:])
    with autocast(config.amp, model.device):
        log_p = log_likelihood(kernel, net, z, times, probes)
    return bits_per_dimension(log_p, numbers).cpu()


# --- sets of images -----------------------------------------------------------------------------------------


def change(x: Tensor, kind: str) -> Tensor:
    """x (B, C, *S) spoilt, see the module: cut, roll, flip."""
    half = x.shape[-1] // 2
    if kind == "cut":
        return torch.cat([x[..., :half], torch.full_like(x[..., half:], float(x.min()))], dim=-1)
    return x.roll(half, -1) if kind == "roll" else x.flip(-1)


def sets_of(config: LikelihoodConfig, content: dict[str, Any]) -> dict[str, tuple[VolumeDataset, str | None]]:
    """The sets to compare: name -> (images, how they are spoilt). The first are the run's own cases."""
    how = {"own_size": False, "max_cases": config.subset}
    own = open_images(content, None, config.part, **how)
    sets = {config.part: (own, None)} | {kind: (own, kind) for kind in config.changes}
    if config.data is not None:
        sets["data"] = open_images(content, config.data, **how), None
    return sets


def batches_of(dataset: VolumeDataset, size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers of the images, images (B, C, *size)), this rank's share of them."""
    mine = range(rank(), len(dataset), world_size())
    for start in range(0, len(mine), size):
        numbers = list(mine[start : start + size])
        yield numbers, torch.stack([dataset[i, i]["image"] for i in numbers])


# --- all of it ----------------------------------------------------------------------------------------------


def likelihood(config: LikelihoodConfig, run: Path) -> Path:
    """Bits per dimension of all sets, and the report; returns its folder."""
    pipeline = LatentDiffusionPipeline(run, setup(config.device))
    sets = sets_of(config, pipeline.content)
    folder, rows = new_folder(run, config.out, "likelihood"), {}
    for name, (dataset, kind) in sets.items():
        rounds = -(-len(range(rank(), len(dataset), world_size())) // config.batch_size)
        for numbers, x in progress(batches_of(dataset, config.batch_size), name, rounds):
            x = x if kind is None else change(x, kind)
            bits = bits_of(pipeline.model, x, config, numbers)
            for i, value in zip(numbers, bits.tolist(), strict=True):
                rows[f"{name}: {dataset.cases[i].id}"] = {"set": name, "bits_per_dimension": value}
    rows = {k: v for part in gather(rows) for k, v in part.items()}
    if is_main():
        rows = {name: rows[name] for name in sorted(rows, key=lambda n: list(sets).index(rows[n]["set"]))}
        report = figures(rows, list(sets), config.resamples)
        write_csv(folder / "cases.csv", rows)
        facts = {"run": str(run), "step": pipeline.content["step"], "weights": "EMA"}
        facts["interval"] = interval_words(config.resamples)
        write_report(folder / "report.json", {**to_dict(config), **facts, "sets": report})
        print_figures(report)
        print(f"{len(rows)} images: {folder}")
    return folder


def figures(rows: Rows, names: Sequence[str], resamples: int) -> dict[str, dict[str, Any]]:
    """For each set the mean of the bits per dimension, and beside the first set the two AUC."""
    bits = {
        name: np.array([r["bits_per_dimension"] for r in rows.values() if r["set"] == name]) for name in names
    }
    own, found = bits[names[0]], {}
    for name, values in bits.items():
        mine = {k: {"bits_per_dimension": v} for k, v in enumerate(values)}
        found[name] = summarise(mine, resamples)
        if name == names[0]:
            continue
        far = [np.abs(v - np.median(own)) for v in (own, values)]
        for what, pair in {"unlikely": (own, values), "atypical": far}.items():
            low, high = auc_interval(*pair, resamples)
            found[name][f"auc_{what}"] = {"value": auc(*pair), "low": low, "high": high}
    return found


def print_figures(report: dict[str, dict[str, Any]]) -> None:
    lines = [("", "images", "bits per dimension", "AUC, unlikely", "AUC, atypical")]
    for name, row in report.items():
        mean = row["bits_per_dimension"]
        aucs = [row.get(f"auc_{what}") for what in ("unlikely", "atypical")]
        words = [with_interval(a["value"], a["low"], a["high"]) if a else "" for a in aucs]
        lines.append((name, mean["cases"], with_interval(mean["mean"], mean["low"], mean["high"]), *words))
    print(table(lines))
