"""Classifier-free guidance over several conditions, in one batched forward a step.

With the conditions c_1 ... c_n in the order of the configuration, p_k the prediction under c_1 ... c_k and
p_0 that under nulls alone,

    pred = p_0 + s_1 (p_1 - p_0) + s_2 (p_2 - p_1) + ... + s_n (p_n - p_(n-1))           Brooks (3), nested
         = sum_k w_k p_k,     w_0 = 1 - s_1,   w_k = s_k - s_(k+1),   w_n = s_n

so that the branches of weight 0 need not be computed: all scales 1 are one branch, the conditional
prediction; all 0 one branch, the unconditional one; all equal, two (Ho & Salimans). The others run as one
batch. Rescaling by phi brings the standard deviation of each sample back towards that of p_n, Lin (15), (16):

    pred <- (phi std(p_n) / std(pred) + 1 - phi) pred

An interval of noise levels, as t / T from 0 = clean to 1, limits guidance to times inside; outside, it is p_n
(Kynkaanniemi). Works on whatever the network predicts, and with every sampler.

Ho & Salimans 2022 arXiv:2207.12598; Brooks 2023 2211.09800; Lin 2024 2305.08891; Kynkaanniemi 2024
2404.07724.
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


@dataclass(frozen=True)
class Guidance:
    """How strongly samples follow their conditions: one scale for all, or by name (those not named: 1)."""

    scale: float | dict[str, float] = 1.0
    rescale: float = 0.0  # phi, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)  # lowest and highest t / T that are guided

    def __post_init__(self) -> None:
        scales = self.scale.values() if isinstance(self.scale, dict) else [self.scale]
        if not all(isinstance(s, Real) and math.isfinite(s) for s in scales):
            raise InputError(f"guidance: expected a finite number, or one for each name, got {self.scale!r}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise InputError(f"guidance_interval: expected 0 <= low < high <= 1, got {low:g},{high:g}")
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale: expected a number from 0 to 1, got {self.rescale:g}")

    def scales(self, conditions: Sequence[Condition]) -> list[float]:
        """Of these conditions of the model, in order."""
        if not isinstance(self.scale, dict):
            return [float(self.scale)] * len(conditions)
        return [float(self.scale.get(c.name, 1.0)) for c in conditions]

    def check(self, conditions: Sequence[Condition]) -> None:
        """InputError if a scale is for a condition that the model has not."""
        check_names(self.scale if isinstance(self.scale, dict) else (), conditions)

    def tell_of_idle(self, conditions: dict[str, Tensor]) -> None:
        """A note if a scale acts on nothing: on conditions that no sample is told."""
        told = {name for name, value in conditions.items() if not absent(value).all()}
        general = {} if told else {"any condition": self.scale}
        scales = self.scale if isinstance(self.scale, dict) else general
        idle = [name for name, scale in scales.items() if scale != 1 and name not in told]
        if idle:
            print0(f"note: guidance has no effect, no sample is told {', '.join(idle)}")


def branch_weights(scales: Sequence[float]) -> list[float]:
    """w_0 ... w_n of the docstring above."""
    ends = [1.0, *scales, 0.0]
    return [a - b for a, b in pairwise(ends)]


def guided(
    denoiser: torch.nn.Module,
    conditions: dict[str, Tensor],
    like: Tensor,
    guidance: Guidance,
    num_timesteps: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t (B,) on 0..T, the same for all samples) -> prediction; conditions: those of these samples.

    The conditions are encoded here, once for all steps; like: any x_t of the batch.
    """
    check_names(conditions, denoiser.conditions)
    given = [c for c in denoiser.conditions if c.name in conditions]
    last = len(given)
    weights = branch_weights(guidance.scales(given))
    plain = [float(k == last) for k in range(last + 1)]
    phi = 0.0 if weights == plain else guidance.rescale
    active = [k for k, w in enumerate(weights) if w or (phi and k == last)]
    low, high = guidance.interval

    def encode(branches: list[int]) -> object:
        hidden = torch.ones(len(like), dtype=torch.bool)
        values = {
            c.name: torch.cat([hide(conditions[c.name], hidden & (i >= k)) for k in branches])
            for i, c in enumerate(given)
        }
        return denoiser.condition(values, torch.cat([like] * len(branches)))

    known = encode(active)
    alone = known if active == [last] else encode([last]) if (low, high) != (0, 1) else None

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        if alone is not None and not (alone is known or low <= float(t[0]) / num_timesteps <= high):
            return denoiser(x_t, t, alone)
        n = len(active)
        if n == 1:
            return denoiser(x_t, t, known)
        preds = denoiser(torch.cat([x_t] * n), torch.cat([t] * n), known).float().chunk(n)
        pred = sum(weights[k] * p for k, p in zip(active, preds, strict=True))
        if phi:
            ratio = deviation(preds[-1]) / deviation(pred).clamp(min=1e-8)
            pred = (phi * ratio + 1 - phi) * pred
        return pred

    return predict


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample, (B, 1, ..., 1)."""
    return x.flatten(1).std(1).view(-1, *(1,) * (x.ndim - 1))
