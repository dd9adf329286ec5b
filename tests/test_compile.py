"""Compiled networks: one graph, the outputs of eager, plain names in checkpoints, compiled once a run."""

import pytest
import torch
import torch._dynamo
from tiny import cdal_flags, ldm_flags, lines, start, vae_flags
from torch import nn

import train_cdal
import train_ldm
import train_vae
from ldm3d import AutoencoderKL, Denoiser, UNetConfig, VAEConfig
from ldm3d.engine.checkpoint import load, step_files


@pytest.fixture(autouse=True)
def forget():
    """Compiled code of another test is no part of this one."""
    torch._dynamo.reset()


def make(kind: str, dims: int, checkpointing: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A small network in training mode, and arguments of its forward."""
    torch.manual_seed(0)
    size = (8,) * dims
    if kind == "autoencoder":
        config = VAEConfig(dims, channels=(8, 16), num_groups=4, num_res_blocks=(1,), mid_attention=True)
        net = AutoencoderKL(VAEConfig(**{**vars(config), "checkpointing": checkpointing}))
        return net, (torch.randn(2, 1, *size), torch.randn(2, *net.latent_shape(size)))
    config = UNetConfig(
        dims, 4, 4, (8, 16), (1,), (False, True), head_channels=8, checkpointing=checkpointing
    )
    net = Denoiser(config)
    for parameter in net.parameters():  # the zero-initialised layers too
        nn.init.normal_(parameter, std=0.1)
    return net, (torch.randn(2, 4, *size), torch.tensor([10.0, 900.0]))


def outputs_and_gradients(net: nn.Module, model, arguments) -> list[torch.Tensor]:
    net.zero_grad()
    out = model(*arguments)
    out = [out] if isinstance(out, torch.Tensor) else [out[0], out[1].mean, out[1].logvar]
    sum(o.square().mean() for o in out).backward()
    return [o.detach() for o in out] + [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dims", [3, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["autoencoder", "denoiser"])
def test_a_network_is_one_graph_and_computes_what_eager_does(kind, dims, checkpointing):
    net, arguments = make(kind, dims, checkpointing)
    eager = outputs_and_gradients(net, net, arguments)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(net, compiled, arguments)
    count = len(found) - len(list(net.parameters()))
    for i, (a, b) in enumerate(zip(eager, found, strict=True)):
        scale = float(a.abs().max()) + 1e-6
        assert float((a - b).abs().max()) <= (2e-5 if i < count else 1e-4) * scale


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
