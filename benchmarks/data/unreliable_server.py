"""A web server that is slow and fails, for tests and measurements: it serves a folder, or passes requests on.

with UnreliableServer(Path("shards"), latency_s=0.02, failing_share=0.01).running() as server:   # server.url
with UnreliableServer(target="127.0.0.1:5000").running() as server:   # before an S3 server
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CUT, DOWN, STALL = "cut", "503", "stall"
_HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: UnreliableServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        time.sleep(self.server.latency_s)
        fault = self.server.next_fault()
        if fault.isdecimal():
            self._answer(int(fault), {}, b"")
        elif self.server.target:
            self._pass_on(fault)
        else:
            self._serve(fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _serve(self, fault: str) -> None:
        path = Path(self.server.folder, self.path.partition("?")[0].lstrip("/"))
        if not path.is_file():
            self._answer(404, {}, b"")
            return
        content, status, headers = path.read_bytes(), 200, {self.server.version_header: f'"{path.stat().st_mtime_ns}"'}
        if not self.server.ignores_ranges:
            headers["Accept-Ranges"] = "bytes"
            if span := self.headers.get("Range"):
                first, last = span.removeprefix("bytes=").split("-")
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[int(first) : int(last) + 1], 206
        self._answer(status, headers, content, fault)

    def _pass_on(self, fault: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS}
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(response.status, headers, response.read(), fault, length=length)
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, fault: str = "", *, length: str | None = None
    ) -> None:
        if fault == STALL and self.command == "HEAD":
            self._stall()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == CUT:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == STALL:
            self.wfile.write(content[: len(content) // 2])
            self._stall()
            return
        self.wfile.write(content)

    def _stall(self) -> None:
        """Keep the connection open and say nothing."""
        self.server.stopping.wait()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class UnreliableServer(ThreadingHTTPServer):
    """Serves files and parts of them, or passes requests on to another server.

    Attributes:
        latency_s: before each answer.
        failing_share: share of requests that fail at random, with 503 or with half of the answer.
        fail: how the next requests go wrong: a status, `cut`, `stall` or nothing; an answer that stalls stops
            half-way, and its connection stays open.
        stopping: set when the server is, which ends connections that stall.
        down_until: time by `time.monotonic` until which every request is answered with 503.
        requests: paths of all requests so far.
    """

    daemon_threads = True
    ignores_ranges = False
    version_header = "ETag"

    def __init__(
        self, folder: Path = Path(), *, target: str = "", latency_s: float = 0.0, failing_share: float = 0.0
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.target, self.latency_s, self.failing_share = folder, target, latency_s, failing_share
        self.fail, self.requests, self.down_until, self.failed = list[str](), list[str](), 0.0, 0
        self.stopping = threading.Event()
        self._random, self._lock = random.Random(0), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_fault(self) -> str:
        """Return how the next request goes wrong."""
        with self._lock:
            fault = self.fail.pop(0) if self.fail else ""
            if time.monotonic() < self.down_until:
                fault = DOWN
            elif not fault and self._random.random() < self.failing_share:
                fault = self._random.choice((CUT, DOWN))
            self.failed += bool(fault)
            return fault

    @contextmanager
    def running(self) -> Iterator[UnreliableServer]:
        """Serve requests within the block."""
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            self.shutdown()
            self.server_close()
