"""Memory and time of segmenting one large volume in windows, with a network of eight channels.

    python tests/benchmarks/large_segmentation.py                        # 512^3, five labels
    python tests/benchmarks/large_segmentation.py --size 256 --flags=--probabilities

A run of train_cdal.py of one step on synthetic heads segments a noise volume by `sample.py`. Prints CPU
seconds, of all and of each window, beside those of the bare network on a window; and the peak of the process
(VmHWM), libraries included. Pages of files that were read or written through a memory map count in this peak,
too (--probabilities), though the system takes them back at will.

The network has four levels: the middle of a U-Net always attends, to 8^3 positions here. On one level the
middle of a window of 128^3 has 64^3, and all time goes there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.large.windows import window_starts  # noqa: E402
from ldm3d.pipeline import SegmentationPipeline  # noqa: E402

TINY = """phantom --run.steps 1 --run.eval_every 1 --data.patch 16,16,16 --data.val_fraction 0.5
 --unet.channels 8,8,8,8 --unet.attention_levels false --unet.head_channels 8 --generator.encoder_channels 8
 --generator.encoder_blocks 0 --generator.stem 2 --cdal.diffusion false --window 16,16,16""".split()
OVERLAP = 0.25


def write_volume(path: Path, size: int) -> Path:
    """A cube of noise in int16."""
    array = np.random.default_rng(0).integers(0, 1000, (size,) * 3, dtype=np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([4.8, 4.8, 4.8, 1.0])), path)
    return path


def measure(folder: Path, size: int, window: int, flags: list[str]) -> dict[str, float]:
    """CPU seconds and GiB (VmHWM) of segmenting size^3 voxels in this process."""
    write_phantoms(folder / "heads", 2, size=(20, 24, 20), spacing=(9.6, 9.6, 9.6))
    place = ["--data.root", str(folder / "heads"), "--run.dir", str(folder / "run")]
    subprocess.run(
        [sys.executable, str(ROOT / "train_cdal.py"), *TINY, *place], check=True, capture_output=True
    )
    image = write_volume(folder / "cube.nii", size)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    start = time.process_time()
    words = f"--window {window},{window},{window} --overlap {OVERLAP} --votes 1 --batch_size 1".split()
    sample.main([str(folder / "run"), str(image), *words, *flags])
    seconds = time.process_time() - start
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    windows = len(window_starts(size, window, OVERLAP)) ** 3
    each, bare = seconds / windows, bare_seconds(folder / "run", window)
    figures = {"seconds": seconds, "gib": peak, "each_window": each, "bare_network": bare}
    return {"size": size, "window": window, "windows": windows} | {k: round(v, 2) for k, v in figures.items()}


def bare_seconds(run: Path, window: int, num: int = 3) -> float:
    """CPU seconds of the network alone on one window: the mean of `num`, after a first one."""
    pipeline = SegmentationPipeline(run)
    method, taken = pipeline.method, []
    x = torch.rand(1, 1, window, window, window)
    noise, z = method.draw_votes(pipeline.net, 1, x.shape[2:], 0, "")
    for _ in range(1 + num):
        start = time.process_time()
        with torch.inference_mode():
            method.vote(pipeline.net, pipeline.net.encode(x), noise, z)
        taken.append(time.process_time() - start)
    return sum(taken[1:]) / num


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="side of the cube")
    parser.add_argument("--window", type=int, default=128, help="side of the windows")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--flags", default="", help="further settings of sample.py")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), args.size, args.window, args.flags.split())))


if __name__ == "__main__":
    main()
