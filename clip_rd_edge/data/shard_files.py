"""Shards on this machine: the bounded cache of remote ones, shared by processes and runs, and files within open tars.

    KEY.tar             a shard, named after its URL and version; the modification time is when it was last opened
    KEY.SIZE.….part     a shard of this size that is being fetched, or that an ended process left behind

Room is made before a shard is fetched, by removing what was used least recently; a shard that is needed again is
fetched again. Reads return what they return from a local shard, so batches do not depend on where shards are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from clip_rd_edge.data.remote import RemoteShard, ShardFile, ask_servers, fetch, shard_identity, version
from clip_rd_edge.data.tar import member_name, read_at
from clip_rd_edge.errors import ConfigError, InputError, UnreachableError
from clip_rd_edge.utils.files import machine_failure, now_in
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import cache_home

LIMIT_VARIABLE = "CLIP_RD_EDGE_SHARD_CACHE_GB"
_ABANDONED_S = 3600  # what is being fetched grows every few minutes, also over a slow network
_OPENING_TRIES = 10
_PREFETCHING_THREADS = 4
_MAX_OPEN = 16


def open_file(shard: ShardFile) -> int:
    """Open a shard for reading, after fetching it where it is remote; return the file descriptor."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if isinstance(shard, Path):
        return os.open(shard, flags)
    for _ in range(_OPENING_TRIES):
        with contextlib.suppress(FileNotFoundError):  # another process has just made room in the cache
            return os.open(local_path(shard), flags)
    return os.open(local_path(shard), flags)


def local_path(shard: RemoteShard) -> Path:
    """Return the path of a shard on this machine, which is fetched unless it is in the cache.

    Several processes that need the same shard fetch it once.
    """
    path = _cached(shard)
    try:
        if not _touch(path, shard):
            with exclusive_writer(path.with_suffix(".lock.d"), on_wait=lambda message: None):
                if not _touch(path, shard):
                    _fill(path, shard)
    except FileNotFoundError:  # another process has made room
        raise
    except OSError as error:
        raise UnreachableError(
            f"The shard {shard} could not be kept in the cache {path.parent}: {error.strerror or error}.",
            hint=f"free some space there, name another folder with CLIP_RD_EDGE_CACHE, or lower {LIMIT_VARIABLE}",
        ) from error
    return path


def cache_limit() -> int:
    """Return how many bytes the cache may hold; raises ConfigError if the environment variable is not such a number."""
    text = os.environ.get(LIMIT_VARIABLE) or "100"
    with contextlib.suppress(ValueError):
        if 0 < (gigabytes := float(text)) < math.inf:
            return int(gigabytes * 1e9)
    raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; expected a positive number of gigabytes.")


def _cached(shard: RemoteShard) -> Path:
    key = hashlib.sha256(shard_identity(shard).encode()).hexdigest()[:32]
    return cache_home() / "remote-shards" / f"{key}.tar"


def _touch(path: Path, shard: RemoteShard) -> bool:
    """Mark a cached shard as used now; return whether it is there, and all of it."""
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        return version(shard).size in (-1, path.stat().st_size)
    except OSError:
        return False


def _fill(path: Path, shard: RemoteShard) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The size in its name keeps the room from others.
    file, name = tempfile.mkstemp(".part", f"{path.stem}.{max(version(shard).size, 0)}.", path.parent)
    part = Path(name)
    try:
        os.close(file)
        _make_room(path.parent, keep=part)
        fetch(shard, part)
        with part.open("rb" if os.name == "posix" else "rb+") as written:
            os.fsync(written.fileno())  # after a power failure, no part passes for a shard
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _make_room(path.parent, keep=path)  # for shards whose size was not known


def _make_room(folder: Path, *, keep: Path) -> None:
    """Remove the shards used least recently until the rest fits.

    An open one stays readable until it is closed. On Windows it cannot be removed: that is left to the next time.
    """
    with exclusive_writer(folder / "making-room.lock.d", on_wait=lambda message: None):
        room, now = cache_limit(), now_in(folder)
        shards = list[tuple[float, int, Path]]()
        for path in folder.glob("*.*"):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                status = path.stat()
                if path.suffix == ".tar":
                    shards.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".part" and path != keep and status.st_mtime < now - _ABANDONED_S:
                    path.unlink()
                elif path.suffix == ".part":
                    room -= max(status.st_size, int(path.name.split(".")[1]))
        for _, size, path in sorted(shards, key=lambda file: (file[2] == keep, file[0]), reverse=True):
            room -= size
            if room < 0 and path != keep:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)


_waiting: deque[RemoteShard] = deque()
_fetching: list[threading.Thread] = []


def prefetch(shards: Sequence[ShardFile]) -> None:
    """Fetch remote shards in the background, in order, as many as fit into the cache together; not those before.

    The threads end with the process, as those of `in_threads`. Failures are left to whoever needs the shard.
    """
    if not (remote := [shard for shard in shards if isinstance(shard, RemoteShard)]):
        return
    sizes = accumulate(version(shard).size for shard in remote)
    _waiting.clear()
    _waiting.extend(shard for shard, size in zip(remote, sizes, strict=True) if size <= cache_limit())
    _fetching[:] = [thread for thread in _fetching if thread.is_alive()]
    for _ in range(min(_PREFETCHING_THREADS - len(_fetching), len(_waiting))):
        _fetching.append(threading.Thread(target=_fetch_waiting, name="shards", daemon=True))
        _fetching[-1].start()


def _fetch_waiting() -> None:
    with contextlib.suppress(IndexError):  # nothing waits any more
        while True:
            shard = _waiting.popleft()
            with contextlib.suppress(InputError, UnreachableError, OSError):
                local_path(shard)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar; implements `bundle.images.ImageFile`.

    Without a name, the tar is asked for it when a message needs it.
    """

    shard: ShardFile
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Return the file's content."""
        content = read_at(_open_tar(self.shard).file, self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"expected {self.size:,} bytes, found {len(content):,}")
        return content

    def __str__(self) -> str:
        return f"{self.shard}: {self.name or member_name(_open_tar(self.shard).file, self.offset)}"


class _OpenTar:
    """A file that is closed once nobody holds it: after the last read of one that is no longer kept open."""

    def __init__(self, shard: ShardFile) -> None:
        try:
            self.file = open_file(shard)
        except InputError as error:  # not a bad sample: other pairs must not take the places of a whole shard's
            raise UnreachableError(str(error), hint=error.advice) from error
        except OSError as error:
            lost = UnreachableError(f"Cannot read the shard {shard}: {error.strerror or error}.")
            raise machine_failure(error) or lost from error
        weakref.finalize(self, os.close, self.file)


# Few: one that was removed from the cache of remote shards takes room on the disk until it is closed. Reads name their
# offset, so that forked workers and threads can share them.
_open_tar = lru_cache(_MAX_OPEN)(_OpenTar)


def close_tars() -> None:
    """Close all tars, so that one that was replaced since is opened again."""
    _open_tar.cache_clear()


def ask_versions(shards: Sequence[ShardFile]) -> None:
    """Ask for the versions that shards have now, which they are read as from here on; raises InputError."""
    close_tars()
    ask_servers(shards)
