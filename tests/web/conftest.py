"""A headless Chromium whose console messages and requests are checked, and a static server for it."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream"),
    "--use-fake-device-for-media-stream",
)
EXPECTED_WARNING = "No available adapters."  # Chromium's answer to a page that looks for WebGPU


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves a folder, optionally with extra headers, and returns the URL."""

    def start(folder: Path, headers: Mapping[str, str] | None = None) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def end_headers(self) -> None:
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                super().end_headers()

        handler = functools.partial(Handler, directory=str(folder))
        server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    with contextlib.ExitStack() as stack:
        yield start


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page whose camera plays a clip, and waits for what matches `ready`.

    Errors and warnings in the console, and requests to other servers, fail the test.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium")
    problems: list[str] = []
    with playwright.sync_playwright() as play:

        def open_url(url: str, *, camera: Path | None = None, ready: str = "#bundles tr") -> Any:
            camera_flags = [f"--use-file-for-fake-video-capture={camera}"] if camera else []
            context = play.chromium.launch_persistent_context(
                tmp_path / "profile",
                executable_path=CHROMIUM,
                args=[*FLAGS, *camera_flags],
                viewport={"width": 1280, "height": 800},
                timeout=120_000,
            )
            page = context.pages[0]
            page.set_default_timeout(120_000)

            def on_console(message: Any) -> None:
                if message.type in ("error", "warning") and message.text != EXPECTED_WARNING:
                    problems.append(message.text)

            page.on("console", on_console)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: request.url.startswith((url, "blob:")) or problems.append(request.url))
            page.goto(url)
            page.wait_for_selector(ready)
            page.problems = problems
            return page

        yield open_url
    assert problems == []
