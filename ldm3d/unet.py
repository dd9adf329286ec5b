"""The diffusion U-Net: the network that is asked, at every step of sampling, what in x_t is noise.

It takes the noisy latent x_t and the time t and predicts a tensor like x_t. Whether that tensor is the noise,
the clean latent, v or the velocity is the kernel's matter (diffusion_kernel.py).

    emb = W_2 silu(W_1 sinusoid(t)) + extra embedding             time, Ho et al. 2020 (arXiv 2006.11239)
    h   = conv(x_t)
    down: per level num_res_blocks x [ResBlock(h, emb), (attention)], stride-2 conv; every result is a skip
    mid:  ResBlock, attention, ResBlock
    up:   per level (num_res_blocks + 1) x [ResBlock(h ++ skip, emb), (attention)], nearest x2 + conv
    out = conv(silu(norm(h))), zero at first

Example: x_t (2, 4, 16, 20, 16) with channels (64, 128) and attention at level 1. Level 0 makes
(2, 64, 16, 20, 16), level 1 (2, 128, 8, 10, 8), whose 640 positions attend to each other; the way up ends at
(2, 64, 16, 20, 16), and the prediction is (2, 4, 16, 20, 16) again.

Attention is self-attention over all positions. With `context_dim` it is the transformer block of Rombach et
al. 2022 (arXiv 2112.10752), which also reads context tokens, such as the words of a caption. Registers
(registers.py), if there are any, are read after every attention layer. The blocks are those of MONAI's
DiffusionModelUNet, so that its weights can be copied. Any size goes in: the edge is repeated up to a multiple
of `downsampling`, and the prediction is cropped. Not here: conditions (conditioner.py makes `emb`, `context`
and the extra input channels), schedules, guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import (
    AttentionBlock,
    Downsample,
    KeysValues,
    ResBlock,
    Resize,
    TransformerBlock,
    Upsample,
    check_levels,
    crop_to,
    level_strides,
    pad_to_multiple,
    per_level,
    run_layer,
    timestep_embedding,
    total_strides,
)
from .config import InputError, at_least
from .normconv import Conv, GroupNorm, channels_last, norm_conv

CHANNELS_LAST_FROM = 2**15  # voxels of the finest level on a CPU; smaller maps gain nothing
SLOW_ATTENTION = 30_000  # positions, above which attention over all of them takes a CPU minutes


@dataclass(frozen=True)
class UNetConfig:
    dims: Literal[2, 3] = 3  # spatial axes
    in_channels: int = 4  # channels of x_t, concatenated conditions included
    out_channels: int = 4  # channels of the prediction
    channels: tuple[int, ...] = (64, 128, 128)  # width of each level, finest first
    num_res_blocks: tuple[int, ...] = (2,)  # residual blocks of each level, or one number for all
    attention_levels: tuple[bool, ...] = (False, False, True)  # attention at each level, or one value for all
    head_channels: int | tuple[int, ...] = 32  # width of one attention head, or of those of each level
    strides: tuple[tuple[int, ...], ...] | None = None  # 1 or 2 per axis, for each down-sampling; none = 2
    context_dim: int | None = None  # width of the context tokens; none = self-attention only
    num_groups: int = 32  # groups of the norms (fewer where the channels do not divide)
    gn_eps: float = 1e-6  # epsilon of the norms
    emb_parts: int = 1  # embeddings side by side: that of time, and those of the conditions of concat
    time_embed_order: Literal["cos_sin", "sin_cos"] = "cos_sin"  # order of the halves of the sinusoid
    attn_out_proj: bool = True  # linear layer after self-attention (without context)
    resblock_updown: bool = False  # residual blocks change the size of maps, not single convolutions
    adaptive_norm: bool = False  # the embedding scales and shifts norms instead of being added
    dropout: float = 0.0  # in residual and transformer blocks, training only
    checkpointing: bool = False  # recompute each block in backward: less memory, more time

    def __post_init__(self):
        check_levels(self)
        at_least(self, 1, "num_groups", "context_dim", "emb_parts")
        if min(self.num_res_blocks, default=1) < 1:
            raise InputError(f"num_res_blocks: expected 1 or more for each level, got {self.num_res_blocks}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        levels = len(self.channels)
        if not isinstance(self.head_channels, int) and len(self.head_channels) != levels:
            raise InputError(f"head_channels: expected 1 or {levels} values, got {self.head_channels}")
        attended = *per_level(self.attention_levels, levels)[:-1], True  # the middle always attends
        for width, head, attend in zip(self.channels, self.head_widths, attended, strict=True):
            if attend and (head < 1 or width % head):
                raise InputError(f"head_channels: {head} does not divide {width}, a level's width")

    @property
    def head_widths(self) -> tuple[int, ...]:
        """`head_channels` of every level."""
        head = self.head_channels
        return per_level((head,) if isinstance(head, int) else head, len(self.channels))

    @property
    def emb_dim(self) -> int:
        """Width of the time embedding, and of an extra embedding that is added to it."""
        return 4 * self.channels[0]

    @property
    def emb_width(self) -> int:
        """Width of the embedding that all blocks receive, and of `emb` of UNet.forward."""
        return self.emb_parts * self.emb_dim

    def attended(self, size: Sequence[int]) -> int:
        """How many positions attend to each other for x of spatial shape `size`, on the level with most."""
        most = 0
        attended = *per_level(self.attention_levels, len(self.channels))[:-1], True  # as in the middle
        for attend, strides in zip(attended, (*level_strides(self), (1,) * self.dims), strict=True):
            most = max(most, math.prod(size)) if attend else most
            size = tuple(-(-n // f) for n, f in zip(size, strides, strict=True))
        return most

    @property
    def downsampling(self) -> tuple[int, ...]:
        """Total factor per axis between the finest and the coarsest level."""
        return total_strides((1,) * self.dims, *level_strides(self))


def res_options(config: UNetConfig) -> dict[str, Any]:
    """What all residual blocks of a U-Net have in common."""
    return {
        "emb_dim": config.emb_width,
        "num_groups": config.num_groups,
        "eps": config.gn_eps,
        "dropout": config.dropout,
        "zero_init": True,
        "adaptive_norm": config.adaptive_norm,
    }


class Stage(nn.Module):
    """A residual block, then attention if `attend`, then the registers if the U-Net has any.

    The U-Net numbers its attention layers once, when it is made. With its `layer_idx` a stage picks its own
    keys and values from a kv_cache; `reader(h, emb, maps)` reads the registers with this layer's weights.
    """

    def __init__(self, config: UNetConfig, in_channels: int, level: int, attend: bool):
        super().__init__()
        c, norm = config, {"num_groups": config.num_groups, "eps": config.gn_eps}
        out_channels = c.channels[level]
        self.channels, self.num_heads = out_channels, 0  # of its attention
        self.layer_idx: int | None = None  # number of its attention layer, in the order of the forward pass
        self.reader: Callable[[Tensor, Tensor, list[Tensor] | None], Tensor] | None = None
        self.res = ResBlock(c.dims, in_channels, out_channels, **res_options(c))
        self.attention: nn.Module | None = None
        if attend:
            self.num_heads = heads = out_channels // c.head_widths[level]
            if c.context_dim is None:
                self.attention = AttentionBlock(out_channels, heads, **norm, out_proj=c.attn_out_proj)
            else:
                self.attention = TransformerBlock(
                    c.dims, out_channels, c.context_dim, heads, **norm, dropout=c.dropout
                )

    def forward(
        self,
        h: Tensor,
        emb: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """h (B, C_in, *s) -> (B, C_out, *s); the reader is left to UNet.features.

        context: tokens (B, M, E), or the whole kv_cache of the U-Net.
        """
        h = self.res(h, emb)
        if isinstance(self.attention, TransformerBlock):
            own = context[self.layer_idx] if isinstance(context, tuple) else context
            return self.attention(h, own, context_mask)
        return h if self.attention is None else self.attention(h)


class UNetEncoder(nn.Module):
    """The half of a U-Net that reads: time, the first convolution, the way down and the middle.

    A ControlNet (control.py) is a second one beside the U-Net's own.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        levels, strides = len(c.channels), level_strides(c)
        blocks, attend = per_level(c.num_res_blocks, levels), per_level(c.attention_levels, levels)
        self.time_embed = nn.Sequential(
            nn.Linear(c.channels[0], c.emb_dim), nn.SiLU(), nn.Linear(c.emb_dim, c.emb_dim)
        )
        self.conv_in = Conv(c.dims, c.in_channels, c.channels[0])
        width, self.skip_channels = c.channels[0], [c.channels[0]]  # channels of h; of every skip
        self.down = nn.ModuleList()
        for level in range(levels):
            for _ in range(blocks[level]):
                self.down.append(Stage(c, width, level, attend[level]))
                width = c.channels[level]
                self.skip_channels.append(width)
            if level < levels - 1:
                self.down.append(self._change_size(width, strides[level], down=True))
                self.skip_channels.append(width)
        self.mid = nn.ModuleList([Stage(c, width, levels - 1, attend) for attend in (True, False)])
        self.up = nn.ModuleList()  # filled by UNet
        self._number_layers()

    def _change_size(self, width: int, strides: Sequence[int], down: bool) -> nn.Module:
        """The layer between two levels: a convolution or a residual block."""
        if self.config.resblock_updown:
            resize = Resize(strides, "mean" if down else "repeat")
            return ResBlock(self.config.dims, width, width, **res_options(self.config), resize=resize)
        if down:
            return Downsample(self.config.dims, width, strides, pad="sym")
        return Upsample(self.config.dims, width, strides)

    def _number_layers(self) -> None:
        for layer_idx, stage in enumerate(self.attention_stages):
            stage.layer_idx = layer_idx

    @property
    def attention_stages(self) -> list[Stage]:
        """The stages with attention, in the order of the forward pass."""
        stages = (layer for layer in (*self.down, *self.mid, *self.up) if isinstance(layer, Stage))
        return [stage for stage in stages if stage.attention is not None]

    def encode(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
        hint: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, *S) -> (h after the middle, the skips, finest first). emb: the result of `embed`.

        hint (B, channels[0], *S): what is added to the first features.
        """
        x = pad_to_multiple(x, self.config.downsampling)
        if math.prod(x.shape[2:]) >= CHANNELS_LAST_FROM:
            x = channels_last(x)
        h = self.conv_in(x)
        if hint is not None:
            h = h + pad_to_multiple(hint, self.config.downsampling)
        skips = [h]
        for layer in self.down:
            h = self.run(layer, h, emb, context, context_mask, maps)
            skips.append(h)
        for layer in self.mid:
            h = self.run(layer, h, emb, context, context_mask, maps)
        return h, skips

    def run(
        self,
        layer: nn.Module,
        h: Tensor,
        emb: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None,
        context_mask: Tensor | None,
        maps: list[Tensor] | None,
    ) -> Tensor:
        """h through one layer of any kind."""
        checkpointing = self.config.checkpointing
        if isinstance(layer, ResBlock):
            return run_layer(layer, h, emb, checkpointing=checkpointing)
        if not isinstance(layer, Stage):
            return run_layer(layer, h, checkpointing=checkpointing)
        h = run_layer(layer, h, emb, context, context_mask, checkpointing=checkpointing)
        # Outside run_layer: computed again in backward, a reader would add its map a second time
        return h if layer.reader is None else layer.reader(h, emb, maps)

    def kv_cache(self, context: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of context tokens (B, M, E), one pair for each attention layer, by `layer_idx`.

        They depend on the context alone, so 50 steps of sampling need them once.
        """
        return tuple(stage.attention.cross_attn.keys_values(context) for stage in self.attention_stages)

    def embed(self, t: Tensor, emb: Tensor | None = None) -> Tensor:
        """t (B,) on the 0..T scale, and the extra embedding (B, emb_width) -> (B, emb_width). The first
        emb_dim features are added to the embedding of time, the others stand beside it."""
        sinusoid = timestep_embedding(t, self.config.channels[0], self.config.time_embed_order == "cos_sin")
        time = self.time_embed(sinusoid.to(self.time_embed[0].weight.dtype))
        if self.config.emb_parts == 1:
            return time if emb is None else time + emb
        added, beside = emb.tensor_split([time.shape[1]], dim=1)
        return torch.cat([time + added, beside], dim=1)

    def _check(self, x: Tensor, context: Tensor | tuple[KeysValues, ...] | None) -> None:
        c = self.config
        if x.ndim != c.dims + 2 or x.shape[1] != c.in_channels:
            raise InputError(f"x: expected (B, {c.in_channels}, {c.dims} axes), got shape {tuple(x.shape)}")
        if (context is None) != (c.context_dim is None):
            wanted = "no context" if c.context_dim is None else f"context (B, M, {c.context_dim})"
            raise InputError(f"context: this U-Net wants {wanted} (context_dim = {c.context_dim})")


class UNet(UNetEncoder):
    """x (B, C, *S), t (B,), context (B, M, E), context_mask (B, M), emb (B, emb_width) -> (B, C_out, *S).

    All steps of sampling have one context: `kv_cache(context)`, computed once, may take its place.
    `make_registers` is called with (C, heads) of every attention layer and returns the registers, a module
    that is called as `h = registers(h, emb, maps, layer_idx=...)` after these layers (registers.py).
    """

    def __init__(
        self,
        config: UNetConfig,
        make_registers: Callable[[Sequence[tuple[int, int]]], nn.Module] | None = None,
    ):
        super().__init__(config)
        c, levels, strides = config, len(config.channels), level_strides(config)
        blocks, attend = per_level(c.num_res_blocks, levels), per_level(c.attention_levels, levels)
        width, skips = c.channels[-1], list(self.skip_channels)
        for level in reversed(range(levels)):
            for _ in range(blocks[level] + 1):
                self.up.append(Stage(c, width + skips.pop(), level, attend[level]))
                width = c.channels[level]
            if level > 0:
                self.up.append(self._change_size(width, strides[level - 1], down=False))
        self.norm_out = GroupNorm(width, c.num_groups, c.gn_eps)
        self.conv_out = Conv(c.dims, width, c.out_channels, zero_init=True)
        self._number_layers()
        self.registers: nn.Module | None = None
        if make_registers is not None:  # last, so that a seed draws the same U-Net with registers and without
            layers = [(stage.channels, stage.num_heads) for stage in self.attention_stages]
            self.registers = make_registers(layers)
            for stage in self.attention_stages:  # a partial is no module: the weights are named once
                stage.reader = partial(self.registers, layer_idx=stage.layer_idx)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: Tensor | None = None,
        emb: Tensor | None = None,
    ) -> Tensor:
        return self.output(self.features(x, t, context, context_mask, emb), x.shape[2:])

    def features(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: Tensor | None = None,
        emb: Tensor | None = None,
        maps: list[Tensor] | None = None,
        residuals: Sequence[Tensor] | None = None,
        coarse: list[Tensor] | None = None,
    ) -> Tensor:
        """The finest features of the decoder (B, channels[0], *s), s being S padded to `downsampling`.

        A list `maps` is filled with the attention that the registers receive, one map for each layer. A list
        `coarse` is filled with the features at the end of every other level of the decoder, coarsest first.
        residuals: of a ControlNet, added to the skips, and the last one to the result of the middle.
        """
        self._check(x, context)
        emb = self.embed(t, emb)
        h, skips = self.encode(x, emb, context, context_mask, maps)
        if residuals is not None:
            h, skips = h + residuals[-1], [a + b for a, b in zip(skips, residuals[:-1], strict=True)]
        for layer in self.up:
            if isinstance(layer, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            elif coarse is not None:
                coarse.append(h)
            h = self.run(layer, h, emb, context, context_mask, maps)
        return h

    def output(self, h: Tensor, size: Sequence[int]) -> Tensor:
        """The prediction (B, C_out, *size) from `features`, cropped to the size of x."""
        return crop_to(norm_conv(self.norm_out, self.conv_out, h), size)
