"""A plan predicts the bytes of tensors that a real step needs to 20 %, and what it says fits, fits."""

import contextlib
import ctypes
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import cdal_flags, ldm_flags, vae_flags
from torch import nn

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import AutoencoderKL, InputError, UNet, UNetConfig, VAEConfig, metrics, normconv, plan
from ldm3d.config import parse, replace
from ldm3d.discriminators import PatchDiscriminator
from ldm3d.engine.memory_plan import (
    CONTEXT,
    GIB,
    USABLE,
    Job,
    MemoryTable,
    decode,
    encode,
    peak_bytes,
    weight_bytes,
)
from ldm3d.engine.training import OptimConfig, RunConfig, autocast
from ldm3d.large import streaming
from ldm3d.large.streaming import STREAMED

CPU = torch.device("cpu")
AE = VAEConfig(channels=(16, 32), num_res_blocks=(1,), num_groups=8)
NET = UNetConfig(channels=(32, 64), num_res_blocks=(1,), attention_levels=(False, True))


def measured(work, folder) -> int:
    """Peak of the bytes that the allocator hands out during work(), by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    run.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def owned(work) -> int:
    """Peak of the bytes that this process owns during work(), above what it owned before: with the copies
    within kernels, which the profiler does not know."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def autoencoder_loss(net, batch, size):
    x = torch.zeros(batch, 1, *size)
    recon, posterior = net(x, torch.zeros(batch, *net.latent_shape(size)))
    return (recon.float() - x).abs().mean() + posterior.mean.square().mean()


def denoiser_loss(net, batch, size):
    x_t = torch.zeros(batch, 4, *size)
    return (net(x_t, torch.zeros(batch)).float() - x_t).square().mean()


@pytest.mark.parametrize(
    ("kind", "checkpointing", "amp"),
    [
        ("autoencoder", False, "fp32"),
        ("autoencoder", True, "bf16"),
        ("u-net", False, "bf16"),
        ("u-net", True, "fp32"),
    ],
)
def test_a_training_step_needs_what_the_plan_says(kind, checkpointing, amp, tmp_path):
    if kind == "autoencoder":
        config, loss, size = (
            dataclasses.replace(AE, checkpointing=checkpointing),
            autoencoder_loss,
            (40, 40, 40),
        )
        cls = AutoencoderKL
    else:
        config, loss, size = (
            dataclasses.replace(NET, checkpointing=checkpointing),
            denoiser_loss,
            (20, 20, 20),
        )
        cls = UNet
    plan = MemoryTable(16, amp, "cpu")
    predicted = plan.training("training", lambda: cls(config), loss, 2, size).need(2, size)
    net = cls(config)
    weights = 4 * sum(t.nbytes for t in [*net.parameters(), *net.buffers()])

    def step() -> None:
        with autocast(amp, CPU):
            value = loss(net, 2, size)
        value.backward()

    found = weights + measured(step, tmp_path)
    assert predicted == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize("call", [encode, decode])
def test_encoding_and_decoding_need_what_the_plan_says(call, tmp_path):
    size = (32, 32, 32)
    need = MemoryTable(16, "fp32", "cpu").inference("", lambda: AutoencoderKL(AE), call, 2, size).need
    net = AutoencoderKL(AE)

    def work() -> None:
        with torch.inference_mode():
            call(net, 2, size)

    weights = sum(t.nbytes for t in [*net.parameters(), *net.buffers()])
    assert need(2, size) == pytest.approx(weights + measured(work, tmp_path), rel=0.2)


@pytest.mark.parametrize("call", [encode, decode])
def test_what_does_not_fit_whole_needs_what_streaming_takes(call, tmp_path, monkeypatch, capsys):
    for module, name in ((streaming, "SLAB"), (normconv, "SLAB"), (normconv, "SLICE")):
        monkeypatch.setattr(module, name, 2**12)
    size, net = (96, 32, 32), AutoencoderKL(AE)
    weights = sum(t.nbytes for t in [*net.parameters(), *net.buffers()])

    def planned(room) -> tuple[MemoryTable, Job]:
        plan = MemoryTable(16, "fp32", "cpu")
        plan.room = room
        return plan, plan.inference("", lambda: AutoencoderKL(AE), call, 1, size, ways=STREAMED)

    needs = [planned(1e12)[1].need(1, size)]
    for _ in STREAMED:  # a room that is a little too small for what was taken
        needs.append(planned(needs[-1] - 1)[1].need(1, size))
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) >= 3
    plan, job = planned(needs[-1])
    assert plan.inference_fits
    assert (job.whole(1, size), job.least(1, size)) == (needs[0], needs[-1])
    assert not planned(needs[-1] - 1)[0].inference_fits

    def work(mode) -> None:
        for trunk in (net.encoder, net.decoder):
            monkeypatch.setattr(trunk, "forward", lambda x, t=trunk: streaming.Stream(mode, CPU).run(t, x))
        with torch.inference_mode():
            call(net, 1, size)

    assert needs[1] == pytest.approx(weights + measured(lambda: work("slabs"), tmp_path), rel=0.3)
    monkeypatch.setattr(MemoryTable, "_largest", lambda *_, **__: 7)
    plan.print()
    assert f"in slabs, {needs[0] / GIB:.2f} whole" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_process_owns_what_the_plan_of_a_validation_says(monkeypatch):
    """Maps above 32 MiB: the allocator gives these back at once."""
    for module, name in ((streaming, "SLAB"), (normconv, "SLAB"), (normconv, "SLICE"), (metrics, "SLAB")):
        monkeypatch.setattr(module, name, 2**16)
    flags = "phantom --data.size 128,160,128 --run.device cpu --memory 16".split()
    config, _ = parse(train_vae.Config, flags, train_vae.PRESETS, "", train_vae.with_data)
    job = train_vae.memory_table(config).jobs[-1]
    net = AutoencoderKL(config.vae)
    net.memory = 16

    @torch.inference_mode()
    def validate() -> None:
        train_vae.scores_of(net, torch.rand(1, 1, *job.size), config)

    weights, image = 4 * weight_bytes(net), 4 * math.prod(job.size)
    found = owned(validate) + weights + image  # and the next case, which a thread reads meanwhile
    assert job.need(1, job.size) == pytest.approx(found, rel=0.15)


def test_validation_in_windows_needs_what_the_plan_says(heads, tmp_path):
    """Windows of a case and its sums: the case is sixteen times as large as a window."""
    flags = cdal_flags(heads, tmp_path, 1, "--window", "64,80", "--data.size", "256,320", "--memory", "4")
    config, _ = parse(train_cdal.Config, flags, train_cdal.PRESETS, "", train_cdal.with_data)
    job = train_cdal.memory_table(config).jobs[-1]
    net = train_cdal.Generator(config.generator, config.unet, 1, 5)
    case = {"id": "a", "image": torch.rand(1, 256, 320), "mask": torch.zeros(256, 320, dtype=torch.long)}

    @torch.inference_mode()
    def segment() -> None:
        image, mask = case["image"].clone(), case["mask"].clone()
        train_cdal.CDAL(config.cdal, 5).segment(net, image, 1, config.window, batch_size=1)
        del mask

    found = 4 * weight_bytes(net) + measured(segment, tmp_path)
    assert job.size == (64, 80)
    assert job.need(config.votes, job.size) == pytest.approx(found, rel=0.15)


def test_checkpointing_and_smaller_batches_need_less_and_a_gpu_in_bf16_less_than_fp32():
    def need(batch=2, amp="fp32", device="cpu", **more):
        make = lambda: AutoencoderKL(dataclasses.replace(AE, **more))  # noqa: E731
        return (
            MemoryTable(16, amp, device)
            .training("", make, autoencoder_loss, batch, (64, 64, 64))
            .need(batch, (64, 64, 64))
        )

    assert need(checkpointing=True) < 0.95 * need()
    assert need(1) < 0.6 * need(2)
    assert need(amp="auto", device="cuda") < 0.8 * need()


def test_gradients_of_earlier_micro_batches_are_counted():
    job = [
        MemoryTable(16).training("", lambda: UNet(NET), denoiser_loss, 1, (4, 4, 4), rounds=n)
        for n in (1, 2, 5)
    ]
    once, twice, more = (j.need(1, (4, 4, 4)) for j in job)
    assert once < twice == more


def test_nothing_is_allocated_however_large_the_volume():
    huge = (2048, 2048, 2048)  # 32 GiB an image
    with torch.inference_mode():
        _, peak = peak_bytes(lambda: AutoencoderKL(AE), lambda net: encode(net, 1, huge))
    assert peak > 500 * GIB


@pytest.mark.parametrize(("budget", "size"), [(2, (48, 48, 48)), (0.702, (48, 48, 48))])
def test_the_largest_batch_and_cube_fit_and_the_next_ones_do_not(budget, size):
    plan = MemoryTable(budget)
    room = USABLE * (budget * GIB - CONTEXT)
    job = plan.training("", lambda: AutoencoderKL(AE), autoencoder_loss, 1, size, step=2)
    batch, side = plan.largest_batch(job), plan.largest_cube(job)
    assert batch == 0 or job.need(batch, job.size) <= room
    assert job.need(batch + 1, job.size) > room
    assert side == 0 or job.need(1, (side,) * 3) <= room
    assert job.need(1, (side + 2,) * 3) > room


def test_the_seconds_of_a_step_are_the_mean_over_the_sizes_of_the_steps(monkeypatch):
    """A clock that goes on by the voxels of each loss: a quarter of 100 and three quarters of 20."""
    now, table = [0.0], MemoryTable(4, "fp32", "cpu")
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def loss(net, batch, size):
        now[0] += batch * math.prod(size)
        return net.weight.sum()

    for mix, seconds in (((), 2 * 100), ([(0.25, (10, 10)), (0.75, (4, 5))], 2 * (25 + 15))):
        table.jobs.clear()
        table.training("training", lambda: nn.Linear(1, 1), loss, 1, (10, 10), rounds=2, mix=mix)
        assert table.seconds_per_step(OptimConfig(), RunConfig(), CPU) == pytest.approx(seconds)


def test_the_device_auto_is_the_one_that_a_run_would_take():
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert MemoryTable(16).gpu == MemoryTable(None).gpu == (here == "cuda")
    assert MemoryTable(16).amp == MemoryTable(16, device=here).amp
    assert MemoryTable(16, device="cuda").gpu  # also where there is none: a plan for another machine


# --- the flag -----------------------------------------------------------------------------------------------


def test_each_script_prints_its_plan_and_touches_nothing(heads, vae_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MemoryTable, "_largest", lambda *_, **__: 7)  # the search has its own test
    monkeypatch.setattr(plan, "SLOW_ATTENTION", 5)
    train_vae.main(vae_flags(heads, tmp_path / "new", 10, "--plan", "--memory", "1"))
    assert "note: " not in capsys.readouterr().out
    train_ldm.main(ldm_flags(vae_run, tmp_path / "new", 10, "--plan", "--memory", "1"))
    assert capsys.readouterr().out.count("note: 6 positions attend to each other") == 1
    assert not (tmp_path / "new").exists()
    train_ldm.main(ldm_flags(vae_run, tmp_path / "ldm", 2))
    capsys.readouterr()
    sample.main([str(tmp_path / "ldm"), "--plan", "--memory", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "plan for a CPU of 1 GiB" in out
    assert re.search(r"denoising, latents 8 x 4x5 +0\.0\d +\d+ +\d+\^2", out)
    assert re.search(r"decoding 1 x 16x20", out)
    assert not list((tmp_path / "ldm").glob("samples*"))


def test_plans_hold_the_discriminator_and_know_codebooks(heads, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MemoryTable, "_largest", lambda *_, **__: 7)
    discriminator = (
        "--disc_weight 0.1 --feature_weight 1 --r1_weight 1 --disc.channels 4 --disc.num_layers 1".split()
    )
    codes = "--autoencoder vq --quantizer.codebook_size 16".split()
    train_vae.main(vae_flags(heads, tmp_path / "vae", 2, *codes, *discriminator, "--plan", "--memory", "1"))
    assert "its discriminator 4 x 16x20" in capsys.readouterr().out
    train_vae.main(vae_flags(heads, tmp_path / "vae", 2, *codes))
    train_ldm.main(ldm_flags(tmp_path / "vae", tmp_path / "ldm", 2, "--plan", "--memory", "1"))
    train_ldm.main(ldm_flags(tmp_path / "vae", tmp_path / "ldm", 2))
    sample.main([str(tmp_path / "ldm"), "--plan", "--memory", "1"])
    assert capsys.readouterr().out.count("decoding 1 x 16x20") == 2


def test_the_discriminator_takes_no_gradients_in_the_step_of_the_autoencoder(monkeypatch):
    flags = {"disc_weight": 0.1, "disc.channels": 64, "data.size": (32, 32, 32), "memory": 16}
    needs = []
    for _ in ("frozen", "not"):
        training = train_vae.memory_table(replace(train_vae.Config(), flags)).jobs[0]
        needs.append(training.need(1, (24, 24, 24)))
        monkeypatch.setattr(train_vae, "frozen", lambda _: contextlib.nullcontext())
    weights = weight_bytes(PatchDiscriminator(replace(train_vae.Config(), flags).disc))
    assert needs[1] - needs[0] > 0.5 * weights


def test_a_budget_that_cannot_hold_anything_is_refused_and_one_that_is_too_small_says_so(
    heads, tmp_path, capsys
):
    with pytest.raises(InputError, match=r"memory: expected more than 0\.7 GiB, got 0\.5"):
        train_vae.main(vae_flags(heads, tmp_path / "new", 10, "--plan", "--memory", "0.5"))
    plan = MemoryTable(0.71)
    plan.training("training", lambda: AutoencoderKL(AE), autoencoder_loss, 8, (64, 64, 64))
    plan.print()
    assert "does not fit" in capsys.readouterr().out


def promises(presets) -> list:
    return [(name, int(m[1])) for name in presets if (m := re.search(r"-(\d+)g$", name))]


@pytest.mark.parametrize(("name", "budget"), promises(train_vae.PRESETS))
def test_an_autoencoder_preset_fits_the_gpu_that_it_is_named_after(name, budget, monkeypatch):
    check(train_vae, replace(train_vae.Config(), {**train_vae.PRESETS[name], "memory": budget}), monkeypatch)


@pytest.mark.parametrize(("name", "budget"), promises(train_ldm.PRESETS))
def test_a_diffusion_preset_fits_the_gpu_that_it_is_named_after(name, budget, monkeypatch):
    stage_one = replace(train_vae.Config(), train_vae.PRESETS[name])
    with torch.device("meta"):
        autoencoder = AutoencoderKL(stage_one.vae)
    content = {"state": {"data": {"size": stage_one.data.size}}}
    monkeypatch.setattr(train_ldm, "autoencoder_of", lambda _: (content, "made above"))
    monkeypatch.setattr(train_ldm, "build_autoencoder", lambda *_: autoencoder)
    monkeypatch.setattr(train_ldm.DataSpec, "from_dict", lambda d: stage_one.data)
    latent = {
        "unet.in_channels": stage_one.vae.latent_channels,
        "unet.out_channels": stage_one.vae.latent_channels,
    }
    check(
        train_ldm,
        replace(
            train_ldm.Config(), {**latent, **train_ldm.PRESETS[name], "memory": budget, "vae": "made above"}
        ),
        monkeypatch,
    )


def check(script, config, monkeypatch) -> None:
    """Every job of the script's plan fits; the search for the largest ones is left out."""
    seen = []

    def tell(plan: MemoryTable) -> None:
        seen.extend((job.name, job.need(job.batch, job.size), plan.room) for job in plan.jobs)

    monkeypatch.setattr(MemoryTable, "print", tell)
    script.memory_table(config).print()
    assert len(seen) >= 2
    for name, need, room in seen:
        assert need <= room, (name, need / GIB)
