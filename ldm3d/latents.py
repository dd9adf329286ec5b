"""The latents of a data set: encoded once, kept on the disk, measured, and loaded as training samples.

Stage two sees every case many times, but the autoencoder is frozen, so each case is encoded once and its
latent is read from a cache afterwards. The cache holds the posterior (mean and logvar), and each training
step draws a fresh z from it (latent_diffusion.py).

Volumes that serve as conditions are cached with the image: the latent of its source, the share and the place
of each label in every latent voxel, its voxel size. Masks are cached too if registers learn them. Example:
200 cases of 64^3 voxels with 4 latent channels at a quarter of the resolution, `num_variants` 8, one source:

    mean, logvar, source    (200, 8, 4, 16, 16, 16) float32, 105 MB each, read as memory maps

Of a large latent a training on patches (large/patches.py) reads the pages of its patch alone.

Each of them lies in up to 32 files: mean-000000.npy holds the first seven cases, and so on. A file is written
by one process and takes its name when it is whole, so an encoding that was interrupted goes on where it was.

Augmentation cannot change a latent that is cached. Instead each case is encoded `num_variants` times, each
time augmented anew, and each training sample takes one of the variants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .blocks import pad_to_multiple
from .conditions import Condition, label_shares
from .config import InputError
from .data import Case, DataConfig, DataSpec, VolumeDataset, collate
from .engine.distributed import (
    all_reduce_sum,
    barrier,
    broadcast,
    is_main,
    keyed_generator,
    rank,
    world_size,
)
from .engine.logger import progress
from .engine.training import autocast, to_device
from .large.patches import CUT, Box, voxels_of
from .vae import Autoencoder


def cache_key(
    autoencoder: Autoencoder,
    data: DataConfig,
    spec: DataSpec,
    contents: dict[str, dict[str, str]],
    precision: torch.dtype | None = None,
    seed: int = 0,
) -> str:
    """The name of a cache: a hash of everything that the latents depend on.

    That is the autoencoder's weights, all data settings (percentiles and window of the scaling included) but
    where the files and their caches lie, the spec, what the cases hold (`Data.contents`), the precision of
    the encoder (None: fp32), and the seed of augmentation. Any difference makes a new cache.
    """
    digest = hashlib.sha256()
    for name, value in autoencoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    anywhere = {name: getattr(DataConfig, name) for name in ("root", "cache", "cache_gb", "cache_dir")}
    data = dataclasses.replace(data, **anywhere)
    numbers = {k: v for k, v in spec.to_dict().items() if k != "display"}  # of pictures alone
    digest.update(repr((data, numbers, contents, precision, seed)).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_batch(
    autoencoder: Autoencoder,
    batch: dict[str, Any],
    conditions: Sequence[Condition],
    amp: str = "fp32",
    masks: bool = False,
) -> dict[str, Tensor]:
    """A batch of volumes -> what stage two trains on, by name.

    "mean" and "logvar" (B, C_z, *s): the image's posterior. As far as the conditions need them: "source"
    (B, C_z, *s), the posterior mean of the source; "labels" (B, K, *s) or (B, K (1 + dims), *s), the mask by
    `label_shares`; "spacing" (B, dims) in mm. With masks: "mask" (B, *S), -1 in samples without one.
    """
    origins = {c.origin: c for c in conditions}
    with autocast(amp, batch["image"].device):
        posterior = autoencoder.encode(batch["image"])
        source = autoencoder.encode(batch["source"]).mean if "source" in origins else None
    tensors = {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}
    if source is not None:
        tensors["source"] = source.float()
    if "mask" in origins:
        c = origins["mask"]
        tensors["labels"] = label_shares(batch["mask"], c.width, autoencoder.downsampling, c.moments)
    if masks:
        tensors["mask"] = batch["mask"].int()
    return tensors | ({"spacing": batch["spacing"]} if "spacing" in origins else {})


def reserve(path: Path, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
    """Make an empty .npy file and reserve its room on the disk. InputError if the disk is too full.

    Without this, a disk that fills up later would kill the process while it writes to the memory map, without
    any message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as e:
        with suppress(OSError):
            path.unlink()
        gib = np.dtype(dtype).itemsize * math.prod(shape) / 2**30
        raise InputError(f"{path}: no room for {gib:.2g} GiB of latents ({e.strerror or e})") from None


class Table:
    """Cached values of one name for all cases, (cases, variants, ...), from files of `per_file` cases each.

    table[i] and table[i, v] are those of case i, as of one array.
    """

    def __init__(self, files: Sequence[np.ndarray]):
        self.files, self.per_file = files, len(files[0])
        self.shape, self.dtype = (sum(map(len, files)), *files[0].shape[1:]), files[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: int | tuple[int, ...]) -> np.ndarray:
        i, *rest = at if isinstance(at, tuple) else (at,)
        return self.files[i // self.per_file][(i % self.per_file, *rest)]


def page_ranges(part: np.ndarray, base: int) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of the pages that hold a part of a memory map, a range for every slice of
    its last two axes. base: the address of the memory map."""
    ranges = []
    for index in np.ndindex(part.shape[:-2]):
        piece = part[index]
        first = piece.ctypes.data - base
        last = first + sum((n - 1) * step for n, step in zip(piece.shape, piece.strides, strict=True))
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        ranges.append((start, last + piece.itemsize - start))
    return ranges


def read_box(value: np.ndarray, box: Box | None) -> Tensor:
    """A copy of a memory map (..., *s), or of its part in a box.

    Left to itself, the system reads far ahead of every page that is touched: all of a large latent, whatever
    the part. Told that pages are touched at random, it reads these alone, but one after the other, which
    takes ten times as long. So it is also asked for all of them beforehand.
    """
    part, mapped = value if box is None else value[(..., *box)], getattr(value, "_mmap", None)
    if hasattr(mapped, "madvise"):  # a memory map, and not on Windows
        mapped.madvise(mmap.MADV_NORMAL if box is None else mmap.MADV_RANDOM)
        for pages in [] if box is None else page_ranges(part, np.frombuffer(mapped, np.uint8).ctypes.data):
            mapped.madvise(mmap.MADV_WILLNEED, *pages)
    return torch.from_numpy(np.array(part))


NUM_FILES = 32  # of one name at most: what is lost by an interruption is what was being written


def open_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """The memory map of a cache's file; None if there is no such file. A damaged one is named, and None."""
    if not path.exists():
        return None
    try:
        array = np.load(path, mmap_mode="r")
        if (array.shape, array.dtype) == (shape, np.dtype(dtype)):
            return array
    except Exception:  # numpy raises many kinds for a file that is cut off or not its own
        pass
    print(f"{path}: damaged; its cases are encoded again", flush=True)
    return None


@torch.inference_mode()
def cache_latents(
    autoencoder: Autoencoder,
    dataset: VolumeDataset,
    folder: Path,
    num_variants: int,
    device: torch.device,
    amp: str = "fp32",
    conditions: Sequence[Condition] = (),
    masks: bool = False,
) -> dict[str, Table]:
    """The arrays of `encode_batch` for all cases, (cases, variants, ...) by name, read from memory maps.

    They are encoded at the first call, each file by one rank, and written to `folder`; later calls open them,
    or encode what is missing. Masks are stored in the smallest integers that hold all labels. Variant v of
    case i is the dataset's item (v * cases + i, i), so with augmentation on, every variant is another draw.
    """

    def encode(i: int, v: int) -> dict[str, Tensor]:
        batch = to_device(collate([dataset[v * len(dataset) + i, i]]), device)
        return {k: x[0] for k, x in encode_batch(autoencoder, batch, conditions, amp, masks).items()}

    smallest = np.min_scalar_type(-(dataset.spec.num_labels or 1))  # -1 to num_labels - 1
    layout = {
        name: (value.shape, smallest if name == "mask" else np.float32)
        for name, value in encode(0, 0).items()
    }
    per_file = -(-len(dataset) // NUM_FILES)
    parts = [range(len(dataset))[i : i + per_file] for i in range(0, len(dataset), per_file)]

    def file(name: str, part: range) -> tuple[Path, tuple[int, ...], Any]:
        shape, dtype = layout[name]
        return folder / f"{name}-{part[0]:06d}.npy", (len(part), num_variants, *shape), dtype

    def write_part(part: range) -> Iterator[None]:
        """Yields after every encoding, so that a bar can count."""
        partial = {name: file(name, part)[0].with_suffix(".partial") for name in layout}
        for name, path in partial.items():
            reserve(path, *file(name, part)[1:])
        arrays = {name: np.lib.format.open_memmap(path, "r+") for name, path in partial.items()}
        for i, v in np.ndindex(len(part), num_variants):
            for name, value in encode(part[i], v).items():
                arrays[name][i, v] = value.cpu().numpy()
            yield
        for name, path in partial.items():
            arrays[name].flush()
            try:
                os.replace(path, file(name, part)[0])
            except OSError as e:
                raise InputError(f"{file(name, part)[0]}: cannot be written ({e.strerror})") from None

    def is_missing(part: range) -> bool:
        return any(open_array(*file(name, part)) is None for name in layout)

    missing = broadcast([part for part in parts if is_missing(part)] if is_main() else None)
    own = missing[rank() :: world_size()]
    encodings = itertools.chain.from_iterable(map(write_part, own))
    for _ in progress(encodings, "encoding", sum(map(len, own)) * num_variants):
        pass
    barrier()
    return {name: Table([open_array(*file(name, part)) for part in parts]) for name in layout}


class LatentDataset(Dataset):
    """Cached latents as a data set. Item (position, index) holds mean and logvar (C_z, *s) of case `index`,
    and whatever else is cached, from one variant. The variant is random, keyed by (seed, position).

    box: the part of its latent that the sample at a position takes (large/patches.py); without one, all of
    it. factor: voxels of a mask in a latent voxel.
    """

    def __init__(
        self,
        tables: dict[str, Table],
        seed: int,
        box: Callable[[int], Box | None] | None = None,
        factor: Sequence[int] = (),
    ):
        self.tables, self.seed, self.box, self.factor = tables, seed, box, factor

    def __len__(self) -> int:
        return len(self.tables["mean"])

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        variants = self.tables["mean"].shape[1]
        draw = keyed_generator(self.seed, position, "variant")
        v = int(torch.randint(variants, (1,), generator=draw)) if variants > 1 else 0
        box, values = self.box and self.box(position), {}
        for name, table in self.tables.items():
            if name == "mask" and box is not None:
                own = read_box(table[index, v], voxels_of(box, self.factor))
                values[name] = pad_to_multiple(own[None, None], self.factor)[0, 0]
            else:
                values[name] = read_box(table[index, v], box if name in CUT else None)
        return {**values, "position": position, "index": index}


def latent_statistics(tables: dict[str, Table]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z over all cached cases: (latent_mean, latent_std), each (C_z,).

    z is random, z = mean + exp(logvar / 2) z_noise, but nothing is drawn here: by the law of total variance

        Var z = Var mean + E exp(logvar)

    for each channel, over cases, variants and latent voxels. Sums are in float64 and go over all ranks.
    """
    means, logvars = tables["mean"], tables["logvar"]  # (cases, variants, C_z, *s)
    channels = means.shape[2]
    sums = torch.zeros(4, channels, dtype=torch.float64)
    for i in range(rank(), len(means), world_size()):
        mean, logvar = (torch.from_numpy(np.array(table[i])).double() for table in (means, logvars))
        over = [d for d in range(mean.ndim) if d != 1]
        sums[0] += mean.sum(over)
        sums[1] += mean.square().sum(over)
        sums[2] += logvar.exp().sum(over)
        sums[3] += mean.numel() / channels
    total, squares, noise, count = all_reduce_sum(sums)
    mean = total / count
    variance = squares / count - mean.square() + noise / count
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


class Successive(Dataset):
    """`first` for the samples of a training below the position `begin`, `second` from there on. Both have the
    same cases."""

    def __init__(self, first: Dataset, second: Dataset, begin: int):
        self.first, self.second, self.begin = first, second, begin

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return (self.first if item[0] < self.begin else self.second)[item]


class WithConditions(Dataset):
    """A data set whose items also hold "conditions": name -> value, for the conditions that come from columns
    of the table of cases (conditions.py). cases: the data set's cases, in order. folder: paths in the table
    are relative to it."""

    def __init__(
        self, dataset: Dataset, conditions: Sequence[Condition], cases: Sequence[Case], folder: Path
    ):
        self.dataset, self.cases, self.folder = dataset, cases, folder
        self.conditions = [c for c in conditions if c.origin == "column"]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        columns = self.cases[item[1]].columns
        values = {c.name: c.encode(columns.get(c.name), self.folder) for c in self.conditions}
        return {**self.dataset[item], "conditions": values}
