"""A ControlNet leaves its denoiser as it is at first and where there is no map, and reads maps elsewhere."""

import copy
import dataclasses
import math

import pytest
import torch
from closeness import close
from networks import UNET, controlled, draw, randomised

from ldm3d import Denoiser, InputError
from ldm3d.conditions import hide
from ldm3d.control import ControlEmbedding, ControlNet


def plain_and_controlled(dims: int):
    """A denoiser, the same one with a ControlNet at its start, and inputs of both."""
    torch.manual_seed(0)
    net, inputs = controlled(dims, False)
    arguments = net.arguments._replace(conditions=net.conditions[:-1], control="off")
    plain = randomised(Denoiser(*arguments))
    net.load_state_dict(net.state_dict() | plain.state_dict())
    net.control.copy_weights(net.unet)
    return plain.eval(), net.eval(), inputs


@pytest.mark.parametrize("dims", [2, 3])
def test_at_the_start_the_predictions_are_those_of_the_plain_denoiser_to_the_bit(dims):
    plain, net, (x_t, t, values) = plain_and_controlled(dims)
    expected = plain(x_t, t, {"text": values["text"]})
    assert torch.equal(net(x_t, t, values), expected)
    assert expected.any()


def test_the_copy_starts_from_the_encoder_half():
    plain, net, _ = plain_and_controlled(2)
    own, source = net.control.state_dict(), plain.unet.state_dict()
    shared = [name for name in own if name in source]
    assert {name.split(".")[0] for name in shared} == {"time_embed", "conv_in", "down", "mid"}
    assert all(torch.equal(own[name], source[name]) for name in shared)
    assert {name.split(".")[0] for name in own if name not in source} == {"embedding", "zero_convs"}
    zeros = [n for n, v in own.items() if not v.any() and "norm" not in n and n not in source]
    assert {n.rsplit(".", 1)[0] for n in zeros} >= {"embedding.conv_out", "zero_convs.0", "zero_convs.4"}


@pytest.mark.parametrize("dims", [2, 3])
def test_a_trained_one_follows_the_map_and_leaves_samples_without_a_map_alone(dims):
    plain, net, (x_t, t, values) = plain_and_controlled(dims)
    randomised(net.control)
    without = plain(x_t, t, {"text": values["text"]})
    out = net(x_t, t, values)
    assert torch.equal(out[1], without[1])
    assert not torch.allclose(out[0], without[0])
    other = net(x_t, t, values | {"labels": values["labels"].roll(1, 2)})
    assert not torch.allclose(out[0], other[0])
    assert torch.equal(net(x_t, t, {"text": values["text"]}), without)
    late = net(x_t, t + 50, values)
    assert not torch.allclose(late[0], out[0])


def test_residuals_are_added_to_the_skips_and_to_the_middle():
    """The decoder half, taken apart: as if the U-Net's own encoder had given the sums."""
    _, net, (x_t, t, values) = plain_and_controlled(2)
    randomised(net.control)
    x_t, t = x_t[:1, :, :4], t[:1]  # a size that needs no padding
    values = {"text": values["text"][:1], "labels": values["labels"][:1, :, :4]}
    c, unet = net.encode_conditions(values, x_t), net.unet
    emb = unet.embed(t, c.emb)
    h, skips = unet.encode(x_t, emb, c.context, c.context_mask)
    hint = net.control.embedding(values["labels"])
    theirs = net.control(x_t, t, hint, c.hint.context, c.context_mask, c.emb)
    h, skips = h + theirs[-1], [a + b for a, b in zip(skips, theirs, strict=False)]
    for layer in unet.up:
        h = torch.cat([h, skips.pop()], 1) if hasattr(layer, "res") else h
        h = unet.run(layer, h, emb, c.context, c.context_mask, None)
    close(net(x_t, t, values), unet.output(h, x_t.shape[2:]))


def test_what_steps_of_sampling_share_is_computed_once():
    _, net, (x_t, t, values) = plain_and_controlled(2)
    randomised(net.control)
    encoded = net.encode_conditions(values, x_t)
    close(net(x_t, t, encoded), net(x_t, t, values))
    net.control.embedding = None
    for stage in net.control.attention_stages:
        stage.attention.cross_attn.kv = None
    assert torch.equal(net(x_t, t, encoded), net(x_t, t, encoded))
    hidden = hide(values["labels"], torch.ones(2, dtype=torch.bool))
    twin = copy.deepcopy(plain_and_controlled(2)[1])
    assert twin.encode_conditions({"labels": hidden}, x_t).hint is None


@pytest.mark.parametrize("dims", [2, 3])
def test_a_map_of_the_image_is_halved_once_for_each_further_width(dims):
    embedding = ControlEmbedding(dims, 3, (4, 6, 8), 10)
    assert not embedding(draw(2, 3, *(8,) * dims)).any()
    torch.nn.init.ones_(embedding.conv_out.weight)
    assert embedding(draw(2, 3, *(8,) * dims)).shape == (2, 10, *(2,) * dims)
    net = ControlNet(dataclasses.replace(UNET, dims=dims), 3, (4, 6, 8))
    hint = net.embedding(draw(2, 3, *(16,) * dims))
    residuals = net(draw(2, 3, *(4,) * dims), torch.ones(2), hint)
    assert [math.prod(r.shape[2:]) for r in residuals] == [4**dims, 4**dims, *[2**dims] * 3]


def test_the_condition_of_the_map_must_be_there():
    net, _ = controlled(2, False)
    with pytest.raises(InputError, match="control: expected labels as the last condition"):
        Denoiser(*net.arguments._replace(conditions=net.conditions[:1]))
    with pytest.raises(InputError, match=r"condition labels: expected a tensor of shape \(2, 4, 3, 3\)"):
        net(draw(2, 3, 3, 3), torch.ones(2), {"labels": draw(2, 3, 3, 3)})
