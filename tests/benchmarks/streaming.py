"""Time and memory of encoding and decoding against the size of the volume: whole, in slabs, and MONAI's.

    python tests/benchmarks/streaming.py                         # 64^3 to 512^3, hours on 2 CPU cores
    python tests/benchmarks/streaming.py --sizes 64,128 --threads 1 --cpu_time     # on a busy machine
    python tests/benchmarks/streaming.py --nets stem --sizes 256,512 --sides recompute offload

Networks: "plain" is the autoencoder (32, 64, 64), "stem" that of the preset hippocampus. Each measurement is
a process of its own, and the sides take turns. Memory is the peak of the process (VmHWM) above what it held
before, input included, less the result. A process may take --limit GiB; a side that needs more has failed
at that size and is not tried at larger ones. The norms of the results of all sides must agree to 1e-4. Every
figure is appended to --json at once, and the figures that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from monai_weights import twin_autoencoder  # noqa: E402

from ldm3d.engine.machine import free_bytes  # noqa: E402
from ldm3d.streaming import Stream  # noqa: E402
from ldm3d.vae import AutoencoderKL, VAEConfig  # noqa: E402

NETS = {
    "plain": VAEConfig(channels=(32, 64, 64), latent_channels=3),
    "stem": VAEConfig(channels=(32, 128), num_res_blocks=(1,), num_groups=8, stem=(2,), latent_channels=8),
}
SIDES = ("monai", "whole", "slabs", "recompute", "offload")
GIB = 2**30


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


@torch.inference_mode()
def measure(net_name: str, what: str, side: str, size: int, cpu_time: bool) -> dict[str, Any]:
    """Seconds, GiB and the norm of the result of one encoding or decoding."""
    config, cpu = NETS[net_name], torch.device("cpu")
    torch.manual_seed(0)
    net = twin_autoencoder(config)[side == "monai"] if net_name == "plain" else AutoencoderKL(config)
    net.eval()

    def run(n: int) -> torch.Tensor:
        shape = (
            (1, n, n, n)
            if what == "encode"
            else (config.latent_channels, *(n // f for f in config.downsampling))
        )
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        held, start = status("VmRSS"), clock()
        if side == "monai":
            h = net.encoder(x) if what == "encode" else net.decoder(net.post_quant_conv(x))
        else:
            trunk, h = (net.encoder, x) if what == "encode" else (net.decoder, net.post_quant_conv(x))
            h = trunk(h) if side == "whole" else Stream(side, cpu).run(trunk, h)
        seconds.append(clock() - start)
        peaks.append(status("VmHWM") - held - h.nbytes)
        return h

    seconds, peaks = [], []
    clock = time.process_time if cpu_time else time.perf_counter
    run(16)  # libraries are loaded
    norm = run(size).double().norm().item()
    return {"seconds": seconds[-1], "gib": peaks[-1] / GIB, "norm": norm}


def in_a_process(case: tuple, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; what failed has an "error" instead."""
    command = [sys.executable, __file__, "--case", ",".join(map(str, case)), "--threads", str(args.threads)]
    command += ["--limit", str(args.limit), *["--cpu_time"] * args.cpu_time]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures: those in the file, and those still missing, which are measured now."""
    path = Path(args.json)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("net", "what", "side", "size", "round")
    have = {tuple(row[k] for k in keys) for row in rows}
    failed = {(row["net"], row["what"], row["side"]) for row in rows if "error" in row}
    for size in args.sizes:
        for net in args.nets:
            for what in args.what:
                for number in range(args.rounds if size <= 128 else 1):
                    for side in args.sides:
                        case = (net, what, side, size, number)
                        if (
                            case in have
                            or (net, what, side) in failed
                            or (side == "monai" and net != "plain")
                        ):
                            continue
                        row = dict(zip(keys, case, strict=True)) | in_a_process(case, args)
                        row |= {"threads": args.threads, "cpu_time": args.cpu_time}
                        failed |= {case[:3]} if "error" in row else set()
                        rows.append(row)
                        with path.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(row, flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, float]]:
    """(net, what, size, side) -> medians over rounds. Exits if the sides disagree."""
    groups = defaultdict(list)
    for row in rows:
        if "error" not in row:
            groups[row["net"], row["what"], row["size"], row["side"]].append(row)
    for net, what, size, _ in groups:
        others = [g for k, g in groups.items() if k[:3] == (net, what, size)]
        norms = [row["norm"] for g in others for row in g]
        if max(norms) > min(norms) * (1 + 1e-4):
            raise SystemExit(f"{net}, {what} {size}^3: the sides differ: {sorted(norms)}")
    return {k: {f: median(r[f] for r in g) for f in ("seconds", "gib")} for k, g in groups.items()}


def print_table(figures: dict[tuple, dict[str, float]]) -> None:
    print("\n| network | size | side | s | GiB | time / MONAI | memory / MONAI |\n|" + "---|" * 7)
    for (net, what, size, side), own in figures.items():
        peer = figures.get((net, what, size, "monai"))
        ratios = [f"{own[f] / peer[f]:.2f}" if peer else "" for f in ("seconds", "gib")]
        cells = [f"{net}, {what}", f"{size}^3", side, f"{own['seconds']:.1f}", f"{own['gib']:.2f}", *ratios]
        print(f"| {' | '.join(cells)} |")


def draw(figures: dict[tuple, dict[str, float]], path: str) -> None:
    """Time and memory against size, a column for encoding and one for decoding, of the plain network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True)
    for column, what in enumerate(("encode", "decode")):
        for axis, field, label in zip(axes[:, column], ("seconds", "gib"), ("seconds", "GiB"), strict=True):
            for side in SIDES:
                own = {k[2]: v[field] for k, v in figures.items() if (*k[:2], k[3]) == ("plain", what, side)}
                points = sorted(own.items())
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        label="MONAI" if side == "monai" else side,
                    )
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.set_xticks(
                sorted({k[2] for k in figures}), [f"{k}³" for k in sorted({k[2] for k in figures})]
            )
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title(what)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="64,128,256,512", help="sides of the cubes")
    parser.add_argument("--nets", nargs="+", default=["plain"], choices=list(NETS))
    parser.add_argument("--what", nargs="+", default=["decode", "encode"], choices=["encode", "decode"])
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3, help="of sizes up to 128; larger ones have one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine, --threads 1")
    parser.add_argument("--limit", type=float, default=round(0.9 * free_bytes(torch.device("cpu")) / GIB, 1))
    parser.add_argument("--json", default="streaming.jsonl", help="file of the figures, a JSON line each")
    parser.add_argument("--picture", help="PNG to draw")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.case:
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit * GIB),) * 2)
        net, what, side, size, _ = args.case.split(",")
        print(json.dumps(measure(net, what, side, int(size), args.cpu_time)))
        return
    args.sizes = [int(n) for n in args.sizes.split(",")]
    figures = summarise(collect(args))
    print_table(figures)
    if args.picture:
        draw(figures, args.picture)


if __name__ == "__main__":
    main()
