"""Whatever is wrong with the files is one line naming the file, within a second, before training starts."""

import json
import os
import time

import nibabel as nib
import numpy as np
import pytest
import tifffile

import ldm3d.data.inspection as inspection
from ldm3d.config import InputError
from ldm3d.data import AugmentConfig, Case, DataConfig, batches, open_data
from ldm3d.data.cases import find_cases, resolve_root, split_cases
from ldm3d.data.inspection import inspect_cases
from ldm3d.data.opening import check_numbering

SHAPE = (8, 9, 7)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def image(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def mask(shape=SHAPE):
    return np.random.default_rng(1).integers(0, 3, shape, dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for name in "abcd":
        save(tmp_path / f"data/images/{name}.nii.gz", image(seed=ord(name)))
        save(tmp_path / f"data/labels/{name}.nii.gz", mask())
    return tmp_path / "data"


def settings(root, **changes):
    options = {"image": "images/*.nii.gz", "mask": "labels/*.nii.gz", "cache_dir": str(root.parent / "cache")}
    return DataConfig(root=str(root), **(options | changes))


def refused(config, *parts):
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        open_data(config, "heads", seed=0)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


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
def test_a_bad_file_is_named_with_the_reason(root, what):
    name, spoil, reason = BAD_FILES[what]
    spoil(root / name)
    refused(settings(root, num_labels=3), root / name, reason)


def test_all_problems_are_counted_in_one_line(root):
    for name in "bcd":
        save(root / f"images/{name}.nii.gz", np.full(SHAPE, np.nan))
    refused(settings(root), "b.nii.gz", "and 2 more", "c.nii.gz")


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


def test_label_values_that_were_not_announced_are_refused(root):
    refused(settings(root, label_values=(0, 2)), "labels/a.nii.gz", "label 1", "(0, 2)")


def test_labels_that_are_hardly_numbered_one_by_one_are_not_learned(root):
    for name in "abcd":
        save(root / f"labels/{name}.nii.gz", (mask() > 0).astype(np.uint8) * 255)
    with pytest.raises(InputError, match=r"data\.label_values: the masks hold 2 labels .* 256; give 0,255,"):
        check_numbering(open_data(settings(root), "heads", seed=0))
    for changes, num in (({"label_values": (0, 255)}, 2), ({"num_labels": 256}, 256)):
        data = open_data(settings(root, **changes), "heads", seed=0)
        check_numbering(data)
        assert data.spec.num_labels == num


def test_an_image_in_the_place_of_a_label_map_is_found_by_its_values(root):
    save(root / "labels/b.nii.gz", (image() * 1000).astype(np.int32))
    refused(settings(root), "labels/b.nii.gz", "is this a mask?")


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


# --- folders and tables -------------------------------------------------------------------------------------


def test_a_case_without_its_partner_is_named(root):
    (root / "labels/b.nii.gz").unlink()
    refused(settings(root), "case b", "images/b.nii.gz", "labels/*.nii.gz", "allow_missing_mask")
    save(root / "labels/b.nii.gz", mask())
    (root / "images/c.nii.gz").unlink()
    refused(settings(root), "labels/c.nii.gz", "which has no image")
    refused(settings(root, image="labels/*.nii.gz", mask=None, source="images/*.nii.gz"), "case c", "source")


def test_a_missing_or_empty_folder_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    refused(DataConfig(), "data/heads", "LDM3D_DATA", "--data.root")
    monkeypatch.setenv("LDM3D_DATA", str(tmp_path / "sets"))
    refused(DataConfig(), tmp_path / "sets/heads", "data/heads")
    refused(DataConfig(root="nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    refused(DataConfig(root="empty"), "empty", "--data.image")
    refused(DataConfig(root="empty", image="*.nii.gz"), "data.image", "empty", "'*.nii.gz'")
    with pytest.raises(InputError, match="not a folder"):
        find_cases(DataConfig(), tmp_path / "nowhere")
    with pytest.raises(InputError, match="no data folder"):
        resolve_root(DataConfig(), "heads")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"image": None}, ["data.image", "data.mask"]),
        ({"table": "cases.csv"}, ["data.table", "data.image"]),
        ({"image": "images/a.nii.gz"}, ["data.image", "*"]),
        ({"image": "../data/images/*.nii.gz"}, ["data.image", "below the root"]),
        ({"image": "*/*.nii.gz"}, ["has two files", "{id}"]),
        ({"subject": "x(.*)"}, ["data.subject", "does not fit 'a'"]),
        ({"subject": "a.*"}, ["data.subject", "one group"]),
        ({"subject": "("}, ["data.subject", "expression"]),
        ({"subject": "who.csv"}, ["who.csv"]),
        ({"split": "images/([a-d])"}, ["case a", "'a'", "train, val, test"]),
        ({"subject": "(.*)", "subset": 1}, ["validate", "1 cases"]),
        ({"source": "labels/*.nii.gz", "source_channel": (1,)}, ["labels/a.nii.gz", "channel"]),
    ],
)
def test_a_setting_that_does_not_fit_the_folder_is_named(root, changes, parts):
    refused(settings(root, **changes), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("picture,mask\nimages/a.nii.gz,\n", ["no column 'image'", "picture"]),
        ("image,mask\nimages/a.nii.gz,\n", ["case a", "no mask"]),
        ("image\nimages/x.nii.gz\n", ["images/x.nii.gz", "no file"]),
        ("image\nimages/a.nii.gz\nimages/a.nii.gz\n", ["listed twice"]),
        ("image,split\nimages/a.nii.gz,train\nimages/b.nii.gz,\n", ["case b", "no split"]),
        ("image,split\nimages/a.nii.gz,train\nimages/b.nii.gz,learn\n", ["case b", "'learn'"]),
        ("image\n", ["lists no case"]),
        ("", ["no column 'image'"]),
        ("image,text\nimages/a.nii.gz,a small, round lesion\n", ["cases.csv: line 2", "2 cells", "quotes"]),
        ("image,text\nimages/a.nii.gz,\nimages/b.nii.gz\n", ["cases.csv: line 3 has not the 2 cells"]),
    ],
)
def test_a_bad_table_is_named_with_the_row(root, text, parts):
    (root / "cases.csv").write_text(text)
    refused(DataConfig(root=str(root), cache_dir=str(root)), *parts)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"training": [{"label": "x"}]}', '{"training": 3}', '{"a": []}']
)
def test_a_bad_dataset_json_is_named(root, content):
    (root / "dataset.json").write_text(content)
    refused(DataConfig(root=str(root)), "dataset.json", "training")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"size": (8, 8)}, "size"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing"),
        ({"percentiles": (99.0, 1.0)}, "percentiles"),
        ({"window": (5.0, 5.0)}, "window"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction"),
        ({"fold": (3, 3)}, "fold"),
        ({"resize": True}, "resize"),
        ({"label_values": (0, 255), "num_labels": 3}, "label_values"),
        ({"dims": 2, "augment": AugmentConfig(flip_axes=(2,))}, "augment"),
        ({"subset": 0}, "subset"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        DataConfig(**changes)


def test_an_impossible_augmentation_is_refused_by_name():
    for name, value in (("rot90_axes", (1, 1)), ("rot90_axes", (0,)), ("affine", 1.5)):
        with pytest.raises(InputError, match=f"^{name}: "):
            AugmentConfig(**{name: value})


def test_a_case_of_the_stored_split_that_is_gone_is_named(root):
    split = {"train": ["a", "zebra"], "val": ["b"], "test": []}
    with pytest.raises(InputError, match="case zebra"):
        open_data(settings(root), "heads", 0, split)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(root, monkeypatch):
    dataset = open_data(settings(root), "heads", 0).dataset("train")
    monkeypatch.setattr("ldm3d.data.batching.world_size", lambda: 2)
    with pytest.raises(InputError, match="batch_size: 3 does not divide over 2 ranks"):
        next(batches(dataset, 3, 1, 0, 0, 1))


def test_a_given_split_that_shares_subjects_is_noted(capsys):
    cases = [Case("a", "x", subject="s", split="train"), Case("b", "x", subject="s", split="val")]
    split_cases(cases, DataConfig(), 0)
    assert "subject s is in both train and val" in capsys.readouterr().out


# --- the cache of the scan ----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The names of files whose voxels were read."""
    names, measure = [], inspection._measure
    monkeypatch.setattr(inspection, "_measure", lambda path, *a: names.append(path.name) or measure(path, *a))
    return names


def test_voxels_are_read_once_and_again_when_a_file_or_the_rule_changes(root, tmp_path, measured):
    def look(**changes):
        measured.clear()
        config = settings(root, **{"mask": None} | changes)
        infos = inspect_cases(find_cases(config, root), config, tmp_path / "scan.json")
        return sorted(measured), infos

    names = [f"{name}.nii.gz" for name in "abcd"]
    first = look()
    assert first[0] == names
    assert look() == ([], first[1])
    stat = (root / "images/b.nii.gz").stat()
    os.utime(root / "images/b.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert look() == (["b.nii.gz"], first[1])
    assert look()[0] == []
    assert look(percentiles=(1.0, 99.0))[0] == names
    assert look()[0] == []
    (tmp_path / "scan.json").write_text(json.dumps({})[:1])
    assert look() == (names, first[1])


def test_files_that_were_fine_are_not_read_again_after_a_bad_one_is_mended(root, measured):
    save(root / "images/c.nii.gz", np.full(SHAPE, np.nan))
    refused(settings(root), "c.nii.gz")
    save(root / "images/c.nii.gz", image())
    measured.clear()
    open_data(settings(root), "heads", seed=0)
    assert measured == ["c.nii.gz"]


def test_headers_are_looked_at_even_when_the_voxels_are_known(root):
    open_data(settings(root), "heads", seed=0)
    stat = (root / "labels/d.nii.gz").stat()
    save(root / "labels/d.nii.gz", mask((8, 9, 8)))
    os.utime(root / "labels/d.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(settings(root), "labels/d.nii.gz", "shape")


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(root, capsys):
    (root.parent / "cache").write_text("a file")
    assert len(open_data(settings(root), "heads", seed=0).cases) == 4
    assert "cannot be kept" in capsys.readouterr().out
