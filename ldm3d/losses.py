"""Losses of autoencoders and segmentation: reconstruction, KL, overlap, adversarial and perceptual terms.

Every loss is (B,), a mean over elements, so that a weight means the same for every image size; the caller
takes the mean over the batch. Arithmetic is float32 whatever the precision of the networks (float64 for
float64 inputs). The structural term 1 - MS-SSIM is in metrics.py.

    reconstruction   mean |recon - x|  or  mean (recon - x)^2
    KL               KL(N(mean, exp(logvar)) || N(0, 1)) = (mean^2 + exp(logvar) - 1 - logvar) / 2
                     in nats per latent element, without a clamp [1]; free bits: a channel never costs less
                     than a floor [2]
    gradient         mean |D recon - D x|, D the difference of neighbours along an axis, at several scales.
                     A blurred edge has a small mean error but a wrong gradient (compare Mathieu et al. 2016,
                     section 3.2)
    cross-entropy    -log p_y for the true label y, mean over voxels
    Dice             1 - (2 sum p y + 1) / (sum p + sum y + 1), sums over the voxels of a sample, mean over
                     all labels but the background; p probability, y 0 or 1; compare [10]

    adversarial      r, f: logits of real and reconstructed images (discriminators.py); means over patches and
                     scales; d_loss trains the discriminator, g_loss the autoencoder
      hinge          d_loss = relu(1 - r) + relu(1 + f),        g_loss = -f                  [3] eq. 16, 17
      lsgan          d_loss = (r - 1)^2 / 2 + f^2 / 2,          g_loss = (f - 1)^2 / 2       [4] eq. 9
      non_saturating d_loss = softplus(-r) + softplus(f),       g_loss = softplus(-f)        [5] eq. 1, sec. 3
    adaptive weight  min(cap, |dloss/dW| / (|dg_loss/dW| + 1e-4)), W the decoder's last weights    [6] eq. 7
    R1               |d(sum_p r_p)/dx|^2 / P at real images x, for the P patches of a scale. Where patches do
                     not overlap, that is the mean of |dr_p/dx|^2, at every image size             [7] eq. 9
    feature matching mean |F(recon) - F(x)| over the discriminator's hidden maps F                 [8] eq. 3
    perceptual       sum_l mean_hw sum_c w_lc (F_lc(recon) - F_lc(x))^2, with |F_l| = 1 over c     [9] eq. 1

[1] Kingma & Welling 2014, appendix B. [2] Kingma et al. 2016 (1606.04934), appendix C.8. [3] Miyato et al.
2018 (1802.05957). [4] Mao et al. 2017 (1611.04076). [5] Goodfellow et al. 2014 (1406.2661). [6] Esser et al.
2021 (2012.09841). [7] Mescheder et al. 2018 (1801.04406). [8] Wang et al. 2018 (1711.11585). [9] Zhang et al.
2018 (1801.03924), with the features of VGG-16, Simonyan & Zisserman 2015 (1409.1556), configuration D. [10]
Milletari et al. 2016 (1606.04797).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import InputError
from .engine.distributed import all_reduce_sum, world_size

AdversarialKind = Literal["hinge", "lsgan", "non_saturating"]

# --- reconstruction and latent ------------------------------------------------------------------------------


def reconstruction_loss(recon: Tensor, x: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute or squared difference of recon and x (B, C, *S): (B,)."""
    error = _full_precision(recon) - _full_precision(x)
    return (error.abs() if kind == "l1" else error.square()).flatten(1).mean(1)


def kl_per_element(mean: Tensor, logvar: Tensor, free_bits: float = 0.0) -> Tensor:
    """KL of the posterior to the standard normal, in nats per latent element: (B,) from (B, C_z, *s).

    free_bits: the least that a channel of a sample costs, in nats per element. A channel below this floor
    pays the floor and has no gradient, so that the KL cannot switch off a channel that carries little.
    """
    mean, logvar = _full_precision(mean), _full_precision(logvar)
    per_channel = (mean.square() + torch.expm1(logvar) - logvar).flatten(2).mean(2) / 2  # (B, C_z)
    return (per_channel.clamp(min=free_bits) if free_bits else per_channel).mean(1)


def gradient_loss(recon: Tensor, x: Tensor, num_scales: int = 3) -> Tensor:
    """Mean absolute difference of the gradients of recon and x (B, C, *S), over axes and scales: (B,).

    The gradient is the difference of neighbouring voxels. Each further scale averages pairs of voxels along
    all axes that are at least 4 long; there are fewer scales where no axis is. An axis of length 1 has no
    gradient.
    """
    error = _full_precision(recon) - _full_precision(x)  # D is linear: D recon - D x = D error
    terms = [error.new_zeros(error.shape[:1])] if max(error.shape[2:]) == 1 else []
    for _ in range(num_scales):
        axes = [axis for axis in range(2, error.ndim) if error.shape[axis] > 1]
        terms += [error.diff(dim=axis).abs().flatten(1).mean(1) for axis in axes]
        strides = [2 if size >= 4 else 1 for size in error.shape[2:]]
        if max(strides) == 1:
            break
        for axis, stride in enumerate(strides, start=2):  # avg_pool3d's gradient is not bit-exact on a GPU
            pairs = error.narrow(axis, 0, error.shape[axis] // stride * stride).unflatten(axis, (-1, stride))
            error = pairs.mean(axis + 1) if stride > 1 else error
    return torch.stack(terms).mean(0)


def cross_entropy_loss(logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (B, K, *S) and mask (B, *S) int64, mean over voxels: (B,).

    weight (B, *S) multiplies the loss of every voxel before the mean.
    """
    log_p = _full_precision(logits).log_softmax(1)
    loss = -log_p.gather(1, mask[:, None])[:, 0]  # F.cross_entropy has no deterministic mode on a GPU
    return (loss if weight is None else loss * weight).flatten(1).mean(1)


def dice_loss(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Soft Dice loss of probability (B, K, *S) and one-hot target (B, K, *S), without label 0: (B,).

    weight (B, *S) multiplies every voxel in the sums.
    """
    p, y = (_full_precision(v)[:, 1:].flatten(2) for v in (probability, target))  # (B, K - 1, N)
    w = 1.0 if weight is None else weight.flatten(1)[:, None]
    both, either = (w * p * y).sum(2), (w * (p + y)).sum(2)
    return 1 - ((2 * both + 1) / (either + 1)).mean(1)


def ramp(step: int, start: int, length: int) -> float:
    """A weight that is 0 before step `start` and then rises linearly to 1 within `length` steps."""
    return min(1.0, (step - start + 1) / max(1, length)) if step >= start else 0.0


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- adversarial --------------------------------------------------------------------------------------------


def discriminator_loss(
    logits_real: Sequence[Tensor], logits_fake: Sequence[Tensor], kind: AdversarialKind = "hinge"
) -> Tensor:
    """What the discriminator minimises, (B,); logits (B, 1, *patches), one tensor per scale."""
    if kind == "hinge":
        real = _patch_mean(logits_real, lambda r: F.relu(1 - r))
        return real + _patch_mean(logits_fake, lambda f: F.relu(1 + f))
    if kind == "lsgan":
        real = _patch_mean(logits_real, lambda r: (r - 1).square())
        return (real + _patch_mean(logits_fake, torch.square)) / 2
    return _patch_mean(logits_real, lambda r: F.softplus(-r)) + _patch_mean(logits_fake, F.softplus)


def generator_loss(logits_fake: Sequence[Tensor], kind: AdversarialKind = "hinge") -> Tensor:
    """What the autoencoder minimises, (B,); logits of its reconstructions, one tensor per scale."""
    if kind == "hinge":
        return -_patch_mean(logits_fake, lambda f: f)
    if kind == "lsgan":
        return _patch_mean(logits_fake, lambda f: (f - 1).square()) / 2
    return _patch_mean(logits_fake, lambda f: F.softplus(-f))


def disc_accuracy(
    logits_real: Sequence[Tensor], logits_fake: Sequence[Tensor], kind: AdversarialKind = "hinge"
) -> Tensor:
    """Share of patches that are judged rightly, (B,): 1/2 by chance, 1 when the discriminator has won."""
    middle = 0.5 if kind == "lsgan" else 0.0
    real = _patch_mean(logits_real, lambda r: (r > middle).float())
    return (real + _patch_mean(logits_fake, lambda f: (f <= middle).float())) / 2


def r1_penalty(logits_real: Sequence[Tensor], x: Tensor) -> Tensor:
    """R1 at real images x, (B,): how steeply the discriminator's logits change with the image.

    logits_real must have been computed from x, and x must require a gradient. The result can be
    differentiated again.
    """
    penalties = []
    for logits in logits_real:
        (gradient,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
        penalties.append(gradient.float().square().flatten(1).sum(1) / logits[0].numel())
    return torch.stack(penalties).mean(0)


def feature_matching_loss(features_fake: Sequence[Tensor], features_real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of a discriminator's hidden maps, (B,); real ones receive no gradient."""
    pairs = zip(features_fake, features_real, strict=True)
    return _map_mean([(_full_precision(a) - _full_precision(b.detach())).abs() for a, b in pairs])


def last_gradients(loss: Tensor, g_loss: Tensor, last_weight: Tensor, scale: float = 1.0) -> Tensor:
    """The gradients (2, *) of loss and g_loss, two scalars, at the decoder's last weights. The graph stays.

    `scale` multiplies both losses in the backward pass and is divided out again: float16 would lose small
    gradients.
    """
    gradients = [torch.autograd.grad(v * scale, last_weight, retain_graph=True)[0] for v in (loss, g_loss)]
    return torch.stack(gradients).float() / scale


def adaptive_weight(gradients: Tensor, cap: float = 1e4) -> Tensor:
    """Scalar weight for g_loss that makes its gradient as large as that of the loss, at most `cap`.

    gradients (2, *): `last_gradients` of the means over this rank's batch. Gradients are averaged over ranks
    before they are compared, so that every rank has the weight of the joined batch.
    """
    norms = all_reduce_sum(gradients / world_size()).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=cap)


def _patch_mean(logits: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of loss(logits) over the patches of a scale, then over scales: (B,)."""
    return _map_mean([loss(_full_precision(v)) for v in logits])


def _map_mean(maps: Sequence[Tensor]) -> Tensor:
    """Mean over the elements of each map, then over maps: (B,)."""
    return torch.stack([v.flatten(1).mean(1) for v in maps]).mean(0)


# --- perceptual ---------------------------------------------------------------------------------------------

VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # indices of each stage's convolutions
WHERE_FROM = (
    "perceptual.weights: a perceptual loss needs a local file of VGG-16 weights. Where there is internet, "
    "`pip install lpips`, then `python -c \"import lpips, torch; torch.save(lpips.LPIPS(net='vgg')"
    ".state_dict(), 'lpips_vgg.pth')\"` makes one for --perceptual.weights lpips_vgg.pth (or torchvision's "
    "vgg16-397923af.pth, alone or with the heads of lpips: --perceptual.weights vgg16-397923af.pth,vgg.pth)"
)


def read_vgg(files: Sequence[str | Path]) -> tuple[dict[int, tuple[Tensor, Tensor]], list[Tensor | None]]:
    """The 13 convolutions as {index: (weight, bias)}, and the weights (C,) of the 5 heads, None if missing.

    Three layouts of a file are read: torchvision's vgg16 (features.0.weight), a whole LPIPS
    (net.slice1.0.weight, lin0.model.1.weight), and the heads of LPIPS alone. Several files are joined. Code
    in a file is not executed. Raises InputError for a file without VGG-16's weights.
    """
    if not files:
        raise InputError(WHERE_FROM)
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"perceptual.weights: {file}: no such file") from None
        except Exception as e:  # torch.load raises many kinds for a damaged file
            reason = (str(e).splitlines() or [type(e).__name__])[0].split(". ")[0]
            raise InputError(f"perceptual.weights: {file}: not a file of weights ({reason})") from None
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        for name, value in content.items():
            if match := re.search(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))$", name):
                found[match[1]] = value.float()
            elif match := re.search(r"(?:^|\.)lins?\.?(\d)\.(?:model\.)?\d+\.weight$", name):
                found[f"head{match[1]}"] = value.float().flatten()
    convolutions = {}
    for index in sum(VGG16, ()):
        if f"{index}.weight" not in found or f"{index}.bias" not in found:
            names = " and ".join(map(str, files))
            missing = f"no VGG-16 here (features.{index}.weight is missing)"
            raise InputError(f"perceptual.weights: {names}: {missing}")
        convolutions[index] = (found[f"{index}.weight"], found[f"{index}.bias"])
    return convolutions, [found.get(f"head{stage}") for stage in range(len(VGG16))]


@dataclass(frozen=True)
class PerceptualConfig:
    weights: tuple[str, ...] = ()  # local files: a whole lpips (vgg), or torchvision's vgg16 [, lpips' heads]
    fraction: float = 0.2  # part of a volume's slices that are compared, along each of its three axes

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction: expected 0 < fraction <= 1, got {self.fraction}")


def _take(x: Tensor, axis: int, rows: Sequence[Tensor]) -> Tensor:
    """Slices of every sample of x (B, C, *S), at its own positions `rows` (num,) along one axis of S.

    The result is (B num, C, *other axes).
    """
    slices = [v.index_select(axis + 1, row).movedim(axis + 1, 0) for v, row in zip(x, rows, strict=True)]
    return torch.cat(slices)


class PerceptualLoss(nn.Module):
    """How different two images look to a network that was trained on photographs (VGG-16 with LPIPS weights).

    The network is frozen and not part of a state_dict. Without the heads of LPIPS every channel has weight 1.
    Volumes are compared slice by slice (2.5-D): random slices along each axis, averaged over slices, then
    over axes. A channel is a grey image, except that the three channels of a 2-D image are colours. Slices
    too small for the deeper stages are compared in the shallower ones.
    """

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        self.config = config
        convolutions, heads = read_vgg(config.weights)
        for index, (weight, bias) in convolutions.items():
            self.register_buffer(f"weight{index}", weight, persistent=False)
            self.register_buffer(f"bias{index}", bias, persistent=False)
        for stage, head in enumerate(heads):
            ones = torch.ones(len(convolutions[VGG16[stage][-1]][1]))
            self.register_buffer(f"head{stage}", ones if head is None else head, persistent=False)
        # From [-1, 1] to intensities normalised by ImageNet's mean and standard deviation, as in LPIPS
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, recon: Tensor, x: Tensor, draws: Sequence[torch.Generator] = ()) -> Tensor:
        """Distance of recon and x (B, C, *S), both in [-1, 1]: (B,).

        draws: one CPU generator a sample, which chooses the slices of a volume; images need none.
        """
        if x.ndim == 4:
            return self.distance(recon, x, x.shape[1] == 3)
        if len(draws) != len(x):
            raise ValueError(f"draws: expected one generator for each of {len(x)} volumes, got {len(draws)}")
        planes = []
        for axis, size in enumerate(x.shape[2:]):
            num = max(1, round(self.config.fraction * size))
            rows = [torch.randperm(size, generator=draw)[:num].to(x.device) for draw in draws]
            pair = (_take(y, axis, rows) for y in (recon, x))  # (B num, C, h, w) each
            planes.append(self.distance(*pair, colours=False).view(len(x), num).mean(1))
        return torch.stack(planes).mean(0)

    def distance(self, recon: Tensor, x: Tensor, colours: bool) -> Tensor:
        """Distance of images (B, C, H, W), where C is 3 if they have `colours`: (B,)."""
        num = len(x)
        if not colours:
            recon, x = (y.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) for y in (recon, x))
        with torch.no_grad():
            targets = self.features(x)
        total = 0.0
        for stage, (a, b) in enumerate(zip(self.features(recon), targets, strict=True)):
            weighted = (a - b).square() * getattr(self, f"head{stage}").view(1, -1, 1, 1)
            total = total + weighted.sum(1).flatten(1).mean(1)
        return total.view(num, -1).mean(1)

    def features(self, x: Tensor) -> list[Tensor]:
        """The last map (B, C, h, w) of every stage for images x (B, 3, H, W), scaled to length 1 over C."""
        h, maps = (x - self.shift) / self.scale, []
        for stage in VGG16:
            if maps and min(h.shape[2:]) < 2:
                break
            h = F.max_pool2d(h, 2) if maps else h
            for i in stage:
                h = F.relu(F.conv2d(h, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), padding=1))
            # With the constant inside the root, the gradient at a vector of zeros is 0 and not NaN
            full = _full_precision(h)
            maps.append(full * torch.rsqrt(full.square().sum(1, keepdim=True) + 1e-10))
        return maps
