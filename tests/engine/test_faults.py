"""Whatever breaks, the message says what and what to do, and what is lost began at the last checkpoint."""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    KINDS,
    ROOT,
    assert_equal,
    assert_same_end,
    command_of,
    ldm_flags,
    lines,
    on_two_ranks,
    start,
    torchrun,
    train,
    vae_flags,
)

import sample
import train_ldm
import train_vae
from ldm3d import latents, read, write
from ldm3d.config import InputError, read_json
from ldm3d.data import VolumeDataset
from ldm3d.engine import runs, training
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.distributed import rank, run_script
from ldm3d.engine.logger import Logger, save_sheet
from ldm3d.engine.training import keyed_normal, reseed


def one_line(capsys) -> str:
    """What standard error says; it must be one line."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def whole(heads, tmp_path_factory):
    """A run of twelve steps that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_vae.main(vae_flags(heads, run, 12))
    return run


# --- numbers that are not finite ----------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(first, last): the loss of the training steps first..last is nan."""

    def poison(first: int, last: int) -> None:
        original, calls = train_vae.gradient_loss, []  # called once a step, and never in evaluation

        def bad(*arguments):
            calls.append(1)
            return original(*arguments) * (torch.nan if first <= len(calls) <= last else 1.0)

        monkeypatch.setattr(train_vae, "gradient_loss", bad)

    return poison


@pytest.mark.parametrize("amp", ["fp32", "fp16"])
def test_one_bad_batch_costs_its_step_and_is_reported(heads, tmp_path, poisoned, capsys, amp):
    poisoned(4, 4)
    train_vae.main(vae_flags(heads, tmp_path / "run", 7, "--run.amp", amp))
    assert "step 3: the loss is not finite; the step is skipped (1 in a row" in capsys.readouterr().out
    log = lines(tmp_path / "run")
    assert [line["skipped_steps"] for line in log] == [0, 0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in log] == [False, False, False, True, False, False, False]
    content = load(step_files(tmp_path / "run")[0])
    assert content["step"] == 7  # a skipped step counts
    assert all(v.isfinite().all() for v in content["model"].values())


def test_many_bad_batches_stop_the_run_and_the_last_checkpoint_is_good(heads, tmp_path, poisoned, capsys):
    poisoned(8, 99)
    flags = vae_flags(heads, tmp_path / "run", 20, "--run.max_bad_steps", "3")
    assert run_script(train_vae.main, flags) == 2
    err = one_line(capsys)
    assert "3 steps in a row were not finite, lastly the loss at step 9" in err
    assert "--run.init" in err
    content = load(step_files(tmp_path / "run")[0])
    assert content["step"] == 5
    assert all(v.isfinite().all() for v in content["model"].values())


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(call): the disk takes no file above 10 kB from the given call of runs.save on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(call: int) -> None:
        original, calls = runs.save, []

        def save(*arguments):
            calls.append(1)
            if len(calls) >= call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            try:
                original(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(runs, "save", save)

    return fill


def test_a_full_disk_ends_the_run_and_costs_the_steps_since_the_last_checkpoint(
    heads, tmp_path, whole, full_disk, capsys, monkeypatch
):
    full_disk(2)
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 12)) == 2
    err = one_line(capsys)
    assert "checkpoint" in err or "best.pt" in err
    assert "make room, then run the same command again" in err
    assert [p.name for p in step_files(tmp_path / "run")] == ["checkpoint_0000005.pt"]
    assert not list((tmp_path / "run").glob("*.tmp*"))
    monkeypatch.undo()
    train_vae.main(vae_flags(heads, tmp_path / "run", 12))
    assert_same_end(whole, tmp_path / "run")


def test_a_log_without_room_ends_the_run_with_a_line_and_a_picture_does_not(tmp_path, capsys):
    limits, logger = resource.getrlimit(resource.RLIMIT_FSIZE), Logger(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        logger.log(1, "train", {"loss": 1.0})
        with pytest.raises(InputError, match=r"log cannot be written .*run the same command again"):
            logger.log(2, "train", {"loss": 1.0, "a word": "x" * 100})
        assert save_sheet(tmp_path / "a.png", {"row": [torch.rand(30, 30).numpy()]}) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_room_for_cached_latents_is_reserved_before_a_memory_map_could_run_out_of_it(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"latents\.npy: no room for .* GiB of latents"):
            latents.reserve(tmp_path / "new" / "latents.npy", (100, 1, 2, 4, 8, 8, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("in_the_way", ["run", "run/log.jsonl/x", "run/previews"])
def test_a_run_folder_that_cannot_be_written_is_one_line(heads, tmp_path, capsys, in_the_way):
    path = tmp_path / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")  # for root, who may write everywhere, stands for a read-only folder
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 3)) == 2
    assert str(tmp_path / "run") in one_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder_is_one_line(heads, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 3)) == 2
    assert "cannot be written (Permission denied)" in one_line(capsys)


def test_a_truncated_newest_checkpoint_costs_the_steps_since_the_one_before(heads, tmp_path, whole, capsys):
    train_vae.main(vae_flags(heads, tmp_path / "run", 10))
    newest = step_files(tmp_path / "run")[0]
    newest.write_bytes(newest.read_bytes()[:5000])
    train_vae.main(vae_flags(heads, tmp_path / "run", 12))
    out = capsys.readouterr().out
    assert "checkpoint_0000010.pt: damaged" in out
    assert "going on from step 5 of 12" in out
    assert_same_end(whole, tmp_path / "run")


# --- the data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_goes_missing_is_named_and_the_run_goes_on_when_it_is_back(
    heads, tmp_path, whole, capsys, monkeypatch, workers
):
    shutil.copytree(heads, tmp_path / "heads")
    original, gone = VolumeDataset.__getitem__, tmp_path / "heads" / "images" / "away"

    def lose(dataset, item):  # at a step after the first checkpoint, in whichever process reads it
        path = dataset.cases[item[1]].image
        if dataset.training and item[0] >= 28 and not gone.exists():
            path.rename(gone)
        return original(dataset, item)

    more = ("--data.cache", "none", "--run.workers", workers)
    flags = vae_flags(tmp_path / "heads", tmp_path / "run", 12, *more)
    monkeypatch.setattr(VolumeDataset, "__getitem__", lose)
    assert run_script(train_vae.main, flags) == 2
    err = one_line(capsys)
    path = Path(err.removeprefix("error: ").split(": is gone")[0])
    assert path.parent == gone.parent
    assert "put it back, then the same command goes on" in err
    monkeypatch.undo()
    assert run_script(train_vae.main, flags) == 2  # still missing: found at the start
    assert path.stem.split(".")[0] in one_line(capsys)
    gone.rename(path)
    train_vae.main(flags)
    assert_same_end(whole, tmp_path / "run")


def test_a_worker_that_dies_ends_the_run_with_what_to_do(heads, tmp_path, whole, capsys, monkeypatch):
    original = VolumeDataset.__getitem__

    def die(dataset, item):
        if dataset.training and item[0] >= 28:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return original(dataset, item)

    monkeypatch.setattr(VolumeDataset, "__getitem__", die)
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 12, "--run.workers", "1")) == 2
    err = one_line(capsys)
    assert "a data-loading process died" in err
    assert "--run.workers" in err
    monkeypatch.undo()
    train_vae.main(vae_flags(heads, tmp_path / "run", 12, "--run.workers", "0"))
    assert_same_end(whole, tmp_path / "run")


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(heads, tmp_path, capsys):
    run = tmp_path / "run"
    train_vae.main(vae_flags(heads, run, 2))
    code = "import pathlib, sys, time\nfrom ldm3d.engine.runs import lock_folder\n"
    code += "file = lock_folder(pathlib.Path(sys.argv[1]))\n"
    holder = start("-c", code + "print(1, flush=True)\ntime.sleep(99)", run)
    assert holder.stdout.readline() == "1\n"
    for more in ((), ("--run.fresh",)):
        assert run_script(train_vae.main, vae_flags(heads, run, 4, *more)) == 2
        assert "another process is training here" in one_line(capsys)
    holder.kill()
    holder.communicate()
    assert run_script(train_vae.main, vae_flags(heads, run, 4)) == 0


def test_data_that_changed_since_the_run_was_started_are_refused(heads, tmp_path, capsys):
    train_vae.main(vae_flags(heads, tmp_path / "run", 5))
    content = load(step_files(tmp_path / "run")[0])
    content["state"]["data"]["spacing"] = [1.0, 1.0]
    torch.save(content, step_files(tmp_path / "run")[0])
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 9)) == 2
    assert "the data have changed since this run was started: spacing was [1.0, 1.0]" in one_line(capsys)


@pytest.mark.parametrize("kind", ["KL autoencoder", "denoiser", "segmentation, discriminator"])
def test_every_kind_of_training_refuses_to_go_on_when_all_intensities_have_changed(
    heads, vae_run, tmp_path, capsys, kind
):
    shutil.copytree(heads, tmp_path / "heads")
    place = ["--data.root", tmp_path / "heads"]
    _, *flags = command_of(kind, heads, vae_run, tmp_path / "run", 5, *place)
    main = importlib.import_module(KINDS[kind][0]).main
    main(flags)
    for path in sorted((tmp_path / "heads" / "images").iterdir()):
        volume = read(path)
        path.unlink()
        write(path, dataclasses.replace(volume, array=50 * volume.array + 3000))
    capsys.readouterr()
    assert run_script(main, [*flags, "--run.steps", "9"]) == 2
    assert "the data have changed since this run was started: the image of case" in one_line(capsys)
    assert load(step_files(tmp_path / "run")[0])["step"] == 5
    if kind == "denoiser":
        main([*flags, "--run.fresh"])
        assert "note: the data are not as the autoencoder's were: low was" in capsys.readouterr().out


def test_a_lost_split_is_that_of_the_checkpoint_and_another_one_is_refused(heads, tmp_path, capsys):
    flags = vae_flags(heads, tmp_path / "run", 5)
    train_vae.main(flags)
    path = tmp_path / "run" / "split.json"
    split = read_json(path)
    other = {"train": split["val"] + split["train"][2:], "val": split["train"][:2], "test": split["test"]}
    path.write_text(json.dumps(other))
    capsys.readouterr()
    assert run_script(train_vae.main, [*flags, "--run.steps", "6"]) == 2
    assert "split.json: differs from the split that this run was trained with" in one_line(capsys)
    path.unlink()
    train_vae.main([*flags, "--run.steps", "6", "--data.val_fraction", "0.2"])
    assert read_json(path) == split == load(step_files(tmp_path / "run")[0])["state"]["split"]


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizers": {}},
        {"optimizers": {"autoencoder": {"optimizer": {}, "scaler": {}, "bad_in_a_row": 0, "skipped": 0}}},
        {"others": {}},
        {"others": {"mean": {"ranks": [{"loss": "a word"}]}}},
        {"model": {"encoder": [1.0]}},
        {"config": {"run": 3}},
        {"state": {"data": 3, "split": 4}},
    ],
)
def test_a_checkpoint_with_parts_that_do_not_fit_is_a_line(vae_run, heads, tmp_path, capsys, damage):
    shutil.copytree(vae_run, tmp_path / "run")
    for path in step_files(tmp_path / "run"):
        torch.save({**torch.load(path, weights_only=True), **damage}, path)
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 12)) == 2
    assert str(tmp_path / "run") in one_line(capsys) or "config" in damage


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected a list of case ids under 'train'"),
        ('{"train": [1, 2], "val": [], "test": []}', "expected a list of case ids under 'train'"),
        ("[1]", "expected a JSON object"),
        (100_000 * "[", "nested too deeply"),
    ],
)
def test_a_damaged_split_is_a_line(vae_run, heads, tmp_path, capsys, text, words):
    shutil.copytree(vae_run, tmp_path / "run")
    (tmp_path / "run" / "split.json").write_text(text)
    assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 12)) == 2
    assert words in one_line(capsys)


@pytest.mark.parametrize("seconds", ["null", "NaN", '"x"', 900 * "[" + 900 * "]", "1e999"])
def test_damaged_lines_of_the_log_are_passed_over(vae_run, heads, tmp_path, seconds):
    shutil.copytree(vae_run, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    before = lines(tmp_path / "run")
    odd = f'{{"step": 9, "split": "train", "seconds": {seconds}}}\n'
    log.write_bytes(b"\xff\xfe\n" + log.read_bytes() + odd.encode())
    train_vae.main(vae_flags(heads, tmp_path / "run", 12))
    assert lines(tmp_path / "run")[: len(before)] == before
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 13))


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--run.fresh",)])
def test_a_start_that_failed_after_the_lock_leaves_a_folder_that_the_same_command_takes(
    heads, tmp_path, capsys, monkeypatch, more
):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_text", full)
    flags = vae_flags(heads, tmp_path / "run", 2)
    assert run_script(train_vae.main, flags) == 2
    assert "run: cannot be written (No space left on device)" in one_line(capsys)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "previews"}
    monkeypatch.undo()
    train_vae.main([*flags, *more])
    assert load(step_files(tmp_path / "run")[0])["step"] == 2


@pytest.mark.parametrize("mistake", ["--data.root /nowhere", "--vae.in_channels 3", "--run.init /nowhere"])
def test_fresh_checks_everything_before_the_old_run_is_moved(heads, tmp_path, capsys, mistake):
    flags = vae_flags(heads, tmp_path / "run", 2)
    train_vae.main(flags)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run_script(train_vae.main, [*flags, "--run.fresh", *mistake.split()]) == 2
    one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_a_newer_version_is_neither_passed_over_nor_overwritten(heads, tmp_path, capsys):
    flags = vae_flags(heads, tmp_path / "run", 10)
    train_vae.main(flags)
    newest = step_files(tmp_path / "run")[0]
    torch.save({**torch.load(newest, weights_only=True), "format": 99}, newest)
    before = {path: path.read_bytes() for path in step_files(tmp_path / "run")}
    assert len(before) == 2
    capsys.readouterr()
    assert run_script(train_vae.main, [*flags, "--run.steps", "12"]) == 2
    assert "format 99 is newer than this version reads" in one_line(capsys)
    assert {path: path.read_bytes() for path in step_files(tmp_path / "run")} == before


def test_a_finished_run_with_a_cosine_schedule_goes_on_along_the_longer_one(heads, tmp_path):
    cosine = ("--optim.schedule", "cosine")
    train_vae.main(vae_flags(heads, tmp_path / "run", 5, *cosine))
    train_vae.main(vae_flags(heads, tmp_path / "run", 10, *cosine))
    rates = [line["lr"] for line in lines(tmp_path / "run")]
    config = train_vae.OptimConfig(lr=2e-3, schedule="cosine")
    wanted = [training.lr_at(s, 5 if s < 5 else 10, config, 4) for s in range(10)]
    assert rates == pytest.approx(wanted)
    assert rates[5] > rates[4]  # half of the longer schedule is left


def test_fresh_is_not_remembered_and_the_copy_of_the_autoencoder_stays_the_one_in_use(vae_run, tmp_path):
    run = tmp_path / "run"
    train_ldm.main(ldm_flags(vae_run, run, 2))
    train_ldm.main(ldm_flags(vae_run, run, 2, "--run.fresh"))
    assert len(list(tmp_path.glob("run.old-*"))) == 1
    assert load(step_files(run)[0])["config"]["run"]["fresh"] is False
    gone = ldm_flags(vae_run, run, 4)
    train_ldm.main(gone)  # goes on; nothing is moved aside
    assert len(list(tmp_path.glob("run.old-*"))) == 1


def test_sampling_into_a_folder_that_cannot_be_made_is_one_line(vae_run, tmp_path, capsys):
    train_ldm.main(ldm_flags(vae_run, tmp_path / "run", 2))
    capsys.readouterr()
    (tmp_path / "file").write_text("in the way")
    flags = [str(tmp_path / "run"), "--num", "1", "--steps", "1", "--out", str(tmp_path / "file" / "out")]
    assert run_script(sample.main, flags) == 2
    assert "out:" in one_line(capsys)


# --- validation ---------------------------------------------------------------------------------------------


VALIDATED = ["--run.save_every", 1000, "--run.eval_every", 4]


@pytest.fixture(scope="module")
def validated(heads, vae_run, tmp_path_factory):
    """validated(kind): a run of six steps with two validations, which nothing happens to."""
    place = tmp_path_factory.mktemp("validated")

    def run(kind: str) -> Path:
        if not (place / kind).exists():
            train(*command_of(kind, heads, vae_run, place / kind, 6, *VALIDATED))
        return place / kind

    return run


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        pytest.param(kind, moment, marks=pytest.mark.slow if i and moment != "validation" else ())
        for i, kind in enumerate(("KL autoencoder", "denoiser", "segmentation, discriminator"))
        for moment in ("validation", "best.pt", "picture")
    ],
)
def test_what_fails_in_validation_costs_no_step_and_the_validation_is_made_up_for(
    heads, vae_run, tmp_path, monkeypatch, capsys, validated, kind, moment
):
    script, whole = importlib.import_module(KINDS[kind][0]), validated(kind)
    target = {"validation": (script, "evaluate"), "best.pt": (runs.Run, "keep_best")}
    original, handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def full(*arguments, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(*target.get(moment, (script, "save_sheet")), full)
    _, *flags = command_of(kind, heads, vae_run, tmp_path / "run", 6, *VALIDATED)
    with pytest.raises((RuntimeError, InputError)) as failure:  # the traceback is held, as in a notebook
        script.main(flags)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (original, handlers)
    if moment != "best.pt":
        for words in ("memory is full", "in validation", "--window" if "seg" in kind else "data.size"):
            assert words in str(failure.value)
    assert load(step_files(tmp_path / "run")[0])["step"] == 4
    assert not lines(tmp_path / "run", "val")
    monkeypatch.undo()
    script.main(flags)
    assert "going on from step 4 of 6" in capsys.readouterr().out
    assert_same_end(whole, tmp_path / "run")
    best = [load(folder / "best.pt") for folder in (whole, tmp_path / "run")]
    assert_equal(best[0]["ema"], best[1]["ema"])
    assert best[0]["best"] == best[1]["best"]


def test_a_run_that_ended_in_its_last_validation_makes_up_for_it(heads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_vae, "evaluate", lambda *_: 1 / 0)
    flags = vae_flags(heads, tmp_path / "run", 3)
    with pytest.raises(ZeroDivisionError):
        train_vae.main(flags)
    monkeypatch.undo()
    train_vae.main(flags)
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [3]
    assert load(tmp_path / "run" / "best.pt")["best"]["step"] == 3
    capsys.readouterr()
    train_vae.main(flags)
    assert "finished at step 3; nothing to do" in capsys.readouterr().out


# --- processes ----------------------------------------------------------------------------------------------


def test_an_error_on_one_rank_in_the_middle_of_training_ends_all_within_seconds(heads, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, train_vae\n"
        "from ldm3d.engine.distributed import rank, run_script\n"
        "from ldm3d.config import InputError\n"
        "original, calls = train_vae.gradient_loss, []\n"
        "def fail(*arguments):\n"
        "    calls.append(1)\n"
        "    if rank() == 1 and len(calls) == 7:\n"
        "        raise InputError('case 17 is made of cheese')\n"
        "    return original(*arguments)\n"
        "train_vae.gradient_loss = fail\n"
        "sys.exit(run_script(train_vae.main))\n"
    )
    process = torchrun(driver, *vae_flags(heads, tmp_path / "run", 1000), port=1)
    while not step_files(tmp_path / "run"):  # of step 5: the error comes in the step after the next
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    failing = time.time()
    _, err = process.communicate(timeout=100)
    assert time.time() - failing < 30
    assert process.returncode != 0
    ours = "rank 1: error: case 17 is made of cheese"
    words = [line.strip() for line in err.splitlines() if line.strip()]
    assert words[0] == ours or words[1] == ours  # rank 0 may be faster to say in a line that it lost rank 1
    assert words[-2:] == [f"traceback : {ours}", "=" * 60]
    assert "Traceback" not in err.split("torch/distributed")[0]
    assert [p.name for p in step_files(tmp_path / "run")] == ["checkpoint_0000005.pt"]


@pytest.mark.slow  # how torchrun ends a job: the test above, and that rank 0 alone reads: test_distributed
def test_a_bad_file_under_torchrun_is_the_first_and_the_last_that_is_said(heads, tmp_path):
    shutil.copytree(heads, tmp_path / "heads")
    path = tmp_path / "heads" / "images" / "phantom_0003.tif"
    path.write_bytes(b"")
    process = torchrun(ROOT / "train_vae.py", *vae_flags(tmp_path / "heads", tmp_path / "run", 2), port=2)
    _, err = process.communicate(timeout=100)
    words = [line.strip() for line in err.splitlines() if line.strip() and "OMP_NUM" not in line]
    assert process.returncode != 0
    assert words[0].startswith("rank 0: error: ")
    assert "phantom_0003.tif" in words[0]
    assert words[-2] == f"traceback : {words[0]}"


def test_memory_that_runs_out_on_the_cpu_is_one_line(heads, tmp_path, capsys, monkeypatch):
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**62)):
        monkeypatch.setattr(train_vae, "gradient_loss", lambda *_, allocate=allocate: allocate())
        assert run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 2)) == 2
        line = one_line(capsys)
        assert line.startswith("error: the memory is full")
        assert "micro_batch_size" in line


def test_a_signal_right_after_the_look_for_one_never_ends_a_run_at_a_step_that_is_not_saved(
    heads, tmp_path, monkeypatch, capsys
):
    looks = []

    def look(value: bool) -> bool:
        looks.append(value)
        if len(looks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(runs, "any_rank", look)
    flags = vae_flags(heads, tmp_path / "run", 9, "--run.save_every", "100", "--run.eval_every", "100")
    assert run_script(train_vae.main, flags) == 143
    assert "stopped: saved step 3;" in capsys.readouterr().out
    assert [load(path)["step"] for path in step_files(tmp_path / "run")] == [3]


def test_sigterm_ends_a_validation_between_two_cases_on_all_ranks(heads, tmp_path, monkeypatch):
    original, calls = train_vae.psnr, []

    def psnr(*arguments, **more):
        calls.append(1)
        print("a case", flush=True)
        if rank() == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **more)

    def on_each_rank():
        with (tmp_path / f"rank {rank()}").open("w") as file, contextlib.redirect_stdout(file):
            run_script(train_vae.main, vae_flags(heads, tmp_path / "run", 9, *more))

    more = ["--run.eval_every", "3", "--run.save_every", "100", "--data.val_fraction", "0.75"]
    monkeypatch.setattr(train_vae, "psnr", psnr)
    assert on_two_ranks(on_each_rank) == [143, 143]
    said = [(tmp_path / f"rank {number}").read_text() for number in (0, 1)]
    assert "stopped: saved step 3; the same command goes on from there" in said[0]
    assert [text.count("a case") for text in said] == [2, 2]  # of nine cases
    assert [load(path)["step"] for path in step_files(tmp_path / "run")] == [3]
    assert not lines(tmp_path / "run", "val")


def test_a_process_ends_though_its_workers_ignore_sigterm_and_their_stream_is_still_held():
    code = (
        "import builtins, gc, torch\n"
        "from ldm3d.data import batches\n"
        "class Numbers(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, item): return {'image': torch.zeros(1), 'index': item[1]}\n"
        "gc.disable()\n"
        "builtins.held = batches(Numbers(), 2, 2, 0, 0, 100, workers=2)\n"
        "next(builtins.held)\n"
        "builtins.held.gi_frame.f_locals['stream'].cycle = builtins.held\n"
    )
    process = start("-c", code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_to_every_process_of_a_job_saves_and_exits_143(heads, tmp_path, workers):
    flags = vae_flags(heads, tmp_path / "run", 100_000, "--run.workers", workers)
    process = start(ROOT / "train_vae.py", *flags, start_new_session=True)
    while not step_files(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # workers included, as a scheduler does it
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped: saved step" in out


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["os.replace", "os.fsync"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(heads, tmp_path, whole, moment):
    code = (
        "import os, signal, sys, ldm3d.engine.checkpoint as c, train_vae\n"
        f"original = {moment}\n"
        "def kill(*arguments):\n"
        "    if os.path.exists(sys.argv[1] + '/checkpoint_0000005.pt'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*arguments)\n"
        f"{moment} = kill\n"
        "train_vae.main(sys.argv[2:])\n"
    )
    flags = vae_flags(heads, tmp_path / "run", 12)
    process = start("-c", code, tmp_path / "run", *flags)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "run").glob("*.tmp*"))
    train_vae.main(flags)
    assert not list((tmp_path / "run").glob("*.tmp*"))  # swept
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.slow
def test_no_space_left_on_a_small_file_system_is_one_line(heads, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", mount], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system")
    try:
        process = start(ROOT / "train_vae.py", *vae_flags(heads, mount / "run", 40, "--run.keep", "40"))
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2, err
        assert "No space left on device" in err
        assert load(step_files(mount / "run")[0])["step"] >= 5
    finally:
        subprocess.run(["umount", mount], check=True)


def test_dropout_differs_between_micro_batches_ranks_and_steps_and_noise_between_samples():
    draws = []
    for key in [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0), (1, 1, 0, 0)]:
        reseed(*key)
        draws.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    draws += [keyed_normal(0, torch.tensor([p]), (64,), "noise")[0] for p in (0, 1)]
    for i, a in enumerate(draws):
        assert all(not torch.equal(a, b) for b in draws[:i])
