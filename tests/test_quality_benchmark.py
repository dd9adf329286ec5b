"""tests/benchmarks/quality.py: all of it runs in seconds, what is finished is not done again, levers change
only their own stages, and the figures that are not the library's own are what their names say."""

import argparse
import json
import sys
import time

import pytest
import torch
from tiny import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import quality
from budgets import measured_in_cpu_seconds, once, words_of_length
from monai_tutorial import kl_loss
from pipeline_scores import high_frequency_gap
from samplers import ROWS, errors

import train_ldm
from ldm3d.config import InputError
from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig
from ldm3d.metrics import power_spectrum

LEVER = "drop=ldm: --unet.dropout 0.1; sample: --steps 4"


@pytest.mark.slow
@pytest.mark.parity
def test_the_whole_table_is_made_tiny_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "CALLS", (5,))
    flags = ["--tiny", "--work", str(tmp_path), "--lever", LEVER, "--samplers"]
    quality.main(flags)
    figures = json.loads((tmp_path / "figures.json").read_text())["tiny"]
    for row in ("ours", "monai", "drop"):
        for minutes in ("0.02", "0.04"):
            (seed,) = figures[f"{row}, {minutes} min"]
            assert seed["vae"]["steps"] > 0
            assert seed["ldm"]["steps"] > 0
            assert seed["samples"].keys() >= quality.SAMPLE_COLUMNS.keys()
            assert {**seed["recon"], **seed["reconstruction"]}.keys() >= quality.RECON_COLUMNS.keys()
    for minutes in ("0.02", "0.04"):
        ours, drop = (figures[f"{row}, {minutes} min"][0] for row in ("ours", "drop"))
        assert ours["vae"] == drop["vae"]
        assert ours["ldm"] != drop["ldm"]
    assert (tmp_path / "quality.png").exists()
    assert (tmp_path / "tiny.png").exists()

    def table_lines():
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    first = table_lines()
    for sampler in ("| heun | 3 | 5 |", "| ab2 | 5 | 5 |"):
        assert any(line.startswith(sampler) for line in first)

    def refuse(*_):
        raise AssertionError("done twice")

    for cls in (quality.Ours, quality.Monai):
        for name in ("train_vae", "train_ldm", "reconstruct", "sample"):
            monkeypatch.setattr(cls, name, refuse)
    monkeypatch.setattr(quality.Judge, "score", refuse)
    quality.main(flags)
    assert table_lines() == first
    with pytest.raises(InputError, match="choose another name"):
        quality.main([*flags[:3], "--lever", LEVER.replace("0.1", "0.2")])


def test_a_lever_has_the_stages_of_ours_before_the_first_one_that_it_changes():
    for text, stages in (
        ("a=vae: --kl_weight 1e-4", ("a", "a")),
        ("a=vae: --kl_weight 1e-4; ldm: --batch_size 4", ("a", "a")),
        ("a=ldm: --batch_size 4; sample: --steps 5", ("ours", "a")),
        ("a=sample: --steps 5 --sampler heun", ("ours", "ours")),
    ):
        row = quality.lever(text)
        assert (row.name, row.stage_one, row.stage_two) == ("a", *stages), text
    monai = quality.Row("monai")
    assert (monai.stage_one, monai.stage_two) == ("monai", "monai")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ours=vae: --kl_weight 1", "expected"),
        ("a=unet: --batch_size 4", "expected"),
        ("a=ldm: --batch_sise 4", "batch_sise"),
        ("a=sample: --steps many", "steps"),
    ],
)
def test_a_wrong_lever_is_refused_before_anything_is_trained(text, word):
    with pytest.raises(argparse.ArgumentTypeError, match=word):
        quality.lever(text)


def test_the_gap_of_noise_of_a_tenth_is_two_powers_of_ten():
    noise = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    real, weak = (torch.stack([power_spectrum(x, 8) for x in s * noise]) for s in (1.0, 0.1))
    assert high_frequency_gap(weak, real) == pytest.approx(-2, abs=1e-6)


def test_the_tutorial_s_kl_is_that_of_torch_summed_over_the_latent():
    mean, sigma = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0)).sum((1, 2, 3, 4))
    torch.testing.assert_close(kl_loss(mean, sigma), expected.mean())


def test_seconds_of_other_jobs_do_not_count_in_a_measurement():
    with measured_in_cpu_seconds():
        start = time.perf_counter()
        time.sleep(0.2)
        assert time.perf_counter() - start < 0.1


def test_a_piece_of_work_is_done_once(tmp_path):
    path = tmp_path / "folder" / "piece.json"
    assert [once(path, lambda v=v: {"value": v}) for v in (1, 2)] == [{"value": 1}] * 2


def test_a_preset_of_another_length_validates_at_its_end_and_warms_up_in_time():
    words = words_of_length(train_ldm, "hippocampus", 50, validations=4)
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given == {
        "--run.steps": "50",
        "--run.eval_every": "13",
        "--run.save_every": "50",
        "--optim.warmup_steps": "5",
    }


def test_every_sampler_and_grid_of_the_table_follows_the_path_and_ab3_has_a_higher_order():
    """The exact network of Gaussian data of standard deviation 0.3."""

    def predict(x_t, time):
        t = time.double().view(-1, 1, 1) / 1000
        x_start = (1 - t) * 0.09 / ((1 - t) ** 2 * 0.09 + t**2) * x_t
        return (x_t - (1 - t) * x_start) / t - x_start

    noise = torch.ones(1, 1, 1, dtype=torch.float64)
    found = errors(DiffusionKernel(KernelConfig()), predict, noise, calls=(40, 80), limit=1000)
    for name, (forty, eighty) in found.items():
        assert eighty < forty < 0.03, name
    assert found.keys() == ROWS.keys()
    assert found["ab3"][0] < 0.2 * found["ab2"][0] < 0.02 * found["euler"][0]
