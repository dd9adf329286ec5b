"""Is an edit without a seam, and does it change what it should and nothing else?

    python -m ldm3d.evaluation edits runs/ldm-captions/samples-001                  of sample.py --inpaint
    python -m ldm3d.evaluation edits runs/ldm-captions/samples-001 --region MASK    of sample.py --edit

The folder's samples.json names the image, and of --inpaint the region. For other edits --region is the place
that should change, such as the mask of a lesion. For each sample, beside its image:

outside_max       the largest change outside the region, in the unit of the file; 0: untouched to the bit
outside, inside   mean absolute change, as a share of the image's range (percentiles 0.5 to 99.5)
share_inside      the part of the whole absolute change that lies in the region
seam              mean step |x_a - x_b| over all pairs of face neighbours of which one is in the region, as a
                  share of the same range
seam_real         the same of the image itself, at the same places
seam_contrast     seam, divided by the mean step between the next pairs on both sides of the border. A seam is
                  steeper than what is beside it
contrast_real     the same of the image itself
seam_distance     Kolmogorov-Smirnov distance of the steps of sample and image, 0 to 1: the whole distribution

Without a seam, seam is about seam_real, and seam_contrast about contrast_real. The image's own steps are the
measure because a region may well end where tissues do. Figures of the seam need a region whose border lies
inside the image. The new folder holds cases.csv, report.json (means with intervals) and edits.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError, at_least, read_json, to_dict
from ..data import read
from ..data.geometry import centred, cut
from ..data.volumes import is_volume_file, strip_suffix
from ..engine.logger import plural, save_sheet
from .results import new_folder, table, write_csv, write_report
from .statistics import interval_words, ks_distance, summarise


@dataclass(frozen=True)
class EditsConfig:
    image: str | None = None  # the image that was edited; none = as samples.json names it
    region: str | None = None  # mask of what should change, all that is not 0; none = the inpainted region
    out: str | None = None  # new folder for the report; none = edits-001 (-002, ...) in EDITED
    resamples: int = 2000  # of the bootstrap

    def __post_init__(self) -> None:
        at_least(self, 1, "resamples")


def steps_at_border(x: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|x_a - x_b| over face neighbours a, b of x (C, *S), along every axis: (of pairs of which one is in the
    region (*S) bool; of the next pairs on both sides of those along the same axis)."""
    across, beside = [], []
    for axis in range(region.ndim):
        border = np.diff(region.astype(np.int8), axis=axis) != 0
        steps = np.abs(np.diff(x, axis=axis + 1))
        line = np.moveaxis(border, axis, 0)
        near = np.zeros_like(line)
        near[1:] |= line[:-1]
        near[:-1] |= line[1:]
        near = np.moveaxis(near, 0, axis) & ~border
        across.append(steps[:, border].ravel())
        beside.append(steps[:, near].ravel())
    return np.concatenate(across), np.concatenate(beside)


def edit_figures(edited: np.ndarray, image: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """The figures of the module, of edited and image (C, *S) in one unit, and region (*S) bool."""
    edited, image = edited.astype(np.float64), image.astype(np.float64)
    low, high = np.percentile(image, [0.5, 99.5])
    unit, change = max(high - low, 1e-12), np.abs(edited - image)
    (seam, beside), (seam_real, beside_real) = (steps_at_border(x, region) for x in (edited, image))
    return {
        "outside_max": float(change[:, ~region].max(initial=0)),
        "outside": float(change[:, ~region].mean() / unit),
        "inside": float(change[:, region].mean() / unit),
        "share_inside": float(change[:, region].sum() / max(change.sum(), 1e-12)),
        "seam": float(seam.mean() / unit),
        "seam_real": float(seam_real.mean() / unit),
        "seam_contrast": float(seam.mean() / max(beside.mean(), 1e-12)),
        "contrast_real": float(seam_real.mean() / max(beside_real.mean(), 1e-12)),
        "seam_distance": ks_distance(seam, seam_real),
    }


def what_was_edited(config: EditsConfig, samples: Path) -> tuple[Path, Path]:
    """The files of the image and of the region. InputError if one is not told, or is not there."""
    stored = samples / "samples.json"
    if not stored.is_file():
        raise InputError(f"{samples}: has no samples.json; expected a folder that sample.py has written")
    content = read_json(stored)
    image = config.image or content.get("inpaint") or content.get("edit")
    region = config.region or content.get("region")
    if not image:
        raise InputError(f"{samples}: its samples are no edits (sample.py --inpaint or --edit)")
    if not region:
        raise InputError("region: give the mask of what should change, as these samples were not inpainted")
    for key, path in (("image", image), ("region", region)):
        if not Path(path).is_file():
            raise InputError(f"{key}: no file {path}")
    return Path(image), Path(region)


def measure_edits(config: EditsConfig, samples: str) -> Path:
    """The figures of all samples of a folder, and the report; returns its folder."""
    folder = Path(samples)
    paths = what_was_edited(config, folder)
    files = [path for path in sorted(folder.glob("*")) if is_volume_file(path) and path.suffix != ".png"]
    if not files:
        raise InputError(f"{folder}: holds no samples")
    whole, mask = (read(path).array for path in paths)
    if whole.shape[1:] != mask.shape[1:]:
        raise InputError(f"region: {paths[1]} has shape {mask.shape[1:]}, the image {whole.shape[1:]}")
    rows, pictures = {}, {}
    for path in files:
        edited = read(path).array
        size = edited.shape[1:]
        start = centred(whole.shape[1:], size)  # a sample of --edit covers the middle of a larger image
        image, region = (cut(array, start, size) for array in (whole, mask))
        region = region[0] != 0
        if not region.any() or region.all():
            raise InputError(f"region: {paths[1]} is empty or all of {path.name}")
        rows[strip_suffix(path)] = edit_figures(edited, image, region)
        if len(pictures) < 4:
            pictures[f"{path.name}: image, edited, change"] = shown(image, edited, region)
    out = new_folder(folder, config.out, "edits")
    report = report_of(config, folder, paths, rows)
    write_csv(out / "cases.csv", rows)
    write_report(out / "report.json", report)
    save_sheet(out / "edits.png", pictures)
    lines = [(name, s["mean"], s["low"], s["high"]) for name, s in report["metrics"].items()]
    print(table([("", "mean", "low", "high"), *lines]))
    print(f"{plural(len(rows), 'sample')}: {out}")
    return out


def report_of(
    config: EditsConfig, folder: Path, paths: tuple[Path, Path], rows: dict[str, Any]
) -> dict[str, Any]:
    image, region = map(str, paths)
    return {
        **to_dict(config),
        "samples": str(folder),
        "image": image,
        "region": region,
        "interval": interval_words(config.resamples),
        "metrics": summarise(rows, config.resamples),
    }


def shown(image: np.ndarray, edited: np.ndarray, region: np.ndarray) -> list[np.ndarray]:
    """Image, sample and change of the first channel, in 3-D the slices through the middle of the region."""
    middle = [round(v) for v in np.argwhere(region).mean(0)]
    found = []
    for x in (image[0], edited[0], edited[0] - image[0]):
        slices = [np.rot90(x.take(m, axis)) for axis, m in enumerate(middle)] if x.ndim == 3 else [x]
        found += [np.asarray(s, dtype=np.float32) for s in slices]
    return found
