"""Send images through the autoencoder of a run of train_vae.py and back.

a folder          python sample.py runs/vae-hippocampus FOLDER
one image         python sample.py runs/vae-hippocampus IMAGE
of a latent run   python sample.py runs/ldm-hippocampus/autoencoder.pt FOLDER

Every image is encoded whole (to the posterior's mean) and decoded, and written with its own geometry and in
its own units, beside a preview sheet and reconstructions.json with the PSNR and SSIM of each. More figures,
with intervals: python -m ldm3d.evaluation reconstruct RUN
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import at_least, to_dict
from ..data import open_images, write
from ..data.volumes import file_name
from ..engine.distributed import barrier, gather, is_main, rank, setup, world_size
from ..engine.logger import plural, progress, save_sheet, visible
from ..evaluation.results import new_folder, table, write_report
from ..metrics import psnr, ssim
from ..pipeline import AutoencoderPipeline
from .segmentation import check_finite, suffix_of


@dataclass(frozen=True)
class ReconstructConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    memory: float | None = None  # GiB that encoding and decoding may use; none = what is free
    out: str | None = None  # new folder for the results; none = reconstructions-001 ... in the run folder
    format: Literal["auto", "nii.gz", "nii", "tif"] = "auto"  # auto = nii.gz for 3-D, tif for 2-D

    def __post_init__(self) -> None:
        at_least(self, 0, "memory")


def reconstruct_files(config: ReconstructConfig, run: Path, images: Path) -> Path:
    """Reconstruct one image or all images of a folder; returns the new folder."""
    pipeline = AutoencoderPipeline(run, setup(config.device))
    pipeline.net.memory = config.memory
    dataset = open_images(pipeline.content, images)
    folder = new_folder(run, config.out, "reconstructions")
    suffix = suffix_of(config.format, dataset.spec.dims)
    rows, sheet = {}, {"original": [], "reconstruction": []}
    for i in progress(range(rank(), len(dataset), world_size()), "reconstructing"):
        x, name = dataset[i, i]["image"], dataset.cases[i].id
        recon = pipeline.reconstruct(x, config.amp)
        check_finite(recon, name)
        scores = {"psnr": psnr(recon[None], x[None], 2.0), "ssim": ssim(recon[None], x[None], 2.0)}
        rows[name] = {k: float(v) for k, v in scores.items()}
        volume = dataset.spec.as_file(dataset.restore(i, recon), dataset.infos[name])
        write(folder / f"{file_name(name)}{suffix}", volume)
        if len(sheet["original"]) < 4:
            sheet["original"].append(visible(x, dataset.spec.display))
            sheet["reconstruction"].append(visible(recon, dataset.spec.display))
    rows = {k: v for part in gather(rows) for k, v in part.items()}
    if is_main():
        save_sheet(folder / "preview.png", sheet, dataset.spec.display)
        mean = {k: sum(row[k] for row in rows.values()) / len(rows) for k in ("psnr", "ssim")}
        facts = {"run": str(run), "images": str(images), "step": pipeline.content["step"]}
        report = {**to_dict(config), **facts, "mean": mean, "cases": rows}
        write_report(folder / "reconstructions.json", report)
        print(table([["", *mean], [f"mean of {len(rows)}", *mean.values()]]))
        print(f"{plural(len(rows), 'volume')}: {folder}")
    barrier()
    return folder
