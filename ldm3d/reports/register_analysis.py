"""What have the registers of a run learned? Do they mean their labels, is any dead, what do they change?

    python -m ldm3d.reports registers runs/ldm-phantom-anatomy
    python -m ldm3d.reports registers RUN --part test --level 0.3

On real cases of the run, with noise of one level, and with A (K, M) the attention that the registers of each
label receive in a voxel (registers.py), averaged over heads, and over places where none is named:

    pointing    share of the cases with label c where sum_m A_cm is highest inside mask c
    attention   mean of sum_m A_cm over the voxels of mask c (1 / K by chance)
    usage       part of the attention to label c that each of its registers gets; dead: below a tenth of 1 / M
    norms, similarity     of the bank: |r|, mean cosine of pairs of one label, and of different labels
    gates       of each place, 0 at the start of training
    difference  root mean square between samples with and without registers, from the same noise

The folder that is made holds registers.json and, with matplotlib, registers.png: images with their true
labels in colours, for each label the attention beside the mask, and samples with and without registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import crop_to
from ..config import InputError, at_least, to_dict
from ..data import VolumeDataset, collate
from ..engine.distributed import setup
from ..engine.logger import progress, save_sheet
from ..engine.training import autocast, keyed_normal, to_device
from ..evaluation.results import new_folder, table, write_report
from ..inference.segmentation import overlay
from ..latent_diffusion import LatentDiffusion, run_data
from ..latents import WithConditions, encode_batch

DEAD = 0.1  # of an even part of its label's attention: a register below is not used


@dataclass(frozen=True)
class RegisterReportConfig:
    part: Literal["train", "val", "test"] = "val"  # of the run's cases
    max_cases: int | None = 32  # of these, the first ones; none = all
    level: float = 0.2  # noise u at which attention is looked at, from 0 = clean to 1
    shown: int = 3  # cases and samples in the figure
    steps: int = 20  # intervals of the sampling grid
    seed: int = 0  # of noise and samples
    out: str | None = None  # new folder for the report; none = registers-001 (-002, ...) in the run folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # precision of the networks

    def __post_init__(self) -> None:
        at_least(self, 1, "max_cases", "shown", "steps")
        if not 0 <= self.level < 1:
            raise InputError(f"level: expected 0 <= level < 1, got {self.level}")


# --- the bank -----------------------------------------------------------------------------------------------


def bank_figures(bank: Tensor) -> dict[str, Any]:
    """Norms (K, M) of a bank (K, M, E), mean cosine of pairs within each label, and between labels."""
    flat = F.normalize(bank.detach().double(), dim=2).flatten(0, 1)
    K, M = bank.shape[:2]
    cosine = (flat @ flat.T).view(K, M, K, M)
    within = [cosine[k, :, k].sum() - M for k in range(K)]
    between = cosine.sum() - sum(cosine[k, :, k].sum() for k in range(K))
    return {
        "norms": bank.detach().norm(dim=2).tolist(),
        "similarity_within": [float(v) / (M * (M - 1)) if M > 1 else math.nan for v in within],
        "similarity_between": float(between) / (K * (K - 1) * M * M) if K > 1 else math.nan,
    }


# --- attention on real cases --------------------------------------------------------------------------------


class Attention:
    """Sums over cases of what registers receive, at each place and averaged over places ("all")."""

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self.usage: Tensor | float = 0.0  # (K, M), of the attention of all voxels
        self.hits: dict[str, Tensor] = {}  # name -> (3, K): peaks inside the mask; attention inside; cases

    def add(self, places: list[Tensor], mask: Tensor) -> Tensor:
        """places: (K, M, *S) on the grid of the image; mask (*S). Returns the mean of labels' (K, *S)."""
        self.usage = self.usage + torch.stack([a.flatten(2).mean(2) for a in places]).mean(0)
        labels = [a.sum(1) for a in places]
        mean = torch.stack(labels).mean(0)
        for name, a in {**{f"place {i}": a for i, a in enumerate(labels)}, "all": mean}.items():
            self.hits[name] = self.hits.get(name, 0.0) + self._hits(a, mask)
        return mean

    def _hits(self, a: Tensor, mask: Tensor) -> Tensor:
        inside = torch.stack([mask == k for k in range(self.num_labels)]).flatten(1)  # (K, N)
        a, present = a.flatten(1), inside.any(1)
        peak = inside.gather(1, a.argmax(1, keepdim=True))[:, 0]
        mean = (a * inside).sum(1) / inside.sum(1).clamp(min=1)
        return torch.stack([peak.double(), mean.double() * present, present.double()])

    def figures(self) -> dict[str, Any]:
        shares = self.usage / self.usage.sum(1, keepdim=True).clamp(min=1e-12)
        dead = (shares < DEAD / shares.shape[1]).nonzero().tolist()
        rows = {}
        for name, (peaks, means, cases) in self.hits.items():
            rows[name] = {"pointing": (peaks / cases).tolist(), "attention": (means / cases).tolist()}
        return {"usage": shares.tolist(), "dead": dead, **rows.pop("all"), "places": rows}


def on_image(model: LatentDiffusion, weights: Tensor) -> Tensor:
    """Maps (K, M, *s) of one place on the grid of the image, linearly: (K, M, *size)."""
    shape, factor = model.latent_shape[1:], model.autoencoder.downsampling
    multiple = model.denoiser.unet.config.downsampling  # to which the U-Net pads
    padded = [-(-n // d) * d * f for n, d, f in zip(shape, multiple, factor, strict=True)]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return crop_to(F.interpolate(weights.float(), padded, mode=mode), model.spec.size)


@torch.inference_mode()
def look_at_cases(
    config: RegisterReportConfig, model: LatentDiffusion, dataset: VolumeDataset, folder: Path
) -> tuple[Attention, dict[str, list[np.ndarray]]]:
    """Attention on the cases of `dataset`, of which the first are in the figure; folder: of the table."""
    kernel, known = model.kernel, model.denoiser.conditions
    num = min(len(dataset), config.max_cases or len(dataset))
    items = WithConditions(dataset, known, dataset.cases, folder)
    found, rows = Attention(model.denoiser.num_labels), {"image, true labels": []}
    for i in progress(range(num), "attention"):
        batch = to_device(collate([items[i, i]]), model.device)
        noise = keyed_normal(config.seed, torch.tensor([i]), model.latent_shape, "attention").to(model.device)
        with autocast(config.amp, model.device):
            batch |= encode_batch(model.autoencoder, batch, known, config.amp)
            z = model.normalise(batch["mean"])
            t = kernel.t_from_uniform(torch.full((1,), config.level), z.shape[2:])
            time = kernel.to_network_time(t).to(z.device)
            told = model.conditions_of(batch)
            places = model.denoiser.attention_maps(kernel.q_sample(z, t, noise), time, told)
        mask = batch["mask"][0].cpu()
        labels = found.add([on_image(model, a[0].cpu()) for a in places], mask)
        if i < config.shown:
            rows["image, true labels"] += overlay(batch["image"][0].cpu(), mask.clamp(min=0))
            for k, a in enumerate(labels):
                row = rows.setdefault(f"label {k}: attention beside the mask", [])
                row += [2 * a.numpy() - 1, 2 * (mask == k).float().numpy() - 1]
    return found, rows


def on_and_off(
    config: RegisterReportConfig, model: LatentDiffusion
) -> tuple[float, dict[str, list[np.ndarray]]]:
    """Samples with and without registers from the same noise, and how much they differ (range 2)."""
    made = {}
    for name, on in (("samples with registers", True), ("the same without", False)):
        model.use_registers(on)
        made[name] = model.sample(config.shown, config.steps, seed=config.seed, amp=config.amp)
    model.use_registers(True)
    on, off = made.values()
    difference = float((on - off).square().mean().sqrt())
    return difference, {name: [x[0].numpy() for x in batch] for name, batch in made.items()}


# --- the command --------------------------------------------------------------------------------------------


def registers(config: RegisterReportConfig, run: Path) -> Path:
    """Write the report; returns its folder."""
    device = setup(config.device)
    model = LatentDiffusion.load(run, device)
    model.use_registers(True)
    data = run_data(run, model)
    if not data.split[config.part]:
        raise InputError(f"part: the run has no {config.part} cases")
    folder = new_folder(run, config.out, "registers")
    bank = model.denoiser.unet.registers
    found, rows = look_at_cases(config, model, data.dataset(config.part), data.folder)
    difference, samples = on_and_off(config, model)
    figures = {**bank_figures(bank.bank.cpu()), **found.figures()}
    figures |= {"gates": [float(r.attention.gate) for r in bank.readers], "difference": difference}
    report = {**to_dict(config), "run": str(run), "registers": model.denoiser.anatomy.registers, **figures}
    write_report(folder / "registers.json", report)
    picture = save_sheet(folder / "registers.png", rows | samples, limits=(-1, 1))
    names = ("pointing", "attention", "similarity_within")
    lines = [[f"label {k}", *(figures[name][k] for name in names)] for k in range(bank.bank.shape[0])]
    print(table([["", *names], *lines]))
    print(f"{len(figures['dead'])} of {bank.bank[..., 0].numel()} registers are dead")
    print(f"samples with and without registers differ by {difference:.3g} (range 2)")
    print(folder if picture is None else f"{folder}, {picture}")
    return folder
