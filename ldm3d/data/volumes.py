"""Files <-> arrays with a true affine: NIfTI, TIFF, NumPy, PNG and JPEG, DICOM, NRRD and MetaImage.

`read` gives a `Volume`: an array (C, *S), and the affine that puts its voxels into the world, in mm. The
centre of the voxel with index (i, j, k) lies at

    world = affine[:-1, :-1] @ index + affine[:-1, -1]        (4 x 4 in 3-D, 3 x 3 over (row, column) in 2-D)

What the axes *S = (D, H, W) are depends on the format:

    NIfTI, DICOM, NRRD, MetaImage   D to the patient's right, H to the front, W to the head (RAS+)
    TIFF                            D the pages, H the rows, W the columns
    NumPy, pictures                 as they are stored

NIfTI files store their axes in any order and direction, named by three letters. `read` permutes and flips
the axes to the nearest RAS+ order, `write` turns them back to the order of the file, and between the two
nothing but augmentation exchanges axes. Examples: 512 x 512 x 90 voxels in the order "LPS" become an array
(1, 512, 512, 90) with the first two axes flipped; 256 x 256 x 180 in the order "PSR" become an array
(1, 180, 256, 256) with H flipped.

A DICOM volume is a folder that holds its slices (itk.py): wherever a path names a file, it may name such a
folder. A format is one row of `FORMATS`: a function that opens a file, and one that writes it if the format
can be written. A TIFF written here keeps its affine in the image description. Left out: the spacing of
OME-XML.
"""

import gzip
import hashlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import nibabel as nib
import numpy as np
import tifffile
from nibabel.arrayproxy import ArrayProxy
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from ..config import InputError
from .itk import Grid, is_dicom_folder, open_dicom, open_itk

NIFTI, TIFF = (".nii.gz", ".nii"), (".tiff", ".tif")
NUMPY, PICTURE = (".npy", ".npz"), (".png", ".jpg", ".jpeg")
DICOM, ITK = (".dcm",), (".nrrd", ".nhdr", ".mha", ".mhd")
FLOAT = np.dtype(np.float32)  # of intensities
PLANES = 16  # across the first axis, converted at a time
SCREEN_DPI = {72, 96}  # what programs write as the resolution of a TIFF where they know none
MM_PER_UNIT = {"mm": 1.0, "meter": 1e3, "micron": 1e-3, "cm": 10.0, "um": 1e-3, "µm": 1e-3, "inch": 25.4}


@dataclass(frozen=True)
class Volume:
    """Voxels, and the affine that says where in the world (mm) they lie."""

    array: np.ndarray  # (C, *S)
    affine: np.ndarray  # (dims + 1, dims + 1) float64, voxel index -> mm
    orientation: str | None = None  # axis codes of the file, for `write` to restore: "LPS"; one slice: "LA"

    def __post_init__(self) -> None:
        assert self.array.ndim == self.affine.shape[0], (self.array.shape, self.affine.shape)

    @property
    def dims(self) -> int:
        return self.affine.shape[0] - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape *S."""
        return self.array.shape[1:]

    @property
    def channels(self) -> int:
        return self.array.shape[0]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along each axis, mm."""
        return affine_spacing(self.affine)


@dataclass(frozen=True)
class Header:
    """What a file says about its volume, in canonical axes and with the chosen channels only."""

    shape: tuple[int, ...]  # *S
    channels: int
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray  # (dims + 1, dims + 1) float64
    orientation: str | None
    dtype: np.dtype  # of the values: as stored, or floats where the file states a slope
    palette: bool = False  # the values are indices of a table of colours, and no intensities
    stored: np.dtype = FLOAT  # of the voxels of `read_stored`
    slope_inter: tuple[float, float] = (1.0, 0.0)  # value = stored * slope + inter, see `values_of`


class OpenedFile(NamedTuple):
    """A file of which only the header was read. `load((2, 0))` reads channels 2 and 0, as (2, *shape)."""

    channels: int
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray | None  # None: the file states none
    orientation: str | None
    load: Callable[[tuple[int, ...]], np.ndarray]
    palette: bool = False
    slope_inter: tuple[float, float] = (1.0, 0.0)  # still to be applied to what `load` reads


class NoFile:
    """What stands where the path of a file does, and is none: a volume in memory (items.py)."""

    def open(self, dims: int | None) -> OpenedFile:
        """What the `open` of a format gives for a file."""
        raise NotImplementedError


# --- affines ------------------------------------------------------------------------------------------------


def affine_spacing(affine: np.ndarray) -> tuple[float, ...]:
    """The size of a voxel along each axis, mm: the lengths of the affine's columns."""
    return tuple(float(length) for length in np.linalg.norm(affine[:-1, :-1], axis=0))


def spacing_affine(spacing: tuple[float, ...]) -> np.ndarray:
    """The affine of axis-parallel voxels of this size, mm, with voxel 0 at the origin."""
    return np.diag([*map(float, spacing), 1.0])


def centred_affine(shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """`spacing_affine` with the middle of the grid, and not its voxel 0, at the origin."""
    affine = spacing_affine(spacing)
    affine[:-1, -1] = [-(n - 1) / 2 * mm for n, mm in zip(shape, spacing, strict=True)]
    return affine


# --- formats: read ------------------------------------------------------------------------------------------


@contextmanager
def _logged(library: str) -> Iterator[list[logging.LogRecord]]:
    """What a library logs in this thread within the block. It is kept here and not printed."""
    records: list[logging.LogRecord] = []
    logger, thread = logging.getLogger(library), threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            records.append(record)
        return record.thread != thread

    logger.addFilter(keep)
    try:
        yield records
    finally:
        logger.removeFilter(keep)


def _load_nifti(load: Callable, source: Any, path: Path) -> Any:
    """nibabel's load(source). InputError where nibabel only logs that it has mended a damaged header."""
    with _logged("nibabel.global") as records:
        image = load(source)
    said = " ".join(record.getMessage() for record in records)
    sized = not isinstance(image, nib.Nifti1Pair) or image.ndim < 3 or image.header["sform_code"] > 0
    if "sizeof_hdr" in said or ("should be non-zero" in said and not sized):
        raise InputError(f"{path}: its header is damaged ({said})")
    return image


def _check_affine(affine: np.ndarray, path: Path) -> None:
    """InputError for an affine that collapses an axis, or is not finite."""
    lengths = np.array(affine_spacing(affine))
    finite = np.isfinite(affine).all() and np.isfinite(lengths.prod())
    if not finite or abs(np.linalg.det(affine[:-1, :-1])) <= 1e-6 * lengths.prod():
        raise InputError(f"{path}: its affine is singular or not finite, so its voxels have no position")


def _nifti_affine(image: nib.Nifti1Pair) -> np.ndarray:
    """The affine (4, 4) in mm: sform, else qform, else pixel size, as nibabel chooses."""
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    affine[:3] *= MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    return affine


def _slice_affine(affine: np.ndarray, keep: list[int]) -> np.ndarray:
    """The 3 x 3 affine of one slice: axes `keep` of a 4 x 4 affine. An oblique plane keeps its spacing."""
    matrix = affine[np.ix_(keep, keep)]
    flat = np.eye(3)
    flat[:2, :2] = matrix / np.linalg.norm(matrix, axis=0) * np.linalg.norm(affine[:3, keep], axis=0)
    flat[:2, 2] = affine[keep, 3]
    return flat


def _in_ras(
    path: Path,
    shape: tuple[int, ...],
    channels: int,
    dtype: np.dtype,
    affine: np.ndarray,
    load: Callable[[tuple[int, ...]], np.ndarray],
    dims: int | None,
) -> OpenedFile:
    """A file with axes in any order and direction, in RAS+ order. shape: as stored, of 2 or 3 axes; affine
    (4, 4); load((2, 0)): channels 2 and 0 as (x, y, z, 2). dims 2 drops an axis of one voxel."""
    _check_affine(affine, path)
    grid = (*shape, 1)[:3]
    codes, to_ras = nib.aff2axcodes(affine), io_orientation(affine)
    affine = affine @ inv_ornt_aff(to_ras, grid)
    ras_grid = tuple(grid[axis] for axis in np.argsort(to_ras[:, 0]))
    keep, dropped = [0, 1, 2], None  # RAS axes that stay; for a slice, the RAS axis across it
    if (dims or len(shape)) == 2:
        own = next((axis for axis in (2, 1, 0) if grid[axis] == 1), None)
        if own is None:
            raise InputError(f"{path}: a volume of shape {grid}, expected a single slice (dims = 2)")
        dropped = int(to_ras[own, 0])
        keep.remove(dropped)
        affine, codes = _slice_affine(affine, keep), codes[:own] + codes[own + 1 :]

    def in_ras(picks: tuple[int, ...]) -> np.ndarray:
        data = np.moveaxis(apply_orientation(load(picks).reshape(*grid, -1), to_ras), -1, 0)
        return data if dropped is None else data.squeeze(dropped + 1)

    return OpenedFile(channels, tuple(ras_grid[axis] for axis in keep), dtype, affine, "".join(codes), in_ras)


def take_slice(volume: Volume, axis: int, number: int) -> Volume:
    """One slice of a volume, across `axis`, as a 2-D volume. An oblique plane keeps its spacing."""
    affine, keep = volume.affine.copy(), [other for other in range(3) if other != axis]
    affine[:3, 3] += affine[:3, axis] * number
    codes = volume.orientation and "".join(c for c in volume.orientation if c not in ("LR", "PA", "IS")[axis])
    return Volume(volume.array.take(number, axis + 1), _slice_affine(affine, keep), codes)


def _nifti_voxels(path: Path, image: nib.Nifti1Pair, channel: int | None) -> np.ndarray:
    """The voxels in the axes of the file, as they are stored, without slope and intercept; of a 4-D file one
    channel, or all.

    A compressed file ends with a checksum of what was compressed, which is compared only by who reads to the
    end. nibabel stops after the last voxel, so that a flipped bit would give wrong voxels without a word.
    """

    def voxels(image: nib.Nifti1Pair) -> np.ndarray:
        proxy = image.dataobj
        unscaled = ArrayProxy(proxy.file_like, (proxy.shape, proxy.dtype, proxy.offset))
        return np.asanyarray(unscaled if channel is None else unscaled[..., channel])

    if volume_suffix(path) != ".nii.gz":
        return voxels(image)
    with gzip.open(path) as file:
        data = voxels(_load_nifti(type(image).from_stream, file, path))
        while file.read(2**20):
            pass
    return data


def _open_nifti(path: Path, dims: int | None) -> OpenedFile:
    image = _load_nifti(nib.load, path, path)
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path}: a {type(image).__name__} file, not an image on a voxel grid")
    dtype, shape = image.get_data_dtype(), image.shape
    if len(shape) == 5 and shape[3] == 1:  # vector images keep an empty time axis
        shape = (*shape[:3], shape[4])
    if not 2 <= len(shape) <= 4 or (dtype.fields and len(shape) == 4):
        raise InputError(f"{path}: shape {image.shape}, expected 2-D, 3-D or 4-D (the last axis = channels)")
    grid = (*shape, 1)[:3]
    channels = len(dtype.fields) if dtype.fields else (shape[3] if len(shape) == 4 else 1)

    def load(picks: tuple[int, ...]) -> np.ndarray:
        if len(image.shape) == 4 and len(picks) == 1:  # read one channel, not all
            return _nifti_voxels(path, image, picks[0])
        data = _nifti_voxels(path, image, None)
        if data.dtype.fields:
            data = np.stack([data[name] for name in data.dtype.fields], axis=-1)
        data = data.reshape(*grid, -1)
        return data if picks == tuple(range(channels)) else data[..., list(picks)]

    dtype = np.dtype(np.uint8) if dtype.fields else dtype
    opened = _in_ras(path, shape[:3], channels, dtype, _nifti_affine(image), load, dims)
    return opened._replace(slope_inter=(float(image.dataobj.slope), float(image.dataobj.inter)))


def _tiff_spacing(file: tifffile.TiffFile, dims: int) -> tuple[float, ...] | None:
    """Voxel size (D,) H, W in mm, by ImageJ's fields or the resolution tags; None if they have no unit."""
    page, fields = file.pages[0], file.imagej_metadata or {}
    names = ("XResolution", "YResolution", "ResolutionUnit")
    tags = {name: page.tags[name].value for name in names if name in page.tags}
    unit = str(fields.get("unit", "")).replace("\\u00B5", "µ")
    scale = MM_PER_UNIT.get(unit, {2: 25.4, 3: 10.0}.get(int(tags.get("ResolutionUnit", 1))))
    rates = [tags[name][0] / max(tags[name][1], 1) for name in ("YResolution", "XResolution") if name in tags]
    if scale is None or len(rates) < 2 or min(rates) <= 0:
        return None
    plane = tuple(scale / rate for rate in rates)  # rates: pixels per unit
    if not unit and {round(25.4 / length) for length in plane} <= SCREEN_DPI:
        return None
    depth = max(0.0, float(fields["spacing"])) * scale if "spacing" in fields else plane[0]  # nan: 0 too
    return plane if dims == 2 else (depth, *plane)


def _check_tiff(records: list[logging.LogRecord], path: Path) -> None:
    """InputError for errors that tifffile only logs: a stack that was cut short would have fewer pages."""
    errors = [record.getMessage() for record in records if record.levelno >= logging.ERROR]
    if errors:
        raise InputError(f"{path}: the file is damaged ({errors[0].splitlines()[0]})")


def _open_tiff(path: Path, dims: int | None) -> OpenedFile:
    with _logged("tifffile") as records, tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            raise InputError(f"{path}: holds {len(file.series)} images of different shape, expected one")
        axes, shape, dtype = file.series[0].axes, file.series[0].shape, file.series[0].dtype
        affine = (file.shaped_metadata or ({},))[0].get("affine")  # written by `write`
        affine = None if affine is None else np.array(affine, dtype=np.float64)
        if affine is not None and dims is None:
            dims = len(affine) - 1
        color = [axis for axis, name in enumerate(axes) if name in "CS"]
        stack = [axis for axis, name in enumerate(axes) if name not in "CSYX"]
        if dims == 2 and len(stack) == 1 and not color:
            color, stack = stack, []
        if len(stack) > 1 or (dims == 2 and stack) or not {"Y", "X"} <= set(axes):
            raise InputError(
                f"{path}: axes {axes}, shape {shape}; expected one image or stack (dims = {dims})"
            )
        dims = dims or 2 + len(stack)
        if affine is not None and len(affine) != dims + 1:
            affine = None
        if affine is None and (spacing := _tiff_spacing(file, dims)):
            affine = spacing_affine(spacing)
        photometric, bits = file.pages[0].photometric, file.pages[0].bitspersample
    _check_tiff(records, path)
    inverted = photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if inverted and dtype.kind not in "bu":
        raise InputError(f"{path}: MINISWHITE values of {dtype}; expected MINISBLACK, where 0 is black")
    space = [*stack, axes.index("Y"), axes.index("X")]
    out = (1,) * (dims - len(space)) + tuple(shape[axis] for axis in space)  # one page as a stack of one
    channels = int(np.prod([shape[axis] for axis in color], dtype=int))

    def load(picks: tuple[int, ...]) -> np.ndarray:
        with _logged("tifffile") as records:
            data = tifffile.imread(path, series=0).reshape(shape).transpose(color + space)
        _check_tiff(records, path)
        data = data.reshape(channels, *out)[list(picks)]
        return (~data if data.dtype.kind == "b" else 2**bits - 1 - data) if inverted else data

    palette = photometric == tifffile.PHOTOMETRIC.PALETTE
    return OpenedFile(channels, out, dtype, affine, None, load, palette)


def _open_numpy(path: Path, dims: int | None) -> OpenedFile:
    data = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
    if not isinstance(data, np.ndarray):
        with data:
            arrays = [data[name] for name in sorted(data.files)]
            if len({a.shape for a in arrays}) != 1:
                raise InputError(
                    f"{path}: holds arrays of shape {[a.shape for a in arrays]}, expected one shape"
                )
            data = arrays[0] if len(arrays) == 1 else np.stack(arrays)  # several arrays are channels, by name
    dims = dims or min(data.ndim, 3)
    if data.ndim not in (dims, dims + 1) or dims < 2:
        raise InputError(f"{path}: an array of shape {data.shape}, expected (*S) or (C, *S), *S of 2 or 3")
    data = data.reshape(-1, *data.shape[-dims:]) if data.size else data[None]
    return OpenedFile(len(data), data.shape[-dims:], data.dtype, None, None, lambda picks: data[list(picks)])


def _open_picture(path: Path, dims: int | None) -> OpenedFile:
    try:
        from PIL import Image, ImageMode
    except ImportError as error:
        raise InputError(f"{path}: PNG and JPEG need Pillow; pip install 'ldm3d[viz]'") from error
    if dims == 3:
        raise InputError(f"{path}: a 2-D picture, expected a volume (dims = 3)")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # slides are large
    with warnings.catch_warnings():  # of files that are refused in a line of ours
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path) as image:
            mode, shape = ImageMode.getmode(image.mode), (image.height, image.width)

    def load(picks: tuple[int, ...]) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(path) as image:
                image.verify()  # the checksums of a PNG, which are not compared otherwise
            with Image.open(path) as image:  # a palette picture gives its indices: as label maps are stored
                data = np.asarray(image)
        return (data[None] if data.ndim == 2 else np.moveaxis(data, -1, 0))[list(picks)]

    palette = mode.mode in ("P", "PA")
    return OpenedFile(len(mode.bands), shape, np.dtype(mode.typestr), None, None, load, palette)


def _of_grid(grid: Grid, path: Path, dims: int | None) -> OpenedFile:
    """What SimpleITK has opened: a picture as it is stored, all else in RAS+ order."""

    def load(picks: tuple[int, ...]) -> np.ndarray:
        data = grid.load()
        return data if picks == tuple(range(grid.channels)) else data[..., list(picks)]

    if grid.affine is not None and len(grid.affine) == 4:
        return _in_ras(path, grid.shape, grid.channels, grid.dtype, grid.affine, load, dims)
    if dims == 3:
        raise InputError(f"{path}: a 2-D picture, expected a volume (dims = 3)")

    def picture(picks: tuple[int, ...]) -> np.ndarray:
        return np.moveaxis(load(picks), -1, 0)

    return OpenedFile(grid.channels, grid.shape, grid.dtype, grid.affine, None, picture)


def _open_dicom(path: Path, dims: int | None, series: str | None) -> OpenedFile:
    return _of_grid(open_dicom(path, series), path, dims)


def _open_itk(path: Path, dims: int | None) -> OpenedFile:
    return _of_grid(open_itk(path), path, dims)


# --- formats: write -----------------------------------------------------------------------------------------


def _nifti_image(array: np.ndarray, affine: np.ndarray, orientation: str | None) -> nib.Nifti1Image:
    """A NIfTI-1 image, its axes in the order of `orientation` (default RAS); 2-D becomes one slice."""
    if len(affine) == 3:
        orientation = orientation or "RA"
        axes = sorted({"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[code] for code in orientation)
        thin = ({0, 1, 2} - set(axes)).pop()
        array, flat, affine = np.expand_dims(array, thin + 1), affine, np.eye(4)
        affine[np.ix_(axes, axes)], affine[axes, 3] = flat[:2, :2], flat[:2, 2]
        orientation += "RAS"[thin]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation or "RAS"))
    affine = affine @ inv_ornt_aff(turn, array.shape[1:])
    array = apply_orientation(np.moveaxis(array, 0, -1), turn)  # (X, Y, Z, C)
    image = nib.Nifti1Image(array[..., 0] if array.shape[-1] == 1 else array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-4):  # a qform cannot hold shear
        image.set_qform(affine, code=1)
    return image


def _write_nifti(file: BinaryIO, volume: Volume, suffix: str) -> None:
    """Plane by plane: beside the volume itself, writing takes no memory."""
    image = _nifti_image(volume.array, volume.affine, volume.orientation)
    if suffix == ".nii":
        image.to_stream(file)
        return
    with gzip.GzipFile("", "wb", 3, file, mtime=0) as packed:
        image.to_stream(packed)


def _write_tiff(file: BinaryIO, volume: Volume, suffix: str) -> None:
    """Uncompressed pages, one per channel and depth; spacing as resolution, affine in the description. Three
    channels of 8 bits in 2-D are one page in colour, which every viewer shows."""
    array, affine = volume.array, volume.affine
    axes = "ZYX"[-len(affine) + 1 :]
    color = array.dtype == np.uint8 and len(array) == 3 and axes == "YX"
    if color:
        array, axes = np.moveaxis(array, 0, -1), "YXS"
    else:
        array, axes = (array[0], axes) if len(array) == 1 else (array, "C" + axes)
    per_cm = [10.0 / length for length in affine_spacing(affine)]
    tifffile.imwrite(
        file,
        np.ascontiguousarray(array),
        photometric="rgb" if color else "minisblack",
        planarconfig="separate" if axes == "CYX" else None,
        resolution=(per_cm[-1], per_cm[-2]),
        resolutionunit="CENTIMETER",
        metadata={"axes": axes, "affine": affine.tolist()},
    )


# --- the table of formats -----------------------------------------------------------------------------------


class Format(NamedTuple):
    """A kind of file. To add one, write its `open` (and `write`) above and a row in `FORMATS`."""

    suffixes: tuple[str, ...]  # the end of the name, lower case
    open: Callable[..., OpenedFile]  # (path, dims) or, of several, (path, dims, series); voxels only of .npz
    write: Callable[[BinaryIO, Volume, str], None] | None = None  # (file, volume, suffix); None: is only read
    states_spacing: bool = False  # the spacing that a file states is true: a setting does not replace it
    several: bool = False  # one path may hold several images, of which one is chosen by name


FORMATS = (
    Format(NIFTI, _open_nifti, _write_nifti, states_spacing=True),
    Format(TIFF, _open_tiff, _write_tiff),
    Format(NUMPY, _open_numpy),
    Format(DICOM, _open_dicom, states_spacing=True, several=True),
    Format(ITK, _open_itk, states_spacing=True),
    Format(PICTURE, _open_picture),  # the last: beside volumes they are previews
)
SUFFIXES = tuple(suffix for kind in FORMATS for suffix in kind.suffixes)


def volume_suffix(path: str | Path) -> str:
    """The end of the name that is in `SUFFIXES`, such as ".nii.gz"; "" if none is."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _format(suffix: str) -> Format:
    return next(kind for kind in FORMATS if suffix in kind.suffixes)


def is_volume_file(path: str | Path) -> bool:
    """Does the name end like one of `FORMATS`? Hidden files (".a.nii") are not volumes."""
    return bool(volume_suffix(path)) and not Path(path).name.startswith(".")


def is_file(path: str | Path) -> bool:
    """Is there a file, or a folder that counts as one, since it holds the slices of a DICOM volume?"""
    return os.path.isfile(path) or is_dicom_folder(path)  # Path.is_file raises for names that are too long


def check_file(path: str | Path) -> None:
    """InputError if `is_file` is false."""
    if not is_file(path):
        why = "a folder, expected a file" if os.path.isdir(path) else "no such file"
        raise InputError(f"{path}: {why}")


def strip_suffix(path: str | Path) -> str:
    """The name without folder and volume suffix: "a/b.nii.gz" -> "b". A folder, "a/1.2.840", has none."""
    name = Path(path).name
    return name if os.path.isdir(path) else name[: len(name) - len(volume_suffix(name))]


def stamp(path: str | Path) -> tuple[int, int]:
    """Two numbers that change when a file changes: its size and time of modification.

    Of a folder, and of a header whose voxels lie in another file beside it, they are of all these files: the
    size of all, and a hash of their names, sizes and times.
    """
    path = Path(path)
    stat = path.stat()
    files = [path]
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    elif volume_suffix(path) in (".mhd", ".nhdr"):
        with open(path, "rb") as file:
            named = re.findall(rb"(?im)^(?:ElementDataFile *=|data ?file:) *([^\r\n]+)", file.read(2**14))
        beside = [path.parent / os.fsdecode(name.strip()) for name in named]
        files += [file for file in beside if os.path.isfile(file)]
    if files == [path]:
        return stat.st_size, stat.st_mtime_ns
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(stats).encode(errors="surrogateescape")).digest()
    return sum(size for _, size, _ in stats), int.from_bytes(digest[:7], "big")


def file_name(case: str) -> str:
    """A name for the files of a case, so that results never leave their folder. Suffixes may be appended.

    An id comes from a table or a path and may hold anything. One that can be a file name stays as it is;
    otherwise "_" stands in for what cannot, and a hash of the id keeps names unique: "p01_a" -> "p01_a",
    "../p01" -> "_p01-3babf6e6".
    """
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f\x7f]+', "_", case).strip(". ")
    if len(os.fsencode(name)) > 160:
        name = os.fsencode(name)[:150].decode(errors="ignore")
    if name == case and name:
        return name
    return f"{name}-{hashlib.sha256(os.fsencode(case)).hexdigest()[:8]}"


# --- read ---------------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: str | Path | NoFile) -> Iterator[None]:
    """Turns whatever a format library raises on broken bytes into an InputError of one line with the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        extra = "; pip install 'ldm3d[formats]'" if "imagecodecs" in reason else ""
        raise InputError(f"cannot read {path}: {reason or type(error).__name__}{extra}") from error


def _opened(path: Path, dims: int | None, series: str | None) -> tuple[OpenedFile, bool]:
    """(The opened file, does every file of its kind state its spacing?)."""
    check_file(path)
    suffix = DICOM[0] if os.path.isdir(path) else volume_suffix(path)
    if not suffix:
        raise InputError(f"{path}: unknown kind of file, expected one of {' '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes)")
    kind = _format(suffix)
    with _reading(path):
        opened = kind.open(path, dims, series) if kind.several else kind.open(path, dims)
    return opened, kind.states_spacing


def _open(
    path: Path | NoFile, channel: Any, spacing: Any, dims: int | None, series: str | None
) -> tuple[Header, Callable]:
    """The header, and a function without arguments that reads the chosen channels, in RAS+ order."""
    if isinstance(path, NoFile):
        opened, states_spacing = path.open(dims), False
    else:
        opened, states_spacing = _opened(Path(path), dims, series)
    if 0 in (opened.channels, *opened.shape):
        raise InputError(f"{path}: an image without voxels, shape {opened.shape}")
    if opened.dtype.kind not in "biuf":
        raise InputError(f"{path}: voxels of type {opened.dtype}, expected integers or floats")
    picks = tuple(range(opened.channels)) if channel is None else tuple(np.atleast_1d(channel).tolist())
    if not picks or not all(0 <= pick < opened.channels for pick in picks):
        raise InputError(f"{path}: no channel {channel}, the file has {opened.channels} (0 is the first)")
    affine = opened.affine
    if affine is None or (spacing is not None and not states_spacing):
        spacing = (1.0,) * len(opened.shape) if spacing is None else tuple(spacing)
        if len(spacing) != len(opened.shape) or min(spacing) <= 0:
            raise InputError(f"{path}: spacing {spacing}, expected {len(opened.shape)} positive numbers (mm)")
        affine = spacing_affine(spacing)
    own, lengths = opened.dtype.newbyteorder("="), affine_spacing(affine)
    small, scaled = own.kind in "biu" and own.itemsize <= 2, opened.slope_inter != (1, 0)
    if min(lengths) == 0 and not states_spacing:
        raise InputError(f"{path}: states voxels of {lengths} mm; --data.file_spacing gives them a size")
    _check_affine(affine, path)
    header = Header(
        opened.shape,
        len(picks),
        lengths,
        affine,
        opened.orientation,
        dtype=np.dtype(np.float64) if scaled else own,
        palette=opened.palette,
        stored=np.dtype(np.uint8) if own.kind == "b" else own if small else FLOAT,
        slope_inter=opened.slope_inter,
    )
    return header, lambda: opened.load(picks)


def read_header(
    path: str | Path | NoFile,
    channel: int | tuple[int, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
    dims: Literal[2, 3] | None = None,
    series: str | None = None,
) -> Header:
    """The header of what `read` returns for these arguments. Voxels are not read, but of .npz."""
    return _open(path, channel, spacing, dims, series)[0]


def values_of(stored: np.ndarray, slope_inter: tuple[float, float]) -> np.ndarray:
    """What `read` makes of voxels (C, *S) as they are stored, of a whole volume or a part: float32."""
    if slope_inter == (1, 0) and stored.dtype == np.float32:
        return stored
    out = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore"):  # becomes infinite, which is looked for elsewhere
        for i in range(0, out.shape[1], PLANES):  # nibabel scales in float64, four times the size of 16 bits
            part = (slice(None), slice(i, i + PLANES))
            out[part] = apply_read_scaling(stored[part], *slope_inter)
    return out


def read(
    path: str | Path | NoFile,
    channel: int | tuple[int, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
    dims: Literal[2, 3] | None = None,
    dtype: Any = np.float32,
    series: str | None = None,
) -> Volume:
    """The file as a volume. InputError for a file that is damaged, no image, or does not fit the arguments.

    path: a file, or a folder that holds the slices of a DICOM volume.
    channel: which channels, a number or several; None = all. Channels are the last axis of a 4-D NIfTI, the
    colours of a picture, the first axis of a NumPy array with one axis more than `dims`.
    spacing: mm, for formats that state none; replaces the spacing that a TIFF may state. Default 1 mm.
    dims: 3 reads one page as a stack of one; 2 reads a NIfTI of one slice as an image, and TIFF pages as
    channels. None: whatever the file has.
    dtype: an integer type has the values rounded, and refuses those that do not fit. NaN stays NaN.
    series: of several DICOM series in a folder the one with this number, description or UID.
    """
    header, load = _open(path, channel, spacing, dims, series)
    with _reading(path):
        if np.dtype(dtype) == np.float32:
            array = values_of(load(), header.slope_inter)
        else:
            array = _cast(apply_read_scaling(load(), *header.slope_inter), np.dtype(dtype), path)
    return Volume(np.ascontiguousarray(array), header.affine, header.orientation)


def read_stored(path: str | Path | NoFile, **options: Any) -> tuple[Volume, tuple[float, float]]:
    """(The volume in the type of its file, slope and intercept): `values_of` gives the float32 values of
    `read`, which takes the same options.

    Integers of 8 or 16 bits stay what they are, and take a half or a quarter of the memory. All other voxels
    are float32, with slope 1 and intercept 0.
    """
    header, load = _open(path, *(options.get(name) for name in ("channel", "spacing", "dims", "series")))
    with _reading(path):
        stored, slope_inter = load(), header.slope_inter
        if header.stored.kind == "f":
            stored, slope_inter = values_of(stored, slope_inter), (1.0, 0.0)
        array = np.array(stored, header.stored, order="C")  # a copy: not a view of a mapped file
    return Volume(array, header.affine, header.orientation), slope_inter


def _cast(array: np.ndarray, dtype: np.dtype, path: str | Path | NoFile) -> np.ndarray:
    """The array as `dtype`: for an integer type rounded, with an InputError for a value out of range."""
    if dtype.kind not in "iu" or array.dtype.kind == "b":
        with np.errstate(over="ignore"):  # becomes infinite, which is looked for elsewhere
            return array.astype(dtype, copy=False)
    array = np.rint(array) if array.dtype.kind == "f" else array
    low, high, limits = array.min(), array.max(), np.iinfo(dtype)
    if not (low >= limits.min and high <= limits.max):  # also catches NaN
        raise InputError(f"{path}: values {low} to {high} do not fit {dtype}")
    return array.astype(dtype, copy=False)


# --- write --------------------------------------------------------------------------------------------------


def write(path: str | Path, volume: Volume, dtype: Any = None, overwrite: bool = False) -> Path:
    """Writes NIfTI, its axes in the order of `volume.orientation`, or TIFF. Returns the path.

    The file appears complete or not at all. dtype None: floats as float32, booleans as uint8, 64-bit integers
    as int32, other integers as they are. InputError for a file that exists already (unless `overwrite`) and
    for a value that does not fit `dtype`.
    """
    path, suffix = Path(path), volume_suffix(path)
    writable = [end for kind in FORMATS if kind.write for end in kind.suffixes]
    if suffix not in writable:
        raise InputError(f"{path}: can write {' '.join(writable)}, not this kind of file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already and is not overwritten")
    if dtype is None:
        own = volume.array.dtype
        dtype = {"f": np.float32, "b": np.uint8}.get(own.kind, np.int32 if own.itemsize == 8 else own)
    array = _cast(volume.array, np.dtype(dtype), path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            _format(suffix).write(file, replace(volume, array=array), suffix)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path
