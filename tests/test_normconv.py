"""Convolution and group norm give the plain formula's numbers and gradients by each of their fast ways."""

import pytest
import torch
import torch.nn.functional as F
from closeness import all_close, close, gradients
from torch import nn

from ldm3d import normconv
from ldm3d.normconv import (
    Conv,
    GroupNorm,
    GroupStatistics,
    channels_last,
    is_channels_last,
    norm_conv,
    norm_conv_in_slabs,
    takes_slow_path,
)


def image(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def trained_norm(channels, groups):
    """A norm whose weight and bias are not their initial ones and zeros."""
    norm = GroupNorm(channels, groups)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


# --- convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 1)])
def test_small_cpu_convolutions_by_onednn_equal_plain_ones_with_their_gradients(dims, stride, kernel):
    conv = Conv(dims, 6, 5, kernel=kernel, stride=stride)
    x = image(1, 6, *(8, 9, 7)[:dims], grad=True)
    assert takes_slow_path(x, conv.weight)
    plain = (F.conv2d if dims == 2 else F.conv3d)(x, conv.weight, conv.bias, stride, kernel // 2)
    out = conv(x)
    close(out, plain)
    all_close(gradients(conv, out, x), gradients(conv, plain, x))


def test_onednn_is_called_only_for_small_eager_fp32_cpu_tensors():
    weight = image(4, 4, 3, 3, 3)
    x = image(1, 4, 8, 8, 8)
    assert takes_slow_path(x, weight)
    assert not takes_slow_path(x.bfloat16(), weight.bfloat16())
    assert not takes_slow_path(x.to("meta"), weight.to("meta"))
    assert not takes_slow_path(x.expand(2, -1, -1, -1, -1), weight)
    assert not takes_slow_path(image(1, 4, 80, 80, 1), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_slow_path(x, weight)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_last_convolutions_equal_plain_ones_and_keep_the_layout(dims, kernel):
    conv = Conv(dims, 6, 4, kernel=kernel)
    x = image(2, 6, *(5, 6, 7)[:dims], grad=True)
    plain = (F.conv2d if dims == 2 else F.conv3d)(x, conv.weight, conv.bias, padding=kernel // 2)
    out = conv(channels_last(x))
    assert is_channels_last(out)
    close(out, plain)
    all_close(gradients(conv, out, x), gradients(conv, plain, x))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_layout_changes_strides_and_not_values(dims, channels):
    x = image(2, channels, *(3, 4, 5)[:dims])
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.stride(1) == 1
    assert (y.data_ptr() == x.data_ptr()) == (channels == 1)  # one channel costs no copy
    assert is_channels_last(Conv(dims, channels, 4)(y))
    assert channels_last(x.to("meta")).is_contiguous()


# --- group norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (20, 20), (34, 17), (8, 8), (1, 1)])
def test_the_number_of_groups_divides_the_channels(channels, groups):
    assert GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_norm_equals_the_formula_in_float64_with_its_gradients(silu, offset, dims, monkeypatch):
    monkeypatch.setattr(normconv, "SLICE", 200)  # several slices
    norm = trained_norm(6, 3)
    x = (image(2, 6, *(5, 4, 7)[:dims]) + offset).requires_grad_()
    groups = x.double().reshape(2, 3, -1)
    deviation = (groups - groups.mean(-1, keepdim=True)).reshape(x.shape)
    variance = groups.var(-1, correction=0).repeat_interleave(2, 1).reshape(2, 6, *(1,) * dims)
    shape = (1, 6, *(1,) * dims)
    expected = deviation / (variance + 1e-6).sqrt() * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    expected = F.silu(expected) if silu else expected
    out = norm(channels_last(x), silu)
    assert is_channels_last(out)
    tolerance = 2e-5 * (1 + offset)  # that far from zero fp32 itself carries fewer digits of x
    close(out, expected, tolerance)
    all_close(gradients(norm, out, x), gradients(norm, expected, x), 1e-4 * (1 + offset))


def test_a_gradient_of_another_layout_is_taken_right():
    norm, x = trained_norm(6, 3), image(2, 6, 3, 4, 5, grad=True)
    weights = image(2, 6, 3, 4, 5, seed=1)  # contiguous, the norm's input is not
    found = torch.autograd.grad(norm(channels_last(x), True), [x, *norm.parameters()], weights)
    expected = torch.autograd.grad(norm(x, True), [x, *norm.parameters()], weights)
    all_close(found, expected)
    found = torch.autograd.grad(norm(x, True), [x, *norm.parameters()], channels_last(weights))
    all_close(found, expected)


def test_channels_last_norm_is_exact_on_a_large_map():
    norm, x = trained_norm(4, 2), image(1, 4, 64, 64, 64)
    exact = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
    close(norm(channels_last(x)), exact, 1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous])
def test_the_statistics_of_bfloat16_inputs_are_computed_in_fp32(layout, dims, weights):
    norm = GroupNorm(8, 4).to(weights)
    x = (100 + image(2, 8, *[10] * dims)).bfloat16()  # sums in bf16 would lose the spread
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = norm(layout(x))
    close(found, F.group_norm(x.double(), 4), 2e-2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous])
def test_inference_overwrites_nothing_that_is_not_its_own(dims, layout):
    norm, x = trained_norm(6, 3), layout(image(2, 6, *(4, 5, 6)[:dims]))
    before = x.clone()
    with torch.no_grad():
        norm(x, silu=True)
    assert torch.equal(x, before)


def test_the_gradient_of_a_thin_volume_in_bfloat16_reads_no_foreign_memory():
    """oneDNN's own does: where that memory held numbers that are not finite, so did the gradient."""
    for seed in range(12):
        torch.manual_seed(seed)
        conv, x, g = Conv(3, 64, 64), channels_last(image(4, 64, 2, 4, 4)), image(4, 64, 2, 4, 4, seed=1)
        expected = torch.autograd.grad(conv(x), conv.weight, g)
        junk = [torch.full((2**size,), float("nan")) for size in range(8, 21, 2)]
        del junk
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        all_close(torch.autograd.grad(y, conv.weight, g.bfloat16()), expected, 2e-2)


@pytest.mark.parametrize("size", [(13, 7), (9, 6, 5)])
def test_statistics_are_the_same_bits_however_many_planes_come_at_a_time(size):
    x, found = channels_last(image(1, 8, *size)), []
    for step in (1, 2, 3, size[0]):
        statistics = GroupStatistics()
        for part in x.split(step, 2):
            statistics.add(part)
        found.append(statistics.mean_rstd(4, 1e-6))
    for other in found[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[-1], strict=True))


# --- norm and convolution together ----------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous])
@pytest.mark.parametrize("silu", [True, False])
def test_recomputing_norm_and_silu_changes_neither_output_nor_gradients(dims, layout, silu, monkeypatch):
    norm, conv = trained_norm(6, 3), Conv(dims, 6, 4)
    both = nn.ModuleList([norm, conv])
    x = image(2, 6, *(4, 5, 6)[:dims], grad=True)
    plain = conv(norm(layout(x), silu))
    monkeypatch.setattr(normconv, "RECOMPUTE_FROM", 0)
    out = norm_conv(norm, conv, layout(x), silu)
    assert torch.equal(out, plain)
    all_close(gradients(both, out, x), gradients(both, plain, x), 1e-6)


def test_only_the_input_is_kept_for_backward(monkeypatch):
    monkeypatch.setattr(normconv, "RECOMPUTE_FROM", 0)
    norm, conv, x = GroupNorm(8), Conv(3, 8, 8), image(1, 8, 6, 6, 6, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        norm_conv(norm, conv, x)
    assert kept == [x.numel()]


def test_recomputation_stops_before_the_convolution(monkeypatch):
    monkeypatch.setattr(normconv, "RECOMPUTE_FROM", 0)
    norm, conv, x = GroupNorm(8), Conv(3, 8, 8), image(2, 8, 6, 6, 6, grad=True)
    norms, products = [], []
    norm.register_forward_hook(lambda *args: norms.append(1))
    convolve = conv.convolve

    def counted(*args):
        out = convolve(*args)  # raises where the recomputation stops, before any product is formed
        products.append(1)
        return out

    conv.convolve = counted
    norm_conv(norm, conv, x).sum().backward()
    assert (len(norms), len(products)) == (2, 1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("depth", [1, 4, 5, 11])
@pytest.mark.parametrize(("kernel", "silu"), [(3, True), (3, False), (1, True), (5, True)])
def test_slabs_give_the_result_of_the_whole_for_every_kernel(dims, depth, kernel, silu, monkeypatch):
    norm, conv = trained_norm(6, 3), Conv(dims, 6, 4, kernel)
    x = image(2, 6, depth, 5, *((3,) if dims == 3 else ()))
    plain = F.group_norm(x, 3, norm.weight, norm.bias, 1e-6)
    for planes in (4, 1):  # a slab of one plane is thinner than what a kernel of 5 reaches
        monkeypatch.setattr(normconv, "SLAB", planes * x[:, :, 0].numel())
        with torch.no_grad():
            out = norm_conv_in_slabs(norm, conv, channels_last(x), silu)
            close(out, conv(F.silu(plain) if silu else plain))
            close(norm_conv(norm, conv, channels_last(x), silu), out)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_large_map_without_gradient_goes_through_every_convolution(kernel, stride):
    norm, conv = trained_norm(64, 32), Conv(3, 64, 2, kernel, stride)
    x = image(2, 64, 32, 32, 32)
    assert x.numel() > normconv.SLAB
    with torch.no_grad():
        close(norm_conv(norm, conv, channels_last(x)), conv(F.silu(norm(x))))
