"""Planted copies are found, whatever was done to hide them, and new cases are not taken for copies."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm3d.config import InputError
from ldm3d.data import Volume, write
from ldm3d.data.phantoms import make_phantom
from ldm3d.engine.distributed import run_script
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.copies import (
    CopiesConfig,
    ImageSearch,
    Nearest,
    aligned,
    check_subjects,
    flips_of,
    in_feature_space,
    judge,
    limit_of,
    nearness,
    rank_z,
    verdict,
)
from ldm3d.evaluation.networks import Extractor
from ldm3d.evaluation.openers import OpenConfig, open_sets

SIZES = {2: (42, 36), 3: (24, 28, 24)}
SUFFIX = {2: "tif", 3: "nii.gz"}


def turn_by(x: np.ndarray, degrees: float, zoom: float) -> np.ndarray:
    """By scipy: turned in the plane of the first two axes and zoomed, about the centre."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy (extra test) is not installed")
    turn, angle = np.eye(x.ndim - 1) / zoom, np.radians(degrees)
    turn[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    centre = (np.array(x.shape[1:]) - 1) / 2
    return ndimage.affine_transform(x[0], turn, centre - turn @ centre, order=1, mode="nearest")[None]


PLANTED = {  # of training cases 0, 1, 2 ...
    "exact": lambda x, draw: x,
    "noisy": lambda x, draw: x + 0.05 * x.max() * draw.normal(size=x.shape),
    "shifted": lambda x, draw: np.roll(x, [2, -1, 1][: x.ndim - 1], axis=range(1, x.ndim)),
    "flipped": lambda x, draw: x[:, ::-1],
    "brighter": lambda x, draw: 1.7 * x + 40,
    "all": lambda x, draw: (
        0.5 * np.roll(x[..., ::-1], 2, axis=1) + 0.02 * x.max() * draw.normal(size=x.shape)
    ),
    "zoomed": lambda x, draw: turn_by(x, 0, 1.05),
    "smaller": lambda x, draw: turn_by(x, 0, 1 / 1.08),
    "rotated": lambda x, draw: turn_by(x, 10, 1),
    "little_rotated": lambda x, draw: np.roll(turn_by(x, -7, 1), 2, axis=1),
}


def head(index: int, dims: int) -> np.ndarray:
    return make_phantom(index, dims, SIZES[dims], tuple(210 / n for n in SIZES[dims])).image


def save(folder, name: str, array: np.ndarray) -> None:
    dims = array.ndim - 1
    write(
        folder / f"{name}.{SUFFIX[dims]}", Volume(np.ascontiguousarray(array, np.float32), np.eye(dims + 1))
    )


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def audit(request, tmp_path_factory):
    """(rows by sample, report, folder): ten planted copies, six new heads; 14 training, 10 held-out."""
    dims, place = request.param, tmp_path_factory.mktemp("copies")
    draw = np.random.default_rng(0)
    for i in range(14):
        save(place / "train", f"train_{i}", head(i, dims))
    for i in range(20, 30):
        save(place / "held", f"held_{i}", head(i, dims))
    for i, (name, change) in enumerate(PLANTED.items()):
        save(place / "made", f"copy_{name}", change(head(i, dims), draw))
    for i in range(40, 46):
        save(place / "made", f"new_{i}", head(i, dims))
    places = [str(place / name) for name in ("made", "train")]
    flags = ["--holdout", str(place / "held"), "--cache_dir", str(place), "--out", str(place / "out")]
    evaluation_main(["copies", *places, *flags, "--feature_steps", "30"])
    rows = {row.pop("case"): row for row in csv.DictReader((place / "out" / "cases.csv").open())}
    return rows, json.loads((place / "out" / "report.json").read_text()), place


def test_all_planted_copies_are_found_with_their_original_and_nothing_else(audit):
    rows, report, place = audit
    assert sorted(report["copies"]) == sorted(f"copy_{name}" for name in PLANTED)
    for i, name in enumerate(PLANTED):
        assert rows[f"copy_{name}"]["image_nearest"] == f"train_{i}"
    assert report["verdict"].startswith("10 of 16 samples are copies")
    assert report["share_of_copies"] == 10 / 16
    assert (place / "out" / "nearest.png").is_file()


def test_the_report_says_how_a_copy_was_turned_and_shifted(audit):
    rows, _, _ = audit
    dims = len(rows["copy_exact"]["shift_voxels"].split())
    assert rows["copy_exact"]["flipped_axes"] == ""
    assert rows["copy_flipped"]["flipped_axes"] == "0"
    assert rows["copy_exact"]["turned"] == ""
    assert rows["copy_zoomed"]["turned"] == "zoom 0.95"
    assert rows["copy_rotated"]["turned"] == "-10 degrees, axes 0 1"
    shift = [int(s) for s in rows["copy_shifted"]["shift_voxels"].split()]
    assert shift == [2, -1, 1][:dims]


@pytest.mark.parametrize(
    "audit", [2, pytest.param(3, marks=pytest.mark.slow)], ids=["2d", "3d"], indirect=True
)
def test_without_held_out_cases_training_cases_take_their_part(audit, tmp_path):
    _, _, place = audit
    places = [str(place / name) for name in ("made", "train")]
    evaluation_main(["copies", *places, "--features", "none", "--out", str(tmp_path / "out"), "--shown", "0"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    between = {
        "copy_smaller",
        "copy_little_rotated",
    }  # the turns that are tried; 14 cases are a coarse measure
    assert set(report["copies"]) | between == {f"copy_{name}" for name in PLANTED}
    assert "no held-out cases" in report["verdict"]


def test_what_is_alike_in_features_alone_is_not_called_a_copy():
    names = {"generated": ["alike", "copy"], "train": ["a", "b", "c"], "holdout": list("defghi")}
    cases = {k: SimpleNamespace(cases=[SimpleNamespace(id=i) for i in v]) for k, v in names.items()}
    usual = [Nearest(0.9 + 0.01 * i, 0, 1.0) for i in range(6)]
    spaces = {
        "image": {"generated": [Nearest(0.9, 0, 1.0), Nearest(0.9, 1, 1.0)], "holdout": usual},
        "feature": {"generated": [Nearest(0.1, 2, 1.0), Nearest(0.1, 1, 1.0)], "holdout": usual},
    }
    rows, found = judge(SimpleNamespace(sets=cases), spaces, "holdout")
    assert {name: row["copy"] for name, row in rows.items()} == {"alike": False, "copy": True}
    assert found["feature"]["copies"] == 2


def test_a_flipped_copy_is_found_by_features_too(tmp_path):
    draw = np.random.default_rng(0)
    arrays = draw.random((6, 1, 12, 10))
    for i, array in enumerate(arrays):
        save(tmp_path / "train", f"train_{i}", array)
    save(tmp_path / "made", "flipped", arrays[4][:, ::-1, ::-1])
    sets = open_sets(str(tmp_path / "made"), {"train": (str(tmp_path / "train"), "train")}, OpenConfig())
    pixels = Extractor(lambda x: x.flatten(1), "pixels", "", torch.device("cpu"))
    for axes, there in ((None, True), ((0,), False)):
        (found,) = in_feature_space(sets, ["generated"], CopiesConfig(flip_axes=axes), pixels)["generated"]
        assert (found.index == 4 and found.distance < 1e-4 and found.ratio < 1e-4) == there


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 17), (12, 10, 14)])
def test_the_greatest_correlation_is_that_of_trying_all_shifts_and_flips(size):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, *size, generator=draw), torch.randn(1, *size, generator=draw)
    search = ImageSearch([y], size, 0.2, torch.device("cpu"))
    value, how = search.correlations(x, flips_of((0, 1)))
    dims, best = len(size), -math.inf
    a, b = search.detail(x), search.detail(y)
    reach = [int(0.2 * n) for n in size]
    for axes in [(), (0,), (1,), (0, 1)]:
        turned = a.flip([i + 1 for i in axes])
        for shift in np.ndindex(*(2 * r + 1 for r in reach)):
            s = [i - r for i, r in zip(shift, reach, strict=True)]
            ours = turned[
                (slice(None), *(slice(max(0, v), n + min(0, v)) for v, n in zip(s, size, strict=True)))
            ]
            theirs = b[
                (slice(None), *(slice(max(0, -v), n + min(0, -v)) for v, n in zip(s, size, strict=True)))
            ]
            best = max(best, float((ours * theirs).sum()))
    assert value[0].item() == pytest.approx(best, abs=1e-5)
    assert len(how[0][1]) == dims


def test_a_training_case_is_shown_as_the_sample_shows_it():
    y = torch.arange(48.0).view(1, 6, 8)
    sample = y.roll((1, -2), (1, 2)).flip(2)
    shown = aligned(y, (1,), (1, -2))
    assert torch.equal(shown[:, 1:, 2:], sample[:, 1:, 2:])


def test_nearness_is_the_nearest_distance_over_the_mean_of_the_nearest_fifty():
    distances = torch.arange(1, 101, dtype=torch.float64).flip(0)
    assert nearness(distances) == (1 / np.mean(np.arange(1, 51)), 99, 1.0)
    distances[0] = math.inf  # a case of the same subject
    assert nearness(distances)[2] == 1.0


def test_the_rank_z_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra test) is not installed")
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 30, 25).astype(float), draw.integers(5, 40, 40).astype(float)  # with ties
    p = stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=False).pvalue
    assert rank_z(a, b) < 0
    assert math.erfc(abs(rank_z(a, b)) / math.sqrt(2)) == pytest.approx(p)


@pytest.mark.parametrize("num", [4, 10, 50])
def test_new_cases_seldom_fall_below_the_limit(num):
    draw = np.random.default_rng(0)
    below = [
        (np.exp(0.1 * draw.normal(size=50)) < limit_of(np.exp(0.1 * draw.normal(size=num)))).mean()
        for _ in range(200)
    ]
    assert np.mean(below) < 0.02


@pytest.mark.parametrize("z", [(math.nan, -5.0), (-5.0, math.nan), (math.nan, math.nan)])
def test_a_space_without_a_rank_does_not_hide_that_of_the_other(z):
    words = verdict(0, 9, {str(i): {"rank_z": v} for i, v in enumerate(z)}, 30, "holdout")
    assert ("rank z = -5.0" in words) == (-5.0 in z)
    assert "nan" not in words
    assert words.startswith("no copies")
    assert words.endswith("zooms beyond 12 %")  # what is excluded stands in the same line


@pytest.mark.parametrize(
    ("subjects", "fine"), [("aaaa", False), ("aaab", False), ("aabb", True), ("abc", True)]
)
def test_training_cases_measure_only_where_each_has_two_of_other_subjects(subjects, fine):
    if fine:
        check_subjects(list(subjects))
    else:
        with pytest.raises(InputError, match="not of subject a"):
            check_subjects(list(subjects))


def test_training_cases_of_one_subject_are_refused_and_leave_no_report(tmp_path, capsys, monkeypatch):
    for i in range(4):
        save(tmp_path / "train" / "images", f"case_{i}", head(i, 2))
        save(tmp_path / "made", f"made_{i}", head(i, 2))
    lines = [f"images/case_{i}.tif,one" for i in range(4)]
    (tmp_path / "train" / "cases.csv").write_text("\n".join(["image,subject", *lines]) + "\n")
    monkeypatch.chdir(tmp_path / "made")
    assert run_script(evaluation_main, ["copies", ".", "../train", "--features", "none"]) == 2
    assert "0 of 4 cases are not of subject one" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/copies-*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["MADE"], "which TRAIN"),
        (["MADE", "/nowhere"], "/nowhere: no such folder"),
        (["MADE", "MADE"], "expected at least 3"),
        (["MADE", "MADE", "--max_shift", "2"], "max_shift"),
    ],
)
def test_mistakes_are_named(tmp_path, mistake, flags, words):
    for i in range(2):
        save(tmp_path / "made", f"a{i}", head(i, 2))
    flags = [str(tmp_path / "made") if flag == "MADE" else flag for flag in flags]
    error = mistake(evaluation_main, ["copies", *flags])
    assert words in error


@pytest.mark.slow
def test_a_model_that_was_trained_on_four_volumes_is_caught(tmp_path):
    import sample
    import train_ldm
    import train_vae
    from ldm3d.data.phantoms import write_phantoms

    write_phantoms(tmp_path / "few", 5, dims=2, size=(32, 28), spacing=(7.0, 7.0))
    write_phantoms(tmp_path / "others", 16, dims=2, size=(32, 28), spacing=(7.0, 7.0), seed=1)
    common = (
        "--run.eval_every 2000 --run.save_every 2000 --run.log_every 500 --run.ema_decay 0.9 --batch_size 4"
    )
    vae = "--data.dims 2 --data.patch none --data.val_fraction 0.2 --vae.dims 2"
    vae += " --vae.channels 16,32 --vae.stem 1"
    vae += (
        " --vae.num_groups 4 --vae.num_res_blocks 1 --vae.latent_channels 4 --optim.lr 2e-3 --run.steps 400"
    )
    where = ["--data.root", str(tmp_path / "few"), "--run.dir", str(tmp_path / "vae")]
    where += ["--data.cache_dir", str(tmp_path / "cache")]
    train_vae.main(["phantom", *where, *common.split(), *vae.split()])
    ldm = (
        "--unet.channels 32,64 --unet.num_groups 4 --unet.num_res_blocks 1 --unet.attention_levels false,true"
    )
    ldm += " --unet.head_channels 16 --optim.lr 1e-3 --sample_steps 4 --run.steps 1500"
    where = ["--vae", str(tmp_path / "vae"), "--run.dir", str(tmp_path / "ldm")]
    train_ldm.main(["phantom", *where, *common.split(), *ldm.split()])
    sample.main([str(tmp_path / "ldm"), "--num", "8", "--steps", "20", "--out", str(tmp_path / "made")])
    flags = [
        "--holdout",
        str(tmp_path / "others" / "images"),
        "--features",
        "none",
        "--out",
        str(tmp_path / "out"),
    ]
    evaluation_main(["copies", str(tmp_path / "made"), str(tmp_path / "ldm"), *flags])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cases"] == {"train": 4, "holdout": 16, "generated": 8}
    assert report["share_of_copies"] >= 0.5
    assert report["spaces"]["image"]["rank_z"] < -3
