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
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint import load, load_latest, load_weights, prune, save, step_files, sweep, weights
from .config import InputError, flatten, from_dict, read_json, replace, to_dict
from .distributed import (
    SigtermFlag,
    Terminated,
    all_reduce_sum,
    any_rank,
    barrier,
    is_main,
    keyed_generator,
    no_sync,
    print0,
    world_size,
)
from .logger import Logger

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

    def __post_init__(self) -> None:
        for name in ("steps", "keep", "save_every", "log_every", "eval_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
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
        if self.lr <= 0:
            raise InputError(f"lr: expected > 0, got {self.lr}")


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
    """Seed the global generators (module dropout) from (seed, step, rank, micro-batch)."""
    seed, position, *rest = key
    torch.manual_seed(keyed_generator(seed, position, f"modules{rest}").initial_seed())


# --- precision ----------------------------------------------------------------------------------------------


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of the flag, or None for fp32."""
    if amp == "auto":
        amp = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
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
        fine = not any_rank(not (math.isfinite(self.grad_norm) and bool(self.loss_is_finite)), self.device)
        if fine:
            self.scaler.step(self.optimizer)
            self.bad_in_a_row = 0
        else:
            self._count_bad(step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_is_finite = torch.ones_like(self.loss_is_finite)
        return fine

    def _count_bad(self, step: int) -> None:
        self.bad_in_a_row += 1
        self.skipped += 1
        named = ((n, p.grad) for n, p in self.net.named_parameters() if p.grad is not None)
        culprit = next((f"the gradient of {n}" for n, g in named if not torch.isfinite(g).all()), "the loss")
        print0(f"step {step}: {culprit} is not finite; the step is skipped ({self.bad_in_a_row} in a row)")
        if self.bad_in_a_row >= self.run.max_bad_steps:
            raise InputError(
                f"stopped: {self.bad_in_a_row} steps in a row were not finite ({culprit}); the last checkpoint "
                "is good: try a lower optim.lr, run.amp bf16 or fp32, or look at the data of these steps"
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
    """Running means of scalars over samples, exact over ranks and micro-batches; part of the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        """Add per-sample values (B,) or a scalar, which counts as one sample. NaN entries are left out."""
        for name, value in values.items():
            flat = value.detach().double().reshape(-1)
            good = flat[~flat.isnan()]
            self.sums[name] = self.sums.get(name, 0.0) + float(good.sum())
            self.counts[name] = self.counts.get(name, 0.0) + good.numel()

    def take(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """The means over all ranks since the last call; starts anew. Every rank must have added the same
        names."""
        names = sorted(self.sums)
        table = torch.tensor(
            [[self.sums[n], self.counts[n]] for n in names], dtype=torch.float64, device=device
        )
        table = all_reduce_sum(table).tolist() if names else []
        self.sums, self.counts = {}, {}
        return {n: (s / c if c else math.nan) for n, (s, c) in zip(names, table, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Speed:
    """Samples per second, share of the time spent waiting for data, peak memory, between two log lines."""

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self._start()

    def _start(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def watch(self, stream: Iterable) -> Iterator:
        """The items of `stream`; the time that each took to come is counted as waiting."""
        items = iter(stream)
        while True:
            before = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            self.waited += time.perf_counter() - before
            self.steps += 1
            yield item

    def take(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        report = {"samples_per_s": self.steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        if self.device.type == "cuda":
            report["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            report["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._start()
        return {k: round(v, 4) for k, v in report.items()}


def micro_batches(
    batches: list[dict[str, Any]], model: nn.Module, device: torch.device
) -> Iterator[tuple[dict[str, Any], float]]:
    """This rank's micro-batches of one step, on `device`, with each one's share of the step's loss.

    Gradients are reduced over ranks in the last one only. With DDP's mean over ranks, the sum of share *
    loss.mean() is the mean over the global batch.
    """
    total = sum(len(b["position"]) for b in batches)
    for i, batch in enumerate(batches):
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
        self.sigterm = SigtermFlag()
        if config.run.fresh and self.dir.exists() and is_main():
            aside = self.dir.with_name(f"{self.dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            self.dir.rename(aside)
            print(f"moved {self.dir} to {aside}", flush=True)
        barrier()
        if (self.dir / "config.json").exists():
            self._resume(given if given is not None else flatten(config))
        elif step_files(self.dir):
            raise InputError(f"{self.dir}: holds checkpoints but no config.json; is this a run folder?")
        self.step = self.resumed["step"] if self.resumed else 0
        self.best: dict[str, Any] | None = self.resumed["best"] if self.resumed else None
        self.started = time.perf_counter()

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
            print0(f"{self.dir}: finished at step {self.step}; nothing to do (more steps: --run.steps)")
        elif self.resumed:
            print0(f"{self.dir}: going on from step {self.step} of {self.config.run.steps}")
        else:
            print0(f"{self.dir}: new run of {self.config.run.steps} steps")

    def split(self) -> dict[str, list[str]] | None:
        """The stored split, or None for a new run."""
        path = self.dir / "split.json"
        return read_json(path) if self.resumed and path.exists() else None

    def start(self, split: dict[str, list[str]], device: torch.device) -> Logger:
        """Create the folder (or take it up again) and open the log; the data have been checked before."""
        if is_main():
            try:
                (self.dir / "previews").mkdir(parents=True, exist_ok=True)
                sweep(self.dir)
                write_text(self.dir / "config.json", {"kind": self.kind, **to_dict(self.config)})
                write_text(self.dir / "split.json", split)
            except OSError as e:
                raise InputError(f"{self.dir}: cannot be written ({e.strerror})") from None
        barrier()
        if self.config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        elif device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        return Logger(self.dir, self.step, self.config.run.tensorboard)

    def restore(self, net: nn.Module, ema: EMA, optimizers: dict[str, Stepper], **others: Any) -> None:
        """Put the checkpoint's state back (resume), or start from the weights of run.init, or leave all as it
        is."""
        if self.resumed:
            where = f"{self.dir} step {self.step}"
            load_weights(net, self.resumed["model"], where)
            load_weights(ema.net, self.resumed["ema"], where)
            for name, thing in {**optimizers, **others}.items():
                thing.load_state_dict(self.resumed["optimizers" if name in optimizers else "others"][name])
        elif self.config.run.init:
            self._init(net, ema)

    def _init(self, net: nn.Module, ema: EMA) -> None:
        path = Path(self.config.run.init)
        content = (
            load(path, self.kind)
            if path.is_file()
            else load_latest(path, self.kind)
            if path.is_dir()
            else None
        )
        if content is None:
            raise InputError(f"run.init: {path}: no such checkpoint or run folder")
        load_weights(net, content["ema"], f"run.init {path}")
        load_weights(ema.net, content["ema"], f"run.init {path}")
        print0(f"weights of {path} (step {content['step']}) taken as the start")

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

    def keep_best(self, name: str, value: float, state: dict[str, Any], ema: EMA) -> bool:
        """Write best.pt (the EMA weights) if `value` of `name`, lower is better, is the lowest so far."""
        if self.best is not None and not value < self.best["value"]:
            return False
        self.best = {"name": name, "value": value, "step": self.step}
        if is_main():
            save(self.dir / "best.pt", self._common(state, ema))
        return True

    def check_sigterm(self, save_now: Any) -> None:
        """Between steps: if SIGTERM reached any rank, save and leave with exit code 143."""
        if any_rank(self.sigterm.raised):
            save_now()
            raise Terminated(f"SIGTERM: saved step {self.step}; the same command goes on from there")


def write_text(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def ranks_share(batch_size: int, micro_batch_size: int | None) -> int:
    """Check that the global batch divides over the ranks; returns the micro-batch per rank and forward."""
    if batch_size % world_size():
        raise InputError(f"batch_size: {batch_size} does not divide over {world_size()} ranks")
    own = batch_size // world_size()
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InputError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
    return min(own, micro_batch_size or own)
