"""The U-Net takes any size, uses every parameter, and with MONAI's weights gives MONAI's numbers."""

import copy

import pytest
import torch
from closeness import close
from networks import randomised
from torch import nn

from ldm3d import unet
from ldm3d.blocks import AttentionBlock, TransformerBlock
from ldm3d.unet import UNet, UNetConfig

SMALL = {
    "channels": (4, 8),
    "num_res_blocks": (1,),
    "attention_levels": (False, True),
    "head_channels": 4,
    "num_groups": 2,
    "in_channels": 3,
    "out_channels": 2,
}


def make(dims, make_registers=None, **changes):
    """A U-Net with all weights random, those that start at zero too."""
    torch.manual_seed(0)
    return randomised(UNet(UNetConfig(dims=dims, **{**SMALL, **changes}), make_registers))


def arguments(dims, size=(6, 7, 8), context=False, batch=2):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(batch, 3, *size[:dims], generator=generator),
        "t": torch.tensor([3.0, 700.5])[:batch],
    }
    if context:
        inputs["context"] = torch.randn(batch, 5, 6, generator=generator)
    return inputs


@pytest.mark.parametrize("dims", [2, 3])
def test_the_prediction_is_zero_at_first(dims):
    net = UNet(UNetConfig(dims=dims, **SMALL))
    assert not net(**arguments(dims)).any()


@pytest.mark.parametrize("strides", [None, (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("size", [(4, 4, 4), (5, 7, 3), (1, 2, 1)])
@pytest.mark.parametrize("dims", [2, 3])
def test_any_size_in_is_the_same_size_out(dims, size, strides):
    strides = None if strides is None else (strides[:dims],)
    net = make(dims, strides=strides)
    assert net(**arguments(dims, size)).shape == (2, 2, *size[:dims])
    assert net.config.downsampling == ((2,) * dims if strides is None else strides[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_one_sample_with_a_bottleneck_of_one_voxel_is_computed_as_in_a_larger_batch(dims, training):
    """A group of one value has mean 0 and no width after its norm, alone as beside others."""
    net = make(dims, num_groups=8).train(training)
    both = arguments(dims, size=(2, 2, 2))
    alone = {name: value[:1] for name, value in both.items()}
    close(net(**alone), net(**both)[:1])


def test_odd_sizes_are_computed_as_if_their_edge_were_repeated():
    net, inputs = make(2), arguments(2, (5, 6))
    padded = torch.cat([inputs["x"], inputs["x"][:, :, -1:]], dim=2)
    close(net(**inputs), net(padded, inputs["t"])[:, :, :5], 1e-6)


def test_attention_is_where_the_levels_say_and_always_in_the_middle():
    net = make(2, channels=(4, 8, 12), num_res_blocks=(1, 2, 1), attention_levels=(False, True, False))
    assert [stage.channels for stage in net.attention_stages] == [8, 8, 12, 8, 8, 8]
    attended = [
        m.norm.num_channels for m in net.modules() if isinstance(m, (AttentionBlock, TransformerBlock))
    ]
    assert sorted(attended) == [8, 8, 8, 8, 8, 12]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_channels_last_way_gives_the_same_prediction_and_gradients(dims, monkeypatch):
    results = []
    for threshold in (10**9, 0):
        monkeypatch.setattr(unet, "CHANNELS_LAST_FROM", threshold)
        net = make(dims, context_dim=6)
        out = net(**arguments(dims, context=True))
        results.append([out, *torch.autograd.grad(out.square().mean(), list(net.parameters()))])
    close(results[1][0], results[0][0])
    for fast, plain in zip(*results, strict=True):
        close(fast, plain, 1e-4)


def test_dropout_acts_in_training_only():
    net, inputs = make(2, dropout=0.5), arguments(2)
    assert not torch.equal(net(**inputs), net(**inputs))
    net.eval()
    assert torch.equal(net(**inputs), net(**inputs))


def test_the_extra_embedding_is_added_to_that_of_time():
    net, inputs = make(2), arguments(2)
    emb = torch.randn(2, net.config.emb_dim, generator=torch.Generator().manual_seed(2))
    assert net.config.emb_dim == 16
    close(net.embed(inputs["t"], emb), net.embed(inputs["t"]) + emb)
    assert not torch.allclose(net(**inputs, emb=emb), net(**inputs))
    close(net(**inputs, emb=torch.zeros_like(emb)), net(**inputs))


def test_time_and_context_matter_and_masked_tokens_do_not():
    net, inputs = make(2, context_dim=6), arguments(2, context=True)
    out = net(**inputs)
    assert not torch.allclose(out, net(**{**inputs, "t": inputs["t"] + 50}))
    assert not torch.allclose(out, net(**{**inputs, "context": inputs["context"] + 1}))
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    changed = inputs["context"].clone()
    changed[:, 3:] += 5
    close(net(**{**inputs, "context": changed}, context_mask=mask), net(**inputs, context_mask=mask))


def test_sine_and_cosine_can_be_swapped():
    net = make(2)
    other = make(2, time_embed_order="sin_cos")
    half = net.config.channels[0] // 2
    with torch.no_grad():
        other.time_embed[0].weight.copy_(net.time_embed[0].weight.roll(half, dims=1))
    close(other(**arguments(2)), net(**arguments(2)))


class Recorder(nn.Module):
    """Registers that remember their calls and add one number of their own."""

    def __init__(self, layers):
        super().__init__()
        self.widths, self.calls = [width for width, _ in layers], []
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, h, emb, maps, *, layer_idx):
        self.calls.append((layer_idx, h.shape[1], emb.shape, maps))
        return h + self.shift


@pytest.mark.parametrize("checkpointing", [False, True])
def test_registers_are_read_once_after_every_attention_layer(checkpointing):
    net, inputs, maps = make(2, Recorder, checkpointing=checkpointing), arguments(2), []
    net.output(net.features(**inputs, maps=maps), (6, 7)).sum().backward()
    assert net.registers.calls == [(i, c, (2, 16), maps) for i, c in enumerate(net.registers.widths)]
    assert len(net.registers.calls) == len(net.attention_stages) == 4
    assert not torch.allclose(net(**inputs), make(2)(**inputs))


def test_the_weights_of_registers_are_named_once_and_come_last():
    names = [name for name, _ in make(2, Recorder).named_parameters()]
    assert names == [*dict(make(2).named_parameters()), "registers.shift"]
    assert list(make(2, Recorder).state_dict()) == names


def test_a_copy_reads_registers_of_its_own():
    """As the EMA copies the network, and lets the copy go its own way."""
    net, inputs = make(2, Recorder), arguments(2)
    twin = copy.deepcopy(net)
    before = net(**inputs)
    with torch.no_grad():
        twin.registers.shift.add_(1)
    assert torch.equal(net(**inputs), before)
    assert not torch.allclose(twin(**inputs), before)


def test_keys_and_values_of_a_context_serve_every_step():
    net, inputs = make(2, context_dim=6), arguments(2, context=True)
    expected, cached = net(**inputs), net.kv_cache(inputs["context"])
    assert len(cached) == len(net.attention_stages) == 4
    for stage in net.attention_stages:
        stage.attention.cross_attn.kv = None  # they are not made again
    assert torch.equal(net(**{**inputs, "context": cached}), expected)


def test_the_network_exists_on_the_meta_device_without_memory():
    with torch.device("meta"):
        net = UNet(UNetConfig(channels=(64, 128, 256), context_dim=64))
        out = net(torch.empty(1, 4, 17, 32, 33), torch.empty(1), torch.empty(1, 7, 64))
    assert out.shape == (1, 4, 17, 32, 33)
    assert out.device.type == "meta"


@pytest.mark.parity
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"context_dim": 6}, {"attn_out_proj": False, "num_res_blocks": (1, 2)}]
)
def test_monai_weights_give_monai_outputs_and_gradients(dims, changes):
    pytest.importorskip("monai")
    pytest.importorskip("einops")
    from benchmarks.monai_weights import twin_unet

    torch.manual_seed(0)
    ours, theirs = twin_unet(UNetConfig(dims=dims, **{**SMALL, **changes}))
    inputs = arguments(dims, (8, 12, 8), context="context_dim" in changes)
    out, expected = ours(**inputs), theirs(*inputs.values())
    close(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    close(ours.conv_in.weight.grad, theirs.conv_in.conv.weight.grad, 1e-4)
    close(ours.time_embed[0].weight.grad, theirs.time_embed[0].weight.grad, 1e-4)
    close(ours.down[0].res.conv2.weight.grad, theirs.down_blocks[0].resnets[0].conv2.conv.weight.grad, 1e-4)
    close(ours.norm_out.weight.grad, theirs.out[0].weight.grad, 1e-4)
    totals = [sum(p.grad.double().square().sum() for p in net.parameters()) for net in (ours, theirs)]
    close(*totals, 2e-4)
