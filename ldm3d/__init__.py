"""ldm3d: latent diffusion for 3-D and 2-D medical images in pure PyTorch.

An autoencoder makes an image small, a diffusion model learns to generate such small images (latents), and the
decoder makes images of them. The modules that do this lie flat in this folder; what serves them lies in the
folders. README.md beside this file gives the order in which to read them.

    blocks, normconv                          what the networks are made of
    vae, vqvae, discriminators, losses        stage one: image <-> latent
    metrics                                   PSNR, SSIM and others, of batches
    diffusion_kernel, unet, denoiser          stage two: noise -> latent
    conditions, conditioner, guidance         what a sample shall show, and how strongly
    registers                                 learned tokens that stand for labels of a mask
    lora                                      low-rank adapters: fine-tuning with few weights
    control                                   a trained denoiser, frozen, learns to follow a map (ControlNet)
    latents, latent_diffusion                 the cache of latents; both stages as one model
    pipeline                                  a run folder opened for use: ldm3d.load(RUN)
    cdal                                      segmentation by diffusion
    plan                                      a folder of images -> the settings of a run
    config                                    settings: dataclass <-> JSON <-> command line

    data/         files to batches
    engine/       how training runs: processes, checkpoints, logs, the run folder
    large/        volumes larger than memory, or than in training
    inference/    what a trained run is used for: conditional samples, editing, segmentation
    evaluation/   figures of quality                     python -m ldm3d.evaluation
    reports/      pages and maps that show a run         python -m ldm3d.reports
    interop/      other libraries' weights, in and out   python -m ldm3d.interop

The names below are the ones to import; everything else is found in its module.
"""

from .cdal import CDAL, CDALConfig, Generator, GeneratorConfig
from .conditions import Condition, ConditionConfig
from .config import InputError
from .data import DataConfig, Volume, VolumeDataset, read, write
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .discriminators import (
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    TimeDiscriminator,
    TimeDiscriminatorConfig,
)
from .guidance import Autoguidance, Guidance
from .inference.editing import ImageEdit, Interpolation
from .latent_diffusion import LatentDiffusion
from .pipeline import load
from .registers import AnatomyConfig
from .unet import UNet, UNetConfig
from .vae import Autoencoder, AutoencoderKL, VAEConfig
from .vqvae import VQVAE, QuantizerConfig

__version__ = "0.1.0"

__all__ = [
    "CDAL",
    "VQVAE",
    "AnatomyConfig",
    "Autoencoder",
    "AutoencoderKL",
    "Autoguidance",
    "CDALConfig",
    "Condition",
    "ConditionConfig",
    "DataConfig",
    "Denoiser",
    "DiffusionKernel",
    "Generator",
    "GeneratorConfig",
    "Guidance",
    "ImageEdit",
    "InputError",
    "Interpolation",
    "KernelConfig",
    "LatentDiffusion",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "QuantizerConfig",
    "TimeDiscriminator",
    "TimeDiscriminatorConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "Volume",
    "VolumeDataset",
    "load",
    "read",
    "write",
]
