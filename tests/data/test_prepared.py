"""A prepared file gives the voxels that the source file gives, of which a window reads its bricks alone."""

import gc
import os
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from folders import ROLES, equal, opened, save

from ldm3d.config import InputError
from ldm3d.data import DataConfig, prepared, read
from ldm3d.data.geometry import cut
from ldm3d.data.loading import DecodedVolume, decode, load_role, stored_type
from ldm3d.data.prepared import BRICK, PreparedVolume


def files(config):
    return sorted(Path(config.cache_dir).glob("volumes/*.bricks"))


def stored(shape, dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def never():
    raise AssertionError("the source was read again")


@pytest.mark.parametrize("shape", [(1, 40, 33, 70), (2, 32, 64, 5), (3, 300, 513), (1, 1, 1, 1)])
def test_any_window_is_that_of_the_array(tmp_path, shape):
    array, rng = stored(shape), np.random.default_rng(1)
    whole = DecodedVolume(array, (2.0, -3.0))
    volume = PreparedVolume(tmp_path / "a.bricks", lambda: whole)
    assert volume.shape == shape
    everywhere = (slice(None),) * len(shape)
    assert np.array_equal(volume[everywhere], array * np.float32(2) - 3)
    for _ in range(20):
        start = tuple(int(rng.integers(-4, n)) for n in shape[1:])
        size = tuple(int(rng.integers(1, n + 5)) for n in shape[1:])
        size = tuple(max(m, 1 - s) for m, s in zip(size, start, strict=True))  # touches the volume
        window = cut(volume, start, size)
        assert window.dtype == np.float32
        assert np.array_equal(window, cut(whole, start, size))


@pytest.mark.parametrize("slope_inter", [(1, 0), (1, -1024), (0.37, 0), (2.5, 17)])
@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "f4", "f8"])
def test_values_are_those_of_the_file_to_the_last_bit_and_keep_its_type(tmp_path, dtype, slope_inter):
    image = nib.Nifti1Image(stored((9, 8, 40), dtype), np.diag([-1.0, 1.5, -2.0, 1.0]))
    image.header.set_slope_inter(*slope_inter)
    image.to_filename(tmp_path / "a.nii.gz")
    volume = decode(tmp_path / "a.nii.gz", "image", DataConfig(), None)
    small = np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize <= 2
    assert volume.stored.dtype == (np.dtype(dtype).newbyteorder("=") if small else np.float32)
    assert stored_type(tmp_path / "a.nii.gz", "image", DataConfig(), None) == volume.stored.dtype
    on_disk = PreparedVolume(tmp_path / "a.bricks", lambda: volume)
    expected = load_role(tmp_path / "a.nii.gz", "image", DataConfig()).array
    raw = nib.load(tmp_path / "a.nii.gz").get_fdata()[::-1, :, ::-1].astype(np.float32)
    assert np.array_equal(expected[0], raw)
    for kept in (volume, on_disk):
        assert np.array_equal(kept[:, 1:8, :, 30:40], expected[:, 1:8, :, 30:40])


def test_a_window_reads_its_bricks_and_no_others(tmp_path):
    shape, edge = (1, 100, 100, 100), BRICK[3]
    path = tmp_path / "a.bricks"
    array = stored(shape)
    PreparedVolume(path, lambda: DecodedVolume(array, (1.0, 0.0)))
    content = bytearray(path.read_bytes())
    content[: 2 * edge**3] = bytes(2 * edge**3)  # the first brick
    path.write_bytes(content)
    volume = PreparedVolume(path, never)
    assert np.array_equal(volume[:, edge:, edge:, edge:], array[:, edge:, edge:, edge:])
    with pytest.raises(AssertionError, match="read again"):
        volume[:, edge - 1 :, edge - 1 :, edge - 1 :]


@pytest.fixture
def folder(tmp_path):
    """Three cases of 16-bit integers with masks, larger than a brick."""
    for i in range(3):
        labels = np.zeros((40, 36, 20), np.uint8)
        labels[3 + 10 * i, 5:9, 7] = [1, 0, 2, 1]
        image = nib.Nifti1Image(stored(labels.shape, seed=i), np.eye(4))
        image.header.set_slope_inter(1, -1024)
        (tmp_path / "images").mkdir(exist_ok=True)
        image.to_filename(tmp_path / f"images/case_{i}.nii.gz")
        save(tmp_path / f"labels/case_{i}.nii.gz", labels)
    options = {"image": ROLES["image"], "mask": ROLES["mask"], "patch": (12, 10, 8), "val_fraction": 0.34}
    return DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), foreground=0.5, **options)


@pytest.mark.parametrize("change", [{}, {"spacing": (1.0, 1.3, 0.8)}, {"label_values": (0, 2, 1)}])
def test_items_are_the_same_from_files_memory_and_disk(folder, change):
    sets = [
        opened(replace(folder, cache=cache, **change)).dataset("train", augment=True)
        for cache in ("none", "ram", "disk", "disk")
    ]
    for position in range(8):
        items = [dataset[position, position % 2] for dataset in sets]
        assert all(equal(items[0], item) for item in items[1:])


def test_16_bits_take_half_the_space_of_floats_on_the_disk_and_in_memory(folder):
    opened(replace(folder, cache="disk")).dataset("train")
    num = 40 * 36 * 20
    sizes = sorted(path.stat().st_size for path in files(folder))
    assert all(
        kept <= size < kept + 600 for kept, size in zip([num, num, 2 * num, 2 * num], sizes, strict=True)
    )
    tight = replace(folder, cache="ram", cache_gb=6 * num / 2**30)
    assert len(opened(tight).dataset("train")._ram) == 4


def damages(whole):
    """What may have become of a prepared file."""
    return {
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "no end": whole[:-1],
        "another voxel": b"\xff" + whole[1:],
        "another header": whole.replace(b'"shape"', b'"shope"'),
        "no prepared file": b"hello" * 100,
    }


@pytest.mark.parametrize("what", damages(b""))
def test_a_damaged_file_is_made_anew(folder, what):
    plain = opened(replace(folder, cache="none", patch=None)).dataset("train")[0, 0]
    folder = replace(folder, cache="disk", patch=None)
    dataset = opened(folder).dataset("train")
    before = {path: path.read_bytes() for path in files(folder)}
    assert len(before) == 4  # all training cases, before the first item
    for path, whole in before.items():
        path.write_bytes(damages(whole)[what])
    assert equal(dataset[0, 0], plain)
    dataset[0, 1]
    assert {path: path.read_bytes() for path in files(folder)} == before


def test_a_file_that_was_deleted_is_made_anew(folder):
    dataset = opened(replace(folder, cache="disk")).dataset("train")
    item = dataset[0, 0]
    for path in files(folder):
        path.unlink()
    assert equal(dataset[0, 0], item)
    assert len(files(folder)) == 2


def test_what_is_prepared_is_not_decoded_again_by_other_runs_and_stages(folder, monkeypatch):
    folder = replace(folder, cache="disk")
    opened(folder).dataset("train")
    monkeypatch.setattr("ldm3d.data.dataset.decode", lambda *args: never())
    other = replace(folder, patch=None, scaling="minmax", foreground=0.0)
    assert opened(other).dataset("train")[0, 0]["image"].shape == (1, 40, 36, 20)


def test_a_changed_source_replaces_its_prepared_file(folder):
    folder = replace(folder, cache="disk")
    opened(folder).dataset("train")
    old = files(folder)
    case = opened(folder).dataset("train").cases[0]
    save(case.image, stored((40, 36, 20), seed=9))
    item = opened(folder).dataset("train")[0, 0]
    new = files(folder)
    assert len(new) == len(old) == 4
    assert len(set(new) - set(old)) == 1
    assert equal(item, opened(replace(folder, cache="none")).dataset("train")[0, 0])


def test_other_labels_make_new_masks_and_keep_the_images(folder):
    folder = replace(folder, cache="disk")
    opened(folder).dataset("train")
    opened(replace(folder, label_values=(0, 2, 1))).dataset("train")
    assert len(files(folder)) == 2 + 2 * 2


def test_nothing_half_written_is_left_and_what_killed_processes_left_is_removed(folder, monkeypatch):
    folder = replace(folder, cache="disk")
    place = Path(folder.cache_dir) / "volumes"
    place.mkdir(parents=True)
    for name, age in ((".old.bricks.1.2.tmp", 7200), (".new.bricks.1.2.tmp", 60)):
        (place / name).write_bytes(b"")
        then = (place / name).stat().st_mtime - age
        os.utime(place / name, (then, then))
    monkeypatch.setattr(prepared, "END", None)  # fails when all bricks are written
    with pytest.raises(AttributeError):
        opened(folder).dataset("train")
    assert [path.name for path in place.iterdir()] == [".new.bricks.1.2.tmp"]


def test_a_disk_without_room_is_refused_with_numbers(folder, monkeypatch):
    usage = prepared.shutil.disk_usage(folder.root)._replace(free=100_000)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(
        InputError, match=r"data.cache_dir: 4 volumes take 0.000161 GiB, .* 9.31e-05 GiB left"
    ):
        opened(replace(folder, cache="disk")).dataset("train")
    assert not files(folder)


def test_disk_and_time_are_told_beforehand(folder, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "SPEED", 1000.0)
    monkeypatch.setattr("ldm3d.data.dataset.num_reading_threads", lambda: 2)
    opened(replace(folder, cache="disk")).dataset("train")
    minutes = round(4 * 40 * 36 * 20 / 1000 / 2 / 60)
    assert f"4 volumes are prepared once: 0.00016 GiB in {folder.cache_dir}" in (
        out := capsys.readouterr().out
    )
    assert f"about {minutes} min" in out
    opened(replace(folder, cache="disk")).dataset("train")
    assert "prepared once" not in capsys.readouterr().out


def test_what_older_versions_have_prepared_is_named_and_left(folder, capsys):
    old = Path(folder.cache_dir) / f"{'a' * 24}.npy"
    for path in (old, old.with_name("mine.npy")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0" * 2**20)
    opened(replace(folder, cache="disk")).dataset("train")
    assert f"note: 1 files *.npy in {old.parent}, 0.00098 GiB, are what older" in capsys.readouterr().out
    assert old.exists()


def test_ranks_prepare_their_share_and_ranks_of_one_machine_hold_no_volumes(folder, monkeypatch):
    for name, value in (("rank", 0), ("world_size", 2), ("ranks_here", 2)):
        monkeypatch.setattr(f"ldm3d.data.dataset.{name}", lambda value=value: value)
    dataset = opened(replace(folder, cache="ram")).dataset("train")
    assert len(files(folder)) == 2  # of two images and two masks
    assert not dataset._ram
    items = [dataset[position, position % 2] for position in range(4)]
    monkeypatch.undo()
    alone = opened(folder).dataset("train")
    assert len(alone._ram) == 4
    assert all(equal(item, alone[position, position % 2]) for position, item in enumerate(items))


def test_many_threads_read_and_make_one_file(tmp_path):
    array, found = stored((1, 70, 40, 33)), []

    def work():
        volume = PreparedVolume(tmp_path / "a.bricks", lambda: DecodedVolume(array, (1.0, 0.0)))
        found.append(np.array_equal(volume[:, 3:69, :, 30:], array[:, 3:69, :, 30:]))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.bricks"]


def test_patches_around_labels_meet_every_labelled_voxel(folder):
    dataset = opened(replace(folder, patch=(1, 1, 1), foreground=1.0, cache="disk")).dataset(
        "train", augment=True
    )
    met = {tuple(dataset[position, 0]["start"].tolist()) for position in range(60)}
    labels = read(dataset.cases[0].mask).array[0]
    assert met == set(map(tuple, np.argwhere(labels).tolist()))


def peak(function):
    """The most bytes that Python and NumPy hold at a time within function(), above what they held before."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_the_patch_and_while_preparing_twice_the_volume_in_its_type(tmp_path):
    shape = (96, 128, 160)
    path, size = tmp_path / "a.nii.gz", 2 * 96 * 128 * 160
    image = nib.Nifti1Image(stored(shape), np.diag([-1.0, 1.0, 1.0, 1.0]))
    image.header.set_slope_inter(1, -1024)
    image.to_filename(path)
    prepared_path = tmp_path / "a.bricks"
    making = peak(lambda: PreparedVolume(prepared_path, lambda: decode(path, "image", DataConfig(), None)))
    assert size < making < 2.3 * size
    volume = PreparedVolume(prepared_path, never)
    patch = 4 * 40**3
    assert peak(lambda: cut(volume, (11, 50, 90), (40, 40, 40))) < 6 * patch < size / 2
