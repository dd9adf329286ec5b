"""A trained run whose latents are mapped, for the tests of the map, its cache and its page."""

import shutil
from pathlib import Path

import pytest

from ldm3d.reports.__main__ import main as reports_main


@pytest.fixture(scope="session")
def mapped_run(vae_run, tmp_path_factory) -> Path:
    """A copy of the trained run, with a cache of its own."""
    run = tmp_path_factory.mktemp("analysis") / "vae"
    shutil.copytree(vae_run, run)
    return run


@pytest.fixture(scope="session")
def made(mapped_run) -> Path:
    """The folder that `latents` makes of the run's own cases."""
    reports_main(["latents", str(mapped_run)])
    return mapped_run / "analysis-001"
