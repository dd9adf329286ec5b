"""Checkpoints: written so that nothing is ever lost, read so that nothing can run.

A checkpoint is a dict of tensors and plain values:

    format, kind, config, step, best     what it is, how it was made, how far it came
    state                                what training does not change: data, split, conditions, ...
    model, ema                           the trained network's weights and their moving average
    optimizers                           by name: the moments and the loss scaler of each network
    others                               by name: a discriminator's weights, the running means of the log

best.pt lacks `model`, `optimizers` and `others`. A file is written under a temporary name, flushed and
renamed, so a file with its final name is whole. A file is read with ``weights_only=True``, so a file from a
stranger cannot execute code, and against its checksums, so a bit that flipped on the disk is not taken for a
weight.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..config import InputError, read_json
from ..lora import merge
from .distributed import print0

FORMAT = 1  # raised when older code could no longer read what we write
STEP_FILE = re.compile(r"checkpoint_(\d{7,})\.pt$")
RENAMED = {  # names in files of older versions -> today's
    "critic": "discriminator",
    "critic_accuracy": "disc_accuracy",
    "psnr with the critic": "psnr with discriminator",
}


class Newer(InputError):
    """A checkpoint of a newer version of this program. An older checkpoint is no substitute for it."""


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write atomically. A full disk or read-only folder is an InputError, and what was there stays."""
    try:
        write_atomically(Path(path), lambda file: torch.save({"format": FORMAT, **content}, file))
    except (OSError, RuntimeError) as e:  # torch reports a failed write of its zip archive as a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        reason = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        raise InputError(
            f"{path}: could not be saved ({reason}); the checkpoints before it are intact: make room, then "
            "run the same command again"
        ) from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """write(file) to a temporary file, which takes the name when all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def is_occupied(path: Path) -> bool:
    """True for a file, and for a folder that holds anything: nothing new may be written there."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def maker(kind: str) -> str:
    """Who writes checkpoints of this kind, for messages."""
    return f"a checkpoint of train_{kind}.py" if kind in ("vae", "ldm", "cdal") else f"a {kind!r} checkpoint"


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of an older version, with today's names of optimizers, means and scores."""

    def renamed(table: dict[str, Any]) -> dict[str, Any]:
        return {RENAMED.get(name, name): value for name, value in table.items()}

    if "optimizers" in content:
        content["optimizers"] = renamed(content["optimizers"])
    if "mean" in content.get("others", {}):
        content["others"]["mean"]["ranks"] = [renamed(sums) for sums in content["others"]["mean"]["ranks"]]
    if best := content.get("best"):
        content["best"] = {**best, "name": RENAMED.get(best["name"], best["name"])}
    return content


def check_sums(path: Path) -> None:
    """InputError if a member of the zip archive, which torch.save writes, does not have its checksum.

    torch.load does not look at the checksums: about half of all flipped bits would be other weights.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise InputError(f"{path}: damaged ({damaged} does not have its checksum)")


CONTENT = {"config": dict, "state": dict, "ema": dict, "step": int}  # what every checkpoint holds
TRAINING = {"model": dict, "optimizers": dict, "others": dict}  # and what only numbered ones hold
BEST = {"name": str, "value": (int, float), "step": int}  # the best validation, if there was one


def check_content(content: dict[str, Any], path: str | Path) -> None:
    """InputError for a checkpoint that lacks a part, or whose part is of another type or not finite."""
    for name, kind in (CONTENT | TRAINING).items():
        value = content.get(name)
        if not isinstance(value, kind) and (name in CONTENT or name in content):
            raise InputError(f"{path}: not a checkpoint of ldm3d ({name} is {type(value).__name__})")
    best = content.get("best")
    valid = isinstance(best, dict) and all(isinstance(best.get(name), kind) for name, kind in BEST.items())
    if best is not None and not valid:
        raise InputError(f"{path}: not a checkpoint of ldm3d (best is {best!r:.60})")
    if content["step"] < 0 or not isinstance(content["state"].get("data"), dict):
        raise InputError(f"{path}: not a checkpoint of ldm3d (step is below 0, or the state has no data)")
    for part in ("model", "ema"):
        for key, value in content.get(part, {}).items():
            if not isinstance(value, Tensor):
                raise InputError(f"{path}: {part}: {key} is no tensor")
            if not torch.isfinite(value).all():
                raise InputError(f"{path}: {part}: {key} holds numbers that are not finite")


def load_file(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read any file of `save` onto the CPU. A file of another `kind` (None: any kind), and a file that cannot
    be read, raise InputError."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        with warnings.catch_warnings():  # of foreign pickles, which are refused anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
            check_sums(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: not a checkpoint of plain tensors and values (it may run code)"
        ) from None
    except Exception as e:  # torch.load and zipfile raise many kinds for a damaged file
        reason = (str(e).splitlines() or [type(e).__name__])[0].split(". ")[0]
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or "kind" not in content:
        raise InputError(f"{path}: not a checkpoint of ldm3d")
    if content["format"] > FORMAT:
        raise Newer(f"{path}: format {content['format']} is newer than this version reads ({FORMAT})")
    if kind is not None and content["kind"] != kind:
        raise InputError(f"{path}: is {maker(content['kind'])}, expected {maker(kind)}")
    return content


def load(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read a run's checkpoint onto the CPU. A checkpoint of another `kind` than "vae", "ldm" or "cdal" (None:
    any kind), and a file that cannot be read or lacks what a run's checkpoints hold, raise InputError."""
    content = load_file(path, kind)
    check_content(content, path)
    try:
        return upgrade(content)
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: not a checkpoint of ldm3d ({type(e).__name__}: {e})") from None


def step_files(run_dir: str | Path) -> list[Path]:
    """The numbered checkpoints of a run, newest first."""
    found = [p for p in Path(run_dir).glob("checkpoint_*.pt") if STEP_FILE.match(p.name)]
    return sorted(found, key=lambda p: int(STEP_FILE.match(p.name)[1]), reverse=True)


def load_latest(run_dir: str | Path, kind: str | None = None) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. A damaged one is named and passed over. One of a newer
    version of this program raises InputError: what it holds must not be trained over."""
    files = step_files(run_dir)
    for path in files:
        try:
            return load(path, kind)
        except Newer:
            raise
        except InputError as e:
            if path is files[-1]:
                raise
            print0(f"{e}; falling back to the checkpoint before it")
    return None


def load_run(run: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The checkpoint that a user means by a run: the file itself, or best.pt of the folder, else its newest
    checkpoint. Low-rank adapters are merged into its averaged weights. Where its data lie is taken from
    config.json: best.pt may be older than the last move."""
    run = Path(run)
    if run.is_file():
        content = load(run, kind)
    elif run.is_dir():
        content = load(run / "best.pt", kind) if (run / "best.pt").exists() else load_latest(run, kind)
    else:
        raise InputError(f"{run}: no such run folder or checkpoint")
    if content is None:
        raise InputError(f"{run}: no checkpoint in this folder")
    try:
        content["ema"] = merge(content["ema"])
    except (KeyError, RuntimeError) as e:
        raise InputError(f"{run}: its low-rank adapters are damaged ({type(e).__name__}: {e})") from None
    if run.is_dir() and "data" in content["config"] and (run / "config.json").exists():
        data = read_json(run / "config.json").get("data")
        if isinstance(data, dict) and isinstance(data.get("root"), str):
            content["config"]["data"]["root"] = data["root"]
    return content


def note_unvalidated(run: str | Path, content: dict[str, Any]) -> None:
    """Say whose weights `load_run(run)`, its `content`, has, where the run has not been validated yet."""
    run = Path(run)
    if run.is_dir() and not (run / "best.pt").exists():
        print0(f"note: {run} has no best.pt yet; its weights are those of step {content['step']}")


def prune(run_dir: str | Path, keep: int, step: int) -> None:
    """Delete old numbered checkpoints: all but the `keep` newest up to `step`, the one just saved.

    A checkpoint of a later step is deleted too. It must be damaged, since otherwise the run would have been
    resumed from it. best.pt stays.
    """
    files = step_files(run_dir)
    late = [path for path in files if int(STEP_FILE.match(path.name)[1]) > step]
    for path in late + files[len(late) + max(keep, 1) :]:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(run_dir: str | Path) -> None:
    """Delete temporaries that a killed process left behind."""
    for path in Path(run_dir).glob("*.tmp[0-9]*"):
        path.unlink(missing_ok=True)


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state_dicts hold the same tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict without the prefixes that DDP and torch.compile put in front."""
    return {
        re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", key): value for key, value in net.state_dict().items()
    }


def load_weights(
    net: nn.Module,
    state: dict[str, Tensor],
    where: str,
    may_miss: Iterable[str] = (),
) -> list[str]:
    """Copy `state` into `net`, strictly: a key that is missing must match one of the shell patterns
    `may_miss`, and none may be left over. Returns the keys that were missing, for the caller's message."""
    own = net.state_dict()
    missing = [k for k in own if k not in state]
    bad = [f"{k} is missing" for k in missing if not any(fnmatch.fnmatch(k, p) for p in may_miss)]
    bad += [f"{k} is left over" for k in state if k not in own]
    bad += [
        f"{k} is {tuple(state[k].shape)}, the network wants {tuple(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        raise InputError(f"{where}: the weights do not fit: {'; '.join(bad[:3])}{more}")
    net.load_state_dict(state, strict=False)
    return missing
