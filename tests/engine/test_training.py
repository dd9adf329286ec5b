"""The parts of a training loop do what their formulas say, and a bad step never reaches the weights."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tiny import start, vae_flags
from torch import nn

from ldm3d.config import InputError, replace
from ldm3d.engine import training
from ldm3d.engine.checkpoint import load
from ldm3d.engine.distributed import keyed_generator
from ldm3d.engine.logger import Logger, mid_slices, save_sheet
from ldm3d.engine.runs import Run
from ldm3d.engine.training import (
    EMA,
    Mean,
    OptimConfig,
    RunConfig,
    Stepper,
    keyed_normal,
    keyed_uniform,
    lr_at,
    micro_batches,
    reseed,
    samples_per_forward,
    stratified_uniform,
)

CPU = torch.device("cpu")
SPLIT = {"train": ["a"], "val": ["b"], "test": []}


@dataclass(frozen=True)
class Config:
    preset: str = "p"  # name
    batch_size: int = 4  # samples
    width: int = 2  # of the net
    vae: str | None = None  # a run
    run: RunConfig = field(default_factory=RunConfig)


def make_stepper(net, **run):
    return Stepper(net, OptimConfig(lr=0.1, grad_clip=None), RunConfig(steps=10, **run), 4, CPU)


# --- learning rate, randomness, averages --------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    rates = [lr_at(s, 110, config, 8) for s in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[110] == pytest.approx(0.1)
    steps = OptimConfig(lr=1.0, schedule="multistep", milestones=(5, 8), gamma=0.1)
    assert [round(lr_at(s, 10, steps, 8), 6) for s in (4, 5, 7, 8)] == [1, 0.1, 0.1, 0.01]


def test_the_learning_rate_scales_with_the_batch():
    for scaling, factor in [("none", 1), ("sqrt", 2), ("linear", 4)]:
        config = OptimConfig(lr=1.0, lr_scaling=scaling, reference_batch_size=8)
        assert lr_at(0, 10, config, 32) == pytest.approx(factor)


def test_randomness_depends_on_the_sample_and_the_purpose_alone():
    together = keyed_normal(3, torch.tensor([5, 6, 7]), (2, 3), "noise")
    alone = keyed_normal(3, torch.tensor([6]), (2, 3), "noise")
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(keyed_normal(3, torch.tensor([6]), (2, 3), "other")[0], alone[0])
    assert not torch.equal(keyed_normal(4, torch.tensor([6]), (2, 3), "noise")[0], alone[0])
    draws = keyed_normal(0, torch.arange(20_000), (1,), "noise").flatten()
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.std()) - 1) < 0.02
    u = keyed_uniform(0, torch.arange(20_000), "t")
    assert float((u.sort()[0] - torch.linspace(0, 1, 20_000)).abs().max()) < 0.02  # Kolmogorov-Smirnov


def test_the_numbers_of_a_batch_are_evenly_apart_however_it_is_spread():
    u = stratified_uniform(0, torch.arange(20_000), 4, "t")
    assert float((u.sort()[0] - torch.linspace(0, 1, 20_000)).abs().max()) < 0.02
    rows = u.view(-1, 4).sort(1)[0]
    torch.testing.assert_close(rows.diff(dim=1), torch.full((5_000, 3), 0.25))
    assert rows.min() >= 0
    assert rows.max() < 1
    assert torch.equal(stratified_uniform(0, torch.tensor([9, 6]), 4, "t"), u[[9, 6]])
    assert torch.equal(stratified_uniform(0, torch.arange(5), 1, "t"), keyed_uniform(0, torch.arange(5), "t"))


def test_neighbouring_keys_give_unrelated_numbers():
    a = torch.randn(1000, generator=keyed_generator(0, 1, "noise"))
    b = torch.randn(1000, generator=keyed_generator(0, 2, "noise"))
    assert abs(float((a * b).mean())) < 0.1


def test_dropout_is_keyed_by_step_rank_and_micro_batch():
    def draw(*key):
        reseed(*key)
        return torch.rand(4)

    assert torch.equal(draw(0, 5, 1, 2), draw(0, 5, 1, 2))
    assert not torch.equal(draw(0, 5, 1, 2), draw(0, 5, 1, 3))
    assert not torch.equal(draw(0, 5, 1, 2), draw(0, 6, 1, 2))


def test_the_ema_follows_its_recursion_and_copies_buffers():
    net = nn.BatchNorm1d(2)
    ema, expected = EMA(net, 0.5), net.weight.detach().double().clone()
    for step in range(6):
        with torch.no_grad():
            net.weight.add_(1.0)
            net.running_mean.add_(1.0)
        ema.update(net, step)
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * net.weight.detach().double()
    assert torch.allclose(ema.net.weight.double(), expected, atol=1e-6)
    assert torch.equal(ema.net.running_mean, net.running_mean)
    assert not any(p.requires_grad for p in ema.net.parameters())


def test_means_are_over_samples_leave_nan_out_and_start_anew():
    mean = Mean()
    mean.add(a=torch.tensor([1.0, 2.0, math.nan]), b=torch.tensor(5.0))
    mean.add(a=torch.tensor([6.0]))
    assert mean.pop() == {"a": 3.0, "b": 5.0}
    assert mean.pop() == {}


# --- the step -----------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_give_the_gradient_of_the_joined_batch():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1), torch.randn(6, 3)
    net(x).square().mean().backward()
    joined, net.weight.grad = net.weight.grad.clone(), None
    parts = [{"x": x[:4], "position": torch.arange(4)}, {"x": x[4:], "position": torch.arange(4, 6)}]
    for batch, fraction in micro_batches(parts, net, CPU, 0, 0):
        (net(batch["x"]).square().mean() * fraction).backward()
    assert torch.allclose(net.weight.grad, joined, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_is_skipped_counted_and_named_and_the_next_good_one_trains_on(bad, capsys):
    net = nn.Linear(2, 1)
    stepper, before = make_stepper(net), net.weight.detach().clone()
    stepper.backward(net(torch.full((1, 2), bad)).mean())
    assert not stepper.step(0)
    assert torch.equal(net.weight, before)
    assert "step 0: the loss is not finite" in capsys.readouterr().out
    stepper.backward(net(torch.ones(1, 2)).mean())
    assert stepper.step(1)
    assert (stepper.skipped, stepper.bad_in_a_row) == (1, 0)
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("grad_clip", [1.0, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_gradient_that_is_not_finite_is_the_one_that_is_named(grad_clip, bad, capsys):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    stepper = Stepper(net, OptimConfig(grad_clip=grad_clip), RunConfig(), 4, CPU)
    net[1].bias.register_hook(lambda grad: grad + bad)
    stepper.backward(net(torch.ones(1, 2)).mean())
    assert not stepper.step(0)
    assert "the gradient of 1.bias is not finite" in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_stop_the_run_with_what_to_do():
    net = nn.Linear(2, 1)
    stepper = make_stepper(net, max_bad_steps=3)
    for step in range(3):
        stepper.backward(net(torch.full((1, 2), math.nan)).mean())
        if step == 2:
            with pytest.raises(InputError, match=r"3 steps in a row.*optim\.lr"):
                stepper.step(step)
        else:
            stepper.step(step)


def test_the_gradient_is_clipped_to_its_norm():
    net = nn.Linear(2, 1, bias=False)
    stepper = Stepper(net, OptimConfig(grad_clip=0.5), RunConfig(), 4, CPU)
    stepper.backward(net(torch.full((1, 2), 100.0)).sum())
    seen = []
    stepper.optimizers["optimizer"].register_step_pre_hook(
        lambda *_: seen.append(float(net.weight.grad.norm()))
    )
    stepper.step(0)
    assert seen == [pytest.approx(0.5, rel=1e-4)]
    assert stepper.grad_norm == pytest.approx(math.sqrt(2) * 100, rel=1e-4)


def test_fp16_on_cpu_scales_the_loss_and_an_overflow_lowers_the_scale():
    net = nn.Linear(2, 1)
    stepper = make_stepper(net, amp="fp16")
    scale = stepper.scaler.get_scale()
    stepper.backward(net(torch.full((1, 2), 1e38)).sum() * 1e3)
    assert not stepper.step(0)
    assert stepper.scaler.get_scale() == scale / 2
    stepper.backward(net(torch.ones(1, 2)).mean())
    assert stepper.step(1)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    assert samples_per_forward(8, None) == 8
    assert samples_per_forward(8, 3) == 3
    with pytest.raises(InputError, match="micro_batch_size"):
        samples_per_forward(8, 0)
    monkeypatch.setattr(training, "world_size", lambda: 4)
    assert samples_per_forward(8, None) == 2
    with pytest.raises(InputError, match=r"do not divide over 4 ranks; --batch_size 8 does"):
        samples_per_forward(6, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_the_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it():
    """getrusage gives a process at least the peak of the one that started it."""
    child = (
        "import resource, torch\n"
        "from ldm3d.engine.training import peak_bytes\n"
        "before, told = peak_bytes(torch.device('cpu')), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "x = torch.ones(2**27)\n"
        "print(before, peak_bytes(torch.device('cpu')) - before, told * 1024)\n"
    )
    parent = "import subprocess, sys\nx = b'1' * 2**30\nsubprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = start("-c", parent, child)
    before, more, told = map(int, process.communicate(timeout=60)[0].split())
    assert told >= 2**30 > before
    assert 2**29 <= more < 2**29 + 2**27


def test_without_the_modules_that_windows_lacks_everything_is_imported_and_one_process_trains(
    heads, tmp_path
):
    code = (
        "import importlib, os, pathlib, pkgutil, sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):\n"
        "    sys.modules[name] = None\n"
        "del os.posix_fallocate\n"
        "import ldm3d, train_cdal, train_ldm, train_vae, sample\n"
        "for module in pkgutil.walk_packages(ldm3d.__path__, 'ldm3d.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "train_vae.main(sys.argv[1:])\n"
    )
    process = start("-c", code, *vae_flags(heads, tmp_path / "run", 2))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "done at step 2" in out


# --- the run folder -----------------------------------------------------------------------------------------


def open_run(tmp_path, flags=None, **changes):
    config = replace(Config(), {"run.dir": str(tmp_path / "run"), **(flags or {}), **changes})
    return Run("test", config, flags or {})


def begin(run):
    """Start a run of a tiny network; a resumed run gets its weights back."""
    net = nn.Linear(run.config.width, 1)
    run.start(SPLIT, CPU)
    run.restore({"data": {}}, net, EMA(net, 0.9), {"net": make_stepper(net)}, Mean())
    return run


def saved_run(tmp_path, step, flags=None, **changes):
    """A run of a tiny network that was saved at `step` and ended."""
    run = begin(open_run(tmp_path, flags, **changes))
    run.step = step
    run.save()
    run.log("val", {})
    run.finish()
    return run


def test_the_same_command_goes_on_from_the_newest_checkpoint(tmp_path):
    net = saved_run(tmp_path, 7).net
    run = open_run(tmp_path)
    assert run.step == 7
    assert run.split() == SPLIT
    assert torch.equal(begin(run).net.weight, net.weight)


def test_another_setting_on_resume_is_refused_with_the_difference_and_lengths_may_change(tmp_path):
    saved_run(tmp_path, 7, {"width": 3})
    assert open_run(tmp_path).config.width == 3  # without the flag the stored value is the base
    with pytest.raises(InputError, match=r"width was 3, now 4.*--run\.fresh"):
        open_run(tmp_path, {"width": 4})
    with pytest.raises(InputError, match="preset was 'p', now 'q'"):
        open_run(tmp_path, preset="q")
    assert open_run(tmp_path, {"run.steps": 9, "run.keep": 5}).config.run.steps == 9


def test_another_path_to_the_same_autoencoder_is_no_other_setting(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path, 7, {"vae": str(tmp_path / "vae")})
    for path in ("vae", "./vae/", "link", "run/../vae"):
        assert open_run(tmp_path, {"vae": path}).step == 7
    for path in ("vae2", None):
        with pytest.raises(InputError, match=f"vae was .*, now {path!r}"):
            open_run(tmp_path, {"vae": path})


def test_a_run_goes_on_in_another_working_folder_with_the_path_to_its_autoencoder_from_there(
    tmp_path, monkeypatch
):
    (tmp_path / "runs" / "vae").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    saved_run(tmp_path, 7, {"vae": "runs/vae"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("runs/vae", "../runs/vae", tmp_path / "runs" / "vae"):
        assert open_run(tmp_path, {"vae": str(path)}).step == 7
    with pytest.raises(InputError, match=r"vae was 'runs/vae', now '\.\./runs/vae2'"):
        open_run(tmp_path, {"vae": "../runs/vae2"})


def test_a_finished_run_says_so(tmp_path, capsys):
    saved_run(tmp_path, 1000)
    assert open_run(tmp_path).finished
    assert "finished at step 1000" in capsys.readouterr().out
    assert not open_run(tmp_path, {"run.steps": 2000}).finished


def test_fresh_moves_the_old_folder_aside_and_loses_nothing(tmp_path):
    saved_run(tmp_path, 7)
    run = open_run(tmp_path, {"run.fresh": True})
    assert run.step == 0
    begin(run)
    aside = [p for p in tmp_path.iterdir() if p.name.startswith("run.old-")]
    assert (aside[0] / "checkpoint_0000007.pt").exists()


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path):
    saved_run(tmp_path, 1)
    with pytest.raises(InputError, match=r"belongs to a 'test' run, this is 'other'"):
        Run("other", replace(Config(), {"run.dir": str(tmp_path / "run")}), {})


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_a_run_on_a_cpu_keeps_freed_memory(device, times, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ldm3d.engine.runs.keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(Run, "_introduce", lambda *_: None)  # names the GPU
    open_run(tmp_path).start(SPLIT, torch.device(device))
    assert len(calls) == times


def test_init_takes_the_weights_of_another_run_and_starts_at_zero(tmp_path):
    weight = saved_run(tmp_path, 7).net.weight
    config = replace(Config(), {"run.dir": str(tmp_path / "new"), "run.init": str(tmp_path / "run")})
    run = Run("test", config, {})
    net = nn.Linear(2, 1)
    run.initialise(net)
    assert run.step == 0
    assert torch.equal(net.weight, weight)
    run.start({}, CPU)
    run.restore({}, net, EMA(net, 0.9), {}, Mean())
    assert torch.equal(net.weight, weight)
    assert torch.equal(run.ema.net.weight, weight)
    with pytest.raises(InputError, match=r"run\.init.*gone"):
        Run("test", replace(config, {"run.init": str(tmp_path / "gone")}), {})


def test_init_from_a_run_without_validation_says_whose_weights_it_takes(tmp_path, capsys):
    saved_run(tmp_path, 7)
    new = {"run.dir": str(tmp_path / "new"), "run.init": str(tmp_path / "run")}
    Run("test", replace(Config(), new), {}).initialise(nn.Linear(2, 1))
    said = f"note: {tmp_path / 'run'} has no best.pt yet; its weights are those of step 7"
    assert said in capsys.readouterr().out
    best = begin(open_run(tmp_path))
    best.keep_best("loss", 1.0)
    Run("test", replace(Config(), new), {}).initialise(nn.Linear(2, 1))
    assert "note: " not in capsys.readouterr().out


def test_the_best_is_kept_apart_and_patience_ends_a_run(tmp_path):
    run = begin(open_run(tmp_path, **{"run.patience": 2, "run.eval_every": 10}))
    run.step = 1
    assert run.keep_best("loss", 1.0)
    assert not run.keep_best("loss", 1.5)
    assert not run.keep_best("loss", math.nan)
    assert not run.finished
    run.step = 21
    assert run.finished
    assert run.best == {"name": "loss", "value": 1.0, "step": 1}


def test_the_best_is_the_highest_where_higher_is_better_and_another_score_starts_anew(tmp_path):
    run = begin(open_run(tmp_path))
    kept = [run.keep_best("psnr", value, highest=True) for value in (20.0, 21.0, 20.5, 21.5)]
    assert kept == [True, True, False, True]
    assert load(run.dir / "best.pt")["best"]["value"] == 21.5
    assert run.keep_best("other", 3.0, highest=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    run = open_run(tmp_path)
    with pytest.raises(InputError, match="run"):
        run.start({}, CPU)


# --- the log ------------------------------------------------------------------------------------------------


def test_the_log_is_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path):
    logger = Logger(tmp_path, 0)
    for step in (1, 2, 3):
        logger.log(step, "train", {"loss": float(step)})
    logger.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "spl')
    logger = Logger(tmp_path, 2)
    logger.log(3, "val", {"loss": 9.0})
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["split"], r["loss"]) for r in lines] == [
        (1, "train", 1.0),
        (2, "train", 2.0),
        (3, "val", 9.0),
    ]


def test_a_sheet_shows_the_three_middle_planes_upright(tmp_path):
    volume = torch.zeros(4, 6, 8).numpy()
    volume[2, 3, 7] = 1  # the top of the head, where the middle sagittal and coronal planes meet
    sagittal, coronal, axial = mid_slices(volume)
    assert (sagittal.shape, coronal.shape, axial.shape) == ((8, 6), (8, 4), (6, 4))
    assert sagittal[0, 3] == coronal[0, 2] == 1
    path = save_sheet(tmp_path / "a.png", {"row": [volume, volume]})
    picture = matplotlib.image.imread(path)[..., 0]
    assert picture[:, : picture.shape[1] // 2].max() == picture[:, picture.shape[1] // 2 :].max() == 1


def test_a_folder_that_holds_something_else_is_not_filled(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty, and not a run folder"):
        open_run(tmp_path)
