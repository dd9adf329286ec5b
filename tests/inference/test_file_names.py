"""Whatever the ids of cases are, results have the names of files, in their own folder, one a case."""

import csv
import shutil
from pathlib import Path

import pytest
from tiny import cdal_flags, ldm_flags, vae_flags

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.data.volumes import file_name
from ldm3d.latent_diffusion import LatentDiffusion
from ldm3d.pipeline import AutoencoderPipeline, SegmentationPipeline

IDS = [
    "../../climbs",
    "/tmp/absolute",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "a?b",
    "a_b",
    "line\nbreak",
    "x" * 300,
]


def test_a_plain_id_is_its_own_name_and_any_other_gets_one_of_its_own():
    for name in ("p01_a", "sub-01_ses-2", "A.b (1)", "été"):
        assert file_name(name) == name
    assert file_name("../p01") == "_p01-3babf6e6"  # the example of the docstring
    names = [file_name(name) for name in [*IDS, "", "x" * 301]]
    assert len(set(names)) == len(names)
    for name in names:
        assert Path(name).name == name != ".."
        assert not name.startswith(".")
        assert len(name) < 200
        assert file_name(name) == name


@pytest.fixture(scope="module")
def place(heads, tmp_path_factory):
    """The heads under ids that climb out of their folder."""
    place = tmp_path_factory.mktemp("names")
    shutil.copytree(heads, place / "heads")
    table = place / "heads" / "cases.csv"
    rows = list(csv.DictReader(table.open()))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", *rows[0]])
        writer.writeheader()
        writer.writerows({"id": name} | row for name, row in zip(IDS, rows, strict=False))
    train_vae.main(vae_flags(place / "heads", place / "vae", 1))
    return place


def test_reconstructions_samples_and_label_maps_stay_in_their_folder(place):
    train_ldm.main(ldm_flags(place / "vae", place / "ldm", 1))
    train_cdal.main(cdal_flags(place / "heads", place / "cdal", 1))
    out, before = place / "results/deep/down", {path for path in place.rglob("*") if path.is_file()}
    sample.main([f"{place}/vae", f"{place}/heads", "--out", f"{out}/vae"])
    flags = ["--num", "2", "--steps", "2", "--maps", "--out", f"{out}/ldm"]
    sample.main([f"{place}/ldm", "--cases", "train", *flags])
    sample.main(
        [f"{place}/cdal", f"{place}/heads", "--votes", "1", "--probabilities", "--out", f"{out}/cdal"]
    )
    new = {path for path in place.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(out) for path in new)
    assert not Path("/tmp/absolute.tif").exists()
    written = {str(path.parent.relative_to(out)): 0 for path in new}
    for path in new:
        written[str(path.parent.relative_to(out))] += path.suffix == ".tif"
    num = len(list(csv.DictReader((place / "heads/cases.csv").open())))
    assert written["vae"] == written["cdal/labels"] == written["cdal/uncertainty"] == num
    assert written["cdal/probability"] == num
    assert written["ldm"] == written["ldm/sheets"] == written["ldm/maps"] > 0


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        ("vae", AutoencoderPipeline, "reconstruct"),
        ("cdal", SegmentationPipeline, "segment_planes"),
        ("bound", LatentDiffusion, "decode"),
    ],
)
def test_results_that_are_not_finite_are_never_written(
    request, heads, tmp_path, monkeypatch, mistake, kind, owner, name
):
    real, run = getattr(owner, name), request.getfixturevalue(f"{kind}_run")

    def spoiled(*args, **more):
        if name == "segment_planes":
            return ((start, part * float("nan")) for start, part in real(*args, **more))
        return real(*args, **more) * float("nan")

    monkeypatch.setattr(owner, name, spoiled)
    what = ["--num", "1", "--steps", "1"] if kind == "bound" else [heads / "images"]
    line = mistake(sample.main, [run, *what, "--out", tmp_path / "out"])
    assert "is not finite; --amp fp32 tells whether half precision is too coarse" in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
