"""All geometry of a map follows from inner products: scores, distances and places equal the direct
computation."""

import math

import pytest
import torch

from ldm3d.reports.projections import distances, inner_products, neighbour_weights, pca, place_new, to_centre


def some_latents(dims: int, num: int = 14, channels: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(dims)
    z = torch.randn(num, channels, *(3, 5, 4)[:dims], generator=draw)
    return z * torch.tensor([0.1, 1.0, 20.0]).view(1, -1, *[1] * dims) + 3.0


def standardised(z: torch.Tensor, num_first: int) -> torch.Tensor:
    """(N, D) float64: every channel scaled by the mean and deviation of all numbers of the first cases."""
    rows = []
    for channel in z.double().unbind(1):
        first = channel[:num_first]
        rows.append(((channel - first.mean()) / first.std(correction=0)).flatten(1))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_scores_are_those_of_scikit_learn_and_a_second_group_falls_into_the_same_space(dims):
    decomposition = pytest.importorskip("sklearn.decomposition")
    z, num_first = some_latents(dims), 9
    x = standardised(z, num_first).numpy() / math.sqrt(z[0].numel())
    reference = decomposition.PCA(5).fit(x[:num_first])
    scores, shares = pca(inner_products(z, num_first), num_first, 5)
    assert torch.allclose(scores.abs(), torch.from_numpy(reference.transform(x)).abs(), atol=1e-9)
    assert torch.allclose(shares, torch.from_numpy(reference.explained_variance_ratio_), atol=1e-9)
    largest = scores[:num_first].abs().argmax(0)
    assert (scores[largest, range(5)] > 0).all()  # a sign that does not depend on the machine


@pytest.mark.parametrize("dims", [2, 3])
def test_distances_are_root_mean_square_differences(dims):
    z, num_first = some_latents(dims), 9
    x = standardised(z, num_first)
    gram = inner_products(z, num_first)
    assert torch.allclose(distances(gram), torch.cdist(x, x) / math.sqrt(x.shape[1]), atol=1e-6)
    members = torch.arange(len(z)) % 3 == 0
    direct = (x - x[members].mean(0)).square().mean(1).sqrt()
    assert torch.allclose(to_centre(gram, members), direct, atol=1e-9)


def test_unrelated_latents_are_the_root_of_two_apart():
    z = torch.randn(6, 2, 40, 40, 10, generator=torch.Generator().manual_seed(0))
    apart = distances(inner_products(z, 6))
    off = apart[~torch.eye(6, dtype=torch.bool)]
    assert off.mean().item() == pytest.approx(math.sqrt(2), rel=0.01)


def test_a_channel_that_never_changes_says_nothing():
    z = some_latents(2)
    dead = torch.cat([z, torch.full_like(z[:, :1], 7.0)], 1)
    ratio = distances(inner_products(dead, 9)) / distances(inner_products(z, 9)).clamp(min=1e-9)
    assert torch.allclose(ratio[0, 1:], torch.full((13,), math.sqrt(3 / 4)).double())


def test_equal_cases_span_nothing():
    scores, shares = pca(inner_products(torch.ones(4, 2, 3, 3), 4), 4, 2)
    assert scores.shape == (4, 0)
    assert shares.shape == (0,)


@pytest.mark.parametrize("perplexity", [2.0, 5.0, 20.0])
def test_neighbour_weights_have_the_entropy_asked_for_and_fall_exponentially(perplexity):
    squares = torch.rand(7, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3 + 500
    p = neighbour_weights(squares, perplexity)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert torch.allclose(entropy.exp(), torch.full((7,), perplexity).double(), rtol=1e-6)
    for row, square in zip(p, squares, strict=True):
        near = square.argsort()[:4]  # log p_j - log p_k = -beta (d_j^2 - d_k^2), one beta a row
        beta = -row[near].log().diff() / square[near].diff()
        assert torch.allclose(beta, beta[:1].expand(3), rtol=1e-6)


def test_a_new_case_goes_where_its_own_cost_is_least():
    draw = torch.Generator().manual_seed(1)
    known = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    places = 10 * known[:, :2] + torch.randn(40, 2, generator=draw, dtype=torch.float64)
    new = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    found = place_new(new, known, places, 8.0)
    p = neighbour_weights(torch.cdist(new, known).square(), 8.0)

    line = torch.linspace(-40, 40, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    for y, weights in zip(found, p, strict=True):
        q = 1 / (1 + torch.cdist(torch.cat([y[None], grid]), places).square())
        cost = -((q / q.sum(1, keepdim=True)).log() @ weights)
        assert cost[0].item() <= cost[1:].min().item() + 0.01


def test_a_copy_goes_beside_its_original():
    draw = torch.Generator().manual_seed(2)
    known = torch.randn(40, 30, generator=draw, dtype=torch.float64)
    places = 5 * torch.randn(40, 2, generator=draw, dtype=torch.float64)
    found = place_new(known[:6], known, places, 3.0)
    assert (torch.cdist(found, places).argmin(1) == torch.arange(6)).all()
