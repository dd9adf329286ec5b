"""Slices of volumes as 2-D cases: `data.slices axial` beside `data.dims 2`.

Every slice of a volume becomes a case NAME_042 of the volume's subject, with the slice of its mask and of its
source. The slices are written once, as TIFF files in `data.cache_dir`, and all that follows sees a folder of
2-D images: a batch of slices reads small files, and never a whole compressed volume for each slice. A volume
that changes gets new files.

Slices with one value everywhere are left out. Intensities are scaled by the numbers of the whole volume
(inspection.py), so that neighbouring slices stay alike. Axes are those of the volume, RAS+ where the format
states an orientation: sagittal slices lie across axis 0, coronal ones across axis 1, axial ones across 2.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError
from ..engine.distributed import main_first, print0
from ..engine.logger import progress
from .cases import ROLES, Case, find_cases
from .loading import num_reading_threads, read_options
from .settings import DataConfig, of_volumes
from .volumes import file_name, is_file, read, stamp, strip_suffix, take_slice, write

ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis of the volume that slices lie across


def _folder(path: Path, role: str, config: DataConfig) -> Path:
    """Where the slices of a file are kept: another folder for another content or way of reading it."""
    series = read_options(role, config).get("series")
    key = (str(path.resolve()), *stamp(path), config.slices, role == "image", series)
    digest = hashlib.sha256(repr(key).encode(errors="surrogateescape")).hexdigest()[:16]
    return Path(config.cache_dir) / "slices" / f"{file_name(strip_suffix(path))}-{digest}"


def _stored_type(array: np.ndarray) -> Any:
    """The smallest type that keeps the values: integers of 8, 16 or 32 bits, else float32."""
    if not np.isfinite(array).all() or not (array == np.rint(array)).all():
        return np.float32
    low, high = array.min(), array.max()
    kinds = (np.uint8, np.int16, np.uint16, np.int32)
    fits = (kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return next(fits, np.float32)


def _write_slices(path: Path, role: str, config: DataConfig) -> dict[str, Any]:
    """Writes the slices of a file, unless they are there. {"count": number of all, "kept": those written}."""
    folder = _folder(path, role, config)
    try:
        found = json.loads((folder / "slices.json").read_text())
        if len(list(folder.glob("*.tif"))) == len(found["kept"]):
            return found
    except (OSError, ValueError):
        pass
    options = read_options(role, of_volumes(config)) | {"channel": None}  # chosen when slices are read
    volume, axis = read(path, **options), ACROSS[config.slices]
    if 1 in volume.shape:
        raise InputError(f"{path}: a single image {volume.shape}, expected a volume (data.slices)")
    count = volume.shape[axis]
    array = np.moveaxis(volume.array, axis + 1, 1).reshape(volume.channels, count, -1)
    varies = (array.max(2) != array.min(2)).any(0)  # NaN too: the inspection refuses it
    kept = np.flatnonzero(varies | (role != "image")).tolist()
    dtype = _stored_type(volume.array)
    for number in kept:
        write(_file(folder, number), take_slice(volume, axis, number), dtype, overwrite=True)
    found = {"count": count, "kept": kept}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".slices.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(found))
        os.replace(temporary, folder / "slices.json")
    except OSError as error:
        raise InputError(f"data.cache_dir: cannot write {folder} ({error.strerror or error})") from None
    return found


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.tif"


def slice_cases(cases: list[Case], config: DataConfig) -> list[Case]:
    """The slices of these volumes as cases; without data.slices the cases as they are. Rank 0 goes first and
    writes what is not there yet.

    InputError for a file that cannot be read, and for a mask or source with another number of slices.
    """
    if config.slices == "none":
        return cases
    jobs = dict.fromkeys((path, role) for c in cases for role in ROLES if (path := getattr(c, role)))
    for path, _ in jobs:
        if not is_file(path):
            raise InputError(f"{path}: no such file")
    with main_first(), ThreadPoolExecutor(min(4, num_reading_threads())) as pool:
        results = pool.map(lambda job: _write_slices(*job, config), jobs)
        found = dict(zip(jobs, progress(results, "slicing", len(jobs)), strict=True))
    slices, left_out = [], 0
    for case in cases:
        image, files = found[case.image, "image"], {}
        for role in ROLES:
            if (path := getattr(case, role)) is None:
                continue
            if found[path, role]["count"] != image["count"]:
                counts = f"{found[path, role]['count']} {config.slices} slices, its image {case.image} has"
                raise InputError(f"{path}: {role} has {counts} {image['count']}")
            files[role] = _folder(path, role, config)
        if not image["kept"]:
            raise InputError(f"{case.image}: all voxels have the same value")
        left_out += image["count"] - len(image["kept"])
        digits = max(3, math.ceil(math.log10(image["count"] + 1)))
        for number in image["kept"]:
            own = {role: _file(folder, number) for role, folder in files.items()}
            slices.append(replace(case, id=f"{case.id}_{number:0{digits}d}", volume=case, **own))
    print0(
        f"note: {len(slices)} {config.slices} slices of {len(cases)} volumes, written to "
        f"{Path(config.cache_dir) / 'slices'}; {left_out} with one value everywhere are left out"
    )
    return slices


def find_all_cases(config: DataConfig, root: Path) -> list[Case]:
    """`find_cases`, or with data.slices the slices of the volumes that it finds."""
    return slice_cases(find_cases(config, root), config)
