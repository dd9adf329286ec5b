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
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import InputError
from ..engine.distributed import is_main, keyed_generator, print0
from .cases import Case
from .geometry import centred, cut
from .inspection import CaseInfo
from .loading import load_role
from .settings import DataConfig
from .spec import DataSpec, restore
from .transforms import augment, scale
from .volumes import Volume


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
