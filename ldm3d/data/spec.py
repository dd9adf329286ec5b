"""What a run keeps of its training data: enough to scale new images, and to write samples as volumes.

A sample has no file of its own. It gets the median intensities, the median spacing and the most frequent
orientation of the training cases, all kept in `DataSpec`. A reconstruction has a file: `restore` gives it the
intensities, the affine and the orientation of this file.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..config import InputError, to_dict
from .cases import Case
from .geometry import centred
from .inspection import CaseInfo
from .settings import DataConfig
from .transforms import unscale
from .volumes import Volume, centred_affine


@dataclass(frozen=True)
class DataSpec:
    """Size, spacing, intensities, labels and classes of the training data. Every checkpoint has a copy."""

    dims: int
    channels: int
    source_channels: int  # 0: the data set has no sources
    size: tuple[int, ...]  # voxels of whole cases and samples
    spacing: tuple[float, ...]  # mm, the median of the training cases
    orientation: str | None  # axis codes of written samples: the most frequent in training
    scaling: str
    low: tuple[float, ...]  # per channel, the value that is -1 in a sample: median of the training cases
    high: tuple[float, ...]  # the value that is 1
    source_low: tuple[float, ...]
    source_high: tuple[float, ...]
    num_labels: int | None  # of the masks, background included; None: the data set has no masks
    num_classes: int | None  # of the column `class`; None: the table has none
    reference: dict[str, float] | None = None  # figures of real cases, to compare samples with
    display: tuple[float, float] = (-1.0, 1.0)  # scaled intensities that pictures show as black and white
    dtype: str = "float32"  # of the images that are written: "uint8" if all training images are of 8 bits

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSpec:
        """The inverse. InputError if these are not the values of a spec, as in a damaged checkpoint."""
        try:
            spec = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            valid = min(spec.size) > 0 and all(0 < mm < math.inf for mm in spec.spacing)
            valid = valid and len(spec.size) == len(spec.spacing) == spec.dims
            valid = valid and all(map(math.isfinite, (*spec.low, *spec.high)))
            black, white = spec.display
            valid = valid and -math.inf < black < white < math.inf and spec.dtype in ("float32", "uint8")
        except (AttributeError, TypeError, ValueError):
            valid = False
        if not valid:
            raise InputError("what the checkpoint holds of its training data (state.data) is damaged")
        return spec

    @property
    def clipped(self) -> bool:
        """Do scaled intensities stay within [-1, 1]?"""
        return self.scaling in ("percentile", "window")

    def scaling_in_words(self) -> str:
        """Which values of the files become -1 and 1, and where these values come from."""
        if self.scaling == "none":
            return "as they are in the files"
        pairs = [f"{a:.4g} to {b:.4g}" for a, b in zip(self.low, self.high, strict=True)]
        shown = ", ".join(pairs[:3] + ["..."] * (len(pairs) > 3))
        why = {
            "percentile": "each case's percentiles, clipped; medians",
            "window": "the window, clipped",
            "minmax": "each case's lowest and highest; medians",
            "zscore": "each case's mean -+ std; medians",
            "dataset": "mean -+ std of all training cases",
        }[self.scaling]
        return f"{shown} in the files become -1 to 1 ({why})"

    def numbers(self, info: CaseInfo | None, role: str = "image") -> tuple[tuple[float, ...], ...]:
        """The (low, high) to scale a case with: its own, or for scaling "dataset" those of the training set.

        info None: there is no case, such as for a sample; the numbers are those of the training set.
        """
        owner = self if info is None or self.scaling == "dataset" else info
        return (owner.low, owner.high) if role == "image" else (owner.source_low, owner.source_high)

    def to_volume(self, x: Tensor) -> Volume:
        """A sample x (C, *S) as a volume with the intensities of the training data, centred on 0 mm.

        Integer x, a label map, keeps its values.
        """
        array = x.detach().cpu().numpy()
        if x.is_floating_point():
            array = unscale(array.astype(np.float32), *self.numbers(None), self.clipped)
        return Volume(array, centred_affine(x.shape[1:], self.spacing), self.orientation)

    def as_file(self, volume: Volume, info: CaseInfo | None = None) -> Volume:
        """A volume of `to_volume` or `restore` as it is written: in the type of the training images.

        That is uint8, rounded and clipped to 0 to 255, or the floats as they are. info: the case whose
        intensities the volume has; None: those of the training data. A case of another type keeps floats.
        """
        if self.dtype != "uint8" or (info is not None and info.dtype != "uint8"):
            return volume
        return replace(volume, array=np.rint(volume.array).clip(0, 255).astype(np.uint8))


def make_spec(
    cases: list[Case],
    infos: dict[str, CaseInfo],
    split: dict[str, list[str]],
    config: DataConfig,
    multiple: tuple[int, ...] | None = None,
) -> DataSpec:
    """The spec of a data set, from what the inspection found in its training cases.

    The size is data.size, else the largest training shape, rounded up to `multiple`: training shapes (35, 51,
    30) and (38, 47, 36) with the multiple (8, 8, 8) give (40, 56, 40).
    """
    train = [infos[name] for name in split["train"]]
    largest = [max(info.shape[axis] for info in train) for axis in range(config.dims)]
    rounded = tuple(-(-n // m) * m for n, m in zip(largest, multiple or (1,) * config.dims, strict=True))
    labels = [label for case in cases if case.mask for label in infos[case.id].labels]
    num_labels = config.num_labels or len(config.label_values) or max(labels, default=0) + 1
    classes = [case.class_idx for case in cases if case.class_idx is not None]
    low, high = _typical([info.low for info in train], [info.high for info in train], config.scaling)
    source = ([info.source_low for info in train], [info.source_high for info in train])
    source_low, source_high = _typical(*source, config.scaling)
    return DataSpec(
        dims=config.dims,
        channels=len(low),
        source_channels=len(source_low),
        size=config.size or rounded,
        spacing=tuple(statistics.median(info.spacing[axis] for info in train) for axis in range(config.dims)),
        orientation=Counter(info.orientation for info in train).most_common(1)[0][0],
        scaling=config.scaling,
        low=low,
        high=high,
        source_low=source_low,
        source_high=source_high,
        num_labels=num_labels if any(case.mask for case in cases) else None,
        num_classes=max(classes) + 1 if classes else None,
        display=_display(train, low, high, config),
        dtype="uint8" if all(info.dtype == "uint8" for info in train) else "float32",
    )


def _display(
    train: list[CaseInfo], low: tuple[float, ...], high: tuple[float, ...], config: DataConfig
) -> tuple[float, float]:
    """The scaled intensities that pictures show as black and white: -1 and 1 where the scaling ends there,
    else the medians of what is black and white in each training case and channel.

    low, high: of the training set, which scale every case with scaling "dataset".
    """
    ends = []
    for info in train if config.unbounded else ():
        numbers = (low, high) if config.scaling == "dataset" else (info.low, info.high)
        ends += [(2 * np.array(s) - a - b) / (b - a) for s, a, b in zip(info.shown, *numbers, strict=True)]
    black, white = np.median(ends, 0).tolist() if ends else (-1.0, 1.0)
    return (black, white) if black < white else (-1.0, 1.0)


def _typical(low: list, high: list, scaling: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The scaling numbers of the training set, (low, high) per channel, from those of its cases.

    The medians; for scaling "dataset" mean - std and mean + std of all voxels, every case with the same
    weight:

        mean = E[means],    std^2 = E[stds^2 + means^2] - mean^2        over the cases
    """
    a, b = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)  # (cases, C)
    if scaling == "dataset":
        means, stds = (a + b) / 2, (b - a) / 2
        mean = means.mean(0)
        std = np.sqrt((stds**2 + means**2).mean(0) - mean**2)
        return tuple((mean - std).tolist()), tuple((mean + std).tolist())
    return tuple(np.median(a, 0).tolist()), tuple(np.median(b, 0).tolist())


def restore(
    x: Tensor, spec: DataSpec, info: CaseInfo, start: tuple[int, ...] | None = None, role: str = "image"
) -> Volume:
    """A window x (C, *S) of a case as a volume, with the intensities, affine and orientation of its file.

    start: the voxel of the case at which the window begins, as an item says it; None: the window is centred.
    Padding, which is what lies outside the case, is cropped. Integer x, a label map, keeps its values.
    """
    array = x.detach().cpu().numpy()
    if x.is_floating_point():
        array = unscale(array.astype(np.float32), *spec.numbers(info, role), spec.clipped)
    start = tuple(map(int, centred(info.shape, array.shape[1:]) if start is None else start))
    inside = [slice(max(0, -s), n - s) for n, s in zip(info.shape, start, strict=True)]
    affine = np.array(info.affine)
    affine[:-1, -1] += affine[:-1, :-1] @ np.maximum(start, 0)
    return Volume(np.ascontiguousarray(array[(slice(None), *inside)]), affine, info.orientation)
