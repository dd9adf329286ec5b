"""Two folders of cases: one for all tests, and a fresh one for a test that spoils files."""

import pytest
from folders import ROLES, image, make_folder, mask, save

from ldm3d.data import DataConfig


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Six cases of slightly different shapes with masks and sources; not to be changed."""
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(root, tmp_path):
    """The settings of `root`."""
    return DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), subject=r"case_(\d)", **ROLES)


@pytest.fixture
def fresh(tmp_path):
    """Four cases a, b, c, d with masks, which a test may spoil."""
    for name in "abcd":
        save(tmp_path / f"data/images/{name}.nii.gz", image(seed=ord(name)))
        save(tmp_path / f"data/labels/{name}.nii.gz", mask())
    return tmp_path / "data"
