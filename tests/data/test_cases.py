"""Files become cases by name or table, cases become a split by subject, and what does not fit is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import fresh_settings, mask, opened, refused, save

from ldm3d.config import InputError
from ldm3d.data import Case, DataConfig
from ldm3d.data.cases import find_cases, resolve_root, split_cases

# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "pattern", "ids"),
    [
        (["images/a.nii.gz", "images/b.b.nii.gz"], "images/*.nii.gz", ["a", "b.b"]),
        (["p1/T1c_x.nii", "p2/T1c_y.nii", "p2/T2_y.nii"], "*/T1c_*.nii", ["p1", "p2"]),
        (["s1/a.tif", "s1/b.tif", "s2/a.tif"], "{id}/{id}.tif", ["s1_a", "s1_b", "s2_a"]),
        (["p1/p1.tif", "p1/p1_seg.tif", "p2/p2.tif", "p2/p1.tif"], "*/{same}.tif", ["p1", "p2"]),
        (["s1/a/a.tif", "s1/a/s1.tif", "s2/a/a.tif"], "{id}/{id}/{same}.tif", ["s1_a", "s2_a"]),
        (["site/x/a.tif", "b.tif"], "**/*.tif", ["a", "b"]),
        (["a.tif", "b.nii.gz"], "*", ["a", "b"]),
        (["images/a.tif", "images/._a.tif"], "images/*.tif", ["a"]),
        (["x[1]/a1.tif", "x[1]/a22.tif"], "x[1]/*?.tif", ["a", "a2"]),
        (["a.NII.GZ", "b.nii.gz", "c.Nii.gz"], "*.nii.gz", ["a", "b", "c"]),
        (["p1/T1.TIF", "p2/T1.tif", "p2/t1.tif"], "*/T1.tif", ["p1", "p2"]),
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


@pytest.mark.parametrize("role", ["mask", "source"])
def test_in_one_folder_a_file_that_belongs_to_an_image_is_no_image(role, tmp_path):
    for name in ("a", "a_seg", "b", "b_seg"):
        (tmp_path / f"{name}.tif").touch()
    cases = find_cases(DataConfig(**{"image": "*.tif", role: "*_seg.tif"}), tmp_path)
    assert [(c.id, getattr(c, role).name) for c in cases] == [("a", "a_seg.tif"), ("b", "b_seg.tif")]
    assert len(find_cases(DataConfig(**{"image": "*.tif", role: "*.tif"}), tmp_path)) == 4  # its own mask


def test_a_suffix_in_capitals_is_no_part_of_an_id(tmp_path):
    for name in ("a.NII.GZ", "b.Nii"):
        (tmp_path / name).touch()
    for settings in (DataConfig(image="*"), DataConfig(image="{id}"), DataConfig(table="table.csv")):
        if settings.table:
            (tmp_path / "table.csv").write_text("image\na.NII.GZ\nb.Nii\n")
        assert [case.id for case in find_cases(settings, tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_csv_fills_the_same_table(root, tmp_path, mark):
    rows = [
        ["image", " class", "text", "subject", "split", "mask"],
        [f"{root}/images/case_0.nii.gz", "1", "an old head", "anna", "train", f"{root}/labels/case_0.nii.gz"],
        [f"{root}/images/case_1.nii.gz", "", "", "ben", "val", f"{root}/labels/case_1.nii.gz"],
    ]
    (tmp_path / "cases.csv").write_text("\ufeff" + "\n".join(mark.join(row) for row in rows) + "\n")
    first, second = cases = find_cases(DataConfig(), tmp_path)
    assert (first.id, first.class_idx, first.text, first.subject) == ("case_0", 1, "an old head", "anna")
    assert (second.id, second.class_idx, second.text, second.subject) == ("case_1", None, "", "ben")
    table = (tmp_path / "cases.csv").read_text()
    (tmp_path / "named.csv").write_text(table.replace(f"{mark}1{mark}", f"{mark}benign{mark}"))
    named = find_cases(DataConfig(table="named.csv"), tmp_path)[0]
    assert (named.class_idx, named.columns["class"]) == (None, "benign")
    (tmp_path / "named.csv").write_text(table.replace(f"{mark}1{mark}", f"{mark}{10**40}{mark}"))
    assert find_cases(DataConfig(table="named.csv"), tmp_path)[0].class_idx is None  # a name, if anything
    assert split_cases(cases, DataConfig(), 0) == {"train": ["case_0"], "val": ["case_1"], "test": []}
    item = opened(DataConfig(root=str(tmp_path), cache_dir=str(tmp_path))).dataset("val")[5, 0]
    assert (item["class"], item["text"], item["position"], item["index"]) == (-1, "", 5, 0)
    (tmp_path / "cases.csv").write_text(table.replace(f"{mark}1{mark}", f"{mark}0{mark}"))
    zero = opened(DataConfig(root=str(tmp_path), cache_dir=str(tmp_path))).dataset("train")[0, 0]
    assert zero["class"] == 0


def test_an_msd_folder_is_recognised_and_its_validation_list_is_the_split(root, tmp_path):
    def entry(i):
        return {"image": f"{root}/images/case_{i}.nii.gz", "label": f"{root}/labels/case_{i}.nii.gz"}

    content = {"training": [entry(0), entry(2)], "validation": [entry(1)], "test": ["x.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cases = find_cases(DataConfig(), tmp_path)
    assert [case.mask.parent.name for case in cases] == ["labels"] * 3
    assert split_cases(cases, DataConfig(), 0)["val"] == ["case_1"]


def test_a_table_beside_globs_is_noted_as_unread(tmp_path, capsys):
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


def test_the_root_comes_from_the_flag_then_the_environment_then_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flag", "env/heads", "data/heads"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    assert resolve_root(DataConfig(), "heads").samefile("data/heads")
    monkeypatch.setenv("LDM3D_DATA", str(tmp_path / "env"))
    assert resolve_root(DataConfig(), "heads").samefile("env/heads")
    assert resolve_root(DataConfig(root="flag"), "heads").samefile("flag")


def test_a_root_that_has_moved_is_found_by_its_name_in_the_environments_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDM3D_DATA", str(tmp_path / "env"))
    (tmp_path / "env/heads").mkdir(parents=True)
    for gone in ("/gone/heads", "/gone/heads/", str(tmp_path / "gone/.." / "heads")):
        assert resolve_root(DataConfig(root=gone, name="other"), "another") == tmp_path / "env/heads"
        assert f"note: no folder {Path(gone)}; the data are taken from" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no data folder /gone/other or .*env/other; put it there"):
        resolve_root(DataConfig(root="/gone/other", name="heads"), "heads")


def test_a_case_without_its_partner_is_named(fresh):
    (fresh / "labels/b.nii.gz").unlink()
    refused(fresh_settings(fresh), "case b", "images/b.nii.gz", "labels/*.nii.gz", "allow_missing_mask")
    save(fresh / "labels/b.nii.gz", mask())
    (fresh / "images/c.nii.gz").unlink()
    refused(fresh_settings(fresh), "labels/c.nii.gz", "which has no image")
    refused(
        fresh_settings(fresh, image="labels/*.nii.gz", mask=None, source="images/*.nii.gz"),
        "case c",
        "source",
    )


@pytest.mark.parametrize("pattern", ["*/t1.tif", "{id}/*.tif", "**/*1.tif", "*/*"])
def test_links_to_files_that_are_not_there_are_named(tmp_path, pattern):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "t1.tif").touch()
    assert len(find_cases(DataConfig(image=pattern.replace("**/*1", "{id}/t1")), tmp_path)) == 3
    for name in "bc":
        (tmp_path / name / "t1.tif").unlink()
        (tmp_path / name / "t1.tif").symlink_to(tmp_path / ".git/annex/objects" / name)
    with pytest.raises(InputError, match=r"data\.image: 2 links .* such as .*b/t1\.tif; .*datalad get"):
        find_cases(DataConfig(image=pattern), tmp_path)


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
        ({"image": "{same}/{id}.nii.gz"}, ["data.image", "for the case id", "{same}"]),
        ({"image": "*/*.nii.gz"}, ["has two files", "{id}"]),
        ({"subject": "x(.*)"}, ["data.subject", "does not fit 'a'"]),
        ({"subject": "a.*"}, ["data.subject", "one group"]),
        ({"participants": "none.tsv"}, ["none.tsv", "no such CSV", "data.participants"]),
        ({"subject": "("}, ["data.subject", "expression"]),
        ({"subject": "who.csv"}, ["who.csv"]),
        ({"split": "images/([a-d])"}, ["case a", "'a'", "train, val, test"]),
        ({"subject": "(.*)", "subset": 1}, ["validate", "1 cases"]),
        ({"source": "labels/*.nii.gz", "source_channel": (1,)}, ["labels/a.nii.gz", "channel"]),
    ],
)
def test_a_setting_that_does_not_fit_the_folder_is_named(fresh, changes, parts):
    refused(fresh_settings(fresh, **changes), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("picture,mask\nimages/a.nii.gz,\n", ["no column 'image'", "picture"]),
        ("image,mask\nimages/a.nii.gz,\n", ["case a", "no mask"]),
        ("image\nimages/x.nii.gz\n", ["images/x.nii.gz", "no file"]),
        (f"image\n{'x' * 5000}\n", ["no file"]),
        ("image\nimages/a.nii.gz\nimages/a.nii.gz\n", ["listed twice"]),
        ("image,split\nimages/a.nii.gz,train\nimages/b.nii.gz,\n", ["case b", "no split"]),
        ("image,split\nimages/a.nii.gz,train\nimages/b.nii.gz,learn\n", ["case b", "'learn'"]),
        ("image\n", ["lists no case"]),
        (f"image,text\nimages/a.nii.gz,{'x' * 200_000}\n", ["cases.csv: line 2", "field larger than"]),
        ("image,mask,image\nimages/a.nii.gz,,images/b.nii.gz\n", ["two columns 'image'"]),
        ("", ["no column 'image'"]),
        ("image,text\nimages/a.nii.gz,a small, round lesion\n", ["cases.csv: line 2", "2 cells", "quotes"]),
        ("image,text\nimages/a.nii.gz,\nimages/b.nii.gz\n", ["cases.csv: line 3 has not the 2 cells"]),
    ],
)
def test_a_bad_table_is_named_with_the_row(fresh, text, parts):
    (fresh / "cases.csv").write_text(text)
    refused(DataConfig(root=str(fresh), cache_dir=str(fresh)), *parts)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"training": [{"label": "x"}]}',
        '{"training": 3}',
        '{"a": []}',
        '{"training": [{"image": "images/a.nii.gz", "label": 1}]}',
        '{"training": [{"image": "images/a.nii.gz", "label": ["labels/a.nii.gz"]}]}',
        '{"training": [{"image": ["images/a.nii.gz"]}]}',
        '{"training": [{"image": null, "label": "labels/a.nii.gz"}]}',
        '{"training": ' + "[" * 100_000,
    ],
)
def test_a_bad_dataset_json_is_named(fresh, content):
    (fresh / "dataset.json").write_text(content)
    refused(DataConfig(root=str(fresh)), "dataset.json", "training")


# --- the split ----------------------------------------------------------------------------------------------


def test_train_and_val_folders_split_the_cases(tmp_path):
    for name in ("train/a.tif", "train/b.tif", "val/a.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = DataConfig(image="{id}/{id}.tif", split="^(train|val|test)/")
    split = split_cases(find_cases(config, tmp_path), config, 0)
    assert split == {"train": ["train_a", "train_b"], "val": ["val_a"], "test": []}


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
    backwards = split_cases(cases[::-1], config, 0)
    assert split == {part: ids[::-1] for part, ids in backwards.items()}
    if num > 10:
        assert split != split_cases(cases, config, 1)
        assert len(subjects[1]) == round(0.2 * len(set.union(*subjects)))


def test_the_split_of_the_guide_is_the_one_that_is_drawn():
    cases = [Case(f"p{s:02d}_{k}", "x", subject=f"p{s:02d}") for s in range(1, 11) for k in "ab"]
    split = split_cases(cases, DataConfig(val_fraction=0.2, test_fraction=0.1), 0)
    assert split["val"] == ["p01_a", "p01_b", "p04_a", "p04_b"]
    assert split["test"] == ["p07_a", "p07_b"]


def test_neighbours_of_validated_slices_are_in_no_part():
    cases = [Case(f"{s}_{i:02d}", "x", subject=s) for s in "ab" for i in range(20)]
    split = split_cases(cases, DataConfig(val_fraction=0.2, val_gap=1), 0)
    assert split["val"] == [f"{s}_{i:02d}" for s in "ab" for i in range(8, 12)]
    assert split["train"] == [f"{s}_{i:02d}" for s in "ab" for i in (*range(7), *range(13, 20))]
    assert split["test"] == []


def test_named_test_subjects_are_tested_on_and_nothing_else_is():
    split = split_cases(many(12), DataConfig(val_fraction=0.2, test_subjects=("s1", "s4")), 0)
    assert split["test"] == ["c002", "c003", "c008", "c009"]
    with pytest.raises(InputError, match="no case is of subject s9"):
        split_cases(many(12), DataConfig(test_subjects=("s9",)), 0)


def test_folds_validate_on_every_subject_exactly_once():
    cases = many(23)
    folds = [split_cases(cases, DataConfig(fold=(k, 4)), 0) for k in range(4)]
    assert sorted(name for split in folds for name in split["val"]) == [case.id for case in cases]
    assert all(sorted(split["train"] + split["val"]) == [case.id for case in cases] for split in folds)


def test_cases_of_an_earlier_split_keep_their_part_and_the_others_are_drawn_as_if_alone():
    cases, config = many(20), DataConfig(val_fraction=0.4, test_fraction=0.2)  # ten subjects of two cases
    fixed = {"c000": "test", "c002": "train", "c003": "val", "c004": None, "c006": "val", "c008": "train"}
    split = split_cases(cases, config, 3, fixed)
    part_of = {name: part for part, ids in split.items() for name in ids}
    assert {name: part_of.get(name) for name in fixed} == fixed
    assert [part_of.get(name) for name in ("c001", "c005", "c007", "c009")] == ["test", None, "val", "train"]
    alone = split_cases(cases[10:], config, 3)
    assert {part: [name for name in ids if name >= "c010"] for part, ids in split.items()} == alone


def test_beside_an_earlier_split_that_leaves_none_to_validate_new_subjects_validate_first():
    cases, config = many(8), DataConfig(val_fraction=0.25)
    fixed = {case.id: "train" for case in cases}
    assert split_cases(cases, config, 0, fixed)["val"] == ["c000", "c001"]
    del fixed["c006"], fixed["c007"]  # one new subject, which alone would train
    assert split_cases(cases, config, 0, fixed)["val"] == ["c006", "c007"]
    everywhere = split_cases(cases, replace(config, val_fraction=0.0), 0, fixed)
    assert everywhere["val"] == everywhere["train"] == [case.id for case in cases]


def test_a_split_of_the_table_and_test_subjects_come_before_an_earlier_split():
    cases = [replace(case, split="val" if case.id == "c000" else "train") for case in many(6)]
    assert split_cases(cases, DataConfig(), 0, {"c000": "train", "c001": "test"})["val"] == ["c000"]
    config = DataConfig(val_fraction=0.4, test_subjects=("s1", "elsewhere"))
    assert split_cases(many(6), config, 0, {"c002": "train", "c000": "val"})["test"] == ["c002", "c003"]


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


@pytest.mark.parametrize(
    ("changes", "split", "words"),
    [
        ({"fold": (0, 3), "test_fraction": 0.2}, None, "data.test_fraction: has no effect beside data.fold"),
        ({"val_gap": 1, "test_fraction": 0.2}, None, "data.test_fraction: has no effect beside data.val_gap"),
        ({"fold": (0, 3)}, "train", "data.fold: has no effect beside a split of the table"),
        ({"val_gap": 0}, "train", "data.val_gap: has no effect beside a split of the table"),
        ({"test_fraction": 0.2}, "train", "data.test_fraction: has no effect beside a split of the table"),
        (
            {"split": "a/split.json", "fold": (0, 3)},
            None,
            "data.fold: has no effect beside the split of a run",
        ),
    ],
)
def test_a_setting_of_the_split_without_effect_is_refused(changes, split, words):
    cases = [replace(case, split=split and ("val" if i == 5 else split)) for i, case in enumerate(many(12))]
    split_cases(cases, DataConfig(), 0)
    with pytest.raises(InputError, match=words):
        split_cases(cases, DataConfig(**changes), 0)
