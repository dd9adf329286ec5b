"""Every pair gets the scores that scikit-image and counting give it; files pair by name or not at all."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from ldm3d.config import InputError
from ldm3d.data import Volume, write
from ldm3d.engine.distributed import run_script
from ldm3d.evaluation import pairs as evaluation_of_pairs
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.pairs import describe, fitted, move, pair_files
from ldm3d.metrics import psnr

SHAPES = {2: (40, 36), 3: (20, 18, 22)}
SPACING = {2: (1.0, 2.0), 3: (1.0, 1.5, 2.0)}
SUFFIX = {2: "tif", 3: "nii.gz"}


def save(folder, name: str, array: np.ndarray) -> None:
    dims = array.ndim
    write(folder / f"{name}.{SUFFIX[dims]}", Volume(array[None], np.diag([*SPACING[dims], 1.0])))


def blob(dims: int, middle: float, radius: float) -> np.ndarray:
    """A bright ball of a radius in voxels on a dark ground."""
    places = np.indices(SHAPES[dims]) - middle
    return np.where((places**2).sum(0) <= radius**2, 100.0, 10.0).astype(np.float32)


@pytest.fixture(autouse=True)
def no_histograms(monkeypatch):
    """They take a second to draw: the test that looks for their file draws them."""
    monkeypatch.setattr(evaluation_of_pairs, "new_figure", lambda **_: None)


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def pairs(request, tmp_path):
    """Five balls and their noisy likenesses; that of `shifted` has moved by two voxels along each axis."""
    dims, draw = request.param, np.random.default_rng(0)
    for i in range(5):
        target = blob(dims, 8.0, 5 + 0.5 * i)
        noise = draw.normal(0, 4, target.shape).astype(np.float32)
        made = blob(dims, 10.0, 7.0) if i == 4 else target
        name = "shifted" if i == 4 else f"case_{i}"
        save(tmp_path / "target", name, target)
        save(tmp_path / "made", name, made + noise)
    return dims, tmp_path


def run(place, *flags: str):
    """(rows by case, report) of the command."""
    out = place / f"out{len(list(place.glob('out*')))}"
    evaluation_main(["compare", str(place / "made"), str(place / "target"), "--out", str(out), *flags])
    rows = {row.pop("case"): row for row in csv.DictReader((out / "cases.csv").open())}
    rows = {name: {k: float(v) for k, v in row.items()} for name, row in rows.items()}
    return rows, json.loads((out / "report.json").read_text())


def read_array(folder, name: str, dims: int) -> np.ndarray:
    from ldm3d.data import read

    return read(folder / f"{name}.{SUFFIX[dims]}").array[0]


def test_intensity_scores_are_scikit_images(pairs):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image (extra test) is not installed")
    dims, place = pairs
    rows, report = run(place, "--resamples", "50")
    assert report["data_range"] == pytest.approx(90)
    for name in ("case_0", "shifted"):
        made, target = (read_array(place / f, name, dims).astype(np.float64) for f in ("made", "target"))
        assert rows[name]["psnr"] == pytest.approx(
            metrics.peak_signal_noise_ratio(target, made, data_range=90)
        )
        assert rows[name]["ssim"] == pytest.approx(metrics.structural_similarity(target, made, data_range=90))
        assert rows[name]["mse"] == pytest.approx(metrics.mean_squared_error(target, made))


def test_objects_are_found_and_measured(pairs, monkeypatch):
    monkeypatch.undo()  # histograms are drawn here
    dims, place = pairs
    rows, report = run(place, "--resamples", "50")
    for i in range(4):
        row = rows[f"case_{i}"]
        assert row["dice"] == pytest.approx(1, abs=0.01)
        assert row["height_difference"] == 0
    mask, moved = blob(dims, 8.0, 7.0) > 50, blob(dims, 10.0, 7.0) > 50
    row = rows["shifted"]
    assert row["dice"] == pytest.approx(2 * (mask & moved).sum() / (mask.sum() + moved.sum()), abs=0.01)
    assert row["iou"] == pytest.approx((mask & moved).sum() / (mask | moved).sum(), abs=0.01)
    axis = {2: 0, 3: 2}[dims]
    assert row["height_target"] == 15 * SPACING[dims][axis]
    width = "width_50" if dims == 2 else "width1_50"
    assert row[f"{width}_target"] == 15 * SPACING[dims][1]
    assert report["metrics"]["dice"]["worst_case"] == "shifted"
    assert report["metrics"]["dice"]["outliers_iqr"] == ["shifted"]
    assert report["metrics"]["height_ratio"]["above"]["0.97"] == 5
    assert {p.name for p in (place / "out0").iterdir()} == {
        "cases.csv",
        "report.json",
        "worst.png",
        "histograms.png",
    }


@pytest.mark.parametrize("align", ["shift", "rigid"])
def test_alignment_takes_a_shift_back(pairs, align):
    _, place = pairs
    rows, _ = run(place, "--resamples", "5", "--align", align)
    assert rows["shifted"]["dice"] > 0.97
    assert rows["shifted"]["psnr"] > 20


def test_masks_from_a_folder_replace_the_threshold(pairs):
    dims, place = pairs
    for name in ("case_0", "case_1", "case_2", "case_3", "shifted"):
        save(place / "masks", name, (blob(dims, 8.0, 3.0) > 50).astype(np.uint8))
    rows, _ = run(place, "--masks", str(place / "masks"), "--generated_masks", str(place / "masks"))
    assert {row["dice"] for row in rows.values()} == {1.0}
    assert {row["height_target"] for row in rows.values()} == {7 * SPACING[dims][{2: 0, 3: 2}[dims]]}


def test_an_empty_target_has_no_object(tmp_path):
    for name, made in (("empty", np.zeros(SHAPES[2], np.float32)), ("filled", blob(2, 9.0, 5.0) - 10)):
        save(tmp_path / "target", name, np.zeros(SHAPES[2], np.float32))
        save(tmp_path / "made", name, made)
    rows, _ = run(tmp_path, "--data_range", "100")
    assert math.isnan(rows["empty"]["dice"])
    assert math.isnan(rows["empty"]["height_generated"])
    assert rows["filled"]["dice"] == 0
    assert rows["filled"]["height_generated"] == 11


def test_one_threshold_that_of_the_target_finds_both_objects(tmp_path):
    save(tmp_path / "target", "a", blob(2, 12.0, 6.0))
    save(tmp_path / "made", "a", 0.4 * blob(2, 12.0, 6.0))  # the same form, but darker than the threshold
    rows, _ = run(tmp_path, "--resamples", "5")
    assert (rows["a"]["dice"], rows["a"]["height_target"]) == (0, 13)
    assert math.isnan(rows["a"]["height_generated"])


def test_upright_heights_are_along_the_object_and_not_along_the_image(tmp_path):
    r, c = np.indices((80, 60)) - np.array([40, 30])[:, None, None]
    along, across = (r + c) / 2**0.5, (r - c) / 2**0.5  # turned by 45 degrees; voxels are 1 x 2 mm
    leaning = np.where((along / 24) ** 2 + (across / 8) ** 2 <= 1, 100.0, 10.0).astype(np.float32)
    write(tmp_path / "target" / "a.tif", Volume(leaning[None], np.eye(3)))
    write(tmp_path / "made" / "a.tif", Volume(leaning[None], np.eye(3)))
    plain, _ = run(tmp_path, "--resamples", "5")
    upright, _ = run(tmp_path, "--resamples", "5", "--upright")
    assert plain["a"]["height_target"] == pytest.approx(2 * math.sqrt((24**2 + 8**2) / 2), abs=2)
    assert upright["a"]["height_target"] == pytest.approx(48, abs=2)
    assert upright["a"]["width_50_target"] == pytest.approx(16, abs=2)


def test_label_maps_are_compared_label_by_label(tmp_path):
    target = np.zeros((12, 12), dtype=np.uint8)
    target[:6], target[6:, :4] = 1, 2
    made = target.copy()
    made[0], made[6:, :4] = 0, 0
    for folder, array in (("target", target), ("made", made)):
        save(tmp_path / folder, "a", array)
        save(tmp_path / folder, "b", target)
    rows, report = run(tmp_path, "--labels")
    assert rows["a"] == pytest.approx(
        {
            **{"dice_1": 2 * 60 / (60 + 72), "dice_2": 0, "iou_1": 60 / 72, "iou_2": 0},
            **{"precision_1": 1, "precision_2": math.nan, "sensitivity_1": 60 / 72, "sensitivity_2": 0},
            "dice_mean": 60 / 132,
        },
        nan_ok=True,
    )
    assert report["metrics"]["precision_2"]["cases"] == 1
    assert report["metrics"]["dice_mean"]["worst_case"] == "a"


def test_only_labels_that_occur_have_columns(tmp_path):
    target = np.zeros((12, 12), dtype=np.uint16)
    target[:6], target[6:, :4] = 3, 1000
    for folder in ("target", "made"):
        save(tmp_path / folder, "a", target)
    rows, _ = run(tmp_path, "--labels")
    assert [name for name in rows["a"] if name.startswith("dice")] == ["dice_3", "dice_1000", "dice_mean"]
    assert set(rows["a"].values()) == {1.0}


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_what_is_no_label_map_is_refused_by_name(tmp_path, capsys, value):
    for folder, high in (("target", 1.0), ("made", value)):
        save(tmp_path / folder, "a", np.where(blob(2, 9, 5) > 50, high, 0).astype(np.float32))
    places = [str(tmp_path / "made"), str(tmp_path / "target")]
    assert run_script(evaluation_main, ["compare", *places, "--labels"]) == 2
    assert f"made/a.tif: labels: expected 0, 1, 2 ..., found {value:g}" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.005, 1.05])
def test_spacings_may_differ_by_rounding_only(tmp_path, capsys, factor):
    for folder, mm in (("target", 2.0), ("made", 2.0 * factor)):
        write(tmp_path / folder / "a.nii.gz", Volume(blob(3, 9, 5)[None], np.diag([1, 1, mm, 1.0])))
    places = [str(tmp_path / "made"), str(tmp_path / "target")]
    assert run_script(evaluation_main, ["compare", *places]) == (0 if factor < 1.01 else 2)
    error = capsys.readouterr().err
    assert ("made/a.nii.gz: voxels of 1 x 1 x 2.1 mm" in error) == (factor > 1.01)
    assert ("target/a.nii.gz 1 x 1 x 2 mm" in error) == (factor > 1.01)


def test_the_report_lies_beside_the_images_and_a_mistake_leaves_none(tmp_path, monkeypatch):
    for folder in ("target", "made"):
        save(tmp_path / folder, "a", blob(2, 9, 5))
    monkeypatch.chdir(tmp_path / "made")
    assert run_script(evaluation_main, ["compare", ".", "../target", "--height_axis", "2"]) == 2
    assert not (tmp_path / "pairs-001").exists()
    evaluation_main(["compare", ".", "../target", "--resamples", "5"])
    assert (tmp_path / "pairs-001" / "report.json").is_file()
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["a.tif"]


@pytest.mark.parametrize("pairs", [2], indirect=True)
def test_features_of_a_network_measure_how_alike_two_images_are(pairs):
    _, place = pairs
    torch.manual_seed(0)
    net = torch.jit.trace(torch.nn.Conv2d(1, 5, 3), torch.zeros(1, 1, 8, 8))
    net.save(str(place / "net.ts"))
    rows, report = run(place, "--features", str(place / "net.ts"))
    assert len(report["network"]["sha256"]) == 64
    assert "[-1, 1]" in report["network"]["input"]
    made, target = (
        torch.from_numpy(read_array(place / f, "case_0", 2))[None, None] for f in ("made", "target")
    )
    low, high = min(made.min(), target.min()), max(made.max(), target.max())
    a, b = (net((v - low) / (high - low) * 2 - 1).mean((2, 3)) for v in (made, target))
    assert rows["case_0"]["feature_distance"] == pytest.approx((a - b).norm().item(), rel=1e-3)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    assert rows["case_0"]["feature_cosine"] == pytest.approx(cosine.item(), abs=1e-6)


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_moving_by_whole_voxels_is_a_roll_inside(dims):
    x = np.random.default_rng(0).random((1, *SHAPES[dims])).astype(np.float32)
    shift = np.array([2.0, 1.0, 3.0][:dims]) * SPACING[dims]
    moved = move(x, np.eye(dims), shift, SPACING[dims], "bilinear")
    inside = tuple([slice(None), *(slice(0, n - 4) for n in SHAPES[dims])])
    expected = np.roll(x, [-2, -1, -3][:dims], axis=range(1, dims + 1))
    assert np.allclose(moved[inside], expected[inside], atol=1e-4)


def test_a_gain_of_the_scanner_does_not_rank_an_image_below_a_blurred_one():
    draw = np.random.default_rng(0)
    y = torch.from_numpy(draw.normal(100, 20, (1, 1, 24, 24)))
    gained, blurred = 1.3 * y + 20, (y + y.roll(1, 2) + y.roll(1, 3)) / 3
    plain = [psnr(v, y, 100.0).item() for v in (gained, blurred)]
    scores = [psnr(fitted(v, y), y, 100.0).item() for v in (gained, blurred)]
    assert plain[0] < plain[1]
    assert scores[0] > 100 > 30 > scores[1] > plain[1]
    assert torch.equal(fitted(-y, y), y.mean().expand_as(y))  # an inverted image is as good as none


def test_a_description_counts_the_cases_outside_so_many_deviations():
    rows = {
        str(i): {"psnr": float(v), "x_ratio": 0.96, "x_difference": 7.0} for i, v in enumerate([1, 2, 3, 10])
    }
    found = describe(rows, 50)
    half = 1.96 * np.std([1, 2, 3, 10], ddof=1) / 2
    assert found["psnr"]["normal_high"] == pytest.approx(4 + half)
    assert found["psnr"]["outside"] == {"1": 1, "2": 0, "3": 0}  # the deviation is 4.08
    assert (found["psnr"]["worst"], found["psnr"]["worst_case"]) == (1.0, "0")
    assert found["x_ratio"]["above"] == {"0.9": 4, "0.95": 4, "0.97": 0}
    assert found["x_difference"]["below_mm"] == {"5.0": 0, "10.0": 4}


@pytest.mark.parametrize("column", ["mse", "mae", "height_difference", "feature_distance"])
def test_the_worst_case_of_an_error_is_the_one_with_the_highest(column):
    rows = {name: {column: value, "ssim": value} for name, value in (("low", 1.0), ("high", 3.0))}
    found = describe(rows, 10)
    assert (found[column]["worst"], found[column]["worst_case"]) == (3.0, "high")
    assert (found["ssim"]["worst"], found["ssim"]["worst_case"]) == (1.0, "low")


def test_targets_that_nothing_was_made_for_are_left_out_with_a_note(tmp_path, capsys):
    for i in range(3):
        save(tmp_path / "target", f"case_{i}", blob(2, 9, 5))
    save(tmp_path / "made", "case_1", blob(2, 9, 5))
    evaluation_main(["compare", str(tmp_path / "made"), str(tmp_path / "target"), "--resamples", "5"])
    note = capsys.readouterr().out
    assert "2 of 3 files, such as case_0, of target" in note
    assert "have no partner in generated and are left out" in note


def test_targets_whose_names_end_with_their_role_are_those_of_the_cases(tmp_path):
    for i in range(3):
        save(tmp_path / "target", f"p{i}_T1w", blob(2, 9, 5))
    save(tmp_path / "made", "p1", blob(2, 9, 5))
    places = {"generated": str(tmp_path / "made"), "target": str(tmp_path / "target")}
    (pair,) = pair_files(places).values()
    assert [path.name for path in pair.values()] == ["p1.tif", "p1_T1w.tif"]
    save(tmp_path / "target", "p1_FLAIR", blob(2, 9, 5))  # which of the two is meant?
    with pytest.raises(InputError, match="no partner named p1 in target"):
        pair_files(places)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ("extra", [], "no partner named new in target"),
        ("shape", [], "shape (1, 9, 9), expected (1, 40, 36)"),
        (None, ["--labels", "--upright"], "labels"),
        (None, ["--height_axis", "2"], "height_axis: expected 0 to 1"),
        (None, ["--data_range", "-1"], "data_range"),
    ],
)
def test_mistakes_are_named(tmp_path, mistake, change, flags, words):
    for i in range(3):
        for folder in ("made", "target"):
            shape = (
                np.zeros((9, 9), np.float32) if (folder, i, change) == ("made", 2, "shape") else blob(2, 9, 5)
            )
            save(tmp_path / folder, f"case_{i}", shape)
    if change == "extra":
        save(tmp_path / "made", "new", blob(2, 9, 5))
    places = [str(tmp_path / "made"), str(tmp_path / "target")]
    error = mistake(evaluation_main, ["compare", *places, *flags])
    assert words in error
