"""What is imported is an ordinary run: it reconstructs, samples, and training goes on from it."""

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from closeness import close

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d import (
    VQVAE,
    AutoencoderKL,
    Condition,
    ConditionConfig,
    Denoiser,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    QuantizerConfig,
    UNetConfig,
    VAEConfig,
)
from ldm3d.config import from_dict, to_dict
from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig
from ldm3d.engine.checkpoint import load_latest
from ldm3d.interop import load
from ldm3d.interop.__main__ import main
from ldm3d.interop.bundles import described_kernel
from ldm3d.interop.importing import ASSUMED_KERNEL, ImportConfig, import_file
from ldm3d.interop.layouts import extract

CONFIG = VAEConfig(
    2,
    channels=(8, 16),
    num_res_blocks=(1, 1),
    attention_levels=(False, False),
    latent_channels=3,
    num_groups=4,
    image_range=(0, 1),
)
UNET = UNetConfig(2, 3, 3, (8, 16), (1,), (False, True), head_channels=8, num_groups=4)


def vae_file(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(extract(AutoencoderKL(CONFIG), "monai"), folder / "vae.pt")
    return folder / "vae.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the runs "vae" and "ldm" (three classes), both imported."""
    place = tmp_path_factory.mktemp("imported")
    flags = ["--num_groups", "4", "--size", "16,20"]
    main(["import", str(vae_file(place)), "--to", str(place / "vae"), *flags])
    classes = [Condition("class", "class", ("0", "1", "2"))]
    state = extract(Denoiser(UNET, ConditionConfig(use=("class",)), classes), "monai")
    state["class_embedding.weight"] = state["class_embedding.weight"][:-1]
    torch.save({"unet_state_dict": state, "scale_factor": torch.tensor(0.5)}, place / "unet.pt")
    unet = ["import", place / "unet.pt", "--vae", place / "vae", "--to", place / "ldm", "--num_groups", 4]
    main([*map(str, unet), "--head_channels", "8", "--kernel.beta_end", "0.0205"])
    return place


def test_a_run_has_the_network_that_load_gives(runs):
    pipeline = ldm3d.load(runs / "vae")
    net = load(runs / "vae.pt", num_groups=4)
    assert pipeline.net.config == net.config == CONFIG
    for name, value in net.state_dict().items():
        assert torch.equal(value, pipeline.net.state_dict()[name])


def test_the_network_sees_the_intensities_that_it_was_trained_on(runs):
    net, plain = load(runs / "vae.pt", num_groups=4), load(runs / "vae.pt", num_groups=4, image_range=(-1, 1))
    x = torch.rand(1, 1, 16, 16)
    close(net.encode(2 * x - 1).mean, plain.encode(x).mean)
    z = torch.randn(1, 3, 8, 8)
    close(net.decode(z), 2 * plain.decode(z) - 1)


def test_an_imported_autoencoder_reconstructs_files(runs, heads):
    sample.main([str(runs / "vae"), str(heads / "images"), "--out", str(runs / "recon")])
    assert len(list((runs / "recon").glob("*.tif"))) == 12


def test_an_imported_u_net_samples_its_classes_with_its_scale_factor(runs):
    sample.main(
        [
            str(runs / "ldm"),
            "--num",
            "1",
            "--steps",
            "2",
            "--condition",
            "class=2",
            "--out",
            str(runs / "new"),
        ]
    )
    assert (runs / "new" / "samples.json").exists()
    model = ldm3d.load(runs / "ldm").model
    assert model.latent_std.flatten().tolist() == [2.0] * 3
    assert (model.kernel.config.process, model.kernel.config.beta_end) == ("vp", 0.0205)


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """A folder with the weights and the run of a VQVAE."""
    place = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    config = VAEConfig(2, 1, 3, (8, 16), (1, 1), trunk="plain", quant_conv=False, image_range=(0, 1))
    torch.save(extract(VQVAE(config, QuantizerConfig(8)), "monai_vq"), place / "vq.pt")
    network = {"_target_": "monai.networks.nets.VQVAE", "num_embeddings": 8, "channels": [8, 16]}
    network |= {"num_res_layers": 1, "num_res_channels": [8, 16], "decay": 0.5, "output_act": None}
    (place / "bundle.json").write_text(json.dumps({"vqvae": network}))
    flags = [place / "vq.pt", "--config", place / "bundle.json", "--to", place / "vq", "--size", "16,20"]
    main(["import", *map(str, flags)])
    return place


def test_an_imported_vqvae_reconstructs_files_and_its_codes_are_kept_when_training_goes_on(codes, heads):
    sample.main([str(codes / "vq"), str(heads / "images"), "--out", str(codes / "recon")])
    assert len(list((codes / "recon").glob("*.tif"))) == 12
    before = ldm3d.load(codes / "vq").net
    assert (before.quantizer.config.decay, before.quantizer.config.codebook_size) == (0.5, 8)
    data = f"--data.root {heads} --data.cache_dir {codes / 'cache'} --run.steps 1 --optim.warmup_steps 0"
    more = (
        "--data.dims 2 --data.val_fraction 0.2 --data.patch none --quantizer.revive_below 0 --optim.lr 1e-9"
    )
    start = f"--run.ema_decay 0 --run.init {codes / 'vq'} --run.dir {codes / 'vq2'}"
    train_vae.main(["phantom", *f"{data} {more} {start}".split()])
    after = ldm3d.load(codes / "vq2").net.quantizer
    assert after.initialised
    near = torch.cdist(after.codebook, before.quantizer.codebook).argmin(1)
    assert (near == torch.arange(8)).sum() >= 6  # k-means of the first batch would have moved all


@pytest.mark.parity
def test_monai_runs_the_bundle_of_a_vqvae_to_the_same_reconstructions(codes):
    ConfigParser = pytest.importorskip("monai.bundle").ConfigParser
    main(["export", str(codes / "vq"), "--as", "monai", "--to", str(codes / "bundle")])
    image = np.random.default_rng(0).random((16, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), codes / "bundle" / "images" / "one.nii.gz")
    parser = ConfigParser()
    parser.read_config(codes / "bundle" / "configs" / "inference.json")
    parser.update({"bundle_root": str(codes / "bundle")})
    parser.get_parsed_content("run")
    (found,) = (codes / "bundle" / "results").glob("*.nii.gz")
    net = ldm3d.load(codes / "vq").net
    inside = parser.get_parsed_content("preprocessing")(str(codes / "bundle" / "images" / "one.nii.gz"))
    with torch.no_grad():
        recon = (net(torch.as_tensor(inside)[None] * 2 - 1)[0] + 1) / 2
    close(torch.from_numpy(nibabel.load(found).get_fdata(dtype=np.float32)), recon[0, 0], 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"output_act": "TANH"}, "output_act TANH is not supported"),
        ({"downsample_parameters": [[2, 4, 1, 1], [1, 3, 1, 1]]}, "downsample_parameters"),
        ({"num_embeddings": 9}, "codebook_size is 9 there, but 8 in the weights"),
        ({"num_res_channels": 4}, "res_channels is (4, 4) there, but (8, 16) in the weights"),
    ],
)
def test_a_description_of_another_vqvae_is_one_line(change, says, codes, tmp_path, mistake):
    network = {"_target_": "VQVAE", **change}
    (tmp_path / "bundle.json").write_text(json.dumps(network))
    flags = ["--config", tmp_path / "bundle.json", "--to", tmp_path / "run"]
    assert says in mistake(main, ["import", codes / "vq.pt", *flags])
    assert "num_groups: has no effect" in mistake(
        main, ["import", codes / "vq.pt", "--num_groups", 2, "--to", tmp_path / "run"]
    )


def test_an_imported_maisi_u_net_samples_with_its_numbers(runs, tmp_path):
    numbers = [
        Condition("number", "top_region_index", mean=(0.0,) * 4, std=(0.01,) * 4),
        Condition("number", "spacing", mean=(0.0,) * 3, std=(0.01,) * 3),
    ]
    use = ("number:top_region_index", "number:spacing")
    net = Denoiser(UNET, ConditionConfig(use=use, concat=("top_region_index", "spacing")), numbers)
    for parameter in net.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"unet_state_dict": extract(net, "monai")}, tmp_path / "unet.pt")
    flow = [
        "--kernel.process",
        "flow",
        "--kernel.prediction",
        "velocity",
        "--head_channels",
        8,
        "--num_groups",
        4,
    ]
    flags = [tmp_path / "unet.pt", "--vae", runs / "vae", "--to", tmp_path / "ldm", *flow]
    main(["import", *map(str, flags)])
    pipeline = ldm3d.load(tmp_path / "ldm")
    conditions = {"top_region_index": (0, 1, 0, 0), "spacing": (1.0, 1.0, 2.0)}
    one = pipeline.sample(1, steps=2, conditions=conditions)
    other = pipeline.sample(1, steps=2, conditions=conditions | {"spacing": (1.0, 1.0, 4.0)})
    assert not torch.equal(one, other)
    ours, theirs = pipeline.model.denoiser.unet.conv_out, net.unet.conv_out
    assert torch.equal(ours.weight, -theirs.weight)  # MAISI's velocity is x_start - noise


def test_training_goes_on_from_an_imported_autoencoder_with_its_own_network(runs, heads, monkeypatch, capsys):
    """Neither the preset's nor a planned network is taken: shapes would not tell the difference of some."""
    monkeypatch.chdir(runs)
    one = "--run.steps 1 --optim.warmup_steps 0 --optim.lr 1e-9 --run.ema_decay 0 --run.init vae".split()
    data = f"--data.root {heads} --data.cache_dir cache --data.val_fraction 0.2 --data.patch none".split()
    train_vae.main(["phantom", *data, "--data.dims", "2", "--run.dir", "vae2", *one])
    assert "run.init: as in vae: vae.latent_channels 3, vae.channels 8,16" in capsys.readouterr().out
    train_vae.main([str(heads), "--run.dir", "vae3", *one])
    before = ldm3d.load("vae").net
    for name in ("vae2", "vae3"):
        after = ldm3d.load(name).net
        assert after.config == CONFIG
        for key, value in before.state_dict().items():
            assert torch.allclose(after.state_dict()[key], value, atol=1e-6)


def test_training_goes_on_from_an_imported_u_net_with_its_own_network_and_diffusion(runs, heads):
    torch.save(extract(Denoiser(UNET), "monai"), runs / "plain.pt")
    unet = ["import", runs / "plain.pt", "--vae", runs / "vae", "--to", runs / "ldm3", "--head_channels", 8]
    main([*map(str, unet), "--num_groups", "4", "--kernel.beta_end", "0.0205"])
    data = ["--data.root", heads, "--data.cache_dir", runs / "cache", "--run.steps", 1, "--sample_steps", 2]
    start = ["--vae", runs / "vae", "--run.init", runs / "ldm3", "--run.dir", runs / "ldm4"]
    train_ldm.main(["phantom", *map(str, [*data, *start, "--kernel.loss", "l1"])])
    model = ldm3d.load(runs / "ldm4").model
    assert model.denoiser.unet.config == dataclasses.replace(UNET, num_res_blocks=(1, 1))
    kernel = model.kernel.config
    assert (kernel.process, kernel.prediction, kernel.beta_end, kernel.loss) == ("vp", "eps", 0.0205, "l1")


def test_a_discriminator_of_monai_goes_on_beside_the_autoencoder_that_it_was_trained_with(
    runs, heads, tmp_path, monkeypatch, capsys, mistake
):
    """It has the settings and weights of the file, and sees intensities from 0 to 1, as that one does."""
    monkeypatch.chdir(tmp_path)
    theirs = PatchDiscriminator(PatchDiscriminatorConfig(2, channels=4, num_layers=1, last_kernel=1))
    torch.save(extract(theirs, "monai"), "discriminator.pt")
    flags = ["--run.init", runs / "vae", "--run.dir", "run", "--run.save_every", 1, "--disc_weight", 0.1]
    flags += ["--disc_optim.lr", 1e-12, "--disc_start", 0, "--disc_init", "discriminator.pt"]
    flags += ["--data.root", heads, "--data.cache_dir", "cache", "--data.dims", 2, "--data.patch", "none"]
    train = [*map(str, ["phantom", *flags, "--batch_size", 4, "--run.steps"])]
    train_vae.main([*train, "1"])
    assert "disc_init: as in discriminator.pt: disc.channels 4, disc.num_layers 1" in capsys.readouterr().out
    Path("discriminator.pt").unlink()
    train_vae.main([*train, "2"])
    content = load_latest("run")
    found = from_dict(PatchDiscriminatorConfig, content["config"]["disc"])
    assert found == dataclasses.replace(theirs.config, image_range=ldm3d.load("run").net.config.image_range)
    assert found.image_range == (0, 1)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(content["others"]["discriminator"][name], value, atol=1e-6)
    train[train.index("run")] = "other"
    codes = VAEConfig(2, 1, 3, (8,), (1,), trunk="plain", quant_conv=False)
    torch.save(extract(VQVAE(codes, QuantizerConfig(8)), "monai_vq"), "discriminator.pt")
    assert "holds a VQVAE, expected a PatchDiscriminator" in mistake(train_vae.main, [*train, "1"])
    assert "disc_init: has no effect without" in mistake(train_vae.main, [*train, "1", "--disc_weight", "0"])


@pytest.mark.slow
def test_stage_two_trains_on_an_imported_autoencoder_with_own_data(runs, heads):
    data = ["--data.root", heads, "--data.cache_dir", runs / "cache", "--run.steps", 1]
    net = ["--unet.channels", "8,16", "--unet.num_groups", 4, "--unet.head_channels", 8, "--sample_steps", 2]
    train_ldm.main(["phantom", *map(str, ["--vae", runs / "vae", "--run.dir", runs / "ldm2", *data, *net])])
    spec = ldm3d.load(runs / "ldm2").spec
    assert spec.size == (16, 20)
    assert spec.high[0] > 10  # of the files, which the importer could not know


def test_the_report_says_where_every_setting_comes_from(runs):
    report = json.loads((runs / "ldm" / "import.json").read_text())
    assert report["family"] == "MONAI U-Net"
    assert report["inferred"]["channels"] == [8, 16]
    assert report["given"] == {"num_groups": 4, "head_channels": 8}
    assert report["assumed"] == {"gn_eps": 1e-6}
    assert report["facts"] == {"scale_factor": 0.5}


def test_the_flags_of_images_decide_how_they_are_read(runs, tmp_path):
    flags = (
        "--num_groups 4 --spacing 1.5,2 --scaling window --window -100,300 --image_range 0,2 --gn_eps 1e-3"
    )
    main(["import", str(runs / "vae.pt"), "--to", str(tmp_path / "run"), *flags.split()])
    pipeline = ldm3d.load(tmp_path / "run")
    assert pipeline.layout.spacing == pipeline.spec.spacing == (1.5, 2.0)
    assert pipeline.layout.scaling == "window"
    assert (pipeline.layout.window, pipeline.spec.low, pipeline.spec.high) == ((-100, 300), (-100,), (300,))
    assert pipeline.net.config.image_range == (0, 2)
    assert pipeline.net.config.gn_eps == 1e-3
    assert pipeline.spec.size == (64, 64)


def test_a_flag_counts_more_than_the_scale_factor_of_the_file(runs, tmp_path):
    flags = "--num_groups 4 --head_channels 8 --scale_factor 4".split()
    unet = ["import", runs / "unet.pt", "--vae", runs / "vae", "--to", tmp_path / "run", *flags]
    main([str(word) for word in unet])
    assert ldm3d.load(tmp_path / "run").model.latent_std.flatten().tolist() == [0.25] * 3


def test_factors_of_latents_come_from_the_configuration_of_the_autoencoder_where_the_u_net_has_none(
    runs, tmp_path
):
    described = {"_class_name": "AutoencoderKL", "channels": [8, 16], "norm_num_groups": 4}
    described |= {"scaling_factor": 0.25, "shift_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(described))
    flags = [
        runs / "vae.pt",
        "--config",
        tmp_path / "config.json",
        "--to",
        tmp_path / "vae",
        "--size",
        "16,20",
    ]
    main(["import", *map(str, flags)])
    state = torch.load(runs / "unet.pt", weights_only=True)["unet_state_dict"]
    torch.save(state, tmp_path / "alone.pt")
    for name, more, mean, std in (("one", [], 0.5, 4.0), ("two", ["--shift_factor", 2], 2.0, 4.0)):
        unet = [tmp_path / "alone.pt", "--vae", tmp_path / "vae", "--to", tmp_path / name, *more]
        main(["import", *map(str, [*unet, "--num_groups", 4, "--head_channels", 8])])
        model = ldm3d.load(tmp_path / name).model
        assert model.latent_mean.flatten().tolist() == [mean] * 3
        assert model.latent_std.flatten().tolist() == [std] * 3
    described |= {"latents_mean": [0, 1, 2], "latents_std": [1.0, 2.0, 4.0]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    main(["import", *map(str, flags[:-3]), str(tmp_path / "vae4"), *map(str, flags[-2:])])
    unet = [tmp_path / "alone.pt", "--vae", tmp_path / "vae4", "--num_groups", 4, "--head_channels", 8]
    main(["import", *map(str, [*unet, "--to", tmp_path / "three"])])
    model = ldm3d.load(tmp_path / "three").model
    assert model.latent_mean.flatten().tolist() == [0.0, 1.0, 2.0]
    assert model.latent_std.flatten().tolist() == [4.0, 8.0, 16.0]


@pytest.mark.parity
def test_a_flow_with_a_timestep_transform_samples_at_the_times_of_its_scheduler():
    schedulers = pytest.importorskip("monai.networks.schedulers")
    arguments = {"use_discrete_timesteps": False, "use_timestep_transform": True, "spatial_dim": 2}
    arguments["base_img_size_numel"] = 24 * 24
    theirs = schedulers.RFlowScheduler(**arguments)
    theirs.set_timesteps(10, input_img_size_numel=48 * 60)
    described = described_kernel({"_target_": "RFlowScheduler", **arguments})
    times = DiffusionKernel(KernelConfig(**described)).sampling_times("euler", 10, (48, 60))
    ours = 1000 * torch.tensor(times[: len(theirs.timesteps)])
    close(ours.float(), theirs.timesteps.float(), 1e-3)  # MONAI's are of half precision


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps_offset": 1}, "steps_offset 1 is not supported"),
        ({"spatial_dim": "@dims"}, "expected numbers"),
    ],
)
def test_a_flow_that_has_no_counterpart_is_refused_by_name(change, says):
    with pytest.raises(ldm3d.InputError, match=says):
        described_kernel({"_target_": "RFlowScheduler", "use_timestep_transform": True, **change})


@pytest.mark.parity
def test_check_says_how_near_the_outputs_are(runs, tmp_path, capsys):
    pytest.importorskip("monai")
    flags = ["--num_groups", "4", "--check"]
    main(["import", str(runs / "vae.pt"), "--to", str(tmp_path / "run"), *flags])
    assert "check: outputs as those of monai.networks.nets.AutoencoderKL" in capsys.readouterr().out


# --- configuration files ------------------------------------------------------------------------------------


def bundle(**changes) -> dict:
    """The configuration of a MONAI bundle for CONFIG."""
    network = {
        "_target_": "monai.networks.nets.AutoencoderKL",
        "spatial_dims": "@spatial_dims",
        "channels": "$@widths",
        "num_res_blocks": 1,
        "attention_levels": [False, False],
        "norm_num_groups": 4,
        "norm_eps": 1e-5,
        **changes,
    }
    scale = {"_target_": "ScaleIntensityRangePercentilesd", "lower": 0, "upper": 99, "b_min": -2, "b_max": 2}
    steps = [{"_target_": "Spacingd", "pixdim": [1.5, 2.0]}, scale]
    preprocessing = {"_target_": "Compose", "transforms": steps}
    return {"spatial_dims": 2, "widths": [8, 16], "autoencoder_def": network, "pre": preprocessing}


def test_a_bundle_tells_what_shapes_cannot(runs, tmp_path):
    (tmp_path / "inference.json").write_text(json.dumps(bundle()))
    flags = ["--config", tmp_path / "inference.json", "--to", tmp_path / "run"]
    main(["import", *map(str, [runs / "vae.pt", *flags])])
    pipeline = ldm3d.load(tmp_path / "run")
    assert pipeline.net.config.num_groups == 4
    assert pipeline.net.config.gn_eps == 1e-5
    assert pipeline.net.config.image_range == (-2.0, 2.0)
    assert pipeline.spec.spacing == pipeline.layout.spacing == (1.5, 2.0)
    assert json.loads((tmp_path / "run" / "import.json").read_text())["assumed"] == {}


DESCRIBED = {"_target_": "DiffusionModelUNet", "norm_num_groups": 4, "num_head_channels": [0, 8]}


@pytest.mark.parametrize(
    ("scheduler", "kernel"),
    [
        (
            {"_target_": "DDPMScheduler", "schedule": "scaled_linear_beta", "beta_end": "@end"},
            {
                "process": "vp",
                "prediction": "eps",
                "schedule": "scaled_linear",
                "beta_end": 0.0205,
                "clip_x_start": 1.0,
            },
        ),
        (
            [
                {"_target_": "DDPMScheduler", "prediction_type": "v_prediction"},
                {
                    "_target_": "generative.networks.schedulers.DDIMScheduler",
                    "prediction_type": "v_prediction",
                    "clip_sample": False,
                },
            ],
            {
                "prediction": "v",
                "schedule": "linear",
                "beta_start": 1e-4,
                "beta_end": 2e-2,
                "clip_x_start": None,
            },
        ),
        (
            {"_target_": "monai.networks.schedulers.RFlowScheduler", "num_train_timesteps": 500},
            {"process": "flow", "prediction": "velocity", "num_timesteps": 500, "flow_shift": 1.0},
        ),
        (
            {
                **{
                    "_target_": "RFlowScheduler",
                    "use_timestep_transform": True,
                    "sample_method": "logit-normal",
                },
                **{"base_img_size_numel": 2304, "spatial_dim": 2, "loc": 0.5, "scale": 1.4},
            },
            {"flow_shift": None, "flow_base": 48.0, "t_distribution": "logit_normal", "logit_std": 1.4},
        ),
    ],
)
def test_a_bundle_tells_how_its_u_net_was_trained(scheduler, kernel, runs, tmp_path, capsys):
    content = {"unet": DESCRIBED, "noise": scheduler, "end": 0.0205}
    (tmp_path / "bundle.json").write_text(json.dumps(content))
    flags = ["--config", tmp_path / "bundle.json", "--vae", runs / "vae", "--to", tmp_path / "run"]
    main(["import", *map(str, [runs / "unet.pt", *flags])])
    found = ldm3d.load(tmp_path / "run").model.kernel.config
    assert {name: getattr(found, name) for name in kernel} == kernel
    assert "the diffusion" not in capsys.readouterr().out
    from_python = ImportConfig(str(tmp_path / "again"), str(tmp_path / "bundle.json"), vae=str(runs / "vae"))
    import_file(from_python, str(runs / "unet.pt"))
    assert ldm3d.load(tmp_path / "again").model.kernel.config == found


TWO = [
    {"_target_": "DDPMScheduler", "prediction_type": "v_prediction", "num_train_timesteps": 500},
    {"_target_": "PNDMScheduler", "prediction_type": "v_prediction", "num_train_timesteps": 200},
]
USUAL = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}


@pytest.mark.parametrize(
    ("scheduler", "flags", "kernel"),
    [
        (TWO[0], ["--kernel.beta_end", 0.03], {"prediction": "v", "num_timesteps": 500, "beta_end": 0.03}),
        (TWO[0], ["--kernel.clip_x_start", "none"], {"clip_x_start": None, "schedule": "linear"}),
        (
            {"_target_": "RFlowScheduler", "num_train_timesteps": 500},
            ["--kernel.prediction", "x_start"],
            {"process": "flow", "prediction": "x_start", "flow_shift": 1.0, "num_timesteps": 500},
        ),
        (
            TWO,
            ["--kernel.num_timesteps", 300, "--kernel.clip_x_start", 2],
            {"prediction": "v", "num_timesteps": 300, "clip_x_start": 2.0, "beta_start": 1e-4},
        ),
        (
            [{"_target_": "DDPMScheduler", **USUAL}, {"_target_": "PNDMScheduler", **USUAL}],
            ["--kernel.clip_x_start", "none"],
            to_dict(ASSUMED_KERNEL),
        ),
    ],
)
def test_a_flag_of_the_diffusion_leaves_the_rest_to_the_bundle(scheduler, flags, kernel, runs, tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"unet": DESCRIBED, "noise": scheduler}))
    flags = ["--config", tmp_path / "bundle.json", "--vae", runs / "vae", "--to", tmp_path / "run", *flags]
    main(["import", *map(str, [runs / "unet.pt", *flags])])
    found = ldm3d.load(tmp_path / "run").model.kernel.config
    assert {name: getattr(found, name) for name in kernel} == kernel


def test_a_diffusion_that_nothing_tells_is_said_to_be_assumed(runs, tmp_path, capsys):
    state = torch.load(runs / "unet.pt", weights_only=True)["unet_state_dict"]
    torch.save(state, tmp_path / "alone.pt")
    for file, says in (
        (runs / "unet.pt", "note: the diffusion assumed;"),
        (tmp_path / "alone.pt", "note: the diffusion and scale_factor 1 assumed;"),
    ):
        flags = ["--vae", runs / "vae", "--to", tmp_path / file.stem, "--num_groups", 4, "--head_channels", 8]
        main(["import", *map(str, [file, *flags])])
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": [8, 32]}, "channels is (8, 32) there, but (8, 16) in the weights"),
        ({"spatial_dims": 3}, "dims is 3 there, but 2 in the weights"),
        ({"_target_": "monai.networks.nets.UNet"}, "describes no AutoencoderKL"),
        (
            {"norm_num_groups": "$2 * 2"},
            "num_groups: the configuration file says '$2 * 2'; give the value with",
        ),
        (
            {"other": {"_target_": "ScaleIntensity"}},
            "image_range: the configuration file says (0.0, 1.0) and",
        ),
        (
            {"other": {"_target_": "Spacing", "pixdim": [1, 1]}},
            "spacing: the configuration file says (1, 1) and",
        ),
    ],
)
def test_a_bundle_of_another_network_is_refused(changes, says, runs, tmp_path, mistake):
    (tmp_path / "inference.json").write_text(json.dumps(bundle(**changes)))
    flags = ["--config", tmp_path / "inference.json", "--to", tmp_path / "run"]
    assert says in mistake(main, ["import", runs / "vae.pt", *flags])
    assert not (tmp_path / "run").exists()


def test_a_flag_counts_more_than_the_bundle(runs, tmp_path):
    (tmp_path / "inference.json").write_text(json.dumps(bundle(norm_num_groups=2)))
    net = load(runs / "vae.pt", tmp_path / "inference.json", num_groups=4)
    assert net.config.num_groups == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"unet": DESCRIBED | {"num_head_channels": "$[0, 8]"}},
            "head_channels: the configuration file says '$[0, 8]'",
        ),
        (
            {"unet": DESCRIBED, "a": {"_target_": "DDPMScheduler"}, "b": {"_target_": "RFlowScheduler"}},
            "kernel: the configuration file says {'process': 'vp'",
        ),
        (
            {"unet": DESCRIBED, "a": {"_target_": "DDPMScheduler", "schedule": "sigmoid_beta"}},
            "got 'sigmoid'",
        ),
    ],
)
def test_what_a_bundle_of_a_u_net_leaves_open_is_asked_for(content, says, runs, tmp_path, mistake):
    (tmp_path / "bundle.json").write_text(json.dumps(content))
    flags = ["--config", tmp_path / "bundle.json", "--vae", runs / "vae", "--to", tmp_path / "run"]
    assert says in mistake(main, ["import", runs / "unet.pt", *flags])
    assert not (tmp_path / "run").exists()


def test_a_flag_that_leaves_two_diffusions_is_not_enough(runs, tmp_path, mistake):
    (tmp_path / "bundle.json").write_text(json.dumps({"unet": DESCRIBED, "noise": TWO}))
    flags = ["--config", tmp_path / "bundle.json", "--vae", runs / "vae", "--to", tmp_path / "run"]
    said = mistake(main, ["import", runs / "unet.pt", *flags, "--kernel.num_timesteps", 300])
    assert "kernel: the configuration file says {'process': 'vp'" in said
    assert said.count("'num_timesteps': 300") == 2
    said = mistake(main, ["import", runs / "unet.pt", *flags, "--kernel.beta_end", "high"])
    assert "kernel.beta_end: expected float, got 'high'" in said


def test_the_scaling_of_images_in_the_bundle_of_a_u_net_is_no_hindrance(runs, tmp_path):
    (tmp_path / "bundle.json").write_text(
        json.dumps({"unet": DESCRIBED, "a": {"_target_": "ScaleIntensityd"}})
    )
    assert load(runs / "unet.pt", tmp_path / "bundle.json").unet.config.head_channels == (0, 8)


def test_a_u_net_whose_heads_are_not_known_asks_for_them(runs, tmp_path, mistake):
    flags = ["--num_groups", 4, "--vae", runs / "vae", "--to", tmp_path / "run"]
    assert "--head_channels" in mistake(main, ["import", runs / "unet.pt", *flags])
    assert "vae: a U-Net needs its autoencoder" in mistake(
        main, ["import", runs / "unet.pt", "--num_groups", 4, "--head_channels", 8, "--to", tmp_path / "run"]
    )
    assert not (tmp_path / "run").exists()


def test_a_denoiser_on_an_imported_autoencoder_is_planned_from_the_folder(
    runs, heads, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    short = "--run.steps 2 --run.eval_every 2 --run.save_every 2 --data.num_variants 1".split()
    train_ldm.main([str(heads), "--vae", str(runs / "vae"), *short])
    assert "8 samples a step" in capsys.readouterr().out
    rows = json.loads((tmp_path / f"runs/ldm-{heads.name}/plan.json").read_text())
    assert next(row["value"] for row in rows if row["key"] == "data.size") == [16, 20]
    train_ldm.main([str(runs / "vae"), "--data.root", str(heads), *short])
    assert (tmp_path / "runs/ldm-vae/plan.json").exists()
