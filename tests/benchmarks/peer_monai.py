"""Time and peak memory of our networks as a ratio to MONAI's: same architecture, same weights, same input.

    python tests/benchmarks/peer_monai.py                        # every case, 15 minutes on 2 CPU cores
    python tests/benchmarks/peer_monai.py --cases decode ddim    # those whose name has one of the words
    python tests/benchmarks/peer_monai.py --device cuda --rounds 9 --amp bf16
    python tests/benchmarks/peer_monai.py --device cuda --compile --cases "training step 96"

The sides take turns in one process; a ratio is median / median over the rounds; below 1 we are faster or
smaller. "flash" is MONAI with use_flash_attention=True. What the sides compute is compared before anything is
timed (fp32: outputs 2e-5, loss and norm of all gradients 1e-4; TF32: 5e-3; bf16: 4e-2, since each side may be
2e-2 off fp32); a case whose sides differ is not timed, and the exit code is 1. Memory is the peak of what the
tensor allocator handed out during a run: torch.profiler's events on a CPU, torch.cuda's on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from monai_weights import twin_autoencoder, twin_unet  # noqa: E402

from ldm3d.diffusion_kernel import DiffusionKernel, KernelConfig  # noqa: E402
from ldm3d.unet import UNetConfig  # noqa: E402
from ldm3d.vae import VAEConfig  # noqa: E402

SMALL_AE = VAEConfig(channels=(32, 64, 64), latent_channels=3)
TUTORIAL_AE = VAEConfig(channels=(64, 128, 256), latent_channels=8)
FLAT_AE = VAEConfig(dims=2, channels=(64, 128, 256), mid_attention=True)
SMALL_UNET = UNetConfig(channels=(32, 64, 64))
MEDIUM_UNET = UNetConfig(channels=(64, 128, 128))
ATTENTION_UNET = UNetConfig(channels=(64, 128, 128), attention_levels=(False, True, True))

Side = Callable[[], Tensor]  # one run of what is timed; the results of the sides are compared


@dataclass(frozen=True)
class Mode:
    """How both sides run."""

    device: str = "cpu"
    amp: str = "fp32"  # or bf16: autocast
    compile: bool = False  # torch.compile both
    tf32: bool = False  # fp32 products of 10 bits, as PyTorch's default is for convolutions on a GPU

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp == "bf16")

    @property
    def tolerance(self) -> float:
        return 4e-2 if self.amp == "bf16" else 5e-3 if self.tf32 else 0.0


Build = Callable[[Mode], dict[str, Side]]  # -> {"ours": ..., "monai": ..., ["flash": ...]}


@dataclass(frozen=True)
class Case:
    """Targets are ratios to "monai"."""

    name: str
    build: Build
    time_target: float | None = None
    memory_target: float | None = None
    tolerance: float = 2e-5


# --- what is run ------------------------------------------------------------------------------------------


def sides(
    run: Callable[[nn.Module], Tensor],
    twin: Callable[..., tuple[nn.Module, nn.Module]],
    config: Any,
    flash: bool,
    mode: Mode,
) -> dict[str, Side]:
    """`run` for each network; all have the same weights."""
    ours, theirs = twin(config)
    nets = {"ours": ours, "monai": theirs}
    if flash:
        nets["flash"] = twin(config, flash=True)[1]
        nets["flash"].load_state_dict(theirs.state_dict())
    for net in nets.values():
        net.to(mode.device)
        if mode.compile:
            net.forward = torch.compile(net.forward)
            for name in ("encode", "decode"):
                if hasattr(net, name):
                    setattr(net, name, torch.compile(getattr(net, name)))

    def call(net: nn.Module) -> Tensor:
        with mode.autocast():
            return run(net)

    return {name: partial(call, net) for name, net in nets.items()}


def moments(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of either autoencoder's posterior."""
    posterior = net.encode(x)
    return posterior if isinstance(posterior, tuple) else (posterior.mean, posterior.std)


def decode(config: VAEConfig, size: int, flash: bool = False) -> Build:
    def build(mode: Mode) -> dict[str, Side]:
        z = torch.randn(1, config.latent_channels, *(size // f for f in config.downsampling)).to(mode.device)
        run = torch.inference_mode()(lambda net: net.decode(z))
        return sides(run, twin_autoencoder, config, flash, mode)

    return build


def encode(config: VAEConfig, size: int) -> Build:
    def build(mode: Mode) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(mode.device)
        run = torch.inference_mode()(lambda net: torch.cat(moments(net, x)))
        return sides(run, twin_autoencoder, config, False, mode)

    return build


def autoencoder_training(config: VAEConfig, size: int, amp: bool = False) -> Build:
    def build(mode: Mode) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(mode.device)
        noise = torch.randn(1, config.latent_channels, *(size // f for f in config.downsampling)).to(
            mode.device
        )

        def run(net: nn.Module) -> Tensor:
            with torch.autocast(mode.device, torch.bfloat16, enabled=amp or mode.amp == "bf16"):
                mean, std = moments(net, x)
                recon = net.decode(mean + std * noise)
            mean, std = mean.float(), std.float()
            kl = 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).mean()
            return training_step(net, F.l1_loss(recon.float(), x) + 1e-3 * kl)

        return sides(run, twin_autoencoder, config, False, mode)

    return build


def denoise(config: UNetConfig, size: int) -> Build:
    def build(mode: Mode) -> dict[str, Side]:
        x = torch.randn(1, config.in_channels, *(size,) * config.dims).to(mode.device)
        t = torch.tensor([500.0], device=mode.device)
        run = torch.inference_mode()(lambda net: net(x, t))
        return sides(run, twin_unet, config, True, mode)

    return build


def ddim(config: UNetConfig, size: int, steps: int = 50) -> Build:
    """Our sampling loop around either network: it takes any callable."""

    def build(mode: Mode) -> dict[str, Side]:
        noise = torch.randn(1, config.in_channels, *(size,) * config.dims).to(mode.device)
        kernel = DiffusionKernel(KernelConfig(process="vp", prediction="eps"))
        run = torch.inference_mode()(lambda net: kernel.sample(net, noise, steps, "ddim"))
        return sides(run, twin_unet, config, True, mode)

    return build


def unet_training(config: UNetConfig, size: int, batch: int = 2) -> Build:
    def build(mode: Mode) -> dict[str, Side]:
        x = torch.randn(batch, config.in_channels, *(size,) * config.dims).to(mode.device)
        t = torch.linspace(10, 900, batch, device=mode.device)
        return sides(
            lambda net: training_step(net, F.mse_loss(net(x, t).float(), x)), twin_unet, config, True, mode
        )

    return build


def training_step(net: nn.Module, loss: Tensor) -> Tensor:
    """Backward and one AdamW step of rate 0, so that all rounds see the same weights.

    Returns what can be compared: the loss and the norm of all gradients.
    """
    if not hasattr(net, "optimizer"):
        net.optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    net.optimizer.step()
    net.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss.detach(), norm])


CASES = [
    Case("AE (32,64,64) decode 32^3", decode(SMALL_AE, 32), 0.60),
    Case("AE (32,64,64) decode 64^3", decode(SMALL_AE, 64), 0.60),
    Case("AE (32,64,64) decode 128^3", decode(SMALL_AE, 128), 0.60),
    Case("AE (32,64,64) encode 64^3", encode(SMALL_AE, 64)),
    Case("tutorial AE (64,128,256) decode 64^3", decode(TUTORIAL_AE, 64), 0.75),
    Case("tutorial AE (64,128,256) encode 64^3", encode(TUTORIAL_AE, 64), 0.90),
    Case("AE (32,64,64) training step 64^3 fp32", autoencoder_training(SMALL_AE, 64), 0.80, tolerance=1e-4),
    Case("AE (32,64,64) training step 64^3 bf16", autoencoder_training(SMALL_AE, 64, True), 0.85, None, 2e-2),
    Case("AE (32,64,64) training step 96^3 fp32", autoencoder_training(SMALL_AE, 96), 0.80, 0.60, 1e-4),
    Case(
        "AE (32,64,64) training step 64^3 fp32, ours with checkpointing",
        autoencoder_training(replace(SMALL_AE, checkpointing=True), 64),
        tolerance=1e-4,
    ),
    Case("U-Net (32,64,64) step 16^3", denoise(SMALL_UNET, 16)),
    Case("U-Net (32,64,64) 50-step DDIM 16^3", ddim(SMALL_UNET, 16), 0.40),
    Case("U-Net (64,128,128) 50-step DDIM 16^3", ddim(MEDIUM_UNET, 16), 0.60),
    Case("U-Net (64,128,128) 50-step DDIM 24^3", ddim(MEDIUM_UNET, 24)),
    Case("U-Net (64,128,128) step 32^3, 4096-token attention", denoise(ATTENTION_UNET, 32), 0.35, 0.20),
    Case("U-Net (64,128,128) training step 16^3, batch 2", unet_training(MEDIUM_UNET, 16), 0.95, None, 1e-4),
    Case(
        "U-Net (64,128,128) training step 16^3, batch 2, ours with checkpointing",
        unet_training(replace(MEDIUM_UNET, checkpointing=True), 16),
        tolerance=1e-4,
    ),
    Case("2-D AE (64,128,256) decode 256^2", decode(FLAT_AE, 256, flash=True), 0.88),
]


# --- measuring --------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Side, device: str, clock: Callable[[], float]) -> float:
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def peak_bytes(run: Side, device: str) -> int:
    """Peak of what the tensor allocator had handed out during one run, above the level before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


class Different(Exception):
    """The sides do not compute the same."""


def compare(runs: dict[str, Side], tolerance: float, name: str) -> None:
    reference = runs["monai"]().float()
    for side, run in runs.items():
        error = ((run().float() - reference).abs().max() / reference.abs().max()).item()
        if not error <= tolerance:
            raise Different(f"{name}: {side} differs from monai by {error:.1e}, allowed are {tolerance:.0e}")


def measure(case: Case, rounds: int, mode: Mode, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds and MiB of every side of a case, medians over the rounds."""
    torch.manual_seed(0)
    runs = case.build(mode)
    compare(runs, max(case.tolerance, mode.tolerance), case.name)
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(rounds):
        for side, run in runs.items():
            times[side].append(seconds(run, mode.device, clock))
    return {
        "case": case.name,
        "seconds": {side: median(values) for side, values in times.items()},
        "mib": {side: peak_bytes(run, mode.device) / 2**20 for side, run in runs.items()},
    }


def row(case: Case, figures: dict[str, Any]) -> str:
    """One row of the table."""
    mid, peaks = figures["seconds"], figures["mib"]

    def ratio(values: dict[str, float], peer: str) -> str:
        return f"{values['ours'] / values[peer]:.2f}" if peer in values else ""

    cells = [case.name, f"{mid['ours']:.4f}", f"{mid['monai']:.4f}", ratio(mid, "monai"), case.time_target]
    cells += [f"{peaks['ours']:.0f}", f"{peaks['monai']:.0f}", ratio(peaks, "monai"), case.memory_target]
    cells += [ratio(mid, "flash"), ratio(peaks, "flash")]
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[""], help="words: cases with one in their name")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine, --threads 1")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="fp32", choices=["fp32", "bf16"], help="autocast of both sides")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--tf32", action="store_true", help="GPU: TF32 products in fp32")
    parser.add_argument("--json", help="append the figures of each case to this file, a JSON line each")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("monai") is None or importlib.util.find_spec("einops") is None:
        print("MONAI, or einops which it needs, is not installed: no peer (pip install -e '.[test]')")
        return
    import monai

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    mode = Mode(args.device, args.amp, args.compile, args.tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = args.device == "cuda"  # as in training; the comparison warms it up
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    how = f"{args.amp}{' TF32' * args.tf32}{' compiled' * args.compile}"
    print(f"torch {torch.__version__}, MONAI {monai.__version__}, {where}, {how}\n")
    heads = "case | ours s | MONAI s | time | target | ours MiB | MONAI MiB | memory | target"
    print(f"| {heads} | time / flash | memory / flash |")
    print("|" + "---|" * 11)
    failed = False
    for case in CASES:
        if any(word.lower() in case.name.lower() for word in args.cases):
            try:
                figures = measure(case, args.rounds, mode, clock)
            except (Different, torch.cuda.OutOfMemoryError) as e:
                print(str(e).splitlines()[0], flush=True)
                failed = True
                continue
            print(row(case, figures), flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps({**figures, "how": how, "where": where}) + "\n")
            gc.collect()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
