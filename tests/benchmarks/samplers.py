"""Samplers of rectified flow at equal network calls: how far from where many steps lead?

    python tests/benchmarks/finetuning.py hippocampus phantom       trains the runs of the table in README.md
    python tests/benchmarks/samplers.py runs/finetuning/hippocampus/base

All samplers follow one path from a noise to a sample, so that the end of many small steps is right for all of
them. A figure is the distance of a sampler's latents to the latents of heun in 80 steps (159 calls) from the
same noise: root mean square over elements, where latents have a standard deviation near 1. It tells a sampler
from another with few samples, which the Frechet distance does not. Rows:

    euler heun ab2    the library's samplers, at evenly spaced times, as in `sample.py`
    ab3               Adams-Bashforth of third order: the parabola through the last three velocities
    dpmpp             DPM-Solver++(2M) with the flow's alpha_t = 1 - t and sigma_t = t (Lu 2022, Algorithm 2)
    ab2, shift 2      ab2 at times moved towards noise (shift_time), or with a shift of 0.5 towards clean
    ab2, karras       ab2 at the times whose t / (1 - t) are the levels of Karras 2022 (5), from 80 to 0.02

What the library does not have is written here alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm3d.diffusion_kernel import (
    SAMPLERS,
    DiffusionKernel,
    Past,
    Sampler,
    Step,
    extrapolate,
    shift_time,
    shifted_times,
)
from ldm3d.engine.distributed import keyed_generator
from ldm3d.evaluation.results import table
from ldm3d.pipeline import LatentDiffusionPipeline

CALLS = (5, 10, 20, 40)
LIMIT = 80  # steps of heun, the end of the path
Predict = Callable[[Tensor, Tensor], Tensor]

# --- what the library does not have -------------------------------------------------------------------------


def ab3(step: Step, past: list[tuple[float, Tensor]] | None) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """x_next = x_t + the integral from t to t_next of the polynomial through up to three velocities."""
    known = [*(past or []), (step.t, step.velocity(step.x_t, step.t))][-3:]
    times = [t - step.t for t, _ in known]
    x_next = step.x_t
    for i, (_, velocity) in enumerate(known):
        others = np.poly1d(times[:i] + times[i + 1 :], r=True)  # 0 at all times but the i-th
        integral = (others / others(times[i])).integ()
        x_next = x_next + float(integral(step.t_next - step.t)) * velocity
    return x_next, known


def dpmpp(step: Step, past: Past) -> tuple[Tensor, Past]:
    """The step of `diffusion_kernel.dpmpp`, at noise levels of flow. The last step is of first order."""

    def half_log_snr(t: float) -> float:
        return math.log((1 - t) / t) if 0 < t < 1 else math.inf * (-1 if t else 1)

    pred_x_start = step.x_t - step.t * step.velocity(step.x_t, step.t)
    length = half_log_snr(step.t_next) - half_log_snr(step.t)
    halfway = extrapolate(pred_x_start, past, length)
    noise = (step.x_t - (1 - step.t) * halfway) / step.t
    return (1 - step.t_next) * halfway + step.t_next * noise, (pred_x_start, length)


def shifted(shift: float) -> Callable[..., list[float]]:
    return lambda kernel, num, size, strength: [shift_time(i / num, shift) for i in range(num, 0, -1)]


def karras_times(kernel: DiffusionKernel, num: int, size: tuple, strength: float) -> list[float]:
    ends = 80 ** (1 / 7), 0.02 ** (1 / 7)
    levels = [(ends[0] + i / max(1, num - 1) * (ends[1] - ends[0])) ** 7 for i in range(num)]
    return [1.0, *(level / (1 + level) for level in levels[1:])]


ROWS = {
    "euler": SAMPLERS["euler"],
    "heun": SAMPLERS["heun"],
    "ab2": SAMPLERS["ab2"],
    "ab3": Sampler("flow", ab3, shifted_times),
    "dpmpp": Sampler("flow", dpmpp, shifted_times),
    "ab2, shift 2": Sampler("flow", SAMPLERS["ab2"].step, shifted(2.0)),
    "ab2, shift 0.5": Sampler("flow", SAMPLERS["ab2"].step, shifted(0.5)),
    "ab2, karras": Sampler("flow", SAMPLERS["ab2"].step, karras_times),
}

# --- the table ----------------------------------------------------------------------------------------------


def errors(
    kernel: DiffusionKernel,
    predict: Predict,
    noise: Tensor,
    calls: tuple[int, ...] = CALLS,
    limit: int = LIMIT,
) -> dict[str, list[float]]:
    """The distance of each row's samples to the end of the path, for each number of calls."""
    with mock.patch.dict(SAMPLERS, ROWS):
        end, found = kernel.sample(predict, noise, limit, "heun", progress=True), {}
        for name, row in ROWS.items():
            steps = [(n + 1) // 2 if row.corrects else n for n in calls]
            made = [kernel.sample(predict, noise, n, name, progress=True) for n in steps]
            found[name] = [(x - end).square().mean().sqrt().item() for x in made]
    return found


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="of train_ldm.py, with process flow and without conditions")
    parser.add_argument("--num", type=int, default=6, help="samples")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = LatentDiffusionPipeline(args.run).model
    generators = [keyed_generator(0, i, "sample") for i in range(args.num)]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    found = errors(model.kernel, model.denoiser, noise)
    lines = [("sampler", *(f"{n} calls" for n in CALLS))]
    lines += [(name, *(f"{value:.4f}" for value in values)) for name, values in found.items()]
    print(f"\n{args.run}\n\n{table(lines, markdown=True)}\n", flush=True)


if __name__ == "__main__":
    main()
