"""Compiled networks: one graph, the outputs of eager, plain names in checkpoints, compiled once a run."""

import functools
import importlib
import itertools

import pytest
import torch
import torch._dynamo
from networks import NETWORKS, outputs_and_gradients
from tiny import cdal_flags, ldm_flags, lines, start, vae_flags
from torch import nn

import train_vae
from ldm3d.engine.checkpoint import load, step_files


@pytest.fixture(autouse=True)
def forget():
    """Compiled code of another test is no part of this one."""
    torch._dynamo.reset()


COMPILED = (
    "kl attention",
    "vq ema",
    "unet context",
    "denoiser conditions",
    "denoiser registers",
    "generator",
)
FAST = {("kl attention", 3, False), ("denoiser registers", 2, False), ("generator", 3, False)}
GRAPHS = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(COMPILED, (2, 3), (False, True))
]


@pytest.mark.parametrize(("name", "dims", "checkpointing"), GRAPHS)
def test_a_network_is_one_graph_and_computes_what_eager_does(name, dims, checkpointing):
    net, inputs = NETWORKS[name](dims, checkpointing)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    eager, found = (outputs_and_gradients(net, call, inputs) for call in (net, compiled))
    pairs = [(a, b, 2e-5) for a, b in zip(eager[0], found[0], strict=True)]
    pairs += [(eager[1][key], found[1][key], 1e-4) for key in eager[1].keys() | found[1].keys()]
    for a, b, tolerance in pairs:
        assert float((a - b).abs().max()) <= tolerance * (float(a.abs().max()) + 1e-6)


@pytest.fixture
def counted(monkeypatch):
    """nn.Module.compile with a fast backend that refuses graph breaks; the list grows by every graph."""
    graphs, original = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", lambda self: original(self, fullgraph=True, backend=backend))
    return graphs


def assert_near(one, other):
    a, b = (load(step_files(run)[0]) for run in (one, other))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys() == a["ema"].keys() == b["ema"].keys()
    for x, y in zip(lines(one), lines(other), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-3)


SCRIPTS = ("train_vae", "train_ldm", "train_cdal")
DISCRIMINATOR = "--disc_weight 0.1 --disc_start 2 --disc.channels 4 --disc.num_layers 1".split()


@pytest.fixture
def run_script(heads, vae_run, tmp_path):
    """run_script(script, run, steps, *more): a tiny training; that of an autoencoder with a discriminator."""

    def run(script: str, run: str, steps: int, *more: str) -> None:
        make = {"train_vae": vae_flags, "train_ldm": ldm_flags, "train_cdal": cdal_flags}[script]
        more = (*DISCRIMINATOR, *more) if make is vae_flags else more
        main = importlib.import_module(script).main
        main(make(vae_run if make is ldm_flags else heads, tmp_path / run, steps, *more))

    return run


@pytest.mark.parametrize(
    "script", [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])]
)
def test_a_run_compiles_once_saves_plain_names_and_goes_on_in_eager_and_back(
    script, run_script, tmp_path, counted
):
    train = functools.partial(run_script, script)
    train("eager", 8)
    assert counted == []
    train("mixed", 4, "--run.compile")
    assert len(counted) == 1  # four steps, one graph
    train("mixed", 6, "--run.compile", "false")
    assert len(counted) == 1
    train("mixed", 8, "--run.compile")
    assert len(counted) <= 2
    assert_near(tmp_path / "eager", tmp_path / "mixed")


@pytest.mark.parametrize(
    ("script", "network"), list(zip(SCRIPTS, ("AutoencoderKL", "Denoiser", "Generator"), strict=True))
)
def test_every_script_compiles_the_network_that_it_trains_if_asked(script, network, run_script, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    run_script(script, "eager", 1)
    assert compiled == []
    run_script(script, "compiled", 1, "--run.compile")
    assert compiled == [
        {"train_vae": "AutoencoderKL", "train_ldm": "Denoiser", "train_cdal": "Generator"}[script]
    ]


@pytest.mark.slow  # in one process with other tests: the run of an autoencoder above
def test_a_discriminator_that_comes_after_compiled_steps_finds_their_graph(heads, tmp_path):
    train_vae.main(vae_flags(heads, tmp_path / "eager", 4, *DISCRIMINATOR))
    code = (  # a process of its own: nothing of the compiler is imported before the script asks for it
        "import sys, torch, train_vae\n"
        "original = torch.nn.Module.compile\n"
        "torch.nn.Module.compile = lambda self: original(self, fullgraph=True, backend='aot_eager')\n"
        "train_vae.main(sys.argv[1:])\n"
    )
    flags = vae_flags(heads, tmp_path / "compiled", 4, *DISCRIMINATOR, "--run.compile")
    process = start("-c", code, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert_near(tmp_path / "eager", tmp_path / "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_vae", "train_ldm"])
def test_the_flag_compiles_with_inductor_in_each_script(script, heads, vae_run, tmp_path):
    for run, more in (("eager", ()), ("compiled", ("--run.compile",))):
        flags = (vae_flags if script == "train_vae" else ldm_flags)(
            heads if script == "train_vae" else vae_run, tmp_path / run, 4, *more
        )
        process = start(f"{script}.py", *flags)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
    assert_near(tmp_path / "eager", tmp_path / "compiled")
