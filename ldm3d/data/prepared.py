"""Volumes prepared for patches: decoded once, and kept so that a patch reads little beside itself.

A compressed file is decompressed whole for every patch that is cut from it, which takes seconds for a CT.
`data.cache disk` therefore decodes each file once, on the training grid, and writes it to `data.cache_dir`
in bricks of 32^3 voxels (256^2 in 2-D), one after the other, fewer voxels at the far edges:

    bricks      in C order of their places, each (C, *b), in the type of the source file
    header      JSON: shape (C, *S), dtype, slope and intercept, a CRC-32 of every brick; of a mask how many
                voxels of each plane have a label
    end         length of the header, CRC-32 of the header

The brick at voxels (i, j, k), of e_0 x e_1 x e_2 voxels, of a volume of n_0 x n_1 x n_2, begins after

    i n_1 n_2  +  e_0 j n_2  +  e_0 e_1 k        voxels of C channels

Example: a patch of 96^3 touches 4 bricks along each axis, at most 128 voxels: 4 MiB of the 128 MiB of a CT of
512 x 512 x 256 voxels of 16 bits. Every brick is compared with its checksum when it is read. A file that is
damaged or lost is made anew, from the source file. A file appears whole or not at all, and a file whose
source has changed is replaced. Nothing is mapped into memory: a process holds the patch, and what the system
keeps of the files in free memory serves all processes of the machine.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..config import InputError
from ..engine.distributed import print0
from .loading import DecodedVolume, label_type, read_options, values
from .settings import DataConfig
from .volumes import file_name, stamp, strip_suffix

BRICK = {2: 256, 3: 32}  # voxels along each axis
SUFFIX = ".bricks"
END = struct.Struct("<QI")  # length and CRC-32 of the header
SPEED = 3e7  # voxels of a .nii.gz that a core prepares in a second (tests/benchmarks/large.py: 3.4e7)
STALE = 3600.0  # seconds, after which nobody writes to a temporary file any more
GIB = 2**30


def prepared_file(
    path: Path, role: str, config: DataConfig, shape: tuple[int, ...], num_labels: int | None
) -> Path:
    """The prepared file of a source file. The name ends with two hashes: of the way to read, then of the
    state of the source. shape: *S on the training grid."""
    how = (str(path.resolve()), role, read_options(role, config), config.spacing, shape, BRICK[config.dims])
    how += (config.label_values, label_type(num_labels).str) if role == "mask" else ()
    digests = [
        hashlib.sha256(repr(key).encode(errors="surrogateescape")).hexdigest() for key in (how, stamp(path))
    ]
    name = f"{file_name(strip_suffix(path))}-{digests[0][:16]}-{digests[1][:8]}{SUFFIX}"
    return Path(config.cache_dir) / "volumes" / name


def _corners(spans: list[tuple[int, int]], edge: int) -> itertools.product:
    """The first voxels of the bricks that a window from a to b - 1 along each axis touches, in C order."""
    return itertools.product(*(range(a // edge * edge, b, edge) for a, b in spans))


def _write(path: Path, volume: DecodedVolume) -> None:
    """Writes the prepared file of a volume, and removes those of earlier states of its source."""
    stored, edge = volume.stored, BRICK[volume.stored.ndim - 1]
    header = {"shape": stored.shape, "dtype": stored.dtype.str, "slope_inter": volume.slope_inter}
    if volume.slope_inter is None:
        header["labelled"] = volume.labelled.tolist()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            checksums = header["checksums"] = []
            for corner in _corners([(0, n) for n in stored.shape[1:]], edge):
                brick = stored[(slice(None), *(slice(i, i + edge) for i in corner))].tobytes()
                checksums.append(zlib.crc32(brick))
                file.write(brick)
            text = json.dumps(header).encode()
            file.write(text + END.pack(len(text), zlib.crc32(text)))
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"data.cache_dir: cannot write {path} ({e.strerror or e})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    same_source = glob.escape(path.name.rpartition("-")[0])
    for old in path.parent.glob(f"{same_source}-*{SUFFIX}"):
        if old != path:
            old.unlink(missing_ok=True)


class PreparedVolume:
    """A volume (C, *S) in a prepared file. `volume[:, 3:5, :, 7:9]` are its values there, as of a
    `DecodedVolume`, of which only the touched bricks are read.

    load: decodes the source, for a prepared file that does not exist or is damaged.
    """

    def __init__(self, path: Path, load: Callable[[], DecodedVolume]):
        self.path, self._load = path, load
        try:
            self._read_header()
        except (OSError, ValueError, struct.error):
            self._make()

    def _make(self) -> None:
        _write(self.path, self._load())
        self._read_header()

    def _read_header(self) -> None:
        """ValueError, OSError or struct.error for a file that does not end as prepared files do."""
        with open(self.path, "rb") as file:
            file.seek(-END.size, os.SEEK_END)
            length, checksum = END.unpack(file.read(END.size))
            file.seek(-END.size - length, os.SEEK_END)
            text = file.read(length)
        if zlib.crc32(text) != checksum:
            raise ValueError(f"{self.path}: damaged")
        header = json.loads(text)
        self.shape, self.dtype = tuple(header["shape"]), np.dtype(header["dtype"])
        self.slope_inter = header["slope_inter"] and tuple(header["slope_inter"])
        self.checksums = header["checksums"]
        self.labelled = np.array(header.get("labelled", ()))  # as of a DecodedVolume

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        try:
            stored = self._read(window[1:])
        except (OSError, ValueError):
            print0(f"note: {self.path} is damaged or gone, and is made anew")
            self._make()
            stored = self._read(window[1:])
        return values(stored, self.slope_inter)

    def _read(self, window: tuple[slice, ...]) -> np.ndarray:
        """The stored voxels (C, *) of a window. ValueError if a brick is not what was written."""
        channels, *shape = self.shape
        edge, voxel = BRICK[len(shape)], channels * self.dtype.itemsize
        spans = [part.indices(n)[:2] for part, n in zip(window, shape, strict=True)]
        grid = [-(-n // edge) for n in shape]
        out = np.empty((channels, *(max(0, b - a) for a, b in spans)), self.dtype)
        with open(self.path, "rb") as file:
            for corner in _corners(spans, edge):
                extent = [min(edge, n - i) for i, n in zip(corner, shape, strict=True)]
                before = sum(
                    i * math.prod(extent[:axis]) * math.prod(shape[axis + 1 :])
                    for axis, i in enumerate(corner)
                )
                file.seek(before * voxel)
                data = file.read(math.prod(extent) * voxel)
                number = np.ravel_multi_index([i // edge for i in corner], grid)
                if zlib.crc32(data) != self.checksums[number]:
                    raise ValueError(f"{self.path}: damaged")
                brick = np.frombuffer(data, self.dtype).reshape(channels, *extent)
                common = [
                    (max(a, i), min(b, i + n)) for (a, b), i, n in zip(spans, corner, extent, strict=True)
                ]
                here = (slice(a - s, b - s) for (a, b), (s, _) in zip(common, spans, strict=True))
                there = (slice(a - i, b - i) for (a, b), i in zip(common, corner, strict=True))
                out[(slice(None), *here)] = brick[(slice(None), *there)]
        return out


def announce(folder: Path, num_bytes: int, num_volumes: int, num_voxels: int, num_cores: float) -> None:
    """Says what preparing these volumes takes of disk and time, where it is not little. InputError if the
    disk has no room for them. What processes that were killed have left in the folder is removed; what older
    versions have prepared is named.

    num_cores: those of all ranks together.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > STALE:
                temporary.unlink()
    older = [p for p in folder.parent.glob("*.npy") if re.fullmatch(r"[0-9a-f]{24}\.npy", p.name)]
    if older:
        gib = sum(path.stat().st_size for path in older) / GIB
        print0(
            f"note: {len(older)} files *.npy in {folder.parent}, {gib:.2g} GiB, are what older versions have "
            "prepared; they are not read any more and may be deleted"
        )
    free, seconds = shutil.disk_usage(there).free, num_voxels / SPEED / num_cores
    if num_bytes > free:
        raise InputError(
            f"data.cache_dir: {num_volumes} volumes take {num_bytes / GIB:.3g} GiB, {there} has "
            f"{free / GIB:.3g} GiB left; name another disk, or set --data.cache none"
        )
    if num_bytes > GIB / 4 or seconds > 20:
        print0(
            f"note: {num_volumes} volumes are prepared once: {num_bytes / GIB:.2g} GiB in {folder}, "
            f"about {max(1, round(seconds / 60))} min"
        )
