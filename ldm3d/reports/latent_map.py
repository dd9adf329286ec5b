"""What has a model learned? Maps of its latents, as tables, a figure, and a page to explore.

    python -m ldm3d.reports latents runs/vae-hippocampus                             all cases of the run
    python -m ldm3d.reports latents RUN --data FOLDER --color-by subject --method umap
    python -m ldm3d.reports latents RUN --data FOLDER --other runs/ldm-hippocampus/samples-001
    python -m ldm3d.reports registers runs/ldm-phantom-anatomy        see register_analysis.py

A case is the mean of its posterior, whole and at the size that the run samples; its channels are shifted and
scaled so that over the first group each has mean 0 and variance 1. Distances are root mean squares over the
numbers of a latent: sqrt(2) is that of latents which share nothing. A second group is projected into the
space of the first (maps.py has the equations). t-SNE and UMAP start from the 50 first principal scores.

The folder that is made holds cases.csv, subjects.csv and groups.csv (distances), latents.json (how it was
made), latents.png (extra "viz") and latents.html (extra "analysis"; one file, works offline). Encoded cases
are kept in the run folder by weights and file, so that another map of them takes seconds; several processes
may do so at once.
"""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import importlib.util
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..conditions import class_name
from ..config import InputError, at_least, to_dict
from ..data import Case, DataConfig, VolumeDataset, open_images
from ..engine.checkpoint import write_atomically
from ..engine.distributed import gather, is_main, print0, rank, setup, world_size
from ..engine.logger import new_figure, progress, save_figure
from ..engine.training import autocast
from ..evaluation.results import new_folder, write_csv, write_report
from ..latent_diffusion import load_autoencoder
from ..latents import cache_key
from ..vae import Autoencoder
from .pages import escape, page, write_page
from .pictures import data_url, png, slices_picture
from .projections import distances, inner_products, pca, place_new, to_centre

# --- Config -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentsConfig:
    data: str | None = None  # folder of images, the first group; none = the run's own cases
    other: str | None = None  # folder of a second group, which is projected into the space of the first
    color_by: Literal["subject", "class", "split", "group"] | None = None  # none = split, or group with other
    method: Literal["pca", "tsne", "umap"] = "pca"  # tsne and umap need the extra "analysis"
    subject: str | None = None  # expression with one group on the case id, or a CSV; none = as the run has it
    max_cases: int | None = None  # of each group, the first ones; none = all
    perplexity: float = 30.0  # t-SNE: about how many neighbours a case has; fewer where cases are few
    neighbors: int = 15  # UMAP: neighbours of a case
    min_dist: float = 0.1  # UMAP: how close points may lie
    seed: int = 0  # of t-SNE and UMAP
    out: str | None = None  # new folder for the results; none = analysis-001 (-002, ...) in the run folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # precision of the encoder

    def __post_init__(self) -> None:
        at_least(self, 3, "max_cases")
        at_least(self, 1, "perplexity")
        at_least(self, 2, "neighbors")
        at_least(self, 0, "min_dist")


# --- cases --------------------------------------------------------------------------------------------------


Row = dict[str, str]  # a case: "case", "group" (first, other), "subject", "class", "split"; "" = unknown


def rows_of(cases: list[Case], group: str, split: dict[str, list[str]]) -> list[Row]:
    """What is known of the cases; `split` is the run's, which knows its own cases by their ids."""
    part_of = {name: part for part, names in split.items() for name in names}
    return [
        {
            "case": case.id,
            "group": group,
            "subject": case.subject,
            "class": f"class {class_name(cell)}" if (cell := case.columns.get("class")) else "",
            "split": part_of.get(case.id, ""),
        }
        for case in cases
    ]


# --- encoding -----------------------------------------------------------------------------------------------


def cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in an .npz file; where there is none that is whole, make(), which is then kept there.

    The file takes its name when it is complete, so that many processes may read and write it at once.
    """
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as e:
        print0(f"note: encoded cases cannot be kept in {path.parent} ({e.strerror})")
    return arrays


def cache_folder(run: Path, autoencoder: Autoencoder, data: VolumeDataset, amp: str) -> Path:
    """Where latents of these weights, read in this way, lie in the run's folder."""
    c = data.config
    reading = (
        "dims",
        "channel",
        "file_spacing",
        "spacing",
        "size",
        "resize",
        "scaling",
        "percentiles",
        "window",
    )
    layout = DataConfig(**{name: getattr(c, name) for name in reading})
    spec = dataclasses.replace(data.spec, reference=None)
    base = run if run.is_dir() else run.parent
    return base / "latents" / f"cases-{cache_key(autoencoder, layout, spec, [])}-{amp}"


def file_key(path: Path) -> str:
    """Of a file as it is now."""
    stat = path.stat()
    what = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


@torch.inference_mode()
def encode_cases(
    autoencoder: Autoencoder, data: VolumeDataset, folder: Path, device: torch.device, amp: str
) -> list[dict[str, np.ndarray]]:
    """{"mean": (C_z, *s) float32, "picture": (h, w) uint8} of every case; spread over the ranks."""

    def encode(index: int) -> dict[str, np.ndarray]:
        item = data[index, index]
        with autocast(amp, device):
            mean = autoencoder.encode(item["image"][None].to(device)).mean[0]
        picture = slices_picture(item["image"][0].numpy(), tuple(item["spacing"].tolist()))
        return {"mean": mean.float().cpu().numpy(), "picture": picture}

    mine = {}
    for i in progress(range(rank(), len(data), world_size()), "encoding"):
        mine[i] = cached(folder / f"{file_key(data.cases[i].image)}.npz", lambda i=i: encode(i))
    everything = {i: arrays for part in gather(mine) for i, arrays in part.items()}
    return [everything[i] for i in range(len(data))]


# --- maps ---------------------------------------------------------------------------------------------------


METHODS = {"pca": "principal component", "tsne": "t-SNE", "umap": "UMAP"}
NEEDED = {"tsne": "sklearn", "umap": "umap"}


def check_method(method: str) -> None:
    """Before time is spent: is what the method needs installed?"""
    if method in NEEDED and importlib.util.find_spec(NEEDED[method]) is None:
        raise InputError(f'method: {method} needs the extra "analysis": pip install "ldm3d[analysis]"')


def make_map(scores: Tensor, num_first: int, config: LatentsConfig) -> tuple[Tensor, dict[str, Any]]:
    """(places (N, 2), the settings that were used) from principal scores (N, K)."""
    first, others = scores[:num_first].numpy(), scores[num_first:]
    if config.method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = max(1.0, min(config.perplexity, (num_first - 1) / 3))
        model = TSNE(2, perplexity=perplexity, init="pca", random_state=config.seed)
        places = torch.from_numpy(model.fit_transform(first)).double()
        if len(others):
            places = torch.cat([places, place_new(others, scores[:num_first], places, perplexity)])
        return places, {"perplexity": perplexity, "kl_divergence": float(model.kl_divergence_)}
    if config.method == "umap":
        import umap

        neighbors = min(config.neighbors, num_first - 1)
        model = umap.UMAP(n_neighbors=neighbors, min_dist=config.min_dist, random_state=config.seed, n_jobs=1)
        threads = torch.get_num_threads()
        places = [model.fit_transform(first)]
        places += [model.transform(others.numpy())] if len(others) else []
        torch.set_num_threads(threads)  # numba sets them for the whole process
        return torch.from_numpy(np.concatenate(places)).double(), {"neighbors": neighbors}
    flat = torch.zeros(len(scores), 2, dtype=scores.dtype)
    flat[:, : scores.shape[1]] = scores[:, :2]
    return flat, {}


# --- tables -------------------------------------------------------------------------------------------------


def mean_or_none(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def between_means(gram: Tensor, a: Tensor, b: Tensor) -> float:
    """Distance of the means of the cases of two masks (N,): |m_a|^2 + |m_b|^2 - 2 <m_a, m_b>, its root."""
    squared = gram[a][:, a].mean() + gram[b][:, b].mean() - 2 * gram[a][:, b].mean()
    return float(squared.clamp(min=0).sqrt())


def subject_table(rows: list[Row], gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Per group and subject, the farthest from its group's centre first.

    within: mean distance of two of its cases; to_centre: mean distance to the centre of the group;
    to_other_group: mean distance to the cases of the same subject in the other group; centres: distance of
    the two means of this subject.
    """
    table = []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = torch.tensor([row["group"] == group for row in rows])
        centre = to_centre(gram, mine)
        for subject in dict.fromkeys(row["subject"] for row in rows if row["group"] == group):
            of_subject = torch.tensor([row["subject"] == subject for row in rows])
            here, there = of_subject & mine, of_subject & ~mine
            pairs = apart[here][:, here]
            count = int(here.sum())
            table.append(
                {
                    "group": group,
                    "subject": subject,
                    "cases": count,
                    "to_centre": float(centre[here].mean()),
                    "within": float(pairs.sum()) / (count * (count - 1)) if count > 1 else None,
                    "to_other_group": mean_or_none(apart[here][:, there]),
                    "centres": between_means(gram, here, there) if there.any() else None,
                }
            )
    return sorted(table, key=lambda line: (line["group"] != "first", -line["to_centre"]))


def group_table(names: list[str], gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Per pair of groups (a, b), a with itself too; `names` is each case's group.

    centres: distance of the two means; pairs: mean distance of a case of a and one of b; nearest: mean
    distance of a case of a to the nearest of b. No case is compared with itself.
    """
    table, others = [], apart.clone().fill_diagonal_(math.inf)
    found = list(dict.fromkeys(names))
    masks = {name: torch.tensor([n == name for n in names]) for name in found}
    for a in found:
        for b in found:
            ours, theirs = masks[a], masks[b]
            block = others[ours][:, theirs]
            finite = block[block.isfinite()]
            nearest = block.min(1).values
            table.append(
                {
                    "a": a,
                    "b": b,
                    "cases_a": int(ours.sum()),
                    "cases_b": int(theirs.sum()),
                    "centres": between_means(gram, ours, theirs),
                    "pairs": mean_or_none(finite),
                    "nearest": mean_or_none(nearest[nearest.isfinite()]),
                }
            )
    return table


def case_table(rows: list[Row], places: Tensor, gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Per case: what is known of it, its place in the map, distance to the centre of the first group, and to
    the nearest other case of the first group, which is named."""
    first = torch.tensor([row["group"] == "first" for row in rows])
    centre = to_centre(gram, first)
    others = apart.clone().fill_diagonal_(math.inf)
    others[:, ~first] = math.inf
    nearest = others.min(1)
    return [
        {
            **row,
            "x": float(places[i, 0]),
            "y": float(places[i, 1]),
            "to_centre": float(centre[i]),
            "nearest": float(nearest.values[i]),
            "nearest_case": rows[int(nearest.indices[i])]["case"],
        }
        for i, row in enumerate(rows)
    ]


# --- figure and page ----------------------------------------------------------------------------------------

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1")  # Okabe & Ito 2008
UNKNOWN = "#8a8f98"
COLUMNS = ("split", "class", "group", "subject")


def palette(labels: Sequence[str]) -> dict[str, str]:
    """Label -> colour; "" is grey. Beyond seven labels the hues are as far apart as they can be."""
    names = sorted({label for label in labels if label}, key=natural)
    colors = list(PALETTE)
    if len(names) > len(PALETTE):
        hues = [(i / len(names), (0.45, 0.6)[i % 2]) for i in range(len(names))]
        parts = [colorsys.hls_to_rgb(hue, light, 0.65) for hue, light in hues]
        colors = ["#" + "".join(f"{round(255 * v):02x}" for v in rgb) for rgb in parts]
    return dict(zip(names, colors, strict=False)) | ({"": UNKNOWN} if "" in labels else {})


def natural(text: str) -> list[tuple[int, str]]:
    """Sorting key that puts 9 before 10."""
    return [(int(part or 0), "") if i % 2 else (0, part) for i, part in enumerate(re.split(r"(\d+)", text))]


def group_titles(facts: dict[str, Any]) -> dict[str, str]:
    """What the groups are called where people read it."""
    return {"first": facts["data"]} | ({"other": facts["other"]} if facts["other"] else {})


def draw_map(path: Path, rows: list[Row], places: Tensor, facts: dict[str, Any]) -> bool:
    """The map as a picture; False without matplotlib."""
    figure = new_figure(figsize=(8, 6), dpi=150, layout="constrained")
    if figure is None:
        return False
    column, titles = facts["color_by"], group_titles(facts)
    ax, colors = figure.subplots(), palette([row[column] for row in rows])
    for group, mark in (("first", "o"), ("other", "D")):
        for label, color in colors.items():
            mine = [i for i, row in enumerate(rows) if (row["group"], row[column]) == (group, label)]
            if mine:
                face = color if group == "first" else "none"
                name = titles[label] if column == "group" else label or "unknown"
                name += f" ({titles['other']})" if group == "other" and column != "group" else ""
                x, y = places[mine].T.numpy()
                ax.scatter(x, y, 28, marker=mark, facecolors=face, edgecolors=color, alpha=0.8, label=name)
    ax.set(xlabel=facts["axes"][0], ylabel=facts["axes"][1])
    ax.set_title(f"{len(rows)} cases by {column}", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    if len(ax.collections) <= 20:
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def save_page(
    path: Path, rows: list[Row], places: Tensor, pictures: list[np.ndarray], facts: dict[str, Any]
) -> bool:
    """The map as a page to explore; False without plotly."""
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
        "places": [[float(f"{v:.5g}") for v in place] for place in places.tolist()],
        "pictures": [data_url(png(picture)) for picture in pictures],
        "axes": facts["axes"],
    }
    what = f"{facts['cases']} cases of {facts['data']}"
    what += f" and {facts['other_cases']} of {facts['other']} (diamonds)" if facts["other"] else ""
    body = f"""<h1>Latents of {escape(facts["run"])}</h1>
<p class="faint">{escape(what)}. Hover over a case to see its middle slices, click to keep them.
Drag to zoom, double-click to zoom out; click a name in the legend to hide its cases.</p>
<div class="tools"><label>colour by <select id="column"></select></label></div>
<div class="both"><div class="card plot"><div id="map"></div></div>
<aside><div id="hover" class="card"><p class="faint">no case yet</p></div><div id="kept"></div></aside>
</div>"""
    write_page(path, page(f"Latents of {facts['run']}", body, "latent_map", data, get_plotlyjs()))
    return True


# --- the command --------------------------------------------------------------------------------------------


def latents(config: LatentsConfig, run: Path) -> Path | None:
    """Encode the cases, map them, and write tables, figure and page; returns their folder on rank 0."""
    check_method(config.method)
    device = setup(config.device)
    own = run / "autoencoder.pt"
    autoencoder, content = load_autoencoder(own if own.exists() else run)
    options = {"subject": config.subject, "max_cases": config.max_cases, "own_size": False}
    groups = {"first": open_images(content, config.data, **options)}
    if config.other:
        groups["other"] = open_images(content, config.other, **options)
    split = content["state"]["split"]
    rows = [row for name, data in groups.items() for row in rows_of(data.cases, name, split)]
    column = check_cases(rows, config)
    folder = new_folder(run, config.out, "analysis")
    autoencoder.to(device)
    encoded = []
    for data in groups.values():
        cache = cache_folder(run, autoencoder, data, config.amp)
        encoded += encode_cases(autoencoder, data, cache, device, config.amp)
    if not is_main():
        return None
    num_first = len(groups["first"])
    gram = inner_products(torch.from_numpy(np.stack([arrays["mean"] for arrays in encoded])), num_first)
    scores, shares = pca(gram, num_first, 50)
    if not len(shares):
        raise InputError("data: all cases have the same latent, there is nothing to map")
    places, settings = make_map(scores, num_first, config)
    axes = [f"{METHODS[config.method]} {i}" for i in (1, 2)]
    if config.method == "pca":
        axes = [
            f"{axis} ({share:.1%} of the variance)" for axis, share in zip(axes, [*shares, 0.0], strict=False)
        ]
    facts = {
        **to_dict(config),
        **settings,
        "run": str(run),
        "data": config.data or "the run",
        "color_by": column,
        "step": content["step"],
        "weights": cache.name.removeprefix("cases-"),
        "cases": num_first,
        "other_cases": len(rows) - num_first,
        "latent": list(encoded[0]["mean"].shape),
        "variance_shares": shares[:10].tolist(),
        "axes": axes,
    }
    pictures = [arrays["picture"] for arrays in encoded]
    write_results(folder, rows, gram, places, pictures, facts)
    return folder


def check_cases(rows: list[Row], config: LatentsConfig) -> str:
    """The column to colour by; InputError where there is nothing to show."""
    num_first = sum(row["group"] == "first" for row in rows)
    if num_first < 3:
        raise InputError(f"data: {num_first} cases, a map needs at least 3")
    default = "group" if config.other else "split"
    column = config.color_by or default
    if not any(row[column] for row in rows):
        if config.color_by:
            raise InputError(f"color_by: no case has a {column} (a folder's cases.csv may tell it)")
        column = "group"
    return column


def write_results(
    folder: Path,
    rows: list[Row],
    gram: Tensor,
    places: Tensor,
    pictures: list[np.ndarray],
    facts: dict[str, Any],
) -> None:
    """All files of the folder, and the most telling figures on the console."""
    apart, column = distances(gram), facts["color_by"]
    colors = palette([row[column] for row in rows])
    table = case_table(rows, places, gram, apart)
    write_csv(folder / "cases.csv", [line | {"color": colors[line[column]]} for line in table], 6)
    write_csv(folder / "subjects.csv", subject_table(rows, gram, apart), 6)
    groups = group_table(group_names(rows, column), gram, apart)
    write_csv(folder / "groups.csv", groups, 6)
    write_report(folder / "latents.json", facts)
    made = {
        "viz": draw_map(folder / "latents.png", rows, places, facts),
        "analysis": save_page(folder / "latents.html", rows, places, pictures, facts),
    }
    print("distances, 1.414 = nothing in common: mean of pairs, to the nearest, of the centres")
    for a in groups:
        if a["a"] <= a["b"] and a["pairs"] is not None:
            figures = ", ".join(f"{a[name]:.4g}" for name in ("pairs", "nearest", "centres"))
            print(f"  {a['a']} to {a['b']}: {figures}")
    for extra, what in (("viz", "figure"), ("analysis", "page")):
        if not made[extra]:
            print(f'note: no {what}: it needs the extra "{extra}": pip install "ldm3d[{extra}]"')
    print(f"{len(rows)} cases: {folder}" + (f", {folder / 'latents.html'}" if made["analysis"] else ""))


def group_names(rows: list[Row], column: str) -> list[str]:
    """The group that each case counts for in groups.csv: its split or class, if cases are coloured by it."""
    if column in ("group", "subject"):
        return [row["group"] for row in rows]
    names = []
    for row in rows:
        label = row[column] or "unknown"
        names.append(label if row["group"] == "first" else f"other: {label}")
    return names
