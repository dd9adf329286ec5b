"""What is true of every network: all parameters learn, half precision and checkpointing change nothing that
matters, and a mistake is named."""

import dataclasses
import json

import pytest
import torch
from networks import CHECKPOINTED, NETWORKS, outputs_and_gradients, tensors

from ldm3d import (
    VQVAE,
    AnatomyConfig,
    AutoencoderKL,
    InputError,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    QuantizerConfig,
    TimeDiscriminator,
    TimeDiscriminatorConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from ldm3d.config import from_dict, to_dict


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name, dims):
    net, inputs = NETWORKS[name](dims)
    _, gradients = outputs_and_gradients(net, net, inputs)
    assert [n for n, _ in net.named_parameters() if n not in gradients or not gradients[n].any()] == []


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_neither_an_output_nor_a_gradient(name, dims):
    results = []
    for checkpointing in (False, True):
        net, inputs = NETWORKS[name](dims, checkpointing)
        results.append(outputs_and_gradients(net, net, inputs))
    (outputs, gradients), (same_outputs, same_gradients) = results
    assert all(torch.equal(a, b) for a, b in zip(outputs, same_outputs, strict=True))
    assert gradients.keys() == same_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            same_gradients[key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())
        )


# A vector between two codes may go to the other one: test_vqvae.py says what is exact there
CONTINUOUS = [name for name in NETWORKS if not name.startswith("vq")]


@pytest.mark.parametrize(("amp", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_half_precision_stays_near_fp32(name, dims, amp, tolerance):
    net, inputs = NETWORKS[name](dims)
    with torch.no_grad():
        exact = tensors(net(*inputs))
        with torch.autocast("cpu", amp):
            rough = tensors(net(*inputs))
    for a, b in zip(exact, rough, strict=True):
        assert (b.float() - a).square().mean().sqrt() <= tolerance * a.square().mean().sqrt()


def image(*shape):
    return torch.zeros(2, *shape)


SMALL = {"channels": (8, 16), "num_groups": 4, "num_res_blocks": (1,)}
NET = UNetConfig(2, 3, 3, (8, 16), (1,), (False, True), head_channels=8, num_groups=4)
TIME = torch.zeros(2)
MISTAKES = [
    (lambda: VAEConfig(stem=(4,)), "stem: expected 1 or 2 for each of 3 axes, got"),
    (lambda: VAEConfig(attention_levels=(True, False)), "attention_levels: expected 1 or 3 values"),
    (lambda: VAEConfig(num_res_blocks=(1, 1)), "num_res_blocks: expected 1 or 3 values"),
    (lambda: VAEConfig(channels=()), "channels: expected one positive width per level"),
    (lambda: VAEConfig(strides=((2, 3, 1),) * 2), "strides: expected 1 or 2 for each of 3 axes"),
    (lambda: VAEConfig(strides=()), "strides: expected 2 tuples"),
    (
        lambda: AutoencoderKL(VAEConfig(3, **SMALL)).encode(image(2, 8, 8, 8)),
        r"image: expected \(B, 1, 3 axes\), got shape \(2, 2, 8, 8, 8\)",
    ),
    (
        lambda: AutoencoderKL(VAEConfig(2, **SMALL)).decode(image(3, 4, 4)),
        r"latent: expected \(B, 4, 2 axes\), got shape \(2, 3, 4, 4\)",
    ),
    (
        lambda: VQVAE(VAEConfig(2, **SMALL), QuantizerConfig(16)).encode(image(2, 8, 8)),
        r"image: expected \(B, 1, 2 axes\), got shape \(2, 2, 8, 8\)",
    ),
    (
        lambda: VQVAE(VAEConfig(2, **SMALL), QuantizerConfig(16)).decode(image(3, 4, 4)),
        r"latent: expected \(B, 4, 2 axes\), got shape \(2, 3, 4, 4\)",
    ),
    (lambda: QuantizerConfig(codebook_size=1), "codebook_size: expected at least 2"),
    (lambda: QuantizerConfig(decay=1.0), "decay: expected 0 <= decay < 1"),
    (lambda: QuantizerConfig(revive_below=-0.1), "revive_below: expected 0 <= revive_below < 1"),
    (lambda: QuantizerConfig(kmeans_steps=-1), "kmeans_steps: expected at least 0"),
    (lambda: UNetConfig(channels=(32, 48), attention_levels=(False, True)), "head_channels: 32 does not"),
    (lambda: UNetConfig(dropout=1.0), "dropout: expected a number in"),
    (
        lambda: UNet(NET)(image(3, 8, 8), TIME, torch.zeros(2, 5, 6)),
        "context: this U-Net wants no context",
    ),
    (
        lambda: UNet(dataclasses.replace(NET, context_dim=6))(image(3, 8, 8), TIME),
        r"context: this U-Net wants context \(B, M, 6\)",
    ),
    (
        lambda: UNet(NET)(image(3, 6, 7, 8), TIME),
        r"x: expected \(B, 3, 2 axes\), got shape \(2, 3, 6, 7, 8\)",
    ),
    (lambda: AnatomyConfig(weights=(2.0, -1.0, 0.1)), "weights: expected numbers from 0 on"),
    (lambda: AnatomyConfig(phases=(0.5, 0.2, 0.8)), "phases: expected three rising shares"),
    (lambda: AnatomyConfig(balance=1.5), "^balance: expected a number from 0 to 1"),
    (lambda: AnatomyConfig(head_balance=-1), "head_balance: expected a number from 0 to 1"),
    (lambda: AnatomyConfig(per_label=0), "per_label: expected at least 1, got 0"),
    (lambda: PatchDiscriminatorConfig(num_scales=0), "num_scales: expected at least 1"),
    (
        lambda: PatchDiscriminator(PatchDiscriminatorConfig(3, channels=4))(image(1, 32, 32)),
        r"image: expected \(B, 1, 3 axes\), got shape \(2, 1, 32, 32\)",
    ),
    (lambda: TimeDiscriminatorConfig(channels=()), "channels: expected one positive width per block"),
    (
        lambda: TimeDiscriminator(TimeDiscriminatorConfig(2, 5))(image(2, 9, 6), TIME, image(2, 9, 6)),
        r"pair: expected \(B, 5, 2 axes\), got \(2, 4, 9, 6\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_named_with_what_was_expected(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(strides=((1, 2, 2), (2, 2, 2)), stem=(1, 2, 2), attention_levels=(False, False, True)),
        UNetConfig(strides=((1, 2, 2), (2, 2, 2)), context_dim=8),
    ],
    ids=["autoencoder", "unet"],
)
def test_a_configuration_survives_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
