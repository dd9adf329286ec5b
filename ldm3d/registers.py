"""Anatomical registers: learned tokens that the U-Net reads, each bound to one label of the masks.

A denoiser learns anatomy only as far as anatomy helps to predict noise, and small structures help little.
Registers are a memory with an address for each label: tokens that are the same for all samples and that every
attention layer may look up. In training, masks teach each voxel to look up the registers of its own label. So
the U-Net has to find the labels in a noisy latent, and a small head on its last features can draw them.

The bank R holds M registers of width E for each of K labels, the background included. After each attention
layer, with features h (B, C, *s),

    r = R (1 + a) + b,   (a, b) = W silu(emb), zero at first              registers depend on the noise level
    q = W_q (norm(h) + W_p u),   u = position_features of the voxel       reading depends on the position
    A = softmax(q k^T / sqrt(d)),   k, v = W_k r, W_v r                   attention map (B, heads, N, K M)
    h = h + gate W_o (A v)                       gate = 0 at first: a pretrained U-Net is left as it was

Example: 5 labels with 4 registers of width 128 are a bank (5, 4, 128), 20 tokens. At a layer with h
(2, 96, 8, 10, 8) and 3 heads, 640 voxels attend to 20 registers: A is (2, 3, 640, 20). The mean over heads,
as a map, is (2, 20, 8, 10, 8); the sum over the 4 registers of each label is (2, 5, 8, 10, 8). The binding
loss compares this sum with the shares of the labels in the mask, pooled to 8 x 10 x 8 voxels.

Losses, with y (B, K, *s) the share of each label in a voxel, A_c the attention to all registers of label c,
and p the softmax of the head's logits:

    binding    = mean over layers of CE_b(A, y),   b = balance            a register comes to mean its label
    head       = CE_b(p, y) + Dice(p, y),          b = head_balance
    CE_b(q, y) = sum_c w_c CE_c / sum_c w_c,       w_c = f_c^(1 - b)
    CE_c       = -sum_v y_c log q_c / sum_v y_c                           cross-entropy in the voxels of c
    f_c        = sum_v y_c / sum_c sum_v y_c                              share of label c in the sample

The balance b decides how much a rare label counts. With 990 voxels of background and 10 of lesion, the two
weights w_c are 0.99 and 0.01 for b = 0, where all voxels count alike; 0.995 and 0.1 for b = 0.5; 1 and 1 for
b = 1, where all labels do. With head_balance above 0 the head draws rare labels sooner, but too large.

    loss         = diffusion loss + w(step) signal_share (head + binding_weight binding)
    signal_share = alpha_t^2 / (alpha_t^2 + sigma_t^2)                   0 in pure noise, which shows no label

w falls from a strong over a balanced to a minimal weight (`anatomy_weight`). A sample without a mask adds 0
to the mean over the batch: each mask weighs alike, however many samples have one and on whichever rank.
Sampling needs no mask.

The head predicts one patch of the label map for each latent voxel (Shi et al. 2016, arXiv 1609.05158), so
label maps are as fine as images. Register tokens: Darcet et al. 2023, arXiv 2309.16588. Zero gates: Alayrac
et al. 2022, arXiv 2204.14198. Left out: registers that carry information from one layer to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import CrossAttention, DepthToSpace, pad_to_multiple, position_features, to_map, to_tokens
from .conditions import absent, label_shares
from .config import InputError, at_least
from .losses import dice_loss
from .normconv import Conv, GroupNorm, norm_conv
from .unet import UNetConfig

NUM_FREQUENCIES = 4  # of the position features: the finest wave spans an eighth of an axis


@dataclass(frozen=True)
class AnatomyConfig:
    registers: Literal["off", "free", "bound"] = "off"  # bound: to the labels of masks; free: the bank alone
    per_label: int = 4  # registers of each label, the background included
    dim: int = 128  # width of a register
    weights: tuple[float, float, float] = (0.5, 0.25, 0.0625)  # of both losses: strong, balanced, minimal
    phases: tuple[float, float, float] = (0.2, 0.4, 0.8)  # shares of run.steps at which the weights hold
    binding_weight: float = 1.0  # weight of the binding loss (on attention) relative to the head's loss
    balance: float = 0.5  # binding loss; 0: every voxel counts alike, 1: every label of a sample
    head_balance: float = 0.0  # the head's loss; above 0 rare labels are learned sooner, but too large
    head_width: int = 64  # channels of the head that predicts labels

    def __post_init__(self) -> None:
        at_least(self, 1, "per_label", "dim", "head_width")
        at_least(self, 0, "binding_weight")
        if min(self.weights) < 0:
            raise InputError(f"weights: expected numbers from 0 on, got {self.weights}")
        if not 0 <= self.phases[0] <= self.phases[1] <= self.phases[2] <= 1:
            raise InputError(f"phases: expected three rising shares from 0 to 1, got {self.phases}")
        for name in ("balance", "head_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")


def anatomy_weight(config: AnatomyConfig, step: int, steps: int) -> float:
    """w(step) of optimizer step `step` (from 0) of `steps`: how strongly masks count at this step.

    weights[0] until phases[0] of the run is done, then straight lines through (phases[i], weights[i]), then
    weights[2]. With the defaults and 1000 steps: 0.5 up to step 200, 0.25 at 400, 0.0625 from 800 on.
    """
    done = step / max(1, steps)
    knots = list(zip(config.phases, config.weights, strict=True))
    for (start, before), (end, after) in pairwise(knots):
        if done < end:
            return before + (after - before) * max(0.0, done - start) / max(end - start, 1e-9)
    return config.weights[-1]


# --- the bank -----------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """The reading of one attention layer: h (B, C, *s) attends to the bank (B, K M, E), behind a gate."""

    def __init__(self, unet: UNetConfig, channels: int, num_heads: int, dim: int):
        super().__init__()
        self.norm = GroupNorm(channels, unet.num_groups, unet.gn_eps)
        self.place = nn.Linear(2 * NUM_FREQUENCIES * unet.dims, channels, bias=False)  # W_p
        self.attention = CrossAttention(channels, dim, num_heads, gate=True)

    def forward(self, h: Tensor, bank: Tensor, maps: list[Tensor] | None) -> Tensor:
        size = h.shape[2:]
        positions = to_tokens(position_features(size, NUM_FREQUENCIES, h.device))  # (1, N, P)
        tokens = to_tokens(self.norm(h)) + self.place(positions)  # (B, N, C)
        if maps is None:
            return h + to_map(self.attention(tokens, bank), size)
        out, weights = self.attention(tokens, bank, return_map=True)  # (B, heads, N, K M)
        maps.append(to_map(weights.mean(1), size))
        return h + to_map(out, size)


class Registers(nn.Module):
    """The bank and one reader for each attention layer, which `layers` gives as (channels, heads).

    A U-Net calls `registers(h, emb, maps, layer_idx=...)` after each of these layers and goes on with the h
    that comes back. A list `maps` receives the layer's attention map (B, K M, *s), the M registers of a label
    side by side, in fp32 and by an explicit softmax; with None attention is fused, which is faster. With
    `on = False` the same h comes back, so that samples with registers and without can be compared.
    """

    def __init__(
        self, config: AnatomyConfig, unet: UNetConfig, num_labels: int, layers: Sequence[tuple[int, int]]
    ):
        super().__init__()
        self.on = True
        self.bank = nn.Parameter(torch.randn(num_labels, config.per_label, config.dim))
        self.modulation = nn.Linear(unet.emb_width, 2 * config.dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.readers = nn.ModuleList(Reader(unet, *layer, config.dim) for layer in layers)

    def forward(self, h: Tensor, emb: Tensor, maps: list[Tensor] | None = None, *, layer_idx: int) -> Tensor:
        if not self.on:
            return h
        a, b = self.modulation(F.silu(emb))[:, None].chunk(2, dim=-1)  # (B, 1, E) each
        r = torch.addcmul(b, self.bank.flatten(0, 1), 1 + a)  # R (1 + a) + b, (B, K M, E)
        return self.readers[layer_idx](h, r, maps)


# --- the head -----------------------------------------------------------------------------------------------


class LabelHead(nn.Module):
    """A label map from the U-Net's finest features: h (B, C, *s) -> logits (B, K, *(factor s))."""

    def __init__(self, config: AnatomyConfig, unet: UNetConfig, num_labels: int, factor: Sequence[int]):
        super().__init__()
        width, options = config.head_width, (unet.num_groups, unet.gn_eps)
        self.norm1 = GroupNorm(unet.channels[0], *options)
        self.conv1 = Conv(unet.dims, unet.channels[0], width)
        self.norm2 = GroupNorm(width, *options)
        self.conv2 = Conv(unet.dims, width, num_labels * math.prod(factor), kernel=1)
        self.to_voxels = DepthToSpace(factor)

    def forward(self, h: Tensor) -> Tensor:
        h = norm_conv(self.norm1, self.conv1, h)
        return self.to_voxels(norm_conv(self.norm2, self.conv2, h))


# --- losses -------------------------------------------------------------------------------------------------


def balanced_cross_entropy(log_q: Tensor, y: Tensor, balance: float) -> Tensor:
    """CE_b(q, y) of the module's docstring, (B,), from log_q and y (B, K, *s); 0 where y is 0 everywhere."""
    voxels = y.flatten(2).sum(2)  # (B, K) of each label
    ce = -(log_q * y).flatten(2).sum(2) / voxels.clamp(min=1e-6)  # CE_c
    f = voxels / voxels.sum(1, keepdim=True).clamp(min=1e-6)
    w = torch.where(voxels > 0, f.pow(1 - balance), 0.0)  # a label that the sample lacks counts nothing
    return (w * ce).sum(1) / w.sum(1).clamp(min=1e-6)


def head_loss(logits: Tensor, mask: Tensor, balance: float) -> Tensor:
    """The loss of the head, (B,), from logits (B, K, *S') and mask (B, *S); 0 for samples without a mask.
    Voxels of -1 have no part in it.

    S' is S rounded up to whole latent voxels. The edge of the mask is repeated up to S', as the autoencoder
    repeats the edge of images.
    """
    logits, num_labels, size = logits.float(), logits.shape[1], logits.shape[2:]
    mask = pad_to_multiple(mask[:, None], size)[:, 0]
    shares = label_shares(mask, num_labels, (1,) * len(size)).nan_to_num(0.0)
    loss = balanced_cross_entropy(logits.log_softmax(1), shares, balance)
    if num_labels > 1:  # Dice leaves the background out
        loss = loss + dice_loss(logits.softmax(1), shares, (mask >= 0).float())
    return loss * ~absent(mask)


def by_label(weights: Tensor, num_labels: int) -> Tensor:
    """An attention map (B, K M, *s) -> (B, K, M, *s): the M registers of each of K labels."""
    return weights.unflatten(1, (num_labels, -1))


def binding_loss(
    maps: Sequence[Tensor],
    mask: Tensor,
    num_labels: int,
    factor: Sequence[int],
    multiple: Sequence[int],
    balance: float,
) -> Tensor:
    """The loss of the attention, (B,), from the maps (B, K M, *s) of all attention layers and mask (B, *S).

    factor: voxels of the mask in one voxel of x_t, the autoencoder's down-sampling. multiple: the size that
    the U-Net pads x_t to a multiple of. Samples without a mask have the loss 0.
    """
    shares, terms = label_shares(mask, num_labels, factor).nan_to_num(0.0), []
    shares = pad_to_multiple(shares, multiple)
    pool = F.avg_pool2d if len(factor) == 2 else F.avg_pool3d
    for weights in maps:
        attention = by_label(weights, num_labels).sum(2)  # (B, K, *s)
        window = [n // m for n, m in zip(shares.shape[2:], weights.shape[2:], strict=True)]
        terms.append(balanced_cross_entropy((attention + 1e-6).log(), pool(shares, window), balance))
    return torch.stack(terms).mean(0)
