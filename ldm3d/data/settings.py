"""The settings of a data set: where its files are, how they are split, read, scaled, cut and augmented.

Every field is a flag of the training scripts: `spacing` is --data.spacing, and its comment is the help line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..config import InputError, at_least
from .transforms import AugmentConfig

MAX_VOXELS = 2**31  # of a volume on the training grid: 8 GiB a channel


@dataclass(frozen=True)
class DataConfig:
    root: str | None = None  # folder of the data; none = $LDM3D_DATA/<name>, else data/<name>
    name: str | None = None  # name of the folder if data.root is none; none = the preset
    image: str | None = None  # glob, "images/*.nii.gz": the first * (or each {id}) is the case id
    mask: str | None = None  # glob of the masks, paired by case id, and {rater}
    source: str | None = None  # glob of the source volumes, paired by case id
    table: str | None = None  # instead of globs; none = cases.csv or dataset.json, where there is one
    subject: str | None = None  # regular expression with one group on the case id, or a CSV (name, subject)
    participants: str | None = None  # CSV or TSV of subjects (column participant_id): cells for their cases
    split: str | None = None  # expression on an image's path, CSV (name, split), or .json like a run's split
    val_fraction: float = 0.1  # fraction of the subjects for validation
    test_fraction: float = 0.0  # fraction of the subjects for testing, never looked at in training
    val_gap: int | None = None  # validate within each subject: on its middle cases, this many left out beside
    test_subjects: tuple[str, ...] = ()  # subjects that are always in the test set
    fold: tuple[int, int] | None = None  # (k, n): validate on part k = 0 ... n - 1 of n parts of the subjects
    subset: int | None = None  # take only this many cases, to try things out
    allow_missing_mask: bool = False  # cases without a mask take part, their mask is -1 everywhere
    mask_fraction: float = 1.0  # of the training subjects whose masks are used; the others count as without
    check_affine: bool = True  # mask and source must lie where their image lies, within one voxel
    dims: Literal[2, 3] = 3  # pictures or volumes
    slices: Literal["none", "axial", "coronal", "sagittal"] = "none"  # 2-D cases are the slices of volumes
    channel: tuple[int, ...] = ()  # channels taken of the images; empty = all
    source_channel: tuple[int, ...] = ()  # channels taken of the sources; empty = all
    series: str | None = None  # of several DICOM series in the folder of an image: number, description or UID
    source_series: str | None = None  # the same for the sources
    file_spacing: tuple[float, ...] | None = None  # mm, of files that state none (npy, npz, PNG, most TIFF)
    spacing: tuple[float, ...] | None = None  # mm, resample every case to it; none = keep the voxels
    size: tuple[int, ...] | None = None  # voxels of cases and samples; none = largest in training, rounded up
    resize: bool = False  # stretch every case to data.size instead of padding and cropping it
    patch: tuple[int, ...] | None = None  # voxels of the training patches; none = data.size
    crop: Literal["random", "padded", "centre"] = "random"  # where patches lie in a case, or in it as padded
    foreground: float = 0.0  # fraction of the random patches that are taken around a voxel of the mask
    scaling: Literal["percentile", "window", "minmax", "zscore", "dataset", "none"] = "percentile"  # kind
    percentiles: tuple[float, float] = (0.5, 99.5)  # of a volume that become -1 and 1, clipped (percentile)
    window: tuple[float, float] = (0.0, 255.0)  # values, e.g. HU, that become -1 and 1, clipped (window)
    paired_scaling: Literal["separate", "shared"] = "separate"  # shared = sources by the numbers of the image
    num_labels: int | None = None  # labels of the masks, background included; none = found in the data
    label_values: tuple[int, ...] = ()  # values in mask files for the labels 0, 1, 2 ...; empty = the same
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    learn_sources: bool = False  # the autoencoder learns the sources as well (to translate from them)
    num_variants: int = 1  # encodings cached per case for stage two; above 1 they are augmented
    cache: Literal["ram", "disk", "none"] = "ram"  # decoded volumes: in memory, prepared files, not kept
    cache_gb: float = 8.0  # GiB in memory, of training and of validation cases; the rest is read each time
    cache_dir: str = "runs/cache"  # folder of the findings of the inspection and of prepared files

    @property
    def unbounded(self) -> bool:
        """May scaled intensities lie anywhere, and not within [-1, 1] alone?"""
        return self.scaling in ("zscore", "dataset", "none")

    def __post_init__(self) -> None:
        for name in ("file_spacing", "spacing", "size", "patch"):
            value = getattr(self, name)
            if value is not None and (len(value) != self.dims or min(value) <= 0):
                raise InputError(f"{name}: expected {self.dims} positive numbers (data.dims), got {value}")
            if value is not None and "spacing" in name and not 1e-6 <= min(value) <= max(value) <= 1e6:
                raise InputError(f"{name}: expected mm, from 1e-6 to 1e6, got {value}")
            if value is not None and "spacing" not in name and math.prod(value) > MAX_VOXELS:
                raise InputError(f"{name}: expected at most {MAX_VOXELS:.1e} voxels, got {value}")
        at_least(self, 1, "subset", "num_labels", "num_variants")
        axes = self.augment.flip_axes + self.augment.rot90_axes
        checks = {
            "percentiles": (0 <= self.percentiles[0] < self.percentiles[1] <= 100, "0 <= low < high <= 100"),
            "window": (np.float32((self.window[1] - self.window[0]) / 2) > 0, "low < high"),
            "val_fraction": (0 <= self.val_fraction < 1, "0 <= fraction < 1"),
            "foreground": (0 <= self.foreground <= 1, "a fraction from 0 to 1"),
            "mask_fraction": (0 < self.mask_fraction <= 1, "a fraction above 0, up to 1"),
            "test_fraction": (0 <= self.test_fraction < 1 - self.val_fraction, "something left to train on"),
            "val_gap": (
                self.val_gap is None or (self.val_gap >= 0 and self.val_fraction > 0 and not self.fold),
                "0 or more, with a data.val_fraction and no data.fold",
            ),
            "fold": (self.fold is None or 0 <= self.fold[0] < self.fold[1] != 1, "k, n with 0 <= k < n"),
            "resize": (not self.resize or self.size is not None, "a data.size to stretch to"),
            "label_values": (
                len(set(self.label_values)) == len(self.label_values)
                and (not self.label_values or self.num_labels in (None, len(self.label_values))),
                "data.num_labels different values",
            ),
            "slices": (self.slices == "none" or self.dims == 2, "none with data.dims 3"),
            "file_spacing": (
                self.slices == "none" or self.file_spacing is None,
                "none with data.slices, whose spacing is that of the volumes",
            ),
            "augment": (all(0 <= axis < self.dims for axis in axes), f"axes from 0 to {self.dims - 1}"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)}")


def check_crop(flags: dict[str, Any], config: DataConfig) -> None:
    """Refuse the flag data.crop padded where no patches are cut. A preset may have it: `--data.patch none`
    beside the preset asks for whole cases, which are padded anyway. flags: by dotted key."""
    if flags.get("data.crop") == "padded" and config.patch is None:
        raise InputError("data.crop: padded is for patches (data.patch); whole cases are padded without it")


def of_volumes(config: DataConfig) -> DataConfig:
    """How the volumes are read of which `config` takes slices: whole, on their own grid."""
    own = {"dims": 3, "slices": "none", "augment": AugmentConfig(), "resize": False}
    return replace(config, **own, **dict.fromkeys(("spacing", "size", "patch")))
