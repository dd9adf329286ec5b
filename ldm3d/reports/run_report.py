"""A run on one page: its settings, how training went, and what came out of it.

    python -m ldm3d.reports run runs/ldm-hippocampus                   writes runs/ldm-hippocampus/report.html
    python -m ldm3d.reports run runs/ldm-hippocampus --samples SAMPLES --out page.html

The page shows verdicts, warnings, scores and pictures of every folder of results in the run folder
(samples-001, evaluation-001 ...), curves of all figures in log.jsonl, the previews over time, a viewer of
sampled or reconstructed volumes (three planes that move together), speed and memory, and the settings. It is
one file, and it works offline.

The report reads what the run has written and computes nothing anew. No checkpoint is read, so it takes a
second, and it can be made while the run goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError, at_least, read_json
from ..data.volumes import PICTURE, is_volume_file
from ..engine.logger import read_log
from .html_tables import folded, key_table, scores_of, tables_of
from .pages import escape, page, write_page
from .pictures import data_url, volume_for_viewer
from .run_log import COST, curves, facts_of

MAX_PREVIEWS = 24
KINDS = {"vae": "Autoencoder", "ldm": "Latent diffusion", "cdal": "Segmentation"}


@dataclass(frozen=True)
class RunReportConfig:
    samples: str | None = None  # folder of volumes to show; none = the newest samples or reconstructions
    volumes: int = 4  # number of volumes to show, the first ones
    out: str | None = None  # file to write; none = report.html in the run folder

    def __post_init__(self) -> None:
        at_least(self, 0, "volumes")


# --- what the run folder holds ------------------------------------------------------------------------------


def previews(folder: Path) -> list[dict[str, Any]]:
    """The previews of the validations. Of more than MAX_PREVIEWS, evenly spaced ones are taken."""
    files = sorted(f for f in folder.glob("step_*.png") if f.stem.removeprefix("step_").isdecimal())
    if len(files) > MAX_PREVIEWS:
        files = [files[round(i)] for i in np.linspace(0, len(files) - 1, MAX_PREVIEWS)]
    return [{"step": int(f.stem.removeprefix("step_")), "picture": data_url(f.read_bytes())} for f in files]


def result_folders(run: Path) -> list[Path]:
    """The folders of results in a run folder, such as samples-001: those with a JSON file. Newest first."""
    found = [f for f in run.iterdir() if f.is_dir() and any(f.glob("*.json"))]
    return sorted(found, key=lambda f: (f.stat().st_mtime, f.name), reverse=True)


def volume_files(folder: Path) -> list[Path]:
    """The volumes in a folder of results. PNG files there are pictures of volumes, and are left out."""
    if not folder.is_dir():
        raise InputError(f"samples: {folder}: no such folder")
    files = (f for f in folder.iterdir() if is_volume_file(f) and not f.name.lower().endswith(PICTURE))
    return sorted(files)


def volumes_to_show(config: RunReportConfig, folders: list[Path]) -> list[Path]:
    """The first volumes of the folder that was asked for, or of the newest folder that has any."""
    for folder in [Path(config.samples)] if config.samples else folders:
        if files := volume_files(folder):
            return files[: config.volumes]
    if config.samples:
        raise InputError(f"samples: {config.samples} holds no volumes")
    return []


# --- sections of the page -----------------------------------------------------------------------------------

CURVE_CONTROLS = """<div class="tools">
<label>over <select id="over"><option value="0">steps</option><option value="1">minutes</option></select>
</label>
<label><input type="checkbox" id="log"> logarithmic</label>
<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.01" value="0"></label>
</div><div class="charts" id="charts"></div>"""


def results_html(folders: list[Path]) -> str:
    """Verdict, warnings, scores and pictures of every folder of results; how it was made is folded."""
    cards = []
    for folder in folders:
        body = ""
        for path in sorted(folder.glob("*.json")):
            try:
                scores, others = scores_of(read_json(path))
                tables, rest = tables_of(others)
            except InputError as e:
                body += f"<p>{escape(e)}</p>"
                continue
            body += scores + folded(f"how it was made ({path.name})", key_table(rest) + tables)
        for path in sorted(folder.glob("*.png")):
            body += f'<figure><img alt="{escape(path.name)}" src="{data_url(path.read_bytes())}">'
            body += f"<figcaption>{escape(path.name)}</figcaption></figure>"
        cards.append(f'<div class="card"><h3>{escape(folder.name)}</h3>{body}</div>')
    return "".join(cards) or "<p class=faint>No folder of results in the run folder yet.</p>"


def settings_html(settings: dict[str, Any]) -> str:
    """The configuration, one card for each group of settings."""
    groups = {"run as a whole": {k: v for k, v in settings.items() if not isinstance(v, dict)}}
    for name, group in settings.items():
        if isinstance(group, dict):
            flat = {k: v for k, v in group.items() if not isinstance(v, dict)}
            flat |= {f"{k}.{kk}": vv for k, v in group.items() if isinstance(v, dict) for kk, vv in v.items()}
            groups[name] = flat
    cards = [f'<div class="card"><h3>{escape(k)}</h3>{key_table(v)}</div>' for k, v in groups.items() if v]
    return f'<div class="settings">{"".join(cards)}</div>'


def body_html(title: str, subtitle: str, facts: dict[str, str], sections: dict[str, tuple[str, str]]) -> str:
    """Heading, links, facts, and the sections: {id: (heading, HTML)}."""
    tiles = "".join(
        f"<div class=card><div class=faint>{escape(k)}</div><div class=fact>{escape(v)}</div></div>"
        for k, v in facts.items()
    )
    links = " ".join(f'<a href="#{k}">{escape(heading)}</a>' for k, (heading, _) in sections.items())
    parts = [
        f'<section id="{k}"><h2>{escape(heading)}</h2>{html}</section>'
        for k, (heading, html) in sections.items()
    ]
    top = f'<h1>{escape(title)}</h1><p class="faint">{escape(subtitle)}</p>'
    return f"""<header>{top}<nav>{links}</nav></header>
<div class="facts">{tiles}</div>
{"".join(parts)}"""


# --- the page -----------------------------------------------------------------------------------------------


def read_settings(run: Path) -> dict[str, Any]:
    """The configuration that the run has stored; InputError if the path is no run folder."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not (run / "config.json").exists():
        raise InputError(f"{run}: no run folder (it has no config.json)")
    settings = read_json(run / "config.json")
    if "run" not in settings:
        raise InputError(f"{run / 'config.json'}: not the configuration of a run")
    return settings


def make_page(run: Path, config: RunReportConfig) -> str:
    """The HTML of the report of a run folder."""
    settings, folders, lines = read_settings(run), result_folders(run), read_log(run / "log.jsonl")
    split = read_json(run / "split.json") if (run / "split.json").exists() else {}
    files = volumes_to_show(config, folders)
    volumes = [volume_for_viewer(path, settings.get("data", {}).get("dims", 3)) for path in files]
    data = {"charts": curves(lines), "cost": COST, "previews": previews(run / "previews"), "volumes": volumes}

    sections = {"results": ("Scores and results", results_html(folders))} if folders else {}
    sections["curves"] = ("Curves", CURVE_CONTROLS if lines else "<p class=faint>Nothing is logged yet.</p>")
    if data["previews"]:
        sections["previews"] = ("Previews over time", '<div class="card" id="time"></div>')
    if volumes:
        hint = "In 8 bits, from the 0.5th to the 99.5th percentile of each volume"
        hint += f", every {volumes[0]['factor']} voxels as one." if volumes[0]["factor"] > 1 else "."
        viewer = f'<div class="card" id="viewer"></div><p class="faint">{hint}</p>'
        sections["volumes"] = (f"Volumes of {files[0].parent.name}", viewer)
    if not folders:
        sections["results"] = ("Scores and results", results_html(folders))
    sections["cost"] = ("Speed and optimizer", '<div class="charts" id="cost-charts"></div>')
    sections["settings"] = ("Configuration", settings_html(settings))

    title, kind = run.resolve().name, settings.get("kind", "")
    subtitle = f"{KINDS.get(kind, kind)}, preset {settings.get('preset', '')}; page of "
    subtitle += time.strftime("%Y-%m-%d %H:%M")
    body = body_html(title, subtitle, facts_of(settings, lines, split), sections)
    return page(f"{title}: report", body, "run_report", data)


def write_run_report(config: RunReportConfig, run: Path) -> Path:
    """Write the report of a run to `config.out`, or into the run folder."""
    path = write_page(Path(config.out or run / "report.html"), make_page(run, config))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, open it in a browser")
    return path
