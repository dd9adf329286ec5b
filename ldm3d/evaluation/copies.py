"""Are generated volumes copies of training cases? Users of medical data must know before they share samples.

    python -m ldm3d.evaluation copies runs/ldm-mine/samples-001 runs/ldm-mine    its own cases
    python -m ldm3d.evaluation copies GENERATED TRAIN --holdout OTHER_REAL_CASES

For each sample, and for each held-out real case, the distances d_1 <= d_2 ... to all training cases are
measured in two spaces:

image     1 - max over shifts, and flips or one turn, of <x', y> / (|x'| |y|), by FFT. Turns are rotations by
          5 and 10 degrees about one axis and zooms by 5 and 10 %. Volumes are averaged to at most 32 voxels
          (2-D: 96) along an axis, and their local mean is subtracted: what all cases share is mostly smooth
feature   Euclidean distance of the features of a network (networks.py), the least over flips. Features are
          means over space, so a shift hardly changes them

A blurred volume is near to every case. So what counts is how much nearer the nearest case is than others:

    r = d_1 / mean(d_1 ... d_50)                              Carlini et al. 2023 (2301.13188), section 5.1

Held-out cases say which r is usual for new cases. A sample is a copy if its r is below that of all n held-out
cases, and log r is more than 4 (1 + 4 / n) robust standard deviations (1.4826 x median absolute deviation)
below their median; with few held-out cases a copy has to be clearer. Example: 20 held-out cases have r from
0.85 to 0.95. A sample with r = 0.9 is a new case, a sample with r = 0.3 is a copy.

Image space decides. Feature space decides too if both spaces name the same training case; features alone
confuse cases that merely look alike. Without held-out cases each training case takes their role, against the
cases of other subjects.

For all samples together: z of Mann and Whitney's U, of the r of samples against the r of held-out cases
(Meehan et al. 2020, 2004.05675). z < -3 means that samples lie nearer to training cases than new cases do,
even if no single sample is a copy.

The new folder holds cases.csv, report.json and nearest.png (sample, nearest training case flipped and shifted
like the sample, difference). Copies of parts of a volume, deformed ones, and what was flipped and turned, or
turned further, are not found: the verdict says so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InputError, at_least, to_dict
from ..data import VolumeDataset
from ..engine.distributed import choose_device
from ..engine.logger import progress, save_sheet, visible
from ..metrics import psnr
from .networks import Extractor, contrastive_features, whole_features
from .openers import OpenConfig, VolumeSets, beside, is_run, open_sets, volumes_of
from .pairs import move
from .results import Rows, check_out, new_folder, table, write_csv, write_report

LARGEST = {2: 96, 3: 32}  # voxels along the longest axis in image space; larger volumes are averaged
NEAREST = 50  # training cases in the mean distance of r
ANGLES, ZOOMS = (-10, -5, 5, 10), (1 / 1.1, 1 / 1.05, 1.05, 1.1)  # turns (degrees) that are tried
NOT_FOUND = "not looked for: parts of a case, deformations, rotations beyond 12 degrees, zooms beyond 12 %"
SPREADS = 4.0  # robust standard deviations below the median: a copy


@dataclass(frozen=True)
class CopiesConfig:
    holdout: str | None = None  # real cases not trained on; none = of a run its val and test cases, else none
    features: str = "own"  # own (trained on TRAIN), run, none, or a file (TorchScript, torch.export, VGG-16)
    feature_steps: int = 200  # of training an own network
    run: str | None = None  # run folder whose grid, scaling and encoder count; none = TRAIN, if it is one
    flip_axes: tuple[int, ...] | None = None  # axes along which copies may be flipped; none = all
    max_shift: float = 0.25  # fraction of the size by which copies may be shifted
    shown: int = 8  # samples in the picture, nearest first; copies are always shown
    seed: int = 0  # of the own network
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    cache_dir: str = "runs/cache"  # where own networks are kept
    out: str | None = None  # new folder for the report; none = copies-001 (-002, ...) beside GENERATED
    data: OpenConfig = field(default_factory=OpenConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.max_shift <= 0.5:
            raise InputError(f"max_shift: expected 0 to 0.5, got {self.max_shift}")
        at_least(self, 0, "shown")
        at_least(self, 1, "feature_steps")


# --- distances ----------------------------------------------------------------------------------------------


def flips_of(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All combinations of flips along spatial axes, none first."""
    return [some for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)]


def turns_of(dims: int) -> dict[str, np.ndarray]:
    """{words: matrix (dims, dims)} of the turns that are tried, "" (none) first.

    A turned x has at position p from the centre the value of x at R p.
    """
    found = {"": np.eye(dims)} | {f"zoom {zoom:.2f}": np.eye(dims) / zoom for zoom in ZOOMS}
    for a, b in itertools.combinations(range(dims), 2):
        for angle in ANGLES:
            turn, (c, s) = np.eye(dims), (f(math.radians(angle)) for f in (math.cos, math.sin))
            turn[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
            found[f"{angle} degrees, axes {a} {b}"] = turn
    return found


def turned(x: Tensor, turn: np.ndarray, spacing: tuple[float, ...]) -> Tensor:
    """x (C, *S), turned about its centre; the edge is repeated. turn: as in `turns_of`, in mm."""
    centre = (np.array(x.shape[1:]) - 1) / 2 * spacing
    return torch.from_numpy(move(x.numpy(), turn, centre - turn @ centre, spacing, "bilinear"))


class ImageSearch:
    """Finds the greatest correlation of a volume (C, *S) with every training case, over shifts and flips.

    With `spacing` (mm) also over the turns of `turns_of`, each with shifts and without flips.
    """

    def __init__(
        self,
        volumes: Any,
        size: tuple[int, ...],
        max_shift: float,
        device: torch.device,
        spacing: tuple[float, ...] | None = None,
    ):
        self.spacing = spacing
        dims = len(size)
        self.size, self.dims, self.device = size, dims, device
        self.pool = tuple(min(n, -(-max(size) // LARGEST[dims])) for n in size)
        small = [n // p for n, p in zip(size, self.pool, strict=True)]
        self.reach = [int(max_shift * n) for n in small]
        # With this much room shifts up to `reach` do not wrap around
        self.room = [n + r for n, r in zip(small, self.reach, strict=True)]
        self.spectra = torch.stack(
            [torch.fft.rfftn(self.detail(x), s=self.room, dim=self.over) for x in volumes]
        )

    @property
    def over(self) -> tuple[int, ...]:
        return tuple(range(-self.dims, 0))

    def detail(self, x: Tensor) -> Tensor:
        """x (C, *S) as it is compared: averaged to (C, *s), minus its local mean over 5 voxels, of norm 1."""
        pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[self.dims]
        x = pool(x[None].to(self.device).float(), self.pool)
        x = (x - pool(x, 5, stride=1, padding=2, count_include_pad=False))[0]
        return x / x.norm().clamp(min=1e-12)

    def correlations(self, x: Tensor, flips: list[tuple[int, ...]]) -> tuple[Tensor, list[tuple]]:
        """(greatest correlation with each training case (N,), [(flipped axes, shift in voxels, words of the
        turn)] of each).

        A copy is the shifted training case: x'(p) = y(p - shift), where x' is the flipped or turned x.
        """
        num = len(self.spectra)
        best, found = torch.full((num,), -math.inf), [((), (0,) * self.dims, "")] * num
        detail = self.detail(x)
        views = [((axes, ""), detail.flip([a + 1 for a in axes])) for axes in flips]
        for words, turn in turns_of(self.dims).items() if self.spacing else ():
            if words:
                views.append((((), words), self.detail(turned(x.cpu().float(), turn, self.spacing))))
        for (axes, words), view in views:
            spectrum = torch.fft.rfftn(view, s=self.room, dim=self.over)
            for start in range(0, num, 64):
                product = (spectrum * self.spectra[start : start + 64].conj()).sum(1)
                surface = torch.fft.irfftn(product, s=self.room, dim=self.over)  # (n, *room), [s]: shift s
                values, peaks = self._within_reach(surface).flatten(1).max(1)
                for k, (value, peak) in enumerate(zip(values.tolist(), peaks.tolist(), strict=True), start):
                    if value > best[k]:
                        best[k], found[k] = value, (axes, self._shift(peak), words)
        return best, found

    def _shift(self, peak: int) -> tuple[int, ...]:
        """The shift in voxels of the sample that the place of a peak stands for."""
        shift = np.unravel_index(peak, self.room)
        signed = (s - n if s > r else s for s, n, r in zip(shift, self.room, self.reach, strict=True))
        return tuple(int(s) * p for s, p in zip(signed, self.pool, strict=True))

    def _within_reach(self, surface: Tensor) -> Tensor:
        """The correlations (n, *room) with -inf where the shift is too large."""
        for axis, (n, reach) in enumerate(zip(self.room, self.reach, strict=True), start=1):
            far = torch.arange(reach + 1, n - reach, device=surface.device)
            surface = surface.index_fill(axis, far, -math.inf)
        return surface


def aligned(y: Tensor, flips: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
    """A training case y (C, *S) in the position of the sample: shifted (its edge repeated) and flipped."""
    for axis, s in enumerate(shift, start=1):
        voxels = (torch.arange(y.shape[axis]) - s).clamp(0, y.shape[axis] - 1)
        y = y.index_select(axis, voxels)
    return y.flip([a + 1 for a in flips])


def nearness(distances: Tensor) -> tuple[float, int, float]:
    """The nearest training case by the distances (N,) to all of them: (r, its index, its distance)."""
    ordered, order = distances.double().clamp(min=0).sort()
    usual = ordered[ordered.isfinite()][:NEAREST].mean().clamp(min=1e-12)
    return (ordered[0] / usual).item(), int(order[0]), ordered[0].item()


def rank_z(values: np.ndarray, others: np.ndarray) -> float:
    """z of Mann and Whitney's U: below 0 if `values` tend to be smaller than `others`. Ties share a rank."""
    n, m = len(values), len(others)
    both = np.concatenate([values, others])
    _, group, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = (counts**3 - counts).sum() / ((n + m) * (n + m - 1))
    spread = math.sqrt(n * m / 12 * (n + m + 1 - ties))
    return float((u - n * m / 2) / spread) if spread > 0 else math.nan


def limit_of(held_out: np.ndarray) -> float:
    """The r below which a sample is a copy, from the r (n,) of held-out cases."""
    logs = np.log(np.maximum(held_out, 1e-12))
    spread = max(0.02, 1.4826 * np.median(np.abs(logs - np.median(logs))))
    return float(np.exp(min(logs.min(), np.median(logs) - SPREADS * (1 + 4 / len(logs)) * spread)))


# --- the audit ----------------------------------------------------------------------------------------------


@dataclass
class Nearest:
    """The nearest training case of one case, in one space."""

    ratio: float
    index: int
    distance: float
    flips: tuple[int, ...] = ()  # axes
    shift: tuple[int, ...] = ()  # voxels
    turn: str = ""  # a key of turns_of


def spacing_of(train: VolumeDataset) -> tuple[float, ...]:
    """mm per voxel of the grid, or 1 where cases have spacings of their own."""
    return tuple(train.spec.spacing or (1.0,) * train.spec.dims)


def in_image_space(
    sets: VolumeSets, names: list[str], config: CopiesConfig, device: torch.device
) -> dict[str, list[Nearest]]:
    """Name of a set -> the nearest training case of each of its cases, by correlation of images."""
    train = sets.sets["train"]
    axes = _flip_axes(config, train.spec.dims)
    search = ImageSearch(volumes_of(train), train.spec.size, config.max_shift, device, spacing_of(train))
    found: dict[str, list[Nearest]] = {}
    for name in names:
        found[name] = []
        for i, x in enumerate(
            progress(volumes_of(sets.sets[name]), f"searching {name}", len(sets.sets[name]))
        ):
            correlations, how = search.correlations(x, flips_of(axes))
            distances = 1 - correlations
            if name == "train":
                distances = _without(distances, train, i)
            ratio, index, distance = nearness(distances)
            found[name].append(Nearest(ratio, index, distance, *how[index]))
    return found


def in_feature_space(
    sets: VolumeSets, names: list[str], config: CopiesConfig, network: Extractor
) -> dict[str, list[Nearest]]:
    """Name of a set -> the nearest training case of each of its cases, by features, least over flips."""
    train = sets.sets["train"]
    flips = flips_of(_flip_axes(config, train.spec.dims))
    training = torch.cat(
        [network(x[None]) for x in progress(volumes_of(train), "features", len(train))]
    ).double()
    found: dict[str, list[Nearest]] = {}
    for name in names:
        found[name] = []
        for i, x in enumerate(progress(volumes_of(sets.sets[name]), "features", len(sets.sets[name]))):
            views = torch.cat([network(x[None].flip([a + 2 for a in axes])) for axes in flips]).double()
            distances = (
                torch.cdist(views, training, compute_mode="donot_use_mm_for_euclid_dist").min(0).values
            )
            if name == "train":
                distances = _without(distances, train, i)
            found[name].append(Nearest(*nearness(distances)))
    return found


def _flip_axes(config: CopiesConfig, dims: int) -> tuple[int, ...]:
    axes = tuple(range(dims)) if config.flip_axes is None else config.flip_axes
    if not all(0 <= a < dims for a in axes):
        raise InputError(f"flip_axes: expected axes from 0 to {dims - 1}, got {axes}")
    return axes


def _without(distances: Tensor, train: VolumeDataset, index: int) -> Tensor:
    """The distances, with inf for all cases of the subject of the case at `index`, itself included."""
    subjects = [case.subject for case in train.cases]
    same = torch.tensor([s == subjects[index] for s in subjects])
    return distances.masked_fill(same.to(distances.device), math.inf)


def check_subjects(subjects: list[str]) -> None:
    """InputError if training cases of these subjects cannot take the role of held-out cases.

    A case needs two cases of other subjects. With one, r = d_1 / d_1 = 1 whatever the case: no limit at all.
    """
    for subject in dict.fromkeys(subjects):
        others = len(subjects) - subjects.count(subject)
        if others < 2:
            raise InputError(
                f"train: {others} of {len(subjects)} cases are not of subject {subject}, expected at least 2 "
                "to measure by; give held-out cases with --holdout"
            )


def find_copies(config: CopiesConfig, generated: str, train: str) -> Path:
    """Look for copies and write the report; returns its folder. InputError names what does not fit."""
    check_out(config.out)
    device = choose_device(config.device)
    real = {"train": (train, "train")}
    if config.holdout is not None or is_run(train):
        real["holdout"] = (config.holdout or train, "held-out")
    sets = open_sets(generated, real, config.data, config.run)
    if len(sets.sets["train"]) < 3:
        raise InputError(f"train: {len(sets.sets['train'])} cases, expected at least 3")
    reference = "holdout" if "holdout" in real else "train"
    if reference == "train":
        check_subjects([case.subject for case in sets.sets["train"].cases])
    names = ["generated", reference]

    def own(dataset: VolumeDataset) -> Extractor:
        return contrastive_features(dataset, config.feature_steps, config.seed, config.cache_dir, device)

    network = whole_features(sets, "train", config, own, device)
    spaces = {"image": in_image_space(sets, names, config, device)}
    if network is not None:
        spaces["feature"] = in_feature_space(sets, names, config, network)
    rows, verdicts = judge(sets, spaces, reference)
    copies = [name for name, row in rows.items() if row["copy"]]
    report = {
        **to_dict(config),
        "generated": generated,
        "train": train,
        "cases": {name: len(dataset) for name, dataset in sets.sets.items()},
        "reference": "held-out cases" if reference == "holdout" else "training cases against other subjects'",
        "protocol": sets.protocol,
        "network": network and network.describe(),
        "spaces": verdicts,
        "copies": copies,
        "share_of_copies": len(copies) / len(rows),
        "verdict": verdict(len(copies), len(rows), verdicts, len(sets.sets[reference]), reference),
    }
    folder = new_folder(beside(generated), config.out, "copies")
    write_csv(folder / "cases.csv", rows)
    write_report(folder / "report.json", report)
    picture = draw(folder / "nearest.png", sets, spaces["image"]["generated"], rows, config.shown)
    print_summary(report, rows)
    print(f"{folder}" + (f", {picture}" if picture else ""))
    return folder


def judge(
    sets: VolumeSets, spaces: dict[str, dict[str, list[Nearest]]], reference: str
) -> tuple[Rows, dict[str, dict[str, float]]]:
    """(sample -> row of cases.csv, space -> its figures for the report)."""
    names = {name: [case.id for case in dataset.cases] for name, dataset in sets.sets.items()}
    rows: Rows = {name: {"copy": False} for name in names["generated"]}
    found = {}
    for space, nearest in spaces.items():
        generated, usual = (np.array([n.ratio for n in nearest[name]]) for name in ("generated", reference))
        limit = limit_of(usual)
        for row, one in zip(rows.values(), nearest["generated"], strict=True):
            row[f"{space}_nearest"] = names["train"][one.index]
            row[f"{space}_ratio"], row[f"{space}_distance"] = one.ratio, one.distance
            row[f"{space}_copy"] = one.ratio < limit
            if space == "image":
                row["flipped_axes"] = " ".join(map(str, one.flips))
                row["shift_voxels"] = " ".join(map(str, one.shift))
                row["turned"] = one.turn
            row["copy"] |= row[f"{space}_copy"] and row[f"{space}_nearest"] == row["image_nearest"]
        found[space] = {
            "limit": limit,
            "copies": int((generated < limit).sum()),
            "generated_median": float(np.median(generated)),
            "reference_median": float(np.median(usual)),
            "reference_min": float(usual.min()),
            "rank_z": rank_z(generated, usual),
        }
    return rows, found


def verdict(
    copies: int, samples: int, spaces: dict[str, dict[str, float]], references: int, kind: str
) -> str:
    """One sentence for those who read nothing else, with what weakens the finding."""
    words = (
        f"{copies} of {samples} samples are copies of training cases"
        if copies
        else (f"no copies of training cases among {samples} samples")
    )
    lowest = min((s["rank_z"] for s in spaces.values() if not math.isnan(s["rank_z"])), default=math.nan)
    if lowest < -3:
        words += f"; samples lie nearer to training cases than new real cases do (rank z = {lowest:.1f})"
    if kind == "train":
        words += "; measured by training cases, since there are no held-out cases: --holdout is surer"
    if references < 20:
        words += f"; only {references} real cases to measure by, so only clear copies are found"
    return f"{words}; {NOT_FOUND}"


def draw(path: Path, sets: VolumeSets, nearest: list[Nearest], rows: Rows, shown: int) -> Path | None:
    """Draw samples beside their nearest training case in the same position, copies first, nearest first."""
    generated, train = sets.sets["generated"], sets.sets["train"]
    display = train.spec.display
    listed = list(rows.items())
    order = sorted(range(len(listed)), key=lambda i: (not listed[i][1]["copy"], listed[i][1]["image_ratio"]))
    order = order[: max(shown, sum(row["copy"] for row in rows.values()))][:64]  # a picture has its limits
    sheet = {}
    for i in order:
        name, row = listed[i]
        x = generated[i, i]["image"]
        y = aligned(train[nearest[i].index, nearest[i].index]["image"], nearest[i].flips, nearest[i].shift)
        if nearest[i].turn:
            turn = turns_of(train.spec.dims)[nearest[i].turn]
            y = turned(y, np.linalg.inv(turn), spacing_of(train))
        near = psnr(x[None], y[None], 2.0).item()
        title = (
            f"{'COPY: ' if row['copy'] else ''}{name} | {row['image_nearest']} | difference   {near:.1f} dB"
        )
        sheet[title] = [visible(v, display) for v in (x, y, x - y + sum(display) / 2)]
    return save_sheet(path, sheet, display) if sheet else None


def print_summary(report: dict[str, Any], rows: Rows) -> None:
    """The figures of each space, the copies and the verdict, on the console."""
    lines = [("space", "copies", "limit of r", "samples", "reference", "least", "rank z")]
    for name, s in report["spaces"].items():
        numbers = (s["generated_median"], s["reference_median"], s["reference_min"], s["rank_z"])
        lines.append((name, s["copies"], s["limit"], *numbers))
    print(table(lines))
    for name in report["copies"]:
        row = rows[name]
        where = ", ".join(
            f"{space} r {row[f'{space}_ratio']:.3f} {row[f'{space}_nearest']}" for space in report["spaces"]
        )
        print(f"copy  {name}: {where}")
    print(report["verdict"])
