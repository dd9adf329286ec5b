"""VQ autoencoder: a volume becomes a grid of codes from a learned codebook, and back.

    k(v) = argmin_k |v - e_k|^2,  z_q(v) = e_k(v)       v the vector of a latent position     [1] eq. 1, 2
    z_q  = z + sg(e_k - z)                              straight-through, sg: stop-gradient   [1] sec. 3.2
    loss = reconstruction + mean |sg(z) - e_k|^2 + commitment_weight * mean |z - sg(e_k)|^2   [1] eq. 3

With `update="ema"` the codes are running means of the vectors they serve, and the second term is left out:

    n_k <- d n_k + (1 - d) #{v: k(v) = k},  m_k <- d m_k + (1 - d) sum {v: k(v) = k},  e_k = m_k / n_k
    perplexity = exp(-sum_k p_k log p_k),   p_k the share of vectors that code k serves       [1] eq. 6-8

The first batch sets the codes by k-means (Lloyd's iterations), and a code that hardly serves any vector is
moved to a vector of the batch [2, 3]. Both, like the running means, belong to `VectorQuantizer.update`, which
the training loop calls once an optimizer step: `forward` changes nothing. Sums are reduced over ranks and
vectors are drawn from the joined batch, so that ranks and micro-batches do not matter. No tensor of
positions x codes ever exists (see `nearest`).

The trunks, and how any input size is treated, are those of vae.py. Diffusion runs on z, before quantisation,
and `decode` quantises, as in VQ-regularised latent diffusion [4]. Left out: normalised, residual and product
codebooks.

[1] van den Oord et al. 2017, arXiv 1711.00937. [2] Lancucki et al. 2020, arXiv 2005.08520. [3] Dhariwal et
al. 2020, arXiv 2005.00341, sec. 3.1. [4] Rombach et al. 2022, arXiv 2112.10752, sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import InputError, at_least
from .engine.distributed import all_reduce_sum, rank, world_size
from .vae import Autoencoder, AutoencoderKL, Posterior, VAEConfig

CHUNK = 2**23  # entries of the largest table of distances at a time: 32 MiB


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N,) index of the code of codebook (K, C) nearest to each of vectors (N, C); of equal ones the first.

    |v|^2 is the same for every code and left out. Distances do not change when both are shifted: taking the
    mean code away keeps the digits that |e|^2 - 2 v e would lose to a large common offset.
    """
    mean = codebook.mean(0)
    vectors, codebook = vectors - mean, codebook - mean
    squares = codebook.square().sum(1)  # (K,)
    rows = max(1, CHUNK // len(codebook))
    chunks = vectors.split(rows) if len(vectors) > rows else [vectors]
    return torch.cat([torch.addmm(squares, v, codebook.t(), alpha=-2).argmin(1) for v in chunks])


def code_statistics(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """(counts (K,), sums (K, C)) of the vectors (N, C) that each code serves, over all ranks."""
    counts = torch.bincount(indices, minlength=codebook_size).to(vectors.dtype)
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, indices, vectors)
    return all_reduce_sum(counts), all_reduce_sum(sums)


def perplexity_of(counts: Tensor) -> Tensor:
    """Scalar from 1 (one code serves all) to K (all serve alike)."""
    p = counts.double() / counts.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum())


def draw_vectors(vectors: Tensor, num: int, draw: torch.Generator) -> Tensor:
    """(num, C) rows of the vectors (N, C) of all ranks, joined in rank order; none twice if there are enough.

    Every rank gets the same rows, bit for bit: each puts its own into a table of zeros, and these are added.
    """
    sizes = vectors.new_zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(vectors)
    sizes = all_reduce_sum(sizes).tolist()
    total, first = sum(sizes), sum(sizes[: rank()])
    orders = [torch.randperm(total, generator=draw) for _ in range(-(-num // total))]
    rows = torch.cat(orders)[:num].to(vectors.device) - first
    mine = (rows >= 0) & (rows < len(vectors))
    table = vectors.new_zeros(num, vectors.shape[1])
    table[mine] = vectors[rows[mine]]
    return all_reduce_sum(table)


def k_means(vectors: Tensor, codes: Tensor, steps: int) -> Tensor:
    """Lloyd's iterations on the vectors (N, C) of all ranks from codes (K, C); one that serves none stays."""
    for _ in range(steps):
        counts, sums = code_statistics(vectors, nearest(vectors, codes), len(codes))
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codes)
    return codes


class Quantized(NamedTuple):
    """What `VectorQuantizer.forward` gives; losses are (B,), means over elements."""

    z: Tensor  # (B, C_z, *s), before quantisation
    z_q: Tensor  # (B, C_z, *s), quantised, with the gradient of z
    indices: Tensor  # (B, *s) int64
    codebook_loss: Tensor  # (B,) |sg(z) - e|^2; zeros where the codes are running means
    commitment_loss: Tensor  # (B,) |z - sg(e)|^2


@dataclass(frozen=True)
class QuantizerConfig:
    codebook_size: int = 1024  # codes
    update: Literal["ema", "gradient"] = "ema"  # codes are running means of their vectors, or are learned
    commitment_weight: float = 0.25  # weight of mean |z - code|^2 on the encoder
    decay: float = 0.99  # of the running means, per optimizer step
    kmeans_steps: int = 10  # iterations of k-means on the first batch; 0 = codes start random
    revive_below: float = 0.03  # codes used less than this share of the mean use are moved; 0 = never

    def __post_init__(self) -> None:
        at_least(self, 2, "codebook_size")
        at_least(self, 0, "kmeans_steps", "commitment_weight")
        for name in ("decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")


def quantizer_loss(quantized: Quantized, config: QuantizerConfig) -> Tensor:
    """(B,) the terms that are added to the reconstruction loss."""
    return quantized.codebook_loss + config.commitment_weight * quantized.commitment_loss


class VectorQuantizer(nn.Module):
    """z (B, C_z, *s) -> nearest codes. All state is in the state_dict: codes, running use, are they set."""

    def __init__(self, config: QuantizerConfig, channels: int):
        super().__init__()
        self.config = config
        codebook = torch.randn(config.codebook_size, channels)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codebook)  # (K, C_z)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("code_sum", torch.zeros_like(codebook))  # m_k
        self.register_buffer("code_count", torch.zeros(config.codebook_size))  # n_k
        self.register_buffer("initialised", torch.tensor(False))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(codes (B, C_z, *s), indices (B, *s)) nearest to z (B, C_z, *s), in the codebook's precision."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.to(self.codebook.dtype).movedim(1, -1)  # (B, *s, C_z)
            indices = nearest(vectors.reshape(-1, vectors.shape[-1]).detach(), self.codebook.detach())
            indices = indices.view(vectors.shape[:-1])
            return F.embedding(indices, self.codebook).movedim(-1, 1), indices

    def usage(self, z: Tensor) -> Tensor:
        """(K,) how many vectors of z (B, C_z, *s) each code serves."""
        return torch.bincount(self.quantise(z)[1].flatten(), minlength=len(self.codebook))

    def forward(self, z: Tensor) -> Quantized:
        """Nothing is updated here, in whichever mode; see `update`."""
        z = z.to(self.codebook.dtype)
        codes, indices = self.quantise(z)
        commitment = (z - codes.detach()).square().flatten(1).mean(1)
        codebook = (z.detach() - codes).square().flatten(1).mean(1)
        if self.config.update == "ema":
            codebook = torch.zeros_like(codebook)
        return Quantized(z, z + (codes - z).detach(), indices, codebook, commitment)

    @torch.no_grad()
    def update(self, outputs: Sequence[Quantized], draw: torch.Generator) -> dict[str, Tensor]:
        """After an optimizer step: running means; at the first call k-means; new places for dead codes.

        outputs: of all micro-batches of this step on this rank. draw: a CPU generator, the same on all ranks.
        Returns, over all ranks, the perplexity, the number of codes in use, and of those moved.
        """
        c, codebook = self.config, self.codebook.detach()
        vectors = torch.cat([q.z.detach().movedim(1, -1).flatten(0, -2) for q in outputs])  # (N, C_z)
        indices = torch.cat([q.indices.flatten() for q in outputs])
        counts, sums = code_statistics(vectors, indices, c.codebook_size)
        report = {"perplexity": perplexity_of(counts), "codes_used": (counts > 0).sum()}
        decay = c.decay
        if not self.initialised:
            self.initialised.fill_(True)
            decay = 0.0  # the running means start at this batch's
            if c.kmeans_steps:
                start = draw_vectors(vectors, c.codebook_size, draw)
                codebook.copy_(k_means(vectors, start, c.kmeans_steps))
                counts, sums = code_statistics(vectors, nearest(vectors, codebook), c.codebook_size)
        self.code_count.lerp_(counts, 1 - decay)
        if c.update == "ema":
            self.code_sum.lerp_(sums, 1 - decay)
            means = self.code_sum / self.code_count.clamp(min=1e-12)[:, None]
            codebook.copy_(torch.where(self.code_count[:, None] > 1e-6, means, codebook))
        return {**report, "codes_revived": self._revive(vectors, float(counts.mean()), draw)}

    def _revive(self, vectors: Tensor, mean_count: float, draw: torch.Generator) -> Tensor:
        """Move codes whose running use is too low to vectors of the batch, and count them as used again."""
        dead = self.code_count < self.config.revive_below * mean_count
        num = dead.sum()
        if num:
            new = draw_vectors(vectors, int(num), draw)
            self.codebook.detach()[dead] = new
            self.code_count[dead] = mean_count
            if self.config.update == "ema":
                self.code_sum[dead] = new * mean_count
        return num


class VQVAE(Autoencoder):
    """The autoencoder whose decoder sees codes only; it is used like AutoencoderKL.

    The setting `double_z` does not apply: there is no variance to predict.
    """

    def __init__(self, config: VAEConfig, quantizer: QuantizerConfig):
        super().__init__(config)
        self.build_encoder(config.latent_channels, config.latent_channels)
        self.quantizer = VectorQuantizer(quantizer, config.latent_channels)
        self.build_decoder()

    def fresh_copy(self) -> VQVAE:
        return VQVAE(self.config, self.quantizer.config)

    def posterior(self, moments: Tensor) -> Posterior:
        """The latent before quantisation, as a distribution without width."""
        return Posterior.point(moments.to(self.quantizer.codebook.dtype))

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Quantise z (B, C_z, *s), then decode to (B, C, *(s * downsampling)), cropped to `size` if any."""
        self._check(z, self.config.latent_channels, "latent")
        return super().decode(self.quantizer.quantise(z)[0], size)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """(recon, quantized): all that the loss and `quantizer.update` need.

        `noise` is not used, for the posterior has no width; the argument is that of AutoencoderKL.forward.
        """
        quantized = self.quantizer(self.encode(x).mean)
        return super().decode(quantized.z_q, x.shape[2:]), quantized


def make_autoencoder(kind: str, vae: VAEConfig, quantizer: QuantizerConfig) -> Autoencoder:
    """A new autoencoder of the kind "kl" or "vq"; `quantizer` matters to "vq" alone."""
    return VQVAE(vae, quantizer) if kind == "vq" else AutoencoderKL(vae)
