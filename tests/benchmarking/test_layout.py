"""The HTML report in headless Chromium: what a screen and a sheet of paper show of its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.report import page as report
from clip_rd_edge.benchmarking.results import Results

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
PAPER_WIDTH = 718  # of A4 between margins of 1 cm, in CSS pixels
EDGES = """() => [...document.querySelectorAll(".models th[scope=row]")].map((name) => {
    const scroll = name.closest(".scroll");
    scroll.scrollLeft = 120;
    const text = document.createRange();
    text.selectNodeContents(name);
    const { left, right } = name.getBoundingClientRect();
    return [left - scroll.getBoundingClientRect().left, right - text.getBoundingClientRect().right];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, results: Results) -> Iterator[Any]:
    """The report of ten models with long names, all of it unfolded."""
    second = (replace(row, label=f"ResNet-10-T, seed 2, {row.label}") for row in results.rows)
    page = browser.new_page()
    page.set_content(report(replace(results, rows=(*results.rows, *second))))
    page.evaluate("document.querySelector('details').open = true")
    yield page
    page.close()


def test_tables_of_ten_models_fit_on_paper(page: Any) -> None:
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == PAPER_WIDTH
    heads = page.locator("tr:has(> th[scope=rowgroup])")
    assert set(heads.evaluate_all("rows => rows.map((row) => getComputedStyle(row).breakAfter)")) == {"avoid"}


@pytest.mark.parametrize("width", [360, 1280])
def test_the_names_of_figures_stay_beside_them(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for offset, gap in page.evaluate(EDGES):
        assert offset == pytest.approx(0, abs=0.5)
        assert gap >= 8  # what scrolls below a name is not seen against it
