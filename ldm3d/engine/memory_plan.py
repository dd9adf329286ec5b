"""How much memory a run needs, before a GPU is used, and how long a step takes: --plan of the scripts.

A job, such as one training step, runs once on fake tensors (torch._subclasses.FakeTensorMode). Fake tensors
have a shape and a type but no data, so this takes about a second on the CPU at any size. Every storage that
an operator makes is counted from birth to death:

    peak = copies * weights + max over time of the bytes of all other tensors alive
    copies = 1, in training 4: weights, EMA, and the two moments of AdamW (all fp32); of frozen weights 1.
             Muon has one moment, so that a plan for Muon is on the safe side

The second term holds gradients, inputs and outputs of each operator, autocast's copies of the weights, and
the activations kept for the backward pass. The backward pass runs too, so the activations that checkpointed
blocks compute again are counted.

An autoencoder without gradients is counted as streaming.py counts it, not on fake tensors: on a CPU its
norms and convolutions go through a map slab by slab, which fake tensors do not.

Not counted: workspaces inside a kernel (cuDNN, oneDNN), the CUDA context, on a CPU what the interpreter and
its packages own, fragmentation of the allocator, and DDP's buckets (one more copy of the weights). So a plan
uses only 90 % of what is left after 0.7 GiB.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import InputError
from .distributed import choose_device, gather
from .machine import free_bytes
from .training import EMA, OptimConfig, RunConfig, Stepper, autocast

GIB = 2**30
CPU = torch.device("cpu")
CONTEXT = 0.7 * GIB  # of the memory, not usable for tensors
USABLE = 0.9  # the fraction of the rest that a plan may fill


# --- accounting ---------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """In this mode the bytes of every new storage are counted: `live` now, `peak` at most."""

    def __init__(self, existing: Sequence[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.storages = {t.untyped_storage()._cdata: None for t in existing}  # not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def die(_: Any) -> None:
            del self.storages[key]
            self.live -= size

        self.storages[key] = weakref.ref(storage, die)
        self.live += size
        self.peak = max(self.peak, self.live)


def like_gpu(net: nn.Module) -> None:
    """Make `net` need on the CPU what it needs on a GPU: norms in fp32 under autocast, dropout fused into
    attention."""
    for module in net.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        elif hasattr(module, "num_heads"):  # an attention layer
            module.dropout = 0.0


def peak_bytes(
    make: Callable[[], nn.Module], work: Callable[[nn.Module], Any], gpu: bool = True
) -> tuple[int, int]:
    """(bytes of the weights of net = make(), most bytes of other tensors during work(net)). No memory is
    allocated."""
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        net = make()
        if gpu:
            like_gpu(net)
        weights = [*net.parameters(), *net.buffers()]
        live = modes.enter_context(LiveBytes(weights))
        work(net)
    return weight_bytes(net), live.peak


def free_memory(device: torch.device) -> float:
    """GiB that tensors could take on this device now, the least over the ranks."""
    return min(gather(free_bytes(device))) / GIB


def weight_bytes(net: nn.Module) -> int:
    return sum(t.nbytes for t in [*net.parameters(), *net.buffers()])


# --- the plan -----------------------------------------------------------------------------------------------

Make = Callable[[], nn.Module]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One row of a plan. need(batch, size): bytes. batch, size (*S): what the run asks for. step: the sides
    of a size are multiples of this number. make, loss, rounds, mix: of training, `MemoryTable.training`.
    whole, least: of inference in several ways, the bytes of the first and of the leanest."""

    name: str
    need: Callable[[int, Size], int]
    batch: int
    size: Size
    step: int
    make: Make | None = None
    loss: Callable[[Any, int, Size], Tensor] | None = None
    rounds: int = 1
    mix: Sequence[tuple[float, Size]] = ()
    whole: Callable[[int, Size], int] | None = None
    least: Callable[[int, Size], int] | None = None

    def seconds(self, optim: OptimConfig, run: RunConfig, device: torch.device, num: int = 3) -> float:
        """How long an optimizer step of this training takes on `device`: the median of `num`, after a first
        one that warms up; the longest over the ranks. With a mix of sizes: their mean."""
        sizes = self.mix or [(1.0, self.size)]
        return sum(share * self._seconds(size, optim, run, device, num) for share, size in sizes)

    def _seconds(
        self, size: Size, optim: OptimConfig, run: RunConfig, device: torch.device, num: int
    ) -> float:
        net = self.make().to(device)
        stepper, ema, taken = Stepper(net, optim, run, 1, device), EMA(net, run.ema_decay), []
        for step in range(1 + num):
            start = time.perf_counter()
            for _ in range(self.rounds):
                with torch.device(device), autocast(run.amp, device):
                    value = self.loss(net, self.batch, size)
                stepper.backward(value / self.rounds)
            stepper.step(step)
            ema.update(net, step)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return max(gather(statistics.median(taken[1:])))


class MemoryTable:
    """The jobs of a run on one device of `budget` GiB, none = as much as is free. device: "auto" is this
    machine's; "cuda" with a budget is a GPU that need not be here."""

    def __init__(self, budget: float | None, amp: str = "auto", device: str = "auto"):
        if budget is None or device == "auto":
            chosen = choose_device(device)
            budget, device = free_memory(chosen) if budget is None else budget, chosen.type
        if budget * GIB <= CONTEXT:
            raise InputError(f"memory: expected more than {CONTEXT / GIB:.1f} GiB, got {budget:g}")
        if budget > 1e6:
            raise InputError(f"memory: expected the GiB of one device, got {budget:g}")
        self.budget, self.gpu = budget, not device.startswith("cpu")
        self.amp = ("bf16" if self.gpu else "fp32") if amp == "auto" else amp
        self.room = USABLE * (budget * GIB - CONTEXT)  # for tensors
        self.jobs: list[Job] = []

    def training(
        self,
        name: str,
        make: Make,
        loss: Callable[[Any, int, Size], Tensor],
        batch: int,
        size: Size,
        step: int = 1,
        rounds: int = 1,
        beside: int = 0,
        mix: Sequence[tuple[float, Size]] = (),
    ) -> Job:
        """Add training on loss(net, batch, size), a scalar, in steps of `rounds` micro-batches. beside: bytes
        that other things take. mix: (fraction of the steps, their size), where not all have the largest."""

        def need(batch: int, size: Size) -> int:
            frozen: list[int] = []  # bytes of the weights that have neither EMA nor moments

            def work(net: nn.Module) -> None:
                frozen.append(sum(p.nbytes for p in net.parameters() if not p.requires_grad))
                for _ in range(min(2, rounds)):  # the second round adds to the gradients of the first
                    with autocast(self.amp, CPU):
                        value = loss(net, batch, size)
                    value.backward()

            weights, rest = peak_bytes(make, work, self.gpu)
            return 4 * weights - 3 * frozen[-1] + rest + beside

        return self._add(Job(name, need, batch, size, step, make, loss, rounds, mix))

    def inference(
        self,
        name: str,
        make: Make,
        call: Callable[[Any, int, Size], Any],
        batch: int,
        size: Size,
        step: int = 1,
        beside: int = 0,
        ways: Sequence[Callable[[bool], AbstractContextManager]] = (),
    ) -> Job:
        """Add call(net, batch, size) without gradients. ways: contexts, of whether it is a GPU, in each of
        which the call takes less memory and more time than before (streaming.STREAMED). The first that fits
        is taken."""

        def in_way(way: Callable[[bool], AbstractContextManager]) -> Callable[[int, Size], int]:
            def need(batch: int, size: Size) -> int:
                def work(net: nn.Module) -> None:
                    with torch.inference_mode(), autocast(self.amp, CPU), way(self.gpu):
                        call(net, batch, size)

                return sum(peak_bytes(make, work, self.gpu)) + beside

            return functools.cache(need)

        needs = [in_way(way) for way in ways or (lambda _: nullcontext(),)]

        def need(batch: int, size: Size) -> int:
            for way in needs:
                if (num_bytes := way(batch, size)) <= self.room:
                    break
            return num_bytes

        def least(batch: int, size: Size) -> int:
            n = needs[-1](batch, size)
            return n if n <= self.room else min(n, needs[0](batch, size))

        return self._add(Job(name, need, batch, size, step, whole=needs[0], least=least))

    def _add(self, job: Job) -> Job:
        self.jobs.append(replace(job, need=functools.cache(job.need)))
        return self.jobs[-1]

    def fits(self, job: Job) -> bool:
        """Does what the run asks for fit?"""
        return job.need(job.batch, job.size) <= self.room

    @property
    def training_fits(self) -> bool:
        return all(self.fits(job) for job in self.jobs if job.loss)

    @property
    def inference_fits(self) -> bool:
        return all(self.fits(job) for job in self.jobs if not job.loss)

    def seconds_per_step(self, optim: OptimConfig, run: RunConfig, device: torch.device) -> float:
        """How long all optimizers' steps take together, measured on this machine."""
        return sum(job.seconds(optim, run, device) for job in self.jobs if job.loss)

    def largest_batch(self, job: Job) -> int:
        """The largest batch of the job's size that fits, to 1 %; 0 if none does."""
        need = job.least or job.need
        return self._largest(lambda batch: need(batch, job.size), job.batch, power=1)

    def largest_cube(self, job: Job) -> int:
        """The longest side, in steps, of a cube that fits at the job's batch, to 1 %; 0 if none does."""
        dims, need = len(job.size), job.least or job.need
        side = round(math.prod(job.size) ** (1 / dims) / job.step)
        return job.step * self._largest(lambda n: need(job.batch, (n * job.step,) * dims), side, dims)

    def _largest(self, need: Callable[[int], int], start: int, power: int) -> int:
        """The largest n with need(n) <= room, to 1 %. The need is nearly affine in n^power: secants come
        close, then n goes down or up in steps of 1 %."""
        low, n = max(1, start), 2 * max(1, start)
        for _ in range(4):
            slope = (need(n) - need(low)) / (n**power - low**power)
            better = max(1.0, n**power + (self.room - need(n)) / slope) ** (1 / power)
            low, n = n, max(1, int(better))
            if low == n:
                break
        while n > 0 and need(n) > self.room:
            n -= max(1, n // 100)
        while n > 0 and need(n + max(1, n // 100)) <= self.room:
            n += max(1, n // 100)
        return n

    def print(self) -> None:
        """Print what each job needs, and the largest batch and the largest cube that would fit."""
        device, room = "GPU" if self.gpu else "CPU", self.room / GIB
        print(f"plan for a {device} of {self.budget:.4g} GiB, {room:.1f} of them for tensors, in {self.amp}")
        print(f"{'':38}{'needs':>8}   {'largest batch':>14}{'largest cube':>14}")
        for job in self.jobs:
            need = job.need(job.batch, job.size)
            what = f"{job.name} {job.batch} x {'x'.join(map(str, job.size))}"
            cube = self.largest_cube(job)
            side = f"{cube}^{len(job.size)}" if cube else "none"
            verdict = "" if need <= self.room else "   does not fit"
            if job.whole and need < (whole := job.whole(job.batch, job.size)):
                verdict = f"   in slabs, {whole / GIB:.2f} whole" + verdict.replace("  ", ";")
            batch = self.largest_batch(job) or "none"
            print(f"{what:38}{need / GIB:>8.2f}   {batch:>14}{side:>14}{verdict}", flush=True)


def encode(net: Any, batch: int, size: Size) -> None:
    """An autoencoder's encoding of images of this size, as a job of a plan."""
    net.encode(torch.zeros(batch, net.config.in_channels, *size))


def decode(net: Any, batch: int, size: Size) -> None:
    """An autoencoder's decoding of images of this size, as a job of a plan."""
    net.decode(torch.zeros(batch, *net.latent_shape(size)), size)
