"""On a GPU: half precision, compile, NCCL, bit-exact resume, memory as planned, decoding large volumes."""

import dataclasses

import pytest
import torch
from closeness import close
from tiny import ROOT, cdal_flags, ldm_flags, lines, torchrun, vae_flags

import ldm3d
import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import AutoencoderKL, UNet, UNetConfig, VAEConfig
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.memory_plan import MemoryTable, decode
from ldm3d.engine.training import EMA, autocast
from ldm3d.large.streaming import Stream, peaks

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ON_GPU = ("--run.device", "cuda")
AE = VAEConfig(channels=(32, 64, 128), num_res_blocks=(1,))
NET = UNetConfig(channels=(64, 128), num_res_blocks=(1,), attention_levels=(False, True))


def train(script: str, place, run: str, steps: int, *more: str):
    """A run of a script on the heads, or on the autoencoder `vae_run` (train_ldm)."""
    heads, vae_run, folder = place
    main, flags, data = {
        "train_vae": (train_vae.main, vae_flags, heads),
        "train_ldm": (train_ldm.main, ldm_flags, vae_run),
        "train_cdal": (train_cdal.main, cdal_flags, heads),
    }[script]
    main(flags(data, folder / run, steps, *ON_GPU, *more))
    return folder / run


@pytest.fixture
def place(heads, vae_run, tmp_path):
    return heads, vae_run, tmp_path


def assert_near(one, other, rel: float) -> None:
    for a, b in zip(lines(one), lines(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=rel), a["step"]


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("script", ["train_vae", "train_ldm", "train_cdal"])
def test_each_script_trains_in_half_precision_as_in_fp32(script, amp, place):
    exact = train(script, place, "fp32", 15, "--run.amp", "fp32")
    half = train(script, place, amp, 15, "--run.amp", amp)
    assert_near(exact, half, rel=2e-2)
    assert lines(half)[-1]["skipped_steps"] == 0
    assert lines(half)[-1]["peak_gib"] > 0


def test_registers_learn_in_half_precision_as_in_fp32(place):
    bound = "--anatomy.registers", "bound", "--anatomy.dim", "16", "--unet.attention_levels", "true"
    exact, half = (train("train_ldm", place, amp, 15, *bound, "--run.amp", amp) for amp in ("fp32", "bf16"))
    assert_near(exact, half, rel=2e-2)
    assert lines(half)[-1]["binding"] == pytest.approx(lines(exact)[-1]["binding"], rel=2e-2)


@pytest.mark.parametrize("script", ["train_vae", "train_ldm", "train_cdal"])
def test_a_gpu_and_a_cpu_train_alike(script, place):
    on_gpu = train(script, place, "gpu", 5, "--run.amp", "fp32")
    on_cpu = train(script, place, "cpu", 5, "--run.device", "cpu")
    assert_near(on_cpu, on_gpu, rel=1e-2)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize("script", ["train_vae", "train_ldm", "train_cdal"])
def test_compiled_training_is_eager_training(script, amp, place):
    torch._dynamo.reset()
    eager = train(script, place, "eager", 6, "--run.amp", amp)
    compiled = train(script, place, "compiled", 6, "--run.amp", amp, "--run.compile")
    assert_near(eager, compiled, rel=2e-2 if amp == "bf16" else 5e-3)
    keys = [load(step_files(run)[0])["model"].keys() for run in (eager, compiled)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("script", ["train_vae", "train_ldm", "train_cdal"])
def test_a_deterministic_run_that_was_interrupted_ends_bit_identical(script, place):
    flags = ("--run.deterministic", "--run.amp", "bf16")
    try:
        whole = train(script, place, "whole", 8, *flags)
        train(script, place, "cut", 5, *flags)
        cut = train(script, place, "cut", 8, *flags)
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (load(step_files(run)[0]) for run in (whole, cut))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(cut)]


@pytest.mark.parametrize("kind", ["autoencoder", "u-net"])
def test_gradients_in_3d_are_bit_exact_in_deterministic_mode(kind):
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = (AutoencoderKL(AE) if kind == "autoencoder" else UNet(NET)).to(CUDA)
        x = torch.randn(2, net.config.in_channels, 16, 16, 16, device=CUDA)
        if kind == "autoencoder":
            recon, posterior = net(x, torch.randn(2, *net.latent_shape(x.shape[2:]), device=CUDA))
            train_vae.loss_terms(recon, posterior, x, train_vae.Config(), 0)["loss"].mean().backward()
        else:
            torch.nn.init.normal_(net.conv_out.weight, std=0.1)
            net(x, torch.tensor([5.0, 900.0], device=CUDA)).square().mean().backward()
        return [p.grad for p in net.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nccl_with_one_rank_trains_and_samples_as_no_group_does(place):
    heads, vae_run, folder = place
    alone = train("train_vae", place, "alone", 8, "--run.amp", "fp32")
    flags = vae_flags(heads, folder / "group", 8, *ON_GPU, "--run.amp", "fp32")
    process = torchrun(ROOT / "train_vae.py", *flags, ranks=1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_near(alone, folder / "group", rel=1e-3)
    process = torchrun(
        ROOT / "train_ldm.py", *ldm_flags(vae_run, folder / "ldm", 4, *ON_GPU), ranks=1, port=1
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    process = torchrun(ROOT / "sample.py", folder / "ldm", "--num", 3, "--steps", 2, ranks=1, port=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(list((folder / "ldm" / "samples-001").glob("sample_*"))) == 3


def test_samples_do_not_depend_on_the_device(place):
    run = train("train_ldm", place, "ldm", 5, "--run.amp", "fp32")
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        made = [ldm3d.load(run, device).sample(2, steps=4, seed=3) for device in ("cpu", "cuda")]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    assert torch.allclose(*made, atol=1e-3)
    sample.main([str(run), "--num", "2", "--steps", "2", "--device", "cuda", "--compile"])


# --- memory -------------------------------------------------------------------------------------------------


def peak_of(work) -> int:
    """Most bytes of tensors during work(), those that were there before included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def autoencoder_loss(net, batch, size):
    device = next(net.parameters()).device
    x = torch.zeros(batch, 1, *size, device=device)
    recon, posterior = net(x, torch.zeros(batch, *net.latent_shape(size), device=device))
    return (recon.float() - x).abs().mean() + posterior.mean.square().mean()


def denoiser_loss(net, batch, size):
    x_t = torch.zeros(batch, 4, *size, device=next(net.parameters()).device)
    return (net(x_t, torch.zeros(batch, device=x_t.device)).float() - x_t).square().mean()


def training_peak(
    kind: str, checkpointing: bool, amp: str, batch: int, size: tuple[int, ...]
) -> tuple[int, int]:
    """(planned, measured) bytes of training steps with AdamW and an EMA copy."""
    cls, config, loss = {
        "autoencoder": (AutoencoderKL, AE, autoencoder_loss),
        "u-net": (UNet, NET, denoiser_loss),
    }[kind]
    config = dataclasses.replace(config, checkpointing=checkpointing)
    planned = MemoryTable(80, amp).training("", lambda: cls(config), loss, batch, size).need(batch, size)
    net = cls(config).to(CUDA)
    ema = EMA(net, 0.9)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def steps() -> None:
        for _ in range(2):
            with autocast(amp, CUDA):
                value = loss(net, batch, size)
            value.backward()
            optimizer.step()
            ema.update(net, 0)
            optimizer.zero_grad(set_to_none=True)

    return planned, peak_of(steps)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "size"), [("autoencoder", (96, 96, 96)), ("u-net", (32, 32, 32))])
def test_checkpointing_saves_memory_and_the_plan_knows_how_much(kind, size, amp, record_property):
    peaks = {}
    for checkpointing in (False, True):
        planned, measured = training_peak(kind, checkpointing, amp, 2, size)
        peaks[checkpointing] = measured
        record_property(f"GiB, checkpointing {checkpointing}", (planned / 2**30, measured / 2**30))
        print(f"{kind} {amp} checkpointing {checkpointing}: {planned / 2**30:.2f} {measured / 2**30:.2f} GiB")
        assert planned == pytest.approx(measured, rel=0.2)
    assert peaks[True] < 0.95 * peaks[False]


def test_a_volume_of_256_cubed_is_decoded_with_the_memory_that_was_planned():
    size = (256, 256, 256)
    planned = MemoryTable(80, "bf16").inference("", lambda: AutoencoderKL(AE), decode, 1, size).need(1, size)
    net, made = AutoencoderKL(AE).to(CUDA).eval(), []
    z = torch.randn(1, *net.latent_shape(size), device=CUDA)

    def work() -> None:
        with torch.inference_mode(), autocast("bf16", CUDA):
            made.append(net.decode(z, size).cpu())

    measured = peak_of(work)
    print(f"decoding 256^3: planned {planned / 2**30:.2f}, measured {measured / 2**30:.2f} GiB")
    assert made[0].shape == (1, 1, *size)
    assert made[0].isfinite().all()
    assert planned == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@torch.inference_mode()
def test_slabs_on_a_gpu_give_the_whole_result_in_the_memory_estimated(amp):
    net, size = AutoencoderKL(AE).to(CUDA).eval(), (192, 160, 160)
    x = torch.randn(1, 1, *size, device=CUDA)
    z = torch.randn(1, *net.latent_shape(size), device=CUDA)
    with autocast(amp, CUDA):
        for trunk, given in ((net.encoder, x), (net.decoder, z)):
            whole, need = trunk(given).float(), peaks(trunk, given)
            for mode in ("slabs", "recompute", "offload"):
                made: list[torch.Tensor] = []

                def work(mode=mode, trunk=trunk, given=given, made=made) -> None:
                    made.append(Stream(mode, CUDA).run(trunk, given))

                measured = peak_of(work) - made[0].nbytes
                gib = f"{need[mode] / 2**30:.2f} GiB estimated, {measured / 2**30:.2f} measured"
                print(f"{type(trunk).__name__}, {mode}, {amp}: {gib}")
                close(made[0].float(), whole, 2e-5 if amp == "fp32" else 2e-2)
                assert measured <= 1.2 * need[mode]
