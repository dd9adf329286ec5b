"""How near a volume is to another, and a label map to another; one number a sample, computed in float64.

PSNR    = 10 log10(data_range^2 / mean((x - y)^2))                                                   in dB
SSIM    = mean over windows of l s       Wang et al. 2004 (IEEE Trans. Image Process. 13), eq. 13, with
            l = (2 m_x m_y + c1) / (m_x^2 + m_y^2 + c1)    c1 = (0.01 data_range)^2                ibid. eq. 6
            s = (2 v_xy + c2) / (v_xx + v_yy + c2)         c2 = (0.03 data_range)^2            ibid. eq. 9, 10
          m, v: means and sample (co)variances in the window
MS-SSIM = mean(l s at the coarsest scale)^w_M  prod_j mean(s at scale j)^w_j        Wang et al. 2003, eq. 7
Dice    = 2 |P and T| / (|P| + |T|)        IoU = |P and T| / |P or T|                        for each label

Windows are uniform, as scikit-image's default, and inside the volume only. Published MS-SSIM mostly has
Gaussian windows of 11 voxels: its figures compare within this library only, and are told with their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _check(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}, expected equal ones")


def psnr(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """(B,) peak signal-to-noise ratio (dB) of (B, C, *S), inf for equal ones; data_range: 2 for [-1, 1]."""
    _check(x, y)
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def _local_mean(x: Tensor, windows: Sequence[int]) -> Tensor:
    """Mean in the box of `windows` voxels around each voxel of (B, C, *S) where it fits, axis by axis.

    Not avg_pool3d, whose gradient is not bit-exact on a GPU.
    """
    for axis, width in enumerate(windows, start=2):
        size = x.shape[axis] - width + 1
        x = sum(x.narrow(axis, i, size) for i in range(width)) / width
    return x


def halve(x: Tensor) -> Tensor:
    """Means of 2 voxels along every axis of (B, C, *S); an odd last one is left out. Bit-exact on a GPU."""
    for axis in range(2, x.ndim):
        x = x.narrow(axis, 0, x.shape[axis] // 2 * 2).unflatten(axis, (-1, 2)).mean(axis + 1)
    return x


def _ssim_terms(x: Tensor, y: Tensor, data_range: float, window: int) -> tuple[Tensor, Tensor]:
    """(luminance, contrast and structure) of every window; SSIM is the mean of their product."""
    windows = [min(window, size - 1 + size % 2) for size in x.shape[2:]]
    num = max(2, math.prod(windows))
    origin = x.flatten(2).mean(2).view(*x.shape[:2], *(1,) * (x.ndim - 2))
    mean_x, mean_y = _local_mean(x - origin, windows), _local_mean(y - origin, windows)
    unbiased = num / (num - 1)
    # The origin is taken away first: squares of large intensities would leave no digits for the variances
    var_x = unbiased * (_local_mean((x - origin).square(), windows) - mean_x**2)
    var_y = unbiased * (_local_mean((y - origin).square(), windows) - mean_y**2)
    cov = unbiased * (_local_mean((x - origin) * (y - origin), windows) - mean_x * mean_y)
    mean_x, mean_y = mean_x + origin, mean_y + origin
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


def ssim(x: Tensor, y: Tensor, data_range: float, window: int = 7) -> Tensor:
    """(B,) structural similarity of (B, C, *S), mean over channels; the odd window shrinks on short axes."""
    _check(x, y)
    luminance, structure = _ssim_terms(x.double(), y.double(), data_range, window)
    return (luminance * structure).flatten(1).mean(1)


MS_SSIM_WEIGHTS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # finest scale first, Wang et al. 2003, section 3.2


def ms_ssim_weights(size: Sequence[int], window: int = 7) -> tuple[float, ...]:
    """The weights of as many scales, finest first, as leave a whole window along the shortest axis of `size`.

    At least one, five at most; they add up to 1.
    """
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and min(size) // 2**scales >= window:
        scales += 1
    return tuple(w / sum(MS_SSIM_WEIGHTS[:scales]) for w in MS_SSIM_WEIGHTS[:scales])


def ms_ssim(
    x: Tensor, y: Tensor, data_range: float, window: int = 7, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(B,) multi-scale structural similarity of (B, C, *S), mean over channels; `dtype` of the arithmetic.

    1 - ms_ssim(recon, x, 2.0, dtype=torch.float32) is a loss: it has gradients, those of a scale without any
    likeness apart. Every scale averages 2 voxels along each axis of the one before.
    """
    _check(x, y)
    x, y = x.to(dtype), y.to(dtype)
    weights, value = ms_ssim_weights(x.shape[2:], window), 1.0
    for scale, weight in enumerate(weights):
        if scale > 0:
            x, y = halve(x), halve(y)
        luminance, structure = _ssim_terms(x, y, data_range, window)
        similarity = luminance * structure if scale == len(weights) - 1 else structure
        # A power of something negative is not a number, and at 0 its gradient is not finite
        value = value * similarity.flatten(2).mean(2).clamp(min=1e-6) ** weight  # (B, C)
    return value.mean(1)


def _overlap(pred: Tensor, target: Tensor, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, num_labels - 1) counts of |P and T|, |P|, |T| for every label but the background."""
    _check(pred, target)
    pred, target = pred.flatten(1), target.flatten(1)
    counts = [
        torch.stack([(part == label).sum(1) for label in range(1, num_labels)], dim=1).double()
        for part in (torch.where(pred == target, pred, -1), pred, target)
    ]
    return counts[0], counts[1], counts[2]


def dice(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) Dice of label maps (B, *S), background 0 left out; nan: neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return 2 * both / (num_pred + num_target)


def iou(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) IoU of label maps (B, *S), background 0 left out; nan: neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return both / (num_pred + num_target - both)


def sharpness(x: Tensor) -> float:
    """Mean absolute difference of neighbouring voxels of (B, C, *S), over all axes."""
    steps = [x.diff(dim=axis).abs().double().mean() for axis in range(2, x.ndim) if x.shape[axis] > 1]
    return float(sum(steps) / len(steps))


def set_statistics(x: Tensor) -> dict[str, float]:
    """Plain numbers of a set of volumes (N, C, *S) in [-1, 1], to lay generated ones beside real ones.

    mean and std of the intensities; sharpness; pair_ssim: mean SSIM of each volume and the next in the set,
    where a higher value means a less varied set (nan for one volume).
    """
    pairs = ssim(x, x.roll(1, 0), data_range=2.0).mean() if len(x) > 1 else float("nan")
    return {
        "mean": float(x.double().mean()),
        "std": float(x.double().std()),
        "sharpness": sharpness(x),
        "pair_ssim": float(pairs),
    }
