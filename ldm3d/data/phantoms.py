"""Synthetic heads, to try every part of the package without data of one's own.

A head has an image, a label map, a second image of another contrast, a class and a caption, all of one random
anatomy. So a test can check what a network has learned: a generated head that was asked for as "a small
lesion in the left hemisphere" can be measured. Nothing here is a model of disease.

A head is a list of shapes, painted one over the other from the outside in: skin, muscle, eyes, skull, fluid,
grey and white matter folded by a random field, cerebellum, ventricles, deep nuclei (missing in some heads)
and at most one lesion. A shape is a signed distance d in mm, negative inside. A shape is painted with

    coverage = clip(1/2 - distance / voxel, 0, 1)    a border is one voxel wide and smooth (partial volume)
    weights  = (1 - coverage) * weights;    weights[tissue] += coverage

and the image is the sum of the tissue weights times the values of `TISSUES`: one column for the T1-like
`image`, one for the T2-like `source`, so that `source` to `image` is a non-linear map of one anatomy. Then
come texture, a bias field, noise, and a gain that differs from head to head, as in files of real scanners. In
`image` only fat, outside the skull, is as bright as the lesion.
"""

import csv
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import tifffile

from ..config import InputError
from ..engine.distributed import is_main, main_first
from .volumes import centred_affine

LABEL_NAMES = ("background", "brain", "ventricles", "deep nuclei", "lesion")
DEFAULT_SIZE = {2: (112, 96), 3: (48, 56, 48)}
FIELD_OF_VIEW = {2: (224.0, 192.0), 3: (192.0, 224.0, 192.0)}  # mm; holds the head
SIDE_AXIS = {2: 1, 3: 0}  # the axis that grows to the patient's right: a 2-D column, the first of RAS
SMALL_RADIUS, LARGE_RADIUS = (9.0, 12.0), (18.0, 23.0)  # mm, of the lesion; `describe` divides at 15
TISSUES = {  # T1-like, T2-like
    "fat": (1.12, 0.80),
    "muscle": (0.42, 0.30),
    "skull": (0.06, 0.08),
    "fluid": (0.14, 1.10),
    "eye": (0.20, 1.10),
    "grey": (0.48, 0.66),
    "white": (0.78, 0.44),
    "nuclei": (0.56, 0.56),
    "lesion": (1.14, 0.90),
}
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Phantom:
    """One synthetic case."""

    image: np.ndarray  # (1, *S) float32, T1-like, scanner units (white matter 300 to 1200)
    mask: np.ndarray  # (1, *S) uint8, see LABEL_NAMES
    source: np.ndarray  # (1, *S) float32, T2-like, the same anatomy
    class_idx: int  # 0 no lesion, 1 lesion
    caption: str  # what `describe` says of the mask: "a large lesion in the left hemisphere", "no lesion"
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray  # (dims + 1, dims + 1), the centre of the field of view at 0 mm


def describe(lesion: np.ndarray, spacing: tuple[float, ...]) -> str:
    """Caption of a lesion, a boolean mask (*S); spacing in mm. Also judges a generated image, thresholded.

    A lesion counts from 40 % of the volume of the smallest lesion that is drawn. From the volume of a ball
    (2-D: disc) of radius 15 mm on it is large. The side is the side of its centroid.
    """
    dims, voxel = lesion.ndim, float(np.prod(spacing))
    ball = {2: np.pi, 3: 4 / 3 * np.pi}[dims]
    amount = float(lesion.sum()) * voxel
    if amount < 0.4 * ball * SMALL_RADIUS[0] ** dims:
        return "no lesion"
    axis = SIDE_AXIS[dims]
    side = "right" if np.nonzero(lesion)[axis].mean() > (lesion.shape[axis] - 1) / 2 else "left"
    return f"a {'large' if amount > ball * 15.0**dims else 'small'} lesion in the {side} hemisphere"


# --- fields and shapes ------------------------------------------------------------------------------------


def _field(
    rng: np.random.Generator, axes: list[np.ndarray], wavelength: float, num_waves: int = 20
) -> np.ndarray:
    """Smooth random field of unit variance on the grid of `axes` (mm): plane waves in random directions.

    exp(i k.p) is a product over the axes, so three thin matrices make the field.
    """
    direction = rng.standard_normal((num_waves, 3))
    k = 2 * np.pi / wavelength * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    k *= rng.uniform(0.75, 1.25, (num_waves, 1))
    phase = np.exp(2j * np.pi * rng.random((num_waves, 1)))
    x, y, z = (np.exp(1j * k[:, a, None] * axes[a]).astype(np.complex64) for a in range(3))  # (waves, n)
    yz = (phase.astype(np.complex64) * y)[:, :, None] * z[:, None, :]
    field = (x.T @ yz.reshape(num_waves, -1)).real.reshape(len(axes[0]), len(axes[1]), len(axes[2]))
    return field * np.float32(np.sqrt(2 / num_waves))


def _ellipsoid(p: list[np.ndarray], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Signed distance (mm) to an ellipsoid, to first order: right in sign and slope at its surface."""
    q = [(p[a] - np.float32(centre[a])) / np.float32(radii[a]) for a in range(3)]
    rho = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    slope = np.sqrt(sum((q[a] / np.float32(radii[a])) ** 2 for a in range(3)))
    return (rho - 1) * rho / np.maximum(slope, np.float32(1e-3) / np.float32(max(radii)))


def _brain(rng: np.random.Generator, p: list[np.ndarray], axes: list[np.ndarray], radii: np.ndarray) -> Pair:
    """Signed distances of (brain surface with its folds, white matter).

    Depth is the distance to the hull, to the folds near it (zeros of a random field f, about |f| / |grad f|
    away) or to the fissure between the hemispheres outside a central region, whichever is least.
    """
    hull = _ellipsoid(p, (0, 0, 0), tuple(radii))
    wavelength = rng.uniform(27, 33)
    folds = np.abs(_field(rng, axes, wavelength, 40)) * np.float32(wavelength / (2 * np.pi) * 1.2)
    centre = _ellipsoid(p, (0, -3, -2), tuple(radii * 0.55))
    depth = np.minimum(-hull, folds + np.maximum(-hull - rng.uniform(15, 20), 0))
    depth = np.minimum(depth, np.abs(p[0]) + 2 * np.maximum(-centre, 0) + np.maximum(-20 - p[2], 0))
    base = np.maximum(-38 - p[2], 0) * 0.8  # the brain ends above the skull base
    cortex = rng.uniform(4.2, 5.2)
    return np.float32(1.0) - depth + base, np.float32(cortex) - depth + base


def _hindbrain(rng: np.random.Generator, p: list[np.ndarray], axes: list[np.ndarray]) -> Pair:
    """Signed distances of (cerebellum and brain stem, their white matter)."""
    leaves = _field(rng, axes, 18.0, 24) * np.float32(2.2)
    cerebellum = _ellipsoid(p, (0, -44, -44), (42 * rng.uniform(0.9, 1.1), 28, 22 * rng.uniform(0.9, 1.1)))
    lean = p[1] + 8 - (p[2] + 40) * np.float32(0.25)
    stem = np.sqrt(p[0] ** 2 + lean**2) - (11 + np.clip(p[2] + 70, -12, 30) * np.float32(0.13))
    stem = np.maximum(stem, p[2] + 8)
    return np.minimum(cerebellum, stem), np.minimum(cerebellum + 6 + leaves, stem + 1.5)


def _ventricles(rng: np.random.Generator, p: list[np.ndarray]) -> np.ndarray:
    """Two lateral ventricles, bent outwards behind and downwards at both ends, and the narrow third one."""
    gap, width, height = rng.uniform(8, 12), rng.uniform(4.5, 9.5), rng.uniform(6, 10)
    length, bend = rng.uniform(27, 36), rng.uniform(0.004, 0.008)
    sides = []
    for sign in (-1, 1):
        x = p[0] - sign * (gap + np.float32(bend) * np.maximum(-p[1], 0) ** 2 * 2.2)
        z = p[2] - 10 + np.float32(bend) * p[1] ** 2
        own = rng.uniform(0.85, 1.15)
        sides.append(_ellipsoid([x, p[1], z], (0, -2, 0), (width * own, length, height)))
    third = _ellipsoid(p, (0, -4, -4), (3.5, 14, 12))
    return np.minimum(np.minimum(*sides), third)


def _nuclei(rng: np.random.Generator, p: list[np.ndarray]) -> np.ndarray:
    """Deep grey nuclei, one group a side, beside the ventricles."""
    x, y, z = rng.uniform(22, 26), rng.uniform(0, 8), rng.uniform(-6, 0)
    radii = tuple(rng.uniform(0.85, 1.15) * np.array((9.5, 17.0, 12.0)))
    return np.minimum(_ellipsoid(p, (-x, y, z), radii), _ellipsoid(p, (x, y, z), radii))


def _lesion(
    rng: np.random.Generator, p: list[np.ndarray], axes: list[np.ndarray], radii: np.ndarray, plane: float
) -> np.ndarray:
    """Signed distance of a lesion inside one hemisphere; +inf: none. plane: z of a 2-D slice, or nan."""
    present, large, right = rng.random() < 0.75, rng.random() < 0.5, rng.random() < 0.5
    radius = rng.uniform(*(LARGE_RADIUS if large else SMALL_RADIUS))
    centre = np.array([radius + rng.uniform(6, 26), rng.uniform(-52, 48), rng.uniform(-8, 34)])
    centre[2] = centre[2] if np.isnan(plane) else plane
    limit = 1 - (radius + 6) / radii.min()  # stay away from the surface
    while (reach := np.linalg.norm(centre / radii)) > limit and abs(centre[1]) > 1:
        centre[1] *= 0.9
        centre[2] *= 1.0 if reach < limit else 0.95 if np.isnan(plane) else 1.0
    centre[0] = max(radius + 4, min(centre[0], limit * radii[0])) * (1 if right else -1)
    aspect = rng.uniform(0.88, 1.12, 3)
    aspect /= np.prod(aspect) ** (1 / 3)
    rough = _field(rng, axes, 30.0) * np.float32(0.06 * radius)
    shape = _ellipsoid(p, tuple(centre), tuple(radius * aspect)) + rough
    return shape if present else np.full_like(shape, np.inf)


# --- the head ---------------------------------------------------------------------------------------------


def _paint(
    p: list[np.ndarray], axes: list[np.ndarray], rng: np.random.Generator, voxel: float, plane: float
) -> Pair:
    """Paint all shapes: (tissue weights (num_tissues, X, Y, Z), whose sum is at most 1; mask)."""
    radii = np.array([66.0, 82.0, 58.0]) * rng.uniform(0.94, 1.05, 3)
    cavity = _ellipsoid(p, (0, 0, 0), tuple(radii + 3))
    low = _ellipsoid(p, (0, -30, -42), (48, 40, 30))  # the skull around the cerebellum
    cavity = np.minimum(cavity, low)
    skull, scalp = rng.uniform(6, 8), rng.uniform(5, 7)
    face = _ellipsoid(p, (0, 42, -68), (52, 50 * rng.uniform(0.94, 1.06), 62))
    nose = _ellipsoid(p, (0, 92, -62), (11, 15, 17))
    neck = np.sqrt((p[0] / 0.95) ** 2 + (p[1] + 12 - (p[2] + 60) * 0.1) ** 2) - 52
    head = np.minimum(
        cavity - (skull + scalp), np.minimum(np.minimum(face, nose), np.maximum(neck, p[2] + 40))
    )
    eyes = np.minimum(_ellipsoid(p, (-31, 70, -36), (12, 12, 12)), _ellipsoid(p, (31, 70, -36), (12, 12, 12)))
    sinus = np.minimum(_ellipsoid(p, (0, 66, -64), (11, 22, 18)), _ellipsoid(p, (0, 20, -90), (9, 9, 40)))
    brain, white = _brain(rng, p, axes, radii)
    hind, hind_white = _hindbrain(rng, p, axes)
    ventricles, nuclei = _ventricles(rng, p), _nuclei(rng, p)
    missing = rng.random() < 0.2
    lesion = _lesion(rng, p, axes, radii, plane)
    layers = [("fat", head, 0), ("muscle", head + scalp, 0), ("air", sinus, 0), ("eye", eyes, 0)]
    layers += [("skull", cavity - skull, 0), ("fluid", cavity, 0)]
    layers += [("grey", hind, 1), ("white", hind_white, 1), ("grey", brain, 1), ("white", white, 1)]
    layers += [] if missing else [("nuclei", nuclei, 3)]
    layers += [("fluid", ventricles, 2), ("lesion", lesion, 4)]
    weights = np.zeros((len(TISSUES), *head.shape), dtype=np.float32)
    mask = np.zeros(head.shape, dtype=np.uint8)
    for tissue, distance, label in layers:
        coverage = np.clip(0.5 - distance / np.float32(voxel), 0, 1).astype(np.float32)
        weights *= 1 - coverage
        if tissue != "air":
            weights[list(TISSUES).index(tissue)] += coverage
        if label or tissue in ("fluid", "skull"):
            mask[distance < 0] = label
    return weights, mask


def make_phantom(
    index: int,
    dims: Literal[2, 3] = 3,
    size: tuple[int, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
    seed: int = 0,
) -> Phantom:
    """Head number `index` of the population `seed`; the same arguments give the same arrays.

    size: voxels *S, default (48, 56, 48) or (112, 96). spacing: mm, default so that the field of view holds
    the head, 192 x 224 x 192 mm; another spacing samples the same head in true mm. 2-D is an axial slice seen
    from above: rows run from the face backwards, columns to the patient's right.
    """
    size = DEFAULT_SIZE[dims] if size is None else tuple(size)
    if len(size) != dims or min(size) < 1:
        raise InputError(f"phantom size {size}, expected {dims} positive numbers")
    if spacing is None:
        spacing = tuple(view / n for view, n in zip(FIELD_OF_VIEW[dims], size, strict=True))
    if len(spacing) != dims or min(spacing) <= 0:
        raise InputError(f"phantom spacing {tuple(spacing)}, expected {dims} positive numbers (mm)")
    rng, noise_rng = np.random.default_rng((seed, index)), np.random.default_rng((seed, index, 1))
    grid = [
        (np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(s)
        for n, s in zip(size, spacing, strict=True)
    ]
    plane = float("nan")
    if dims == 2:
        plane = rng.uniform(0, 14)
        axes = [grid[1], -grid[0], np.array([plane], dtype=np.float32)]
    else:
        axes = [grid[0], grid[1], grid[2] - np.float32(15)]  # the brain above the centre, face and neck below
    bent = [
        x + _field(rng, axes, 130.0, 8) * np.float32(2.0)
        for x in np.meshgrid(*axes, indexing="ij", sparse=True)
    ]
    voxel = float(np.prod(spacing) ** (1 / dims))
    weights, mask = _paint(bent, axes, rng, voxel, plane)
    shared = 1 + 0.05 * _field(rng, axes, 35.0)  # texture of the tissue itself
    contrasts = []
    for column in range(2):
        values = np.array([pair[column] for pair in TISSUES.values()], dtype=np.float32)
        picture = np.tensordot(values, weights, axes=1) * (shared if column == 0 else 2 - shared)
        picture *= np.exp(np.float32(0.06) * _field(rng, axes, 260.0, 6))
        noise = noise_rng.standard_normal((2, *picture.shape), dtype=np.float32) * np.float32(0.02)
        picture = np.sqrt((picture + noise[0]) ** 2 + noise[1] ** 2)  # Rician, as magnitude images have it
        contrasts.append((picture * np.float32(rng.uniform(400, 1500))).astype(np.float32))
    volumes = [contrasts[0], mask, contrasts[1]]
    if dims == 2:
        volumes = [volume[:, :, 0].T for volume in volumes]  # (x, y) to (row, column); y was built downwards
    image, mask, source = (np.ascontiguousarray(volume)[None] for volume in volumes)
    affine = centred_affine(size, spacing)
    caption = describe(mask[0] == 4, spacing)
    return Phantom(image, mask, source, int((mask == 4).any()), caption, tuple(map(float, spacing)), affine)


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """One array (1, *S) as NIfTI in RAS or as TIFF with its spacing as resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(affine) == 4:
        image = nib.Nifti1Image(array[0], affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, path)
    else:
        per_cm = 10 / affine[1, 1], 10 / affine[0, 0]
        tifffile.imwrite(
            path, array[0], resolution=per_cm, resolutionunit="CENTIMETER", photometric="minisblack"
        )


def write_phantoms(
    root: str | Path,
    num: int,
    dims: Literal[2, 3] = 3,
    size: tuple[int, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
    seed: int = 0,
    class_idx: Literal[0, 1] | None = None,
) -> Path:
    """Writes heads 0 ... num - 1 as a data set: images/, labels/, sources/ (NIfTI; 2-D: TIFF) and cases.csv.

    class_idx: only heads of this class, the first `num` of them: 0 = without a lesion, to train a model of
    healthy heads. Columns: image, mask, source, class, text, subject. The folder appears complete or not at
    all; if it exists already, that is an `InputError`.
    """
    root = Path(root)
    if root.exists():
        raise InputError(f"{root}: exists already and is not overwritten")
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    suffix, rows = ".tif" if dims == 2 else ".nii.gz", []
    try:
        for index in itertools.count():
            if len(rows) == num:
                break
            case, name = make_phantom(index, dims, size, spacing, seed), f"phantom_{index:04d}"
            if class_idx not in (None, case.class_idx):
                continue
            arrays = {"images": case.image, "labels": case.mask, "sources": case.source}
            for folder, array in arrays.items():
                _save(temporary / folder / f"{name}{suffix}", array, case.affine)
            files = [f"{folder}/{name}{suffix}" for folder in arrays]
            rows.append([*files, case.class_idx, case.caption, name])
        temporary.mkdir(parents=True, exist_ok=True)
        with open(temporary / "cases.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "mask", "source", "class", "text", "subject"], *rows])
        os.rename(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def phantom_folder(root: str | Path = "data/phantom") -> Path:
    """The data of the presets "phantom", written once: 128 heads of 40 x 48 x 40 voxels of 4.8 mm."""
    root = Path(root)
    with main_first():
        if is_main() and not root.exists():
            print(f"{root}: writing 128 synthetic heads", flush=True)
            write_phantoms(root, 128, size=(40, 48, 40))
    return root
