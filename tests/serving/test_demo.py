from __future__ import annotations

import asyncio
import functools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from starlette import testclient
from support import patient_server, rewrite, served

import clip_rd_edge as edge
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.serving import demo as app
from clip_rd_edge.serving import guard, protocol, server
from clip_rd_edge.serving.protocol import PageLabels

from .conftest import image_bytes

LABELS = ["red", "green", "blue"]
png = functools.partial(image_bytes, kind="PNG")


@pytest.fixture
def client(colour_bundle: Path, tmp_path: Path) -> Iterator[Any]:
    """A client of a demo with two bundles."""
    shutil.copytree(colour_bundle, tmp_path / "second")
    demo = app.Demo([colour_bundle, tmp_path / "second"], threads=1)
    with testclient.TestClient(app.make_app(demo), base_url="http://127.0.0.1:8765") as client:
        client.demo = demo
        yield client


@pytest.fixture
def key(client: Any) -> str:
    return str(client.post("/api/labels", json=LABELS).json()["key"])


def test_the_page_loads_nothing_from_other_servers(client: Any) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in app.PAGE.iterdir():
        response = client.get(f"/{file.name}")
        assert response.status_code == 200
        assert "http://" not in response.text.replace("http://www.w3.org/", "")
        assert "https://" not in response.text
    assert client.get("/../app.py").status_code == 404
    assert client.get("/api/bundles").json()["bundles"][1]["folder"] == "second"


def test_invalid_requests_get_an_error_message(client: Any, key: str) -> None:
    for path, body, status, message in (
        (f"classify?labels={key}", b"not an image", 400, "Cannot read the image that was sent"),
        ("classify?labels=other", png(), 409, "send them again"),
        ("classify", png(), 410, "No labels were given"),
        ("classify?bundle=7", png(), 410, "There is no bundle '7'"),
        ("labels", b"{", 422, "The request is not valid JSON"),
        ("labels", b"[]", 422, "There are 0 labels"),
        ("labels", b'["a", 1]', 422, "There are 2 labels; expected"),
        ("labels", json.dumps(["a" * 301]).encode(), 422, "There are 1 labels; expected"),
        ("labels", json.dumps(["a"] * 2001).encode(), 422, "There are 2,001 labels; expected 1 to 2,000"),
        ("labels", json.dumps({"labels": ["a"], "taught": {"a": ["A" * 2_000_001]}}).encode(), 422, "too many"),
        ("labels", json.dumps({"labels": ["a"], "taught": {"a": [""] * 800_000}}).encode(), 422, "too many"),
    ):
        response = client.post(f"/api/{path}", content=body)
        assert response.status_code == status, message
        assert message in response.json()["error"]


def test_embeddings_of_another_model_teach_nothing(client: Any) -> None:
    for embedding, others in product(("", "AAAA", "AAAAAAAA", "AHwAfAB8", "no base64"), ([], ["ADwAPAA8"])):
        labels = {"labels": ["red"], "taught": {"red": [embedding, *others]}}
        key = client.post("/api/labels", json=labels).json()["key"]
        assert client.post(f"/api/classify?labels={key}", content=png()).status_code == 412
        assert client.get(f"/api/taught.npz?labels={key}").status_code == 412
    assert client.get("/api/taught.npz").status_code == 400


def test_large_images_and_bodies_are_refused(client: Any, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert protocol.MAX_PIXELS >= 8160 * 6144  # of a phone with 50 megapixels
    monkeypatch.setattr(protocol, "MAX_PIXELS", 1_000_000)
    response = client.post(f"/api/classify?labels={key}", content=png(size=(1200, 1000)))
    assert (response.status_code, "1200 × 1000 pixels" in response.json()["error"]) == (400, True)
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1_000_000)
    assert client.post("/api/labels", content=b" " * 1_000_001).status_code == 413
    # Without a Content-Length, the bytes are counted on arrival.
    response = client.post("/api/labels", content=iter([b" " * 600_000, b" " * 600_000]))
    assert (response.status_code, response.json()["error"]) == (413, "The request is too large; the limit is 1 MB.")
    assert client.post("/api/labels", json=["still", "works"]).status_code == 200


def test_a_bundle_that_is_deleted_or_exported_again(
    client: Any, key: str, colour_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"/api/classify?labels={key}"
    assert client.post(url, content=png()).status_code == 200
    shutil.rmtree(colour_bundle)
    response = client.post(url, content=png())
    assert response.status_code == 410
    assert response.json()["error"] == f"The bundle {colour_bundle} was removed."
    assert client.post(f"{url}&bundle=1", content=png()).status_code == 200  # the other still works
    assert len(client.get("/api/bundles").json()["bundles"]) == 2
    shutil.copytree(tmp_path / "second", colour_bundle)
    rewrite(colour_bundle)
    assert client.post(url, content=png()).status_code == 200
    (colour_bundle / "manifest.json").write_text("{")
    assert client.post(url, content=png()).status_code == 500
    assert "manifest.json is not valid JSON" in caplog.text  # where the server runs: the page shows no such words


def test_parallel_requests_are_answered_or_rejected(client: Any, key: str) -> None:
    with ThreadPoolExecutor(32) as pool:
        codes = list(
            pool.map(lambda i: client.post(f"/api/classify?labels={key}", content=png()).status_code, range(100))
        )
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 20
    assert client.demo.pending == 0
    assert client.post(f"/api/classify?labels={key}", content=png()).status_code == 200


def test_a_page_of_an_earlier_server_gets_no_answer_of_another_bundle(client: Any, key: str) -> None:
    def status(bundle: int, name: str) -> int:
        query = {"bundle": bundle, "name": name, "labels": key}
        return int(client.post("/api/classify", params=query, content=png()).status_code)

    first, second = (bundle["folder"] for bundle in client.get("/api/bundles").json()["bundles"])
    assert (status(0, first), status(1, second)) == (200, 200)
    assert (status(0, second), status(1, first), status(2, "third")) == (410, 410, 410)


def test_what_the_page_cannot_use_is_refused_at_the_start(colour_bundle: Path, tmp_path: Path) -> None:
    for labels in ([f"thing {number}" for number in range(2_001)], ["red", "r" * 301]):
        with pytest.raises(InputError):
            app.Demo([colour_bundle], labels=labels, threads=1)
    with pytest.raises(InputError):
        app.Demo([tmp_path])
    with server._listen("127.0.0.1", 0) as listener:
        # asyncio sets TCP_NODELAY only for this protocol; without it, every response takes 40 ms longer.
        assert listener.proto == socket.IPPROTO_TCP
        with pytest.raises(UsageError):
            edge.demo(colour_bundle, port=listener.getsockname()[1], ready=pytest.fail)


def test_the_number_of_stored_label_lists_is_limited(client: Any) -> None:
    for i in range(100):
        key = client.post("/api/labels", json=[f"label {i}"]).json()["key"]
        if i > 85:
            client.post(f"/api/classify?labels={key}", content=png())
    assert len(client.demo.label_sets) == 64
    assert len(client.demo.served[0].opened()._classifiers._kept) == 8


def test_it_serves_until_ctrl_c_and_warns_about_an_open_network(colour_bundle: Path) -> None:
    command = [sys.executable, "-m", "clip_rd_edge", "demo", colour_bundle, "--host", "0.0.0.0", "--port", "0"]
    with served(command) as server, urllib.request.urlopen(f"{server.url}api/bundles", timeout=60) as response:
        assert json.load(response)["bundles"][0]["name"] == "colours"
    assert server.returncode in (0, 130)
    assert "Traceback" not in server.log
    assert "Anyone on this network" in server.log


CELL = """
import asyncio, sys
import clip_rd_edge as edge

async def cell():
    edge.demo(sys.argv[1], port=0, ready=lambda url: print(url, flush=True))

try:
    asyncio.new_event_loop().run_until_complete(cell())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_it_serves_in_the_cell_of_a_notebook_until_ctrl_c(colour_bundle: Path) -> None:
    command = [sys.executable, "-c", CELL, str(colour_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            with urllib.request.urlopen(process.stdout.readline().strip()) as response:
                assert response.status == 200
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "interrupted\n"
        finally:
            process.kill()


class Upload:
    """A body that a client sends piece by piece, and what the server answers."""

    def __init__(self, app: Any, path: str = "/api/labels") -> None:
        self.pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        self.task = asyncio.ensure_future(app(scope, self.pieces.get, send))

    async def send(self, content: bytes, *, last: bool = False) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": content, "more_body": not last})
        for _ in range(20):
            await asyncio.sleep(0)

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 20)
        status: int = self.sent[0]["status"]
        return status


def test_bodies_that_are_never_complete_make_room_for_those_that_are(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_BODIES_BYTES", 1_000)
    served = app.make_app(app.Demo([colour_bundle], threads=1))

    async def exchange() -> None:
        slow = [Upload(served) for _ in range(3)]
        for upload in slow:
            await upload.send(b"[" + b" " * 300)
        whole = Upload(served)
        await whole.send(b'["red",' + b" " * 300)
        assert await slow[0].status() == 429  # it began first
        assert not slow[1].task.done()
        await whole.send(b'"blue"]', last=True)
        assert await whole.status() == 200
        await slow[1].send(b'"green"]', last=True)  # slow, but complete in the end
        assert await slow[1].status() == 200
        await slow[2].send(b"x" * 1_000)
        assert await slow[2].status() == 429  # too large for what there is, and none other to give up

    asyncio.run(exchange())


def test_nobody_else_waits_while_labels_are_embedded(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, make = app.ServedBundle(colour_bundle, threads=1), app.ZeroShotClassifier
    began, finish, embedded = threading.Event(), threading.Event(), list[Any]()

    def slow(encoder: Any, labels: Any, **options: Any) -> Any:
        if labels != LABELS:
            embedded.append(labels)
            began.set()
            assert finish.wait(60)
        return make(encoder, labels, **options)

    async def ask() -> None:
        waiting = [asyncio.create_task(bundle.classify(png(), PageLabels(["a", "b"]))) for _ in range(2)]
        await asyncio.to_thread(began.wait, 60)
        assert (await asyncio.wait_for(bundle.classify(png(), PageLabels(LABELS)), 30))["labels"][0] == "red"
        assert bundle.info()["precision"]
        finish.set()
        assert [len(answer["labels"]) for answer in await asyncio.gather(*waiting)] == [2, 2]

    monkeypatch.setattr(app, "ZeroShotClassifier", slow)
    asyncio.run(ask())
    assert embedded == [["a", "b"]]


def require_answers(url: str) -> None:
    for _ in range(3):
        with urllib.request.urlopen(f"{url}api/bundles", timeout=60) as response:
            assert response.status == 200


def test_a_low_limit_of_open_files_keeps_nobody_out(colour_bundle: Path) -> None:
    resource = pytest.importorskip("resource")
    command = patient_server("demo", colour_bundle, "--port", "0", "--threads", "1", connections=256)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (100, 100))
    with served(command, preexec_fn=limit) as server, ExitStack() as held:
        for _ in range(120):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
        require_answers(server.url)
    assert "Traceback" not in server.log


async def send_until_closed(application: Any, parts: Iterable[bytes]) -> tuple[int, bytes]:
    """Send bytes to a server, which ends the connection; return how many it took, and its answers."""
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    config, state = Config(application, ws="none", log_config=None), ServerState()
    connect = functools.partial(server.LimitedProtocol, config=config, server_state=state, app_state={})
    listener = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    reading = asyncio.ensure_future(reader.read())
    sent, answers = 0, b""
    with suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await asyncio.wait_for(writer.drain(), 20)
            await asyncio.sleep(0)
            sent += len(part)
    with suppress(ConnectionError):
        answers = await asyncio.wait_for(reading, 20)
    writer.close()
    listener.close()
    return sent, answers


async def answer_after_the_body(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body, and answers with two bytes."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads no body, as where the token is wrong."""
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"


@pytest.mark.parametrize("application", [answer_after_the_body, refuse])
@pytest.mark.parametrize("field", [b"a: b\r\n", b"x" * 6])
@pytest.mark.parametrize("start", [CHUNKED + b"0\r\n", CHUNKED + b"0\r\n\r\nGET / HTTP/1.1\r\n", CHUNKED + b"2;"])
def test_a_head_or_trailers_without_an_end_are_refused(application: Any, field: bytes, start: bytes) -> None:
    parts = [start, b"a: "] + [field * 10_000] * 200
    assert asyncio.run(send_until_closed(application, parts))[0] < 8_000_000  # what buffers take is less


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 0\r\n"])
def test_any_number_of_requests_before_the_first_answer_is_refused(request_line: bytes) -> None:
    answered = 0

    async def answer_some(scope: Any, receive: Any, send: Any) -> None:
        nonlocal answered
        answered += 1
        headers = [(b"content-length", b"0"), *([(b"connection", b"close")] if answered == 200 else [])]
        await receive()
        await asyncio.sleep(0.001)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    request = request_line + b"Host: a\r\n\r\n"
    asyncio.run(send_until_closed(answer_some, [request * 5_000] * 20))
    assert answered < 200
    last = request_line + b"Host: a\r\nConnection: close\r\n\r\n"
    answered, answers = 0, asyncio.run(send_until_closed(answer_some, [request * 19 + last]))[1]
    assert answers.count(b"200 OK") == 20  # those that are not too many are answered
