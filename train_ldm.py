#!/usr/bin/env python3
"""Train a denoiser on the latents of an autoencoder: stage two of latent diffusion.

CPU or one GPU    python train_ldm.py hippocampus
one node          torchrun --nproc_per_node 4 train_ldm.py hippocampus --batch_size 4
several nodes     torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                      train_ldm.py hippocampus --batch_size 8
your own data     python train_ldm.py runs/vae-FOLDER
other data        python train_ldm.py FOLDER --vae runs/vae-mine

with conditions   python train_ldm.py phantom --condition.use class,text --run.dir runs/ldm-phantom-text
with label maps   python train_ldm.py phantom-anatomy
few volumes       python train_ldm.py phantom --run.init RUN --lora.rank 4 --run.dir runs/ldm-lora
few masks         python train_ldm.py phantom --run.init RUN --control labels --run.dir runs/ldm-masks
on pixels         python train_ldm.py phantom --pixel_stem 2 --run.dir runs/ldm-phantom-pixels
on patches        python train_ldm.py hippocampus --patch.size 8,8,8 --run.dir runs/ldm-patches

The denoiser learns to remove noise from latents. A sample's latent z is drawn from the posterior of the
frozen autoencoder and normalised, noise of a random time t is added, and the denoiser predicts the target:

    z    = (mean + exp(logvar / 2) * z_noise - latent_mean) / latent_std
    loss = |denoiser(z_t, t, conditions) - target|^2,      z_t and target as in diffusion_kernel.py
           + w(step) signal_share(t) (head + binding_weight binding)   with --anatomy.registers bound

The second line is explained in ldm3d/registers.py, patches in ldm3d/large/patches.py. Data settings and split
are the autoencoder's; flags override them. To resume a run, give the same command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm3d.conditions import Condition, ConditionConfig, absent, fit_conditions, hide
from ldm3d.config import InputError, flatten, from_dict, parse, replace, show, to_dict
from ldm3d.data import (
    AugmentConfig,
    Data,
    DataConfig,
    DataSpec,
    VolumeDataset,
    batches,
    collate,
    evaluation_batches,
    open_data,
)
from ldm3d.data.cases import resolve_root
from ldm3d.data.fingerprint import READING, Fingerprint, describe, take
from ldm3d.data.opening import check_files, check_numbering
from ldm3d.data.phantoms import phantom_folder
from ldm3d.data.settings import check_crop
from ldm3d.data.slices import find_all_cases
from ldm3d.denoiser import Denoiser
from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig
from ldm3d.engine.checkpoint import load_run, note_unvalidated, same_weights
from ldm3d.engine.distributed import gather, is_main, print0, run_script, setup, world_size, wrap
from ldm3d.engine.logger import save_sheet, visible_slices
from ldm3d.engine.memory_plan import MemoryTable, decode, encode, weight_bytes
from ldm3d.engine.runs import Run, difference, goes_on, settings_of_init, with_settings_of_init
from ldm3d.engine.training import (
    EMA,
    Mean,
    OptimConfig,
    RunConfig,
    Stepper,
    amp_dtype,
    autocast,
    check_schedule,
    keyed_normal,
    keyed_uniform,
    micro_batches,
    reseed,
    samples_per_forward,
    stratified_uniform,
    to_device,
)
from ldm3d.inference.grain import measure_grain
from ldm3d.inference.segmentation import overlay
from ldm3d.large.patches import (
    PatchConfig,
    cut,
    cut_batch,
    draw_box,
    draw_boxes,
    draw_size,
    longest_side,
    position_step,
    voxels_of,
)
from ldm3d.large.streaming import STREAMED
from ldm3d.latent_diffusion import LatentDiffusion
from ldm3d.latents import (
    LatentDataset,
    Successive,
    Table,
    WithConditions,
    cache_key,
    cache_latents,
    encode_batch,
    latent_statistics,
)
from ldm3d.lora import LoRAConfig, add_adapters
from ldm3d.metrics import dice, set_statistics
from ldm3d.pipeline import (
    build_autoencoder,
    copy_autoencoder,
    latent_statistics_of,
    longest_side_of,
)
from ldm3d.plan import (
    LDM_PASSES,
    Latents,
    Plan,
    Planner,
    common_flips,
    machine,
    note_attention,
    other_autoencoder,
    plan_ldm,
    plan_length,
    plan_other_data,
    seconds_per_step,
)
from ldm3d.registers import AnatomyConfig, anatomy_weight
from ldm3d.unet import UNetConfig
from ldm3d.vae import Autoencoder, PixelStem

# --- Config and presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = ""  # the first argument of the command
    vae: str | None = None  # run folder or checkpoint of the autoencoder; none = runs/vae-<preset>
    batch_size: int = 16  # samples per optimizer step, over all ranks
    pixel_stem: Literal[1, 2] | None = None  # no autoencoder: diffusion on pixels (1) or blocks of 2
    micro_batch_size: int | None = None  # samples per rank and forward pass; none = batch_size / ranks
    latent_cache: bool = True  # encode every case once; false: encode and augment at every step
    plain_end: float = 0.0  # share of the steps, the last ones, that see cases without augmentation
    early: float = 0.25  # share of the steps after which early.pt is kept, for autoguidance; 0 = none
    sample_steps: int = 20  # steps of the preview samples
    hours: float | None = None  # to train, where settings are planned; none = 1, on a GPU 12
    plan: bool = False  # only print the plan, and the memory that it needs
    memory: float | None = None  # GiB that validation may use; none = what is free
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    anatomy: AnatomyConfig = field(default_factory=AnatomyConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    control: Literal["off", "labels", "image"] = "off"  # what the frozen denoiser of run.init shall follow
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.sample_steps <= self.kernel.num_timesteps:
            limit = self.kernel.num_timesteps
            raise InputError(f"sample_steps: expected 1 to {limit} (kernel), got {self.sample_steps}")
        for name in ("plain_end", "early"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.control != "off" and self.lora.rank:
            raise InputError("control, lora.rank: give one of the two")
        if self.frozen and not self.run.init:
            name = "lora.rank" if self.lora.rank else "control"
            raise InputError(f"{name}: needs run.init, the run whose denoiser stays frozen")

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Older versions stored the GiB of a device, or none, as `plan`."""
        return values | ({"plan": values["plan"] is True} if "plan" in values else {})

    @property
    def masks(self) -> bool:
        """Does the denoiser learn from masks?"""
        return self.anatomy.registers == "bound"

    @property
    def frozen(self) -> bool:
        """Does the denoiser of run.init stay as it is, beside what is trained?"""
        return self.control != "off" or self.lora.rank > 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/ldm-{self.preset}")


BRATS: dict[str, Any] = {
    "run.steps": 200_000,
    "run.eval_every": 5000,
    "run.save_every": 2000,
    "run.log_every": 100,
    "run.ema_decay": 0.9999,
    "unet.channels": (256, 256, 512),
    "unet.num_res_blocks": (2,),
    "unet.attention_levels": (False, True, True),
    "unet.head_channels": 64,
    "optim.lr": 1e-4,
    "optim.warmup_steps": 1000,
    "optim.schedule": "cosine",
}

SMALL: dict[str, Any] = {  # for minutes on 2 CPU cores
    "batch_size": 8,
    "run.eval_every": 500,
    "run.log_every": 50,
    "run.ema_decay": 0.999,
    "unet.channels": (64, 128),
    "unet.num_res_blocks": (2,),
    "unet.attention_levels": (False, True),
    "optim.lr": 1e-3,
    "optim.warmup_steps": 100,
    "optim.schedule": "cosine",
}

PHANTOM: dict[str, Any] = SMALL | {
    "run.steps": 500,
    "run.eval_every": 250,
    "run.save_every": 250,
    "run.ema_decay": 0.99,
    "unet.channels": (48, 96),
    "unet.num_res_blocks": (1,),
    "optim.warmup_steps": 30,
}

HIPPOCAMPUS: dict[str, Any] = SMALL | {
    "run.steps": 2500,
    "data.num_variants": 8,
    "data.augment.affine": 0.7,
    "data.augment.max_scale": 0.05,
}

ANATOMY: dict[str, Any] = {"anatomy.registers": "bound", "unet.attention_levels": (True,)}
RARE: dict[str, Any] = ANATOMY | {"anatomy.head_balance": 0.5}  # lesions are a few voxels in a thousand

PRESETS: dict[str, dict[str, Any]] = {
    "phantom": PHANTOM,
    # About 25 CPU minutes in bf16, encodings aside. In equal minutes batches of 2 and single blocks reach a
    # lower validation loss than batches of 8 and pairs, and Muon a lower one than AdamW. With one encoding a
    # case the loss rises from 16,000 samples on. Turned cases are interpolated, hence a little blurred, and
    # samples would be so too: the last steps see cases as they are.
    "hippocampus": HIPPOCAMPUS
    | {
        "batch_size": 2,
        "run.steps": 6000,
        "plain_end": 0.3,
        "early": 0.05,
        "run.eval_every": 1500,
        "run.log_every": 100,
        "unet.num_res_blocks": (1,),
        "optim.optimizer": "muon",
        "optim.lr": 3e-3,
    },
    # Registers bound to the labels of the masks (registers.py), on the autoencoders of these presets.
    # Attention at every level (BRATS: but the finest), so that registers are read as finely as latents go.
    "phantom-anatomy": PHANTOM | RARE | {"vae": "runs/vae-phantom", "unet.head_channels": 24},
    "hippocampus-anatomy": HIPPOCAMPUS | ANATOMY | {"vae": "runs/vae-hippocampus"},
    "brats2013-anatomy": SMALL
    | RARE
    | {
        "vae": "runs/vae-brats2013",
        "batch_size": 2,
        "run.steps": 4000,
        "run.eval_every": 1000,
        "data.num_variants": 16,
        "data.augment.flip_axes": (0,),
        "data.augment.affine": 0.7,
        "unet.channels": (64, 96, 128),
        "unet.attention_levels": (False, True, True),
    },
    # Source and target are aligned, so the source enters beside x_t; --condition.use tokens is the other way.
    "tiff-translation": SMALL
    | {
        "batch_size": 4,
        "run.steps": 2500,
        "data.num_variants": 16,
        "data.augment.flip_axes": (1,),
        "data.augment.affine": 0.7,
        "condition.use": ("image",),
        "unet.channels": (32, 64, 128),
        "unet.num_res_blocks": (1,),
        "unet.attention_levels": (False, False, True),
    },
    # Small rotations and shifts; hardly any scaling, since the size of a shape depends on its class.
    "adrenal": SMALL
    | {
        "run.steps": 2000,
        "condition.use": ("class",),
        "unet.num_res_blocks": (1,),
        "data.num_variants": 8,
        "data.augment.flip_axes": (0,),
        "data.augment.affine": 0.7,
        "data.augment.max_scale": 0.05,
    },
    "brats-32g": BRATS | {"batch_size": 4},
    "brats-16g": BRATS | {"batch_size": 4, "micro_batch_size": 1, "unet.checkpointing": True},
}

SHOWN = ("loss", "total", "head", "binding")  # on the console

COMMON: dict[str, str] = {  # the settings of --help; --help all shows every setting
    "your files": "vae pixel_stem data.root data.image data.mask data.source data.table",
    "how they are seen": "latent_cache data.num_variants data.augment.flip_axes data.augment.affine",
    "the denoiser": "unet.channels unet.num_res_blocks unet.attention_levels unet.checkpointing"
    " condition.use condition.dropout anatomy.registers",
    "the diffusion": "kernel.process kernel.prediction sample_steps",
    "the run": "run.dir run.steps batch_size micro_batch_size optim.lr run.device run.amp"
    " run.workers run.eval_every run.init run.fresh hours plan memory",
}


def pixels(config: Config, run: dict[str, Any] | None) -> dict[str, Any]:
    """What stands in for the content of an autoencoder's checkpoint with --pixel_stem. run: that of --vae, if
    it was given, whose data settings and split are then taken; else the data settings are this run's own."""
    content = run or {
        "kind": "vae",
        "config": {"preset": config.preset, "data": to_dict(config.data), "run": to_dict(config.run)},
        "state": {"data": {}, "split": {"train": [], "val": [], "test": []}},
    }
    data = content["config"]["data"]
    channels = run["config"]["vae"]["in_channels"] if run else len(data["channel"]) or 1
    vae = PixelStem.config_of(data["dims"], channels, config.pixel_stem)
    config = {**content["config"], "autoencoder": "pixels", "vae": to_dict(vae)}
    return {**content, "config": config, "ema": {}, "step": 0, "best": None}


def autoencoder_beside(run: str) -> Path:
    """The autoencoder's file in the folder of a run, which `run` or a checkpoint in it names."""
    path = Path(run)
    return (path if path.is_dir() else path.parent) / "autoencoder.pt"


def place_of_autoencoder(config: Config) -> Path:
    """The run folder or checkpoint of the autoencoder that a new run takes."""
    if config.frozen and config.vae is None:
        return autoencoder_beside(config.run.init)
    return Path(config.vae or f"runs/vae-{config.preset}")


def autoencoder_of(config: Config) -> tuple[dict[str, Any], str]:
    """(the content of the autoencoder's checkpoint, where it is from): the run folder's own copy, where the
    run goes on, else that of --vae, or the stem of --pixel_stem."""
    own = config.folder / "autoencoder.pt"
    if own.exists() and goes_on("ldm", config):
        return load_run(own, "vae"), str(own)
    if config.pixel_stem is not None:
        run = load_run(config.vae, "vae") if config.vae else None
        return pixels(config, run), f"a stem of {config.pixel_stem}, which has no weights"
    path = place_of_autoencoder(config)
    if config.vae is None and not config.frozen and not path.exists():
        first = f"python train_vae.py {config.preset}"
        raise InputError(f"{path}: no autoencoder; train it first ({first}), or name another with --vae")
    return load_run(path, "vae"), str(path)


def with_autoencoder(config: Config) -> Config:
    """The defaults that follow from the autoencoder: its data settings without patches and augmentation, and
    the channels of its latent."""
    content, _ = autoencoder_of(config)
    vae = content["config"]["vae"]
    data = from_dict(DataConfig, content["config"]["data"], "data")
    data = dataclasses.replace(data, patch=None, crop="centre", augment=AugmentConfig())
    return replace(
        Config(data=data),
        {
            "unet.dims": vae["dims"],
            "unet.in_channels": vae["latent_channels"],
            "unet.out_channels": vae["latent_channels"],
        },
    )


MOMENTS = "condition.label_moments"
# what a run takes over from run.init, where no flag says otherwise
NETWORK = "unet.", "kernel.", MOMENTS
# the settings that a frozen denoiser brings along, and those of all of them that stay the run's own
BASE = *NETWORK, "condition.", "anatomy.", "patch."
FREE = ("unet.dropout", "unet.checkpointing", "condition.dropout", "anatomy.weights", "anatomy.phases")


def base_of(config: Config, flags: dict[str, Any]) -> dict[str, Any]:
    """The network and the diffusion of run.init as settings. Flags count more, and are refused where they
    would change a denoiser that stays frozen, or the channels of a label map."""
    theirs, init = settings_of_init("ldm", config, (*BASE, "control"), FREE), config.run.init
    if theirs and "labels" not in (*theirs["condition.use"], theirs["control"]):
        del theirs[MOMENTS]  # it has no label map, and that of this run may be of either kind
    base = {k: v for k, v in theirs.items() if k.startswith(BASE if config.frozen else NETWORK)}
    for key, value in base.items():
        if (config.frozen or key == MOMENTS) and flags.get(key, value) != value:
            why = "whose denoiser stays frozen" if config.frozen else "whose weights fit nothing else"
            raise InputError(f"{key}: is {show(value)} in {init}, {why}; got {show(flags[key])}")
    return {key: value for key, value in base.items() if key not in flags}


def with_base(config: Config, flags: dict[str, Any]) -> Config:
    """The configuration with the settings of `base_of`."""
    return with_settings_of_init(config, base_of(config, flags))


def check_base(run: Run, stage_one: dict[str, Any]) -> None:
    """Refuse another autoencoder than that of run.init, where its denoiser stays frozen."""
    if run.initial is None or not run.config.frozen:
        return
    where = autoencoder_beside(run.config.run.init)
    if not same_weights(load_run(where, "vae")["ema"], stage_one["ema"]):
        raise InputError(f"vae: another autoencoder than {where}, on whose latents the frozen denoiser works")


def note_autoencoder(run: Run, stage_one: dict[str, Any], source: str) -> None:
    """Say so if the autoencoder has not been validated, or has other weights now than a resumed run took."""
    note_unvalidated(Path(source), stage_one)
    now = place_of_autoencoder(run.config)
    if not run.resumed or run.config.pixel_stem or not now.exists() or str(now) == source:
        return
    if why := other_autoencoder(run.dir, now):
        print0(
            f"note: {now} is not as at the start of this run ({why}), which goes on with its copy, {source}; "
            "--run.fresh starts anew, with what is there now"
        )


def check_settings(config: Config, stage_one: dict[str, Any]) -> None:
    """Refuse data settings that differ from the autoencoder's, and settings that would have no effect."""
    ours, theirs = to_dict(config.data), stage_one["config"]["data"]
    for name in ("dims", "scaling", "percentiles", "window"):
        if ours[name] != theirs[name]:
            raise InputError(
                f"data.{name}: the autoencoder was trained with {theirs[name]}, got {ours[name]}"
            )
    width = stage_one["config"]["vae"]["latent_channels"]
    for name in ("in_channels", "out_channels"):
        if getattr(config.unet, name) != width:
            raise InputError(f"unet.{name}: follows from the autoencoder's {width} latent channels")
    if config.unet.dims != (dims := stage_one["config"]["vae"]["dims"]):
        raise InputError(f"unet.dims: the latents of the autoencoder are {dims}-D, got {config.unet.dims}")


AS_THEY_ARE = {"data.crop": "centre"} | {
    f"data.augment.{name}": value for name, value in flatten(AugmentConfig()).items()
}


def settled(config: Config, flags: dict[str, Any]) -> Config:
    """The configuration of a new run, where flags have left settings of its preset or plan without effect.

    Without augmentation all variants of a case would be equal, and the last steps no plainer than the others.
    With one variant each case is encoded as it is. Adapters are left to AdamW, so its rate is taken, not that
    of Muon. InputError if it is a flag that has no effect.
    """
    if goes_on("ldm", config):
        return config
    changes, varied = {}, config.data.augment.is_on or config.data.crop != "centre"
    if varied and config.latent_cache and config.data.num_variants == 1:
        if any(key.startswith(("data.augment.", "data.crop")) for key in flags):
            raise InputError("data.augment, data.crop: need data.num_variants > 1, or latent_cache false")
        changes, varied = AS_THEY_ARE, False
    if not varied:
        if flags.get("data.num_variants", 1) > 1:
            raise InputError("data.num_variants: all would be equal; needs data.augment or data.crop random")
        if flags.get("plain_end"):
            raise InputError("plain_end: has no effect without data.augment")
        changes = changes | {"data.num_variants": 1, "plain_end": 0.0}
    if config.lora.rank and config.optim.optimizer == "muon" and "optim.optimizer" not in flags:
        changes = changes | {"optim.optimizer": "adamw", "optim.lr": flags.get("optim.lr", SMALL["optim.lr"])}
    ours = flatten(config)
    changes = {key: value for key, value in changes.items() if ours[key] != value}
    if changes:
        new = ", ".join(f"{key} {show(value) or 'none'}" for key, value in changes.items())
        print0(f"note: what the flags leave without effect is changed: {new}")
    return replace(config, changes)


# the data settings that say which cases there are, and on what grid
CASES = """root name image table subject split val_fraction test_fraction val_gap test_subjects fold subset
 channel series slices file_spacing spacing resize""".split()


def has_other_data(config: Config, stage_one: dict[str, Any]) -> bool:
    """Has this run other data than its autoencoder? An imported autoencoder knows none."""
    before = from_dict(DataConfig, stage_one["config"]["data"], "data")
    known = any(stage_one["state"]["split"].values())
    return not known or any(getattr(config.data, name) != getattr(before, name) for name in CASES)


def spec_for(config: Config, ours: DataSpec, theirs: DataSpec, other: bool, factors: tuple) -> DataSpec:
    """The spec of a new run. ours: of its files as they are; theirs: the autoencoder's; other: the run has
    other data than the autoencoder, whose down-sampling is `factors`.

    The scaling travels with the autoencoder: with scaling "dataset" its numbers scale all data. Other data
    have their own size, spacing and typical intensities, which samples take.
    """
    fixed = ours.scaling == "dataset"
    sources = {name: getattr(ours, name) for name in ("source_channels", "source_low", "source_high")}
    if ours.source_channels == theirs.source_channels and (fixed or not other):
        sources = {name: getattr(theirs, name) for name in sources}
    if not other:
        size = config.data.size or theirs.size
        return dataclasses.replace(theirs, size=size, num_labels=ours.num_labels, **sources)
    rounded = tuple(-(-n // f) * f for n, f in zip(ours.size, factors, strict=True))
    numbers = {name: getattr(theirs, name) for name in ("low", "high", "display") if fixed}
    return dataclasses.replace(ours, size=config.data.size or rounded, **sources, **numbers)


def check_channels(root: Path, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise InputError(
            f"{root}: the images have {ours} channels, the autoencoder's had {theirs}; choose some with "
            "--data.channel"
        )


def open_latent_data(
    config: Config,
    autoencoder: Autoencoder,
    stage_one: dict[str, Any],
    run: Run | None = None,
    dataset: Dataset | None = None,
) -> tuple[Data, dict[str, Any]]:
    """(the checked data of a run, scaled as for the autoencoder; the spec of the files as they are).

    The split is that of a resumed run, else the autoencoder's. With other data than the autoencoder's, cases
    that the autoencoder knows keep their part, and the others are drawn. An imported autoencoder knows none.
    """
    before, split = stage_one["state"], run and run.split(dataset is not None)
    seen = any(before["split"].values())
    # With a dataset the cases themselves tell which of them are known
    other = has_other_data(config, stage_one) or dataset is not None
    if not other:
        check_files(stage_one)
    own = config.pixel_stem and not seen and dataset is None
    if own and config.preset == "phantom" and config.data.root is None:
        phantom_folder()
    data = open_data(
        config.data,
        stage_one["config"]["preset"],
        config.run.seed,
        split or (None if other else before["split"]),
        before=before if seen and not (run and run.resumed) else None,
        items=dataset,
    )
    check_channels(data.root, data.spec.channels, autoencoder.config.in_channels)
    measured, theirs = data.spec.to_dict(), DataSpec.from_dict(before["data"]) if seen else data.spec
    if run and run.resumed:
        spec = dataclasses.replace(DataSpec.from_dict(run.resumed["state"]["data"]), reference=None)
    else:
        spec = spec_for(config, data.spec, theirs, other, autoencoder.downsampling)
    if config.anatomy.registers != "off" and spec.num_labels is None:
        raise InputError("anatomy.registers: needs masks (data.mask, or a column of that name)")
    if config.anatomy.registers != "off" or "labels" in (*config.condition.use, config.control):
        check_numbering(data)
    return dataclasses.replace(data, spec=spec), measured


def make_denoiser(
    config: Config,
    conditions: tuple[Condition, ...],
    num_labels: int | None,
    autoencoder: Autoencoder,
    step: tuple[float, ...] = (),
) -> Denoiser:
    """The denoiser of a run, on the CPU. step: of the coordinates of patches (`position_step`)."""
    anatomy = config.anatomy, num_labels or 0, autoencoder.downsampling
    return Denoiser(config.unet, config.condition, conditions, *anatomy, config.control, step)


def freeze_base(net: Denoiser, config: Config, new: Sequence[str] = ()) -> None:
    """Leave to training what the configuration adds to a frozen denoiser: a ControlNet or adapters. new: the
    names of weights that run.init does not have."""
    if net.control is not None:
        net.requires_grad_(False)
        net.control.requires_grad_(True)
        if new:
            net.control.copy_weights(net.unet)
    elif config.lora.rank:
        add_adapters(net, config.lora.rank)


def conditions_for(config: Config, data: Data, latent_channels: int) -> tuple[Condition, ...]:
    """The conditions of a new run, fitted to its training cases."""
    return fit_conditions(
        config.condition,
        {name: case.columns for name, case in data.cases.items()},
        data.split["train"],
        [data.infos[name].spacing for name in data.split["train"]],
        latent_channels,
        data.spec.source_channels > 0,
        data.spec.num_labels,
        data.folder,
        config.control,
    )


def conditions_of_base(run: Run, fitted: tuple[Condition, ...], data: Data) -> tuple[Condition, ...]:
    """The conditions of a run whose denoiser is frozen: it goes on with its own classes, words and means."""
    held = (run.resumed or run.initial)["state"].get("conditions", [])
    held = {c["name"]: Condition.from_dict(c) for c in held}
    for c in (c for c in held.values() if c.origin == "column"):
        for name, case in data.cases.items():
            try:
                c.encode(case.columns.get(c.name), data.folder)
            except InputError as e:
                raise InputError(f"run.init: case {name}: {e}") from None
    return tuple(held.get(c.name, c) for c in fitted)


def cells_of(data: Data, conditions: tuple[Condition, ...]) -> dict[str, dict[str, str]]:
    """{case id: {column: its cell}}, of the columns of the table that are conditions."""
    columns = [c.name for c in conditions if c.origin == "column"]
    return {name: {k: case.columns.get(k, "") for k in columns} for name, case in data.cases.items()}


def check_conditions(run: Run, conditions: tuple[Condition, ...], data: Data) -> None:
    """Refuse to resume, or to start from, a run that has other conditions."""
    state, cells = run.resumed["state"] if run.resumed else {}, cells_of(data, conditions)
    held = state.get("cells", cells)  # older checkpoints hold none
    other = next((name for name in cells if cells[name] != held.get(name)), None)
    before = tuple(map(Condition.from_dict, state.get("conditions", [])))
    if run.resumed and (conditions != before or other):
        where = f" (case {other})" if other else ""
        raise InputError(
            f"{run.dir}: the table of cases has changed since this run was started{where}; put it back, or "
            "start anew with --run.fresh"
        )
    if not run.initial:
        return
    # New may be the map of a ControlNet, and maps beside x_t where all weights are trained
    control = run.config.control != "off" and run.initial["config"].get("control", "off") == "off"
    theirs, ours = conditions_of_init(run), [c.name for c in conditions][: -1 if control else None]
    new = [] if run.config.frozen else ours[len(theirs) :]
    if theirs + new != ours or not set(new) <= {"image", "labels"}:
        names = [",".join(part) or "none" for part in (theirs, ours)]
        raise InputError(f"run.init: {run.config.run.init} has conditions {names[0]}, this run {names[1]}")


def conditions_of_init(run: Run) -> list[str]:
    """The names of the conditions that run.init has."""
    return [c["name"] for c in run.initial["state"].get("conditions", [])]


def add_channels(run: Run, net: Denoiser) -> list[str]:
    """Give the weights of run.init the input channels that this run adds: of maps (image, labels) among its
    conditions, and of the coordinates of patches. The channels have weights 0, so that the first step
    predicts what run.init predicts. Returns shell patterns of the weights that are new."""
    if not run.initial or run.config.frozen:
        return []
    patch = run.initial["config"].get("patch", {})  # older runs have none
    coordinates = run.config.unet.dims if patch.get("size") else 0
    if coordinates > len(net.arguments.position_step):
        theirs = f"{run.config.run.init} was trained with {','.join(map(str, patch['size']))}"
        raise InputError(f"patch.size: none, but {theirs}, and its denoiser needs the coordinates")
    name = "unet.conv_in.weight"
    weight = run.initial["ema"][name]
    num, at = net.unet.conv_in.weight.shape[1] - weight.shape[1], weight.shape[1] - coordinates
    if num > 0:  # coordinates stand behind the conditions
        zeros = weight.new_zeros(len(weight), num, *weight.shape[2:])
        run.initial["ema"][name] = torch.cat([weight[:, :at], zeros, weight[:, at:]], 1)
    parts = net.conditioner.parts if net.conditioner else ()
    return [f"conditioner.parts.{i}.*" for i in range(len(conditions_of_init(run)), len(parts))]


def open_latents(
    part: str,
    config: Config,
    autoencoder: Autoencoder,
    data: Data,
    conditions: tuple[Condition, ...],
    run: Run,
    device: torch.device,
    plain: bool = False,
) -> tuple[WithConditions, dict[str, Table]]:
    """Open one part of the split for training: (data set of latents and conditions, tables of all latents).

    Cases are encoded once and cached in the run folder, for training in `data.num_variants` variants, or, if
    `plain`, once without augmentation.
    """
    variants = config.data.num_variants if part == "train" and config.latent_cache and not plain else 1
    dataset = data.dataset(part, augment=variants > 1)
    precision = amp_dtype(config.run.amp, device)
    contents = {name: data.contents[name] for name in data.split[part]}
    key = cache_key(autoencoder, config.data, data.spec, contents, precision, config.run.seed)
    how = variants, device, config.run.amp, conditions, config.masks
    folder = run.dir / "latents" / f"{part}-{'plain-' if plain else ''}{key}"
    tables = cache_latents(autoencoder, dataset, folder, *how)
    drawn = config.patch, autoencoder.latent_shape(data.spec.size)[1:], config.run.seed, config.batch_size
    box = functools.partial(draw_box, *drawn) if part == "train" else None
    latents = LatentDataset(tables, config.run.seed, box, autoencoder.downsampling)
    return WithConditions(latents, conditions, dataset.cases, data.folder), tables


def fresh_cases(data: Data, conditions: tuple[Condition, ...], augment: bool) -> WithConditions:
    """The training cases themselves, which each step encodes anew."""
    dataset = data.dataset("train", augment=augment)
    return WithConditions(dataset, conditions, dataset.cases, data.folder)


def hide_some(
    conditions: dict[str, Tensor], config: ConditionConfig, seed: int, positions: Tensor
) -> dict[str, Tensor]:
    """Condition dropout: some conditions (B, ...) become absent, so that the denoiser learns to do without
    them. One by one, all of a sample at once, or all after the first k in the order of the configuration, the
    branches that nested guidance calls (guidance.py)."""
    names = list(conditions)[: len(config.use)]  # the map of a ControlNet comes after them and stays
    num, last = len(names), config.dropout_last
    everything = keyed_uniform(seed, positions, "hide all") < config.dropout_all
    # u below dropout_last says in equal parts after which k = 1 .. num - 1 conditions all is hidden
    u = keyed_uniform(seed, positions, "hide last")
    shown = torch.where(u < last, 1 + (u / max(last, 1e-9) * (num - 1)).long(), num)
    return conditions | {
        name: hide(
            conditions[name], everything | (i >= shown) | (keyed_uniform(seed, positions, f"hide {name}") < p)
        )
        for i, (name, p) in enumerate(zip(names, config.probabilities, strict=True))
    }


# --- evaluation ---------------------------------------------------------------------------------------------

EVAL_LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # u of the noise levels at which validation takes the loss
HIGH = EVAL_LEVELS[-2:]  # where the layout of a volume is decided


@torch.inference_mode()
def evaluate(
    model: LatentDiffusion, batches: Iterable[dict[str, Any]], config: Config, device: torch.device
) -> dict[str, float]:
    """The diffusion loss on validation cases, over all levels and at each, always with the same noise. With
    masks also the Dice of the head, for each label and level. batches: this rank's; the means are over those
    of all ranks."""
    means = Mean()
    for batch in batches:
        batch = to_device(batch, device)
        conditions = model.conditions_of(batch)
        z_noise, noise = (
            keyed_normal(0, batch["index"], batch["mean"].shape[1:], f"validation {what}").to(device)
            for what in ("z", "noise")
        )
        posterior, net = (batch["mean"], batch["logvar"], z_noise), model.denoiser_for(noise.shape[2:])
        for level in EVAL_LEVELS:
            u = torch.full((len(z_noise),), level)
            with autocast(config.run.amp, device):
                loss, _ = model.losses(net, *posterior, u, noise, conditions)
            means.add(loss=loss, **{f"loss_u{level}": loss})
            if config.masks:
                z, t = model.draw(*posterior, u)
                z_t = model.kernel.q_sample(z, t, noise)
                label_maps = model.label_maps(z_t, conditions, config.run.amp, t)
                truth = batch["mask"].long().cpu()
                scores = dice(label_maps, truth, model.denoiser.num_labels)
                scores = scores.masked_fill(absent(truth)[:, None], math.nan)
                means.add(**{f"dice_{k}_u{level}": v for k, v in enumerate(scores.unbind(1), start=1)})
    return means.pop()


NOISED = (0.25, 0.5, 0.75)  # u of the noise levels that previews show


def preview_size(model: LatentDiffusion) -> tuple[int, ...] | None:
    """The voxels of a volume that previews show; None = all."""
    factor = model.autoencoder.downsampling
    return tuple(n * f for n, f in zip(model.patch, factor, strict=True)) if model.patch else None


@torch.inference_mode()
def denoise_once(
    model: LatentDiffusion, mean: Tensor, conditions: dict[str, Tensor], config: Config
) -> tuple[Tensor, Tensor]:
    """What the denoiser makes of noise, for a picture: a latent, mean (1, C_z, *s), with noise of each level
    in NOISED, and the clean latent that the denoiser estimates from each: both (3, C_z, *s)."""
    kernel, num = model.kernel, len(NOISED)
    z = model.normalise(mean).repeat(num, *(1,) * (mean.ndim - 1))
    noise = keyed_normal(0, torch.zeros(1), mean.shape[1:], "preview").to(z.device).expand_as(z)
    t = kernel.t_from_uniform(torch.tensor(NOISED), z.shape[2:])
    z_t = kernel.q_sample(z, t, noise)
    cond = {name: value[:1].repeat(num, *(1,) * (value.ndim - 1)) for name, value in conditions.items()}
    with autocast(config.run.amp, model.device):
        pred = model.denoiser_for(z_t.shape[2:])(z_t, kernel.to_network_time(t).to(z.device), cond)
        return z_t, kernel.convert(pred.float(), z_t, t, kernel.config.prediction, "x_start")


@torch.inference_mode()
def preview(
    model: LatentDiffusion, cases: VolumeDataset, dataset: LatentDataset, config: Config, path: Path
) -> tuple[Path | None, Tensor]:
    """Draw a picture of validation: (its path, the latents (4, C_z, *s) of four samples).

    The rows of the picture: up to four validation cases (with sources, where these are conditions); samples
    under the same conditions; the first case with noise, and the denoiser's estimates. With masks also true
    labels and labels of the head, in colours.

    Where the denoiser has learned from patches alone, all of this is the middle of the volume, as large as
    the largest patch: a whole sample would take minutes, in hundreds of windows.
    """
    amp, display, rows, size = config.run.amp, model.spec.display, {}, preview_size(model)
    batch = collate([dataset[i % len(dataset), i % len(dataset)] for i in range(4)])
    box, factor = (slice(None),) * model.spec.dims, model.autoencoder.downsampling
    if model.patch:
        corner = [(n - m) // 2 for n, m in zip(batch["mean"].shape[2:], model.patch, strict=True)]
        seen = tuple(slice(c, c + m) for c, m in zip(corner, model.patch, strict=True))
        batch, box = batch | cut_batch(batch, [seen] * 4, factor), voxels_of(seen, factor)
    batch = to_device(batch, model.device)
    cond = model.conditions_of(batch)

    def decoded(z: Tensor) -> Tensor:
        with autocast(amp, model.device):
            return model.decode(z, size)[0].float().cpu()

    def add(title: str, x: Tensor, mask: Tensor | None = None) -> None:
        slices = visible_slices(x, display) if mask is None else overlay(x, mask, display)
        rows.setdefault(title, []).extend(slices)

    how = {"conditions": cond, "amp": amp, "size": size}
    if config.masks:
        found = model.label_maps(model.normalise(batch["mean"]), cond, amp, size=size)
    has_source = any(c.origin == "source" for c in model.denoiser.conditions)
    for i in range(min(4, len(cases))):
        case = cases[i, i]
        if has_source:
            add("source", case["source"][(..., *box)])
        add("real (validation)", x := case["image"][(..., *box)])
        if config.masks:
            add("labels (validation)", x, case["mask"][(..., *box)].clamp(min=0))
            add("labels of the head (validation)", x, found[i])
    ((_, latents),) = model.stream(range(4), config.sample_steps, seed=config.run.seed, decoded=False, **how)
    for i, z in enumerate(latents.split(1)):
        x = decoded(z)
        add("generated", x)
        if config.masks:
            own = {name: value[i : i + 1] for name, value in cond.items()}
            add("labels of the head (generated)", x, model.label_maps(z, own, amp, size=size)[0])
    levels = ", ".join(map(str, NOISED))
    titles = f"the first with noise, u = {levels}", "estimates from these"
    for title, part in zip(titles, denoise_once(model, batch["mean"][:1], cond, config), strict=True):
        for z in part.split(1):
            add(title, decoded(z))
    order = sorted(rows, key=lambda title: "labels" in title)  # what is in colours comes last
    return save_sheet(path, {title: rows[title] for title in order}, display), latents


def validate(
    run: Run,
    model: LatentDiffusion,
    dataset: LatentDataset,
    cases: VolumeDataset,
    device: torch.device,
) -> None:
    """Scores of `model`, which holds the EMA, for the log, a picture, and best.pt if the loss is the lowest
    so far.

    A ControlNet is judged at high noise. At low noise x_t itself shows what the map says, so the loss there
    hardly tells whether the map is followed. It rises as soon as few volumes are learned by heart, and the
    mean over all levels would pick weights from before the zero convolutions have opened.
    """
    config = run.config
    with run.validation():
        rounds = -(-len(dataset) // (config.batch_size * world_size()))
        batches = run.interruptible(evaluation_batches(dataset, config.batch_size), rounds)
        scores = evaluate(model, batches, config, device)
        if is_main():
            picture, z = preview(model, cases, dataset, config, run.preview_path)
            run.logger.picture(run.step, "samples", picture)
            run.logger.histogram(run.step, "generated latent", z)
    judged = "loss"
    if config.control != "off":
        judged = "loss_high_noise"
        scores[judged] = sum(scores[f"loss_u{level}"] for level in HIGH) / len(HIGH)
    run.keep_best(judged, scores[judged])
    run.log("val", scores)


# --- train --------------------------------------------------------------------------------------------------


def draw_times(config: Config, seed: int, positions: Tensor) -> Tensor:
    """u (B,) in [0, 1), from which the times of these samples follow (`LatentDiffusion.draw`)."""
    if config.kernel.stratified_t:
        return stratified_uniform(seed, positions, config.batch_size, "t")
    return keyed_uniform(seed, positions, "t")


SHORTER = "--patch.size and --patch.share 0 train on patches alone"  # what makes attention quick


def stage_one_of(config: Config) -> tuple[dict[str, Any], Autoencoder]:
    """(the content of the autoencoder's checkpoint, the autoencoder)."""
    content, where = autoencoder_of(config)
    return content, build_autoencoder(content, where)


def memory_table(config: Config, stage_one: tuple[dict[str, Any], Autoencoder] | None = None) -> MemoryTable:
    """The memory that training, encoding and decoding need, and how long a step takes. stage_one: what
    `stage_one_of` gives, where it is loaded."""
    content, autoencoder = stage_one or stage_one_of(config)
    stored = content["state"]["data"]
    kernel = DiffusionKernel(config.kernel)
    conditions: tuple[Condition, ...] = ()
    num_labels: int | None = None
    whole = config.data.size or (DataSpec.from_dict(stored).size if stored else None)
    masked = config.anatomy.registers != "off" or config.control != "off"
    if config.condition.use or masked or not whole:  # what follows from the data
        data, _ = open_latent_data(config, autoencoder, content)
        whole = data.spec.size
        conditions = conditions_for(config, data, autoencoder.config.latent_channels)
        num_labels = data.spec.num_labels
    latent, step = autoencoder.latent_shape(whole)[1:], max(autoencoder.downsampling)
    config.patch.check(latent, config.unet.downsampling)
    table = MemoryTable(config.memory, config.run.amp, config.run.device)
    seen, multiple = config.patch.window or latent, max(config.unet.downsampling)
    note_attention(config.unet.attended(seen), table.gpu, SHORTER)
    coordinates = (1.0,) * config.unet.dims if config.patch.size else ()
    micro = samples_per_forward(config.batch_size, config.micro_batch_size)

    def make() -> Denoiser:
        net = make_denoiser(config, conditions, num_labels, autoencoder, coordinates)
        freeze_base(net, config)
        return net

    def loss(net: Denoiser, batch: int, size: tuple[int, ...]) -> Tensor:
        z, noise = torch.zeros(2, batch, config.unet.in_channels, *size)
        t = kernel.t_from_uniform(torch.full((batch,), 0.5), size)
        if not config.masks:
            return kernel.losses(net, z, t, noise).mean()
        volume = [n * f for n, f in zip(size, autoencoder.downsampling, strict=True)]
        out = net(z, torch.zeros(batch), mask=torch.zeros(batch, *volume, dtype=torch.int64))
        return (kernel.loss_of(out.pred, z, t, noise) + out.head + out.binding).mean()

    rounds, beside = -(-config.batch_size // micro), weight_bytes(autoencoder)
    mix = config.patch.mix(latent)
    table.training("training, latents", make, loss, micro, seen, multiple, rounds, beside, mix)
    table.inference("encoding", autoencoder.fresh_copy, encode, 1, whole, step, ways=STREAMED)
    beside, window = 4 * weight_bytes(make()), config.patch.window  # as `preview_size`
    shown = tuple(n * f for n, f in zip(window, autoencoder.downsampling, strict=True)) if window else whole
    table.inference("decoding", autoencoder.fresh_copy, decode, 1, shown, step, beside, STREAMED)
    return table


def seconds_to_encode(
    autoencoder: Autoencoder, size: tuple[int, ...], amp: str, device: torch.device
) -> float:
    """How long the encoding of one case takes, the longest over the ranks."""
    autoencoder = autoencoder.to(device)
    with torch.device(device), torch.inference_mode(), autocast(amp, device):
        start = time.perf_counter()
        encode(autoencoder, 1, size)
    return max(gather(time.perf_counter() - start))


def how_to_read(config: Config, root: Path, folder: Path) -> dict[str, Any]:
    """Data settings by which files that are not the autoencoder's are found: the autoencoder's, where these
    find cases, as after a change of --data.root. A folder that is the first word is recognised."""
    config = config.data
    with contextlib.suppress(InputError):
        if (folder / "config.json").is_file() and find_all_cases(config, root):
            return {name: getattr(config, name) for name in READING}
    slices = {} if config.slices == "none" else {"slices": config.slices}
    return {"cache_dir": config.cache_dir, **slices}


def other_data(
    plan: Plan, config: Config, folder: Path, content: dict[str, Any], autoencoder: Autoencoder
) -> tuple[Fingerprint, tuple[int, ...], tuple[float, ...]]:
    """Plan what follows from data that are not the autoencoder's: (their fingerprint; size and spacing of a
    case). folder: the first word. content: of the autoencoder's checkpoint."""
    before, ours = from_dict(DataConfig, content["config"]["data"], "data"), autoencoder.config
    root = resolve_root(config.data, content["config"]["preset"])
    reading = {f"data.{name}": value for name, value in how_to_read(config, root, folder).items()}
    found = take(root, reading | plan.given)
    if found.channels != ours.in_channels and before.channel:
        reading["data.channel"] = before.channel
        found = take(root, reading | plan.given)
    print0(f"{root}: {describe(found)}")
    if found.dims != ours.dims:
        raise InputError(f"{root}: the images are {found.dims}-D, the autoencoder's were {ours.dims}-D")
    check_channels(root, found.channels, ours.in_channels)
    known = content["state"]["data"]["spacing"] if any(content["state"]["split"].values()) else None
    kept = [key.removeprefix("data.") for key in reading]
    return found, *plan_other_data(plan, found, before, known, autoencoder.downsampling, kept)


def make_plan(folder: Path, flags: dict[str, Any], merge: Callable[[dict[str, Any]], Config]) -> Plan:
    """The settings of a run on latents, by the rules of ldm3d/plan.py. folder: the run of the autoencoder, or
    other images, beside --vae."""
    device = setup(flags.get("run.device", "auto"))
    plan, dims = Plan(flags), load_run(flags["vae"], "vae")["config"]["vae"]["dims"]
    plan.set("data.dims", dims, f"the autoencoder is of {dims}-D images")
    fits_all = {"unet.attention_levels": (False,), "unet.head_channels": 1}  # until levels are planned
    config = merge(plan.values | fits_all)
    plan.base = base_of(config, flags)
    content, autoencoder = stage_one = stage_one_of(config)
    before = from_dict(DataConfig, content["config"]["data"], "data")
    if has_other_data(config, content):
        found, size, spacing = other_data(plan, config, folder, content, autoencoder)
        with contextlib.redirect_stdout(io.StringIO()):  # training says the same again
            data, _ = open_latent_data(merge(plan.values), autoencoder, content)
        split, flips = data.split, common_flips(found, before)
    else:
        spec, split = DataSpec.from_dict(content["state"]["data"]), content["state"]["split"]
        size, spacing, flips = flags.get("data.size") or spec.size, spec.spacing, before.augment.flip_axes
    latents = Latents(
        autoencoder.latent_shape(size)[1:],
        tuple(mm * factor for mm, factor in zip(spacing, autoencoder.downsampling, strict=True)),
        len(split["train"]),
        flips,
        seconds_to_encode(autoencoder, size, flags.get("run.amp", "auto"), device),
    )
    able = machine(device.type == "cuda", flags, lambda values: memory_table(merge(values), stage_one))
    with contextlib.redirect_stdout(io.StringIO()):
        plan_ldm(plan, latents, able)
        config = merge(plan.values)
        table = memory_table(config, stage_one)
    seconds = seconds_per_step(table, config, device)
    passes = LDM_PASSES[config.data.num_variants > 1]
    plan_length(plan, able.hours, seconds, passes, latents.num_train, ema=0.3, patience=4)
    return plan


def asked(config: Config, in_memory: bool) -> list[str]:
    """The flags of a first sampling: where the model follows images or masks, those of validation cases."""
    followed = {*config.condition.use, config.control} & {"image", "tokens", "labels"}
    return ["--cases", "val"] if followed and not in_memory else ["--num", "4"]


def train(
    config: Config,
    flags: dict[str, Any] | None = None,
    planner: Planner | None = None,
    dataset: Dataset | None = None,
) -> Run:
    """flags: what the command line sets. planner: of a command that names a run. dataset: in place of files,
    dicts with the tensor "image", and "mask", "source", "class" ... if used (ldm3d/data/items.py)."""
    device = setup(config.run.device)
    config = settled(config, flatten(config) if flags is None else flags)
    run = Run("ldm", with_base(config, flags or {}), flags)
    config, seed = run.config, run.config.run.seed
    if run.finished:
        return run
    micro_batch_size = samples_per_forward(config.batch_size, config.micro_batch_size)

    if not run.resumed:
        config.kernel.check_start()
    stage_one, source = autoencoder_of(config)
    autoencoder = build_autoencoder(stage_one, source)
    note_autoencoder(run, stage_one, source)
    check_settings(config, stage_one)
    check_base(run, stage_one)
    autoencoder.to(device).memory = config.memory
    data, measured = open_latent_data(config, autoencoder, stage_one, run, dataset)
    run.check_data(measured, data.contents, "measured")
    theirs = {k: v for k, v in stage_one["state"]["data"].items() if k not in ("size", "num_labels")}
    if not run.resumed and (different := difference(theirs, measured)):
        print0(f"note: the data are not as the autoencoder's were: {different}")
    conditions = conditions_for(config, data, autoencoder.config.latent_channels)
    if config.frozen:
        conditions = conditions_of_base(run, conditions, data)
    check_conditions(run, conditions, data)
    carries = config.pixel_stem or stage_one["config"]["data"].get("learn_sources")
    if any(c.origin == "source" for c in conditions) and not carries:
        print0("note: the autoencoder has not learnt the sources (data.learn_sources), it may not carry them")
    latent = autoencoder.latent_shape(data.spec.size)[1:]
    config.patch.check(latent, config.unet.downsampling)
    note_attention(config.unet.attended(config.patch.window or latent), device.type != "cpu", SHORTER)
    reseed(seed, 0)
    before = run.resumed or run.initial
    longest = longest_side_of(before["state"]) if before else longest_side(data.spec.size, data.spec.spacing)
    step = position_step(config.patch, longest, data.spec.spacing, autoencoder.downsampling)
    net = make_denoiser(config, conditions, data.spec.num_labels, autoencoder, step).to(device)
    kernel = DiffusionKernel(config.kernel)
    base = run.initial["state"] if run.initial and config.frozen else None
    registers = () if config.anatomy.registers == "off" or config.frozen else ("unet.registers.*", "head.*")
    freeze_base(net, config, run.initialise(net, (*registers, "control.*", *add_channels(run, net))))
    facts = {
        **data.facts(),
        "latents": f"{'x'.join(map(str, latent))} voxels of "
        f"{autoencoder.config.latent_channels} channels, by {source}",
        "patches": " and ".join("x".join(map(str, size)) for size in config.patch.sizes),
        "conditions": ", ".join(c.name for c in conditions),
    }
    run.start(data.split, device, {"denoiser": net, "autoencoder": autoencoder}, facts, SHOWN)
    if planner:
        planner.write(run.dir)
    if not stage_one["state"]["data"]:  # of --pixel_stem alone: the data are the run's own
        stage_one = {**stage_one, "state": {"data": data.spec.to_dict(), **data.state}}
    if not run.resumed or not (run.dir / "autoencoder.pt").exists():
        copy_autoencoder(stage_one, run.dir)

    opened = config, autoencoder, data, conditions, run, device
    train_set, tables = open_latents("train", *opened)
    val_latents, _ = open_latents("val", *opened)
    val_set = data.dataset("val")
    if run.resumed:  # stored statistics: computed by another number of ranks they differ in the last digit
        state = {"contents": data.contents, "cells": cells_of(data, conditions)} | run.resumed["state"]
        statistics = latent_statistics_of(state, autoencoder.config.latent_channels, run.dir)
    else:
        statistics = latent_statistics(tables)
        if base:  # the frozen denoiser knows latents that are normalised so
            statistics = latent_statistics_of(base, len(statistics[0]), config.run.init)
        scores = set_statistics(val_set[i, i]["image"] for i in range(min(16, len(val_set))))
        grain = None  # of other ranks, which write no checkpoints
        if is_main():
            grain = measure_grain(autoencoder, val_latents, val_set, config.run.amp, device)
        state = {
            "data": dataclasses.replace(data.spec, reference=scores).to_dict(),
            "measured": measured,
            **data.state,
            "latent_mean": statistics[0],
            "latent_std": statistics[1],
            "conditions": [c.to_dict() for c in conditions],
            "cells": cells_of(data, conditions),
            **({"longest_side": longest} if step else {}),
            "grain": grain,
        }

    ema, mean = EMA(net, config.run.ema_decay), Mean()
    stepper = Stepper(net, config.optim, config.run, config.batch_size, device)
    run.restore(state, net, ema, {"denoiser": stepper}, mean)
    ldm = LatentDiffusion(  # samples and evaluates with the averaged weights
        autoencoder,
        ema.net,
        kernel,
        *(value.to(device) for value in statistics),
        data.spec,
        config.patch.window,
    )
    model = wrap(net, device, config.run.compile)

    if not config.latent_cache:
        train_set = fresh_cases(data, conditions, augment=True)
    if config.plain_end:
        if config.latent_cache:
            plain, _ = open_latents("train", *opened, plain=True)
        else:
            plain = fresh_cases(data, conditions, augment=False)
        begin = round((1 - config.plain_end) * config.run.steps) * config.batch_size
        train_set = Successive(train_set, plain, begin)
    stream = batches(
        train_set, config.batch_size, micro_batch_size, seed, run.step, config.run.steps, config.run.workers
    )
    if run.owes_validation:
        validate(run, ldm, val_latents, val_set, device)
    for group in run.steps(stream):
        for batch, fraction in micro_batches(group, model, device, seed, run.step):
            if not config.latent_cache:
                batch |= encode_batch(autoencoder, batch, conditions, config.run.amp, config.masks)
            positions, places = batch["position"], None
            if size := draw_size(config.patch, seed, run.step):
                boxes = draw_boxes(size, latent, seed, positions)
                places = cut(net.coordinates(torch.empty(1, 1, *latent, device=device)), boxes)
                if not config.latent_cache:  # a cached latent is cut where it is read
                    batch |= cut_batch(batch, boxes, autoencoder.downsampling)
            shape = batch["mean"].shape[1:]
            cond = hide_some(ldm.conditions_of(batch), config.condition, seed, positions)
            z_noise = keyed_normal(seed, positions, shape, "posterior").to(device)
            noise = keyed_normal(seed, positions, shape, "noise").to(device)
            u = draw_times(config, seed, positions)
            mask = batch["mask"].long() if config.masks else None
            weight = anatomy_weight(config.anatomy, run.step, config.run.steps)
            posterior = batch["mean"], batch["logvar"], z_noise
            with autocast(config.run.amp, device):
                loss, terms = ldm.losses(model, *posterior, u, noise, cond, mask, weight, places)
            stepper.backward(loss.mean() * fraction)
            mean.add(**terms)
        if stepper.step(run.step):
            ema.update(net, run.step)

        run.end_step(**({"anatomy_weight": weight} if config.masks else {}), **stepper.report())
        if run.step == math.ceil(config.early * config.run.steps):
            run.keep_early()
        run.save_if_due()
        if run.due("eval_every"):
            validate(run, ldm, val_latents, val_set, device)
    run.finish(["python", "sample.py", run.dir, *asked(config, dataset is not None)])
    return run


def main(argv: list[str] | None = None) -> None:
    planner = Planner("ldm", Config, make_plan, word="vae")
    config, flags = parse(Config, argv, PRESETS, __doc__, with_autoencoder, COMMON, planner)
    check_crop(flags, config.data)
    check_schedule(flags, "optim", config.optim)
    planner.check(flags)
    if config.plan:
        memory_table(with_base(settled(config, flags), flags)).print()
    else:
        train(config, flags, planner)


if __name__ == "__main__":
    sys.exit(run_script(main, resumes=True))
