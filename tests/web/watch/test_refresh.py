"""The page of a run in headless Chromium, while its server answers, fails, and is gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.web.app import PAGE
from clip_rd_edge.web.watch.page import FOLDER, render
from clip_rd_edge.web.watch.state import Answers, read_run

pytestmark = pytest.mark.browser
REFRESH = "document.dispatchEvent(new Event('visibilitychange'))"
PROBLEM = "<!doctype html><title>clip-rd-edge watch</title><main><p>The run first does not exist.</p></main>"


@pytest.fixture
def site(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The page and its files, as they are served."""
    site = tmp_path / "site"
    site.mkdir()
    for file in (FOLDER / "style.css", FOLDER / "watch.js", PAGE / "icon.svg"):
        shutil.copy(file, site)
    (site / "index.html").write_text(render(read_run(make_run(tmp_path / "first")), Answers(), served=True))
    return site


def test_a_page_that_is_no_longer_updated_says_so_above_its_figures(
    open_page: Callable[..., Any], serve: Callable[[Path], str], site: Path
) -> None:
    url = serve(site)
    page = open_page(url, ready="progress")
    title = page.title()
    assert not page.is_visible("#lost")

    def lost(answer: Callable[[Any], None]) -> str:
        page.route(url, answer)
        page.evaluate(REFRESH)
        page.wait_for_function("() => document.getElementById('lost').textContent")
        assert page.title() == f"lost, {title}"
        text = str(page.inner_text("#lost"))
        assert page.locator("#lost").bounding_box()["y"] < page.locator("progress").bounding_box()["y"]
        page.unroute(url)
        page.evaluate(REFRESH)
        page.wait_for_function("() => !document.getElementById('lost').textContent")
        assert page.title() == title
        return text

    assert lost(lambda route: route.abort()).startswith("clip-rd-edge watch does not answer any more; start it again")
    failed = lost(lambda route: route.fulfill(status=500, content_type="text/html", body=PROBLEM))
    assert failed.startswith("The run first does not exist. This page is as of ")
    assert "again" not in failed  # which fails
    other = lost(lambda route: route.fulfill(status=200, content_type="text/html", body="<title>Sign in</title>"))
    assert other.startswith("Another page answers in place of clip-rd-edge watch. Reload this page.")
    page.evaluate("""() => {
        const [wait, send] = [AbortSignal.timeout, window.fetch];
        AbortSignal.timeout = () => wait.call(AbortSignal, 500);
        [window.pending, window.mostPending] = [0, 0];
        window.fetch = (...request) => {
            window.mostPending = Math.max(window.mostPending, ++window.pending);
            return send(...request).finally(() => window.pending--);
        };
    }""")
    hung = lost(lambda route: page.evaluate(REFRESH))  # while one waits for its answer, no other is sent
    assert hung.startswith("clip-rd-edge watch does not answer any more")
    assert page.evaluate("window.mostPending") == 1
    assert all("Failed to load" in text for text in page.problems)
    page.problems.clear()
    (site / "index.html").write_text(
        (site / "index.html").read_text().replace("20 of 50", "30 of 50").replace(">first<", ">second<")
    )
    page.evaluate(REFRESH)
    page.wait_for_function("() => document.querySelector('.lead').textContent.startsWith('30 of 50')")
    assert page.inner_text("h1") == "second"  # another run is watched at the same address
    page.context.close()
