"""Cells of a table and masks become tensors, fitted to the training cases; mistakes name the condition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm3d import InputError
from ldm3d.conditions import (
    Condition,
    ConditionConfig,
    absent,
    check_indices,
    fit_conditions,
    label_shares,
    parse_use,
    read_embedding,
    split_words,
)
from ldm3d.config import from_dict, to_dict
from train_ldm import hide_some

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
    for moments in (True, False):
        (labels,) = fit(folder, "labels", label_moments=moments)
        assert labels.num_channels(3) == (16 if moments else 4)
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
    for rows in (torch.ones(2, 5), np.ones((2, 5))):
        assert torch.equal(fitted["report"].encode(rows)[:2], vectors[:2])
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
def test_a_wrong_value_names_the_condition(folder, name, value, words):
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
def test_a_wrong_list_of_conditions_names_the_mistake(folder, use, words):
    with pytest.raises(InputError, match=words):
        fit(folder, *use)


def test_the_worked_example_of_the_docstring(tmp_path):
    cells = [{"sex": "F", "age": "40", "text": "A lesion, left"}, {"sex": "M", "age": "", "text": "a lesion"}]
    use = ConditionConfig(use=("class:sex", "number:age", "text"), text_min_count=1)
    cases = dict(zip("ab", cells, strict=True))
    fitted = fit_conditions(use, cases, ["a", "b"], [], 3, False, None, tmp_path)
    sex, age, text = (torch.stack([c.encode(cell[c.name]) for cell in cells]) for c in fitted)
    assert sex.tolist() == [0, 1]
    assert age[0].tolist() == [40.0]
    assert absent(age).tolist() == [False, True]
    assert fitted[2].values == ("a", "left", "lesion")
    assert text.tolist() == [[1, 3, 2], [1, 3, -1]]


def test_a_bad_cell_names_its_case(folder):
    cases = {**CASES, "d": {**CASES["d"], "age": "fifty"}}
    with pytest.raises(InputError, match="case d: condition age"):
        fit(folder, "number:age", cases=cases)
    cases = {**CASES, "a": {"empty": "0.npz"}}
    with pytest.raises(InputError, match="column 'empty': the masks of all training cases leave nothing"):
        fit(folder, "embedding:empty", cases=cases)
    with pytest.raises(InputError, match="image needs sources"):
        fit_conditions(ConditionConfig(use=("image",)), {}, [], [], 3, False, None, folder)


def test_an_embedding_of_complex_numbers_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", embedding=np.ones((3, 5), np.complex64))
    with pytest.raises(InputError, match=r"a\.npz: expected an array"):
        read_embedding(tmp_path / "a.npz")


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


# --- values as tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "last"), [("class", 2), ("text", 5)])
def test_indices_beyond_the_last_are_refused(name, last):
    """The row behind the classes is the null, and no class."""
    conditions = (
        Condition("class", "class", tuple("012")),
        Condition("text", "text", tuple("abcde"), length=2),
    )
    check_indices({name: torch.tensor([-1, last])}, conditions)
    with pytest.raises(InputError, match=f"condition {name}: expected integers up to {last}, got {last + 1}"):
        check_indices({name: torch.tensor([0, last + 1])}, conditions)


@pytest.mark.parametrize(
    ("size", "factor"), [((5, 8), (2, 2)), ((5, 8, 6), (2, 2, 3)), ((41, 4), (8, 8)), ((42, 9), (8, 4))]
)
def test_label_shares_are_the_count_of_each_label_in_each_latent_voxel(size, factor):
    """Where an axis does not divide, its edge is repeated."""
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, *size))
    mask[1] = -1
    latent = [math.ceil(n / f) for n, f in zip(size, factor, strict=True)]
    shares, known = label_shares(mask, 3, factor), label_shares(mask, 3, factor, moments=True)
    assert torch.equal(known[:1, :3], shares[:1])
    for index in np.ndindex(*latent):
        block = mask[0]
        for axis, (i, f) in enumerate(zip(index, factor, strict=True)):
            picks = [min(i * f + k, size[axis] - 1) for k in range(f)]
            block = block.index_select(axis, torch.tensor(picks))
        expected = [(block == k).float().mean().item() for k in range(3)]
        assert shares[0][(slice(None), *index)].tolist() == pytest.approx(expected)
        for axis, f in enumerate(factor):
            u = [(2 * k + 1) / f - 1 for k in range(f)]  # the middles of f voxels from -1 to 1
            rows = [block.select(axis, k) for k in range(f)]
            for k in range(3):
                moment = 2 * sum(v * (row == k).float().mean() for v, row in zip(u, rows, strict=True)) / f
                assert known[0][(3 + 3 * axis + k, *index)].item() == pytest.approx(float(moment), abs=1e-6)
    assert torch.cat([shares, known], 1)[1].isnan().all()


def test_a_block_of_the_mask_becomes_its_shares():
    block = torch.tensor([[[0, 0], [0, 3]]])
    assert label_shares(block, 4, (2, 2)).flatten().tolist() == [0.75, 0.0, 0.0, 0.25]
    moments = [-0.25, 0.0, 0.0, 0.25]  # of both axes
    assert label_shares(block, 4, (2, 2), moments=True).flatten()[4:].tolist() == 2 * moments


def test_voxels_without_a_label_are_no_background():
    mask = torch.tensor([[[0, -1, -1, -1], [-1, 3, -1, -1]]])
    shares = label_shares(mask, 4, (2, 2))[0, :, 0]
    assert shares.T.tolist() == [[0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]]


# --- dropout in training ------------------------------------------------------------------------------------


def test_training_hides_each_condition_as_often_as_it_should_and_all_at_once():
    positions = torch.arange(4000)
    values = {
        "class": torch.ones_like(positions),
        "age": torch.ones(4000, 1),
        "image": torch.ones(4000, 2, 3, 3),
    }
    config = ConditionConfig(
        use=("class", "number:age", "image"), dropout=(0.1, 0.0, 0.5), dropout_all=0.2, dropout_last=0.0
    )
    gone = {name: absent(v) for name, v in hide_some(values, config, 0, positions).items()}
    for name, p in (("class", 0.1), ("age", 0.0), ("image", 0.5)):
        assert float(gone[name].float().mean()) == pytest.approx(p + 0.2 - p * 0.2, abs=0.03)
    assert torch.equal(gone["age"], torch.stack(list(gone.values())).all(0))  # hidden with all others alone
    alone = gone["class"] & ~gone["age"], gone["image"] & ~gone["age"]
    both = (alone[0] & alone[1]).float().mean() / 0.8
    assert float(both) == pytest.approx(0.1 * 0.5, abs=0.02)  # independent of each other


def test_what_is_hidden_depends_on_the_sample_and_not_on_the_batch():
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


def test_every_branch_of_nested_guidance_is_trained():
    """Guidance calls the network with the first k conditions alone, for every k."""
    positions = torch.arange(20_000)
    names = ("class", "text", "number:age")
    config = ConditionConfig(use=names)
    values = {name: torch.ones(len(positions), 1) for name in ("class", "text", "age")}
    gone = torch.stack([absent(v) for v in hide_some(values, config, 0, positions).values()])
    for k in range(4):
        branch = torch.tensor([i >= k for i in range(3)])[:, None]
        assert (gone == branch).all(0).double().mean() > 0.04
    # the last ones from a random condition on, beside the single ones and all
    config = ConditionConfig(use=names, dropout=(0.0,), dropout_all=0.0, dropout_last=0.3)
    gone = torch.stack([absent(v) for v in hide_some(values, config, 0, positions).values()])
    assert gone.double().mean(1).tolist() == pytest.approx([0, 0.15, 0.3], abs=0.01)
    assert (gone[1] <= gone[2]).all()


def test_a_single_condition_has_no_branch_between():
    config = ConditionConfig(use=("class",), dropout=(0.0,), dropout_all=0.0, dropout_last=0.9)
    values = {"class": torch.zeros(100, dtype=torch.int64)}
    assert not absent(hide_some(values, config, 0, torch.arange(100))["class"]).any()


def test_a_run_of_before_goes_on_without_the_new_dropout_and_the_moments_of_labels():
    stored = to_dict(ConditionConfig(use=("class", "text")))
    del stored["dropout_last"], stored["label_moments"]
    old, new = (from_dict(ConditionConfig, values) for values in (stored, {"use": ["class", "text"]}))
    assert (old.dropout_last, old.label_moments) == (0, False)
    assert new.dropout_last > 0
    assert new.label_moments
    before = Condition.from_dict({"kind": "labels", "name": "labels", "width": 5})
    assert [before.num_channels(3), replace(before, moments=True).num_channels(3)] == [5, 20]
