"""Low-rank adapters: a trained network learns something new with few weights, and keeps those it has.

Fine-tuning moves every weight of a network. A small set of volumes asks for less: the change of a weight
matrix W is learned as a product of two thin ones, and W stays frozen (Hu et al. 2021, arXiv 2106.09685,
section 4.1):

    W' = W + B A,       W (m, n),  B (m, r), zero at first,  A (r, n)

Since B is zero, the network starts as it was, to the bit. The kernel (C_out, C_in, k, k, k) of a convolution
counts as a matrix (C_out, C_in k^3). Example: a convolution of 128 to 128 channels with kernel 3 has 442,368
weights; its adapter of rank 4 has 4 (128 + 3456) = 14,336.

The codes of a VQ autoencoder belong to W: they stay as they are, be they parameters or running means.

Adapters stand at every linear layer (attention and embeddings) and every convolution. They are
parametrizations of PyTorch (torch.nn.utils.parametrize): whoever reads `layer.weight` gets W + B A, so no
layer knows of them. `merge` puts W + B A in the place of all three, so a run that is opened for use is an
ordinary network. The paper's factor alpha / r is left out: with Adam it acts like another learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import at_least


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 0  # of low-rank adapters, which train in place of run.init's weights; 0 = all train

    def __post_init__(self) -> None:
        at_least(self, 0, "rank")


class LowRank(nn.Module):
    """W (m, ...) -> W + B A, of the rank r, or the full rank of W where that is smaller."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        self.a = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.normal_(self.a, std=1 / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def add_adapters(net: nn.Module, rank: int) -> None:
    """Freeze `net`, and put an adapter, which trains, at every linear layer and convolution."""
    net.requires_grad_(False)
    for layer in list(net.modules()):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and not isinstance(layer, nn.Embedding):
            parametrize.register_parametrization(layer, "weight", LowRank(weight, rank))


ORIGINAL = ".parametrizations.weight.original"


def merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network with adapters -> that of the same network without, with W + B A as its weights.
    A state without adapters stays as it is."""
    merged = {}
    for name, value in state.items():
        if name.endswith(ORIGINAL):
            at = name.removesuffix("original")
            product = state[f"{at}0.b"] @ state[f"{at}0.a"]
            merged[name.replace(ORIGINAL, ".weight")] = value + product.view_as(value)
        elif ".parametrizations.weight." not in name:
            merged[name] = value
    return merged
