"""What sampling is asked for: sets of conditions, an edit, and where the volumes made under them belong.

Conditions come from the command line, from a CSV, or from the run's own cases, whose images are then the
targets. Everything is checked, and the files are read, before anything is made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .cases import read_csv
from .conditions import OF_SOURCE, check_names
from .config import InputError, at_least
from .data import VolumeDataset, collate, restore
from .distributed import print0
from .editing import ImageEdit, Interpolation
from .guidance import Guidance
from .latent_diffusion import NO_EDIT, Edit, LatentDiffusion, run_data
from .latents import WithConditions, encode_batch
from .scan import distance, keeps_grid, load_role
from .training import to_device
from .volumes import Volume


@dataclass(frozen=True)
class RequestConfig:
    num: int | None = None  # volumes to make of each set of conditions; none = 16, of a list 1
    seed: int = 0  # sample i depends on (seed, i) alone
    condition: tuple[str, ...] = field(default=(), metadata={"repeat": True})  # NAME=VALUE, repeatable
    conditions: str | None = None  # CSV, each row a set of conditions, its columns their names (and name)
    cases: Literal["train", "val", "test"] | None = None  # the conditions of the run's own cases, and scores
    guidance: str = "1"  # guidance scale: of all conditions, or of each, such as class=3,text=2
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

    conditions: by name, (sets, ...). places: volumes of the same geometry as the samples of each set, or
    None. targets: are these what the samples should be? edit: see editing.py.
    """

    names: list[str]
    conditions: dict[str, Tensor]
    given: list[dict[str, Any]]
    places: VolumeDataset | None = None
    targets: bool = False
    edit: Edit = NO_EDIT
    paste: bool = False  # into the place's own volume

    def volume(self, number: int, x: Tensor, model: LatentDiffusion) -> Volume:
        """A sample of set `number` as a volume, in the units of the training data or, if an image is edited,
        of that image."""
        if self.places is None:
            return model.state.to_volume(x)
        info = self.places.infos[self.places.cases[number].id]
        if not isinstance(self.edit, ImageEdit):
            info = dataclasses.replace(info, low=model.state.low, high=model.state.high)
        return restore(x, model.state, info)


def read_request(config: RequestConfig, run: Path, model: LatentDiffusion, amp: str = "fp32") -> Request:
    """All that is asked of the model of a run. amp: the precision to encode sources with."""
    if config.cases:
        return request_of_cases(config, run, model, amp)
    rows = [pairs(config.condition)] if not config.conditions else read_rows(config.conditions)
    check_names([name for row in rows for name in row if name != "name"], model.denoiser.conditions)
    names = [row.pop("name", "") or f"set_{i:04d}" for i, row in enumerate(rows)]
    if len(set(names)) < len(names):
        raise InputError(f"{config.conditions}: two rows have the same name")
    for c in model.denoiser.conditions:
        words = sorted({w for row in rows if c.kind == "text" for w in c.unknown_words(row.get(c.name, ""))})
        if words:
            print0(f"note: words that the run does not know: {', '.join(words)}")
    sources = [
        c for c in model.denoiser.conditions if c.kind in OF_SOURCE and any(row.get(c.name) for row in rows)
    ]
    places, given = None, rows
    if sources and all(row.get(sources[0].name) for row in rows):  # the samples take its geometry
        places = model.open([row[sources[0].name] for row in rows], "source")
        given = [{**row, sources[0].name: places[i, i]["image"]} for i, row in enumerate(rows)]
    used = {name for row in rows for name in row}
    values = {name: [row.get(name) for row in given] for name in used}
    request = Request(names, model.prepare(values, len(rows)), rows, places)
    return with_edit(request, config, model)


def pairs(words: tuple[str, ...]) -> dict[str, str]:
    """("class=1", "text=a lesion") -> {"class": "1", "text": "a lesion"}."""
    for word in words:
        if "=" not in word:
            raise InputError(f"condition: expected NAME=VALUE, got {word!r}")
    return dict(word.split("=", 1) for word in words)


def read_rows(path: str) -> list[dict[str, str]]:
    """Rows of a CSV of conditions; files in it are looked for beside it."""
    rows = read_csv(Path(path), [])
    if not rows:
        raise InputError(f"{path}: lists no conditions")
    beside = Path(path).parent

    def found(cell: str) -> str:
        return str(beside / cell) if cell and "/" not in cell[:1] and (beside / cell).is_file() else cell

    return [{k: found(v) for k, v in row.items()} for row in rows]


def guidance_of(config: RequestConfig) -> Guidance:
    """Guidance of "3", one scale for all conditions, or of "class=3,text=2"."""
    text, scale = config.guidance, {}
    try:
        if "=" in text:
            scale = {name.strip(): float(value) for name, value in pairs(tuple(text.split(","))).items()}
        else:
            scale = float(text)
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
    return Request(names, conditions, [{"case": name} for name in names], places, targets=True)


def with_edit(request: Request, config: RequestConfig, model: LatentDiffusion) -> Request:
    """The request with what --inpaint, --edit or --interpolate change."""
    path = config.inpaint or config.edit
    if path is None and config.interpolate is None:
        return request
    if len(request.names) > 1:
        raise InputError("conditions: editing takes one set of conditions (--condition)")
    if path is None:
        return dataclasses.replace(request, edit=interpolation(config, model))
    places = model.open([path], "image")
    region = read_region(config.region, places, model) if config.region else None
    usual = 1.0 if config.inpaint else 0.5
    strength = usual if config.strength is None else config.strength
    edit = ImageEdit(model, places[0, 0]["image"], region, strength)
    return dataclasses.replace(request, places=places, edit=edit, paste=region is not None)


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
        size = "x".join(map(str, model.state.size))
        raise InputError(f"region: {path} reaches beyond the middle {size} of the image, all that is made")
    return region


def interpolation(config: RequestConfig, model: LatentDiffusion) -> Interpolation:
    words = [word.strip() for word in config.interpolate.split(",")]
    if len(words) != 2:
        raise InputError(f"interpolate: expected two samples or two images, got {config.interpolate!r}")
    ends: Any = [int(word) for word in words if word.isdecimal()]
    if len(ends) < 2:
        dataset = model.open(words, "image")
        ends = [dataset[i, i]["image"] for i in range(2)]
    strength = 0.3 if config.strength is None else config.strength
    return Interpolation(model, tuple(ends), config.samples, config.seed, strength)
