"""Runs opened for use: `load(RUN)` is the one door from a run folder to a network that does its work.

    pipeline = ldm3d.load("runs/vae-hippocampus")     # AutoencoderPipeline
    pipeline.reconstruct("head.nii.gz")               # (C, *S), through encoder and decoder
    pipeline = ldm3d.load("runs/ldm-hippocampus")     # LatentDiffusionPipeline
    pipeline.sample(4, conditions={"image": "t1.nii.gz"})
    pipeline = ldm3d.load("runs/cdal-hippocampus")    # SegmentationPipeline
    pipeline.segment("head.nii.gz", votes=5)          # (K, *S) probabilities

The networks know no files. A pipeline knows both: the networks, with the EMA weights of the run's best
checkpoint, and how the run's training files were read and scaled, so that other files are read alike. Tensors
are in scaled intensities everywhere; `pipeline.spec.to_volume(x)` gives a volume in the units of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cdal import CDAL, CDALConfig, Generator, GeneratorConfig
from .conditions import Condition, ConditionConfig
from .config import InputError, from_dict, read_json
from .data import Data, DataConfig, DataSpec, VolumeDataset, open_data, open_files, open_images
from .data.opening import check_files
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .engine.checkpoint import load_run, load_weights, note_unvalidated, same_weights, save
from .engine.distributed import is_main, print0
from .engine.runs import changed_case, read_split
from .engine.training import autocast
from .guidance import AUTOGUIDANCE_INTERVAL, Autoguidance
from .large.patches import PatchConfig, longest_side, position_step
from .latent_diffusion import LatentDiffusion
from .registers import AnatomyConfig
from .unet import UNetConfig
from .vae import Autoencoder, VAEConfig
from .vqvae import QuantizerConfig, make_autoencoder

# --- autoencoders -------------------------------------------------------------------------------------------


def build_autoencoder(content: dict[str, Any], where: str) -> Autoencoder:
    """The autoencoder (EMA weights, frozen, eval mode, on the CPU) of a checkpoint's content. where: the path
    of the checkpoint, for messages."""
    config = content["config"]
    autoencoder = make_autoencoder(
        config.get("autoencoder", "kl"),
        from_dict(VAEConfig, config["vae"], "vae"),
        from_dict(QuantizerConfig, config.get("quantizer", {}), "quantizer"),
    )
    load_weights(autoencoder, content["ema"], where)
    return autoencoder.eval().requires_grad_(False)


def load_autoencoder(run: str | Path) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder of a run or checkpoint, frozen and on the CPU, and the checkpoint's content."""
    content = load_run(run, "vae")
    return build_autoencoder(content, str(run)), content


def copy_autoencoder(content: dict[str, Any], run_dir: Path) -> None:
    """Put the autoencoder's EMA weights into a stage-two folder, so that the folder is complete. content:
    that of a checkpoint of the autoencoder's run."""
    if is_main():
        keep = ("kind", "config", "state", "ema", "step", "best")
        save(run_dir / "autoencoder.pt", {k: content.get(k) for k in keep})


def latent_statistics_of(state: dict[str, Any], channels: int, run: str | Path) -> tuple[Tensor, Tensor]:
    """latent_mean and latent_std (C_z,) of a checkpoint's state. InputError if they are not such."""
    mean, std = (state.get(name) for name in ("latent_mean", "latent_std"))
    for name, value in (("latent_mean", mean), ("latent_std", std)):
        if not isinstance(value, Tensor) or value.shape != (channels,) or not value.isfinite().all():
            raise InputError(f"{run}: {name} is no {channels} finite numbers; the checkpoint is damaged")
    if not (std > 0).all():
        raise InputError(f"{run}: latent_std is not above 0; the checkpoint is damaged")
    return mean, std


def longest_side_of(state: dict[str, Any]) -> float:
    """The longest side, in mm, to which the positions of patches refer, of a checkpoint's state. Older ones
    do not hold the number: there the side is that of the run's own volumes."""
    spec = DataSpec.from_dict(state["data"])
    return state.get("longest_side") or longest_side(spec.size, spec.spacing)


def check_weaker(model: LatentDiffusion, weaker: LatentDiffusion, run: str | Path) -> None:
    """InputError unless the denoisers of two models predict the same quantity of the same latents. run: the
    one of the weaker, for messages."""
    ours, other = model.autoencoder, weaker.autoencoder
    if ours.config != other.config or not same_weights(ours.state_dict(), other.state_dict()):
        raise InputError(f"autoguidance: {run} has another autoencoder; both runs need the same --vae")
    schedule = ("schedule", "beta_start", "beta_end", "zero_terminal_snr")
    for name in ("process", "prediction", "num_timesteps", *schedule):
        a, b = (getattr(m.kernel.config, name) for m in (model, weaker))
        if a != b:
            raise InputError(f"autoguidance: {run} has kernel.{name} {b}, expected {a}")
    if model.denoiser.conditions != weaker.denoiser.conditions:
        raise InputError(f"autoguidance: {run} has other conditions, or other values of them")
    if model.window != weaker.window:
        raise InputError(f"autoguidance: {run} has seen latents of {weaker.window}, expected {model.window}")
    shift = (weaker.latent_mean - model.latent_mean) / model.latent_std
    ratio = weaker.latent_std / model.latent_std
    if shift.abs().max() > 0.1 or (ratio - 1).abs().max() > 0.1:
        raise InputError(f"autoguidance: {run} was trained on other data, latent_mean or latent_std differ")
    if same_weights(model.denoiser.state_dict(), weaker.denoiser.state_dict()):
        raise InputError(f"autoguidance: {run} has the same weights as the run itself, expected a weaker one")


# --- pipelines ----------------------------------------------------------------------------------------------


class Pipeline:
    """A run opened for use. run: the folder or checkpoint; folder: the run's folder; content: the checkpoint
    without weights; spec: size, spacing and intensities of the training data; layout: how files are read."""

    def __init__(self, run: str | Path, content: dict[str, Any], device: str | torch.device):
        self.run, self.device = Path(run), torch.device(device)
        self.folder = self.run if self.run.is_dir() else self.run.parent
        self.content = {k: content[k] for k in ("kind", "config", "state", "step")}
        self.spec = DataSpec.from_dict(content["state"]["data"])
        self.layout = from_dict(DataConfig, content["config"]["data"], "data")
        note_unvalidated(self.run, content)

    def own_size(self, x: Tensor | str | Path) -> Tensor:
        """An image (C, *S), scaled as in training, in its own size; x: this tensor itself, or its file."""
        return x if isinstance(x, Tensor) else open_images(self.content, x)[0, 0]["image"]


class AutoencoderPipeline(Pipeline):
    """A run of train_vae.py: `net` is the autoencoder."""

    def __init__(self, run: str | Path, device: str | torch.device = "cpu"):
        self.net, content = load_autoencoder(run)
        self.net.to(device)
        super().__init__(run, content, device)

    @torch.inference_mode()
    def reconstruct(self, x: Tensor | str | Path, amp: str = "fp32") -> Tensor:
        """x: an image file, or (C, *S) in scaled intensities, of any size -> (C, *S) after the encoder (the
        posterior's mean) and the decoder, float32 on the CPU."""
        x = self.own_size(x)[None].to(self.device)
        with autocast(amp, self.device):
            recon = self.net.decode(self.net.encode(x).mode(), x.shape[2:])
        return recon.float()[0].cpu()


class SegmentationPipeline(Pipeline):
    """A run of train_cdal.py: `method` (cdal.py) segments with `net`, the generator."""

    def __init__(self, run: str | Path, device: str | torch.device = "cpu"):
        content = load_run(run, "cdal")
        super().__init__(run, content, device)
        config = content["config"]
        self.method = CDAL(from_dict(CDALConfig, config["cdal"], "cdal"), self.spec.num_labels)
        net = Generator(
            from_dict(GeneratorConfig, config["generator"], "generator"),
            from_dict(UNetConfig, config["unet"], "unet"),
            self.spec.channels,
            self.spec.num_labels,
        )
        load_weights(net, content["ema"], str(run))
        self.net = net.to(device).eval().requires_grad_(False)

    def check_flips(self) -> None:
        """InputError if training mirrored no axis: such a network may tell left from right."""
        if not self.layout.augment.flip_axes:
            raise InputError(f"flips: {self.run} has not learned mirrored images (data.augment.flip_axes)")

    def segment(
        self,
        x: Tensor | str | Path,
        votes: int = 5,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        seed: int = 0,
        key: str = "",
        batch_size: int = 8,
        amp: str = "fp32",
        flips: bool = False,
    ) -> Tensor:
        """x: an image file, or (C, *S) in scaled intensities, of any size -> the mean probability (K, *S) of
        the votes, on the CPU. The label map is its argmax over K. window: none = as in the run's validation,
        which takes whole images if the memory holds them. flips: also segment the image mirrored along the
        axes that training mirrored. The other settings: `CDAL.segment`."""
        x = self.own_size(x)
        p = torch.empty(self.method.num_labels, *x.shape[1:])
        how = (votes, window, overlap, seed, key, batch_size, amp)
        for start, part in self.segment_planes(x, *how, flips=flips):
            p[:, start : start + part.shape[1]] = part
        return p

    def segment_planes(
        self,
        x: Tensor,
        votes: int = 5,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        seed: int = 0,
        key: str = "",
        batch_size: int = 8,
        amp: str = "fp32",
        separate: bool = False,
        flips: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """`segment` some planes at a time, as `CDAL.segment_planes` yields them."""
        if flips:
            self.check_flips()
        axes = self.layout.augment.flip_axes if flips else ()
        x, window = x.to(self.device), window or self.content["config"]["window"]
        if window is None:
            patch = self.layout.patch or self.spec.size
            window = self.method.window_in_memory(self.net, x, min(votes, batch_size), patch)
        how = (votes, window, overlap, seed, key, batch_size, separate, axes)
        planes = self.method.segment_planes(self.net, x, *how)
        while True:
            with torch.inference_mode(), autocast(amp, self.device):  # not while the caller works
                part = next(planes, None)
            if part is None:
                return
            yield part


class LatentDiffusionPipeline(Pipeline):
    """A run of train_ldm.py: `model` is the LatentDiffusion."""

    def __init__(self, run: str | Path, device: str | torch.device = "cpu"):
        content = load_run(run, "ldm")
        super().__init__(run, content, device)
        autoencoder, _ = load_autoencoder(self.folder / "autoencoder.pt")
        config, state = content["config"], content["state"]
        patch = from_dict(PatchConfig, config.get("patch", {}), "patch")
        denoiser = Denoiser(
            from_dict(UNetConfig, config["unet"], "unet"),
            from_dict(ConditionConfig, config.get("condition", {}), "condition"),
            [Condition.from_dict(c) for c in state.get("conditions", [])],
            from_dict(AnatomyConfig, config.get("anatomy", {}), "anatomy"),
            self.spec.num_labels or 0,
            autoencoder.downsampling,
            config.get("control", "off"),
            position_step(patch, longest_side_of(state), self.spec.spacing, autoencoder.downsampling),
        )
        load_weights(denoiser, content["ema"], str(run))
        kernel = DiffusionKernel(from_dict(KernelConfig, config["kernel"], "kernel"))
        statistics = latent_statistics_of(state, autoencoder.config.latent_channels, run)
        model = LatentDiffusion(autoencoder, denoiser, kernel, *statistics, self.spec, patch.window)
        self.model = model.to(device).eval().requires_grad_(False)

    def open(
        self, paths: Sequence[str | Path], role: str = "image", size: Sequence[int] | None = None
    ) -> VolumeDataset:
        """Files as the training data's "image", "source" or "mask" were read, or a "region" (a mask of any
        labels); centred to `size`, none = the training size."""
        spec = dataclasses.replace(self.spec, size=self.model.volume_size(size))
        return open_files(paths, role, self.layout, spec)

    def read(self, path: str | Path, role: str = "image", size: Sequence[int] | None = None) -> Tensor:
        """One file of `open` as a tensor: scaled intensities (C, *size), or integers (*size)."""
        key = "mask" if role in ("mask", "region") else "image"
        return self.open([path], role, size)[0, 0][key]

    def read_conditions(
        self, conditions: dict[str, Any], size: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The conditions with tensors in place of the names of files of sources and masks."""
        roles = {c.name: c.origin for c in self.model.denoiser.conditions if c.origin in ("source", "mask")}
        tensors: dict[tuple[str, str], Tensor] = {}  # a file that many samples share is read once

        def tensor(value: Any, role: str) -> Any:
            if not isinstance(value, (str, Path)) or not str(value).strip():
                return value
            if (str(value), role) not in tensors:
                tensors[str(value), role] = self.read(value, role, size)
            return tensors[str(value), role]

        values = dict(conditions)
        for name in (name for name in roles if name in values):
            value, role = values[name], roles[name]
            many = isinstance(value, list)
            values[name] = [tensor(v, role) for v in value] if many else tensor(value, role)
        return values

    def prepare(
        self,
        conditions: dict[str, Any],
        num: int = 1,
        amp: str = "fp32",
        size: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """`LatentDiffusion.prepare`, where sources and masks may be files."""
        return self.model.prepare(self.read_conditions(conditions, size), num, amp, size)

    def sample(
        self,
        num: int = 1,
        size: Sequence[int] | None = None,
        conditions: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`LatentDiffusion.sample`, where sources and masks may be files: (num, C, *size), and with
        with_labels their label maps. settings: steps, sampler, seed, guidance_scale ... of that method."""
        cond = self.read_conditions(conditions or {}, size)
        return self.model.sample(num, size, conditions=cond, **settings)

    def autoguidance(
        self,
        scale: float,
        run: str | Path | None = None,
        interval: tuple[float, float] = AUTOGUIDANCE_INTERVAL,
    ) -> Autoguidance:
        """Autoguidance (guidance.py) by the denoiser of `run`: another run on the same autoencoder, or a
        checkpoint; none = early.pt, what this run's denoiser was after the first steps of its training.
        InputError if the two do not predict the same."""
        run = run or self.folder / "early.pt"
        if not Path(run).exists():
            raise InputError(f"autoguidance: no {run}; autoguidance_run names a run on the same autoencoder")
        weaker = LatentDiffusionPipeline(run, self.device).model
        check_weaker(self.model, weaker, run)
        return Autoguidance(weaker.denoiser, scale, interval)

    def data(self) -> Data:
        """The run's own cases in the run's split, opened anew and read as in training."""
        check_files(self.content)
        preset = load_run(self.folder / "autoencoder.pt", "vae")["config"]["preset"]
        seed, split = self.content["config"]["run"]["seed"], read_split(self.folder / "split.json")
        data = open_data(self.layout, preset, seed, split)
        if changed := changed_case(self.content["state"].get("contents", {}), data.contents):
            print0(f"note: {data.root}: {changed} than in training")
        return dataclasses.replace(data, spec=self.spec)


# --- the door -----------------------------------------------------------------------------------------------

PIPELINES = {"vae": AutoencoderPipeline, "ldm": LatentDiffusionPipeline, "cdal": SegmentationPipeline}


def kind_of(run: str | Path) -> str:
    """What a run folder or checkpoint is of: "vae", "ldm" or "cdal"."""
    stored = Path(run) / "config.json"
    kind = read_json(stored).get("kind") if stored.exists() else load_run(run)["kind"]
    if kind not in list(PIPELINES):  # a damaged file may hold anything
        raise InputError(f"{run}: is a {kind!r} run, expected one of {', '.join(PIPELINES)}")
    return kind


def load(
    run: str | Path, device: str | torch.device = "cpu"
) -> AutoencoderPipeline | LatentDiffusionPipeline | SegmentationPipeline:
    """Open a run for use: its folder (best.pt, else the newest checkpoint) or a checkpoint in it. The kind of
    the run decides what is returned. InputError names what is wrong with the files."""
    return PIPELINES[kind_of(run)](run, device)
