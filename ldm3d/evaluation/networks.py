"""Networks that turn a volume or a slice into a feature vector, so that sets of volumes can be compared.

Distances of features can only be compared if the network is the same, so reports hold its hash. Three kinds:

    own    of `samples`: `FidelityNet`, fixed filters at several scales whose units are measured on the real
           set. Nothing is learned, so any number of real cases will do.
           of `copies`: `FeatureNet`, a small network that learns to distinguish the given real volumes,
           without labels. Two random views of one volume (small rotation, shift, scaling, gain) shall get
           features nearer to each other than to the views of all other volumes (Chen et al. 2020, arXiv
           2002.05709, eq. 1). With features h and z = head(h) / |head(h)| of view i, its partner j, and
           temperature tau:

               l(i, j) = -log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )

           The features used later are the means over space of the last two levels, divided by their standard
           deviations over the real set. Such features ignore what views share, blur above all: they tell
           cases apart, and do not say how real a volume looks.
           Both are stored under a key of their data, and the same for the same data and seed.
    FILE   TorchScript or torch.export: (B, C, *S) -> (B, F), or -> maps (B, F, *s), which are averaged over
           space; or the stored file of an own network. C is 1 or 3; for 3 the grey image is repeated.
           Or the weights of VGG-16 that --perceptual.weights takes: `VGGFeatures`.
    run    the encoder of a run: the means of its latent in 2 x 2 (x 2) parts. The encoder knows only what
           this run can express, so its figures compare samples of this run and no others.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError, from_dict, to_dict
from ..data import AugmentConfig, VolumeDataset
from ..data.transforms import augment
from ..engine.checkpoint import load_file, load_weights, save
from ..engine.distributed import keyed_generator, print0
from ..engine.logger import progress
from ..losses import PerceptualConfig, PerceptualLoss
from ..metrics import halve
from ..pipeline import load_autoencoder
from ..vae import Autoencoder
from .openers import VolumeSets, autoencoder_path, content_key, volumes_of

WIDTHS = (16, 32, 16, 16)
VIEWS = AugmentConfig(affine=1.0, max_rotation=10.0, max_scale=0.1, max_shift=0.05, intensity=1.0)
LARGEST = {2: 256, 3: 64}  # voxels along the longest axis that an own network sees; larger are averaged


@dataclass(frozen=True)
class FeatureConfig:
    dims: Literal[2, 3] = 3
    channels: int = 1
    pool: int = 1  # factor by which every axis is averaged first
    steps: int = 200  # optimizer steps
    batch_size: int = 16  # volumes a step, each in two views
    lr: float = 2e-3
    temperature: float = 0.2
    seed: int = 0


# --- telling cases apart ------------------------------------------------------------------------------------


class FeatureNet(nn.Module):
    """Pooled x (B, C, *S) -> features (B, 32) with mean 0 and variance 1 over the training set."""

    def __init__(self, config: FeatureConfig):
        super().__init__()
        self.config = config
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[config.dims]
        before = (config.channels, *WIDTHS[:-1])
        self.levels = nn.ModuleList(
            conv(a, b, 3, stride=2, padding=1, padding_mode="replicate")
            for a, b in zip(before, WIDTHS, strict=True)
        )
        num = sum(WIDTHS[-2:])
        self.head = nn.Sequential(nn.Linear(num, num), nn.SiLU(), nn.Linear(num, num))
        self.register_buffer("mean", torch.zeros(num))
        self.register_buffer("std", torch.ones(num))

    def pooled(self, x: Tensor) -> Tensor:
        """x averaged over config.pool voxels along each axis; shorter axes over their whole length."""
        pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[self.config.dims]
        width = [min(self.config.pool, n) for n in x.shape[2:]]
        return pool(x, width) if max(width) > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """x: a result of `pooled`."""
        found = []
        for level in self.levels:
            x = F.leaky_relu(level(x), 0.2)
            found.append(x.flatten(2).mean(2))
        return (torch.cat(found[-2:], dim=1) - self.mean) / self.std


def contrastive_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent: a, b (B, E) are two views of B cases; the mean of l(i, j) over all 2 B views."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    target = torch.arange(2 * len(a), device=z.device).roll(len(a))
    return F.cross_entropy(logits, target)


@torch.no_grad()
def standardise(net: FeatureNet, items: Tensor, device: torch.device) -> None:
    """Make the features of all items have mean 0 and variance 1; features that hardly vary stay small."""
    net.mean.zero_()
    net.std.fill_(1)
    found = torch.cat([net(x[None].to(device)) for x in items])
    std = found.std(0, correction=0)
    net.mean.copy_(found.mean(0))
    net.std.copy_(std.clamp(min=max(1e-2 * std.max().item(), 1e-8)))


def train_features(items: Tensor, config: FeatureConfig, device: torch.device) -> FeatureNet:
    """A feature network of pooled volumes (N, C, *S); it depends on these and the config alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = FeatureNet(config).to(device)
    standardise(net, items, device)  # what all items share would hide what distinguishes them
    optimizer = torch.optim.Adam(net.parameters(), config.lr)
    spacing = torch.ones(config.dims)
    for step in progress(range(config.steps), "learning features"):
        draw = keyed_generator(config.seed, step, "features")
        chosen = items[torch.randperm(len(items), generator=draw)[: config.batch_size]]
        views = [augment([x], None, spacing, VIEWS, draw)[0][0] for _ in range(2) for x in chosen]
        a, b = net.head(net(torch.stack(views).to(device))).chunk(2)
        loss = contrastive_loss(a, b, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    standardise(net, items, device)
    return net.eval().requires_grad_(False)


# --- how real volumes look ----------------------------------------------------------------------------------

CELLS, LAYOUT_CELLS = 3, 4  # parts of every axis in which detail and intensity are measured
DETAIL_WEIGHTS = (0.03, 0.15, 0.8, 0.4)  # finest scale first; the last is that of all coarser scales too
EDGE_WEIGHTS = (1.0, 1.0)  # of the pairs of neighbouring scales, finest first; coarser pairs: 0
JUMP_WEIGHT, LAYOUT_WEIGHT = 0.3, 0.15
MOST_DETAIL = 3.0  # times that of real cases; more counts as this
UNIT = 10.0  # all features are multiplied by it, so that Frechet distances are mostly above 1


@dataclass(frozen=True)
class FidelityConfig:
    dims: Literal[2, 3] = 3
    channels: int = 1
    scales: int = 4  # each half as fine as the scale before


class FidelityNet(nn.Module):
    """How real does a volume look? x (B, C, *S) -> features (B, F), whose mean over the real set is 0.

    A set distance has to find small what a reader finds small (a rotation by 2 degrees, lost noise), and
    large what is impossible (half a head, two halves that do not belong together, clouds). So every block of
    features answers one question, in a unit that bounds what the answer can cost. First, x is brought to
    mean 0 and standard deviation 1 of its coarse structure (x smoothed and halved twice). So gain and offset
    do not matter, and a blur, which leaves the coarse structure alone, does not change its scale.

        detail  how much is there at this scale, and where? band_s = x_s - smoothed(x_s), where x_{s+1} is
                the smoothed x_s at half the resolution (Burt & Adelson 1983). Root mean square of the band
                in 3 x 3 (x 3) cells, divided by its root mean square over the real set. A blur takes from
                the finest scales only; a part that is missing or misplaced takes from all scales.
        edges   are fine details where coarser edges are? Correlation over space of |band_{s-1}| and
                |band_s|. Anatomy has it, noise and clouds have not.
        jump    do neighbouring planes belong together? Let p_i be the mean |difference| of planes i and
                i + 1. A seam stands out of its surroundings: the largest (p_i - max_{1 <= |k| <= 3} p_{i+k})
                / mean(p), in the middle 80 % of any axis, between 0 and 1.
        layout  is there tissue where it should be? Mean intensity in 4 x 4 (x 4) cells.

    A block of n numbers is multiplied by UNIT sqrt(weight / n). The weights are chosen by experiment so that
    the Frechet distance orders damages of synthetic heads and of hippocampus MRI (tests/evaluation): other
    real cases < rotation by 2 degrees < an autoencoder's output < blur < cut, rolled, joined halves < noise,
    clouds, decoded noise. The finest scales weigh least: most of what is there is noise, which no model of
    the anatomy has to reproduce. Variety weighs little: recall, coverage and MS-SSIM measure it.

    Example: a blur that takes all detail of the finest scale and half that of the next moves the features by
    UNIT^2 (0.03 * 1^2 + 0.15 * 0.5^2) = 6.75 of Frechet distance; a seam in every volume by up to 30.
    """

    def __init__(self, config: FidelityConfig):
        super().__init__()
        self.config = config
        pairs = min(len(EDGE_WEIGHTS), config.scales - 1)
        per_channel = CELLS**config.dims * config.scales + pairs + 1 + LAYOUT_CELLS**config.dims
        num = config.channels * per_channel
        self.register_buffer("mean", torch.zeros(num))
        self.register_buffer("gain", torch.ones(num))
        self.register_buffer("most", torch.full((num,), math.inf))

    def blocks(self, x: Tensor) -> dict[str, Tensor]:
        """The features of x (B, C, *S) by question, in their own units: {name: (B, C, n)}."""
        coarse = x
        for _ in range(min(2, self.config.scales - 1)):
            coarse = halve(smoothed(coarse))
        std, mean = torch.std_mean(coarse.flatten(2), 2, correction=0)
        std = std.maximum(1e-4 * x.flatten(2).abs().amax(2)).clamp(min=1e-12)  # of constant x: any will do
        shape = (*std.shape, *(1,) * self.config.dims)
        x = (x - mean.view(shape)) / std.view(shape)
        found, finer = {"layout": cell_means(x, LAYOUT_CELLS), "jump": largest_jump(x)}, None
        for scale in range(self.config.scales):
            low = smoothed(x)
            band = x - low
            found[f"detail{scale}"] = cell_means(band.square(), CELLS).sqrt()
            if 0 < scale <= len(EDGE_WEIGHTS):
                found[f"edges{scale}"] = correlation(halve(finer), band.abs())
            finer = band.abs()
            if scale + 1 < self.config.scales:
                x = halve(low)
        return found

    @torch.no_grad()
    def fit(self, items: Iterable[Tensor]) -> int:
        """Measure the units on real items (B, C, *S), given a few at a time; returns the number of items."""
        found = [self.blocks(x) for x in items]
        gains, limits, rows = [], [], []
        for name in found[0]:
            block = torch.cat([blocks[name] for blocks in found])  # (N, C, n)
            shape, unit = block.shape[1:], torch.ones_like(block[0, :, 0])  # (C,)
            if name.startswith("detail"):
                unit = block.square().mean((0, 2)).sqrt().clamp(min=1e-3)
            gain = UNIT * math.sqrt(block_weight(name) / block.shape[2]) / unit
            limit = unit * (MOST_DETAIL if name.startswith("detail") else math.inf)
            gains.append(gain[:, None].expand(shape).flatten())
            limits.append(limit[:, None].expand(shape).flatten())
            rows.append(block.flatten(1))
        self.gain.copy_(torch.cat(gains))
        self.most.copy_(torch.cat(limits))
        self.mean.copy_(torch.cat(rows, dim=1).minimum(self.most).mean(0))
        return len(rows[0])

    def forward(self, x: Tensor) -> Tensor:
        blocks = [block.flatten(1) for block in self.blocks(x).values()]
        return (torch.cat(blocks, dim=1).minimum(self.most) - self.mean) * self.gain


def block_weight(name: str) -> float:
    """The weight of a block of `FidelityNet.blocks`."""
    if name in ("jump", "layout"):
        return JUMP_WEIGHT if name == "jump" else LAYOUT_WEIGHT
    scale = int(name[-1])
    if name.startswith("edges"):
        return EDGE_WEIGHTS[scale - 1]
    return DETAIL_WEIGHTS[min(scale, len(DETAIL_WEIGHTS) - 1)]


def smoothed(x: Tensor) -> Tensor:
    """x (B, C, *S) filtered with (1, 4, 6, 4, 1) / 16 along every axis; the edge is repeated."""
    for axis in list(range(2, x.ndim)) * 2:  # (1, 2, 1) / 4 twice
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        inner = x.shape[axis] - 1
        before = torch.cat([first, x.narrow(axis, 0, inner)], axis)
        after = torch.cat([x.narrow(axis, 1, inner), last], axis)
        x = (before + 2 * x + after) / 4
    return x


def cell_means(x: Tensor, cells: int) -> Tensor:
    """Means of x (B, C, *S) in `cells` parts of every axis: (B, C, cells^dims)."""
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[x.ndim - 2]
    return pool(x, cells).flatten(2)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over space of a and b (B, C, *S): (B, C, 1), 0 where one of them is constant."""
    a, b = ((v - v.mean(2, keepdim=True)) for v in (a.flatten(2), b.flatten(2)))
    norm = (a.square().mean(2, keepdim=True) * b.square().mean(2, keepdim=True)).sqrt()
    return (a * b).mean(2, keepdim=True) / norm.clamp(min=1e-12)


def largest_jump(x: Tensor) -> Tensor:
    """How far the largest seam of x (B, C, *S) stands out: (B, C, 1), 0 to 1; see `FidelityNet`."""
    found = [x.new_zeros(x.shape[:2])]
    for axis in range(2, x.ndim):
        jumps = x.diff(dim=axis).abs().movedim(axis, 2).flatten(3).mean(3)  # (B, C, planes - 1)
        margin = round(0.1 * jumps.shape[2])
        if jumps.shape[2] < 7:  # too few planes to have surroundings
            continue
        windows = F.pad(jumps, (3, 3)).unfold(2, 7, 1)  # (B, C, planes - 1, 7)
        around = torch.cat([windows[..., :3], windows[..., 4:]], 3).amax(3)
        above = (jumps - around) / jumps.mean(2, keepdim=True).clamp(min=1e-8)
        found.append(above[..., margin : jumps.shape[2] - margin].amax(2))
    return torch.stack(found).amax(0).clamp(max=1)[..., None]


def scales_for(size: Sequence[int]) -> int:
    """As many scales as leave 4 voxels along the shortest axis; at least one."""
    return min(8, max(1, 1 + int(math.log2(max(min(size), 4) / 4))))


# --- a network of photographs -------------------------------------------------------------------------------


def planes_of(x: Tensor, slices: int) -> list[Tensor]:
    """x (C, D, H, W) -> for each axis its slices (num, C, h, w), evenly spaced over the middle 80 %."""
    found = []
    for axis, n in enumerate(x.shape[1:], start=1):
        num = min(slices, max(1, round(0.8 * n)))
        chosen = (0.1 * n + 0.8 * n * (torch.arange(num) + 0.5) / num).long().clamp(max=n - 1)
        found.append(x.index_select(axis, chosen.to(x.device)).movedim(axis, 0))
    return found


class VGGFeatures(nn.Module):
    """What a network that was trained on photographs sees: (B, C, *S) -> (B, F), from the weights of VGG-16.

    Features of an image are the means over space of the maps that the perceptual loss compares, side by side
    for all stages that fit (64 + 128 + 256 + 512 + 512 with all five). Three channels of an image are
    colours, others are grey images with features of their own. Features of a volume are means over slices
    (at most 16 across each axis), then over axes, of its channels as grey images.
    """

    SLICES = 16

    def __init__(self, file: str):
        super().__init__()
        self.net = PerceptualLoss(PerceptualConfig((file,)))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self._of_images(x, x.shape[1] == 3).flatten(1)
        return torch.stack([self._of_volume(volume) for volume in x])

    def _of_volume(self, x: Tensor) -> Tensor:
        """x (C, D, H, W) -> (F,)."""
        planes = [self._of_images(plane, False) for plane in planes_of(x, self.SLICES)]
        fewest = min(f.shape[2] for f in planes)  # slices across another axis may fit more stages
        return torch.stack([f[:, :, :fewest].mean(0).flatten() for f in planes]).mean(0)

    def _of_images(self, x: Tensor, colours: bool) -> Tensor:
        """x (B, C, H, W) -> features (B, C, F); C is 1 if they have `colours`."""
        images = x if colours else x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        f = torch.cat([m.flatten(2).mean(2) for m in self.net.features(images)], dim=1)
        return f.view(len(x), -1, f.shape[1])


# --- networks ready for use ---------------------------------------------------------------------------------


class Extractor:
    """A feature network ready for use: x (B, C, *S) -> features (B, F); with name and hash for the report."""

    def __init__(self, call: Any, name: str, digest: str, device: torch.device, channels: int | None = None):
        self.call, self.name, self.digest = call, name, digest
        self.device, self.channels = device, channels

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(B, F) float32 on the CPU. InputError if the network refuses x or returns no finite features."""
        x = x.to(self.device)
        try:
            out = self._call(x)
        except Exception as e:  # the network is the user's: anything can happen in it
            reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
            raise InputError(
                f"{self.name}: does not take an input of shape {tuple(x.shape)} ({reason})"
            ) from None
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(x):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"{self.name}: expected features ({len(x)}, F), got {got}")
        out = out.float().cpu()
        if not torch.isfinite(out).all():
            raise InputError(f"{self.name}: its features are not finite")
        return out if out.ndim == 2 else out.flatten(2).mean(2)

    def _call(self, x: Tensor) -> Any:
        if self.channels is None and x.shape[1] == 1:
            try:
                out = self.call(x)
                self.channels = 1
                return out
            except Exception:
                out = self.call(x.expand(-1, 3, *x.shape[2:]))
                self.channels = 3
                return out
        return self.call(x.expand(-1, self.channels or x.shape[1], *x.shape[2:]))

    def describe(self) -> dict[str, str]:
        return {"network": self.name, "sha256": self.digest}


def weights_hash(net: nn.Module) -> str:
    """SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- stored networks ----------------------------------------------------------------------------------------

STORED = {"contrastive": (FeatureNet, FeatureConfig), "fidelity": (FidelityNet, FidelityConfig)}


def _stored(path: Path) -> FeatureNet | FidelityNet:
    content = load_file(path, "features")
    # Files from before there were two kinds do not name theirs
    make, config = STORED[content.get("network", "contrastive")]
    net = make(from_dict(config, content["config"], "features"))
    load_weights(net, content["model"], str(path))
    return net.eval().requires_grad_(False)


def _extractor(net: FeatureNet | FidelityNet, name: str, device: torch.device) -> Extractor:
    call = (lambda x: net(net.pooled(x))) if isinstance(net, FeatureNet) else net
    return Extractor(call, name, weights_hash(net), device, channels=net.config.channels)


def _kept(
    folder: Path, key: Any, kind: str, make: Callable[[Path], FeatureNet | FidelityNet], device: torch.device
) -> Extractor:
    """The network that is kept in `folder` under this key; the repr of the key is hashed.

    If there is none, make(its file) makes it, and it is written. kind: of STORED.
    """
    path = folder / f"features-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        return _extractor(_stored(path).to(device), str(path), device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cache_dir: {folder} cannot be made ({e.strerror})") from None
    net = make(path)
    content = {"kind": "features", "network": kind, "config": to_dict(net.config)}
    save(path, {**content, "model": net.state_dict()})
    return _extractor(net.eval(), str(path), device)


def pool_for(size: Sequence[int]) -> int:
    """The `pool` of a `FeatureNet` for volumes of this size."""
    return -(-max(size) // LARGEST[len(size)])


def contrastive_features(
    dataset: VolumeDataset, steps: int, seed: int, cache_dir: str, device: torch.device
) -> Extractor:
    """A `FeatureNet`: read from cache_dir if it was trained on these volumes before, else trained now."""
    spec = dataset.spec
    config = FeatureConfig(spec.dims, spec.channels, pool_for(spec.size), steps, seed=seed)

    def make(path: Path) -> FeatureNet:
        print0(f"training a {spec.dims}-D feature network on {len(dataset)} real items, once: {path}")
        pooled = FeatureNet(config).pooled
        return train_features(torch.cat([pooled(x[None]) for x in volumes_of(dataset)]), config, device)

    key = content_key(dataset), to_dict(config), WIDTHS, VIEWS
    return _kept(Path(cache_dir), key, "contrastive", make, device)


def fidelity_features(
    items: Callable[[], Iterable[Tensor]],
    key: Any,
    config: FidelityConfig,
    folder: Path,
    device: torch.device,
) -> Extractor:
    """A `FidelityNet`: read from `folder` if its units were measured for this key and config before, else
    measured now on items(), tensors (B, C, *S).

    key: all that the items depend on, such as files and their times; its repr is hashed.
    """
    constants = DETAIL_WEIGHTS, EDGE_WEIGHTS, JUMP_WEIGHT, LAYOUT_WEIGHT, CELLS, LAYOUT_CELLS
    constants += MOST_DETAIL, UNIT

    def make(path: Path) -> FidelityNet:
        net = FidelityNet(config).to(device)
        num = net.fit(x.to(device) for x in items())
        print0(f"measured the units of {config.dims}-D features on {num} real items, once: {path}")
        return net

    return _kept(folder, ("fidelity", key, to_dict(config), constants), "fidelity", make, device)


def whole_fidelity(dataset: VolumeDataset, cache_dir: str, device: torch.device) -> Extractor:
    """The `FidelityNet` of whole volumes of a data set."""
    spec = dataset.spec
    config = FidelityConfig(spec.dims, spec.channels, scales_for(spec.size))
    return fidelity_features(
        lambda: (x[None] for x in volumes_of(dataset)), content_key(dataset), config, Path(cache_dir), device
    )


# --- the choice ---------------------------------------------------------------------------------------------


class FeatureChoice(Protocol):
    """The settings of a command that choose its features."""

    features: str  # own, run, none, or a file
    cache_dir: str


def encoder_features(autoencoder: Autoencoder, device: torch.device) -> Extractor:
    """Features of a run's encoder: means of the latent over 2 parts of every axis, (B, C_z * 2^dims)."""
    autoencoder = autoencoder.to(device)
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[autoencoder.config.dims]

    def call(x: Tensor) -> Tensor:
        return pool(autoencoder.encode(x).mean, 2).flatten(1)

    return Extractor(call, "the run's encoder (within this run only)", weights_hash(autoencoder), device)


def file_features(path: str, dims: int, device: torch.device) -> Extractor:
    """The network in a file: TorchScript, torch.export, weights of VGG-16, or a stored own network."""
    if not Path(path).is_file():
        raise InputError(f"features: {path}: no such file (own, run, none, or a file)")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    try:
        net = _stored(Path(path))
    except InputError:
        net = None
    if net is not None:
        if net.config.dims != dims:
            raise InputError(f"features: {path}: a network for {net.config.dims}-D, expected {dims}-D")
        return _extractor(net.to(device), path, device)
    problems = []
    for kind, reader in (("", _script), ("VGG-16 of ", _vgg), ("", _exported)):
        try:
            with warnings.catch_warnings():  # TorchScript is deprecated
                warnings.simplefilter("ignore")
                return Extractor(reader(path, device), f"{kind}{path}", digest, device)
        except Exception as e:
            problems.append((str(e).strip().splitlines() or [type(e).__name__])[0])
    raise InputError(
        f"features: {path}: neither TorchScript ({problems[0]}) nor torch.export ({problems[2]}) "
        f"nor weights of VGG-16 ({problems[1]})"
    )


def _script(path: str, device: torch.device) -> Any:
    return torch.jit.load(path, map_location=device).eval()


def _exported(path: str, device: torch.device) -> Any:
    return torch.export.load(path).module().to(device)


def _vgg(path: str, device: torch.device) -> VGGFeatures:
    return VGGFeatures(path).to(device).eval()


def whole_features(
    sets: VolumeSets,
    real: str,
    choice: FeatureChoice,
    own: Callable[[VolumeDataset], Extractor],
    device: torch.device,
) -> Extractor | None:
    """The network for whole volumes that the settings choose; None for "none".

    real: name of the set that an own network is made for. own: makes it.
    """
    dataset = sets.sets[real]
    if choice.features == "none":
        return None
    if choice.features == "run":
        if sets.run is None:
            raise InputError("features: run: needs a run folder, as the real set or as --run")
        return encoder_features(load_autoencoder(autoencoder_path(sets.run))[0], device)
    if choice.features != "own":
        return file_features(choice.features, dataset.spec.dims, device)
    return own(dataset)
