"""A case is encoded once, and anew as soon as anything changes that the encoder sees."""

import dataclasses
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import read_csv, vae_flags

import train_vae
from ldm3d.data import VolumeDataset, open_images
from ldm3d.pipeline import load_autoencoder
from ldm3d.reports import encoded_cases
from ldm3d.reports.__main__ import main as reports_main
from ldm3d.reports.encoded_cases import cache_folder, from_cache


def encode_counted(monkeypatch) -> list[int]:
    """Counts the encodings from here on."""
    calls, original = [], encoded_cases.slices_picture
    monkeypatch.setattr(encoded_cases, "slices_picture", lambda *a: (calls.append(1), original(*a))[1])
    return calls


def test_a_case_is_encoded_once_and_anew_when_file_or_weights_change(
    mapped_run, heads, tmp_path, monkeypatch
):
    place, copy = tmp_path / "images", tmp_path / "vae"
    shutil.copytree(heads / "images", place)
    shutil.copytree(mapped_run, copy, ignore=shutil.ignore_patterns("latents", "analysis-*"))
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

    return max(float(np.ptp(from_cache(path, make)["mean"])) for _ in range(number))


def test_many_processes_may_use_the_cache_at_once_and_never_see_half_a_file(tmp_path):
    path = tmp_path / "new" / "case.npz"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(write_and_read, [(path, 5)] * 4) == [0.0] * 4
    assert [p.name for p in path.parent.iterdir()] == ["case.npz"]


def test_a_damaged_file_is_made_anew_and_a_folder_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    path, good = tmp_path / "case.npz", {"mean": np.arange(3.0)}
    for content in (b"", b"PK\x03\x04 half", b"nonsense"):
        path.write_bytes(content)
        assert from_cache(path, lambda: good)["mean"].tolist() == [0, 1, 2]
        assert from_cache(path, lambda: {})["mean"].tolist() == [0, 1, 2]
    (tmp_path / "file").write_text("in the way")
    assert from_cache(tmp_path / "file" / "case.npz", lambda: good) is good
    assert "cannot be kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "matters"),
    [
        ("percentiles", (1.0, 99.0), True),
        ("window", (0.0, 80.0), True),
        ("scaling", "minmax", True),
        ("channel", (0,), True),
        ("file_spacing", (2.0, 2.0), True),
        ("spacing", (2.0, 2.0), True),
        ("size", (32, 32), True),
        ("resize", True, True),
        ("cache_gb", 1.0, False),
        ("subject", r"_(\d)", False),
    ],
)
def test_the_folder_changes_with_every_setting_that_changes_what_the_encoder_sees(
    vae_run, name, value, matters
):
    autoencoder, content = load_autoencoder(vae_run)
    data = open_images(content, own_size=False)
    config = dataclasses.replace(data.config, size=(16, 20))
    folders = [
        cache_folder(vae_run, autoencoder, VolumeDataset(data.cases, data.infos, data.spec, c), "fp32")
        for c in (config, dataclasses.replace(config, **{name: value}))
    ]
    assert (folders[0] != folders[1]) == matters
