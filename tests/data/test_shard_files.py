"""The cache of remote shards keeps its bound, survives what is killed or full, and serves several runs at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support import PATIENCE_S, Watch, contents, other_clock, wait_until

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote, shard_files, shard_index
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.remote import RemoteShard
from clip_rd_edge.data.shard_files import close_tars
from clip_rd_edge.errors import ConfigError, UnreachableError

pytest.importorskip("aiohttp")


def cache_folder(server: UnreliableServer) -> Path:
    return shard_files._cached(RemoteShard(f"{server.url}/000.tar")).parent


def empty_cache(server: UnreliableServer) -> None:
    for path in cache_folder(server).glob("*.tar"):
        path.unlink()


def test_what_a_killed_process_has_fetched_is_not_used(server: UnreliableServer, shards: Path) -> None:
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    path, whole = shard_files._cached(shard), (shards / "000.tar").read_bytes()
    path.parent.mkdir(parents=True)
    path.with_suffix(f".{len(whole)}.a.part").write_bytes(b"x" * 1000)
    assert shard_files.local_path(shard).read_bytes() == whole


def test_a_shard_that_a_power_failure_cut_is_fetched_again(server: UnreliableServer, shards: Path) -> None:
    pairs = load_pairs(f"{server.url}/000.tar")
    expected = contents(pairs)
    close_tars()
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    os.truncate(shard_files._cached(shard), 1500)
    assert contents(load_pairs(f"{server.url}/000.tar")) == expected
    assert shard_files.local_path(shard).stat().st_size == (shards / "000.tar").stat().st_size


def test_the_cache_stays_within_its_bound(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (shards / "000.tar").stat().st_size
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(2.5 * size / 1e9))
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    expected = contents(load_pairs(f"{shards}/{{000..003}}.tar"))
    folder = shard_files._cached(remote.RemoteShard(f"{server.url}/000.tar")).parent
    for i in np.random.default_rng(0).permutation(len(pairs)).tolist():
        assert (pairs.read(i).image().tobytes(), pairs.read(i).captions) == expected[i]
        assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 2.5 * size


def test_the_shard_that_was_used_least_recently_makes_room(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(2.5 * (shards / "000.tar").stat().st_size / 1e9))
    first, second, third = (RemoteShard(f"{server.url}/00{number}.tar") for number in range(3))
    for seconds, shard in enumerate((first, second)):
        os.utime(shard_files.local_path(shard), (seconds, seconds))
    used_again = shard_files.local_path(first)
    new = shard_files.local_path(third)
    assert set(cache_folder(server).glob("*.tar")) == {used_again, new}


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "ten"])
def test_a_senseless_bound_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, text)
    with pytest.raises(ConfigError, match="expected a positive number of gigabytes"):
        shard_files.cache_limit()


def test_processes_that_need_one_shard_fetch_it_once(server: UnreliableServer) -> None:
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    remote.version(shard)
    server.requests.clear()
    threads = [threading.Thread(target=shard_files.local_path, args=(shard,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = -(-(server.folder / "000.tar").stat().st_size // 1000)
    assert len(server.requests) == parts + 1  # the last asks whether the version is still the same


def test_prefetching_fetches_the_shards_of_the_groups(server: UnreliableServer) -> None:
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    folder = shard_files._cached(remote.RemoteShard(f"{server.url}/000.tar")).parent
    for path in folder.glob("*.tar"):
        path.unlink()
    pairs.prefetch([1, 3])
    wait_until(lambda: len(list(folder.glob("*.tar"))) >= 2)
    expected = {shard_files._cached(remote.RemoteShard(f"{server.url}/00{i}.tar")) for i in (1, 3)}
    assert set(folder.glob("*.tar")) == expected


def test_shards_are_prefetched_in_order_instead_of_those_that_still_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, goes_on = list[str](), threading.Event()

    def fetch(shard: RemoteShard) -> None:
        fetched.append(shard.name)
        assert goes_on.wait(PATIENCE_S)

    monkeypatch.setattr(shard_files, "local_path", fetch)
    monkeypatch.setattr(shard_files, "_PREFETCHING_THREADS", 1)
    prefetcher = shard_files._Prefetcher()
    prefetcher.request([RemoteShard(f"http://a/{number}.tar") for number in range(3)])
    wait_until(lambda: fetched)
    prefetcher.request([RemoteShard(f"http://a/{number}.tar") for number in (7, 5)])
    goes_on.set()
    wait_until(lambda: len(fetched) == 3)
    assert fetched == ["0.tar", "7.tar", "5.tar"]


def test_parts_being_fetched_count_at_their_final_size(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (shards / "000.tar").stat().st_size
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(2.5 * size / 1e9))
    contents(load_pairs(f"{server.url}/{{000..001}}.tar"))
    (cache_folder(server) / f"another.{size}.part").touch()  # fetched by another process
    shard_files.local_path(RemoteShard(f"{server.url}/002.tar"))
    assert len(list(cache_folder(server).glob("*.tar"))) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists open files in /proc")
def test_a_removed_shard_takes_no_room_through_an_open_file(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (shards / "000.tar").stat().st_size
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(1.5 * size / 1e9))
    contents(load_pairs(f"{server.url}/{{000..003}}.tar"))
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [link for link in links if "remote-shards" in link and link.endswith("(deleted)")]


def test_a_shard_that_is_open_on_windows_makes_room_the_next_time(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local_shard(number: int) -> Path:
        return shard_files.local_path(RemoteShard(f"{server.url}/00{number}.tar"))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == is_open:
            raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        real_unlink(path, missing_ok)

    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(1.5 * (shards / "000.tar").stat().st_size / 1e9))
    is_open, real_unlink = local_shard(0), Path.unlink
    with monkeypatch.context() as windows:
        windows.setattr(Path, "unlink", unlink)
        assert local_shard(1).is_file()
    assert is_open.is_file()
    kept = local_shard(2)
    assert [path for path in kept.parent.iterdir() if path.suffix in (".tar", ".part")] == [kept]


def test_a_cache_that_is_too_small_for_the_order_is_told(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    load_pairs(f"{server.url}/{{000..003}}.tar", reporter=watch)
    assert watch.said == []
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(2 * (shards / "000.tar").stat().st_size / 1e9))
    load_pairs(f"{server.url}/{{000..003}}.tar", reporter=watch)
    assert "they will be fetched again and again; CLIP_RD_EDGE_SHARD_CACHE_GB sets another limit" in watch.said[0]


def test_no_more_is_prefetched_than_fits(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    empty_cache(server)
    size = (shards / "000.tar").stat().st_size
    monkeypatch.setenv(shard_files.LIMIT_VARIABLE, str(2.5 * size / 1e9))
    requested = list[str]()
    monkeypatch.setattr(shard_files._Prefetcher, "request", lambda _, shards: requested.extend(s.name for s in shards))
    pairs.prefetch([2, 0, 1, 3])
    assert requested == ["002.tar", "000.tar"]


def test_what_waits_to_be_prefetched_does_not_keep_a_process_from_ending(server: UnreliableServer) -> None:
    code = f"""
import time
from clip_rd_edge.data import remote
from clip_rd_edge.data import shard_index
from clip_rd_edge.data import shard_files
shards = [remote.RemoteShard("{server.url}/%03d.tar" % i) for i in range(4)]
for shard in shards:
    remote.version(shard)
print("ready", flush=True)
input()
shard_files.prefetch(shards)
time.sleep(0.2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    server.down_until = time.monotonic() + 1000
    process.communicate("\n", timeout=PATIENCE_S)
    assert process.returncode == 0


def test_a_full_disk_ends_training_and_replaces_no_pair(
    server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_pairs(f"{server.url}/{{000..001}}.tar")
    empty_cache(server)

    def fetch(shard: RemoteShard, part: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "fetch", fetch)
    close_tars()
    folder = re.escape(str(cache_folder(server)))
    full = rf"00[02]\.tar could not be kept in the cache {folder}: No space left on device\.$"
    with pytest.raises(UnreachableError, match=full):
        pairs.read(0).image()
    with pytest.raises(UnreachableError, match=full) as caught:  # while it is indexed
        load_pairs(f"{server.url}/002.tar")
    assert "free some space there" in caught.value.hint


def test_a_shard_that_vanishes_whenever_it_is_fetched_is_given_up(
    server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = RemoteShard(f"{server.url}/000.tar")
    vanished = Mock(return_value=cache_folder(server) / "vanished.tar")
    monkeypatch.setattr(shard_files, "local_path", vanished)
    with pytest.raises(UnreachableError, match=r"000\.tar was removed from the cache .* 10 times before") as caught:
        shard_files.open_file(shard)
    assert vanished.call_count == 10
    assert shard_files.LIMIT_VARIABLE in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder that is in use")
def test_a_command_whose_working_folder_was_removed_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    (tmp_path / "working").rmdir()
    with pytest.raises(UnreachableError, match="The working folder does not exist any more"):
        shard_files.open_file(RemoteShard("pipe:cat 000.tar"))


def test_a_clock_that_is_ahead_removes_nothing_that_others_use(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RemoteShard(f"{server.url}/000.tar")
    index = shard_index.kept_index("shard-indices", ["a"], lambda folder: (folder / shard_index.INDEX).touch())
    part = shard_files._cached(first).with_suffix(".9.a.part")  # another machine fetches it
    part.parent.mkdir(exist_ok=True)
    part.touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 50 * 24 * 3600)
    shard_files.local_path(RemoteShard(f"{server.url}/001.tar"))
    shard_index.kept_index("shard-indices", ["b"], lambda folder: (folder / shard_index.INDEX).touch())
    assert part.is_file()
    assert index.is_dir()
    for path in (part, index / shard_index.INDEX):
        os.utime(path, (now - 50 * 24 * 3600,) * 2)
    shard_files.local_path(RemoteShard(f"{server.url}/002.tar"))
    shard_index.kept_index("shard-indices", ["c"], lambda folder: (folder / shard_index.INDEX).touch())
    assert not part.exists()
    assert not index.exists()


@pytest.mark.parametrize("clock", ["the same", "+40d"])
def test_runs_share_a_cache_whatever_their_bounds_and_clocks(
    server: UnreliableServer, shards: Path, clock: str
) -> None:
    clocks = [{}, {}, {} if clock == "the same" else other_clock(clock), {}]
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
    size = (shards / "000.tar").stat().st_size
    local, *remote_runs = (
        subprocess.Popen(
            [sys.executable, "-c", code, f"{source}/{{000..003}}.tar"],
            env={**os.environ, shard_files.LIMIT_VARIABLE: str(limit * size / 1e9), **variables},
            stdout=subprocess.PIPE,
            text=True,
        )
        for (source, limit), variables in zip(
            ((shards, 9), (server.url, 1.5), (server.url, 2.5), (server.url, 9)), clocks, strict=True
        )
    )
    expected = local.communicate(timeout=300)[0]
    assert len(expected) == 65
    assert [run.communicate(timeout=300)[0] for run in remote_runs] == [expected] * 3
