"""Planned runs beside the presets that people made by hand: the table in README.md, in this folder.

    python tests/benchmarks/planned.py --minutes 5
    python tests/benchmarks/planned.py hippocampus monuseg --minutes 30 --work runs/planned-30

Each preset and each planned run trains for the same minutes: the steps follow from the time of a step, which
is measured in the same way for both. Planned runs get the folder of the data, and the preset's split, so that
both are scored on the same cases. All else is planned. Scores are the best of each run's validations: PSNR,
diffusion loss, Dice. For autoencoders "whole cases" is the PSNR on the grid of the planned run, of cases of
their own size, whatever sizes and spacings the two runs validate on. Diffusion losses are comparable on the
same latents only, so both denoisers are trained on those of the preset's autoencoder.

Runs and figures (planned.json) are kept: what is there is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from budgets import seconds_of_step, words_of_length  # noqa: E402

from ldm3d.config import show  # noqa: E402
from ldm3d.data import VolumeDataset, open_stored  # noqa: E402
from ldm3d.data.cases import resolve_root  # noqa: E402
from ldm3d.data.phantoms import phantom_folder  # noqa: E402
from ldm3d.data.settings import DataConfig  # noqa: E402
from ldm3d.engine.checkpoint import load  # noqa: E402
from ldm3d.engine.logger import read_log  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.metrics import psnr  # noqa: E402
from ldm3d.pipeline import load_autoencoder  # noqa: E402

TASKS: dict[str, dict[str, str]] = {  # folder of the data -> kind of run -> preset
    "hippocampus": {"vae": "hippocampus", "ldm": "hippocampus", "cdal": "hippocampus"},
    "monuseg": {"cdal": "monuseg"},
    "adrenal": {"vae": "adrenal", "ldm": "adrenal"},
    "tiff_pairs": {"vae": "tiff-translation"},
    "brats2013": {"vae": "brats2013"},
    "phantom": {"vae": "phantom", "ldm": "phantom", "cdal": "phantom"},
}
SPLIT = ("data.val_fraction", "data.test_fraction", "data.test_subjects", "data.val_gap", "data.subject")
SCORES = {"vae": "psnr", "ldm": "loss", "cdal": "dice"}


def folder_of(name: str, work: Path) -> Path:
    """The folder of a data set."""
    if name == "phantom":
        with contextlib.chdir(work):
            return work / phantom_folder()
    return resolve_root(DataConfig(name=name), name).resolve()


def steps_of_preset(script: Any, words: list[str], minutes: float) -> int:
    """How many steps of a preset the minutes hold, as a plan computes it."""
    return max(10, int(0.85 * 60 * minutes / seconds_of_step(script, words)))


def command(name: str, kind: str, which: str, minutes: float, work: Path) -> list[str]:
    """The words of the command that trains one run."""
    script = importlib.import_module(f"train_{kind}")
    preset, folder = TASKS[name][kind], folder_of(name, work)
    place = ["--run.dir", str(run_of(name, kind, which, work)), "--run.device", "cpu"]
    if which == "planned":
        first = run_of(name, "vae", "preset", work) if kind == "ldm" else folder
        chosen = script.PRESETS[preset] if kind != "ldm" else {}
        given = [(key, chosen[key]) for key in SPLIT if key in chosen]
        split = [word for key, value in given for word in (f"--{key}", show(value))]
        return [str(first), *place, "--hours", str(minutes / 60), *split]
    words = [preset, *place]
    words += (
        ["--vae", str(run_of(name, "vae", which, work))] if kind == "ldm" else ["--data.root", str(folder)]
    )
    steps = steps_of_preset(script, words, minutes)
    return words + words_of_length(script, preset, steps)


def run_of(name: str, kind: str, which: str, work: Path) -> Path:
    return work / f"{kind}-{name}-{which}"


def train(name: str, kind: str, which: str, minutes: float, work: Path) -> dict[str, float]:
    """Train one run in a process of its own: its best score, its steps, and the CPU minutes that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = command(name, kind, which, minutes, work)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    print("+", f"train_{kind}.py", *words, flush=True)
    subprocess.run([sys.executable, str(ROOT / f"train_{kind}.py"), *words], cwd=work, env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_of(name, kind, which, work)
    log = [line for line in read_log(run / "log.jsonl") if line["split"] == "val"]
    best = {"ldm": min}.get(kind, max)(line[SCORES[kind]] for line in log)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"score": best, "steps": log[-1]["step"], "cpu_minutes": cpu / 60}


def whole_validation(run: Path, other: Path) -> VolumeDataset:
    """The whole validation cases of the run `other`, on the spacing of `run`."""
    spacing = load(run / "best.pt", "vae")["config"]["data"]["spacing"]
    content = load(other / "best.pt", "vae")
    with contextlib.redirect_stdout(io.StringIO()):
        return open_stored(content, patch=None, spacing=spacing).dataset("val", own_size=True)


@torch.inference_mode()
def whole_cases(name: str, which: str, work: Path) -> float:
    """The mean PSNR of the reconstructions of the planned run's validation cases, in their own size.

    Each run reconstructs the cases on its own grid. If the grid has another spacing, reconstructions are
    resampled to that of the planned run: what a run throws away by resampling counts as lost.
    """
    net, _ = load_autoencoder(run_of(name, "vae", which, work))
    seen, wanted = (
        whole_validation(run_of(name, "vae", one, work), run_of(name, "vae", "planned", work))
        for one in (which, "planned")
    )
    scores = []
    for i in range(len(wanted)):
        x, target = seen[i, i]["image"][None], wanted[i, i]["image"][None]
        recon = net.decode(net.encode(x).mode(), x.shape[2:])
        if recon.shape != target.shape:
            recon = F.interpolate(recon, target.shape[2:], mode=("bilinear", "trilinear")[x.ndim == 5])
        scores.append(psnr(recon, target, data_range=2.0).item())
    return sum(scores) / len(scores)


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    """One row for each pair of runs that is complete."""
    rows = [["data", "run", "score", "preset", "planned", "planned / preset", "steps", "CPU min"]]
    for name, kinds in TASKS.items():
        for kind in kinds:
            pair = [figures.get(f"{name} {kind} {which}") for which in ("preset", "planned")]
            if None in pair:
                continue
            for key in ("score", "whole cases"):
                if key not in pair[0] or key not in pair[1]:
                    continue
                a, b = (figure[key] for figure in pair)
                ratio = a / b if kind == "ldm" else b / a
                label = SCORES[kind] if key == "score" else f"{SCORES[kind]}, whole cases"
                counts = ["{:.0f}, {:.0f}", "{:.1f}, {:.1f}"]
                values = [[figure[k] for figure in pair] for k in ("steps", "cpu_minutes")]
                more = [text.format(*value) for text, value in zip(counts, values, strict=True)]
                rows.append([name, kind, label, f"{a:.4g}", f"{b:.4g}", f"{ratio:.1%}", *more])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TASKS)}; none = all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each run")
    parser.add_argument("--work", type=Path, default=Path("runs/planned"), help="folder of runs and figures")
    args = parser.parse_args()
    if unknown := set(args.names) - TASKS.keys():
        parser.error(f"no data set {min(unknown)}; expected some of {', '.join(TASKS)}")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "planned.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    if figures.setdefault("minutes", args.minutes) != args.minutes:
        parser.error(f"{file} holds figures of {figures['minutes']:g} minutes; choose another --work")

    def keep(key: str, figure: dict[str, float]) -> None:
        figures[key] = figures.get(key, {}) | figure
        file.write_text(json.dumps(figures, indent=1) + "\n")

    for name in args.names or TASKS:
        for kind in TASKS[name]:
            for which in ("preset", "planned"):
                if (key := f"{name} {kind} {which}") not in figures:
                    keep(key, train(name, kind, which, args.minutes, work))
            for which in ("preset", "planned") if kind == "vae" else ():
                if "whole cases" not in figures[key := f"{name} {kind} {which}"]:
                    keep(key, {"whole cases": whole_cases(name, which, work)})
            print(table(rows_of(figures)), flush=True)


if __name__ == "__main__":
    main()
