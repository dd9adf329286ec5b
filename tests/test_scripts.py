"""The scripts do the whole job: train, sample what opens in a viewer, refuse bad input."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import ldm3d
import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import InputError, read
from ldm3d.config import flatten, replace
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.checkpoint import load, step_files
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


@pytest.fixture(scope="module", params=[3, 2])
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


def losses(run: Path, split="train"):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == split and "loss" in line}


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
    assert (how["seed"], how["sampler"], how["steps"], how["network_calls"]) == (0, "heun", 3, 6)
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


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "flags", "words"),
    [
        ("ldm", ["--num", "0"], "num: expected at least 1, got 0"),
        ("ldm", ["--votes", "3"], "--votes: no such setting; did you mean --"),
        ("vae", [], "which images? give the image file, or folder of images"),
        ("vae", ["FOLDER", "--num", "3"], "--num: no such setting"),
        ("vae", ["/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_every_kind_of_run_has_settings_of_its_own(place, run, flags, words, mistake):
    err = mistake(sample.main, [str(place / run), *flags])
    assert words in err


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


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (train_vae.main, ["phantm"], ["phantm", "phantom"]),
        (train_vae.main, ["phantom", "--run.stepz", "3"], ["--run.stepz", "--run.steps"]),
        (train_vae.main, ["phantom", "--data.root", "/nowhere"], ["/nowhere"]),
        (train_vae.main, ["phantom", "--vae.channels", "none"], ["vae.channels"]),
        (train_vae.main, ["phantom", "--run.device", "abacus"], ["device", "abacus"]),
        (train_ldm.main, ["phantom", "--vae", "/nowhere"], ["/nowhere"]),
        (sample.main, ["/nowhere"], ["/nowhere"]),
        (sample.main, [], ["run"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(main, flags, words, mistake):
    err = mistake(main, flags)
    assert all(w in err for w in words), err


def test_resume_with_another_architecture_is_refused(place, dims, capsys):
    flags = [*vae_flags(place / "heads", place / "vae"), "--data.dims", str(dims), "--vae.dims", str(dims)]
    flags[flags.index("8,16")] = "8,24"
    assert run_script(train_vae.main, flags) == 2
    assert "vae.channels was (8, 16), now (8, 24)" in capsys.readouterr().err


def test_a_finished_run_says_so_and_exits_0(place, dims, capsys):
    extra = ["--data.dims", str(dims), "--vae.dims", str(dims), "--data.cache_dir", str(place / "cache")]
    assert run_script(train_vae.main, vae_flags(place / "heads", place / "vae") + extra) == 0
    assert "finished at step 40" in capsys.readouterr().out


def test_a_run_folder_of_another_kind_is_refused(place, capsys):
    assert run_script(train_ldm.main, ldm_flags(place / "vae", place / "vae")) == 2
    assert "'vae'" in capsys.readouterr().err


def test_a_sampler_of_the_other_process_is_refused_with_the_right_ones(place, capsys):
    before = sorted(place.rglob("*"))
    assert run_script(sample.main, [str(place / "ldm"), "--sampler", "ddim"]) == 2
    assert "heun" in capsys.readouterr().err
    assert run_script(sample.main, [str(place / "ldm"), "--eta", "0.5"]) == 2
    assert "eta: got 0.5 with sampler heun" in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before  # no empty folder is left


def test_the_autoencoder_takes_axes_and_channels_of_the_data_or_names_the_setting(tmp_path, capsys):
    write_phantoms(tmp_path / "heads", 3, dims=2, size=(16, 16))
    flags = [*vae_flags(tmp_path / "heads", tmp_path / "vae", steps=1), "--data.cache_dir", str(tmp_path)]
    flags += ["--data.dims", "2"]
    assert run_script(train_vae.main, [*flags, "--vae.in_channels", "3"]) == 2
    assert "vae.in_channels: 3, but the images have 1" in capsys.readouterr().err
    assert run_script(train_vae.main, [*flags, "--vae.dims", "3"]) == 2
    assert "vae.dims: 3, but data.dims is 2" in capsys.readouterr().err
    assert run_script(train_vae.main, flags) == 0
    assert load(step_files(tmp_path / "vae")[0])["config"]["vae"]["dims"] == 2


def test_a_folder_to_reconstruct_that_holds_nothing_is_named(place, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nothing"):
        assert run_script(sample.main, [str(place / "vae"), str(folder)]) == 2
        err = capsys.readouterr().err
        assert str(folder) in err
        assert err.count("\n") == 1


def test_stage_two_can_encode_anew_at_every_step_with_fresh_augmentation(place):
    flags = [*ldm_flags(place / "vae", place / "fresh", steps=4), "--latent_cache", "false"]
    train_ldm.main([*flags, "--run.log_every", "1", "--data.augment.flip_axes", "1"])
    assert len(losses(place / "fresh")) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.scaling", "minmax"], "data.scaling: the autoencoder was trained with percentile"),
        (["--data.percentiles", "1,99"], "data.percentiles: the autoencoder was trained with"),
        (["--data.augment.flip_axes", "1"], "data.num_variants"),
        (["--data.num_variants", "3"], "data.augment"),
    ],
)
def test_stage_two_refuses_data_settings_that_would_do_harm_or_nothing(place, tmp_path, flags, words, capsys):
    assert run_script(train_ldm.main, [*ldm_flags(place / "vae", tmp_path / "ldm"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "ldm").exists()


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
