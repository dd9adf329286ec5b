"""The denoiser: everything that turns (x_t, t, conditions) into a prediction, in one module.

Training, the EMA, DDP, torch.compile and checkpoints each want one module with one forward, so the parts meet
here:

    conditions  --conditioner-->  context tokens, input channels, an embedding        conditioner.py
    x_t ++ channels, t, emb, context  --unet-->  prediction like x_t                  unet.py, registers.py
    finest features of the unet  --head-->  logits of label maps                      registers.py
    map, x_t, t, emb, context  --control-->  residuals, added within the unet         control.py

Example: x_t (2, 4, 16, 20, 16) with the conditions class (2,) and image (2, 4, 16, 20, 16). The conditioner
turns the class into emb (2, 256) and puts the image beside x_t, so the U-Net reads (2, 8, 16, 20, 16) and
predicts (2, 4, 16, 20, 16). With bound registers of 5 labels and an autoencoder of factor 4, the head gives
logits (2, 5, 64, 80, 64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import crop_to
from .conditioner import Conditioned, Conditioner, Hint
from .conditions import Condition, ConditionConfig, absent, check_names, value_of
from .config import InputError
from .control import ControlNet, where
from .large.windows import coordinates
from .registers import AnatomyConfig, LabelHead, Registers, binding_loss, by_label, head_loss
from .unet import UNet, UNetConfig


class Arguments(NamedTuple):
    """The arguments of a denoiser: `Denoiser(*denoiser.arguments)` is another one with fresh weights."""

    unet: UNetConfig
    condition: ConditionConfig | None
    conditions: tuple[Condition, ...]
    anatomy: AnatomyConfig | None
    num_labels: int
    factor: Sequence[int]
    control: str
    position_step: Sequence[float]


class Supervised(NamedTuple):
    """The result of a forward with masks."""

    pred: Tensor  # like x_t
    head: Tensor  # (B,) loss of the head, 0 for samples without a mask
    binding: Tensor  # (B,) loss of the registers' attention, 0 for samples without a mask


class Denoiser(nn.Module):
    """x_t (B, C_z, *s) noisy latent, t (B,) float time on 0..T, conditions by name -> prediction like x_t.

    `unet` describes the network without conditions: its in_channels are the channels of x_t, and the denoiser
    adds the channels and the context that the conditions need. With `anatomy` the U-Net has registers of
    `num_labels` labels; if they are bound, a head predicts label maps that are `factor` times as fine as x_t.
    control: "labels" or "image", the kind of the last condition, which then steers the U-Net by a ControlNet.
    position_step: the difference in position of two neighbours along each axis, if coordinates stand beside
    x_t as further channels (large/patches.py).
    """

    def __init__(
        self,
        unet: UNetConfig,
        condition: ConditionConfig | None = None,
        conditions: Sequence[Condition] = (),
        anatomy: AnatomyConfig | None = None,
        num_labels: int = 0,
        factor: Sequence[int] = (),
        control: str = "off",
        position_step: Sequence[float] = (),
    ):
        super().__init__()
        self.arguments = Arguments(
            unet, condition, tuple(conditions), anatomy, num_labels, factor, control, position_step
        )
        unet = replace(unet, in_channels=unet.in_channels + len(position_step))
        self.conditioner: Conditioner | None = None
        of_map = conditions[-1] if conditions and control != "off" else None
        if control != "off" and (of_map is None or of_map.kind != control):
            raise InputError(f"control: expected {control} as the last condition, of the ControlNet's map")
        conditions = conditions[:-1] if of_map else conditions
        if unet.emb_parts != 1:
            raise InputError("unet.emb_parts: follows from the conditions; set condition.concat")
        if conditions:
            self.conditioner = Conditioner(condition, conditions, unet.dims, unet.emb_dim)
            if unet.context_dim is not None:
                raise InputError("unet.context_dim: follows from the conditions; set condition.context_dim")
            unet = replace(
                unet,
                in_channels=unet.in_channels + self.conditioner.num_channels,
                emb_parts=1 + len(condition.concat),
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
        self.control = ControlNet(unet, of_map.num_channels(unet.dims)) if of_map else None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions that the denoiser takes, in the order in which guidance nests."""
        return self.arguments.conditions

    def coordinates(self, x_t: Tensor) -> Tensor | None:
        """The coordinates (B, dims, *s) of whole latents x_t (B, C_z, *s); None if the denoiser has none."""
        if not (step := self.arguments.position_step):
            return None
        return coordinates(x_t.shape[2:], step, x_t.device).expand(len(x_t), -1, *x_t.shape[2:])

    def encode_conditions(self, conditions: dict[str, Tensor], like: Tensor) -> Conditioned:
        """The part of `forward` that depends on neither t nor x_t, computed once for all steps of sampling.

        Keys and values of the context are included. like: any tensor of the shape and device of x_t.
        Conditions without a value are absent from all samples.
        """
        encoded = self._encode(conditions, like)
        if encoded.hint is not None and not encoded.hint.present.any():
            encoded = encoded._replace(hint=None)
        context, hint = encoded.context, encoded.hint
        if context is None:
            return encoded
        if hint is not None:
            hint = hint._replace(context=self.control.kv_cache(context))
        return encoded._replace(context=self.unet.kv_cache(context), hint=hint)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        conditions: dict[str, Tensor] | Conditioned | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | Supervised:
        """conditions: tensors by name (conditions.py), or the result of `encode_conditions`. positions
        (B, dims, *s): the coordinates of patches; none = x_t is whole latents.

        mask: (B, *S) integer labels, -1 everywhere in samples without a mask; needs bound registers. Training
        with bound registers passes a mask in every forward, so that every parameter takes part.
        """
        if mask is None:
            return self.unet.output(self._features(x_t, t, conditions, positions), x_t.shape[2:])
        if self.head is None:
            raise InputError(f"mask: needs registers that are bound, these are {self.anatomy.registers}")
        maps: list[Tensor] = []
        h = self._features(x_t, t, conditions, positions, maps)
        size, factor, config = x_t.shape[2:], self.head.to_voxels.factor, self.anatomy
        multiple = self.unet.config.downsampling
        return Supervised(
            self.unet.output(h, size),
            head_loss(self._logits(h, size), mask, config.head_balance),
            binding_loss(maps, mask, self.num_labels, factor, multiple, config.balance),
        )

    def label_logits(
        self,
        x_t: Tensor,
        t: Tensor,
        conditions: dict[str, Tensor] | Conditioned | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, *(factor s)) of the head; the argmax over K, cropped to the image, is a label map."""
        return self._logits(self._features(x_t, t, conditions, positions), x_t.shape[2:])

    def attention_maps(
        self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor] | Conditioned | None = None
    ) -> list[Tensor]:
        """The attention (B, K, M, *s) that each register receives, for every attention layer of the U-Net."""
        maps: list[Tensor] = []
        self._features(x_t, t, conditions, maps=maps)
        return [by_label(weights, self.num_labels) for weights in maps]

    def _encode(self, conditions: dict[str, Tensor], like: Tensor) -> Conditioned:
        check_names(conditions, self.conditions)
        encoded = Conditioned()
        if self.conditioner is not None:
            own = [c.name for c in self.conditioner.conditions]
            encoded = self.conditioner({k: v for k, v in conditions.items() if k in own}, like)
        if self.control is None:
            return encoded
        value = value_of(self.conditions[-1], conditions, like)
        features = self.control.embedding(value.nan_to_num(0.0))
        return encoded._replace(hint=Hint(features, ~absent(value), encoded.context))

    def _features(
        self,
        x_t: Tensor,
        t: Tensor,
        conditions: dict[str, Tensor] | Conditioned | None,
        positions: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """The finest features of the U-Net under the conditions."""
        c = conditions if isinstance(conditions, Conditioned) else self._encode(conditions or {}, x_t)
        positions = self.coordinates(x_t) if positions is None else positions
        beside = [v.to(x_t.dtype) for v in (c.channels, positions) if v is not None]
        x = torch.cat([x_t, *beside], 1) if beside else x_t
        residuals = None
        if c.hint is not None:
            hint = c.hint
            residuals = self.control(x, t, hint.features, hint.context, c.context_mask, c.emb)
            residuals = where(hint.present, residuals)
        return self.unet.features(x, t, c.context, c.context_mask, c.emb, maps, residuals)

    def _logits(self, h: Tensor, size: Sequence[int]) -> Tensor:
        factor = self.head.to_voxels.factor
        return crop_to(self.head(h), [n * f for n, f in zip(size, factor, strict=True)])
