"""Samples beside raters: every score is what a plain computation over all pairs gives."""

import itertools
import json

import numpy as np
import pytest
import tifffile
import torch
from scipy.optimize import linear_sum_assignment
from tiny import read_csv

from ldm3d.config import InputError
from ldm3d.evaluation.raters import (
    BINS,
    RatersConfig,
    assignment,
    compare_raters,
    matched_iou,
    overlaps,
    rater_scores,
    shares,
    squared_ged,
)
from ldm3d.metrics import calibration_error, reliability_bins


def maps(num: int, seed: int, labels: int = 3, size: int = 7) -> torch.Tensor:
    return torch.randint(labels, (num, size, size), generator=torch.Generator().manual_seed(seed))


def iou(a: torch.Tensor, b: torch.Tensor, labels) -> float:
    values = []
    for k in labels:
        p, q = {*map(tuple, (a == k).nonzero().tolist())}, {*map(tuple, (b == k).nonzero().tolist())}
        values.append(len(p & q) / len(p | q) if p | q else 1.0)
    return float(np.mean(values))


def test_the_energy_distance_is_the_mean_over_all_pairs():
    s, y = maps(5, 0), maps(3, 1)
    y[1] = 0  # a rater who sees nothing
    d = [
        np.mean([1 - iou(a, b, (1, 2)) for a, b in itertools.product(*sets)])
        for sets in ((s, y), (s, s), (y, y))
    ]
    assert squared_ged(s, y) == pytest.approx(2 * d[0] - d[1] - d[2], abs=1e-12)
    scores = rater_scores(s, y)
    parts = [scores[name] for name in ("ged", "to_raters", "votes_apart", "raters_apart")]
    assert parts == pytest.approx([squared_ged(s, y), *d], abs=1e-12)


def test_the_energy_distance_is_zero_for_the_raters_themselves_and_larger_for_their_mean():
    y = torch.zeros(4, 6, 6, dtype=torch.long)
    for r in range(4):
        y[r, 1:5, 1 : 3 + r] = 1
    assert squared_ged(y, y) == pytest.approx(0, abs=1e-12)
    assert squared_ged(y[1:2], y) > 0.1
    nothing = torch.zeros(2, 6, 6, dtype=torch.long)
    assert squared_ged(nothing, nothing) == 0
    assert squared_ged(y[:1], nothing) == pytest.approx(2)


def test_overlaps_agree_with_sets_of_voxels():
    a, b = maps(3, 2), maps(4, 3)
    a[0][a[0] == 2] = 0  # a map without label 2
    found, dice = overlaps(a, b, [1, 2])
    for i, j in itertools.product(range(3), range(4)):
        assert found[i, j] == pytest.approx(iou(a[i], b[j], (1, 2)), abs=1e-12)
        of_label = [overlaps(a[i : i + 1], b[j : j + 1], [k])[0].item() for k in (1, 2)]
        assert dice[i, j] == pytest.approx(np.mean([2 * v / (1 + v) for v in of_label]), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 6, 25])
@pytest.mark.parametrize("ties", [False, True])
def test_the_assignment_costs_as_little_as_scipy_s(n, ties):
    rng = np.random.default_rng(n)
    for _ in range(10):
        cost = rng.integers(0, 3, (n, n)).astype(float) if ties else rng.normal(size=(n, n))
        columns = assignment(cost)
        assert sorted(columns) == list(range(n))
        rows, theirs = linear_sum_assignment(cost)
        assert cost[np.arange(n), columns].sum() == pytest.approx(cost[rows, theirs].sum(), abs=1e-9)


def test_the_matched_iou_repeats_both_sets_to_equal_numbers():
    values = overlaps(maps(4, 4), maps(6, 5), [1, 2])[0]
    repeated = values.repeat_interleave(3, 0).repeat_interleave(2, 1).numpy()
    rows, columns = linear_sum_assignment(-repeated)
    assert matched_iou(values) == pytest.approx(repeated[rows, columns].mean(), abs=1e-12)


def test_diversity_and_best_match_are_over_pairs_of_different_maps():
    s, y = maps(3, 6, labels=2), maps(4, 7, labels=2)

    def dice(a, b):
        return 2 * float(((a > 0) & (b > 0)).sum()) / float((a > 0).sum() + (b > 0).sum())

    scores = rater_scores(s, y)
    assert scores["votes_dice"] == pytest.approx(
        np.mean([dice(a, b) for a, b in itertools.combinations(s, 2)])
    )
    assert scores["raters_dice"] == pytest.approx(
        np.mean([dice(a, b) for a, b in itertools.combinations(y, 2)])
    )
    assert scores["best_dice"] == pytest.approx(np.mean([max(dice(a, b) for a in s) for b in y]))
    most = (s.sum(0) >= 2).long()
    assert scores["mean_dice"] == pytest.approx(np.mean([dice(most, b) for b in y]))


def test_the_reliability_curve_counts_voxels_near_labels_by_the_share_of_the_samples():
    s, y = maps(4, 8, labels=2), maps(5, 9, labels=2)
    pairs = shares(s, y)
    assert pairs.shape == (2, 49)  # every voxel is near a label
    bins = reliability_bins(*pairs, BINS)
    p, q = s.double().mean(0), y.double().mean(0)
    for k in range(10):
        inside = (p * 10).long().clamp(max=9) == k
        assert bins[:, k].tolist() == pytest.approx([float(v.sum()) for v in (inside, p[inside], q[inside])])
    expected = sum(abs(float(b[1] - b[2])) for b in bins.T) / 49
    assert calibration_error(bins) == pytest.approx(expected)
    far = torch.zeros(2, 30, 30, dtype=torch.long)
    far[:, 10, 10] = 1
    assert shares(far, far).shape == (2, 11 * 11)  # within five voxels along each axis


@pytest.fixture
def folders(tmp_path):
    """Samples and masks of two cases: the samples of p are the raters' masks, those of q one mask thrice."""
    for i, case in enumerate("pq"):
        y = maps(3, i, labels=2, size=8).numpy().astype(np.uint8)
        for name, array in zip(("anna", "ben", "chris"), y, strict=True):
            path = tmp_path / "raters" / name / f"{case}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, array)
        (tmp_path / "votes").mkdir(exist_ok=True)
        for v in range(3):
            tifffile.imwrite(tmp_path / "votes" / f"{case}__{v + 1:02d}.tif", y[v if case == "p" else 0])
    return tmp_path


def test_the_command_scores_a_folder_of_samples_against_the_raters(folders):
    pattern = str(folders / "raters/{rater}/{id}.tif")
    folder = compare_raters(RatersConfig(resamples=10), str(folders / "votes"), pattern)
    assert folder.parent == folders
    rows = {row["case"]: row for row in read_csv(folder / "cases.csv")}
    assert float(rows["p"]["ged"]) == pytest.approx(0, abs=1e-9)
    assert float(rows["q"]["ged"]) > 0.2
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["matched_iou"]["cases"] == 2
    assert sum(report["reliability"]["voxels"]) == 2 * 64
    fewer = compare_raters(RatersConfig(resamples=10, votes=2, worst=1), str(folders / "votes"), pattern)
    assert read_csv(fewer / "cases.csv")[0]["votes"] == "2"


def test_what_does_not_fit_is_named(folders):
    votes, masks = str(folders / "votes"), str(folders / "raters/{rater}/{id}.tif")
    for arguments, message in (
        (("/nowhere", masks), "VOTES: /nowhere is not a folder"),
        ((votes, str(folders / "raters/*/*.tif")), "MASKS: expected a folder of files ID__NAME"),
    ):
        with pytest.raises(InputError, match=message):
            compare_raters(RatersConfig(), *arguments)
    tifffile.imwrite(folders / "votes/q__02.tif", np.zeros((8, 9), np.uint8))
    with pytest.raises(InputError, match=r"q__02\.tif: shape"):
        compare_raters(RatersConfig(), votes, masks)
    tifffile.imwrite(folders / "votes/r__01.tif", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="case r has no mask"):
        compare_raters(RatersConfig(), votes, masks)
