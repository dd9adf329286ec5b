"""The data of a run opens from any format and layout, with the split that the run has stored."""

import numpy as np
import pytest
import tifffile
from folders import fresh_settings, mask, opened, save

from ldm3d.config import InputError
from ldm3d.data import DataConfig, open_data
from ldm3d.data.opening import check_numbering
from ldm3d.data.phantoms import write_phantoms


def test_npz_pairs_in_one_file_are_two_channels_with_the_spacing_of_the_flag(tmp_path):
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", np.random.default_rng(i).random((2, 5, 6, 7), dtype=np.float32))
    glob = {"image": "*.npz", "source": "*.npz", "channel": (1,), "source_channel": (0,)}
    config = DataConfig(
        root=str(tmp_path), file_spacing=(3, 2, 1), scaling="none", cache_dir=str(tmp_path), **glob
    )
    item = opened(config).dataset("train")[0, 0]
    pair = np.load(tmp_path / f"{item['id']}.npz")["arr_0"]
    assert item["spacing"].tolist() == [3, 2, 1]
    assert np.array_equal(item["image"][0], pair[1])
    assert np.array_equal(item["source"][0], pair[0])


def test_tiff_pictures_are_paired_by_name_in_two_dimensions(tmp_path):
    for name in ("p1_z1", "p1_z2", "p2_z1"):
        for folder in ("flair", "t1"):
            (tmp_path / folder).mkdir(exist_ok=True)
            array = np.random.default_rng(len(folder)).normal(size=(9, 8)).astype(np.float32)
            tifffile.imwrite(tmp_path / folder / f"{name}.tif", array)
    roles = {"image": "flair/*.tif", "source": "t1/*.tif", "subject": r"^(p\d)_"}
    opened_data = opened(DataConfig(root=str(tmp_path), dims=2, cache_dir=str(tmp_path / "c"), **roles))
    parts = [{opened_data.cases[name].subject for name in ids} for ids in opened_data.split.values()]
    assert not parts[0] & parts[1]
    assert opened_data.dataset("train")[0, 0]["source"].shape == (1, 9, 8)


@pytest.mark.real_data
def test_the_tiff_pairs_open(real_data, tmp_path):
    roles = {"image": "flair/*.tif", "source": "t1/*.tif", "mask": "lesion/*.tif", "subject": "^(p[0-9]+)_"}
    root = str(real_data / "tiff_pairs")
    opened_data = opened(
        DataConfig(root=root, dims=2, cache="none", cache_dir=str(tmp_path), subset=50, **roles)
    )
    item = opened_data.dataset("val")[0, 0]
    assert opened_data.spec.num_labels == 2
    assert item["image"].shape == item["source"].shape == (1, *item["mask"].shape) == (1, 256, 256)
    assert {case.subject for case in opened_data.cases.values()} == {"p07", "p19"}


def test_phantoms_are_an_ordinary_data_set(tmp_path):
    root = write_phantoms(tmp_path / "heads", 3, dims=2, size=(24, 24))
    item = opened(DataConfig(root=str(root), dims=2, cache_dir=str(tmp_path))).dataset("train")[0, 0]
    assert item["class"] in (0, 1)
    assert item["text"]
    assert item["image"].shape == item["source"].shape == (1, *item["mask"].shape) == (1, 24, 24)


def test_the_files_of_a_part_are_those_of_all_roles_and_paths_start_at_the_table(settings, root, tmp_path):
    data = opened(settings)
    expected = {
        f"{root}/{folder}/{name}.nii.gz"
        for folder in ("images", "labels", "sources")
        for name in data.split["val"]
    }
    assert set(data.files("val")) == expected
    assert data.folder == root
    (tmp_path / "lists").mkdir()
    rows = "".join(f"{root}/images/case_{i}.nii.gz\n" for i in range(3))
    (tmp_path / "lists/named.csv").write_text("image\n" + rows)
    table = DataConfig(root=str(tmp_path), table="lists/named.csv", cache_dir=str(tmp_path / "c"))
    assert opened(table).folder == tmp_path / "lists"


def test_a_stored_split_is_kept_and_cases_it_lacks_are_left_out(settings):
    stored = {"train": ["case_1", "case_4"], "val": ["case_2"], "test": []}
    opened_data = opened(settings, split=stored)
    assert opened_data.split == stored
    assert sorted(opened_data.cases) == ["case_1", "case_2", "case_4"]


def test_a_case_of_the_stored_split_that_is_gone_is_named(fresh):
    split = {"train": ["a", "zebra"], "val": ["b"], "test": []}
    with pytest.raises(InputError, match="case zebra"):
        open_data(fresh_settings(fresh), "heads", 0, split)


def test_labels_that_are_hardly_numbered_one_by_one_are_not_learned(fresh):
    for name in "abcd":
        save(fresh / f"labels/{name}.nii.gz", (mask() > 0).astype(np.uint8) * 255)
    with pytest.raises(InputError, match=r"data\.label_values: the masks hold 2 labels .* 256; give 0,255,"):
        check_numbering(open_data(fresh_settings(fresh), "heads", seed=0))
    for changes, num in (({"label_values": (0, 255)}, 2), ({"num_labels": 256}, 256)):
        data = open_data(fresh_settings(fresh, **changes), "heads", seed=0)
        check_numbering(data)
        assert data.spec.num_labels == num
