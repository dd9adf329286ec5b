"""Pictures show all intensities of the data, whatever their scaling, and as many cases as were asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.evaluation import copies
from ldm3d.evaluation import reconstruction as evaluation
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.inference import reconstruction, sampling, segmentation
from ldm3d.pipeline import load_autoencoder

ZSCORE = ["--data.scaling", "zscore"]


@pytest.fixture
def sheets(monkeypatch) -> list[tuple[str, dict[str, Any], Any]]:
    """(file name, rows, limits) of the sheets that are made from now on. None is drawn."""
    made: list[tuple[str, dict[str, Any], Any]] = []
    modules = (train_vae, train_ldm, train_cdal, copies, evaluation, reconstruction, sampling, segmentation)
    for module in modules:
        monkeypatch.setattr(
            module, "save_sheet", lambda path, rows, limits=None: made.append((Path(path).name, rows, limits))
        )
    return made


@pytest.fixture(scope="module")
def unbounded_run(heads, tmp_path_factory) -> Path:
    """The run folder of an autoencoder of zscores."""
    folder = tmp_path_factory.mktemp("zscore") / "vae"
    train_vae.main(tiny.vae_flags(heads, folder, 2, *ZSCORE, "--run.eval_every", "9"))
    return folder


def display_of(run: Path) -> tuple[float, float]:
    display = load(step_files(run)[0])["state"]["data"]["display"]
    assert display[1] - display[0] > 3  # zscores reach far
    return tuple(display)


def shown(rows: list[np.ndarray], display: tuple[float, float]) -> float:
    """The share of pixels that are neither darker than black nor brighter than white."""
    values = np.concatenate([np.ravel(row) for row in rows])
    return float(((values >= display[0]) & (values <= display[1])).mean())


def test_previews_of_autoencoders_show_the_range_of_the_data(heads, tmp_path, sheets):
    train_vae.main(tiny.vae_flags(heads, tmp_path / "vae", 1, *ZSCORE, "--run.eval_every", "1"))
    ((_, rows, limits),) = sheets
    assert limits == display_of(tmp_path / "vae")
    assert shown(rows["original"], limits) > 0.9
    assert all(part.base is None for row in rows.values() for part in row)  # no slice keeps its volume alive
    assert shown(rows["original"], (-1, 1)) < 0.7
    for x, recon, difference in zip(*rows.values(), strict=True):
        np.testing.assert_allclose(difference - sum(limits) / 2, recon - x, atol=1e-5)


def test_previews_and_samples_of_latent_runs_show_the_range_of_the_data(unbounded_run, tmp_path, sheets):
    run = tmp_path / "ldm"
    train_ldm.main(tiny.ldm_flags(unbounded_run, run, 1, "--run.eval_every", "1"))
    sample.main([str(run), "--num", "2", "--steps", "1", "--out", str(tmp_path / "samples")])
    evaluation_main(["copies", str(tmp_path / "samples"), str(run), "--features", "none"])
    display = display_of(run)
    assert display == display_of(unbounded_run)
    assert [limits for _, _, limits in sheets] == [display] * 3
    assert shown(sheets[0][1]["real (validation)"], display) > 0.9


def test_sheets_of_reconstructions_show_the_range_of_the_data(unbounded_run, heads, tmp_path, sheets):
    sample.main([str(unbounded_run), str(heads / "images"), "--out", str(tmp_path / "files")])
    evaluation_main(["reconstruct", str(unbounded_run), "--resamples", "5"])
    assert [limits for _, _, limits in sheets] == [display_of(unbounded_run)] * 3


def test_label_maps_lie_on_images_in_the_range_of_the_data(heads, tmp_path, sheets):
    run = tmp_path / "cdal"
    train_cdal.main(tiny.cdal_flags(heads, run, 1, *ZSCORE, "--run.eval_every", "1"))
    sample.main([str(run), str(heads / "images"), "--out", str(tmp_path / "maps")])
    (_, preview, _), (_, overlays, _) = sheets
    for pictures in (preview["truth"], [row[0] for row in overlays.values()]):
        values = np.stack([picture.max(-1) for picture in pictures])
        assert ((values == 0) | (values == 255)).mean() < 0.1  # with -1 to 1 a third is black or white


@pytest.mark.parametrize("num", [0, 1, 3])
def test_the_sheet_of_reconstructions_shows_as_many_cases_as_asked_for(vae_run, heads, tmp_path, sheets, num):
    images = str(heads / "images")
    flags = ["--num", str(num), "--worst", "0", "--resamples", "5", "--out", str(tmp_path / "report")]
    evaluation_main(["reconstruct", str(vae_run), "--data", images, *flags])
    if num == 0:
        assert sheets == []
        return
    ((name, rows, limits),) = sheets
    assert (name, limits) == ("reconstructions.png", (-1, 1))
    names = sorted(row["case"] for row in tiny.read_csv(tmp_path / "report" / "cases.csv"))
    assert [title.split(":")[0] for title in rows] == names[:num]
    net, content = load_autoencoder(vae_run)
    dataset = evaluation.open_images(content, images, "all")
    x = dataset[0, 0]["image"]
    original, recon, difference = rows[next(iter(rows))]
    np.testing.assert_allclose(original, x[0], atol=1e-6)
    np.testing.assert_allclose(recon, net(x[None])[0][0, 0].detach(), atol=1e-5)
    np.testing.assert_allclose(difference, 2 * (recon - original), atol=1e-5)
