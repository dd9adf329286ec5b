"""MONAI's tutorial of 3-D latent diffusion, the peer of quality.py: both stages, trained for given seconds.

Networks, losses, weights and learning rates are those of the tutorial "3D latent diffusion" (github.com/
Project-MONAI/tutorials, generation/3d_ldm), with MONAI's own classes:

    stage one   AutoencoderKL (32, 64, 64) with 3 latent channels, a quarter of each axis. L1 + 1e-6 KL + 0.01
                adversarial loss (least squares, PatchDiscriminator), which joins after a twentieth of the
                training. Adam, 1e-4, batches of 2 whole volumes
    stage two   DiffusionModelUNet (32, 64, 64) with attention on the two lower levels. It predicts the noise
                of latents divided by their standard deviation, 1,000 times, scaled-linear betas from 0.0015
                to 0.0195. Adam, 1e-4, batches of 2, each encoded anew
    samples     DDIM, 50 steps

Scaled to smaller volumes: latents are padded to a multiple of 4, which the U-Net needs. Different from the
tutorial: no perceptual loss (its network is a download), and seconds in place of epochs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm3d.data import VolumeDataset
from ldm3d.engine.checkpoint import load_file, save
from ldm3d.engine.training import autocast

if TYPE_CHECKING:
    from monai.inferers import LatentDiffusionInferer

KL_WEIGHT, ADVERSARIAL_WEIGHT, WARM_UP = 1e-6, 0.01, 0.05
LR, BATCH_SIZE, DDIM_STEPS = 1e-4, 2, 50
NOISE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
CPU = torch.device("cpu")


def kl_loss(mean: Tensor, sigma: Tensor) -> Tensor:
    """The KL in nats, summed over the latent, mean over the batch."""
    kl = 0.5 * (mean.square() + sigma.square() - sigma.square().log() - 1)
    return kl.flatten(1).sum(1).mean()


def batches(dataset: VolumeDataset, seed: int) -> Iterator[Tensor]:
    """Batches of whole volumes (B, C, *S), without end: every epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        for start in range(0, max(1, len(order) - BATCH_SIZE + 1), BATCH_SIZE):
            yield torch.stack([dataset[i, i]["image"] for i in order[start : start + BATCH_SIZE]])


class Tutorial:
    """Both networks. folder: of their weights. amp: precision of training and sampling, "fp32" or "bf16"."""

    def __init__(self, dataset: VolumeDataset, folder: Path, seed: int, amp: str):
        from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

        torch.manual_seed(seed)
        self.dataset, self.folder, self.seed, self.amp = dataset, folder, seed, amp
        dims, channels = dataset.spec.dims, dataset.spec.channels
        self.autoencoder = AutoencoderKL(
            spatial_dims=dims,
            in_channels=channels,
            out_channels=channels,
            channels=(32, 64, 64),
            latent_channels=3,
            num_res_blocks=1,
            norm_num_groups=16,
            attention_levels=(False, False, True),
        )
        self.unet = DiffusionModelUNet(
            spatial_dims=dims,
            in_channels=3,
            out_channels=3,
            num_res_blocks=1,
            channels=(32, 64, 64),
            attention_levels=(False, True, True),
            num_head_channels=(0, 64, 64),
        )
        self.latent_size = [n // 4 for n in dataset.spec.size]
        self.padded_size = [-(-n // 4) * 4 for n in self.latent_size]

    def train_autoencoder(self, seconds: float) -> int:
        """Train stage one for so many CPU seconds of this process; returns the number of steps."""
        from monai.losses import PatchAdversarialLoss
        from monai.networks.nets import PatchDiscriminator

        start, steps, net = time.process_time(), 0, self.autoencoder.train()
        dims, channels = self.dataset.spec.dims, self.dataset.spec.channels
        discriminator = PatchDiscriminator(
            spatial_dims=dims, num_layers_d=3, channels=32, in_channels=channels, out_channels=1
        )
        adversarial_loss = PatchAdversarialLoss(criterion="least_squares")
        optimizer, disc_optimizer = (torch.optim.Adam(m.parameters(), LR) for m in (net, discriminator))
        for x in batches(self.dataset, self.seed):
            spent = time.process_time() - start
            if spent >= seconds:
                break
            adversarial = spent >= WARM_UP * seconds
            with autocast(self.amp, CPU):
                recon, mean, sigma = net(x)
                loss = F.l1_loss(recon.float(), x) + KL_WEIGHT * kl_loss(mean.float(), sigma.float())
                if adversarial:
                    logits = discriminator(recon.contiguous())[-1].float()
                    generator_loss = adversarial_loss(logits, target_is_real=True, for_discriminator=False)
                    loss = loss + ADVERSARIAL_WEIGHT * generator_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if adversarial:
                with autocast(self.amp, CPU):
                    terms = [
                        adversarial_loss(discriminator(v)[-1].float(), real, for_discriminator=True)
                        for v, real in ((recon.detach().contiguous(), False), (x, True))
                    ]
                disc_optimizer.zero_grad(set_to_none=True)
                (ADVERSARIAL_WEIGHT * 0.5 * sum(terms)).backward()
                disc_optimizer.step()
            steps += 1
        self._save("autoencoder", net)
        return steps

    def train_unet(self, seconds: float) -> int:
        """Train stage two on the autoencoder of `folder`; see `train_autoencoder`."""
        start, steps, net = time.process_time(), 0, self.unet.train()
        self._load("autoencoder", self.autoencoder)
        with torch.no_grad(), autocast(self.amp, CPU):
            first = self.autoencoder.encode_stage_2_inputs(next(batches(self.dataset, self.seed)))
        scale = 1 / first.float().std().item()
        inferer = self._inferer(scale)
        optimizer = torch.optim.Adam(net.parameters(), LR)
        generator = torch.Generator().manual_seed(self.seed)
        for x in batches(self.dataset, self.seed + 1):
            if time.process_time() - start >= seconds:
                break
            noise = torch.randn(len(x), 3, *self.padded_size, generator=generator)
            t = torch.randint(0, inferer.scheduler.num_train_timesteps, (len(x),), generator=generator)
            with autocast(self.amp, CPU):
                pred = inferer(
                    inputs=x,
                    autoencoder_model=self.autoencoder,
                    diffusion_model=net,
                    noise=noise,
                    timesteps=t,
                )
                loss = F.mse_loss(pred.float(), noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1
        self._save("unet", net, scale=scale)
        return steps

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x (C, *S) after the encoder (the posterior's mean) and the decoder."""
        self._load("autoencoder", self.autoencoder)
        with autocast(self.amp, CPU):
            return self.autoencoder.reconstruct(x[None])[0].float()

    @torch.no_grad()
    def sample(self, num: int, batch_size: int = 8) -> Tensor:
        """New volumes (num, C, *S)."""
        from monai.networks.schedulers import DDIMScheduler

        self._load("autoencoder", self.autoencoder)
        inferer = self._inferer(self._load("unet", self.unet)["scale"])
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **NOISE)
        scheduler.set_timesteps(DDIM_STEPS)
        noise = torch.randn(num, 3, *self.padded_size, generator=torch.Generator().manual_seed(self.seed))
        parts = []
        for part in noise.split(batch_size):
            with autocast(self.amp, CPU):
                x = inferer.sample(
                    input_noise=part,
                    autoencoder_model=self.autoencoder,
                    diffusion_model=self.unet,
                    scheduler=scheduler,
                    verbose=False,
                )
            parts.append(torch.as_tensor(x).float())
        return torch.cat(parts)

    def _inferer(self, scale: float) -> LatentDiffusionInferer:
        """MONAI's inferer. scale: the factor of latents, one over the standard deviation of a first batch."""
        from monai.inferers import LatentDiffusionInferer
        from monai.networks.schedulers import DDPMScheduler

        shapes = {"ldm_latent_shape": self.padded_size, "autoencoder_latent_shape": self.latent_size}
        scheduler = DDPMScheduler(num_train_timesteps=1000, **NOISE)
        padded = self.padded_size != self.latent_size
        return LatentDiffusionInferer(scheduler, scale, **(shapes if padded else {}))

    def _save(self, name: str, net: nn.Module, **more: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.folder / f"{name}.pt", {"kind": name, "model": net.state_dict(), **more})

    def _load(self, name: str, net: nn.Module) -> dict[str, Any]:
        content = load_file(self.folder / f"{name}.pt", name)
        net.load_state_dict(content["model"])
        net.eval()
        return content
