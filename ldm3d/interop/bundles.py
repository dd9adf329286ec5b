"""The configuration file that comes with weights: what it says beyond their shapes.

MONAI's bundles describe a network as {"_target_": "monai.networks.nets.AutoencoderKL", "channels": ...} with
the arguments of its class, some of them as "@name" of another entry; diffusers' config.json holds the
arguments themselves. The transforms of a bundle tell the intensities and the spacing of its training
images, its scheduler tells how noise is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blocks import per_level
from ..config import InputError, read_json

ARGUMENTS = {  # of the classes of other libraries -> our settings
    **{"spatial_dims": "dims", "in_channels": "in_channels", "latent_channels": "latent_channels"},
    **dict.fromkeys(("channels", "num_channels", "block_out_channels"), "channels"),
    **dict.fromkeys(("num_res_blocks", "layers_per_block"), "num_res_blocks"),
    **{"attention_levels": "attention_levels", "resblock_updown": "resblock_updown"},
    **{"cross_attention_dim": "context_dim", "num_class_embeds": "num_classes"},
    "conditioning_embedding_in_channels": "map_channels",
    "conditioning_embedding_num_channels": "embedding_channels",
    **{"norm_num_groups": "num_groups", "norm_eps": "gn_eps", "num_head_channels": "head_channels"},
    **{"num_res_layers": "num_res_blocks", "num_res_channels": "res_channels"},
    **{"embedding_dim": "latent_channels", "num_embeddings": "codebook_size"},
    **{"commitment_cost": "commitment_weight", "decay": "decay"},
}
VQVAE_ONLY = {  # arguments of MONAI's VQVAE that shapes do not tell -> the one value that our network has
    **{"downsample_parameters": [2, 4, 1, 1], "upsample_parameters": [2, 4, 1, 1, 0]},
    **{"act": "RELU", "output_act": None},
}
SCALINGS = {  # transforms that scale intensities -> their arguments for the new range
    **dict.fromkeys(("ScaleIntensityRange", "ScaleIntensityRangePercentiles"), ("b_min", "b_max")),
    "ScaleIntensity": ("minv", "maxv"),
}
FACTORS = {  # of latents, as a U-Net receives them: (z - shift_factor) * scale_factor
    **dict.fromkeys(("scale_factor", "scaling_factor"), "scale_factor"),
    "shift_factor": "shift_factor",
}
STATISTICS = ("latents_mean", "latents_std")  # the same for each channel: (z - mean) / std * scale_factor
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "RFlowScheduler")


@dataclass(frozen=True)
class Described:
    """What a configuration file says.

    settings: of the network, by our names. facts: scale_factor, shift_factor, image_range, spacing, kernel
    (the settings of a diffusion). unclear: name of a setting or fact -> what stands there, in words, where
    the file holds an expression of Python, which is not run, or contradicts itself.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    unclear: dict[str, str]


def objects(content: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON file, outer ones first."""
    if isinstance(content, dict):
        yield content
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from objects(value)


def class_of(value: dict[str, Any]) -> str:
    """The class that an object of a configuration describes: "AutoencoderKL"."""
    name = value.get("_target_", value.get("_class_name", ""))
    return str(name).rsplit(".", 1)[-1]


def resolved(value: Any, content: dict[str, Any]) -> Any:
    """The value that a reference of a bundle, "@name" or "$@name", stands for."""
    for _ in range(10):  # references may stand for references
        if not isinstance(value, str) or not value.lstrip("$").startswith("@"):
            break
        value = content.get(value.lstrip("$@"), value.lstrip("$@"))
    return value


def read_description(path: str | Path, classes: tuple[str, ...]) -> Described:
    """What the file says about a network of one of these classes. InputError if it describes none."""
    content = read_json(path)
    found = [value for value in objects(content) if class_of(value) in classes]
    if not found:
        raise InputError(f"{path}: describes no {' or '.join(classes) or 'such network'}")
    given = {name: resolved(value, content) for name, value in found[0].items()}
    if "VQVAE" in classes:
        check_vqvae(given, str(path))
    settings = {ours: given[name] for name, ours in ARGUMENTS.items() if name in given}
    if "head_channels" not in settings and any(
        name.startswith(("DiffusionModelUNet", "ControlNet")) for name in classes
    ):
        settings["head_channels"] = 8  # the default of the class
    if given.get("use_convtranspose"):
        words = given["use_convtranspose"]
        settings["upsample"] = words if isinstance(words, str) else "deconv"
    unclear = {name: repr(v) for name, v in settings.items() if isinstance(v, str) and v != "deconv"}
    settings = {name: value for name, value in settings.items() if name not in unclear}
    facts: dict[str, Any] = {}
    for name, values in facts_of(content, given).items():
        if all(value == values[0] for value in values):
            facts[name] = values[0]
        else:
            unclear[name] = " and ".join(map(str, values))
    return Described(settings, facts, unclear)


def check_vqvae(given: dict[str, Any], where: str) -> None:
    """InputError if the arguments of a VQVAE say what our network lacks. A value may stand for all levels."""
    for name, ours in VQVAE_ONLY.items():
        value = given.get(name, ours)
        rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        if any((row.upper() if isinstance(row, str) else row) != ours for row in rows):
            raise InputError(f"{where}: {name} {value} is not supported, expected {ours}")


def facts_of(content: dict[str, Any], network: dict[str, Any]) -> dict[str, list[Any]]:
    """What a file says beside its network: name of a fact -> every value that it has there."""
    facts: dict[str, list[Any]] = {}
    for name, fact in FACTORS.items():
        value = resolved(network.get(name, content.get(name)), content)
        if isinstance(value, (int, float)):
            facts[fact] = [float(value)]
    for name in STATISTICS:
        if isinstance(value := resolved(network.get(name), content), list):
            facts[name] = [tuple(value)]
    samplers = []
    for value in objects(content):
        name = class_of(value).removesuffix("d")
        if name in SCHEDULERS:
            kernel = described_kernel({key: resolved(v, content) for key, v in value.items()})
            facts.setdefault("kernel", []).append(kernel)
            samplers += [kernel] * (name == "DDIMScheduler")
        if name in SCALINGS:
            ends = (value.get(key, usual) for key, usual in zip(SCALINGS[name], (0, 1), strict=True))
            low, high = (resolved(end, content) for end in ends)
            if all(isinstance(number, (int, float)) for number in (low, high)):
                facts.setdefault("image_range", []).append((float(low), float(high)))
        pixdim = resolved(value.get("pixdim"), content)
        if name == "Spacing" and isinstance(pixdim, list):
            facts.setdefault("spacing", []).append(tuple(pixdim))
    for kernel in facts.get("kernel", ()):
        # A scheduler beside DDIM is that of training: DDIM says how samples are made
        if samplers and kernel["process"] == "vp" and not any(kernel is one for one in samplers):
            kernel["clip_x_start"] = samplers[0]["clip_x_start"]
    return facts


def kernels_of(path: str | Path) -> list[dict[str, Any]]:
    """The settings of the diffusion of every scheduler that the file describes."""
    return facts_of(read_json(path), {}).get("kernel", [])


def described_flow(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The times of MONAI's rectified flow: how they are drawn in training, and shifted towards noise.

    With use_timestep_transform the shift is (voxels / base_img_size_numel)^(1 / axes) of the latent, which is
    ours with a `flow_base` of base_img_size_numel^(1 / axes); but ours is never below 1. MONAI's code never
    reads its own transform_scale.
    """
    if offset := scheduler.get("steps_offset", 0):
        raise InputError(f"RFlowScheduler: steps_offset {offset} is not supported, expected 0")
    base, axes = scheduler.get("base_img_size_numel", 32**3), scheduler.get("spatial_dim", 3)
    if not all(isinstance(n, (int, float)) and n > 0 for n in (base, axes)):
        raise InputError(f"RFlowScheduler: base_img_size_numel {base}, spatial_dim {axes}: expected numbers")
    shifted = bool(scheduler.get("use_timestep_transform", False))
    times: dict[str, Any] = {"flow_base": round(base ** (1 / axes), 6)} if shifted else {"flow_shift": 1.0}
    if scheduler.get("sample_method", "uniform") == "logit-normal":
        times |= {"t_distribution": "logit_normal", "logit_mean": scheduler.get("loc", 0.0)}
        times["logit_std"] = scheduler.get("scale", 1.0)
    return times


def described_clip(scheduler: dict[str, Any]) -> Any:
    """At which values a scheduler of MONAI clamps estimates of the clean latent: 1 if nothing is said. An
    expression, and two ends that are not opposites, come as they are, which no kernel takes."""
    clips = scheduler.get("clip_sample", True)
    if isinstance(clips, str):
        return clips
    if class_of(scheduler) == "PNDMScheduler" or not clips:
        return None
    low, high = scheduler.get("clip_sample_min", -1.0), scheduler.get("clip_sample_max", 1.0)
    opposite = isinstance(low, (int, float)) and low == -high
    return float(high) if opposite else (low, high)


def described_kernel(scheduler: dict[str, Any]) -> dict[str, Any]:
    """A scheduler of MONAI as the settings of our diffusion kernel; defaults are those of its class."""
    steps = {"num_timesteps": scheduler.get("num_train_timesteps", 1000)}
    if class_of(scheduler) == "RFlowScheduler":
        return {"process": "flow", "prediction": "velocity", **steps, **described_flow(scheduler)}
    prediction = scheduler.get("prediction_type", "epsilon")
    kernel = {
        "process": "vp",
        "prediction": {"epsilon": "eps", "sample": "x_start", "v_prediction": "v"}.get(
            prediction, prediction
        ),
        "schedule": str(scheduler.get("schedule", "linear_beta")).removesuffix("_beta"),
        "clip_x_start": described_clip(scheduler),
        **steps,
    }
    if kernel["schedule"] != "cosine":
        kernel |= {
            "beta_start": scheduler.get("beta_start", 1e-4),
            "beta_end": scheduler.get("beta_end", 2e-2),
        }
    return kernel


def check_agreement(described: dict[str, Any], inferred: dict[str, Any], where: str) -> None:
    """InputError if a configuration file describes another network than the shapes do."""
    if not described:
        return
    levels = len(inferred["channels"])
    for name, value in described.items():
        if name not in inferred or value is None:
            continue
        ours = inferred[name]
        if name == "res_channels" and ours is None:
            ours = inferred["channels"]
        if isinstance(ours, tuple):
            value = value if isinstance(value, list) else [value]
            value = tuple(value) if len(value) == len(ours) else per_level(value, levels)
        if value != ours:
            raise InputError(f"{where}: {name} is {value} there, but {ours} in the weights")
