"""ldm3d: latent diffusion for 3-D and 2-D medical images in pure PyTorch."""

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
from .guidance import Guidance
from .inference.editing import ImageEdit, Interpolation
from .inference.segmentation import load_segmenter
from .latent_diffusion import LatentDiffusion
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
    "load_segmenter",
    "read",
    "write",
]
