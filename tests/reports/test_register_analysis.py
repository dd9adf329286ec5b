"""What registers have learned is measured as a count by hand says, at the noise level and on the cases asked
for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm3d
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.register_analysis import bank_figures


def report_of(run: Path, folder: Path, *flags: str) -> dict:
    reports_main(["registers", str(run), "--steps", "2", "--shown", "1", "--out", str(folder), *flags])
    return json.loads((folder / "registers.json").read_text())


@pytest.fixture(scope="module")
def report(bound_run, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("registers") / "out"
    made = report_of(bound_run, folder)
    assert (folder / "registers.png").exists()
    return made


def test_norms_and_similarity_are_those_of_the_trained_bank(report, bound_run):
    bank = ldm3d.load(bound_run).model.denoiser.unet.registers.bank.detach()
    assert np.allclose(report["norms"], bank.norm(dim=2), rtol=1e-5)
    K, M = bank.shape[:2]
    cosine = {}
    for k in range(K):
        for j in range(K):
            for m in range(M):
                for n in range(M):
                    if (k, m) != (j, n):
                        value = torch.nn.functional.cosine_similarity(bank[k, m], bank[j, n], dim=0)
                        cosine.setdefault(k if k == j else "between", []).append(float(value))
    assert report["similarity_within"] == pytest.approx([np.mean(cosine[k]) for k in range(K)], abs=1e-4)
    assert report["similarity_between"] == pytest.approx(np.mean(cosine["between"]), abs=1e-4)
    assert np.isnan(bank_figures(torch.ones(1, 1, 3))["similarity_between"])


def test_the_difference_is_that_of_samples_from_the_same_noise(report, bound_run):
    model = ldm3d.load(bound_run).model
    samples = []
    for on in (True, False):
        model.use_registers(on)
        samples.append(model.sample(1, steps=2, seed=0))
    assert report["difference"] == pytest.approx(float((samples[0] - samples[1]).square().mean().sqrt()))
    assert report["difference"] > 0


def test_noise_level_cases_and_seed_are_those_asked_for(report, bound_run, tmp_path):
    assert len(report["gates"]) == len(report["layers"])
    changes = {"level": "0.9", "part": "train", "max_cases": "1", "seed": "1"}
    for name, value in changes.items():
        other = report_of(bound_run, tmp_path / name, f"--{name}", value)
        assert other["usage"] != report["usage"], name
        assert np.allclose(np.sum(other["usage"], 1), 1)
