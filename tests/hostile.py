"""A box in which a script meets a hostile input, and what every script owes to its user there.

A box is a folder with data and finished tiny runs, in which a case first damages something and then runs a
command, in a process of its own that is forked from a server with all modules loaded. The demands:

    exit code 2 and one line on stderr, or exit code 0 and a right result; no traceback
    no hang (CPU_LIMIT seconds), no crash
    nothing is written, changed or deleted outside the folders that the command was given
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing.context
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import tiny
import torch

from ldm3d.data.phantoms import write_phantoms
from ldm3d.data.volumes import read
from ldm3d.engine.distributed import run_script

CPU_LIMIT, WALL_LIMIT, MEMORY = 20, 90, 4 * 2**30  # seconds; seconds, for what waits; bytes of address space
CASES = 6
Action = Callable[[Path, np.random.Generator], Any]  # (the box, a generator) -> changes files in the box
Command = tuple[str, ...]  # script and flags
Outcome = tuple[int | str, str, str]  # exit code or "hang", stdout, stderr


@dataclass(frozen=True)
class Case:
    """A command that meets something hostile, and what is demanded of it.

    damage: what is done to the box first, if the command is not hostile itself. before: commands, and actions
    that prepare. words: a refusal names this. expect:

        refuse   exit code 2
        same     exit code 2, or 0 and the result that the command has without the damage
        right    exit code 0 and that result
        fine     exit code 0 and a finite result
        any      exit code 2, or 0 and a finite result
    """

    name: str
    command: Command
    damage: Action | None = None
    expect: str = "any"
    before: Sequence[Command | Action] = ()
    words: str = ""

    @property
    def generator(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))


# --- processes ----------------------------------------------------------------------------------------------


def _work(command: Command, box: str) -> None:
    """Run a command as the whole work of this forked process, its output in files beside the box."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{box}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", errors="backslashreplace") for n in (1, 2))
    os.chdir(box)
    torch.set_num_threads(1)
    code = run_script(importlib.import_module(command[0]).main, list(command[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes: forks of a server that has everything loaded (hostile_server.py), on the CPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hostile_server"])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def run(command: Command, box: Path) -> Outcome:
    """Run a command in a box."""
    process = server().Process(target=_work, args=(command, str(box)))
    process.start()
    process.join(WALL_LIMIT)
    killed = process.exitcode in (None, -signal.SIGKILL, -signal.SIGXCPU)
    code: int | str = "hang" if killed else process.exitcode
    process.kill()
    process.join()
    out, err = (Path(f"{box}.{name}") for name in ("out", "err"))
    return code, *(p.read_text(errors="replace") if p.exists() else "" for p in (out, err))


# --- the box ------------------------------------------------------------------------------------------------


def train_vae(*more: object, run: str = "new", steps: int = 1) -> Command:
    return ("train_vae", *tiny.vae_flags(Path("data"), Path(run), steps, *map(str, more)))


def train_ldm(*more: object, run: str = "new", steps: int = 1) -> Command:
    return ("train_ldm", *tiny.ldm_flags(Path("vae"), Path(run), steps, *map(str, more)))


def train_cdal(*more: object, run: str = "new", steps: int = 1) -> Command:
    return ("train_cdal", *tiny.cdal_flags(Path("data"), Path(run), steps, *map(str, more)))


def sample(*more: object, run: str = "ldm") -> Command:
    settings = {"--num": "1", "--steps": "1", "--out": "out"}
    words = [w for k, v in settings.items() if k not in more for w in (k, v)]
    return ("sample", run, *words, *map(str, more))


def images_to(run: str, *more: object, images: str = "data/images") -> Command:
    votes = ("--votes", "1") if run == "cdal" and "--votes" not in more else ()
    return ("sample", run, images, "--out", "out", *votes, *map(str, more))


CONDITIONED = ("--condition.use", "class,text,labels,image", "--condition.context_dim", "16", *tiny.BOUND)


def make_template(box: Path) -> Path:
    """Data and a finished run of every kind, which each case gets a copy of."""
    box.mkdir(parents=True)
    write_phantoms(box / "data", CASES, dims=2, size=(16, 16), spacing=(12.0, 11.0))
    for path in sorted((box / "data" / "images").iterdir()):
        array = tifffile.imread(path).astype(np.float64)
        array = (255 * (array - array.min()) / np.ptp(array)).round().astype(np.uint8)
        tifffile.imwrite(path, array, photometric="minisblack")
    flags = ("--data.learn_sources", "true")
    for command in (
        train_vae(*flags, run="vae", steps=2),
        train_ldm(*CONDITIONED, run="ldm", steps=2),
        train_cdal(run="cdal", steps=2),
    ):
        code, out, err = run(command, box)
        assert code == 0, (command, out, err)
    return box


def contents(folder: Path, but: tuple[Path, ...]) -> dict[str, str]:
    """Every file below `folder` with a digest of its content, but for what is below the paths `but`."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in but]
        for path in (Path(parent, name) for name in folders + files):
            if path not in but:
                data = path.read_bytes() if path.is_file() else b""
                found[str(path)] = hashlib.sha1(data).hexdigest() if data else str(path.is_dir())
    return found


def may_write(command: Command, box: Path) -> tuple[Path, ...]:
    """The folders that a command was given to write to, and the files of its output."""
    words = dict(itertools.pairwise(command))
    given = [words.get("--run.dir"), words.get("--data.cache_dir"), words.get("--out"), "cache", "runs"]
    if command[0] == "sample" and not words.get("--out"):
        given += command[1:2]
    return (*(box / word for word in given if word), *(Path(f"{box}.{name}") for name in ("out", "err")))


# --- results ------------------------------------------------------------------------------------------------


def result(command: Command, box: Path) -> dict[str, Any]:
    """What a command has made, to compare: the numbers of a log and what the run keeps of its data, or the
    voxels of all written images as floats. The type of the images is left out: the same values stored as
    floats give the same training."""
    words = dict(itertools.pairwise(command))
    if command[0] != "sample":
        log = (box / words["--run.dir"] / "log.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k not in tiny.MEASURED} for line in log]
        made = {f"{row['split']} {row['step']}": row for row in rows}
        newest = torch.load(sorted((box / words["--run.dir"]).glob("checkpoint_*.pt"))[-1], weights_only=True)
        return made | {"spec": {k: v for k, v in newest["state"]["data"].items() if k != "dtype"}}
    folder = box / (words.get("--out") or command[1])
    images = [p for p in sorted(folder.rglob("*")) if p.name.endswith((".tif", ".nii", ".nii.gz"))]
    return {str(p.relative_to(folder)): read(p).array for p in images}


def not_finite(made: dict[str, Any], out: str) -> str | None:
    """What of a result is missing, or no number without a word on stdout; None: it is fine."""
    if not made:
        return "no result"
    for name, value in made.items():
        if isinstance(value, np.ndarray) and not np.isfinite(value).all():
            return f"{name} is not finite"
        bad = name.startswith("train") and not math.isfinite(value["loss"] or math.nan)
        if bad and "not finite" not in out:
            return f"loss of {name} is not finite"
    return None


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = ((one[k], other[k]) for k in one)
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else repr(a) == repr(b) for a, b in pairs)


def prepare(case: Case, template: Path, place: Path, damaged: bool) -> tuple[Path, Outcome | None]:
    """A copy of the template as the case wants it: (the box, how a command before the last one failed or
    None)."""
    box = place / "above" / "box"
    shutil.rmtree(place, ignore_errors=True)
    box.parent.mkdir(parents=True)
    shutil.copytree(template, box, symlinks=True)
    draw = case.generator
    for action in (*case.before, *([case.damage] if damaged and case.damage else [])):
        if isinstance(action, tuple):
            outcome = run(action, box)
            if outcome[0] != 0:
                return box, outcome
        else:
            action(box, draw)
    return box, None


REFERENCES: dict[str, dict[str, Any]] = {}


def reference(case: Case, template: Path, place: Path) -> dict[str, Any]:
    """The result of the case's command without the damage."""
    key = repr((case.command, [getattr(a, "__name__", a) for a in case.before]))
    if key not in REFERENCES:
        box, failed = prepare(case, template, place, damaged=False)
        outcome = failed or run(case.command, box)
        assert outcome[0] == 0, f"{case.name}: without damage {case.command} ends with {outcome}"
        REFERENCES[key] = result(case.command, box)
    return REFERENCES[key]


def broken_demand(case: Case, template: Path, place: Path) -> str | None:
    """Run a case: the demand that its command breaks, in words; None: all hold."""
    wanted = reference(case, template, place) if case.expect in ("same", "right") else None
    box, failed = prepare(case, template, place, damaged=True)
    given = may_write(case.command, box)
    before = contents(place, given)
    code, out, err = failed or run(case.command, box)
    after = contents(place, given)
    if changed := sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)):
        return f"wrote outside: {', '.join(k.removeprefix(str(place)) for k in changed[:3])}"
    if "Traceback" in out + err:
        lines = [line.strip() for line in (out + err).splitlines() if line.strip()]
        where = [line for line in lines if line.startswith(f'File "{tiny.ROOT}')]
        return f"traceback: {lines[-1][:150]} | {where[-1] if where else ''}"
    if code not in (0, 2):
        return f"exit code {code}: {err.strip()[-200:]}"
    if code == 2:
        if err.count("\n") != 1:
            return f"{err.count(chr(10))} lines on stderr: {err[:300]!r}"
        if case.expect in ("right", "fine"):
            return f"refused what is right: {err.strip()[:200]}"
        return None if case.words in err else f"the refusal does not name {case.words!r}: {err.strip()[:200]}"
    if case.expect == "refuse":
        return f"taken without a word: {(out + err).strip()[-200:]!r}"
    if err.strip():
        return f"exit code 0, and on stderr: {err.strip()[:200]!r}"
    try:
        made = result(case.command, box)
    except Exception as e:
        return f"its result cannot be read: {type(e).__name__}: {e}"
    if problem := not_finite(made, out):
        return problem
    if wanted is not None and not same(made, wanted):
        return "another result than without the damage"
    return None


# --- damage -------------------------------------------------------------------------------------------------


def path_of(box: Path, pattern: str) -> Path:
    """The one file, or the last in order, that fits the pattern."""
    return sorted(box.glob(pattern))[-1]


def flip(pattern: str, first: float = 0.0, last: float = 1.0) -> Action:
    """One bit of a file is flipped, between these shares of its length (above 1: bytes)."""

    def act(box: Path, draw: np.random.Generator) -> None:
        path = path_of(box, pattern)
        data = bytearray(path.read_bytes())
        low, high = (int(v if v > 1 else v * len(data)) for v in (first, last))
        data[int(draw.integers(low, max(min(high, len(data)), low + 1)))] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)

    return act


def cut(pattern: str, share: float) -> Action:
    """The file loses its end: a share below 0 is a number of bytes that are lost."""

    def act(box: Path, draw: np.random.Generator) -> None:
        path = path_of(box, pattern)
        data = path.read_bytes()
        path.write_bytes(data[: int(share if share < 0 else share * len(data))])

    return act


def put(pattern: str, content: bytes | str | Callable[[bytes], bytes]) -> Action:
    """The file gets another content, perhaps made from the old one. A name without * is made anew."""

    def act(box: Path, draw: np.random.Generator) -> None:
        path = box / pattern if "*" not in pattern else path_of(box, pattern)
        new = content(path.read_bytes()) if callable(content) else content
        if path.is_symlink() or path.exists():
            path.unlink()
        path.write_bytes(new.encode() if isinstance(new, str) else new)

    return act


def edit_json(pattern: str, change: Callable[[Any], Any]) -> Action:
    """The content of a JSON file, changed in place or replaced by what `change` returns."""

    def act(data: bytes) -> bytes:
        content = json.loads(data)
        changed = change(content)
        return json.dumps(content if changed is None else changed).encode()

    return put(pattern, act)


def edit_checkpoint(pattern: str, change: Callable[[Any], Any]) -> Action:
    """The content of a checkpoint, changed in place or replaced by what `change` returns."""

    def act(data: bytes) -> bytes:
        content = torch.load(io.BytesIO(data), weights_only=True)
        changed = change(content)
        buffer = io.BytesIO()
        torch.save(content if changed is None else changed, buffer)
        return buffer.getvalue()

    return put(pattern, act)


def delete(pattern: str) -> Action:
    def act(box: Path, draw: np.random.Generator) -> None:
        path = path_of(box, pattern)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def instead(pattern: str, make: Callable[[Path], Any]) -> Action:
    """The file is deleted, and make(path) puts something in its place."""

    def act(box: Path, draw: np.random.Generator) -> None:
        path = path_of(box, pattern)
        path.unlink()
        make(path)

    return act
