"""The scripts do the whole job: train, sample what opens in a viewer, refuse bad input."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch

import ldm3d
import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import InputError, read
from ldm3d.config import flatten, parse, replace
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.checkpoint import load
from ldm3d.engine.distributed import run_script

ROOT = Path(__file__).parents[1]
VAE = """--vae.channels 8,16 --vae.num_groups 4 --vae.num_res_blocks 1 --vae.stem 2 --vae.latent_channels 3
--batch_size 4 --run.eval_every 20 --run.save_every 10 --run.log_every 5 --data.val_fraction 0.2
--run.ema_decay 0.9 --optim.lr 4e-3 --optim.warmup_steps 0 --data.patch none""".split()
LDM = """--unet.channels 8,16 --unet.num_groups 4 --unet.num_res_blocks 1 --unet.head_channels 8 --batch_size
4 --run.eval_every 20 --run.save_every 10 --run.log_every 5 --run.ema_decay 0.9 --optim.lr 4e-3
--optim.warmup_steps 0 --sample_steps 2""".split()


def vae_flags(heads, run, steps=40):
    return ["phantom", "--data.root", str(heads), "--run.dir", str(run), "--run.steps", str(steps), *VAE]


def ldm_flags(vae, run, steps=120):
    return ["phantom", "--vae", str(vae), "--run.dir", str(run), "--run.steps", str(steps), *LDM]


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.slow)])
def dims(request):
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory, dims):
    """A folder with tiny heads, an autoencoder and a denoiser trained on them."""
    place = tmp_path_factory.mktemp(f"scripts{dims}d")
    write_phantoms(
        place / "heads", 12, dims=dims, size=(16, 20, 16)[:dims], spacing=(12.0, 11.0, 12.0)[:dims]
    )
    extra = ["--data.dims", str(dims), "--vae.dims", str(dims), "--data.cache_dir", str(place / "cache")]
    train_vae.main(vae_flags(place / "heads", place / "vae") + extra)
    train_ldm.main(ldm_flags(place / "vae", place / "ldm"))
    return place


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in tiny.lines(run)}


# --- the job ------------------------------------------------------------------------------------------------


def test_the_loss_falls_in_both_stages(place):
    vae, ldm = losses(place / "vae"), losses(place / "ldm")
    assert vae[40] < 0.6 * vae[5]
    assert np.mean([ldm[s] for s in (105, 110, 115, 120)]) < 0.9 * ldm[5]


def test_a_run_folder_holds_what_it_should(place):
    for run, last in (("vae", 40), ("ldm", 120)):
        names = {p.name for p in (place / run).iterdir()}
        assert {"config.json", "split.json", "log.jsonl", "best.pt", "previews"} <= names
        assert {f"checkpoint_{step:07d}.pt" for step in (last - 10, last)} <= names
        assert not any(".tmp" in n for n in names)
    assert (place / "ldm" / "autoencoder.pt").exists()
    assert json.loads((place / "vae/split.json").read_text()) == json.loads(
        (place / "ldm/split.json").read_text()
    )


def test_samples_open_with_the_shape_spacing_and_orientation_of_the_training_data(place, dims, capsys):
    sample.main([str(place / "ldm"), "--num", "3", "--steps", "3", "--batch_size", "2"])
    folder = place / "ldm" / "samples-001"
    real = read(next((place / "heads" / "images").iterdir()))
    files = sorted(p for p in folder.iterdir() if p.name.startswith("sample_"))
    assert [p.name.split(".")[0] for p in files] == ["sample_0000", "sample_0001", "sample_0002"]
    for path in files:
        volume = read(path)
        assert volume.shape == real.shape
        assert volume.spacing == pytest.approx(real.spacing, rel=1e-4)
        assert np.isfinite(volume.array).all()
    if dims == 3:
        assert nib.aff2axcodes(nib.load(files[0]).affine) == ("R", "A", "S")
    how = json.loads((folder / "samples.json").read_text())
    assert (how["seed"], how["sampler"], how["steps"], how["network_calls"]) == (0, "ab2", 3, 3)
    assert (folder / "preview.png").read_bytes()[:4] == b"\x89PNG"
    assert "real (validation)" in capsys.readouterr().out
    sample.main([str(place / "ldm"), "--num", "1", "--steps", "2"])
    assert (place / "ldm" / "samples-002").is_dir()  # nothing is overwritten
    with pytest.raises(InputError, match="nothing is overwritten"):
        sample.main([str(place / "ldm"), "--out", str(folder)])


def test_a_sample_depends_on_its_seed_and_number_alone(place):
    model = ldm3d.load(place / "ldm")
    together = model.sample(3, steps=3, seed=1, batch_size=3)
    apart = model.sample(2, steps=3, seed=1, batch_size=1, first=1)
    assert torch.allclose(together[1:], apart, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    other = model.sample(1, steps=3, seed=2)
    assert not torch.allclose(together[0], other[0], atol=1e-2)


def test_reconstructions_keep_geometry_and_units_of_each_case(place, capsys):
    sample.main([str(place / "vae"), str(place / "heads" / "images")])
    folder = place / "vae" / "reconstructions-001"
    assert "psnr" in capsys.readouterr().out
    for path in sorted((place / "heads" / "images").iterdir())[:3]:
        real, made = read(path), read(folder / path.name)
        assert made.shape == real.shape
        assert np.allclose(made.affine, real.affine, atol=1e-4)
        inside = np.percentile(real.array, [5, 95])
        assert abs(made.array.mean() - real.array.mean()) < 0.5 * (inside[1] - inside[0])
    scores = json.loads((folder / "reconstructions.json").read_text())
    assert len(scores["cases"]) == 12


def test_the_run_of_another_init_starts_from_its_weights(place, tmp_path, dims):
    flags = vae_flags(place / "heads", tmp_path / "vae", steps=1)
    extra = ["--data.dims", str(dims), "--vae.dims", str(dims), "--data.cache_dir", str(tmp_path)]
    train_vae.main([*flags, *extra, "--run.init", str(place / "vae"), "--optim.lr", "1e-12"])
    start = load(place / "vae" / "checkpoint_0000040.pt")["ema"]
    end = load(tmp_path / "vae" / "checkpoint_0000001.pt")["model"]
    assert all(torch.allclose(start[k], end[k], atol=1e-6) for k in start)


PRESETS = [(script, name) for script in (train_vae, train_ldm, train_cdal) for name in script.PRESETS]


@pytest.mark.parametrize(("script", "name"), PRESETS, ids=lambda p: getattr(p, "__name__", p))
def test_every_preset_is_a_valid_configuration(script, name):
    config = flatten(replace(script.Config(), script.PRESETS[name]))
    assert all(config[key] == value for key, value in script.PRESETS[name].items())


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["hippocampus", "adrenal", "tiff-translation"])
def test_a_preset_cuts_no_case(real_data, tmp_path, name):
    words = [name, "--data.cache_dir", str(tmp_path)]
    folder = real_data / (train_vae.PRESETS[name].get("data.name") or name)
    config, _ = parse(
        train_vae.Config, [*words, "--data.root", str(folder)], train_vae.PRESETS, base=train_vae.with_data
    )
    data = train_vae.open_volumes(config)
    largest = [max(axis) for axis in zip(*(info.shape for info in data.infos.values()), strict=True)]
    assert all(n <= size for n, size in zip(largest, data.spec.size, strict=True)), (largest, data.spec.size)


# --- bad input ----------------------------------------------------------------------------------------------


def test_help_shows_the_settings_of_the_run_alone(place, capsys):
    for run, own, others in (("ldm", "--sampler", "--votes"), ("vae", "--amp", "--sampler")):
        with pytest.raises(SystemExit):
            sample.main([str(place / run), "--help"])
        text = capsys.readouterr().out
        assert own in text
        assert others not in text
    sample.main(["--help"])
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("train_ldm.py", "train_vae.py", "train_cdal.py", "--sampler", "--votes")
    )


def test_a_finished_run_says_so_and_exits_0(place, dims, capsys):
    extra = ["--data.dims", str(dims), "--vae.dims", str(dims), "--data.cache_dir", str(place / "cache")]
    assert run_script(train_vae.main, vae_flags(place / "heads", place / "vae") + extra) == 0
    assert "finished at step 40" in capsys.readouterr().out


def test_stage_two_can_encode_anew_at_every_step_with_fresh_augmentation(place):
    flags = [*ldm_flags(place / "vae", place / "fresh", steps=4), "--latent_cache", "false"]
    train_ldm.main([*flags, "--run.log_every", "1", "--data.augment.flip_axes", "1"])
    assert len(losses(place / "fresh")) == 4


def test_the_python_lines_of_the_readme_run_as_written(place, dims, tmp_path, monkeypatch):
    if dims == 2:
        pytest.skip("the README's example is 3-D")
    text = (ROOT / "README.md").read_text()
    lines = text.split("## Python")[1].split("## ")[0].splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ldm-phantom").symlink_to(place / "ldm")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert read(tmp_path / "head.nii.gz").shape == (16, 20, 16)
