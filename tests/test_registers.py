"""A register means its label: bound by masks in training, silent behind a closed gate, read by position.

The head gives label maps as fine as the image.
"""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import randomised

from ldm3d import Denoiser, InputError, UNetConfig
from ldm3d.blocks import SpaceToDepth
from ldm3d.conditions import label_shares
from ldm3d.data.phantoms import make_phantom
from ldm3d.losses import dice_loss
from ldm3d.registers import (
    AnatomyConfig,
    Registers,
    anatomy_weight,
    balanced_cross_entropy,
    binding_loss,
    by_label,
    head_loss,
)
from ldm3d.reports.register_analysis import AttentionFigures

CONFIG = AnatomyConfig(registers="bound", per_label=3, dim=16, head_width=8)


def unet_config(dims, **changes):
    small = {"channels": (8, 16), "num_res_blocks": (1,), "attention_levels": (True, True)}
    return UNetConfig(dims, 3, 3, **{**small, "head_channels": 8, "num_groups": 4, **changes})


def make(dims=2, config=CONFIG, num_labels=4, random=True, **changes):
    """A denoiser with registers; random: the layers and gates that start at zero too."""
    torch.manual_seed(0)
    net = Denoiser(unet_config(dims, **changes), anatomy=config, num_labels=num_labels, factor=(4,) * dims)
    return randomised(net) if random else net


def arguments(dims=2, batch=2):
    """x_t of odd size, times, and masks that end before the last latent voxel does."""
    draw, size = torch.Generator().manual_seed(1), (5, 6, 3)[:dims]
    x = torch.randn(batch, 3, *size, generator=draw)
    mask = torch.randint(4, (batch, *(4 * n - 1 for n in size)), generator=draw)
    return x, torch.linspace(20.0, 900.0, batch), mask


def edge_repeated(mask, size):
    """The mask with its edge repeated at the end, as the autoencoder pads images."""
    for axis, n in enumerate(size, start=1):
        mask = mask.index_select(axis, torch.arange(n).clamp(max=mask.shape[axis] - 1))
    return mask


# --- the bank in the U-Net ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["free", "bound"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_pretrained_unet_is_left_as_it_was_to_the_bit(dims, mode):
    torch.manual_seed(0)
    plain = Denoiser(unet_config(dims))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = AnatomyConfig(registers=mode, dim=16, head_width=8)
    net = Denoiser(unet_config(dims), anatomy=config, num_labels=4, factor=(4,) * dims)
    missing, extra = net.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert {name.split(".")[0 if name.startswith("head") else 1] for name in missing} <= {"registers", "head"}
    x, t, mask = arguments(dims)
    assert torch.equal(plain(x, t), net(x, t))
    if mode == "bound":
        assert torch.equal(plain(x, t), net(x, t, mask=mask).pred)


@pytest.mark.parametrize("mode", ["free", "bound"])
def test_a_seed_gives_the_same_unet_with_and_without_registers(mode):
    torch.manual_seed(0)
    plain = Denoiser(unet_config(2))
    net = make(config=AnatomyConfig(registers=mode), random=False)
    weights = net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_a_mask_needs_registers_that_are_bound_and_registers_a_number_of_labels():
    x, t, mask = arguments()
    with pytest.raises(InputError, match="mask: needs registers that are bound, these are free"):
        make(config=AnatomyConfig(registers="free"))(x, t, mask=mask)
    with pytest.raises(InputError, match=r"anatomy\.registers: needs a number of labels, got 0"):
        make(num_labels=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_attention_that_is_supervised_is_the_fused_one(dims):
    net, (x, t, mask) = make(dims), arguments(dims)
    fused, explicit = net(x, t), net(x, t, mask=mask).pred
    assert (fused - explicit).abs().max() <= 2e-5 * fused.abs().max()


def test_a_reader_has_the_heads_of_its_own_attention_layer_where_levels_have_equal_widths():
    net = make(channels=(8, 8), head_channels=(8, 4))
    readers = [reader.attention.num_heads for reader in net.unet.registers.readers]
    assert readers == [stage.attention.attn.num_heads for stage in net.unet.attention_stages]
    assert readers == [1, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("dims", [2, 3])
def test_what_a_layer_reads_is_gated_attention_to_the_modulated_bank(dims):
    registers = make(dims).unet.registers
    draw, layer_idx = torch.Generator().manual_seed(2), 1
    h = torch.randn(2, registers.readers[layer_idx].norm.num_channels, *(3, 2, 4)[:dims], generator=draw)
    emb = torch.randn(2, registers.modulation.in_features, generator=draw)
    maps = []
    got = registers(h, emb, maps, layer_idx=layer_idx)
    reader = registers.readers[layer_idx]
    scale, shift = registers.modulation(F.silu(emb)).chunk(2, 1)
    bank = registers.bank.reshape(12, 16) * (1 + scale[:, None]) + shift[:, None]
    axes = [(torch.arange(n) + 0.5) * 2 / n - 1 for n in h.shape[2:]]
    where = []
    for u in torch.meshgrid(*axes, indexing="ij"):
        where += [f(math.pi * 2**k * u) for f in (torch.sin, torch.cos) for k in range(4)]
    where = torch.stack(where, -1).flatten(0, -2)  # (N, P)
    tokens = reader.norm(h).flatten(2).mT + where @ reader.place.weight.T
    heads = reader.attention.num_heads
    q = (tokens @ reader.attention.q.weight.T).unflatten(2, (heads, -1))
    k, v = (bank @ reader.attention.kv.weight.T).chunk(2, 2)
    k, v = k.unflatten(2, (heads, -1)), v.unflatten(2, (heads, -1))
    a = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    out = reader.attention.out_proj(torch.einsum("bhnm,bmhd->bnhd", a, v).flatten(2))
    expected = h + reader.attention.gate * out.mT.unflatten(2, h.shape[2:])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[0], a.mean(1).mT.unflatten(2, h.shape[2:]), rtol=1e-4, atol=1e-6)


def test_a_constant_map_attends_differently_at_every_position():
    registers = make(2).unet.registers
    maps = []
    registers(torch.ones(1, 8, 6, 5), torch.zeros(1, 32), maps, layer_idx=0)
    rows = maps[0][0].flatten(1).T  # (N, K M)
    assert (torch.cdist(rows, rows) + torch.eye(30)).min() > 1e-4


def test_the_noise_level_changes_the_bank_only_once_it_has_learned_to():
    registers = Registers(CONFIG, unet_config(2), 4, [(8, 1)])
    torch.nn.init.ones_(registers.readers[0].attention.gate)
    h, embs = torch.randn(1, 8, 4, 4), torch.randn(2, 1, 32)
    first, second = (partial(registers, h, emb, layer_idx=0) for emb in embs)
    assert torch.equal(first(), second())
    torch.nn.init.normal_(registers.modulation.weight)
    assert not torch.allclose(first(), second())


def test_the_same_weights_run_with_registers_on_or_off():
    net, (x, t, _) = make(), arguments()
    net_on = net(x, t)
    net.unet.registers.on = False
    plain = Denoiser(unet_config(2))
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(net(x, t), plain(x, t))
    assert not torch.allclose(net(x, t), net_on)


def test_every_parameter_takes_part_where_no_sample_has_a_mask():
    net, (x, t, mask) = make(), arguments()
    out = net(x, t, mask=torch.full_like(mask, -1))
    (out.pred.square().mean() + out.head.mean() + out.binding.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert not any(p.grad.any() for p in net.head.parameters())


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_cross_entropy_weighs_labels_as_its_equation_says(balance):
    draw = torch.Generator().manual_seed(0)
    log_p = torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64).log_softmax(1)
    y = torch.rand(2, 3, 4, 5, generator=draw, dtype=torch.float64)
    y[1, 2] = 0  # a label that is missing
    y = y / y.sum(1, keepdim=True)
    got = balanced_cross_entropy(log_p, y, balance)
    for b in range(2):
        total = weight = 0.0
        for c in range(3):
            f = float(y[b, c].sum() / y[b].sum())
            if f > 0:
                total += f ** (1 - balance) * float(-(log_p[b, c] * y[b, c]).sum() / y[b, c].sum())
                weight += f ** (1 - balance)
        assert float(got[b]) == pytest.approx(total / weight, rel=1e-6)
    if balance == 0:
        assert torch.allclose(got, -(log_p * y).sum(1).flatten(1).mean(1))


@pytest.mark.parametrize(
    ("balance", "weights"), [(0.0, (0.99, 0.01)), (0.5, (0.995, 0.1)), (1.0, (1.0, 1.0))]
)
def test_the_balance_decides_how_much_ten_voxels_in_a_thousand_count(balance, weights):
    y = F.one_hot((torch.arange(1000) >= 990).long(), 2).mT[None].float()
    log_q = torch.tensor([-1.0, -3.0])[None, :, None].expand(1, 2, 1000)  # CE_c = 1 and 3
    expected = (weights[0] * 1 + weights[1] * 3) / sum(weights)
    assert float(balanced_cross_entropy(log_q, y, balance)) == pytest.approx(expected, rel=1e-3)


def test_the_binding_loss_is_least_where_each_label_attends_to_its_own_registers():
    mask = torch.randint(4, (1, 16, 24), generator=torch.Generator().manual_seed(0))
    y = label_shares(mask, 4, (4, 4))
    right = y.repeat_interleave(3, 1) / 3  # (1, K M, 4, 6): the shares of its voxels, spread over a label's
    wrong = by_label(right, 4).roll(1, 1).flatten(1, 2)
    even = torch.full_like(right, 1 / 12)
    best, guess, worst = (
        float(binding_loss([m], mask, 4, (4, 4), (1, 1), 0.0)) for m in (right, even, wrong)
    )
    assert best == pytest.approx(float(torch.special.entr(y).sum(1).mean()), rel=1e-3)
    assert best < guess == pytest.approx(math.log(4), rel=1e-3)
    assert guess < worst


def test_the_registers_of_a_label_share_its_voxels_as_they_like():
    mask = torch.zeros(1, 8, 8, dtype=torch.int64)
    mask[:, 4:] = 1
    y = label_shares(mask, 2, (4, 4))
    one = torch.stack([y[:, 0], 0 * y[:, 0], y[:, 1], 0 * y[:, 0]], 1)  # one register of each label does all
    spread = y.repeat_interleave(2, 1) / 2
    a, b = (binding_loss([m], mask, 2, (4, 4), (1, 1), 0.5) for m in (one, spread))
    assert torch.allclose(a, b)
    assert float(a) < 1e-5


@pytest.mark.parametrize("size", [(5, 9), (4, 8), (1, 3)])
def test_maps_of_a_padded_unet_meet_labels_padded_alike(size):
    net = make(2, channels=(8, 8, 8), attention_levels=(True,))
    mask = torch.zeros(1, *(4 * n for n in size), dtype=torch.int64)
    maps = net.attention_maps(torch.randn(1, 3, *size), torch.zeros(1))
    flat = [m.flatten(1, 2) for m in maps]
    got = binding_loss(flat, mask, 4, (4, 4), net.unet.config.downsampling, 0.5).detach()
    expected = torch.stack([-m[:, 0].sum(1).log().mean() for m in maps]).mean().detach()  # background
    assert float(got) == pytest.approx(float(expected), rel=1e-3)


def test_masks_are_padded_as_the_encoder_pads_images():
    """21 voxels are 6 latent voxels of 4: the edge is repeated, no voxel moves."""
    net, mask = make(), torch.randint(4, (1, 21, 21), generator=torch.Generator().manual_seed(0))
    out, expected = (
        net(torch.zeros(1, 3, 6, 6), torch.ones(1), mask=m) for m in (mask, edge_repeated(mask, (24, 24)))
    )
    assert torch.equal(out.binding, expected.binding)
    assert torch.equal(out.head, expected.head)


def test_samples_without_a_mask_have_no_anatomical_loss_and_do_not_touch_the_others():
    net, (x, t, mask) = make(), arguments(batch=3)
    both = net(x, t, mask=mask)
    mask[1] = -1
    some = net(x, t, mask=mask)
    for a, b in zip(both[1:], some[1:], strict=True):
        assert b[1] == 0
        assert torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-6)
    assert torch.equal(both.pred, some.pred)


@pytest.mark.parametrize("num_labels", [1, 4])
def test_all_background_and_missing_labels_give_finite_losses_and_gradients(num_labels):
    net, (x, t, mask) = make(num_labels=num_labels), arguments()
    mask[0] = 0
    mask[1] = 0 if num_labels == 1 else mask[1] % 2  # labels 2 and 3 are missing
    out = net(x, t, mask=mask)
    (out.head.mean() + out.binding.mean()).backward()
    assert out.head.isfinite().all()
    assert out.binding.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    if num_labels == 1:  # the one label is everywhere
        assert out.binding.abs().max() < 1e-4
        assert out.head.abs().max() < 1e-4


def test_the_head_is_supervised_at_the_resolution_of_the_image():
    net, (x, t, mask) = make(), arguments()
    logits = net.label_logits(x, t)
    assert logits.shape == (2, 4, 20, 24)
    perfect = 50 * F.one_hot(edge_repeated(mask, (20, 24)), 4).movedim(-1, 1).float()
    assert head_loss(perfect, mask, 0.5).abs().max() < 1e-3
    assert head_loss(logits, mask, 0.5).min() > 1.0


def test_the_loss_of_the_head_is_cross_entropy_and_dice():
    _, _, mask = arguments()
    logits = torch.randn(2, 4, *mask.shape[1:])
    p, y = logits.softmax(1), F.one_hot(mask, 4).movedim(-1, 1)
    entropy = -(p * y).sum(1).log().flatten(1).mean(1)
    assert torch.allclose(head_loss(logits, mask, 0.0), entropy + dice_loss(p, y.float()), atol=1e-5)
    assert torch.equal(head_loss(logits, torch.full_like(mask, -1), 0.0), torch.zeros(2))


def test_voxels_to_ignore_have_no_part_in_the_loss_of_the_head():
    _, _, mask = arguments()
    logits, ignored = torch.randn(2, 4, *mask.shape[1:]), torch.zeros_like(mask, dtype=torch.bool)
    ignored[:, :5] = True
    mask = mask.masked_fill(ignored, -1)
    others = torch.where(ignored[:, None], 5 * torch.randn_like(logits), logits)
    assert torch.allclose(head_loss(others, mask, 0.5), head_loss(logits, mask, 0.5))


def test_each_of_the_two_losses_has_a_balance_of_its_own():
    net, (x, t, mask) = make(config=dataclasses.replace(CONFIG, balance=1.0, head_balance=0.0)), arguments()
    mask[:, 3:] = 0  # most of it is background
    out, multiple = net(x, t, mask=mask), net.unet.config.downsampling
    maps = [m.flatten(1, 2) for m in net.attention_maps(x, t)]
    assert torch.allclose(out.head, head_loss(net.label_logits(x, t), mask, 0.0), atol=1e-5)
    assert torch.allclose(out.binding, binding_loss(maps, mask, 4, (4, 4), multiple, 1.0), atol=1e-5)


# --- schedule and settings ----------------------------------------------------------------------------------


def test_the_weight_falls_from_strong_over_balanced_to_minimal():
    config = AnatomyConfig(weights=(2.0, 1.0, 0.1), phases=(0.2, 0.4, 0.8))
    steps = [0, 199, 200, 300, 400, 600, 800, 999]
    expected = [2.0, 2.0, 2.0, 1.5, 1.0, 0.55, 0.1, 0.1]
    assert [anatomy_weight(config, s, 1000) for s in steps] == pytest.approx(expected)
    constant = AnatomyConfig(weights=(1.0, 1.0, 1.0), phases=(0.0, 0.0, 0.0))
    assert [anatomy_weight(constant, s, 10) for s in range(10)] == [1.0] * 10


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_registers_learn_the_anatomy_of_phantoms(dims):
    """The binding loss falls, and in heads not seen in training each label's attention peaks inside it; the
    latent is the image itself, 4 voxels of an axis to channels."""
    torch.manual_seed(0)
    factor, size = (4,) * dims, (40, 48, 40)[-dims:]
    heads = [make_phantom(i, dims, size) for i in range(56)]
    x = torch.from_numpy(np.stack([(h.image - h.image.mean()) / h.image.std() for h in heads]))
    x, mask = SpaceToDepth(factor)(x), torch.from_numpy(np.stack([h.mask[0] for h in heads])).long()
    unet = dataclasses.replace(
        unet_config(dims, channels=(16, 32)), in_channels=4**dims, out_channels=4**dims
    )
    config = AnatomyConfig("bound", 2, 32, head_width=16)
    net = Denoiser(unet, anatomy=config, num_labels=5, factor=factor)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    draw = torch.Generator().manual_seed(0)

    def noisy(chosen):
        return x[chosen] + 0.2 * torch.randn(x[chosen].shape, generator=draw), torch.full((8,), 100.0)

    @torch.no_grad()
    def pointing():
        found, held_out = AttentionFigures(5), torch.arange(48, 56)
        layers = [F.interpolate(a.flatten(1, 2), size) for a in net.attention_maps(*noisy(held_out))]
        for maps, truth in zip(zip(*layers, strict=True), mask[held_out], strict=True):
            found.add([a.unflatten(0, (5, 2)) for a in maps], truth)
        return np.mean(found.figures()["pointing"])

    before, losses = pointing(), []
    for _ in range(100):
        chosen = torch.randint(48, (8,), generator=draw)
        out = net(*noisy(chosen), mask=mask[chosen])
        optimizer.zero_grad()
        (out.head + out.binding).mean().backward()
        optimizer.step()
        losses.append(float(out.binding.detach().mean()))
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    assert pointing() > before + 0.4
