"""A run folder of any kind opens by one door, with the weights of its best checkpoint, and files are read as
in training."""

import shutil

import numpy as np
import pytest
import torch

import ldm3d
from ldm3d import DiffusionKernel, InputError, KernelConfig, LatentDiffusion, read
from ldm3d.data import open_stored
from ldm3d.engine.checkpoint import load_run, save
from ldm3d.pipeline import check_weaker


@pytest.fixture
def runs(vae_run, conditional_run, cdal_run):
    """A run folder of every kind."""
    return {"vae": vae_run, "ldm": conditional_run, "cdal": cdal_run}


@pytest.mark.parametrize(("kind", "net"), [("vae", "net"), ("ldm", "model"), ("cdal", "net")])
def test_every_kind_of_run_opens_frozen_with_its_ema_weights(runs, kind, net):
    pipeline, stored = ldm3d.load(runs[kind]), load_run(runs[kind], kind)
    net = getattr(pipeline, net)
    trained = net.denoiser if kind == "ldm" else net
    assert all(torch.equal(value, stored["ema"][name]) for name, value in trained.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert pipeline.content["step"] == stored["step"]
    assert "ema" not in pipeline.content
    assert (pipeline.folder, pipeline.spec.size) == (runs[kind], (16, 20))


def test_a_checkpoint_opens_as_its_run_does_and_a_run_without_settings_too(runs, tmp_path):
    whole = ldm3d.load(runs["ldm"]).sample(1, steps=1)
    assert torch.equal(ldm3d.load(runs["ldm"] / "best.pt").sample(1, steps=1), whole)
    shutil.copytree(runs["ldm"], tmp_path / "ldm")
    (tmp_path / "ldm" / "config.json").unlink()
    assert torch.equal(ldm3d.load(tmp_path / "ldm").sample(1, steps=1), whole)
    inner = ldm3d.load(runs["ldm"] / "autoencoder.pt")  # the autoencoder of a latent diffusion run
    x = torch.randn(1, 16, 20)
    assert torch.equal(inner.reconstruct(x), ldm3d.load(runs["ldm"].parent / "vae").reconstruct(x))


def test_a_run_that_was_not_validated_yet_says_whose_weights_it_has(runs, tmp_path, capsys):
    ldm3d.load(runs["vae"])
    assert "note:" not in capsys.readouterr().out
    shutil.copytree(runs["vae"], tmp_path / "vae")
    (tmp_path / "vae" / "best.pt").unlink()
    step = ldm3d.load(tmp_path / "vae").content["step"]
    assert f"vae has no best.pt yet; its weights are those of step {step}" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "gan"}')
    with pytest.raises(InputError, match="is a 'gan' run, expected one of vae, ldm, cdal"):
        ldm3d.load(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such run folder or checkpoint"):
        ldm3d.load(tmp_path / "nowhere")


def test_an_image_file_is_scaled_as_in_training(runs, heads):
    data = open_stored(load_run(runs["vae"], "vae"))
    item = data.dataset("val", own_size=True)[0, 0]
    path = heads / "images" / f"{item['id']}.tif"
    autoencoder, segmenter = ldm3d.load(runs["vae"]), ldm3d.load(runs["cdal"])
    expected = autoencoder.net.decode(autoencoder.net.encode(item["image"][None]).mean, (16, 20))[0]
    assert torch.allclose(autoencoder.reconstruct(path), expected, atol=1e-6)
    p = segmenter.segment(path, votes=2, seed=3)
    assert p.shape == (segmenter.spec.num_labels, 16, 20)
    assert torch.allclose(p.sum(0), torch.ones(16, 20), atol=1e-5)
    assert torch.equal(p, segmenter.segment(item["image"], votes=2, seed=3))


def test_sources_and_masks_may_be_files_and_a_file_is_read_once(runs, heads, monkeypatch):
    pipeline, read_files = ldm3d.load(runs["ldm"]), []
    original = pipeline.open
    monkeypatch.setattr(pipeline, "open", lambda *a: read_files.append(a[0]) or original(*a))
    source, mask = (heads / role / "phantom_0003.tif" for role in ("sources", "labels"))
    files = {"image": [source, None, source], "labels": mask, "class": None}
    made = pipeline.sample(3, steps=1, conditions=files)
    assert read_files == [[source], [mask]]
    image = pipeline.read(source, "source")
    labels = torch.from_numpy(read(mask).array[0].astype(np.int64))
    assert torch.equal(pipeline.read(mask, "mask"), labels)
    conditions = {"image": [image, None, image], "labels": labels}
    assert torch.equal(pipeline.model.sample(3, steps=1, conditions=conditions), made)
    with pytest.raises(InputError, match=r"condition image: .*phantom_0003.tif is a file; use ldm3d.load"):
        pipeline.model.sample(1, steps=1, conditions={"image": source})


def test_a_sample_of_another_size_has_conditions_of_that_size(runs, heads):
    pipeline = ldm3d.load(runs["ldm"])
    source = heads / "sources" / "phantom_0003.tif"
    conditions = {"image": source, "class": 1}
    assert pipeline.sample(1, size=(13, 27), steps=1, conditions=conditions).shape == (1, 1, 13, 27)
    same = pipeline.sample(1, size=(16, 20), steps=1, conditions=conditions)
    assert torch.equal(same, pipeline.sample(1, steps=1, conditions=conditions))
    for size in ((13,), (0, 27)):
        with pytest.raises(InputError, match="size: expected 2 numbers of voxels"):
            pipeline.sample(1, size=size)
    with pytest.raises(InputError, match=r"condition image: expected shape \(1, 13, 27\), got \(1, 16, 20\)"):
        pipeline.sample(1, size=(13, 27), conditions={"image": pipeline.read(source, "source")})
    edit = ldm3d.ImageEdit(pipeline.model, torch.zeros(1, 16, 20))
    with pytest.raises(InputError, match="size: an edit has the training size"):
        pipeline.sample(1, size=(13, 27), edit=edit)


def test_a_latent_diffusion_model_is_one_module_with_its_statistics(runs):
    model = ldm3d.load(runs["ldm"]).model
    state = model.state_dict()
    assert {"latent_mean", "latent_std"} < state.keys()
    assert {name.split(".")[0] for name in state} == {"autoencoder", "denoiser", "latent_mean", "latent_std"}
    zeros = torch.zeros_like(model.latent_mean)
    fresh = LatentDiffusion(
        model.autoencoder.fresh_copy(),
        type(model.denoiser)(*model.denoiser.arguments),
        model.kernel,
        zeros,
        zeros,
        model.spec,
    )
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval().sample(1, steps=1), model.sample(1, steps=1))
    assert fresh.to(torch.float64).latent_mean.dtype == torch.float64


def test_autoguidance_is_the_same_from_python_in_windows_too(runs):
    pipeline = ldm3d.load(runs["ldm"])
    earlier = runs["ldm"] / "early.pt"
    auto = pipeline.autoguidance(3.0, interval=(0.0, 1.0))
    for size in (None, (32, 40)):
        (_, weaker), (_, plain), (x, guided) = (
            next(model.stream([0], 1, "euler", size=size, autoguidance=given))
            for model, given in (
                (ldm3d.load(earlier).model, None), (pipeline.model, None), (pipeline.model, auto)
            )
        )  # fmt: skip
        torch.testing.assert_close(guided, weaker + 3 * (plain - weaker), rtol=1e-4, atol=1e-5)
        same = pipeline.sample(1, size=size, steps=1, sampler="euler", autoguidance=auto)
        assert torch.equal(same, x)


def into_patches(content):
    """Make a run's checkpoint that of one which has seen patches of 2 x 2 alone, at their coordinates."""
    content["config"]["patch"] = {"size": [2, 2], "share": 0.0, "halvings": 0}
    weight = content["ema"]["unet.conv_in.weight"]
    content["ema"]["unet.conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight[:, :2])], 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["config"]["kernel"].update(process="vp", prediction="eps"), "has kernel.process vp"),
        (lambda c: c["config"]["kernel"].update(prediction="x_start"), "has kernel.prediction x_start"),
        (
            lambda c: c["state"]["latent_std"].mul_(1.2),
            "was trained on other data, latent_mean or latent_std",
        ),
        (lambda c: c["state"]["conditions"][0].update(values=["0", "2"]), "has other conditions"),
        (into_patches, "has seen latents of"),
    ],
)
def test_autoguidance_refuses_a_run_that_predicts_something_else(runs, tmp_path, change, words):
    other = tmp_path / "other"
    shutil.copytree(runs["ldm"], other)
    content = load_run(other)
    change(content)
    save(other / "best.pt", content)
    with pytest.raises(InputError, match=f"autoguidance: {other} {words}"):
        ldm3d.load(runs["ldm"]).autoguidance(2.0, other)


def test_autoguidance_refuses_a_run_that_ends_in_other_noise(runs):
    model, weaker = (ldm3d.load(path).model for path in (runs["ldm"], runs["ldm"] / "early.pt"))
    for one, zero in ((model, False), (weaker, True)):
        one.kernel = DiffusionKernel(KernelConfig(process="vp", prediction="v", zero_terminal_snr=zero))
    with pytest.raises(InputError, match=r"other has kernel\.zero_terminal_snr True, expected False"):
        check_weaker(model, weaker, "other")


def test_autoguidance_refuses_a_run_on_another_autoencoder(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["ldm"], other)
    content = load_run(other / "autoencoder.pt")
    content["ema"] = {name: value + 0.01 for name, value in content["ema"].items()}
    save(other / "autoencoder.pt", content)
    with pytest.raises(InputError, match="has another autoencoder; both runs need the same --vae"):
        ldm3d.load(runs["ldm"]).autoguidance(2.0, other)


def test_the_data_of_a_run_are_its_own_split_again(runs, capsys):
    pipeline = ldm3d.load(runs["ldm"])
    data, stored = pipeline.data(), load_run(runs["ldm"] / "autoencoder.pt", "vae")["state"]["split"]
    assert data.split == stored
    assert data.spec == pipeline.spec
    name = stored["val"][0]
    pipeline.content["state"]["contents"][name]["image"] = "other voxels"
    pipeline.data()
    assert f"the image of case {name} is another one than in training" in capsys.readouterr().out
