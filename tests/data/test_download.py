"""A public data set arrives complete, verified and in its place, or not at all, whatever a server does."""

import hashlib
import importlib.util
import io
import re
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ldm3d.config import InputError
from ldm3d.data import DataConfig
from ldm3d.data import download as downloads
from ldm3d.data.__main__ import main
from ldm3d.data.cases import find_cases, resolve_root
from ldm3d.data.download import ARCHIVES, Archive

# --- a server with faults -----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves `files` {name: bytes}. cuts: after so many bytes an answer ends. codes: what it says first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.codes, self.asked = {}, [], [], []
        self.ranges, self.heeds_if_range, self.tag = True, True, '"one"'

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        if server.codes:
            return self.send_error(server.codes.pop(0))
        content = server.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        same = not server.heeds_if_range or self.headers["If-Range"] in (None, server.tag)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges and same else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def tar_of(members, mode="w"):
    """A tar file of {name: bytes, or a TarInfo}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


VOLUME = np.random.default_rng(0).bytes(300_000)
GOOD = tar_of({"Task04/dataset.json": b"{}", "Task04/imagesTr/a.nii.gz": VOLUME, "Task04/._junk": b"macOS"})


@pytest.fixture
def offered(server, monkeypatch):
    """offered(content, md5="of it", file=...): a data set named mine, which the server has."""

    def offer(content=GOOD, md5="of it", file="mine.tar"):
        server.files[file] = content
        md5 = hashlib.md5(content).hexdigest() if md5 == "of it" else md5
        monkeypatch.setitem(ARCHIVES, "mine", Archive(server.url(file), md5, "CC BY 4.0", "Somebody, 2026"))

    return offer


def get(place):
    main(["download", "mine", "--to", str(place)])


def assert_arrived(place):
    assert sorted(p.relative_to(place / "mine").as_posix() for p in (place / "mine").rglob("*")) == [
        "dataset.json",
        "imagesTr",
        "imagesTr/a.nii.gz",
    ]
    assert (place / "mine/imagesTr/a.nii.gz").read_bytes() == VOLUME
    assert [p.name for p in place.iterdir()] == ["mine"]  # neither the archive nor anything temporary


# --- what arrives -------------------------------------------------------------------------------------------


def test_a_data_set_arrives_with_its_licence_and_only_once(server, offered, tmp_path, capsys) -> None:
    offered()
    get(tmp_path)
    said = capsys.readouterr().out
    assert_arrived(tmp_path)
    assert "licence: CC BY 4.0" in said
    assert said.index("cite: Somebody") < said.index("verified: MD5")
    get(tmp_path)
    assert "is there already" in capsys.readouterr().out
    assert server.asked == [None]


def test_a_cut_connection_goes_on_where_it_was(server, offered, tmp_path) -> None:
    offered()
    server.cuts = [100_000, 1, 70_000]
    get(tmp_path)
    assert_arrived(tmp_path)
    assert server.asked == [None, "bytes=100000-", "bytes=100001-", "bytes=170001-"]


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, offered, tmp_path) -> None:
    offered()
    server.cuts = [50_000, *10 * [0]]
    with pytest.raises(InputError, match="the same command goes on from there"):
        get(tmp_path)
    assert len(server.asked) == 1 + downloads.TRIES
    server.cuts = []
    get(tmp_path)
    assert_arrived(tmp_path)
    assert server.asked[-1] == "bytes=50000-"


def test_a_server_that_knows_no_ranges_sends_all_again(server, offered, tmp_path) -> None:
    offered()
    server.ranges, server.cuts = False, [100_000, 200_000]
    get(tmp_path)
    assert_arrived(tmp_path)


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("tags", ['"two"', None])
def test_a_file_that_changed_meanwhile_starts_anew(server, offered, tmp_path, heeds, tags) -> None:
    offered(tar_of({"old": VOLUME[::-1]}))
    server.cuts = [100_000, *10 * [0]]
    with pytest.raises(InputError):
        get(tmp_path)
    offered()
    server.tag, server.cuts, server.heeds_if_range = tags, [], heeds
    get(tmp_path)
    assert_arrived(tmp_path)


def test_a_shorter_file_than_what_has_come_starts_anew(server, offered, tmp_path) -> None:
    offered(GOOD + 400_000 * b"x")
    server.cuts = [len(GOOD) + 100_000, *10 * [0]]
    with pytest.raises(InputError):
        get(tmp_path)
    offered()
    server.cuts, server.heeds_if_range = [], False
    get(tmp_path)
    assert_arrived(tmp_path)


def test_a_complete_archive_is_not_asked_for_again(server, offered, tmp_path, monkeypatch) -> None:
    offered()
    monkeypatch.setattr(downloads, "verify", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path)
    monkeypatch.undo()
    offered()
    server.asked.clear()
    get(tmp_path)
    assert_arrived(tmp_path)
    assert server.asked == []


def test_without_a_known_checksum_the_sum_is_said(offered, tmp_path, capsys) -> None:
    offered(md5=None)
    get(tmp_path)
    said = capsys.readouterr().out
    assert f"unverified: no checksum is known; SHA-256 {hashlib.sha256(GOOD).hexdigest()}" in said


def test_a_busy_server_is_asked_again(server, offered, tmp_path) -> None:
    offered()
    server.codes = [503, 429, 500]
    get(tmp_path)
    assert_arrived(tmp_path)


def test_a_zip_arrives_too(offered, tmp_path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.txt", "text")
        archive.writestr("c.txt", "more")
    offered(file.getvalue(), file="mine.zip")
    get(tmp_path)
    assert (tmp_path / "mine/a/b.txt").read_text() == "text"
    assert (tmp_path / "mine/c.txt").read_text() == "more"


def test_classes_of_medmnist_become_a_table_of_images(offered, tmp_path) -> None:
    shapes, file = np.random.default_rng(0).integers(0, 2, (6, 5, 5, 5), dtype=np.uint8), io.BytesIO()
    parts = {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 6)}
    labels = np.array([0, 1, 1, 0, 1, 0], np.uint8)[:, None]
    arrays = {f"{part}_images": shapes[i] for part, i in parts.items()}
    np.savez(file, **arrays, **{f"{part}_labels": labels[i] for part, i in parts.items()})
    offered(file.getvalue(), file="mine.npz")
    get(tmp_path)
    cases = find_cases(DataConfig(table="labels.csv"), tmp_path / "mine")
    assert [case.class_idx for case in cases] == labels.ravel().tolist()
    assert [case.columns["medmnist_split"] for case in cases] == 3 * ["train"] + ["val"] + 2 * ["test"]
    assert all(np.array_equal(np.load(case.image), shape) for case, shape in zip(cases, shapes, strict=True))


# --- what does not arrive -----------------------------------------------------------------------------------


def refused(place, words, outside=()):
    """The download is refused in one line; nothing but what can be gone on with is left."""
    with pytest.raises(InputError) as caught:
        get(place)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (place / "mine").exists()
    assert not list(place.glob(".mine.unpacking"))
    assert not any(path.exists() for path in outside)


def test_a_wrong_checksum_is_refused_and_the_next_call_starts_anew(server, offered, tmp_path) -> None:
    offered(md5=hashlib.md5(b"another").hexdigest())
    refused(tmp_path, "MD5 is")
    offered()
    get(tmp_path)
    assert_arrived(tmp_path)
    assert server.asked == [None, None]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


ABSOLUTE = "/tmp/ldm3d-escaped"
HOSTILE = {
    "a path upwards": ({"../escaped": b"x"}, "would leave the folder"),
    "a path upwards within": ({"a/../../escaped": b"x"}, "would leave the folder"),
    "an absolute path": ({ABSOLUTE: b"x"}, "would leave the folder"),
    "a path of Windows": ({"..\\escaped": b"x"}, "would leave the folder"),
    "a link out": ({"out": link("out", "/tmp"), "out/escaped": b"x"}, "a link or a device"),
    "a link within": ({"a": b"x", "b": link("b", "a")}, "a link or a device"),
    "a hard link": ({"a": link("a", "/etc/passwd", tarfile.LNKTYPE)}, "a link or a device"),
    "a device": ({"a": link("a", "", tarfile.CHRTYPE)}, "a link or a device"),
    "a pipe": ({"a": link("a", "", tarfile.FIFOTYPE)}, "a link or a device"),
    "a file twice": ({"a/b": b"x", "a/./b": b"y"}, "the archive is damaged"),
    "a file that is a folder": ({"a": b"x", "a/b": b"y"}, "the archive is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_writes_nothing(offered, tmp_path, name) -> None:
    members, words = HOSTILE[name]
    offered(tar_of({"good": b"x"} | members))
    outside = [tmp_path.parent / "escaped", tmp_path / "escaped", Path("/tmp/escaped"), Path(ABSOLUTE)]
    refused(tmp_path, words, outside)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / ".mine.tar.part.json"])


@pytest.mark.parametrize("kind", ["tar", "zip", "npz", "files"])
def test_a_bomb_is_refused_before_it_is_written(offered, tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(downloads, "ALWAYS_ALLOWED", 2**20)
    zeros = bytes(8 * 2**20)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", zeros)
    many = {f"{i}": b"" for i in range(3000)}
    content = {"tar": tar_of({"a": zeros}, "w:gz"), "files": tar_of(many, "w:gz")}.get(kind, file.getvalue())
    offered(content, file=f"mine.{kind if kind != 'files' else 'tar'}")
    refused(tmp_path, "is it a bomb?")


def test_a_link_in_a_zip_is_refused(offered, tmp_path) -> None:
    file, info = io.BytesIO(), zipfile.ZipInfo("out")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(info, "/tmp")
    offered(file.getvalue(), file="mine.zip")
    refused(tmp_path, "a link or a device")


@pytest.mark.parametrize("content", [GOOD[:100_000], b"<html>try later</html>" * 100, b""])
def test_a_damaged_archive_without_a_checksum_is_refused(offered, tmp_path, content) -> None:
    offered(content, md5=None)
    refused(tmp_path, "damaged")


def test_a_missing_file_and_no_network_are_one_line(server, offered, tmp_path, monkeypatch) -> None:
    offered()
    server.files.clear()
    refused(tmp_path, "404")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/mine.tar"
    monkeypatch.setitem(ARCHIVES, "mine", Archive(url, None, "", ""))
    refused(tmp_path, "is this machine on the internet?")


def test_a_full_disk_is_one_line_and_keeps_what_has_come(server, offered, tmp_path, monkeypatch) -> None:
    offered()
    usage = downloads.shutil.disk_usage
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    refused(tmp_path, "needs 0.3 MiB")
    monkeypatch.undo()
    offered()
    (tmp_path / ".mine.tar.part").symlink_to("/dev/full")
    refused(tmp_path, "No space left on device")
    (tmp_path / ".mine.tar.part").unlink()
    copy = downloads.shutil.copyfileobj

    def full(*args):
        raise OSError(downloads.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads.shutil, "copyfileobj", full)
    refused(tmp_path, "No space left on device")
    monkeypatch.setattr(downloads.shutil, "copyfileobj", copy)
    server.asked.clear()
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    get(tmp_path)
    assert_arrived(tmp_path)
    assert server.asked == []


def test_a_name_that_is_not_in_the_table_and_a_place_that_cannot_be(tmp_path, mistake) -> None:
    assert "hippo: no such data set, expected one of brats" in mistake(main, ["download", "hippo"])
    assert "which NAME?" in mistake(main, ["download"])
    (tmp_path / "file").write_text("x")
    assert "cannot write" in mistake(main, ["download", "heart", "--to", tmp_path / "file/deeper"])


# --- where it is looked for ---------------------------------------------------------------------------------


def test_data_arrive_where_the_presets_look(offered, tmp_path, monkeypatch) -> None:
    offered()
    for environment, place in ((str(tmp_path / "all"), tmp_path / "all"), (None, tmp_path / "here/data")):
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.delenv("LDM3D_DATA", raising=False)
        if environment:
            monkeypatch.setenv("LDM3D_DATA", environment)
        main(["download", "mine"])
        assert resolve_root(DataConfig(), "mine").resolve() == (place / "mine").resolve()


def test_a_preset_whose_data_are_missing_names_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    with pytest.raises(InputError, match=r"`python -m ldm3d\.data download hippocampus` gets it"):
        resolve_root(DataConfig(), "hippocampus")
    with pytest.raises(InputError) as caught:
        resolve_root(DataConfig(), "phantom")
    assert "download" not in str(caught.value)


def test_the_list_names_every_data_set_with_its_licence(capsys) -> None:
    main(["list"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(ARCHIVES)
    assert all("CC BY" in line for line in said)
    for archive in ARCHIVES.values():
        assert re.fullmatch("[0-9a-f]{32}", archive.md5)
        assert archive.url.startswith("https://")


@pytest.mark.parity
def test_addresses_and_sums_of_the_decathlon_are_monais() -> None:
    if (monai := importlib.util.find_spec("monai")) is None:
        pytest.skip("monai (extra test) is not installed")
    theirs = (Path(monai.origin).parent / "apps/datasets.py").read_text()  # read: its import takes seconds
    tasks = {a.url.rpartition("/")[2][:-4]: a for a in ARCHIVES.values() if a.url.endswith(".tar")}
    assert len(tasks) == 10
    for name, archive in tasks.items():
        assert f'"{name}": "{archive.url}"' in theirs
        assert f'"{name}": "{archive.md5}"' in theirs
