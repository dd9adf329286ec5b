"""`python -m ldm3d.reports` names every mistake in one line, and runs as a module."""

import runpy
import sys

import pytest

from ldm3d.reports.__main__ import main as reports_main


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "which task"),
        (["latent", "RUN"], "expected run or latents or registers"),
        (["run"], "which run"),
        (["run", "/nowhere"], "/nowhere"),
        (["run", "EMPTY"], "config.json"),
        (["run", "RUN", "--volumes", "-1"], "volumes"),
        (["run", "RUN", "--samples", "EMPTY"], "holds no volumes"),
        (["run", "RUN", "--samples", "/nowhere"], "/nowhere"),
        (["run", "RUN", "--out", "RUN/config.json"], "nothing is overwritten"),
        (["run", "RUN", "--volume", "3"], "did you mean --volumes"),
        (["latents", "/nowhere"], "/nowhere"),
        (["latents", "RUN", "--data", "/nowhere"], "/nowhere"),
        (["latents", "RUN", "--colour-by", "class"], "did you mean --color_by"),
        (["latents", "RUN", "--color-by", "age"], "subject | class | split"),
        (["latents", "RUN", "--data", "HEADS/images", "--color-by", "class"], "no case has a class"),
        (["latents", "RUN", "--max_cases", "2"], "max_cases"),
        (["latents", "RUN", "--out", "HEADS"], "nothing is overwritten"),
        (["registers", "RUN"], "RUN"),
        (["registers", "BOUND", "--level", "1"], "level"),
        (["registers", "BOUND", "--part", "test"], "no test cases"),
    ],
)
def test_mistakes_are_named(vae_run, bound_run, heads, tmp_path, mistake, words, named):
    folders = {"RUN": vae_run, "BOUND": bound_run, "HEADS": heads, "EMPTY": tmp_path}
    for name, folder in folders.items():
        words = [word.replace(name, str(folder)) for word in words]
        named = named.replace(name, str(folder))
    error = mistake(reports_main, words)
    assert named in error


def test_the_command_runs_as_a_module(vae_run, tmp_path, monkeypatch):
    words = ["reports", "run", str(vae_run), "--out", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "ldm3d.reports.__main__")  # as in a new process
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ldm3d.reports", run_name="__main__")
    assert end.value.code == 0
    assert "Autoencoder, preset phantom" in (tmp_path / "page.html").read_text()
