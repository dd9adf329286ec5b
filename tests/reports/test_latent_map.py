"""A map of latents and its tables say what an independent computation says."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import read_csv

from ldm3d.config import InputError
from ldm3d.data import VolumeDataset, open_images
from ldm3d.engine.distributed import run_script
from ldm3d.pipeline import load_autoencoder
from ldm3d.reports import latent_map
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.latent_map import LatentsConfig


@pytest.fixture(scope="module")
def latents(mapped_run, heads) -> tuple[list[str], np.ndarray]:
    """(ids, posterior means (N, C_z, *s)) of all heads, encoded one by one."""
    net, content = load_autoencoder(mapped_run)
    opened = open_images(content, heads / "images")
    data = VolumeDataset(opened.cases, opened.infos, opened.spec, opened.config)
    with torch.inference_mode():
        z = [net.encode(data[i, i]["image"][None]).mean[0].numpy() for i in range(len(data))]
    return [case.id for case in data.cases], np.stack(z)


def spread(z: np.ndarray) -> np.ndarray:
    """(N, D): every channel with mean 0 and variance 1, divided so that distances are root mean squares."""
    axes = (0, *range(2, z.ndim))
    scaled = (z - z.mean(axes, keepdims=True)) / z.std(axes, keepdims=True)
    return scaled.reshape(len(z), -1).astype(np.float64) / np.sqrt(z[0].size)


# --- tables -------------------------------------------------------------------------------------------------


def test_the_map_is_the_principal_components_of_latents_encoded_by_hand(made, latents):
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows, (names, z) = read_csv(made / "cases.csv"), latents
    assert sorted(row["case"] for row in rows) == names
    x = spread(z)[[names.index(row["case"]) for row in rows]]
    reference = decomposition.PCA(2).fit(x)
    places = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    assert np.abs(places) == pytest.approx(np.abs(reference.transform(x)), abs=1e-4)
    facts = json.loads((made / "latents.json").read_text())
    assert facts["variance_shares"][:2] == pytest.approx(reference.explained_variance_ratio_, abs=1e-4)
    assert (facts["cases"], facts["method"], facts["step"]) == (12, "pca", 10)


def test_the_table_has_split_class_centre_and_nearest_of_each_case(made, latents, heads, mapped_run):
    rows, (names, z) = read_csv(made / "cases.csv"), latents
    split = json.loads((mapped_run / "split.json").read_text())
    classes = {Path(row["image"]).stem: row["class"] for row in read_csv(heads / "cases.csv")}
    x = dict(zip(names, spread(z), strict=True))
    centre = np.mean(list(x.values()), 0)
    for row in rows:
        mine = x[row["case"]]
        apart = {name: np.linalg.norm(mine - other) for name, other in x.items() if name != row["case"]}
        assert row["case"] in split[row["split"]]
        assert row["class"] == f"class {classes[row['case']]}"
        assert row["subject"] == row["case"]
        assert row["nearest_case"] == min(apart, key=apart.get)
        assert float(row["nearest"]) == pytest.approx(min(apart.values()), rel=1e-4)
        assert float(row["to_centre"]) == pytest.approx(np.linalg.norm(mine - centre), rel=1e-4)
    colors = {row["split"]: row["color"] for row in rows}
    assert len(set(colors.values())) == 2


def test_a_second_group_falls_into_the_space_of_the_first(mapped_run, heads, tmp_path):
    other = tmp_path / "copies"
    other.mkdir()
    for name in ("phantom_0003.tif", "phantom_0007.tif"):
        shutil.copy(heads / "images" / name, other / f"copy_of_{name}")
    flags = ["--data", str(heads / "images"), "--other", str(other), "--out", str(tmp_path / "map")]
    reports_main(["latents", str(mapped_run), *flags])
    rows = {row["case"]: row for row in read_csv(tmp_path / "map" / "cases.csv")}
    assert len(rows) == 14
    for name in ("phantom_0003", "phantom_0007"):
        copy = rows[f"copy_of_{name}"]
        assert (copy["group"], copy["nearest_case"]) == ("other", name)
        assert float(copy["nearest"]) < 1e-4
        assert [copy["x"], copy["y"]] == [rows[name]["x"], rows[name]["y"]]
    groups = {(row["a"], row["b"]): row for row in read_csv(tmp_path / "map" / "groups.csv")}
    assert float(groups["other", "first"]["nearest"]) < 1e-4
    assert float(groups["first", "other"]["nearest"]) > 0.1


def test_subjects_come_from_a_rule_on_the_names_of_any_folder(mapped_run, heads, tmp_path):
    flags = ["--data", str(heads / "images"), "--subject", r"_000(\d)|_001", "--out", str(tmp_path / "map")]
    assert (
        run_script(reports_main, ["latents", str(mapped_run), *flags]) == 2
    )  # 0010 has no subject by this rule
    flags[3] = r"_00(\d)\d"
    reports_main(["latents", str(mapped_run), *flags, "--color-by=subject"])
    table = read_csv(tmp_path / "map" / "subjects.csv")
    assert {row["subject"]: row["cases"] for row in table} == {"0": "10", "1": "2"}
    assert len({row["color"] for row in read_csv(tmp_path / "map" / "cases.csv")}) == 2


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_other_methods_map_both_groups_and_the_same_each_time(mapped_run, heads, tmp_path, method):
    pytest.importorskip({"tsne": "sklearn", "umap": "umap"}[method])
    flags = ["--method", method, "--other", str(heads / "images"), "--max_cases", "10"]
    places, threads = [], torch.get_num_threads()
    for name in ("a", "b"):
        reports_main(["latents", str(mapped_run), *flags, "--out", str(tmp_path / name)])
        rows = read_csv(tmp_path / name / "cases.csv")
        places.append(np.array([[float(row["x"]), float(row["y"])] for row in rows]))
    assert places[0].shape == (20, 2)
    assert np.isfinite(places[0]).all()
    assert np.array_equal(*places)
    assert torch.get_num_threads() == threads  # those of the process are left as they were
    facts = json.loads((tmp_path / "a" / "latents.json").read_text())
    assert facts["axes"][0].endswith(" 1")
    setting, value = {"tsne": ("perplexity", 3.0), "umap": ("neighbors", 9)}[method]
    assert facts[setting] == value  # as many as fit ten cases


# --- the command --------------------------------------------------------------------------------------------


def test_tables_need_no_extra_and_a_missing_extra_is_named(mapped_run, tmp_path, monkeypatch, capsys):
    for name in (
        "plotly",
        "plotly.offline",
        "matplotlib",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    reports_main(["latents", str(mapped_run), "--out", str(tmp_path / "map")])
    names = sorted(p.name for p in (tmp_path / "map").iterdir())
    assert names == ["cases.csv", "groups.csv", "latents.json", "subjects.csv"]
    said = capsys.readouterr().out
    assert "ldm3d[viz]" in said
    assert "ldm3d[analysis]" in said
    monkeypatch.setattr(latent_map.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"ldm3d\[analysis\]"):
        reports_main(["latents", str(mapped_run), "--method", "umap"])


def test_groups_are_those_of_the_column_and_a_second_group_keeps_its_name():
    rows = [{"group": "first", "split": "val"}, {"group": "first", "split": ""}]
    rows += [{"group": "other", "split": "val"}]
    assert latent_map.groups_of(rows, "split") == ["val", "unknown", "other: val"]
    assert latent_map.groups_of(rows, "group") == ["first", "first", "other"]


@pytest.mark.parametrize(
    ("method", "name"), [("tsne", "perplexity"), pytest.param("umap", "neighbors", marks=pytest.mark.slow)]
)
def test_the_setting_of_a_method_is_the_one_asked_for(method, name):
    pytest.importorskip({"tsne": "sklearn", "umap": "umap"}[method])
    scores = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = []
    for value in (2, 5):
        positions, used = latent_map.make_map(scores, 18, LatentsConfig(method=method, **{name: value}))
        assert used[name] == value
        maps.append(positions)
    assert maps[0].shape == (20, 2)
    assert not torch.allclose(*maps)
