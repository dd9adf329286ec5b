"""Few-step diffusion segmentation: published coefficients, what switches do, votes, windows, training."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import train_cdal
from ldm3d import discriminators
from ldm3d.blocks import AttentionBlock
from ldm3d.cdal import (
    CDAL,
    CDALConfig,
    FewStepConfig,
    Generator,
    GeneratorConfig,
    attention_map,
    few_step_betas,
    level_sets,
    uncertainty,
)
from ldm3d.config import InputError, from_dict, parse
from ldm3d.data.phantoms import make_phantom
from ldm3d.discriminators import TimeDiscriminator, TimeDiscriminatorConfig
from ldm3d.engine.distributed import keyed_generator, rank, wrap
from ldm3d.engine.memory_plan import LiveBytes
from ldm3d.engine.training import autocast, keyed_normal
from ldm3d.large.windows import window_starts, window_weight
from ldm3d.losses import cross_entropy_loss, dice_loss
from ldm3d.metrics import dice
from ldm3d.unet import UNetConfig

CPU = torch.device("cpu")
K = 3


def make(dims: int = 2, seed: int = 0, stem: int = 1, **changes) -> Generator:
    """A small generator with all weights random, those that start at zero too."""
    torch.manual_seed(seed)
    unet = UNetConfig(
        dims,
        channels=(8, 16),
        num_res_blocks=(1,),
        attention_levels=(False,),
        head_channels=8,
        num_groups=4,
        adaptive_norm=True,
    )
    config = GeneratorConfig(
        encoder_channels=4, encoder_blocks=1, stem=(stem,), latent_dim=5, mapping_layers=1
    )
    net = Generator(dataclasses.replace(config, **changes), unet, image_channels=1, num_labels=K)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    nn.init.normal_(net.unet.conv_in.weight, std=0.1)  # at first it does not see x_prev
    return net


def make_discriminator(dims: int = 2, image_channels: int = 1, seed: int = 1) -> TimeDiscriminator:
    """A small discriminator, all weights random and large, so that its gradients are far above rounding."""
    torch.manual_seed(seed)
    config = TimeDiscriminatorConfig(dims, 2 * K + image_channels, channels=(4, 8), emb_dim=8)
    disc = TimeDiscriminator(config)
    with torch.no_grad():
        for parameter in disc.parameters():
            parameter.copy_(2.5 * (parameter if parameter.any() else nn.init.normal_(parameter, std=0.1)))
    return disc


def batch(dims: int = 2, num: int = 4, side: int = 8):
    """(images, labels, u, draw) of samples 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(num, 1, *[side] * dims, generator=generator)
    labels = torch.randint(K, (num, *[side] * dims), generator=generator)
    u = torch.linspace(0, 0.99, num)

    def draw(purpose: str, *shape: int) -> torch.Tensor:
        return keyed_normal(7, torch.arange(num), shape, purpose)

    return image, labels, u, draw


def make_method(steps: int = 4, **changes) -> CDAL:
    return CDAL(CDALConfig(kernel=FewStepConfig(num_timesteps=steps), **changes), K)


# --- few steps ----------------------------------------------------------------------------------------------

TABLES = {
    2: {
        "betas": [1e-8, 0.921324, 0.999451],
        "sqrt_alphas_cumprod": [1, 0.280492, 0.006572],
        "sqrt_one_minus_alphas_cumprod": [0.0001, 0.959856, 0.999978],
        "posterior_variance": [0, 0.920858],
        "posterior_mean_coef1": [1, 0.280350],
        "posterior_mean_coef2": [0, 0.021588],
    },
    4: {
        "betas": [1e-8, 0.478255, 0.849206, 0.956418, 0.987404],
        "sqrt_alphas_cumprod": [1, 0.722319, 0.280492, 0.058557, 0.006572],
        "sqrt_one_minus_alphas_cumprod": [0.0001, 0.691560, 0.959856, 0.998284, 0.999978],
        "posterior_variance": [0, 0.440819, 0.884202, 0.984061],
        "posterior_mean_coef1": [1, 0.665778, 0.269191, 0.057822],
        "posterior_mean_coef2": [0, 0.201576, 0.193001, 0.111852],
    },
}


@pytest.mark.parametrize("steps", [2, 4])
def test_the_coefficients_are_the_published_ones(steps):
    method, table = make_method(steps), TABLES[steps]
    for name in ("betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        assert getattr(method.kernel, name).tolist() == pytest.approx(table[name], abs=1e-6), name
    one, zero = torch.ones(steps, 1, 1, 1), torch.zeros(steps, 1, 1, 1)
    coef1, variance = method.posterior.q_posterior(one, zero, torch.arange(steps))
    coef2, _ = method.posterior.q_posterior(zero, one, torch.arange(steps))
    assert coef1.flatten().tolist() == pytest.approx(table["posterior_mean_coef1"], abs=1e-6)
    assert coef2.flatten().tolist() == pytest.approx(table["posterior_mean_coef2"], abs=1e-6)
    assert variance.flatten().tolist() == pytest.approx(table["posterior_variance"], abs=1e-6)


@pytest.mark.parametrize(("schedule", "low", "high"), [("vp", 0.1, 20.0), ("geometric", 0.01, 0.99)])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_what_all_steps_leave_of_the_mask_is_the_schedule_between_its_ends(schedule, low, high, steps):
    betas = few_step_betas(FewStepConfig(steps, schedule, low, high))
    assert betas.shape == (steps + 1,)
    assert betas[0] == 1e-8

    def signal(tau):
        if schedule == "geometric":
            return 1 - low * (high / low) ** tau
        return math.exp(-low * tau - (high - low) * tau**2 / 2)

    for i in range(1, steps + 1):
        expected = signal(0.001 + 0.999 * i / steps) / signal(0.001)
        assert math.prod(1 - betas[1 : i + 1].numpy()) == pytest.approx(expected, rel=1e-10)


def test_the_worked_example_and_the_last_step_which_ends_in_the_estimate_whatever_the_noise():
    method, one = make_method(2), torch.ones(1, 1, 1, 1)
    first, last = torch.tensor([1]), torch.tensor([0])
    assert float(method.step(one, -0.5 * one, first, 0 * one)) == pytest.approx(0.270, abs=5e-4)
    assert float(method.step(one, -0.5 * one, first, one)) == pytest.approx(0.270 + 0.960, abs=1e-3)
    x_start = torch.randn(1, K, 4, 4)
    assert torch.equal(method.step(x_start, torch.randn(1, K, 4, 4), last, 1e6 * one), x_start)


def test_training_times_have_the_share_that_is_asked_for():
    u = (torch.arange(8000) + 0.5) / 8000
    for share, expected in ((None, [0.25] * 4), (0.4, [0.2, 0.2, 0.2, 0.4])):
        t = make_method(4, noisiest=share).t_from_uniform(u)
        assert (torch.bincount(t, minlength=4) / 8000).tolist() == pytest.approx(expected, abs=2e-3)
    assert make_method(1, noisiest=0.3).t_from_uniform(u).max() == 0


def test_a_stored_setting_of_the_old_name_is_read():
    assert not from_dict(CDALConfig, {"critic_sees_image": False}).disc_sees_image


@pytest.mark.parametrize(
    ("make_config", "word"),
    [
        (lambda: FewStepConfig(num_timesteps=65), "num_timesteps"),
        (lambda: FewStepConfig(input_scale=1.5), "input_scale"),
        (lambda: FewStepConfig(schedule="geometric"), "beta_max"),
        (lambda: CDALConfig(ce_weight=0, dice_weight=0), "mse_weight"),
        (lambda: CDALConfig(adversarial_weight=-0.1), "adversarial_weight"),
        (lambda: CDALConfig(dice_weight=-1.0), "dice_weight"),
        (lambda: CDALConfig(attention="input"), "own_estimate"),
        (lambda: CDALConfig(attention="loss", attention_normalised=False), "attention_normalised"),
        (lambda: CDALConfig(diffusion=False, attention="loss"), "diffusion"),
        (lambda: GeneratorConfig(latent_dim=-1), "latent_dim"),
        (lambda: make(stem=3), "generator.stem"),
    ],
)
def test_impossible_settings_are_refused(make_config, word):
    with pytest.raises(InputError, match=word):
        make_config()


# --- generator and switches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", [1, 2])
@pytest.mark.parametrize("size", [(8, 8, 8), (5, 7, 3), (1, 2, 1)])
@pytest.mark.parametrize("dims", [2, 3])
def test_any_size_in_is_the_same_size_out(dims, size, stem):
    net, size = make(dims, stem=stem), size[:dims]
    out = net(torch.randn(2, K, *size), torch.zeros(2), torch.randn(2, 1, *size), torch.randn(2, 5))
    assert out.shape == (2, K, *size)


def test_at_first_the_generator_looks_at_the_image_alone():
    net = Generator(
        GeneratorConfig(), UNetConfig(2, channels=(8,), attention_levels=(False,), head_channels=8), 1, K
    )
    nn.init.normal_(net.unet.conv_out.weight)
    image = torch.randn(1, 1, 6, 6)
    one, other = (net(torch.randn(1, K, 6, 6), torch.zeros(1), image, torch.zeros(1, 64)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, net(torch.zeros(1, K, 6, 6), torch.zeros(1), -image, torch.zeros(1, 64)))


def test_the_latent_moves_the_output_and_its_length_does_not():
    net, z = make(), torch.randn(1, 5)
    inputs = torch.randn(1, K, 8, 8), torch.zeros(1), torch.randn(1, 1, 8, 8)
    assert torch.allclose(net(*inputs, z), net(*inputs, 3 * z), atol=1e-5)
    assert not torch.allclose(net(*inputs, z), net(*inputs, -z), atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_attention_is_the_mean_over_channels_and_normalised_positive_of_mean_1(dims, normalise):
    features = torch.randn(2, 6, *[4] * dims)
    a = attention_map(features, [4] * dims, normalise)
    assert a.shape == (2, 1, *[4] * dims)
    mean = features.mean(1, keepdim=True)
    if not normalise:
        assert torch.allclose(a, mean, atol=1e-6)
        return
    assert a.min() > 0
    assert torch.allclose(a.flatten(1).mean(1), torch.ones(2), atol=1e-5)
    order = [v.flatten(1).argsort(1) for v in (a, mean)]
    assert torch.equal(*order)
    larger = attention_map(features, (9, 7, 5)[:dims], normalise)
    assert larger.shape == (2, 1, *(9, 7, 5)[:dims])
    assert torch.allclose(larger.flatten(1).mean(1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_the_plain_formulas(weighted):
    logits, labels = torch.randn(2, K, 6, 6), torch.randint(K, (2, 6, 6))
    weight = torch.rand(2, 6, 6) if weighted else torch.ones(2, 6, 6)
    method = make_method(mse_weight=0.5, ce_weight=2.0, dice_weight=3.0)
    terms = method.overlap_terms(logits, make().to_x_start(logits), labels, weight if weighted else None)
    p, w = logits.softmax(1), weight[:, None]
    one_hot = torch.stack([labels == k for k in range(K)], 1).float()
    mse = w * ((2 * p - 1) - (2 * one_hot - 1)) ** 2
    assert torch.allclose(terms["mse"], mse.flatten(1).mean(1), atol=1e-6)
    assert torch.allclose(terms["ce"], -(w * p.log() * one_hot).sum(1).flatten(1).mean(1), atol=1e-5)
    overlaps = []
    for k in range(1, K):
        both = (weight * p[:, k] * one_hot[:, k]).sum((1, 2))
        either = (weight * (p[:, k] + one_hot[:, k])).sum((1, 2))
        overlaps.append((2 * both + 1) / (either + 1))
    assert torch.allclose(terms["dice"], 1 - torch.stack(overlaps).mean(0), atol=1e-5)
    total = 0.5 * terms["mse"] + 2 * terms["ce"] + 3 * terms["dice"]
    assert torch.allclose(terms["loss"], total)


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("stem", [1, 2])
def test_deep_supervision_adds_the_losses_of_coarser_levels_on_the_thinned_mask(diffusion, stem):
    unet = UNetConfig(
        2, channels=(8, 8, 16), num_res_blocks=(1,), attention_levels=(False,), num_groups=4, head_channels=8
    )
    torch.manual_seed(0)
    config = GeneratorConfig(encoder_channels=4, encoder_blocks=1, stem=(stem,), deep_supervision=True)
    net = Generator(config, unet, 1, K)
    method, (image, labels, u, draw) = make_method(diffusion=diffusion), batch(side=8 * stem)
    coarse = []
    net.register_forward_hook(lambda module, args, output: coarse.extend(output[1]))
    terms, _ = method.losses(net, net, None, image, labels, u, draw)
    assert [tuple(output.shape[2:]) for output in coarse] == [(2, 2), (4, 4)]
    expected = terms["ce"] + terms["dice"]
    for output, weight, step in zip(coarse, (1 / 4, 1 / 2), (4 * stem, 2 * stem), strict=True):
        own = labels[:, step // 2 :: step, step // 2 :: step]
        expected = expected + weight * (cross_entropy_loss(output, own))
        expected = expected + weight * dice_loss(output.softmax(1), F.one_hot(own, K).movedim(-1, 1))
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(terms["loss"].sum(), list(net.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("size", [(9, 6), (7, 13)])
def test_deep_supervision_of_any_size_leaves_the_output_as_it_is(size):
    deep, plain = make(stem=2, deep_supervision=True), make(stem=2)
    deep.load_state_dict(plain.state_dict(), strict=False)
    image, mask = torch.randn(1, 1, *size), torch.randint(K, (1, *size))
    x, t = torch.zeros(1, K, *size), torch.zeros(1)
    z = torch.zeros(1, 5)
    output, (coarse,) = deep(x, t, image, z, deep=True)
    assert torch.equal(output, plain(x, t, image, z))
    assert coarse.shape[2:] == tuple(-(-n // 4) for n in size)
    terms, _ = make_method().losses(deep, deep, None, image, mask, torch.zeros(1), batch(num=1)[3])
    assert terms["coarse"].item() > 0
    assert plain(x, t, image, z, deep=True)[1] == []


class Spy(nn.Module):
    """A discriminator that notes whether what it is shown carries gradients."""

    def __init__(self, disc: nn.Module):
        super().__init__()
        self.disc, self.carried = disc, []

    def forward(self, x_t, *rest, **more):
        self.carried.append(x_t.requires_grad)
        return self.disc(x_t, *rest, **more)


def gradients(method: CDAL, net: Generator, disc: nn.Module | None, of: str = "loss") -> list[torch.Tensor]:
    terms, _ = method.losses(net, net, disc, *batch())
    return list(torch.autograd.grad(terms[of].sum(), list(net.parameters()), allow_unused=True))


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("attention", ["none", "input", "loss"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_discriminators_gradient_reaches_the_generator_exactly_when_the_switch_says_so(
    weight, attention, sees
):
    net, disc = make(), Spy(make_discriminator(image_channels=int(sees)).requires_grad_(False))
    switches = {"attention": attention, "disc_sees_image": sees, "own_estimate": attention != "input"}
    with_term = gradients(make_method(adversarial_weight=weight, **switches), net, disc)
    assert any(disc.carried) == (weight > 0)
    assert all(p.grad is None for p in disc.parameters())
    if weight:
        without = gradients(make_method(**switches), net, disc)
        term = gradients(make_method(adversarial_weight=weight, **switches), net, disc, "g_loss")
        assert max(float(g.abs().max()) for g in term) > 1e-2
        for a, b, c in zip(with_term, without, term, strict=True):
            assert torch.allclose(a, b + weight * c, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient_in_every_mode():
    for changes in ({}, {"diffusion": False}, {"own_estimate": False}):
        for g in gradients(make_method(**changes), make(), None):
            assert g is not None
    assert all(float(g.abs().max()) > 0 for g in gradients(make_method(), make(), None))


def test_a_plain_network_sees_nothing_but_the_image():
    net, method = make(), make_method(diffusion=False)
    image, labels, u, draw = batch()
    terms, pair = method.losses(net, net, None, image, labels, u, draw)
    again, _ = method.losses(net, net, None, image, labels, 0.5 * u, lambda *a: 9 * draw(*a))
    assert torch.equal(terms["loss"], again["loss"])
    assert pair == {}
    assert method.num_timesteps == 1


@pytest.mark.parametrize(
    ("output", "switches"),
    [
        ("softmax", {"own_estimate": False}),
        ("softmax", {"own_estimate": True}),
        ("tanh", {"own_estimate": False, "attention": "input", "attention_normalised": False}),
        ("softmax", {"own_estimate": False, "attention": "input", "attention_layer": 0}),
        ("tanh", {"own_estimate": True, "attention": "loss", "attention_layer": 1}),
    ],
)
def test_a_training_step_is_the_process_by_hand(output, switches):
    net, disc, T = make(output=output), make_discriminator(), 4
    method = make_method(T, mse_weight=0.5, adversarial_weight=0.7, **switches)
    (image, labels, u, draw), c = batch(), method.config
    t = torch.tensor([0, 1, 2, 3])  # of u = 0, 0.33, 0.66, 0.99
    names = "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "betas"
    names += "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance"
    alpha, sigma, beta, c1, c2, variance = (torch.tensor(TABLES[T][n]).view(-1, 1, 1, 1) for n in names)

    def noise(purpose):
        return draw(purpose, K, 8, 8)

    def estimate(x, t, z):
        out = net(x, t.float(), image, draw(z, 5))
        return out, out.tanh() if output == "tanh" else 2 * out.softmax(1) - 1

    y = torch.stack([2.0 * (labels == k) - 1 for k in range(K)], 1)
    x_t = alpha[t] * y + sigma[t] * noise("x_t")
    x_prev = (1 - beta[t + 1]).sqrt() * x_t + beta[t + 1].sqrt() * noise("x_next")
    seen, weight = x_prev, None
    if c.attention != "none":
        hidden = disc(x_t, t, x_prev, image).features[c.attention_layer]
        a = attention_map(hidden, (8, 8), c.attention_normalised).detach()
        weight = a[:, 0] if c.attention == "loss" else None
        if c.attention == "input":
            seen = alpha[t + 1] * a * y + sigma[t + 1] * noise("attended")
    if c.own_estimate:
        first = estimate(noise("x_T"), torch.full_like(t, T - 1), "z of the estimate")[1]
        own = alpha[t + 1] * first + sigma[t + 1] * noise("x_next of the estimate")
        seen = torch.where(t.view(-1, 1, 1, 1) < T - 1, own, seen)
    out, x_start = estimate(seen, t, "z")
    fake, fake_unaided = (
        c1[t] * start + c2[t] * x_prev + variance[t].sqrt() * noise("posterior")
        for start in (x_start, estimate(x_prev, t, "z")[1])
    )
    expected = method.overlap_terms(out, x_start, labels, weight)
    expected["g_loss"] = nn.functional.softplus(-disc(fake, t, x_prev, image).logits[0])[:, 0]
    expected["loss"] = expected["loss"] + 0.7 * expected["g_loss"]
    shown = {"x_t": x_t, "x_prev": x_prev, "t": t, "fake": fake_unaided if c.attention == "input" else fake}

    both = method.losses(net, net, disc, image, labels, u, draw)
    for found, wanted in zip(both, (expected, shown), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


def test_the_discriminator_judges_real_and_fake_pairs_in_one_forward_with_r1_scaled_by_its_interval():
    net, disc = make(), make_discriminator()
    method = make_method(adversarial_weight=1.0, r1_weight=0.5, r1_every=4)
    image, labels, u, draw = batch()
    _, pair = method.losses(net, net, disc, image, labels, u, draw)
    plain, lazy = (method.discriminator_losses(disc, image, pair, step) for step in (3, 4))
    assert "r1" not in plain
    real = disc(x := pair["x_t"].clone().requires_grad_(), pair["t"], pair["x_prev"], image).logits[0]
    fake = disc(pair["fake"], pair["t"], pair["x_prev"], image).logits[0]
    expected = nn.functional.softplus(-real) + nn.functional.softplus(fake)
    assert torch.allclose(plain["loss"], expected[:, 0], rtol=1e-5)
    (gradient,) = torch.autograd.grad(real.sum(), x)
    penalty = gradient.square().flatten(1).sum(1)
    assert penalty.min() > 0.01
    assert torch.allclose(lazy["loss"] - plain["loss"], 0.5 * 4 * penalty, rtol=1e-3)
    lazy["loss"].mean().backward()
    assert all(p.grad is not None for p in disc.parameters())


def test_the_published_preset_has_the_released_penalty_every_tenth_step_without_compensation():
    """Released: gamma / 2 |gradient|^2 with gamma = 1, in every tenth step and not rescaled."""
    config = parse(train_cdal.Config, ["published"], train_cdal.PRESETS, base=train_cdal.with_data)[0]
    net, disc = make(output="tanh"), make_discriminator(image_channels=0)
    method = CDAL(config.cdal, K)
    image, labels, u, draw = batch()
    _, pair = method.losses(net, net, disc, image, labels, u, draw)
    real = disc(x := pair["x_t"].clone().requires_grad_(), pair["t"], pair["x_prev"]).logits[0]
    penalty = torch.autograd.grad(real.sum(), x)[0].square().flatten(1).sum(1)
    for step in range(1, 21):
        terms = method.discriminator_losses(disc, image, pair, step)
        released = 0.5 * penalty if step % 10 == 0 else torch.zeros(())
        torch.testing.assert_close(terms["loss"] - terms["d_loss"], released.expand(4), rtol=1e-3, atol=1e-5)


# --- inference ----------------------------------------------------------------------------------------------


class Pointwise:
    """Stands for a generator; its output depends on each voxel's image and noisy mask and on z alone."""

    config, mapping = GeneratorConfig(latent_dim=2), True

    def __init__(self):
        self.encoded, self.predicted = 0, []

    def encode(self, image):
        self.encoded += 1
        return image

    def to_x_start(self, output):
        return 2 * output.softmax(1) - 1

    def predict(self, x, t, features, z):
        self.predicted.append((len(x), int(t[0])))
        return 2 * features * torch.arange(K).view(1, -1, 1, 1) + 0.3 * x + 0.1 * z[:, :1, None, None]


def test_a_size_that_memory_did_not_hold_whole_stays_in_windows_of_the_training_patch(monkeypatch, capsys):
    monkeypatch.setattr("ldm3d.cdal.peak_bytes", lambda *_, **more: (0, 2**20))  # of a patch
    method, image, free = make_method(2), torch.zeros(1, 16, 16), []
    monkeypatch.setattr("ldm3d.cdal.free_bytes", lambda device: free[-1])
    for mib, window in ((1000, None), (10, (4, 4)), (1000, (4, 4))):
        free.append(mib * 2**20)
        assert method.window_in_memory(None, image, 1, (4, 4)) == window
    assert capsys.readouterr().out.count("16x16 voxels whole take") == 1
    assert method.window_in_memory(None, torch.zeros(1, 16, 12), 1, (4, 4)) is None


def test_images_with_more_positions_than_a_cpu_can_attend_to_are_segmented_in_windows(monkeypatch, capsys):
    monkeypatch.setattr("ldm3d.cdal.SLOW_ATTENTION", 30)
    config = UNetConfig(dims=2, channels=(8, 8), attention_levels=(False,), head_channels=8, num_groups=4)
    net = Generator(GeneratorConfig(stem=(2,), encoder_channels=4), config, 1, 2)
    for size, positions in (((20, 24), 30), ((21, 24), 36)):
        attended = []
        attention = next(m for m in net.modules() if isinstance(m, AttentionBlock))
        hook = attention.register_forward_pre_hook(lambda _, x, a=attended: a.append(x[0][0, 0].numel()))
        net(torch.zeros(1, 2, *size), torch.zeros(1), torch.zeros(1, 1, *size))
        hook.remove()
        assert attended == [positions] == [net.attended(size)]
    method = make_method(1)
    assert method.window_in_memory(net, torch.zeros(1, 20, 24), 1, (12, 24)) is None
    for _ in range(2):
        assert method.window_in_memory(net, torch.zeros(1, 21, 24), 1, (12, 24)) == (12, 24)
    assert method.window_in_memory(net, torch.zeros(1, 21, 24), 1, None) is None  # trained on the whole
    assert capsys.readouterr().out.count("21x24 voxels whole are 36 positions that attend") == 1
    finer = dataclasses.replace(config, attention_levels=(True, False))
    assert (finer.attended((10, 12)), config.attended((10, 12))) == (120, 30)


def test_windows_of_a_pointwise_network_give_the_whole_image_and_seams_do_not_show():
    image, method = torch.randn(1, 13, 11), make_method(1)
    method.draw_votes = lambda net, votes, size, seed, key: (
        torch.zeros(votes, 1, K, *size),
        torch.zeros(votes, 1, 2),
    )
    whole = method.segment(Pointwise(), image)
    tiled = method.segment(Pointwise(), image, window=(6, 5), overlap=0.4)
    assert torch.allclose(whole, tiled, atol=1e-6)
    assert torch.allclose(whole.sum(0), torch.ones(13, 11), atol=1e-5)


def test_where_windows_overlap_their_probabilities_are_averaged_with_smooth_weights():
    class Constant(Pointwise):  # the same in all of a window
        def predict(self, x, t, features, z):
            return features.mean((2, 3), keepdim=True) * torch.arange(K).view(1, -1, 1, 1) + 0 * x

    image = torch.randn(1, 6, 1)
    p = make_method(diffusion=False).segment(Constant(), image, window=(4, 1), overlap=0.5)
    first, second = ((image[0, at : at + 4].mean() * torch.arange(K)).softmax(0)[:, None] for at in (0, 2))
    rising = torch.tensor([math.sin(math.pi * i / 8) ** 2 for i in (1, 3, 5, 7)])
    a, b = torch.cat([rising, torch.zeros(2)]), torch.cat([torch.zeros(2), rising])
    assert torch.allclose(p[..., 0], (a * first + b * second) / (a + b), atol=1e-5)


def test_the_noise_of_a_vote_is_the_same_at_a_voxel_in_every_window_that_holds_it():
    class Echo(Pointwise):
        def predict(self, x, t, features, z):
            self.predicted.append((features.clone(), x.clone()))
            return x

    net, method = Echo(), make_method(1)
    image = torch.arange(9 * 8.0).view(1, 9, 8)
    method.segment(net, image, window=(4, 5), overlap=0.5)
    seen: dict[float, torch.Tensor] = {}
    windows = [pair for features, x in net.predicted for pair in zip(features, x, strict=True)]
    for features, x in windows:
        for voxel, value in zip(features[0].flatten().tolist(), x.flatten(1).T, strict=True):
            assert torch.equal(seen.setdefault(voxel, value), value)
        assert len({tuple(v.tolist()) for v in x.flatten(1).T}) == 20  # within a window all differ
    assert len(seen) == 72


@pytest.mark.parametrize(("axes", "copies"), [((0,), 2), ((1,), 2), ((0, 1), 4)])
@pytest.mark.parametrize("window", [None, (5, 8)])
def test_flips_give_the_mean_over_mirrored_images(axes, copies, window):
    net, method, image = make().eval(), make_method(diffusion=False), torch.randn(1, 9, 12)
    flips = [flip for n in range(3) for flip in itertools.combinations((0, 1), n) if set(flip) <= set(axes)]
    assert len(flips) == copies
    with torch.no_grad():
        found = method.segment(net, image, window=window, flip_axes=axes)
        turned = [[1 + axis for axis in flip] for flip in flips]
        each = [method.segment(net, image.flip(f), window=window).flip(f) for f in turned]
    torch.testing.assert_close(found, torch.stack(each).mean(0))
    assert not torch.allclose(found, each[0], atol=1e-4)


def test_flips_of_a_volume_are_of_all_combinations_of_axes_and_leave_noise_in_its_place():
    net, method, image = Pointwise(), make_method(2), torch.randn(1, 5, 4, 3)
    net.predict = lambda x, t, features, z: features * torch.arange(K).view(1, -1, 1, 1, 1) + 0.3 * x
    found = method.segment(net, image, votes=2, flip_axes=(0, 1, 2), separate=True)
    assert net.encoded == 8
    own = method.segment(net, image, votes=2, separate=True)
    torch.testing.assert_close(found, own)


def blended_whole(net, method, image, votes, window, overlap):
    """The windows of `segment` one after the other, one vote at a time, in one buffer for all of it."""
    size = image.shape[1:]
    starts = [window_starts(n, m, overlap) for n, m in zip(size, window, strict=True)]
    total, weight, smooth = torch.zeros(K, *size), torch.zeros(size), window_weight(window)
    noise, z = method.draw_votes(net, votes, window, 0, "")
    for start in itertools.product(*starts):
        box = tuple(slice(s, s + m) for s, m in zip(start, window, strict=True))
        features = net.encode(image[(slice(None), *box)][None])
        for v in range(votes):
            own = noise[v : v + 1].roll([-s for s in start], tuple(range(3, noise.ndim)))
            total[(slice(None), *box)] += smooth * method.vote(net, features, own, z[v : v + 1])[0]
            weight[box] += smooth
    return total / weight


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_a_bounded_buffer_and_windows_in_batches_give_the_labels_of_one_buffer_for_all(batch_size):
    net, method, image = make().eval(), make_method(2), torch.randn(1, 21, 18)
    settings = 3, (8, 10), 0.5
    with torch.inference_mode():
        whole = blended_whole(net, method, image, *settings)
        parts = list(method.segment_planes(net, image, *settings, batch_size=batch_size))
    assert [start for start, _ in parts] == window_starts(21, 8, 0.5)
    assert max(p.shape[1] for _, p in parts) <= 8
    p = torch.cat([p for _, p in parts], 1)
    assert torch.allclose(p, whole, atol=1e-5)
    assert torch.equal(p.argmax(0), whole.argmax(0))


def test_no_more_of_the_result_is_kept_than_a_window_has_planes():
    class Cheap(Pointwise):
        def predict(self, x, t, features, z):
            return features * torch.arange(K).view(1, -1, 1, 1)

    method, image = make_method(diffusion=False), torch.randn(1, 1024, 64)
    with LiveBytes([image]) as live:
        planes = sum(p.shape[1] for _, p in method.segment_planes(Cheap(), image, window=(16, 64)))
    assert planes == 1024
    assert live.peak < 12 * K * 16 * 64 * 4 < K * image.numel()  # bytes: windows; a quarter of the result


def test_no_more_votes_run_at_once_than_asked_and_windows_share_a_batch():
    net, method = Pointwise(), make_method(1)
    method.segment(net, torch.randn(1, 4, 20), votes=2, window=(4, 4), overlap=0.0, batch_size=6)
    assert net.predicted == [(6, 0), (4, 0)]  # of five windows three at once
    net = Pointwise()
    method.segment(net, torch.randn(1, 4, 8), votes=5, window=(4, 4), overlap=0.0, batch_size=3)
    assert net.predicted == [(3, 0), (2, 0)] * 2


def test_votes_run_as_a_batch_and_the_image_is_encoded_once():
    net, method = Pointwise(), make_method(4)
    method.segment(net, torch.randn(1, 6, 6), votes=5)
    assert net.encoded == 1
    assert net.predicted == [(5, 3), (5, 2), (5, 1), (5, 0)]


def test_a_vote_depends_on_its_seed_number_and_case_alone():
    net, method, image = make().eval(), make_method(2), torch.randn(1, 8, 8)
    with torch.no_grad():
        together = method.segment(net, image, votes=3, key="a")
        apart = method.segment(net, image, votes=3, key="a", batch_size=1)
        other = method.segment(net, image, votes=3, key="b")
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together, other, atol=1e-4)


def test_votes_are_samples_of_the_process_with_the_generators_estimates():
    net, method = make().eval(), make_method(4)
    image, (noise, z) = torch.randn(1, 1, 8, 8), method.draw_votes(make(), 2, (8, 8), 3, "x")
    with torch.no_grad():
        found = method.vote(net, net.encode(image), noise, z)
        x = noise[:, 0]
        for i, t in enumerate((3, 2, 1, 0)):  # one vote after another, with the tables by hand
            guess = (
                2 * net(x, torch.full((2,), float(t)), image.expand(2, -1, -1, -1), z[:, i]).softmax(1) - 1
            )
            c1, c2, variance = (
                TABLES[4][f"posterior_{name}"][t] for name in ("mean_coef1", "mean_coef2", "variance")
            )
            fresh = noise[:, i + 1] if t else 0
            x = c1 * guess + c2 * x + math.sqrt(variance) * fresh
    assert torch.allclose(found, (x + 1) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "window", "overlap"), [(10, 4, 0.5), (10, 10, 0.5), (11, 4, 0.0), (7, 6, 0.75)]
)
def test_windows_cover_everything_and_overlap_as_asked(size, window, overlap):
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - window
    assert all(b - a <= max(1, window * (1 - overlap)) for a, b in itertools.pairwise(starts))


def test_uncertainty_is_entropy_over_that_of_equal_probabilities():
    p = torch.tensor([[1.0, 0.5, 1 / 3], [0.0, 0.5, 1 / 3], [0.0, 0.0, 1 / 3]])
    assert uncertainty(p).tolist() == pytest.approx([0, math.log(2) / math.log(3), 1], abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param({name: False}, marks=pytest.mark.slow) for name in ("diffusion", "own_estimate"))],
)
def test_one_image_that_is_overfitted_is_segmented_with_dice_over_098(changes):
    head = make_phantom(3, dims=2, size=(24, 28))
    image = torch.from_numpy(head.image / head.image.max())[None]
    labels = torch.from_numpy(head.mask.astype(np.int64).clip(0, K - 1))
    net, method = make(encoder_channels=8), make_method(2, **changes)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3, (0.9, 0.99))
    for step in range(150):
        positions = torch.arange(2 * step, 2 * step + 2)
        u = torch.rand(2, generator=keyed_generator(0, step, "t"))

        def draw(purpose, *shape, positions=positions):
            return keyed_normal(0, positions, shape, purpose)

        terms, _ = method.losses(
            net, net, None, image.expand(2, -1, -1, -1), labels.expand(2, -1, -1), u, draw
        )
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        p = method.segment(net, image[0], votes=5)
    assert dice(p.argmax(0)[None], labels, K).min() > 0.98


# --- precision, compile, two ranks --------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_losses_in_half_precision_are_those_of_fp32(amp):
    net, disc, method = make(3), make_discriminator(3), make_method(adversarial_weight=0.1, attention="loss")
    exact, _ = method.losses(net, net, disc, *batch(3))
    with autocast(amp, CPU):
        half, pair = method.losses(net, net, disc, *batch(3))
        judged = method.discriminator_losses(disc, batch(3)[0], pair, 1)
    assert all(v.dtype == torch.float32 for v in (*half.values(), *judged.values()))
    for name, value in exact.items():
        assert torch.allclose(half[name], value, rtol=3e-2, atol=3e-2), name


def one_step(part: slice) -> list[torch.Tensor]:
    """Gradients of the generator and of the discriminator on a part of four samples, over all ranks."""
    discriminators.minibatch_statistic = lambda h, parts: 0 * h[:, :1]  # the one thing that is per rank
    net, disc = make(deep_supervision=True), make_discriminator()
    method = make_method(adversarial_weight=0.5)
    model, disc_model = wrap(net, CPU), wrap(disc, CPU)
    image, labels, u, _ = batch()
    positions = torch.arange(4)[part]

    def draw(purpose, *shape):
        return keyed_normal(7, positions, shape, purpose)

    disc.requires_grad_(False)
    terms, pair = method.losses(model, net, disc, image[part], labels[part], u[part], draw)
    disc.requires_grad_(True)
    terms["loss"].mean().backward()
    method.discriminator_losses(disc_model, image[part], pair, 0)["loss"].mean().backward()
    return [p.grad for n in (net, disc) for p in n.parameters()]


def on_each_rank(folder: Path) -> None:
    torch.save(one_step(slice(2 * rank(), 2 * rank() + 2)), folder / f"{rank()}.pt")


def test_gradients_of_two_ranks_are_those_of_one_process_on_the_joined_batch(tmp_path, monkeypatch):
    assert tiny.on_two_ranks(on_each_rank, tmp_path) == [0, 0]
    monkeypatch.setattr(discriminators, "minibatch_statistic", None)  # put back after one_step
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in (0, 1)]
    for alone, a, b in zip(one_step(slice(0, 4)), *ranks, strict=True):
        assert torch.equal(a, b)
        assert float((alone - a).abs().max()) <= 1e-4 * float(alone.abs().max()) + 1e-7


# --- votes that are samples ---------------------------------------------------------------------------------


class TwoMasks:
    """A network that knows the answer: whatever the image, the mask is all 0 with probability 0.7, else 1.

    By Bayes the logarithm of the odds, given x_prev of any level, is log(0.3 / 0.7) plus the difference of
    the squared distances of x_prev to the two noised masks, over twice the variance of the noise.
    """

    mapping, config = None, GeneratorConfig()

    def __init__(self, method: CDAL):
        self.method = method

    def predict(self, x, t, features, z):
        level = int(t[0]) + 1
        signal = self.method.kernel.alphas_cumprod[level].item()
        scale = self.method.config.kernel.input_scale
        x = x * (1 if scale == 1 else math.sqrt(scale**2 * signal + 1 - signal))  # undoes CDAL.unit
        masks = scale * math.sqrt(signal) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        far = [(x - mask.view(1, 2, 1, 1)).square().flatten(1).sum(1) for mask in masks]
        odds = math.log(0.3 / 0.7) + (far[0] - far[1]) / (2 * (1 - signal))
        return torch.stack([torch.zeros_like(odds), odds], 1)[:, :, None, None].expand_as(x)

    def to_x_start(self, output):
        return 2 * output.double().softmax(1) - 1


@pytest.mark.parametrize(("steps", "scale", "close"), [(32, 0.2, True), (2, 1.0, False)])
def test_votes_are_samples_if_steps_are_small_beside_what_the_mask_reveals(steps, scale, close):
    """400 votes of a perfect network are each of one label, and 30 % of them are the rarer mask. Two steps
    without input scaling are not enough: one step has to go from noise to a mask that is decided."""
    kernel = FewStepConfig(num_timesteps=steps, input_scale=scale)
    method = CDAL(CDALConfig(kernel=kernel), 2)
    noise = torch.randn(400, steps, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    p = method.vote(TwoMasks(method), torch.zeros(1, 1, 6, 6), noise, torch.zeros(400, steps, 0))
    share = p[:, 1].flatten(1).mean(1)
    if close:
        assert ((share < 0.05) | (share > 0.95)).all()
    limit = 3 * math.sqrt(0.3 * 0.7 / 400)
    assert (abs((share > 0.5).double().mean().item() - 0.3) < limit) == close


def test_a_scaled_mask_reaches_the_network_with_variance_one():
    method = CDAL(CDALConfig(kernel=FewStepConfig(num_timesteps=8, input_scale=0.3)), K)
    y = torch.randint(2, (3, K, 40, 40), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    for t in (0, 3, 7):
        times = torch.full((3,), t)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        x = method.unit(method.kernel.q_sample(0.3 * y, times + 1, noise), times)
        assert x.square().mean().item() == pytest.approx(1, abs=0.03)


def test_the_probabilities_of_every_vote_have_the_mean_that_is_given_otherwise():
    net, method = make(), make_method(2)
    image = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(0))
    for window in (None, (6, 8)):
        mean = method.segment(net, image, 3, window, key="a", batch_size=2)
        every = method.segment(net, image, 3, window, key="a", batch_size=2, separate=True)
        assert every.shape == (3 * K, 9, 12)
        torch.testing.assert_close(every.unflatten(0, (3, K)).mean(0), mean)
    first = method.segment(net, image, 1, key="a", separate=True)
    torch.testing.assert_close(method.segment(net, image, 3, key="a", separate=True)[:K], first)


def test_the_share_of_level_sets_with_an_object_is_its_probability_and_each_holds_the_next():
    p = torch.rand(K, 6, 5, 4).softmax(0)
    maps = level_sets(p, 50)
    close = (maps > 0).float().mean(0) - (1 - p[0])
    assert close.abs().max() <= 0.5 / 50 + 1e-6
    assert ((maps[1:] > 0) <= (maps[:-1] > 0)).all()
    for v in (0, 20, 49):
        for voxel in ((0, 0, 0), (3, 2, 1), (5, 4, 3)):
            labels = p[(slice(None), *voxel)].tolist()
            expected = max(range(1, K), key=labels.__getitem__) if 1 - labels[0] > (v + 0.5) / 50 else 0
            assert maps[(v, *voxel)] == expected
