"""Images and masks are recognised in the folders that people have, and the facts of a folder are true."""

import json
import re
import shlex

import nibabel as nib
import numpy as np
import pytest
import tifffile
from folders import image, mask, save
from scipy import ndimage

from ldm3d.conditions import parse_use
from ldm3d.config import InputError, convert
from ldm3d.data import DataConfig, inspection
from ldm3d.data.cases import find_cases
from ldm3d.data.fingerprint import pose_and_mirrored, take, thumbnails
from ldm3d.data.images import find_images
from ldm3d.data.inspection import FEW_VALUES, centres_of, few_values
from ldm3d.data.layouts import recognise
from ldm3d.data.opening import groupings, inspection_cache, open_data

CASES = ("p01", "p02", "p03")


def nested(root, shape=(9, 8, 7)):
    """A folder for each case, with the same names in each."""
    for i, case in enumerate(CASES):
        size = tuple(n + i for n in shape)
        save(root / case / "flair.nii.gz", image(size, seed=i))
        save(root / case / "t1.nii.gz", image(size, seed=10 + i))
        save(root / case / "tumour.nii.gz", mask(size))
        save(root / case / "brainmask.nii.gz", (mask(size) > 0).astype(np.uint8))
    return root


def bids(root):
    for i, sub in enumerate(("sub-01", "sub-02")):
        for session in ("ses-1", "ses-2"):
            place = root / sub / session / "anat"
            save(place / f"{sub}_{session}_T1w.nii.gz", image(seed=i))
            save(place / f"{sub}_{session}_dseg.nii.gz", mask())
    return root


def msd(root):
    rows = []
    for i, case in enumerate(CASES):
        save(root / f"imagesTr/{case}.nii.gz", image(seed=i))
        save(root / f"labelsTr/{case}.nii.gz", mask())
        rows.append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "left kidney"}, "training": rows}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def tiffs(root, names=CASES, masks="masks"):
    for i, case in enumerate(names):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / masks).mkdir(parents=True, exist_ok=True)
        rgb = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        tifffile.imwrite(root / f"images/{case}.tif", rgb, photometric="rgb")
        tifffile.imwrite(root / masks / f"{case}.tif", (rgb[..., 0] > 128).astype(np.uint8) * 255)
    return root


LAYOUTS = {
    nested: {"image": "*/flair.nii.gz", "mask": "*/tumour.nii.gz"},
    bids: {
        "image": "sub-*/ses-*/anat/{id}_T1w.nii.gz",
        "mask": "sub-*/ses-*/anat/{id}_dseg.nii.gz",
        "subject": "^(sub-[^_]+)",
    },
    msd: {"table": "dataset.json"},
    tiffs: {"image": "images/*.tif", "mask": "masks/*.tif"},
}


@pytest.mark.parametrize("make", LAYOUTS)
def test_each_layout_is_recognised_and_can_be_opened(make, tmp_path):
    root = make(tmp_path / "data")
    layout = recognise(root)
    assert layout.settings == LAYOUTS[make]
    assert layout.why.keys() >= {"image"} or layout.why.keys() == {"table"}
    found = take(root, {"data.cache_dir": str(tmp_path / "cache")})
    settings = {key.removeprefix("data."): value for key, value in found.settings.items()}
    values = {"label_values": (0, 255)} if make is tiffs else {}
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), **settings, **values)
    data = open_data(config, "data", seed=0)
    assert len(data.cases) == found.num_cases == found.num_masks == (4 if make is bids else 3)
    assert data.spec.channels == found.channels
    assert tuple(data.infos[name].shape for name in sorted(data.infos)) == found.shapes


def with_endings(root, images="images/{}_T1w", masks="masks/{}_seg", cases=CASES):
    for i, case in enumerate(cases):
        save(root / f"{images.format(case)}.nii.gz", image(seed=i))
        save(root / f"{masks.format(case)}.nii.gz", mask())
    return root


@pytest.mark.parametrize("masks", ["masks/{}_seg", "masks/{}", "masks/{}_T1w_seg"])
def test_names_that_end_with_their_role_pair_images_and_masks(masks, tmp_path):
    layout = recognise(with_endings(tmp_path, masks=masks))
    shared = "_T1w" in masks  # then the images are named as they are
    image = "images/*.nii.gz" if shared else "images/*_T1w.nii.gz"
    mask = "masks/*.nii.gz" if masks == "masks/{}" else "masks/*_seg.nii.gz"
    assert layout.settings == {"image": image, "mask": mask}
    assert "others" not in layout.why
    cases = find_cases(DataConfig(root=str(tmp_path), **layout.settings), tmp_path)
    assert [case.id for case in cases] == [case + "_T1w" * shared for case in CASES]


def test_names_whose_endings_leave_a_doubt_pair_nothing(tmp_path):
    two, more = tmp_path / "two", tmp_path / "more"
    save(with_endings(two) / "images/p01_FLAIR.nii.gz", image())  # two images for one mask
    save(with_endings(more) / "masks/p09_seg.nii.gz", mask())  # a mask without an image
    for root in (two, more):
        layout = recognise(root)
        assert layout.settings == {"image": "images/*.nii.gz"}
        assert "masks/*.nii.gz" in layout.why["others"]


@pytest.mark.parametrize(
    ("places", "subjects"),
    [
        (
            ["Patient 1/baseline", "Patient 1/follow up", "Patient 2/baseline", "Patient 3/baseline"],
            "Patient #",
        ),
        (["p_1/visit_1", "p_1/visit_2", "p_2/visit_1", "p_3/visit_2"], "p_#"),
        (["1/2019-03-04", "1/2020_01_02", "2/20210506", "3/2020-01-02"], "#"),
        (["GBM/1", "GBM/2", "LGG/1", "LGG/2"], None),  # classes
        (["Oslo/a", "Oslo/b", "Rome/c", "Lund/d"], None),  # sites
    ],
)
def test_folders_of_visits_in_those_of_patients_tell_the_subjects(places, subjects, tmp_path):
    for i, place in enumerate(places):
        save(tmp_path / "d" / place / "t1 post.nii.gz", image(seed=i))
        save(tmp_path / "d" / place / "seg.nii.gz", mask())
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")})
    if subjects is None:
        assert "data.subject" not in found.settings
    else:
        assert sorted(set(found.subjects)) == [subjects.replace("#", str(i)) for i in (1, 2, 3)]
        assert "folders of visits in folders of 3 subjects" in found.reasons["data.subject"]


@pytest.mark.parametrize("visits", [("baseline", "follow_up"), ("2019-03-04", "2020-11-30"), ("m0", "m12")])
@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("{}", ""),
        ("{}", "{}_seg"),
        ("images/{}", "masks/{}"),
        ("{}/t1", "{}/seg"),
        ("{0}/{0}", "{0}/{0}_seg"),
    ],
)
def test_subjects_in_folders_of_visits_are_one_subject_each(visits, images, masks, tmp_path):
    for visit in visits:
        for i, case in enumerate(CASES):
            if (visit, case) != (visits[1], "p02"):  # one was lost
                save(tmp_path / "d" / visit / f"{images.format(case)}.nii.gz", image(seed=i))
                if masks:
                    save(tmp_path / "d" / visit / f"{masks.format(case)}.nii.gz", mask())
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")})
    assert found.subjects == ("p01", "p02", "p03", "p01", "p03")
    assert found.num_masks == (5 if masks else 0)
    assert found.reasons["data.subject"] == "folders of 2 visits hold 3 subjects, such as p01"
    given = take(tmp_path / "d", {"data.subject": None, "data.cache_dir": str(tmp_path / "c")})
    assert given.num_subjects == 5


@pytest.mark.parametrize("folders", [("m01", "m02", "m03"), ("a_20190304", "b_20190305", "c_20190307")])
@pytest.mark.parametrize("files", [("t1",), ("t1", "seg"), ("t1", "t2", "seg"), ("visit_1/t1", "visit_2/t1")])
def test_a_folder_a_subject_is_no_folder_of_visits_whatever_its_name(folders, files, tmp_path):
    for i, folder in enumerate(folders):
        for name in files:
            save(tmp_path / "d" / folder / f"{name}.nii.gz", mask() if name == "seg" else image(seed=i))
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")})
    assert found.num_subjects == 3
    assert found.num_masks == (3 if "seg" in files else 0)
    assert not any("several folders" in note for note in found.notes)


def test_folders_that_are_no_visits_keep_their_subjects_apart_and_equal_names_are_noted(tmp_path):
    for place in ("oslo", "rome"):
        for i, case in enumerate(CASES):
            save(tmp_path / "sites" / place / case / "t1.nii.gz", image(seed=i))
            save(
                tmp_path / "visits" / {"oslo": "v1", "rome": "v2"}[place] / (place + case) / "t1.nii.gz",
                image(),
            )
            save(
                tmp_path / "contrasts" / {"oslo": "T1", "rome": "T2"}[place] / f"{case}.nii.gz", image(seed=i)
            )
    sites, visits, contrasts = (
        take(tmp_path / name, {"data.cache_dir": str(tmp_path / "c")})
        for name in ("sites", "visits", "contrasts")
    )
    assert (sites.num_subjects, visits.num_subjects, contrasts.num_subjects) == (6, 6, 3)
    told = [
        note
        for note in sites.notes
        if "3 names are in several folders, such as p01 in oslo and in rome" in note
    ]
    rule = shlex.split(told[0].partition("--data.subject ")[2])[0]
    flags = {"data.subject": rule, "data.cache_dir": str(tmp_path / "c")}
    assert take(tmp_path / "sites", flags).num_subjects == 3
    assert not any("several folders" in note for found in (visits, contrasts) for note in found.notes)


def with_contrasts(root):
    for i, case in enumerate(CASES):
        save(root / f"T1/{case}_T1.nii.gz", image(seed=i))
        save(root / f"T2/{case}_T2.nii.gz", image(seed=9 + i))
    return root


def test_two_contrasts_in_folders_of_their_own_are_no_classes_and_no_masks(tmp_path):
    layout = recognise(with_contrasts(tmp_path))
    assert layout.settings == {"image": "T1/*.nii.gz"}
    assert layout.why["others"] == "T2/*.nii.gz (3)"


def test_a_folder_is_a_case_where_all_files_have_one_name_whatever_the_folders_are_called(tmp_path):
    for i, place in enumerate(["Oslo/Berg", "Oslo/Dahl", "Rome/Rossi"]):
        save(tmp_path / place / "t1.nii.gz", image(seed=i))
    assert recognise(tmp_path).settings == {"image": "{id}/{id}/*.nii.gz"}


@pytest.mark.parametrize("pattern", ["{id}/{id}/{id}_t1.nii.gz", "**/{id}/{id}/*.nii.gz"])
def test_visits_are_not_looked_for_where_the_id_is_more_than_two_folders(pattern, tmp_path):
    for i, place in enumerate(["p_1/a", "p_1/b", "p2/c", "p3/a", "p4/b"]):  # else the rule is ^(.*)_[^_]*$
        save(tmp_path / "d" / place / "x_t1.nii.gz", image(seed=i))
    found = take(tmp_path / "d", {"data.image": pattern, "data.cache_dir": str(tmp_path / "c")})
    assert "folders of visits" not in found.reasons.get("data.subject", "")


def test_a_second_contrast_is_named_and_left_alone(tmp_path):
    assert "*/t1.nii.gz (3)" in recognise(nested(tmp_path)).why["others"]


def derived(root, word, sub, array, folder="manual", affine=None):
    return save(root / "derivatives" / folder / sub / "anat" / f"{sub}_{word}.nii.gz", array, affine)


def test_label_maps_in_the_derivatives_of_bids_are_masks_and_other_images_there_are_named(tmp_path):
    root = tmp_path / "d"
    for i, sub in enumerate(("sub-01", "sub-02", "sub-03")):
        save(root / sub / "anat" / f"{sub}_T1w.nii.gz", image(seed=i))
        derived(root, "desc-brain_mask", sub, (mask() > 0).astype(np.uint8))
        derived(root, "label-lesion_mask", sub, mask())
        for word in ("desc-preproc_T1w", "probseg"):
            derived(root, word, sub, image(seed=i), "pipeline")
    derived(root, "group", "sub-01", image()).rename(root / "derivatives" / "pipeline" / "mean.nii.gz")
    found = take(root, {"data.cache_dir": str(tmp_path / "c")})
    lesions = "derivatives/manual/sub-*/anat/{id}_label-lesion_mask.nii.gz"
    assert found.settings == {
        "data.image": "sub-*/anat/{id}_T1w.nii.gz",
        "data.mask": lesions,
        "data.subject": "^(sub-[^_]+)",
        "data.dims": 3,
    }
    assert found.num_cases == found.num_masks == 3
    note = next(note for note in found.notes if "not used" in note)
    assert "derivatives/pipeline/sub-*/anat/{id}_desc-preproc_T1w.nii.gz (3)" in note
    for rest in ("*.nii.gz (1)", "sub-*/anat/{id}_probseg.nii.gz (3)"):
        assert f"derivatives/pipeline/{rest}" in note


def test_derived_label_maps_on_another_grid_or_of_other_names_are_left_alone(tmp_path):
    for i, sub in enumerate(("sub-01", "sub-02")):
        for place in ("space", "moved", "short", "missing"):
            save(tmp_path / place / sub / "anat" / f"{sub}_T1w.nii.gz", image(seed=i))
        derived(tmp_path / "space", "space-MNI_dseg", sub, mask((9, 9, 9)))
        derived(tmp_path / "moved", "dseg", sub, mask(), affine=np.diag([2.0, 2, 2, 1]))
        derived(tmp_path / "short", "dseg", sub, mask())
        derived(tmp_path / "short", "space-MNI_dseg", sub, mask((9, 9, 9)))
    derived(tmp_path / "missing", "T1w_seg", "sub-02", mask())
    for place in ("space", "moved", "short"):
        layout = recognise(tmp_path / place)
        assert "mask" not in layout.settings
        assert "_dseg.nii.gz (2)" in layout.why["others"]
    layout = recognise(tmp_path / "missing")
    assert layout.settings["mask"] == "derivatives/manual/sub-*/anat/{id}_T1w_seg.nii.gz"
    assert layout.why["allow_missing_mask"] == "1 of 2 images have no mask"


def people(root, *rows):
    (root / "participants.tsv").write_text("\n".join("\t".join(row.split()) for row in rows) + "\n")


def test_what_bids_knows_of_its_subjects_becomes_columns_of_the_cases_and_is_told(tmp_path):
    root = tmp_path / "d"
    for i in range(1, 5):
        for session in ("ses-1", "ses-2"):
            save(root / f"sub-0{i}" / session / "anat" / f"sub-0{i}_{session}_T1w.nii.gz", image(seed=i))
    head = "participant_id age sex group site split"
    people(
        root,
        head,
        *(f"sub-0{i} {30 + i} {'FM'[i % 2]} g{i} here a" for i in range(1, 4)),
        "sub-9 n/a F g9 x b",
    )
    found = take(root, {"data.cache_dir": str(tmp_path / "c")})
    assert found.settings["data.participants"] == "participants.tsv"
    assert found.notes[0] == (
        "participants.tsv: stage two can learn number:age (31 to 33), class:sex (F 1, M 2), by "
        "train_ldm.py ... --condition.use number:age,class:sex"
    )
    assert found.notes[1:3] == (
        "participants.tsv: 1 subject has no row, such as sub-04",
        "participants.tsv: 1 subject has no image, such as sub-9",
    )
    settings = {key.removeprefix("data."): value for key, value in found.settings.items()}
    cases = {case.id: case.columns for case in find_cases(DataConfig(**settings), root)}
    assert cases["sub-02_ses-1"] == cases["sub-02_ses-2"]
    assert cases["sub-02_ses-1"]["age"] == "32"
    assert "split" not in cases["sub-02_ses-1"]
    assert "age" not in cases["sub-04_ses-1"]


def test_columns_of_any_name_are_suggested_as_a_shell_and_the_flag_take_them(tmp_path):
    root = bids(tmp_path)
    names = ["age at scan", "weight (kg), dry", "score:a", "it's"]
    rows = [["participant_id", *names], *([f"sub-0{i}", *(str(i + k) for k in range(4))] for i in (1, 2))]
    (root / "participants.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    note = take(root, {"data.cache_dir": str(tmp_path / "c")}).notes[0]
    _, flag = shlex.split(note[note.index("--condition.use") :])
    use = convert(flag, tuple[str, ...], "condition.use")
    assert [parse_use(word) for word in use] == [("number", name) for name in names]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["participant_id age", "sub-77 3"], "participants.tsv (lists none of the subjects)"),
        (["participant_id age", "sub-01"], "line 2 has not the 2 cells of the header"),
        (["name age", "sub-01 3"], "no column 'participant_id'"),
        (["participant_id", "sub-01", "01"], "participant sub-01 is listed twice"),
    ],
)
def test_a_table_of_subjects_that_is_of_no_use_is_named(tmp_path, rows, words):
    people(bids(tmp_path), *rows)
    layout = recognise(tmp_path)
    assert "participants" not in layout.settings
    assert words in layout.why["others"]


def test_a_given_table_of_subjects_is_read_with_the_subjects_that_names_tell(tmp_path):
    for name in ("p01_a", "p01_b", "p02_a", "p03_a"):
        save(tmp_path / "images" / f"{name}.nii.gz", image())
    (tmp_path / "people.csv").write_text("participant_id,age\np01,30\np02,40\np03,35\n")
    found = take(tmp_path, {"data.participants": "people.csv", "data.cache_dir": str(tmp_path / "c")})
    assert found.num_subjects == 3
    assert found.notes[0].startswith("people.csv: stage two can learn number:age (30 to 40)")


def test_a_folder_of_nothing_but_derivatives_is_refused_with_the_folder_to_give(tmp_path):
    save(tmp_path / "derivatives" / "a.nii.gz", image())
    with pytest.raises(InputError, match=f"give {tmp_path}/derivatives$"):
        recognise(tmp_path)


def test_names_that_begin_with_the_name_of_the_folder_are_of_one_kind(tmp_path):
    for i, case in enumerate(CASES):
        save(tmp_path / case / f"{case}_flair.nii.gz", image(seed=i))
        save(tmp_path / case / f"{case}_seg.nii.gz", mask())
    assert recognise(tmp_path).settings == {"image": "*/*_flair.nii.gz", "mask": "*/*_seg.nii.gz"}


def test_numbers_of_channels_at_the_end_of_names_are_not_of_the_case(tmp_path):
    for case in CASES:
        save(tmp_path / f"imagesTr/{case}_0000.nii.gz", image())
        save(tmp_path / f"imagesTr/{case}_0001.nii.gz", image())
        save(tmp_path / f"labelsTr/{case}.nii.gz", mask())
    (tmp_path / "dataset.json").write_text(json.dumps({"numTraining": 3, "labels": {"background": 0}}))
    found = recognise(tmp_path)
    assert found.settings == {"image": "imagesTr/*_0000.nii.gz", "mask": "labelsTr/*.nii.gz"}
    assert "imagesTr/*_0001.nii.gz" in found.why["others"]


def test_folders_of_classes_are_all_images(tmp_path):
    for number, kind in enumerate(("healthy", "ill")):
        for i in range(3):
            save(tmp_path / kind / f"{number}{i}.nii.gz", image(seed=i))
    assert recognise(tmp_path).settings == {"image": "{id}/{id}.nii.gz"}


def test_what_is_put_aside_to_test_on_is_not_trained_on(tmp_path):
    for part, num in (("train", 3), ("test", 5)):
        for i in range(num):
            save(tmp_path / f"flat/{part}/{part}{i}.nii.gz", image(seed=i))
            save(tmp_path / f"cases/{part}/{part}{i}/t1.nii.gz", image(seed=i))
            save(tmp_path / f"cases/{part}/{part}{i}/seg.nii.gz", mask())
            save(tmp_path / f"roles/{part}/images/{i}.nii.gz", image(seed=i))  # other cases, the same names
            save(tmp_path / f"roles/{part}/masks/{i}.nii.gz", mask())
            save(tmp_path / f"nnunet/images{part[:2].title()}/{part}{i}_0000.nii.gz", image(seed=i))
            save(tmp_path / f"classes/{part}/{'healthy' if i % 2 else 'ill'}/{i}.nii.gz", image(seed=i))
    for i in range(3):
        save(tmp_path / f"nnunet/labelsTr/train{i}.nii.gz", mask())
        for part, case in (("train", f"p{i}"), ("test", f"q{i}")):
            with_endings(tmp_path / "named", f"{part}/{{0}}/{{0}}", f"{part}/{{0}}/{{0}}_seg", [case])
    (tmp_path / "nnunet/imagesTe").rename(tmp_path / "nnunet/imagesTs")
    expected = {
        "flat": {"image": "train/*.nii.gz"},
        "cases": {"image": "train/{id}/t1.nii.gz", "mask": "train/{id}/seg.nii.gz"},
        "roles": {"image": "train/images/*.nii.gz", "mask": "train/masks/*.nii.gz"},
        "nnunet": {"image": "imagesTr/*_0000.nii.gz", "mask": "labelsTr/*.nii.gz"},
        "classes": {"image": "train/{id}/{id}.nii.gz"},
        "named": {"image": "train/{id}/{same}.nii.gz", "mask": "train/{id}/*_seg.nii.gz"},
    }
    for folder, settings in expected.items():
        found = recognise(tmp_path / folder)
        assert found.settings == settings
        assert re.search("test/|imagesTs/", found.why["others"])
        find_cases(DataConfig(**settings), tmp_path / folder)


def test_shapes_alone_are_images_though_they_look_like_masks(tmp_path):
    for case in CASES:
        save(tmp_path / f"{case}.nii.gz", mask())
    assert recognise(tmp_path).settings == {"image": "*.nii.gz"}


def test_the_one_csv_with_a_column_image_is_the_table(tmp_path):
    save(tmp_path / "a.nii.gz", image())
    (tmp_path / "list.csv").write_text("image,class\na.nii.gz,0\n")
    (tmp_path / "subjects.csv").write_text("name,subject\na,1\n")
    assert recognise(tmp_path).settings == {"table": "list.csv"}
    (tmp_path / "more.csv").write_text("image\na.nii.gz\n")
    with pytest.raises(InputError, match=r"list\.csv and more\.csv both list images"):
        recognise(tmp_path)


def test_some_images_without_a_mask_take_part(tmp_path):
    nested(tmp_path)
    (tmp_path / "p02" / "tumour.nii.gz").unlink()
    found = recognise(tmp_path)
    assert found.settings["allow_missing_mask"] is True
    assert found.why["allow_missing_mask"] == "1 of 3 images have no mask"


def test_hidden_files_and_runs_are_no_data(tmp_path):
    save(tmp_path / "a.nii.gz", image())
    save(tmp_path / ".hidden" / "b.nii.gz", image())
    save(tmp_path / "vae" / "samples" / "c.nii.gz", image())
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert recognise(tmp_path).settings == {"image": "*.nii.gz"}


def test_masks_beside_their_images_are_told_apart_by_the_last_word_of_every_name(tmp_path):
    root = with_endings(tmp_path, "{}_T1w", "{}_seg")
    assert recognise(root).settings == {"image": "*_T1w.nii.gz", "mask": "*_seg.nii.gz"}
    with_endings(root, "{}_FLAIR", "{}_seg")
    layout = recognise(root)
    assert layout.settings == {"image": "*_T1w.nii.gz", "mask": "*_seg.nii.gz"}  # by name, as with folders
    assert "*_FLAIR.nii.gz (3)" in layout.why["others"]
    (root / "p02_seg.nii.gz").unlink()
    with pytest.raises(InputError, match=r"images and masks, such as p01_seg, lie in one folder; list"):
        recognise(root)


@pytest.mark.parametrize("end", ["_seg", "-mask", "_lesion_mask"])
@pytest.mark.parametrize("name", ["{}", "all/{}", "tumour_{}", "{0}/{0}"])
def test_a_mask_is_told_by_the_name_of_the_image_beside_it_and_a_word_more(name, end, tmp_path):
    root = with_endings(tmp_path / "d", name, name + end)
    settings = recognise(root).settings
    cases = find_cases(DataConfig(**settings), root)
    names = [name.format(case) for case in CASES]
    assert [(str(c.image), str(c.mask)) for c in cases] == [
        (f"{root}/{name}.nii.gz", f"{root}/{name}{end}.nii.gz") for name in names
    ]
    _, images = find_images(root, DataConfig(**settings))  # as sample.py finds those of a folder
    assert [case.image for case in images] == [case.image for case in cases]
    if name == "{}":  # of a run with another layout
        _, images = find_images(root, DataConfig(image="scans/*.nii.gz"))
        assert [case.image for case in images] == [case.image for case in cases]


@pytest.mark.parametrize(
    "more",
    [
        ["p01_brainmask"],
        ["p01_brainmask", "p02_brainmask", "p03_brainmask"],
        ["p04"],
        ["p01_T2"],
        ["p04_seg"],
    ],
)
def test_masks_beside_their_images_are_not_taken_for_images(more, tmp_path):
    with_endings(tmp_path, "{}", "{}_seg")
    for name in more:
        save(tmp_path / f"{name}.nii.gz", mask() if "_T2" not in name else image())
    with pytest.raises(InputError, match=r"images and masks, such as p\d+_\w+, lie in one folder; list"):
        recognise(tmp_path)


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        recognise(tmp_path)


def test_volumes_among_slices_are_one_line(tmp_path):
    tiffs(tmp_path)
    tifffile.imwrite(tmp_path / "images/p09.tif", np.zeros((5, 20, 24), np.float32), photometric="minisblack")
    with pytest.raises(InputError, match=r"p09\.tif: .*3") as caught:
        take(tmp_path, {"data.cache_dir": str(tmp_path / "c"), "data.allow_missing_mask": True})
    assert "\n" not in str(caught.value)


# --- facts --------------------------------------------------------------------------------------------------


def test_the_facts_are_those_of_the_files(tmp_path):
    affine = np.diag([0.7, 0.7, 5.0, 1.0])
    arrays = [np.random.default_rng(i).integers(-900, 1500, (12, 10 + i, 6)) for i in range(3)]
    for i, array in enumerate(arrays):
        stored = nib.Nifti1Image(((array + 1024) // 2).astype(np.int16), affine)
        stored.header.set_slope_inter(2, -1024)
        (tmp_path / "d").mkdir(exist_ok=True)
        nib.save(stored, tmp_path / f"d/c{i}.nii.gz")
    values = [(array + 1024) // 2 * 2 - 1024 for array in arrays]
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "cache")})
    assert (found.dims, found.channels, found.integers, found.num_values) == (3, 1, True, 0)
    assert found.shapes == tuple(array.shape for array in arrays)
    assert found.largest == (12, 12, 6)
    assert found.median == (12, 11, 6)
    assert found.spacing == pytest.approx((0.7, 0.7, 5.0))
    assert found.lowest == np.median([v.min() for v in values])
    assert found.extremes == (min(v.min() for v in values), max(v.max() for v in values))
    assert found.robust == pytest.approx(
        (min(np.percentile(v, 0.5) for v in values), max(np.percentile(v, 99.5) for v in values))
    )


def test_what_the_files_say_of_themselves_is_among_the_facts(tmp_path):
    found = take(msd(tmp_path / "d"), {"data.cache_dir": str(tmp_path / "cache")})
    assert found.modality == "CT"
    assert found.sides == "label 'left kidney'"
    assert found.labels == (0, 1, 2)
    assert found.labelled == pytest.approx((mask() > 0).mean())


def test_labels_that_keep_to_their_sides_are_found(tmp_path):
    """Two kidneys lie left and right, though nothing says so. What lies now left, now right has no side."""
    for i in range(6):
        labels = np.zeros((20, 16, 12), np.uint8)
        labels[3:6, 6 + i % 3, 5:8] = 1
        labels[14:17, 6 + i % 3, 5:8] = 2
        save(tmp_path / f"kidneys/c{i}/seg.nii.gz", labels)
        save(tmp_path / f"tumours/c{i}/seg.nii.gz", labels[::-1] if i == 5 else labels)
        for folder in ("kidneys", "tumours"):
            save(tmp_path / f"{folder}/c{i}/t1.nii.gz", image(labels.shape, seed=i))
    found = [
        take(tmp_path / name, {"data.cache_dir": str(tmp_path / "c")}) for name in ("kidneys", "tumours")
    ]
    assert [facts.sided for facts in found] == [(0,), ()]


def test_centres_of_labels_are_those_of_scipy():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7))
    centres = (np.array(ndimage.center_of_mass(labels > -1, labels, [1, 2, 3])) + 0.5) / labels.shape
    assert np.array(centres_of(labels)) == pytest.approx(np.column_stack([[1, 2, 3], centres]))


def test_slices_of_volumes_are_two_dimensional_cases_of_their_subjects(tmp_path):
    root = nested(tmp_path / "d")
    found = take(root, {"data.cache_dir": str(tmp_path / "c"), "data.slices": "axial"})
    assert found.settings["data.dims"] == found.dims == 2
    assert found.num_cases == 7 + 8 + 9
    assert found.num_subjects == 3
    assert found.shapes[0] == (9, 8)


def test_a_caption_with_a_side_is_found(tmp_path):
    save(tmp_path / "a.nii.gz", image())
    (tmp_path / "cases.csv").write_text("image,text\na.nii.gz,a lesion on the Left\n")
    assert (
        take(tmp_path, {"data.cache_dir": str(tmp_path / "c")}).sides == "column text, 'a lesion on the Left'"
    )


@pytest.mark.parametrize(
    ("names", "rule", "num"),
    [
        (["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"], "^(sub-[^_]+)", 2),
        (["p07_z001", "p07_z002", "p19_z001"], r"^(.*\d[^\W_]*)[_\-. ][^_\-. ]+$", 2),
        (["p1a", "p1b", "p2a"], r"^(.*\d)[A-Za-z]$", 2),
        (["scan_001", "scan_002", "scan_003"], None, 3),
        (["p07_z001", "p07_z002"], None, 2),  # one subject: nothing is left to draw a split from
    ],
)
def test_subjects_are_guessed_from_names_that_begin_alike(names, rule, num):
    found = next(groupings(names), None)
    assert (found and found[0]) == rule
    assert len(set(found[1].values()) if found else names) == num


@pytest.mark.parametrize(
    ("names", "num"),
    [
        (["p1_a", "p1_b", "p2_a", "p3_a"], 3),
        (["cells1_B02", "cells1_B05", "cells3_m01", "cells3_m02"], 4),  # two kinds of images
        (["day1_p1a", "day1_p1b", "day2_p2a", "day2_p3a"], 3),  # two days, three subjects
        (["sub-01_a", "sub-01_b", "sub-02_a"], 2),
    ],
)
def test_names_that_begin_in_two_ways_only_do_not_tell_subjects(names, num, tmp_path):
    for i, name in enumerate(names):
        save(tmp_path / f"{name}.nii.gz", image(seed=i))
    assert take(tmp_path, {"data.cache_dir": str(tmp_path / "c")}).num_subjects == num


def test_subjects_of_a_table_beside_the_images_are_taken(tmp_path):
    for case in CASES:
        save(tmp_path / f"d/{case}.nii.gz", image())
    (tmp_path / "d/subjects.csv").write_text("name,subject\np01,a\np02,a\np03,b\n")
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")})
    assert found.settings["data.subject"] == "subjects.csv"
    assert found.subjects == ("a", "a", "b")
    assert found.num_subjects == 2


def test_a_note_of_the_files_comes_once(tmp_path, capsys):
    for case in CASES:
        save(tmp_path / f"{case}.nii.gz", image())
    (tmp_path / "cases.csv").write_text("image,subject\np01.nii.gz,\np02.nii.gz,s\np03.nii.gz,t\n")
    take(tmp_path, {"data.cache_dir": str(tmp_path / "c")})
    assert capsys.readouterr().out.count("have no subject") == 1


def test_the_split_of_a_table_is_among_the_facts(tmp_path):
    for case in CASES:
        save(tmp_path / f"{case}.nii.gz", image())
    (tmp_path / "cases.csv").write_text("image,split\np01.nii.gz,train\np02.nii.gz,train\np03.nii.gz,val\n")
    assert take(tmp_path, {"data.cache_dir": str(tmp_path / "c")}).parts == {"train": 2, "val": 1}


def test_nearly_identical_cases_are_noted(tmp_path):
    for i, case in enumerate(CASES):
        save(tmp_path / f"d/{case}.nii.gz", image((20, 20, 20), seed=min(i, 1)) + np.float32(i))
    notes = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")}).notes
    assert "1 pairs of cases look nearly the same, such as p02 and p03" in notes[0]


def test_few_values_counts_integers_only():
    assert few_values(np.array([0.0, 1.0, 1.0, 255.0])) == 3
    assert few_values(np.array([0.0, 0.5])) == 0
    assert few_values(np.arange(FEW_VALUES + 1.0)) == 0
    rare = np.zeros(100_000)
    rare[:70] = np.arange(70)  # what a sample of the voxels does not show
    assert few_values(rare) == 0


def test_a_mirror_image_is_told_from_the_data(tmp_path):
    """Heads without a side resemble their mirror images, a ramp along an axis does not."""
    grid = np.linspace(-1, 1, 16, dtype=np.float32)
    x, y, _ = np.meshgrid(grid, grid, grid, indexing="ij")
    for i in range(4):
        noise = np.random.default_rng(i).normal(0, 0.05, x.shape).astype(np.float32)
        save(tmp_path / f"d/c{i}.nii.gz", np.exp(-(x**2)) + 0.5 * y + noise)
    found = take(tmp_path / "d", {"data.cache_dir": str(tmp_path / "c")})
    assert found.pose > 0.8
    assert found.mirrored[0] == pytest.approx(found.pose, abs=0.02)
    assert found.mirrored[1] < 0.2
    assert found.mirrored[2] == pytest.approx(found.pose, abs=0.02)


def test_the_correlations_are_those_of_numpy():
    images = np.random.default_rng(0).normal(size=(3, 4, 5))
    images -= images.mean((1, 2), keepdims=True)
    images /= np.sqrt((images**2).sum((1, 2), keepdims=True))
    pose, mirrored = pose_and_mirrored(images)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]

    def mean(turn):
        return np.mean([np.corrcoef(turn(images[a]).ravel(), images[b].ravel())[0, 1] for a, b in pairs])

    assert pose == pytest.approx(mean(lambda x: x))
    assert mirrored == pytest.approx((mean(np.flipud), mean(np.fliplr)))


# --- what was read once -------------------------------------------------------------------------------------


def count_reads(monkeypatch):
    reads, real = [], inspection.read
    monkeypatch.setattr(inspection, "read", lambda path, **how: reads.append(path) or real(path, **how))
    return reads


@pytest.mark.parametrize("scaling", ["minmax", "window", "percentile"])
def test_a_planned_run_reads_no_file_again(tmp_path, monkeypatch, scaling):
    root = nested(tmp_path / "d")
    place = {"cache_dir": str(tmp_path / "c")}
    found = take(root, {"data.cache_dir": place["cache_dir"]})
    settings = {key.removeprefix("data."): value for key, value in found.settings.items()}
    window = {"window": (0.0, 80.0)} if scaling == "window" else {}
    config = DataConfig(root=str(root), scaling=scaling, **window, **place, **settings)
    reads = count_reads(monkeypatch)
    data = open_data(config, "d", seed=0)
    assert reads == []
    monkeypatch.undo()
    again = DataConfig(**{**config.__dict__, "cache_dir": str(tmp_path / "other")})
    assert data.infos == open_data(again, "d", seed=0).infos


def test_what_an_older_version_found_is_measured_again_for_a_plan_alone(tmp_path, monkeypatch):
    root = nested(tmp_path / "d")
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "c"), **LAYOUTS[nested])
    open_data(config, "d", seed=0)
    cache = inspection_cache(config, root)
    files = json.loads(cache.read_text())["files"]
    for entry in files.values():
        entry[2].pop("facts", None)
        entry[2].pop("centres", None)
    inspection._write_cache(cache, files)
    reads = count_reads(monkeypatch)
    open_data(config, "d", seed=0)
    assert reads == []
    found = take(root, {"data.cache_dir": str(tmp_path / "c")})
    assert found.num_cases == 3
    assert len(reads) == 6
    files = json.loads(cache.read_text())["files"]
    for entry in (entry for entry in files.values() if "facts" in entry[2]):
        entry[2]["facts"]["at_lowest"] = 0.5  # a fact that is no longer taken
    inspection._write_cache(cache, files)
    assert take(root, {"data.cache_dir": str(tmp_path / "c")}) == found
    assert len(reads) == 6


def test_thumbnails_have_mean_0_and_norm_1(tmp_path):
    root = nested(tmp_path / "d")
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "c"), **LAYOUTS[nested])
    images = thumbnails(list(open_data(config, "d", seed=0).infos.values()), 3)
    assert images.shape == (3, 10, 10, 10)
    assert images.reshape(3, -1).mean(1) == pytest.approx(0, abs=1e-12)
    assert (images**2).reshape(3, -1).sum(1) == pytest.approx(1)
