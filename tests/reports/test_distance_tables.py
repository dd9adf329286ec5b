"""The tables of distances say what brute force says."""

import numpy as np
import pytest
import torch

from ldm3d.reports.distance_tables import case_table, group_table, subject_table


def test_figures_of_subjects_and_groups_are_those_of_brute_force():
    x = np.random.default_rng(0).normal(size=(7, 5))
    gram = torch.from_numpy(x @ x.T)
    apart = torch.cdist(torch.from_numpy(x), torch.from_numpy(x))
    groups, subjects = "ffffooo", "aabbabc"
    words = {"f": "first", "o": "other"}
    rows = [{"group": words[g], "subject": s} for g, s in zip(groups, subjects, strict=True)]

    def members(group, subject=None):
        pairs = enumerate(zip(groups, subjects, strict=True))
        return [i for i, (g, s) in pairs if words[g] == group and subject in (None, s)]

    table = subject_table(rows, gram, apart)
    assert [(line["group"], line["cases"]) for line in table].count(("first", 2)) == 2
    for line in table:
        own, everyone = members(line["group"], line["subject"]), members(line["group"])
        there = members("other" if line["group"] == "first" else "first", line["subject"])
        centre = x[everyone].mean(0)
        assert line["to_centre"] == pytest.approx(np.mean([np.linalg.norm(x[i] - centre) for i in own]))
        pairs = [np.linalg.norm(x[i] - x[j]) for i in own for j in own if i != j]
        assert line["within"] == (pytest.approx(np.mean(pairs)) if pairs else None)
        pairs = [np.linalg.norm(x[i] - x[j]) for i in own for j in there]
        assert line["to_other_group"] == (pytest.approx(np.mean(pairs)) if pairs else None)
        means = np.linalg.norm(x[own].mean(0) - x[there].mean(0)) if there else None
        assert line["centres"] == (means and pytest.approx(means))
    assert table[0]["to_centre"] >= table[1]["to_centre"]

    for line in group_table([words[g] for g in groups], gram, apart):
        a, b = members(line["a"]), members(line["b"])
        pairs = {i: [np.linalg.norm(x[i] - x[j]) for j in b if i != j] for i in a}
        assert line["pairs"] == pytest.approx(np.mean([p for row in pairs.values() for p in row]))
        assert line["nearest"] == pytest.approx(np.mean([min(p) for p in pairs.values()]))
        assert line["centres"] == pytest.approx(np.linalg.norm(x[a].mean(0) - x[b].mean(0)), abs=1e-7)


def test_the_nearest_case_is_another_one_of_the_first_group():
    x = torch.tensor([[0.0], [5.0], [9.0], [8.9], [0.2]], dtype=torch.float64)
    rows = [{"case": name, "group": "first" if name in "abc" else "other"} for name in "abcde"]
    table = case_table(rows, torch.zeros(5, 2), x @ x.T, torch.cdist(x, x))
    assert [line["nearest_case"] for line in table] == ["b", "c", "b", "c", "a"]
    assert [line["nearest"] for line in table] == pytest.approx([5, 4, 4, 0.1, 0.2])
    assert [line["to_centre"] for line in table] == pytest.approx((x[:, 0] - 14 / 3).abs().tolist())
