"""The classes of other libraries for the networks that we have: their names, their arguments, their outputs.

`describe(net, library)` says with which class and arguments a library makes the network, which is what a
configuration file of that library holds; InputError for a setting that the library does not have. `build`
makes the network, where the library is installed, and `compare` runs both on random input.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import SCALED, Rescale, level_strides, per_level
from ..conditioner import Conditioned
from ..config import InputError, show
from ..control import ControlNet
from ..denoiser import Denoiser
from ..discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ..unet import UNetConfig
from ..vae import Autoencoder, AutoencoderKL, VAEConfig
from ..vqvae import VQVAE
from .layouts import NUMBERS, unet_conditions

Library = Literal["monai", "maisi", "diffusers"]


class Description(NamedTuple):
    """A class of another library, and the arguments that make one of our networks of it."""

    target: str
    arguments: dict[str, Any]


# --- arguments ----------------------------------------------------------------------------------------------


def require(config: VAEConfig | UNetConfig, target: str, **allowed: Any) -> None:
    """InputError unless each of these settings has the value (or one of the tuple of values) of `target`."""
    for name, values in {"trunk": "norm", "strides": 2, **allowed}.items():
        if name == "trunk" and not hasattr(config, name):
            continue
        value = getattr(config, name)
        if name == "strides":
            value = {s for strides in level_strides(config) for s in strides} or {2}
            value = 2 if value == {2} else config.strides
        if name == "stem":
            value = max(value)
        if value not in (values := values if isinstance(values, tuple) else (values,)):
            key = f"{'vae' if isinstance(config, VAEConfig) else 'unet'}.{name}"
            has = " or ".join(map(show, values))
            raise InputError(
                f"{key}: {value} has no counterpart in {target}, which has {has}; set it in training"
            )
    if any(width % config.num_groups for width in config.channels):
        raise InputError(
            f"num_groups: {config.num_groups} does not divide {config.channels}, {target} needs it"
        )


def shared(config: VAEConfig | UNetConfig) -> dict[str, Any]:
    """The arguments that MONAI's autoencoder and U-Net have in common."""
    levels = len(config.channels)
    return {
        "spatial_dims": config.dims,
        "in_channels": config.in_channels,
        "num_res_blocks": list(per_level(config.num_res_blocks, levels)),
        "channels": list(config.channels),
        "attention_levels": list(per_level(config.attention_levels, levels)),
        "norm_num_groups": config.num_groups,
        "norm_eps": config.gn_eps,
        "include_fc": config.attn_out_proj,
    }


def monai_arguments(config: VAEConfig, target: str, upsample: tuple[str, str]) -> dict[str, Any]:
    """What the autoencoders of MONAI and MAISI have in common. upsample: their kinds, the plain one first."""
    plain = {"stem": 1, "final_silu": False, "down_pad": "asym", "double_z": False, "extra_up_block": False}
    plain |= {"shortcut": False}
    require(config, target, **plain, quant_conv=True, upsample=upsample)
    middle = config.mid_attention, config.decoder_mid_attention
    return shared(config) | {
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "with_encoder_nonlocal_attn": middle[0],
        "with_decoder_nonlocal_attn": middle[0] if middle[1] is None else middle[1],
        "use_convtranspose": config.upsample == upsample[1],
    }


def describe_monai_autoencoder(config: VAEConfig) -> Description:
    target = "monai.networks.nets.AutoencoderKL"
    return Description(target, monai_arguments(config, target, ("nearest", "deconv2")))


def describe_maisi_autoencoder(config: VAEConfig) -> Description:
    target = "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi"
    arguments = monai_arguments(config, target, ("trilinear", "deconv3")) | {"num_splits": 1}
    arguments["num_channels"] = arguments.pop("channels")
    return Description(target, arguments)


def describe_monai_vqvae(net: VQVAE) -> Description:
    target, config, quantizer = "monai.networks.nets.VQVAE", net.config, net.quantizer.config
    levels = len(config.channels)
    blocks = per_level(config.num_res_blocks, levels)
    for name, value, expected in (
        ("trunk", config.trunk, "plain"),
        ("quant_conv", config.quant_conv, False),
        ("num_res_blocks", blocks, (blocks[0],) * levels),
        ("quantizer.update", quantizer.update, "ema"),
    ):
        if value != expected:
            raise InputError(f"{name}: {value} has no counterpart in {target}, expected {expected}")
    inner = config.channels if config.res_channels is None else per_level(config.res_channels, levels)
    return Description(
        target,
        {
            "spatial_dims": config.dims,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "channels": list(config.channels),
            "num_res_layers": blocks[0],
            "num_res_channels": list(inner),
            "downsample_parameters": [[2, 4, 1, 1]] * levels,
            "upsample_parameters": [[2, 4, 1, 1, 0]] * levels,
            "num_embeddings": quantizer.codebook_size,
            "embedding_dim": config.latent_channels,
            "commitment_cost": quantizer.commitment_weight,
            "decay": quantizer.decay,
        },
    )


def describe_diffusers_autoencoder(config: VAEConfig) -> Description:
    target, levels = "diffusers.AutoencoderKL", len(config.channels)
    blocks = per_level(config.num_res_blocks, levels)
    fixed = {"stem": 1, "final_silu": True, "down_pad": "asym", "double_z": True, "extra_up_block": True}
    fixed |= {"mid_attention": True, "decoder_mid_attention": (None, True), "upsample": "nearest"}
    fixed |= {"shortcut": False}
    none = ((False,), (False,) * levels)
    require(config, target, **fixed, attention_levels=none, attn_out_proj=True, dims=2, gn_eps=1e-6)
    if len(set(blocks)) > 1:
        raise InputError(f"num_res_blocks: {blocks} has no counterpart in {target}, whose levels are alike")
    return Description(
        target,
        {
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(config.channels),
            "layers_per_block": blocks[0],
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.num_groups,
            "use_quant_conv": config.quant_conv,
            "use_post_quant_conv": config.quant_conv,
        },
    )


def unet_arguments(config: UNetConfig, target: str) -> dict[str, Any]:
    """The arguments that MONAI's U-Nets and ControlNets have in common."""
    require(config, target, adaptive_norm=False, time_embed_order="cos_sin")
    return shared(config) | {
        "resblock_updown": config.resblock_updown,
        "num_head_channels": list(config.head_widths),
        "with_conditioning": config.context_dim is not None,
        "cross_attention_dim": config.context_dim,
        "include_fc": config.attn_out_proj or config.context_dim is not None,
    }


def describe_monai_unet(net: Denoiser) -> Description:
    target, config = "monai.networks.nets.DiffusionModelUNet", net.unet.config
    conditions = unet_conditions(net)
    numbers = {c.name for c in conditions if c.kind != "class"}
    if numbers:
        target = "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi"
    names = [f"{c.kind} {c.name}" for c in conditions]
    concat = set(net.arguments.condition.concat) if conditions else set()
    known = concat == numbers <= set(NUMBERS) and len(conditions) - len(numbers) <= 1
    if net.unet.registers is not None or not known:
        raise InputError(f"condition: {', '.join(names) or 'registers'} has no counterpart in {target}")
    arguments = unet_arguments(config, target) | {
        "out_channels": config.out_channels,
        "num_class_embeds": next((len(c.values) for c in conditions if c.kind == "class"), None),
    }
    if numbers:
        arguments |= {f"include_{name}_input": name in numbers for name in NUMBERS}
        arguments["num_channels"] = arguments.pop("channels")
    return Description(target, arguments)


def describe_monai_controlnet(net: ControlNet) -> Description:
    target, config, embedding = "monai.networks.nets.ControlNet", net.config, net.embedding
    if config.emb_parts > 1:
        raise InputError(f"condition.concat: has no counterpart in {target}")
    widest = [conv.weight.shape[0] for conv in embedding.convs[1::2]]
    return Description(
        target,
        unet_arguments(config, target)
        | {
            "num_class_embeds": None if net.class_embedding is None else net.class_embedding.num_embeddings,
            "conditioning_embedding_in_channels": embedding.conv_in.weight.shape[1],
            "conditioning_embedding_num_channels": [embedding.conv_in.weight.shape[0], *widest],
        },
    )


def describe_monai_discriminator(config: PatchDiscriminatorConfig) -> Description:
    several = config.num_scales > 1
    target = f"monai.networks.nets.{'MultiScale' if several else ''}PatchDiscriminator"
    for name, value, other in (
        ("norm", config.norm, "group"),
        ("spectral_norm", config.spectral_norm, True),
        ("scale_by", config.scale_by, "image" if several else None),
    ):
        if value == other:
            raise InputError(f"disc.{name}: {value} has no counterpart in {target}")
    arguments = {
        "spatial_dims": config.dims,
        "in_channels": config.in_channels,
        "channels": config.channels,
        "num_layers_d": config.num_layers,
        "norm": "INSTANCE" if config.norm == "instance" else None,
        "bias": config.norm == "none",
        "last_conv_kernel_size": config.last_kernel,
    }
    return Description(target, arguments | ({"num_d": config.num_scales} if several else {}))


def describe(net: nn.Module, library: Library) -> Description:
    """The class of a library, and its arguments, that make `net`. InputError if the library has none."""
    if isinstance(net, AutoencoderKL):
        make = {"monai": describe_monai_autoencoder, "maisi": describe_maisi_autoencoder}
        return (make | {"diffusers": describe_diffusers_autoencoder})[library](net.config)
    if isinstance(net, VQVAE) and library == "monai":
        return describe_monai_vqvae(net)
    if isinstance(net, Denoiser) and library in ("monai", "maisi"):
        return describe_monai_unet(net)
    if isinstance(net, ControlNet) and library == "monai":
        return describe_monai_controlnet(net)
    if isinstance(net, PatchDiscriminator) and library == "monai":
        return describe_monai_discriminator(net.config)
    raise InputError(f"{library}: has no counterpart of a {type(net).__name__}")


# --- networks of the other library --------------------------------------------------------------------------


def build(description: Description, state: dict[str, Tensor]) -> nn.Module:
    """The network of the other library with these weights, loaded strictly, in eval mode."""
    module, name = description.target.rsplit(".", 1)
    package = module.split(".")[0]
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as e:
        raise InputError(f"check: needs the package {package} (pip install {package}); {e}") from None
    net = cls(**description.arguments)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


@torch.inference_mode()
def compare(net: Autoencoder | Denoiser, theirs: nn.Module) -> float:
    """The largest relative error between the outputs of our network and the other on random input."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(net, Autoencoder):
        config = net.config
        x = torch.rand(1, config.in_channels, *(4 * f for f in net.downsampling), generator=draw) * 2 - 1
        posterior = net.encode(x)
        inside = Rescale(SCALED, config.image_range)(x)
        z = posterior.mean
        if type(theirs).__module__.startswith("diffusers"):
            gaussian = theirs.encode(inside).latent_dist
            mean, std, recon = gaussian.mean, gaussian.std, theirs.decode(z).sample
        elif isinstance(net, VQVAE):
            mean, std = theirs.encode(inside), posterior.std  # none
            recon = theirs.decode(theirs.quantize(z)[0])
        else:
            (mean, std), recon = theirs.encode(inside), theirs.decode(z)
        recon = Rescale(config.image_range, SCALED)(recon)
        pairs = [(z, mean), (posterior.std, std), (net.decode(z), recon)]
    else:
        config = net.unet.config
        x = torch.randn(2, config.in_channels, *(4 * f for f in config.downsampling), generator=draw)
        t, more, cond = torch.tensor([3, 700]), {}, None
        if config.context_dim is not None:
            more["context"] = torch.randn(2, 3, config.context_dim, generator=draw)
            cond = Conditioned(context=more["context"])
        if conditions := unet_conditions(net):
            cond = {}
        for c in conditions:
            if c.kind == "class":
                cond[c.name] = more["class_labels"] = torch.tensor([0, len(c.values) - 1])
            else:
                cond[c.name] = torch.rand(2, len(c.mean), generator=draw) / 100
                more[f"{c.name}_tensor"] = cond[c.name] * 100
        pairs = [(net(x, t.float(), cond), theirs(x, t, **more))]
    return max(relative_error(ours, other) for ours, other in pairs)
