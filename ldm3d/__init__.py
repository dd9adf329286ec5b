"""ldm3d: latent diffusion for 3-D and 2-D medical images in pure PyTorch."""

from .conditions import Condition, ConditionConfig
from .config import InputError
from .data import DataConfig, VolumeDataset
from .denoiser import Denoiser
from .diffusion_kernel import DiffusionKernel, KernelConfig
from .discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from .editing import ImageEdit, Interpolation
from .guidance import Guidance
from .latent_diffusion import LatentDiffusion
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL, VAEConfig
from .volumes import Volume, read, write
from .vqvae import VQVAE, QuantizerConfig

__version__ = "0.1.0"

__all__ = [
    "VQVAE",
    "AutoencoderKL",
    "Condition",
    "ConditionConfig",
    "DataConfig",
    "Denoiser",
    "DiffusionKernel",
    "Guidance",
    "ImageEdit",
    "InputError",
    "Interpolation",
    "KernelConfig",
    "LatentDiffusion",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "QuantizerConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "Volume",
    "VolumeDataset",
    "read",
    "write",
]
