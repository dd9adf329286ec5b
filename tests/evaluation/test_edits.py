"""Seams and stray changes of edits are measured as they were made."""

import json

import numpy as np
import pytest

from ldm3d import InputError
from ldm3d.data import Volume, write
from ldm3d.evaluation.__main__ import main
from ldm3d.evaluation.edits import edit_figures, steps_at_border


def box(size=(12, 10, 8)):
    region = np.zeros(size, dtype=bool)
    region[3:8, 3:7, 2:6] = True
    return region


def image(seed=0, size=(12, 10, 8)):
    return np.random.default_rng(seed).standard_normal((1, *size)).astype(np.float32).cumsum(1)


def test_steps_at_the_border_are_those_between_neighbours_on_both_sides():
    x, region, steps = image(), box(), []
    for place in np.argwhere(region):
        for axis in range(3):
            for side in (-1, 1):
                other = place.copy()
                other[axis] += side
                if not region[tuple(other)]:
                    steps.append(abs(float(x[(0, *place)] - x[(0, *other)])))
    across, beside = steps_at_border(x, region)
    assert np.allclose(np.sort(across), np.sort(steps), atol=1e-5)
    assert len(beside) == 2 * len(across)  # a box has two next pairs for each


def test_a_seam_shows_in_the_steps_and_a_faithful_edit_has_none():
    x, region = image(), box()
    same = edit_figures(x, x, region)
    assert same["seam"] == same["seam_real"]
    assert (same["seam_distance"], same["outside_max"], same["inside"]) == (0, 0, 0)
    low, high = np.percentile(x, [0.5, 99.5])
    raised = edit_figures(np.where(region, x + 5 * (high - low), x), x, region)
    assert raised["inside"] == pytest.approx(5, rel=1e-4)
    assert raised["seam"] == pytest.approx(5, rel=0.2)
    assert raised["seam_contrast"] > 10 * raised["contrast_real"]
    assert raised["seam_distance"] == 1
    assert (raised["outside_max"], raised["share_inside"]) == (0, 1)


def test_a_change_outside_is_told():
    x, region = image(), box()
    edited = x.copy()
    edited[0, 0, 0, 0] += 3
    found = edit_figures(edited, x, region)
    assert found["outside_max"] == pytest.approx(3, rel=1e-5)
    assert found["share_inside"] == 0


def test_the_command_reads_what_sample_py_has_written_and_refuses_what_it_lacks(tmp_path):
    x, region, folder = image(), box(), tmp_path / "samples-001"
    write(tmp_path / "image.nii.gz", Volume(x, np.eye(4)))
    write(tmp_path / "region.nii.gz", Volume(region[None].astype(np.uint8), np.eye(4)))
    for i in range(2):
        write(folder / f"sample_000{i}.nii.gz", Volume(np.where(region, x + i, x), np.eye(4)))
    told = {"inpaint": str(tmp_path / "image.nii.gz"), "region": str(tmp_path / "region.nii.gz")}
    (folder / "samples.json").write_text(json.dumps(told))
    main(["edits", str(folder), "--resamples", "5", "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"]["inside"]["max"] > report["metrics"]["inside"]["min"] == 0
    assert report["metrics"]["outside_max"]["max"] == 0
    for stored, words in (
        ({"edit": told["inpaint"]}, "region: give the mask of what should change"),
        ({}, "its samples are no edits"),
        ({**told, "region": "nowhere.nii.gz"}, "region: no file nowhere.nii.gz"),
    ):
        (folder / "samples.json").write_text(json.dumps(stored))
        with pytest.raises(InputError, match=words):
            main(["edits", str(folder)])
    with pytest.raises(InputError, match=r"has no samples\.json"):
        main(["edits", str(tmp_path)])
