"""Time and memory of encoding and decoding against the size of the volume: ours, and MONAI's until it fails.

    python tests/benchmarks/streaming.py                         # 64^3 to 512^3, an hour on 2 CPU cores
    python tests/benchmarks/streaming.py --threads 1 --cpu_time  # on a busy machine
    python tests/benchmarks/streaming.py --sizes 128 --sides monai whole slabs recompute offload --rounds 3

Networks: "plain" is the autoencoder (32, 64, 64), "stem" that of the preset hippocampus. The side "ours" is
what `run_trunk` chooses for the memory of GIB_TO_USE; the others are named in ldm3d/large/streaming.py. Each
measurement is a process of its own, and the sides take turns. Memory is the peak of the process (VmHWM) above
what it held before, input included, less the result. A process may take --limit GiB; a side that needs more
has failed at that size and is not tried at larger ones. What would take more than --minutes, by the size
before, is left out. The norms of the results of all sides must agree to 1e-4. Every figure is appended to
--json at once, and the figures that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
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

from ldm3d.large.streaming import NOTED, Stream, run_trunk  # noqa: E402
from ldm3d.vae import AutoencoderKL, VAEConfig  # noqa: E402

NETS = {
    "plain": VAEConfig(channels=(32, 64, 64), latent_channels=3),
    "stem": VAEConfig(channels=(32, 128), num_res_blocks=(1,), num_groups=8, stem=(2,), latent_channels=8),
}
GIB_TO_USE = {"plain": 1.5, "stem": 6.0}  # of the side "ours", beside input and result
SIDES = ("monai", "ours", "whole", "slabs", "recompute", "offload")
LINES = {("plain", "monai"): "MONAI", ("plain", "ours"): "ours", ("stem", "ours"): "ours, with stem"}  # drawn
GIB = 2**30


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


@torch.inference_mode()
def measure(net_name: str, what: str, side: str, size: int, cpu_time: bool) -> dict[str, Any]:
    """Seconds, GiB, mode and the norm of the result of one encoding or decoding."""
    config, cpu, memory = NETS[net_name], torch.device("cpu"), GIB_TO_USE[net_name]
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
            if side == "ours":
                h = run_trunk(trunk, h, memory)
            else:
                h = trunk(h) if side == "whole" else Stream(side, cpu).run(trunk, h)
        seconds.append(clock() - start)
        peaks.append(status("VmHWM") - held - h.nbytes)
        return h

    seconds, peaks = [], []
    clock = time.process_time if cpu_time else time.perf_counter
    run(16)  # libraries are loaded
    norm = run(size).double().norm().item()
    mode = next((mode for _, _, mode in NOTED), "whole") if side == "ours" else side  # what is noted
    return {"seconds": seconds[-1], "gib": peaks[-1] / GIB, "norm": norm, "mode": mode}


def in_a_process(case: tuple, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; what failed has an "error" instead."""
    command = [sys.executable, __file__, "--case", ",".join(map(str, case)), "--threads", str(args.threads)]
    command += ["--limit", str(args.limit), *["--cpu_time"] * args.cpu_time]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}


def too_long(case: tuple, rows: list[dict[str, Any]], minutes: float) -> bool:
    """Would this take more than so many minutes, by the time of the largest size that is measured?"""
    net, what, side, size, _ = case
    same = [row for row in rows if (row["net"], row["what"], row["side"]) == (net, what, side)]
    known = [(row["size"], row["seconds"]) for row in same if row["size"] < size and "seconds" in row]
    return bool(known) and max(known)[1] * (size / max(known)[0]) ** 3 > 60 * minutes


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures: those in the file, and those still missing, which are measured now."""
    path = Path(args.json)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("net", "what", "side", "size", "round")
    have = {tuple(row[k] for k in keys) for row in rows}
    failed = {(row["net"], row["what"], row["side"]): row["size"] for row in rows if "error" in row}
    wanted = itertools.product(args.sizes, args.nets, args.what, range(args.rounds), args.sides)
    for size, net, what, number, side in wanted:
        case = (net, what, side, size, number)
        absent = (side == "monai" and net != "plain") or (number > 0 and size > 128)
        hopeless = size >= failed.get(case[:3], size + 1) or too_long(case, rows, args.minutes)
        if absent or case in have or hopeless:
            continue
        row = dict(zip(keys, case, strict=True)) | in_a_process(case, args)
        row |= {"threads": args.threads, "cpu_time": args.cpu_time}
        failed |= {case[:3]: size} if "error" in row else {}
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
    """(net, what, size, side) -> medians over rounds, and the mode; "failed" where the side did. Exits if the
    sides disagree."""
    groups, figures = defaultdict(list), {}
    for row in rows:
        if "error" in row:
            figures[row["net"], row["what"], row["size"], row["side"]] = {"failed": True}
        else:
            groups[row["net"], row["what"], row["size"], row["side"]].append(row)
    for net, what, size, _ in groups:
        norms = [row["norm"] for k, g in groups.items() if k[:3] == (net, what, size) for row in g]
        if max(norms) > min(norms) * (1 + 1e-4):
            raise SystemExit(f"{net}, {what} {size}^3: the sides differ: {sorted(norms)}")
    for key, group in groups.items():
        medians = {f: median(row[f] for row in group) for f in ("seconds", "gib")}
        figures[key] = medians | {"mode": group[0]["mode"]}
    return figures


def print_table(figures: dict[tuple, dict[str, Any]]) -> None:
    """The figures, those of a network and direction together, by size."""
    print("\n| network | size | side | s | GiB | time / MONAI | memory / MONAI |\n|" + "---|" * 7)
    for (net, what, size, side), own in sorted(figures.items(), key=lambda item: item[0][:3]):
        name = f"{side}: {own['mode']}" if side == "ours" and "mode" in own else side
        cells = [f"{net}, {what}", f"{size}^3", name]
        if "failed" in own:
            cells += ["-", "failed", "", ""]
        else:
            peer = figures.get((net, what, size, "monai"), {})
            ratios = [f"{own[f] / peer[f]:.2f}" if f in peer else "" for f in ("seconds", "gib")]
            cells += [f"{own['seconds']:.1f}", f"{own['gib']:.2f}", *ratios]
        print(f"| {' | '.join(cells)} |")


def draw(figures: dict[tuple, dict[str, Any]], path: str, limit: float) -> None:
    """Time and memory against size, a column for encoding and one for decoding. A cross is a failure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({size for _, _, size, _ in figures})
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for column, what in enumerate(("encode", "decode")):
        for axis, field, label in zip(axes[:, column], ("seconds", "gib"), ("seconds", "GiB"), strict=True):
            for number, ((net, side), name) in enumerate(LINES.items()):
                own = {k[2]: v for k, v in figures.items() if (*k[:2], k[3]) == (net, what, side)}
                points = sorted((n, v[field]) for n, v in own.items() if "failed" not in v)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=name)
                if field == "gib":
                    ends = [n for n, v in own.items() if "failed" in v]
                    axis.plot(ends, [limit] * len(ends), "x", color=f"C{number}", markersize=9)
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.set_xticks(sizes, [f"{n}³" for n in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title(what)
    axes[0, 0].legend()
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="64,96,128,192,256,384,512", help="sides of the cubes")
    parser.add_argument("--nets", nargs="+", default=["stem", "plain"], choices=list(NETS))
    parser.add_argument("--what", nargs="+", default=["decode", "encode"], choices=["encode", "decode"])
    parser.add_argument("--sides", nargs="+", default=["monai", "ours"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=1, help="of sizes up to 128; larger ones have one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds: on a busy machine, --threads 1")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that a process may take")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for one measurement")
    parser.add_argument("--json", default="streaming.jsonl", help="file of the figures, a JSON line each")
    parser.add_argument("--picture", help="PNG to draw (with matplotlib, the extra viz)")
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
        draw(figures, args.picture, args.limit)


if __name__ == "__main__":
    main()
