"""A file on the training grid: the grid that its header promises, and labels that are exact."""

import nibabel as nib
import numpy as np
import pytest
from folders import OBLIQUE, ROLES, make_folder, opened, save

from ldm3d.data import DataConfig
from ldm3d.data.cases import find_cases
from ldm3d.data.inspection import inspect_cases
from ldm3d.data.loading import load_role


@pytest.mark.parametrize("change", [{"spacing": (2.0, 1.0, 3.3)}, {"resize": True, "size": (7, 16, 5)}, {}])
def test_the_grid_that_the_header_promises_is_the_one_that_is_loaded(tmp_path, change):
    make_folder(tmp_path, 3, affine=OBLIQUE)
    config = DataConfig(image=ROLES["image"], mask=ROLES["mask"], **change)
    cases = find_cases(config, tmp_path)
    for case in cases:
        info = inspect_cases(cases, config)[case.id]
        for role in ("image", "mask"):
            volume = load_role(getattr(case, role), role, config)
            assert volume.shape == info.shape
            np.testing.assert_allclose(volume.affine, info.affine, atol=1e-9)
            np.testing.assert_allclose(volume.spacing, info.spacing)
        assert set(np.unique(volume.array)) <= {0, 1, 2, 3}
        if "spacing" in change:
            assert info.spacing == pytest.approx(change["spacing"])
            before = np.array(nib.load(case.image).header.get_zooms()) * nib.load(case.image).shape
            assert np.all(
                np.abs(before - np.multiply(info.shape, info.spacing)) <= np.array(info.spacing) / 2
            )
        if "size" in change:
            assert info.shape == (7, 16, 5)


@pytest.mark.real_data
def test_a_mask_with_a_slope_is_rounded_and_not_cut(real_data):
    config = DataConfig(image="*/T1c_*.nii.gz", mask="*/brainmask.nii.gz", subset=1)
    cases = find_cases(config, real_data / "brats2013")
    mask = load_role(cases[0].mask, "mask", config).array
    assert cases[0].id == "brats_2013_pat0003_1"
    assert np.unique(mask).tolist() == [0, 1]
    assert 0.05 < mask.mean() < 0.5


def test_labels_a_little_off_an_integer_are_rounded(tmp_path):
    path = save(tmp_path / "mask.nii", np.array([[[0.0, 0.9996, 2.0004]]], dtype=np.float32))
    assert load_role(path, "mask", DataConfig()).array.ravel().tolist() == [0, 1, 2]


def test_mask_values_can_be_named(tmp_path):
    make_folder(tmp_path, 2, masks=False)
    for i in range(2):
        shape = nib.load(tmp_path / f"images/case_{i}.nii.gz").shape
        values = np.zeros(shape, dtype=np.uint8)
        values[2:] = 255
        save(tmp_path / f"labels/case_{i}.nii.gz", values)
    cache = str(tmp_path / "c")
    config = DataConfig(root=str(tmp_path), label_values=(0, 255), cache_dir=cache, **ROLES)
    opened_data = opened(config)
    item = opened_data.dataset("val")[0, 0]
    assert opened_data.spec.num_labels == 2
    assert all(info.labels == (0, 1) for info in opened_data.infos.values())
    assert item["mask"].unique().tolist() == [0, 1]
