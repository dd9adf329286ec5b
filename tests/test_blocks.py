"""Every trick of blocks.py gives the numbers, and the gradients, of the plain formula."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from closeness import all_close, close, gradients
from torch import nn

from ldm3d.blocks import (
    AttentionBlock,
    CrossAttention,
    Decoder,
    DepthToSpace,
    Downsample,
    Encoder,
    ResBlock,
    SelfAttention,
    SpaceToDepth,
    TransformerBlock,
    Upsample,
    crop_to,
    pad_to_multiple,
    run_layer,
    timestep_embedding,
)
from ldm3d.normconv import channels_last, is_channels_last


def image(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def all_strides(dims):
    return list(itertools.product((1, 2), repeat=dims))


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 6, 7), (4, 6, 8), (1, 1, 1)])
def test_padding_repeats_the_edge_and_cropping_takes_it_away(size):
    x = image(2, 3, *size)
    padded = pad_to_multiple(x, (4, 2, 3))
    missing = [-n % m for n, m in zip(size, (4, 2, 3), strict=True)]
    expected = F.pad(x, [p for m in reversed(missing) for p in (0, m)], mode="replicate")
    assert torch.equal(padded, expected)
    assert torch.equal(crop_to(padded, size), x)


# --- residual block and checkpointing -------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("width", [6, 9])
def test_residual_block_is_its_formula(dims, width):
    block = ResBlock(dims, 6, width, emb_dim=5, num_groups=3)
    x, emb = image(2, 6, *(4, 5, 6)[:dims], grad=True), image(2, 5, seed=1, grad=True)
    convolve = F.conv2d if dims == 2 else F.conv3d
    h = convolve(
        F.silu(F.group_norm(x, 3, block.norm1.weight, block.norm1.bias, 1e-6)), *conv_args(block.conv1, 1)
    )
    h = h + block.emb_proj(F.silu(emb)).reshape(2, width, *(1,) * dims)
    h = convolve(
        F.silu(F.group_norm(h, 3, block.norm2.weight, block.norm2.bias, 1e-6)), *conv_args(block.conv2, 1)
    )
    plain = h + (x if width == 6 else convolve(x, *conv_args(block.skip, 0)))
    out = block(x, emb)
    close(out, plain)
    all_close(gradients(block, out, x, emb), gradients(block, plain, x, emb))


@pytest.mark.parametrize("dims", [2, 3])
def test_an_adaptive_norm_scales_and_shifts_by_the_embedding_and_does_nothing_at_first(dims):
    block = ResBlock(dims, 6, 9, emb_dim=5, num_groups=3, adaptive_norm=True)
    x, emb = image(2, 6, *(4, 5, 6)[:dims], grad=True), image(2, 5, seed=1, grad=True)
    assert torch.equal(block(x, emb), block(x, 7 * emb))
    nn.init.normal_(block.emb_proj.weight)
    convolve = F.conv2d if dims == 2 else F.conv3d
    norms = [(n.num_groups, n.weight, n.bias, 1e-6) for n in (block.norm1, block.norm2)]
    h = convolve(F.silu(F.group_norm(x, *norms[0])), *conv_args(block.conv1, 1))
    scale, shift = block.emb_proj(F.silu(emb)).view(2, 2, 9, *(1,) * dims).unbind(1)
    h = convolve(F.silu((1 + scale) * F.group_norm(h, *norms[1]) + shift), *conv_args(block.conv2, 1))
    plain, out = h + convolve(x, *conv_args(block.skip, 0)), block(x, emb)
    close(out, plain)
    all_close(gradients(block, out, x, emb), gradients(block, plain, x, emb))


def conv_args(conv, padding):
    return conv.weight, conv.bias, 1, padding


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_equal_plain_ones(dropout):
    block = ResBlock(3, 4, 6, emb_dim=5, num_groups=2, dropout=dropout)
    x, emb = image(2, 4, 4, 4, 4, grad=True), image(2, 5, seed=1)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        out = run_layer(block, x, emb, checkpointing=checkpointing)
        results.append((out, *gradients(block, out, x)))
    all_close(results[1], results[0], 1e-6)


# --- attention ------------------------------------------------------------------------------------


def naive_attention(q, k, v, heads, mask=None):
    """Loops over samples, heads and queries in float64. q (B, N, C), k and v (B, M, C), mask (B, M)."""
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    out = torch.zeros_like(q)
    d = q.shape[-1] // heads
    for b, h, n in itertools.product(range(q.shape[0]), range(heads), range(q.shape[1])):
        part = slice(h * d, (h + 1) * d)
        use = range(k.shape[1]) if mask is None else [m for m in range(k.shape[1]) if mask[b, m]]
        scores = [math.exp(q[b, n, part] @ k[b, m, part] / math.sqrt(d)) for m in use]
        for m, score in zip(use, scores, strict=True):
            out[b, n, part] += score / sum(scores) * v[b, m, part]
    return out


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("out_proj", [True, False])
def test_self_attention_is_a_softmax_in_float64(heads, out_proj):
    attn, tokens = SelfAttention(6, heads, out_proj=out_proj), image(2, 5, 6)
    q, k, v = (
        tokens @ w.T + b for w, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True)
    )
    expected = naive_attention(q, k, v, heads)
    if out_proj:
        expected = expected @ attn.out_proj.weight.double().T + attn.out_proj.bias.double()
    close(attn(tokens), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("return_map", [False, True])
def test_cross_attention_is_a_softmax_in_float64_over_the_keys_the_mask_allows(masked, return_map):
    attn, tokens, context = CrossAttention(6, 4, num_heads=2), image(3, 5, 6), image(3, 7, 4, seed=1)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    if masked:
        mask[2] = False  # a sample without any token: attention gives zeros, the projection its bias
    k, v = (context @ w.T for w in attn.kv.weight.chunk(2))
    expected = naive_attention(tokens @ attn.q.weight.T, k, v, 2, mask)
    expected = expected @ attn.out_proj.weight.double().T + attn.out_proj.bias.double()
    out = attn(tokens, context, mask, return_map)
    if return_map:
        out, weights = out
        assert weights.shape == (3, 2, 5, 7)
        sums = weights.sum(-1)
        close(sums[:2], torch.ones_like(sums[:2]))
        assert mask is None or not weights[2].any()
    close(out, expected)


def test_attention_map_gives_the_same_gradients_as_the_fused_kernel():
    attn, tokens, context = (
        CrossAttention(6, 4, num_heads=2),
        image(2, 5, 6, grad=True),
        image(2, 7, 4, seed=1),
    )
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    fused = attn(tokens, context, mask)
    explicit, _ = attn(tokens, context, mask, return_map=True)
    close(explicit, fused)
    all_close(gradients(attn, explicit, tokens), gradients(attn, fused, tokens))


def test_masked_context_tokens_have_no_influence():
    attn, tokens, context = CrossAttention(6, 4), image(1, 5, 6), image(1, 7, 4, seed=1)
    mask = torch.tensor([[True] * 3 + [False] * 4])
    close(attn(tokens, context, mask), attn(tokens, context[:, :3]))


def test_a_closed_gate_adds_nothing_and_opens_by_its_gradient():
    attn = CrossAttention(6, 4, gate=True)
    out = attn(image(1, 5, 6), image(1, 7, 4))
    assert not out.any()
    (gradient,) = torch.autograd.grad(out.square().sum() + out.sum(), [attn.gate])
    assert gradient != 0


def test_attention_dropout_acts_in_training_only():
    attn, tokens = SelfAttention(6, 1, dropout=0.5), image(1, 9, 6)
    assert not torch.equal(attn(tokens), attn(tokens))
    attn.eval()
    assert torch.equal(attn(tokens), attn(tokens))


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_block_runs_over_all_positions_in_order(dims):
    block, x = AttentionBlock(6, 2, num_groups=3), image(2, 6, *(2, 3, 4)[:dims])
    tokens = block.norm(x).reshape(2, 6, -1).transpose(1, 2)
    close(block(x), x + block.attn(tokens).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("dims", [2, 3])
def test_transformer_block_is_its_formula_and_the_identity_at_first(dims):
    block = TransformerBlock(dims, 6, context_dim=4, num_heads=2, num_groups=3)
    x, context = image(2, 6, *(2, 3, 4)[:dims]), image(2, 7, 4, seed=1)
    assert torch.equal(block(x, context), x)
    nn.init.normal_(block.proj_out.weight)
    tokens = block.proj_in(block.norm(x)).reshape(2, 6, -1).transpose(1, 2)
    tokens = tokens + block.attn(block.norm1(tokens))
    tokens = tokens + block.cross_attn(block.norm2(tokens), context)
    value, gate = block.ff.linear1(block.norm3(tokens)).split(24, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    tokens = tokens + block.ff.linear2(value * gelu)
    close(block(x, context), x + block.proj_out(tokens.transpose(1, 2).reshape(x.shape)))


# --- re-sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", all_strides(2) + all_strides(3))
@pytest.mark.parametrize("pad", ["asym", "sym"])
def test_downsampling_pads_the_end_or_both_sides(strides, pad):
    dims = len(strides)
    down, x = Downsample(dims, 4, strides, pad), image(2, 4, *(4, 6, 8)[:dims])
    before, after = ([1 if pad == "sym" or s == 1 else 0 for s in strides], [1] * dims)
    padded = F.pad(x, [p for b, a in zip(reversed(before), reversed(after), strict=True) for p in (b, a)])
    convolve = F.conv2d if dims == 2 else F.conv3d
    expected = convolve(padded, down.conv.weight, down.conv.bias, strides)
    out = down(x)
    assert out.shape[2:] == tuple(n // s for n, s in zip(x.shape[2:], strides, strict=True))
    close(out, expected[tuple(slice(0, n) for n in out.shape)])


@pytest.mark.parametrize("strides", all_strides(2) + all_strides(3))
@pytest.mark.parametrize("large", [False, True])
def test_fast_upsampling_equals_plain_upsampling_with_its_gradients(strides, large):
    dims = len(strides)
    up = Upsample(dims, 4, strides)
    size = ((24, 22) if dims == 2 else (8, 9, 10)) if large else (3, 4, 5)[:dims]
    x = image(2, 4, *size, grad=True)
    repeated = x
    for axis, s in enumerate(strides, start=2):
        repeated = repeated.repeat_interleave(s, dim=axis)
    plain = (F.conv2d if dims == 2 else F.conv3d)(repeated, up.conv.weight, up.conv.bias, padding=1)
    out = up(x)
    close(out, plain)
    all_close(gradients(up, out, x), gradients(up, plain, x))
    with torch.no_grad():
        close(up(x), plain)  # without gradients the kernel is folded at every size


def test_the_folded_kernel_follows_the_weights():
    up, x = Upsample(3, 4, (2, 2, 2)), image(1, 4, 3, 3, 3)
    with torch.no_grad():
        up.conv.bias.zero_()
        first = up(x)
        up.conv.weight.mul_(2.0)
        close(up(x), 2 * first)


@pytest.mark.parametrize("strides", [(2, 2), (1, 2), (2, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("kind", ["trilinear", "deconv2", "deconv3"])
def test_other_kinds_of_upsampling_multiply_the_size_by_the_strides(strides, kind):
    dims = len(strides)
    up, x = Upsample(dims, 4, strides, kind), image(2, 4, *(3, 4, 5)[:dims])
    out = up(x)
    assert out.shape[2:] == tuple(n * s for n, s in zip(x.shape[2:], strides, strict=True))
    if kind == "trilinear":  # a linear ramp stays one in the interior
        ramp = torch.arange(8.0).reshape(1, 1, -1, *(1,) * (dims - 1)).expand(1, 4, 8, *(4,) * (dims - 1))
        nn.init.zeros_(up.conv.weight)
        up.conv.weight.data[(slice(None), 0, *(1,) * dims)] = 1.0
        nn.init.zeros_(up.conv.bias)
        steps = up(ramp).diff(dim=2)
        close(steps[:, :, 1:-1], torch.full_like(steps[:, :, 1:-1], 1.0 / strides[0]))


@pytest.mark.parametrize("factor", [(2, 2), (1, 2), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_space_to_depth_is_inverted_exactly_and_keeps_neighbours_together(factor):
    x = image(2, 3, *(4, 6, 8)[: len(factor)])
    packed = SpaceToDepth(factor)(x)
    assert packed.shape == (
        2,
        3 * math.prod(factor),
        *(n // f for n, f in zip(x.shape[2:], factor, strict=True)),
    )
    assert torch.equal(DepthToSpace(factor)(packed), x)
    block = x[(1, 2, *(slice(0, f) for f in factor))].flatten()
    assert torch.equal(packed[(1, slice(2 * math.prod(factor), None), *(0,) * len(factor))], block)


@pytest.mark.parametrize("dims", [2, 3])
def test_without_gradients_the_maps_behind_a_stem_keep_the_layout_that_saves_copies(dims):
    x = channels_last(image(1, 1, *(8,) * dims))
    with torch.no_grad():
        packed = SpaceToDepth((2,) * dims)(x)
    assert is_channels_last(packed)
    assert torch.equal(packed, SpaceToDepth((2,) * dims)(x))


# --- trunks and time ------------------------------------------------------------------------------


def test_trunks_are_one_flat_list_that_forward_walks():
    shape = {
        "channels": (4, 6),
        "num_res_blocks": (1, 2),
        "attention_levels": (False, True),
        "strides": ((2, 1, 2),),
        "stem": (1, 2, 2),
        "mid_attention": True,
    }
    encoder, decoder = Encoder(3, 1, 3, **shape), Decoder(3, 3, 1, **shape)
    level, middle = "ResBlock AttentionBlock " * 2, "ResBlock AttentionBlock ResBlock "
    names = " ".join(type(layer).__name__ for layer in encoder.layers)
    assert names == f"SpaceToDepth Conv ResBlock Downsample {level}{middle}GroupNorm Conv"
    names = " ".join(type(layer).__name__ for layer in decoder.layers)
    assert names == f"Conv {middle}{level}Upsample ResBlock GroupNorm Conv DepthToSpace"
    x = image(1, 1, 4, 4, 8)
    z = encoder(x)
    assert z.shape == (1, 3, 2, 2, 2)
    by_hand = z
    for layer in decoder.layers:
        by_hand = layer(by_hand)
    close(decoder(z), by_hand)
    assert by_hand.shape == x.shape


@pytest.mark.parametrize("dims", [2, 3])
def test_a_shortcut_adds_a_linear_map_of_blocks_and_leaves_the_layers_as_they_begin(dims):
    block = (2, 4, 2)[:dims]
    shape = {
        "channels": (4, 6),
        "num_res_blocks": (1,) * 2,
        "attention_levels": (False,) * 2,
        "strides": ((1, 2, 2)[:dims],),
        "stem": (2, 2, 1)[:dims],
    }
    for trunk, x in ((Encoder, image(2, 1, *(8, 8, 4)[:dims])), (Decoder, image(2, 3, *(4, 2, 2)[:dims]))):
        args = (dims, 1, 3) if trunk is Encoder else (dims, 3, 1)
        torch.manual_seed(0)
        plain = trunk(*args, **shape)
        torch.manual_seed(0)
        both = trunk(*args, **shape, shortcut=True)
        for name, value in plain.state_dict().items():
            assert torch.equal(both.state_dict()[name], value)
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        weight, bias = (p for name, p in both.named_parameters() if "shortcut" in name)
        if trunk is Encoder:
            linear = conv(1, 3, block, block)  # one patch of voxels after the other
            linear.weight.data = weight.view(3, 1, *block)
        else:
            assert torch.equal(both(x), plain(x))  # begins as zero
            nn.init.normal_(weight)
            nn.init.normal_(bias)
            linear = (nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(3, 1, block, block, bias=False)
            linear.weight.data = weight.view(*block, 3).movedim(-1, 0)[:, None]
        found = both(x) - plain(x)
        if trunk is Encoder:
            linear.bias.data = bias
            close(found, linear(x))
        else:
            close(
                found,
                linear(x) + DepthToSpace(block)(bias.view(1, -1, *(1,) * dims).expand(2, -1, *x.shape[2:])),
            )


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize("dim", [6, 7])
def test_timestep_embedding_is_its_formula(cos_first, dim):
    t = torch.tensor([0.0, 1.5, 999.0])
    half = dim // 2
    for row, time in zip(timestep_embedding(t, dim, cos_first), t.tolist(), strict=True):
        angles = [time * 10000.0 ** (-i / half) for i in range(half)]
        cosines, sines = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
        expected = (cosines + sines if cos_first else sines + cosines) + [0.0] * (dim % 2)
        assert torch.allclose(row.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4)
