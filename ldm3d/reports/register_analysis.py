"""What have the registers of a run learned? Do they stand for their labels? Is any unused?

    python -m ldm3d.reports registers runs/ldm-phantom-anatomy
    python -m ldm3d.reports registers RUN --part test --level 0.3

Registers are learned tokens, M for each of K labels, which the U-Net reads after every attention layer
(registers.py). Real cases of the run are encoded, noised to one level, and shown to the denoiser. Of each
layer we keep A (K, M, *S): the attention that each register gets from a voxel, averaged over heads. The
attention to label c is sum_m A_cm. Figures are averaged over the layers; "layers" has those of each:

    pointing      share of the cases with label c in which the attention to c is highest inside the mask of c
    attention     mean of the attention to c over the voxels of its mask; by chance 1 / K
    usage         share of the attention to c that each of its M registers gets
    dead          registers [c, m] whose usage is below DEAD / M
    norms         |r| of each register r
    similarity    mean cosine of two registers of the same label, and of two of different labels
    gates         each layer's factor of what it reads from the registers, 0 at the start of training
    difference    root mean square between samples with and without registers, from the same noise

With M = 2 and usage [0.5, 0.5] both registers of a label are used alike. With [0.97, 0.03] the second is
dead, since 0.03 < 0.1 / 2.

The folder of results holds registers.json and, with matplotlib, registers.png: images with their true labels
in colours, the attention to each label beside its mask, and samples with and without registers.
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
from ..latent_diffusion import LatentDiffusion
from ..latents import WithConditions, encode_batch
from ..pipeline import LatentDiffusionPipeline

DEAD = 0.1  # a register with less than this part of an even share of the attention is not used


@dataclass(frozen=True)
class RegisterReportConfig:
    part: Literal["train", "val", "test"] = "val"  # of the run's cases
    max_cases: int | None = 32  # number of these cases, the first ones; none = all
    level: float = 0.2  # noise level u at which attention is measured: 0 = clean, 1 = noise only
    shown: int = 3  # number of cases and of samples in the figure
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
    """Of a bank of registers (K, M, E): norms (K, M); mean cosine of two registers of one label, (K,); mean
    cosine of two registers of different labels."""
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


class AttentionFigures:
    """Sums over cases, from which the figures of attention follow: for each layer, and for all layers."""

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        # (K, M): attention summed over cases, averaged over voxels and layers
        self.usage: Tensor | float = 0.0
        # layer -> (3, K): peaks inside the mask; attention inside; cases
        self.sums: dict[str, Tensor] = {}

    def add(self, layers: list[Tensor], mask: Tensor) -> Tensor:
        """Add a case. layers: attention (K, M, *S) of each layer, on the grid of the image; mask (*S).

        Returns the attention to each label (K, *S), averaged over the layers.
        """
        self.usage = self.usage + torch.stack([a.flatten(2).mean(2) for a in layers]).mean(0)
        to_labels = [a.sum(1) for a in layers]
        mean = torch.stack(to_labels).mean(0)
        for name, a in {**{f"layer {i}": a for i, a in enumerate(to_labels)}, "all": mean}.items():
            self.sums[name] = self.sums.get(name, 0.0) + self._sums_of(a, mask)
        return mean

    def _sums_of(self, a: Tensor, mask: Tensor) -> Tensor:
        inside = torch.stack([mask == k for k in range(self.num_labels)]).flatten(1)  # (K, N)
        a, present = a.flatten(1), inside.any(1)
        peak = inside.gather(1, a.argmax(1, keepdim=True))[:, 0]
        mean = (a * inside).sum(1) / inside.sum(1).clamp(min=1)
        return torch.stack([peak.double(), mean.double() * present, present.double()])

    def figures(self) -> dict[str, Any]:
        shares = self.usage / self.usage.sum(1, keepdim=True).clamp(min=1e-12)
        dead = (shares < DEAD / shares.shape[1]).nonzero().tolist()
        rows = {}
        for name, (peaks, attention, cases) in self.sums.items():
            rows[name] = {"pointing": (peaks / cases).tolist(), "attention": (attention / cases).tolist()}
        return {"usage": shares.tolist(), "dead": dead, **rows.pop("all"), "layers": rows}


def on_image(model: LatentDiffusion, weights: Tensor) -> Tensor:
    """The attention (K, M, *s) of one layer, interpolated to the grid of the image: (K, M, *size)."""
    shape, factor = model.latent_shape[1:], model.autoencoder.downsampling
    multiple = model.denoiser.unet.config.downsampling  # the U-Net pads each axis to a multiple of this
    padded = [-(-n // d) * d * f for n, d, f in zip(shape, multiple, factor, strict=True)]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return crop_to(F.interpolate(weights.float(), padded, mode=mode), model.spec.size)


@torch.inference_mode()
def attention_on_cases(
    config: RegisterReportConfig, model: LatentDiffusion, dataset: VolumeDataset, folder: Path
) -> tuple[AttentionFigures, dict[str, list[np.ndarray]]]:
    """Measure attention on the cases of `dataset`: (figures, rows of pictures of the first cases).

    folder: the folder of the table of cases, from which paths in the table start.
    """
    kernel, conditions = model.kernel, model.denoiser.conditions
    num, (black, white) = min(len(dataset), config.max_cases or len(dataset)), model.spec.display
    items = WithConditions(dataset, conditions, dataset.cases, folder)
    found, rows = AttentionFigures(model.denoiser.num_labels), {"image, true labels": []}
    for i in progress(range(num), "attention"):
        batch = to_device(collate([items[i, i]]), model.device)
        noise = keyed_normal(config.seed, torch.tensor([i]), model.latent_shape, "attention").to(model.device)
        with autocast(config.amp, model.device):
            batch |= encode_batch(model.autoencoder, batch, conditions, config.amp)
            z = model.normalise(batch["mean"])
            t = kernel.t_from_uniform(torch.full((1,), config.level), z.shape[2:])
            time = kernel.to_network_time(t).to(z.device)
            cond = model.conditions_of(batch)
            layers = model.denoiser.attention_maps(kernel.q_sample(z, t, noise), time, cond)
        mask = batch["mask"][0].cpu()
        to_labels = found.add([on_image(model, a[0].cpu()) for a in layers], mask)
        if i < config.shown:
            rows["image, true labels"] += overlay(batch["image"][0].cpu(), mask.clamp(min=0), (black, white))
            for k, a in enumerate(to_labels):
                row = rows.setdefault(f"label {k}: attention beside the mask", [])
                row += [black + (white - black) * share.numpy() for share in (a, (mask == k).float())]
    return found, rows


def with_and_without(
    config: RegisterReportConfig, model: LatentDiffusion
) -> tuple[float, dict[str, list[np.ndarray]]]:
    """Sample with and without registers from the same noise: (root mean square difference, samples).

    Intensities span a range of 2.
    """
    batches = {}
    for name, on in (("samples with registers", True), ("the same without", False)):
        model.use_registers(on)
        batches[name] = model.sample(config.shown, steps=config.steps, seed=config.seed, amp=config.amp)
    model.use_registers(True)
    on, off = batches.values()
    difference = float((on - off).square().mean().sqrt())
    return difference, {name: [x[0].numpy() for x in batch] for name, batch in batches.items()}


# --- the command --------------------------------------------------------------------------------------------


def analyse_registers(config: RegisterReportConfig, run: Path) -> Path:
    """Write registers.json and registers.png; returns their folder."""
    device = setup(config.device)
    pipeline = LatentDiffusionPipeline(run, device)
    model, data = pipeline.model, pipeline.data()
    model.use_registers(True)
    if not data.split[config.part]:
        raise InputError(f"part: the run has no {config.part} cases")
    folder = new_folder(run, config.out, "registers")
    bank = model.denoiser.unet.registers
    found, rows = attention_on_cases(config, model, data.dataset(config.part), data.folder)
    difference, samples = with_and_without(config, model)
    figures = {**bank_figures(bank.bank.cpu()), **found.figures()}
    figures |= {"gates": [float(r.attention.gate) for r in bank.readers], "difference": difference}
    report = {**to_dict(config), "run": str(run), "registers": model.denoiser.anatomy.registers, **figures}
    write_report(folder / "registers.json", report)
    picture = save_sheet(folder / "registers.png", rows | samples, model.spec.display)
    names = ("pointing", "attention", "similarity_within")
    lines = [[f"label {k}", *(figures[name][k] for name in names)] for k in range(bank.bank.shape[0])]
    print(table([["", *names], *lines]))
    print(f"{len(figures['dead'])} of {bank.bank[..., 0].numel()} registers are dead")
    print(f"samples with and without registers differ by {difference:.3g} (range 2)")
    print(folder if picture is None else f"{folder}, {picture}")
    return folder
