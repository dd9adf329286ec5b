"""Samples and reconstructions become volumes again, in the units, position and orientation of the data."""

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from folders import OBLIQUE, make_folder, opened, save

from ldm3d.config import InputError
from ldm3d.data import Case, DataConfig, DataSpec, open_data, restore, write
from ldm3d.data.inspection import CaseInfo
from ldm3d.data.phantoms import write_phantoms
from ldm3d.data.spec import make_spec


def test_the_spec_has_the_medians_of_the_training_cases_and_survives_json(settings):
    opened_data = opened(settings, multiple=(4, 4, 8))
    spec = opened_data.spec
    train = [opened_data.infos[name] for name in opened_data.split["train"]]
    assert spec.low == pytest.approx(np.median([info.low for info in train], axis=0))
    assert spec.size == tuple(
        -(-max(info.shape[a] for info in train) // m) * m for a, m in enumerate((4, 4, 8))
    )
    assert (spec.channels, spec.source_channels, spec.num_labels, spec.num_classes) == (1, 1, 4, None)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_spec_is_of_the_training_cases_alone_but_labels_and_classes_are_of_all():
    def info(shape, spacing, orientation, low, labels):
        return CaseInfo(shape, spacing, (), orientation, (low,), (low + 10.0,), labels=labels)

    infos = {
        "a": info((35, 51, 30), (1.0, 1.0, 2.0), "LPS", 0.0, (0, 1)),
        "b": info((38, 47, 36), (1.5, 1.0, 4.0), "RAS", 2.0, (0,)),
        "c": info((20, 20, 20), (9.0, 1.0, 3.0), "LPS", 7.0, (0, 2)),
        "d": info((99, 99, 99), (5.0, 5.0, 5.0), "PSR", 99.0, (0, 5)),
    }
    cases = [Case(name, "x", mask="y", class_idx=k) for name, k in zip("abcd", (0, None, 1, 3), strict=True)]
    split = {"train": ["a", "b", "c"], "val": ["d"], "test": []}
    spec = make_spec(cases, infos, split, DataConfig(), multiple=(8, 8, 8))
    assert spec.size == (40, 56, 40)
    assert spec.spacing == (1.5, 1.0, 3.0)
    assert spec.orientation == "LPS"
    assert (spec.low, spec.high) == ((2.0,), (12.0,))
    assert (spec.num_labels, spec.num_classes) == (6, 4)
    assert make_spec(cases, infos, split, DataConfig(size=(8, 8, 8), num_labels=7)).num_labels == 7


def test_dataset_scaling_is_the_mean_and_deviation_of_all_training_voxels(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(i, 1 + i, (5, 6, 7)).astype(np.float32) for i in range(4)]
    for i, array in enumerate(arrays):
        save(tmp_path / f"{i}.nii", array)
    config = DataConfig(
        root=str(tmp_path), image="*.nii", scaling="dataset", cache_dir=str(tmp_path), fold=(0, 4)
    )
    opened_data = opened(config)
    train = np.stack([arrays[int(name)] for name in opened_data.split["train"]])
    val = opened_data.dataset("val")
    expected = (arrays[int(val.cases[0].id)] - train.mean()) / train.std()
    np.testing.assert_allclose(val[0, 0]["image"][0], expected, atol=1e-4)


@pytest.mark.parametrize("scaling", ["zscore", "dataset", "none"])
def test_pictures_show_the_middle_99_percent_of_intensities_that_have_no_bounds(settings, scaling):
    data = opened(replace(settings, scaling=scaling))
    train = data.dataset("train", own_size=True)
    ends = [np.percentile(train[i, i]["image"][0], (0.5, 99.5)) for i in range(len(train))]
    assert data.spec.display == pytest.approx(np.median(ends, axis=0), rel=1e-4)
    again = opened(replace(settings, scaling=scaling))  # from what was kept of the first look
    assert again.spec == data.spec


@pytest.mark.parametrize("scaling", ["percentile", "window", "minmax"])
def test_pictures_show_minus_one_to_one_where_the_scaling_ends_there(settings, scaling):
    assert opened(replace(settings, scaling=scaling)).spec.display == (-1.0, 1.0)


def test_pictures_of_a_run_that_never_measured_their_range_show_minus_one_to_one(settings):
    values = opened(replace(settings, scaling="zscore")).spec.to_dict()
    del values["display"]
    assert DataSpec.from_dict(values).display == (-1.0, 1.0)


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 8, 8), (7, 20, 11)])
def test_an_item_restored_is_the_file_again_in_values_place_and_orientation(tmp_path, size):
    make_folder(tmp_path, 3, affine=OBLIQUE, masks=False)
    config = DataConfig(root=str(tmp_path), image="images/*.nii.gz", size=size, cache_dir=str(tmp_path / "c"))
    opened_data = opened(config)
    dataset = opened_data.dataset("train")
    item, case = dataset[0, 1], dataset.cases[1]
    assert item["image"].shape == (1, *size)
    info = opened_data.infos[case.id]
    path = write(tmp_path / "back.nii.gz", restore(item["image"], dataset.spec, info, item["start"]))
    original, back = nib.load(case.image), nib.load(path)
    assert nib.aff2axcodes(back.affine) == nib.aff2axcodes(original.affine) == ("L", "P", "S")
    values = np.clip(original.get_fdata(), info.low, info.high)
    offset = np.rint(np.linalg.solve(original.affine, back.affine[:, 3]))[:3].astype(int)
    window = tuple(slice(o, o + n) for o, n in zip(offset, back.shape, strict=True))
    assert back.shape == tuple(min(n, m) for n, m in zip(original.shape, size, strict=True))
    np.testing.assert_allclose(back.get_fdata(), values[window], atol=1e-3)
    np.testing.assert_allclose(
        back.affine @ [1, 2, 3, 1], original.affine @ [*np.add(offset, [1, 2, 3]), 1], atol=1e-4
    )


def test_a_sample_gets_median_spacing_training_units_and_orientation(tmp_path):
    affine = np.diag([-2.0, 1.5, 3.0, 1.0])
    make_folder(tmp_path, 4, affine=affine, masks=False)
    config = DataConfig(root=str(tmp_path), image="images/*.nii.gz", cache_dir=str(tmp_path / "c"))
    spec = opened(config, multiple=(8, 8, 8)).spec
    volume = spec.to_volume(torch.full((1, *spec.size), -1.0))
    back = nib.load(write(tmp_path / "sample.nii.gz", volume))
    assert nib.aff2axcodes(back.affine) == ("L", "A", "S")
    np.testing.assert_allclose(back.header.get_zooms(), [2, 1.5, 3])
    np.testing.assert_allclose(back.get_fdata(), spec.low[0], rtol=1e-6)
    np.testing.assert_allclose(back.affine @ [*((np.array(back.shape) - 1) / 2), 1], [0, 0, 0, 1], atol=1e-6)


def test_a_sample_beyond_the_clipped_range_is_written_within_the_data_s_own(tmp_path):
    write_phantoms(tmp_path / "heads", 4, size=(8, 8, 8), spacing=(24.0, 28.0, 24.0))
    config = DataConfig(root=str(tmp_path / "heads"), cache_dir=str(tmp_path), val_fraction=0.25)
    spec = open_data(config, "heads", 0).spec
    array = spec.to_volume(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)).array.flatten()
    low, high = spec.low[0], spec.high[0]
    assert array.tolist() == pytest.approx([low, (low + high) / 2, high], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": [0.0, 1.0, 1.0]},
        {"spacing": [math.nan, 1.0, 1.0]},
        {"size": [8, 8]},
        {"size": "x"},
        {"display": [1.0, -1.0]},
        {"display": [0.0]},
        {"more": 1},
    ],
)
def test_a_damaged_record_of_the_data_is_named(settings, change):
    values = opened(settings).spec.to_dict()
    assert DataSpec.from_dict(values) == opened(settings).spec
    for damaged in (values | change, [], {}):
        with pytest.raises(InputError, match=r"training data \(state\.data\) is damaged"):
            DataSpec.from_dict(damaged)


@pytest.mark.parametrize(
    ("types", "expected"), [(("uint8",) * 4, "uint8"), (("uint8", "int16") * 2, "float32")]
)
def test_a_run_writes_8_bits_where_all_training_images_have_8_bits(tmp_path, types, expected):
    rng = np.random.default_rng(0)
    for i, dtype in enumerate(types):
        save(tmp_path / f"{i}.nii", rng.integers(0, 256, (5, 6, 7)).astype(dtype))
    config = DataConfig(root=str(tmp_path), image="*.nii", cache_dir=str(tmp_path), val_fraction=0)
    for _ in range(2):  # of the first look, and of what was kept of it
        data = opened(config)
        assert data.spec.dtype == expected
        volume = data.spec.to_volume(torch.tensor([-1.0, -0.501, 0.0, 1.0]).view(1, 4, 1, 1))
        written = data.spec.as_file(volume).array
        assert written.dtype == expected
        half = 0.5 if expected == "uint8" else 0.0
        np.testing.assert_allclose(written, volume.array, atol=half + 1e-4)


def test_8_bit_files_are_written_clipped_and_files_of_another_type_keep_their_own(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.nii", np.random.default_rng(i).integers(0, 256, (5, 6, 7)).astype(np.uint8))
    config = DataConfig(root=str(tmp_path), image="*.nii", scaling="zscore", cache_dir=str(tmp_path))
    data = opened(config)
    volume = data.spec.to_volume(torch.tensor([-9.0, 9.0]).view(1, 2, 1, 1))
    assert volume.array.min() < 0
    assert volume.array.max() > 255
    info = next(iter(data.infos.values()))
    assert data.spec.as_file(volume, info).array.flatten().tolist() == [0, 255]
    assert data.spec.as_file(volume, replace(info, dtype="float32")) is volume


def test_a_run_that_never_looked_at_the_type_writes_floats(settings):
    values = replace(opened(settings).spec, dtype="uint8").to_dict()
    assert DataSpec.from_dict(values).dtype == "uint8"
    del values["dtype"]
    assert DataSpec.from_dict(values).dtype == "float32"
