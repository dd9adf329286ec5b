"""The quantiser equals brute force and the recursions of the paper, whatever the size of the image."""

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm3d import VAEConfig
from ldm3d.vqvae import (
    VQVAE,
    QuantizerConfig,
    VectorQuantizer,
    draw_vectors,
    k_means,
    nearest,
    quantizer_loss,
)

ROOT = Path(__file__).parents[1]
SMALL = {"channels": (4, 8), "num_groups": 2, "num_res_blocks": (1,), "latent_channels": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_quantizer(channels: int = 3, **options) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(QuantizerConfig(codebook_size=5, **options), channels)


def make_vqvae(dims: int, **options) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VAEConfig(dims=dims, **SMALL), QuantizerConfig(codebook_size=16, **options))


def brute_force(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    distances = (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1)
    return distances.argmin(1)


# --- the nearest code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_code_chosen_is_the_nearest_by_brute_force_even_far_from_the_origin(offset, monkeypatch):
    monkeypatch.setattr("ldm3d.vqvae.CHUNK", 37 * 11)  # 11 rows at a time: many chunks, the last one shorter
    vectors = torch.randn(300, 4, generator=generator()) + offset
    codebook = torch.randn(37, 4, generator=generator(1)) + offset
    assert torch.equal(nearest(vectors, codebook), brute_force(vectors, codebook))


def test_of_equal_codes_the_first_is_chosen():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[0.0, 2.0]]), codebook).tolist() == [1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_sixteen_thousand_codes_on_a_latent_of_32_cubed_stay_within_2_gb():
    code = (
        "import torch\n"
        "from ldm3d.engine.training import peak_bytes\n"
        "from ldm3d.vqvae import QuantizerConfig, VectorQuantizer, quantizer_loss\n"
        "q = VectorQuantizer(QuantizerConfig(codebook_size=16384, update='gradient', kmeans_steps=0), 8)\n"
        "z = torch.randn(1, 8, 32, 32, 32, requires_grad=True)\n"
        "out = q(z)\n"
        "(quantizer_loss(out, q.config).mean() + out.z_q.square().mean()).backward()\n"
        "q.update([out], torch.Generator().manual_seed(0))\n"
        "assert z.grad.abs().sum() > 0 and q.codebook.grad.abs().sum() > 0\n"
        "print(peak_bytes(torch.device('cpu')) / 2**30)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0  # GiB, torch itself included


# --- forward and its gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_the_losses_are_their_means_and_the_decoders_gradient_passes_straight_through(dims):
    q = make_quantizer(update="gradient")
    z = torch.randn(2, 3, *(4,) * dims, generator=generator(), requires_grad=True)
    out = q(z)
    vectors = z.detach().movedim(1, -1).reshape(-1, 3)
    codes = q.codebook.detach()[brute_force(vectors, q.codebook)]
    codes = codes.view(2, *(4,) * dims, 3).movedim(-1, 1)
    assert torch.allclose(out.z_q, codes, atol=1e-6)
    expected = (z.detach() - codes).square().flatten(1).mean(1)
    for loss in (out.codebook_loss, out.commitment_loss):
        assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(quantizer_loss(out, q.config), 1.25 * expected, rtol=1e-5)

    weight = torch.randn(z.shape, generator=generator(2))
    (through,) = torch.autograd.grad((out.z_q * weight).sum(), z, retain_graph=True)
    assert torch.equal(through, weight)
    pulled, moved = torch.autograd.grad(quantizer_loss(out, q.config).sum(), (z, q.codebook))
    per_element = 2 / (z[0].numel())
    assert torch.allclose(pulled, 0.25 * per_element * (z.detach() - codes), atol=1e-6)
    pull = torch.zeros(5, 3).index_add_(
        0, out.indices.flatten(), (codes - z.detach()).movedim(1, -1).reshape(-1, 3)
    )
    assert torch.allclose(moved, per_element * pull, atol=1e-6)


def test_forward_changes_no_state_whether_training_or_not():
    q = make_quantizer()
    before = copy.deepcopy(q.state_dict())
    for mode in (True, False):
        q.train(mode)(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())


def test_under_bf16_autocast_the_distances_are_those_of_fp32():
    q = make_quantizer()
    z = 1e-3 * torch.randn(2, 3, 8, 8, generator=generator())
    q.codebook.mul_(1e-3).add_(1.0)
    z = z + 1.0
    with torch.autocast("cpu", torch.bfloat16):
        out = q(z)
    assert torch.equal(out.indices.flatten(), brute_force(z.movedim(1, -1).reshape(-1, 3), q.codebook))
    assert out.z_q.dtype == torch.float32


# --- update -------------------------------------------------------------------------------------------------


def test_running_means_follow_the_recursion_of_the_paper():
    q = make_quantizer(kmeans_steps=0, revive_below=0.0, decay=0.9)
    n, m, e = None, None, q.codebook.double()
    for step in range(6):
        z = torch.randn(2, 3, 4, 4, generator=generator(step)) * (1 + step)
        vectors = z.movedim(1, -1).reshape(-1, 3).double()
        k = brute_force(vectors, e)
        counts = torch.bincount(k, minlength=5).double()
        sums = torch.stack([vectors[k == i].sum(0) for i in range(5)])
        n = counts if n is None else 0.9 * n + 0.1 * counts
        m = sums if m is None else 0.9 * m + 0.1 * sums
        e = torch.where(n[:, None] > 1e-6, m / n[:, None], e)
        halves = [q(z[:1]), q(z[1:])]  # two micro-batches
        report = q.update(halves, generator(step))
        assert torch.allclose(q.codebook.double(), e, atol=1e-5)
        assert torch.allclose(q.code_count.double(), n, atol=1e-5)
        p = counts[counts > 0] / counts.sum()
        assert report["perplexity"].item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)
        assert report["codes_used"] == int((counts > 0).sum())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_first_update_puts_the_codes_on_the_clusters_of_the_data(update):
    centres = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [-10, 0, 0], [0, -10, 0]])
    noise = 0.1 * torch.randn(40, 5, 3, generator=generator())
    z = (centres + noise).reshape(1, 200, 3).movedim(-1, 1)[..., None]  # (1, 3, 200, 1)
    q = make_quantizer(update=update)
    q.update([q(z)], generator(3))
    for _ in range(3):  # a cluster that k-means had split is put right by the revival of what has died
        q.update([q(z)], generator(4))
    found = nearest(centres, q.codebook.detach())
    errors = (q.codebook.detach()[found] - centres).norm(dim=1)
    assert (errors < 1.0).sum() >= 4
    assert bool(q.initialised)


def test_k_means_never_makes_the_quantisation_error_larger():
    vectors = torch.randn(500, 3, generator=generator())
    codes = draw_vectors(vectors, 12, generator(1))
    errors = []
    for steps in range(5):
        moved = k_means(vectors, codes, steps)
        errors.append(float((vectors - moved[brute_force(vectors, moved)]).square().sum()))
    assert all(a > b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_code_that_serves_nothing_is_moved_to_a_vector_of_the_batch(update):
    q = make_quantizer(update=update, kmeans_steps=0, decay=0.5)
    with torch.no_grad():
        q.codebook[2] = 1000.0
    z = torch.randn(4, 3, 6, 6, generator=generator())
    reports = [q.update([q(z)], generator(step)) for step in range(8)]
    assert sum(r["codes_revived"] for r in reports) >= 1
    assert q.codebook.abs().max() < 10
    with torch.no_grad():
        assert q.update([q(z)], generator(9))["codes_used"] == 5


def test_vectors_are_drawn_without_repetition_while_there_are_enough():
    vectors = torch.arange(7.0)[:, None]
    assert sorted(draw_vectors(vectors, 7, generator()).flatten().tolist()) == list(range(7))
    many = draw_vectors(vectors, 17, generator()).flatten().tolist()
    assert all(many.count(v) in (2, 3) for v in range(7))


def train(q: VectorQuantizer, steps: range) -> VectorQuantizer:
    for step in steps:
        z = torch.randn(3, 3, 4, 4, generator=generator(step)) + 0.2 * step
        q.update([q(z)], generator(step))
    return q


def test_updates_are_resumed_bit_exactly_from_the_state_dict():
    whole = train(make_quantizer(), range(10))
    half = train(make_quantizer(), range(5))
    resumed = make_quantizer()
    resumed.load_state_dict(half.state_dict())
    train(resumed, range(5, 10))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


# --- the autoencoder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "size"), [(2, (7, 10)), (2, (1, 5)), (3, (7, 4, 9)), (3, (5, 1, 2))])
def test_any_size_comes_back_as_it_was_and_the_interface_is_that_of_the_kl_autoencoder(dims, size):
    net = make_vqvae(dims).eval()
    x = torch.randn(2, 1, *size, generator=generator())
    recon, quantized = net(x)
    assert recon.shape == x.shape
    posterior = net.encode(x)
    assert quantized.z.shape == (2, *net.latent_shape(size)) == posterior.mean.shape
    assert quantized.indices.shape == (2, *net.latent_shape(size)[1:])
    assert torch.equal(posterior.sample(torch.randn_like(posterior.mean)), posterior.mode())
    assert posterior.logvar.exp().abs().max() == posterior.std.max() == 0
    assert torch.allclose(net.decode(posterior.mode(), size), recon, atol=1e-5)  # quantised before decoding


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_few_steps_of_training_lower_the_loss_and_use_many_codes(update):
    net = make_vqvae(2, update=update)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    grid = torch.linspace(-3, 3, 16)
    shift = torch.arange(8)[:, None, None]
    x = torch.sin(grid[:, None] * 2 + shift + grid[None] * (shift % 3))[:, None]
    losses = []
    for step in range(60):
        recon, quantized = net(x)
        losses.append(float((recon - x).detach().abs().mean()))
        optimizer.zero_grad()
        ((recon - x).abs().mean() + quantizer_loss(quantized, net.quantizer.config).mean()).backward()
        optimizer.step()
        report = net.quantizer.update([quantized], generator(step))
    assert losses[-1] < 0.5 * losses[0]
    assert report["perplexity"] > 6
