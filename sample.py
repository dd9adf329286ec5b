#!/usr/bin/env python3
"""Make new volumes with a trained run, or send volumes through its autoencoder and back.

new volumes       python sample.py runs/ldm-hippocampus --num 16 --steps 30
several GPUs      torchrun --nproc_per_node 4 -- sample.py runs/ldm-hippocampus --num 64
under conditions  python sample.py RUN --condition class=1 --condition text="a small lesion" --guidance 3
                  python sample.py RUN --conditions FILE.csv --guidance class=3,text=2
translation       python sample.py RUN --condition image=PATH --num 8 --maps
                  python sample.py RUN --cases test --num 8       the run's own cases, beside their targets
editing           python sample.py RUN --inpaint IMAGE --region MASK
                  python sample.py RUN --edit IMAGE --strength 0.5
                  python sample.py RUN --interpolate 3,7          or two images
with labels       python sample.py runs/ldm-phantom-anatomy --with-labels
there and back    python sample.py runs/vae-hippocampus --reconstruct FOLDER
segmentation      python sample.py runs/cdal-hippocampus --segment FILE_OR_FOLDER --votes 5 --reference FOLDER

Volumes are written as NIfTI (2-D: TIFF) with the training data's spacing and orientation and its median
intensity range, where a source is given with its geometry, beside a preview sheet, a table of scores and a
JSON file that tells how they were made.
Nothing is overwritten. Sample i depends on (seed, i) alone: not on the batch size, the number of ranks, or
the device (to rounding).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm3d.config import InputError, at_least, read_command, to_dict
from ldm3d.data import DataSpec, Volume, open_images, write
from ldm3d.data.geometry import centred
from ldm3d.data.loading import load_role
from ldm3d.data.volumes import spacing_affine
from ldm3d.denoiser import Denoiser
from ldm3d.engine.checkpoint import load_run
from ldm3d.engine.distributed import (
    all_reduce_sum,
    barrier,
    gather,
    is_main,
    print0,
    rank,
    run_script,
    setup,
    world_size,
)
from ldm3d.engine.logger import progress, save_sheet
from ldm3d.engine.memory_plan import Plan, decode, weight_bytes
from ldm3d.engine.training import autocast
from ldm3d.evaluation.results import new_folder, table, write_report
from ldm3d.guidance import branch_weights
from ldm3d.inference.sampling_request import Request, RequestConfig, guidance_of, read_request
from ldm3d.inference.segmentation import SegmentConfig, file_labels, overlay, segment_files
from ldm3d.latent_diffusion import LatentDiffusion, load_autoencoder
from ldm3d.metrics import psnr, set_statistics, ssim

# --- Config -------------------------------------------------------------------------------------------------


SEGMENTING = {f.name for f in fields(SegmentConfig)} | {"device"}  # the settings that it reads
RECONSTRUCTING = {"reconstruct", "out", "format", "amp", "device"}


@dataclass(frozen=True)
class Config(RequestConfig):
    steps: int = 30  # intervals of the sampling grid; network calls are printed
    sampler: Literal["auto", "ddpm", "ddim", "dpmpp", "euler", "heun", "ab2"] = "auto"  # auto = heun or dpmpp
    eta: float = 0.0  # share of fresh noise of ddim
    batch_size: int = 8  # volumes, or votes, made at once, on each rank
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    compile: bool = False  # torch.compile the denoiser: pays on a GPU, where many volumes are made
    maps: bool = False  # write the voxel-wise mean and standard deviation of each set's samples, into maps/
    with_labels: bool = False  # write label maps too, into labels/ (runs with --anatomy.registers bound)
    registers: bool = True  # false: without the registers that the run has learned, to compare
    out: str | None = None  # new folder for the results; none = samples-001 (-002, ...) in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = nii.gz for 3-D, tif for 2-D
    plan: float | None = None  # GiB of a GPU: only tell how much memory sampling needs, and what would fit
    reconstruct: str | None = None  # folder to send through the autoencoder and back instead
    segment: str | None = None  # image, or folder of images, to segment with a run of train_cdal.py instead
    votes: int = 5  # segmentations of each case, whose mean is taken
    reference: str | None = None  # folder of label maps, named like the images, to score segmentations with
    part: Literal["all", "train", "val", "test"] = "all"  # segment these cases of the run's split only
    window: tuple[int, ...] | None = None  # voxels that are segmented at once; none = as in validation
    overlap: float = 0.5  # part of a window that it shares with the next, at least
    probabilities: bool = False  # write the probability of every label too

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size")
        if self.with_labels and self.inpaint:
            raise InputError("with_labels, inpaint: give one of the two")
        if self.interpolate and (self.sampler == "ddpm" or self.eta):
            raise InputError("interpolate: needs a sampler that draws no fresh noise, and eta 0")
        if self.maps and self.samples < 2:
            raise InputError(f"maps: need at least 2 samples, got num {self.samples}")
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        alone = {"votes", "reference", "part", "window", "overlap", "probabilities"}
        if not self.segment and (idle := given & alone):
            raise InputError(f"{min(idle)}: needs segment")
        for job, used in (("segment", SEGMENTING), ("reconstruct", RECONSTRUCTING)):
            if job in given and (idle := given - used):
                raise InputError(f"{min(idle)}: has no effect with {job}")


def suffix_of(config: Config, spec: DataSpec) -> str:
    return config.format if config.format != "auto" else {2: "tif", 3: "nii.gz"}[spec.dims]


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """Aligned text, one line per entry."""
    return table([("", *next(iter(rows.values()))), *((name, *row.values()) for name, row in rows.items())])


# --- new volumes --------------------------------------------------------------------------------------------

SHOWN = 16  # volumes on the sheet and in the scores: as many as the real ones that they are compared with


def generate(config: Config, run: Path, device: torch.device) -> None:
    model = LatentDiffusion.load(run, device)
    if config.with_labels:
        model.check_labels()
    if not config.registers:
        model.use_registers(False)
    if config.compile:
        model.denoiser.compile()
    sampler = model.default_sampler if config.sampler == "auto" else config.sampler
    model.kernel.check_sampler(sampler, config.eta)
    guidance = guidance_of(config)
    guidance.check(model.denoiser.conditions)
    request = read_request(config, run, model, config.amp)
    guidance.note_idle(request.conditions)
    times = model.kernel.sampling_times(sampler, config.steps, model.latent_shape[1:])
    _, times = request.edit.start(torch.zeros(1, *model.latent_shape, device=device), times, [0])
    calls, each = model.kernel.num_network_calls(sampler, times), config.samples
    total = each * len(request.names)
    folder = new_folder(run, config.out, "samples")
    size = "x".join(map(str, model.spec.size))
    print0(f"{total} volumes of {size}, {sampler}, {len(times)} steps = {calls} network calls each")

    indices = list(range(total))[rank() :: world_size()]
    sets = torch.tensor(indices, dtype=torch.long) // each
    told = {name: value[sets] for name, value in request.conditions.items()}
    start, results = time.perf_counter(), Results(config, model, request, folder)
    settings = (config.steps, sampler, config.seed, config.batch_size, config.eta, config.amp)
    stream = model.stream(indices, *settings, told, guidance, request.edit)
    batches, done = -(-len(indices) // config.batch_size), 0
    for x, z in progress(stream, "sampling", batches):
        own = {name: value[done : done + len(x)] for name, value in told.items()}
        labels = model.label_maps(z, own, config.amp) if config.with_labels else [None] * len(x)
        for i, volume, label_map in zip(indices[done:], x, labels, strict=False):
            results.add(i, volume, label_map)
        done += len(x)
    results.close()
    if is_main():
        report(config, run, model, folder, results, sampler, calls, time.perf_counter() - start)
    barrier()


class Results:
    """Writes the samples, and keeps what the report needs: the first ones, sums of each set, scores."""

    def __init__(self, config: Config, model: LatentDiffusion, request: Request, folder: Path):
        self.config, self.model, self.request, self.folder = config, model, request, folder
        self.each, self.suffix = config.samples, suffix_of(config, model.spec)
        self.summed = self.each > 1 and (config.maps or request.targets)
        self.shown: dict[int, Tensor] = {}
        self.shown_labels: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}  # set -> (2, C, *size), of the samples and of their squares
        self.scores: dict[str, dict[str, float]] = {}

    def add(self, i: int, x: Tensor, labels: Tensor | None = None) -> None:
        number, name = i // self.each, f"sample_{i:04d}"
        if self.config.conditions or self.request.targets:
            name = self.request.names[number] + (f"_{i % self.each:02d}" if self.each > 1 else "")
        self.write(name, number, x)
        if labels is not None:
            self.write_labels(name, number, labels)
            self.shown_labels |= {i: labels} if i < 4 else {}
        if i < SHOWN or (self.request.targets and number < 4 and i % self.each == 0):
            self.shown[i] = x
        if self.summed:
            pair = torch.stack([x.double(), x.double().square()])
            self.sums[number] = self.sums[number] + pair if number in self.sums else pair
        if self.request.targets:
            self.scores[name] = self.score(x, number)
            if self.model.spec.dims == 2:
                self.sheet(name, x, number)

    def write(self, name: str, number: int, x: Tensor) -> None:
        volume = self.request.volume(number, x, self.model)
        if self.request.paste:
            volume = pasted(volume, self.request)
        write(self.folder / f"{name}.{self.suffix}", volume)

    def sheet(self, name: str, x: Tensor, number: int) -> None:
        """sheets/NAME.tif: source, target and sample side by side, first channels, scaled, float32."""
        case = self.request.places[number, number]
        row = [case[role][:1] for role in ("source", "image") if role in case] + [x[:1].float()]
        volume = Volume(torch.cat(row, 2).numpy(), spacing_affine(self.model.spec.spacing))
        write(self.folder / "sheets" / f"{name}.tif", volume)

    def write_labels(self, name: str, number: int, labels: Tensor) -> None:
        """A label map (*size), with its volume's geometry and the values of the training masks."""
        volume = self.request.volume(number, labels[None], self.model)
        array = file_labels(volume.array, self.model.layout, self.model.spec.num_labels)
        write(self.folder / "labels" / f"{name}.{self.suffix}", dataclasses.replace(volume, array=array))

    def score(self, x: Tensor, number: int) -> dict[str, float]:
        """PSNR (dB) and SSIM beside the target, both in the scaled range [-1, 1]; nan for a target of one
        value, such as an empty slice, that would score without end."""
        target = self.request.places[number, number]["image"][None]
        if target.min() == target.max():
            return {"psnr": math.nan, "ssim": math.nan}
        x = x[None].float().clamp(-1, 1) if self.model.spec.clipped else x[None].float()
        return {"psnr": float(psnr(x, target, 2.0)), "ssim": float(ssim(x, target, 2.0))}

    def close(self) -> None:
        """Bring together what the ranks have made; write the maps."""
        self.shown = {i: v for part in gather(self.shown) for i, v in part.items()}
        self.shown_labels = {i: v for part in gather(self.shown_labels) for i, v in part.items()}
        for number, name in enumerate(self.request.names) if self.summed else ():
            shape = (2, self.model.spec.channels, *self.model.spec.size)
            sums = all_reduce_sum(self.sums.pop(number, torch.zeros(shape, dtype=torch.float64)))
            mean = sums[0] / self.each
            if is_main() and self.request.targets:
                self.scores[f"{name} mean"] = self.score(mean.float(), number)
            if is_main() and self.config.maps:
                std = (sums[1] / self.each - mean.square()).clamp(min=0).sqrt()
                self.write(f"maps/{name}_mean", number, mean.float())
                zero, width = (self.request.volume(number, v.float(), self.model) for v in (0 * std, std))
                volume = dataclasses.replace(width, array=width.array - zero.array)  # no offset
                write(self.folder / "maps" / f"{name}_std.{self.suffix}", volume)
        self.scores = {k: v for part in gather(self.scores) for k, v in part.items()}
        barrier()


def pasted(made: Volume, request: Request) -> Volume:
    """The region as it was made, within the untouched voxels of the image's own file, in its units."""
    places, region = request.places, request.edit.region
    whole = load_role(places.cases[0].image, "image", places.config)
    start = centred(whole.shape, tuple(region.shape))
    inside = [slice(max(0, -s), max(0, -s) + n) for s, n in zip(start, made.shape, strict=True)]
    window = (slice(None), *(slice(max(0, s), max(0, s) + n) for s, n in zip(start, made.shape, strict=True)))
    array = whole.array.copy()
    array[window] = np.where(region.numpy()[tuple(inside)], made.array, array[window])
    return dataclasses.replace(whole, array=array)


def report(
    config: Config,
    run: Path,
    model: LatentDiffusion,
    folder: Path,
    results: Results,
    sampler: str,
    calls: int,
    seconds: float,
) -> None:
    """Preview sheet and scores of the first volumes, and the JSON that tells how all were made."""
    x = torch.stack([results.shown[i] for i in sorted(results.shown)])
    scores = {"generated": set_statistics(x), "real (validation)": model.spec.reference}
    request, total = results.request, results.each * len(results.request.names)
    rows = {
        f"samples {i} to {min(i + 3, len(x) - 1)}": list(x[i : i + 4, 0].numpy()) for i in range(0, len(x), 4)
    }
    if request.targets:
        some = [request.places[i, i] for i in range(min(4, len(request.names)))]
        kinds = {"source": "source", "target": "image"} if "source" in some[0] else {"target": "image"}
        rows = {title: [case[role][0].numpy() for case in some] for title, role in kinds.items()}
        first = [i * results.each for i in range(len(some)) if i * results.each in results.shown]
        rows["generated"] = [results.shown[i][0].numpy() for i in first]
    if results.shown_labels:
        pairs = [(results.shown[i], results.shown_labels[i]) for i in sorted(results.shown_labels)]
        rows["the first with their labels"] = [part for pair in pairs for part in overlay(*pair)]
    picture = save_sheet(folder / "preview.png", rows, limits=(-1, 1))
    content = load_run(run, "ldm")
    how = {
        **to_dict(config),
        "num": total,
        "run": str(run),
        "step": content["step"],
        "sampler": sampler,
        "network_calls": calls,
        "seconds": round(seconds, 2),
        "seconds_per_volume": round(seconds / max(1, total), 3),
        "size": list(model.spec.size),
        "spacing": list(model.spec.spacing),
        "scores": scores,
        "sets": dict(zip(request.names, request.given, strict=True)),
        "cases_scores": results.scores,
    }
    write_report(folder / "samples.json", how)
    print(table_of(scores))
    for what in ("samples", "means") if results.scores else ():
        rows = [row for name, row in results.scores.items() if name.endswith(" mean") == (what == "means")]
        known = [row for row in rows if math.isfinite(row["psnr"])]
        if len(known) < len(rows):
            left = f"{len(rows) - len(known)} of {len(rows)} {what}"
            print(f"note: {left} are not scored, their target has one value everywhere")
        if known:
            means = {k: sum(row[k] for row in known) / len(known) for k in known[0]}
            print(table_of({f"{what} beside targets, {len(known)}": means}))
    print(f"{total} volumes in {seconds:.1f} s: {folder}" + (f", {picture}" if picture else ""))


def plan(config: Config, run: Path) -> None:
    """--plan: what denoising and decoding need, in memory, and the largest batch and cube that would fit."""
    model = LatentDiffusion.load(run)
    both = weight_bytes(model.denoiser) + weight_bytes(model.autoencoder)

    guidance = guidance_of(config)
    guidance.check(model.denoiser.conditions)
    weights = branch_weights(guidance.scales(model.denoiser.conditions))
    branches = sum(weight != 0 for weight in weights)  # in one batch

    def denoise(net: torch.nn.Module, batch: int, size: tuple[int, ...]) -> None:
        z = torch.zeros(batch, model.latent_shape[0], *size)
        slope, half = z + 0, z + 0  # what a sampler keeps between two calls
        preds = net(torch.cat([z] * branches), torch.zeros(branches * batch)).to(z.dtype)
        preds[:batch] + slope + half

    def make_denoiser() -> torch.nn.Module:
        return Denoiser(*model.denoiser.arguments)

    plan = Plan(config.plan, config.amp, config.device)
    steps = max(model.denoiser.unet.config.downsampling), max(model.autoencoder.downsampling)
    latent = model.latent_shape[1:]
    plan.inference("denoising, latents", make_denoiser, denoise, config.batch_size, latent, steps[0], both)
    plan.inference("decoding", model.autoencoder.fresh_copy, decode, 1, model.spec.size, steps[1], both)
    plan.print()


# --- there and back -----------------------------------------------------------------------------------------


def reconstruct(config: Config, run: Path, device: torch.device) -> None:
    """Every volume, whole, through encoder (mean) and decoder; written with its own geometry and units."""
    autoencoder, content = load_autoencoder(
        run / "autoencoder.pt" if (run / "autoencoder.pt").exists() else run
    )
    autoencoder.to(device)
    dataset = open_images(content, config.reconstruct)
    folder = new_folder(run, config.out, "reconstructions")
    rows, sheet = {}, {"original": [], "reconstruction": []}
    for i in progress(range(rank(), len(dataset), world_size()), "reconstructing"):
        x = dataset[i, i]["image"][None].to(device)
        with torch.inference_mode(), autocast(config.amp, device):
            recon = autoencoder.decode(autoencoder.encode(x).mode(), x.shape[2:])
        recon = recon.float()
        name = dataset.cases[i].id
        scores = {"psnr": psnr(recon, x, data_range=2.0), "ssim": ssim(recon, x, data_range=2.0)}
        rows[name] = {k: float(v) for k, v in scores.items()}
        write(folder / f"{name}.{suffix_of(config, dataset.spec)}", dataset.restore(i, recon[0].cpu()))
        if len(sheet["original"]) < 4:
            sheet["original"].append(x[0, 0].cpu().numpy())
            sheet["reconstruction"].append(recon[0, 0].cpu().numpy())
    rows = {k: v for part in gather(rows) for k, v in part.items()}
    if is_main():
        save_sheet(folder / "preview.png", sheet, limits=(-1, 1))
        mean = {k: sum(r[k] for r in rows.values()) / len(rows) for k in ("psnr", "ssim")}
        how = {**to_dict(config), "run": str(run), "step": content["step"], "mean": mean, "cases": rows}
        write_report(folder / "reconstructions.json", how)
        print(table_of({f"mean of {len(rows)}": mean}))
        print(f"{len(rows)} volumes: {folder}")
    barrier()


# --- main ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    places = {"run": "run folder, such as runs/ldm-phantom, or a checkpoint in one"}
    config, (place,) = read_command(Config, places, argv, None, __doc__)
    run = Path(place)
    if config.plan is not None:
        return plan(config, run)
    device = setup(config.device)
    if config.segment:
        wanted = {f.name: getattr(config, f.name) for f in fields(SegmentConfig)}
        segment_files(SegmentConfig(**wanted), run, device)
    elif config.reconstruct:
        reconstruct(config, run, device)
    else:
        generate(config, run, device)


if __name__ == "__main__":
    sys.exit(run_script(main))
