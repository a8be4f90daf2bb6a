"""The real server under load: its memory stays what it is."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc"),
]

PARALLEL, SEQUENTIAL, WARM_UP = 200, 10_000, 1_000
ALLOWED_MB = 8  # fragments of what is freed again; one picture kept of each request would be 30


class Server(NamedTuple):
    address: str
    process: subprocess.Popen[str]

    def memory_mb(self) -> float:
        """What of its memory is in RAM."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    def connect(self) -> closing[http.client.HTTPConnection]:
        return closing(http.client.HTTPConnection(self.address, timeout=60))


@pytest.fixture
def server(colour_bundle: Path) -> Iterator[Server]:
    """A page that serves a bundle from a process of its own."""
    command = [sys.executable, "-m", "clip_rd_edge", "demo", str(colour_bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield Server(urllib.parse.urlsplit(process.stdout.readline().strip()).netloc, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def pictures(count: int) -> list[bytes]:
    """Different ones of 32 × 32 pixels, 3 kB each."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    connection.request("POST", path, body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def labels_key(connection: http.client.HTTPConnection, labels: Sequence[str]) -> str:
    return str(ask(connection, "/api/labels", json.dumps(labels).encode())[1]["key"])


def test_ten_thousand_in_sequence(server: Server) -> None:
    sent, before = pictures(50), 0.0
    with server.connect() as connection:
        for number in range(SEQUENTIAL):
            if number % 100 == 0:  # now and then other labels, as somebody types them
                key = labels_key(connection, ["red", "green", f"blue {number}"])
            status, answer = ask(connection, f"/api/classify?labels={key}", sent[number % len(sent)])
            assert (status, len(answer["labels"])) == (200, 3)
            if number == WARM_UP:
                before = server.memory_mb()
    assert server.memory_mb() - before < ALLOWED_MB


def test_two_hundred_at_once_again_and_again(server: Server) -> None:
    sent, memory = pictures(PARALLEL), []
    with server.connect() as connection:
        key = labels_key(connection, ["red", "green"])

    def one(picture: bytes) -> int:
        with server.connect() as connection:
            return ask(connection, f"/api/classify?labels={key}", picture)[0]

    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in range(10):
            codes = set(pool.map(one, sent))
            assert codes <= {200, 429}
            assert 200 in codes
            memory.append(server.memory_mb())
    assert memory[-1] - memory[2] < ALLOWED_MB


def test_a_bundle_that_is_deleted_under_it(server: Server, colour_bundle: Path) -> None:
    (picture,) = pictures(1)
    with server.connect() as connection:
        key = labels_key(connection, ["red", "green"])
        assert ask(connection, f"/api/classify?labels={key}", picture)[0] == 200
        shutil.rmtree(colour_bundle)
        status, answer = ask(connection, f"/api/classify?labels={key}", picture)
    assert (status, answer["error"]) == (410, f"The bundle {colour_bundle} is no longer there.")
    assert server.process.poll() is None
