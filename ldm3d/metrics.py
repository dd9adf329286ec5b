"""How near a volume is to another, a label map to another, a set of volumes to another; all in float64.

Two volumes x and y, one number a sample:

PSNR    = 10 log10(data_range^2 / mean((x - y)^2))                                                   in dB
SSIM    = mean over windows of l s       Wang et al. 2004 (IEEE Trans. Image Process. 13), eq. 13, with
            l = (2 m_x m_y + c1) / (m_x^2 + m_y^2 + c1)    c1 = (0.01 data_range)^2                ibid. eq. 6
            s = (2 v_xy + c2) / (v_xx + v_yy + c2)         c2 = (0.03 data_range)^2            ibid. eq. 9, 10
          m, v: means and sample (co)variances in the window
MS-SSIM = mean(l s at the coarsest scale)^w_M  prod_j mean(s at scale j)^w_j        Wang et al. 2003, eq. 7

Windows are uniform, as in scikit-image's default, and lie inside the volume. Published MS-SSIM mostly has
Gaussian windows of 11 voxels, so values of this MS-SSIM compare only with each other.

Two label maps, P the voxels of a label in the prediction and T those in the target, one number a label:

Dice    = 2 |P and T| / (|P| + |T|)        IoU = |P and T| / |P or T|
precision = |P and T| / |P|        sensitivity = |P and T| / |T|
HD95    = the 95th percentile of the distances (mm) from the surface voxels of one map to the surface of the
          other; of both directions the larger. A surface voxel has a neighbour (by a face) outside the label
          or outside the volume.

Two sets of volumes, given by their features x (N, F) and y (M, F):

Frechet distance = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))       Heusel et al. 2017 (1706.08500)
  The trace of the root is computed without a root. With C_x = A^T A and C_y = B^T B, the eigenvalues of
  C_x C_y are the squared singular values of A B^T, so the trace is the sum of these singular values.
kernel distance = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(a, b) = (a.b / F + 1)^3, unbiased: x and x' differ
                                                        Binkowski et al. 2018 (1801.01401), section 3
Neighbour scores, with a ball around every case that reaches its k-th nearest neighbour in its own set:
precision = share of y inside a ball of x,  recall = share of x inside a ball of y
                                                        Kynkaanniemi et al. 2019 (1904.06991)
density   = mean over y of the number of balls of x around it, / k       Naeem et al. 2020 (2002.09797), eq. 4
coverage  = share of the balls of x that hold a y                        ibid. eq. 5
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

SLAB = 2**22  # voxels of an image that psnr and ssim take at a time
SLAB_MAPS = 10  # maps of so many voxels, in float64, that ssim then holds at most


def _check(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}, expected equal ones")


def _slabs(x: Tensor, num: int) -> Iterator[tuple[int, int, float]]:
    """(start, stop, share of all) of parts of `num` positions along the first axis of x (B, C, *S)."""
    step = max(1, SLAB // max(1, x[:, :, :1].numel()))
    return (
        (start, min(start + step, num), (min(start + step, num) - start) / num)
        for start in range(0, num, step)
    )


def psnr(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of x and y (B, C, *S) in dB: (B,), inf where they are equal.

    data_range: largest minus smallest possible intensity, 2 for [-1, 1].
    """
    _check(x, y)
    mse = x.new_zeros(len(x), dtype=torch.float64)
    for start, stop, share in _slabs(x, x.shape[2]):
        off = x[:, :, start:stop].double() - y[:, :, start:stop].double()
        mse = mse + share * off.square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def _local_mean(x: Tensor, windows: Sequence[int]) -> Tensor:
    """Mean of x (B, C, *S) over every box of `windows` voxels that fits inside, axis by axis.

    avg_pool3d would do the same, but its gradient is not bit-exact on a GPU.
    """
    for axis, width in enumerate(windows, start=2):
        size = x.shape[axis] - width + 1
        x = sum(x.narrow(axis, i, size) for i in range(width)) / width
    return x


def halve(x: Tensor) -> Tensor:
    """Half the resolution of x (B, C, *S): means of pairs along every axis, an odd last voxel left out.

    Bit-exact on a GPU.
    """
    for axis in range(2, x.ndim):
        x = x.narrow(axis, 0, x.shape[axis] // 2 * 2).unflatten(axis, (-1, 2)).mean(axis + 1)
    return x


def _that_fits(window: int, size: int) -> int:
    """The largest odd width of a window along an axis, at most `window`."""
    return min(window, size - 1 + size % 2)


def _ssim_terms(x: Tensor, y: Tensor, data_range: float, window: int) -> tuple[Tensor, Tensor]:
    """l (luminance) and s (contrast and structure) of every window; SSIM is the mean of their product."""
    windows = [_that_fits(window, size) for size in x.shape[2:]]
    num = max(2, math.prod(windows))
    origin = x.flatten(2).mean(2).view(*x.shape[:2], *(1,) * (x.ndim - 2))
    mean_x, mean_y = _local_mean(x - origin, windows), _local_mean(y - origin, windows)
    unbiased = num / (num - 1)
    # Intensities are taken relative to the mean of x: squares of large ones leave no digits for the variances
    var_x = unbiased * (_local_mean((x - origin).square(), windows) - mean_x**2)
    var_y = unbiased * (_local_mean((y - origin).square(), windows) - mean_y**2)
    cov = unbiased * (_local_mean((x - origin) * (y - origin), windows) - mean_x * mean_y)
    mean_x, mean_y = mean_x + origin, mean_y + origin
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


def ssim(x: Tensor, y: Tensor, data_range: float, window: int = 7) -> Tensor:
    """Structural similarity of x and y (B, C, *S), mean over channels: (B,).

    window: an odd number of voxels; along a shorter axis the largest odd number that fits.
    """
    _check(x, y)
    more = _that_fits(window, x.shape[2]) - 1  # planes that the windows of a slab reach beyond it
    value = x.new_zeros(len(x), dtype=torch.float64)
    for start, stop, share in _slabs(x, x.shape[2] - more):
        parts = (v[:, :, start : stop + more].double() for v in (x, y))
        luminance, structure = _ssim_terms(*parts, data_range, window)
        value = value + share * (luminance * structure).flatten(1).mean(1)
    return value


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest first, Wang et al. 2003, section 3.2


def ms_ssim_weights(size: Sequence[int], window: int = 7) -> tuple[float, ...]:
    """Weights w_j of the scales of MS-SSIM for images of `size` voxels, finest first; they add up to 1.

    There are as many scales, from one to five, as leave a whole window along the shortest axis: three for
    30 x 41 voxels and a window of 7.
    """
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and min(size) // 2**scales >= window:
        scales += 1
    return tuple(w / sum(MS_SSIM_WEIGHTS[:scales]) for w in MS_SSIM_WEIGHTS[:scales])


def ms_ssim(
    x: Tensor, y: Tensor, data_range: float, window: int = 7, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Multi-scale structural similarity of x and y (B, C, *S), mean over channels: (B,), computed in `dtype`.

    Every scale has half the resolution of the scale before. 1 - ms_ssim(recon, x, 2.0, dtype=torch.float32)
    is a loss. A scale where recon and x have nothing in common gives no gradient.
    """
    _check(x, y)
    x, y = x.to(dtype), y.to(dtype)
    weights, value = ms_ssim_weights(x.shape[2:], window), 1.0
    for scale, weight in enumerate(weights):
        if scale > 0:
            x, y = halve(x), halve(y)
        luminance, structure = _ssim_terms(x, y, data_range, window)
        similarity = luminance * structure if scale == len(weights) - 1 else structure
        # A negative base has no real power, and at 0 the gradient of the power is infinite
        value = value * similarity.flatten(2).mean(2).clamp(min=1e-6) ** weight  # (B, C)
    return value.mean(1)


def _overlap(pred: Tensor, target: Tensor, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """|P and T|, |P| and |T| of every label but the background, each (B, num_labels - 1)."""
    _check(pred, target)
    pred, target = pred.flatten(1), target.flatten(1)
    counts = pred.new_zeros(3, len(pred), max(0, num_labels - 1), dtype=torch.float64)
    for i, part in enumerate((torch.where(pred == target, pred, -1), pred, target)):
        for label in range(1, num_labels):
            counts[i, :, label - 1] = (part == label).sum(1)
    return tuple(counts)


def dice(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """Dice of label maps (B, *S): (B, num_labels - 1), without background; nan if neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return 2 * both / (num_pred + num_target)


def precision(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """Share of a label's voxels in `pred` that are right: (B, num_labels - 1); nan where `pred` has none."""
    both, num_pred, _ = _overlap(pred, target, num_labels)
    return both / num_pred


def sensitivity(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """Share of a label's voxels in `target` that are found: (B, num_labels - 1); nan if there are none."""
    both, _, num_target = _overlap(pred, target, num_labels)
    return both / num_target


def iou(pred: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """IoU of label maps (B, *S): (B, num_labels - 1), without background; nan where neither has the label."""
    both, num_pred, num_target = _overlap(pred, target, num_labels)
    return both / (num_pred + num_target - both)


def near_labels(labels: Tensor, truth: Tensor, reach: int) -> Tensor:
    """The voxels (*S) bool within `reach` voxels, along each axis, of a label of either map (*S)."""
    near = (labels > 0) | (truth > 0)
    for axis, n in enumerate(near.shape):
        line = near.clone()
        for step in range(1, min(reach, n - 1) + 1):
            near.narrow(axis, step, n - step).logical_or_(line.narrow(axis, 0, n - step))
            near.narrow(axis, 0, n - step).logical_or_(line.narrow(axis, step, n - step))
    return near


def reliability_bins(p: Tensor, q: Tensor, num: int) -> Tensor:
    """What a reliability curve is drawn from: (3, num) float64, for each of `num` bins of p its voxels, and
    the sums of p and of q over them. p (N,): the probability of something at N voxels. q (N,): 1 where it is
    so, or the share of those who say so. Bins of several images add up."""
    which = (p * num).long().clamp(max=num - 1)
    sums = torch.ones_like(p), p, q
    return torch.stack([which.bincount(values, num) for values in sums])


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error (ECE), from `reliability_bins`: the mean over voxels of |mean p - mean
    q| of a voxel's bin. Guo et al. 2017, arXiv 1706.04599, eq. 3."""
    return float((bins[1] - bins[2]).abs().sum() / bins[0].sum().clamp(min=1))


def sharpness(x: Tensor) -> float:
    """Mean absolute difference of neighbouring voxels of x (B, C, *S), averaged over axes."""
    slopes = []
    for axis in (axis for axis in range(2, x.ndim) if x.shape[axis] > 1):
        more = int(axis == 2)  # the first plane of the next slab
        parts = ((x[:, :, a : b + more], share) for a, b, share in _slabs(x, x.shape[2] - more))
        slopes.append(sum(share * part.diff(dim=axis).abs().double().mean() for part, share in parts))
    return float(sum(slopes) / len(slopes))


def surface(mask: Tensor) -> Tensor:
    """The surface voxels of a boolean mask (*S), as a boolean mask (*S)."""
    inside = mask
    for axis in range(mask.ndim):
        edge = torch.zeros_like(mask.narrow(axis, 0, 1))
        padded = torch.cat([edge, mask, edge], dim=axis)
        n = mask.shape[axis]
        inside = inside & padded.narrow(axis, 0, n) & padded.narrow(axis, 2, n)
    return mask & ~inside


def nearest_distances(of: Tensor, to: Tensor, spacing: Sequence[float]) -> Tensor:
    """Exact distances (n,) in mm from every voxel of the mask `of` to the nearest voxel of the mask `to`.

    Both are boolean masks (*S) with 2 or 3 axes. All distances are inf if `to` is empty.

    Axis by axis d(i) = min over j of d(j) + (s (i - j))^2, where s is the spacing and d the squared distance
    along the axes so far: Felzenszwalb and Huttenlocher 2012 (Theory Comput. 8), section 2.
    """
    steps = torch.full(to.shape, math.inf)  # distance along the first axis, in voxels
    for order in (range(len(to)), reversed(range(len(to)))):
        since = torch.full(to.shape[1:], math.inf)
        for i in order:
            since = torch.where(to[i], 0.0, since + 1)
            steps[i] = torch.minimum(steps[i], since)
    line, found = torch.arange(to.shape[-1]), [torch.empty(0, dtype=torch.float64)]
    # The other axes plane by plane, and only for voxels of `of`: this needs little memory
    for wanted, plane in zip(of, steps, strict=True):
        if not wanted.any():
            continue
        squares = (spacing[0] * plane.double()).square()
        if squares.ndim == 2:
            some = squares.isfinite().any(0)
            squares[:, some] = _spread(squares[:, some], spacing[1])
        for voxels in wanted.nonzero().split(max(1, 2**20 // len(line))):
            along = (spacing[-1] * (voxels[:, -1:] - line).double()).square()
            found.append((squares[tuple(voxels[:, :-1].T)] + along).amin(1))
    return torch.cat(found).sqrt()


def _spread(squares: Tensor, s: float) -> Tensor:
    """min over j of squares[j] + (s (i - j))^2, for every i along the first axis of squares (n, lines)."""
    best = squares.clone()
    for k in range(1, len(best)):  # j = i + k and j = i - k
        step = (s * k) ** 2
        if (best <= step).all():  # nothing at k or more voxels can be nearer
            break
        torch.minimum(best[k:], squares[:-k] + step, out=best[k:])
        torch.minimum(best[:-k], squares[k:] + step, out=best[:-k])
    return best


def hd95(pred: Tensor, target: Tensor, num_labels: int, spacing: Sequence[float]) -> Tensor:
    """HD95 of label maps (B, *S) in mm: (B, num_labels - 1), without background 0, computed on the CPU.

    nan where neither map has the label, inf where only one has it. spacing: mm along each axis.
    """
    _check(pred, target)
    table = torch.empty(len(pred), num_labels - 1, dtype=torch.float64)
    for b, (p, t) in enumerate(zip(pred.cpu(), target.cpu(), strict=True)):
        for label in range(1, num_labels):
            a, c = surface(p == label), surface(t == label)
            if not a.any() or not c.any():
                table[b, label - 1] = math.inf if (a | c).any() else math.nan
                continue
            voxels = (a | c).nonzero()
            box = tuple(map(slice, voxels.amin(0).tolist(), (voxels.amax(0) + 1).tolist()))
            pairs = (a[box], c[box]), (c[box], a[box])
            directed = [nearest_distances(of, to, spacing).quantile(0.95) for of, to in pairs]
            table[b, label - 1] = max(directed)
    return table


def set_statistics(volumes: Iterable[Tensor]) -> dict[str, float]:
    """Simple numbers of a set of volumes (C, *S) in [-1, 1], to compare generated with real ones.

    mean and std of the intensities; sharpness; pair_ssim, the mean SSIM of each volume and the next one: the
    higher, the less varied is the set (nan for a single volume). No more than three volumes are held at once.
    """
    n, total, squares, slopes, pairs = 0, 0.0, 0.0, [], []
    first = last = None
    for x in (volume[None] for volume in volumes):
        for start, stop, _ in _slabs(x, x.shape[2]):
            part = x[:, :, start:stop].double()
            total, squares = total + float(part.sum()), squares + float(part.square().sum())
        n += x.numel()
        slopes.append(sharpness(x))
        pairs += [] if last is None else [float(ssim(last, x, data_range=2.0))]
        first, last = x if first is None else first, x
    if len(slopes) > 1:
        pairs.append(float(ssim(last, first, data_range=2.0)))
    return {
        "mean": total / n,
        "std": math.sqrt(max(0.0, squares - total**2 / n) / (n - 1)),
        "sharpness": sum(slopes) / len(slopes),
        "pair_ssim": sum(pairs) / len(pairs) if pairs else math.nan,
    }


# --- sets of features ---------------------------------------------------------------------------------------


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) of x (N, F), and a matrix A, at most F rows, with A^T A the sample covariance of x."""
    x = x.double()
    a = (x - x.mean(0)) / math.sqrt(max(1, len(x) - 1))
    return x.mean(0), torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features x (N, F) and y (M, F).

    Small sets have larger distances, so only distances of sets of equal sizes compare.
    """
    (mean_x, a), (mean_y, b) = _centred(x), _centred(y)
    root = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, distance.item())


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The kernel k(x_i, y_j) of the kernel distance: (N, M) values from features (N, F) and (M, F)."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(within_x: Tensor, within_y: Tensor, between: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy from kernel values (N, N), (M, M), (N, M).

    Sets of one distribution have 0 on average, so single values may be negative. nan if a set has one case.
    """

    def mean_of_pairs(k: Tensor) -> Tensor:
        return (
            (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) if len(k) > 1 else k.new_tensor(math.nan)
        )

    return (mean_of_pairs(within_x) + mean_of_pairs(within_y) - 2 * between.mean()).item()


def neighbour_scores(
    real: Tensor, generated: Tensor, between: Tensor, neighbours: int = 5
) -> dict[str, float]:
    """precision, recall, density and coverage of a generated set.

    From the distances within the real set (N, N), within the generated set (M, M) and from real to generated
    cases (N, M). All are nan if a set has no more cases than `neighbours`, the k of the module's formulas.
    """
    names = ("precision", "recall", "density", "coverage")
    if min(between.shape) <= neighbours:
        return dict.fromkeys(names, math.nan)
    # neighbours + 1: the smallest distance is 0, from a case to itself
    real_radius, generated_radius = (d.kthvalue(neighbours + 1, dim=1).values for d in (real, generated))
    in_real = between <= real_radius[:, None]  # (N, M)
    in_generated = between <= generated_radius[None]
    shares = (in_real.any(0), in_generated.any(1), in_real.double().sum(0) / neighbours, in_real.any(1))
    return {name: share.double().mean().item() for name, share in zip(names, shares, strict=True)}


# --- intensities and frequencies ----------------------------------------------------------------------------


def histogram_distance(p: Tensor, q: Tensor, width: float) -> float:
    """Wasserstein-1 distance of two histograms (..., bins), in the units of `width`, the width of a bin.

    A histogram holds the share of voxels in each bin. The distance is the mean over leading axes.
    """
    return float((p - q).double().cumsum(-1).abs().sum(-1).mean() * width)


def power_spectrum(x: Tensor, bins: int) -> Tensor:
    """Power of x (C, *S) in shells of equal width, from frequency 0 to 1/2 cycle per voxel: (C, bins) in dB.

    The mean of x is subtracted and the borders are faded out (Hann window), because mean and borders would
    leak into other shells. White noise of standard deviation s has a power of 20 log10 s in every shell.
    """
    size, over = x.shape[1:], tuple(range(1, x.ndim))
    x, radius = x.double() - x.double().mean(over, keepdim=True), torch.zeros(())
    for axis, n in enumerate(size):
        shape = [n if a == axis else 1 for a in range(len(size))]
        fade = torch.hann_window(n + 2, periodic=False, dtype=torch.float64, device=x.device)[1:-1]
        fade = fade / fade.square().mean().sqrt()  # the window keeps the mean power
        x = x * fade.view(shape)
        radius = radius + torch.fft.fftfreq(n, dtype=torch.float64).view(shape).square()
    power = torch.fft.fftn(x, dim=over).abs().square() / math.prod(size)
    # 1/2 cycle a voxel is `bins`. Rounded: 15/44 * 44 is 14.99... in floats, and belongs to shell 15
    shell = (radius.sqrt() * 2 * bins + 1e-9).to(torch.int64).flatten().to(x.device)
    inside = (shell < bins) & (torch.arange(shell.numel(), device=x.device) > 0)
    counts = torch.bincount(shell[inside], minlength=bins)
    sums = torch.stack([torch.bincount(shell[inside], c[inside], minlength=bins) for c in power.flatten(1)])
    return 10 * torch.log10((sums / counts.clamp(min=1)).clamp(min=1e-12))


def spectrum_distance(p: Tensor, q: Tensor) -> float:
    """Root mean square difference (dB) of two spectra (C, bins) over their shells, mean over channels."""
    return float((p - q).double().square().mean(-1).sqrt().mean())
