"""Convolution and group norm, the two layers that take nearly all time, and cheap ways to compute them.

    y = conv([silu](w (x - mean) / std + b)),   mean and std over a group of channels and all voxels

Group norm: Wu & He 2018, arXiv 1803.08494. On GPUs and under torch.compile both are the plain PyTorch
operations. On CPUs moving memory costs as much as arithmetic, so there are four other ways to the same
result. Each is faster by a measured amount (tests/benchmarks) and compared with the plain formula in
tests/test_normconv.py:

- `takes_slow_path`: small convolutions go to oneDNN too, where PyTorch would choose a slow kernel;
- `channels_last`: memory layout (B, *S, C), with a group norm of our own that is exact and fast in it;
- `norm_conv` in training: norm and SiLU are computed again in backward instead of being kept;
- `norm_conv_in_slabs` in inference: norm, SiLU and convolution of some planes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

RECOMPUTE_FROM = 2**20  # elements from which on norm and SiLU are computed again in backward
SLAB = 2**21  # elements above which norm and convolution run some planes at a time (CPU, inference)
SLICE = 2**20  # elements that `RowNorm` works on at a time, so that temporary results stay in the cache

# --- convolution ------------------------------------------------------------------------------------------


def takes_slow_path(x: Tensor, weight: Tensor) -> bool:
    """True where PyTorch would use its slow native kernel for a convolution that oneDNN can compute.

    PyTorch takes the slow kernel for a batch of one if the sample is small (at most 20480 elements over the
    channels and the first two axes) and the kernel at most 3 wide. `torch.mkldnn_convolution` calls oneDNN
    directly. It is not defined for compiled, traced, meta or fake tensors and not under autocast; all of
    these are left to PyTorch.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and is_eager(x)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and x.shape[0] == 1
        and math.prod(x.shape[:4]) <= 20480
        and min(weight.shape[-2:]) <= 3
    )


def needs_fp32(x: Tensor, weight: Tensor) -> bool:
    """True where oneDNN would give a wrong gradient of the weight: of a convolution of a thin volume, with
    fewer planes than the kernel, in bfloat16. It reads memory that nobody has written (PyTorch 2.13).
    Compiled networks are left to PyTorch."""
    if x.device.type != "cpu" or x.ndim != 5 or not is_eager(x) or not 1 < x.shape[2] < weight.shape[2]:
        return False
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return half == torch.bfloat16 and torch.is_grad_enabled()


def is_eager(x: Tensor) -> bool:
    """True for a real tensor that is neither compiled nor traced."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class Conv(nn.Module):
    """Convolution over the last `dims` axes; without `padding`, stride 1 keeps the size.

    `keeps_size` is true if the output has the size of the input: stride 1, and half the kernel as padding.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        zero_init: bool = False,
    ):
        super().__init__()
        plain = (nn.Conv2d if dims == 2 else nn.Conv3d)(in_channels, out_channels, kernel)
        self.weight, self.bias = plain.weight, plain.bias  # (C_out, C_in, k, k[, k]), (C_out,)
        self.stride = (stride,) * dims if isinstance(stride, int) else tuple(stride)
        padding = kernel // 2 if padding is None else padding
        self.padding = (padding,) * dims if isinstance(padding, int) else tuple(padding)
        self.pointwise = kernel == 1 and max(self.stride) == 1
        self.keeps_size = max(self.stride) == 1 and {2 * p + 1 for p in self.padding} == {kernel}
        self.convolve = F.conv2d if dims == 2 else F.conv3d
        if zero_init:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, padding: Sequence[int] | None = None) -> Tensor:
        """x (B, C_in, *S); `padding` replaces the layer's own where x is a slab with its neighbours."""
        padding = self.padding if padding is None else padding
        if self.pointwise and is_channels_last(x):  # a matrix product of rows (n, C_in), without any copy
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        if takes_slow_path(x, self.weight):
            one = (1,) * len(self.stride)
            return torch.mkldnn_convolution(x, self.weight, self.bias, padding, self.stride, one, 1)
        if needs_fp32(x, self.weight):
            with torch.autocast("cpu", enabled=False):
                y = self.convolve(x.float(), self.weight.float(), self.bias.float(), self.stride, padding)
            return y.to(torch.bfloat16)
        return self.convolve(x, self.weight, self.bias, self.stride, padding)

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}, stride={self.stride}"


# --- channels-last tensors ----------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """The same values (B, C, *S), on the CPU in the memory layout (B, *S, C); a view where C is 1.

    oneDNN re-orders any other layout at every convolution, which takes a third of the time on large maps.
    PyTorch's group norm is inexact in this layout and slow in backward, hence `RowNorm`.
    """
    if x.device.type != "cpu" or not is_eager(x):
        return x
    if x.shape[1] == 1 and x.is_contiguous():  # one channel: both layouts are the same, strides must say so
        return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))
    return x.contiguous(memory_format=last_format(x))


def is_channels_last(x: Tensor) -> bool:
    """True for an eager CPU tensor with the memory layout (B, *S, C)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=last_format(x))


def last_format(x: Tensor) -> torch.memory_format:
    """PyTorch's name of the channels-last layout for 2-D or 3-D images x."""
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def rows_of(x: Tensor) -> Tensor:
    """Channels-last x (B, C, S_1, ...) as rows of channels (B, S_1, n, C), n voxels a plane; a view."""
    return x.movedim(1, -1).flatten(2, -2)


def plane_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows_of` channels-last tensors of one shape, some planes at a time: (B, planes, n, C) each.

    A slice has about SLICE elements: small enough to stay in the cache, large enough that threads seldom
    wait for each other.
    """
    views = [rows_of(x) for x in tensors]
    step = max(1, SLICE // views[0][:, 0].numel())
    for start in range(0, views[0].shape[1], step):
        yield tuple(view[:, start : start + step] for view in views)


def sum_rows(rows: Tensor) -> Tensor:
    """Sums (B, C) over planes and voxels of rows (B, planes, n, C): a plane in fp32, planes in float64."""
    return rows.sum(2).double().sum(1)


def group_mean(values: Tensor, groups: int) -> Tensor:
    """Every channel's value in (B, C) replaced by the mean over the channel's group."""
    grouped = values.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


class GroupStatistics:
    """Gathers what group norm needs to know of a map (B, C, *S), some planes at a time.

    Differences to the first voxel are summed, and the sums of planes are added in float64, so that a large
    mean costs no precision, and it does not matter to fp32 how many planes come at a time.
    """

    def __init__(self) -> None:
        self.origin: Tensor | None = None  # (B, 1, 1, C), the first voxel
        self.first, self.second, self.n = 0.0, 0.0, 0  # sums (B, C) of differences and squares; voxels

    def add(self, x: Tensor) -> None:
        """Add planes x (B, C, planes, ...), in any memory layout; channels-last is fast on CPUs."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.origin is None:
            self.origin = x.flatten(2)[:, None, None, :, 0].to(dtype)
        for (rows,) in plane_slices(x):
            d = rows.to(dtype) - self.origin
            self.first = self.first + sum_rows(d)
            self.second = self.second + sum_rows(d.square_())
        self.n += x[0, 0].numel()

    def mean_rstd(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """(mean, 1 / std) of each channel's group, both (B, 1, 1, C), in fp32 (float64 for float64 x)."""
        first, second, dtype = self.first / self.n, self.second / self.n, self.origin.dtype
        mean = self.origin[:, 0, 0].double() + first  # (B, C) of every channel
        of_group = group_mean(mean, groups)
        variance = group_mean(second - first.square() + (mean - of_group).square(), groups)
        return of_group.to(dtype)[:, None, None], (variance + eps).rsqrt().to(dtype)[:, None, None]


def row_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`GroupStatistics.mean_rstd` of channels-last x (B, C, *S)."""
    statistics = GroupStatistics()
    statistics.add(x)
    return statistics.mean_rstd(groups, eps)


class RowNorm(torch.autograd.Function):
    """Group norm, then SiLU if `silu`, of a channels-last CPU tensor, slice by slice, in fp32 for any input.

    Forward:  x_hat = (x - mean) / std,   p = weight x_hat + bias,   y = silu(p) or p
    Backward: with g = dL/dp, n voxels, and < > the mean over a group's channels and voxels,
              dL/dweight = sum g x_hat,   dL/dbias = sum g,
              dL/dx = (weight g - <weight g> - x_hat <weight g x_hat>) / std

    The formulas are those of batch norm (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3) with groups in
    place of the batch. There are no second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        mean, rstd = row_statistics(x, groups, eps)
        scale, shift = weight * rstd, bias - weight * mean * rstd  # (B, 1, 1, C)
        out = torch.empty_like(x)
        for rows, target in plane_slices(x, out):
            y = torch.addcmul(shift, rows.to(scale.dtype), scale)
            target.copy_(F.silu(y, inplace=True) if silu else y)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, n, dtype = torch.empty_like(x), x[0, 0].numel(), mean.dtype
        sum_g, sum_gx = 0.0, 0.0  # (B, C)
        for rows, g, target in plane_slices(x, grad.contiguous(memory_format=last_format(x)), dx):
            x_hat, g = (rows.to(dtype) - mean).mul_(rstd), g.to(dtype)
            if ctx.silu:
                p = torch.addcmul(bias, x_hat, weight)
                g = torch.ops.aten.silu_backward.grad_input(g, p, grad_input=p)
            target.copy_(g)
            sum_g = sum_g + sum_rows(g)
            sum_gx = sum_gx + sum_rows(x_hat.mul_(g))
        mean_g = (group_mean(weight * sum_g, ctx.groups) / n).to(dtype)[:, None, None]  # <weight g>
        mean_gx = (group_mean(weight * sum_gx, ctx.groups) / n).to(dtype)[:, None, None]  # <weight g x_hat>
        for_g, for_x = weight * rstd, -rstd.square() * mean_gx  # dL/dx = for_g g + for_x x + rest
        rest = -rstd * mean_g - for_x * mean
        for rows, target in plane_slices(x, dx):
            y = torch.addcmul(rest, rows.to(dtype), for_x)
            target.copy_(y.addcmul_(target.to(dtype), for_g))
        return dx, sum_gx.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype), None, None, None


# --- group norm, and the two together -----------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """Group norm, then SiLU if `silu`; mean and std are computed in fp32 for every input type.

    The number of groups is the largest one up to `num_groups` that divides the channels: of 48 channels and
    32 groups asked for, 24.
    """

    def __init__(self, channels: int, num_groups: int = 32, eps: float = 1e-6):
        groups = max(g for g in range(1, min(num_groups, channels) + 1) if channels % g == 0)
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if is_channels_last(x):
            return RowNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        # Not F.group_norm, which refuses a group of a single value (batch 1, one voxel, as many groups as
        # channels); such a value becomes the bias, as it does in a batch of two
        y = torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        # In place where no gradient is needed: a fresh allocation costs more than the arithmetic
        return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def norm_conv(norm: GroupNorm, conv: Conv, x: Tensor, silu: bool = True) -> Tensor:
    """conv([silu](norm(x))) by the way that costs the least time and memory; any `conv`.

    In training a large x is kept for backward, but not norm(x) and silu(norm(x)): these are cheap to compute
    again. The recomputation ends before the convolution, since only the input of the convolution was missing.
    torch.compile makes the same choice by itself.
    """
    if torch.is_grad_enabled():
        if torch.compiler.is_compiling() or x.numel() < RECOMPUTE_FROM:
            return conv(norm(x, silu))
        return checkpoint(lambda y: conv(norm(y, silu)), x, use_reentrant=False, preserve_rng_state=False)
    if is_channels_last(x) and x.numel() > SLAB and conv.keeps_size:
        return norm_conv_in_slabs(norm, conv, x, silu)
    return conv(norm(x, silu))


def norm_conv_in_slabs(norm: GroupNorm, conv: Conv, x: Tensor, silu: bool) -> Tensor:
    """`norm_conv` of a channels-last tensor without gradient, some planes at a time.

    The result is exact: mean and std are those of the whole tensor, and every slab has as many planes more on
    either side as the kernel reaches. The normalised planes of a slab stay in the cache, and no memory beyond
    the result is taken. `conv` must keep the size (stride 1, half the kernel as padding).
    """
    mean, rstd = row_statistics(x, norm.num_groups, norm.eps)
    scale, shift = norm.weight * rstd, norm.bias - norm.weight * mean * rstd  # (B, 1, 1, C)
    rows, depth, reach = rows_of(x), x.shape[2], conv.padding[0]  # rows (B, S_1, n, C)
    step = max(1, SLAB // rows[:, 0].numel())
    out: Tensor | None = None
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        y = torch.addcmul(shift, rows[:, max(start - reach, 0) : stop + reach].to(scale.dtype), scale)
        y = (F.silu(y, inplace=True) if silu else y).to(x.dtype)
        # Planes of zeros beyond the first and the last plane: the convolution's own padding
        ends = max(reach - start, 0), max(stop + reach - depth, 0)
        y = F.pad(y, (0, 0, 0, 0, *ends)) if any(ends) else y
        part = conv(y.unflatten(2, x.shape[3:]).movedim(-1, 1), padding=(0, *conv.padding[1:]))
        if out is None:
            size = (x.shape[0], part.shape[1], *x.shape[2:])
            out = torch.empty(size, dtype=part.dtype, device=x.device, memory_format=last_format(x))
        out[:, :, start:stop] = part
    return out
