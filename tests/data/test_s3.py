"""Shards in S3 buckets, and refusals as S3 words them."""

from __future__ import annotations

import pytest

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.errors import InputError

pytest.importorskip("s3fs")


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, server: UnreliableServer) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)


@pytest.mark.parametrize("status", ["403", "301"], ids=["private", "in another region"])
def test_what_s3_refuses_is_a_sentence_at_once(server: UnreliableServer, status: str) -> None:
    server.fail = [status] * 99
    with pytest.raises(InputError, match=r"shard s3://a/0\.tar "):
        load_pairs("s3://a/0.tar")
    assert len(server.requests) < 5


def test_a_bucket_that_answers_with_errors_is_asked_once_per_try(server: UnreliableServer) -> None:
    server.fail = ["503"] * 999
    with pytest.raises(InputError, match=r"shard s3://a/0\.tar could not be fetched: Service Unavailable"):
        load_pairs("s3://a/0.tar")
    assert len(server.requests) == 5
