"""Take the screenshots docs/demo.png and docs/browser.png. They show latencies, so the machine should be quiet.

python -m benchmarks.pages.screenshots -o docs
"""

from __future__ import annotations

import argparse
import functools
import http.server
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from benchmarks.pages.photographs import unpacked
from clip_rd_edge.api.exporting import everyday
from clip_rd_edge.exporting.layouts.browser import write_browser

CHROMIUM = Path("/usr/bin/chromium")
PACKAGE, PHOTOGRAPH = "scikit-image==0.26.0", "skimage/data/coffee.png"  # CC0, see NOTICE
REPEATS = 30  # the page shows the median of so many latencies


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A static web server without log output."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


class QuietServer(http.server.ThreadingHTTPServer):
    """A web server that says nothing of a page that was closed while it was loading."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


def demo(*arguments: str) -> AbstractContextManager[str]:
    """Run the demo and yield its address."""
    return running("demo", *arguments, "--port", "0", "--threads", "1")


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Run a command of clip-rd-edge that serves, and yield the first line that it prints, its address."""
    command = [sys.executable, "-m", "clip_rd_edge", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@contextmanager
def site(bundle: Path) -> Iterator[str]:
    """Serve the export for the browser and yield its address."""
    with tempfile.TemporaryDirectory() as name:
        write_browser(bundle, Path(name) / "site")
        with served(Path(name) / "site") as address:
            yield address


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the files of a folder and yield the address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with QuietServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def take(url: str, image: Path, path: Path, *, scheme: Literal["light", "dark"]) -> None:
    """Classify the image with each bundle until the latencies are medians, and take a screenshot of the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5, color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("#bundles tr")
        for choice in range(page.locator("#bundles input").count()):
            page.locator("#bundles input").nth(choice).check()
            for _ in range(REPEATS):
                page.set_input_files("#file", [])
                page.set_input_files("#file", image)
                page.wait_for_timeout(400)  # longer than an answer takes: a newer image replaces it
        page.locator("#lead").click()
        page.screenshot(path=path, full_page=True)
        browser.close()
    with Image.open(path) as screenshot:
        screenshot.convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Take both screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        image = unpacked(PACKAGE, Path(name)) / PHOTOGRAPH
        with demo() as url:
            take(url, image, args.output / "demo.png", scheme="light")
        with site(everyday()) as url:
            take(url, image, args.output / "browser.png", scheme="dark")


if __name__ == "__main__":
    main()
