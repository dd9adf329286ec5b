"""Do segmentations differ as raters do? The report for several segmentations of a case and several raters.

    python -m ldm3d.evaluation raters runs/cdal-cells/segmentations-001/votes data/cells/raters
    python -m ldm3d.evaluation raters VOTES "RATERS/{rater}/{id}.nii.gz" --votes 16

Both sets hold files ID__NAME, such as p01__03.tif and p01__anna.tif, or are patterns with {id} and {rater}.
Raters disagree where an image does not decide: a segmentation is then a sample of what a rater could draw.
With N samples s and R raters' masks y of a case, and the distance d = 1 - IoU:

    ged             2 mean d(s, y) - mean d(s, s') - mean d(y, y') over all pairs, equal ones included: the
                    squared generalised energy distance (Kohl et al. 2018, arXiv 1806.05034). 0 if both sets
                    are the same. Samples that all equal the mean of the raters are far off, by mean d(y, y')
    to_raters, votes_apart, raters_apart    its three means: do the samples miss the raters, or are they too
                    much alike? ged = 2 to_raters - votes_apart - raters_apart
    matched_iou     both sets are repeated to their least common multiple of maps and matched one to one, so
                    that the mean IoU is the highest: is every rater found as often as there are such raters?
    best_dice       mean over raters of the Dice of the best sample: is every rater found at all?
    votes_dice      mean Dice of two different samples: the diversity. It should be the raters' own:
    raters_dice     mean Dice of two different raters
    mean_dice       mean over raters of the Dice of the samples' majority: one mask for all
    ece             mean |p - q| over bins of p: the share p of the samples and the share q of the raters that
                    give a label to a voxel. Of the voxels within BAND voxels of a label of any map

Overlaps are means over the labels but the background. A label that no map of the case has is left out; two
maps that both lack a label agree on it. `ged` has a bias that falls with N and R, as the published one has:
compare it for equal numbers only.

The new folder holds cases.csv, report.json (means with bootstrap intervals, the reliability curve), and with
matplotlib reliability.png and cases.png: the raters' share and the samples' share of the worst cases, and the
difference of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import InputError, at_least, to_dict
from ..data import read
from ..data.cases import files_by_rater
from ..data.dataset import majority
from ..engine.logger import mid_slices, plural, progress, save_sheet
from ..metrics import calibration_error, near_labels, reliability_bins
from .results import (
    Rows,
    WorstPictures,
    check_out,
    draw_reliability,
    new_folder,
    table,
    write_csv,
    write_report,
)
from .statistics import interval_words, summarise

BAND, BINS = 5, 10  # voxels around labels that the reliability curve counts; bins of the curve


@dataclass(frozen=True)
class RatersConfig:
    votes: int | None = None  # only the first so many samples of each case; none = all
    dims: int | None = None  # 2 or 3: pictures or volumes; none = as each file is
    worst: int = 4  # cases that are shown, highest ged first
    resamples: int = 2000  # of the bootstrap
    out: str | None = None  # new folder for the report; none = raters-001 (-002, ...) beside VOTES

    def __post_init__(self) -> None:
        at_least(self, 1, "votes", "worst", "resamples")
        if self.dims not in (None, 2, 3):
            raise InputError(f"dims: expected 2 or 3, got {self.dims}")


# --- two sets of label maps ---------------------------------------------------------------------------------


def labels_in(*sets: Tensor) -> list[int]:
    """The labels but 0 that some label map has."""
    return sorted({int(k) for maps in sets for k in maps.unique()} - {0})


def overlaps(a: Tensor, b: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(IoU, Dice) of every map of a (N, *S) with every map of b (M, *S), each (N, M) float64, means over
    `labels`. Maps that both lack a label have 1 there; without labels all agree."""
    iou, dice = (torch.ones(len(a), len(b), dtype=torch.float64) for _ in range(2))
    for share, k in enumerate(labels, start=1):
        x, y = ((maps == k).flatten(1).double() for maps in (a, b))
        both, sizes = x @ y.T, x.sum(1)[:, None] + y.sum(1)[None]
        empty = sizes == 0
        for mean, value in ((iou, both / (sizes - both)), (dice, 2 * both / sizes)):
            mean += (value.masked_fill(empty, 1.0) - mean) / share
    return iou, dice


def distances(samples: Tensor, masks: Tensor) -> dict[str, float]:
    """`ged`, from 0 to 2, of samples (N, *S) and raters' masks (R, *S), and the three means that it is made
    of: of samples and raters, of two samples, of two raters. Equal ones are included."""
    labels = labels_in(samples, masks)
    pairs = ((samples, masks), (samples, samples), (masks, masks))
    cross, within, between = (1 - float(overlaps(a, b, labels)[0].mean()) for a, b in pairs)
    ged = 2 * cross - within - between
    return {"ged": ged, "to_raters": cross, "votes_apart": within, "raters_apart": between}


def squared_ged(samples: Tensor, masks: Tensor) -> float:
    """The squared generalised energy distance of `distances`."""
    return distances(samples, masks)["ged"]


def assignment(cost: np.ndarray) -> np.ndarray:
    """The column of every row, each column once, so that the sum of cost (n, n) is the least.

    The Hungarian method with potentials u of rows and v of columns: cost - u - v is never negative, and 0 for
    matched pairs. Every row is added along the shortest path, by these costs, to a free column.
    """
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)  # of every column
    for row in range(n):
        distance, before, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        current, column, reached = row, -1, 0.0
        while current >= 0:  # until a column that has no row
            through = reached + cost[current] - u[current] - v
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached, done[column], current = distance[column], True, row_of[column]
        path = done & (row_of >= 0)
        u[row_of[path]] += reached - distance[path]
        u[row] += reached
        v[done] -= reached - distance[done]
        while column >= 0:  # every column of the path takes the row of the column before
            row_of[column] = row if before[column] < 0 else row_of[before[column]]
            column = int(before[column])
    found = np.empty(n, int)
    found[row_of] = np.arange(n)
    return found


def matched_iou(iou: Tensor) -> float:
    """The mean IoU of the best matching of two sets, from the IoU (N, R) of all pairs."""
    size = math.lcm(*iou.shape)
    repeated = (
        iou.repeat_interleave(size // iou.shape[0], 0).repeat_interleave(size // iou.shape[1], 1).numpy()
    )
    return float(repeated[np.arange(size), assignment(-repeated)].mean())


def mean_of_pairs(values: Tensor) -> float:
    """The mean of values (N, N) of a set with itself, over pairs of two different members; nan for N = 1."""
    n = len(values)
    return float((values.sum() - values.diagonal().sum()) / (n * (n - 1))) if n > 1 else math.nan


def rater_scores(samples: Tensor, masks: Tensor) -> dict[str, float]:
    """All scores of the samples (N, *S) and the raters' masks (R, *S) of a case, but those of calibration."""
    labels = labels_in(samples, masks)
    iou, dice = overlaps(samples, masks, labels)
    return {
        **distances(samples, masks),
        "matched_iou": matched_iou(iou),
        "best_dice": float(dice.max(0).values.mean()),
        "votes_dice": mean_of_pairs(overlaps(samples, samples, labels)[1]),
        "raters_dice": mean_of_pairs(overlaps(masks, masks, labels)[1]),
        "mean_dice": float(overlaps(majority(samples)[None], masks, labels)[1].mean()),
    }


def shares(samples: Tensor, masks: Tensor) -> Tensor:
    """(2, n): the share of the samples (N, *S), and of the raters (R, *S), that give a label to a voxel, for
    every label but 0 and every voxel within BAND voxels of a label of any map."""
    near = near_labels((samples > 0).any(0), (masks > 0).any(0), BAND)
    pairs = [
        torch.stack([(maps == k).double().mean(0)[near] for maps in (samples, masks)])
        for k in labels_in(samples, masks)
    ]
    return torch.cat(pairs, 1) if pairs else torch.zeros(2, 0, dtype=torch.float64)


# --- files --------------------------------------------------------------------------------------------------


def files_of(location: str, key: str) -> dict[str, dict[str, Path]]:
    """{case id: {name of the rater or sample: file}} of a folder of files ID__NAME, or of a pattern."""
    parts = Path(location).expanduser().parts
    first = next((i for i, part in enumerate(parts) if "{" in part or "*" in part), len(parts))
    root, pattern = Path(*parts[:first]), "/".join(parts[first:]) or "{id}__{rater}"
    if not root.is_dir():
        raise InputError(f"{key}: {root} is not a folder")
    if "{id}" not in pattern or "{rater}" not in pattern:
        raise InputError(
            f"{key}: expected a folder of files ID__NAME, or a pattern with {{id}} and {{rater}}"
        )
    return files_by_rater(pattern, root, key)


def read_maps(files: dict[str, Path], dims: int | None) -> Tensor:
    """The label maps of a case, (N, *S) int64. InputError for one of another shape, or of no labels."""
    maps: list[np.ndarray] = []
    for path in files.values():
        array = read(path, dims=dims).array
        whole = np.rint(array)
        if len(array) != 1 or not (np.abs(array - whole) < 1e-3).all() or whole.min() < 0:
            raise InputError(f"{path}: expected a label map: one channel of 0, 1, 2 ...")
        if maps and whole[0].shape != maps[0].shape:
            raise InputError(f"{path}: shape {whole[0].shape}, other maps of the case have {maps[0].shape}")
        maps.append(whole[0])
    return torch.from_numpy(np.stack(maps).astype(np.int64))


# --- all cases ----------------------------------------------------------------------------------------------


def compare_raters(config: RatersConfig, samples: str, masks: str) -> Path:
    """Score the samples of all cases against the raters and write the report; returns its folder."""
    found, raters = files_of(samples, "VOTES"), files_of(masks, "MASKS")
    if alone := sorted(found.keys() - raters.keys()):
        raise InputError(f"VOTES: case {alone[0]} has no mask in {masks} ({len(alone)} such cases)")
    check_out(config.out)
    rows: Rows = {}
    bins, worst = torch.zeros(3, BINS, dtype=torch.float64), WorstPictures(config.worst)
    for name in progress(sorted(found), "comparing", len(found)):
        files = dict(list(found[name].items())[: config.votes])
        s, y = read_maps(files, config.dims), read_maps(raters[name], config.dims)
        if s.shape[1:] != y.shape[1:]:
            shapes = f"{tuple(s.shape[1:])}, its masks {tuple(y.shape[1:])}"
            raise InputError(f"VOTES: case {name} has samples of shape {shapes}")
        own = reliability_bins(*shares(s, y), BINS)
        rows[name] = {"votes": len(s), "raters": len(y), **rater_scores(s, y), "ece": calibration_error(own)}
        bins += own
        p, q = ((maps > 0).float().mean(0).numpy() for maps in (s, y))
        worst.add(name, -rows[name]["ged"], [part for v in (q, p, p - q) for part in mid_slices(v)])
    root = Path(samples) if Path(samples).is_dir() else Path.cwd()
    folder = new_folder(root.parent, config.out, "raters")
    metrics = summarise(rows, config.resamples)
    labels = "share of the samples", "share of the raters"
    curve = draw_reliability(folder / "reliability.png", bins.numpy(), ("votes", "raters"), labels)
    report = {**to_dict(config), "samples": samples, "masks": masks, "cases": len(rows)}
    report |= {"ece": calibration_error(bins), "reliability": curve}
    report |= {"interval": interval_words(config.resamples), "metrics": metrics}
    write_csv(folder / "cases.csv", rows)
    write_report(folder / "report.json", report)
    save_sheet(folder / "cases.png", worst.sheet(lambda name, score: f"{name}: ged {-score:.3g}"))
    columns = ("mean", "low", "high", "cases")
    print(table([["", *columns], *([name, *(m[c] for c in columns)] for name, m in metrics.items())]))
    print(f"{plural(len(rows), 'case')}: {folder}")
    return folder
