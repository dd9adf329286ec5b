"""One HTML file that holds all it shows: it opens from the disk, works offline, and sends nothing anywhere.

Pictures are embedded as PNG data, numbers as JSON, styles and scripts as text. The content security policy of
the page makes sure of the rest: it forbids the browser every request.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ..config import InputError
from ..engine.checkpoint import write_text

MARK = '<meta name="generator" content="ldm3d">'
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)


def escape(value: Any) -> str:
    """The value as text for HTML, also for use within quotes."""
    return html.escape(str(value))


def page(title: str, body: str, name: str, data: Any, library: str = "") -> str:
    """The HTML of a page, with the style <name>.css and the script <name>.js of this folder.

    The script finds `data` as the constant DATA. "<" is written as an escape there, so that no text in the
    data can end the script. library: JavaScript that runs before the script.
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
    """Write a page in one step, so that no half of it is ever seen.

    An earlier page of this package is replaced. InputError if the path holds any other file or cannot be
    written.
    """
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
