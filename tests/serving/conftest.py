"""A headless Chromium whose console messages and requests are checked, a static server for it, and Node."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = Path(shutil.which("chromium") or "/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream"),
    "--use-fake-device-for-media-stream",
)
SEEN = (20, 20, 230)  # by the camera: blue
EXPECTED_WARNING = "No available adapters."  # Chromium's answer to a page that looks for WebGPU


def image_bytes(
    image: Image.Image | tuple[int, int, int] = (250, 5, 5),
    kind: str = "JPEG",
    size: tuple[int, int] = (20, 20),
    **options: Any,
) -> bytes:
    """Return the file of an image, or of one in a single colour."""
    buffer = io.BytesIO()
    shown = Image.new("RGB", size, image) if isinstance(image, tuple) else image
    shown.save(buffer, kind, **{"quality": 95, **options})
    return buffer.getvalue()


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def wait_for_lead(page: Any, text: str) -> None:
    """Wait until the headline of a page starts with `text`."""
    page.wait_for_function("(text) => document.getElementById('lead').textContent.startsWith(text)", arg=text)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium whose camera sees `SEEN`, for all pages of a module."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium")
    clip = tmp_path_factory.mktemp("camera") / "clip.mjpeg"
    clip.write_bytes(image_bytes(SEEN, size=(320, 240)) * 30)
    args = [*FLAGS, f"--use-file-for-fake-video-capture={clip}"]
    with playwright.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=args, timeout=120_000)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page, which has no memory of others, and waits for what matches `ready`.

    Errors and warnings in the console, and requests to other servers, fail the test.
    """
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["camera"])

    def open_url(url: str, *, ready: str = "#bundles tr") -> Any:
        page = context.new_page()
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
    context.close()
    assert problems == []


class Node:
    """Runs functions of the scripts in a folder, in Node: what needs no browser is tested where there is none, too."""

    def __init__(self, folder: Path) -> None:
        (folder / "package.json").write_text('{"type": "module"}')
        shutil.copyfile(Path(__file__).with_name("node.mjs"), folder / "node.mjs")
        command = ["node", "node.mjs"]
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def evaluate(self, code: str, argument: object = None) -> Any:
        """Return what the function returns, as Playwright's `page.evaluate`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, "argument": argument}).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer.get("result")


@pytest.fixture(scope="module")
def start_node() -> Iterator[Callable[[Path], Node]]:
    """Return a function that starts Node in a folder of scripts."""
    if shutil.which("node") is None:
        pytest.skip("needs Node")
    started: list[Node] = []

    def start(folder: Path) -> Node:
        started.append(Node(folder))
        return started[-1]

    yield start
    for node in started:
        node.process.communicate()
