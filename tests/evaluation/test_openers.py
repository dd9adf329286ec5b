"""Two sets are brought to one grid and one scale: by the run's rule, else the real set's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import vae_flags

import ldm3d.data.inspection as inspection
import train_vae
from ldm3d.config import InputError
from ldm3d.data import Volume, read, write
from ldm3d.engine.checkpoint import load_run
from ldm3d.evaluation.openers import OpenConfig, beside, open_sets


def write_set(folder, num: int = 3, spacing: tuple[float, float] = (1.0, 1.0), channels: int = 1) -> str:
    draw = np.random.default_rng(num)
    for i in range(num):
        array = draw.normal(5, 2, (channels, 16, 20)).astype(np.float32)
        write(folder / f"{i}.tif", Volume(array, np.diag([*spacing, 1.0])))
    return str(folder)


def test_scaling_by_data_set_takes_the_numbers_of_the_run_else_those_of_the_real_set(vae_run, tmp_path):
    real, made = write_set(tmp_path / "real", 4), write_set(tmp_path / "made")
    config = OpenConfig(scaling="dataset")
    alone = open_sets(made, {"real": (real, "val")}, config).sets["generated"]
    voxels = np.stack([np.random.default_rng(4).normal(5, 2, (4, 16, 20)).astype(np.float32)])
    assert alone.spec.low[0] == pytest.approx(voxels.mean() - voxels.std(), rel=1e-4)
    stored = load_run(vae_run, "vae")["state"]["data"]
    by_run = open_sets(made, {"real": (real, "val")}, config, run=str(vae_run)).sets
    for dataset in by_run.values():
        assert list(dataset.spec.low) == stored["low"]
        array = 2 * (5.0 - stored["low"][0]) / (stored["high"][0] - stored["low"][0]) - 1
        assert float(dataset[0, 0]["image"].mean()) == pytest.approx(array, rel=0.05)


def test_a_run_stands_for_the_cases_of_a_part_of_its_split(vae_run, heads):
    split = json.loads((vae_run / "split.json").read_text())
    made = str(heads / "images")
    for part, names in (("val", split["val"]), ("held-out", split["val"] + split.get("test", []))):
        sets = open_sets(made, {"real": (str(vae_run), part)}, OpenConfig())
        assert [case.id for case in sets.sets["real"].cases] == sorted(names)
        assert sets.run == str(vae_run)
    subset = open_sets(made, {"real": (str(vae_run), "train")}, OpenConfig(subset=2)).sets
    assert {name: len(dataset) for name, dataset in subset.items()} == {"real": 2, "generated": 2}


def test_files_of_other_spacing_come_to_the_real_sets_and_the_report_says_so(tmp_path, monkeypatch):
    real, made = write_set(tmp_path / "real"), write_set(tmp_path / "made", spacing=(2.0, 1.0))
    inspected, measure = [], inspection._measure
    monkeypatch.setattr(inspection, "_measure", lambda path, *a: inspected.append(path) or measure(path, *a))
    sets = open_sets(made, {"real": (real, "val")}, OpenConfig())
    generated = sets.sets["generated"]
    assert sets.protocol["spacing_mm"] == [1.0, 1.0]
    assert len(inspected) == 6  # the voxels of every file once, though the grid is settled after that
    assert generated.infos == inspection.inspect_cases(generated.cases, generated.config)
    assert generated.infos["0"].shape == (32, 20)
    assert generated[0, 0]["image"].shape == (1, 16, 20)  # its middle


def test_sets_of_different_channels_are_refused_unless_one_is_chosen(tmp_path):
    real, made = write_set(tmp_path / "real", channels=2), write_set(tmp_path / "made")
    with pytest.raises(InputError, match="differ in their number of channels"):
        open_sets(made, {"real": (real, "val")}, OpenConfig())
    sets = open_sets(made, {"real": (real, "val")}, OpenConfig(channel=(1,)))  # made: only this
    assert {dataset[0, 0]["image"].shape for dataset in sets.sets.values()} == {(1, 16, 20)}


@pytest.fixture(scope="module")
def run_of_channel_1(tmp_path_factory):
    """A run that takes channel 1 of files with two, and files as it samples them: that channel alone."""
    place = tmp_path_factory.mktemp("channels")
    write_set(place / "real", num=5, channels=2)
    flags = [
        "--data.image",
        "*.tif",
        "--data.channel",
        "1",
        "--data.size",
        "none",
        "--data.scaling",
        "minmax",
    ]
    train_vae.main(vae_flags(place / "real", place / "run", 1, *flags))
    for path in (place / "real").iterdir():
        volume = read(path)
        write(place / "samples" / path.name, replace(volume, array=volume.array[1:]))
    return place


def test_samples_of_a_run_that_takes_one_channel_are_compared_with_that_channel(run_of_channel_1):
    place = run_of_channel_1
    for real in (place / "run", place / "real"):
        for channel in (None, (1,)):
            config = OpenConfig(channel=channel)
            sets = open_sets(f"{place}/samples", {"real": (str(real), "train")}, config, f"{place}/run").sets
            made = {
                case.id: sets["generated"][i, i]["image"] for i, case in enumerate(sets["generated"].cases)
            }
            for i, case in enumerate(sets["real"].cases):
                assert torch.equal(sets["real"][i, i]["image"], made[case.id])


def test_a_channel_that_the_samples_of_a_run_do_not_hold_is_refused(run_of_channel_1):
    place = run_of_channel_1
    for real in (place / "run", place / "real"):
        with pytest.raises(
            InputError, match="channel: no channel 0 in the files of generated, the run's hold 1"
        ):
            open_sets(
                f"{place}/samples", {"real": (str(real), "train")}, OpenConfig(channel=(0,)), f"{place}/run"
            )


def test_without_a_run_it_is_said_that_channels_of_one_number_may_be_different_ones(run_of_channel_1, capsys):
    place = run_of_channel_1
    open_sets(f"{place}/samples", {"real": (f"{place}/real", "val")}, OpenConfig(channel=(0,)))
    assert "different numbers of channels, {'real': 2, 'generated': 1}" in capsys.readouterr().out


def test_a_report_goes_beside_the_folder_or_the_folder_of_the_pattern(tmp_path):
    write_set(tmp_path / "a" / "b")
    assert beside(str(tmp_path / "a" / "b")) == beside(str(tmp_path / "a" / "b" / "*.tif")) == tmp_path / "a"
