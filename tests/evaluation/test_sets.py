"""Figures of generated sets put them in the right order, say what they depend on, and warn where they mean
little."""

import hashlib
import json
import math

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from ldm3d.data import Volume, write
from ldm3d.data.phantoms import Phantom, make_phantom
from ldm3d.engine.checkpoint import load_file
from ldm3d.evaluation import sets
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.networks import FeatureConfig, contrastive_loss, file_features, train_features
from ldm3d.evaluation.openers import OpenConfig, open_sets, volumes_of
from ldm3d.evaluation.sets import (
    BINS,
    Measured,
    SetsConfig,
    draw_figure,
    planes_of,
    real_halves,
    slice_extractor,
    warnings_of,
)
from ldm3d.evaluation.statistics import wasserstein_distance
from ldm3d.metrics import ms_ssim, power_spectrum

SIZES = {2: (28, 24), 3: (16, 18, 16)}
SUFFIX = {2: "tif", 3: "nii.gz"}
FAST = ["--resamples", "10", "--pairs", "12", "--slices", "4"]


def blurred(x: np.ndarray) -> np.ndarray:
    for axis in range(1, x.ndim):
        x = (x + np.roll(x, 1, axis) + np.roll(x, -1, axis)) / 3
    return x


CHANGES = {
    "same": lambda x, draw: x,
    "blurred": lambda x, draw: blurred(x),
    "noise": lambda x, draw: draw.normal(size=x.shape).astype(np.float32),
}


def head(index: int, dims: int) -> Phantom:
    return make_phantom(index, dims, SIZES[dims], tuple(200 / n for n in SIZES[dims]))


def write_heads(folder, dims: int, change: str, first: int, num: int) -> str:
    """Heads first ... of one population, after a change; as float32 files."""
    draw = np.random.default_rng(first)
    for i in range(first, first + num):
        phantom = head(i, dims)
        array = CHANGES[change](phantom.image, draw).astype(np.float32)
        write(folder / f"head_{i}.{SUFFIX[dims]}", Volume(array, phantom.affine))
    return str(folder)


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def reports(request, tmp_path_factory):
    """{change: report of 16 changed heads against 24 other real ones}, and where they lie.

    The shares of neighbours of so few heads are chance, but tell heads from noise.
    """
    dims, place = request.param, tmp_path_factory.mktemp("sets")
    real, found = write_heads(place / "real", dims, "same", 0, 24), {}
    for change in CHANGES:
        made = write_heads(place / change, dims, change, 100, 16)
        where = ["--out", str(place / f"report-{change}"), "--cache_dir", str(place / "cache")]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sets, "FEWEST", 10)
            if change != "same":  # one figure is enough: each takes half a second
                monkeypatch.setattr(sets, "draw_figure", lambda *_: None)
            evaluation_main(["samples", made, real, *where, *FAST])
        found[change] = json.loads((place / f"report-{change}" / "report.json").read_text())
    return dims, place, found


def test_more_of_the_same_is_nearer_than_a_blur_and_that_than_noise(reports):
    dims, _, found = reports
    names = ["whole/frechet", "whole/kernel"] + (["planes/frechet", "planes/kernel"] if dims == 3 else [])
    for name in names:
        values = [found[change]["figures"][name]["value"] for change in CHANGES]
        assert values == sorted(values), name
    assert found["same"]["figures"]["whole/precision"]["value"] >= 0.7
    assert found["noise"]["figures"]["whole/precision"]["value"] == 0
    assert found["noise"]["figures"]["whole/coverage"]["value"] < 0.2
    assert (
        found["blurred"]["figures"]["spectrum_db"]["value"]
        > 3
        > found["same"]["figures"]["spectrum_db"]["value"]
    )
    assert (
        found["noise"]["figures"]["histogram"]["value"] > 2 * found["same"]["figures"]["histogram"]["value"]
    )


def test_more_of_the_same_gets_what_halves_of_the_real_set_get_and_noise_does_not(reports):
    _, _, found = reports
    same, noise = (found[change]["figures"]["whole/kernel"] for change in ("same", "noise"))
    assert noise["low"] > 10 * max(abs(same["value"]), abs(same["real_halves"]))


def test_noise_is_as_diverse_as_can_be_and_heads_are_as_alike_as_the_real_ones(reports):
    _, _, found = reports
    same, noise = (found[change]["figures"] for change in ("same", "noise"))
    assert same["ms_ssim/generated"]["value"] == pytest.approx(same["ms_ssim/real"]["value"], abs=0.15)
    assert noise["ms_ssim/generated"]["value"] < 0.2


def test_the_report_says_what_its_figures_depend_on(reports):
    dims, place, found = reports
    report = found["same"]
    assert report["cases"] == {"generated": 16, "real": 24}
    assert report["protocol"]["size"] == list(SIZES[dims])
    assert report["protocol"]["intensity_range"] == [-1, 1]
    assert report["protocol"]["scaling_numbers"] == [0.5, 99.5]
    assert report["protocol"]["axes"].startswith("RAS" if dims == 3 else "row")
    assert report["real_halves"] == {"cases": 12, "others": 12, "draws": 10}
    assert set(report["networks"]) == ({"whole", "slices"} if dims == 3 else {"whole"})
    hashes = {r["networks"]["whole"]["sha256"] for r in found.values()}
    assert len(hashes) == 1  # trained on the real set once, then read
    assert load_file(report["networks"]["whole"]["network"], "features")
    assert any("too few" in words for words in report["warnings"])
    assert {"equal_size", "real_halves"} <= set(report["figures"]["whole/kernel"])
    assert (place / "report-same" / "figure.png").is_file()
    for figure in report["figures"].values():
        assert figure["low"] <= figure["high"]
        assert math.isfinite(figure["value"])


def made_up(cases: int, features: int) -> Measured:
    x = torch.randn(cases, features, generator=torch.Generator().manual_seed(0))
    return Measured(x, [], torch.full((cases, 1, BINS), 1 / BINS), torch.zeros(cases, 1, 4))


@pytest.mark.parametrize(("generated", "parts"), [(3, (3, 17)), (10, (10, 10)), (15, (10, 10))])
def test_real_cases_are_parted_as_the_two_sets_are_as_far_as_they_suffice(monkeypatch, generated, parts):
    measured, seen, figures = made_up(generated + 20, 4), [], Measured.figures
    monkeypatch.setattr(Measured, "figures", lambda *a: seen.append(a[1:3]) or figures(*a))
    columns, numbers = real_halves(measured, [str(i) for i in range(20)], 1.0, SetsConfig())
    assert numbers == parts
    assert columns["through_autoencoder"] == {}
    for ours, rest in seen:
        assert (len(ours), len(rest)) == parts
    real, mixed = seen[0::2], seen[1::2]
    for ours, rest in real:
        assert sorted([*ours.tolist(), *rest.tolist()]) == list(range(generated, generated + 20))
    for made, rest in mixed:  # as many cases, so that the two columns compare
        assert max(made) < generated <= min(rest)
    for column, pairs in ((columns["real_halves"], real), (columns["equal_size"], mixed)):
        values = [figures(measured, *both, 1.0, 5)["whole/frechet"] for both in pairs]
        assert column["whole/frechet"] == pytest.approx(np.mean(values))


def test_real_halves_never_hold_two_scans_of_one_subject(monkeypatch):
    measured, seen, figures = made_up(30, 4), [], Measured.figures
    monkeypatch.setattr(Measured, "figures", lambda *a: seen.append(a[1:3]) or figures(*a))
    _, numbers = real_halves(measured, [str(i // 3) for i in range(20)], 1.0, SetsConfig())
    for ours, rest in seen[0::2]:
        assert not {int(i - 10) // 3 for i in ours} & {int(i - 10) // 3 for i in rest}
    assert numbers == (10, min(len(rest) for _, rest in seen))


@pytest.mark.parametrize(("cases", "features"), [((1, 1), 6), ((4, 5), 1), ((4, 1), 6)])
def test_the_figure_is_drawn_of_one_case_and_of_one_feature(tmp_path, monkeypatch, cases, features):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(sets, "save_figure", lambda figure, path: drawn.append(figure))
    draw_figure(tmp_path / "figure.png", made_up(sum(cases), features), cases[0], -1.0, 2 / BINS)
    centres = drawn[0].axes[0].lines[0].get_xdata()
    assert [centres[0], centres[-1]] == pytest.approx([-1 + 1 / BINS, 1 - 1 / BINS])
    assert [len(c.get_offsets()) for c in drawn[0].axes[2].collections] == [cases[1], cases[0]]


@pytest.mark.parametrize(
    ("cases", "parts", "words"), [(49, 24, "left out"), (99, 49, "nothing to"), (100, 50, "")]
)
def test_shares_of_neighbours_of_few_cases_are_warned_of(cases, parts, words):
    found = " ".join(warnings_of(SetsConfig(), made_up(8, 4), (cases, cases), (parts, parts)))
    assert ("precision" in found) == bool(words)
    assert words in found


# --- figures that are known ---------------------------------------------------------------------------------


class Quadrants(nn.Module):
    """A network whose features can be computed by hand: the means of the four quarters of a picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[2] // 2, x.shape[3] // 2
        parts = [x[:, 0, :h, :w], x[:, 0, :h, w:], x[:, 0, h:, :w], x[:, 0, h:, w:]]
        return torch.stack([part.mean((1, 2)) for part in parts], dim=1)


def quadrants(pictures: np.ndarray) -> np.ndarray:
    """(N, 4) of pictures (N, H, W), in float64."""
    h, w = pictures.shape[1] // 2, pictures.shape[2] // 2
    parts = np.s_[:, :h, :w], np.s_[:, :h, w:], np.s_[:, h:, :w], np.s_[:, h:, w:]
    return np.stack([pictures[part].mean((1, 2)) for part in parts], axis=1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    values, vectors = np.linalg.eigh(np.cov(a.T))
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ np.cov(b.T) @ half).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root


def kernel(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The unbiased distance of two lists of cases, each (items, F): pairs within one case do not count."""

    def mean(x: list[np.ndarray], y: list[np.ndarray]) -> float:
        pairs = [(u, v) for i, u in enumerate(x) for j, v in enumerate(y) if x is not y or i != j]
        return float(np.mean([((u @ v.T / u.shape[1] + 1) ** 3).mean() for u, v in pairs]))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def neighbours(made: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """Counted ball by ball; a case is the nearest neighbour of itself."""
    reach_real, reach_made = (
        np.array([np.sort(np.linalg.norm(x - v, axis=1))[k] for v in x]) for x in (real, made)
    )
    near = np.array([[np.linalg.norm(r - m) for m in made] for r in real])  # (real, made)
    in_real, in_made = near <= reach_real[:, None], near <= reach_made
    return {
        "whole/precision": in_real.any(0).mean(),
        "whole/recall": in_made.any(1).mean(),
        "whole/density": in_real.sum() / (k * len(made)),
        "whole/coverage": in_real.any(1).mean(),
    }


def report_of(place, made: np.ndarray, real: np.ndarray, *flags: str) -> dict:
    """The report of two sets of arrays (N, *S) with intensities from -1 to 1, which are kept as they are."""
    torch.jit.script(Quadrants()).save(str(place / "net.ts"))
    dims = made.ndim - 1
    for name, arrays in (("made", made), ("real", real)):
        for i, array in enumerate(arrays):
            write(place / name / f"{i:03d}.{SUFFIX[dims]}", Volume(array[None], np.eye(dims + 1)))
    places = [str(place / "made"), str(place / "real"), "--out", str(place / "out")]
    evaluation_main(
        ["samples", *places, "--data.scaling", "window", "--data.window", "-1,1", "--resamples", "20", *flags]
    )
    return json.loads((place / "out" / "report.json").read_text())


@pytest.mark.parametrize("kind", ["alike", "narrow"])
def test_every_figure_of_known_pictures_is_the_one_computed_by_hand(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sets, "FEWEST", 4)
    draw = np.random.default_rng(3)
    spread = np.where(np.arange(44) < 20, {"alike": 1.0, "narrow": 0.3}[kind], 1.0)
    levels = spread[:, None, None] * draw.normal(size=(44, 2, 2))
    x = levels.repeat(8, 1).repeat(9, 2) + 0.1 * draw.normal(size=(44, 16, 18))
    x = (x / 6).astype(np.float32)
    made, real = x[:20], x[20:]
    flags = ["--features", str(tmp_path / "net.ts"), "--neighbours", "3", "--pairs", "1000"]
    report = report_of(tmp_path, made, real, *flags)
    found = {name: figure["value"] for name, figure in report["figures"].items()}
    a, b = quadrants(made.astype(np.float64)), quadrants(real.astype(np.float64))
    assert np.abs(x).max() < 1

    def likeness(s: np.ndarray) -> float:
        pairs = [(s[i], s[j]) for i in range(len(s)) for j in range(i)]
        x, y = (torch.from_numpy(np.stack(side))[:, None] for side in zip(*pairs, strict=True))
        return ms_ssim(x, y, 2.0).mean().item()

    spectra = [
        np.mean([power_spectrum(torch.from_numpy(v)[None], 8)[0].numpy() for v in s], axis=0)
        for s in (made, real)
    ]
    expected = {
        "whole/frechet": frechet(a, b),
        "whole/kernel": kernel([v[None] for v in a], [v[None] for v in b]),
        **neighbours(a, b, 3),
        "ms_ssim/generated": likeness(made),
        "ms_ssim/real": likeness(real),
        "spectrum_db": math.sqrt(((spectra[0] - spectra[1]) ** 2).mean()),
    }
    distance = wasserstein_distance(made.ravel(), real.ravel())
    assert found.pop("histogram") == pytest.approx(distance, abs=2 / BINS)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if kind == "alike":  # the unbiased distance may be negative, and so may the end of its interval
        assert expected["whole/kernel"] < 0
        assert report["figures"]["whole/kernel"]["low"] < expected["whole/kernel"]
    else:  # what is made lies among the real ones, and does not reach all of them
        assert expected["whole/precision"] > 0.9 > 0.5 > expected["whole/recall"]


def test_shares_of_few_cases_are_left_out_of_the_report(tmp_path):
    draw = np.random.default_rng(0)
    made, real = (draw.normal(0, 0.1, (n, 16, 18)).astype(np.float32) for n in (8, 10))
    report = report_of(tmp_path, made, real, "--features", str(tmp_path / "net.ts"))
    for name in sets.SHARES:
        assert set(report["figures"][f"whole/{name}"].values()) == {None}
    assert report["figures"]["whole/kernel"]["value"] is not None
    assert any("left out" in words for words in report["warnings"])


def test_figures_of_slices_are_those_of_each_plane_and_their_mean_over_three(tmp_path):
    draw = np.random.default_rng(0)
    ramps = np.meshgrid(*(np.linspace(-1, 1, n) for n in (12, 14, 16)), indexing="ij")
    x = sum(draw.normal(1 + axis, 1, (14, 1, 1, 1)) * ramp for axis, ramp in enumerate(ramps))
    x = ((x + draw.normal(size=(14, 12, 14, 16))) / 20).astype(np.float32)
    made, real = 1.2 * x[:6], x[6:]
    flags = ["--features", "none", "--slice_features", str(tmp_path / "net.ts"), "--slices", "3"]
    assert np.abs(made).max() < 1
    found = report_of(tmp_path, made, real, *flags)["figures"]
    means = {"frechet": [], "kernel": []}
    for axis, n in enumerate((12, 14, 16)):
        middle = [int(n * (0.1 + 0.8 * (k + 0.5) / 3)) for k in range(3)]
        a, b = (
            [quadrants(np.moveaxis(v.astype(np.float64).take(middle, axis), axis, 0)) for v in s]
            for s in (made, real)
        )
        means["frechet"].append(frechet(np.concatenate(a), np.concatenate(b)))
        means["kernel"].append(kernel(a, b))
        for name, values in means.items():
            assert found[f"plane{axis}/{name}"]["value"] == pytest.approx(values[-1], rel=1e-4)
    for name, values in means.items():
        assert found[f"planes/{name}"]["value"] == pytest.approx(np.mean(values), rel=1e-4)


def test_the_units_of_slices_are_measured_on_the_slices_of_all_three_planes(tmp_path, monkeypatch):
    write_heads(tmp_path / "real", 3, "same", 0, 4)
    opened = open_sets(str(tmp_path / "real"), {"real": (str(tmp_path / "real"), "val")}, OpenConfig())
    seen = []
    monkeypatch.setattr(sets, "fidelity_features", lambda items, *rest: seen.extend(items()))
    slice_extractor(SetsConfig(slices=5), opened.sets["real"], torch.device("cpu"))
    planes = [plane for x in volumes_of(opened.sets["real"]) for plane in planes_of(x, 5)]
    assert [tuple(g.shape) for g in seen[:3]] == [(5, 1, 18, 16), (5, 1, 16, 16), (5, 1, 16, 18)]
    assert all(torch.equal(a, b) for a, b in zip(seen, planes, strict=True))


# --- networks -----------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_its_definition():
    a, b = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1)
    )
    z = torch.cat([a, b])
    z = z / z.norm(dim=1, keepdim=True)
    losses = []
    for i in range(6):
        weights = [math.exp(float(z[i] @ z[k]) / 0.5) for k in range(6) if k != i]
        losses.append(-math.log(math.exp(float(z[i] @ z[(i + 3) % 6]) / 0.5) / sum(weights)))
    assert contrastive_loss(a, b, 0.5).item() == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("dims", [2, 3])
def test_an_own_network_is_the_same_for_the_same_seed_and_separates_cases(dims):
    x = torch.from_numpy(np.stack([head(i, dims).image for i in range(12)])) / 1000
    config = FeatureConfig(dims, steps=5, batch_size=8)
    device = torch.device("cpu")
    net, again = train_features(x, config, device), train_features(x, config, device)
    other = train_features(x, FeatureConfig(dims, steps=5, batch_size=8, seed=1), device)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(net(x), other(x))
    assert torch.allclose(net(x).mean(0), torch.zeros(32), atol=1e-4)
    assert net(x).std(0, correction=0).max() < 1.001


def test_training_brings_views_of_a_case_together_and_others_apart():
    x = torch.from_numpy(np.stack([head(i, 2).image for i in range(24)])) / 1000
    losses = []
    for steps in (1, 150):
        net = train_features(x, FeatureConfig(2, steps=steps), torch.device("cpu"))
        with torch.no_grad():
            losses.append(contrastive_loss(net.head(net(x)), net.head(net(x.roll(1, 2))), 0.2).item())
    assert losses[1] < 0.9 * losses[0]


class Means(nn.Module):
    """A stand-in for a published network: three channels in, (B, F, *s) maps out."""

    def __init__(self, dims: int):
        super().__init__()
        self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](3, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("kind", ["script", "export"])
def test_a_network_from_a_file_gives_the_features(tmp_path, kind, capsys):
    torch.manual_seed(0)
    net, path = Means(2).eval(), tmp_path / f"net.{kind}"
    example = torch.zeros(1, 3, *SIZES[2])
    if kind == "script":
        torch.jit.script(net).save(str(path))
    else:
        torch.export.save(torch.export.export(net, (example,)), path)
    real, made = (write_heads(tmp_path / n, 2, "same", f, 5) for n, f in (("real", 0), ("made", 9)))
    evaluation_main(
        ["samples", made, real, "--features", str(path), "--out", str(tmp_path / "report"), *FAST]
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["networks"]["whole"]["features"] == 6
    assert len(report["networks"]["whole"]["sha256"]) == 64
    assert "5 cases for 6 features are too few" in capsys.readouterr().out


def photographs(file, x: torch.Tensor) -> list[torch.Tensor]:
    """The last map of every stage of torchvision's vgg16 for images (B, 3, H, W), scaled to length 1."""
    layers, content = [], torch.load(file)
    for index in range(31):
        if f"features.{index}.weight" in content:
            weight = content[f"features.{index}.weight"]
            layers.append(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1))
        else:
            layers.append(nn.MaxPool2d(2) if index in (4, 9, 16, 23, 30) else nn.ReLU())
    nn.Sequential(*layers).load_state_dict({k.removeprefix("features."): v for k, v in content.items()})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    h, maps = ((x + 1) / 2 - mean) / std, []
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.MaxPool2d):
            maps.append(h)
            if index == 30 or min(h.shape[2:]) < 2:
                break
        h = layer(h)
    return [h / h.square().sum(1, keepdim=True).clamp(min=1e-10).sqrt() for h in maps]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_weights_of_a_perceptual_loss_give_features(tmp_path, dims):
    file = tiny.vgg_weights(tmp_path / "vgg.pth")
    net = file_features(str(file), dims, torch.device("cpu"))
    x = torch.rand(2, 1, *((40, 34) if dims == 2 else (24, 16, 40))) * 2 - 1

    def of_images(images: torch.Tensor) -> list[torch.Tensor]:
        return [m.mean((2, 3)) for m in photographs(file, images.expand(-1, 3, -1, -1))]

    with torch.no_grad():
        if dims == 2:
            expected = torch.cat(of_images(x), 1)
        else:
            expected = []
            for volume in x:
                planes = [of_images(plane) for plane in planes_of(volume, 16)]
                num = min(map(len, planes))
                expected.append(sum(torch.cat(stages[:num], 1).mean(0) for stages in planes) / 3)
            expected = torch.stack(expected)
    torch.testing.assert_close(net(x), expected, rtol=1e-2, atol=1e-3)  # LPIPS rounds ImageNet's mean
    colours = torch.rand(2, 3, 40, 34)
    if dims == 2:
        expected = torch.cat([m.mean((2, 3)) for m in photographs(file, colours)], 1)
        net = file_features(str(file), dims, torch.device("cpu"))
        torch.testing.assert_close(net(colours), expected, rtol=1e-2, atol=1e-3)


def test_the_report_names_the_network_of_photographs(tmp_path):
    file = tiny.vgg_weights(tmp_path / "vgg.pth")
    real, made = (write_heads(tmp_path / n, 3, "same", f, 5) for n, f in (("real", 0), ("made", 9)))
    flags = ["--features", str(file), "--slice_features", str(file), "--out", str(tmp_path / "report"), *FAST]
    evaluation_main(["samples", made, real, *flags])
    networks = json.loads((tmp_path / "report" / "report.json").read_text())["networks"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("whole", "slices"):
        assert (networks[name]["network"], networks[name]["sha256"]) == (f"VGG-16 of {file}", digest)


def test_the_encoder_of_a_run_serves_its_own_held_out_cases_and_the_report_says_so(vae_run, heads, tmp_path):
    flags = ["--features", "run", "--out", str(tmp_path / "report"), "--resamples", "5"]
    evaluation_main(["samples", str(heads / "images"), str(vae_run), *flags])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    split = json.loads((vae_run / "split.json").read_text())
    assert report["cases"] == {"generated": 12, "real": len(split["val"])}
    assert report["networks"]["whole"]["features"] == 3 * 4
    assert any("within this run" in words for words in report["warnings"])


def test_slices_are_spread_over_the_middle_of_every_axis():
    x = torch.arange(20)[:, None, None].expand(20, 6, 8)[None]
    planes = planes_of(x, 4)
    assert [p.shape for p in planes] == [(4, 1, 6, 8), (4, 1, 20, 8), (4, 1, 20, 6)]
    assert planes[0][:, 0, 0, 0].tolist() == [4, 8, 12, 16]


def test_pairs_of_slices_of_one_case_do_not_count_in_the_kernel_distance():
    f = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = Measured(None, [f], torch.ones(7, 1, 4) / 4, torch.zeros(7, 1, 3))
    block = measured.slice_kernels[0]
    expected = np.mean([(float(a @ b) / 3 + 1) ** 3 for a in f[1] for b in f[4]])
    assert block.shape == (7, 7)
    assert block[1, 4].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["REAL"], "which REAL"),
        (["REAL", "/nowhere"], "/nowhere: no such folder"),
        (["REAL", "REAL", "--features", "/no.pt"], "/no.pt: no such file"),
        (["REAL", "REAL", "--features", "JUNK"], "neither TorchScript"),
        (["REAL", "REAL", "--features", "run"], "needs a run folder"),
        (["REAL", "REAL", "--run", "/nowhere"], "not a run folder"),
        (["REAL", "REAL", "--data.sise", "3,3"], "did you mean --data.size"),
        (["REAL", "REAL", "--slices", "0"], "slices"),
        (["REAL", "EMPTY"], "EMPTY"),
    ],
)
def test_mistakes_are_named(tmp_path, mistake, flags, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "JUNK").write_bytes(b"junk")
    write_heads(tmp_path / "REAL", 2, "same", 0, 4)
    places = {name: str(tmp_path / name) for name in ("REAL", "EMPTY", "JUNK")}
    flags = [places.get(flag, flag) for flag in flags]
    flags += ["--cache_dir", str(tmp_path)]
    error = mistake(evaluation_main, ["samples", *flags])
    assert words in error
