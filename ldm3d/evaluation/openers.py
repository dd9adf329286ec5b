"""Sets of volumes that are to be compared, opened on one grid and with one scale of intensities.

A set is a folder of images, a glob in quotes, a folder laid out like training data, or a run folder, which
stands for the cases of one part of its stored split. All sets are read by one rule. The rule is that of the
run if there is one (the real set, or --run); else the settings give it, with the defaults of training:

    grid         spacing and size of the run. Without a run: the spacing of the files if all agree within 1 %,
                 else the median spacing of the real set; and the size of the largest real volume. Smaller
                 volumes are padded by repeating their edge, larger ones cut to their middle.
    intensities  each volume is scaled by its own percentiles 0.5 and 99.5 to [-1, 1] and clipped, so a wrong
                 brightness or contrast does not count. It counts with scaling `window`, and with `dataset`,
                 which scales all volumes by the numbers of the run, or of the real set.
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
from ..data import Case, CaseInfo, DataConfig, DataSpec, VolumeDataset
from ..data.images import find_images, locate, own_cases
from ..data.inspection import inspect_cases, on_other_grid
from ..data.spec import make_spec
from ..data.volumes import read_header, stamp
from ..engine.checkpoint import load_run
from ..engine.distributed import print0

Scaling = Literal["percentile", "window", "minmax", "zscore", "dataset", "none"]


@dataclass(frozen=True)
class OpenConfig:
    dims: Literal[2, 3] | None = None  # pictures or volumes; none = as the first real file is
    channel: tuple[int, ...] | None = None  # channels taken; none = the run's, else all
    file_spacing: tuple[float, ...] | None = None  # mm, of files that state none
    spacing: tuple[float, ...] | None = None  # mm, of the common grid; none = the run's, else see above
    size: tuple[int, ...] | None = None  # voxels of the common grid; none = the run's, else the largest real
    scaling: Scaling | None = None  # none = the run's, else percentile
    percentiles: tuple[float, float] | None = None  # of scaling percentile; none = the run's, else 0.5, 99.5
    window: tuple[float, float] | None = None  # of scaling window
    subset: int | None = None  # take only this many cases of each set


@dataclass(frozen=True)
class VolumeSets:
    """Sets of volumes that can be compared: items have one shape, spacing and scale of intensities."""

    sets: dict[str, VolumeDataset]  # "generated" and the real sets, by name
    run: str | None  # the run folder whose rule all sets follow
    protocol: dict[str, Any]  # grid and scaling, for the report


def is_run(location: str | None) -> bool:
    """Is this the path of a run folder, of the autoencoder or of the diffusion?"""
    return location is not None and (Path(location) / "config.json").is_file()


def autoencoder_path(run: str | Path) -> Path:
    """The checkpoint of a run's autoencoder: the copy in a stage-two folder, else the run itself."""
    own = Path(run) / "autoencoder.pt"
    return own if own.exists() else Path(run)


def beside(location: str) -> Path:
    """Where a report on the images of a folder or pattern goes: into the folder that holds that folder."""
    return locate(location)[0].resolve().parent


def _images(location: str, rule: DataConfig, key: str) -> tuple[DataConfig, list[Case]]:
    """The images of a set: (how they are read, cases)."""
    try:
        locate(location)
        return find_images(location, rule)
    except InputError as e:
        raise InputError(f"{key}: {e}") from None


def _rule(config: OpenConfig, run: dict[str, Any] | None, real: str) -> DataConfig:
    """How all sets are read and scaled: as in the training of `run`, else as the files of `real` are."""
    if run is not None:
        base = from_dict(DataConfig, run["config"]["data"], "data")
        base = dataclasses.replace(base, mask=None, source=None, subset=None)
    else:
        dims = config.dims
        if dims is None:
            image = _images(real, DataConfig(), "real")[1][0].image
            shape = read_header(image, spacing=config.file_spacing).shape
            dims = 2 if len(shape) == 2 or 1 in shape else 3
        base = DataConfig(dims=dims)
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return dataclasses.replace(base, cache_gb=4.0, **{k: v for k, v in own.items() if v is not None})


def _own_channels(name: str, read: DataConfig, rule: DataConfig, of_run: tuple[int, ...], image: Path) -> Any:
    """The channels to read of the files of a set, where a run takes the channels `of_run` of its own files.

    A run that takes channel 1 writes samples with one channel, which is that channel 1. So channel 1 is
    channel 0 of these files, and any other channel is not in them.
    """
    num = read_header(image, spacing=rule.file_spacing, dims=rule.dims).channels
    if num != len(of_run) or (num > max(of_run) and name != "generated"):
        return read.channel
    wanted = rule.channel or of_run
    for channel in wanted:
        if channel not in of_run:
            held = ", ".join(map(str, of_run))
            raise InputError(f"channel: no channel {channel} in the files of {name}, the run's hold {held}")
    return tuple(of_run.index(channel) for channel in wanted)


def _note_channels(rules: dict[str, DataConfig], found: dict[str, list[Case]]) -> None:
    """A note of files with different numbers of channels, which need not be the same ones."""
    options = {name: {"spacing": rule.file_spacing, "dims": rule.dims} for name, rule in rules.items()}
    nums = {name: read_header(cases[0].image, **options[name]).channels for name, cases in found.items()}
    if len(set(nums.values())) > 1:
        taken = {name: list(rule.channel) or "all" for name, rule in rules.items()}
        print0(f"note: the files have different numbers of channels, {nums}; compared are {taken}")


def open_sets(
    generated: str, real: dict[str, tuple[str, str]], config: OpenConfig, run: str | None = None
) -> VolumeSets:
    """Open the generated set and the real ones on one grid.

    real: name of each real set -> (location, part of the split if that is a run folder). Grid and scaling
    numbers are those of the first one, or of `run`. InputError for what does not exist or does not fit.
    """
    first = next(iter(real))
    if run is not None and not is_run(run):
        raise InputError(f"run: {run}: not a run folder")
    run = run or (real[first][0] if is_run(real[first][0]) else None)
    content = load_run(autoencoder_path(run), "vae") if run else None
    rule = _rule(config, content, real[first][0])
    of_run = tuple(content["config"]["data"].get("channel", ())) if content else ()
    rules, found = {}, {}
    for name, (location, part) in {**real, "generated": (generated, "all")}.items():
        if name in real and is_run(location):
            rules[name], cases = rule, own_cases(load_run(autoencoder_path(location), "vae"), part)[1]
            found[name] = cases[: rule.subset]
        else:
            read, found[name] = _images(location, rule, name)
            channel = read.channel
            if of_run:
                channel = _own_channels(name, read, rule, of_run, found[name][0].image)
            rules[name] = dataclasses.replace(rule, channel=channel)
    if rule.channel and not of_run:
        _note_channels(rules, found)
    rules, infos = _common_spacing(rules, found, first)
    channels = {name: infos[name][cases[0].id].channels for name, cases in found.items()}
    if len(set(channels.values())) > 1:
        raise InputError(
            f"the sets differ in their number of channels: {channels}; choose with --data.channel"
        )
    rule = rules[first]
    spec = make_spec(found[first], infos[first], {"train": [c.id for c in found[first]]}, rule)
    if content is not None:
        stored = DataSpec.from_dict(content["state"]["data"])
        numbers = {"low": stored.low, "high": stored.high} if rule.scaling == "dataset" else {}
        spec = dataclasses.replace(spec, size=rule.size or stored.size, **numbers)
    spec = dataclasses.replace(spec, source_channels=0, num_labels=None)
    sets = {name: VolumeDataset(cases, infos[name], spec, rules[name]) for name, cases in found.items()}
    return VolumeSets(sets, run, _protocol(rule, spec))


def _common_spacing(
    rules: dict[str, DataConfig], found: dict[str, list[Case]], first: str
) -> tuple[dict[str, DataConfig], dict[str, dict[str, CaseInfo]]]:
    """Inspect all files; if their spacings differ, they take the median spacing of the real set `first`."""
    infos = {name: inspect_cases(cases, rules[name]) for name, cases in found.items()}
    rule, spacings = rules[first], [info.spacing for part in infos.values() for info in part.values()]
    median = np.median([info.spacing for info in infos[first].values()], axis=0)
    if rule.spacing is None and not rule.resize and not np.allclose(spacings, median, rtol=0.01, atol=0):
        common = tuple(map(float, median))
        words = " x ".join(f"{mm:.3g}" for mm in median)
        print0(f"note: the files differ in spacing; all are resampled to {words} mm (--data.spacing)")
        rules = {name: dataclasses.replace(rule, spacing=common) for name, rule in rules.items()}
        infos = {name: on_other_grid(infos[name], cases, rules[name]) for name, cases in found.items()}
    return rules, infos


def _protocol(rule: DataConfig, spec: DataSpec) -> dict[str, Any]:
    """Grid and scaling: figures can only be compared where all of this is equal."""
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


def file_stamp(path: Path) -> tuple[str, int, int]:
    """What tells a file's content in the key of a cache: its path, size (bytes), time of change (ns)."""
    return str(path.resolve()), *stamp(path)


def content_key(dataset: VolumeDataset) -> Any:
    """All that the items of a data set depend on: files, grid and scaling. A key for caches."""
    files = [file_stamp(case.image) for case in dataset.cases]
    spec, rule = dataset.spec, dataset.config
    scaling = (rule.scaling, rule.percentiles, rule.window, spec.low, spec.high)
    which = (rule.channel, rule.series) if rule.series else rule.channel
    return files, spec.size, rule.spacing, rule.file_spacing, which, scaling


def volumes_of(dataset: VolumeDataset) -> Iterator[Tensor]:
    """The scaled volumes (C, *S), in order."""
    return (dataset[i, i]["image"] for i in range(len(dataset)))
