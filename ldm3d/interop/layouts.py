"""Where other libraries keep the tensors that our networks have: the tables of names.

All libraries here build the same networks from the same blocks and differ in names. Two tables hold them:

    ROWS     a block's parts: `norm1` of our ResBlock is `norm1` everywhere, `conv1` is `conv1.conv` in MONAI
    PLACES   where a block lies: `encoder.blocks.3` in MONAI's flat list, `encoder.down.1.block.0` in CompVis

`entries(net, layout)` puts both together and lists every tensor of our network with its name there. The same
list serves both ways: `fill` reads a foreign state into our network, `extract` writes a foreign state.

    encoder.layers.1.conv1.weight      encoder.blocks.1.conv1.conv.weight           MONAI
    encoder.layers.1.conv1.weight      encoder.down.0.block.0.conv1.weight          CompVis
    decoder.layers.2.attn.qkv.weight   ....attn.to_q, ....attn.to_k, ....attn.to_v  three tensors, stacked

Older spellings of a library (monai-generative, MAISI, old diffusers) are first rewritten into the newer ones,
which families.py lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import (
    AttentionBlock,
    Conv,
    Downsample,
    GroupNorm,
    ResBlock,
    ResidualUnit,
    TransformerBlock,
    Upsample,
    per_level,
)
from ..conditions import Condition
from ..config import InputError
from ..control import ControlNet
from ..denoiser import Denoiser
from ..discriminators import PatchDiscriminator
from ..engine.checkpoint import load_weights
from ..unet import Stage, UNet, UNetEncoder
from ..vae import Autoencoder, VAEConfig
from ..vqvae import VQVAE

LayoutName = Literal["monai", "monai_vq", "compvis", "diffusers"]
Rows = dict[type, dict[str, str | tuple[str, ...]]]  # type of our block -> our part -> its part or parts


class Entry(NamedTuple):
    """One tensor of ours, and the foreign tensors that make it when stacked along their first axis."""

    own: str
    theirs: tuple[str, ...]


# --- the parts of a block -----------------------------------------------------------------------------------

TRANSFORMER = "transformer_blocks.0"
MONAI: Rows = {
    Conv: {"": "conv"},
    GroupNorm: {"": ""},
    nn.Linear: {"": ""},
    ResBlock: {
        **{"norm1": "norm1", "conv1": "conv1.conv", "norm2": "norm2", "conv2": "conv2.conv"},
        "skip": "nin_shortcut.conv",
    },
    AttentionBlock: {
        "norm": "norm",
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.out_proj": "attn.out_proj",
    },
    Downsample: {"conv": "conv.conv"},
    Upsample: {"conv": "postconv.conv", "deconv": "deconv"},
}
MONAI_UNET: Rows = MONAI | {
    ResBlock: MONAI[ResBlock] | {"emb_proj": "time_emb_proj", "skip": "skip_connection.conv"},
    Downsample: {"conv": "op.conv"},
    TransformerBlock: {
        **{"norm": "norm", "proj_in": "proj_in.conv", "proj_out": "proj_out.conv"},
        **{f"norm{i}": f"{TRANSFORMER}.norm{i}" for i in (1, 2, 3)},
        "attn.qkv": tuple(f"{TRANSFORMER}.attn1.to_{x}" for x in "qkv"),
        "attn.out_proj": f"{TRANSFORMER}.attn1.out_proj",
        "cross_attn.q": f"{TRANSFORMER}.attn2.to_q",
        "cross_attn.kv": tuple(f"{TRANSFORMER}.attn2.to_{x}" for x in "kv"),
        "cross_attn.out_proj": f"{TRANSFORMER}.attn2.out_proj",
        **{f"ff.linear{i}": f"{TRANSFORMER}.ff.linear{i}" for i in (1, 2)},
    },
}
MONAI_VQ: Rows = {
    Conv: {"": "conv"},
    ResidualUnit: {"conv1": "conv1.conv", "conv2": "conv2.conv"},
    Upsample: {"deconv": "conv"},
}
COMPVIS: Rows = {
    Conv: {"": ""},
    GroupNorm: {"": ""},
    ResBlock: {
        **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
        "skip": "nin_shortcut",
    },
    AttentionBlock: {"norm": "norm", "attn.qkv": ("q", "k", "v"), "attn.out_proj": "proj_out"},
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
}
DIFFUSERS: Rows = COMPVIS | {
    ResBlock: COMPVIS[ResBlock] | {"skip": "conv_shortcut"},
    AttentionBlock: {
        "norm": "group_norm",
        "attn.qkv": ("to_q", "to_k", "to_v"),
        "attn.out_proj": "to_out.0",
    },
}
ROWS: dict[str, Rows] = {
    **{"monai": MONAI, "monai_vq": MONAI_VQ, "compvis": COMPVIS, "diffusers": DIFFUSERS},
}


def part_of(block: nn.Module, name: str) -> nn.Module | None:
    """The part "attn.qkv" of a block; None if the block was made without it."""
    path = name.split(".") if name else []
    return functools.reduce(lambda module, word: getattr(module, word, None), path, block)


def block_entries(block: nn.Module, own: str, there: str, rows: Rows) -> Iterator[Entry]:
    """The tensors of one block: `own` is where it lies in our network, `there` where it lies in the other."""
    for name, parts in rows[type(block)].items():
        part = part_of(block, name)
        if part is None:
            continue
        parts = (parts,) if isinstance(parts, str) else parts
        for leaf, _ in part.named_parameters(recurse=False):
            theirs = tuple(".".join(filter(None, (there, part_name, leaf))) for part_name in parts)
            yield Entry(".".join(filter(None, (own, name, leaf))), theirs)


# --- the places of blocks -----------------------------------------------------------------------------------

# Libraries that number blocks by level i, and by j within a level; diffusers counts the levels of the decoder
# from the coarsest, k
PLACES = {
    "compvis": {
        "res": "{half}.{way}.{i}.block.{j}",
        "attention": "{half}.{way}.{i}.attn.{j}",
        "change": "{half}.{way}.{i}.{way}sample",
        "mid": ("{half}.mid.block_1", "{half}.mid.attn_1", "{half}.mid.block_2"),
        "end": ("{half}.norm_out", "{half}.conv_out"),
    },
    "diffusers": {
        "res": "{half}.{way}_blocks.{k}.resnets.{j}",
        "attention": "{half}.{way}_blocks.{k}.attentions.{j}",
        "change": "{half}.{way}_blocks.{k}.{way}samplers.0",
        "mid": tuple(f"{{half}}.mid_block.{x}" for x in ("resnets.0", "attentions.0", "resnets.1")),
        "end": ("{half}.conv_norm_out", "{half}.conv_out"),
    },
}


def places(config: VAEConfig, half: str, layout: str) -> Iterator[str]:
    """Where each block of the encoder or decoder lies, in the order of our `layers`."""
    if layout in ("monai", "monai_vq"):  # one flat list
        n = 0
        while True:
            yield f"{half}.blocks.{n}"
            n += 1
    names, levels = PLACES[layout], len(config.channels)
    blocks, attend = per_level(config.num_res_blocks, levels), per_level(config.attention_levels, levels)
    decoder = half == "decoder"
    mid = [place.format(half=half) for place in names["mid"]]
    yield f"{half}.conv_in"
    if decoder:
        yield from mid
    for i in reversed(range(levels)) if decoder else range(levels):
        k = levels - 1 - i if decoder else i
        at = {"half": half, "way": "up" if decoder else "down", "i": i, "k": k}
        for j in range(blocks[i] + (config.extra_up_block and decoder)):
            yield names["res"].format(**at, j=j)
            if attend[i]:
                yield names["attention"].format(**at, j=j)
        if i != (0 if decoder else levels - 1):
            yield names["change"].format(**at)
    if not decoder:
        yield from mid
    yield from (place.format(half=half) for place in names["end"])


def autoencoder_entries(net: Autoencoder, layout: str) -> Iterator[Entry]:
    """Every tensor of an autoencoder."""
    rows = ROWS[layout]
    for half in ("encoder", "decoder"):
        layers = [(n, layer) for n, layer in enumerate(getattr(net, half).layers) if type(layer) in rows]
        for (n, layer), place in zip(layers, places(net.config, half, layout), strict=False):
            yield from block_entries(layer, f"{half}.layers.{n}", place, rows)
    if net.config.quant_conv:
        wrap = ".conv" if layout == "monai" else ""
        quant = ("quant_conv_mu.conv", "quant_conv_log_sigma.conv") if layout == "monai" else ("quant_conv",)
        for leaf in ("weight", "bias"):
            yield Entry(f"quant_conv.{leaf}", tuple(f"{name}.{leaf}" for name in quant))
            yield Entry(f"post_quant_conv.{leaf}", (f"post_quant_conv{wrap}.{leaf}",))
    if isinstance(net, VQVAE):
        codes = {"codebook": "embedding.weight", "code_sum": "ema_w", "code_count": "ema_cluster_size"}
        for own, theirs in codes.items():
            yield Entry(f"quantizer.{own}", (f"quantizer.quantizer.{theirs}",))


def unet_entries(net: UNetEncoder, own: str = "") -> Iterator[Entry]:
    """Every tensor of a U-Net or of its half that reads, in MONAI's layout; `own` stands before our names."""

    def of(block: nn.Module, here: str, there: str) -> Iterator[Entry]:
        return block_entries(block, own + here, there, MONAI_UNET)

    yield from of(net.conv_in, "conv_in", "conv_in")
    for n in (0, 2):
        yield from of(net.time_embed[n], f"time_embed.{n}", f"time_embed.{n}")
    for way in ("down", "up"):
        i = j = 0
        for n, layer in enumerate(getattr(net, way)):
            there = f"{way}_blocks.{i}"
            if isinstance(layer, Stage):
                yield from of(layer.res, f"{way}.{n}.res", f"{there}.resnets.{j}")
                if layer.attention is not None:
                    yield from of(layer.attention, f"{way}.{n}.attention", f"{there}.attentions.{j}")
                j += 1
            else:  # between two levels
                yield from of(layer, f"{way}.{n}", f"{there}.{way}sampler")
                i, j = i + 1, 0
    yield from of(net.mid[0].res, "mid.0.res", "middle_block.resnet_1")
    yield from of(net.mid[0].attention, "mid.0.attention", "middle_block.attention")
    yield from of(net.mid[1].res, "mid.1.res", "middle_block.resnet_2")
    if isinstance(net, UNet):
        yield from of(net.norm_out, "norm_out", "out.0")
        yield from of(net.conv_out, "conv_out", "out.2")


def controlnet_entries(net: ControlNet) -> Iterator[Entry]:
    """Every tensor of a ControlNet in MONAI's layout, where the first zero convolution is not wrapped."""
    yield from unet_entries(net)
    embedding = {"conv_in": "conv_in", "conv_out": "conv_out"}
    embedding |= {f"convs.{n}": f"blocks.{n}" for n in range(len(net.embedding.convs))}
    where = {f"embedding.{own}": f"controlnet_cond_embedding.{to}.conv" for own, to in embedding.items()}
    *skips, middle = (f"zero_convs.{n}" for n in range(len(net.zero_convs)))
    where |= {own: f"controlnet_down_blocks.{n}{'.conv' if n else ''}" for n, own in enumerate(skips)}
    where[middle] = "controlnet_mid_block.conv"
    for own, there in where.items():
        for leaf in ("weight", "bias"):
            yield Entry(f"{own}.{leaf}", (f"{there}.{leaf}",))
    if net.class_embedding is not None:
        yield Entry("class_embedding.weight", ("class_embedding.weight",))


def unet_conditions(net: Denoiser) -> tuple[Condition, ...]:
    """The conditions that reach the U-Net itself: all but the map of a ControlNet."""
    return () if net.conditioner is None else net.conditioner.conditions


NUMBERS = ("top_region_index", "bottom_region_index", "spacing")  # that MAISI's U-Net takes
EMBEDDINGS = {"class": "class_embedding", **{name: f"{name}_layer" for name in NUMBERS}}


def denoiser_entries(net: Denoiser) -> Iterator[Entry]:
    """Every tensor of a denoiser whose conditions are among EMBEDDINGS, but those for absent numbers, and
    those of a ControlNet, which is a network of its own in other libraries."""
    yield from unet_entries(net.unet, "unet.")
    for i, condition in enumerate(unet_conditions(net)):
        named = "class" if condition.kind == "class" else condition.name
        own, there = f"conditioner.parts.{i}", EMBEDDINGS[named]
        if condition.kind == "class":
            yield Entry(f"{own}.table.weight", (f"{there}.weight",))
            continue
        for leaf in ("0.weight", "0.bias", "2.weight", "2.bias"):
            yield Entry(f"{own}.mlp.{leaf}", (f"{there}.{leaf}",))


def discriminator_entries(net: PatchDiscriminator) -> Iterator[Entry]:
    """Every tensor of a discriminator in MONAI's layout."""
    for i, layers in enumerate(net.scales):
        start = f"discriminator_{i}." if len(net.scales) > 1 else ""
        names = ["initial_conv", *map(str, range(len(layers) - 2)), "final_conv"]
        for n, (layer, name) in enumerate(zip(layers, names, strict=True)):
            for leaf, _ in layer[0].named_parameters():
                yield Entry(f"scales.{i}.{n}.0.{leaf}", (f"{start}{name}.conv.{leaf}",))


def entries(net: nn.Module, layout: str) -> list[Entry]:
    """Every tensor of one of our networks and the names of the tensors that make it in a layout."""
    if isinstance(net, Denoiser):
        return list(denoiser_entries(net))
    if isinstance(net, Autoencoder):
        return list(autoencoder_entries(net, layout))
    if isinstance(net, ControlNet):
        return list(controlnet_entries(net))
    if isinstance(net, PatchDiscriminator):
        return list(discriminator_entries(net))
    raise TypeError(type(net))


# --- both ways ----------------------------------------------------------------------------------------------


def fill(net: nn.Module, state: dict[str, Tensor], layout: str, where: str) -> None:
    """Copy a foreign state into our network. InputError names the tensors that are missing, left over or of
    another shape."""
    own, shapes = {}, {name: value.shape for name, value in net.state_dict().items()}
    listed = entries(net, layout)
    used = {name for entry in listed for name in entry.theirs}
    bad = [f"{name} is missing" for entry in listed for name in entry.theirs if name not in state]
    bad += [f"{name} is left over" for name in state if name not in used]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        raise InputError(f"{where}: the weights do not fit: {'; '.join(bad[:3])}{more}")
    for entry in listed:
        parts, shape = [state[name] for name in entry.theirs], shapes[entry.own]
        if len({part.shape[1:] for part in parts}) > 1 or not all(part.ndim for part in parts):
            raise InputError(f"{where}: {entry.theirs[0]} and {entry.theirs[-1]} differ in shape")
        value = torch.cat(parts)
        # CompVis writes the linear layers of attention as 1x1 convolutions
        pointwise = value.shape[len(shape) :] == (1,) * (value.ndim - len(shape))
        own[entry.own] = value.view(shape) if pointwise and value.numel() == shape.numel() else value
        if own[entry.own].shape != shape:
            raise InputError(
                f"{where}: {entry.theirs[0]} is {tuple(parts[0].shape)}, which does not fit the other "
                f"tensors ({entry.own} wants {tuple(shape)})"
            )
    if isinstance(net, VQVAE):
        own["quantizer.initialised"] = torch.tensor(True)  # so that training on keeps the codes
    load_weights(net, own, where, may_miss=["conditioner.parts.*.null"])  # zeros: no library has them


def extract(net: nn.Module, layout: str) -> dict[str, Tensor]:
    """The foreign state that `fill` reads into an equal network, bit for bit."""
    own, state = net.state_dict(), {}
    for entry in entries(net, layout):
        parts = own[entry.own].chunk(len(entry.theirs))
        state |= {name: part.clone() for name, part in zip(entry.theirs, parts, strict=True)}
    return state
