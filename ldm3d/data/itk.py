"""What SimpleITK reads (extra `formats`): DICOM series, NRRD and MetaImage.

A DICOM volume is a folder: every file holds one slice, and says where in the world its first voxel lies
(ImagePositionPatient) and which way its rows and columns run (ImageOrientationPatient). The names of the
files mean nothing. The slices are sorted by their position along the normal of the plane, and the affine is
that of the positions themselves,

    world(i, j, k) = position_0 + i * dx * row + j * dy * column + k * (position_last - position_0) / (n - 1)

so a tilted gantry, whose slices are shifted against each other, gives a sheared affine and true positions.
The values are those of the modality, slope and intercept applied slice by slice, such as HU.

Refused by name, since one array with one affine would be wrong: slices with gaps, of different orientation or
size, two slices at one place (a series in time), several series in a folder where none is chosen, and files
of many frames. `dcm2niix` converts what is refused here.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import InputError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK and DICOM count to the left and to the back
POSITION, ORIENTATION, FRAMES, PHOTOMETRIC = "0020|0032", "0020|0037", "0028|0008", "0028|0004"
MODALITY = "0008|0060"
SPACINGS = ("0028|0030", "0018|1164")  # of pixels: in the patient; on the detector, as radiographs have it
DESCRIPTION, NUMBER, UID = "0008|103e", "0020|0011", "0020|000e"  # of the series
NO_IMAGE = (
    re.compile(  # the kind of a file of reports, contours, ...: tag, length, and the beginning of a UID
        rb"\x02\x00\x02\x00UI..1\.2\.840\.10008\.5\.1\.4\.1\.1\.(11|66|67|88|104|481)\b", re.S
    )
)
FIRST = 32  # files of a folder that are looked at to know what it holds
UNEVEN = 0.1  # part of the slice distance by which a slice may lie off the even grid: positions are rounded


class SeveralSeries(InputError):
    """A folder holds several DICOM series, and none is chosen."""


class Grid(NamedTuple):
    """A file of which only the header was read. Axes: (x, y[, z]) as stored, or (row, column) of a picture
    that says nothing of a patient, which has a 3 x 3 affine or none."""

    channels: int
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray | None  # voxel index -> mm, RAS+
    load: Callable[[], np.ndarray]  # (*shape, C); x, y and z, or row and column


class Slice(NamedTuple):
    """The header of one DICOM file."""

    path: str
    size: tuple[int, int]  # (columns, rows)
    channels: int
    dtype: np.dtype  # after slope and intercept
    pixel: tuple[float, float] | None  # mm along a row, along a column; None: not stated
    depth: float  # mm, the thickness; 1 where it is not stated
    cosines: np.ndarray | None  # (3, 2) the directions of row and column, LPS; None: not stated
    position: np.ndarray  # (3,) mm, LPS


def sitk(path: str | Path) -> Any:
    """The module SimpleITK. InputError that names the extra if it is not installed."""
    try:
        import SimpleITK
    except ImportError as error:
        also = "; dcm2niix makes NIfTI of DICOM" if os.path.isdir(path) or str(path).endswith(".dcm") else ""
        raise InputError(
            f"{path}: DICOM, NRRD and MetaImage need SimpleITK; pip install 'ldm3d[formats]'{also}"
        ) from error
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()  # what matters is checked here
    return SimpleITK


def _information(path: str, dicom: bool) -> Any:
    """SimpleITK's reader after it has read the header."""
    reader = sitk(path).ImageFileReader()
    if dicom:
        reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    return reader


def _reason(error: RuntimeError) -> str:
    """The last line of an error of ITK: the others say in which of its source files it was raised."""
    line = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    return re.sub(r"^\w+\(0x\w+\): ", "", line.rpartition("ERROR: ")[2])


def _dtype(reader: Any, path: str) -> np.dtype:
    module = sitk(path)
    kind = reader.GetPixelID()
    if kind == module.sitkUnknown or "complex" in module.GetPixelIDValueAsString(kind):
        raise InputError(f"{path}: voxels of type {module.GetPixelIDValueAsString(kind)}, expected numbers")
    return module.GetArrayViewFromImage(module.Image([1, 1], kind, reader.GetNumberOfComponents())).dtype


def _voxels(reader: Any, channels: int) -> np.ndarray:
    """The voxels (..., row, column, C), in the order of ITK's arrays: the last spatial axis is x."""
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"cannot read {reader.GetFileName()}: {_reason(error)}") from error
    array = sitk(reader.GetFileName()).GetArrayFromImage(image)
    return array if channels > 1 else array[..., None]


# --- DICOM --------------------------------------------------------------------------------------------------


def is_dicom_file(path: str | Path) -> bool:
    """Does the file begin as DICOM files do? A DICOMDIR, which lists files, does not count."""
    if os.path.basename(path).upper() == "DICOMDIR":
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(path: str | Path) -> bool:
    """Is the path a folder that holds slices? The first files tell, for a folder may be large."""
    try:
        with os.scandir(path) as entries:
            files = (e.path for e in entries if not e.name.startswith(".") and e.is_file())
            return any(map(is_dicom_file, itertools.islice(files, FIRST)))
    except (OSError, ValueError):  # ValueError: no path can have this name
        return False


def _dicom_files(folder: str | Path) -> Iterator[str]:
    """The DICOM files of a folder, in the order of their names."""
    names = (name for name in sorted(os.listdir(folder)) if not name.startswith("."))
    return filter(is_dicom_file, (os.path.join(folder, name) for name in names))


def is_series_folder(path: str | Path) -> bool:
    """Are most of the first DICOM files of the folder slices of a series, of one or of several? Radiographs
    are not: each is a series of its own. A scout may lie beside the slices."""
    if not is_dicom_folder(path):
        return False
    images = (file for file in _dicom_files(path) if not _holds_no_image(file))
    counts: Counter[str] = Counter()
    for file in itertools.islice(images, FIRST):
        counts[_text(_information(file, dicom=True), UID)] += 1
        alone = sum(num == 1 for num in counts.values())
        if counts.total() >= 2 and 2 * alone < counts.total():
            return True
    return False


def modality(path: str | Path) -> str:
    """What a DICOM file or folder says it was made with, such as "CT"; "" for other files."""
    if os.path.isdir(path):
        path = next(_dicom_files(path), "")
    return _text(_information(str(path), dicom=True), MODALITY) if is_dicom_file(path) else ""


def _text(reader: Any, key: str) -> str:
    value = reader.GetMetaData(key) if reader.HasMetaDataKey(key) else ""
    return value.encode(errors="replace").decode().strip(" \0")


def _slice(reader: Any) -> Slice:
    """The header of one DICOM file, of its reader. InputError for files of many frames."""
    path, size, spacing = reader.GetFileName(), reader.GetSize(), reader.GetSpacing()
    frames = max(int(_text(reader, FRAMES) or 1), *size[2:], 1)
    if frames > 1:
        raise InputError(f"{path}: {frames} frames in one file are not read; dcm2niix makes NIfTI of them")
    rescaled = any(
        float(_text(reader, key) or usual) != usual for key, usual in (("0028|1052", 0), ("0028|1053", 1))
    )
    if _text(reader, PHOTOMETRIC) == "MONOCHROME1" and rescaled:  # ITK would invert what it then rescales
        raise InputError(f"{path}: MONOCHROME1 with a slope or intercept; dcm2niix makes NIfTI of it")
    stated = any(_text(reader, key) for key in SPACINGS) or tuple(spacing[:2]) != (1.0, 1.0)
    placed = bool(_text(reader, POSITION)) and bool(_text(reader, ORIENTATION))
    return Slice(
        path,
        tuple(size[:2]),
        reader.GetNumberOfComponents(),
        _dtype(reader, path),
        tuple(spacing[:2]) if stated else None,
        spacing[2] if len(spacing) > 2 else 1.0,
        np.reshape(reader.GetDirection(), (3, 3))[:, :2] if placed else None,
        np.array(reader.GetOrigin()),
    )


def _holds_no_image(path: str) -> bool:
    """Is this a DICOM file of another kind, such as a report? The kind stands near its beginning."""
    with open(path, "rb") as file:
        return bool(NO_IMAGE.search(file.read(2**10)))


def _series_of(folder: Path, series: str | None) -> list[Slice]:
    """The slices of the one series in the folder, or of the chosen one: by number, description or UID.

    Every file is opened. A list of the files that can be read would be shorter by those that are damaged.
    """
    found: dict[str, list[Slice]] = {}  # by UID
    names: dict[str, tuple[str, str, str]] = {}
    for file in _dicom_files(folder):
        if _holds_no_image(file):
            continue
        reader = _information(file, dicom=True)
        uid = _text(reader, UID)
        names.setdefault(uid, (_text(reader, NUMBER), _text(reader, DESCRIPTION), uid))
        found.setdefault(uid, []).append(_slice(reader))
    if not found:
        raise InputError(f"{folder}: its DICOM files hold no images")
    chosen = [uid for uid in found if series is None or series.lower() in map(str.lower, names[uid])]
    if len(chosen) == 1:
        return found[chosen[0]]
    listed = ", ".join(
        f"{number or '-'} {description or uid!r} ({len(found[uid])} files)"
        for number, description, uid in sorted(names.values())
    )
    if series is None:
        raise SeveralSeries(f"{folder}: holds {len(found)} series; choose one with --data.series: {listed}")
    raise InputError(f"{folder}: {len(chosen) or 'no'} series {series!r} (data.series), it holds {listed}")


def _sorted_slices(slices: list[Slice], folder: Path) -> list[Slice]:
    """The slices in the order of their positions, after a check that they make one even grid."""
    first = slices[0]
    for other in slices[1:]:
        if (other.size, other.channels) != (first.size, first.channels):
            raise InputError(
                f"{other.path}: {other.size} pixels, {first.path} has {first.size}; is it another series?"
            )
        if not np.allclose(other.pixel or 1, first.pixel or 1, rtol=1e-4):
            raise InputError(f"{other.path}: pixels of {other.pixel} mm, {first.path} has {first.pixel}")
        if other.cosines is None or first.cosines is None:
            lacking = other if other.cosines is None else first
            raise InputError(f"{lacking.path}: states no position, so the slices of {folder} have no order")
        if np.abs(other.cosines - first.cosines).max() > 1e-3:
            raise InputError(
                f"{other.path}: runs in another direction than {first.path}; is it another series?"
            )
    normal = np.cross(*first.cosines.T)
    ordered = sorted(slices, key=lambda s: (float(s.position @ normal), s.path))
    positions = np.array([s.position for s in ordered])
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    if (closest := int(gaps.argmin())) >= 0 and gaps[closest] < 1e-3:
        a, b = (os.path.basename(s.path) for s in ordered[closest : closest + 2])
        raise InputError(
            f"{folder}: {a} and {b} lie at the same place; a series in time? dcm2niix makes NIfTI of it"
        )
    line = np.linspace(positions[0], positions[-1], len(positions))
    if np.linalg.norm(positions - line, axis=1).max() > UNEVEN * usual:
        worst = int(np.abs(gaps - usual).argmax())
        a, b = (os.path.basename(s.path) for s in ordered[worst : worst + 2])
        raise InputError(
            f"{folder}: its slices are not evenly spaced: {a} and {b} lie {gaps[worst]:.4g} mm apart, others "
            f"{usual:.4g} mm; is a slice missing?"
        )
    return ordered


def open_dicom(path: Path, series: str | None = None) -> Grid:
    """A series of slices, the path being their folder, or one file. Voxels are not read."""
    if os.path.isdir(path):
        slices = _series_of(path, series)
    else:
        slices = [_slice(_information(str(path), dicom=True))]
    slices = _sorted_slices(slices, path) if len(slices) > 1 else slices
    first, last = slices[0], slices[-1]
    dtype = np.result_type(*(s.dtype for s in slices))  # slope and intercept may differ between slices

    def load() -> np.ndarray:
        planes = [_voxels(_information(s.path, dicom=True), s.channels) for s in slices]
        planes = [plane.reshape(*s.size[::-1], s.channels) for plane, s in zip(planes, slices, strict=True)]
        if first.cosines is None:
            return planes[0]  # (row, column, C)
        volume = np.stack(planes, dtype=dtype, casting="unsafe").transpose(2, 1, 0, 3)  # (x, y, z, C)
        return volume if len(slices) > 1 else volume[:, :, 0]

    columns, rows = first.size
    if first.cosines is None:
        affine = None if first.pixel is None else np.diag([*first.pixel[::-1], 1.0])
        return Grid(first.channels, (rows, columns), dtype, affine, load)
    affine = np.eye(4)
    affine[:3, :2] = first.cosines * (first.pixel or (1.0, 1.0))
    if len(slices) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    else:
        affine[:3, 2] = np.cross(*first.cosines.T) * first.depth
    affine[:3, 3] = first.position
    shape = (columns, rows, len(slices)) if len(slices) > 1 else (columns, rows)
    return Grid(first.channels, shape, dtype, LPS_TO_RAS @ affine, load)


# --- NRRD and MetaImage -------------------------------------------------------------------------------------


def open_itk(path: Path) -> Grid:
    """A NRRD or MetaImage of 2, 3 or 4 dimensions; the last of 4 are channels. Voxels are not read."""
    reader = _information(str(path), dicom=False)
    size, dims = reader.GetSize(), reader.GetDimension()
    components = reader.GetNumberOfComponents()
    if dims not in (2, 3, 4) or (dims == 4 and components > 1):
        raise InputError(f"{path}: shape {size}, expected 2-D, 3-D or 4-D (the last axis = channels)")
    channels = size[3] if dims == 4 else components
    spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())

    def load() -> np.ndarray:
        array = _voxels(reader, components)  # (..., row, column, components)
        if dims == 2:
            return array
        array = array.transpose(*reversed(range(dims)), dims)  # (x, y, z[, t], components)
        return array.reshape(*size[:3], channels)

    if dims == 2:
        return Grid(channels, size[::-1], _dtype(reader, str(path)), np.diag([*spacing[::-1], 1.0]), load)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (dims, dims))[:3, :3] * spacing[:3]
    affine[:3, 3] = origin[:3]
    return Grid(channels, size[:3], _dtype(reader, str(path)), LPS_TO_RAS @ affine, load)
