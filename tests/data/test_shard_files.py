"""The cache of remote shards keeps its bound, survives what is killed or full, and serves several runs at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support import contents, wait_until

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote, shard_files
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.remote import RemoteShard
from clip_rd_edge.data.shard_files import close_tars, local_path
from clip_rd_edge.errors import UnreachableError

pytest.importorskip("aiohttp")


@pytest.fixture
def shard(server: UnreliableServer) -> Callable[[int], RemoteShard]:
    return lambda number: RemoteShard(f"{server.url}/00{number}.tar")


@pytest.fixture
def folder(shard: Callable[[int], RemoteShard]) -> Path:
    return shard_files._cached(shard(0)).parent


@pytest.fixture
def size(shards: Path) -> int:
    return (shards / "000.tar").stat().st_size


@pytest.fixture
def bound(size: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the cache hold so many shards."""
    return lambda count: monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(count * size / 1e9))


def empty(folder: Path) -> None:
    close_tars()
    for path in folder.glob("*.tar"):
        path.unlink()


def test_what_a_killed_process_has_fetched_is_not_used(
    shard: Callable[[int], RemoteShard], folder: Path, shards: Path
) -> None:
    folder.mkdir(parents=True)
    whole = (shards / "000.tar").read_bytes()
    shard_files._cached(shard(0)).with_suffix(f".{len(whole)}.a.part").write_bytes(b"x" * 1000)
    assert local_path(shard(0)).read_bytes() == whole


def test_a_shard_that_a_power_failure_cut_is_fetched_again(
    server: UnreliableServer, shard: Callable[[int], RemoteShard], size: int
) -> None:
    expected = contents(load_pairs(f"{server.url}/000.tar"))
    close_tars()
    os.truncate(local_path(shard(0)), 1500)
    assert contents(load_pairs(f"{server.url}/000.tar")) == expected
    assert local_path(shard(0)).stat().st_size == size


def test_the_cache_stays_within_its_bound(
    server: UnreliableServer, shards: Path, folder: Path, size: int, bound: Callable[[float], None]
) -> None:
    bound(2.5)
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    expected = contents(load_pairs(f"{shards}/{{000..003}}.tar"))
    for i in np.random.default_rng(0).permutation(len(pairs)).tolist():
        sample = pairs.read(i)
        assert (sample.image().tobytes(), sample.captions) == expected[i]
        assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 2.5 * size


def test_the_shard_that_was_used_least_recently_makes_room(
    shard: Callable[[int], RemoteShard], folder: Path, bound: Callable[[float], None]
) -> None:
    bound(2.5)
    for number in (0, 1):
        os.utime(local_path(shard(number)), (number, number))
    used_again, new = local_path(shard(0)), local_path(shard(2))
    assert set(folder.glob("*.tar")) == {used_again, new}


def test_processes_that_need_one_shard_fetch_it_once(
    server: UnreliableServer, shard: Callable[[int], RemoteShard], size: int
) -> None:
    remote.version(shard(0))
    server.requests.clear()
    threads = [threading.Thread(target=local_path, args=(shard(0),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == -(-size // 1000) + 1  # the last asks whether the version is still the same


def test_prefetching_fetches_the_shards_of_the_groups(
    server: UnreliableServer, shard: Callable[[int], RemoteShard], folder: Path
) -> None:
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    empty(folder)
    pairs.prefetch([1, 3])
    fetching = [thread for thread in threading.enumerate() if thread.name == "shards"]
    assert fetching
    assert all(thread.daemon for thread in fetching)  # they keep no process from ending
    wait_until(lambda: len(list(folder.glob("*.tar"))) >= 2)
    assert set(folder.glob("*.tar")) == {shard_files._cached(shard(i)) for i in (1, 3)}


def test_a_full_disk_ends_training_and_replaces_no_pair(
    server: UnreliableServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_pairs(f"{server.url}/{{000..001}}.tar")
    empty(folder)
    monkeypatch.setattr(shard_files, "fetch", Mock(side_effect=OSError(28, "No space left on device")))
    for read in (lambda: pairs.read(0), lambda: load_pairs(f"{server.url}/002.tar")):  # or while it is indexed
        with pytest.raises(UnreachableError, match=rf"{folder}: No space left on device") as caught:
            read()
        assert "free some space" in caught.value.hint


def test_runs_share_a_cache_whatever_their_bounds(server: UnreliableServer, shards: Path, size: int) -> None:
    code = """
import hashlib, sys
import numpy as np
from clip_rd_edge.data.load import load_pairs
pairs = load_pairs(sys.argv[1])
digest = hashlib.sha256()
for epoch in range(4):
    for i in np.random.default_rng(epoch).permutation(len(pairs)).tolist():
        digest.update(pairs.read(i).image().tobytes() + pairs.read(i).captions[0].encode())
print(digest.hexdigest())
"""
    sources = ((shards, 9), (server.url, 1.5), (server.url, 2.5))
    local, *remote_runs = (
        subprocess.Popen(
            [sys.executable, "-c", code, f"{source}/{{000..003}}.tar"],
            env={**os.environ, shard_files.LIMIT_VARIABLE: str(limit * size / 1e9)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for source, limit in sources
    )
    expected = local.communicate(timeout=300)[0]
    assert len(expected) == 65
    assert [run.communicate(timeout=300)[0] for run in remote_runs] == [expected] * 2
