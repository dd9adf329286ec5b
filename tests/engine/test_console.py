"""The console says what a person must know: before the run, in each of its lines, and what comes next."""

import contextlib
import io
import re
import shlex
import sys
import time

import pytest
import tiny
import torch

import sample
import train_ldm
from ldm3d.config import InputError, parse
from ldm3d.engine import distributed
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.distributed import choose_device, why_no_cuda
from ldm3d.engine.logger import Logger, console_line
from ldm3d.engine.machine import describe_device

CPU = torch.device("cpu")
KINDS = {"vae": "KL autoencoder, discriminator", "ldm": "denoiser", "cdal": "segmentation, discriminator"}


@pytest.fixture(scope="module", params=KINDS)
def said(request, heads, vae_run, tmp_path_factory):
    """(kind, run folder, what a training of four steps printed)."""
    folder = tmp_path_factory.mktemp("console") / request.param
    more = ["--run.log_every", 2, "--run.eval_every", 4, "--micro_batch_size", 2]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tiny.train(*tiny.command_of(KINDS[request.param], heads, vae_run, folder, 4, *more))
    return request.param, folder, out.getvalue()


# --- before the first step ----------------------------------------------------------------------------------


def test_the_first_lines_of_a_run_say_what_it_is_and_are_no_more_than_a_dozen(said, heads):
    kind, folder, out = said
    first = out[: out.index("step 2 of 4")].splitlines()
    assert first[0] == f"{folder}: new run of 4 steps"
    assert len(first) <= 12
    assert max(map(len, first)) <= 110 + len(str(folder))
    facts = {line[2:14].strip(): line[15:] for line in first[1:]}
    assert re.fullmatch(rf"cpu, {torch.get_num_threads()} threads?, fp32", facts["device"])
    weights = load(step_files(folder)[0])["model"]
    num = sum(value.numel() for value in weights.values())
    name = {"vae": "autoencoder", "ldm": "denoiser", "cdal": "generator"}[kind]
    assert facts["parameters"].startswith(f"{name} {num / 1000:.3g} k")
    assert ("autoencoder 1" in facts["parameters"] and "(frozen)" in facts["parameters"]) == (kind == "ldm")
    split = load(step_files(folder)[0])["state"]["split"]
    assert facts["cases"].startswith(f"train {len(split['train'])}, val {len(split['val'])}")
    assert facts["data"] == str(heads)
    assert facts["grid"].startswith("16x20 voxels of 12x11 mm, 1 channel, 5 labels")
    assert ("patches of 12x12" in facts["grid"]) == (kind == "cdal")
    assert " in the files become -1 to 1 (" in facts["intensities"]
    assert facts["batch"] == "4 samples a step, 2 per forward pass"
    seen = f"each training case is seen {4 * 4 / len(split['train']):.3g} times"
    assert facts["steps"] == f"4, validation every 4, checkpoint every 5; {seen}"
    assert str(folder) in facts["files"]
    assert ("4x5 voxels of 3 channels" in facts.get("latents", "")) == (kind == "ldm")


def test_a_cpu_beside_an_nvidia_device_says_why_and_asking_for_the_device_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "NVIDIA", (str(tmp_path / "nothing"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert why_no_cuda() is None
    assert "NOTE" not in describe_device(CPU, "auto")
    with pytest.raises(InputError, match=r"torch sees no CUDA device$"):
        choose_device("cuda")
    monkeypatch.setattr(distributed, "NVIDIA", (str(tmp_path),))  # the driver is there
    monkeypatch.setattr(torch.version, "cuda", None)
    built = f"torch {torch.__version__} is built without CUDA"
    assert why_no_cuda() == built
    assert describe_device(CPU, "auto").endswith(f"but torch cannot use it: {built}")
    assert "NOTE" not in describe_device(CPU, "auto", chosen=True)
    with pytest.raises(InputError, match=f"sees no CUDA device: {re.escape(built)}"):
        choose_device("cuda")

    def broken():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 9000)")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", broken)
    assert why_no_cuda() == "The NVIDIA driver on your system is too old (found version 9000)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_cuda() == "CUDA_VISIBLE_DEVICES hides every device"


# --- a line a step ------------------------------------------------------------------------------------------


def test_a_line_has_the_losses_the_speed_and_the_time_left_and_the_log_has_everything(said):
    kind, folder, out = said
    shown = re.findall(r"^step .*", out, re.MULTILINE)
    heads = [line.split("  ")[:2] for line in shown]
    assert heads == [["step 2 of 4", "train"], ["step 4 of 4", "train"], ["step 4 of 4", "val"]]
    assert max(map(len, shown)) <= 110
    assert re.search(r"loss [\d.]+  .*  [\d.]+ samples/s  left \d+ s$", shown[0])
    assert "left" not in shown[1] + shown[2]  # the run is over
    logged = tiny.lines(folder)[0]
    assert f"loss {logged['loss']:.4g}" in shown[0]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "skipped_steps",
        "samples_per_s",
        "data_wait",
        "peak_gib",
    } <= logged.keys()
    assert {"vae": "psnr", "ldm": "loss", "cdal": "dice"}[kind] + " " in shown[2]


def test_a_line_fits_the_console_and_shows_first_what_the_script_names_and_what_is_wrong():
    figures = {f"figure_{i}": 1.0 for i in range(20)} | {"loss": 0.123456, "loss_u0.2": 9.0, "psnr": 31.25}
    cost = {"lr": 1e-3, "grad_norm": 2.0, "skipped_steps": 0, "samples_per_s": 3.14159, "data_wait": 0.1}
    line = console_line(7, 5000, "train", figures | cost, ("psnr", "loss"), 3725.0)
    assert line.startswith("step    7 of 5000  train  psnr 31.25  loss 0.1235  figure_0 1  figure_1 1")
    assert line.endswith("3.14 samples/s  left 1 h 02 min")
    assert 90 < len(line) <= 110
    assert not {"u0.2", "skipped", "waiting", "grad_norm"} & set(re.split(r"[ _]+", line))
    trouble = console_line(7, 5000, "train", figures | cost | {"skipped_steps": 3, "data_wait": 0.45})
    assert trouble.endswith("waiting for data 45%  skipped steps 3  3.14 samples/s")
    assert len(trouble) <= 110


def test_a_line_is_in_the_file_of_a_batch_system_as_soon_as_it_is_printed(tmp_path, monkeypatch):
    with open(tmp_path / "job.out", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        logger = Logger(tmp_path, 0, steps=5)
        logger.log(1, "train", {"loss": 0.5})
        assert (tmp_path / "job.out").read_text() == "step 1 of 5  train  loss 0.5\n"
        monkeypatch.undo()
    logger.close()


def test_the_time_left_is_that_of_the_mean_pace_and_the_end_is_said_once(tmp_path, monkeypatch, capsys):
    from test_training import begin, open_run

    run = begin(open_run(tmp_path, **{"run.steps": 100, "run.log_every": 1000}))
    now = [500.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert run.time_left() is None
    capsys.readouterr()
    for step in range(1, 5):  # the first step takes 60 s, which do not count, the others 4 s
        now[0] += 60 if step == 1 else 4
        run.end_step()
    assert run.time_left() == pytest.approx(4 * 96)
    said = capsys.readouterr().out
    assert said.startswith("the last step is expected in 6 min 24 s, at ")
    for _ in range(3):
        now[0] += 10
        run.end_step()
    assert run.time_left() == pytest.approx((3 * 4 + 3 * 10) / 6 * 93)
    assert capsys.readouterr().out == ""


# --- what comes next ----------------------------------------------------------------------------------------


def test_the_end_of_a_run_names_a_command_that_works(said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs/ldm-phantom is
    kind, folder, out = said
    program, script, *words = shlex.split(re.search(r"^next: (.*)$", out, re.MULTILINE)[1])
    assert program == "python"
    if kind == "vae":
        assert script == "train_ldm.py"
        config, _ = parse(train_ldm.Config, words, train_ldm.PRESETS, base=train_ldm.with_autoencoder)
        assert config.vae == str(folder)
        assert config.data.dims == 2  # that of the autoencoder
    else:
        assert (script, words[0]) == ("sample.py", str(folder))
        sample.main(words)
        assert any(folder.glob("samples-*" if kind == "ldm" else "segmentations-*")), list(folder.iterdir())
