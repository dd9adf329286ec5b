"""Guidance is the nested formula, computed in as few branches as it needs, in one forward a step."""

import math

import pytest
import torch

from ldm3d import Denoiser, DiffusionKernel, InputError, KernelConfig, UNetConfig
from ldm3d.conditions import Condition, ConditionConfig, hide
from ldm3d.diffusion_kernel import SAMPLERS
from ldm3d.guidance import Autoguidance, Guidance, active_branches, branch_weights, guided

CONDITIONS = [
    Condition("class", "class", ("0", "1")),
    Condition("text", "text", ("a", "lesion"), length=3),
    Condition("image", "image", width=2),
]
NAMES = [c.name for c in CONDITIONS]
SIZE = (4, 6)


class Counting(Denoiser):
    """Remembers the batch sizes that it was called with."""

    def forward(self, x_t, *more):
        self.calls.append(len(x_t))
        return super().forward(x_t, *more)


@pytest.fixture(scope="module")
def net():
    unet = UNetConfig(
        dims=2, in_channels=2, out_channels=2, channels=(8, 16), num_groups=4, num_res_blocks=(1,),
        attention_levels=(False, True), head_channels=8,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Counting(unet, ConditionConfig(context_dim=16, text_layers=1), CONDITIONS).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.requires_grad_(False)


@pytest.fixture
def values():
    torch.manual_seed(1)
    text = torch.tensor([[1, 2, -1], [2, 0, 1]])
    return {"class": torch.tensor([0, 1]), "text": text, "image": torch.randn(2, 2, *SIZE)}


X = torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(2))
T = torch.tensor([400.0, 400.0])


def predictor(net, values, scale, **more):
    net.calls = []
    return guided(net, values, X, Guidance(scale, **more), 1000)


def nested(net, values, scales):
    """The formula with one call of the network for every term."""
    net.calls = []
    preds = [net(X, T, {n: values[n] for n in NAMES[:k]}) for k in range(len(NAMES) + 1)]
    pred = preds[0]
    for k, scale in enumerate(scales):
        pred = pred + scale * (preds[k + 1] - preds[k])
    return pred


def test_the_weights_of_the_branches_are_those_of_the_nested_formula():
    torch.manual_seed(0)
    preds, scales = torch.randn(5, 7, dtype=torch.float64), [3.0, 0.5, -1.0, 2.0]
    pred = preds[0] + sum(s * (preds[k + 1] - preds[k]) for k, s in enumerate(scales))
    got = sum(w * p for w, p in zip(branch_weights(scales), preds, strict=True))
    assert torch.allclose(got, pred, atol=1e-12)
    assert branch_weights((3, 1)) == [-2, 2, 1]


@pytest.mark.parametrize("scales", [(3.0, 2.0, 1.5), (0.0, 4.0, 4.0), (2.0, 1.0, 0.0)])
def test_one_batched_forward_gives_what_a_call_for_every_term_gives(net, values, scales):
    predict = predictor(net, values, dict(zip(NAMES, scales, strict=True)))
    got = predict(X, T)
    assert len(net.calls) == 1
    assert torch.allclose(got, nested(net, values, scales), atol=1e-4)


def test_all_scales_one_is_the_conditional_and_all_zero_the_unconditional_prediction(net, values):
    for scale, expected in ((1.0, values), (0.0, {})):
        got = predictor(net, values, scale)(X, T)
        assert net.calls == [2]  # one branch of two samples
        assert torch.equal(got, net(X, T, expected))


@pytest.mark.parametrize(
    ("scale", "rescale", "branches"),
    [
        (3.0, 0.0, 2),
        ({"class": 3.0, "text": 2.0, "image": 1.5}, 0.0, 4),
        ({"class": 3.0}, 0.0, 3),
        ({"image": 2.0}, 0.0, 2),
        (1.0, 0.7, 1),
        ({"class": 3.0, "text": 0.0, "image": 0.0}, 0.0, 2),
        ({"class": 3.0, "text": 0.0, "image": 0.0}, 0.7, 3),  # the last for its deviation
    ],
)
def test_no_branch_is_computed_in_vain(net, values, scale, rescale, branches):
    predictor(net, values, scale, rescale=rescale)(X, T)
    assert net.calls == [2 * branches]
    assert len(active_branches(branch_weights(Guidance(scale).scales(CONDITIONS)), rescale)) == branches


def test_a_missing_condition_takes_no_part(net, values):
    some = {"text": values["text"]}
    got = predictor(net, some, 3.0)(X, T)
    with_text, without = net(X, T, some), net(X, T)
    assert torch.allclose(got, without + 3 * (with_text - without), atol=1e-4)


def test_a_sample_without_conditions_is_not_guided(net, values):
    gone = torch.tensor([False, True])
    values = {name: hide(value, gone) for name, value in values.items()}
    got = predictor(net, values, 5.0)(X, T)
    assert torch.allclose(got[1], net(X, T)[1], atol=1e-4)
    assert not torch.allclose(got[0], net(X, T)[0], atol=1e-2)


def test_rescaling_gives_back_the_deviation_of_the_conditional_prediction(net, values):
    conditional = net(X, T, values).flatten(1).std(1)
    plain = predictor(net, values, 4.0)(X, T)
    assert not torch.allclose(plain.flatten(1).std(1), conditional, rtol=0.05)
    full = predictor(net, values, 4.0, rescale=1.0)(X, T)
    assert torch.allclose(full.flatten(1).std(1), conditional, rtol=1e-4)
    half = predictor(net, values, 4.0, rescale=0.5)(X, T)
    assert torch.allclose(half, (plain + full) / 2, atol=1e-4)


def test_outside_the_interval_there_is_no_guidance(net, values):
    predict = predictor(net, values, 4.0, interval=(0.2, 0.6))
    for t in (100.0, 700.0):
        assert torch.allclose(predict(X, T * 0 + t), net(X, T * 0 + t, values), atol=1e-6)
    inside = predictor(net, values, 4.0)(X, T)
    assert torch.allclose(predict(X, T), inside, atol=1e-6)


def test_outside_the_interval_no_scale_goes_beyond_0_or_1(net, values):
    """A scale of 0 says that the condition is not to be followed: the interval does not turn it on."""
    for scale, outside in ((0.0, {}), (1.0, values)):
        predict = predictor(net, values, scale, interval=(0.2, 0.6))
        for t in (100.0, 400.0, 700.0):
            assert torch.equal(predict(X, T * 0 + t), net(X, T * 0 + t, outside))
    predict = predictor(net, values, {"class": 3.0, "text": 0.0, "image": -2.0}, interval=(0.2, 0.6))
    only = {"class": values["class"]}
    assert torch.allclose(predict(X, T + 300), net(X, T + 300, only), atol=1e-6)
    half = predictor(net, values, 0.5, interval=(0.2, 0.6), rescale=1.0)(X, T + 300)
    assert torch.allclose(half, (net(X, T + 300) + net(X, T + 300, values)) / 2, atol=1e-5)


def test_autoguidance_goes_on_along_the_line_from_the_weaker_prediction_to_the_stronger():
    def strong(x_t, t):
        return 0.5 * x_t

    def weaker(x_t, t):
        return 0.4 * x_t

    for scale, expected in ((1.0, 0.5), (1.3, 0.53), (3.0, 0.7)):
        predict = Autoguidance(torch.nn.Identity(), scale).around(strong, weaker, 1000)
        torch.testing.assert_close(predict(X, T), expected * X)


def test_autoguidance_acts_in_its_interval_and_calls_the_weaker_denoiser_there_alone():
    called = []

    def weaker(x_t, t):
        called.append(float(t[0]))
        return 0 * x_t

    auto = Autoguidance(torch.nn.Identity(), 2.0, (0.2, 0.6))
    predict = auto.around(lambda x_t, t: x_t, weaker, 1000)
    scales = [float((predict(X, T * 0 + t) / X).mean()) for t in (100.0, 200.0, 400.0, 600.0, 700.0)]
    assert scales == pytest.approx([1, 2, 2, 2, 1])
    assert called == [200, 400, 600]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_it(net, values, sampler):
    kernel = DiffusionKernel(KernelConfig(process=SAMPLERS[sampler].process, prediction="v"))

    def draw(shape):
        return torch.zeros(shape)

    plain = kernel.sample(lambda x, t: net(x, t, values), X, 3, sampler, draw=draw)
    same = kernel.sample(predictor(net, values, 1.0), X, 3, sampler, draw=draw)
    other = kernel.sample(predictor(net, values, 3.0), X, 3, sampler, draw=draw)
    assert torch.allclose(same, plain, atol=1e-4)
    assert torch.isfinite(other).all()
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("scale", "present", "names"),
    [
        (3.0, ["class", "text"], None),
        (3.0, [], "any condition"),
        (1.0, [], None),
        ({"class": 3.0, "text": 2.0}, ["class"], "text"),
        ({"class": 1.0, "text": 2.0}, ["text"], None),
    ],
)
def test_a_scale_that_acts_on_nothing_is_noted(values, scale, present, names, capsys):
    nobody = torch.ones(2, dtype=torch.bool)
    Guidance(scale).note_idle({n: v if n in present else hide(v, nobody) for n, v in values.items()})
    expected = f"note: guidance has no effect, no sample has a value of {names}\n" if names else ""
    assert capsys.readouterr().out == expected


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="guidance_interval"):
        Guidance(interval=(0.5, 0.5))
    with pytest.raises(InputError, match="guidance_rescale"):
        Guidance(rescale=2.0)
    with pytest.raises(InputError, match="autoguidance_interval"):
        Autoguidance(torch.nn.Identity(), 2.0, (0.7, 0.2))
    for scale in (0.5, math.nan, math.inf, "2", None):
        with pytest.raises(InputError, match="autoguidance: expected a number from 1 on"):
            Autoguidance(torch.nn.Identity(), scale)
    for scale in (math.nan, math.inf, [3, 2], "3", {"class": math.nan}, {"class": None}):
        with pytest.raises(InputError, match="guidance: expected a finite number"):
            Guidance(scale)
    with pytest.raises(InputError, match="condition klass: the model has no such condition"):
        Guidance({"klass": 2.0}).check(CONDITIONS)
