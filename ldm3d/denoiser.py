"""The denoiser: everything that turns (x_t, t) into a prediction, as one module.

It is exactly what DDP wraps, the EMA copies and torch.compile touches, so that a training step has one module
to call and a checkpoint one state_dict to hold.
"""

from __future__ import annotations

from torch import Tensor, nn

from .unet import UNet, UNetConfig


class Denoiser(nn.Module):
    """The U-Net. x_t (B, C_z, *s) noisy latent, t (B,) float time on 0..T -> prediction like x_t."""

    def __init__(self, unet: UNetConfig):
        super().__init__()
        self.unet = UNet(unet)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t)
