"""Diffusion on pixels: the stem loses nothing, and all the rest is that of latent diffusion."""

import json

import pytest
import tiny
import torch

import ldm3d
import sample
import train_ldm
from ldm3d import read
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.pipeline import load_autoencoder
from ldm3d.vae import PixelStem


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stem", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_way_to_blocks_and_back_is_exact_for_any_size(dims, stem, channels):
    net = PixelStem(PixelStem.config_of(dims, channels, stem))
    size = (5, 8, 7)[:dims]
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    posterior = net.encode(x)
    assert (
        posterior.mean.shape
        == (2, *net.latent_shape(size))
        == (2, channels * stem**dims, *(-(-n // stem) for n in size))
    )
    assert torch.equal(net.decode(posterior.sample(torch.randn_like(posterior.mean)), size), x)
    assert not list(net.parameters())
    block = posterior.mean[0, : stem**dims].reshape(-1, *posterior.mean.shape[2:])[
        (slice(None), *(0,) * dims)
    ]
    corner = x[(0, 0, *(slice(stem) for _ in range(dims)))]
    assert torch.equal(block, corner.flatten())  # the voxels of the first block are its channels


def trained(folder, steps, *more):
    words = [*tiny.RUN, *tiny.LDM, *map(str, ["--run.dir", folder, "--run.steps", steps, *more])]
    train_ldm.main(["phantom", *words])


@pytest.mark.parametrize("stem", [1, 2])
def test_a_run_on_pixels_needs_no_autoencoder_and_samples_in_the_units_of_the_files(heads, tmp_path, stem):
    own = ["--pixel_stem", stem, "--data.root", heads, "--data.dims", 2, "--data.val_fraction", 0.2]
    own += [*tiny.CONDITIONS, *tiny.BOUND, "--data.cache_dir", tmp_path / "cache"]
    trained(tmp_path / "whole", 7, *own)
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["unet"]["in_channels"] == config["unet"]["out_channels"] == stem**2
    split = json.loads((tmp_path / "whole/split.json").read_text())
    assert {part: len(ids) for part, ids in split.items()} == {"train": 10, "val": 2, "test": 0}
    trained(tmp_path / "killed", 7, *own)
    step_files(tmp_path / "killed")[0].unlink()
    trained(tmp_path / "killed", 7, *own)  # goes on from step 5, with the copy of the stem
    tiny.assert_same_end(tmp_path / "whole", tmp_path / "killed")
    sample.main([str(tmp_path / "whole"), "--num", "1", "--steps", "2", "--with_labels"])
    sample.main([str(tmp_path / "whole"), "--cases", "val", "--steps", "2"])
    real, made = (
        read(p) for p in (heads / "images/phantom_0000.tif", tmp_path / "whole/samples-001/sample_0000.tif")
    )
    assert made.shape == real.shape
    assert made.spacing == pytest.approx(real.spacing)
    model = ldm3d.load(tmp_path / "whole").model
    x = torch.rand(1, 1, 16, 20) * 2 - 1
    assert torch.allclose(model.decode(model.encode(x)), x, atol=1e-5)


def test_with_an_autoencoders_run_the_data_and_the_split_are_its(vae_run, tmp_path):
    trained(tmp_path / "ldm", 2, "--pixel_stem", 2, "--vae", vae_run, "--latent_cache", "false")
    assert (tmp_path / "ldm/split.json").read_text() == (vae_run / "split.json").read_text()
    ours, theirs = (load(step_files(run)[0])["state"]["data"] for run in (tmp_path / "ldm", vae_run))
    assert (ours["low"], ours["size"]) == (theirs["low"], theirs["size"])
    autoencoder, content = load_autoencoder(tmp_path / "ldm/autoencoder.pt")
    assert isinstance(autoencoder, PixelStem)
    assert content["ema"] == {}


HEADS = "--pixel_stem 2 --data.dims 2 --data.root {heads}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pixel_stem 3", "pixel_stem: expected 1 | 2 | none, got '3'"),
        ("--pixel_stem 1 --data.root /nowhere", "no data folder /nowhere"),
        (f"{HEADS} --data.channel 0,1", "no channel (0, 1), the file has 1"),
        (f"{HEADS} --unet.in_channels 3", "unet.in_channels: follows from"),
    ],
)
def test_mistakes_are_one_line(heads, tmp_path, mistake, flags, words):
    place = ["--run.dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache")]
    assert words in mistake(train_ldm.main, ["phantom", *flags.format(heads=heads).split(), *place])
    assert not (tmp_path / "run").exists()
