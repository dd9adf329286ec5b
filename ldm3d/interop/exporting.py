"""Export a run: weights and configuration that the class of another library loads strictly.

    python -m ldm3d.interop export runs/vae-hippocampus --as monai --to exported
    python -m ldm3d.interop export runs/ldm-hippocampus --as monai --to exported

monai       a MONAI bundle: models/autoencoder.pt, unet.pt, controlnet.pt and discriminator.pt, as far as the
            run has them, and configs/inference.json, which reconstructs the files in images/ or samples new
            volumes:
            python -m monai.bundle run --config_file exported/configs/inference.json --bundle_root exported
maisi       the same for autoencoders that MAISI's class can be (up-sampling trilinear, or of kernel 3)
diffusers   config.json and diffusion_pytorch_model.safetensors, for AutoencoderKL.from_pretrained (2-D)
onnx, torch_export, torchscript     the decoder as a graph that runs without this library (graphs.py)

What the other library cannot express is an error that names the setting. What it expresses in another way is
folded into weights, where that is exact:

    latent_mean, latent_std     MONAI knows one scale_factor. The 1x1 convolutions on both sides of the latent
                                take the normalisation in: mean' = (mean - latent_mean) / latent_std. So the
                                exported autoencoder gives normalised latents, and scale_factor is 1
    velocity                    MONAI's rectified flow predicts x_start - noise, the opposite of ours: the
                                last convolution of the U-Net changes its sign
    classes of a ControlNet     ours receives the U-Net's embedding of a class; MONAI's gets a copy of it
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError, from_dict
from ..control import ControlNet
from ..data import DataConfig
from ..data.volumes import centred_affine
from ..denoiser import Denoiser
from ..diffusion_kernel import KernelConfig
from ..discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ..engine.checkpoint import is_occupied, load_latest, load_weights, write_text
from ..engine.checkpoint import load as load_checkpoint
from ..engine.distributed import print0
from ..pipeline import AutoencoderPipeline, LatentDiffusionPipeline, Pipeline, load
from ..vae import Autoencoder, AutoencoderKL
from ..vqvae import VQVAE
from .files import write_safetensors
from .graphs import export_decoder
from .layouts import extract, unet_conditions
from .peers import Description, describe

Target = Literal["monai", "maisi", "diffusers", "torch_export", "torchscript", "onnx"]


@dataclass(frozen=True)
class ExportConfig:
    as_: Target = "monai"  # what shall load it
    to: str | None = None  # new folder
    steps: int = 50  # of sampling, in the bundle of a latent diffusion run

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.steps}")


# --- weights ------------------------------------------------------------------------------------------------


def with_normalised_latents(net: Autoencoder, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """A copy whose latents are normalised: encode gives (z - mean) / std, decode takes that back.

    mean, std: (C_z,). The log-variance falls by 2 log std.
    """
    if not isinstance(net, AutoencoderKL):
        raise InputError("autoencoder: latent diffusion on codes (vq) has no counterpart in a MONAI bundle")
    net, first = copy.deepcopy(net), slice(len(mean))
    quant, post = net.quant_conv, net.post_quant_conv
    ones = (1,) * (quant.weight.ndim - 1)
    with torch.no_grad():
        quant.bias[first] = (quant.bias[first] - mean) / std
        quant.bias[len(mean) :] -= 2 * std.log()
        quant.weight[first] /= std.view(-1, *ones)
        post.bias += post.weight.flatten(1) @ mean
        post.weight *= std.view(1, -1, *ones[1:])
    return net


def discriminator_of(pipeline: AutoencoderPipeline) -> PatchDiscriminator | None:
    """The discriminator of the newest checkpoint; best.pt holds none."""
    run = pipeline.run
    content = (load_checkpoint(run, "vae") if run.is_file() else load_latest(run, "vae")) or {}
    state = content.get("others", {}).get("discriminator")
    if state is None:
        return None
    net = PatchDiscriminator(from_dict(PatchDiscriminatorConfig, content["config"]["disc"], "disc"))
    load_weights(net, state, f"{run}: discriminator")
    return net


def foreign_state(net: nn.Module, library: str) -> dict[str, Tensor]:
    """The weights of `net` under the names of the library's class."""
    layout = "monai_vq" if isinstance(net, VQVAE) else "monai"
    state = extract(net, "diffusers" if library == "diffusers" else layout)
    # MONAI lacks the absent class, which is the last row here
    if isinstance(net, Denoiser) and "class_embedding.weight" in state:
        state["class_embedding.weight"] = state["class_embedding.weight"][:-1].clone()
    if isinstance(net, AutoencoderKL) and library == "maisi":
        if net.config.mid_attention or net.config.decoder_mid_attention:
            raise InputError("mid_attention: is exported as monai, not as maisi")
        state = {wrapped(name): value for name, value in state.items()}
    return state


def with_own_classes(net: Denoiser) -> ControlNet:
    """The ControlNet of a denoiser with an embedding of classes of its own, where the U-Net has one."""
    control, table = copy.deepcopy(net.control), foreign_state(net, "monai").get("class_embedding.weight")
    if table is not None:
        control.class_embedding = nn.Embedding.from_pretrained(table)
    return control


def wrapped(name: str) -> str:
    """The name of a tensor of MONAI's autoencoder in MAISI's, which wraps every convolution once more."""
    name = re.sub(r"\.(postconv\.conv|deconv)\.", ".conv.conv.", name)
    return re.sub(r"^((?:en|de)coder\..*\.conv)\.(weight|bias)$", r"\1.conv.\2", name)


# --- MONAI bundle -------------------------------------------------------------------------------------------


def scaling_transform(data: DataConfig, image_range: tuple[float, float]) -> dict[str, Any]:
    """The MONAI transform that scales intensities as the run does, to the range within the network."""
    low, high = image_range
    to = {"b_min": low, "b_max": high, "clip": True}
    if data.scaling == "percentile":
        first, last = data.percentiles
        return {"_target_": "ScaleIntensityRangePercentiles", "lower": first, "upper": last, **to}
    if data.scaling == "window":
        first, last = data.window
        return {"_target_": "ScaleIntensityRange", "a_min": first, "a_max": last, **to}
    if data.scaling == "minmax":
        return {"_target_": "ScaleIntensity", "minv": low, "maxv": high}
    if data.scaling == "none":
        return {"_target_": "ScaleIntensityRange", "a_min": -1, "a_max": 1, "b_min": low, "b_max": high}
    raise InputError(f"data.scaling: {data.scaling} has no counterpart in a MONAI bundle")


def network(name: str, description: Description) -> dict[str, Any]:
    """The entries of a bundle that make a network and load its weights."""
    file = f"@bundle_root + '/models/{name}.pt'"
    return {
        f"{name}_def": {"_target_": description.target, **description.arguments},
        f"load_{name}": f"$@{name}_def.load_state_dict(torch.load({file}, weights_only=True))",
        name: f"$@{name}_def.to(@device).eval()",
    }


HEAD: dict[str, Any] = {
    "imports": ["$import glob", "$import torch", "$import monai"],
    "bundle_root": ".",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "output_dir": "$@bundle_root + '/results'",
    "saver": {
        "_target_": "SaveImage",
        "output_dir": "@output_dir",
        "output_postfix": "",
        "separate_folder": False,
        "resample": False,
    },
}


def reconstruction_bundle(pipeline: AutoencoderPipeline, description: Description) -> dict[str, Any]:
    """configs/inference.json of an autoencoder: every file in images/ is reconstructed."""
    net, data = pipeline.net, pipeline.layout
    steps = [{"_target_": "LoadImage", "image_only": True, "ensure_channel_first": True}]
    if data.dims == 3:
        steps.append({"_target_": "Orientation", "axcodes": "RAS"})
    if data.spacing is not None:
        steps.append({"_target_": "Spacing", "pixdim": list(data.spacing)})
    steps.append(scaling_transform(data, net.config.image_range))
    steps.append({"_target_": "DivisiblePad", "k": list(net.downsampling), "mode": "edge"})
    network_of = "lambda x: @autoencoder(x)[0]" if isinstance(net, VQVAE) else "@autoencoder.reconstruct"
    each = f"@saver(@inferer(@preprocessing(image)[None].to(@device), {network_of})[0])"
    return {
        **HEAD,
        "images": "$sorted(glob.glob(@bundle_root + '/images/*'))",
        **network("autoencoder", description),
        "preprocessing": {"_target_": "Compose", "transforms": steps},
        "inferer": {"_target_": "SimpleInferer"},
        "run": ["$@load_autoencoder", "$@autoencoder", f"$[{each} for image in @images]"],
    }


def four_by_four(affine: np.ndarray) -> np.ndarray:
    """An affine of two or three axes as MONAI writes them, for three axes."""
    dims, whole = len(affine) - 1, np.eye(4)
    whole[:dims, :dims], whole[:dims, 3] = affine[:dims, :dims], affine[:dims, dims]
    return whole


def scheduler_of(kernel: KernelConfig, latent: tuple[int, ...], shift: float) -> dict[str, Any]:
    """MONAI's scheduler for the diffusion of a run. latent: its spatial shape; shift: of the flow's times."""
    if kernel.process == "flow":
        if kernel.prediction != "velocity":
            raise InputError(f"kernel.prediction: {kernel.prediction} of a flow has no counterpart in MONAI")
        return {
            "_target_": "monai.networks.schedulers.RFlowScheduler",
            "num_train_timesteps": kernel.num_timesteps,
            "use_discrete_timesteps": False,
            # MONAI's shift is (voxels / base)^(1 / dims)
            "use_timestep_transform": shift != 1,
            "base_img_size_numel": math.prod(latent) / shift ** len(latent),
            "spatial_dim": len(latent),
        }
    if kernel.schedule == "sqrt" or kernel.zero_terminal_snr:
        raise InputError("kernel.schedule: sqrt and zero_terminal_snr have no counterpart in MONAI")
    names = {"linear": "linear_beta", "scaled_linear": "scaled_linear_beta", "cosine": "cosine"}
    betas = {"beta_start": kernel.beta_start, "beta_end": kernel.beta_end}
    clip = kernel.clip_x_start
    return {
        "_target_": "monai.networks.schedulers.DDIMScheduler",
        "num_train_timesteps": kernel.num_timesteps,
        "schedule": names[kernel.schedule],
        **(betas if kernel.schedule != "cosine" else {}),
        "prediction_type": {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}[kernel.prediction],
        "clip_sample": clip is not None,
        **({"clip_sample_min": -clip, "clip_sample_max": clip} if clip is not None else {}),
    }


def sampling_bundle(
    pipeline: LatentDiffusionPipeline, autoencoder: Description, unet: Description, steps: int
) -> dict[str, Any]:
    """configs/inference.json of a latent diffusion run: one new volume, of the class `class_label` if the
    run has classes."""
    model = pipeline.model
    kernel, latent, spec = model.kernel.config, model.latent_shape, pipeline.spec
    shift = model.kernel.flow_shift(latent[1:]) if kernel.process == "flow" else 1.0
    scheduler = scheduler_of(kernel, latent[1:], shift)
    more = f"input_img_size_numel={math.prod(latent[1:])}" if kernel.process == "flow" else ""
    classes = bool(unet_conditions(model.denoiser))
    if model.denoiser.arguments.position_step:
        raise InputError("patch.size: a bundle that samples with coordinates is not supported")
    if model.denoiser.unet.config.emb_parts > 1:
        raise InputError("condition.concat: a bundle that samples with MAISI's numbers is not supported")
    volume = "@sample[0].cpu()" + ("[..., None]" if len(latent) == 3 else "")  # a picture is one plane
    call = "$lambda x, timesteps, context=None: @unet(x, timesteps"
    call += ", class_labels=torch.tensor([@class_label] * len(x), device=x.device))" if classes else ")"
    return {
        **HEAD,
        "saver": HEAD["saver"] | {"squeeze_end_dims": len(latent) == 4},
        **network("autoencoder", autoencoder),
        **network("unet", unet),
        **({"class_label": 0} if classes else {}),
        "denoiser": call,
        "steps": min(steps, kernel.num_timesteps),
        "affine": four_by_four(centred_affine(spec.size, spec.spacing)).tolist(),
        "noise": f"$torch.randn({[1, *latent]}).to(@device)",
        "noise_scheduler": scheduler,
        "set_timesteps": f"$@noise_scheduler.set_timesteps(@steps, {more})".replace(", )", ")"),
        "inferer": {
            "_target_": "monai.inferers.LatentDiffusionInferer",
            "scheduler": "@noise_scheduler",
            "scale_factor": 1.0,
        },
        "sample": "$@inferer.sample(@noise, @autoencoder, @denoiser, verbose=False)",
        "run": [
            *("$@load_autoencoder", "$@load_unet", "$@autoencoder", "$@unet", "$@set_timesteps"),
            f"$@saver(monai.data.MetaTensor({volume}, torch.tensor(@affine)))",
        ],
    }


# --- export -------------------------------------------------------------------------------------------------


def discriminator_part(
    pipeline: AutoencoderPipeline,
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], list[str]]:
    """What a bundle holds of the discriminator of a run: (entries of inference.json, weights by name, what a
    user should know)."""
    net = discriminator_of(pipeline)
    if net is None:
        return {}, {}, []
    try:
        entries = network("discriminator", describe(net, "monai"))
    except InputError as e:
        return {}, {}, [f"the discriminator is left out: {e}"]
    low, high = net.config.image_range
    note = f"intensities that the discriminator sees: {low:g} to {high:g}"
    return entries, {"discriminator": foreign_state(net, "monai")}, [note]


def export_monai(pipeline: Pipeline, config: ExportConfig, folder: Path) -> list[str]:
    """Write a bundle. Returns what a user should know, in lines."""
    states: dict[str, dict[str, Tensor]] = {}
    notes: list[str] = []
    if isinstance(pipeline, LatentDiffusionPipeline):
        model = pipeline.model
        net = model.autoencoder
        autoencoder, unet = describe(net, config.as_), describe(model.denoiser, "monai")
        inference = sampling_bundle(pipeline, autoencoder, unet, config.steps)
        statistics = (value.flatten().cpu() for value in (model.latent_mean, model.latent_std))
        net = with_normalised_latents(net, *statistics)
        states["unet"] = foreign_state(model.denoiser, "monai")
        notes.append("latent_mean and latent_std are folded into the autoencoder; scale_factor is 1")
        if model.kernel.config.process == "flow":
            for name in ("out.2.conv.weight", "out.2.conv.bias"):
                states["unet"][name] = -states["unet"][name]
            notes.append("the U-Net predicts x_start - noise, MONAI's sign, where ours predicts the opposite")
        if unet_conditions(model.denoiser):
            notes.append("MONAI has no absent class: its row is left out")
        if model.denoiser.control is not None:
            control = with_own_classes(model.denoiser)
            inference |= network("controlnet", describe(control, "monai"))
            states["controlnet"] = foreign_state(control, "monai")
            notes.append("inference.json samples without a map; the ControlNet's is as fine as the latent")
    else:
        net = pipeline.net
        autoencoder = describe(net, config.as_)
        inference = reconstruction_bundle(pipeline, autoencoder)
        entries, part, lines = discriminator_part(pipeline)
        inference, states, notes = inference | entries, states | part, notes + lines
    states["autoencoder"] = foreign_state(net, config.as_)
    low, high = net.config.image_range
    notes.append(f"intensities within the networks: {low:g} to {high:g}")
    for name in ("configs", "models", "images"):
        (folder / name).mkdir(parents=True)
    for name, state in states.items():
        torch.save(state, folder / "models" / f"{name}.pt")
    write_text(folder / "configs" / "inference.json", json.dumps(inference, indent=1) + "\n")
    metadata = {"version": "0.1.0", "task": "exported by ldm3d", "monai_version": "1.5", "notes": notes}
    write_text(folder / "configs" / "metadata.json", json.dumps(metadata, indent=1) + "\n")
    return notes


def export_diffusers(pipeline: Pipeline, folder: Path) -> list[str]:
    """Write what diffusers' AutoencoderKL.from_pretrained reads."""
    if not isinstance(pipeline, AutoencoderPipeline):
        raise InputError(f"as: diffusers: takes autoencoders, {pipeline.run} is another run")
    description = describe(pipeline.net, "diffusers")
    content = {"_class_name": "AutoencoderKL", **description.arguments}
    folder.mkdir(parents=True)
    write_safetensors(
        folder / "diffusion_pytorch_model.safetensors", foreign_state(pipeline.net, "diffusers")
    )
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")
    low, high = pipeline.net.config.image_range
    return [f"intensities within the network: {low:g} to {high:g}"]


def export_run(config: ExportConfig, run: str) -> Path:
    """Export a run of train_vae.py or train_ldm.py into a new folder."""
    if config.to is None:
        raise InputError("to: which folder? give a new one, such as --to exported")
    folder = Path(config.to)
    if is_occupied(folder):
        raise InputError(f"to: {folder} is there already, expected a new folder")
    pipeline = load(run)
    if not isinstance(pipeline, (AutoencoderPipeline, LatentDiffusionPipeline)):
        raise InputError(f"{run}: a segmentation run has no counterpart in other libraries")
    if config.as_ in ("torch_export", "torchscript", "onnx"):
        notes = export_decoder(pipeline, config.as_, folder)
    elif config.as_ == "diffusers":
        notes = export_diffusers(pipeline, folder)
    else:
        notes = export_monai(pipeline, config, folder)
    print0("\n".join([f"{folder}: exported as {config.as_}", *(f"    {note}" for note in notes)]))
    if config.as_ in ("monai", "maisi"):
        bundle = f"--config_file {folder}/configs/inference.json --bundle_root {folder}"
        print0(f"next, where MONAI is installed: python -m monai.bundle run {bundle}")
    return folder
