"""The data of a run, opened: cases found, split and checked, before training starts."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..config import InputError, from_dict
from ..engine.distributed import print0
from .cases import Case, find_cases, listed_cases, names_run, resolve_root, split_cases, split_of_run
from .dataset import VolumeDataset
from .inspection import CaseInfo, inspect_cases
from .settings import DataConfig
from .slices import find_all_cases
from .spec import DataSpec, make_spec
from .volumes import NoFile


@dataclass(frozen=True)
class Data:
    """An opened and checked data set. `cases` and `infos` (what was found in their files) are by case id."""

    config: DataConfig
    seed: int
    root: Path
    cases: dict[str, Case]
    infos: dict[str, CaseInfo]
    split: dict[str, list[str]]
    spec: DataSpec

    def dataset(self, part: str, augment: bool = False, own_size: bool = False) -> VolumeDataset:
        """The cases of "train", "val" or "test". augment: random patches, augmented, as training has them.
        own_size: every case as large as it is."""
        cases = [self.cases[name] for name in self.split[part]]
        return VolumeDataset(cases, self.infos, self.spec, self.config, augment, self.seed, own_size)

    def facts(self) -> dict[str, str]:
        """What a person must know of the data before a training starts: title -> words."""
        spec, patch = self.spec, self.config.patch
        counts = []
        for part, ids in self.split.items():
            num = len({self.cases[name].subject for name in ids})
            counts += (
                [f"{part} {len(ids)}" + (f" (subjects: {num})" if num < len(ids) else "")] if ids else []
            )
        size, mm = "x".join(map(str, spec.size)), "x".join(f"{v:.3g}" for v in spec.spacing)
        grid = f"{size} voxels of {mm} mm, {spec.channels} channel{'s' if spec.channels > 1 else ''}"
        grid += f", {spec.num_labels} labels" if spec.num_labels else ""
        grid += f"; patches of {'x'.join(map(str, patch))}" if patch and patch != spec.size else ""
        place = "a dataset in Python" if self.in_memory else str(self.root)
        words = {"data": place, "cases": ", ".join(counts), "grid": grid}
        return words | {"intensities": spec.scaling_in_words()}

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the table of cases start from."""
        return (self.root / (self.config.table or "cases.csv")).parent

    @property
    def in_memory(self) -> bool:
        """Are the cases items of a data set in Python, and no files?"""
        return any(isinstance(case.image, NoFile) for case in self.cases.values())

    @property
    def state(self) -> dict[str, Any]:
        """What checkpoints hold of the cases, to tell whether a resumed run has the same ones."""
        return {"split": self.split, "contents": self.contents, "in_memory": self.in_memory}

    @property
    def contents(self) -> dict[str, dict[str, str]]:
        """What each case holds, by case id: hashes of the voxels of its image, mask and source, and its grid.

        They tell whether a case is the same as before, wherever its files lie."""
        return {
            name: {
                "image": info.content,
                "mask": info.mask_content,
                "source": info.source_content,
                "grid": f"{info.shape} {' '.join(f'{mm:.6g}' for mm in info.spacing)}",
            }
            for name, info in self.infos.items()
        }


def check_numbering(data: Data) -> None:
    """InputError if masks that a network is to learn have large gaps in their numbering.

    Masks of 0 and 255 would make a network with 256 labels, where label_values 0,255 make one with 2. Small
    gaps, as of masks of 0 and 7, are noted.
    """
    found, num = sorted({k for info in data.infos.values() for k in info.labels}), data.spec.num_labels or 0
    if not data.config.num_labels and 4 * len(found) < num:
        listed = ",".join(map(str, found))
        raise InputError(
            f"data.label_values: the masks hold {len(found)} labels and count as {num}; give {listed}, or "
            f"data.num_labels {num} if the others are meant"
        )
    if not data.config.num_labels and len(found) < num:
        print0(
            f"note: {num - len(found)} of the {num} labels occur in no mask, and are learned in vain; "
            f"--data.label_values {','.join(map(str, found))} leaves them out"
        )


REPEATS = (  # expressions of names that end with what tells the scans of one subject apart
    r"^(sub-[^_]+)",  # sub-01_ses-1_T1w
    r"^(.*\d[^\W_]*)[_\-. ][^_\-. ]+$",  # p01_a, cells1_B02
    r"^(.*\d)[A-Za-z]$",  # p01a
)


def groupings(names: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(expression, {name: subject}) for those of REPEATS by which the names of cases make several scans of
    one subject. All names must fit, and there must be several subjects. The expression can be a
    `data.subject`."""
    for rule in REPEATS:
        found = {name: re.search(rule, name) for name in names}
        if all(found.values()) and 1 < len({match[1] for match in found.values()}) < len(found):
            yield rule, {name: match[1] for name, match in found.items()}


def _repeats(part_of: dict[str, str]) -> tuple[str, str, str] | None:
    """(expression, one case, another in another part) if the names look as if subjects had several scans."""
    for rule, subject_of in groupings(part_of):
        first: dict[str, str] = {}
        for name in sorted(part_of):
            one = first.setdefault(subject_of[name], name)
            if part_of[one] != part_of[name]:
                return rule, one, name
    return None


def note_split(
    cases: list[Case], infos: dict[str, CaseInfo], split: dict[str, list[str]], config: DataConfig
) -> None:
    """Prints a note of what may be in two parts of the split at once.

    Three kinds of leaks make scores too good: a subject in two parts, the same voxels under two names, and
    names that look like several scans of one subject where every case counts as a subject of its own.
    """
    case_of = {case.id: case for case in cases}
    subjects = {part: {case_of[name].subject for name in ids} for part, ids in split.items()}
    parts = [part for part in split if split[part] != split["train"] or part == "train"]  # val may be train
    for a, b in itertools.combinations(parts, 2):
        if (both := subjects[a] & subjects[b]) and config.val_gap is None:
            print0(f"note: subject {min(both)} is in both {a} and {b}; such subjects: {len(both)}")
        first = {infos[name].content: name for name in reversed(split[a]) if infos[name].content}
        same = [(first[infos[name].content], name) for name in split[b] if infos[name].content in first]
        if same:
            one, other = (case_of[name].image for name in same[0])
            print0(f"note: {one} ({a}) and {other} ({b}) have the same voxels; such pairs: {len(same)}")
    part_of = {name: part for part in parts for name in split[part]}
    alone = not config.subject and all(case.subject == case.id for case in cases)
    if alone and (found := _repeats(part_of)):
        rule, one, other = found
        print0(
            f"note: every case counts as a subject of its own, but {one} ({part_of[one]}) and {other} "
            f"({part_of[other]}) look like one subject; --data.subject '{rule}' keeps such cases together"
        )


def parts_before(
    infos: dict[str, CaseInfo], before: dict[str, Any]
) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """{case id: part} of the cases that an earlier run knows: (by the voxels of their image or source, by
    their ids alone). Part None: that run left them out, as slices beside its validation.

    before: the state of a checkpoint of that run. A copy under another name is found by its voxels, another
    contrast of a case by its id. Where copies lie in several parts, training counts.
    """
    part_of = dict.fromkeys(before.get("contents", {}))
    for part in ("test", "val", "train"):
        part_of |= dict.fromkeys(before["split"].get(part, ()), part)
    by_voxels: dict[str, str | None] = {}
    for part in (None, "test", "val", "train"):
        rows = [row for name, row in before.get("contents", {}).items() if part_of[name] == part]
        by_voxels |= {row[role]: part for row in rows for role in ("image", "source") if row[role]}
    known, alike = {}, {}
    for name, info in infos.items():
        if seen := {info.content, info.source_content} & by_voxels.keys():
            found = {by_voxels[voxels] for voxels in seen}
            known[name] = next(part for part in ("train", "val", "test", None) if part in found)
        elif name in part_of:
            alike[name] = part_of[name]
    return known, alike


def note_seen(
    cases: list[Case],
    split: dict[str, list[str]],
    known: dict[str, str | None],
    alike: dict[str, str | None],
) -> None:
    """Prints notes of cases whose scores the autoencoder spoils: those that it knows, see `parts_before`, and
    other cases of the same subjects."""
    part_of, of_subject = known | alike, {}
    for part in ("test", "train"):  # training counts
        of_subject |= {case.subject: part for case in cases if part_of.get(case.id) == part}
    by_subject = {case.id: of_subject.get(case.subject) for case in cases if case.id not in part_of}
    for part, theirs, so in (
        ("val", "train", "scores on them are too good"),
        ("test", "train", "scores on them are too good"),
        ("train", "test", "they are no test any more"),
    ):
        for which, are in ((part_of, "are"), (by_subject, "are of subjects of")):
            names = [name for name in split[part] if which.get(name) == theirs]
            if names and (part == "train" or split[part] != split["train"]):
                such = (
                    f"{len(names)} {part} cases {are} {theirs} cases of the autoencoder, such as {names[0]}"
                )
                print0(f"note: {such}; {so}")


def labelled_subjects(subjects: Iterable[str], fraction: float, seed: int) -> set[str]:
    """This fraction of the subjects, at least one: those of the smallest hash of (seed, subject).

    A larger fraction holds all subjects of a smaller one, so that a curve over fractions adds labels and
    exchanges none.
    """
    key = {name: hashlib.blake2b(f"{seed}/{name}/mask".encode()).digest() for name in subjects}
    return set(sorted(key, key=key.get)[: max(1, round(fraction * len(key)))])


def hide_masks(data: Data, found: list[Case]) -> Data:
    """The data as if only data.mask_fraction of the training subjects had masks. Training cases of the others
    take part without a mask (data.allow_missing_mask), or do not take part.

    found: all cases with their masks, also those that a stored split lacks: it may have been made by this
    function, and the fraction is that of all. The number of labels, the size and the scaling stay those of
    all cases.
    """
    config, train, val = data.config, data.split["train"], data.split["val"]
    held_out = {name for part in (val, data.split.get("test", [])) if part != train for name in part}
    subjects = {case.subject for case in found if case.id not in held_out and case.mask}
    shown = labelled_subjects(subjects, config.mask_fraction, data.seed)
    hidden = {name for name in train if data.cases[name].subject in subjects - shown} - held_out
    what = "have no mask" if config.allow_missing_mask else "are left out (data.allow_missing_mask)"
    print0(f"data.mask_fraction: {len(hidden)} of {len(train)} training cases {what}")
    if not config.allow_missing_mask:
        split = {part: [name for name in ids if name not in hidden] for part, ids in data.split.items()}
        cases, infos = (
            {name: value for name, value in of.items() if name not in hidden}
            for of in (data.cases, data.infos)
        )
        return replace(data, cases=cases, infos=infos, split=split)
    gone = {"labels": (), "mask_content": "", "labelled": None, "centres": ()}
    return replace(
        data,
        cases=data.cases | {name: replace(data.cases[name], mask=None, raters={}) for name in hidden},
        infos=data.infos | {name: replace(data.infos[name], **gone) for name in hidden},
    )


def inspection_cache(config: DataConfig, root: Path) -> Path:
    """The file that keeps what the inspection of the cases below `root` has found."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return Path(config.cache_dir) / f"scan-{digest}.json"


def check_foreground(config: DataConfig, cases: list[Case]) -> None:
    """InputError if data.foreground would have no effect."""
    if config.foreground and (config.crop == "centre" or not any(case.mask for case in cases)):
        reason = "with data.crop centre" if config.crop == "centre" else "without masks (--data.mask)"
        raise InputError(f"data.foreground: has no effect {reason}")


def open_data(
    config: DataConfig,
    preset: str,
    seed: int,
    split: dict[str, list[str]] | None = None,
    multiple: tuple[int, ...] | None = None,
    before: dict[str, Any] | None = None,
    items: Dataset | None = None,
) -> Data:
    """Finds, splits and checks the data of a run. Any fault of the files is an InputError.

    split: the stored one, of the run that is resumed or of the autoencoder's run; cases that it does not list
    are left out. None: that of the run that data.split names, else as `split_cases` splits. multiple: see
    `make_spec`. before: the state of the autoencoder's run; without a stored split, cases that it knows keep
    their part. items: a data set whose items are the cases, in place of files (items.py).
    """
    if items is None:
        root = resolve_root(config, preset)
        cases, cache = find_all_cases(config, root), inspection_cache(config, root)
    else:
        root, cases, cache = Path(), find_cases(config, Path(), items), None
    infos, found = None, cases
    if split is None and before is None:
        check_foreground(config, cases)
    if split is None and names_run(config):
        split = split_of_run(config, cases)
    if split is None and before is not None:
        infos = inspect_cases(cases, config, cache)
        known, alike = parts_before(infos, before)
        split = split_cases(cases, config, seed, known | alike)
        new = {name for ids in split.values() for name in ids} - known.keys() - alike.keys()
        print0(
            f"split: the autoencoder's run knows {len(known)} cases by their voxels and {len(alike)} by "
            f"their ids alone, {len(new)} are new"
        )
    elif split is None:
        split = split_cases(cases, config, seed)
    else:
        parts = [split.get("train"), split.get("val"), split.get("test", [])]
        if not all(isinstance(part, list) for part in parts) or not (parts[0] and parts[1]):
            raise InputError(f"{root}: the stored split lists no cases to train on, or none to validate on")
        num_found = len(cases)
        cases = listed_cases(cases, {name for part in parts for name in part}, root)
        if left_out := num_found - len(cases):
            print0(f"note: {left_out} cases of {root} are left out, the stored split lacks them")
    infos = infos or inspect_cases(cases, config, cache)
    if before is not None:
        note_seen(cases, split, *parts_before(infos, before))
    note_split(cases, infos, split, config)
    spec = make_spec(cases, infos, split, config, multiple)
    data = Data(config, seed, root, {case.id: case for case in cases}, infos, split, spec)
    return hide_masks(data, found) if config.mask_fraction < 1 and spec.num_labels else data


def check_files(content: dict[str, Any]) -> None:
    """InputError if the cases of a run are no files. `content`: what its checkpoint holds."""
    if content["state"].get("in_memory"):
        raise InputError("the run was trained on a dataset in Python: its own cases are no files to open")


def open_stored(content: dict[str, Any], **changes: Any) -> Data:
    """The data of a run again, in its own split and with its own spec. `content`: what its checkpoint holds.

    changes: fields of DataConfig that differ from the training, such as `patch=None`.
    """
    check_files(content)
    config = replace(from_dict(DataConfig, content["config"]["data"], "data"), **changes)
    preset, seed = content["config"]["preset"], content["config"]["run"]["seed"]
    data = open_data(config, preset, seed, content["state"]["split"])
    return replace(data, spec=DataSpec.from_dict(content["state"]["data"]))
