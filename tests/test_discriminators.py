"""The patch discriminator is the published network: parameters, receptive field, halves judged alone."""

import pytest
import torch
from networks import randomised
from torch import nn

from ldm3d import InputError
from ldm3d.discriminators import (
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    TimeDiscriminator,
    TimeDiscriminatorConfig,
    minibatch_statistic,
)


def make(dims: int = 2, **options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(PatchDiscriminatorConfig(dims=dims, **{"channels": 4, **options}))


def image(dims: int, size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, *(size,) * dims, generator=generator)


@pytest.mark.parametrize(("dims", "count"), [(2, 692_769), (3, 2_770_977)])
def test_the_number_of_parameters_is_that_of_the_published_discriminator(dims, count):
    net = make(dims, channels=32)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parity
@pytest.mark.parametrize("dims", [2, 3])
def test_logits_and_features_equal_monais_with_the_same_weights(dims):
    nets = pytest.importorskip("monai.networks.nets", reason="monai (extra test) is not installed")
    theirs = nets.PatchDiscriminator(dims, channels=4, in_channels=1, num_layers_d=3, norm="INSTANCE")
    ours = make(dims)
    layers = [theirs.initial_conv, *(getattr(theirs, str(i)) for i in range(3)), theirs.final_conv]
    for mine, other in zip(ours.scales[0], layers, strict=True):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            a.data.copy_(b.data)
    x = image(dims, 32)
    *features, logits = theirs(x)
    out = ours(x)
    assert torch.allclose(out.logits[0], logits, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(out.features, features, strict=True))


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34)])
def test_a_logit_sees_a_patch_of_the_stated_width_and_nothing_beyond(num_layers, field):
    net = make(num_layers=num_layers, norm="none")
    x = image(2, 80, batch=1).requires_grad_()
    logits = net(x).logits[0]
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == field


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
@pytest.mark.parametrize("dims", [2, 3])
def test_real_and_fake_in_one_batch_are_judged_as_they_are_alone(dims, norm):
    net = make(dims, norm=norm, num_layers=2, num_scales=2)
    real, fake = image(dims, 24, seed=1), image(dims, 24, seed=2)
    for half, alone in zip(net(torch.cat([real, fake])).halves(), (net(real), net(fake)), strict=True):
        assert len(half.logits) == 2
        assert len(half.features) == 6
        for a, b in zip((*half.logits, *half.features), (*alone.logits, *alone.features), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_the_coarser_scale_sees_the_averaged_image():
    net = make(num_layers=1, num_scales=2)
    x = image(2, 20)
    single = make(num_layers=1)
    single.scales[0].load_state_dict(net.scales[1].state_dict())
    assert torch.allclose(net(x).logits[1], single(nn.functional.avg_pool2d(x, 2)).logits[0], atol=1e-6)


def test_spectral_norm_brings_every_weight_to_a_largest_singular_value_of_one():
    net = make(spectral_norm=True, num_layers=1, norm="none")
    for _ in range(30):
        net(image(2, 12))
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 3
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1.0, abs=0.02)


def test_spectral_norm_is_resumed_from_the_state_dict():
    nets = [make(spectral_norm=True, num_layers=1) for _ in range(2)]
    nets[0](image(2, 12))
    nets[1].load_state_dict(nets[0].state_dict())
    a, b = (net(image(2, 12, seed=3)).logits[0] for net in nets)
    assert torch.equal(a, b)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("num_layers", "num_scales"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_the_smallest_image_is_accepted_and_a_smaller_one_refused_with_the_reason(
    dims, num_layers, num_scales
):
    net = make(dims, num_layers=num_layers, num_scales=num_scales, channels=2)
    size = net.config.min_size
    assert all(torch.isfinite(logits).all() for logits in net(image(dims, size)).logits)
    with pytest.raises(InputError, match=f"num_layers.*{size} voxels"):
        net(image(dims, size - 1))


# --- the discriminator of a diffusion step ------------------------------------------------------------------


def make_timed(dims: int, **changes) -> TimeDiscriminator:
    torch.manual_seed(0)
    settings = {"in_channels": 4, "channels": (4, 6, 8), "emb_dim": 8, **changes}
    return randomised(TimeDiscriminator(TimeDiscriminatorConfig(dims, **settings)))


def pairs(dims: int, num: int, size=(9, 6, 5)) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    x_t, x_prev = torch.randn(2, num, 2, *size[:dims], generator=draw)
    return x_t, torch.arange(num), x_prev


@pytest.mark.parametrize("num", [1, 2, 3, 7])
@pytest.mark.parametrize("dims", [2, 3])
def test_any_batch_and_image_size_has_one_finite_logit_a_sample_and_finite_gradients_twice(dims, num):
    net = make_timed(dims)
    x_t, t, x_prev = pairs(dims, num)
    x_t.requires_grad_()
    out = net(x_t, t, x_prev)
    assert out.logits[0].shape == (num, 1)
    assert [f.shape[1:] for f in out.features] == [(w, *s[:dims]) for w, s in SHAPES]
    (gradient,) = torch.autograd.grad(out.logits[0].sum(), x_t, create_graph=True)
    (out.logits[0].sum() + gradient.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


SHAPES = [(4, (9, 6, 5)), (6, (5, 3, 3)), (8, (3, 2, 2))]


def test_time_and_the_order_of_the_pair_matter():
    net, (x_t, t, x_prev) = make_timed(2), pairs(2, 3)
    logits = net(x_t, t, x_prev).logits[0]
    assert not torch.allclose(logits, net(x_t, t + 1, x_prev).logits[0], atol=1e-4)
    assert not torch.allclose(logits, net(x_prev, t, x_t).logits[0], atol=1e-4)


def test_the_minibatch_statistic_is_the_mean_deviation_of_each_part():
    h = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = minibatch_statistic(h, parts=2)
    assert found.shape == (6, 1, 4, 5)
    for i in (0, 1):
        expected = h[3 * i : 3 * i + 3].std(0, correction=0).mean()
        assert torch.allclose(found[3 * i : 3 * i + 3], expected.expand(3, 1, 4, 5), atol=1e-6)
    alone = h[:1].clone().requires_grad_()
    minibatch_statistic(alone).sum().backward()
    assert minibatch_statistic(h[:1]).max() < 1.01e-4
    assert not alone.grad.any()


def test_real_and_generated_pairs_in_one_batch_are_judged_as_they_are_alone():
    net, (x_t, t, x_prev) = make_timed(3), pairs(3, 4)
    both = net(x_t, t, x_prev, parts=2).logits[0]
    for part in (slice(0, 2), slice(2, 4)):
        alone = net(x_t[part], t[part], x_prev[part]).logits[0]
        assert torch.allclose(both[part], alone, atol=1e-5)
