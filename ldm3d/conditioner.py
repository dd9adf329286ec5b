"""The conditioner: named conditions (conditions.py) -> context tokens, input channels, an added embedding.

    class               a row of a table, added to the embedding of t
    number, spacing     an MLP of (value - mean) / std, added likewise
    text, embedding     context tokens with their mask; the mean token, projected, is added likewise
    image, labels       channels beside x_t
    tokens              context tokens W [latent, position] + b, one a latent voxel; positions beside x_t

Each kind has a learned null, put by torch.where in the place of what is absent, so that every parameter takes
part in every forward. Text goes through a small pre-norm transformer trained with the model (Vaswani et al.
2017, arXiv 1706.03762). Embeddings added to the time's: Dhariwal & Nichol 2021 (2105.05233). Context and
channels: Rombach et al. 2022 (2112.10752), section 3.3. Left out: pretrained text encoders, whose output is
the kind `embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import GEGLU, CrossAttention, KeysValues, position_features, to_tokens
from .conditions import Condition, ConditionConfig, absent, blank, check_names, num_heads, shape_of
from .config import InputError


class Conditioned(NamedTuple):
    """What conditions become; None: nothing of this kind."""

    context: Tensor | tuple[KeysValues, ...] | None = None  # (B, M, E) tokens, or their UNet.kv_cache
    context_mask: Tensor | None = None  # (B, M) bool, True = use
    channels: Tensor | None = None  # (B, C, *s) to concatenate to x_t
    emb: Tensor | None = None  # (B, emb_dim) to add to that of t


class ClassCondition(nn.Module):
    """(B,) class -> embedding. The null is the last row."""

    def __init__(self, num_classes: int, emb_dim: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, emb_dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, value: Tensor) -> Conditioned:
        return Conditioned(emb=self.table(torch.where(value < 0, self.table.num_embeddings - 1, value)))


class NumberCondition(nn.Module):
    """(B, n) numbers -> embedding of (value - mean) / std."""

    def __init__(self, condition: Condition, emb_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.tensor(condition.mean), persistent=False)
        self.register_buffer("std", torch.tensor(condition.std), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(len(condition.mean), emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.null = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, value: Tensor) -> Conditioned:
        gone = value.isnan().any(1, keepdim=True)
        x = torch.where(gone, 0.0, (value - self.mean) / self.std)
        return Conditioned(emb=torch.where(gone, self.null, self.mlp(x)))


class TextEncoder(nn.Module):
    """(B, L) words, -1 = none -> tokens (B, L, E), mask (B, L)."""

    def __init__(self, num_words: int, length: int, width: int, layers: int):
        super().__init__()
        self.words = nn.Embedding(num_words + 1, width)  # 0: unknown
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.zeros_(self.words.weight[0])  # where training has no unknown word it stays, and says nothing
        heads = num_heads(width)
        self.attentions = nn.ModuleList(CrossAttention(width, width, heads) for _ in range(layers))
        self.ffs = nn.ModuleList(GEGLU(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = ids >= 0
        h = self.words(ids.clamp(min=0)) + self.positions[: ids.shape[1]]  # (B, L, E)
        for i, (attention, ff) in enumerate(zip(self.attentions, self.ffs, strict=True)):
            a = self.norms[2 * i](h)
            h = h + attention(a, a, mask)
            h = h + ff(self.norms[2 * i + 1](h))
        return self.norms[-1](h), mask


class VectorEncoder(nn.Module):
    """(B, L, E') vectors, NaN = none -> tokens (B, L, E), mask (B, L)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(in_width, width), nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        mask = ~vectors.isnan().any(2)
        return self.norm(self.linear(torch.where(mask[..., None], vectors, 0.0))), mask


class SequenceCondition(nn.Module):
    """A sequence -> context tokens and, from their mean, an embedding; an absent one is one null token."""

    def __init__(self, encoder: TextEncoder | VectorEncoder, width: int, emb_dim: int):
        super().__init__()
        self.encoder, self.pooled = encoder, nn.Linear(width, emb_dim)
        self.null = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, value: Tensor) -> Conditioned:
        tokens, mask = self.encoder(value)
        gone = ~mask.any(1)
        tokens = torch.where(gone[:, None, None], self.null, tokens)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(gone[:, None], first, mask)
        used = mask[..., None].to(tokens)
        return Conditioned(tokens, mask, emb=self.pooled((tokens * used).sum(1) / used.sum(1)))


class ChannelCondition(nn.Module):
    """(B, C, *s) -> the same as input channels; an absent one is a constant per channel."""

    def __init__(self, dims: int, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width, *(1,) * dims))

    def forward(self, value: Tensor) -> Conditioned:
        return Conditioned(channels=fill(value, self.null))


class TokenCondition(nn.Module):
    """(B, C, *s) -> context tokens [latent, position] W + b, one a latent voxel, and positions as channels.

    The positions enter beside x_t as well, since a query that does not know where it is cannot look for its
    own place among the tokens.
    """

    NUM_FREQUENCIES = 5

    def __init__(self, dims: int, width: int, context_dim: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width, *(1,) * dims))
        self.num_positions = 2 * self.NUM_FREQUENCIES * dims
        self.linear = nn.Linear(width + self.num_positions, context_dim)

    def forward(self, value: Tensor) -> Conditioned:
        places = position_features(value.shape[2:], self.NUM_FREQUENCIES, value.device)
        places = places.expand(len(value), *places.shape[1:])
        tokens = self.linear(to_tokens(torch.cat([fill(value, self.null), places], 1)))  # (B, N, E)
        return Conditioned(tokens, channels=places)


def fill(value: Tensor, null: Tensor) -> Tensor:
    """Absent samples of value (B, C, *s) replaced by null (C, 1 ...)."""
    return torch.where(absent(value).view(-1, *(1,) * null.ndim), null, value)


class Conditioner(nn.Module):
    """Named conditions of a batch -> `Conditioned`. Those not given are absent from all samples."""

    def __init__(self, config: ConditionConfig, conditions: Sequence[Condition], dims: int, emb_dim: int):
        super().__init__()
        self.conditions = tuple(conditions)
        self.parts = nn.ModuleList(self._make(c, config, dims, emb_dim) for c in conditions)

    @staticmethod
    def _make(c: Condition, config: ConditionConfig, dims: int, emb_dim: int) -> nn.Module:
        width = config.context_dim
        if c.kind == "class":
            return ClassCondition(len(c.values), emb_dim)
        if c.kind in ("number", "spacing"):
            return NumberCondition(c, emb_dim)
        if c.kind == "text":
            encoder = TextEncoder(len(c.values), c.length, width, config.text_layers)
            return SequenceCondition(encoder, width, emb_dim)
        if c.kind == "embedding":
            return SequenceCondition(VectorEncoder(c.width, width), width, emb_dim)
        return TokenCondition(dims, c.width, width) if c.kind == "tokens" else ChannelCondition(dims, c.width)

    @property
    def num_channels(self) -> int:
        """Input channels that the conditions add to those of x_t."""
        positions = [part.num_positions for part in self.parts if isinstance(part, TokenCondition)]
        return sum(positions) + sum(c.width for c in self.conditions if c.kind in ("image", "labels"))

    @property
    def has_context(self) -> bool:
        return any(c.kind in ("text", "embedding", "tokens") for c in self.conditions)

    def forward(self, values: dict[str, Tensor], like: Tensor) -> Conditioned:
        """like: the x_t (B, C_z, *s) that they belong to."""
        check_names(values, self.conditions)
        made = []
        for c, part in zip(self.conditions, self.parts, strict=True):
            value = values[c.name] if c.name in values else blank(c, like)
            if value.shape != shape_of(c, like):
                expected, got = shape_of(c, like), tuple(value.shape)
                raise InputError(f"condition {c.name}: expected a tensor of shape {expected}, got {got}")
            made.append(part(value))
        embs = [m.emb for m in made if m.emb is not None]
        channels = [m.channels for m in made if m.channels is not None]
        contexts = [m for m in made if m.context is not None]
        return Conditioned(
            torch.cat([m.context for m in contexts], 1) if contexts else None,
            join_masks(contexts),
            torch.cat(channels, 1) if channels else None,
            sum(embs[1:], embs[0]) if embs else None,
        )


def join_masks(contexts: Sequence[Conditioned]) -> Tensor | None:
    """The mask of all their tokens, (B, M); None if all are to be used, which is faster."""
    if all(m.context_mask is None for m in contexts):
        return None
    ones = [torch.ones_like(m.context[..., 0], dtype=torch.bool) for m in contexts]
    return torch.cat(
        [o if m.context_mask is None else m.context_mask for m, o in zip(contexts, ones, strict=True)], 1
    )
