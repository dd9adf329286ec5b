"""Stage two on whole latents beside stage two on patches of latents, in equal minutes.

    python tests/benchmarks/patch_diffusion.py                               # hippocampus, 15 minutes a run
    python tests/benchmarks/patch_diffusion.py --minutes 40 --seeds 0 1 --num 64
    python tests/benchmarks/patch_diffusion.py --large                       # phantoms of twice the size
    python tests/benchmarks/patch_diffusion.py --minutes 0.1 --vae "--run.steps 50" --num 6    # to try it

All sides have one autoencoder, the preset's, and denoisers of one architecture. A side trains for --minutes:
its measured step tells how many steps these are. The schedule ends with the run. Rows:

    whole           train_ldm.py PRESET
    patches         with --patch.size of half a latent along each axis, and patches of half of that
    patches alone   the same with --patch.share 0: never a whole latent; samples are made in windows

minutes    what all of train_ldm.py took: encoding, training, two validations
loss       the diffusion loss of validation cases on whole latents, of the best checkpoint, with equal noise
frechet    the Frechet distance of --num samples to the cases of --part in the library's own fixed networks,
           of whole volumes and of slices, with intervals from half-samples (nan: too few cases)

Minutes are CPU minutes of this process, on one thread, so other jobs on the machine do not count. What is
finished is kept in --work, and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from budgets import measured_in_cpu_seconds, once, seconds_of_step, words_of_length  # noqa: E402

import sample  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.engine.checkpoint import load_run  # noqa: E402
from ldm3d.engine.distributed import run_script  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.evaluation.sets import SetsConfig, compare_sets  # noqa: E402
from ldm3d.pipeline import load_autoencoder  # noqa: E402

NUM, SIZE, SPACING = 48, (80, 96, 80), (2.4, 2.4, 2.4)  # of --large: twice the preset's, along each axis
FIGURES = ("whole/frechet", "planes/frechet")


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a run's log of one kind."""
    return [line for line in map(json.loads, open(run / "log.jsonl")) if line["split"] == split]


def sides(vae: Path) -> dict[str, list[str]]:
    """The words of train_ldm.py for every row, for latents of this autoencoder's run."""
    autoencoder, content = load_autoencoder(vae)
    latent = autoencoder.latent_shape(content["state"]["data"]["size"])[1:]
    patch = ["--patch.size", ",".join(str(-(-n // 8) * 4) for n in latent)]  # half, in patches of 2 and more
    return {"whole": [], "patches": patch, "patches alone": [*patch, "--patch.share", "0"]}


def train(words: list[str], run: Path, minutes: float, preset: str) -> None:
    """Train a denoiser for so many minutes."""
    with measured_in_cpu_seconds():
        seconds = once(run.with_name(f"{run.name}.seconds.json"), lambda: seconds_of_step(train_ldm, words))
        length = words_of_length(train_ldm, preset, max(10, round(60 * minutes / seconds)), 2)
        train_ldm.main([*words, *length, "--run.workers", "0", "--run.dir", str(run)])


def measure(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a finished run: steps, loss, and how far its samples are from real cases."""
    samples, report = run / "samples", run / "sets"
    if not (samples / "samples.json").exists():  # written last
        shutil.rmtree(samples, ignore_errors=True)
        sample.main([str(run), "--num", str(args.num), "--out", str(samples)])
    config = SetsConfig(part=args.part, resamples=args.resamples, out=str(report))
    found = json.loads((compare_sets(config, str(samples), str(run)) / "report.json").read_text())["figures"]
    figures = {name: [found[name][k] for k in ("value", "low", "high")] for name in FIGURES if name in found}
    best, last = load_run(run, "ldm"), lines(run, "val")[-1]
    known = {"steps": last["step"], "minutes": last["seconds"] / 60, "loss": best["best"]["value"]}
    return known | figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="of stage two, each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num", type=int, default=32, help="samples of each run")
    parser.add_argument("--part", default="val", help="cases that samples are compared with")
    parser.add_argument("--large", action="store_true", help="phantoms of twice the size, not hippocampi")
    parser.add_argument("--vae", default="", help="more flags of train_vae.py, in quotes")
    parser.add_argument("--ldm", default="", help="more flags of train_ldm.py, in quotes")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/patch-diffusion"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    preset = "phantom" if args.large else "hippocampus"
    work = args.work / preset
    data = work / "heads" if args.large else None
    if data and not data.exists():
        write_phantoms(data, NUM, size=SIZE, spacing=SPACING)
    root, vae = ["--data.root", str(data)] if data else [], work / "vae"
    train_vae.main([preset, *root, *args.vae.split(), "--run.workers", "0", "--run.dir", str(vae)])
    rows = []
    for name, words in sides(vae).items():
        for seed in args.seeds:
            run = work / f"{name.replace(' ', '-')}-{args.minutes:g}-{seed}"
            own = [preset, "--vae", str(vae), *words, *args.ldm.split(), "--run.seed", str(seed)]

            def result(run: Path = run, own: list[str] = own) -> dict[str, Any]:
                train(own, run, args.minutes, preset)
                return measure(run, args)

            found = once(run.with_name(f"{run.name}.json"), result)
            ends = [[math.nan if v is None else v for v in found.get(k, 3 * [None])] for k in FIGURES]
            shown = [f"{value:.4g} ({low:.4g} to {high:.4g})" for value, low, high in ends]
            own = [found["steps"], f"{found['minutes']:.1f}", f"{found['loss']:.4f}"]
            rows.append([name, seed, *own, *shown])
    print(table([["", "seed", "steps", "minutes", "loss", *FIGURES], *rows]))


if __name__ == "__main__":
    sys.exit(run_script(main))
