"""Other images are read and scaled as the training data was."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import torch
from folders import OBLIQUE, opened, save

from ldm3d.config import to_dict
from ldm3d.data import open_folder, write


def test_another_folder_is_read_as_the_training_data_was_with_every_case_at_its_own_size(settings, tmp_path):
    opened_data = opened(settings)
    content = {"config": {"data": to_dict(settings)}, "state": {"data": opened_data.spec.to_dict()}}
    volume = save(
        tmp_path / "other/new.nii.gz", np.random.default_rng(9).random((5, 30, 6), dtype=np.float32), OBLIQUE
    )
    (tmp_path / "other/notes.json").write_text("{}")
    dataset = open_folder(tmp_path / "other", content)
    item = dataset[0, 0]
    assert item["id"] == "new"
    assert set(item).isdisjoint({"mask", "source"})
    back = nib.load(write(tmp_path / "back.nii.gz", dataset.restore(0, item["image"])))
    np.testing.assert_allclose(back.affine, nib.load(volume).affine, atol=1e-5)
    assert back.shape == (5, 30, 6)
    assert len(open_folder(opened_data.root, content)) == 6  # laid out like the training data


def test_one_file_is_read_like_a_folder_that_holds_it(settings, tmp_path):
    opened_data = opened(settings)
    content = {"config": {"data": to_dict(settings)}, "state": {"data": opened_data.spec.to_dict()}}
    values = np.random.default_rng(9).random((5, 30, 6), dtype=np.float32)
    path = save(tmp_path / "other/new.nii.gz", values, OBLIQUE)
    save(tmp_path / "other/another.nii.gz", values, OBLIQUE)
    one, folder = open_folder(path, content), open_folder(tmp_path / "other", content)
    assert [case.id for case in one.cases] == ["new"]
    assert torch.equal(one[0, 0]["image"], folder[0, 1]["image"])


def test_scaling_by_data_set_scales_another_folder_by_the_numbers_of_the_training_set(settings, tmp_path):
    settings = replace(settings, scaling="dataset")
    spec = opened(settings).spec
    content = {"config": {"data": to_dict(settings)}, "state": {"data": spec.to_dict()}}
    values = np.random.default_rng(9).normal(7, 3, (5, 6, 7)).astype(np.float32)
    item = open_folder(save(tmp_path / "other/new.nii.gz", values).parent, content)[0, 0]
    expected = 2 * (values - spec.low[0]) / (spec.high[0] - spec.low[0]) - 1
    np.testing.assert_allclose(item["image"][0], expected, atol=1e-4)
