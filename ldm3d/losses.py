"""Losses of the autoencoders: reconstruction, Kullback-Leibler, and a structural term that needs no download.

    reconstruction   mean |recon - x|  or  mean (recon - x)^2
    KL               KL(N(mean, exp(logvar)) || N(0, 1)) = (mean^2 + exp(logvar) - 1 - logvar) / 2
                     in nats per latent element, never clamped (Kingma & Welling 2014, appendix B)
    gradient         mean |D recon - D x|, D the difference of neighbours along an axis, at several scales: it
                     prices the edges that a mean error lets blur (compare Mathieu 2016, section 3.2)

Each is (B,), a mean over elements, so that a weight means the same for every size; the caller takes the mean
over the batch. Arithmetic is float32 whatever the precision of the networks (float64 for float64 inputs).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(recon: Tensor, x: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """(B,) mean absolute or squared difference of recon and x, both (B, C, *S)."""
    error = _full_precision(recon) - _full_precision(x)
    return (error.abs() if kind == "l1" else error.square()).flatten(1).mean(1)


def kl_per_element(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B,) KL of the posterior to the standard normal, in nats per latent element; inputs (B, C_z, *S)."""
    mean, logvar = _full_precision(mean), _full_precision(logvar)
    return (mean.square() + torch.expm1(logvar) - logvar).flatten(1).mean(1) / 2


def gradient_loss(recon: Tensor, x: Tensor, num_scales: int = 3) -> Tensor:
    """(B,) mean absolute difference of the gradients of recon and x (B, C, *S), over axes and scales.

    The gradient is per voxel of its scale. Each next scale averages pairs along the axes that are at least 4
    long; when none is, there are fewer scales. An axis of length 1 has no gradient.
    """
    error = _full_precision(recon) - _full_precision(x)  # D is linear: D recon - D x = D error
    pool = F.avg_pool3d if error.ndim == 5 else F.avg_pool2d
    terms = [error.new_zeros(error.shape[:1])] if max(error.shape[2:]) == 1 else []
    for _ in range(num_scales):
        axes = [axis for axis in range(2, error.ndim) if error.shape[axis] > 1]
        terms += [error.diff(dim=axis).abs().flatten(1).mean(1) for axis in axes]
        strides = [2 if size >= 4 else 1 for size in error.shape[2:]]
        if max(strides) == 1:
            break
        error = pool(error, strides, strides)
    return torch.stack(terms).mean(0)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
