"""A folder becomes a split table of cases, cases become tensors, and tensors the same volumes again."""

import json
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch

import ldm3d.data.batching as batching
from ldm3d.config import field_comments, to_dict
from ldm3d.data import (
    AugmentConfig,
    Case,
    DataConfig,
    DataSpec,
    batches,
    evaluation_batches,
    open_data,
    open_folder,
    read,
    restore,
    write,
)
from ldm3d.data.cases import find_cases, resolve_root, split_cases
from ldm3d.data.inspection import inspect_cases
from ldm3d.data.loading import load_role
from ldm3d.data.phantoms import write_phantoms
from ldm3d.data.transforms import augment, scale, scaling_numbers, unscale
from ldm3d.engine.distributed import keyed_generator

OBLIQUE = np.array(
    [[-1.8, 0.3, 0.1, 30.0], [0.2, -1.1, 0.4, -20.0], [0.1, 0.5, 2.4, 10.0], [0, 0, 0, 1.0]]
)  # LPS


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def make_folder(root, num=6, size=(11, 12, 9), affine=None, masks=True):
    """images/, sources/, labels/ with `num` cases of slightly different shapes."""
    rng = np.random.default_rng(0)
    for i in range(num):
        shape = tuple(n + (i + axis) % 3 for axis, n in enumerate(size))
        save(
            root / f"images/case_{i}.nii.gz", rng.normal(100 * (i + 1), 20, shape).astype(np.float32), affine
        )
        save(root / f"sources/case_{i}.nii.gz", rng.gamma(2, 50, shape).astype(np.float32), affine)
        if masks:
            save(root / f"labels/case_{i}.nii.gz", rng.integers(0, 4, shape, dtype=np.uint8), affine)
    return root


ROLES = {"image": "images/*.nii.gz", "mask": "labels/*.nii.gz", "source": "sources/*.nii.gz"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(root, tmp_path):
    return DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), subject=r"case_(\d)", **ROLES)


def opened(config, **kwargs):
    return open_data(config, "none", seed=0, **kwargs)


# --- the table of cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "pattern", "ids"),
    [
        (["images/a.nii.gz", "images/b.b.nii.gz"], "images/*.nii.gz", ["a", "b.b"]),
        (["p1/T1c_x.nii", "p2/T1c_y.nii", "p2/T2_y.nii"], "*/T1c_*.nii", ["p1", "p2"]),
        (["s1/a.tif", "s1/b.tif", "s2/a.tif"], "{id}/{id}.tif", ["s1_a", "s1_b", "s2_a"]),
        (["site/x/a.tif", "b.tif"], "**/*.tif", ["a", "b"]),
        (["a.tif", "b.nii.gz"], "*", ["a", "b"]),
        (["images/a.tif", "images/._a.tif"], "images/*.tif", ["a"]),
        (["x[1]/a1.tif", "x[1]/a22.tif"], "x[1]/*?.tif", ["a", "a2"]),
    ],
)
def test_the_case_id_is_what_the_first_star_or_the_ids_match(tmp_path, files, pattern, ids):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [case.id for case in find_cases(DataConfig(image=pattern), tmp_path)] == ids


def test_roles_are_paired_by_case_id(settings, root):
    for case in find_cases(settings, root):
        assert case.image.name == case.mask.name == case.source.name == f"{case.id}.nii.gz"


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_csv_fills_the_same_table(root, tmp_path, mark):
    rows = [
        ["image", " class", "text", "subject", "split", "mask"],
        [f"{root}/images/case_0.nii.gz", "1", "an old head", "anna", "train", f"{root}/labels/case_0.nii.gz"],
        [f"{root}/images/case_1.nii.gz", "", "", "ben", "val", f"{root}/labels/case_1.nii.gz"],
    ]
    (tmp_path / "cases.csv").write_text("\ufeff" + "\n".join(mark.join(row) for row in rows) + "\n")
    first, second = cases = find_cases(DataConfig(), tmp_path)
    assert (first.id, first.label, first.text, first.subject) == ("case_0", 1, "an old head", "anna")
    assert (second.id, second.label, second.text, second.subject) == ("case_1", None, "", "ben")
    table = (tmp_path / "cases.csv").read_text()
    (tmp_path / "named.csv").write_text(table.replace(f"{mark}1{mark}", f"{mark}benign{mark}"))
    named = find_cases(DataConfig(table="named.csv"), tmp_path)[0]
    assert (named.label, named.columns["class"]) == (None, "benign")
    assert split_cases(cases, DataConfig(), 0) == {"train": ["case_0"], "val": ["case_1"], "test": []}
    item = opened(DataConfig(root=str(tmp_path), cache_dir=str(tmp_path))).dataset("val")[5, 0]
    assert (item["label"], item["text"], item["position"], item["index"]) == (-1, "", 5, 0)


def test_an_msd_folder_is_recognised_and_its_validation_list_is_the_split(root, tmp_path):
    def entry(i):
        return {"image": f"{root}/images/case_{i}.nii.gz", "label": f"{root}/labels/case_{i}.nii.gz"}

    content = {"training": [entry(0), entry(2)], "validation": [entry(1)], "test": ["x.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cases = find_cases(DataConfig(), tmp_path)
    assert [case.mask.parent.name for case in cases] == ["labels"] * 3
    assert split_cases(cases, DataConfig(), 0)["val"] == ["case_1"]


def test_a_table_beside_globs_is_told_not_to_be_read(tmp_path, capsys):
    (tmp_path / "a.tif").touch()
    find_cases(DataConfig(image="*.tif"), tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "cases.csv").write_text("image,subject\na.tif,anna\n")
    assert find_cases(DataConfig(image="*.tif"), tmp_path)[0].subject == "a"
    assert f"note: {tmp_path}/cases.csv is not read, data.image names the files" in capsys.readouterr().out


def test_a_folder_per_case_gives_ids_from_the_paths(root, tmp_path):
    for i in range(2):
        save(tmp_path / f"p{i}/T1.nii", np.arange(64, dtype=np.float32).reshape(4, 4, 4))
    (tmp_path / "cases.csv").write_text("image\np0/T1.nii\np1/T1.nii\n")
    assert [case.id for case in find_cases(DataConfig(), tmp_path)] == ["p0_T1", "p1_T1"]


def test_train_and_val_folders_split_the_cases(tmp_path):
    for name in ("train/a.tif", "train/b.tif", "val/a.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = DataConfig(image="{id}/{id}.tif", split="^(train|val|test)/")
    split = split_cases(find_cases(config, tmp_path), config, 0)
    assert split == {"train": ["train_a", "train_b"], "val": ["val_a"], "test": []}


def test_the_root_comes_from_the_flag_then_the_environment_then_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flag", "env/heads", "data/heads"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    assert resolve_root(DataConfig(), "heads").samefile("data/heads")
    monkeypatch.setenv("LDM3D_DATA", str(tmp_path / "env"))
    assert resolve_root(DataConfig(), "heads").samefile("env/heads")
    assert resolve_root(DataConfig(root="flag"), "heads").samefile("flag")


def test_every_setting_has_its_help_in_a_comment():
    for cls in (DataConfig, AugmentConfig):
        names = {f.name for f in fields(cls)} - {"augment"}
        assert names <= set(field_comments(cls))


# --- the split ----------------------------------------------------------------------------------------------


def many(num, per_subject=2):
    return [Case(f"c{i:03d}", "x", subject=f"s{i // per_subject}") for i in range(num)]


@pytest.mark.parametrize("num", [4, 6, 40, 101])
def test_a_drawn_split_keeps_subjects_together_and_is_repeated_by_the_seed(num):
    cases, config = many(num), DataConfig(val_fraction=0.2, test_fraction=0.1)
    split = split_cases(cases, config, 0)
    subjects = [{case.subject for case in cases if case.id in ids} for ids in split.values()]
    assert sorted(name for ids in split.values() for name in ids) == [case.id for case in cases]
    assert sum(map(len, subjects)) == len(set.union(*subjects))
    assert split["val"]
    assert split["train"]
    assert split == split_cases(list(reversed(cases))[::-1], config, 0)
    if num > 10:
        assert split != split_cases(cases, config, 1)
        assert len(subjects[1]) == round(0.2 * len(set.union(*subjects)))


def test_folds_validate_on_every_subject_exactly_once():
    cases = many(23)
    folds = [split_cases(cases, DataConfig(fold=(k, 4)), 0) for k in range(4)]
    assert sorted(name for split in folds for name in split["val"]) == [case.id for case in cases]
    assert all(sorted(split["train"] + split["val"]) == [case.id for case in cases] for split in folds)


@pytest.mark.real_data
def test_hippocampus_is_split_by_subject_and_a_subject_has_two_neighbouring_files(real_data):
    config = DataConfig(subject="subjects.csv", val_fraction=0.15, test_fraction=0.15)
    cases = find_cases(config, real_data / "hippocampus")
    split = split_cases(cases, config, 0)
    sides = [
        {(int(name.split("_")[1]) + 1) // 2 for name in ids} for ids in split.values()
    ]  # files 2k-1 and 2k
    assert len(cases) == 200
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


# --- intensities --------------------------------------------------------------------------------------------


def test_percentiles_are_of_the_whole_volume_even_where_patches_are_cut(settings, root):
    opened_data = opened(replace(settings, patch=(4, 4, 4)))
    dataset = opened_data.dataset("train", augment=True)
    item = dataset[7, 1]
    case = dataset.cases[1]
    v = nib.load(case.image).get_fdata()
    low, high = np.percentile(v, [0.5, 99.5])
    i, j, k = item["start"].tolist()
    expected = np.clip(2 * (v - low) / (high - low) - 1, -1, 1)[i : i + 4, j : j + 4, k : k + 4]
    assert item["image"].shape == (1, 4, 4, 4)
    np.testing.assert_allclose(item["image"][0], expected, atol=1e-5)


def test_zscore_is_over_the_foreground_and_the_background_need_not_be_zero():
    rng = np.random.default_rng(0)
    inside = rng.normal(3, 2, 4000)
    low, high = scaling_numbers(np.concatenate([np.full(6000, -0.7), inside]), "zscore", (0, 100), (0, 1))
    x = scale(inside[None].astype(np.float32), (low,), (high,), clip=False)
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("minmax", 2, 30), ("window", -5, 25), ("none", -1, 1), ("percentile", 2, 30)]
)
def test_the_other_scalings_put_their_two_values_at_minus_one_and_one(kind, low, high):
    values = np.linspace(2, 30, 1000)
    assert scaling_numbers(values, kind, (0, 100), (-5, 25)) == pytest.approx((low, high))


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


def test_shared_scaling_gives_the_source_the_numbers_of_its_image(settings):
    for kind in ("separate", "shared"):
        info = next(iter(opened(replace(settings, paired_scaling=kind)).infos.values()))
        assert (info.source_low == info.low) == (info.source_high == info.high) == (kind == "shared")


def test_unscale_inverts_scale_per_channel():
    v = np.random.default_rng(0).normal(1000, 300, (2, 4, 5)).astype(np.float32)
    x = scale(v, (200.0, 0.0), (1800.0, 5000.0), clip=False)
    np.testing.assert_allclose(x[0], 2 * (v[0] - 200) / 1600 - 1, atol=1e-5)
    np.testing.assert_allclose(unscale(x, (200.0, 0.0), (1800.0, 5000.0), False), v, rtol=1e-5)


def test_the_state_has_the_medians_of_the_training_cases_and_survives_json(settings):
    opened_data = opened(settings, multiple=(4, 4, 8))
    state = opened_data.spec
    train = [opened_data.infos[name] for name in opened_data.split["train"]]
    assert state.low == pytest.approx(np.median([info.low for info in train], axis=0))
    assert state.size == tuple(
        -(-max(info.shape[a] for info in train) // m) * m for a, m in enumerate((4, 4, 8))
    )
    assert (state.channels, state.source_channels, state.num_labels, state.num_classes) == (1, 1, 4, None)
    assert DataSpec.from_dict(json.loads(json.dumps(state.to_dict()))) == state


# --- there and back -----------------------------------------------------------------------------------------


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


def test_padding_repeats_the_edge(settings):
    dataset = opened(replace(settings, size=(20, 20, 20))).dataset("train")
    item = dataset[0, 0]
    shape, start = dataset.infos[dataset.cases[0].id].shape, item["start"]
    index = [(torch.arange(20) + s).clamp(0, n - 1) for s, n in zip(start, shape, strict=True)]
    whole = scale(read(dataset.cases[0].image).array, *dataset.spec.numbers(dataset.infos[item["id"]]), True)
    assert np.array_equal(item["image"], whole[np.ix_([0], *index)])


def test_a_sample_gets_median_spacing_training_units_and_orientation(tmp_path):
    affine = np.diag([-2.0, 1.5, 3.0, 1.0])
    make_folder(tmp_path, 4, affine=affine, masks=False)
    config = DataConfig(root=str(tmp_path), image="images/*.nii.gz", cache_dir=str(tmp_path / "c"))
    state = opened(config, multiple=(8, 8, 8)).spec
    volume = state.to_volume(torch.full((1, *state.size), -1.0))
    back = nib.load(write(tmp_path / "sample.nii.gz", volume))
    assert nib.aff2axcodes(back.affine) == ("L", "A", "S")
    np.testing.assert_allclose(back.header.get_zooms(), [2, 1.5, 3])
    np.testing.assert_allclose(back.get_fdata(), state.low[0], rtol=1e-6)
    np.testing.assert_allclose(back.affine @ [*((np.array(back.shape) - 1) / 2), 1], [0, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize("change", [{"spacing": (2.0, 1.0, 3.3)}, {"resize": True, "size": (7, 16, 5)}, {}])
def test_the_grid_told_from_the_header_is_the_one_that_is_loaded(tmp_path, change):
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


# --- formats ------------------------------------------------------------------------------------------------


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


@pytest.mark.real_data
def test_a_mask_with_a_slope_is_rounded_and_not_cut(real_data):
    config = DataConfig(image="*/T1c_*.nii.gz", mask="*/brainmask.nii.gz", subset=1)
    cases = find_cases(config, real_data / "brats2013")
    mask = load_role(cases[0].mask, "mask", config).array
    assert cases[0].id == "brats_2013_pat0003_1"
    assert np.unique(mask).tolist() == [0, 1]
    assert 0.05 < mask.mean() < 0.5


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
    assert item["mask"].unique().tolist() == [0, 1]


def test_phantoms_are_an_ordinary_data_set(tmp_path):
    root = write_phantoms(tmp_path / "heads", 3, dims=2, size=(24, 24))
    item = opened(DataConfig(root=str(root), dims=2, cache_dir=str(tmp_path))).dataset("train")[0, 0]
    assert item["label"] in (0, 1)
    assert item["text"]
    assert item["image"].shape == item["source"].shape == (1, *item["mask"].shape) == (1, 24, 24)


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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_patches_around_the_foreground_have_the_share_that_is_asked_for(tmp_path, share):
    for i in range(3):
        labels = np.zeros((20, 24), dtype=np.uint8)
        labels[[1, 10, 19][i], [22, 12, 0][i]] = 2  # one voxel, in a corner too
        path = tmp_path / f"images/{i}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, np.random.default_rng(i).random((20, 24), dtype=np.float32))
        (tmp_path / "labels").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / f"labels/{i}.tif", labels)
    config = DataConfig(
        root=str(tmp_path), image="images/*.tif", mask="labels/*.tif", dims=2, patch=(6, 7), foreground=share,
        cache_dir=str(tmp_path / "c"), val_fraction=0.34,
    )  # fmt: skip
    dataset = opened(config).dataset("train", augment=True)
    items = [dataset[p, p % 2] for p in range(300)]
    hit = np.mean([bool(item["mask"].any()) for item in items])
    # By chance a patch holds the voxel of the middle case in 42 of 270 places, that of a corner in at most 14
    assert share <= hit + 0.07
    assert hit <= share + (1 - share) * 0.2 + 0.07
    starts = torch.stack([item["start"] for item in items])
    assert starts.min() >= 0
    assert (starts <= torch.tensor([14, 17])).all()
    again = dataset[7, 1]
    assert torch.equal(again["image"], items[7]["image"])


# --- augmentation -------------------------------------------------------------------------------------------

ALL = AugmentConfig(
    flip_axes=(0, 1, 2),
    rot90_axes=(0, 1),
    affine=1.0,
    elastic=1.0,
    intensity=1.0,
    max_rotation=30,
    max_elastic=0.1,
)


def test_augmentation_is_off_by_default(settings):
    opened_data = opened(replace(settings, size=(16, 16, 16)))
    plain, training = opened_data.dataset("train"), opened_data.dataset("train", augment=True)
    assert torch.equal(plain[0, 2]["image"], training[5, 2]["image"])


@pytest.mark.parametrize("dims", [2, 3])
def test_image_source_and_mask_are_moved_alike_and_labels_stay_integers(dims):
    labels = torch.randint(0, 2, (5,) * dims, generator=torch.Generator().manual_seed(0))
    labels = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels = labels.repeat_interleave(4, 2) if dims == 3 else labels
    image = labels[None].float()
    config = replace(ALL, flip_axes=tuple(range(dims)), intensity=0.0)
    changed = 0
    for position in range(6):
        draw = keyed_generator(0, position, "augment")
        (x, y), mask, _ = augment([image, image.clone()], labels, torch.ones(dims), config, draw)
        assert torch.equal(x, y)
        assert mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= {0, 1}
        flat = (x[0] - x[0].round()).abs() < 1e-4  # away from borders linear and nearest agree
        assert torch.equal(x[0].round().long()[flat], mask[flat])
        assert flat.float().mean() > 0.05
        changed += not torch.equal(mask, labels)
    assert changed == 6
    config = replace(config, affine=0.0, elastic=0.0)
    (x,), mask, _ = augment([image], labels, torch.ones(dims), config, keyed_generator(0, 1, "augment"))
    assert torch.equal(x[0].long(), mask)


def test_the_mask_of_an_item_stays_with_its_image(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        labels = rng.integers(0, 4, (12, 12, 12), dtype=np.uint8)
        save(tmp_path / f"images/{i}.nii.gz", labels.astype(np.float32))
        save(tmp_path / f"labels/{i}.nii.gz", labels)
    turns = AugmentConfig(flip_axes=(0, 1, 2), rot90_axes=(0, 2))
    options = {"scaling": "none", "patch": (6, 6, 6), "cache_dir": str(tmp_path / "c"), "augment": turns}
    config = DataConfig(root=str(tmp_path), image=ROLES["image"], mask=ROLES["mask"], **options)
    dataset = opened(config).dataset("train", augment=True)
    items = [dataset[position, 0] for position in range(8)]
    assert all(torch.equal(item["image"][0].long(), item["mask"]) for item in items)
    assert not any(torch.equal(items[0]["image"], item["image"]) for item in items[1:])


def test_a_rotation_is_rigid_in_millimetres_on_anisotropic_voxels():
    size, spacing = (60, 40, 20), torch.tensor([1.0, 2.0, 4.0])
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing.tolist(), strict=True)]
    world = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # mm from the centre
    centre = torch.tensor([12.0, -8.0, 10.0])
    ball = torch.exp(-(world - centre.view(3, 1, 1, 1)).square().sum(0) / (2 * 7.0**2))
    config = AugmentConfig(affine=1.0, max_rotation=40.0, max_scale=0.0, max_shift=0.0)
    for position in range(4):
        (x,), _, _ = augment([ball[None]], None, spacing, config, keyed_generator(0, position, "augment"))
        where = (world * x[0]).sum((1, 2, 3)) / x.sum()
        variance = ((world - where.view(3, 1, 1, 1)).square() * x[0]).sum((1, 2, 3)) / x.sum()
        assert float(where.norm()) == pytest.approx(float(centre.norm()), rel=0.03)
        assert (where - centre).norm() > 1
        torch.testing.assert_close(variance.sqrt(), torch.full((3,), 7.0), rtol=0.08, atol=0)


def test_a_quarter_turn_of_anisotropic_voxels_turns_the_spacing_too():
    config, x = AugmentConfig(rot90_axes=(0, 2)), torch.rand(1, 6, 5, 6)
    for position in range(8):
        (y,), _, spacing = augment(
            [x], None, torch.tensor([1.0, 2, 3]), config, keyed_generator(0, position, "a")
        )
        turned = any(torch.equal(y, x.rot90(k, (1, 3))) for k in (1, 3)) and not torch.equal(y, x)
        assert spacing.tolist() == ([3, 2, 1] if turned else [1, 2, 3])


# --- batches ------------------------------------------------------------------------------------------------


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def joined(groups):
    """All samples of micro-batches, as single items in order of position."""
    items = {}
    for batch in (batch for group in groups for batch in group):
        for i, position in enumerate(batch["position"].tolist()):
            assert position not in items
            items[position] = {key: value[i] for key, value in batch.items()}
    return [items[p] for p in sorted(items)]


@pytest.fixture
def training_set(settings):
    config = replace(settings, patch=(8, 8, 8), augment=ALL, val_fraction=0.2)
    return opened(config).dataset("train", augment=True)


def test_samples_do_not_depend_on_workers_ranks_micro_batches_or_restarts(training_set, monkeypatch):
    reference = joined(batches(training_set, 6, 6, 0, 0, 4))
    assert len(reference) == 24

    def check(items):
        assert len(items) == 24
        assert all(equal(a, b) for a, b in zip(reference, items, strict=True))

    check(joined(batches(training_set, 6, 4, 0, 0, 4)))
    check(joined(batches(training_set, 6, 2, 0, 0, 4, workers=2)))
    check(joined([*batches(training_set, 6, 6, 0, 0, 1), *batches(training_set, 6, 3, 0, 1, 4)]))
    ranked = []
    monkeypatch.setattr(batching, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(batching, "rank", lambda r=r: r)
        groups = list(batches(training_set, 6, 1, 0, 0, 4))
        assert [[len(batch["id"]) for batch in group] for group in groups] == [[1, 1]] * 4
        ranked += groups
    check(joined(ranked))


def test_every_epoch_holds_every_case_once_in_an_order_of_its_own(training_set):
    n = len(training_set)
    order = [item["index"].item() for item in joined(batches(training_set, 3, 3, 0, 0, n))]  # 3 epochs
    epochs = [order[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_colour_is_a_gain_and_bias_of_each_channel_of_the_image_alone():
    image, source, config = torch.rand(3, 6, 7), torch.rand(1, 6, 7), AugmentConfig(colour=1.0)
    draw = keyed_generator(0, 3, "augment")
    (x, y), _, _ = augment([image, source], None, torch.ones(2), config, draw)
    assert torch.equal(y, source)
    gains = (x[:, 0, 1] - x[:, 0, 0]) / (image[:, 0, 1] - image[:, 0, 0])
    bias = x[:, 0, 0] - gains * image[:, 0, 0]
    assert torch.allclose(x, gains.view(3, 1, 1) * image + bias.view(3, 1, 1), atol=1e-4)
    assert len(set(gains.tolist())) == 3
    assert (gains - 1).abs().max() <= 0.1 + 1e-4
    assert 0 < bias.abs().max() <= 0.1 + 1e-4


def test_loading_leaves_the_loops_random_state_alone(training_set):
    before = torch.get_rng_state()
    list(batches(training_set, 2, 2, 0, 0, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_takes_every_case_once_over_all_ranks(settings, monkeypatch, ranks):
    dataset = opened(settings).dataset("train")
    monkeypatch.setattr(batching, "world_size", lambda: ranks)
    seen = []
    for r in range(ranks):
        monkeypatch.setattr(batching, "rank", lambda r=r: r)
        seen += [i for batch in evaluation_batches(dataset, 2) for i in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(dataset)))


@pytest.mark.parametrize("change", [{"cache": "disk"}, {"cache": "none"}, {"cache_gb": 3e-5}])
def test_every_cache_gives_the_same_items(settings, change, capsys):
    plain = opened(settings).dataset("train")
    cached = opened(replace(settings, **change)).dataset("train")
    for _ in range(2):
        assert all(equal(plain[i, i], cached[i, i]) for i in range(len(plain)))
    files = list((Path(settings.cache_dir)).glob("*.npy"))
    assert len(files) == (3 * len(plain) if change == {"cache": "disk"} else 0)
    assert ("cache_gb" in capsys.readouterr().out) == ("cache_gb" in change)


def test_a_case_without_a_mask_takes_part_if_allowed(root, settings, tmp_path):
    for name in ("images/case_0.nii.gz", "images/case_1.nii.gz", "labels/case_0.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(root / name)
    changes = {"root": str(tmp_path), "source": None, "allow_missing_mask": True, "val_fraction": 0.0}
    dataset = opened(replace(settings, **changes)).dataset("train")
    batch = next(evaluation_batches(dataset, 2))
    assert batch["mask"][0].min() == 0
    assert torch.equal(batch["mask"][1], torch.full_like(batch["mask"][1], -1))
    assert (batch["id"], batch["label"].tolist()) == (["case_0", "case_1"], [-1, -1])


def test_a_patch_larger_than_the_cases_is_padded_and_said_once(settings, capsys):
    dataset = opened(replace(settings, patch=(16, 8, 8))).dataset("train", augment=True)
    assert dataset[0, 0]["image"].shape == (1, 16, 8, 8)
    assert capsys.readouterr().out.count("padded by repeating the edge") == 1


def test_a_stored_split_is_kept_and_cases_it_lacks_are_left_out(settings):
    stored = {"train": ["case_1", "case_4"], "val": ["case_2"], "test": []}
    opened_data = opened(settings, split=stored)
    assert opened_data.split == stored
    assert sorted(opened_data.cases) == ["case_1", "case_2", "case_4"]


def test_a_sample_beyond_the_clipped_range_is_written_within_the_data_s_own(tmp_path):
    write_phantoms(tmp_path / "heads", 4, size=(8, 8, 8), spacing=(24.0, 28.0, 24.0))
    config = DataConfig(root=str(tmp_path / "heads"), cache_dir=str(tmp_path), val_fraction=0.25)
    state = open_data(config, "heads", 0).spec
    array = state.to_volume(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)).array.flatten()
    low, high = state.low[0], state.high[0]
    assert array.tolist() == pytest.approx([low, (low + high) / 2, high], rel=1e-5)
