"""A run on one page: what was asked for, how it went, and what came out of it.

    python -m ldm3d.reports run runs/ldm-hippocampus                   writes runs/ldm-hippocampus/report.html
    python -m ldm3d.reports run runs/ldm-hippocampus --samples SAMPLES --out page.html

The page holds curves of all that log.jsonl tells, the previews over time, a viewer of sampled or
reconstructed volumes (three planes that move together), the scores and pictures of every folder of results
in the run's (samples-001, evaluation-001, ...), timing and memory, and the configuration. It is one file that
works offline: made to be mailed, or kept beside a paper.

Nothing is computed anew and no checkpoint is read, so it takes a second and can be made while the run goes
on. Volumes are embedded in 8 bits, coarser if they have more than MAX_VOXELS voxels. A curve of more than
MAX_POINTS points shows the means of as many equal parts.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError, at_least, read_json
from ..data import read
from ..data.geometry import resample
from ..data.volumes import PICTURE, is_volume_file, strip_suffix
from .pages import embed, escape, grey, page, png, write_page

MAX_VOXELS, MAX_POINTS, MAX_PREVIEWS = 2**21, 800, 24
FIRST = ("loss", "psnr", "ssim")  # curves that come first
COST = ("samples_per_s", "data_wait", "peak_gib", "lr", "grad_norm", "skipped_steps")
TITLES = {
    "samples_per_s": "samples per second",
    "data_wait": "share of time spent waiting for data",
    "peak_gib": "peak memory, GiB",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "skipped_steps": "skipped steps",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "kl": "KL, nats per latent element",
}


@dataclass(frozen=True)
class Config:
    samples: str | None = None  # folder of volumes to show; none = the newest samples or reconstructions
    volumes: int = 4  # volumes to show, the first ones
    out: str | None = None  # the file; none = report.html in the run folder

    def __post_init__(self) -> None:
        at_least(self, 0, "volumes")


# --- the log ------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; what a run at work has not finished writing is passed over."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines += [line] if {"step", "split", "seconds"} <= line.keys() else []
        except (ValueError, AttributeError):
            continue
    return lines


def curves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chart for every number in the log: {"name", "title", "lines": {label: [[step, seconds, value] ...]}}.

    Training and validation share the chart of their common number; those of one number at several noise
    levels (loss_u0.2, loss_u0.4 ...) share one too. A number that never changes has no chart.
    """
    charts: dict[str, dict[str, list]] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("step", "seconds") or not isinstance(value, (int, float)):
                continue
            level = re.fullmatch(r"(.+)_u([\d.]+)", key)
            name, label = (f"{level[1]} at u", f"u = {level[2]}") if level else (key, line["split"])
            points = charts.setdefault(name, {}).setdefault(label, [])
            points.append([line["step"], line["seconds"], value])
    changing = [n for n, c in charts.items() if len({p[2] for points in c.values() for p in points}) > 1]
    first = sorted(changing, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n in COST))
    return [
        {
            "name": name,
            "title": TITLES.get(name, name.replace("_", " ").replace(" at u", " by noise level u")),
            "lines": {label: thin(points) for label, points in charts[name].items()},
        }
        for name in first
    ]


def thin(points: list[list[float]], most: int = MAX_POINTS) -> list[list[float]]:
    """At most `most` points: the means of equal parts, five digits."""
    parts = [points[i * len(points) // most : (i + 1) * len(points) // most] for i in range(most)]
    parts = parts if len(points) > most else [[p] for p in points]
    return [[float(f"{sum(column) / len(part):.5g}") for column in zip(*part, strict=True)] for part in parts]


def best_of(lines: list[dict[str, Any]]) -> str:
    """The best validation: highest PSNR or Dice where there is one, else lowest loss."""
    kinds = ("psnr", max, "PSNR {:.2f} dB"), ("dice", max, "Dice {:.3f}"), ("loss", min, "loss {:.4g}")
    for key, pick, what in kinds:
        known = [line for line in lines if line["split"] == "val" and line.get(key) is not None]
        if known:
            line = pick(known, key=lambda line, key=key: line[key])
            return f"{what.format(line[key])} at step {line['step']:,}"
    return "none yet"


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 20 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def facts_of(config: dict[str, Any], lines: list[dict[str, Any]], split: dict[str, list]) -> dict[str, str]:
    """What a reader wants to know first."""
    train = [line for line in lines if line["split"] == "train"]

    def known(key: str) -> list[float]:
        return [line[key] for line in train if line.get(key) is not None]

    facts = {}
    if lines:
        facts["step"] = f"{lines[-1]['step']:,} of {config['run']['steps']:,}"
        facts["training time"] = duration(lines[-1]["seconds"])
        facts["best validation"] = best_of(lines)
    if known("samples_per_s"):
        facts["samples per second"] = f"{statistics.median(known('samples_per_s')):.4g} (median)"
    if known("data_wait"):
        facts["waiting for data"] = f"{statistics.mean(known('data_wait')):.1%} of the time"
    if known("peak_gib"):
        facts["peak memory"] = f"{max(known('peak_gib')):.3g} GiB"
    if known("skipped_steps"):
        facts["skipped steps"] = f"{known('skipped_steps')[-1]:g}"
    if split:
        facts["cases"] = ", ".join(f"{len(names)} {part}" for part, names in split.items() if names)
    return facts


# --- pictures and volumes -----------------------------------------------------------------------------------


def previews(folder: Path) -> list[dict[str, Any]]:
    """The preview of every validation, of evenly chosen ones where there are many."""
    files = sorted(f for f in folder.glob("step_*.png") if f.stem.removeprefix("step_").isdecimal())
    if len(files) > MAX_PREVIEWS:
        files = [files[round(i)] for i in np.linspace(0, len(files) - 1, MAX_PREVIEWS)]
    return [{"step": int(f.stem.removeprefix("step_")), "picture": embed(f.read_bytes())} for f in files]


def result_folders(run: Path) -> list[Path]:
    """Folders in the run folder that hold a JSON file, such as samples-001, the newest first."""
    found = [f for f in run.iterdir() if f.is_dir() and any(f.glob("*.json"))]
    return sorted(found, key=lambda f: (f.stat().st_mtime, f.name), reverse=True)


def volume_files(folder: Path) -> list[Path]:
    """The volumes in a folder of results; its PNG files are pictures of them."""
    if not folder.is_dir():
        raise InputError(f"samples: {folder}: no such folder")
    files = (f for f in folder.iterdir() if is_volume_file(f) and not f.name.lower().endswith(PICTURE))
    return sorted(files)


def embedded_volume(path: Path, dims: int) -> dict[str, Any]:
    """A volume for the page: its first channel (2-D: of three, a colour picture) in 8 bits.

    3-D: the axial slices (rows j, columns i) lie side by side in a PNG, `columns` in a row of it.
    """
    volume = read(path, dims=dims)
    factor = math.ceil((math.prod(volume.shape) / MAX_VOXELS) ** (1 / dims))
    if factor > 1:
        volume = resample(volume, tuple(factor * mm for mm in volume.spacing))
    array = volume.array if dims == 2 and volume.channels == 3 else volume.array[:1]
    sprite, columns = sheet_of(grey(array))
    return {
        "name": strip_suffix(path),
        "shape": volume.shape,
        "mm": [float(f"{mm:.6g}") for mm in volume.spacing],
        "columns": columns,
        "factor": factor,
        "letters": volume.orientation is not None and dims == 3,
        "picture": embed(png(sprite)),
    }


def sheet_of(array: np.ndarray) -> tuple[np.ndarray, int]:
    """((C, *S) uint8 as one picture, slices in a row of it)."""
    if array.ndim == 3:
        return (array[0] if len(array) == 1 else array.transpose(1, 2, 0)), 1
    slices = array[0].transpose(2, 1, 0)  # (K, J, I)
    columns = math.ceil(math.sqrt(len(slices)))
    rows = math.ceil(len(slices) / columns)
    slices = np.pad(slices, ((0, rows * columns - len(slices)), (0, 0), (0, 0)))
    _, high, wide = slices.shape
    grid = slices.reshape(rows, columns, high, wide).swapaxes(1, 2)  # (rows, J, columns, I)
    return grid.reshape(rows * high, columns * wide), columns


# --- JSON as tables -----------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value of a JSON file in a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(f"[{shown(v)}]" if isinstance(v, list) else shown(v) for v in value)
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def cell(value: Any, tag: str = "td") -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<{tag}{' class=number' if number else ''}>{escape(shown(value))}</{tag}>"


def table(rows: dict[str, dict[str, Any]], first: str = "") -> str:
    """One row an entry, one column a key."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    align = {n: any(isinstance(row.get(n), (int, float)) for row in rows.values()) for n in names}
    head = "".join(f"<th{' class=number' if align[n] else ''}>{escape(n)}</th>" for n in names)
    lines = [
        f"<tr>{cell(title, 'th')}{''.join(cell(row.get(n, '')) for n in names)}</tr>"
        for title, row in rows.items()
    ]
    return f"<div class=wide><table><tr><th>{escape(first)}</th>{head}</tr>{''.join(lines)}</table></div>"


def pairs(values: dict[str, Any]) -> str:
    """A table of two columns."""
    lines = [f"<tr><th>{escape(k)}</th><td>{escape(shown(v))}</td></tr>" for k, v in values.items()]
    return f"<table>{''.join(lines)}</table>"


def folded(title: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def tables_of(content: dict[str, Any], title: str = "") -> tuple[str, dict[str, Any]]:
    """(tables of what is nested in a JSON object, its plain values).

    Objects whose values are objects of plain values become one table; a long one is folded.
    """
    plain = {k: v for k, v in content.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in content.items() if isinstance(v, dict) and v}
    if not plain and nested and all(not isinstance(v, dict) for row in nested.values() for v in row.values()):
        body = table(nested, title)
        return (folded(f"{title}: {len(nested)}", body) if len(nested) > 12 else body), {}
    parts = []
    for name, value in nested.items():
        body, rest = tables_of(value, name)
        parts.append(body)
        parts += [f"<h4>{escape(name)}</h4>{pairs(rest)}"] if rest else []
    return "".join(parts), plain


# --- sections of the page -----------------------------------------------------------------------------------


def results(folders: list[Path]) -> str:
    """Scores and pictures of every folder of results."""
    parts = []
    for folder in folders:
        body = ""
        for path in sorted(folder.glob("*.json")):
            try:
                tables, rest = tables_of(read_json(path))
            except InputError as e:
                body += f"<p>{escape(e)}</p>"
                continue
            body += tables + folded(f"how it was made ({path.name})", pairs(rest))
        for path in sorted(folder.glob("*.png")):
            body += f'<figure><img alt="{escape(path.name)}" src="{embed(path.read_bytes())}">'
            body += f"<figcaption>{escape(path.name)}</figcaption></figure>"
        parts.append(f'<div class="card"><h3>{escape(folder.name)}</h3>{body}</div>')
    return "".join(parts) or "<p class=faint>No folder of results in the run folder yet.</p>"


def settings(config: dict[str, Any]) -> str:
    """The configuration, a card for each group."""
    groups = {"run as a whole": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    for name, group in ((k, v) for k, v in config.items() if isinstance(v, dict)):
        inner = {k: v for k, v in group.items() if not isinstance(v, dict)}
        inner |= {f"{k}.{kk}": vv for k, v in group.items() if isinstance(v, dict) for kk, vv in v.items()}
        groups[name] = inner
    cards = [f'<div class="card"><h3>{escape(k)}</h3>{pairs(v)}</div>' for k, v in groups.items() if v]
    return f'<div class="settings">{"".join(cards)}</div>'


NAMES = {"vae": "Autoencoder", "ldm": "Latent diffusion", "cdal": "Segmentation"}


def make_page(run: Path, config: Config) -> str:
    """The whole page of a run folder; InputError where it is none."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not (run / "config.json").exists():
        raise InputError(f"{run}: no run folder (it has no config.json)")
    settings_of_run = read_json(run / "config.json")
    if "run" not in settings_of_run:
        raise InputError(f"{run / 'config.json'}: not the configuration of a run")
    folders, dims = result_folders(run), settings_of_run.get("data", {}).get("dims", 3)
    files = [volume_files(folder) for folder in ([Path(config.samples)] if config.samples else folders)]
    files = next((found for found in files if found), [])
    if config.samples and not files:
        raise InputError(f"samples: {config.samples} holds no volumes")
    lines = read_log(run / "log.jsonl")
    split = read_json(run / "split.json") if (run / "split.json").exists() else {}
    volumes = [embedded_volume(path, dims) for path in files[: config.volumes]]
    data = {"charts": curves(lines), "cost": COST, "previews": previews(run / "previews"), "volumes": volumes}

    kind = settings_of_run.get("kind", "")
    title = f"{run.resolve().name}"
    tiles = "".join(
        f"<div class=card><div class=faint>{escape(k)}</div><div class=fact>{escape(v)}</div></div>"
        for k, v in facts_of(settings_of_run, lines, split).items()
    )
    where = f" of {escape(files[0].parent.name)}" if volumes else ""
    coarse = f", every {volumes[0]['factor']} voxels as one" if volumes and volumes[0]["factor"] > 1 else ""
    hint = "In 8 bits, from the 0.5th to the 99.5th percentile of each volume" + coarse
    sections = {
        "curves": "Curves",
        "previews": "Previews over time" if data["previews"] else "",
        "volumes": f"Volumes{where}" if volumes else "",
        "results": "Scores and results",
        "cost": "Speed and optimizer",
        "settings": "Configuration",
    }
    links = " ".join(f'<a href="#{k}">{escape(v)}</a>' for k, v in sections.items() if v)
    bodies = {
        "curves": CONTROLS if lines else "<p class=faint>Nothing is logged yet.</p>",
        "previews": '<div class="card" id="time"></div>',
        "volumes": f'<div class="card" id="viewer"></div><p class="faint">{hint}.</p>',
        "results": results(folders),
        "cost": '<div class="charts" id="cost-charts"></div>',
        "settings": settings(settings_of_run),
    }
    parts = [f'<section id="{k}"><h2>{escape(v)}</h2>{bodies[k]}</section>' for k, v in sections.items() if v]
    made = f"{NAMES.get(kind, kind)}, preset {settings_of_run.get('preset', '')}; page of "
    made += time.strftime("%Y-%m-%d %H:%M")
    body = f"""<header><h1>{escape(title)}</h1><p class="faint">{escape(made)}</p><nav>{links}</nav></header>
<div class="facts">{tiles}</div>
{"".join(parts)}"""
    return page(f"{title}: report", body, "report", data)


CONTROLS = """<div class="tools">
<label>over <select id="over"><option value="0">steps</option><option value="1">minutes</option></select>
</label>
<label><input type="checkbox" id="log"> logarithmic</label>
<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.01" value="0"></label>
</div><div class="charts" id="charts"></div>"""


# --- the command --------------------------------------------------------------------------------------------


def write_report(config: Config, run: Path) -> Path:
    """The page of a run, written to `config.out` or into the run folder."""
    path = write_page(Path(config.out or run / "report.html"), make_page(run, config))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, open it in a browser")
    return path
