"""Networks of other libraries with random weights, and their weights in every spelling there is.

The networks are MONAI's own classes. Older libraries stored the same networks under other names: `spelled`
renames, by rules written down independently of the package.
"""

import re

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import (
    VQVAE,
    AutoencoderKL,
    ControlNet,
    DiffusionModelUNet,
    MultiScalePatchDiscriminator,
    PatchDiscriminator,
)
from torch import Tensor, nn

State = dict[str, Tensor]
SMALL = {
    "num_res_blocks": 1,
    "channels": (4, 8),
    "attention_levels": (False, False),
    "norm_num_groups": 2,
    "latent_channels": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
CODES = {
    **{
        "in_channels": 1,
        "out_channels": 1,
        "channels": (4, 6),
        "num_res_layers": 1,
        "num_res_channels": (4, 6),
    },
    "downsample_parameters": ((2, 4, 1, 1),) * 2,
    "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    **{"num_embeddings": 8, "embedding_dim": 3},
}
UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}


def randomised(net: nn.Module) -> nn.Module:
    """The network with random weights everywhere, so that every tensor matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for module in net.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.data.add_(1)
    return net.eval()


def autoencoder(dims: int, **changes) -> nn.Module:
    return randomised(AutoencoderKL(dims, **{**SMALL, **changes}))


def maisi(**changes) -> nn.Module:
    small = {**SMALL, "num_channels": SMALL["channels"], "num_res_blocks": (1, 1), **changes}
    del small["channels"]
    return randomised(AutoencoderKlMaisi(3, 1, 1, num_splits=1, **small))


def vqvae(dims: int, **changes) -> nn.Module:
    levels = len(changes.get("channels", CODES["channels"]))
    samplings = {
        f"{way}sample_parameters": CODES[f"{way}sample_parameters"][:1] * levels for way in ("down", "up")
    }
    net = randomised(VQVAE(dims, **{**CODES, **samplings, **changes}))
    codes, draw = net.quantizer.quantizer.embedding.weight, torch.Generator().manual_seed(1)
    with torch.no_grad():  # codes near latents, so that many of them are used
        z = net.encode(torch.rand(2, net.in_channels, *(16, 24, 8)[:dims], generator=draw))
        rows = z.movedim(1, -1).flatten(0, -2)
        rows = rows[torch.linspace(0, len(rows) - 1, len(codes)).long()]
        codes.copy_(rows + 0.1 * rows.std() * torch.randn(codes.shape, generator=draw))
    return net


def unet(dims: int, **changes) -> nn.Module:
    return randomised(DiffusionModelUNet(dims, **{**UNET, **changes}))


def discriminator(dims: int, scales: int = 1, **changes) -> nn.Module:
    """A discriminator whose batch norms have seen images."""
    small = {"channels": 4, "in_channels": 1, "num_layers_d": 2, **changes}
    if scales > 1:
        net = randomised(MultiScalePatchDiscriminator(scales, spatial_dims=dims, minimum_size_im=64, **small))
    else:
        net = randomised(PatchDiscriminator(dims, **small))
    draw = torch.Generator().manual_seed(2)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))
    return net


def controlnet(dims: int, maisi: bool = False, **changes) -> nn.Module:
    small = {name: value for name, value in UNET.items() if name != "out_channels"}
    small |= {"conditioning_embedding_in_channels": 2, "conditioning_embedding_num_channels": (4, 6)}
    small |= changes
    if maisi:
        small["num_channels"] = small.pop("channels")
    return randomised((ControlNetMaisi if maisi else ControlNet)(dims, **small))


def maisi_unet(dims: int, **changes) -> nn.Module:
    small = {**UNET, "num_channels": UNET["channels"], "include_spacing_input": True, **changes}
    del small["channels"]
    return randomised(DiffusionModelUNetMaisi(dims, **small))


class TransposedThree(nn.Module):
    """The up-sampling of monai-generative with use_convtranspose: kernel 3, where MONAI's is 2."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        deconv = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.conv = nn.ModuleDict({"conv": deconv(channels, channels, 3, 2, 1, output_padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv["conv"](x)


def generative(dims: int, transposed: bool = False, **changes) -> nn.Module:
    """monai-generative's autoencoder: no projection after attention."""
    net = autoencoder(dims, include_fc=False, **changes)
    for i, block in enumerate(net.decoder.blocks):
        if transposed and hasattr(block, "postconv"):
            net.decoder.blocks[i] = TransposedThree(dims, block.postconv.conv.weight.shape[0])
    return randomised(net)


def old_names(state: State) -> State:
    """The state in the spelling of monai-generative, with the projection that it stores and never applies."""
    new = {}
    for name, value in state.items():
        name = name.replace(".postconv.", ".conv.").replace(".attn.to_", ".to_")
        name = re.sub(r"(attn[12])\.out_proj\.", r"\1.to_out.0.", name)
        new[name] = value
        if re.search(r"(?<!attn[12])\.to_v\.", name):
            new[name.replace(".to_v.", ".proj_attn.")] = torch.randn_like(value)
    return new


def combined(state: State) -> State:
    """q, k and v of self-attention in one tensor, as with use_combined_linear."""
    new = {name: value for name, value in state.items() if not re.search(r"\.attn1?\.to_[qkv]\.", name)}
    for name in state:
        if re.search(r"\.attn1?\.to_q\.", name):
            parts = [state[name.replace("to_q", f"to_{x}")] for x in "qkv"]
            new[name.replace("to_q", "qkv")] = torch.cat(parts)
    return new


# --- CompVis and diffusers ----------------------------------------------------------------------------------


def diffusers(**changes) -> nn.Module:
    """diffusers' AutoencoderKL; its attention always stands in the middle."""
    from diffusers import AutoencoderKL as Diffusers

    levels = len(changes.get("block_out_channels", (4, 8)))
    small = {
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return randomised(Diffusers(**{**small, **changes}))


def compvis_names(state: State) -> State:
    """diffusers' tensors under the names of CompVis' first stage, linear layers as 1x1 convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    new = {}
    for name, value in state.items():
        if name.startswith("decoder.up_blocks."):
            words = name.split(".")
            name = ".".join(["decoder", "up", str(levels - 1 - int(words[2])), *words[3:]])
        for old, other in (
            ("encoder.down_blocks.", "encoder.down."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            ("samplers.0.", "sample."),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            *((f".to_{x}.", f".{x}.") for x in "qkv"),
        ):
            name = name.replace(old, other)
        attention = ".attn_1." in name and value.ndim == 2
        new[name] = value[..., None, None] if attention else value
    return new


def early_diffusers_names(state: State) -> State:
    """The spelling of attention in diffusers before version 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, before in old.items():
        state = {name.replace(f".{new}.", f".{before}."): value for name, value in state.items()}
    return state
