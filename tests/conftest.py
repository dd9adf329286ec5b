"""pytest's settings: marks, --all, where the real data lies, and a fast single-threaded torch."""

import os
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets."""
    return DATA
