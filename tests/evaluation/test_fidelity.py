"""The features of `samples` order damaged real volumes by how bad the damage is, and the report names the
ceiling that the autoencoder sets."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

import train_vae
from ldm3d.data.phantoms import make_phantom, write_phantoms
from ldm3d.engine.checkpoint import load_file, save
from ldm3d.evaluation import networks, sets
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.networks import (
    FidelityConfig,
    FidelityNet,
    correlation,
    file_features,
    largest_jump,
    scales_for,
    smoothed,
)
from ldm3d.evaluation.openers import OpenConfig, open_sets, volumes_of
from ldm3d.metrics import cubic_kernel, frechet_distance, kernel_distance
from ldm3d.pipeline import load_autoencoder

CPU = torch.device("cpu")

# --- damages: x (N, 1, D, H, W) -> the same, axes and sides at random ---------------------------------------


def blurred(x: Tensor, sigma: float) -> Tensor:
    sigmas = [0, 0, *[sigma] * 3]
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), sigmas, mode="nearest"))


def turned(x: Tensor, degrees: float, draw: torch.Generator) -> Tensor:
    found = []
    for v in x:
        axes = [(0, 1), (0, 2), (1, 2)][int(torch.randint(3, (), generator=draw))]
        sign = 1 - 2 * int(torch.randint(2, (), generator=draw))
        found.append(
            ndimage.rotate(v[0].numpy(), sign * degrees, axes, reshape=False, order=1, mode="nearest")
        )
    return torch.stack([torch.from_numpy(v)[None] for v in found])


def cut(x: Tensor, draw: torch.Generator) -> Tensor:
    """A third of every volume is missing."""
    x = x.clone()
    for v in x:
        axis = 1 + int(torch.randint(3, (), generator=draw))
        n, part = v.shape[axis], round(v.shape[axis] / 3)
        v.narrow(axis, int(torch.randint(2, (), generator=draw)) * (n - part), part).fill_(v.min())
    return x


def rolled(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every volume is shifted by half its size, what leaves comes in at the other side."""
    axes = [1 + int(torch.randint(3, (), generator=draw)) for _ in x]
    return torch.stack([v.roll(v.shape[a] // 2, a) for v, a in zip(x, axes, strict=True)])


def joined(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every volume has the first half of one case and the second half of another."""
    found = x.clone()
    for i, v in enumerate(found):
        axis, other = 1 + int(torch.randint(3, (), generator=draw)), x[(i + len(x) // 2) % len(x)]
        half = v.shape[axis] // 2
        v.narrow(axis, half, v.shape[axis] - half).copy_(other.narrow(axis, half, v.shape[axis] - half))
    return found


def cloudy(x: Tensor, sigma: float, draw: torch.Generator) -> Tensor:
    """Random fields with mean and deviation of the real set; sigma 0: white noise."""
    field = blurred(torch.randn(x.shape, generator=draw), sigma)
    field = field / field.flatten(1).std(1).view(-1, 1, 1, 1, 1)
    return (x.mean() + x.std() * field).clamp(-1, 1)


def damages(x: Tensor) -> list[dict[str, Tensor]]:
    """Groups of damaged sets; each set of a group is worse than each set of the group before."""
    draw = torch.Generator().manual_seed(0)
    return [
        {"other": x},
        {"turned": turned(x, 2, draw)},
        {},
        {"blurred": blurred(x, 1)},
        {"cut": cut(x, draw), "rolled": rolled(x, draw), "joined": joined(x, draw)},
        {"noise": cloudy(x, 0, draw), "clouds": cloudy(x, 3, draw)},
    ]


def as_file(x: Tensor) -> Tensor:
    """(C, *S) scaled as the opener of files does it by default."""
    low, high = x.flatten().quantile(0.005), x.flatten().quantile(0.995)
    return ((x - low) / (high - low) * 2 - 1).clamp(-1, 1)


def check_order(real: Tensor, groups: list[dict[str, Tensor]], slightly_blurred: Tensor) -> None:
    net = FidelityNet(FidelityConfig(scales=scales_for(real.shape[2:])))
    net.fit(real.split(1))
    named = {name: x for group in groups for name, x in group.items()} | {"slightly": slightly_blurred}
    features = {name: net(torch.stack([as_file(v) for v in x])) for name, x in named.items()}
    features["real"] = net(real)
    within = {name: cubic_kernel(f, f) for name, f in features.items()}

    def kernel(name: str) -> float:
        return kernel_distance(within[name], within["real"], cubic_kernel(features[name], features["real"]))

    groups = [group for group in groups if group]
    for distance in (lambda name: frechet_distance(features[name], features["real"]), kernel):
        found = {name: distance(name) for name in named}
        print({name: round(value, 4) for name, value in found.items()})
        for better, worse in itertools.pairwise(groups):
            assert max(found[n] for n in better) < min(found[n] for n in worse), found
        assert found["slightly"] > max(1.5 * found["other"], found["turned"]), found


@torch.no_grad()
def test_damages_of_heads_are_ordered():
    heads = [torch.from_numpy(make_phantom(i, 3, (40, 48, 40)).image) for i in range(32)]
    x = torch.stack([as_file(head) for head in heads])
    check_order(x[:16], damages(x[16:]), blurred(x[16:], 0.7))


RUNS = {  # autoencoders that are trained for minutes on half of the cases
    "phantom": ["--run.steps", "700"],
    "hippocampus": ["--run.steps", "800", "--vae.channels", "24,64", "--data.patch", "24,32,24"],
}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("preset", RUNS)
@torch.no_grad()
def test_an_autoencoder_lies_between_a_small_rotation_and_a_blur(preset, tmp_path, request):
    if preset == "phantom":
        root = write_phantoms(tmp_path / "data", 192, size=(40, 48, 40), seed=5)
        images = root / "images"
    else:
        root = request.getfixturevalue("real_data") / "hippocampus"
        images = root / "imagesTr"
    run = tmp_path / "run"
    flags = ["--data.root", str(root), "--data.val_fraction", "0.5", "--run.dir", str(run)]
    with torch.enable_grad():
        train_vae.main([preset, *flags, "--run.eval_every", "10000", "--run.device", "cpu", *RUNS[preset]])
    check_run(run, str(images))


def check_run(run, images: str) -> None:
    parts = {"real": (str(run), "train"), "held-out": (str(run), "val")}
    opened = open_sets(images, parts, OpenConfig(subset=64)).sets
    real, x = (torch.stack(list(volumes_of(opened[name]))) for name in parts)
    autoencoder, groups = load_autoencoder(run)[0], damages(x)
    z = torch.cat([autoencoder.encode(v).mode() for v in x.split(4)])

    def decoded(z: Tensor) -> Tensor:
        return torch.cat([autoencoder.decode(part, x.shape[2:]) for part in z.split(4)]).clamp(-1, 1)

    mean, std = (f(z, (0, 2, 3, 4), keepdim=True) for f in (torch.mean, torch.std))
    groups[2]["reconstructed"] = decoded(z)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    groups[5]["decoded noise"] = decoded(mean + std * noise)
    check_order(real, groups, blurred(x, 0.7))


# --- the blocks of features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_smoothing_is_a_binomial_filter(dims):
    x = torch.randn(2, 3, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x.numpy()
    for axis in list(range(2, 2 + dims)) * 2:  # (1, 2, 1) twice: the edge is repeated after each
        expected = ndimage.correlate1d(expected, [0.25, 0.5, 0.25], axis, mode="nearest")
    assert torch.allclose(smoothed(x), torch.from_numpy(expected), atol=1e-12)


def test_correlation_is_pearsons_and_0_without_variance():
    a, b = (torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = [torch.corrcoef(torch.stack([a[i].flatten(), b[i].flatten()]))[0, 1] for i in range(2)]
    assert torch.allclose(correlation(a, b).flatten(), torch.stack(expected), atol=1e-6)
    assert correlation(a, torch.ones_like(b)).abs().max() == 0


def test_the_largest_jump_is_that_of_a_seam():
    ramp = torch.arange(20.0).view(1, 1, 20, 1).expand(1, 1, 20, 20)
    assert largest_jump(ramp).item() == 0
    step = ramp + 3 * (torch.arange(20) >= 12).view(20, 1)  # differences are 1, and 4 at the seam
    assert largest_jump(step).item() == 1  # (4 - 1) / (22 / 19) > 1
    small = ramp + 0.5 * (torch.arange(20) >= 12).view(20, 1)
    assert largest_jump(small).item() == pytest.approx(0.5 / (19.5 / 19))
    assert largest_jump(torch.zeros(1, 2, 3, 3)).shape == (1, 2, 1)


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_features_do_not_depend_on_gain_and_offset_and_are_centred(dims):
    size = (24, 20, 16)[:dims]
    x = torch.randn(6, 2, *size, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x[..., ::2], size=size) + x / 3
    found = []
    for y in (x, 50 * x + 300):
        net = FidelityNet(FidelityConfig(dims, 2, scales_for(size))).double()
        assert net.fit(y.double().split(2)) == 6
        found.append(net(y.double()))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert found[0].mean(0).abs().max() < 1e-6


@torch.no_grad()
def test_lost_detail_costs_what_the_docstring_says():
    net = FidelityNet(FidelityConfig(scales=4))
    x = torch.randn(8, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    net.fit(x.split(1))
    names, widths = zip(*((n, b.shape[2]) for n, b in net.blocks(x).items()), strict=True)
    gains = dict(zip(names, net.gain.split(widths), strict=True))
    blocks = {name: block.square().mean() for name, block in net.blocks(x).items()}
    costs = {n: (gains[n].square().sum() * blocks[n]).item() for n in names if n.startswith("detail")}
    assert costs == pytest.approx({"detail0": 3, "detail1": 15, "detail2": 80, "detail3": 40}, rel=1e-4)
    assert gains["jump"].item() ** 2 == pytest.approx(30)


# --- stored networks ----------------------------------------------------------------------------------------


def test_a_stored_network_of_before_is_read_as_what_it_is_and_never_as_the_new_one(tmp_path, monkeypatch):
    config = networks.FeatureConfig(2, steps=1, batch_size=2)
    net = networks.train_features(torch.randn(4, 1, 16, 16), config, CPU)
    old = {"kind": "features", "config": networks.to_dict(config), "model": net.state_dict()}
    save(tmp_path / "old.pt", old)
    assert file_features(str(tmp_path / "old.pt"), 2, CPU)(torch.zeros(1, 1, 16, 16)).shape == (1, 32)

    def made(folder):
        return networks.fidelity_features(
            lambda: [torch.randn(4, 1, 16, 16)], "key", FidelityConfig(2), folder, CPU
        )

    first = made(tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    assert load_file(stored, "features")["network"] == "fidelity"
    again = made(tmp_path / "cache")  # other items, the same key: it is read
    assert first.digest == again.digest == file_features(str(stored), 2, CPU).digest
    monkeypatch.setattr(networks, "JUMP_WEIGHT", 0.5)  # another definition is another network
    assert made(tmp_path / "cache").digest != first.digest
    assert len(list((tmp_path / "cache").iterdir())) == 2


# --- the ceiling --------------------------------------------------------------------------------------------


def test_the_table_has_held_out_cases_through_the_autoencoder_as_the_ceiling(
    vae_run, heads, tmp_path, capsys
):
    flags = ["--out", str(tmp_path / "report"), "--resamples", "5", "--cache_dir", str(tmp_path)]
    evaluation_main(["samples", str(heads / "images"), str(vae_run), "--part", "train", *flags])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    head = next(line for line in capsys.readouterr().out.splitlines() if "real halves" in line)
    assert "train through the autoencoder" in head
    figure = report["figures"]["whole/frechet"]
    assert figure["through_autoencoder"] > 2 * figure["real_halves"]  # of an autoencoder hardly trained
    assert math.isfinite(report["figures"]["spectrum_db"]["through_autoencoder"])


@torch.no_grad()
def test_the_ceiling_is_of_real_cases_against_other_real_cases(vae_run, heads, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "reconstructions", lambda opened, device: volumes_of(opened.sets["real"]))
    flags = ["--out", str(tmp_path / "report"), "--resamples", "5", "--cache_dir", str(tmp_path)]
    evaluation_main(["samples", str(heads / "images"), str(vae_run), "--part", "train", *flags])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    for name in ("whole/frechet", "whole/kernel", "histogram", "spectrum_db"):  # a perfect autoencoder
        assert figures[name]["through_autoencoder"] == pytest.approx(figures[name]["real_halves"])


def test_no_ceiling_is_printed_where_no_autoencoder_is_known(heads, tmp_path, capsys):
    place, flags = str(heads / "images"), ["--resamples", "5", "--cache_dir", str(tmp_path)]
    evaluation_main(["samples", place, place, "--out", str(tmp_path / "report"), *flags])
    assert "through the autoencoder" not in capsys.readouterr().out


@pytest.mark.parametrize("scaling", ["percentile", "window"])
def test_reconstructions_are_scaled_as_files_of_them_would_be(vae_run, heads, tmp_path, scaling):
    config = OpenConfig(scaling=scaling, window=(0.0, 1000.0) if scaling == "window" else None)
    opened = open_sets(str(heads / "images"), {"real": (str(vae_run), "val")}, config)
    for x in sets.reconstructions(opened, CPU):
        assert x.abs().max() <= 1
        if scaling == "percentile":
            low, high = x.flatten().quantile(0.01), x.flatten().quantile(0.99)
            assert low.item() == pytest.approx(-1, abs=0.1)
            assert high.item() == pytest.approx(1, abs=0.1)
