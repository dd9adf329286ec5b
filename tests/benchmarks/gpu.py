"""Everything that only a GPU can tell, in parts of at most nine minutes that write their figures at once.

    python tests/benchmarks/gpu.py                        # the parts that have no figures yet, in this order
    python tests/benchmarks/gpu.py tests peer-fp32        # these parts, measured again
    python tests/benchmarks/gpu.py --minutes 8            # begin no part that may end later than that
    python tests/benchmarks/gpu.py --device cpu --tiny    # a dry run of every part: minutes on a CPU
    python tests/benchmarks/gpu.py --report               # the figures that there are, as tables

GPU time often comes in pieces and may end at any moment. So every figure is appended to `--out` (a JSON line
with part, hardware, PyTorch and date) as soon as it is measured, and a part that has its line `"done"` is not
measured again unless it is named. Real data (hippocampus) lie in $LDM3D_DATA or data/.

    tests      tests/test_gpu.py
    peer-*     peer_monai.py in fp32 (TF32 off and on), in bf16, and compiled
    large      encode and decode of 256^3, 384^3, 512^3 by the tutorial's autoencoder in bf16, beside MONAI's
    train-*    the hippocampus presets to their end: autoencoder, denoiser, registers, segmentation
    brats-*    the presets for 16 and 32 GB on synthetic volumes: peak memory beside --plan, speed, waiting
    profile    the dearest operators of a training step of each script
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(HERE), str(ROOT)]

Row = dict[str, Any]


@dataclass
class Setup:
    """device: cuda or cpu; tiny: every part is only gone through; work: folder of the runs."""

    device: str
    tiny: bool
    work: Path
    exit_code: int = 0  # of the last command

    def lines(self, *words: Any) -> Iterator[str]:
        """What a Python command prints, line by line, errors included; kept in last.log."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, *map(str, words)]
        with (
            open(self.work / "last.log", "w") as log,
            subprocess.Popen(command, cwd=self.work, env=environment, **pipes) as process,
        ):
            for line in process.stdout:
                log.write(line)
                yield line
        self.exit_code = process.returncode

    def run(self, *words: Any) -> str:
        """What a Python command prints; RuntimeError with its last lines if it fails."""
        text = "".join(self.lines(*words))
        if self.exit_code:
            raise RuntimeError(f"exit code {self.exit_code}: {' | '.join(text.splitlines()[-12:])}")
        return text

    def script(self, name: str, *words: Any) -> str:
        return self.run(ROOT / name, *words)


# --- tests and peers ----------------------------------------------------------------------------------------


def tests(setup: Setup) -> Iterator[Row]:
    """The outcome of each test of tests/test_gpu.py as soon as it is there, then what went wrong."""
    report = setup.work / "tests.xml"
    words = ["-m", "pytest", ROOT / "tests/test_gpu.py", "-v", "--durations=0", f"--junitxml={report}"]
    for line in setup.lines(*words):
        if found := re.search(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
            yield {"test": found[1], "outcome": found[2].lower()}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for bad in (child for child in case if child.tag in ("failure", "error")):
            yield {"test": case.get("name"), "message": f"{bad.get('message')} {bad.text}"[-2500:]}


def peer(*flags: str, cases: tuple[str, ...]) -> Callable[[Setup], Iterator[Row]]:
    """`peer_monai.py` with these flags, of the cases with one of these words in their name."""

    def part(setup: Setup) -> Iterator[Row]:
        path = setup.work / "peer.jsonl"
        path.unlink(missing_ok=True)
        rounds, some = ("1", ["decode 32"]) if setup.tiny else ("9", cases)
        how = ["--device", setup.device, "--rounds", rounds, "--json", path, *flags, "--cases", *some]
        try:
            setup.run(HERE / "peer_monai.py", *how)
        finally:  # what was measured before a failure counts too
            lines = path.read_text().splitlines() if path.exists() else []
            for line in lines:
                yield json.loads(line)

    return part


def large(setup: Setup) -> Iterator[Row]:
    """Seconds and peak GiB of encoding and decoding whole volumes, ours and MONAI's, until one fails."""
    from monai_weights import twin_autoencoder
    from peer_monai import TUTORIAL_AE, moments, seconds

    nets = dict(zip(("ours", "monai"), twin_autoencoder(TUTORIAL_AE), strict=True))
    device = setup.device
    for size in (16,) if setup.tiny else (256, 384, 512):
        for name, net in nets.items():
            net.to(device).eval()
            z = torch.randn(1, TUTORIAL_AE.latent_channels, *(size // f for f in TUTORIAL_AE.downsampling))
            x = torch.randn(1, 1, size, size, size)
            for what, run in {
                "decode": lambda net=net, z=z: net.decode(z.to(device)),
                "encode": lambda net=net, x=x: moments(net, x.to(device))[0],
            }.items():
                row: Row = {"side": name, "what": what, "size": size}
                try:
                    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                        run()
                        if device == "cuda":
                            torch.cuda.reset_peak_memory_stats()
                        row["seconds"] = min(seconds(run, device, time.perf_counter) for _ in range(2))
                    if device == "cuda":
                        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                except (torch.cuda.OutOfMemoryError, RuntimeError) as e:
                    row["failed"] = str(e).splitlines()[0][:200]
                yield row
            net.cpu()
            if device == "cuda":
                torch.cuda.empty_cache()


# --- training -----------------------------------------------------------------------------------------------

TINY = {
    "train_vae.py": "--run.steps 2 --data.subset 8 --vae.channels 8,16 --batch_size 2",
    "train_ldm.py": "--run.steps 2 --unet.channels 8,16 --unet.num_groups 4 --unet.head_channels 8 "
    "--batch_size 2 --data.num_variants 2 --data.crop random --sample_steps 2",
    "train_cdal.py": "--run.steps 2 --data.subset 8 --unet.channels 8,16",
}


def logged(run: Path) -> Row:
    """What log.jsonl says of a run: best validation figures; speed and memory of its second half."""
    from ldm3d.engine.logger import read_log

    lines = read_log(run / "log.jsonl")
    train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
    late = train[len(train) // 2 :]
    figures: Row = {"steps": lines[-1]["step"]}
    for name, best in (("psnr", max), ("ssim", max), ("dice", max), ("loss", min)):
        if val and name in val[0]:
            figures[f"best_{name}"] = best(line[name] for line in val)
    for name in ("samples_per_s", "data_wait", "peak_gib"):
        values = [line[name] for line in late if name in line]
        figures[name] = float(np.median(values)) if values else None
    return figures


def train(script: str, preset: str, *flags: str) -> Callable[[Setup], Iterator[Row]]:
    """A preset to its end, as a person would start it; then what its log says."""

    def part(setup: Setup) -> Iterator[Row]:
        kind = script[len("train_") : -len(".py")]
        run = setup.work / "runs" / f"{kind}-{preset}"
        more = TINY[script].split() if setup.tiny else ["--run.amp", "bf16"]
        start = time.perf_counter()
        setup.script(script, preset, "--run.device", setup.device, *flags, *more)
        yield {"preset": preset, "minutes": (time.perf_counter() - start) / 60, **logged(run)}
        if kind == "ldm":
            start = time.perf_counter()
            num = 2 if setup.tiny else 64
            setup.script("sample.py", run, "--num", num, "--device", setup.device)
            yield {"preset": preset, "samples": num, "seconds_with_start": time.perf_counter() - start}

    return part


def synthetic_brats(folder: Path, num: int, size: tuple[int, ...]) -> None:
    """Volumes of two channels, of BraTS's size at 1 mm: smooth noise within an ellipsoid."""
    from ldm3d import Volume, write

    folder.mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"))
    inside = (grid**2).sum(0) < 0.9
    draw = np.random.default_rng(0)
    for i in range(num):
        coarse = torch.from_numpy(draw.normal(size=(1, 1, *(n // 8 for n in size))).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, size, mode="trilinear")[0].numpy()
        image = (smooth + 3) * inside * 100
        write(folder / f"brats_{i:03d}.nii.gz", Volume(np.concatenate([image, -image]), np.eye(4)))


def brats(preset: str) -> Callable[[Setup], Iterator[Row]]:
    """Both stages of a preset for large GPUs, 200 steps each: speed, waiting, peak memory beside --plan."""

    def part(setup: Setup) -> Iterator[Row]:
        data = setup.work / "data" / "brats-synthetic"
        if not data.exists():
            synthetic_brats(data, 6, (32, 40, 32) if setup.tiny else (240, 240, 155))
        common = ["--data.root", data, "--data.image", "*.nii.gz"]
        common += ["--run.save_every", "1000000", "--run.eval_every", "1000000", "--run.log_every", "20"]
        common += ["--run.device", setup.device, "--run.steps", "2" if setup.tiny else "200"]
        small = "--vae.channels 8,16 --vae.num_groups 4 --data.size 16,16,16 --data.patch 16,16,16".split()
        for script in ("train_vae.py", "train_ldm.py"):
            kind = script[len("train_") : -len(".py")]
            flags = [preset, *(common if kind == "vae" else common[4:])]
            if setup.tiny:
                flags += (
                    small
                    if kind == "vae"
                    else [*TINY[script].split()[2:], "--unet.attention_levels", "false"]
                )
            start = time.perf_counter()
            setup.script(script, *flags)
            figures = logged(setup.work / "runs" / f"{kind}-{preset}")
            planned = setup.script(
                script, *flags, "--plan", "--memory", "140" if setup.device == "cuda" else "16"
            )
            numbers = re.search(r"^training.*?\d x [\dx]+ +([\d.]+)", planned, re.MULTILINE)
            figures["planned_gib"] = float(numbers[1]) if numbers else None
            yield {"preset": preset, "stage": kind, "minutes": (time.perf_counter() - start) / 60, **figures}

    return part


# --- where time goes ----------------------------------------------------------------------------------------


def profile(setup: Setup) -> Iterator[Row]:
    """The ten dearest operators of three training steps of each script, as the profiler prints them."""
    for script in ("train_vae.py", "train_ldm.py", "train_cdal.py"):
        kind = script[len("train_") : -len(".py")]
        flags = ["--run.dir", f"runs/profile-{kind}", "--run.fresh", "--run.profile", "--run.steps", 8]
        flags += ["--run.eval_every", 1000000, "--run.device", setup.device]
        if setup.tiny:
            flags = TINY[script].split()[2:] + flags
        if kind == "ldm":
            flags += ["--vae", "runs/profile-vae"]
        yield {"script": script, "table": setup.script(script, "hippocampus", *flags)[-6000:]}


PARTS: dict[str, tuple[float, Callable[[Setup], Iterator[Row]]]] = {  # name -> (minutes it may take, part)
    "peer-fp32": (2.0, peer(cases=("decode", "encode", "96^3", "DDIM", "4096", "16^3, batch 2"))),
    "peer-tf32": (2.0, peer("--tf32", cases=("128^3", "96^3", "DDIM", "4096", "16^3, batch 2"))),
    "peer-bf16": (2.0, peer("--amp", "bf16", cases=("128^3", "96^3", "DDIM", "4096", "16^3, batch 2"))),
    "tests": (4.0, tests),
    "train-vae": (5.0, train("train_vae.py", "hippocampus")),
    "train-ldm": (7.0, train("train_ldm.py", "hippocampus")),
    "train-cdal": (6.0, train("train_cdal.py", "hippocampus")),
    "train-anatomy": (5.0, train("train_ldm.py", "hippocampus-anatomy")),
    "large": (3.0, large),
    "profile": (2.0, profile),
    "brats-32g": (5.0, brats("brats-32g")),
    "brats-16g": (5.0, brats("brats-16g")),
    "peer-compiled": (9.0, peer("--compile", cases=("96^3", "DDIM 16", "16^3, batch 2"))),
}


# --- keeping figures ----------------------------------------------------------------------------------------


def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(name: str, setup: Setup, out: Path) -> bool:
    """Do a part; every row goes to the disk at once. False if the part failed; the next one is still done."""
    where = {"hardware": hardware(setup.device), "torch": torch.__version__, "tiny": setup.tiny}

    def keep(row: Row) -> None:
        line = {"part": name, **row, **where, "date": datetime.date.today().isoformat()}
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({"part": name, **row})[:600], flush=True)

    start = time.perf_counter()
    try:
        for row in PARTS[name][1](setup):
            keep(row)
    except Exception as e:  # one part's failure must not cost the others their time on the GPU
        keep({"failed": f"{type(e).__name__}: {e}"[-3000:], "seconds": time.perf_counter() - start})
        return False
    keep({"done": True, "seconds": time.perf_counter() - start})
    return True


def report(rows: list[Row]) -> None:
    """All figures, part by part, one line each."""
    for name in PARTS:
        mine = [row for row in rows if row["part"] == name and not row.get("done")]
        if mine:
            print(f"\n{name}: {mine[-1]['hardware']}, PyTorch {mine[-1]['torch']}, {mine[-1]['date']}")
        for row in mine:
            if "seconds" in row and isinstance(row["seconds"], dict):
                time_ratio, memory_ratio = (
                    {side: row[key]["ours"] / value for side, value in row[key].items() if side != "ours"}
                    for key in ("seconds", "mib")
                )
                ratios = [f"{s} {t:.2f} / {memory_ratio[s]:.2f}" for s, t in time_ratio.items()]
                print(f"  {row['case']}: {row['seconds']['ours']:.4g} s, beside {', '.join(ratios)}")
            else:
                hidden = ("part", "hardware", "torch", "date", "tiny")
                print("  " + json.dumps({k: v for k, v in row.items() if k not in hidden})[:400])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none = all to do")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="only go through every part")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no part that may end after that")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="file of the figures; none = figures.jsonl in --work")
    parser.add_argument("--report", action="store_true", help="only print what was measured")
    args = parser.parse_args(argv)
    out = (args.out or args.work / "figures.jsonl").resolve()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}, expected some of {', '.join(PARTS)}")
    if args.report:
        return report(read_rows(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    setup, start = Setup(args.device, args.tiny, args.work.resolve()), time.perf_counter()
    done = {row["part"] for row in read_rows(out) if row.get("done") and row["tiny"] == args.tiny}
    failed = []
    for name in args.parts or [name for name in PARTS if name not in done]:
        if (time.perf_counter() - start) / 60 + PARTS[name][0] > args.minutes:
            print(f"{name}: may take {PARTS[name][0]:g} minutes, which are not left")
        elif not measure(name, setup, out):
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
