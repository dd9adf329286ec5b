"""Segment files with a run of train_cdal.py, and score label maps. Backs `sample.py RUN --segment FOLDER`.

The folder that is made holds labels/ and uncertainty/ (and probability/) with the names of the images, in
their own geometry; cases.csv (a row a case: seconds and, where references are given, scores), report.json
(means with bootstrap confidence intervals, and how all was made) and overlays.png (lowest Dice first).

Scores are by label, without background, on the grid of the files: Dice, IoU, precision, sensitivity, HD95 in
mm (metrics.py). A label that neither map has gives none, one that only one map has no HD95: means are over
the `cases` that have a score. Calibration, over N voxels with uncertainty u and error e (0 or 1):

    error correlation    Pearson's, of u and e
    retention area       mean over n = 1 .. N of (errors among the n most certain voxels) / N: an expert would
                         mend the others, most uncertain first. Malinin et al. 2021, arXiv 2107.07455
    retention ratio      that over (mean of e) / 2, which a useless u gives; a perfect one: the mean of e
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..cdal import CDAL, CDALConfig, Generator, GeneratorConfig, check_window, uncertainty
from ..config import InputError, at_least, from_dict, to_dict
from ..data import CaseInfo, DataConfig, DataSpec, Volume, VolumeDataset, open_images, write
from ..data.geometry import crop_or_pad, resample
from ..data.loading import load_role
from ..data.volumes import (
    NIFTI,
    TIFF,
    Header,
    read_header,
    strip_suffix,
)
from ..engine.checkpoint import load_run, load_weights
from ..engine.distributed import gather, is_main, print0, rank, world_size
from ..engine.logger import mid_slices, progress, save_sheet
from ..engine.training import autocast
from ..evaluation.results import WorstPictures, new_folder, table, write_csv, write_report
from ..evaluation.statistics import interval_words, summarise
from ..metrics import dice, hd95, iou, precision, sensitivity
from ..unet import UNetConfig

COLOURS = ((230, 60, 60), (60, 200, 90), (80, 120, 255), (240, 200, 40), (200, 80, 220), (60, 210, 220))
SHOWN, RESAMPLES = 8, 2000  # cases in the picture; of the bootstrap


@dataclass(frozen=True)
class SegmentConfig:
    segment: str  # image, or folder of images
    reference: str | None = None  # folder of label maps of the same names, to score against
    part: Literal["all", "train", "val", "test"] = "all"  # only these cases of the run's split
    votes: int = 5  # segmentations of a case, whose mean is taken
    window: tuple[int, ...] | None = None  # voxels of the windows; none = as in the run's validation
    overlap: float = 0.5  # part of a window that it shares with the next, at least
    probabilities: bool = False  # write the probability of every label too
    seed: int = 0  # of the votes
    batch_size: int = 8  # votes at once
    amp: str = "auto"  # precision of the networks
    out: str | None = None  # new folder for the results
    format: str = "auto"  # of the files; auto = that of the image

    def __post_init__(self) -> None:
        at_least(self, 1, "votes")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap: expected 0 <= overlap < 1, got {self.overlap}")


# --- the model ----------------------------------------------------------------------------------------------


def load_segmenter(
    run: str | Path, device: str | torch.device = "cpu"
) -> tuple[CDAL, Generator, dict[str, Any]]:
    """(method, generator with the EMA weights, the checkpoint's content) of a run of train_cdal.py."""
    content = load_run(run, "cdal")
    config, spec = content["config"], DataSpec.from_dict(content["state"]["data"])
    net = Generator(
        from_dict(GeneratorConfig, config["generator"], "generator"),
        from_dict(UNetConfig, config["unet"], "unet"),
        spec.channels,
        spec.num_labels,
    )
    load_weights(net, content["ema"], str(run))
    cdal = CDAL(from_dict(CDALConfig, config["cdal"], "cdal"), spec.num_labels)
    return cdal, net.to(device).eval().requires_grad_(False), content


# --- cases --------------------------------------------------------------------------------------------------


def on_file_grid(values: Tensor, info: CaseInfo, header: Header) -> Volume:
    """Values (K, *S) on the grid that training sees -> on that of the file, in RAS."""
    volume = Volume(values.numpy(), np.array(info.affine), header.orientation)
    if info.shape == header.shape and np.allclose(info.spacing, header.spacing, rtol=1e-4):
        return dataclasses.replace(volume, affine=header.affine)
    volume = resample(volume, header.spacing)  # the far end may be a voxel off
    volume = crop_or_pad(volume, (0,) * volume.dims, header.shape)
    return dataclasses.replace(volume, affine=header.affine)


def file_labels(labels: np.ndarray, layout: DataConfig, num_labels: int) -> np.ndarray:
    """Labels 0, 1, 2 ... as the values that stand for them in files, in the smallest type."""
    values = np.array(layout.label_values or range(num_labels))
    return values[labels].astype(np.uint8 if values.max() < 256 else np.uint16)


# --- scores -------------------------------------------------------------------------------------------------


def score(labels: Tensor, truth: Tensor, num_labels: int, spacing: tuple[float, ...]) -> dict[str, float]:
    """Scores of one label map (*S): the mean Dice over labels, then every score of every label."""
    pair = labels[None], truth[None]
    scores = {
        "dice": dice(*pair, num_labels)[0],
        "iou": iou(*pair, num_labels)[0],
        "hd95": hd95(*pair, num_labels, spacing)[0],
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


# --- pictures -----------------------------------------------------------------------------------------------


def overlay(image: Tensor, labels: Tensor | None) -> list[np.ndarray]:
    """Image (C, *S) in [-1, 1] and labels (*S) -> coloured middle slices, uint8 (h, w, 3)."""
    grey = ((image.float().clamp(-1, 1) + 1) * 127.5).numpy()
    slices = [mid_slices(grey[c]) for c in ((0, 1, 2) if len(grey) == 3 else (0, 0, 0))]
    pictures = [np.stack(channels, axis=-1) for channels in zip(*slices, strict=True)]
    if labels is not None:
        for picture, part in zip(pictures, mid_slices(labels.float().numpy()), strict=True):
            for k in range(1, int(part.max()) + 1):
                inside = part == k
                picture[inside] = 0.5 * picture[inside] + 0.5 * np.array(COLOURS[(k - 1) % len(COLOURS)])
    return [picture.astype(np.uint8) for picture in pictures]


# --- all of it ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def segment_files(config: SegmentConfig, run: Path, device: torch.device) -> Path:
    """Segment all images of `config`; returns the new folder."""
    cdal, net, content = load_segmenter(run, device)
    window = config.window or content["config"]["window"]
    check_window(window, content["config"]["data"]["dims"])
    dataset = open_images(content, config.segment, config.part, config.reference)
    folder = new_folder(run, config.out, "segmentations")
    rows, worst = {}, WorstPictures(SHOWN)
    print0(f"{len(dataset)} cases, T = {cdal.kernel.num_timesteps}, {config.votes} votes")
    for i in progress(range(rank(), len(dataset), world_size()), "segmenting"):
        case, item = dataset.cases[i], dataset[i, i]
        x = item["image"]
        start = time.perf_counter()
        with autocast(config.amp, device):
            p = cdal.segment(
                net,
                x.to(device),
                config.votes,
                window,
                config.overlap,
                config.seed,
                case.id,
                config.batch_size,
            )
        seconds = time.perf_counter() - start
        rows[case.id] = {"seconds": seconds, **write_case(p, dataset, i, config, folder)}
        pictures = [
            *overlay(x, None),
            *(overlay(x, item["mask"]) if config.reference else ()),
            *overlay(x, p.argmax(0)),
            *overlay(2 * uncertainty(p)[None] - 1, None),
        ]
        worst.add(case.id, rows[case.id].get("dice", 0.0), pictures)
    rows = dict(sorted((k, v) for part in gather(rows) for k, v in part.items()))
    worst.gather()
    if is_main():
        report(config, run, content["step"], folder, rows, worst)
    return folder


def write_case(
    p: Tensor, dataset: VolumeDataset, index: int, config: SegmentConfig, folder: Path
) -> dict[str, float]:
    """Write what was found of a case on its file's grid, from p (K, *S); returns its scores, if there are
    references."""
    case, layout = dataset.cases[index], dataset.config
    header = read_header(case.image, layout.channel or None, layout.file_spacing, layout.dims)
    volume = on_file_grid(p, dataset.infos[case.id], header)
    p = torch.from_numpy(volume.array)
    labels, doubt = p.argmax(0), uncertainty(p)
    array = file_labels(labels.numpy()[None], layout, len(p))
    suffix = suffix_of(case.image, config.format, layout.dims)
    write(folder / "labels" / f"{case.id}{suffix}", dataclasses.replace(volume, array=array))
    array = doubt.numpy()[None]
    write(folder / "uncertainty" / f"{case.id}{suffix}", dataclasses.replace(volume, array=array))
    if config.probabilities:
        write(folder / "probability" / f"{case.id}{suffix}", volume)
    if case.mask is None:
        return {}
    truth = load_role(case.mask, "mask", dataclasses.replace(layout, spacing=None, resize=False)).array[0]
    truth = torch.from_numpy(truth.astype(np.int64))
    return score(labels, truth, len(p), header.spacing) | calibration(doubt, labels != truth)


def suffix_of(image: Path, wanted: str, dims: int) -> str:
    """ ".nii.gz" and the like: the image's own where it can be written."""
    if wanted != "auto":
        return f".{wanted}"
    own = image.name[len(strip_suffix(image)) :].lower()
    return own if own in NIFTI + TIFF else {2: ".tif", 3: ".nii.gz"}[dims]


def report(
    config: SegmentConfig,
    run: Path,
    step: int,
    folder: Path,
    rows: dict[str, dict[str, float]],
    worst: WorstPictures,
) -> None:
    """cases.csv, report.json, overlays.png, and the means on the console."""
    write_csv(folder / "cases.csv", rows)
    metrics = summarise(rows, RESAMPLES)
    how = {
        **to_dict(config),
        "run": str(run),
        "step": step,
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
