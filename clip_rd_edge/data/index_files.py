"""What the indices of shards and of tables have in common: where they are kept, how they are built, and messages."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from clip_rd_edge.errors import ConfigError, LostProcessError, UsageError
from clip_rd_edge.utils.files import now_in
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import exclusive_writer, new_folder
from clip_rd_edge.utils.paths import cache_home

INDEX = "index.json"
_MAX_WORKERS = 8
_WAITING_RESULTS = 2  # per worker
_UNUSED_S = 30 * 24 * 3600
T = TypeVar("T")
R = TypeVar("R")


class Messages(Sequence[str]):
    """Messages in a file, one JSON string per line, of which any number costs no memory."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=str)

    @staticmethod
    def encode(messages: Iterable[str]) -> bytes:
        """Return the messages as they are stored; what is not UTF-8 in a path, as an escape."""
        printable = (message.encode(errors="backslashreplace").decode() for message in messages)
        return b"".join(msgspec.json.encode(message) + b"\n" for message in printable)


def kept_index(kind: str, identity: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the folder of an index: the one in the cache, or else one that is built now.

    Several processes that need the same index build it once. Indices of this kind that nobody has opened for 30 days
    are removed. Where the cache is full or read-only, the index lasts as long as this process.

    Args:
        kind: name of the folder of all such indices.
        identity: texts of which another one makes another index.
        build: fills an empty folder; the file INDEX is written last.
    """
    key = hashlib.sha256("\n".join(identity).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_home() / kind / key
    if _is_complete(folder):
        return folder
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_writer(folder.with_suffix(".lock.d"), on_wait=lambda message: None))
        except UsageError:  # it cannot be written
            return _temporary_index(build)
        if not _is_complete(folder):
            try:
                _remove_unused(folder.parent)
                with new_folder(folder) as new:
                    build(new)
            except OSError:
                return _temporary_index(build)
    return folder


def damage(folder: Path, number: int) -> ConfigError:
    """Return the error for a pair, counted from 0, whose entry in an index has changed since it was written."""
    return ConfigError(
        f"The index {folder} is damaged: its entry of pair {number:,} has changed since it was written.",
        hint="delete it; it is made again",
    )


def _is_complete(folder: Path) -> bool:
    """Return whether an index is there, and mark it as used now."""
    with contextlib.suppress(OSError):
        os.utime(folder / INDEX)
    with contextlib.suppress(OSError):  # a cache in a folder that this user may not enter
        return (folder / INDEX).is_file()
    return False


def _remove_unused(indices: Path) -> None:
    now = now_in(indices)
    for path in indices.glob(f"*/{INDEX}"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < now - _UNUSED_S:
                path.unlink()  # first: what is removed in part is no index
                shutil.rmtree(path.parent)


def _temporary_index(build: Callable[[Path], None]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clip-rd-edge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder)
    return folder


class OrderedMap(Protocol):
    """Maps a function over items, as `map` does."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


def _in_turn(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    return map(function, items)


@contextmanager
def ordered_map(*, parallel: bool) -> Iterator[OrderedMap]:
    """Yield a map that computes in several processes, or in threads where processes cannot be forked or share nothing.

    It runs ahead of whoever takes the results by a few items per process, so that memory is bounded.

    Args:
        parallel: whether the work is worth starting processes.
    """
    workers = min(usable_cores(), _MAX_WORKERS)
    if workers < 2 or not parallel:
        yield _in_turn
        return
    pool = _pool(workers)

    def run(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _WAITING_RESULTS * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise LostProcessError(
                "A process that reads the data was ended from outside, most likely for want of memory.",
                hint="give the machine or container more memory, then run the same command again",
            ) from error

    try:
        yield run
    except BaseException:
        # What they work on is no longer needed, and a store that does not answer would keep them for minutes.
        for process in tuple((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    if "fork" in get_all_start_methods():
        # Not spawned: that would import the user's script again.
        with contextlib.suppress(OSError, ImportError, NotImplementedError):  # no semaphores, as without /dev/shm
            return ProcessPoolExecutor(workers, get_context("fork"), initializer=_obey_the_pool)
    return ThreadPoolExecutor(workers)


def _obey_the_pool() -> None:
    """Leave Ctrl-C and a lost terminal to the main process, which ends its workers, and end when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
