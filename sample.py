#!/usr/bin/env python3
"""Make new volumes with a trained run, or send volumes through its autoencoder and back.

new volumes       python sample.py runs/ldm-hippocampus --num 16 --steps 30
several GPUs      torchrun --nproc_per_node 4 -- sample.py runs/ldm-hippocampus --num 64
there and back    python sample.py runs/vae-hippocampus --reconstruct FOLDER

Volumes are written as NIfTI (2-D: TIFF) with the training data's spacing and orientation and its median
intensity range, beside a preview sheet, a table of scores and a JSON file that tells how they were made.
Nothing is overwritten. Sample i depends on (seed, i) alone: not on the batch size, the number of ranks, or
the device (to rounding).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm3d.checkpoint import load_run
from ldm3d.config import InputError, Parser, add_options, replace, to_dict
from ldm3d.data import DataState, open_folder
from ldm3d.distributed import barrier, gather, is_main, print0, rank, run_script, setup, world_size
from ldm3d.latent_diffusion import LatentDiffusion, load_autoencoder
from ldm3d.logger import progress, save_sheet
from ldm3d.memory import Plan, decode, weight_bytes
from ldm3d.metrics import psnr, set_statistics, ssim
from ldm3d.scores import new_folder
from ldm3d.training import autocast
from ldm3d.volumes import write

# --- Config -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    num: int = 16  # volumes to make
    steps: int = 30  # intervals of the sampling grid; network calls are printed
    sampler: Literal["auto", "ddpm", "ddim", "dpmpp", "euler", "heun", "ab2"] = "auto"  # auto = heun or dpmpp
    eta: float = 0.0  # share of fresh noise of ddim
    seed: int = 0  # sample i depends on (seed, i) alone
    batch_size: int = 4  # volumes made at once, on each rank
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    compile: bool = False  # torch.compile the denoiser: pays on a GPU, where many volumes are made
    out: str | None = None  # new folder for the results; none = samples-001 (-002, ...) in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = nii.gz for 3-D, tif for 2-D
    plan: float | None = None  # GiB of a GPU: only tell how much memory sampling needs, and what would fit
    reconstruct: str | None = None  # folder to send through the autoencoder and back instead

    def __post_init__(self) -> None:
        for name in ("num", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")


def suffix_of(config: Config, state: DataState) -> str:
    return config.format if config.format != "auto" else {2: "tif", 3: "nii.gz"}[state.dims]


def table(rows: dict[str, dict[str, float]]) -> str:
    """Aligned text, one row an entry."""
    names = list(next(iter(rows.values())))
    width = max(len(r) for r in rows)
    lines = [" " * width + "".join(f"{n:>14}" for n in names)]
    lines += [f"{r:<{width}}" + "".join(f"{v[n]:>14.4g}" for n in names) for r, v in rows.items()]
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """What is not a number, such as the diversity of one volume, becomes null: JSON has no word for it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        path.write_text(json.dumps(plain(content), indent=1) + "\n")
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


# --- new volumes --------------------------------------------------------------------------------------------

SHOWN = 16  # volumes on the sheet and in the scores: as many as the real ones that they are compared with


def generate(config: Config, run: Path, device: torch.device) -> None:
    model = LatentDiffusion.load(run, device)
    if config.compile:
        model.denoiser.compile()
    sampler = model.default_sampler if config.sampler == "auto" else config.sampler
    model.kernel.check_sampler(sampler, config.eta)
    calls = model.kernel.num_network_calls(sampler, config.steps)
    folder = new_folder(run, config.out, "samples")
    size = "x".join(map(str, model.state.size))
    print0(f"{config.num} volumes of {size}, {sampler}, {config.steps} steps = {calls} network calls each")

    indices = list(range(config.num))[rank() :: world_size()]
    suffix = suffix_of(config, model.state)
    start, shown, done = time.perf_counter(), {}, 0
    stream = model.stream(
        indices, config.steps, sampler, config.seed, config.batch_size, config.eta, config.amp
    )
    batches = -(-len(indices) // config.batch_size)
    for x, _ in progress(stream, "sampling", batches):
        for i, volume in zip(indices[done:], x, strict=False):
            write(folder / f"sample_{i:04d}.{suffix}", model.state.to_volume(volume))
            if i < SHOWN:
                shown[i] = volume
        done += len(x)
    barrier()
    seconds = time.perf_counter() - start
    samples = {i: v for part in gather(shown) for i, v in part.items()}
    if is_main():
        report(config, run, model, folder, samples, sampler, calls, seconds)
    barrier()


def report(
    config: Config,
    run: Path,
    model: LatentDiffusion,
    folder: Path,
    samples: dict[int, Tensor],
    sampler: str,
    calls: int,
    seconds: float,
) -> None:
    """Preview sheet and scores of the first volumes, and the JSON that tells how all were made."""
    x = torch.stack([samples[i] for i in sorted(samples)])
    scores = {"generated": set_statistics(x), "real (validation)": model.state.reference}
    picture = save_sheet(
        folder / "preview.png",
        {
            f"samples {i} to {min(i + 3, len(x) - 1)}": list(x[i : i + 4, 0].numpy())
            for i in range(0, len(x), 4)
        },
        limits=(-1, 1),
    )
    content = load_run(run, "ldm")
    how = {
        **to_dict(config),
        "run": str(run),
        "step": content["step"],
        "sampler": sampler,
        "network_calls": calls,
        "seconds": round(seconds, 2),
        "seconds_per_volume": round(seconds / max(1, config.num), 3),
        "size": list(model.state.size),
        "spacing": list(model.state.spacing),
        "scores": scores,
    }
    write_json(folder / "samples.json", how)
    print(table(scores))
    print(f"{config.num} volumes in {seconds:.1f} s: {folder}" + (f", {picture}" if picture else ""))


def plan(config: Config, run: Path) -> None:
    """--plan: what denoising and decoding need, in memory, and the largest batch and cube that would fit."""
    model = LatentDiffusion.load(run)
    both = weight_bytes(model.denoiser) + weight_bytes(model.autoencoder)

    def denoise(net: torch.nn.Module, batch: int, size: tuple[int, ...]) -> None:
        z = torch.zeros(batch, model.latent_shape[0], *size)
        slope, half = z + 0, z + 0  # what a sampler keeps between two calls
        net(z, torch.zeros(batch)).to(z.dtype) + slope + half

    def make_denoiser() -> torch.nn.Module:
        return type(model.denoiser)(model.denoiser.unet.config)

    def make_autoencoder() -> torch.nn.Module:
        return type(model.autoencoder)(model.autoencoder.config)

    plan = Plan(config.plan, config.amp, config.device)
    steps = max(model.denoiser.unet.config.downsampling), max(model.autoencoder.downsampling)
    latent = model.latent_shape[1:]
    plan.inference("denoising, latents", make_denoiser, denoise, config.batch_size, latent, steps[0], both)
    plan.inference("decoding", make_autoencoder, decode, 1, model.state.size, steps[1], both)
    plan.tell()


# --- there and back -----------------------------------------------------------------------------------------


def reconstruct(config: Config, run: Path, device: torch.device) -> None:
    """Every volume, whole, through encoder (mean) and decoder; written with its own geometry and units."""
    autoencoder, content = load_autoencoder(
        run / "autoencoder.pt" if (run / "autoencoder.pt").exists() else run
    )
    autoencoder.to(device)
    dataset = open_folder(config.reconstruct, content)
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
        write(folder / f"{name}.{suffix_of(config, dataset.state)}", dataset.restore(i, recon[0].cpu()))
        if len(sheet["original"]) < 4:
            sheet["original"].append(x[0, 0].cpu().numpy())
            sheet["reconstruction"].append(recon[0, 0].cpu().numpy())
    rows = {k: v for part in gather(rows) for k, v in part.items()}
    if is_main():
        save_sheet(folder / "preview.png", sheet, limits=(-1, 1))
        mean = {k: sum(r[k] for r in rows.values()) / len(rows) for k in ("psnr", "ssim")}
        how = {**to_dict(config), "run": str(run), "step": content["step"], "mean": mean, "cases": rows}
        write_json(folder / "reconstructions.json", how)
        print(table({f"mean of {len(rows)}": mean}))
        print(f"{len(rows)} volumes: {folder}")
    barrier()


# --- main ---------------------------------------------------------------------------------------------------


def read_flags(argv: list[str] | None) -> tuple[Path, Config]:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "run", nargs="?", help="run folder of train_ldm.py (or train_vae.py), or a checkpoint in one"
    )
    add_options(parser, Config, Config())
    args: dict[str, Any] = vars(parser.parse(argv))
    run = args.pop("run")
    if run is None:
        raise InputError("which run? give the run folder, such as runs/ldm-phantom")
    return Path(run), replace(Config(), args)


def main(argv: list[str] | None = None) -> None:
    run, config = read_flags(argv)
    if config.plan is not None:
        return plan(config, run)
    device = setup(config.device)
    if config.reconstruct:
        reconstruct(config, run, device)
    else:
        generate(config, run, device)


if __name__ == "__main__":
    sys.exit(run_script(main))
