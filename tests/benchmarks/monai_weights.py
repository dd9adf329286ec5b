"""The weights of MONAI's AutoencoderKL and DiffusionModelUNet in our networks, for parity tests and timing.

Both sides are built from one configuration (`twin_autoencoder`, `twin_unet`) and copied module by module, so
that outputs, gradients, time and memory can be compared. Known are the attribute names of MONAI 1.5 and
later; files of weights are another matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm3d.blocks import (
    AttentionBlock,
    Conv,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention,
    TransformerBlock,
    Upsample,
)
from ldm3d.unet import Stage, UNet, UNetConfig
from ldm3d.vae import AutoencoderKL, VAEConfig


def twin_autoencoder(config: VAEConfig, flash: bool = False) -> tuple[AutoencoderKL, nn.Module]:
    """(ours, MONAI's) with equal random weights; only what MONAI has too may differ from its default."""
    from monai.networks.nets import AutoencoderKL as Peer

    levels = len(config.channels)
    theirs = Peer(
        spatial_dims=config.dims,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        channels=config.channels,
        num_res_blocks=config.num_res_blocks * (levels if len(config.num_res_blocks) == 1 else 1),
        attention_levels=config.attention_levels * (levels if len(config.attention_levels) == 1 else 1),
        with_encoder_nonlocal_attn=config.mid_attention,
        with_decoder_nonlocal_attn=config.mid_attention,
        norm_num_groups=config.num_groups,
        norm_eps=config.gn_eps,
        include_fc=config.attn_out_proj,
        use_convtranspose=config.upsample == "deconv2",
        use_flash_attention=flash,
    )
    ours = AutoencoderKL(config)
    randomise(theirs)
    for mine, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        for layer, block in zip(mine.layers, other.blocks, strict=True):
            copy_module(layer, block)
    heads = (theirs.quant_conv_mu.conv, theirs.quant_conv_log_sigma.conv)
    copy_tensor(ours.quant_conv.weight, torch.cat([h.weight for h in heads]))
    copy_tensor(ours.quant_conv.bias, torch.cat([h.bias for h in heads]))
    copy_module(ours.post_quant_conv, theirs.post_quant_conv)
    return ours, theirs


def twin_unet(config: UNetConfig, flash: bool = False) -> tuple[UNet, nn.Module]:
    """(ours, MONAI's) with equal random weights, zero-initialised layers included."""
    from monai.networks.nets import DiffusionModelUNet as Peer

    levels = len(config.channels)
    theirs = Peer(
        spatial_dims=config.dims,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        channels=config.channels,
        num_res_blocks=config.num_res_blocks * (levels if len(config.num_res_blocks) == 1 else 1),
        attention_levels=config.attention_levels * (levels if len(config.attention_levels) == 1 else 1),
        num_head_channels=config.head_channels,
        norm_num_groups=config.num_groups,
        norm_eps=config.gn_eps,
        with_conditioning=config.context_dim is not None,
        cross_attention_dim=config.context_dim,
        include_fc=config.attn_out_proj,
        use_flash_attention=flash,
    )
    ours = UNet(config)
    randomise(theirs)
    copy_module(ours.conv_in, theirs.conv_in)
    copy_linear(ours.time_embed[0], theirs.time_embed[0])
    copy_linear(ours.time_embed[2], theirs.time_embed[2])
    for mine, blocks, change in (
        (iter(ours.down), theirs.down_blocks, "downsampler"),
        (iter(ours.up), theirs.up_blocks, "upsampler"),
    ):
        for block in blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for res, attention in zip(block.resnets, attentions, strict=True):
                copy_stage(next(mine), res, attention)
            if getattr(block, change, None) is not None:
                copy_module(next(mine), getattr(block, change))
        assert next(mine, None) is None
    copy_stage(ours.mid[0], theirs.middle_block.resnet_1, theirs.middle_block.attention)
    copy_stage(ours.mid[1], theirs.middle_block.resnet_2, None)
    copy_affine(ours.norm_out, theirs.out[0])
    copy_module(ours.conv_out, theirs.out[2])
    return ours, theirs


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Give zero-initialised layers small random weights, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


# --- one module -------------------------------------------------------------------------------------------


def copy_module(mine: nn.Module, theirs: nn.Module) -> None:
    if isinstance(mine, ResBlock):
        copy_affine(mine.norm1, theirs.norm1)
        copy_affine(mine.norm2, theirs.norm2)
        copy_module(mine.conv1, theirs.conv1)
        copy_module(mine.conv2, theirs.conv2)
        if mine.emb_proj is not None:
            copy_linear(mine.emb_proj, theirs.time_emb_proj)
        if mine.skip is not None:
            copy_module(mine.skip, getattr(theirs, "nin_shortcut", None) or theirs.skip_connection)
    elif isinstance(mine, AttentionBlock):
        copy_affine(mine.norm, theirs.norm)
        copy_self_attention(mine.attn, theirs.attn)
    elif isinstance(mine, TransformerBlock):
        copy_transformer(mine, theirs)
    elif isinstance(mine, Downsample):
        copy_module(mine.conv, theirs.conv if hasattr(theirs, "conv") else theirs.op)
    elif isinstance(mine, Upsample) and mine.kind == "nearest":
        copy_module(mine.conv, theirs.postconv)
    elif isinstance(mine, Upsample):
        copy_linear(mine.deconv, theirs.deconv)
    elif isinstance(mine, GroupNorm):
        copy_affine(mine, theirs)
    elif isinstance(mine, Conv):
        copy_linear(mine, theirs.conv)
    else:
        raise TypeError(type(mine))


def copy_stage(mine: Stage, res: nn.Module, attention: nn.Module | None) -> None:
    copy_module(mine.res, res)
    assert (mine.attention is None) == (attention is None)
    if attention is not None:
        copy_module(mine.attention, attention)


def copy_self_attention(mine: SelfAttention, theirs: nn.Module) -> None:
    parts = (theirs.to_q, theirs.to_k, theirs.to_v)
    copy_tensor(mine.qkv.weight, torch.cat([p.weight for p in parts]))
    if mine.qkv.bias is not None:
        copy_tensor(mine.qkv.bias, torch.cat([p.bias for p in parts]))
    if mine.out_proj is not None:
        copy_linear(mine.out_proj, theirs.out_proj)


def copy_transformer(mine: TransformerBlock, theirs: nn.Module) -> None:
    (block,) = theirs.transformer_blocks
    copy_affine(mine.norm, theirs.norm)
    copy_module(mine.proj_in, theirs.proj_in)
    copy_module(mine.proj_out, theirs.proj_out)
    for name in ("norm1", "norm2", "norm3"):
        copy_affine(getattr(mine, name), getattr(block, name))
    copy_self_attention(mine.attn, block.attn1)
    copy_tensor(mine.cross_attn.q.weight, block.attn2.to_q.weight)
    copy_tensor(mine.cross_attn.kv.weight, torch.cat([block.attn2.to_k.weight, block.attn2.to_v.weight]))
    copy_linear(mine.cross_attn.out_proj, block.attn2.out_proj)
    copy_linear(mine.ff.linear1, block.ff.linear1)
    copy_linear(mine.ff.linear2, block.ff.linear2)


def copy_linear(mine: nn.Module, theirs: nn.Module) -> None:
    copy_tensor(mine.weight, theirs.weight)
    copy_tensor(mine.bias, theirs.bias)


copy_affine = copy_linear


def copy_tensor(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape, (mine.shape, theirs.shape)
    mine.data.copy_(theirs.detach())
