"""Import weights of another library: one file in, one of our networks or an ordinary run folder out.

    file -> tensors (files.py) -> family and configuration (families.py, bundles.py) -> our network, filled by
    the tables of layouts.py -> run folder

    python -m ldm3d.interop import autoencoder.pt --to runs/vae-theirs
    python -m ldm3d.interop import model.pt --config inference.json --to runs/vae-theirs
    python -m ldm3d.interop import unet.pt --head_channels 0,64,64 --vae runs/vae-theirs --to runs/ldm-theirs

Nothing is guessed in silence. The report, which import.json in the run folder repeats, says what the shapes
told, what was given, what was assumed because it is usual in that library, and which tensors were dropped. A
tensor that is missing, or left over, is an error.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..conditions import Condition, ConditionConfig
from ..config import InputError, at_least, convert, field_types, from_dict, read_json, to_dict
from ..control import ControlNet
from ..data import DataConfig, DataSpec
from ..denoiser import Denoiser
from ..diffusion_kernel import KernelConfig
from ..discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ..engine.checkpoint import is_occupied, load_run, save, weights, write_text
from ..engine.distributed import print0
from ..engine.logger import plural
from ..pipeline import copy_autoencoder, load_autoencoder
from ..unet import UNetConfig
from ..vae import Autoencoder, AutoencoderKL, VAEConfig
from ..vqvae import VQVAE, QuantizerConfig
from .bundles import FACTORS, STATISTICS, Described, check_agreement, kernels_of, read_description
from .families import (
    Family,
    configuration,
    recognise,
    rewrite,
    with_identity_projections,
    with_zero_biases,
    without_batch_norm,
)
from .files import read_weights
from .layouts import EMBEDDINGS, NUMBERS, fill
from .peers import build, compare, describe

# --- Config -------------------------------------------------------------------------------------------------

HINTS = ("num_groups", "gn_eps", "head_channels", "upsample", "image_range")  # what shapes cannot tell


ASSUMED_KERNEL = KernelConfig(process="vp", prediction="eps")


@dataclass(frozen=True)
class ImportConfig:
    to: str | None = None  # new run folder, such as runs/vae-theirs
    config: str | None = None  # JSON file that came with the weights: of a MONAI bundle, or diffusers'
    num_groups: int | None = None  # groups of the norms; none = as --config says, else the usual 32
    gn_eps: float | None = None  # epsilon of the norms; none = as --config says, else the usual 1e-6
    head_channels: int | tuple[int, ...] | None = None  # width of attention heads; none = as --config says
    upsample: Literal["nearest", "trilinear", "deconv2", "deconv3"] | None = None  # none = as usual
    image_range: tuple[float, float] | None = None  # intensities that the autoencoder was trained on
    scale_factor: float | None = None  # of latents; none = as file or --config says, else 1 (U-Nets)
    shift_factor: float | None = None  # of latents, subtracted before; none = as --config says, else 0
    check: bool = False  # compare with the network of the other library (needs MONAI) on random input
    spacing: tuple[float, ...] | None = None  # mm, of the images it was trained on; none = keep their voxels
    size: tuple[int, ...] | None = None  # voxels of samples; none = 64 along every axis
    scaling: Literal["percentile", "window", "minmax", "zscore", "none"] = "percentile"  # of own images
    window: tuple[float, float] = (0.0, 255.0)  # values, e.g. HU, that become -1 and 1 (scaling window)
    vae: str | None = None  # run of the autoencoder that a U-Net belongs to
    kernel: KernelConfig = ASSUMED_KERNEL  # how the U-Net was trained

    @staticmethod
    def defaults(flags: dict[str, Any]) -> ImportConfig:
        """The diffusion is the one that --config describes, where no flag says otherwise."""
        types, file = field_types(KernelConfig), flags.get("config")
        given = {key.removeprefix("kernel."): v for key, v in flags.items() if key.startswith("kernel.")}
        given = {name: convert(value, types[name], f"kernel.{name}") for name, value in given.items()}
        kernels = kernels_of(file) if file and Path(file).is_file() else []  # else opening it says so
        found = [from_dict(KernelConfig, kernel | given, f"{file}: kernel") for kernel in kernels]
        if found and all(kernel == found[0] for kernel in found):
            return ImportConfig(kernel=found[0])
        if found and (given or "vae" in flags):  # a U-Net; of an autoencoder the diffusion says nothing
            ask_for("kernel", {"kernel": " and ".join(str(kernel | given) for kernel in kernels)})
        return ImportConfig()

    def __post_init__(self) -> None:
        at_least(self, 1, "num_groups")
        if self.scale_factor is not None and not 0 < self.scale_factor < float("inf"):
            raise InputError(f"scale_factor: expected a number above 0, got {self.scale_factor}")


Network = Autoencoder | Denoiser | ControlNet | PatchDiscriminator


@dataclass(frozen=True)
class Report:
    """Where every setting of an imported network comes from."""

    file: str
    family: str
    weights: int
    inferred: dict[str, Any]  # from the shapes of the tensors
    given: dict[str, Any]  # by a flag or the configuration file
    assumed: dict[str, Any]  # usual in the library
    dropped: dict[str, int]  # why tensors were left out -> how many
    facts: dict[str, Any]  # what stood beside the weights, such as scale_factor

    def lines(self) -> list[str]:
        rows = {
            "from the shapes": self.inferred,
            "given": self.given,
            "assumed": self.assumed,
            "dropped": {f"{what} ({num} tensors)": "" for what, num in self.dropped.items()},
            "beside the weights": self.facts,
        }
        head = f"{self.file}: {self.family}, {self.weights:,} weights"
        texts = {name: ", ".join(f"{k} {v}".strip() for k, v in row.items()) for name, row in rows.items()}
        return [head, *(f"    {name + ':':<20}{text or 'nothing'}" for name, text in texts.items())]


@dataclass(frozen=True)
class Imported:
    net: Network
    family: Family
    report: Report
    state: dict[str, Tensor]  # the weights as the newest class of that library names them
    unclear: dict[str, str]  # `Described.unclear`


# --- network ------------------------------------------------------------------------------------------------


def ask_for(name: str, unclear: dict[str, str]) -> None:
    """InputError if the configuration file leaves open what it says of this setting."""
    if name in unclear:
        raise InputError(f"{name}: the configuration file says {unclear[name]}; give the value with --{name}")


def norm_of(
    family: Family, inferred: dict[str, Any], flags: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hints_of` a discriminator: instance norms have no weights, so only a bias of convolutions tells that
    there are none."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        if name != "norm" or "norm" in inferred:
            raise InputError(f"{name}: has no effect, {where} holds a {family.name}")
    return given, family.usual if "norm" not in given and "norm" not in inferred else {}


def hints_of(
    family: Family, inferred: dict[str, Any], described: Described, flags: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What shapes cannot tell: (given, assumed). A flag counts more than the configuration file."""
    if family.kind == "discriminator":
        return norm_of(family, inferred, flags, where)
    settings = VAEConfig if family.kind == "autoencoder" else UNetConfig
    types = field_types(settings)
    if family.layout == "monai_vq":
        types = {"image_range": types["image_range"], **field_types(QuantizerConfig)}
    hints = [name for name in (*HINTS, "decay", "commitment_weight") if name in types]
    for name in hints:
        if flags.get(name) is None and name not in inferred:
            ask_for(name, described.unclear)
    told = {k: v for k, v in (described.settings | described.facts).items() if k in hints}
    if told.get("upsample") == "deconv":  # MONAI's kernel is 2, which shows in the shapes; the others' is 3
        told["upsample"] = inferred.get("upsample", "deconv3")
    given = told | {k: v for k, v in flags.items() if v is not None}
    for name in ("num_groups", "gn_eps"):
        if isinstance(given.get(name), list):
            raise InputError(f"{where}: {name}: expected one number, got {given[name]}")
    if "upsample" in inferred and given.get("upsample", inferred["upsample"]) != inferred["upsample"]:
        raise InputError(
            f"upsample: got {given['upsample']}, but {where} has weights of {inferred['upsample']}"
        )
    for name in given:
        if name not in types:
            raise InputError(f"{name}: has no effect, {where} holds a {family.name}")
    given = {name: convert(value, types[name], name) for name, value in given.items()}
    assumed = {k: v for k, v in family.usual.items() if k not in given and k not in inferred}
    groups = (assumed | given).get("num_groups", 1)
    if any(width % groups for width in inferred["channels"]):
        raise InputError(
            f"num_groups: {where} has levels of {inferred['channels']} channels, which {groups} groups of "
            "norms do not divide; give the number with --num_groups or --config"
        )
    if family.kind != "autoencoder" and "head_channels" not in given:
        raise InputError(
            f"head_channels: the weights of {where} do not tell the width of attention heads; give it with "
            "--head_channels (MONAI: num_head_channels) or --config"
        )
    return given, assumed


def open_weights(file: str | Path, config: str | Path | None = None, **flags: Any) -> Imported:
    """The network that a file of another library holds. flags: the settings HINTS, where they are known."""
    source, where = read_weights(file), str(file)
    family = recognise(source.tensors, where)
    state, unused = rewrite(source.tensors, family, where)
    if family.kind in ("unet", "controlnet"):
        state = with_identity_projections(state)
    folded = 0
    if family.kind == "discriminator":
        state, folded = without_batch_norm(state, where)
    theirs = source.tensors if family.name == "MAISI autoencoder" else state
    inferred = family.fixed | configuration(state, family, where)
    described = read_description(config, family.classes) if config else Described({}, {}, {})
    check_agreement(described.settings, inferred, str(config))
    given, assumed = hints_of(family, inferred, described, flags, where)
    settings = inferred | assumed | given
    if family.layout == "monai_vq":
        quantizer = {name: settings.pop(name) for name in field_types(QuantizerConfig) if name in settings}
        net: Network = VQVAE(from_dict(VAEConfig, settings), from_dict(QuantizerConfig, quantizer))
    elif family.kind == "controlnet":
        names = ("map_channels", "embedding_channels", "num_classes")
        arguments = [settings.pop(name) for name in names]
        net = ControlNet(from_dict(UNetConfig, settings), *arguments)
    elif family.kind == "discriminator":
        net = PatchDiscriminator(from_dict(PatchDiscriminatorConfig, settings))
        state = with_zero_biases(state) if net.config.norm == "none" else state
    elif family.kind == "autoencoder":
        if settings.get("upsample", "").startswith("deconv"):
            state = {name.replace(".postconv.conv.", ".deconv."): value for name, value in state.items()}
        net = AutoencoderKL(from_dict(VAEConfig, settings))
    else:
        net, state = make_denoiser(from_dict(UNetConfig, settings), state, where)
    fill(net, state, family.layout, where)
    dropped = dict(source.dropped)
    if unused:
        dropped["proj_attn, stored and never applied"] = len(unused)
    if folded:
        dropped["batch norms, folded into convolutions"] = folded
    beside = {k: number(v) for k, v in source.beside.items() if number(v) is not None}
    report = Report(
        *(where, family.name, sum(p.numel() for p in net.parameters()), inferred, given, assumed, dropped),
        {**beside, **described.facts},
    )
    return Imported(net.eval().requires_grad_(False), family, report, theirs, described.unclear)


def number(value: Any) -> float | None:
    """A single number that stood beside weights; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def conditions_of(state: dict[str, Tensor], dims: int) -> list[Condition]:
    """The conditions of a U-Net: a class, and MAISI's numbers, which its network receives times 100."""
    found = []
    if (table := state.get("class_embedding.weight")) is not None:
        found.append(Condition("class", "class", tuple(map(str, range(len(table))))))
    for name in NUMBERS:
        if (weight := state.get(f"{EMBEDDINGS[name]}.0.weight")) is not None:
            num = weight.shape[-1]
            kind = "spacing" if name == "spacing" and num == dims else "number"
            found.append(Condition(kind, name, mean=(0.0,) * num, std=(0.01,) * num))
    return found


def make_denoiser(
    config: UNetConfig, state: dict[str, Tensor], where: str
) -> tuple[Denoiser, dict[str, Tensor]]:
    """A denoiser for the weights of a U-Net, and the state with a row for the absent class, zeros."""
    conditions = conditions_of(state, config.dims)
    if not conditions:
        return Denoiser(config), state
    if config.context_dim is not None:
        raise InputError(f"{where}: a U-Net with conditions and a context at once is not supported")
    numbers = tuple(c.name for c in conditions if c.kind != "class")
    use = tuple(f"number:{c.name}" if c.kind == "number" else c.kind for c in conditions)
    net = Denoiser(config, ConditionConfig(use=use, concat=numbers), conditions)
    if (table := state.get("class_embedding.weight")) is not None:
        null = torch.zeros(1, *table.shape[1:])
        state = state | {"class_embedding.weight": torch.cat([table, null])}
    return net, state


def load(file: str | Path, config: str | Path | None = None, **hints: Any) -> Network:
    """The network in a file of another library, frozen and in eval mode on the CPU.

    An autoencoder takes and gives intensities in [-1, 1], whatever range it was trained on (`image_range`). A
    U-Net comes as a Denoiser: net(x_t, t), net(x_t, t, {"class": ...}) or net(x_t, t, Conditioned(context)).
    A ControlNet's residuals go to a U-Net: unet.features(x_t, t, residuals=net(x_t, t, net.embedding(map))).
    hints: what shapes cannot tell, such as num_groups=16 or head_channels=64; norm="none" (discriminators).
    """
    return open_weights(file, config, **hints).net


# --- run folder ---------------------------------------------------------------------------------------------


def check_against_peer(imported: Imported) -> str:
    """Compare with the network of the other library: one line. InputError if the outputs differ."""
    library = imported.family.library
    if library is None:
        return f"check: no package here makes the network of a {imported.family.name}; nothing was compared"
    try:
        description = describe(imported.net, library)
    except InputError as e:
        return f"check: {e}; nothing was compared"
    error = compare(imported.net, build(description, imported.state))
    if not error <= 1e-4:
        raise InputError(f"check: the outputs differ from those of {description.target} by {error:.1e}")
    return f"check: outputs as those of {description.target}, largest relative error {error:.1e}"


def data_settings(config: ImportConfig, dims: int, multiple: tuple[int, ...]) -> DataConfig:
    """How images are read for the network: as the flags say."""
    size = config.size or tuple(-(-64 // m) * m for m in multiple)
    return DataConfig(
        dims=dims, spacing=config.spacing, size=size, scaling=config.scaling, window=config.window
    )


def spec_of(data: DataConfig, channels: int) -> DataSpec:
    """What a run keeps of its training data, here only as far as it is known: nobody has the data."""
    low, high = data.window if data.scaling == "window" else (0.0, 1.0)
    return DataSpec(
        dims=data.dims,
        channels=channels,
        source_channels=0,
        size=data.size,
        spacing=data.spacing or (1.0,) * data.dims,
        orientation="RAS" if data.dims == 3 else None,
        scaling=data.scaling,
        low=(low,) * channels,
        high=(high,) * channels,
        source_low=(),
        source_high=(),
        num_labels=None,
        num_classes=None,
    )


NO_CASES: dict[str, list[str]] = {"train": [], "val": [], "test": []}


def autoencoder_content(config: ImportConfig, net: Autoencoder) -> dict[str, Any]:
    """The checkpoint of an imported autoencoder."""
    data = data_settings(config, net.config.dims, net.downsampling)
    settings = {"autoencoder": "kl", "data": to_dict(data), "vae": to_dict(net.config)}
    if isinstance(net, VQVAE):
        settings |= {"autoencoder": "vq", "quantizer": to_dict(net.quantizer.config)}
    state = {"data": spec_of(data, net.config.in_channels).to_dict(), "split": NO_CASES}
    return {"kind": "vae", "config": settings, "state": state}


def factors_of(vae: str | None) -> dict[str, Any]:
    """What the configuration file of an imported autoencoder told of the normalisation of latents."""
    path = Path(vae or ".") / "import.json"
    facts = read_json(path).get("facts", {}) if vae and path.is_file() else {}
    return {name: facts[name] for name in (*FACTORS.values(), *STATISTICS) if name in facts}


def latent_statistics(config: ImportConfig, facts: dict[str, Any], width: int) -> dict[str, Tensor]:
    """latent_mean and latent_std, (width,), of the latents that a U-Net was trained on.

    MONAI trains U-Nets on z * scale_factor, which is a latent_std of 1 / scale_factor and a latent_mean of 0;
    diffusers on (z - shift_factor) * scale_factor, or on (z - latents_mean) / latents_std * scale_factor.
    """
    shift = facts.get("shift_factor", 0.0) if config.shift_factor is None else config.shift_factor
    mean, std = torch.full((width,), float(shift)), torch.ones(width)
    given = [facts[name] for name in STATISTICS if name in facts]
    if given and config.shift_factor is None:
        given = [torch.tensor(convert(v, tuple[float, ...], " and ".join(STATISTICS))) for v in given]
        if [len(values) for values in given] != [width] * 2 or given[1].min() <= 0:
            raise InputError(f"{' and '.join(STATISTICS)}: expected {width} numbers each, the latter above 0")
        mean, std = given
    factor = config.scale_factor or facts.get("scale_factor", 1.0)
    return {"latent_mean": mean, "latent_std": std / factor}


def denoiser_content(config: ImportConfig, net: Denoiser, report: Report) -> dict[str, Any]:
    """The checkpoint of an imported U-Net, with the data settings of its autoencoder."""
    if config.vae is None:
        raise InputError("vae: a U-Net needs its autoencoder; import it first and give its run with --vae")
    autoencoder, content = load_autoencoder(config.vae)
    unet, width = net.arguments.unet, autoencoder.config.latent_channels
    if (unet.dims, unet.in_channels, unet.out_channels) != (autoencoder.config.dims, width, width):
        raise InputError(
            f"vae: {config.vae} has {width} latent channels on {autoencoder.config.dims} axes, {report.file} "
            f"takes {unet.in_channels} and gives {unet.out_channels} on {unet.dims}"
        )
    if unet.context_dim is not None:
        raise InputError(
            f"{report.file}: its context comes from another network, so no run folder can be made; "
            "ldm3d.interop.load(FILE) gives the network"
        )
    settings = {
        "data": content["config"]["data"],
        "unet": to_dict(unet),
        "kernel": to_dict(config.kernel),
        "condition": to_dict(net.arguments.condition or ConditionConfig()),
    }
    state = {
        "data": content["state"]["data"],
        "split": content["state"]["split"],
        "conditions": [c.to_dict() for c in net.conditions],
        **latent_statistics(config, report.facts, width),
    }
    return {"kind": "ldm", "config": settings, "state": state}


def expectations(content: dict[str, Any], assumed: list[str]) -> list[str]:
    """What the network expects of images and of diffusion, in words. assumed: what of it nothing tells."""
    data, spec = content["config"]["data"], content["state"]["data"]
    spacing = "as the files have it" if data["spacing"] is None else f"{tuple(data['spacing'])} mm"
    channels = plural(spec["channels"], "channel")
    lines = [f"    {'images:':<20}{channels}, scaling {data['scaling']}, spacing {spacing}"]
    if content["kind"] == "ldm":
        kernel, state = content["config"]["kernel"], content["state"]
        how = f"process {kernel['process']}, prediction {kernel['prediction']}, T {kernel['num_timesteps']}"
        if (clip := kernel["clip_x_start"]) is not None:
            how += f", estimates clamped to {clip:g}"
        factor, shift = (1 / state["latent_std"]).tolist(), state["latent_mean"].tolist()
        for name, values in (("scale_factor", factor), ("shift_factor", shift if any(shift) else [])):
            if values:
                how += f", {name} {', '.join(f'{v:g}' for v in dict.fromkeys(values))}"
        lines.append(f"    {'diffusion:':<20}{how}")
        if assumed:
            flags = "--kernel.*, --scale_factor or --config"
            lines.append(f"    note: {' and '.join(assumed)} assumed; {flags} says how it was trained")
    return lines


def import_file(config: ImportConfig, file: str) -> Path:
    """Import a file into a new run folder, and print where every setting comes from."""
    if config.to is None:
        raise InputError("to: which run folder? give a new one, such as --to runs/vae-theirs")
    if config.kernel is ASSUMED_KERNEL:  # neither a flag nor a caller said otherwise
        told = ImportConfig.defaults({name: v for name in ("config", "vae") if (v := getattr(config, name))})
        config = dataclasses.replace(config, kernel=told.kernel)
    folder = Path(config.to)
    if is_occupied(folder):
        raise InputError(f"to: {folder} is there already, expected a new folder")
    imported = open_weights(file, config.config, **{name: getattr(config, name) for name in HINTS})
    net, report = imported.net, imported.report
    if isinstance(net, (ControlNet, PatchDiscriminator)):
        use = "ldm3d.interop.load(FILE) gives the network"
        if isinstance(net, PatchDiscriminator):
            use += ", train_vae.py --disc_init FILE goes on with it"
        raise InputError(f"{file}: holds a {imported.family.name}, of which no run folder can be made; {use}")
    if isinstance(net, Denoiser):
        report = dataclasses.replace(report, facts=factors_of(config.vae) | report.facts)
    facts = report.facts
    if isinstance(net, Autoencoder) and config.spacing is None:
        ask_for("spacing", imported.unclear)
        if len(facts.get("spacing", ())) == net.config.dims:
            config = dataclasses.replace(config, spacing=facts["spacing"])
    if isinstance(net, Autoencoder):
        content = autoencoder_content(config, net)
    else:
        content = denoiser_content(config, net, report)
    assumed = ["the diffusion"] * (config.kernel == ASSUMED_KERNEL and "kernel" not in facts)
    assumed += ["scale_factor 1"] * (config.scale_factor is None and "scale_factor" not in facts)
    lines = report.lines() + expectations(content, assumed)
    if config.check:
        lines.append(check_against_peer(imported))
    if content["kind"] == "ldm" and config.kernel.prediction == "velocity":
        for parameter in net.unet.conv_out.parameters():  # MONAI's velocity is x_start - noise
            parameter.data.neg_()
        lines.append("    the sign of the last convolution is changed: MONAI's velocity is x_start - noise")
    settings = {"preset": "imported", "run": {"seed": 0}, **content["config"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps({"kind": content["kind"], **settings}, indent=1) + "\n")
        write_text(folder / "split.json", json.dumps(content["state"]["split"], indent=1) + "\n")
        write_text(folder / "import.json", json.dumps(to_dict(report), indent=1) + "\n")
    except OSError as e:
        raise InputError(f"to: {folder} cannot be written ({e.strerror})") from None
    whole = {"config": settings, "state": content["state"], "ema": weights(net), "step": 0, "best": None}
    save(folder / "best.pt", {"kind": content["kind"], **whole})
    if content["kind"] == "ldm":
        copy_autoencoder(load_run(config.vae, "vae"), folder)
    how = "FOLDER_OF_IMAGES" if content["kind"] == "vae" else "--num 4"
    print0(
        "\n".join([*lines, f"{folder}: a run folder, ready to use", f"next: python sample.py {folder} {how}"])
    )
    return folder
