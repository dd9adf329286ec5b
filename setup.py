"""Packaging: the library, its scripts, and the optional extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VIZ = ["matplotlib", "tensorboard"]
FORMATS = ["SimpleITK", "imagecodecs"]
ONNX = ["onnx", "onnxscript"]
ANALYSIS = ["scikit-learn", "umap-learn", "plotly"]

setup(
    name="ldm3d",
    version=re.search(r'__version__ = "(.+)"', (HERE / "ldm3d/__init__.py").read_text())[1],
    description="Latent diffusion for 3-D and 2-D medical images in pure PyTorch",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ldm3d", "ldm3d.*"]),
    package_data={"ldm3d": ["py.typed"], "ldm3d.reports": ["*.css", "*.js"]},
    scripts=["train_vae.py", "train_ldm.py", "train_cdal.py", "sample.py"],
    install_requires=["torch>=2.6", "numpy", "nibabel", "tifffile", "tqdm"],
    extras_require={
        "viz": VIZ,
        "formats": FORMATS,
        "analysis": ANALYSIS,
        "onnx": ONNX,
        "test": [
            *VIZ,
            *FORMATS,
            *ANALYSIS,
            *ONNX,
            "pytest",
            "ruff",
            "scipy",
            "scikit-image",
            "monai",
            "einops",
            "diffusers",
            "onnxruntime",
        ],
    },
)
