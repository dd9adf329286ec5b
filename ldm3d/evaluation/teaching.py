"""Do synthetic pairs of image and mask make a segmentation network better than real pairs alone do?

    python -m ldm3d.evaluation teach runs/ldm-tenth --labelled 0.1
    python -m ldm3d.evaluation teach runs/ldm-tenth --labelled 0.1 --ignore 1.25 --hard 1

Masks are costly, images are not. So a generator that knows all images and the masks of a few subjects may
know more than a segmentation network that learns from these few alone. For each fraction of the training
subjects, a plain U-Net of fixed settings learns in several ways, the arms of the study, each with every seed:

    real             real pairs, N steps
    longer           real pairs, 2 N steps: what synthetic pairs have to beat where they cost steps
    augmented        real pairs, strongly augmented: what they have to beat where they cost more than that
    mixed            every second pair is synthetic
    first            synthetic pairs for N / 2 steps, then real pairs
    mixed_augmented  mixed, and strongly augmented
    reconstructed    mixed, but the synthetic pairs are the real ones, their images through the autoencoder:
                     what images as soft as samples do where every label is true
    limit            reconstructed, of all training subjects that have masks: what a generator could teach
                     that obeys perfectly and makes images of all kinds

Every arm is scored by the Dice on the same test cases. The last step counts, so no case chooses a network.
The difference of an arm to `real` and to `augmented` is taken case by case, and its interval is drawn by
subject. Where an interval holds 0, the arms cannot be told apart.

**Where synthetic pairs come from.** A run with the condition `labels` is asked for real masks of the
fraction, each warped at random (rotated, scaled, bent, one structure made larger or smaller). So the label is
true as far as the generator obeys. A run with bound registers makes masks of its own. The table of the pairs
says how far a network that learned from real pairs agrees with their labels (and with the real labels of the
fraction, where only the autoencoder changed the image: the ceiling), and how large the labels are.

**What the field found to help**, each one a setting:

    --hard h     masks are drawn with probability (1 - Dice of the network `real` on their own case)^h
    --ignore a   voxels are left out of the loss where the network `real` has a loss above a times its mean
                 loss on real voxels of this label (Yang et al. 2023, FreeMask, arXiv 2310.15160, section 3.3,
                 with a = 1.25): there the image probably does not show what the mask says
    first        synthetic pairs first, real pairs last

Given again, the command goes on: pairs and the scores of each arm are kept. No fraction may be smaller than
the one that the generator has learned from (data.mask_fraction of its training).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cdal import CDAL, CDALConfig, Generator, GeneratorConfig
from ..config import InputError, at_least, to_dict
from ..data import AugmentConfig, Data, VolumeDataset, open_data
from ..data.opening import check_files
from ..data.transforms import augment
from ..engine.checkpoint import load_file, load_run, save, write_text
from ..engine.distributed import choose_device, keyed_generator, print0
from ..engine.logger import mid_slices, progress, save_sheet, visible
from ..engine.training import EMA, OptimConfig, RunConfig, Stepper, autocast, reseed
from ..metrics import dice
from ..pipeline import LatentDiffusionPipeline
from ..unet import UNetConfig
from ..vae import Autoencoder
from .results import table, with_interval, write_report
from .statistics import bootstrap_interval
from .validity import label_shapes

# --- Config -------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """One way to learn."""

    length: int = 1  # times N steps
    synthetic: Literal["none", "mixed", "first"] = "none"
    augmented: bool = False
    # of synthetic pairs; real, all: pairs of the fraction, or of all subjects, through the autoencoder
    source: Literal["none", "generator", "real", "all"] = "none"


ARMS = {
    "real": Arm(),
    "longer": Arm(length=2),
    "augmented": Arm(augmented=True),
    "mixed": Arm(synthetic="mixed", source="generator"),
    "first": Arm(synthetic="first", source="generator"),
    "mixed_augmented": Arm(synthetic="mixed", source="generator", augmented=True),
    "reconstructed": Arm(synthetic="mixed", source="real"),
    "limit": Arm(synthetic="mixed", source="all"),
}
JUDGE = "real"  # the arm whose first network judges synthetic pairs
MOST_REAL = 50  # real pairs that are sent through the autoencoder


@dataclass(frozen=True)
class TeachConfig:
    labelled: tuple[float, ...] = (0.05, 0.1, 0.25, 1.0)  # fractions of the training subjects with masks
    arms: tuple[str, ...] = tuple(ARMS)  # ways to learn, "real" among them
    seeds: tuple[int, ...] = (0, 1)  # of the segmentation networks, each one learns in every way
    steps: int = 1000  # N, optimizer steps of a segmentation network
    batch_size: int = 4  # pairs a step
    pairs: int = 100  # synthetic pairs of each fraction
    warp: float = 1.0  # how far masks are warped that the generator is asked for; 0 = not at all
    hard: float = 0.0  # masks drawn in proportion to this power of their difficulty; 0 = all alike
    ignore: float | None = None  # leave out synthetic voxels above this multiple of a label's real loss
    guidance: float = 1.0  # how strongly samples follow their mask
    sample_steps: int = 20  # of the sampler
    out: str | None = None  # folder of pairs and scores; none = teach in the run folder
    resamples: int = 2000  # of the bootstrap
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # precision of the networks

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "pairs", "sample_steps", "resamples")
        at_least(self, 0, "warp", "hard", "ignore")
        if not self.labelled or not all(0 < f <= 1 for f in self.labelled):
            raise InputError(f"labelled: expected fractions above 0, up to 1, got {self.labelled}")
        if unknown := set(self.arms) - ARMS.keys():
            raise InputError(f"arms: expected some of {','.join(ARMS)}, got {min(unknown)}")
        if JUDGE not in self.arms or not self.seeds:
            raise InputError(f"arms, seeds: {JUDGE} and one seed are needed, the others are compared with it")
        if self.batch_size < 2 and any(ARMS[name].synthetic == "mixed" for name in self.arms):
            raise InputError("batch_size: mixed needs 2 or more")


# What makes pairs and networks: these settings cannot change in a folder
FIXED = "steps batch_size pairs warp hard ignore guidance sample_steps amp".split()


# --- pairs --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: Tensor  # (C, *S), scaled intensities
    mask: Tensor  # (*S) int64; -1: not learned from


STRONG = AugmentConfig(
    affine=0.9, max_rotation=15, max_scale=0.15, elastic=0.5, intensity=0.9, max_gain=0.2, max_bias=0.2
)


def strongly_augmented(pair: Pair, spacing: Tensor, config: AugmentConfig, draw: torch.Generator) -> Pair:
    images, mask, _ = augment([pair.image], pair.mask, spacing, config, draw)
    return Pair(images[0], mask)


def real_pairs(dataset: VolumeDataset) -> list[Pair]:
    items = (dataset[i, i] for i in progress(range(len(dataset)), "reading"))
    return [Pair(item["image"], item["mask"]) for item in items]


def resized(mask: Tensor, label: int, factor: float) -> Tensor:
    """The mask (*S) with one structure about `factor` times as wide, and what is around it moved aside.

    A point at d from the centre c of the structure is read at c + d (1 + (1 / factor - 1) w). The weight w =
    exp(-|d|^2 / (2 s^2)) is near 1 within the structure and 0 far from it; s is twice its root mean square
    radius. Without the label the mask stays as it is.
    """
    where = (mask == label).nonzero().float()
    if not len(where):
        return mask
    centre = where.mean(0)
    squared = 2 * (2 * (where - centre).square().sum(1).mean().sqrt().clamp(min=1)) ** 2
    d = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in mask.shape), indexing="ij"), -1) - centre
    weight = torch.exp(-d.square().sum(-1, keepdim=True) / squared)
    points = centre + d * (1 + (1 / factor - 1) * weight)
    size = torch.tensor(mask.shape)
    grid = ((2 * points + 1) / size - 1).flip(-1)[None]  # as grid_sample counts, axes backwards
    moved = F.grid_sample(
        mask[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    return moved[0, 0].long()


def warped(mask: Tensor, spacing: Tensor, strength: float, draw: torch.Generator) -> Tensor:
    """The mask (*S) rotated, scaled, shifted and bent, one of its structures made larger or smaller.

    strength 1: up to 10 degrees, 10 %, and 3 % of the size; the structure up to 1.25 times as wide or narrow.
    """
    if strength == 0:
        return mask
    labels = mask.unique()
    labels = labels[labels > 0]
    if len(labels):
        label = labels[torch.randint(len(labels), (), generator=draw)]
        factor = 1.25 ** (strength * (2 * torch.rand((), generator=draw).item() - 1))
        mask = resized(mask, int(label), factor)
    most = {"max_rotation": 10 * strength, "max_scale": 0.1 * strength, "max_shift": 0.03 * strength}
    config = AugmentConfig(affine=1, elastic=1, max_elastic=0.03 * strength, **most)
    return augment([mask[None].float()], mask, spacing, config, draw)[1]


def by_condition(
    pipeline: LatentDiffusionPipeline, masks: Sequence[Tensor], chances: Tensor, config: TeachConfig
) -> list[Pair]:
    """Samples asked for by warped masks. chances (len(masks),): of each mask to be drawn."""
    spacing, found = torch.tensor(pipeline.spec.spacing), []
    for first in progress(range(0, config.pairs, 4), "sampling pairs"):
        asked = []
        for i in range(first, min(first + 4, config.pairs)):
            draw = keyed_generator(0, i, "pair")
            which = torch.multinomial(chances, 1, generator=draw).item()
            asked.append(warped(masks[which], spacing, config.warp, draw))
        images = pipeline.model.sample(
            len(asked),
            steps=config.sample_steps,
            first=first,
            amp=config.amp,
            conditions={"labels": asked},
            guidance_scale=config.guidance,
        )
        found += map(Pair, images, asked)
    return found


def by_registers(pipeline: LatentDiffusionPipeline, config: TeachConfig) -> list[Pair]:
    """Samples with the label maps that the head reads from the registers."""
    found = []
    for first in progress(range(0, config.pairs, 4), "sampling pairs"):
        num = min(4, config.pairs - first)
        how = {"steps": config.sample_steps, "first": first, "amp": config.amp}
        found += map(Pair, *pipeline.model.sample(num, with_labels=True, **how))
    return found


def asks_by_condition(pipeline: LatentDiffusionPipeline) -> bool:
    """Is the run asked for masks, rather than making its own? InputError if it can do neither."""
    if any(c.kind == "labels" for c in pipeline.model.denoiser.conditions):
        return True
    if pipeline.model.denoiser.head is None:
        raise InputError(
            f"{pipeline.run}: makes no pairs: it has neither the condition labels (--condition.use labels) "
            "nor bound registers (--anatomy.registers bound)"
        )
    return False


# --- the segmentation network -------------------------------------------------------------------------------


class Segmenter:
    """The plain U-Net of the study: `net` with averaged weights, `method` its loss and its way to segment."""

    def __init__(self, dims: int, channels: int, num_labels: int, device: torch.device):
        unet = UNetConfig(
            dims, channels=(16, 32, 64), num_res_blocks=(1,), attention_levels=(False,), num_groups=8
        )
        generator = GeneratorConfig(encoder_channels=16, encoder_blocks=1, stem=(dims - 1,))
        self.method = CDAL(CDALConfig(diffusion=False), num_labels)
        self.net, self.device = Generator(generator, unet, channels, num_labels).to(device), device

    def losses(self, pairs: Sequence[Pair]) -> Tensor:
        """Cross-entropy and Dice loss of each pair (B,), without the voxels that are -1."""
        image, mask = (torch.stack(tensors).to(self.device) for tensors in zip(*pairs, strict=True))
        known = (mask >= 0).float()
        weight = known / known.flatten(1).mean(1).clamp(min=1e-6).view(-1, *(1,) * (mask.ndim - 1))
        blank = image.new_zeros(len(image), self.method.num_labels, *mask.shape[1:])
        output = self.net(blank, image.new_zeros(len(image)), image)
        whole = bool((known == 1).all())
        terms = self.method.overlap_terms(
            output, self.net.to_x_start(output), mask.clamp(min=0), None if whole else weight
        )
        return terms["loss"]

    @torch.inference_mode()
    def probability(self, image: Tensor) -> Tensor:
        """image (C, *S) -> (K, *S) on the CPU."""
        return self.method.segment(self.net, image.to(self.device))

    def dice(self, pair: Pair) -> Tensor:
        """Of every label but the background (K - 1,); nan where neither has it."""
        found = self.probability(pair.image).argmax(0)
        return dice(found[None], pair.mask[None], self.method.num_labels)[0]


def batch_of(
    arm: Arm, real: Sequence[Pair], synthetic: Sequence[Pair], step: int, steps: int, num: int, seed: int
) -> list[Pair]:
    """The pairs of a step: real ones and synthetic ones as the arm says, drawn with replacement."""
    draw = keyed_generator(seed, step, "teach")
    shares = {"none": 0.0, "mixed": 0.5, "first": float(step < steps / 2)}
    count = round(shares[arm.synthetic] * num)
    sets = [synthetic] * count + [real] * (num - count)
    return [pairs[torch.randint(len(pairs), (), generator=draw)] for pairs in sets]


def train_segmenter(
    arm: Arm, real: Sequence[Pair], synthetic: Sequence[Pair], seed: int, study: Study, steps: int
) -> Segmenter:
    """A network that has learned for so many steps. study: the settings, the data and the device."""
    config, spec = study.config, study.spec
    reseed(seed, 0)
    net = Segmenter(spec.dims, spec.channels, spec.num_labels, study.device)
    optim = OptimConfig(lr=2e-3, warmup_steps=steps // 20, schedule="cosine")
    run = RunConfig(steps=steps, amp=config.amp)
    ema, stepper = EMA(net.net, 0.99), Stepper(net.net, optim, run, config.batch_size, study.device)
    strong, spacing = replace(STRONG, flip_axes=study.flips), torch.tensor(spec.spacing)
    for step in progress(range(steps), "learning"):
        pairs = batch_of(arm, real, synthetic, step, steps, config.batch_size, seed)
        if arm.augmented:
            draw = keyed_generator(seed, step, "teach augmentation")
            pairs = [strongly_augmented(pair, spacing, strong, draw) for pair in pairs]
        with autocast(config.amp, study.device):
            loss = net.losses(pairs).mean()
        stepper.backward(loss)
        if stepper.step(step):
            ema.update(net.net, step)
    net.net = ema.net
    return net


# --- what a network that learned from real pairs says of others ---------------------------------------------


def voxel_losses(judge: Segmenter, pair: Pair) -> Tensor:
    """-log of the probability of the label of each voxel, (*S)."""
    return -judge.probability(pair.image).clamp(min=1e-6).log().gather(0, pair.mask[None])[0]


def label_losses(judge: Segmenter, pairs: Iterable[Pair]) -> Tensor:
    """The mean loss of the voxels of each label, (K,); infinite for a label that no pair has."""
    total, count = torch.zeros(judge.method.num_labels), torch.zeros(judge.method.num_labels)
    for pair in pairs:
        labels = pair.mask.flatten()
        total.index_add_(0, labels, voxel_losses(judge, pair).flatten())
        count.index_add_(0, labels, torch.ones(labels.shape))
    return torch.where(count > 0, total / count.clamp(min=1), torch.inf)


def without_extremes(judge: Segmenter, pair: Pair, means: Tensor, limit: float) -> Pair:
    """The pair with -1 where the loss is above limit * means[label]."""
    return pair._replace(mask=pair.mask.masked_fill(voxel_losses(judge, pair) > limit * means[pair.mask], -1))


def difficulty(judge: Segmenter, pairs: Iterable[Pair]) -> Tensor:
    """1 - mean Dice of the labels of each pair (N,), at least 0.01, so that every mask can be drawn."""
    return torch.stack([1 - judge.dice(pair).nanmean() for pair in pairs]).nan_to_num(0.01).clamp(min=0.01)


def describe_pairs(
    judge: Segmenter, pairs: Sequence[Pair], real: Sequence[Pair], autoencoder: Autoencoder, spacing: Any
) -> dict[str, list[float]]:
    """By label. agreement: Dice of the judge's labels with the pairs'. ceiling: the same of real pairs whose
    images went through the autoencoder, which no sample can exceed by much. Ratios of mean volumes:
    volume_judged, the judge's to the pairs'; volume_of_real, the pairs' to those of the real pairs."""
    num_labels = judge.method.num_labels
    found = [judge.probability(pair.image).argmax(0) for pair in pairs]
    agreement = [dice(f[None], p.mask[None], num_labels)[0] for f, p in zip(found, pairs, strict=True)]
    ceiling = [judge.dice(Pair(through(autoencoder, pair.image), pair.mask)) for pair in real[:MOST_REAL]]
    masks = ([pair.mask for pair in pairs], [pair.mask for pair in real], found)
    own, theirs, judged = (
        label_shapes((m.numpy() for m in some), spacing, num_labels)[..., 0].mean(0) for some in masks
    )
    return {
        "agreement": torch.stack(agreement).nanmean(0).tolist(),
        "ceiling": torch.stack(ceiling).nanmean(0).tolist(),
        "volume_judged": ratios(judged, own),
        "volume_of_real": ratios(own, theirs),
    }


def ratios(volumes: np.ndarray, others: np.ndarray) -> list[float]:
    """volumes / others, label by label; nan for a label that the others do not have."""
    return np.divide(volumes, others, out=np.full(len(others), np.nan), where=others > 0).tolist()


@torch.inference_mode()
def through(autoencoder: Autoencoder, image: Tensor) -> Tensor:
    """The image (C, *S) after encoder and decoder, on the CPU."""
    x = image[None].to(next(autoencoder.parameters(), image).device)
    return autoencoder.decode(autoencoder.encode(x).mode(), x.shape[2:])[0].float().cpu()


# --- the study ----------------------------------------------------------------------------------------------


class Study:
    """The settings, the generator and its data, and the folder that keeps what is done."""

    def __init__(self, config: TeachConfig, run: Path):
        self.config, self.device = config, choose_device(config.device)
        self.pipeline = LatentDiffusionPipeline(run, self.device)
        self.spec, self.layout = self.pipeline.spec, self.pipeline.layout
        self.asked = asks_by_condition(self.pipeline)
        self.flips = self.layout.augment.flip_axes
        known = self.layout.mask_fraction
        if (least := min(config.labelled)) < known:
            raise InputError(
                f"labelled: {least:g} is less than what {run} has learned from (data.mask_fraction {known:g})"
            )
        check_files(self.pipeline.content)
        self.folder = Path(config.out) if config.out else self.pipeline.folder / "teach"
        self._settle()
        self.data = {fraction: self._open(fraction) for fraction in config.labelled}
        data = self.data[config.labelled[0]]
        self.part = "test" if data.split.get("test") else "val"
        self.test = data.dataset(self.part, own_size=True)
        self.subjects = {case.id: case.subject for case in self.test.cases}

    def _settle(self) -> None:
        """Refuse a folder that holds results of other settings."""
        file = self.folder / "settings.json"
        ours = {name: to_dict(self.config)[name] for name in FIXED} | {"run": str(self.pipeline.run)}
        ours = json.loads(json.dumps(ours | {"step": self.pipeline.content["step"]}))
        theirs = json.loads(file.read_text()) if file.exists() else ours
        if other := [name for name in ours if ours[name] != theirs.get(name)]:
            name = other[0]
            raise InputError(
                f"{name}: {self.folder} was made with {theirs.get(name)}, got {ours[name]}; --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(ours, indent=1) + "\n")

    def _open(self, fraction: float) -> Data:
        """The data with the masks of this fraction. The split is the autoencoder's, which lists all cases."""
        content = self.pipeline.content
        stage_one = load_run(self.pipeline.folder / "autoencoder.pt", "vae")
        own, whole = content["state"]["split"], stage_one["state"]["split"]
        split = whole if set(own["train"]) <= set(whole["train"]) else own
        layout = replace(self.layout, mask_fraction=fraction, subset=None)  # the split says which cases
        data = open_data(layout, stage_one["config"]["preset"], content["config"]["run"]["seed"], split)
        masked = {part: [i for i in ids if data.cases[i].mask] for part, ids in data.split.items()}
        return replace(data, split=masked, spec=self.spec)

    def arms(self) -> list[tuple[str, int]]:
        """(arm, seed), the judge first."""
        names = sorted(self.config.arms, key=lambda name: (name != JUDGE, list(ARMS).index(name)))
        return [(name, seed) for name in names for seed in self.config.seeds]

    def place(self, fraction: float) -> Path:
        return self.folder / f"{fraction:g}"

    def cost(self) -> None:
        """Print what is still to be done, and its CPU minutes. A few steps are measured."""
        todo = [
            (fraction, name)
            for fraction in self.config.labelled
            for name, seed in self.arms()
            if not (self.place(fraction) / f"{name}-{seed}.json").exists()
        ]
        fresh = [f for f in self.config.labelled if not (self.place(f) / "pairs.pt").exists()]
        fresh = fresh if any(ARMS[name].source == "generator" for _, name in todo) else []
        blank = Pair(torch.zeros(self.spec.channels, *self.spec.size), torch.zeros(self.spec.size).long())
        train_segmenter(ARMS[JUDGE], [blank], [], 0, self, 1)  # the first step of a process takes longer
        start = time.process_time()
        train_segmenter(ARMS[JUDGE], [blank], [], 0, self, 3)
        step = (time.process_time() - start) / 3
        start = time.process_time()
        if fresh:
            self.pipeline.model.sample(1, steps=self.config.sample_steps, amp=self.config.amp)
        sample = time.process_time() - start
        steps = sum(ARMS[name].length for _, name in todo) * self.config.steps
        minutes = (steps * step + len(fresh) * self.config.pairs * sample) / 60
        print0(
            f"to do: {len(todo)} networks ({steps} steps), {len(fresh) * self.config.pairs} pairs: about "
            f"{minutes:.1f} CPU minutes, beside testing"
        )

    def judge(self, fraction: float, real: Sequence[Pair]) -> tuple[Segmenter, int]:
        """(The first network that learned from real pairs, trained once; its seed)."""
        file = self.place(fraction) / "judge.pt"
        if not file.exists():
            seed = self.config.seeds[0]
            net = train_segmenter(ARMS[JUDGE], real, [], seed, self, self.config.steps)
            save(file, {"kind": "teach", "seed": seed, "model": net.net.state_dict()})
        net = Segmenter(self.spec.dims, self.spec.channels, self.spec.num_labels, self.device)
        content = load_file(file, "teach")
        net.net.load_state_dict(content["model"])
        net.net.eval().requires_grad_(False)
        return net, content["seed"]

    def pairs(self, fraction: float, real: Sequence[Pair], judge: Segmenter) -> list[Pair]:
        """The synthetic pairs of a fraction, made once, and what there is to say of them in pairs.json."""
        file, config = self.place(fraction) / "pairs.pt", self.config
        if not file.exists():
            chances = torch.ones(len(real))
            if self.asked:
                chances = difficulty(judge, real) ** config.hard if config.hard else chances
                pairs = by_condition(self.pipeline, [pair.mask for pair in real], chances, config)
            else:
                pairs = by_registers(self.pipeline, config)
            autoencoder = self.pipeline.model.autoencoder
            report = describe_pairs(judge, pairs, real, autoencoder, self.spec.spacing)
            if config.ignore is not None:
                means = label_losses(judge, real)
                pairs = [without_extremes(judge, pair, means, config.ignore) for pair in pairs]
            report["ignored"] = float(np.mean([(pair.mask < 0).float().mean().item() for pair in pairs]))
            write_report(self.place(fraction) / "pairs.json", report)
            images, masks = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            save(file, {"kind": "teach", "images": images.half(), "masks": masks.short()})
            self.draw(fraction, real, pairs)
        content = load_file(file, "teach")
        return list(map(Pair, content["images"].float(), content["masks"].long()))

    def others(self, source: str, fraction: float, real: Sequence[Pair], judge: Segmenter) -> list[Pair]:
        """The pairs that an arm (`Arm.source`) has beside the real ones of the fraction."""
        if source == "none":
            return []
        if source == "generator":
            return self.pairs(fraction, real, judge)
        known = real_pairs(self._open(1.0).dataset("train")) if source == "all" else real
        autoencoder = self.pipeline.model.autoencoder
        return [pair._replace(image=through(autoencoder, pair.image)) for pair in known]

    def draw(self, fraction: float, real: Sequence[Pair], pairs: Sequence[Pair]) -> None:
        """pairs.png: a real pair and two synthetic ones in each of three rows, image and mask."""
        black, white = self.spec.display
        rows = {}
        for i in range(min(3, len(pairs) // 2)):
            shown = []
            for pair in (real[i % len(real)], pairs[2 * i], pairs[2 * i + 1]):
                levels = black + (white - black) * pair.mask.clamp(min=0) / (self.spec.num_labels - 1)
                for image in (visible(pair.image, self.spec.display), levels.numpy()):
                    shown += mid_slices(image)[-1:]
            rows[f"{i + 1}: real, synthetic, synthetic; each with its mask"] = shown
        save_sheet(self.place(fraction) / "pairs.png", rows, self.spec.display)

    def score(self, net: Segmenter) -> dict[str, list[float]]:
        """Dice of every label but the background, by test case."""
        items = (self.test[i, i] for i in progress(range(len(self.test)), "testing"))
        return {item["id"]: net.dice(Pair(item["image"], item["mask"])).tolist() for item in items}

    def learn(self, fraction: float) -> dict[str, np.ndarray]:
        """All arms of a fraction: {arm: Dice (seeds, test cases, labels but the background)}; nan for a label
        that a case does not have, where none was found."""
        found: dict[str, list[list[list[float]]]] = {}
        others: dict[str, list[Pair]] = {}  # by source
        place = self.place(fraction)
        place.mkdir(exist_ok=True)
        files = {key: place / f"{key[0]}-{key[1]}.json" for key in self.arms()}
        real = judge = judge_seed = None
        for (name, seed), file in files.items():
            if not file.exists():
                real = real or real_pairs(self.data[fraction].dataset("train"))
                if judge is None:
                    judge, judge_seed = self.judge(fraction, real)
                arm = ARMS[name]
                if arm.source not in others:
                    others[arm.source] = self.others(arm.source, fraction, real, judge)
                if (name, seed) == (JUDGE, judge_seed):
                    net = judge
                else:
                    steps = arm.length * self.config.steps
                    net = train_segmenter(arm, real, others[arm.source], seed, self, steps)
                scores = self.score(net)
                write_report(file, {"dice": scores})
                mean = torch.tensor(list(scores.values())).nanmean(1).nanmean()
                print0(f"{fraction:g} of the masks, {name}, seed {seed}: Dice {mean:.4f}")
            scores = json.loads(file.read_text())["dice"]
            found.setdefault(name, []).append([scores[case.id] for case in self.test.cases])
        return {name: np.array(seeds, dtype=float) for name, seeds in found.items()}


def mean_and_interval(
    values: np.ndarray, subjects: Sequence[str], resamples: int, name: str = ""
) -> list[float]:
    """[mean, low, high] of values (cases,) without those that are nan, by subject. name: of the score."""
    fine = np.isfinite(values)
    if not fine.any():
        return [np.nan] * 3
    values, groups = values[fine], np.asarray(subjects)[fine]
    return [float(values.mean()), *bootstrap_interval(values, resamples, groups, name)]


def compared(scores: dict[str, np.ndarray], subjects: Sequence[str], resamples: int) -> dict[str, dict]:
    """{arm: {"dice", "to_real", "to_augmented": [mean, low, high], "by_label": means}}, intervals of paired
    differences by subject. scores: of `Study.learn`."""
    rows, tensors = {}, {name: torch.from_numpy(values) for name, values in scores.items()}
    means = {name: values.nanmean(2).nanmean(0).numpy() for name, values in tensors.items()}
    for name, values in means.items():
        rows[name] = {"dice": mean_and_interval(values, subjects, resamples, "dice")}
        rows[name]["by_label"] = tensors[name].nanmean((0, 1)).tolist()
        for other in ("real", "augmented"):
            if other in means and other != name:
                difference = values - means[other]
                rows[name][f"to_{other}"] = mean_and_interval(difference, subjects, resamples)
    return rows


def show(report: dict[str, Any]) -> None:
    """The tables of arms and of pairs, in Markdown."""
    lines = [("masks of", "arm", "test Dice", "to real", "to augmented", "test Dice by label")]
    for fraction, arms in report["arms"].items():
        for name, row in arms.items():
            cells = (with_interval(*row[k]) if k in row else "-" for k in ("dice", "to_real", "to_augmented"))
            lines.append((fraction, name, *cells, ", ".join(f"{v:.3f}" for v in row["by_label"])))
    print0(f"\n{table(lines, markdown=True)}\n")
    title = "agreement", "ceiling", "volume seen / asked", "volume / real", "ignored"
    lines = [("masks of", "label", *title)]
    for fraction, pairs in report["pairs"].items():
        columns = (pairs[k] for k in ("agreement", "ceiling", "volume_judged", "volume_of_real"))
        for label, values in enumerate(zip(*columns, strict=True), start=1):
            known = (None if v is None or np.isnan(v) else v for v in (*values, pairs["ignored"]))
            cells = ("-" if v is None else f"{v:.3f}" for v in known)
            lines.append((fraction, label, *cells))
    if len(lines) > 1:
        print0(f"{table(lines, markdown=True)}\n")


def teach(config: TeachConfig, run: str | Path) -> Path:
    """Do what is left of the study and write report.json; returns its folder."""
    study = Study(config, Path(run))
    if study.part == "val":
        print0("note: the run has no test cases (data.test_fraction): its validation cases are the test here")
    study.cost()
    subjects = list(study.subjects.values())
    report: dict[str, Any] = {**to_dict(config), "run": str(run), "part": study.part, "arms": {}, "pairs": {}}
    report |= {"cases": len(subjects), "subjects": len(set(subjects))}
    for fraction in config.labelled:
        scores = study.learn(fraction)
        report["arms"][f"{fraction:g}"] = compared(scores, subjects, config.resamples)
        described = study.place(fraction) / "pairs.json"
        if described.exists():
            report["pairs"][f"{fraction:g}"] = json.loads(described.read_text())
        write_report(study.folder / "report.json", report)
        show(report)
    print0(f"{len(subjects)} {study.part} cases of {len(set(subjects))} subjects: {study.folder}")
    return study.folder
