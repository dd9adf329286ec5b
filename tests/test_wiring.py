"""Every flag reaches what it is for: a logged term, a weight or a file changes as a formula of its own says.

All networks start from the same weights and see the same batch, so the first step of one run tells what the
first step of another must be, whose flags differ.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from closeness import close
from torch import Tensor, nn

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import read
from ldm3d.cdal import CDAL, CDALConfig, FewStepConfig, Generator, level_sets
from ldm3d.conditions import absent
from ldm3d.config import flatten, from_dict, parse, replace
from ldm3d.data import Volume, write
from ldm3d.data.phantoms import write_phantoms
from ldm3d.denoiser import Denoiser
from ldm3d.diffusion_kernel import DiffusionKernel
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig, TimeDiscriminator
from ldm3d.engine.checkpoint import load, save, step_files
from ldm3d.engine.distributed import keyed_generator
from ldm3d.evaluation import pairs
from ldm3d.evaluation import reconstruction as evaluation_of_reconstructions
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.inference import reconstruction, sampling, sampling_request, segmentation
from ldm3d.inference.segmentation import overlay
from ldm3d.large import streaming
from ldm3d.latent_diffusion import LatentDiffusion
from ldm3d.losses import PerceptualConfig, PerceptualLoss, gradient_loss
from ldm3d.metrics import ms_ssim

LR = 2e-3  # of tests/tiny.py
BARE = "--gradient_weight 0 --kl_weight 0"
DISC = f"{BARE} --disc.channels 4 --disc.num_layers 1 --disc_start 0 --disc_ramp 0 --disc_adaptive false"
DISC_ALONE = f"{DISC} --disc_weight 0.1 --optim.lr 1e-12"  # the autoencoder stays as it is


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[tuple, dict, Any]]:
    """The calls of a function from now on, (arguments, named ones, result), as they come in."""
    real, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append((args, kwargs, real(*args, **kwargs)))
        return calls[-1][2]

    patch.setattr(owner, name, watched)
    return calls


def no_pictures(patch: pytest.MonkeyPatch, module: Any) -> list[dict[str, Any]]:
    """The rows of the sheets that a module makes from now on. None is drawn, which would take long."""
    sheets: list[dict[str, Any]] = []
    patch.setattr(module, "save_sheet", lambda path, rows, limits=None: sheets.append(rows))
    return sheets


# --- train_vae.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(heads, tmp_path_factory) -> Callable[..., SimpleNamespace]:
    """vae(flags, steps): a run of train_vae.py, once for each set of flags.

    lines: of the log. content: the last checkpoint. recon, latent, x: of the first step. real, fake: the
    discriminator's first logits. sheets: the rows of its pictures.
    """
    place, made = tmp_path_factory.mktemp("wires"), {}

    def run(flags: str = "", steps: int = 1) -> SimpleNamespace:
        if (flags, steps) not in made:
            folder = place / f"{len(made)}"
            with pytest.MonkeyPatch.context() as patch:
                terms, judged = (spy(patch, train_vae, name) for name in ("loss_terms", "discriminator_loss"))
                sheets = no_pictures(patch, train_vae)
                train_vae.main(tiny.vae_flags(heads, folder, steps, *flags.split()))
            recon, latent, x, *_ = terms[0][0]
            real, fake = judged[0][0][:2] if judged else (None, None)
            made[flags, steps] = SimpleNamespace(
                lines=tiny.lines(folder),
                content=load(step_files(folder)[0]),
                recon=recon.detach(),
                latent=latent,
                x=x,
                real=real,
                fake=fake,
                sheets=sheets,
            )
        return made[flags, steps]

    return run


def test_the_trunk_of_an_autoencoder_is_the_one_that_is_asked_for(vae):
    plain = "--vae.trunk plain --vae.num_groups 32 --vae.stem 1 --vae.shortcut false --vae.upsample nearest"
    for flags, inner in ((plain, 8), (f"{plain} --vae.res_channels 5", 5)):
        run = vae(f"{flags} --autoencoder vq --disc_weight 0.1 --disc_start 0 --disc.num_layers 1")
        assert run.content["model"]["encoder.layers.2.conv1.weight"].shape == (inner, 8, 3, 3)
        assert run.lines[0]["adaptive_weight"] > 0
        assert math.isfinite(run.lines[0]["loss"])


def test_scales_of_a_discriminator_are_coarser_images_or_deeper_networks(vae):
    flags = "--disc_weight 0.1 --disc_start 0 --disc.num_layers 1 --disc.num_scales 2 --disc.channels 4"
    for more, layers, kernel in (
        ("", 3, 4),
        (" --disc.scale_by depth", 4, 4),
        (" --disc.scale_by depth --disc.last_kernel 1", 4, 1),
    ):
        weights = vae(flags + more).content["others"]["discriminator"]
        names = [name for name in weights if name.startswith("scales.1.") and name.endswith("0.weight")]
        assert len(names) == layers
        assert weights[names[-1]].shape[2:] == (kernel, kernel)


def l1(run: SimpleNamespace) -> Tensor:
    return (run.recon - run.x).abs().mean()


def nats(run: SimpleNamespace) -> Tensor:
    normal = torch.distributions.Normal
    posterior = normal(run.latent.mean, torch.exp(run.latent.logvar / 2))
    return torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).mean()


VAE_LOSSES: dict[str, Callable[[SimpleNamespace], Tensor]] = {  # flags -> the first loss, from what was seen
    BARE: l1,
    f"{BARE} --reconstruction l2": lambda run: (run.recon - run.x).square().mean(),
    "--gradient_weight 0 --kl_weight 0.3": lambda run: l1(run) + 0.3 * nats(run),
    "--gradient_weight 0 --kl_weight 0.3 --kl_warmup 4": lambda run: l1(run) + 0.3 / 4 * nats(run),
    # all channels cost less than 5 nats, so each pays just that
    "--gradient_weight 0 --kl_weight 0.3 --free_bits 5": lambda run: l1(run) + 0.3 * 5,
    "--kl_weight 0 --gradient_weight 2": lambda run: l1(run) + 2 * gradient_loss(run.recon, run.x).mean(),
    f"{BARE} --structure_weight 0.5": lambda run: (
        l1(run) + 0.5 * (1 - ms_ssim(run.recon, run.x, data_range=2.0).mean())
    ),
}


@pytest.mark.parametrize("flags", VAE_LOSSES)
def test_each_term_has_the_weight_of_its_flag_in_the_loss_of_an_autoencoder(vae, flags):
    expected = VAE_LOSSES[flags](vae(BARE)).item()
    assert vae(flags).lines[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_the_kl_rises_within_its_warm_up(vae):
    for step, line in enumerate(vae("--gradient_weight 0 --kl_weight 0.3 --kl_warmup 2", 3).lines, start=1):
        weight = 0.3 * min(1, step / 2)
        assert line["loss"] == pytest.approx(line["reconstruction"] + weight * line["kl"], rel=1e-5)


def test_the_perceptual_distance_is_that_of_the_weights_asked_for(vae, tmp_path):
    base, file = vae(BARE), str(tiny.vgg_weights(tmp_path / "vgg.pth"))
    line = vae(f"{BARE} --perceptual_weight 0.5 --perceptual.weights {file}").lines[0]
    with torch.no_grad():
        distance = PerceptualLoss(PerceptualConfig((file,)))(base.recon, base.x).mean().item()
    assert line["perceptual"] == pytest.approx(distance, rel=1e-4)
    assert line["loss"] == pytest.approx(l1(base).item() + 0.5 * distance, rel=1e-4)


@pytest.mark.parametrize(("flags", "weight"), [("", 0.25), ("--quantizer.commitment_weight 0.7", 0.7)])
def test_a_codebook_adds_its_two_terms_to_the_loss(vae, flags, weight):
    line = vae(f"--gradient_weight 0 --autoencoder vq --quantizer.codebook_size 16 {flags}").lines[0]
    assert line["commitment"] > 0
    expected = line["reconstruction"] + line["codebook"] + weight * line["commitment"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5)


ADVERSARIAL: list[tuple[str, Callable[[dict[str, float]], float]]] = [  # flags, what they add to the loss
    ("--disc_weight 0.1", lambda line: 0.1 * line["g_loss"]),
    ("--disc_weight 0.1 --disc_ramp 4", lambda line: 0.1 * line["g_loss"] / 4),
    (
        "--disc_weight 0.1 --disc_adaptive true",
        lambda line: 0.1 * line["g_loss"] * line["adaptive_weight"],
    ),
    ("--disc_weight 0.1 --disc_adaptive true --disc_cap 0.01", lambda line: 0.1 * line["g_loss"] * 0.01),
    ("--feature_weight 0.2", lambda line: 0.2 * line["features"]),
    (
        "--disc_weight 0.1 --feature_weight 0.2",
        lambda line: 0.1 * line["g_loss"] + 0.2 * line["features"],
    ),
]


@pytest.mark.parametrize(("flags", "added"), ADVERSARIAL)
def test_what_the_discriminator_adds_to_the_loss_of_an_autoencoder(vae, flags, added):
    line = vae(f"{DISC} {flags}").lines[0]
    assert abs(added(line)) > 1e-5
    assert line["loss"] == pytest.approx(l1(vae(BARE)).item() + added(line), rel=1e-4, abs=1e-6)


def means(logits: list[Tensor], loss: Callable[[Tensor], Tensor]) -> float:
    return torch.stack([loss(scale).mean() for scale in logits]).mean().item()


OBJECTIVES: dict[str, tuple[Callable, Callable, Callable]] = {  # of real and fake logits; of the autoencoder
    "hinge": (lambda r: (1 - r).clamp(min=0), lambda f: (1 + f).clamp(min=0), lambda f: -f),
    "lsgan": (lambda r: (r - 1) ** 2 / 2, lambda f: f**2 / 2, lambda f: (f - 1) ** 2 / 2),
    "non_saturating": (
        lambda r: (1 + (-r).exp()).log(),
        lambda f: (1 + f.exp()).log(),
        lambda f: (1 + (-f).exp()).log(),
    ),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_discriminator_and_autoencoder_have_the_objective_asked_for(vae, kind):
    seen, line = vae(DISC_ALONE), vae(f"{DISC_ALONE} --disc_loss {kind}").lines[0]
    of_real, of_fake, of_autoencoder = OBJECTIVES[kind]
    assert line["d_loss"] == pytest.approx(means(seen.real, of_real) + means(seen.fake, of_fake), rel=1e-4)
    assert line["g_loss"] == pytest.approx(means(seen.fake, of_autoencoder), rel=1e-4, abs=1e-6)


def gradient(run: SimpleNamespace, network: str, beta: float) -> Tensor:
    """The gradient of a run's only step, as Adam stored it."""
    moments = run.content["optimizers"][network]["optimizer"]["state"].values()
    return torch.cat([m["exp_avg"].flatten() for m in moments]) / (1 - beta)


def test_r1_is_weighted_by_its_flag_and_by_the_steps_between(vae):
    flags = f"{DISC_ALONE} --disc_optim.grad_clip none"
    plain, one, two, rare = (
        gradient(vae(f"{flags} {more}"), "discriminator", 0.5)
        for more in (
            "",
            "--r1_weight 1 --r1_every 1",
            "--r1_weight 2 --r1_every 1",
            "--r1_weight 1 --r1_every 2",
        )
    )
    assert (one - plain).abs().max() > 1e-3
    for twice in (two, rare):
        torch.testing.assert_close(twice - plain, 2 * (one - plain), rtol=1e-3, atol=1e-5)


def first_change(vae: Callable, network: str, flags: str) -> tuple[Tensor, Tensor]:
    """The weights of a network at first, and after one step."""

    def weights(run: SimpleNamespace) -> Tensor:
        content = run.content["model"] if network == "autoencoder" else run.content["others"][network]
        return torch.cat([v.flatten() for v in content.values()])

    disc = f"{DISC} --disc_weight 0.1" if network == "discriminator" else BARE
    return weights(vae(f"{disc} --optim.lr 1e-12 --disc_optim.lr 1e-12")), weights(vae(f"{disc} {flags}"))


@pytest.mark.parametrize(("network", "key"), [("autoencoder", "optim"), ("discriminator", "disc_optim")])
def test_learning_rate_and_decay_are_those_of_the_network_s_own_optimizer(vae, network, key):
    start, end = first_change(vae, network, f"--{key}.lr 0.003")
    assert (end - start).abs().max().item() == pytest.approx(0.003, rel=1e-2)  # Adam's first step
    _, decayed = first_change(vae, network, f"--{key}.lr 0.003 --{key}.weight_decay 5")
    torch.testing.assert_close(decayed - end, -0.003 * 5 * start, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("network", "key"), [("autoencoder", "optim"), ("discriminator", "disc_optim")])
def test_the_moments_of_a_network_decay_by_its_betas_and_its_gradient_is_clipped(vae, network, key):
    base = f"{DISC} --disc_weight 0.1 --optim.lr 1e-12"
    moments = {}
    for name, flags in (("one", "0.9,0.9"), ("other", "0.6,0.5")):
        run = vae(f"{base} --{key}.adam_betas {flags} --{key}.grad_clip none")
        moments[name] = next(iter(run.content["optimizers"][network]["optimizer"]["state"].values()))
    torch.testing.assert_close(moments["other"]["exp_avg"], 4 * moments["one"]["exp_avg"])
    torch.testing.assert_close(moments["other"]["exp_avg_sq"], 5 * moments["one"]["exp_avg_sq"])
    clipped = gradient(vae(f"{base} --{key}.adam_betas 0.5,0.9 --{key}.grad_clip 1e-3"), network, 0.5)
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-2)


# flags of four steps with batches of 4 -> learning rates, as shares of that of tests/tiny.py
RATES: dict[str, list[float]] = {
    "--optim.lr_scaling sqrt": [0.5**0.5] * 4,
    "--optim.lr_scaling linear": [0.5] * 4,
    "--optim.lr_scaling linear --optim.reference_batch_size 2": [2.0] * 4,
    "--optim.warmup_steps 3": [1 / 3, 2 / 3, 1, 1],
    "--optim.schedule cosine --optim.min_lr_ratio 0.2": [
        0.2 + 0.4 * (1 + math.cos(math.pi * k / 4)) for k in range(4)
    ],
    "--optim.schedule multistep --optim.milestones 1,3 --optim.gamma 0.5": [1, 0.5, 0.5, 0.25],
}


@pytest.mark.parametrize("flags", RATES)
def test_the_learning_rate_follows_batch_size_warm_up_and_schedule(vae, flags):
    rates = [line["lr"] for line in vae(flags, 4).lines]
    assert rates == pytest.approx([LR * share for share in RATES[flags]])


def test_averaged_weights_keep_the_share_of_their_decay(vae):
    start, end = first_change(vae, "autoencoder", "--run.ema_decay 0.05")
    ema = vae(f"{BARE} --run.ema_decay 0.05").content["ema"]
    ema = torch.cat([v.flatten() for v in ema.values()])
    torch.testing.assert_close(ema - start, 0.95 * (end - start), rtol=1e-3, atol=1e-6)


def test_the_last_row_of_a_preview_is_the_difference_of_the_other_two(vae):
    rows = vae(BARE).sheets[0]
    assert list(rows) == ["original", "reconstruction", "difference"]
    for x, recon, difference in zip(*rows.values(), strict=True):
        assert abs(difference - (recon - x)).max() < 1e-6
        assert abs(difference).max() > 0.1


GAIN, ELASTIC = "--data.augment.max_gain", "--data.augment.max_elastic"
QUARTER = "--data.augment.rot90_axes 0,1"


def gain_and_bias(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(gain, bias), each (B,), of y = gain x + bias, which must hold where y is not clipped to [-1, 1]."""
    found = []
    for one, other in zip(x, y, strict=True):
        inside = other.abs() < 1
        a, b = one[inside].double(), other[inside].double()
        gain = (a - a.mean()).dot(b - b.mean()) / (a - a.mean()).square().sum()
        bias = b.mean() - gain * a.mean()
        assert (gain * a + bias - b).abs().max() < 1e-5
        found.append(torch.stack([gain, bias]))
    return torch.stack(found).unbind(1)


def test_patches_are_cut_from_the_middle_if_asked(vae):
    whole = vae(BARE).x
    middle = vae(f"{BARE} --data.patch 8,8 --data.crop centre").x
    assert torch.equal(middle, whole[..., 4:12, 6:14])
    assert not torch.equal(middle, vae(f"{BARE} --data.patch 8,8 --data.crop random").x)


def test_intensities_get_a_gain_and_a_bias_within_their_limits(vae):
    x, on = vae(BARE).x, f"{BARE} --data.augment.intensity 1 {GAIN}"
    gain, bias = gain_and_bias(x, vae(f"{on} 0 --data.augment.max_bias 0.4").x)
    assert (gain - 1).abs().max() < 1e-5
    assert 0.05 < bias.abs().max() <= 0.4
    gain, bias = gain_and_bias(x, vae(f"{on} 0.4 --data.augment.max_bias 0").x)
    assert 0.05 < (gain - 1).abs().max() <= 0.4
    assert bias.abs().max() < 1e-5


def test_an_elastic_deformation_moves_voxels_as_far_as_it_may(vae):
    x, on = vae(BARE).x, f"{BARE} --data.augment.elastic 1 {ELASTIC}"
    still, little, much = ((vae(f"{on} {share}").x - x).abs().mean() for share in (0, 0.02, 0.2))
    assert still < 1e-5
    assert still < little < much / 2


def test_colour_changes_each_channel_as_intensity_changes_all(vae):
    """The phantoms have one channel, for which gain and bias are drawn as for the whole image."""
    x, on = vae(BARE).x, f"{BARE} --data.augment.colour 1 {GAIN}"
    gain, bias = gain_and_bias(x, vae(f"{on} 0 --data.augment.max_bias 0.4").x)
    assert (gain - 1).abs().max() < 1e-5
    assert 0.05 < bias.abs().max() <= 0.4


AFFINE = f"{BARE} --data.augment.affine 1"
STILL = {"max_rotation": 0.0, "max_scale": 0.0, "max_shift": 0.0}


@pytest.mark.parametrize(
    ("name", "little", "much"), [("max_rotation", 3, 40), ("max_scale", 0.02, 0.4), ("max_shift", 0.01, 0.3)]
)
def test_rotation_scaling_and_shift_move_voxels_as_far_as_each_may(vae, name, little, much):
    def change(value: float) -> Tensor:
        limits = STILL | {name: value}
        flags = " ".join(f"--data.augment.{key} {limit}" for key, limit in limits.items())
        return (vae(f"{AFFINE} {flags}").x - vae(BARE).x).abs().mean()

    assert change(0.0) < 1e-5
    assert 1e-5 < change(little) < change(much) / 2


def test_flips_turn_about_half_of_the_samples_around(vae):
    x, flipped = vae(BARE).x, vae(f"{BARE} --data.augment.flip_axes 1").x
    turned = [torch.equal(a.flip(-1), b) for a, b in zip(x, flipped, strict=True)]
    assert any(turned)
    assert all(turn or torch.equal(a, b) for turn, a, b in zip(turned, x, flipped, strict=True))


def test_quarter_turns_are_in_the_plane_of_the_axes_asked_for(vae):
    x, turned = (vae(f"{BARE} --data.patch 12,12 --data.crop centre {flags}").x for flags in ("", QUARTER))
    turns = [
        [k for k in range(4) if torch.equal(a.rot90(k, (1, 2)), b)] for a, b in zip(x, turned, strict=True)
    ]
    assert all(turns)
    assert any(k != [0] for k in turns)


CODES = "--autoencoder vq --quantizer.codebook_size 8 --optim.lr 1e-12"  # the vectors stay as they are


def codebook(run: SimpleNamespace, name: str = "codebook") -> Tensor:
    return run.content["model"][f"quantizer.{name}"].double()


def vectors(run: SimpleNamespace) -> Tensor:
    """What the codebook of a run's first batch had to represent, (N, C_z)."""
    return run.latent.z.detach().movedim(1, -1).flatten(0, -2).double()


def test_the_codes_of_the_first_batch_are_moved_by_as_many_steps_of_k_means_as_asked(vae):
    """The error of the first batch falls with every step; no step leaves the codes random."""
    errors = []
    for steps in (0, 1, 30):
        run = vae(f"{CODES} --quantizer.revive_below 0 --quantizer.kmeans_steps {steps}")
        errors.append(torch.cdist(vectors(run), codebook(run)).amin(1).square().mean().item())
    assert errors[2] < errors[1] < errors[0]


def test_the_running_use_of_codes_keeps_the_share_of_their_decay(vae):
    """The second step of the same batches adds its counts c: n = decay n + (1 - decay) c."""
    start = codebook(vae(f"{CODES} --quantizer.revive_below 0"), "code_count")
    slow, fast = (
        codebook(vae(f"{CODES} --quantizer.revive_below 0 --quantizer.decay {decay}", 2), "code_count")
        for decay in (0.9, 0.6)
    )
    assert (slow - start).abs().max() > 0.1
    torch.testing.assert_close(fast - start, 4 * (slow - start), rtol=1e-4, atol=1e-4)


def test_codes_used_less_than_asked_are_revived(vae):
    (never,), (often,) = (
        vae(f"{CODES} --quantizer.kmeans_steps 0 --quantizer.revive_below {share}").lines
        for share in (0, 0.99)
    )
    assert never["codes_revived"] == 0
    assert often["codes_revived"] >= 8 - often["codes_used"] > 0


def test_a_discriminator_judges_as_many_scales_as_asked(vae):
    one, two = (vae(f"{DISC_ALONE} --disc.num_scales {num}") for num in (1, 2))
    assert [len(run.real) for run in (one, two)] == [1, 2]
    assert two.real[1].shape[2:].numel() < two.real[0].shape[2:].numel()
    assert two.lines[0]["d_loss"] != pytest.approx(one.lines[0]["d_loss"], rel=1e-4)


def test_a_discriminator_sees_intensities_in_the_range_asked_for(vae):
    run = vae(f"{DISC_ALONE} --disc_optim.lr 1e-12 --disc.image_range 0,3")
    config = from_dict(PatchDiscriminatorConfig, run.content["config"]["disc"])
    net = PatchDiscriminator(dataclasses.replace(config, image_range=(-1, 1)))
    net.load_state_dict(run.content["others"]["discriminator"])
    with torch.no_grad():
        close(run.real[0], net((run.x + 1) * 1.5).logits[0])


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_perceptual_loss_compares_the_fraction_of_slices_asked_for(tmp_path, monkeypatch, fraction):
    write_phantoms(tmp_path / "heads", 3, size=(16, 16, 16), spacing=(12.0, 12.0, 12.0))
    file = tiny.vgg_weights(tmp_path / "vgg.pth")
    flags = f"""--data.dims 3 --vae.dims 3 --batch_size 1 --perceptual_weight 1 --perceptual.weights {file}
     --perceptual.fraction {fraction}"""
    compared = spy(monkeypatch, PerceptualLoss, "distance")
    train_vae.main(tiny.vae_flags(tmp_path / "heads", tmp_path / "run", 1, *flags.split()))
    assert [len(args[1]) for args, _, _ in compared] == [round(16 * fraction)] * 3


# --- train_ldm.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ldm(vae_run, tmp_path_factory) -> Callable[..., SimpleNamespace]:
    """ldm(flags, autoencoder): a run of train_ldm.py of one step, once for each set of flags.

    content: the checkpoint. loss: of the first step, whose batch is mean, logvar, z_noise, u, noise,
    conditions. A new denoiser predicts 0, so that the loss is that of the target. latents: of the preview.
    sheets, real: its rows and cases. steps: how many its sampler took. maps: its labels of validation cases
    and of each of four samples.
    """
    place, made = tmp_path_factory.mktemp("wires"), {}

    def run(flags: str = "", autoencoder: Path = vae_run) -> SimpleNamespace:
        if (flags, autoencoder) not in made:
            folder = place / f"{len(made)}"
            with pytest.MonkeyPatch.context() as patch:
                losses = spy(patch, LatentDiffusion, "losses")
                sampled = spy(patch, DiffusionKernel, "sample")
                previews, sheets = spy(patch, train_ldm, "preview"), no_pictures(patch, train_ldm)
                maps = spy(patch, LatentDiffusion, "label_maps")
                train_ldm.main(tiny.ldm_flags(autoencoder, folder, 1, *flags.split()))
            (_, _, *batch), _, (loss, _) = losses[0]
            names = ("mean", "logvar", "z_noise", "u", "noise", "conditions", "mask", "weight", "places")
            made[flags, autoencoder] = SimpleNamespace(
                folder=folder,
                content=load(step_files(folder)[0]),
                loss=loss.detach(),
                **dict(zip(names, batch, strict=False)),
                latents=previews[0][2][1],
                real=[previews[0][0][1][i, i] for i in range(len(previews[0][0][1]))],
                sheets=sheets,
                steps=len(sampled[0][0][3]),
                maps=[result for _, _, result in maps[-5:]],
            )
        return made[flags, autoencoder]

    return run


def tables(run: SimpleNamespace, name: str, part: str = "train") -> Tensor:
    """The cached latents of a run, (cases, variants, C_z, *s), float64."""
    files = sorted(next((run.folder / "latents").glob(f"{part}-*")).glob(f"{name}-*.npy"))
    return torch.from_numpy(np.concatenate([np.load(file) for file in files])).double()


def clean(run: SimpleNamespace) -> Tensor:
    """The latents of a run's first batch, normalised by the mean and deviation of all that training sees."""
    mean, noise = tables(run, "mean"), tables(run, "logvar").exp()
    over = [0, 1, 3, 4]
    deviation = (mean.var(over, correction=0) + noise.mean(over)).sqrt()
    z = run.mean + (run.logvar / 2).exp() * run.z_noise
    return (z.double() - mean.mean(over).view(-1, 1, 1)) / deviation.view(-1, 1, 1)


def alphas(betas: Tensor, run: SimpleNamespace) -> Tensor:
    """alpha_t of the samples of a run's first batch, for the betas of a process."""
    return (1 - betas).cumprod(0)[(run.u.double() * len(betas)).long()].sqrt()


def flow_time(run: SimpleNamespace, shift: float = 1.0, logit: tuple[float, float] | None = None) -> Tensor:
    t = run.u.double()
    if logit:
        t = torch.sigmoid(logit[0] + logit[1] * torch.distributions.Normal(0.0, 1.0).icdf(t))
    return shift * t / (1 + (shift - 1) * t)


def v_target(run: SimpleNamespace, alpha: Tensor, sigma: Tensor) -> Tensor:
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (alpha, sigma))
    return alpha * run.noise - sigma * clean(run)


def flow_v(*time: Any) -> Callable[[SimpleNamespace], Tensor]:
    """The target of --kernel.prediction v at times of flow."""
    return lambda run: v_target(run, 1 - flow_time(run, *time), flow_time(run, *time))


def vp_v(betas: Tensor) -> Callable[[SimpleNamespace], Tensor]:
    """The target of --kernel.prediction v at times of the process with these betas."""
    return lambda run: v_target(run, alphas(betas, run), (1 - alphas(betas, run).square()).sqrt())


def line(first: float, last: float, T: int = 1000) -> Tensor:
    return torch.linspace(first, last, T, dtype=torch.float64)


def cosine(T: int = 1000) -> Tensor:
    t = torch.arange(T + 1, dtype=torch.float64) / T
    cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - cumprod[1:] / cumprod[:-1]).clamp(max=0.999)


def ending_in_noise(betas: Tensor) -> Tensor:
    """The betas whose alphas run linearly, as a function of the former alphas, to exactly 0."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    square = torch.cat([torch.ones(1, dtype=alpha.dtype), alpha.square()])
    return 1 - square[1:] / square[:-1]


V, VP_V = "--kernel.prediction v", "--kernel.process vp --kernel.prediction v"
USUAL = line(0.0015**0.5, 0.0195**0.5).square()
TARGETS: dict[str, Callable[[SimpleNamespace], Tensor]] = {  # flags -> what the denoiser should predict
    "": lambda run: run.noise - clean(run),
    "--kernel.prediction x_start": clean,
    "--kernel.process vp --kernel.prediction eps": lambda run: run.noise,
    "--kernel.process vp --kernel.prediction x_start": clean,
    V: flow_v(),
    f"{V} --kernel.flow_shift 4": flow_v(4.0),
    f"{V} --kernel.flow_base 2": lambda run: flow_v(math.prod(run.noise.shape[2:]) ** 0.5 / 2)(run),
    f"{V} --kernel.t_distribution logit_normal": flow_v(1.0, (0.0, 1.0)),
    f"{V} --kernel.t_distribution logit_normal --kernel.logit_mean 0.8 --kernel.logit_std 0.5": flow_v(
        1.0, (0.8, 0.5)
    ),
    VP_V: vp_v(USUAL),
    f"{VP_V} --kernel.num_timesteps 10": vp_v(line(0.0015**0.5, 0.0195**0.5, 10).square()),
    f"{VP_V} --kernel.beta_start 0.01 --kernel.beta_end 0.09": vp_v(line(0.1, 0.3).square()),
    f"{VP_V} --kernel.schedule linear": vp_v(line(0.0015, 0.0195)),
    f"{VP_V} --kernel.schedule sqrt": vp_v(line(0.0015, 0.0195).sqrt()),
    f"{VP_V} --kernel.schedule cosine": vp_v(cosine()),
    f"{VP_V} --kernel.zero_terminal_snr true": vp_v(ending_in_noise(USUAL)),
}


def test_times_of_a_batch_are_evenly_apart_unless_drawn_one_by_one(ldm):
    together, alone = (ldm(flags).u.sort()[0] for flags in ("", "--kernel.stratified_t false"))
    torch.testing.assert_close(together.diff(), torch.full((len(together) - 1,), 1 / len(together)))
    assert (alone.diff() - 1 / len(alone)).abs().max() > 0.01


@pytest.mark.parametrize("cached", ["", "--latent_cache false"])
def test_the_last_steps_see_cases_without_augmentation(ldm, vae_run, tmp_path, monkeypatch, cached):
    plain = tables(ldm(), "mean")[:, 0].float()
    flags = f"--data.augment.intensity 1 --data.num_variants 2 --plain_end 0.5 {cached}".split()
    losses = spy(monkeypatch, LatentDiffusion, "losses")
    no_pictures(monkeypatch, train_ldm)
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 4, *flags))
    trained = [args[2] for args, _, _ in losses if len(args) > 7 and args[7] is not None][:4]
    assert len(trained) == 4
    for step, mean in enumerate(trained):
        nearest = (mean[:, None] - plain).flatten(2).abs().amax(2).amin(1)
        assert (nearest.max() < 1e-4) == (step >= 2)


@pytest.mark.parametrize(("share", "step"), [("0.4", 2), ("0", None)])
def test_a_run_keeps_its_averaged_weights_of_an_early_step(vae_run, tmp_path, monkeypatch, share, step):
    no_pictures(monkeypatch, train_ldm)
    flags = ["--run.save_every", "1", "--run.keep", "4", "--early", share]
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 4, *flags))
    early = tmp_path / "run" / "early.pt"
    assert early.exists() == (step is not None)
    if step:
        kept, checkpoint = load(early), load(tmp_path / "run" / f"checkpoint_{step:07d}.pt")
        assert (kept["kind"], kept["step"]) == ("ldm", step)
        assert all(torch.equal(kept["ema"][name], value) for name, value in checkpoint["ema"].items())


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--data.augment.affine 0", {"data.num_variants": 1, "plain_end": 0.0}),
        (
            "--data.num_variants 1",
            {"data.augment.affine": 0.0, "data.augment.max_scale": 0.1, "plain_end": 0.0},
        ),
        ("--latent_cache false --data.num_variants 1", {}),
        ("--run.init x --lora.rank 4", {"optim.optimizer": "adamw", "optim.lr": 1e-3}),
        ("--run.init x --lora.rank 4 --optim.lr 2e-3", {"optim.optimizer": "adamw"}),
        ("--run.init x --lora.rank 4 --optim.optimizer muon", {}),
    ],
)
def test_flags_change_what_they_leave_without_effect_in_a_preset(flags, changed, tmp_path, capsys):
    def uncut(config):  # as stage two takes its data settings from the autoencoder
        return replace(config, {"data.crop": "centre"})

    words = ["hippocampus", "--run.dir", str(tmp_path), *flags.split()]
    config, given = parse(train_ldm.Config, words, train_ldm.PRESETS, base=uncut)
    before, now = flatten(config), flatten(train_ldm.settled(config, given))
    assert {key: value for key, value in now.items() if value != before[key]} == changed
    said = capsys.readouterr().out
    assert bool(said) == bool(changed)
    assert [key for key in changed if f"{key} " not in said] == []


def mean_square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1)


@pytest.mark.parametrize("flags", TARGETS)
def test_a_denoiser_learns_the_target_of_its_kernel(ldm, flags):
    run = ldm(flags)
    expected = mean_square(TARGETS[flags](run))
    torch.testing.assert_close(run.loss.double(), expected, rtol=1e-4, atol=1e-5)
    for other in TARGETS.values():  # so that a flag without effect is found
        assert other is TARGETS[flags] or (mean_square(other(run)) - expected).abs().max() > 1e-3


def test_absolute_errors_are_taken_if_asked(ldm):
    run = ldm("--kernel.loss l1")
    expected = (run.noise - clean(run)).abs().flatten(1).mean(1)
    torch.testing.assert_close(run.loss.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_start"])
def test_min_snr_weighs_the_error_of_x_start_by_the_bounded_ratio(ldm, prediction):
    flags = f"--kernel.process vp --kernel.prediction {prediction}"
    plain, run = ldm(flags), ldm(f"{flags} --kernel.min_snr_gamma 2")
    alpha = alphas(USUAL, run)
    ratio = alpha.square() / (1 - alpha.square())
    error_of_x_start = {"eps": 1 / ratio, "v": 1 - alpha.square(), "x_start": torch.ones(4)}[prediction]
    expected = plain.loss * ratio.clamp(max=2) * error_of_x_start
    torch.testing.assert_close(run.loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_estimates_are_clipped_and_previews_take_the_steps_asked_for(ldm):
    run = ldm(f"{VP_V} --kernel.clip_x_start 0.1 --sample_steps 3")
    assert run.latents.abs().max().item() == pytest.approx(0.1)
    assert ldm(VP_V).latents.abs().max() > 0.5
    assert (run.steps, ldm(VP_V).steps) == (3, 2)


def test_variants_of_a_case_are_encoded_as_often_as_asked_and_differ(ldm):
    run = ldm("--data.augment.intensity 1 --data.num_variants 3")
    assert [tables(r, "mean").shape[1] for r in (ldm(), run)] == [1, 3]
    assert tables(run, "mean", "val").shape[1] == 1
    means = tables(run, "mean")
    assert all((means[:, i] != means[:, j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))


NONE = "--condition.dropout 0 --condition.dropout_all 0 --condition.dropout_last 0"
HIDDEN: dict[str, tuple[bool, bool]] = {  # flags -> whether (nearly) every class, label map is hidden
    NONE: (False, False),
    f"{NONE} --condition.dropout 0.9999": (True, True),
    f"{NONE} --condition.dropout 0.9999,0": (True, False),
    f"{NONE} --condition.dropout 0,0.9999": (False, True),
    f"{NONE} --condition.dropout_all 0.9999": (True, True),
    f"{NONE} --condition.dropout_last 0.9999": (False, True),
}


@pytest.mark.parametrize("flags", HIDDEN)
def test_training_hides_the_conditions_that_dropout_names(ldm, conditional_run, flags):
    run = ldm(f"--condition.use class,labels {flags}", conditional_run.parent / "vae")
    seen = [absent(run.conditions[name]) for name in ("class", "labels")]
    assert [gone.unique().tolist() for gone in seen] == [[hidden] for hidden in HIDDEN[flags]]


def test_a_denoiser_learns_from_patches_of_the_sizes_asked_for(ldm):
    for flags, size in (("--patch.halvings 0", 4), ("--patch.halvings 1 --run.seed 7", 2)):
        run = ldm(f"--patch.size 4,4 --patch.share 0 {flags}")
        assert run.mean.shape == run.noise.shape == (4, 3, size, size)
        whole = tables(run, "mean").float().flatten(0, 1)
        patches = whole.unfold(2, size, 1).unfold(3, size, 1).movedim(1, 3).flatten(0, 2)
        assert all((one == patches).flatten(1).all(1).any() for one in run.mean)
        assert run.places.shape == (4, 2, size, size)
        step = run.places[0, 0, 1, 0] - run.places[0, 0, 0, 0]
        assert step.item() == pytest.approx(48 / 110)  # a latent voxel in mm, over half of the longest side
    assert ldm("--patch.size 4,4 --patch.share 0.999999").mean.shape == (4, 3, 4, 5)


def test_a_denoiser_that_saw_patches_alone_validates_and_samples_in_windows(ldm, drawn, monkeypatch):
    run = ldm("--patch.size 4,4 --patch.share 0 --patch.halvings 0")
    calls = spy(monkeypatch, Denoiser, "forward")
    drawn(run.folder, "--num 1 --steps 1")
    assert [tuple(args[1].shape) for args, _, _ in calls] == [(2, 3, 4, 4)]
    left, right = calls[0][1]["positions"]
    assert (right[1, 0, 0] - left[1, 0, 0]).item() == pytest.approx(44 / 110)


def test_previews_of_a_denoiser_that_saw_patches_alone_show_the_middle_of_volumes(vae_run, ldm, monkeypatch):
    calls = spy(monkeypatch, train_ldm, "denoise_once")
    run = ldm(f"--patch.size 4,2 --patch.share 0 --patch.halvings 0 {' '.join(tiny.BOUND)}")
    assert run.latents.shape == (4, 3, 4, 2)  # of latents of 4 x 5
    (rows,), (seen, *_) = run.sheets, run.maps
    assert {part.shape[:2] for row in rows.values() for part in row} == {(16, 8)}
    images, masks = ([case[role][..., 4:12] for case in run.real[:4]] for role in ("image", "mask"))
    assert np.array_equal(rows["real (validation)"], [x[0] for x in images])
    for title, maps in (("labels (validation)", masks), ("labels of the head (validation)", seen)):
        expected = [part for x, mask in zip(images, maps, strict=False) for part in overlay(x, mask)]
        assert np.array_equal(rows[title], expected), title
    (model, mean, _, _), _, _ = calls[0]
    assert torch.equal(mean[0].double(), tables(run, "mean", "val")[0, 0][:, :, 1:3])
    assert model.denoiser_for(mean.shape[2:]) is model.denoiser


def test_a_plan_counts_the_patches_that_are_trained_on(vae_run):
    for share, size in (("0", (4, 4)), ("0.5", (4, 5))):
        flags = tiny.ldm_flags(vae_run, vae_run, 1, "--patch.size", "4,4", "--patch.share", share)
        config, _ = parse(train_ldm.Config, flags, train_ldm.PRESETS, "", train_ldm.with_autoencoder)
        jobs = train_ldm.memory_table(config).jobs
        # what is encoded is whole, what previews decode is no larger than what the denoiser has seen
        assert [job.size for job in jobs] == [size, (16, 20), (16, 4 * size[1])]


def test_previews_show_the_labels_of_the_masks_and_of_the_head(ldm):
    run = ldm(" ".join(tiny.BOUND))
    (rows,), (seen, *sampled) = run.sheets, run.maps
    images, masks = ([case[role] for case in run.real[:4]] for role in ("image", "mask"))
    for title, maps in (("labels (validation)", masks), ("labels of the head (validation)", seen)):
        expected = [part for x, mask in zip(images, maps, strict=False) for part in overlay(x, mask)]
        assert np.array_equal(rows[title], expected), title
    assert len(rows["labels of the head (generated)"]) == len(sampled) == 4


# --- train_cdal.py ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cdal(heads, tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """cdal(flags): a run of train_cdal.py of one step, once for each set of flags.

    line: of the log. content: the checkpoint. times: t of the first batch. votes: in each call of the network
    in validation. step: what the first step was given, by name. seen: the noisy masks that the generator got.
    output: what it made of these. hidden: the discriminator's maps at first. pair: what it learnt from.
    """
    place, made = tmp_path_factory.mktemp("wires"), {}

    def run(flags: str) -> SimpleNamespace:
        if flags not in made:
            folder = place / f"{len(made)}"
            with pytest.MonkeyPatch.context() as patch:
                no_pictures(patch, train_cdal)
                times, votes = spy(patch, CDAL, "t_from_uniform"), spy(patch, CDAL, "vote")
                steps, made_of = spy(patch, CDAL, "losses"), spy(patch, Generator, "forward")
                judged = spy(patch, TimeDiscriminator, "forward")
                train_cdal.main(tiny.cdal_flags(heads, folder, 1, *flags.split()))
            made[flags] = SimpleNamespace(
                line=tiny.lines(folder)[0],
                content=load(step_files(folder)[0]),
                times=times[0][2].tolist(),
                votes=[len(args[3]) for args, _, _ in votes],
                step=dict(zip(("image", "mask", "u", "draw"), steps[0][0][4:], strict=True)),
                pair=steps[0][2][1],
                seen=made_of[0][0][1],
                output=made_of[0][2][0].detach(),
                hidden=judged[0][2].features if judged else None,
            )
        return made[flags]

    return run


ALONE = "--cdal.adversarial_weight 0 --cdal.attention none"
OVERLAPS: dict[str, dict[str, float]] = {  # flags -> the weights of the terms of the loss
    ALONE: {"ce": 1, "dice": 1},
    f"{ALONE} --cdal.mse_weight 0.5 --cdal.ce_weight 0.2 --cdal.dice_weight 3": {
        "mse": 0.5,
        "ce": 0.2,
        "dice": 3,
    },
    "--cdal.adversarial_weight 0.3 --cdal.attention none": {"ce": 1, "dice": 1, "g_loss": 0.3},
}


@pytest.mark.parametrize("flags", OVERLAPS)
def test_each_term_has_the_weight_of_its_flag_in_the_loss_of_a_segmentation_network(cdal, flags):
    line = cdal(flags).line
    assert all(line[term] > 0.01 for term in OVERLAPS[flags])
    assert line["loss"] == pytest.approx(sum(w * line[term] for term, w in OVERLAPS[flags].items()))


def test_coarser_levels_learn_the_mask_if_asked(cdal):
    plain, deep = cdal(ALONE), cdal(f"{ALONE} --generator.deep_supervision true")
    heads = {name for name in deep.content["model"] if name.startswith("heads.")}
    assert (
        heads
        == {"heads.0.weight", "heads.0.bias"}
        == deep.content["model"].keys() - plain.content["model"].keys()
    )
    assert deep.line["loss"] == pytest.approx(
        sum(deep.line[name] for name in ("ce", "dice", "coarse")), rel=1e-4
    )
    assert "coarse" not in plain.line


def test_attention_weighs_the_voxels_of_the_loss(cdal):
    """By weights of mean 1: the cross-entropy of a new network, which is log 5 everywhere, stays."""
    plain, weighted = cdal(ALONE).line, cdal("--cdal.attention loss --cdal.adversarial_weight 0").line
    assert plain["ce"] == pytest.approx(math.log(5), rel=1e-5)
    assert weighted["ce"] == pytest.approx(math.log(5), rel=1e-5)
    assert abs(plain["dice"] - weighted["dice"]) > 1e-5


def attention(run: SimpleNamespace, layer: int, normalised: bool) -> Tensor:
    """Where the discriminator of a run's first step looked, (B, *S)."""
    maps = run.hidden[layer].mean(1, keepdim=True)
    a = F.interpolate(maps, run.seen.shape[2:], mode="bilinear")[:, 0]
    if normalised:
        a = torch.sigmoid((a - a.mean((1, 2), True)) / a.std((1, 2), correction=0, keepdim=True))
        a = a / a.mean((1, 2), keepdim=True)
    return a


def one_hot(run: SimpleNamespace) -> Tensor:
    return torch.stack([2.0 * (run.step["mask"] == k) - 1 for k in range(5)], 1)


WHERE = [(layer, normalised) for layer in (0, -1) for normalised in (True, False)]


@pytest.mark.parametrize(("layer", "normalised"), WHERE)
def test_the_generator_sees_the_true_mask_times_the_attention_of_the_layer_asked_for(cdal, layer, normalised):
    run = cdal(
        f"--cdal.attention input --cdal.own_estimate false --cdal.attention_layer {layer} "
        f"--cdal.attention_normalised {str(normalised).lower()}"
    )
    y, a = one_hot(run), attention(run, layer, normalised)
    levels = (1e-3 + (1 - 1e-3) * torch.arange(3, dtype=torch.float64) / 2)[torch.tensor(run.times) + 1]
    kept = torch.exp(-(levels**2) * (20 - 0.1) / 2 - levels * 0.1) * (1 - 1e-8)  # beta from 0.1 to 20
    start = math.exp(-(1e-3**2) * (20 - 0.1) / 2 - 1e-3 * 0.1)
    signal, noise = (v.float().view(-1, 1, 1, 1) for v in ((kept / start).sqrt(), (1 - kept / start).sqrt()))
    expected = signal * a[:, None] * y + noise * run.step["draw"]("attended", *y.shape[1:])
    torch.testing.assert_close(run.seen, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [0, -1])
def test_the_loss_is_weighted_by_the_attention_of_the_layer_asked_for(cdal, layer):
    """Seen in the Dice: a new network gives all voxels the same error, and the weights have mean 1."""
    run = cdal(f"--cdal.attention loss --cdal.attention_layer {layer}")
    p, y = run.output.softmax(1), (one_hot(run) + 1) / 2

    def dice(weight: Tensor) -> float:
        both, either = ((weight[:, None] * v)[:, 1:].sum((2, 3)) for v in (p * y, p + y))
        return (1 - (2 * both + 1) / (either + 1)).mean().item()

    weighted = dice(attention(run, layer, True))
    assert run.line["dice"] == pytest.approx(weighted, rel=1e-4)
    assert weighted != pytest.approx(dice(torch.ones(y.shape[0], *y.shape[2:])), rel=1e-4)


def test_the_generator_trains_on_the_noised_true_mask_or_on_its_own_estimate_as_asked(cdal):
    flags = "--cdal.attention none --cdal.noisiest 0.5 --cdal.own_estimate"
    true, own = cdal(f"{flags} false"), cdal(f"{flags} true")
    assert {0, 1} == set(own.times)
    assert torch.equal(true.seen, true.pair["x_prev"])
    for t, seen, noised in zip(own.times, own.seen, own.pair["x_prev"], strict=True):
        assert torch.equal(seen, noised) == (t == 1)  # at the noisiest time there is no own estimate


def test_the_noised_mask_is_scaled_as_asked(cdal):
    """The first steps of two runs differ in nothing but the scale of the mask."""
    flags = f"{ALONE} --cdal.own_estimate false --cdal.kernel.input_scale"
    whole, scaled = cdal(f"{flags} 1"), cdal(f"{flags} 0.25")
    method = CDAL(CDALConfig(kernel=FewStepConfig(input_scale=0.25)), 5)
    t = torch.tensor(scaled.times)
    signal = method.kernel.alphas_cumprod[t + 1].view(-1, 1, 1, 1)
    less = whole.seen.double() - 0.75 * signal.sqrt() * one_hot(whole)
    torch.testing.assert_close(scaled.seen, method.unit(less.float(), t))


def test_validation_scores_the_votes_against_all_raters(heads, tmp_path, monkeypatch):
    no_pictures(monkeypatch, train_cdal)
    raters = tmp_path / "raters"
    raters.mkdir()
    for path in (heads / "labels").iterdir():
        volume, name = read(path), path.name.partition(".")[0]
        for rater, labels in (("a", volume.array), ("b", np.minimum(volume.array, 1)), ("c", volume.array)):
            write(raters / f"{name}__{rater}.tif", Volume(labels.astype(np.uint8), volume.affine, None))
    images = tmp_path / "images"
    images.symlink_to(heads / "images")
    calls = spy(monkeypatch, train_cdal, "squared_ged")
    flags = [*"--votes 2 --data.image images/* --data.mask".split(), "raters/{id}__{rater}.tif"]
    run = tmp_path / "run"
    train_cdal.main(tiny.cdal_flags(tmp_path, run, 1, *ALONE.split(), *flags, "--run.eval_every", "1"))
    (line,) = tiny.lines(run, "val")
    assert [(len(votes), len(masks)) for (votes, masks), _, _ in calls] == [(2, 3)] * 2
    assert line["ged"] == pytest.approx(np.mean([found for _, _, found in calls]))
    assert load(run / "best.pt")["best"]["name"] == "ged"


def test_the_share_of_patches_asked_for_lies_around_a_voxel_of_the_mask(cdal):
    def share(fraction: float) -> float:
        masks = cdal(f"{ALONE} --batch_size 32 --data.patch 4,4 --data.foreground {fraction}").step["mask"]
        return (masks[:, 1:3, 1:3].flatten(1).amax(1) > 0).float().mean().item()

    assert share(0) < share(0.5) < share(1) == 1


def test_the_r1_of_a_segmentation_s_discriminator_is_weighted_by_its_flags(cdal):
    flags = "--disc_optim.grad_clip none --cdal.r1_weight"
    plain, one, two, rare = (
        gradient(cdal(f"{flags} {weight} --cdal.r1_every {every}"), "discriminator", 0.5)
        for weight, every in ((0, 1), (10_000, 1), (20_000, 1), (10_000, 2))
    )
    assert (one - plain).abs().max() > 1e-2
    for twice in (two, rare):
        torch.testing.assert_close(twice - plain, 2 * (one - plain), rtol=1e-3, atol=1e-5)


def test_the_discriminator_sees_the_image_if_asked(cdal):
    def channels(flags: str) -> int:
        weights = cdal(flags).content["others"]["discriminator"].values()
        return next(w for w in weights if w.ndim == 4).shape[1]

    assert channels("--cdal.disc_sees_image true") == channels("--cdal.disc_sees_image false") + 1


def test_a_segmentation_trains_at_its_noisiest_time_as_often_as_asked(cdal):
    times = cdal(f"{ALONE} --cdal.noisiest 1").times
    assert len(set(times)) == 1
    assert max(cdal(f"{ALONE} --cdal.noisiest 0").times) < times[0]


def test_validation_takes_votes_and_windows_as_asked(cdal):
    cases = 2  # of 16 x 20 voxels
    assert cdal(f"{ALONE} --votes 3").votes == [3] * cases
    assert cdal(f"{ALONE} --window 16,12").votes == [1] * 3 * cases


def test_a_segmentation_goes_on_with_the_network_of_another_run(heads, tmp_path, monkeypatch, capsys):
    """Not with the preset's or a planned one: shapes would not tell groups, times and outputs."""
    monkeypatch.chdir(tmp_path)
    odd = "--unet.num_groups 2 --unet.head_channels 4 --generator.output tanh --cdal.kernel.num_timesteps 3"
    train_cdal.main(tiny.cdal_flags(heads, tmp_path / "one", 1, *f"{odd} {ALONE}".split()))
    data = f"--data.root {heads} --data.cache_dir {heads.parent / 'cache'} --data.patch 12,12".split()
    start = "--run.steps 1 --optim.warmup_steps 0 --optim.lr 1e-9 --run.ema_decay 0 --run.init one".split()
    train_cdal.main(["phantom", *data, "--data.dims", "2", *start, "--run.dir", "two"])
    assert "run.init: as in one: unet.channels 8,16" in capsys.readouterr().out
    more = "--run.dir three --unet.dropout 0.1 --generator.deep_supervision true".split()
    train_cdal.main([str(heads), *start, *more])
    one, *others = (load(Path(name) / "best.pt") for name in ("one", "two", "three"))
    for other in others:
        assert {**other["config"]["generator"], "deep_supervision": False} == one["config"]["generator"]
        assert other["config"]["cdal"]["kernel"] == one["config"]["cdal"]["kernel"]
        assert {**other["config"]["unet"], "dropout": 0.0} == one["config"]["unet"]
        for name, value in one["ema"].items():
            assert torch.allclose(other["ema"][name], value, atol=1e-6)


# --- optimizers of all scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "network", "key"),
    [("ldm", "denoiser", "optim"), ("cdal", "generator", "optim"), ("cdal", "discriminator", "disc_optim")],
)
def test_each_network_has_the_optimizer_of_its_flags(request, script, network, key):
    flags = {
        "lr": "3e-4",
        "adam_betas": "0.6,0.5",
        "weight_decay": "0.2",
        "lr_scaling": "sqrt",
        "grad_clip": "1e-3",
    }
    words = " ".join(f"--{key}.{name} {value}" for name, value in flags.items())
    run = request.getfixturevalue(script)(f"{words} --run.ema_decay 0")
    (group,) = run.content["optimizers"][network]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(3e-4 * 0.5**0.5)  # 4 samples instead of 8
    assert tuple(group["betas"]) == (0.6, 0.5)
    assert group["weight_decay"] == 0.2
    assert gradient(run, network, 0.6).norm().item() == pytest.approx(1e-3, rel=1e-2)
    for name, value in run.content["model"].items():
        assert torch.equal(run.content["ema"][name], value)


@pytest.mark.parametrize(
    ("script", "network", "key"),
    [("ldm", "denoiser", "optim"), ("cdal", "generator", "optim"), ("cdal", "discriminator", "disc_optim")],
)
def test_each_network_has_muon_for_its_matrices_if_asked_for(request, script, network, key):
    words = f"--{key}.optimizer muon --{key}.lr 3e-4 --{key}.weight_decay 0.2"
    content = request.getfixturevalue(script)(words).content
    parts = {name: content["optimizers"][network][name]["param_groups"] for name in ("optimizer", "muon")}
    for (group,) in parts.values():
        assert (group["lr"], group["weight_decay"]) == (3e-4, 0.2)
        assert len(group["params"]) > 1


@pytest.mark.parametrize("script", ["ldm", "cdal"])
def test_averaged_weights_of_other_scripts_lag_behind_by_the_decay(request, script):
    run = request.getfixturevalue(script)("" if script == "ldm" else ALONE)
    assert any(not torch.equal(run.content["ema"][k], value) for k, value in run.content["model"].items())


# --- sample.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vp_run(vae_run) -> Path:
    """The run folder of a denoiser of --kernel.process vp, after twelve fast steps."""
    folder = vae_run.parent / "vp"
    flags = f"{VP_V} --kernel.num_timesteps 20 --optim.lr 1e-2".split()
    train_ldm.main(tiny.ldm_flags(vae_run, folder, 12, *flags))
    return folder


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Callable[..., Tensor]:
    """drawn(run, flags): the normalised latents that a command of sample.py decodes, one below the other."""
    no_pictures(monkeypatch, sampling)

    def run(run: Path, flags: str) -> Tensor:
        with monkeypatch.context() as patch:
            decoded = spy(patch, LatentDiffusion, "decode")
            out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            sample.main([str(run), "--out", str(out), *flags.split()])
        return torch.cat([args[1] for args, _, _ in decoded])

    return run


ONE_STEP = "--num 2 --steps 1 --sampler euler --condition class=1"  # x_0 = noise - prediction


def test_guidance_goes_along_the_line_from_no_condition_to_the_condition(drawn, conditional_run):
    none, plain, more, named = (
        drawn(conditional_run, f"{ONE_STEP} --guidance {scale}") for scale in ("0", "1", "100", "class=100")
    )
    assert (plain - none).abs().max() > 1e-4
    torch.testing.assert_close(more - none, 100 * (plain - none), rtol=1e-3, atol=1e-4)
    assert torch.equal(named, more)
    assert torch.equal(none, drawn(conditional_run, "--num 2 --steps 1 --sampler euler"))


def test_rescaling_gives_a_guided_prediction_the_deviation_of_the_plain_one(drawn, conditional_run):
    plain = drawn(conditional_run, ONE_STEP)
    guided = f"{ONE_STEP} --guidance 40 --guidance_rescale"
    off, half, full = (drawn(conditional_run, f"{guided} {phi}") for phi in (0, 0.5, 1))
    noise = [torch.randn(plain.shape[1:], generator=keyed_generator(0, i, "sample")) for i in range(2)]
    deviations = [(torch.stack(noise) - z).flatten(1).std(1) for z in (plain, off, full)]
    assert ((deviations[0] - deviations[1]) / deviations[0]).abs().max() > 1e-2
    torch.testing.assert_close(deviations[2], deviations[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half, (off + full) / 2, rtol=1e-4, atol=1e-5)


def test_guidance_acts_within_its_interval(drawn, conditional_run):
    plain = drawn(conditional_run, ONE_STEP)
    guided = f"{ONE_STEP} --guidance 3"
    assert torch.equal(drawn(conditional_run, f"{guided} --guidance_interval 0,0.5"), plain)
    within = drawn(conditional_run, f"{guided} --guidance_interval 0.5,1")
    torch.testing.assert_close(within, drawn(conditional_run, guided))


def test_autoguidance_goes_on_from_the_weaker_prediction_within_its_interval(drawn, conditional_run):
    earlier = conditional_run / "early.pt"
    weaker, plain = drawn(earlier, ONE_STEP), drawn(conditional_run, ONE_STEP)
    assert (weaker - plain).abs().max() > 1e-4
    command = f"{ONE_STEP} --autoguidance 4 --autoguidance_interval"
    torch.testing.assert_close(
        drawn(conditional_run, f"{command} 0,1"), weaker + 4 * (plain - weaker), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(drawn(conditional_run, f"{command} 0,0.9"), plain)
    two = "--num 2 --steps 2 --sampler euler --condition class=1"
    within = drawn(conditional_run, f"{two} --autoguidance 2")
    assert not torch.equal(within, drawn(conditional_run, two))
    spelled = f"{two} --autoguidance 2 --autoguidance_run {earlier} --autoguidance_interval 0.2,0.7"
    assert torch.equal(drawn(conditional_run, spelled), within)


def test_the_weaker_denoiser_is_compiled_and_counted_too(conditional_run, tmp_path, monkeypatch):
    no_pictures(monkeypatch, sampling)
    compiled, weighed = [], spy(monkeypatch, sampling, "weight_bytes")
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    for flags, nets in (("", 1), ("--autoguidance 2", 2)):
        words = [str(conditional_run), *flags.split()]
        sample.main(
            [*words, "--num", "1", "--steps", "1", "--compile", "--out", str(tmp_path / f"of-{nets}")]
        )
        assert [type(net) for net in compiled] == nets * [Denoiser]
        compiled.clear()
        sample.main([*words, "--plan"])
        assert sum(isinstance(args[0], Denoiser) for args, _, _ in weighed) == nets
        weighed.clear()


def test_ddim_with_all_of_its_noise_is_ddpm(drawn, vp_run):
    steps = "--num 2 --steps 5 --sampler"
    none, half, full = (drawn(vp_run, f"{steps} ddim --eta {eta}") for eta in (0, 0.5, 1))
    torch.testing.assert_close(full, drawn(vp_run, f"{steps} ddpm"), rtol=1e-4, atol=1e-4)
    assert torch.equal(none, drawn(vp_run, f"{steps} ddim"))
    assert min((half - none).abs().max(), (half - full).abs().max()) > 1e-2


def test_samplers_steps_and_seeds_are_those_asked_for(drawn, vp_run, monkeypatch):
    calls = spy(monkeypatch, DiffusionKernel, "sample")
    first = drawn(vp_run, "--num 3 --steps 4 --sampler ddim")
    assert len(calls[0][0][3]) == 4
    assert torch.allclose(drawn(vp_run, "--num 3 --steps 4 --sampler ddim --batch_size 1"), first, atol=1e-4)
    assert len(calls) == 1 + 3
    drawn(vp_run, "--num 3 --steps 4 --sampler ddim --seed 5")
    noise = torch.randn(first.shape[1:], generator=keyed_generator(5, 0, "sample"))
    assert torch.equal(calls[-1][0][2][0], noise)


LARGE = "--num 2 --steps 2 --size 28,32"  # latents of 7 x 8, windows of 4 x 5


def test_larger_samples_are_denoised_in_as_many_windows_as_asked(drawn, vp_run, monkeypatch, capsys):
    calls, plain = spy(monkeypatch, Denoiser, "forward"), drawn(vp_run, "--num 2 --steps 2")
    assert torch.equal(plain, drawn(vp_run, "--num 2 --steps 2 --size 16,20"))
    calls.clear()
    first = drawn(vp_run, LARGE)
    assert first.shape == (2, 3, 7, 8)
    shapes = [tuple(args[1].shape) for args, _, _ in calls]
    assert shapes == [(8, 3, 4, 5), (1, 3, 4, 5)] * 4  # 3 x 3 windows, two samples, two steps
    calls.clear()
    assert torch.allclose(drawn(vp_run, f"{LARGE} --batch_size 3"), first, atol=1e-4)
    assert [len(args[1]) for args, _, _ in calls] == [3] * 12
    for flags, windows in (("--overlap 0", 4), ("--window 28,20", 3), ("--window 28,32", 0)):
        calls.clear()
        other = drawn(vp_run, f"{LARGE} {flags} --batch_size 1")
        assert len(calls) == 4 * max(1, windows)
        assert f"2 steps = {2 * max(1, windows)} network calls each" in capsys.readouterr().out
        assert not torch.allclose(other, first, atol=1e-3)


def test_a_larger_sample_follows_a_source_and_a_mask_of_its_size(drawn, conditional_run, tmp_path):
    x = np.linspace(0, 1, 28 * 32, dtype=np.float32).reshape(1, 28, 32)
    source, mask = tmp_path / "source.tif", tmp_path / "mask.tif"
    write(source, Volume(x, np.diag([12.0, 11.0, 1.0])))
    write(mask, Volume((x > 0.5).astype(np.uint8), np.diag([12.0, 11.0, 1.0])))
    flags = f"--num 1 --steps 2 --size 28,32 --condition image={source} --condition class=1"
    one = drawn(conditional_run, flags)
    other = drawn(conditional_run, f"{flags} --condition labels={mask}")
    assert one.shape == other.shape == (1, 3, 7, 8)
    assert not torch.allclose(one, other, atol=1e-5)


def test_a_larger_sample_has_its_size_its_spacing_and_its_labels(bound_run, tmp_path, monkeypatch, capsys):
    no_pictures(monkeypatch, sampling)
    # in mm, of voxels of 12 x 11 mm: 23.4 x 39.6 voxels
    flags = "--num 1 --steps 1 --size 281mm,435.5mm --with-labels --maps --num 2 --format nii.gz"
    sample.main([str(bound_run), "--out", str(tmp_path / "out"), *flags.split()])
    for name in ("sample_0001", "labels/sample_0001", "maps/set_0000_mean"):
        volume = read(tmp_path / "out" / f"{name}.nii.gz", dims=2)
        assert volume.shape == (23, 40)
        assert volume.spacing == pytest.approx((12.0, 11.0))
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["size"] == [23, 40]
    assert "2 volumes of 23x40 (276x440 mm)" in capsys.readouterr().out
    sample.main([str(bound_run), "--plan", "--size", "1mm,435.5mm"])
    assert "1x40" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["tif", "nii.gz"])
def test_a_large_sample_is_decoded_and_written_in_planes(conditional_run, tmp_path, monkeypatch, suffix):
    """The same voxels and geometry as written whole, of a sample and of one with the geometry of a source."""
    no_pictures(monkeypatch, sampling)
    source = tmp_path / "source.tif"
    write(
        source, Volume(np.eye(26, 40, dtype=np.float32)[None], np.array([[9.0, 0, 5], [0, 7, -3], [0, 0, 1]]))
    )
    for flags in ("--num 2", f"--condition image={source}"):
        words = [str(conditional_run), "--steps", "1", "--size", "28,32", "--format", suffix, *flags.split()]
        sample.main([*words, "--out", str(tmp_path / "whole" / flags[:5])])
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "IN_MEMORY", 0)
            patch.setattr(segmentation, "IN_MEMORY", 0)
            patch.setattr(streaming, "SLAB", 64)
            whole = spy(patch, LatentDiffusion, "decode")
            arrays = spy(patch, sampling_request, "large_array")
            sample.main([*words, "--memory", "0", "--out", str(tmp_path / "planes" / flags[:5])])
            assert not whole
            assert all(isinstance(array, np.memmap) for _, _, array in arrays)
        a, b = (
            read(tmp_path / name / flags[:5] / f"sample_0000.{suffix}", dims=2)
            for name in ("whole", "planes")
        )
        assert np.abs(a.array - b.array).max() < 2e-5 * np.abs(a.array).max()
        assert np.array_equal(a.affine, b.affine)


@pytest.mark.parametrize("kind", ["ldm", "vae", "cdal"])
@pytest.mark.parametrize("suffix", ["tif", "nii.gz", "nii"])
def test_files_have_the_format_asked_for(request, heads, tmp_path, monkeypatch, kind, suffix):
    for module in (sampling, reconstruction, segmentation):
        no_pictures(monkeypatch, module)
    image = str(next((heads / "images").iterdir()))
    run = request.getfixturevalue({"ldm": "vp_run", "vae": "vae_run", "cdal": "cdal_run"}[kind])
    inputs = ["--num", "1", "--steps", "2"] if kind == "ldm" else [image]
    sample.main([str(run), *inputs, "--format", suffix, "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / ("labels" if kind == "cdal" else "")
    (file,) = (path for path in folder.iterdir() if ".tif" in path.name or ".nii" in path.name)
    assert file.name.endswith(f".{suffix}")
    assert read(file, dims=2).shape == (16, 20)


@pytest.mark.parametrize("kind", ["ldm", "vae", "evaluation"])
def test_autoencoders_keep_to_the_memory_asked_for(request, heads, tmp_path, monkeypatch, kind):
    for module in (sampling, reconstruction, evaluation_of_reconstructions):
        no_pictures(monkeypatch, module)
    calls = spy(monkeypatch, streaming.Stream, "run")
    run = str(request.getfixturevalue("vp_run" if kind == "ldm" else "vae_run"))
    image = str(next((heads / "images").iterdir()))
    words = {"ldm": [run, "--num", "1", "--steps", "2"], "vae": [run, image]}
    words["evaluation"] = ["reconstruct", run, "--resamples", "2"]
    main = evaluation_main if kind == "evaluation" else sample.main
    main([*words[kind], "--out", str(tmp_path / "whole")])
    assert not calls
    main([*words[kind], "--out", str(tmp_path / "slabs"), "--memory", "0"])
    trunks = {type(args[1]).__name__ for args, _, _ in calls}
    assert trunks == ({"Decoder"} if kind == "ldm" else {"Encoder", "Decoder"})
    assert {args[0].mode for args, _, _ in calls} == {"offload"}
    if kind == "evaluation":
        reports = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("whole", "slabs"))
        whole, slabs = (report["metrics"]["psnr"]["mean"] for report in reports)
        assert slabs == pytest.approx(whole, abs=0.01)  # dB


@pytest.mark.parametrize("script", ["train_vae", "train_ldm"])
def test_training_without_free_memory_encodes_and_validates_in_slabs(
    script, heads, vae_run, tmp_path, monkeypatch
):
    main, flags, data = (
        (train_vae.main, tiny.vae_flags, heads)
        if script == "train_vae"
        else (train_ldm.main, tiny.ldm_flags, vae_run)
    )
    calls = spy(monkeypatch, streaming.Stream, "run")
    main(flags(data, tmp_path / "whole", 2, "--run.eval_every", "2"))
    assert not calls
    main(flags(data, tmp_path / "asked", 2, "--run.eval_every", "2", "--memory", "0"))
    assert {type(args[1]).__name__ for args, _, _ in calls} == {"Encoder", "Decoder"}
    calls.clear()
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 0)
    main(flags(data, tmp_path / "slabs", 2, "--run.eval_every", "2"))
    assert {type(args[1]).__name__ for args, _, _ in calls} == {"Encoder", "Decoder"}
    for split in ("train", "val"):
        whole, slabs = (tiny.lines(tmp_path / name, split)[-1] for name in ("whole", "slabs"))
        assert whole.keys() == slabs.keys()
        for name in whole.keys() - tiny.MEASURED - {"split"}:
            limit = {"abs": 0.01} if name == "psnr" else {"rel": 1e-3, "abs": 1e-6}  # psnr: dB
            assert slabs[name] == pytest.approx(whole[name], **limit), name


@pytest.fixture
def segmented(heads, cdal_run, tmp_path, monkeypatch) -> Callable[[str], tuple[list[int], Tensor]]:
    """segmented(flags): (votes in each call of the network, probabilities (K, 16, 20)) of one head."""
    no_pictures(monkeypatch, segmentation)
    image = min((heads / "images").iterdir())

    def run(flags: str) -> tuple[list[int], Tensor]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with monkeypatch.context() as patch:
            calls = spy(patch, CDAL, "vote")
            sample.main([str(cdal_run), str(image), "--probabilities", "--out", str(out), *flags.split()])
        array = read(next((out / "probability").iterdir())).array
        return [len(args[3]) for args, _, _ in calls], torch.from_numpy(array)

    return run


def test_every_vote_is_written_if_asked(heads, cdal_run, tmp_path, monkeypatch):
    no_pictures(monkeypatch, segmentation)
    image = min((heads / "images").iterdir())
    calls = spy(monkeypatch, CDAL, "vote")
    for flags in ("", "--every_vote"):
        out = tmp_path / f"out{flags}"
        sample.main([str(cdal_run), str(image), "--votes", "3", "--out", str(out), *flags.split()])
        assert (out / "votes").exists() == bool(flags)
    name = image.name.partition(".")[0]
    found = sorted((out / "votes").iterdir())
    assert [path.name for path in found] == [f"{name}__{v:02d}.tif" for v in (1, 2, 3)]
    expected = calls[-1][2].argmax(1)
    assert [read(path).array[0].tolist() for path in found] == [vote.tolist() for vote in expected]
    assert np.array_equal(*(read(tmp_path / d / "labels" / f"{name}.tif").array for d in ("out", out.name)))


def test_level_sets_of_the_mean_are_written_if_asked(heads, cdal_run, tmp_path, monkeypatch, mistake):
    no_pictures(monkeypatch, segmentation)
    image, out = min((heads / "images").iterdir()), tmp_path / "out"
    words = [str(cdal_run), str(image), *"--votes 4 --level_sets --probabilities".split(), "--out", str(out)]
    sample.main(words)
    name = image.name.partition(".")[0]
    found = [read(path).array[0] for path in sorted((out / "votes").iterdir())]
    (probability,) = (out / "probability").iterdir()
    expected = level_sets(torch.from_numpy(read(probability).array), 4)
    assert [path.name for path in sorted((out / "votes").iterdir())] == [
        f"{name}__0{v}.tif" for v in (1, 2, 3, 4)
    ]
    assert np.array_equal(np.stack(found), expected.numpy())
    assert "every_vote asks for those of the run" in mistake(
        sample.main, [*words[:-1], "new", "--every_vote"]
    )


def test_votes_windows_and_overlap_are_those_asked_for(segmented):
    whole = "--window 16,20"
    assert segmented(f"{whole} --votes 3")[0] == [3]
    assert segmented(f"{whole} --votes 3 --batch_size 2")[0] == [2, 1]
    assert segmented("--window 8,8 --votes 2 --batch_size 2 --overlap 0")[0] == [2] * 2 * 3
    assert segmented("--window 8,8 --votes 2 --batch_size 2 --overlap 0.5")[0] == [2] * 3 * 4
    assert segmented("--window 8,8 --votes 2 --batch_size 2 --overlap 0.75")[0] == [2] * 5 * 7
    assert segmented("--window 8,8 --votes 2 --batch_size 5 --overlap 0")[0] == [4, 2] * 2


def test_what_the_memory_does_not_hold_whole_is_segmented_in_windows_of_the_training_patch(
    segmented, cdal, monkeypatch, capsys
):
    monkeypatch.setattr("ldm3d.cdal.FEW", 1)
    counted = [2]  # a call that computes nothing
    assert segmented("--votes 2")[0] == [*counted, 2]
    monkeypatch.setattr("ldm3d.cdal.free_bytes", lambda device: 0)
    windows = [2] * 2 * 2  # of 12 x 12 voxels
    assert segmented("--votes 2 --batch_size 2 --overlap 0")[0] == [*counted, *windows]
    assert "16x20 voxels whole take" in capsys.readouterr().out
    assert segmented("--votes 2 --window 16,20")[0] == [2]
    overlapping = [2] * 2 * 3  # by half
    assert cdal(f"{ALONE} --votes 2").votes == [*counted, *overlapping * 2]  # two cases


def test_the_probability_is_the_mean_of_all_votes_and_depends_on_the_seed(segmented, monkeypatch):
    with monkeypatch.context() as patch:
        votes = spy(patch, CDAL, "vote")
        _, p = segmented("--window 16,20 --votes 4")
    torch.testing.assert_close(p, votes[0][2].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(segmented("--window 16,20 --votes 4 --seed 0")[1], p)
    assert not torch.equal(segmented("--window 16,20 --votes 4 --seed 1")[1], p)


@pytest.fixture
def other_cdal(cdal_run, tmp_path) -> Callable[..., str]:
    """other_cdal(**settings of the data): the checkpoint of another network, with these settings."""

    def make(flip_axes: tuple[int, ...] = (), split: dict[str, Any] | None = None, **settings: Any) -> str:
        content, path = load(cdal_run / "best.pt"), tmp_path / f"other-{len(list(tmp_path.iterdir()))}.pt"
        content["config"]["data"] |= settings
        content["config"]["data"]["augment"]["flip_axes"] = list(flip_axes)
        content["state"]["split"] |= split or {}
        for name, weights in content["ema"].items():
            content["ema"][name] = 1.5 * weights if name.endswith("conv_out.weight") else weights
        save(path, content)
        return str(path)

    return make


def segment_with(heads: Path, out: Path, run: object, *flags: str) -> Tensor:
    """The probabilities (K, 16, 20) of one head, by `sample.py RUN`."""
    image = min((heads / "images").iterdir())
    words = [str(run), str(image), "--probabilities", "--votes", "2", "--out", str(out), *flags]
    sample.main(words)
    return torch.from_numpy(read(next((out / "probability").iterdir())).array)


def test_images_are_mirrored_along_the_axes_of_the_training(heads, other_cdal, tmp_path, monkeypatch):
    no_pictures(monkeypatch, segmentation)
    run = other_cdal(flip_axes=(1,))
    calls = spy(monkeypatch, CDAL, "vote")
    p = segment_with(heads, tmp_path / "flips", run, "--flips")
    assert len(calls) == 2
    votes = [result.mean(0) for _, _, result in calls]
    torch.testing.assert_close(p, (votes[0] + votes[1].flip(-1)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_file", [False, True])
def test_an_ensemble_has_the_mean_probability_of_its_runs(
    heads, cdal_run, other_cdal, tmp_path, monkeypatch, in_file
):
    no_pictures(monkeypatch, segmentation)
    if in_file:
        monkeypatch.setattr(segmentation, "IN_MEMORY", 0)
    runs = [str(cdal_run), other_cdal(), other_cdal(num_variants=1)]
    each = [segment_with(heads, tmp_path / f"one-{k}", run) for k, run in enumerate(runs[:2])]
    assert not torch.allclose(*each, atol=1e-3)
    p = segment_with(heads, tmp_path / "all", runs[0], "--ensemble", ",".join(runs[1:]))
    torch.testing.assert_close(p, (each[0] + 2 * each[1]) / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "flags", "line"),
    [
        ({"spacing": [2.0, 2.0]}, "", "data.spacing is 2.0,2.0, that of"),
        ({"label_values": [0, 1, 2, 5, 7]}, "", "data.label_values is 0,1,2,5,7, that of"),
        ({}, "--flips", "has not learned mirrored images (data.augment.flip_axes)"),
        ({}, "--every_vote", "every_vote: the votes are those of one run without ensemble"),
    ],
)
def test_runs_that_see_other_voxels_are_no_ensemble(
    heads, cdal_run, other_cdal, tmp_path, mistake, settings, flags, line
):
    words = [str(cdal_run), str(heads / "images"), "--out", str(tmp_path / "out"), *flags.split()]
    assert line in mistake(sample.main, [*words, "--ensemble", other_cdal(**settings)])
    assert not (tmp_path / "out").exists()


def test_an_ensemble_is_not_scored_on_cases_that_one_run_has_learned(
    heads, cdal_run, other_cdal, tmp_path, mistake
):
    split = load(cdal_run / "best.pt")["state"]["split"]
    other = other_cdal(split={"train": [*split["train"], *split["val"]]})
    words = [str(cdal_run), str(heads / "images"), "--part", "val", "--out", str(tmp_path / "out")]
    assert f"was trained on {min(split['val'])} of part val" in mistake(
        sample.main, [*words, "--ensemble", other]
    )


def test_an_ensemble_is_not_scored_on_subjects_that_one_run_has_learned(heads, other_cdal, tmp_path, mistake):
    first = {"train": ["phantom_0010"], "val": ["phantom_0000"]}
    of_both = first | {"train": ["phantom_0011", "phantom_0001"]}
    first, other = (other_cdal(subject="phantom_(...)", split=split) for split in (first, of_both))
    words = [first, str(heads / "images"), "--part", "val", "--out", str(tmp_path / "out")]
    line = mistake(sample.main, [*words, "--ensemble", other])
    assert "was trained on phantom_0001, of the subject of phantom_0000 of part val" in line


# --- python -m ldm3d.evaluation compare ---------------------------------------------------------------------


HEIGHTS = {  # flags -> height in mm of target and generated image, whose voxels are 2 x 3 mm
    "": (2 * 10, 2 * 4),
    "--height_axis 0": (2 * 10, 2 * 4),
    "--height_axis 1": (3 * 6, 3 * 6),
    "--threshold 20": (2 * 10, 2 * 8),
    "--threshold 20 --height_axis 1": (3 * 6, 3 * 6),
    "--threshold 5": (2 * 14, 2 * 12),
}


@pytest.mark.parametrize("flags", HEIGHTS)
def test_heights_of_objects_are_along_the_axis_and_above_the_threshold_asked_for(
    tmp_path, monkeypatch, flags
):
    """Rectangles 6 voxels wide on a dark ground: the target has 10 rows of 100, the image 4 of 100 and 4 of
    30; both have 4 more of 10."""
    for name, values in (("target", [100] * 10), ("made", [100] * 4 + [30] * 4)):
        array = np.zeros((24, 16), np.float32)
        for row, value in enumerate([*values, *[10] * 4], start=4):
            array[row, 5:11] = value
        write(tmp_path / name / "a.tif", Volume(array[None], np.diag([2.0, 3.0, 1.0])))
    monkeypatch.setattr(pairs, "new_figure", lambda *size, **more: None)  # drawing takes long
    folders = [str(tmp_path / "made"), str(tmp_path / "target"), "--out", str(tmp_path / "out")]
    evaluation_main(["compare", *folders, "--resamples", "5", "--worst", "0", *flags.split()])
    (row,) = tiny.read_csv(tmp_path / "out" / "cases.csv")
    assert (float(row["height_target"]), float(row["height_generated"])) == HEIGHTS[flags]
