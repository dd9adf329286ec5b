"""The plan: from a folder of images to the settings of a run, by rules that a person can read.

    python train_vae.py FOLDER

takes the fingerprint of the folder (data/fingerprint.py) and asks the rules below, from top to bottom. Each
rule decides one setting or a few and says why. The idea is nnU-Net's (Isensee et al. 2021, Nature Methods
18:203): what depends on the data is computed from the data, what depends on the machine from its memory, and
the rest is fixed by experience. Here experience is that of the presets, which people made by hand.

A setting that a person gives by a flag is not planned, and the rules after it work with the value given.
Example: with --data.patch 64,64,64 the batch is chosen for such patches.

The number of steps follows from the time that a person has (--hours) and from how long a step takes, which
is measured. It also follows from the number of cases: diffusion models begin to memorise after a number of
steps in proportion to it (Bonnaire et al. 2025, arXiv 2505.17638).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import InputError, show, stored_settings
from .data import Data, DataConfig
from .data.fingerprint import READING, Fingerprint
from .data.opening import open_stored
from .engine.checkpoint import load_latest, load_run, step_files, write_text
from .engine.distributed import gather, is_main, print0, setup, world_size
from .engine.logger import WIDTH, duration, plural
from .engine.memory_plan import MemoryTable
from .engine.runs import changed_case, load_init
from .unet import SLOW_ATTENTION, UNetConfig

PLAN_FILE = "plan.json"
VAE_PASSES = CDAL_PASSES = (2000, 5000)  # most passes over the training cases, least steps; see `plan_length`
VALIDATE_EVERY = 5  # minutes at least, if a run takes all of its hours
LDM_PASSES = {False: (100, 500), True: (300, 500)}  # the same, by: in variants?
HOURS = {False: 1.0, True: 12.0}  # of training where --hours does not say it, by GPU
SHORT = 0.5  # hours, below which a run is short: more steps teach more than wider levels and larger patches


@dataclass(frozen=True)
class Choice:
    """One line of a plan: a setting by its dotted key, its value, and the reason in a few words."""

    key: str
    value: Any
    why: str


class Plan:
    """The choices so far. given: the person's own settings, by dotted key, which no rule overrides; base: the
    same of a run whose network is taken over."""

    def __init__(self, given: dict[str, Any], base: dict[str, Any] | None = None):
        self.given, self.base = given, base or {}
        self.choices, self.notes = [], []

    def set(self, key: str, value: Any, why: str) -> Any:
        """Add a choice, and return the value in force: the given one, where there is one."""
        if key in self.given:
            value, why = self.given[key], "given"
        elif key in self.base:
            value, why = self.base[key], "of the run that is taken over"
        self.choices = [choice for choice in self.choices if choice.key != key]
        self.choices.append(Choice(key, value, why))
        return value

    @property
    def values(self) -> dict[str, Any]:
        """The settings by dotted key, without the given ones."""
        planned = {choice.key: choice.value for choice in self.choices if choice.key not in self.given}
        return self.base | planned

    def table(self) -> str:
        """The notes, then setting, value and reason, a choice a line, or more where the reason is long."""
        columns = [(c.key, show(c.value) or "none", c.why) for c in self.choices]
        left, middle = (max((len(row[i]) for row in columns), default=0) for i in (0, 1))
        middle = min(middle, 34)
        lines = [f"note: {note}" for note in self.notes]
        for key, value, why in columns:
            start = f"{key:{left}}  {value:{middle}}  "
            indent = " " * (left + middle + 4)
            lines += textwrap.wrap(why, WIDTH, initial_indent=start, subsequent_indent=indent) or [start]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """plan.json in a run folder: a list of {key, value, why}."""
        rows = [{"key": c.key, "value": c.value, "why": c.why} for c in self.choices]
        write_text(folder / PLAN_FILE, json.dumps(rows, indent=1) + "\n")


@dataclass(frozen=True)
class Machine:
    """What a plan may use: a GPU or only CPUs, hours of training, and whether a run fits into the memory.

    training_fits, validation_fits: would a run with these settings, by dotted key, fit?
    """

    gpu: bool
    hours: float
    training_fits: Callable[[dict[str, Any]], bool]
    validation_fits: Callable[[dict[str, Any]], bool]
    ranks: int = 1  # processes, among which a batch is divided

    @property
    def short(self) -> bool:
        return self.hours < SHORT

    def shared(self, batch: int) -> int:
        """A batch of at least this many samples that all ranks get the same part of."""
        return -(-batch // self.ranks) * self.ranks


# --- data: what the files are -------------------------------------------------------------------------------

RESAMPLE_FROM = 1.5  # ratio of the largest to the smallest spacing along an axis
HU = (-1024.0, 3071.0)  # the range of 12-bit CT
AIR = -900.0  # HU; resampled CT holds air too, but no integers any more
SYMMETRIC = 0.97  # a flipped case looks like this fraction as much like other cases as an unflipped one
NO_POSE = 0.1  # correlation of cases below which no way up is usual


def plan_files(plan: Plan, f: Fingerprint) -> None:
    """Which files are what: as the fingerprint recognised it."""
    for key, value in f.settings.items():
        plan.set(key, value, f.reasons.get(key, "the folder"))
    n = len(f.labels)
    if f.labels and f.labels != tuple(range(n)):
        plan.set("data.label_values", f.labels, f"the masks hold these values: labels 0 to {n - 1}")
    plan.notes += f.notes


def plan_split(plan: Plan, f: Fingerprint) -> None:
    """A tenth of the subjects validates, a fifth of few. One subject validates on its own middle slices.

    A split that is given or stated by the table is kept, and so are folds. Nothing is planned beside them.
    """
    n, parts = f.num_subjects, f.parts
    if parts or plan.given.get("data.fold") or plan.given.get("data.split"):
        counts = ", ".join(f"{part} {num}" for part, num in parts.items())
        plan.notes += [f"the table states the split: {counts}"] if parts else []
    elif n == 1 and f.num_cases >= 10 and not plan.given.get("data.test_fraction"):
        plan.set("data.val_fraction", 0.15, "one subject: its middle cases validate")
        plan.set("data.val_gap", 2, "neighbours of these cases look alike and are left out")
    elif n == 1 and f.num_cases == 1:
        plan.set("data.val_fraction", 0.0, "a single case: nothing is left to validate on")
    elif n == 1:
        plan.set("data.subject", None, "one subject: each of its cases counts as a subject")
        plan.set("data.val_fraction", 0.2, "a fifth of these cases validates")
    else:
        fraction = 0.2 if n < 20 else 0.1 if n <= 500 else round(50 / n, 4)
        num = max(1, round(fraction * n))
        plan.set("data.val_fraction", fraction, f"{num} of {n} subjects validate, {n - num} train")


def grid_of(f: Fingerprint, spacing: tuple[float, ...] | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(voxels of the largest case, spacing) where cases are resampled to `spacing`; None: they are not."""
    if spacing is None:
        return f.largest, f.spacing
    grids = (
        tuple(math.ceil(n * old / new) for n, old, new in zip(shape, mm, spacing, strict=True))
        for shape, mm in zip(f.shapes, f.spacings, strict=True)
    )
    return tuple(map(max, zip(*grids, strict=True))), tuple(spacing)


def plan_spacing(plan: Plan, f: Fingerprint) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(voxels of the largest case, spacing) on the training grid. Voxels stay as they are unless spacings
    differ much: then the median spacing is everyone's."""
    ratios = [max(axis) / min(axis) for axis in zip(*f.spacings, strict=True)]
    differ = f"differ by a factor of {max(ratios):.3g}" if max(ratios) > 1.005 else "are alike"
    wanted, why = None, f"spacings {differ}: voxels stay as they are"
    if max(ratios) > RESAMPLE_FROM:
        wanted = tuple(round(mm, 4) for mm in f.spacing)
        why = f"spacings {differ}: resampled to the median"
    return grid_of(f, plan.set("data.spacing", wanted, why))


def is_ct(f: Fingerprint) -> bool:
    """Hounsfield units: said by the files, or the lowest value is that of air, or of fat among integers.

    CT that somebody has scaled already, such as to 0 and 1, has no Hounsfield units any more.
    """
    in_range = f.extremes[0] >= -3100 and f.extremes[1] <= 33000
    said = f.modality.upper().startswith("CT") and f.robust[1] - f.robust[0] >= 100
    return said or (in_range and f.lowest <= (-100 if f.integers else AIR))


def plan_scaling(plan: Plan, f: Fingerprint) -> None:
    """Two numbers become -1 and 1. CT: the same for every case, so that a Hounsfield unit stays one."""
    if f.num_values:
        plan.set("data.scaling", "minmax", f"shapes: at most {f.num_values} values, integers")
    elif is_ct(f):
        plan.set("data.scaling", "window", "CT: Hounsfield units mean the same in every case")
        low = max(HU[0], math.floor(f.robust[0] / 10) * 10.0)
        high = min(HU[1], math.ceil(f.robust[1] / 10) * 10.0)
        plan.set("data.window", (low, high), "HU that hold 99 % of the voxels of every case")
    elif f.integers and f.extremes[0] >= 0 and f.extremes[1] <= 255:
        plan.set("data.scaling", "minmax", "8-bit images")
    else:
        plan.set("data.scaling", "percentile", "intensities without a unit, such as MR: each case by its own")


def plan_flips(plan: Plan, f: Fingerprint) -> tuple[int, ...]:
    """Flips only where a flipped case, and its label map, look like the data: (the flipped axes). Volumes are
    flipped from left to right alone."""
    key = "data.augment.flip_axes"
    if f.sides:
        return plan.set(key, (), f"left and right have names: {f.sides}")
    if f.dims == 2 and abs(f.pose) < NO_POSE:
        axes = plan.set(key, (0, 1), "images have no usual way up")
        if len(set(f.shapes)) == 1 and len(set(f.shapes[0])) == 1:
            plan.set("data.augment.rot90_axes", (0, 1), "nor a usual side")
        return axes
    candidates = (0,) if f.dims == 3 else (0, 1)
    alike = {axis: f.mirrored[axis] / max(f.pose, 1e-9) for axis in candidates}
    axes = tuple(axis for axis in candidates if f.num_cases > 1 and alike[axis] >= SYMMETRIC)
    if sided := sorted(set(axes) & set(f.sided)):
        axes = tuple(axis for axis in axes if axis not in sided)
        return plan.set(
            key, axes, f"a label always lies on the same side of the others along axis {sided[0]}"
        )
    names = ("left-right",) if f.dims == 3 else ("up-down", "left-right")
    ratios = ", ".join(f"{names[axis]} {min(1.0, max(0.0, alike[axis])):.0%}" for axis in candidates)
    why = f"flipped cases look as much like the others as unflipped ones do, by {ratios}; "
    why += f"flips need {SYMMETRIC:.0%}"
    return plan.set(key, axes, why)


def plan_reading(plan: Plan, f: Fingerprint, gpu: bool, num_cores: int) -> None:
    """Volumes stay decoded in memory, or on the disk where that is too much. A patch from the disk takes some
    hundredths of a second, which a process of its own spends while the network computes."""
    gib = 4 * f.channels * sum(map(math.prod, f.shapes)) / 2**30
    if gib > 8:
        plan.set("data.cache", "disk", f"up to {gib:.0f} GiB decoded: prepared files, read patch by patch")
    if gpu:
        plan.set("run.workers", min(4, num_cores), "processes that read while the GPU computes")
    elif gib > 8 and num_cores > 1:
        plan.set("run.workers", 1, "a process that reads from the disk while the network computes")


# --- networks: what shape the grid asks for -----------------------------------------------------------------

STEP_VOXELS = {2: 128**2, 3: 36**3}  # of a training patch on CPUs: one step takes about half a second
SHORT_VOXELS = {2: 128**2, 3: 32**3}  # the same for a short time
GPU_PATCH = {2: 512**2, 3: 112 * 128 * 80}
FILLED = 0.8  # part of a padded case that the median case fills, below which patches must show the padding
LATENT_POSITIONS = {False: 4096, True: 65536}  # by GPU: latents with more are halved once more


def halvings(size: tuple[int, ...], spacing: tuple[float, ...], num: int) -> tuple[tuple[int, ...], ...]:
    """Factor 1 or 2 of each axis, for `num` down-samplings or fewer. An axis is halved while it has 8 voxels
    or more, and while they are shorter than twice the shortest of such axes: thick slices are halved less.

    Example: 0.7 x 0.7 x 2.5 mm, three times: (2, 2, 1), (2, 2, 2), (2, 2, 2).
    """
    found = []
    for _ in range(num):
        finest = min((mm for mm, n in zip(spacing, size, strict=True) if n >= 8), default=0.0)
        factors = tuple(
            2 if mm < 2 * finest - 1e-6 and n >= 8 else 1 for n, mm in zip(size, spacing, strict=True)
        )
        if max(factors) == 1:
            break
        size = tuple(math.ceil(n / k) for n, k in zip(size, factors, strict=True))
        spacing = tuple(mm * k for mm, k in zip(spacing, factors, strict=True))
        found.append(factors)
    return tuple(found)


def levels(
    plan: Plan, widths: str, size: tuple[int, ...], spacing: tuple[float, ...], num: int, stem: bool = False
) -> tuple[tuple[int, ...], ...]:
    """`num` halvings or fewer, and one down-sampling at least with a stem. Where a person gives the setting
    `widths`, as many as these need: one between two levels, and one before the first with a stem."""
    least = int(stem)
    if fixed := (plan.base | plan.given).get(widths):
        num = least = max(least, len(fixed) - (not stem))
    found = halvings(size, spacing, num)
    return found + ((1,) * len(size),) * (least - len(found))


def total(factors: tuple[tuple[int, ...], ...], dims: int) -> tuple[int, ...]:
    """The factors of several down-samplings, multiplied for each axis."""
    return tuple(math.prod(factor[axis] for factor in factors) for axis in range(dims))


def rounded_up(size: tuple[int, ...], multiple: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // m) * m for n, m in zip(size, multiple, strict=True))


def shrink(size: tuple[int, ...], spacing: tuple[float, ...], multiple: tuple[int, ...], most: int) -> tuple:
    """The largest patch of at most `most` voxels within `size`, in multiples: the axis that is longest in mm,
    and has more than one multiple left, is shortened again and again."""
    size = list(size)
    while math.prod(size) > most:
        axes = [a for a in range(len(size)) if size[a] > multiple[a]]
        if not axes:
            break
        longest = max(axes, key=lambda a: size[a] * spacing[a])
        size[longest] -= multiple[longest]
    return tuple(size)


def by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def halved_once_more(size: tuple[int, ...], multiple: tuple[int, ...]) -> tuple[int, ...]:
    """Multiples for cases whose latents the denoiser halves once more, but not along an axis that has become
    short."""
    return tuple(m * (2 if n >= 8 * m else 1) for n, m in zip(size, multiple, strict=True))


def plan_autoencoder(
    plan: Plan, f: Fingerprint, size: tuple[int, ...], spacing: tuple[float, ...], machine: Machine
) -> tuple[tuple[int, ...], ...]:
    """Levels, widths and the latent of the autoencoder: (its down-samplings). Two halvings, three where the
    latent would still be large for the denoiser."""
    gpu, short = machine.gpu, machine.short
    plan.set("vae.dims", f.dims, f"the images are {f.dims}-D")
    channels = f"{f.channels} channel{'s' * (f.channels > 1)}"
    plan.set("vae.in_channels", f.channels, f"the images have {channels}")
    factors = levels(plan, "vae.channels", size, spacing, 2, stem=not gpu)
    latent = math.prod(rounded_up(size, total(factors, f.dims))) / math.prod(total(factors, f.dims))
    if latent > LATENT_POSITIONS[gpu]:
        factors = levels(plan, "vae.channels", size, spacing, 3, stem=not gpu)
    by_axis = total(factors, f.dims)
    padded = plan.given.get("data.size") or rounded_up(size, halved_once_more(size, by_axis))
    latent_size = tuple(-(-n // k) for n, k in zip(padded, by_axis, strict=True))
    why = f"latents of {by(latent_size)}: an axis is halved while its voxels are not twice as long as others"
    if gpu:
        plan.set("vae.strides", factors, why)
        widths = (64, 128, 256, 256)[: len(factors) + 1]
        plan.set("vae.channels", widths, "a GPU: as MONAI's tutorial of latent diffusion")
    else:
        plan.set("vae.stem", factors[0], "CPUs: the first halving is a rearrangement, which costs nothing")
        plan.set("vae.strides", factors[1:], why)
        wide = 128 if f.dims == 3 and not short else 64
        widths = {1: (32,), 2: (32, wide)}.get(len(factors), (32, 64, 96 if short else 128))
        why = ", and narrower for a short time" if short else ""
        plan.set("vae.channels", widths, f"CPUs: narrow where the grid is fine{why}")
        plan.set("vae.num_res_blocks", (1,), "CPUs: one block a level makes short steps")
        plan.set("vae.num_groups", 8, "levels are narrow: groups of few channels for the normalisation")
        plan.set("vae.upsample", "deconv2", "CPUs: faster than repeating voxels, and sharp sooner")
        plan.set("vae.shortcut", True, "a linear map beside the layers: far fewer steps to sharp images")
    few = f.dims == 2 and len(factors) < 3
    why = f"{math.prod(by_axis)} voxels share a position of the latent"
    why = "shapes are simple" if f.num_values else why
    plan.set("vae.latent_channels", 4 if few or f.num_values else 8, why)
    return factors


def plan_size(plan: Plan, size: tuple[int, ...], multiple: tuple[int, ...]) -> tuple[int, ...]:
    """Whole cases: the largest, padded to what the networks can halve. No case is cut."""
    padded = rounded_up(size, multiple)
    why = f"the largest case has {by(size)}; padded to multiples of {by(multiple)}, nothing is cut"
    return tuple(plan.set("data.size", padded, why) or padded)


def plan_patch(
    plan: Plan,
    whole: tuple[int, ...],
    largest: tuple[int, ...],
    median: tuple[int, ...],
    spacing: tuple[float, ...],
    multiple: tuple[int, ...],
    machine: Machine,
) -> None:
    """Patch and batch: as large as the memory allows, on CPUs as a short step allows. A patch that is larger
    than most cases would be padding; along no axis is a patch longer than every case."""
    dims = len(whole)
    most = (GPU_PATCH if machine.gpu else SHORT_VOXELS if machine.short else STEP_VOXELS)[dims]
    inside = tuple(max(m, n // m * m) for n, m in zip(largest, multiple, strict=True))
    patch = whole
    if math.prod(whole) > 1.25 * most:
        typical = tuple(map(min, inside, rounded_up(median, multiple)))
        patch = shrink(typical, spacing, multiple, most)
    limit = "a step on a GPU" if machine.gpu else "a short step on CPUs"
    why = "whole cases" if patch == whole else f"{limit}: at most {most} voxels"
    start = {2: 4, 3: 2} if not machine.gpu else {2: 16, 3: 4}
    batch, least = machine.shared(start[dims]), machine.ranks
    plan.set("data.patch", None if patch == whole else patch, why)
    why = "fills a GPU" if machine.gpu else "small batches make short steps"
    plan.set("batch_size", batch, f"{why}, {dims}-D")
    while not machine.training_fits(plan.values):
        if batch > least:
            batch = machine.shared(batch // 2)
            plan.set("batch_size", batch, "as many as fit into the memory")
        elif math.prod(patch) > math.prod(multiple):
            most = math.prod(patch) * 3 // 4
            patch = shrink(tuple(map(min, patch, inside)), spacing, multiple, most)
            plan.set("data.patch", patch, "as large as fits into the memory")
        else:
            plan.notes.append("the memory is too small even for the smallest patch")
            break


def plan_validation(
    plan: Plan,
    whole: tuple[int, ...],
    spacing: tuple[float, ...],
    multiple: tuple[int, ...],
    machine: Machine,
) -> None:
    """Whole cases are validated, slab by slab where they need it (large/streaming.py). Where even that does
    not fit into the memory, their middle is, and that is said."""
    size = whole
    while not machine.validation_fits(plan.values) and "data.size" not in plan.given:
        smaller = shrink(size, spacing, multiple, math.prod(size) * 3 // 4)
        if smaller == size:
            break
        size = smaller
        plan.set(
            "data.size", size, f"whole cases of {by(whole)} do not fit even in slabs: their middle is seen"
        )


def plan_data(
    plan: Plan, f: Fingerprint, gpu: bool, num_cores: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What the files ask for, whatever the network: (voxels of the largest case, spacing) of the grid."""
    plan_files(plan, f)
    plan_split(plan, f)
    grid = plan_spacing(plan, f)
    plan_scaling(plan, f)
    plan_flips(plan, f)
    plan_reading(plan, f, gpu, num_cores)
    return grid


def on_grid(median: tuple[int, ...], f: Fingerprint, size: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels of the median case on the training grid, whose largest case has `size`."""
    return tuple(round(n * new / old) for n, old, new in zip(median, f.largest, size, strict=True))


def plan_vae(
    f: Fingerprint,
    machine: Machine,
    given: dict[str, Any],
    num_cores: int = 1,
    base: dict[str, Any] | None = None,
) -> Plan:
    """The plan of an autoencoder, without its length. base: see `Plan`."""
    plan = Plan(given, base)
    size, spacing = plan_data(plan, f, machine.gpu, num_cores)
    factors = plan_autoencoder(plan, f, size, spacing, machine)
    multiple = total(factors, f.dims)
    coarse = halved_once_more(size, multiple)
    whole = plan_size(plan, size, coarse)
    median = on_grid(f.median, f, size)
    plan_patch(plan, whole, size, median, spacing, multiple, machine)
    patch = (plan.values | plan.given)["data.patch"]
    if patch not in (None, whole) and math.prod(median) < FILLED * math.prod(whole):
        why = f"a median case of {by(median)} is padded to {by(whole)}: patches show this padding too"
        plan.set("data.crop", "padded", why)
    plan_validation(plan, whole, spacing, coarse, machine)
    plan_optimizer(plan, 1e-4 if machine.gpu else 4e-3, forget=not machine.gpu)
    return plan


# --- stage two ----------------------------------------------------------------------------------------------

FEW_CASES = 300  # with fewer, a denoiser learns them by heart unless each is encoded in variants
NUM_VARIANTS = 8
# Positions, above which denoisers of volumes get batches of 2 and Muon on CPUs. In the same time they learn
# more than with batches of 8 and AdamW: measured with 1200 and 1980 positions (tests/benchmarks/README.md,
# quality in given minutes). With 168 positions a step of 2 takes as long as one of 8. Nothing else was tried.
TINY_LATENT = 1000
FINE_LATENT = 3000  # positions, above which a denoiser for CPUs is narrow where the grid is fine


@dataclass(frozen=True)
class Latents:
    """What stage two has to know of stage one."""

    size: tuple[int, ...]  # positions along each axis
    spacing: tuple[float, ...]  # mm from one position to the next
    num_train: int  # training cases
    flip_axes: tuple[int, ...]  # along which the autoencoder has seen cases flipped
    seconds: float  # to encode one case


FOLDERS_OWN = {  # settings that say which cases a folder holds, and how they are split
    *READING,
    *("val_fraction", "test_fraction", "val_gap", "test_subjects", "fold", "file_spacing"),
}


def plan_other_data(
    plan: Plan,
    f: Fingerprint,
    before: DataConfig,
    seen: tuple[float, ...] | None,
    multiple: tuple[int, ...],
    kept: Collection[str] = (),
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Data that are not the autoencoder's: (size, spacing) of a case. Files, split and size are their
    folder's; scaling and the rule of the spacing are the autoencoder's, which knows no others.

    before: the data settings of the autoencoder. seen: the mm of its voxels, None if it has seen no case.
    multiple: its down-sampling. kept: settings with which the files were read as the autoencoder's were.
    """
    plan_files(plan, f)
    plan_split(plan, f)
    for name in sorted(FOLDERS_OWN - set(kept)):
        theirs, usual = getattr(before, name), getattr(DataConfig, name)
        if theirs != usual and f"data.{name}" not in plan.values:
            plan.set(f"data.{name}", usual, f"{show(theirs)} is of the autoencoder's data")
    numbers = {"percentile": ["percentiles"], "window": ["window"]}.get(before.scaling, [])
    for name in ("spacing", "scaling", *numbers):
        plan.set(f"data.{name}", getattr(before, name), "the autoencoder's")
    size, spacing = grid_of(f, plan.given.get("data.spacing", before.spacing))
    ratios = [max(a / b, b / a) for a, b in zip(spacing, seen or spacing, strict=True)]
    if max(ratios) > RESAMPLE_FROM:
        ours, theirs = (" x ".join(f"{mm:.3g}" for mm in axes) for axes in (spacing, seen))
        plan.notes.append(
            f"voxels of {ours} mm, and the autoencoder knows {theirs} mm: "
            f"--data.spacing {show(tuple(round(mm, 4) for mm in seen))} makes them alike"
        )
    if before.resize:
        return tuple(plan.set("data.size", before.size, "stretched as for the autoencoder")), spacing
    return plan_size(plan, size, halved_once_more(size, multiple)), spacing


def common_flips(f: Fingerprint, before: DataConfig) -> tuple[int, ...]:
    """The axes along which the autoencoder has seen flipped cases, and flipped ones look like these data."""
    ours = plan_flips(Plan({}), f)
    return tuple(axis for axis in before.augment.flip_axes if axis in ours)


def plan_variants(plan: Plan, z: Latents, machine: Machine) -> None:
    """Few cases are encoded several times, each time moved a little. The encoding may take a tenth of the
    time. A short run does not learn cases by heart, and moved ones only make its task harder."""
    affordable = int(0.1 * 3600 * machine.hours / max(z.seconds * z.num_train, 1e-9))
    num, why = min(NUM_VARIANTS, affordable), f"{z.num_train} training cases are few: each in variants"
    if machine.short:
        num, why = 1, "a short run does not learn cases by heart"
    elif z.num_train >= FEW_CASES or num < 2:
        num, why = 1, f"{z.num_train} training cases: each is encoded once"
        if z.num_train < FEW_CASES:
            why += f", in {z.seconds:.1f} s"
    num = plan.set("data.num_variants", num, why)
    if num > 1:
        plan.set("data.augment.affine", 0.7, "variants are turned, scaled and shifted a little")
        plan.set("data.augment.max_scale", 0.05, "sizes mean something")
        plan.set("data.augment.flip_axes", z.flip_axes, "as the autoencoder has seen them")
        plan.set("plain_end", 0.3, "moved cases are a little blurred: the last steps see them as they are")


def plan_denoiser(plan: Plan, z: Latents, machine: Machine) -> None:
    """Levels and widths of the U-Net: halved until attention over all positions is cheap."""
    gpu, short = machine.gpu, machine.short
    positions, num = math.prod(z.size), 0
    while num < 2 and math.prod(z.size) / 2 ** (num * len(z.size)) > 512:
        num += 1
    factors = levels(plan, "unet.channels", z.size, z.spacing, num)
    coarse = positions / math.prod(map(math.prod, factors))
    fine = positions > FINE_LATENT
    num = min(3, len(factors) + 1)
    widths = {1: (64,), 2: (64, 128), 3: (64, 96, 128)}[num]
    if fine:
        widths = {1: (32,), 2: (32, 96), 3: (32, 64, 128)}[num]
    elif short:
        widths = {1: (48,), 2: (48, 96), 3: (48, 96, 96)}[num]
    if gpu:
        widths = {1: (256,), 2: (256, 256), 3: (256, 256, 512)}[num]
    plan.set("unet.dims", len(z.size), "as the latents")
    plan.set("unet.strides", factors, f"{by(z.size)} positions, {coarse:.0f} on the coarsest level")
    why = "a GPU: wide networks" if gpu else f"CPUs: narrow for {'fine' if fine else 'coarse'} latents"
    widths = plan.set("unet.channels", widths, why)
    attention = (False,) * len(factors) + (coarse <= (4096 if gpu else 1024),)
    attention = plan.set("unet.attention_levels", attention, "where the positions are few")
    attention = attention * len(widths) if len(attention) == 1 else attention
    usual = 64 if gpu else UNetConfig.head_channels
    head = math.gcd(usual, widths[-1], *(w for w, attend in zip(widths, attention, strict=False) if attend))
    if gpu or head != usual:
        why = (
            "as many channels to a head as is usual" if head == usual else "divides the widths with attention"
        )
        plan.set("unet.head_channels", head, why)
    blocks, why = (2,), "as is usual"
    if (fine or short) and not gpu:
        blocks, why = (1,), f"CPUs: one block a level for {'fine latents' if fine else 'a short time'}"
    plan.set("unet.num_res_blocks", blocks, why)


def plan_steps(plan: Plan, z: Latents, machine: Machine) -> None:
    """What a step of a denoiser is: the batch, the optimizer, and its learning rate."""
    gpu, positions = machine.gpu, math.prod(z.size)
    batch = 16 if gpu else 8 if positions <= FINE_LATENT else 4 if positions <= 5 * FINE_LATENT else 2
    why, optimizer = f"{positions} positions a sample", plan.given.get("optim.optimizer")
    if not gpu and len(z.size) == 3 and positions > TINY_LATENT:
        batch, why = 2, "CPUs: small batches learn more in the same time"
        if not plan.given.get("lora.rank"):  # Muon leaves adapters to AdamW
            reason = "CPUs: in fewer and longer steps it learns more in the same time"
            optimizer = plan.set("optim.optimizer", "muon", reason)
    plan.set("batch_size", machine.shared(batch), why)
    plan_optimizer(plan, 1e-4 if gpu else 3e-3 if optimizer == "muon" else 1e-3, forget=False)


def plan_ldm(plan: Plan, z: Latents, machine: Machine) -> None:
    """The rest of the plan of a denoiser, without its length."""
    plan_variants(plan, z, machine)
    plan_denoiser(plan, z, machine)
    plan_steps(plan, z, machine)
    batch = plan.values.get("batch_size", 1)
    while batch > machine.ranks and not machine.training_fits(plan.values):
        batch = machine.shared(batch // 2)
        plan.set("batch_size", batch, "as many as fit into the memory")


# --- segmentation -------------------------------------------------------------------------------------------

RARE = 0.1  # fraction of labelled voxels, below which patches are drawn around labels


def plan_changes(plan: Plan, f: Fingerprint) -> None:
    """Augmentation of a segmenter, which has few cases and must not mind the position or the brightness."""
    loose = f.dims == 2 and abs(f.pose) < NO_POSE
    plan.set("data.augment.affine", 0.5, "segmenters have few cases")
    plan.set("data.augment.max_rotation", 22.0 if loose else 15.0, "degrees")
    if loose:
        plan.set("data.augment.max_scale", 0.25, "no usual way up: objects of many sizes")
    plan.set("data.augment.intensity", 0.5, "brightness says little")
    if f.channels == 3:
        plan.set("data.augment.colour", 0.5, "three channels: colours vary")


def plan_raters(plan: Plan, num_raters: int) -> None:
    """Votes that are samples of raters; cdal.py says why these settings."""
    plan.set("votes", 8, f"up to {num_raters} raters a case: each vote is what one of them could have drawn")
    plan.set("cdal.own_estimate", False, "the network's own estimate is the mean of the raters")
    plan.set("cdal.kernel.num_timesteps", 16, "many steps: what raters differ in is decided bit by bit")
    plan.set("cdal.kernel.input_scale", 0.2, "more of the true mask is hidden at every step")
    plan.set("cdal.dice_weight", 0.0, "cross-entropy alone makes probabilities that are right")


def plan_generator(
    plan: Plan, f: Fingerprint, size: tuple[int, ...], spacing: tuple[float, ...], machine: Machine
) -> tuple[tuple[int, ...], ...]:
    """Levels and widths of the generator: (all its down-samplings). Volumes on CPUs begin with a stem."""
    gpu, short = machine.gpu, machine.short
    if f.dims == 3 and not gpu:
        factors = levels(plan, "unet.channels", size, spacing, 2, stem=True)
        plan.set("generator.stem", factors[0], "CPUs: the first halving is a rearrangement")
        inner, widths = factors[1:], ((32, 64) if short else (48, 96))[: len(factors)]
    else:
        inner = factors = levels(plan, "unet.channels", size, spacing, 3)
        widths = ((64, 128, 256, 256) if gpu else (32, 64, 96, 128))[: len(factors) + 1]
    plan.set("unet.dims", f.dims, f"the images are {f.dims}-D")
    plan.set("unet.strides", inner, "an axis is halved while its voxels are not twice as long as others")
    plan.set(
        "unet.channels",
        widths,
        "a GPU: wide networks" if gpu else "CPUs: narrower for volumes and a short time",
    )
    why = "a GPU: wide networks" if gpu else "CPUs: small networks"
    plan.set("generator.encoder_channels", 64 if gpu else 32, why)
    if f.dims == 3 and not gpu:
        plan.set("generator.encoder_blocks", 1, "CPUs: one block a level makes short steps")
    return factors


def plan_cdal(
    f: Fingerprint,
    machine: Machine,
    given: dict[str, Any],
    num_cores: int = 1,
    base: dict[str, Any] | None = None,
) -> Plan:
    """The plan of a segmentation network, without its length. base: see `Plan`."""
    plan = Plan(given, base)
    size, spacing = plan_data(plan, f, machine.gpu, num_cores)
    plan_changes(plan, f)
    if f.num_raters > 1:
        plan_raters(plan, f.num_raters)
    factors = plan_generator(plan, f, size, spacing, machine)
    multiple = total(factors, f.dims)
    whole = plan_size(plan, size, multiple)
    median = on_grid(f.median, f, size)
    plan_patch(plan, whole, size, median, spacing, multiple, machine)
    patch = (plan.values | plan.given)["data.patch"] or whole
    if f.labelled < RARE and math.prod(patch) < math.prod(median) / 2:
        plan.set("data.foreground", 0.5, f"{f.labelled:.1%} of the voxels have a label")
    positions, why = math.prod(whole) // math.prod(multiple), ""
    if not machine.gpu and positions > SLOW_ATTENTION:
        why = f"attention over {positions} positions of whole cases takes CPUs minutes"
    elif not machine.validation_fits(plan.values):
        why = "whole cases do not fit into the memory"
    if why and tuple(patch) != whole:
        plan.set("window", tuple(patch), f"{why}: windows as large as patches")
    plan_optimizer(plan, 1e-3 if f.dims == 2 or machine.gpu else 2e-3, forget=not machine.gpu)
    return plan


# --- length -------------------------------------------------------------------------------------------------


def plan_optimizer(plan: Plan, lr: float, forget: bool) -> None:
    """The learning rate, and whether Adam's average of squared gradients forgets soon. Gradients of a
    denoiser are noisy and want a long average."""
    plan.set("optim.lr", lr, "high for small networks, low for wide ones")
    plan.set("optim.schedule", "cosine", "the learning rate ends at 0")
    if forget:
        plan.set("optim.adam_betas", (0.9, 0.99), "few steps: averages that forget sooner")


def round_steps(steps: float) -> int:
    """Two digits, at least 10: 4731 -> 4700."""
    digits = 10 ** max(0, int(math.log10(max(1, steps))) - 1)
    return max(10, int(steps // digits * digits))


def plan_length(
    plan: Plan,
    hours: float,
    seconds: float,
    passes: tuple[int, int],
    num_train: int,
    ema: float,
    patience: int = 0,
    validation: float = 0.0,
) -> None:
    """Steps, and all that counts in steps. seconds: of a step. passes: (most over the training cases, least
    number of steps whatever their number is). ema: the averaged weights reach back over this part of the run.
    validation: seconds of one, where it may take long.
    """
    batch = (plan.values | plan.given)["batch_size"]
    by_time = 3600 * hours / seconds * 0.85  # the rest is for validation, checkpoints and the start
    by_cases = max(passes[0] * num_train / batch, passes[1])
    steps = round_steps(min(by_time, by_cases))
    why = f"{hours:g} h at {seconds:.3g} s a step; 15 % is kept for validation, checkpoints and the start"
    if by_cases < by_time:
        why = f"{num_train} training cases ask for no more; {by_time:.0f} would fit into {hours:g} h"
    steps = plan.set("run.steps", steps, why)
    plan.set("optim.warmup_steps", min(1000, max(1, steps // 20)), "a twentieth of the steps, at most 1000")
    num = min(8, max(1, int(60 * hours / VALIDATE_EVERY)))  # of the hours, whether the run takes them or not
    why = f"{duration(steps * seconds / 0.85 / num)} apart" if num > 1 else "at the end"
    if num * validation > 360 * hours:
        num = max(1, int(360 * hours / validation))
        why = f"of some {validation:.0f} s, in a tenth of the time"
    plan.set("run.eval_every", -(-steps // num), f"validations: {num}, {why}")
    plan.set("run.save_every", -(-steps // 8), "eight checkpoints")
    plan.set("run.log_every", max(1, min(100, steps // 60)), "sixty lines of the log, or more")
    decay = min(0.9999, max(0.5, round(1 - 1 / (ema * steps), 5)))
    plan.set("run.ema_decay", decay, f"averages over {ema:.0%} of the steps")
    if patience:
        plan.set("run.patience", patience, f"ends after {patience} validations without a new best")


# --- at the start of a script -------------------------------------------------------------------------------


def machine(gpu: bool, flags: dict[str, Any], table: Callable[[dict[str, Any]], MemoryTable]) -> Machine:
    """The machine of a run whose memory table is `table(settings)`. flags: `hours` is read from them."""
    hours = flags.get("hours") or HOURS[gpu]
    fits = (lambda v: table(v).training_fits), (lambda v: table(v).inference_fits)
    return Machine(gpu, hours, *fits, world_size())


def check_base(base: dict[str, Any], f: Fingerprint, run: str | None) -> None:
    """InputError if the network of `run`, whose settings are `base`, is for other images than those of f."""
    for key, value, what in (
        ("vae.dims", f.dims, "dimension"),
        ("unet.dims", f.dims, "dimension"),
        ("vae.in_channels", f.channels, "channel"),
    ):
        if (theirs := base.get(key, value)) != value:
            raise InputError(f"run.init: {run} is for images of {plural(theirs, what)}, these have {value}")


def note_attention(positions: int, gpu: bool, remedy: str) -> None:
    """Say that a training step takes minutes, where so many positions attend to each other."""
    if positions > SLOW_ATTENTION and not gpu:
        print0(f"note: {positions} positions attend to each other: a step takes CPUs minutes; {remedy}")


def seconds_to_read(data: Data, num: int = 3) -> float:
    """How long a training sample takes once its file is decoded: the median of `num`, the longest over the
    ranks."""
    first = replace(data, split={**data.split, "train": data.split["train"][:1]})
    with contextlib.redirect_stdout(io.StringIO()):  # training says of its data what there is to say
        dataset, taken = first.dataset("train", augment=True), []
    for position in range(1 + num):
        start = time.perf_counter()
        dataset[position, 0]
        taken.append(time.perf_counter() - start)
    return max(gather(statistics.median(taken[1:])))


def seconds_per_step(table: MemoryTable, config: Any, device: Any, data: Data | None = None) -> float:
    """How long a step takes, measured: the networks' on zeros, and the reading of its samples, where these
    are of `data`."""
    print0("measuring a step ...")
    networks = table.seconds_per_step(config.optim, config.run, device)
    if data is None:
        return networks
    reading = seconds_to_read(data) * config.batch_size / world_size()
    return max(networks, reading / config.run.workers) if config.run.workers else networks + reading


def other_cases(content: dict[str, Any], folder: Path) -> str:
    """Why the cases in `folder` are not those of a run, in words; empty where they are. content: what the
    run's checkpoint holds."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # training says the same again
            now = open_stored(content, root=str(folder)).contents
    except InputError as e:
        return str(e)
    return changed_case(content["state"].get("contents", {}), now) or ""


def other_autoencoder(run: Path, folder: Path) -> str:
    """Why the autoencoder in `folder` is not the one that stage two's `run` keeps a copy of, in words."""
    try:
        kept, now = load_run(run / "autoencoder.pt", "vae")["ema"], load_run(folder, "vae")["ema"]
    except InputError as e:
        return str(e)
    same = kept.keys() == now.keys() and all(kept[name].equal(now[name]) for name in kept)
    return "" if same else "its weights are others"


class Planner:
    """What `config.parse` calls where the first word of a command is a folder.

    A run that exists goes on with the settings that it has stored; else `make(folder, flags, merge)` plans,
    and `plan` holds what it planned. kind, cls: of the run, such as "ldm", and its configuration. word: the
    setting that the first word stands for: "data.root", a folder of images, or "vae", a run. Where --vae
    names the run, the first word may be a folder of other images.
    """

    def __init__(self, kind: str, cls: type, make: Callable[..., Plan], word: str = "data.root"):
        self.kind, self.cls, self.make, self.word = kind, cls, make, word
        self.plan: Plan | None = None
        self.is_preset = True  # until `config.parse` calls: the first word is a folder

    def __call__(
        self, folder: Path, flags: dict[str, Any], merge: Callable[[dict[str, Any]], Any]
    ) -> dict[str, Any]:
        self.is_preset = False
        if flags.get("hours") is not None and flags["hours"] <= 0:
            raise InputError(f"hours: expected more than 0, got {flags['hours']:g}")
        is_run, name = (folder / "config.json").is_file(), folder.resolve().name
        word = self.word if is_run else "data.root"
        if is_run and word != "vae":
            raise InputError(f"{folder}: a run folder, expected a folder of images")
        if word != self.word and flags.get("vae") is None:
            raise InputError(
                f"{folder}: no run folder; first python train_vae.py {folder}, and then its run, "
                f"runs/vae-{name}; or beside {folder} the autoencoder of others, --vae runs/vae-NAME"
            )
        if flags.get(word, str(folder)) != str(folder):
            raise InputError(f"{word}: {flags[word]}, but the first word is the folder {folder}")
        flags[word] = str(folder)
        name = name.removeprefix("vae-") if is_run else name
        config = Path(flags.get("run.dir") or f"runs/{self.kind}-{name}") / "config.json"
        if config.is_file() and not flags.get("run.fresh") and not flags.get("plan"):
            stored = stored_settings(self.cls, config)
            if self._goes_on(config.parent, stored, folder, flags):
                return stored
        if (init := flags.get("run.init")) and not step_files(config.parent):
            load_init(self.kind, init)  # whether there is one shows at once, a scan of the folder takes long
        self.plan = self.make(folder, flags, lambda values: merge(values | {"preset": name}))
        if is_main():
            print(self.plan.table(), flush=True)
        return self.plan.values | {"preset": name}

    def _goes_on(self, run: Path, stored: dict[str, Any], folder: Path, flags: dict[str, Any]) -> bool:
        """Does the command go on with the stored `run`? True if `folder` is what it was trained on, here or
        moved; False if the run is of another folder and has saved nothing. Else InputError: two
        folders of one name would share a run."""
        word = "vae" if (folder / "config.json").is_file() else "data.root"
        was = stored.get(word)
        if was is None or Path(was).expanduser().resolve() != folder.resolve():
            setup(flags.get("run.device", "auto"))
            with contextlib.redirect_stdout(io.StringIO()):  # the run names damaged checkpoints again
                content = load_latest(run, self.kind)
            if content is None:
                return False
            other = other_autoencoder(run, folder) if word == "vae" else other_cases(content, folder)
            if other:
                was = Path(was).expanduser().resolve() if was else f"data of {stored['preset']}"
                raise InputError(
                    f"{run}: was trained on {was}, this is {folder.resolve()} ({other}); choose another "
                    "--run.dir, or start anew with --run.fresh"
                )
        if word == "vae":  # how the path was written then, which a run does not let change
            flags[word] = stored.get(word)
        return True

    def check(self, flags: dict[str, Any]) -> None:
        """Refuse flags of planning beside a preset. A planned run that goes on takes them again."""
        if self.is_preset and flags.get("hours") is not None:
            raise InputError("hours: has no effect with a preset, which has a number of steps (run.steps)")
        unread = self.kind == "cdal" and not flags.get("plan")  # autoencoders keep to it in validation
        if self.is_preset and flags.get("memory") is not None and unread:
            raise InputError("memory: has no effect with a preset, but with --plan")

    def write(self, folder: Path) -> None:
        """plan.json in the folder of a new planned run."""
        if self.plan is not None and is_main():
            self.plan.write(folder)
