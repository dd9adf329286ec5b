"""Every kind of stage one trains and feeds stage two; the discriminator upsets nothing."""

import json
import shlex
from pathlib import Path

import pytest
import tiny
import torch

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d import read
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.pipeline import load_autoencoder
from ldm3d.vqvae import VQVAE

ROOT = Path(__file__).parents[1]
FLAGS = shlex.split(
    """--vae.channels 8,16 --vae.num_groups 4 --vae.num_res_blocks 1 --vae.latent_channels 3 --batch_size 4
    --run.eval_every 10 --run.save_every 5 --run.log_every 1 --run.ema_decay 0.9 --data.val_fraction 0.2
    --data.dims 2 --vae.dims 2 --data.patch none --optim.lr 4e-3 --optim.warmup_steps 0
    --optim.schedule constant"""
)
VQ = ["--autoencoder", "vq", "--quantizer.codebook_size", "32"]
DISCRIMINATOR = shlex.split(
    """--disc_weight 0.1 --feature_weight 0.1 --disc_start 3 --disc_ramp 4 --disc.channels 4
    --disc.num_layers 1 --r1_weight 1 --r1_every 2 --disc_optim.lr 1e-3 --structure_weight 0.1"""
)
KL = ["--kl_warmup", "5", "--free_bits", "0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("train_vae")
    write_phantoms(place / "heads", 12, dims=2, size=(24, 28), spacing=(8.0, 7.5))
    return place


def flags(place: Path, run: str, steps: int, *more: str) -> list[str]:
    where = [
        "--data.root",
        str(place / "heads"),
        "--run.dir",
        str(place / run),
        "--data.cache_dir",
        str(place),
    ]
    return ["phantom", *where, "--run.steps", str(steps), *FLAGS, *more]


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_discriminator_learns_from_its_start_on_and_the_log_holds_every_term(place, kind):
    more = DISCRIMINATOR + (VQ if kind == "vq" else KL)
    train_vae.main(flags(place, kind, 8, *more))
    steps = tiny.lines(place / kind, "train")
    assert ["d_loss" in line for line in steps] == [step > 3 for step in range(1, 9)]
    assert ["r1" in line for line in steps] == [step > 3 and step % 2 == 1 for step in range(1, 9)]
    expected = {"g_loss", "adaptive_weight", "disc_accuracy", "features", "structure"}
    expected |= {"perplexity", "codes_used", "codes_revived", "commitment"} if kind == "vq" else {"kl"}
    assert expected <= steps[-1].keys()


def test_the_adaptive_weight_is_one_for_a_step_however_the_batch_is_divided(place):
    more = ["--batch_size", "4", "--disc_weight", "0.1", "--disc.num_layers", "1", "--disc_start", "0"]
    more += ["--disc_ramp", "0", "--run.log_every", "1"]
    logs, models = {}, {}
    for size in (4, 1, 3):  # one, four, and two uneven micro-batches
        train_vae.main(flags(place, f"by{size}", 3, *more, "--micro_batch_size", str(size)))
        logs[size] = tiny.lines(place / f"by{size}", "train")
        models[size] = load(step_files(place / f"by{size}")[0])["model"]
    for size in (1, 3):
        for joined, divided in zip(logs[4], logs[size], strict=True):
            for term in ("adaptive_weight", "g_loss", "d_loss", "grad_norm"):
                assert divided[term] == pytest.approx(joined[term], rel=2e-3), (size, joined["step"], term)
        for name, value in models[4].items():
            torch.testing.assert_close(models[size][name], value, rtol=1e-3, atol=1e-4)


def test_before_its_start_the_discriminator_changes_nothing(place):
    train_vae.main(flags(place, "without", 3))
    train_vae.main(flags(place, "later", 3, "--disc_weight", "0.1", "--disc.num_layers", "1"))
    without, later = (load(step_files(place / name)[0]) for name in ("without", "later"))
    tiny.assert_equal(without["model"], later["model"])


def test_stage_two_and_sampling_run_on_a_codebook(place):
    train_vae.main(flags(place, "vq", 40, *VQ))
    steps = tiny.lines(place / "vq", "train")
    assert steps[-1]["reconstruction"] < 0.6 * steps[0]["reconstruction"]
    assert steps[-1]["perplexity"] > 8
    ldm = shlex.split(
        """--unet.channels 8,16 --unet.num_groups 4 --unet.num_res_blocks 1 --unet.head_channels 8
        --batch_size 4 --run.steps 4 --run.eval_every 4 --sample_steps 2"""
    )
    train_ldm.main(["phantom", "--vae", str(place / "vq"), "--run.dir", str(place / "ldm"), *ldm])
    model = ldm3d.load(place / "ldm").model
    assert isinstance(model.autoencoder, VQVAE)
    x = model.sample(2, steps=2, seed=1)
    assert x.isfinite().all()
    z = torch.randn(1, *model.latent_shape)  # whatever is decoded, it is decoded as codes
    moved = model.autoencoder.quantizer.quantise(z * model.latent_std + model.latent_mean)[0]
    near = model.normalise(moved)
    assert torch.allclose(model.decode(z), model.decode(near), atol=1e-5)
    sample.main([str(place / "ldm"), "--num", "1", "--steps", "2"])
    sample.main([str(place / "vq"), str(place / "heads" / "images")])
    assert read(next((place / "ldm" / "samples-001").glob("sample_*"))).shape == (24, 28)
    evaluation_main(["reconstruct", str(place / "vq"), "--resamples", "5"])
    report = json.loads((place / "vq" / "evaluation-001" / "report.json").read_text())
    assert report["codebook"]["codes"] == 32
    assert 1 < report["codebook"]["perplexity"] <= report["codebook"]["used"] <= 32
    assert report["latent"]["noise_share"] == [0, 0, 0]
    net, content = load_autoencoder(place / "vq")
    assert isinstance(net, VQVAE)
    assert content["config"]["quantizer"]["codebook_size"] == 32


def test_a_perceptual_run_takes_its_weights_from_a_local_file(place):
    more = ["--perceptual_weight", "0.5", "--perceptual.weights", str(tiny.vgg_weights(place / "vgg.pth"))]
    train_vae.main(flags(place, "perceptual", 6, *more))
    assert all(line["perceptual"] > 0 for line in tiny.lines(place / "perceptual", "train"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--perceptual_weight", "1"], ["perceptual.weights", "lpips_vgg.pth"]),
        (["--disc_weight", "1"], ["num_layers", "24", "12"]),
        (["--autoencoder", "vw"], ["autoencoder", "kl | vq"]),
        ([*VQ, "--quantizer.codebook_size", "1"], ["quantizer.codebook_size"]),
    ],
)
def test_what_cannot_work_is_said_before_training(place, mistake, more, words):
    small = ["--data.patch", "12,12"]
    err = mistake(train_vae.main, flags(place, "never", 3, *more, *small))
    assert all(word in err for word in words), err


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_two_thousand_adversarial_steps_stay_finite_and_cost_less_than_1_db(tmp_path, amp):
    write_phantoms(tmp_path / "heads", 24, size=(24, 28, 24), spacing=(8.0, 8.0, 8.0))
    start, steps = 600, 2600
    more = shlex.split(
        f"""--vae.channels 16,32 --vae.num_groups 8 --vae.num_res_blocks 1 --vae.stem 2
        --vae.latent_channels 4 --data.patch 24,24,24 --batch_size 2 --run.steps {steps} --run.eval_every 200
        --run.save_every 1000 --run.log_every 50 --run.ema_decay 0.98 --run.amp {amp} --data.val_fraction 0.2
        --optim.lr 2e-3 --optim.warmup_steps 50 --disc_weight 0.1 --disc_start {start} --disc.channels 16
        --disc.num_layers 2 --disc_optim.lr 2e-4 --run.max_bad_steps 1"""
    )
    where = ["--data.root", str(tmp_path / "heads"), "--run.dir", str(tmp_path / "run")]
    train_vae.main(["phantom", *where, "--data.cache_dir", str(tmp_path), *more])
    steps = tiny.lines(tmp_path / "run", "train")
    assert steps[-1]["skipped_steps"] == 0
    values = [v for line in steps for k, v in line.items() if k != "split"]
    assert None not in values  # the log's word for what is not finite
    assert max(map(abs, values)) < 1e6
    assert all(0 <= line["disc_accuracy"] <= 1 for line in steps if line["step"] > start)
    scores = {line["step"]: line["psnr"] for line in tiny.lines(tmp_path / "run", "val")}
    assert min(v for step, v in scores.items() if step > start) > scores[start] - 1.0, scores
