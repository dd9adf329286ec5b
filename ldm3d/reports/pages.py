"""Pages to look at: one HTML file that holds all it shows, opens from the disk, and asks no network for
anything.

Pictures are embedded as PNG data, numbers as JSON. That nothing is loaded is not left to good will: the
page's content security policy forbids the browser every request. A PNG (ISO/IEC 15948) is a signature and
chunks, each its length, type, data and CRC-32:

    IHDR  width, height, 8 bits a sample, grey (0) or RGB (2)
    IDAT  zlib of all rows, each a filter byte and the row; filter 2 = difference to the row above, mod 256
    IEND  nothing
"""

from __future__ import annotations

import base64
import html
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError
from ..data import Volume
from ..data.geometry import resample
from ..engine.checkpoint import write_text
from ..engine.logger import mid_slices, tile

MARK = '<meta name="generator" content="ldm3d">'
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)


# --- pictures -----------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels (H, W), grey, or (H, W, 3), RGB."""
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    above = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # unsigned: wraps as the format wants
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), above], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if image.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    parts = [struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def embed(data: bytes, kind: str = "image/png") -> str:
    """The bytes as a URL that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def grey(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """uint8: `limits` (default: 0.5th and 99.5th percentile) become 0 and 255; what is not finite is 0."""
    finite = values[np.isfinite(values)]
    low, high = limits or (np.percentile(finite, [0.5, 99.5]) if finite.size else (0, 1))
    scaled = (np.asarray(values, np.float64) - low) / max(high - low, 1e-12)
    return np.rint(255 * np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1)).astype(np.uint8)


def slices_picture(array: np.ndarray, spacing: tuple[float, ...], widest: int = 360) -> np.ndarray:
    """The middle slices of a scaled volume (*S) side by side, on pixels of equal sides (mm), uint8; -1 is
    black.

    At most about `widest` pixels wide, so that a page can hold many of them.
    """
    extents = [n * mm for n, mm in zip(array.shape, spacing, strict=True)]
    width = extents[1] if array.ndim == 2 else 2 * extents[0] + extents[1]
    side = max(min(spacing), width / widest)
    volume = resample(Volume(array[None], np.diag([*spacing, 1.0])), (side,) * array.ndim)
    return grey(tile(mid_slices(volume.array[0])), (-1, 1))


# --- the page -----------------------------------------------------------------------------------------------


def escape(value: Any) -> str:
    """Text for HTML, also within quotes."""
    return html.escape(str(value))


def page(title: str, body: str, name: str, data: Any, library: str = "") -> str:
    """The whole file, with the style <name>.css and the script <name>.js of this folder.

    The script finds `data` as the constant DATA, in which no "<" can end or comment out anything; `library`
    is JavaScript to run before it.
    """
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    here = Path(__file__).parent
    style = (here / "pages.css").read_text() + (here / f"{name}.css").read_text()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARK}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{style}</style></head>
<body>
{body}
<script>{library}</script>
<script>"use strict";
const DATA = {content};
{(here / f"{name}.js").read_text()}</script>
</body></html>
"""


def write_page(path: Path, content: str) -> Path:
    """Atomically. An earlier page of ours is replaced, any other file is not."""
    try:
        if path.exists():
            with open(path, encoding="utf-8", errors="replace") as file:
                if MARK not in file.read(1000):
                    raise InputError(f"out: {path} exists and is not a page of ours; nothing is overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    except OSError as e:
        raise InputError(f"out: {path} cannot be written ({e.strerror})") from None
    return path
