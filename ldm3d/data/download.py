"""Public data sets by name: downloaded, verified and unpacked to where the presets look for them.

    python -m ldm3d.data list
    python -m ldm3d.data download hippocampus                to $LDM3D_DATA/hippocampus, else data/hippocampus
    python -m ldm3d.data download hippocampus --to FOLDER    to FOLDER/hippocampus

A download that was cut goes on where it was, in the same call and in the next. The archive is compared with
its checksum, and unpacked into a temporary folder that is renamed at the end: the data are there completely
or not at all. Archives are not trusted: none can write outside that folder, make links, or fill the disk.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from ..config import InputError
from ..engine.checkpoint import is_occupied

MIB, TRIES, PAUSE, TIMEOUT = 2**20, 5, 1.0, 60.0  # attempts without progress; seconds
MAX_RATIO, ALWAYS_ALLOWED = 10, 2**30  # bytes unpacked, as a multiple of the archive; or this many
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
SMALLEST = 4096  # bytes that a member counts as at least: empty files fill a disk too
BAR = {"disable": None, "leave": False}


@dataclass(frozen=True)
class Archive:
    """A file on the internet that holds a data set."""

    url: str
    md5: str | None  # None: not known for certain
    licence: str
    citation: str


DECATHLON = (
    "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0",
    "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13:4128, 2022",
)
MEDMNIST = (
    "CC BY 4.0, https://creativecommons.org/licenses/by/4.0",
    "Yang et al., MedMNIST v2, Scientific Data 10:41, 2023",
)
TASKS = {  # of the decathlon; the sums stand in MONAI's monai/apps/datasets.py
    "brats": ("Task01_BrainTumour", "240a19d752f0d9e9101544901065d872"),
    "heart": ("Task02_Heart", "06ee59366e1e5124267b774dbd654057"),
    "liver": ("Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397"),
    "hippocampus": ("Task04_Hippocampus", "9d24dba78a72977dbd1d2e110310f31b"),
    "prostate": ("Task05_Prostate", "35138f08b1efaef89d7424d2bcc928db"),
    "lung": ("Task06_Lung", "8afd997733c7fc0432f71255ba4e52dc"),
    "pancreas": ("Task07_Pancreas", "4f7080cfca169fa8066d17ce6eb061e4"),
    "hepatic-vessel": ("Task08_HepaticVessel", "641d79e80ec66453921d997fbf12a29c"),
    "spleen": ("Task09_Spleen", "410d4a301da4e5b2f6f86ec3ddba524e"),
    "colon": ("Task10_Colon", "bad7a188931dc2f6acf72b08eb6202d0"),
}
CLASSES = {  # 64 x 64 x 64 voxels and a class each; the sums stand in MedMNIST's medmnist/info.py
    "adrenal": ("adrenalmnist3d_64", "17721accfe9fb005146a47d33bc54b2f"),
    "nodule": ("nodulemnist3d_64", "c47c5b7d457bf6332200d2ea6d64ecd8"),
    "organ": ("organmnist3d_64", "58a2205adf14a9d0a189cb06dc78bf10"),
    "synapse": ("synapsemnist3d_64", "43bd14ebf3af9d3dd072446fedc14d5e"),
    "vessel": ("vesselmnist3d_64", "6bb274a8846e1097066dcd64e2c4520f"),
}
BUCKET, RECORD = (
    "https://msd-for-monai.s3-us-west-2.amazonaws.com",
    "https://zenodo.org/records/10519652/files",
)
ARCHIVES = {name: Archive(f"{BUCKET}/{file}.tar", md5, *DECATHLON) for name, (file, md5) in TASKS.items()}
ARCHIVES |= {name: Archive(f"{RECORD}/{file}.npz", md5, *MEDMNIST) for name, (file, md5) in CLASSES.items()}


# --- bytes --------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What the server said of the file that is being downloaded, kept beside the bytes that have come."""

    url: str = ""
    tag: str | None = None  # changes when the file changes: ETag, else Last-Modified
    total: int | None = None  # bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_notes(part: Path) -> _Known:
    try:
        return _Known(*json.loads(_notes(part).read_text()))
    except (OSError, ValueError, TypeError):
        return _Known()


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; the same command goes on from there")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: needs {needed / MIB:.1f} MiB, has {free / MIB:.1f} free; --to names another place"
        )


def _start_and_total(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where in the file the answer begins, and how long the file is; None: the server does not say."""
    length = response.headers["Content-Length"]
    if response.status != 206:
        return 0, int(length) if length and length.isdecimal() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
    if match is None:
        raise http.client.HTTPException(f"unknown Content-Range {response.headers['Content-Range']!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _receive(url: str, part: Path) -> bool:
    """One connection: adds what comes to `part`. Is the file complete now?

    The server is asked for the bytes that are missing. It may answer with all of them, or its file may have
    changed since: then the download starts anew.
    """
    known = _read_notes(part)
    have = _size(part) if known.url == url else 0
    if have and have == known.total:
        return True
    headers = {"User-Agent": "ldm3d", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.tag and not known.tag.startswith("W/"):
            headers["If-Range"] = known.tag
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        start, total = _start_and_total(response)
        now = _Known(url, response.headers["ETag"] or response.headers["Last-Modified"], total)
        if start and (start != have or now != known):
            part.unlink()
            return False
        _check_room(part.parent, (total or 0) - start)
        with tqdm(None, part.name, total, initial=start, unit="B", unit_scale=True, **BAR) as bar:
            try:
                with open(part, "ab" if start else "wb") as file:
                    _notes(part).write_text(json.dumps(now))
                    for data in _chunks(response):
                        file.write(data)
                        bar.update(len(data))
            except _Cut as cut:
                raise cut.__cause__ from None
            except OSError as error:  # of the disk: those of the network are a _Cut
                raise _cannot_write(part, error) from error
    return total is None or _size(part) == total


class _Cut(Exception):
    """The network failed while an answer was read."""


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while data := response.read(MIB):
            yield data
    except (OSError, http.client.HTTPException) as error:
        raise _Cut from error


def fetch(url: str, part: Path) -> None:
    """Downloads `url` to the file `part`, going on with what is there. InputError if this is not possible."""
    tries, most = 0, _size(part)
    while True:
        try:
            if _receive(url, part):
                return
            reason = "the connection was cut"
        except HTTPError as error:
            if error.code == 416:  # fewer bytes than have come: another file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise InputError(f"{url}: {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # an HTTPError is one too, hence the order
            cause = error.reason if isinstance(error, URLError) else error
            if most == 0 and isinstance(cause, (socket.gaierror, ConnectionRefusedError)):
                raise InputError(f"cannot reach {url} ({cause}); is this machine on the internet?") from error
            reason = str(cause) or type(cause).__name__
        tries = 0 if _size(part) > most else tries + 1
        most = max(most, _size(part))
        if tries == TRIES:
            raise InputError(
                f"cannot download {url}: {reason}; {_size(part) / MIB:.1f} MiB are kept, and the same "
                "command goes on from there"
            )
        time.sleep(PAUSE * 2 ** min(tries, TRIES))


def verify(path: Path, md5: str | None) -> None:
    """Compares a file with its checksum; says its SHA-256 if none is known. InputError if they differ."""
    digest = hashlib.md5(usedforsecurity=False) if md5 else hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(None, "verifying", _size(path), unit="B", unit_scale=True, **BAR) as bar,
    ):
        while data := file.read(MIB):
            digest.update(data)
            bar.update(len(data))
    if md5 is None:
        print(f"unverified: no checksum is known; SHA-256 {digest.hexdigest()}")
    elif digest.hexdigest() != md5:
        raise InputError(f"{path.name}: MD5 is {digest.hexdigest()}, expected {md5}; deleted, try again")
    else:
        print(f"verified: MD5 {md5}")


# --- archives -----------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    name: str
    kind: str  # "file", "folder", "other"
    size: int
    open: Callable[[], BinaryIO]


def _members(path: Path) -> Iterator[_Member]:
    """What a tar or zip file says that it holds."""
    if ".zip" in path.name:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                mode = info.external_attr >> 16  # of Unix; 0 elsewhere
                plain = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = ("folder" if info.is_dir() else "file") if plain else "other"
                yield _Member(info.filename, kind, info.file_size, lambda info=info: archive.open(info))
        return
    with tarfile.open(path) as archive:
        for info in archive:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
            yield _Member(info.name, kind, info.size, lambda info=info: archive.extractfile(info))


def _check_member(member: _Member, left: int) -> None:
    """InputError for a member that no data set needs. left: bytes that may still be unpacked."""
    parts, what = PurePosixPath(member.name).parts, f"member {member.name!r}"
    if member.name.startswith("/") or ".." in parts or re.search(r"[\\:\x00]", member.name):
        raise InputError(f"{what} would leave the folder")
    if member.kind == "other":
        raise InputError(f"{what} is a link or a device, expected files and folders")
    if max(member.size, SMALLEST) > left:
        raise InputError(f"{what}: far more bytes than the archive has; is it a bomb?")


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a tar or zip file into a new folder. InputError for members that no data set needs."""
    left = max(ALWAYS_ALLOWED, MAX_RATIO * _size(path))
    for member in tqdm(_members(path), "unpacking", unit=" files", **BAR):
        _check_member(member, left)
        left -= max(member.size, SMALLEST)
        target = folder / PurePosixPath(member.name)
        if target.name.startswith("._"):  # what macOS keeps of a file
            continue
        if member.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, MIB)
        if _size(target) != member.size:
            raise InputError(f"member {member.name!r} is cut short")


def unpack_classes(path: Path, folder: Path) -> None:
    """Unpacks a file of MedMNIST: images/0000.npy ..., and labels.csv with image, class and MedMNIST's own
    split in the column medmnist_split."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > max(ALWAYS_ALLOWED, MAX_RATIO * _size(path)):
            raise InputError("far more bytes than the archive has; is it a bomb?")
    (folder / "images").mkdir()
    with np.load(path, allow_pickle=False) as arrays, open(folder / "labels.csv", "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "class", "medmnist_split"])
        number = 0
        for part in ("train", "val", "test"):
            labels = arrays[f"{part}_labels"]
            for image, label in zip(arrays[f"{part}_images"], labels.reshape(len(labels)), strict=True):
                name = f"images/{number:04d}.npy"
                np.save(folder / name, image)
                rows.writerow([name, int(label), part])
                number += 1


def _install(path: Path, folder: Path) -> None:
    """Unpacks an archive into `folder`, which appears complete. One folder around all files is left out."""
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    temporary.mkdir()
    try:
        (unpack_classes if ".npz" in path.name else unpack)(path, temporary)
        inside = list(temporary.iterdir())
        alone = len(inside) == 1 and inside[0].is_dir()
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # an empty folder is in the way on some systems
        os.replace(inside[0] if alone else temporary, folder)
    except Exception as error:  # the libraries raise many kinds on broken bytes
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise _cannot_write(folder, error) from error
        path.unlink()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        why = reason if isinstance(error, InputError) else f"the archive is damaged ({reason})"
        raise InputError(f"{path.name}: {why}; it is deleted, and nothing is unpacked") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- the two tasks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadConfig:
    to: str | None = None  # folder in which the data get a folder NAME; none = $LDM3D_DATA, else data


@dataclass(frozen=True)
class ListConfig:
    pass


def download(config: DownloadConfig, name: str) -> Path:
    """Downloads the data set `name` unless it is there already; returns its folder."""
    archive = ARCHIVES.get(name)
    if archive is None:
        raise InputError(f"{name}: no such data set, expected one of {', '.join(ARCHIVES)}")
    folder = Path(config.to or os.environ.get("LDM3D_DATA") or "data").expanduser() / name
    if is_occupied(folder):
        print(f"{folder} is there already; nothing is downloaded")
        return folder
    print(f"{name}: {archive.url}\nlicence: {archive.licence}\ncite: {archive.citation}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder.parent}: {error.strerror}") from error
    part = folder.with_name(f".{archive.url.rpartition('/')[2]}.part")
    fetch(archive.url, part)
    try:
        verify(part, archive.md5)
    except InputError:
        part.unlink()
        raise
    _install(part, folder)
    part.unlink()
    _notes(part).unlink(missing_ok=True)
    count = sum(path.is_file() for path in folder.rglob("*"))
    print(f"{folder}: {count} files" + (f"; LDM3D_DATA={folder.parent} for the presets" if config.to else ""))
    return folder


def list_archives(config: ListConfig) -> None:
    """Prints the names of the data sets, with their archives and licences."""
    for name, archive in ARCHIVES.items():
        print(f"{name:15} {archive.url.rpartition('/')[2]:25} {archive.licence.partition(',')[0]}")
