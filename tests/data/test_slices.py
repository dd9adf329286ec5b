"""Slices of volumes are the 2-D images that nibabel cuts from them, split and scaled by the volume."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from folders import oblique_affine, opened, save, world_image

from ldm3d.config import InputError
from ldm3d.data import DataConfig, Volume
from ldm3d.data import slices as slicing
from ldm3d.data.cases import find_cases
from ldm3d.data.fingerprint import take
from ldm3d.data.inspection import inspect_cases
from ldm3d.data.settings import of_volumes
from ldm3d.data.slices import ACROSS
from ldm3d.data.volumes import take_slice

SHAPE, SPACING = (12, 10, 8), (1.0, 1.5, 3.0)  # as stored
GLOBS = {"image": "images/*.nii.gz", "mask": "labels/*.nii.gz", "source": "sources/*.nii.gz"}


@pytest.fixture
def volumes(tmp_path):
    """Five volumes in the order PSR; the first RAS axial and sagittal slice of each has one value."""
    affine = oblique_affine("PSR", SPACING)
    for i, name in enumerate("abcde"):
        rng = np.random.default_rng(i)
        image = rng.integers(-1000, 1000, SHAPE).astype(np.int16)
        image[:, 0] = image[:, :, 0] = -1000
        save(tmp_path / f"data/images/{name}.nii.gz", image, affine)
        save(tmp_path / f"data/sources/{name}.nii.gz", rng.normal(size=SHAPE).astype(np.float32), affine)
        save(tmp_path / f"data/labels/{name}.nii.gz", rng.integers(0, 3, SHAPE, dtype=np.uint8), affine)
    return tmp_path / "data"


def settings(volumes, plane, **changes):
    options = {"dims": 2, "slices": plane, "scaling": "window", "window": (-1000.0, 1000.0), **GLOBS}
    return DataConfig(root=str(volumes), cache_dir=str(volumes.parent / "cache"), **options | changes)


def canonical(path):
    return nib.as_closest_canonical(nib.load(path))


@pytest.mark.parametrize(("plane", "axis"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_slices_are_those_of_nibabel_with_their_masks_and_sources(volumes, plane, axis, capsys) -> None:
    data = opened(settings(volumes, plane))
    empty = 5 * (plane != "coronal")
    count = canonical(volumes / "images/a.nii.gz").shape[axis]
    assert f"{5 * count - empty} {plane} slices of 5 volumes" in capsys.readouterr().out
    dataset = data.dataset("train")
    zooms = np.delete(canonical(volumes / "images/a.nii.gz").header.get_zooms(), axis)
    for index in (0, 7, len(dataset) - 1):
        item, case = dataset[0, index], dataset.cases[index]
        name, number = case.id.split("_")
        assert case.subject == name
        stored = {
            role: canonical(volumes / f"{folder}/{name}.nii.gz").get_fdata().take(int(number), axis)
            for role, folder in (("image", "images"), ("mask", "labels"), ("source", "sources"))
        }
        assert np.allclose(item["image"][0], stored["image"] / 1000, atol=1e-6)
        assert np.array_equal(item["mask"], stored["mask"])
        assert np.allclose(item["source"][0], np.clip(stored["source"] / 1000, -1, 1), atol=1e-6)
        assert np.allclose(item["spacing"], zooms, atol=1e-4)
        assert int(number) > 0 or not empty


def test_the_split_is_by_volume_and_stored_ids_are_found_again(volumes, tmp_path) -> None:
    data = opened(settings(volumes, "axial", val_fraction=0.4))
    of = {part: {name.split("_")[0] for name in ids} for part, ids in data.split.items()}
    assert len(of["val"]) == 2
    assert not of["train"] & of["val"]
    again = opened(settings(volumes, "axial"), split=data.split)
    assert again.split == data.split
    assert {k: v.content for k, v in again.infos.items()} == {k: v.content for k, v in data.infos.items()}
    assert len({info.content for info in data.infos.values()}) == len(data.infos)
    (tmp_path / "split.json").write_text(json.dumps(data.split))
    other = opened(settings(volumes, "axial", split=str(tmp_path / "split.json")))  # of another run
    assert other.split == data.split


def test_slices_are_scaled_by_the_numbers_of_their_volume(volumes) -> None:
    config = settings(volumes, "coronal", scaling="percentile")
    data = opened(config)
    whole = inspect_cases(find_cases(config, volumes), of_volumes(config))
    for name, info in data.infos.items():
        of_volume = whole[name.split("_")[0]]
        assert (info.low, info.high) == (of_volume.low, of_volume.high)
        assert (info.source_low, info.source_high) == (of_volume.source_low, of_volume.source_high)


def test_a_slice_lies_in_the_plane_where_its_voxels_lie_in_space() -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-5, 7, 11)
    places = world_image((3, 4, 5), affine)
    volume = Volume(np.zeros((1, 3, 4, 5), np.float32), affine, "LPS")
    for plane, axis in ACROSS.items():
        one = take_slice(volume, axis, 2)
        expected = np.delete(places.take(2, axis), axis, -1)
        assert np.allclose(world_image(one.shape, one.affine), expected), plane
        assert one.orientation == {"sagittal": "PS", "coronal": "LS", "axial": "LP"}[plane]


def test_no_volume_is_read_again_for_its_slices(volumes, monkeypatch) -> None:
    opened(settings(volumes, "axial"))
    real, paths = slicing.read, []
    monkeypatch.setattr(slicing, "read", lambda path, **options: paths.append(path) or real(path, **options))
    dataset = opened(settings(volumes, "axial", cache="none")).dataset("train")
    assert all(".tif" in case.image.name for case in dataset.cases)
    assert dataset[0, 3]["image"].shape[1:] == dataset.size
    assert paths == []
    dataset.cases[3].image.unlink()  # as a person may clear a cache
    assert opened(settings(volumes, "axial")).dataset("train")[0, 3]["image"].shape[1:] == dataset.size
    assert len(paths) == 1
    paths.clear()
    save(volumes / "images/b.nii.gz", np.arange(960, dtype=np.int16).reshape(SHAPE))
    save(volumes / "labels/b.nii.gz", np.ones(SHAPE, np.uint8))
    save(volumes / "sources/b.nii.gz", np.arange(960, dtype=np.float32).reshape(SHAPE))
    changed = opened(settings(volumes, "axial"))
    assert {path.name for path in paths} == {"b.nii.gz"}
    assert len(paths) == 3
    assert changed.infos["b_000"].shape == SHAPE[:2]


def test_a_plan_sees_slices_of_subjects_that_the_names_of_volumes_tell(volumes) -> None:
    for folder in ("images", "labels", "sources"):
        for number, name in enumerate("abcd"):
            file = volumes / f"{folder}/{name}.nii.gz"
            file.rename(file.with_name(f"sub-0{number // 2}_{file.name}"))
        (volumes / f"{folder}/e.nii.gz").unlink()
    shutil.rmtree(volumes / "sources")
    flags = {"data.slices": "axial", "data.cache_dir": str(volumes.parent / "cache")}
    seen = take(volumes, flags)
    assert seen.dims == 2
    assert seen.settings["data.dims"] == 2
    assert re.search(seen.settings["data.subject"], "sub-01_d")[1] == "sub-01"
    assert set(seen.shapes) == {canonical(volumes / "images/sub-00_a.nii.gz").shape[:2]}


@pytest.mark.parametrize("kind", ["int16", "float32", "uint8"])
def test_the_stored_slices_keep_every_value(volumes, kind) -> None:
    values = np.random.default_rng(1).normal(0, 50, SHAPE)
    save(volumes / "images/a.nii.gz", (abs(values) if kind == "uint8" else values).astype(kind))
    for folder in ("labels", "sources"):
        save(volumes / f"{folder}/a.nii.gz", np.ones(SHAPE, np.uint8))
    dataset = opened(settings(volumes, "axial", scaling="none", subset=1, val_fraction=0.0)).dataset("train")
    stored = nib.load(volumes / "images/a.nii.gz").get_fdata(dtype=np.float32)
    for index in range(len(dataset)):
        assert np.array_equal(dataset[0, index]["image"][0], stored[:, :, index])


def test_channels_are_chosen_of_slices_as_of_volumes(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 6, 5, 4, 2)).astype(np.float32)
    for name, array in zip("abc", values, strict=True):
        save(tmp_path / f"data/{name}.nii.gz", array)
    how = {"dims": 2, "slices": "sagittal", "image": "*.nii.gz", "scaling": "none"}
    for channel, picks in (((), [0, 1]), ((1,), [1])):
        config = DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path), channel=channel, **how)
        dataset = opened(config).dataset("train")
        case = dataset.cases[2]
        stored = values["abc".index(case.id[0]), int(case.id[-3:])][..., picks]
        assert np.array_equal(dataset[0, 2]["image"], np.moveaxis(stored, -1, 0))


@pytest.mark.parametrize(
    ("file", "shape", "words"),
    [
        ("labels/c.nii.gz", (12, 10, 9), "labels/c.nii.gz: mask has shape"),
        ("labels/c.nii.gz", (12, 11, 8), "labels/c.nii.gz: mask has 11 axial slices, its image"),
        ("images/c.nii.gz", SHAPE, "images/c.nii.gz: 960 of 960 voxels are NaN"),
        ("images/c.nii.gz", (12, 10, 8, 1), "images/c.nii.gz: all voxels have the same value"),
        ("sources/c.nii.gz", None, "sources/c.nii.gz"),
    ],
)
def test_what_is_wrong_is_said_of_the_volume(volumes, file, shape, words) -> None:
    (volumes / file).write_bytes(b"no image")
    if shape is not None:
        value = np.nan if shape == SHAPE else 1.0
        save(volumes / file, np.full(shape, value, np.float32), oblique_affine("PSR", SPACING))
    with pytest.raises(InputError, match=words):
        opened(settings(volumes, "axial"))


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_slices_count_as_of_8_bits_where_their_volumes_are(tmp_path, dtype) -> None:
    for i in range(3):
        array = np.random.default_rng(i).integers(0, 200, SHAPE).astype(dtype)
        save(tmp_path / f"data/{i}.nii.gz", array)
    data = opened(settings(tmp_path / "data", "axial", image="*.nii.gz", mask=None, source=None))
    assert data.spec.dtype == ("uint8" if dtype == "uint8" else "float32")
