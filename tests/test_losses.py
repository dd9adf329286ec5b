"""Every loss equals its formula, computed another way: sample by sample, with random weights of a VGG."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm3d import InputError
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ldm3d.losses import (
    VGG16,
    PerceptualConfig,
    PerceptualLoss,
    adaptive_weight,
    cross_entropy_loss,
    dice_loss,
    disc_accuracy,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    gradient_loss,
    kl_per_element,
    last_gradients,
    r1_penalty,
    ramp,
    reconstruction_loss,
)

SHAPES = {2: (3, 2, 9, 8), 3: (3, 2, 9, 8, 5)}


@pytest.fixture(params=[2, 3], ids="{}d".format)
def pair(request):
    generator = torch.Generator().manual_seed(request.param)
    return tuple(
        torch.randn(SHAPES[request.param], dtype=torch.float64, generator=generator) for _ in range(2)
    )


def test_kl_is_that_of_torch_distributions_in_nats_per_element(pair):
    mean, logvar = pair
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl_per_element(mean, logvar), expected, rtol=1e-10, atol=1e-10)


def test_kl_is_zero_for_a_standard_normal_and_keeps_its_gradient_when_it_is_huge():
    zeros = torch.zeros(1, 2, 3, 3)
    assert kl_per_element(zeros, zeros).item() == 0
    mean = torch.full((1, 2, 3, 3), 1e3, requires_grad=True)
    kl_per_element(mean, zeros).sum().backward()
    torch.testing.assert_close(mean.grad, torch.full_like(mean, 1e3 / mean.numel()))


def test_kl_of_a_tiny_difference_survives_float32():
    logvar = torch.full((1, 1, 4, 4), 1e-3)
    expected = (torch.expm1(logvar.double()) - logvar.double()).mean() / 2
    torch.testing.assert_close(
        kl_per_element(torch.zeros_like(logvar), logvar)[0].double(), expected, rtol=1e-3, atol=0
    )


def test_reconstruction_loss_is_the_mean_error_of_each_sample(pair):
    recon, x = pair
    for kind, reduce in (("l1", torch.nn.functional.l1_loss), ("l2", torch.nn.functional.mse_loss)):
        expected = torch.stack([reduce(a, b) for a, b in zip(recon, x, strict=True)])
        torch.testing.assert_close(reconstruction_loss(recon, x, kind), expected, rtol=1e-12, atol=1e-12)


def brute_force_gradient_loss(recon, x, num_scales):
    """One sample (C, *S): loops over scales, axes and neighbours."""
    terms = []
    for _ in range(num_scales):
        for axis in range(1, x.ndim):
            steps = range(x.shape[axis] - 1)
            differ = [
                (recon.select(axis, i + 1) - recon.select(axis, i))
                - (x.select(axis, i + 1) - x.select(axis, i))
                for i in steps
            ]
            terms.append(torch.stack(differ).abs().mean())
        for axis in range(1, x.ndim):
            if x.shape[axis] >= 4:
                even = x.shape[axis] // 2 * 2
                recon, x = (
                    (v.narrow(axis, 0, even).unfold(axis, 2, 2).mean(-1) if v.shape[axis] >= 4 else v)
                    for v in (recon, x)
                )
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_gradient_loss_is_the_brute_force_sum_over_axes_and_scales(pair, num_scales):
    recon, x = pair
    expected = torch.stack(
        [brute_force_gradient_loss(a, b, num_scales) for a, b in zip(recon, x, strict=True)]
    )
    if num_scales == 3:  # the axis of 5 voxels is halved once only, the others twice
        assert min(x.shape[2:]) in (5, 8)
    torch.testing.assert_close(gradient_loss(recon, x, num_scales), expected, rtol=1e-12, atol=1e-12)


def test_gradient_loss_ignores_an_offset_and_sees_the_blur_that_keeps_the_mean_error(pair):
    _, x = pair
    assert gradient_loss(x + 3, x).abs().max() < 1e-12
    edge = (torch.arange(16) >= 8).double().expand(1, 1, 16, 16)
    shifted = edge + 0.125  # the same mean absolute error as a blurred edge, but sharp
    blurred = edge.clone()
    blurred[..., 6:10] = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(reconstruction_loss(shifted, edge), reconstruction_loss(blurred, edge))
    assert gradient_loss(blurred, edge) > gradient_loss(shifted, edge) + 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3, 1), (1, 1, 1)])
def test_gradient_loss_of_flat_and_tiny_images_is_finite(size):
    x = torch.randn(2, 1, *size)
    loss = gradient_loss(torch.zeros_like(x), x)
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_half_precision_inputs_are_reduced_in_float32():
    x = torch.randn(2, 1, 32, 32).bfloat16()
    for loss in (reconstruction_loss(x * 0, x, "l2"), gradient_loss(x * 0, x), kl_per_element(x, x)):
        assert loss.dtype == torch.float32
    assert torch.equal(
        reconstruction_loss(x * 0, x, "l2"), reconstruction_loss(x.float() * 0, x.float(), "l2")
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_dice_and_cross_entropy_equal_monai_and_torch_and_ones_as_weights_change_nothing(dims):
    monai = pytest.importorskip("monai.losses", reason="MONAI (extra test) is not installed")
    size, generator = (5, 6, 4)[:dims], torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, *size, generator=generator)
    labels = torch.randint(3, (2, *size), generator=generator)
    one_hot = F.one_hot(labels, 3).movedim(-1, 1).float()
    reference = monai.DiceLoss(include_background=False, reduction="none", smooth_nr=1, smooth_dr=1)
    expected = reference(logits.softmax(1), one_hot).flatten(1).mean(1)
    assert torch.allclose(dice_loss(logits.softmax(1), one_hot), expected, atol=1e-6)
    ones, weight = torch.ones(2, *size), torch.rand(2, *size, generator=generator)
    assert torch.allclose(dice_loss(logits.softmax(1), one_hot, ones), expected, atol=1e-6)
    per_voxel = -torch.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(cross_entropy_loss(logits, labels), per_voxel.flatten(1).mean(1), atol=1e-6)
    weighted = (weight * per_voxel).flatten(1).mean(1)
    assert torch.allclose(cross_entropy_loss(logits, labels, weight), weighted, atol=1e-6)


def test_dice_loss_of_a_patch_without_any_label_is_small_for_the_right_answer():
    nothing = torch.zeros(1, 2, 4, 4)
    nothing[:, 0] = 1
    assert dice_loss(nothing, nothing).item() == 0
    assert dice_loss(1 - nothing, nothing).item() == pytest.approx(1 - 1 / 17)


def test_free_bits_price_only_what_a_channel_has_above_them():
    mean = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean[:, 0] *= 1e-3  # a channel that carries nothing
    mean = mean.clone().requires_grad_()
    logvar = torch.zeros_like(mean)
    channels = (mean.detach().square() / 2).flatten(2).mean(2)
    loss = kl_per_element(mean, logvar, free_bits=0.1)
    assert torch.allclose(loss, channels.clamp(min=0.1).mean(1), rtol=1e-10)
    loss.sum().backward()
    assert mean.grad[:, 0].abs().max() == 0
    assert torch.allclose(mean.grad[:, 1:], mean.detach()[:, 1:] / mean[0].numel(), rtol=1e-10)


def test_a_ramp_is_0_before_its_start_and_1_after_its_length():
    assert [ramp(step, 3, 4) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [ramp(step, 2, 0) for step in range(4)] == [0, 0, 1, 1]


# --- adversarial --------------------------------------------------------------------------------------------


def logits(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(3, 1, n, n, generator=generator, dtype=torch.float64) for n in (4, 2)]


def over_patches(values: list[torch.Tensor], of) -> torch.Tensor:
    """(B,) by loops over scales and patches."""
    scales = [[sum(of(float(v)) for v in sample.flatten()) / sample.numel() for sample in x] for x in values]
    return torch.tensor(scales, dtype=torch.float64).mean(0)


@pytest.mark.parametrize(
    ("kind", "on_real", "on_fake", "on_made"),
    [
        ("hinge", lambda r: max(0, 1 - r), lambda f: max(0, 1 + f), lambda f: -f),
        ("lsgan", lambda r: (r - 1) ** 2 / 2, lambda f: f**2 / 2, lambda f: (f - 1) ** 2 / 2),
        (
            "non_saturating",
            lambda r: math.log1p(math.exp(-r)),
            lambda f: math.log1p(math.exp(f)),
            lambda f: math.log1p(math.exp(-f)),
        ),
    ],
)
def test_adversarial_losses_are_their_formulas_patch_by_patch(kind, on_real, on_fake, on_made):
    real, fake = logits(0), logits(1)
    expected = over_patches(real, on_real) + over_patches(fake, on_fake)
    torch.testing.assert_close(discriminator_loss(real, fake, kind), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        generator_loss(fake, kind), over_patches(fake, on_made), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("kind", ["hinge", "lsgan", "non_saturating"])
def test_both_sides_gain_from_the_right_direction(kind):
    high, low = [torch.full((1, 1, 2, 2), 2.0)], [torch.full((1, 1, 2, 2), -1.0)]
    assert discriminator_loss(high, low, kind) < discriminator_loss(low, high, kind)
    assert generator_loss([torch.full((1, 1, 2, 2), 0.9)], kind) < generator_loss(low, kind)
    assert disc_accuracy(high, low, kind).item() == 1
    assert disc_accuracy(low, high, kind).item() == 0
    assert disc_accuracy(high, high, kind).item() == 0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights_at_any_size(dims):
    conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 1, 2, stride=2)  # patches that do not overlap
    for size in (4, 8):
        x = torch.randn(3, 1, *(size,) * dims, requires_grad=True)
        penalty = r1_penalty([conv(x)], x)
        torch.testing.assert_close(penalty, conv.weight.detach().square().sum().expand(3))
    penalty.mean().backward()
    torch.testing.assert_close(conv.weight.grad, 2 * conv.weight.detach())


def test_r1_can_be_differentiated_through_every_norm_of_the_discriminator():
    for norm in ("instance", "group", "none"):
        config = PatchDiscriminatorConfig(dims=2, channels=4, num_layers=1, norm=norm, spectral_norm=True)
        net = PatchDiscriminator(config)
        x = torch.randn(2, 1, 16, 16, requires_grad=True)
        r1_penalty(net(x).logits, x).mean().backward()
        weights = [p for name, p in net.named_parameters() if "weight" in name and p.ndim == 4]
        assert all(p.grad.abs().sum() > 0 for p in weights)


def test_feature_matching_is_the_mean_difference_of_hidden_maps_and_leaves_the_real_ones_alone():
    made = [torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 8, 3, 3, requires_grad=True)]
    real = [torch.randn_like(v, requires_grad=True) for v in made]
    loss = feature_matching_loss(made, real)
    expected = torch.stack(
        [torch.stack([F.l1_loss(a[i], b[i]) for a, b in zip(made, real, strict=True)]).mean() for i in (0, 1)]
    )
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert all(v.grad is None for v in real)
    assert all(v.grad.abs().sum() > 0 for v in made)


# --- the adaptive weight ------------------------------------------------------------------------------------


def two_losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, nn.Parameter]:
    """Means over the batch x of two losses of one layer."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3)
    y = layer(x)
    return (y - 1).abs().mean(), 0.01 * y.square().mean(), layer.weight


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_adaptive_weight_makes_both_gradients_at_the_last_layer_equally_long_up_to_the_cap():
    loss, g_loss, weight = two_losses(images())
    a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (loss, g_loss))
    for scale in (1.0, 2.0**16):
        gradients = last_gradients(loss, g_loss, weight, scale)
        torch.testing.assert_close(adaptive_weight(gradients), a / (b + 1e-4))
    assert adaptive_weight(gradients, cap=1.5).item() == 1.5
    assert not adaptive_weight(gradients).requires_grad
    (loss + g_loss).backward()  # the graph is still there


# --- perceptual ---------------------------------------------------------------------------------------------

WIDTHS = (3, 4, 5, 6, 7)  # of the stages; VGG-16 has 64, 128, 256, 512, 512


def random_vgg() -> tuple[nn.Sequential, list[torch.Tensor]]:
    """Layers numbered as torchvision numbers vgg16.features, and weights of the heads."""
    torch.manual_seed(0)
    layers, width = [], 3
    for stage, out in zip(VGG16, WIDTHS, strict=True):
        for _ in stage:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers).requires_grad_(False), [torch.rand(n) for n in WIDTHS]


def reference(net: nn.Sequential, heads: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    """LPIPS of two images (3, H, W), from the paper's equation 1, in float64."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    net, total = net.double(), 0.0
    pair = [((v.double() - shift[:, None, None]) / scale[:, None, None])[None] for v in (a, b)]
    stage = 0
    for layer in net:
        if isinstance(layer, nn.MaxPool2d):
            f, g = (v[0] / v[0].norm(dim=0).clamp(min=1e-9) for v in pair)
            total += float(((f - g).square() * heads[stage].double()[:, None, None]).sum(0).mean())
            stage += 1
            if stage == 5 or min(pair[0].shape[2:]) < 2:
                break
        pair = [layer(v) for v in pair]
    return total


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """(network, heads, files of its weights by layout)."""
    place = tmp_path_factory.mktemp("vgg")
    net, heads = random_vgg()
    features = {f"features.{k}": v for k, v in net.state_dict().items()} | {
        "classifier.0.weight": torch.ones(2)
    }
    lins = {f"lin{i}.model.1.weight": v.view(1, -1, 1, 1) for i, v in enumerate(heads)}
    bounds = (4, 9, 16, 23, 30)
    whole = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)} | lins
    whole |= {f"lins.{i}.model.1.weight": v.view(1, -1, 1, 1) for i, v in enumerate(heads)}
    for key, value in net.state_dict().items():
        part = next(i for i, end in enumerate(bounds) if int(key.split(".")[0]) < end)
        whole[f"net.slice{part + 1}.{key}"] = value
    for name, content in (("torchvision", features), ("heads", lins), ("lpips", whole)):
        torch.save(content, place / f"{name}.pth")
    files = {name: str(place / f"{name}.pth") for name in ("torchvision", "heads", "lpips")}
    return net, heads, files


def grey_pair(*size: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(2, 2, channels, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("layout", [("lpips",), ("torchvision", "heads"), ("torchvision",)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_perceptual_loss_is_equation_1_of_lpips_for_every_layout_of_the_file(vgg, layout, channels):
    net, heads, files = vgg
    heads = heads if layout != ("torchvision",) else [torch.ones(n) for n in WIDTHS]
    loss = PerceptualLoss(PerceptualConfig(tuple(files[name] for name in layout)))
    recon, x = grey_pair(20, 33, channels=channels)
    if channels == 3:
        expected = [reference(net, heads, a, b) for a, b in zip(recon, x, strict=True)]
    else:  # every channel is a grey image
        grey = [[v[c].expand(3, -1, -1) for c in range(channels)] for v in (*recon, *x)]
        each = [
            [reference(net, heads, a, b) for a, b in zip(grey[i], grey[i + 2], strict=True)] for i in (0, 1)
        ]
        expected = [sum(v) / channels for v in each]
    assert loss(recon, x).tolist() == pytest.approx(expected, rel=5e-4)
    assert torch.equal(loss(x, x), torch.zeros(2))


def test_volumes_are_compared_in_the_slices_that_each_samples_generator_draws(vgg):
    net, heads, files = vgg
    loss = PerceptualLoss(PerceptualConfig((files["lpips"],), fraction=0.3))
    recon, x = grey_pair(10, 16, 18)
    draws = [torch.Generator().manual_seed(i) for i in (0, 1)]
    expected = []
    for i in (0, 1):
        draw, planes = torch.Generator().manual_seed(i), []
        for axis, size in enumerate((10, 16, 18)):
            rows = torch.randperm(size, generator=draw)[: round(0.3 * size)].tolist()
            slices = [[v[i, 0].select(axis, r).expand(3, -1, -1) for v in (recon, x)] for r in rows]
            planes.append(sum(reference(net, heads, a, b) for a, b in slices) / len(rows))
        expected.append(sum(planes) / 3)
    assert loss(recon, x, draws).tolist() == pytest.approx(expected, rel=1e-4)
    single = loss(recon[1:], x[1:], [torch.Generator().manual_seed(1)])  # whatever the batch
    assert single.item() == pytest.approx(expected[1], rel=1e-4)
    with pytest.raises(ValueError, match="draws"):
        loss(recon, x)


@pytest.mark.parametrize("size", [(16, 16), (5, 4), (8, 9, 3)])
def test_the_perceptual_gradient_lowers_the_loss_and_is_finite_even_for_equal_and_tiny_images(vgg, size):
    loss = PerceptualLoss(PerceptualConfig((vgg[2]["lpips"],), fraction=1.0))
    recon, x = grey_pair(*size)

    def value(y: torch.Tensor) -> torch.Tensor:
        return loss(y, x, [torch.Generator().manual_seed(i) for i in (0, 1)]).sum()

    for start in (recon, x, torch.zeros_like(x)):
        y = start.clone().requires_grad_()
        value(y).backward()
        assert y.grad.isfinite().all()
    y = recon.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(y), y)
    assert value(y - 1e-3 * gradient / gradient.norm()) < value(y)
    assert not loss.state_dict()  # nothing of it goes into checkpoints
    assert not list(loss.parameters())


def test_a_missing_wrong_or_damaged_file_is_named_with_what_to_do(vgg, tmp_path):
    for files, words in (
        ((), ["perceptual.weights", "lpips_vgg.pth", "vgg16-397923af.pth"]),
        (("/nowhere.pth",), ["/nowhere.pth", "no such file"]),
        ((vgg[2]["heads"],), ["heads.pth", "features.0.weight"]),
    ):
        with pytest.raises(InputError) as caught:
            PerceptualLoss(PerceptualConfig(files))
        assert all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match=r"text\.pth: not a file of weights"):
        PerceptualLoss(PerceptualConfig((str(tmp_path / "text.pth"),)))
    with pytest.raises(InputError, match="fraction"):
        PerceptualConfig(fraction=0.0)
