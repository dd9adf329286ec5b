"""Parts of a training loop, without the loop: run folder, optimizer step, EMA, learning rate, keyed
randomness.

Every script owns its loop and uses these small objects. A run is resumed by the same command: the stored
configuration is the base, the newest checkpoint the start, and since all randomness is keyed by (seed,
position, purpose), the resumed run is bit-identical to one that was never stopped (same CPU and world size;
on a GPU with run.deterministic).

    lr_t  = lr * scaling(batch) * warm-up(t) * schedule(t)
    EMA   : ema <- d ema + (1 - d) net, d = min(decay, (1 + step) / (10 + step))
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint import (
    load_latest,
    load_run,
    load_weights,
    prune,
    save,
    step_files,
    sweep,
    weights,
    write_text,
)
from .config import InputError, flatten, from_dict, read_json, replace, to_dict
from .distributed import (
    SigtermFlag,
    Terminated,
    all_reduce_sum,
    any_rank,
    barrier,
    gather,
    is_main,
    keyed_generator,
    no_sync,
    print0,
    rank,
    world_size,
)
from .logger import Logger, Profile

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
        for name in ("steps", "keep", "save_every", "log_every", "eval_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("workers", "patience"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: expected 0 <= decay < 1, got {self.ema_decay}")


MAY_CHANGE = (  # on resume; anything else stops with the difference shown
    *(
        "run.steps",
        "run.workers",
        "run.keep",
        "run.compile",
        "run.patience",
        "run.device",
        "run.dir",
        "run.fresh",
        "run.tensorboard",
        "run.profile",
    ),
    *("run.save_every", "run.log_every", "run.eval_every"),
)


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
        clip = self.config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, clip, error_if_nonfinite=False)
        self.grad_norm = float(norm)
        fine = not any_rank(not (math.isfinite(self.grad_norm) and bool(self.loss_is_finite)))
        if fine:
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

    Sums and counts stay on the device until they are taken, so that adding never waits for a GPU.
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

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call; starts anew. A rank may have added nothing."""
        names = sorted(set().union(*gather(list(self.table))))
        nothing = torch.zeros(2, dtype=torch.float64)
        rows = [self.table.get(name, nothing).cpu() for name in names]
        sums = all_reduce_sum(torch.stack(rows)).tolist() if names else []
        self.table = {}
        return {name: total / n if n else math.nan for name, (total, n) in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {name: pair.tolist() for name, pair in self.table.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in state.items()}


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
                break
            self.waited += time.perf_counter() - self.began
            yield item
        if self.profile is not None:
            self.profile.close()

    def stop(self) -> None:
        """The optimizer step is done."""
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        if self.profile is not None:
            self.profile.step()

    def take(self) -> dict[str, float]:
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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# --- the run folder -----------------------------------------------------------------------------------------


class Run:
    """A run folder: config.json, split.json, log.jsonl, checkpoint_0001000.pt, best.pt, previews/.

    Opening one decides between a new run, a resumed one and a finished one; nothing is written before
    `start`. `config` is the merged configuration to train with, `resumed` the checkpoint's content or None,
    `step` where it is.
    """

    def __init__(self, kind: str, config: Any, given: dict[str, Any] | None = None):
        self.kind, self.config = kind, config
        self.dir = Path(config.run.dir or f"runs/{kind}-{config.preset}")
        self.resumed: dict[str, Any] | None = None
        self.sigterm: SigtermFlag | None = None
        if config.run.fresh:
            self._move_aside()
            self.config = replace(config, {"run.fresh": False})  # done; what is stored says so
        barrier()
        if (self.dir / "config.json").exists():
            self._resume(given if given is not None else flatten(config))
        elif step_files(self.dir):
            raise InputError(f"{self.dir}: holds checkpoints but no config.json; is this a run folder?")
        self.step = self.resumed["step"] if self.resumed else 0
        self.best: dict[str, Any] | None = self.resumed["best"] if self.resumed else None
        steps = gather(self.step)
        if len(set(steps)) > 1:
            raise InputError(
                f"{self.dir}: ranks see other checkpoints (steps {steps}); all nodes must share it"
            )

    def _move_aside(self) -> None:
        if self.dir.exists() and is_main():
            aside = self.dir.with_name(f"{self.dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            try:
                self.dir.rename(aside)
            except OSError as e:
                raise InputError(f"run.fresh: {self.dir} cannot be moved to {aside} ({e.strerror})") from None
            print(f"moved {self.dir} to {aside}", flush=True)

    def _resume(self, given: dict[str, Any]) -> None:
        stored = read_json(self.dir / "config.json")
        if stored.get("kind") != self.kind:
            raise InputError(f"{self.dir}: belongs to a {stored.get('kind')!r} run, this is {self.kind!r}")
        self.resumed = load_latest(self.dir, self.kind)
        if self.resumed is None:
            return  # nothing was trained yet: today's settings are taken
        base = from_dict(type(self.config), self.resumed["config"])
        before, changed = flatten(base), []
        for key, value in {**given, "preset": self.config.preset}.items():
            if key not in MAY_CHANGE and before[key] != value:
                changed.append(f"{key} was {before[key]!r}, now {value!r}")
        if changed:
            raise InputError(
                f"{self.dir}: this run was started with other settings: {'; '.join(changed)}. Go on without "
                "them, choose another --run.dir, or start anew with --run.fresh"
            )
        self.config = replace(base, {k: v for k, v in given.items() if k in MAY_CHANGE})

    @property
    def finished(self) -> bool:
        return self.step >= self.config.run.steps or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        run = self.config.run
        waited = self.step - self.best["step"] if self.best else 0
        return bool(run.patience) and waited >= run.patience * run.eval_every

    def say(self) -> None:
        """Tell on the console what this command is going to do."""
        if self.finished:
            more = "more --run.patience" if self.out_of_patience else "more steps: --run.steps"
            print0(f"{self.dir}: finished at step {self.step}; nothing to do ({more})")
        elif self.resumed:
            print0(f"{self.dir}: going on from step {self.step} of {self.config.run.steps}")
        else:
            print0(f"{self.dir}: new run of {self.config.run.steps} steps")

    def split(self) -> dict[str, list[str]] | None:
        """The stored split, or None for a new run."""
        path = self.dir / "split.json"
        return read_json(path) if self.resumed and path.exists() else None

    def start(self, split: dict[str, list[str]]) -> Logger:
        """Create the folder (or take it up again) and open the log; the data have been checked before."""
        if is_main():
            try:
                (self.dir / "previews").mkdir(parents=True, exist_ok=True)
                sweep(self.dir)
                config = {"kind": self.kind, **to_dict(self.config)}
                write_text(self.dir / "config.json", json.dumps(config, indent=1) + "\n")
                write_text(self.dir / "split.json", json.dumps(split, indent=1) + "\n")
            except OSError as e:
                raise InputError(f"{self.dir}: cannot be written ({e.strerror})") from None
        barrier()
        if self.config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.config.run.deterministic)
        torch.backends.cudnn.benchmark = not self.config.run.deterministic
        return Logger(self.dir, self.step, self.config.run.tensorboard)

    def profile(self) -> Profile | None:
        """What --run.profile asks for, on rank 0."""
        return Profile(self.dir) if self.config.run.profile and is_main() else None

    def check_data(self, now: dict[str, Any]) -> None:
        """Refuse to go on with data that are not those of the checkpoint, by what its state says of them."""
        before = self.resumed["state"]["data"] if self.resumed else {}
        for key in (key for key in before if key in now and key != "reference"):
            if before[key] != now[key]:
                raise InputError(
                    f"{self.dir}: the data have changed since this run was started: {key} was {before[key]}, "
                    f"now {now[key]}. Put the files back, or start anew with --run.fresh"
                )

    def restore(
        self,
        net: nn.Module,
        ema: EMA,
        optimizers: dict[str, Stepper],
        may_miss: Iterable[str] = (),
        may_have: Iterable[str] = (),
        **others: Any,
    ) -> None:
        """Put the checkpoint's state back (resume), or start from the weights of run.init, or leave all as it
        is.

        may_miss, may_have: patterns of the weights that run.init's checkpoint may lack or have beside ours.
        """
        self.sigterm = SigtermFlag()  # until here SIGTERM just ended the process: there was nothing to save
        if self.resumed:
            where = f"{self.dir} step {self.step}"
            load_weights(net, self.resumed["model"], where)
            load_weights(ema.net, self.resumed["ema"], where)
            for name, thing in {**optimizers, **others}.items():
                thing.load_state_dict(self.resumed["optimizers" if name in optimizers else "others"][name])
            for part in ("model", "ema", "optimizers", "others"):  # they are as large as the run itself
                del self.resumed[part]
        elif self.config.run.init:
            path = self.config.run.init
            try:
                content = load_run(path, self.kind)
            except InputError as e:
                raise InputError(f"run.init: {e}") from None
            other = load_weights(net, content["ema"], f"run.init {path}", may_miss, may_have)
            ema.net.load_state_dict(net.state_dict())
            print0(f"weights of {path} (step {content['step']}) taken as the start")
            if other:
                print0(f"note: {len(other)} weights are not in both networks: {', '.join(other)}")

    def due(self, every: str) -> bool:
        """Is `run.<every>` due after the step that was just counted? The last step is due for everything."""
        return self.step % getattr(self.config.run, every) == 0 or self.step >= self.config.run.steps

    def save(
        self, state: dict[str, Any], net: nn.Module, ema: EMA, optimizers: dict[str, Stepper], **others: Any
    ) -> None:
        """Write the numbered checkpoint of this step and delete old ones."""
        if is_main():
            content = {
                **self._common(state, ema),
                "model": weights(net),
                "optimizers": {k: v.state_dict() for k, v in optimizers.items()},
                "others": {k: v.state_dict() for k, v in others.items()},
            }
            save(self.dir / f"checkpoint_{self.step:07d}.pt", content)
            prune(self.dir, self.config.run.keep)
        barrier()

    def _common(self, state: dict[str, Any], ema: EMA) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "config": to_dict(self.config),
            "state": state,
            "ema": weights(ema.net),
            "step": self.step,
            "best": self.best,
        }

    def keep_best(
        self, name: str, value: float, state: dict[str, Any], ema: EMA, highest: bool = False
    ) -> bool:
        """Write best.pt (the EMA weights) if `value` of `name` is the lowest (or highest) so far."""
        sign = -1 if highest else 1
        if not sign * value < (sign * self.best["value"] if self.best else math.inf):
            return False
        self.best = {"name": name, "value": value, "step": self.step}
        if is_main():
            save(self.dir / "best.pt", self._common(state, ema))
        return True

    def finish(self, logger: Logger) -> None:
        """The loop is over: close the log, tell how well it went."""
        logger.close()
        self.sigterm.release()
        best = "no validation gave a number, so there is no best.pt"
        if self.best:
            best = f"best validation {self.best['name']} {self.best['value']:.4g} at step {self.best['step']}"
        print0(f"{self.dir}: done at step {self.step}, {best}")

    def check_sigterm(self, save_now: Callable[[], None]) -> None:
        """Between steps: if SIGTERM reached any rank, save and leave with exit code 143."""
        if any_rank(self.sigterm.raised):
            save_now()
            self.sigterm.release()
            raise Terminated(f"SIGTERM: saved step {self.step}; the same command goes on from there")


def ranks_share(batch_size: int, micro_batch_size: int | None) -> int:
    """Check that the global batch divides over the ranks; returns the micro-batch per rank and forward."""
    if batch_size < 1 or batch_size % world_size():
        raise InputError(f"batch_size: {batch_size} does not divide over {world_size()} ranks")
    own = batch_size // world_size()
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InputError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
    return min(own, micro_batch_size or own)
