from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette import testclient
from support import PATIENCE_S, another_model, patient_server, rewrite, served, wait_until

import clip_rd_edge as edge
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.index import read_index
from clip_rd_edge.runtime.index_update import update_index
from clip_rd_edge.runtime.load import load
from clip_rd_edge.serving.server import page_files
from clip_rd_edge.serving.service import MAX_REQUESTS, Service, make_app
from clip_rd_edge.serving.shared import Batcher

from .conftest import image_bytes as jpeg
from .conftest import to_base64 as encoded

BASE_URL = "http://127.0.0.1:8766"


@pytest.fixture
def client(colour_bundle: Path, colour_images: Path, tmp_path: Path) -> Iterator[Any]:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, tmp_path / "index")
    app = make_app(Service(encoder, index=tmp_path / "index"))
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        yield client


def post(url: str, payload: object) -> Any:
    with urllib.request.urlopen(url, json.dumps(payload).encode(), timeout=60) as response:
        return json.load(response)


def test_frigates_requests_get_the_bundles_embeddings(client: Any, colour_bundle: Path) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert {"colours", "clip-rd-edge"} <= {model["id"], *model["aliases"]}  # Frigate refuses a name that is not listed
    assert "image" in model["architecture"]["input_modalities"]
    marker = client.get("/props?model=clip-rd-edge").json()["media_marker"]
    content = [
        {"prompt_string": "red"},
        {"prompt_string": f"{marker}\n", "multimodal_data": [encoded(jpeg((5, 5, 250)))]},
        {"prompt_string": f"{marker}\n", "multimodal_data": [encoded(jpeg((5, 250, 5)))]},
    ]
    items = client.post("/embeddings", json={"model": "clip-rd-edge", "content": content}).json()
    encoder = load(colour_bundle)
    images = [Image.open(io.BytesIO(jpeg(colour))).convert("RGB") for colour in ((5, 5, 250), (5, 250, 5))]
    expected = np.concatenate([encoder.encode_texts(["red"]), encoder.encode_images(images)])
    # As Frigate reads them: the mean over the rows of an item.
    rows = np.asarray([np.array(item["embedding"], dtype=np.float32).mean(axis=0) for item in items])
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_openais_form_in_numbers_and_in_base64(client: Any, colour_bundle: Path) -> None:
    texts = ["red", "green blue"]
    image = f"data:image/jpeg;base64,{encoded(jpeg())}"
    answer = client.post("/v1/embeddings", json={"model": "any", "input": [*texts, image]}).json()
    assert (answer["object"], answer["model"]) == ("list", "colours")
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    rows = np.asarray([item["embedding"] for item in answer["data"]], dtype=np.float32)
    np.testing.assert_allclose(rows[:2], load(colour_bundle).encode_texts(texts), atol=1e-6)
    assert rows[2].argmax() == 0
    answer = client.post("/v1/embeddings", json={"input": "red", "encoding_format": "base64"}).json()
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4"), rows[0])


def test_images_are_classified_and_searched_for(client: Any, colour_images: Path) -> None:
    body = {"image": encoded(jpeg()), "labels": ["green", "red", "blue"], "top": 2}
    predictions = client.post("/classify", json=body).json()["predictions"]
    assert [predictions[0]["label"], len(predictions)] == ["red", 2]
    for query in ({"query": "blue"}, {"image": encoded(jpeg((5, 5, 250)))}):
        (hit,) = client.post("/search", json={**query, "top": 1}).json()["hits"]
        assert hit["path"] == str(colour_images / "blue.jpg")
    broken = base64.encodebytes(jpeg()).decode()  # with line breaks, as of the command base64
    assert client.post("/classify", json={**body, "image": f"data:image/jpeg;base64,{broken}"}).status_code == 200
    for path, sent in (
        ("/v1/embeddings", {"input": "data: red", "user": "me"}),
        ("/embeddings", {"input": "a", "id": 1}),
    ):
        assert client.post(path, json=sent).status_code == 200  # other servers ignore further fields, too
    (model,) = client.get("/v1/models").json()["data"]
    for name in (model["id"], *model["aliases"]):
        assert client.get(f"/v1/models/{name}").json() == model


def test_nobody_else_waits_while_labels_are_embedded(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(colour_bundle)
    began, goes_on, batches = threading.Event(), threading.Event(), list[np.ndarray]()
    plain, red = encoder.encode_ids, encoder.tokenize(["red"])[0]

    def encode_ids(ids: np.ndarray) -> Any:
        batches.append(ids)
        if len(batches) > 1:  # the first is that of the start
            began.set()
            assert goes_on.wait(PATIENCE_S)
        return plain(ids)

    monkeypatch.setattr(encoder, "encode_ids", encode_ids)
    service = Service(encoder, max_batch=2, max_items=4)
    body = {"image": encoded(jpeg()), "labels": [f"thing {number}" for number in range(40)]}
    with testclient.TestClient(make_app(service), base_url=BASE_URL) as client, ThreadPoolExecutor(3) as pool:
        try:
            same = [pool.submit(client.post, "/classify", json=body) for _ in range(2)]
            assert began.wait(PATIENCE_S)
            other = pool.submit(client.post, "/embeddings", json={"content": ["red"]})
            assert wait_until(lambda: service.pending_items == 3)
        finally:
            goes_on.set()
        assert other.result(PATIENCE_S).status_code == 200
        assert all(len(answer.result(PATIENCE_S).json()["predictions"]) == 5 for answer in same)
    assert [number for number, ids in enumerate(batches) if (ids == red).all(axis=1).any()] == [2]
    assert sum(map(len, batches)) == 1 + 40 + 1  # each label once, although two requests had them


@pytest.mark.parametrize("taught", [False, True])
def test_labels_are_embedded_as_by_the_classifier_whatever_the_batch(
    colour_bundle: Path, tmp_path: Path, taught: bool
) -> None:
    bundle = shutil.copytree(colour_bundle, tmp_path / "bundle")
    templates = ("{}", "a {} thing", "one {c}", "the {}")
    rewrite(bundle, templates=templates)
    names = ["red", "green", "a red thing", "blue", "red", "dark red", "thing", "green and blue"]
    if taught:
        edge.teach(
            bundle, {"blue": [np.full((9, 9, 3), 9 * i + 100, np.uint8) for i in range(3)]}, output=tmp_path / "t"
        )
        bundle = tmp_path / "t"
    expected = edge.ZeroShotClassifier(load(bundle), names, cache=False).classify(Image.open(io.BytesIO(jpeg())), top=9)
    service = Service(load(bundle), max_batch=3)
    with testclient.TestClient(make_app(service), base_url=BASE_URL) as client:
        answer = client.post("/classify", json={"image": encoded(jpeg()), "labels": names, "top": 9})
    assert [tuple(prediction.values()) for prediction in answer.json()["predictions"]] == expected[0]
    assert len(expected[0]) == 7


def test_a_clients_labels_name_no_file_of_the_server(client: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret\n")
    for label in (str(tmp_path / "secret.txt"), "everyday"):
        answer = client.post("/classify", json={"image": encoded(jpeg()), "labels": ["red", label]})
        assert label in [prediction["label"] for prediction in answer.json()["predictions"]]


def test_searches_use_the_index_as_it_was_while_one_that_was_updated_is_read(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, tmp_path / "index")
    service = Service(encoder, index=tmp_path / "index")
    goes_on, reads, read = threading.Event(), list[Path](), read_index

    def read_slowly(path: Path, **options: Any) -> Any:
        reads.append(path)
        assert goes_on.wait(PATIENCE_S)
        return read(path, **options)

    monkeypatch.setattr("clip_rd_edge.serving.shared.read_index", read_slowly)
    monkeypatch.setattr("clip_rd_edge.serving.shared._READING_S", 0.01)
    (colour_images / "blue.jpg").unlink()
    update_index(encoder, colour_images, tmp_path / "index")
    with testclient.TestClient(make_app(service), base_url=BASE_URL) as client, ThreadPoolExecutor(8) as pool:

        def nearest_name(query: str = "blue") -> str:
            return Path(client.post("/search", json={"query": query, "top": 1}).json()["hits"][0]["path"]).name

        try:
            assert set(pool.map(nearest_name, ["blue"] * 8)) == {"blue.jpg"}  # the one that began to read it, too
        finally:
            goes_on.set()
        assert wait_until(lambda: nearest_name() != "blue.jpg")
        assert len(reads) == 1


def test_an_index_that_cannot_be_read_is_an_error_until_it_can(
    colour_bundle: Path, colour_images: Path, tmp_path: Path
) -> None:
    encoder, index = load(colour_bundle), tmp_path / "index"
    update_index(encoder, colour_images, index)
    service = Service(encoder, index=index)
    with testclient.TestClient(make_app(service), base_url=BASE_URL) as client:

        def status() -> int:
            return client.post("/search", json={"query": "blue", "top": 1}).status_code

        (colour_images / "blue.jpg").unlink()
        update_index(encoder, colour_images, index)
        (rows,) = index.glob("embeddings-*.npy")
        rows.rename(tmp_path / "aside")  # as while a copy is under way: index.json does not change any more
        assert wait_until(lambda: status() == 500)
        assert [status() for _ in range(3)] == [500, 500, 500]
        (tmp_path / "aside").rename(rows)
        assert wait_until(lambda: status() == 200)
        shutil.rmtree(index)
        update_index(load(another_model(colour_bundle, tmp_path / "other")), colour_images, index)
        assert status() == 500


def test_what_cannot_be_answered_is_refused_in_one_sentence(client: Any) -> None:
    image = encoded(jpeg())
    for path, body, message in (
        ("/embeddings", b"{", "The request is not valid JSON"),
        ("/embeddings", {"content": [" "]}, "Item 0 is empty"),
        ("/embeddings", {"content": [{"prompt_string": "<__media__>", "multimodal_data": ["?"]}]}, "not base64"),
        ("/embeddings", {"content": ["red"] * 2049}, "1 to 2,048"),
        ("/v1/embeddings", {"input": "red", "dimensions": 2}, "this model has 3"),
        ("/v1/embeddings", {"input": "a" * 100_001}, "more than 100,000"),
        ("/classify", {"image": image}, "No labels were given"),
        ("/classify", {"image": image, "labels": ["red"], "top": 0}, "$.top"),
        ("/classify", {"image": image, "label": ["red"]}, "Did you mean 'labels'?"),
    ):
        response = client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
        assert response.status_code == (422 if "Did you mean" in message else 400), response.text
        error = response.json()["error"]
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"


def test_an_index_whose_files_are_cut_under_the_server_is_still_searched(
    colour_bundle: Path, colour_images: Path, tmp_path: Path
) -> None:
    """As while a backup is copied over it. The server is a process of its own: the system would end this one, too."""
    update_index(load(colour_bundle), colour_images, tmp_path / "index")
    with served(patient_server("serve", colour_bundle, tmp_path / "index", "--port", 0, connections=256)) as server:
        for file in (tmp_path / "index").glob("embeddings-*.npy"):
            os.truncate(file, 0)
        (hit,) = post(f"{server.url}search", {"query": "blue", "top": 1})["hits"]
    assert Path(hit["path"]).name == "blue.jpg"


def test_a_bundle_that_an_update_replaces_is_served_to_the_end(colour_bundle: Path, tmp_path: Path) -> None:
    write_labels(colour_bundle, LabelBank(("red", "blue"), np.asarray([[1, 0, 0], [0, 0, 1]], dtype=np.float32)))
    rewrite(colour_bundle)
    current = tmp_path / "current"
    current.symlink_to(colour_bundle)
    with testclient.TestClient(make_app(Service(load(current))), base_url=BASE_URL) as client:
        current.unlink()
        current.symlink_to(tmp_path)
        shutil.rmtree(colour_bundle)
        answer = client.post("/classify", json={"image": encoded(jpeg())})
        assert [prediction["label"] for prediction in answer.json()["predictions"]] == ["red", "blue"]
        assert client.post("/classify", json={"image": encoded(jpeg()), "labels": ["blue", "red"]}).status_code == 200
        assert client.get("/v1/models").json()["data"][0]["aliases"] == ["clip-rd-edge"]


@pytest.mark.parametrize("token", ["", "  ", "gehéim", "two words", "a\tb"])
def test_a_token_that_no_client_can_send_is_refused(
    token: str, colour_bundle: Path, tmp_path: Path, command_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(token, encoding="utf-8")
    assert command_line("serve", colour_bundle, "--token-file", tmp_path / "token")[0] == 2
    monkeypatch.setenv("CLIP_RD_EDGE_TOKEN", token)
    assert command_line("serve", colour_bundle)[0] == 2
    with pytest.raises(edge.UsageError):
        edge.serve(colour_bundle, port=0, ready=pytest.fail, token=token or " ")


def test_what_no_handler_answers_is_an_error_in_openais_form(client: Any) -> None:
    for path, headers, code, kind in (
        ("/v1/nothing", {}, 404, "not_found_error"),
        ("/v1/%00", {}, 404, "not_found_error"),
        ("/v1/embeddings", {}, 405, "invalid_request_error"),
        ("/v1/models", {"Host": "evil.example"}, 403, "permission_error"),
        ("/v1/embeddings", {"Content-Length": "9" * 12}, 413, "invalid_request_error"),
    ):
        answer = client.get(path, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"], error["param"]) == (code, code, kind, None)
        assert error["message"]
        assert answer.headers.get("Allow") == ("POST" if code == 405 else None)


WRONG = ["", "Bearer", "Bearer ", "Bearer s", "Bearer secre", "Bearer ecret", "Bearer secrets", "Bearer SECRET",
         "Bearer wrong", "Bearer wrong, Bearer secret", "Basic secret", "secret"]  # fmt: skip


def test_only_the_whole_token_opens_any_route_but_health_and_pages(
    colour_bundle: Path, colour_images: Path, tmp_path: Path
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, tmp_path / "index")
    app = make_app(Service(encoder, index=tmp_path / "index"), token="secret")
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        for route in app.routes:
            (method,) = route.methods - {"HEAD"}
            for sent in ({}, *({"Authorization": wrong} for wrong in WRONG)):
                answer = client.request(method, route.path.replace("{name:path}", "colours"), headers=sent)
                is_open = route.path == "/health" or route.path in page_files(search=True)
                expected = (200, None) if is_open else (401, "Bearer")
                assert (answer.status_code, answer.headers.get("WWW-Authenticate")) == expected, (route.path, sent)
        foreign = {"Host": "evil.example", "Origin": "http://evil.example"}  # where a proxy is in front
        assert client.get("/v1/models", headers=foreign).status_code == 401
        assert client.get("/v1/models", headers={**foreign, "Authorization": "bearer secret"}).status_code == 200


PAGES = [
    ("127.0.0.1:8766", "https://site.example", 200),  # nginx's proxy_pass without more
    ("site.example", "https://site.example:8443", 200),  # with proxy_set_header Host $host
    ("site.example:8443", "https://site.example:8443", 200),  # with $http_host
    ("Site.example", None, 200),
    ("127.0.0.1:8766", "http://127.0.0.1:8766", 200),
    ("127.0.0.1:8766", "http://127.0.0.1:3000", 403),  # another program's page: nobody named this address
    ("127.0.0.1:8766", "http://localhost:8766", 403),
    ("127.0.0.1:8766", "https://evil.example", 403),
    ("127.0.0.1:8766", "https://site.example.evil.example", 403),
    ("127.0.0.1:8766", "https://sub.site.example", 403),
    ("127.0.0.1:8766", "null", 403),
    ("127.0.0.1:8766", "", 403),
    ("", "https://evil.example", 403),
    ("", None, 200),  # a probe by HTTP/1.0; every browser sends a Host
    ("evil.example", None, 403),
    ("evil.example", "https://site.example", 403),  # DNS rebinding
    ("evil.example", "https://evil.example", 403),
]


def test_pages_of_a_named_site_reach_the_server_through_its_proxy_and_no_others(colour_bundle: Path) -> None:
    app = make_app(Service(load(colour_bundle)), names=["https://Site.example"])
    forwarded = {"X-Forwarded-Host": "site.example", "Forwarded": "host=site.example"}
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        for host, origin, code in PAGES:
            headers = {"Host": host, **forwarded, **({} if origin is None else {"Origin": origin})}
            answer = client.post("/embeddings", json={"content": "red"}, headers=headers)
            assert answer.status_code == code, (host, origin)


def test_prometheus_reads_what_was_counted_and_the_document_names_every_route(client: Any) -> None:
    client.post("/embeddings", json={"content": ["red", "blue"]})
    client.post("/embeddings", json={})
    text = client.get("/metrics").text
    assert 'clip_rd_edge_requests_total{path="/embeddings",status="200"} 1\n' in text
    assert 'clip_rd_edge_requests_total{path="/embeddings",status="400"} 1\n' in text
    assert 'clip_rd_edge_batch_size_bucket{tower="text",le="2.0"} 1\n' in text
    assert 'clip_rd_edge_request_seconds_count{path="/embeddings"} 2\n' in text
    assert "clip_rd_edge_pending_items 0\n" in text
    document = client.get("/openapi.json").json()
    assert document["components"]["schemas"]["SearchRequest"]["properties"]["top"]["maximum"] == 1000
    routes = {route.path_format for route in client.app.routes}
    pages = set(page_files(search=True))
    more_names = {"/embedding", "/models"}
    assert routes - pages - set(document["paths"]) == {*more_names, "/openapi.json"}
    for path, methods in document["paths"].items():
        for method in methods:
            filled = path.replace("{name}", "clip-rd-edge")
            assert client.request(method, filled, content=b"").status_code in (200, 400, 404)


def test_the_items_of_concurrent_requests_share_batches_and_keep_their_rows() -> None:
    sizes: list[int] = []
    release = threading.Event()

    def encode(items: list[int]) -> np.ndarray:
        release.wait(60)
        return np.asarray(items, dtype=np.float32)[:, None]

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(encode, executor, max_batch=4, on_batch=sizes.append)
            requests = [asyncio.create_task(batcher.embed([i, 10 + i])) for i in range(5)]
            await asyncio.sleep(0.05)
            requests[4].cancel()
            release.set()
            for i, rows in enumerate(await asyncio.gather(*requests[:4])):
                assert rows[:, 0].tolist() == [i, 10 + i]

    asyncio.run(run())
    assert sum(sizes) == 8  # what nobody waits for is not computed
    assert max(sizes) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_beside_one_that_was_given_up_gets_its_answer_or_error(fails: bool) -> None:
    waiting, computing, finishing = threading.Event(), threading.Event(), threading.Event()
    sizes: list[int] = []

    def encode(items: list[int]) -> np.ndarray:
        computing.set()
        finishing.wait(60)
        if fails:
            raise InputError("no such item")
        return np.asarray(items, dtype=np.float32)[:, None]

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(waiting.wait, 60)
            batcher = Batcher(encode, executor, max_batch=4, on_batch=sizes.append)
            given_up, other = (asyncio.create_task(batcher.embed([i])) for i in range(2))
            await asyncio.sleep(0)
            waiting.set()
            await asyncio.to_thread(computing.wait, 60)
            given_up.cancel()
            finishing.set()
            (answer,) = await asyncio.gather(asyncio.wait_for(other, 20), return_exceptions=True)
            assert isinstance(answer, InputError) if fails else answer.tolist() == [[1]]

    asyncio.run(run())
    assert sizes == [2]


def test_more_than_the_limits_is_answered_with_503_and_when_to_try_again(colour_bundle: Path) -> None:
    service = Service(load(colour_bundle), max_items=4)
    with testclient.TestClient(make_app(service), base_url=BASE_URL) as client:
        assert client.post("/embeddings", json={"content": ["red"] * 6}).status_code == 200  # nothing else waits
        service.pending_items = 3
        response = client.post("/embeddings", json={"content": ["red", "blue"]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert client.post("/embeddings", json={"content": ["red"]}).status_code == 200
        body = {"image": encoded(jpeg()), "labels": ["red", "blue"]}
        assert client.post("/classify", json=body).status_code == 503
        service.pending_items, service.active_requests = 0, MAX_REQUESTS
        assert client.post("/embeddings", json={"content": ["red"]}).status_code == 503
        assert client.get("/health").status_code == 200


def test_requests_that_are_never_complete_take_nobodys_turn(colour_bundle: Path) -> None:
    with served(patient_server("serve", colour_bundle, "--port", 0, connections=256)) as server, ExitStack() as held:
        for _ in range(300):  # more than connections, and than requests that are answered at a time
            with suppress(OSError):
                client = held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
                client.sendall(b"POST /embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        for _ in range(20):
            assert len(post(f"{server.url}embeddings", {"content": ["red"]})) == 1


@pytest.mark.parametrize(
    ("path", "content"),
    [("/embeddings", {"content": ["red"] * 50}), ("/classify", {"image": "", "labels": list(map(str, range(50)))})],
)
def test_nothing_more_is_computed_for_a_client_that_has_left(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch, path: str, content: Any
) -> None:
    encoder = load(colour_bundle)
    computing, goes_on, computed = threading.Event(), threading.Event(), list[int]()
    encode = encoder.encode_ids

    def encode_ids(ids: Any) -> Any:
        computed.append(len(ids))
        if len(computed) > 1:  # the first is that of the start
            computing.set()
            assert goes_on.wait(60)
        return encode(ids)

    monkeypatch.setattr(encoder, "encode_ids", encode_ids)
    service = Service(encoder, max_batch=1)
    app, sent = make_app(service), list[Any]()
    body = json.dumps(content).encode()
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1",
             "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "server": ("127.0.0.1", 80),
             "client": ("127.0.0.1", 1), "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip

    async def run() -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            if message := next(messages, None):
                return message
            await asyncio.to_thread(computing.wait, 60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        assert service.pending_items == service.active_requests == 0
        goes_on.set()
        (row,) = await service._texts.embed([encoder.tokenize(["red"])[0]])
        assert row.argmax() == 0

    asyncio.run(run())
    assert computed == [1, 1, 1]  # at the start, the one that had begun, and the one after it
    assert f'requests_total{{path="{path}",status="400"}} 1' in service.metrics.render(pending=0, memory_bytes=0)
    service.close()


@pytest.mark.usefixtures("hang_up")
def test_a_signal_lets_a_request_in_progress_finish(colour_bundle: Path) -> None:
    command = patient_server("serve", colour_bundle, "--port", 0, "--max-batch", 1, connections=256)
    with served(command) as server, ThreadPoolExecutor(1) as clients:

        def in_progress() -> bool:
            with urllib.request.urlopen(f"{server.url}metrics", timeout=60) as response:
                return b"clip_rd_edge_pending_items 2000" in response.read()

        answer = clients.submit(post, f"{server.url}embeddings", {"content": ["red blue"] * 2000})
        assert wait_until(lambda: in_progress() or answer.done(), pause=0)
        server.send_signal(signal.SIGTERM)
        assert len(answer.result(60)) == 2000
        assert server.wait(60) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log


def test_a_bundle_without_a_text_tower_answers_images_and_refuses_texts(colours_without_text: Path) -> None:
    app = make_app(Service(load(colours_without_text)))
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["architecture"]["input_modalities"] == ["image"]
        image = f"data:image/jpeg;base64,{encoded(jpeg())}"
        assert client.post("/v1/embeddings", json={"input": [image]}).json()["data"][0]["embedding"][0] > 0.9
        refused = client.post("/v1/embeddings", json={"input": ["red"]})
        assert (refused.status_code, "has no text tower" in refused.text) == (400, True)
        body = {"image": encoded(jpeg()), "labels": ["blue", "red"]}
        assert client.post("/classify", json=body).json()["predictions"][0]["label"] == "red"
        refused = client.post("/classify", json={**body, "labels": ["cyan"]})
        assert (refused.status_code, "no 'cyan' among its 3 labels" in refused.text) == (400, True)


def test_a_form_and_an_image_alone_are_classified_as_json_is(client: Any) -> None:
    labels, image = ["red", "blue"], jpeg((5, 5, 250))
    expected = client.post("/classify", json={"image": encoded(image), "labels": labels, "top": 1}).json()
    asked = {"labels": labels, "top": "1"}
    answers = [
        client.post("/classify", files={"image": ("photo.jpg", image)}, data=asked),
        client.post("/classify", content=image, params=asked, headers={"Content-Type": "image/jpeg"}),
        # as of curl --data-binary @photo.jpg
        client.post(
            "/classify", content=image, params=asked, headers={"Content-Type": "application/x-www-form-urlencoded"}
        ),
    ]
    assert [answer.json() for answer in answers] == [expected] * 3
    assert expected["predictions"][0]["label"] == "blue"


def test_a_form_that_is_none_is_refused(client: Any) -> None:
    form = "multipart/form-data; boundary=x"
    for content_type, body, status in (
        ("multipart/form-data", b"--x\r\n\r\n\r\n--x--", 400),  # no boundary
        (form, b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nab', 400),
        (form, b"--x\r\n" * 100_000 + b"--x--", 400),
        (form, b'--x\r\nA: ; name="top"\r\n\r\n\xff\r\n--x--', 400),
        (form, b'--x\r\nA: ; name="other"\r\n\r\n1\r\n--x--', 422),
        ("image/jpeg", b"no image", 400),
    ):
        assert client.post("/classify", content=body, headers={"Content-Type": content_type}).status_code == status


def test_search_by_address_finds_what_search_by_json_does(client: Any) -> None:
    expected = client.post("/search", json={"query": "red", "top": 2}).json()
    assert client.get("/search", params={"q": "red", "top": "2"}).json() == expected
    assert len(expected["hits"]) == 2
    by_image = client.post("/search", files={"image": ("photo.jpg", jpeg())}, data={"top": "1"}).json()
    assert Path(by_image["hits"][0]["path"]).name == "red.png"
    assert [client.get("/search", params=wrong).status_code for wrong in ({}, {"q": ""}, {"q": "x", "top": "x"})] == [
        400
    ] * 3
    assert client.get("/search", params={"q": "x", "other": "1"}).status_code == 422


def test_thumbnails_are_of_the_named_folder_alone(colour_bundle: Path, tmp_path: Path) -> None:
    photos, encoder = tmp_path / "photos", load(colour_bundle)
    photos.mkdir()
    Image.new("RGB", (900, 600), "red").save(photos / "red.png")
    Image.new("RGB", (60, 60), "blue").save(photos / "blue.png")
    update_index(encoder, photos, tmp_path / "index")
    with testclient.TestClient(make_app(Service(encoder, index=tmp_path / "index")), base_url=BASE_URL) as client:
        assert "thumbnail" not in client.get("/search?q=red").json()["hits"][0]  # nobody named the folder
    app = make_app(Service(encoder, index=tmp_path / "index", images=photos))
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        thumbnails = {Path(h["path"]).stem: h["thumbnail"] for h in client.get("/search?q=red").json()["hits"]}
        answer = client.get(thumbnails["red"])
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (320, 213)
        row, _, digest = thumbnails["red"].rpartition("/")[2].partition("-")
        wrong = [row, f"{row}-", f"-1-{digest}", f"{1 - int(row)}-{digest}", f"²-{digest}", f"{'9' * 5000}-{digest}"]
        assert {client.get(f"/thumbnail/{name}").status_code for name in wrong} == {404}
        (tmp_path / "secret.png").write_bytes((photos / "blue.png").read_bytes())
        (photos / "blue.png").unlink()
        assert client.get(thumbnails["blue"]).status_code == 404
        (photos / "blue.png").symlink_to(tmp_path / "secret.png")
        assert client.get(thumbnails["blue"]).status_code == 404
        (photos / "red.png").write_bytes(b"damaged")
        assert client.get(thumbnails["red"]).status_code == 404
    moved = photos.rename(tmp_path / "moved")
    app = make_app(Service(encoder, index=tmp_path / "index", images=moved))
    with testclient.TestClient(app, base_url=BASE_URL) as client:
        assert {Path(h["path"]).parent for h in client.get("/search?q=red").json()["hits"]} == {moved}
