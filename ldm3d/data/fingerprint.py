"""What is in a folder, in the few facts from which a plan is made (plan.py).

`take` recognises the files (layouts.py), reads every voxel once (inspection.py, which keeps what it finds),
and says who the subjects are. Whatever a person has said by flags is not guessed.

Two facts need an explanation. They are computed from thumbnails, 10 voxels along each axis of a volume (32 of
a slice), each thumbnail with mean 0 and norm 1, so that the product of two of them is their correlation:

    pose          the mean correlation of a case with other cases: high where all lie alike in their frames
    mirrored[a]   the same with the case flipped along axis a

If mirrored[a] is as high as pose, a flipped case looks like one of the data. Example: brain scans have a pose
of 0.9 and mirrored[0] of 0.9, but mirrored[1] of 0.6, since a brain has a front and a back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.logger import plural
from .cases import Case, find_cases, participant_of, participants
from .inspection import THUMBNAIL, CaseInfo, inspect_cases
from .itk import modality
from .layouts import DATE, REST, Layout, are_visits, dimensions, recognise, share_names
from .opening import groupings, inspection_cache
from .settings import DataConfig
from .slices import slice_cases

SIDES = re.compile(r"(?<![a-z])(left|right|lh|rh)(?![a-z])", re.I)
READING = {  # settings that say which files there are and how they are read
    *("name", "image", "mask", "source", "table", "subject", "participants", "split", "subset"),
    *(
        "allow_missing_mask",
        "check_affine",
        "dims",
        "channel",
        "source_channel",
        "num_labels",
        "label_values",
        "cache_dir",
    ),
    *("slices", "series", "source_series"),
}
MOST_PAIRS = 200  # cases whose thumbnails are compared with each other
SIDED = 5, 0.05  # least masks, and least distance from the middle of all labels, as a part of the axis
NEARLY_SAME = 0.999  # correlation of thumbnails of images that are probably of one subject


@dataclass(frozen=True)
class Fingerprint:
    """The facts of a folder. Shapes and spacings are one for each case, in the order of their ids."""

    settings: dict[str, Any]  # of DataConfig, by dotted key: how the files are found
    reasons: dict[str, str]  # how that was recognised, by the same keys
    notes: tuple[str, ...]  # what a person should know and no setting says
    dims: int
    channels: int
    shapes: tuple[tuple[int, ...], ...]  # voxels, as stored
    spacings: tuple[tuple[float, ...], ...]  # mm
    modality: str  # as a header or table says it, such as "CT"; "" if none does
    integers: bool  # are all values of all images integers?
    lowest: float  # median over cases of the lowest value
    robust: tuple[float, float]  # lowest percentile 0.5 and highest percentile 99.5 of all cases
    extremes: tuple[float, float]  # lowest and highest value of all
    num_values: int  # most different values in an image, if all are few integers; else 0
    labels: tuple[int, ...]  # values in all masks; () without masks
    labelled: float  # median fraction of a mask that is not 0
    num_masks: int
    sided: tuple[int, ...]  # axes along which a label always lies on the same side of the other labels
    sides: str  # where left or right is named, such as a label; "" if nowhere
    subjects: tuple[str, ...]  # of each case
    parts: dict[str, int]  # cases in train, val and test where the table states a split; else {}
    pose: float
    mirrored: tuple[float, ...]  # one for each axis
    num_raters: int = 1  # most masks of one case

    @property
    def num_cases(self) -> int:
        return len(self.shapes)

    @property
    def num_subjects(self) -> int:
        return len(set(self.subjects))

    @property
    def largest(self) -> tuple[int, ...]:
        """Voxels of the largest case along each axis."""
        return tuple(map(max, zip(*self.shapes, strict=True)))

    @property
    def median(self) -> tuple[int, ...]:
        """Voxels of the median case along each axis."""
        return tuple(math.ceil(statistics.median(axis)) for axis in zip(*self.shapes, strict=True))

    @property
    def spacing(self) -> tuple[float, ...]:
        """The median spacing, mm."""
        return tuple(map(statistics.median, zip(*self.spacings, strict=True)))


# --- subjects -----------------------------------------------------------------------------------------------


def _nested(root: Path, cases: list[Case], image: str | None) -> dict[str, set[str]]:
    """{folder: the names in it} where a case id is a folder and what stands in it, another folder or a file:
    the pattern `image` is "{id}/{id}/t1.nii.gz" or "{id}/{id}.nii.gz". {} for other patterns."""
    parts = (image or "").split("/")
    places = [i for i, part in enumerate(parts) if "{id}" in part]
    if len(places) != 2 or image.count("{id}") > 2 or "**" in image or parts[places[0]] != "{id}":
        return {}
    names: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        outer = case.image.relative_to(root).parts[places[0]]
        names[outer].add(case.id.removeprefix(f"{outer}_"))
    return names


def _by_inner_name(names: dict[str, set[str]]) -> str:
    """The data.subject that takes equal names in several folders for one subject. names: see `_nested`."""
    longest_first = sorted(names, key=lambda outer: (-len(outer), outer))
    return f"^(?:{'|'.join(map(re.escape, longest_first))})_(.+)$"


def _visits(names: dict[str, set[str]], num_cases: int, of_folders: bool) -> tuple[str, str] | None:
    """(data.subject, why) where subjects have several visits: folders of visits hold the subjects,
    baseline/p_01, or a folder for each subject holds one for each visit, p_01/visit_1/t1.nii.gz.

    Visits in a subject's folder are called alike for all subjects, and are fewer than these, or dates. Of
    other folders in folders the outer ones may be sites or classes. names: see `_nested`. of_folders: they
    are folders too.
    """
    outer, inner = set(names), set().union(*names.values())
    if are_visits(names):
        why = f"folders of {len(outer)} visits hold {len(inner)} subjects, such as {min(inner)}"
        return _by_inner_name(names), why
    fewer = len(inner) < len(outer) or all(map(DATE.search, inner))
    if not of_folders or not 2 < len(outer) < num_cases or not fewer:
        return None
    why = f"folders of visits in folders of {len(outer)} subjects, such as {min(outer)}"
    for of_names, rule in ((outer, "^({0}[^_]*)_"), (inner, "^(.*)_{0}[^_]*$")):
        if len(marks := {name.count("_") for name in of_names}) == 1:  # the case id joins the folders by "_"
            return rule.format("[^_]*_" * marks.pop()), why
    return None


def _note_same_names(names: dict[str, set[str]], cases: list[Case]) -> list[str]:
    """A note where folders hold the same names, and nothing tells whether these are the same subjects, as in
    two contrasts, or others, as where two sites number theirs. names: see `_nested`."""
    counts = Counter(itertools.chain(*names.values()))
    few = len(counts) <= len(names)  # p01/t1 and p02/t1 name what was scanned, not who
    if few or not share_names(names) or any(case.subject != case.id for case in cases):
        return []
    several = sorted(name for name in counts if counts[name] > 1)
    one, other = sorted(outer for outer in names if several[0] in names[outer])[:2]
    return [
        f"{len(several)} names are in several folders, such as {several[0]} in {one} and in {other}; each "
        f"counts as a subject of its own, and if they are the same, --data.subject '{_by_inner_name(names)}'"
    ]


def _find_subjects(root: Path, cases: list[Case], image: str | None) -> tuple[str, str] | None:
    """(data.subject, why) where files or names say that several cases are of one subject.

    Names that begin in two ways only are not taken for two subjects, unless they say so by "sub-": often they
    are two kinds of images, such as cells1_B02 and cells3_m04, and a split would train on one kind and
    validate on the other.
    """
    if (root / "subjects.csv").is_file():
        return "subjects.csv", "the table of subjects in the folder"
    if any(case.subject != case.id for case in cases):
        return None
    of_folders = "{id}" not in (image or "").rpartition("/")[2]
    if found := _visits(_nested(root, cases, image), len(cases), of_folders):
        return found
    for rule, subject_of in groupings([case.id for case in cases]):
        found = set(subject_of.values())
        if len(found) > 2 or min(found).startswith("sub-"):
            return rule, f"the names begin alike: {len(found)} subjects, such as {min(found)}"
    return None


MOST_CLASSES = 10  # values of a column, with more of which it is no class; half as many numbers


def _condition(column: str, cells: list[str]) -> tuple[str, str] | None:
    """How stage two can be told a column, of the cells that subjects have there, and its values: "class:sex"
    and "F 12, M 8", or "number:age" and "21 to 80". None where all are alike, or all different words."""
    counts = Counter(cells)
    numbers = sorted(map(float, counts)) if all(re.fullmatch(r"-?\d+(\.\d+)?", c) for c in counts) else []
    alone = len(counts) == len(cells)  # every cell is another one
    if len(counts) > 1 and numbers and (alone or len(counts) > MOST_CLASSES // 2):
        return f"number:{column}", f"{numbers[0]:g} to {numbers[-1]:g}"
    if alone or not 1 < len(counts) <= MOST_CLASSES:
        return None
    return f"class:{column}", ", ".join(f"{value} {num}" for value, num in sorted(counts.items()))


def _typed(words: list[str]) -> str:
    """Words as the value of a flag: with commas, or as JSON in quotes if one holds a comma or a space."""
    if any(re.search(r"[\s,]", word) for word in words):
        return shlex.quote(json.dumps(words, ensure_ascii=False))
    return shlex.quote(",".join(words))


def _note_participants(table: str, root: Path, cases: list[Case]) -> list[str]:
    """What the table of subjects is good for, and which subjects it or the folder lacks."""
    listed = participants(root / table)
    subjects = {participant_of(case.subject): case for case in cases}
    columns = dict.fromkeys(column for row in listed.values() for column in row)
    cells = {name: [c.columns[name] for c in subjects.values() if c.columns.get(name)] for name in columns}
    told = dict(word for name, found in cells.items() if (word := _condition(name, found)))
    learn = ", ".join(f"{use} ({values})" for use, values in told.items())
    by = f"by train_ldm.py ... --condition.use {_typed(list(told))}"
    notes = [f"{table}: stage two can learn {learn}, {by}"] if told else []
    for lacking, what in ((subjects.keys() - listed, "no row"), (listed.keys() - subjects, "no image")):
        if lacking:
            have = "subject has" if len(lacking) == 1 else "subjects have"
            notes.append(f"{table}: {len(lacking)} {have} {what}, such as {min(lacking)}")
    return notes


# --- thumbnails ---------------------------------------------------------------------------------------------


def thumbnails(infos: list[CaseInfo], dims: int) -> np.ndarray:
    """(cases, *THUMBNAIL) float64, each with mean 0 and norm 1."""
    side = THUMBNAIL[dims]
    rows = np.array([np.frombuffer(bytes.fromhex(i.facts.thumbnail), np.uint8) for i in infos], np.float64)
    rows -= rows.mean(1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
    return rows.reshape(-1, *(side,) * dims)


def pose_and_mirrored(images: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """The two facts of the docstring above, of thumbnails (cases, *S). 1 case: it is compared with itself."""
    images = images[:: max(1, len(images) // MOST_PAIRS)]
    flat = images.reshape(len(images), -1)
    others = ~np.eye(len(images), dtype=bool) if len(images) > 1 else np.ones((1, 1), dtype=bool)

    def mean_correlation(flipped: np.ndarray) -> float:
        return float((flipped.reshape(flat.shape) @ flat.T)[others].mean())

    return mean_correlation(images), tuple(
        mean_correlation(np.flip(images, axis)) for axis in range(1, images.ndim)
    )


def _twins(images: np.ndarray, cases: list[Case]) -> list[tuple[str, str]]:
    """Pairs of cases of different subjects whose thumbnails are nearly the same."""
    flat = images.reshape(len(images), -1)[:2000]
    close = np.argwhere(np.triu(flat @ flat.T > NEARLY_SAME, 1))
    return [(cases[a].id, cases[b].id) for a, b in close if cases[a].subject != cases[b].subject]


def sided_axes(infos: list[CaseInfo], dims: int) -> tuple[int, ...]:
    """The axes along which some label lies on the same side of the middle of all labels in every mask.

    Example: a left and a right kidney along axis 0. A flipped case would have its left kidney on the right.
    """
    offsets: dict[float, list[np.ndarray]] = {}
    for info in infos:
        centres = np.array([centre for _, *centre in info.centres])
        for (label, *_), centre in zip(info.centres, centres, strict=True):
            offsets.setdefault(label, []).append(centre - centres.mean(0))
    num, least = SIDED
    often = [np.array(rows) for rows in offsets.values() if len(rows) >= max(num, len(infos) / 2)]
    sides = [(rows > least).all(0) | (rows < -least).all(0) for rows in often]
    return tuple(axis for axis in range(dims) if any(side[axis] for side in sides))


# --- all of it ----------------------------------------------------------------------------------------------


def _described(root: Path) -> dict[str, Any]:
    """The contents of a dataset.json, if there is one that can be read."""
    try:
        content = json.loads((root / "dataset.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _modality(root: Path, cases: list[Case]) -> str:
    """What the files say they are: the first modality of a dataset.json, BIDS's _ct, or DICOM's."""
    described = _described(root)
    stated = described.get("modality") or described.get("channel_names") or {}
    first = next(iter(stated.values()), "") if isinstance(stated, dict) else stated
    cases = [case.volume or case for case in cases]
    if all(re.search(r"_ct\.", case.image.name, re.I) for case in cases):
        first = first or "CT"
    return str(first) or modality(cases[0].image)


def _sides(root: Path, cases: list[Case]) -> str:
    """Where left or right is named: then a flipped image would tell a lie."""
    labels = _described(root).get("labels")
    for name in [*labels.keys(), *map(str, labels.values())] if isinstance(labels, dict) else []:
        if SIDES.search(name):
            return f"label {name!r}"
    for case in cases:
        for column, cell in case.columns.items():
            if column not in ("id", "subject", "split") and SIDES.search(cell):
                return f"column {column}, {cell!r}"
    return ""


def _recognised(
    root: Path, given: dict[str, Any]
) -> tuple[DataConfig, list[Case], dict[str, Any], dict[str, str]]:
    """(settings that read the files, the cases, the settings that were recognised, why), as `given` by flags,
    else by the layout of the folder."""
    layout = Layout({}) if given.keys() & {"image", "table"} else recognise(root)
    settings = {k: v for k, v in layout.settings.items() if k not in given}
    why = dict(layout.why)
    shaped = {k: v for k, v in given.items() if k == "file_spacing"}  # its length depends on dims
    reading = {k: v for k, v in given.items() if k in READING}
    if reading.get("slices", "none") != "none" and "dims" not in given:
        given = given | {"dims": 2}
        reading["dims"], settings["dims"], why["dims"] = 2, 2, "slices of volumes (data.slices)"
    config = dataclasses.replace(DataConfig(root=str(root), **reading), **settings)
    guessed = config.subject is None and "subject" not in given
    look = dataclasses.replace(config, participants=None) if guessed else config  # it names subjects
    cases = find_cases(look, root)
    if guessed and (found := _find_subjects(root, cases, config.image)):
        settings["subject"], why["subject"] = found
        config = dataclasses.replace(config, subject=settings["subject"])
    if config != look:
        cases = find_cases(config, root)
    if "dims" not in given:
        settings["dims"] = dimensions(cases[0].image, config.series)
        why["dims"] = "volumes" if settings["dims"] == 3 else "slices"
    config = dataclasses.replace(config, **shaped, dims=given.get("dims", settings.get("dims")))
    return config, cases, settings, why


def take(root: Path, flags: dict[str, Any]) -> Fingerprint:
    """The fingerprint of a folder. flags: what a person has said, by dotted key. InputError for a folder
    without images, and for every fault in the files."""
    given = {key.removeprefix("data."): value for key, value in flags.items() if key.startswith("data.")}
    config, cases, settings, why = _recognised(root, given)
    notes = _note_same_names(_nested(root, cases, config.image), cases)
    cases = slice_cases(cases, config)
    infos = inspect_cases(cases, config, inspection_cache(config, root), with_facts=True)
    notes += _note_participants(config.participants, root, cases) if config.participants else []
    return summarise(root, cases, [infos[case.id] for case in cases], settings, why, notes)


def summarise(
    root: Path,
    cases: list[Case],
    infos: list[CaseInfo],
    settings: dict[str, Any],
    why: dict[str, str],
    notes: Sequence[str] = (),
) -> Fingerprint:
    """The fingerprint of inspected cases. settings, why: how their files were recognised, without "data."."""
    facts, dims = [info.facts for info in infos], len(infos[0].shape)
    images = thumbnails(infos, dims)
    pose, mirrored = pose_and_mirrored(images)
    twins = _twins(images, cases)
    notes = [*notes, *([f"also found, and not used: {why.pop(REST)}"] if REST in why else [])]
    if twins:
        notes.append(
            f"{len(twins)} pairs of cases look nearly the same, such as {twins[0][0]} and {twins[0][1]}; if "
            "they are of one subject, say so with --data.subject"
        )
    few = [f.num_values for f in facts]
    masks = [(case, info) for case, info in zip(cases, infos, strict=True) if case.mask]
    return Fingerprint(
        settings={f"data.{k}": v for k, v in settings.items()},
        reasons={f"data.{k}": v for k, v in why.items()},
        notes=tuple(notes),
        dims=dims,
        channels=infos[0].channels,
        shapes=tuple(info.shape for info in infos),
        spacings=tuple(info.spacing for info in infos),
        modality=_modality(root, cases),
        integers=all(f.integers for f in facts),
        lowest=statistics.median(min(f.lowest) for f in facts),
        robust=(min(f.robust[0] for f in facts), max(f.robust[1] for f in facts)),
        extremes=(min(min(f.lowest) for f in facts), max(max(f.highest) for f in facts)),
        num_values=max(few) if all(few) else 0,
        labels=tuple(sorted({label for _, info in masks for label in info.labels})),
        labelled=statistics.median(info.labelled or 0.0 for _, info in masks) if masks else 0.0,
        num_masks=len(masks),
        sided=sided_axes([info for _, info in masks], dims),
        sides=_sides(root, cases),
        subjects=tuple(case.subject for case in cases),
        parts=dict(Counter(case.split for case in cases if case.split is not None)),
        pose=pose,
        mirrored=mirrored,
        num_raters=max([1, *(len(case.masks) for case in cases)]),
    )


def describe(f: Fingerprint) -> str:
    """One line: what was found."""
    shapes = Counter(f.shapes)
    sizes = "x".join(map(str, f.shapes[0])) if len(shapes) == 1 else f"up to {'x'.join(map(str, f.largest))}"
    spacing = " x ".join(f"{mm:.3g}" for mm in f.spacing)
    masks = (
        f", {plural(f.num_masks, 'mask')} of labels {', '.join(map(str, f.labels[:8]))}"
        if f.num_masks
        else ""
    )
    return (
        f"{plural(f.num_cases, 'case')} of {plural(f.num_subjects, 'subject')}, {sizes} voxels of "
        f"{spacing} mm, {plural(f.channels, 'channel')}{masks}"
    )
