"""Images and volumes as pictures inside a page: arrays to grey values, to PNG files, to data URLs.

PNG is written here, since none of the five run-time packages can. A PNG file (ISO/IEC 15948) is a signature
and a series of chunks. Each chunk is its length, its type, its data and their CRC-32:

    IHDR  width, height, 8 bits per sample, grey (0) or RGB (2)
    IDAT  all rows, compressed by zlib. A row is a filter byte and the pixels. Filter 2 stores each pixel as
          the difference to the pixel above, modulo 256
    IEND  nothing
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..data.geometry import resample
from ..data.volumes import Volume, read, strip_suffix
from ..engine.logger import mid_slices, tile

MAX_VOXELS = 2**21  # of a volume in a page; larger ones are resampled


def grey(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Grey values 0 to 255, uint8. The two `limits` become 0 and 255; by default they are the percentiles 0.5
    and 99.5 of the values. nan and inf become 0."""
    finite = values[np.isfinite(values)]
    low, high = limits or (np.percentile(finite, [0.5, 99.5]) if finite.size else (0, 1))
    scaled = (np.asarray(values, np.float64) - low) / max(high - low, 1e-12)
    return np.rint(255 * np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1)).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file. image: uint8, (H, W) for grey or (H, W, 3) for RGB."""
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    above = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # unsigned: wraps modulo 256
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), above], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if image.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    parts = [struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def data_url(png_file: bytes) -> str:
    """A PNG file as a URL that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png_file).decode()}"


def slices_picture(
    array: np.ndarray,
    spacing: tuple[float, ...],
    display: tuple[float, float] = (-1.0, 1.0),
    widest: int = 360,
) -> np.ndarray:
    """The middle slices of a volume (*S) side by side, as one uint8 picture. display: black and white.

    Pixels are square in mm, so that the anatomy keeps its proportions. The picture is at most about `widest`
    pixels wide, so that a page can hold hundreds of them.
    """
    extents = [n * mm for n, mm in zip(array.shape, spacing, strict=True)]
    width = extents[1] if array.ndim == 2 else 2 * extents[0] + extents[1]
    side = max(min(spacing), width / widest)
    volume = resample(Volume(array[None], np.diag([*spacing, 1.0])), (side,) * array.ndim)
    return grey(tile(mid_slices(volume.array[0])), display)


def volume_for_viewer(path: Path, dims: int) -> dict[str, Any]:
    """A volume file as the viewer of a page wants it: grey values in one PNG, and how to read that PNG.

    Only the first channel is taken, but for 2-D pictures in colour. A volume of more than MAX_VOXELS voxels
    is resampled: `factor` voxels become one along each axis. 3-D: axial slices lie side by side in the PNG,
    `columns` of them in a row.
    """
    volume = read(path, dims=dims)
    factor = math.ceil((math.prod(volume.shape) / MAX_VOXELS) ** (1 / dims))
    if factor > 1:
        volume = resample(volume, tuple(factor * mm for mm in volume.spacing))
    array = volume.array if dims == 2 and volume.channels == 3 else volume.array[:1]
    picture, columns = side_by_side(grey(array))
    return {
        "name": strip_suffix(path),
        "shape": volume.shape,
        "mm": [float(f"{mm:.6g}") for mm in volume.spacing],
        "columns": columns,
        "factor": factor,
        "letters": volume.orientation is not None and dims == 3,
        "picture": data_url(png(picture)),
    }


def side_by_side(array: np.ndarray) -> tuple[np.ndarray, int]:
    """A volume (C, *S) uint8 as one picture: (picture, number of slices in a row of the picture)."""
    if array.ndim == 3:
        return (array[0] if len(array) == 1 else array.transpose(1, 2, 0)), 1
    slices = array[0].transpose(2, 1, 0)  # (K, J, I)
    columns = math.ceil(math.sqrt(len(slices)))
    rows = math.ceil(len(slices) / columns)
    slices = np.pad(slices, ((0, rows * columns - len(slices)), (0, 0), (0, 0)))
    _, height, width = slices.shape
    grid = slices.reshape(rows, columns, height, width).swapaxes(1, 2)  # (rows, J, columns, I)
    return grid.reshape(rows * height, columns * width), columns
