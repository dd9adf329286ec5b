"""From a checked table of cases to batches of tensors, and back to volumes in the case's own units and place.

An item is asked for by (position, index): `index` names the case, `position` counts samples over the whole
run and keys all that is random, so that training depends on neither ranks, micro-batches, workers nor
restarts:

    position p = step * batch_size + i,    index = permutation(seed, epoch)[p mod n],    epoch = p div n

Rank r of W takes the places i in [r B / W, (r + 1) B / W). A window that is larger than its case repeats the
edge; its first voxel is in the item ("start"), so that `restore` crops the padding and gives the true affine.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import InputError, from_dict
from ..engine.distributed import is_main, keyed_generator, print0, rank, world_size
from .cases import AugmentConfig, Case, DataConfig, find_cases, resolve_root, split_cases
from .scan import MAX_LABEL, CaseInfo, load_role, scan_cases
from .transforms import augment, centred, cut, scale, unscale
from .volumes import PICTURE, SUFFIXES, Volume, is_volume_file, strip_suffix


@dataclass(frozen=True)
class DataSpec:
    """What a checkpoint keeps of the training data: size, spacing, units and orientation of samples."""

    dims: int
    channels: int
    source_channels: int  # 0: no such role
    size: tuple[int, ...]  # voxels of whole cases and samples
    spacing: tuple[float, ...]  # mm, median of the training cases
    orientation: str | None  # axis codes that files are written in, the most frequent in training
    scaling: str
    low: tuple[float, ...]  # file's units that become -1 and 1, per channel: medians of the training cases
    high: tuple[float, ...]
    source_low: tuple[float, ...]
    source_high: tuple[float, ...]
    num_labels: int | None  # of the masks, background included; None: no such role
    num_classes: int | None  # of the class column; None: no such column
    reference: dict[str, float] | None = None  # scores of real cases, to compare samples with

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSpec:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @property
    def clipped(self) -> bool:
        """Do scaled intensities stay within [-1, 1]?"""
        return self.scaling in ("percentile", "window")

    def numbers(self, info: CaseInfo | None, role: str = "image") -> tuple[tuple[float, ...], ...]:
        """(low, high) of a case, or of the training set if `info` is None or the scaling is by data set."""
        owner = self if info is None or self.scaling == "dataset" else info
        return (owner.low, owner.high) if role == "image" else (owner.source_low, owner.source_high)

    def to_volume(self, x: Tensor) -> Volume:
        """A sample x (C, *S), scaled, as a volume in the units of the training data, around the origin;
        integer x is left as it is."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:-1, -1] = [-(n - 1) / 2 * mm for n, mm in zip(x.shape[1:], self.spacing, strict=True)]
        array = x.detach().cpu().numpy()
        if x.is_floating_point():
            array = unscale(array.astype(np.float32), *self.numbers(None), self.clipped)
        return Volume(array, affine, self.orientation)


def make_spec(
    cases: list[Case],
    infos: dict[str, CaseInfo],
    split: dict[str, list[str]],
    config: DataConfig,
    multiple: tuple[int, ...] | None = None,
) -> DataSpec:
    """Sizes, medians and counts. The default size is the largest training shape, rounded up to `multiple`."""
    train = [infos[name] for name in split["train"]]
    largest = [max(info.shape[axis] for info in train) for axis in range(config.dims)]
    rounded = tuple(-(-n // m) * m for n, m in zip(largest, multiple or (1,) * config.dims, strict=True))
    labels = [label for case in cases if case.mask for label in infos[case.id].labels]
    num_labels = config.num_labels or len(config.label_values) or max(labels, default=0) + 1
    classes = [case.label for case in cases if case.label is not None]
    low, high = _typical([info.low for info in train], [info.high for info in train], config.scaling)
    source = ([info.source_low for info in train], [info.source_high for info in train])
    source_low, source_high = _typical(*source, config.scaling)
    return DataSpec(
        dims=config.dims,
        channels=len(low),
        source_channels=len(source_low),
        size=config.size or rounded,
        spacing=tuple(statistics.median(info.spacing[axis] for info in train) for axis in range(config.dims)),
        orientation=Counter(info.orientation for info in train).most_common(1)[0][0],
        scaling=config.scaling,
        low=low,
        high=high,
        source_low=source_low,
        source_high=source_high,
        num_labels=num_labels if any(case.mask for case in cases) else None,
        num_classes=max(classes) + 1 if classes else None,
    )


def _typical(low: list, high: list, scaling: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Medians of the cases' numbers; or mean -+ std of all their voxels, each case with the same weight."""
    a, b = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)  # (cases, C)
    if scaling == "dataset":
        means, stds = (a + b) / 2, (b - a) / 2
        mean = means.mean(0)
        std = np.sqrt((stds**2 + means**2).mean(0) - mean**2)
        return tuple((mean - std).tolist()), tuple((mean + std).tolist())
    return tuple(np.median(a, 0).tolist()), tuple(np.median(b, 0).tolist())


def restore(
    x: Tensor, spec: DataSpec, info: CaseInfo, start: tuple[int, ...] | None = None, role: str = "image"
) -> Volume:
    """A window x (C, *S) of a case -> a volume in the file's units, with the case's affine and orientation.

    The window begins at the case's voxel `start` (an item's "start"; default: it is centred). What lies
    outside the case is padding and is cropped. Intensities are un-scaled by the case's own numbers; integer x
    is left as it is.
    """
    array = x.detach().cpu().numpy()
    if x.is_floating_point():
        array = unscale(array.astype(np.float32), *spec.numbers(info, role), spec.clipped)
    start = tuple(map(int, centred(info.shape, array.shape[1:]) if start is None else start))
    inside = [slice(max(0, -s), n - s) for n, s in zip(info.shape, start, strict=True)]
    affine = np.array(info.affine)
    affine[:-1, -1] += affine[:-1, :-1] @ np.maximum(start, 0)
    return Volume(np.ascontiguousarray(array[(slice(None), *inside)]), affine, info.orientation)


class VolumeDataset(Dataset):
    """Cases as tensors. Item (position, index) is a dict:

    image (C, *size) and, if the data set has sources, source (C', *size): float32, scaled;
    mask, if the data set has masks, (*size): int64, all -1 for a case without one;
    spacing (dims,) mm; start (dims,): the window's first voxel in the case, negative = padding;
    label: the class, -1 = none; position, index; id, text: str.

    training: patches at random places and augmentation, by (seed, position); else windows of spec.size,
    centred. own_size: every case as large as it is, neither padded nor cropped.
    """

    def __init__(
        self,
        cases: list[Case],
        infos: dict[str, CaseInfo],
        spec: DataSpec,
        config: DataConfig,
        training: bool = False,
        seed: int = 0,
        own_size: bool = False,
    ):
        self.cases, self.infos, self.spec, self.config = cases, infos, spec, config
        self.training, self.seed, self.own_size = training, seed, own_size
        self.size = config.patch if training and config.patch else spec.size
        present = {"image": True, "source": spec.source_channels > 0, "mask": spec.num_labels is not None}
        self.roles = [role for role, there in present.items() if there]
        self._ram: dict[tuple[int, str], np.ndarray] = {}
        if config.cache == "ram":
            self._fill()
        if training:
            self._tell_of_sizes()

    def _tell_of_sizes(self) -> None:
        """Notes of padded and of cut cases, where the sizes were not chosen by the data."""
        shapes = {case.id: self.infos[case.id].shape for case in self.cases}
        small = [name for name, shape in shapes.items() if min(np.subtract(shape, self.size)) < 0]
        large = [name for name, shape in shapes.items() if max(np.subtract(shape, self.spec.size)) > 0]
        if small and (self.config.patch or self.config.size):
            print0(
                f"note: {len(small)} of {len(shapes)} cases are smaller than the patch {self.size} and are "
                f"padded by repeating the edge (case {small[0]}: {shapes[small[0]]})"
            )
        if large:
            print0(
                f"note: {len(large)} of {len(shapes)} cases are larger than data.size {self.spec.size}; "
                f"validation and samples hold their middle only (case {large[0]}: {shapes[large[0]]})"
            )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        case, config = self.cases[index], self.config
        info = self.infos[case.id]
        draw = keyed_generator(self.seed, position, "augment")
        size = info.shape if self.own_size else self.size
        start = self._start(index, info.shape, size, draw)
        images, mask, spacing = [], None, torch.tensor(info.spacing)
        for role in (role for role in self.roles if role != "mask"):
            window = cut(self._volume(index, role), start, size)
            images.append(torch.from_numpy(scale(window, *self.spec.numbers(info, role), self.spec.clipped)))
        if "mask" in self.roles and case.mask is None:
            mask = torch.full(size, -1)
        elif "mask" in self.roles:
            mask = torch.from_numpy(cut(self._volume(index, "mask"), start, size)[0].astype(np.int64))
        if self.training and config.augment.is_on:
            images, mask, spacing = augment(images, mask, spacing, config.augment, draw)
            images = [x.clamp(-1, 1) for x in images] if self.spec.clipped else images
        volumes = dict(zip(self.roles, [*images, mask], strict=False))
        return {
            **{role: volume.contiguous() for role, volume in volumes.items()},
            "spacing": spacing,
            "start": torch.tensor(start),
            "label": -1 if case.label is None else case.label,
            "position": position,
            "index": index,
            "id": case.id,
            "text": case.text,
        }

    def restore(self, index: int, x: Tensor, start: tuple[int, ...] | None = None) -> Volume:
        """A window of the image of the case at `index` as a volume: the function of this name."""
        return restore(x, self.spec, self.infos[self.cases[index].id], start)

    def _start(
        self, index: int, shape: tuple[int, ...], size: tuple[int, ...], draw: torch.Generator
    ) -> tuple[int, ...]:
        """First voxel of the window: in the middle, or in training anywhere along the axes that have room.

        Of the random windows, data.foreground have a random voxel of the mask as near to their middle as the
        case allows.
        """
        start = centred(shape, size)
        if not self.training or self.config.crop == "centre":
            return start
        room = [max(0, n - m) for n, m in zip(shape, size, strict=True)]
        u = torch.rand(len(start), generator=draw).tolist()
        first = [int(v * (r + 1)) for v, r in zip(u, room, strict=True)]
        share = self.config.foreground
        if share and self.cases[index].mask is not None and torch.rand((), generator=draw) < share:
            voxels = np.flatnonzero(self._volume(index, "mask")[0])
            if len(voxels):
                voxel = voxels[int(torch.randint(len(voxels), (), generator=draw))]
                place = np.unravel_index(voxel, shape)
                first = [min(max(0, int(p) - m // 2), r) for p, m, r in zip(place, size, room, strict=True)]
        return tuple(f if r else s for f, r, s in zip(first, room, start, strict=True))

    def _volume(self, index: int, role: str) -> np.ndarray:
        """(C, *S): the whole case on the training grid in the file's units, from the cache or the file."""
        if (index, role) in self._ram:
            return self._ram[index, role]
        try:
            return self._mapped(index, role) if self.config.cache == "disk" else self._load(index, role)
        except (OSError, InputError):
            path = getattr(self.cases[index], role)
            if path.exists():
                raise
            raise InputError(
                f"{path}: is gone, it was there when the data were checked; put it back, then the same "
                "command goes on from the last checkpoint"
            ) from None

    def _load(self, index: int, role: str) -> np.ndarray:
        case = self.cases[index]
        array = load_role(getattr(case, role), role, self.config).array
        if array.shape[1:] != self.infos[case.id].shape:
            raise InputError(f"{getattr(case, role)}: has changed since it was checked; start again")
        return array.astype(np.uint8) if role == "mask" and self.spec.num_labels <= 256 else array

    def _fill(self) -> None:
        """Read volumes into memory, as far as data.cache_gb goes; forked workers share them."""
        room, jobs = self.config.cache_gb * 2**30, []
        channels = {"image": self.spec.channels, "source": self.spec.source_channels, "mask": 1}
        for index, case in enumerate(self.cases):
            for role in (role for role in self.roles if getattr(case, role) is not None):
                room -= 4 * channels[role] * int(np.prod(self.infos[case.id].shape))
                jobs += [(index, role)] if room >= 0 else []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            arrays = pool.map(lambda job: self._load(*job), jobs)
            bar = tqdm(arrays, "loading", len(jobs), disable=None if is_main() else True, leave=False)
            self._ram = dict(zip(jobs, bar, strict=True))
        if room < 0:
            print0(
                f"note: {len(jobs)} volumes fill data.cache_gb {self.config.cache_gb:g}, the others are read "
                "from their files each time; --data.cache disk would keep them decoded"
            )

    def _mapped(self, index: int, role: str) -> np.ndarray:
        """`_load` as a memory map. Its file is written at first use, by whichever process comes first."""
        case, c = self.cases[index], self.config
        path = getattr(case, role).resolve()
        what = (str(path), path.stat().st_size, path.stat().st_mtime_ns, role, c.channel, c.source_channel)
        how = (c.dims, c.file_spacing, c.spacing, self.infos[case.id].shape)
        how += (c.label_values, self.spec.num_labels)
        target = Path(c.cache_dir) / f"{hashlib.sha256(repr((what, how)).encode()).hexdigest()[:24]}.npy"
        if not target.exists():
            temporary = target.with_name(f"{target.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    np.save(file, self._load(index, role))
                os.replace(temporary, target)
            except OSError as e:
                temporary.unlink(missing_ok=True)
                raise InputError(f"data.cache_dir: cannot write {target} ({e.strerror or e})") from None
        return np.load(target, mmap_mode="r")


class BothRoles(Dataset):
    """The images of a data set, then its sources in place of images: what an autoencoder that is to serve
    both learns from."""

    def __init__(self, dataset: VolumeDataset):
        spec = dataset.spec
        if spec.source_channels != spec.channels:
            raise InputError(
                f"data.learn_sources: images have {spec.channels} channels, sources {spec.source_channels}"
            )
        self.dataset, self.size = dataset, dataset.size

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        values = self.dataset[position, index % len(self.dataset)]
        return {**values, "index": index} | (
            {"image": values["source"]} if index >= len(self.dataset) else {}
        )


# --- batches ------------------------------------------------------------------------------------------------


class _Order:
    """The micro-batches of this rank, step after step, as lists of (position, index): a batch sampler."""

    def __init__(self, num: int, batch_size: int, micro_batch_size: int, seed: int, steps: range):
        self.num, self.batch_size, self.micro_batch_size = num, batch_size, micro_batch_size
        self.seed, self.steps = seed, steps
        self.share = batch_size // world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in self.steps:
            first = step * self.batch_size + rank() * self.share
            items = []
            for position in range(first, first + self.share):
                if position // self.num != epoch:
                    epoch = position // self.num
                    draw = keyed_generator(self.seed, epoch, "order")
                    order = torch.randperm(self.num, generator=draw).tolist()
                items.append((position, order[position % self.num]))
            for i in range(0, self.share, self.micro_batch_size):
                yield items[i : i + self.micro_batch_size]

    def __len__(self) -> int:
        return len(self.steps) * -(-self.share // self.micro_batch_size)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, numbers become tensors (B,), strings stay lists; of dicts, each entry."""
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, dict):
            batch[key] = collate(values)
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def batches(
    dataset: Dataset,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    workers: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """For every optimizer step from first_step to last_step - 1, the list of this rank's micro-batches.

    `dataset` takes (position, index), as VolumeDataset does. batch_size is global and must divide over the
    ranks. Worker processes load ahead over the ends of steps and epochs; what comes out does not depend on
    them.
    """
    if batch_size % world_size():
        raise InputError(f"batch_size: {batch_size} does not divide over {world_size()} ranks")
    order = _Order(len(dataset), batch_size, micro_batch_size, seed, range(first_step, last_step))
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the cache
        generator=torch.Generator(),  # its own, so that the loop's random state stays untouched
    )
    stream = iter(loader)
    if workers:
        atexit.register(_end_workers)
    for _ in range(first_step, last_step):
        yield [_next(stream) for _ in range(len(order) // len(order.steps))]


def _ignore_signals(worker: int) -> None:
    """A scheduler and Ctrl-C signal all processes of a job: workers must live until the loop has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """At the interpreter's exit, which asks its processes to end by SIGTERM and waits: these ignore it."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _next(stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next micro-batch; an InputError of a worker process without the traceback that it brings along."""
    try:
        return next(stream)
    except InputError as e:
        raise InputError(str(e).strip().splitlines()[-1].removeprefix("ldm3d.config.InputError: ")) from None


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, Any]]:
    """Every case once, spread over the ranks: none twice, none left out. Ranks may differ in number."""
    mine = range(rank(), len(dataset), world_size())
    for i in range(0, len(mine), batch_size):
        yield collate([dataset[index, index] for index in mine[i : i + batch_size]])


# --- all of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """An opened and checked data set. `cases` and what the scan found, `infos`, are by case id."""

    config: DataConfig
    seed: int
    root: Path
    cases: dict[str, Case]
    infos: dict[str, CaseInfo]
    split: dict[str, list[str]]
    spec: DataSpec

    def dataset(self, part: str, augment: bool = False, own_size: bool = False) -> VolumeDataset:
        """The cases of "train", "val" or "test". augment: random patches and augmentation, as in training;
        own_size: every case as large as it is."""
        cases = [self.cases[name] for name in self.split[part]]
        return VolumeDataset(cases, self.infos, self.spec, self.config, augment, self.seed, own_size)

    @property
    def folder(self) -> Path:
        """What the paths in the table of cases start from."""
        return (self.root / (self.config.table or "cases.csv")).parent

    def files(self, part: str) -> list[str]:
        """Paths of all files of a part."""
        cases = [self.cases[name] for name in self.split[part]]
        return [str(path) for c in cases for path in (c.image, c.mask, c.source) if path is not None]


def check_numbering(data: Data) -> None:
    """InputError if the masks, which a network shall learn, hold few of the labels that it would have: those
    of 0 and 255 count as 256."""
    found, num = sorted({k for info in data.infos.values() for k in info.labels}), data.spec.num_labels or 0
    if not data.config.num_labels and 4 * len(found) < num:
        listed = ",".join(map(str, found))
        raise InputError(
            f"data.label_values: the masks hold {len(found)} labels and count as {num}; give {listed}, or "
            f"data.num_labels {num} if the others are meant"
        )


def open_data(
    config: DataConfig,
    preset: str,
    seed: int,
    split: dict[str, list[str]] | None = None,
    multiple: tuple[int, ...] | None = None,
) -> Data:
    """Find, split and check the data of a run; any fault of the files is an InputError here, before training.

    `split`: as stored by the run that is resumed, or by the autoencoder's run; cases it does not list are
    left out.
    """
    root = resolve_root(config, preset)
    cases = find_cases(config, root)
    if split is None:
        split = split_cases(cases, config, seed)
    else:
        listed = {name for part in split.values() for name in part}
        gone = sorted(listed - {case.id for case in cases})
        if gone:
            raise InputError(f"{root}: case {gone[0]} of the stored split is missing ({len(gone)} in all)")
        if len(cases) > len(listed):
            print0(
                f"note: {len(cases) - len(listed)} cases of {root} are left out, the stored split lacks them"
            )
        cases = [case for case in cases if case.id in listed]
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    infos = scan_cases(cases, config, Path(config.cache_dir) / f"scan-{digest}.json")
    spec = make_spec(cases, infos, split, config, multiple)
    return Data(config, seed, root, {case.id: case for case in cases}, infos, split, spec)


def own_images(folder: Path) -> str | None:
    """The pattern of the image files in the folder itself, all of one kind; None: it holds none."""
    names = [p.name for p in folder.iterdir() if is_volume_file(p)]
    suffixes = [end for end in SUFFIXES if any(name.endswith(end) for name in names)]
    others = [end for end in suffixes[1:] if end not in PICTURE]  # pictures beside volumes are previews
    if others:
        print0(f"note: of {folder} the {suffixes[0]} files are taken, not those in {', '.join(others)}")
    return f"*{suffixes[0]}" if suffixes else None


def open_files(paths: Sequence[str | Path], role: str, config: DataConfig, spec: DataSpec) -> VolumeDataset:
    """Single files, read, scaled and centred as those of a role in training; every one a case.

    Items hold "image" (roles image and source) or "mask". A "region" is a mask of any labels. Intensities are
    scaled by the file's own numbers; sources that share those of their image, by the training set's.
    """
    if role == "region":
        role, config = "mask", replace(config, label_values=())
        spec = replace(spec, num_labels=MAX_LABEL + 1)
    options = {
        "channel": {"image": config.channel, "source": config.source_channel}.get(role, ()),
        "mask": None,
        "source": None,
        "cache": "none",
        "augment": AugmentConfig(),
        "paired_scaling": "separate",
    }
    if role == "mask":
        options["num_labels"] = spec.num_labels
    if role == "source":
        spec = replace(spec, channels=spec.source_channels, low=spec.source_low, high=spec.source_high)
    paths = [Path(path) for path in paths]
    for path in paths:
        if not os.path.isfile(path):  # Path.is_file raises for names that are too long
            raise InputError(
                f"{path}: " + ("a folder, expected a file" if os.path.isdir(path) else "no such file")
            )
    cases = [
        Case(f"{i}_{strip_suffix(path)}", path, mask=path if role == "mask" else None)
        for i, path in enumerate(paths)
    ]
    shared = role == "source" and config.paired_scaling == "shared"
    config = replace(config, **options, scaling="none" if role == "mask" else config.scaling)
    infos = scan_cases(cases, config)
    for case in cases:
        info = infos[case.id]
        if role != "mask" and info.channels != spec.channels:
            raise InputError(f"{case.image}: has {info.channels} channels, the model wants {spec.channels}")
        infos[case.id] = replace(info, low=spec.low, high=spec.high) if shared else info
    spec = replace(spec, source_channels=0, num_labels=spec.num_labels if role == "mask" else None)
    return VolumeDataset(cases, infos, spec, config)


def open_folder(folder: str | Path, content: dict[str, Any]) -> VolumeDataset:
    """Other images for the autoencoder whose checkpoint is `content`: read and scaled as in training.

    Every case keeps its own size. `folder` holds image files; where it holds none itself, it is laid out like
    the training data.
    """
    config, cases = find_images(folder, content)
    spec = DataSpec.from_dict(content["state"]["data"])
    infos = scan_images(cases, config, spec)
    spec = replace(spec, source_channels=0, num_labels=None)
    return VolumeDataset(cases, infos, spec, config, own_size=True)


def scan_images(cases: list[Case], config: DataConfig, spec: DataSpec) -> dict[str, CaseInfo]:
    """What the scan finds of other cases than those of training, which must have their channels."""
    infos = scan_cases(cases, config)
    channels = infos[cases[0].id].channels
    if channels != spec.channels:
        raise InputError(
            f"{cases[0].image}: has {channels} channels, the model was trained on {spec.channels}"
        )
    return infos


def find_images(place: str | Path, content: dict[str, Any]) -> tuple[DataConfig, list[Case]]:
    """A folder's images, or one file, as cases without anything beside, and how such files are read.

    Both follow the training data of the checkpoint `content`.
    """
    place = Path(place)
    config = from_dict(DataConfig, content["config"]["data"], "data")
    config = replace(config, cache="none", mask=None, source=None, subject=None, split=None)
    config = replace(config, subset=None, allow_missing_mask=True)
    if place.is_file():
        name = strip_suffix(place)
        return replace(config, root=str(place.parent)), [Case(name, place, subject=name)]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder")
    pattern, config = own_images(place), replace(config, root=str(place))
    if pattern:
        config = replace(config, image=pattern, table=None)
    try:
        return config, [replace(case, mask=None, source=None) for case in find_cases(config, place)]
    except InputError as e:
        raise InputError(f"{place}: holds no images, and is not laid out like the training data: {e}") from e
