"""The diffusion kernel: how noise is added to x_start, what a network learns from it, how samplers remove it.

It knows no network: x_start may be a latent, an image or a mask. Everything follows from one line, in
which noise is a standard Gaussian and t runs from clean to noise:

    x_t = alpha_t x_start + sigma_t noise                                                  Ho (4), Liu (1)
    process vp     variance preserving, t = 0 .. T - 1: alpha_t = sqrt(alphas_cumprod[t]),
                   sigma_t = sqrt(1 - alpha_t^2), alphas_cumprod = cumprod(1 - betas)
    process flow   rectified flow, t from 0 to 1: alpha_t = 1 - t, sigma_t = t

Rectified flow joins every x_start to a noise by a straight line and teaches the network the velocity along
the line, d x_t / d t = noise - x_start. A sampler follows the velocity from noise back to t = 0: along a
straight line one large step is exact, on the curved paths of VP many small steps are needed. But the network
sees x_t alone, and many lines cross there. It learns their mean velocity, which changes on the way, so that
some steps remain.
    Example: x_start = 2, noise = -1. At t = 0.25, x_t = 0.75 * 2 + 0.25 * (-1) = 1.25. The velocity is
    -1 - 2 = -3 at every t. One step from t = 1 to t = 0 gives -1 + (0 - 1) * (-3) = 2, which is x_start.

Where to look
    what the U-Net predicts   `make_prediction`: one line for each of eps, x_start, v and velocity
    with what weight          `DiffusionKernel.loss_weight`, applied in `loss_of`
    the samplers              one function each, from `ddpm` to `ab2`, listed in the table SAMPLERS
    adding a sampler          write a function like `ddim` or `euler`, which takes x_t to the cleaner t_next,
                              and give it a row in SAMPLERS: its process, its grid of times. The command
                              line, guidance and editing need no change.

Of two times, t_prev is the noisier one (earlier in sampling) and t_next the cleaner one (later in sampling).
Left out: learned variances, continuous-time VP, stochastic samplers of flow.

Ho 2020 arXiv:2006.11239; Rombach 2022 2112.10752; Song 2021 (DDIM) 2010.02502; Nichol & Dhariwal 2021
2102.09672; Salimans & Ho 2022 2202.00512; Karras 2022 (EDM) 2206.00364; Lu 2022 (DPM-Solver++) 2211.01095;
Lin 2024 2305.08891; Lugmayr 2022 (RePaint) 2201.09865; Hang 2023 2303.09556; Liu 2022 2209.03003 and Lipman
2023 2210.02747 (both with t reversed); Esser 2024 (SD3) 2403.03206.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .config import InputError

Process = Literal["vp", "flow"]
Prediction = Literal["eps", "x_start", "v", "velocity"]
Coefficient = float | Tensor  # a tensor broadcasts against the samples
Estimate = tuple[Tensor, Tensor]  # (x_start, noise), as the network's output has them
# At t = 1 of flow x_t is noise alone, from which eps says nothing of x_start
PREDICTIONS = {"vp": ("eps", "x_start", "v"), "flow": ("velocity", "x_start", "v")}


@dataclass(frozen=True)
class KernelConfig:
    num_timesteps: int = 1000  # T of a VP process; for flow the scale of the time that the network receives
    process: Process = "flow"  # how noise is added: on a straight line (rectified flow), or VP as in DDPM
    prediction: Prediction = "velocity"  # the network's output: flow velocity, x_start, v; vp eps, x_start, v
    schedule: Literal["linear", "scaled_linear", "sqrt", "cosine"] = "scaled_linear"  # VP: how betas grow
    beta_start: float = 0.0015  # VP: first beta of linear and scaled_linear; of sqrt: its square
    beta_end: float = 0.0195  # VP: last beta of linear and scaled_linear; of sqrt: its square
    zero_terminal_snr: bool = False  # VP: rescale the schedule to end in pure noise (not with eps)
    clip_x_start: float | None = None  # VP: in sampling, clamp estimates to +- this (none: for latents)
    loss: Literal["l1", "l2"] = "l2"  # absolute or squared error, mean over elements
    min_snr_gamma: float | None = None  # VP: min-SNR loss weight with this gamma, usually 5 (none: off)
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"  # flow: density of t in training
    stratified_t: bool = True  # in training: spread the times of a batch evenly; false: draw each by itself
    logit_mean: float = 0.0  # flow, logit_normal: mean of logit(t); above 0 favours noise
    logit_std: float = 1.0  # flow, logit_normal: standard deviation of logit(t)
    flow_shift: float | None = None  # flow: shift of t towards noise (none: from the latent's size; 1: off)
    flow_base: float = 32.0  # flow, flow_shift none: side of a latent that needs no shift

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Settings stored when the prediction still implied the process: "flow" the flow, the others VP; and
        when each time was drawn by itself."""
        if "loss" in values:  # all settings of a run, not some of a scheduler
            values.setdefault("stratified_t", False)
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
            ("flow_base", 0 < self.flow_base < math.inf, "a number above 0"),
        ):
            if not right:
                raise InputError(f"{name}: got {getattr(self, name)}, expected {expected}")

    def check_start(self) -> None:
        """InputError for settings that train a network which cannot begin to sample.

        Only new runs are checked: older runs that have such settings can still be opened.
        eps: sampling starts with x_start = (x_t - sigma_t eps) / alpha_t. At the last timestep of "cosine"
        alpha_t is 5e-5, and an error of 1 % in eps makes one of 200 in x_start. Ho's linear schedule has
        0.006. clip_x_start bounds the error.
        min-SNR: at zero SNR its weight is 0, so that nothing is learned where sampling starts.
        """
        alpha = make_betas(self).neg().log1p().sum().div(2).exp().item()
        if self.prediction == "eps" and alpha < 1e-3 and self.clip_x_start is None:
            raise InputError(
                f"prediction: got eps, expected v or x_start, or a number for clip_x_start, with a schedule "
                f"that ends at alpha_t = {alpha:.2g}"
            )
        if self.min_snr_gamma is not None and self.zero_terminal_snr:
            raise InputError(
                f"min_snr_gamma: got {self.min_snr_gamma:g}, expected none with zero_terminal_snr, where it "
                "gives the first step of sampling the weight 0"
            )


# --- VP: the noise schedule, in float64 ---------------------------------------------------------------------


def make_betas(config: KernelConfig) -> Tensor:
    """betas (T,): the variance of the noise that each timestep adds. In (0, 1]; 1 only in the last one of
    zero_terminal_snr."""
    T, first, last = config.num_timesteps, config.beta_start, config.beta_end
    if config.schedule == "cosine":  # Nichol (17): offset 0.008, betas capped at 0.999
        cumprod = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - cumprod[1:] / cumprod[:-1]).clamp(max=0.999)
    elif config.schedule == "scaled_linear":  # linear in sqrt(betas); "linear" in Rombach's code
        betas = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    else:  # Ho, section 4; "sqrt_linear" in Rombach's code, which has "sqrt" too, for far smaller ends
        betas = torch.linspace(first, last, T, dtype=torch.float64)
        betas = betas.sqrt() if config.schedule == "sqrt" else betas
    return rescale_zero_terminal_snr(betas) if config.zero_terminal_snr else betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """betas whose alpha_t is shifted and scaled to end in exactly 0, its first entry kept. Lin, Algorithm 1.

    Plain schedules leave a trace of x_start at the last timestep, from which a network learns the mean
    brightness; sampling starts from noise without that trace.
    """
    alpha = (1 - betas).cumprod(0).sqrt()
    cumprod = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
    return 1 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


def posterior_coefficients(
    cumprod: Coefficient, cumprod_next: Coefficient
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """The posterior q(x_next given x_start, x_t) as (factor on x_start, on x_t, variance), Ho (6), (7).

    cumprod and cumprod_next are alphas_cumprod at t and at any cleaner t_next, not only at t - 1.
    """
    kept = cumprod / cumprod_next  # from t_next to t: x_t = sqrt(kept) x_next + sqrt(1 - kept) noise
    coef1 = cumprod_next**0.5 * (1 - kept) / (1 - cumprod)
    coef2 = kept**0.5 * (1 - cumprod_next) / (1 - cumprod)
    return coef1, coef2, (1 - kept) * (1 - cumprod_next) / (1 - cumprod)


# --- what the network predicts ------------------------------------------------------------------------------


def make_prediction(
    kind: Prediction, x_start: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """What a network of this kind should output at x_t = alpha x_start + sigma noise."""
    if kind == "eps":
        return noise  # Ho (14)
    if kind == "x_start":
        return x_start
    if kind == "v":
        return alpha * noise - sigma * x_start  # Salimans, appendix D
    return noise - x_start  # velocity, Liu (1)


def solve_prediction(
    kind: Prediction, pred: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> tuple[Tensor, Tensor]:
    """What the network's output pred says of x_start and noise, given x_t: (x_start, noise).

    Two linear equations, solved by Cramer's rule:
        pred = c noise + d x_start
        x_t  = sigma noise + alpha x_start
    The determinant is alpha for eps, which is 0 where x_t is noise alone: eps cannot start there.
    """
    if kind == "x_start":  # c = 0, d = 1
        return pred, (x_t - alpha * pred) / sigma
    c, d = {"eps": (1, 0), "v": (alpha, -sigma), "velocity": (1, -1)}[kind]
    det = c * alpha - d * sigma
    return (c * x_t - sigma * pred) / det, (alpha * pred - d * x_t) / det


def convert_prediction(
    source: Prediction, target: Prediction, pred: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The output pred of a network of kind source, as a network of kind target would put it."""
    if source == target:
        return pred
    return make_prediction(target, *solve_prediction(source, pred, x_t, alpha, sigma), alpha, sigma)


# --- samplers: one step each --------------------------------------------------------------------------------


class Level(NamedTuple):
    """A noise level of VP."""

    alpha: float
    sigma: float
    half_log_snr: float  # log(alpha / sigma)


@dataclass(frozen=True)
class Step:
    """One interval of sampling, and the network to ask: what a sampler's function has to work with."""

    kernel: DiffusionKernel
    predict: Callable[[Tensor, float], Tensor]  # (x, t) -> the network's output there
    x_t: Tensor
    t: float  # where x_t is
    t_next: float  # where the step ends, cleaner than t; clean is -1 in VP and 0 in flow
    eta: float  # of ddim
    draw: Callable[[torch.Size], Tensor] | None  # fresh Gaussian noise of a shape

    def levels(self) -> tuple[Level, Level]:
        """VP: the noise levels at t and at t_next."""
        return self.kernel.level(self.t), self.kernel.level(self.t_next)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """VP: (x_start, noise) as the network estimates them at x_t, x_start clamped to clip_x_start."""
        config, (alpha, sigma, _) = self.kernel.config, self.kernel.level(self.t)
        pred = self.predict(self.x_t, self.t)
        pred_x_start, pred_noise = solve_prediction(config.prediction, pred, self.x_t, alpha, sigma)
        if config.clip_x_start is not None:
            pred_x_start = pred_x_start.clamp(-config.clip_x_start, config.clip_x_start)
            pred_noise = (self.x_t - alpha * pred_x_start) / sigma
        return pred_x_start, pred_noise

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Flow: noise - x_start as the network estimates it at (x, t)."""
        pred = self.predict(x, t)
        return convert_prediction(self.kernel.config.prediction, "velocity", pred, x, alpha=1 - t, sigma=t)

    def add_noise(self, mean: Tensor, std: float) -> Tensor:
        """mean plus fresh noise; nothing is drawn for std 0, as on the step to clean."""
        return mean + std * self.draw(mean.shape).to(mean) if std > 0 else mean


Past = tuple[Tensor, float] | None  # (estimate, length of the interval) of the step before, None in the first


def extrapolate(estimate: Tensor, past: Past, length: float) -> Tensor:
    """What the estimate will be in the middle of the coming interval, by the line through the last two.

    Example: the estimate was 1.0 one step ago and is 1.2 now. If the intervals are equally long, the line is
    at 1.3 half an interval later. In the first step, and for an infinite interval (in log-SNR, to the clean
    end), there is no such line, and the estimate is returned unchanged.
    """
    if past is None or math.isinf(length):
        return estimate
    return estimate + length / past[1] / 2 * (estimate - past[0])


def ddpm(step: Step, past: Past) -> tuple[Tensor, Past]:
    """x_next drawn from q(x_next given x_start, x_t), where the estimate stands for x_start. Ho (6), (7)."""
    (level, level_next), (pred_x_start, _) = step.levels(), step.estimate()
    coef1, coef2, variance = posterior_coefficients(level.alpha**2, level_next.alpha**2)
    return step.add_noise(coef1 * pred_x_start + coef2 * step.x_t, math.sqrt(variance)), None


def ddim(step: Step, past: Past) -> tuple[Tensor, Past]:
    """The estimates mixed anew, at the noise level of t_next; a part `std` of the noise is fresh. Song (12).

    std = eta * (ddpm's standard deviation): eta 0 is deterministic, eta 1 is ddpm.
    """
    (level, level_next), (pred_x_start, pred_noise) = step.levels(), step.estimate()
    std = step.eta * math.sqrt(posterior_coefficients(level.alpha**2, level_next.alpha**2)[2])
    return step.add_noise(ddim_mean(pred_x_start, pred_noise, level_next, std), std), None


def ddim_mean(pred_x_start: Tensor, pred_noise: Tensor, level_next: Level, std: float) -> Tensor:
    """alpha_next x_start + sqrt(sigma_next^2 - std^2) noise."""
    return level_next.alpha * pred_x_start + math.sqrt(max(level_next.sigma**2 - std**2, 0.0)) * pred_noise


def dpmpp(step: Step, past: Past) -> tuple[Tensor, Past]:
    """DPM-Solver++(2M), Lu, Algorithm 2: ddim with eta 0 and a better estimate of x_start, at no extra call.

    The estimate of x_start changes between t and t_next, and a step of second order needs the estimate
    halfway, where the way is measured in log(alpha / sigma). `extrapolate` gets it from the last two
    estimates. The noise is then what x_t holds beside this x_start.
    """
    (level, level_next), (pred_x_start, _) = step.levels(), step.estimate()
    length = level_next.half_log_snr - level.half_log_snr
    halfway = extrapolate(pred_x_start, past, length)
    noise = (step.x_t - level.alpha * halfway) / level.sigma
    return ddim_mean(halfway, noise, level_next, std=0.0), (pred_x_start, length)


def euler(step: Step, past: Past) -> tuple[Tensor, Past]:
    """x_next = x_t + (t_next - t) velocity, with the velocity at t: first order."""
    return step.x_t + (step.t_next - step.t) * step.velocity(step.x_t, step.t), None


def heun(step: Step, past: Past) -> tuple[Tensor, Past]:
    """Euler's step, then the step again with the mean of the velocities at both of its ends: second order.

    The step to t = 0 is Euler's alone (Karras, Algorithm 1). Without noise in its training data there, a
    network cannot see what noise x_t still has, and the correction would put half of it back.
    """
    dt, velocity = step.t_next - step.t, step.velocity(step.x_t, step.t)
    if step.t_next > 0:
        velocity = (velocity + step.velocity(step.x_t + dt * velocity, step.t_next)) / 2
    return step.x_t + dt * velocity, None


def ab2(step: Step, past: Past) -> tuple[Tensor, Past]:
    """Euler's step with the velocity in the middle of the interval, on the line of the last two velocities.

    Adams-Bashforth: second order for one call of the network (Hairer, Norsett & Wanner 1993, Solving Ordinary
    Differential Equations I, section III.1).
    """
    dt, velocity = step.t_next - step.t, step.velocity(step.x_t, step.t)
    return step.x_t + dt * extrapolate(velocity, past, dt), (velocity, dt)


# --- samplers: the times they visit -------------------------------------------------------------------------


# Each makes `num` falling times from (kernel, num, size of the latent, strength). strength is a share of
# time: with less than 1 the grid is that of a process which ends at the time of this share.


def steps_below(total: int, strength: float) -> int:
    """The share `strength` of a number of timesteps or of steps, rounded up: of 30 steps at 0.5, 15."""
    return math.ceil(strength * total - 1e-9)


def trailing_times(kernel: DiffusionKernel, num: int, size: Sequence[int], strength: float) -> list[float]:
    """Evenly spaced timesteps, from T - 1 on: round(i T / num) - 1. Lin, table 2."""
    T = steps_below(kernel.num_timesteps, strength)
    return [(2 * i * T + num) // (2 * num) - 1 for i in range(num, 0, -1)]  # rounded in integers


NOISIEST = math.log(1 / 20)  # log(alpha / sigma) below which x_t says next to nothing of x_start


def mixed_times(kernel: DiffusionKernel, num: int, size: Sequence[int], strength: float) -> list[float]:
    """The grid of dpmpp: times between `trailing_times` and a grid even in log(alpha / sigma).

    With many steps, steps of equal length in log(alpha / sigma) are best (Lu, section 4). With three steps
    they are worse than the trailing ones, because `extrapolate` reaches too far. So the share of the trailing
    grid is 3 / num. On schedules that end in nearly pure noise an even grid would spend half its steps there:
    between timesteps 999 and 990 of "cosine" log(alpha / sigma) grows by 5.8. One step goes from the last
    timestep to NOISIEST, and the even grid begins there. Timesteps are rounded; duplicates are dropped.
    """
    trailing, levels = trailing_times(kernel, num, size, strength), kernel.half_log_snr
    last = trailing[0]
    infinite = int(levels[last] < NOISIEST)
    even = torch.linspace(max(levels[last].item(), NOISIEST), levels[0], num - infinite, dtype=torch.float64)
    nearest = [last] * infinite + (even[:, None] - levels).abs().argmin(1).tolist()
    share = min(1, 3 / num)
    pairs = zip(trailing, nearest, strict=True)
    return sorted({round(share * a + (1 - share) * b) for a, b in pairs}, reverse=True)


def shift_time(t: Coefficient, shift: float) -> Coefficient:
    """Flow: t moved towards noise for shift > 1; 0 and 1 stay. Esser (23), where the shift is sqrt(m / n).

    Larger images need more noise to be hidden, so that their high noise levels deserve more attention.
    Example: at shift 4, t = 0.5 becomes 0.8; noise / signal, t / (1 - t), is multiplied by 4.
    """
    return shift * t / (1 + (shift - 1) * t)


def shifted_times(kernel: DiffusionKernel, num: int, size: Sequence[int], strength: float) -> list[float]:
    """Evenly spaced times of flow, from 1 on, then shifted as in training."""
    return [shift_time(strength * i / num, kernel.flow_shift(size)) for i in range(num, 0, -1)]


@dataclass(frozen=True)
class Sampler:
    process: Process
    step: Callable[[Step, Past], tuple[Tensor, Past]]  # -> (x at t_next, what the next step gets as past)
    times: Callable[[DiffusionKernel, int, Sequence[int], float], list[float]]
    corrects: bool = False  # asks the network at the end of each step too, but not at the clean end
    fresh_noise: Literal["no", "yes", "eta"] = "no"  # eta: as much as the setting of that name says


SAMPLERS = {
    "ddpm": Sampler("vp", ddpm, trailing_times, fresh_noise="yes"),
    "ddim": Sampler("vp", ddim, trailing_times, fresh_noise="eta"),
    "dpmpp": Sampler("vp", dpmpp, mixed_times),
    "euler": Sampler("flow", euler, shifted_times),
    "heun": Sampler("flow", heun, shifted_times, corrects=True),
    "ab2": Sampler("flow", ab2, shifted_times),
}


# --- the kernel ---------------------------------------------------------------------------------------------


class DiffusionKernel:
    """One process: `q_sample` adds noise, `losses` trains a network, `sample` removes the noise.

    A kernel has float64 tables and no parameters. Arithmetic is float32 whatever the precision of the
    network, and float64 where the data are float64. t (B,) may live on any device. Training draws t on the
    CPU, where the tables are, so that no GPU has to be waited for. betas (T,) replace the schedule.
    """

    def __init__(self, config: KernelConfig, betas: Tensor | None = None) -> None:
        self.config, self.process = config, config.process
        self.betas = make_betas(config) if betas is None else betas.double()
        self.num_timesteps = len(self.betas)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()  # alpha_t
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()  # sigma_t
        self.half_log_snr = self.sqrt_alphas_cumprod.log() - self.sqrt_one_minus_alphas_cumprod.log()

    # Time

    def flow_shift(self, size: Sequence[int]) -> float:
        """The configured shift, else the (geometric) mean side of the latent over `flow_base`, at least 1.

        In 2-D this is Esser's sqrt(m / n), with n = 32 * 32 of the m pixels: the mean of m pixels has
        sqrt(m / n) times less noise than the mean of n. In 3-D the same argument gives the power 1.5 of it,
        8 for 128^3 instead of 4. We take the rule of MAISI's code (MONAI, RFlowScheduler), (m / 32^3)^(1/3):
        the milder of the two, which leaves more steps for fine structure, and the one that MAISI's weights
        were trained with. Training and sampling shift alike, so the rule decides which noise levels get more
        attention, and not whether samples are right.
        """
        if self.config.flow_shift is not None:
            return self.config.flow_shift
        return max(1.0, math.prod(size) ** (1 / len(size)) / self.config.flow_base)

    def t_from_uniform(self, u: Tensor, size: Sequence[int]) -> Tensor:
        """Training times (B,) from u (B,) in [0, 1): int64 for VP; float, shifted for this size, for flow."""
        t = u.double()
        if self.process == "vp":
            return (t * self.num_timesteps).long()
        if self.config.t_distribution == "logit_normal":  # Esser (19): more of the middle, the hardest times
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        return shift_time(t, self.flow_shift(size)).to(u.dtype)

    def to_network_time(self, t: Tensor) -> Tensor:
        """The time t (B,) as the network receives it: float on the scale 0..T, for both processes."""
        return t.float() if self.process == "vp" else t * self.num_timesteps

    # Adding noise

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of the samples, (B, 1, ..., 1) to broadcast against `like`, on its device."""
        if self.process == "flow":
            alpha, sigma = 1 - t, t
        else:
            alpha, sigma = self.sqrt_alphas_cumprod[t.cpu()], self.sqrt_one_minus_alphas_cumprod[t.cpu()]
        return _per_sample(alpha, like), _per_sample(sigma, like)

    def signal_share(self, t: Tensor) -> Tensor:
        """The part of x_t that is signal, (B,) float64: alpha_t^2 / (alpha_t^2 + sigma_t^2); 0 = noise."""
        alpha, sigma = (v.flatten() for v in self.coefficients(t, torch.empty(1, dtype=torch.float64)))
        return alpha.square() / (alpha.square() + sigma.square())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, *S). Ho (4), Liu (1)."""
        alpha, sigma = self.coefficients(t, x_start)
        return alpha * x_start + sigma * noise

    def q_step(self, x_next: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, *S) from x at the timestep before, t - 1. VP only. Ho (2)."""
        beta = self.betas[t.cpu()]
        return _per_sample((1 - beta).sqrt(), x_next) * x_next + _per_sample(beta.sqrt(), x_next) * noise

    def noise_again(self, x_next: Tensor, t_next: float, t: float, noise: Tensor) -> Tensor:
        """x_t (B, C, *S) drawn from q(x_t given x_next), for any t_next cleaner than t, with this noise.

        x_t = scale x_next + std noise, with alpha_t = scale alpha_next and
        sigma_t^2 = scale^2 sigma_next^2 + std^2, the moments of x_t given x_start.
        """
        (alpha, sigma), (alpha_next, sigma_next) = (self.signal_and_noise(time) for time in (t, t_next))
        scale = alpha / alpha_next
        return scale * x_next + math.sqrt(max(sigma**2 - (scale * sigma_next) ** 2, 0.0)) * noise

    def q_posterior(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, C, *S) and variance (B, 1, ..., 1) of x at t_next, given x_start and x_t. VP only.

        t_next is cleaner than t, by default t - 1; -1 is clean.
        """
        if self.process == "flow":
            raise InputError("q_posterior: needs process vp, got flow")
        cumprod = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod])  # clean first
        t_next = t - 1 if t_next is None else t_next
        coefs = posterior_coefficients(cumprod[t.cpu() + 1], cumprod[t_next.cpu() + 1])
        coef1, coef2, variance = (_per_sample(coef, x_t) for coef in coefs)
        return coef1 * x_start + coef2 * x_t, variance

    # Training: what the network predicts, and with what weight

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output at q_sample(x_start, t, noise)."""
        x_start, noise = (x.to(_precision(x_start)) for x in (x_start, noise))
        return make_prediction(self.config.prediction, x_start, noise, *self.coefficients(t, x_start))

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight of a sample's error, (B,) float64: 1, or min-SNR-gamma (Hang, section 3.4).

        Min-SNR weighs the squared error of x_start by min(snr, gamma), snr = alpha_t^2 / sigma_t^2, so that
        the nearly clean times, where snr is huge, do not outweigh the others. An error of eps is sqrt(snr)
        times as large as the error of x_start that it makes, an error of v sqrt(snr + 1) times.
        """
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones(t.shape, dtype=torch.float64)
        cumprod = self.alphas_cumprod[t.cpu()]
        snr = cumprod / (1 - cumprod)
        return snr.clamp(max=gamma) / {"x_start": 1, "eps": snr, "v": snr + 1}[self.config.prediction]

    def loss_of(self, pred: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The weighted loss (B,) of a prediction at q_sample(x_start, t, noise), mean over elements."""
        error = pred.to(_precision(x_start)) - self.target(x_start, t, noise)
        error = error.abs() if self.config.loss == "l1" else error.square()
        return error.flatten(1).mean(1) * self.loss_weight(t).to(error)

    def losses(
        self, model: Callable[..., Tensor], x_start: Tensor, t: Tensor, noise: Tensor, **model_kwargs
    ) -> Tensor:
        """The training loss (B,) of model(x_t, time (B,) on 0..T, **model_kwargs) -> prediction."""
        time = self.to_network_time(t).to(x_start.device)
        return self.loss_of(model(self.q_sample(x_start, t, noise), time, **model_kwargs), x_start, t, noise)

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, source: Prediction, target: Prediction) -> Tensor:
        """The prediction pred of kind source, made at (x_t, t), as the kind target."""
        return convert_prediction(source, target, pred, x_t, *self.coefficients(t, x_t))

    # Sampling

    def level(self, t: int) -> Level:
        """VP: the noise level of timestep t; -1 is clean."""
        if t < 0:
            return Level(1.0, 0.0, math.inf)
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, self.half_log_snr
        return Level(*(table[t].item() for table in tables))

    @property
    def default_sampler(self) -> str:
        """The sampler that makes the best samples with a given number of network calls.

        For flow: with the exact network of Gaussian mixtures, ab2 in 30 calls is no farther from the data
        than heun in 59 (Wasserstein-1 distance); in 19 calls heun is 3 to 6 times as far.
        """
        return "ab2" if self.process == "flow" else "dpmpp"

    def signal_and_noise(self, t: float) -> tuple[float, float]:
        """alpha_t and sigma_t of one time."""
        return (1 - t, t) if self.process == "flow" else self.level(int(t))[:2]

    def check_sampler(self, sampler: str, eta: float = 0.0) -> None:
        """InputError unless the sampler belongs to this process, and eta to the sampler."""
        names = [name for name, row in SAMPLERS.items() if row.process == self.process]
        if sampler not in names:
            expected = f"one of {', '.join(names)} for process {self.process}"
            raise InputError(f"sampler: got {sampler}, expected {expected}")
        if not 0 <= eta <= 1 or (eta > 0 and SAMPLERS[sampler].fresh_noise != "eta"):
            raise InputError(f"eta: got {eta} with sampler {sampler}, expected 0 to 1 with ddim, else 0")

    def sampling_times(
        self, sampler: str, steps: int | Sequence[float], size: Sequence[int], strength: float = 1.0
    ) -> list[float]:
        """The falling times at which steps start, for latents of spatial shape size; the last ends clean.

        steps is their number, for the grid of the sampler, or the times themselves. With a strength below 1
        the first time is this share of all time (of the T timesteps, or of flow's time before its shift), the
        same for every sampler, and the number of steps this share of `steps`. Example: strength 0.3, 20 steps
        and T = 1000 make 6 steps from timestep 299 on.
        """
        self.check_sampler(sampler)
        flow, T = self.process == "flow", self.num_timesteps
        if not isinstance(steps, int):
            return self._check_times([float(t) if flow else int(t) for t in steps])
        if steps < 1 or (steps > T and not flow):
            raise InputError(f"steps: got {steps}, expected {'1 or more' if flow else f'1 to {T}'}")
        return SAMPLERS[sampler].times(self, steps_below(steps, strength), size, strength)

    def _check_times(self, times: list[float]) -> list[float]:
        inside = all(0 < t <= 1 if self.process == "flow" else 0 <= t < self.num_timesteps for t in times)
        if not times or not inside or any(t <= t_next for t, t_next in pairwise(times)):
            domain = "(0, 1]" if self.process == "flow" else f"[0, {self.num_timesteps})"
            raise InputError(f"steps: got the times {times}, expected falling times in {domain}")
        return times

    def intervals(
        self, sampler: str, steps: int | Sequence[float], size: Sequence[int], resample: int = 1
    ) -> list[tuple[float, float, int]]:
        """(t, t_next, how often the interval is gone through) from noise to clean.

        From pure noise it is gone through once: there is nothing in x_t to keep.
        """
        times = self.sampling_times(sampler, steps, size)
        ends = [*times, 0.0 if self.process == "flow" else -1]
        return [(t, r, resample if self.signal_and_noise(t)[0] > 0 else 1) for t, r in pairwise(ends)]

    def num_network_calls(self, sampler: str, steps: int | Sequence[float], resample: int = 1) -> int:
        """Calls of the network in `sample`: one a step, two in steps of heun but the last.

        dpmpp may visit fewer times than steps.
        """
        corrects = SAMPLERS[sampler].corrects
        rows = self.intervals(sampler, steps, (1,), resample)
        return sum(rounds * (2 if corrects and t_next > 0 else 1) for _, t_next, rounds in rows)

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
        resample: int = 1,
        **model_kwargs,
    ) -> Tensor:
        """x_start (B, C, *S) from noise (B, C, *S) in `steps` steps or at given times (see `sampling_times`).

        eta (ddim) goes from 0, deterministic, to 1, the variance of ddpm. draw(shape) returns the fresh noise
        that ddpm, eta > 0 and resample > 1 need; nothing else is random. progress shows a bar on a terminal.

        resample: how often each step is taken. After each time but the last, x_t gets its noise back and the
        step starts again. Where a part of x_start is prescribed (inpainting), the rest has one more chance to
        fit. Lugmayr, Algorithm 1, with jumps of one step.
        """
        self.check_sampler(sampler, eta)
        intervals = self.intervals(sampler, steps, noise.shape[2:], resample)
        if draw is None and (SAMPLERS[sampler].fresh_noise == "yes" or eta > 0 or resample > 1):
            raise InputError(f"draw: got None, expected a source of noise for {sampler} with eta {eta}")

        def predict(x_t: Tensor, t: float) -> Tensor:
            time = self.to_network_time(torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device))
            return model(x_t, time, **model_kwargs).to(x_t.dtype)

        x_t, past = noise.to(_precision(noise)), None
        for t, t_next, rounds in tqdm(
            intervals, desc=sampler, leave=False, disable=None if progress else True
        ):
            for left in range(rounds - 1, -1, -1):
                x_next, past = SAMPLERS[sampler].step(Step(self, predict, x_t, t, t_next, eta, draw), past)
                if left:
                    # The last slope belonged to the noise that is replaced
                    x_t, past = self.noise_again(x_next, t_next, t, draw(x_next.shape).to(x_next)), None
            x_t = x_next
        return x_t

    # The probability flow

    def flow_step(self, estimate: Estimate, x: Tensor, t: float, t_next: float) -> Tensor:
        """x (B, C, *S) at time t, moved to time t_next, cleaner or noisier, along the straight line from the
        estimated x_start to the estimated noise. One step of ddim or euler.

        Divided by alpha + sigma, every process is a flow: with s = sigma / (alpha + sigma),
        x / (alpha + sigma) = (1 - s) x_start + s noise.
        """
        (alpha, sigma), (alpha_next, sigma_next) = self.signal_and_noise(t), self.signal_and_noise(t_next)
        total, total_next = alpha + sigma, alpha_next + sigma_next
        pred_x_start, pred_noise = estimate
        return total_next * (
            x / total + (sigma_next / total_next - sigma / total) * (pred_noise - pred_x_start)
        )

    @torch.no_grad()
    def invert(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        times: Sequence[float],
        rounds: int = 3,
        **model_kwargs,
    ) -> Tensor:
        """The x_t (B, C, *S) at times[0] from which ddim (eta 0) or euler, with these falling times, makes
        x_start (B, C, *S): the noise that an image is made of.

        A step of the sampler takes x_t to x_next = x_t + (change predicted at x_t). Its inverse is the x_t of
        x_t = x_next - (change predicted at x_t), found by `rounds` fixed-point rounds. The first one, which
        predicts at x_next, is the inversion of Song (section 5.3); more make up for that (Pan et al. 2023,
        arXiv:2309.04907). Calls of the network: steps * rounds.
        """
        x_next, kind = x_start.to(_precision(x_start)), self.config.prediction
        ends = [*self._check_times(list(times)), 0.0 if self.process == "flow" else -1][::-1]
        for t_next, t in pairwise(ends):
            alpha, sigma = self.signal_and_noise(t)
            x_t = x_next * (alpha + sigma) / sum(self.signal_and_noise(t_next))
            for _ in range(rounds):
                time = self.to_network_time(x_t.new_full((len(x_t),), t))
                pred = model(x_t, time, **model_kwargs).to(x_t.dtype)
                estimate = solve_prediction(kind, pred, x_t, alpha, sigma)
                x_t = self.flow_step(estimate, x_next, t_next, t)
            x_next = x_t
        return x_next


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, _precision(like)).view(-1, *[1] * (like.ndim - 1))
