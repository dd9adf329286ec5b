"""Synthetic heads repeat exactly, vary naturally, and are what their labels, classes and captions say."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ldm3d.config import InputError
from ldm3d.data import phantoms, read
from ldm3d.data.phantoms import FIELD_OF_VIEW, LABEL_NAMES, describe, make_phantom, write_phantoms

NUM = 40
BRAIN, VENTRICLES, NUCLEI, LESION = range(1, len(LABEL_NAMES))


@pytest.fixture(scope="module", params=[2, 3])
def heads(request: pytest.FixtureRequest) -> list[phantoms.Phantom]:
    return [make_phantom(index, dims=request.param) for index in range(NUM)]


def caption_by_intensity(image: np.ndarray, spacing: tuple[float, ...]) -> str:
    """What a reader says who sees intensities only: bright spots well inside the skull, sized and placed."""
    dims = image.ndim
    low, high = np.percentile(image, (0.5, 99.5))
    scaled = np.clip((image - low) / (high - low), 0, 1)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(image.shape, spacing, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    if dims == 3:
        inside = (grid[0] / 64) ** 2 + (grid[1] / 80) ** 2 + ((grid[2] - 15) / 56) ** 2 < 1
    else:
        inside = (grid[0] / 80) ** 2 + (grid[1] / 64) ** 2 < 1
    white = np.median(scaled[inside])
    return describe(inside & (scaled > 0.4 * white + 0.6 * scaled.max()), spacing)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_head_depends_on_its_seed_and_index_only(dims: int) -> None:
    first, again = (make_phantom(7, dims, seed=3) for _ in range(2))
    others = [make_phantom(8, dims, seed=3), make_phantom(7, dims, seed=4)]
    for name in ("image", "mask", "source", "affine"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert (first.caption, first.class_idx) == (again.caption, again.class_idx)
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_arrays_have_the_types_and_shapes_promised(heads: list) -> None:
    for head in heads:
        dims = len(head.spacing)
        assert head.image.shape == head.mask.shape == head.source.shape == (1, *phantoms.DEFAULT_SIZE[dims])
        assert (head.image.dtype, head.mask.dtype, head.source.dtype) == (np.float32, np.uint8, np.float32)
        assert np.isfinite(head.image).all()
        assert head.image.min() >= 0
        assert head.mask.max() < len(LABEL_NAMES)
        assert np.allclose(head.affine[:-1, :-1], np.diag(head.spacing))


def test_captions_are_obeyed_by_the_intensities(heads: list) -> None:
    seen = [caption_by_intensity(head.image[0], head.spacing) for head in heads]
    assert sum(a == head.caption for a, head in zip(seen, heads, strict=True)) >= 0.97 * NUM


def test_class_caption_and_label_map_agree_and_every_kind_occurs(heads: list) -> None:
    for head in heads:
        assert head.class_idx == int((head.mask == LESION).any())
        assert (head.caption == "no lesion") == (head.class_idx == 0)
        assert head.caption == describe(head.mask[0] == LESION, head.spacing)
    assert len({head.caption for head in heads}) == 5
    assert 0.1 < np.mean([head.class_idx == 0 for head in heads]) < 0.45
    missing = np.mean([not (head.mask == NUCLEI).any() for head in heads])
    assert 0.05 < missing < 0.5


def test_anatomy_varies_but_keeps_its_proportions(heads: list) -> None:
    size = np.array([[(head.mask == label).sum() for label in (BRAIN, VENTRICLES)] for head in heads])
    assert (size[:, 1] > 0).all()
    assert (size[:, 0] > 5 * size[:, 1]).all()  # much more brain than ventricles
    assert 0.02 < size[:, 0].std() / size[:, 0].mean() < 0.3
    assert size[:, 1].std() / size[:, 1].mean() > 0.15
    gains = [np.percentile(head.image, 99) for head in heads]
    assert max(gains) > 1.5 * min(gains)  # units are not comparable between heads


def test_two_contrasts_order_the_tissues_differently(heads: list) -> None:
    for head in heads:
        brain, fluid = head.mask == BRAIN, head.mask == VENTRICLES
        assert np.median(head.image[fluid]) < np.median(head.image[brain])
        assert np.median(head.source[fluid]) > np.median(head.source[brain])
        if head.class_idx:
            assert np.median(head.image[head.mask == LESION]) > 1.2 * np.median(head.image[brain])


def test_the_head_lies_in_air(heads: list) -> None:
    for head in heads:
        sides = [np.take(head.image, [0, -1], axis) for axis in range(1, len(head.spacing) + 1)]
        for side in sides[:2]:  # the neck leaves through the floor
            assert np.median(side) < 0.15 * np.median(head.image[head.mask == BRAIN])


def test_the_right_is_where_the_affine_says(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "set", 12, size=(24, 28, 24))
    sides = set()
    for row in csv.DictReader((root / "cases.csv").read_text().splitlines()):
        image = nib.load(root / row["mask"])
        x = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == LESION))[:, 0]
        if len(x):
            sides.add(side := "right" if x.mean() > 0 else "left")
            assert side in row["text"]
    assert sides == {"left", "right"}


def test_another_spacing_samples_the_same_head() -> None:
    fine = make_phantom(2, size=(48, 56, 48))
    coarse = make_phantom(2, size=(24, 28, 12), spacing=(8.0, 8.0, 16.0))
    pooled = fine.image[0].reshape(24, 2, 28, 2, 12, 4).mean((1, 3, 5))
    assert coarse.spacing == (8.0, 8.0, 16.0)
    assert np.corrcoef(pooled.ravel(), coarse.image.ravel())[0, 1] > 0.9
    zoomed = make_phantom(2, size=(24, 28, 24), spacing=(4.0, 4.0, 4.0))  # the middle of the field of view
    middle = fine.image[0, 12:-12, 14:-14, 12:-12]
    assert np.corrcoef(middle.ravel(), zoomed.image.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("size", [(5, 40, 33), (40, 48, 1), (16, 16, 16), (17, 9)])
def test_any_size_is_possible(size: tuple[int, ...]) -> None:
    head = make_phantom(0, dims=len(size), size=size)
    assert head.image.shape == (1, *size)
    assert np.allclose(np.array(head.spacing) * size, FIELD_OF_VIEW[len(size)])


@pytest.mark.parametrize(("dims", "size"), [(2, (28, 24)), (3, (12, 14, 12))])
def test_a_written_set_is_read_back_as_it_was_made(dims: int, size: tuple[int, ...], tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "a" / "set", 3, dims=dims, size=size, seed=5)
    rows = list(csv.DictReader((root / "cases.csv").read_text().splitlines()))
    assert len({row["subject"] for row in rows}) == len(rows) == 3
    for index, row in enumerate(rows):
        head = make_phantom(index, dims, size, seed=5)
        for role in ("image", "mask", "source"):
            volume = read(root / row[role])
            assert np.array_equal(volume.array, getattr(head, role))
            assert np.allclose(volume.spacing, head.spacing, rtol=1e-4)
            if dims == 3:
                assert np.allclose(volume.affine, head.affine, atol=1e-4)
        assert (int(row["class"]), row["text"]) == (head.class_idx, head.caption)


@pytest.mark.parametrize("class_idx", [0, 1])
def test_a_set_can_hold_heads_of_one_class(class_idx: int, tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "set", 2, dims=2, size=(28, 24), class_idx=class_idx)
    rows = list(csv.DictReader((root / "cases.csv").read_text().splitlines()))
    assert [int(row["class"]) for row in rows] == [class_idx] * 2
    assert len({row["subject"] for row in rows}) == 2
    for row in rows:
        index = int(row["subject"][-4:])
        assert (read(root / row["image"]).array == make_phantom(index, 2, (28, 24)).image).all()
        assert (read(root / row["mask"]).array == 4).any() == bool(class_idx)


def test_a_set_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(phantoms, "_save", full_disk)
        with pytest.raises(OSError, match="disk full"):
            write_phantoms(tmp_path / "set", 2, size=(8, 8, 8))
    assert list(tmp_path.iterdir()) == []
    write_phantoms(tmp_path / "set", 2, size=(8, 8, 8))
    with pytest.raises(InputError, match="exists already"):
        write_phantoms(tmp_path / "set", 2, size=(8, 8, 8))


def test_an_impossible_size_or_spacing_is_named() -> None:
    with pytest.raises(InputError, match="3 positive numbers"):
        make_phantom(0, size=(8, 8))
    with pytest.raises(InputError, match="spacing"):
        make_phantom(0, dims=2, size=(8, 8), spacing=(1.0, 0.0))
