"""Conditions: what a sample should be like, as one dict of tensors, name -> value.

A denoiser that sees the class, the caption or another scan of a case learns what goes with them, and samples
can be asked for by the same conditions. This module turns cells of a table and voxels into tensors;
conditioner.py turns the tensors into inputs of the U-Net.

    condition          value of a batch                   blank    enters the U-Net as
    class[:column]     (B,) int64 class                   -1       embedding, added to the embedding of t
    number:column      (B, 1) float                       NaN      embedding, by a small MLP
    spacing            (B, dims) float, mm                NaN      embedding, by a small MLP
    text[:column]      (B, L) int64 words, -1 = none      all -1   context tokens; their mean as embedding
    embedding:column   (B, L, E) float, NaN = none        NaN      context tokens; their mean as embedding
    image              (B, C, *s) latent of the source    NaN      input channels beside x_t
    tokens             (B, C, *s) latent of the source    NaN      context tokens with positions
    labels             (B, K (1 + dims), *s) shares of    NaN      input channels beside x_t
                       the labels, and their places

Example: two cases under `--condition.use class:sex,number:age,text`, with the vocabulary (a, left, lesion):

    sex   F, M                           [0, 1]                        values F, M
    age   40, an empty cell              [[40.], [nan]]                nan: the second age is blank
    text  "A lesion, left", "a lesion"   [[1, 3, 2], [1, 3, -1]]       L = 3, the longest training caption

A value may be blank in any sample; conditioner.py puts a learned null in its place. Dropout in training,
guidance in sampling and empty cells of a table are all the same operation, `hide`. The order of the list is
the order in which guidance nests (guidance.py). Classes, vocabularies and means are fitted to the training
cases, and each checkpoint keeps them.

To add a condition that a column of the table gives:

1. here: a row of KINDS, a branch of `_of_column` (fitted to the training cases), of `Condition.encode` (one
   cell -> tensor) and of `shape_of`;
2. conditioner.py: a module, tensor -> `Conditioned`, and its row of PARTS.

Flags, dropout, guidance, sampling and checkpoints treat all conditions alike. A condition that another volume
of the case gives is also encoded in latents.py (`encode_batch`), and latent_diffusion.py finds its tensor
(`conditions_of`) and encodes what users ask for (`prepare`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import pad_to_multiple, per_level
from .config import InputError, at_least, to_dict

Columns = dict[str, str]  # of one case: column of the table -> cell, "" = blank


class Kind(NamedTuple):
    """What is true of every condition of one kind, before any data are seen."""

    origin: Literal["column", "spacing", "source", "mask"]  # the part of a case that gives the value
    column: str | None = None  # the column that is read where none is named; none = it must be named
    integer: bool = False  # int64 with -1 as blank; else float32 with NaN as blank
    file: bool = False  # a value may be the path of a file


KINDS = {
    "class": Kind("column", "class", integer=True),
    "number": Kind("column"),
    "spacing": Kind("spacing"),
    "text": Kind("column", "text", integer=True),
    "embedding": Kind("column", file=True),
    "image": Kind("source", file=True),
    "tokens": Kind("source", file=True),
    "labels": Kind("mask", file=True),
}


@dataclass(frozen=True)
class ConditionConfig:
    use: tuple[str, ...] = ()  # conditions, in the order in which guidance nests: class,text (conditions.py)
    dropout: tuple[float, ...] = (0.1,)  # probability that training hides each condition; one value for all
    dropout_all: float = 0.05  # probability that training hides all conditions at once
    dropout_last: float = (
        0.1  # probability that training hides all after the first k; any k is equally likely
    )
    concat: tuple[str, ...] = ()  # names of conditions whose embedding stands beside the time's, not added
    context_dim: int = 128  # width of the context tokens (text, embedding, tokens)
    text_layers: int = 2  # transformer layers of the text encoder
    text_length: int = 64  # words of a caption that are read; fewer if the training captions are shorter
    text_min_count: int = 2  # a word that fewer training captions hold is an unknown word
    label_moments: bool = True  # labels say where in a latent voxel a label lies, beside its share

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """A stored configuration from before there were dropout_last and label_moments goes on without."""
        if {"use", "dropout", "dropout_all", "text_min_count"} <= values.keys():
            values.setdefault("dropout_last", 0.0)
            values.setdefault("label_moments", False)
        return values

    def __post_init__(self) -> None:
        names = [name for _, name in map(parse_use, self.use)]
        if len(set(names)) < len(names):
            raise InputError(f"use: expected different conditions, got {','.join(self.use)}")
        kinds = {name: kind for kind, name in map(parse_use, self.use)}
        for name in self.concat:
            if kinds.get(name) not in ("class", "number", "spacing"):
                raise InputError(f"concat: {name} is no class, number or spacing in use")
        if len(self.dropout) not in (1, len(self.use)):
            raise InputError(
                f"dropout: expected one value for all, or one for each of use, got {self.dropout}"
            )
        for name in ("dropout", "dropout_all", "dropout_last"):
            values = getattr(self, name)
            if not all(0 <= p < 1 for p in (values if isinstance(values, tuple) else (values,))):
                raise InputError(f"{name}: expected probabilities below 1, got {getattr(self, name)}")
        at_least(self, 1, "context_dim", "text_layers", "text_length", "text_min_count")
        if self.context_dim % num_heads(self.context_dim):
            raise InputError(f"context_dim: expected a multiple of 32, got {self.context_dim}")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The dropout of each condition."""
        return per_level(self.dropout, len(self.use)) if self.use else ()


def parse_use(word: str) -> tuple[str, str]:
    """One word of `use` -> (kind, name): "class:sex" -> ("class", "sex"), "text" -> ("text", "text").

    The name is the column, or the kind where no column gives the value.
    """
    kind, _, column = word.partition(":")
    if kind not in KINDS:
        raise InputError(f"use: {word!r} is no condition, expected one of {', '.join(KINDS)}")
    if KINDS[kind].origin != "column":
        if column:
            raise InputError(f"use: {word!r}: {kind} has no column, the volumes give it")
        return kind, kind
    column = column or KINDS[kind].column
    if not column:
        raise InputError(f"use: {word!r} needs the column of the table, such as {kind}:age")
    return kind, column


def num_heads(width: int) -> int:
    """Attention heads of tokens of this width, 32 channels each."""
    return max(1, width // 32)


# --- one condition of a run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One condition of a run, fitted to its training cases: enough to turn a value into a tensor.

    The state of every checkpoint holds `to_dict` of each condition, so that sampling needs no table.
    """

    kind: str
    name: str
    values: tuple[str, ...] = ()  # class: its values in order; text: the words 1, 2 ... (0 is unknown)
    mean: tuple[float, ...] = ()  # number, spacing: mean over the training cases
    std: tuple[float, ...] = ()  # number, spacing: standard deviation over the training cases
    length: int = 0  # text, embedding: L, the longest sequence
    width: int = 0  # image, tokens: latent channels; labels: K; embedding: E
    moments: bool = False  # labels: with their first moments (`label_shares`)

    @property
    def origin(self) -> str:
        """The part of a case that gives the value: column, spacing, source or mask."""
        return KINDS[self.kind].origin

    @property
    def may_be_file(self) -> bool:
        """Whether a value may be the path of a file."""
        return KINDS[self.kind].file

    def num_channels(self, dims: int) -> int:
        """Channels of a value that is a map of the latent's shape."""
        return self.width * (1 + dims) if self.moments else self.width

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Condition:
        """The inverse. InputError if these are not the values of a condition, as in a damaged checkpoint."""
        try:
            condition = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (AttributeError, TypeError):
            raise InputError(f"conditions: {values!r:.60} is none; the checkpoint is damaged") from None
        if condition.kind not in KINDS:
            raise InputError(f"conditions: unknown kind {condition.kind!r}; the checkpoint is damaged")
        return condition

    def encode(self, value: Any, folder: Path | None = None) -> Tensor:
        """The value of one sample, from a cell, the command line or Python -> a tensor without batch axis.

        None and "" are blank. `folder` is where a relative path begins. InputError if the value is none of
        this condition's. Sources and masks need an autoencoder: LatentDiffusion.prepare encodes them.
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
            rows = read_embedding((folder or Path()) / value) if is_file else torch.as_tensor(value).float()
            if rows.ndim != 2 or rows.shape[1] != self.width:
                where = f"{value}: " if is_file else ""
                expected, got = f"(L, {self.width})", tuple(rows.shape)
                raise InputError(f"condition {self.name}: {where}expected {expected}, got shape {got}")
            rows = rows[: self.length]
            vectors[: len(rows)] = rows
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
        """The numbers of the words of a caption, 0 for unknown words."""
        return [self._ids.get(word, 0) for word in split_words(text)]

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in split_words(text) if word not in self._ids]


def split_words(text: str) -> list[str]:
    """Words and numbers of a caption: "5.2 mm, Left" -> ["5.2", "mm", "left"]."""
    return re.findall(r"\d+(?:\.\d+)?|\w+", text.casefold())


def class_name(value: Any) -> str:
    """The name of a class, by which values are compared: 1, 1.0 and "01" are all "1", "F" is "F"."""
    text = str(value.item() if isinstance(value, Tensor) and value.ndim == 0 else value).strip()
    whole = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", text)
    return whole[1] + whole[2] if whole else text


def read_embedding(path: Path) -> Tensor:
    """A text embedding (L, E) float32 from a .npz or .pt file.

    The file holds one array, or "embedding" (L, E) and "mask" (L,): rows whose mask is False are left out.
    Nothing in the file is executed. InputError names the file.
    """
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
    except Exception as e:  # numpy and torch raise many kinds; the message must name the file
        raise InputError(
            f"{path}: cannot be read as text embeddings ({str(e).splitlines()[0]:.100})"
        ) from None
    content = {"embedding": content} if isinstance(content, Tensor) else content
    if isinstance(content, dict) and "embedding" not in content and len(content) == 1:
        content = {"embedding": next(iter(content.values()))}
    vectors = content.get("embedding") if isinstance(content, dict) else None
    if not isinstance(vectors, Tensor) or vectors.is_complex() or vectors.ndim != 2 or not len(vectors):
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
    control: str = "off",
) -> tuple[Condition, ...]:
    """The conditions of a run, fitted to its cases; that of a ControlNet, `control`, comes last.

    cases: the columns of all cases, by id. train: ids of the training cases. spacings: of the training cases,
    in mm. has_source: whether the cases have sources. num_labels: labels of their masks, None without masks.
    folder: where paths in the table begin.

    Vocabulary, means and lengths come from the training cases alone, the values of a class from all cases.
    Every cell of every case is checked: InputError names the case.
    """
    conditions = []
    words = [("condition.use", word) for word in config.use]
    if control != "off":
        if control in config.use:
            raise InputError(f"control: {control} is a condition of condition.use already")
        words.append(("control", control))
    for setting, word in words:
        kind, name = parse_use(word)
        origin = KINDS[kind].origin
        if origin == "source" and not has_source:
            raise InputError(f"{setting}: {kind} needs sources (data.source, or a column of that name)")
        if origin == "mask" and num_labels is None:
            raise InputError(f"{setting}: {kind} needs masks (data.mask, or a column of that name)")
        if origin == "source":
            condition = Condition(kind, name, width=latent_channels)
        elif origin == "mask":
            condition = Condition(kind, name, width=num_labels, moments=config.label_moments)
        elif origin == "spacing":
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
    present = sorted({column for columns in cases.values() for column in columns})
    if name not in present:
        listed = f"its columns: {', '.join(present)}" if present else "there is no table (data.table)"
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
    """Mean and standard deviation of rows (N, n), per column; a deviation of 0 becomes 1."""
    std = rows.std(0, correction=0)
    return {"mean": tuple(rows.mean(0).tolist()), "std": tuple(torch.where(std > 1e-6, std, 1.0).tolist())}


# --- values as tensors --------------------------------------------------------------------------------------


def hide(value: Tensor, hidden: Tensor) -> Tensor:
    """`value` (B, ...), blank in the samples where hidden (B,) is True: -1 for integers, NaN for floats."""
    blank = math.nan if value.is_floating_point() else -1
    return torch.where(hidden.to(value.device).view(-1, *(1,) * (value.ndim - 1)), blank, value)


def absent(value: Tensor) -> Tensor:
    """Which samples have a blank value, (B,) bool."""
    gone = value.isnan() if value.is_floating_point() else value < 0
    return gone.flatten(1).all(1) if value.ndim > 1 else gone


def label_shares(mask: Tensor, num_labels: int, factor: Sequence[int], moments: bool = False) -> Tensor:
    """Masks (B, *S) -> (B, K, *s): the share that each label has in every latent voxel.

    A latent voxel covers `factor` voxels of the mask on each axis. With factor 2, the block [[0, 0], [0, 3]]
    of 4 labels becomes the shares (0.75, 0, 0, 0.25). Voxels of -1 have no label and do not count: [[0, -1],
    [-1, 3]] becomes (0.5, 0, 0, 0.5), and a block of -1 alone (0, 0, 0, 0). A sample without a mask, -1
    everywhere, becomes NaN. Where the factor does not divide an axis, the edge is repeated at its end, as in
    the autoencoder.

    moments: (B, K (1 + dims), *s). A share alone does not say on which side of a latent voxel a label lies,
    and a thin structure is lost by that. So the shares are followed, for each axis, by the first moments of
    the labels, twice the mean of u [label]: u runs from -1 to 1 along the latent voxel. In the block above u
    is -0.5 and 0.5 on each axis, and label 3 has the moments 2 * 0.25 * 0.5 = 0.25.
    """
    pool = F.avg_pool2d if len(factor) == 2 else F.avg_pool3d
    known = (mask >= 0)[:, None].float()
    one_hot = F.one_hot(mask.clamp(min=0), num_labels).movedim(-1, 1) * known
    one_hot, counted = pad_to_multiple(one_hot, factor), pool(pad_to_multiple(known, factor), factor)
    maps = [pool(one_hot, factor)]
    for axis, f in enumerate(factor if moments else ()):
        n = one_hot.shape[2 + axis]
        u = (torch.arange(n, device=mask.device) % f + 0.5) * (2 / f) - 1
        u = u.view(*(n if a == axis else 1 for a in range(len(factor))))
        maps.append(2 * pool(one_hot * u, factor))
    shares = torch.cat(maps, 1) / torch.where(counted > 0, counted, 1.0)
    return hide(shares, (mask < 0).flatten(1).all(1))


def shape_of(condition: Condition, like: Tensor) -> tuple[int, ...]:
    """The shape of the condition's value for a batch whose x_t (B, C_z, *s) has the shape of `like`."""
    inner = {
        "class": (),
        "number": (len(condition.mean),),
        "spacing": (len(condition.mean),),
        "text": (condition.length,),
        "embedding": (condition.length, condition.width),
    }
    maps = condition.num_channels(like.ndim - 2), *like.shape[2:]
    return (len(like), *inner.get(condition.kind, maps))


def blank(condition: Condition, like: Tensor) -> Tensor:
    """The value of a batch in which the condition is absent from all samples."""
    empty, dtype = (-1, torch.int64) if KINDS[condition.kind].integer else (math.nan, torch.float32)
    return torch.full(shape_of(condition, like), empty, dtype=dtype, device=like.device)


def value_of(condition: Condition, values: dict[str, Tensor], like: Tensor) -> Tensor:
    """The condition's value of a batch, blank if there is none. InputError if its shape is another one."""
    if condition.name not in values:
        return blank(condition, like)
    value, expected = values[condition.name], shape_of(condition, like)
    if value.shape != expected:
        got = tuple(value.shape)
        raise InputError(f"condition {condition.name}: expected a tensor of shape {expected}, got {got}")
    return value


def check_indices(values: dict[str, Tensor], conditions: Sequence[Condition]) -> None:
    """InputError if a class or a word has a number that is too large.

    The tables have one row more than there are classes: the null. It is no class that one may ask for.
    """
    for c in (c for c in conditions if KINDS[c.kind].integer and c.name in values):
        last, value = len(c.values) - (c.kind == "class"), values[c.name]
        if value.numel() and (highest := int(value.max())) > last:
            raise InputError(f"condition {c.name}: expected integers up to {last}, got {highest}")


def check_names(names: Iterable[str], conditions: Sequence[Condition]) -> None:
    """InputError if one of the names is not the name of a condition."""
    own = [c.name for c in conditions]
    for name in names:
        if name not in own:
            listed = f"its conditions: {', '.join(own)}" if own else "it was trained without any"
            raise InputError(f"condition {name}: the model has no such condition, {listed}")


def pairs(words: tuple[str, ...], key: str = "condition") -> dict[str, str]:
    """Words NAME=VALUE as a dict: ("class=1", "text=a lesion") -> {"class": "1", "text": "a lesion"}.

    key: the setting that errors name.
    """
    values: dict[str, str] = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark:
            raise InputError(f"{key}: expected NAME=VALUE, got {word!r}")
        if name in values:
            raise InputError(f"{key}: {name} is given twice")
        values[name] = value
    return values
