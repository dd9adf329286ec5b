"""A request for samples: sets of conditions, an edit, and the geometry of the files to write.

A set of conditions is what one group of samples has in common, such as class 1 and the caption "a lesion".
The sets come from the command line (one set), from a CSV (a set in each row), or from the run's own cases (a
set for each case, whose image is then the target that samples are compared with). Everything is checked, and
the files are read, before the first sample is made.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..conditions import Condition, absent, check_names, pairs, split_words
from ..config import InputError, at_least, show
from ..data import CaseInfo, DataSpec, Volume, VolumeDataset, collate, restore
from ..data.cases import read_csv
from ..data.geometry import centred
from ..data.inspection import voxels_off
from ..data.loading import keeps_grid, load_role
from ..data.transforms import scaling_numbers
from ..data.volumes import centred_affine, file_name
from ..engine.distributed import print0
from ..engine.training import to_device
from ..guidance import AUTOGUIDANCE_INTERVAL, Autoguidance, Guidance
from ..latent_diffusion import NO_EDIT, Edit
from ..latents import WithConditions, encode_batch
from ..pipeline import LatentDiffusionPipeline
from .editing import ImageEdit, Interpolation
from .segmentation import large_array


def is_length(n: int | str) -> bool:
    """True for a number of voxels, and for a length in mm above 0 as text, such as 180mm or 0.5mm."""
    return isinstance(n, int) or (bool(re.fullmatch(r"\d*\.?\d+mm", n)) and float(n[:-2]) > 0)


@dataclass(frozen=True)
class RequestConfig:
    num: int | None = None  # samples of each set of conditions; none = 16, or 1 with conditions or cases
    seed: int = 0  # sample i depends on (seed, i) alone
    condition: tuple[str, ...] = field(default=(), metadata={"repeat": True})  # NAME=VALUE, repeatable
    conditions: str | None = None  # CSV, each row a set of conditions, its columns their names (and name)
    cases: Literal["train", "val", "test"] | None = None  # the run's own cases: their conditions, and scores
    guidance: tuple[str, ...] = field(default=("1",), metadata={"repeat": True})  # scale; or class=3,text=2
    guidance_rescale: float = 0.0  # 0 to 1: how far guided predictions regain their deviation
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels t / T that are guided
    autoguidance: float = 1.0  # how far samples go away from what a weaker denoiser predicts; 1 = off
    autoguidance_run: str | None = None  # the weaker denoiser's run or checkpoint; none = the run's early.pt
    autoguidance_interval: tuple[float, float] = AUTOGUIDANCE_INTERVAL  # noise levels t / T at which it acts
    size: tuple[int | str, ...] | None = None  # voxels of a sample, or mm as 180mm,220mm; none = training's
    inpaint: str | None = None  # image whose region is made anew, the rest kept exactly
    region: str | None = None  # mask of the region to inpaint: all that is not 0
    edit: str | None = None  # image to start from instead of from noise
    strength: float | None = None  # noise that hides the image, 0 to 1; none = inpaint 1, edit .5, else .3
    resample: int | None = None  # inpaint: how often each step is made, to fit the surroundings; none = 4
    invert: tuple[str, ...] = field(default=(), metadata={"repeat": True})  # edit: NAME=VALUE of the image
    same_noise: bool = False  # conditions: each set gets the noises of the first, so only conditions differ
    interpolate: str | None = None  # two samples, such as 3,7, or two images, to go from one to the other

    def __post_init__(self) -> None:
        at_least(self, 1, "num", "resample")
        changes = ("inpaint", "edit", "interpolate", "cases")
        for names in (("condition", "conditions", "cases"), changes, *(("size", name) for name in changes)):
            if len(chosen := [name for name in names if getattr(self, name)]) > 1:
                raise InputError(f"{chosen[0]}, {chosen[1]}: give one of the two")
        if bool(self.region) != bool(self.inpaint):
            raise InputError("inpaint, region: one needs the other")
        if self.autoguidance == 1 and (
            self.autoguidance_run or self.autoguidance_interval != AUTOGUIDANCE_INTERVAL
        ):
            raise InputError("autoguidance_run, autoguidance_interval: need autoguidance, a number above 1")
        if self.resample is not None and not self.inpaint:
            raise InputError("resample: needs inpaint")
        if self.invert and not self.edit:
            raise InputError("invert: needs edit")
        if self.same_noise and not self.conditions:
            raise InputError("same_noise: needs conditions, a table of several sets")
        if self.strength is not None and not (self.inpaint or self.edit or self.interpolate):
            raise InputError("strength: needs inpaint, edit or interpolate")
        if (self.size and len({type(n) for n in self.size}) > 1) or not all(map(is_length, self.size or ())):
            expected = "whole voxels, such as 64,80,64, or mm, such as 180mm,220mm,180mm"
            raise InputError(f"size: expected {expected}, got {show(self.size)}")

    @property
    def samples(self) -> int:
        """Samples of each set of conditions."""
        return self.num or (1 if self.conditions or self.cases or self.invert else 16)

    @property
    def size_in_mm(self) -> bool:
        return bool(self.size) and isinstance(self.size[0], str)

    def in_voxels(self, spacing: Sequence[float]) -> RequestConfig:
        """The same request with `size` in voxels. Each length in mm is rounded to the nearest number of
        voxels of this spacing, one at least: 180 mm of 1.25 mm are 144 voxels."""
        if not self.size_in_mm or len(self.size) != len(spacing):
            return self
        mm = [float(length.removesuffix("mm")) for length in self.size]
        size = tuple(max(1, round(n / each)) for n, each in zip(mm, spacing, strict=True))
        return dataclasses.replace(self, size=size)


@dataclass
class Request:
    """Sets of conditions, and the files whose geometry the samples take. A list has an entry for each set."""

    names: list[str]
    conditions: dict[str, Tensor]  # by name, (sets, ...)
    values: list[dict[str, Any]]  # the conditions as they were asked for, for the report
    infos: list[CaseInfo | None]  # the file whose geometry the samples take; None: no file
    images: VolumeDataset | None = None  # with has_targets the targets, one a set; else the image to edit
    has_targets: bool = False
    edit: Edit = NO_EDIT
    paste: bool = False  # write the sampled region into the edited image's own volume

    def spacing(self, number: int, spec: DataSpec) -> tuple[float, ...]:
        """The mm of a voxel in samples of set `number`: that of the condition spacing where it is told."""
        asked = self.conditions.get("spacing")
        if self.infos[number] is not None or asked is None or absent(asked)[number]:
            return spec.spacing
        return tuple(round(mm, 6) for mm in asked[number].tolist())

    def spacings(self, spec: DataSpec) -> set[tuple[float, ...]]:
        """The different spacings of all sets."""
        return {self.spacing(number, spec) for number in range(len(self.names))}

    def volume(self, number: int, x: Tensor, spec: DataSpec, start: tuple[int, ...] | None = None) -> Volume:
        """A sample of set `number` as a volume, in the units of the training data or, if an image is edited,
        of that image. start: where x begins in the file whose geometry it takes; None: in its middle."""
        info = self.infos[number]
        if info is None:
            return dataclasses.replace(spec, spacing=self.spacing(number, spec)).to_volume(x)
        if not isinstance(self.edit, ImageEdit):
            info = dataclasses.replace(info, low=spec.low, high=spec.high)
        return restore(x, spec, info, start)

    def large_volume(
        self, number: int, planes: Iterable[tuple[int, Tensor]], size: tuple[int, ...], spec: DataSpec
    ) -> Volume:
        """`volume`, in the type of the files, of a sample of `size` that comes in planes of its first axis,
        (first plane, planes (C, n, ...)). A large one lies in a file, not in memory."""
        info, array, affine = self.infos[number], None, None
        corner = (0,) * len(size) if info is None else centred(info.shape, size)
        whole = size if info is None else info.shape
        shape = [min(n, c + m) - max(0, c) for n, c, m in zip(whole, corner, size, strict=True)]
        for first, part in planes:
            start = corner[0] + first
            if start >= whole[0] or start + part.shape[1] <= 0:
                continue  # beyond the file
            volume = self.volume(number, part, spec, (start, *corner[1:]))
            volume = self.as_file(number, volume, spec)
            if array is None:
                array = large_array((volume.channels, *shape), volume.array.dtype)
                affine = centred_affine(size, volume.spacing) if info is None else volume.affine
            at = max(0, start) - max(0, corner[0])
            array[:, at : at + volume.shape[0]] = volume.array
        return Volume(array, affine, volume.orientation)

    def as_file(self, number: int, volume: Volume, spec: DataSpec) -> Volume:
        """A sample of `volume` in the type of the files whose units it has."""
        return spec.as_file(volume, self.infos[number] if isinstance(self.edit, ImageEdit) else None)


def read_request(config: RequestConfig, pipeline: LatentDiffusionPipeline, amp: str = "fp32") -> Request:
    """The request that the settings describe. amp: the precision to encode sources with."""
    if config.cases:
        return request_of_cases(config, pipeline, amp)
    conditions = pipeline.model.denoiser.conditions
    names, rows = ["set_0000"], [pairs(config.condition)]
    if config.conditions:
        names, rows = read_rows(config.conditions, [c.name for c in conditions if c.may_be_file])
    check_names([name for row in rows for name in row], conditions)
    if config.size_in_mm and any("spacing" in row for row in rows):
        raise InputError("size: expected voxels, since the condition spacing says how many mm they have")
    config = config.in_voxels(pipeline.spec.spacing)
    note_captions(rows, conditions)
    infos, values = with_sources(rows, pipeline, config.size)
    used = {name for row in rows for name in row}
    columns = {name: [row.get(name) for row in values] for name in used}
    try:  # all sets at once: what they share is read and encoded once
        tensors = pipeline.prepare(columns, len(rows), amp, config.size)
    except InputError as e:
        raise InputError(f"{wrong_row(config, names, values, pipeline)}{e}") from None
    return with_edit(Request(names, tensors, rows, infos), config, pipeline)


def wrong_row(
    config: RequestConfig, names: list[str], rows: list[dict[str, Any]], pipeline: LatentDiffusionPipeline
) -> str:
    """The place, in words, of the first row of the table that the model refuses; "" without a table."""
    for name, row in zip(names, rows, strict=True) if config.conditions else ():
        try:
            pipeline.prepare(row, size=config.size)
        except InputError:
            return f"{config.conditions}: {name}: "
    return ""


def read_rows(path: str, files: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Names and rows of a CSV of conditions. files: columns whose cells name files, relative to the CSV."""
    if not os.path.isfile(path):
        raise InputError(f"conditions: no file {path}")
    rows, folder = read_csv(Path(path), []), Path(path).parent
    if not rows:
        raise InputError(f"{path}: lists no conditions")
    names = [row.pop("name", f"set_{i:04d}") for i, row in enumerate(rows)]
    for name in names:
        if file_name(name) != name:
            raise InputError(f"{path}: name is {name!r}, expected one that a file can have")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two rows have the same name")
    for row in rows:
        row |= {k: str(folder / row[k]) for k in files if row.get(k) and os.path.exists(folder / row[k])}
    return names, rows


def note_captions(rows: list[dict[str, str]], conditions: Sequence[Condition]) -> None:
    """Print a note of words that are not in the run's vocabulary, and of captions that are cut."""
    for c in (c for c in conditions if c.kind == "text"):
        captions = [row.get(c.name, "") for row in rows]
        if words := sorted({word for caption in captions for word in c.unknown_words(caption)}):
            print0(f"note: words that the run does not know: {', '.join(words)}")
        if long := [caption for caption in captions if len(split_words(caption)) > c.length]:
            words = " ".join(split_words(long[0])[: c.length])
            print0(f"note: captions are read up to {c.length} words; of {long[0]!r} that is {words!r}")


def note_geometry(images: VolumeDataset, spec: DataSpec) -> None:
    """Print a note of files that are larger than the samples, or of another spacing."""
    for case in images.cases:
        info = images.infos[case.id]
        if max(np.subtract(info.shape, spec.size)) > 0:
            print0(f"note: {case.image} has shape {info.shape}, only its middle is taken")
        if not np.allclose(info.spacing, spec.spacing, rtol=0.1):
            ours = "x".join(f"{mm:g}" for mm in spec.spacing)
            print0(f"note: {case.image} has another spacing than the training data, {ours} mm")


def with_sources(
    rows: list[dict[str, str]], pipeline: LatentDiffusionPipeline, size: Sequence[int] | None
) -> tuple[list[CaseInfo | None], list[dict[str, Any]]]:
    """(the geometry of each row's source, or None; the rows with the source's voxels instead of its path)."""
    kinds = [c.name for c in pipeline.model.denoiser.conditions if c.origin == "source"]
    infos, values = [None] * len(rows), [dict(row) for row in rows]
    name = next((name for name in kinds if any(row.get(name) for row in rows)), None)
    having = [i for i, row in enumerate(rows) if name and row.get(name)]
    if not having:
        return infos, values
    paths = list(dict.fromkeys(rows[i][name] for i in having))  # many rows may share a source
    images = pipeline.open(paths, "source", size)
    sources = {
        path: (images[j, j]["image"], images.infos[images.cases[j].id]) for j, path in enumerate(paths)
    }
    for i in having:
        values[i][name], infos[i] = sources[rows[i][name]]
    note_geometry(images, images.spec)
    return infos, values


def guidance_of(config: RequestConfig) -> Guidance:
    """Guidance of "3", one scale for all conditions, or of "class=3,text=2"."""
    text = ",".join(config.guidance)
    named = pairs(tuple(text.split(",")), "guidance") if "=" in text else {}
    try:
        scale = {name.strip(): float(value) for name, value in named.items()} or float(text)
    except ValueError:
        raise InputError(f"guidance: expected a number, or NAME=NUMBER,..., got {text!r}") from None
    return Guidance(scale, config.guidance_rescale, config.guidance_interval)


def autoguidance_of(config: RequestConfig, pipeline: LatentDiffusionPipeline) -> Autoguidance | None:
    """The autoguidance that is asked for; None: none."""
    how = config.autoguidance, config.autoguidance_run, config.autoguidance_interval
    return None if config.autoguidance == 1 else pipeline.autoguidance(*how)


def request_of_cases(config: RequestConfig, pipeline: LatentDiffusionPipeline, amp: str) -> Request:
    """The conditions of the run's own cases of one part of the split; their images are the targets."""
    data, model = pipeline.data(), pipeline.model
    if not data.split[config.cases]:
        raise InputError(f"cases: the run has no {config.cases} cases")
    images, conditions = data.dataset(config.cases), model.denoiser.conditions
    dataset, parts = WithConditions(images, conditions, images.cases, data.folder), []
    for i in range(len(dataset)):
        batch = to_device(collate([dataset[i, i]]), model.device)
        batch |= encode_batch(model.autoencoder, batch, conditions, amp)
        parts.append({name: value.cpu() for name, value in model.conditions_of(batch).items()})
    tensors = {c.name: torch.cat([part[c.name] for part in parts]) for c in conditions}
    names = [case.id for case in images.cases]
    values, infos = [{"case": name} for name in names], [images.infos[name] for name in names]
    return Request(names, tensors, values, infos, images, has_targets=True)


def with_edit(request: Request, config: RequestConfig, pipeline: LatentDiffusionPipeline) -> Request:
    """The request with what --inpaint, --edit or --interpolate change."""
    path = config.inpaint or config.edit
    if path is None and config.interpolate is None:
        return request
    if len(request.names) > 1:
        raise InputError("conditions: editing takes one set of conditions (--condition)")
    if path is None:
        edit, infos = interpolation(config, pipeline)
        return dataclasses.replace(request, edit=edit, infos=infos)
    images = pipeline.open([path], "image")
    note_geometry(images, pipeline.spec)
    region = read_region(config.region, images, pipeline) if config.region else None
    usual = 1.0 if config.inpaint else 0.5
    strength = usual if config.strength is None else config.strength
    own = pipeline.prepare(pairs(config.invert, "invert")) if config.invert else None
    more = {"resample": config.resample or 4, "own": own}
    edit = ImageEdit(pipeline.model, images[0, 0]["image"], region, strength, **more)
    infos = list(images.infos.values())
    return dataclasses.replace(request, infos=infos, images=images, edit=edit, paste=region is not None)


def read_region(path: str, images: VolumeDataset, pipeline: LatentDiffusionPipeline) -> Tensor:
    """The region (*size) bool to inpaint in the one image of `images`, which is scaled by the voxels outside
    from now on. The region must be on the image's grid, and within the middle of the image, which is all that
    a sample of the run's size covers."""
    regions, file = pipeline.open([path], "region"), images.cases[0].image
    ours, theirs = (next(iter(dataset.infos.values())) for dataset in (regions, images))
    if not keeps_grid(file, "image", images.config):
        raise InputError(f"inpaint: {file} would be resampled to the run's grid, and not stay as it is")
    if ours.shape != theirs.shape:
        raise InputError(f"region: {path} has shape {ours.shape}, the image {file} {theirs.shape}")
    if pipeline.layout.check_affine and (off := voxels_off(ours, theirs)) > 1:
        raise InputError(f"region: {path} lies up to {off:.3g} voxels off the image {file}")
    region = regions[0, 0]["mask"] > 0
    seen, whole = regions.restore(0, region[None]).array, load_role(Path(path), "mask", regions.config).array
    if np.count_nonzero(whole) > np.count_nonzero(seen):
        size = "x".join(map(str, pipeline.spec.size))
        raise InputError(f"region: {path} reaches beyond the middle {size} of the image, all that is made")
    scale_by_outside(images, whole[0] != 0)
    return region


def scale_by_outside(images: VolumeDataset, region: np.ndarray) -> None:
    """Scale the one image of `images` by the voxels outside the region (*S) alone. A bright lesion moves the
    percentiles of its file: through them the network would learn of what it must not see."""
    case, config = images.cases[0], images.config
    outside = load_role(case.image, "image", config).array[:, ~region]
    how = (config.scaling, config.percentiles, config.window)
    found = [scaling_numbers(values, *how) if values.size else (0.0, 0.0) for values in outside]
    if all(low < high for low, high in found):  # else all that is left is one value, which has no scale
        low, high = zip(*found, strict=True)
        images.infos[case.id] = dataclasses.replace(images.infos[case.id], low=low, high=high)


def interpolation(
    config: RequestConfig, pipeline: LatentDiffusionPipeline
) -> tuple[Interpolation, list[CaseInfo | None]]:
    """The interpolation between two samples or two images, and a list of one entry: the first image, whose
    geometry the samples take, or None."""
    words = [word.strip() for word in config.interpolate.split(",")]
    ends, info = [int(word) for word in words if word.isdecimal()], None
    if len(words) != 2 or len(ends) == 1:
        raise InputError(f"interpolate: expected two samples or two images, got {config.interpolate!r}")
    if not ends:
        images = pipeline.open(words, "image")
        note_geometry(images, pipeline.spec)
        ends, info = [images[i, i]["image"] for i in range(2)], images.infos[images.cases[0].id]
    strength = 0.3 if config.strength is None else config.strength
    return Interpolation(pipeline.model, tuple(ends), config.samples, config.seed, strength), [info]
