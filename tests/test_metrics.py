"""Metrics equal their definitions: closed forms, scikit-image, and counting by hand."""

import numpy as np
import pytest
import torch

from ldm3d import metrics
from ldm3d.metrics import (
    MS_SSIM_WEIGHTS,
    dice,
    hd95,
    iou,
    ms_ssim,
    ms_ssim_weights,
    nearest_distances,
    precision,
    psnr,
    sensitivity,
    set_statistics,
    sharpness,
    ssim,
)

SHAPES = {2: (2, 3, 17, 12), 3: (2, 2, 9, 11, 8)}


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_psnr_of_a_constant_error_is_its_closed_form(dims: int) -> None:
    x, _ = pair(SHAPES[dims])
    error = torch.tensor([0.1, 0.02]).reshape(2, *(1,) * (dims + 1))
    expected = torch.tensor([20 * np.log10(2 / 0.1), 20 * np.log10(2 / 0.02)])
    assert torch.allclose(psnr(x, x + error, data_range=2.0), expected, atol=1e-4)
    assert psnr(x, x, data_range=2.0).isinf().all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("window", [3, 7])
def test_ssim_equals_scikit_image(dims: int, window: int) -> None:
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image (extra test) is not installed")
    x, y = pair(SHAPES[dims])
    similarity = ssim(x, y, data_range=2.0, window=window)
    for i in range(len(x)):
        options = {"data_range": 2.0, "win_size": window, "channel_axis": 0}
        expected = skimage.structural_similarity(x[i].numpy(), y[i].numpy(), **options)
        assert similarity[i].item() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(ssim(x, x, data_range=2.0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("size", [(23, 9, 8), (40, 12), (3, 5, 9)])
def test_large_images_are_scored_in_parts_with_the_same_result(size, monkeypatch) -> None:
    x, y = torch.randn(2, 2, 1, *size, generator=torch.Generator().manual_seed(0))
    whole = ssim(x, y, data_range=2.0), psnr(x, y, data_range=2.0)
    for slab in (1, 500):
        monkeypatch.setattr(metrics, "SLAB", slab)
        assert torch.allclose(ssim(x, y, data_range=2.0), whole[0], rtol=1e-12)
        assert torch.allclose(psnr(x, y, data_range=2.0), whole[1], rtol=1e-12)


def test_ssim_of_a_thin_volume_is_its_definition_with_a_window_that_fits() -> None:
    x, y = pair((1, 1, 4, 9, 1))
    a, b = (
        np.lib.stride_tricks.sliding_window_view(v[0, 0].double().numpy(), (3, 7, 1)).reshape(-1, 21)
        for v in (x, y)
    )
    c1, c2 = 0.02**2, 0.06**2
    cov = ((a - a.mean(1, keepdims=True)) * (b - b.mean(1, keepdims=True))).sum(1) / 20
    value = (2 * a.mean(1) * b.mean(1) + c1) * (2 * cov + c2)
    value /= (a.mean(1) ** 2 + b.mean(1) ** 2 + c1) * (a.var(1, ddof=1) + b.var(1, ddof=1) + c2)
    assert ssim(x, y, data_range=2.0).item() == pytest.approx(value.mean(), abs=1e-10)


def test_ssim_and_psnr_do_not_lose_precision_on_large_intensities() -> None:
    x, y = pair((1, 1, 9, 9))
    scaled = ssim(x.double() * 1e4 + 1e6, y.double() * 1e4 + 1e6, data_range=2e4)
    assert 0 < scaled.item() <= 1
    assert torch.allclose(psnr(x.double() + 1e6, y.double() + 1e6, 2.0), psnr(x, y, 2.0), atol=1e-6)


def by_hand_ms_ssim(x: np.ndarray, y: np.ndarray, weights: tuple[float, ...], window: int) -> float:
    """One channel (*S), data range 2: windows cut out one by one, voxels averaged by reshaping."""
    value, c1, c2 = 1.0, 0.02**2, 0.06**2
    for scale, weight in enumerate(weights):
        a, b = (
            np.lib.stride_tricks.sliding_window_view(v, (window,) * v.ndim).reshape(-1, window**v.ndim)
            for v in (x, y)
        )
        cov = ((a - a.mean(1, keepdims=True)) * (b - b.mean(1, keepdims=True))).sum(1) / (a.shape[1] - 1)
        structure = (2 * cov + c2) / (a.var(1, ddof=1) + b.var(1, ddof=1) + c2)
        light = (2 * a.mean(1) * b.mean(1) + c1) / (a.mean(1) ** 2 + b.mean(1) ** 2 + c1)
        value *= (structure * (light if scale == len(weights) - 1 else 1)).mean() ** weight
        for axis in range(x.ndim):
            even = x.shape[axis] // 2 * 2
            x, y = (np.take(v, range(even), axis) for v in (x, y))
            x, y = (
                0.5 * (np.take(v, range(0, even, 2), axis) + np.take(v, range(1, even, 2), axis))
                for v in (x, y)
            )
    return value


@pytest.mark.parametrize(("size", "scales"), [((30, 41), 3), ((15, 14, 17), 2), ((13, 40), 1)])
def test_ms_ssim_is_its_definition_at_as_many_scales_as_fit(size: tuple[int, ...], scales: int) -> None:
    x, y = pair((2, 2, *size))
    weights = ms_ssim_weights(size)
    assert len(weights) == scales
    expected = [
        np.mean(
            [by_hand_ms_ssim(x[b, c].double().numpy(), y[b, c].double().numpy(), weights, 7) for c in (0, 1)]
        )
        for b in (0, 1)
    ]
    assert ms_ssim(x, y, data_range=2.0).tolist() == pytest.approx(expected, abs=1e-10)
    assert ms_ssim(x, y, 2.0, dtype=torch.float32).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(ms_ssim(x, x, data_range=2.0), torch.ones(2, dtype=torch.float64))


def test_ms_ssim_of_one_scale_is_the_ssim_of_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image (extra test) is not installed")
    x, y = pair((1, 1, 13, 11, 12))
    expected = skimage.structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), data_range=2.0)
    assert ms_ssim(x, y, data_range=2.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("smallest", [1, 6, 7, 13, 14, 55, 56, 111, 112, 500])
def test_the_weights_of_the_scales_that_fit_add_up_to_one(smallest: int) -> None:
    weights = ms_ssim_weights((smallest, 600))
    fitting = [n for n in range(5) if smallest // 2**n >= 7]
    assert len(weights) == max(1, len(fitting))
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] / weights[-1] == pytest.approx(MS_SSIM_WEIGHTS[0] / MS_SSIM_WEIGHTS[len(weights) - 1])


def test_ms_ssim_is_a_loss_with_finite_gradients_even_for_the_opposite_and_for_nothing() -> None:
    x, _ = pair((1, 1, 28, 28))
    for start in (-x, torch.zeros_like(x), x.clone()):
        recon = start.clone().requires_grad_()
        (1 - ms_ssim(recon, x, 2.0, dtype=torch.float32)).sum().backward()
        assert recon.grad.isfinite().all()
    recon = (0.5 * x).requires_grad_()
    (gradient,) = torch.autograd.grad(ms_ssim(recon, x, 2.0).sum(), recon)
    better = recon.detach() + 0.05 * gradient / gradient.norm()
    assert ms_ssim(better, x, 2.0) > ms_ssim(recon, x, 2.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_dice_and_iou_count_voxels_of_each_label(dims: int) -> None:
    rng = np.random.default_rng(1)
    shape = (2, *SHAPES[dims][2:])
    pred, target = rng.integers(0, 4, shape), rng.integers(0, 4, shape)
    pred[0][pred[0] == 3], target[0][target[0] == 3] = 0, 0  # neither has label 3
    pred[1][pred[1] == 2] = 0  # only the target has label 2
    measured = (
        dice(torch.tensor(pred), torch.tensor(target), 4),
        iou(torch.tensor(pred), torch.tensor(target), 4),
    )
    for i in range(2):
        for label in range(1, 4):
            p, t = (set(np.flatnonzero(v[i] == label).tolist()) for v in (pred, target))
            expected = (
                (2 * len(p & t) / (len(p) + len(t)), len(p & t) / len(p | t)) if p | t else (np.nan,) * 2
            )
            got = [m[i, label - 1].item() for m in measured]
            assert got == pytest.approx(expected, nan_ok=True)
    assert measured[0].isnan().sum() == 1
    assert measured[0][1, 1] == 0


def test_precision_and_sensitivity_are_counts_and_undefined_where_nothing_is() -> None:
    target = torch.tensor([[[1, 1, 0], [0, 2, 2]]])
    pred = torch.tensor([[[1, 0, 1], [1, 2, 0]]])
    assert precision(pred, target, 3)[0].tolist() == pytest.approx([1 / 3, 1])
    assert sensitivity(pred, target, 3)[0].tolist() == pytest.approx([1 / 2, 1 / 2])
    assert sensitivity(pred, torch.zeros_like(target), 2).isnan().all()
    assert precision(torch.zeros_like(pred), target, 2).isnan().all()


def blobs(dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two label maps (2, *S) with labels 1 and 2, alike but not equal; one touches the border."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (13, 11, 12)[:dims]), indexing="ij"))
    maps = []
    for shift in (0.0, 1.3):
        case = []
        for centre in (3.0, 5.5):
            r = (grid - centre - shift).square().sum(0).sqrt()
            case.append((r < 4.2).long() + (r < 2.1).long())
        maps.append(torch.stack(case))
    return maps[0], maps[1]


@pytest.mark.parametrize("dims", [2, 3])
def test_precision_and_sensitivity_equal_scikit_learn(dims: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn (extra test) is not installed")
    pred, target = blobs(dims)
    for i in range(2):
        flat = target[i].flatten().numpy(), pred[i].flatten().numpy()
        expected = metrics.precision_recall_fscore_support(*flat, labels=[1, 2])
        measured = precision(pred, target, 3)[i], sensitivity(pred, target, 3)[i], dice(pred, target, 3)[i]
        for a, b in zip(measured, expected, strict=False):
            assert a.tolist() == pytest.approx(b.tolist())


@pytest.mark.parity
@pytest.mark.parametrize("dims", [2, 3])
def test_hd95_equals_monai(dims: int) -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI (extra test) is not installed")
    pred, target = blobs(dims)
    spacing = (1.0, 2.5, 0.7)[:dims]
    one_hot = [torch.nn.functional.one_hot(v, 3).movedim(-1, 1) for v in (pred, target)]
    expected = monai.compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing)
    measured = hd95(pred, target, 3, spacing)
    assert measured.min() > 0.5
    assert torch.allclose(measured, expected.double(), atol=1e-5)


@pytest.mark.parametrize(("share", "wall"), [(3e-5, False), (1e-3, True), (0.5, False)])
@pytest.mark.parametrize("size", [(131, 97), (1, 300), (47, 43, 41), (5, 1, 9)])
def test_distances_to_the_nearest_voxel_are_those_of_scipy(
    size: tuple[int, ...], share: float, wall: bool
) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy (extra test) is not installed")
    mask = np.random.default_rng(2).random(size) < share
    mask[(-1,) * len(size)] = True
    mask[0] |= wall
    spacing, everywhere = (0.7, 3.1, 1.3)[: len(size)], torch.ones(size, dtype=torch.bool)
    expected = ndimage.distance_transform_edt(~mask, sampling=spacing).ravel()
    assert np.allclose(nearest_distances(everywhere, torch.tensor(mask), spacing), expected, rtol=1e-12)
    assert nearest_distances(everywhere, ~everywhere, spacing).isinf().all()


@pytest.mark.parametrize("dims", [2, 3])
def test_hd95_is_the_percentile_of_distances_between_all_pairs_of_surface_voxels(dims: int) -> None:
    rng, spacing = np.random.default_rng(3), (0.7, 2.5, 1.3)[:dims]
    maps = rng.integers(0, 3, (2, *(17, 13, 7)[:dims]))
    maps[1, :9], maps[:, :, :4] = 0, 2  # far ends, and a solid part that has an inside

    def on_surface(mask: np.ndarray) -> np.ndarray:
        mask = np.pad(mask, 1)
        inside = np.all([np.roll(mask, sign, axis) for sign in (-1, 1) for axis in range(dims)], axis=0)
        return np.argwhere(mask & ~inside) * spacing

    measured = hd95(*torch.tensor(maps)[:, None], 3, spacing)[0]
    for label in (1, 2):
        a, b = (on_surface(label_map == label) for label_map in maps)
        pairs = np.linalg.norm(a[:, None] - b, axis=-1)
        expected = max(np.percentile(pairs.min(axis), 95) for axis in (0, 1))
        assert measured[label - 1].item() == pytest.approx(expected, rel=1e-12)


def test_hd95_of_two_planes_is_their_distance_in_mm_and_a_label_that_one_map_lacks_has_none() -> None:
    pred, target = torch.zeros(2, 1, 9, 9, 9, dtype=torch.long)
    pred[0, 2], target[0, 6] = 1, 1
    target[0, 0] = 2
    measured = hd95(pred, target, 4, (0.5, 1.0, 1.0))[0]
    assert measured[0] == 2.0
    assert measured[1].isinf()
    assert measured[2].isnan()
    assert (hd95(pred, pred, 2, (1.0, 1.0, 1.0)) == 0).all()


def test_sharpness_is_the_mean_slope_over_all_axes_longer_than_one_voxel() -> None:
    i, j, k = torch.meshgrid(*(torch.arange(n) for n in (4, 5, 6)), indexing="ij")
    ramp = (1.0 * i - 2.0 * j + 6.0 * k).expand(2, 1, -1, -1, -1)
    assert sharpness(ramp) == pytest.approx((1 + 2 + 6) / 3)
    assert sharpness(ramp[..., :1]) == pytest.approx((1 + 2) / 2)


def test_the_statistics_of_a_set_are_those_of_all_its_voxels_and_of_neighbouring_pairs() -> None:
    x = pair((3, 1, 9, 10))[0]
    found = set_statistics(x)
    assert found["mean"] == pytest.approx(x.double().mean().item())
    assert found["std"] == pytest.approx(np.std(x.double().numpy(), ddof=1))
    pairs = [ssim(x[[a]], x[[b]], 2.0).item() for a, b in ((0, 1), (1, 2), (2, 0))]
    assert found["pair_ssim"] == pytest.approx(np.mean(pairs))
    assert np.isnan(set_statistics(x[:1])["pair_ssim"])


def test_the_sharpness_of_large_volumes_is_summed_over_slabs(monkeypatch) -> None:
    x = pair((2, 1, 9, 10, 11))[0]
    whole = sum(x.diff(dim=axis).abs().double().mean() for axis in (2, 3, 4)) / 3
    monkeypatch.setattr(metrics, "SLAB", 500)
    assert sharpness(x) == pytest.approx(float(whole), rel=1e-10)


def test_different_shapes_are_refused() -> None:
    x = torch.zeros(1, 1, 8, 8)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="expected equal"):
            metric(x, x[..., 1:], 2.0)
    with pytest.raises(ValueError, match="expected equal"):
        dice(x, x[..., 1:], 2)
