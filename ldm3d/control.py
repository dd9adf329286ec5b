"""ControlNet: a trained denoiser learns to follow a map, and itself stays as it is.

A denoiser that was trained on many volumes is worth keeping when only a few of them have masks. So its
weights are frozen. A copy of the half of its U-Net that reads also sees the map, and learns what to add to
the features that the frozen half that writes takes in (Zhang et al. 2023, arXiv 2302.05543, section 3):

    skips, h     = frozen encoder half(x_t, t, conditions)
    hint         = zero_conv(silu(conv(map)))                              `ControlEmbedding`
    skips', h'   = copy of the encoder half(x_t, t, conditions, + hint after the first convolution)
    prediction   = frozen decoder half(h + zero_conv(h'), skip_i + zero_conv_i(skip'_i) for every skip i)

A zero convolution has kernel 1, and weights and biases of zero at first. So training starts from the frozen
denoiser, whose predictions are the same to the bit, and moves away from it step by step. A sample without a
map gets nothing added: there the model is the frozen denoiser, after training too.

Example: x_t (2, 4, 16, 20, 16) with channels (64, 128), and a map of 3 labels, as shares (2, 3, 16, 20, 16).
The hint is (2, 64, 16, 20, 16). With one block a level, the copy gives residuals (2, 64, 16, 20, 16) for the
first convolution and for level 0, (2, 64, 8, 10, 8) for the down-sampling, and (2, 128, 8, 10, 8) for level 1
and for the middle.

The network is that of MONAI's and MAISI's ControlNet, so that their weights can be copied. There the map is
as fine as the image, and `ControlEmbedding` halves it once for each width after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import KeysValues
from .config import InputError
from .normconv import Conv
from .unet import UNet, UNetConfig, UNetEncoder


class ControlEmbedding(nn.Module):
    """A map (B, C, *(f s)) -> the hint (B, out_channels, *s), zero at first; f = 2^(len(channels) - 1).

    The first convolution gives channels[0]; for each further width, a convolution keeps the size and another
    one halves it; SiLU follows all of them.
    """

    def __init__(self, dims: int, in_channels: int, channels: Sequence[int], out_channels: int):
        super().__init__()
        self.conv_in = Conv(dims, in_channels, channels[0])
        self.convs = nn.ModuleList()
        for width, wider in pairwise(channels):
            self.convs += [Conv(dims, width, width), Conv(dims, width, wider, stride=2)]
        self.conv_out = Conv(dims, channels[-1], out_channels, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv_in(x))
        for conv in self.convs:
            h = F.silu(conv(h))
        return self.conv_out(h)


class ControlNet(UNetEncoder):
    """x (B, C, *s), t (B,), the hint, context, emb -> residuals for `UNet.features`, finest first, the
    middle's last.

    config: of the U-Net that is controlled. in_channels: of the map. embedding_channels: the widths within
    `ControlEmbedding`; none = the U-Net's finest width, for a map as fine as x. num_classes: of an embedding
    of classes of its own, as MONAI's ControlNets have; ours receive the U-Net's by `emb`.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        embedding_channels: Sequence[int] = (),
        num_classes: int | None = None,
    ):
        super().__init__(config)
        dims, width = config.dims, config.channels[0]
        self.embedding = ControlEmbedding(dims, in_channels, embedding_channels or (width,), width)
        widths = *self.skip_channels, config.channels[-1]
        self.zero_convs = nn.ModuleList(Conv(dims, n, n, kernel=1, zero_init=True) for n in widths)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes, config.emb_dim)

    def copy_weights(self, unet: UNet) -> None:
        """Start from the U-Net's own encoder half."""
        own = self.state_dict()
        self.load_state_dict(own | {k: v for k, v in unet.state_dict().items() if k in own})

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,
        context: Tensor | tuple[KeysValues, ...] | None = None,
        context_mask: Tensor | None = None,
        emb: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> list[Tensor]:
        """hint: `embedding(map)` (B, channels[0], *s), which all steps of sampling have in common. classes:
        (B,) int64, where there is an embedding of classes."""
        self._check(x, context)
        if (classes is None) != (self.class_embedding is None):
            wanted = "no classes" if self.class_embedding is None else "classes (B,)"
            raise InputError(f"classes: this ControlNet wants {wanted}")
        if self.class_embedding is not None:
            own = self.class_embedding(classes)
            emb = own if emb is None else own + emb
        h, skips = self.encode(x, self.embed(t, emb), context, context_mask, hint=hint)
        return [conv(h) for conv, h in zip(self.zero_convs, [*skips, h], strict=True)]


def where(present: Tensor, residuals: Sequence[Tensor]) -> list[Tensor]:
    """Residuals (B, ...) in the samples where present (B,) is True, elsewhere zero."""
    return [torch.where(present.view(-1, *(1,) * (r.ndim - 1)), r, 0.0) for r in residuals]
