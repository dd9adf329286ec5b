"""From a latent to a label map at the resolution of the image: which head?

    python tests/benchmarks/label_heads.py runs/anatomy/hippocampus      where anatomy.py has its autoencoder

Three heads learn the masks of the training cases from clean latents, each behind two residual blocks of its
own, in the same steps with the same loss (registers.py):

    patch       logits of a patch of voxels for each latent voxel: the head of ldm3d/registers.py
    upsampled   logits at the resolution of the latent, linearly interpolated
    decoder     these, and two convolutions that see them beside the decoded image

Dice of every label: mean over test cases and seeds. Seconds: CPU time of a training step; decoded images are
made before.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ldm3d.blocks import ResBlock, crop_to  # noqa: E402
from ldm3d.data import VolumeDataset, open_stored  # noqa: E402
from ldm3d.engine.logger import progress  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.metrics import dice  # noqa: E402
from ldm3d.normconv import Conv  # noqa: E402
from ldm3d.pipeline import load_autoencoder  # noqa: E402
from ldm3d.registers import AnatomyConfig, LabelHead, head_loss  # noqa: E402
from ldm3d.unet import UNetConfig  # noqa: E402
from ldm3d.vae import Autoencoder  # noqa: E402

WIDTH = 64


class Head(nn.Module):
    """Latents z (B, C_z, *s), decoded images (B, C, *S) -> logits (B, K, *S)."""

    def __init__(self, kind: str, autoencoder: Autoencoder, channels: int, num_labels: int):
        super().__init__()
        dims, latent_channels = autoencoder.config.dims, autoencoder.config.latent_channels
        self.kind, self.mode = kind, {2: "bilinear", 3: "trilinear"}[dims]
        self.stem = nn.Sequential(
            Conv(dims, latent_channels, WIDTH), ResBlock(dims, WIDTH, WIDTH), ResBlock(dims, WIDTH, WIDTH)
        )
        factor = autoencoder.downsampling if kind == "patch" else (1,) * dims
        unet = UNetConfig(dims=dims, channels=(WIDTH,), attention_levels=(False,))
        self.head = LabelHead(AnatomyConfig(head_width=WIDTH), unet, num_labels, factor)
        if kind == "decoder":
            first = Conv(dims, num_labels + channels, 16)
            self.fine = nn.Sequential(first, nn.SiLU(), Conv(dims, 16, num_labels))

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        logits = self.head(self.stem(z))
        if self.kind == "patch":
            return logits
        logits = F.interpolate(logits, image.shape[2:], mode=self.mode)
        return logits + self.fine(torch.cat([logits, image], 1)) if self.kind == "decoder" else logits


@torch.inference_mode()
def encode(autoencoder: Autoencoder, dataset: VolumeDataset) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, decoded images, masks) of all cases."""
    rows = []
    for i in progress(range(len(dataset)), "encoding"):
        item = dataset[i, i]
        z = autoencoder.encode(item["image"][None]).mode()
        rows.append((z, autoencoder.decode(z, item["image"].shape[1:]), item["mask"][None].long()))
    return tuple(torch.cat(column).clone() for column in zip(*rows, strict=True))


def train(
    net: Head, cases: tuple[Tensor, Tensor, Tensor], steps: int, batch_size: int, balance: float
) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in progress(range(steps), net.kind):
        drawn = torch.randint(len(cases[0]), (batch_size,))
        z, image, mask = (part[drawn] for part in cases)
        optimizer.zero_grad()
        head_loss(net(z, image), mask, balance).mean().backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def score(net: Head, cases: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(K - 1,) Dice of every label, mean over the cases."""
    rows = []
    for z, image, mask in zip(*(part.split(1) for part in cases), strict=True):
        logits = net(z, image)
        found = crop_to(logits.argmax(1, keepdim=True), mask.shape[1:])[:, 0]
        rows.append(dice(found, mask, logits.shape[1]))
    return torch.cat(rows).nanmean(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of anatomy.py's runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--balance", type=float, default=0.0, help="head_balance of registers.py")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    autoencoder, content = load_autoencoder(args.folder / "vae")
    data = open_stored(content)
    sets = [encode(autoencoder, data.dataset(part)) for part in ("train", "test")]
    std, mean = torch.std_mean(sets[0][0], dim=(0, *range(2, sets[0][0].ndim)), keepdim=True)
    learned, held_out = (((z - mean) / std, image, mask) for z, image, mask in sets)
    labels = (f"label {k}" for k in range(1, data.spec.num_labels))
    lines = [("head", *labels, "mean Dice", "s / step")]
    for kind in ("patch", "upsampled", "decoder"):
        scores, seconds = [], 0.0
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            net = Head(kind, autoencoder, data.spec.channels, data.spec.num_labels)
            start = time.process_time()
            train(net, learned, args.steps, args.batch_size, args.balance)
            seconds += (time.process_time() - start) / (args.steps * args.seeds)
            scores.append(score(net, held_out))
        mean = torch.stack(scores).mean(0)
        lines.append((kind, *(f"{v:.3f}" for v in (*mean, mean.mean())), f"{seconds:.2f}"))
    print(table(lines, markdown=True))


if __name__ == "__main__":
    main()
