"""The conditioner: the network that turns conditions (conditions.py) into inputs of the U-Net.

A U-Net can be reached in three ways, and each kind of condition takes the ones that suit it: an embedding
added to the embedding of t says one thing to all voxels; context tokens are looked up by attention; channels
beside x_t say something at each voxel.

    class               a row of a table, added to the embedding of t
    number, spacing     an MLP of (value - mean) / std, added to the embedding of t
    text, embedding     context tokens with their mask; their mean, projected, is added to the embedding of t
    image, labels       channels beside x_t
    tokens              context tokens W [latent, position] + b, one a latent voxel; positions beside x_t

Example: x_t (2, 4, 16, 20, 16) with emb_dim 256 and context_dim 128, under class, text (L = 12) and image:
emb (2, 256) is the sum of a row and of the caption's mean, context is (2, 12, 128) with a mask (2, 12), and
channels (2, 4, 16, 20, 16) are concatenated to x_t.

Each kind has a learned null, which torch.where puts in place of a blank value. So every parameter takes part
in every forward, as DDP demands, whichever conditions are absent.

Text goes through a small pre-norm transformer trained with the model (Vaswani et al. 2017, arXiv 1706.03762).
Embeddings added to the time's: Dhariwal & Nichol 2021 (2105.05233). Context and channels: Rombach et
al. 2022 (2112.10752), section 3.3. Left out: pretrained text encoders, whose output is the kind `embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import GEGLU, CrossAttention, KeysValues, position_features, to_tokens
from .conditions import Condition, ConditionConfig, absent, check_names, num_heads, value_of


class Hint(NamedTuple):
    """What a ControlNet (control.py) makes of its map once for all steps of sampling."""

    features: Tensor  # (B, channels[0], *s), added to the features of its first convolution
    present: Tensor  # (B,) bool: the samples that have a map
    context: Tensor | tuple[KeysValues, ...] | None  # as in Conditioned; the kv_cache is the ControlNet's own


class Conditioned(NamedTuple):
    """Inputs of the U-Net that conditions have become; None: no condition makes an input of this sort."""

    context: Tensor | tuple[KeysValues, ...] | None = None  # (B, M, E) tokens, or their UNet.kv_cache
    context_mask: Tensor | None = None  # (B, M) bool, True = use
    channels: Tensor | None = None  # (B, C, *s) to concatenate to x_t
    emb: Tensor | None = None  # (B, emb_width): what to add to the embedding of t, then what stands beside it
    hint: Hint | None = None  # of a ControlNet


# --- one module a kind --------------------------------------------------------------------------------------


class Part(nn.Module):
    """The module of one condition: its value (see `shape_of`) -> Conditioned.

    All parts are made from (condition, config, dims, emb_dim).
    """

    num_channels = 0  # input channels that the part adds beside x_t
    has_context = False  # whether the part makes context tokens


class ClassPart(Part):
    """A class (B,) -> embedding: a row of a table, whose last row is the null."""

    def __init__(self, condition: Condition, config: ConditionConfig, dims: int, emb_dim: int):
        super().__init__()
        self.table = nn.Embedding(len(condition.values) + 1, emb_dim)
        # The embedding of t begins with 0.13. Rows of 0.02 are hardly heard beside it for thousands of steps
        nn.init.normal_(self.table.weight, std=0.3)

    def forward(self, value: Tensor) -> Conditioned:
        return Conditioned(emb=self.table(torch.where(value < 0, self.table.num_embeddings - 1, value)))


class NumberPart(Part):
    """Numbers (B, n) -> embedding of (value - mean) / std."""

    def __init__(self, condition: Condition, config: ConditionConfig, dims: int, emb_dim: int):
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
    """A small transformer over captions: (B, L) words, -1 = none -> tokens (B, L, E), mask (B, L)."""

    def __init__(self, num_words: int, length: int, width: int, layers: int):
        super().__init__()
        self.words = nn.Embedding(num_words + 1, width)  # 0: unknown
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.zeros_(self.words.weight[0])  # stays zero if training meets no unknown word
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
    """The output of some other text encoder, (B, L, E'), NaN = none -> tokens (B, L, E), mask (B, L)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(in_width, width), nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        mask = ~vectors.isnan().any(2)
        return self.norm(self.linear(torch.where(mask[..., None], vectors, 0.0))), mask


class SequencePart(Part):
    """A caption (B, L) or vectors (B, L, E') -> context tokens and, from their mean, an embedding.

    A blank sample has one token, the null.
    """

    has_context = True

    def __init__(self, condition: Condition, config: ConditionConfig, dims: int, emb_dim: int):
        super().__init__()
        c, width = condition, config.context_dim
        if c.kind == "text":
            self.encoder: nn.Module = TextEncoder(len(c.values), c.length, width, config.text_layers)
        else:
            self.encoder = VectorEncoder(c.width, width)
        self.pooled = nn.Linear(width, emb_dim)
        self.null = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, value: Tensor) -> Conditioned:
        tokens, mask = self.encoder(value)
        gone = ~mask.any(1)
        tokens = torch.where(gone[:, None, None], self.null, tokens)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(gone[:, None], first, mask)
        used = mask[..., None].to(tokens)
        return Conditioned(tokens, mask, emb=self.pooled((tokens * used).sum(1) / used.sum(1)))


def fill(value: Tensor, null: Tensor) -> Tensor:
    """value (B, C, *s) with null (C, 1 ...) in place of its blank samples."""
    return torch.where(absent(value).view(-1, *(1,) * null.ndim), null, value)


class ChannelPart(Part):
    """A map (B, C, *s) -> the same as input channels; blank: one learned constant per channel."""

    def __init__(self, condition: Condition, config: ConditionConfig, dims: int, emb_dim: int):
        super().__init__()
        self.num_channels = condition.num_channels(dims)
        self.null = nn.Parameter(torch.zeros(self.num_channels, *(1,) * dims))

    def forward(self, value: Tensor) -> Conditioned:
        return Conditioned(channels=fill(value, self.null))


class TokenPart(Part):
    """A latent (B, C, *s) -> context tokens W [latent, position] + b, one a voxel, and positions as channels.

    A voxel of x_t that does not know its own position cannot look for the token of the same position. So the
    positions also enter as channels beside x_t.
    """

    NUM_FREQUENCIES = 5
    has_context = True

    def __init__(self, condition: Condition, config: ConditionConfig, dims: int, emb_dim: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(condition.width, *(1,) * dims))
        self.num_channels = 2 * self.NUM_FREQUENCIES * dims
        self.linear = nn.Linear(condition.width + self.num_channels, config.context_dim)

    def forward(self, value: Tensor) -> Conditioned:
        positions = position_features(value.shape[2:], self.NUM_FREQUENCIES, value.device)
        positions = positions.expand(len(value), *positions.shape[1:])
        tokens = self.linear(to_tokens(torch.cat([fill(value, self.null), positions], 1)))  # (B, N, E)
        return Conditioned(tokens, channels=positions)


PARTS: dict[str, type[Part]] = {
    "class": ClassPart,
    "number": NumberPart,
    "spacing": NumberPart,
    "text": SequencePart,
    "embedding": SequencePart,
    "image": ChannelPart,
    "labels": ChannelPart,
    "tokens": TokenPart,
}


# --- all conditions of a model ------------------------------------------------------------------------------


def join_masks(contexts: Sequence[Conditioned]) -> Tensor | None:
    """The mask (B, M) of the tokens of all `contexts`; None if every token is used, which is faster."""
    if all(m.context_mask is None for m in contexts):
        return None
    ones = [torch.ones_like(m.context[..., 0], dtype=torch.bool) for m in contexts]
    return torch.cat(
        [o if m.context_mask is None else m.context_mask for m, o in zip(contexts, ones, strict=True)], 1
    )


class Conditioner(nn.Module):
    """The conditions of a batch, by name -> `Conditioned`.

    A condition without a value is absent from all samples. Embeddings are added up, but for those of
    `concat`, which follow the sum; tokens and channels of several conditions are concatenated. The order is
    that of the conditions.
    """

    def __init__(self, config: ConditionConfig, conditions: Sequence[Condition], dims: int, emb_dim: int):
        super().__init__()
        self.conditions, self.concat = tuple(conditions), config.concat
        self.parts = nn.ModuleList(PARTS[c.kind](c, config, dims, emb_dim) for c in conditions)

    @property
    def num_channels(self) -> int:
        """Input channels that the conditions add to those of x_t."""
        return sum(part.num_channels for part in self.parts)

    @property
    def has_context(self) -> bool:
        return any(part.has_context for part in self.parts)

    def forward(self, values: dict[str, Tensor], like: Tensor) -> Conditioned:
        """like: any tensor of the shape and device of x_t (B, C_z, *s)."""
        check_names(values, self.conditions)
        parts = [part(value_of(c, values, like)) for c, part in zip(self.conditions, self.parts, strict=True)]
        named = [(c.name, p.emb) for c, p in zip(self.conditions, parts, strict=True) if p.emb is not None]
        embs = [emb for name, emb in named if name not in self.concat]
        beside = [emb for name, emb in named if name in self.concat]
        emb = sum(embs[1:], embs[0]) if embs else None
        if beside:
            emb = torch.cat([torch.zeros_like(beside[0]) if emb is None else emb, *beside], 1)
        channels = [p.channels for p in parts if p.channels is not None]
        contexts = [p for p in parts if p.context is not None]
        return Conditioned(
            torch.cat([p.context for p in contexts], 1) if contexts else None,
            join_masks(contexts),
            torch.cat(channels, 1) if channels else None,
            emb,
        )
