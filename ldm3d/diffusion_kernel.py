"""The diffusion kernel: noising, training loss and samplers of one Gaussian process. It knows no network.

Process. Everything follows from one line; noise is a standard Gaussian, and t runs from 0 = clean to noise:
    x_t = alpha_t x_start + sigma_t noise                                                     Ho (4), Liu (1)
    VP (variance preserving), t = 0 .. T - 1: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alpha_t^2)
    rectified flow, t in [0, 1]: alpha_t = 1 - t, sigma_t = t
    alphas_cumprod = cumprod(1 - betas); betas linear (Ho, section 4), scaled_linear (so in sqrt(betas)) or
    cosine (Nichol (17)); zero_terminal_snr shifts and scales alpha_t: last 0, first kept (Lin, Algorithm 1).
Prediction. The network's target is c noise + d x_start, where (c, d) is
    eps (1, 0) Ho (14), x_start (0, 1), v (alpha_t, -sigma_t) Salimans (app. D), velocity (1, -1) Liu (1).
    Target and x_t are two equations in x_start and noise; by Cramer's rule, with det = c alpha_t - d sigma_t,
    x_start = (c x_t - sigma_t pred) / det        noise = (alpha_t pred - d x_t) / det
    det is alpha_t for eps (so eps cannot start at zero SNR), 1 for v in VP and for velocity in flow.
Weight. min-SNR-gamma is min(snr, gamma) on the squared error of x_start, snr = alpha_t^2 / sigma_t^2; hence
    min(snr, gamma) / snr on that of eps, min(snr, gamma) / (snr + 1) on that of v       Hang (section 3.4)
    At zero SNR, where x_t says nothing about x_start, it is 0.
Time of flow. t = u or sigmoid(m + s Phi^-1(u)), u uniform (logit-normal, Esser (19)); then, as more noise is
    needed to hide more voxels, t' = shift t / (1 + (shift - 1) t), in training and sampling     Esser (23)
Samplers go from t to the next visited time r < t, and end with r = clean (alpha_r = 1, sigma_r = 0):
    ddpm   q(x_r given x_t, x_start); it knows the visited times only     Ho (6), (7), between t and r
    ddim   x_r = alpha_r x_start + sqrt(sigma_r^2 - s^2) eps + s fresh noise, s = eta * ddpm's std  Song (12)
    dpmpp  DPM-Solver++(2M). Lu's Algorithm 2, written out, is the ddim step at eta 0 from an x_start that the
           line through its last two estimates gives for the middle of the interval in log(alpha / sigma)
    euler, heun, ab2: x_r = x_t + (r - t) slope; slope is the velocity at t; its mean with the velocity at the
           end of an Euler step; or the velocity extrapolated to the middle of the interval (Adams-Bashforth)
Left out: learned variances, continuous-time VP, stochastic samplers of flow.

Ho 2020 arXiv:2006.11239; Song 2021 (DDIM) 2010.02502; Nichol & Dhariwal 2021 2102.09672; Salimans & Ho 2022
2202.00512; Lu 2022 (DPM-Solver++) 2211.01095; Lin 2024 2305.08891; Hang 2023 2303.09556; Liu 2022 2209.03003
and Lipman 2023 2210.02747 (both with t reversed); Esser 2024 (SD3) 2403.03206.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from .config import InputError

Process = Literal["vp", "flow"]
Prediction = Literal["eps", "x_start", "v", "velocity"]
Coefficient = float | Tensor  # a tensor broadcasts against the samples
Past = tuple[Tensor, float] | None  # a sampler's previous estimate, and the length of its interval
PREDICTIONS = {"vp": ("eps", "x_start", "v"), "flow": ("velocity", "x_start", "v")}
SAMPLERS = {"vp": ("ddpm", "ddim", "dpmpp"), "flow": ("euler", "heun", "ab2")}


@dataclass(frozen=True)
class KernelConfig:
    num_timesteps: int = 1000  # T of a VP process; for flow the scale of the time that the network receives
    process: Process = "flow"  # how noise is added: on a straight line (rectified flow), or VP as in DDPM
    prediction: Prediction = (
        "velocity"  # what the network outputs: VP eps, x_start, v; flow velocity, x_start, v
    )
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"  # VP: noise schedule
    beta_start: float = 0.0015  # VP: first beta of linear and scaled_linear
    beta_end: float = 0.0195  # VP: last beta of linear and scaled_linear
    zero_terminal_snr: bool = False  # VP: rescale the schedule to end in pure noise (not with eps)
    clip_x_start: float | None = None  # VP: in sampling, clamp estimates to +- this (none: for latents)
    loss: Literal["l1", "l2"] = "l2"  # absolute or squared error, mean over elements
    min_snr_gamma: float | None = None  # VP: min-SNR loss weight with this gamma, usually 5 (none: off)
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"  # flow: density of t in training
    logit_mean: float = 0.0  # flow, logit_normal: mean of logit(t); above 0 favours noise
    logit_std: float = 1.0  # flow, logit_normal: standard deviation of logit(t)
    flow_shift: float | None = None  # flow: shift of t towards noise (none: from the latent's size; 1: off)

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Settings of the time when the prediction implied the process: "flow" the flow, the others VP."""
        if "prediction" in values and "process" not in values:
            values["process"] = "flow" if values["prediction"] in ("flow", "velocity") else "vp"
        if values.get("prediction") == "flow":
            values["prediction"] = "velocity"
        return values

    def __post_init__(self) -> None:
        flow, eps = self.process == "flow", self.prediction == "eps"
        if self.prediction not in PREDICTIONS[self.process]:
            *some, last = PREDICTIONS[self.process]
            other = "vp" if flow else "flow"
            raise InputError(
                f"prediction: got {self.prediction}, expected {', '.join(some)} or {last} with process "
                f"{self.process}; {self.prediction} goes with process {other} (--kernel.process {other})"
            )
        ordered = 0 < self.beta_start <= self.beta_end < 1
        for name, right, expected in (
            ("num_timesteps", self.num_timesteps >= 2, "2 or more"),
            ("beta_start", ordered, f"0 < beta_start <= beta_end < 1, where beta_end is {self.beta_end}"),
            ("zero_terminal_snr", not (self.zero_terminal_snr and flow), "false with process flow"),
            ("zero_terminal_snr", not (self.zero_terminal_snr and eps), "false, or prediction v or x_start"),
            ("clip_x_start", self.clip_x_start is None or not flow, "none with process flow"),
            ("clip_x_start", self.clip_x_start is None or self.clip_x_start > 0, "none or above 0"),
            ("min_snr_gamma", self.min_snr_gamma is None or not flow, "none with process flow"),
            ("min_snr_gamma", self.min_snr_gamma is None or self.min_snr_gamma > 0, "none or above 0"),
            ("t_distribution", self.t_distribution == "uniform" or flow, "uniform with process vp"),
            ("logit_std", self.logit_std > 0, "above 0"),
            ("flow_shift", self.flow_shift is None or flow, "none with process vp"),
            ("flow_shift", self.flow_shift is None or self.flow_shift >= 1, "none, or 1 or more"),
        ):
            if not right:
                raise InputError(f"{name}: got {getattr(self, name)}, expected {expected}")


# Schedule, float64


def make_betas(config: KernelConfig) -> Tensor:
    """(T,) float64 in (0, 1]; 1 only as the last of zero_terminal_snr."""
    T = config.num_timesteps
    if config.schedule == "cosine":  # Nichol (17), offset 0.008, betas capped at 0.999
        cumprod = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - cumprod[1:] / cumprod[:-1]).clamp(max=0.999)
    elif config.schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)
    return rescale_zero_terminal_snr(betas) if config.zero_terminal_snr else betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas whose alphas_cumprod keeps its first entry and ends in exactly 0. Lin, Algorithm 1."""
    alpha = (1 - betas).cumprod(0).sqrt()
    cumprod = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
    return 1 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


# Algebra and steps: pure functions


def make_prediction(
    kind: Prediction, x_start: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """What a perfect network of this kind outputs."""
    if kind in ("eps", "x_start"):
        return noise if kind == "eps" else x_start
    return alpha * noise - sigma * x_start if kind == "v" else noise - x_start


def solve_prediction(
    kind: Prediction, pred: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> tuple[Tensor, Tensor]:
    """(x_start, noise) that agree with x_t and with the network's output."""
    if kind == "x_start":  # c = 0: the determinant -sigma cancels
        return pred, (x_t - alpha * pred) / sigma
    c, d = {"eps": (1, 0), "v": (alpha, -sigma), "velocity": (1, -1)}[kind]
    det = c * alpha - d * sigma
    return (c * x_t - sigma * pred) / det, (alpha * pred - d * x_t) / det


def posterior_coefficients(
    cumprod: Coefficient, cumprod_prev: Coefficient
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """(on x_start, on x_t, variance) of q(x_prev given x_start, x_t), prev any earlier time. Ho (6), (7)."""
    alpha = cumprod / cumprod_prev  # of the whole interval
    coef1 = cumprod_prev**0.5 * (1 - alpha) / (1 - cumprod)
    coef2 = alpha**0.5 * (1 - cumprod_prev) / (1 - cumprod)
    return coef1, coef2, (1 - alpha) * (1 - cumprod_prev) / (1 - cumprod)


def ddim_step(x_start: Tensor, eps: Tensor, alpha_next: float, sigma_next: float, std: float) -> Tensor:
    """Song (12) before its fresh noise of standard deviation std is added."""
    return alpha_next * x_start + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * eps


def extrapolate(estimate: Tensor, past: Past, length: float) -> Tensor:
    """The line through the last two estimates, at the middle of the coming interval of this length.

    Without a previous one, and for an infinite interval (log-SNR, to the clean end), it is the estimate
    itself: first order.
    """
    if past is None or math.isinf(length):
        return estimate
    return estimate + length / past[1] / 2 * (estimate - past[0])


def shift_time(t: Coefficient, shift: float) -> Coefficient:
    """Esser (23): moves times towards noise for shift > 1; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


class DiffusionKernel:
    """One process: `q_sample`, `losses`, `sample`. It has float64 tables and no parameters.

    Arithmetic is float32 whatever the precision of the network, and float64 where the data are float64.
    t (B,) may live on any device; from a CPU generator, as in training, it costs no synchronisation.
    """

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.process = config.process
        self.num_timesteps = config.num_timesteps
        self.betas = make_betas(config)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()  # alpha_t
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()  # sigma_t
        self.half_log_snr = self.sqrt_alphas_cumprod.log() - self.sqrt_one_minus_alphas_cumprod.log()

    # Times

    def flow_shift(self, size: Sequence[int]) -> float:
        """The configured shift, else the (geometric) mean side of the latent over 32, at least 1."""
        if self.config.flow_shift is not None:
            return self.config.flow_shift
        return max(1.0, math.prod(size) ** (1 / len(size)) / 32)

    def t_from_uniform(self, u: Tensor, size: Sequence[int]) -> Tensor:
        """Training times (B,) from u (B,) in [0, 1): int64 for VP; float, shifted for this size, for flow."""
        t = u.double()
        if self.process == "vp":
            return (t * self.num_timesteps).long()
        if self.config.t_distribution == "logit_normal":
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        return shift_time(t, self.flow_shift(size)).to(u.dtype)

    def to_network_time(self, t: Tensor) -> Tensor:
        """(B,) float on the scale 0..T, for both processes."""
        return t.float() if self.process == "vp" else t * self.num_timesteps

    def check_sampler(self, sampler: str, eta: float = 0.0) -> None:
        """InputError unless the sampler belongs to this process, and eta to the sampler."""
        if sampler not in SAMPLERS[self.process]:
            known = ", ".join(SAMPLERS[self.process])
            raise InputError(f"sampler: got {sampler}, expected one of {known} for process {self.process}")
        if not 0 <= eta <= 1 or (eta > 0 and sampler != "ddim"):
            raise InputError(f"eta: got {eta} with sampler {sampler}, expected 0 to 1 with ddim, else 0")

    def sampling_times(self, sampler: str, steps: int | Sequence[float], size: Sequence[int]) -> list[float]:
        """The falling times at which steps start, for latents of spatial shape size; the last ends clean.

        ddpm, ddim: "trailing" (Lin, table 2). dpmpp: uniform in log-SNR down to t = 0, rounded to timesteps,
        without duplicates. Flow: uniform, then shifted. Instead of a count, steps may be the times.
        """
        self.check_sampler(sampler)
        flow, T = self.process == "flow", self.num_timesteps
        if not isinstance(steps, int):
            return self._check_times([float(t) if flow else int(t) for t in steps])
        if steps < 1 or (steps > T and not flow):
            raise InputError(f"steps: got {steps}, expected {'1 or more' if flow else f'1 to {T}'}")
        if flow:
            return [shift_time(i / steps, self.flow_shift(size)) for i in range(steps, 0, -1)]
        if sampler != "dpmpp":
            # round(i T / steps) - 1, in integers
            return [(2 * i * T + steps) // (2 * steps) - 1 for i in range(steps, 0, -1)]
        # Zero SNR is infinitely far in log-SNR: its step precedes a grid that starts at T - 2
        infinite = int(self.config.zero_terminal_snr)
        ends = self.half_log_snr[T - 1 - infinite], self.half_log_snr[0]
        grid = torch.linspace(*ends, steps - infinite, dtype=torch.float64)
        nearest = (grid[:, None] - self.half_log_snr).abs().argmin(1)
        return sorted({T - 1, *nearest.tolist()}, reverse=True)

    def _check_times(self, times: list[float]) -> list[float]:
        inside = all(0 < t <= 1 if self.process == "flow" else 0 <= t < self.num_timesteps for t in times)
        if not times or not inside or any(t <= t_next for t, t_next in pairwise(times)):
            domain = "(0, 1]" if self.process == "flow" else f"[0, {self.num_timesteps})"
            raise InputError(f"steps: got the times {times}, expected falling times in {domain}")
        return times

    def num_network_calls(self, sampler: str, steps: int | Sequence[float]) -> int:
        """Calls of the network in `sample`: two a step for heun; dpmpp may visit fewer times than steps."""
        num = len(self.sampling_times(sampler, steps, size=(1,)))
        return num if sampler != "heun" else 2 * num - (self.config.prediction == "x_start")

    # Noising and training

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of the samples, (B, 1, ..., 1) to broadcast against `like`, on its device."""
        if self.process == "flow":
            alpha, sigma = 1 - t, t
        else:
            alpha, sigma = self.sqrt_alphas_cumprod[t.cpu()], self.sqrt_one_minus_alphas_cumprod[t.cpu()]
        return _per_sample(alpha, like), _per_sample(sigma, like)

    def signal_share(self, t: Tensor) -> Tensor:
        """(B,) float64: alpha_t^2 / (alpha_t^2 + sigma_t^2), from 1 = clean to 0 = noise alone."""
        alpha, sigma = (v.flatten() for v in self.coefficients(t, torch.empty(1, dtype=torch.float64)))
        return alpha.square() / (alpha.square() + sigma.square())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, *S). Ho (4), Liu (1)."""
        alpha, sigma = self.coefficients(t, x_start)
        return alpha * x_start + sigma * noise

    def q_posterior(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of x at t_prev < t (default t - 1; -1 is clean), given x_start and x_t. VP."""
        if self.process == "flow":
            raise InputError("q_posterior: needs process vp, got flow")
        cumprod = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod])  # clean first
        t_prev = t - 1 if t_prev is None else t_prev
        coefs = posterior_coefficients(cumprod[t.cpu() + 1], cumprod[t_prev.cpu() + 1])
        coef1, coef2, variance = (_per_sample(coef, x_t) for coef in coefs)
        return coef1 * x_start + coef2 * x_t, variance

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, source: Prediction, target: Prediction) -> Tensor:
        """The prediction pred of kind source, made at (x_t, t), as the kind target."""
        alpha, sigma = self.coefficients(t, x_t)
        return make_prediction(target, *solve_prediction(source, pred, x_t, alpha, sigma), alpha, sigma)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output at q_sample(x_start, t, noise)."""
        x_start, noise = (x.to(_precision(x_start)) for x in (x_start, noise))
        return make_prediction(self.config.prediction, x_start, noise, *self.coefficients(t, x_start))

    def loss_weight(self, t: Tensor) -> Tensor:
        """(B,) float64: 1, or min-SNR-gamma of the prediction. Hang, section 3.4."""
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones(t.shape, dtype=torch.float64)
        cumprod = self.alphas_cumprod[t.cpu()]
        snr = cumprod / (1 - cumprod)
        return snr.clamp(max=gamma) / {"x_start": 1, "eps": snr, "v": snr + 1}[self.config.prediction]

    def loss_of(self, pred: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) weighted loss of a prediction made at q_sample(x_start, t, noise), mean over elements."""
        error = pred.to(_precision(x_start)) - self.target(x_start, t, noise)
        error = error.abs() if self.config.loss == "l1" else error.square()
        return error.flatten(1).mean(1) * self.loss_weight(t).to(error)

    def losses(
        self, model: Callable[..., Tensor], x_start: Tensor, t: Tensor, noise: Tensor, **model_kwargs
    ) -> Tensor:
        """(B,) weighted loss per sample; model(x_t, time (B,) on 0..T, **model_kwargs) -> prediction."""
        time = self.to_network_time(t).to(x_start.device)
        return self.loss_of(model(self.q_sample(x_start, t, noise), time, **model_kwargs), x_start, t, noise)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        steps: int | Sequence[float],
        sampler: str,
        eta: float = 0.0,
        draw: Callable[[torch.Size], Tensor] | None = None,
        progress: bool = False,
        **model_kwargs,
    ) -> Tensor:
        """x_start (B, C, *S) from noise (B, C, *S) in `steps` steps or at given times (see `sampling_times`).

        eta (ddim) goes from 0, deterministic, to 1, the variance of ddpm. draw(shape) returns the fresh noise
        that ddpm and eta > 0 need; nothing else is random. progress shows a bar on a terminal.
        """
        self.check_sampler(sampler, eta)
        times = self.sampling_times(sampler, steps, noise.shape[2:])
        if draw is None and (sampler == "ddpm" or eta > 0):
            raise InputError(f"draw: got None, expected a source of noise for {sampler} with eta {eta}")

        def predict(x_t: Tensor, t: float) -> Tensor:
            time = self.to_network_time(torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device))
            return model(x_t, time, **model_kwargs).to(x_t.dtype)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            pred, kind = predict(x_t, t), self.config.prediction
            if kind == "velocity":
                return pred
            x_start, eps = solve_prediction(kind, pred, x_t, 1 - t, t)
            return make_prediction("velocity", x_start, eps, 1 - t, t)

        eta = 1.0 if sampler == "ddpm" else eta
        x_t, past = noise.to(_precision(noise)), None
        intervals = list(pairwise([*times, 0.0 if self.process == "flow" else -1]))
        for t, t_next in tqdm(intervals, desc=sampler, leave=False, disable=None if progress else True):
            if self.process == "flow":
                x_t, past = self._flow_step(sampler, x_t, t, t_next, past, velocity)
            else:
                pred = predict(x_t, t)
                x_t, std, past = self._vp_step(sampler, x_t, pred, t, t_next, past, eta)
                if std > 0:
                    x_t = x_t + std * draw(x_t.shape).to(x_t)
        return x_t

    def _flow_step(
        self,
        sampler: str,
        x_t: Tensor,
        t: float,
        t_next: float,
        past: Past,
        velocity: Callable[[Tensor, float], Tensor],
    ) -> tuple[Tensor, Past]:
        """(x at t_next, past of the next step)."""
        dt, slope = t_next - t, velocity(x_t, t)
        now = slope, dt
        # At t = 0, x_start is x_t whatever the noise: a network that predicts x_start knows no velocity there
        if sampler == "heun" and (t_next > 0 or self.config.prediction != "x_start"):
            slope = (slope + velocity(x_t + dt * slope, t_next)) / 2
        elif sampler == "ab2":
            slope = extrapolate(slope, past, dt)
        return x_t + dt * slope, now

    def _vp_step(
        self, sampler: str, x_t: Tensor, pred: Tensor, t: int, t_next: int, past: Past, eta: float
    ) -> tuple[Tensor, float, Past]:
        """(x at t_next before its fresh noise, standard deviation of that, past of the next step)."""
        alpha, sigma, clock = self._level(t)
        alpha_next, sigma_next, clock_next = self._level(t_next)
        pred_x_start, eps = solve_prediction(self.config.prediction, pred, x_t, alpha, sigma)
        if self.config.clip_x_start is not None:
            pred_x_start = pred_x_start.clamp(-self.config.clip_x_start, self.config.clip_x_start)
            eps = (x_t - alpha * pred_x_start) / sigma
        coef1, coef2, variance = posterior_coefficients(alpha**2, alpha_next**2)
        std = eta * math.sqrt(variance)
        if sampler == "ddpm":
            return coef1 * pred_x_start + coef2 * x_t, std, None
        if sampler == "ddim":
            return ddim_step(pred_x_start, eps, alpha_next, sigma_next, std), std, None
        middle = extrapolate(pred_x_start, past, clock_next - clock)
        eps = (x_t - alpha * middle) / sigma
        return ddim_step(middle, eps, alpha_next, sigma_next, 0.0), 0.0, (pred_x_start, clock_next - clock)

    def _level(self, t: int) -> tuple[float, float, float]:
        """(alpha, sigma, log(alpha / sigma)) at timestep t; -1 is clean."""
        if t < 0:
            return 1.0, 0.0, math.inf
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, self.half_log_snr
        return tuple(table[t].item() for table in tables)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, _precision(like)).view(-1, *[1] * (like.ndim - 1))
