"""The denoiser: everything that turns (x_t, t, conditions) into a prediction, as one module.

It is exactly what DDP wraps, the EMA copies and torch.compile touches, so that a training step has one module
to call and a checkpoint one state_dict to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .conditioning import Conditioned, Conditioner
from .conditions import Condition, ConditionConfig, check_names
from .config import InputError
from .unet import UNet, UNetConfig


class Denoiser(nn.Module):
    """x_t (B, C_z, *s) noisy latent, t (B,) float time on 0..T, conditions by name -> prediction like x_t.

    `unet` describes the network without conditions: `in_channels` are those of x_t, to which the conditions'
    are added, and its context is theirs.
    """

    def __init__(
        self,
        unet: UNetConfig,
        condition: ConditionConfig | None = None,
        conditions: Sequence[Condition] = (),
    ):
        super().__init__()
        self.arguments = unet, condition, tuple(conditions)  # to make another like it
        self.conditioner: Conditioner | None = None
        if conditions:
            self.conditioner = Conditioner(condition, conditions, unet.dims, unet.emb_dim)
            if unet.context_dim is not None:
                raise InputError("unet.context_dim: follows from the conditions; set condition.context_dim")
            unet = replace(
                unet,
                in_channels=unet.in_channels + self.conditioner.num_channels,
                context_dim=condition.context_dim if self.conditioner.has_context else None,
            )
        self.unet = UNet(unet)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What it can be told, in the order in which guidance nests."""
        return self.arguments[2]

    def condition(self, conditions: dict[str, Tensor] | None, like: Tensor) -> Conditioned:
        """The part of forward that does not depend on t, for x_t like `like`, keys and values of the context
        included; names not given are absent."""
        known = self._told(conditions, like)
        return known if known.context is None else known._replace(context=self.unet.read(known.context))

    def _told(self, conditions: dict[str, Tensor] | None, like: Tensor) -> Conditioned:
        if self.conditioner is None:
            check_names(conditions or {}, ())
            return Conditioned()
        return self.conditioner(conditions or {}, like)

    def forward(
        self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | Conditioned | None = None
    ) -> Tensor:
        """conditions: see conditioning.py; or what `condition` has made of them, for many steps."""
        known = conditions if isinstance(conditions, Conditioned) else self._told(conditions, x_t)
        x = x_t if known.channels is None else torch.cat([x_t, known.channels.to(x_t.dtype)], 1)
        return self.unet(x, t, known.context, known.context_mask, known.emb)
