"""The diffusion kernel is the algebra of Gaussians, every sampler the recursion that its equations say."""

import itertools
import json
import math

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import norm
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

import sample
import train_ldm
from ldm3d.config import InputError, from_dict, parse, to_dict, upgraded
from ldm3d.diffusion_kernel import (
    PREDICTIONS,
    SAMPLERS,
    DiffusionKernel,
    KernelConfig,
    extrapolate,
    shift_time,
)
from ldm3d.engine.checkpoint import load, save, step_files
from ldm3d.inference import sampling

SHAPES = {2: (4, 3, 5, 4), 3: (4, 3, 5, 4, 3)}
KINDS = ("eps", "x_start", "v", "velocity")
PAIRS = [(process, kind) for process, kinds in PREDICTIONS.items() for kind in kinds]
SCHEDULES = ("linear", "scaled_linear", "sqrt", "cosine")
DATA_STD = 0.3
VP = {"process": "vp", "prediction": "v"}


def make_kernel(prediction="v", process=None, **kwargs) -> DiffusionKernel:
    """Of VP, unless the prediction is flow's own or the process is named."""
    process = process or ("flow" if prediction == "velocity" else "vp")
    return DiffusionKernel(KernelConfig(process=process, prediction=prediction, **kwargs))


def gaussians(dims, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPES[dims], dtype=torch.float64, generator=generator) for _ in range(num)]


def some_times(kernel):
    """Four times of the batch, the ends of the process among them where every quantity is defined."""
    if kernel.process == "flow":
        return torch.tensor([0.01, 0.3, 0.77, 0.99], dtype=torch.float64)
    return torch.tensor([0, 1, kernel.num_timesteps // 2, kernel.num_timesteps - 2])


def alpha_sigma(kernel, t):
    """(alpha, sigma) of one time by the definition, from the betas alone; -1 is clean."""
    if kernel.process == "flow":
        return 1 - t, t
    cumprod = float(np.prod(1 - kernel.betas.numpy()[: int(t) + 1]))
    return math.sqrt(cumprod), math.sqrt(1 - cumprod)


# Settings


def without_process(kernel: dict, stored: str) -> dict:
    return {k: v for k, v in kernel.items() if k != "process"} | {"prediction": stored}


@pytest.mark.parametrize(
    ("stored", "process", "prediction"),
    [("flow", "flow", "velocity"), ("eps", "vp", "eps"), ("x_start", "vp", "x_start"), ("v", "vp", "v")],
)
def test_settings_stored_before_there_was_a_process_mean_what_they_meant(
    stored, process, prediction, tmp_path
):
    expected = KernelConfig(process=process, prediction=prediction)
    old = without_process(to_dict(expected), stored)
    assert from_dict(KernelConfig, old) == expected
    assert from_dict(KernelConfig, to_dict(expected)) == expected
    (tmp_path / "old.json").write_text(json.dumps({"kernel": old}))
    assert parse(train_ldm.Config, [str(tmp_path / "old.json")], {})[0].kernel == expected


@pytest.mark.parametrize("stored", ["flow", "eps"])
def test_a_run_from_before_there_was_a_process_goes_on_and_samples(stored, vae_run, tmp_path):
    today = [] if stored == "flow" else ["--kernel.process", "vp", "--kernel.prediction", stored]
    for run in ("new", "old"):
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / run, 5, *today))
    for path in [*step_files(tmp_path / "old"), tmp_path / "old/best.pt"]:
        content = load(path)
        content["config"]["kernel"] = without_process(content["config"]["kernel"], stored)
        save(path, content)
    config = json.loads((tmp_path / "old/config.json").read_text())
    config["kernel"] = without_process(config["kernel"], stored)
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    samples = {}
    for run in ("new", "old"):
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / run, 10, *today))
        assert tiny.lines(tmp_path / run)[-1]["step"] == 10
        sample.main([str(tmp_path / run), "--num", "1", "--steps", "2", "--out", str(tmp_path / run / "out")])
        samples[run] = [path.read_bytes() for path in sorted((tmp_path / run / "out").rglob("*0000.*"))]
    assert samples["new"] == samples["old"] != []


# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_betas_are_the_published_formulas(schedule, num_timesteps):
    kernel = make_kernel(schedule=schedule, num_timesteps=num_timesteps, beta_start=1e-4, beta_end=0.02)
    i = np.arange(num_timesteps)
    if schedule == "cosine":
        f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        np.testing.assert_allclose(kernel.alphas_cumprod[:-1], f[1:-1] / f[0], rtol=1e-10)
        assert kernel.betas[-1] == 0.999
        return
    line = i / (num_timesteps - 1)
    expected = {
        "linear": 1e-4 + (0.02 - 1e-4) * line,
        "scaled_linear": (1e-2 + (math.sqrt(0.02) - 1e-2) * line) ** 2,
        "sqrt": np.sqrt(1e-4 + (0.02 - 1e-4) * line),
    }[schedule]
    np.testing.assert_allclose(kernel.betas, expected, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_one_step_kernels_compose_to_the_closed_form(schedule, zero_terminal_snr):
    kernel = make_kernel(schedule=schedule, zero_terminal_snr=zero_terminal_snr, num_timesteps=50)
    mean, variance = 1.0, 0.0  # of x_t given x_start = 1
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t, beta in enumerate(kernel.betas.tolist()):
        time = torch.tensor([t])
        step = kernel.q_step(mean * one, time, zero).item(), kernel.q_step(zero, time, one).item()
        assert step == pytest.approx((math.sqrt(1 - beta) * mean, math.sqrt(beta)), abs=1e-10)
        mean, variance = step[0], (1 - beta) * variance + beta
        assert kernel.q_sample(one, time, zero).item() == pytest.approx(mean, abs=1e-10)
        assert kernel.q_sample(zero, time, one).item() == pytest.approx(math.sqrt(variance), abs=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_ends_in_exactly_zero_and_keeps_the_first_level(schedule):
    plain = make_kernel(schedule=schedule)
    kernel = make_kernel(schedule=schedule, zero_terminal_snr=True)
    assert kernel.alphas_cumprod[-1] == 0
    assert kernel.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    # Lin, Algorithm 1: an affine map of alpha
    old, new = plain.alphas_cumprod.sqrt().numpy(), kernel.alphas_cumprod.sqrt().numpy()
    np.testing.assert_allclose(new, np.interp(old, [old[-1], old[0]], [0, old[0]]), atol=1e-10)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("prediction", ["v", "x_start"])
def test_sampling_starts_from_zero_terminal_snr_where_only_the_network_knows_x_start(sampler, prediction):
    kernel = make_kernel(prediction, zero_terminal_snr=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 4, 4, generator=generator)
    x = kernel.sample(oracle(kernel), noise, 10, sampler, draw=lambda s: torch.randn(s, generator=generator))
    assert x.isfinite().all()
    # In one step, x_start is what the optimal network says of pure noise: the mean of the data, 0
    assert kernel.sample(oracle(kernel), noise, 1, sampler, draw=torch.zeros).abs().max() == 0


# Posterior and conversions


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("t", "t_next"), [(19, 18), (19, 3), (7, 0), (12, -1), (0, -1)])
def test_posterior_is_gaussian_conditioning(t, t_next, zero_terminal_snr):
    kernel = make_kernel(
        num_timesteps=20, schedule="linear", beta_end=0.3, zero_terminal_snr=zero_terminal_snr
    )
    alpha, sigma = alpha_sigma(kernel, t)
    alpha_next, sigma_next = alpha_sigma(kernel, t_next)
    between = math.prod(math.sqrt(1 - beta) for beta in kernel.betas[t_next + 1 : t + 1].tolist())
    # given x_start = x0, (x_next, x_t) is Gaussian with these moments, x_t being between * x_next + noise
    covariance = np.array([[sigma_next**2, between * sigma_next**2], [between * sigma_next**2, sigma**2]])
    x_start, x_t = gaussians(3, 2)
    gain = covariance[0, 1] / covariance[1, 1]
    mean = alpha_next * x_start + gain * (x_t - alpha * x_start)
    times = torch.full((4,), t), torch.full((4,), t_next)
    got_mean, got_variance = kernel.q_posterior(x_start, x_t, *times)
    torch.testing.assert_close(got_mean, mean, rtol=1e-10, atol=1e-10)
    assert got_variance.shape == (4, 1, 1, 1, 1)
    expected = covariance[0, 0] - gain * covariance[0, 1]
    torch.testing.assert_close(got_variance, torch.full_like(got_variance, expected), rtol=1e-10, atol=1e-10)
    if t_next == t - 1:
        torch.testing.assert_close(kernel.q_posterior(x_start, x_t, times[0])[0], got_mean, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("prediction", ["v", "velocity"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_conversions_round_trip_and_agree_with_the_definitions(source, target, prediction, dims):
    kernel = make_kernel(prediction)
    x_start, noise = gaussians(dims, 2)
    t = some_times(kernel)
    x_t = kernel.q_sample(x_start, t, noise)
    shape = (4,) + (1,) * (dims + 1)
    alpha, sigma = (
        torch.tensor(values, dtype=torch.float64).view(shape)
        for values in zip(*(alpha_sigma(kernel, time) for time in t.tolist()), strict=True)
    )
    true = {
        "eps": noise,
        "x_start": x_start,
        "v": alpha * noise - sigma * x_start,
        "velocity": noise - x_start,
    }
    torch.testing.assert_close(x_t, alpha * x_start + sigma * noise, rtol=1e-10, atol=1e-10)
    there = kernel.convert(true[source], x_t, t, source, target)
    torch.testing.assert_close(there, true[target], rtol=1e-10, atol=1e-10)
    back = kernel.convert(there, x_t, t, target, source)
    torch.testing.assert_close(back, true[source], rtol=1e-10, atol=1e-10)


# Time


def test_timesteps_of_vp_are_equally_likely_labels_from_0_to_the_last():
    kernel = make_kernel(num_timesteps=7)
    u = (torch.arange(700) + 0.5) / 700
    t = kernel.t_from_uniform(u, (8, 8))
    assert t.dtype == torch.int64
    assert t.bincount().tolist() == [100] * 7
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert kernel.t_from_uniform(ends, (8, 8)).tolist() == [0, 6]
    assert make_kernel().t_from_uniform(ends, (64, 64)).tolist() == [0, 999]  # the size shifts flow only


def test_flow_runs_from_clean_at_0_to_noise_at_1():
    kernel = make_kernel("velocity")
    x_start, noise = gaussians(2, 2)
    assert torch.equal(kernel.q_sample(x_start, torch.zeros(4), noise), x_start)
    assert torch.equal(kernel.q_sample(x_start, torch.ones(4), noise), noise)
    assert torch.equal(kernel.target(x_start, torch.ones(4) / 2, noise), noise - x_start)


def test_the_worked_examples_of_the_docstrings():
    kernel, x_start, noise = (
        make_kernel("velocity", flow_shift=1.0),
        torch.full((1, 1, 1), 2.0),
        -torch.ones(1, 1, 1),
    )
    for t, x_t in ((0.25, 1.25), (1.0, -1.0)):
        assert kernel.q_sample(x_start, torch.tensor([t]), noise) == x_t
        assert kernel.target(x_start, torch.tensor([t]), noise) == -3
    assert kernel.sample(lambda x, t: noise - x_start, noise, 1, "euler") == x_start
    assert shift_time(0.5, 4) == pytest.approx(0.8)
    assert extrapolate(torch.tensor(1.2), (torch.tensor(1.0), 0.1), 0.1) == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("size", "shift"),
    [((32, 32, 32), 1), ((16, 16, 16), 1), ((128,) * 3, 4), ((64, 64), 2), ((32, 64, 256), 2.5198421)],
)
def test_flow_shift_is_the_mean_side_over_32_and_never_below_1(size, shift):
    assert make_kernel("velocity").flow_shift(size) == pytest.approx(shift)
    if len(size) == 2:  # Esser: sqrt(m / n)
        assert shift == math.sqrt(math.prod(size) / (32 * 32))
    assert make_kernel("velocity", flow_shift=1.0).flow_shift(size) == 1
    half = make_kernel("velocity", flow_base=16.0).flow_shift(size)
    assert half == pytest.approx(max(1, math.prod(size) ** (1 / len(size)) / 16))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8)])
def test_logit_normal_times_have_the_quantiles_of_torch_distributions_then_the_shift(mean, std):
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    config = {"t_distribution": "logit_normal", "logit_mean": mean, "logit_std": std}
    one = torch.ones((), dtype=torch.float64)
    quantiles = TransformedDistribution(Normal(mean * one, std * one), SigmoidTransform()).icdf(u)
    got = make_kernel("velocity", flow_shift=1.0, **config).t_from_uniform(u, (8, 8))
    torch.testing.assert_close(got, quantiles, rtol=1e-10, atol=1e-10)
    shifted = make_kernel("velocity", **config).t_from_uniform(u, (128,) * 3)
    # the shift multiplies the noise-to-signal ratio t / (1 - t)
    torch.testing.assert_close(
        shifted / (1 - shifted), 4 * quantiles / (1 - quantiles), rtol=1e-9, atol=1e-10
    )
    ends = make_kernel("velocity", **config).t_from_uniform(torch.tensor([0.0, 1 - 2**-24]), (8, 8))
    assert ends[0] == 0
    assert ends[1] <= 1


@pytest.mark.parametrize("prediction", ["v", "velocity"])
def test_the_share_of_signal_is_that_of_the_variances(prediction):
    kernel = make_kernel(prediction)
    t = some_times(kernel)
    for share, time in zip(kernel.signal_share(t), t.tolist(), strict=True):
        alpha, sigma = alpha_sigma(kernel, time)
        assert float(share) == pytest.approx(1 / (1 + (sigma / alpha) ** 2), rel=1e-9)


def test_the_network_receives_float_time_on_the_scale_of_the_timesteps():
    vp, flow = make_kernel(), make_kernel("velocity")
    assert vp.to_network_time(torch.tensor([0, 999])).tolist() == [0.0, 999.0]
    assert flow.to_network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]

    def record(x_t, t, seen):
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        seen.append(t[0].item())
        return torch.zeros_like(x_t)

    noise = torch.zeros(2, 1, 4, 4)
    for kernel, sampler, expected in (
        (vp, "ddim", [999, 749, 499, 249]),
        (flow, "euler", [1000, 750, 500, 250]),
        (flow, "heun", [1000, 750, 750, 500, 500, 250, 250]),
        (flow, "ab2", [1000, 750, 500, 250]),
    ):
        seen = []
        kernel.sample(record, noise, 4, sampler, seen=seen)
        assert seen == expected
        assert kernel.num_network_calls(sampler, 4) == len(seen)


# Loss


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("process", "prediction"), PAIRS)
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_losses_is_the_mean_error_of_each_sample_at_the_noisy_input(dims, process, prediction, loss):
    kernel = make_kernel(prediction, process, loss=loss)
    x_start, noise, output = gaussians(dims, 3)
    t = some_times(kernel)

    def model(x_t, time, scale):
        torch.testing.assert_close(x_t, kernel.q_sample(x_start, t, noise))
        torch.testing.assert_close(time, kernel.to_network_time(t))
        return scale * output

    got = kernel.losses(model, x_start, t, noise, scale=2.0)
    error = (2 * output - kernel.target(x_start, t, noise)).flatten(1)
    torch.testing.assert_close(got, error.abs().mean(1) if loss == "l1" else error.square().mean(1))
    x_t = kernel.q_sample(x_start, t, noise)
    exact = kernel.convert(noise, x_t, t, "eps", prediction)
    torch.testing.assert_close(kernel.losses(lambda *_: exact, x_start, t, noise), torch.zeros(4).double())


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_min_snr_weighs_every_prediction_as_the_same_clamped_error_of_x_start(prediction):
    kernel = make_kernel(prediction, min_snr_gamma=5.0)
    x_start, noise, error = gaussians(2, 3)
    t = torch.tensor([0, 100, 400, 999])
    x_t, target = kernel.q_sample(x_start, t, noise), kernel.target(x_start, t, noise)
    pred = target + 0.01 * error
    pred_x_start = kernel.convert(pred, x_t, t, prediction, "x_start")
    alpha, sigma = np.array([alpha_sigma(kernel, time) for time in t.tolist()]).T
    snr = alpha**2 / sigma**2
    assert snr[0] > 5 > snr[-1]
    expected = torch.from_numpy(np.minimum(snr, 5)) * (pred_x_start - x_start).square().flatten(1).mean(1)
    torch.testing.assert_close(kernel.losses(lambda *_: pred, x_start, t, noise), expected, rtol=1e-8, atol=0)
    formula = {
        "eps": np.minimum(snr, 5) / snr,
        "x_start": np.minimum(snr, 5),
        "v": np.minimum(snr, 5) / (snr + 1),
    }
    np.testing.assert_allclose(kernel.loss_weight(t), formula[prediction], rtol=1e-9)


def test_half_precision_latents_and_networks_are_reduced_in_float32():
    kernel = make_kernel("velocity")
    x_start, noise = (x.bfloat16() for x in gaussians(2, 2))
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    weight = torch.ones((), requires_grad=True)

    def model(x_t, time):
        assert x_t.dtype == time.dtype == torch.float32
        return (weight * x_t).bfloat16()

    losses = kernel.losses(model, x_start, t, noise)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert weight.grad.isfinite()
    assert torch.equal(kernel.target(x_start, t, noise), noise.float() - x_start.float())
    assert kernel.sample(model, noise, 2, "euler").dtype == torch.float32


# Sampling: the Gaussian oracle. For N(0, DATA_STD^2) data the optimal network is linear; so is every sampler


def estimate_gains(alpha, sigma):
    """E[x_start given x_t] / x_t and E[noise given x_t] / x_t."""
    variance = alpha**2 * DATA_STD**2 + sigma**2
    return alpha * DATA_STD**2 / variance, sigma / variance


def oracle(kernel):
    """The optimal network for N(0, DATA_STD^2) data, in the precision of its input."""

    def model(x_t, time):
        if kernel.process == "flow":
            sigma = time / kernel.num_timesteps
            alpha = 1 - sigma
        else:
            cumprod = kernel.alphas_cumprod[time.long()].to(x_t)
            alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
        x_gain, noise_gain = estimate_gains(alpha, sigma)
        gain = {
            "eps": noise_gain,
            "x_start": x_gain,
            "v": alpha * noise_gain - sigma * x_gain,
            "velocity": noise_gain - x_gain,
        }[kernel.config.prediction]
        return gain.view(-1, *[1] * (x_t.ndim - 1)) * x_t

    return model


def visited_times(kernel, sampler, steps, shift):
    """The grid as the design states it, written down anew."""
    T = kernel.num_timesteps
    if kernel.process == "flow":
        t = np.arange(steps, 0, -1) / steps
        return list(shift * t / (1 + (shift - 1) * t))
    trailing = [math.floor(i * T / steps + 0.5) - 1 for i in range(steps, 0, -1)]
    if sampler != "dpmpp":
        return trailing
    ratio = np.array(
        [sigma / max(alpha, 1e-30) for alpha, sigma in (alpha_sigma(kernel, t) for t in range(T))]
    )
    count = steps if ratio[-1] <= 20 else steps - 1  # else the first step goes straight to the ratio 20
    grid = min(20, ratio[-1]) * (ratio[0] / min(20, ratio[-1])) ** (np.arange(count) / max(count - 1, 1))
    even = [T - 1] * (steps - count) + [int(np.argmin(np.abs(np.log(ratio / value)))) for value in grid]
    share = min(1, 3 / steps)
    mixed = [round(share * a + (1 - share) * b) for a, b in zip(trailing, even, strict=True)]
    return sorted(set(mixed), reverse=True)


def recursion(kernel, sampler, steps, eta=0.0, shift=1.0):
    """(gain on the starting noise, standard deviation of the sample) in float64, by the papers' formulas."""
    times = [*visited_times(kernel, sampler, steps, shift), -1 if kernel.process == "vp" else 0.0]
    gain, fresh, last = 1.0, 0.0, None
    for t, r in itertools.pairwise(times):
        alpha, sigma = alpha_sigma(kernel, t)
        alpha_r, sigma_r = alpha_sigma(kernel, r) if r != -1 else (1.0, 0.0)
        k, n = estimate_gains(alpha, sigma)
        if kernel.process == "flow":
            dt, slope = r - t, n - k
            k_r, n_r = estimate_gains(alpha_r, sigma_r)
            if sampler == "heun" and r > 0:
                factor = 1 + dt * (slope + (n_r - k_r) * (1 + dt * slope)) / 2
            elif sampler == "ab2" and last is not None:  # integral of the interpolating line from t to r
                slope_last, gain_last, t_last = last
                tilt = (slope - slope_last * gain_last / gain) / (t - t_last)
                factor = 1 + dt * slope + tilt * dt**2 / 2
            else:
                factor = 1 + dt * slope
            last = (slope, gain, t)
            gain *= factor
            continue
        if r == -1:
            gain, fresh = gain * k, fresh * k**2
            continue
        step = alpha / alpha_r  # x_t = step * x_r + noise of this variance
        noise = sigma**2 - step**2 * sigma_r**2
        posterior = 1 / (1 / sigma_r**2 + step**2 / noise)  # precisions add
        if sampler == "ddpm":
            factor = posterior * (alpha_r * k / sigma_r**2 + step / noise)
            gain, fresh = gain * factor, fresh * factor**2 + posterior
        elif sampler == "ddim":
            factor = alpha_r * k + math.sqrt(sigma_r**2 - eta**2 * posterior) * n
            gain, fresh = gain * factor, fresh * factor**2 + eta**2 * posterior
        else:  # Lu, Algorithm 2, with h = log(alpha_r / sigma_r) - log(alpha / sigma)
            decay = alpha * sigma_r / (sigma * alpha_r)  # exp(-h)
            h = -math.log(decay) if decay else math.inf
            estimate = k * gain
            D = estimate
            if last is not None:
                ratio = last[1] / h
                D = (1 + 1 / (2 * ratio)) * estimate - 1 / (2 * ratio) * last[0]
            last = (estimate, h)
            gain = sigma_r / sigma * gain - alpha_r * (decay - 1) * D
    return gain, math.sqrt(gain**2 + fresh)


def impulse_response(kernel, sampler, steps, eta=0.0, dtype=torch.float32):
    """The same two numbers from `sample`: entry 0 starts from 1, entry i gets 1 as the i-th fresh noise."""
    num_draws = steps if sampler == "ddpm" or eta else 0
    noise = torch.zeros(1 + num_draws, 1, 1, 1, dtype=dtype)
    noise[0] = 1
    calls = itertools.count(1)

    def draw(shape):
        impulse = torch.zeros(shape)
        impulse[next(calls)] = 1
        return impulse

    x = kernel.sample(oracle(kernel), noise, steps, sampler, eta=eta, draw=draw).double().flatten()
    return x[0].item(), x.square().sum().sqrt().item()


def samplers_of(process):
    return [name for name, row in SAMPLERS.items() if row.process == process]


STEPS = (5, 10, 20, 50, 1000)
VP_SETTINGS = {
    "eps": {"prediction": "eps"},
    "x_start": {"prediction": "x_start", "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "v": {"prediction": "v"},
    "v, zero SNR": {"prediction": "v", "zero_terminal_snr": True},
    "v, cosine": {"prediction": "v", "schedule": "cosine"},
    "x_start, sqrt": {"prediction": "x_start", "schedule": "sqrt"},
}


@pytest.mark.parametrize("setting", VP_SETTINGS)
@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in samplers_of("vp")), ("ddim", 0.5)])
def test_every_vp_sampler_equals_its_linear_recursion(setting, sampler, eta):
    kernel = make_kernel(**VP_SETTINGS[setting])
    for steps in STEPS:
        expected = recursion(kernel, sampler, steps, eta)
        assert impulse_response(kernel, sampler, steps, eta) == pytest.approx(expected, abs=1e-4 * DATA_STD)
        if steps <= 20:
            got = impulse_response(kernel, sampler, steps, eta, dtype=torch.float64)
            assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "shift"), [("velocity", 1), ("velocity", 4), ("x_start", 4), ("v", 4)]
)
@pytest.mark.parametrize("sampler", samplers_of("flow"))
def test_every_flow_sampler_equals_its_linear_recursion(sampler, prediction, shift):
    kernel = make_kernel(prediction, "flow", flow_shift=shift)
    for steps in STEPS:
        expected = recursion(kernel, sampler, steps, shift=shift)
        assert impulse_response(kernel, sampler, steps) == pytest.approx(expected, abs=1e-4 * DATA_STD)
        if steps <= 20:
            got = impulse_response(kernel, sampler, steps, dtype=torch.float64)
            assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("process", "prediction"), PAIRS)
def test_fifty_steps_of_the_second_order_samplers_keep_the_contrast_of_the_data(process, prediction):
    kernel = make_kernel(prediction, process, **({"flow_shift": 1.0} if process == "flow" else {}))
    for sampler in ("heun", "ab2") if process == "flow" else ("dpmpp",):
        assert impulse_response(kernel, sampler, 50)[1] / DATA_STD == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_first_order_samplers_are_respaced_truly(sampler):
    """A posterior that ignores the stride has 2.95 times the contrast of the data at 50 steps, ours 0.8."""
    kernel = make_kernel("eps")
    ratios = [impulse_response(kernel, sampler, steps)[1] / DATA_STD for steps in (50, 250, 300, 600, 1000)]
    assert ratios == sorted(ratios)
    assert ratios[0] == pytest.approx(0.8, abs=0.05)
    assert ratios[-1] == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_flow_samplers_converge_with_their_order(sampler, order):
    kernel = make_kernel("velocity", flow_shift=1.0)
    errors = [
        abs(impulse_response(kernel, sampler, steps, dtype=torch.float64)[0] - DATA_STD)
        for steps in (40, 80, 160, 320)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


MIXTURES = [  # means, shares and widths of Gaussians in one dimension
    ([-1.0, 1.0], [0.3, 0.7], [0.1, 0.2]),
    ([-2.0, 0.0, 1.5], [0.2, 0.5, 0.3], [0.05, 0.3, 0.1]),
    ([0.0], [1.0], [DATA_STD]),
]


def distance_to_mixture(kernel, sampler, steps, mixture, num=500):
    """Wasserstein-1 distance between a mixture and its samples by the optimal network, from the quantiles of
    the noise: all error is the sampler's."""
    mean, share, width = (np.array(v)[:, None] for v in mixture)
    levels = (np.arange(num) + 0.5) / num
    grid = np.linspace(-6, 6, 100_001)
    truth = np.interp(levels, (share * norm.cdf(grid, mean, width)).sum(0), grid)

    def model(x_t, time):
        t = float(time[0]) / (kernel.num_timesteps if kernel.process == "flow" else 1)
        alpha, sigma = alpha_sigma(kernel, t)
        x, std = x_t.flatten().numpy(), np.hypot(alpha * width, sigma)
        weight = share * norm.pdf(x, alpha * mean, std) + 1e-300
        each = mean + alpha * width**2 / std**2 * (x - alpha * mean)
        x_start = (weight * each).sum(0) / weight.sum(0)
        return torch.from_numpy(alpha * (x - alpha * x_start) / sigma - sigma * x_start).view_as(x_t)

    noise = torch.from_numpy(norm.ppf(levels)).view(-1, 1, 1)
    made = kernel.sample(model, noise, steps, sampler).flatten().sort().values.numpy()
    return np.abs(made - truth).mean()


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dpmpp_is_at_least_as_good_as_ddim_on_every_schedule(schedule, zero_terminal_snr, mixture):
    ends = {"beta_start": 1e-6, "beta_end": 4e-4} if schedule == "sqrt" else {}
    kernel = make_kernel(schedule=schedule, zero_terminal_snr=zero_terminal_snr, **ends)
    for steps, at_most in ((2, 1.01), (3, 1.01), (5, 1), (10, 0.7), (17, 0.5), (20, 0.5), (50, 0.5)):
        ours, ddim = (distance_to_mixture(kernel, name, steps, mixture) for name in ("dpmpp", "ddim"))
        assert ours <= at_most * ddim, steps


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_default_sampler_of_flow_is_the_best_for_its_network_calls(shift, mixture):
    kernel = make_kernel("v", "flow", flow_shift=shift)
    assert kernel.default_sampler == "ab2"
    for calls in (9, 19, 29, 39):
        ours = distance_to_mixture(kernel, "ab2", calls, mixture)
        for sampler, steps in (("euler", calls), ("heun", (calls + 1) // 2)):
            assert kernel.num_network_calls(sampler, steps) == calls
            assert ours < distance_to_mixture(kernel, sampler, steps, mixture)
    heun = distance_to_mixture(kernel, "heun", 10, mixture)  # 19 calls
    assert 2.9 < heun / distance_to_mixture(kernel, "ab2", 19, mixture) < 6.6
    # the default number of steps, at half the calls of as many steps of heun
    ours = distance_to_mixture(kernel, "ab2", sampling.SampleConfig().steps, mixture)
    assert ours < distance_to_mixture(kernel, "heun", 30, mixture)


def test_the_last_step_of_heun_leaves_no_noise_behind():
    """At t = 0 a network cannot see the noise that is left in x_t and says that there is none. The mean of
    this slope and of the slope before would keep half the noise of the last interval, 0.025 here."""
    width, kernel = 0.01, make_kernel("velocity", flow_shift=1.0)

    def model(x_t, time):  # the optimal network for N(0, width^2)
        t = time[0] / 1000
        return (t - (1 - t) * width**2) / ((1 - t) ** 2 * width**2 + t**2) * x_t

    noise = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).view(-1, 1, 1)
    left = kernel.sample(model, noise, 20, "heun").square().mean().sqrt().item()
    # What is asked of the last step, from t = 0.05, is the mean of x_start given x_t
    assert left == pytest.approx(0.0019, abs=1e-4)


# Sampling: the rest


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_eta_1_is_ddpm(prediction, steps):
    kernel = make_kernel(prediction)
    noise = gaussians(3, 1)[0]

    def model(x_t, t):  # not linear, and different for every time
        return torch.tanh(x_t) + t.view(-1, 1, 1, 1, 1) / 1000

    def run(sampler, eta):
        generator = torch.Generator().manual_seed(5)
        draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
        return kernel.sample(model, noise, steps, sampler, eta=eta, draw=draw)

    torch.testing.assert_close(run("ddim", 1.0), run("ddpm", 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 30, 300, 400, 1000])
def test_trailing_grids_start_at_the_last_timestep_and_fall_evenly(steps):
    times = make_kernel().sampling_times("ddim", steps, (8, 8))
    assert len(times) == steps
    assert times[0] == 999
    np.testing.assert_allclose(np.array(times) + 1, 1000 - 1000 / steps * np.arange(steps), atol=0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_the_grid_of_dpmpp_is_trailing_for_few_steps_and_nearly_even_in_log_snr_for_many(
    steps, zero_terminal_snr, schedule
):
    kernel = make_kernel(schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    times = kernel.sampling_times("dpmpp", steps, (8, 8))
    assert times == sorted(set(times), reverse=True)
    assert times[0] == 999
    assert len(times) <= steps
    assert kernel.num_network_calls("dpmpp", steps) == len(times)
    assert times == visited_times(kernel, "dpmpp", steps, 1.0)
    if steps <= 3:
        assert times == kernel.sampling_times("ddim", steps, (8, 8))
    if steps == 20:
        assert len(times) == 20
        # half way between the noisiest timestep that counts and the cleanest, in log(alpha / sigma)
        middle, ends = alpha_sigma(kernel, times[10]), (alpha_sigma(kernel, times[1]), alpha_sigma(kernel, 0))
        logs = [math.log(alpha / sigma) for alpha, sigma in (ends[0], middle, ends[1])]
        assert 0.3 < (logs[1] - logs[0]) / (logs[2] - logs[0]) < 0.7


@pytest.mark.parametrize("size", [(16, 16, 16), (128, 128, 128)])
def test_flow_times_cover_exactly_one_unit_and_are_shifted_by_the_size_of_the_noise(size):
    kernel = make_kernel("velocity")
    times = kernel.sampling_times("euler", 30, size)
    assert times[0] == 1
    assert math.fsum(a - b for a, b in itertools.pairwise([*times, 0.0])) == 1
    assert times == pytest.approx(visited_times(kernel, "euler", 30, kernel.flow_shift(size)))


@pytest.mark.parametrize(
    ("prediction", "t", "t_next"), [("velocity", 0.8, 0.3), ("v", 700, 120), ("v", 9, -1)]
)
def test_noise_given_back_makes_the_noise_level_of_the_earlier_time(prediction, t, t_next):
    kernel, (x_start,) = make_kernel(prediction), gaussians(2, 1)
    (alpha, sigma), (alpha_next, sigma_next) = (
        alpha_sigma(kernel, time) if time != -1 else (1, 0) for time in (t, t_next)
    )
    mean = kernel.noise_again(alpha_next * x_start, t_next, t, torch.zeros_like(x_start))
    torch.testing.assert_close(mean, alpha * x_start, rtol=1e-10, atol=1e-10)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    parts = kernel.noise_again(sigma_next * one, t_next, t, zero), kernel.noise_again(zero, t_next, t, one)
    assert float(parts[0] ** 2 + parts[1] ** 2) == pytest.approx(sigma**2, rel=1e-10)


@pytest.mark.parametrize(
    ("process", "sampler", "calls"),
    # 4 steps: the one from pure noise is made once, the other three times; heun's last step has one call
    [("flow", "euler", 10), ("flow", "heun", 2 + 6 + 6 + 3), ("flow", "ab2", 10), ("vp", "ddim", 12)],
)
def test_every_step_but_the_one_from_pure_noise_is_made_resample_times(process, sampler, calls):
    kernel, seen, drawn = make_kernel("v", process), [], []

    def record(x_t, t):
        seen.append(float(t[0]))
        return torch.zeros_like(x_t)

    def draw(shape):
        drawn.append(shape)
        return torch.zeros(shape)

    kernel.sample(record, torch.zeros(2, 1, 4, 4), 4, sampler, draw=draw, resample=3)
    assert len(seen) == kernel.num_network_calls(sampler, 4, resample=3) == calls
    assert seen == sorted(seen, reverse=True) or sampler == "heun"
    assert len(drawn) == (8 if process == "vp" else 6)
    with pytest.raises(InputError, match="draw: got None"):
        kernel.sample(record, torch.zeros(2, 1, 4, 4), 4, sampler, resample=3)


def test_times_of_the_caller_replace_the_grid():
    kernel = make_kernel()
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    by_count = kernel.sample(oracle(kernel), noise, 10, "ddim")
    assert torch.equal(kernel.sample(oracle(kernel), noise, range(999, 0, -100), "ddim"), by_count)
    assert kernel.num_network_calls("ddim", range(980, -1, -20)) == 50
    flow = make_kernel("velocity")
    by_count = flow.sample(oracle(flow), noise, 4, "heun")
    assert torch.equal(flow.sample(oracle(flow), noise, (1.0, 0.75, 0.5, 0.25), "heun"), by_count)


def test_clipping_bounds_the_estimates_and_is_off_by_default():
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = lambda x_t, t: 5 * x_t  # noqa: E731
    for sampler in ("ddim", "dpmpp"):
        assert make_kernel("x_start").sample(model, noise, 5, sampler).abs().max() > 5
        assert make_kernel("x_start", clip_x_start=1.5).sample(model, noise, 5, sampler).abs().max() <= 1.5


def test_randomness_comes_from_the_caller_alone(capfd):
    kernel = make_kernel()
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before, shapes = torch.get_rng_state(), []

    def draw(shape):
        shapes.append(tuple(shape))
        return torch.zeros(shape)

    x = kernel.sample(oracle(kernel), noise, 10, "ddpm", draw=draw, progress=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert shapes == [(2, 1, 4, 4)] * 9  # none on the step to clean
    assert not x.requires_grad
    assert capfd.readouterr() == ("", "")  # the bar is for terminals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"process": "flow", "prediction": "eps"},
            "velocity, x_start or v with .*eps goes .*--kernel.process vp",
        ),
        ({"process": "vp", "prediction": "velocity"}, "expected eps, x_start or v with process vp"),
        (
            {**VP, "prediction": "eps", "zero_terminal_snr": True},
            "zero_terminal_snr: got True, .*prediction v or x_start",
        ),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: got True, expected false with process flow"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma: got 5.0, expected none with process flow"),
        ({**VP, "min_snr_gamma": 0.0}, "min_snr_gamma: got 0.0"),
        ({**VP, "t_distribution": "logit_normal"}, "t_distribution: got logit_normal"),
        ({**VP, "flow_shift": 2.0}, "flow_shift"),
        ({"flow_shift": 0.5}, "flow_shift: got 0.5"),
        ({"flow_base": 0.0}, "flow_base: got 0.0"),
        ({"clip_x_start": 1.0}, "clip_x_start"),
        ({**VP, "clip_x_start": -1.0}, "clip_x_start: got -1.0"),
        ({"logit_std": 0.0}, "logit_std: got 0.0"),
        ({"num_timesteps": 1}, "num_timesteps: got 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start: got 0.5, .*beta_end is 0.1"),
    ],
)
def test_impossible_configurations_are_refused_by_the_name_of_the_key(settings, message):
    with pytest.raises(InputError, match=message):
        KernelConfig(**settings)


UNTRAINABLE = [
    ({**VP, "prediction": "eps", "schedule": "cosine"}, r"prediction: got eps, .*alpha_t = 4.9e-05"),
    ({**VP, "min_snr_gamma": 5.0, "zero_terminal_snr": True}, "min_snr_gamma: got 5, expected none"),
]


@pytest.mark.parametrize(("settings", "message"), UNTRAINABLE)
def test_no_run_is_started_whose_network_could_not_begin_sampling(settings, message):
    config = KernelConfig(**settings)  # a run of before is read, and goes on
    with pytest.raises(InputError, match=message):
        config.check_start()


@pytest.mark.parametrize(("settings", "message"), UNTRAINABLE)
def test_the_training_script_refuses_new_runs_alone(settings, message, vae_run, tmp_path, monkeypatch):
    flags = [word for key, value in settings.items() for word in (f"--kernel.{key}", str(value).lower())]
    with pytest.raises(InputError, match=message):
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 2, *flags))
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as before:
        before.setattr(KernelConfig, "check_start", lambda self: None)
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 2, *flags))
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 4, *flags))
    assert tiny.lines(tmp_path / "run")[-1]["step"] == 4


def test_what_a_new_run_may_have_can_begin_sampling():
    """An error of 1 % in the network's output stays small with every setting that is not refused."""
    noise = torch.randn(2000, 1, 1, generator=torch.Generator().manual_seed(0))
    spread = {}
    for schedule, clip in (("linear", None), ("scaled_linear", None), ("cosine", None), ("cosine", 2.0)):
        ends = {"beta_start": 1e-4, "beta_end": 0.02} if schedule == "linear" else {}
        kernel = make_kernel("eps", schedule=schedule, clip_x_start=clip, **ends)
        optimal = oracle(kernel)
        wrong = kernel.sample(lambda x, t: optimal(x, t) + 0.01, noise, 20, "ddim")  # noqa: B023
        spread[schedule, clip] = wrong.square().mean().sqrt() / DATA_STD
    assert spread.pop(("cosine", None)) > 5
    assert max(spread.values()) < 2
    for prediction in ("v", "x_start"):
        weights = make_kernel(prediction, min_snr_gamma=5.0).loss_weight(torch.arange(1000))
        assert weights.min() > 0
        make_kernel(prediction, schedule="cosine", zero_terminal_snr=True).config.check_start()


@pytest.mark.parametrize(
    ("prediction", "steps", "sampler", "eta", "message"),
    [
        ("velocity", 5, "ddim", 0.0, "sampler: got ddim, expected one of euler, heun, ab2 for process flow"),
        ("v", 5, "heun", 0.0, "sampler: got heun, expected one of ddpm, ddim, dpmpp"),
        ("v", 5, "plms", 0.0, "sampler: got plms"),
        ("v", 0, "ddim", 0.0, "steps: got 0, expected 1 to 1000"),
        ("v", 1001, "ddim", 0.0, "steps: got 1001, expected 1 to 1000"),
        ("velocity", 0, "euler", 0.0, "steps: got 0, expected 1 or more"),
        ("v", [5, 5], "ddim", 0.0, "falling times in"),
        ("v", [1000, 5], "ddim", 0.0, "falling times in"),
        ("v", [], "ddim", 0.0, "falling times in"),
        ("velocity", [1.0, 0.0], "euler", 0.0, "falling times in"),
        ("v", 5, "ddim", 1.5, "eta: got 1.5"),
        ("v", 5, "dpmpp", 0.5, "eta: got 0.5 with sampler dpmpp"),
        ("v", 5, "ddpm", 0.0, "draw: got None"),
        ("v", 5, "ddim", 0.5, "draw: got None"),
    ],
)
def test_impossible_sampling_is_refused_with_the_alternatives(prediction, steps, sampler, eta, message):
    with pytest.raises(InputError, match=message):
        make_kernel(prediction).sample(lambda x, t: x, torch.zeros(1, 1, 4, 4), steps, sampler, eta=eta)


def test_flow_has_no_posterior():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="q_posterior"):
        make_kernel("velocity").q_posterior(x, x, torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize(("prediction", "sampler"), [("v", "ddpm"), ("v", "dpmpp"), ("velocity", "heun")])
def test_a_gpu_gives_the_same_losses_and_samples_wherever_the_times_are(prediction, sampler):
    kernel = make_kernel(prediction)
    x_start, noise, output = (x.float() for x in gaussians(3, 3))
    t = kernel.t_from_uniform(torch.tensor([0.1, 0.4, 0.7, 0.9]), (5, 4, 3))
    expected = kernel.losses(lambda *_: output, x_start, t, noise)
    for times in (t, t.cuda()):
        got = kernel.losses(lambda *_: output.cuda(), x_start.cuda(), times, noise.cuda())
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)

    def run(start):
        generator = torch.Generator().manual_seed(0)
        return kernel.sample(
            lambda x, t: x.tanh(), start, 9, sampler, draw=lambda s: torch.randn(s, generator=generator)
        )

    torch.testing.assert_close(run(noise.cuda()).cpu(), run(noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("prediction", ["eps", "v", "x_start"])
def test_fifty_ddim_steps_at_the_times_of_monai_give_monais_sample(prediction):
    """MONAI steps from t to t - 20, whatever time comes next: equal where its times are 980, 960, ... 0."""
    schedulers = pytest.importorskip("monai.networks.schedulers", reason="MONAI is not installed")
    kind = {"eps": "epsilon", "v": "v_prediction", "x_start": "sample"}[prediction]
    scheduler = schedulers.DDIMScheduler(
        1000,
        schedule="scaled_linear_beta",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type=kind,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    scheduler.timesteps = torch.arange(980, -1, -20)
    kernel = make_kernel(prediction)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = lambda x_t, t: torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    x = noise
    for t in scheduler.timesteps:
        x, _ = scheduler.step(model(x, t.float().expand(2)), t, x)
    ours = kernel.sample(model, noise, scheduler.timesteps.tolist(), "ddim")
    torch.testing.assert_close(ours, x, rtol=2e-5, atol=2e-5)


# --- the probability flow, backwards ------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "prediction", "sampler"), [
    ("flow", "velocity", "euler"), ("flow", "x_start", "euler"), ("vp", "v", "ddim"), ("vp", "eps", "ddim"),
])  # fmt: skip
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inversion_finds_the_noise_from_which_the_sampler_makes_the_image(
    process, prediction, sampler, strength
):
    kernel = DiffusionKernel(KernelConfig(process=process, prediction=prediction))
    model = oracle(kernel)
    x = DATA_STD * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = kernel.sampling_times(sampler, 20, (4, 5), strength)
    errors = []
    for rounds in (1, 3, 60):
        x_t = kernel.invert(model, x, times, rounds)
        errors.append(float((kernel.sample(model, x_t, times, sampler) - x).abs().max()))
    assert errors[2] < 1e-8
    assert errors[1] < errors[0] / 3
    # The flow of a Gaussian is a scaling, from the deviation at clean to that at the first time
    alpha, sigma = kernel.signal_and_noise(times[0])
    scale = math.sqrt(alpha**2 * DATA_STD**2 + sigma**2) / DATA_STD
    fine = kernel.sampling_times(sampler, 400, (4, 5), strength)
    assert torch.allclose(kernel.invert(model, x, fine, 5), scale * x, rtol=0.05, atol=0)


def test_runs_of_before_go_on_with_times_that_are_drawn_one_by_one():
    stored = {name: value for name, value in to_dict(KernelConfig()).items() if name != "stratified_t"}
    assert not from_dict(KernelConfig, upgraded(KernelConfig, stored)).stratified_t
    assert from_dict(KernelConfig, upgraded(KernelConfig, {"prediction": "v"})).stratified_t
