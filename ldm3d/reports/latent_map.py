"""What has an autoencoder learned? A map of its latents, on which similar cases lie close together.

    python -m ldm3d.reports latents runs/vae-hippocampus                             all cases of the run
    python -m ldm3d.reports latents RUN --data FOLDER --color-by subject --method umap
    python -m ldm3d.reports latents RUN --data FOLDER --other runs/ldm-hippocampus/samples-001

The latent of a case is the mean of its posterior, for the whole case at the size that the run samples. The
channels are shifted and scaled so that over the first group each has mean 0 and variance 1. The distance of
two cases is then the root mean square of the difference of their latents: 0 for equal cases, about sqrt(2) =
1.414 for cases that have nothing in common. A second group (--other, such as generated volumes) is projected
into the space of the first.

The map has two axes: the first two principal components, or t-SNE or UMAP of the 50 first principal scores.
projections.py has the equations.

The folder of results holds cases.csv, subjects.csv and groups.csv (distances), latents.json (settings),
latents.png (extra "viz") and latents.html (extra "analysis"; one file, works offline).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..conditions import class_name
from ..config import InputError, at_least, to_dict
from ..data import Case, open_images
from ..engine.distributed import is_main, setup
from ..evaluation.openers import autoencoder_path
from ..evaluation.results import new_folder, write_csv, write_report
from ..pipeline import load_autoencoder
from .distance_tables import Row, case_table, group_table, subject_table
from .encoded_cases import cache_folder, encode_cases
from .latent_figures import draw_map, palette, write_map_page
from .projections import distances, inner_products, pca, place_new

AXES = {"pca": "principal component", "tsne": "t-SNE", "umap": "UMAP"}
PACKAGES = {"tsne": "sklearn", "umap": "umap"}  # which the methods need


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


def rows_of(cases: list[Case], group: str, split: dict[str, list[str]]) -> list[Row]:
    """A row for each case (distance_tables.py). split: the run's, which names its own cases only."""
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


def column_to_color_by(rows: list[Row], config: LatentsConfig) -> str:
    """The column that was asked for, or the default; InputError if there is nothing to show."""
    num_first = sum(row["group"] == "first" for row in rows)
    if num_first < 3:
        raise InputError(f"data: {num_first} cases, a map needs at least 3")
    column = config.color_by or ("group" if config.other else "split")
    if not any(row[column] for row in rows):
        if config.color_by:
            raise InputError(f"color_by: no case has a {column} (it may stand in the folder's cases.csv)")
        column = "group"
    return column


# --- the map ------------------------------------------------------------------------------------------------


def check_method(method: str) -> None:
    """InputError, before time is spent, if the package that the method needs is not installed."""
    if method in PACKAGES and importlib.util.find_spec(PACKAGES[method]) is None:
        raise InputError(f'method: {method} needs the extra "analysis": pip install "ldm3d[analysis]"')


def make_map(scores: Tensor, num_first: int, config: LatentsConfig) -> tuple[Tensor, dict[str, Any]]:
    """Place the cases in a plane by their principal scores (N, K): (positions (N, 2), the settings used).

    The first `num_first` cases decide the map; all others are placed in it afterwards.
    """
    first, others = scores[:num_first].numpy(), scores[num_first:]
    if config.method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = max(1.0, min(config.perplexity, (num_first - 1) / 3))
        model = TSNE(2, perplexity=perplexity, init="pca", random_state=config.seed)
        positions = torch.from_numpy(model.fit_transform(first)).double()
        if len(others):
            new = place_new(others, scores[:num_first], positions, perplexity)
            positions = torch.cat([positions, new])
        return positions, {"perplexity": perplexity, "kl_divergence": float(model.kl_divergence_)}
    if config.method == "umap":
        import umap

        neighbors = min(config.neighbors, num_first - 1)
        model = umap.UMAP(n_neighbors=neighbors, min_dist=config.min_dist, random_state=config.seed, n_jobs=1)
        threads = torch.get_num_threads()
        positions = [model.fit_transform(first)]
        positions += [model.transform(others.numpy())] if len(others) else []
        torch.set_num_threads(threads)  # numba sets them for the whole process
        return torch.from_numpy(np.concatenate(positions)).double(), {"neighbors": neighbors}
    plane = torch.zeros(len(scores), 2, dtype=scores.dtype)
    plane[:, : scores.shape[1]] = scores[:, :2]
    return plane, {}


def axis_titles(method: str, shares: Tensor) -> list[str]:
    """Titles of the two axes; those of PCA state their share of the variance."""
    titles = [f"{AXES[method]} {i}" for i in (1, 2)]
    if method == "pca":
        parts = zip(titles, [*shares, 0.0], strict=False)
        titles = [f"{title} ({share:.1%} of the variance)" for title, share in parts]
    return titles


# --- results ------------------------------------------------------------------------------------------------


def groups_of(rows: list[Row], column: str) -> list[str]:
    """The group of each case in groups.csv: its value in the column, if that is split or class."""
    if column in ("group", "subject"):
        return [row["group"] for row in rows]
    values = [row[column] or "unknown" for row in rows]
    return [
        value if row["group"] == "first" else f"other: {value}"
        for row, value in zip(rows, values, strict=True)
    ]


def write_results(
    folder: Path,
    rows: list[Row],
    gram: Tensor,
    positions: Tensor,
    pictures: list[np.ndarray],
    facts: dict[str, Any],
) -> None:
    """All files of the folder, and the distances of the groups on the console."""
    apart, column = distances(gram), facts["color_by"]
    colors = palette([row[column] for row in rows])
    cases = case_table(rows, positions, gram, apart)
    write_csv(folder / "cases.csv", [line | {"color": colors[line[column]]} for line in cases], 6)
    write_csv(folder / "subjects.csv", subject_table(rows, gram, apart), 6)
    groups = group_table(groups_of(rows, column), gram, apart)
    write_csv(folder / "groups.csv", groups, 6)
    write_report(folder / "latents.json", facts)
    written = {
        ("viz", "figure"): draw_map(folder / "latents.png", rows, positions, facts),
        ("analysis", "page"): write_map_page(folder / "latents.html", rows, positions, pictures, facts),
    }
    print("distances, 1.414 = nothing in common: mean of pairs, to the nearest, of the centres")
    for line in groups:
        if line["a"] <= line["b"] and line["pairs"] is not None:
            figures = ", ".join(f"{line[name]:.4g}" for name in ("pairs", "nearest", "centres"))
            print(f"  {line['a']} to {line['b']}: {figures}")
    for (extra, name), done in written.items():
        if not done:
            print(f'note: no {name}: it needs the extra "{extra}": pip install "ldm3d[{extra}]"')
    page = f", {folder / 'latents.html'}" if written["analysis", "page"] else ""
    print(f"{len(rows)} cases: {folder}{page}")


# --- the command --------------------------------------------------------------------------------------------


def map_latents(config: LatentsConfig, run: Path) -> Path | None:
    """Encode the cases, map their latents, write tables, figure and page. Returns the folder on rank 0."""
    check_method(config.method)
    device = setup(config.device)
    autoencoder, content = load_autoencoder(autoencoder_path(run))
    options = {"subject": config.subject, "max_cases": config.max_cases, "own_size": False}
    groups = {"first": open_images(content, config.data, **options)}
    if config.other:
        groups["other"] = open_images(content, config.other, **options)
    split = content["state"]["split"]
    rows = [row for name, data in groups.items() for row in rows_of(data.cases, name, split)]
    column = column_to_color_by(rows, config)
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
    positions, settings = make_map(scores, num_first, config)
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
        "axes": axis_titles(config.method, shares),
    }
    write_results(folder, rows, gram, positions, [arrays["picture"] for arrays in encoded], facts)
    return folder
