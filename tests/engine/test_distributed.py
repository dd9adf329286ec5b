"""Two ranks are one process on the joined batch: the same gradients, the same cases, the same sums, the same
samples."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import sample
import train_ldm
import train_vae
from ldm3d import AutoencoderKL, VAEConfig, read
from ldm3d.data import batches, evaluation_batches
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.distributed import (
    all_reduce_sum,
    any_rank,
    broadcast,
    gather,
    main_first,
    rank,
    run_script,
    wrap,
)
from ldm3d.engine.training import Mean, OptimConfig, RunConfig, Stepper, keyed_normal, micro_batches
from ldm3d.losses import adaptive_weight, kl_per_element, last_gradients, reconstruction_loss
from ldm3d.vqvae import QuantizerConfig, VectorQuantizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Numbers(torch.utils.data.Dataset):
    """Item (position, index): a small volume that depends on the index."""

    def __len__(self):
        return 7

    def __getitem__(self, item):
        position, index = item
        x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"image": x, "position": position, "index": index}


def train_two_steps() -> list[torch.Tensor]:
    """The trainer's step on a small autoencoder: gradients of the first step, weights after the second."""
    torch.manual_seed(0)
    net = AutoencoderKL(
        VAEConfig(dims=2, channels=(4, 8), num_groups=2, num_res_blocks=(1,), latent_channels=2)
    )
    stepper = Stepper(net, OptimConfig(grad_clip=None), RunConfig(), 4, CPU)  # clipping would hide a scale
    model, grads = wrap(net, CPU), []
    stepper.optimizers["optimizer"].register_step_pre_hook(
        lambda *_: grads.append([p.grad.clone() for p in net.parameters()])
    )
    for step, group in enumerate(batches(Numbers(), 4, 1, 0, 0, 2)):
        for batch, part in micro_batches(group, model, CPU, 0, step):
            x = batch["image"]
            recon, posterior = model(x, keyed_normal(0, batch["position"], net.latent_shape((8, 8)), "z"))
            loss = reconstruction_loss(recon, x) + 0.1 * kl_per_element(posterior.mean, posterior.logvar)
            stepper.backward(loss.mean() * part)
        assert stepper.step(step)
    return [*grads[0], *(p.detach() for p in net.parameters())]


class Discriminator(nn.Module):
    """(B, 1, 8, 8) -> logits (B, 16)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).flatten(1)


def train_against_a_discriminator() -> list[torch.Tensor]:
    """Two adversarial steps, each network with an optimizer: all gradients, and the weights at the end."""
    torch.manual_seed(0)
    net, discriminator = nn.Conv2d(1, 1, 3, padding=1), Discriminator()
    models, grads = [wrap(n, CPU) for n in (net, discriminator)], []
    steppers = [
        Stepper(n, OptimConfig(lr=1e-2, grad_clip=None), RunConfig(), 4, CPU) for n in (net, discriminator)
    ]
    for n, stepper in zip((net, discriminator), steppers, strict=True):
        stepper.optimizers["optimizer"].register_step_pre_hook(
            lambda *_, n=n: grads.extend(p.grad.clone() for p in n.parameters())
        )
    for step, group in enumerate(batches(Numbers(), 4, 1, 0, 0, 2)):
        made = []
        for batch, part in micro_batches(group, models[0], CPU, 0, step):
            recon = models[0](batch["image"])
            discriminator.requires_grad_(False)  # the generator's step calls the bare, frozen discriminator
            loss = reconstruction_loss(recon, batch["image"]) - 0.5 * discriminator(recon).mean(1)
            discriminator.requires_grad_(True)
            steppers[0].backward(loss.mean() * part)
            made.append({**batch, "recon": recon.detach()})
        for batch, part in micro_batches(made, models[1], CPU, 0, step):
            real, fake = models[1](torch.cat([batch["image"], batch["recon"]])).chunk(2)
            loss = torch.relu(1 - real).mean(1) + torch.relu(1 + fake).mean(1)
            steppers[1].backward(loss.mean() * part)
        assert all(stepper.step(step) for stepper in steppers)
    return [*grads, *(p.detach() for n in (net, discriminator) for p in n.parameters())]


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
    losses = (y - 1).abs().mean(), 0.01 * y.square().mean()
    return [adaptive_weight(last_gradients(*losses, layer.weight))]


def discriminator_gradients(part: slice) -> list[torch.Tensor]:
    """Of the hinge loss with R1, real and fake images in one forward."""
    torch.manual_seed(0)
    net = PatchDiscriminator(PatchDiscriminatorConfig(dims=2, channels=4, num_layers=1))
    x, recon = draw(2, 4, 1, 16, 16)[:, part]
    config, model = train_vae.Config(r1_weight=0.7, r1_every=2), wrap(net, torch.device("cpu"))
    terms = train_vae.discriminator_terms(model, x, recon, config, step=4)
    terms["loss"].mean().backward()
    return [p.grad for p in net.parameters()]


JOBS = {
    "codebook": codebook_updates,
    "adaptive weight": adaptive_weight_of,
    "discriminator": discriminator_gradients,
}


def overflow_on_one_rank() -> tuple[list[bool], list[float]]:
    """fp16 steps without DDP, the first with an overflow that rank 1 alone can see: (taken, loss scales)."""
    net = nn.Linear(2, 1)
    stepper, taken, scales = Stepper(net, OptimConfig(), RunConfig(amp="fp16"), 4, CPU), [], []
    for step in range(2):
        huge = 1e36 if step == 0 and rank() == 1 else 1.0
        stepper.backward(net(torch.ones(1, 2)).square().mean() * huge)
        taken.append(stepper.step(step))
        scales.append(stepper.scaler.get_scale())
    return taken, scales


def on_each_rank(folder: Path) -> None:
    result = {"step": train_two_steps(), "adversarial": train_against_a_discriminator()}
    result["overflow"] = overflow_on_one_rank()
    result["jobs"] = {name: job(slice(2 * rank(), 2 * rank() + 2)) for name, job in JOBS.items()}
    mean = Mean()
    if rank() == 0:
        mean.add(only_here=torch.tensor([1.0, 3.0]))  # a rank without cases adds nothing
    result["only here"] = mean.pop()
    for batch in evaluation_batches(Numbers(), 2):  # 7 cases: 4 on rank 0, 3 on rank 1
        mean.add(index=batch["index"].double())
    result["mean"] = mean.pop()["index"]
    result["cases"] = gather([b["index"].tolist() for b in evaluation_batches(Numbers(), 2)])
    mean.add(kept=torch.tensor(0.1 + rank()))
    half_way, mean = mean.state_dict(), Mean()  # a checkpoint between two log lines
    mean.load_state_dict(half_way)
    result["kept"] = mean.pop()
    result["sum"] = all_reduce_sum(torch.tensor([1.0, rank()])).tolist()
    result["any"] = (any_rank(rank() == 1), any_rank(False))
    result["broadcast"] = broadcast({"from": rank()})
    with main_first():
        path = folder / "made_by"
        result["made"] = path.read_text() if path.exists() else path.write_text(str(rank()))
    net = nn.Linear(2, 1)
    stepper = Stepper(net, OptimConfig(), RunConfig(), 4, CPU)
    with torch.no_grad():
        net.weight.fill_(1.0)
    stepper.backward(net(torch.full((1, 2), float("nan") if rank() else 1.0)).mean())
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result["bad step taken"] = stepper.step(0)
    result["said"] = said.getvalue()
    torch.save(result, folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert tiny.on_two_ranks(on_each_rank, folder) == [0, 0]
    return [torch.load(folder / f"{number}.pt") for number in (0, 1)]


def test_gradients_of_two_ranks_are_those_of_one_process_on_the_joined_batch(ranks):
    alone = train_two_steps()
    half = len(alone) // 2  # then come the weights, which Adam's division amplifies where a gradient is tiny
    largest = max(float(grad.abs().max()) for grad in alone[:half])
    for mine, theirs in zip(alone[:half], ranks[0]["step"][:half], strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * mine.abs().max() + 1e-7 * largest
    for mine, theirs in zip(alone[half:], ranks[0]["step"][half:], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_ranks_stay_bit_equal(ranks):
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["step"], ranks[1]["step"], strict=True))


def test_an_adversarial_step_on_two_ranks_is_that_of_one_process_for_both_networks(ranks):
    alone = train_against_a_discriminator()
    for mine, theirs, other in zip(alone, ranks[0]["adversarial"], ranks[1]["adversarial"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(theirs, other)


@pytest.mark.parametrize("name", JOBS)
def test_what_two_ranks_compute_is_what_one_process_computes_on_the_joined_batch(ranks, name):
    results = JOBS[name](slice(0, 4)), *(result["jobs"][name] for result in ranks)
    for alone, a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(alone.double(), a.double(), rtol=1e-4, atol=1e-5)


def test_an_overflow_that_one_rank_sees_skips_the_step_and_halves_the_scale_on_all(ranks):
    for result in ranks:
        taken, scales = result["overflow"]
        assert taken == [False, True]
        assert scales == [2.0**15, 2.0**15]


def test_unequal_shards_in_validation_give_the_exact_mean_and_see_each_case_once(ranks):
    assert ranks[0]["mean"] == ranks[1]["mean"] == pytest.approx(3.0)
    seen = [i for shard in ranks[0]["cases"] for batch in shard for i in batch]
    assert sorted(seen) == list(range(7))
    assert ranks[0]["only here"] == ranks[1]["only here"] == {"only_here": 2.0}


def test_sums_that_were_saved_between_two_log_lines_go_back_to_the_rank_that_had_them(ranks):
    assert ranks[0]["kept"] == ranks[1]["kept"] == {"kept": pytest.approx(0.6)}


def test_sums_decisions_and_rank_0_values_reach_all_ranks(ranks):
    for result in ranks:
        assert result["sum"] == [2.0, 1.0]
        assert result["any"] == (True, False)
        assert result["broadcast"] == {"from": 0}
    assert ranks[1]["made"] == "0"


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(ranks):
    assert [r["bad step taken"] for r in ranks] == [False, False]
    assert "the loss on rank 1 is not finite" in ranks[0]["said"]
    assert ranks[1]["said"] == ""


# --- scripts ------------------------------------------------------------------------------------------------

ADAPTIVE = {"d_loss", "g_loss", "r1", "adaptive_weight", "adversarial", "features", "perplexity"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if "registers" in k else [pytest.mark.slow]) for k in tiny.KINDS]
)
def test_two_ranks_train_and_cache_like_one_process(kind, heads, vae_run, tmp_path):
    flags = ["--optim.lr", "1e-3", "--run.eval_every", "3"]
    if "denoiser" in kind:
        flags += ["--data.num_variants", "2", "--data.augment.intensity", "0.5"]
    two, one = (tiny.command_of(kind, heads, vae_run, tmp_path / run, 6, *flags) for run in ("two", "one"))
    assert tiny.on_two_ranks(tiny.train, *two) == [0, 0]
    tiny.train(*one)
    for split in ("train", "val"):
        for a, b in zip(*(tiny.lines(tmp_path / name, split) for name in ("one", "two")), strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"split", *tiny.MEASURED}:
                rel = 2e-2 if key in ADAPTIVE or "discriminator" in kind else 2e-3
                assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-3, nan_ok=True), (a["step"], key)
    one, two = (load(step_files(tmp_path / name)[0])["state"] for name in ("one", "two"))
    for name in one.keys() & {"latent_mean", "latent_std"}:
        assert torch.allclose(one[name], two[name], rtol=1e-6)
    for path in (tmp_path / "one").glob("latents/*/*.npy"):
        cached, other = np.load(path), np.load(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        assert np.abs(cached.astype(float) - other).max() <= 1e-6 * np.abs(cached).max()


@pytest.mark.slow
def test_two_ranks_divide_the_samples_which_are_those_of_one_process(vae_run, tmp_path):
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "ldm", 4))
    folder, flags = tmp_path / "ldm", ["--num", "5", "--steps", "3", "--batch_size", "2"]
    process = tiny.torchrun(ROOT / "sample.py", folder, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("5 volumes of 16x20") == 1
    sample.main([str(folder), *flags])
    for i in range(5):
        one, two = (read(folder / f"samples-00{n}" / f"sample_{i:04d}.tif").array for n in (1, 2))
        assert np.allclose(one, two, atol=1e-3 * np.abs(one).max())
    assert (folder / "samples-001" / "samples.json").exists()


@pytest.mark.parametrize("resumes", [True, False])
def test_ctrl_c_speaks_of_checkpoints_only_where_there_are_some(resumes, capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_script(main, [], resumes) == 130
    out = capsys.readouterr().out
    assert out.startswith("interrupted")
    assert ("the same command goes on from the last checkpoint" in out) == resumes
