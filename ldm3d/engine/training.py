"""The parts of a training loop, without the loop: learning rate, randomness, optimizer step, EMA, means.

Each script owns its loop and calls these parts. One step is

    for batch, fraction in micro_batches(group, model, device, seed, step):
        loss = ...                                            # (B,), one value a sample
        stepper.backward(loss.mean() * fraction)              # gradients add up over micro-batches and ranks
        mean.add(loss=loss)                                   # for the log
    if stepper.step(step):                                    # False where something was not finite
        ema.update(net, step)

with
    learning rate   lr * scaling(batch_size) * warm-up(step) * schedule(step)
    EMA             ema <- d ema + (1 - d) net,   d = min(decay, (1 + step) / (10 + step))

Randomness: a run counts its samples, and the sample at position p = step * batch_size + i draws its noise,
its time, its augmentation from generators seeded with (seed, p, purpose). Module dropout is seeded with
(seed, step, rank, micro-batch). So the numbers do not depend on how a step is spread over ranks,
micro-batches and workers, no random state is stored, and a resumed run draws what an uninterrupted run would
have drawn.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import InputError, at_least
from .distributed import (
    all_reduce_sum,
    any_rank,
    gather,
    keyed_generator,
    no_sync,
    print0,
    rank,
    world_size,
)
from .logger import Profile
from .muon import Muon, split_parameters

# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = None  # run folder; none = runs/<kind>-<preset>
    steps: int = 1000  # optimizer steps
    seed: int = 0  # seed of all randomness, the split included
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    compile: bool = False  # torch.compile the networks
    deterministic: bool = False  # bit-exact GPU kernels (slower)
    workers: int = 0  # data-loading processes per rank
    keep: int = 2  # number of newest checkpoints to keep
    init: str | None = None  # start a new run from the weights of this checkpoint or run
    fresh: bool = False  # move an existing run folder aside and start anew
    save_every: int = 500  # steps from one checkpoint to the next
    log_every: int = 20  # steps from one line of the log to the next
    eval_every: int = 500  # steps from one validation to the next
    patience: int = 0  # stop after this many validations without a new best; 0 = never
    ema_decay: float = 0.999  # decay of the averaged weights, which validation, best.pt and sampling use
    max_bad_steps: int = 20  # stop after this many non-finite steps in a row
    tensorboard: bool = False  # write TensorBoard files too (extra "viz")
    profile: bool = False  # write a torch.profiler trace of three steps, print the ten slowest operators

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "keep", "save_every", "log_every", "eval_every", "max_bad_steps")
        at_least(self, 0, "workers", "patience")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: expected 0 <= decay < 1, got {self.ema_decay}")


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices, beside AdamW, at thrice its lr
    lr: float = 1e-4  # peak learning rate
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's moment decays
    weight_decay: float = 0.0  # decoupled weight decay
    warmup_steps: int = 0  # linear warm-up from 0
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # course of lr after the warm-up
    min_lr_ratio: float = 0.0  # cosine: last learning rate / lr
    milestones: tuple[int, ...] = ()  # multistep: steps at which lr is multiplied by gamma
    gamma: float = 0.1  # multistep factor
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"  # scale lr with batch_size / reference_batch_size
    reference_batch_size: int = 8  # batch size for which lr was chosen
    grad_clip: float | None = 1.0  # largest norm of the whole gradient; none = no clipping

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("lr", self.lr > 0, "> 0"),
            ("adam_betas", all(0 <= b < 1 for b in self.adam_betas), "two numbers from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, ">= 0"),
            ("warmup_steps", self.warmup_steps >= 0, ">= 0"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "> 0 or none"),
            ("reference_batch_size", self.reference_batch_size > 0, "> 0"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "0 to 1"),
            ("gamma", 0 < self.gamma <= 1, "above 0, up to 1"),
            ("milestones", self.schedule != "multistep" or self.milestones, "steps, for schedule multistep"),
        ):
            if not fine:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)}")


def check_schedule(flags: dict[str, Any], name: str, config: OptimConfig) -> None:
    """Refuse a flag that the schedule of lr has no use for. flags: by dotted key, such as "optim.gamma".
    name: of the configuration, such as "optim"."""
    for setting, schedule in (
        ("milestones", "multistep"),
        ("gamma", "multistep"),
        ("min_lr_ratio", "cosine"),
    ):
        if f"{name}.{setting}" in flags and config.schedule != schedule:
            raise InputError(
                f"{name}.{setting}: has no effect with {name}.schedule {config.schedule}, it needs {schedule}"
            )


def lr_at(step: int, steps: int, config: OptimConfig, batch_size: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`."""
    ratio = batch_size / config.reference_batch_size
    lr = config.lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[config.lr_scaling]
    if step < config.warmup_steps:
        return lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    if config.schedule == "multistep":
        return lr * config.gamma ** sum(step >= m for m in config.milestones)
    return lr


# --- randomness keyed by the sample -------------------------------------------------------------------------


def keyed_normal(seed: int, positions: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Gaussian noise (B, *shape) on the CPU; the sample at each of `positions` (B,) has its own generator."""
    rows = [torch.randn(shape, generator=keyed_generator(seed, int(p), purpose)) for p in positions]
    return torch.stack(rows)


def keyed_uniform(seed: int, positions: Tensor, purpose: str) -> Tensor:
    """Uniform numbers (B,) in [0, 1) on the CPU; the sample at each of `positions` has its own generator."""
    return torch.cat([torch.rand(1, generator=keyed_generator(seed, int(p), purpose)) for p in positions])


def stratified_uniform(seed: int, positions: Tensor, batch_size: int, purpose: str) -> Tensor:
    """Uniform numbers (B,) in [0, 1), of which those of a batch are evenly apart: (u + i / batch_size) mod 1
    for sample i, with one u for the batch.

    Each number is as uniform as one of `keyed_uniform`. But no batch has small numbers alone, or large ones,
    so that a mean over the batch varies less. Kingma et al. 2021 (arXiv 2107.00630), appendix I.1.
    """
    step, i = positions // batch_size, positions % batch_size
    return (keyed_uniform(seed, step, purpose) + i / batch_size) % 1


def reseed(*key: int) -> None:
    """Seed the global generators, which draw initial weights and module dropout, with any numbers."""
    seed, position, *rest = key
    torch.manual_seed(keyed_generator(seed, position, f"modules{rest}").initial_seed())


# --- precision ----------------------------------------------------------------------------------------------


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that --run.amp means on this device; None is fp32."""
    if amp == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "fp32" if device.type == "cpu" else "bf16" if native else "fp16"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision as --run.amp says; nothing for fp32."""
    dtype = amp_dtype(amp, device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


# --- the optimizer step -------------------------------------------------------------------------------------


class Stepper:
    """The optimizer step of one network: AdamW, or Muon beside AdamW; learning rate, loss scaler, clipping.

    `backward` is called once a micro-batch, `step` once an optimizer step. Where the loss or the gradient is
    not finite on some rank, all ranks leave their weights alone. `run.max_bad_steps` such steps in a row
    raise InputError.
    """

    def __init__(
        self, net: nn.Module, config: OptimConfig, run: RunConfig, batch_size: int, device: torch.device
    ):
        self.net, self.config, self.run, self.batch_size = net, config, run, batch_size
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        matrices, others = [], self.parameters
        if config.optimizer == "muon":
            matrices, others = split_parameters(net)
            if not matrices:
                print0("note: optim.optimizer muon has no matrix to train here, AdamW trains all weights")
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if others:
            self.optimizers["optimizer"] = torch.optim.AdamW(
                others, config.lr, config.adam_betas, weight_decay=config.weight_decay, fused=True
            )
        if matrices:
            self.optimizers["muon"] = Muon(matrices, config.lr, config.weight_decay)
        scaled = amp_dtype(run.amp, device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.device, self.bad_in_a_row, self.skipped = device, 0, 0
        self.grad_norm = math.nan
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss."""
        self.loss_is_finite = self.loss_is_finite & torch.isfinite(loss.detach())
        self.scaler.scale(loss).backward()

    def step(self, step: int) -> bool:
        """Apply the accumulated gradient. False if it was skipped because something was not finite."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, self.run.steps, self.config, self.batch_size)
            self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.grad_norm = float(norm)
        fine = not any_rank(not (math.isfinite(self.grad_norm) and bool(self.loss_is_finite)))
        if fine:
            if self.config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            self.bad_in_a_row = 0
        # Halved on all ranks, whether or not they saw an overflow themselves: their scales must stay equal
        self.scaler.update(None if fine else 0.5 * self.scaler.get_scale())
        if not fine:
            self._count_bad(step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.loss_is_finite = torch.ones_like(self.loss_is_finite)
        return fine

    def _count_bad(self, step: int) -> None:
        """Name what was not finite (the loss, else the first gradient); stop after too many bad steps."""
        self.bad_in_a_row += 1
        self.skipped += 1
        named = ((n, p.grad) for n, p in self.net.named_parameters() if p.grad is not None)
        first = next((f"the gradient of {n}" for n, g in named if not torch.isfinite(g).all()), None)
        everyone = gather(first if self.loss_is_finite else "the loss")
        found = [(what != "the loss", number, what) for number, what in enumerate(everyone) if what]
        _, number, culprit = min(found, default=(True, 0, "the norm of the gradient"))
        culprit += f" on rank {number}" if world_size() > 1 else ""
        scale = f", the loss scale is now {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        row = f"{self.bad_in_a_row} in a row"
        print0(f"step {step}: {culprit} is not finite; the step is skipped ({row}{scale})")
        if self.bad_in_a_row >= self.run.max_bad_steps:
            raise InputError(
                f"stopped: {self.bad_in_a_row} steps in a row were not finite, lastly {culprit} at step "
                f"{step}; the last checkpoint is good. Look at the data of these steps, or go on from it in "
                "a new run (--run.init FOLDER --run.dir NEW) with a lower optim.lr or another run.amp"
            )

    def report(self) -> dict[str, float]:
        """For the log: learning rate and gradient norm of the last step, non-finite steps so far."""
        lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return {"lr": lr, "grad_norm": self.grad_norm, "skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "bad_in_a_row": self.bad_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.bad_in_a_row, self.skipped = state["bad_in_a_row"], state["skipped"]


class EMA:
    """An exponential moving average of a network's weights, in a network of its own. Buffers are copied.
    Frozen weights are shared, since their average is what they are."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        shared = {id(p): p for p in net.parameters() if not p.requires_grad}
        self.net = copy.deepcopy(net, shared).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.net.parameters(), net.parameters(), strict=True)
        mine, theirs = zip(*((a, b.detach()) for a, b in pairs if b is not a), strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)


class Mean:
    """Means of scalars over samples, exact over ranks and micro-batches; a part of the checkpoint.

    Sums and counts stay on the device until `pop`, so `add` never waits for a GPU.
    """

    def __init__(self) -> None:
        self.table: dict[str, Tensor] = {}  # name -> (sum, count), float64

    def add(self, **values: Tensor) -> None:
        """Add the values (B,) of B samples, or a scalar as one sample. NaN values are left out."""
        for name, value in values.items():
            flat = value.detach().double().reshape(-1)
            there = ~flat.isnan()
            pair = torch.stack([torch.where(there, flat, 0.0).sum(), there.sum().double()])
            self.table[name] = self.table[name].to(pair.device) + pair if name in self.table else pair

    def pop(self) -> dict[str, float]:
        """The means over all ranks since the last call; sums start again at 0. Called by all ranks; a rank
        may have added nothing."""
        names = sorted(set().union(*gather(list(self.table))))
        nothing = torch.zeros(2, dtype=torch.float64)
        rows = [self.table.get(name, nothing).cpu() for name in names]
        sums = all_reduce_sum(torch.stack(rows)).tolist() if names else []
        self.table = {}
        return {name: total / n if n else math.nan for name, (total, n) in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The sums of every rank, apart: one joint sum could differ in the last digit. Called by all
        ranks."""
        return {"ranks": gather({name: pair.tolist() for name, pair in self.table.items()})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each rank loads its own sums; a different number of ranks deals the stored sums out in turn."""
        self.table = {}
        for sums in state["ranks"][rank() :: world_size()]:
            for name, pair in sums.items():
                self.table[name] = self.table.get(name, 0) + torch.tensor(pair, dtype=torch.float64)


class Speed:
    """What the steps since the last line of the log cost: samples per second over all ranks and, on this
    rank, the fraction of time spent waiting for data and the peak memory (of the process; on a GPU of its
    tensors).

    A step lasts from the request of its data to `stop`; evaluation, saving and logging are not counted.
    """

    def __init__(self, batch_size: int, device: torch.device, profile: Profile | None = None):
        self.batch_size, self.device, self.profile = batch_size, device, profile
        self.began = self.seconds = self.waited = 0.0
        self.steps = 0

    def watch(self, stream: Iterable) -> Iterator:
        """The items of `stream`; the time until each item comes is counted as waiting."""
        items = iter(stream)
        while True:
            self.began = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            self.waited += time.perf_counter() - self.began
            yield item

    def stop(self) -> None:
        """The optimizer step is done."""
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        if self.profile is not None:
            self.profile.step()

    def pop(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        report = {"samples_per_s": self.steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        self.seconds, self.waited, self.steps = 0.0, 0.0, 0
        return {k: round(v, 4) for k, v in {**report, "peak_gib": peak_bytes(self.device) / 2**30}.items()}


def peak_bytes(device: torch.device) -> int:
    """Most memory so far, in bytes: of the tensors on a GPU, of this process on a CPU. 0 on Windows, which
    does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):
        # Linux. Not getrusage: what it tells a process is at least the peak of the one that started it
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def micro_batches(
    batches: list[dict[str, Any]], model: nn.Module, device: torch.device, seed: int, step: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """This rank's micro-batches of one step, each on `device` and with its fraction of the rank's samples.

    The sum of fraction * loss.mean() over micro-batches is the mean over the rank's samples, and DDP takes
    the mean over ranks, in the backward pass of the last micro-batch only. Example: a rank with 6 samples in
    micro-batches of 4 and 2 has the fractions 2/3 and 1/3. Module dropout is keyed by (seed, step, rank, i).
    """
    total = sum(len(b["position"]) for b in batches)
    for i, batch in enumerate(batches):
        reseed(seed, step, rank(), i)
        with no_sync(model, last=i == len(batches) - 1):
            yield to_device(batch, device), len(batch["position"]) / total


@contextlib.contextmanager
def frozen(net: nn.Module | None) -> Iterator[None]:
    """In this block `net` is a fixed function: gradients pass through, but its parameters get none. `net` may
    be None."""
    trained = [p for p in net.parameters() if p.requires_grad] if net is not None else []
    for parameter in trained:
        parameter.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on `device`, in nested dicts too."""
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def samples_per_forward(batch_size: int, micro_batch_size: int | None) -> int:
    """The samples of one forward pass on one rank; InputError if the ranks cannot divide the batch."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    if batch_size % world_size():
        next_one = -(-batch_size // world_size()) * world_size()
        raise InputError(
            f"batch_size: {batch_size} samples, those of all ranks, do not divide over {world_size()} ranks; "
            f"--batch_size {next_one} does"
        )
    own = batch_size // world_size()
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InputError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
    return min(own, micro_batch_size or own)
