"""A case may have the masks of several raters: training sees one of them at random, validation all."""

import csv

import numpy as np
import pytest
import torch
from folders import equal, opened, refused, save

from ldm3d.config import InputError
from ldm3d.data import AugmentConfig, DataConfig
from ldm3d.data.cases import find_cases
from ldm3d.data.images import with_references
from ldm3d.data.layouts import recognise
from ldm3d.engine.distributed import keyed_generator

RATERS = ("anna", "ben", "chris")


@pytest.fixture
def root(tmp_path):
    """Four images; three raters each, but for the last, which has two."""
    rng = np.random.default_rng(0)
    for i in range(4):
        save(tmp_path / f"images/p_{i}.nii.gz", rng.normal(0, 1, (6, 5, 4)).astype(np.float32))
        for rater in RATERS[: 2 if i == 3 else 3]:
            save(tmp_path / f"raters/p_{i}__{rater}.nii.gz", rng.integers(0, 3, (6, 5, 4), dtype=np.uint8))
    return tmp_path


@pytest.fixture
def settings(root):
    return DataConfig(
        root=str(root),
        image="images/*.nii.gz",
        mask="raters/{id}__{rater}.nii.gz",
        val_fraction=0.25,
        patch=(4, 4, 4),
        cache_dir=str(root / "cache"),
    )


def array_of(root, case, rater):
    import nibabel as nib

    return torch.from_numpy(np.asarray(nib.load(root / f"raters/{case}__{rater}.nii.gz").dataobj)).long()


def table_of(root, **more):
    """The same cases as a table with a column for each rater."""
    rows = [
        {"image": f"images/p_{i}.nii.gz"}
        | {f"mask:{r}": f"raters/p_{i}__{r}.nii.gz" if i < 3 or r != "chris" else "" for r in RATERS}
        | more
        for i in range(4)
    ]
    with open(root / "rated.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return "rated.csv"


@pytest.mark.parametrize(
    "pattern", ["raters/{id}__{rater}.nii.gz", "raters/*__{rater}.nii.gz", "raters/{id}__{rater}"]
)
def test_a_pattern_names_the_raters_of_each_case(root, settings, pattern):
    cases = find_cases(DataConfig(image=settings.image, mask=pattern), root)
    assert [list(case.raters) for case in cases] == [list(RATERS)] * 3 + [["anna", "ben"]]
    assert cases[1].raters["ben"] == root / "raters/p_1__ben.nii.gz"
    assert cases[1].mask == cases[1].masks[0] == root / "raters/p_1__anna.nii.gz"


def test_a_column_for_each_rater_gives_the_same_cases_as_a_pattern(root, settings):
    by_pattern = find_cases(settings, root)
    by_table = find_cases(DataConfig(table=table_of(root)), root)
    assert [(c.id, c.image, c.raters) for c in by_table] == [(c.id, c.image, c.raters) for c in by_pattern]
    assert not any("mask" in column for case in by_table for column in case.columns)


def test_training_sees_the_mask_of_one_rater_drawn_by_the_number_of_the_sample(root, settings):
    data = opened(settings)
    dataset = data.dataset("train", augment=True)
    seen = set()
    for position in range(12):
        index = position % len(dataset)
        case, item = dataset.cases[index], dataset[position, index]
        masks = list(case.raters)
        number = int(torch.randint(len(masks), (), generator=keyed_generator(0, position, "rater")))
        box = tuple(slice(s, s + 4) for s in item["start"].tolist())
        assert torch.equal(item["mask"], array_of(root, case.id, masks[number])[box])
        assert "raters" not in item
        seen.add(number)
    assert seen == {0, 1, 2}
    assert equal(dataset[7, 1], data.dataset("train", augment=True)[7, 1])


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_whole_cases_have_the_masks_of_all_raters_and_what_most_of_them_say(root, settings, cache):
    from dataclasses import replace

    dataset = opened(replace(settings, cache=cache)).dataset("val", own_size=True)
    item = dataset[0, 0]
    masks = torch.stack([array_of(root, item["id"], rater) for rater in dataset.cases[0].raters])
    assert torch.equal(item["raters"], masks)
    votes = masks.flatten(1).T.tolist()
    expected = [min(set(v), key=lambda k: (-v.count(k), k)) for v in votes]
    assert item["mask"].flatten().tolist() == expected


def test_the_masks_of_all_raters_are_hidden_from_cases_beyond_the_fraction(settings):
    from dataclasses import replace

    data = opened(replace(settings, mask_fraction=0.3, allow_missing_mask=True)).dataset("train")
    assert sorted(int(data[i, i]["mask"].min()) for i in range(len(data))) == [-1, -1, 0]


def test_windows_and_augmentation_are_those_of_a_data_set_with_one_rater(root, settings):
    from dataclasses import replace

    augmented = replace(settings, augment=AugmentConfig(flip_axes=(0, 1), affine=1.0, intensity=1.0))
    several = opened(augmented).dataset("train", augment=True)
    one = opened(replace(augmented, mask="raters/*__anna.nii.gz")).dataset("train", augment=True)
    for position in range(4):
        a, b = several[position, 1], one[position, 1]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["start"], b["start"])


def test_another_mask_of_any_rater_makes_other_data(root, settings):
    before = opened(settings).contents
    path = root / "raters/p_1__chris.nii.gz"
    save(path, 2 - array_of(root, "p_1", "chris").numpy().astype(np.uint8))
    changed = [name for name, row in opened(settings).contents.items() if row != before[name]]
    assert changed == ["p_1"]


def test_raters_that_do_not_fit_are_named(root, settings):
    from dataclasses import replace

    refused(replace(settings, image="images/{id}{rater}.nii.gz"), "data.image: ", "only masks have a {rater}")
    both = replace(settings, image=None, mask=None, table=table_of(root, mask="raters/p_0__ben.nii.gz"))
    refused(both, "columns mask and mask:anna")
    refused(replace(settings, num_labels=2), "p_0__anna.nii.gz: label 2")
    slices = replace(settings, dims=2, patch=None, slices="axial")
    refused(slices, "data.slices: masks of several raters")
    save(root / "raters/p_1__ben.nii.gz", np.zeros((6, 5, 3), np.uint8))
    refused(settings, "p_1__ben.nii.gz: mask has shape (6, 5, 3)")


def test_references_of_several_raters_are_not_taken_for_one(root, settings):
    cases = [case.image_alone() for case in find_cases(settings, root)]
    assert not any(case.masks for case in cases)
    for folder in (root, root / "raters"):
        with pytest.raises(InputError, match="has masks of several raters"):
            with_references(cases, folder, settings)


def test_a_folder_of_masks_named_by_case_and_rater_is_recognised(root, settings):
    layout = recognise(root)
    assert layout.settings == {"image": settings.image, "mask": settings.mask}
    assert layout.why["mask"] == "beside the images, 11 files named by case and rater"
    save(root / "crowd/p_1__dora.nii.gz", np.ones((6, 5, 4), np.uint8))  # not of every case
    layout = recognise(root)
    assert layout.settings["mask"] == settings.mask
    assert layout.why["others"] == "crowd/*.nii.gz (1)"
