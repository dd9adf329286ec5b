"""A run on the slices of volumes does all that a run on images does: resume, sample, score, segment."""

import numpy as np
import pytest
import tiny

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.data import read
from ldm3d.data.phantoms import write_phantoms
from ldm3d.evaluation.__main__ import main as evaluation_main

SLICES = ["--data.slices", "coronal", "--data.size", "16,16", "--data.cache", "disk"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Four 3-D heads of 16 x 8 x 16 voxels, and an autoencoder of their coronal slices."""
    place = tmp_path_factory.mktemp("slices")
    write_phantoms(place / "heads", 4, size=(16, 8, 16), spacing=(12.0, 20.0, 12.0))
    train_vae.main(tiny.vae_flags(place / "heads", place / "vae", 4, *SLICES))
    return place


def test_training_goes_on_and_reconstructions_are_flat_images(place) -> None:
    train_vae.main(tiny.vae_flags(place / "heads", place / "vae", 6, *SLICES))
    head = sorted((place / "heads/images").iterdir())[0]
    sample.main([str(place / "vae"), str(head.parent), "--out", str(place / "recon")])
    written = sorted((place / "recon").glob("*.tif"))
    name = head.name.split(".")[0]
    assert any(path.stem.startswith(f"{name}_0") for path in written)
    volume = read(head)
    one = read(next(path for path in written if path.stem.startswith(name)))
    assert one.shape == (16, 16)
    assert np.allclose(one.spacing, np.delete(volume.spacing, 1), atol=1e-3)
    sample.main([str(place / "vae"), str(written[0]), "--out", str(place / "again")])  # is flat already
    evaluation_main(["reconstruct", str(place / "vae"), "--out", str(place / "scores")])
    rows = tiny.read_csv(place / "scores/cases.csv")
    validation = {name.rpartition("_")[0] for name in (row["case"] for row in rows)}
    assert len(validation) == 1


def test_denoisers_and_segmentation_take_slices_too(place) -> None:
    train_ldm.main(tiny.ldm_flags(place / "vae", place / "ldm", 4, "--condition.use", "labels"))
    sample.main([str(place / "ldm"), "--cases", "val", "--steps", "2", "--out", str(place / "samples")])
    assert {read(path).shape for path in (place / "samples").glob("*.tif")} == {(16, 16)}
    train_cdal.main(tiny.cdal_flags(place / "heads", place / "cdal", 2, *SLICES, "--data.patch", "12,12"))
    image = sorted((place / "heads/images").iterdir())[0]
    sample.main([str(place / "cdal"), str(image), "--votes", "1", "--out", str(place / "labels")])
    assert {read(path).shape for path in (place / "labels/labels").glob("*.tif")} == {(16, 16)}


def test_samples_are_compared_with_the_slices_of_a_run(place) -> None:
    sample.main([str(place / "vae"), str(place / "heads/images"), "--out", str(place / "flat")])
    flags = ["--resamples", "20", "--out", str(place / "sets")]
    evaluation_main(["samples", str(place / "flat"), str(place / "vae"), *flags])
    assert (place / "sets/report.json").is_file()
