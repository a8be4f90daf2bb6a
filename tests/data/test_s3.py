"""Shards in S3 buckets, real ones of moto's server, and refusals as S3 words them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import contents

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.errors import InputError

pytest.importorskip("s3fs")

# What S3 answers to a request for a part; to one for the head it answers with the status alone.
REFUSALS = {
    "private": (403, "AccessDenied", "Access Denied"),
    "unknown-key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the request time and the current time is large."),
    "elsewhere": (400, "AuthorizationHeaderMalformed", "The region 'us-east-1' is wrong; expecting 'eu-central-1'"),
    "moved": (301, "PermanentRedirect", "The bucket you are attempting to access must be addressed using …"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "unsaid": (400, "", ""),
    "nowhere": (404, "NoSuchBucket", "The specified bucket does not exist"),
}


class Refuser(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, code, message = REFUSALS[self.path.strip("/").split("/")[0].split("?")[0]]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        body *= bool(code)
        self.send_response(status)
        if code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
            self.send_header("x-amz-bucket-region", "eu-central-1")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def refuser(monkeypatch: pytest.MonkeyPatch, credentials: None) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuser) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("bucket", "message", "hint"),
    [
        ("private", r"may not be read: Access Denied\.", "check the credentials"),
        ("unknown-key", "may not be read: The AWS Access Key Id you provided does not exist", "check the credentials"),
        ("skewed", "may not be read: The difference between the request time and the current", "this machine's clock"),
        ("elsewhere", "is in the region eu-central-1, but was looked for", "AWS_DEFAULT_REGION=eu-central-1"),
        ("moved", "is in the region eu-central-1, but was looked for", "AWS_DEFAULT_REGION=eu-central-1"),
        ("expired", r"may not be read: The provided token has expired\.", "renew them if they have expired"),
        ("unsaid", r"may not be read: Bad Request\.", "renew them if they have expired"),
        ("nowhere", "does not exist: The specified bucket does not exist", ""),
    ],
)
def test_what_s3_refuses_is_a_sentence_at_once(refuser: None, bucket: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=rf"shard s3://{bucket}/0\.tar {message}") as caught:
        load_pairs(f"s3://{bucket}/0.tar")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "bucket", "message", "hint"),
    [
        ({"AWS_PROFILE": "none"}, "a", r"may not be read: The config profile \(none\)", "check the credentials"),
        (
            {"AWS_ENDPOINT_URL": "localhost:5000"},
            "a",
            "could not be fetched: Invalid endpoint: localhost",
            "ENDPOINT_URL",
        ),
        ({"AWS_DEFAULT_REGION": "eu west"}, "a", "could not be fetched: Provided region_name 'eu west'", "settings"),
        ({}, "a!", "could not be fetched: Parameter validation failed: Invalid bucket name", "check its address"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence_at_once(
    refuser: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], bucket: str, message: str, hint: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("tried again"))
    _forget_connections()
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(f"s3://{bucket}/0.tar")
    assert hint in caught.value.hint


def test_a_bucket_that_answers_with_errors_is_asked_once_per_try(
    credentials: None, server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail = ["503"] * 999
    _forget_connections()
    with pytest.raises(InputError, match=r"shard s3://a/0\.tar could not be fetched: Service Unavailable"):
        load_pairs("s3://a/0.tar")
    assert len(server.requests) == 5


def test_missing_credentials_are_a_sentence_once_and_looked_for_again(
    refuser: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    _forget_connections()
    with pytest.raises(InputError, match=r"shard s3://private/0\.tar may not be read: Unable to locate credentials"):
        load_pairs("s3://private/0.tar")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    with pytest.raises(InputError, match=r"may not be read: Access Denied"):  # as told, with those set since
        load_pairs("s3://private/0.tar")


def _forget_connections() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_shards_in_an_s3_bucket_are_read_as_local_ones(
    shards: Path, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server")
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with UnreliableServer(target=f"127.0.0.1:{port}", latency_s=0.02).running() as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            _forget_connections()
            bucket = s3fs.S3FileSystem()
            bucket.mkdir("photographs")
            for path in sorted(shards.glob("*.tar")):
                bucket.put(str(path), f"photographs/train/{path.name}")
            server.failing_share = 0.1
            pairs = load_pairs("s3://photographs/train/{000..003}.tar")
            assert contents(pairs) == contents(load_pairs(f"{shards}/{{000..003}}.tar"))
            server.failing_share = 0
            with pytest.raises(InputError, match=r"s3://photographs/train/9\.tar does not exist"):
                load_pairs("s3://photographs/train/9.tar")
    finally:
        store.kill()
        store.wait()
