"""Encoders and decoders on volumes that are larger than memory: the same numbers, some planes at a time.

The decoder of a CT of 512 x 512 x 400 voxels holds maps of 32 and 64 channels at full resolution, 12 GiB and
more each. Cutting the volume into tiles and blending them is inexact: group norm needs mean and standard
deviation of the whole map, and tiles have their own. Here nothing is approximated. The flat list of layers of
a trunk is walked layer by layer, and each layer slab by slab along the first axis (D; rows of 2-D images):

    slab            planes start .. stop - 1 of a map (1, C, *S); about SLAB elements
    convolution     a slab of the result needs the same planes of the input, and as many more on either side
                    as the kernel reaches; beyond the volume there are zeros, the layer's own padding
    group norm      sums over each slab, added in float64 while the map is written (normconv.GroupStatistics);
                    the next layer starts when the map is complete, so it knows mean and std of all of it
    attention       the whole map at once: attention belongs to coarse levels, where maps are small

Not every map has to exist. A map is `Stored`, or it is `Computed` whenever some of its planes are read: an
up-sampled map is eight times as large as its source and quickly made, so it never exists. What exists of the
finest level at once:

    whole           input, result and intermediate results of every layer: 3 to 5 maps
    slabs           two: x and h of a residual block; the result is written into the place of h
    recompute       one: h is computed twice, first for its statistics, then where the result needs it; the
                    result is written into the place of x
    offload         none: both maps of "slabs" lie in files of the temporary folder (TMPDIR), or for a GPU in
                    the memory of its host

`run_trunk` chooses the first of these that fits the memory. Example: the decoder of the preset hippocampus
makes a volume of 512^3 from maps of 32 channels at 256^3 (its stem does the rest), 2 GiB each in fp32. By
the count of `peaks`, that takes 12.6 GiB whole on a CPU, 5.6 GiB in slabs, 3.6 GiB with recomputation and
0.6 GiB beside files.

Differences to the whole computation are of rounding only (2e-5 in fp32), and between slabs of one thickness
and another below 1e-6: the statistics of a map do not depend on the slabs, bit for bit, but a library may
choose another kernel for a convolution of another shape. Nothing here has gradients.
"""

from __future__ import annotations

import functools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import (
    AttentionBlock,
    DepthToSpace,
    Downsample,
    ResBlock,
    Rescale,
    ResidualUnit,
    SpaceToDepth,
    Trunk,
    Upsample,
)
from ..config import InputError
from ..engine.distributed import print0
from ..engine.logger import progress
from ..engine.machine import free_bytes
from ..normconv import Conv, GroupNorm, GroupStatistics, channels_last, is_eager

GIB = 2**30
SLAB = 2**21  # elements of a map that are computed at a time: few enough to stay in the cache
USABLE = 0.9  # the fraction of the memory that a choice may fill

Mode = Literal["whole", "slabs", "recompute", "offload"]

# --- maps ---------------------------------------------------------------------------------------------------


class Map:
    """A map (1, C, *S) that is read some planes at a time.

    statistics: its sums for group norm, if known. plane: the elements that one plane of it, or of a map that
    it is computed from, takes: what the thickness of slabs follows from.
    """

    def __init__(self, channels: int, size: Sequence[int]):
        self.channels, self.size = channels, tuple(size)
        self.plane = channels * math.prod(size[1:])
        self.elements = self.plane * size[0]
        self.statistics: GroupStatistics | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Planes start .. stop - 1, (1, C, stop - start, ...), not to be changed in place."""
        raise NotImplementedError


class Input(Map):
    """A tensor x (1, C, *S) as a map."""

    def __init__(self, x: Tensor):
        super().__init__(x.shape[1], x.shape[2:])
        self.x = x

    def read(self, start: int, stop: int) -> Tensor:
        return channels_last(self.x[:, :, start:stop])


class Computed(Map):
    """A map that is computed whenever planes are read: compute(start, stop) gives them.

    What was read last is kept. So slabs with neighbours on either side, read one after the other, compute no
    plane twice. step: planes are computed in multiples of this number.
    """

    def __init__(
        self,
        source: Map,
        channels: int,
        size: Sequence[int],
        compute: Callable[[int, int], Tensor],
        step: int = 1,
    ):
        super().__init__(channels, size)
        self.plane = max(self.plane, source.plane * source.size[0] // size[0])
        self.compute, self.step = compute, step
        self.kept, self.first, self.end = None, 0, 0  # planes first .. end - 1

    def read(self, start: int, stop: int) -> Tensor:
        if self.kept is None or not self.first <= start < self.end:
            self.kept, self.first, self.end = None, start, start
        if stop > self.end:
            end = min(-(-stop // self.step) * self.step, self.size[0])
            part = self.compute(self.end, end)
            if self.kept is not None:
                part = torch.cat([self.kept[:, :, start - self.first :], part], 2)
            self.kept, self.first, self.end = part, start, end
        return self.kept[:, :, start - self.first : stop - self.first]


class Stored(Map):
    """A map kept in the memory of `device`, plane after plane, in the layout (S_1, ..., C)."""

    def __init__(self, channels: int, size: Sequence[int], device: torch.device):
        super().__init__(channels, size)
        self.device, self.planes = device, None

    def read(self, start: int, stop: int) -> Tensor:
        return self.planes[:, start:stop].movedim(-1, 1).to(self.computed_on, non_blocking=True)

    def write(self, start: int, part: Tensor) -> None:
        if self.planes is None:
            self.computed_on = part.device
            self.planes = torch.empty(1, *self.size, self.channels, dtype=part.dtype, device=self.device)
        self.planes[:, start : start + part.shape[2]] = part.movedim(1, -1)


class Filed(Map):
    """A map kept in a nameless file of the temporary folder, in the same layout.

    The file is read and written, not mapped to memory: mapped pages would count as memory of the process.
    """

    def __init__(self, channels: int, size: Sequence[int]):
        super().__init__(channels, size)
        self.file, self.dtype = tempfile.TemporaryFile(), None  # noqa: SIM115 (it lives as long as the map)

    def read(self, start: int, stop: int) -> Tensor:
        planes = torch.empty(1, stop - start, *self.size[1:], self.channels, dtype=self.dtype)
        self.file.seek(start * planes[0, 0].nbytes)
        self.file.readinto(planes.view(torch.uint8).numpy())
        return planes.movedim(-1, 1)

    def write(self, start: int, part: Tensor) -> None:
        planes, self.dtype = part.movedim(1, -1).contiguous(), part.dtype
        try:
            self.file.seek(start * planes[0, 0].nbytes)
            self.file.write(planes.view(torch.uint8).numpy())
            self.file.flush()
        except OSError as e:
            gib = self.size[0] * planes[0, 0].nbytes / GIB
            folder = tempfile.gettempdir()
            raise InputError(
                f"{folder}: no room for a map of {gib:.2g} GiB ({e.strerror}); see TMPDIR"
            ) from None


# --- slabs of one layer -------------------------------------------------------------------------------------


def convolved(conv: Conv, x: Map, prepare: Callable[[Tensor], Tensor], ends: Sequence[int] = ()) -> Computed:
    """conv(prepare(x)) as a map, where `prepare` acts on every voxel alone.

    ends: what a `Downsample` pads beforehand (`end_padding`), the last axis first, pairs (before, after).
    """
    dims = len(x.size)
    ends = list(ends) or [0] * (2 * dims)
    kernel, stride, before = conv.weight.shape[2], conv.stride[0], conv.padding[0]

    def compute(start: int, stop: int) -> Tensor:
        first = stride * start - before  # input planes that the kernel sees: first .. last - 1
        last = stride * (stop - 1) - before + kernel
        y = prepare(x.read(max(first, 0), min(last, x.size[0])))
        missing = max(-first, 0), max(last - x.size[0], 0)
        pads = [*ends[:-2], *missing]
        y = F.pad(y, pads) if any(pads) else y
        return conv(y, padding=(0, *conv.padding[1:]))

    padded = [n + e + 2 * p for n, e, p in zip(x.size, ends[1::2][::-1], conv.padding, strict=True)]
    shape = conv.weight.shape
    size = [(n - k) // s + 1 for n, k, s in zip(padded, shape[2:], conv.stride, strict=True)]
    return Computed(x, shape[0], size, compute)


def unchanged(part: Tensor) -> Tensor:
    return part


def upsampled(layer: Upsample, x: Map) -> Computed:
    """The up-sampled map: the layer on planes of x with a neighbour on either side, without the results that
    would need further neighbours."""
    stride, depth, others = layer.strides[0], x.size[0], (1,) * (len(x.size) - 1)

    def compute(start: int, stop: int) -> Tensor:
        first, last = start // stride - 1, -(-stop // stride) + 1  # planes of x: first .. last - 1
        part, missing = x.read(max(first, 0), min(last, depth)), (max(-first, 0), max(last - depth, 0))
        if layer.kind == "nearest":  # the results of the neighbours themselves are not computed
            part = F.pad(part, [0, 0] * len(others) + [*missing]) if any(missing) else part
            y, first = layer.folded(part, padding=(1 + stride, *others)), first + 1
        else:
            y, first = layer(part), max(first, 0)
        return y[:, :, start - stride * first : stop - stride * first]

    size = [n * s for n, s in zip(x.size, layer.strides, strict=True)]
    return Computed(x, layer.out_channels, size, compute, step=stride)


def to_depth(layer: SpaceToDepth, x: Map) -> Computed:
    f = layer.factor
    size = [n // s for n, s in zip(x.size, f, strict=True)]
    return Computed(
        x, x.channels * math.prod(f), size, lambda start, stop: layer(x.read(f[0] * start, f[0] * stop))
    )


def to_space(layer: DepthToSpace, x: Map) -> Computed:
    f = layer.factor

    def compute(start: int, stop: int) -> Tensor:
        first = start // f[0]
        y = layer(x.read(first, -(-stop // f[0])))
        return y[:, :, start - f[0] * first : stop - f[0] * first]

    return Computed(x, x.channels // math.prod(f), [n * s for n, s in zip(x.size, f, strict=True)], compute)


def voxelwise(layer: Rescale | nn.ReLU, x: Map) -> Computed:
    return Computed(x, x.channels, x.size, lambda start, stop: layer(x.read(start, stop)))


def unit(block: ResidualUnit, x: Map) -> Computed:
    """A residual unit, which has no norm: a slab needs nothing but two planes on either side."""
    y = convolved(block.conv2, convolved(block.conv1, x, unchanged), F.relu)
    return Computed(
        x, x.channels, x.size, lambda start, stop: F.relu(y.read(start, stop) + x.read(start, stop))
    )


COMPUTED = {
    **{Upsample: upsampled, SpaceToDepth: to_depth, DepthToSpace: to_space},
    **dict.fromkeys((Rescale, nn.ReLU), voxelwise),
}

# --- whole trunks -------------------------------------------------------------------------------------------


class Stream:
    """Walks a trunk slab by slab, on `device`, with maps as `mode` says."""

    def __init__(self, mode: Mode, device: torch.device):
        self.mode, self.device = mode, device
        self.room: Tensor | None = None

    def slabs(self, *maps: Map) -> Iterator[tuple[int, int]]:
        """(start, stop) of slabs of maps of one size; of two planes or more, which `overwrite` counts on."""
        step, depth = max(2, SLAB // max(m.plane for m in maps)), maps[0].size[0]
        return ((start, min(start + step, depth)) for start in range(0, depth, step))

    def offloads(self, like: Map) -> bool:
        """True if a map of this size is kept outside the memory."""
        return self.mode == "offload" and like.elements > SLAB

    def empty(self, like: Map) -> Stored | Filed:
        """A new map of this size, without content yet."""
        if self.offloads(like) and self.device.type == "cpu":
            return Filed(like.channels, like.size)
        device = torch.device("cpu") if self.offloads(like) else self.device
        return Stored(like.channels, like.size, device)

    def store(self, *sources: Map) -> list[Stored | Filed]:
        """Maps of one size, stored side by side with their statistics."""
        targets = [self.empty(source) for source in sources]
        for target in targets:
            target.statistics = GroupStatistics()
        for start, stop in self.slabs(*sources):
            for source, target in zip(sources, targets, strict=True):
                part = source.read(start, stop)
                target.statistics.add(part)
                target.write(start, part)
        return targets

    def overwrite(self, target: Stored | Filed, source: Map) -> Stored | Filed:
        """Write `source` into the place of `target`, from which it is computed.

        Planes start .. stop - 1 of the source may depend on planes of the target from start - 2 on. So a slab
        is written only when the next slab has been computed.
        """
        statistics, waiting = GroupStatistics(), None
        for start, stop in self.slabs(source):
            part = source.read(start, stop)
            statistics.add(part)
            if waiting is not None:
                target.write(*waiting)
            waiting = start, part
        target.write(*waiting)
        target.statistics = statistics
        return target

    def normed(self, x: Map, norm: GroupNorm, silu: bool = True) -> Callable[[Tensor], Tensor]:
        """Group norm, then SiLU if `silu`, as a function of planes of x, with mean and std of all of x.

        A result is valid until the next call, of any layer, which takes the same memory, `room`: fresh memory
        for every slab costs as much as the arithmetic.
        """
        if x.statistics is None:
            x.statistics = GroupStatistics()
            for start, stop in self.slabs(x):
                x.statistics.add(x.read(start, stop))
        mean, rstd = (v.flatten() for v in x.statistics.mean_rstd(norm.num_groups, norm.eps))
        scale, shift = norm.weight * rstd, norm.bias - norm.weight * mean * rstd  # (C,)
        scale, shift = (v.view(1, -1, *(1,) * len(x.size)) for v in (scale, shift))

        def prepare(part: Tensor) -> Tensor:
            if self.room is None or self.room.shape != part.shape:
                self.room = None  # freed before the new one is made
                self.room = torch.empty_like(part, dtype=scale.dtype)
            y = torch.addcmul(shift, part.to(scale.dtype), scale, out=self.room)
            return (F.silu(y, inplace=True) if silu else y).to(part.dtype)

        return prepare

    def residual(self, block: ResBlock, x: Map) -> Stored | Filed:
        """A residual block: y = conv2(silu(norm2(h))) + skip(x), h = conv1(silu(norm1(x)))."""
        if block.skip is None and isinstance(x, Computed):
            (x,) = self.store(x)  # read as often as h: computing it each time would cost more
        h: Map = convolved(block.conv1, x, self.normed(x, block.norm1))
        skip = x if block.skip is None else convolved(block.skip, x, unchanged)
        if self.mode == "recompute" and block.skip is None:
            place = x
        elif self.mode != "recompute" and isinstance(x, Computed):
            h, skip = self.store(h, skip)  # each slab of x is computed once for both
            place = h
        else:
            (h,) = self.store(h)
            place = h
        conv2 = convolved(block.conv2, h, self.normed(h, block.norm2))

        def compute(start: int, stop: int) -> Tensor:
            return conv2.compute(start, stop).add_(skip.read(start, stop))

        return self.overwrite(place, Computed(h, h.channels, h.size, compute))

    def attended(self, layer: AttentionBlock, x: Map) -> Map:
        """Attention over all positions at once."""
        return self.store(Input(layer(x.read(0, x.size[0]))))[0]

    def apply(self, layer: nn.Module, x: Map, prepare: Callable[[Tensor], Tensor]) -> Map:
        """layer(prepare(x)); only a convolution has anything to prepare."""
        if isinstance(layer, Conv):
            return convolved(layer, x, prepare)
        if isinstance(layer, ResBlock):
            return self.residual(layer, x)
        if isinstance(layer, ResidualUnit):
            x = self.store(x)[0] if isinstance(x, Computed) else x  # read twice
            return self.store(unit(layer, x))[0]
        if isinstance(layer, AttentionBlock):
            return self.attended(layer, x)
        if isinstance(layer, Downsample):
            return self.store(convolved(layer.conv, x, unchanged, layer.end_padding or ()))[0]
        return COMPUTED[type(layer)](layer, x)

    def seen(self, trunk: Trunk) -> Iterable[nn.Module]:
        """The layers of a trunk, with a progress bar."""
        return progress(trunk.layers, f"{type(trunk).__name__.lower()} in slabs")

    def walk(self, trunk: Trunk, x: Map) -> Map:
        """The layers of a trunk, one after the other; the last results are computed when they are read."""
        y, prepare = x, unchanged
        for layer in self.seen(trunk):
            if isinstance(layer, GroupNorm):
                prepare = self.normed(y, layer, trunk.final_silu)
            else:
                y, prepare = self.apply(layer, y, prepare), unchanged
        if not trunk.shortcut:
            return y
        for layer in trunk.shortcut:
            x = self.apply(layer, x, unchanged)
        return Computed(y, y.channels, y.size, lambda a, b: y.read(a, b) + x.read(a, b))

    def run(self, trunk: Trunk, x: Tensor) -> Tensor:
        """trunk(x) of one sample x (1, C, *S), without gradients."""
        last, out = self.walk(trunk, Input(x)), None
        for start, stop in self.slabs(last):
            part = last.read(start, stop)
            out = part.new_empty(1, last.channels, *last.size) if out is None else out
            out[:, :, start:stop] = part
        return out


# --- the choice ---------------------------------------------------------------------------------------------

# Slabs that a convolution reads, normalises, computes, joins and keeps at a time; as many for up-sampling
SLABS = 5


class Trial(Stream):
    """The walk without the work, to count elements: `peak` of the maps that exist at once, `slab` of the
    largest slab, `whole` of what the largest layer would need at once without slabs."""

    def __init__(self, mode: Mode, device: torch.device):
        super().__init__(mode, device)
        self.live = self.peak = self.whole = 0
        self.slab = SLAB

    def store(self, *sources: Map) -> list[Map]:
        targets = [Map(source.channels, source.size) for source in sources]
        self.slab = max(self.slab, *(2 * source.plane for source in sources))
        for target in targets:
            elements = 0 if self.offloads(target) else target.elements
            self.live += elements
            weakref.finalize(target, self.free, elements)
        self.peak = max(self.peak, self.live)
        return targets

    def seen(self, trunk: Trunk) -> Iterable[nn.Module]:
        return trunk.layers

    def free(self, elements: int) -> None:
        self.live -= elements

    def overwrite(self, target: Map, source: Map) -> Map:
        return target

    def normed(self, x: Map, norm: GroupNorm, silu: bool = True) -> Callable[[Tensor], Tensor]:
        return unchanged

    def attended(self, layer: AttentionBlock, x: Map) -> Map:
        self.peak = max(self.peak, self.live + 8 * x.elements)  # norm, queries, keys, values, results
        return self.store(x)[0]

    def apply(self, layer: nn.Module, x: Map, prepare: Callable[[Tensor], Tensor]) -> Map:
        y = super().apply(layer, x, prepare)
        n, m = x.elements, y.elements
        # A GPU normalises whole maps. A down-sampling pads first
        normed = max(n, m) if self.device.type != "cpu" else 0
        need = {
            ResBlock: n + 2 * m + normed,
            AttentionBlock: 8 * n,
            Downsample: 2 * n + m,
            Conv: n + m + normed,
        }
        self.whole = max(self.whole, need.get(type(layer), n + m))
        return y


# Trunk -> type and shape of its input -> `peaks`: counting takes milliseconds, as much as encoding a patch on
# a GPU
KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, dict[Mode, int]]] = weakref.WeakKeyDictionary()


def dtype_of(trunk: nn.Module, x: Tensor) -> torch.dtype:
    """The type of the maps of trunk(x): that of the weights, or of autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return next(trunk.parameters()).dtype


def peaks(trunk: Trunk, x: Tensor) -> dict[Mode, int]:
    """About how many bytes trunk(x) takes at most in each mode, beside input x (1, C, *S) and result."""
    dtype = dtype_of(trunk, x)
    known, key = KNOWN.setdefault(trunk, {}), (dtype, x.device.type, x.shape[1:])
    if key not in known:
        known[key] = count_peaks(trunk, x, dtype, x.device)
    return known[key]


def count_peaks(trunk: Trunk, x: Tensor, dtype: torch.dtype, device: torch.device) -> dict[Mode, int]:
    """`peaks` for maps of this type on this device, which need not be here."""
    slabs, folded = SLABS, 0
    if any(isinstance(layer, Upsample) for layer in trunk.layers):
        slabs, folded = 2 * SLABS, 4 * max(p.nbytes for p in trunk.parameters())  # while a kernel is folded
    need: dict[Mode, int] = {"whole": 0}
    for mode in ("slabs", "recompute", "offload"):
        trial = Trial(mode, device)
        trial.walk(trunk, Input(x[:1]))
        need[mode] = trial.peak * dtype.itemsize + slabs * trial.slab * 4 + folded
        need["whole"] = trial.whole * dtype.itemsize + slabs * trial.slab * 4 + folded
    return need


REHEARSED: ContextVar[tuple[Mode, torch.device] | None] = ContextVar("rehearsed", default=None)


@contextmanager
def rehearsal(mode: Mode, gpu: bool) -> Iterator[None]:
    """In this context `run_trunk` computes nothing. It takes the memory that it would take in `mode`, on a
    GPU or a CPU, and gives a result of the right shape: on fake tensors, for engine/memory_plan.py.

    Whole on a GPU is no rehearsal: fake tensors count there what real ones take. On a CPU real ones take
    less, since norms and convolutions work slab by slab (normconv.py)."""
    rehearsed = None if gpu and mode == "whole" else (mode, torch.device("cuda" if gpu else "cpu"))
    token = REHEARSED.set(rehearsed)
    try:
        yield
    finally:
        REHEARSED.reset(token)


# The ways of `MemoryTable.inference` for autoencoders, in the order of `run_trunk`
STREAMED = tuple(functools.partial(rehearsal, mode) for mode in ("whole", "slabs", "recompute", "offload"))


def rehearse(trunk: Trunk, x: Tensor, mode: Mode, device: torch.device) -> Tensor:
    """What `run_trunk` does in a `rehearsal`."""
    dtype, last = dtype_of(trunk, x), Trial(mode, device).walk(trunk, Input(x[:1]))
    need, shape = count_peaks(trunk, x, dtype, device)[mode], (len(x), last.channels, *last.size)
    if mode == "whole":  # all samples at once; the largest layer is done before there is a result
        x.new_empty(len(x) * need, dtype=torch.uint8)  # counted, and freed at once
        return x.new_empty(shape, dtype=dtype)
    result = x.new_empty(shape, dtype=dtype)
    x.new_empty(need, dtype=torch.uint8)
    return result


def needs_gradient(trunk: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in trunk.parameters()))


WORDS = {
    "slabs": "in slabs",
    "recompute": "in slabs, some of them computed twice",
    "offload": "in slabs, with maps on disk (of a GPU: in the memory of its host)",
}
NOTED: set[tuple[str, str, Mode]] = set()  # what `note` has told, once, not for every case


def note(name: str, size: str, mode: Mode, need: dict[Mode, int], room: float) -> None:
    """Say how a trunk works on inputs of this size."""
    if (name, size, mode) not in NOTED:
        NOTED.add((name, size, mode))
        whole, most, least = (f"{v / GIB:.2g}" for v in (need["whole"], room, need[mode]))
        print0(f"note: {name} on {size}: {whole} GiB whole, {most} to use; {WORDS[mode]}, {least} GiB")


def choose(trunk: Trunk, x: Tensor, room: float) -> Mode:
    """The first mode whose need for one sample is no more than `room` bytes, else "offload"; noted."""
    need = peaks(trunk, x)
    mode = next((mode for mode, size in need.items() if size <= room), "offload")
    if mode != "whole":
        note(type(trunk).__name__.lower(), "x".join(map(str, x.shape[2:])), mode, need, room)
    return mode


def run_trunk(trunk: Trunk, x: Tensor, memory: float | None = None) -> Tensor:
    """trunk(x), whole if that fits into `memory` GiB, else slab by slab: (B, C, *S) -> (B, C', *S').

    memory: beside x and the result; none = 9 tenths of what is free. A note tells what is not whole. What
    needs gradients, or is compiled or traced, is always whole.
    """
    if torch.compiler.is_compiling():  # a graph cannot ask for the context below
        return trunk(x)
    if rehearsed := REHEARSED.get():
        return rehearse(trunk, x, *rehearsed)
    if not is_eager(x) or needs_gradient(trunk, x):
        return trunk(x)
    room = USABLE * free_bytes(x.device) if memory is None else memory * GIB
    if len(x) * peaks(trunk, x)["whole"] <= room:
        return trunk(x)
    mode = choose(trunk, x, room)
    with torch.no_grad():
        parts = [
            trunk(one) if mode == "whole" else Stream(mode, x.device).run(trunk, one) for one in x.split(1)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def trunk_planes(trunk: Trunk, x: Tensor, memory: float | None = None) -> Iterator[tuple[int, Tensor]]:
    """`run_trunk` of one sample x (1, C, *S), some planes of the result at a time: (first plane, planes
    (1, C', n, ...)). The result as a whole takes no memory, unless it is computed whole."""
    room = USABLE * free_bytes(x.device) if memory is None else memory * GIB
    mode = choose(trunk, x, room)
    if mode == "whole":
        yield 0, trunk(x)
        return
    stream = Stream(mode, x.device)
    last = stream.walk(trunk, Input(x))
    for start, stop in stream.slabs(last):
        yield start, last.read(start, stop)
