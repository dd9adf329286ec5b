"""Segment images with a run of train_cdal.py, and score the label maps.

a folder          python sample.py runs/cdal-hippocampus FOLDER --votes 5
one image         python sample.py runs/cdal-hippocampus IMAGE --probabilities
with scores       python sample.py runs/cdal-hippocampus FOLDER --reference LABELS --part test
masks beside      python sample.py runs/cdal-hippocampus FOLDER --reference FOLDER
every vote        python sample.py runs/cdal-cells IMAGES --votes 16 --every_vote
nested masks      python sample.py runs/cdal-cells IMAGES --votes 16 --level_sets
mirrored too      python sample.py runs/cdal-monuseg data/monuseg/images --flips
several runs      python sample.py runs/cdal-hippocampus FOLDER --ensemble runs/cdal-plain

The new folder holds labels/ and uncertainty/ (and probability/), whose files have the names and the geometry
of the images; with --every_vote or --level_sets also votes/, label maps NAME__01, NAME__02 ...; cases.csv, a
row for each case with its seconds and, with --reference, its scores; report.json, the settings and the means
with bootstrap confidence intervals; and overlays.png, lowest Dice first.

Probabilities are means over the votes; with --flips also over mirrored copies of the image, mirrored back;
with --ensemble over runs, each with all of this. Networks err differently, and the errors average out.

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

import contextlib
import dataclasses
import io
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..cdal import CDAL, level_sets, uncertainty
from ..config import InputError, at_least, show, to_dict
from ..data import CaseInfo, DataConfig, Volume, VolumeDataset, open_images, write
from ..data.geometry import cut, resampled_grid, resampled_planes
from ..data.images import find_images
from ..data.loading import load_role
from ..data.volumes import NIFTI, TIFF, Header, affine_spacing, file_name, read_header, volume_suffix
from ..engine.distributed import gather, is_main, print0, rank, setup, world_size
from ..engine.logger import mid_slices, plural, progress, save_sheet
from ..evaluation.results import WorstPictures, draw_reliability, new_folder, table, write_csv, write_report
from ..evaluation.statistics import interval_words, summarise
from ..large.streaming import Filed, Map, Stored
from ..large.windows import check_window
from ..metrics import (
    calibration_error,
    dice,
    hd95,
    iou,
    near_labels,
    precision,
    reliability_bins,
    sensitivity,
)
from ..pipeline import SegmentationPipeline

COLOURS = ((230, 60, 60), (60, 200, 90), (80, 120, 255), (240, 200, 40), (200, 80, 220), (60, 210, 220))
SHOWN, RESAMPLES = 8, 2000  # cases in the picture; of the bootstrap
IN_MEMORY = 2**26  # probabilities of a case up to this number are kept in memory, more in a file
SLAB = 2**24  # probabilities that are worked on at a time
BAND, CONFIDENCES = 5, 15  # voxels around labels whose uncertainty is judged; bins of the reliability curve

# Settings of the data that all runs of an ensemble share
SEEN = "dims slices channel series spacing resize label_values scaling percentiles window".split()


@dataclass(frozen=True)
class SegmentConfig:
    reference: str | None = None  # to score against: folder of label maps, or of images with their masks
    part: Literal["all", "train", "val", "test"] = "all"  # only these cases of the run's split
    votes: int = 5  # segmentations of a case, whose mean is taken
    flips: bool = False  # also segment mirrored images, along the axes that training mirrored
    ensemble: tuple[str, ...] = ()  # more runs of train_cdal.py; the mean with theirs is taken
    window: tuple[int, ...] | None = None  # voxels that are segmented at once; none = as in validation
    overlap: float = 0.5  # part of a window that it shares with the next, at least
    probabilities: bool = False  # write the probability of every label too
    every_vote: bool = False  # write the label map of every vote too
    level_sets: bool = False  # write votes that are level sets of the mean probability, of any run
    seed: int = 0  # of the votes
    batch_size: int = 8  # votes at once, of one window or several
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    out: str | None = None  # new folder for the results; none = segmentations-001 ... in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = that of the image

    def __post_init__(self) -> None:
        at_least(self, 1, "votes", "batch_size")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap: expected 0 <= overlap < 1, got {self.overlap}")
        if self.every_vote and self.level_sets:
            raise InputError("level_sets: are votes of the mean, and every_vote asks for those of the run")
        for name in ("flips", "ensemble"):  # their mean is no sample any more
            if self.every_vote and getattr(self, name):
                raise InputError(f"every_vote: the votes are those of one run without {name}")


# --- cases --------------------------------------------------------------------------------------------------


def open_runs(config: SegmentConfig, run: Path, images: Path) -> list[SegmentationPipeline]:
    """The run and those of config.ensemble. InputError names what they do not share, or a case of config.part
    that one of them was trained on, or on whose subject."""
    device = setup(config.device)
    first, *others = opened = [SegmentationPipeline(path, device) for path in (run, *config.ensemble)]
    check_window(config.window, first.layout.dims)
    asked = first.content["state"]["split"].get(config.part, ()) if config.part in ("val", "test") else ()
    subjects = subjects_in(images, first.layout) if asked and others else {}
    seen = what_is_seen(first)
    for other in others:
        for name, theirs in what_is_seen(other).items():
            if theirs != seen[name]:
                got = f"{show(theirs)}, that of {first.run} {show(seen[name])}"
                raise InputError(f"ensemble: {other.run}: {name} is {got}")
        trained = other.content["state"]["split"].get("train", ())
        if learned := set(asked) & set(trained):
            raise InputError(f"ensemble: {other.run} was trained on {min(learned)} of part {config.part}")
        case_of = {subjects[name]: name for name in trained if name in subjects}
        if name := next((name for name in asked if subjects.get(name) in case_of), None):
            learned = f"{case_of[subjects[name]]}, of the subject of {name} of part {config.part}"
            raise InputError(f"ensemble: {other.run} was trained on {learned}")
    for one in opened if config.flips else ():
        one.check_flips()
    return opened


def subjects_in(images: Path, layout: DataConfig) -> dict[str, str]:
    """{case: subject} of the images, as `open_images` finds them. {} where training and validation share
    subjects (data.val_gap)."""
    if layout.val_gap is not None:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):  # `open_images` says the same again
        _, cases = find_images(images, dataclasses.replace(layout, subset=None))
    return {case.id: case.subject for case in cases}


def ways_of(opened: Sequence[SegmentationPipeline], votes: int) -> str:
    """How each run segments, in words. A network without diffusion has no votes that could differ."""

    def way(method: CDAL) -> str:
        if not method.config.diffusion:
            return "without diffusion"
        return f"T = {method.num_timesteps}, {plural(votes, 'vote')}"

    return "; ".join(way(one.method) for one in opened)


def votes_taken(opened: Sequence[SegmentationPipeline], config: SegmentConfig) -> int:
    """How many votes each case has, for the report: one where no run has diffusion, but for level sets, which
    are votes of the mean."""
    drawn = config.level_sets or any(one.method.config.diffusion for one in opened)
    return config.votes if drawn else 1


def what_is_seen(run: SegmentationPipeline) -> dict[str, Any]:
    """What runs share that see the same voxels of an image in the same units and mean the same labels."""
    layout, spec = run.layout, run.spec
    found = {f"data.{name}": getattr(layout, name) for name in SEEN}
    found["data.size"] = layout.size if layout.resize else None
    found |= {"labels": spec.num_labels, "channels": spec.channels}
    return found | {"intensities": (spec.low, spec.high) if layout.scaling == "dataset" else None}


def keep(runs: Iterable[Iterable[tuple[int, Tensor]]], channels: int, size: Sequence[int], name: str) -> Map:
    """The mean over runs of the probabilities (channels, *size) of a case, each given as first planes and
    planes (channels, n, ...): in memory or, where they are large, in a file of the temporary folder.
    channels: the labels, or those of every vote. InputError names the case if any is not finite."""
    large = channels * math.prod(size) > IN_MEMORY
    kept = Filed(channels, size) if large else Stored(channels, size, torch.device("cpu"))
    for num, planes in enumerate(runs):
        for start, p in planes:
            check_finite(p, name)
            if num:  # the mean of the runs before moves towards this one
                before = kept.read(start, start + p.shape[1])[0]
                p = before + (p - before) / (num + 1)
            kept.write(start, p[None])
    return kept


def votes_of(values: Map, num_labels: int) -> Iterator[tuple[int, Tensor]]:
    """All of the probabilities of V votes, or of their mean (V = 1), some planes of the first axis at a time:
    (start, planes (V, K, n, ...) from there)."""
    step, depth = max(1, SLAB // values.plane), values.size[0]
    for start in range(0, depth, step):
        yield start, values.read(start, min(start + step, depth))[0].unflatten(0, (-1, num_labels))


def slabs_of(values: Map, num_labels: int) -> Iterator[tuple[int, Tensor]]:
    """The mean of `votes_of`: (start, planes (K, n, ...) from there)."""
    return ((start, p.mean(0)) for start, p in votes_of(values, num_labels))


class FileGrid(Map):
    """Values (1, K, *S) on the grid that training sees, put onto the grid of the file, in RAS, some planes of
    the first axis at a time."""

    def __init__(self, kept: Map, info: CaseInfo, header: Header):
        super().__init__(kept.channels, header.shape)
        self.kept = kept
        self.same = info.shape == header.shape and np.allclose(info.spacing, header.spacing, rtol=1e-4)
        affine = np.array(info.affine)
        self.ratios = np.asarray(header.spacing, dtype=np.float64) / affine_spacing(affine)
        self.depth = resampled_grid(info.shape, affine, header.spacing)[0][0]

    def read(self, start: int, stop: int) -> Tensor:
        if self.same:
            return self.kept.read(start, stop)
        first, last = min(start, self.depth - 1), min(stop, self.depth)  # the far end may be a voxel off
        array = resampled_planes(
            lambda a, b: self.kept.read(a, b)[0].numpy(), self.kept.size, self.ratios, first, last
        )
        size = (stop - start, *self.size[1:])
        return torch.from_numpy(cut(array, (0,) * len(size), size))[None]


def label_map_of(slabs: Iterable[tuple[int, Tensor]], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(label map (*size) int32, uncertainty (*size)) of probabilities, some planes at a time."""
    label_map, doubt = torch.empty(*size, dtype=torch.int32), torch.empty(*size)
    for start, p in slabs:
        planes = slice(start, start + p.shape[1])
        label_map[planes], doubt[planes] = p.argmax(0), uncertainty(p)
    return label_map, doubt


def large_array(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An empty array; a large one lies in a nameless file of the temporary folder. InputError if the disk is
    too full: the room is reserved, as in latents.py, and for the same reason."""
    if math.prod(shape) <= IN_MEMORY:
        return np.empty(shape, dtype)
    file, size = tempfile.TemporaryFile(), math.prod(shape) * np.dtype(dtype).itemsize  # noqa: SIM115
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as e:
        folder, gib, why = tempfile.gettempdir(), size / 2**30, e.strerror or e
        raise InputError(f"{folder}: no room for an array of {gib:.2g} GiB ({why}); see TMPDIR") from None
    return np.memmap(file, dtype, "w+", shape=shape)


def file_labels(label_map: np.ndarray, layout: DataConfig, num_labels: int) -> np.ndarray:
    """Labels 0, 1, 2 ... -> the values that files have for them (data.label_values), in the smallest type."""
    values = np.array(layout.label_values or range(num_labels))
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)[label_map]


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


def borders(labels: Tensor) -> Tensor:
    """The voxels (*S) bool with a neighbour of another label, across a face."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    for axis, n in enumerate(labels.shape):
        steps = labels.diff(dim=axis) != 0
        found.narrow(axis, 0, n - 1).logical_or_(steps)
        found.narrow(axis, 1, n - 1).logical_or_(steps)
    return found


def reliability(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], Tensor]:
    """(ECE, Brier and NLL; (3, CONFIDENCES): voxels, sum of confidences and number right in each bin), over
    all parts, of the probabilities p (K, N) of voxels whose labels are truth (N,)."""
    bins, n, brier, nll = torch.zeros(3, CONFIDENCES, dtype=torch.float64), 0, 0.0, 0.0
    for p, truth in parts:
        p, own = p.double(), p.double().gather(0, truth[None].long())[0]
        confidence, chosen = p.max(0)
        bins += reliability_bins(confidence, (chosen == truth).double(), CONFIDENCES)
        n += len(truth)
        brier += float((p.square().sum(0) - 2 * own + 1).sum())
        nll -= float(own.clamp(min=1e-6).log().sum())
    n = max(1, n)
    return {"ece": calibration_error(bins), "brier": brier / n, "nll": nll / n}, bins


def certainty(
    slabs: Iterable[tuple[int, Tensor]], labels: Tensor, doubt: Tensor, truth: Tensor
) -> tuple[dict[str, float], Tensor]:
    """(every score of uncertainty and probabilities; bins as in `reliability`) of probabilities p, their
    label map, their uncertainty and the true labels, all (*S). slabs: (first plane, p (K, planes, ...))."""
    band, wrong = near_labels(labels, truth, BAND), labels != truth
    scores = calibration(doubt[band], wrong[band])
    scores["retention_border"] = calibration(borders(labels)[band], wrong[band])["retention_ratio"]
    planes = ((slice(start, start + p.shape[1]), p) for start, p in slabs)
    more, bins = reliability((p[:, band[some]], truth[some][band[some]]) for some, p in planes)
    return scores | more, bins


# --- pictures -----------------------------------------------------------------------------------------------


def overlay(
    image: Tensor, mask: Tensor | None, display: tuple[float, float] = (-1.0, 1.0)
) -> list[np.ndarray]:
    """Image (C, *S) and mask (*S) -> middle slices, uint8 (h, w, 3), labels in colours. display: the
    intensities that are black and white."""
    black, white = display
    grey = np.float32(255 / (white - black))
    slices = [mid_slices(image[c].numpy()) for c in ((0, 1, 2) if len(image) == 3 else (0, 0, 0))]
    pictures = [
        (np.stack(channels, axis=-1).astype(np.float32).clip(black, white) - np.float32(black)) * grey
        for channels in zip(*slices, strict=True)
    ]
    if mask is not None:
        for picture, part in zip(pictures, mid_slices(mask.numpy()), strict=True):
            for k in range(1, int(part.max()) + 1):
                inside = part == k
                picture[inside] = 0.5 * picture[inside] + 0.5 * np.array(COLOURS[(k - 1) % len(COLOURS)])
    return [picture.astype(np.uint8) for picture in pictures]


# --- all of it ----------------------------------------------------------------------------------------------


def segment_files(config: SegmentConfig, run: Path, images: Path) -> Path:
    """Segment one image or all images of a folder; returns the new folder."""
    pipeline, *_ = opened = open_runs(config, run, images)
    dataset = open_images(pipeline.content, images, config.part, config.reference)
    folder = new_folder(run, config.out, "segmentations")
    rows, worst, bins = {}, WorstPictures(SHOWN), torch.zeros(3, CONFIDENCES, dtype=torch.float64)
    print0(f"{plural(len(dataset), 'case')}, {ways_of(opened, config.votes)}")
    settings = (config.votes, config.window, config.overlap, config.seed)
    num_labels = pipeline.method.num_labels
    channels = num_labels * (config.votes if config.every_vote and pipeline.method.config.diffusion else 1)
    for i in progress(range(rank(), len(dataset), world_size()), "segmenting"):
        case, item = dataset.cases[i], dataset[i, i]
        x, start = item["image"], time.perf_counter()
        how = (case.id, config.batch_size, config.amp, config.every_vote, config.flips)
        planes = (one.segment_planes(x, *settings, *how) for one in opened)
        kept = keep(planes, channels, x.shape[1:], case.id)
        seconds = time.perf_counter() - start
        grid = FileGrid(kept, dataset.infos[case.id], header_of(dataset, i))
        found = label_map_of(slabs_of(grid, num_labels), grid.size)
        reference = item["mask"] if config.reference else None
        own = found if grid.same else label_map_of(slabs_of(kept, num_labels), kept.size)
        pictures = pictures_of(x, reference, *own, dataset.spec.display)
        del item, x, reference
        scores, counted = write_case(grid, num_labels, *found, dataset, i, config, folder)
        rows[case.id], bins = {"seconds": seconds, **scores}, bins + counted
        worst.add(case.id, rows[case.id].get("dice", 0.0), pictures)
    rows = dict(sorted((k, v) for part in gather(rows) for k, v in part.items()))
    worst.gather()
    bins = sum(gather(bins))
    if is_main():
        facts = {"run": str(run), "images": str(images), "step": pipeline.content["step"]}
        facts["votes"] = votes_taken(opened, config)
        if config.reference:
            names, labels = ("confidence", "right"), ("confidence", "share that is right")
            curve = draw_reliability(folder / "reliability.png", bins.numpy(), names, labels)
            facts["reliability"] = curve
        report(config, facts, folder, rows, worst, {case.id: case.subject for case in dataset.cases})
    return folder


def header_of(dataset: VolumeDataset, index: int) -> Header:
    """The header of the image of a case."""
    layout = dataset.config
    return read_header(dataset.cases[index].image, layout.channel or None, layout.file_spacing, layout.dims)


def pictures_of(
    image: Tensor, reference: Tensor | None, label_map: Tensor, doubt: Tensor, display: tuple[float, float]
) -> list[np.ndarray]:
    """The row of a case in overlays.png: image, reference where there is one, labels found, uncertainty."""
    masks = (None, label_map) if reference is None else (None, reference, label_map)
    pictures = [picture for mask in masks for picture in overlay(image, mask, display)]
    return pictures + overlay(2 * doubt[None] - 1, None)


def write_case(
    grid: FileGrid,
    num_labels: int,
    label_map: Tensor,
    doubt: Tensor,
    dataset: VolumeDataset,
    index: int,
    config: SegmentConfig,
    folder: Path,
) -> tuple[dict[str, float], Tensor | int]:
    """Write label map, uncertainty, probabilities and votes of a case on its file's grid; returns the case's
    scores and the bins of `reliability`, ({}, 0) without a reference."""
    case, layout = dataset.cases[index], dataset.config
    header = header_of(dataset, index)
    suffix = suffix_of(config.format, layout.dims, case.image)

    def write_values(kind: str, array: np.ndarray, end: str = "") -> None:
        name = file_name(case.id) + end + suffix
        write(folder / kind / name, Volume(array, header.affine, header.orientation))

    write_values("labels", file_labels(label_map.numpy()[None], layout, num_labels))
    write_values("uncertainty", doubt.numpy()[None])
    if config.probabilities:
        values = large_array((num_labels, *grid.size))
        for start, p in slabs_of(grid, num_labels):
            values[:, start : start + p.shape[1]] = p
        write_values("probability", values)
        del values
    if config.every_vote or config.level_sets:
        num_votes = config.votes if config.level_sets else grid.channels // num_labels
        votes = large_array((num_votes, *grid.size), np.uint16)
        for start, p in votes_of(grid, num_labels):
            some = level_sets(p[0], num_votes) if config.level_sets else p.argmax(1)
            votes[:, start : start + p.shape[2]] = some
        for v, vote in enumerate(votes, start=1):
            write_values("votes", file_labels(vote[None], layout, num_labels), f"__{v:02d}")
    if case.mask is None:
        return {}, 0
    truth = load_role(case.mask, "mask", dataclasses.replace(layout, spacing=None, resize=False)).array[0]
    truth = torch.from_numpy(truth)
    scores, bins = certainty(slabs_of(grid, num_labels), label_map, doubt, truth)
    return score(label_map, truth, num_labels, header.spacing) | scores, bins


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


def report(
    config: SegmentConfig,
    facts: dict[str, Any],
    folder: Path,
    rows: dict[str, dict[str, float]],
    worst: WorstPictures,
    subjects: dict[str, str],
) -> None:
    """cases.csv, report.json, overlays.png, and the means on the console. facts: run, images, step, votes;
    subjects: of the cases."""
    write_csv(folder / "cases.csv", rows)
    metrics = summarise(rows, RESAMPLES, subjects)
    how = {
        **to_dict(config),
        **facts,
        "weights": "EMA",
        "subjects": subjects,
        "cases": len(rows),
        "interval": interval_words(RESAMPLES),
        "metrics": metrics,
    }
    write_report(folder / "report.json", how)
    sheet = worst.sheet(lambda name, dice: f"{name}: Dice {dice:.3f}" if config.reference else name)
    picture = save_sheet(folder / "overlays.png", sheet)
    columns = ("mean", "low", "high", "cases")
    print(table([["", *columns], *([name, *(m[c] for c in columns)] for name, m in metrics.items())]))
    print(f"{plural(len(rows), 'case')}: {folder}" + (f", {picture}" if picture else ""))
