"""Runs on 8-bit pictures in colour: what they write are such pictures, in previews as in files."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import tiny

import sample
import train_ldm
import train_vae
from ldm3d.data import read
from ldm3d.evaluation import copies, pairs
from ldm3d.evaluation import reconstruction as evaluation
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.inference import reconstruction, sampling


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The folder of twelve RGB pictures of 16 x 20 pixels, uint8."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        rgb = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        tifffile.imwrite(folder / f"{i:02d}.tif", rgb, photometric="rgb")
    return folder


def flags_of(pictures: Path, run: Path) -> list[str]:
    """train_vae.py on the pictures, in the run folder `run`; without the number of steps."""
    place = pictures.parent
    flags = ["--data.root", pictures, "--data.image", "*.tif", "--data.cache_dir", place / "cache"]
    flags += ["--vae.in_channels", 3, "--run.dir", run, *tiny.RUN, *tiny.VAE]
    return list(map(str, [place / "settings.json", *flags]))


@pytest.fixture(scope="module")
def vae(pictures) -> Path:
    """The run folder of an autoencoder of the pictures."""
    run = pictures.parent / "vae"
    (pictures.parent / "settings.json").write_text("{}")
    train_vae.main([*flags_of(pictures, run), "--run.steps", "2", "--run.eval_every", "9"])
    return run


@pytest.fixture(scope="module")
def samples(vae) -> Path:
    """A folder of three samples and their mean, of a denoiser of the pictures."""
    run, out = vae.parent / "ldm", vae.parent / "samples"
    empty = vae.parent / "settings.json"
    flags = [
        empty,
        "--vae",
        vae,
        "--run.dir",
        run,
        "--run.steps",
        2,
        *tiny.RUN,
        *tiny.LDM,
        "--run.eval_every",
        9,
    ]
    train_ldm.main(list(map(str, flags)))
    sample.main([str(run), "--num", "3", "--steps", "2", "--maps", "--out", str(out)])
    return out


def assert_rgb(path: Path) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert page.photometric == tifffile.PHOTOMETRIC.RGB
        assert (page.shape, page.dtype) == ((16, 20, 3), np.uint8)
    np.testing.assert_array_equal(read(path).array, np.moveaxis(tifffile.imread(path), -1, 0))


def test_samples_are_rgb_pictures_and_maps_are_floats(samples):
    for i in range(3):
        assert_rgb(samples / f"sample_{i:04d}.tif")
    for name in ("mean", "std"):
        found = tifffile.imread(samples / f"maps/set_0000_{name}.tif")
        assert found.dtype == np.float32
        assert (found != np.rint(found)).any()


def test_reconstructions_are_rgb_pictures_but_those_of_float_files_are_floats(vae, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    rgb = tifffile.imread(pictures / "00.tif")
    tifffile.imwrite(tmp_path / "in/bytes.tif", rgb, photometric="rgb")
    tifffile.imwrite(tmp_path / "in/floats.tif", rgb.astype(np.float32) / 255, photometric="rgb")
    sample.main([str(vae), str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert_rgb(tmp_path / "out/bytes.tif")
    floats = tifffile.imread(tmp_path / "out/floats.tif")
    assert floats.dtype == np.float32
    assert (floats != np.rint(floats)).any()


def test_written_pictures_can_be_compared_with_the_data(samples, vae, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "new_figure", lambda **_: None)  # histograms take a second
    flags = ["--resamples", "4", "--features", "none"]
    evaluation_main(["samples", str(samples), str(vae), *flags, "--out", str(tmp_path / "sets")])
    sample.main([str(vae), str(pictures), "--out", str(tmp_path / "recon")])
    flags += ["--out", str(tmp_path / "pairs")]
    evaluation_main(["compare", str(tmp_path / "recon"), str(pictures), *flags])
    rows = tiny.read_csv(tmp_path / "pairs/cases.csv")
    recon, picture = (tifffile.imread(f / "00.tif").astype(float) for f in (tmp_path / "recon", pictures))
    assert float(rows[0]["mae"]) == pytest.approx(np.abs(recon - picture).mean(), rel=1e-4)
    assert (tmp_path / "sets/report.json").exists()


def test_sheets_show_the_pictures_in_colour(vae, pictures, samples, monkeypatch, tmp_path):
    made = {}
    for module in (train_vae, train_ldm, copies, reconstruction, evaluation, sampling):
        monkeypatch.setattr(
            module, "save_sheet", lambda path, rows, limits, name=module.__name__: made.update({name: rows})
        )
    empty, some = (
        str(pictures.parent / "settings.json"),
        "--run.eval_every 1 --run.fresh --run.steps 1".split(),
    )
    train_vae.main([*flags_of(pictures, tmp_path / "vae"), *some])
    train_ldm.main(
        [empty, *map(str, ["--vae", vae, "--run.dir", tmp_path / "ldm", *tiny.RUN, *tiny.LDM, *some])]
    )
    sample.main([str(vae), str(pictures), "--out", str(tmp_path / "recon")])
    sample.main([str(tmp_path / "ldm"), "--num", "2", "--steps", "1", "--out", str(tmp_path / "samples")])
    evaluation_main(["reconstruct", str(vae), "--resamples", "5", "--out", str(tmp_path / "report")])
    flags = ["--features", "none", "--out", str(tmp_path / "copies")]
    evaluation_main(["copies", str(tmp_path / "samples"), str(vae), *flags])
    assert len(made) == 6
    for name, rows in made.items():
        for title, shown in rows.items():
            assert {(part.shape, part.dtype.name) for part in shown} == {((16, 20, 3), "uint8")}, (
                name,
                title,
            )
    original = np.stack(made[reconstruction.__name__]["original"]).astype(int)
    files = np.stack([tifffile.imread(pictures / f"{i:02d}.tif") for i in range(4)])
    np.testing.assert_allclose(original, files, atol=3)  # the percentiles of a case are black and white
