"""Whatever is sent to `demo` and `serve`, they answer with a status below 500, or close the connection."""

from __future__ import annotations

import base64
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from readers import answer_or_sentence
from support import served

from benchmarks.robustness.hostile_input import CORPUS

pytest.importorskip("starlette")
testclient = pytest.importorskip("starlette.testclient")

FILES = sorted((CORPUS / "requests").iterdir())


@pytest.fixture(params=["demo", "serve"])
def port(request: pytest.FixtureRequest, colour_bundle: Path) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "clip_rd_edge", request.param, colour_bundle, "--port", "0", "--threads", "1"]
    with served(command) as server:
        yield server.port


def first_line(port: int, content: bytes, timeout: float = 5) -> bytes:
    """Send bytes and nothing more; return the first line of the answer.

    Nothing is returned if the connection was closed, or if the server still waits for the rest of the request: how long
    it does has tests of its own.
    """
    with closing(socket.create_connection(("127.0.0.1", port), timeout=timeout)) as connection:
        with suppress(OSError):  # closed before all was sent
            connection.sendall(content.replace(b"{port}", str(port).encode()))
        with suppress(ConnectionError, TimeoutError):
            return connection.recv(1 << 16).partition(b"\r\n")[0]
    return b""


def test_bytes_of_every_kind_get_an_answer(port: int) -> None:
    with ThreadPoolExecutor(len(FILES)) as pool:
        lines = list(pool.map(lambda path: first_line(port, path.read_bytes()), FILES))
    statuses = {path.stem: int(line.split()[1]) for path, line in zip(FILES, lines, strict=True) if line}
    assert {name: status for name, status in statuses.items() if status >= 500} == {}
    assert len(statuses) > len(FILES) / 2
    last = first_line(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n", timeout=60)
    assert last.split()[1] in (b"200", b"404")


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory, fp32_bundle: Path) -> Iterator[list[Any]]:
    """Clients of both applications, which raise what the servers would log."""
    from clip_rd_edge.runtime.load import load
    from clip_rd_edge.serving import demo
    from clip_rd_edge.serving.service import Service, make_app

    service = make_app(Service(load(fp32_bundle, threads=1)))
    page = demo.make_app(demo.Demo([fp32_bundle], threads=1))
    with (
        testclient.TestClient(service, base_url="http://127.0.0.1:8766") as first,
        testclient.TestClient(page, base_url="http://127.0.0.1:8765") as second,
    ):
        yield [first, second]


PATHS = (
    "/", "/embeddings", "/embedding", "/v1/embeddings", "/classify", "/search", "/v1/models", "/props", "/health",
    "/metrics", "/openapi.json", "/api/bundles", "/api/labels", "/api/classify", "/index.html", "/../x", "/%00", "/%ff",
    "/search?q=%ff&top=-1", "/search?q=red&top=1e9", "/thumbnail/0-", "/thumbnail/%00", "/docs", "/classify?top=x",
    "/api/classify?bundle=²", "/api/classify?labels=%ff&bundle=-1", "//", "/%2e%2e/%2e%2e/etc/passwd",
)  # fmt: skip
ODD = [b"[" * 100_000, b'{"other":' * 50_000, b'{"input": "\xff"}', b'["\xff"]', b'["\\ud800"]']
IMAGE = base64.b64encode((CORPUS / "images" / "orientation.jpg").read_bytes()).decode()


def bodies() -> Any:
    """JSON bodies in about the form that the servers take, and any bytes."""
    from hypothesis import strategies as st

    scalars: Any = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    scalars |= st.sampled_from(
        [IMAGE, f"data:image/jpeg;base64,{IMAGE}", "<__media__>", "float", "base64", "red", "\ud800", -1, 0]
    )
    keys = st.sampled_from([
        "content", "input", "prompt_string", "multimodal_data", "encoding_format", "dimensions", "image", "labels",
        "top", "none", "refuse_known", "multi", "raw", "all", "query", "other",
    ])  # fmt: skip
    values = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
    )
    written = values.map(lambda value: json.dumps(value).encode())
    odd = [*ODD, b'["\xed\xa0\x80"]', b"\xef\xbb\xbf[]", b'{"top": 1e999}', b"9" * 10_000, b""]
    odd += [b"--x", b"--x--", b"--x\r\n" * 9, b'--x\r\nA: ; name="image"\r\n\r\n\xff\r\n--x--', b"\r\n--x" * 99_999]
    return written | st.binary(max_size=200) | st.sampled_from(odd)


def test_any_request_gets_an_answer_below_500(apps: list[Any]) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    names = st.sampled_from(
        ["host", "origin", "content-type", "content-length", "authorization", "x-odd", "expect", "range"]
    )
    header_values = st.sampled_from([
        "multipart/form-data; boundary=x", "image/png",
        "127.0.0.1:8765", "[::1", "localhost", "evil.example", "-1", "9" * 30, "Bearer x", "bytes=5-1",
        "bytes=0-99999999999", "100-continue", "²", "http://127.0.0.1:8765", "",
    ])  # fmt: skip

    @hypothesis.given(
        st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]),
        st.sampled_from(PATHS),
        bodies(),
        st.dictionaries(names, header_values, max_size=2),
    )
    def check(method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        raw = {name: value.encode() for name, value in headers.items()}
        for client in apps:
            response = answer_or_sentence(
                lambda client=client: client.request(method, path, content=body, headers=raw)  # type: ignore[misc]
            )
            assert response.status_code < 500, response.text

    check()
