"""Load tests of the demo's server: its memory must not grow."""

from __future__ import annotations

import http.client
import io
import json
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the memory usage"),
]

PARALLEL, SEQUENTIAL, WARM_UP = 200, 10_000, 1_000
MAX_GROWTH_MB = 8  # allows for fragmentation; keeping one image per request would cost 30 MB


class Server(NamedTuple):
    address: str
    process: subprocess.Popen[str]

    def memory_mb(self) -> float:
        """Return its resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    def connect(self) -> closing[http.client.HTTPConnection]:
        return closing(http.client.HTTPConnection(self.address, timeout=60))


@pytest.fixture
def server(colour_bundle: Path) -> Iterator[Server]:
    """A demo of one bundle in a separate process."""
    command = [sys.executable, "-m", "clip_rd_edge", "demo", str(colour_bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield Server(urllib.parse.urlsplit(process.stdout.readline().strip()).netloc, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def make_images(count: int) -> list[bytes]:
    """Return different PNGs of 32 × 32 pixels, 3 kB each."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    connection.request("POST", path, body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def labels_key(connection: http.client.HTTPConnection, labels: Sequence[str]) -> str:
    return str(post(connection, "/api/labels", json.dumps(labels).encode())[1]["key"])


def test_ten_thousand_sequential_requests(server: Server) -> None:
    images, before = make_images(50), 0.0
    with server.connect() as connection:
        for number in range(SEQUENTIAL):
            if number % 100 == 0:  # change the labels now and then, as a user would
                key = labels_key(connection, ["red", "green", f"blue {number}"])
            status, result = post(connection, f"/api/classify?labels={key}", images[number % len(images)])
            assert (status, len(result["labels"])) == (200, 3)
            if number == WARM_UP:
                before = server.memory_mb()
    assert server.memory_mb() - before < MAX_GROWTH_MB
