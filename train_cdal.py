#!/usr/bin/env python3
"""Train a segmentation network by diffusion in a handful of steps (cDAL).

CPU or one GPU    python train_cdal.py hippocampus
one node          torchrun --nproc_per_node 4 train_cdal.py hippocampus --batch_size 4
several nodes     torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                      train_cdal.py hippocampus --batch_size 8
your own data     python train_cdal.py FOLDER
as published      python train_cdal.py published
plain U-Net       python train_cdal.py hippocampus --cdal.diffusion false
several raters    python train_cdal.py cells

The generator learns to give the label map y (one-hot) of an image from a noisy label map: the true one,
or the generator's own estimate, with the noise of a random step t. The loss is

    G    = generator(noisy label map, t, image, z)
    loss = mse_weight |G - y|^2 + ce_weight CE(G, y) + dice_weight Dice(G, y) + adversarial_weight g_loss

as in ldm3d/cdal.py. A discriminator, where the settings have one, has an optimizer of its own, which steps
after the generator's. Training needs label maps (--data.mask, or a column mask); validation segments whole
cases.

To resume a run, give the same command again. To segment other images: `python sample.py --help`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm3d.cdal import CDAL, CDALConfig, Generator, GeneratorConfig
from ldm3d.config import InputError, at_least, parse
from ldm3d.data import Data, DataConfig, DataSpec, VolumeDataset, batches, open_data
from ldm3d.data.fingerprint import describe, take
from ldm3d.data.opening import check_numbering
from ldm3d.data.phantoms import phantom_folder
from ldm3d.data.settings import check_crop
from ldm3d.discriminators import TimeDiscriminator, TimeDiscriminatorConfig
from ldm3d.engine.distributed import is_main, print0, rank, run_script, setup, world_size, wrap
from ldm3d.engine.logger import save_sheet
from ldm3d.engine.machine import cores_of_rank
from ldm3d.engine.memory_plan import MemoryTable, weight_bytes
from ldm3d.engine.runs import Run, settings_of_init, with_settings_of_init
from ldm3d.engine.training import (
    EMA,
    Mean,
    OptimConfig,
    RunConfig,
    Stepper,
    autocast,
    check_schedule,
    frozen,
    keyed_normal,
    keyed_uniform,
    micro_batches,
    reseed,
    samples_per_forward,
)
from ldm3d.evaluation.raters import squared_ged
from ldm3d.inference.segmentation import overlay
from ldm3d.large.windows import check_window
from ldm3d.metrics import dice
from ldm3d.plan import (
    CDAL_PASSES,
    Plan,
    Planner,
    check_base,
    machine,
    note_attention,
    plan_cdal,
    plan_length,
    seconds_per_step,
)
from ldm3d.unet import UNetConfig

# --- Config and presets -------------------------------------------------------------------------------------

UNET = UNetConfig(
    channels=(16, 32, 64),
    num_res_blocks=(1,),
    attention_levels=(False,),
    head_channels=16,
    num_groups=8,
    adaptive_norm=True,
)


@dataclass(frozen=True)
class Config:
    preset: str = ""  # the first argument of the command
    batch_size: int = 2  # samples per optimizer step, over all ranks
    micro_batch_size: int | None = None  # samples per rank and forward pass; none = batch_size / ranks
    votes: int = 1  # votes for every validation case
    window: tuple[int, ...] | None = None  # voxels of validation's windows; none = whole cases that fit
    hours: float | None = None  # to train, where settings are planned; none = 1, on a GPU 12
    plan: bool = False  # only print the plan, and the memory that it needs
    memory: float | None = None  # GiB of the device to plan for; none = what is free
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = UNET
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    cdal: CDALConfig = field(default_factory=CDALConfig)
    disc: TimeDiscriminatorConfig = field(default_factory=TimeDiscriminatorConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(adam_betas=(0.9, 0.99)))
    disc_optim: OptimConfig = field(default_factory=lambda: OptimConfig(adam_betas=(0.5, 0.9)))

    def __post_init__(self) -> None:
        at_least(self, 1, "votes")

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Older versions stored the GiB of a device, or none, as `plan`."""
        return values | ({"plan": values["plan"] is True} if "plan" in values else {})


HIPPOCAMPUS: dict[str, Any] = {
    "run.steps": 5000,
    "run.eval_every": 1000,
    "run.save_every": 500,
    "run.log_every": 50,
    "run.ema_decay": 0.995,
    "data.name": "hippocampus",
    "data.subject": "subjects.csv",
    "data.test_fraction": 0.2,
    "data.patch": (32, 48, 32),
    "data.augment.affine": 0.5,
    "data.augment.max_rotation": 15.0,
    "data.augment.intensity": 0.5,
    "generator.stem": (2,),
    "generator.encoder_channels": 32,
    "generator.encoder_blocks": 1,
    "unet.channels": (48, 96),
    "optim.lr": 2e-3,
    "optim.warmup_steps": 50,
    "optim.schedule": "cosine",
}

PUBLISHED: dict[str, Any] = {
    "cdal.kernel.num_timesteps": 4,
    "cdal.own_estimate": False,
    "cdal.noisiest": None,
    "cdal.mse_weight": 1.0,
    "cdal.ce_weight": 0.0,
    "cdal.dice_weight": 0.0,
    "cdal.attention": "input",
    "cdal.attention_normalised": False,
    "cdal.attention_layer": 1,
    "cdal.disc_sees_image": False,
    "cdal.r1_weight": 0.05,  # times r1_every, 10, is the released gamma / 2, which is not multiplied by it
    "generator.output": "tanh",
    "generator.latent_dim": 50,
    "data.scaling": "minmax",
    "data.foreground": 0.5,
    "data.augment.affine": 0.0,
    "data.augment.intensity": 0.0,
    "optim.lr": 1.6e-4,
    "optim.adam_betas": (0.5, 0.9),
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.grad_clip": None,
    "disc_optim.lr": 1.25e-4,
    "disc_optim.grad_clip": None,
    "run.ema_decay": 0.999,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Built-in synthetic heads, 40x48x40 at 4.8 mm, five labels: the whole job in minutes on 2 CPU cores.
    "phantom": {
        "run.steps": 600,
        "run.eval_every": 300,
        "run.save_every": 300,
        "run.log_every": 50,
        "run.ema_decay": 0.99,
        "data.patch": (32, 32, 32),
        "data.foreground": 0.5,
        "generator.stem": (2,),
        "generator.encoder_channels": 32,
        "generator.encoder_blocks": 1,
        "unet.channels": (32, 64),
        "optim.lr": 2e-3,
        "optim.warmup_steps": 30,
        "optim.schedule": "cosine",
    },
    # Medical Segmentation Decathlon Task04 at 1 mm: an hour on 2 CPU cores. A fifth of the subjects is held
    # out for a test, a tenth for validation. A patch holds nearly all of a case: none is without foreground.
    "hippocampus": HIPPOCAMPUS,
    # The published method in its settings, on the same data. Ours are the blocks, the widths (the published
    # discriminator has four times the channels, in 2-D), the patch and the number of steps.
    "published": HIPPOCAMPUS | PUBLISHED,
    # MoNuSeg, 512x512 histology in colour: nuclei, 10 to 40 % of every image, against the rest.
    "monuseg": {
        "batch_size": 4,
        "run.steps": 2000,
        "run.eval_every": 500,
        "run.save_every": 500,
        "run.log_every": 50,
        "run.ema_decay": 0.995,
        "data.dims": 2,
        "data.image": "images/*.tif",
        "data.mask": "masks/*.tif",
        "data.val_fraction": 0.15,
        "data.test_fraction": 0.25,
        "data.patch": (128, 128),
        "data.scaling": "minmax",
        "data.augment.flip_axes": (0, 1),
        "data.augment.rot90_axes": (0, 1),
        "data.augment.affine": 0.5,
        "data.augment.max_rotation": 22.0,
        "data.augment.max_scale": 0.25,
        "data.augment.intensity": 0.5,
        "data.augment.colour": 0.5,
        "data.augment.max_gain": 0.2,
        "data.augment.max_bias": 0.2,
        "unet.channels": (32, 64, 96, 128),
        "generator.encoder_channels": 32,
        "window": (256, 256),
        "optim.lr": 1e-3,
        "optim.warmup_steps": 50,
        "optim.schedule": "cosine",
    },
    # Single cells in 128x128 phase-contrast images, each outlined by ten raters. Every vote is to be what one
    # rater could have drawn: many steps, the true mask noised, and a mask so small beside the noise that
    # outlines stay open until late.
    "cells": {
        "batch_size": 2,
        "votes": 8,
        "run.steps": 8000,
        "run.eval_every": 2000,
        "run.save_every": 1000,
        "run.log_every": 100,
        "run.ema_decay": 0.995,
        "data.dims": 2,
        "data.image": "images/*.tif",
        "data.mask": "raters/{id}__{rater}.tif",
        "data.val_fraction": 0.1,
        "data.test_fraction": 0.3,
        "data.augment.flip_axes": (0, 1),
        "data.augment.rot90_axes": (0, 1),
        "data.augment.affine": 0.5,
        "data.augment.max_rotation": 45.0,
        "data.augment.max_scale": 0.15,
        "data.augment.intensity": 0.5,
        "cdal.kernel.num_timesteps": 16,
        "cdal.kernel.input_scale": 0.2,
        "cdal.own_estimate": False,
        "cdal.dice_weight": 0.0,
        "generator.stem": (2,),
        "generator.encoder_channels": 32,
        "unet.channels": (32, 64, 96, 128),
        "optim.lr": 1e-3,
        "optim.warmup_steps": 50,
        "optim.schedule": "cosine",
    },
}

SHOWN = ("loss", "dice", "ce", "mse", "d_loss", "g_loss")  # on the console

COMMON: dict[str, str] = {  # the settings of --help; --help all shows every setting
    "your files": "data.root data.image data.mask data.label_values data.table data.dims data.subject"
    " data.val_fraction",
    "how they are seen": "data.spacing data.patch data.foreground data.scaling data.window"
    " data.augment.flip_axes data.augment.affine data.augment.intensity",
    "the network": "unet.channels generator.stem generator.encoder_channels cdal.diffusion votes window",
    "the run": "run.dir run.steps batch_size micro_batch_size optim.lr run.device run.amp run.workers"
    " run.eval_every run.init run.fresh hours plan memory",
}


def with_data(config: Config) -> Config:
    """The defaults that follow from the data: the dimensions of the networks."""
    unet = dataclasses.replace(UNET, dims=config.data.dims)
    return Config(unet=unet, disc=TimeDiscriminatorConfig(dims=config.data.dims))


# what a run takes over from run.init, where no flag says else: its network, and the times that it knows
NETWORK = "unet.", "generator.", "cdal.kernel.", "cdal.diffusion"
FREE = "unet.dropout", "unet.checkpointing"


def with_init(config: Config, flags: dict[str, Any]) -> Config:
    """The configuration with the generator of run.init."""
    theirs = settings_of_init("cdal", config, NETWORK, FREE)
    return with_settings_of_init(config, {k: v for k, v in theirs.items() if k not in flags})


def open_labelled(
    config: Config, split: dict[str, list[str]] | None = None, dataset: Dataset | None = None
) -> Data:
    """The checked data of a run, each case with a label map. The preset "phantom" first writes its own."""
    for name, group in (("unet", config.unet), ("disc", config.disc)):
        if group.dims != config.data.dims:
            raise InputError(f"{name}.dims: {group.dims}, but data.dims is {config.data.dims}")
    expected = with_data(config)
    for name in ("unet.in_channels", "unet.out_channels", "disc.in_channels"):
        group, key = name.split(".")
        if getattr(getattr(config, group), key) != getattr(getattr(expected, group), key):
            raise InputError(f"{name}: follows from the data, it cannot be set")
    check_window(config.window, config.data.dims)
    if config.preset == "phantom" and config.data.root is None and dataset is None:
        phantom_folder()
    multiple = config.unet.downsampling
    data = open_data(config.data, config.preset, config.run.seed, split, multiple, items=dataset)
    without = next((case.id for case in data.cases.values() if case.mask is None), None)
    if without is not None:
        raise InputError(f"case {without}: has no label map; name them with --data.mask, or in the table")
    if data.spec.num_labels < 2:
        raise InputError("data.mask: the label maps hold no label but the background")
    check_numbering(data)
    return data


def make_discriminator(config: Config, channels: int, num_labels: int) -> TimeDiscriminator:
    """The discriminator of pairs of label maps (and of images of `channels`, where it sees them)."""
    in_channels = 2 * num_labels + (channels if config.cdal.disc_sees_image else 0)
    discriminator = TimeDiscriminator(dataclasses.replace(config.disc, in_channels=in_channels))
    num_blocks = len(discriminator.blocks)
    if not -num_blocks <= config.cdal.attention_layer < num_blocks:
        raise InputError(f"cdal.attention_layer: expected one of the discriminator's {num_blocks} blocks")
    return discriminator


# --- evaluation ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    cdal: CDAL,
    net: Generator,
    cases: Iterable[dict[str, Any]],
    config: Config,
    device: torch.device,
    path: Path,
    display: tuple[float, float] = (-1.0, 1.0),
) -> tuple[dict[str, float], Path | None]:
    """Dice over whole validation cases (the mean, and for each label), those of all ranks, and a picture of
    up to four cases. Of several raters: the mean Dice with the raters, and `ged`, the distance of the votes
    to the raters. cases: this rank's. display: the intensities that are black and white."""
    means, sheet = Mean(), {"truth": [], "prediction": []}
    for case in cases:
        with autocast(config.run.amp, device):
            image, votes = case["image"].to(device), config.votes
            window = config.window or cdal.window_in_memory(net, image, votes, config.data.patch)
            how = {"key": case["id"], "batch_size": votes}  # a window at a time
            p = cdal.segment(net, image, votes, window, separate="raters" in case, **how)
        p = p.unflatten(0, (-1, cdal.num_labels))  # (votes or their mean, K, *S)
        label_map, raters = p.mean(0).argmax(0), case.get("raters", case["mask"][None])
        scores = dice(label_map.expand_as(raters), raters, cdal.num_labels).nanmean(0)
        means.add(dice=scores.nanmean(), **{f"dice_{k}": score for k, score in enumerate(scores, start=1)})
        if "raters" in case:
            means.add(ged=torch.tensor(squared_ged(p.argmax(1), raters)))
        if is_main() and len(sheet["truth"]) < 4:
            sheet["truth"] += overlay(case["image"], case["mask"], display)
            sheet["prediction"] += overlay(case["image"], label_map, display)
    picture = save_sheet(path, sheet) if is_main() and sheet["truth"] else None
    return means.pop(), picture


def validate(run: Run, cdal: CDAL, net: Generator, dataset: VolumeDataset, device: torch.device) -> None:
    """Scores of `net`, the EMA, for the log, a picture, and best.pt if they are the best so far: the Dice, or
    with several raters the distance of the votes to the raters."""
    with run.validation("a smaller --window"):
        cases = (dataset[i, i] for i in range(rank(), len(dataset), world_size()))
        cases = run.interruptible(cases, -(-len(dataset) // world_size()))
        display = dataset.spec.display
        scores, picture = evaluate(cdal, net, cases, run.config, device, run.preview_path, display)
        run.logger.picture(run.step, "segmentations", picture)
    best = "ged" if "ged" in scores else "dice"
    run.keep_best(best, scores[best], highest=best == "dice")
    run.log("val", scores)


# --- train --------------------------------------------------------------------------------------------------


SMALLER = "a smaller --data.patch takes less"  # of attention


def whole_case_bytes(spec: DataSpec, window: tuple[int, ...], num_means: int, gpu: bool) -> int:
    """What validation in windows keeps of a whole case: the image, and on a CPU its mask, its probabilities
    (`num_means` of each label), and their sums over as many planes as a window has."""
    voxels, num = math.prod(spec.size), num_means * spec.num_labels
    sums = (num + 1) * voxels * window[0] // spec.size[0]
    return 4 * (spec.channels * voxels + (0 if gpu else (2 + num) * voxels + sums))


class Undrawn(CDAL):
    """The method with votes that are not drawn, for counting memory: a small network has room for 100,000
    votes, and drawing them one by one would take minutes."""

    def draw_votes(
        self, net: Generator, votes: int, size: Sequence[int], seed: int, key: str
    ) -> tuple[Tensor, Tensor]:
        return self.room_for_votes(net, votes, size)


def memory_table(config: Config, own_estimate: bool = False) -> MemoryTable:
    """The memory that training and inference need, and how long a step takes. own_estimate: the generator's
    own estimates take time, but they are computed without gradients and need less memory than the rest."""
    data = open_labelled(config)
    spec, rated = data.spec, any(case.raters for case in data.cases.values())
    num_means = config.votes if rated else 1
    own_estimate = own_estimate and config.cdal.own_estimate
    cdal = Undrawn(dataclasses.replace(config.cdal, own_estimate=own_estimate), spec.num_labels)
    micro = samples_per_forward(config.batch_size, config.micro_batch_size)
    patch = config.data.patch or spec.size

    def make() -> Generator:
        return Generator(config.generator, config.unet, spec.channels, spec.num_labels)

    def loss(net: Generator, batch: int, size: tuple[int, ...]) -> Tensor:
        discriminator = None
        if config.cdal.has_discriminator:
            discriminator = make_discriminator(config, spec.channels, spec.num_labels)

        def draw(purpose: str, *shape: int) -> Tensor:
            return torch.zeros(batch, *shape)

        image, mask = torch.zeros(batch, spec.channels, *size), torch.zeros(batch, *size).long()
        terms, pair = cdal.losses(net, net, discriminator, image, mask, torch.zeros(batch), draw)
        value = terms["loss"]
        if discriminator is not None:
            value = value + cdal.discriminator_losses(discriminator, image, pair, 1)["loss"]
        return value.mean()

    def infer(net: Generator, batch: int, size: tuple[int, ...]) -> None:
        image, mask = torch.zeros(spec.channels, *size), torch.zeros(*size).long()  # of a case
        cdal.segment(net, image, batch, batch_size=batch, separate=rated)
        del mask

    table = MemoryTable(config.memory, config.run.amp, config.run.device)
    step, rounds = max(config.unet.downsampling), -(-config.batch_size // micro)
    table.training("training", make, loss, micro, patch, step, rounds)
    window, net = tuple(map(min, config.window or spec.size, spec.size)), make()
    note_attention(net.attended(patch), table.gpu, SMALLER)
    beside = 3 * weight_bytes(net)
    if window != spec.size:
        beside += whole_case_bytes(spec, window, num_means, table.gpu)
    table.inference("validation, votes", make, infer, config.votes, window, step, beside)
    return table


def seconds_of_validation(config: Config, data: Data, seconds: float) -> float:
    """An estimate: a training step, of `seconds`, computes its patches forward and twice as much backward."""
    calls = config.votes * (config.cdal.kernel.num_timesteps if config.cdal.diffusion else 1)
    patches = math.prod(data.spec.size) / math.prod(config.data.patch or data.spec.size)
    return seconds / (3 * config.batch_size) * len(data.split["val"]) * calls * patches


def make_plan(folder: Path, flags: dict[str, Any], merge: Callable[[dict[str, Any]], Config]) -> Plan:
    """The settings of a run on the images and masks of a folder, by the rules of ldm3d/plan.py."""
    device, found = setup(flags.get("run.device", "auto")), take(folder, flags)
    if found.num_masks < found.num_cases:
        raise InputError(
            f"{folder}: {found.num_masks} masks for {found.num_cases} images, and each needs one; name them "
            "with --data.mask, or in a cases.csv with the columns image and mask"
        )
    print0(f"{folder}: {describe(found)}")
    bare = merge({"data.dims": found.dims})
    base = settings_of_init("cdal", bare, NETWORK, FREE)
    check_base(base, found, bare.run.init)
    able = machine(device.type == "cuda", flags, lambda values: memory_table(merge(values)))
    with contextlib.redirect_stdout(io.StringIO()):  # what is said of the data, training says again
        plan = plan_cdal(found, able, flags, cores_of_rank(), base)
        config = merge(plan.values)
        data, table = open_labelled(config), memory_table(config, own_estimate=True)
    seconds = seconds_per_step(table, config, device, data)
    num_train, validation = len(data.split["train"]), seconds_of_validation(config, data, seconds)
    plan_length(plan, able.hours, seconds, CDAL_PASSES, num_train, ema=0.05, validation=validation)
    return plan


def train(
    config: Config,
    flags: dict[str, Any] | None = None,
    planner: Planner | None = None,
    dataset: Dataset | None = None,
) -> Run:
    """flags: what the command line sets. planner: of a command that names a folder. dataset: in place of
    files, dicts with the tensors "image" and "mask" (ldm3d/data/items.py)."""
    device = setup(config.run.device)
    run = Run("cdal", with_init(config, flags or {}), flags)
    config, seed = run.config, run.config.run.seed
    if run.finished:
        return run
    micro_batch_size = samples_per_forward(config.batch_size, config.micro_batch_size)

    data = open_labelled(config, run.split(dataset is not None), dataset)
    train_set, val_set = data.dataset("train", augment=True), data.dataset("val", own_size=True)
    channels, num_labels = data.spec.channels, data.spec.num_labels
    reseed(seed, 0)
    cdal = CDAL(config.cdal, num_labels)
    net = Generator(config.generator, config.unet, channels, num_labels).to(device)
    discriminator = None
    if config.cdal.has_discriminator:
        discriminator = make_discriminator(config, channels, num_labels).to(device)
    state = {"data": data.spec.to_dict(), **data.state}
    run.check_data(state["data"], data.contents)
    state |= run.resumed["state"] if run.resumed else {}
    run.initialise(net, ("heads.*",))  # a run goes on with deep supervision that began without
    note_attention(net.attended(train_set.size), device.type != "cpu", SMALLER)
    run.start(data.split, device, {"generator": net, "discriminator": discriminator}, data.facts(), SHOWN)
    if planner:
        planner.write(run.dir)
    ema, mean = EMA(net, config.run.ema_decay), Mean()
    stepper = Stepper(net, config.optim, config.run, config.batch_size, device)
    steppers, others = {"generator": stepper}, {}
    if discriminator is not None:
        disc_stepper = Stepper(discriminator, config.disc_optim, config.run, config.batch_size, device)
        steppers["discriminator"], others["discriminator"] = disc_stepper, discriminator
        disc_model = wrap(discriminator, device)
    run.restore(state, net, ema, steppers, mean, **others)
    model = wrap(net, device, config.run.compile)

    stream = batches(
        train_set, config.batch_size, micro_batch_size, seed, run.step, config.run.steps, config.run.workers
    )
    if run.owes_validation:
        validate(run, cdal, ema.net, val_set, device)
    for group in run.steps(stream):
        pairs = []
        for batch, fraction in micro_batches(group, model, device, seed, run.step):
            positions = batch["position"]

            def draw(purpose: str, *shape: int, positions: Tensor = positions) -> Tensor:
                return keyed_normal(seed, positions, shape, purpose).to(device)

            u = keyed_uniform(seed, positions, "t")
            with frozen(discriminator), autocast(config.run.amp, device):
                terms, pair = cdal.losses(model, net, discriminator, batch["image"], batch["mask"], u, draw)
            stepper.backward(terms["loss"].mean() * fraction)
            mean.add(**terms)
            pairs.append({**batch, **pair})
        if stepper.step(run.step):
            ema.update(net, run.step)
        if discriminator is not None:
            amp = "fp32" if cdal.penalised(run.step) else config.run.amp  # a gradient's gradient wants fp32
            for batch, fraction in micro_batches(pairs, disc_model, device, seed, run.step):
                with autocast(amp, device):
                    terms = cdal.discriminator_losses(disc_model, batch["image"], batch, run.step)
                disc_stepper.backward(terms.pop("loss").mean() * fraction)
                mean.add(**terms)
            disc_stepper.step(run.step)

        run.end_step(**stepper.report())
        run.save_if_due()
        if run.due("eval_every"):
            validate(run, cdal, ema.net, val_set, device)
    unseen = data.cases[(data.split.get("test") or data.split["val"])[0]].image
    run.finish(["python", "sample.py", run.dir, unseen])
    return run


def main(argv: list[str] | None = None) -> None:
    planner = Planner("cdal", Config, make_plan)
    config, flags = parse(Config, argv, PRESETS, __doc__, with_data, COMMON, planner)
    config = with_init(config, flags)
    check_crop(flags, config.data)
    check_schedule(flags, "optim", config.optim)
    check_schedule(flags, "disc_optim", config.disc_optim)
    planner.check(flags)
    if config.plan:
        memory_table(config).print()
    else:
        train(config, flags, planner)


if __name__ == "__main__":
    sys.exit(run_script(main, resumes=True))
