"""Latent diffusion: an autoencoder, a denoiser and a diffusion kernel as one module.

A volume is too large to be denoised voxel by voxel, so an autoencoder makes it small first, and the diffusion
happens in its latent space (Rombach et al. 2022, arXiv 2112.10752, section 3). An example in 3-D, with an
autoencoder that halves each axis twice and has 4 latent channels:

    x                        (B, 1, 64, 64, 64)  scaled intensities, about -1 to 1
    mean, logvar = encode    (B, 4, 16, 16, 16)  latent voxel (i, j, k) describes the 4^3 voxels of x from
                             (4 i, 4 j, 4 k) on, and what surrounds them
    z = (mean + exp(logvar / 2) z_noise - latent_mean) / latent_std           `draw`
    z_t = alpha_t z + sigma_t noise                                           diffusion_kernel.py
    loss = |denoiser(z_t, t, conditions) - target|^2, mean over elements      `losses`

Sampling goes the other way: the kernel's sampler turns noise into z, step by step, and

    x = decode(z latent_std + latent_mean)                                    `decode`

Why z is normalised: the kernel adds noise of standard deviation 1, so a latent channel of standard deviation
0.01 would drown in the first step. latent_mean and latent_std are measured per channel over the training set
(latents.py): with mean 2 and std 0.5, a latent value of 3 becomes (3 - 2) / 0.5 = 2. Rombach et al. divide by
one number, the standard deviation of the first batch (section G).

With a VQ autoencoder the posterior has no width, z is the latent before quantisation, and `decode` quantises.
Volumes that serve as conditions enter as latents too: a source image by its posterior's mean, normalised like
z; a mask by the share and the place of each label in every latent voxel. A denoiser with bound registers
(registers.py) also predicts a label map of every sample, from the sample's own clean latent.

Not here: files and run folders (pipeline.py), cached latents (latents.py), edits (inference/editing.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import crop_to
from .conditions import Condition, absent, check_indices, check_names, label_shares
from .config import InputError
from .data import DataSpec
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel
from .engine.distributed import keyed_generator
from .engine.training import autocast
from .guidance import Autoguidance, Guidance, Predict, guided
from .large.windows import Windows, check_window
from .vae import Autoencoder


class Edit:
    """What an edit can change in sampling: three methods, which `LatentDiffusion.stream` calls in this order.
    This class changes nothing; inference/editing.py has edits that do.

    Example: inpainting starts from the noisy latent of an image, replaces the prediction outside the region,
    and puts the untouched voxels back after decoding.
    """

    strength: float = 1.0  # the share of time at which sampling starts: 1 = noise alone
    resample: int = 1  # how often each step is taken (`DiffusionKernel.sample`)

    def start(self, noise: Tensor, times: Sequence[float], indices: list[int]) -> Tensor:
        """The latent x_t (B, C_z, *s) that sampling starts from at times[0].

        noise (B, C_z, *s): what sampling without an edit starts from. times: the falling times of all steps.
        indices: the numbers of the B samples.
        """
        return noise

    def around(self, predict: Predict) -> Predict:
        """The prediction to sample with, in place of `predict`."""
        return predict

    def finish(self, x: Tensor) -> Tensor:
        """The volumes (B, C, *S) to return, made from the decoded ones."""
        return x


NO_EDIT, NO_GUIDANCE = Edit(), Guidance()


class LatentDiffusion(nn.Module):
    """The model that trains on latents and samples volumes.

    latent_mean, latent_std: (C_z,), kept as buffers that broadcast against latents. spec: size, spacing and
    intensities of the training volumes, which samples have too. patch: the latent voxels that the denoiser
    sees at once at most, if it has never seen whole latents (large/patches.py). The caller decides what is
    frozen and in eval mode; `ldm3d.load` gives a model that is ready to sample.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        kernel: DiffusionKernel,
        latent_mean: Tensor,
        latent_std: Tensor,
        spec: DataSpec,
        patch: Sequence[int] | None = None,
    ):
        super().__init__()
        self.patch = patch
        self.autoencoder, self.denoiser, self.kernel, self.spec = autoencoder, denoiser, kernel, spec
        per_channel = (1, -1) + (1,) * len(spec.size)
        self.register_buffer("latent_mean", latent_mean.view(per_channel).clone())
        self.register_buffer("latent_std", latent_std.view(per_channel).clone())

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C_z, *s) of the latent of a volume of the training size."""
        return self.autoencoder.latent_shape(self.spec.size)

    @property
    def window(self) -> tuple[int, ...]:
        """The latent voxels that the denoiser has learned to see at once: those of the training size, or of
        the largest patch."""
        return tuple(self.patch or self.latent_shape[1:])

    # Volumes and latents

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.latent_mean) / self.latent_std

    def encode(self, x: Tensor) -> Tensor:
        """x (B, C, *S), scaled intensities -> normalised latent (B, C_z, *s), the posterior's mean."""
        return self.normalise(self.autoencoder.encode(x).mean)

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Normalised latent (B, C_z, *s) -> x (B, C, *size); size: voxels, none = the training size."""
        return self.autoencoder.decode(z * self.latent_std + self.latent_mean, self.volume_size(size))

    def decode_planes(
        self, z: Tensor, size: Sequence[int] | None = None, amp: str = "fp32"
    ) -> Iterator[tuple[int, Tensor]]:
        """`decode` of one latent z (1, C_z, *s), some planes of the first axis at a time: (first plane,
        planes (C, n, ...) float32 on the CPU)."""
        planes = self.autoencoder.decode_planes(
            z * self.latent_std + self.latent_mean, self.volume_size(size)
        )
        while True:
            with torch.inference_mode(), autocast(amp, self.device):  # not while the caller works
                start, part = next(planes, (0, None))
            if part is None:
                return
            yield start, part[0].float().cpu()

    def volume_size(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The size of samples in voxels: `size`, or the training size if it is None.

        Any size can be made. What is larger than the training size is made in windows (`denoiser_for`).
        """
        if size is None:
            return self.spec.size
        if len(size) != self.spec.dims or min(size) < 1:
            raise InputError(f"size: expected {self.spec.dims} numbers of voxels, got {tuple(size)}")
        return tuple(size)

    def denoiser_for(
        self,
        size: Sequence[int],
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        batch_size: int = 1,
        denoiser: Denoiser | None = None,
    ) -> Denoiser | Windows:
        """The denoiser, as it is for latents of spatial shape `size` that are no larger than a window; else
        in `Windows` (large/windows.py), `batch_size` of them at once.

        window: voxels of the volume that are denoised at once; none = as many as in training. denoiser:
        another one in place of the model's own.
        """
        denoiser = denoiser or self.denoiser
        check_window(window, len(size))
        if not 0 <= overlap < 1:
            raise InputError(f"overlap: expected 0 <= overlap < 1, got {overlap}")
        seen = self.window if window is None else self.autoencoder.latent_shape(window)[1:]
        if all(n <= m for n, m in zip(size, seen, strict=True)):
            return denoiser
        return Windows(denoiser, size, seen, overlap, batch_size)

    # Training

    def draw(self, mean: Tensor, logvar: Tensor, z_noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training samples: (z (B, C_z, *s) from the posterior by z_noise, t (B,) from u (B,) in [0, 1)).

        The times are those of `window`, for all patches too: one process, whatever the size.
        """
        z = self.normalise(mean + torch.exp(0.5 * logvar) * z_noise)
        return z, self.kernel.t_from_uniform(u, self.window)

    def losses(
        self,
        model: Any,
        mean: Tensor,
        logvar: Tensor,
        z_noise: Tensor,
        u: Tensor,
        noise: Tensor,
        conditions: dict[str, Tensor] | None = None,
        mask: Tensor | None = None,
        anatomy_weight: float = 1.0,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of each sample (B,), and its terms by name, each (B,).

            loss = diffusion                                                                  without a mask
            loss = diffusion + anatomy_weight signal_share(t) (head + binding_weight binding)    with masks

        model: the denoiser, bare or in DDP. mean, logvar: the cached posterior (latents.py). z_noise draws z,
        u (B,) in [0, 1) sets t, noise is added to z. mask: (B, *S) integers, -1 everywhere in samples without
        a mask; for a denoiser with bound registers. The terms: "loss" is the diffusion's; "head" and
        "binding" (registers.py) are NaN for samples without a mask, so that means leave them out.
        "weighted_head" and "weighted_binding" are what these add to "total", the whole training loss: 0 for
        samples without a mask. positions (B, dims, *s): the coordinates of patches; none = whole latents.
        """
        z, t = self.draw(mean, logvar, z_noise, u)
        more = {"conditions": conditions} | ({} if positions is None else {"positions": positions})
        if mask is None:
            loss = self.kernel.losses(model, z, t, noise, **more)
            return loss, {"loss": loss}
        time = self.kernel.to_network_time(t).to(z.device)
        out = model(self.kernel.q_sample(z, t, noise), time, mask=mask, **more)
        loss = self.kernel.loss_of(out.pred, z, t, noise)
        share = self.kernel.signal_share(t).to(loss)  # near pure noise there is no anatomy to be found
        binding = self.denoiser.anatomy.binding_weight * out.binding
        total = loss + anatomy_weight * share * (out.head + binding)
        terms = {"head": out.head, "binding": out.binding}
        terms = {name: term.masked_fill(absent(mask), math.nan) for name, term in terms.items()}
        weighted = {"head": anatomy_weight * share * out.head, "binding": anatomy_weight * share * binding}
        terms |= {f"weighted_{name}": term for name, term in weighted.items()}
        return total, {"loss": loss, "total": total, **terms}

    # Conditions

    def conditions_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The conditions, by name, of a batch of `LatentDataset`, or of volumes after `encode_batch`."""
        values = {}
        for c in self.denoiser.conditions:
            if c.origin == "source":
                values[c.name] = self.normalise(batch["source"])
            else:
                values[c.name] = batch["conditions"][c.name] if c.origin == "column" else batch[c.kind]
        return values

    def prepare(
        self,
        conditions: dict[str, Any],
        num: int = 1,
        amp: str = "fp32",
        size: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Conditions as plain values -> tensors (num, ...), as `stream` wants them.

        A value serves all samples, or a list has one for each of the num samples. By kind: class: 1, or its
        name; number: 63.5; text: a caption; embedding: (L, E); spacing: a tuple in mm; image, tokens: the
        source (C, *size) in scaled intensities; labels: integers (*size). None is blank. amp: the precision
        to encode sources with. InputError for a name or a value that the model does not have.
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
            distinct = {id(value): value for value in values}  # what many samples share is encoded once
            tensors = {key: self._prepared(c, value, amp, size) for key, value in distinct.items()}
            prepared[c.name] = torch.stack([tensors[id(value)] for value in values])
        return prepared

    def _prepared(self, c: Condition, value: Any, amp: str, size: Sequence[int] | None) -> Tensor:
        """One value of one condition, without batch axis."""
        if c.origin in ("column", "spacing"):
            return c.encode(value)
        size, is_mask = self.volume_size(size), c.origin == "mask"
        if value is None or (isinstance(value, str) and not value.strip()):
            shape = c.num_channels(len(size)), *self.autoencoder.latent_shape(size)[1:]
            return torch.full(shape, math.nan)
        if isinstance(value, (str, Path)):
            raise InputError(f"condition {c.name}: {value} is a file; use ldm3d.load(RUN).sample")
        value = torch.as_tensor(value)
        expected = size if is_mask else (self.spec.source_channels, *size)
        if tuple(value.shape) != tuple(expected):
            raise InputError(f"condition {c.name}: expected shape {expected}, got {tuple(value.shape)}")
        if is_mask:
            low, high = int(value.min()), int(value.max())
            if not (0 <= low <= high < c.width or low == high == -1):
                expected = f"labels from 0 to {c.width - 1}, or -1 everywhere"
                raise InputError(f"condition {c.name}: expected {expected}, got {low} to {high}")
            return label_shares(value[None].long(), c.width, self.autoencoder.downsampling, c.moments)[0]
        with torch.inference_mode(), autocast(amp, self.device):
            return self.encode(value[None].float().to(self.device))[0].float().cpu()

    # Sampling

    @torch.inference_mode()
    def sample(
        self,
        num: int = 1,
        size: Sequence[int] | None = None,
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
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        autoguidance: Autoguidance | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """New volumes (num, C, *size) on the CPU, in scaled intensities.

        With with_labels the result is (volumes, their label maps (num, *size) int64).

        size: voxels; none = the training size. Sample i has its own CPU generator keyed by (seed, i), so the
        sample does not depend on batch size, rank or device (to rounding). `first` numbers the first sample:
        sample(2, first=4) gives samples 4 and 5. conditions: see `prepare`; those not named are absent.
        guidance, autoguidance: see guidance.py. window, overlap: see `stream`.
        """
        if with_labels:
            self.check_labels()
        if num < 1:
            raise InputError(f"num: expected 1 or more, got {num}")
        cond = self.prepare(conditions or {}, num, amp, size)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        guidance.check(self.denoiser.conditions)
        guidance.note_idle(cond)
        indices, settings = range(first, first + num), (steps, sampler, seed, batch_size, eta, amp)
        volumes, label_maps, done = [], [], 0
        how = {"size": size, "window": window, "overlap": overlap}
        for x, z in self.stream(indices, *settings, cond, guidance, edit, autoguidance=autoguidance, **how):
            volumes.append(x)
            if with_labels:
                own = {name: value[done : done + len(x)] for name, value in cond.items()}
                label_maps.append(self.label_maps(z, own, amp, **how))
            done += len(x)
        return (torch.cat(volumes), torch.cat(label_maps)) if with_labels else torch.cat(volumes)

    def stream(
        self,
        indices: Sequence[int],
        steps: int,
        sampler: str | None = None,
        seed: int = 0,
        batch_size: int = 4,
        eta: float = 0.0,
        amp: str = "fp32",
        conditions: dict[str, Tensor] | None = None,
        guidance: Guidance = NO_GUIDANCE,
        edit: Edit = NO_EDIT,
        size: Sequence[int] | None = None,
        progress: bool = False,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        decoded: bool = True,
        autoguidance: Autoguidance | None = None,
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """`sample` batch by batch, for the samples numbered `indices`: (volumes on the CPU, their normalised
        latents). conditions: tensors with one entry for each index. progress: a bar for the steps of each
        batch, on a terminal. window: voxels of a volume that are denoised at once, none = as many as in
        training; overlap: the share of a window that its neighbour covers at least. A volume that is larger
        than a window is made alone, `batch_size` windows at a time. Noise is drawn for the whole latent and
        cut into windows, so a sample does not depend on how many windows are denoised at once.
        decoded: False gives None in place of the volumes, for callers that decode in planes."""
        sampler, size = sampler or self.kernel.default_sampler, self.volume_size(size)
        self.kernel.check_sampler(sampler, eta)
        guidance.check(self.denoiser.conditions)
        check_indices(conditions or {}, self.denoiser.conditions)
        if edit is not NO_EDIT and size != self.spec.size:
            raise InputError(f"size: an edit has the training size {self.spec.size}, got {size}")
        latent = self.autoencoder.latent_shape(size)
        how = window, overlap, batch_size
        net = self.denoiser_for(latent[1:], *how)
        weaker = autoguidance and self.denoiser_for(latent[1:], *how, autoguidance.denoiser)
        in_windows = net is not self.denoiser
        # Windows see noise as it was in training, so the times are shifted as in training, for any size
        seen = self.window if in_windows else latent[1:]
        times = self.kernel.sampling_times(sampler, steps, seen, edit.strength)
        together = 1 if in_windows else batch_size
        for start in range(0, len(indices), together):
            part = slice(start, start + together)
            with torch.inference_mode(), autocast(amp, self.device):
                generators = [keyed_generator(seed, i, "sample") for i in indices[part]]

                def draw(shape: torch.Size, generators: list = generators) -> Tensor:
                    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])

                noise = draw((len(generators), *latent)).to(self.device)
                cond = {name: value[part].to(self.device) for name, value in (conditions or {}).items()}
                predict = guided(net, cond, noise, guidance, self.kernel.num_timesteps)
                if autoguidance is not None:
                    q = guided(weaker, cond, noise, guidance, self.kernel.num_timesteps)
                    predict = autoguidance.around(predict, q, self.kernel.num_timesteps)
                x_t = edit.start(noise, times, list(indices[part]))
                predict = edit.around(predict)
                how = {"eta": eta, "draw": draw, "resample": edit.resample, "progress": progress}
                z = self.kernel.sample(predict, x_t, times, sampler, **how)
                x = None
                if decoded:  # one by one: least memory
                    x = torch.cat([self.decode(one, size).float().cpu() for one in z.split(1)])
                    x = edit.finish(x)
            yield x, z

    # Label maps of bound registers

    @torch.inference_mode()
    def label_maps(
        self,
        z: Tensor,
        conditions: dict[str, Tensor] | None = None,
        amp: str = "fp32",
        t: Tensor | None = None,
        size: Sequence[int] | None = None,
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
    ) -> Tensor:
        """The label maps (B, *size) int64, on the CPU, that the head sees in normalised latents z
        (B, C_z, *s) under their conditions. t (B,): the times of noisy latents; none: z is clean. window,
        overlap: see `stream`."""
        self.check_labels()
        cond = {name: value.to(z.device) for name, value in (conditions or {}).items()}
        time = self.kernel.to_network_time(torch.zeros(len(z)) if t is None else t).to(z.device)
        with autocast(amp, self.device):
            logits = self.denoiser_for(z.shape[2:], window, overlap).label_logits(z, time, cond)
        return crop_to(logits.argmax(1, keepdim=True), self.volume_size(size))[:, 0].cpu()

    def check_labels(self) -> None:
        """InputError unless the denoiser has learned to give label maps."""
        if self.denoiser.head is None:
            raise InputError("with_labels: the run has learned none (train_ldm.py --anatomy.registers bound)")

    def use_registers(self, on: bool) -> None:
        """Let the U-Net read its registers, as in training, or not, to compare the two."""
        if self.denoiser.unet.registers is None:
            raise InputError("registers: the run has none (train_ldm.py --anatomy.registers bound)")
        self.denoiser.unet.registers.on = on
