"""Time and peak memory of our networks as a ratio to MONAI's, same architecture, same weights, same input.

    python tests/benchmarks/peer_monai.py                          # every case (some 15 minutes on 2 CPU cores)
    python tests/benchmarks/peer_monai.py --cases decode ddim      # those whose name contains one of the words
    python tests/benchmarks/peer_monai.py --device cuda --rounds 9

The sides take turns in one process; a ratio is median / median over the rounds, below 1 is faster or smaller. Outputs are
compared before anything is timed (fp32: 2e-5 outputs, 1e-4 gradients; bf16: 2e-2). Memory is the peak above the
level before the call: of the process (Linux: VmHWM) on CPU, of the allocator on GPUs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from ldm3d.unet import UNetConfig  # noqa: E402
from ldm3d.vae import VAEConfig  # noqa: E402

if importlib.util.find_spec("monai") is None or importlib.util.find_spec("einops") is None:
    print(
        "MONAI is not installed (it needs einops too), so there is nothing to compare with: pip install -e '.[test]'"
    )
    raise SystemExit(0)

from monai_weights import twin_autoencoder, twin_unet  # noqa: E402

SMALL_AE = VAEConfig(channels=(32, 64, 64), latent_channels=3)
TUTORIAL_AE = VAEConfig(channels=(64, 128, 256), latent_channels=3)
FLAT_AE = VAEConfig(dims=2, channels=(64, 128, 256), latent_channels=4, mid_attention=True)
SMALL_UNET = UNetConfig(channels=(32, 64, 64), attention_levels=(False, False, True), head_channels=32)
MEDIUM_UNET = UNetConfig(channels=(64, 128, 128), attention_levels=(False, False, True), head_channels=32)
ATTENTION_UNET = UNetConfig(channels=(64, 128, 128), attention_levels=(False, True, True), head_channels=32)

Side = Callable[[], Tensor]  # one run of what is timed; the result is compared between the sides


@dataclass(frozen=True)
class Case:
    """`build(device)` returns {"ours": ..., "monai": ..., ["flash": ...]}; targets are ratios to "monai"."""

    name: str
    build: Callable[[str], dict[str, Side]]
    time_target: float | None = None
    memory_target: float | None = None
    tolerance: float = 2e-5


# --- what is run --------------------------------------------------------------------------------------------------


def autoencoder_sides(
    config: VAEConfig, device: str, run: Callable[[nn.Module, bool], Tensor], flash: bool
) -> dict:
    """{side: run(network, whether it is ours)} for ours and MONAI's, with MONAI's flash attention if asked."""
    ours, theirs = twin_autoencoder(config)
    nets = {"ours": ours, "monai": theirs}
    if flash:
        nets["flash"] = twin_autoencoder(config, flash=True)[1]
        nets["flash"].load_state_dict(theirs.state_dict())
    return {name: (lambda net=net.to(device), mine=net is ours: run(net, mine)) for name, net in nets.items()}


def decode(config: VAEConfig, size: int, flash: bool = False) -> Callable[[str], dict[str, Side]]:
    def build(device: str) -> dict[str, Side]:
        z = torch.randn(1, config.latent_channels, *(size // f for f in config.downsampling)).to(device)

        @torch.inference_mode()
        def run(net: nn.Module, mine: bool) -> Tensor:
            return net.decode(z)

        return autoencoder_sides(config, device, run, flash)

    return build


def encode(config: VAEConfig, size: int, flash: bool = False) -> Callable[[str], dict[str, Side]]:
    def build(device: str) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(device)

        @torch.inference_mode()
        def run(net: nn.Module, mine: bool) -> Tensor:
            if mine:
                posterior = net.encode(x)
                return torch.cat([posterior.mean, posterior.std])
            return torch.cat(net.encode(x))

        return autoencoder_sides(config, device, run, flash)

    return build


def autoencoder_training(config: VAEConfig, size: int, amp: bool = False) -> Callable[[str], dict[str, Side]]:
    def build(device: str) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(device)
        noise = torch.randn(1, config.latent_channels, *(size // f for f in config.downsampling)).to(device)

        def run(net: nn.Module, mine: bool) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                if mine:
                    recon, posterior = net(x, noise)
                    mean, std = posterior.mean, posterior.std
                else:
                    mean, std = net.encode(x)
                    recon = net.decode(mean + std * noise)
            mean, std = mean.float(), std.float()
            kl = 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).mean()
            return training_step(net, F.l1_loss(recon.float(), x) + 1e-3 * kl)

        return autoencoder_sides(config, device, run, flash=False)

    return build


def unet_sides(
    config: UNetConfig, device: str, run: Callable[[nn.Module], Tensor], flash: bool
) -> dict[str, Side]:
    ours, theirs = twin_unet(config)
    nets = {"ours": ours, "monai": theirs}
    if flash:
        nets["flash"] = twin_unet(config, flash=True)[1]
        nets["flash"].load_state_dict(theirs.state_dict())
    return {name: (lambda net=net.to(device): run(net)) for name, net in nets.items()}


def denoise(config: UNetConfig, size: int, flash: bool = False) -> Callable[[str], dict[str, Side]]:
    def build(device: str) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(device)
        t = torch.tensor([500.0], device=device)

        @torch.inference_mode()
        def run(net: nn.Module) -> Tensor:
            return net(x, t)

        return unet_sides(config, device, run, flash)

    return build


def ddim(
    config: UNetConfig, size: int, steps: int = 50, flash: bool = False
) -> Callable[[str], dict[str, Side]]:
    """x_prev = sqrt(a_prev) pred_x_start + sqrt(1 - a_prev) eps (Song et al. 2020, arXiv 2010.02502, eq. 12, eta 0)."""

    def build(device: str) -> dict[str, Side]:
        noise = torch.randn(1, config.in_channels, *(size,) * config.dims).to(device)
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        grid = torch.linspace(999, 0, steps).round().long().tolist()

        @torch.inference_mode()
        def run(net: nn.Module) -> Tensor:
            x = noise
            for t, previous in zip(grid, [*grid[1:], None], strict=True):
                a, a_prev = (
                    alphas_cumprod[t].item(),
                    1.0 if previous is None else alphas_cumprod[previous].item(),
                )
                eps = net(x, torch.tensor([float(t)], device=device))
                pred_x_start = (x - (1 - a) ** 0.5 * eps) / a**0.5
                x = a_prev**0.5 * pred_x_start + (1 - a_prev) ** 0.5 * eps
            return x

        return unet_sides(config, device, run, flash)

    return build


def unet_training(config: UNetConfig, size: int, batch: int = 2) -> Callable[[str], dict[str, Side]]:
    def build(device: str) -> dict[str, Side]:
        x = torch.randn(batch, config.in_channels, *(size,) * config.dims).to(device)
        t = torch.linspace(10, 900, batch, device=device)

        def run(net: nn.Module) -> Tensor:
            return training_step(net, F.mse_loss(net(x, t), x))

        return unet_sides(config, device, run, flash=True)

    return build


def training_step(net: nn.Module, loss: Tensor) -> Tensor:
    """Backward and one AdamW step of rate 0, so that all rounds see the same weights; returns what can be compared:
    the loss and the norms of the first and the last parameter's gradients."""
    if not hasattr(net, "optimizer"):
        net.optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    loss.backward()
    parameters = [p for p in net.parameters() if p.grad is not None and p.ndim > 2]
    total = sum(p.grad.double().square().sum() for p in parameters).sqrt()
    net.optimizer.step()
    net.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss.detach().double(), total])


CASES = [
    Case("AE (32,64,64) decode 32^3", decode(SMALL_AE, 32), 0.60),
    Case("AE (32,64,64) decode 64^3", decode(SMALL_AE, 64), 0.60),
    Case("AE (32,64,64) decode 128^3", decode(SMALL_AE, 128), 0.60),
    Case("AE (32,64,64) encode 64^3", encode(SMALL_AE, 64)),
    Case("tutorial AE (64,128,256) decode 64^3", decode(TUTORIAL_AE, 64), 0.75),
    Case("tutorial AE (64,128,256) encode 64^3", encode(TUTORIAL_AE, 64), 0.90),
    Case("AE (32,64,64) training step 64^3 fp32", autoencoder_training(SMALL_AE, 64), 0.80, tolerance=1e-4),
    Case(
        "AE (32,64,64) training step 64^3 bf16",
        autoencoder_training(SMALL_AE, 64, True),
        0.85,
        tolerance=2e-2,
    ),
    Case(
        "AE (32,64,64) training step 96^3 fp32",
        autoencoder_training(SMALL_AE, 96),
        None,
        0.60,
        tolerance=1e-4,
    ),
    Case("U-Net (32,64,64) step 16^3", denoise(SMALL_UNET, 16, True)),
    Case("U-Net (32,64,64) 50-step DDIM 16^3", ddim(SMALL_UNET, 16, flash=True), 0.40),
    Case("U-Net (64,128,128) 50-step DDIM 16^3", ddim(MEDIUM_UNET, 16, flash=True), 0.60),
    Case(
        "U-Net (64,128,128) step, attention over 4096 tokens", denoise(ATTENTION_UNET, 32, True), 0.35, 0.20
    ),
    Case(
        "U-Net (64,128,128) training step 16^3, batch 2", unet_training(MEDIUM_UNET, 16), 0.95, tolerance=1e-4
    ),
    Case("2-D AE (64,128,256) decode 256^2", decode(FLAT_AE, 256, True), 0.88),
]


# --- measuring ----------------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Side, device: str, clock: Callable[[], float]) -> float:
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def process_memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes(run: Side, device: str) -> int:
    """Peak memory of one run above the level before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(
        0
    )  # give back what the allocator keeps, so that it cannot hide the next run's need
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def compare(sides: dict[str, Side], tolerance: float, name: str) -> None:
    reference = sides["monai"]().float()
    for side, run in sides.items():
        error = ((run().float() - reference).abs().max() / reference.abs().max()).item()
        if not error <= tolerance:
            raise SystemExit(f"{name}: {side} differs from monai by {error:.1e}, allowed are {tolerance:.0e}")


def measure(case: Case, rounds: int, device: str, clock: Callable[[], float]) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    sides = case.build(device)
    compare(sides, case.tolerance, case.name)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            times[side].append(seconds(run, device, clock))
    peaks = {side: median(peak_bytes(run, device) for _ in range(3)) for side, run in sides.items()}
    mid = {side: median(values) for side, values in times.items()}

    def ratio(values: dict[str, float], peer: str) -> str:
        return f"{values['ours'] / max(values[peer], 1e-9):.2f}" if peer in values else ""

    cells = [
        case.name,
        f"{mid['ours']:.3f}",
        f"{mid['monai']:.3f}",
        ratio(mid, "monai"),
        case.time_target or "",
    ]
    cells += [f"{peaks['ours'] / 2**20:.0f}", f"{peaks['monai'] / 2**20:.0f}", ratio(peaks, "monai")]
    cells += [case.memory_target or "", ratio(mid, "flash"), ratio(peaks, "flash")]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="words; a case runs if its name contains one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds; with --threads 1, on a shared machine"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    import monai

    print(f"torch {torch.__version__}, MONAI {monai.__version__}, {args.device}, {args.threads} threads\n")
    print(
        "| case | ours s | MONAI s | time | target | ours MiB | MONAI MiB | memory | target | flash: time | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if any(word.lower() in case.name.lower() for word in args.cases):
            print(measure(case, args.rounds, args.device, clock), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
