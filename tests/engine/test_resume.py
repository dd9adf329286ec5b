"""Killed five times at random moments, each time started by the same command: the end is bit-identical."""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ROOT, cdal_flags, kill_all, ldm_flags, lines, start, torchrun, vae_flags

from ldm3d.engine.checkpoint import load, step_files

CRITIC = """--autoencoder vq --quantizer.codebook_size 16 --disc_weight 0.1 --feature_weight 0.1
 --disc_start 10 --disc.channels 4 --disc.num_layers 1 --r1_weight 1 --r1_every 4""".split()


def last_step(run: Path) -> int:
    """The last step in the log, 0 before there is one."""
    with contextlib.suppress(OSError, ValueError):  # a line is being written
        return max((line["step"] for line in lines(run)), default=0)
    return 0


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, EMA, optimizers, loss scales and logged losses, bit by bit."""
    a, b = (load(step_files(run)[0]) for run in (one, other))
    assert (a["step"], a["best"]) == (b["step"], b["best"])
    critics = [content["others"].get("discriminator", {}) for content in (a, b)]
    for part, x, y in [("critic", *critics)] + [(part, a[part], b[part]) for part in ("model", "ema")]:
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), part
    for name, state in a["optimizers"].items():
        other_state = b["optimizers"][name]
        assert state["scaler"] == other_state["scaler"]
        for k, slots in state["optimizer"]["state"].items():
            theirs = other_state["optimizer"]["state"][k]
            assert all(torch.equal(v, theirs[slot]) for slot, v in slots.items())
    for split in ("train", "val"):
        logs = [[(line["step"], line.get("loss")) for line in lines(run, split)] for run in (one, other)]
        assert logs[0] == logs[1]


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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", ["train_vae", "train_ldm", "train_cdal"])
def test_five_kills_at_random_moments_change_nothing(heads, vae_run, tmp_path, script, workers, ranks):
    more = ["--run.workers", workers, "--run.amp", "fp16" if workers else "fp32", "--micro_batch_size", 1]
    more += ["--run.log_every", 3]  # saved every 5: between two lines of the log

    def launch(run: str):
        if script == "train_vae":
            flags = vae_flags(heads, tmp_path / run, 60, *more, *(CRITIC if workers else ()))
        elif script == "train_cdal":
            flags = cdal_flags(heads, tmp_path / run, 60, *more, "--unet.dropout", 0.2)
        else:
            flags = ldm_flags(vae_run, tmp_path / run, 60, *more, "--unet.dropout", 0.2)
        process = start if ranks == 1 else torchrun
        return process(ROOT / f"{script}.py", *flags)

    draw = np.random.default_rng(10 * workers + ranks)
    kills = [run_and_kill(lambda: launch("killed"), tmp_path / "killed", draw) for _ in range(5)]
    assert all(kills)
    for run in ("killed", "whole"):
        process = launch(run)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
