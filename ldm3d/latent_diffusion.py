"""Latent diffusion: a frozen autoencoder, the statistics of its latents, a denoiser, and a diffusion kernel.

    z       = (encode(x).mean - latent_mean) / latent_std        per channel, measured over the training set
    loss    = kernel loss of the denoiser at z_t, with z drawn afresh from the posterior at every step
    sample  = decode(latent_std * kernel.sample(denoiser, noise) + latent_mean)

Rombach et al. 2022 (2112.10752), section 3;
the measured per-channel scale replaces their single 1 / std of the first batch (section G). With a VQ
autoencoder z is the latent before quantisation, whose posterior has no width, and `decode` quantises it.

Conditions that are volumes enter as latents: a source by its posterior's mean, normalised by the statistics
of the target's latents, labels as shares in each latent voxel. A denoiser with bound registers (registers.py)
gives a label map with every sample: that of its head at the sample's own latent, without noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import crop_to
from .conditions import (
    Condition,
    ConditionConfig,
    absent,
    check_indices,
    check_names,
    label_shares,
)
from .config import InputError, from_dict, read_json
from .data import Data, DataConfig, DataSpec, VolumeDataset, open_data, open_files
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .engine.checkpoint import load_run, load_weights, save
from .engine.distributed import is_main, keyed_generator
from .engine.training import autocast
from .guidance import Guidance, guided
from .registers import AnatomyConfig
from .unet import UNetConfig
from .vae import Autoencoder, VAEConfig
from .vqvae import QuantizerConfig, make_autoencoder


def load_autoencoder(run: str | Path) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder (EMA weights, frozen, eval mode, on the CPU) of a run or checkpoint, and the
    checkpoint's content."""
    content = load_run(run, "vae")
    config = content["config"]
    autoencoder = make_autoencoder(
        config.get("autoencoder", "kl"),
        from_dict(VAEConfig, config["vae"], "vae"),
        from_dict(QuantizerConfig, config.get("quantizer", {}), "quantizer"),
    )
    load_weights(autoencoder, content["ema"], str(run))
    return autoencoder.eval().requires_grad_(False), content


# --- the model ----------------------------------------------------------------------------------------------


class Edit:
    """What an edit changes in sampling, at three places; this one changes nothing. See editing.py."""

    def start(self, noise: Tensor, times: list[float], indices: list[int]) -> tuple[Tensor, list[float]]:
        """Where samples with these indices start: (x_t (B, C_z, *s), the falling times to visit)."""
        return noise, times

    def around(self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Callable:
        """The prediction to sample with, (x_t, t (B,) on 0..T) -> prediction."""
        return predict

    def finish(self, x: Tensor) -> Tensor:
        """Decoded volumes (B, C, *S) -> what is given out."""
        return x


NO_EDIT, NO_GUIDANCE = Edit(), Guidance()


class LatentDiffusion:
    """What samples: autoencoder, denoiser and kernel with the latent statistics and the data's geometry.

    latent_mean, latent_std: (C_z,). `spec` tells the size, spacing and intensity of the volumes it makes.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        kernel: DiffusionKernel,
        latent_mean: Tensor,
        latent_std: Tensor,
        spec: DataSpec,
        layout: DataConfig | None = None,
    ):
        self.autoencoder, self.denoiser, self.kernel, self.spec = autoencoder, denoiser, kernel, spec
        self.layout = layout  # how files are read and scaled; without it conditions must be tensors
        per_channel = (1, -1) + (1,) * len(spec.size)
        self.latent_mean, self.latent_std = latent_mean.view(per_channel), latent_std.view(per_channel)

    @classmethod
    def load(cls, run: str | Path, device: str | torch.device = "cpu") -> LatentDiffusion:
        """From the run folder of train_ldm.py (best.pt, else the newest checkpoint) or a checkpoint in it."""
        run = Path(run)
        content = load_run(run, "ldm")
        folder = run if run.is_dir() else run.parent
        autoencoder, _ = load_autoencoder(folder / "autoencoder.pt")
        state = content["state"]
        data = DataSpec.from_dict(state["data"])
        denoiser = Denoiser(
            from_dict(UNetConfig, content["config"]["unet"], "unet"),
            from_dict(ConditionConfig, content["config"].get("condition", {}), "condition"),
            [Condition.from_dict(c) for c in state.get("conditions", [])],
            from_dict(AnatomyConfig, content["config"].get("anatomy", {}), "anatomy"),
            data.num_labels or 0,
            autoencoder.downsampling,
        )
        load_weights(denoiser, content["ema"], str(run))
        kernel = DiffusionKernel(from_dict(KernelConfig, content["config"]["kernel"], "kernel"))
        return cls(
            autoencoder.to(device),
            denoiser.to(device).eval().requires_grad_(False),
            kernel,
            state["latent_mean"].to(device),
            state["latent_std"].to(device),
            data,
            from_dict(DataConfig, content["config"]["data"], "data"),
        )

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C_z, *s) of a volume of the run's size."""
        return self.autoencoder.latent_shape(self.spec.size)

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.latent_mean) / self.latent_std

    def encode(self, x: Tensor) -> Tensor:
        """x (B, C, *S), scaled intensities -> normalised latent (B, C_z, *s), the posterior's mean."""
        return self.normalise(self.autoencoder.encode(x).mean)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latent (B, C_z, *s) -> x (B, C, *size)."""
        return self.autoencoder.decode(z * self.latent_std + self.latent_mean, self.spec.size)

    def draw(self, mean: Tensor, logvar: Tensor, z_noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised z drawn from cached posteriors by z_noise, times t (B,) of u (B,) in [0, 1))."""
        z = self.normalise(mean + torch.exp(0.5 * logvar) * z_noise)
        return z, self.kernel.t_from_uniform(u, z.shape[2:])

    def losses(
        self,
        model: Any,
        mean: Tensor,
        logvar: Tensor,
        z_noise: Tensor,
        u: Tensor,
        noise: Tensor,
        conditions: dict[str, Tensor] | None = None,
        labels: Tensor | None = None,
        anatomy_weight: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `model` (the denoiser, bare or in DDP) lowers on cached posteriors, (B,), and what it is made
        of: "loss", that of the diffusion, and with labels (B, *S) "head" and "binding", NaN for samples whose
        labels are -1 everywhere.

        z_noise draws z from the posterior, noise is the diffusion's, u (B,) in [0, 1) sets t; all keyed by
        the sample.
        """
        z, t = self.draw(mean, logvar, z_noise, u)
        if labels is None:
            loss = self.kernel.losses(model, z, t, noise, conditions=conditions)
            return loss, {"loss": loss}
        time = self.kernel.to_network_time(t).to(z.device)
        out = model(self.kernel.q_sample(z, t, noise), time, conditions=conditions, mask=labels)
        loss = self.kernel.loss_of(out.pred, z, t, noise)
        share = self.kernel.signal_share(t).to(loss)  # pure noise is nobody's to segment
        anatomy = out.head + self.denoiser.anatomy.binding_weight * out.binding
        parts = {"head": out.head, "binding": out.binding}
        parts = {name: part.masked_fill(absent(labels), math.nan) for name, part in parts.items()}
        return loss + anatomy_weight * share * anatomy, {"loss": loss, **parts}

    # Conditions

    def conditions_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The conditions of a batch of `LatentDataset` or `encode_batch` with "conditions", by name."""
        values = {}
        for c in self.denoiser.conditions:
            if c.origin == "source":
                values[c.name] = self.normalise(batch["source"])
            else:
                values[c.name] = batch["conditions"][c.name] if c.origin == "column" else batch[c.kind]
        return values

    def prepare(self, conditions: dict[str, Any], num: int = 1, amp: str = "fp32") -> dict[str, Tensor]:
        """Plain values -> tensors (num, ...) for `stream`: one value for all samples, or a list of num.

        class: 1 or its name; number: 63.5; text: a caption; embedding: a file or (L, E); spacing: a tuple;
        image, tokens: a file, or a source (C, *size) in scaled intensities; labels: a file, or integers
        (*size). None is blank. amp: the precision to encode sources with. InputError for whatever the run
        does not know.
        """
        check_names(conditions, self.denoiser.conditions)
        prepared = {}
        for c in (c for c in self.denoiser.conditions if c.name in conditions):
            values = conditions[c.name]
            values = values if isinstance(values, list) else [values] * num
            if len(values) != num:
                raise InputError(
                    f"condition {c.name}: expected one value or {num} in a list, got {len(values)}"
                )
            distinct = {id(value): value for value in values}
            tensors = {key: self._tensor(c, value, amp) for key, value in distinct.items()}
            prepared[c.name] = torch.stack([tensors[id(value)] for value in values])
        return prepared

    def _tensor(self, c: Condition, value: Any, amp: str) -> Tensor:
        """One value of one condition, without batch axis."""
        if c.origin in ("column", "spacing"):
            return c.encode(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return torch.full((c.width, *self.latent_shape[1:]), math.nan)
        labels = c.origin == "mask"
        if isinstance(value, (str, Path)):
            value = self.open([value], "mask" if labels else "source")[0, 0]["mask" if labels else "image"]
        value = torch.as_tensor(value)
        expected = self.spec.size if labels else (self.spec.source_channels, *self.spec.size)
        if tuple(value.shape) != tuple(expected):
            raise InputError(f"condition {c.name}: expected shape {expected}, got {tuple(value.shape)}")
        if labels:
            low, high = int(value.min()), int(value.max())
            if not (0 <= low <= high < c.width or low == high == -1):
                expected = f"labels from 0 to {c.width - 1}, or -1 everywhere"
                raise InputError(f"condition {c.name}: expected {expected}, got {low} to {high}")
            return label_shares(value[None].long(), c.width, self.autoencoder.downsampling)[0]
        with torch.inference_mode(), autocast(amp, self.device):
            return self.encode(value[None].float().to(self.device))[0].float().cpu()

    def open(self, paths: Sequence[str | Path], role: str) -> VolumeDataset:
        """Files as the training data's "image", "source" or "mask" were read, or a "region"; centred to the
        run's size."""
        if self.layout is None:
            raise InputError(f"{paths[0]}: the model does not know how files are read; give tensors")
        return open_files(paths, role, self.layout, self.spec)

    # Sampling

    @torch.inference_mode()
    def sample(
        self,
        num: int = 1,
        steps: int = 30,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 4,
        eta: float = 0.0,
        first: int = 0,
        amp: str = "fp32",
        conditions: dict[str, Any] | None = None,
        guidance_scale: float | dict[str, float] = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        edit: Edit = NO_EDIT,
        with_labels: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """New volumes (num, C, *size) on the CPU, in scaled intensities; with_labels: and their label maps
        (num, *size) int64.

        Sample i has its own CPU generator keyed by (seed, i), so that it does not depend on batch size, rank
        or device (to rounding). `first` numbers the first one: sample(2, first=4) gives samples 4 and 5.
        conditions: see `prepare`; those not given are absent. guidance: see guidance.py.
        """
        if with_labels:
            self.check_labels()
        if num < 1:
            raise InputError(f"num: expected 1 or more, got {num}")
        told = self.prepare(conditions or {}, num, amp)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        guidance.check(self.denoiser.conditions)
        guidance.note_idle(told)
        stream = self.stream(
            range(first, first + num),
            steps,
            sampler,
            seed,
            batch_size,
            eta,
            amp,
            told,
            guidance,
            edit,
        )
        volumes, labels = [], []
        for i, (x, z) in enumerate(stream):
            part = slice(i * batch_size, (i + 1) * batch_size)
            volumes.append(x)
            if with_labels:
                labels.append(self.label_maps(z, {name: v[part] for name, v in told.items()}, amp))
        return (torch.cat(volumes), torch.cat(labels)) if with_labels else torch.cat(volumes)

    def stream(
        self,
        indices: range | list[int],
        steps: int,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 4,
        eta: float = 0.0,
        amp: str = "fp32",
        conditions: dict[str, Tensor] | None = None,
        guidance: Guidance = NO_GUIDANCE,
        edit: Edit = NO_EDIT,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`sample` batch by batch, for the samples with these indices: (volumes on the CPU, their normalised
        latents). conditions: tensors with one entry an index."""
        sampler = sampler or self.default_sampler
        self.kernel.check_sampler(sampler, eta)
        guidance.check(self.denoiser.conditions)
        check_indices(conditions or {}, self.denoiser.conditions)
        for start in range(0, len(indices), batch_size):
            part = slice(start, start + batch_size)
            with torch.inference_mode(), autocast(amp, self.device):
                generators = [keyed_generator(seed, i, "sample") for i in indices[part]]

                def draw(shape: torch.Size, generators: list = generators) -> Tensor:
                    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])

                noise = draw((len(generators), *self.latent_shape)).to(self.device)
                told = {name: value[part].to(self.device) for name, value in (conditions or {}).items()}
                predict = guided(self.denoiser, told, noise, guidance, self.kernel.num_timesteps)
                times = self.kernel.sampling_times(sampler, steps, noise.shape[2:])
                x_t, times = edit.start(noise, times, list(indices[part]))
                predict = edit.around(predict, noise)
                z = self.kernel.sample(predict, x_t, times, sampler, eta=eta, draw=draw)
                x = torch.cat([self.decode(one).float().cpu() for one in z.split(1)])  # least memory
                x = edit.finish(x)
            yield x, z

    @torch.inference_mode()
    def label_maps(
        self,
        z: Tensor,
        conditions: dict[str, Tensor] | None = None,
        amp: str = "fp32",
        t: Tensor | None = None,
    ) -> Tensor:
        """(B, *size) int64 on the CPU: what the head sees in normalised latents z (B, C_z, *s), such as those
        of `stream`, under their conditions. t (B,): the times of noisy ones; none: they are clean."""
        self.check_labels()
        told = {name: value.to(z.device) for name, value in (conditions or {}).items()}
        time = self.kernel.to_network_time(torch.zeros(len(z)) if t is None else t).to(z.device)
        with autocast(amp, self.device):
            logits = self.denoiser.label_logits(z, time, told)
        return crop_to(logits.argmax(1, keepdim=True), self.spec.size)[:, 0].cpu()

    def check_labels(self) -> None:
        """InputError unless the denoiser has learned to give label maps."""
        if self.denoiser.head is None:
            raise InputError("with_labels: the run has learned none (train_ldm.py --anatomy.registers bound)")

    def use_registers(self, on: bool) -> None:
        """Let the U-Net read its registers, as it was trained to, or not, to compare the two."""
        if self.denoiser.unet.registers is None:
            raise InputError("registers: the run has none (train_ldm.py --anatomy.registers bound)")
        self.denoiser.unet.registers.on = on

    @property
    def default_sampler(self) -> str:
        return "heun" if self.kernel.process == "flow" else "dpmpp"


def run_data(run: str | Path, model: LatentDiffusion) -> Data:
    """The cases of a run of train_ldm.py in its own split, as they were read in training, opened anew."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    preset = load_run(folder / "autoencoder.pt", "vae")["config"]["preset"]
    seed = load_run(run, "ldm")["config"]["run"]["seed"]
    data = open_data(model.layout, preset, seed, read_json(folder / "split.json"))
    return dataclasses.replace(data, spec=model.spec)


def copy_autoencoder(source: str | Path, run_dir: Path) -> None:
    """Put the autoencoder's EMA weights into a stage-two folder, once, so that the folder is complete."""
    target = run_dir / "autoencoder.pt"
    if target.exists() or not is_main():
        return
    content = load_run(source, "vae")
    keep = ("kind", "config", "state", "ema", "step", "best")
    save(target, {k: content[k] for k in keep})
