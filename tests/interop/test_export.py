"""An exported run gives the same numbers in the class of the other library, which loads it strictly, and
comes back bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import close
from tiny import DISCRIMINATOR, VAE, assert_equal, ldm_flags

import ldm3d
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
from ldm3d.config import from_dict
from ldm3d.data import open_images
from ldm3d.engine.checkpoint import load_latest
from ldm3d.interop import load
from ldm3d.interop.__main__ import main
from ldm3d.interop.exporting import foreign_state, with_own_classes
from ldm3d.interop.importing import open_weights
from ldm3d.interop.peers import build, compare, describe
from ldm3d.vae import Autoencoder

PLAIN = VAEConfig(2, channels=(8, 16), num_res_blocks=(1, 2), attention_levels=(False, True), num_groups=4)
MONAI_HAS = "--vae.shortcut false --vae.upsample nearest".split()
FLOW, DDPM = "", "--kernel.process vp --kernel.prediction eps --kernel.num_timesteps 8"


def randomised(net):
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


NETS = {  # name -> (library, our network, hints for coming back)
    "plain": ("monai", lambda: AutoencoderKL(PLAIN), {}),
    "3d": ("monai", lambda: AutoencoderKL(replace(PLAIN, dims=3, mid_attention=True)), {}),
    "transposed": ("monai", lambda: AutoencoderKL(replace(PLAIN, upsample="deconv2")), {}),
    "maisi": ("maisi", lambda: AutoencoderKL(replace(PLAIN, dims=3, upsample="trilinear")), {}),
    "maisi transposed": (
        "maisi",
        lambda: AutoencoderKL(replace(PLAIN, dims=3, upsample="deconv3", attention_levels=(False, False))),
        {"upsample": "deconv3"},
    ),
    "diffusers": (
        "diffusers",
        lambda: AutoencoderKL(
            VAEConfig(
                *(2, 3, 4, (8, 16), (2, 2)),
                **{"num_groups": 4, "final_silu": True, "double_z": True, "extra_up_block": True},
                **{"mid_attention": True, "attention_levels": (False, False)},
            )
        ),
        {},
    ),
    "vqvae": (
        "monai",
        lambda: VQVAE(
            VAEConfig(2, 1, 3, (8, 16), (1, 1), trunk="plain", res_channels=(4, 6), quant_conv=False),
            QuantizerConfig(8),
        ),
        {},
    ),
    "denoiser": (
        "monai",
        lambda: Denoiser(UNetConfig(2, 4, 4, (8, 16), (1, 2), (False, True), 8, num_groups=4)),
        {"head_channels": 8},
    ),
    "denoiser of classes": (
        "monai",
        lambda: Denoiser(
            UNetConfig(3, 4, 4, (8, 16), (1, 1), (False, True), 8, num_groups=4, resblock_updown=True),
            ConditionConfig(use=("class:sex",)),
            [Condition("class", "sex", ("F", "M", "O"))],
        ),
        {"head_channels": 8},
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", NETS)
def test_the_other_class_loads_it_strictly_and_has_equal_outputs(name):
    library, make, _ = NETS[name]
    pytest.importorskip("diffusers" if library == "diffusers" else "monai")
    net = randomised(make())
    theirs = build(describe(net, library), foreign_state(net, library))
    if isinstance(net, Autoencoder) and library != "diffusers":
        assert net.config.image_range == (-1.0, 1.0)
    assert compare(net, theirs) < 1e-5


def test_a_u_net_with_numbers_and_no_classes_has_a_state_in_the_layout_of_maisi():
    spacing = Condition("spacing", "spacing", mean=(0.0,) * 2, std=(0.01,) * 2)
    unet = UNetConfig(2, 3, 3, (8, 16), (1,), (False, True), head_channels=8, num_groups=4)
    net = Denoiser(unet, ConditionConfig(use=("spacing",), concat=("spacing",)), [spacing])
    state = foreign_state(net, "monai")
    assert state["spacing_layer.0.weight"].shape[1] == 2
    assert "class_embedding.weight" not in state


@pytest.mark.parametrize("name", NETS)
def test_what_comes_back_is_the_same_to_the_bit(name, tmp_path):
    library, make, hints = NETS[name]
    net = randomised(make())
    if name == "denoiser of classes":  # MONAI has no row for the absent class; it comes back as zeros
        net.conditioner.parts[0].table.weight.data[-1] = 0
    torch.save(foreign_state(net, library), tmp_path / "model.pt")
    if isinstance(net, Autoencoder):
        hints = hints | {"image_range": (-1, 1)}
    if name != "vqvae":
        hints = hints | {"num_groups": 4}
    back = open_weights(tmp_path / "model.pt", **hints).net
    ours, other = net.state_dict(), back.state_dict()
    ours.pop("quantizer.initialised", None), other.pop("quantizer.initialised", None)
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[key], other[key]) for key in ours)
    if isinstance(net, Autoencoder):
        assert back.config == net.config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dims": 2, "norm": "none", "last_kernel": 1},
        {"num_scales": 2, "scale_by": "depth", "num_layers": 1, "in_channels": 2},
    ],
)
def test_a_discriminator_judges_alike_there_and_comes_back_bit_for_bit(changes, tmp_path):
    pytest.importorskip("monai")
    config = PatchDiscriminatorConfig(**{"channels": 4, "num_layers": 2, "image_range": (0, 1), **changes})
    net = randomised(PatchDiscriminator(config))
    theirs = build(describe(net, "monai"), foreign_state(net, "monai"))
    x = torch.rand(2, config.in_channels, *(24, 32, 24)[: config.dims])
    logits = theirs(x)[0] if config.num_scales > 1 else [theirs(x)[-1]]
    for ours, other in zip(net(x * 2 - 1).logits, logits, strict=True):
        close(ours, other)
    torch.save(foreign_state(net, "monai"), tmp_path / "discriminator.pt")
    back = load(tmp_path / "discriminator.pt")
    assert replace(back.config, image_range=(0, 1)) == config
    assert_equal(back.state_dict(), net.state_dict())


@pytest.mark.parametrize("changes", [{"norm": "group"}, {"spectral_norm": True}, {"num_scales": 2}])
def test_a_discriminator_that_monai_lacks_is_named(changes):
    with pytest.raises(ldm3d.InputError, match="has no counterpart in monai"):
        describe(PatchDiscriminator(PatchDiscriminatorConfig(channels=4, num_layers=1, **changes)), "monai")


@pytest.mark.parity
@pytest.mark.parametrize("classes", [True, False])
def test_a_controlnet_steers_the_u_net_of_monai_alike_and_comes_back_bit_for_bit(classes, tmp_path):
    pytest.importorskip("monai")
    sex, labels = Condition("class", "sex", ("F", "M", "O")), Condition("labels", "labels", width=3)
    unet = UNetConfig(2, 4, 4, (8, 16), (1, 2), (False, True), 8, num_groups=4)
    config = ConditionConfig(use=("class:sex",)) if classes else ConditionConfig()
    net = Denoiser(unet, config, [sex, labels] if classes else [labels], control="labels")
    net = randomised(net).requires_grad_(False)
    control = with_own_classes(net)
    theirs, other = (build(describe(n, "monai"), foreign_state(n, "monai")) for n in (net, control))
    x, shares = torch.randn(2, 4, 8, 12), torch.rand(2, 3, 8, 12)
    t, named = torch.tensor([3, 700]), {"class_labels": torch.tensor([2, 0])} if classes else {}
    down, mid = other(x, t, shares, **named)
    steered = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    values = {"labels": shares} | ({"sex": named["class_labels"]} if classes else {})
    close(net(x, t.float(), values), theirs(x, t, **named, **steered), 1e-5)
    assert not torch.allclose(theirs(x, t, **named, **steered), theirs(x, t, **named), atol=1e-3)
    torch.save(foreign_state(control, "monai"), tmp_path / "controlnet.pt")
    back = load(tmp_path / "controlnet.pt", num_groups=4, head_channels=8)
    assert_equal(back.state_dict(), control.state_dict())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stem": (2,)}, "stem: 2 has no counterpart"),
        ({"strides": ((1, 2),)}, "strides: ((1, 2),) has no counterpart"),
        ({"shortcut": True}, "shortcut: True has no counterpart"),
        ({"final_silu": True}, "final_silu: True has no counterpart"),
        ({"upsample": "trilinear"}, "upsample: trilinear has no counterpart"),
        ({"num_groups": 5}, "num_groups: 5 does not divide"),
    ],
)
def test_what_the_other_library_lacks_is_named(change, says):
    with pytest.raises(ldm3d.InputError) as error:
        describe(AutoencoderKL(replace(PLAIN, **change)), "monai")
    assert says in str(error.value)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(heads, tmp_path_factory) -> Path:
    """A run of an autoencoder that MONAI has too."""
    place = tmp_path_factory.mktemp("export")
    flags = ["--data.root", heads, "--data.cache_dir", place / "cache", "--run.dir", place / "vae"]
    flags += ["--run.steps", 20, "--optim.warmup_steps", 0, "--vae.stem", 1, *MONAI_HAS, *DISCRIMINATOR]
    train_vae.main(["phantom", *map(str, [*VAE, *flags])])
    return place / "vae"


@pytest.fixture(scope="module", params=[FLOW, DDPM], ids=["flow", "ddpm"])
def ldm(request, vae) -> Path:
    """A run on its latents."""
    folder = vae.parent / f"ldm-{request.param[:5].strip('-') or 'flow'}"
    train_ldm.main(ldm_flags(vae, folder, 5, *request.param.split()))
    return folder


def bundle(folder: Path, **changes):
    """MONAI's own reader of configs/inference.json."""
    ConfigParser = pytest.importorskip("monai.bundle").ConfigParser
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.update({"bundle_root": str(folder), **changes})
    return parser


@pytest.mark.parity
def test_monai_runs_the_bundle_of_an_autoencoder_to_the_same_reconstructions(vae, heads, tmp_path):
    main(["export", str(vae), "--as", "monai", "--to", str(tmp_path / "bundle")])
    parser = bundle(tmp_path / "bundle")
    for expression in parser.get_parsed_content("run")[:1]:
        assert "matched" in str(expression)
    net = parser.get_parsed_content("autoencoder")
    pipeline = ldm3d.load(vae)
    x = open_images(pipeline.content, heads / "images")[0, 0]["image"]
    with torch.no_grad():
        close(pipeline.reconstruct(x), net.reconstruct(x[None])[0], 1e-5)
    scale = parser.get_parsed_content("preprocessing").transforms[-2]
    image = torch.rand(1, 20, 30) * 100
    scaled = scale(image)
    assert -1 <= scaled.min() < scaled.max() <= 1


@pytest.mark.parity
def test_a_bundle_holds_the_discriminator_of_the_newest_checkpoint(vae, tmp_path):
    main(["export", str(vae), "--to", str(tmp_path / "bundle")])
    parser = bundle(tmp_path / "bundle")
    parser.get_parsed_content("load_discriminator")
    theirs, content = parser.get_parsed_content("discriminator"), load_latest(vae)
    ours = PatchDiscriminator(from_dict(PatchDiscriminatorConfig, content["config"]["disc"]))
    ours.load_state_dict(content["others"]["discriminator"])
    x = torch.rand(1, 1, 16, 20) * 2 - 1
    with torch.no_grad():
        close(ours(x).logits[0], theirs(x)[-1])
    notes = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())["notes"]
    assert "intensities that the discriminator sees: -1 to 1" in notes


@pytest.mark.parity
def test_a_bundle_holds_the_controlnet_that_steers_its_u_net(ldm, tmp_path):
    flags = ["--run.init", ldm, "--control", "labels", "--run.dir", tmp_path / "run", "--run.steps", 2]
    flags += ["--batch_size", 4, "--sample_steps", 2, "--optim.lr", 1e-2, "--optim.warmup_steps", 0]
    train_ldm.main(["phantom", *map(str, flags)])
    main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "bundle")])
    parser = bundle(tmp_path / "bundle")
    for name in ("load_unet", "load_controlnet"):
        parser.get_parsed_content(name)
    unet, control = (parser.get_parsed_content(name) for name in ("unet", "controlnet"))
    model = ldm3d.load(tmp_path / "run").model
    x, shares = torch.randn(1, *model.latent_shape), torch.rand(1, 15, *model.latent_shape[1:])  # and moments
    t, sign = torch.tensor([4]), -1 if model.kernel.config.process == "flow" else 1
    with torch.no_grad():
        down, mid = control(x, t, shares)
        theirs = unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=mid)
        ours = model.denoiser(x, t.float(), {"labels": shares})
        assert not torch.allclose(ours, model.denoiser(x, t.float()), atol=1e-5)
    close(ours, sign * theirs, 1e-5)


@pytest.mark.parity
def test_monai_reads_scales_and_writes_the_images_of_a_bundle(vae, tmp_path):
    import nibabel
    import numpy as np

    folder = tmp_path / "bundle"
    main(["export", str(vae), "--to", str(folder)])
    image = np.random.default_rng(0).random((17, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "images" / "one.nii.gz")
    bundle(folder).get_parsed_content("run")
    (found,) = (folder / "results").glob("*.nii.gz")
    assert nibabel.load(found).shape == (18, 20)


@pytest.mark.parity
def test_monai_s_inferer_samples_what_our_sampler_does(ldm, tmp_path):
    main(["export", str(ldm), "--to", str(tmp_path / "bundle"), "--steps", "8"])
    model = ldm3d.load(ldm).model
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    parser = bundle(tmp_path / "bundle", noise=noise)
    parser.get_parsed_content("run")
    theirs = parser.get_parsed_content("sample")
    assert len(list((tmp_path / "bundle" / "results").glob("*.nii.gz"))) == 1
    sampler = "euler" if model.kernel.config.process == "flow" else "ddim"
    with torch.inference_mode():
        times = model.kernel.sampling_times(sampler, 8, model.latent_shape[1:])
        z = model.kernel.sample(model.denoiser, noise, times, sampler)
        ours = model.autoencoder.decode(z * model.latent_std + model.latent_mean)
    close(ours, theirs, 1e-3)  # MONAI keeps the times of a flow in half precision


def test_an_exported_run_that_is_imported_again_samples_the_same(ldm, tmp_path):
    main(["export", str(ldm), "--to", str(tmp_path / "bundle")])
    models, config = tmp_path / "bundle" / "models", ldm3d.load(ldm).model.kernel.config
    flags = ["--num_groups", 4, "--image_range", "-1,1", "--size", "16,20"]
    main(["import", *map(str, [models / "autoencoder.pt", "--to", tmp_path / "vae", *flags])])
    kernel = ["--kernel.process", config.process, "--kernel.prediction", config.prediction]
    kernel += ["--kernel.num_timesteps", config.num_timesteps, "--head_channels", 8, "--num_groups", 4]
    flags = [models / "unet.pt", "--vae", tmp_path / "vae", "--to", tmp_path / "ldm", *kernel]
    main(["import", *map(str, flags)])
    how = {"num": 1, "size": (16, 20), "steps": 4}
    close(ldm3d.load(tmp_path / "ldm").sample(**how), ldm3d.load(ldm).sample(**how), 1e-4)


def latents_of(run: Path, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents of a size that no export has seen, what the run's own decoder makes of them)."""
    pipeline = ldm3d.load(run)
    z = torch.randn(batch, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    if hasattr(pipeline, "model"):
        return z, pipeline.model.decode(z, (8, 18))
    return z, pipeline.net.decode(z)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(
    ("kind", "opened"),
    [
        ("torch_export", lambda folder: torch.export.load(folder / "decoder.pt2").module()),
        ("torchscript", lambda folder: torch.jit.load(folder / "decoder.ts")),
    ],
)
def test_the_graph_of_a_decoder_runs_on_latents_of_any_size(kind, opened, ldm, tmp_path):
    main(["export", str(ldm), "--as", kind, "--to", str(tmp_path / "out")])
    z, expected = latents_of(ldm, 3)
    close(opened(tmp_path / "out")(z), expected, 1e-5)


@pytest.mark.slow
def test_onnxruntime_runs_the_decoder_to_the_same_numbers(vae, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    main(["export", str(vae), "--as", "onnx", "--to", str(tmp_path / "out")])
    session = runtime.InferenceSession(tmp_path / "out" / "decoder.onnx", providers=["CPUExecutionProvider"])
    z, expected = latents_of(vae, 3)
    (x,) = session.run(None, {"z": z.numpy()})
    close(torch.from_numpy(x), expected, 1e-5)


@pytest.mark.parity
def test_diffusers_loads_the_folder(tmp_path, heads):
    diffusers = pytest.importorskip("diffusers")
    flags = ["--data.root", heads, "--data.cache_dir", tmp_path / "cache", "--run.dir", tmp_path / "vae"]
    flags += [
        "--run.steps",
        2,
        "--vae.stem",
        1,
        *MONAI_HAS,
        "--vae.final_silu",
        "true",
        "--vae.double_z",
        "true",
    ]
    flags += ["--vae.extra_up_block", "true", "--vae.mid_attention", "true"]
    train_vae.main(["phantom", *map(str, [*VAE, *flags])])
    main(["export", str(tmp_path / "vae"), "--as", "diffusers", "--to", str(tmp_path / "out")])
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    assert compare(ldm3d.load(tmp_path / "vae").net, theirs) < 1e-5
    back = load(tmp_path / "out" / "diffusion_pytorch_model.safetensors", tmp_path / "out" / "config.json")
    assert back.config.num_groups == 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "to: which folder?"),
        ("--to {here}", "is there already"),
        ("--to {new} --as keras", "error: as: expected monai"),
        ("--to {new} --as diffusers", "final_silu: False has no counterpart"),
        ("--to {new} --as maisi", "upsample: nearest has no counterpart"),
        ("--to {new} --steps 0", "steps: expected at least 1"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(flags, says, vae, tmp_path, mistake):
    words = flags.format(here=vae, new=tmp_path / "new").split()
    assert says in mistake(main, ["export", vae, *words])
    assert not (tmp_path / "new").exists()


def test_a_bundle_says_what_was_folded(ldm, tmp_path):
    main(["export", str(ldm), "--to", str(tmp_path / "bundle")])
    notes = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())["notes"]
    assert "latent_mean and latent_std are folded into the autoencoder; scale_factor is 1" in notes
    flow = ldm3d.load(ldm).model.kernel.config.process == "flow"
    assert any("MONAI's sign" in note for note in notes) == flow
    assert "intensities within the networks: -1 to 1" in notes
