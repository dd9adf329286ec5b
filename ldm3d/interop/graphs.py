"""The decoder of a run as one file that runs without this library: torch.export, TorchScript or ONNX.

A graph is what the decoder does with a latent, written down step by step. Latents may have any batch and any
size; the file says how many channels. The decoder of a latent diffusion run takes normalised latents, as the
denoiser makes them; that of an autoencoder takes latents as the encoder gives them.

    decoder = torch.export.load("exported/decoder.pt2").module();  x = decoder(z)
    decoder = torch.jit.load("exported/decoder.ts");  x = decoder(z)
    session = onnxruntime.InferenceSession("exported/decoder.onnx");  (x,) = session.run(None, {"z": z})

x (B, C, *S) are scaled intensities, -1 to 1. TorchScript is for programs that load models from C++ or run an
older PyTorch; PyTorch itself recommends torch.export.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError
from ..pipeline import AutoencoderPipeline, LatentDiffusionPipeline


class LatentDecoder(nn.Module):
    """z (B, C_z, *s) -> x (B, C, *S): z * std + mean, decoded."""

    def __init__(self, pipeline: AutoencoderPipeline | LatentDiffusionPipeline):
        super().__init__()
        latent = isinstance(pipeline, LatentDiffusionPipeline)
        self.autoencoder = pipeline.model.autoencoder if latent else pipeline.net
        self.register_buffer("mean", pipeline.model.latent_mean.clone() if latent else None)
        self.register_buffer("std", pipeline.model.latent_std.clone() if latent else None)

    def forward(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z if self.mean is None else z * self.std + self.mean)


def export_decoder(
    pipeline: AutoencoderPipeline | LatentDiffusionPipeline, kind: str, folder: Path
) -> list[str]:
    """Write decoder.pt2 ("torch_export"), decoder.ts ("torchscript") or decoder.onnx ("onnx"). Returns what a
    user should know."""
    decoder = LatentDecoder(pipeline).eval()
    config = decoder.autoencoder.config
    z = torch.zeros(2, config.latent_channels, *(5, 6, 7)[: config.dims])
    free = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {"z": {0: free} | {axis: free for axis in range(2, z.ndim)}}
    if kind == "onnx":
        try:
            import onnx  # noqa: F401 (torch.onnx needs both)
            import onnxscript  # noqa: F401
        except ImportError as e:
            raise InputError(f"as: onnx: needs the extra onnx (pip install onnx onnxscript; {e})") from None
    with warnings.catch_warnings():  # of deprecations within torch and its helpers
        warnings.simplefilter("ignore")
        if kind == "torchscript":  # a trace keeps no sizes: what follows from them is computed anew
            with torch.no_grad():
                graph = torch.jit.trace(decoder, z)
        else:
            graph = torch.export.export(decoder, (z,), dynamic_shapes=shapes)
        folder.mkdir(parents=True)
        if kind == "torchscript":
            torch.jit.save(graph, folder / "decoder.ts")
        elif kind == "torch_export":
            torch.export.save(graph, folder / "decoder.pt2")
        else:
            names = {"input_names": ["z"], "output_names": ["x"]}
            torch.onnx.export(
                graph, (z,), folder / "decoder.onnx", dynamo=True, verbose=False, external_data=False, **names
            )
    latents = "latents" if decoder.mean is None else "normalised latents"
    return [f"the decoder: {latents} (B, {config.latent_channels}, {config.dims} axes) to scaled intensities"]
