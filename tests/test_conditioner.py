"""Conditions become context, channels and embeddings; what is absent is a learned null, whoever hides it."""

import math
from dataclasses import replace

import pytest
import torch

from ldm3d import Denoiser, InputError, UNetConfig
from ldm3d.blocks import CrossAttention, position_features
from ldm3d.conditioner import PARTS, Conditioner
from ldm3d.conditions import KINDS, Condition, ConditionConfig, blank, hide

ALL = {
    "class": Condition("class", "class", ("0", "1", "2")),
    "sex": Condition("class", "sex", ("F", "M")),
    "age": Condition("number", "age", mean=(50.0,), std=(10.0,)),
    "spacing": Condition("spacing", "spacing", mean=(1.0, 1.0), std=(0.1, 0.2)),
    "text": Condition("text", "text", ("a", "in", "left", "lesion", "the"), length=6),
    "report": Condition("embedding", "report", length=4, width=5),
    "image": Condition("image", "image", width=3),
    "tokens": Condition("tokens", "tokens", width=3),
    "labels": Condition("labels", "labels", width=4),
}
CONFIG = ConditionConfig(context_dim=16, text_layers=1)
UNET = UNetConfig(
    dims=2, in_channels=3, out_channels=3, channels=(8, 16), num_groups=4, num_res_blocks=(1,),
    attention_levels=(False, True), head_channels=8,
)  # fmt: skip


def values_of(batch=3, size=(4, 6)):
    """A value of every condition, without blanks."""
    torch.manual_seed(0)
    return {
        "class": torch.tensor([0, 1, 2])[:batch],
        "sex": torch.tensor([1, 0, 1])[:batch],
        "age": torch.tensor([[40.0], [50.0], [61.0]])[:batch],
        "spacing": torch.tensor([[1.0, 1.2], [0.9, 1.0], [1.1, 0.7]])[:batch],
        "text": torch.tensor([[1, 4, 2, 5, 3, -1], [1, 4, -1, -1, -1, -1], [4, 0, -1, -1, -1, -1]])[:batch],
        "report": torch.randn(batch, 4, 5),
        "image": torch.randn(batch, 3, *size),
        "tokens": torch.randn(batch, 3, *size),
        "labels": torch.rand(batch, 4, *size),
    }


def noisy(net, std=0.1):
    """The network with all weights random, those that start at zero too."""
    torch.manual_seed(3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def make_denoiser(*names):
    return noisy(Denoiser(UNET, CONFIG, [ALL[n] for n in names or ALL]))


X, T = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 300.0, 900.0])


def test_every_kind_of_condition_is_tested_here_and_has_a_module():
    assert {c.kind for c in ALL.values()} == set(KINDS) == set(PARTS)


def test_every_parameter_gets_a_gradient_whatever_is_absent():
    net = make_denoiser()
    for conditions in (values_of(), None, {"class": torch.tensor([1, -1, 0])}):
        net.zero_grad()
        net(X, T, conditions).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    some = {name: hide(v, torch.tensor([True, False, False])) for name, v in values_of().items()}
    net(X, T, some).square().mean().backward()
    assert [n for n, p in net.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("name", list(ALL))
def test_the_prediction_depends_on_each_condition_and_only_in_its_own_sample(name):
    net, values = make_denoiser(), values_of()
    with torch.no_grad():
        before = net(X, T, values)
        changed = {**values, name: hide(values[name], torch.tensor([False, True, False]))}
        after = net(X, T, changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1], atol=1e-5)


@pytest.mark.parametrize("name", list(ALL))
def test_a_condition_that_is_hidden_blank_or_missing_is_the_same(name):
    net, values = make_denoiser(), values_of()
    rest = {n: v for n, v in values.items() if n != name}
    with torch.no_grad():
        missing = net(X, T, rest)
        assert torch.equal(missing, net(X, T, {**rest, name: blank(ALL[name], X)}))
        hidden = {**rest, name: hide(values[name], torch.ones(3, dtype=torch.bool))}
        assert torch.equal(missing, net(X, T, hidden))


def test_embeddings_of_concat_stand_beside_that_of_time_and_the_others_are_added():
    conditions = [ALL[name] for name in ("sex", "age", "spacing")]
    config = ConditionConfig(use=("class:sex", "number:age", "spacing"), concat=("age", "spacing"))
    net = noisy(Denoiser(UNET, config, conditions))
    values = {c.name: values_of()[c.name] for c in conditions}
    sex, age, spacing = (
        part(values[c.name]).emb for part, c in zip(net.conditioner.parts, conditions, strict=True)
    )
    emb = net.unet.embed(T, net.encode_conditions(values, X).emb)
    time = net.unet.embed(T, torch.zeros(3, 3 * UNET.emb_dim))[:, : UNET.emb_dim]
    assert torch.equal(emb, torch.cat([time + sex, age, spacing], 1))
    assert net.unet.down[0].res.emb_proj.in_features == 3 * UNET.emb_dim
    net(X, T, values).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_network_whose_embeddings_all_stand_beside_adds_nothing_to_that_of_time():
    net = noisy(Denoiser(UNET, ConditionConfig(use=("number:age",), concat=("age",)), [ALL["age"]]))
    emb = net.encode_conditions({"age": values_of()["age"]}, X).emb
    assert not emb[:, : UNET.emb_dim].any()


def test_what_conditions_become_once_serves_every_step():
    net, values = make_denoiser(), values_of()
    with torch.no_grad():
        expected, encoded = net(X, T, values), net.encode_conditions(values, X)
        for attention in (m for m in net.unet.modules() if isinstance(m, CrossAttention)):
            attention.kv = None  # keys and values are not made again
        assert torch.equal(net(X, T, encoded), expected)


def test_padding_of_a_caption_changes_nothing():
    text = Condition("text", "text", ALL["text"].values, length=3)
    short, long = (noisy(Conditioner(CONFIG, [c], 2, 8)) for c in (text, ALL["text"]))
    for p, q in zip(short.parameters(), long.parameters(), strict=True):
        p.data = q.data[: len(p)].clone()
    ids = torch.tensor([[2, 4, -1]])
    a = short({"text": ids}, X[:1])
    b = long({"text": torch.cat([ids, torch.full((1, 3), -1)], 1)}, X[:1])
    assert torch.allclose(a.emb, b.emb, atol=1e-6)
    assert torch.allclose(a.context[a.context_mask], b.context[b.context_mask], atol=1e-6)
    assert a.context_mask.tolist() == [[True, True, False]]


def test_numbers_are_standardised_and_embeddings_added_up():
    encoder = noisy(Conditioner(CONFIG, [ALL["age"], ALL["class"]], 2, 8))
    got = encoder({"age": torch.tensor([[65.0], [math.nan], [50.0]]), "class": torch.tensor([2, 0, -1])}, X)
    age, rows = encoder.parts[0], encoder.parts[1].table.weight
    expected = [age.mlp(torch.tensor([1.5])) + rows[2], age.null + rows[0], age.mlp(torch.zeros(1)) + rows[3]]
    assert torch.allclose(got.emb, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("name", ["text", "report"])
def test_a_blank_sequence_is_one_null_token(name):
    """Several would draw more attention than one, away from the tokens of other conditions."""
    encoder = noisy(Conditioner(CONFIG, [ALL[name]], 2, 8))
    got, null = encoder({}, X[:1]), encoder.parts[0].null
    assert got.context_mask.tolist() == [[True] + [False] * (ALL[name].length - 1)]
    assert torch.equal(got.context[0, 0], null)
    assert torch.allclose(got.emb[0], encoder.parts[0].pooled(null), atol=1e-6)


def test_tokens_are_latents_with_their_positions_which_also_enter_beside_x_t():
    encoder, value = noisy(Conditioner(CONFIG, [ALL["tokens"]], 2, 8)), values_of()["tokens"]
    got, linear = encoder({"tokens": value}, X), encoder.parts[0].linear
    positions = position_features((4, 6), 5, torch.device("cpu"))[0]
    assert torch.equal(got.channels, positions.expand(3, *positions.shape))
    for i, j in ((0, 0), (1, 5), (3, 2)):
        expected = linear(torch.cat([value[:, :, i, j], positions[:, i, j].expand(3, -1)], 1))
        assert torch.allclose(got.context[:, 6 * i + j], expected, atol=1e-5)
    assert got.context_mask is None
    assert encoder.num_channels == len(positions)


def test_an_unknown_word_says_nothing_until_training_has_one():
    encoder = Conditioner(CONFIG, [ALL["text"]], 2, 8).parts[0].encoder
    assert not encoder.words.weight[0].any()
    assert encoder.words.weight[1:].any(1).all()


def test_words_in_another_order_are_another_caption():
    encoder = noisy(Conditioner(CONFIG, [ALL["text"]], 2, 8))
    ids = torch.tensor([[1, 4, 3, -1, -1, -1], [3, 4, 1, -1, -1, -1]])
    emb = encoder({"text": ids}, X[:2]).emb
    assert not torch.allclose(emb[0], emb[1], atol=1e-4)


@pytest.mark.parametrize("size", [(7,), (4, 6), (3, 5, 2)])
def test_no_two_voxels_have_the_same_position_features(size):
    features = position_features(size, 5, torch.device("cpu")).flatten(2)[0].T
    distance = torch.cdist(features, features) + 1e3 * torch.eye(len(features))
    assert distance.min() > 0.1
    assert features.shape == (math.prod(size), 10 * len(size))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("class", (3, 1)), ("age", (3, 2)), ("text", (3, 5)), ("image", (3, 2, 4, 6)), ("labels", (3, 4, 4, 5))],
)
def test_tensors_of_a_wrong_shape_are_refused_with_the_expected_one(name, shape):
    dtype = values_of()[name].dtype
    with pytest.raises(InputError, match=f"condition {name}: expected a tensor of shape"):
        make_denoiser()(X, T, {name: torch.zeros(shape, dtype=dtype)})


def test_a_condition_that_the_model_does_not_have_is_refused():
    with pytest.raises(
        InputError, match="condition sex: the model has no such condition, its conditions: class"
    ):
        make_denoiser("class")(X, T, {"sex": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(InputError, match="without any"):
        Denoiser(UNET)(X, T, {"sex": torch.zeros(3, dtype=torch.int64)})


def test_classes_are_as_loud_as_the_time_from_the_start():
    """Rows that are far smaller than the embedding of t are not obeyed for thousands of steps."""
    torch.manual_seed(0)
    net = Denoiser(replace(UNET, channels=(32, 64)), CONFIG, [ALL["class"], ALL["sex"]])
    time = net.unet.embed(torch.linspace(0, 999, 50)).std()
    for part in net.conditioner.parts:
        assert time < part.table.weight.std() < 4 * time
