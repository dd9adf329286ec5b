"""Label maps are compared by what can be counted in them; generated cases are trained on as intended."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm3d.evaluation.validity import (
    dice_of_labels,
    generated_pairs,
    label_shapes,
    label_validity,
    train_on_synthetic,
    write_cases,
)


def box(*corners: tuple[slice, ...]) -> np.ndarray:
    """A map (10, 8, 6): label 1 in the boxes, label 2 nowhere."""
    mask = np.zeros((10, 8, 6), dtype=np.int64)
    for corner in corners:
        mask[corner] = 1
    return mask


def test_volume_pieces_and_centroid_of_boxes_are_known():
    one = box(np.s_[2:4, 3:5, 0:6])  # 24 voxels; centroid (2.5, 3.5, 2.5), middle of the map (4.5, 3.5, 2.5)
    two = box(np.s_[0:1, 0:1, 0:1], np.s_[9:10, 7:8, 5:6])
    shapes = label_shapes([one, two], (1.0, 2.0, 0.5), num_labels=3)
    assert shapes.shape == (2, 2, 5)
    assert shapes[0, 0].tolist() == [24.0, 1, -2.0, 0.0, 0.0]
    assert shapes[1, 0].tolist() == [2.0, 2, 0.0, 0.0, 0.0]
    assert shapes[:, 1, :2].tolist() == [[0, 0], [0, 0]]
    assert np.isnan(shapes[:, 1, 2:]).all()


def test_the_figures_are_scipys_of_each_label_and_their_means():
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra test) is not installed")
    draw = np.random.default_rng(0)
    made, real = draw.normal(0, 2, (30, 2, 4)), draw.normal(1, 3, (20, 2, 4))
    made[:, :, 1], real[:, :, 1] = draw.integers(0, 3, (30, 2)), 1
    made[:5, 1, 2:] = math.nan  # label 2 is missing in five maps
    found = label_validity(made, real)
    volumes = [(made[:, k, 0], real[:, k, 0]) for k in (0, 1)]
    places = [(made[np.isfinite(made[:, k, a]), k, a], real[:, k, a]) for k in (0, 1) for a in (2, 3)]
    expected = {
        "volume_wasserstein": np.mean([stats.wasserstein_distance(a, b) / b.std() for a, b in volumes]),
        "volume_ks": np.mean([stats.ks_2samp(a, b).statistic for a, b in volumes]),
        "position_wasserstein": np.mean([stats.wasserstein_distance(a, b) for a, b in places]),
        "position_ks": np.mean([stats.ks_2samp(a, b).statistic for a, b in places]),
        "one_component": (made[:, :, 1] == 1).mean(),
    }
    assert found == pytest.approx(expected)
    itself = label_validity(real, real)
    assert [itself[name] for name in expected] == [0, 0, 0, 0, 1]


def test_a_label_that_no_map_has_gives_no_position():
    nothing = label_shapes([np.zeros((4, 4))], (1, 1), num_labels=2)
    found = label_validity(nothing, nothing)
    assert math.isnan(found["position_wasserstein"])
    assert (found["volume_ks"], found["one_component"]) == (0, 0)


def test_networks_learn_from_generated_real_and_both_and_real_cases_alone_validate(tmp_path):
    for i in range(12):
        (tmp_path / f"sample_{i:04d}.nii.gz").write_bytes(b"")
    (tmp_path / "preview.png").write_bytes(b"")
    real = [(tmp_path / "r.nii.gz", tmp_path / "m.nii.gz", part) for part in ("train", "val")]
    seen = train_on_synthetic(real, tmp_path, lambda name, cases: (name, cases))
    assert {name: kind for name, (kind, _) in seen.items()} == {n: n for n in ("generated", "real", "both")}
    made = generated_pairs(tmp_path, validate=False)
    assert [image.name for image, _, _ in made] == [f"sample_{i:04d}.nii.gz" for i in range(12)]
    assert made[3][1] == tmp_path / "labels" / "sample_0003.nii.gz"
    assert seen["real"][1] == real
    assert seen["both"][1] == [*real, *made]
    assert [part for *_, part in seen["generated"][1]] == ["val", *["train"] * 9, "val", "train"]
    path = write_cases(tmp_path / "new", real)
    assert [row["split"] for row in csv.DictReader(path.open())] == ["train", "val"]


class Cases(list):
    """Stands in for a data set: images that are their masks."""

    spec = SimpleNamespace(num_labels=4)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor]:
        mask = super().__getitem__(item[1])
        return {"image": mask[None].float(), "mask": mask}


def test_dice_of_labels_is_the_mean_over_the_cases_where_it_is_defined():
    cases = Cases([torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [0, 0]])])
    assert dice_of_labels(lambda image: image[0].long(), cases)[:2] == [1, 1]
    found = dice_of_labels(lambda image: torch.ones_like(image[0]).long(), cases)
    assert found[:2] == pytest.approx([(2 * 2 / 6 + 2 * 1 / 5) / 2, 0])  # label 2: in one case only
    assert math.isnan(found[2])
