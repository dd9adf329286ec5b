"""Every kind of stage one trains, is resumed bit-exactly and feeds stage two; the critic upsets nothing."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from torch import nn

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d import read
from ldm3d.data.phantoms import write_phantoms
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.distributed import run_script, wrap
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.losses import VGG16, adaptive_weight
from ldm3d.pipeline import load_autoencoder
from ldm3d.vqvae import VQVAE, QuantizerConfig, VectorQuantizer

ROOT = Path(__file__).parents[1]
FLAGS = shlex.split(
    """--vae.channels 8,16 --vae.num_groups 4 --vae.num_res_blocks 1 --vae.latent_channels 3 --batch_size 4
    --run.eval_every 10 --run.save_every 5 --run.log_every 1 --run.ema_decay 0.9 --data.val_fraction 0.2
    --data.dims 2 --vae.dims 2 --data.patch none --optim.lr 4e-3 --optim.warmup_steps 0
    --optim.schedule constant"""
)
VQ = ["--autoencoder", "vq", "--quantizer.codebook_size", "32"]
CRITIC = shlex.split(
    """--disc_weight 0.1 --feature_weight 0.1 --disc_start 3 --disc_ramp 4 --disc.channels 4
    --disc.num_layers 1 --r1_weight 1 --r1_every 2 --disc_optim.lr 1e-3 --kl_warmup 5 --free_bits 0.01
    --structure_weight 0.1"""
)


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


def log(run: Path, split: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def assert_equal(a, b, where=""):
    """Nested dicts, lists and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            assert_equal(v, w, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_run_with_a_critic_is_resumed_bit_exactly_with_all_that_learns(place, kind):
    more = CRITIC + (VQ if kind == "vq" else [])
    train_vae.main(flags(place, f"{kind}-whole", 10, *more))
    train_vae.main(flags(place, f"{kind}-halves", 5, *more))
    train_vae.main(flags(place, f"{kind}-halves", 10, *more))
    whole, halves = (load(step_files(place / f"{kind}-{name}")[0]) for name in ("whole", "halves"))
    for part in ("model", "ema", "optimizers", "others"):
        assert_equal(whole[part], halves[part], part)
    assert set(whole["optimizers"]) == {"autoencoder", "discriminator"}
    steps = log(place / f"{kind}-whole", "train")
    assert ["d_loss" in line for line in steps] == [step > 3 for step in range(1, 11)]
    assert ["r1" in line for line in steps] == [step > 3 and step % 2 == 1 for step in range(1, 11)]
    expected = {"g_loss", "adaptive_weight", "disc_accuracy", "features", "structure"}
    expected |= {"perplexity", "codes_used", "codes_revived", "commitment"} if kind == "vq" else {"kl"}
    assert expected <= steps[-1].keys()
    assert whole["best"]["name"] == "psnr with discriminator"


def test_before_its_start_the_critic_changes_nothing(place):
    train_vae.main(flags(place, "without", 3))
    train_vae.main(flags(place, "later", 3, "--disc_weight", "0.1", "--disc.num_layers", "1"))
    without, later = (load(step_files(place / name)[0]) for name in ("without", "later"))
    assert_equal(without["model"], later["model"])


def test_stage_two_and_sampling_run_on_a_codebook(place):
    train_vae.main(flags(place, "vq", 40, *VQ))
    steps = log(place / "vq", "train")
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
    torch.manual_seed(0)
    widths, content = [3, *([2] * 2), *([3] * 2), *([4] * 3), *([4] * 3), *([4] * 3)], {}
    for index, (a, b) in zip(sum(VGG16, ()), itertools.pairwise(widths), strict=True):
        content[f"features.{index}.weight"] = torch.randn(b, a, 3, 3)
        content[f"features.{index}.bias"] = torch.zeros(b)
    torch.save(content, place / "vgg.pth")
    more = ["--perceptual_weight", "0.5", "--perceptual.weights", str(place / "vgg.pth")]
    train_vae.main(flags(place, "perceptual", 6, *more))
    assert all(line["perceptual"] > 0 for line in log(place / "perceptual", "train"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--perceptual_weight", "1"], ["perceptual.weights", "lpips_vgg.pth"]),
        (["--disc_weight", "1"], ["num_layers", "24", "12"]),
        (["--autoencoder", "vw"], ["autoencoder", "kl | vq"]),
        ([*VQ, "--quantizer.codebook_size", "1"], ["quantizer.codebook_size"]),
    ],
)
def test_what_cannot_work_is_said_before_training(place, capsys, more, words):
    small = ["--data.patch", "12,12"]
    assert run_script(train_vae.main, flags(place, "never", 3, *more, *small)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


# --- two ranks ----------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codebook_updates(part: slice) -> list[torch.Tensor]:
    """Three updates on a part of batches of 4: k-means, then running means and revivals."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=5, decay=0.5, revive_below=0.5), channels=3)
    for step in range(3):
        z = draw(4, 3, 5, 5, seed=step)[part]
        report = quantizer.update([quantizer(x[None]) for x in z], torch.Generator().manual_seed(step))
    return [*quantizer.state_dict().values(), *report.values()]


def adaptive_weight_of(part: slice) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3)
    y = layer(draw(4, 1, 8, 8)[part])
    return [adaptive_weight((y - 1).abs().mean(), 0.01 * y.square().mean(), layer.weight)]


def critic_gradients(part: slice) -> list[torch.Tensor]:
    """Of the hinge loss with R1, real and fake images in one forward."""
    torch.manual_seed(0)
    net = PatchDiscriminator(PatchDiscriminatorConfig(dims=2, channels=4, num_layers=1))
    x, recon = draw(2, 4, 1, 16, 16)[:, part]
    config, model = train_vae.Config(r1_weight=0.7, r1_every=2), wrap(net, torch.device("cpu"))
    terms = train_vae.discriminator_terms(model, x, recon, config, step=4)
    terms["loss"].mean().backward()
    return [p.grad for p in net.parameters()]


JOBS = {"codebook": codebook_updates, "adaptive weight": adaptive_weight_of, "critic": critic_gradients}


def on_each_rank(number: int, port: int, folder: str) -> None:
    with tiny.rank_of_two(number, port):
        part = slice(2 * number, 2 * number + 2)
        torch.save({name: job(part) for name, job in JOBS.items()}, f"{folder}/{number}.pt")


def test_codebook_adaptive_weight_and_critic_of_two_ranks_are_those_of_the_joined_batch(tmp_path):
    port = 27000 + os.getpid() % 2000
    mp.start_processes(on_each_rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    for name, job in JOBS.items():
        for alone, a, b in zip(job(slice(0, 4)), first[name], second[name], strict=True):
            assert torch.equal(a, b), name
            assert torch.allclose(alone.double(), a.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
def test_two_ranks_train_codebook_and_critic_like_one_process(place, tmp_path):
    # The adaptive weight is exempt from "accumulated = joined", but not from "ranks = joined"
    more = [*CRITIC, *VQ, "--optim.lr", "1e-3", "--disc_optim.lr", "1e-4"]
    command = flags(place, "one", 6, *more)
    train_vae.main(command)
    command[command.index(str(place / "one"))] = str(place / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    launch += [str(23000 + os.getpid() % 2000), str(ROOT / "train_vae.py"), *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for a, b in zip(log(place / "one", "train"), log(place / "two", "train"), strict=True):
        for key in a.keys() & {"loss", "d_loss", "g_loss", "r1", "perplexity", "adaptive_weight"}:
            assert a[key] == pytest.approx(b[key], rel=2e-2, abs=1e-3), (a["step"], key)


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
    steps = log(tmp_path / "run", "train")
    assert steps[-1]["skipped_steps"] == 0
    values = [v for line in steps for k, v in line.items() if k != "split"]
    assert None not in values  # the log's word for what is not finite
    assert max(map(abs, values)) < 1e6
    assert all(0 <= line["disc_accuracy"] <= 1 for line in steps if line["step"] > start)
    scores = {line["step"]: line["psnr"] for line in log(tmp_path / "run", "val")}
    assert min(v for step, v in scores.items() if step > start) > scores[start] - 1.0, scores
