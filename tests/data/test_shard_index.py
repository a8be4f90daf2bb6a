"""Many shards are indexed into one file, once, whatever interrupts or damages it; work on them ends when it fails."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.data import shard_index
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.shard_files import close_tars
from clip_rd_edge.data.shard_index import index_shards, map_in_order
from clip_rd_edge.distillation.processes import stop_on_signals
from clip_rd_edge.errors import ConfigError, InputError, LostProcessError
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.reporting import Reporter

Factory = Callable[..., Any]


@pytest.fixture
def paths(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> list[Path]:
    """Twelve shards of one to three samples; sample j of shard i has the caption `i j`."""
    return [
        write_tar(
            tmp_path / f"{i:02d}.tar",
            {
                f"{i}-{j}.{suffix}": encode_image(10 * i + j) if suffix == "png" else f"{i} {j}".encode()
                for j in range(1 + i % 3)
                for suffix in ("png", "txt")
            },
        )
        for i in range(12)
    ]


def contents(paths: list[Path]) -> list[str]:
    pairs = load_pairs("::".join(map(str, paths)))
    samples = map(pairs.read, range(len(pairs)))
    return [f"{sample.image().getpixel((0, 0))[0]} {sample.captions[0]}" for sample in samples]


EXPECTED = [f"{10 * i + j} {i} {j}" for i in range(12) for j in range(1 + i % 3)]


def test_a_flipped_bit_in_an_index_is_an_error_and_no_other_sample(
    paths: list[Path], flips: Callable[[Path, Callable[[], object]], int]
) -> None:
    contents(paths)
    (file,) = (cache_home() / "shard-indices").glob("*/rows.bin")
    assert flips(file, lambda: contents(paths)) >= 100


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists open files in /proc")
def test_the_index_of_a_data_set_that_is_gone_is_closed(paths: list[Path]) -> None:
    for _ in range(2):
        assert contents(paths) == EXPECTED
    gc.collect()
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [link for link in links if link.startswith(str(cache_home().resolve()))]


@pytest.mark.parametrize("methods", [["fork", "spawn"], ["spawn"]], ids=["processes", "threads"])
def test_several_workers_give_the_same_index(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, methods: list[str]
) -> None:
    if methods[0] not in shard_index.get_all_start_methods():
        pytest.skip("this system cannot fork")
    monkeypatch.setattr(shard_index, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(shard_index, "_SERIAL_BYTES", 0)
    monkeypatch.setattr("clip_rd_edge.data.shard_index.usable_cores", lambda: 4)
    assert contents(paths) == EXPECTED


def test_an_interrupted_indexing_goes_on_where_it_was(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    class Interrupt(Reporter):
        def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
            if step == 7:
                raise StopError

    with pytest.raises(StopError):
        index_shards(paths, json_key=None, reporter=Interrupt())
    scanned = []
    scan = shard_index._scan
    monkeypatch.setattr(shard_index, "_scan", lambda path: scanned.append(path) or scan(path))
    assert contents(paths) == EXPECTED
    assert scanned == paths[8:]


def test_a_copy_in_another_process_reads_on_its_own(paths: list[Path]) -> None:
    index = index_shards(paths, json_key=None)
    location = index.locate(11, 2)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.locate(11, 2) == location
    assert copy._file != index._file


def test_an_index_that_lost_rows_is_refused(paths: list[Path], tmp_path: Path) -> None:
    index_shards(paths, json_key=None)
    (rows,) = (tmp_path / "cache" / "shard-indices").glob("*/rows.bin")
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ConfigError):
        index_shards(paths, json_key=None)


def test_one_unreadable_shard_is_named_and_leaves_no_index(paths: list[Path], tmp_path: Path) -> None:
    paths[5].write_bytes(b"not a tar" * 100)
    with pytest.raises(InputError, match=r"05\.tar is not an uncompressed tar"):
        index_shards(paths, json_key=None)
    assert not list((tmp_path / "cache" / "shard-indices").glob("*/index.json"))


def test_a_message_names_the_sample_in_its_shard(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> None:
    members = {"a.png": encode_image(0), "a.txt": b"a", "b.png": b"?", "b.txt": b"b", "c.png": b"?", "c.txt": b" "}
    path = write_tar(tmp_path / "0.tar", members)
    pairs = load_pairs(str(path))
    with pytest.raises(InputError, match=r"0\.tar: b\.png"):
        pairs.read(1).image()
    with pytest.raises(InputError, match=r"0\.tar: c\.txt: the caption is empty"):
        pairs.read(2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are Unicode")
def test_a_message_about_a_shard_whose_folder_is_not_utf_8_is_kept(
    tmp_path: Path, write_tar: Factory, encode_image: Factory
) -> None:
    members = {
        "a.png": encode_image(1),
        "a.txt": b"a",
        "b.png": encode_image(2),
        "b.txt": b"b",
        "c.png": encode_image(3),
    }
    shard = write_tar(tmp_path / os.fsdecode(b"caf\xe9") / "0.tar", members)
    (message,) = load_pairs(str(shard)).problems.examples
    assert "caf\\udce9" in message


def test_a_shard_that_was_cut_since_it_was_indexed_has_bad_samples(paths: list[Path]) -> None:
    pairs = load_pairs(str(paths[2]))
    os.truncate(paths[2], 600)
    close_tars()
    with pytest.raises(InputError, match=r"02\.tar.*expected .* bytes, found 0"):
        pairs.read(2).image()


def _work(seconds: float) -> float:
    time.sleep(seconds)
    if not seconds:
        raise OSError("damaged")
    return seconds


def _die(seconds: float) -> float:
    if not seconds:
        time.sleep(0.5)  # the other worker has begun
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return seconds


def _stop_after_the_first(first: float) -> None:
    with closing(map_in_order(_work, [first, 60], by="processes")) as results:
        next(results)
        raise KeyboardInterrupt


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    monkeypatch.setattr(shard_index, "usable_cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("first", "error"), [(0, OSError), (0.01, KeyboardInterrupt)], ids=["failure", "stop"])
def test_processes_that_still_work_are_not_waited_for(first: float, error: type[BaseException]) -> None:
    started = time.monotonic()
    with pytest.raises(error):
        _stop_after_the_first(first)
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("two_cores")
def test_a_worker_that_is_killed_is_told_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signals(), pytest.raises(LostProcessError):
        list(map_in_order(_die, [0, 1], by="processes"))
    assert capfd.readouterr().err == ""  # nor a traceback of the other worker, which the pool ends


@pytest.mark.usefixtures("two_cores")
def test_a_machine_without_semaphores_works_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose /dev/shm is missing or read-only, or AWS Lambda."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    assert list(map_in_order(_work, [0.01, 0.02], by="processes")) == [0.01, 0.02]
