"""A run folder: what a training run keeps on disk, and how the same command goes on from it.

    config.json  split.json  log.jsonl  checkpoint_0001000.pt  best.pt  previews/

To resume, the same command is run again: the stored configuration is the base, the newest readable checkpoint
the start, and only the flags given now are compared with what is stored. Since all randomness is keyed by the
sample, the resumed run ends where an undisturbed one would.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ..config import InputError, flatten, from_dict, read_json, replace, to_dict
from .checkpoint import (
    load_latest,
    load_run,
    load_weights,
    prune,
    save,
    sweep,
    weights,
    write_text,
)
from .distributed import SigtermFlag, Terminated, any_rank, barrier, gather, is_main, print0
from .logger import Logger, Profile
from .training import EMA, Stepper

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


def take(folder: Path) -> IO[str]:
    """The folder's lock file, locked until it is closed or this process ends, however it ends.

    Two runs in one folder would destroy each other: a job started twice, or ranks that outlived
    torchrun. A POSIX lock: data-loading processes do not inherit it and cannot keep it when we are killed.
    """
    file = open(folder / ".lock", "a")  # noqa: SIM115 (closed by the caller)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise InputError(
                f"{folder}: another process is training here; wait for it, end it, or take another --run.dir"
            ) from None
        # a file system without locks: go on without one
    return file


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
        self.profiler: Profile | None = None
        self.lock: IO[str] | None = None
        if config.run.fresh:
            self._move_aside()
            self.config = replace(config, {"run.fresh": False})  # done; what is stored says so
        barrier()
        if (self.dir / "config.json").exists():
            self._resume(given if given is not None else flatten(config))
        elif self._holds_something_else():
            raise InputError(f"{self.dir}: is not empty, and not a run folder (it has no config.json)")
        self.initial: dict[str, Any] | None = None
        if config.run.init and not self.resumed:
            try:
                self.initial = load_run(config.run.init, kind)
            except InputError as e:
                raise InputError(f"run.init: {e}") from None
        self.step = self.resumed["step"] if self.resumed else 0
        self.best: dict[str, Any] | None = self.resumed["best"] if self.resumed else None
        steps = gather(self.step)
        if len(set(steps)) > 1:
            raise InputError(
                f"{self.dir}: ranks see other checkpoints (steps {steps}); all nodes must share it"
            )

    def _holds_something_else(self) -> bool:
        """Files in the folder that are not what a run that was killed at its start leaves there."""
        names = [p.name for p in self.dir.iterdir()] if self.dir.is_dir() else []
        return any(name != "previews" and ".tmp" not in name for name in names)

    def _move_aside(self) -> None:
        if not (self.dir / "config.json").exists() and self._holds_something_else():
            raise InputError(f"run.fresh: {self.dir} is not a run folder (it has no config.json); left alone")
        if self.dir.exists() and is_main():
            aside = self.dir.with_name(f"{self.dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            try:
                with take(self.dir):
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
        if self.step > self.config.run.steps:
            print0(f"{self.dir}: at step {self.step} already, past run.steps {self.config.run.steps}")
        elif self.finished:
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
                self.lock = take(self.dir)
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
        """What --run.profile asks for, on rank 0; `finish` ends it if the run is over before."""
        self.profiler = Profile(self.dir) if self.config.run.profile and is_main() else None
        return self.profiler

    def check_data(self, now: dict[str, Any]) -> None:
        """Refuse to go on with data that are not those of the checkpoint, by what its state says of them."""
        before = self.resumed["state"]["data"] if self.resumed else {}
        for key in (key for key in before if key in now and key != "reference"):
            if before[key] != now[key]:
                raise InputError(
                    f"{self.dir}: the data have changed since this run was started: {key} was {before[key]}, "
                    f"now {now[key]}. Put the files back, or start anew with --run.fresh"
                )

    def initialise(self, net: nn.Module, may_miss: Iterable[str] = ()) -> None:
        """Give a new run's net the weights of run.init, if there is one; those that match `may_miss` may be
        missing there."""
        if self.initial is None:
            return
        where = f"run.init {self.config.run.init}"
        new = load_weights(net, self.initial["ema"], where, may_miss)
        print0(f"{where}: weights of step {self.initial['step']} taken as the start")
        if new:
            print0(f"note: {len(new)} weights are new, such as {new[0]}")
        self.initial = None

    def restore(self, net: nn.Module, ema: EMA, optimizers: dict[str, Stepper], **others: Any) -> None:
        """Put the checkpoint's state back, if the run goes on."""
        self.sigterm = SigtermFlag()  # until here SIGTERM just ended the process: there was nothing to save
        if self.resumed:
            where = f"{self.dir} step {self.step}"
            load_weights(net, self.resumed["model"], where)
            load_weights(ema.net, self.resumed["ema"], where)
            for name, thing in {**optimizers, **others}.items():
                thing.load_state_dict(self.resumed["optimizers" if name in optimizers else "others"][name])
            for part in ("model", "ema", "optimizers", "others"):  # they are as large as the run itself
                del self.resumed[part]

    def due(self, every: str) -> bool:
        """Is `run.<every>` due after the step that was just counted? The last step is due for everything."""
        return self.step % getattr(self.config.run, every) == 0 or self.step >= self.config.run.steps

    def save(
        self, state: dict[str, Any], net: nn.Module, ema: EMA, optimizers: dict[str, Stepper], **others: Any
    ) -> None:
        """Write the numbered checkpoint of this step and delete old ones."""
        beside = {k: v.state_dict() for k, v in others.items()}  # by all ranks: a Mean gathers
        if is_main():
            content = {
                **self._common(state, ema),
                "model": weights(net),
                "optimizers": {k: v.state_dict() for k, v in optimizers.items()},
                "others": beside,
            }
            save(self.dir / f"checkpoint_{self.step:07d}.pt", content)
            prune(self.dir, self.config.run.keep, self.step)
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
        if self.profiler is not None:
            self.profiler.close()
        logger.close()
        self.sigterm.release()
        if self.lock is not None:
            self.lock.close()
        best = "no validation gave a number, so there is no best.pt"
        if self.best:
            best = f"best validation {self.best['name']} {self.best['value']:.4g} at step {self.best['step']}"
        print0(f"{self.dir}: done at step {self.step}, {best}")

    def check_sigterm(self, save_now: Callable[[], None]) -> None:
        """Between steps: if SIGTERM reached any rank, save and leave with exit code 143."""
        if any_rank(self.sigterm.raised):
            save_now()
            self.sigterm.release()
            raise Terminated(f"stopped: saved step {self.step}; the same command goes on from there")
