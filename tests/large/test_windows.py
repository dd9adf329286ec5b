"""What is larger than a network has learned is predicted in windows: their mean, by weights, is the
prediction of the whole, and neither memory nor the number of windows at once changes a sample."""

import itertools
import math

import pytest
import torch
from networks import NETWORKS
from torch import nn

from ldm3d.guidance import Guidance, guided
from ldm3d.large.windows import Windows, window_starts


class Local(nn.Module):
    """A denoiser that sees each voxel alone, (x_t + t) / 2, so that windows change nothing."""

    conditions = ()

    def coordinates(self, x_t):
        return None

    def forward(self, x_t, t, conditions):
        assert not conditions
        return (x_t + t.view(-1, *(1,) * (x_t.ndim - 1))) / 2


@pytest.mark.parametrize(("size", "overlap"), [((11, 7), 0.5), ((9, 6, 5), 0.25), ((4, 3), 0.0)])
def test_windows_of_a_network_that_sees_single_voxels_are_the_whole(size, overlap):
    x, t = torch.randn(2, 3, *size), torch.tensor([0.5, 3.0])
    net = Windows(Local(), size, (4, 5, 3)[: len(size)], overlap, batch_size=3)
    torch.testing.assert_close(net(x, t), Local()(x, t, {}))


def test_the_prediction_is_the_mean_of_the_windows_by_sin_squared():
    """Along one axis, by hand: windows of 4 over 6 voxels that start at 0 and 2."""

    class Number(Local):
        def forward(self, x_t, t, conditions):
            return x_t[..., :1, :1].expand_as(x_t)  # the first voxel of the window

    x = torch.arange(6.0).view(1, 1, 6, 1)
    (found,) = Windows(Number(), (6, 1), (4, 1), 0.5)(x, torch.zeros(1)).view(1, 6).tolist()
    w = [math.sin((i + 0.5) / 4 * math.pi) ** 2 for i in range(4)]
    both = [(w[2] * 0 + w[0] * 2) / (w[2] + w[0]), (w[3] * 0 + w[1] * 2) / (w[3] + w[1])]
    assert found == pytest.approx([0, 0, *both, 2, 2], abs=1e-6)


def test_conditions_with_a_place_are_cut_and_guidance_acts_on_the_mean():
    """Beside plain loops over windows, for a denoiser with conditions of every kind."""
    net, (x, _, values) = NETWORKS["denoiser conditions"](2)
    t, size, window = torch.full((2,), 40.0), (4, 6), (3, 4)
    predict = guided(Windows(net, size, window, 0.5, 4), values, x, Guidance(3.0, rescale=0.5), 100)
    preds = []
    for hidden in (True, False):
        total, weight = torch.zeros_like(x), torch.zeros(size)
        for i, j in itertools.product(window_starts(4, 3, 0.5), window_starts(6, 4, 0.5)):
            box = slice(i, i + 3), slice(j, j + 4)
            own = {} if hidden else {k: v[(..., *box)] if v.ndim == 4 else v for k, v in values.items()}
            w = torch.sin((torch.arange(3) + 0.5) / 3 * math.pi)[:, None] ** 2
            w = w * torch.sin((torch.arange(4) + 0.5) / 4 * math.pi) ** 2
            total[(..., *box)] += w * net(x[(..., *box)], t, own)
            weight[box] += w
        preds.append(total / weight)
    pred = preds[0] + 3 * (preds[1] - preds[0])
    ratio = preds[1].flatten(1).std(1) / pred.flatten(1).std(1)
    expected = (0.5 * ratio + 0.5).view(-1, 1, 1, 1) * pred
    with torch.inference_mode():
        torch.testing.assert_close(predict(x, t), expected, rtol=1e-4, atol=1e-5)


def test_label_maps_are_the_mean_of_the_windows_too():
    net, (x, t, *_) = NETWORKS["denoiser registers"](2)
    with torch.inference_mode():
        logits = Windows(net, x.shape[2:], (5, 4), 0.5).label_logits(x, t)
        parts = [net.label_logits(x[..., j : j + 4], t) for j in (0, 2)]
    assert logits.shape == (2, 4, 20, 24)
    torch.testing.assert_close(logits[..., :8], parts[0][..., :8])
    torch.testing.assert_close(logits[..., 16:], parts[1][..., 8:])
    assert not torch.allclose(logits[..., 8:16], parts[0][..., 8:], atol=1e-4)
