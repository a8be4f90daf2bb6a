"""Shards on real servers give the same batches as local ones, whatever fails on the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.data import remote
from clip_rd_edge.data.pairs import Pairs, fingerprint, load_pairs
from clip_rd_edge.errors import ConfigError, InputError, UnreachableError

pytest.importorskip("aiohttp")
Factory = Callable[..., Any]
SHARDS = 4


class FlakyHandler(SimpleHTTPRequestHandler):
    """Serves files and parts of them; `server.fail` says how the next requests go wrong."""

    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def do_GET(self) -> None:
        path = Path(self.server.folder, self.path.lstrip("/"))
        self.server.requests.append(self.path)
        fault = self.server.fail.pop(0) if self.server.fail else ""
        if fault.isdecimal():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        total, status = len(content), 200
        if (span := self.headers.get("Range")) and not self.server.ignores_ranges:
            first, last = span.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        elif not self.server.ignores_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


class FlakyServer(ThreadingHTTPServer):
    daemon_threads = True
    ignores_ranges = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.folder, self.fail, self.requests = folder, list[str](), list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def shards(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> Path:
    """Four shards of three samples each."""
    for shard in range(SHARDS):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            members |= {f"{i:04d}.png": encode_image(i), f"{i:04d}.txt": f"grey {i}".encode()}
        write_tar(tmp_path / "data" / f"{shard:03d}.tar", members)
    return tmp_path / "data"


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.01,) * 4)
    monkeypatch.setattr(remote, "_PART_BYTES", 1000)
    remote._remote_version.cache_clear()
    with FlakyServer(shards) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def contents(pairs: Pairs) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(pairs.open(i).tobytes(), pairs.captions(i)) for i in range(len(pairs))]


def test_shards_on_a_web_server_are_read_as_local_ones(server: FlakyServer, shards: Path) -> None:
    local = load_pairs(f"{shards}/{{000..003}}.tar")
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar::{server.url}/000.tar", weights="1::2")
    assert contents(pairs)[:12] == contents(local)
    assert contents(pairs)[12:] == contents(local)[:3] * 2
    same = load_pairs(f"{server.url}/{{000..003}}.tar")
    assert fingerprint(same) == fingerprint(local)


@pytest.mark.parametrize("faults", [["503"] * 3, ["cut"], ["500", "cut", "429"], ["", "", "cut", "", "503"]])
def test_failing_requests_are_tried_again(server: FlakyServer, shards: Path, faults: list[str]) -> None:
    server.fail = list(faults)
    assert contents(load_pairs(f"{server.url}/000.tar")) == contents(load_pairs(f"{shards}/000.tar"))
    assert server.fail == []


def test_a_server_that_ignores_ranges_is_read_whole(server: FlakyServer, shards: Path) -> None:
    server.ignores_ranges = True
    assert contents(load_pairs(f"{server.url}/000.tar")) == contents(load_pairs(f"{shards}/000.tar"))


def test_each_shard_is_fetched_once(server: FlakyServer) -> None:
    source = f"{server.url}/{{000..003}}.tar"
    contents(load_pairs(source))
    server.requests.clear()
    remote._remote_version.cache_clear()
    contents(load_pairs(source))
    assert sorted(server.requests) == [f"/{i:03d}.tar" for i in range(SHARDS)]  # only to ask for their versions


def test_a_shard_that_changed_is_fetched_again(server: FlakyServer, write_tar: Factory, encode_image: Factory) -> None:
    source = f"{server.url}/{{000..001}}.tar"
    before = contents(load_pairs(source))
    write_tar(
        server.folder / "001.tar",
        {f"{i}.{s}": encode_image(9) if s == "png" else b"new" for i in (0, 1) for s in ("png", "txt")},
    )
    remote._remote_version.cache_clear()
    after = contents(load_pairs(source))
    assert after[:3] == before[:3]
    assert [captions for _, captions in after[3:]] == [("new",), ("new",)]


def test_a_part_that_a_killed_process_left_is_continued(server: FlakyServer, shards: Path) -> None:
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    path = remote._cache_path(shard)
    path.parent.mkdir(parents=True)
    whole = (shards / "000.tar").read_bytes()
    path.with_suffix(".part").write_bytes(whole[:-500])
    server.requests.clear()
    assert remote.local_path(shard).read_bytes() == whole
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["404"] * 9, r"000\.tar does not exist"),
        (["403"] * 9, r"000\.tar may not be read"),
        (["503"] * 99, r"000\.tar could not be fetched"),
        (["416"] * 99, r"000\.tar could not be fetched"),
    ],
)
def test_a_shard_that_cannot_be_had_is_named(server: FlakyServer, faults: list[str], message: str) -> None:
    server.fail = faults
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(f"{server.url}/000.tar")
    assert len(str(caught.value)) < 300


def test_a_server_that_goes_away_ends_training_and_replaces_no_pair(server: FlakyServer, shards: Path) -> None:
    from clip_rd_edge.contract.preprocess import Preprocessing
    from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader

    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    for path in remote._cache_path(remote.RemoteShard(f"{server.url}/000.tar")).parent.glob("*.tar"):
        path.unlink()
    server.fail = ["503"] * 1000
    preprocessing = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = ViewDataset(pairs, preprocessing, None, crop_scale=(0.9, 1.0), seed=0, max_bad=1.0)
    sampler = StepSampler(pairs.groups, 4, seed=0, start=0, stop=3)
    for workers in (0, 1):
        with pytest.raises(UnreachableError, match=r"^The shard http://\S+\.tar could not be fetched: [^\n]*$"):
            list(step_loader(dataset, sampler, workers=workers))


def test_the_cache_stays_within_its_bound(server: FlakyServer, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (shards / "000.tar").stat().st_size
    monkeypatch.setenv(remote.CACHE_BYTES_VARIABLE, str(2.5 * size / 1e9))
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    expected = contents(load_pairs(f"{shards}/{{000..003}}.tar"))
    folder = remote._cache_path(remote.RemoteShard(f"{server.url}/000.tar")).parent
    for i in np.random.default_rng(0).permutation(len(pairs)).tolist():
        assert (pairs.open(i).tobytes(), pairs.captions(i)) == expected[i]
        assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 3 * size


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "ten"])
def test_a_senseless_bound_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(remote.CACHE_BYTES_VARIABLE, text)
    with pytest.raises(ConfigError, match="expected a positive number of gigabytes"):
        remote._cache_bytes()


def test_processes_that_need_one_shard_fetch_it_once(server: FlakyServer) -> None:
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    remote.version(shard)
    server.requests.clear()
    threads = [threading.Thread(target=remote.local_path, args=(shard,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = -(-(server.folder / "000.tar").stat().st_size // 1000)
    assert len(server.requests) == parts


def test_prefetching_fetches_the_shards_of_the_groups(server: FlakyServer) -> None:
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    folder = remote._cache_path(remote.RemoteShard(f"{server.url}/000.tar")).parent
    for path in folder.glob("*.tar"):
        path.unlink()
    pairs.prefetch([1, 3])
    deadline = time.monotonic() + 20
    while len(list(folder.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    expected = {remote._cache_path(remote.RemoteShard(f"{server.url}/00{i}.tar")) for i in (1, 3)}
    assert set(folder.glob("*.tar")) == expected


def test_a_command_after_pipe_gives_a_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.01,) * 4)
    local = load_pairs(f"{shards}/{{000..001}}.tar")
    assert contents(load_pairs(f"pipe:cat {shards}/{{000..001}}.tar")) == contents(local)
    with pytest.raises(InputError, match=r"could not be fetched: exit status \d+: .*No such file"):
        load_pairs(f"pipe:cat {shards}/9.tar")


@pytest.mark.slow
def test_shards_in_an_s3_bucket_are_read_as_local_ones(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("photographs")
        for path in sorted(shards.glob("*.tar")):
            bucket.put(str(path), f"photographs/train/{path.name}")
        pairs = load_pairs("s3://photographs/train/{000..003}.tar")
        assert contents(pairs) == contents(load_pairs(f"{shards}/{{000..003}}.tar"))
        with pytest.raises(InputError, match=r"s3://photographs/train/9\.tar does not exist"):
            load_pairs("s3://photographs/train/9.tar")
    finally:
        store.kill()
        store.wait()


def test_other_schemes_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"xyz://a/0\.tar cannot be read"):
        load_pairs("xyz://a/0.tar")


def test_a_remote_shard_is_named_like_its_file() -> None:
    assert remote.RemoteShard("pipe:aws s3 cp s3://a/b/00012.tar -").name == "00012.tar"
    assert remote.RemoteShard("https://example.org/a/00012.tar").name == "00012.tar"
