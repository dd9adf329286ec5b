"""The same autoencoder trained by us and with MONAI's network: same weights, batches, noise, steps.

    python tests/benchmarks/peer_training.py                        # 1,000 steps, 25 CPU minutes
    python tests/benchmarks/peer_training.py --steps 100 --cpu_time --threads 1

AutoencoderKL (32, 64, 64) on patches of the hippocampus data (looked for in $LDM3D_DATA, else data/), L1 and
KL, AdamW with a cosine schedule. The two take turns step by step, so that the times are of the same minutes
of the same machine. Reported are the median time of a step and its ratio, and PSNR and SSIM on whole
held-out cases, half-way and at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from monai_weights import twin_autoencoder  # noqa: E402
from peer_monai import moments  # noqa: E402

from ldm3d.data import DataConfig, VolumeDataset, batches, open_data  # noqa: E402
from ldm3d.engine.training import OptimConfig, keyed_normal, lr_at  # noqa: E402
from ldm3d.losses import reconstruction_loss  # noqa: E402
from ldm3d.metrics import psnr, ssim  # noqa: E402
from ldm3d.vae import VAEConfig  # noqa: E402

VAE = VAEConfig(channels=(32, 64, 64), latent_channels=8)
DATA = DataConfig(subject="subjects.csv", size=(32, 48, 32), patch=(32, 32, 32))
KL_WEIGHT = 1e-3  # of the KL in nats per latent element


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, lr: float, x: torch.Tensor, noise: torch.Tensor
) -> None:
    mu, std = moments(net, x)
    recon = net.decode(mu + std * noise)
    kl = 0.5 * (mu.square() + std.square() - 2 * std.log() - 1).mean()
    loss = reconstruction_loss(recon, x, "l1").mean() + KL_WEIGHT * kl
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


@torch.inference_mode()
def score(net: nn.Module, dataset: VolumeDataset) -> tuple[float, float]:
    """Mean PSNR (dB) and SSIM of the held-out cases, reconstructed from the latent's mean."""
    rows = []
    for i in range(len(dataset)):
        x = dataset[i, i]["image"][None]
        recon = net.decode(moments(net, x)[0])
        rows.append((psnr(recon, x, data_range=2.0).item(), ssim(recon, x, data_range=2.0).item()))
    return tuple(mean(column) for column in zip(*rows, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine, --threads 1")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed: no peer (pip install -e '.[test]')")
        return
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    data = open_data(DATA, "hippocampus", seed=0)
    nets = dict(zip(("ours", "MONAI"), twin_autoencoder(VAE), strict=True))
    for net in nets.values():
        net.train()
    optimizers = {k: torch.optim.AdamW(net.parameters(), args.lr, fused=True) for k, net in nets.items()}
    seconds: dict[str, list[float]] = {k: [] for k in nets}
    size, optim = args.batch_size, OptimConfig(lr=args.lr, warmup_steps=20, schedule="cosine")
    stream = batches(data.dataset("train", augment=True), size, size, 0, 0, args.steps)
    for number, (batch,) in enumerate(stream, start=1):
        x = batch["image"]
        noise = keyed_normal(0, batch["position"], nets["ours"].latent_shape(x.shape[2:]), "posterior")
        for name, net in nets.items():
            start = clock()
            step(net, optimizers[name], lr_at(number - 1, args.steps, optim, size), x, noise)
            seconds[name].append(clock() - start)
        if number in (args.steps // 2, args.steps):
            for name, net in nets.items():
                db, similarity = score(net, data.dataset("val"))
                mid = median(seconds[name])
                print(f"step {number}: {name:>5} PSNR {db:.2f} dB, SSIM {similarity:.4f}, {mid:.3f} s a step")
    ratio = median(seconds["ours"]) / median(seconds["MONAI"])
    print(f"time of a step, ours / MONAI's: {ratio:.2f}")


if __name__ == "__main__":
    main()
