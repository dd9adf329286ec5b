"""A look into the files of all cases before training starts: whatever is wrong is found here.

Headers are read at every start. Voxels are read once: what was found in a file is kept in a cache, by path,
size and modification time (of a DICOM folder: of all its files). All problems end in one InputError. Reading
many files takes long: ranks read a share each, and write what they found every few seconds, so that an
inspection that was interrupted goes on where it was.

Besides the checks, the inspection measures what later steps need: the two scaling numbers of each channel
(transforms.py), the labels that occur, and a few facts from which a plan is made (fingerprint.py). The
numbers are those of the whole file as it is stored, before any resampling or crop. So a patch has the
intensities that the whole volume would have at this place.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import InputError
from ..engine.distributed import broadcast, gather, is_main, main_first, print0, rank, world_size
from ..engine.logger import progress
from .cases import Case, raise_all
from .loading import num_reading_threads, read_options, training_grid
from .settings import MAX_VOXELS, DataConfig, of_volumes
from .transforms import scaling_numbers
from .volumes import Header, read, read_header, stamp

MAX_LABEL, MAX_VALUE = 65535, 1e30  # of masks; of images, so that no sum of float32 overflows
SHOWN = 0.5, 99.5  # percentiles of a file that pictures show as black and white, see DataConfig.unbounded
OF_THE_VOLUME = "low", "high", "source_low", "source_high", "shown", "dtype"  # what a slice has of its volume
KEEP_EVERY = 5.0  # seconds, after which what was found is written
FEW_VALUES = 64  # an image of at most this many integers looks like a label map
THUMBNAIL = {2: 32, 3: 10}  # voxels along each axis
MEASURED = {"image": 14, "source": 14, "mask": 24}  # bytes a voxel at most while `_measure` looks at a file


@dataclass(frozen=True)
class ImageFacts:
    """What a plan wants to know of the intensities in one file, all channels together but for two."""

    lowest: tuple[float, ...]  # per channel
    highest: tuple[float, ...]
    robust: tuple[float, float]  # percentiles 0.5 and 99.5
    integers: bool  # are all values integers?
    num_values: int  # different values; 0: more than FEW_VALUES, or not all integers
    thumbnail: str  # the image on THUMBNAIL voxels an axis, its range in 256 levels, two hex digits a voxel


@dataclass(frozen=True)
class CaseInfo:
    """What was found in the files of a case. Shape, spacing and affine are those of the training grid."""

    shape: tuple[int, ...]  # *S
    spacing: tuple[float, ...]  # mm
    affine: tuple[tuple[float, ...], ...]  # voxel index -> mm
    orientation: str | None  # axis codes of the image file, such as "LPS"
    low: tuple[float, ...]  # per channel, in the units of the file: the value that becomes -1
    high: tuple[float, ...]  # the value that becomes 1
    source_low: tuple[float, ...] = ()
    source_high: tuple[float, ...] = ()
    labels: tuple[int, ...] = ()  # labels that occur in the mask
    shown: tuple[tuple[float, float], ...] = ()  # per channel, in the units of the file: black and white
    content: str = ""  # hash of the voxels of the image; "" if they all have one value
    source_content: str = ""  # the same of the source
    mask_content: str = ""  # hash of the voxels of the mask
    facts: ImageFacts | None = None  # of the image; None: found by an older version, and not asked for
    labelled: float | None = None  # fraction of the mask that is not 0
    centres: tuple[tuple[float, ...], ...] = ()  # value and centre of each, see `centres_of`
    dtype: str = "float32"  # of the values in the image file, such as "uint8"

    @property
    def channels(self) -> int:
        return len(self.low)


def _jobs(cases: list[Case]) -> list[tuple[Path, str]]:
    """(file, role) of all files of the cases, each once."""
    return list(dict.fromkeys(job for case in cases for job in case.files))


def _each(
    function: Callable[[Path, str], Any],
    jobs: Iterable[tuple[Path, str]],
    title: str,
    problems: list[str],
    keep: Callable[[dict], None] = lambda done: None,
    num_bytes: float = 0.0,
) -> dict[tuple[Path, str], Any]:
    """{(path, role): function(path, role)}, in parallel threads. An exception becomes a problem.

    keep: called with what is done so far, every few seconds and at the end, also on Ctrl-C. num_bytes: of
    memory that a call needs.
    """
    jobs, done, failed = list(jobs), {}, {}
    pool = ThreadPoolExecutor(num_reading_threads(num_bytes))
    futures = {pool.submit(function, *job): job for job in jobs}
    kept = time.monotonic()
    try:
        for future in progress(as_completed(futures), title, len(jobs)):
            job, now = futures[future], time.monotonic()
            try:
                done[job] = future.result()
            except InputError as e:
                failed[job] = str(e)
            except Exception as e:  # whatever a library raises: the user needs the name of the file
                failed[job] = f"{job[0]}: cannot be read ({type(e).__name__}: {e})"
            if now - kept > KEEP_EVERY:
                keep(done)
                kept = now
    finally:  # on Ctrl-C no other file is begun, and those that were being read are finished
        pool.shutdown(cancel_futures=True)
        ended = {job: future for future, job in futures.items() if not future.cancelled()}
        done |= {job: future.result() for job, future in ended.items() if not future.exception()}
        keep(done)
    problems += [failed[job] for job in jobs if job in failed]
    return {job: done[job] for job in jobs if job in done}


def _inspect_headers(cases: list[Case], config: DataConfig) -> dict[tuple[Path, str], Header]:
    """The headers of all files, after checking that the files fit together."""
    problems: list[str] = []

    def look(path: Path, role: str) -> Header:
        return read_header(path, **read_options(role, config))

    headers = _each(look, _jobs(cases), "headers", problems)
    first: dict[str, tuple[Path, Header]] = {}
    for case in cases:
        image = headers.get((case.image, "image"))
        for path, role in case.files:
            header = headers.get((path, role))
            if header is not None:
                other, reference = first.setdefault(role, (path, header))
                problem = _unfit(role, header, image, reference, config)
                problems += [f"{path}: {problem.format(image=case.image, other=other)}"] if problem else []
    raise_all(problems)
    return headers


def _absurd(header: Header, config: DataConfig) -> str | None:
    """What is wrong if the training grid has so many more voxels than the file that a unit is mistaken."""
    shape = training_grid(header, config)[0]
    new, old = math.prod(shape), math.prod(header.shape)
    if new <= old or (new <= MAX_VOXELS and (new <= 1000 * old or new <= 2**24)):
        return None
    key = "size" if config.resize else "spacing"
    return f"would have {new:.2g} voxels, {shape}, instead of {old:.2g} (data.{key} {getattr(config, key)})"


def _unfit(
    role: str, header: Header, image: Header | None, reference: Header, config: DataConfig
) -> str | None:
    """What is wrong with a header beside its image and the first file of the same role; None: nothing."""
    if len(header.shape) != config.dims:
        return f"is {len(header.shape)}-D {header.shape}, data.dims is {config.dims}"
    if config.dims == 3 and min(header.shape) == 1:
        return f"a single slice {header.shape}, data.dims is 3 (a DICOM volume is named by its folder)"
    if role != "mask" and header.palette:
        return "has a palette: its values are numbers of colours, and no intensities; save it as grey or RGB"
    if role == "mask" and header.channels != 1:
        return f"a mask has one channel, this has {header.channels}"
    if header.channels != reference.channels:
        return f"has {header.channels} channels, {{other}} has {reference.channels}"
    if role == "image":
        return _absurd(header, config)
    if image is None or len(image.shape) != config.dims:
        return None
    if header.shape != image.shape:
        return f"{role} has shape {header.shape}, its image {{image}} has {image.shape}"
    if config.check_affine and (off := voxels_off(header, image)) > 1:
        return (
            f"{role} lies up to {off:.3g} voxels off its image {{image}} "
            "(by their affines; --data.check_affine false lets it pass)"
        )
    return None


def voxels_off(one: Header | CaseInfo, image: Header | CaseInfo) -> float:
    """How far the same corner of two grids of one shape lies apart, in voxels of `image`: the largest
    distance along any axis. 0 if the format of a file states no position, as TIFF and NumPy.

    Voxels and not mm: 2 mm are less than a slice of 5 mm, and four pixels of 0.5 mm.
    """
    if not (one.orientation and image.orientation):
        return 0.0
    ends = np.stack(np.meshgrid(*((0, n - 1) for n in one.shape), 1), -1).reshape(-1, len(one.shape) + 1)
    moved = np.linalg.solve(np.asarray(image.affine), np.asarray(one.affine)) @ ends.T  # voxels of `image`
    return float(np.abs(moved - ends.T).max())


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array).hexdigest()[:32]


def few_values(values: np.ndarray) -> int:
    """How many different values there are, if these are integers and at most FEW_VALUES; else 0."""
    some = values.reshape(-1)[:: max(1, values.size // 10_000)]
    if len(np.unique(some)) > FEW_VALUES or not (values == np.rint(values)).all():
        return 0
    num = len(np.unique(values))
    return num if num <= FEW_VALUES else 0


def thumbnail(array: np.ndarray) -> str:
    """An image (C, *S), the mean of its channels, as `ImageFacts` keeps it: averages over boxes."""
    dims = array.ndim - 1
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dims]
    small = pool(torch.from_numpy(array.mean(0))[None], THUMBNAIL[dims]).numpy()
    levels = (small - small.min()) / max(float(np.ptp(small)), 1e-30) * 255
    return np.rint(levels).astype(np.uint8).tobytes().hex()


def centres_of(labels: np.ndarray) -> list[list[float]]:
    """Of every value but 0 in a label map (*S): the value, and its mean position along each axis, 0 to 1."""
    counts = np.bincount(labels.ravel())
    values = np.flatnonzero(counts[1:]) + 1
    columns = [values]
    for axis, n in enumerate(labels.shape):
        place = ((np.arange(n) + 0.5) / n).reshape([-1 if a == axis else 1 for a in range(labels.ndim)])
        sums = np.bincount(labels.ravel(), np.broadcast_to(place, labels.shape).ravel())
        columns.append(sums[values] / counts[values])
    return np.stack(columns, 1).tolist()


def _facts(array: np.ndarray) -> dict[str, Any]:
    """The fields of an ImageFacts of an image (C, *S)."""
    columns = array.reshape(len(array), -1)
    return {
        "lowest": columns.min(1).tolist(),
        "highest": columns.max(1).tolist(),
        "robust": np.percentile(array, (0.5, 99.5)).tolist(),
        "integers": bool((array == np.rint(array)).all()),
        "num_values": few_values(array),
        "thumbnail": thumbnail(array),
    }


def _measure(path: Path, role: str, config: DataConfig) -> dict[str, Any]:
    """A look at every voxel: "content", a hash of them; of an image or source {"low", "high"} per channel,
    and "facts"; of a mask {"labels", "labelled", "centres"}."""
    array = read(path, **read_options(role, config)).array
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(f"{path}: {bad} of {array.size} voxels are NaN or infinite")
    if role == "mask":
        labels = np.rint(array)
        off = np.abs(array - labels)
        if off.max() > 1e-3:
            raise InputError(f"{path}: labels must be integers, found {array.flat[off.argmax()]:g}")
        if not 0 <= labels.min() <= labels.max() <= MAX_LABEL:
            raise InputError(f"{path}: labels from {labels.min():g} to {labels.max():g}; is this a mask?")
        labels = labels.reshape(array.shape[1:]).astype(np.int64)
        found = np.flatnonzero(np.bincount(labels.ravel())).tolist()
        fraction, centres = float((labels != 0).mean()), centres_of(labels)
        return {"labels": found, "content": _hash(array), "labelled": fraction, "centres": centres}
    if np.abs(array).max() > MAX_VALUE:
        raise InputError(f"{path}: values up to {np.abs(array).max():.2g}, too large to be intensities")
    pairs = [scaling_numbers(channel, config.scaling, config.percentiles, config.window) for channel in array]
    visible = array if config.unbounded else ()
    shown = [scaling_numbers(channel, "percentile", SHOWN, config.window) for channel in visible]
    content = _hash(array) if array.min() < array.max() else ""
    low, high = zip(*pairs, strict=True)
    return {
        "low": list(low),
        "high": list(high),
        "shown": shown,
        "content": content,
        "facts": _facts(array),
    }


def _by_facts(known: dict[str, Any], config: DataConfig) -> dict[str, Any] | None:
    """`_measure` of an image by another rule than it was measured by, where facts tell the two numbers."""
    facts = known["facts"]
    low_high = {
        "minmax": (facts["lowest"], facts["highest"]),
        "window": tuple([value] * len(facts["lowest"]) for value in config.window),
    }.get(config.scaling)
    return low_high and {**known, "low": low_high[0], "high": low_high[1]}


def _checksum(files: dict[str, list]) -> int:
    return zlib.crc32(json.dumps(files).encode())


def _read_cache(cache: Path | None) -> dict[str, list]:
    """What earlier inspections found. A missing or damaged cache, or one of an older version, is empty."""
    if cache is None:
        return {}
    try:
        content = json.loads(Path(cache).read_text())
        return content["files"] if content["checksum"] == _checksum(content["files"]) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _write_cache(cache: Path, files: dict[str, list]) -> None:
    """Atomically. A folder that cannot be written only costs time: the next start reads all voxels again."""
    temporary = Path(f"{cache}.tmp{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"checksum": _checksum(files), "files": files}))
        os.replace(temporary, cache)
    except OSError as e:
        print0(f"note: what was found in the files cannot be kept in {cache} ({e.strerror})")


def _part_of(cache: Path) -> Path:
    """Where this rank keeps what it has found until all ranks have found their share."""
    return cache.with_name(f"{cache.name}.rank{rank()}") if rank() else cache


def _known_and_new(
    jobs: list[tuple[Path, str]], config: DataConfig, cache: Path | None, with_facts: bool
) -> tuple[dict[int, dict], dict[int, list]]:
    """({number of the job: what is known of the file}, {number: the key and state of a file that is not known
    by this rule}), from the cache and what ranks have left that were interrupted."""
    if cache is None:
        return {}, {i: [] for i in range(len(jobs))}
    parts = sorted(cache.parent.glob(f"{glob.escape(cache.name)}.rank*[0-9]"))
    cached = {key: kept for part in (cache, *parts) for key, kept in _read_cache(part).items()}
    if parts:
        _write_cache(cache, cached)
        for part in parts:
            part.unlink(missing_ok=True)
    found, new = {}, {}
    first = DataConfig()  # the rule by which a plan looks at the files
    for i, (path, role) in enumerate(jobs):
        options, is_mask = read_options(role, config), role == "mask"
        rules = [(c.scaling, c.percentiles, c.window, options) for c in (config, first)]
        rules[0] += ("shown",) if config.unbounded else ()  # what older versions found lacks it
        key, known = (f"{path.resolve()} {'mask' if is_mask else rule}" for rule in rules)
        now = stamp(path)
        entry, other = (
            kept[2] if (kept := cached.get(name)) and kept[:2] == [*now] else None for name in (key, known)
        )
        if entry is None and not is_mask and other and "facts" in other:
            entry = _by_facts(other, config)
        if entry is not None and (not with_facts or "centres" in entry or "facts" in entry):
            found[i] = entry
        else:
            new[i] = [key, *now]
    return found, new


def _inspect_voxels(
    headers: dict[tuple[Path, str], Header], config: DataConfig, cache: Path | None, with_facts: bool
) -> dict[tuple[Path, str], dict]:
    """`_measure` of all files, from the cache where neither the file nor the rule has changed. with_facts: an
    entry of an older version, which lacks them, is measured again. Ranks measure a share each."""
    jobs = list(headers)
    found, new = broadcast(_known_and_new(jobs, config, cache, with_facts) if is_main() else None)
    share = {jobs[i]: i for i in list(new)[rank() :: world_size()]}
    problems: list[str] = []
    part = cache and _part_of(cache)
    before = _read_cache(part)

    def keep(part: Path, measured: dict[int, dict]) -> None:
        if measured and cache is not None:
            _write_cache(part, before | {new[i][0]: [*new[i][1:], entry] for i, entry in measured.items()})

    def keep_share(measured: dict[tuple[Path, str], dict]) -> None:
        keep(part, {share[job]: entry for job, entry in measured.items()})

    def measure(path: Path, role: str) -> dict[str, Any]:
        return _measure(path, role, config)

    sizes = (MEASURED[job[1]] * headers[job].channels * math.prod(headers[job].shape) for job in share)
    most = max(sizes, default=0)
    measured = _each(measure, share, "reading every voxel once", problems, keep_share, most)
    shares = gather(({share[job]: entry for job, entry in measured.items()}, problems))
    everything = {i: entry for entries, _ in shares for i, entry in entries.items()}
    with main_first():
        if is_main() and len(shares) > 1:
            keep(cache, everything)
        elif not is_main() and cache is not None:
            part.unlink(missing_ok=True)
        raise_all([problem for _, theirs in shares for problem in theirs])
    return {jobs[i]: entry for i, entry in (found | everything).items()}


def _above(numbers: dict[str, list]) -> tuple[float, ...]:
    """`high` of each channel; low + 1 for a channel with one value everywhere, which is then scaled to -1."""
    return tuple(
        high if high > low else low + 1.0 for low, high in zip(numbers["low"], numbers["high"], strict=True)
    )


def _labels(path: Path, found: dict, config: DataConfig, problems: list[str]) -> tuple[int, ...]:
    """Labels 0, 1, 2 ... of the values in a mask file. A value that is not allowed becomes a problem."""
    values = found[path, "mask"]["labels"]
    allowed = config.label_values or range(config.num_labels or MAX_LABEL + 1)
    wrong = [value for value in values if value not in allowed]
    if wrong:
        expected = f"one of {allowed}" if config.label_values else f"0 to {allowed[-1]}"
        key = "label_values" if config.label_values else "num_labels"
        problems.append(f"{path}: label {wrong[0]}, expected {expected} (data.{key})")
    return tuple(allowed.index(value) for value in values if value in allowed)


def _of_raters(masks: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found in the masks of several raters, or of none, as if it were one mask."""
    if not masks:
        return {}
    content = _hash(np.frombuffer("".join(mask["content"] for mask in masks).encode(), np.uint8))
    both = {"content": content, "centres": masks[0].get("centres", ())}
    if all("labelled" in mask for mask in masks):  # an older version found none
        both["labelled"] = float(np.mean([mask["labelled"] for mask in masks]))
    return both


def _facts_of(image: dict[str, Any]) -> ImageFacts | None:
    """None where an older version has found none. Facts that only older versions wanted are left out."""
    facts = {k: tuple(v) if isinstance(v, list) else v for k, v in image.get("facts", {}).items()}
    known = {k: v for k, v in facts.items() if k in ImageFacts.__dataclass_fields__}
    return ImageFacts(**known) if facts else None


def _grid_of(header: Header, config: DataConfig) -> dict[str, Any]:
    """Shape, spacing and affine of a CaseInfo, from the header of its image."""
    shape, spacing, affine = training_grid(header, config)
    return {
        "shape": shape,
        "spacing": tuple(map(float, spacing)),
        "affine": tuple(tuple(map(float, row)) for row in affine),
    }


def inspect_cases(
    cases: list[Case], config: DataConfig, cache: Path | None = None, with_facts: bool = False
) -> dict[str, CaseInfo]:
    """Case id -> CaseInfo, after a look into every file; one InputError for everything that is wrong.

    `cache`: JSON file of what was found in voxels, see above. Ranks read a share of the voxels each, and tell
    each other what they found. with_facts: the facts that a plan is made from must be among what was found.
    The volumes of slices are looked into as well.
    """
    volumes = {case.volume.id: case.volume for case in cases if case.volume}
    whole = inspect_cases(list(volumes.values()), of_volumes(config), cache) if volumes else {}
    with main_first():
        headers = _inspect_headers(cases, config)
    found = _inspect_voxels(headers, config, cache, with_facts)
    infos, problems = {}, []
    nothing = {"low": (), "high": (), "content": ""}
    for case in cases:
        header, image = headers[case.image, "image"], found[case.image, "image"]
        source = found[case.source, "source"] if case.source else nothing
        source_content = source["content"]
        masks = [found[path, "mask"] for path in case.masks]
        mask = masks[0] if len(masks) == 1 else _of_raters(masks)
        if case.source and config.paired_scaling == "shared":
            if len(source["low"]) != len(image["low"]):
                problems.append(f"{case.source}: paired_scaling shared needs the channels of {case.image}")
            source = image
        infos[case.id] = CaseInfo(
            **_grid_of(header, config),
            orientation=header.orientation,
            low=tuple(image["low"]),
            high=_above(image),
            source_low=tuple(source["low"]),
            source_high=_above(source),
            labels=tuple(
                dict.fromkeys(k for path in case.masks for k in _labels(path, found, config, problems))
            ),
            shown=tuple(map(tuple, image.get("shown", ()))),
            content=image["content"],
            source_content=source_content,
            mask_content=mask.get("content", ""),
            facts=_facts_of(image),
            labelled=mask.get("labelled"),
            centres=tuple(map(tuple, mask.get("centres", ()))),
            dtype=header.dtype.name,
        )
        if case.volume:  # scaled by the numbers of the volume: its slices stay alike
            numbers = {name: getattr(whole[case.volume.id], name) for name in OF_THE_VOLUME}
            infos[case.id] = replace(infos[case.id], **numbers)
    blank = [
        job[0] for job, numbers in found.items() if job[1] != "mask" and numbers["low"] == numbers["high"]
    ]
    if config.dims == 3:  # slices of a volume may well be empty
        problems += [f"{path}: all voxels have the same value" for path in blank]
    elif blank:
        print0(f"note: {len(blank)} images have the same value everywhere, such as {blank[0]}")
    raise_all(problems)
    return infos


def on_other_grid(infos: dict[str, CaseInfo], cases: list[Case], config: DataConfig) -> dict[str, CaseInfo]:
    """The infos of inspected cases for a `config` that differs in its grid alone. No voxel is read again."""
    headers = _inspect_headers(cases, config)
    return {
        case.id: replace(infos[case.id], **_grid_of(headers[case.image, "image"], config)) for case in cases
    }
