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

from .checkpoint import write_text
from .config import InputError
from .logger import mid_slices, tile
from .volumes import Volume, resample

MARK = '<meta name="generator" content="ldm3d">'
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1d232b; --faint: #667080;
  --line: #dde1e7; --accent: #0b6bcb; --c0: #0b6bcb; --c1: #d9730d; --c2: #12855b; --c3: #b4468c;
  --c4: #7a5cd6; --c5: #9a7d0a; --c6: #3d8ea6; --c7: #c23b3b; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1d2128; --text: #e6e9ee;
  --faint: #98a2b3; --line: #343a45; --accent: #6cb2ff; --c0: #6cb2ff; --c1: #ffa657; --c2: #5fd3a3;
  --c3: #f28cc8; --c4: #b39dff; --c5: #e3c14d; --c6: #7ed0e6; --c7: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 24px 64px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 75ch; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
a { color: var(--accent); }
.faint { color: var(--faint); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
img, canvas { max-width: 100%; image-rendering: pixelated; }
label { white-space: nowrap; color: var(--faint); font-size: 14px; }
select, button, input[type=search] { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 3px 8px; }
button { cursor: pointer; }
input[type=range] { accent-color: var(--accent); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
"""


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


def page(title: str, body: str, script: str, data: Any, style: str = "", library: str = "") -> str:
    """The whole file. `script` finds `data` as the constant DATA; `library`: JavaScript to run first."""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARK}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{STYLE}{style}</style></head>
<body>
{body}
<script>{library}</script>
<script>"use strict";
const DATA = {content};
{script}</script>
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
