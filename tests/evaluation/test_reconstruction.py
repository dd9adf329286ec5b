"""The quality report says what is true of each case, and the latent report what is true of the latents."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_vae
from ldm3d import read
from ldm3d.data import open_images
from ldm3d.data.phantoms import write_phantoms
from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig
from ldm3d.engine.distributed import run_script
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.reconstruction import LatentStatistics, loss_floor, scores_of
from ldm3d.evaluation.statistics import bootstrap_interval, summarise
from ldm3d.pipeline import load_autoencoder

ROOT = Path(__file__).parents[2]


# --- the interval -------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_of_a_mean_is_nearly_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=200)
    low, high = bootstrap_interval(values, 2000)
    half = 1.96 * values.std() / math.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values, 2000) == (low, high)  # nothing random from run to run


def test_one_case_or_one_subject_has_a_mean_and_no_interval():
    summary = summarise({"a": {"psnr": 30.0}}, 10)["psnr"]
    assert summary["mean"] == 30.0
    assert all(math.isnan(summary[name]) for name in ("low", "high", "std"))
    rows = {"a": {"psnr": 30.0}, "b": {"psnr": 32.0}}
    summary = summarise(rows, 10, {"a": "p1", "b": "p1"})["psnr"]
    assert summary["mean"] == 31.0
    assert math.isnan(summary["low"])


# --- the latent report --------------------------------------------------------------------------------------


def test_the_floor_of_flow_is_the_noise_share_times_half_pi():
    share = torch.tensor([0.5, 0.2, 0.05])
    kernel = DiffusionKernel(KernelConfig(flow_shift=1.0))
    expected = share.double() * math.pi / 2
    assert torch.allclose(loss_floor(share.square(), kernel, (8, 8)), expected, rtol=1e-3)
    assert loss_floor(torch.zeros(1), kernel, (8, 8)).item() == 0


@pytest.mark.parametrize(
    ("process", "prediction"), [("flow", "velocity"), ("vp", "eps"), ("vp", "v"), ("vp", "x_start")]
)
def test_the_floor_is_the_loss_of_the_best_linear_prediction_when_the_mean_is_known(process, prediction):
    kernel = DiffusionKernel(KernelConfig(process=process, prediction=prediction, schedule="linear"))
    generator = torch.Generator().manual_seed(0)
    n, s2, losses = 4000, 0.3, []
    for u in (torch.arange(20) + 0.5) / 20:
        z = math.sqrt(s2) * torch.randn(n, 1, generator=generator, dtype=torch.float64)  # the mean taken away
        noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        t = kernel.t_from_uniform(u.double().expand(n), (16, 16))
        x_t, y = kernel.q_sample(z, t, noise), kernel.target(z, t, noise)
        best = (x_t * y).mean() / x_t.square().mean()
        losses.append((y - best * x_t).square().mean())
    floor = loss_floor(torch.tensor([s2]), kernel, (16, 16))
    assert floor.item() == pytest.approx(float(torch.stack(losses).mean()), rel=0.05)


def test_the_latent_report_is_that_of_drawn_latents():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 1, 40, 50, generator=generator)
    other = torch.randn(6, 1, 40, 50, generator=generator)
    zero = torch.zeros_like(base)
    mean = torch.cat([2 * base + 1, 0.6 * base + 0.8 * other, 0.05 * other, zero], dim=1)  # (6, 4, 40, 50)
    logvar = torch.cat([zero - 2, zero - 4, zero, zero - 20], dim=1)
    whole, halves = LatentStatistics(4), [LatentStatistics(4), LatentStatistics(4)]
    for i in range(6):
        whole.add(mean[i : i + 1], logvar[i : i + 1])
        halves[i % 2].add(mean[i : i + 1], logvar[i : i + 1])
    report = whole.report((40, 50))
    z = mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=generator)
    flat = z.transpose(0, 1).flatten(1)
    assert report["mean"] == pytest.approx(flat.mean(1).tolist(), abs=0.03)
    assert report["std"] == pytest.approx(flat.std(1).tolist(), rel=0.03, abs=1e-3)
    expected = [math.exp(-2) / (4 + math.exp(-2)), math.exp(-4) / (1 + math.exp(-4)), 1 / 1.0025, 1]
    assert report["noise_share"] == pytest.approx(expected, abs=0.01)
    assert report["dead_channels"] == [2, 3]
    assert report["correlation"][0][1] == pytest.approx(0.6, abs=0.03)
    assert report["correlation"][1][1] == pytest.approx(1.0)
    assert math.isnan(report["correlation"][0][3])

    for kind, value in report["loss_floor"].items():
        vp = {} if kind == "flow" else {"process": "vp", "prediction": kind}
        kernel = DiffusionKernel(KernelConfig(**vp))
        floors = loss_floor(torch.tensor(expected), kernel, (40, 50))
        assert value == pytest.approx(floors.mean().item(), rel=1e-3)
    halves[0].merge(halves)
    assert halves[0].count == whole.count
    for name in ("first", "second", "noise", "histogram"):
        assert torch.allclose(getattr(halves[0], name), getattr(whole, name))


def test_latents_without_noise_put_no_floor_under_the_loss():
    statistics = LatentStatistics(2)
    statistics.add(torch.randn(1, 2, 8, 8), torch.full((1, 2, 8, 8), -math.inf))
    report = statistics.report((8, 8))
    assert report["noise_share"] == [0, 0]
    assert max(report["loss_floor"].values()) < 1e-5


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tiny heads and an autoencoder of two steps."""
    place = tmp_path_factory.mktemp("evaluation")
    write_phantoms(place / "heads", 6, size=(16, 20, 16), spacing=(12.0, 11.0, 12.0))
    flags = (
        "--vae.channels 4,8 --vae.num_groups 2 --vae.num_res_blocks 1 --vae.latent_channels 3 --batch_size 2"
    )
    flags += " --run.steps 2 --data.val_fraction 0.5"
    where = [
        "--data.root",
        str(place / "heads"),
        "--run.dir",
        str(place / "vae"),
        "--data.cache_dir",
        str(place),
    ]
    train_vae.main(["phantom", *where, *flags.split()])
    return place


def test_the_report_of_a_run_has_each_case_and_the_mean(place, capsys):
    evaluation_main(["reconstruct", str(place / "vae"), "--resamples", "50", "--worst", "2"])
    folder = place / "vae" / "evaluation-001"
    report = json.loads((folder / "report.json").read_text())
    rows = {row["case"]: row for row in csv.DictReader((folder / "cases.csv").open())}
    split = json.loads((place / "vae" / "split.json").read_text())
    assert sorted(rows) == sorted(split["val"])
    for name in ("psnr", "ssim", "ms_ssim", "mae"):
        metric = report["metrics"][name]
        assert metric["mean"] == pytest.approx(np.mean([float(r[name]) for r in rows.values()]), rel=1e-6)
        assert metric["min"] <= metric["mean"] <= metric["max"]
        assert metric["low"] <= metric["mean"] <= metric["high"]
    assert report["cases"] == 3
    assert report["step"] == 2
    assert list(report["ms_ssim_weights"]) == ["2"]  # 16 voxels: 16 and 8, not 4
    assert report["latent"]["size"] == [4, 5, 4]
    assert len(report["latent"]["noise_share"]) == 3
    assert (folder / "worst.png").is_file()
    assert "loss floor" in capsys.readouterr().out
    evaluation_main(["reconstruct", str(place / "vae"), "--resamples", "5"])
    assert (place / "vae" / "evaluation-002").is_dir()  # nothing is overwritten


def test_errors_in_the_files_units_are_those_of_a_reconstruction_done_by_hand(place, tmp_path):
    images = place / "heads" / "images"
    flags = ["--data", str(images), "--out", str(tmp_path / "report"), "--resamples", "5"]
    evaluation_main(["reconstruct", str(place / "vae"), *flags])
    rows = {row["case"]: row for row in csv.DictReader((tmp_path / "report" / "cases.csv").open())}
    assert len(rows) == 6
    net, content = load_autoencoder(place / "vae")
    dataset = open_images(content, images)
    for i in (0, 5):
        row, x = rows[dataset.cases[i].id], dataset[i, i]["image"][None]
        recon = net(x)[0].detach()
        mse = (recon.double() - x.double()).square().mean().item()
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(4 / mse), rel=1e-4)
        real, made = read(dataset.cases[i].image).array, dataset.restore(i, recon[0]).array
        low, high = (
            float(v) for v in (dataset.restore(i, x[0]).array.min(), dataset.restore(i, x[0]).array.max())
        )
        assert float(row["mae"]) == pytest.approx(np.abs(made - np.clip(real, low, high)).mean(), rel=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_sharpness_is_that_of_the_reconstruction_over_that_of_the_original(dims):
    x = torch.rand(1, 1, *(6, 5, 4)[:dims], generator=torch.Generator().manual_seed(0))
    whole = SimpleNamespace(restore=lambda index, v: SimpleNamespace(array=10 * v.numpy()))
    scores = scores_of(0.5 * x, x, whole, 0)
    assert scores["sharpness"] == pytest.approx(0.5)
    assert scores["mae"] == pytest.approx(10 * 0.5 * x.abs().mean().item())
    assert scores["psnr"] == pytest.approx(10 * math.log10(4 / (0.5 * x).square().mean().item()))
    assert math.isnan(scores_of(x, torch.ones_like(x), whole, 0)["sharpness"])


def test_the_command_runs_as_a_module_and_mistakes_are_one_line(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluation", "reconstruct", "/nowhere"])
    monkeypatch.delitem(sys.modules, "ldm3d.evaluation.__main__")  # as in a new process
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ldm3d.evaluation", run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "/nowhere" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "which task"),
        (["reconstrct", "x"], "reconstruct"),
        (["reconstruct"], "which RUN"),
        (["reconstruct", "RUN", "--data", "/nowhere"], "/nowhere"),
        (["reconstruct", "RUN", "--part", "test"], "no test cases"),
        (["reconstruct", "RUN", "--resamples", "0"], "resamples"),
        (["reconstruct", "RUN", "--out", "HEADS"], "nothing is overwritten"),
    ],
)
def test_mistakes_are_named(place, capsys, flags, words):
    places = {"RUN": str(place / "vae"), "HEADS": str(place / "heads")}
    assert run_script(evaluation_main, [places.get(flag, flag) for flag in flags]) == 2
    assert words in capsys.readouterr().err
