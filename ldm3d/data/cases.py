"""The table of cases: which files belong together, which subject they are of, and the split of the subjects.

A case is one image with what belongs to it: a label map (role "mask"), a volume to translate from (role
"source"), a class, a text. The table comes from one of

    globs          data.image, data.mask, data.source, paired by what their first * matches: the case id
    a CSV          columns image, and any of mask, source, class, text, subject, split, id
                   (mask:anna, mask:ben in place of mask: the masks of several raters)
    dataset.json   as the Medical Segmentation Decathlon (MSD) has it
    a Dataset      from Python (items.py)

Example: with data.image "images/*_t1.nii.gz" and data.mask "labels/*.nii.gz" the files images/p01_t1.nii.gz
and labels/p01.nii.gz are case "p01". A case that lacks a file of a role is an error that names the case.
With data.mask "raters/{id}__{rater}.tif" the files raters/p01__anna.tif and raters/p01__ben.tif are two masks
of case "p01", by the raters "anna" and "ben".

The split is drawn by subject, so that two scans of one patient never stand on both sides of it. Example:
twenty cases p01_a, p01_b ... p10_b are ten subjects by data.subject "(p..)_". With val_fraction 0.2,
test_fraction 0.1 and seed 0, subjects p01 and p04 (four cases) are for validation, p07 is for testing, and
the other seven are for training.

No file of a case is opened here: that is loading.py and inspection.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..config import InputError
from ..engine.distributed import keyed_generator, print0
from ..engine.runs import read_split
from .download import ARCHIVES
from .items import ROLES, rows_of_items
from .itk import is_dicom_folder
from .settings import DataConfig
from .volumes import NoFile, is_file, volume_suffix

SPLITS = ("train", "val", "test")
RATER = "mask:"  # begins the name of a column of masks; the name of the rater follows


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    id: str
    image: Path | NoFile
    mask: Path | NoFile | None = None  # of several raters the first
    source: Path | NoFile | None = None
    subject: str = ""
    split: str | None = None  # "train", "val", "test"; None: to be drawn
    class_idx: int | None = None  # the class, if the column `class` holds a number; None: blank, or a name
    text: str = ""
    columns: dict[str, str] = field(default_factory=dict)  # the cells that name no file of a role
    volume: Case | None = None  # the case that this one is a slice of (slices.py)
    raters: dict[str, Path] = field(default_factory=dict)  # rater -> mask, where masks are by several raters

    @property
    def masks(self) -> list[Path | NoFile]:
        """The masks of all raters."""
        return list(self.raters.values()) or [path for path in (self.mask,) if path is not None]

    @property
    def files(self) -> list[tuple[Path | NoFile, str]]:
        """(file, role) of all files of the case."""
        files = {"image": [self.image], "mask": self.masks, "source": [self.source]}
        return [(path, role) for role in ROLES for path in files[role] if path is not None]

    def image_alone(self) -> Case:
        """The case without its masks and its source."""
        return replace(self, mask=None, source=None, raters={})


def resolve_root(config: DataConfig, preset: str) -> Path:
    """The folder of the data: data.root, else $LDM3D_DATA/<name>, else data/<name>.

    The name is that of data.root, else data.name, else the name of the preset. So the data of a run that have
    moved are found by LDM3D_DATA, the folder that holds their folder now.
    """
    base, root = os.environ.get("LDM3D_DATA"), None if config.root is None else Path(config.root).expanduser()
    name = config.name or preset if root is None else os.path.basename(os.path.abspath(root))
    elsewhere = [Path(base).expanduser() / name] if base else []
    folders = [*elsewhere, Path("data") / name] if root is None else [root, *elsewhere]
    for folder in folders:
        if os.path.isdir(folder):  # Path.is_dir raises for names that are too long
            if root not in (None, folder):
                print0(f"note: no folder {root}; the data are taken from {folder} ($LDM3D_DATA)")
            return folder
    hint = "put it there, set LDM3D_DATA to the folder that holds it, or name it with --data.root"
    if root is None and name in ARCHIVES:
        hint += f"; `python -m ldm3d.data download {name}` gets it"
    raise InputError(f"no data folder {' or '.join(map(str, folders))}; {hint}")


def raise_all(problems: list[str]) -> None:
    """One line for all problems: the first two, and how many there are. Each counts once."""
    problems = list(dict.fromkeys(problems))
    if len(problems) > 1:
        raise InputError(f"{problems[0]} [and {len(problems) - 1} more, the next: {problems[1]}]")
    if problems:
        raise InputError(problems[0])


def _stem(name: str) -> str:
    """ "a.nii.gz" -> "a", "a.b.tif" -> "a.b"."""
    return re.sub(r"(?i)(\.nii)?\.\w+$", "", name)


def _marked(pattern: str) -> str:
    """The pattern with {id} where the case id stands: at the first *, unless the pattern says {id} itself."""
    return pattern if "{id}" in pattern else re.sub(r"(?<!\*)\*(?!\*)", "{id}", pattern, count=1)


def pattern_of_names(pattern: str) -> str | None:
    """The pattern of the files alone, for their folder: "images/*_T1w.nii.gz" -> "*_T1w.nii.gz". None where
    folders name the case, as in "*/t1.nii.gz"."""
    folders = _marked(pattern).rpartition("/")[0]
    return None if "{id}" in folders else pattern.rpartition("/")[2]


def files_by_rater(pattern: str, root: Path, key: str) -> dict[str, dict[str, Path]]:
    """{case id: {rater: file}}. The id is what the first * matches, or what the {id}s match, joined by "_".
    The rater is what {rater} matches; "" in a pattern without.

    "*/t1_*.nii" makes p01/t1_x.nii the case "p01"; "{id}/{id}.tif" makes p01/a.tif the case "p01_a". {same}
    repeats what the {id} before it matches: "{id}/{same}.tif" fits p01/p01.tif and not p01/a.tif. The other *
    match anything, but only one file may be left for an id. Where the pattern ends in *, the suffix of the
    file is not part of the id. A suffix of volumes may be written in capitals in the files. Names that begin
    with a dot are ignored: some archives have such a twin of every file. A folder that holds DICOM slices
    counts as a file; a pattern that ends in / fits such folders only: "*/", "*/ct/".
    """
    fits = is_dicom_folder if pattern.endswith("/") else is_file
    pattern = pattern.rstrip("/")
    marked = _marked(pattern)
    if pattern.count("{rater}") > 1:
        raise InputError(f"{key}: {pattern!r} has {{rater}} twice")
    if (
        "{id}" not in marked.partition("{same}")[0]
        or Path(pattern).is_absolute()
        or ".." in Path(pattern).parts
    ):
        raise InputError(f"{key}: expected a pattern below the root with * for the case id, got {pattern!r}")
    meaning = {"{id}": "([^/]+)", "{rater}": "([^/]+)", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    outside = marked.partition("{same}")[0].rpartition("{id}")[0]  # what stands before that {id}
    meaning["{same}"] = f"(?:\\{1 + outside.count('{id}') + outside.count('{rater}')})"
    end = volume_suffix(pattern)
    parts = re.split(r"(\{id\}|\{same\}|\{rater\}|\*\*/|\*|\?)", marked[: len(marked) - len(end)])
    groups = [part for part in parts if part in ("{id}", "{rater}")]
    parts = [meaning.get(part, re.escape(part)) for part in parts]
    expression = re.compile(f"{''.join(parts)}(?i:{re.escape(end)})")
    any_case = "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in end)
    stars = re.sub(r"\{id\}|\{same\}|\{rater\}", "*", pattern[: len(pattern) - len(end)])
    pattern_of_glob = stars.replace("[", "[[]") + any_case
    files: dict[str, dict[str, Path]] = {}
    dangling: list[Path] = []
    try:
        found = sorted(root.glob(pattern_of_glob))
    except ValueError as e:  # such as ** within a name
        raise InputError(f"{key}: {pattern!r} is no pattern of files ({e})") from None
    for path in found:
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match and path.is_symlink() and not path.exists():
            dangling.append(path)
        if not match or path.name.startswith(".") or not fits(path):
            continue
        found_in = list(zip(groups, match.groups(), strict=True))
        name, rater = ("_".join(text for g, text in found_in if g == group) for group in ("{id}", "{rater}"))
        if not path.is_dir():
            name = _stem(name) if pattern.endswith(("*", "{id}")) else name
            rater = _stem(rater) if pattern.endswith("{rater}") else rater
        own = files.setdefault(name, {})
        if rater in own:
            raise InputError(
                f"{key}: case {name} has two files, {own[rater]} and {path}; make the pattern {pattern!r} "
                "narrower, or write {id} for each part of the path that names the case"
            )
        own[rater] = path
    if dangling:
        raise InputError(
            f"{key}: {len(dangling)} links lead to files that are not there, such as {dangling[0]}; get the "
            "files (git annex get, datalad get), or list those that are there in a --data.table"
        )
    if not files:
        raise InputError(f"{key}: no file in {root} fits {pattern!r}")
    return files


def files_by_id(pattern: str, root: Path, key: str) -> dict[str, Path]:
    """{case id: file} of a pattern without {rater}, as in `files_by_rater`."""
    return {name: files[""] for name, files in files_by_rater(pattern, root, key).items()}


def masks_among(images: dict[str, Path], masks: dict[str, dict[str, Path]]) -> set[str]:
    """The case ids of those images that are masks of other images. In one folder "*.nii.gz" fits p01.nii.gz
    and also p01_seg.nii.gz, which is the mask of p01 by "*_seg.nii.gz".

    images: {case id: file}. masks: as `files_by_rater` finds them, or sources."""
    case_of = {path: name for name, files in masks.items() for path in files.values()}
    return {
        name for name, path in images.items() if case_of.get(path, name) != name and case_of[path] in images
    }


def _rows_of_globs(globs: dict[str, str], root: Path, problems: list[str]) -> tuple[dict, dict[str, str]]:
    """({case id: {role: file, or None}}, {role: its pattern}) of the globs in the settings. The masks of
    raters also stand in columns of their own, "mask:anna", as in a table."""
    if other := next((role for role in globs if role != "mask" and "{rater}" in globs[role]), None):
        raise InputError(f"data.{other}: {globs[other]!r}: only masks have a {{rater}}")
    found = {role: files_by_rater(pattern, root, f"data.{role}") for role, pattern in globs.items()}
    for role in globs.keys() - {"image"}:
        for name in masks_among({name: files[""] for name, files in found["image"].items()}, found[role]):
            del found["image"][name]
    rows: dict[str, dict] = {name: {} for name in found["image"]}
    for role, of_case in found.items():
        for name in rows:
            files = of_case.get(name, {})
            rows[name][role] = next(iter(files.values()), None)
            rows[name] |= {f"{RATER}{rater}": path for rater, path in files.items() if rater}
        for name in of_case.keys() - rows.keys():
            path = next(iter(of_case[name].values()))
            problems.append(f"{path}: {role} of case {name}, which has no image ({globs['image']})")
    problems.sort()
    return rows, globs


def read_csv(path: Path, required: list[str]) -> list[dict[str, str]]:
    """Rows of a CSV with a header line (comma, semicolon or tab), as dicts, cells stripped.

    InputError if a required column is missing, or if a line has not the cells of the header.
    """
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: no such CSV (data.subject, data.split, data.participants or data.table names it)"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as a CSV ({e})") from None
    head = text.partition("\n")[0]
    mark = "\t" if Path(path).suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
        listed = [(reader.line_num, row) for row in reader]
    except csv.Error as e:  # such as a cell of more than 128 kB
        raise InputError(f"{path}: line {reader.line_num + 1} cannot be read as a CSV ({e})") from None
    for column in required:
        if column not in reader.fieldnames:
            raise InputError(
                f"{path}: no column {column!r}, only {', '.join(reader.fieldnames) or 'nothing'}"
            )
    if twice := [name for name, count in Counter(reader.fieldnames).items() if name and count > 1]:
        raise InputError(f"{path}: two columns {twice[0]!r}, expected one")
    rows = []
    for number, row in listed:
        if None in row or None in row.values():
            raise InputError(
                f"{path}: line {number} has not the {len(reader.fieldnames)} cells of the header "
                f"(cells that hold {mark!r} need quotes)"
            )
        rows.append({column: cell.strip() for column, cell in row.items() if column})
    return rows


def _read_msd(path: Path) -> list[dict[str, Any]]:
    """Rows of an MSD dataset.json: the lists "training" and, if there, "validation" of {image, label}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        parts = {"train": content["training"], "val": content.get("validation") or []}
        rows = [
            {
                "image": entry["image"],
                "mask": entry.get("label"),
                "split": part if parts["val"] else None,
            }
            for part, entries in parts.items()
            for entry in entries
        ]
        if not all(isinstance(row["image"], str) and isinstance(row["mask"], str | None) for row in rows):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f'{path}: expected JSON with "training": [{{"image": ..., "label": ...}} ...]'
        ) from None
    if not any(row["mask"] for row in rows):
        return [{column: row[column] for column in ("image", "split")} for row in rows]
    return rows


def _rows_of_table(name: str | None, root: Path, problems: list[str]) -> tuple[dict, dict[str, str]]:
    """({case id: columns, with files as paths}, {role: the table}) of a CSV or an MSD dataset.json.

    The case id is the column `id`, else the name of the image file, or its path where names repeat, as with a
    folder for every case.
    """
    names = [name] if name else ["cases.csv", "dataset.json"]
    table = next((root / n for n in names if os.path.isfile(root / n)), None)
    if table is None and name:
        raise InputError(f"data.table: no file {root / name}")
    if table is None:
        raise InputError(
            f"{root}: which files are the images? --data.image 'images/*.nii.gz', or a cases.csv"
        )
    listed = _read_msd(table) if table.suffix == ".json" else read_csv(table, ["image"])
    if not listed:
        raise InputError(f"{table}: lists no case")
    rated = next((column for column in listed[0] if column.startswith(RATER)), None)
    if rated and "mask" in listed[0]:
        raise InputError(f"{table}: columns mask and {rated}; name the rater of every mask, or of none")
    images = [row["image"] for row in listed]
    paths = [Path(name if os.path.isdir(table.parent / name) else _stem(name)) for name in images]
    stems = [path.name for path in paths]
    if len(set(stems)) < len(stems):
        stems = ["_".join(path.parts) for path in paths]
    rows: dict[str, dict] = {}
    for stem, row in zip(stems, listed, strict=True):
        case = row.get("id") or stem
        if case in rows:
            problems.append(f"{table}: case {case} is listed twice")
        named = [column for column in row if column.startswith(RATER)]
        files = {c: table.parent / row[c] if row.get(c) else None for c in (*ROLES, *named)}
        if named:
            files["mask"] = next((files[column] for column in named if files[column]), None)
        for role, path in files.items():
            if path is not None and not is_file(path):
                problems.append(f"{table}: {role} of case {case}: no file {path}")
        rows[case] = row | files
    return rows, {role: str(table) for role in ROLES if role in listed[0] or (rated and role == "mask")}


def _assign(rule: str, column: str, rows: dict[str, dict], root: Path, problems: list[str]) -> None:
    """Fills the column subject or split from a CSV (name, column) or by an expression with one group."""
    if rule.endswith(".csv"):
        listed = {row["name"]: row[column] for row in read_csv(root / rule, ["name", column])}
        for name, row in rows.items():
            row[column] = listed.get(name)
            if not row[column]:
                problems.append(f"{root / rule}: no {column} for case {name}")
        return
    try:
        expression = re.compile(rule)
    except re.error as e:
        raise InputError(f"data.{column}: {rule!r} is neither a .csv nor an expression ({e})") from None
    if expression.groups != 1:
        raise InputError(f"data.{column}: expected one group ( ) in {rule!r}, got {expression.groups}")
    for name, row in rows.items():
        text = name if column == "subject" else Path(os.path.relpath(row["image"] or "", root)).as_posix()
        match = expression.search(text)
        row[column] = match and match[1]
        if not row[column]:
            problems.append(f"data.{column}: {rule!r} does not fit {text!r}")


def participant_of(subject: str) -> str:
    """The name of a subject, by which tables are compared: 01 and sub-01 are both "sub-01"."""
    return f"sub-{subject.removeprefix('sub-')}"


def participants(path: Path) -> dict[str, dict[str, str]]:
    """{participant: its cells by column} of a table of subjects, such as the participants.tsv of BIDS, which
    writes n/a for a blank. What says which files and parts there are is left out: other tables do."""
    skip, found = {*ROLES, "participant_id", "id", "subject", "split"}, {}
    for row in read_csv(path, ["participant_id"]):
        if (name := participant_of(row["participant_id"])) in found:
            raise InputError(f"{path}: participant {name} is listed twice")
        found[name] = {k: "" if v.lower() == "n/a" else v for k, v in row.items() if k not in skip}
    return found


def _add_participants(path: Path, rows: dict[str, dict]) -> None:
    """Gives every case the cells of its subject; cells that the case has itself come first."""
    listed = participants(path)
    subjects = {name: participant_of(row.get("subject") or name) for name, row in rows.items()}
    if not listed.keys() & set(subjects.values()):
        raise InputError(
            f"data.participants: {path} lists none of the subjects, such as {min(subjects.values())}"
        )
    for name, row in rows.items():
        for column, cell in listed.get(subjects[name], {}).items():
            row.setdefault(column, cell)


def _case(name: str, row: dict, origin: dict[str, str], config: DataConfig, problems: list[str]) -> Case:
    """A row of the table as a case, checked. `origin`: role -> the pattern or table that names its files."""
    for role, where in origin.items():
        if row[role] is None and not (role == "mask" and config.allow_missing_mask):
            hint = "; --data.allow_missing_mask lets such cases take part" if role == "mask" else ""
            problems.append(f"case {name}: no {role} for {row['image']} ({where}{hint})")
    split, cell = row.get("split") or None, row.get("class") or ""
    if split not in (None, *SPLITS):
        problems.append(f"case {name}: split is {split!r}, expected one of {', '.join(SPLITS)}")
    return Case(
        id=name,
        image=row["image"],
        mask=row.get("mask"),
        source=row.get("source"),
        subject=row.get("subject") or name,
        split=split,
        class_idx=int(cell) if re.fullmatch("[0-9]{1,9}", cell) else None,
        text=row.get("text") or "",
        columns={k: v or "" for k, v in row.items() if k not in ROLES and not k.startswith(RATER)},
        raters={k.removeprefix(RATER): v for k, v in row.items() if k.startswith(RATER) and v},
    )


def _rows_of_files(config: DataConfig, root: Path, problems: list[str]) -> tuple[dict, dict[str, str]]:
    """The rows of the globs in the settings, or of a table: ({case id: columns}, {role: its origin})."""
    if not root.is_dir():
        raise InputError(f"data.root: {root} is not a folder")
    globs = {role: getattr(config, role) for role in ROLES if getattr(config, role) is not None}
    if globs and config.table:
        raise InputError(f"data.table, data.{min(globs)}: give one of the two")
    if globs and "image" not in globs:
        raise InputError(f"data.image: missing beside data.{min(globs)}")
    if globs:
        if (root / "cases.csv").exists():
            print0(f"note: {root / 'cases.csv'} is not read, data.{min(globs)} names the files")
        return _rows_of_globs(globs, root, problems)
    return _rows_of_table(config.table, root, problems)


def find_cases(config: DataConfig, root: Path, items: Dataset | None = None) -> list[Case]:
    """All cases under `root`, sorted by id; data.subset keeps the first ones. items: a data set whose items
    are the cases instead (items.py).

    InputError if a case lacks a file of a role, if a file has no image to belong to, or if there is no case.
    """
    root, problems = Path(root), []
    rows, origin = _rows_of_files(config, root, problems) if items is None else rows_of_items(items)
    blank = sorted(name for name, row in rows.items() if row.get("subject") == "")
    if blank and not config.subject:
        print0(
            f"note: {len(blank)} of {len(rows)} cases have no subject in {origin['image']}, such as "
            f"{blank[0]}; each of them counts as a subject of its own"
        )
    if items is not None:
        disk, slices = config.cache == "disk", config.slices != "none"
        for name, is_set in {"split": config.split, "slices": slices, "cache": disk}.items():
            if is_set:
                raise InputError(f"data.{name}: is for files, and these are items of a dataset in Python")
    if config.slices != "none" and any(key.startswith(RATER) for row in rows.values() for key in row):
        raise InputError("data.slices: masks of several raters (data.mask) are of whole images alone")
    for column in ("subject", "split"):
        if getattr(config, column) and not (column == "split" and names_run(config)):
            _assign(getattr(config, column), column, rows, root, problems)
    if config.participants:
        _add_participants(root / config.participants, rows)
    cases = [_case(name, row, origin, config, problems) for name, row in sorted(rows.items())]
    raise_all(problems)
    has_split = [case.split is not None for case in cases]
    if any(has_split) and not all(has_split):
        raise InputError(f"case {cases[has_split.index(False)].id}: has no split, other cases have one")
    for key, role in (("series", "image"), ("source_series", "source")):
        files = [path for case in cases if (path := getattr(case, role)) is not None]
        if getattr(config, key) and not any(isinstance(path, Path) and path.is_dir() for path in files):
            raise InputError(f"data.{key}: has no effect, no {role} is a folder of DICOM slices")
    return cases[: config.subset]


# --- the split ----------------------------------------------------------------------------------------------


def _within(subject: str, cases: list[Case], config: DataConfig) -> dict[str, str | None]:
    """{case id: part} for the cases of one subject in the order of their ids, such as the slices of a volume.

    The middle ones are for validation. Their neighbours, data.val_gap on each side, look nearly the same and
    belong to no part. Example: 20 slices, val_fraction 0.2, val_gap 1: slices 8 to 11 validate, 7 and 12 are
    left out, 0 to 6 and 13 to 19 train.
    """
    names = sorted(case.id for case in cases if case.subject == subject)
    count = max(1, round(config.val_fraction * len(names)))
    first = (len(names) - count) // 2
    parts: dict[str, str | None] = dict.fromkeys(names, "train")
    parts |= dict.fromkeys(names[max(0, first - config.val_gap) : first + count + config.val_gap])
    return parts | dict.fromkeys(names[first : first + count], "val")


def names_run(config: DataConfig) -> bool:
    """Is data.split the split.json of another run, or a file like it?"""
    return config.split is not None and Path(config.split).suffix == ".json"


def split_of_run(config: DataConfig, cases: list[Case]) -> dict[str, list[str]]:
    """The split of the run whose split.json data.split names, as a path from the working folder. Only a new
    run reads it: its own split.json is what it goes on with. InputError for a case that is listed twice, but
    for validation on the training cases."""
    _check_used(config, False)
    split = read_split(Path(config.split).expanduser())
    counts = Counter(name for ids in set(map(tuple, split.values())) for name in ids)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"data.split: {config.split} lists case {min(twice)} twice")
    drawn = config.mask_fraction < 1 and not config.allow_missing_mask  # of all cases, see `hide_masks`
    if drawn and {case.id for case in cases} - counts.keys():
        raise InputError(
            f"data.mask_fraction: is of all cases, and {config.split} leaves some out; give 1, which keeps "
            "those that it lists"
        )
    return split


def _check_used(config: DataConfig, of_table: bool) -> None:
    """InputError for a setting of the split that another setting, or the split of the table, replaces."""
    drawing = ("fold", "val_gap", "test_fraction")
    replaced_by = {
        "a split of the table": drawing if of_table else (),
        "the split of a run (data.split)": (*drawing, "test_subjects") if names_run(config) else (),
        "data.fold": ("test_fraction",) if config.fold else (),
        "data.val_gap": ("test_fraction",) if config.val_gap is not None else (),
    }
    for reason, names in replaced_by.items():
        for name in (name for name in names if getattr(config, name) != getattr(DataConfig, name)):
            none = "0" if name == "test_fraction" else "none"
            raise InputError(f"data.{name}: has no effect beside {reason}; leave it out, or give {none}")


def _drawn(cases: list[Case], config: DataConfig, seed: int) -> dict[str, str | None]:
    """{case id: part}, drawn by subject, or within subjects (data.val_gap)."""
    subjects = sorted({case.subject for case in cases} - set(config.test_subjects))
    if config.val_gap is not None:
        return {name: part for subject in subjects for name, part in _within(subject, cases, config).items()}
    n = len(subjects)
    order = torch.randperm(n, generator=keyed_generator(seed, 0, "split")).tolist()
    num_val = num_test = 0
    if config.fold:
        k, folds = config.fold
        order = order[k::folds] + [i for rank, i in enumerate(order) if rank % folds != k]
        num_val = len(range(k, n, folds))
    elif config.val_fraction:
        num_val = max(0, min(max(1, round(config.val_fraction * n)), n - 1))
    if config.test_fraction:
        num_test = max(0, min(max(1, round(config.test_fraction * n)), n - 1 - num_val))
    parts = ["val"] * num_val + ["test"] * num_test + ["train"] * (n - num_val - num_test)
    of_subject = {subjects[i]: part for i, part in zip(order, parts, strict=True)}
    return {case.id: of_subject.get(case.subject) for case in cases}


def _completed(
    cases: list[Case], fixed: dict[str, str | None], config: DataConfig, seed: int
) -> dict[str, str | None]:
    """{case id: part}: the `fixed` parts, and those of the other cases, which follow from them or are drawn.

    A new case of a subject that has fixed cases goes to training if one of them is there, else to validation,
    else to testing. The other new cases are drawn as if they were alone. If none validates then, some
    training subjects do, new ones first.
    """
    of_subject: dict[str, str | None] = {}
    for part in (None, "test", "val", "train"):
        of_subject |= {case.subject: part for case in cases if fixed.get(case.id, "") == part}
    if config.val_gap is not None:  # they may be neighbours of validated ones
        of_subject = dict.fromkeys(of_subject)
    part_of = _drawn([case for case in cases if case.subject not in of_subject], config, seed)
    part_of |= {case.id: of_subject[case.subject] for case in cases if case.subject in of_subject}
    part_of |= {case.id: fixed[case.id] for case in cases if case.id in fixed}
    if "val" not in part_of.values() and (config.val_fraction or config.fold):
        train = {case.subject for case in cases if part_of[case.id] == "train"}
        order = sorted(train - of_subject.keys()) + sorted(train & of_subject.keys())
        count = min(max(1, round(config.val_fraction * len(order))), len(order) - 1)
        part_of |= {case.id: "val" for case in cases if case.subject in order[:count]}
    return part_of


def split_cases(
    cases: list[Case], config: DataConfig, seed: int, fixed: dict[str, str | None] | None = None
) -> dict[str, list[str]]:
    """{"train": ids, "val": ids, "test": ids}: as the table says, else drawn by subject with `seed`.

    A drawn split keeps all cases of a subject together. Each fraction is rounded to whole subjects, but to at
    least one, as long as training is left with one; val_fraction 0 validates on the training cases. data.fold
    (k, n) instead validates on part k of n equal parts, and tests on none. data.val_gap validates within
    subjects. fixed: the part of cases that an earlier split knows, None for those that it left out; they keep
    it, unless the table says another (see `_completed`).
    """
    unknown = set(config.test_subjects) - {case.subject for case in cases}
    if unknown and not fixed:  # with fixed parts they may be subjects of that other data
        raise InputError(f"data.test_subjects: no case is of subject {min(unknown)}")
    of_table = bool(cases) and cases[0].split is not None
    _check_used(config, of_table)
    if of_table:
        part_of = {case.id: case.split for case in cases}
    elif fixed:
        part_of = _completed(cases, fixed, config, seed)
    else:
        part_of = _drawn(cases, config, seed)
    part_of |= {case.id: "test" for case in cases if case.subject in config.test_subjects}
    split = {part: [case.id for case in cases if part_of.get(case.id) == part] for part in SPLITS}
    if not config.val_fraction and not config.fold and not split["val"]:
        split["val"] = split["train"]
        print0("note: data.val_fraction is 0, so validation is on the training cases")
    for part, what in (("train", "train"), ("val", "validate")):
        if not split[part]:
            raise InputError(
                f"the split of {len(cases)} cases leaves none to {what} on (one subject? --data.subject)"
            )
    return split


def listed_cases(cases: list[Case], listed: set[str], root: Path) -> list[Case]:
    """The cases that a stored split lists. InputError if one of them is not below `root` any more."""
    if gone := sorted(listed - {case.id for case in cases}):
        raise InputError(f"{root}: case {gone[0]} of the stored split is missing ({len(gone)} in all)")
    return [case for case in cases if case.id in listed]
