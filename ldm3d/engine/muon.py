"""Muon: an optimizer for weight matrices, which takes fewer steps than AdamW to the same loss.

The gradient of a weight matrix is dominated by a few directions: most of its singular values are small. A
step along the gradient, or along the quotient of AdamW, learns these directions again and again, and the
others hardly. Muon takes the average gradient apart, G = U S V^T, and steps along U V^T: every direction
alike [1].

    M     = momentum M + (1 - momentum) gradient                                   the average gradient
    G     = (1 - momentum) gradient + momentum M                                   Nesterov's look ahead
    step  = lr * 0.2 sqrt(max(rows, columns)) * U V^T                              as large as AdamW's [2]

The kernel of a convolution (C_out, C_in, *k) is a matrix of C_out rows. Left to AdamW (`split_parameters`)
are biases, norms, matrices of fewer than THIN rows or columns, and what is no linear map: tables of
embeddings, codebooks, adapters. A step of Muon would move all rows of a table alike, also those of words
that the batch does not hold.

Presets and plans with Muon have three times the learning rate that they have with AdamW. What it brings
stands in tests/benchmarks/README.md, quality in given minutes.

U V^T comes without a singular value decomposition. An odd polynomial p(s) = a s + b s^3 + c s^5 that pushes
every s in (0, 1] towards 1 acts on all singular values at once, since G (G^T G)^n = U S^(2n + 1) V^T. Five
rounds leave most of them between 0.7 and 1.2, near enough [1]. The rounds need only the small square matrix
A = X X^T, with p(X) = (a + b A + c A^2) X. So the wide X, rows of 3^3 C_in numbers, is multiplied twice, not
ten times. On CPUs that matters: where batches are small, Muon takes a large part of the time of a step.

[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks. [2] Liu et al. 2025, arXiv
2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ROUNDS = 5
POLYNOMIAL = 3.4445, -4.7750, 2.0315  # a, b, c of [1]
THIN = 16  # rows or columns below which a matrix is left to AdamW


def split_parameters(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, all others), of the parameters that are trained. Weights of linear layers and of
    convolutions are called "weight", with spectral norm "original"."""
    tables = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    matrices, others = [], []
    for name, p in net.named_parameters():
        linear = name.split(".")[-1] in ("weight", "original") and id(p) not in tables
        wide = p.ndim > 1 and min(p.shape[0], p[0].numel()) >= THIN
        if p.requires_grad:
            (matrices if linear and wide else others).append(p)
    return matrices, others


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T (rows, columns), in fp32."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    x = matrix.float()
    x = x / x.norm().clamp(min=1e-12)  # no singular value above 1
    a, b, c = POLYNOMIAL
    gram, eye = x @ x.T, torch.eye(len(x), device=x.device)
    product = eye
    for _ in range(ROUNDS):
        factor = a * eye + b * gram + c * gram @ gram  # p(X) = factor X
        product = factor @ product
        gram = factor @ gram @ factor  # of p(X), since factor is symmetric
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more axes, whose first axis counts as the rows. momentum: of the average
    gradient. weight_decay: decoupled, as AdamW's."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(average, momentum).flatten(1)
                update = orthogonalised(ahead).view_as(p)
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * 0.2 * max(ahead.shape) ** 0.5)
