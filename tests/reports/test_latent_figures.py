"""Colours tell labels apart, and the page shows every case where the table has it."""

import numpy as np
import pytest
from browser import Browser
from tiny import read_csv

from ldm3d.reports.latent_figures import palette


def test_colours_are_distinct_and_numbers_sort_as_numbers():
    many = palette([f"s{i}" for i in range(60)])
    assert len(set(many.values())) == 60
    assert list(many)[:3] == ["s0", "s1", "s2"]
    assert list(palette(["b", "", "a"])) == ["a", "b", ""]


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(made, tmp_path_factory):
    pytest.importorskip("plotly")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.requests()
        browser.open(made / "latents.html")
        browser.wait("document.querySelectorAll('#map .point').length === 12")
        yield browser


def points(browser: Browser) -> dict[str, list[float]]:
    """Case -> its place in the window."""
    script = """const found = {};
        for (const p of document.querySelectorAll('#map .point')) {
          const b = p.getBoundingClientRect();
          found[p.__data__.tx] = [b.x + b.width / 2, b.y + b.height / 2]; }
        return found;"""
    return browser.run(script)


def assert_where_the_table_has_them(found: dict[str, list[float]], rows: list[dict[str, str]]) -> None:
    assert sorted(found) == sorted(row["case"] for row in rows)
    for axis, column in enumerate("xy"):
        screen = [found[row["case"]][axis] for row in rows]
        table = [float(row[column]) for row in rows]
        assert abs(np.corrcoef(screen, table)[0, 1]) > 0.9999


def test_the_page_shows_every_case_where_the_table_has_it(browser, made):
    assert_where_the_table_has_them(points(browser), read_csv(made / "cases.csv"))


def test_hover_shows_the_slices_and_a_click_keeps_them(browser, made):
    places = points(browser)
    gaps = {
        name: sorted(np.hypot(*np.subtract(place, p)) for p in places.values())[1]
        for name, place in places.items()
    }
    first, second = sorted(gaps, key=gaps.get)[-2:]  # no other point lies on them

    def card(selector: str, name: str) -> list:
        """What a card shows, as soon as it is that of the case."""
        found = f"document.querySelector('{selector}')"
        browser.wait(
            f"{found} && {found}.innerText.includes('{name}') && {found}.querySelector('img').complete"
        )
        image = f"{found}.querySelector('img')"
        return browser.run(
            f"return [{found}.innerText, {image}.src, {image}.naturalWidth, {image}.naturalHeight]"
        )

    def click(name: str) -> None:
        browser.point(*places[name])
        card("#hover", name)  # what is clicked is what the mouse is known to be over
        browser.point(*places[name], press=True)

    browser.point(*places[first])
    text, source, wide, high = card("#hover", first)
    assert "split" in text
    assert source.startswith("data:image/png")
    assert (wide, high) == (20 + 2, 17)  # 16 rows of 12 mm are 17 of 11 mm; a column after each slice
    click(second)
    click(first)
    assert card("#kept .card", first)[1] == source  # the newest first
    card("#kept .card:nth-child(2)", second)
    click(first)  # no second time
    assert browser.run("return document.querySelectorAll('#kept .card').length") == 2
    browser.click("#kept .card .close")
    assert browser.run("return document.querySelectorAll('#kept .card').length") == 1


def test_other_columns_colour_the_same_points(browser, made):
    columns = browser.run("return [...document.getElementById('column').options].map(o => o.value)")
    assert columns == ["split", "subject"]  # all heads are of one class
    names = "return [...document.querySelectorAll('#map .legendtext')].map(t => t.textContent)"
    assert browser.run(names) == ["train", "val"]
    browser.run("const c = document.getElementById('column'); c.value = 'subject'; c.onchange()")
    browser.wait("document.querySelector('#map .legendtext').textContent === 'phantom_0000'")
    assert_where_the_table_has_them(points(browser), read_csv(made / "cases.csv"))


def test_the_page_asks_the_network_for_nothing_and_offers_no_way_to(browser, made):
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [(made / "latents.html").as_uri()]
    assert browser.complaints() == []
    buttons = browser.run("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert len(buttons) == 6
    assert not any("loud" in title or "share" in title.lower() for title in buttons)
