"""Compiled networks: one graph, the outputs of eager, plain names in checkpoints, compiled once a run."""

import itertools

import pytest
import torch
import torch._dynamo
from networks import NETWORKS, outputs_and_gradients
from tiny import cdal_flags, ldm_flags, lines, start, vae_flags
from torch import nn

import train_cdal
import train_ldm
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
FAST = {("kl attention", 3, False), ("unet context", 3, False), ("denoiser registers", 2, False)}
FAST |= {("generator", 3, False)}
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


@pytest.mark.parametrize("script", [train_vae, train_ldm, train_cdal], ids=lambda m: m.__name__)
def test_a_run_compiles_once_saves_plain_names_and_goes_on_in_eager_and_back(
    script, heads, vae_run, tmp_path, counted
):
    def train(run: str, steps: int, *more: str) -> None:
        if script is train_vae:
            script.main(vae_flags(heads, tmp_path / run, steps, *more))
        elif script is train_cdal:
            script.main(cdal_flags(heads, tmp_path / run, steps, *more))
        else:
            script.main(ldm_flags(vae_run, tmp_path / run, steps, *more))

    train("eager", 8)
    assert counted == []
    train("mixed", 4, "--run.compile")
    assert len(counted) == 1  # four steps, one graph
    train("mixed", 6, "--run.compile", "false")
    assert len(counted) == 1
    train("mixed", 8, "--run.compile")
    assert len(counted) <= 2
    assert_near(tmp_path / "eager", tmp_path / "mixed")


def test_a_discriminator_that_comes_after_compiled_steps_finds_their_graph(heads, tmp_path):
    more = "--disc_weight 0.1 --disc_start 2 --disc.channels 4 --disc.num_layers 1".split()
    train_vae.main(vae_flags(heads, tmp_path / "eager", 4, *more))
    code = (  # a process of its own: nothing of the compiler is imported before the script asks for it
        "import sys, torch, train_vae\n"
        "original = torch.nn.Module.compile\n"
        "torch.nn.Module.compile = lambda self: original(self, fullgraph=True, backend='aot_eager')\n"
        "train_vae.main(sys.argv[1:])\n"
    )
    process = start("-c", code, *vae_flags(heads, tmp_path / "compiled", 4, *more, "--run.compile"))
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
