"""Are generated volumes distributed like real ones? Distances of two sets, with all that they depend on.

    python -m ldm3d.evaluation samples runs/ldm-mine/samples-001 runs/ldm-mine      its held-out cases
    python -m ldm3d.evaluation samples runs/ldm-mine/samples-001 runs/ldm-mine --part train
    python -m ldm3d.evaluation samples FOLDER "OTHER/images/*.nii.gz" --features net.ts --slice_features none

whole     features of whole volumes (pictures in 2-D): Frechet and kernel distance, precision, recall,
          density, coverage
plane     features of slices across each axis, and the mean over the three planes ("2.5-D"): Frechet and
          kernel distance. The kernel distance pairs slices of different cases only, since slices of one case
          are not independent
diversity mean MS-SSIM of pairs within each set. Generated volumes that are more alike than real ones are
          less varied
intensity Wasserstein distance of the histograms (the scaled range is 2), root mean square difference of the
          power spectra (dB)

The equations are in metrics.py, the intervals (half-samples of the cases) in statistics.py.

What is a good value? None of the figures has an absolute scale, so beside each stand figures of equal numbers
of cases:

real halves               real cases against real cases of other subjects: as many as are generated, but at
                          most half of all, against the rest. No model can be expected to do better
through the autoencoder   the same cases after encoder and decoder, where the run is known: the ceiling of
                          diffusion in this autoencoder's latents, however long it is trained
equal size                as many generated cases against as many real ones

All three are means over random draws. Example: 16 generated cases, 13 real ones. The figure itself is of 16
against 13, these three are of 6 against 7. A kernel distance of 0.03 at equal size is excellent where real
halves get 0.02, and poor where they get 0.001. If the autoencoder alone gets 0.025, train the autoencoder,
not the diffusion model.

Precision, recall, density and coverage of fewer than 50 cases are chance, and are left out.

The new folder holds report.json and, with matplotlib, figure.png.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import at_least, to_dict
from ..data import VolumeDataset
from ..data.transforms import scale, scaling_numbers
from ..engine.distributed import choose_device
from ..engine.logger import new_figure, progress, save_figure
from ..metrics import (
    cubic_kernel,
    frechet_distance,
    histogram_distance,
    kernel_distance,
    ms_ssim,
    ms_ssim_weights,
    neighbour_scores,
    power_spectrum,
    spectrum_distance,
)
from ..pipeline import AutoencoderPipeline
from .networks import (
    Extractor,
    FidelityConfig,
    fidelity_features,
    file_features,
    planes_of,
    scales_for,
    whole_features,
    whole_fidelity,
)
from .openers import (
    OpenConfig,
    VolumeSets,
    autoencoder_path,
    beside,
    content_key,
    is_run,
    open_sets,
    volumes_of,
)
from .results import check_out, new_folder, table, write_report
from .statistics import half_sample_intervals

BINS = 256  # of the histograms
HALVINGS = 10  # random divisions of the real set, for the column "real halves"
SHARES = ("precision", "recall", "density", "coverage")
ROUGH = (*SHARES, "histogram", "spectrum_db")  # of statistics.half_sample_intervals
FEWEST = 50  # cases in the smaller set, below which these shares say nothing


@dataclass(frozen=True)
class SetsConfig:
    part: Literal["train", "val", "test", "all"] = "val"  # cases of REAL, where it is a run folder
    run: str | None = None  # run folder whose grid, scaling and encoder count; none = REAL, if it is one
    features: str = "own"  # of whole volumes: own, run, none, or a file (TorchScript, torch.export, VGG-16)
    slice_features: str = "own"  # of slices of volumes: own, none, or a file
    slices: int = 16  # slices of each volume in each plane, evenly spaced over the middle 80 %
    neighbours: int = 5  # k of precision, recall, density and coverage
    pairs: int = 100  # pairs of each set that are compared, for diversity
    resamples: int = 200  # half-samples of the cases, for the intervals
    seed: int = 0  # of pairs and half-samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    cache_dir: str = "runs/cache"  # where own networks are kept
    out: str | None = None  # new folder for the report; none = sets-001 (-002, ...) beside GENERATED
    data: OpenConfig = field(default_factory=OpenConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "slices", "neighbours", "pairs")
        at_least(self, 4, "resamples")


# --- features -----------------------------------------------------------------------------------------------


def slice_extractor(config: SetsConfig, real: VolumeDataset, device: torch.device) -> Extractor | None:
    """The network for slices that the settings choose; None for "none", and for pictures."""
    if config.slice_features == "none" or real.spec.dims == 2:
        return None
    if config.slice_features != "own":
        return file_features(config.slice_features, 2, device)
    size = real.spec.size
    network = FidelityConfig(2, real.spec.channels, scales_for(size))

    def planes() -> Iterator[Tensor]:
        return (plane for x in volumes_of(real) for plane in planes_of(x, config.slices))

    return fidelity_features(
        planes, (content_key(real), config.slices), network, Path(config.cache_dir), device
    )


# --- what is measured of a case, and of two sets ------------------------------------------------------------


class Measured:
    """What is measured of every case, so that the figures of any subset of cases are quick to compute.

    Rows are cases, the generated ones first, then the real ones, then as many of the real ones after the
    autoencoder: features (N, F) or None, slices [(N, slices, F)] by plane, histograms (N, C, BINS), spectra
    (N, C, bins), similarity (N, N) with nan where a pair was not compared. reconstructed: number of the last
    rows, 0 without an autoencoder. Matrices of distances and kernel values are computed once; a half-sample
    picks rows and columns.
    """

    def __init__(
        self,
        features: Tensor | None,
        slices: list[Tensor],
        histograms: Tensor,
        spectra: Tensor,
        reconstructed: int = 0,
    ):
        self.reconstructed = reconstructed
        self.features, self.slices, self.histograms, self.spectra = features, slices, histograms, spectra
        self.similarity = torch.full((len(histograms),) * 2, math.nan, dtype=torch.float64)
        self.distances = self.kernel = None
        if features is not None:
            self.distances = torch.cdist(
                features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist"
            )
            self.kernel = cubic_kernel(features, features)
        self.slice_kernels = [
            torch.stack([cubic_kernel(a, f.flatten(0, 1)).view(len(a), *f.shape[:2]).mean((0, 2)) for a in f])
            for f in slices
        ]

    def figures(self, generated: Tensor, real: Tensor, width: float, neighbours: float) -> dict[str, float]:
        """Every figure for the cases with these row numbers. width: of a histogram bin.

        neighbours: k of the shares; between two whole numbers, between the shares of both.
        """
        found = {}
        if self.features is not None:
            d = self.distances
            found["whole/frechet"] = frechet_distance(self.features[generated], self.features[real])
            found["whole/kernel"] = _kernel_distance(self.kernel, generated, real)
            near = (_block(d, real, real), _block(d, generated, generated), _block(d, real, generated))
            k = math.floor(neighbours)
            lower, upper = (neighbour_scores(*near, n) for n in (k, math.ceil(neighbours)))
            share = neighbours - k
            found |= {f"whole/{n}": (1 - share) * v + share * upper[n] for n, v in lower.items()}
        for axis, (f, k) in enumerate(zip(self.slices, self.slice_kernels, strict=True)):
            found[f"plane{axis}/frechet"] = frechet_distance(
                f[generated].flatten(0, 1), f[real].flatten(0, 1)
            )
            found[f"plane{axis}/kernel"] = _kernel_distance(k, generated, real)
        for name in ("frechet", "kernel") if self.slices else ():
            found[f"planes/{name}"] = sum(found[f"plane{axis}/{name}"] for axis in range(3)) / 3
        for name, who in (("generated", generated), ("real", real)):
            found[f"ms_ssim/{name}"] = _block(self.similarity, who, who).nanmean().item()
        h, s = self.histograms, self.spectra
        found["histogram"] = histogram_distance(h[generated].mean(0), h[real].mean(0), width)
        found["spectrum_db"] = spectrum_distance(s[generated].mean(0), s[real].mean(0))
        return found


def statistic_of(
    measured: Measured, first: int, width: float, neighbours: int
) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """The function of chosen generated and real cases that `half_sample_intervals` needs.

    first: number of generated cases. A part of the cases has as large a part of the `neighbours`, so that the
    balls around cases are as large as those of all cases: half of 5 are 2.5, the mean of what 2 and 3 give.
    With all 5, intervals of 50 cases held as rarely as 86 times of 100; like this 95 times and more.
    """
    counts = first, len(measured.histograms) - first - measured.reconstructed

    def statistic(i: np.ndarray, j: np.ndarray) -> dict[str, float]:
        k = neighbours * min(len(i) / counts[0], len(j) / counts[1])
        chosen = torch.from_numpy(i), torch.from_numpy(first + j)
        return measured.figures(*chosen, width, max(1.0, k))

    return statistic


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[rows][:, columns]


def _kernel_distance(kernel: Tensor, x: Tensor, y: Tensor) -> float:
    return kernel_distance(_block(kernel, x, x), _block(kernel, y, y), _block(kernel, x, y))


def reconstructions(sets: VolumeSets, device: torch.device) -> Iterator[Tensor]:
    """The volumes (C, *S) of the real set after encoder and decoder, scaled as if they had been files."""
    autoencoder, real = AutoencoderPipeline(autoencoder_path(sets.run), device), sets.sets["real"]
    for x in volumes_of(real):
        recon, rule = autoencoder.reconstruct(x).numpy(), real.config
        if rule.scaling in ("percentile", "minmax", "zscore"):  # by the numbers of the volume itself
            ends = [scaling_numbers(c, rule.scaling, rule.percentiles, rule.window) for c in recon]
            low, high = zip(*ends, strict=True)
            if all(a < b for a, b in ends):
                recon = scale(recon, low, high, real.spec.clipped)
        elif real.spec.clipped:
            recon = recon.clip(-1, 1)
        yield torch.from_numpy(recon)


def measure(
    config: SetsConfig,
    sets: VolumeSets,
    whole: Extractor | None,
    slices: Extractor | None,
    device: torch.device,
) -> tuple[Measured, float, float]:
    """Measure all volumes of both sets: (what was measured, start of the histograms, width of a bin).

    Where the run is known, the real set after its autoencoder is measured too.

    The histograms span [-1, 1] where intensities are clipped, else the range of the real set; generated
    intensities outside count in the outer bins.
    """
    real, generated = sets.sets["real"], sets.sets["generated"]
    low, high = _limits(sets)
    shells = max(2, min(32, min(real.spec.size) // 2))
    rows: dict[str, list] = {"features": [], "slices": [], "histograms": [], "spectra": []}
    recon, num = (reconstructions(sets, device), len(real)) if sets.run else ((), 0)
    cases = itertools.chain(volumes_of(generated), volumes_of(real), recon)
    for x in progress(cases, "measuring", len(generated) + len(real) + num):
        counts = torch.stack([torch.histc(c.clamp(low, high), BINS, low, high) for c in x.flatten(1)])
        rows["histograms"].append(counts.double() / counts.sum(1, keepdim=True))
        rows["spectra"].append(power_spectrum(x, shells))
        if whole is not None:
            rows["features"].append(whole(x[None])[0])
        if slices is not None:
            rows["slices"].append([slices(plane) for plane in planes_of(x, config.slices)])
    features = torch.stack(rows["features"]) if rows["features"] else None
    by_plane = [torch.stack(plane) for plane in zip(*rows["slices"], strict=True)]
    histograms, spectra = torch.stack(rows["histograms"]), torch.stack(rows["spectra"])
    measured = Measured(features, by_plane, histograms, spectra, num)
    draw = np.random.default_rng(config.seed)
    for dataset, first in ((generated, 0), (real, len(generated))):
        _compare_pairs(dataset, measured.similarity, first, config.pairs, high - low, draw)
    return measured, low, (high - low) / BINS


def _limits(sets: VolumeSets) -> tuple[float, float]:
    """Range of the histograms: the scaled range, or lowest and highest value of the real set."""
    if sets.protocol["intensity_range"]:
        return tuple(sets.protocol["intensity_range"])
    ends = [(x.min().item(), x.max().item()) for x in volumes_of(sets.sets["real"])]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _compare_pairs(
    dataset: VolumeDataset, similarity: Tensor, first: int, pairs: int, data_range: float, draw: Any
) -> None:
    """MS-SSIM of up to `pairs` random pairs of a set, into both halves of the matrix from row `first` on."""
    n = len(dataset)
    if n * (n - 1) // 2 <= pairs:
        chosen = set(itertools.combinations(range(n), 2))
    else:
        chosen = set()
        while len(chosen) < pairs:
            chosen.add(tuple(sorted(draw.choice(n, 2, replace=False).tolist())))
    for i, j in progress(sorted(chosen), "comparing pairs"):
        x, y = (dataset[k, k]["image"][None] for k in (i, j))
        value = ms_ssim(x, y, data_range).item()
        similarity[first + i, first + j] = similarity[first + j, first + i] = value


# --- the report ---------------------------------------------------------------------------------------------


def compare_sets(config: SetsConfig, generated: str, real: str) -> Path:
    """Compare two sets and write the report; returns its folder. InputError names what does not fit."""
    check_out(config.out)
    device = choose_device(config.device)
    sets = open_sets(generated, {"real": (real, config.part)}, config.data, config.run)
    num_generated, num_real = len(sets.sets["generated"]), len(sets.sets["real"])
    whole = whole_features(
        sets, "real", config, lambda data: whole_fidelity(data, config.cache_dir, device), device
    )
    slices = slice_extractor(config, sets.sets["real"], device)
    measured, low_end, width = measure(config, sets, whole, slices, device)

    counts = (num_generated, num_real)
    subjects = [[case.subject for case in sets.sets[name].cases] for name in ("generated", "real")]
    statistic = statistic_of(measured, num_generated, width, config.neighbours)
    figures = half_sample_intervals(statistic, counts, config.resamples, config.seed, subjects, ROUGH)
    columns, parts = real_halves(measured, subjects[1], width, config)
    for name, f in figures.items():
        low, high = _bounds(name)
        f["low"], f["high"] = max(f["low"], low), min(f["high"], high)
        few = name.endswith(SHARES) and min(parts) < FEWEST
        f |= {column: math.nan if few else values.get(name, math.nan) for column, values in columns.items()}
        if name.endswith(SHARES) and min(counts) < FEWEST:
            f.update(value=math.nan, low=math.nan, high=math.nan)
    report = {
        **to_dict(config),
        "generated": generated,
        "real": real,
        "cases": {"generated": num_generated, "real": num_real},
        "interval": f"95 %, random halves of subjects, {config.resamples} half-samples",
        "real_halves": {"cases": parts[0], "others": parts[1], "draws": HALVINGS},
        "through_autoencoder": f"{_part_words(config, sets, real)} through the autoencoder",
        "protocol": sets.protocol,
        "networks": {
            name: {**network.describe(), "features": int(table_.shape[-1])}
            for name, network, table_ in (
                ("whole", whole, measured.features),
                ("slices", slices, measured.slices[0] if measured.slices else None),
            )
            if network is not None
        },
        "ms_ssim_weights": ms_ssim_weights(sets.sets["real"].spec.size),
        "warnings": warnings_of(config, measured, counts, parts),
        "figures": figures,
    }
    folder = new_folder(beside(generated), config.out, "sets")
    write_report(folder / "report.json", report)
    picture = draw_figure(folder / "figure.png", measured, num_generated, low_end, width)
    print_summary(report)
    print(f"{num_generated} generated, {num_real} real: {folder}" + (f", {picture}" if picture else ""))
    return folder


def _part_words(config: SetsConfig, sets: VolumeSets, real: str) -> str:
    """Which cases the real ones are to the autoencoder of the run."""
    own = is_run(real) and Path(real).resolve() == Path(sets.run).resolve()
    return {"val": "held-out", "test": "held-out"}.get(config.part, config.part) if own else "real"


def _bounds(name: str) -> tuple[float, float]:
    """Possible values of a figure. The unbiased kernel distance can be negative; shares are at most 1."""
    share = name.endswith(("precision", "recall", "coverage")) or name.startswith("ms_ssim")
    return -math.inf if name.endswith("kernel") else 0.0, 1.0 if share else math.inf


def real_halves(
    measured: Measured, subjects: list[str], width: float, config: SetsConfig
) -> tuple[dict[str, dict[str, float]], tuple[int, int]]:
    """({column: {name: figure}}, (number of cases on one side, least number on the other)).

    The columns "real_halves", "through_autoencoder" and "equal_size" of the module's text. subjects: of the
    real cases. Means over HALVINGS draws; columns are empty if there are fewer than four real subjects, and
    for the autoencoder if there is none.
    """
    n = len(subjects)
    first = len(measured.histograms) - n - measured.reconstructed
    m, draw, who = min(first, n // 2), np.random.default_rng(config.seed), np.array(subjects)
    others, found = n - m, {"real_halves": [], "through_autoencoder": [], "equal_size": []}
    for _ in range(HALVINGS if len(set(subjects)) >= 4 else 0):
        order = np.concatenate([np.flatnonzero(who == s) for s in draw.permutation(np.unique(who))])
        ours, rest = order[:m], order[m:][~np.isin(who[order[m:]], who[order[:m]])]
        others = min(others, len(rest))
        pairs = {"real_halves": (first + ours, first + rest)}
        if measured.reconstructed:
            pairs["through_autoencoder"] = (first + n + ours, first + rest)
        some = first + draw.permutation(n)[: len(rest)]
        pairs["equal_size"] = (draw.permutation(first)[:m], some)
        for column, pair in pairs.items():
            rows = (torch.from_numpy(side) for side in pair)
            found[column].append(measured.figures(*rows, width, config.neighbours))
    return {column: _means(figures) for column, figures in found.items()}, (m, others)


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([f[name] for f in found])) for name in (found[0] if found else ())}


def warnings_of(
    config: SetsConfig, measured: Measured, counts: tuple[int, int], parts: tuple[int, int]
) -> list[str]:
    """Sentences for the report: why some figures may not mean what they seem to.

    parts: the numbers of cases of the columns "equal size" and "real halves".
    """
    notes, least = [], min(counts)
    if least < 4:
        notes.append(f"{least} cases in the smaller set: no intervals, they need 4")
    if measured.features is not None:
        num = measured.features.shape[1]
        if least < 2 * num:
            notes.append(
                f"whole/frechet: {least} cases for {num} features are too few for a stable covariance "
                f"(at least {2 * num}); trust whole/kernel, which has no bias, and compare equal sizes"
            )
        shares = "precision, recall, density, coverage"
        if least < FEWEST:
            notes.append(f"{shares}: left out, {least} cases are too few (at least {FEWEST})")
        elif min(parts) < FEWEST:
            notes.append(
                f"{shares}: nothing to compare with, real halves have {min(parts)} cases (at least {FEWEST})"
            )
    if measured.slices and least * measured.slices[0].shape[1] < 2 * measured.slices[0].shape[-1]:
        notes.append("planes/frechet: too few slices for a stable covariance; trust planes/kernel")
    if max(counts) > 1.5 * least:
        notes.append(f"{counts[0]} generated, {counts[1]} real: the Frechet distance depends on both numbers")
    if config.features == "run":
        notes.append(
            "features of the run's own encoder: figures compare within this run, with no other model"
        )
    return notes


def print_summary(report: dict[str, Any]) -> None:
    """The figures and warnings, on the console. The ceiling is shown if it is known."""
    known = any(math.isfinite(f["through_autoencoder"]) for f in report["figures"].values())
    ceiling = report["through_autoencoder"]
    lines = [["", "real halves", *([ceiling] if known else []), "equal size", "generated", "low", "high"]]
    for name, f in report["figures"].items():
        if not math.isnan(f["value"]):
            columns = ("real_halves", *(["through_autoencoder"] if known else []), "equal_size")
            cells = [f[column] if math.isfinite(f[column]) else "-" for column in columns]
            lines.append([name, *cells, f["value"], f["low"], f["high"]])
    print(table(lines))
    for line in report["warnings"]:
        print(f"note: {line}")


def draw_figure(path: Path, measured: Measured, first: int, low: float, width: float) -> Path | None:
    """Draw histograms (from `low` on), spectra, and features on the two main axes of the real set.

    None without matplotlib.
    """
    figure = new_figure(figsize=(13, 4), dpi=100, layout="constrained")
    if figure is None:
        return None
    histogram, spectrum, scatter = figure.subplots(1, 3)
    last = len(measured.histograms) - measured.reconstructed
    centres = (np.arange(BINS) + 0.5) * width + low
    for name, rows, colour in (("real", slice(first, last), "C0"), ("generated", slice(0, first), "C1")):
        density = measured.histograms[rows].mean((0, 1)) / width
        histogram.semilogy(centres, density.clamp(min=1e-5), colour, label=name)
        spectra = measured.spectra[rows].mean((0, 1))
        spectrum.plot((np.arange(len(spectra)) + 0.5) / (2 * len(spectra)), spectra, colour, label=name)
        if measured.features is not None:
            centred = measured.features - measured.features[first:last].mean(0)
            axes = torch.linalg.svd(centred[first:last], full_matrices=False).Vh[:2]
            points = torch.zeros(len(centred[rows]), 2)  # one case, or one feature, has one axis only
            points[:, : len(axes)] = centred[rows] @ axes.T
            scatter.scatter(*points.T, s=12, c=colour, alpha=0.7, label=name)
    histogram.set(title="intensities", xlabel="scaled intensity", ylabel="density")
    spectrum.set(title="power spectrum", xlabel="cycles per voxel", ylabel="dB")
    scatter.set(title="features: main axes of the real set")
    histogram.legend()
    return save_figure(figure, path)
