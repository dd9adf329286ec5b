"""Images are opened for a run as its training data was: its own cases, other folders, and its own samples."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from folders import OBLIQUE, ROLES, image, mask, opened, save

from ldm3d.config import InputError, to_dict
from ldm3d.data import DataConfig, Volume, open_images, open_stored, write
from ldm3d.data.images import locate, own_cases
from ldm3d.data.layouts import recognise


def content_of(data):
    """What the checkpoint of a run on this data holds of it."""
    state = {"data": data.spec.to_dict(), "split": data.split}
    return {
        "config": {"data": to_dict(data.config), "preset": "none", "run": {"seed": data.seed}},
        "state": state,
    }


def test_another_folder_is_read_as_the_training_data_was_with_every_case_at_its_own_size(settings, tmp_path):
    opened_data = opened(settings)
    content = content_of(opened_data)
    volume = save(
        tmp_path / "other/new.nii.gz", np.random.default_rng(9).random((5, 30, 6), dtype=np.float32), OBLIQUE
    )
    (tmp_path / "other/notes.json").write_text("{}")
    dataset = open_images(content, tmp_path / "other")
    item = dataset[0, 0]
    assert item["id"] == "new"
    assert set(item).isdisjoint({"mask", "source"})
    back = nib.load(write(tmp_path / "back.nii.gz", dataset.restore(0, item["image"])))
    np.testing.assert_allclose(back.affine, nib.load(volume).affine, atol=1e-5)
    assert back.shape == (5, 30, 6)
    assert len(open_images(content, opened_data.root)) == 6  # laid out like the training data


def test_another_folder_needs_no_table_of_subjects(settings, tmp_path):
    first = min(opened(settings).cases)
    rows = f"participant_id\tage\nsub-{first}\t30\n"
    (table := tmp_path / "participants.tsv").write_text(rows)
    data = opened(replace(settings, subject=None, participants=str(table)))
    assert data.cases[first].columns["age"] == "30"
    save(tmp_path / "other/new.nii.gz", np.random.default_rng(9).random((5, 30, 6), dtype=np.float32))
    assert [case.id for case in open_images(content_of(data), tmp_path / "other").cases] == ["new"]


def test_a_table_of_subjects_beside_the_folder_of_images_holds_for_the_folder_alone(fresh, tmp_path):
    (fresh / "subjects.csv").write_text("name,subject\na,1\nb,1\nc,2\nd,3\n")
    config = DataConfig(
        root=str(fresh), cache_dir=str(tmp_path / "cache"), subject="subjects.csv", **ROLES | {"source": None}
    )
    content = content_of(opened(config))
    assert [case.subject for case in open_images(content, fresh / "images").cases] == list("1123")
    save(fresh / "images/new.nii.gz", image())  # of no subject that is known
    assert [case.subject for case in open_images(content, fresh / "images").cases] == [*"abcd", "new"]


def test_one_file_is_read_like_a_folder_that_holds_it(settings, tmp_path):
    content = content_of(opened(settings))
    values = np.random.default_rng(9).random((5, 30, 6), dtype=np.float32)
    path = save(tmp_path / "other/new.nii.gz", values, OBLIQUE)
    save(tmp_path / "other/another.nii.gz", values, OBLIQUE)
    one, folder = open_images(content, path), open_images(content, tmp_path / "other")
    assert [case.id for case in one.cases] == ["new"]
    assert torch.equal(one[0, 0]["image"], folder[0, 1]["image"])
    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals/NEW.NII.GZ").write_bytes(path.read_bytes())
    capitals = open_images(content, tmp_path / "capitals")
    assert [case.id for case in capitals.cases] == ["NEW"]
    assert torch.equal(capitals[0, 0]["image"], folder[0, 1]["image"])


def test_scaling_by_data_set_scales_another_folder_by_the_numbers_of_the_training_set(settings, tmp_path):
    data = opened(replace(settings, scaling="dataset"))
    spec, content = data.spec, content_of(data)
    values = np.random.default_rng(9).normal(7, 3, (5, 6, 7)).astype(np.float32)
    item = open_images(content, save(tmp_path / "other/new.nii.gz", values).parent)[0, 0]
    expected = 2 * (values - spec.low[0]) / (spec.high[0] - spec.low[0]) - 1
    np.testing.assert_allclose(item["image"][0], expected, atol=1e-4)


def table(root):
    rows = "".join(f"p{i}.nii.gz,p{i}_seg.nii.gz\n" for i in range(3))
    (root / "cases.csv").write_text("image,mask\n" + rows)


def msd(root):
    listed = [{"image": f"imagesTr/p{i}.nii.gz", "label": f"labelsTr/p{i}.nii.gz"} for i in range(3)]
    (root / "dataset.json").write_text(json.dumps({"training": listed}))


LAYOUTS = {  # the places of image and mask of a case, and what else lies there
    "a folder a case": ("p{i}/t1", "p{i}/seg", None),
    "a folder a role": ("images/p{i}", "masks/p{i}", None),
    "MSD": ("imagesTr/p{i}", "labelsTr/p{i}", msd),
    "BIDS": ("sub-{i}/anat/sub-{i}_T1w", "derivatives/manual/sub-{i}/anat/sub-{i}_label-lesion_mask", None),
    "a table": ("p{i}", "p{i}_seg", table),
    "masks beside": ("p{i}", "p{i}_seg", None),
    "masks beside, a folder a case": ("p{i}/p{i}", "p{i}/p{i}_seg", None),
}


def laid_out(root, name):
    """(images, masks) of a folder of three cases."""
    places = *_, more = LAYOUTS[name]
    for i in range(3):
        save(root / f"{places[0]}.nii.gz".format(i=i), image(seed=i))
        save(root / f"{places[1]}.nii.gz".format(i=i), mask())
    if more:
        more(root)
    return [[root / f"{place}.nii.gz".format(i=i) for i in range(3)] for place in places[:2]]


@pytest.mark.parametrize("trained", LAYOUTS)
def test_images_and_masks_of_other_folders_are_told_apart_as_in_training(tmp_path, trained):
    """Whatever the layout of the training data is, and that of the other folder."""
    laid_out(tmp_path / "data", trained)
    given = {"root": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    data = opened(DataConfig(**given, **recognise(tmp_path / "data").settings, val_fraction=0.3))
    for name in LAYOUTS:
        folder = tmp_path / name
        images, masks = laid_out(folder, name)
        found = open_images(content_of(data), folder, references=folder)
        assert [case.image for case in found.cases] == images
        assert [case.mask for case in found.cases] == masks
        assert [case.mask for case in open_images(content_of(data), folder).cases] == [None] * 3


def named_by_role(root, images="images/p{i}_T1w", masks="masks/p{i}_mask"):
    """Four cases whose files end with their role, and the settings of a run that learned from them."""
    for i in range(4):
        save(root / f"{images}.nii.gz".format(i=i), image(seed=i))
        save(root / f"{masks}.nii.gz".format(i=i), mask())
    patterns = {"image": images, "mask": masks}
    patterns = {role: f"{place}.nii.gz".replace("p{i}", "*") for role, place in patterns.items()}
    return {"root": str(root), "cache_dir": str(root.parent / "cache"), **patterns}


def test_images_and_references_in_folders_of_their_own_meet_by_the_names_of_the_training(tmp_path, capsys):
    data = opened(DataConfig(**named_by_role(tmp_path / "data"), val_fraction=0.5))
    content = content_of(data)
    named_by_role(tmp_path / "new", "T1 images/p{i}_T1w", "rois/p{i}_mask")
    images, rois = tmp_path / "new/T1 images", tmp_path / "new/rois"
    save(images / "p0_FLAIR.nii.gz", image())  # another contrast is no image of this run
    found = open_images(content, images, references=rois)
    assert [case.id for case in found.cases] == ["p0", "p1", "p2", "p3"]
    assert [case.mask.name for case in found.cases] == [f"p{i}_mask.nii.gz" for i in range(4)]
    said = f"note: in {images} the images are *_T1w.nii.gz, as in training; other images there: 1"
    assert said in capsys.readouterr().out
    assert {case.id for case in open_images(content, images, part="val").cases} == set(data.split["val"])
    one = open_images(content, images / "p2_T1w.nii.gz", references=rois).cases
    assert [(case.id, case.mask.name) for case in one] == [("p2", "p2_mask.nii.gz")]
    for i in range(4):  # names of another kind are taken as they are
        (images / f"p{i}_T1w.nii.gz").rename(images / f"p{i}_T2w.nii.gz")
    assert [case.id for case in open_images(content, images).cases][:2] == ["p0_FLAIR", "p0_T2w"]


def test_names_alone_do_not_make_ids_where_folders_do(tmp_path):
    given = named_by_role(tmp_path / "data", "p{i}/t1", "p{i}/seg")
    content = content_of(opened(DataConfig(**given | {"image": "*/t*.nii.gz"})))
    save(tmp_path / "other/t1.nii.gz", image())
    save(tmp_path / "other/t2.nii.gz", image())
    assert [case.id for case in open_images(content, tmp_path / "other").cases] == ["t1", "t2"]


def test_masks_that_nothing_tells_from_images_are_no_images(settings, tmp_path):
    content = content_of(opened(settings))
    laid_out(tmp_path / "d", "a table")
    (tmp_path / "d/cases.csv").unlink()
    other = save(tmp_path / "d/p1_brainmask.nii.gz", mask())
    with pytest.raises(InputError, match="images and masks, such as p0_seg, lie in one folder; list the"):
        open_images(content, tmp_path / "d")
    other.unlink()
    (tmp_path / "d/labels").mkdir()
    for i in range(3):
        (tmp_path / f"d/p{i}_seg.nii.gz").rename(tmp_path / f"d/labels/p{i}.nii.gz")
    found = open_images(content, tmp_path / "d", references=tmp_path / "d")  # an image is not its own mask
    assert [case.mask for case in found.cases] == sorted((tmp_path / "d/labels").iterdir())


@pytest.fixture
def content(tmp_path):
    """What the checkpoint of a run would hold that takes channel 1 of files with two."""
    draw = np.random.default_rng(0)
    for i in range(6):
        write(tmp_path / f"data/case_{i}.tif", Volume(draw.random((2, 9, 7), dtype=np.float32), np.eye(3)))
    options = {"cache_dir": str(tmp_path), "test_fraction": 0.34, "subject": r"case_(\d)"}
    files = {"root": str(tmp_path / "data"), "image": "*.tif", "dims": 2, "channel": (1,)}
    return content_of(opened(DataConfig(**files, **options, scaling="minmax")))


def test_the_samples_of_a_run_hold_its_channels_already(content, tmp_path):
    assert content["state"]["data"]["channels"] == 1
    own = open_images(content)
    for i, case in enumerate(own.cases):
        write(tmp_path / f"samples/{case.id}.tif", own.restore(i, own[i, i]["image"]))
    samples = open_images(content, tmp_path / "samples")
    others = open_images(content, tmp_path / "data")
    for i in range(6):
        assert torch.allclose(samples[i, i]["image"], own[i, i]["image"], atol=1e-5)
        assert torch.equal(others[i, i]["image"], own[i, i]["image"])


def test_the_parts_of_a_run_are_those_of_its_split_and_subjects_follow_the_rule(content):
    split = content["state"]["split"]
    for part in ("train", "val", "test"):
        assert sorted(c.id for c in own_cases(content, part)[1]) == sorted(split[part])
    held_out = {c.id for c in own_cases(content, "held-out")[1]}
    assert held_out == set(split["val"]) | set(split["test"])
    assert [c.subject for c in open_images(content).cases] == list("012345")
    assert [c.subject for c in open_images(content, subject="(case)").cases] == ["case"] * 6
    root = content["config"]["data"]["root"]
    assert [c.subject for c in open_images(content, root).cases] == list("012345")
    assert len(open_images(content, root, part="test").cases) == len(split["test"])
    assert {c.id for c in open_images(content, root, part="held-out").cases} == held_out
    with pytest.raises(InputError, match="part: the run has no val cases"):
        own_cases({**content, "state": {"split": {"train": ["case_0"], "val": []}}}, "val")


def test_a_case_that_is_gone_is_named(content, tmp_path):
    name = content["state"]["split"]["test"][0]
    (tmp_path / f"data/{name}.tif").unlink()
    with pytest.raises(InputError, match=f"case {name} of the stored split is missing"):
        open_images(content)


def test_stored_data_keeps_split_and_spec_and_takes_changes(content):
    data = open_stored(content, patch=(4, 4))
    assert data.split == content["state"]["split"]
    assert data.spec.to_dict() == content["state"]["data"]
    assert data.dataset("train", augment=True)[0, 0]["image"].shape == (1, 4, 4)


def test_a_location_is_a_folder_or_a_pattern(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/x.tif").write_bytes(b"")
    assert locate(tmp_path / "a") == (tmp_path / "a", None)
    assert locate(tmp_path / "a/*/t1.tif") == (tmp_path / "a", "*/t1.tif")
    for place, words in (("a/x.tif", "a file, expected"), ("c", "no such folder"), ("c/*.tif", "c: no such")):
        with pytest.raises(InputError, match=words):
            locate(tmp_path / place)
