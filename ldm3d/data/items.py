"""Data that are not files: the items of any `torch.utils.data.Dataset`, as a table of cases.

An item is a dict. "image" is a tensor or array, (C, *S) or (*S) in any units; "mask" (*S) holds labels, and
is None where there is none; "source" is an image to translate from. "spacing" is in mm. All other numbers and
words, such as "class", "text", "subject" or "age", are what the columns of a table of files are; "id" names
the case, which else has its number. An item must be the same at every call: augmentation comes later.

    class Heads(Dataset):
        def __len__(self): return 160
        def __getitem__(self, i): return {"image": heads[i], "class": i % 2}

Everything after the files is the same for items: checks, split, scaling, patches, augmentation, resuming.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..config import InputError
from ..engine.distributed import print0
from ..engine.logger import progress
from .volumes import NoFile, OpenedFile, spacing_affine

ROLES = ("image", "mask", "source")
READING = threading.Lock()  # volumes are read by threads, which a data set need not be made for


class Items:
    """A data set, whose last item is kept: its image and its mask are asked for one after the other."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.last = dataset, (-1, {})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with READING:
            if self.last[0] != index:
                self.last = (index, self.dataset[index])
            return self.last[1]


@dataclass(frozen=True, eq=False)
class ItemVolume(NoFile):
    """One volume of an item, where a table of files has a path."""

    items: Items
    index: int
    role: str

    def __str__(self) -> str:
        return f"{self.role} of item {self.index}"

    def open(self, dims: int | None) -> OpenedFile:
        item = self.items[self.index]
        array = np.asarray(torch.as_tensor(item[self.role]).detach().cpu())
        dims = dims or min(array.ndim, 3)
        if array.ndim not in (dims, dims + 1):
            raise InputError(f"{self}: shape {array.shape}, expected (C, *S) or (*S) in {dims} dimensions")
        array = array.reshape(-1, *array.shape[-dims:]) if array.size else array[None]
        spacing = item.get("spacing")
        affine = None if spacing is None else spacing_affine(tuple(np.asarray(spacing, float).ravel()))
        every = tuple(range(len(array)))

        def load(picks: tuple[int, ...]) -> np.ndarray:
            return array if picks == every else array[list(picks)]

        return OpenedFile(len(array), array.shape[1:], array.dtype, affine, None, load)


def _cell(value: Any) -> str | None:
    """A number or word of an item as the cell of a table; None for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = np.asarray(value).item() if np.asarray(value).size == 1 else value
    return str(value) if isinstance(value, str | int | float) else None


def rows_of_items(dataset: Dataset) -> tuple[dict[str, dict], dict[str, str]]:
    """({case id: columns, with `ItemVolume`s of the roles}, {role: where it comes from}), as of a table."""
    items, rows, unused = Items(dataset), {}, set()
    for i in progress(range(len(items)), "items"):
        item = items[i]
        if not isinstance(item, dict) or item.get("image") is None:
            raise InputError(f"item {i}: expected a dict with an image, got a {type(item).__name__}")
        name = str(item.get("id", f"{i:06d}"))
        if name in rows:
            raise InputError(f"item {i}: its id {name!r} is that of an item before it")
        cells = {key: _cell(item[key]) for key in item.keys() - {*ROLES, "id", "spacing"}}
        unused |= {key for key, cell in cells.items() if cell is None and item[key] is not None}
        volumes = {role: ItemVolume(items, i, role) for role in ROLES if item.get(role) is not None}
        rows[name] = {key: cell or "" for key, cell in cells.items()} | dict.fromkeys(ROLES) | volumes
    if not rows:
        raise InputError("the dataset has no items")
    if unused:
        print0(f"note: {min(unused)} of the items is neither a number nor a word, and is not used")
    return rows, {role: "the items" for role in ROLES if any(row[role] for row in rows.values())}
