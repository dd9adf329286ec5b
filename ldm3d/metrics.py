"""How near a volume is to another, a label map to another, a set of volumes to another; all in float64.

Of two volumes, one number a sample:

PSNR    = 10 log10(data_range^2 / mean((x - y)^2))                                                   in dB
SSIM    = mean over windows of l s       Wang et al. 2004 (IEEE Trans. Image Process. 13), eq. 13, with
            l = (2 m_x m_y + c1) / (m_x^2 + m_y^2 + c1)    c1 = (0.01 data_range)^2                ibid. eq. 6
            s = (2 v_xy + c2) / (v_xx + v_yy + c2)         c2 = (0.03 data_range)^2            ibid. eq. 9, 10
          m, v: means and sample (co)variances in the window
MS-SSIM = mean(l s at the coarsest scale)^w_M  prod_j mean(s at scale j)^w_j        Wang et al. 2003, eq. 7
Dice    = 2 |P and T| / (|P| + |T|)        IoU = |P and T| / |P or T|                        for each label
precision = |P and T| / |P|        sensitivity = |P and T| / |T|                              for each label
HD95    = max over both directions of the 95th percentile of the distances from the voxels of one surface to
          the other surface, mm; a surface voxel has a neighbour (by a face) outside the label or the volume

Of two sets, given by features x (N, F) and y (M, F) of their volumes:
Frechet distance = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))       Heusel et al. 2017 (1706.08500)
  With C_x = A^T A, C_y = B^T B the eigenvalues of C_x C_y are the squared singular values of A B^T, whose sum
  is the trace that is wanted: no root of a matrix that is not symmetric.
kernel distance = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(a, b) = (a.b / F + 1)^3,  unbiased: over x != x'
                                                        Binkowski et al. 2018 (1801.01401), section 3
With B(x) the ball around x that reaches its k-th nearest neighbour in its own set:
precision, recall = share of y in a ball of x, of x in a ball of y       Kynkaanniemi et al. 2019 (1904.06991)
density  = mean over y of the number of balls of x around it / k         Naeem et al. 2020 (2002.09797), eq. 4
coverage = share of the balls of x that hold a y                         ibid. eq. 5

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
    counts = pred.new_zeros(3, len(pred), max(0, num_labels - 1), dtype=torch.float64)
    for i, part in enumerate((torch.where(pred == target, pred, -1), pred, target)):
        for label in range(1, num_labels):
            counts[i, :, label - 1] = (part == label).sum(1)
    return tuple(counts)


def dice(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) Dice of label maps (B, *S), background 0 left out; nan: neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return 2 * both / (num_pred + num_target)


def precision(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) share of a label's voxels in `pred` that are right; nan: it has none."""
    both, num_pred, _ = _overlap(pred, target, num_labels)
    return both / num_pred


def sensitivity(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) share of a label's voxels in `target` that are found; nan: it has none."""
    both, _, num_target = _overlap(pred, target, num_labels)
    return both / num_target


def iou(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """(B, num_labels - 1) IoU of label maps (B, *S), background 0 left out; nan: neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return both / (num_pred + num_target - both)


def sharpness(x: Tensor) -> float:
    """Mean absolute difference of neighbouring voxels of (B, C, *S), over all axes."""
    steps = [x.diff(dim=axis).abs().double().mean() for axis in range(2, x.ndim) if x.shape[axis] > 1]
    return float(sum(steps) / len(steps))


def surface(mask: Tensor) -> Tensor:
    """The surface voxels of a boolean mask (*S), as one."""
    inside = mask
    for axis in range(mask.ndim):
        edge = torch.zeros_like(mask.narrow(axis, 0, 1))
        padded = torch.cat([edge, mask, edge], dim=axis)
        n = mask.shape[axis]
        inside = inside & padded.narrow(axis, 0, n) & padded.narrow(axis, 2, n)
    return mask & ~inside


def nearest_distances(of: Tensor, to: Tensor, spacing: Sequence[float]) -> Tensor:
    """(n,) exact distances in mm from every voxel of `of` to the nearest one of `to`, boolean masks (*S) with
    2 or 3 axes; inf: `to` is empty.

    Axis by axis d(i) = min over j of d(j) + (s (i - j))^2, where d is the squared distance along the axes
    before: Felzenszwalb and Huttenlocher 2012 (Theory Comput. 8), section 2.
    """
    steps = torch.full(to.shape, math.inf)  # along the first axis, in voxels
    for order in (range(len(to)), reversed(range(len(to)))):
        since = torch.full(to.shape[1:], math.inf)
        for i in order:
            since = torch.where(to[i], 0.0, since + 1)
            steps[i] = torch.minimum(steps[i], since)
    line, found = torch.arange(to.shape[-1]), [torch.empty(0, dtype=torch.float64)]
    for wanted, plane in zip(of, steps, strict=True):  # the other axes where it matters, with little memory
        if not wanted.any():
            continue
        squares = (spacing[0] * plane.double()).square()
        if squares.ndim == 2:
            some = squares.isfinite().any(0)
            squares[:, some] = _spread(squares[:, some], spacing[1])
        for places in wanted.nonzero().split(max(1, 2**20 // len(line))):
            along = (spacing[-1] * (places[:, -1:] - line).double()).square()
            found.append((squares[tuple(places[:, :-1].T)] + along).amin(1))
    return torch.cat(found).sqrt()


def _spread(squares: Tensor, s: float) -> Tensor:
    """min over j of squares[j] + (s (i - j))^2 along the first axis of (n, lines), the nearest j first."""
    best = squares.clone()
    for k in range(1, len(best)):
        step = (s * k) ** 2
        if (best <= step).all():  # nothing that is k voxels away, or more, can be nearer
            break
        torch.minimum(best[k:], squares[:-k] + step, out=best[k:])
        torch.minimum(best[:-k], squares[k:] + step, out=best[:-k])
    return best


def hd95(pred: Tensor, target: Tensor, num_labels: int, spacing: Sequence[float]) -> Tensor:
    """(B, num_labels - 1) HD95 in mm of label maps (B, *S), on the CPU; nan: neither has the label, inf: one
    has not."""
    _check(pred, target)
    table = torch.empty(len(pred), num_labels - 1, dtype=torch.float64)
    for b, (p, t) in enumerate(zip(pred.cpu(), target.cpu(), strict=True)):
        for label in range(1, num_labels):
            a, c = surface(p == label), surface(t == label)
            if not a.any() or not c.any():
                table[b, label - 1] = math.inf if (a | c).any() else math.nan
                continue
            places = (a | c).nonzero()
            box = tuple(map(slice, places.amin(0).tolist(), (places.amax(0) + 1).tolist()))
            pairs = (a[box], c[box]), (c[box], a[box])
            directed = [nearest_distances(of, to, spacing).quantile(0.95) for of, to in pairs]
            table[b, label - 1] = max(directed)
    return table


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


# --- sets of features ---------------------------------------------------------------------------------------


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) of x (N, F), and a matrix A of at most F rows with A^T A its sample covariance."""
    x = x.double()
    a = (x - x.mean(0)) / math.sqrt(max(1, len(x) - 1))
    return x.mean(0), torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Of the Gaussians fitted to features (N, F) and (M, F). It grows as N and M fall: compare equal ones."""
    (mean_x, a), (mean_y, b) = _centred(x), _centred(y)
    root = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, distance.item())


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) values k(x_i, y_j) of features (N, F) and (M, F)."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(within_x: Tensor, within_y: Tensor, between: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy from kernel values (N, N), (M, M), (N, M).

    Equal distributions have 0 in the mean, so it may be negative. nan: a set of one case.
    """

    def mean_of_pairs(k: Tensor) -> Tensor:
        return (
            (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) if len(k) > 1 else k.new_tensor(math.nan)
        )

    return (mean_of_pairs(within_x) + mean_of_pairs(within_y) - 2 * between.mean()).item()


def neighbour_scores(
    real: Tensor, generated: Tensor, between: Tensor, neighbours: int = 5
) -> dict[str, float]:
    """precision, recall, density, coverage from distances (N, N), (M, M) and real to generated (N, M).

    nan where a set has no more cases than `neighbours`.
    """
    names = ("precision", "recall", "density", "coverage")
    if min(between.shape) <= neighbours:
        return dict.fromkeys(names, math.nan)
    # The nearest neighbour of all is the case itself, at distance 0
    real_radius, generated_radius = (d.kthvalue(neighbours + 1, dim=1).values for d in (real, generated))
    in_real = between <= real_radius[:, None]  # (N, M)
    in_generated = between <= generated_radius[None]
    shares = (in_real.any(0), in_generated.any(1), in_real.double().sum(0) / neighbours, in_real.any(1))
    return {name: share.double().mean().item() for name, share in zip(names, shares, strict=True)}


# --- intensities and frequencies ----------------------------------------------------------------------------


def histogram_distance(p: Tensor, q: Tensor, width: float) -> float:
    """Wasserstein-1 distance of two histograms (..., bins) of shares over bins of equal width, in its
    units."""
    return float((p - q).double().cumsum(-1).abs().sum(-1).mean() * width)


def power_spectrum(x: Tensor, bins: int) -> Tensor:
    """(C, bins) power in dB of x (C, *S) in shells of equal width of the frequency, from 0 to Nyquist's.

    Frequencies in cycles per voxel; their mean is taken away and the borders faded out (Hann), so that
    neither leaks. White noise of standard deviation s has 20 log10 s in every shell.
    """
    size, over = x.shape[1:], tuple(range(1, x.ndim))
    x, radius = x.double() - x.double().mean(over, keepdim=True), torch.zeros(())
    for axis, n in enumerate(size):
        shape = [n if a == axis else 1 for a in range(len(size))]
        fade = torch.hann_window(n + 2, periodic=False, dtype=torch.float64, device=x.device)[1:-1]
        fade = fade / fade.square().mean().sqrt()  # keeps the power
        x = x * fade.view(shape)
        radius = radius + torch.fft.fftfreq(n, dtype=torch.float64).view(shape).square()
    power = torch.fft.fftn(x, dim=over).abs().square() / math.prod(size)
    shell = (radius.sqrt() * 2 * bins).to(torch.int64).flatten().to(x.device)  # 1/2 is Nyquist's
    inside = (shell < bins) & (torch.arange(shell.numel(), device=x.device) > 0)
    counts = torch.bincount(shell[inside], minlength=bins)
    sums = torch.stack([torch.bincount(shell[inside], c[inside], minlength=bins) for c in power.flatten(1)])
    return 10 * torch.log10((sums / counts.clamp(min=1)).clamp(min=1e-12))


def spectrum_distance(p: Tensor, q: Tensor) -> float:
    """Root mean square difference (dB) of two spectra (C, bins) over their shells, mean over channels."""
    return float((p - q).double().square().mean(-1).sqrt().mean())
