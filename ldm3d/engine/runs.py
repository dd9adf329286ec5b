"""A run folder: what a training run keeps on disk, and how the same command goes on from there.

    config.json  split.json  log.jsonl  checkpoint_0001000.pt  best.pt  previews/

To resume a run, give the same command again. `Run` finds config.json and the newest checkpoint that can be
read. The stored configuration is the base; the flags of the new command may change run lengths, intervals
and the like (`MAY_CHANGE`), and any other difference is refused. Networks, optimizers and running means are
loaded, log.jsonl is cut back to the checkpoint's step, and the stream of batches starts there. The data may
have moved: cases are compared by their voxels, not by the paths of their files. All randomness
is keyed by the position of a sample in the run, so a resumed run makes the same numbers as one that was never
stopped.

A script calls the methods of `Run` in this order:

    run = Run(kind, config, flags)           new, resumed or finished?
    run.initialise(net)                      weights of --run.init, for a new run
    run.start(split, device, nets, facts)    the folder and the log are opened, the run is introduced
    run.restore(state, net, ema, ...)        a resumed run: networks and optimizers from the checkpoint
    if run.owes_validation: validate(...)    the run before ended between a checkpoint and its validation
    for group in run.steps(stream):
        ...                                  one optimizer step
        run.end_step(**report)               counts the step; a line of the log
        run.save_if_due()                    a numbered checkpoint; SIGTERM ends the run here
        if run.due("eval_every"): validate(...)
    run.finish(then)                         the best validation, and the command that comes next

A checkpoint is written before the validation of its step, so whatever validation does, the training before it
is on the disk. Validation calls, in this order: `run.validation` around the work, `run.keep_best`, and
`run.log`, whose line says that this validation is done. A run that ended in between repeats it first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from ..config import InputError, flatten, from_dict, read_json, replace, show, to_dict
from .checkpoint import (
    TRAINING,
    Newer,
    load,
    load_latest,
    load_run,
    load_weights,
    note_unvalidated,
    prune,
    save,
    step_files,
    sweep,
    weights,
    write_text,
)
from .distributed import (
    SigtermFlag,
    Terminated,
    any_rank,
    barrier,
    gather,
    is_main,
    out_of_memory,
    print0,
    world_size,
)
from .logger import Logger, Profile, duration, plural, progress, read_log, say
from .machine import describe_device, keep_freed_memory
from .training import EMA, Mean, Speed, Stepper, samples_per_forward

MAY_CHANGE = {  # settings that a resumed run may change; any other difference is an error
    *("run.steps", "run.save_every", "run.log_every", "run.eval_every", "run.patience", "run.keep"),
    *("run.dir", "run.fresh", "run.device", "run.workers", "run.compile", "run.tensorboard", "run.profile"),
    # where the data lie: the cases are compared by what they hold (`Run.check_data`)
    *("data.root", "data.cache", "data.cache_gb", "data.cache_dir"),
    *("micro_batch_size", "memory"),
}

PATHS = {"vae", "run.init", "disc_init"}  # settings that name a run or a file, which has many paths


def lock_folder(folder: Path) -> IO[str]:
    """The folder's lock file, locked until the file is closed or this process ends, however it ends.

    Two runs in one folder would destroy each other: a job that was started twice, or ranks that outlived
    torchrun. The lock is a POSIX lock: data-loading processes do not inherit it, so they cannot hold it after
    this process was killed.
    """
    file = open(folder / ".lock", "a")  # noqa: SIM115 (closed by the caller)
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise InputError(
                f"{folder}: another process is training here; wait for it, end it, or take another --run.dir"
            ) from None
        # a file system without locks: go on without one
    return file


def read_split(path: Path) -> dict[str, list[str]]:
    """The case ids of "train", "val" and "test" in a split.json."""
    split = read_json(path)
    for part in ("train", "val", "test"):
        ids = split.get(part)
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise InputError(f"{path}: expected a list of case ids under {part!r}")
    return split


def count(net: nn.Module) -> str:
    """The number of a network's parameters, such as "1.23 M", and how many of them training leaves alone."""

    def short(num: int) -> str:
        return f"{num / 1e6:.3g} M" if num >= 1e6 else f"{num / 1e3:.3g} k"

    num = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if trained == num:
        return short(num)
    if not trained:
        return f"{short(num)} (frozen)"
    memory = " of ".join(f"{16 * n / 2**20:.3g}" for n in (trained, num))  # 4 fp32 numbers a parameter
    return f"{short(num)} ({short(trained)} trained; gradients, moments and averages: {memory} MiB)"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference, in words, between two data specs (`DataSpec.to_dict()`), or None."""
    for key in (key for key in before if key in now and key != "reference"):
        if before[key] != now[key]:
            return f"{key} was {before[key]}, now {now[key]}"
    return None


def changed_case(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> str | None:
    """The first case whose files hold something else than before, in words, or None. See `Data.contents`."""
    for case, old in before.items():
        for what, value in now.get(case, old).items():
            if value != old[what]:
                return f"the {what} of case {case} is another one"
    return None


def is_same(key: str, before: Any, now: Any) -> bool:
    """Are these two values of a setting the same? Two paths are if they lead to the same file. A relative
    path may have been given in another working folder, and lead nowhere from here: then it is compared with
    the end of the other path."""
    if key in PATHS and before and now:
        parts = Path(os.path.normpath(before)).parts
        before, found, now = os.path.realpath(before), os.path.exists(before), os.path.realpath(now)
        return before == now or (not found and Path(now).parts[-len(parts) :] == parts)
    return before == now


def goes_on(kind: str, config: Any) -> bool:
    """Is there a checkpoint in the run's folder from which the same command goes on?"""
    run = config.run
    return bool(step_files(Path(run.dir or f"runs/{kind}-{config.preset}"))) and not run.fresh


def load_init(kind: str, init: str) -> dict[str, Any]:
    """The content of the checkpoint that --run.init names."""
    try:
        return load_run(init, kind)
    except InputError as e:
        raise InputError(f"run.init: {e}") from None


def settings_of_init(kind: str, config: Any, start: tuple[str, ...], but: tuple[str, ...]) -> dict[str, Any]:
    """What the run of --run.init has for the settings that start with `start` and not with `but`, by dotted
    key; none for a run that starts from nothing, or is resumed.

    Weights alone do not make a network: groups of norms, heads of attention or the range of intensities do
    not show in their shapes, so weights would fit a network that does something else.
    """
    init = config.run.init
    if not init or goes_on(kind, config):
        return {}
    stored = load_init(kind, init)["config"]
    try:
        theirs = flatten(from_dict(type(config), stored))
    except InputError as e:
        raise InputError(f"run.init: {e}") from None
    return {key: value for key, value in theirs.items() if key.startswith(start) and not key.startswith(but)}


def with_settings_of_init(config: Any, theirs: dict[str, Any], flag: str = "run.init") -> Any:
    """The configuration with these settings of the run or file that `flag` names; those that change are
    printed."""
    ours = flatten(config)
    changed = [f"{key} {show(value) or 'none'}" for key, value in theirs.items() if ours[key] != value]
    if changed:
        print0(f"{flag}: as in {ours[flag]}: {', '.join(changed)}")
    return replace(config, theirs)


class Run:
    """One training run and its folder. Has no loop of its own: the script's loop calls it.

    The constructor decides whether the run is new, resumed or finished; nothing is written before `start`.
    `config` is the merged configuration to train with, `resumed` the content of the checkpoint to go on from
    (None for a new run), `step` the number of optimizer steps done, `best` the best validation so far.

    config: a configuration with the fields `preset`, `batch_size` and `run` (RunConfig). flags: the settings
    of the command line, by dotted key; only these are compared with a stored configuration.
    """

    def __init__(self, kind: str, config: Any, flags: dict[str, Any] | None = None):
        self.kind, self.config = kind, config
        if config.run.dir == "":
            raise InputError("run.dir: expected a folder, got ''")
        self.dir = Path(config.run.dir or f"runs/{kind}-{config.preset}")
        self.resumed: dict[str, Any] | None = None
        self.lock: IO[str] | None = None
        self.sigterm: SigtermFlag | None = None
        self.pace: tuple[int, float] | None = None
        self.said_end = False
        stored = (self.dir / "config.json").exists()
        if not stored and self._holds_something_else():
            fresh = "; left alone" if config.run.fresh else ""
            raise InputError(f"{self.dir}: is not empty, and not a run folder (it has no config.json){fresh}")
        if stored and not config.run.fresh:
            self._resume(flags if flags is not None else flatten(config))
        self.initial: dict[str, Any] | None = None
        if config.run.init and not self.resumed:
            self.initial = load_init(kind, config.run.init)
        self.step = self.resumed["step"] if self.resumed else 0
        self.best: dict[str, Any] | None = self._stored_best() if self.resumed else None
        self.owes_validation = bool(self.resumed) and self.due("eval_every") and not self._is_validated()
        steps = gather(self.step)
        if len(set(steps)) > 1:
            raise InputError(
                f"{self.dir}: ranks see other checkpoints (steps {steps}); all nodes must share it"
            )
        if self.finished:
            self._announce()

    def _holds_something_else(self) -> bool:
        """Does the folder hold files that a run killed at its start would not have left there?"""
        names = [p.name for p in self.dir.iterdir()] if self.dir.is_dir() else []
        return any(name not in ("previews", ".lock") and ".tmp" not in name for name in names)

    def _move_aside(self) -> None:
        """--run.fresh: give the folder another name, if there is one."""
        if self.dir.exists():
            aside = self.dir.with_name(f"{self.dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            try:
                with lock_folder(self.dir):
                    self.dir.rename(aside)
            except OSError as e:
                raise InputError(f"run.fresh: {self.dir} cannot be moved to {aside} ({e.strerror})") from None
            print(f"moved {self.dir} to {aside}", flush=True)

    def _resume(self, flags: dict[str, Any]) -> None:
        stored = read_json(self.dir / "config.json")
        if stored.get("kind") != self.kind:
            raise InputError(f"{self.dir}: belongs to a {stored.get('kind')!r} run, this is {self.kind!r}")
        self.resumed = load_latest(self.dir, self.kind)
        if self.resumed is None:
            return  # no checkpoint yet: the settings of this command are used
        for part in (*TRAINING, "best"):
            if part not in self.resumed:
                raise InputError(f"{self.dir}: checkpoint of step {self.resumed['step']} holds no {part}")
        base = from_dict(type(self.config), self.resumed["config"])
        before, changed = flatten(base), []
        for key, value in {**flags, "preset": self.config.preset}.items():
            if key not in MAY_CHANGE and not is_same(key, before[key], value):
                changed.append(f"{key} was {before[key]!r}, now {value!r}")
        if changed:
            raise InputError(
                f"{self.dir}: this run was started with other settings: {'; '.join(changed)}. Go on without "
                "them, choose another --run.dir, or start anew with --run.fresh"
            )
        self.config = replace(base, {k: v for k, v in flags.items() if k in MAY_CHANGE})

    def _stored_best(self) -> dict[str, Any] | None:
        """The best validation up to the checkpoint's step, this step's own included.

        The checkpoint knows the best before its own validation, best.pt the best of all. best.pt may be of a
        later step, if the checkpoints after this one are damaged.
        """
        known, path = self.resumed["best"], self.dir / "best.pt"
        if not path.exists():
            return known
        try:
            best = load(path, self.kind).get("best")
        except Newer:
            raise
        except InputError as e:
            print0(f"{e}; the next validation writes it anew")
            return None
        return best if best and best["step"] <= self.resumed["step"] else known

    def _is_validated(self) -> bool:
        """Does the log hold the validation of this step?"""
        lines = read_log(self.dir / "log.jsonl")
        return any(line["split"] == "val" and line["step"] == self.step for line in lines)

    @property
    def finished(self) -> bool:
        return (self.step >= self.config.run.steps or self.out_of_patience) and not self.owes_validation

    @property
    def out_of_patience(self) -> bool:
        run = self.config.run
        waited = self.step - self.best["step"] if self.best else 0
        return bool(run.patience) and waited >= run.patience * run.eval_every

    def _announce(self) -> None:
        """Print what this command is going to do."""
        if self.step > self.config.run.steps:
            print0(f"{self.dir}: at step {self.step} already, past run.steps {self.config.run.steps}")
        elif self.finished:
            more = "more --run.patience" if self.out_of_patience else "more steps: --run.steps"
            print0(f"{self.dir}: finished at step {self.step}; nothing to do ({more})")
        elif self.resumed:
            print0(f"{self.dir}: going on from step {self.step} of {self.config.run.steps}")
        elif (self.dir / "config.json").exists() and not self.config.run.fresh:
            steps = plural(self.config.run.steps, "step")
            print0(f"{self.dir}: nothing was saved yet: starts from the beginning, {steps}")
        else:
            print0(f"{self.dir}: new run of {plural(self.config.run.steps, 'step')}")

    def _introduce(
        self,
        split: dict[str, list[str]],
        device: torch.device,
        networks: dict[str, nn.Module | None],
        facts: dict[str, str],
    ) -> None:
        """Print what a person must know before the hours of training begin: one line a subject."""
        run, size, ranks = self.config.run, self.config.batch_size, world_size()
        micro = samples_per_forward(size, getattr(self.config, "micro_batch_size", None))
        batch = f"{size} samples a step, {micro} per forward pass"
        batch += f" on each of {ranks} ranks" if ranks > 1 else ""
        steps = f"{run.steps}, validation every {run.eval_every}, checkpoint every {run.save_every}"
        if num := len(split.get("train", ())):
            steps += f"; each training case is seen {run.steps * size / num:.3g} times"
        lines = {
            "device": describe_device(device, run.amp, chosen=run.device != "auto"),
            "parameters": ", ".join(f"{name} {count(net)}" for name, net in networks.items() if net),
            **facts,
            "batch": batch,
            "steps": steps,
            "files": f"log.jsonl, checkpoint_*.pt, best.pt and previews in {self.dir}",
        }
        print0("\n".join(f"  {title:<12} {words}" for title, words in lines.items() if words))

    # --- before the loop ---

    def split(self, in_memory: bool = False) -> dict[str, list[str]] | None:
        """The split of a resumed run, or None for a new run. InputError if split.json and the checkpoint
        contradict each other. The checkpoint's split is taken where split.json is lost. in_memory: this time
        the data are a data set in Python, and no files."""
        if not self.resumed:
            return None
        if in_memory != self.resumed["state"].get("in_memory", False):
            was, how = ("files", "without dataset") if in_memory else ("a dataset in Python", "with dataset=")
            raise InputError(f"{self.dir}: was started on {was}; it goes on by train(config, ...) {how}")
        path, trained = self.dir / "split.json", self.resumed["state"].get("split")
        stored = read_split(path) if path.exists() else trained
        if trained is not None and stored != trained:
            raise InputError(
                f"{path}: differs from the split that this run was trained with; put it back, or delete it, "
                "and the checkpoint's is taken"
            )
        return stored

    def check_data(
        self, now: dict[str, Any], contents: dict[str, dict[str, str]], part: str = "data"
    ) -> None:
        """Refuse to go on with other data than the run was trained on.

        now: the `DataSpec.to_dict()` of the files as they are, and under which name (`part`) the state of a
        checkpoint holds it. contents: `Data.contents`, which older checkpoints do not have.
        """
        before, held = (self.resumed["state"].get(k, {}) if self.resumed else {} for k in (part, "contents"))
        rows = held.values() if isinstance(held, dict) else [None]
        if not isinstance(before, dict) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{self.dir}: checkpoint of step {self.step} is damaged (state: {part})")
        if different := changed_case(held, contents) or difference(before, now):
            raise InputError(
                f"{self.dir}: the data have changed since this run was started: {different}. Put the files "
                "back, or start anew with --run.fresh"
            )

    def initialise(self, net: nn.Module, may_miss: Iterable[str] = ()) -> list[str]:
        """Copy the weights of --run.init, if a new run has one, into `net`. Weights whose names match
        `may_miss` (shell patterns) may be missing there; their names are returned."""
        if self.initial is None:
            return []
        where = f"run.init {self.config.run.init}"
        new = load_weights(net, self.initial["ema"], where, may_miss)
        note_unvalidated(self.config.run.init, self.initial)
        print0(f"{where}: weights of step {self.initial['step']} copied into the new run")
        if new:
            print0(f"note: {len(new)} weights are new, such as {new[0]}")
        self.initial = None
        return new

    def start(
        self,
        split: dict[str, list[str]],
        device: torch.device,
        networks: dict[str, nn.Module | None] | None = None,
        facts: dict[str, str] | None = None,
        shown: Sequence[str] = ("loss",),
    ) -> None:
        """Make the folder, or open it again, and open its log. Everything has been checked before, so that a
        mistake does not move the folder of the run before (--run.fresh).

        networks, facts: what the first lines say of networks and of data, title -> words. shown: the figures
        that come first in a line of the console."""
        self._announce()
        self._introduce(split, device, networks or {}, facts or {})
        fresh = self.config.run.fresh
        self.config = replace(self.config, {"run.fresh": False})  # done now; what is stored says so
        if is_main():
            if fresh:
                self._move_aside()
            try:
                (self.dir / "previews").mkdir(parents=True, exist_ok=True)
                self.lock = lock_folder(self.dir)
                sweep(self.dir)
                config = {"kind": self.kind, **to_dict(self.config)}
                write_text(self.dir / "config.json", json.dumps(config, indent=1) + "\n")
                write_text(self.dir / "split.json", json.dumps(split, indent=1) + "\n")
            except OSError as e:
                raise InputError(f"{self.dir}: cannot be written ({e.strerror})") from None
        barrier()
        if device.type == "cpu":
            keep_freed_memory()
        if self.config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.config.run.deterministic)
        torch.backends.cudnn.benchmark = not self.config.run.deterministic
        run = self.config.run
        self.logger = Logger(self.dir, self.step, run.tensorboard, run.steps, shown)
        self.profile = Profile(self.dir) if self.config.run.profile and is_main() else None
        self.speed = Speed(self.config.batch_size, device, self.profile)

    def restore(
        self,
        state: dict[str, Any],
        net: nn.Module,
        ema: EMA,
        steppers: dict[str, Stepper],
        mean: Mean,
        **others: Any,
    ) -> None:
        """Name what the checkpoints of this run hold, and load it from the checkpoint of a resumed run.

        state: plain values and tensors that training does not change. steppers, others: by the name under
        which the checkpoint stores them; each has `state_dict` and `load_state_dict`.
        """
        self.state, self.net, self.ema, self.mean = state, net, ema, mean
        self.steppers, self.others = steppers, {"mean": mean, **others}
        if self.resumed:
            where = f"{self.dir} step {self.step}"
            load_weights(net, self.resumed["model"], where)
            load_weights(ema.net, self.resumed["ema"], where)
            try:
                for name, stepper in self.steppers.items():
                    stepper.load_state_dict(self.resumed["optimizers"][name])
                for name, other in self.others.items():
                    other.load_state_dict(self.resumed["others"][name])
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
                raise InputError(
                    f"{where}: what it holds of {name} is damaged ({type(e).__name__}: {str(e)[:100]})"
                ) from None
            for part in ("model", "ema", "optimizers", "others"):  # they are as large as the run itself
                del self.resumed[part]

    # --- in the loop ---

    def steps(self, stream: Iterable[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """The items of `stream`, one an optimizer step, under a progress bar, until the run is finished.

        From the first step on, SIGTERM and Ctrl-C wait for `save_if_due`. They have their effect of before as
        soon as the loop is left, also by an exception.
        """
        self.bar: tqdm = progress(  # the log has lines of its own
            self.speed.watch(stream), self.kind, self.config.run.steps, self.step, lines=False
        )
        if self.finished:  # by the validation that was owed
            return
        self.sigterm = SigtermFlag()
        try:
            for group in self.bar:
                yield group
                if self.finished:
                    return
        finally:
            self.sigterm.release()

    def end_step(self, **report: float) -> None:
        """An optimizer step is done: count it. Where a line of the log is due, write the means of all samples
        since the line before, `report` and the speed."""
        self.step += 1
        self.speed.stop()
        self._say_end()
        if self.due("log_every"):
            means = self.mean.pop()
            self.log("train", means | report | self.speed.pop())
            self.bar.set_postfix(loss=f"{means['loss']:.4g}")

    def time_left(self) -> float | None:
        """Seconds until the last step, at the mean pace of this process so far, validation included. None
        until two steps are done: the first one compiles and warms up, and does not count."""
        if self.pace is None or self.pace[0] >= self.step:
            return None
        first, began = self.pace
        return (time.monotonic() - began) / (self.step - first) * max(0, self.config.run.steps - self.step)

    def _say_end(self) -> None:
        """Print once when the run will end, as soon as ten seconds of steps tell, if the end is not near."""
        now = time.monotonic()
        self.pace = self.pace or (self.step, now)
        if self.said_end or now - self.pace[1] < 10:
            return
        self.said_end, left = True, self.time_left()
        if left < 60 or not is_main():
            return
        end = time.strftime("%A %H:%M" if left > 12 * 3600 else "%H:%M", time.localtime(time.time() + left))
        say(f"the last step is expected in {duration(left)}, at {end}")

    def due(self, every: str) -> bool:
        """Is `run.<every>` due after the step that was just counted? The last step is due for everything."""
        return self.step % getattr(self.config.run, every) == 0 or self.step >= self.config.run.steps

    def log(self, part: str, scalars: dict[str, Any]) -> None:
        """Write one line of the log: `part` is "train" or "val". The line of a validation comes last, when
        best.pt is written: it says that the validation need not be repeated."""
        going_on = part == "train" and self.step < self.config.run.steps
        self.logger.log(self.step, part, scalars, self.time_left() if going_on else None)
        if part == "val":
            self.owes_validation = False

    @contextlib.contextmanager
    def validation(self, remedy: str = "a smaller data.size") -> Iterator[None]:
        """The block validates. If the memory is too small for it, InputError says what lasts and what helps.

        remedy: the setting that makes whole cases smaller."""
        try:
            yield
        except Exception as e:
            if (what := out_of_memory(e)) is None:
                raise
            raise InputError(
                f"{self.dir}: {what} in validation, which takes whole cases: {remedy} needs less, in a new "
                "run (--run.init takes over the weights); a larger --run.eval_every puts validation off. "
                f"Step {self.step} is saved, the same command goes on from there"
            ) from None

    def interruptible(self, items: Iterable, rounds: int) -> Iterator:
        """The items of this rank's part of a validation, under a progress bar. After every item all ranks
        look whether SIGTERM reached one of them; the run ends there, since this step is saved.

        rounds: the number of items of the rank that has most.
        """
        left = rounds
        for item in progress(items, "validation", rounds):
            yield item
            self._look_for_signal()
            left -= 1
        for _ in range(left):
            self._look_for_signal()

    def _look_for_signal(self) -> None:
        """End the run if SIGTERM reached any rank during a validation, whose step has been saved before."""
        if any_rank(self.sigterm is not None and self.sigterm.raised):
            self._terminate()

    def _terminate(self) -> None:
        """Leave with exit code 143. This step has been saved."""
        raise Terminated(f"stopped: saved step {self.step}; the same command goes on from there")

    @property
    def preview_path(self) -> Path:
        """Where the preview picture of this step belongs."""
        return self.dir / "previews" / f"step_{self.step:07d}.png"

    def keep_best(self, name: str, value: float, highest: bool = False) -> bool:
        """Write best.pt (the EMA weights) if `value` is the lowest (or highest) validation of `name` so far.

        The score that decides may change during a run: values of another name are not compared.
        """
        if self.best and self.best["name"] != name:
            self.best = None
        sign = -1 if highest else 1
        if not sign * value < (sign * self.best["value"] if self.best else math.inf):
            return False
        self.best = {"name": name, "value": value, "step": self.step}
        if is_main():
            save(self.dir / "best.pt", self._common())
        return True

    def keep_early(self) -> None:
        """Write early.pt (the EMA weights of this step): the weaker denoiser of autoguidance."""
        if is_main():
            save(self.dir / "early.pt", self._common())

    def save_if_due(self) -> None:
        """The end of a step, before its validation: write a numbered checkpoint if one, or validation, is
        due. If SIGTERM reached any rank, save and leave with exit code 143."""
        stopped = any_rank(self.sigterm.raised)
        if stopped or self.due("save_every") or self.due("eval_every"):
            self.save()
        if stopped:  # one look a step: a signal that comes from here on is seen after the next step
            self._terminate()

    def save(self) -> None:
        """Write the numbered checkpoint of this step and delete old ones. Called by all ranks."""
        others = {k: v.state_dict() for k, v in self.others.items()}  # by all ranks: a Mean gathers
        if is_main():
            content = {
                **self._common(),
                "model": weights(self.net),
                "optimizers": {k: v.state_dict() for k, v in self.steppers.items()},
                "others": others,
            }
            save(self.dir / f"checkpoint_{self.step:07d}.pt", content)
            prune(self.dir, self.config.run.keep, self.step)
        barrier()

    def _common(self) -> dict[str, Any]:
        """What numbered checkpoints, best.pt and early.pt hold."""
        return {
            "kind": self.kind,
            "config": to_dict(self.config),
            "state": self.state,
            "ema": weights(self.ema.net),
            "step": self.step,
            "best": self.best,
        }

    def finish(self, then: Sequence[object] = ()) -> None:
        """The loop is over: close the log, print how well the run went, and the command that comes next.

        then: the words of that command."""
        if self.profile is not None:
            self.profile.close()
        self.logger.close()
        if self.lock is not None:
            self.lock.close()
        best = "no validation gave a number, so there is no best.pt"
        if self.best:
            best = f"best validation {self.best['name']} {self.best['value']:.4g} at step {self.best['step']}"
        print0(f"{self.dir}: done at step {self.step}, {best}")
        if then:
            print0(f"next: {shlex.join(map(str, then))}")
