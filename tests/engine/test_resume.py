"""To resume, run the same command again: a run that was killed, or begun by an older version, ends bit for
bit as one that nothing happened to."""

import contextlib
import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    HAS_DISCRIMINATOR,
    KINDS,
    assert_same_end,
    command_of,
    kill_all,
    lines,
    start,
    torchrun,
    train,
)

from ldm3d import InputError, read, write
from ldm3d.data import open_images
from ldm3d.engine.checkpoint import load, load_run, step_files
from ldm3d.engine.training import reseed

MORE = "--micro_batch_size 3 --run.save_every 5 --run.log_every 3 --run.eval_every 2 --run.keep 9".split()
DROPOUT = ["--unet.dropout", "0.2"]


@pytest.fixture(scope="module")
def runs(heads, vae_run, tmp_path_factory):
    """runs(kind, name): a run of eight steps. name "whole": nothing happens to it. Another name: a copy of
    "whole" as a kill leaves it: the newest checkpoint is that of step 5, the log goes further."""
    place = tmp_path_factory.mktemp("resume")

    def run(kind: str, name: str) -> Path:
        whole, folder = (place / f"{list(KINDS).index(kind)}-{n}" for n in ("whole", name))
        if not whole.exists():
            train(*eight_steps(kind, heads, vae_run, whole))
        if not folder.exists():
            shutil.copytree(whole, folder)
            for path in step_files(folder):
                if load(path)["step"] > 5:
                    path.unlink()
        return folder

    return run


def eight_steps(kind: str, heads: Path, vae_run: Path, folder: Path) -> list[str]:
    more = MORE if KINDS[kind][0] == "train_vae" else [*MORE, *DROPOUT]
    return command_of(kind, heads, vae_run, folder, 8, *more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_a_whole_one_in_everything_that_a_checkpoint_and_the_log_hold(
    kind, runs, heads, vae_run, capsys
):
    whole, killed = runs(kind, "whole"), runs(kind, "killed")
    assert load(step_files(killed)[0])["step"] == 5
    reseed(1, 2, 3)  # what happened in between must not matter
    train(*eight_steps(kind, heads, vae_run, killed))
    assert "going on from step 5 of 8" in capsys.readouterr().out
    assert_same_end(whole, killed)


@pytest.mark.parametrize("kind", HAS_DISCRIMINATOR)
def test_a_run_of_an_older_version_goes_on(kind, runs, heads, vae_run):
    older = runs(kind, "older")
    path = step_files(older)[0]
    content = torch.load(path, weights_only=True)  # with the names that older versions wrote
    content["optimizers"]["critic"] = content["optimizers"].pop("discriminator")
    for sums in content["others"]["mean"]["ranks"]:
        sums["critic_accuracy"] = sums.pop("disc_accuracy")
    if KINDS[kind][0] == "train_vae":
        assert content["best"]["name"] == "psnr with discriminator"
        content["best"]["name"] = "psnr with the critic"
    torch.save(content, path)
    train(*eight_steps(kind, heads, vae_run, older))
    assert_same_end(runs(kind, "whole"), older)


@pytest.mark.parametrize(
    ("kind", "score", "best_of"),
    [
        ("KL autoencoder", "psnr", max),
        ("denoiser", "loss", min),
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_validation(kind, score, best_of, runs):
    folder = runs(kind, "whole")
    scores = {line["step"]: line[score] for line in lines(folder, "val")}
    best = load(folder / "best.pt")
    assert {load(path)["step"] for path in step_files(folder)} >= set(scores)  # each validated one is saved
    assert len(set(scores.values())) > 1
    assert best["best"] == {"name": score, "value": best_of(scores.values()), "step": best["step"]}
    assert scores[best["step"]] == best_of(scores.values())


# --- processes that are ended from outside ------------------------------------------------------------------


def last_step(run: Path) -> int:
    """The last step in the log, 0 before there is one."""
    with contextlib.suppress(OSError, ValueError):  # a line is being written
        return max((line["step"] for line in lines(run)), default=0)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_save_and_exit_143(heads, vae_run, tmp_path, number):
    process = start(*command_of("KL autoencoder", heads, vae_run, tmp_path / "run", 100_000))
    while last_step(tmp_path / "run") < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    step = load(step_files(tmp_path / "run")[0])["step"]
    assert f"saved step {step}" in out
    assert step == last_step(tmp_path / "run")


def run_and_kill(launch, run: Path, draw: np.random.Generator) -> bool:
    """Start a run and kill all its processes some steps later; False if it was done before that."""

    def log_file() -> int | None:
        return (run / "log.jsonl").stat().st_ino if (run / "log.jsonl").exists() else None

    before, steps = log_file(), int(draw.integers(3, 12))
    process, first = launch(), None
    while process.poll() is None:
        if first is None and log_file() not in (None, before):  # the log was cut back: training begins
            first = last_step(run)
        if first is not None and last_step(run) >= first + steps:
            break
        time.sleep(0.002)
    time.sleep(0.05 * draw.random())  # so that it hits any part of a step, and sometimes a save
    alive = process.poll() is None
    kill_all(process)
    return alive


def test_a_run_killed_at_any_moment_and_restarted_ends_bit_identical(heads, vae_run, tmp_path):
    command = command_of("KL autoencoder", heads, vae_run, tmp_path / "killed", 40)
    assert run_and_kill(lambda: start(*command), tmp_path / "killed", np.random.default_rng(0))
    process = start(*command)
    train(*command_of("KL autoencoder", heads, vae_run, tmp_path / "whole", 40))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on from step" in out
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["codebook, discriminator", "denoiser", "segmentation, discriminator"])
def test_five_kills_at_random_moments_change_nothing(heads, vae_run, tmp_path, kind, workers, ranks):
    more = ["--run.workers", workers, "--run.amp", "fp16" if workers else "fp32", "--micro_batch_size", 1]
    more += ["--run.log_every", 3]  # saved every 5: between two lines of the log
    more += [] if KINDS[kind][0] == "train_vae" else DROPOUT

    def launch(run: str):
        process = start if ranks == 1 else torchrun
        return process(*command_of(kind, heads, vae_run, tmp_path / run, 60, *more))

    draw = np.random.default_rng(10 * workers + ranks)
    kills = [run_and_kill(lambda: launch("killed"), tmp_path / "killed", draw) for _ in range(5)]
    assert all(kills)
    for run in ("killed", "whole"):
        process = launch(run)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


# --- data that have moved -----------------------------------------------------------------------------------

MOVABLE = ["KL autoencoder", "denoiser", "segmentation, discriminator"]  # one of each script


@pytest.fixture
def elsewhere(heads, tmp_path):
    """The data of the fixture `heads` in another folder."""
    return shutil.copytree(heads, tmp_path / "elsewhere" / heads.name)


@pytest.mark.parametrize("kind", MOVABLE)
def test_a_killed_run_goes_on_where_its_data_have_moved_to(kind, runs, heads, vae_run, elsewhere, capsys):
    whole, moved = runs(kind, "whole"), runs(kind, "moved")
    place = ["--data.root", elsewhere, "--data.cache", "disk", "--data.cache_dir", elsewhere.parent / "cache"]
    train(*eight_steps(kind, heads, vae_run, moved), *map(str, place))
    assert "encoding" not in capsys.readouterr().err  # cached latents go by what the cases hold
    assert_same_end(whole, moved)
    config = load(step_files(moved)[0])["config"]["data"]
    assert (config["root"], config["cache"]) == (str(elsewhere), "disk")
    assert load_run(moved)["config"]["data"]["root"] == str(elsewhere)  # best.pt may be older than the move


def test_data_that_are_gone_are_looked_for_in_ldm3d_data_by_their_name(
    runs, heads, elsewhere, tmp_path, monkeypatch, capsys
):
    kind = "KL autoencoder"
    run, gone = runs(kind, "staged"), tmp_path / heads.name
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["root"] = str(gone)
    for path in step_files(run):
        content = torch.load(path, weights_only=True)
        content["config"]["data"]["root"] = str(gone)
        torch.save(content, path)
    (run / "config.json").write_text(json.dumps(settings))
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    again = eight_steps(kind, gone, None, run)
    with pytest.raises(InputError, match=f"no data folder {gone}; put it there, set LDM3D_DATA"):
        train(*again)
    monkeypatch.setenv("LDM3D_DATA", str(elsewhere.parent))
    train(*again)
    assert f"the data are taken from {elsewhere} ($LDM3D_DATA)" in capsys.readouterr().out
    assert_same_end(runs(kind, "whole"), run)
    assert len(open_images(load_run(run), part="val")) == 2


@pytest.mark.parametrize(
    ("kind", "role"),
    [*((kind, "image") for kind in MOVABLE), *((MOVABLE[0], role) for role in ("mask", "source", "grid"))],
)
def test_other_voxels_under_the_same_name_are_refused(kind, role, runs, heads, vae_run, elsewhere):
    run, name = runs(kind, "changed"), load(step_files(runs(kind, "whole"))[0])["state"]["split"]["train"][0]
    path = elsewhere / {"mask": "labels", "source": "sources"}.get(role, "images") / f"{name}.tif"
    volume = read(path)
    voxels, affine = volume.array.copy(), volume.affine.copy()
    if role == "grid":
        affine[:-1, :-1] *= 1.001
    else:
        voxels.flat[np.abs(voxels - np.median(voxels)).argmin()] += 1  # neither scaling nor labels change
    write(path, dataclasses.replace(volume, array=voxels, affine=affine), overwrite=True)
    with pytest.raises(InputError, match=f"have changed .*: the {role} of case {name} is another one"):
        train(*eight_steps(kind, heads, vae_run, run), "--data.root", str(elsewhere))


def test_a_resumed_run_may_take_smaller_micro_batches(runs, heads, vae_run):
    kind = "KL autoencoder"
    run = runs(kind, "smaller")
    train(*eight_steps(kind, heads, vae_run, run), "--micro_batch_size", "1")
    ours, whole = (load(step_files(folder)[0]) for folder in (run, runs(kind, "whole")))
    assert ours["config"]["micro_batch_size"] == 1
    for name, value in whole["model"].items():  # sums in another order
        assert torch.allclose(ours["model"][name], value, rtol=1e-3, atol=1e-4), name
