"""pytest's settings: marks, --all, where the real data lies, and a fast single-threaded torch."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: runs here and in processes of their own agree to the bit
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are tested as modules

MARKS = {
    "slow": "takes long; runs with --all only",
    "gpu": "needs a CUDA device",
    "real_data": "needs the real data sets ($LDM3D_DATA, else ../shared/data)",
    "parity": "compares with another library (MONAI)",
}
DATA = Path(os.environ.get("LDM3D_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    for name, text in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.option.strict_markers = True


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow; runs with --all"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "real_data" in item.keywords and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real data at {DATA}"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """os.fsync does nothing here: no test cuts the power, and thousands of files would each wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def mistake(capsys):
    """mistake(main, flags): the line that a program prints about a mistake of the user, exiting with 2."""
    from ldm3d.engine.distributed import run_script

    def line(main, flags) -> str:
        capsys.readouterr()
        assert run_script(main, [str(flag) for flag in flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return line


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets."""
    return DATA


@pytest.fixture(scope="session")
def heads(tmp_path_factory) -> Path:
    """A folder of twelve 2-D heads of 16 x 20 voxels, the data of tests/tiny.py."""
    from ldm3d.data.phantoms import write_phantoms

    place = tmp_path_factory.mktemp("tiny")
    write_phantoms(place / "heads", 12, dims=2, size=(16, 20), spacing=(12.0, 11.0))
    return place / "heads"


@pytest.fixture(scope="session")
def vae_run(heads) -> Path:
    """The run folder of an autoencoder that has seen the heads for ten steps."""
    import tiny

    import train_vae

    train_vae.main(tiny.vae_flags(heads, heads.parent / "vae", 10))
    return heads.parent / "vae"


@pytest.fixture(scope="session")
def bound_run(vae_run) -> Path:
    """The run folder of a denoiser with registers bound to labels, after twelve steps."""
    import tiny

    import train_ldm

    folder = vae_run.parent / "bound"
    train_ldm.main(tiny.ldm_flags(vae_run, folder, 12, *tiny.BOUND))
    return folder


@pytest.fixture(scope="session")
def conditional_run(tmp_path_factory) -> Path:
    """The run folder of a denoiser with a condition of every kind, after twelve steps.

    Its 2-D heads have two classes, two more columns and some blank cells, and lie beside the run, as does the
    autoencoder, which has learned both contrasts.
    """
    import csv

    import numpy as np
    import tiny

    import train_ldm
    import train_vae
    from ldm3d.data.phantoms import write_phantoms

    place = tmp_path_factory.mktemp("conditional")
    write_phantoms(place / "heads", 12, dims=2, size=(16, 20), spacing=(12.0, 11.0))
    np.savez(place / "heads" / "report.npz", embedding=np.ones((3, 4), np.float32), mask=np.array([1, 1, 0]))
    table = place / "heads" / "cases.csv"
    rows = list(csv.DictReader(table.open()))
    for i, row in enumerate(rows):
        row["age"] = "" if i % 4 == 0 else str(40 + i)
        row["text"] = "" if i % 5 == 0 else row["text"]
        row["report"], row["class"] = "report.npz", str(i % 2)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train_vae.main(tiny.vae_flags(place / "heads", place / "vae", 10, "--data.learn_sources"))
    train_ldm.main(tiny.ldm_flags(place / "vae", place / "ldm", 12, *tiny.EVERY_CONDITION))
    return place / "ldm"


@pytest.fixture(scope="session")
def cdal_run(heads) -> Path:
    """The run folder of a segmentation network, after sixty steps."""
    import tiny

    import train_cdal

    train_cdal.main(tiny.cdal_flags(heads, heads.parent / "cdal", 60))
    return heads.parent / "cdal"
