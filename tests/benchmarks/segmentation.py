"""Segmentation by cDAL beside a plain U-Net and the published method: the table in README.md, in this folder.

    python tests/benchmarks/segmentation.py hippocampus --minutes 30 --amp bf16 --rows plain default published
    python tests/benchmarks/segmentation.py hippocampus --minutes 6 --rows ablation
    python tests/benchmarks/segmentation.py monuseg --minutes 10 --amp bf16 --rows plain "plain, flips"
    python tests/benchmarks/segmentation.py hippocampus --minutes 5 --rows plain default "plain and default"

Every row is a run of train_cdal.py of the same preset with some flags changed, trained for the same CPU
minutes: a step is timed first, the number of steps follows. best.pt, chosen on validation subjects, then
segments the test subjects. All rows have the split of the first one; rows that differ in votes alone share a
run. "plain" is the same network without diffusion. "A and B" is the ensemble of two rows, and "A, flips"
takes the mean over mirrored images. The column "more than" is the difference to the first row, case by case,
with p of the sign-flip test. A run that is there is gone on with, or scored only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from budgets import measured_in_cpu_seconds, once, seconds_of_step

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import train_cdal  # noqa: E402
from ldm3d.config import replace, show  # noqa: E402
from ldm3d.data.cases import resolve_root  # noqa: E402
from ldm3d.evaluation.differences import DifferenceConfig, read_scores, summary_of  # noqa: E402
from ldm3d.evaluation.results import table, with_interval  # noqa: E402
from ldm3d.inference.segmentation import SegmentConfig, segment_files  # noqa: E402
from ldm3d.pipeline import SegmentationPipeline  # noqa: E402

PLAIN = {"cdal.diffusion": False}
DEEP = PLAIN | {"generator.deep_supervision": True}
Z = {"generator.latent_dim": 64}  # the ablation's own rows have it: each changes one thing of "z"
ROWS: dict[str, tuple[dict, int]] = {  # flags beside the preset's, votes
    "plain": (PLAIN, 1),
    "default": ({}, 5),
    "deep": (DEEP, 1),
    "deep, seed 1": (DEEP | {"run.seed": 1}, 1),
    "published": (train_cdal.PUBLISHED, 5),
    "votes 1": ({}, 1),
    "votes 30": ({}, 30),
    "T = 1": ({"cdal.kernel.num_timesteps": 1}, 5),
    "z": (Z, 5),
    "z, T = 1": (Z | {"cdal.kernel.num_timesteps": 1}, 5),
    "z, T = 4": (Z | {"cdal.kernel.num_timesteps": 4}, 5),
    "z, T = 8": (Z | {"cdal.kernel.num_timesteps": 8}, 5),
    "z, noised truth": (Z | {"cdal.own_estimate": False}, 5),
    "z, adversarial term": (Z | {"cdal.adversarial_weight": 0.05}, 5),
    "z, noised truth, attention on it": (Z | {"cdal.own_estimate": False, "cdal.attention": "input"}, 5),
    "z, attention on the loss": (Z | {"cdal.attention": "loss"}, 5),
}
FOLDERS = {"hippocampus": ("imagesTr", "labelsTr"), "monuseg": ("images", "masks")}
ABLATION = [name for name in ROWS if name not in ("published", "deep", "deep, seed 1")]


def flags_of(preset: str, settings: dict, folder: Path, steps: int, every: int) -> list[str]:
    """The command line of a run."""
    flags = {**settings, "run.dir": str(folder), "run.steps": steps, "run.eval_every": every}
    flags |= {"run.save_every": every, "run.log_every": max(1, steps // 50)}
    return [preset, *(word for key, value in flags.items() for word in (f"--{key}", show(value)))]


def steps_for(minutes: float, preset: str, settings: dict, folder: Path) -> int:
    """How many steps the CPU minutes hold, by the time of one step."""

    def measure() -> float:
        with measured_in_cpu_seconds():
            return seconds_of_step(train_cdal, flags_of(preset, settings, folder, 1, 1))

    return max(20, int(60 * minutes / once(folder.with_name(f"{folder.name}-seconds.json"), measure)))


def train(minutes: float, preset: str, settings: dict, folder: Path, split: Path) -> None:
    """Train the run of a row. split: that of the first run, which another seed takes over."""
    stored = folder / "config.json"
    if "run.seed" in settings:
        settings = settings | {"data.split": split, "data.test_fraction": 0}
    if stored.exists():
        steps = json.loads(stored.read_text())["run"]["steps"]
    else:
        steps = steps_for(minutes, preset, settings, folder)
    train_cdal.main(flags_of(preset, settings, folder, steps, max(1, steps // 4)))


def run_of(name: str, args: argparse.Namespace) -> Path:
    """The folder of the run of a row; rows of the same flags share one."""
    same = next(other for other, (flags, _) in ROWS.items() if flags == ROWS[name][0])
    words = [args.preset, f"{args.minutes:g}min", args.amp, *re.findall(r"\w+", same)]
    return args.runs / "-".join(words)


def parts_of(row: str) -> tuple[list[str], bool]:
    """(The rows that a row is the ensemble of, whether images are mirrored): of "A and B, flips"."""
    return row.removesuffix(", flips").split(" and "), row.endswith(", flips")


def test(row: str, args: argparse.Namespace) -> tuple[Path, int, dict]:
    """The test subjects segmented: (folder of the scores, votes, report)."""
    names, flips = parts_of(row)
    (run, *others), votes = [run_of(name, args) for name in names], max(ROWS[name][1] for name in names)
    words = ["test", "votes", str(votes), *(other.name for other in others), *(["flips"] if flips else [])]
    out = run / "-".join(words)
    if not (out / "report.json").exists():
        root = resolve_root(SegmentationPipeline(run).layout, args.preset)
        images, masks = FOLDERS[args.preset]
        config = SegmentConfig(
            reference=str(root / masks),
            part="test",
            votes=votes,
            batch_size=votes,
            flips=flips,
            ensemble=tuple(map(str, others)),
            out=str(out),
        )
        segment_files(config, run, root / images)
    return out, votes, json.loads((out / "report.json").read_text())


def more_than(first: Path, out: Path) -> str:
    """The difference of the Dice to that of the first row."""
    if first == out:
        return "-"
    (rows, subjects), (others, _) = (read_scores(str(folder), "") for folder in (first, out))
    d = summary_of(rows, others, subjects, DifferenceConfig())["dice"]
    return f"{with_interval(d['difference'], d['low'], d['high'], 4)}, p {d['p']:.2g}"


def row_of(name: str, run: Path, votes: int, report: dict, more: str) -> list[str]:
    metrics, config = report["metrics"], json.loads((run / "config.json").read_text())
    labels = sorted(int(key[5:]) for key in metrics if key.startswith("dice_"))

    def mean(key: str, digits: int = 3) -> str:
        value = metrics[key]["mean"]
        return "-" if value is None else f"{value:.{digits}f}"

    dice = metrics["dice"]
    diffusion = config["cdal"]["diffusion"]
    return [
        name,
        with_interval(dice["mean"], dice["low"], dice["high"]),
        more,
        " / ".join(mean(f"dice_{k}") for k in labels),
        " / ".join(mean(f"hd95_{k}", 2) for k in labels),
        mean("seconds", 2),
        str(config["cdal"]["kernel"]["num_timesteps"]) if diffusion else "-",
        str(votes) if diffusion else "-",
        mean("error_correlation", 2),
        f"{mean('retention_ratio', 2)} ({mean('retention_border', 2)})",
        str(config["run"]["steps"]),
    ]


HEAD = [
    *("row", "mean Dice (95 %)", "more than the first", "Dice per label", "HD95, mm", "s per case"),
    *("T", "votes", "corr", "retention (border)", "steps"),
]


def cost(run: Path, rounds: int = 3) -> str:
    """Seconds of T = 4 with 5 votes over those of one forward of the same network, on one training patch."""
    pipeline = SegmentationPipeline(run)
    cdal, net, size = pipeline.method, pipeline.net, pipeline.layout.patch
    method = train_cdal.CDAL(
        replace(cdal.config, {"diffusion": True, "kernel.num_timesteps": 4}), cdal.num_labels
    )
    image = torch.zeros(pipeline.spec.channels, *size)
    x, t, z = torch.zeros(1, cdal.num_labels, *size), torch.zeros(1), torch.zeros(1, net.config.latent_dim)
    best = {"one": 1e9, "all": 1e9}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, work in (
                ("one", lambda: net(x, t, image[None], z)),
                ("all", lambda: method.segment(net, image, votes=5, batch_size=5)),
            ):
                start = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - start)
    return (
        f"T = 4 with 5 votes costs {best['all'] / best['one']:.1f} forwards of {best['one']:.3f} s ({size})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=list(FOLDERS))
    parser.add_argument("--minutes", type=float, default=10, help="of training, for every row")
    parser.add_argument("--rows", nargs="+", default=["plain", "default", "published"], help="or: ablation")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder of the runs")
    parser.add_argument("--amp", choices=("fp32", "bf16"), default="fp32", help="precision of the training")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = ABLATION if args.rows == ["ablation"] else args.rows
    unknown = sorted({name for row in chosen for name in parts_of(row)[0]} - ROWS.keys())
    if unknown:
        parser.error(f"--rows: no row {unknown[0]!r}; known are {', '.join(ROWS)}")
    first = parts_of(chosen[0])[0][0]
    if "run.seed" in ROWS[first][0]:
        parser.error(
            f"--rows: {first!r} takes over the split of the first row; name {first.partition(',')[0]!r} first"
        )
    lines, first, split = [], None, run_of(first, args) / "split.json"
    for row in chosen:
        names = parts_of(row)[0]
        for name in names:
            train(args.minutes, args.preset, ROWS[name][0] | {"run.amp": args.amp}, run_of(name, args), split)
        run, (out, votes, report) = run_of(names[0], args), test(row, args)
        first = first or out
        lines.append(row_of(row, run, votes, report, more_than(first, out)))
        print(f"\n{table([HEAD, *lines], markdown=True)}\n", flush=True)
    print(cost(run))


if __name__ == "__main__":
    main()
