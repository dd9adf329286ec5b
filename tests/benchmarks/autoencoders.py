"""Which autoencoder reconstructs best: KL or VQ, with or without a discriminator, in the same steps.

    python tests/benchmarks/autoencoders.py hippocampus                              # 3-D
    python tests/benchmarks/autoencoders.py tiff_pairs                               # 2-D
    python tests/benchmarks/autoencoders.py hippocampus --rows KL VQ --steps 300     # a try

Each row is a run of train_vae.py (some 10 CPU minutes), scored on the held-out subjects by `python -m
ldm3d.evaluation reconstruct`. Sharpness is that of the reconstruction over the original's: mean differences
of neighbouring voxels, 1 is as sharp as the data. The data are looked for in $LDM3D_DATA, else data/, as by
the scripts. Stopped and started again, this one goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ldm3d.engine.logger import read_log  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402

DISCRIMINATOR = ["--disc_weight", "0.1", "--feature_weight", "1"]
ROWS = {
    "KL": [],
    "KL + discriminator": DISCRIMINATOR,
    "VQ": ["--autoencoder", "vq"],
    "VQ + discriminator": ["--autoencoder", "vq", *DISCRIMINATOR],
}
# Slices of two patients: trained on one, validated on the other
SLICES = """hippocampus --data.name tiff_pairs --data.dims 2 --data.image flair/*.tif --data.subject (p\\d+)_
 --data.val_fraction 0.5 --data.size none --data.patch 128,128 --data.augment.flip_axes 1 --batch_size 4
 --vae.latent_channels 4"""
DATA = {"hippocampus": ["hippocampus"], "tiff_pairs": SLICES.split()}


def train(name: str, flags: list[str], args: argparse.Namespace) -> Path:
    """The run's folder, trained to its end."""
    run = Path(args.out) / f"{args.data}-{name.replace(' + ', '-').lower()}"
    lengths = ["--run.steps", args.steps, "--run.eval_every", args.steps // 2, "--run.save_every", 200]
    start = ["--disc_start", args.steps // 2, "--disc_ramp", args.steps // 8]
    command = [*DATA[args.data], "--run.dir", run, *lengths, *start, *flags]
    subprocess.run([sys.executable, ROOT / "train_vae.py", *map(str, command)], check=True, cwd=ROOT)
    return run


def score(run: Path) -> dict[str, dict[str, float]]:
    """Metric -> its mean over held-out cases, and their interval; the newest checkpoint's EMA weights."""
    for report in run.glob("evaluation-*/report.json"):
        return json.loads(report.read_text())["metrics"]
    newest = max(run.glob("checkpoint_*.pt"))
    command = ["-m", "ldm3d.evaluation", "reconstruct", newest]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    return score(run)


def seconds_per_step(run: Path) -> float:
    """The median of the log's, over the last half: with the discriminator, where there is one."""
    batch_size = json.loads((run / "config.json").read_text())["batch_size"]
    speeds = [line["samples_per_s"] for line in read_log(run / "log.jsonl") if line["split"] == "train"]
    return batch_size / median(speeds[len(speeds) // 2 :])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of every row")
    parser.add_argument("--out", default="runs/autoencoders", help="folder of the runs")
    args = parser.parse_args(argv)
    lines = [("autoencoder", "PSNR dB", "SSIM", "MS-SSIM", "sharpness", "s / step")]
    for name in args.rows:
        run = train(name, ROWS[name], args)
        m = {metric: values["mean"] for metric, values in score(run).items()}
        digits = {"psnr": 2, "ssim": 4, "ms_ssim": 4, "sharpness": 2}
        cells = [f"{m[metric]:.{n}f}" for metric, n in digits.items()]
        lines.append((name, *cells, f"{seconds_per_step(run):.2f}"))
    print(f"\n{args.data}, {args.steps} steps\n")
    print(table(lines, markdown=True))


if __name__ == "__main__":
    main()
