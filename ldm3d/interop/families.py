"""Which library wrote a file of weights, and the configuration that its tensors have.

A file of weights is a table of names and shapes. `recognise` finds the family by a name that no other family
has (FAMILIES, the first row that fits), and rewrites older spellings, so that every autoencoder comes in one
of the layouts of layouts.py. `configuration` then reads from the shapes what shapes can tell:

    encoder.blocks.0.conv.weight (64, 1, 3, 3, 3)      three axes, one image channel, 64 channels at level 0
    encoder.blocks.3.conv.conv.weight                  a down-sampling after two residual blocks

Shapes cannot tell the groups and epsilon of norms, the heads of attention, or a transposed convolution of
kernel 3 from a plain one. These come from the configuration file of the weights or from a flag; where a
family has one usual value, that value is assumed and reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import InputError
from .peers import Library

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One way in which weights are stored. A file is of the first family whose `sign` is a name in it."""

    name: str
    kind: str  # "autoencoder", "unet", "controlnet" or "discriminator"
    layout: str
    library: Library | None  # whose class makes the network today
    sign: str  # regular expression that must match one of the names
    renames: tuple[tuple[str, str], ...] = ()  # regular expressions -> today's spelling
    unused: str | None = None  # tensors that the family stores and never applies
    fixed: dict[str, Any] = field(default_factory=dict)  # settings that all members have
    usual: dict[str, Any] = field(default_factory=dict)  # settings that are assumed where nothing is said
    classes: tuple[str, ...] = ()  # names in configuration files


UNIT, SYMMETRIC = (0.0, 1.0), (-1.0, 1.0)
NORM = {"num_groups": 32, "gn_eps": 1e-6}
WRAPPED = (r"^((?:en|de)coder\..*)\.conv\.conv\.(weight|bias)$", r"\1.conv.\2")  # MAISI wraps once more
UPSAMPLE = (r"^(decoder\.blocks\.\d+)\.conv\.conv\.", r"\1.postconv.conv.")
SELF_ATTENTION = (r"(blocks\.\d+|attentions\.\d+|attention)\.(to_[qkv])\.", r"\1.attn.\2.")
COMPVIS_TRUNK = {"double_z": True, "extra_up_block": True, "final_silu": True, "mid_attention": True}
OLD_ATTENTION = tuple(
    (rf"\.{old}\.(weight|bias)$", rf".{new}.\1")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)

OLD_UNET = (  # monai-generative's spelling of U-Nets
    SELF_ATTENTION,
    (r"\.(attn[12])\.to_out\.0\.", r".\1.out_proj."),
    (r"\.upsampler\.conv\.conv\.", ".upsampler.postconv.conv."),
)

FAMILIES = (
    Family(
        name="MONAI PatchDiscriminator",  # named alike in monai-generative; of one or more scales
        kind="discriminator",
        layout="monai",
        library="monai",
        sign=r"^(discriminator_0\.)?initial_conv\.conv\.weight$",
        usual={"norm": "instance"},
    ),
    Family(
        name="MONAI ControlNet",  # MAISI's and monai-generative's too
        kind="controlnet",
        layout="monai",
        library="monai",
        sign=r"^controlnet_cond_embedding\.conv_in\.conv\.weight$",
        renames=OLD_UNET,
        unused=r"\.proj_attn\.",
        usual=NORM,
        classes=("ControlNet", "ControlNetMaisi"),
    ),
    Family(
        name="MONAI VQVAE",  # named alike in monai-generative
        kind="autoencoder",
        layout="monai_vq",
        library="monai",
        sign=r"^quantizer\.quantizer\.embedding\.weight$",
        fixed={"trunk": "plain", "quant_conv": False},
        usual={"image_range": UNIT},
        classes=("VQVAE",),
    ),
    Family(
        name="MAISI autoencoder",
        kind="autoencoder",
        layout="monai",
        library="maisi",
        sign=r"^encoder\.blocks\.0\.conv\.conv\.weight$",
        renames=(WRAPPED, UPSAMPLE),
        usual=NORM | {"image_range": UNIT, "upsample": "trilinear"},
        classes=("AutoencoderKlMaisi",),
    ),
    Family(
        name="monai-generative autoencoder",
        kind="autoencoder",
        layout="monai",
        library="monai",
        sign=r"^((en|de)coder\.blocks\.\d+\.(proj_attn|to_q)|decoder\.blocks\.\d+\.conv\.conv)\.weight$",
        renames=(SELF_ATTENTION, UPSAMPLE),
        unused=r"\.proj_attn\.",
        fixed={"attn_out_proj": False},
        usual=NORM | {"image_range": UNIT, "upsample": "nearest"},
        classes=("AutoencoderKL",),
    ),
    Family(
        name="MONAI autoencoder",
        kind="autoencoder",
        layout="monai",
        library="monai",
        sign=r"^quant_conv_mu\.conv\.weight$",
        usual=NORM | {"image_range": UNIT},
        classes=("AutoencoderKL",),
    ),
    Family(
        name="MAISI U-Net",
        kind="unet",
        layout="monai",
        library="maisi",
        sign=r"^(spacing_layer|top_region_index_layer|bottom_region_index_layer)\.0\.weight$",
        usual=NORM,
        classes=("DiffusionModelUNetMaisi",),
    ),
    Family(
        name="monai-generative U-Net",
        kind="unet",
        layout="monai",
        library="monai",
        sign=r"^((down|up)_blocks\.\d+\.attentions\.\d+\.to_q|middle_block\.attention\.to_q"
        r"|.*\.attn1\.to_out\.0)\.weight$",
        renames=OLD_UNET,
        unused=r"\.proj_attn\.",
        fixed={"attn_out_proj": False},
        usual=NORM,
        classes=("DiffusionModelUNet",),
    ),
    Family(
        name="MONAI U-Net",
        kind="unet",
        layout="monai",
        library="monai",
        sign=r"^middle_block\.resnet_1\.time_emb_proj\.weight$",
        usual=NORM,
        classes=("DiffusionModelUNet",),
    ),
    Family(
        name="CompVis autoencoder",
        kind="autoencoder",
        layout="compvis",
        library=None,
        sign=r"^encoder\.down\.0\.block\.0\.norm1\.weight$",
        fixed=COMPVIS_TRUNK,
        usual=NORM | {"image_range": SYMMETRIC},
    ),
    Family(
        name="diffusers autoencoder",
        kind="autoencoder",
        layout="diffusers",
        library="diffusers",
        sign=r"^encoder\.down_blocks\.0\.resnets\.0\.norm1\.weight$",
        renames=OLD_ATTENTION,
        fixed=COMPVIS_TRUNK,
        usual=NORM | {"image_range": SYMMETRIC},
        classes=("AutoencoderKL",),
    ),
)
OTHERS = {  # recognised, to be refused by name
    r"^quantize\.embedding\.": "a VQ autoencoder of CompVis",
    r"^(model\.diffusion_model\.|input_blocks\.)": "a U-Net of CompVis",
}


def recognise(state: State, where: str) -> Family:
    """The family of a file. InputError for one that is not supported, or not known."""
    names = "\n".join(state)
    for sign, what in OTHERS.items():
        if re.search(sign, names, re.MULTILINE):
            raise InputError(f"{where}: holds {what}, which is not supported")
    for family in FAMILIES:
        if re.search(family.sign, names, re.MULTILINE):
            return family
    some = ", ".join(list(state)[:3]) or "nothing"
    known = ", ".join(family.name for family in FAMILIES)
    raise InputError(f"{where}: weights of an unknown network ({some}, ...); known are: {known}")


def rewrite(state: State, family: Family, where: str) -> tuple[State, list[str]]:
    """(the state in the spelling of the family's layout, the names of what is stored and never applied)."""
    unused = [name for name in state if family.unused and re.search(family.unused, name)]
    new: State = {}
    for name, value in state.items():
        if name in unused:
            continue
        for old, today in family.renames:
            name = re.sub(old, today, name)
        if name in new:
            raise InputError(f"{where}: {name} is there twice, in two spellings")
        new[name] = value
    for name in [name for name in new if re.search(r"\.(attn|attn1)\.qkv\.(weight|bias)$", name)]:
        q, k, v = new.pop(name).chunk(3)
        new |= {name.replace(".qkv.", f".to_{x}."): part for x, part in zip("qkv", (q, k, v), strict=True)}
    return new, unused


# --- what shapes tell ---------------------------------------------------------------------------------------


def numbers(state: State, pattern: str) -> int:
    """How many numbers stand at the group of a pattern: r"down_blocks\\.(\\d+)\\." counts levels."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return max(found) + 1 if found else 0


class Shapes:
    """The shapes of matrices and kernels of a state; InputError for a name that is not there, or no such."""

    def __init__(self, state: State, where: str):
        self.state, self.where = state, where

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise InputError(f"{self.where}: the weights do not fit: {name} is missing")
        if self.state[name].ndim < 2:
            shape = tuple(self.state[name].shape)
            raise InputError(f"{self.where}: {name} is {shape}, which is no matrix and no kernel")
        return tuple(self.state[name].shape)

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.state)


def block_types(shapes: Shapes, half: str) -> str:
    """The blocks of MONAI's flat list, one letter each: c convolution, r residual, p residual without norms,
    a attention, d down, u up, n norm. For two levels with attention at the second: "crdranc"."""
    letters = ""
    for n in range(min(numbers(shapes.state, rf"{half}\.blocks\.(\d+)\."), len(shapes.state))):
        at = rf"{half}\.blocks\.{n}\."
        signs = {
            "r": "norm1",
            "p": "conv1",
            "a": "attn",
            "d": r"conv\.conv",
            "u": "postconv|deconv",
            "c": "conv",
            "n": "weight",
        }
        found = next((letter for letter, sign in signs.items() if shapes.has(rf"{at}({sign})\b")), None)
        if found is None:
            raise InputError(f"{shapes.where}: {half}.blocks.{n} is missing or of an unknown kind")
        letters += found
    return letters


def levels_of(letters: str, where: str) -> tuple[list[str], bool]:
    """The blocks of each level from the encoder's letters, and whether a middle (r a r) follows them."""
    match = re.fullmatch(r"c((?:(?:ra?)*d)*(?:ra?)*)nc", letters)
    if not match:
        raise InputError(f"{where}: the blocks of the encoder are in an order that no autoencoder has")
    *finer, last = match[1].split("d")
    middle = last.endswith("rar")  # attention of a level follows every block, so the last block would be "ra"
    return [*finer, last[:-3] if middle else last], middle


def monai_autoencoder(shapes: Shapes) -> dict[str, Any]:
    """The settings (VAEConfig) that MONAI's flat lists of blocks tell."""
    stem = shapes("encoder.blocks.0.conv.weight")
    levels, middle = levels_of(block_types(shapes, "encoder"), shapes.where)
    decoder = block_types(shapes, "decoder")
    channels, n = [], 1
    for level in levels:
        if not level:
            raise InputError(f"{shapes.where}: a level of the encoder has no residual block")
        channels.append(shapes(f"encoder.blocks.{n}.conv1.conv.weight")[0])
        n += len(level) + 1
    settings = {
        "dims": len(stem) - 2,
        "in_channels": stem[1],
        "latent_channels": shapes("post_quant_conv.conv.weight")[0],
        "channels": tuple(channels),
        "num_res_blocks": tuple(level.count("r") for level in levels),
        "attention_levels": tuple("a" in level for level in levels),
        "mid_attention": middle,
    }
    if decoder.startswith("crarr") != middle:  # attention of a level would go on with "cra" or "crara"
        settings["decoder_mid_attention"] = not middle
    if shapes.has(r".*\.attn\."):
        settings["attn_out_proj"] = shapes.has(r".*\.attn\.out_proj\.")
    if shapes.has(r"decoder\.blocks\.\d+\.deconv\."):
        settings["upsample"] = "deconv2"
    elif "u" in decoder and not shapes.has(r"decoder\.blocks\.\d+\.postconv\."):
        raise InputError(f"{shapes.where}: the decoder has no known up-sampling")
    return settings


def monai_vqvae(shapes: Shapes) -> dict[str, Any]:
    """The settings (VAEConfig, and codebook_size) of MONAI's VQVAE: a convolution starts each level."""
    letters, stem = block_types(shapes, "encoder"), shapes("encoder.blocks.0.conv.weight")
    if not re.fullmatch(r"(cp*)+c", letters):
        raise InputError(f"{shapes.where}: the blocks of the encoder are in an order that no VQVAE has")
    at = [n for n, letter in enumerate(letters) if letter == "c"]  # the last convolution ends the trunk
    channels = tuple(shapes(f"encoder.blocks.{n}.conv.weight")[0] for n in at[:-1])
    inner = tuple(
        shapes(f"encoder.blocks.{n + 1}.conv1.conv.weight")[0] if letters[n + 1] == "p" else width
        for n, width in zip(at[:-1], channels, strict=True)
    )
    codes = shapes("quantizer.quantizer.embedding.weight")
    return {
        "dims": len(stem) - 2,
        "in_channels": stem[1],
        "latent_channels": codes[-1],
        "channels": channels,
        "num_res_blocks": tuple(len(part) for part in letters[1:-1].split("c")),
        "res_channels": None if inner == channels else inner,
        "codebook_size": codes[0],
    }


def levels_autoencoder(shapes: Shapes, layout: str) -> dict[str, Any]:
    """The settings (VAEConfig) of CompVis and diffusers, whose blocks are numbered by level."""
    down, res, attention = ("down", "block", "attn")
    if layout == "diffusers":
        down, res, attention = ("down_blocks", "resnets", "attentions")
    levels = range(numbers(shapes.state, rf"encoder\.{down}\.(\d+)\."))
    stem, width = shapes("encoder.conv_in.weight"), shapes("encoder.conv_out.weight")[0]
    quant = shapes.has(r"quant_conv\.")
    return {
        "dims": len(stem) - 2,
        "in_channels": stem[1],
        "latent_channels": shapes("post_quant_conv.weight")[0] if quant else width // 2,
        "channels": tuple(shapes(f"encoder.{down}.{i}.{res}.0.conv1.weight")[0] for i in levels),
        "num_res_blocks": tuple(
            numbers(shapes.state, rf"encoder\.{down}\.{i}\.{res}\.(\d+)\.") for i in levels
        ),
        "attention_levels": tuple(shapes.has(rf"encoder\.{down}\.{i}\.{attention}\.") for i in levels),
        "quant_conv": quant,
    }


def unet(shapes: Shapes, whole: bool = True) -> dict[str, Any]:
    """The settings (UNetConfig) of MONAI's U-Nets, and of the half that a ControlNet is."""
    levels = range(numbers(shapes.state, r"down_blocks\.(\d+)\."))
    stem = shapes("conv_in.conv.weight")
    context = "middle_block.attention.transformer_blocks.0.attn2.to_k.weight"
    if shapes.has(r".*\.transformer_blocks\.1\."):
        raise InputError(f"{shapes.where}: transformer_num_layers above 1 is not supported")
    settings = {
        "dims": len(stem) - 2,
        "in_channels": stem[1],
        "out_channels": shapes("out.2.conv.weight")[0] if whole else stem[1],
        "channels": tuple(shapes(f"down_blocks.{i}.resnets.0.conv1.conv.weight")[0] for i in levels),
        "num_res_blocks": tuple(
            numbers(shapes.state, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in levels
        ),
        "attention_levels": tuple(shapes.has(rf"down_blocks\.{i}\.attentions\.") for i in levels),
        "context_dim": shapes(context)[1] if context in shapes.state else None,
        "resblock_updown": shapes.has(r"down_blocks\.\d+\.downsampler\.norm1\."),
    }
    if settings["context_dim"] is None:
        settings["attn_out_proj"] = shapes.has(r"middle_block\.attention\.attn\.out_proj\.")
    return settings


def controlnet(shapes: Shapes) -> dict[str, Any]:
    """The settings of a ControlNet: those of its U-Net, and CONTROL."""
    embedding, name = "controlnet_cond_embedding", "class_embedding.weight"
    num = numbers(shapes.state, rf"{embedding}\.blocks\.(\d+)\.")
    first = shapes(f"{embedding}.conv_in.conv.weight")
    wider = (
        shapes(f"{embedding}.blocks.{n}.conv.weight")[0] for n in range(1, min(num, len(shapes.state)), 2)
    )
    return unet(shapes, whole=False) | {
        "map_channels": first[1],
        "embedding_channels": (first[0], *wider),
        "num_classes": shapes(name)[0] if name in shapes.state else None,
    }


def discriminator(shapes: Shapes) -> dict[str, Any]:
    """The settings (PatchDiscriminatorConfig) of MONAI's discriminators, batch norms folded."""
    several = shapes.has(r"discriminator_\d+\.")
    num = numbers(shapes.state, r"discriminator_(\d+)\.") if several else 1
    at = [f"discriminator_{i}." if several else "" for i in range(min(num, len(shapes.state)))]
    depths = [numbers(shapes.state, rf"{re.escape(start)}(\d+)\.conv\.") for start in at]
    if depths != [depths[0] * (i + 1) for i in range(len(at))]:
        raise InputError(f"{shapes.where}: {depths} layers at the scales, expected multiples of the first")
    first = shapes(f"{at[0]}initial_conv.conv.weight")
    found = {
        "dims": len(first) - 2,
        "in_channels": first[1],
        "channels": first[0],
        "num_layers": depths[0],
        "num_scales": len(at),
        "scale_by": "depth" if len(at) > 1 else "image",
        "last_kernel": shapes(f"{at[0]}final_conv.conv.weight")[-1],
    }
    return found | ({"norm": "none"} if shapes.has(rf"{re.escape(at[0])}0\.conv\.bias") else {})


def without_batch_norm(state: State, where: str) -> tuple[State, int]:
    """(a state whose batch norms are folded into the convolutions before them, how many they were).

    In eval mode a batch norm is y (x - mean) / sqrt(var + eps) + b for each channel, which the weights and a
    bias of the convolution take in.
    """
    state = dict(state)
    bases = [name.removesuffix("running_mean") for name in state if name.endswith(".adn.N.running_mean")]
    for base in bases:
        conv = base.removesuffix("adn.N.") + "conv."
        names = ("weight", "bias", "running_mean", "running_var")
        parts = [state.pop(f"{base}{name}", None) for name in names]
        state.pop(f"{base}num_batches_tracked", None)
        weight = state.get(f"{conv}weight")
        shapes = {None if part is None else tuple(part.shape) for part in parts}
        if weight is None or shapes != {tuple(weight.shape[:1])}:
            raise InputError(f"{where}: {base}* is not a whole batch norm of {conv}weight")
        scale, bias, mean, var = parts
        scale = scale * (var + 1e-5).rsqrt()
        state[f"{conv}weight"] = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        state[f"{conv}bias"] = bias + (state.get(f"{conv}bias", 0.0) - mean) * scale
    return state, len(bases)


def with_identity_projections(state: State) -> State:
    """A state in which every self-attention of a transformer has a projection: MONAI leaves it out with
    include_fc=False, which is the same as an identity."""
    new = dict(state)
    for name, value in state.items():
        if name.endswith(".attn1.to_v.weight"):
            there = name.removesuffix("to_v.weight")
            new.setdefault(f"{there}out_proj.weight", torch.eye(len(value)))
            new.setdefault(f"{there}out_proj.bias", torch.zeros(len(value)))
    return new


def with_zero_biases(state: State) -> State:
    """A state in which every convolution has a bias: where there is none, it is zero."""
    new = dict(state)
    for name, value in state.items():
        if name.endswith(".conv.weight"):
            new.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(len(value)))
    return new


def configuration(state: State, family: Family, where: str) -> dict[str, Any]:
    """The settings that the shapes tell. InputError if they are those of no network."""
    shapes = Shapes(state, where)
    if family.kind == "unet":
        return unet(shapes)
    if family.kind == "controlnet":
        return controlnet(shapes)
    if family.kind == "discriminator":
        return discriminator(shapes)
    if family.layout == "monai":
        return monai_autoencoder(shapes)
    if family.layout == "monai_vq":
        return monai_vqvae(shapes)
    return levels_autoencoder(shapes, family.layout)
