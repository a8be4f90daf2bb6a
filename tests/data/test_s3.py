"""Shards in S3 buckets, real ones of moto's server, and refusals as S3 words them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.errors import InputError

pytest.importorskip("s3fs")

# By bucket, what S3 answers to a request for a part (to one for the head it answers with the status alone), and a word
# of the hint.
REFUSALS = {
    "private": (403, "AccessDenied", "Access Denied", "credentials"),
    "moved": (301, "PermanentRedirect", "The bucket you are attempting to access must …", "region"),
}


class Refuser(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, code, message, _ = REFUSALS[self.path.strip("/").split("/")[0].split("?")[0]]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def refuser(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("tried again"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuser) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.usefixtures("refuser")
@pytest.mark.parametrize("bucket", REFUSALS)
def test_what_s3_refuses_is_a_sentence_at_once(bucket: str) -> None:
    with pytest.raises(InputError, match=rf"shard s3://{bucket}/0\.tar ") as caught:
        load_pairs(f"s3://{bucket}/0.tar")
    assert REFUSALS[bucket][3] in caught.value.hint


def test_a_bucket_that_answers_with_errors_is_asked_once_per_try(
    server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail = ["503"] * 999
    with pytest.raises(InputError, match=r"shard s3://a/0\.tar could not be fetched: Service Unavailable"):
        load_pairs("s3://a/0.tar")
    assert len(server.requests) == 5
