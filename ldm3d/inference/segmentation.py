"""Segment images with a run of train_cdal.py, and score the label maps.

a folder          python sample.py runs/cdal-hippocampus FOLDER --votes 5
one image         python sample.py runs/cdal-hippocampus IMAGE --probabilities
with scores       python sample.py runs/cdal-hippocampus FOLDER --reference LABELS --part test

The new folder holds labels/ and uncertainty/ (and probability/), whose files have the names and the geometry
of the images; cases.csv, a row for each case with its seconds and, with --reference, its scores; report.json,
the settings and the means with bootstrap confidence intervals; and overlays.png, lowest Dice first.

Scores are computed for each label but the background, on the grid of the files: Dice, IoU, precision,
sensitivity, and HD95 in mm (metrics.py). A label that is in neither map has no score. A label that is in one
map only has the diagonal of the volume as HD95, so that a missed label makes the mean worse, not better. A
mean is over the cases that have the score, and `cases` counts them.

Does a high uncertainty mark the errors? Far from every object nothing is uncertain and nothing is wrong, so
more background would make any uncertainty look good. Only the N voxels within 5 voxels of a label of either
map count, with uncertainty u and error e (0 or 1):

    error correlation    Pearson's correlation of u and e
    retention area       mean over n = 1 .. N of (errors among the n most certain voxels) / N. The picture: an
                         expert corrects the most uncertain voxels, and the n others are retained as they are.
                         Malinin et al. 2021, arXiv 2107.07455
    retention ratio      retention area / (mean of e / 2). A u that says nothing about e has ratio 1, and a
                         perfect u has the mean of e, e.g. 0.03 if 3 % of the voxels are wrong
    retention border     the ratio of a u that is 1 at the borders of the labels and 0 elsewhere: an
                         uncertainty is worth its cost if its own ratio is clearly lower

Are the probabilities p of the labels right, so that of all voxels with 0.8 every fifth is wrong? Over the
same voxels; 0 is perfect for all three:

    ECE                  mean of |confidence - share that is right| over 15 bins of confidence, the largest p
                         of a voxel (Guo et al. 2017, arXiv 1706.04599, eq. 3); reliability.png shows the bins
    Brier                mean over voxels of sum over labels of (p - 1 for the true label, 0 for others)^2
    NLL                  mean of -log p of the true label; p counts as 1e-6 at least
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cdal import uncertainty
from ..config import InputError, at_least, to_dict
from ..data import CaseInfo, DataConfig, Volume, VolumeDataset, open_images, write
from ..data.geometry import crop_or_pad, resample
from ..data.loading import load_role
from ..data.volumes import NIFTI, TIFF, Header, file_name, read_header, volume_suffix
from ..engine.distributed import gather, is_main, print0, rank, setup, world_size
from ..engine.logger import mid_slices, new_figure, progress, save_figure, save_sheet
from ..evaluation.results import WorstPictures, new_folder, table, write_csv, write_report
from ..evaluation.statistics import interval_words, summarise
from ..metrics import dice, hd95, iou, precision, sensitivity
from ..pipeline import SegmentationPipeline
from ..windows import check_window

COLOURS = ((230, 60, 60), (60, 200, 90), (80, 120, 255), (240, 200, 40), (200, 80, 220), (60, 210, 220))
SHOWN, RESAMPLES = 8, 2000  # cases in the picture; of the bootstrap
BAND, CONFIDENCES = 5, 15  # voxels around labels whose uncertainty is judged; bins of the reliability curve


@dataclass(frozen=True)
class SegmentConfig:
    reference: str | None = None  # folder of label maps of the same names, to score against
    part: Literal["all", "train", "val", "test"] = "all"  # only these cases of the run's split
    votes: int = 5  # segmentations of a case, whose mean is taken
    window: tuple[int, ...] | None = None  # voxels that are segmented at once; none = as in validation
    overlap: float = 0.5  # part of a window that it shares with the next, at least
    probabilities: bool = False  # write the probability of every label too
    seed: int = 0  # of the votes
    batch_size: int = 8  # votes at once
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    out: str | None = None  # new folder for the results; none = segmentations-001 ... in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = that of the image

    def __post_init__(self) -> None:
        at_least(self, 1, "votes", "batch_size")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap: expected 0 <= overlap < 1, got {self.overlap}")


# --- cases --------------------------------------------------------------------------------------------------


def on_file_grid(values: Tensor, info: CaseInfo, header: Header) -> Volume:
    """Values (K, *S) on the grid that training sees -> a volume on the grid of the file, in RAS."""
    volume = Volume(values.numpy(), np.array(info.affine), header.orientation)
    if info.shape == header.shape and np.allclose(info.spacing, header.spacing, rtol=1e-4):
        return dataclasses.replace(volume, affine=header.affine)
    volume = resample(volume, header.spacing)  # the far end may be a voxel off
    volume = crop_or_pad(volume, (0,) * volume.dims, header.shape)
    return dataclasses.replace(volume, affine=header.affine)


def file_labels(label_map: np.ndarray, layout: DataConfig, num_labels: int) -> np.ndarray:
    """Labels 0, 1, 2 ... -> the values that files have for them (data.label_values), in the smallest type."""
    values = np.array(layout.label_values or range(num_labels))
    return values[label_map].astype(np.uint8 if values.max() < 256 else np.uint16)


# --- scores -------------------------------------------------------------------------------------------------


def score(label_map: Tensor, truth: Tensor, num_labels: int, spacing: tuple[float, ...]) -> dict[str, float]:
    """Scores of one label map (*S): the mean Dice over labels, then every score of every label."""
    pair = label_map[None], truth[None]
    diagonal = math.hypot(*(n * s for n, s in zip(truth.shape, spacing, strict=True)))
    distance = hd95(*pair, num_labels, spacing)[0]
    scores = {
        "dice": dice(*pair, num_labels)[0],
        "iou": iou(*pair, num_labels)[0],
        "hd95": distance.masked_fill(distance.isinf(), diagonal),
        "precision": precision(*pair, num_labels)[0],
        "sensitivity": sensitivity(*pair, num_labels)[0],
    }
    row = {"dice": float(scores["dice"].nanmean())}
    return row | {f"{name}_{k}": float(v) for name, vs in scores.items() for k, v in enumerate(vs, start=1)}


def calibration(doubt: Tensor, wrong: Tensor) -> dict[str, float]:
    """Does the uncertainty `doubt` (*S) rise with the error `wrong` (*S) bool? nan: nothing is wrong.

    Voxels of equal uncertainty are taken in any order, on average.
    """
    u, e = doubt.flatten().double(), wrong.flatten().double()
    u0, e0 = u - u.mean(), e - e.mean()
    correlation = (u0 * e0).mean() / (u0.square().mean() * e0.square().mean()).sqrt()
    _, group, size = u.unique(return_inverse=True, return_counts=True)  # rising uncertainty
    rate = torch.zeros(len(size), dtype=e.dtype).index_add_(0, group, e) / size
    area = rate.repeat_interleave(size).cumsum(0).mean() / len(e)
    return {
        "error_correlation": float(correlation),
        "retention_area": float(area),
        "retention_ratio": float(area / (e.mean() / 2)),
    }


def near_labels(labels: Tensor, truth: Tensor, reach: int = BAND) -> Tensor:
    """The voxels (*S) bool within `reach` voxels, along each axis, of a label of either map (*S)."""
    near = ((labels > 0) | (truth > 0)).float()
    for axis in range(near.ndim):
        line = near.movedim(axis, -1)
        flat = F.max_pool1d(line.reshape(-1, 1, line.shape[-1]), 2 * reach + 1, 1, reach)
        near = flat.view(line.shape).movedim(-1, axis)
    return near > 0


def borders(labels: Tensor) -> Tensor:
    """The voxels (*S) bool with a neighbour of another label, across a face."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    for axis, n in enumerate(labels.shape):
        steps = labels.diff(dim=axis) != 0
        found.narrow(axis, 0, n - 1).logical_or_(steps)
        found.narrow(axis, 1, n - 1).logical_or_(steps)
    return found


def reliability(p: Tensor, truth: Tensor) -> tuple[dict[str, float], Tensor]:
    """(ECE, Brier and NLL; (3, CONFIDENCES): voxels, sum of confidences and number right in each bin) of the
    probabilities p (K, N) of voxels whose labels are truth (N,)."""
    p, own = p.double(), p.double().gather(0, truth[None])[0]
    confidence, chosen = p.max(0)
    which = (confidence * CONFIDENCES).long().clamp(max=CONFIDENCES - 1)
    parts = torch.ones_like(confidence), confidence, (chosen == truth).double()
    bins = torch.stack([which.bincount(part, CONFIDENCES) for part in parts])
    n = max(1, len(truth))
    scores = {
        "ece": float((bins[1] - bins[2]).abs().sum() / n),
        "brier": float((p.square().sum(0) - 2 * own + 1).mean()),
        "nll": float(-own.clamp(min=1e-6).log().mean()),
    }
    return scores, bins


def certainty(p: Tensor, doubt: Tensor, truth: Tensor) -> tuple[dict[str, float], Tensor]:
    """(every score of uncertainty and probabilities; bins as in `reliability`) of p (K, *S), its uncertainty
    and the true labels, both (*S)."""
    labels = p.argmax(0)
    band, wrong = near_labels(labels, truth), labels != truth
    scores = calibration(doubt[band], wrong[band])
    scores["retention_border"] = calibration(borders(labels)[band], wrong[band])["retention_ratio"]
    more, bins = reliability(p[:, band], truth[band])
    return scores | more, bins


# --- pictures -----------------------------------------------------------------------------------------------


def overlay(
    image: Tensor, mask: Tensor | None, display: tuple[float, float] = (-1.0, 1.0)
) -> list[np.ndarray]:
    """Image (C, *S) and mask (*S) -> middle slices, uint8 (h, w, 3), labels in colours. display: the
    intensities that are black and white."""
    black, white = display
    grey = ((image.float().clamp(black, white) - black) * (255 / (white - black))).numpy()
    slices = [mid_slices(grey[c]) for c in ((0, 1, 2) if len(grey) == 3 else (0, 0, 0))]
    pictures = [np.stack(channels, axis=-1) for channels in zip(*slices, strict=True)]
    if mask is not None:
        for picture, part in zip(pictures, mid_slices(mask.float().numpy()), strict=True):
            for k in range(1, int(part.max()) + 1):
                inside = part == k
                picture[inside] = 0.5 * picture[inside] + 0.5 * np.array(COLOURS[(k - 1) % len(COLOURS)])
    return [picture.astype(np.uint8) for picture in pictures]


# --- all of it ----------------------------------------------------------------------------------------------


def segment_files(config: SegmentConfig, run: Path, images: Path) -> Path:
    """Segment one image or all images of a folder; returns the new folder."""
    pipeline = SegmentationPipeline(run, setup(config.device))
    check_window(config.window, pipeline.layout.dims)
    dataset = open_images(pipeline.content, images, config.part, config.reference)
    folder = new_folder(run, config.out, "segmentations")
    rows, worst, bins = {}, WorstPictures(SHOWN), torch.zeros(3, CONFIDENCES, dtype=torch.float64)
    print0(f"{len(dataset)} cases, T = {pipeline.method.num_timesteps}, {config.votes} votes")
    settings = (config.votes, config.window, config.overlap, config.seed)
    for i in progress(range(rank(), len(dataset), world_size()), "segmenting"):
        case, item = dataset.cases[i], dataset[i, i]
        x, start = item["image"], time.perf_counter()
        p = pipeline.segment(x, *settings, case.id, config.batch_size, config.amp)
        seconds = time.perf_counter() - start
        check_finite(p, case.id)
        scores, counted = write_case(p, dataset, i, config, folder)
        rows[case.id], bins = {"seconds": seconds, **scores}, bins + counted
        display = dataset.spec.display
        pictures = [
            *overlay(x, None, display),
            *(overlay(x, item["mask"], display) if config.reference else ()),
            *overlay(x, p.argmax(0), display),
            *overlay(2 * uncertainty(p)[None] - 1, None),
        ]
        worst.add(case.id, rows[case.id].get("dice", 0.0), pictures)
    rows = dict(sorted((k, v) for part in gather(rows) for k, v in part.items()))
    worst.gather()
    bins = sum(gather(bins))
    if is_main():
        facts = {"run": str(run), "images": str(images), "step": pipeline.content["step"]}
        if config.reference:
            facts["reliability"] = draw_reliability(folder / "reliability.png", bins)
        report(config, facts, folder, rows, worst, {case.id: case.subject for case in dataset.cases})
    return folder


def write_case(
    p: Tensor, dataset: VolumeDataset, index: int, config: SegmentConfig, folder: Path
) -> tuple[dict[str, float], Tensor | int]:
    """Write label map, uncertainty and probabilities of a case on its file's grid, from p (K, *S) on the
    grid that training sees; returns the case's scores and the bins of `reliability`, ({}, 0) without a
    reference."""
    case, layout = dataset.cases[index], dataset.config
    header = read_header(case.image, layout.channel or None, layout.file_spacing, layout.dims)
    volume = on_file_grid(p, dataset.infos[case.id], header)
    p = torch.from_numpy(volume.array)
    label_map, doubt = p.argmax(0), uncertainty(p)
    array = file_labels(label_map.numpy()[None], layout, len(p))
    name = file_name(case.id) + suffix_of(config.format, layout.dims, case.image)
    write(folder / "labels" / name, dataclasses.replace(volume, array=array))
    array = doubt.numpy()[None]
    write(folder / "uncertainty" / name, dataclasses.replace(volume, array=array))
    if config.probabilities:
        write(folder / "probability" / name, volume)
    if case.mask is None:
        return {}, 0
    truth = load_role(case.mask, "mask", dataclasses.replace(layout, spacing=None, resize=False)).array[0]
    truth = torch.from_numpy(truth.astype(np.int64))
    scores, bins = certainty(p, doubt, truth)
    return score(label_map, truth, len(p), header.spacing) | scores, bins


def check_finite(x: Tensor, name: str) -> None:
    """InputError if a result has voxels that are NaN or infinite, which no file should hold."""
    if not x.isfinite().all():
        raise InputError(f"{name}: is not finite; --amp fp32 tells whether half precision is too coarse")


def suffix_of(format: str, dims: int, image: Path | None = None) -> str:
    """The suffix of a file to write, such as ".nii.gz". format "auto": as `image` has it, if it can be
    written, else by dims."""
    if format != "auto":
        return f".{format}"
    own = volume_suffix(image) if image else ""
    return own if own in NIFTI + TIFF else {2: ".tif", 3: ".nii.gz"}[dims]


def draw_reliability(path: Path, bins: Tensor) -> dict[str, list[float]]:
    """Draw confidence against the share that is right (with matplotlib); returns both, and the voxels, of the
    bins that have any."""
    voxels, confidence, right = bins[:, bins[0] > 0]
    curve = {"voxels": voxels, "confidence": confidence / voxels, "right": right / voxels}
    curve = {name: values.tolist() for name, values in curve.items()}
    if (figure := new_figure(figsize=(4, 4), dpi=100, layout="constrained")) is not None:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], "0.7")
        ax.plot(curve["confidence"], curve["right"], "o-")
        ax.set(title="reliability near labels", xlabel="confidence", ylabel="share that is right")
        save_figure(figure, path)
    return curve


def report(
    config: SegmentConfig,
    facts: dict[str, Any],
    folder: Path,
    rows: dict[str, dict[str, float]],
    worst: WorstPictures,
    subjects: dict[str, str],
) -> None:
    """cases.csv, report.json, overlays.png, and the means on the console. facts: run, images, step;
    subjects: of the cases."""
    write_csv(folder / "cases.csv", rows)
    metrics = summarise(rows, RESAMPLES, subjects)
    how = {
        **to_dict(config),
        **facts,
        "weights": "EMA",
        "cases": len(rows),
        "interval": interval_words(RESAMPLES),
        "metrics": metrics,
    }
    write_report(folder / "report.json", how)
    sheet = worst.sheet(lambda name, dice: f"{name}: Dice {dice:.3f}" if config.reference else name)
    picture = save_sheet(folder / "overlays.png", sheet)
    columns = ("mean", "low", "high", "cases")
    print(table([["", *columns], *([name, *(m[c] for c in columns)] for name, m in metrics.items())]))
    print(f"{len(rows)} cases: {folder}" + (f", {picture}" if picture else ""))
