"""Maps of anomalies are right where the truth is known: differences, their scale, and the scores of maps."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

import ldm3d
from ldm3d import read
from ldm3d.evaluation import anomalies
from ldm3d.evaluation.__main__ import main
from ldm3d.evaluation.anomalies import (
    AnomaliesConfig,
    Healthy,
    area,
    dice_curve,
    dice_scores,
    local_ssim,
    structure,
)


def images(num, size=(16, 14, 12), seed=0):
    return torch.rand(num, 1, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(16, 14), (16, 14, 12)])
def test_the_map_of_ssim_is_that_of_scikit_image_inside_the_border(size):
    x, y = images(2, size).double().split(1)
    _, expected = structural_similarity(
        *((v + 1)[0, 0].numpy() for v in (x, y)), win_size=3, data_range=2.0, full=True,
        use_sample_covariance=False,
    )  # fmt: skip
    inner = tuple(slice(1, -1) for _ in size)
    found = local_ssim(x + 1, y + 1, 2.0)[0, 0].numpy()
    assert np.allclose(found[inner], expected[inner], atol=1e-10)


@pytest.mark.parametrize("size", [(16, 14), (16, 14, 12)])
def test_structure_differs_where_one_image_was_changed_alone(size):
    x = images(1, size)
    y, place = x.clone(), tuple(slice(6, 10) for _ in size)
    y[(0, 0, *place)] *= -1
    found = structure(x, y)
    assert found.shape == x.shape
    assert structure(x, x).abs().max() < 1e-5
    assert found[(0, 0, *place)].mean() > 5 * found[(0, 0, *(slice(0, 3) for _ in size))].mean()
    top = np.unravel_index(int(found[0, 0].argmax()), size)
    assert all(5 <= i <= 10 for i in top)
    assert structure(x, x + 0.1).max() < 0.2 * found.max()  # brightness hardly counts


def test_z_of_healthy_images_is_about_standard_and_of_a_change_large():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 3, 20).view(1, 1, 20, 1, 1)
    healthy = 2 + scale * torch.randn(40, 1, 20, 20, 20, generator=generator)
    rule, new = Healthy(), 2 + scale * torch.randn(1, 1, 20, 20, 20, generator=generator)
    for found in healthy.split(1):
        rule.add(found)
    z = rule.z(new)
    assert float(z.mean()) == pytest.approx(0, abs=0.1)
    assert z[..., 1:-1, 1:-1].std(dim=(0, 1, 3, 4)).sub(27**-0.5).abs().max() < 0.1  # a mean over 27 voxels
    changed = new.clone()
    changed[0, 0, :, 8:12, 8:12] += 6 * scale[0, 0]
    assert float(rule.z(changed)[0, 0, :, 9:11, 9:11].min()) > 4


def test_areas_and_dice_are_those_of_brute_force():
    draw = np.random.default_rng(0)
    values, truth = draw.integers(0, 20, 60).astype(float), draw.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in values[truth] for b in values[~truth]]
    assert area(values, truth) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(area(values, truth & False))
    thresholds = anomalies.THRESHOLDS
    expected = [2 * ((values >= t) & truth).sum() / ((values >= t).sum() + truth.sum()) for t in thresholds]
    assert np.allclose(dice_curve(values, truth), expected, atol=1e-12)


def test_one_threshold_serves_all_images_and_healthy_ones_take_no_part():
    truths = [np.zeros((4, 4), bool) for _ in range(3)]
    truths[0][:2], truths[1][:1] = True, True
    curves = [
        {name: dice_curve(t * 5.0 + i, t) for name in anomalies.MAPS} if t.any() else {}
        for i, t in enumerate(truths)
    ]
    rows, thresholds = dice_scores(curves)
    assert [row["dice_model"] for row in rows[:2]] == [1, 1]
    assert 1 < thresholds["model"] <= 5
    assert math.isnan(rows[2]["dice_model"])


def test_the_command_maps_every_image_and_scores_the_maps(conditional_run, heads, tmp_path, monkeypatch):
    asked = []
    whole = anomalies.restored
    monkeypatch.setattr(
        anomalies, "restored", lambda p, x, level, config: asked.append(level) or whole(p, x, level, config)
    )
    flags = "--label 4 --levels 0.3,0.6 --draws 1 --steps 3 --condition class=0 --shown 0 --resamples 5"
    words = [str(conditional_run), str(heads / "images"), "--masks", str(heads / "labels"), *flags.split()]
    healthy = ["--healthy", str(heads / "images"), "--subset", "3"]
    main(["anomalies", *words, *healthy, "--out", str(tmp_path / "out")])
    assert asked == [0.3, 0.6] * 6
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        labels = read(heads / "labels" / f"{row['case']}.tif").array
        assert float(row["voxels"]) == (labels == 4).sum()
        made = read(tmp_path / "out" / "maps" / f"{row['case']}.tif")
        image = read(heads / "images" / f"{row['case']}.tif")
        assert made.shape == image.shape
        assert np.allclose(made.affine, image.affine, atol=1e-3)
        if (labels == 4).any():
            z = torch.from_numpy(made.array[0])
            assert float(row["auroc_model"]) == pytest.approx(
                area(z.numpy().ravel(), (labels[0] == 4).ravel()), abs=1e-5
            )
    assert report["thresholds"].keys() == set(anomalies.MAPS)


def test_a_restored_image_depends_on_level_steps_draws_seed_and_condition(conditional_run, heads):
    pipeline, calls = ldm3d.load(conditional_run), []
    pipeline.model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    x = pipeline.read(heads / "images/phantom_0001.tif")
    how = {"draws": 2, "steps": 4, "condition": ("class=0",)}
    first = anomalies.restored(pipeline, x, 0.5, AnomaliesConfig(**how))
    assert first.shape == (2, *x.shape)
    assert len(calls) == 2  # the half of four steps
    assert not torch.equal(*first)
    for level, change in ((0.5, {"seed": 1}), (0.5, {"condition": ("class=1",)}), (0.9, {})):
        other = anomalies.restored(pipeline, x, level, AnomaliesConfig(**how | change))
        assert not torch.equal(other, first)
