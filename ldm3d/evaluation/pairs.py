"""How near is each generated image to its own target? The report for paired results, such as translations.

    python -m ldm3d.evaluation compare runs/ldm-mine/samples-001 data/flair --data_range 2000
    python -m ldm3d.evaluation compare GENERATED TARGET --masks data/lesion --align rigid --upright
    python -m ldm3d.evaluation compare PREDICTED LABELS --labels

Files are paired by name (without folder and suffix), or, where partners lack and all names of the others end
with one word, by what stands before: p01 and p01_T1w. A file without a partner is an error. Intensities are
in the unit of the files. For every pair:

image     PSNR (dB); PSNR after the best gain and offset (psnr_fitted: scanners differ in both, and the plain
          PSNR ranks gains more than images); SSIM, mean squared and absolute error; with --features also
          cosine and Euclidean distance of the features of a network. The network sees both images, scaled to
          [-1, 1] by the lowest and highest value of the pair
object    Dice, IoU, precision, sensitivity; height, and widths at 1/4, 1/2, 3/4 of the height (mm), of both
          objects, as a ratio (smaller / larger) and as a difference. The object is the largest connected
          part of the voxels above a threshold, holes filled, in the first channel; or a mask from a folder.
          The threshold is Otsu's for the target and serves both images, so that a darker result does not get
          away with a threshold of its own. A target with one value everywhere has no object
labels    with --labels, instead of all this: Dice, IoU, precision, sensitivity of each label that occurs

--align moves the generated image onto its target before anything is measured, by the centroids (shift) or
also the axes (rigid) of the objects: scores then measure form and not position. --upright measures heights
along the object's own longest axis.

The new folder holds cases.csv, report.json (mean, 95 % bootstrap interval, normal interval mean -+ 1.96 std /
sqrt(n), worst case, number of cases further than 1, 2, 3 std from the mean, outliers by interquartile range
and by z, number of cases within thresholds), and with matplotlib histograms.png and worst.png (target,
generated, difference).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InputError, at_least, to_dict
from ..data import Volume, read
from ..data.images import locate, own_images
from ..data.itk import is_dicom_folder
from ..data.layouts import common_ending
from ..data.volumes import is_volume_file, read_header, strip_suffix
from ..engine.distributed import choose_device, print0
from ..engine.logger import new_figure, progress, save_figure, save_sheet
from ..metrics import dice, iou, precision, psnr, sensitivity, ssim
from .morphology import fill_holes, heights_and_widths, largest_component, otsu_threshold, rigid_between
from .networks import Extractor, file_features
from .openers import beside
from .results import Rows, WorstPictures, check_out, new_folder, table, write_csv, write_report
from .statistics import interval_words, outliers, summarise

LOWER_IS_BETTER = ("mse", "mae", "difference", "distance")  # columns that end so: the worst is the highest
RATIOS = (0.90, 0.95, 0.97)  # of heights and widths: the report counts the cases above each
DIFFERENCES = (5.0, 10.0)  # mm: the report counts the cases below each


@dataclass(frozen=True)
class PairsConfig:
    masks: str | None = None  # folder of the targets' masks, by the same names; none = from the threshold
    generated_masks: str | None = None  # folder of the generated images' masks; none = from the threshold
    threshold: float | None = None  # value above which a voxel is of the object; none = Otsu's of the target
    labels: bool = False  # the images are label maps: compare label by label
    data_range: float | None = None  # of the intensities, for PSNR and SSIM; none = that of all targets
    align: Literal["none", "shift", "rigid"] = "none"  # move the generated object onto its target first
    upright: bool = False  # heights along the object's own longest axis
    height_axis: int | None = None  # axis of the height; none = rows in 2-D, the last (upwards) in 3-D
    features: str | None = None  # file of a network (TorchScript, torch.export, VGG-16): feature similarity
    dims: Literal[2, 3] | None = None  # pictures or volumes; none = as each file is
    worst: int = 4  # pairs that are shown, lowest psnr_fitted (labels: Dice) first
    resamples: int = 2000  # of the bootstrap
    device: str = "auto"  # of the feature network: auto, cpu, cuda, cuda:1, ...
    out: str | None = None  # new folder for the report; none = pairs-001 (-002, ...) beside GENERATED

    def __post_init__(self) -> None:
        at_least(self, 0, "worst")
        at_least(self, 1, "resamples")
        if self.data_range is not None and self.data_range <= 0:
            raise InputError(f"data_range: expected more than 0, got {self.data_range}")
        objects = (self.masks, self.generated_masks, self.threshold, self.features, self.data_range)
        if self.labels and (any(v is not None for v in objects) or self.upright or self.align != "none"):
            raise InputError("labels: takes no masks, threshold, data_range, align, upright or features")


# --- pairs --------------------------------------------------------------------------------------------------


def named_files(location: str, key: str) -> dict[str, Path]:
    """Name without suffix -> file, of all images in a folder or glob."""
    try:
        root, pattern = locate(location)
    except InputError as e:
        raise InputError(f"{key}: {e}") from None
    pattern = pattern or own_images(root)
    files: dict[str, Path] = {}
    for path in sorted(root.glob(pattern)) if pattern else ():
        if is_volume_file(path) or is_dicom_folder(path):
            name = strip_suffix(path)
            if name in files:
                raise InputError(f"{key}: {files[name]} and {path} have the same name")
            files[name] = path
    if not files:
        raise InputError(f"{key}: {location}: holds no images")
    return files


def pair_files(locations: dict[str, str]) -> dict[str, dict[str, Path]]:
    """Pair files by name: {role: folder or glob} -> {name: {role: file}}.

    Every generated file must have a partner in each other role. Other roles may hold more files, as the
    folder of all targets does when a part of them was translated: a note counts the files that are left out.
    What a run makes has the names of its cases, p01, where the files of the training end with their role,
    p01_T1w: a role whose names all do so is paired without this word.
    """
    roles = {role: named_files(location, role) for role, location in locations.items()}
    names = roles["generated"]
    for role, partners in roles.items():
        if names.keys() - partners.keys() and (end := common_ending(partners)):
            roles[role] = {name.removesuffix(end): path for name, path in partners.items()}
    for other, partners in roles.items():
        if alone := sorted(names.keys() - partners.keys()):
            more = f" ({len(alone)} such files)" if len(alone) > 1 else ""
            raise InputError(
                f"{names[alone[0]]}: no partner named {alone[0]} in {other} {locations[other]}{more}"
            )
        if unpaired := sorted(partners.keys() - names.keys()):
            some = f"{len(unpaired)} of {len(partners)} files, such as {unpaired[0]},"
            print0(
                f"note: {some} of {other} {locations[other]} have no partner in generated and are left out"
            )
    return {name: {role: roles[role][name] for role in roles} for name in names}


def read_pair(files: dict[str, Path], config: PairsConfig) -> dict[str, Volume]:
    """Read a pair: {role: volume}, masks as integers. InputError if shapes or spacings differ."""
    found, target = {}, files["target"]
    for role, path in files.items():
        whole = config.labels or "masks" in role
        dtype = np.float64 if config.labels else np.int64 if whole else np.float32
        flat = config.dims is None and 1 in read_header(path).shape  # a NIfTI file of one slice
        found[role] = read(path, dims=2 if flat else config.dims, dtype=dtype)
        expected = (1 if whole else found.get("target", found[role]).channels, *found["target"].shape)
        if found[role].array.shape != expected:
            got = found[role].array.shape
            raise InputError(f"{path}: shape {got}, expected {expected} as of its target {target}")
        if not np.isfinite(found[role].array).all():
            raise InputError(f"{path}: holds NaN or infinite voxels")
        got, spacing = found[role].spacing, found["target"].spacing
        if not np.allclose(got, spacing, rtol=0.01, atol=0):
            words = (" x ".join(f"{mm:.4g}" for mm in s) for s in (got, spacing))
            raise InputError(
                f"{path}: voxels of {next(words)} mm, those of its target {target} {next(words)} mm"
            )
        if config.labels:
            found[role] = replace(found[role], array=_labels(found[role].array, path))
    return found


def _labels(array: np.ndarray, path: Path) -> np.ndarray:
    """The array as integers; InputError if it is no label map."""
    whole = np.rint(array)
    wrong = array[(np.abs(array - whole) > 1e-3) | (whole < 0)]
    if wrong.size:
        raise InputError(f"{path}: labels: expected 0, 1, 2 ..., found {wrong[0]:g}")
    return whole.astype(np.int64)


# --- one pair -----------------------------------------------------------------------------------------------


def object_of(values: np.ndarray, threshold: float) -> np.ndarray:
    """Mask (*S) of the object in an image (*S): the largest connected part above the threshold, filled."""
    return fill_holes(largest_component(values > threshold))


def move(
    x: np.ndarray, turn: np.ndarray, shift: np.ndarray, spacing: Sequence[float], mode: str
) -> np.ndarray:
    """Move x (C, *S) rigidly: the result at position p has the value of x at R p + t, both in mm.

    turn: R (dims, dims). shift: t (dims,). A position is index * spacing. Outside, the edge is repeated.
    """
    size, mm = x.shape[1:], np.asarray(spacing, dtype=np.float64)
    axes = [np.arange(n) * s for n, s in zip(size, mm, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ turn.T + shift
    unit = 2 * (points / mm + 0.5) / np.asarray(size) - 1  # grid_sample's -1 to 1 over the whole extent
    grid = torch.from_numpy(unit[..., ::-1].copy()).float()[None]
    batch = torch.from_numpy(np.ascontiguousarray(x)).float()[None]
    return F.grid_sample(batch, grid, mode=mode, padding_mode="border", align_corners=False)[0].numpy()


def overlap(pred: np.ndarray, target: np.ndarray, labels: Sequence[int] = (1,)) -> dict[str, float]:
    """Dice, IoU, precision, sensitivity of label maps (*S) that hold 0 and `labels` (ascending) only.

    Keys are "dice" for a single label, "dice_1" ... for several.
    """
    maps = [torch.from_numpy(np.searchsorted((0, *labels), v.astype(np.int64)))[None] for v in (pred, target)]
    found = {}
    for name, score in (("dice", dice), ("iou", iou), ("precision", precision), ("sensitivity", sensitivity)):
        for label, value in zip(labels, score(*maps, 1 + len(labels))[0].tolist(), strict=True):
            found[name if len(labels) == 1 else f"{name}_{label}"] = value
    return found


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """a x + b with the a and b that bring x nearest to y, both (1, C, *S) float64, channel by channel.

    a is 0 at least: an inverted contrast is an error, not a gain.
    """
    x0, y0 = (v - v.flatten(2).mean(2).view(*v.shape[:2], *(1,) * (v.ndim - 2)) for v in (x, y))
    gain = (x0 * y0).flatten(2).sum(2) / x0.square().flatten(2).sum(2).clamp(min=1e-30)
    return gain.clamp(min=0).view(*x.shape[:2], *(1,) * (x.ndim - 2)) * x0 + (y - y0)


def compare_pair(
    volumes: dict[str, Volume], config: PairsConfig, data_range: float, network: Extractor | None
) -> tuple[dict[str, float], np.ndarray]:
    """Score one pair of images: (scores, the generated array (C, *S) after alignment)."""
    target, spacing = volumes["target"].array, volumes["target"].spacing
    generated = volumes["generated"].array
    threshold = config.threshold if config.threshold is not None else otsu_threshold(target[0])
    if math.isnan(threshold):  # one value everywhere: the target has no object
        threshold = float(target[0].max())
    masks = {
        role: volumes[key].array[0] > 0 if key in volumes else object_of(volumes[role].array[0], threshold)
        for role, key in (("target", "masks"), ("generated", "generated_masks"))
    }
    if config.align != "none" and all(mask.any() for mask in masks.values()):
        turn, shift = rigid_between(masks["generated"], masks["target"], spacing, config.align == "rigid")
        generated = move(generated, turn, shift, spacing, "bilinear")
        masks["generated"] = move(masks["generated"][None], turn, shift, spacing, "nearest")[0] > 0.5
    x, y = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64))[None] for v in (generated, target))
    scores = {
        "psnr": psnr(x, y, data_range).item(),
        "psnr_fitted": psnr(fitted(x, y), y, data_range).item(),
        "ssim": ssim(x, y, data_range).item(),
        "mse": (x - y).square().mean().item(),
        "mae": (x - y).abs().mean().item(),
        **overlap(masks["generated"], masks["target"]),
    }
    axis = config.height_axis
    if axis is None:
        axis = 0 if target.ndim == 3 else 2
    sizes = [
        heights_and_widths(masks[role], spacing, axis, config.upright) for role in ("generated", "target")
    ]
    for name in sizes[0]:
        a, b = (s[name] for s in sizes)
        scores |= {f"{name}_generated": a, f"{name}_target": b, f"{name}_difference": abs(a - b)}
        scores[f"{name}_ratio"] = min(a, b) / max(a, b) if max(a, b) > 0 else math.nan
    if network is not None:
        scores |= feature_similarity(network, x.float(), y.float())
    return scores, generated


def feature_similarity(network: Extractor, x: Tensor, y: Tensor) -> dict[str, float]:
    """Cosine similarity and Euclidean distance of the features of two images (1, C, *S).

    Both are scaled to [-1, 1] by the lowest and highest value of the pair.
    """
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    a, b = (network(2 * (v - low) / (high - low).clamp(min=1e-12) - 1)[0] for v in (x, y))
    return {
        "feature_cosine": F.cosine_similarity(a, b, dim=0).item(),
        "feature_distance": (a - b).norm().item(),
    }


# --- all pairs ----------------------------------------------------------------------------------------------


def compare_pairs(config: PairsConfig, generated: str, target: str) -> Path:
    """Compare all pairs and write the report; returns its folder. InputError names what does not fit."""
    locations = {"target": target, "generated": generated}
    locations |= {key: getattr(config, key) for key in ("masks", "generated_masks") if getattr(config, key)}
    pairs = pair_files(locations)
    check_out(config.out)
    data_range, labels = _range_of(pairs, config)
    first = read_pair(next(iter(pairs.values())), config)["target"]
    if config.height_axis is not None and not 0 <= config.height_axis < first.dims:
        raise InputError(f"height_axis: expected 0 to {first.dims - 1}, got {config.height_axis}")
    network = None
    if config.features:
        network = file_features(config.features, first.dims, choose_device(config.device))
    rows: Rows = {}
    worst = WorstPictures(config.worst)
    key = "dice_mean" if config.labels else "psnr_fitted"
    for name, files in progress(pairs.items(), "comparing", len(pairs)):
        volumes = read_pair(files, config)
        x, y = volumes["generated"].array, volumes["target"].array
        if config.labels:
            rows[name] = overlap(x[0], y[0], labels)
            present = [v for k, v in rows[name].items() if k.startswith("dice") and not math.isnan(v)]
            rows[name]["dice_mean"] = float(np.mean(present)) if present else math.nan
        else:
            rows[name], x = compare_pair(volumes, config, data_range, network)
        pictures = [v.astype(np.float32) for v in (y[0], x[0], x[0] - y[0])]
        worst.add(name, rows[name][key], pictures)
    metrics = describe(rows, config.resamples)
    report = {
        **to_dict(config),
        "generated": generated,
        "target": target,
        "cases": len(rows),
        "data_range": data_range,
        "ssim_window": 7,
        "network": network and {**network.describe(), "input": "each pair scaled to [-1, 1]"},
        "interval": interval_words(config.resamples),
        "metrics": metrics,
    }
    folder = new_folder(beside(generated), config.out, "pairs")
    write_csv(folder / "cases.csv", rows)
    write_report(folder / "report.json", report)
    if worst.kept:
        save_sheet(folder / "worst.png", worst.sheet(lambda name, score: f"{name}: {score:.3g}"))
    draw_histograms(folder / "histograms.png", rows)
    print_summary(metrics)
    print(f"{len(rows)} pairs: {folder}")
    return folder


def _range_of(pairs: dict[str, dict[str, Path]], config: PairsConfig) -> tuple[float | None, list[int]]:
    """(The range of intensities, by the setting or over all targets; the labels that occur in label maps)."""
    if config.data_range is not None:
        return config.data_range, []
    low, high, labels = math.inf, -math.inf, {0}
    for files in progress(pairs.values(), "intensity range", len(pairs)):
        volumes = read_pair(files, config)
        if config.labels:
            labels.update(*(np.unique(volume.array).tolist() for volume in volumes.values()))
        else:
            target = volumes["target"].array
            low, high = min(low, float(target.min())), max(high, float(target.max()))
    if config.labels:
        if len(labels) == 1:
            raise InputError(f"{files['target']}, and all others, hold no label but 0; nothing to compare")
        return None, sorted(labels - {0})
    if high <= low:
        raise InputError(
            f"{files['target']}, and all other targets, have the value {low:g} everywhere: set data_range"
        )
    return high - low, []


def describe(rows: Rows, resamples: int) -> dict[str, dict[str, Any]]:
    """Column -> `summarise`, normal interval, outliers, worst case, numbers of cases within thresholds."""
    found = summarise(rows, resamples)
    names = list(rows)
    for column, s in found.items():
        values = np.array([row[column] for row in rows.values()], dtype=np.float64)
        n, half = s["cases"], math.nan
        if n > 1:
            half = 1.96 * s["std"] / math.sqrt(n)
        s["normal_low"], s["normal_high"] = s["mean"] - half, s["mean"] + half
        s["outside"] = {str(k): int((np.abs(values - s["mean"]) > k * s["std"]).sum()) for k in (1, 2, 3)}
        beyond, far = outliers(values)
        s["outliers_iqr"] = [names[i] for i in np.flatnonzero(beyond)]
        s["outliers_z"] = [names[i] for i in np.flatnonzero(far)]
        if n and not column.endswith(("_generated", "_target")):
            worst = np.nanargmax(values) if column.endswith(LOWER_IS_BETTER) else np.nanargmin(values)
            s["worst"], s["worst_case"] = float(values[worst]), names[worst]
        if column.endswith("_ratio"):
            s["above"] = {str(limit): int((values > limit).sum()) for limit in RATIOS}
        if column.endswith("_difference"):
            s["below_mm"] = {str(limit): int((values < limit).sum()) for limit in DIFFERENCES}
    return found


def print_summary(metrics: dict[str, dict[str, Any]]) -> None:
    """Means, intervals and worst cases, on the console."""
    lines = [("", "mean", "low", "high", "worst", "case", "outliers")]
    for name, s in metrics.items():
        if "worst" in s:
            odd = len(set(s["outliers_iqr"]) | set(s["outliers_z"]))
            lines.append((name, s["mean"], s["low"], s["high"], s["worst"], s["worst_case"], odd))
    print(table(lines))


def draw_histograms(path: Path, rows: Rows) -> Path | None:
    """A histogram of every score over the cases; None without matplotlib."""
    names = [n for n in next(iter(rows.values())) if not n.endswith(("_generated", "_target"))]
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(figsize=(3 * columns, 2.2 * lines), dpi=80, layout="constrained")
    if figure is None:
        return None
    for ax, name in zip(figure.subplots(lines, columns, squeeze=False).flat, names, strict=False):
        values = np.array([row[name] for row in rows.values()], dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            ax.hist(values, bins=min(20, max(3, len(values))))
            ax.axvline(values.mean(), color="C1")
        ax.set_title(name, fontsize=9)
    return save_figure(figure, path)
