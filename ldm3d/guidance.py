"""Guidance: samples that follow their conditions more strongly, and samples with fewer mistakes.

Classifier-free guidance. A denoiser that was trained with conditions hidden now and then predicts with a
condition and without. The difference between the two predictions is the direction in which the condition
pulls; guidance goes further along it, by a scale of its own for each condition. With the conditions
c_1 ... c_n in the order of the configuration, let p_k be the prediction under c_1 ... c_k alone, and p_0 the
prediction under none:

    pred = p_0 + s_1 (p_1 - p_0) + s_2 (p_2 - p_1) + ... + s_n (p_n - p_(n-1))           Brooks (3), nested
         = sum_k w_k p_k,     w_0 = 1 - s_1,   w_k = s_k - s_(k+1),   w_n = s_n

Example: one condition, s_1 = 3. Where p_0 is 0.2 and p_1 is 0.5, pred = 0.2 + 3 (0.5 - 0.2) = 1.1; the
weights are w = (-2, 3). With two conditions and s = (3, 1), w = (-2, 2, 1), so three branches of the network.
With s = (1, 1), w = (0, 0, 1): the plain conditional prediction, one branch. Branches of weight 0 are not
computed, the others run as one batch. Equal scales need p_0 and p_n alone, as in Ho & Salimans.

A large scale makes the prediction larger than any that training saw. Rescaling by phi (0 to 1) brings the
standard deviation of each sample back towards that of p_n, Lin (15), (16):

    pred <- (phi std(p_n) / std(pred) + 1 - phi) pred

An interval of noise levels, as t / T from 0 = clean to 1, limits guidance to the times inside (Kynkaanniemi).
Outside, nothing is exaggerated: a scale above 1 acts as 1 there, and a scale below 0 as 0. So (3, 0) becomes
(1, 0), and a condition that the scale 0 switches off is off at all times.

Autoguidance, which needs no conditions. A second denoiser of the same latents, trained for less time or
narrower, is wrong where the first one is wrong, but by more. Let p be the prediction of the first, q of the
weaker; going on along the line from q to p, by a scale s above 1, leaves the common mistakes behind:

    pred = q + s (p - q)                                                                       Karras (3)

Example: p = 0.5, q = 0.4, s = 1.3 make 0.53. Both p and q are guided by their conditions, as above.

Both kinds of guidance work on whatever the network predicts, and with every sampler.

Ho & Salimans 2022 arXiv:2207.12598; Brooks 2023 2211.09800; Lin 2024 2305.08891; Kynkaanniemi 2024
2404.07724; Karras 2024 2406.02507.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from .conditions import Condition, absent, check_names, hide
from .config import InputError
from .engine.distributed import print0

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t (B,) on 0..T, the same for all samples) -> prediction
AUTOGUIDANCE_INTERVAL = (0.2, 0.7)  # at higher noise levels it makes samples alike


@dataclass(frozen=True)
class Guidance:
    """How strongly samples follow their conditions.

    scale: one number for all conditions, or numbers by name, 1 for conditions that are not named.
    """

    scale: float | dict[str, float] = 1.0
    rescale: float = 0.0  # phi, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)  # lowest and highest t / T that are guided

    def __post_init__(self) -> None:
        scales = self.scale.values() if isinstance(self.scale, dict) else [self.scale]
        if not all(isinstance(s, Real) and math.isfinite(s) for s in scales):
            raise InputError(f"guidance: expected a finite number, or one for each name, got {self.scale!r}")
        check_interval("guidance_interval", self.interval)
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale: expected a number from 0 to 1, got {self.rescale:g}")

    def scales(self, conditions: Sequence[Condition]) -> list[float]:
        """s_1 ... s_n of these conditions, in their order."""
        if not isinstance(self.scale, dict):
            return [float(self.scale)] * len(conditions)
        return [float(self.scale.get(c.name, 1.0)) for c in conditions]

    def check(self, conditions: Sequence[Condition]) -> None:
        """InputError if a scale names a condition that the model does not have."""
        check_names(self.scale if isinstance(self.scale, dict) else (), conditions)

    def note_idle(self, conditions: dict[str, Tensor]) -> None:
        """Print a note if a scale acts on nothing, because no sample has a value of its condition."""
        present = {name for name, value in conditions.items() if not absent(value).all()}
        general = {} if present else {"any condition": self.scale}
        scales = self.scale if isinstance(self.scale, dict) else general
        idle = [name for name, scale in scales.items() if scale != 1 and name not in present]
        if idle:
            print0(f"note: guidance has no effect, no sample has a value of {', '.join(idle)}")


@dataclass(frozen=True)
class Autoguidance:
    """How far samples go away from what a weaker denoiser of the same latents predicts."""

    denoiser: torch.nn.Module  # the weaker one; it takes the same conditions
    scale: float  # s; 1 = no autoguidance
    interval: tuple[float, float] = AUTOGUIDANCE_INTERVAL  # lowest and highest t / T that are guided

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, Real) and 1 <= self.scale < math.inf):
            raise InputError(f"autoguidance: expected a number from 1 on, got {self.scale!r}")
        check_interval("autoguidance_interval", self.interval)

    def around(self, predict: Predict, weaker: Predict, num_timesteps: int) -> Predict:
        """The prediction to sample with, of those of the two denoisers."""

        def autoguided(x_t: Tensor, t: Tensor) -> Tensor:
            p = predict(x_t, t)
            if not is_inside(self.interval, t, num_timesteps):
                return p
            q = weaker(x_t, t).float()
            return q + self.scale * (p.float() - q)

        return autoguided


def check_interval(name: str, interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InputError(f"{name}: expected 0 <= low < high <= 1, got {low:g},{high:g}")


def is_inside(interval: tuple[float, float], t: Tensor, num_timesteps: int) -> bool:
    """Whether the time t (B,) on 0..T, the same for all samples, lies in an interval of t / T."""
    low, high = interval
    return low <= float(t[0]) / num_timesteps <= high


def branch_weights(scales: Sequence[float]) -> list[float]:
    """w_0 ... w_n of s_1 ... s_n: (3, 1) -> (-2, 2, 1)."""
    ends = [1.0, *scales, 0.0]
    return [a - b for a, b in pairwise(ends)]


def active_branches(weights: Sequence[float], rescale: float) -> list[int]:
    """The k whose p_k must be computed: those of a weight, and n, whose deviation rescaling needs."""
    last = len(weights) - 1
    return [k for k, w in enumerate(weights) if w or (rescale and k == last)]


def guided(
    denoiser: torch.nn.Module,
    conditions: dict[str, Tensor],
    like: Tensor,
    guidance: Guidance,
    num_timesteps: int,
) -> Predict:
    """The guided denoiser.

    conditions: the values of these samples; conditions that are missing take no part. They are encoded here,
    once for all steps. like: any tensor of the shape and device of x_t.
    """
    check_names(conditions, denoiser.conditions)
    present = [c for c in denoiser.conditions if c.name in conditions]
    everyone = torch.ones(len(like), dtype=torch.bool)

    def encode(branches: list[int]) -> object:
        """The conditions of p_k for each branch k, one below the other: c_i is hidden where i > k."""
        values = {
            c.name: torch.cat([hide(conditions[c.name], everyone & (i > k)) for k in branches])
            for i, c in enumerate(present, start=1)
        }
        return denoiser.encode_conditions(values, torch.cat([like] * len(branches)))

    def combination(scales: list[float], phi: float) -> Predict:
        """sum_k w_k p_k of these scales, rescaled by phi, as a function of (x_t, t)."""
        weights = branch_weights(scales)
        active = active_branches(weights, phi)
        encoded, n = encode(active), len(active)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            if n == 1:  # of weight 1
                return denoiser(x_t, t, encoded)
            preds = denoiser(torch.cat([x_t] * n), torch.cat([t] * n), encoded).float().chunk(n)
            pred = sum(weights[k] * p for k, p in zip(active, preds, strict=True))
            if phi:
                ratio = deviation(preds[-1]) / deviation(pred).clamp(min=1e-8)
                pred = (phi * ratio + 1 - phi) * pred
            return pred

        return predict

    scales, interval = guidance.scales(present), guidance.interval
    inside = combination(scales, guidance.rescale)
    if interval == (0, 1):
        return inside
    outside = combination([min(max(s, 0.0), 1.0) for s in scales], phi=0.0)
    return lambda x_t, t: (inside if is_inside(interval, t, num_timesteps) else outside)(x_t, t)


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample, (B, 1, ..., 1)."""
    return x.flatten(1).std(1).view(-1, *(1,) * (x.ndim - 1))
