"""Other images than those a run was trained on, read and scaled as the training data was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import InputError, from_dict
from ..engine.distributed import print0
from .cases import Case, find_cases
from .dataset import VolumeDataset
from .inspection import MAX_LABEL, CaseInfo, inspect_cases
from .settings import DataConfig
from .spec import DataSpec
from .transforms import AugmentConfig
from .volumes import PICTURE, SUFFIXES, is_volume_file, strip_suffix


def own_images(folder: Path) -> str | None:
    """The pattern of the image files in the folder itself, all of one kind; None: it holds none."""
    names = [p.name for p in folder.iterdir() if is_volume_file(p)]
    suffixes = [end for end in SUFFIXES if any(name.endswith(end) for name in names)]
    others = [end for end in suffixes[1:] if end not in PICTURE]  # pictures beside volumes are previews
    if others:
        print0(f"note: of {folder} the {suffixes[0]} files are taken, not those in {', '.join(others)}")
    return f"*{suffixes[0]}" if suffixes else None


def open_files(paths: Sequence[str | Path], role: str, config: DataConfig, spec: DataSpec) -> VolumeDataset:
    """Single files, read, scaled and centred as those of a role in training; every one a case.

    Items hold "image" (roles image and source) or "mask". A "region" is a mask of any labels. Intensities are
    scaled by the file's own numbers; sources that share those of their image, by the training set's.
    """
    if role == "region":
        role, config = "mask", replace(config, label_values=())
        spec = replace(spec, num_labels=MAX_LABEL + 1)
    options = {
        "channel": {"image": config.channel, "source": config.source_channel}.get(role, ()),
        "mask": None,
        "source": None,
        "cache": "none",
        "augment": AugmentConfig(),
        "paired_scaling": "separate",
    }
    if role == "mask":
        options["num_labels"] = spec.num_labels
    if role == "source":
        spec = replace(spec, channels=spec.source_channels, low=spec.source_low, high=spec.source_high)
    paths = [Path(path) for path in paths]
    for path in paths:
        if not os.path.isfile(path):  # Path.is_file raises for names that are too long
            raise InputError(
                f"{path}: " + ("a folder, expected a file" if os.path.isdir(path) else "no such file")
            )
    cases = [
        Case(f"{i}_{strip_suffix(path)}", path, mask=path if role == "mask" else None)
        for i, path in enumerate(paths)
    ]
    shared = role == "source" and config.paired_scaling == "shared"
    config = replace(config, **options, scaling="none" if role == "mask" else config.scaling)
    infos = inspect_cases(cases, config)
    for case in cases:
        info = infos[case.id]
        if role != "mask" and info.channels != spec.channels:
            raise InputError(f"{case.image}: has {info.channels} channels, the model wants {spec.channels}")
        infos[case.id] = replace(info, low=spec.low, high=spec.high) if shared else info
    spec = replace(spec, source_channels=0, num_labels=spec.num_labels if role == "mask" else None)
    return VolumeDataset(cases, infos, spec, config)


def open_folder(folder: str | Path, content: dict[str, Any]) -> VolumeDataset:
    """Other images for the autoencoder whose checkpoint is `content`: read and scaled as in training.

    Every case keeps its own size. `folder` holds image files; where it holds none itself, it is laid out like
    the training data.
    """
    config, cases = find_images(folder, content)
    spec = DataSpec.from_dict(content["state"]["data"])
    infos = scan_images(cases, config, spec)
    spec = replace(spec, source_channels=0, num_labels=None)
    return VolumeDataset(cases, infos, spec, config, own_size=True)


def scan_images(cases: list[Case], config: DataConfig, spec: DataSpec) -> dict[str, CaseInfo]:
    """What the scan finds of other cases than those of training, which must have their channels."""
    infos = inspect_cases(cases, config)
    channels = infos[cases[0].id].channels
    if channels != spec.channels:
        raise InputError(
            f"{cases[0].image}: has {channels} channels, the model was trained on {spec.channels}"
        )
    return infos


def find_images(place: str | Path, content: dict[str, Any]) -> tuple[DataConfig, list[Case]]:
    """A folder's images, or one file, as cases without anything beside, and how such files are read.

    Both follow the training data of the checkpoint `content`.
    """
    place = Path(place)
    config = from_dict(DataConfig, content["config"]["data"], "data")
    config = replace(config, cache="none", mask=None, source=None, subject=None, split=None)
    config = replace(config, subset=None, allow_missing_mask=True)
    if place.is_file():
        name = strip_suffix(place)
        return replace(config, root=str(place.parent)), [Case(name, place, subject=name)]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder")
    pattern, config = own_images(place), replace(config, root=str(place))
    if pattern:
        config = replace(config, image=pattern, table=None)
    try:
        return config, [replace(case, mask=None, source=None) for case in find_cases(config, place)]
    except InputError as e:
        raise InputError(f"{place}: holds no images, and is not laid out like the training data: {e}") from e
