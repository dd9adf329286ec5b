"""Image quality in given CPU minutes: whole pipelines, autoencoder and denoiser, beside MONAI's tutorial.

    python tests/benchmarks/quality.py
    python tests/benchmarks/quality.py hippocampus --minutes 40 --seeds 0 --amp bf16
    python tests/benchmarks/quality.py hippocampus phantom --lever "heun=sample: --sampler heun --steps 15"
    python tests/benchmarks/quality.py --minutes 40 --lever "kl=vae: --kl_weight 1e-4; ldm: --batch_size 4"
    python tests/benchmarks/quality.py hippocampus --minutes 40 --samplers

Each pipeline has so many CPU minutes of one thread, of which the autoencoder takes a share. Rows:

    ours     the presets of train_vae.py and train_ldm.py, with as many steps as fit
    monai    MONAI's tutorial (monai_tutorial.py) on the same cases, grid and scaling
    levers   ours with more words for train_vae.py (vae), train_ldm.py (ldm) and sample.py (sample). Stages
             before the first changed one are those of ours: a lever of the denoiser has the same autoencoder

All scores are of test subjects that no network has seen; pipeline_scores.py says what each column is. "real
halves" compares real cases with real cases, the table of reconstructions is the ceiling of the samples.
--samplers also compares the samplers at equal network calls, on ours of the longest budget and first seed.

The data: hippocampi (whole cases), 192 phantoms, and patches of 48^3 voxels of four heads (brats2013: two
patients to train, one to validate, one to test; the segmenter finds the tumour).

All of it, with two seeds, takes some 30 hours. What is finished (a trained stage, samples, scores) is kept in
--work, and not done again. A training that was stopped starts anew, so that its minutes are counted whole.
The pictures lie there too: quality.png, the scores against minutes, and hippocampus.png (phantom.png ...),
test cases beside samples of each row.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from budgets import measured_in_cpu_seconds, once, read_config, seconds_of_step, words_of_length  # noqa: E402
from monai_tutorial import Tutorial  # noqa: E402
from pipeline_scores import Judge, Scores, read_set, write_set  # noqa: E402

import sample  # noqa: E402
import train_cdal  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.config import InputError, Parser, add_options, convert, leaf_types, show  # noqa: E402
from ldm3d.data import Data, DataConfig, Volume, open_data, write  # noqa: E402
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.data.volumes import centred_affine  # noqa: E402
from ldm3d.diffusion_kernel import SAMPLERS, DiffusionKernel  # noqa: E402
from ldm3d.engine.distributed import run_script  # noqa: E402
from ldm3d.engine.logger import new_figure, save_figure, save_sheet, visible  # noqa: E402
from ldm3d.evaluation.openers import volumes_of  # noqa: E402
from ldm3d.evaluation.results import table, with_interval  # noqa: E402
from ldm3d.inference.sampling import SampleConfig  # noqa: E402
from ldm3d.large.windows import window_starts  # noqa: E402
from ldm3d.pipeline import AutoencoderPipeline, LatentDiffusionPipeline, build_autoencoder  # noqa: E402
from ldm3d.plan import seconds_to_read  # noqa: E402

CALLS = (5, 10, 20, 40)  # network calls of --samplers
VALIDATIONS = {"vae": 1, "ldm": 4}  # of each training; the best one is kept
SLACK = 0.95  # the part of the time that is planned: validations take the rest
ENCODING = 0.1  # at most this part of stage two's time goes into its latents
PATCH = 48  # voxels of a side
SHOWN = 3  # samples of each row in the picture
PATCHES = {"train": 64, "val": 16, "test": 64}  # of a head, at most

# --- the data -----------------------------------------------------------------------------------------------

Case = tuple[Path, Path, str, str]  # image, mask, subject, part


def split_cases(config: DataConfig, preset: str, test_fraction: float) -> list[Case]:
    """The cases of a data set, its subjects split once, whatever the seed of a run."""
    data = open_data(dataclasses.replace(config, test_fraction=test_fraction), preset, seed=0)
    parts = [(data.cases[name], part) for part, names in data.split.items() for name in names]
    return [(c.image.resolve(), c.mask.resolve(), c.subject, part) for c, part in parts]


def hippocampi(folder: Path) -> list[Case]:
    config = DataConfig(name="hippocampus", subject="subjects.csv", cache_dir=str(folder / "cache"))
    return split_cases(config, "hippocampus", 0.3)


def heads(folder: Path, num: int = 192, size: tuple[int, ...] = (40, 48, 40)) -> list[Case]:
    shutil.rmtree(folder / "heads", ignore_errors=True)
    write_phantoms(folder / "heads", num, size=size)
    config = DataConfig(root=str(folder / "heads"), cache_dir=str(folder / "cache"))
    return split_cases(config, "phantom", 1 / 3)


def patches(folder: Path) -> list[Case]:
    """Patches of four heads, scaled to [-1, 1] by the percentiles of the head; at least half of a patch is
    brain, and its mask is the whole tumour."""
    preset = train_vae.PRESETS["brats2013"]
    options = {k.removeprefix("data."): v for k, v in preset.items() if k.startswith("data.")}
    options = {k: v for k, v in options.items() if "." not in k and k not in ("patch", "foreground")}
    data = open_data(DataConfig(name="brats2013", cache_dir=str(folder / "cache"), **options), "brats2013", 0)
    parts, found = ("train", "train", "val", "test"), []
    dataset = dataclasses.replace(data, split={"train": sorted(data.cases)}).dataset("train")
    draw = np.random.default_rng(0)
    shutil.rmtree(folder / "patches", ignore_errors=True)
    for i, part in enumerate(parts):
        head, name = dataset[i, i], dataset.cases[i].id
        image, mask = head["image"].numpy(), head["mask"].numpy()[None] > 0
        starts = [window_starts(n, PATCH, 0.85) for n in image.shape[1:]]
        boxes = [
            (slice(None), *(slice(s, s + PATCH) for s in corner))
            for corner in np.stack(np.meshgrid(*starts), -1).reshape(-1, 3).tolist()
        ]
        boxes = [box for box in boxes if (image[box] > -0.99).mean() >= 0.5]
        for k in sorted(draw.permutation(len(boxes))[: PATCHES[part]]):
            files = [folder / "patches" / kind / f"{name}_{k:03d}.nii.gz" for kind in ("image", "mask")]
            affine = centred_affine((PATCH,) * 3, data.spec.spacing)
            for file, array in zip(files, (image, mask.astype(np.uint8)), strict=True):
                write(file, Volume(array[boxes[k]], affine))
            found.append((*files, f"{name}_{k:03d}", part))  # overlapping patches, compared one by one
    return found


@dataclass(frozen=True)
class Task:
    """A data set: its cases; the preset and further words of each training of ours."""

    cases: Callable[[Path], list[Case]]
    vae: list[str]
    ldm: list[str]
    cdal: list[str]

    def words(self, script: Any) -> list[str]:
        return getattr(self, script.__name__.removeprefix("train_"))


TABLE = ["--data.subject", "none"]  # cases.csv tells it
SPLIT = ["--data.test_fraction", "0"]
WHOLE = "--data.scaling window --data.window -1,1 --data.num_labels 2".split()
GRID = """--data.image none --data.mask none --data.spacing none --data.size none --data.patch none
 --data.foreground 0""".split()
TASKS = {
    "hippocampus": Task(
        hippocampi, ["hippocampus", *TABLE], ["hippocampus"], ["hippocampus", *TABLE, *SPLIT]
    ),
    "phantom": Task(heads, ["phantom"], ["phantom"], ["phantom"]),
    "brats2013": Task(
        patches,
        ["brats2013", *GRID, *WHOLE],
        ["brats2013-anatomy", *"--anatomy.registers off --anatomy.head_balance 0".split()],
        ["phantom", *WHOLE],
    ),
}
SMALL = "--unet.channels 8,16 --unet.num_groups 4".split()
TINY = Task(
    lambda folder: heads(folder, 18, (24, 24, 24)),
    ["phantom", *"--data.patch none --vae.channels 8,16 --vae.num_groups 4 --vae.latent_channels 2".split()],
    ["phantom", *SMALL, "--unet.head_channels", "8", "--batch_size", "2"],
    ["phantom", *SMALL, *"--data.patch none --generator.encoder_channels 8 --batch_size 2".split()],
)


def write_cases(folder: Path, cases: list[Case]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "subject", "split"), *cases])


# --- pipelines ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the tables: a pipeline. words: of ours, by stage ("vae", "ldm", "sample")."""

    name: str
    words: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stage_one(self) -> str:
        """The row whose autoencoder this row has."""
        return self.name if "vae" in self.words or self.name == "monai" else "ours"

    @property
    def stage_two(self) -> str:
        """The row whose denoiser this row has."""
        return self.name if "ldm" in self.words or self.stage_one == self.name else "ours"


CONFIGS = {"vae": train_vae.Config, "ldm": train_ldm.Config, "sample": SampleConfig}


def check_words(config: type, words: list[str]) -> None:
    """InputError for a flag that is none of this configuration, or has an impossible value."""
    parser, types = Parser(), leaf_types(config)
    add_options(parser, config, config())
    for key, value in vars(parser.parse(words)).items():
        convert(value, types[key], key)


def lever(text: str) -> Row:
    """A row of "NAME=vae: words; ldm: words; sample: words"; its words are checked."""
    name, _, rest = text.partition("=")
    parts = [part.partition(":") for part in rest.split(";")]
    words = {stage.strip(): shlex.split(given) for stage, _, given in parts}
    if not name.isidentifier() or name in ("ours", "monai") or not words.keys() <= CONFIGS.keys():
        raise argparse.ArgumentTypeError(
            f'got {text!r}, expected "NAME=vae: words; ldm: words; sample: words"'
        )
    try:
        for stage, config in CONFIGS.items():
            check_words(config, words.get(stage, []))
    except InputError as e:
        raise argparse.ArgumentTypeError(f"{name}: {e}") from None
    return Row(name, words)


def cpu_minutes(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) / 60


class Ours:
    """Our pipeline, in the folders vae/ and ldm/ of two places: that of its autoencoder and its own."""

    def __init__(self, bench: Bench, row: Row, seed: int, vae: Path, ldm: Path):
        self.bench, self.row, self.seed, self.vae, self.ldm = bench, row, seed, vae, ldm

    def words(self, script: Any, run: Path) -> list[str]:
        """Of a training, but for its length."""
        stage, bench = script.__name__.removeprefix("train_"), self.bench
        first = ["--vae", str(self.vae)] if script is train_ldm else bench.place_of_data
        own = ["--run.dir", str(run), "--run.seed", str(self.seed), "--run.device", "cpu"]
        own += ["--run.amp", bench.args.amp, *self.row.words.get(stage, [])]
        return [*bench.task.words(script), *first, *own]

    def train(self, script: Any, seconds: float) -> Scores:
        """Train a stage for about so many CPU seconds."""
        stage = script.__name__.removeprefix("train_")
        words, before = self.words(script, getattr(self, stage)), 0.0
        with measured_in_cpu_seconds():
            if script is train_ldm:
                variants, before = self.encodings(words, seconds)
                words += ["--data.num_variants", str(variants), "--sample_steps", "2"]  # of previews
            steps = int(SLACK * (seconds - before) / seconds_of_step(script, words))
        steps = max(self.bench.args.fewest_steps, steps)
        words += words_of_length(script, words[0], steps, VALIDATIONS[stage])
        return {"minutes": cpu_minutes(lambda: script.main(words)), "steps": steps}

    def train_vae(self, seconds: float) -> Scores:
        return self.train(train_vae, seconds)

    def train_ldm(self, seconds: float) -> Scores:
        return self.train(train_ldm, seconds)

    def encodings(self, words: list[str], seconds: float) -> tuple[int, float]:
        """(variants of each case that stage two encodes before its first step, how long that takes): those of
        the preset, but fewer where they would take more than a part ENCODING of the time."""
        with contextlib.redirect_stdout(io.StringIO()):
            config = read_config(train_ldm, words)
            content, where = train_ldm.autoencoder_of(config)
            autoencoder = build_autoencoder(content, where)
            data, _ = train_ldm.open_latent_data(config, autoencoder, content)
            options = autoencoder, data.spec.size, config.run.amp, torch.device("cpu")
            _, encoding = (train_ldm.seconds_to_encode(*options) for _ in range(2))
            each = len(data.split["train"]) * (encoding + seconds_to_read(data))
        fewest = min(2, config.data.num_variants)  # with augmentation one is no variant
        variants = min(config.data.num_variants, max(fewest, int(ENCODING * seconds / each)))
        return variants, (variants + bool(config.plain_end)) * each

    def reconstruct(self, volumes: Iterable[Tensor]) -> Iterator[Tensor]:
        pipeline = AutoencoderPipeline(self.vae)
        return (pipeline.reconstruct(x) for x in volumes)

    def sample(self, num: int, folder: Path) -> None:
        words = [str(self.ldm), "--num", str(num), "--seed", str(self.seed), "--device", "cpu"]
        words += ["--amp", self.bench.args.amp, "--out", str(folder), *self.row.words.get("sample", [])]
        sample.main(words)


class Monai:
    """MONAI's tutorial, whose weights lie in one folder."""

    def __init__(self, bench: Bench, row: Row, seed: int, vae: Path, ldm: Path):
        self.data, args = bench.data, bench.args
        self.tutorial = Tutorial(bench.data.dataset("train"), vae.parent / "weights", seed, args.amp)

    def train_vae(self, seconds: float) -> Scores:
        steps: list[int] = []
        minutes = cpu_minutes(lambda: steps.append(self.tutorial.train_autoencoder(seconds)))
        return {"minutes": minutes, "steps": steps[0]}

    def train_ldm(self, seconds: float) -> Scores:
        steps: list[int] = []
        minutes = cpu_minutes(lambda: steps.append(self.tutorial.train_unet(seconds)))
        return {"minutes": minutes, "steps": steps[0]}

    def reconstruct(self, volumes: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.tutorial.reconstruct(x) for x in volumes)

    def sample(self, num: int, folder: Path) -> None:
        write_set(folder, self.tutorial.sample(num), self.data)


# --- one data set -------------------------------------------------------------------------------------------


class Bench:
    """A data set, and all that is trained and scored on it, in `work`."""

    def __init__(self, task: Task, work: Path, args: argparse.Namespace):
        self.task, self.work, self.args = task, work, args
        if not (work / "cases.csv").exists():
            work.mkdir(parents=True, exist_ok=True)
            write_cases(work, task.cases(work))
        self.place_of_data = ["--data.root", str(work), "--data.cache_dir", str(work / "cache")]
        self.data: Data = train_vae.open_volumes(
            read_config(train_vae, [*task.vae, *self.place_of_data, "--run.dir", str(work / "unused")])
        )
        self.judge = Judge(self.data, self.segmenter(), work / "judge")

    def segmenter(self) -> Path:
        """The run of a plain segmentation network of the real training cases.

        It learns from whole cases on the grid of samples. Where this grid is larger than a case, the edges of
        the case repeat, and a network that has never seen that finds structures there."""
        run, steps = self.work / "segmenter", self.args.segment_steps
        words = [*self.task.cdal, *self.place_of_data, "--cdal.diffusion", "false", "--run.dir", str(run)]
        words += ["--data.num_labels", str(self.data.spec.num_labels), "--run.amp", self.args.amp]
        words += ["--data.patch", "none", "--data.size", show(self.data.spec.size)]
        words += ["--generator.deep_supervision", "true"]
        train_cdal.main([*words, *words_of_length(train_cdal, words[0], steps, 4)])
        return run

    def place(self, row: str, minutes: float, seed: int) -> Path:
        return self.work / f"{minutes:g}-minutes" / f"seed-{seed}" / row

    def score(self, row: Row, minutes: float, seed: int) -> dict[str, Any]:
        """All figures of a pipeline: trained, sampled and scored where that is not done yet."""
        own, vae, ldm = (self.place(r, minutes, seed) for r in (row.name, row.stage_one, row.stage_two))
        same(own / "words.json", row.words)
        make = Monai if row.name == "monai" else Ours
        pipeline = make(self, row, seed, vae / "vae", ldm / "ldm")
        stages, left = {}, 60 * minutes
        for stage, place, seconds in (("vae", vae, self.args.share * left), ("ldm", ldm, None)):
            train = getattr(pipeline, f"train_{stage}")
            stages[stage] = once(
                place / f"{stage}.json",
                lambda folder=place / stage, train=train, s=seconds or left: anew(folder, lambda _: train(s)),
            )
            left -= 60 * stages[stage]["minutes"]
        recon = once(vae / "recon.json", lambda: anew(vae / "recon", self.reconstruct(pipeline)))
        return {**self.score_samples(pipeline, own, vae / "recon"), **stages, "reconstruction": recon}

    def reconstruct(self, pipeline: Ours | Monai) -> Callable[[Path], Scores]:
        """A function that writes reconstructions of the test cases into a folder and returns their scores."""

        def work(folder: Path) -> Scores:
            recon = pipeline.reconstruct(volumes_of(self.judge.test))
            scores, volumes = self.judge.reconstructions(recon)
            write_set(folder, volumes, self.data)
            return scores

        return work

    def score_samples(self, pipeline: Ours | Monai, place: Path, recon: Path) -> dict[str, Any]:
        """The figures of the pipeline's samples, which are made in `place`."""
        num = self.args.samples

        def make(folder: Path) -> Scores:
            return {"seconds": 60 * cpu_minutes(lambda: pipeline.sample(num, folder)) / num}

        made = once(place / "samples.json", lambda: anew(place / "samples", make))
        scores = once(place / "scores.json", lambda: self.judge.score(place / "samples", recon))
        return {**scores, "samples": {**scores["samples"], **made}}

    def samplers(self, minutes: float, seed: int) -> list[list[Any]]:
        """The table of samplers at equal network calls, of the pipeline of ours that is trained already."""
        place = self.place("ours", minutes, seed)
        kernel: DiffusionKernel = LatentDiffusionPipeline(place / "ldm").model.kernel
        rows = [["sampler", "steps", "calls", *SAMPLE_COLUMNS]]
        for sampler in (name for name, s in SAMPLERS.items() if s.process == kernel.process):
            for most in CALLS:
                calls = {n: kernel.num_network_calls(sampler, n) for n in range(1, most + 1)}
                steps = max(n for n in calls if calls[n] <= most)
                row = Row("ours", {"sample": ["--sampler", sampler, "--steps", str(steps)]})
                pipeline = Ours(self, row, seed, place / "vae", place / "ldm")
                own = place / "samplers" / f"{sampler}-{steps}"
                figures = self.score_samples(pipeline, own, place / "recon")["samples"]
                rows.append([sampler, steps, calls[steps], *cells([figures], SAMPLE_COLUMNS)])
        return rows


def same(path: Path, values: dict[str, Any]) -> None:
    """InputError if the file holds other values: what is kept beside it was made with these."""
    if (before := once(path, lambda: values)) != json.loads(json.dumps(values)):
        raise InputError(f"{path}: was made with {before}, now {values}; choose another name, or --work")


def anew(folder: Path, work: Callable[[Path], Any]) -> Any:
    """work(folder), where the folder holds nothing of an earlier try."""
    shutil.rmtree(folder, ignore_errors=True)
    return work(folder)


# --- tables and picture -------------------------------------------------------------------------------------

DISTANCES = {"frechet": 3, "kernel": 4, "spectrum": 3, "gap": 2, "volumes": 3, "components": 3}
RECON_COLUMNS = {"psnr": 2, "ssim": 4, "dice": 3, **DISTANCES}  # digits
SAMPLE_COLUMNS = {**DISTANCES, "ms_ssim": 3, "recall": 2, "copies": 3, "z": 1, "seconds": 2}
Results = dict[tuple[str, float], list[dict[str, Any]]]  # (row, minutes) -> figures of each seed


def cells(seeds: list[Scores], columns: dict[str, int]) -> list[str]:
    """The mean over seeds of each column, and in brackets the lowest and highest."""
    found = []
    for name, digits in columns.items():
        values = [s[name] for s in seeds if s.get(name) is not None]
        if len(values) > 1:
            found.append(with_interval(float(np.mean(values)), min(values), max(values), digits))
        else:
            found.append(f"{values[0]:.{digits}f}" if values else "-")
    return found


def minutes_of(figures: dict[str, Any]) -> float:
    return figures["vae"]["minutes"] + figures["ldm"]["minutes"]


def tables(results: Results, real: Scores) -> str:
    """The table of reconstructions and that of samples, in Markdown. real: scores of `Judge.real`."""
    everything = [figures for seeds in results.values() for figures in seeds]
    floor = {**everything[0]["real"], **real}
    recon, samples = ([[title, "CPU min", "steps", *c]] for title, c in TABLES.items())
    for rows, columns in ((recon, RECON_COLUMNS), (samples, SAMPLE_COLUMNS)):
        rows.append(["real halves", "-", "-", *cells([floor], columns)])
    for (name, minutes), seeds in results.items():
        label = f"{name}, {minutes:g} min"
        spent = [("vae", [f["vae"]["minutes"] for f in seeds]), ("ldm", [minutes_of(f) for f in seeds])]
        first, second = (
            [label, f"{np.mean(values):.1f}", f"{np.mean([f[stage]['steps'] for f in seeds]):.0f}"]
            for stage, values in spent
        )
        recon.append([*first, *cells([{**f["recon"], **f["reconstruction"]} for f in seeds], RECON_COLUMNS)])
        samples.append([*second, *cells([f["samples"] for f in seeds], SAMPLE_COLUMNS)])
    return f"{table(recon, markdown=True)}\n\n{table(samples, markdown=True)}"


TABLES = {"through the autoencoder": RECON_COLUMNS, "samples": SAMPLE_COLUMNS}
PANELS = {  # title -> where the figure is
    "reconstruction, PSNR dB": ("reconstruction", "psnr"),
    "Frechet distance": ("samples", "frechet"),
    "kernel distance": ("samples", "kernel"),
    "spectrum, RMS of log10": ("samples", "spectrum"),
    "volumes, relative W": ("samples", "volumes"),
    "one component": ("samples", "components"),
}


def draw(path: Path, found: dict[str, tuple[Results, Scores]]) -> Path | None:
    """Quality against CPU minutes: a row of panels for each data set, a line for each pipeline. Dashes: real
    halves."""
    size = (3.2 * len(PANELS), 2.8 * len(found))
    figure = new_figure(figsize=size, dpi=100, layout="constrained")
    if figure is None:
        return None
    axes = figure.subplots(len(found), len(PANELS), squeeze=False)
    for line, (data, (results, real)) in zip(axes, found.items(), strict=True):
        floor = {**next(iter(results.values()))[0]["real"], **real}
        for ax, (title, (part, key)) in zip(line, PANELS.items(), strict=True):
            for name in dict.fromkeys(name for name, _ in results):
                seeds = [s for (other, _), s in sorted(results.items()) if other == name]
                x = [np.mean([minutes_of(f) for f in s]) for s in seeds]
                y = [np.mean([f[part][key] for f in s]) for s in seeds]
                ax.plot(x, y, "o-", label=name)
            if key in floor:
                ax.axhline(floor[key], color="grey", linestyle="--", linewidth=1)
            ax.set(title=title, xlabel="CPU minutes", xscale="log")
            ticks = sorted({minutes for _, minutes in results})
            ax.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks], minor=False)
            ax.set_xticks([], minor=True)
        line[0].set_ylabel(data)
    axes[0, 0].legend()
    return save_figure(figure, path)


def draw_samples(path: Path, bench: Bench, rows: list[Row], minutes: float, seed: int) -> Path | None:
    """The middle planes of test cases, and of samples of each row, all on one grey scale."""
    places = {f"{row.name}, {minutes:g} min": bench.place(row.name, minutes, seed) for row in rows}
    sets = {"real (test)": bench.judge.test}
    sets |= {name: read_set(place / "samples", bench.data) for name, place in places.items()}
    display = bench.data.spec.display
    first = {name: itertools.islice(volumes_of(volumes), SHOWN) for name, volumes in sets.items()}
    return save_sheet(path, {name: [visible(x, display) for x in v] for name, v in first.items()}, display)


# --- the command --------------------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="DATA", help=f"of {', '.join(TASKS)}; none = all")
    parser.add_argument("--minutes", type=numbers, default=[10, 20, 40, 80], help="CPU minutes of a pipeline")
    parser.add_argument("--seeds", default="0,1", help="of each pipeline")
    parser.add_argument("--rows", default="ours,monai", help="without levers")
    parser.add_argument("--lever", type=lever, action="append", default=[], help="a further row, see above")
    parser.add_argument("--samplers", action="store_true", help="compare samplers at equal calls as well")
    parser.add_argument("--share", type=float, default=0.4, help="of the autoencoder in the minutes")
    parser.add_argument("--samples", type=int, default=64, help="of each pipeline")
    parser.add_argument(
        "--segment_steps", type=int, default=1500, help="of the segmenter, which is not timed"
    )
    parser.add_argument("--amp", choices=("fp32", "bf16"), default="fp32", help="precision of all pipelines")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of everything")
    parser.add_argument(
        "--tiny", action="store_true", help="seconds, to try the script: figures mean nothing"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.names) - TASKS.keys():
        parser.error(f"no data set {min(unknown)}; expected some of {', '.join(TASKS)}")
    if unknown := set(words := args.rows.split(",")) - {"ours", "monai"}:
        parser.error(f"no row {min(unknown)}; expected ours, monai")
    if args.samplers and "ours" not in words:
        parser.error("--samplers needs the row ours")
    if "monai" in words and importlib.util.find_spec("monai") is None:
        parser.error("the row monai needs MONAI (pip install -e '.[test]'); --rows ours goes without")
    args.rows, args.fewest_steps = [*map(Row, words), *args.lever], 20
    args.seeds = [int(word) for word in args.seeds.split(",")]
    if args.tiny:
        args.minutes, args.seeds, args.samples, args.segment_steps = [0.02, 0.04], [0], 6, 4
        args.fewest_steps = 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    torch.set_num_threads(1)
    work = args.work.resolve()
    kept = ("share", "samples", "segment_steps", "amp", "tiny")
    same(work / "settings.json", {name: getattr(args, name) for name in kept})
    tasks = {"tiny": TINY} if args.tiny else {name: TASKS[name] for name in args.names or TASKS}
    found: dict[str, tuple[Results, Scores]] = {}
    for name, task in tasks.items():
        bench = Bench(task, work / name, args)
        real = once(work / name / "real.json", bench.judge.real)
        results, _ = found[name] = {}, real
        for minutes in sorted(args.minutes):
            for row in args.rows:
                results[row.name, minutes] = [bench.score(row, minutes, seed) for seed in args.seeds]
                print(f"\n{name}\n\n{tables(results, real)}\n", flush=True)
                draw(work / "quality.png", found)
        draw_samples(work / f"{name}.png", bench, args.rows, max(args.minutes), args.seeds[0])
        if args.samplers:
            rows = bench.samplers(max(args.minutes), args.seeds[0])
            print(f"\n{name}, samplers\n\n{table(rows, markdown=True)}\n", flush=True)
    figures = {
        name: {f"{row}, {minutes:g} min": seeds for (row, minutes), seeds in results.items()} | {"real": real}
        for name, (results, real) in found.items()
    }
    (work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{work / 'figures.json'}, {work / 'quality.png'}")


if __name__ == "__main__":
    sys.exit(run_script(main))
