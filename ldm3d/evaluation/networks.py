"""Networks that turn a volume or a slice into a feature vector, so that sets of volumes can be compared.

Distances of features can only be compared if the network is the same, so reports hold its hash. Three kinds:

    own    a small network that learns to distinguish the given real volumes, without labels. Two random views
           of one volume (small rotation, shift, scaling, gain) shall get features nearer to each other than
           to the views of all other volumes (Chen et al. 2020, arXiv 2002.05709, eq. 1). With features h and
           z = head(h) / |head(h)| of view i, its partner j, and temperature tau:

               l(i, j) = -log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )

           The features used later are the means over space of the last two levels, divided by their standard
           deviations over the real set. A network is trained once, stored under a key of its training
           data, and the same for the same seed.
    FILE   TorchScript or torch.export: (B, C, *S) -> (B, F), or -> maps (B, F, *s), which are averaged over
           space; or the stored file of an own network. C is 1 or 3; for 3 the grey image is repeated.
    run    the encoder of a run: the means of its latent in 2 x 2 (x 2) parts. The encoder knows only what
           this run can express, so its figures compare samples of this run and no others.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError, from_dict, to_dict
from ..data import AugmentConfig
from ..data.transforms import augment
from ..engine.checkpoint import load, load_weights, save
from ..engine.distributed import keyed_generator, print0
from ..engine.logger import progress
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
    batch_size: int = 16  # volumes or slices a step, each in two views
    lr: float = 2e-3
    temperature: float = 0.2
    seed: int = 0


class FeatureChoice(Protocol):
    """The settings of a command that choose its features."""

    features: str  # own, run, none, or a file
    feature_steps: int
    seed: int
    cache_dir: str


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
def standardise(net: FeatureNet, groups: Sequence[Tensor], device: torch.device) -> None:
    """Make the features of all items have mean 0 and variance 1; features that hardly vary stay small."""
    net.mean.zero_()
    net.std.fill_(1)
    found = torch.cat([net(x[None].to(device)) for group in groups for x in group])
    std = found.std(0, correction=0)
    net.mean.copy_(found.mean(0))
    net.std.copy_(std.clamp(min=max(1e-2 * std.max().item(), 1e-8)))


def train_features(groups: Sequence[Tensor], config: FeatureConfig, device: torch.device) -> FeatureNet:
    """Train a feature network on pooled volumes or slices; the result depends on them and the config alone.

    groups: tensors (N, C, *S). All items of a group have one shape; steps take turns through the groups.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = FeatureNet(config).to(device)
    standardise(net, groups, device)  # what all items share would hide what distinguishes them
    optimizer = torch.optim.Adam(net.parameters(), config.lr)
    spacing = torch.ones(config.dims)
    for step in progress(range(config.steps), "learning features"):
        group = groups[step % len(groups)]
        draw = keyed_generator(config.seed, step, "features")
        chosen = group[torch.randperm(len(group), generator=draw)[: config.batch_size]]
        views = [augment([x], None, spacing, VIEWS, draw)[0][0] for _ in range(2) for x in chosen]
        a, b = net.head(net(torch.stack(views).to(device))).chunk(2)
        loss = contrastive_loss(a, b, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    standardise(net, groups, device)
    return net.eval().requires_grad_(False)


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


def encoder_features(autoencoder: Autoencoder, device: torch.device) -> Extractor:
    """Features of a run's encoder: means of the latent over 2 parts of every axis, (B, C_z * 2^dims)."""
    autoencoder = autoencoder.to(device)
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[autoencoder.config.dims]

    def call(x: Tensor) -> Tensor:
        return pool(autoencoder.encode(x).mean, 2).flatten(1)

    return Extractor(call, "the run's encoder (within this run only)", weights_hash(autoencoder), device)


def file_features(path: str, dims: int, device: torch.device) -> Extractor:
    """The feature network in a file: TorchScript, torch.export, or a stored own network."""
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
        return own_extractor(net.to(device), path, device)
    problems = []
    for reader in (_script, _exported):
        try:
            with warnings.catch_warnings():  # TorchScript is deprecated
                warnings.simplefilter("ignore")
                return Extractor(reader(path, device), path, digest, device)
        except Exception as e:
            problems.append((str(e).strip().splitlines() or [type(e).__name__])[0])
    raise InputError(
        f"features: {path}: neither TorchScript ({problems[0]}) nor torch.export ({problems[1]})"
    )


def _script(path: str, device: torch.device) -> Any:
    return torch.jit.load(path, map_location=device).eval()


def _exported(path: str, device: torch.device) -> Any:
    return torch.export.load(path).module().to(device)


# --- own networks -------------------------------------------------------------------------------------------


def _stored(path: Path) -> FeatureNet:
    content = load(path, "features")
    net = FeatureNet(from_dict(FeatureConfig, content["config"], "features"))
    load_weights(net, content["model"], str(path))
    return net.eval().requires_grad_(False)


def own_extractor(net: FeatureNet, name: str, device: torch.device) -> Extractor:
    return Extractor(
        lambda x: net(net.pooled(x)), name, weights_hash(net), device, channels=net.config.channels
    )


def pool_for(size: Sequence[int]) -> int:
    """The `pool` of an own network for volumes or slices of this size."""
    return -(-max(size) // LARGEST[len(size)])


def own_features(
    make_groups: Callable[[Callable[[Tensor], Tensor]], list[Tensor]],
    key: Any,
    config: FeatureConfig,
    folder: Path,
    device: torch.device,
) -> Extractor:
    """An own network: read from `folder` if it was trained for this key and config before, else trained now.

    make_groups: gets the function that pools items (B, C, *S), returns the tensors for `train_features`; only
    called for training. key: all that these tensors depend on, such as files and their times; its repr is
    hashed.
    """
    digest = hashlib.sha256(repr((key, to_dict(config), WIDTHS, VIEWS)).encode()).hexdigest()[:16]
    path = folder / f"features-{digest}.pt"
    if path.is_file():
        return own_extractor(_stored(path).to(device), str(path), device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cache_dir: {folder} cannot be made ({e.strerror})") from None
    net = FeatureNet(config)
    groups = make_groups(net.pooled)
    print0(f"training a {config.dims}-D feature network on {sum(map(len, groups))} real items, once: {path}")
    net = train_features(groups, config, device)
    save(path, {"kind": "features", "config": to_dict(config), "model": net.state_dict()})
    return own_extractor(net, str(path), device)


def whole_features(
    sets: VolumeSets, real: str, choice: FeatureChoice, device: torch.device
) -> Extractor | None:
    """The network for whole volumes that the settings choose; None for "none".

    real: name of the set that an own network is trained on.
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
    spec = dataset.spec
    config = FeatureConfig(
        spec.dims, spec.channels, pool_for(spec.size), choice.feature_steps, seed=choice.seed
    )

    def volumes(pooled: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [torch.cat([pooled(x[None]) for x in volumes_of(dataset)])]

    return own_features(volumes, content_key(dataset), config, Path(choice.cache_dir), device)
