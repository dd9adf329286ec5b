"""A map of latents as a picture (extra "viz") and as a page to explore (extra "analysis").

Both show every case as a point, coloured by one column of the table of cases.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..engine.logger import new_figure, save_figure
from .distance_tables import Row
from .pages import escape, page, write_page
from .pictures import data_url, png

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1")  # Okabe & Ito 2008
UNKNOWN = "#8a8f98"
COLUMNS = ("split", "class", "group", "subject")  # of the table of cases, by which the page colours


def _natural(text: str) -> list[tuple[int, str]]:
    """A sorting key that puts "case 9" before "case 10"."""
    return [(int(part or 0), "") if i % 2 else (0, part) for i, part in enumerate(re.split(r"(\d+)", text))]


def palette(cells: Sequence[str]) -> dict[str, str]:
    """A colour for each value of a column; "" (unknown) is grey. Above seven, hues are evenly spaced."""
    names = sorted({cell for cell in cells if cell}, key=_natural)
    colors = list(PALETTE)
    if len(names) > len(PALETTE):
        hues = [(i / len(names), (0.45, 0.6)[i % 2]) for i in range(len(names))]
        parts = [colorsys.hls_to_rgb(hue, light, 0.65) for hue, light in hues]
        colors = ["#" + "".join(f"{round(255 * v):02x}" for v in rgb) for rgb in parts]
    return dict(zip(names, colors, strict=False)) | ({"": UNKNOWN} if "" in cells else {})


def group_titles(facts: dict[str, Any]) -> dict[str, str]:
    """The names of the groups for a reader: the folders they come from."""
    return {"first": facts["data"]} | ({"other": facts["other"]} if facts["other"] else {})


def draw_map(path: Path, rows: list[Row], positions: Tensor, facts: dict[str, Any]) -> bool:
    """Write the map as a picture; False if matplotlib is not installed."""
    figure = new_figure(figsize=(8, 6), dpi=150, layout="constrained")
    if figure is None:
        return False
    column, titles = facts["color_by"], group_titles(facts)
    ax, colors = figure.subplots(), palette([row[column] for row in rows])
    for group, mark in (("first", "o"), ("other", "D")):
        for value, color in colors.items():
            cases = [i for i, row in enumerate(rows) if (row["group"], row[column]) == (group, value)]
            if cases:
                face = color if group == "first" else "none"
                name = titles[value] if column == "group" else value or "unknown"
                name += f" ({titles['other']})" if group == "other" and column != "group" else ""
                x, y = positions[cases].T.numpy()
                ax.scatter(x, y, 28, marker=mark, facecolors=face, edgecolors=color, alpha=0.8, label=name)
    ax.set(xlabel=facts["axes"][0], ylabel=facts["axes"][1])
    ax.set_title(f"{len(rows)} cases by {column}", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    if len(ax.collections) <= 20:
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def write_map_page(
    path: Path, rows: list[Row], positions: Tensor, pictures: list[np.ndarray], facts: dict[str, Any]
) -> bool:
    """Write the map as a page, where the mouse shows the slices of each case; False without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return False
    column = facts["color_by"]
    columns = [name for name in COLUMNS if len({row[name] for row in rows}) > 1 or name == column]
    data = {
        "column": column,
        "columns": {name: palette([row[name] for row in rows]) for name in columns},
        "cases": rows,
        "groups": group_titles(facts),
        "positions": [[float(f"{v:.5g}") for v in position] for position in positions.tolist()],
        "pictures": [data_url(png(picture)) for picture in pictures],
        "axes": facts["axes"],
    }
    words = f"{facts['cases']} cases of {facts['data']}"
    words += f" and {facts['other_cases']} of {facts['other']} (diamonds)" if facts["other"] else ""
    body = f"""<h1>Latents of {escape(facts["run"])}</h1>
<p class="faint">{escape(words)}. Hover over a case to see its middle slices, click to keep them.
Drag to zoom, double-click to zoom out; click a name in the legend to hide its cases.</p>
<div class="tools"><label>colour by <select id="column"></select></label></div>
<div class="both"><div class="card plot"><div id="map"></div></div>
<aside><div id="hover" class="card"><p class="faint">no case yet</p></div><div id="kept"></div></aside>
</div>"""
    write_page(path, page(f"Latents of {facts['run']}", body, "latent_map", data, get_plotlyjs()))
    return True
