"""A ControlNet and low-rank adapters learn beside a denoiser that stays as it is: such runs start from its
predictions to the bit, resume, are sampled like any other, and hold all that they need."""

import copy
import json
import shutil

import pytest
import torch
from closeness import close
from tiny import RUN, assert_equal, ldm_flags, lines, on_two_ranks, vae_flags

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d.conditions import ConditionConfig, absent
from ldm3d.config import flatten, from_dict
from ldm3d.engine.checkpoint import load, load_run, save, step_files
from ldm3d.lora import ORIGINAL, LowRank, add_adapters, merge
from ldm3d.pipeline import build_autoencoder
from ldm3d.vqvae import make_autoencoder

WAYS = {"control": ["--control", "labels"], "adapters": ["--lora.rank", "2"]}


@pytest.fixture(scope="module")
def plain(vae_run, tmp_path_factory):
    """The run folder of a denoiser with classes, after twelve steps."""
    folder = tmp_path_factory.mktemp("adapted") / "plain"
    train_ldm.main(ldm_flags(vae_run, folder, 12, "--condition.use", "class"))
    return folder


def flags_of(plain, run, steps, *more):
    """A run of the preset that starts from `plain`, whose network and autoencoder it takes."""
    settings = [*RUN, "--batch_size", 4, "--sample_steps", 2, "--optim.lr", 2e-3, *more]
    return list(map(str, ["phantom", "--run.init", plain, "--run.dir", run, "--run.steps", steps, *settings]))


def train_and_keep_the_first(plain, folder, way):
    """Train for ten steps; (the folder, a copy of the network before the first one)."""
    first, real = [], train_ldm.freeze_base

    def watched(net, *arguments):
        real(net, *arguments)
        first.append(copy.deepcopy(net))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ldm, "freeze_base", watched)
        train_ldm.main(flags_of(plain, folder, 10, *WAYS[way]))
    return folder, first[0]


@pytest.fixture(scope="module")
def control(plain):
    return train_and_keep_the_first(plain, plain.parent / "control", "control")


@pytest.fixture(scope="module")
def adapters(plain):
    return train_and_keep_the_first(plain, plain.parent / "adapters", "adapters")


@pytest.fixture(params=list(WAYS))
def adapted(request):
    return request.param, *request.getfixturevalue(request.param)


def inputs_of(model):
    """x_t, t and conditions of a model of the heads."""
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    values = model.prepare({"class": [1, None]}, 2)
    if "labels" in [c.name for c in model.denoiser.conditions]:
        mask = torch.randint(5, model.spec.size, generator=torch.Generator().manual_seed(1))
        values |= model.prepare({"labels": mask}, 2)
    return x_t, torch.tensor([20.0, 900.0]), values


def test_a_run_starts_from_the_predictions_of_its_base_to_the_bit(adapted, plain):
    _, run, first = adapted
    base, model = ldm3d.load(plain).model, ldm3d.load(run).model
    x_t, t, values = inputs_of(model)
    expected = base.denoiser(x_t, t, {"class": values["class"]})
    assert torch.equal(first(x_t, t, values), expected)
    assert not torch.allclose(model.denoiser(x_t, t, values), expected)
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(getattr(model, name), getattr(base, name))


def test_the_base_stays_as_it_is_and_all_else_learns(adapted, plain):
    _, run, first = adapted
    base, content = load_run(plain)["ema"], load(step_files(run)[0])
    for part in ("model", "ema"):
        after = {k.replace(ORIGINAL, ".weight"): v for k, v in content[part].items()}
        assert all(torch.equal(after[name], value) for name, value in base.items())
        before = {k: v for k, v in first.state_dict().items() if k.replace(ORIGINAL, ".weight") not in base}
        assert before
        assert [k for k, v in before.items() if torch.equal(content[part][k], v)] == []
    moments = content["optimizers"]["denoiser"]["optimizer"]["state"]
    assert len(moments) == len(before)


def test_the_averages_share_what_is_frozen(adapted):
    _, _, first = adapted
    ema = train_ldm.EMA(first, 0.9)
    for mine, theirs in zip(ema.net.parameters(), first.parameters(), strict=True):
        assert (mine is theirs) != theirs.requires_grad


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(adapted, plain, tmp_path, capsys):
    """The base may be gone by then: the folder is complete."""
    way, run, first = adapted
    shutil.copytree(plain, tmp_path / "base")
    train_ldm.main(flags_of(tmp_path / "base", tmp_path / "run", 5, *WAYS[way]))
    trained = sum(p.numel() for p in first.parameters() if p.requires_grad)
    said = capsys.readouterr().out
    assert f"({trained / 1e3:.3g} k trained; gradients, moments and averages" in said
    assert said.endswith({"control": "/run --cases val\n", "adapters": "/run --num 4\n"}[way])
    shutil.rmtree(tmp_path / "base")
    train_ldm.main(flags_of(tmp_path / "base", tmp_path / "run", 10, *WAYS[way]))
    one, other = (load(step_files(folder)[0]) for folder in (run, tmp_path / "run"))
    for part in ("model", "ema", "optimizers"):
        assert_equal(one[part], other[part], part)


# --- ControlNet ---------------------------------------------------------------------------------------------


def test_samples_follow_the_mask_and_without_one_they_are_those_of_the_base(control, plain):
    model, base = ldm3d.load(control[0]), ldm3d.load(plain)
    mask = f"{model.layout.root}/labels/phantom_0003.tif"
    x = model.sample(2, steps=2, conditions={"class": 1})
    assert torch.equal(x, base.sample(2, steps=2, conditions={"class": 1}))
    under = model.sample(2, steps=2, conditions={"class": 1, "labels": mask})
    assert not torch.allclose(under, x, atol=1e-6)
    further = model.sample(2, steps=2, conditions={"class": 1, "labels": mask}, guidance_scale={"labels": 3})
    assert not torch.allclose(further, under, atol=1e-6)


def test_the_best_weights_of_a_control_run_are_those_with_the_lowest_loss_at_high_noise(control, adapters):
    best = load(control[0] / "best.pt")["best"]
    found = [(line["loss_u0.8"] + line["loss_u0.95"]) / 2 for line in lines(control[0], "val")]
    assert best["name"] == "loss_high_noise"
    assert best["value"] == pytest.approx(min(found))
    assert load(adapters[0] / "best.pt")["best"]["name"] == "loss"


def test_sample_takes_masks_as_those_of_the_condition(control, tmp_path):
    root = ldm3d.load(control[0]).layout.root
    flags = ["--condition", f"labels={root}/labels/phantom_0003.tif", "--steps", "2", "--num", "2"]
    sample.main([str(control[0]), *flags, "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.tif"))) == 2
    sample.main([str(control[0]), "--cases", "val", "--steps", "2", "--out", str(tmp_path / "cases")])
    assert list((tmp_path / "cases").glob("*.tif"))


def test_the_map_is_never_hidden_in_training():
    values = {"class": torch.ones(99, dtype=torch.int64), "labels": torch.ones(99, 3, 2, 2)}
    config = ConditionConfig(use=("class",), dropout=(0.5,), dropout_all=0.5)
    hidden = train_ldm.hide_some(values, config, 0, torch.arange(99))
    assert list(hidden) == ["class", "labels"]
    assert 50 < absent(hidden["class"]).sum() < 99
    assert torch.equal(hidden["labels"], values["labels"])


@pytest.mark.slow
def test_sources_can_be_followed_too_and_a_control_run_can_go_on_in_another(conditional_run, tmp_path):
    vae = conditional_run.parent / "vae"
    train_ldm.main(ldm_flags(vae, tmp_path / "plain", 5))
    train_ldm.main(flags_of(tmp_path / "plain", tmp_path / "one", 5, "--control", "image"))
    train_ldm.main(flags_of(tmp_path / "one", tmp_path / "two", 5, "--control", "image", "--optim.lr", 1e-12))
    one, two = (load_run(tmp_path / name)["ema"] for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert any(name.startswith("control.") for name in one)


@pytest.mark.slow
def test_registers_of_the_base_go_on_as_they_were(bound_run, tmp_path):
    train_ldm.main(flags_of(bound_run, tmp_path / "run", 5, "--control", "labels"))
    model = ldm3d.load(tmp_path / "run")
    mask = f"{model.layout.root}/labels/phantom_0003.tif"
    x, labels = model.sample(1, steps=2, conditions={"labels": mask}, with_labels=True)
    assert labels.shape[1:] == x.shape[2:]


# --- low-rank adapters --------------------------------------------------------------------------------------


def test_an_opened_run_holds_merged_weights_that_predict_as_the_adapters_do(adapters, plain):
    run, first = adapters
    model = ldm3d.load(run).model
    first.load_state_dict(load(run / "best.pt")["ema"])
    arguments = inputs_of(model)
    close(model.denoiser(*arguments), first(*arguments))
    assert model.denoiser.state_dict().keys() == ldm3d.load(plain).model.denoiser.state_dict().keys()
    sample.main([str(run), "--num", "1", "--steps", "2", "--out", str(run / "out")])


def test_the_rank_is_that_of_the_setting_or_of_the_matrix(adapters):
    _, first = adapters
    ranks = {len(m.a) for m in first.modules() if isinstance(m, LowRank)}
    assert ranks == {2}
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 2), torch.nn.Embedding(4, 4))
    plain = copy.deepcopy(layer)
    add_adapters(layer, 3)
    shapes = [tuple(m.a.shape) for m in layer.modules() if isinstance(m, LowRank)]
    assert shapes == [(3, 27), (2, 5)]
    with torch.no_grad():
        for p in (p for p in layer.parameters() if p.requires_grad):
            p.normal_()
    merged = merge(layer.state_dict())
    plain.load_state_dict(merged)
    x = torch.randn(2, 3, 6, 6)
    close(plain[0](x), layer[0](x))
    adapter = layer[0].parametrizations.weight
    product = torch.einsum("or,ri->oi", adapter[0].b, adapter[0].a).view(4, 3, 3, 3)
    close(merged["0.weight"], adapter.original + product)


def test_a_run_with_adapters_is_the_base_of_another(adapters, tmp_path):
    run, _ = adapters
    train_ldm.main(flags_of(run, tmp_path / "next", 1, "--lora.rank", 3))
    content = load(step_files(tmp_path / "next")[0])["model"]
    before = load_run(run)["ema"]
    originals = {k.replace(ORIGINAL, ".weight"): v for k, v in content.items() if k.endswith(ORIGINAL)}
    assert originals
    assert all(torch.equal(before[name], value) for name, value in originals.items())


def test_an_autoencoder_learns_by_adapters_too(vae_run, heads, tmp_path):
    run, more = tmp_path / "vae", ["--run.init", vae_run, "--lora.rank", 2]
    train_vae.main(vae_flags(heads, run, 5, *more))
    train_vae.main(vae_flags(heads, run, 10, *more))
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < losses[0]
    content = load(run / "best.pt")
    net = make_autoencoder("kl", ldm3d.load(run).net.config, None)
    add_adapters(net, 2)
    net.load_state_dict(content["ema"])
    x = torch.randn(1, 1, 16, 20, generator=torch.Generator().manual_seed(0))
    opened = build_autoencoder(load_run(run, "vae"), "x")
    close(opened.encode(x).mean, net.encode(x).mean, 1e-4)
    before = load_run(vae_run)["ema"]
    kept = {k.replace(ORIGINAL, ".weight"): v for k, v in content["ema"].items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_codes_of_an_adapted_autoencoder_stay_as_they_are(update, heads, tmp_path):
    codes = ["--autoencoder", "vq", "--quantizer.codebook_size", 16, "--quantizer.update", update]
    train_vae.main(vae_flags(heads, tmp_path / "base", 2, *codes))
    train_vae.main(vae_flags(heads, tmp_path / "run", 3, "--run.init", tmp_path / "base", "--lora.rank", 2))
    before, content = load_run(tmp_path / "base")["ema"], load(step_files(tmp_path / "run")[0])
    names = [name for name in before if name.startswith("quantizer.")]
    assert len(names) == {"ema": 4, "gradient": 3}[update]
    for part in ("model", "ema"):
        assert all(torch.equal(content[part][name], before[name]) for name in names)
    assert lines(tmp_path / "run")[-1]["perplexity"] > 1


# --- what does not fit --------------------------------------------------------------------------------------


def test_a_plan_says_what_the_frozen_denoiser_brings_along(vae_run, plain, tmp_path, mistake):
    flags = ["--run.init", plain, *WAYS["adapters"], "--unet.channels", "24", "--run.dir", tmp_path / "run"]
    said = mistake(train_ldm.main, list(map(str, [vae_run, *flags])))
    assert "unet.channels: is 8,16 in" in said


def test_what_the_frozen_denoiser_brings_along_cannot_be_changed(plain, vae_run, heads, tmp_path, mistake):
    other = tmp_path / "vae"
    train_vae.main(vae_flags(heads, other, 1))
    for flags, words in (
        (["--unet.channels", "8,32"], "unet.channels: is 8,16 in"),
        (["--kernel.process", "vp", "--kernel.prediction", "eps"], "kernel.process: is flow in"),
        (["--condition.use", "text"], "condition.use: is class in"),
        (["--vae", other], "vae: another autoencoder than"),
    ):
        said = mistake(train_ldm.main, flags_of(plain, tmp_path / "run", 1, *WAYS["control"], *flags))
        assert words in said
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one(way, plain, tmp_path):
    """Every parameter that is trained takes part in every step, as DDP demands."""

    def train(folder):
        train_ldm.main(flags_of(plain, folder, 10, *WAYS[way]))

    train(tmp_path / "one")
    assert on_two_ranks(train, tmp_path / "two") == [0, 0]
    one, two = (load_run(tmp_path / name)["ema"] for name in ("one", "two"))
    for key, value in one.items():
        close(two[key], value, 1e-3)


def test_a_plan_takes_the_network_of_the_run_whose_denoiser_stays_frozen(vae_run, plain, tmp_path, capsys):
    flags = ["--run.init", plain, *WAYS["adapters"], "--run.dir", tmp_path / "run", "--run.steps", 2]
    train_ldm.main([str(word) for word in (vae_run, *flags, *RUN, "--run.device", "cpu")])
    contents = (load_run(run, "ldm")["config"] for run in (tmp_path / "run", plain))
    stored, theirs = (flatten(from_dict(train_ldm.Config, content)) for content in contents)
    rows = {row["key"]: row for row in json.loads((tmp_path / "run/plan.json").read_text())}
    assert rows["unet.channels"]["why"] == "of the run that is taken over"
    for key, row in rows.items():
        assert row["value"] == json.loads(json.dumps(stored[key]))
        if key.startswith("unet."):
            assert stored[key] == theirs[key]
    assert "of the run that is taken over" in capsys.readouterr().out


# --- more input channels for all weights --------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [(), ("--patch.size", "4,4", "--patch.halvings", "0")])
def test_a_run_adds_a_map_to_the_conditions_of_its_base_and_starts_from_its_predictions(
    plain, vae_run, tmp_path, coordinates, mistake
):
    with pytest.MonkeyPatch.context() as patch:
        first, real = [], train_ldm.freeze_base
        patch.setattr(
            train_ldm, "freeze_base", lambda net, *a: (real(net, *a), first.append(copy.deepcopy(net)))
        )
        more = ["--condition.use", "class,labels", "--vae", str(vae_run)]
        train_ldm.main(flags_of(plain, tmp_path / "run", 2, *more, *coordinates))
    base, run = (ldm3d.load(folder).model for folder in (plain, tmp_path / "run"))
    x_t, t, values = inputs_of(run)
    before = base.denoiser(x_t, t, {"class": values["class"]})
    assert torch.equal(first[0].eval()(x_t, t, values), before)
    after = run.denoiser(x_t, t, values)
    assert not torch.equal(after, run.denoiser(x_t, t, {"class": values["class"]}))  # the map is learned from
    if coordinates:
        flags = flags_of(tmp_path / "run", tmp_path / "whole", 2, *more)
        assert "run was trained with 4,4, and its denoiser needs the coordinates" in mistake(
            train_ldm.main, flags
        )
        assert not (tmp_path / "whole").exists()


def test_label_maps_keep_the_channels_of_run_init_and_new_ones_have_moments(
    plain, vae_run, tmp_path, mistake
):
    """Runs of before had no setting `label_moments`, and shares alone."""
    labels, names = tmp_path / "labels", ("class", "class,labels")
    train_ldm.main(
        ldm_flags(vae_run, labels, 1, "--condition.use", "class,labels", "--condition.label_moments", "false")
    )
    for name, run in zip(names, (plain, labels), strict=True):
        content = load_run(run)
        del content["config"]["condition"]["label_moments"]
        for condition in content["state"]["conditions"]:
            del condition["moments"]
        save(tmp_path / f"{name}.pt", content)
    use = ["--condition.use", "class,labels", "--vae", str(vae_run)]
    for name, moments in zip(names, (True, False), strict=True):
        train_ldm.main(flags_of(tmp_path / f"{name}.pt", tmp_path / f"from {name}", 1, *use))
        content = load_run(tmp_path / f"from {name}")
        assert content["config"]["condition"]["label_moments"] == moments
        assert [c["moments"] for c in content["state"]["conditions"]] == [False, moments]
    other = flags_of(
        tmp_path / "class,labels.pt", tmp_path / "other", 1, *use, "--condition.label_moments", "true"
    )
    assert "condition.label_moments: is false in" in mistake(train_ldm.main, other)


def test_a_condition_that_is_no_map_cannot_be_added(plain, vae_run, tmp_path, mistake):
    flags = flags_of(plain, tmp_path / "run", 2, "--condition.use", "class,text", "--vae", vae_run)
    assert "has conditions class, this run class,text" in mistake(train_ldm.main, flags)
    assert not (tmp_path / "run").exists()
