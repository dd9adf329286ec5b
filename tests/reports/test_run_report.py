"""The report of a run shows what the run's files say: curves, previews, voxels, scores; offline."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from tiny import ldm_flags

import sample
import train_ldm
from ldm3d import Volume, write
from ldm3d.engine.logger import mid_slices, read_log
from ldm3d.reports import pictures, run_log, run_report
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.html_tables import key_table, scores_of, tables_of
from ldm3d.reports.pictures import grey, png

STEPS = 40


def volume_of(index: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(index).uniform(0, 100, shape).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder made by hand: every number in it is known."""
    run = tmp_path_factory.mktemp("report") / "a <run> & more"
    (run / "previews").mkdir(parents=True)
    config = {"kind": "ldm", "preset": "phantom", "batch_size": 4, "run": {"steps": 100, "dir": None}}
    config["data"] = {"dims": 3, "augment": {"affine": 0.25}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "split.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"], "test": []}))
    lines = []
    for step in range(1, STEPS + 1):
        speed = {"samples_per_s": 10.0 + step, "data_wait": 0.25, "peak_gib": 1.5}
        loss = {"loss": 1 / step, "lr": 1e-3, "skipped_steps": 0}
        lines.append({"step": step, "split": "train", "seconds": 60.0 * step, **loss, **speed})
        if step % 10 == 0:
            levels = {"loss_u0.2": 2 / step, "loss_u0.8": 3 / step}
            lines.append(
                {"step": step, "split": "val", "seconds": 60.0 * step, "loss": abs(step - 30) + 0.5, **levels}
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"step": 41, "split": "tr')  # a run at work
    for step in (10, 20, 30):
        (run / "previews" / f"step_{step:07d}.png").write_bytes(png(np.full((4, 8), step, np.uint8)))
    (run / "previews" / "step_final.png").write_bytes(png(np.zeros((4, 8), np.uint8)))  # no step's
    results = run / "samples-001"
    results.mkdir()
    for index, shape in enumerate([(6, 9, 7), (5, 8, 10), (6, 9, 7)]):
        affine = np.diag([1.0, 2.0, 1.5, 1.0])
        write(results / f"sample_{index:04d}.nii.gz", Volume(volume_of(index, shape)[None], affine, "RAS"))
    scores = {"generated": {"mean": 0.125, "std": None}, "real": {"mean": 0.25, "std": 0.5}}
    (results / "samples.json").write_text(json.dumps({"seed": 17, "scores": scores}))
    (results / "preview.png").write_bytes(png(np.zeros((2, 2), np.uint8)))
    return run


# --- numbers ------------------------------------------------------------------------------------------------


def test_curves_are_the_logs_numbers_those_of_one_name_in_one_chart(run):
    lines = read_log(run / "log.jsonl")
    assert len(lines) == STEPS + 4  # not the torn one
    charts = {chart["name"]: chart["lines"] for chart in run_log.curves(lines)}
    assert next(iter(charts)) == "loss"
    assert set(charts) == {"loss", "loss at u", "samples_per_s"}  # what never changes has no chart
    assert [p[0] for p in charts["loss"]["train"]] == list(range(1, STEPS + 1))
    assert [p[2] for p in charts["loss"]["train"]] == pytest.approx([1 / s for s in range(1, 41)], rel=1e-4)
    assert charts["loss"]["val"] == [[10, 600, 20.5], [20, 1200, 10.5], [30, 1800, 0.5], [40, 2400, 10.5]]
    assert set(charts["loss at u"]) == {"u = 0.2", "u = 0.8"}


def test_a_long_curve_is_thinned_to_the_means_of_equal_parts():
    points = [[float(i), 2.0 * i, float(i % 2)] for i in range(4000)]
    thinned = run_log.thin(points)
    assert len(thinned) == 800
    assert thinned[0] == [2.0, 4.0, 0.4]
    assert thinned[-1][0] == pytest.approx(3997)
    uneven = run_log.thin(points[:1001])
    assert len(uneven) == 800
    assert np.isfinite(uneven).all()
    assert run_log.thin(points[:10]) == points[:10]


def test_the_facts_are_those_of_the_log(run):
    lines, config = read_log(run / "log.jsonl"), json.loads((run / "config.json").read_text())
    facts = run_log.facts_of(config, lines, json.loads((run / "split.json").read_text()))
    assert facts == {
        "step": "40 of 100",
        "training time": "40 min 00 s",
        "best validation": "loss 0.5 at step 30",
        "samples per second": "30.5 (median)",
        "waiting for data": "25.0% of the time",
        "peak memory": "1.5 GiB",
        "skipped steps": "0",
        "cases": "2 train, 1 val",
    }
    assert [run_log.duration(s) for s in (12, 200, 3725.4)] == ["12 s", "3 min 20 s", "1 h 02 min"]


def test_figures_that_change_are_summed_up_as_their_title_says():
    changing = [
        {"samples_per_s": 1.0, "data_wait": 0.1, "peak_gib": 2.5, "skipped_steps": 0},
        {"samples_per_s": 9.0, "data_wait": 0.2, "peak_gib": 1.5, "skipped_steps": 3},
        {"samples_per_s": 2.0, "data_wait": 0.6, "peak_gib": 2.0, "skipped_steps": 4},
    ]
    lines = [{"split": "train", "step": i, "seconds": 1.0, **line} for i, line in enumerate(changing)]
    facts = run_log.facts_of({"run": {"steps": 9}}, lines, {})
    assert facts["samples per second"] == "2 (median)"
    assert facts["waiting for data"] == "30.0% of the time"
    assert facts["peak memory"] == "2.5 GiB"
    assert facts["skipped steps"] == "4"
    assert facts["best validation"] == "none yet"


@pytest.mark.parametrize(
    ("figure", "words"),
    [("psnr", "PSNR 21.00 dB at step 2"), ("dice", "Dice 21.000 at step 2"), ("loss", "loss 19 at step 3")],
)
def test_the_best_validation_has_the_highest_score_or_the_lowest_loss(figure, words):
    lines = [{"split": "val", "step": i, figure: v} for i, v in ((1, 20.0), (2, 21.0), (3, 19.0))]
    lines += [{"split": "train", "step": 4, "psnr": 99.0, "dice": 99.0, "loss": 0.0}]
    assert run_log.best_validation(lines) == words
    scored = [{"loss": 1.0 - line["step"], "dice": 0.5, **line} for line in lines]  # a loss counts last
    if figure != "loss":
        assert run_log.best_validation(scored) == words


def test_many_previews_are_thinned_evenly_and_the_newest_results_come_first(tmp_path):
    for step in range(1, 101):
        (tmp_path / f"step_{step:07d}.png").write_bytes(png(np.zeros((1, 1), np.uint8)))
    steps = [preview["step"] for preview in run_report.previews(tmp_path)]
    assert (len(steps), steps[0], steps[-1]) == (24, 1, 100)
    assert set(np.diff(steps)) <= {4, 5}
    for name, age in (("samples-001", 2), ("samples-002", 1), ("evaluation-001", 3), ("previews", 0)):
        (tmp_path / name).mkdir()
        if name != "previews":
            (tmp_path / name / "a.json").write_text("{}")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    names = [folder.name for folder in run_report.result_folders(tmp_path)]
    assert names == ["samples-002", "samples-001", "evaluation-001"]


def test_json_becomes_tables_and_nothing_of_it_is_lost():
    content = {
        "run": "x<y",
        "cases": {f"case {i}": {"psnr": float(i), "ssim": None} for i in range(20)},
        "metrics": {"fid": {"mean": 1.5, "low": 1.0}},
        "latent": {"size": [4, 5], "floor": {"flow": 0.25, "eps": 0.5}},
        "empty": {},
    }
    tables, rest = tables_of(content)
    assert rest == {"run": "x<y"}
    for word in ("case 19", ">19<", "fid", ">1.5<", "4, 5", "flow", ">0.25<", "<summary>cases: 20"):
        assert word in tables, word
    assert "x&lt;y" in key_table(rest)


def test_verdict_and_warnings_stand_before_the_scores_and_empty_rows_are_one_line():
    empty = {"value": None, "low": None, "real_halves": None}
    report = {
        "seed": 3,
        "protocol": {"size": [4, 5]},
        "figures": {
            "whole/kernel": {"value": 0.5, "low": 0.4},
            "whole/recall": empty,
            "whole/coverage": empty,
        },
        "warnings": ["too few <cases>"],
        "verdict": "no copies",
    }
    html, rest = scores_of(report)
    order = [
        html.index(words)
        for words in ("no copies", "too few &lt;cases&gt;", ">0.5<", "No value: whole/recall")
    ]
    assert order == sorted(order)
    assert "95 % from" in html
    assert "real_halves" not in html
    assert "<td>-</td>" not in html
    assert rest == {"seed": 3, "protocol": {"size": [4, 5]}}


def test_scores_come_first_and_how_they_were_made_is_folded(run):
    page = run_report.make_page(run, run_report.RunReportConfig())
    assert page.index("Scores and results") < page.index(">Curves<")
    assert page.index(">0.125<") < page.index("how it was made") < page.index(">seed<")


def test_figures_are_drawn_smoothly_and_only_voxels_as_squares(run):
    css = (Path(run_report.__file__).parent / "pages.css").read_text()
    rules = [rule.split("{")[0].strip() for rule in css.split("}") if "pixelated" in rule]
    assert len(rules) == 1
    assert "img" not in rules[0].split(
        ", "
    )  # a figure loses its minus signs if it is scaled by repeating pixels


def test_the_slices_of_a_sheet_are_those_of_the_volume():
    volume = np.arange(3 * 4 * 7, dtype=np.uint8).reshape(1, 3, 4, 7)
    sheet, columns = pictures.side_by_side(volume)
    assert columns == 3
    for k in range(7):
        top, left = (k // columns) * 4, (k % columns) * 3
        assert np.array_equal(sheet[top : top + 4, left : left + 3], volume[0, :, :, k].T)


def test_a_volume_too_large_for_a_page_is_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_VOXELS", 300)
    array = np.arange(10.0).repeat(10 * 20).reshape(1, 10, 10, 20)
    write(tmp_path / "a.nii.gz", Volume(array.astype(np.float32), np.diag([1.0, 1.0, 0.5, 1.0]), "RAS"))
    embedded = pictures.volume_for_viewer(tmp_path / "a.nii.gz", 3)
    assert (embedded["factor"], embedded["shape"], embedded["mm"]) == (2, (5, 5, 10), [2.0, 2.0, 1.0])


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    """Chromium, with the run's report open."""
    reports_main(["run", str(run)])
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(run / "report.html")
        browser.wait("document.querySelectorAll('.plane canvas').length === 3")
        yield browser


def test_the_page_asks_the_network_for_nothing_and_complains_of_nothing(browser, run):
    browser.requests()
    browser.open(run / "report.html")
    browser.wait("document.querySelectorAll('.plane canvas').length === 3")
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [(run / "report.html").as_uri()]
    assert browser.complaints() == []
    tried = "return fetch('http://127.0.0.1:9/').then(() => 'sent', e => String(e))"
    assert "TypeError" in browser.run(tried)  # the page's policy forbids it
    assert "Content Security Policy" in " ".join(browser.complaints())


def test_the_page_says_what_the_files_say(browser):
    text = browser.run("return document.body.innerText")
    for words in ("a <run> & more", "40 of 100", "loss 0.5 at step 30", "1.5 GiB", "augment.affine", "0.125"):
        assert words in text, words
    missing = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.run(missing) == 0


def test_every_curve_runs_through_its_points(browser):
    titles = browser.run("return [...document.querySelectorAll('.chart b')].map(b => b.textContent)")
    assert titles == ["loss", "loss by noise level u", "samples per second"]
    d = browser.run("return document.querySelectorAll('#charts .chart path')[1].getAttribute('d')")
    x, y = np.array([pair.split(",") for pair in d[1:].split("L")], float).T  # validation: 20.5 10.5 0.5 10.5
    assert np.diff(x) == pytest.approx([x[1] - x[0]] * 3, abs=0.2)
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.2)
    assert y[3] == pytest.approx(y[1], abs=0.1)
    assert y[2] > y[1] > y[0]  # down on the screen is a larger y


def test_the_mouse_on_a_curve_shows_the_nearest_values(browser):
    x, y, width, height = browser.box("#charts svg")
    left, right = 48 / 400, 390 / 400  # the steps from 1 to 40
    browser.point(x + width * (left + (right - left) * 29 / 39), y + height / 2)
    tip = browser.run("return document.querySelector('#charts .tip').innerText")
    assert tip.split("\n") == ["step 30", "train 0.03333", "val 0.5"]


def test_logarithmic_minutes_and_smoothing_change_the_curves(browser):
    first = "document.querySelector('#charts svg')"
    before = browser.run(f"return {first}.innerHTML")
    browser.click("#log")
    assert browser.run(f"return {first}.innerHTML") != before
    browser.slide("#over", "1")
    assert "10 min" in browser.run(f"return {first}.textContent")
    browser.slide("#smooth", 0.9)
    assert browser.run(f"return {first}.querySelectorAll('path').length") == 4  # faint beside smooth


def test_previews_go_with_the_slider_from_the_last_to_the_first(browser):
    parts = "['label', 'img'].map(name => document.querySelector('#time ' + name))"
    shown = f"return {parts}.map(e => e.alt || e.innerText)"
    assert browser.run(shown) == ["step 30", "step 30"]
    browser.slide("#time input", 0)
    assert browser.run(shown) == ["step 10", "step 10"]


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [int(v) / 255 for v in color[4:-1].split(",")]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_by_day_and_by_night(browser, scheme):
    browser.prefer(scheme)
    colors = browser.run(
        "const s = getComputedStyle(document.body), f = getComputedStyle(document.querySelector('.faint'));"
        "const c = getComputedStyle(document.querySelector('.card'));"
        "return [s.color, f.color, s.backgroundColor, c.backgroundColor]"
    )
    text, faint, back, card = map(luminance, colors)
    assert (back < 0.1) == (scheme == "dark")
    for front, least in ((text, 7), (faint, 4.5)):
        for behind in (back, card):
            low, high = sorted((front, behind))
            assert (high + 0.05) / (low + 0.05) > least


def planes(browser: Browser) -> list[np.ndarray]:
    """The pixels of the three canvases."""
    script = """return [...document.querySelectorAll('.plane canvas')].map(c => {
        const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [c.height, c.width, Array.from(pixels.filter((_, i) => i % 4 === 0))]; })"""
    return [np.array(pixels, np.uint8).reshape(high, wide) for high, wide, pixels in browser.run(script)]


def test_the_viewer_shows_the_planes_of_the_file_upright_and_exactly(browser):
    expected = mid_slices(grey(volume_of(0, (6, 9, 7))).astype(float))  # uint8 would be a coloured slice
    for shown, real in zip(planes(browser), expected, strict=True):
        assert np.array_equal(shown, real)
    size = browser.run(
        "return [...document.querySelectorAll('.stage')].map(s => s.clientWidth / s.clientHeight)"
    )
    assert size == pytest.approx([18 / 10.5, 6 / 10.5, 6 / 18], rel=0.03)  # mm, not voxels
    captions = browser.run(
        "return [...document.querySelectorAll('.plane figcaption')].map(c => c.textContent)"
    )
    assert captions == ["sagittal 4 / 6", "coronal 5 / 9", "axial 4 / 7"]
    letters = browser.run("return [...document.querySelectorAll('.stage')].map(s => s.textContent)")
    assert letters == ["PAIS", "LRIS", "LRPA"]  # left, right, bottom, top


def test_slider_click_and_choice_move_all_planes(browser):
    volume = grey(volume_of(0, (6, 9, 7)))
    browser.slide(".plane input", 6, number=2)
    assert np.array_equal(planes(browser)[2], np.rot90(volume[:, :, 6]))
    x, y, width, height = browser.box(".stage", 2)
    browser.point(x + width * 1.5 / 6, y + height * 0.5 / 9, press=True)  # voxel i = 1, j = 8
    sagittal, coronal, _ = planes(browser)
    assert np.array_equal(sagittal, np.rot90(volume[1]))
    assert np.array_equal(coronal, np.rot90(volume[:, 8]))
    browser.click(".thumbs button:nth-child(2)")
    other = grey(volume_of(1, (5, 8, 10)))
    shown = planes(browser)
    assert [p.shape for p in shown] == [(10, 8), (10, 5), (8, 5)]
    assert any(np.array_equal(shown[0], np.rot90(other[i])) for i in range(5))


def test_the_page_is_as_wide_as_the_window_on_a_phone_too(run, browser, tmp_path):
    with Browser(tmp_path / "profile", (420, 800)) as phone:
        phone.open(run / "report.html")
        phone.wait("document.querySelectorAll('.plane canvas').length === 3")
        wide = phone.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slices_run(vae_run, tmp_path_factory) -> Path:
    """A run of stage two on 2-D heads, with samples and a report of one of them."""
    run = tmp_path_factory.mktemp("slices") / "ldm"
    train_ldm.main(ldm_flags(vae_run, run, 4))
    sample.main([str(run), "--num", "2", "--steps", "2"])
    reports_main(["run", str(run), "--volumes", "1"])
    return run


def test_real_runs_of_both_stages_have_a_report(slices_run, vae_run, tmp_path):
    text = (slices_run / "report.html").read_text()
    for words in ("samples-001", "loss", "real (validation)", "sample_0000", "Previews over time"):
        assert words in text, words
    assert "sample_0001" not in text
    reports_main(["run", str(vae_run), "--out", str(tmp_path / "vae.html")])
    assert "Autoencoder, preset phantom" in (tmp_path / "vae.html").read_text()


def test_slices_are_shown_as_they_are(slices_run, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(slices_run / "report.html")
        image = "document.querySelector('.gallery img')"
        browser.wait(f"{image} && {image}.complete")
        assert browser.run(f"return [{image}.naturalHeight, {image}.naturalWidth]") == [16, 20]
        assert browser.complaints() == []


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"kind": "vae", "run": {"steps": 5}}))
    reports_main(["run", str(tmp_path)])
    assert "Nothing is logged yet" in (tmp_path / "report.html").read_text()
