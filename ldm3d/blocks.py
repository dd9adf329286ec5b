"""Building blocks of all networks, in 2-D and 3-D: residual, attention and re-sampling blocks, trunks, time.

Legend, used in shape comments everywhere: B batch, C channels, *S spatial axes, (H, W) or (D, H, W), N tokens
(the flattened *S), M context tokens, E embedding width, T timesteps, K codebook entries or classes. C_z and
*s are channels and axes of a latent. Axes are never transposed after loading: a volume's (D, H, W) are its
RAS axes (i, j, k), so D runs from left to right, H from posterior to anterior, W from inferior to superior;
(H, W) of an image are row and column.

    residual block   h = conv1(silu(norm1(x))) + W silu(emb);   y = conv2(silu(norm2(h))) + skip(x)   [1], [2]
    adaptive norm    instead: h = conv1(silu(norm1(x)));  y = conv2(silu((1 + scale) norm2(h) + shift))
                     + skip(x),  (scale, shift) = W silu(emb), which starts at 0                           [4]
    attention        y = x + W_o softmax(q k^T / sqrt(d)) v,    q, k, v from norm(x) or a context          [3]
    transformer      tokens: + self-attention, + cross-attention, + GEGLU feed-forward; zero 1x1 out       [2]
    plain unit       y = relu(x + conv2(relu(conv1(x))))                                                   [5]

[1] He et al. 2016, arXiv 1603.05027 (pre-activation). [2] Rombach et al. 2022, arXiv 2112.10752, appendix.
[3] Vaswani et al. 2017, arXiv 1706.03762, eq. 1. [4] Dhariwal & Nichol 2021, arXiv 2105.05233, section 3.
[5] van den Oord et al. 2017, arXiv 1711.00937, section 4.1; here as Tudosiu et al. 2022, arXiv 2209.03177.
GEGLU: Shazeer 2020, arXiv 2002.05202.

Weights are always those of the plain formulas above. Some results are computed in another, faster way that
gives the same numbers; each such place says why, and tests/test_blocks.py compares it with the plain formula.
normconv.py holds convolution and norm. `Encoder` and `Decoder` are one flat list of layers each, so that code
that decodes in pieces or converts weights can walk the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import InputError
from .normconv import Conv, GroupNorm, channels_last, norm_conv

UpsampleKind = Literal["nearest", "trilinear", "deconv2", "deconv3", "deconv4"]
KeysValues = tuple[Tensor, Tensor]  # keys and values of a context, (B, heads, M, d) each
SCALED = (-1.0, 1.0)  # the range of the intensities that networks are given, and give

# --- levels -------------------------------------------------------------------------------------------------


def per_level(value: Sequence, levels: int) -> tuple:
    """One value for every level; a single value is repeated."""
    return tuple(value) * levels if len(value) == 1 else tuple(value)


def num_downsamplings(config: Any) -> int:
    """How often a VAEConfig or UNetConfig down-samples: between levels, or at each level of a plain trunk."""
    return len(config.channels) - (getattr(config, "trunk", "norm") == "norm")


def level_strides(config: Any) -> tuple[tuple[int, ...], ...]:
    """The strides of each down-sampling of a VAEConfig or UNetConfig; none means 2 along every axis."""
    if config.strides is None:
        return ((2,) * config.dims,) * num_downsamplings(config)
    return config.strides


def total_strides(*strides: Sequence[int]) -> tuple[int, ...]:
    """The product of strides, axis by axis."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def check_levels(config: Any) -> None:
    """Check the settings that autoencoder and U-Net share; InputError names the one that is wrong."""
    levels = len(config.channels)
    if not levels or min(config.channels) < 1:
        raise InputError(f"channels: expected one positive width per level, got {config.channels}")
    for name in ("num_res_blocks", "attention_levels"):
        value = getattr(config, name)
        if len(value) not in (1, levels):
            raise InputError(
                f"{name}: expected 1 or {levels} values (one per level of channels), got {value}"
            )
    if len(level_strides(config)) != (num := num_downsamplings(config)):
        raise InputError(f"strides: expected {num} tuples (one per down-sampling), got {config.strides}")
    for strides in level_strides(config):
        if len(strides) != config.dims or not set(strides) <= {1, 2}:
            raise InputError(f"strides: expected 1 or 2 for each of {config.dims} axes, got {strides}")


# --- sizes --------------------------------------------------------------------------------------------------


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Repeat the last plane of every axis of x (B, C, *S) until the axis is a multiple long.

    With multiples (4, 4), an image of 5 x 8 becomes one of 8 x 8. Planes are concatenated, because the
    backward of F.pad is not deterministic on GPUs.
    """
    for axis, m in enumerate(multiple, start=2):
        missing = -x.shape[axis] % m
        if missing:
            edge = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, edge.expand(*x.shape[:axis], missing, *x.shape[axis + 1 :])], dim=axis)
    return x


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` voxels of every axis of x (B, C, *larger): the inverse of `pad_to_multiple`."""
    for axis, length in enumerate(size, start=2):
        if x.shape[axis] != length:
            x = x.narrow(axis, 0, length)
    return x


def run_layer(layer: Callable[..., Tensor], *args: Tensor | None, checkpointing: bool) -> Tensor:
    """layer(*args); with `checkpointing` its activations are not kept but computed again in backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


# --- residual block -----------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """The residual block of all networks: x (B, C_in, *S) -> (B, C_out, *S).

    With `emb_dim`, an embedding emb (B, emb_dim), such as that of time, acts on every voxel: a projection of
    emb is added after the first convolution or, with `adaptive_norm`, scales and shifts the second norm.
    `resize` changes the size of the map before the first convolution, on both branches.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        zero_init: bool = False,
        adaptive_norm: bool = False,
        resize: nn.Module | None = None,
    ):
        super().__init__()
        self.adaptive_norm, self.resize = adaptive_norm, resize
        self.norm1 = GroupNorm(in_channels, num_groups, eps)
        self.conv1 = Conv(dims, in_channels, out_channels)
        self.emb_proj = nn.Linear(emb_dim, (1 + adaptive_norm) * out_channels) if emb_dim else None
        if adaptive_norm:
            nn.init.zeros_(self.emb_proj.weight)
            nn.init.zeros_(self.emb_proj.bias)
        self.norm2 = GroupNorm(out_channels, num_groups, eps)
        self.dropout = dropout
        self.conv2 = Conv(dims, out_channels, out_channels, zero_init=zero_init)
        self.skip = None if in_channels == out_channels else Conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if self.resize is None:
            h = norm_conv(self.norm1, self.conv1, x)
        else:
            h, x = self.conv1(self.resize(self.norm1(x, silu=True))), self.resize(x)
        if self.emb_proj is not None:
            emb = self.emb_proj(F.silu(emb))  # (B, C_out), or (B, 2 C_out) for an adaptive norm
            emb = emb.reshape(*emb.shape, *(1,) * (x.ndim - 2))
            h = h if self.adaptive_norm else h.add_(emb)
        if self.adaptive_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, 1 + scale, self.norm2(h)))
            h = self.conv2(F.dropout(h, self.dropout, self.training))
        elif self.dropout and self.training:
            h = self.conv2(F.dropout(self.norm2(h, silu=True), self.dropout))
        else:
            h = norm_conv(self.norm2, self.conv2, h)
        return h.add_(x if self.skip is None else self.skip(x))  # in place: no backward needs h


class ResidualUnit(nn.Module):
    """The residual block of plain trunks: x (B, C, *S) -> relu(x + conv2(relu(conv1(x)))), `width` within."""

    def __init__(self, dims: int, channels: int, width: int):
        super().__init__()
        self.conv1 = Conv(dims, channels, width)
        self.conv2 = Conv(dims, width, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


# --- attention ----------------------------------------------------------------------------------------------


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Tokens cut into attention heads, without a copy: (B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Attention heads joined to tokens again: (B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(-2)


def to_tokens(x: Tensor) -> Tensor:
    """Every voxel of a map as a token: (B, C, *S) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens as a map again: (B, N, C) -> (B, C, *size)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


class SelfAttention(nn.Module):
    """Every token looks at every other: tokens (B, N, C) -> (B, N, C), without the residual.

    One matrix makes q, k and v. The N x N matrix of weights is never stored (fused attention).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        qkv_bias: bool = True,
        out_proj: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.out_proj = nn.Linear(channels, channels) if out_proj else None

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)  # (B, heads, N, d)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out = merge_heads(out)  # (B, N, C)
        return out if self.out_proj is None else self.out_proj(out)


class CrossAttention(nn.Module):
    """Every token looks at a context, such as the words of a caption; without the residual.

    tokens (B, N, C), context (B, M, E), context_mask (B, M) bool, True = use -> (B, N, C). A sample whose
    mask is False everywhere attends to nothing. In place of the context, forward takes the context's
    `keys_values`; a sampler computes them once for all its steps. With `return_map` the result is (out, map),
    the attention map (B, heads, N, M) being differentiable; it is stored, so M must be small.

    `gate` multiplies the result by one learned number that starts at zero, so that the layer can be added to
    a pretrained network without changing what the network computes.
    """

    def __init__(
        self, channels: int, context_dim: int, num_heads: int = 1, gate: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.out_proj = nn.Linear(channels, channels)
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of context (B, M, E)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | KeysValues,
        context_mask: Tensor | None = None,
        return_map: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q = split_heads(self.q(tokens), self.num_heads)  # (B, heads, N, d)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        dropout = self.dropout if self.training else 0.0
        mask, some = None, None
        if context_mask is not None:
            # Attention kernels disagree about a sample without any key. Here such a sample uses all keys, and
            # its result is multiplied by 0 afterwards
            some = context_mask.any(dim=1)[:, None, None]  # (B, 1, 1)
            mask = (context_mask[:, None] | ~some)[:, None]  # (B, 1, 1, M)
        if return_map:
            out, weights = explicit_attention(q, k, v, mask, dropout)
        else:
            out, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
        out = merge_heads(out)  # (B, N, C)
        out = self.out_proj(out if some is None else out * some)
        out = out if self.gate is None else self.gate * out
        if not return_map:
            return out
        return out, weights if some is None else weights * some[:, None]


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention with its weights: (weights v, weights), where weights = softmax(q k^T / sqrt(d)) in fp32.

    weights (B, heads, N, M); mask (B, 1, 1, M) bool, True = use; at least one True a sample.
    """
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (B, heads, N, M)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v, weights


class AttentionBlock(nn.Module):
    """x (B, C, *S) -> x + self-attention(norm(x)), over all positions."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_groups: int = 32,
        eps: float = 1e-6,
        out_proj: bool = True,
    ):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, eps)
        self.attn = SelfAttention(channels, num_heads, out_proj=out_proj)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_map(self.attn(to_tokens(self.norm(x))), x.shape[2:])


class GEGLU(nn.Module):
    """Feed-forward layer of a transformer: linear2(value * gelu(gate)), (value, gate) = linear1(tokens).

    tokens (B, N, C) -> (B, N, C); value and gate are 4 C wide.
    """

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.linear1 = nn.Linear(channels, 8 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.linear1(tokens).chunk(2, dim=-1)
        return F.dropout(self.linear2(value * F.gelu(gate)), self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to a context (B, M, E) and feed-forward: x (B, C, *S) -> (B, C, *S).

    The last convolution starts at zero, so an untrained block returns x.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        context_dim: int,
        num_heads: int = 1,
        num_groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, eps)
        self.proj_in = Conv(dims, channels, channels, kernel=1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn = SelfAttention(channels, num_heads, qkv_bias=False, dropout=dropout)
        self.cross_attn = CrossAttention(channels, context_dim, num_heads, dropout=dropout)
        self.ff = GEGLU(channels, dropout)
        self.proj_out = Conv(dims, channels, channels, kernel=1, zero_init=True)

    def forward(self, x: Tensor, context: Tensor | KeysValues, context_mask: Tensor | None = None) -> Tensor:
        tokens = to_tokens(self.proj_in(self.norm(x)))  # (B, N, C)
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.cross_attn(self.norm2(tokens), context, context_mask)
        tokens = tokens + self.ff(self.norm3(tokens))
        return x + self.proj_out(to_map(tokens, x.shape[2:]))


# --- re-sampling --------------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """Convolution of kernel 3 with stride 1 or 2 per axis; axes of stride 2 must have an even length.

    `pad="asym"` pads an axis of stride 2 by one zero at its end, as published autoencoders do; "sym" pads one
    zero at either end.
    """

    def __init__(
        self, dims: int, channels: int, strides: Sequence[int], pad: Literal["asym", "sym"] = "asym"
    ):
        super().__init__()
        ends = [int(pad == "asym" and s == 2) for s in strides]
        # F.pad takes pairs (before, after), the last axis first
        self.end_padding = [p for e in reversed(ends) for p in (0, e)] if any(ends) else None
        self.conv = Conv(dims, channels, channels, stride=strides, padding=[1 - e for e in ends])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.end_padding is None else F.pad(x, self.end_padding))


class Upsample(nn.Module):
    """Doubles the axes of stride 2: (B, C, *S) -> (B, C, *(stride * S)), with stride 1 or 2 per axis.

    "nearest" repeats voxels and "trilinear" interpolates along every axis, each followed by a convolution of
    kernel 3; "deconv2", "deconv3" and "deconv4" (all axes of stride 2) are transposed convolutions of kernel
    2, 3 and 4, which may change the channels to `out_channels`.

    Repeating voxels and then convolving is the same as ONE transposed convolution with a folded kernel
    (`folded_weight`), also at the borders. In 3-D this needs 8 instead of 27 products per output voxel, and
    no tensor of repeated voxels.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        strides: Sequence[int],
        kind: UpsampleKind = "nearest",
        out_channels: int | None = None,
    ):
        super().__init__()
        self.dims, self.strides, self.kind = dims, tuple(strides), kind
        self.out_channels = channels if out_channels is None else out_channels
        if kind in ("nearest", "trilinear"):
            self.conv = Conv(dims, channels, channels)
        else:
            kernel, padding = {"deconv2": (self.strides, 0), "deconv3": (3, 1), "deconv4": (4, 1)}[kind]
            cls = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
            extra = [s - 1 if kind == "deconv3" else 0 for s in strides]
            width = self.out_channels
            self.deconv = cls(channels, width, kernel, self.strides, padding, output_padding=extra)

    def folded_weight(self) -> Tensor:
        """The kernel (C_in, C_out, *k) of the transposed convolution: k is 4 along axes of stride 2, else 3.

        Let (w0, w1, w2) be the kernel along an axis. At stride 2, output 2i sees input i - 1 through w0 and
        input i through w1 + w2; output 2i + 1 sees input i through w0 + w1 and input i + 1 through w2. At
        stride 1 a transposed convolution has the kernel in reverse order. Computed anew at each call, since
        every optimizer step changes the weights.
        """
        weight = self.conv.weight
        kernel = weight.transpose(0, 1).to(torch.promote_types(weight.dtype, torch.float32))
        for axis, stride in enumerate(self.strides, start=2):
            w0, w1, w2 = kernel.unbind(axis)
            kernel = torch.stack((w2, w1 + w2, w0 + w1, w0) if stride == 2 else (w2, w1, w0), axis)
        return kernel.to(weight.dtype)  # half precision is rounded once, after the sums

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("deconv"):
            return self.deconv(x)
        scale = [float(s) for s in self.strides]
        if self.kind == "trilinear":
            mode = "bilinear" if self.dims == 2 else "trilinear"
            return self.conv(F.interpolate(x, scale_factor=scale, mode=mode))
        # Folding costs as much as convolving some 2000 voxels: in training, small tensors are repeated
        if torch.is_grad_enabled() and x[:, 0].numel() * math.prod(self.strides) < 2048:
            return self.conv(F.interpolate(x, scale_factor=scale, mode="nearest"))
        return self.folded(x)

    def folded(self, x: Tensor, padding: int | Sequence[int] = 1) -> Tensor:
        """`forward` of the kind "nearest"; a padding above 1 leaves out results at the ends of a slab."""
        transposed = F.conv_transpose2d if self.dims == 2 else F.conv_transpose3d
        return transposed(x, self.folded_weight(), self.conv.bias, self.strides, padding)


class Resize(nn.Module):
    """(B, C, *S) at half or double the size along the axes of stride 2, without weights.

    "mean" averages neighbouring voxels, "repeat" repeats each voxel.
    """

    def __init__(self, strides: Sequence[int], kind: Literal["mean", "repeat"]):
        super().__init__()
        self.strides, self.kind = tuple(strides), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "repeat":
            return F.interpolate(x, scale_factor=[float(s) for s in self.strides], mode="nearest")
        return (F.avg_pool2d if x.ndim == 4 else F.avg_pool3d)(x, self.strides)


class Rescale(nn.Module):
    """Intensities from one range to another: x -> low' + (x - low) (high' - low') / (high - low)."""

    def __init__(self, source: Sequence[float], target: Sequence[float]):
        super().__init__()
        self.scale = (target[1] - target[0]) / (source[1] - source[0])
        self.shift = target[0] - source[0] * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class SpaceToDepth(nn.Module):
    """Neighbouring voxels become channels: (B, C, *(f S)) -> (B, C prod(f), *S), f = `factor` per axis.

    Nothing is lost: `DepthToSpace` is the inverse.
    """

    def __init__(self, factor: Sequence[int]):
        super().__init__()
        self.factor = tuple(factor)

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.factor)
        split = [n for size, f in zip(x.shape[2:], self.factor, strict=True) for n in (size // f, f)]
        x = x.reshape(*x.shape[:2], *split)  # (B, C, S_1, f_1, S_2, f_2, ...)
        factors, sizes = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
        x = x.permute(0, 1, *factors, *sizes).flatten(1, 1 + dims)  # (B, C f_1 f_2 .., S_1, S_2, ...)
        # `flatten` gives the usual layout, and the convolutions that follow would keep it. In training that
        # costs nothing; without gradients it costs copies of the largest maps
        return x if torch.is_grad_enabled() else channels_last(x)


class DepthToSpace(nn.Module):
    """Channels become neighbouring voxels: (B, C prod(f), *S) -> (B, C, *(f S)), f = `factor` per axis."""

    def __init__(self, factor: Sequence[int]):
        super().__init__()
        self.factor = tuple(factor)

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.factor)
        x = x.unflatten(1, (-1, *self.factor))  # (B, C, f_1, .., S_1, ..)
        x = x.permute(0, 1, *(a for i in range(dims) for a in (2 + dims + i, 2 + i)))  # (B, C, S_1, f_1, ..)
        for axis in range(2, 2 + dims):
            x = x.flatten(axis, axis + 1)
        return x


# --- trunks of the autoencoders -----------------------------------------------------------------------------


def trunk_options(config: Any) -> dict[str, Any]:
    """The arguments that encoder and decoder of a VAEConfig have in common."""
    levels = len(config.channels)
    return {
        "channels": config.channels,
        "num_res_blocks": per_level(config.num_res_blocks, levels),
        "attention_levels": per_level(config.attention_levels, levels),
        "strides": level_strides(config),
        "stem": per_level(config.stem, config.dims),
        "mid_attention": config.mid_attention,
        "image_range": config.image_range,
        "num_groups": config.num_groups,
        "eps": config.gn_eps,
        "attn_out_proj": config.attn_out_proj,
        "final_silu": config.final_silu,
        "shortcut": config.shortcut,
        "checkpointing": config.checkpointing,
    }


def middle(dims: int, width: int, attn_out_proj: bool, **norm: Any) -> list[nn.Module]:
    """ResBlock, attention, ResBlock: what a trunk may have at the coarsest level."""
    return [
        ResBlock(dims, width, width, **norm),
        AttentionBlock(width, **norm, out_proj=attn_out_proj),
        ResBlock(dims, width, width, **norm),
    ]


def walk(layers: nn.ModuleList, x: Tensor, final_silu: bool, checkpointing: bool) -> Tensor:
    """Run the layers of a trunk on x; a norm is computed together with the convolution that follows it."""
    x, norm = channels_last(x), None
    for layer in layers:
        if isinstance(layer, GroupNorm):
            norm = layer
        elif norm is not None:
            x, norm = norm_conv(norm, layer, x, silu=final_silu), None
        else:
            x = run_layer(layer, x, checkpointing=checkpointing)
    return x.contiguous()


class Trunk(nn.Module):
    """What encoders and decoders have in common: a flat list of `layers`, one after the other. The layers of
    a `shortcut`, where there are any, run from the input too, and both results are added."""

    def __init__(self, final_silu: bool, checkpointing: bool):
        super().__init__()
        self.final_silu, self.checkpointing = final_silu, checkpointing
        self.layers, self.shortcut = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        y = walk(self.layers, x, self.final_silu, self.checkpointing)
        return y + walk(self.shortcut, x, False, False) if self.shortcut else y


class Encoder(Trunk):
    """The trunk from image to latent: (B, in_channels, *S) -> (B, out_channels, *(S / strides / stem)).

    S must be divisible by strides * stem. Order of `layers`, with those in brackets if the settings say so:
    [rescale], [space-to-depth], conv; for every level num_res_blocks x (ResBlock, [attention]), then
    Downsample except at the last; [ResBlock, attention, ResBlock]; norm, [SiLU, which is no layer], conv.

    shortcut: beside the layers, one linear map takes the voxels of a latent voxel to this latent voxel. The
    layers then need only learn what a linear map cannot, so that images are sharp much sooner. Compare Chen
    et al. 2024 (arXiv 2410.10733), section 3.1, whose shortcuts have no weights, and one for each level.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        num_res_blocks: Sequence[int],
        attention_levels: Sequence[bool],
        strides: Sequence[Sequence[int]],
        stem: Sequence[int],
        mid_attention: bool = False,
        image_range: Sequence[float] = SCALED,
        num_groups: int = 32,
        eps: float = 1e-6,
        attn_out_proj: bool = True,
        down_pad: Literal["asym", "sym"] = "asym",
        final_silu: bool = False,
        shortcut: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__(final_silu, checkpointing)
        norm = {"num_groups": num_groups, "eps": eps}
        layers: list[nn.Module] = [] if image_range == SCALED else [Rescale(SCALED, image_range)]
        layers += [SpaceToDepth(stem)] if max(stem) > 1 else []
        layers.append(Conv(dims, in_channels * math.prod(stem), channels[0]))
        width = channels[0]
        for level, level_width in enumerate(channels):
            for _ in range(num_res_blocks[level]):
                layers.append(ResBlock(dims, width, level_width, **norm))
                width = level_width
                if attention_levels[level]:
                    layers.append(AttentionBlock(width, **norm, out_proj=attn_out_proj))
            if level < len(channels) - 1:
                layers.append(Downsample(dims, width, strides[level], down_pad))
        if mid_attention:
            layers += middle(dims, width, attn_out_proj, **norm)
        layers += [GroupNorm(width, **norm), Conv(dims, width, out_channels)]
        self.layers.extend(layers)
        if shortcut:
            factor = total_strides(stem, *strides)
            voxels = in_channels * math.prod(factor)
            self.shortcut.extend([SpaceToDepth(factor), Conv(dims, voxels, out_channels, kernel=1)])


class Decoder(Trunk):
    """The trunk from latent to image: (B, in_channels, *S) -> (B, out_channels, *(S * strides * stem)).

    Order of `layers`: conv; [ResBlock, attention, ResBlock]; for every level from the coarsest
    (num_res_blocks + extra_up_block) x (ResBlock, [attention]), then Upsample except at the last; norm,
    [SiLU, which is no layer], conv, [depth-to-space], [rescale]. Arguments with a value per level are in the
    encoder's order, finest level first. shortcut: as in the encoder, from a latent voxel to its voxels; zero
    at first.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        num_res_blocks: Sequence[int],
        attention_levels: Sequence[bool],
        strides: Sequence[Sequence[int]],
        stem: Sequence[int],
        mid_attention: bool = False,
        image_range: Sequence[float] = SCALED,
        num_groups: int = 32,
        eps: float = 1e-6,
        attn_out_proj: bool = True,
        upsample: UpsampleKind = "nearest",
        extra_up_block: bool = False,
        final_silu: bool = False,
        shortcut: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__(final_silu, checkpointing)
        norm = {"num_groups": num_groups, "eps": eps}
        width = channels[-1]
        layers: list[nn.Module] = [Conv(dims, in_channels, width)]
        if mid_attention:
            layers += middle(dims, width, attn_out_proj, **norm)
        for level in reversed(range(len(channels))):
            for _ in range(num_res_blocks[level] + extra_up_block):
                layers.append(ResBlock(dims, width, channels[level], **norm))
                width = channels[level]
                if attention_levels[level]:
                    layers.append(AttentionBlock(width, **norm, out_proj=attn_out_proj))
            if level > 0:
                layers.append(Upsample(dims, width, strides[level - 1], upsample))
        layers += [GroupNorm(width, **norm), Conv(dims, width, out_channels * math.prod(stem))]
        if max(stem) > 1:
            layers.append(DepthToSpace(stem))
        if image_range != SCALED:
            layers.append(Rescale(image_range, SCALED))
        self.layers.extend(layers)
        if shortcut:
            factor = total_strides(stem, *strides)
            voxels = Conv(dims, in_channels, out_channels * math.prod(factor), kernel=1, zero_init=True)
            self.shortcut.extend([voxels, DepthToSpace(factor)])


class PlainTrunk(Trunk):
    """A trunk without norms: convolutions, transposed convolutions and residual units, with ReLU after each.

    Every level halves (encoder) or doubles (decoder) all axes by a convolution of kernel 4. `layers` is one
    flat list, as in `Encoder` and `Decoder`.
    """

    def __init__(self, layers: list[nn.Module], checkpointing: bool):
        super().__init__(False, checkpointing)
        self.layers.extend(layers)


def plain_units(config: Any) -> list[list[nn.Module]]:
    """The residual units of each level of a VAEConfig."""
    c, levels = config, len(config.channels)
    widths = c.channels if c.res_channels is None else per_level(c.res_channels, levels)
    nums = per_level(c.num_res_blocks, levels)
    return [
        [ResidualUnit(c.dims, channels, width) for _ in range(num)]
        for channels, width, num in zip(c.channels, widths, nums, strict=True)
    ]


def plain_encoder(config: Any, out_channels: int) -> PlainTrunk:
    """The plain encoder of a VAEConfig. Order of `layers`: [rescale]; for every level conv k4 s2, ReLU,
    num_res_blocks x ResidualUnit; conv."""
    c, width = config, config.in_channels
    layers: list[nn.Module] = [] if c.image_range == SCALED else [Rescale(SCALED, c.image_range)]
    for channels, units in zip(c.channels, plain_units(c), strict=True):
        layers += [Conv(c.dims, width, channels, kernel=4, stride=2, padding=1), nn.ReLU(), *units]
        width = channels
    return PlainTrunk([*layers, Conv(c.dims, width, out_channels)], c.checkpointing)


def plain_decoder(config: Any) -> PlainTrunk:
    """The plain decoder of a VAEConfig. Order of `layers`: conv; for every level from the coarsest
    num_res_blocks x ResidualUnit, transposed conv k4 s2, ReLU except at the last; [rescale]."""
    c, strides = config, (2,) * config.dims
    layers: list[nn.Module] = [Conv(c.dims, c.latent_channels, c.channels[-1])]
    finer = (c.in_channels, *c.channels[:-1])
    for channels, width, units in reversed(list(zip(c.channels, finer, plain_units(c), strict=True))):
        layers += [*units, Upsample(c.dims, channels, strides, "deconv4", width), nn.ReLU()]
    layers[-1:] = [] if c.image_range == SCALED else [Rescale(c.image_range, SCALED)]
    return PlainTrunk(layers, c.checkpointing)


# --- position and time --------------------------------------------------------------------------------------


def position_features(size: Sequence[int], num: int, device: torch.device) -> Tensor:
    """Where every voxel is, as (1, 2 num dims, *size): sin and cos of pi 2^k u, k < num, for each axis.

    u runs from -1 to 1 along the axis.
    """
    maps = []
    for axis, n in enumerate(size):
        u = (torch.arange(n, device=device) + 0.5) * (2 / n) - 1
        angles = math.pi * 2.0 ** torch.arange(num, device=device)[:, None] * u  # (num, n)
        both = torch.cat([angles.sin(), angles.cos()])
        maps.append(both.view(-1, *(n if a == axis else 1 for a in range(len(size)))).expand(-1, *size))
    return torch.cat(maps)[None]


def timestep_embedding(t: Tensor, dim: int, cos_first: bool = True, max_period: float = 10000.0) -> Tensor:
    """Time t (B,) on the 0..T scale as features (B, dim) in fp32 that a network can tell apart.

    They are cos and sin of t * max_period^(-i / half) for i = 0 .. half - 1, with half = dim // 2 (Vaswani et
    al. [3], section 3.5; Ho et al. 2020, arXiv 2006.11239). `cos_first` puts the cosines before the sines.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half)
    )
    angles = t.float()[:, None] * frequencies  # (B, half)
    parts = [angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))
