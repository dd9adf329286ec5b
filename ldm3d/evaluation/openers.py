"""Two sets of volumes that are to be compared, brought to one grid and one scale of intensities.

A set is a folder of images, a glob in quotes, a folder laid out like training data, or a run folder, which
stands for the cases of one part of its stored split. The rule for both sets comes from the run if there is
one (real set, or the run that is named), else from the settings, whose defaults are those of training:

    grid         the run's spacing and size; else the files' own spacing if all agree within 1 %, or the
                 median of the real set's; the size of the largest real volume. Smaller volumes repeat their
                 edge, of larger ones it is the middle.
    intensities  each volume by its own percentiles 0.5 and 99.5 to [-1, 1], clipped. That forgives a wrong
                 brightness or contrast; scaling `window` and `dataset` (the real set's numbers) do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..config import InputError, from_dict
from ..data import CaseInfo, DataConfig, DataSpec, VolumeDataset
from ..data.cases import find_cases, resolve_root
from ..data.images import own_images
from ..data.inspection import inspect_cases
from ..data.spec import make_spec
from ..data.volumes import is_volume_file, read_header
from ..engine.checkpoint import load_run
from ..engine.distributed import print0

Scaling = Literal["percentile", "window", "minmax", "zscore", "dataset", "none"]


@dataclass(frozen=True)
class OpenConfig:
    dims: Literal[2, 3] | None = None  # pictures or volumes; none = as the first real file is
    channel: tuple[int, ...] | None = None  # channels taken; none = the run's, else all
    file_spacing: tuple[float, ...] | None = None  # mm, of files that do not tell
    spacing: tuple[float, ...] | None = None  # mm, of the common grid; none = the run's, else see above
    size: tuple[int, ...] | None = None  # voxels of the common grid; none = the run's, else the largest real
    scaling: Scaling | None = None  # none = the run's, else percentile
    percentiles: tuple[float, float] | None = None  # of scaling percentile; none = the run's, else 0.5, 99.5
    window: tuple[float, float] | None = None  # of scaling window
    subset: int | None = None  # take only this many cases of each set


@dataclass(frozen=True)
class VolumeSets:
    """Data sets whose items have one shape, spacing and intensity rule, and the record of what was done."""

    sets: dict[str, VolumeDataset]  # "generated", and the real parts that were asked for
    run: str | None  # the run folder that gave the rule
    protocol: dict[str, Any]


def is_run(place: str | None) -> bool:
    """Is it a run folder, of either stage?"""
    return place is not None and (Path(place) / "config.json").is_file()


def autoencoder_path(run: str | Path) -> Path:
    """Where a run's autoencoder is: in stage two its own copy."""
    own = Path(run) / "autoencoder.pt"
    return own if own.exists() else Path(run)


def locate(place: str, key: str) -> tuple[Path, str | None]:
    """(root, pattern of the images below it) of a folder or glob; no pattern: laid out like training data."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path, own_images(path)
    wild = next((i for i, part in enumerate(path.parts) if "*" in part or "?" in part), None)
    if wild is not None:
        root = Path(*path.parts[:wild])
        if not root.is_dir():
            raise InputError(f"{key}: {root}: no such folder")
        return root, str(Path(*path.parts[wild:]))
    if is_volume_file(path) and path.is_file():
        raise InputError(f"{key}: {place}: a file, expected a folder or a pattern in quotes")
    raise InputError(f"{key}: {place}: no such folder")


def _first_file(root: Path, pattern: str | None, key: str) -> Path:
    """Some image of a set, to see whether it is 2-D or 3-D."""
    config = DataConfig(image=pattern, dims=3, allow_missing_mask=True)
    try:
        return find_cases(config, root)[0].image
    except InputError as e:
        raise InputError(f"{key}: {e}") from None


def _rule(config: OpenConfig, run: dict[str, Any] | None, root: Path, pattern: str | None) -> DataConfig:
    """How both sets are read and scaled."""
    if run is not None:
        base = from_dict(DataConfig, run["config"]["data"], "data")
        base = dataclasses.replace(base, mask=None, source=None, subset=None)
    else:
        dims = config.dims
        if dims is None:
            shape = read_header(_first_file(root, pattern, "real"), spacing=config.file_spacing).shape
            dims = 2 if len(shape) == 2 or 1 in shape else 3
        base = DataConfig(dims=dims)
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return dataclasses.replace(base, cache_gb=4.0, **{k: v for k, v in own.items() if v is not None})


def _cases(rule: DataConfig, root: Path, pattern: str | None, key: str) -> list:
    """The cases of a folder, images alone."""
    if pattern is not None:
        rule = dataclasses.replace(rule, image=pattern, table=None, subject=None, split=None)
    rule = dataclasses.replace(rule, mask=None, source=None, allow_missing_mask=True)
    try:
        return [dataclasses.replace(c, mask=None, source=None) for c in find_cases(rule, root)]
    except InputError as e:
        raise InputError(f"{key}: {e}") from None


def _part_of_run(run: dict[str, Any], rule: DataConfig, part: str) -> list:
    """The cases of a part of a run's stored split; "all": of every part, "held-out": not in training."""
    split = run["state"]["split"]
    listed = set(split["train"] if part == "held-out" else split.get(part, ()))
    if part in ("all", "held-out"):
        listed = {name for names in split.values() for name in names} - listed
    if not listed:
        raise InputError(f"part: the run has no {part} cases")
    layout = from_dict(DataConfig, run["config"]["data"], "data")
    root = resolve_root(layout, run["config"]["preset"])
    cases = [c for c in find_cases(dataclasses.replace(layout, subset=None), root) if c.id in listed]
    gone = sorted(listed - {c.id for c in cases})
    if gone:
        raise InputError(f"{root}: case {gone[0]} of the stored split is missing ({len(gone)} in all)")
    return [dataclasses.replace(c, mask=None, source=None) for c in cases][: rule.subset]


def open_sets(
    generated: str, real: dict[str, tuple[str, str]], config: OpenConfig, run: str | None = None
) -> VolumeSets:
    """real: name of each real set -> (place, part of the split if the place is a run folder).

    The first of them is the one whose grid and numbers count. `run`: whose rule is taken instead.
    InputError for what does not exist or does not fit.
    """
    first = next(iter(real))
    if run is not None and not is_run(run):
        raise InputError(f"run: {run}: not a run folder")
    run = run or (real[first][0] if is_run(real[first][0]) else None)
    content = load_run(autoencoder_path(run), "vae") if run else None
    places = {
        name: (None, None) if is_run(place) else locate(place, name) for name, (place, _) in real.items()
    }
    rule = _rule(config, content, *places[first])
    found = {}
    for name, (place, part) in real.items():
        if is_run(place):
            found[name] = _part_of_run(load_run(autoencoder_path(place), "vae"), rule, part)
        else:
            found[name] = _cases(rule, *places[name], name)
    found["generated"] = _cases(rule, *locate(generated, "generated"), "generated")
    rule, infos = _common_spacing(rule, found, first)
    channels = {name: infos[name][cases[0].id].channels for name, cases in found.items()}
    if len(set(channels.values())) > 1:
        raise InputError(
            f"the sets differ in their number of channels: {channels}; choose with --data.channel"
        )
    spec = make_spec(found[first], infos[first], {"train": [c.id for c in found[first]]}, rule)
    if content is not None:
        stored = DataSpec.from_dict(content["state"]["data"])
        numbers = {"low": stored.low, "high": stored.high} if rule.scaling == "dataset" else {}
        spec = dataclasses.replace(spec, size=rule.size or stored.size, **numbers)
    spec = dataclasses.replace(spec, source_channels=0, num_labels=None)
    sets = {name: VolumeDataset(cases, infos[name], spec, rule) for name, cases in found.items()}
    return VolumeSets(sets, run, _protocol(rule, spec))


def _common_spacing(
    rule: DataConfig, found: dict[str, list], first: str
) -> tuple[DataConfig, dict[str, dict[str, CaseInfo]]]:
    """Look into all files; where their spacings differ, look again on the grid of the real set's median."""
    infos = {name: inspect_cases(cases, rule) for name, cases in found.items()}
    spacings = np.array([info.spacing for part in infos.values() for info in part.values()])
    median = np.median([info.spacing for info in infos[first].values()], axis=0)
    if rule.spacing is None and not rule.resize and not np.allclose(spacings, median, rtol=0.01, atol=0):
        rule = dataclasses.replace(rule, spacing=tuple(map(float, median)))
        words = " x ".join(f"{mm:.3g}" for mm in median)
        print0(f"note: the files differ in spacing; all are resampled to {words} mm (--data.spacing)")
        infos = {name: inspect_cases(cases, rule) for name, cases in found.items()}
    return rule, infos


def _protocol(rule: DataConfig, spec: DataSpec) -> dict[str, Any]:
    """What figures have to be told with, or they cannot be compared with others."""
    how = {"percentile": list(rule.percentiles), "window": list(rule.window)}
    return {
        "size": list(spec.size),
        "spacing_mm": [round(float(mm), 6) for mm in rule.spacing or spec.spacing],
        "axes": "RAS: i to the right, j to the front, k to the head" if rule.dims == 3 else "row, column",
        "channels": spec.channels,
        "scaling": rule.scaling,
        "scaling_numbers": how.get(rule.scaling),
        "intensity_range": [-1.0, 1.0] if spec.clipped or rule.scaling == "minmax" else None,
        "padding": "edge repeated; larger volumes: their middle",
    }


def stamp(dataset: VolumeDataset) -> Any:
    """All that the items of a data set depend on."""
    files = [
        (str(c.image.resolve()), c.image.stat().st_size, c.image.stat().st_mtime_ns) for c in dataset.cases
    ]
    spec, rule = dataset.spec, dataset.config
    scaling = (rule.scaling, rule.percentiles, rule.window, spec.low, spec.high)
    return files, spec.size, rule.spacing, rule.file_spacing, rule.channel, scaling


def volumes_of(dataset: VolumeDataset) -> Iterator[Tensor]:
    """The scaled volumes (C, *S), in order."""
    return (dataset[i, i]["image"] for i in range(len(dataset)))
