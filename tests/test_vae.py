"""The autoencoder keeps any size, its posterior is a Gaussian, and MONAI's weights give MONAI's numbers."""

import itertools
import math

import pytest
import torch
from closeness import close
from torch import nn

from ldm3d.config import InputError
from ldm3d.vae import AutoencoderKL, Posterior, VAEConfig

SMALL = {"channels": (4, 8), "num_res_blocks": (1,), "num_groups": 2, "latent_channels": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*itertools.product((5, 8), (7, 10)), (1, 1)])
@pytest.mark.parametrize(
    ("strides", "stem"), [(None, (1,)), (((1, 2),), (1,)), (((2, 1),), (1, 2)), (None, (2,))]
)
def test_any_size_in_is_the_same_size_out_in_2d(size, strides, stem):
    check_sizes(VAEConfig(dims=2, in_channels=2, strides=strides, stem=stem, **SMALL), size)


@pytest.mark.parametrize("size", [(5, 7, 6), (8, 4, 1), (9, 10, 11)])
@pytest.mark.parametrize(
    ("strides", "stem"), [(None, (1,)), (((1, 2, 2),), (1,)), (((2, 1, 2),), (1, 2, 1)), (None, (2,))]
)
def test_any_size_in_is_the_same_size_out_in_3d(size, strides, stem):
    check_sizes(VAEConfig(dims=3, strides=strides, stem=stem, **SMALL), size)


def check_sizes(config, size):
    net = AutoencoderKL(config)
    x = torch.randn(2, config.in_channels, *size, generator=seeded())
    factors = [
        s * f
        for s, f in zip((config.strides or ((2,) * config.dims,))[0], config.stem * config.dims, strict=False)
    ]
    latent = (2, 3, *(math.ceil(n / f) for n, f in zip(size, factors, strict=True)))
    assert net.downsampling == tuple(factors)
    assert (2, *net.latent_shape(size)) == latent
    recon, posterior = net(x, torch.randn(latent, generator=seeded(1)))
    assert recon.shape == x.shape
    assert posterior.mean.shape == posterior.logvar.shape == latent
    assert net.decode(posterior.mean).shape[2:] == tuple(
        n * f for n, f in zip(latent[2:], factors, strict=True)
    )


def test_odd_sizes_are_encoded_as_if_their_edge_were_repeated():
    net = AutoencoderKL(VAEConfig(dims=2, **SMALL))
    x = torch.randn(1, 1, 5, 8, generator=seeded())
    padded = torch.cat([x, x[:, :, -1:]], dim=2)
    close(net.encode(x).mean, net.encode(padded).mean, 1e-6)


# --- posterior ----------------------------------------------------------------------------------


def test_the_posterior_is_a_gaussian_with_its_mean_and_log_variance():
    moments = torch.randn(2, 6, 4, 5, generator=seeded())
    posterior = Posterior.from_moments(moments)
    assert torch.equal(posterior.mean, moments[:, :3])
    assert torch.equal(posterior.logvar, moments[:, 3:])
    assert torch.equal(posterior.mode(), posterior.mean)
    noise = torch.randn(2, 3, 4, 5, generator=seeded(1))
    distribution = torch.distributions.Normal(posterior.mean, posterior.std)
    quantile = torch.distributions.Normal(0.0, 1.0).cdf(noise)
    close(distribution.cdf(posterior.sample(noise)), quantile)


def test_the_log_variance_is_clamped_but_its_gradient_brings_it_back():
    raw = torch.tensor([-50.0, -30.0, 0.0, 20.0, 50.0], requires_grad=True)
    moments = torch.stack([torch.zeros(5), raw])[None]
    logvar = Posterior.from_moments(moments).logvar[0, 0]
    assert logvar.tolist() == [-30.0, -30.0, 0.0, 20.0, 20.0]
    kl = 0.5 * (logvar.exp() - logvar - 1)
    (gradient,) = torch.autograd.grad(kl.sum(), raw)
    assert gradient[0] < 0 < gradient[4]  # a step down the gradient goes back into the range


def test_forward_decodes_mean_plus_std_times_noise():
    net = AutoencoderKL(VAEConfig(dims=2, **SMALL))
    x = torch.randn(1, 1, 8, 8, generator=seeded())
    noise = torch.randn(1, 3, 4, 4, generator=seeded(1))
    posterior = net.encode(x)
    close(net(x, noise)[0], net.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise))
    close(net(x)[0], net.decode(posterior.mean))


# --- configurations -------------------------------------------------------------------------------


def test_final_silu_acts_between_the_last_norm_and_convolution():
    nets = []
    for final_silu in (False, True):
        torch.manual_seed(0)
        nets.append(AutoencoderKL(VAEConfig(dims=2, final_silu=final_silu, **SMALL)))
    plain, with_silu = nets
    x = torch.randn(1, 1, 8, 8, generator=seeded())
    *layers, norm, conv = plain.encoder.layers
    h = nn.Sequential(*layers)(x)
    close(plain.encoder(x), conv(norm(h)))
    close(with_silu.encoder(x), conv(nn.functional.silu(norm(h))))


def test_a_plain_trunk_halves_once_a_level_and_takes_none_of_the_settings_of_the_other():
    plain = {"dims": 2, "channels": (4, 8), "trunk": "plain"}
    net = AutoencoderKL(VAEConfig(**plain, res_channels=(3,), attention_levels=(False, False), stem=(1, 1)))
    assert net.downsampling == (4, 4)
    x = torch.rand(2, 1, 13, 10, generator=seeded())
    assert net(x)[0].shape == x.shape
    assert net.latent_shape((13, 10)) == net.encode(x).mean.shape[1:]
    with pytest.raises(InputError, match=r"stem: got \(2,\), has no effect with trunk plain"):
        VAEConfig(**plain, stem=(2,))
    with pytest.raises(InputError, match=r"res_channels: got \(3,\), has no effect with trunk norm"):
        VAEConfig(res_channels=(3,))
    with pytest.raises(InputError, match=r"res_channels: expected 1 or 2 positive widths, got \(1, 2, 3\)"):
        VAEConfig(**plain, res_channels=(1, 2, 3))


def test_the_network_exists_on_the_meta_device_without_memory():
    with torch.device("meta"):
        net = AutoencoderKL(VAEConfig(channels=(64, 128, 256), latent_channels=8))
        recon, posterior = net(torch.empty(1, 1, 65, 128, 127), torch.empty(1, 8, 17, 32, 32))
        flat = AutoencoderKL(VAEConfig(dims=2, channels=(64, 128, 256), mid_attention=True))
    assert recon.shape == (1, 1, 65, 128, 127)
    assert posterior.mean.device.type == "meta"
    assert sum(p.numel() for p in net.parameters()) == 21_000_353  # that of MONAI's tutorial autoencoder
    assert sum(p.numel() for p in flat.parameters()) == 12_296_961  # that of a published 2-D one


# --- MONAI ----------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "switches",
    [
        {"num_res_blocks": (1, 2)},
        {"mid_attention": True, "attention_levels": (False, True)},
        {"mid_attention": True, "attn_out_proj": False},
        {"upsample": "deconv2"},
    ],
)
def test_monai_weights_give_monai_outputs_and_gradients(dims, switches):
    pytest.importorskip("monai")
    pytest.importorskip("einops")
    from benchmarks.monai_weights import twin_autoencoder

    torch.manual_seed(0)
    ours, theirs = twin_autoencoder(VAEConfig(dims=dims, **{**SMALL, **switches}))
    x = torch.randn(2, 1, *(8, 12, 8)[:dims], generator=seeded())
    posterior = ours.encode(x)
    mean, std = theirs.encode(x)
    close(posterior.mean, mean)
    close(posterior.std, std)
    noise = torch.randn(mean.shape, generator=seeded(1))
    recon, expected = ours(x, noise)[0], theirs.decode(mean + std * noise)
    close(recon, expected)
    recon.square().mean().backward()
    expected.square().mean().backward()
    for mine, other in zip(ours.encoder.layers, theirs.encoder.blocks, strict=True):
        close(*(sum(p.grad.double().square().sum() for p in m.parameters()) for m in (mine, other)), 2e-4)
    for mine, other in zip(ours.decoder.layers, theirs.decoder.blocks, strict=True):
        close(*(sum(p.grad.double().square().sum() for p in m.parameters()) for m in (mine, other)), 2e-4)
    close(ours.encoder.layers[0].weight.grad, theirs.encoder.blocks[0].conv.weight.grad, 1e-4)
    close(ours.decoder.layers[0].weight.grad, theirs.decoder.blocks[0].conv.weight.grad, 1e-4)
    close(ours.decoder.layers[-1].weight.grad, theirs.decoder.blocks[-1].conv.weight.grad, 1e-4)
