"""The object in a mask: its largest connected part, holes, orientation, heights and widths.

Connected components (neighbours share a face): voxels in a row along the last axis form runs. Runs that touch
along another axis belong together. Each run points to a root, at first itself; in every round each root takes
the lowest root that it touches, until nothing changes (Shiloach & Vishkin 1982). So the work grows with the
number of runs, not of voxels.

Otsu's threshold (1979, IEEE Trans. SMC 9, eq. 12 to 14) divides a histogram into two classes with shares w_0,
w_1 and means m_0, m_1, so that the variance between them, w_0 w_1 (m_0 - m_1)^2, is greatest.

The orientation is given by the eigenvectors of the covariance of the voxels' positions (mm), longest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = (0.25, 0.5, 0.75)  # of the height, where widths are measured


def label_components(mask: np.ndarray) -> np.ndarray:
    """Components of a boolean mask (*S): 0 outside, 1, 2 ... in the order of their first voxels."""
    mask = np.asarray(mask, dtype=bool)
    starts = mask.copy()
    starts[..., 1:] &= ~mask[..., :-1]
    runs = np.cumsum(starts).reshape(mask.shape) * mask  # 0 outside, 1 ... R
    pairs = [np.zeros((0, 2), dtype=runs.dtype)]
    for axis in range(mask.ndim - 1):
        a, b = (
            runs.take(range(*ends), axis).ravel()
            for ends in ((0, mask.shape[axis] - 1), (1, mask.shape[axis]))
        )
        touching = (a > 0) & (b > 0)
        pairs.append(np.unique(np.stack([a[touching], b[touching]], axis=1), axis=0))
    pairs, root = np.concatenate(pairs), np.arange(int(starts.sum()) + 1)
    while True:
        ends = root[pairs]
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            break
        np.minimum.at(root, ends.max(1), ends.min(1))
        while (root != root[root]).any():
            root = root[root]
        pairs = ends
    return np.unique(root, return_inverse=True)[1].reshape(-1)[runs]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The connected part of a boolean mask (*S) with most voxels, the first of equal ones."""
    components = label_components(mask)
    counts = np.bincount(components.ravel())
    counts[0] = 0
    return components == counts.argmax() if counts.any() else np.zeros_like(components, dtype=bool)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask (*S) with its holes filled: a hole is background without a path to the border."""
    outside = label_components(~mask)
    borders = [outside.take(end, axis).ravel() for axis in range(mask.ndim) for end in (0, -1)]
    return mask | ~np.isin(outside, np.unique(np.concatenate(borders)))


def otsu_threshold(values: np.ndarray) -> float:
    """The value that divides `values` best into two classes, a centre of a bin; nan if all are equal."""
    if values.min() == values.max():
        return float("nan")
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[1:] + edges[:-1]) / 2
    low, total = np.cumsum(counts), counts.sum()  # in bins up to here
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sums / low - (sums[-1] - sums) / (total - low)
    between = low * (total - low) * np.nan_to_num(difference) ** 2
    best = between[:-1] >= between[:-1].max() * (1 - 1e-9)  # equal over an empty gap: take its middle
    return float(centres[:-1][best].mean())


def positions(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Where the voxels of a mask lie, (n, dims) mm."""
    return np.argwhere(mask) * np.asarray(spacing, dtype=np.float64)


def orientation(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centroid (dims,) mm of a mask (*S), its axes as rows (dims, dims), longest first, and the standard
    deviations (mm) along them."""
    points = positions(mask, spacing)
    centre = points.mean(0)
    values, vectors = np.linalg.eigh(np.cov((points - centre).T, bias=True))
    return centre, vectors.T[::-1], np.sqrt(values[::-1].clip(min=0))


def heights_and_widths(
    mask: np.ndarray, spacing: Sequence[float], axis: int, upright: bool = False
) -> dict[str, float]:
    """Height of an object along `axis`, and its widths along the other axes at 1/4, 1/2, 3/4 of the height.

    All in mm. upright: measure along the object's own axes, the longest as the height, so that a tilt does
    not count; accurate to about a voxel. Keys: height, width_25 ... in 2-D; width0_25 ... with the number of
    the axis in 3-D. nan for an empty mask.
    """
    others = [a for a in range(mask.ndim) if a != axis]
    names = ["width" if mask.ndim == 2 else f"width{a}" for a in others]
    keys = ["height", *(f"{name}_{round(100 * level)}" for name in names for level in LEVELS)]
    if not mask.any():
        return dict.fromkeys(keys, float("nan"))
    points, voxel = positions(mask, spacing), np.asarray(spacing, dtype=np.float64)
    if upright:
        _, axes, _ = orientation(mask, spacing)
        axes = np.stack([axes[0], *_nearest(axes[1:], others)])  # of the height, then of the widths
        points, voxel = points @ axes.T, np.abs(axes) @ voxel / np.abs(axes).sum(1)
    else:
        points, voxel = points[:, [axis, *others]], voxel[[axis, *others]]
    bottom, top = points[:, 0].min() - voxel[0] / 2, points[:, 0].max() + voxel[0] / 2
    found = {"height": float(top - bottom)}
    for column, name in enumerate(names, start=1):
        for level in LEVELS:
            away = np.abs(points[:, 0] - (bottom + level * (top - bottom)))
            slab = points[away <= 0.5001 * voxel[0], column]
            width = np.ptp(slab) + voxel[column] if len(slab) else 0.0
            found[f"{name}_{round(100 * level)}"] = float(width)
    return found


def _nearest(axes: np.ndarray, others: Sequence[int]) -> list[np.ndarray]:
    """The axes (rows), sorted by the array axis that each is nearest to."""
    rows = sorted(range(len(axes)), key=lambda r: int(np.abs(axes[r, list(others)]).argmax()))
    return [axes[r] for r in rows]


def rigid_between(
    moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float], rotate: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The rigid motion between two masks (*S): R (dims, dims) and t (dims,), mm.

    Position p in `fixed` corresponds to R p + t in `moving`. Centroids correspond and, if `rotate`, axes too,
    each in the direction that needs the smaller turn. There is no rotation for objects without clear axes
    (two standard deviations within 5 %), nor one above 45 degrees.
    """
    (centre, axes, spread), (target, wanted, reach) = (orientation(m, spacing) for m in (moving, fixed))
    turn = np.eye(fixed.ndim)
    clear = all((s[1:] < 0.95 * s[:-1]).all() for s in (spread, reach))
    if rotate and clear:
        signs = np.sign((axes * wanted).sum(1))
        candidate = (axes * np.where(signs == 0, 1, signs)[:, None]).T @ wanted
        angle = np.arccos(np.clip((np.trace(candidate) - fixed.ndim + 2) / 2, -1, 1))
        turn = candidate if np.linalg.det(candidate) > 0 and angle < np.pi / 4 else turn
    return turn, centre - turn @ target
