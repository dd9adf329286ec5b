"""Images opened for a trained run: its own cases, or any other files, read and scaled as in training.

`open_images` opens whole sets for an autoencoder or a segmentation network: `open_images(content)` the run's
own cases, `open_images(content, FOLDER)` all images there. `open_files` opens the few files that a sample is
conditioned on. `content` is always what the run's checkpoint holds.

Which files of a folder are images, and which are their masks? As the run's training data say, where the
folder is laid out like these, or holds files that are named like these; else as layouts.py recognises it,
which planned the training. A folder that simply holds images, such as one of samples, needs neither.
Example: after a training on images/*_T1w.nii.gz the file scans/p01_T1w.nii.gz is case "p01" of scans/.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import InputError, from_dict
from ..engine.distributed import print0
from .cases import (
    Case,
    files_by_id,
    files_by_rater,
    find_cases,
    listed_cases,
    masks_among,
    pattern_of_names,
    resolve_root,
)
from .dataset import VolumeDataset
from .inspection import MAX_LABEL, inspect_cases
from .itk import is_dicom_folder
from .layouts import MASK_NAMES, dimensions, recognise
from .opening import check_files, inspection_cache
from .settings import DataConfig
from .slices import slice_cases
from .spec import DataSpec
from .transforms import AugmentConfig
from .volumes import (
    PICTURE,
    SUFFIXES,
    check_file,
    file_name,
    is_volume_file,
    read_header,
    strip_suffix,
    volume_suffix,
)

# --- where images are ---------------------------------------------------------------------------------------


def own_images(folder: Path) -> str | None:
    """The pattern of the image files in the folder itself, all of one kind, or of the folders of DICOM slices
    in it; None: it holds none."""
    found = {volume_suffix(p) for p in folder.iterdir() if is_volume_file(p)}
    suffixes = [end for end in SUFFIXES if end in found]
    others = [end for end in suffixes[1:] if end not in PICTURE]  # pictures beside volumes are previews
    if others:
        print0(f"note: of {folder} the {suffixes[0]} files are taken, not those in {', '.join(others)}")
    if all(end in PICTURE for end in suffixes) and any(map(is_dicom_folder, folder.iterdir())):
        return "*/"
    return f"*{suffixes[0]}" if suffixes else None


def locate(location: str | Path) -> tuple[Path, str | None]:
    """A glob, "FOLDER/*/t1.nii.gz", as (root, pattern of the images below it). A folder has no pattern."""
    path = Path(location).expanduser()
    if os.path.isdir(path):  # Path.is_dir raises for names that are too long
        return path, None
    wild = next((i for i, part in enumerate(path.parts) if "*" in part or "?" in part), None)
    root = Path(*path.parts[:wild]) if wild is not None else path
    if wild is not None and os.path.isdir(root):
        return root, str(Path(*path.parts[wild:]))
    if os.path.isfile(path):
        raise InputError(f"{location}: a file, expected a folder or a pattern in quotes")
    raise InputError(f"{root}: no such folder")


def _named_as(pattern: str | None, folder: Path) -> dict[str, Path]:
    """{case id: file} of the files in this very folder that are named as a pattern of the training data has
    it; {} if there are none."""
    name = pattern_of_names(pattern) if pattern else None
    if name is None or "{rater}" in name:
        return {}
    with contextlib.suppress(InputError):
        return files_by_id(name, folder, "data.image")
    return {}


def find_images(
    location: str | Path, layout: DataConfig, subject: str | None = None
) -> tuple[DataConfig, list[Case]]:
    """The images in a folder or glob, or one file, or the folder of the slices of one DICOM volume: (how they
    are read, cases without masks and sources).

    layout: how the run's training data is read and laid out. Its rule of subjects is used where it fits;
    `subject`, a rule for these images, has to fit. Samples of a run hold the run's channels only, so no
    channels are picked from them.
    """
    layout = replace(layout, cache="none", source=None, split=None, participants=None)
    layout = replace(layout, allow_missing_mask=True)
    series, layout = layout.series, replace(layout, series=None, source_series=None)
    path = Path(location).expanduser()
    if os.path.isfile(path) or (layout.dims == 3 and is_dicom_folder(path)):
        named = (name for name, file in _named_as(layout.image, path.parent).items() if file == path)
        name = next(named, strip_suffix(path))
        root, cases = path.parent, [Case(name, path, subject=name)]
    else:
        root, pattern = locate(location)
        try:
            if pattern is None:
                layout, cases = _find_in_folder(layout, root, subject)
            else:
                layout = replace(layout, image=pattern, table=None)
                cases = _find(layout, root, subject)
        except InputError as e:
            raise InputError(f"{location}: {e}") from e
    layout = replace(layout, root=str(root), subject=None, mask=None)
    if series and cases[0].image.is_dir():
        layout = _with_series(layout, cases[0].image, series)
    cases = [case.image_alone() for case in cases]
    if layout.slices != "none" and dimensions(cases[0].image, layout.series) == 2:
        layout = replace(layout, slices="none")  # such as samples of a run that was trained on slices
    cases = slice_cases(cases, layout)
    return _with_own_channels(layout, cases[0].image), cases


def _find(layout: DataConfig, root: Path, subject: str | None) -> list[Case]:
    """The images in a folder, without those that are masks of others by the pattern of the masks."""
    masks: dict[str, dict[str, Path]] = {}
    with contextlib.suppress(InputError):  # there need not be any here
        masks = files_by_rater(layout.mask, root, "data.mask") if layout.mask else {}
    cases = _find_all(replace(layout, mask=None), root, subject)
    others = masks_among({case.id: case.image for case in cases}, masks)
    return [case for case in cases if case.id not in others]


def _find_all(layout: DataConfig, root: Path, subject: str | None) -> list[Case]:
    """The cases in a folder. The run's rule of subjects holds where it fits."""
    rules = [layout.subject] if subject is None and layout.subject is not None else []
    if rules and layout.subject.endswith(".csv"):  # such a table may lie beside the folder of images
        rules.append(f"../{layout.subject}")
    for rule in rules:
        with contextlib.suppress(InputError):  # the run's rule of subjects need not fit another folder
            return find_cases(replace(layout, subject=rule), root)
    return find_cases(replace(layout, subject=subject), root)


def _find_in_folder(layout: DataConfig, root: Path, subject: str | None) -> tuple[DataConfig, list[Case]]:
    """(how they are read, the images of a folder): those in the folder itself, else those in its subfolders.

    The training data may have lain in their folder itself, beside their masks; then this one is read like
    them. Otherwise the folders of their pattern are left out, or "*/*.nii.gz" would find labels/ beside
    samples, and the files named like theirs are taken: "*_T1w.nii.gz" of "images/*_T1w.nii.gz". Files of
    other names are all taken.
    """
    own = own_images(root)
    beside = layout.image is None or "/" not in layout.image
    preview = volume_suffix(own or "") in PICTURE and volume_suffix(layout.image or "") not in PICTURE
    if own is None or beside or preview:
        try:
            return layout, _find(layout, root, subject)
        except InputError as e:
            hint = f"a pattern in quotes names them, such as '{root}/*/t1.nii.gz'"
            why = f"holds no images, and is not laid out like the training data: {e}; {hint}"
    if own is not None:
        named = _named_as(layout.image, root)
        read = replace(layout, image=pattern_of_names(layout.image) if named else own, table=None)
        cases = _find(read, root, subject)
        if named and (others := len(files_by_id(own, root, "data.image")) - len(named)) > 0:
            words = f"the images are {read.image}, as in training; other images there: {others}"
            print0(f"note: in {root} {words}")
        if not 0 < len(masks := [case.id for case in cases if MASK_NAMES.search(case.id)]) < len(cases):
            return read, cases
        why = (
            f"images and masks, such as {masks[0]}, lie in one folder; list the images in a cases.csv there "
            f"(column image), or give their pattern in quotes, such as '{root}/*_t1{volume_suffix(own)}'"
        )
    try:
        layout = _recognised(layout, root)
        cases = _find(layout, root, subject)
    except InputError:
        raise InputError(why) from None
    print0(f"note: in {root} the images are {layout.image or f'listed in {layout.table}'}")
    return layout, cases


def _recognised(layout: DataConfig, root: Path) -> DataConfig:
    """How the files of a folder are read that is not laid out like the training data."""
    found = recognise(root).settings
    return replace(layout, **{role: found.get(role) for role in ("image", "mask", "table", "subject")})


def _with_series(layout: DataConfig, image: Path, series: str) -> DataConfig:
    """The layout with the run's choice of a DICOM series, if the image has such a series. Other folders name
    their series otherwise, and one that holds a single series needs no choice."""
    try:
        read_header(image, dims=layout.dims, series=series)
    except InputError:
        return layout
    return replace(layout, series=series)


def _with_own_channels(layout: DataConfig, image: Path) -> DataConfig:
    """The layout without a choice of channels if the file has as many as are chosen, but not those numbers.

    For example a run with `channel=(1,)` writes samples of one channel, which have no channel 1.
    """
    if layout.channel:
        options = {"spacing": layout.file_spacing, "dims": layout.dims, "series": layout.series}
        channels = read_header(image, **options).channels
        if channels == len(layout.channel) <= max(layout.channel):
            return replace(layout, channel=())
    return layout


def _names_of(content: dict[str, Any], part: str) -> set[str]:
    """The ids of a part of a run's stored split, see `own_cases`. InputError if there are none."""
    split = content["state"]["split"]
    parts = {"all": list(split), "held-out": [p for p in split if p != "train"]}.get(part, [part])
    names = {name for p in parts for name in split.get(p, ())}
    if not names:
        raise InputError(f"part: the run has no {part} cases")
    return names


def own_cases(
    content: dict[str, Any], part: str = "all", subject: str | None = None
) -> tuple[DataConfig, list[Case]]:
    """The cases of a run's stored split: (how they are read, cases without masks and sources).

    part: "train", "val" or "test"; "all": every part; "held-out": all that were not trained on. subject: rule
    of the subjects instead of the run's. InputError if there are no cases, or if one is not on the disk any
    more.
    """
    check_files(content)
    layout = from_dict(DataConfig, content["config"]["data"], "data")
    root, listed = resolve_root(layout, content["config"]["preset"]), _names_of(content, part)
    layout = replace(layout, root=str(root), cache="none", subset=None, allow_missing_mask=True)
    layout = replace(layout, subject=subject or layout.subject)
    cases = [case.image_alone() for case in find_cases(layout, root)]
    return layout, listed_cases(slice_cases(cases, layout), listed, root)


def with_references(cases: list[Case], folder: Path, layout: DataConfig) -> list[Case]:
    """The cases with their label maps: those that belong to these very images where `folder` holds images and
    masks, else the files of `folder` named like the image, like the masks in training, or like the case.
    layout: of the training data."""
    if not os.path.isdir(folder):
        raise InputError(f"reference: {folder} is not a folder")
    files = {strip_suffix(path): path for path in sorted(folder.iterdir()) if is_volume_file(path)}
    masks, drawn, found = _masks_in(folder, layout), _named_as(layout.mask, folder), []
    for case in cases:
        image = case.image.resolve()
        named = [] if case.volume else [files.get(strip_suffix(case.image)), drawn.get(case.id)]
        named += [files.get(file_name(case.id)), masks.get(case.id)]
        named = [path for path in named if path is not None and path.resolve() != image]
        if (path := masks.get(image) or next(iter(named), None)) is None:
            names = {strip_suffix(case.image), file_name(case.id)}
            if sum(name.rpartition("__")[0] in names for name in files) > 1:  # ID__RATER
                raise _several_raters(folder)
            raise InputError(
                f"reference: {folder} holds no label map of {case.image}, and none named like it; if the run "
                "was trained on both, give its data folder as images and as --reference"
            )
        found.append(replace(case, mask=path))
    return found


def _several_raters(folder: Path) -> InputError:
    return InputError(
        f"reference: {folder} has masks of several raters; --every_vote or --level_sets, and then "
        "`python -m ldm3d.evaluation raters`, compares with all of them"
    )


def _masks_in(folder: Path, layout: DataConfig) -> dict[str | Path, Path]:
    """{case id, and path of the image: mask} of a folder that is laid out like the training data, or whose
    images and masks can be told apart; {} of others, such as a folder of label maps alone."""
    own = dict.fromkeys(("source", "subject", "split", "participants", "series", "source_series", "subset"))
    layout = replace(layout, cache="none", allow_missing_mask=True, **own)
    for read in (lambda: layout, lambda: _recognised(layout, folder)):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what is said of the images, they say themselves
                found = slice_cases(find_cases(read(), folder), layout)
        except InputError:
            continue
        if any(case.raters for case in found):
            raise _several_raters(folder)
        if masks := [(key, c.mask) for c in found if c.mask for key in (c.id, c.image.resolve())]:
            return dict(masks)
    return {}


# --- opened -------------------------------------------------------------------------------------------------


def open_images(
    content: dict[str, Any],
    location: str | Path | None = None,
    part: str = "all",
    references: str | Path | None = None,
    subject: str | None = None,
    max_cases: int | None = None,
    own_size: bool = True,
) -> VolumeDataset:
    """Images for the network whose checkpoint is `content`, read and scaled as in training.

    location: folder, glob or file; None opens the run's own cases. part: only these cases of the run's split,
    see `own_cases`. references: folder of label maps, see `with_references`; items then hold them as "mask".
    subject: rule of the subjects instead of the run's. own_size: every case at its own size, else at the size
    of the run's samples. InputError names the file that is missing or does not fit.
    """
    cache = None
    if location is None:
        layout, cases = own_cases(content, part, subject)
        cache = inspection_cache(layout, Path(layout.root))
    else:
        layout = from_dict(DataConfig, content["config"]["data"], "data")
        layout, cases = find_images(location, replace(layout, subset=None), subject)
        if part != "all":
            names = _names_of(content, part)
            cases = [case for case in cases if case.id in names]
            if not cases:
                raise InputError(
                    f"part: {location} holds none of the run's {part} cases, such as {min(names)}; "
                    "the folder that was trained on has them"
                )
    cases = cases[:max_cases]
    spec = DataSpec.from_dict(content["state"]["data"])
    if references is not None:
        trained = from_dict(DataConfig, content["config"]["data"], "data")
        cases = with_references(cases, Path(references), trained)
    if not layout.label_values:
        layout = replace(layout, num_labels=spec.num_labels)
    infos = inspect_cases(cases, layout, cache)
    channels = infos[cases[0].id].channels
    if channels != spec.channels:
        raise InputError(
            f"{cases[0].image}: has {channels} channels, the model was trained on {spec.channels}"
        )
    spec = replace(spec, source_channels=0, num_labels=spec.num_labels if references is not None else None)
    return VolumeDataset(cases, infos, spec, layout, own_size=own_size)


def open_files(paths: Sequence[str | Path], role: str, config: DataConfig, spec: DataSpec) -> VolumeDataset:
    """Single files, read, scaled and centred as those of a role in training; every one a case.

    Items hold "image" (roles image and source) or "mask". A "region" is a mask of any labels. Intensities are
    scaled by the file's own numbers. With paired_scaling "shared" a source is scaled by the numbers of its
    image, which is not known here: the median numbers of the training set serve instead.
    """
    if role == "region":
        role, config = "mask", replace(config, label_values=())
        spec = replace(spec, num_labels=MAX_LABEL + 1)
    options = {
        "channel": {"image": config.channel, "source": config.source_channel}.get(role, ()),
        "series": None,
        "slices": "none",
        "source_series": None,
        "mask": None,
        "source": None,
        "cache": "none",
        "augment": AugmentConfig(),
        "paired_scaling": "separate",
    }
    if role == "mask":
        options["num_labels"] = spec.num_labels
    if role == "source":
        spec = replace(spec, channels=spec.source_channels, low=spec.source_low, high=spec.source_high)
    paths = [Path(path) for path in paths]
    for path in paths:
        check_file(path)
    cases = [
        Case(f"{i}_{strip_suffix(path)}", path, mask=path if role == "mask" else None)
        for i, path in enumerate(paths)
    ]
    shared = role == "source" and config.paired_scaling == "shared"
    series = {"image": config.series, "source": config.source_series}.get(role)
    config = replace(config, **options, scaling="none" if role == "mask" else config.scaling)
    if series and paths[0].is_dir():
        config = _with_series(config, paths[0], series)
    infos = inspect_cases(cases, config)
    for case in cases:
        info = infos[case.id]
        if role != "mask" and info.channels != spec.channels:
            raise InputError(f"{case.image}: has {info.channels} channels, the model wants {spec.channels}")
        infos[case.id] = replace(info, low=spec.low, high=spec.high) if shared else info
    spec = replace(spec, source_channels=0, num_labels=spec.num_labels if role == "mask" else None)
    return VolumeDataset(cases, infos, spec, config)
