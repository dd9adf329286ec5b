"""From a checked table of cases to batches of tensors, and back to volumes in the case's own units and place.

An item is asked for by (position, index): `index` names the case, `position` counts samples over the whole
run and keys all that is random, so that training depends on neither ranks, micro-batches, workers nor
restarts:

    position p = step * batch_size + i,    index = permutation(seed, epoch)[p mod n],    epoch = p div n

Rank r of W takes the places i in [r B / W, (r + 1) B / W). A window that is larger than its case repeats the
edge; its first voxel is in the item ("start"), so that `restore` crops the padding and gives the true affine.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .cases import Case, DataConfig, find_cases, resolve_root, split_cases
from .config import InputError
from .distributed import is_main, keyed_generator, main_first, print0, rank, world_size
from .phantoms import write_phantoms
from .scan import CaseInfo, load_role, scan_cases
from .transforms import augment, centred, cut, scale, unscale
from .volumes import Volume

NUM_PHANTOMS = 64  # of the built-in data set


@dataclass(frozen=True)
class DataState:
    """What a checkpoint keeps of the training data, so that samples get its size, spacing, units and
    orientation."""

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

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def numbers(
        self, info: CaseInfo | None, role: str = "image"
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(low, high) of a case, or of the training set if `info` is None or the scaling is by data set."""
        owner = self if info is None or self.scaling == "dataset" else info
        return (owner.low, owner.high) if role == "image" else (owner.source_low, owner.source_high)


def make_state(
    cases: list[Case],
    infos: dict[str, CaseInfo],
    split: dict[str, list[str]],
    config: DataConfig,
    multiple: tuple[int, ...] | None = None,
) -> DataState:
    """Sizes, medians and counts. The default size is the largest training shape, rounded up to `multiple` per
    axis."""
    train = [infos[name] for name in split["train"]]
    largest = [max(info.shape[axis] for info in train) for axis in range(config.dims)]
    rounded = tuple(-(-n // m) * m for n, m in zip(largest, multiple or (1,) * config.dims, strict=True))
    labels = [label for case in cases if case.mask for label in infos[case.id].labels]
    num_labels = config.num_labels or len(config.label_values) or max(labels, default=0) + 1
    classes = [case.label for case in cases if case.label is not None]
    low, high = _typical([info.low for info in train], [info.high for info in train], config.scaling)
    source = ([info.source_low for info in train], [info.source_high for info in train])
    source_low, source_high = _typical(*source, config.scaling)
    return DataState(
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
    """Medians of the cases' numbers; for scaling "dataset" mean -+ std of all voxels, every case counting
    alike."""
    a, b = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)  # (cases, C)
    if scaling == "dataset":
        means, stds = (a + b) / 2, (b - a) / 2
        mean = means.mean(0)
        std = np.sqrt((stds**2 + means**2).mean(0) - mean**2)
        return tuple((mean - std).tolist()), tuple((mean + std).tolist())
    return tuple(np.median(a, 0).tolist()), tuple(np.median(b, 0).tolist())


def restore(
    x: Tensor,
    state: DataState,
    info: CaseInfo | None = None,
    start: tuple[int, ...] | None = None,
    role: str = "image",
) -> Volume:
    """x (C, *S) in scaled intensities -> a volume in the file's units, with affine and orientation.

    With `info`, x is a window of that case that begins at its voxel `start` (the item's "start"; default
    centred): its own numbers un-scale it, and what lies outside the case, the padding, is cropped. Without, x
    is a sample: the training medians un-scale it, its affine is the median spacing around the origin. Integer
    x (labels) is not un-scaled.
    """
    array = x.detach().cpu().numpy()
    shape = array.shape[1:]
    if x.is_floating_point():
        array = unscale(array.astype(np.float32), *state.numbers(info, role))
    if info is None:
        affine = np.diag([*state.spacing, 1.0])
        affine[:-1, -1] = [-(n - 1) / 2 * d for n, d in zip(shape, state.spacing, strict=True)]
        return Volume(array, affine, state.orientation)
    start = tuple(map(int, centred(info.shape, shape) if start is None else start))
    first = [max(0, -s) for s in start]
    last = [min(m, n - s) for m, n, s in zip(shape, info.shape, start, strict=True)]
    array = array[(slice(None), *(slice(a, b) for a, b in zip(first, last, strict=True)))]
    affine = np.array(info.affine)
    affine[:-1, -1] += affine[:-1, :-1] @ np.maximum(start, 0)
    return Volume(np.ascontiguousarray(array), affine, info.orientation)


class VolumeDataset(Dataset):
    """Cases as tensors. Item (position, index) is a dict:

    image (C, *size) and, if the data set has sources, source (C', *size): float32, scaled;
    mask, if the data set has masks, (*size): int64, all -1 for a case without one;
    spacing (dims,) mm; start (dims,): the window's first voxel in the case, negative = padding;
    label: the class, -1 = none; position, index; id, text: str.

    training: patches at random places and augmentation, drawn from (seed, position); else the whole case,
    centred.
    """

    def __init__(
        self,
        cases: list[Case],
        infos: dict[str, CaseInfo],
        state: DataState,
        config: DataConfig,
        training: bool = False,
        seed: int = 0,
    ):
        self.cases, self.infos, self.state, self.config = cases, infos, state, config
        self.training, self.seed = training, seed
        self.size = config.patch if training and config.patch else state.size
        self.roles = (
            ["image"] + ["source"] * (state.source_channels > 0) + ["mask"] * (state.num_labels is not None)
        )
        self._ram: dict[tuple[int, str], np.ndarray] = {}
        if config.cache == "ram":
            self._fill()
        small = [case for case in cases if min(np.subtract(infos[case.id].shape, self.size)) < 0]
        if training and small and (config.patch or config.size):
            shape = infos[small[0].id].shape
            print0(
                f"note: {len(small)} of {len(cases)} cases are smaller than the patch {self.size} and are padded "
                f"by repeating the edge (case {small[0].id}: {shape})"
            )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        case, config = self.cases[index], self.config
        info = self.infos[case.id]
        draw = keyed_generator(self.seed, position, "augment")
        start = self._start(info, draw)
        images = [
            torch.from_numpy(
                scale(self._window(index, role, start), *self.state.numbers(info, role), self.state.clipped)
            )
            for role in self.roles
            if role != "mask"
        ]
        mask, spacing = None, torch.tensor(info.spacing)
        if "mask" in self.roles and case.mask is None:
            mask = torch.full(self.size, -1)
        elif "mask" in self.roles:
            mask = torch.from_numpy(self._window(index, "mask", start)[0].astype(np.int64))
        if self.training and config.augment.is_on:
            images, mask, spacing = augment(images, mask, spacing, config.augment, draw)
            images = [x.clamp(-1, 1) for x in images] if self.state.clipped else images
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

    def _start(self, info: CaseInfo, draw: torch.Generator) -> tuple[int, ...]:
        """First voxel of the window: in the middle, or in training anywhere along the axes that have room."""
        start = centred(info.shape, self.size)
        if not self.training or self.config.crop == "centre":
            return start
        u = torch.rand(len(start), generator=draw).tolist()
        room = [n - m for n, m in zip(info.shape, self.size, strict=True)]
        return tuple(int(v * (r + 1)) if r > 0 else s for v, r, s in zip(u, room, start, strict=True))

    def _window(self, index: int, role: str, start: tuple[int, ...]) -> np.ndarray:
        """(C, *size) in the file's units, from the cache or the file."""
        if (index, role) in self._ram:
            array = self._ram[index, role]
        else:
            array = self._mapped(index, role) if self.config.cache == "disk" else self._load(index, role)
        return cut(array, start, self.size)

    def _load(self, index: int, role: str) -> np.ndarray:
        """(C, *S): the whole case on the training grid."""
        case = self.cases[index]
        array = load_role(getattr(case, role), role, self.config).array
        if array.shape[1:] != self.infos[case.id].shape:
            raise InputError(f"{getattr(case, role)}: has changed since it was checked; start again")
        return array.astype(np.uint8) if role == "mask" and self.state.num_labels <= 256 else array

    def _fill(self) -> None:
        """Read volumes into memory, as far as data.cache_gb goes; forked workers share them."""
        room, jobs = self.config.cache_gb * 2**30, []
        channels = {"image": self.state.channels, "source": self.state.source_channels, "mask": 1}
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
                f"note: {len(jobs)} volumes fill data.cache_gb {self.config.cache_gb:g}, the others are read from "
                "their files each time; --data.cache disk would keep them decoded"
            )

    def _mapped(self, index: int, role: str) -> np.ndarray:
        """`_load` as a memory map. Its file is written at first use, by whichever process comes first."""
        case, c = self.cases[index], self.config
        path = getattr(case, role).resolve()
        what = (
            str(path),
            path.stat().st_size,
            path.stat().st_mtime_ns,
            role,
            c.channel,
            c.source_channel,
            c.dims,
        )
        how = (c.file_spacing, c.spacing, self.infos[case.id].shape, c.label_values, self.state.num_labels)
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
                raise InputError(f"data.cache_dir: cannot write {target} ({e.strerror})") from None
        return np.load(target, mmap_mode="r")


# --- batches ----------------------------------------------------------------------------------------------------


class _Order:
    """The micro-batches of this rank, step after step, as lists of (position, index): a DataLoader's batch
    sampler."""

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
                    order = torch.randperm(
                        self.num, generator=keyed_generator(self.seed, epoch, "order")
                    ).tolist()
                items.append((position, order[position % self.num]))
            yield from (
                items[i : i + self.micro_batch_size] for i in range(0, self.share, self.micro_batch_size)
            )

    @property
    def num_micro_batches(self) -> int:
        """of a step."""
        return -(-self.share // self.micro_batch_size)

    def __len__(self) -> int:
        return self.num_micro_batches * len(self.steps)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, numbers become tensors (B,), strings stay lists."""
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, Tensor):
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
        generator=torch.Generator(),  # its own, so that the loop's random state stays untouched
    )
    stream = iter(loader)
    for _ in range(first_step, last_step):
        yield [next(stream) for _ in range(order.num_micro_batches)]


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, Any]]:
    """Every case once, spread over the ranks; none twice and none left out, so ranks may have unequal numbers
    of batches."""
    mine = range(rank(), len(dataset), world_size())
    for i in range(0, len(mine), batch_size):
        yield collate([dataset[index, index] for index in mine[i : i + batch_size]])


# --- all of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """An opened and checked data set: cases and what the scan found, by id; the split; the state a checkpoint
    keeps."""

    config: DataConfig
    seed: int
    root: Path
    cases: dict[str, Case]
    infos: dict[str, CaseInfo]
    split: dict[str, list[str]]
    state: DataState

    def dataset(self, part: str, augment: bool = False) -> VolumeDataset:
        """The cases of "train", "val" or "test". augment: random patches and augmentation, as in training."""
        cases = [self.cases[name] for name in self.split[part]]
        return VolumeDataset(cases, self.infos, self.state, self.config, augment, self.seed)

    def files(self, part: str) -> list[str]:
        """Paths of all files of a part."""
        cases = [self.cases[name] for name in self.split[part]]
        return [str(path) for c in cases for path in (c.image, c.mask, c.source) if path is not None]


def open_data(
    config: DataConfig,
    preset: str,
    seed: int,
    split: dict[str, list[str]] | None = None,
    multiple: tuple[int, ...] | None = None,
) -> Data:
    """Find, split and check the data of a run; every fault of the files is an InputError here, before
    training.

    `split`: as stored by the run that is resumed, or by the autoencoder's run; cases it does not list are
    left out. The preset "phantom" writes its data itself, if they are nowhere.
    """
    if preset == "phantom" and config.root is None:
        with main_first():
            root = _phantom_root(config)
    else:
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
                f"note: {len(cases) - len(listed)} cases of {root} are not in the stored split and are left out"
            )
        cases = [case for case in cases if case.id in listed]
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    infos = scan_cases(cases, config, Path(config.cache_dir) / f"scan-{digest}.json")
    state = make_state(cases, infos, split, config, multiple)
    return Data(config, seed, root, {case.id: case for case in cases}, infos, split, state)


def _phantom_root(config: DataConfig) -> Path:
    """The folder of the built-in data set, made at first use."""
    preset = "phantom" if config.dims == 3 else "phantom-2d"
    try:
        return resolve_root(config, preset)
    except InputError:
        print0(f"making {NUM_PHANTOMS} synthetic cases in {Path('data') / preset}")
        return write_phantoms(Path("data") / preset, NUM_PHANTOMS, config.dims)
