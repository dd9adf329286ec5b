"""Grain has the spectrum and the strength of the residuals that it was measured on, whole or in slabs."""

import math

import numpy as np
import pytest
import tiny
import torch

import sample
import train_ldm
from ldm3d import load, read
from ldm3d.config import InputError
from ldm3d.inference import grain, sampling
from ldm3d.inference.grain import Grain, grain_of_residuals
from ldm3d.vae import AutoencoderKL, VAEConfig


def residuals(num: int, size: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (image, reconstruction) of two channels. The reconstructions go evenly from -1 to 1 along the
    last axis. The residuals of channel 0 are white noise, 0 at -1 and stronger from there on, those of
    channel 1 are sums of two neighbours along the first axis."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for _ in range(num):
        recon = torch.linspace(-1, 1, size[-1]).expand(2, *size)
        white = torch.randn(2, *size, generator=generator)
        strong = 0.1 * (recon[0] + 1) * white[0]
        alike = 0.2 * (white[1] + white[1].roll(1, 0)) / math.sqrt(2)
        pairs.append((recon + torch.stack([strong, alike]), recon))
    return pairs


@pytest.mark.parametrize("size", [(40, 48), (24, 20, 31)])
def test_grain_is_as_strong_as_residuals_are_at_each_intensity_and_as_alike_in_neighbours(size):
    found = Grain(**grain_of_residuals(residuals(8, size)))
    recon = residuals(1, size)[0][1]
    drawn = torch.stack([found.add(recon, size, 0, i) - recon for i in range(12)])
    expected = (0.1 * (recon[0] + 1)).square().mean(tuple(range(len(size) - 1))).sqrt()
    assert (drawn[:, 0].square().mean(tuple(range(len(size)))).sqrt() - expected).abs().max() < 0.03
    assert drawn[:, 1].std() == pytest.approx(0.2, rel=0.05)
    pairs = drawn[:, :, 1:] * drawn[:, :, :-1]  # neighbours along the first axis
    shares = pairs.mean((0, *range(2, drawn.ndim))) / drawn.square().mean((0, *range(2, drawn.ndim)))
    assert shares.tolist() == pytest.approx([0, 0.5], abs=0.08)
    assert found.std[:, 0].tolist() == pytest.approx([0, 0.2], abs=0.02)


def test_a_volume_has_the_same_grain_in_one_piece_and_in_slabs():
    found, size = Grain(**grain_of_residuals(residuals(3, (24, 20, 18)))), (30, 9, 22)
    whole = found.noise(size, 3, 5, 0, 30)
    slabs = [found.noise(size, 3, 5, start, stop) for start, stop in ((0, 11), (11, 12), (12, 30))]
    torch.testing.assert_close(torch.cat(slabs, 1), whole, rtol=1e-4, atol=1e-5)
    assert whole.std() == pytest.approx(1, rel=0.05)
    assert not torch.allclose(found.noise(size, 3, 6, 0, 30), whole)


def test_an_intensity_that_no_voxel_has_gets_the_grain_between_those_of_its_neighbours():
    size = (16, 16)
    recon = torch.full((1, *size), -1.0)
    recon[:, 8:] = 1
    white = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    found = Grain(**grain_of_residuals([(recon + 0.1 * (recon + 1) * white, recon)]))
    ends = found.deviation(torch.tensor([[-1.0, 0.0, 1.0]]))[0]
    assert ends[1] == pytest.approx(((ends[0] + ends[2]) / 2).item())
    assert grain_of_residuals([(recon, recon)]) is None
    assert grain_of_residuals([]) is None


def test_of_a_large_case_the_middle_is_decoded_and_the_planes_at_its_cuts_are_left_out():
    config = VAEConfig(dims=2, channels=(4, 8), num_res_blocks=(1,), num_groups=2)
    seen, net = [], AutoencoderKL(config).eval()
    net.decode = lambda z, size: (
        seen.append(tuple(z.shape)) or torch.nn.functional.interpolate(z[:, :1], size)
    )
    image = torch.full((1, 300, 40), 100.0)  # far from what is decoded, but in the middle
    image[:, 110:190] = 1 + 0.3 * torch.randn(80, 40, generator=torch.Generator().manual_seed(0))
    cases = {(0, 0): {"image": image, "mean": torch.ones(config.latent_channels, 150, 20)}}  # one case
    found = grain.measure_grain(net, cases, cases, "fp32", torch.device("cpu"))
    assert seen == [(1, config.latent_channels, 48, 20)]
    assert found["std"].max() == pytest.approx(0.3, abs=0.02)


def test_the_first_rank_alone_measures_grain(vae_run, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(train_ldm, "measure_grain", lambda *args: measured.append(args))
    monkeypatch.setattr(train_ldm, "is_main", lambda: False)
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 1))
    assert not measured


def test_samples_get_the_grain_that_the_run_has_measured_on_validation_cases(
    vae_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sampling, "save_sheet", lambda *args: None)
    run = tmp_path / "run"
    train_ldm.main(tiny.ldm_flags(vae_run, run, 2))
    pipeline = load(run)
    found, spec = Grain.of(pipeline), pipeline.spec
    cases, model = pipeline.data().dataset("val"), pipeline.model
    images = [cases[i, i]["image"] for i in range(min(grain.CASES, len(cases)))]
    pairs = [(x, model.decode(model.encode(x[None]))[0]) for x in images]
    expected = Grain(**grain_of_residuals(pairs))
    torch.testing.assert_close(found.std, expected.std, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.filter, expected.filter, rtol=1e-3, atol=1e-4)

    flags = ["--num", "2", "--steps", "2", "--format", "nii", "--amp", "fp32", "--device", "cpu"]
    for name, more in (("plain", []), ("grain", ["--grain"])):
        sample.main([str(run), "--out", str(tmp_path / name), *flags, *more])
    low, high = 50 * found.std.min(), 50 * found.std.max()  # of a range of 2
    line = f"grain: a standard deviation of {low:.2g} to {high:.2g} % of the range, by intensity\n"
    assert capsys.readouterr().out.count(line) == 1  # not without the flag
    plain, grainy = (read(tmp_path / name / "sample_0001.nii").array[..., 0] for name in ("plain", "grain"))
    x = pipeline.sample(2, steps=2, batch_size=8)[1]
    assert np.array_equal(plain, spec.to_volume(x).array)
    assert not np.allclose(plain, grainy)
    with_grain = spec.to_volume(found.add(x, spec.size, 0, 1)).array
    np.testing.assert_allclose(grainy, with_grain, rtol=1e-4, atol=1e-2)
    monkeypatch.setattr(sampling, "IN_MEMORY", 0)
    sample.main([str(run), "--out", str(tmp_path / "planes"), *flags, "--grain"])
    in_planes = read(tmp_path / "planes" / "sample_0001.nii").array[..., 0]
    np.testing.assert_allclose(in_planes, with_grain, rtol=1e-4, atol=1e-2)

    pipeline.content["state"]["grain"] = None
    with pytest.raises(
        InputError, match=r"grain: the autoencoder of .* leaves nothing out; sample without it"
    ):
        Grain.of(pipeline)
    del pipeline.content["state"]["grain"]
    with pytest.raises(
        InputError, match=r"grain: .* has measured none.*; sample without it, or train on in a new run"
    ):
        Grain.of(pipeline)
