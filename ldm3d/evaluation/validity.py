"""Are generated label maps anatomically plausible, and does training on generated cases help on real ones?

Label validity asks what no intensity shows: is the organ as large as real ones, does it lie where real ones
lie, is it in one piece? `label_shapes` measures volume, position and pieces of every label in every map;
`label_validity` compares the distributions of a generated and a real set, label by label:

    volume_wasserstein    Wasserstein distance of the volumes, in standard deviations of the real ones
    position_wasserstein  Wasserstein distance of the centroids, mm, mean over axes
    volume_ks, position_ks        Kolmogorov-Smirnov distance of the same, 0 (alike) to 1 (apart)
    one_component         share of the generated labels that are one connected component

Example: real livers have 1500 +- 300 ml. Generated ones have 1800 +- 300 ml. Then volume_wasserstein is 1:
to turn one distribution into the other, every liver moves by one standard deviation.

`train_on_synthetic` asks what generated pairs of image and mask are worth. A segmentation network learns from
real cases, from generated cases, and from both, and each network is scored on real test cases that neither
generator nor network has seen. If "both" beats "real", generated cases add something; how far "generated"
falls behind "real" says what they lack (Ravuri & Vinyals 2019, arXiv 1905.10887, for classifiers).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import VolumeDataset
from ..data.volumes import is_volume_file
from ..engine.logger import progress
from ..metrics import dice
from .morphology import label_components
from .statistics import ks_distance, wasserstein_distance

# --- label validity -----------------------------------------------------------------------------------------


def label_shapes(masks: Iterable[np.ndarray], spacing: Sequence[float], num_labels: int) -> np.ndarray:
    """How large and where every label but the background is in N label maps (*S): (N, K - 1, 2 + dims).

    The last axis holds the volume (mm^3; mm^2 in 2-D), the number of connected components, and the centroid
    (mm from the middle of the map, one number per axis; nan where the label is missing).
    """
    mm, maps = np.asarray(tuple(spacing), dtype=np.float64), []
    for mask in masks:
        middle, shapes = (np.asarray(mask.shape) - 1) / 2, []
        for label in range(1, num_labels):
            inside = mask == label
            centroid = np.full(mask.ndim, math.nan)
            if inside.any():
                centroid = (np.argwhere(inside).mean(0) - middle) * mm
            shapes.append([inside.sum() * mm.prod(), label_components(inside).max(), *centroid])
        maps.append(shapes)
    return np.asarray(maps, dtype=np.float64)


def label_validity(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The figures of the module docstring, means over labels, of two results of `label_shapes`.

    A position that one of the sets never has (no map holds the label) is left out of the mean.
    """
    volume, position = [], []
    for label in range(real.shape[1]):
        a, b = generated[:, label, 0], real[:, label, 0]
        volume.append((wasserstein_distance(a, b) / max(b.std(), 1e-9), ks_distance(a, b)))
        for axis in range(2, real.shape[2]):
            a, b = (v[:, label, axis][np.isfinite(v[:, label, axis])] for v in (generated, real))
            if len(a) and len(b):
                position.append((wasserstein_distance(a, b), ks_distance(a, b)))
    found = {}
    for name, pairs in (("volume", volume), ("position", position)):
        means = np.mean(pairs, axis=0) if pairs else (math.nan, math.nan)
        found[f"{name}_wasserstein"], found[f"{name}_ks"] = map(float, means)
    return found | {"one_component": float((generated[..., 1] == 1).mean())}


# --- training on generated cases ----------------------------------------------------------------------------

PairedFile = tuple[Path, Path, str]  # image, mask, part ("train" or "val")


def generated_pairs(folder: Path, validate: bool) -> list[PairedFile]:
    """The images of a folder of samples with their label maps in its folder labels/.

    validate: every tenth pair is for validation, for a network that sees no real case; else all are for
    training.
    """
    images = sorted(p.resolve() for p in folder.iterdir() if is_volume_file(p) and p.suffix != ".png")
    parts = ["val" if validate and i % 10 == 0 else "train" for i in range(len(images))]
    return [(image, image.parent / "labels" / image.name, p) for image, p in zip(images, parts, strict=True)]


def write_cases(folder: Path, cases: Iterable[PairedFile]) -> Path:
    """Write cases.csv into a new folder, so that a training script can read the cases: --data.root FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split"), *cases])
    return folder / "cases.csv"


def train_on_synthetic(
    real: list[PairedFile], samples: Path, fit: Callable[[str, list[PairedFile]], Any]
) -> dict[str, Any]:
    """Train a network on each kind of cases: {"generated", "real", "both": fit(name, cases)}.

    real: training and validation cases. samples: folder of generated images with labels/. fit: trains a
    network from cases and returns its score on real test cases, such as `dice_of_labels`. Real cases alone
    validate where there are any.
    """
    kinds = {
        "generated": generated_pairs(samples, validate=True),
        "real": real,
        "both": [*real, *generated_pairs(samples, validate=False)],
    }
    return {name: fit(name, cases) for name, cases in kinds.items()}


@torch.inference_mode()
def dice_of_labels(segment: Callable[[Tensor], Tensor], cases: VolumeDataset) -> list[float]:
    """Dice of every label but the background, mean over cases that have a mask.

    segment: image (C, *S), scaled -> label map (*S).
    """
    rows = []
    for i in progress(range(len(cases)), "segmenting"):
        item = cases[i, i]
        found = segment(item["image"]).cpu()
        rows.append(dice(found[None], item["mask"][None], cases.spec.num_labels)[0])
    return torch.stack(rows).nanmean(0).tolist()
