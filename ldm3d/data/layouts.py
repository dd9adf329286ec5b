"""Which files of a folder are images and which are masks, so that a person need not say it.

Four ways in which people keep their data are recognised, in this order:

    a table            cases.csv, the only CSV with a column `image`, or the dataset.json of the MSD
    BIDS               sub-01/[ses-1/]anat/sub-01_[ses-1_]T1w.nii.gz, masks also in derivatives/
    a folder a case    p01/t1.nii.gz p01/seg.nii.gz, p02/t1.nii.gz p02/seg.nii.gz
    a folder a role    images/p01.nii.gz, labels/p01.nii.gz, or images/p01_T1w.nii.gz, labels/p01_seg.nii.gz;
                       or one folder: of images, or p01_T1w.nii.gz p01_seg.nii.gz, p02_T1w.nii.gz ...,
                       or p01.nii.gz p01_seg.nii.gz, p02.nii.gz ...

Folders of visits may hold each of the last three: baseline/p01/t1.nii.gz, month_6/p01/t1.nii.gz.

A folder that holds the slices of one DICOM volume counts as a file. Files that stand in the same place of
every case have one role. Example: in the third layout t1.nii.gz and seg.nii.gz are two kinds of files. A kind
whose files hold a few small integers is one of masks. All other kinds are images, of which the first by name
is taken. Only what this module says it has recognised is used: a second contrast is named, and left to the
person. So are folders called val or test beside others, for whoever has put cases aside does not want them
trained on.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import InputError
from .cases import files_by_id, participant_of, participants, read_csv
from .inspection import few_values, voxels_off
from .itk import SeveralSeries, is_series_folder
from .volumes import DICOM, is_volume_file, read, read_header, strip_suffix, volume_suffix

MASK_NAMES = re.compile(
    r"mask|label|seg|annot|truth|(^|[_\W])(gt|roi|lesions?|tumou?rs?|nuclei)([_\W]|$)", re.I
)
ROLE_FOLDER = re.compile(
    r"(images?|imgs?|scans?|volumes?|data|raw|masks?|labels?|segs?|segmentations?|annotations?|gt)(Tr|Ts)?",
    re.I,
)
PART = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?", re.I)  # folders that hold a part of a split
PUT_ASIDE = re.compile(r"(^|/)((?i:val(id(ation)?)?|test(ing)?)|(images|labels)Ts)/")
DATE = re.compile(r"(19|20)\d\d([-_.]?)[01]\d\2[0-3]\d")
VISIT = re.compile(  # folders of one visit each; not t1 and t2, which are contrasts
    r"(baseline|bl|follow[-_ ]?ups?|fu|visit|ses(sion)?|time[-_ ]?point|tp|day|week|month|year)[-_ ]?\d*"
    r"|[mv]\d+|\d+[-_ ]?(days?|weeks?|months?|years?|[mwy])",
    re.I,
)
PARTICIPANTS = "participants.tsv"  # BIDS: the table of the subjects
DERIVED = "derivatives"  # BIDS: the folder of what others have computed from the images
NOT_THE_MASK = re.compile(r"brain|skull|head|body|valid", re.I)  # masks of where there is anything at all
IMAGE_NAMES = re.compile(r"image|img|scan|volume|_T1w[_.]", re.I)
MAX_DEPTH, LOOK_AT = 5, 2  # folders below the root; files of a kind that are read to know its role
MOST_KINDS = 50  # of files that are told apart; in a folder with more there is no order
SAY_IT = "list the cases in a cases.csv with the columns image and mask, or give --data.image and --data.mask"
REST = "others"  # under this word a layout names what it leaves out


@dataclass(frozen=True)
class Layout:
    """Settings of DataConfig that name the files of a folder, and in words how each was recognised."""

    settings: dict[str, Any]  # without the prefix "data."
    why: dict[str, str] = field(default_factory=dict)  # by the same names


def volume_files(root: Path) -> list[Path]:
    """All volumes below the root, relative to it, sorted: files, and folders of DICOM slices. Hidden folders
    and runs of this program are not looked into."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        run = "config.json" in names and depth
        keep = [name for name in folders if not name.startswith(".") and name != "runs"]
        folders[:] = [] if run or depth == MAX_DEPTH else sorted(keep)
        if run:
            continue
        files = [name for name in names if is_volume_file(name)]
        if depth and is_series_folder(folder):
            found.append(Path(folder).relative_to(root))
            files = [name for name in files if volume_suffix(name) not in DICOM]
        found += [Path(folder, name).relative_to(root) for name in files]
    return sorted(found)


def _end(path: str | Path) -> str:
    """How a pattern of such files ends: the suffix; "/" for folders of DICOM slices, which have none."""
    return volume_suffix(path) or "/"


def say_visits(folders: Iterable[str]) -> bool:
    """Do the names of folders say visits, such as baseline and month_6, or dates?"""
    return all(VISIT.fullmatch(name) or DATE.search(name) for name in folders)


# --- tables -------------------------------------------------------------------------------------------------


def _table(root: Path) -> Layout | None:
    """cases.csv, an MSD dataset.json, or the one CSV in the root that has a column `image`."""
    if (root / "cases.csv").is_file():
        return Layout({"table": "cases.csv"}, {"table": "the table of the cases in the folder"})
    if (root / "dataset.json").is_file():
        text = (root / "dataset.json").read_text(errors="replace")
        if re.search(r'"training"\s*:\s*\[', text):  # nnU-Net's file of the same name has no such list
            return Layout(
                {"table": "dataset.json"}, {"table": "as the Medical Segmentation Decathlon has it"}
            )
    tables = []
    for path in sorted(root.glob("*.csv")):
        try:
            read_csv(path, ["image"])
        except InputError:
            continue
        tables.append(path.name)
    if len(tables) > 1:
        raise InputError(f"{root}: {' and '.join(tables[:2])} both list images; name one with --data.table")
    return Layout({"table": tables[0]}, {"table": "the CSV with a column image"}) if tables else None


# --- kinds of files -----------------------------------------------------------------------------------------

Kinds = dict[str, dict[str, Path]]  # pattern of the files of a kind -> {case: its file, relative to the root}


def _is_derived(path: str | Path) -> bool:
    return Path(path).parts[0] == DERIVED


def _inner(parts: tuple[str, ...]) -> str | None:
    """The pattern of the folders sub-01/[ses-1/]anat/ of a BIDS file, of its path; None for other paths."""
    if len(parts) < 2 or not parts[0].startswith("sub-"):
        return None
    middle = "ses-*/" if len(parts) > 2 and parts[1].startswith("ses-") else ""
    return f"sub-*/{middle}" + "".join(f"{part}/" for part in parts[1 + bool(middle) : -1])


def _bids(files: list[Path]) -> Kinds:
    """The kinds of a BIDS folder: files in the same subfolder (anat, dwi, ...) with the same last word."""
    kinds: Kinds = defaultdict(dict)
    for path in files:
        stem, inner = strip_suffix(path), _inner(path.parts)
        if inner and stem.startswith("sub-") and "_" in stem:
            case, _, word = stem.rpartition("_")
            kinds[f"{inner}{{id}}_{word}{_end(path)}"][case] = path
    return kinds


def _derived(files: list[Path], cases: Iterable[str]) -> Kinds:
    """The kinds of the files in derivatives/. Their names begin as those of the images and say more.

    Example: derivatives/manual/sub-01/anat/sub-01_label-lesion_mask.nii.gz belongs to the case sub-01.
    """
    kinds, cases = defaultdict(dict), set(cases)
    for path in files:
        place = next((i for i, part in enumerate(path.parts) if part.startswith("sub-")), len(path.parts))
        inner, words = _inner(path.parts[place:]), strip_suffix(path).split("_")
        begins = ("_".join(words[:n]) for n in range(len(words) - 1, 0, -1))
        case = next((begin for begin in begins if begin in cases), None)
        if inner and case:
            rest = strip_suffix(path).removeprefix(case)
            outer = "".join(f"{part}/" for part in path.parts[:place])
            kinds[f"{outer}{inner}{{id}}{rest}{_end(path)}"][case] = path
        else:
            kinds[f"{path.parent.as_posix()}/*{_end(path)}"][str(path)] = path
    return kinds


def _belong(root: Path, image: str, mask: str, kinds: Kinds) -> bool:
    """Does a kind of derived masks fit the images: a mask for no other case, and on the grid of its image?

    Masks in a standard space, such as MNI, have another grid. Other names may fit a short pattern.
    """
    try:
        found = files_by_id(mask, root, "data.mask")
        pairs = [(root / kinds[image][case], found[case]) for case in list(found)[:LOOK_AT]]
        headers = [[read_header(path) for path in pair] for pair in pairs]
    except (InputError, LookupError):
        return False
    same = all(a.shape == b.shape and voxels_off(b, a) <= 1 for a, b in headers)
    return same and found.keys() <= kinds[image].keys()


def _case_folders(files: list[Path]) -> Kinds:
    """The kinds where every folder is a case: the same name, or that of the folder and the same word more."""
    kinds: Kinds = defaultdict(dict)
    several = Counter(path.parent for path in files)
    for path in files:
        if not path.parent.parts:
            continue
        name, folder = path.name if volume_suffix(path) else f"{path.name}/", path.parent.name
        if several[path.parent] == 1:
            name = f"*{_end(path)}"
        elif name == folder + _end(path):
            name = f"{{same}}{_end(path)}"
        elif name.startswith(folder):
            name = f"*{name[len(folder) :]}"
        *outer, _ = path.parent.parts
        places = [f"{part}/" if PART.fullmatch(part) else "{id}/" for part in outer]
        pattern = "".join([*places, "{id}/"]) if outer else "*/"
        kinds[pattern + name][str(path.parent)] = path
    return kinds


def _role_folders(files: list[Path]) -> Kinds:
    """The kinds where every folder is a role: the files in it, with the ending of the names that all share.

    nnU-Net numbers channels at the end of names: images/a_0000.nii.gz belongs to labels/a.nii.gz.
    """
    kinds: Kinds = defaultdict(dict)
    for path in files:
        stem = strip_suffix(path)
        number = re.search(r"_000\d$", stem) if path.parent.name in ("imagesTr", "imagesTs") else None
        end = number[0] if number else ""
        folder = "" if path.parent == Path() else f"{path.parent.as_posix()}/"
        kinds[f"{folder}*{end}{_end(path)}"][stem.removesuffix(end)] = path
    return kinds


def _same_ids(one: Iterable[str], other: Iterable[str]) -> bool:
    """Do two kinds of files speak of the same cases, most of them?"""
    a, b = set(one), set(other)
    return len(a & b) > 0.5 * min(len(a), len(b))


def share_names(of_folder: dict[str, set[str]]) -> bool:
    """Do two of these folders hold the same names, most of them? of_folder: folder -> the names in it."""
    return any(_same_ids(a, b) for a, b in itertools.combinations(of_folder.values(), 2))


def are_visits(of_folder: dict[str, set[str]]) -> bool:
    """Are these folders of one visit each, with the subjects in them? Their names say so, they share names,
    and there are more names than folders: m01/t1 and m02/t1 are of two mice, not two visits of the subject
    t1. of_folder: folder -> the names in it."""
    more = len(set().union(*of_folder.values())) > len(of_folder)
    return more and say_visits(of_folder) and share_names(of_folder)


def _candidates(root: Path, files: list[Path]) -> tuple[Kinds, str]:
    """(the kinds of files, the name of the layout).

    Cases are many, and often numbered: p01 p02 p03. So a folder is a case where the names of folders differ
    in numbers only and those of files do not, or else where there are more folders than kinds of files; but
    not where folders are called images, labels and the like.
    """
    raw = [path for path in files if not _is_derived(path)]
    bids = _bids(raw)
    if bids and sum(map(len, bids.values())) >= 0.5 * len(raw):
        cases = {case for kind in bids.values() for case in kind}
        return bids | _derived([path for path in files if _is_derived(path)], cases), "BIDS"
    folders = {path.parent for path in files}
    nested = _case_folders(files)
    numbered = [
        len(names) > 1 and len({re.sub(r"\d+", "#", name) for name in names}) == 1
        for names in ({folder.as_posix() for folder in folders}, {strip_suffix(path) for path in files})
    ]
    many = numbered[0] > numbered[1] or (numbered[0] == numbered[1] and len(folders) >= len(nested))
    if many and len(folders) > 1 and not any(ROLE_FOLDER.fullmatch(f.name) for f in folders):
        return nested, "a folder a case"
    return _role_folders(files), "a folder a role" if len(folders) > 1 else "one folder"


def _num_labels(root: Path, paths: Iterable[Path]) -> int:
    """The number of values in the first files of a kind, if these can be masks; else 0. A folder of several
    series cannot: one of them is chosen for images only."""
    most = 0
    for path in list(paths)[:LOOK_AT]:
        try:
            volume = read(root / path)
        except SeveralSeries:
            return 0
        num = few_values(volume.array) if volume.channels == 1 else 0
        if not num:
            return 0
        most = max(most, num)
    return most


def _kinds_of_images_and_masks(root: Path, kinds: Kinds) -> tuple[list[str], list[tuple[int, str]]]:
    """(patterns of images, (number of labels, pattern) of masks), the best of each first. What is derived is
    no image, and a mask only by its name."""
    derived = {pattern for pattern in kinds if _is_derived(pattern)}
    asked = (p for p in kinds if p not in derived or MASK_NAMES.search(p.rpartition("{id}")[2]))
    labels = {pattern: _num_labels(root, kinds[pattern].values()) for pattern in asked}
    images = [pattern for pattern, num in labels.items() if not num and pattern not in derived]
    if not images:  # shapes are images that look like masks
        own = [pattern for pattern in kinds if pattern not in derived]
        images = [pattern for pattern in own if not MASK_NAMES.search(pattern)] or own
        labels = {pattern: num for pattern, num in labels.items() if pattern not in images}
    masks = [(num, pattern) for pattern, num in labels.items() if num]
    images.sort(key=lambda p: (-len(kinds[p]), not IMAGE_NAMES.search(p), p))
    doubts = {m: (bool(NOT_THE_MASK.search(m[1])), not MASK_NAMES.search(m[1])) for m in masks}
    masks.sort(key=lambda m: (*doubts[m], _is_derived(m[1]), -m[0], m[1]))
    images.sort(key=lambda p: bool(PUT_ASIDE.search(p)))
    masks.sort(key=lambda m: bool(PUT_ASIDE.search(m[1])))
    return images, masks


def _of_raters(kinds: Kinds, image: str, masks: list[tuple[int, str]]) -> tuple[int, str] | None:
    """The masks whose files are named ID__RATER, with at least one for every image and none for others: of
    several such kinds the one with most files. None if there are no such masks."""
    fits = [
        (num, pattern)
        for num, pattern in masks
        if pattern.count("*") == 1 and {n.rpartition("__")[0] for n in kinds[pattern]} == set(kinds[image])
    ]
    return max(fits, key=lambda fit: len(kinds[fit[1]]), default=None)


def common_ending(names: Iterable[str]) -> str:
    """The word that all of these names end with, with its "_", such as "_T1w"; "" if there is none."""
    ends = {"".join(name.rpartition("_")[1:]) for name in names}
    end = ends.pop() if len(ends) == 1 else ""
    return end if end.startswith("_") else ""


def _without_ending(kinds: Kinds, pattern: str) -> tuple[str, dict[str, Path]]:
    """(pattern, {case: its file}) of a kind without the word that all of its names end with: images/*_T1w.nii
    for images/*.nii, and p01 for p01_T1w. As the kind is where the names have no such word."""
    end = common_ending(kinds[pattern])
    return pattern.replace("*", f"*{end}"), {n.removesuffix(end): path for n, path in kinds[pattern].items()}


def _paired_without_endings(
    kinds: Kinds, image: str, masks: list[tuple[int, str]]
) -> tuple[str, tuple[int, str]] | None:
    """(pattern of images, (number of labels, pattern of masks)) where the names in a folder end with a word
    of its own, and what stands before it gives each image one mask, and each mask one image. `kinds` then
    has these patterns. None if there are no such masks."""
    for num, mask in masks:
        others, ours = _without_ending(kinds, mask)
        for images, theirs in ((image, kinds[image]), _without_ending(kinds, image)):
            if theirs.keys() == ours.keys():
                del kinds[image], kinds[mask]
                kinds |= {images: theirs, others: ours}
                return images, (num, others)
    return None


def _by_last_word(kinds: Kinds) -> Kinds:
    """The files of one folder by the last word of their names, such as p01_T1w and p01_seg, where each case
    has a file of every word; else {}."""
    apart: Kinds = defaultdict(dict)
    for pattern, files in kinds.items():
        for name, path in files.items():
            case, mark, word = name.rpartition("_")
            apart[pattern.replace("*", f"*{mark}{word}")][case] = path
    cases = {frozenset(files) for files in apart.values()}
    return apart if len(cases) == 1 and "" not in cases.pop() and len(apart) <= MOST_KINDS else {}


def _by_name_of_image(kinds: Kinds) -> Kinds:
    """The files of one folder where each is an image, or is named like an image and the same word more, which
    is its mask: p01 and p01_seg; {} if some file is neither."""
    names = {name for files in kinds.values() for name in files}
    image_of = {}
    for name in names:
        for mark in re.finditer(r"[_\W]", name):
            if (image := name[: mark.start()]) in names and MASK_NAMES.search(name[mark.start() :]):
                image_of[name] = image
    ends = {name.removeprefix(image) for name, image in image_of.items()}
    if len(ends) != 1 or set(image_of.values()) != names - image_of.keys():
        return {}
    apart, end = defaultdict(dict), ends.pop()
    for pattern, files in kinds.items():
        for name, path in files.items():
            of_masks = pattern.replace("*", f"*{end}")
            apart[of_masks if name in image_of else pattern][image_of.get(name, name)] = path
    return apart


def _folders_of_classes(kinds: Kinds, images: list[str], masks: list) -> str | None:
    """The pattern of all images where folders are classes, such as healthy/ and ill/: no name is in two of
    them, and all lie equally deep. None where folders are something else, such as two contrasts of the same
    heads: T1/p01_T1.nii.gz and T2/p01_T2.nii.gz."""
    names = [name for pattern in images for name in _without_ending(kinds, pattern)[1]]
    ends = {(pattern.rstrip("/").count("/"), _end(pattern)) for pattern in images}
    if masks or len(images) < 2 or len(ends) > 1 or len(set(names)) < len(names):
        return None
    levels = zip(*(Path(pattern).parent.parts for pattern in images), strict=True)
    places = [f"{level[0]}/" if len(set(level)) == 1 else "{id}/" for level in levels]
    return "".join(places) + "{id}" + ends.pop()[1]


def _matching(kinds: Kinds, image: str) -> list[Path]:
    """The files of the pattern of the images: of one kind, or of all."""
    return [
        path for files in ([kinds[image]] if image in kinds else kinds.values()) for path in files.values()
    ]


def _rest(kinds: Kinds, used: Iterable[Any]) -> dict[str, str]:
    """{REST: the patterns that are not used, with the numbers of their files}; {} if there are none."""
    others = sorted(kinds.keys() - set(used), key=lambda pattern: (_is_derived(pattern), pattern))
    listed = [f"{pattern} ({len(kinds[pattern])})" for pattern in others[:4]]
    more = [f"{len(others) - 4} more"] if len(others) > 4 else []
    return {REST: ", ".join(listed + more)} if others else {}


def _add_participants(
    root: Path, cases: Iterable[str], settings: dict[str, Any], why: dict[str, str]
) -> None:
    """Take the table of subjects of a BIDS folder, if it knows one of these cases."""
    if not (root / PARTICIPANTS).is_file():
        return
    try:
        listed, problem = participants(root / PARTICIPANTS), "lists none of the subjects"
    except InputError as e:
        listed, problem = {}, str(e)
    if listed.keys() & {participant_of(case.partition("_")[0]) for case in cases}:
        settings["participants"], why["participants"] = PARTICIPANTS, "BIDS: what is known of each subject"
    else:
        why[REST] = ", ".join([f"{PARTICIPANTS} ({problem})", *([why[REST]] if REST in why else [])])


def _of_kinds(root: Path, kinds: Kinds, name: str) -> Layout:
    """The layout of a folder without a table. name: of the layout."""
    images, masks = _kinds_of_images_and_masks(root, kinds)
    used = [pattern for pattern in images if not PUT_ASIDE.search(pattern)]
    if name == "a folder a role" and (classes := _folders_of_classes(kinds, used, masks)):
        num = sum(len(kinds[pattern]) for pattern in used)
        say = f"{num} files in {len(used)} folders, no name of which is in two of them"
        return Layout({"image": classes}, {"image": say} | _rest(kinds, used))
    image = images[0]
    num = len(kinds[image])
    settings, why = {"image": image}, {"image": f"{name}: {num} such files"}
    fits = ((k, p) for k, p in masks if _same_ids(kinds[image], kinds[p]))
    fits = (m for m in fits if not _is_derived(m[1]) or _belong(root, image, m[1], kinds))
    if best := next(fits, None):
        num_labels, settings["mask"] = best
        why["mask"] = f"beside the images, {num_labels} small integers in the first of them"
        if len(missing := kinds[image].keys() - kinds[settings["mask"]].keys()):
            settings["allow_missing_mask"] = True
            why["allow_missing_mask"] = f"{len(missing)} of {num} images have no mask"
    elif best := _of_raters(kinds, image, masks):
        settings["mask"] = best[1].replace("*", "{id}__{rater}")
        why["mask"] = f"beside the images, {len(kinds[best[1]])} files named by case and rater"
    elif name == "a folder a role" and (pair := _paired_without_endings(kinds, image, masks)):
        settings["image"], (num_labels, settings["mask"]) = pair
        why["mask"] = f"one for each image, {num_labels} small integers in the first of them"
    why |= _rest(kinds, [*settings.values(), *(best or ())])
    if name == "BIDS":
        settings["subject"], why["subject"] = r"^(sub-[^_]+)", "BIDS: the subject stands first in every name"
        _add_participants(root, kinds[image], settings, why)
    return Layout(settings, why)


def _of_visits(root: Path, files: list[Path]) -> Layout | None:
    """The layout where folders of visits hold the subjects: baseline/p01.nii.gz and month_6/p01.nii.gz. All
    are laid out as the visit with most files. None where the folders are others."""
    visits = Counter(path.parts[0] for path in files if len(path.parts) > 1)
    if len(visits) < 2 or visits.total() < len(files) or not say_visits(visits):
        return None
    first = visits.most_common(1)[0][0]
    try:
        layout = recognise(root / first)
    except InputError:  # a folder of one case, whose images and masks only the other cases tell apart
        return None
    if "image" not in layout.settings:  # but in a table
        return None
    settings = {k: v for k, v in layout.settings.items() if k not in ("subject", "participants")}
    for role in settings.keys() & {"image", "mask"}:
        pattern = settings[role]
        settings[role] = "{id}/" + (pattern if "{id}" in pattern else pattern.replace("*", "{id}", 1))
    why = {key: f"{reason}, in {first} of {len(visits)} visits" for key, reason in layout.why.items()}
    subjects: dict[str, set[str]] = defaultdict(set)
    for name, path in files_by_id(settings["image"], root, "data.image").items():
        visit = path.relative_to(root).parts[0]
        subjects[visit].add(name.removeprefix(f"{visit}_"))
    return Layout(settings, why) if are_visits(subjects) else None


def recognise(root: Path) -> Layout:
    """The layout of the files in a folder. InputError if there are none, or if they cannot be told apart."""
    if table := _table(root):
        return table
    files = volume_files(root)
    if not files:
        raise InputError(f"{root}: holds no images (.nii .nii.gz .tif .npy .png ...) and no table of cases")
    if layout := _of_visits(root, files):
        return layout
    kinds, name = _candidates(root, files)
    if name == "one folder" and (apart := _by_name_of_image(kinds)):
        layout = _of_kinds(root, apart, name)
        if MASK_NAMES.search(layout.settings.get("mask", "")):
            return layout
    num = sum(not _is_derived(pattern) for pattern in kinds)
    if not num:
        raise InputError(
            f"{root}: all images lie in {DERIVED}/, a place for what is made from images; if these are the "
            f"data, give {root / DERIVED}"
        )
    if num > MOST_KINDS:
        raise InputError(f"{root}: {num} kinds of files, and which are images? {SAY_IT}")
    layout = _of_kinds(root, kinds, name)
    images = [strip_suffix(path) for path in _matching(kinds, layout.settings["image"])]
    masks = [image for image in images if MASK_NAMES.search(image)]
    if 0 < len(masks) < len(images):
        if name == "one folder" and (apart := _by_last_word(kinds)):
            layout = _of_kinds(root, apart, name)
            if MASK_NAMES.search(layout.settings.get("mask", "")):
                return layout
        raise InputError(f"{root}: images and masks, such as {masks[0]}, lie in one folder; {SAY_IT}")
    return layout


def dimensions(path: Path, series: str | None = None) -> int:
    """2 or 3: the spatial axes of an image; a volume of a single slice has 2."""
    shape = read_header(path, series=series).shape
    return 2 if len(shape) == 2 or min(shape) == 1 else 3
