"""Conditions: what the denoiser is told about the sample, as one dict of tensors, name -> value.

    condition          value of a batch                   blank    enters the U-Net as
    class[:column]     (B,) int64 class                   -1       embedding, added to that of t
    number:column      (B, 1) float                       NaN      embedding, by a small MLP
    spacing            (B, dims) float, mm                NaN      the same
    text[:column]      (B, L) int64 words, -1 = none      all -1   context tokens; their mean as embedding
    embedding:column   (B, L, E) float, NaN = none        NaN      the same
    image              (B, C, *s) latent of the source    NaN      input channels beside x_t
    tokens             (B, C, *s) latent of the source    NaN      context tokens with positions
    labels             (B, K, *s) share of each label     NaN      input channels beside x_t

A value can be absent from any sample: it is blank then, and conditioning.py puts a learned null in its place.
Dropout in training, guidance in sampling and blank cells of a table are all the same thing, `hide`. The order
of the list is the order in which guidance nests (guidance.py). What a run knows of its conditions (classes,
vocabulary, means) is fitted to the training cases and kept in its checkpoints.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import pad_to_multiple, per_level
from .config import InputError, at_least

Columns = dict[str, str]  # of one case: column of the table -> cell, "" = blank

COLUMNS = {"class": "class", "number": None, "text": "text", "embedding": None}  # kind -> default column
OF_VOLUMES = ("spacing", "image", "tokens", "labels")  # kinds that the case's volumes give
OF_SOURCE = ("image", "tokens")
OF_FILES = (*OF_SOURCE, "labels", "embedding")  # kinds whose values may be named as files


@dataclass(frozen=True)
class ConditionConfig:
    use: tuple[str, ...] = ()  # what it is told, in the order of guidance: class,text ... (conditions.py)
    dropout: tuple[float, ...] = (0.1,)  # probability that training hides each of them; one value serves all
    dropout_all: float = 0.05  # probability that training hides all at once
    context_dim: int = 128  # width of the context tokens (text, embedding, tokens)
    text_layers: int = 2  # transformer layers of the text encoder
    text_length: int = 64  # words of a caption that are read; fewer if the training captions are shorter
    text_min_count: int = 2  # words of fewer training captions are unknown words

    def __post_init__(self) -> None:
        names = [name for _, name in map(parse_use, self.use)]
        if len(set(names)) < len(names):
            raise InputError(f"use: expected different conditions, got {','.join(self.use)}")
        if len(self.dropout) not in (1, len(self.use)):
            raise InputError(
                f"dropout: expected one value for all, or one for each of use, got {self.dropout}"
            )
        for name, values in (("dropout", self.dropout), ("dropout_all", (self.dropout_all,))):
            if not all(0 <= p < 1 for p in values):
                raise InputError(f"{name}: expected probabilities below 1, got {getattr(self, name)}")
        at_least(self, 1, "context_dim", "text_layers", "text_length", "text_min_count")
        if self.context_dim % num_heads(self.context_dim):
            raise InputError(f"context_dim: expected a multiple of 32, got {self.context_dim}")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The dropout of each condition."""
        return per_level(self.dropout, len(self.use)) if self.use else ()


def parse_use(word: str) -> tuple[str, str]:
    """ "class:sex" -> ("class", "sex"), "text" -> ("text", "text"): (kind, name). The name is the column, or
    the kind where there is none."""
    kind, _, column = word.partition(":")
    if kind not in COLUMNS and kind not in OF_VOLUMES:
        raise InputError(
            f"use: {word!r} is no condition, expected one of {', '.join([*COLUMNS, *OF_VOLUMES])}"
        )
    if kind in OF_VOLUMES and column:
        raise InputError(f"use: {word!r}: {kind} has no column, the volumes give it")
    if not column and kind in COLUMNS:
        column = COLUMNS[kind]
        if column is None:
            raise InputError(f"use: {word!r} needs the column of the table, such as {kind}:age")
    return kind, column or kind


def num_heads(width: int) -> int:
    return max(1, width // 32)


# --- what a run knows of its conditions ---------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One condition of a run, fitted to the training cases; kept in the checkpoint's state."""

    kind: str
    name: str
    values: tuple[str, ...] = ()  # class: its values in order; text: the words 1, 2 ... (0 is unknown)
    mean: tuple[float, ...] = ()  # number and spacing: of the training cases
    std: tuple[float, ...] = ()
    length: int = 0  # text, embedding: L, the longest sequence
    width: int = 0  # channels of a latent or label map; E of an embedding

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Condition:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def encode(self, value: Any, folder: Path | None = None) -> Tensor:
        """One sample's value, from a cell, the command line or Python, as a tensor without batch axis.

        None and "" are blank. A file is looked for in `folder`. InputError if the value is not one of this
        condition; for those that volumes give (but spacing), see latent_diffusion.py.
        """
        value = None if isinstance(value, str) and not value.strip() else value
        if self.kind == "class":
            return torch.tensor(-1 if value is None else self._class(value))
        if self.kind in ("number", "spacing"):
            return self._numbers(value)
        if self.kind == "text":
            ids = self.word_ids("" if value is None else str(value))[: self.length]
            return torch.tensor(ids + [-1] * (self.length - len(ids)))
        assert self.kind == "embedding", self.kind
        vectors = torch.full((self.length, self.width), math.nan)
        if value is not None:
            is_file = isinstance(value, (str, Path))
            given = read_embedding((folder or Path()) / value) if is_file else torch.as_tensor(value).float()
            if given.ndim != 2 or given.shape[1] != self.width:
                where = f"{value}: " if is_file else ""
                expected, got = f"(L, {self.width})", tuple(given.shape)
                raise InputError(f"condition {self.name}: {where}expected {expected}, got shape {got}")
            given = given[: self.length]
            vectors[: len(given)] = given
        return vectors

    def _class(self, value: Any) -> int:
        text = class_name(value)
        if text not in self.values:
            some = ", ".join(self.values[:20]) + (" ..." if len(self.values) > 20 else "")
            raise InputError(f"condition {self.name}: got {value!r}, expected one of {some}")
        return self.values.index(text)

    def _numbers(self, value: Any) -> Tensor:
        count = len(self.mean)
        if value is None:
            return torch.full((count,), math.nan)
        words = re.split(r"[,x\s]+", value.strip()) if isinstance(value, str) else np.ravel(value).tolist()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise InputError(f"condition {self.name}: expected {count} finite number(s), got {value!r}")
        return torch.tensor(numbers)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.values, start=1)}

    def word_ids(self, text: str) -> list[int]:
        return [self._ids.get(word, 0) for word in split_words(text)]

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in split_words(text) if word not in self._ids]


def split_words(text: str) -> list[str]:
    """Words and numbers of a caption, in lower case, without marks: "5.2 mm, Left" -> 5.2 mm left."""
    return re.findall(r"\d+(?:\.\d+)?|\w+", text.casefold())


def class_name(value: Any) -> str:
    """Values are compared as text; 1, 1.0, "01" are all "1"."""
    text = str(value.item() if isinstance(value, Tensor) and value.ndim == 0 else value).strip()
    whole = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", text)
    return whole[1] + whole[2] if whole else text


def read_embedding(path: Path) -> Tensor:
    """(L, E) float32 from a .npz or .pt file: an array or tensor alone, or "embedding" and "mask" (L,), whose
    rows without a True are left out. Nothing in the file is executed."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                content: Any = {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}
        elif path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise InputError(f"{path}: expected a .npz or .pt file of text embeddings")
    except InputError:
        raise
    except Exception as e:  # whatever the readers throw: the user needs to know the file
        raise InputError(
            f"{path}: cannot be read as text embeddings ({str(e).splitlines()[0]:.100})"
        ) from None
    content = {"embedding": content} if isinstance(content, Tensor) else content
    if isinstance(content, dict) and "embedding" not in content and len(content) == 1:
        content = {"embedding": next(iter(content.values()))}
    vectors = content.get("embedding") if isinstance(content, dict) else None
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not len(vectors):
        raise InputError(f'{path}: expected an array "embedding" (L, E), and maybe "mask" (L,)')
    mask = content.get("mask", torch.ones(len(vectors)))
    if not isinstance(mask, Tensor) or mask.shape != vectors.shape[:1]:
        raise InputError(f"{path}: expected a mask of shape {tuple(vectors.shape[:1])}, one value a vector")
    vectors = vectors.float()[mask.bool()]
    if not torch.isfinite(vectors).all():
        raise InputError(f"{path}: holds numbers that are not finite")
    return vectors


def fit_conditions(
    config: ConditionConfig,
    cases: dict[str, Columns],
    train: Sequence[str],
    spacings: Sequence[Sequence[float]],
    latent_channels: int,
    has_source: bool,
    num_labels: int | None,
    folder: Path,
) -> tuple[Condition, ...]:
    """The conditions of a run. cases: id -> columns, of which `train` are for training; spacings: of these;
    has_source, num_labels: the roles that the data have; folder: of the table.

    Vocabulary, means and sizes are of the training cases alone; the values of a class, of all. All cells of
    all cases are checked: InputError names the case.
    """
    conditions = []
    for kind, name in map(parse_use, config.use):
        if kind in OF_SOURCE and not has_source:
            raise InputError(f"condition.use: {kind} needs sources (data.source, or a column of that name)")
        if kind == "labels" and num_labels is None:
            raise InputError("condition.use: labels needs masks (data.mask, or a column of that name)")
        if kind in OF_SOURCE:
            condition = Condition(kind, name, width=latent_channels)
        elif kind == "labels":
            condition = Condition(kind, name, width=num_labels)
        elif kind == "spacing":
            condition = Condition(kind, name, **_moments(torch.tensor(spacings, dtype=torch.float64)))
        else:
            condition = _of_column(kind, name, config, cases, train, folder)
        conditions.append(condition)
    return tuple(conditions)


def _of_column(
    kind: str,
    name: str,
    config: ConditionConfig,
    cases: dict[str, Columns],
    train: Sequence[str],
    folder: Path,
) -> Condition:
    """A condition that a column of the table gives."""
    known = sorted({column for columns in cases.values() for column in columns})
    if name not in known:
        listed = f"its columns: {', '.join(known)}" if known else "there is no table (data.table)"
        raise InputError(f"condition.use: no column {name!r} in the table of the data, {listed}")
    cells = {case: columns.get(name, "") for case, columns in cases.items() if columns.get(name, "")}
    fitted = [cells[case] for case in train if case in cells]
    if not fitted:
        raise InputError(f"condition.use: column {name!r} is blank for all training cases")
    condition = Condition(kind, name)
    if kind == "class":
        names = {class_name(cell) for cell in cells.values()}
        numbered = all(n.isdecimal() for n in names)
        condition = Condition(kind, name, tuple(sorted(names, key=int if numbered else None)))
    elif kind == "number":
        rows = [_number(case, name, cells[case]) for case in train if case in cells]
        condition = Condition(kind, name, **_moments(torch.tensor(rows, dtype=torch.float64)[:, None]))
    elif kind == "text":
        counts = Counter(word for cell in fitted for word in set(split_words(cell)))
        words = sorted(w for w, n in counts.items() if n >= config.text_min_count)
        length = max(len(split_words(cell)) for cell in fitted)
        condition = Condition(kind, name, tuple(words), length=min(length, config.text_length))
    else:
        try:
            vectors = [read_embedding(folder / cell) for cell in fitted]
        except InputError as e:
            raise InputError(f"condition.use: column {name!r}: {e}") from None
        length, width = max(len(v) for v in vectors), vectors[0].shape[1]
        if not length:
            raise InputError(f"condition.use: column {name!r}: the masks of all training cases leave nothing")
        condition = Condition(kind, name, length=length, width=width)
    for case, cell in cells.items():
        try:
            condition.encode(cell, folder)
        except InputError as e:
            raise InputError(f"case {case}: {e}") from None
    return condition


def _number(case: str, name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise InputError(f"case {case}: {name} is {cell!r}, expected a number or a blank") from None


def _moments(rows: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation (1 where all are alike) of rows (N, n)."""
    std = rows.std(0, correction=0)
    return {"mean": tuple(rows.mean(0).tolist()), "std": tuple(torch.where(std > 1e-6, std, 1.0).tolist())}


# --- values as tensors --------------------------------------------------------------------------------------


def hide(value: Tensor, hidden: Tensor) -> Tensor:
    """`value` (B, ...) with the samples where hidden (B,) is True made blank: -1 of integers, NaN of
    floats."""
    blank = math.nan if value.is_floating_point() else -1
    return torch.where(hidden.to(value.device).view(-1, *(1,) * (value.ndim - 1)), blank, value)


def absent(value: Tensor) -> Tensor:
    """(B,) bool: which samples are blank."""
    gone = value.isnan() if value.is_floating_point() else value < 0
    return gone.flatten(1).all(1) if value.ndim > 1 else gone


def label_shares(mask: Tensor, num_labels: int, factor: Sequence[int]) -> Tensor:
    """Labels (B, *S), -1 everywhere in samples without a mask -> (B, K, *s): the share that each label has in
    every latent voxel, `factor` voxels of the mask along each axis; NaN for samples without a mask.

    As in the autoencoder, the edge is repeated at the end of axes that the factor does not divide.
    """
    one_hot = F.one_hot(mask.clamp(min=0), num_labels).movedim(-1, 1).float()
    shares = pad_to_multiple(one_hot, factor)
    shares = F.avg_pool2d(shares, factor) if len(factor) == 2 else F.avg_pool3d(shares, factor)
    return hide(shares, (mask < 0).flatten(1).all(1))


def shape_of(condition: Condition, like: Tensor) -> tuple[int, ...]:
    """The shape of the condition's value beside an x_t (B, C_z, *s)."""
    inner = {
        "class": (),
        "number": (len(condition.mean),),
        "spacing": (len(condition.mean),),
        "text": (condition.length,),
        "embedding": (condition.length, condition.width),
    }
    return (len(like), *inner.get(condition.kind, (condition.width, *like.shape[2:])))


def blank(condition: Condition, like: Tensor) -> Tensor:
    """The value that is absent from all samples."""
    empty, dtype = (-1, torch.int64) if condition.kind in ("class", "text") else (math.nan, torch.float32)
    return torch.full(shape_of(condition, like), empty, dtype=dtype, device=like.device)


def check_indices(values: dict[str, Tensor], conditions: Sequence[Condition]) -> None:
    """InputError if a class or a word is beyond those of its condition; the row behind the classes is the
    null."""
    for c in (c for c in conditions if c.kind in ("class", "text") and c.name in values):
        last, value = len(c.values) - (c.kind == "class"), values[c.name]
        if value.numel() and (highest := int(value.max())) > last:
            raise InputError(f"condition {c.name}: expected integers up to {last}, got {highest}")


def check_names(given: Sequence[str] | dict[str, Any], conditions: Sequence[Condition]) -> None:
    """InputError if a name is not that of a condition."""
    names = [c.name for c in conditions]
    for name in given:
        if name not in names:
            known = f"its conditions: {', '.join(names)}" if names else "it was trained without any"
            raise InputError(f"condition {name}: the model has no such condition, {known}")
