"""What registers have learned is measured as a count by hand says, at the noise level and on the cases asked
for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm3d
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.register_analysis import AttentionFigures, bank_figures


def test_figures_of_attention_are_those_of_a_count_by_hand():
    K, M, size = 3, 2, (4, 5)
    draw, found = np.random.default_rng(0), AttentionFigures(K)
    layers = draw.random((2, 2, K, M, *size))  # of two cases
    masks = draw.integers(2, size=(2, *size))  # no case has label 2
    for case in range(2):
        found.add(list(torch.from_numpy(layers[case])), torch.from_numpy(masks[case]))
    figures = found.figures()
    for k in (0, 1):
        labels = layers.mean(1)[:, k].sum(1)  # (cases, *size), mean of both layers
        peaks = [np.unravel_index(a.argmax(), size) for a in labels]
        pointing = np.mean([mask[peak] == k for mask, peak in zip(masks, peaks, strict=True)])
        inside = np.mean([a[mask == k].mean() for a, mask in zip(labels, masks, strict=True)])
        assert figures["pointing"][k] == pytest.approx(pointing)
        assert figures["attention"][k] == pytest.approx(inside)
        one = [a[mask == k].mean() for a, mask in zip(layers[:, 1, k].sum(1), masks, strict=True)]
        assert figures["layers"]["layer 1"]["attention"][k] == pytest.approx(np.mean(one))
    assert np.isnan(figures["pointing"][2])
    used = layers.mean((0, 1, 4, 5))
    assert np.allclose(figures["usage"], used / used.sum(1, keepdims=True))
    assert figures["dead"] == []
    unused = AttentionFigures(1)
    unused.add([torch.tensor([[[1.0, 1.0]], [[0.0, 0.1]]])[None, :, 0]], torch.zeros(2, dtype=torch.int64))
    assert unused.figures()["dead"] == [[0, 1]]
    rare = AttentionFigures(1)  # a share of 0.06 / 1.06 is above a tenth of an even share
    rare.add([torch.tensor([[[1.0, 1.0]], [[0.0, 0.12]]])[None, :, 0]], torch.zeros(2, dtype=torch.int64))
    assert rare.figures()["dead"] == []


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
