"""A run shows what it does: log, a bar on a terminal, TensorBoard, a profile, and figures that are true."""

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ldm_flags, lines, vae_flags

import sample
import train_ldm
import train_vae
from ldm3d import latents
from ldm3d.config import InputError
from ldm3d.data import dataset, inspection
from ldm3d.engine import logger, runs
from ldm3d.engine.logger import Logger, Profile, cut_back, progress
from ldm3d.engine.training import Speed
from ldm3d.inference import sampling

CPU = torch.device("cpu")


# --- the log ------------------------------------------------------------------------------------------------


def test_every_training_line_has_loss_rate_speed_memory_and_waiting(vae_run):
    log = lines(vae_run)
    assert [line["step"] for line in log] == list(range(1, 11))
    for line in log:
        assert {"loss", "reconstruction", "kl", "lr", "grad_norm", "skipped_steps"} <= line.keys()
        assert line["samples_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 0.05 < line["peak_gib"] < 100  # of this process
    assert [line["step"] for line in lines(vae_run, "val")] == [10]


def test_speed_counts_steps_and_waiting_and_not_what_comes_between_steps():
    speed = Speed(8, CPU)

    def slow_data():
        for item in range(5):
            time.sleep(0.03)
            yield item

    for _ in speed.watch(slow_data()):
        time.sleep(0.01)  # the step
        speed.stop()
        time.sleep(0.1)  # evaluation
    report = speed.pop()
    assert report["data_wait"] == pytest.approx(0.75, abs=0.1)
    assert report["samples_per_s"] == pytest.approx(8 / 0.04, rel=0.25)
    assert speed.pop()["samples_per_s"] == 0  # starts anew


def test_what_is_not_finite_is_null_since_json_knows_no_nan(tmp_path):
    logger = Logger(tmp_path, 0)
    logger.log(1, "train", {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    logger.close()

    def refuse(word):
        raise AssertionError(word)

    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["lr"]) == (None, None, 0.1)


def test_the_seconds_of_a_resumed_run_go_on_from_the_last_line_that_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    first, second = (json.dumps({"step": n, "split": "train", "seconds": 100.0 * n}) + "\n" for n in (1, 2))
    path.write_text(first + second + '{"step": 3, "seco')
    assert cut_back(path, 1) == 100.0
    assert path.read_text() == first
    logger = Logger(tmp_path, 1)
    logger.log(2, "train", {})
    logger.close()
    assert 100 <= json.loads(path.read_text().splitlines()[1])["seconds"] < 110


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_rate_loss_and_remaining_time_and_elsewhere_nothing(
    heads, tmp_path, monkeypatch
):
    original = train_vae.gradient_loss
    monkeypatch.setattr(train_vae, "gradient_loss", lambda *a: (time.sleep(0.15), original(*a))[1])
    monkeypatch.setattr(sys, "stderr", Terminal())
    train_vae.main(vae_flags(heads, tmp_path / "run", 4))
    shown = sys.stderr.getvalue()
    assert re.search(r"vae: .*\[\d\d:\d\d<\d\d:\d\d, .*(it/s|s/it), loss=[\d.]+\]", shown), shown
    assert "validation" in shown
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert quiet.getvalue() == ""


def test_without_a_terminal_long_work_says_every_30_seconds_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def work(seconds, what, **options):
        for _ in progress(range(10), what, **options):
            now[0] += seconds

    work(20, "encoding")
    said = ["encoding: 2 of 10, 2 min 40 s left", "encoding: 4 of 10, 2 min 00 s left"]
    assert capsys.readouterr().out.splitlines()[:2] == said
    work(2, "quick work")
    work(40, "a loop with lines of its own", lines=False)
    monkeypatch.setattr(logger, "is_main", lambda: False)
    work(40, "another rank")
    assert capsys.readouterr().out == ""


def test_every_long_work_of_the_two_stages_has_a_bar(heads, vae_run, tmp_path, monkeypatch):
    shown = set()
    real = logger.progress

    def watched(items, what, *more, **named):
        shown.add(what)
        return real(items, what, *more, **named)

    for module in (dataset, inspection, latents, runs, sampling):
        monkeypatch.setattr(module, "progress", watched)
    disk = ["--data.cache", "disk", "--data.cache_dir", tmp_path / "cache"]
    train_vae.main(vae_flags(heads, tmp_path / "vae", 1, *disk))
    assert shown == {"headers", "reading every voxel once", "preparing", "validation", "vae"}
    assert len(list((tmp_path / "cache").glob("volumes/*.bricks"))) == 36  # images, sources and masks
    shown.clear()
    train_ldm.main(ldm_flags(vae_run, tmp_path / "ldm", 1, "--data.cache_dir", tmp_path / "other"))
    assert shown == {"headers", "reading every voxel once", "loading", "encoding", "validation", "ldm"}
    shown.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    sample.main([str(tmp_path / "ldm"), "--num", "1", "--steps", "3"])
    assert shown == {"sampling"}
    assert re.search(r"ab2: .*/3 ", sys.stderr.getvalue())  # the steps of a batch


# --- TensorBoard --------------------------------------------------------------------------------------------


def events(run: Path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(
        str(run / "tensorboard"), {"scalars": 0, "histograms": 0, "images": 0}
    )
    found.Reload()
    return found


@pytest.mark.parametrize("script", ["vae", "ldm"])
def test_tensorboard_holds_scalars_previews_and_histograms_of_latents_once_each(
    script, heads, vae_run, tmp_path
):
    pytest.importorskip("tensorboard")
    for steps in (5, 12):  # resumed once
        if script == "vae":
            train_vae.main(vae_flags(heads, tmp_path / "run", steps, "--run.tensorboard"))
        else:
            train_ldm.main(ldm_flags(vae_run, tmp_path / "run", steps, "--run.tensorboard"))
    found, log = events(tmp_path / "run"), lines(tmp_path / "run")
    assert [e.step for e in found.Scalars("train/loss")] == list(range(1, 13))
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx([line["loss"] for line in log])
    name = {"vae": "psnr", "ldm": "loss"}[script]
    assert [e.step for e in found.Scalars(f"val/{name}")] == [5, 10, 12]
    tags = found.Tags()
    picture, latent = {"vae": ("reconstructions", "latent"), "ldm": ("samples", "generated latent")}[script]
    assert tags["images"] == [picture]
    assert tags["histograms"] == [f"{latent}/channel {c}" for c in range(3)]
    assert [e.step for e in found.Histograms(f"{latent}/channel 0")] == [5, 10, 12]


def test_steps_that_a_killed_run_will_repeat_are_purged_from_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    for first, last in ((0, 8), (5, 9)):  # killed after step 8, its last checkpoint is of step 5
        logger = Logger(tmp_path, first, tensorboard=True)
        for step in range(first + 1, last + 1):
            logger.log(step, "train", {"loss": float(10 * first + step)})
        logger.close()
        time.sleep(1.1)  # the names of its files differ by the second
    shown = [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")]
    assert shown == [(s, s) for s in range(1, 6)] + [(s, 50 + s) for s in range(6, 10)]


def test_tensorboard_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r'run\.tensorboard: needs the extra "viz"'):
        Logger(tmp_path, 0, tensorboard=True)


# --- the profile --------------------------------------------------------------------------------------------


def test_profile_writes_a_trace_of_a_few_steps_and_prints_the_ten_dearest_operators(heads, tmp_path, capsys):
    train_vae.main(vae_flags(heads, tmp_path / "run", 8, "--run.profile"))
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::convolution" in names or "aten::mkldnn_convolution" in names
    out = capsys.readouterr().out
    table = out[out.index("Self CPU %") : out.index("Self CPU time total")]
    rows = [line for line in table.splitlines() if re.search(r"\d%", line)]
    assert len(rows) == 10
    assert "profile of 3 steps" in out
    train_vae.main(vae_flags(heads, tmp_path / "run", 9))  # it changes nothing and may be left out


def test_a_run_that_ends_during_its_profile_reports_the_steps_so_far(tmp_path, capsys):
    profile = Profile(tmp_path)
    for _ in range(4):
        torch.ones(3).exp()
        profile.step()
    profile.close()
    assert "profile of 1 steps" in capsys.readouterr().out
    assert "aten::exp" in (tmp_path / "profile.json").read_text()
