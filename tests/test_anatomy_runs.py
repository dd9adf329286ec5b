"""A run with registers does the whole job: it starts from a plain one, learns masks where there are any,
resumes bit by bit, and writes label maps that lie on their volumes."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tiny import BOUND, ROOT, ldm_flags, lines, torchrun, vae_flags

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d import InputError, read, write
from ldm3d.config import parse
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.memory_plan import MemoryTable
from ldm3d.reports.__main__ import main as reports_main

VALUES = (0, 300, 20, 7, 128)  # of labels 0 to 4 in the files of `some_masks`


@pytest.fixture
def run(bound_run):
    return bound_run


def test_training_logs_what_it_lowers_and_validation_the_dice_of_every_label_and_level(run):
    model = ldm3d.load(run).model
    train, val = lines(run)[-1], lines(run, "val")[-1]
    assert {"loss", "head", "binding", "anatomy_weight"} <= train.keys()
    for line in lines(run):  # the anatomical losses as they enter the sum that is minimised
        assert line["total"] == pytest.approx(line["loss"] + line["weighted_head"] + line["weighted_binding"])
        assert 0 < line["weighted_head"] < line["anatomy_weight"] * line["head"]  # less at noisy times
    weights = [line["weighted_binding"] / line["binding"] for line in (lines(run)[0], train)]
    assert weights[1] < 0.5 * weights[0]
    wanted = {f"dice_{k}_u{u}" for k in range(1, model.denoiser.num_labels) for u in train_ldm.EVAL_LEVELS}
    assert wanted <= val.keys()
    assert lines(run)[0]["anatomy_weight"] == 0.5
    assert train["anatomy_weight"] == 0.0625
    assert (run / "previews" / "step_0000010.png").exists()


def test_the_loss_of_a_sample_is_that_of_the_diffusion_plus_the_weighted_terms(run):
    model, u = ldm3d.load(run).model, torch.tensor([0.1, 0.8])
    draw = torch.Generator().manual_seed(0)
    mean, z_noise, noise = torch.randn(3, 2, *model.latent_shape, generator=draw)
    labels = torch.randint(model.denoiser.num_labels, (2, *model.spec.size), generator=draw)
    posterior = mean, torch.zeros_like(mean), z_noise
    loss, terms = model.losses(model.denoiser, *posterior, u, noise, None, labels, 0.5)
    share = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)
    expected = terms["loss"] + 0.5 * share * (terms["head"] + terms["binding"])
    assert torch.allclose(loss, expected, rtol=1e-5)
    alone, _ = model.losses(model.denoiser, *posterior, u, noise)
    assert torch.allclose(terms["loss"], alone, rtol=1e-4)


def test_masks_lie_beside_the_cached_latents_as_small_integers(run):
    folder = next((run / "latents").glob("val-*"))
    masks = np.load(folder / "mask-000000.npy")
    assert masks.dtype == np.int8
    val = json.loads((run / "split.json").read_text())["val"]
    root = ldm3d.load(run).layout.root
    assert np.array_equal(masks[0, 0], read(f"{root}/labels/{val[0]}.tif").array[0])


@pytest.mark.slow
def test_training_without_a_cache_goes_the_same_way(vae_run, run, tmp_path):
    train_ldm.main(ldm_flags(vae_run, tmp_path / "ldm", 3, *BOUND, "--latent_cache", "false"))
    for name in ("loss", "binding"):
        fresh = [line[name] for line in lines(tmp_path / "ldm")]
        assert fresh == pytest.approx([line[name] for line in lines(run)][:3], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["vae_run", "some_masks"])
def test_two_ranks_train_as_one(which, request, tmp_path):
    """Of `some_masks`, a rank of two cases has often no mask at all."""
    vae = request.getfixturevalue(which)
    vae = vae / "vae" if which == "some_masks" else vae
    process = torchrun(ROOT / "train_ldm.py", *ldm_flags(vae, tmp_path / "two", 4, *BOUND))
    train_ldm.main(ldm_flags(vae, tmp_path / "one", 4, *BOUND))
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    for name in ("loss", "head", "binding", "grad_norm"):
        one, two = ([line[name] for line in lines(tmp_path / folder)] for folder in ("one", "two"))
        assert np.allclose(one, two, rtol=1e-3)


def test_it_starts_from_a_plain_run_and_its_registers_are_new(vae_run, tmp_path, capsys):
    level = ["--unet.attention_levels", "true"]
    train_ldm.main(ldm_flags(vae_run, tmp_path / "plain", 3, *level))
    start = ["--run.init", tmp_path / "plain", "--optim.lr", "1e-9", "--run.ema_decay", "0"]
    train_ldm.main(ldm_flags(vae_run, tmp_path / "bound", 1, *BOUND, *start))
    assert "weights are new, such as unet.registers.bank" in capsys.readouterr().out
    plain, bound = (ldm3d.load(tmp_path / name).model for name in ("plain", "bound"))
    x, t = torch.randn(2, *plain.latent_shape), torch.tensor([100.0, 700.0])
    assert torch.allclose(plain.denoiser(x, t), bound.denoiser(x, t), atol=1e-4)
    for more, words in (
        ([], r"the weights do not fit: unet\.registers"),
        (["--condition.use", "class"], "plain has conditions none, this run class"),
    ):
        other = ["--run.init", tmp_path / ("plain" if more else "bound")]
        with pytest.raises(InputError, match=words):
            train_ldm.main(ldm_flags(vae_run, tmp_path / "other", 1, *level, *more, *other))
        assert not (tmp_path / "other").exists()


def test_the_bank_without_masks_has_the_same_registers_and_no_labels(vae_run, run, tmp_path):
    free = [word if word != "bound" else "free" for word in BOUND]
    train_ldm.main(ldm_flags(vae_run, tmp_path / "free", 2, *free))
    assert "head" not in lines(tmp_path / "free")[-1]
    a, b = (ldm3d.load(folder).model.denoiser for folder in (run, tmp_path / "free"))
    assert [p.shape for p in a.unet.parameters()] == [p.shape for p in b.unet.parameters()]
    with pytest.raises(InputError, match="with_labels: the run has learned none"):
        sample.main([str(tmp_path / "free"), "--with-labels"])


@pytest.fixture(scope="module")
def some_masks(tmp_path_factory):
    """3-D heads, of which two in three have no mask, the others one of the values VALUES, and their runs."""
    place = tmp_path_factory.mktemp("some")
    write_phantoms(place / "heads", 9, size=(12, 14, 12), spacing=(16.0, 16.0, 16.0))
    for path in (place / "heads" / "labels").iterdir():
        volume = read(path)
        values = np.array(VALUES, np.uint16)[volume.array.astype(int)]
        write(path, dataclasses.replace(volume, array=values), overwrite=True)
    table = place / "heads" / "cases.csv"
    rows = list(csv.DictReader(table.open()))
    for i, row in enumerate(rows):
        row["mask"] = row["mask"] if i % 3 == 0 else ""
        row["split"] = "val" if i in (0, 1) else "train"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--data.dims", "3", "--vae.dims", "3", "--data.allow_missing_mask", "true"]
    flags += ["--data.label_values", ",".join(map(str, VALUES))]
    train_vae.main(vae_flags(place / "heads", place / "vae", 4, *flags))
    train_ldm.main(ldm_flags(place / "vae", place / "ldm", 4, *BOUND, "--micro_batch_size", "2"))
    return place


def test_samples_without_a_mask_are_trained_on_beside_those_with_one(some_masks):
    logged = lines(some_masks / "ldm")
    assert all(line["skipped_steps"] == 0 and line["loss"] is not None for line in logged)
    assert any(line["head"] is not None for line in logged)
    assert lines(some_masks / "ldm", "val")[-1]["dice_1_u0.05"] is not None


def test_masks_of_the_background_alone_are_one_label(vae_run, heads, tmp_path):
    shutil.copytree(heads, tmp_path / "heads")
    for path in (tmp_path / "heads" / "labels").iterdir():
        volume = read(path)
        write(path, dataclasses.replace(volume, array=np.zeros_like(volume.array)), overwrite=True)
    run = tmp_path / "ldm"
    train_ldm.main(ldm_flags(vae_run, run, 2, *BOUND, "--data.root", tmp_path / "heads"))
    assert not any("dice" in name for name in lines(run, "val")[-1])
    assert not ldm3d.load(run).sample(1, steps=1, with_labels=True)[1].any()


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run", "some_masks"])
def test_label_maps_lie_on_their_volumes_and_are_those_of_the_python_door(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    folder = folder / "ldm" if which == "some_masks" else folder
    sample.main([str(folder), "--num", "3", "--steps", "2", "--with-labels", "--out", str(tmp_path / "out")])
    model = ldm3d.load(folder).model
    x, labels = model.sample(3, steps=2, with_labels=True)
    assert torch.allclose(x, model.sample(3, steps=2))
    suffix = "tif" if which == "run" else "nii.gz"
    names = [f"sample_{i:04d}.{suffix}" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "out").glob(f"*.{suffix}")) == names
    for i, name in enumerate(names):
        volume, label_map = read(tmp_path / "out" / name), read(tmp_path / "out" / "labels" / name)
        assert label_map.array.shape == volume.array.shape == (1, *model.spec.size)
        assert np.allclose(label_map.affine, volume.affine)
        assert label_map.orientation == volume.orientation
        values = np.array(VALUES if which == "some_masks" else range(5))
        assert np.array_equal(label_map.array[0], values[labels[i].numpy()])


def test_registers_can_be_switched_off_from_the_same_noise(run, tmp_path):
    model = ldm3d.load(run).model
    for reader in model.denoiser.unet.registers.readers:  # twelve steps have hardly opened them
        reader.attention.gate.data.fill_(1.0)
    on = model.sample(1, steps=2)
    model.use_registers(False)
    off = model.sample(1, steps=2)
    assert not torch.allclose(on, off, atol=1e-4)
    sample.main(
        [str(run), "--num", "1", "--steps", "2", "--registers", "false", "--out", str(tmp_path / "o")]
    )
    assert json.loads((tmp_path / "o" / "samples.json").read_text())["registers"] is False


@pytest.mark.slow
def test_the_plan_counts_registers_and_head(vae_run, tmp_path, monkeypatch):
    peaks = []
    for more in (["--unet.attention_levels", "true"], BOUND):
        config, _ = parse(
            train_ldm.Config,
            ldm_flags(vae_run, tmp_path / "ldm", 2, *more, "--plan", "--memory", "4"),
            train_ldm.PRESETS,
            base=train_ldm.with_autoencoder,
        )
        monkeypatch.setattr(MemoryTable, "print", lambda plan: peaks.append(plan.jobs[0].need(64, (16, 16))))
        train_ldm.memory_table(config).print()
    assert peaks[1] > 1.05 * peaks[0]


# --- the report ---------------------------------------------------------------------------------------------


def test_registers_of_a_run_that_lacks_some_masks_have_a_report(some_masks, tmp_path):
    flags = ["--steps", "2", "--shown", "1", "--out", str(tmp_path / "out")]
    reports_main(["registers", str(some_masks / "ldm"), *flags])
    report = json.loads((tmp_path / "out" / "registers.json").read_text())
    assert np.allclose(np.sum(report["usage"], 1), 1)
