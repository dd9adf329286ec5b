"""bf16 and fp16 train as fp32 does: the loss to 2 %, fp32 where it matters, an overflow costs one step."""

import math

import pytest
import torch
from tiny import ldm_flags, lines, vae_flags
from torch import nn

import train_ldm
import train_vae
from ldm3d import AutoencoderKL, DiffusionKernel, KernelConfig, VAEConfig
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.training import EMA, OptimConfig, RunConfig, Stepper, amp_dtype, autocast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(heads, vae_run, tmp_path_factory):
    """{(script, amp): run folder} of fifteen steps each."""
    place = tmp_path_factory.mktemp("amp")
    for amp in ("fp32", "bf16", "fp16"):
        train_vae.main(vae_flags(heads, place / f"vae-{amp}", 15, "--run.amp", amp))
        train_ldm.main(ldm_flags(vae_run, place / f"ldm-{amp}", 15, "--run.amp", amp))
    return place


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("script", ["vae", "ldm"])
def test_the_loss_in_half_precision_is_that_of_fp32_to_two_percent(runs, script, amp):
    wanted, found = lines(runs / f"{script}-fp32"), lines(runs / f"{script}-{amp}")
    for a, b in zip(wanted, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2), a["step"]
    assert found[-1]["skipped_steps"] == 0
    assert found[-1]["loss"] < found[0]["loss"]


def test_only_fp16_has_a_loss_scale_and_the_weights_are_fp32_always(runs):
    for amp in ("fp32", "bf16", "fp16"):
        content = load(step_files(runs / f"vae-{amp}")[0])
        assert ("scale" in content["optimizers"]["autoencoder"]["scaler"]) == (amp == "fp16")
        assert {v.dtype for v in [*content["model"].values(), *content["ema"].values()]} == {torch.float32}


def test_auto_is_fp32_on_a_cpu_and_the_flag_chooses_the_type():
    found = [amp_dtype(amp, CPU) for amp in ("auto", "fp32", "bf16", "fp16")]
    assert found == [None, None, torch.bfloat16, torch.float16]


# --- fp32 islands -------------------------------------------------------------------------------------------


def test_posterior_and_losses_are_fp32_while_the_networks_compute_in_bf16():
    net = AutoencoderKL(VAEConfig(dims=2, channels=(8, 16), num_groups=4, latent_channels=2))
    x = torch.randn(2, 1, 16, 16)
    with autocast("bf16", CPU):
        recon, posterior = net(x, torch.randn(2, *net.latent_shape((16, 16))))
    assert recon.dtype == torch.bfloat16
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    terms = train_vae.loss_terms(recon, posterior, x, train_vae.Config(), 0)
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize(("process", "prediction"), [("vp", "eps"), ("vp", "v"), ("flow", "velocity")])
def test_the_arithmetic_of_the_kernel_is_fp32_under_autocast(process, prediction):
    kernel = DiffusionKernel(KernelConfig(process=process, prediction=prediction))
    z, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = kernel.t_from_uniform(torch.linspace(0.1, 0.9, 4), (8, 8))
    seen = []

    def model(x_t, time):
        seen.append((x_t.dtype, time.dtype))
        return x_t.to(torch.bfloat16) * 0.5

    with autocast("bf16", CPU):
        loss = kernel.losses(model, z, t, noise)
    exact = kernel.losses(lambda x_t, _: x_t.to(torch.bfloat16) * 0.5, z.double(), t, noise.double())
    assert seen == [(torch.float32, torch.float32)]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), exact, rtol=2e-3)  # the prediction alone is rounded


# --- the loss scale -----------------------------------------------------------------------------------------


def test_an_overflow_skips_the_step_halves_the_scale_leaves_the_ema_and_training_recovers(capsys):
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    ema, before = EMA(net, 0.5), net.weight.detach().clone()
    stepper = Stepper(net, OptimConfig(lr=0.1), RunConfig(amp="fp16", steps=100), 4, CPU)
    scales, taken = [], []
    for step in range(8):
        huge = 1e34 if step < 3 else 1.0  # finite as a loss, infinite once it is scaled
        with autocast("fp16", CPU):
            loss = net(torch.ones(2, 4)).float().square().mean() * huge
        stepper.backward(loss)
        taken.append(stepper.step(step))
        scales.append(stepper.scaler.get_scale())
        if taken[-1]:
            ema.update(net, step)
        elif step < 3:
            assert torch.equal(net.weight, before)
            assert torch.equal(ema.net.weight, before)
    assert taken == [False] * 3 + [True] * 5
    assert scales == [2.0 ** (15 - min(step, 2)) for step in range(8)]
    assert math.isfinite(loss.item())
    assert "the loss scale is now 32768" in capsys.readouterr().out
