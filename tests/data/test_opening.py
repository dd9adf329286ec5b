"""The data of a run opens from any format and layout, with the split that the run has stored."""

import hashlib
import json
import statistics
import typing
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import tifffile
from folders import fresh_settings, image, mask, opened, save

from ldm3d.config import InputError
from ldm3d.data import DataConfig, open_data
from ldm3d.data.opening import check_numbering, parts_before
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


def test_what_cases_hold_is_told_by_their_voxels_and_paths_start_at_the_table(settings, root, tmp_path):
    data = opened(settings)
    for role, folder in (("image", "images"), ("mask", "labels"), ("source", "sources")):
        for name, held in data.contents.items():
            voxels = np.asarray(nib.load(root / folder / f"{name}.nii.gz").dataobj, np.float32)
            assert held[role] == hashlib.sha256(voxels.tobytes()).hexdigest()[:32]
            assert held["grid"] == f"{voxels.shape} 1 1 1"
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


def test_another_seed_takes_over_the_split_of_a_run_which_may_be_gone_later(settings, tmp_path, capsys):
    taken = {"train": ["case_4", "case_5"], "val": ["case_2"], "test": ["case_0"]}
    file = tmp_path / "my split.json"
    file.write_text(json.dumps(taken))
    config = replace(settings, split=str(file))
    for seed in range(2):
        assert open_data(config, "none", seed).split == taken
    assert "note: 2 cases of " in capsys.readouterr().out
    for name, value in (("test_fraction", 0.2), ("test_subjects", ("1",))):
        with pytest.raises(InputError, match=f"data.{name}: has no effect beside the split of a run"):
            opened(replace(config, **{name: value}))
    with pytest.raises(
        InputError, match=r"data.mask_fraction: is of all cases, and .*split\.json leaves some"
    ):
        opened(replace(config, mask_fraction=0.5))
    same = taken | {"train": taken["val"]}  # as of a run with data.val_fraction 0
    file.write_text(json.dumps(same))
    assert opened(config).split["train"] == taken["val"]
    file.write_text(json.dumps(same | {"test": taken["val"] + ["case_0"]}))
    with pytest.raises(InputError, match="lists case case_2 twice"):
        opened(config)
    file.write_text(json.dumps(taken | {"test": ["case_4"]}))
    with pytest.raises(InputError, match=r"data.split: .*split\.json lists case case_4 twice"):
        opened(config)
    file.unlink()
    with pytest.raises(InputError, match=r"split\.json"):
        opened(config)
    assert opened(config, split=taken).split == taken  # as a run that is resumed opens them


def test_a_case_of_the_stored_split_that_is_gone_is_named(fresh):
    split = {"train": ["a", "zebra"], "val": ["b"], "test": []}
    with pytest.raises(InputError, match="case zebra"):
        open_data(fresh_settings(fresh), "heads", 0, split)


@pytest.mark.parametrize(
    "split",
    [{}, {"train": 1, "val": 2}, {"train": [], "val": ["b"]}, {"train": ["a"], "val": [], "test": []}],
)
def test_a_stored_split_without_cases_is_refused(fresh, split):
    with pytest.raises(InputError, match="the stored split lists no cases to train on, or none to validate"):
        open_data(fresh_settings(fresh), "heads", 0, split)


@pytest.mark.parametrize(
    ("changes", "words"), [({"mask": None}, "without masks"), ({"crop": "centre"}, "with data.crop centre")]
)
def test_a_foreground_without_effect_is_refused_for_a_new_run(fresh, changes, words):
    config = fresh_settings(fresh, foreground=0.5, **changes)
    with pytest.raises(InputError, match=f"data.foreground: has no effect {words}"):
        opened(config)
    opened(config, split={"train": ["a", "c"], "val": ["b"], "test": []})  # of a run that was started before


def test_labels_that_are_hardly_numbered_one_by_one_are_not_learned(fresh):
    for name in "abcd":
        save(fresh / f"labels/{name}.nii.gz", (mask() > 0).astype(np.uint8) * 255)
    with pytest.raises(InputError, match=r"data\.label_values: the masks hold 2 labels .* 256; give 0,255,"):
        check_numbering(open_data(fresh_settings(fresh), "heads", seed=0))
    for changes, num in (({"label_values": (0, 255)}, 2), ({"num_labels": 256}, 256)):
        data = open_data(fresh_settings(fresh, **changes), "heads", seed=0)
        check_numbering(data)
        assert data.spec.num_labels == num


def test_labels_that_occur_nowhere_are_noted(fresh, capsys):
    for values, note in (((0, 7), "6 of the 8 labels occur in no mask"), ((0, 1), "")):
        for name in "abcd":
            save(fresh / f"labels/{name}.nii.gz", np.where(mask() > 0, *values[::-1]).astype(np.uint8))
        check_numbering(open_data(fresh_settings(fresh), "heads", seed=0))
        out = capsys.readouterr().out
        assert note in out
        assert ("data.label_values 0,7" in out) == bool(note)


# --- beside an earlier split --------------------------------------------------------------------------------


def test_cases_are_known_by_their_voxels_whatever_their_name_else_by_their_ids(settings):
    data = opened(settings)
    infos = {f"copy of {name}": info for name, info in data.infos.items()}
    infos["case_0"] = replace(data.infos["case_0"], content="other", source_content="contrast")
    infos["swapped"] = replace(infos["case_0"], content=data.infos["case_1"].source_content)
    infos["new"] = replace(infos["case_0"])
    before = {"split": {"train": ["case_0", "case_2", "case_5"], "val": ["case_1"], "test": ["case_3"]}}
    names = [f"case_{i}" for i in range(6)]
    parts = dict(zip(names, ["train", "val", "train", "test", None, "train"], strict=True))  # case_4: nowhere
    known, alike = parts_before(infos, before | {"contents": data.contents})
    assert known == {f"copy of {name}": part for name, part in parts.items()} | {"swapped": "val"}
    assert alike == {"case_0": "train"}
    older = parts_before(data.infos, before)  # of a run that has not stored what its cases held
    assert older == ({}, {name: part for name, part in parts.items() if part})


def test_of_the_same_voxels_in_two_parts_training_counts(settings):
    data = opened(settings)
    contents = {name: data.contents["case_0"] for name in ("a", "b", "c")}
    for parts in (
        {"train": ["c"], "val": ["a"], "test": ["b"]},
        {"train": ["a"], "val": ["b"], "test": ["c"]},
    ):
        known, _ = parts_before(data.infos, {"split": parts, "contents": contents})
        assert known == {"case_0": "train"}


# --- what leaks from one part of the split to another -------------------------------------------------------


def table_of(fresh, columns="subject,split", **rows):
    """The data of a table with these cells beside the images of the cases a, b, c, d."""
    lines = [f"image,{columns}", *(f"images/{name}.nii.gz,{cells}" for name, cells in rows.items())]
    (fresh / "cases.csv").write_text("\n".join(lines) + "\n")
    return open_data(DataConfig(root=str(fresh), cache_dir=str(fresh.parent / "cache")), "heads", seed=0)


def test_the_facts_of_a_data_set_count_subjects_and_say_grid_and_scaling_in_the_units_of_the_files(
    fresh, capsys
):
    data = table_of(fresh, a="x,train", b="x,train", c="y,train", d="z,val")
    assert "note" not in capsys.readouterr().out
    facts = data.facts()
    assert facts["cases"] == "train 3 (subjects: 2), val 1"
    assert facts["data"] == str(fresh)
    assert facts["grid"].startswith("x".join(map(str, data.spec.size)) + " voxels of ")
    low, high = (statistics.median(getattr(data.infos[n], k)[0] for n in "abc") for k in ("low", "high"))
    assert facts["intensities"].startswith(f"{low:.4g} to {high:.4g} in the files become -1 to 1 (each")


@pytest.mark.parametrize("scaling", typing.get_args(typing.get_type_hints(DataConfig)["scaling"]))
def test_every_scaling_is_said_in_words_and_patches_only_where_they_are_smaller(fresh, scaling):
    data = opened(
        fresh_settings(fresh, scaling=scaling, window=(-160.0, 240.0), size=(8, 8, 8), patch=(4, 4, 4))
    )
    facts = data.facts()
    assert ("-160 to 240 in the files" in facts["intensities"]) == (scaling == "window")
    assert ("as they are" in facts["intensities"]) == (scaling == "none")
    assert facts["grid"].startswith("8x8x8 voxels of ")
    assert facts["grid"].endswith("; patches of 4x4x4")


def test_a_subject_in_two_parts_is_noted_whether_the_split_is_of_the_table_or_stored(fresh, capsys):
    data = table_of(fresh, a="x,train", b="y,train", c="x,val", d="z,test")
    assert "note: subject x is in both train and val" in capsys.readouterr().out
    open_data(data.config, "heads", 0, data.split)
    assert "note: subject x is in both train and val" in capsys.readouterr().out
    opened(fresh_settings(fresh, val_fraction=0.0, subject="(.)"))
    assert "is in both" not in capsys.readouterr().out  # validation is on the training cases, as was said


@pytest.mark.parametrize("part", ["val", "train"])
def test_the_same_voxels_under_two_names_are_noted_if_they_are_in_two_parts(fresh, capsys, part):
    twin = nib.load(fresh / "images/a.nii.gz")
    nib.save(nib.Nifti1Image(twin.get_fdata().astype(np.float64), twin.affine), fresh / "images/d.nii.gz")
    table_of(fresh, a="a,train", b="b,train", c="c,val", d=f"d,{part}")
    note = f"images/a.nii.gz (train) and {fresh}/images/d.nii.gz (val) have the same voxels"
    assert (note in capsys.readouterr().out) == (part == "val")


def test_blank_slices_in_two_parts_are_not_taken_for_copies(tmp_path, capsys):
    for i in range(4):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.zeros((8, 8), np.float32) + (i == 0))
        tifffile.imwrite(tmp_path / f"{i + 4}.tif", np.random.default_rng(i).random((8, 8), dtype=np.float32))
    opened(DataConfig(root=str(tmp_path), image="*.tif", dims=2, val_fraction=0.5, cache_dir=str(tmp_path)))
    assert "same voxels" not in capsys.readouterr().out


def test_blank_cells_of_the_subject_are_noted_as_subjects_of_their_own(fresh, capsys):
    table_of(fresh, "subject", a="x", b="", c="x", d="")
    assert "note: 2 of 4 cases have no subject" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (["p01_a", "p01_b", "p02_a", "p02_b"], True),
        (["p01a", "p01b", "p02a", "p02b"], True),
        (["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w", "sub-02_ses-2_T1w"], True),
        (["p07_z040", "p07_z041", "p19_z040", "p19_z041"], True),
        (["case_1", "case_2", "case_3", "case_4"], False),
        (
            ["BraTS20_Training_001", "BraTS20_Training_002", "BraTS20_Training_003", "BraTS20_Training_004"],
            False,
        ),
        (["TCGA-A7-A13E-01Z-00-DX1", "TCGA-A7-A13F-01Z-00-DX1", "TCGA-18-5592-01Z-00-DX1", "x-1-DX1"], False),
    ],
)
def test_names_that_look_like_several_scans_of_a_subject_are_noted_with_a_rule_that_keeps_them_together(
    tmp_path, capsys, names, rule
):
    for i, name in enumerate(names):
        save(tmp_path / f"data/{name}.nii.gz", image(seed=i))
    config = DataConfig(
        root=str(tmp_path / "data"), image="*.nii.gz", val_fraction=0.5, cache_dir=str(tmp_path)
    )
    seed = 2  # which parts the two scans of a subject fall into depends on it
    open_data(config, "x", seed)
    said = capsys.readouterr().out
    assert ("look like one subject" in said) == rule
    if rule:
        data = open_data(replace(config, subject=said.split("--data.subject '")[1].split("'")[0]), "x", seed)
        assert len({case.subject for case in data.cases.values()}) == 2
        assert "look like one subject" not in capsys.readouterr().out


# --- masks of a fraction ------------------------------------------------------------------------------------


def labelled(data):
    """The training subjects with masks, without checks of what else there is."""
    return {data.cases[name].subject for name in data.split["train"] if data.cases[name].mask}


def test_a_larger_fraction_has_the_masks_of_a_smaller_one_and_more(settings):
    whole = opened(replace(settings, val_fraction=0.2))
    subjects = {whole.cases[name].subject for name in whole.split["train"]}
    found = [labelled(opened(replace(settings, val_fraction=0.2, mask_fraction=f))) for f in (0.01, 0.5, 1)]
    assert len(found[0]) == 1
    assert found[0] < found[1] < found[2] == subjects
    assert len(found[1]) == round(0.5 * len(subjects))
    other = open_data(
        replace(settings, val_fraction=0.2, mask_fraction=0.5), "other", seed=5, split=whole.split
    )
    assert labelled(other) != found[1]  # another seed, others


@pytest.mark.parametrize("allowed", [True, False])
def test_cases_beyond_the_fraction_take_part_without_mask_or_not_at_all(settings, allowed):
    whole = opened(replace(settings, val_fraction=0.2))
    config = replace(settings, val_fraction=0.2, mask_fraction=0.4, allow_missing_mask=allowed)
    data = opened(config)
    kept = [name for name in whole.split["train"] if whole.cases[name].subject in labelled(data)]
    assert data.split["train"] == (whole.split["train"] if allowed else kept)
    assert {part: data.split[part] for part in ("val", "test")} == {
        k: whole.split[k] for k in ("val", "test")
    }
    assert all(data.cases[name].mask for name in data.split["val"])
    assert data.spec == whole.spec
    items = [data.dataset("train")[i, i] for i in range(len(data.split["train"]))]
    assert {item["id"] for item in items if (item["mask"] >= 0).all()} == set(kept)
    again = open_data(config, "", 0, data.split)  # as a run that is resumed opens them
    assert again.split == data.split
    assert labelled(again) == labelled(data)
    assert again.contents == data.contents
