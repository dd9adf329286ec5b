"""Training patches from large compressed volumes: how long a step waits, with and without preparing them.

    python tests/benchmarks/large.py --num 24 --root FOLDER                   # 2 GiB of files, 3 GiB prepared
    python tests/benchmarks/large.py --num 4 --size 128,128,64 --root FOLDER  # to try it
    python tests/benchmarks/large.py --root FOLDER --rows latents             # 1 GiB of latents, no CTs

Writes `--num` "CTs" to FOLDER/images, unless they are there: synthetic heads, enlarged to --size voxels of
0.7 x 0.7 x 1.25 mm, with noise of 20 HU, as int16 NIfTI files with slope 1 and intercept -1024, compressed.
Then it opens them as a training does, and takes `--steps` batches of one patch of 96^3 beside a step of
`--step` seconds, which leaves the cores alone, as on a GPU, for each way to keep volumes. `data_wait` is the
share of the time of the steps that is spent waiting, as in the log of a training, after as many steps that do
not count. Each row is a process of its own; memory is the peak of the process, and of its largest worker.

The row "latents" is about the cache of stage two: what it takes to read the mean and logvar of --num latents,
whole and one patch of each, when the system keeps nothing of their files in memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm3d.data import DataConfig, batches, open_data
from ldm3d.data.phantoms import make_phantom
from ldm3d.engine.training import Speed
from ldm3d.large.patches import Box, PatchConfig, draw_box
from ldm3d.latents import LatentDataset, Table

SPACING, SMALLER = (0.7, 0.7, 1.25), 4  # mm; the heads are drawn on a grid that is coarser by SMALLER
LATENT, LATENT_PATCH = (4, 128, 128, 64), 32  # of the row "latents", in latent voxels
GIB = 2**30


def write_ct(path: Path, seed: int, size: tuple[int, ...]) -> None:
    """One CT: -1000 HU is air, the head reaches from about -900 to 1000 HU."""
    coarse = tuple(-(-n // SMALLER) for n in size)
    head = make_phantom(seed, 3, coarse).image
    enlarged = F.interpolate(torch.from_numpy(head)[None], size, mode="trilinear")[0, 0].numpy()
    noise = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    stored = np.rint(enlarged / enlarged.max() * 2000 + 24 + 20 * noise).clip(0, 4095).astype(np.int16)
    image = nib.Nifti1Image(stored, np.diag([*SPACING, 1.0]))
    image.header.set_slope_inter(1, -1024)
    temporary = path.with_name(f".{path.name}")
    image.to_filename(temporary)  # integers as they are: nibabel converts floats alone
    temporary.replace(path)


def peaks() -> tuple[float, float]:
    """The peak memory of this process and of the largest that it has started and waited for, GiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return tuple(resource.getrusage(one).ru_maxrss * 1024 / GIB for one in who)


def row(args: argparse.Namespace, cache: str, workers: int) -> dict[str, float]:
    """Figures of one way to keep volumes."""
    torch.set_num_threads(1)
    config = DataConfig(
        root=str(args.root), image="images/*.nii.gz", patch=(args.patch,) * 3, scaling="window",
        window=(-1000.0, 1000.0), val_fraction=0.0, cache=cache, cache_dir=str(args.root / "cache"),
    )  # fmt: skip
    start = time.perf_counter()
    data = open_data(config, "large", seed=0)
    figures = {"inspection_s": time.perf_counter() - start, "inspection_gib": peaks()[0]}
    start, cpu = time.perf_counter(), time.process_time()
    dataset = data.dataset("train", augment=True)
    figures |= {"prepare_s": time.perf_counter() - start, "prepare_cpu_s": time.process_time() - cpu}
    figures["prepare_gib"] = peaks()[0]
    speed = Speed(1, torch.device("cpu"))
    for step, _ in enumerate(speed.watch(batches(dataset, 1, 1, 0, 0, 2 * args.steps, workers))):
        if step == args.steps:
            speed.pop()
        time.sleep(args.step)
        speed.stop()
    figures["data_wait"] = speed.pop()["data_wait"]
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    figures["gib"], figures["worker_gib"] = peaks()
    cpu = time.process_time()
    for position in range(args.steps):
        dataset[position, position % len(dataset)]
    figures["patch_cpu_s"] = (time.process_time() - cpu) / args.steps
    return {name: round(value, 4) for name, value in figures.items()}


def read_latents(folder: Path, num: int, box: Callable[[int], Box | None] | None) -> dict[str, float]:
    """MiB from the disk, seconds and CPU seconds of a sample, of the part of each latent that `box` says."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: [folder / f"{name}-{i:06d}.npy" for i in range(num)] for name in ("mean", "logvar")}
    for path in itertools.chain(*paths.values()):
        if not path.exists():
            np.save(path, np.random.default_rng(0).standard_normal((1, 1, *LATENT), dtype=np.float32))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tables = {name: Table([np.load(path, mmap_mode="r") for path in own]) for name, own in paths.items()}
    dataset = LatentDataset(tables, 0, box)

    def now() -> np.ndarray:
        read = int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])
        return np.array([read / 2**20, time.perf_counter(), time.process_time()])

    before = now()
    for i in range(num):
        dataset[i, i]
    return dict(zip(("mib", "s", "cpu_s"), ((now() - before) / num).round(4).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--size", default="512,512,256")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step", type=float, default=0.3, help="seconds")
    parser.add_argument("--rows", nargs="*", default=["none,0", "none,1", "disk,0", "disk,1"])
    args = parser.parse_args()
    if args.rows == ["latents"]:
        config = PatchConfig((LATENT_PATCH,) * 3, halvings=0, share=0)
        boxes = {"whole": None, "patch": functools.partial(draw_box, config, LATENT[1:], 0, 1)}
        for name, box in boxes.items():
            print(json.dumps({"row": name, **read_latents(args.root / "latents", args.num, box)}))
        return
    size = tuple(map(int, args.size.split(",")))
    (args.root / "images").mkdir(parents=True, exist_ok=True)
    for seed in range(args.num):
        path = args.root / f"images/ct_{seed:02d}.nii.gz"
        if not path.exists():
            write_ct(path, seed, size)
    for name in args.rows:
        cache, workers = name.split(",")
        if len(args.rows) > 1:  # a process for each: a peak of memory does not go down again
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--rows", name], check=True)
        else:
            print(json.dumps({"row": name, **row(args, cache, int(workers))}), flush=True)


if __name__ == "__main__":
    main()
