"""The denoiser: everything that turns (x_t, t, conditions) into a prediction, as one module.

It is exactly what DDP wraps, the EMA copies and torch.compile touches, so that a training step has one module
to call and a checkpoint one state_dict to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import crop_to
from .conditioner import Conditioned, Conditioner
from .conditions import Condition, ConditionConfig, check_names
from .config import InputError
from .registers import AnatomyConfig, LabelHead, Registers, binding_loss, by_label, head_loss
from .unet import UNet, UNetConfig


class Supervised(NamedTuple):
    """What a forward with labels gives."""

    pred: Tensor  # like x_t
    head: Tensor  # (B,) loss of the head, 0 for samples without labels
    binding: Tensor  # (B,) loss of the registers' attention, likewise


class Denoiser(nn.Module):
    """x_t (B, C_z, *s) noisy latent, t (B,) float time on 0..T, conditions by name -> prediction like x_t.

    `unet` describes the network without conditions: `in_channels` are those of x_t, to which the conditions'
    are added, and its context is theirs. Registers, if `anatomy` has any, are those of `num_labels` labels;
    if they are bound, a head predicts label maps `factor` times as fine as x_t.
    """

    def __init__(
        self,
        unet: UNetConfig,
        condition: ConditionConfig | None = None,
        conditions: Sequence[Condition] = (),
        anatomy: AnatomyConfig | None = None,
        num_labels: int = 0,
        factor: Sequence[int] = (),
    ):
        super().__init__()
        self.arguments = unet, condition, tuple(conditions), anatomy, num_labels, factor  # of another like it
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
        self.anatomy, self.num_labels = anatomy or AnatomyConfig(), num_labels
        mode, make_registers = self.anatomy.registers, None
        if mode != "off":
            if num_labels < 1:
                raise InputError(f"anatomy.registers: needs a number of labels, got {num_labels}")
            make_registers = partial(Registers, self.anatomy, unet, num_labels)
        self.unet = UNet(unet, make_registers)
        self.head = LabelHead(self.anatomy, unet, num_labels, factor) if mode == "bound" else None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What it can be told, in the order in which guidance nests."""
        return self.arguments[2]

    def condition(self, conditions: dict[str, Tensor] | None, like: Tensor) -> Conditioned:
        """The part of forward that does not depend on t, for x_t like `like`, keys and values of the context
        included; names not given are absent."""
        known = self._told(conditions, like)
        return known if known.context is None else known._replace(context=self.unet.kv_cache(known.context))

    def _told(self, conditions: dict[str, Tensor] | None, like: Tensor) -> Conditioned:
        if self.conditioner is None:
            check_names(conditions or {}, ())
            return Conditioned()
        return self.conditioner(conditions or {}, like)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        conditions: dict[str, Tensor] | Conditioned | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | Supervised:
        """conditions: see conditions.py; or what `condition` has made of them, for many steps. labels:
        masks (B, *S), -1 everywhere in samples without one, for registers that are bound; training gives
        them in every forward, so that every parameter takes part."""
        if labels is None:
            return self.unet(*self._inputs(x_t, t, conditions))
        if self.head is None:
            raise InputError(f"labels: need registers that are bound, these are {self.anatomy.registers}")
        maps: list[Tensor] = []
        h = self.unet.features(*self._inputs(x_t, t, conditions), maps)
        size, factor, config = x_t.shape[2:], self.head.to_voxels.factor, self.anatomy
        multiple = self.unet.config.downsampling
        return Supervised(
            self.unet.output(h, size),
            head_loss(self._logits(h, size), labels, config.head_balance),
            binding_loss(maps, labels, self.num_labels, factor, multiple, config.balance),
        )

    def label_logits(
        self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | Conditioned | None = None
    ) -> Tensor:
        """(B, K, *(factor s)) of the head; a label map is their highest, cropped to the image's size."""
        return self._logits(self.unet.features(*self._inputs(x_t, t, conditions)), x_t.shape[2:])

    def attention_maps(
        self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | Conditioned | None = None
    ) -> list[Tensor]:
        """The attention (B, K, M, *s) that each register receives, at every place of the U-Net."""
        maps: list[Tensor] = []
        self.unet.features(*self._inputs(x_t, t, conditions), maps)
        return [by_label(weights, self.num_labels) for weights in maps]

    def _inputs(self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | Conditioned | None) -> tuple:
        """What the U-Net is called with."""
        known = conditions if isinstance(conditions, Conditioned) else self._told(conditions, x_t)
        x = x_t if known.channels is None else torch.cat([x_t, known.channels.to(x_t.dtype)], 1)
        return x, t, known.context, known.context_mask, known.emb

    def _logits(self, h: Tensor, size: Sequence[int]) -> Tensor:
        factor = self.head.to_voxels.factor
        return crop_to(self.head(h), [n * f for n, f in zip(size, factor, strict=True)])
