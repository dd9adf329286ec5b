"""Maps of many points in many dimensions: distances, principal components, and places for new points.

N cases of D numbers each, z (N, D), D far above N. All that is linear follows from their inner products
G_ij = z_i . z_j / D, N x N:

    distance    d_ij^2 = G_ii + G_jj - 2 G_ij
    centre      |z_i - mean of S|^2 / D = G_ii - 2 mean_{j in S} G_ij + mean_{j, k in S} G_jk
    PCA         K_ij = (z_i - m) . (z_j - m) / D, m the mean of the first n cases; its block of those is
                U L U^T. Scores K_i. U L^-1/2, of any case i: a second group falls into the space of the
                first (Schoelkopf, Smola & Mueller 1998, equations 15 and 17, with a linear kernel)

t-SNE (van der Maaten & Hinton 2008) gives neighbours j of a case i the weights

    p_j|i = exp(-beta_i d_ij^2) / sum_k,   beta_i so that exp(entropy of p_.|i) = perplexity      equation 1
    q_j   = 1 / (1 + |y - y_j|^2) / sum_k                                                         as in 4

and has no map for new cases. One goes where its own cost is least while all others stay:

    y = argmin KL(p_.|i || q)

Nothing here knows what the points are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inner_products(z: Tensor, num_first: int) -> Tensor:
    """z (N, C_z, *s) -> G / D (N, N) float64, after scaling the channels by the first num_first cases."""
    z = z.flatten(2)
    mean = z[:num_first].mean((0, 2), dtype=torch.float64)
    variance = z[:num_first].double().var((0, 2), correction=0)
    std = variance.clamp(min=1e-6 * float(variance.max()) + 1e-30).sqrt()  # a dead channel says nothing
    gram = torch.zeros(len(z), len(z), dtype=torch.float64)
    for c in range(z.shape[1]):
        for part in ((z[:, c].double() - mean[c]) / std[c]).split(1 << 16, dim=1):
            gram += part @ part.T
    return gram / (z.shape[1] * z.shape[2])


def pca(gram: Tensor, num_first: int, num: int) -> tuple[Tensor, Tensor]:
    """(scores (N, num), share of the first group's variance (num,)) of the first group's principal axes.

    Fewer than `num` if the first group spans fewer. The sign is chosen so that the largest score is positive.
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
    """(N, N) root mean square differences of any two cases."""
    own = gram.diagonal()
    squares = (own[:, None] + own - 2 * gram).clamp(min=0)
    return squares.fill_diagonal_(0).sqrt()


def to_centre(gram: Tensor, members: Tensor) -> Tensor:
    """(N,) distance of every case to the mean of the members, a mask (N,)."""
    inside = gram[members]
    return (gram.diagonal() - 2 * inside.mean(0) + inside[:, members].mean()).clamp(min=0).sqrt()


def neighbour_weights(squares: Tensor, perplexity: float) -> Tensor:
    """p_j|i (M, N) of t-SNE from squared distances (M, N): exp(-beta_i squares), each row's entropy
    log(perplexity), beta by bisection."""
    squares = squares - squares.min(1, keepdim=True).values
    squares = squares / squares.mean().clamp(min=1e-300)
    low, high = (torch.full_like(squares[:, :1], beta) for beta in (1e-12, 1e12))
    for _ in range(100):
        beta = (low * high).sqrt()
        p = torch.softmax(-beta * squares, 1)
        wide = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    return p


def place_new(scores: Tensor, known: Tensor, places: Tensor, perplexity: float) -> Tensor:
    """(M, 2) places of new cases (M, K) in the t-SNE `places` (N, 2) of `known` cases (N, K), which stay.

    The cost has many valleys: each new case goes down from the mean of its neighbours' places and from the
    places of the five nearest, and keeps the best end.
    """
    p = neighbour_weights(torch.cdist(scores, known).square(), perplexity)

    def cost(y: Tensor) -> Tensor:
        """KL(p || q) up to a constant, of y (M, S, 2): (M, S)."""
        q = torch.log_softmax(-torch.log1p((y[:, :, None] - places).square().sum(-1)), -1)
        return -(p[:, None] * q).sum(-1)

    nearest = places[p.topk(min(5, len(places))).indices]
    y = torch.cat([(p @ places)[:, None], nearest], 1).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=0.02 * places.std().item())
    for _ in range(300):
        optimizer.zero_grad()
        ends = cost(y)
        ends.sum().backward()
        optimizer.step()
    return y.detach()[torch.arange(len(y)), ends.argmin(1)]
