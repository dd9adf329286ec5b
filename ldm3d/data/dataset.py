"""Cases as tensors: a window of each volume, scaled and, in training, augmented.

Item (position, index) of a data set: `index` is the number of the case, `position` counts the samples of the
whole run. All that is random in an item comes from a generator with the key (seed, position). So a sample
depends neither on ranks, nor on micro-batches, workers or restarts.

Example: patches of (64, 64, 64) from a case of (100, 100, 50) voxels, seed 0. Sample 5000 of the run draws u
= (0.514, 0.153, 0.823). Along the first two axes a patch can begin at 37 voxels, so it begins at int(37 *
0.514) = 19 and int(37 * 0.153) = 5. The third axis is shorter than the patch, which is centred on it, begins
at -7, and repeats the edge. Sample 5000 begins at (19, 5, -7) on any rank, and after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import InputError
from ..engine.distributed import keyed_generator, print0, rank, ranks_here, world_size
from ..engine.logger import progress
from .cases import Case
from .geometry import centred, cut
from .inspection import CaseInfo
from .loading import DecodedVolume, decode, num_reading_threads, stored_type
from .prepared import PreparedVolume, announce, prepared_file
from .settings import DataConfig
from .spec import DataSpec, restore
from .transforms import augment, scale
from .volumes import NoFile, Volume

Job = tuple[int, Path | NoFile, str]  # the number of a case, one of its files, and the role of the file


def majority(masks: Tensor) -> Tensor:
    """The label that most raters give: masks (R, *S) -> (*S). Of labels with as many raters, the lowest."""
    counts = torch.stack([(masks == k).sum(0) for k in range(int(masks.max()) + 1)])
    return counts.argmax(0)


def channels_of(spec: DataSpec) -> dict[str, int]:
    """The channels of the files of each role."""
    return {"image": spec.channels, "source": spec.source_channels, "mask": 1}


@contextmanager
def _named(path: Path | NoFile) -> Iterator[None]:
    """A line for a file that is gone, in place of what the block raises because of it."""
    try:
        yield
    except (OSError, InputError):
        if isinstance(path, NoFile) or path.exists():
            raise
        raise InputError(
            f"{path}: is gone since the data was checked; put it back, then the same command "
            "goes on from the last checkpoint"
        ) from None


class VolumeDataset(Dataset):
    """The cases of one part of a data set. Item (position, index) is a dict of

    image        (C, *size) float32, scaled
    source       (C', *size) float32, scaled; only in a data set with sources
    mask         (*size) int64, all -1 for a case without mask; only in a data set with masks. Of several
                 raters: in training the mask of one rater, drawn by (seed, position); else what most say
    raters       (R, *size) int64, the masks of all raters; with own_size alone, of a case that has several
    spacing      (dims,) mm
    start        (dims,) voxel of the case at which the window begins, negative = padding
    class        the class of the case, -1 = none
    position, index, id, text

    training: random windows of data.patch (or spec.size), augmented. Otherwise: windows of spec.size in the
    middle. own_size: every case as large as it is, neither padded nor cropped.
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
        has = {"image": True, "source": spec.source_channels > 0, "mask": spec.num_labels is not None}
        self.roles = [role for role in has if has[role]]
        self._ram: dict[Job, DecodedVolume] = {}
        jobs = [(i, *file) for i, case in enumerate(cases) for file in case.files if file[1] in self.roles]
        # Any rank may need any case. Ranks of one machine share the files of cache "disk", which the system
        # keeps in memory once, where each rank would hold all volumes for itself
        shared = config.cache == "ram" and ranks_here() > 1 and not isinstance(cases[0].image, NoFile)
        self.on_disk = config.cache == "disk" or shared
        if self.on_disk:
            self._prepare(jobs)
        elif config.cache == "ram":
            self._fill(jobs)
        if training:
            self._note_sizes()

    def _note_sizes(self) -> None:
        """Prints how many cases are padded, and how many are cut. Nothing of the padding that makes all cases
        as large as the largest, in a multiple of 16 at most."""
        shapes = {case.id: self.infos[case.id].shape for case in self.cases}
        small = [name for name, shape in shapes.items() if min(np.subtract(shape, self.size)) < 0]
        large = [name for name, shape in shapes.items() if max(np.subtract(shape, self.spec.size)) > 0]
        largest = np.max([info.shape for info in self.infos.values()], axis=0)
        name = "the patch" if self.config.patch else "data.size"
        wide = bool(np.any(np.array(self.size) > -(-largest // 16) * 16))
        if small and (self.config.patch or wide):
            print0(
                f"note: {len(small)} of {len(shapes)} cases are smaller than {name} {self.size} and are "
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
        files = {role: path for path, role in case.files if role in self.roles}
        if "mask" in files:
            files["mask"] = case.masks[self._rater(position, len(case.masks))]
        volumes = {role: self._volume(index, path, role) for role, path in files.items()}
        start = self._start(volumes.get("mask"), info.shape, size, draw)
        images, mask, spacing = [], None, torch.tensor(info.spacing)
        for role in (role for role in self.roles if role != "mask"):
            window = cut(volumes[role], start, size)
            images.append(torch.from_numpy(scale(window, *self.spec.numbers(info, role), self.spec.clipped)))
        if "mask" in self.roles and case.mask is None:
            mask = torch.full(size, -1)
        elif "mask" in self.roles:
            mask = torch.from_numpy(cut(volumes["mask"], start, size)[0].astype(np.int64))
        if self.training and config.augment.is_on:
            images, mask, spacing = augment(images, mask, spacing, config.augment, draw)
            images = [x.clamp(-1, 1) for x in images] if self.spec.clipped else images
        tensors = dict(zip(self.roles, [*images, mask], strict=False))
        if "mask" in files and case.raters and not self.training:
            windows = [cut(self._volume(index, path, "mask"), start, size)[0] for path in case.masks]
            raters = torch.from_numpy(np.stack(windows).astype(np.int64))
            tensors |= {"mask": majority(raters)} | ({"raters": raters} if self.own_size else {})
        return {
            **{role: tensor.contiguous() for role, tensor in tensors.items()},
            "spacing": spacing,
            "start": torch.tensor(start),
            "class": -1 if case.class_idx is None else case.class_idx,
            "position": position,
            "index": index,
            "id": case.id,
            "text": case.text,
        }

    def restore(self, index: int, x: Tensor, start: tuple[int, ...] | None = None) -> Volume:
        """`spec.restore` of a window of the image of case `index`."""
        return restore(x, self.spec, self.infos[self.cases[index].id], start)

    def _start(
        self, mask: Any, shape: tuple[int, ...], size: tuple[int, ...], draw: torch.Generator
    ) -> tuple[int, ...]:
        """First voxel of the window: in the middle, or in training at random along the axes that have room.

        With data.crop "padded" the room is that of a case that is padded to spec.size, as stage two and
        samples have it: an autoencoder of small cases otherwise never learns their repeated edges.

        With probability data.foreground the window is instead placed so that a random voxel of the mask is as
        near to its middle as the case allows: lesions of a few voxels are otherwise hardly ever in a patch.
        """
        start = centred(shape, size)
        if not self.training or self.config.crop == "centre":
            return start
        low, high = self._ends(shape, size)
        u = torch.rand(len(start), generator=draw).tolist()
        first = [a + int(v * (b - a + 1)) for a, b, v in zip(low, high, u, strict=True)]
        p = self.config.foreground
        if (
            p
            and mask is not None
            and torch.rand((), generator=draw) < p
            and (num := int(mask.labelled.sum()))
        ):
            number = int(torch.randint(num, (), generator=draw))  # of the labelled voxels, in C order
            before = np.cumsum(mask.labelled) - mask.labelled
            plane = int(np.flatnonzero(before <= number)[-1])
            labels = mask[(slice(None), slice(plane, plane + 1), *[slice(None)] * (len(shape) - 1))]
            voxel = np.unravel_index(np.flatnonzero(labels)[number - before[plane]], (1, *shape[1:]))
            voxel = (plane, *voxel[1:])
            near = [int(v) - m // 2 for v, m in zip(voxel, size, strict=True)]
            first = [min(max(a, v), b) for a, v, b in zip(low, near, high, strict=True)]
        return tuple(f if a < b else s for f, a, b, s in zip(first, low, high, start, strict=True))

    def _ends(self, shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """The lowest and the highest first voxel of a training window, along each axis. A window in a padded
        case holds a voxel of the case at least."""
        if self.config.crop == "random":
            return [0] * len(shape), [max(0, n - m) for n, m in zip(shape, size, strict=True)]
        outer = [min(0, s) for s in centred(shape, self.spec.size)]
        low = [max(a, 1 - m) for a, m in zip(outer, size, strict=True)]
        last = [
            min(a + max(n, whole) - m, n - 1)
            for a, n, whole, m in zip(outer, shape, self.spec.size, size, strict=True)
        ]
        return low, [max(a, b) for a, b in zip(low, last, strict=True)]

    def _rater(self, position: int, num: int) -> int:
        """Whose mask sample `position` has, of `num` raters. A generator of its own, so that windows and
        augmentation are those of a data set with one rater."""
        if num == 1 or not self.training:
            return 0
        return int(torch.randint(num, (), generator=keyed_generator(self.seed, position, "rater")))

    def _volume(self, *job: Any) -> DecodedVolume | PreparedVolume:
        """A volume of a case on the training grid, not scaled, from the cache or the file. job: a `Job`."""
        if job in self._ram:
            return self._ram[job]
        with _named(job[1]):
            if not self.on_disk:
                return self._load(*job)
            return PreparedVolume(self._prepared_file(*job), lambda: self._load(*job))

    def _load(self, index: int, path: Path | NoFile, role: str) -> DecodedVolume:
        volume = decode(path, role, self.config, self.spec.num_labels)
        if volume.shape[1:] != self.infos[self.cases[index].id].shape:
            raise InputError(f"{path}: has changed since it was checked; start again")
        return volume

    def _prepared_file(self, index: int, path: Path, role: str) -> Path:
        shape = self.infos[self.cases[index].id].shape
        with _named(path):
            return prepared_file(path, role, self.config, shape, self.spec.num_labels)

    def _num_bytes(self, index: int, path: Path | NoFile, role: str) -> int:
        """What `_load` keeps of a volume."""
        dtype = stored_type(path, role, self.config, self.spec.num_labels)
        return (
            dtype.itemsize * channels_of(self.spec)[role] * math.prod(self.infos[self.cases[index].id].shape)
        )

    def _fill(self, jobs: list[Job]) -> None:
        """Reads volumes into memory, until data.cache_gb is full. Forked workers use the same memory."""
        sizes = np.cumsum([self._num_bytes(*job) for job in jobs])
        jobs = jobs[: int(np.searchsorted(sizes, self.config.cache_gb * 2**30, "right"))]
        with ThreadPoolExecutor(num_reading_threads()) as pool:
            volumes = pool.map(lambda job: self._load(*job), jobs)
            self._ram = dict(zip(jobs, progress(volumes, "loading", len(jobs)), strict=True))
        if len(jobs) < len(sizes):
            print0(
                f"note: {len(jobs)} volumes fill data.cache_gb {self.config.cache_gb:g}, the others are read "
                "from their files each time; --data.cache disk would keep them decoded"
            )

    def _prepare(self, jobs: list[Job]) -> None:
        """Prepares the volumes that data.cache_dir lacks, before they are needed one by one: this rank its
        share. What another rank has not finished is prepared by whoever needs it first."""
        missing = [job for job in jobs if not self._prepared_file(*job).is_file()]
        if missing:
            num_voxels = sum(math.prod(self.infos[self.cases[i].id].shape) for i, *_ in missing)
            num_bytes = sum(self._num_bytes(*job) for job in missing)
            num_cores = num_reading_threads() * world_size()
            folder = self._prepared_file(*missing[0]).parent
            announce(folder, num_bytes, len(missing), num_voxels, num_cores)
        with ThreadPoolExecutor(num_reading_threads()) as pool:
            own = missing[rank() :: world_size()]
            for _ in progress(pool.map(lambda job: self._volume(*job).shape, own), "preparing", len(own)):
                pass


class BothRoles(Dataset):
    """The images of a data set and then its sources, as if these were images too.

    For an autoencoder that is to encode both contrasts, as translation between them needs. Of 10 cases, item
    (position, 3) holds the image of case 3, and item (position, 13) its source.
    """

    def __init__(self, dataset: VolumeDataset):
        spec = dataset.spec
        if spec.source_channels != spec.channels:
            raise InputError(
                f"data.learn_sources: images have {spec.channels} channels, sources {spec.source_channels}"
            )
        self.dataset, self.size, self.spec = dataset, dataset.size, spec

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        values = self.dataset[position, index % len(self.dataset)]
        return {**values, "index": index} | (
            {"image": values["source"]} if index >= len(self.dataset) else {}
        )
