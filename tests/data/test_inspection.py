"""Whatever is wrong with the files is one line naming the file, within a second, before training starts."""

import contextlib
import math
import os
import signal
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from folders import SHAPE, fresh_settings, image, mask, oblique_affine, opened, refused, save

import ldm3d.data.inspection as inspection
import ldm3d.data.loading as loading
from ldm3d.config import InputError
from ldm3d.data import Case, DataConfig, open_data
from ldm3d.data.cases import find_cases
from ldm3d.data.inspection import inspect_cases
from ldm3d.data.loading import num_reading_threads
from ldm3d.engine import logger

# --- files --------------------------------------------------------------------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(value, dtype=np.float32):
    def spoil(path):
        array = (image() if dtype == np.float32 else mask()).astype(dtype)
        array[3, 4, 5] = value
        save(path, array)

    return spoil


BAD_FILES = {
    "an empty file": ("images/c.nii.gz", lambda p: p.write_bytes(b""), "c.nii.gz"),
    "a truncated file": ("images/c.nii.gz", cut_short, "c.nii.gz"),
    "a truncated mask": ("labels/c.nii.gz", cut_short, "labels/c.nii.gz"),
    "a file that is no image": ("images/c.nii.gz", lambda p: p.write_text("hello " * 100), "c.nii.gz"),
    "a NaN": ("images/c.nii.gz", with_value(np.nan), "1 of 504 voxels are NaN or infinite"),
    "an enormous value": ("images/c.nii.gz", with_value(3e38), "values up to 3e+38"),
    "a value beyond float32": (
        "images/c.nii.gz",
        lambda p: save(p, image().astype(np.float64) * 1e300),
        "NaN or infinite",
    ),
    "an infinity": ("images/c.nii.gz", with_value(np.inf), "NaN or infinite"),
    "one value everywhere": ("images/c.nii.gz", lambda p: save(p, np.ones(SHAPE)), "the same value"),
    "a picture among volumes": ("images/c.nii.gz", lambda p: save(p, image((8, 9))), "single slice"),
    "other channels": ("images/c.nii.gz", lambda p: save(p, image((*SHAPE, 2))), "has 2 channels"),
    "a mask of another shape": ("labels/c.nii.gz", lambda p: save(p, mask((8, 9, 8))), "(8, 9, 8)"),
    "a mask elsewhere": ("labels/c.nii.gz", lambda p: save(p, mask(), np.diag([1, 1, 2, 1])), "affines"),
    "a mask turned over": ("labels/c.nii.gz", lambda p: save(p, mask(), np.diag([1, 1, -1, 1])), "affines"),
    "a mask with a fraction": ("labels/c.nii.gz", with_value(0.4, np.float64), "integers, found 0.4"),
    "a negative label": ("labels/c.nii.gz", with_value(-1, np.int16), "labels from -1"),
    "a label beyond num_labels": ("labels/c.nii.gz", with_value(3, np.uint8), "label 3, expected 0 to 2"),
    "a mask with channels": ("labels/c.nii.gz", lambda p: save(p, mask((*SHAPE, 3))), "one channel"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_named_with_the_reason(fresh, what):
    name, spoil, reason = BAD_FILES[what]
    spoil(fresh / name)
    refused(fresh_settings(fresh, num_labels=3), fresh / name, reason)


def test_all_problems_are_counted_in_one_line(fresh):
    for name in "bcd":
        save(fresh / f"images/{name}.nii.gz", np.full(SHAPE, np.nan))
    refused(fresh_settings(fresh), "b.nii.gz", "and 2 more", "c.nii.gz")


def test_a_mixed_folder_of_pictures_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", image((16, 16)))
    tifffile.imwrite(tmp_path / "b.tif", image((3, 16, 16)), photometric="minisblack")
    refused(
        DataConfig(root=str(tmp_path), image="*.tif", dims=2, cache_dir=str(tmp_path)), "b.tif", "3 channels"
    )
    refused(
        DataConfig(root=str(tmp_path), image="*.tif", dims=3, cache_dir=str(tmp_path)),
        "a.tif",
        "single slice",
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_indices_of_a_palette_are_labels_but_no_intensities(tmp_path, suffix):
    for name in "ab":
        indices = np.random.default_rng(ord(name)).integers(0, 3, (16, 16), dtype=np.uint8)
        for folder in ("grey", "colours"):
            (tmp_path / folder).mkdir(exist_ok=True)
        if suffix == "tif":
            tifffile.imwrite(tmp_path / f"grey/{name}.tif", indices)
            table = np.random.default_rng(0).integers(0, 65536, (3, 256), dtype=np.uint16)
            tifffile.imwrite(tmp_path / f"colours/{name}.tif", indices, photometric="palette", colormap=table)
        else:
            pictures = pytest.importorskip("PIL.Image", reason="Pillow (extra viz) is not installed")
            pictures.fromarray(indices).save(tmp_path / f"grey/{name}.png")
            coloured = pictures.fromarray(indices).convert("P")
            coloured.putpalette([7 * i % 256 for i in range(768)])
            coloured.save(tmp_path / f"colours/{name}.png")
    grey, colours = f"grey/*.{suffix}", f"colours/*.{suffix}"
    config = DataConfig(root=str(tmp_path), dims=2, image=grey, mask=colours, cache_dir=str(tmp_path))
    assert opened(config).spec.num_labels == 3
    refused(replace(config, image=colours, mask=None), f"colours/a.{suffix}: has a palette")


def test_an_empty_slice_of_a_series_of_pictures_is_only_noted(tmp_path, capsys):
    for name, array in {
        "a": image((16, 16)),
        "b": np.zeros((16, 16), np.float32),
        "c": image((16, 16)),
    }.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", array)
    config = DataConfig(root=str(tmp_path), image="*.tif", dims=2, cache_dir=str(tmp_path), val_fraction=0.0)
    item = open_data(config, "x", seed=0).dataset("train")[0, 1]
    assert item["image"].unique().tolist() == [-1]
    assert "b.tif" in capsys.readouterr().out


@pytest.mark.parametrize("axis", range(3))
def test_a_mask_may_lie_one_voxel_off_its_image_along_each_axis_and_no_more(fresh, axis):
    """Of thick slices too: 0.9 slices of 5 mm are allowed, nine pixels of 0.5 mm are not."""
    affine = oblique_affine("PSR", (0.5, 0.5, 5.0))
    save(fresh / "images/a.nii.gz", image(), affine)
    for voxels, lies_there in ((0.9, True), (-0.9, True), (1.1, False), (-9, False)):
        moved = affine.copy()
        moved[:3, 3] += voxels * affine[:3, axis]
        save(fresh / "labels/a.nii.gz", mask(), moved)
        if lies_there:
            opened(fresh_settings(fresh))
        else:
            refused(fresh_settings(fresh), "labels/a.nii.gz", f"{abs(voxels)} voxels off")
    opened(fresh_settings(fresh, check_affine=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing": (0.01, 0.01, 0.01)}, "data.spacing (0.01, 0.01, 0.01)"),
        ({"spacing": (0.03, 0.03, 0.03)}, "data.spacing"),
        ({"resize": True, "size": (1000, 1000, 1000)}, "data.size (1000, 1000, 1000)"),
    ],
)
def test_a_grid_of_absurdly_many_voxels_is_refused_before_anything_is_read(fresh, changes, words):
    refused(fresh_settings(fresh, **changes), "a.nii.gz: would have", words)
    opened(fresh_settings(fresh, spacing=(0.5, 0.5, 0.1)))


def test_label_values_that_were_not_announced_are_refused(fresh):
    refused(fresh_settings(fresh, label_values=(0, 2)), "labels/a.nii.gz", "label 1", "(0, 2)")


def test_an_image_instead_of_a_label_map_is_found_by_its_values(fresh):
    save(fresh / "labels/b.nii.gz", (image() * 1000).astype(np.int32))
    refused(fresh_settings(fresh), "labels/b.nii.gz", "is this a mask?")


@pytest.mark.real_data
def test_the_extra_files_of_hippocampus_are_all_caught(real_data, tmp_path):
    traps = real_data / "traps/hippocampus_extra"
    lone = {"image": "images/*.nii.gz", "mask": "labels/*.nii.gz", "cache_dir": str(tmp_path)}
    refused(DataConfig(root=str(traps), **lone), "hippocampus_010", "and 2 more", "hippocampus_281")
    for label, reason in (("010", "(36, 50, 31)"), ("281", "(512, 512, 94)")):
        root = tmp_path / label
        for folder, name in (("images", "118"), ("labels", label)):
            (root / folder).mkdir(parents=True)
            source = traps / folder / f"hippocampus_{name}.nii.gz"
            (root / folder / "hippocampus_118.nii.gz").symlink_to(source)
        refused(DataConfig(root=str(root), val_fraction=0.0, **lone), "labels/hippocampus_118", reason)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nifti/row_major.dconn.nii", "Cifti2"),
        ("nifti/resampled_anat_moved.nii", "NaN"),
        ("nifti/sct/fmri_tsnr.nii.gz", "NaN"),
        ("tiff/psf_float32_stack_nan.tif", "NaN"),
    ],
)
def test_files_that_break_careless_loaders_are_refused_before_training(real_data, tmp_path, name, reason):
    path = real_data / "traps" / name
    with pytest.raises(InputError, match=reason) as caught:
        inspect_cases([Case("x", path)], DataConfig())
    assert path.name in str(caught.value)


# --- scaling numbers ----------------------------------------------------------------------------------------


def test_shared_scaling_gives_the_source_the_numbers_of_its_image(settings):
    for kind in ("separate", "shared"):
        info = next(iter(opened(replace(settings, paired_scaling=kind)).infos.values()))
        assert (info.source_low == info.low) == (info.source_high == info.high) == (kind == "shared")


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The names of files whose voxels were read."""
    names, measure = [], inspection._measure
    monkeypatch.setattr(inspection, "_measure", lambda path, *a: names.append(path.name) or measure(path, *a))
    return names


def test_voxels_are_read_once_and_again_when_a_file_or_the_rule_changes(fresh, tmp_path, measured):
    def look(**changes):
        measured.clear()
        config = fresh_settings(fresh, **{"mask": None} | changes)
        infos = inspect_cases(find_cases(config, fresh), config, tmp_path / "scan.json")
        return sorted(measured), infos

    names = [f"{name}.nii.gz" for name in "abcd"]
    first = look()
    assert first[0] == names
    assert look() == ([], first[1])
    stat = (fresh / "images/b.nii.gz").stat()
    os.utime(fresh / "images/b.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert look() == (["b.nii.gz"], first[1])
    assert look()[0] == []
    assert look(percentiles=(1.0, 99.0))[0] == names
    assert look()[0] == []


def damages(whole: str) -> dict[str, bytes]:
    """What may have become of a cache of the inspection."""
    return {
        "cut short": whole[: len(whole) // 2].encode(),
        "another number": whole.replace('"low": [', '"low": [1').encode(),
        "not UTF-8": b"\xff" + whole.encode(),
        "nested": b"[" * 100_000,
        "of an older version": b'{"images/a.nii.gz": [1, 2, {"low": [0]}]}',
        "a list": b"[1]",
        "other contents": b'{"checksum": 0, "files": [1]}',
        "empty": b"",
    }


@pytest.mark.parametrize("what", damages(""))
def test_a_damaged_cache_is_an_empty_one(fresh, tmp_path, measured, what):
    config, cache = fresh_settings(fresh, mask=None), tmp_path / "scan.json"
    first = inspect_cases(find_cases(config, fresh), config, cache)
    cache.write_bytes(damages(cache.read_text())[what])
    measured.clear()
    assert inspect_cases(find_cases(config, fresh), config, cache) == first
    assert len(measured) == 4
    assert inspect_cases(find_cases(config, fresh), config, cache) == first
    assert len(measured) == 4


def test_files_that_were_fine_are_not_read_again_after_a_bad_one_is_mended(fresh, measured):
    save(fresh / "images/c.nii.gz", np.full(SHAPE, np.nan))
    refused(fresh_settings(fresh), "c.nii.gz")
    save(fresh / "images/c.nii.gz", image())
    measured.clear()
    open_data(fresh_settings(fresh), "heads", seed=0)
    assert measured == ["c.nii.gz"]


def test_threads_that_read_share_the_cores_of_the_machine_and_its_memory(monkeypatch):
    monkeypatch.setattr(loading, "cores_of_rank", lambda: 64)
    monkeypatch.setattr(loading, "free_bytes", lambda _: 6e9)
    assert num_reading_threads() == 8
    assert num_reading_threads(1e9) == 3
    assert num_reading_threads(1e10) == 1
    monkeypatch.setattr(loading, "cores_of_rank", lambda: 2)
    assert num_reading_threads(1e9) == 2


def test_what_a_voxel_takes_while_it_is_measured_is_no_more_than_said(tmp_path):
    size = (64, 64, 64)
    for role, dtype in (("image", np.int16), ("mask", np.uint8)):
        path = save(tmp_path / f"{role}.nii.gz", np.random.default_rng(0).integers(0, 9, size).astype(dtype))
        tracemalloc.start()
        inspection._measure(path, role, DataConfig())
        assert tracemalloc.get_traced_memory()[1] < 1.1 * inspection.MEASURED[role] * math.prod(size)
        tracemalloc.stop()


def test_an_inspection_that_is_interrupted_begins_no_other_file_and_keeps_what_it_has(tmp_path, monkeypatch):
    for i in range(40):
        save(tmp_path / f"data/{i:02d}.nii.gz", image(seed=i))
    config, begun, measure = DataConfig(image="*.nii.gz"), [], inspection._measure

    def slow(path, *rest):
        begun.append(path.name)
        sixth = len(begun) == 6
        time.sleep(0.05)
        if sixth:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        return measure(path, *rest)

    monkeypatch.setattr(inspection, "_measure", slow)
    cases, cache = find_cases(config, tmp_path / "data"), tmp_path / "scan.json"
    with pytest.raises(KeyboardInterrupt):
        inspect_cases(cases, config, cache)
    first = set(begun)
    assert 6 <= len(first) < 6 + 2 * num_reading_threads()
    begun.clear()
    monkeypatch.setattr(inspection, "_measure", lambda path, *a: begun.append(path.name) or measure(path, *a))
    assert len(inspect_cases(cases, config, cache)) == 40
    assert not first & set(begun)
    assert len(begun) == 40 - len(first)


def test_an_inspection_writes_what_it_finds_and_says_how_far_it_is_while_it_goes_on(
    fresh, tmp_path, monkeypatch, capsys
):
    measure, cache, seen = inspection._measure, tmp_path / "scan.json", []
    monkeypatch.setattr(inspection, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(logger, "SAY_EVERY", 0.0)
    monkeypatch.setattr(inspection, "num_reading_threads", lambda _: 1)

    def look(path, *rest):
        time.sleep(0.1)
        seen.append(cache.exists() and cache.read_text().count(".nii.gz"))
        return measure(path, *rest)

    monkeypatch.setattr(inspection, "_measure", look)
    config = fresh_settings(fresh, mask=None)
    inspect_cases(find_cases(config, fresh), config, cache)
    assert seen[-1] >= 2  # killed now, it would have lost no more than what it is reading
    assert "reading every voxel once: 3 of 4, 0 s left" in capsys.readouterr().out


def test_headers_are_looked_at_even_when_the_voxels_are_known(fresh):
    open_data(fresh_settings(fresh), "heads", seed=0)
    stat = (fresh / "labels/d.nii.gz").stat()
    save(fresh / "labels/d.nii.gz", mask((8, 9, 8)))
    os.utime(fresh / "labels/d.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(fresh_settings(fresh), "labels/d.nii.gz", "shape")


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(fresh, capsys):
    (fresh.parent / "cache").write_text("a file")
    assert len(open_data(fresh_settings(fresh), "heads", seed=0).cases) == 4
    assert "cannot be kept" in capsys.readouterr().out


# --- ranks --------------------------------------------------------------------------------------------------


def on_two_ranks(monkeypatch, function):
    """What function() returns on two ranks, which are threads here: a value or an exception for each."""
    here, meeting, box = threading.local(), threading.Barrier(2, timeout=60), {}

    def gather(value):
        box[here.rank] = value
        meeting.wait()
        values = [box[0], box[1]]
        meeting.wait()
        return values

    @contextlib.contextmanager
    def main_first():
        if here.rank:
            meeting.wait()
        yield
        if not here.rank:
            meeting.wait()

    def run(number):
        here.rank = number
        try:
            return function()
        except Exception as e:
            meeting.abort()  # the others lose their connection
            return e

    fakes = {"rank": lambda: here.rank, "world_size": lambda: 2, "is_main": lambda: here.rank == 0}
    fakes |= {"gather": gather, "broadcast": lambda value: gather(value)[0], "main_first": main_first}
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for name, fake in fakes.items():
            patch.setattr(inspection, name, fake)
        return list(pool.map(run, range(2)))


def test_ranks_read_a_share_of_the_voxels_each_and_know_all(fresh, tmp_path, monkeypatch):
    config, cache, measure, seen = fresh_settings(fresh), tmp_path / "scan.json", inspection._measure, []
    cases = find_cases(config, fresh)
    alone = inspect_cases(cases, config)
    monkeypatch.setattr(inspection, "_measure", lambda *job: seen.append(job) or measure(*job))
    assert on_two_ranks(monkeypatch, lambda: inspect_cases(cases, config, cache)) == [alone, alone]
    assert len(seen) == 8  # four images and four masks, each once
    assert on_two_ranks(monkeypatch, lambda: inspect_cases(cases, config, cache)) == [alone, alone]
    cache.rename(tmp_path / "scan.json.rank1")  # as if killed before all had found their share
    assert inspect_cases(cases, config, cache) == alone
    assert len(seen) == 8
    assert [path.name for path in tmp_path.glob("scan*")] == ["scan.json"]


def test_a_fault_that_another_rank_finds_is_said_by_the_first(fresh, monkeypatch):
    config = fresh_settings(fresh)
    cases = find_cases(config, fresh)
    for case in cases:
        with_value(np.nan)(case.image)
    first, second = on_two_ranks(monkeypatch, lambda: inspect_cases(cases, config))
    assert isinstance(first, InputError)
    assert "3 more" in str(first)
    assert isinstance(second, threading.BrokenBarrierError)
