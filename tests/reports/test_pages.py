"""A page holds all that it shows, exactly, and can ask the network for nothing."""

import io
import json
import re

import numpy as np
import pytest

from ldm3d.config import InputError
from ldm3d.reports import pages, pictures


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (33, 20, 3)])
def test_a_png_decodes_to_the_pixels_that_were_written(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with image.open(io.BytesIO(pictures.png(pixels))) as opened:
        assert opened.mode == ("L" if len(shape) == 2 else "RGB")
        assert np.array_equal(np.asarray(opened), pixels)


def test_grey_values_run_from_limit_to_limit_and_what_is_not_finite_is_black():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, np.nan, np.inf])
    assert pictures.grey(values, (-1, 1)).tolist() == [0, 0, 128, 255, 255, 0, 0]
    ramp = np.linspace(0, 1, 1001)  # by default from the percentile 0.5 to 99.5
    assert pictures.grey(ramp).tolist() == np.rint(255 * ((ramp - 0.005) / 0.99).clip(0, 1)).tolist()
    assert pictures.grey(ramp)[500] == 128
    assert np.ptp(pictures.grey(ramp)) == 255
    assert pictures.grey(np.full(4, np.nan)).tolist() == [0, 0, 0, 0]


def test_slices_have_the_sides_of_the_body_and_not_of_the_voxel_grid():
    volume = np.zeros((20, 30, 5))
    picture = pictures.slices_picture(volume, (1.0, 1.0, 4.0))
    assert picture.shape == (30, 30 + 2 + 20 + 2 + 20 + 2)  # sagittal, coronal, axial, a column after each
    large = pictures.slices_picture(np.zeros((200, 300, 50)), (1.0, 1.0, 4.0), widest=350)
    assert large.shape == (150, 150 + 100 + 100 + 6)


def test_no_text_of_the_data_can_end_the_script_or_ask_for_anything():
    data = {"name": "</script><img src=http://example.org/x.png><!--<script>", "number": 0.5}
    text = pages.page("<b>", "<p>", "run_report", data)
    assert text.count("</script>") == text.count("<script>") == 2
    assert "<!--" not in text
    stored = re.search(r"const DATA = (.*);\n", text)[1]
    assert json.loads(stored) == data
    assert "<title>&lt;b&gt;</title>" in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_only_a_page_of_ours_is_written_over(tmp_path):
    path = tmp_path / "new" / "page.html"
    pages.write_page(path, pages.page("a", "", "run_report", {}))
    pages.write_page(path, pages.page("b", "", "run_report", {}))
    assert "<title>b</title>" in path.read_text()
    other = tmp_path / "thesis.html"
    other.write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.html"):
        pages.write_page(other, pages.page("b", "", "run_report", {}))
    assert other.read_text() == "precious"
