"""A case becomes the tensors that its file, its scaling numbers and its key say."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from folders import ROLES, equal, opened, save

from ldm3d.data import AugmentConfig, DataConfig, evaluation_batches, read
from ldm3d.data.dataset import BothRoles
from ldm3d.data.transforms import scale


def prepared_files(settings):
    return sorted(Path(settings.cache_dir).glob("volumes/*.bricks"))


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


def test_the_window_of_a_sample_is_the_one_of_the_docstring(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", np.random.default_rng(0).random((100, 100, 50), dtype=np.float32))
    config = DataConfig(root=str(tmp_path), image="*.nii.gz", patch=(64, 64, 64), cache="none")
    config = replace(config, cache_dir=str(tmp_path / "c"))
    dataset = opened(config).dataset("train", augment=True)
    assert dataset[5000, 0]["start"].tolist() == [19, 5, -7]
    centred = opened(replace(config, crop="centre")).dataset("train", augment=True)
    assert centred[5000, 0]["start"].tolist() == [18, 18, -7]


def test_windows_of_padded_cases_reach_into_all_of_their_padding_and_no_further(tmp_path):
    shapes = {"a": (12, 12, 6), "b": (6, 12, 10), "c": (6, 12, 10)}
    for name, shape in shapes.items():
        save(tmp_path / f"{name}.nii.gz", np.random.default_rng(0).random(shape, dtype=np.float32))
    config = DataConfig(root=str(tmp_path), image="*.nii.gz", patch=(4, 8, 4), crop="padded")
    config = replace(config, cache_dir=str(tmp_path / "c"), val_fraction=0.3, size=(16, 8, 12))
    dataset = opened(config).dataset("train", augment=True)
    for index, case in enumerate(dataset.cases):
        starts = torch.stack([dataset[position, index]["start"] for position in range(400)])
        low, high = {"a": ([-2, 0, -3], [10, 4, 5])}.get(case.id, ([-3, 0, -1], [5, 4, 7]))
        assert (starts.min(0)[0].tolist(), starts.max(0)[0].tolist()) == (low, high)


def test_patches_are_for_training_and_whole_cases_for_validation(settings):
    opened_data = opened(replace(settings, patch=(4, 5, 6)))
    assert opened_data.dataset("train", augment=True)[0, 0]["mask"].shape == (4, 5, 6)
    assert opened_data.dataset("val")[0, 0]["mask"].shape == opened_data.spec.size


def test_augmented_intensities_stay_in_the_clipped_range(settings):
    bright = AugmentConfig(intensity=1.0, max_gain=0.5, max_bias=0.5)
    dataset = opened(replace(settings, augment=bright)).dataset("train", augment=True)
    items = [dataset[position, 0] for position in range(6)]
    assert max(float(item["image"].abs().max()) for item in items) == 1
    assert len({float(item["image"].mean()) for item in items}) == 6


def test_both_roles_are_the_images_and_then_the_sources(settings):
    dataset = opened(settings).dataset("train")
    both = BothRoles(dataset)
    assert len(both) == 2 * len(dataset)
    for index in range(len(dataset)):
        case = dataset[0, index]
        assert torch.equal(both[0, index]["image"], case["image"])
        assert torch.equal(both[0, index + len(dataset)]["image"], case["source"])
        assert both[0, index + len(dataset)]["index"] == index + len(dataset)


@pytest.mark.parametrize(
    "change",
    [{"label_values": (3, 2, 1, 0)}, {"spacing": (1.0, 1.02, 1.0)}],
)
def test_files_of_cache_disk_are_of_one_way_to_read_only(settings, change):
    settings = replace(settings, cache="disk")
    for one in (settings, replace(settings, **change)):
        cached, plain = opened(one).dataset("train"), opened(replace(one, cache="none")).dataset("train")
        assert equal(cached[0, 0], plain[0, 0])


def test_padding_repeats_the_edge(settings):
    dataset = opened(replace(settings, size=(20, 20, 20))).dataset("train")
    item = dataset[0, 0]
    shape, start = dataset.infos[dataset.cases[0].id].shape, item["start"]
    index = [(torch.arange(20) + s).clamp(0, n - 1) for s, n in zip(start, shape, strict=True)]
    whole = scale(read(dataset.cases[0].image).array, *dataset.spec.numbers(dataset.infos[item["id"]]), True)
    assert np.array_equal(item["image"], whole[np.ix_([0], *index)])


def test_a_patch_larger_than_the_cases_is_padded_and_said_once(settings, capsys):
    dataset = opened(replace(settings, patch=(16, 8, 8))).dataset("train", augment=True)
    assert dataset[0, 0]["image"].shape == (1, 16, 8, 8)
    assert capsys.readouterr().out.count("padded by repeating the edge") == 1


def test_padding_to_a_given_size_is_said_and_that_to_the_largest_case_is_not(settings, capsys):
    for size, said in (((48, 8, 8), 1), (None, 0), ((16, 16, 16), 0)):
        opened(replace(settings, size=size)).dataset("train", augment=True)
        assert capsys.readouterr().out.count(f"smaller than data.size {size} and are padded") == said


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


def test_augmentation_is_off_by_default(settings):
    opened_data = opened(replace(settings, size=(16, 16, 16)))
    plain, training = opened_data.dataset("train"), opened_data.dataset("train", augment=True)
    assert torch.equal(plain[0, 2]["image"], training[5, 2]["image"])


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


@pytest.mark.parametrize("change", [{"cache": "disk"}, {"cache": "none"}, {"cache_gb": 3e-5}])
def test_every_cache_gives_the_same_items(settings, change, capsys):
    plain = opened(settings).dataset("train")
    cached = opened(replace(settings, **change)).dataset("train")
    for _ in range(2):
        assert all(equal(plain[i, i], cached[i, i]) for i in range(len(plain)))
    files = prepared_files(settings)
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
    assert (batch["id"], batch["class"].tolist()) == (["case_0", "case_1"], [-1, -1])
