"""A map of points in many dimensions: distances, principal components, and positions for new points.

A latent may have a million numbers (D), but there are only some hundred cases (N). So everything linear is
computed from the N x N matrix of inner products, gram[i, j] = z_i . z_j / D:

    distance      d_ij^2 = gram[i, i] + gram[j, j] - 2 gram[i, j]
    to a centre   |z_i - mean of S|^2 / D
                  = gram[i, i] - 2 mean_{j in S} gram[i, j] + mean_{j, k in S} gram[j, k]
    PCA           centred[i, j] = (z_i - m) . (z_j - m) / D, where m is the mean of the first n cases. The
                  block of the first n cases has eigenvectors U and eigenvalues L. The scores of any case i
                  are centred[i, :n] U L^-1/2, so that a second group falls into the space of the first
                  (Schoelkopf, Smola & Mueller 1998, equations 15 and 17, with a linear kernel)

Example: z_1 = (0, 0) and z_2 = (2, 0) have gram = [[0, 0], [0, 2]], so d_12^2 = 0 + 2 - 0 = 2, which is the
mean of the squared differences 4 and 0.

t-SNE (van der Maaten & Hinton 2008) places cases in a plane so that neighbours stay neighbours. Seen from
case i, it gives every other case j a weight p_j in the latent space (equation 1) and a weight q_j in the
plane, where case i is at y and case j at y_j (as in equation 4):

    p_j = exp(-beta_i d_ij^2) / sum_k exp(-beta_i d_ik^2),   beta_i such that exp(entropy of p) = perplexity
    q_j = (1 + |y - y_j|^2)^-1 / sum_k (1 + |y - y_k|^2)^-1

t-SNE itself has no map for new cases. Here a new case goes where its own cost is least while all others stay:

    y = argmin KL(p || q)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inner_products(z: Tensor, num_first: int) -> Tensor:
    """gram (N, N) float64 of latents z (N, C_z, *s).

    Each channel is first shifted and scaled to mean 0 and variance 1 over the first `num_first` cases.
    """
    z = z.flatten(2)
    mean = z[:num_first].mean((0, 2), dtype=torch.float64)
    variance = z[:num_first].double().var((0, 2), correction=0)
    std = variance.clamp(min=1e-6 * float(variance.max()) + 1e-30).sqrt()  # a constant channel counts as 0
    gram = torch.zeros(len(z), len(z), dtype=torch.float64)
    for c in range(z.shape[1]):
        for part in ((z[:, c].double() - mean[c]) / std[c]).split(1 << 16, dim=1):
            gram += part @ part.T
    return gram / (z.shape[1] * z.shape[2])


def pca(gram: Tensor, num_first: int, num: int) -> tuple[Tensor, Tensor]:
    """Principal axes of the first `num_first` cases: (scores of all cases (N, num), shares of the variance).

    There are fewer than `num` axes if these cases span fewer. The sign of an axis is arbitrary: it is chosen
    so that the score of largest magnitude is positive.
    """
    first = gram[:num_first]
    centred = gram - gram[:, :num_first].mean(1, keepdim=True) - first.mean(0) + first[:, :num_first].mean()
    values, vectors = torch.linalg.eigh(centred[:num_first, :num_first])
    values, vectors = values.flip(0), vectors.flip(1)
    num = min(num, int((values > 1e-10 * values[0]).sum()))
    scores = centred[:, :num_first] @ vectors[:, :num] / values[:num].sqrt()
    largest = scores[:num_first].abs().argmax(0)
    signs = scores[largest, torch.arange(num)].sign()
    return scores * signs, values[:num] / values.clamp(min=0).sum()


def distances(gram: Tensor) -> Tensor:
    """The root mean square difference of each two cases, (N, N)."""
    own = gram.diagonal()
    squares = (own[:, None] + own - 2 * gram).clamp(min=0)
    return squares.fill_diagonal_(0).sqrt()


def to_centre(gram: Tensor, members: Tensor) -> Tensor:
    """The distance of every case to the mean of some cases, (N,). members: mask (N,) of these cases."""
    inside = gram[members]
    return (gram.diagonal() - 2 * inside.mean(0) + inside[:, members].mean()).clamp(min=0).sqrt()


def neighbour_weights(squares: Tensor, perplexity: float) -> Tensor:
    """The weights p (M, N) of t-SNE from squared distances (M, N): each row is p of one case.

    Each row's beta is found by bisection, such that the entropy of the row is log(perplexity).
    """
    squares = squares - squares.min(1, keepdim=True).values
    squares = squares / squares.mean().clamp(min=1e-300)
    low, high = (torch.full_like(squares[:, :1], beta) for beta in (1e-12, 1e12))
    for _ in range(100):
        beta = (low * high).sqrt()
        p = torch.softmax(-beta * squares, 1)
        wide = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    return p


def place_new(new: Tensor, mapped: Tensor, positions: Tensor, perplexity: float) -> Tensor:
    """Positions (M, 2) of new cases in a t-SNE map.

    new (M, K): scores of the new cases; mapped (N, K): scores of the cases in the map; positions (N, 2):
    where these are. The cost has many minima. So each new case descends from several starts, the mean of its
    neighbours' positions and the positions of the five nearest, and the end of least cost is taken.
    """
    p = neighbour_weights(torch.cdist(new, mapped).square(), perplexity)

    def cost(y: Tensor) -> Tensor:
        """KL(p || q) up to a constant, (M, S), at S positions y (M, S, 2) of each new case."""
        q = torch.log_softmax(-torch.log1p((y[:, :, None] - positions).square().sum(-1)), -1)
        return -(p[:, None] * q).sum(-1)

    nearest = positions[p.topk(min(5, len(positions))).indices]
    y = torch.cat([(p @ positions)[:, None], nearest], 1).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=0.02 * positions.std().item())
    for _ in range(300):
        optimizer.zero_grad()
        ends = cost(y)
        ends.sum().backward()
        optimizer.step()
    return y.detach()[torch.arange(len(y)), ends.argmin(1)]
