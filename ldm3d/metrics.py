"""How near a volume is to another, and a label map to another; one number a sample, computed in float64.

PSNR = 10 log10(data_range^2 / mean((x - y)^2))                                               in dB
SSIM = mean over windows of (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))
       m, s: means and sample (co)variances in a window, c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2
       (Wang et al. 2004, eq. 13; uniform windows as scikit-image's default, windows inside the volume only)
Dice = 2 |P and T| / (|P| + |T|)        IoU = |P and T| / |P or T|                            for each label
"""

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


def ssim(x: Tensor, y: Tensor, data_range: float, window: int = 7) -> Tensor:
    """(B,) structural similarity of (B, C, *S), mean over channels; the odd window shrinks on short axes."""
    _check(x, y)
    windows = [min(window, size - 1 + size % 2) for size in x.shape[2:]]
    num = max(2, int(torch.tensor(windows).prod()))

    def local_mean(v: Tensor) -> Tensor:
        for axis, width in enumerate(windows, start=2):
            v = v.unfold(axis, width, 1).mean(-1)
        return v

    x, y = x.double(), y.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    unbiased = num / (num - 1)
    var_x = unbiased * (local_mean(x * x) - mean_x**2)
    var_y = unbiased * (local_mean(y * y) - mean_y**2)
    cov = unbiased * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.flatten(1).mean(1)


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


def set_statistics(x: Tensor) -> dict[str, float]:
    """Plain numbers of a set of volumes (N, C, *S) in [-1, 1], to lay generated ones beside real ones.

    mean and std of the intensities; sharpness: mean absolute difference of neighbouring voxels; pair_ssim:
    mean SSIM of each volume and the next in the set, where a higher value means a less varied set (nan for
    one volume).
    """
    steps = [x.diff(dim=axis).abs().double().mean() for axis in range(2, x.ndim) if x.shape[axis] > 1]
    pairs = ssim(x, x.roll(1, 0), data_range=2.0).mean() if len(x) > 1 else float("nan")
    return {
        "mean": float(x.double().mean()),
        "std": float(x.double().std()),
        "sharpness": float(sum(steps) / len(steps)),
        "pair_ssim": float(pairs),
    }
