"""The two layers that take nearly all time, convolution and group norm, and cheap ways to compute them.

    y = conv([silu](w (x - mean) / std + b)),   mean and std over a group of channels and all voxels

Group norm: Wu & He 2018, arXiv 1803.08494. On GPUs and under torch.compile these are the plain PyTorch
operations. On CPUs, where memory traffic and fresh allocations cost as much as arithmetic, there are four
equivalents, each faster by a measured amount (see tests/benchmarks) and compared with the plain formula in
tests/test_normconv.py:

- `takes_slow_path`: oneDNN also for the small convolutions that PyTorch gives to a slow kernel;
- `channels_last`: memory layout (B, *S, C), with a group norm of our own that is exact and fast in it;
- `norm_conv` in training: norm and SiLU are not kept for backward but computed again;
- `norm_conv_in_slabs` in inference: norm, SiLU and convolution, some planes at a time.
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

RECOMPUTE_FROM = 2**20  # elements: norm and SiLU of smaller tensors are kept for backward, which is faster
SLAB = 2**21  # elements: larger CPU tensors go through norm and convolution some planes at a time
SLICE = 2**20  # elements of a slice of rows in `RowNorm`, to stay in the cache

# --- convolution ------------------------------------------------------------------------------------------


def takes_slow_path(x: Tensor, weight: Tensor) -> bool:
    """Whether eager PyTorch would run this fp32 CPU convolution by its slow native kernel instead of oneDNN.

    ATen does so for one small sample and kernels up to 3. `torch.mkldnn_convolution` has no kernel for
    compiled, traced, meta and fake tensors, which must not see it, nor under autocast.
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


def is_eager(x: Tensor) -> bool:
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class Conv(nn.Module):
    """Convolution over the last `dims` axes; `padding` defaults to half the kernel ("same" for stride 1)."""

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
        """`padding` replaces the layer's own, for a slab whose neighbours are given."""
        padding = self.padding if padding is None else padding
        if self.pointwise and is_channels_last(x):  # a matrix product of rows, without any copy
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        if takes_slow_path(x, self.weight):
            one = (1,) * len(self.stride)
            return torch.mkldnn_convolution(x, self.weight, self.bias, padding, self.stride, one, 1)
        return self.convolve(x, self.weight, self.bias, self.stride, padding)

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}, stride={self.stride}"


# --- channels-last tensors ----------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, *S) with the memory layout (B, *S, C), on the CPU only; a view if there is one channel.

    oneDNN convolutions re-order any other layout at every call; on large maps that is a third of their time.
    The norms of such tensors have to be ours: PyTorch's are inexact in this layout and slow in backward.
    """
    if x.device.type != "cpu" or not is_eager(x):
        return x
    if x.shape[1] == 1 and x.is_contiguous():  # PyTorch would not see that this is channels-last already
        return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))
    return x.contiguous(memory_format=last_format(x))


def is_channels_last(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=last_format(x))


def last_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def rows_of(x: Tensor) -> Tensor:
    """Channels-last (B, C, S_1, ...) -> (B, S_1, n, C), a view: n voxels in each of the S_1 planes."""
    return x.movedim(1, -1).flatten(2, -2)


def plane_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows_of` channels-last tensors, some planes at a time: (B, planes, n, C) each.

    Temporary results of that size stay in the cache, and the slices are few enough for the threads to meet
    rarely.
    """
    views = [rows_of(x) for x in tensors]
    step = max(1, SLICE // views[0][:, 0].numel())
    for start in range(0, views[0].shape[1], step):
        yield tuple(view[:, start : start + step] for view in views)


def sum_rows(rows: Tensor) -> Tensor:
    """(B, planes, n, C) fp32 -> (B, C) float64: sums of planes in fp32, added in float64."""
    return rows.sum(2).double().sum(1)


def group_mean(values: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, C): the mean over each group, at each of its channels."""
    grouped = values.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def row_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Channels-last (B, C, *S) -> (mean, 1 / std) of each channel's group, (B, 1, 1, C), fp32 at least.

    Sums of differences to one voxel, added in float64, so that a large mean costs no precision.
    """
    dtype, n = torch.promote_types(x.dtype, torch.float32), x[0, 0].numel()
    origin = x.flatten(2)[:, None, None, :, 0].to(dtype)  # (B, 1, 1, C)
    first, second = 0.0, 0.0
    for (rows,) in plane_slices(x):
        d = rows.to(dtype) - origin
        first = first + sum_rows(d)
        second = second + sum_rows(d.square_())
    mean = origin[:, 0, 0].double() + first / n  # (B, C) of every channel
    of_group = group_mean(mean, groups)
    variance = group_mean(second / n - (first / n).square() + (mean - of_group).square(), groups)
    return of_group.to(dtype)[:, None, None], (variance + eps).rsqrt().to(dtype)[:, None, None]


class RowNorm(torch.autograd.Function):
    """Group norm, then SiLU if `silu`, of a channels-last CPU tensor; fp32 inside, slice by slice.

    With x^ = (x - mean) / std, p = w x^ + b, y = silu(p) and g = dL/dp: dL/dw = sum g x^, dL/db = sum g, and
    dL/dx = (w g - <w g> - x^ <w g x^>) / std, where < > is the mean over the group (as for batch norm, Ioffe
    & Szegedy 2015, arXiv 1502.03167, section 3). No second derivatives.
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
        mean_g = (group_mean(weight * sum_g, ctx.groups) / n).to(dtype)[:, None, None]  # <w g>
        mean_gx = (group_mean(weight * sum_gx, ctx.groups) / n).to(dtype)[:, None, None]  # <w g x^>
        for_g, for_x = weight * rstd, -rstd.square() * mean_gx  # dx = for_g g + for_x x + rest
        rest = -rstd * mean_g - for_x * mean
        for rows, target in plane_slices(x, dx):
            y = torch.addcmul(rest, rows.to(dtype), for_x)
            target.copy_(y.addcmul_(target.to(dtype), for_g))
        return dx, sum_gx.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype), None, None, None


# --- group norm, and the two together -----------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """Group norm, then SiLU if asked; statistics in fp32 for every input type.

    The number of groups is the largest one up to `num_groups` that divides the channels.
    """

    def __init__(self, channels: int, num_groups: int = 32, eps: float = 1e-6):
        groups = max(g for g in range(1, min(num_groups, channels) + 1) if channels % g == 0)
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if is_channels_last(x):
            return RowNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        y = super().forward(x)
        # In place where no gradient is wanted: a fresh allocation costs more than the arithmetic
        return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def norm_conv(norm: GroupNorm, conv: Conv, x: Tensor, silu: bool = True) -> Tensor:
    """conv([silu](norm(x))) by the way that costs the least time and memory.

    In training only a large `x` is kept: norm and SiLU are cheap, so backward computes them again. The
    checkpoint stops as soon as all saved tensors exist again, which is before the convolution. Compile does
    this by itself.
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
