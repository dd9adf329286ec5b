"""Metrics equal their definitions: closed forms, scikit-image, and counting by hand."""

import numpy as np
import pytest
import torch

from ldm3d.metrics import dice, iou, psnr, ssim

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


def test_different_shapes_are_refused() -> None:
    x = torch.zeros(1, 1, 8, 8)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="expected equal"):
            metric(x, x[..., 1:], 2.0)
    with pytest.raises(ValueError, match="expected equal"):
        dice(x, x[..., 1:], 2)
