"""Parts of a training loop, without the loop: optimizer step, EMA, learning rate, keyed randomness, means.

Every script owns its loop and uses these small objects. All randomness is keyed by (seed, position, purpose),
so that a run depends on neither ranks, micro-batches nor workers, and nothing random need be stored.

    lr_t  = lr * scaling(batch) * warm-up(t) * schedule(t)
    EMA   : ema <- d ema + (1 - d) net, d = min(decay, (1 + step) / (10 + step))
"""

from __future__ import annotations

import contextlib
import copy
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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

# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = None  # run folder; none = runs/<kind>-<preset>
    steps: int = 1000  # optimizer steps
    seed: int = 0  # keys all randomness, the split included
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto = bf16 on a GPU that has it, fp32 on CPU
    compile: bool = False  # torch.compile the networks
    deterministic: bool = False  # bit-exact GPU kernels (slower)
    workers: int = 0  # data-loading processes per rank
    keep: int = 2  # numbered checkpoints that stay
    init: str | None = None  # start a new run from the weights of this checkpoint or run
    fresh: bool = False  # move an existing run folder aside and start anew
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between log lines
    eval_every: int = 500  # steps between validations
    patience: int = 0  # stop after this many validations without a better one; 0 = never
    ema_decay: float = 0.999  # of the weights that are evaluated, kept as best and sampled from
    max_bad_steps: int = 20  # non-finite steps in a row after which the run stops
    tensorboard: bool = False  # write TensorBoard files too (extra "viz")
    profile: bool = False  # write a torch.profiler trace of three steps and print the ten dearest operators

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "keep", "save_every", "log_every", "eval_every", "max_bad_steps")
        at_least(self, 0, "workers", "patience")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: expected 0 <= decay < 1, got {self.ema_decay}")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4  # peak learning rate of AdamW
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's moment decays
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    warmup_steps: int = 0  # linear warm-up from 0
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # after the warm-up
    min_lr_ratio: float = 0.0  # cosine ends at this share of lr
    milestones: tuple[int, ...] = ()  # multistep: steps at which lr is multiplied by gamma
    gamma: float = 0.1  # multistep factor
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"  # scale lr with batch_size / reference_batch_size
    reference_batch_size: int = 8  # batch size that lr was chosen for
    grad_clip: float | None = 1.0  # global gradient norm is cut to this; none = off

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
    """Gaussian noise (B, *shape) on the CPU, each sample's from its own generator."""
    rows = [torch.randn(shape, generator=keyed_generator(seed, int(p), purpose)) for p in positions]
    return torch.stack(rows)


def keyed_uniform(seed: int, positions: Tensor, purpose: str) -> Tensor:
    """Uniform numbers (B,) in [0, 1) on the CPU, each sample's from its own generator."""
    return torch.cat([torch.rand(1, generator=keyed_generator(seed, int(p), purpose)) for p in positions])


def reseed(*key: int) -> None:
    """Seed the global generators, which draw initial weights and module dropout, from any numbers."""
    seed, position, *rest = key
    torch.manual_seed(keyed_generator(seed, position, f"modules{rest}").initial_seed())


# --- precision ----------------------------------------------------------------------------------------------


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of the flag, or None for fp32."""
    if amp == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "fp32" if device.type == "cpu" else "bf16" if native else "fp16"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    dtype = amp_dtype(amp, device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


# --- the optimizer step -------------------------------------------------------------------------------------


class Stepper:
    """One network's AdamW with its learning rate, loss scaler, gradient clipping and guard against non-finite
    steps.

    `backward` is called once per micro-batch, `step` once per optimizer step. A step whose loss or gradient
    is not finite on any rank leaves the weights alone on all; a set number of them in a row raises
    InputError.
    """

    def __init__(
        self, net: nn.Module, config: OptimConfig, run: RunConfig, batch_size: int, device: torch.device
    ):
        self.net, self.config, self.run, self.batch_size = net, config, run, batch_size
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, config.adam_betas, weight_decay=config.weight_decay, fused=True
        )
        scaled = amp_dtype(run.amp, device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.device, self.bad_in_a_row, self.skipped = device, 0, 0
        self.grad_norm = math.nan
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=device)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's share of the loss."""
        self.loss_is_finite = self.loss_is_finite & torch.isfinite(loss.detach())
        self.scaler.scale(loss).backward()

    def step(self, step: int) -> bool:
        """Apply the accumulated gradient. False if it was skipped because something was not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.run.steps, self.config, self.batch_size)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.grad_norm = float(norm)
        fine = not any_rank(not (math.isfinite(self.grad_norm) and bool(self.loss_is_finite)))
        if fine:
            if self.config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
            self.scaler.step(self.optimizer)
            self.bad_in_a_row = 0
        # Halved on all ranks, whether or not they saw an overflow themselves: their scales must stay equal
        self.scaler.update(None if fine else 0.5 * self.scaler.get_scale())
        if not fine:
            self._count_bad(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_is_finite = torch.ones_like(self.loss_is_finite)
        return fine

    def _count_bad(self, step: int) -> None:
        """Tell what was not finite (a loss, else the first gradient); stop if that is so too often."""
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
        lr = self.optimizer.param_groups[0]["lr"]
        return {"lr": lr, "grad_norm": self.grad_norm, "skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_in_a_row": self.bad_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.bad_in_a_row, self.skipped = state["bad_in_a_row"], state["skipped"]


class EMA:
    """An exponential moving average of a network's weights: a separate copy, buffers copied as they are."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)


class Mean:
    """Running means of scalars over samples, exact over ranks and micro-batches; part of the checkpoint.

    Sums and counts stay on the device until `pop`, so that adding never waits for a GPU.
    """

    def __init__(self) -> None:
        self.table: dict[str, Tensor] = {}  # name -> (sum, count), float64

    def add(self, **values: Tensor) -> None:
        """Add per-sample values (B,) or a scalar, which counts as one sample. NaN entries are left out."""
        for name, value in values.items():
            flat = value.detach().double().reshape(-1)
            there = ~flat.isnan()
            pair = torch.stack([torch.where(there, flat, 0.0).sum(), there.sum().double()])
            self.table[name] = self.table[name].to(pair.device) + pair if name in self.table else pair

    def pop(self) -> dict[str, float]:
        """The means over all ranks since the last call; starts anew. A rank may have added nothing."""
        names = sorted(set().union(*gather(list(self.table))))
        nothing = torch.zeros(2, dtype=torch.float64)
        rows = [self.table.get(name, nothing).cpu() for name in names]
        sums = all_reduce_sum(torch.stack(rows)).tolist() if names else []
        self.table = {}
        return {name: total / n if n else math.nan for name, (total, n) in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The sums of every rank: added up they would not end in the same last digit. Called by all ranks."""
        return {"ranks": gather({name: pair.tolist() for name, pair in self.table.items()})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each rank takes up its own sums; of another number of ranks, they are dealt out in turn."""
        self.table = {}
        for sums in state["ranks"][rank() :: world_size()]:
            for name, pair in sums.items():
                self.table[name] = self.table.get(name, 0) + torch.tensor(pair, dtype=torch.float64)


class Speed:
    """What a step costs, between two log lines: samples per second over all ranks; of this rank, the share of
    time spent waiting for data and the peak memory of the process so far (GPU: of its tensors).

    A step lasts from the request of its data to `stop`; evaluation, saving and logging are not counted.
    """

    def __init__(self, batch_size: int, device: torch.device, profile: Profile | None = None):
        self.batch_size, self.device, self.profile = batch_size, device, profile
        self.began = self.seconds = self.waited = 0.0
        self.steps = 0

    def watch(self, stream: Iterable) -> Iterator:
        """The items of `stream`; the time that each took to come is counted as waiting."""
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
    """Most memory so far: of the tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def micro_batches(
    batches: list[dict[str, Any]], model: nn.Module, device: torch.device, seed: int, step: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """This rank's micro-batches of one step, on `device`, with each one's share of the step's loss.

    Gradients are reduced over ranks in the last one only. With DDP's mean over ranks, the sum of share *
    loss.mean() is the mean over the global batch. Module dropout is keyed by (seed, step, rank, micro-batch).
    """
    total = sum(len(b["position"]) for b in batches)
    for i, batch in enumerate(batches):
        reseed(seed, step, rank(), i)
        with no_sync(model, last=i == len(batches) - 1):
            yield to_device(batch, device), len(batch["position"]) / total


@contextlib.contextmanager
def frozen(net: nn.Module | None) -> Iterator[None]:
    """What is computed with `net` in this block gives its parameters no gradient. None: nothing is frozen."""
    if net is not None:
        net.requires_grad_(False)
    yield
    if net is not None:
        net.requires_grad_(True)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`, those of nested dicts too."""
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def ranks_share(batch_size: int, micro_batch_size: int | None) -> int:
    """Check that the global batch divides over the ranks; returns the micro-batch per rank and forward."""
    if batch_size < 1 or batch_size % world_size():
        raise InputError(f"batch_size: {batch_size} does not divide over {world_size()} ranks")
    own = batch_size // world_size()
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InputError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
    return min(own, micro_batch_size or own)
