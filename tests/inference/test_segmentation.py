"""train_cdal.py and `sample.py RUN FOLDER` do the whole job: train, segment images, score the label maps."""

import csv
import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from tiny import cdal_flags, lines, read_csv

import sample
import train_cdal
from ldm3d.cdal import CDAL, CDALConfig, uncertainty
from ldm3d.config import InputError, replace, show
from ldm3d.data import CaseInfo, read
from ldm3d.data.phantoms import write_phantoms
from ldm3d.data.volumes import Header
from ldm3d.engine.checkpoint import load
from ldm3d.engine.distributed import run_script
from ldm3d.evaluation.statistics import summarise
from ldm3d.inference import segmentation
from ldm3d.inference.segmentation import (
    FileGrid,
    SegmentConfig,
    borders,
    calibration,
    certainty,
    overlay,
    reliability,
    score,
    votes_taken,
    ways_of,
)
from ldm3d.large.streaming import Input

STEPS = 60


@pytest.fixture
def run(cdal_run) -> Path:
    return cdal_run


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Oblique, flipped, anisotropic 3-D heads of different shapes with labels 0, 50 and 1000, and a run on
    them."""
    place = tmp_path_factory.mktemp("volumes")
    write_phantoms(place / "heads", 6, size=(14, 16, 12), spacing=(14.0, 13.0, 16.0))
    turn = np.array([[-0.9, 0.3, 0.1], [0.2, 0.2, -0.95], [0.3, 0.9, 0.3]])
    for i, path in enumerate(sorted((place / "heads/images").iterdir())):
        affine = np.eye(4)
        affine[:3, :3] = turn * [14.0, 13.0, 16.0]
        affine[:3, 3] = (5 * i, -7, 9)
        for role in ("images", "labels"):
            array = np.asarray(nib.load(place / "heads" / role / path.name).dataobj)[: 14 - i, :, : 9 + i % 3]
            if role == "labels":
                array = np.array([0, 50, 50, 1000, 1000], dtype=np.int16)[array.astype(int)]
            (place / role).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), place / role / path.name)
    flags = cdal_flags(place / "images", place / "run", 3, "--data.dims", 3, "--data.patch", "8,8,8")
    flags += ["--data.root", str(place), "--data.image", "images/*.nii.gz", "--data.mask", "labels/*.nii.gz"]
    flags += ["--data.label_values", "0,50,1000", "--run.eval_every", "3", "--generator.stem", "2"]
    train_cdal.main(flags)
    return place


# --- training -----------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_best_checkpoint_is_that_of_the_highest_validation_dice(run):
    steps = [line["loss"] for line in lines(run)]
    assert np.mean(steps[-5:]) < 0.6 * np.mean(steps[:2])
    assert {"ce", "dice", "mse", "g_loss", "d_loss", "disc_accuracy"} <= lines(run)[1].keys()
    assert ["r1" in line for line in lines(run)] == [step % 2 == 0 for step in range(STEPS)]
    scores = {line["step"]: line["dice"] for line in lines(run, "val")}
    best = load(run / "best.pt")["best"]
    assert best["name"] == "dice"
    assert best["value"] == max(scores.values()) == scores[best["step"]]
    assert {"dice_1", "dice_2"} <= lines(run, "val")[0].keys()
    assert list((run / "previews").glob("*.png"))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_like_fp32(heads, tmp_path, amp):
    for run, precision in (("exact", "fp32"), ("half", amp)):
        train_cdal.main(cdal_flags(heads, tmp_path / run, 6, "--run.amp", precision))
    for a, b in zip(lines(tmp_path / "exact"), lines(tmp_path / "half"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-2)
    assert lines(tmp_path / "half")[-1]["skipped_steps"] == 0


def test_the_preset_published_is_the_published_method():
    config = replace(train_cdal.Config(), train_cdal.PRESETS["published"])
    cdal = config.cdal
    assert cdal.kernel.num_timesteps == 4
    assert (cdal.mse_weight, cdal.ce_weight, cdal.dice_weight, cdal.adversarial_weight) == (1, 0, 0, 0)
    assert (cdal.attention, cdal.attention_normalised, cdal.attention_layer) == ("input", False, 1)
    assert (cdal.own_estimate, cdal.noisiest, cdal.disc_sees_image) == (False, None, False)
    assert (cdal.r1_weight, cdal.r1_every) == (
        0.05,
        10,
    )  # every tenth step, by its weight times ten: the released 0.5
    assert (config.generator.output, config.generator.latent_dim) == ("tanh", 50)
    assert (config.optim.lr, config.disc_optim.lr, config.run.ema_decay) == (1.6e-4, 1.25e-4, 0.999)
    for optim in (config.optim, config.disc_optim):
        assert (optim.adam_betas, optim.schedule) == ((0.5, 0.9), "constant")


@pytest.mark.parametrize("mode", ["published", "plain"])
def test_the_published_method_and_a_plain_network_train_with_the_same_command(heads, tmp_path, mode):
    faster = {"optim.lr", "run.ema_decay"}  # left as they are in the tiny runs
    settings = {
        "published": {k: v for k, v in train_cdal.PUBLISHED.items() if k not in faster},
        "plain": {"cdal.diffusion": False, "cdal.attention": "none"},
    }[mode] | {"cdal.adversarial_weight": 0}
    more = [text for key, value in settings.items() for text in (f"--{key}", show(value))]
    train_cdal.main(cdal_flags(heads, tmp_path / "run", 20, *more))
    steps = lines(tmp_path / "run")
    assert ("d_loss" in steps[0]) == (mode == "published")
    name = "mse" if mode == "published" else "dice"
    assert np.mean([line[name] for line in steps[-4:]]) < 0.9 * steps[0][name]


def test_the_plan_counts_generator_discriminator_and_votes_and_makes_no_run(
    heads, tmp_path, monkeypatch, capsys
):
    def needs(self):
        found.update({job.name: job.need(job.batch, job.size) for job in self.jobs})

    monkeypatch.setattr(train_cdal.MemoryTable, "print", needs)
    found: dict[str, int] = {}
    train_cdal.main([*cdal_flags(heads, tmp_path / "run", 3), "--plan", "--memory", "4"])
    with_discriminator = dict(found)
    assert "note: " not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(train_cdal, "Undrawn", CDAL)
        patch.setattr("ldm3d.plan.SLOW_ATTENTION", 1)
        train_cdal.main([*cdal_flags(heads, tmp_path / "run", 3), "--plan", "--memory", "4"])
    assert found == with_discriminator
    assert "positions attend to each other" in capsys.readouterr().out
    monkeypatch.setattr("ldm3d.cdal.keyed_generator", None)  # drawing a vote would fail
    plain = ["--cdal.adversarial_weight", 0, "--cdal.attention", "none", "--votes", 5]
    train_cdal.main([*cdal_flags(heads, tmp_path / "run", 3, *plain), "--plan", "--memory", "4"])
    assert found["training"] < with_discriminator["training"]
    assert found["validation, votes"] > with_discriminator["validation, votes"] > 0
    assert not (tmp_path / "run").exists()


def test_a_run_without_diffusion_has_no_votes_to_speak_of():
    plain = CDALConfig(diffusion=False, attention="none", adversarial_weight=0)
    few, one = (SimpleNamespace(method=CDAL(config, 3)) for config in (CDALConfig(), plain))
    assert ways_of([few, one], 5) == "T = 2, 5 votes; without diffusion"
    assert ways_of([one], 5) == "without diffusion"
    assert votes_taken([few, one], SegmentConfig(votes=5)) == 5
    assert votes_taken([one], SegmentConfig(votes=5)) == 1
    assert votes_taken([one], SegmentConfig(votes=5, level_sets=True)) == 5


# --- segmenting files ---------------------------------------------------------------------------------------


def test_a_folder_is_segmented_scored_and_shown(run, heads, capsys):
    images, labels = str(heads / "images"), str(heads / "labels")
    sample.main([str(run), images, "--reference", labels, "--votes", "3", "--probabilities"])
    folder = run / "segmentations-001"
    for name in ("labels", "uncertainty", "probability"):
        assert len(list((folder / name).iterdir())) == 12
    rows = list(csv.DictReader((folder / "cases.csv").read_text().splitlines()))
    report = json.loads((folder / "report.json").read_text())
    assert (len(rows), report["cases"], report["votes"]) == (12, 12, 3)
    for row in rows[:3]:
        truth = torch.from_numpy(tifffile.imread(heads / "labels" / f"{row['case']}.tif").astype(np.int64))
        found = torch.from_numpy(read(folder / "labels" / f"{row['case']}.tif").array[0].astype(np.int64))
        both, one, other = ((found == 1) & (truth == 1)).sum(), (found == 1).sum(), (truth == 1).sum()
        assert float(row["dice_1"]) == pytest.approx(float(2 * both / (one + other)))
        assert float(row["precision_1"]) == pytest.approx(float(both / one))
        p = read(folder / "probability" / f"{row['case']}.tif").array
        assert np.array_equal(p.argmax(0), found.numpy())
        doubt = read(folder / "uncertainty" / f"{row['case']}.tif").array[0]
        assert np.allclose(doubt, -(p * np.log(p.clip(1e-12))).sum(0) / np.log(len(p)), atol=1e-5)
        assert float(row["seconds"]) > 0
    mean = np.mean([float(row["dice"]) for row in rows])
    assert report["metrics"]["dice"]["mean"] == pytest.approx(mean)
    assert report["metrics"]["dice"]["low"] <= mean <= report["metrics"]["dice"]["high"]
    assert {
        "hd95_1",
        "iou_2",
        "sensitivity_1",
        "error_correlation",
        "retention_ratio",
        "retention_border",
        "ece",
        "brier",
        "nll",
    } <= report["metrics"].keys()
    assert sum(report["reliability"]["voxels"]) > 0
    assert (folder / "overlays.png").exists()
    assert (folder / "reliability.png").exists()
    said = capsys.readouterr().out
    assert "12 cases, T = 2, 3 votes\n" in said
    assert "error_correlation" in said


def test_one_file_and_one_part_of_the_split_can_be_asked_for(run, heads):
    first = sorted((heads / "images").iterdir())[0]
    sample.main([str(run), str(first), "--votes", "1", "--out", str(run / "one")])
    assert [p.name for p in (run / "one/labels").iterdir()] == [first.name]
    sample.main([str(run), str(heads / "images"), "--part", "val", "--out", str(run / "val")])
    split = json.loads((run / "split.json").read_text())
    assert sorted(p.stem for p in (run / "val/labels").iterdir()) == sorted(split["val"])


def test_label_maps_have_the_geometry_of_their_image_and_the_label_values_of_the_data(volumes):
    place = [str(volumes / "images"), "--reference", str(volumes / "labels")]
    sample.main([str(volumes / "run"), *place, "--window", "8,6,8", "--votes", "2"])
    folder = volumes / "run/segmentations-001"
    for path in sorted((volumes / "images").iterdir()):
        image, found = nib.load(path), nib.load(folder / "labels" / path.name)
        assert found.shape == image.shape
        assert np.allclose(found.affine, image.affine, atol=1e-3)
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 50, 1000}
    assert_scores_are_those_of_the_files(folder, volumes / "labels")


def assert_scores_are_those_of_the_files(folder: Path, references: Path) -> None:
    """Dice and HD95 in cases.csv = those of the NIfTI files that were written and the references."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy (extra test) is not installed")
    rows = list(csv.DictReader((folder / "cases.csv").read_text().splitlines()))
    for row in rows:
        found, truth = (
            np.asarray(nib.load(place / f"{row['case']}.nii.gz").dataobj)
            for place in (folder / "labels", references)
        )
        for k, value in enumerate((50, 1000), start=1):
            a, b = found == value, truth == value
            expected = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert float(row[f"dice_{k}"]) == pytest.approx(expected, abs=1e-9)
            if not (a.any() and b.any()):
                continue
            mm = np.linalg.norm(nib.load(references / f"{row['case']}.nii.gz").affine[:3, :3], axis=0)
            surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
            away = [ndimage.distance_transform_edt(~surface, sampling=mm) for surface in surfaces]
            ends = [np.percentile(far[near], 95) for far, near in zip(away, surfaces[::-1], strict=True)]
            assert float(row[f"hd95_{k}"]) == pytest.approx(max(ends), rel=1e-4)
    assert max(float(row["dice_1"]) for row in rows) > 0


def test_values_on_the_grid_of_training_come_onto_the_grid_of_the_file():
    def places(shape, spacing):  # mm of the voxels' centres; both grids begin at the same corner
        axes = (s * (np.arange(n) + 0.5) for n, s in zip(shape, spacing, strict=True))
        return np.stack(np.meshgrid(*axes, indexing="ij"))

    grids = ((18, 9, 8), (1.0, 2.0, 2.5)), ((9, 12, 7), (2.0, 1.5, 3.0))  # 18 x 18 x 20 (21) mm
    ramp, wanted = (places(*grid) for grid in grids)
    shape, spacing = grids[0]
    affine = [[*row, 0.5 * s] for row, s in zip(np.diag(spacing), spacing, strict=True)] + [[0, 0, 0, 1]]
    info = CaseInfo(shape, spacing, tuple(map(tuple, affine)), "RAS", (0.0,), (1.0,))
    header = Header(grids[1][0], 1, grids[1][1], np.diag([*grids[1][1], 1.0]), "RAS", np.dtype(np.int16))
    grid = FileGrid(Input(torch.from_numpy(ramp).float()[None]), info, header)
    found = grid.read(0, 9)[0].numpy()
    inner = (slice(None), *(slice(1, -1),) * 3)  # beyond the outermost centres the border goes on
    assert np.allclose(found[inner], wanted[inner], atol=1e-4)
    slabs = [grid.read(i, min(i + 2, 9))[0].numpy() for i in range(0, 9, 2)]
    assert np.array_equal(np.concatenate(slabs, 1), found)


def test_cases_that_were_resampled_for_training_come_back_on_their_own_grid(volumes, tmp_path):
    content = torch.load(volumes / "run/best.pt", weights_only=True)
    content["config"]["data"]["spacing"] = [10.0, 15.0, 11.0]
    torch.save(content, tmp_path / "finer.pt")
    path = sorted((volumes / "images").iterdir())[2]
    sample.main([str(tmp_path / "finer.pt"), str(path), "--reference", str(volumes / "labels")])
    found = nib.load(next((tmp_path / "segmentations-001/labels").iterdir()))
    assert found.shape == nib.load(path).shape
    assert np.allclose(found.affine, nib.load(path).affine, atol=1e-3)
    assert_scores_are_those_of_the_files(tmp_path / "segmentations-001", volumes / "labels")


@pytest.mark.parametrize("spacing", [None, [10.0, 15.0, 11.0]])
def test_probabilities_in_a_file_worked_on_plane_by_plane_give_the_same_results(
    volumes, tmp_path, monkeypatch, spacing
):
    content = torch.load(volumes / "run/best.pt", weights_only=True)
    content["config"]["data"]["spacing"] = spacing
    torch.save(content, tmp_path / "run.pt")
    flags = [str(tmp_path / "run.pt"), str(volumes / "images"), "--reference", str(volumes / "labels")]
    flags += ["--part", "val", "--window", "8,6,8", "--votes", "1", "--probabilities", "--out"]
    sample.main([*flags, str(tmp_path / "whole")])
    monkeypatch.setattr(segmentation, "IN_MEMORY", 0)
    monkeypatch.setattr(segmentation, "SLAB", 1)
    sample.main([*flags, str(tmp_path / "planes")])
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.nii.gz"))
    assert len(names) == 3
    for name in names:
        one, other = (nib.load(tmp_path / folder / name) for folder in ("whole", "planes"))
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj)), name
        assert np.array_equal(one.affine, other.affine)
    one, other = (read_csv(tmp_path / folder / "cases.csv")[0] for folder in ("whole", "planes"))
    for name in one.keys() - {"case", "seconds"}:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-9, nan_ok=True), name


def test_a_disk_without_room_for_a_large_array_is_named_before_the_array_is_filled(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segmentation, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"no room for an array of 0.031 GiB \(No space left.*TMPDIR"):
        segmentation.large_array((2, 2**22))


def test_references_that_do_not_belong_are_named_with_their_image(run, volumes, heads, tmp_path, capsys):
    shutil.copytree(volumes / "labels", tmp_path / "labels")
    broken = sorted((tmp_path / "labels").iterdir())[1]
    image = nib.Nifti1Image(nib.load(broken).get_fdata(), nib.load(broken).affine)
    flags = [
        str(volumes / "run"),
        str(volumes / "images"),
        "--reference",
        str(tmp_path / "labels"),
    ]
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), broken)
    assert run_script(sample.main, flags) == 2
    err = capsys.readouterr().err
    assert str(broken) in err
    assert str(volumes / "images" / broken.name) in err
    moved = image.affine.copy()
    moved[:3, 3] += 60
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), broken)
    assert run_script(sample.main, flags) == 2
    err = capsys.readouterr().err
    assert str(broken) in err
    assert str(volumes / "images" / broken.name) in err
    broken.unlink()
    assert run_script(sample.main, flags) == 2
    assert str(volumes / "images" / broken.name) in capsys.readouterr().err


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), (".", ".")])
def test_a_run_segments_its_validation_cases_as_in_training(run, heads, tmp_path, images, labels):
    place = [str(heads / images), "--reference", str(heads / labels), "--part", "val"]
    sample.main([str(run), *place, "--votes", "1", "--out", str(tmp_path / "again")])
    report = json.loads((tmp_path / "again/report.json").read_text())
    step = load(run / "best.pt")["best"]["step"]
    (logged,) = (line for line in lines(run, "val") if line["step"] == step)
    assert report["step"] == step
    for k in range(1, 5):
        assert report["metrics"][f"dice_{k}"]["mean"] == pytest.approx(logged[f"dice_{k}"], abs=1e-6)


# --- scores -------------------------------------------------------------------------------------------------


def test_calibration_is_the_correlation_and_the_area_counted_by_hand():
    doubt = torch.tensor([[0.1, 0.9], [0.3, 0.7]])
    wrong = torch.tensor([[False, True], [False, True]])
    found = calibration(doubt, wrong)
    assert found["error_correlation"] == pytest.approx(np.corrcoef([0.1, 0.9, 0.3, 0.7], [0, 1, 0, 1])[0, 1])
    assert found["retention_area"] == pytest.approx((0 + 0 + 0.25 + 0.5) / 4)
    useless = calibration(torch.rand(100_000), torch.rand(100_000) < 0.3)
    assert useless["retention_ratio"] == pytest.approx(1, abs=0.02)
    assert useless["error_correlation"] == pytest.approx(0, abs=0.02)
    assert np.isnan(calibration(doubt, ~wrong & wrong)["error_correlation"])


def test_voxels_of_equal_uncertainty_are_retained_in_any_order_on_average():
    wrong = torch.arange(1000) < 300
    for e in (wrong, wrong.flip(0)):
        assert calibration(torch.full((1000,), 0.5), e)["retention_ratio"] == pytest.approx(1, abs=2e-3)
    u, e = np.array([0.2, 0.7, 0.2, 0.2, 0.7, 0.9]), np.array([1, 0, 0, 1, 1, 1])
    orders = map(list, itertools.permutations(range(6)))
    areas = [e[order].cumsum().mean() / 6 for order in orders if (np.diff(u[order]) >= 0).all()]
    assert len(areas) == 6 * 2
    found = calibration(torch.tensor(u), torch.tensor(e) == 1)["retention_area"]
    assert found == pytest.approx(np.mean(areas))


def test_more_background_makes_no_uncertainty_better():
    draw, found = torch.Generator().manual_seed(0), []
    truth, p = torch.zeros(20, 20, dtype=torch.long), torch.full((2, 20, 20), 0.0)
    truth[6:14, 6:14] = 1
    p[1, 7:15, 6:14] = 0.4 + 0.6 * torch.rand(8, 8, generator=draw)
    p[0] = 1 - p[1]
    for n in (0, 20, 200):
        q, t = F.pad(p, (n,) * 4), F.pad(truth, (n,) * 4)
        q[0] = 1 - q[1]
        slabs = [(i, q[:, i : i + 7]) for i in range(0, len(t), 7)]
        scores, bins = certainty(slabs, q.argmax(0), uncertainty(q), t)
        found.append(scores)
        assert bins[0].sum() == 19 * 18  # 5 voxels around the 9 x 8 of either map
    for name, value in found[0].items():
        assert [scores[name] for scores in found] == pytest.approx([value] * 3), name
    assert found[0]["retention_ratio"] != found[0]["retention_border"]


def test_the_border_map_marks_voxels_beside_another_label():
    labels = torch.zeros(5, 6, dtype=torch.long)
    labels[2, 2:4] = 1
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2, 1:5], expected[1, 2:4], expected[3, 2:4] = True, True, True
    assert torch.equal(borders(labels), expected)


def test_reliability_is_scikit_learns_and_the_definitions():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = np.random.default_rng(0)
    p, truth = draw.dirichlet((1, 1, 1), 5000).T, draw.integers(0, 3, 5000)
    found, bins = reliability([(torch.from_numpy(p), torch.from_numpy(truth))])
    assert found["nll"] == pytest.approx(metrics.log_loss(truth, p.T.clip(1e-6)), rel=1e-4)
    assert found["brier"] == pytest.approx(np.mean(((p - np.eye(3)[truth].T) ** 2).sum(0)))
    confidence, right = p.max(0), p.argmax(0) == truth
    parts = [(confidence >= k / 15) & (confidence < (k + 1) / 15) for k in range(15)]
    gaps = [abs(confidence[part].sum() - right[part].sum()) for part in parts]
    assert found["ece"] == pytest.approx(sum(gaps) / 5000)
    assert bins[0].tolist() == [part.sum() for part in parts]


def test_a_label_that_is_nowhere_gives_no_score_and_one_that_is_missed_is_counted():
    truth = torch.zeros(6, 6, dtype=torch.long)
    truth[1:3, 1:3] = 1
    rows = {"a": score(truth, truth, 4, (1.0, 1.0)), "b": score(0 * truth, truth, 4, (1.0, 1.0))}
    assert rows["a"]["dice"] == rows["a"]["dice_1"] == 1
    assert np.isnan(rows["a"]["dice_3"])
    metrics = summarise(rows, 10)
    assert metrics["dice"]["mean"] == 0.5
    assert metrics["hd95_1"]["cases"] == 2  # a missed label is as far away as can be
    assert metrics["hd95_1"]["mean"] == pytest.approx(np.hypot(6, 6) / 2)
    assert metrics["dice_3"]["cases"] == 0


def test_an_overlay_colours_the_labels_and_leaves_the_rest_grey():
    image, labels = torch.zeros(1, 4, 5), torch.zeros(4, 5, dtype=torch.long)
    labels[1, 2] = 1
    (picture,) = overlay(image, labels)
    grey = (picture == picture[..., :1]).all(-1)
    assert np.argwhere(~grey).tolist() == [[1, 2]]
    assert len(overlay(torch.zeros(1, 4, 5, 6), None)) == 3
