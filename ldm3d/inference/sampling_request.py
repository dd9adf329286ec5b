"""What sampling is asked for: sets of conditions, an edit, and where the volumes made under them belong.

Conditions come from the command line, from a CSV, or from the run's own cases, whose images are then the
targets. Everything is checked, and the files are read, before anything is made.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..conditions import Condition, absent, check_names, split_words
from ..config import InputError, at_least
from ..data import CaseInfo, Volume, VolumeDataset, collate, restore
from ..data.cases import read_csv
from ..data.inspection import distance
from ..data.loading import keeps_grid, load_role
from ..engine.distributed import print0
from ..engine.training import to_device
from ..guidance import Guidance
from ..latent_diffusion import NO_EDIT, Edit, LatentDiffusion, run_data
from ..latents import WithConditions, encode_batch
from .editing import ImageEdit, Interpolation


@dataclass(frozen=True)
class RequestConfig:
    num: int | None = None  # volumes to make of each set of conditions; none = 16, of a list 1
    seed: int = 0  # sample i depends on (seed, i) alone
    condition: tuple[str, ...] = field(default=(), metadata={"repeat": True})  # NAME=VALUE, repeatable
    conditions: str | None = None  # CSV, each row a set of conditions, its columns their names (and name)
    cases: Literal["train", "val", "test"] | None = None  # the conditions of the run's own cases, and scores
    guidance: tuple[str, ...] = field(default=("1",), metadata={"repeat": True})  # scale; or class=3,text=2
    guidance_rescale: float = 0.0  # 0 to 1: how far guided predictions get back their standard deviation
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels t / T between which there is guidance
    inpaint: str | None = None  # image whose region is made anew, the rest kept exactly
    region: str | None = None  # mask of the region to inpaint: all that is not 0
    edit: str | None = None  # image to start from instead of from noise
    strength: float | None = None  # noise given to images, 0 to 1; none = inpaint 1, edit .5, interpolate .3
    interpolate: str | None = None  # two samples, such as 3,7, or two images, to go from one to the other

    def __post_init__(self) -> None:
        at_least(self, 1, "num")
        for names in (("condition", "conditions", "cases"), ("inpaint", "edit", "interpolate", "cases")):
            if len(given := [name for name in names if getattr(self, name)]) > 1:
                raise InputError(f"{given[0]}, {given[1]}: give one of the two")
        if bool(self.region) != bool(self.inpaint):
            raise InputError("inpaint, region: one needs the other")
        if self.strength is not None and not (self.inpaint or self.edit or self.interpolate):
            raise InputError("strength: needs inpaint, edit or interpolate")

    @property
    def samples(self) -> int:
        """Of each set of conditions."""
        return self.num or (1 if self.conditions or self.cases else 16)


@dataclass
class Request:
    """Sets of conditions, and where the volumes made under them belong.

    conditions: by name, (sets, ...). infos: of each set, the file whose geometry its samples take; none: the
    run's. places: the cases that are the targets, or the image that is edited. edit: see editing.py.
    """

    names: list[str]
    conditions: dict[str, Tensor]
    given: list[dict[str, Any]]
    infos: list[CaseInfo | None]
    places: VolumeDataset | None = None
    targets: bool = False
    edit: Edit = NO_EDIT
    paste: bool = False  # into the place's own volume

    def volume(self, number: int, x: Tensor, model: LatentDiffusion) -> Volume:
        """A sample of set `number` as a volume, in the units of the training data or, if an image is edited,
        of that image."""
        info, spacing = self.infos[number], self.conditions.get("spacing")
        if info is None and spacing is not None and not absent(spacing)[number]:
            return dataclasses.replace(model.spec, spacing=tuple(spacing[number].tolist())).to_volume(x)
        if info is None:
            return model.spec.to_volume(x)
        if not isinstance(self.edit, ImageEdit):
            info = dataclasses.replace(info, low=model.spec.low, high=model.spec.high)
        return restore(x, model.spec, info)


def read_request(config: RequestConfig, run: Path, model: LatentDiffusion, amp: str = "fp32") -> Request:
    """All that is asked of the model of a run. amp: the precision to encode sources with."""
    if config.cases:
        return request_of_cases(config, run, model, amp)
    known = model.denoiser.conditions
    names, rows = ["set_0000"], [pairs(config.condition)]
    if config.conditions:
        names, rows = read_rows(config.conditions, [c.name for c in known if c.may_be_file])
    check_names([name for row in rows for name in row], known)
    tell_of_captions(rows, known)
    infos, given = with_sources(rows, model)
    used, told = {name for row in rows for name in row}, []
    for set_name, row in zip(names, given, strict=True):
        try:
            told.append(model.prepare({name: row.get(name) for name in used}, amp=amp))
        except InputError as e:
            where = f"{config.conditions}: {set_name}: " if config.conditions else ""
            raise InputError(f"{where}{e}") from None
    conditions = {name: torch.cat([values[name] for values in told]) for name in told[0]}
    return with_edit(Request(names, conditions, rows, infos), config, model)


def pairs(words: tuple[str, ...], key: str = "condition") -> dict[str, str]:
    """("class=1", "text=a lesion") -> {"class": "1", "text": "a lesion"}. key: what errors name."""
    made: dict[str, str] = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark:
            raise InputError(f"{key}: expected NAME=VALUE, got {word!r}")
        if name in made:
            raise InputError(f"{key}: {name} is given twice")
        made[name] = value
    return made


def read_rows(path: str, files: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Names and rows of a CSV of conditions; what the columns `files` name is looked for beside it."""
    if not os.path.isfile(path):
        raise InputError(f"conditions: no file {path}")
    rows, beside = read_csv(Path(path), []), Path(path).parent
    if not rows:
        raise InputError(f"{path}: lists no conditions")
    names = [row.pop("name", f"set_{i:04d}") for i, row in enumerate(rows)]
    for name in names:
        if not name or Path(name).name != name or "\\" in name:
            raise InputError(f"{path}: name is {name!r}, expected one that a file can have")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two rows have the same name")
    for row in rows:
        row |= {k: str(beside / row[k]) for k in files if row.get(k) and os.path.isfile(beside / row[k])}
    return names, rows


def tell_of_captions(rows: list[dict[str, str]], known: Sequence[Condition]) -> None:
    """Notes of words that the run does not know, and of those beyond the length that it reads."""
    for c in (c for c in known if c.kind == "text"):
        captions = [row.get(c.name, "") for row in rows]
        if words := sorted({word for caption in captions for word in c.unknown_words(caption)}):
            print0(f"note: words that the run does not know: {', '.join(words)}")
        if long := [caption for caption in captions if len(split_words(caption)) > c.length]:
            words = " ".join(split_words(long[0])[: c.length])
            print0(f"note: captions are read up to {c.length} words; of {long[0]!r} that is {words!r}")


def with_sources(
    rows: list[dict[str, str]], model: LatentDiffusion
) -> tuple[list[CaseInfo | None], list[dict[str, Any]]]:
    """(of each row what was found in its source, rows with the source itself in place of its path)."""
    kinds = [c.name for c in model.denoiser.conditions if c.origin == "source"]
    infos, given = [None] * len(rows), [dict(row) for row in rows]
    name = next((name for name in kinds if any(row.get(name) for row in rows)), None)
    having = [i for i, row in enumerate(rows) if name and row.get(name)]
    if not having:
        return infos, given
    places = model.open([rows[i][name] for i in having], "source")
    for j, i in enumerate(having):
        given[i][name], infos[i] = places[j, j]["image"], places.infos[places.cases[j].id]
    tell_of_places(places, model)
    return infos, given


def tell_of_places(places: VolumeDataset, model: LatentDiffusion) -> None:
    """Notes of files that are larger than what the run makes, or of another spacing."""
    for case in places.cases:
        info = places.infos[case.id]
        if max(np.subtract(info.shape, model.spec.size)) > 0:
            print0(f"note: {case.image} has shape {info.shape}, only its middle is taken")
        if not np.allclose(info.spacing, model.spec.spacing, rtol=0.1):
            there = "x".join(f"{mm:g}" for mm in model.spec.spacing)
            print0(f"note: {case.image} has another spacing than the training data, {there} mm")


def guidance_of(config: RequestConfig) -> Guidance:
    """Guidance of "3", one scale for all conditions, or of "class=3,text=2"."""
    text = ",".join(config.guidance)
    named = pairs(tuple(text.split(",")), "guidance") if "=" in text else {}
    try:
        scale = {name.strip(): float(value) for name, value in named.items()} or float(text)
    except ValueError:
        raise InputError(f"guidance: expected a number, or NAME=NUMBER,..., got {text!r}") from None
    return Guidance(scale, config.guidance_rescale, config.guidance_interval)


def request_of_cases(config: RequestConfig, run: Path, model: LatentDiffusion, amp: str) -> Request:
    """The conditions of the run's own cases of one part, which are the targets."""
    data = run_data(run, model)
    if not data.split[config.cases]:
        raise InputError(f"cases: the run has no {config.cases} cases")
    places, known = data.dataset(config.cases), model.denoiser.conditions
    dataset, parts = WithConditions(places, known, places.cases, data.folder), []
    for i in range(len(dataset)):
        batch = to_device(collate([dataset[i, i]]), model.device)
        batch |= encode_batch(model.autoencoder, batch, known, amp)
        parts.append({name: value.cpu() for name, value in model.conditions_of(batch).items()})
    conditions = {c.name: torch.cat([part[c.name] for part in parts]) for c in known}
    names = [case.id for case in places.cases]
    given, infos = [{"case": name} for name in names], [places.infos[name] for name in names]
    return Request(names, conditions, given, infos, places, targets=True)


def with_edit(request: Request, config: RequestConfig, model: LatentDiffusion) -> Request:
    """The request with what --inpaint, --edit or --interpolate change."""
    path = config.inpaint or config.edit
    if path is None and config.interpolate is None:
        return request
    if len(request.names) > 1:
        raise InputError("conditions: editing takes one set of conditions (--condition)")
    if path is None:
        edit, infos = interpolation(config, model)
        return dataclasses.replace(request, edit=edit, infos=infos)
    places = model.open([path], "image")
    tell_of_places(places, model)
    region = read_region(config.region, places, model) if config.region else None
    usual = 1.0 if config.inpaint else 0.5
    strength = usual if config.strength is None else config.strength
    edit = ImageEdit(model, places[0, 0]["image"], region, strength)
    infos = list(places.infos.values())
    return dataclasses.replace(request, infos=infos, places=places, edit=edit, paste=region is not None)


def read_region(path: str, places: VolumeDataset, model: LatentDiffusion) -> Tensor:
    """The region (*size) bool to inpaint in the one image of `places`; it must lie where the image lies, and
    within the middle of it that the run sees."""
    regions, file = model.open([path], "region"), places.cases[0].image
    here, there = (next(iter(dataset.infos.values())) for dataset in (regions, places))
    if not keeps_grid(file, "image", places.config):
        raise InputError(f"inpaint: {file} would be resampled to the run's grid, and not stay as it is")
    if here.shape != there.shape:
        raise InputError(f"region: {path} has shape {here.shape}, the image {file} {there.shape}")
    if model.layout.check_affine and (off := distance(here, there)) > max(there.spacing):
        raise InputError(f"region: {path} lies up to {off:.3g} mm off the image {file}")
    region = regions[0, 0]["mask"] > 0
    seen, whole = regions.restore(0, region[None]).array, load_role(Path(path), "mask", regions.config).array
    if np.count_nonzero(whole) > np.count_nonzero(seen):
        size = "x".join(map(str, model.spec.size))
        raise InputError(f"region: {path} reaches beyond the middle {size} of the image, all that is made")
    return region


def interpolation(
    config: RequestConfig, model: LatentDiffusion
) -> tuple[Interpolation, list[CaseInfo | None]]:
    """(what is between two samples or images, where it lies: of images where the first lies)."""
    words = [word.strip() for word in config.interpolate.split(",")]
    if len(words) != 2:
        raise InputError(f"interpolate: expected two samples or two images, got {config.interpolate!r}")
    ends, info = [int(word) for word in words if word.isdecimal()], None
    if len(ends) == 1:
        raise InputError(f"interpolate: expected two samples or two images, got {config.interpolate!r}")
    if not ends:
        places = model.open(words, "image")
        tell_of_places(places, model)
        ends, info = [places[i, i]["image"] for i in range(2)], places.infos[places.cases[0].id]
    strength = 0.3 if config.strength is None else config.strength
    return Interpolation(model, tuple(ends), config.samples, config.seed, strength), [info]
