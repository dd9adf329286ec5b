"""Sample new volumes from a run of train_ldm.py.

new volumes       python sample.py runs/ldm-hippocampus --num 16 --steps 30
several GPUs      torchrun --nproc_per_node 4 -- sample.py runs/ldm-hippocampus --num 64
under conditions  python sample.py RUN --condition class=1 --condition text="a small lesion" --guidance 3
                  python sample.py RUN --conditions FILE.csv --guidance class=3,text=2
fewer mistakes    python sample.py RUN --autoguidance 1.8
translation       python sample.py RUN --condition image=PATH --num 8 --maps
                  python sample.py RUN --cases test --num 8       the run's own cases, beside their targets
editing           python sample.py RUN --inpaint IMAGE --region MASK
                  python sample.py RUN --edit IMAGE --strength 0.5
                  python sample.py RUN --interpolate 3,7          or two images
counterfactuals   python sample.py RUN --edit IMAGE --invert class=1 --condition class=0 --strength 0.7
                  python sample.py RUN --conditions FILE.csv --same_noise
with labels       python sample.py runs/ldm-phantom-anatomy --with-labels
larger volumes    python sample.py runs/ldm-hippocampus --size 80,112,80      or 80mm,112mm,80mm

Volumes are written as NIfTI (2-D: TIFF), with the spacing, orientation and median intensity range of the
training data, or with the geometry of the source or of the edited image. Beside them are a preview sheet, and
samples.json with scores and all settings.
Sample i depends on (seed, i) alone: not on the batch size, the number of ranks, or the device (to rounding).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError, at_least, to_dict
from ..data import Volume, write
from ..data.geometry import centred
from ..data.loading import load_role
from ..data.volumes import file_name, spacing_affine
from ..denoiser import Denoiser
from ..diffusion_kernel import SAMPLERS
from ..engine.distributed import all_reduce_sum, barrier, gather, is_main, print0, rank, setup, world_size
from ..engine.logger import plural, progress, save_sheet, visible
from ..engine.memory_plan import MemoryTable, decode, weight_bytes
from ..evaluation.results import new_folder, table, write_report
from ..evaluation.statistics import finite_means
from ..guidance import active_branches, branch_weights
from ..large.streaming import STREAMED
from ..latent_diffusion import NO_EDIT
from ..metrics import psnr, set_statistics, ssim
from ..pipeline import LatentDiffusionPipeline
from .grain import Grain
from .sampling_request import Request, RequestConfig, autoguidance_of, guidance_of, read_request
from .segmentation import IN_MEMORY, check_finite, file_labels, overlay, suffix_of

SamplerName = Literal[("auto", *SAMPLERS)]  # a tuple, since Python 3.10 knows no star here
SHOWN = 16  # volumes on the sheet and in the scores: as many as the real ones that they are compared with
THINNED = 128  # voxels along an axis, at most, of a large sample on the sheet
INVERTED = {"flow": "euler", "vp": "ddim"}  # the samplers that `DiffusionKernel.invert` runs backwards
MAPS = "maps"  # the folder of means and standard deviations


@dataclass(frozen=True)
class SampleConfig(RequestConfig):
    steps: int = 30  # intervals of the sampling grid; network calls are printed
    sampler: SamplerName = "auto"  # auto = ab2 or dpmpp; with --invert euler or ddim
    eta: float = 0.0  # ddim: fresh noise, 0 = none, 1 = as much as ddpm
    batch_size: int = 8  # volumes made at once, on each rank; of a volume in windows, its windows
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    compile: bool = False  # torch.compile the denoiser: pays on a GPU, where many volumes are made
    maps: bool = False  # write the voxel-wise mean and standard deviation of each set's samples, into maps/
    grain: bool = False  # add the grain that the autoencoder leaves out, as strong as in real images
    with_labels: bool = False  # write label maps too, into labels/ (runs with --anatomy.registers bound)
    window: tuple[int, ...] | None = None  # voxels denoised at once; none = as in training
    overlap: float = 0.5  # share of a window that its neighbour covers at least
    registers: bool = True  # false: without the registers that the run has learned, to compare
    out: str | None = None  # new folder for the results; none = samples-001 (-002, ...) in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = nii.gz for 3-D, tif for 2-D
    plan: bool = False  # only print how much memory sampling needs, and what would fit
    memory: float | None = None  # GiB that decoding may use (--plan: of the device); none = what is free

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "memory", "overlap")
        if self.with_labels and self.inpaint:
            raise InputError("with_labels, inpaint: give one of the two")
        if self.grain and (self.inpaint or self.edit):
            raise InputError("grain: cannot be added to an edited image, whose voxels have their own")
        if self.autoguidance != 1 and not self.registers:
            raise InputError("registers: cannot be switched off with autoguidance")
        if self.interpolate and (self.sampler == "ddpm" or self.eta):
            raise InputError("interpolate: needs a sampler that draws no fresh noise, and eta 0")
        if self.invert and (self.sampler not in ("auto", *INVERTED.values()) or self.eta):
            raise InputError(f"invert: needs sampler {' or '.join(INVERTED.values())}, and eta 0")
        if self.maps and self.samples < 2:
            raise InputError(f"maps: need at least 2 samples, got num {self.samples}")


# --- results ------------------------------------------------------------------------------------------------


class Results:
    """Writes samples to files, and keeps what the report needs: the first samples, sums over each set,
    scores beside targets. On several ranks each has its own, and `close` joins them."""

    def __init__(
        self, config: SampleConfig, pipeline: LatentDiffusionPipeline, request: Request, folder: Path
    ):
        self.config, self.pipeline, self.request, self.folder = config, pipeline, request, folder
        self.spec, self.each = pipeline.spec, config.samples
        self.size = pipeline.model.volume_size(config.size)
        self.suffix = suffix_of(config.format, self.spec.dims)
        self.summed = self.each > 1 and (config.maps or request.has_targets)
        # Samples that are large are decoded, written and shown plane by plane, and not compared as wholes
        large = math.prod((self.spec.channels, *self.size)) > IN_MEMORY
        compared = self.summed or request.has_targets
        self.in_planes = large and not compared and request.edit is NO_EDIT
        self.shown: dict[int, Tensor] = {}
        self.shown_labels: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}  # set -> (2, C, *size), of the samples and of their squares
        self.scores: dict[str, dict[str, float]] = {}

    def add(self, i: int, x: Tensor | Iterable[tuple[int, Tensor]], label_map: Tensor | None = None) -> None:
        """Write sample i, x (C, *size) or its planes (`decode_planes`), with its label map (*size), and keep
        what the report needs."""
        number, name = i // self.each, f"sample_{i:04d}"
        if self.config.conditions or self.request.has_targets:
            name = self.request.names[number] + (f"_{i % self.each:02d}" if self.each > 1 else "")
        if self.in_planes:
            x = self.write_planes(name, number, x)
        else:
            self.write(name, number, x)
        if label_map is not None:
            self.write_label_map(name, number, label_map)
            shown = self.thinned(label_map[None])[0] if self.in_planes else label_map
            self.shown_labels |= {i: shown} if i < 4 else {}
        if i < SHOWN or (self.request.has_targets and number < 4 and i % self.each == 0):
            self.shown[i] = x
        if self.summed:
            pair = torch.stack([x.double(), x.double().square()])
            self.sums[number] = self.sums[number] + pair if number in self.sums else pair
        if self.request.has_targets:
            self.scores[name] = self.score(x, number)
            if self.spec.dims == 2:
                self.sheet(name, x, number)

    def write(self, name: str, number: int, x: Tensor, folder: str = "") -> None:
        check_finite(x, name)
        volume = self.request.volume(number, x, self.spec)
        if self.request.paste:
            volume = pasted(volume, self.request)
        if folder != MAPS:  # a mean lies between the values of 8 bits
            volume = self.request.as_file(number, volume, self.spec)
        write(self.folder / folder / f"{file_name(name)}{self.suffix}", volume)

    def write_planes(self, name: str, number: int, planes: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Write a sample that comes plane by plane. Returns a thinned copy of the sample, for the sheet."""
        kept = []

        def seen() -> Iterator[tuple[int, Tensor]]:
            for start, part in planes:
                check_finite(part, name)
                kept.append(self.thinned(part, start))
                yield start, part

        volume = self.request.large_volume(number, seen(), self.size, self.spec)
        write(self.folder / f"{file_name(name)}{self.suffix}", volume)
        return torch.cat(kept, 1)

    def thinned(self, x: Tensor, start: int = 0) -> Tensor:
        """Every k-th voxel, along every axis, of planes x (C, n, ...) from plane `start` on: no more than in
        training, and no more than THINNED along an axis."""
        most = [min(m, THINNED) for m in self.spec.size]
        k = max(math.ceil(n / m) for n, m in zip(self.size, most, strict=True))
        return x[(slice(None), slice(-start % k, None, k), *[slice(None, None, k)] * (x.ndim - 2))].clone()

    def sheet(self, name: str, x: Tensor, number: int) -> None:
        """sheets/NAME.tif: source, target and sample side by side, first channels, scaled, float32."""
        case = self.request.images[number, number]
        row = [case[role][:1] for role in ("source", "image") if role in case] + [x[:1].float()]
        volume = Volume(torch.cat(row, 2).numpy(), spacing_affine(self.spec.spacing))
        write(self.folder / "sheets" / f"{file_name(name)}.tif", volume)

    def write_label_map(self, name: str, number: int, label_map: Tensor) -> None:
        """labels/NAME: a label map (*size), with its volume's geometry and the values of training masks."""
        volume = self.request.volume(number, label_map[None], self.spec)
        array = file_labels(volume.array, self.pipeline.layout, self.spec.num_labels)
        volume = dataclasses.replace(volume, array=array)
        write(self.folder / "labels" / f"{file_name(name)}{self.suffix}", volume)

    def score(self, x: Tensor, number: int) -> dict[str, float]:
        """PSNR (dB) and SSIM beside the target, both in the scaled range [-1, 1]. A target of one value, such
        as an empty slice, has no score: a PSNR there has no upper limit."""
        target = self.request.images[number, number]["image"][None]
        if target.min() == target.max():
            return {"psnr": math.nan, "ssim": math.nan}
        x = x[None].float().clamp(-1, 1) if self.spec.clipped else x[None].float()
        return {"psnr": float(psnr(x, target, 2.0)), "ssim": float(ssim(x, target, 2.0))}

    def close(self) -> None:
        """Join the results of all ranks; write the maps of each set."""
        self.shown = {i: v for part in gather(self.shown) for i, v in part.items()}
        self.shown_labels = {i: v for part in gather(self.shown_labels) for i, v in part.items()}
        for number, name in enumerate(self.request.names) if self.summed else ():
            shape = (2, self.spec.channels, *self.size)
            sums = all_reduce_sum(self.sums.pop(number, torch.zeros(shape, dtype=torch.float64)))
            mean = sums[0] / self.each
            if is_main() and self.request.has_targets:
                self.scores[f"{name} mean"] = self.score(mean.float(), number)
            if is_main() and self.config.maps:
                std = (sums[1] / self.each - mean.square()).clamp(min=0).sqrt()
                self.write(f"{name}_mean", number, mean.float(), MAPS)
                zero, width = (self.request.volume(number, v.float(), self.spec) for v in (0 * std, std))
                volume = dataclasses.replace(width, array=width.array - zero.array)  # no offset
                write(self.folder / MAPS / f"{file_name(f'{name}_std')}{self.suffix}", volume)
        self.scores = {k: v for part in gather(self.scores) for k, v in part.items()}
        barrier()

    def _title(self, first: int, last: int) -> str:
        """What a row of the preview sheet shows; with a table of conditions also the names of its sets."""
        names = [self.request.names[i // self.each] for i in range(first, last + 1)]
        sets = f": {', '.join(dict.fromkeys(names))}" if self.config.conditions else ""
        return f"samples {first} to {last}{sets}"

    def rows(self) -> dict[str, list[np.ndarray]]:
        """The pictures of the preview sheet: targets and samples, or the first samples; then label maps."""
        display = self.spec.display
        shown = [visible(self.shown[i], display) for i in sorted(self.shown)]
        starts, last = range(0, len(shown), 4), len(shown) - 1
        rows = {self._title(i, min(i + 3, last)): shown[i : i + 4] for i in starts}
        if self.request.has_targets:
            some = [self.request.images[i, i] for i in range(min(4, len(self.request.names)))]
            kinds = {"source": "source", "target": "image"} if "source" in some[0] else {"target": "image"}
            rows = {title: [visible(case[role], display) for case in some] for title, role in kinds.items()}
            first = [i * self.each for i in range(len(some)) if i * self.each in self.shown]
            rows["generated"] = [visible(self.shown[i], display) for i in first]
        if self.shown_labels:
            some = [(self.shown[i], self.shown_labels[i]) for i in sorted(self.shown_labels)]
            rows["the first with their labels"] = [part for pair in some for part in overlay(*pair, display)]
        return rows


def pasted(sample: Volume, request: Request) -> Volume:
    """The edited image's own file, with the voxels of the region taken from the sample."""
    images, region = request.images, request.edit.region
    whole = load_role(images.cases[0].image, "image", images.config)
    start = centred(whole.shape, tuple(region.shape))
    firsts = list(zip(start, sample.shape, strict=True))
    inside = tuple(slice(max(0, -s), max(0, -s) + n) for s, n in firsts)
    window = (slice(None), *(slice(max(0, s), max(0, s) + n) for s, n in firsts))
    array = whole.array.copy()
    array[window] = np.where(region.numpy()[inside], sample.array, array[window])
    return dataclasses.replace(whole, array=array)


# --- the report ---------------------------------------------------------------------------------------------


def report(results: Results, run: Path, facts: dict[str, Any]) -> None:
    """preview.png, samples.json, and on the console the scores of the first samples. facts: what only the
    sampling knows: sampler, network calls, seconds."""
    config, request, spec = results.config, results.request, results.spec
    scores = {}
    if not results.in_planes:
        scores = {"generated": set_statistics(results.shown[i] for i in sorted(results.shown))}
        if spec.reference is not None:  # an imported run has seen no data here
            scores["real (validation)"] = spec.reference
    picture = save_sheet(results.folder / "preview.png", results.rows(), spec.display)
    total, seconds = results.each * len(request.names), facts["seconds"]
    spacings = request.spacings(spec)
    content = {
        **to_dict(config),
        "num": total,
        "run": str(run),
        "step": results.pipeline.content["step"],
        **facts,
        "seconds_per_volume": round(seconds / max(1, total), 3),
        "size": list(results.size),
        "spacing": spacings.pop() if len(spacings) == 1 else None,  # else `sets` holds them
        "scores": scores,
        "sets": dict(zip(request.names, request.values, strict=True)),
        "cases_scores": results.scores,
    }
    write_report(results.folder / "samples.json", content)
    if scores:
        print(table([["", *scores["generated"]], *([name, *row.values()] for name, row in scores.items())]))
    print_target_scores(results.scores)
    print(
        f"{plural(total, 'volume')} in {seconds:.1f} s: {results.folder}"
        + (f", {picture}" if picture else "")
    )


def print_target_scores(scores: dict[str, dict[str, float]]) -> None:
    """The means over all samples, and over the means of all sets, of their scores beside targets."""
    for what in ("samples", "means") if scores else ():
        rows = [row for name, row in scores.items() if name.endswith(" mean") == (what == "means")]
        scored = [row for row in rows if math.isfinite(row["psnr"])]
        if len(scored) < len(rows):
            left = f"{len(rows) - len(scored)} of {len(rows)} {what}"
            print(f"note: {left} are not scored, their target has one value everywhere")
        if scored:
            means = finite_means(scored).values()
            print(table([["", *scored[0]], [f"{what} beside targets, {len(scored)}", *means]]))


def plan(config: SampleConfig, run: Path) -> None:
    """--plan: print the memory that denoising and decoding need, and the largest batch and cube that fit."""
    pipeline = LatentDiffusionPipeline(run)
    model, autoguidance = pipeline.model, autoguidance_of(config, pipeline)
    others = [] if autoguidance is None else [autoguidance.denoiser]
    held = sum(map(weight_bytes, (model.denoiser, model.autoencoder, *others)))
    guidance = guidance_of(config)
    guidance.check(model.denoiser.conditions)
    weights = branch_weights(guidance.scales(model.denoiser.conditions))
    branches = len(active_branches(weights, guidance.rescale))  # in one batch

    def denoise(net: nn.Module, batch: int, size: tuple[int, ...]) -> None:
        z = torch.zeros(batch, model.latent_shape[0], *size)
        slope, half = z + 0, z + 0  # what a sampler keeps between two calls
        preds = net(torch.cat([z] * branches), torch.zeros(branches * batch)).to(z.dtype)
        preds[:batch] + slope + half

    def make_denoiser() -> nn.Module:
        return Denoiser(*model.denoiser.arguments)

    table = MemoryTable(config.memory, config.amp, config.device)
    steps = max(model.denoiser.unet.config.downsampling), max(model.autoencoder.downsampling)
    size = model.volume_size(config.in_voxels(model.spec.spacing).size)
    whole = model.autoencoder.latent_shape(size)[1:]
    net = model.denoiser_for(whole, config.window, config.overlap)
    latent = whole if net is model.denoiser else net.window
    table.inference("denoising, latents", make_denoiser, denoise, config.batch_size, latent, steps[0], held)
    table.inference("decoding", model.autoencoder.fresh_copy, decode, 1, size, steps[1], held, STREAMED)
    table.print()


def by(numbers: Iterable[object]) -> str:
    """(64, 80, 64) -> "64x80x64"."""
    return "x".join(map(str, numbers))


def with_grain(
    grain: Grain, x: Tensor | Iterable[tuple[int, Tensor]], size: Sequence[int], seed: int, index: int
) -> Tensor | Iterable[tuple[int, Tensor]]:
    """Sample `index`, x (C, *size) or its planes (`decode_planes`), with its grain."""
    if isinstance(x, Tensor):
        return grain.add(x, size, seed, index)
    return ((start, grain.add(part, size, seed, index, start)) for start, part in x)


# --- all of it ----------------------------------------------------------------------------------------------


def sample_files(config: SampleConfig, run: Path) -> Path | None:
    """Make the samples that the settings describe, and write them; returns the new folder."""
    if config.plan:
        return plan(config, run)
    pipeline = LatentDiffusionPipeline(run, setup(config.device))
    model = pipeline.model
    model.autoencoder.memory = config.memory
    grain = Grain.of(pipeline) if config.grain else None
    if config.with_labels:
        model.check_labels()
    if not config.registers:
        model.use_registers(False)
    if config.compile:
        model.denoiser.compile()
    usual = INVERTED[model.kernel.process] if config.invert else model.kernel.default_sampler
    sampler = usual if config.sampler == "auto" else config.sampler
    model.kernel.check_sampler(sampler, config.eta)
    guidance, autoguidance = guidance_of(config), autoguidance_of(config, pipeline)
    guidance.check(model.denoiser.conditions)
    if autoguidance is not None and config.compile:
        autoguidance.denoiser.compile()
    request, config = read_request(config, pipeline, config.amp), config.in_voxels(model.spec.spacing)
    guidance.note_idle(request.conditions)
    size, strength = model.volume_size(config.size), request.edit.strength
    how = {"size": size, "window": config.window, "overlap": config.overlap}
    latent = model.autoencoder.latent_shape(size)[1:]
    net = model.denoiser_for(latent, config.window, config.overlap)
    if windows := [] if net is model.denoiser else net.boxes:
        print0(f"each in {len(windows)} windows of {by(net.window)} latent voxels, averaged at every step")
    times = model.kernel.sampling_times(sampler, config.steps, model.window, strength)
    calls = model.kernel.num_network_calls(sampler, times, request.edit.resample) * max(1, len(windows))
    total = config.samples * len(request.names)
    folder = new_folder(run, config.out, "samples")
    mm = " or ".join(
        by(f"{n * length:.4g}" for n, length in zip(size, spacing, strict=True))
        for spacing in sorted(request.spacings(model.spec))
    )
    steps = f"{plural(len(times), 'step')} = {plural(calls, 'network call')} each"
    print0(f"{plural(total, 'volume')} of {by(size)} ({mm} mm), {sampler}, {steps}")
    if autoguidance is not None:
        low, high = autoguidance.interval
        where = f"noise levels from {low:g} to {high:g}, with as many calls of the weaker denoiser there"
        print0(f"autoguidance {autoguidance.scale:g} at {where}")
    if grain is not None:
        print0(f"grain: {grain.strength}")

    indices = list(range(total))[rank() :: world_size()]
    sets = torch.tensor(indices, dtype=torch.long) // config.samples
    cond = {name: value[sets] for name, value in request.conditions.items()}
    start, results = time.perf_counter(), Results(config, pipeline, request, folder)
    settings = (config.steps, sampler, config.seed, config.batch_size, config.eta, config.amp)
    noises = [i % config.samples for i in indices] if config.same_noise else indices
    stream = model.stream(
        noises,
        *settings,
        cond,
        guidance,
        request.edit,
        progress=is_main(),
        decoded=not results.in_planes,
        autoguidance=autoguidance,
        **how,
    )
    batches, done = -(-len(indices) // (1 if windows else config.batch_size)), 0
    for x, z in progress(stream, "sampling", batches):
        own = {name: value[done : done + len(z)] for name, value in cond.items()}
        label_maps = model.label_maps(z, own, config.amp, **how) if config.with_labels else [None] * len(z)
        x = [model.decode_planes(one, size, config.amp) for one in z.split(1)] if x is None else x
        for i, number, volume, label_map in zip(indices[done:], noises[done:], x, label_maps, strict=False):
            if grain is not None:
                volume = with_grain(grain, volume, size, config.seed, number)
            results.add(i, volume, label_map)
        done += len(z)
    results.close()
    if is_main():
        seconds = round(time.perf_counter() - start, 2)
        report(results, run, {"sampler": sampler, "network_calls": calls, "seconds": seconds})
    barrier()
    return folder
