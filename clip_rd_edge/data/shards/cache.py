"""The bounded local cache of remote shards, shared by processes and runs.

    KEY.tar           a shard, named after its URL and version; the modification time is when it was last opened
    KEY.SIZE.part     a shard of this size that is being fetched, or that an ended process left behind: it is continued

Room is made before a shard is fetched, by removing what was used least recently; a shard that is needed again is
fetched again. What is read from it is what is read from a local one, so batches do not depend on where shards are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from clip_rd_edge.data.remote import RemoteShard, ShardFile, fetch, shard_identity, version
from clip_rd_edge.errors import ConfigError, InputError, UnreachableError, UsageError
from clip_rd_edge.utils.files import disk_full_error, now_in
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import cache_home

LIMIT_VARIABLE = "CLIP_RD_EDGE_SHARD_CACHE_GB"
_DEFAULT_GB = 100.0
_PREFETCHING_THREADS = 4
_ABANDONED_S = 24 * 3600
_OPENING_TRIES = 10


def open_file(shard: ShardFile) -> int:
    """Open a shard for reading, after fetching it where it is remote; return the file descriptor."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if isinstance(shard, Path):
        return os.open(shard, flags)
    for _ in range(_OPENING_TRIES):
        with contextlib.suppress(FileNotFoundError):  # another process has just made room in the cache
            return os.open(local_path(shard), flags)
    raise UnreachableError(
        f"The shard {shard} was removed from the cache {_cached(shard).parent} {_OPENING_TRIES} times before it could "
        "be opened.",
        hint=f"name a folder of this machine with CLIP_RD_EDGE_CACHE, or raise {LIMIT_VARIABLE}",
    )


def local_path(shard: ShardFile) -> Path:
    """Return the path of a shard on this machine; a remote one is fetched unless it is in the cache.

    Several processes that need the same shard fetch it once.
    """
    if isinstance(shard, Path):
        return shard
    try:
        return _cached_path(shard)
    except FileNotFoundError:  # another process has made room
        raise
    except (OSError, UsageError) as error:
        if isinstance(error, UsageError) and not disk_full_error(error):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise UnreachableError(
            f"The shard {shard} could not be kept in the cache {_cached(shard).parent}: "
            f"{getattr(cause, 'strerror', None) or cause}.",
            hint=f"free some space there, name another folder with CLIP_RD_EDGE_CACHE, or lower {LIMIT_VARIABLE}",
        ) from error


def _cached_path(shard: RemoteShard) -> Path:
    path, size = _cached(shard), version(shard).size
    if not _touch(path, size):
        with exclusive_writer(path.with_suffix(".lock.d"), on_wait=lambda message: None):
            if not _touch(path, size):
                part = _reserve(path, size)
                fetch(shard, part)
                with part.open("rb" if os.name == "posix" else "rb+") as file:
                    os.fsync(file.fileno())  # after a power failure, no part passes for a shard
                part.replace(path)
                _make_room(path.parent, keep=path)  # for shards whose size was not known
    return path


def cache_limit() -> int:
    """Return how many bytes the cache may hold; raises ConfigError if the environment variable is no such number."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
        if not 0 < gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; expected a positive number of gigabytes.") from None
    return int(gigabytes * 1e9)


def _cached(shard: RemoteShard) -> Path:
    key = hashlib.sha256(shard_identity(shard).encode()).hexdigest()[:32]
    return cache_home() / "remote-shards" / f"{key}.tar"


def _touch(path: Path, size: int) -> bool:
    """Mark a cached shard as used now; return whether it is there, and all of it."""
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        return size in (-1, path.stat().st_size)
    except OSError:
        return False


def _reserve(path: Path, size: int) -> Path:
    """Make room for a shard; return the file to fetch it into, whose name keeps the room from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{max(size, 0)}.part")
    part.touch()
    _make_room(path.parent, keep=part)
    return part


def _make_room(folder: Path, *, keep: Path) -> None:
    """Remove the shards used least recently until the rest fits.

    An open one stays readable until it is closed. On Windows it cannot be removed: that is left to the next time.
    """
    with exclusive_writer(folder / "making-room.lock.d", on_wait=lambda message: None):
        room = cache_limit()
        files, now = list(_files(folder)), now_in(folder)
        for used, size, path in files:
            if path.suffix == ".part":
                if path != keep and used < now - _ABANDONED_S:
                    with contextlib.suppress(PermissionError):
                        path.unlink(missing_ok=True)
                else:
                    room -= size
        shards = [file for file in files if file[2].suffix == ".tar"]
        for _, size, path in sorted(shards, key=lambda file: (file[2] == keep, file[0]), reverse=True):
            room -= size
            if room < 0 and path != keep:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield time of the last use, size in bytes when complete, and path of all shards and parts of shards."""
    for path in folder.iterdir():
        if path.suffix in (".tar", ".part"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                planned = int(path.stem.rpartition(".")[2]) if path.suffix == ".part" else 0
                yield status.st_mtime, max(status.st_size, planned), path


class _Prefetcher:
    """Fetches shards in the background.

    Its threads end with the process: those of an executor would first work off what is waiting, and a server that is
    away would keep a process that has failed from ending for many minutes.
    """

    def __init__(self) -> None:
        self._waiting: deque[RemoteShard] = deque()
        self._has_work = threading.Condition()
        for _ in range(_PREFETCHING_THREADS):
            threading.Thread(target=self._work, name="shards", daemon=True).start()

    def request(self, shards: Sequence[RemoteShard]) -> None:
        """Fetch these shards in order, instead of those that still wait."""
        with self._has_work:
            self._waiting = deque(shards)
            self._has_work.notify_all()

    def _work(self) -> None:
        while True:
            with self._has_work:
                while not self._waiting:
                    self._has_work.wait()
                shard = self._waiting.popleft()
            # Whoever needs the shard meets the failure.
            with contextlib.suppress(InputError, UnreachableError, OSError):
                local_path(shard)


_prefetcher: tuple[int, _Prefetcher] | None = None  # with the process that started its threads


def prefetch(shards: Sequence[ShardFile]) -> None:
    """Fetch remote shards in the background, in order, as many as fit into the cache together.

    Failures are left to whoever needs the shard.
    """
    global _prefetcher
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    sizes = accumulate(version(shard).size for shard in remote)
    remote = [shard for shard, size in zip(remote, sizes, strict=True) if size <= cache_limit()]
    if remote:
        if _prefetcher is None or _prefetcher[0] != os.getpid():
            _prefetcher = (os.getpid(), _Prefetcher())
        _prefetcher[1].request(remote)
