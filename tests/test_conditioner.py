"""Conditions become context, channels and embeddings; what is absent is a learned null, whoever hides it."""

import math

import numpy as np
import pytest
import torch

from ldm3d import Denoiser, InputError, UNetConfig
from ldm3d.blocks import CrossAttention, position_features
from ldm3d.conditioner import Conditioner
from ldm3d.conditions import (
    Condition,
    ConditionConfig,
    absent,
    blank,
    check_indices,
    fit_conditions,
    hide,
    label_shares,
    parse_use,
    read_embedding,
    split_words,
)
from ldm3d.registers import AnatomyConfig
from train_ldm import hide_some

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
    torch.manual_seed(3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def make_denoiser(*names):
    return noisy(Denoiser(UNET, CONFIG, [ALL[n] for n in names or ALL]))


X, T = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 300.0, 900.0])


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
def test_hidden_blank_and_not_given_are_the_same(name):
    net, values = make_denoiser(), values_of()
    rest = {n: v for n, v in values.items() if n != name}
    with torch.no_grad():
        missing = net(X, T, rest)
        assert torch.equal(missing, net(X, T, {**rest, name: blank(ALL[name], X)}))
        hidden = {**rest, name: hide(values[name], torch.ones(3, dtype=torch.bool))}
        assert torch.equal(missing, net(X, T, hidden))


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


def test_an_unknown_word_says_nothing_until_training_has_one():
    encoder = Conditioner(CONFIG, [ALL["text"]], 2, 8).parts[0].encoder
    assert not encoder.words.weight[0].any()
    assert encoder.words.weight[1:].any(1).all()


@pytest.mark.parametrize(("name", "last"), [("class", 2), ("text", 5)])
def test_indices_beyond_the_last_are_refused(name, last):
    """The row behind the classes is the null, and no class."""
    check_indices({name: torch.tensor([-1, last])}, list(ALL.values()))
    with pytest.raises(InputError, match=f"condition {name}: expected integers up to {last}, got {last + 1}"):
        check_indices({name: torch.tensor([0, last + 1])}, list(ALL.values()))


def test_words_in_another_order_are_another_caption():
    encoder = noisy(Conditioner(CONFIG, [ALL["text"]], 2, 8))
    ids = torch.tensor([[1, 4, 3, -1, -1, -1], [3, 4, 1, -1, -1, -1]])
    emb = encoder({"text": ids}, X[:2]).emb
    assert not torch.allclose(emb[0], emb[1], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "factor"), [((5, 8), (2, 2)), ((5, 8, 6), (2, 2, 3)), ((41, 4), (8, 8)), ((42, 9), (8, 4))]
)
def test_label_shares_are_the_count_of_each_label_in_each_latent_voxel(size, factor):
    """Where an axis does not divide, its edge is repeated."""
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, *size))
    mask[1] = -1
    latent = [math.ceil(n / f) for n, f in zip(size, factor, strict=True)]
    shares = label_shares(mask, 3, factor)
    for index in np.ndindex(*latent):
        block = mask[0]
        for axis, (i, f) in enumerate(zip(index, factor, strict=True)):
            picks = [min(i * f + k, size[axis] - 1) for k in range(f)]
            block = block.index_select(axis, torch.tensor(picks))
        expected = [(block == k).float().mean().item() for k in range(3)]
        assert shares[0][(slice(None), *index)].tolist() == pytest.approx(expected)
    assert shares[1].isnan().all()


def test_labels_of_registers_lie_where_the_encoder_put_them():
    """41 voxels are 6 latent voxels of 8: the edge is repeated, no voxel moves."""
    anatomy = AnatomyConfig("bound", 1, 8, head_width=8)
    net = noisy(Denoiser(UNET, None, (), anatomy, num_labels=3, factor=(8, 8)))
    mask = torch.randint(0, 3, (1, 41, 41), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(mask[:, None].float(), (0, 7, 0, 7), mode="replicate")[:, 0].long()
    out, expected = (net(torch.zeros(1, 3, 6, 6), T[:1], mask=value) for value in (mask, padded))
    assert torch.equal(out.binding, expected.binding)
    assert torch.equal(out.head, expected.head)


@pytest.mark.parametrize("size", [(7,), (4, 6), (3, 5, 2)])
def test_no_two_places_have_the_same_position_features(size):
    features = position_features(size, 5, torch.device("cpu")).flatten(2)[0].T
    distance = torch.cdist(features, features) + 1e3 * torch.eye(len(features))
    assert distance.min() > 0.1
    assert features.shape == (math.prod(size), 10 * len(size))


# --- dropout in training ------------------------------------------------------------------------------------


def test_training_hides_each_condition_as_often_as_it_should_and_all_at_once():
    values = {name: value[:1].repeat(4000, *(1,) * (value.ndim - 1)) for name, value in values_of().items()}
    values = {name: values[name] for name in ("class", "age", "image")}
    positions = torch.arange(4000)
    config = ConditionConfig(use=("class", "number:age", "image"), dropout=(0.1, 0.0, 0.5), dropout_all=0.2)
    gone = {name: absent(v) for name, v in hide_some(values, config, 0, positions).items()}
    for name, p in (("class", 0.1), ("age", 0.0), ("image", 0.5)):
        assert float(gone[name].float().mean()) == pytest.approx(p + 0.2 - p * 0.2, abs=0.03)
    assert torch.equal(gone["age"], torch.stack(list(gone.values())).all(0))  # hidden with all others alone
    alone = gone["class"] & ~gone["age"], gone["image"] & ~gone["age"]
    both = (alone[0] & alone[1]).float().mean() / 0.8
    assert float(both) == pytest.approx(0.1 * 0.5, abs=0.02)  # independent of each other


def test_what_is_hidden_depends_on_the_sample_and_not_on_its_place_in_the_batch():
    config = ConditionConfig(use=("class", "text"), dropout=(0.5,), dropout_all=0.1)
    values = {"class": torch.ones(64, dtype=torch.int64), "text": torch.ones(64, 3, dtype=torch.int64)}
    positions = torch.arange(64) + 100
    whole = hide_some(values, config, 7, positions)
    turned = hide_some(values, config, 7, positions.flip(0))
    half = hide_some({name: v[:32] for name, v in values.items()}, config, 7, positions[32:])
    other = hide_some(values, config, 8, positions)
    for name in values:
        assert torch.equal(whole[name], turned[name].flip(0))
        assert torch.equal(whole[name][32:], half[name])
        assert not torch.equal(whole[name], other[name])
    assert not torch.equal(absent(whole["class"]), absent(whole["text"]))


# --- fitting ------------------------------------------------------------------------------------------------

CASES = {
    "a": {"class": "0", "sex": "F", "age": "40", "text": "A lesion, left", "report": "a.npz"},
    "b": {"class": "2", "sex": "M", "age": "60", "text": "a lesion; 5.5 mm", "report": "b.pt"},
    "c": {"class": "", "sex": "F", "age": "", "text": "", "report": ""},
    "d": {"class": "1", "sex": "M", "age": "50", "text": "a rare lesion", "report": "a.npz"},
}


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "a.npz", embedding=np.ones((3, 5), np.float32), mask=np.array([1, 1, 0]))
    torch.save(torch.zeros(4, 5), tmp_path / "b.pt")
    np.savez(tmp_path / "0.npz", embedding=np.ones((3, 5), np.float32), mask=np.zeros(3))
    return tmp_path


def fit(folder, *use, cases=CASES, **more):
    config = ConditionConfig(use=use, **more)
    return fit_conditions(
        config, cases, ["a", "b", "c"], [(1.0, 2.0), (1.2, 2.0), (1.4, 2.0)], 3, True, 4, folder
    )


def test_conditions_are_fitted_to_the_training_cases(folder):
    use = ("class", "class:sex", "number:age", "spacing", "text", "embedding:report", "image", "labels")
    fitted = {c.name: c for c in fit(folder, *use)}
    assert list(fitted) == ["class", "sex", "age", "spacing", "text", "report", "image", "labels"]
    assert fitted["class"].values == ("0", "1", "2")
    assert fitted["sex"].values == ("F", "M")
    assert (fitted["age"].mean, fitted["age"].std) == ((50.0,), (10.0,))
    assert fitted["spacing"].mean == pytest.approx((1.2, 2.0))
    assert fitted["spacing"].std[1] == 1.0  # all alike: not divided by zero
    assert fitted["text"].values == ("a", "lesion")  # "rare" is of no training case, the others occur once
    assert fitted["text"].length == 4
    assert (fitted["report"].length, fitted["report"].width) == (4, 5)
    assert (fitted["image"].width, fitted["labels"].width) == (3, 4)
    again = {c.name: Condition.from_dict(c.to_dict()) for c in fitted.values()}
    assert again == fitted


def test_the_values_of_a_class_are_those_that_occur_in_the_order_of_numbers(folder):
    cells = ["10", "02", "20191231000000001", "20191231000000002", "2.0"]
    cases = {name: {"class": cell} for name, cell in zip("abcde", cells, strict=True)}
    (condition,) = fit(folder, "class", cases=cases)
    assert condition.values == ("2", "10", "20191231000000001", "20191231000000002")
    assert [int(condition.encode(value)) for value in (2, "10.0", 20191231000000002)] == [0, 1, 3]
    with pytest.raises(InputError, match="got 3, expected one of 2, 10"):
        condition.encode(3)


def test_cells_become_tensors_and_blanks_are_absent(folder):
    fitted = {c.name: c for c in fit(folder, "class", "number:age", "text", "embedding:report")}
    assert [int(fitted["class"].encode(v)) for v in ("0", 1, "2.0", "", None)] == [0, 1, 2, -1, -1]
    assert fitted["age"].encode("41.5").tolist() == [41.5]
    assert fitted["age"].encode(" ").isnan().all()
    assert fitted["text"].encode("A new lesion").tolist() == [1, 0, 2, -1]
    assert fitted["text"].unknown_words("A new lesion") == ["new"]
    assert fitted["text"].encode("a " * 9).tolist() == [1, 1, 1, 1]
    vectors = fitted["report"].encode("a.npz", folder)
    assert vectors[:2].tolist() == [[1.0] * 5] * 2  # the third row is masked
    assert vectors[2:].isnan().all()
    for given in (torch.ones(2, 5), np.ones((2, 5))):
        assert torch.equal(fitted["report"].encode(given)[:2], vectors[:2])
    assert int(fitted["class"].encode(torch.tensor(1))) == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("class", 7, "condition class: got 7, expected one of 0, 1, 2"),
        ("class", "left", "got 'left'"),
        ("age", "old", "condition age: expected 1 finite number"),
        ("age", "1,2", "condition age: expected 1 finite number"),
        ("report", "b.txt", "expected a .npz or .pt"),
        ("report", "none.pt", "none.pt: cannot be read"),
        ("report", torch.ones(2, 3), r"expected \(L, 5\), got shape \(2, 3\)$"),
    ],
)
def test_wrong_values_are_told_in_a_line_that_names_the_condition(folder, name, value, words):
    fitted = {c.name: c for c in fit(folder, "class", "number:age", "embedding:report")}
    with pytest.raises(InputError, match=words):
        fitted[name].encode(value, folder)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (("klass",), "'klass' is no condition, expected one of class"),
        (("number",), "needs the column"),
        (("image:t1",), "has no column"),
        (("text", "text"), "different conditions"),
        (("class:stage",), "no column 'stage' in the table of the data, its columns: age, class"),
    ],
)
def test_wrong_lists_of_conditions_are_told(folder, use, words):
    with pytest.raises(InputError, match=words):
        fit(folder, *use)


def test_a_bad_cell_names_its_case(folder):
    cases = {**CASES, "d": {**CASES["d"], "age": "fifty"}}
    with pytest.raises(InputError, match="case d: condition age"):
        fit(folder, "number:age", cases=cases)
    cases = {**CASES, "a": {"empty": "0.npz"}}
    with pytest.raises(InputError, match="column 'empty': the masks of all training cases leave nothing"):
        fit(folder, "embedding:empty", cases=cases)
    with pytest.raises(InputError, match="image needs sources"):
        fit_conditions(ConditionConfig(use=("image",)), {}, [], [], 3, False, None, folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("class", (3, 1)), ("age", (3, 2)), ("text", (3, 5)), ("image", (3, 2, 4, 6)), ("labels", (3, 4, 4, 5))],
)
def test_tensors_of_a_wrong_shape_are_refused_with_the_expected_one(name, shape):
    dtype = values_of()[name].dtype
    with pytest.raises(InputError, match=f"condition {name}: expected a tensor of shape"):
        make_denoiser()(X, T, {name: torch.zeros(shape, dtype=dtype)})


def test_a_name_that_the_model_does_not_know_is_refused():
    with pytest.raises(
        InputError, match="condition sex: the model has no such condition, its conditions: class"
    ):
        make_denoiser("class")(X, T, {"sex": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(InputError, match="without any"):
        Denoiser(UNET)(X, T, {"sex": torch.zeros(3, dtype=torch.int64)})


def test_an_embedding_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"embedding": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt"):
        read_embedding(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_captions_are_split_into_words_and_numbers():
    words = ["a", "5.2", "mm", "lesion", "left", "sided"]
    assert split_words("A 5.2 mm lesion, Left-sided.") == words
    assert parse_use("class:sex") == ("class", "sex")
    assert parse_use("text") == ("text", "text")
