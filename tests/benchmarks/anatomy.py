"""Anatomical latent diffusion beside plain latent diffusion: the table in README.md, in this folder.

    python tests/benchmarks/anatomy.py hippocampus --steps 2500 --seeds 0,1
    python tests/benchmarks/anatomy.py hippocampus --minutes 20 --seeds 0,1     as many steps as fit, of each
    python tests/benchmarks/anatomy.py phantom --steps 500 --seeds 0,1
    python tests/benchmarks/anatomy.py phantom-2d --steps 300 --samples 32      a try

Rows, of the same autoencoder, U-Net, cases, steps and noise:

    plain     no registers
    free      the same bank of registers, without masks
    bound     registers and head learn from the masks of the training cases

Columns: the lowest validation loss of the diffusion; validity of samples, by the labels of a segmentation
network that has learned from the real training cases, since "plain" and "free" give none ("own labels": by
those that the samples come with): Wasserstein and Kolmogorov-Smirnov distance of volumes (in standard
deviations of the real ones) and positions (mm, of the centroid in each axis), mean over labels; share of
labels that are one connected component; Frechet distance of that network's deepest features. All against
the real training cases; "real" is how held-out cases compare, with fewer of them. Then the Dice, on test
subjects that no network has seen, of a segmentation network that has learned from generated pairs alone, from
real cases alone, and from both.

Subjects are split once (train, val, test). Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from budgets import once  # noqa: E402

import sample  # noqa: E402
import train_cdal  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d import read  # noqa: E402
from ldm3d.data import Data, open_images, open_stored  # noqa: E402
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.engine.checkpoint import load_run  # noqa: E402
from ldm3d.engine.distributed import choose_device  # noqa: E402
from ldm3d.engine.logger import read_log  # noqa: E402
from ldm3d.evaluation.results import table, with_interval  # noqa: E402
from ldm3d.evaluation.validity import (  # noqa: E402
    PairedFile,
    dice_of_labels,
    label_shapes,
    label_validity,
    train_on_synthetic,
    write_cases,
)
from ldm3d.inference.segmentation import SegmentConfig, segment_files  # noqa: E402
from ldm3d.metrics import frechet_distance  # noqa: E402
from ldm3d.pipeline import SegmentationPipeline  # noqa: E402

TEST = ["--data.test_fraction", "0.2"]
SPLIT = ["--data.subject", "none", "--data.test_fraction", "0"]  # the table tells it
HEADS = ["--unet.head_channels", "24"]  # which divide the widths of both levels
ATTENTION = ["--unet.attention_levels", "true"]
SMALL_VAE = """--data.dims 2 --data.patch none --vae.dims 2 --vae.channels 16,32 --vae.latent_channels 4
 --batch_size 8""".split()
SMALL_LDM = [*HEADS, *"--unet.channels 24,48 --unet.num_groups 8".split()]
SMALL_CDAL = "--data.dims 2 --data.patch 32,32 --unet.channels 16,32 --generator.encoder_channels 16".split()
DATA = {  # flags of train_vae.py, train_ldm.py, train_cdal.py
    "hippocampus": (["hippocampus", *TEST], ["hippocampus-anatomy"], ["hippocampus", *SPLIT]),
    "phantom": (["phantom", *TEST], ["phantom", *ATTENTION, *HEADS], ["phantom", *SPLIT]),
    "phantom-2d": (
        ["phantom", *TEST, *SMALL_VAE],
        ["phantom", *ATTENTION, *SMALL_LDM],
        ["phantom", *SPLIT, *SMALL_CDAL],
    ),
}
ROWS = {"plain": "off", "free": "free", "bound": "bound"}
RARE = ["--anatomy.head_balance", str(train_ldm.RARE["anatomy.head_balance"])]  # for phantoms
Figures = dict[str, float]


# --- training -----------------------------------------------------------------------------------------------


def run_flags(args: argparse.Namespace, steps: int, validations: int = 5) -> list[str]:
    every = max(1, steps // validations)
    numbers = {"steps": steps, "eval_every": every, "save_every": every, "log_every": max(1, steps // 50)}
    return ["--run.amp", args.amp, *(word for k, n in numbers.items() for word in (f"--run.{k}", str(n)))]


def steps_in(args: argparse.Namespace, flags: list[str], folder: Path) -> int:
    """How many steps of train_ldm.py the minutes hold, by the last 10 of 20."""
    length = [*run_flags(args, 20, 1), "--run.log_every", "10"]
    train_ldm.main([*flags, *length, "--run.dir", str(folder)])
    logged = read_log(folder / "log.jsonl")
    rate = next(line["samples_per_s"] for line in logged if line["split"] == "train" and line["step"] == 20)
    batch_size = json.loads((folder / "config.json").read_text())["batch_size"]
    return max(20, int(60 * args.minutes * rate / batch_size))


def train_denoiser(args: argparse.Namespace, row: str, seed: int, out: Path) -> Path:
    run = out / f"ldm-{row}-{seed}"
    flags = [*DATA[args.data][1], "--vae", str(out / "vae"), "--anatomy.registers", ROWS[row]]
    flags += RARE if row == "bound" and args.data != "hippocampus" else []
    steps = args.steps
    if args.minutes:
        speed = out / f"speed-{row}"
        steps = once(speed.with_suffix(".json"), lambda: steps_in(args, flags, speed))
    train_ldm.main([*flags, *run_flags(args, steps), "--run.seed", str(seed), "--run.dir", str(run)])
    return run


def make_samples(run: Path, num: int, labelled: bool) -> Path:
    folder = run / f"samples-{num}"
    if not (folder / "samples.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # half of them, if it was stopped
        more = ["--with-labels"] if labelled else []
        sample.main([str(run), "--num", str(num), "--batch_size", "8", "--out", str(folder), *more])
    return folder


def train_segmenter(
    args: argparse.Namespace, name: str, cases: Iterable[PairedFile], seed: int, out: Path
) -> Path:
    """A plain segmentation network of (image, mask, part) cases."""
    run, folder = out / f"segment-{name}-{seed}", out / f"cases-{name}-{seed}"
    write_cases(folder, cases)
    flags = [*DATA[args.data][2], "--data.root", str(folder), "--data.table", "cases.csv"]
    flags += ["--cdal.diffusion", "false", "--data.num_labels", str(args.num_labels)]
    flags += ["--run.seed", str(seed), "--run.dir", str(run)]
    train_cdal.main([*flags, *run_flags(args, args.segment_steps)])
    return run


def real_cases(data: Data) -> list[PairedFile]:
    chosen = [(data.cases[name], part) for part in ("train", "val") for name in data.split[part]]
    return [(case.image.resolve(), case.mask.resolve(), part) for case, part in chosen]


# --- scores -------------------------------------------------------------------------------------------------


def test_dice(run: Path, data: Data, device: torch.device) -> list[float]:
    """Dice of every label, mean over the test cases."""
    pipeline = SegmentationPipeline(run, device)

    def segment(image: Tensor) -> Tensor:
        return pipeline.segment(image, votes=1).argmax(0)

    return dice_of_labels(segment, data.dataset("test", own_size=True))


@torch.inference_mode()
def features(judge: Path, images: Iterable[Tensor], device: torch.device) -> Tensor:
    """(N, F): the means over space of the deepest map of the judge."""
    pipeline = SegmentationPipeline(judge, device)
    net, num_labels = pipeline.net, pipeline.spec.num_labels
    found: list[Tensor] = []
    net.unet.mid[-1].register_forward_hook(lambda _, __, h: found.append(h.flatten(2).mean(2).cpu()))
    for x in images:
        size = x.shape[1:]
        labels = torch.zeros(1, num_labels, *size, device=device)
        z = torch.zeros(1, net.config.latent_dim, device=device)
        net(labels, torch.zeros(1, device=device), x[None].to(device), z)
    return torch.cat(found).double()


TITLES = {
    "volume_wasserstein": "volume W",
    "volume_ks": "volume KS",
    "position_wasserstein": "position W",
    "position_ks": "position KS",
    "one_component": "one component",
}


def validity(made: np.ndarray, real: np.ndarray) -> Figures:
    return {TITLES[name]: value for name, value in label_validity(made, real).items()}


class Judge:
    """The segmentation network of the real training cases, and what it and masks say of these."""

    def __init__(self, run: Path, data: Data, device: torch.device):
        self.run, self.data, self.device = run, data, device
        self.num_labels, self.spacing = data.spec.num_labels, data.spec.spacing
        self.train = self._real("train")

    def _real(self, *parts: str) -> tuple[np.ndarray, Tensor]:
        sets = [self.data.dataset(part) for part in parts]
        items = [(d, i) for d in sets for i in range(len(d))]
        shapes = label_shapes((d[i, i]["mask"].numpy() for d, i in items), self.spacing, self.num_labels)
        return shapes, features(self.run, (d[i, i]["image"] for d, i in items), self.device)

    def real(self) -> Figures:
        """How held-out real cases compare with the training cases."""
        shapes, seen = self._real("val", "test")
        return {**validity(shapes, self.train[0]), "Frechet": frechet_distance(seen, self.train[1])}

    def samples(self, folder: Path, own: bool) -> Figures:
        """own: by the labels that came with them, not by the judge's."""
        labels = folder / "labels"
        if not own:
            judged = folder / "judged"
            if not (judged / "report.json").exists():
                shutil.rmtree(judged, ignore_errors=True)
                settings = SegmentConfig(votes=1, device=str(self.device), out=str(judged))
                segment_files(settings, self.run, folder)
            labels = judged / "labels"
        masks = (read(path).array[0] for path in sorted(labels.iterdir()))
        figures = validity(label_shapes(masks, self.spacing, self.num_labels), self.train[0])
        if own:
            return figures
        opened = open_images(load_run(self.run, "cdal"), folder)
        images = (opened[i, i]["image"] for i in range(len(opened)))
        return {
            **figures,
            "Frechet": frechet_distance(features(self.run, images, self.device), self.train[1]),
        }


# --- the table ----------------------------------------------------------------------------------------------

COLUMNS = {  # title -> digits
    "val loss": 4,
    "volume W": 3,
    "volume KS": 3,
    "position W": 2,
    "position KS": 3,
    "one component": 3,
    "Frechet": 3,
    "Dice, generated": 3,
    "Dice, real": 3,
    "Dice, both": 3,
}


def show_table(rows: dict[str, list[Figures]]) -> None:
    """Means over seeds, and in brackets the lowest and highest."""
    lines = [("row", *COLUMNS)]
    for name, seeds in rows.items():
        cells = []
        for title, digits in COLUMNS.items():
            values = [figures[title] for figures in seeds if title in figures]
            if len(values) > 1:
                cells.append(with_interval(np.mean(values), min(values), max(values), digits))
            else:
                cells.append(f"{values[0]:.{digits}f}" if values else "-")
        lines.append((name, *cells))
    print(f"\n{table(lines, markdown=True)}\n", flush=True)


def lowest_loss(run: Path) -> float:
    return min(line["loss"] for line in read_log(run / "log.jsonl") if line["split"] == "val")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("--steps", type=int, default=2500, help="of every denoiser")
    parser.add_argument("--minutes", type=float, default=0, help="of every denoiser's training, instead")
    parser.add_argument("--vae_steps", type=int, default=4500)
    parser.add_argument("--segment_steps", type=int, default=1500, help="of every segmentation network")
    parser.add_argument("--samples", type=int, default=200, help="of every denoiser")
    parser.add_argument("--seeds", default="0,1", help="of denoisers and segmentation networks")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--amp", choices=("fp32", "bf16"), default="fp32", help="precision of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/anatomy"), help="folder of everything")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    if args.threads:
        torch.set_num_threads(args.threads)
    out, device = (args.out / args.data).resolve(), choose_device("auto")
    root = []
    if args.data == "phantom-2d":
        root = ["--data.root", str(out / "heads")]
        if not (out / "heads").exists():
            write_phantoms(out / "heads", 160, dims=2, size=(56, 48))
    length = run_flags(args, args.vae_steps)
    train_vae.main([*DATA[args.data][0], *root, *length, "--run.dir", str(out / "vae")])
    data = open_stored(load_run(out / "vae", "vae"))
    args.num_labels = data.spec.num_labels
    rows: dict[str, list[Figures]] = {"real": []}
    seeds = [int(word) for word in args.seeds.split(",")]
    judges = {seed: train_segmenter(args, "real", real_cases(data), seed, out) for seed in seeds}
    judge = Judge(judges[seeds[0]], data, device)
    for seed in seeds:
        scores = once(judges[seed] / "test.json", lambda seed=seed: test_dice(judges[seed], data, device))
        reference = once(out / "real.json", judge.real) if seed == seeds[0] else {}
        rows["real"].append({**reference, "Dice, real": float(np.mean(scores))})
    for name in args.rows.split(","):
        for seed in seeds:
            run = train_denoiser(args, name, seed, out)
            folder = make_samples(run, args.samples, labelled=name == "bound")
            figures = once(folder / "judged.json", lambda folder=folder: judge.samples(folder, own=False))
            figures = {"val loss": lowest_loss(run), **figures}
            if name == "bound":
                own = once(folder / "own.json", lambda folder=folder: judge.samples(folder, own=True))

                def fit(kind: str, cases: list[PairedFile], seed: int = seed) -> float:
                    net = train_segmenter(args, kind, cases, seed, out)
                    return float(np.mean(once(net / "test.json", lambda: test_dice(net, data, device))))

                scores = train_on_synthetic(real_cases(data), folder, fit)
                own |= {f"Dice, {kind}": score for kind, score in scores.items() if kind != "real"}
                rows.setdefault("bound, own labels", []).append(own)
            rows.setdefault(name, []).append(figures)
            show_table(rows)


if __name__ == "__main__":
    main()
