"""Latents are encoded once, normalised by the statistics of the set, and sampling undoes exactly what
encoding did."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import ldm3d
import train_ldm
from ldm3d import (
    AutoencoderKL,
    Denoiser,
    DiffusionKernel,
    KernelConfig,
    LatentDiffusion,
    UNetConfig,
    VAEConfig,
    latents,
)
from ldm3d.data import AugmentConfig, DataConfig, open_data
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine import distributed
from ldm3d.latents import LatentDataset, cache_key, cache_latents, latent_statistics

CPU = torch.device("cpu")


def make_vae(seed=0):
    torch.manual_seed(seed)
    config = VAEConfig(channels=(4, 8), num_groups=2, num_res_blocks=(1,), latent_channels=3)
    return AutoencoderKL(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("latents")
    write_phantoms(place / "heads", 5, size=(8, 12, 8), spacing=(24.0, 20.0, 24.0))
    config = DataConfig(root=str(place / "heads"), cache_dir=str(place), val_fraction=0.2)
    return open_data(config, "phantom", 0, multiple=(2, 2, 2))


@pytest.fixture
def model(data):
    torch.manual_seed(1)
    config = {"channels": (4, 8), "num_groups": 2, "num_res_blocks": (1,), "attention_levels": (False, True)}
    unet = UNetConfig(in_channels=3, out_channels=3, head_channels=4, **config)
    denoiser = Denoiser(unet).eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.05)
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 1.0])
    return LatentDiffusion(make_vae(), denoiser, DiffusionKernel(KernelConfig()), mean, std, data.spec)


def test_the_cache_holds_what_the_encoder_says_and_is_made_once(data, tmp_path):
    vae, dataset = make_vae(), data.dataset("train")
    tables = cache_latents(vae, dataset, tmp_path / "a", 1, CPU)
    posterior = vae.encode(dataset[2, 2]["image"][None])
    assert tables.keys() == {"mean", "logvar"}
    for name, table in tables.items():
        got = torch.from_numpy(table[2, 0].copy())
        assert torch.allclose(got, getattr(posterior, name)[0], atol=1e-6)
    again = cache_latents(
        make_vae(seed=5), dataset, tmp_path / "a", 1, CPU
    )  # would differ if it were made anew
    assert all(np.array_equal(again[name][i], tables[name][i]) for name in tables for i in range(4))
    assert not list((tmp_path / "a").glob("*.partial"))


def open_inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_an_interrupted_encoding_goes_on_where_it_was(data, tmp_path, monkeypatch):
    vae, dataset, seen = make_vae(), data.dataset("train"), []
    whole = cache_latents(vae, dataset, tmp_path / "whole", 2, CPU)
    original = latents.encode_batch

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 6:  # the first is for the shapes, then two variants a case
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(latents, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(vae, dataset, tmp_path / "a", 2, CPU)
    kept = {name: inode for name, inode in open_inodes(tmp_path / "a").items() if name.endswith(".npy")}
    assert len(kept) == 4  # mean and logvar of two cases
    seen.clear()
    seen += 100 * [1]
    again = cache_latents(vae, dataset, tmp_path / "a", 2, CPU)
    assert len(seen) - 100 == 1 + 2 * (len(dataset) - 2)
    assert kept.items() <= open_inodes(tmp_path / "a").items()
    assert all(np.array_equal(again[name][i], whole[name][i]) for name in whole for i in range(len(dataset)))


@pytest.mark.parametrize("damage", ["cut off", "empty", "noise"])
def test_damaged_latents_are_encoded_again_and_the_others_stay(data, tmp_path, damage, capsys):
    vae, dataset = make_vae(), data.dataset("train")
    whole = cache_latents(vae, dataset, tmp_path / "a", 1, CPU)
    values = {name: np.stack([table[i] for i in range(len(dataset))]) for name, table in whole.items()}
    path, before = tmp_path / "a" / "mean-000001.npy", open_inodes(tmp_path / "a")
    content = {"cut off": path.read_bytes()[:-9], "empty": b"", "noise": 500 * b"\x93NUMPY"}[damage]
    path.unlink()
    path.write_bytes(content)
    again = cache_latents(vae, dataset, tmp_path / "a", 1, CPU)
    assert "mean-000001.npy: damaged; its cases are encoded again" in capsys.readouterr().out
    assert all(np.array_equal(again[k][i], values[k][i]) for k in values for i in range(len(dataset)))
    after = open_inodes(tmp_path / "a")
    assert {n for n in after if after[n] != before[n]} == {"mean-000001.npy", "logvar-000001.npy"}


def test_files_hold_several_cases_where_there_are_many(data, tmp_path, monkeypatch):
    vae, dataset = make_vae(), data.dataset("train")
    monkeypatch.setattr(latents, "NUM_FILES", 2)
    tables = cache_latents(vae, dataset, tmp_path / "a", 1, CPU)
    assert len(list((tmp_path / "a").iterdir())) == 4  # two of each name, for four cases
    one_each = tables["mean"]
    assert (len(one_each), one_each.shape) == (len(dataset), (len(dataset), 1, *one_each[0, 0].shape))
    for i in range(len(dataset)):
        posterior = vae.encode(dataset[i, i]["image"][None])
        assert torch.allclose(torch.from_numpy(one_each[i, 0].copy()), posterior.mean[0], atol=1e-6)


def write_as_rank(folder, place, original):
    config = DataConfig(root=str(place / "heads"), cache_dir=str(place), val_fraction=0.2)
    dataset, written = open_data(config, "phantom", 0, multiple=(2, 2, 2)).dataset("train"), []
    reserve = latents.reserve
    latents.reserve = lambda path, *more: (written.append(path.name), reserve(path, *more))
    tables = cache_latents(make_vae(), dataset, folder, 1, CPU)
    everyone = distributed.gather(sorted(written))
    assert not set(everyone[0]) & set(everyone[1])
    assert everyone[0]
    assert everyone[1]
    for i in range(len(dataset)):
        assert np.array_equal(tables["mean"][i], original[i])


def test_every_file_is_written_by_one_rank_alone(data, tmp_path):
    place = Path(data.config.root).parent
    table = cache_latents(make_vae(), data.dataset("train"), tmp_path / "one", 1, CPU)["mean"]
    original = np.stack([table[i] for i in range(len(table))])
    assert tiny.on_two_ranks(write_as_rank, tmp_path / "two", place, original) == [0, 0]


def test_cached_masks_move_with_their_images(data, tmp_path):
    config = dataclasses.replace(data.config, augment=AugmentConfig(flip_axes=(0, 1)), num_variants=6)
    flipping = dataclasses.replace(data, config=config).dataset("train", augment=True)
    vae, still, found = make_vae(), data.dataset("train"), set()
    tables = cache_latents(vae, flipping, tmp_path, 6, CPU, masks=True)
    for i, v in np.ndindex(len(still), 6):
        item, mask = still[i, i], torch.from_numpy(tables["mask"][i, v].astype(np.int64))
        [axes] = [a for a in [(), (0,), (1,), (0, 1)] if torch.equal(item["mask"].flip(a), mask)]
        mean = vae.encode(item["image"].flip([1 + a for a in axes])[None]).mean[0]
        assert torch.allclose(mean, torch.from_numpy(tables["mean"][i, v].copy()), atol=1e-5)
        found.add(axes)
    assert len(found) == 4


def test_the_key_changes_with_weights_settings_and_files(data):
    def key(seed=0, part="train", how=(None, 0), **settings):
        config = DataConfig(root=data.config.root, **settings)
        contents = {name: data.contents[name] for name in data.split[part]}
        return cache_key(make_vae(seed), config, data.spec, contents, *how)

    assert key() == key() == key(cache="disk", cache_gb=1.0, cache_dir="elsewhere")
    assert len({key(), key(how=(torch.bfloat16, 0)), key(how=(None, 1))}) == 3  # precision, augmentation
    scalings = [key(percentiles=(1.0, 99.0)), key(window=(0.0, 80.0))]  # two scalings, two sets of latents
    assert len({key(), key(seed=1), key(num_variants=2), key(part="val"), *scalings}) == 6


def test_variants_are_chosen_by_the_position_alone(tmp_path):
    tables = {
        name: np.random.default_rng(0).normal(size=(2, 4, 1, 2, 2, 2)).astype(np.float32)
        for name in ("mean", "logvar", "source")
    }
    dataset = LatentDataset(tables, 7)
    item = dataset[11, 1]
    assert torch.equal(item["mean"], dataset[11, 1]["mean"])
    found = [v for v in range(4) if np.array_equal(item["mean"].numpy(), tables["mean"][1, v])]
    assert len(found) == 1
    assert np.array_equal(item["source"].numpy(), tables["source"][1, found[0]])  # the same variant of all
    assert len({float(dataset[p, 1]["mean"].sum()) for p in range(40)}) == 4


def test_the_statistics_are_those_of_drawn_latents_per_channel():
    draw = np.random.default_rng(0)
    mean = draw.normal([[[[1.0]], [[-3.0]]]], [[[[2.0]], [[0.5]]]], size=(6, 2, 40, 50))
    logvar = draw.normal(-1.0, 0.5, size=mean.shape)
    z = mean + np.exp(0.5 * logvar) * draw.normal(size=(50, *mean.shape))
    tables = {"mean": mean[:, None].astype(np.float32), "logvar": logvar[:, None].astype(np.float32)}
    got_mean, got_std = latent_statistics(tables)
    assert np.allclose(got_mean, z.mean((0, 1, 3, 4)), atol=0.01)
    assert np.allclose(got_std, z.std((0, 1, 3, 4)), rtol=0.01)


def test_decode_undoes_the_normalisation_of_encode(model, data):
    x = data.dataset("val")[0, 0]["image"][None]
    z = model.autoencoder.encode(x).mean
    assert torch.allclose(model.encode(x)[0, 1], (z[0, 1] + 2.0) / 0.5, atol=1e-5)
    assert torch.allclose(
        model.decode(model.encode(x)), model.autoencoder.decode(z, data.spec.size), atol=1e-4
    )


def test_the_loss_is_that_of_the_formula(model):
    torch.manual_seed(2)
    mean, z_noise, noise = torch.randn(3, 2, *model.latent_shape)
    logvar = torch.full_like(mean, -2.0)
    u = torch.tensor([0.3, 0.8])
    z = (mean + np.exp(-1.0) * z_noise - model.latent_mean) / model.latent_std
    t = u.view(-1, 1, 1, 1, 1)
    pred = model.denoiser((1 - t) * z + t * noise, u * 1000)
    expected = (pred - (noise - z)).square().flatten(1).mean(1)
    got, _ = model.losses(model.denoiser, mean, logvar, z_noise, u, noise)
    assert torch.allclose(got, expected, rtol=1e-5)


def test_samples_are_numbered_and_independent_of_the_batch(model):
    all_four = model.sample(4, steps=3, seed=5, batch_size=4)
    assert all_four.shape == (4, 1, *model.spec.size)
    assert torch.allclose(model.sample(2, steps=3, seed=5, batch_size=1, first=2), all_four[2:], atol=1e-4)
    stochastic = LatentDiffusion(
        model.autoencoder,
        model.denoiser,
        DiffusionKernel(KernelConfig(process="vp", prediction="eps")),
        model.latent_mean.flatten(),
        model.latent_std.flatten(),
        model.spec,
    )
    one = stochastic.sample(3, steps=4, sampler="ddpm", batch_size=3)
    assert torch.allclose(stochastic.sample(1, steps=4, sampler="ddpm", first=2), one[2:], atol=1e-3)


def test_a_sampler_of_the_other_process_is_refused_before_any_work(model):
    with pytest.raises(ValueError, match="heun"):
        model.sample(1, sampler="ddim")


def test_the_preview_shows_noised_latents_and_what_a_true_denoiser_estimates_from_them(vae_run, tmp_path):
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "ldm", 1))
    model = ldm3d.load(tmp_path / "ldm").model
    mean = model.autoencoder.encode(torch.randn(1, 1, *model.spec.size)).mean
    z = model.normalise(mean)

    class Truth(torch.nn.Module):
        """Knows z: flow's velocity at x_t = (1 - t) z + t noise is (x_t - z) / t."""

        def forward(self, x_t, t, conditions):
            return (x_t - z) / (t / 1000).view(-1, *(1,) * (z.ndim - 1))

    model.denoiser = Truth()
    config = train_ldm.Config()
    noised, estimated = train_ldm.denoise_once(model, mean, {}, config)
    assert torch.allclose(estimated, z.expand_as(estimated), atol=1e-4)
    errors = (noised - z).square().flatten(1).mean(1)
    assert errors[0] < errors[1] < errors[2]
