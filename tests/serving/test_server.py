"""What `demo` and `serve` send with every response, and requests that no server may guess the meaning of."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from starlette import testclient

from clip_rd_edge.runtime.load import load
from clip_rd_edge.serving import demo as app
from clip_rd_edge.serving.guard import allowed_host
from clip_rd_edge.serving.service import Service
from clip_rd_edge.serving.service import make_app as make_service

URL, HOST = "http://127.0.0.1:8765", ("Host", "127.0.0.1:8765")
TOKEN = ("Authorization", "Bearer secret")
PATHS = {"demo": "/api/bundles", "serve": "/v1/models", "serve with a token": "/v1/models"}


@pytest.fixture(params=list(PATHS))
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(server: str, colour_bundle: Path) -> Any:
    if server == "demo":
        application = app.make_app(app.Demo([colour_bundle], threads=1))
    else:
        token = "secret" if "token" in server else ""
        application = make_service(Service(load(colour_bundle)), token=token)
    return testclient.TestClient(application, base_url=URL)


PROTECTING = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def test_every_response_has_the_headers_that_protect_a_page(client: Any, server: str) -> None:
    for path, headers, status in (
        (PATHS[server], [TOKEN], 200),
        ("/nothing", [TOKEN], 404),
        ("/%00", [TOKEN], 404),
        (PATHS[server], [TOKEN, HOST, HOST], 400),
        (PATHS[server], [TOKEN, ("Content-Length", "9" * 12)], 413),
    ):
        response = client.get(path, headers=headers)
        assert response.status_code == status
        assert response.headers.items() >= PROTECTING.items()
        assert not {"server", "access-control-allow-origin", "set-cookie"} & set(response.headers)


TWICE = [
    [HOST, HOST],
    [HOST, ("Host", "evil.example")],
    [("Host", "evil.example"), HOST],
    [HOST, ("Origin", URL), ("Origin", "http://evil.example")],
    [HOST, TOKEN, ("Authorization", "Bearer wrong")],
    [HOST, ("Content-Length", "0"), ("Content-Length", "0")],
    [HOST, ("Content-Length", "0"), ("Transfer-Encoding", "chunked")],
]


def test_two_headers_of_which_a_proxy_may_have_read_the_other_are_refused(client: Any, server: str) -> None:
    for twice in TWICE:
        headers = twice if TOKEN in twice else [*twice, TOKEN]
        assert client.get(PATHS[server], headers=headers).status_code == 400, twice


FOREIGN = [
    "evil.example", "[::1", "[", "]", "[]", "²", "a b", "http://", "@", "//", "%00", "a" * 5_000, "1:x",
    "evil.example@127.0.0.1", "127.0.0.1/evil.example", "127.0.0.1?evil.example", "127.0.0.1#evil.example",
    "127.0.0.1:1 evil.example", "127.0.0.1:evil.example", "127.0.0.1:99999", "127.0.0.1\\evil.example",
]  # fmt: skip


@pytest.mark.parametrize("server", ["demo", "serve"], indirect=True)
def test_a_host_is_a_name_and_a_port_of_this_machine_and_nothing_else(client: Any, server: str) -> None:
    origins = ["ftp://127.0.0.1:8765", "app://127.0.0.1:8765", "127.0.0.1:8765", "null"]
    for name, values in (("Host", FOREIGN), ("Origin", FOREIGN + origins)):
        for value in values:
            assert client.get(PATHS[server], headers={name: value.encode()}).status_code == 403, value
    for headers in ({}, {"Origin": URL}):
        assert client.get(PATHS[server], headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback", "allowed"),
    [
        ("127.0.0.1:8765", True, True), ("localhost", True, True), ("[::1]:8765", True, True),
        ("127.9.9.9", True, True),
        ("evil.example:8765", True, False), ("localhost.evil.example", True, False), ("192.168.1.5:8765", True, False),
        ("", True, False), ("0.0.0.0", True, False), ("192.168.1.5:8765", False, True),
        ("evil.example:8765", False, False), (socket.gethostname(), False, True),
    ],
)  # fmt: skip
def test_allowed_hosts(host: str, loopback: bool, allowed: bool) -> None:
    assert allowed_host(host, loopback=loopback) is allowed
