"""From compressed CTs of scanner size to a generated one, in bounded memory, killed once in every stage.

    python tests/benchmarks/large.py --num 24 --root runs/ct --rows       # only writes the CTs, 2 GiB
    python tests/benchmarks/scanner_sized.py --root runs/ct --work runs/scanner_sized

Prepares the volumes, trains an autoencoder on patches of them, encodes them whole, trains a denoiser on
patches of the latents, and makes one volume of full size. Every command is killed (SIGKILL) in the middle of
every stage, and given again. The table says when the commands were killed, how long the last one took, and
the peak of the memory that they owned: the largest sum of RssAnon over the processes of a command, looked at
50 times a second, less what the imports take. Beside it is what --plan had said before. Figures are kept in
--work, with the runs: what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ldm3d.evaluation.results import table  # noqa: E402

GIB = 2**30
NEED = re.compile(r"^(.+?) \d+ x \d+(?:x\d+)+ +([\d.]+) ", re.MULTILINE)


def owned(process: int) -> int:
    """Bytes that a process and its children own (RssAnon): files that they have mapped are not counted."""
    total = 0
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        total += int(fields.get("RssAnon", "0").split()[0]) * 1024
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += owned(int(child))
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        pass
    return total


def watch(
    words: Sequence[str], work: Path, kill: Callable[[], bool] | None = None, log: str = "log"
) -> dict[str, Any]:
    """Run a script of the library in `work` until it ends, or until `kill()` is true and it is killed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, peak = time.perf_counter(), 0
    with open(work / f"{log}.txt", "a") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]],
            cwd=work,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        killed = False
        while process.poll() is None:
            peak = max(peak, owned(process.pid))
            if kill is not None and not killed and kill():
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
            time.sleep(0.02)
    if process.returncode and not killed:
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}, see {work / log}.txt")
    return {"seconds": time.perf_counter() - start, "gib": peak / GIB, "killed": killed}


def planned(words: Sequence[str], work: Path) -> dict[str, float]:
    """What --plan says that each job of a command needs, GiB."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / words[0]), *words[1:], "--plan"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=True)
    return {name.strip(): float(need) for name, need in NEED.findall(done.stdout)}


def files(folder: Path, pattern: str, num: int) -> Callable[[], bool]:
    """True once `folder` has `num` files like `pattern`."""
    return lambda: sum(1 for _ in folder.glob(pattern)) >= num


def after(seconds: float) -> Callable[[], bool]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start > seconds


def commands(args: argparse.Namespace, root: Path, work: Path) -> list[tuple[str, list[str], list]]:
    """(stage, words of the command, when it is killed: once for each entry)."""
    both = ["--memory", args.memory, "--run.device", "cpu", "--hours", "0.1"]
    steps = [["--run.steps", n, "--run.save_every", str(-(-int(n) // 3))] for n in args.steps.split(",")]
    data = ["--data.patch", args.patch, "--data.cache", "disk", "--data.cache_dir", str(work / "cache")]
    latent = ["--patch.size", args.latent_patch, "--patch.share", "0"]
    half = len(list(root.glob("images/*.nii.gz"))) // 2
    return [
        (
            "autoencoder",
            ["train_vae.py", str(root), "--run.dir", "vae", *both, *steps[0], *data],
            [
                lambda: files(work / "cache/volumes", "*.bricks", half),
                lambda: files(work / "vae", "checkpoint_*.pt", 1),
            ],
        ),
        (
            "denoiser",
            ["train_ldm.py", "vae", "--run.dir", "ldm", *both, *steps[1], *latent],
            [lambda: files(work, "**/mean-*.npy", half), lambda: files(work / "ldm", "checkpoint_*.pt", 1)],
        ),
        (
            "sample",
            ["sample.py", "ldm", "--num", "1", "--steps", "10", "--overlap", "0.25", "--memory", args.memory],
            [lambda: after(args.kill_sample)],
        ),
    ]


def check(root: Path, work: Path) -> dict[str, Any]:
    """What the generated volume is: its shape and spacing must be those of the CTs. Draws both."""
    real = nib.load(min(root.glob("images/*.nii.gz")))
    made = nib.load(max(work.glob("ldm/samples-*/sample_*.nii.gz")))
    assert made.shape == real.shape, (made.shape, real.shape)
    assert np.allclose(made.header.get_zooms(), real.header.get_zooms(), rtol=1e-3)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(9, 6))
    for row, (title, image) in zip(axes, (("real", real), ("generated", made)), strict=True):
        for axis, cell in enumerate(row):
            where = [slice(None)] * 3
            where[axis] = image.shape[axis] // 2
            plane = np.asarray(image.dataobj[tuple(where)], dtype=np.float32)
            cell.imshow(plane.T, cmap="gray", vmin=-1000, vmax=1000, origin="lower")
            cell.axis("off")
        row[0].set_title(title, loc="left")
    fig.tight_layout()
    fig.savefig(work / "sample.png", dpi=80)
    voxels = np.asarray(made.dataobj, dtype=np.float32)
    return {"shape": made.shape, "lowest": float(voxels.min()), "highest": float(voxels.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the CTs, images/*.nii.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/scanner_sized"))
    parser.add_argument("--memory", default="12", help="GiB")
    parser.add_argument("--steps", default="300,300", help="of the autoencoder, of the denoiser")
    parser.add_argument("--patch", default="64,64,32", help="voxels of a training patch")
    parser.add_argument("--latent_patch", default="16,16,16", help="latent voxels of a training patch")
    parser.add_argument("--kill_sample", type=float, default=30.0, help="seconds until sampling is killed")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work, root = args.work.resolve(), args.root.resolve()
    file = work / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}

    for stage, words, kills in commands(args, root, work):
        parts = figures.setdefault(stage, [])
        if not parts:
            figures[f"{stage}, planned"] = planned(words, work)
            figures[f"{stage}, imports"] = watch([words[0], "--help"], work)["gib"]
        for kill in [*kills, None][len(parts) :]:
            print("+", *words, "(to be killed)" if kill else "", flush=True)
            parts.append(watch(words, work, kill and kill(), stage))
            file.write_text(json.dumps(figures, indent=1) + "\n")
    figures["generated"] = check(root, work)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    rows = [["stage", "killed after s", "ended after s", "peak GiB", "--plan said"]]
    for stage, *_ in commands(args, root, work):
        *killed, last = figures[stage]
        assert all(part["killed"] for part in killed), f"{stage} ended before it was killed"
        peak = max(part["gib"] for part in figures[stage]) - figures[f"{stage}, imports"]
        said = max(figures[f"{stage}, planned"].values())
        waits = ", ".join(f"{part['seconds']:.0f}" for part in killed)
        rows.append([stage, waits, f"{last['seconds']:.0f}", f"{peak:.2f}", f"{said:.2f}"])
    print(table(rows))
    print(figures["generated"])


if __name__ == "__main__":
    main()
