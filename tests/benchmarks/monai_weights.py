"""MONAI's AutoencoderKL and DiffusionModelUNet with our weights, for parity tests and timing.

Both sides are built from one of our configurations (`twin_autoencoder`, `twin_unet`) and have equal weights,
so that outputs, gradients, time and memory can be compared.
"""

from __future__ import annotations

import torch
from torch import nn

from ldm3d.denoiser import Denoiser
from ldm3d.interop.exporting import foreign_state
from ldm3d.interop.peers import build, describe
from ldm3d.unet import UNet, UNetConfig
from ldm3d.vae import AutoencoderKL, VAEConfig


def twin(ours: AutoencoderKL | Denoiser, flash: bool) -> nn.Module:
    """MONAI's network with the weights of ours, ready to train."""
    description = describe(ours, "monai")
    description.arguments["use_flash_attention"] = flash
    return build(description, foreign_state(ours, "monai")).train().requires_grad_(True)


def twin_autoencoder(config: VAEConfig, flash: bool = False) -> tuple[AutoencoderKL, nn.Module]:
    """(ours, MONAI's) with equal random weights; InputError for a setting that MONAI lacks."""
    ours = AutoencoderKL(config)
    randomise(ours)
    return ours, twin(ours, flash)


def twin_unet(config: UNetConfig, flash: bool = False) -> tuple[UNet, nn.Module]:
    """(ours, MONAI's) with equal random weights, zero-initialised layers included."""
    ours = Denoiser(config)
    randomise(ours)
    return ours.unet, twin(ours, flash)


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Give zero-initialised layers small random weights, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
