"""The memory that --plan says beside the memory that a command takes, for kinds of trainings on a CPU.

    python tests/benchmarks/plan_memory.py
    python tests/benchmarks/plan_memory.py --kinds kl ldm-patches --size 512,512,256

Synthetic CTs of --size, three of them, one for validation. Each command trains for two steps on patches, and
validates once on the whole volume, as a long training does. "measured" is the peak of the process (VmHWM)
above that of the same command on volumes of 32^3: the interpreter, its packages, and what torch sets up once.
Figures are kept in --work: what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from large import write_ct  # noqa: E402
from scanner_sized import planned  # noqa: E402

from ldm3d.evaluation.results import table  # noqa: E402

EACH = "phantom --data.image images/*.nii.gz --data.val_fraction 0.34 --run.device cpu"
STEPS = "--batch_size 1 --run.steps 2 --run.eval_every 2 --run.save_every 2"
VOLUMES = "--data.cache disk --data.scaling window --data.window=-1000,1000"
AUTOENCODER = f"train_vae.py {EACH} {STEPS} {VOLUMES} --vae.channels 32,64,96"
DENOISER = f"train_ldm.py {EACH} {STEPS} --sample_steps 2"
SEGMENTER = f"train_cdal.py {EACH} {STEPS} {VOLUMES} --unet.channels 16,32,64,64"  # the coarsest attends
KINDS = {  # kind -> (command, setting of the patch's size, its voxels)
    "kl": (AUTOENCODER, "data.patch", 96),
    "vq": (f"{AUTOENCODER} --autoencoder vq", "data.patch", 96),
    "ldm-patches": (f"{DENOISER} --patch.share 0 --patch.halvings 0", "patch.size", 16),
    "ldm": (DENOISER, None, 0),
    "cdal": (f"{SEGMENTER} --data.mask masks/*.nii.gz", "data.patch", 96),
}


def peak_of(words: list[str], work: Path, log: str) -> float:
    """Run a script of the library in `work`; the peak of its process, GiB (VmHWM)."""
    env, peak = {**os.environ, "PYTHONPATH": str(ROOT)}, 0
    with open(work / f"{log}.txt", "a") as out:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        process = subprocess.Popen(command, cwd=work, env=env, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            text = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(text.split("VmHWM:")[1].split()[0]) if "VmHWM:" in text else peak
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}, see {work / log}.txt")
    return peak / 2**20


def make_data(root: Path, size: tuple[int, ...]) -> None:
    """Three CTs, and label maps of five labels: intervals of intensity."""
    for seed in range(3):
        path = root / f"images/ct_{seed:02d}.nii.gz"
        if path.exists():
            continue
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        write_ct(path, seed, size)
        image = nib.load(path)
        labels = np.digitize(image.get_fdata(dtype=np.float32), (-700, -200, 300, 700)).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, image.affine), root / "masks" / path.name)


def command(kind: str, work: Path, side: int | None) -> list[str]:
    """The words of a command on the volumes of `work`. side: the longest a patch may be."""
    words, setting, length = KINDS[kind]
    words = [*words.split(), "--data.root", str(work / "data"), "--run.dir", str(work / kind), "--run.fresh"]
    if setting:
        words += [f"--{setting}", ",".join([str(min(length, side or length))] * 3)]
    return [*words, "--vae", str(work / "kl")] if kind.startswith("ldm") else words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--size", default="256,256,128", help="voxels of a volume")
    parser.add_argument("--work", type=Path, default=Path("runs/plan_memory"))
    args = parser.parse_args()
    work = args.work.resolve()
    small, large = work / "small", work / args.size.replace(",", "x")
    make_data(small / "data", (32, 32, 32))
    make_data(large / "data", tuple(map(int, args.size.split(","))))
    file = work / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    rows = [["kind", "the largest job", "--plan GiB", "measured GiB", "plan / measured"]]
    for kind in args.kinds:
        if (key := f"{kind} {args.size}") not in figures:
            floor = peak_of(command(kind, small, 4 if kind == "ldm-patches" else 32), work, kind)
            words = command(kind, large, None)
            needs = planned(words, work)
            peak = peak_of(words, work, kind)
            figures[key] = {"floor": floor, "peak": peak, "needs": needs}
            file.write_text(json.dumps(figures, indent=1) + "\n")
        found, needs = figures[key], figures[key]["needs"]
        name, measured = max(needs, key=needs.get), found["peak"] - found["floor"]
        ratio = needs[name] / measured
        rows.append([kind, name, f"{needs[name]:.2f}", f"{measured:.2f}", f"{ratio:.2f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
