"""Segmentations that differ as raters do: diffusion beside six others, on the same minutes.

    LDM3D_DATA=FOLDER python tests/benchmarks/raters.py --minutes 10

Cells, each outlined by ten raters (FOLDER/cells), split by image. Every arm is a run of train_cdal.py with
the preset `cells` and the same network, trained for the same CPU minutes on one thread: a step is timed
first, the number of steps follows. Each training step sees the mask of one rater. All arms then draw 16 masks
of every test image:

    diffusion      16 votes of the preset
    sampled        a plain network; every voxel drawn by its own probability
    thresholded    the same network; its most likely label everywhere, 16 times
    ensemble       4 plain networks of a quarter of the minutes each, thresholded, 4 times
    dropout        a plain network with dropout 0.3, which stays on; 16 passes, thresholded
    stochastic     a Gaussian of rank 10 over the logits of all voxels at once, 16 draws (stochastic
                   segmentation networks, Monteiro et al. 2020, arXiv 2006.06015)

    level sets     the network of `sampled`; each mask holds the voxels whose probability is above its own
                   threshold, 1/32, 3/32 ... 31/32
    diffusion, level sets    votes of the first nine of the 16 steps, each with a threshold of its own
    shares         no network: every voxel drawn by the share of the raters who take it
    level sets of shares     no network: the voxels whose share is above thresholds
    majority       no network: the majority of the raters, 16 times

The last three know the answer: their scores are what independent voxels, nested masks, and a single mask, can
reach at best.
Two more are made if --arms names them: diffusion whose mask is not scaled, and diffusion in 4 steps.

One table has the scores of ldm3d/evaluation/raters.py with bootstrap intervals over images, and the
difference of each arm's ged to that of the first, paired by image; the other has the three means that ged is
made of. --cdal "--batch_size 4" hands settings to every training, and --part val scores the images that they
are chosen by. What is there is not done again; killed at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from budgets import measured_in_cpu_seconds, once, seconds_of_step, words_of_length  # noqa: E402

import train_cdal  # noqa: E402
from ldm3d import pipeline  # noqa: E402
from ldm3d.cdal import CDAL, Generator, GeneratorConfig, level_sets  # noqa: E402
from ldm3d.config import show  # noqa: E402
from ldm3d.data import VolumeDataset, open_stored  # noqa: E402
from ldm3d.engine.distributed import keyed_generator  # noqa: E402
from ldm3d.engine.logger import save_sheet  # noqa: E402
from ldm3d.evaluation.raters import (  # noqa: E402
    BINS,
    rater_scores,
    shares,
)
from ldm3d.evaluation.results import table, with_interval  # noqa: E402
from ldm3d.evaluation.statistics import bootstrap_interval  # noqa: E402
from ldm3d.metrics import calibration_error, reliability_bins  # noqa: E402
from ldm3d.unet import UNet, UNetConfig  # noqa: E402

VOTES = 16  # masks of an image
LAST = 7  # step t that votes with thresholds of their own end at: later ones only sharpen outlines
RANK, DRAWS = 10, 20  # of the stochastic head: its rank, draws of a training step
PLAIN = {"cdal.diffusion": False, "votes": 1}
TRAININGS: dict[str, tuple[dict[str, Any], float]] = {  # run -> (settings, share of the minutes)
    "diffusion": ({}, 1),
    "plain": (PLAIN, 1),
    **{f"member-{k}": (PLAIN | {"run.seed": k}, 1 / 4) for k in range(1, 5)},
    "dropout": (PLAIN | {"unet.dropout": 0.3}, 1),
    "stochastic": (PLAIN, 1),
    "diffusion-scale-1": ({"cdal.kernel.input_scale": 1.0}, 1),
    "diffusion-4-steps": ({"cdal.kernel.num_timesteps": 4}, 1),
}
ARMS: dict[str, list[str]] = {  # arm -> its runs
    "diffusion": ["diffusion"],
    "sampled": ["plain"],
    "thresholded": ["plain"],
    "ensemble": [f"member-{k}" for k in range(1, 5)],
    "dropout": ["dropout"],
    "stochastic": ["stochastic"],
    "level sets": ["plain"],
    "diffusion, level sets": ["diffusion"],
    "shares": [],
    "level sets of shares": [],
    "majority": [],
    "diffusion, mask not scaled": ["diffusion-scale-1"],
    "diffusion, 4 steps": ["diffusion-4-steps"],
}
PARTS = {"to_raters": "vote to rater", "votes_apart": "two votes", "raters_apart": "two raters"}
SHOWN = {"ged": "GED^2", "matched_iou": "matched IoU", "best_dice": "best Dice", "mean_dice": "mean Dice"}


# --- stochastic segmentation networks -----------------------------------------------------------------------


class StochasticGenerator(Generator):
    """A plain network whose output, (B, K (2 + RANK), *S), holds the mean of the logits, the logarithm of
    their own variances, and RANK factors P. The logits are Gaussian with the covariance P P^T + diagonal."""

    def __init__(self, config: GeneratorConfig, unet: UNetConfig, image_channels: int, num_labels: int):
        super().__init__(config, unet, image_channels, num_labels)
        self.num_labels = num_labels
        own = self.unet.config
        self.unet = UNet(replace(own, out_channels=own.out_channels * (2 + RANK)))

    def to_x_start(self, output: Tensor) -> Tensor:
        return super().to_x_start(output[:, : self.num_labels])

    def logits(self, output: Tensor, of_factors: Tensor, own: Tensor) -> Tensor:
        """N draws (B, N, K, *S), from Gaussian numbers of_factors (B, N, RANK) and own (B, N, K, *S)."""
        mean, log_variance, factors = output.float().split([own.shape[2]] * 2 + [own.shape[2] * RANK], 1)
        moved = torch.einsum("bnr,brv->bnv", of_factors, factors.unflatten(1, (RANK, -1)).flatten(2))
        return mean[:, None] + moved.view_as(own) + (log_variance.exp() + 1e-5).sqrt()[:, None] * own


class StochasticCDAL(CDAL):
    """Trains a `StochasticGenerator`: - log mean over draws of p(mask given the logits), a voxel (eq. 6)."""

    def losses(self, model, net, discriminator, image, mask, u, draw):
        y = self.one_hot(mask)
        output = model(torch.zeros_like(y), torch.zeros(len(y), device=y.device), image, None)
        drawn = draw("factors", DRAWS, RANK), draw("own", DRAWS, *y.shape[1:])
        logits = net.logits(output, *drawn)  # (B, DRAWS, K, *S)
        every = mask[:, None].expand(-1, DRAWS, *mask.shape[1:])
        log_p = -F.cross_entropy(logits.flatten(0, 1), every.flatten(0, 1), reduction="none")
        log_p = log_p.flatten(1).sum(1).view(len(y), DRAWS)
        loss = (math.log(DRAWS) - log_p.logsumexp(1)) / mask[0].numel()
        return {"ce": loss, "loss": loss}, {}


@contextlib.contextmanager
def networks_of(name: str) -> Any:
    """Within the block the scripts build and train the networks of a run."""
    with contextlib.ExitStack() as stack:
        if name == "stochastic":
            stack.enter_context(mock.patch.object(train_cdal, "Generator", StochasticGenerator))
            stack.enter_context(mock.patch.object(train_cdal, "CDAL", StochasticCDAL))
            stack.enter_context(mock.patch.object(pipeline, "Generator", StochasticGenerator))
        yield


# --- trainings ----------------------------------------------------------------------------------------------


def train(name: str, minutes: float, runs: Path, more: list[str]) -> None:
    """Train a run to its end; a run that is there goes on. more: flags of every run."""
    settings, share = TRAININGS[name]
    if "run.seed" in settings:  # which also draws the split: it stays that of the other arms
        split = json.loads((runs / "plain" / "split.json").read_text())
        rows = [("name", "split"), *((case, part) for part, ids in split.items() for case in ids)]
        path = (runs / "split.csv").resolve()
        path.write_text("".join(f"{a},{b}\n" for a, b in rows))
        settings = settings | {"data.split": str(path), "data.test_fraction": 0.0}
    place = {"run.dir": str(runs / name), "run.amp": "bf16", "run.log_every": 20}
    words = ["cells", *(w for k, v in (place | settings).items() for w in (f"--{k}", show(v))), *more]
    with networks_of(name):

        def measure() -> float:
            with measured_in_cpu_seconds():
                return seconds_of_step(train_cdal, words)

        seconds = once(runs / f"{name}.json", measure)
        steps = max(2, round(60 * minutes * share / seconds))
        lengths = words_of_length(train_cdal, "cells", steps)
        train_cdal.main([*words, *lengths, "--run.save_every", "50"])


# --- 16 masks of an image -----------------------------------------------------------------------------------


def sampled(p: Tensor, random: torch.Generator) -> Tensor:
    """VOTES maps (VOTES, *S) whose voxels are drawn each by its own probabilities p (K, *S)."""
    flat = p.flatten(1).T.multinomial(VOTES, replacement=True, generator=random)
    return flat.T.view(VOTES, *p.shape[1:])


def shuffled_level_sets(p: Tensor, random: torch.Generator) -> Tensor:
    """The level sets (VOTES, *S) of probabilities p (K, *S), or one of each of (VOTES, K, *S), in random
    order."""
    order = torch.randperm(VOTES, generator=random)
    if p.ndim == 3:
        return level_sets(p, VOTES)[order]
    return torch.stack([level_sets(own, VOTES)[v] for v, own in zip(order, p, strict=True)])


def first_steps(opened: pipeline.SegmentationPipeline, x: Tensor, key: str) -> Tensor:
    """The probabilities (VOTES, K, *S) of votes that end at step LAST."""
    cdal, net = opened.method, opened.net
    noise, _ = cdal.draw_votes(net, VOTES, x.shape[1:], 0, key)
    features, x_t = net.encode(x[None]).expand(VOTES, -1, -1, -1), noise[:, 0]
    for i, t in enumerate(range(cdal.num_timesteps - 1, LAST - 1, -1)):
        times = torch.full((VOTES,), t)
        x_start = net.to_x_start(net.predict(cdal.unit(x_t, times), times.float(), features, None))
        x_t = cdal.step(x_start, x_t, times, noise[:, i + 1])
    return cdal.probability(x_start)


def draws_of(arm: str, opened: list[pipeline.SegmentationPipeline], item: dict[str, Any]) -> Tensor:
    """The masks (VOTES, *S) that an arm draws of a case."""
    x, key = item["image"], item["id"]
    random = keyed_generator(0, 0, f"{arm} {key}")
    if not opened:
        p = F.one_hot(item["raters"]).movedim(-1, 1).float().mean(0)
        drawn = {"shares": sampled, "level sets of shares": shuffled_level_sets}
        return drawn[arm](p, random) if arm in drawn else p.argmax(0).expand(VOTES, -1, -1)
    first = opened[0]
    if arm == "diffusion, level sets":
        return shuffled_level_sets(first_steps(first, x, key), random)
    if arm.startswith("diffusion"):
        p = first.method.segment(first.net, x, VOTES, key=key, batch_size=VOTES, separate=True)
        return p.unflatten(0, (VOTES, -1)).argmax(1)
    if arm in ("dropout", "stochastic"):
        zeros, t = x.new_zeros(1, first.method.num_labels, *x.shape[1:]), x.new_zeros(1)
        if arm == "dropout":
            first.net.unet.train()
            return torch.cat([first.net(zeros, t, x[None]).argmax(1) for _ in range(VOTES)])
        drawn = (torch.randn(1, VOTES, *size, generator=random) for size in ((RANK,), zeros.shape[1:]))
        return first.net.logits(first.net(zeros, t, x[None]), *drawn)[0].argmax(1)
    p = torch.stack([one.method.segment(one.net, x) for one in opened])  # (networks, K, *S)
    if arm == "sampled":
        return sampled(p[0], random)
    if arm == "level sets":
        return shuffled_level_sets(p[0], random)
    return p.argmax(1).repeat_interleave(VOTES // len(p), 0)


def open_runs(arm: str, runs: Path) -> list[pipeline.SegmentationPipeline]:
    with networks_of(arm):
        return [pipeline.SegmentationPipeline(runs / name) for name in ARMS[arm]]


def cases_of(runs: Path, part: str) -> VolumeDataset:
    """The images of a part of the split that all runs share."""
    run = next(runs / name for name in TRAININGS if (runs / name).is_dir())
    return open_stored(pipeline.SegmentationPipeline(run).content).dataset(part, own_size=True)


@torch.inference_mode()
def test(arm: str, runs: Path, part: str) -> dict[str, Any]:
    """An arm: {"cases": {id: scores}, "bins": of the reliability curve, "steps": of all its runs}."""
    opened = open_runs(arm, runs)
    cases, rows, bins = cases_of(runs, part), {}, 0
    torch.manual_seed(0)  # of dropout
    for i in range(len(cases)):
        item, start = cases[i, i], time.process_time()
        drawn = draws_of(arm, opened, item)
        seconds = time.process_time() - start
        rows[item["id"]] = {"seconds": seconds, **rater_scores(drawn, item["raters"])}
        bins = bins + reliability_bins(*shares(drawn, item["raters"]), BINS)
    return {"cases": rows, "bins": bins.tolist(), "steps": sum(one.content["step"] for one in opened)}


# --- table and picture --------------------------------------------------------------------------------------


def row_of(arm: str, found: dict[str, Any], best: dict[str, Any]) -> list[str]:
    rows, first = found["cases"], best["cases"]
    columns = {name: np.array([row[name] for row in rows.values()]) for name in next(iter(rows.values()))}
    texts = [
        with_interval(columns[name].mean(), *bootstrap_interval(columns[name], 2000, name=name))
        for name in SHOWN
    ]
    apart = columns["ged"] - np.array([first[name]["ged"] for name in rows])
    return [
        arm,
        *texts,
        f"{columns['votes_dice'].mean():.3f} ({columns['raters_dice'].mean():.3f})",
        f"{calibration_error(torch.tensor(found['bins'])):.3f}",
        "-" if found is best else with_interval(apart.mean(), *bootstrap_interval(apart, 2000)),
        f"{columns['seconds'].mean():.2f}",
        str(found["steps"] or "-"),
    ]


def parts_of(arm: str, found: dict[str, Any]) -> list[str]:
    """The row of an arm in the table of the means that ged is made of."""
    rows = found["cases"].values()
    means = [np.mean([row[name] for row in rows]) for name in PARTS]
    worst = max(rows, key=lambda row: row["ged"])["ged"]
    median = np.median([row["ged"] for row in rows])
    return [arm, *(f"{v:.3f}" for v in (*means, median, worst))]


@torch.inference_mode()
def draw(arms: list[str], runs: Path, path: Path, num_cases: int = 3, num: int = 6) -> None:
    """A picture: image and some raters of test cases, then some masks of every arm."""
    opened = {arm: open_runs(arm, runs) for arm in arms}
    cases, sheet = cases_of(runs, "test"), {}
    for i in range(0, len(cases), -(-len(cases) // num_cases)):
        item = cases[i, i]
        name, grey = item["id"], ((item["image"][0] + 1) / 2).numpy()
        sheet[f"{name}: image and raters"] = [grey, *item["raters"][:: 10 // num][:num].float().numpy()]
        for arm in arms:
            drawn = draws_of(arm, opened[arm], item).float()
            sheet[f"{name}: {arm}, mean and masks"] = [drawn.mean(0).numpy(), *drawn[:num].numpy()]
    print(save_sheet(path, sheet, (0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes of training, for every arm")
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:11], choices=list(ARMS))
    parser.add_argument("--cdal", default="", help="more flags of train_cdal.py for every run, in quotes")
    parser.add_argument("--part", choices=("train", "val", "test"), default="test", help="images to score")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/raters-MINUTES")
    parser.add_argument("--picture", type=Path, help="PNG of masks of every arm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = args.runs or Path(f"runs/raters-{args.minutes:g}")
    found = {}
    for arm in args.arms:
        for name in ARMS[arm]:
            train(name, args.minutes, runs, args.cdal.split())
        path = runs / f"{arm}-scores{'' if args.part == 'test' else f'-{args.part}'}.json"
        found[arm] = once(path, lambda arm=arm: test(arm, runs, args.part))
        head = ["", *SHOWN.values(), "Dice of two (raters)", "ECE", f"GED^2 more than {args.arms[0]}"]
        lines = [row_of(name, scores, found[args.arms[0]]) for name, scores in found.items()]
        print(f"\n{table([[*head, 's per image', 'steps'], *lines], markdown=True)}\n", flush=True)
    head = ["1 - IoU of", *PARTS.values(), "GED^2: median", "worst image"]
    print(table([head, *(parts_of(*item) for item in found.items())], markdown=True))
    if args.picture:
        draw(args.arms, runs, args.picture)


if __name__ == "__main__":
    main()
