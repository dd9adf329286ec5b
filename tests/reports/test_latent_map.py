"""A map of latents: tables that say what an independent computation says, a page that shows every case."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser
from tiny import vae_flags

import train_vae
from ldm3d.config import InputError
from ldm3d.data import VolumeDataset, open_images
from ldm3d.engine.distributed import run_script
from ldm3d.latent_diffusion import load_autoencoder
from ldm3d.reports import latent_map as analysis
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.latent_map import cached, group_table, palette, subject_table

ROOT = Path(__file__).parents[2]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(vae_run, tmp_path_factory) -> Path:
    """A copy of the trained run, whose cache is this file's own."""
    run = tmp_path_factory.mktemp("analysis") / "vae"
    shutil.copytree(vae_run, run)
    return run


@pytest.fixture(scope="module")
def made(run) -> Path:
    """The folder that `latents` makes of the run's own cases."""
    reports_main(["latents", str(run)])
    return run / "analysis-001"


@pytest.fixture(scope="module")
def latents(run, heads) -> tuple[list[str], np.ndarray]:
    """(ids, posterior means (N, C_z, *s)) of all heads, encoded one by one."""
    net, content = load_autoencoder(run)
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


def test_a_case_is_told_its_split_its_class_its_centre_and_its_nearest(made, latents, heads, run):
    rows, (names, z) = read_csv(made / "cases.csv"), latents
    split = json.loads((run / "split.json").read_text())
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


def test_subjects_and_groups_are_told_as_brute_force_has_them():
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


def test_a_second_group_falls_into_the_space_of_the_first(run, heads, tmp_path):
    other = tmp_path / "copies"
    other.mkdir()
    for name in ("phantom_0003.tif", "phantom_0007.tif"):
        shutil.copy(heads / "images" / name, other / f"copy_of_{name}")
    flags = ["--data", str(heads / "images"), "--other", str(other), "--out", str(tmp_path / "map")]
    reports_main(["latents", str(run), *flags])
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


def test_subjects_come_from_a_rule_on_the_names_of_any_folder(run, heads, tmp_path):
    flags = ["--data", str(heads / "images"), "--subject", r"_000(\d)|_001", "--out", str(tmp_path / "map")]
    assert run_script(reports_main, ["latents", str(run), *flags]) == 2  # 0010 has no subject by this rule
    flags[3] = r"_00(\d)\d"
    reports_main(["latents", str(run), *flags, "--color-by=subject"])
    table = read_csv(tmp_path / "map" / "subjects.csv")
    assert {row["subject"]: row["cases"] for row in table} == {"0": "10", "1": "2"}
    assert len({row["color"] for row in read_csv(tmp_path / "map" / "cases.csv")}) == 2


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_other_methods_map_both_groups_and_the_same_each_time(run, heads, tmp_path, method):
    pytest.importorskip({"tsne": "sklearn", "umap": "umap"}[method])
    flags = ["--method", method, "--other", str(heads / "images"), "--max_cases", "10"]
    places, threads = [], torch.get_num_threads()
    for name in ("a", "b"):
        reports_main(["latents", str(run), *flags, "--out", str(tmp_path / name)])
        rows = read_csv(tmp_path / name / "cases.csv")
        places.append(np.array([[float(row["x"]), float(row["y"])] for row in rows]))
    assert places[0].shape == (20, 2)
    assert np.isfinite(places[0]).all()
    assert np.array_equal(*places)
    assert torch.get_num_threads() == threads  # those of the process are left as they were
    facts = json.loads((tmp_path / "a" / "latents.json").read_text())
    assert facts["axes"][0].endswith(" 1")
    assert facts.get("perplexity" if method == "tsne" else "neighbors") in (3.0, 9)  # fits ten cases


def test_colours_are_distinct_and_numbers_sort_as_numbers():
    many = palette([f"s{i}" for i in range(60)])
    assert len(set(many.values())) == 60
    assert list(many)[:3] == ["s0", "s1", "s2"]
    assert list(palette(["b", "", "a"])) == ["a", "b", ""]


# --- the cache ----------------------------------------------------------------------------------------------


def encode_counted(monkeypatch) -> list[int]:
    """Counts the encodings from here on."""
    calls, original = [], analysis.slices_picture
    monkeypatch.setattr(analysis, "slices_picture", lambda *a: (calls.append(1), original(*a))[1])
    return calls


def test_a_case_is_encoded_once_and_anew_when_file_or_weights_change(run, heads, tmp_path, monkeypatch):
    place, copy = tmp_path / "images", tmp_path / "vae"
    shutil.copytree(heads / "images", place)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("latents", "analysis-*"))
    calls = encode_counted(monkeypatch)
    command = ["latents", str(copy), "--data", str(place)]
    for expected in (12, 12):
        reports_main(command)
        assert len(calls) == expected
    os.utime(place / "phantom_0004.tif", ns=(1, 1))
    reports_main(command)
    assert len(calls) == 13
    first = read_csv(copy / "analysis-001" / "cases.csv")
    assert read_csv(copy / "analysis-002" / "cases.csv") == first  # from the cache the same
    train_vae.main(vae_flags(heads, copy, 15, "--run.fresh"))  # (the old folder is moved aside)
    reports_main(command)
    assert len(calls) == 25


def write_and_read(path: Path, number: int) -> float:
    def make() -> dict[str, np.ndarray]:
        return {"mean": np.full((50, 200, 100), 7.0, np.float32)}

    return max(float(np.ptp(cached(path, make)["mean"])) for _ in range(number))


def test_many_processes_may_use_the_cache_at_once_and_never_see_half_a_file(tmp_path):
    path = tmp_path / "new" / "case.npz"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(write_and_read, [(path, 5)] * 4) == [0.0] * 4
    assert [p.name for p in path.parent.iterdir()] == ["case.npz"]


def test_a_damaged_file_is_made_anew_and_a_folder_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    path, good = tmp_path / "case.npz", {"mean": np.arange(3.0)}
    for content in (b"", b"PK\x03\x04 half", b"nonsense"):
        path.write_bytes(content)
        assert cached(path, lambda: good)["mean"].tolist() == [0, 1, 2]
        assert cached(path, lambda: {})["mean"].tolist() == [0, 1, 2]
    (tmp_path / "file").write_text("in the way")
    assert cached(tmp_path / "file" / "case.npz", lambda: good) is good
    assert "cannot be kept" in capsys.readouterr().out


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(made, tmp_path_factory):
    pytest.importorskip("plotly")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.requests()
        browser.open(made / "latents.html")
        browser.wait("document.querySelectorAll('#map .point').length === 12")
        yield browser


def points(browser: Browser) -> dict[str, list[float]]:
    """Case -> its place in the window."""
    script = """const found = {};
        for (const p of document.querySelectorAll('#map .point')) {
          const b = p.getBoundingClientRect();
          found[p.__data__.tx] = [b.x + b.width / 2, b.y + b.height / 2]; }
        return found;"""
    return browser.run(script)


def assert_where_the_table_has_them(found: dict[str, list[float]], rows: list[dict[str, str]]) -> None:
    assert sorted(found) == sorted(row["case"] for row in rows)
    for axis, column in enumerate("xy"):
        screen = [found[row["case"]][axis] for row in rows]
        table = [float(row[column]) for row in rows]
        assert abs(np.corrcoef(screen, table)[0, 1]) > 0.9999


def test_the_page_shows_every_case_where_the_table_has_it(browser, made):
    assert_where_the_table_has_them(points(browser), read_csv(made / "cases.csv"))


def test_hover_shows_the_slices_and_a_click_keeps_them(browser, made):
    places = points(browser)
    gaps = {
        name: sorted(np.hypot(*np.subtract(place, p)) for p in places.values())[1]
        for name, place in places.items()
    }
    first, second = sorted(gaps, key=gaps.get)[-2:]  # no other point lies on them

    def card(selector: str, name: str) -> list:
        """What a card shows, as soon as it is that of the case."""
        found = f"document.querySelector('{selector}')"
        browser.wait(
            f"{found} && {found}.innerText.includes('{name}') && {found}.querySelector('img').complete"
        )
        image = f"{found}.querySelector('img')"
        return browser.run(
            f"return [{found}.innerText, {image}.src, {image}.naturalWidth, {image}.naturalHeight]"
        )

    def click(name: str) -> None:
        browser.point(*places[name])
        card("#hover", name)  # what is clicked is what the mouse is known to be over
        browser.point(*places[name], press=True)

    browser.point(*places[first])
    text, source, wide, high = card("#hover", first)
    assert "split" in text
    assert source.startswith("data:image/png")
    assert (wide, high) == (20 + 2, 17)  # 16 rows of 12 mm are 17 of 11 mm; a column after each slice
    click(second)
    click(first)
    assert card("#kept .card", first)[1] == source  # the newest first
    card("#kept .card:nth-child(2)", second)
    click(first)  # no second time
    assert browser.run("return document.querySelectorAll('#kept .card').length") == 2
    browser.click("#kept .card .close")
    assert browser.run("return document.querySelectorAll('#kept .card').length") == 1


def test_other_columns_colour_the_same_points(browser, made):
    columns = browser.run("return [...document.getElementById('column').options].map(o => o.value)")
    assert columns == ["split", "subject"]  # all heads are of one class
    names = "return [...document.querySelectorAll('#map .legendtext')].map(t => t.textContent)"
    assert browser.run(names) == ["train", "val"]
    browser.run("const c = document.getElementById('column'); c.value = 'subject'; c.onchange()")
    browser.wait("document.querySelector('#map .legendtext').textContent === 'phantom_0000'")
    assert_where_the_table_has_them(points(browser), read_csv(made / "cases.csv"))


def test_the_page_asks_the_network_for_nothing_and_offers_no_way_to(browser, made):
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [(made / "latents.html").as_uri()]
    assert browser.complaints() == []
    buttons = browser.run("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert len(buttons) == 6
    assert not any("loud" in title or "share" in title.lower() for title in buttons)


# --- the command --------------------------------------------------------------------------------------------


def test_tables_need_no_extra_and_what_is_missing_is_told(run, tmp_path, monkeypatch, capsys):
    for name in (
        "plotly",
        "plotly.offline",
        "matplotlib",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    reports_main(["latents", str(run), "--out", str(tmp_path / "map")])
    names = sorted(p.name for p in (tmp_path / "map").iterdir())
    assert names == ["cases.csv", "groups.csv", "latents.json", "subjects.csv"]
    said = capsys.readouterr().out
    assert "ldm3d[viz]" in said
    assert "ldm3d[analysis]" in said
    monkeypatch.setattr(analysis.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"ldm3d\[analysis\]"):
        reports_main(["latents", str(run), "--method", "umap"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "which task"),
        (["latent", "RUN"], "expected run or latents or registers"),
        (["latents"], "which run"),
        (["latents", "/nowhere"], "/nowhere"),
        (["latents", "RUN", "--data", "/nowhere"], "/nowhere"),
        (["latents", "RUN", "--colour-by", "class"], "did you mean --color_by"),
        (["latents", "RUN", "--color-by", "age"], "subject | class | split"),
        (["latents", "RUN", "--data", "HEADS/images", "--color-by", "class"], "no case has a class"),
        (["latents", "RUN", "--max_cases", "2"], "max_cases"),
        (["latents", "RUN", "--out", "HEADS"], "nothing is overwritten"),
    ],
)
def test_mistakes_are_named(run, heads, capsys, flags, words):
    flags = [flag.replace("RUN", str(run)).replace("HEADS", str(heads)) for flag in flags]
    assert run_script(reports_main, flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_it_runs_as_a_module(run, tmp_path):
    command = [sys.executable, "-m", "ldm3d.reports", "latents", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--color_by" in done.stdout
