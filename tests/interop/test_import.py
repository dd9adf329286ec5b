"""Weights of other libraries give their outputs and gradients in our networks.

Every row of AUTOENCODERS and U_NETS is one configuration: the other library's own class with random weights,
in the spelling of one of its versions. Outputs agree to 1e-5 and gradients to 1e-4 of the largest value.
"""

import copy
from pathlib import Path

import pytest
import torch

from ldm3d.conditioner import Conditioned
from ldm3d.config import InputError
from ldm3d.interop.families import rewrite
from ldm3d.interop.importing import Imported, open_weights
from ldm3d.interop.layouts import extract
from ldm3d.interop.peers import build, compare, describe, relative_error

pytestmark = pytest.mark.parity
peers = pytest.importorskip("peers", reason="needs monai", exc_type=ImportError)

MIDDLE = {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True}
ATTENTION = {"attention_levels": (False, True), **MIDDLE}
THREE = {"channels": (4, 8, 8), "attention_levels": (False, False, True), "num_res_blocks": (1, 2, 1)}


def same(state):
    return state


def ddp(state):
    return {f"module._orig_mod.{name}": value for name, value in state.items()}


def monai(dims, spelled=same, **changes):
    return lambda: (peers.autoencoder(dims, **changes), spelled)


def old(dims, **changes):
    return lambda: (peers.generative(dims, **changes), peers.old_names)


def maisi(**changes):
    return lambda: (peers.maisi(**changes), same)


def vqvae(dims, spelled=same, **changes):
    return lambda: (peers.vqvae(dims, **changes), spelled)


def diffusers(spelled=same, **changes):
    def make():
        pytest.importorskip("diffusers")
        return peers.diffusers(**changes), spelled

    return make


AUTOENCODERS = {  # name -> (network, how it is spelled), what shapes cannot tell
    "monai 2d": (monai(2), {}),
    "monai 3d": (monai(3), {}),
    "monai three levels": (monai(3, **THREE), {}),
    "monai attention 2d": (monai(2, **ATTENTION), {}),
    "monai attention 3d": (monai(3, **ATTENTION), {}),
    "monai attention everywhere": (monai(2, attention_levels=(True, True), **MIDDLE), {}),
    "monai attention of levels only": (monai(2, attention_levels=(False, True)), {}),
    "monai middle in the encoder only": (monai(2, with_encoder_nonlocal_attn=True), {}),
    "monai middle in the decoder only": (monai(2, with_decoder_nonlocal_attn=True), {}),
    "monai without projection": (monai(2, include_fc=False, **ATTENTION), {}),
    "monai combined qkv": (monai(3, lambda state: peers.combined(state), **ATTENTION), {}),
    "monai transposed": (monai(3, use_convtranspose=True), {}),
    "monai transposed 2d": (monai(2, use_convtranspose=True, **ATTENTION), {}),
    "monai more channels": (monai(2, in_channels=3, out_channels=3, latent_channels=5), {}),
    "monai other epsilon": (monai(2, norm_eps=1e-2), {"gn_eps": 1e-2}),
    "monai one level": (monai(2, channels=(4,), attention_levels=(False,)), {}),
    "monai of DDP and compile": (monai(2, ddp, **ATTENTION), {}),
    "monai on symmetric images": (monai(3), {"image_range": (-1.0, 1.0)}),
    "generative 2d": (old(2), {}),
    "generative 3d": (old(3, **THREE), {}),
    "generative attention": (old(2, **ATTENTION), {}),
    "generative attention 3d": (old(3, **ATTENTION), {}),
    "generative transposed": (old(3, transposed=True), {"upsample": "deconv3"}),
    "generative transposed 2d": (old(2, transposed=True, **ATTENTION), {"upsample": "deconv3"}),
    "maisi": (maisi(), {}),
    "maisi three levels": (
        maisi(num_channels=(4, 8, 8), attention_levels=(False,) * 3, num_res_blocks=(2, 1, 2)),
        {},
    ),
    "maisi transposed": (maisi(use_convtranspose=True), {"upsample": "deconv3"}),
    "maisi attention": (maisi(**ATTENTION), {}),
    "maisi attention with projection": (maisi(include_fc=True, **ATTENTION), {}),
    "diffusers": (diffusers(), {}),
    "diffusers three levels": (diffusers(block_out_channels=(4, 8, 8), layers_per_block=2), {}),
    "diffusers colour": (diffusers(in_channels=3, out_channels=3), {}),
    "diffusers without quant_conv": (diffusers(use_quant_conv=False, use_post_quant_conv=False), {}),
    "diffusers of before": (diffusers(lambda state: peers.early_diffusers_names(state)), {}),
    "compvis": (diffusers(lambda state: peers.compvis_names(state)), {}),
    "compvis f8": (
        diffusers(
            lambda state: peers.compvis_names(state), block_out_channels=(4, 8, 8, 8), layers_per_block=2
        ),
        {},
    ),
}
CODES = {  # VQVAEs, rows as in AUTOENCODERS
    "2d": (vqvae(2), {}),
    "3d": (vqvae(3), {}),
    "three levels": (
        vqvae(3, channels=(4, 6, 8), num_res_channels=(4, 6, 8), num_res_layers=2),
        {"image_range": (-1.0, 1.0)},
    ),
    "narrow units": (vqvae(2, num_res_channels=(3, 5)), {}),
    "no units": (vqvae(2, num_res_layers=0), {}),
    "one level": (vqvae(3, channels=(4,), num_res_channels=(6,)), {}),
    "many channels": (vqvae(2, in_channels=3, out_channels=3, num_embeddings=40, embedding_dim=5), {}),
    "of DDP and compile": (vqvae(2, ddp), {}),
}
CONTEXT = {"with_conditioning": True, "cross_attention_dim": 6}
WIDER = {"channels": (8, 16, 16), "attention_levels": (False, True, True), "num_res_blocks": (1, 2, 1)}
REGIONS = {"maisi": True, "include_top_region_index_input": True, "include_bottom_region_index_input": True}
U_NETS = {  # name -> arguments, how it is spelled, what shapes cannot tell
    "2d": ({}, same, {}),
    "3d": ({"dims": 3}, same, {}),
    "three levels": (WIDER, same, {}),
    "heads by level": ({**WIDER, "num_head_channels": (0, 4, 8)}, same, {"head_channels": (0, 4, 8)}),
    "other channels": ({"in_channels": 7, "out_channels": 3}, same, {}),
    "no projection": ({"include_fc": False}, same, {}),
    "combined qkv": ({}, lambda state: peers.combined(state), {}),
    "context": (CONTEXT, same, {}),
    "context 3d": ({**CONTEXT, "dims": 3}, same, {}),
    "context, no projection": ({**CONTEXT, "include_fc": False}, same, {}),
    "context, combined qkv": (CONTEXT, lambda state: peers.combined(state), {}),
    "classes": ({"num_class_embeds": 4}, same, {}),
    "residual up and down": ({"resblock_updown": True}, same, {}),
    "residual up and down 3d": ({"resblock_updown": True, "dims": 3, **WIDER}, same, {}),
    "all at once": ({"resblock_updown": True, "num_class_embeds": 3, **WIDER}, ddp, {}),
    "maisi spacing": ({"maisi": True, "dims": 3}, same, {}),
    "maisi rflow": ({**REGIONS, "num_class_embeds": 5, "dims": 3, "include_fc": True}, same, {}),
    "maisi ddpm": ({**REGIONS, "dims": 3, "resblock_updown": True}, ddp, {}),
    "generative": ({"include_fc": False}, lambda state: peers.old_names(state), {}),
    "generative 3d": ({"include_fc": False, "dims": 3}, lambda state: peers.old_names(state), {}),
    "generative context": (CONTEXT, lambda state: peers.old_names(state), {}),
    "generative classes": (
        {"include_fc": False, "num_class_embeds": 4, "resblock_updown": True},
        lambda state: peers.old_names(state),
        {},
    ),
}


CONTROL_NETS = {  # rows as in U_NETS
    "2d": ({}, same, {}),
    "3d": ({"dims": 3}, same, {}),
    "three levels": ({**WIDER, "conditioning_embedding_num_channels": (2, 4, 6)}, same, {}),
    "a map as fine as the latent": ({"conditioning_embedding_num_channels": (5,)}, same, {}),
    "context": (CONTEXT, same, {}),
    "classes, residual down": ({"num_class_embeds": 3, "resblock_updown": True}, ddp, {}),
    "maisi": (
        {
            **{"maisi": True, "dims": 3, "num_class_embeds": 5, "conditioning_embedding_in_channels": 8},
            "conditioning_embedding_num_channels": (8, 4, 6),
        },
        same,
        {},
    ),
    "generative": ({"include_fc": False}, lambda state: peers.old_names(state), {}),
    "generative context": (CONTEXT, lambda state: peers.old_names(state), {}),
}


DISCRIMINATORS = {  # arguments, how it is spelled, what shapes cannot tell
    "batch 2d": ({"dims": 2}, same, {}),
    "batch 3d": ({"dims": 3}, same, {}),
    "instance": ({"dims": 3, "norm": "INSTANCE"}, same, {}),
    "no norm": ({"dims": 2, "norm": None, "bias": True}, same, {}),
    "no norm, no bias": ({"dims": 2, "norm": None}, same, {"norm": "none"}),
    "three layers": ({"dims": 2, "num_layers_d": 3, "in_channels": 3}, ddp, {}),
    "a last kernel of 1": ({"dims": 2, "last_conv_kernel_size": 1, "norm": "INSTANCE"}, same, {}),
    "two scales": ({"dims": 2, "scales": 2}, same, {}),
    "two scales, instance": ({"dims": 2, "scales": 2, "num_layers_d": 1, "norm": "INSTANCE"}, same, {}),
}


def imported(state, folder: Path, **hints) -> Imported:
    """The network that a file with this state holds, its gradients on."""
    torch.save({"state_dict": state, "epoch": 7}, folder / "weights.pt")
    found = open_weights(folder / "weights.pt", **hints)
    found.net.requires_grad_(True)
    return found


def gradient_error(found: Imported, net, spelled) -> float:
    """The largest relative error of a gradient, ours against theirs, named as in their newest layout."""
    twin = copy.deepcopy(found.net)
    for ours, mine in zip(twin.parameters(), found.net.parameters(), strict=True):
        ours.data = torch.zeros_like(mine) if mine.grad is None else mine.grad
    ours = extract(twin, found.family.layout)
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    theirs, _ = rewrite(strip(spelled(grads)), found.family, "gradients")
    assert sum(name in ours for name in theirs) >= 0.9 * len(theirs)
    errors = [0.0]
    for name, value in theirs.items():
        if name in ours and value.abs().max() > 1e-6:  # that of a key's bias is zero but for rounding
            errors.append(relative_error(ours[name][: len(value)].reshape(value.shape), value))
    return max(errors)


def strip(state):
    return {name.removeprefix("module._orig_mod."): value for name, value in state.items()}


def run_autoencoder(net, x):
    """(mean, std, reconstruction of the mean) of the other library's autoencoder."""
    if type(net).__module__.startswith("diffusers"):
        gaussian = net.encode(x).latent_dist
        return gaussian.mean, gaussian.std, net.decode(gaussian.mean).sample
    mean, std = net.encode(x)
    return mean, std, net.decode(mean)


def autoencoder_errors(name: str, folder: Path) -> tuple[Imported, float, float]:
    """(what was imported, largest relative error of an output, of a gradient) of one configuration."""
    make, hints = AUTOENCODERS[name]
    net, spelled = make()
    found = imported(spelled(net.state_dict()), folder, num_groups=2, **hints)
    low, high = found.net.config.image_range
    size = (16, 24, 8)[: found.net.config.dims]
    inside = torch.rand(2, found.net.config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    inside = low + (high - low) * inside
    mean, std, recon = run_autoencoder(net, inside)
    posterior = found.net.encode(2 * (inside - low) / (high - low) - 1)
    ours = low + (high - low) * (found.net.decode(posterior.mean) + 1) / 2
    pairs = ((posterior.mean, mean), (posterior.std, std), (ours, recon))
    error = max(relative_error(mine.detach(), other.detach()) for mine, other in pairs)
    (ours.square().mean() + posterior.std.square().mean()).backward()
    (recon.square().mean() + std.square().mean()).backward()
    return found, error, gradient_error(found, net, spelled)


def vqvae_errors(name: str, folder: Path) -> tuple[Imported, float, float]:
    """`autoencoder_errors` of a VQVAE; the gradient passes straight through the codes."""
    make, hints = CODES[name]
    net, spelled = make()
    found = imported(spelled(net.state_dict()), folder, **hints)
    low, high = found.net.config.image_range
    size = (16, 24, 8)[: found.net.config.dims]
    inside = torch.rand(2, found.net.config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    inside = low + (high - low) * inside
    z = net.encode(inside)
    codes, loss = net.quantize(z)
    recon = net.decode(codes)
    ours, quantized = found.net(2 * (inside - low) / (high - low) - 1)
    ours = low + (high - low) * (ours + 1) / 2
    commitment = 0.25 * quantized.commitment_loss.mean()
    pairs = ((quantized.z, z), (quantized.z_q, codes), (ours, recon), (commitment, loss))
    error = max(relative_error(mine.detach(), other.detach()) for mine, other in pairs)
    assert len(quantized.indices.unique()) > 2
    (ours.square().mean() + commitment).backward()
    (recon.square().mean() + loss).backward()
    return found, error, gradient_error(found, net, spelled)


def unet_errors(name: str, folder: Path) -> tuple[Imported, float, float]:
    """`autoencoder_errors` of a U-Net."""
    arguments, spelled, hints = U_NETS[name]
    arguments = {"dims": 2, **arguments}
    net = (peers.maisi_unet if arguments.pop("maisi", False) else peers.unet)(**arguments)
    found = imported(spelled(net.state_dict()), folder, num_groups=4, **{"head_channels": 8, **hints})
    draw = torch.Generator().manual_seed(0)
    config = found.net.unet.config
    x = torch.randn(2, config.in_channels, *(8, 12, 8)[: config.dims], generator=draw)
    t, cond, more = torch.tensor([3, 700]), None, {}
    if "with_conditioning" in arguments:
        more["context"] = torch.randn(2, 5, 6, generator=draw)
        cond = Conditioned(context=more["context"])
    if "num_class_embeds" in arguments:
        more["class_labels"] = torch.tensor([1, 0])
        cond = {"class": more["class_labels"]}
    for c in (c for c in found.net.conditions if c.name != "class"):  # MAISI's numbers come times 100
        more[f"{c.name}_tensor"] = 2 * torch.rand(2, len(c.mean), generator=draw)
        cond = (cond or {}) | {c.name: more[f"{c.name}_tensor"] / 100}
    ours, theirs = found.net(x, t.float(), cond), net(x, t, **more)
    error = relative_error(ours.detach(), theirs.detach())
    ours.square().mean().backward()
    theirs.square().mean().backward()
    return found, error, gradient_error(found, net, spelled)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_imported_autoencoder_computes_what_its_own_class_does(name, tmp_path):
    _, outputs, gradients = autoencoder_errors(name, tmp_path)
    assert outputs < 1e-5
    assert gradients < 1e-4


def controlnet_errors(name: str, folder: Path) -> tuple[Imported, float, float]:
    """`autoencoder_errors` of a ControlNet: of all residuals."""
    arguments, spelled, hints = CONTROL_NETS[name]
    arguments = {"dims": 2, **arguments}
    net = peers.controlnet(**arguments)
    found = imported(spelled(net.state_dict()), folder, num_groups=4, **{"head_channels": 8, **hints})
    draw, dims = torch.Generator().manual_seed(0), arguments["dims"]
    size = (8, 12, 8)[:dims]
    embedding, t, more = found.net.embedding, torch.tensor([3, 700]), {}
    finer = 2 ** (len(embedding.convs) // 2)
    x = torch.randn(2, 3, *size, generator=draw)
    cond = torch.rand(2, embedding.conv_in.weight.shape[1], *(finer * n for n in size), generator=draw)
    if "with_conditioning" in arguments:
        more["context"] = torch.randn(2, 5, 6, generator=draw)
    classes = torch.tensor([1, 0]) if "num_class_embeds" in arguments else None
    ours = found.net(x, t.float(), embedding(cond), **more, classes=classes)
    if classes is not None:
        more["class_labels"] = classes
    skips, middle = net(x, t, cond, **more)
    pairs = list(zip(ours, [*skips, middle], strict=True))
    error = max(relative_error(mine.detach(), other.detach()) for mine, other in pairs)
    sum(mine.square().mean() for mine, _ in pairs).backward()
    sum(other.square().mean() for _, other in pairs).backward()
    return found, error, gradient_error(found, net, spelled)


def discriminator_errors(name: str, folder: Path) -> tuple[Imported, float, float]:
    """`autoencoder_errors` of a discriminator: of logits and hidden maps, and of the gradient at the image,
    since folded norms have no weights of their own."""
    arguments, spelled, hints = DISCRIMINATORS[name]
    net = peers.discriminator(**arguments)
    found = imported(spelled(net.state_dict()), folder, **hints)
    size = (64,) * 2 if arguments["dims"] == 2 else (32,) * 3
    x = torch.rand(2, arguments.get("in_channels", 1), *size, generator=torch.Generator().manual_seed(0))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = found.net(mine), net(other)
    logits, maps = theirs if arguments.get("scales", 1) > 1 else ([theirs[-1]], [theirs[:-1]])
    maps = [h for scale in maps for h in scale]
    pairs = list(zip([*ours.logits, *ours.features], [*logits, *maps], strict=True))
    error = max(relative_error(a.detach(), b.detach()) for a, b in pairs)
    sum(a.square().mean() for a, _ in pairs).backward()
    sum(b.square().mean() for _, b in pairs).backward()
    return found, error, relative_error(mine.grad, other.grad)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_an_imported_discriminator_judges_as_its_own_class_does(name, tmp_path):
    _, outputs, gradients = discriminator_errors(name, tmp_path)
    assert outputs < 1e-5
    assert gradients < 1e-4


@pytest.mark.parametrize("name", CONTROL_NETS)
def test_an_imported_controlnet_computes_what_its_own_class_does(name, tmp_path):
    _, outputs, gradients = controlnet_errors(name, tmp_path)
    assert outputs < 1e-5
    assert gradients < 1e-4


@torch.no_grad()
def test_an_imported_controlnet_steers_an_imported_u_net_as_the_two_do_in_monai(tmp_path):
    unet, control = peers.unet(2), peers.controlnet(2)
    ours = imported(unet.state_dict(), tmp_path, num_groups=4, head_channels=8).net.unet
    ours_control = imported(control.state_dict(), tmp_path, num_groups=4, head_channels=8).net
    draw, t = torch.Generator().manual_seed(0), torch.tensor([3, 700])
    x, cond = torch.randn(2, 3, 8, 12, generator=draw), torch.rand(2, 2, 16, 24, generator=draw)
    skips, middle = control(x, t, cond)
    theirs = unet(x, t, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    residuals = ours_control(x, t.float(), ours_control.embedding(cond))
    found = ours.output(ours.features(x, t.float(), residuals=residuals), x.shape[2:])
    assert relative_error(found, theirs) < 1e-5
    assert relative_error(unet(x, t), theirs) > 1e-2


def test_a_controlnet_comes_back_to_the_bit_and_wants_classes_only_if_it_has_them(tmp_path):
    net = peers.controlnet(2, num_class_embeds=3)
    found = imported(net.state_dict(), tmp_path, num_groups=4, head_channels=8).net
    state = extract(found, "monai")
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    x, t, hint = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 8, 8)
    with pytest.raises(InputError, match=r"classes: this ControlNet wants classes \(B,\)"):
        found(x, t, hint)


@pytest.mark.parametrize("name", CODES)
def test_an_imported_vqvae_computes_what_its_own_class_does(name, tmp_path):
    _, outputs, gradients = vqvae_errors(name, tmp_path)
    assert outputs < 1e-5
    assert gradients < 1e-4


HEAVY = {  # combinations of what the others show one by one
    *("context 3d", "heads by level", "residual up and down 3d", "generative context", "generative 3d"),
    *("context, no projection", "context, combined qkv", "generative classes", "maisi ddpm"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY)) for name in U_NETS]
)
def test_an_imported_u_net_computes_what_its_own_class_does(name, tmp_path):
    _, outputs, gradients = unet_errors(name, tmp_path)
    assert outputs < 1e-5
    assert gradients < 1e-4


def test_the_matrix_has_every_family_and_at_least_forty_configurations():
    assert set(U_NETS) >= HEAVY
    assert len(AUTOENCODERS) + len(CODES) + len(U_NETS) >= 40


def test_the_check_of_a_maisi_u_net_compares_its_numbers_too(tmp_path):
    net = peers.maisi_unet(3, **{k: v for k, v in REGIONS.items() if k != "maisi"}, num_class_embeds=3)
    found = imported(net.state_dict(), tmp_path, num_groups=4, head_channels=8)
    theirs = build(describe(found.net, "maisi"), found.state)
    assert compare(found.net, theirs) < 1e-5
    found.net.conditioner.parts[2].mlp[0].bias.data.add_(1)
    assert compare(found.net, theirs) > 1e-4


def test_the_check_of_a_vqvae_compares_its_codes_too(tmp_path):
    found = imported(peers.vqvae(3).state_dict(), tmp_path)
    theirs = build(describe(found.net, "monai"), found.state)
    assert compare(found.net, theirs) < 1e-5
    found.net.quantizer.codebook.mul_(2)
    assert compare(found.net, theirs) > 1e-3


@pytest.mark.parametrize(
    "name", ["monai attention 3d", "generative attention", "maisi transposed", "diffusers"]
)
def test_the_check_builds_the_other_class_and_finds_equal_outputs(name, tmp_path):
    make, hints = AUTOENCODERS[name]
    net, spelled = make()
    found = imported(spelled(net.state_dict()), tmp_path, num_groups=2, **hints)
    theirs = build(describe(found.net, found.family.library), found.state)
    assert compare(found.net, theirs) < 1e-5
    found.net.post_quant_conv.bias.data.add_(0.1)
    assert compare(found.net, theirs) > 1e-3  # a difference is seen
