"""Hostile inputs: every case ends in one line and exit code 2, or in a right result.

A case damages a file or gives absurd settings, then runs a training script or sample.py in a box of its own
(hostile.py, which says what is demanded). Cases are made by a function for each area; their names tell them
apart, and seed what is random in them.
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import tiny
import torch
from hostile import (
    CONDITIONED,
    Action,
    Case,
    broken_demand,
    cut,
    delete,
    edit_checkpoint,
    edit_json,
    flip,
    images_to,
    instead,
    make_template,
    path_of,
    put,
    sample,
    train_cdal,
    train_ldm,
    train_vae,
)
from PIL import Image

from ldm3d.data.volumes import read

VAE, LDM, CDAL = train_vae(), train_ldm(), train_cdal()
GO_ON = {  # the runs of the box, trained further
    "vae": train_vae("--data.learn_sources", "true", run="vae", steps=3),
    "ldm": train_ldm(*CONDITIONED, run="ldm", steps=3),
    "cdal": train_cdal(run="cdal", steps=3),
}
USE = {"vae": images_to("vae"), "ldm": sample(), "cdal": images_to("cdal")}
VICTIM, TABLE = "data/images/phantom_0003.*", "data/cases.csv"
IMAGES = [f"images/phantom_{i:04d}.tif" for i in range(6)]
DEEP = "[" * 100_000
NAN = float("nan")
Make = Callable[[np.ndarray], Any]


# --- pictures -----------------------------------------------------------------------------------------------


def save_as(path: Path, array: np.ndarray) -> None:
    """A picture (H, W) uint8 in the format that the name says."""
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array[..., None], np.eye(4)), path)
    elif path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, image=array)
    else:
        Image.fromarray(array).save(path)


def as_format(suffix: str) -> Action:
    """All images in another format, and the table with their new names."""

    def act(box: Path, draw: np.random.Generator) -> None:
        for path in sorted((box / "data/images").iterdir()):
            save_as(path.with_suffix(suffix), tifffile.imread(path))
            path.unlink()
        table = box / TABLE
        table.write_text(re.sub(r"(images/\w+)\.tif", rf"\1{suffix}", table.read_text()))

    act.__name__ = f"as {suffix}"
    return act


def rewrite(write: Callable[[Path, np.ndarray], Any], suffix: str | None = None, dims: int = 2) -> Action:
    """write(path, array) writes the victim's voxels anew, in the same place or with another suffix."""

    def act(box: Path, draw: np.random.Generator) -> None:
        path = path_of(box, VICTIM)
        array = read(path, dims=dims).array[0].astype(np.uint8)
        path.unlink()
        new = path.with_suffix(suffix) if suffix else path
        write(new, array)
        table = box / TABLE
        table.write_text(table.read_text().replace(f"images/{path.name}", f"images/{new.name}"))

    return act


def tiff(**options: Any) -> Action:
    return rewrite(lambda path, a: tifffile.imwrite(path, a, **options))


def typed(convert: Make, **options: Any) -> Action:
    options = {"photometric": "minisblack"} | options
    return rewrite(lambda path, a: tifffile.imwrite(path, convert(a), **options))


def pil(suffix: str, change: Callable[[Any], Any] = lambda image: image, **options: Any) -> Action:
    return rewrite(lambda path, a: change(Image.fromarray(a)).save(path, **options), suffix)


def palette(image: Any) -> Any:
    image = image.convert("P")
    image.putpalette([255 - k // 3 for k in range(768)])
    return image


def imagej(spacing: Any, unit: str = "mm") -> Action:
    return tiff(imagej=True, resolution=(1.0, 1.0), metadata={"spacing": spacing, "unit": unit, "axes": "YX"})


def patched(tag: str, value: Any) -> Action:
    """One tag of the TIFF gets another value."""

    def write(path: Path, a: np.ndarray) -> None:
        tifffile.imwrite(path, a, photometric="minisblack", resolution=(1, 1), resolutionunit="CENTIMETER")
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[tag].overwrite(value)

    return rewrite(write)


def at_72_dpi(box: Path, draw: np.random.Generator) -> None:
    """Every image gets the resolution that programs for pictures write of their own accord."""
    grey = {"photometric": "minisblack", "resolution": (72, 72), "resolutionunit": "INCH"}
    for path in (box / "data/images").iterdir():
        tifffile.imwrite(path, tifffile.imread(path), **grey)


def claims(width: int, height: int) -> Action:
    """The header of the PNG claims another size, with a right checksum."""

    def change(data: bytes) -> bytes:
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]

    return put(VICTIM, change)


TIFFS = {  # name: (damage, expectation)
    "palette": (pil(".tif", palette), "refuse"),
    "MINISWHITE": (typed(lambda a: 255 - a, photometric="miniswhite"), "same"),
    "CMYK": (pil(".tif", lambda i: i.convert("CMYK")), "refuse"),
    "RGB": (pil(".tif", lambda i: i.convert("RGB")), "refuse"),
    "RGBA": (pil(".tif", lambda i: i.convert("RGBA")), "refuse"),
    "1 bit": (pil(".tif", lambda i: i.convert("1")), "any"),
    "float16": (typed(lambda a: a.astype(np.float16)), "same"),
    "float32": (typed(lambda a: a.astype(np.float32)), "right"),
    "float64": (typed(lambda a: a.astype(np.float64)), "right"),
    "int64": (typed(lambda a: a.astype(np.int64)), "same"),
    "uint64 at its limit": (typed(lambda a: a.astype(np.uint64) * (2**64 // 256)), "any"),
    "float64 at its limit": (typed(lambda a: a * 1e300), "any"),
    "float32 at its limit": (typed(lambda a: (a * 1e36).astype(np.float32)), "any"),
    "float32 tiny": (typed(lambda a: (a * 1e-44).astype(np.float32)), "any"),
    "complex": (typed(lambda a: a.astype(np.complex64)), "refuse"),
    "NaN": (typed(lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32)), "refuse"),
    "infinite": (typed(lambda a: np.where(a == a.max(), np.inf, a).astype(np.float32)), "refuse"),
    "constant": (typed(lambda a: a * 0), "any"),
    "big-endian": (typed(lambda a: a.astype(np.uint16), byteorder=">"), "right"),
    "BigTIFF": (tiff(photometric="minisblack", bigtiff=True), "right"),
    "deflate": (tiff(photometric="minisblack", compression="zlib"), "same"),
    "LZW": (pil(".tif", compression="tiff_lzw"), "same"),
    "packbits": (pil(".tif", compression="packbits"), "same"),
    "JPEG inside": (pil(".tif", compression="jpeg"), "any"),
    "fax": (pil(".tif", lambda i: i.convert("1"), compression="group4"), "any"),
    "tiles": (tiff(photometric="minisblack", tile=(16, 16)), "right"),
    "predictor": (tiff(photometric="minisblack", compression="zlib", predictor=2), "same"),
    "two pages": (typed(lambda a: np.stack([a, a])), "refuse"),
    "five axes": (typed(lambda a: np.broadcast_to(a, (2, 2, 2, 16, 16))), "refuse"),
    "pages of two shapes": (
        rewrite(lambda p, a: [tifffile.imwrite(p, b, append=True) for b in (a, a[:8])]),
        "refuse",
    ),
    "another shape": (typed(lambda a: a[:1, :1]), "any"),
    "72 dpi": (at_72_dpi, "same"),
    "0 dpi": (patched("XResolution", (0, 1)), "any"),
    "resolution over 0": (patched("XResolution", (1, 0)), "any"),
    "resolution without end": (patched("XResolution", (2**32 - 1, 1)), "any"),
    "resolution next to none": (patched("XResolution", (1, 2**32 - 1)), "any"),
    "unknown unit": (patched("ResolutionUnit", 77), "any"),
    "unknown photometric": (patched("PhotometricInterpretation", 99), "any"),
    "unknown compression": (patched("Compression", 60000), "refuse"),
    "17 bits": (patched("BitsPerSample", 17), "refuse"),
    "width of 0": (patched("ImageWidth", 0), "refuse"),
    "enormous width": (patched("ImageWidth", 65535), "refuse"),
    "ImageJ spacing 0": (imagej(0.0), "any"),
    "ImageJ spacing below 0": (imagej(-1.0), "any"),
    "ImageJ spacing a word": (imagej("thick"), "any"),
    "ImageJ resolution in light years": (imagej(1.0, "light year"), "any"),
}
PICTURES = {
    "palette PNG": (pil(".png", palette), "refuse"),
    "1-bit PNG": (pil(".png", lambda i: i.convert("1")), "any"),
    "16-bit PNG": (rewrite(lambda p, a: Image.fromarray(a.astype(np.uint16)).save(p), ".png"), "same"),
    "grey PNG with alpha": (pil(".png", lambda i: i.convert("LA")), "refuse"),
    "RGBA PNG": (pil(".png", lambda i: i.convert("RGBA")), "refuse"),
    "PNG with a transparent grey": (pil(".png", transparency=7), "same"),
    "JPEG": (pil(".jpg"), "any"),
    "CMYK JPEG": (pil(".jpg", lambda i: i.convert("CMYK")), "refuse"),
    "JPEG named PNG": (rewrite(lambda p, a: Image.fromarray(a).save(p, format="JPEG"), ".png"), "any"),
    "GIF named PNG": (rewrite(lambda p, a: Image.fromarray(a).save(p, format="GIF"), ".png"), "any"),
    "animated PNG": (
        rewrite(
            lambda p, a: Image.fromarray(a).save(p, save_all=True, append_images=[Image.fromarray(a)]), ".png"
        ),
        "any",
    ),
    "PNG in a larger case": (pil(".PNG"), "same"),
}


def pictures() -> Iterator[Case]:
    for name, (damage, expect) in TIFFS.items():
        yield Case(f"TIFF, {name}", VAE, damage, expect)
    for name, (damage, expect) in PICTURES.items():
        yield Case(name, VAE, damage, expect)
    for size in ((60000, 60000), (12000, 12000), (0, 16)):
        yield Case(f"PNG that claims {size}", VAE, claims(*size), "refuse", [as_format(".png")])


# --- NIfTI and NumPy ----------------------------------------------------------------------------------------


def nifti(
    change: Callable[[bytearray], Any] | None = None,
    array: Make = lambda a: a,
    affine: np.ndarray | None = None,
    kind: type = nib.Nifti1Image,
) -> Action:
    """The victim as NIfTI of array(voxels (H, W, 1)), with bytes changed in place."""

    def write(path: Path, a: np.ndarray) -> None:
        nib.save(kind(array(a[..., None]), np.eye(4) if affine is None else affine), path)
        data = bytearray(path.read_bytes())
        if change:
            change(data)
        path.write_bytes(data)

    return rewrite(write)


def field(offset: int, form: str, *values: Any) -> Action:
    return nifti(lambda data: struct.pack_into("<" + form, data, offset, *values))


def no_affine(data: bytearray, size: float = 0.0) -> None:
    struct.pack_into("<hh", data, 252, 0, 0)
    struct.pack_into("<4f", data, 76, 1, size, size, size)


def affine_of(first: float, others: float) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into("<hh", data, 252, 0, 1)
        struct.pack_into("<12f", data, 280, first, *[others] * 11)

    return change


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
NIFTIS = {
    "affine of zeros": (nifti(affine_of(0.0, 0.0)), "refuse"),
    "NaN in the affine": (nifti(affine_of(NAN, 1.0)), "refuse"),
    "no affine, voxels of 0 mm": (nifti(no_affine), "refuse"),
    "flat affine": (nifti(affine_of(1.0, 0.0)), "refuse"),
    "enormous affine": (nifti(affine=np.diag([1e30, 1e30, 1.0, 1.0])), "any"),
    "tiny affine": (nifti(affine=np.diag([1e-30, 1e-30, 1.0, 1.0])), "any"),
    "RGB": (nifti(array=lambda a: np.ascontiguousarray(np.broadcast_to(a, (16, 16, 3))).view(RGB)), "refuse"),
    "complex": (nifti(array=lambda a: a.astype(np.complex64)), "refuse"),
    "int64": (nifti(array=lambda a: a.astype(np.int32)), "right"),
    "5-D": (
        nifti(array=lambda a: np.ascontiguousarray(np.broadcast_to(a[..., None, None], (16, 16, 1, 2, 2)))),
        "refuse",
    ),
    "5-D of one": (nifti(array=lambda a: a[..., None, None]), "any"),
    "6-D": (nifti(array=lambda a: a[..., None, None, None]), "any"),
    "two channels": (nifti(array=lambda a: np.concatenate([a[..., None]] * 2, -1)), "refuse"),
    "1-D": (nifti(array=lambda a: a[:, 0, 0]), "refuse"),
    "a volume": (nifti(array=lambda a: np.concatenate([a] * 3, -1)), "refuse"),
    "NaN": (nifti(array=lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32)), "refuse"),
    "infinite": (nifti(array=lambda a: np.where(a == a.max(), np.inf, a).astype(np.float32)), "refuse"),
    "NIfTI-2": (nifti(kind=nib.Nifti2Image), "right"),
    "scl_slope 0": (field(112, "f", 0.0), "right"),
    "scl_slope NaN": (field(112, "f", NAN), "any"),
    "scl_slope infinite": (field(112, "f", np.inf), "any"),
    "scl_slope 1e38": (field(112, "f", 1e38), "any"),
    "scl_inter infinite": (field(112, "ff", 1.0, np.inf), "any"),
    "no dimensions": (field(40, "h", 0), "refuse"),
    "9 dimensions": (field(40, "h", 9), "refuse"),
    "dimension 0": (field(42, "h", 0), "refuse"),
    "dimension below 0": (field(42, "h", -16), "refuse"),
    "enormous dimensions": (field(42, "hhh", 32767, 32767, 1), "refuse"),
    "more voxels than the file": (field(42, "hhh", 64, 64, 1), "refuse"),
    "data beyond the file": (field(108, "f", 1e6), "refuse"),
    "data before the file": (field(108, "f", -1e6), "refuse"),
    "data at NaN": (field(108, "f", NAN), "refuse"),
    "wrong magic": (field(344, "4s", b"no!\0"), "refuse"),
    "magic of a pair": (field(344, "4s", b"ni1\0"), "any"),
    "unknown type": (field(70, "h", 999), "refuse"),
    "binary type": (field(70, "h", 1), "refuse"),
    "unknown unit": (field(123, "B", 255), "any"),
    "wrong size of the header": (field(0, "i", 999), "any"),
    "a bad extension": (nifti(lambda d: d.__setitem__(slice(348, 352), b"\1\0\0\0")), "any"),
    "qform not a number": (
        nifti(lambda d: struct.pack_into("<hhfff", d, 252, 1, 0, np.nan, 5.0, 9.0)),
        "refuse",
    ),
    "voxels of a negative size": (nifti(lambda data: no_affine(data, -1.0)), "any"),
}
GZIPS = {
    "plain bytes named .nii.gz": (gzip.decompress, "same"),
    "two layers of gzip": (gzip.compress, "refuse"),
    "garbage after gzip": (lambda d: d + b"garbage", "same"),
    "zeros after gzip": (lambda d: d + b"\0" * 512, "same"),
    "two members of gzip": (lambda d: d + gzip.compress(b"more"), "any"),
    "a header alone": (lambda d: d[:10], "refuse"),
    "a wrong checksum": (lambda d: d[:-8] + b"\1\2\3\4" + d[-4:], "same"),
    "a wrong length": (lambda d: d[:-4] + b"\1\2\3\4", "same"),
}


def npy(convert: Make) -> Action:
    return rewrite(lambda path, a: np.save(path, convert(a)))


def npy_header(change: Callable[[bytes], bytes]) -> Action:
    def act(data: bytes) -> bytes:
        length = struct.unpack("<H", data[8:10])[0]
        head = change(data[10 : 10 + length])
        return data[:8] + struct.pack("<H", len(head)) + head + data[10 + length :]

    return put(VICTIM, act)


def npz(members: Callable[[np.ndarray], dict[str, Any]]) -> Action:
    def write(path: Path, a: np.ndarray) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members(a).items():
                file.writestr(name, saved(content) if isinstance(content, np.ndarray) else content)

    return rewrite(write)


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


NUMPY = {
    "objects": (npy(lambda a: np.array([None, {}], dtype=object)), "refuse"),
    "words": (npy(lambda a: np.array([["a", "b"]])), "refuse"),
    "times": (npy(lambda a: a.astype("M8[s]")), "refuse"),
    "fields": (npy(lambda a: np.zeros((16, 16), [("a", "f4"), ("b", "i2")])), "refuse"),
    "complex": (npy(lambda a: a.astype(complex)), "refuse"),
    "no axes": (npy(lambda a: np.float32(3)), "refuse"),
    "one axis": (npy(lambda a: a[0]), "refuse"),
    "five axes": (npy(lambda a: a[None, None, None]), "refuse"),
    "no voxels": (npy(lambda a: a[:0]), "refuse"),
    "Fortran's order": (npy(np.asfortranarray), "right"),
    "big-endian": (npy(lambda a: a.astype(">u2")), "right"),
    "float16": (npy(lambda a: a.astype(np.float16)), "right"),
    "float128": (npy(lambda a: a.astype(np.longdouble)), "same"),
    "booleans": (npy(lambda a: a > 100), "any"),
    "NaN": (npy(lambda a: np.where(a == a.max(), np.nan, a)), "refuse"),
    "an enormous shape": (npy_header(lambda h: h.replace(b"(16, 16)", b"(160000, 1600000)")), "refuse"),
    "a negative shape": (npy_header(lambda h: h.replace(b"(16, 16)", b"(-16, 16)")), "refuse"),
    "a shape of True": (npy_header(lambda h: h.replace(b"(16, 16)", b"(True, 256)")), "any"),
    "code in the header": (
        npy_header(lambda h: h.replace(b"'|u1'", b"__import__('os').system('touch hacked')")),
        "refuse",
    ),
    "a deep header": (npy_header(lambda h: b"(" * 9000), "refuse"),
    "an empty header": (npy_header(lambda h: b""), "refuse"),
}

NPZ = {
    "empty": (npz(lambda a: {}), "refuse"),
    "two shapes": (npz(lambda a: {"a.npy": a, "b.npy": a[:3]}), "refuse"),
    "two channels": (npz(lambda a: {"a.npy": a, "b.npy": a}), "refuse"),
    "a path upwards": (npz(lambda a: {"../../../x.npy": a}), "same"),
    "a text": (npz(lambda a: {"a.txt": b"hello"}), "refuse"),
    "objects": (npz(lambda a: {"a.npy": np.array([None, {}], dtype=object)}), "refuse"),
}


def arrays() -> Iterator[Case]:
    for name, (damage, expect) in NIFTIS.items():
        yield Case(f"NIfTI, {name}", VAE, damage, expect, [as_format(".nii")])
    for name, (change, expect) in GZIPS.items():
        yield Case(name, VAE, put(VICTIM, change), expect, [as_format(".nii.gz")])
    for name, (damage, expect) in NUMPY.items():
        yield Case(f"npy, {name}", VAE, damage, expect, [as_format(".npy")])
    for name, (damage, expect) in NPZ.items():
        yield Case(f"npz, {name}", VAE, damage, expect, [as_format(".npz")])


# --- volumes ------------------------------------------------------------------------------------------------

VOLUME = train_vae("--data.dims", "3", "--vae.dims", "3", "--batch_size", "2")


def as_volumes(suffix: str = ".nii.gz") -> Action:
    """Three volumes in place of the pictures."""

    def act(box: Path, draw: np.random.Generator) -> None:
        for name in ("images", "labels", "sources"):
            shutil.rmtree(box / "data" / name)
        (box / "data/images").mkdir()
        names = [f"images/phantom_000{i}{suffix}" for i in (1, 2, 3)]
        for path in (box / "data" / name for name in names):
            array = draw.integers(0, 255, (8, 8, 8)).astype(np.uint8)
            if suffix == ".tif":
                tifffile.imwrite(path, array, photometric="minisblack")
            else:
                nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), path)
        (box / TABLE).write_text("image\n" + "\n".join(names) + "\n")

    act.__name__ = f"volumes {suffix}"
    return act


def volume(array: Make = lambda a: a, affine: Any = np.eye(4)) -> Action:  # noqa: B008 (a constant)
    return rewrite(lambda path, a: nib.save(nib.Nifti1Image(array(a), np.array(affine)), path), dims=3)


def stack(spacing: Any) -> Action:
    meta = {"spacing": spacing, "unit": "mm", "axes": "ZYX"}
    return rewrite(lambda p, a: tifffile.imwrite(p, a, imagej=True, resolution=(1, 1), metadata=meta), dims=3)


SHEARED = [[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def volumes() -> Iterator[Case]:
    for spacing in (0.0, -2.0, NAN, float("inf"), "thick"):
        name = f"ImageJ stack, spacing {spacing}"
        yield Case(name, VOLUME, stack(spacing), "refuse", [as_volumes(".tif")], "phantom_0003")
    for name, damage in {
        "of one slice": volume(lambda a: a[..., :1]),
        "of one value": volume(lambda a: a * 0),
        "sheared flat": volume(affine=SHEARED),
        "that is a picture": put(VICTIM, b"\x89PNG"),
    }.items():
        yield Case(f"a volume {name}", VOLUME, damage, "refuse", [as_volumes()], "phantom_0003")
    for i in range(4):
        yield Case(f"bit flip {i} in a volume", VOLUME, flip(VICTIM), "same", [as_volumes()])


# --- damaged files of data ----------------------------------------------------------------------------------

FLIPS = {  # format: (what is demanded after the flip of one bit, how often, bytes of the header)
    ".nii.gz": ("same", 20, 0),
    ".nii": ("any", 4, 352),
    ".tif": ("any", 6, 200),
    ".npy": ("any", 4, 128),
    ".npz": ("same", 8, 0),
    ".png": ("same", 10, 0),
}
READERS = {
    "stage two": LDM,
    "segmentation": CDAL,
    "reconstructing": images_to("vae"),
    "segmenting": images_to("cdal"),
    "sampling cases": sample("--cases", "train"),
}
NO_IMAGES: dict[str, Callable[[Path], Any]] = {
    "a text": lambda p: p.write_text("not a picture\n"),
    "zeros": lambda p: p.write_bytes(b"\0" * 4096),
    "a pointer of git-annex": lambda p: p.write_text("/annex/objects/SHA256E-s1--00.tif\n"),
    "a folder": Path.mkdir,
    "a dangling link": lambda p: p.symlink_to("../.git/annex/x.tif"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a pipe": os.mkfifo,
    "a device": lambda p: p.symlink_to("/dev/zero"),
}
MEANT = ("a text", "zeros", "a pointer of git-annex", "a dangling link", "a link to itself")  # to be an image


def damaged_data() -> Iterator[Case]:
    for suffix, (expect, count, header) in FLIPS.items():
        before = [as_format(suffix)] if suffix != ".tif" else []
        for i in range(count):
            yield Case(f"bit flip {i} in {suffix}", VAE, flip(VICTIM), expect, before)
        for i in range(8 if header else 0):
            yield Case(f"bit flip {i} in the header of {suffix}", VAE, flip(VICTIM, 0, header), "any", before)
        for share in (0.0, 0.1, 0.5, 0.9, -1, -5):
            yield Case(f"{suffix} cut, {share}", VAE, cut(VICTIM, share), "same", before)
        if suffix != ".tif":
            yield Case(f"a .tif named {suffix}", VAE, put(VICTIM, b"II*\0" * 200), "refuse", before)
    for what, command in READERS.items():
        for share in (0.7, 0.0):
            damage = cut("data/images/*.tif", share)
            yield Case(f".tif cut, {share}, {what}", command, damage, "refuse", words="phantom_0005")
    zipped = [as_format(".nii.gz")]
    for what in ("reconstructing", "segmenting"):
        for i in range(4):
            yield Case(f"bit flip {i} in .nii.gz, {what}", READERS[what], flip(VICTIM), "same", zipped)
        yield Case(f".nii.gz cut, {what}", READERS[what], cut(VICTIM, -4), "same", zipped)
    for i in range(4):
        yield Case(f"bit flip {i} in a mask", CDAL, flip("data/labels/*.tif"))
    for name, make in NO_IMAGES.items():
        damage, taken = instead(VICTIM, make), "refuse" if name in MEANT else "any"
        yield Case(f"{name} in the table", VAE, damage, "refuse", words="phantom_0003")
        yield Case(f"{name} under a glob", train_vae("--data.image", "images/*.tif"), damage, taken)
        yield Case(f"{name} in a folder to reconstruct", images_to("vae"), damage, taken)


# --- tables -------------------------------------------------------------------------------------------------


def table(*rows: str, head: str = "image,mask,source,class,text,subject") -> Action:
    return put(TABLE, "\n".join([head, *rows]) + "\n")


def row(number: int, old: str, new: str | bytes) -> Action:
    """In line `number` of the table (0: the header) one text is replaced."""

    def change(data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines[number] = lines[number].replace(old.encode(), new if isinstance(new, bytes) else new.encode())
        return b"\n".join(lines)

    return put(TABLE, change)


def ids(*names: str) -> Action:
    """A column `id` in the table, with these names for the first cases."""

    def act(box: Path, draw: np.random.Generator) -> None:
        head, *rows = (box / TABLE).read_text().splitlines()
        own = [*names, *(f"case {i}" for i in range(len(names), len(rows)))]
        rows = [f'{line},"{name}"' for line, name in zip(rows, own, strict=True)]
        text = "\n".join([f"{head},id", *rows]) + "\n"
        (box / TABLE).write_text(text.replace("ABOVE", str(box.parent)), encoding="utf-8")

    act.__name__ = f"ids {names}"
    return act


def elsewhere(absolute: bool) -> Action:
    """Images with repeating names outside the root, so that ids are made of their paths."""

    def act(box: Path, draw: np.random.Generator) -> None:
        base, lines = box.parent / "far" if absolute else box / "far", []
        for i, name in enumerate(IMAGES):
            (base / f"p{i}").mkdir(parents=True)
            shutil.copy(box / "data" / name, base / f"p{i}/t1.tif")
            lines.append(f"{base if absolute else '../far'}/p{i}/t1.tif")
        table(*lines, head="image")(box, draw)

    act.__name__ = f"elsewhere {absolute}"
    return act


IDS = {
    "absolute path": "ABOVE/x",
    "two folders up": "../../X",
    "three folders up": "../../../X",
    "folder": "a/b",
    "dot": ".",
    "two dots": "..",
    "backslashes": "..\\\\..\\\\X",
    "line break": "a\nb",
    "300 letters": "x" * 300,
    "NUL": "a\0b",
    "empty": "",
    "blank": "   ",
    "glob": "*",
    "home": "~/X",
    "percent": "%s%n{0}{x}",
    "dash": "--run.steps",
    "letters from right to left": "\u202egnp.exe",
    "emoji": "\U0001f9e0",
    "hidden file": ".hidden",
    "markup": "<script>alert(1)</script>",
}
STAGES = (train_vae(run="vae2"), ("train_ldm", *tiny.ldm_flags(Path("vae2"), Path("ldm2"), 1)))
TABLES = {
    "empty": (put(TABLE, b""), "refuse"),
    "a blank line alone": (put(TABLE, b"\n"), "refuse"),
    "a header alone": (table(), "refuse"),
    "one column of names": (table(*IMAGES, head="image"), "fine"),
    "one case": (table(IMAGES[0], head="image"), "refuse"),
    "two image columns": (table(*(f"{f},{f}" for f in IMAGES), head="image,image"), "refuse"),
    "two class columns": (table(*(f"{f},1,2" for f in IMAGES), head="image,class,class"), "refuse"),
    "a column without a name": (table(*(f"{f},1" for f in IMAGES), head="image,"), "any"),
    "a byte order mark": (put(TABLE, lambda d: b"\xef\xbb\xbf" + d), "right"),
    "UTF-16": (put(TABLE, lambda d: d.decode().encode("utf-16")), "refuse"),
    "Latin-1": (row(1, "a small", b"kleine L\xe4sion"), "refuse"),
    "invalid UTF-8": (row(1, "a small", b"\xff\xfe\xc0"), "refuse"),
    "a NUL": (row(1, "a small", b"a\0small"), "any"),
    "a cell of 200 kB": (row(1, "a small", "x" * 200_000), "any"),
    "a cell of 200 kB of words": (row(1, "a small", "word " * 40_000), "any"),
    "a header of 200 kB": (row(0, "text", "x" * 200_000), "any"),
    "an open quote": (row(1, "a small", '"a small'), "refuse"),
    "quotes within": (row(1, "a small", 'a "small"'), "any"),
    "a line with a cell more": (row(2, "phantom_0001.tif,", "phantom_0001.tif,,"), "refuse"),
    "a line with a cell less": (row(2, ",1,", ","), "refuse"),
    "tabs": (put(TABLE, lambda d: d.replace(b",", b"\t")), "right"),
    "semicolons": (put(TABLE, lambda d: d.replace(b",", b";")), "right"),
    "old line ends": (put(TABLE, lambda d: d.replace(b"\r\n", b"\r")), "any"),
    "NaN for an image": (row(2, IMAGES[1], "NaN"), "refuse"),
    "a blank image": (row(2, IMAGES[1], ""), "refuse"),
    "a dot for an image": (row(2, IMAGES[1], "."), "refuse"),
    "a folder for an image": (row(2, IMAGES[1], "images"), "refuse"),
    "an image twice": (row(2, IMAGES[1], IMAGES[0]), "any"),
    "an image path of 5000 letters": (row(2, IMAGES[1], "x" * 5000 + ".tif"), "refuse"),
    "a NUL in a path": (row(2, IMAGES[1], "images/\0.tif"), "refuse"),
    "a device": (row(2, IMAGES[1], "/dev/zero"), "refuse"),
    "a password file": (row(2, IMAGES[1], "/etc/passwd"), "refuse"),
    "a mask that is its image": (row(2, "labels/phantom_0001.tif", IMAGES[1]), "any"),
    "a missing mask": (row(2, "labels/phantom_0001.tif", "labels/none.tif"), "refuse"),
    "a blank mask": (row(2, "labels/phantom_0001.tif", ""), "refuse"),
    "a split that is none": (table(*(f"{f},maybe" for f in IMAGES), head="image,split"), "refuse"),
    "a split for some": (table(f"{IMAGES[0]},train", f"{IMAGES[1]},", head="image,split"), "refuse"),
    "all for training": (table(*(f"{f},train" for f in IMAGES), head="image,split"), "refuse"),
    "one subject": (table(*(f"{f},a" for f in IMAGES), head="image,subject"), "refuse"),
    "blank subjects": (table(*(f"{f}," for f in IMAGES), head="image,subject"), "any"),
    "a header in another case": (row(0, "image", "Image"), "refuse"),
    "a class of 40 digits": (row(1, ",1,", f",{10**40},"), "any"),
    "a class of a billion": (row(1, ",1,", ",1000000000,"), "any"),
    "a class in Arabic digits": (row(1, ",1,", ",\u0663,"), "any"),
}
CLASS, NUMBER, TEXT = (train_ldm("--condition.use", use) for use in ("class", "number:class", "text"))
NAMED = {
    "a class of 40 digits": (CLASS, row(1, ",1,", f",{10**40},")),
    "a class superscript": (CLASS, row(1, ",1,", ",\u00b2,")),
    "a class minus 0": (CLASS, row(1, ",1,", ",-0,")),
    "a class of 200 kB": (CLASS, row(1, ",1,", f",{'x' * 100_000},")),
    "a number NaN": (NUMBER, row(1, ",1,", ",NaN,")),
    "a number infinite": (NUMBER, row(1, ",1,", ",inf,")),
    "a number of 1e400": (NUMBER, row(1, ",1,", ",1e400,")),
    "a number of 1e300": (NUMBER, row(1, ",1,", ",1e300,")),
    "a number a word": (NUMBER, row(1, ",1,", ",one,")),
    "a text of 100 kB": (TEXT, row(1, "a small", "word " * 20_000)),
    "a text of signs": (TEXT, row(1, "a small lesion in the right hemisphere", "!!! ???")),
    "no text": (TEXT, put(TABLE, lambda d: re.sub(rb"a \w+ lesion in the \w+ hemisphere", b"", d))),
}
EMBEDDED = train_ldm("--condition.use", "embedding:file", "--condition.context_dim", "16")


def embeddings(make: Callable[[Path], Any]) -> Action:
    """A column `file` with a text embedding for every case, the first one from `make`."""

    def act(box: Path, draw: np.random.Generator) -> None:
        for i in range(6):
            np.savez(box / f"data/e{i}.npz", embedding=np.ones((2, 4), np.float32), mask=np.ones(2))
        make(box / "data/e0.npz")
        table(*(f"{name},e{i}.npz" for i, name in enumerate(IMAGES)), head="image,file")(box, draw)

    return act


EMBEDDINGS = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "empty": lambda p: p.write_bytes(b""),
    "not finite": lambda p: np.savez(p, embedding=np.full((2, 4), np.nan)),
    "of words": lambda p: np.savez(p, embedding=np.array([["a"]])),
    "complex": lambda p: np.savez(p, embedding=np.ones((2, 4), complex)),
    "no vectors": lambda p: np.savez(p, embedding=np.ones((0, 4))),
    "no width": lambda p: np.savez(p, embedding=np.ones((2, 0))),
    "another width": lambda p: np.savez(p, embedding=np.ones((2, 5))),
    "a mask of another length": lambda p: np.savez(p, embedding=np.ones((2, 4)), mask=np.ones(3)),
    "a text": lambda p: p.write_text("hello"),
}

CONDITIONS_CSV = {
    "name upwards": "name,class\n../../X,1\n",
    "name absolute": "name,class\n/nowhere/X,1\n",
    "name blank": "name,class\n,1\n",
    "name two dots": "name,class\n..,1\n",
    "name a dot": "name,class\n.,1\n",
    "name of 300 letters": f"name,class\n{'x' * 300},1\n",
    "name with NUL": "name,class\na\0b,1\n",
    "name preview": "name,class\npreview,1\n",
    "name maps/x": "name,class\nmaps/x,1\n",
    "names twice": "name,class\na,1\na,1\n",
    "empty": "",
    "a header alone": "name,class\n",
    "unknown column": "name,colour\na,red\n",
    "unknown class": "name,class\na,77\n",
    "class NaN": "name,class\na,NaN\n",
    "two class columns": "name,class,class\na,1,1\n",
    "not UTF-8": b"name,class\n\xff,1\n",
    "a cell of 200 kB": f"name,text\na,{'x' * 200_000}\n",
    "image no file": "name,image\na,nowhere.tif\n",
    "image a text": "name,image\na,data/cases.csv\n",
    "labels of another shape": "name,labels\na,sources/none.tif\n",
}


def tables() -> Iterator[Case]:
    for name, word in IDS.items():
        yield Case(f"id, {name}", VAE, ids(word))
    for name in ("absolute path", "two folders up", "folder", "two dots", "300 letters", "NUL", "line break"):
        before = [ids(IDS[name], *(f"{IDS[name]}{i}" for i in range(5))), *STAGES]
        yield Case(f"id, {name}, sampled", sample("--cases", "train", run="ldm2"), before=before)
    yield Case("an id twice", VAE, ids("a", "a"), "refuse", words="cases.csv")
    yield Case("ids that differ in case alone", VAE, ids("a", "A"))
    for absolute, what in ((True, "absolute"), (False, "relative")):
        before = [elsewhere(absolute), *STAGES]
        command = sample("--cases", "train", run="ldm2")
        yield Case(f"repeating names at {what} paths", VAE, elsewhere(absolute), "fine")
        yield Case(f"repeating names at {what} paths, sampled", command, None, "fine", before)
    for name, (damage, expect) in TABLES.items():
        yield Case(f"table, {name}", VAE, damage, expect)
    for name, make in {"link to itself": lambda p: p.symlink_to(p.name), "folder": Path.mkdir}.items():
        yield Case(f"table, a {name}", VAE, instead(TABLE, make), "refuse")
    yield Case("table, a pipe", VAE, instead(TABLE, os.mkfifo), "refuse")
    for i in range(6):
        yield Case(f"table, bit flip {i}", VAE, flip(TABLE))
    for name, (command, damage) in NAMED.items():
        yield Case(f"table, condition, {name}", command, damage)
    for name, make in EMBEDDINGS.items():
        yield Case(f"embedding, {name}", EMBEDDED, embeddings(make), "refuse", words=".npz")
    for name, content in CONDITIONS_CSV.items():
        yield Case(f"CSV of conditions, {name}", sample("--conditions", "rows.csv"), put("rows.csv", content))


# --- JSON ---------------------------------------------------------------------------------------------------


def msd(content: Any) -> Action:
    """A dataset.json in place of the table."""

    def act(box: Path, draw: np.random.Generator) -> None:
        (box / TABLE).unlink()
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        put("data/dataset.json", text)(box, draw)

    return act


PAIRS = [{"image": name, "label": name.replace("images", "labels")} for name in IMAGES]


def training(**changed: Any) -> dict[str, Any]:
    return {"training": [{**pair, **changed} for pair in PAIRS]}


MSD = {
    "as it should be": ({"training": PAIRS}, "fine"),
    "label 1": (training(label=1), "refuse"),
    "label a list": (training(label=["a"]), "refuse"),
    "label a dict": (training(label={}), "any"),
    "label true": (training(label=True), "refuse"),
    "label a number in one": ({"training": [*PAIRS[:5], {**PAIRS[5], "label": 1.5}]}, "refuse"),
    "image 1": (training(image=1), "refuse"),
    "image a list": (training(image=["images/phantom_0000.tif"]), "refuse"),
    "image null": (training(image=None), "refuse"),
    "image empty": (training(image=""), "refuse"),
    "image with NUL": (training(image="a\0b"), "refuse"),
    "words": ({"training": IMAGES}, "refuse"),
    "a dict of cases": ({"training": dict.fromkeys(IMAGES, 1)}, "refuse"),
    "a number of cases": ({"training": 5}, "refuse"),
    "a word for cases": ({"training": "images"}, "refuse"),
    "no cases": ({"training": []}, "refuse"),
    "null": ({"training": None}, "refuse"),
    "validation a number": ({"training": PAIRS, "validation": 5}, "refuse"),
    "validation the training": ({"training": PAIRS, "validation": PAIRS}, "refuse"),
    "a list": (PAIRS, "refuse"),
    "a number": ("5", "refuse"),
    "nothing": ("", "refuse"),
    "half": (json.dumps({"training": PAIRS})[:-40], "refuse"),
    "more after the end": (json.dumps({"training": PAIRS}) + "}", "refuse"),
    "deep": ('{"training": ' + DEEP + "]" * 100_000 + "}", "refuse"),
    "deep cases": ('{"training": [{"image": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}]}", "refuse"),
    "a number of 5000 digits": ('{"training": ' + "9" * 5000 + "}", "refuse"),
    "Latin-1": ('{"training": [{"image": "L\xe4sion"}]}'.encode("latin-1"), "refuse"),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"training": PAIRS}).encode(), "fine"),
    "half a surrogate": ('{"training": [{"image": "\\ud800.tif"}]}', "refuse"),
    "absolute paths": ({"training": [{"image": f"/nowhere/{i}/a.tif"} for i in range(6)]}, "refuse"),
}
FILES = {
    "empty": "",
    "a list": "[]",
    "a number": "5",
    "deep": '{"vae":' + '{"vae":' * 50_000,
    "deep and closed": '{"vae":' * 50_000 + "1" + "}" * 50_000,
    "vae a list": '{"vae": [1]}',
    "vae a number": '{"vae": 5}',
    "vae null": '{"vae": null}',
    "run null": '{"run": null, "data": null}',
    "kind": '{"kind": "ldm"}',
    "preset a list": '{"preset": []}',
    "preset upwards": '{"preset": "../../X"}',
    "channels a dict": '{"vae": {"channels": {"a": 1}}}',
    "channels words": '{"vae": {"channels": ["a"]}}',
    "channels infinite": '{"vae": {"channels": [Infinity]}}',
    "lr NaN": '{"optim": {"lr": NaN}}',
    "lr true": '{"optim": {"lr": true}}',
    "unknown key": '{"vae": {"chanels": [8]}}',
    "empty key": '{"": {"": 1}}',
    "dotted key": '{"vae.channels": [8]}',
    "Latin-1": b'{"vae": "\xe4"}',
    "a number of 5000 digits": '{"batch_size": ' + "9" * 5000 + "}",
    "seed of 30 digits": '{"run": {"seed": ' + "9" * 30 + "}}",
    "two of a key": '{"batch_size": 2, "batch_size": 3}',
}
Damage = Callable[[str], Action]  # of the file that fits a pattern
BROKEN: dict[str, Damage] = {
    "lost": delete,
    "empty": lambda file: put(file, b""),
    "half": lambda file: cut(file, 0.5),
    "a list": lambda file: put(file, "[1, 2]"),
    "null": lambda file: put(file, "null"),
    "an empty object": lambda file: put(file, "{}"),
    "deep": lambda file: put(file, '{"kind":' + DEEP),
    "not UTF-8": lambda file: put(file, b'{"tr\xe4in": [], "kind": "v\xe4e"}'),
    "a number of 5000 digits": lambda file: put(file, '{"kind": ' + "9" * 5000 + "}"),
    "a folder": lambda file: instead(file, Path.mkdir),
}
SPLITS: dict[str, Callable[[dict], Any]] = {
    "lists of numbers": lambda s: {part: [1, 2] for part in s},
    "numbers": lambda s: dict.fromkeys(s, 3),
    "nulls": dict.fromkeys,
    "a part lost": lambda s: {"train": s["train"]},
    "a part more": lambda s: s | {"more": []},
    "no training": lambda s: s | {"train": []},
    "no validation": lambda s: s | {"val": []},
    "an unknown case": lambda s: s["val"].append("../../X"),
    "a case in both parts": lambda s: s["train"].extend(s["val"]),
    "a case twice": lambda s: s["train"].append(s["train"][0]),
    "a case moved": lambda s: s["val"].append(s["train"].pop()),
}


def kind_is(kind: Any) -> Damage:
    return lambda file: edit_json(file, lambda content: content | {"kind": kind})


KINDS: dict[str, Any] = {"a list": ["vae"], "a dict": {}, "null": None, "unknown": "gan", "a number": 5}
LOGS: dict[str, bytes] = {
    "not UTF-8": b"\xff\xfe",
    "NULs": b"\0" * 4096,
    "a list": b"[1, 2]",
    "a number": b"5",
    "a step of a word": b'{"step": "x", "seconds": 1}',
    "seconds of a word": b'{"step": 1, "seconds": "x", "split": "train", "loss": 1}',
    "seconds null": b'{"step": 1, "seconds": null, "split": "train", "loss": 1}',
    "seconds NaN": b'{"step": 1, "seconds": NaN, "split": "train", "loss": 1}',
    "deep": DEEP.encode(),
    "5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
}


def settings_and_runs() -> Iterator[Case]:
    for name, (content, expect) in MSD.items():
        yield Case(f"dataset.json, {name}", VAE, msd(content), expect)
    for name, content in FILES.items():
        yield Case(f"settings, {name}", ("train_vae", "mine.json", *VAE[2:]), put("mine.json", content))
    changes = BROKEN | {k: lambda file, v=v: edit_json(file, v) for k, v in SPLITS.items()}
    for name, damage in changes.items():
        yield Case(f"split.json, {name}, going on", GO_ON["vae"], damage("vae/split.json"), "same")
    for name in ("lost", "half", "deep", "numbers", "no validation"):
        yield Case(f"split.json, {name}, sampled", sample("--cases", "val"), changes[name]("ldm/split.json"))
        segment = images_to("cdal", "--part", "val")
        yield Case(f"split.json, {name}, segmented", segment, changes[name]("cdal/split.json"))
    for i in range(4):
        yield Case(f"split.json, bit flip {i}", GO_ON["vae"], flip("vae/split.json"), "same")
    changes = BROKEN | {f"kind {name}": kind_is(kind) for name, kind in KINDS.items()}
    for i, (name, damage) in enumerate(changes.items()):
        yield Case(f"config.json, {name}, going on", GO_ON["vae"], damage("vae/config.json"))
        kind = ("vae", "ldm", "cdal")[i % 3]
        yield Case(f"config.json, {name}, used", USE[kind], damage(f"{kind}/config.json"), "same")
    for i in range(6):
        kind = ("vae", "ldm", "cdal")[i % 3]
        yield Case(f"config.json, bit flip {i}, used", USE[kind], flip(f"{kind}/config.json"), "same")
        yield Case(f"config.json, bit flip {i}, going on", GO_ON["vae"], flip("vae/config.json"))
    for name in ("lost", "empty", "half", "a folder"):
        yield Case(f"log.jsonl, {name}", GO_ON["vae"], BROKEN[name]("vae/log.jsonl"))
    for name, line in LOGS.items():
        damage = put("vae/log.jsonl", lambda data, line=line: data + line + b"\n")
        yield Case(f"log.jsonl, {name}", GO_ON["vae"], damage)
    for i in range(4):
        yield Case(f"log.jsonl, bit flip {i}", GO_ON["vae"], flip("vae/log.jsonl"))


# --- flags --------------------------------------------------------------------------------------------------

# Combinations of flags, each to be refused or to work. "" is an empty word.
VAE_FLAGS = """
--data.spacing 0.01,0.01 | --data.spacing 1e-9,1e-9 | --data.spacing 1e9,1e9 | --data.spacing nan,nan
--data.spacing 0,0 | --data.spacing 3 | --data.spacing () | --data.file_spacing 1e-30,1e-30
--data.file_spacing 1e30,1 | --data.size 100000,100000 | --data.size 1,1 | --data.size 0,0
--data.size -8,-8 | --data.size () | --data.size 16 | --data.size 1e2,16 | --data.size 16,16,16
--data.resize true --data.size 100000,100000 | --data.resize true | --data.patch 1,1
--data.patch 100000,100000 | --data.patch -1,-1 | --data.patch () | --data.patch 3,3 | --data.val_fraction 1
--data.val_fraction -1 | --data.val_fraction nan | --data.val_fraction 1e-9 | --data.test_fraction 1
--data.fold 0,1000000 | --data.fold 5,2 | --data.fold 0,0 | --data.fold -1,2 | --data.val_gap -1
--data.val_gap 1000 | --data.subset 0 | --data.subset -3 | --data.subset 1 | --data.channel 7
--data.channel -1 | --data.channel 0,0 | --data.channel 99999999999999999999 | --data.num_labels 0
--data.num_labels 1 | --data.num_labels 1000000000 | --data.num_variants 0 | --data.cache_gb -1
--data.cache_gb 0 | --data.cache_gb 1e300 | --data.cache_gb nan | --data.cache_dir /dev/null/x
--data.cache_dir data/cases.csv | --data.root data/cases.csv | --data.root "" | --data.image **
--data.image * | --data.image ../* | --data.image /etc/* | --data.image images/[ | --data.image {id}
--data.image "" | --data.image images/*/*/*/*/*.tif | --data.subject ( | --data.subject (.)(.)
--data.subject () | --data.subject data/none.csv | --data.split (x) | --data.split [
--data.table ../../etc/passwd | --data.table images | --data.table /dev/zero | --data.table ""
--data.percentiles 99,1 | --data.percentiles 50,50 | --data.percentiles nan,1 | --data.percentiles -1,200
--data.window 5,5 | --data.window nan,1 | --data.window -1e300,1e300 --data.scaling window
--data.window 0,1e-300 --data.scaling window | --data.label_values 0,0 | --data.label_values -1,5
--data.label_values 0,1,2,3,4,99999999999 | --data.augment.affine 2
--data.augment.affine 1 --data.augment.max_scale 5 | --data.augment.affine 1 --data.augment.max_rotation 1e9
--data.augment.affine 1 --data.augment.max_scale 1 | --data.augment.affine 1 --data.augment.max_shift 1e9
--data.augment.elastic 1 --data.augment.max_elastic 1e9
--data.augment.elastic 1 --data.augment.max_elastic -1 | --data.augment.flip_axes 5
--data.augment.flip_axes -1 | --data.augment.flip_axes () | --data.augment.flip_axes none
--data.augment.flip_axes "" | --data.augment.flip_axes 0,0 | --data.augment.rot90_axes 0
--data.augment.rot90_axes 0,0 | --data.augment.intensity 1 --data.augment.max_gain 1e30
--data.foreground 2 | --data.dims 4 | --data.dims 2.0 | --vae.latent_channels 0 | --vae.latent_channels -1
--vae.latent_channels 1000000000 | --vae.channels 0,0 | --vae.channels -8,16 | --vae.channels ()
--vae.channels none | --vae.channels "" | --vae.channels 8 | --vae.channels 8,8,8,8,8,8,8,8,8,8,8,8
--vae.channels 100000000,100000000 | --vae.channels 7,13 | --vae.channels [[ | --vae.channels [8,16
--vae.num_res_blocks () | --vae.num_res_blocks 0 | --vae.num_res_blocks -1 | --vae.num_res_blocks 1,1,1,1
--vae.attention_levels () | --vae.attention_levels true,true,true
--vae.attention_levels maybe | --vae.strides () | --vae.strides [[3,3]] | --vae.strides [[1,1]]
--vae.strides [[0,0]] | --vae.strides 2 | --vae.strides [[2]] | --vae.strides [[2,2],[2,2]] | --vae.stem ()
--vae.stem 0 | --vae.stem 3 | --vae.stem 2,2,2 | --vae.num_groups 0 | --vae.num_groups -4
--vae.num_groups 1000 | --vae.gn_eps 0 | --vae.gn_eps -1 | --vae.gn_eps nan | --vae.gn_eps 1e300
--vae.in_channels 0 | --vae.in_channels 2 | --batch_size 0 | --batch_size -1 | --batch_size 1e3
--batch_size 1.5 | --micro_batch_size 0 | --micro_batch_size 3
--micro_batch_size 100 | --micro_batch_size -1 | --kl_weight nan | --kl_weight inf | --kl_weight -1
--kl_weight 1e300 | --kl_warmup -5 | --free_bits -1 | --free_bits 1e300 | --gradient_weight -1
--gradient_weight 1e300 | --structure_weight 1 | --perceptual_weight 1
--perceptual_weight 1 --perceptual.weights data/cases.csv | --perceptual_weight -1
--disc_weight 1 --disc_start 0 --disc.num_layers 9 | --disc_weight 1 --disc_start 0 --disc.num_layers 0
--disc_weight 1 --disc_start 0 --disc.num_layers -1 | --disc_weight 1 --disc_start 0 --disc.num_layers 60
--disc_weight 1 --disc_start 0 --disc.channels 0 | --disc_weight 1 --disc_start 0 --disc.channels -4
--disc_weight 1 --disc_start -5 --disc.channels 4 --disc.num_layers 1
--disc_weight 1 --disc_ramp -5 --disc_start 0 --disc.num_layers 1
--disc_weight -1 --disc_start 0 --disc.num_layers 1
--r1_every 0 --r1_weight 1 --disc_weight 1 --disc_start 0 --disc.num_layers 1
--disc_cap nan --disc_weight 1 --disc_start 0 --disc.num_layers 1
--autoencoder vq --quantizer.codebook_size 0 | --autoencoder vq --quantizer.codebook_size 1000000000000
--autoencoder vq --quantizer.decay 1 | --autoencoder vq --quantizer.kmeans_steps -1
--run.steps 0 | --run.steps -1 | --run.steps 1e100
--run.seed -1 | --run.seed 99999999999999999999999 | --run.seed 1.5 | --run.device abacus
--run.device cuda:99 | --run.device meta | --run.device "" | --run.device cpu:7 | --run.amp fp8
--run.amp fp16 | --run.amp bf16 | --run.workers -1 | --run.workers 1 | --run.keep 0 | --run.init none
--run.init nowhere | --run.init data | --run.init ldm | --run.init vae/config.json
--run.init vae --vae.latent_channels 5 | --run.save_every 0 | --run.log_every 0 | --run.eval_every -1
--run.ema_decay 1 | --run.ema_decay nan | --run.max_bad_steps 0 | --run.patience -1 | --run.dir data
--run.dir data/cases.csv | --run.dir /dev/null/x | --run.dir /proc/x | --run.fresh maybe
--run.dir data --run.fresh true | --optim.lr 0 | --optim.lr nan | --optim.lr inf | --optim.lr 1e300
--optim.lr -1 | --optim.adam_betas 1,1 | --optim.adam_betas 0.9 | --optim.adam_betas nan,0
--optim.adam_betas () | --optim.weight_decay nan | --optim.weight_decay 1e300 | --optim.warmup_steps -1
--optim.schedule step | --optim.schedule multistep | --optim.milestones -1,5 --optim.schedule multistep
--optim.gamma 0 | --optim.grad_clip 0 | --optim.grad_clip nan
--optim.lr_scaling linear --optim.reference_batch_size 0 | --plan --memory 0
--plan --memory -1 | --plan --memory nan | --plan --memory 1e300 | --plan --memory 0.0001
--memory 8 | --hours 1 | --hours nan | --plan maybe | --reconstruction l3
--preset x | --run | --vae | --no.such.thing 1 | --run.stepz 3 | -x
extra | --help=1 | --run.steps | --run.steps= | --=1 | -- | --preset hippocampus"""
LDM_FLAGS = """
--vae nowhere | --vae data | --vae ldm | --vae vae/config.json | --vae "" | --unet.channels 0,0
--unet.channels () | --unet.channels -8,16 | --unet.channels 8,8,8,8,8,8,8,8
--unet.channels 100000000,100000000 | --unet.head_channels 0 | --unet.head_channels 7
--unet.head_channels -8 | --unet.num_groups 0 | --unet.num_res_blocks () | --unet.num_res_blocks 0
--unet.attention_levels () | --unet.strides () | --unet.in_channels 7 | --unet.out_channels 7
--unet.dims 3 | --unet.dropout 1 | --unet.context_dim 0 | --unet.context_dim -5 | --unet.context_dim 16
--kernel.num_timesteps 0 | --kernel.num_timesteps 1 | --kernel.num_timesteps -5
--kernel.num_timesteps 10000000000 | --kernel.process gan | --kernel.process vp --kernel.prediction velocity
--kernel.prediction eps | --kernel.process vp --kernel.prediction eps --kernel.beta_start 0
--kernel.process vp --kernel.prediction v --kernel.beta_end 5
--kernel.process vp --kernel.prediction v --kernel.beta_start 1 --kernel.beta_end 0.5
--kernel.process vp --kernel.prediction v --kernel.beta_end nan
--kernel.process vp --kernel.prediction eps --kernel.schedule cosine
--kernel.process vp --kernel.prediction eps --kernel.zero_terminal_snr true
--kernel.process vp --kernel.prediction v --kernel.min_snr_gamma 0
--kernel.process vp --kernel.prediction v --kernel.min_snr_gamma -5
--kernel.process vp --kernel.prediction v --kernel.clip_x_start -1 | --kernel.min_snr_gamma 5
--kernel.flow_shift 0 | --kernel.flow_shift -1 | --kernel.flow_shift 1e300 | --kernel.flow_shift nan
--kernel.t_distribution logit_normal --kernel.logit_std 0
--kernel.t_distribution logit_normal --kernel.logit_std -1
--kernel.t_distribution logit_normal --kernel.logit_mean 1e300 | --condition.use nothing
--condition.use class,class | --condition.use "" | --condition.use () | --condition.use number
--condition.use number:text | --condition.use embedding:text
--condition.use text --condition.text_length 0 | --condition.use text --condition.text_length -1
--condition.use text --condition.context_dim 0 | --condition.use text --condition.context_dim -16
--condition.use text --condition.context_dim 7 | --condition.use text --condition.text_layers -1
--condition.use text --condition.text_layers 0 | --condition.use text --condition.text_min_count 1000
--condition.use class --condition.dropout 2 | --condition.use class --condition.dropout ()
--condition.use class --condition.dropout 0.1,0.2 | --condition.use class --condition.dropout nan
--condition.dropout_all 2 | --condition.dropout_all -1 | --condition.use image,tokens
--condition.use spacing | --anatomy.registers bound --anatomy.dim 0
--anatomy.registers bound --anatomy.dim 7 | --anatomy.registers bound --anatomy.per_label 0
--anatomy.registers bound --anatomy.per_label 1000000000 | --anatomy.registers bound --anatomy.head_width 0
--anatomy.registers bound --anatomy.weights 1,2 | --anatomy.registers bound --anatomy.phases 0.9,0.5,0.1
--anatomy.registers bound --unet.attention_levels false
--anatomy.registers bound --anatomy.head_balance 1e9 | --anatomy.weights nan,nan,nan | --sample_steps 0
--sample_steps 100000 | --latent_cache maybe | --data.num_variants 1000000000 --data.augment.affine 1
--data.root nowhere | --data.spacing 0.01,0.01 | --data.size 100000,100000 | --data.size 1,1
--data.size 3,3 | --data.scaling minmax | --data.channel 1 | --data.dims 3 | --batch_size 0
--micro_batch_size 3 | --plan --memory 0 | --plan --memory nan | --run.init vae | --run.init ldm
--run.init ldm/best.pt --unet.channels 8,24 | --optim.lr nan | --optim.lr 1e300 | --run.dir vae
--run.dir data | --run.seed -1"""
CDAL_FLAGS = """
--votes 0 | --votes -1 | --votes 1000000000 | --window 0,0 | --window () | --window 3
--window 100000,100000 | --window 5,5 | --generator.encoder_channels 0 | --generator.encoder_blocks -1
--generator.latent_dim -1 | --generator.latent_dim 1000000000 | --generator.mapping_layers -1
--generator.stem 3 | --generator.stem () | --unet.channels () | --unet.channels 0,0 | --unet.head_channels 7
--disc.channels () | --disc.channels 0 | --disc.channels 8,8,8,8,8,8,8,8,8 | --disc.emb_dim 0
--disc.emb_dim 7 | --disc.emb_dim -1 | --cdal.kernel.num_steps 0 | --cdal.kernel.num_timesteps 0
--cdal.kernel.num_timesteps 1 | --cdal.noisiest 2 | --cdal.noisiest -1 | --cdal.noisiest nan
--cdal.r1_every 0 | --cdal.r1_weight nan | --cdal.attention_layer 99 | --cdal.attention_layer -99
--cdal.mse_weight nan | --cdal.ce_weight -1
--cdal.ce_weight 0 --cdal.dice_weight 0 --cdal.adversarial_weight 0 | --cdal.adversarial_weight 1e300
--data.patch 1,1 | --data.patch 100000,100000 | --data.patch -4,4 | --data.patch 12 | --data.num_labels 2
--data.label_values 0,1 | --data.num_labels 1000000000 | --data.foreground nan | --data.mask none
--data.allow_missing_mask maybe | --data.spacing 0.01,0.01 | --batch_size 0 | --plan --memory 0
--run.steps 0 | --optim.lr 1e300 | --run.init vae | --run.dir vae"""
SAMPLE_FLAGS = """
--num 0 | --num -1 | --num 1000000000000 | --steps 0 | --steps -1 | --steps 1.5 | --seed -1
--seed 99999999999999999999999 | --sampler magic | --sampler ddim | --sampler ddpm | --eta 0.5 | --eta nan
--eta -1 | --batch_size 0 | --batch_size -1 | --batch_size 1000000000 | --device abacus | --device meta
--amp fp8 | --amp fp16 | --amp bf16 | --format jpg | --format nii.gz | --out data | --out data/cases.csv
--out /dev/null/x | --out "" | --plan --memory 0 | --plan --memory nan | --maps true
--with_labels true | --registers maybe
--registers false | --condition class | --condition class=77 | --condition class= | --condition =1
--condition class=1 --condition class=2 | --condition colour=red | --condition class=nan | --condition text=
--condition image=nowhere.tif | --condition image=data | --condition image=data/cases.csv
--condition image=/dev/zero | --condition labels=nowhere.tif
--condition labels=data/sources/phantom_0000.tif | --condition labels=data/cases.csv
--conditions nowhere.csv | --conditions data | --conditions /dev/zero | --conditions data/cases.csv
--guidance nan | --guidance inf | --guidance 1e300 | --guidance -5 | --guidance "" | --guidance a=b
--guidance class= | --guidance class=3,class=4 | --guidance colour=3 | --guidance class=nan
--guidance text=2,class=3 | --guidance 3 --guidance 4 | --guidance_rescale 2 | --guidance_rescale -1
--guidance_rescale nan | --guidance_interval 1,0 | --guidance_interval -1,2 | --guidance_interval nan,1
--guidance_interval 0.5 | --cases all | --cases test | --cases val --condition class=1
--inpaint data/images/phantom_0000.tif | --region data/labels/phantom_0000.tif
--inpaint nowhere.tif --region nowhere.tif | --inpaint data/images/phantom_0000.tif --region nowhere.tif
--inpaint data/images/phantom_0000.tif --region data/images/phantom_0000.tif
--inpaint data/images/phantom_0000.tif --region data/labels/phantom_0000.tif
--inpaint data/images/phantom_0000.tif --region data/labels/phantom_0000.tif --strength 0
--edit data/images/phantom_0000.tif --strength 2 | --edit data/images/phantom_0000.tif --strength nan
--edit data/images/phantom_0000.tif --strength 1e-30 | --edit data | --edit /dev/zero
--edit data/cases.csv | --strength 0.5 | --interpolate 3 | --interpolate 3,7 | --interpolate 3,7 --num 3
--interpolate a,b --num 3 | --interpolate 3,a --num 3 | --interpolate -1,2 --num 3
--interpolate 1,2,3 --num 3 | --interpolate 99999999999999999999999,1 --num 3 | --interpolate ²,³ --num 3
--interpolate "" | --interpolate , --num 3 | --interpolate data,data --num 3 | --votes 3 | extra words
--help=3"""
CDAL_USE_FLAGS = """
--votes 0 | --votes 1000000000000 | --window 0,0 | --window 3 | --window 100000,100000 | --window ()
--overlap 1 | --overlap -1 | --overlap nan | --overlap 0.999999 | --reference nowhere
--reference data/images | --reference data/labels | --reference data/cases.csv | --part test | --part train
--part all --seed -1 | --batch_size 0 | --seed 99999999999999999999999 | --probabilities maybe
--flips | --ensemble nowhere | --ensemble () | --every_vote --flips"""
FIRST_WORDS = (
    [],
    [""],
    ["phantm"],
    ["nowhere.json"],
    ["--help=1"],
    ["-1"],
    ["\udcff"],
)  # a folder is planned


def combinations(text: str) -> list[list[str]]:
    found = [part.split() for line in text.split("\n") for part in line.split("|") if part]
    return [["" if word == '""' else word for word in words] for words in found]


def flags_of(text: str, make: Callable[..., tuple[str, ...]], what: str) -> Callable[[], Iterator[Case]]:
    def area() -> Iterator[Case]:
        for words in combinations(text):
            yield Case(" ".join([what, *words]), make(*words))
        for words in FIRST_WORDS if make != segment else ():
            script = make()[0]
            yield Case(f"{script}, first words {words}", (script, *words), expect="refuse")

    return area


def segment(*words: str) -> tuple[str, ...]:
    return images_to("cdal", *words)


# --- checkpoints --------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FOREIGN = {
    "code": pickled({"format": 1, "kind": "vae", "x": Evil()}),
    "a plain pickle": pickle.dumps({"format": 1, "kind": "vae"}),
    "a text": b"weights\n",
    "a ZIP of nothing": b"PK\x05\x06" + b"\0" * 18,
    "a tensor": pickled(torch.zeros(3)),
    "a list": pickled([1, 2]),
    "an empty dict": pickled({}),
    "a foreign dict": pickled({"state_dict": {"a": torch.zeros(3)}}),
    "a format a word": pickled({"format": "1", "kind": "vae"}),
    "a newer format": pickled({"format": 99, "kind": "vae"}),
    "a kind a list": pickled({"format": 1, "kind": ["vae"]}),
    "a kind alone": pickled({"format": 1, "kind": "vae"}),
}


def without(part: str, *more: str) -> Callable[[dict], None]:
    """A part of the content is lost: without("state", "data") deletes content["state"]["data"]."""

    def change(content: dict) -> None:
        path = (part, *more)
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Callable[[dict], None]:
    """A part of the content gets another value, or what value(part) returns."""

    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value(content[path[-1]]) if callable(value) else value

    return change


CONTENT = {
    "step below 0": with_value(-5, "step"),
    "step 1.5": with_value(1.5, "step"),
    "step a billion": with_value(10**9, "step"),
    "best empty": with_value({}, "best"),
    "best NaN": with_value({"name": "psnr", "value": NAN, "step": 2}, "best"),
    "no split in the state": without("state", "split"),
    "no data in the state": without("state", "data"),
    "data of another size": with_value([8, 8], "state", "data", "size"),
    "an unknown key of data": with_value(1, "state", "data"),
    "an unknown setting": with_value(lambda c: c | {"colour": 1}, "config"),
    "a setting of a wrong type": with_value("many", "config", "batch_size"),
    "config.vae a number": with_value(5, "config", "vae"),
    "config.run null": with_value(None, "config", "run"),
    "no optimizer": without("optimizers", "autoencoder"),
    "an optimizer empty": with_value({}, "optimizers", "autoencoder"),
    "no means": without("others", "mean"),
    "means empty": with_value({}, "others", "mean"),
    "weights NaN": with_value(lambda m: {k: v * NAN for k, v in m.items()}, "model"),
    "average NaN": with_value(lambda m: {k: v * NAN for k, v in m.items()}, "ema"),
    "weights of doubles": with_value(lambda m: {k: v.double() for k, v in m.items()}, "model"),
    "weights of integers": with_value(lambda m: {k: v.int() for k, v in m.items()}, "model"),
    "weights of another shape": with_value(lambda m: {k: v[..., None] for k, v in m.items()}, "model"),
    "weights lists": with_value(lambda m: {k: [1] for k in m}, "model"),
    "a weight more": with_value(lambda m: m | {"more": torch.zeros(3)}, "model"),
    "a weight less": with_value(lambda m: dict(list(m.items())[1:]), "model"),
}
STATISTICS = {
    "latent_std 0": with_value(lambda v: v * 0, "state", "latent_std"),
    "latent_std NaN": with_value(lambda v: v * NAN, "state", "latent_std"),
    "latent_mean a list": with_value([0, 0, 0], "state", "latent_mean"),
    "latent_mean of another length": with_value(torch.zeros(7), "state", "latent_mean"),
    "no latent_mean": without("state", "latent_mean"),
}
LDM_CONTENT = STATISTICS | {
    "no data": without("state", "data"),
    "data a list": with_value([1], "state", "data"),
    "size below 0": with_value([-4, 16], "state", "data", "size"),
    "size enormous": with_value([100000, 100000], "state", "data", "size"),
    "size of words": with_value(["a", "b"], "state", "data", "size"),
    "spacing 0": with_value([0.0, 0.0], "state", "data", "spacing"),
    "spacing NaN": with_value([NAN] * 2, "state", "data", "spacing"),
    "low NaN": with_value([NAN], "state", "data", "low"),
    "orientation a word": with_value("QQ", "state", "data", "orientation"),
    "num_labels 99": with_value(99, "state", "data", "num_labels"),
    "conditions a word": with_value("class", "state", "conditions"),
    "a condition without a kind": with_value([{"name": "class"}], "state", "conditions"),
    "a condition of an unknown kind": with_value([{"kind": "smell", "name": "smell"}], "state", "conditions"),
    "no conditions": with_value([], "state", "conditions"),
    "weights NaN": with_value(lambda m: {k: v * NAN for k, v in m.items()}, "ema"),
    "weights enormous": with_value(lambda m: {k: v * 1e30 for k, v in m.items()}, "ema"),
    "weights lists": with_value(lambda m: {k: [1] for k in m}, "ema"),
    "weights of another shape": with_value(lambda m: {k: v[..., None] for k, v in m.items()}, "ema"),
    "unet a word": with_value("x", "config", "unet"),
    "channels of the U-Net empty": with_value([], "config", "unet", "channels"),
    "more channels of the U-Net": with_value([8, 24], "config", "unet", "channels"),
    "num_timesteps 0": with_value(0, "config", "kernel", "num_timesteps"),
}


def checkpoints() -> Iterator[Case]:
    newest, best, own = "vae/checkpoint_*.pt", "vae/best.pt", "ldm/autoencoder.pt"
    uses = {  # name: (file, command)
        "checkpoint, going on": (newest, GO_ON["vae"]),
        "best.pt, reconstructing": (best, USE["vae"]),
        "best.pt, sampling": ("ldm/best.pt", USE["ldm"]),
        "best.pt, stage two": (best, LDM),
        "autoencoder.pt, sampling": (own, USE["ldm"]),
    }
    for name, (file, command) in uses.items():
        for i in range(6):
            yield Case(f"{name}, bit flip {i}", command, flip(file), "same")
        for share in (0.0, 0.3, 0.9, -1, -30):
            yield Case(f"{name}, cut {share}", command, cut(file, share), "same")
    run_of_file = ("sample", best, "data/images", "--out", "out")
    for name, data in FOREIGN.items():
        yield Case(f"checkpoint, {name}, as a run", run_of_file, put(best, data), "refuse")
        yield Case(f"checkpoint, {name}, going on", GO_ON["vae"], put(newest, data), "refuse")
        yield Case(
            f"checkpoint, {name}, to begin with", train_vae("--run.init", "x.pt"), put("x.pt", data), "refuse"
        )
    for name in ("a folder", "a pipe", "a device"):
        yield Case(f"best.pt {name}", USE["vae"], instead(best, NO_IMAGES[name]), "refuse")
    for part in ("config", "state", "model", "ema", "optimizers", "others", "step", "best"):
        lost, word = edit_checkpoint(newest, without(part)), edit_checkpoint(newest, with_value("x", part))
        yield Case(f"checkpoint without {part}", GO_ON["vae"], lost, "refuse")
        yield Case(f"checkpoint, {part} a word", GO_ON["vae"], word, "refuse")
    for kind in ("vae", "ldm", "cdal"):
        for part in ("config", "state", "ema", "step"):
            lost = edit_checkpoint(f"{kind}/best.pt", without(part))
            numbers = edit_checkpoint(f"{kind}/best.pt", with_value([1], part))
            yield Case(f"best.pt of {kind} without {part}", USE[kind], lost)
            yield Case(f"best.pt of {kind}, {part} a list", USE[kind], numbers)
    for name, change in CONTENT.items():
        yield Case(f"checkpoint, {name}", GO_ON["vae"], edit_checkpoint(newest, change))
    for name, change in {"without best": without("best"), "best null": with_value(None, "best")}.items():
        yield Case(f"best.pt {name}, going on", GO_ON["vae"], edit_checkpoint(best, change))
    for name, change in LDM_CONTENT.items():
        yield Case(f"best.pt of ldm, {name}", USE["ldm"], edit_checkpoint("ldm/best.pt", change))
    for name, change in STATISTICS.items():
        damage = edit_checkpoint("ldm/checkpoint_*.pt", change)
        yield Case(f"checkpoint of ldm, {name}", GO_ON["ldm"], damage, "refuse", words="latent_")
    for part in ("best.pt", "autoencoder.pt", "checkpoint_0000002.pt"):
        yield Case(f"{part} lost, used", USE["ldm"], delete(f"ldm/{part}"))
        yield Case(f"{part} lost, going on", GO_ON["ldm"], delete(f"ldm/{part}"))


# --- latents and caches -------------------------------------------------------------------------------------

MEAN, KEPT = "ldm/latents/train-*/mean*.npy", "scans/volumes/*.bricks"
SCAN, DISK = ("--data.cache_dir", "scans"), ("--data.cache", "disk", "--data.cache_dir", "scans")
ARRAYS = {
    "empty": b"",
    "a text": b"hello",
    "objects": saved(np.array([None, {}], dtype=object)),
    "of another shape": saved(np.zeros((2, 2), np.float32)),
    "of one number": saved(np.float32(1)),
    "of integers": saved(np.zeros((1, 1, 3, 4, 4), np.int8)),
    "of words": saved(np.array(["a"])),
}


def entries(change: Callable[[list], Any]) -> Callable[[bytes], bytes]:
    """Each entry [size, time, what was found] of a file, in the scan's JSON, is changed."""

    def act(data: bytes) -> bytes:
        content = json.loads(data)
        content["files"] = {file: change(entry) for file, entry in content["files"].items()}
        return json.dumps(content).encode()

    return act


SCANS = {
    "empty": b"",
    "half": lambda data: data[: len(data) // 2],
    "a list": b"[]",
    "a number": b"5",
    "deep": DEEP.encode(),
    "not UTF-8": b'{"\xff": 1}',
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "entries numbers": entries(lambda entry: 5),
    "entries empty": entries(lambda entry: []),
    "entries short": entries(lambda entry: entry[:2]),
    "findings a number": entries(lambda entry: [*entry[:2], 5]),
    "findings empty": entries(lambda entry: [*entry[:2], {}]),
    "findings words": entries(lambda entry: [*entry[:2], {k: ["a"] for k in ("low", "high", "labels")}]),
    "findings null": entries(lambda entry: [*entry[:2], dict.fromkeys(("low", "high", "labels"))]),
    "findings NaN": entries(lambda entry: [*entry[:2], {"low": [NAN], "high": [1.0], "labels": [0]}]),
}


def caches() -> Iterator[Case]:
    for name, data in ARRAYS.items():
        yield Case(f"latents {name}", GO_ON["ldm"], put(MEAN, data), "same")
    for share in (0.0, 0.1, 0.6, -1, -4):
        yield Case(f"latents cut, {share}", GO_ON["ldm"], cut(MEAN, share), "same")
    for i in range(6):
        yield Case(f"latents, bit flip {i} in the header", GO_ON["ldm"], flip(MEAN, 0, 128))
    for i in range(2):
        yield Case(f"latents, bit flip {i}", GO_ON["ldm"], flip(MEAN, 128, 1e9))
    for name in ("mean", "logvar", "labels", "mask", "source"):
        yield Case(
            f"latents without {name}", GO_ON["ldm"], delete(f"ldm/latents/train-*/{name}*.npy"), "same"
        )
        yield Case(f"latents cut, {name}", GO_ON["ldm"], cut(f"ldm/latents/val-*/{name}*.npy", 0.5), "same")
    yield Case("latents NaN", GO_ON["ldm"], put(MEAN, lambda d: d[:128] + b"\xff" * (len(d) - 128)))
    yield Case("latents a folder", GO_ON["ldm"], instead(MEAN, Path.mkdir))
    before, command = [train_vae(*SCAN, run="before")], train_vae(*SCAN)
    for name, data in SCANS.items():
        yield Case(f"findings of the scan, {name}", command, put("scans/scan-*.json", data), "right", before)
    for i in range(4):
        name = f"findings of the scan, bit flip {i}"
        yield Case(name, command, flip("scans/scan-*.json"), "any", before)
    before, command = [train_vae(*DISK, run="before")], train_vae(*DISK)
    for name, data in ARRAYS.items():
        yield Case(f"kept volume {name}", command, put(KEPT, data), "same", before)
    for share in (0.0, 0.1, 0.6, -1):
        yield Case(f"kept volume cut, {share}", command, cut(KEPT, share), "same", before)
    for i in range(4):
        yield Case(f"kept volume, bit flip {i} in the header", command, flip(KEPT, 0, 128), "any", before)
    yield Case("kept volume a folder", command, instead(KEPT, Path.mkdir), "same", before)


# --- conditions and edits of samples ------------------------------------------------------------------------

GIVEN = {  # what is given: (its file, the command)
    "source": ("data/sources/phantom_0005.tif", "--condition", "image={}"),
    "label map": ("data/labels/phantom_0005.tif", "--condition", "labels={}"),
    "edited image": ("data/images/phantom_0005.tif", "--edit", "{}"),
}
VOXELS: dict[str, Make] = {
    "NaN": lambda a: np.full(a.shape, np.nan, np.float32),
    "infinite": lambda a: np.full(a.shape, np.inf, np.float32),
    "enormous": lambda a: a.astype(np.float32) + 1e37,
    "of one voxel": lambda a: a[:1, :1],
    "of three channels": lambda a: np.stack([a] * 3),
    "below 0": lambda a: -1 - a.astype(np.int16),
    "of one value": lambda a: a * 0,
}


def given_files() -> Iterator[Case]:
    for what, (file, flag, value) in GIVEN.items():
        command = sample(flag, value.format(file))
        for share in (0.0, 0.5):
            yield Case(f"{what} cut, {share}", command, cut(file, share), "refuse", words="phantom_0005")
        for name, change in VOXELS.items():

            def damage(box: Path, draw: np.random.Generator, file: str = file, change: Make = change) -> None:
                array = change(tifffile.imread(box / file))
                tifffile.imwrite(box / file, array, photometric="minisblack")

            yield Case(f"{what} {name}", command, damage)


# --- the test -----------------------------------------------------------------------------------------------

AREAS: dict[str, Callable[[], Iterator[Case]]] = {
    "pictures": pictures,
    "arrays": arrays,
    "volumes": volumes,
    "damaged data": damaged_data,
    "tables": tables,
    "settings and runs": settings_and_runs,
    "flags of train_vae": flags_of(VAE_FLAGS, train_vae, "train_vae"),
    "flags of train_ldm": flags_of(LDM_FLAGS, train_ldm, "train_ldm"),
    "flags of train_cdal": flags_of(CDAL_FLAGS, train_cdal, "train_cdal"),
    "flags of sample": flags_of(SAMPLE_FLAGS, sample, "sample"),
    "flags of segmenting": flags_of(CDAL_USE_FLAGS, segment, "segment"),
    "checkpoints": checkpoints,
    "caches": caches,
    "given files": given_files,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("hostile") / "box")


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_a_hostile_input_ends_in_one_line_or_in_a_right_result(area, template, tmp_path):
    cases = list(AREAS[area]())
    assert len({case.name for case in cases}) == len(cases)
    broken = {case.name: broken_demand(case, template, tmp_path / "place") for case in cases}
    assert {name: why for name, why in broken.items() if why} == {}
