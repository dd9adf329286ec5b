"""VQ autoencoder: a volume becomes a grid of codes from a learned codebook, and the codes a volume again.

Noise keeps the latent space of the KL autoencoder (vae.py) smooth; this autoencoder makes its latent space
small instead. The decoder sees no other vectors than the K codes e_1 .. e_K of a codebook, so that a latent
of 48 x 56 x 48 positions and 1024 codes is a list of 129,024 numbers of 10 bits. With v the vector of z at a
latent position, and sg(.) a value through which no gradient flows:

    k(v) = argmin_k |v - e_k|^2,  z_q(v) = e_k(v)               the nearest code replaces v       [1] eq. 1, 2
    z_q  = z + sg(e_k - z)                                      the gradient of z_q passes to z   [1] sec. 3.2
    loss = reconstruction + mean |sg(z) - e_k|^2 + commitment_weight * mean |z - sg(e_k)|^2       [1] eq. 3

The second term moves codes to their vectors, the third keeps vectors near their codes. With `update="ema"`
the second term is left out: a code is the running mean of the vectors that it serves, with decay d.

    n_k <- d n_k + (1 - d) #{v: k(v) = k},  m_k <- d m_k + (1 - d) sum {v: k(v) = k},  e_k = m_k / n_k
    perplexity = exp(-sum_k p_k log p_k),   p_k the share of vectors that code k serves           [1] eq. 6-8

The first batch sets the codes by k-means (Lloyd's iterations), and a code that hardly serves any vector is
moved to a vector of the batch [2, 3]. All this is done by `VectorQuantizer.update`, which the training loop
calls once an optimizer step; `forward` changes nothing. Sums are reduced over ranks, and vectors are drawn
from the joined batch, so that the result depends neither on ranks nor on micro-batches. No tensor of
positions x codes ever exists (see `nearest`).

Diffusion runs on z, before quantisation, and `decode` quantises, as in VQ-regularised latent diffusion [4].
Left out: normalised, residual and product codebooks.

[1] van den Oord et al. 2017, arXiv 1711.00937. [2] Lancucki et al. 2020, arXiv 2005.08520. [3] Dhariwal et
al. 2020, arXiv 2005.00341, sec. 3.1. [4] Rombach et al. 2022, arXiv 2112.10752, sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import InputError, at_least
from .engine.distributed import all_reduce_sum, rank, world_size
from .vae import Autoencoder, AutoencoderKL, PixelStem, Posterior, VAEConfig

CHUNK = 2**23  # distances computed at a time: 32 MiB in fp32


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """For each of vectors (N, C) the index (N,) of the nearest code of codebook (K, C); the first of equals.

    |v - e|^2 = |v|^2 + |e|^2 - 2 v e, where |v|^2 is the same for every code and left out.
    """
    # Distances do not change when vectors and codes are shifted alike. Without a large common offset the
    # difference |e|^2 - 2 v e keeps more digits
    mean = codebook.mean(0)
    vectors, codebook = vectors - mean, codebook - mean
    squares = codebook.square().sum(1)  # (K,)
    rows = max(1, CHUNK // len(codebook))
    chunks = vectors.split(rows) if len(vectors) > rows else [vectors]
    return torch.cat([torch.addmm(squares, v, codebook.t(), alpha=-2).argmin(1) for v in chunks])


def code_statistics(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code serves, and their sum: (counts (K,), sums (K, C)) over all ranks.

    vectors (N, C); indices (N,), the code of each vector.
    """
    counts = torch.bincount(indices, minlength=codebook_size).to(vectors.dtype)
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, indices, vectors)
    return all_reduce_sum(counts), all_reduce_sum(sums)


def perplexity_of(counts: Tensor) -> Tensor:
    """How many codes are in use, as a scalar from 1 (one code serves all) to K (all serve alike)."""
    p = counts.double() / counts.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum())


def draw_vectors(vectors: Tensor, num: int, draw: torch.Generator) -> Tensor:
    """Random rows (num, C) of the vectors (N, C) of all ranks; no row twice while there are enough.

    Every rank returns the same rows, bit for bit: it puts those of its own vectors that were drawn into a
    table of zeros, and the tables of all ranks are added. `draw` must be in the same state on all ranks.
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
    """Codes (K, C) moved to the means of the vectors (N, C, of all ranks) that they serve, `steps` times.

    These are Lloyd's iterations. A code that serves no vector stays where it is.
    """
    for _ in range(steps):
        counts, sums = code_statistics(vectors, nearest(vectors, codes), len(codes))
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codes)
    return codes


class Quantized(NamedTuple):
    """A latent before and after quantisation, with its losses, which are means over elements."""

    z: Tensor  # (B, C_z, *s), before quantisation
    z_q: Tensor  # (B, C_z, *s), quantised; its gradient passes straight through to z
    indices: Tensor  # (B, *s) int64
    codebook_loss: Tensor  # (B,) |sg(z) - e|^2; zeros where the codes are running means
    commitment_loss: Tensor  # (B,) |z - sg(e)|^2


@dataclass(frozen=True)
class QuantizerConfig:
    codebook_size: int = 1024  # codes
    update: Literal["ema", "gradient"] = "ema"  # codes are running means, or parameters with a gradient
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
    """What a codebook adds to the reconstruction loss, (B,)."""
    return quantized.codebook_loss + config.commitment_weight * quantized.commitment_loss


class VectorQuantizer(nn.Module):
    """Replaces every vector of z (B, C_z, *s) by its nearest code.

    The state_dict holds the codes, their running use n_k and m_k, and whether the first batch has set them.
    """

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
        """The nearest codes (B, C_z, *s) of z (B, C_z, *s), and their indices (B, *s).

        Distances are computed in the codebook's precision, also under autocast.
        """
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.to(self.codebook.dtype).movedim(1, -1)  # (B, *s, C_z)
            indices = nearest(vectors.reshape(-1, vectors.shape[-1]).detach(), self.codebook.detach())
            indices = indices.view(vectors.shape[:-1])
            return F.embedding(indices, self.codebook).movedim(-1, 1), indices

    def usage(self, z: Tensor) -> Tensor:
        """How many vectors of z (B, C_z, *s) each code serves, (K,)."""
        return torch.bincount(self.quantise(z)[1].flatten(), minlength=len(self.codebook))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, C_z, *s). Changes no state, neither in training nor in evaluation; see `update`."""
        z = z.to(self.codebook.dtype)
        codes, indices = self.quantise(z)
        commitment = (z - codes.detach()).square().flatten(1).mean(1)  # |z - sg(e)|^2
        codebook = (z.detach() - codes).square().flatten(1).mean(1)  # |sg(z) - e|^2
        if self.config.update == "ema":
            codebook = torch.zeros_like(codebook)
        z_q = z + (codes - z).detach()  # straight through: the value of codes, the gradient of z
        return Quantized(z, z_q, indices, codebook, commitment)

    @torch.no_grad()
    def update(
        self, outputs: Sequence[Quantized], draw: torch.Generator, frozen: bool = False
    ) -> dict[str, Tensor]:
        """Move the codes after an optimizer step: k-means at the first call, running means, revival.

        outputs: what `forward` returned for each micro-batch of this step on this rank. draw: a CPU generator
        in the same state on all ranks. frozen: count only how codes are used. Returns the perplexity,
        codes_used and codes_revived over all ranks.
        """
        c, codebook = self.config, self.codebook.detach()
        vectors = torch.cat([q.z.detach().movedim(1, -1).flatten(0, -2) for q in outputs])  # (N, C_z)
        indices = torch.cat([q.indices.flatten() for q in outputs])
        counts, sums = code_statistics(vectors, indices, c.codebook_size)
        report = {"perplexity": perplexity_of(counts), "codes_used": (counts > 0).sum()}
        if frozen:
            return report
        decay = c.decay
        if not self.initialised:
            self.initialised.fill_(True)
            decay = 0.0  # the running means start at the means of this batch
            if c.kmeans_steps:
                start = draw_vectors(vectors, c.codebook_size, draw)
                codebook.copy_(k_means(vectors, start, c.kmeans_steps))
                counts, sums = code_statistics(vectors, nearest(vectors, codebook), c.codebook_size)
        self.code_count.lerp_(counts, 1 - decay)  # n_k
        if c.update == "ema":
            self.code_sum.lerp_(sums, 1 - decay)  # m_k
            means = self.code_sum / self.code_count.clamp(min=1e-12)[:, None]
            codebook.copy_(torch.where(self.code_count[:, None] > 1e-6, means, codebook))
        return {**report, "codes_revived": self._revive(vectors, float(counts.mean()), draw)}

    def _revive(self, vectors: Tensor, mean_count: float, draw: torch.Generator) -> Tensor:
        """Move hardly used codes to random vectors of the batch and give them the mean running use."""
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

    def decode(self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None) -> Tensor:
        """Quantise z (B, C_z, *s), then decode to (B, C, *(s * downsampling)), cropped to `size` if any."""
        self._check(z, self.config.latent_channels, "latent")
        return super().decode(self.quantizer.quantise(z)[0], size, memory)

    def decode_planes(
        self, z: Tensor, size: Sequence[int] | None = None, memory: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        return super().decode_planes(self.quantizer.quantise(z)[0], size, memory)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """Image to codes and back: (recon, quantized), all that the loss and `quantizer.update` need.

        `noise` is not used, since the posterior has no width. The argument is there so that a training loop
        can call both kinds of autoencoder alike.
        """
        quantized = self.quantizer(self.encode(x).mean)
        return super().decode(quantized.z_q, x.shape[2:]), quantized


def make_autoencoder(kind: str, vae: VAEConfig, quantizer: QuantizerConfig) -> Autoencoder:
    """A new autoencoder of the kind "kl", "vq" or "pixels"; `quantizer` matters to "vq" alone."""
    if kind == "pixels":
        return PixelStem(vae)
    return VQVAE(vae, quantizer) if kind == "vq" else AutoencoderKL(vae)
