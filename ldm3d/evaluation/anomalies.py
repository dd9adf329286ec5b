"""Where is an image not healthy? Maps of anomalies from a model that has learned from healthy cases alone.

    python -m ldm3d.evaluation anomalies runs/ldm-phantom FOLDER                               maps alone
    python -m ldm3d.evaluation anomalies runs/ldm-phantom FOLDER --masks LABELS --label 4      and scores
    python -m ldm3d.evaluation anomalies RUN FOLDER --condition class=0 --healthy HEALTHY      a run of both

The latent of an image gets noise up to a level and is denoised. The noise hides what lies below it, and the
model puts there what healthy images have. High levels remove large lesions, and change healthy details too;
low levels keep both. So several levels are used (--levels), each with several draws of noise (--draws), whose
mean is the restored image. What differs is judged by how much the same differs in healthy cases (the run's
validation cases, or those of --healthy), since the model errs more at folds than in air:

    z = (difference - mean) / standard deviation,     mean over a window of 3 voxels, and over the levels

Mean and standard deviation are of the voxel's place and the voxels around it, over all healthy cases, so
images must lie like those of the training. Two differences of the image x and the restored y are mapped:

    model       x - y; the sign is kept until the means are taken, so that errors of both signs cancel.
                The map is |z|
    structure   1 - SSIM of windows of 3 voxels, mean over the image and its halves, as in MS-SSIM. Brightness
                hardly counts, and a fold that is elsewhere counts as much as a lesion

Beside them stand two simpler maps with the same z, also as |z|: `autoencoder`, of the image minus its
reconstruction, and `intensity`, of the image itself, which needs no network. A map is worth its network where
its scores are above those of `intensity`. With --masks, the scores of each map and image:

    auroc           of voxels: lesion against all others
    auroc_inside    lesion against the others that the masks label; air is easy. Masks of lesions alone: nan
    dice            at the threshold that gives the best mean Dice over all images, one for each map
    dice_own        at the best threshold of each image

The new folder holds maps/ (z, in the geometry of the images), restored/ (the image as the model would have
it, at the middle level, mean of draws), cases.csv, report.json and anomalies.png.

Wyatt et al. 2022 (AnoDDPM), CVPR workshops; Bercea et al. 2023 arXiv:2303.08452; Wang et al. 2003 (MS-SSIM).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditions import check_names, pairs
from ..config import InputError, at_least, to_dict
from ..data import Case, VolumeDataset, open_images, restore, write
from ..data.images import with_references
from ..data.volumes import file_name
from ..engine.distributed import choose_device, keyed_generator, print0
from ..engine.logger import progress, save_sheet
from ..engine.training import autocast
from ..guidance import Guidance, guided
from ..metrics import halve, ms_ssim_weights
from ..pipeline import LatentDiffusionPipeline
from .results import new_folder, table, with_interval, write_csv, write_report
from .statistics import auc, interval_words, summarise

WINDOW, SMOOTH = 3, 5  # voxels: of the difference; over which mean and variance of healthy cases are taken
THRESHOLDS = np.geomspace(0.05, 50, 300)  # of z
MAPS = ("model", "structure", "autoencoder", "intensity")


@dataclass(frozen=True)
class AnomaliesConfig:
    masks: str | None = None  # folder of masks of the same names: score the maps
    label: int | None = None  # of the anomaly in the masks; none = all that is not 0
    condition: tuple[str, ...] = field(default=(), metadata={"repeat": True})  # NAME=VALUE that means healthy
    healthy: str | None = None  # folder of healthy images that z is measured by; none = validation cases
    levels: tuple[float, ...] = (0.6, 0.8)  # of noise, as the strength of sample.py --edit
    draws: int = 2  # of noise at each level
    steps: int = 20  # of the whole sampling grid; a level takes its share of them
    seed: int = 0  # of the noise
    subset: int | None = None  # take only this many images, and as many healthy ones
    shown: int = 4  # images in anomalies.png
    out: str | None = None  # new folder for the results; none = anomalies-001 (-002, ...) in the run folder
    resamples: int = 2000  # of the bootstrap
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU

    def __post_init__(self) -> None:
        at_least(self, 1, "draws", "steps", "subset", "resamples")
        at_least(self, 0, "shown", "label")
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise InputError(f"levels: expected numbers above 0 and up to 1, got {self.levels}")
        if self.label is not None and self.masks is None:
            raise InputError("label: needs masks")


# --- maps ---------------------------------------------------------------------------------------------------


def neighbourhood(x: Tensor, window: int) -> Tensor:
    """Mean of x (B, C, *S) over the window around each voxel, as far as it lies in the image."""
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return pool(x, window, stride=1, padding=window // 2, count_include_pad=False)


def local_ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """SSIM of the window around each voxel, x and y (B, C, *S), whose black is 0: Wang et al. 2004, (13)."""
    mean_x, mean_y = neighbourhood(x, WINDOW), neighbourhood(y, WINDOW)
    var_x = neighbourhood(x * x, WINDOW) - mean_x**2
    var_y = neighbourhood(y * y, WINDOW) - mean_y**2
    cov = neighbourhood(x * y, WINDOW) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * cov + c2) / (var_x + var_y + c2)


def structure(x: Tensor, y: Tensor, black: float = -1.0, data_range: float = 2.0) -> Tensor:
    """How far the structure of x and y (B, C, *S) differs at each voxel: (B, 1, *S), 0 where they agree. See
    the module."""
    size, total, scales = x.shape[2:], 0.0, len(ms_ssim_weights(x.shape[2:]))
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    x, y = x - black, y - black
    for scale in range(scales):
        if scale:
            x, y = halve(x), halve(y)
        apart = (1 - local_ssim(x, y, data_range)).mean(1, keepdim=True)
        total = total + F.interpolate(apart, size, mode=mode)
    return total / scales


class Healthy:
    """Mean and standard deviation of the differences of healthy images, voxel by voxel; both are of the
    window of SMOOTH voxels around each. `add` all of them, then ask for z."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, 0.0, 0.0  # sums of the differences and of their squares

    def add(self, found: Tensor) -> None:
        """Add the difference (1, 1, *S) of one image."""
        found = found.double()
        self.count, self.first, self.second = self.count + 1, self.first + found, self.second + found.square()

    @cached_property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean, square = (neighbourhood(v / self.count, SMOOTH) for v in (self.first, self.second))
        std = (square - mean**2).clamp(min=0).sqrt()
        return mean, std.clamp(min=max(1e-6, 0.1 * float(std.mean())))  # where nothing ever differs

    def z(self, found: Tensor) -> Tensor:
        """Standard deviations (1, 1, *S) above the mean of healthy images, mean of the window at each."""
        mean, std = self.mean_and_std
        return neighbourhood((found - mean) / std, WINDOW).float()


@torch.inference_mode()
def restored(pipeline: LatentDiffusionPipeline, x: Tensor, level: float, config: AnomaliesConfig) -> Tensor:
    """The image x (C, *size) as the model would have it, (draws, C, *size): noise up to a level, removed."""
    model, kernel = pipeline.model, pipeline.model.kernel
    sampler, num = kernel.default_sampler, config.draws
    cond = model.prepare(pairs(config.condition), num)
    with autocast(config.amp, model.device):
        z = model.encode(x[None].to(model.device)).float()
        net = model.denoiser_for(z.shape[2:])
        seen = z.shape[2:] if net is model.denoiser else model.window
        times = kernel.sampling_times(sampler, config.steps, seen, level)
        draws = [keyed_generator(config.seed, i, "anomalies") for i in range(num)]
        noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in draws]).to(z)
        t = torch.full((num,), times[0], dtype=torch.float32 if kernel.process == "flow" else torch.int64)
        z_t = kernel.q_sample(z.expand_as(noise), t.to(z.device), noise)
        cond = {name: value.to(z.device) for name, value in cond.items()}
        predict = guided(net, cond, z_t, Guidance(), kernel.num_timesteps)
        made = kernel.sample(predict, z_t, times, sampler)
        return torch.cat([model.decode(one).float().cpu() for one in made.split(1)])


@torch.inference_mode()
def reconstructed(pipeline: LatentDiffusionPipeline, x: Tensor, amp: str) -> Tensor:
    """The image x (C, *size) through the autoencoder alone, (1, C, *size)."""
    model = pipeline.model
    with autocast(amp, model.device):
        return model.decode(model.encode(x[None].to(model.device)).float()).float().cpu()


def differences_of(
    pipeline: LatentDiffusionPipeline, x: Tensor, config: AnomaliesConfig
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """({name of a map: its differences (1, 1, *size), one for each level}, the restored image (C, *size) at
    the middle level)."""
    black, white = pipeline.spec.display
    images = {level: restored(pipeline, x, level, config).mean(0) for level in config.levels}
    middle = sorted(config.levels)[len(config.levels) // 2]

    def signed(y: Tensor) -> Tensor:
        return (x - y).mean(0)[None, None]

    found = {
        "model": [signed(y) for y in images.values()],
        "structure": [structure(x[None], y[None], black, white - black) for y in images.values()],
        "autoencoder": [signed(reconstructed(pipeline, x, config.amp)[0])],
        "intensity": [signed(torch.zeros_like(x))],
    }
    return found, images[middle]


def z_maps(found: dict[str, list[Tensor]], healthy: dict[str, list[Healthy]]) -> dict[str, Tensor]:
    """The maps (*size) of one image, by name: the mean of z over the levels."""
    z = {
        name: torch.stack([rule.z(v)[0, 0] for rule, v in zip(healthy[name], values, strict=True)]).mean(0)
        for name, values in found.items()
    }
    return {name: value if name == "structure" else value.abs() for name, value in z.items()}


# --- scores -------------------------------------------------------------------------------------------------


def area(values: np.ndarray, truth: np.ndarray) -> float:
    """The area under the ROC curve of voxels `values` (n,) whose truth (n,) is bool; nan if all are alike."""
    return auc(values[~truth], values[truth]) if 0 < truth.sum() < len(truth) else math.nan


def dice_curve(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice of values >= threshold and truth, for all THRESHOLDS."""
    high, inside = np.sort(values.ravel()), np.sort(values[truth])
    found, hits = (len(v) - np.searchsorted(v, THRESHOLDS) for v in (high, inside))
    return 2 * hits / np.maximum(found + len(inside), 1)


def scores_of(maps: dict[str, Tensor], truth: np.ndarray, labels: Tensor) -> dict[str, float]:
    """AUROC of the maps (*size) of one image, whose anomaly is truth (*size) bool, and whose mask labels."""
    inside, row = (labels > 0).numpy(), {"voxels": float(truth.sum())}
    for name, z in maps.items():
        row[f"auroc_{name}"] = area(z.numpy().ravel(), truth.ravel())
        row[f"auroc_inside_{name}"] = area(z.numpy()[inside], truth[inside])
    return row


def dice_scores(curves: Sequence[dict[str, np.ndarray]]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """(Dice of each map, for each image; the threshold of each map) of the curves of each image by map. An
    image without any anomaly has no curves: its Dice is nan, and takes no part."""
    rows, chosen = [{} for _ in curves], {}
    for name in MAPS if any(curves) else ():
        best = int(np.mean([curve[name] for curve in curves if curve], axis=0).argmax())
        chosen[name] = float(THRESHOLDS[best])
        for row, curve in zip(rows, curves, strict=True):
            row[f"dice_{name}"] = float(curve[name][best]) if curve else math.nan
            row[f"dice_own_{name}"] = float(curve[name].max()) if curve else math.nan
    return rows, chosen


# --- all of it ----------------------------------------------------------------------------------------------


def masks_of(
    dataset: VolumeDataset, config: AnomaliesConfig, pipeline: LatentDiffusionPipeline
) -> list[Tensor]:
    """The mask (*size) of each image, of any labels; [] without --masks. InputError if one does not fit."""
    if config.masks is None:
        return []
    try:
        cases: list[Case] = with_references(dataset.cases, Path(config.masks), pipeline.layout)
    except InputError as e:
        raise InputError(str(e).replace("reference:", "masks:").replace("label map", "mask")) from None
    masks = pipeline.open([case.mask for case in cases], "region")
    for case, mask in zip(cases, masks.cases, strict=True):
        ours, theirs = dataset.infos[case.id].shape, masks.infos[mask.id].shape
        if ours != theirs:
            raise InputError(f"masks: {mask.image} has shape {theirs}, the image {case.image} {ours}")
    return [masks[i, i]["mask"] for i in range(len(cases))]


def healthy_of(
    dataset: VolumeDataset, pipeline: LatentDiffusionPipeline, config: AnomaliesConfig
) -> dict[str, list[Healthy]]:
    """What the differences of each map and level are in healthy images."""
    if len(dataset) < 2:
        raise InputError(f"healthy: expected 2 or more images, got {len(dataset)}")
    healthy: dict[str, list[Healthy]] = {}
    for i in progress(range(len(dataset)), "healthy images"):
        for name, values in differences_of(pipeline, dataset[i, i]["image"], config)[0].items():
            for rule, value in zip(
                healthy.setdefault(name, [Healthy() for _ in values]), values, strict=True
            ):
                rule.add(value)
    return healthy


def find_anomalies(config: AnomaliesConfig, run: str, images: str) -> Path:
    """Write the maps of all images, and the report; returns its folder."""
    pipeline = LatentDiffusionPipeline(run, choose_device(config.device))
    check_names(pairs(config.condition), pipeline.model.denoiser.conditions)
    how = {"own_size": False, "max_cases": config.subset}
    dataset = open_images(pipeline.content, images, **how)
    others = open_images(pipeline.content, config.healthy, "all" if config.healthy else "val", **how)
    masks, folder = masks_of(dataset, config, pipeline), new_folder(Path(run), config.out, "anomalies")
    healthy = healthy_of(others, pipeline, config)
    curves, rows, pictures = [], {}, {}
    for i in progress(range(len(dataset)), "images"):
        x, name = dataset[i, i]["image"], dataset.cases[i].id
        found, image = differences_of(pipeline, x, config)
        maps = z_maps(found, healthy)
        write_maps(folder, dataset, i, maps["model"], image)
        rows[name] = {"highest": float(maps["model"].max())}
        if masks:
            labels = masks[i]
            truth = (labels > 0 if config.label is None else labels == config.label).numpy()
            rows[name] |= scores_of(maps, truth, labels)
            curves.append({k: dice_curve(z.numpy(), truth) for k, z in maps.items()} if truth.any() else {})
        if len(pictures) < config.shown:
            words = f"{name}: image, restored, z" + (", mask" if masks else "")
            pictures[words] = shown(x, image, maps["model"], masks[i : i + 1])
    more, thresholds = dice_scores(curves)
    for row, scores in zip(rows.values(), more, strict=False):
        row |= scores
    report = {
        **to_dict(config),
        "run": str(run),
        "images": images,
        "healthy_images": len(others),
        "thresholds": thresholds,
        "interval": interval_words(config.resamples),
        "metrics": summarise(rows, config.resamples),
    }
    write_csv(folder / "cases.csv", rows)
    write_report(folder / "report.json", report)
    if pictures:
        save_sheet(folder / "anomalies.png", pictures)
    print_scores(report)
    print0(f"{len(rows)} images: {folder}")
    return folder


def write_maps(folder: Path, dataset: VolumeDataset, index: int, z: Tensor, image: Tensor) -> None:
    """maps/ and restored/ of one image, in its geometry."""
    case, spec = dataset.cases[index], dataset.spec
    name = file_name(case.id) + {2: ".tif", 3: ".nii.gz"}[spec.dims]
    info = dataclasses.replace(dataset.infos[case.id], low=(-1.0,), high=(1.0,))  # z as it is
    write(folder / "maps" / name, restore(z[None], dataclasses.replace(spec, scaling="none"), info))
    write(folder / "restored" / name, dataset.restore(index, image))


def shown(x: Tensor, image: Tensor, z: Tensor, masks: Sequence[Tensor]) -> list[np.ndarray]:
    """Image, restored image, map and mask, in grey; in 3-D slices through the highest z."""
    place = np.unravel_index(int(z.argmax()), z.shape)
    labels = [m.float() / max(1, int(m.max())) * 2 - 1 for m in masks]
    grey = [x[0], image[0], z.clamp(0, 6) / 3 - 1, *labels]
    if x.ndim == 3:
        return [v.float().numpy() for v in grey]
    return [np.rot90(v.float().select(axis, int(place[axis])).numpy()) for v in grey for axis in (0, 2)]


def print_scores(report: dict[str, Any]) -> None:
    """The scores of each map; without masks nothing."""
    kinds = ("auroc", "auroc_inside", "dice", "dice_own")
    lines: list[tuple] = [("map", *kinds)]
    for name in MAPS:
        row = [report["metrics"].get(f"{kind}_{name}") for kind in kinds]
        if all(row):
            lines.append((name, *(with_interval(m["mean"], m["low"], m["high"]) for m in row)))
    if len(lines) > 1:
        print(table(lines))
