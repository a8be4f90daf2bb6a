"""Shards in object stores, on web servers and behind shell commands, fetched whole into a bounded local cache.

`s3://`, `gs://`, `https://`, `hf://` and whatever else fsspec reads, and `pipe:COMMAND` as in open_clip. A shard is
fetched in parts, each tried again when it fails, and a part file that an ended process left behind is continued. The
cache drops what was used least recently; a shard that is needed again is fetched again. What is read from a fetched
shard is what is read from a local one, so batches do not depend on where the shards are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError
from clip_rd_edge.utils.io import cache_home
from clip_rd_edge.utils.lock import exclusive_writer

PIPE = "pipe:"
CACHE_BYTES_VARIABLE = "CLIP_RD_EDGE_SHARD_CACHE_GB"
_DEFAULT_CACHE_GB = 100.0
_PART_BYTES = 8 << 20
_PARALLEL_REQUESTS = 16
# A server that answers with errors for two minutes is waited for; most recover within seconds.
_RETRY_DELAYS_S = (0.5, 1, 2, 4, 8, 16, 30, 30, 30)
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "VersionId", "LastModified")
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteShard:
    """A shard at a URL, or the standard output of a command after `pipe:`."""

    url: str

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        words = self.url.removeprefix(PIPE).split()
        return PurePosixPath(next((word for word in words if word.endswith(".tar")), words[0])).name

    def __str__(self) -> str:
        return self.url


ShardFile = Path | RemoteShard


class Version(NamedTuple):
    """What changes when a shard changes: its size in bytes (-1 if unknown) and a mark, such as its ETag."""

    size: int
    mark: str


def is_remote(pattern: str) -> bool:
    """Return whether a pattern names shards elsewhere."""
    return "://" in pattern or pattern.startswith(PIPE)


def versions(shards: Sequence[ShardFile]) -> list[Version]:
    """Return the version of each shard; servers are asked in parallel.

    Raises:
        InputError: a shard does not exist, or is not allowed to be read.
    """
    if all(isinstance(shard, Path) for shard in shards):
        return [version(shard) for shard in shards]
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        return list(pool.map(version, shards))


def version(shard: ShardFile) -> Version:
    """Return the version of a shard; raises as `versions`."""
    if isinstance(shard, Path):
        try:
            stat = shard.stat()
        except OSError as error:
            raise InputError(f"Cannot read the shard {shard}: {error.strerror or error}.") from error
        return Version(stat.st_size, str(stat.st_mtime_ns))
    return _remote_version(shard.url)


@lru_cache(maxsize=1 << 16)
def _remote_version(url: str) -> Version:
    if url.startswith(PIPE):
        return Version(-1, "")  # known only by its output
    file_system, path = _file_system(url)
    info = _with_retries(url, lambda: file_system.info(path))
    size = info.get("size")
    return Version(-1 if size is None else int(size), " ".join(str(info[key]) for key in _VERSION_KEYS if key in info))


def shard_identity(shard: ShardFile) -> str:
    """Return a text that changes when a shard is another one: its location and its version; raises as `versions`."""
    size, mark = version(shard)
    return f"{shard.resolve() if isinstance(shard, Path) else shard.url}\n{size}\n{mark}"


def open_file(shard: ShardFile) -> int:
    """Open a shard for reading, after fetching it where it is remote; return the file descriptor.

    Raises:
        OSError: it cannot be opened.
        InputError: as `local_path`.
    """
    while True:
        try:
            return os.open(local_path(shard), os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            if isinstance(shard, Path):
                raise
            # Another process has just made room in the cache.


def local_path(shard: ShardFile) -> Path:
    """Return the path of a shard on this machine; a remote one is fetched unless it is in the cache.

    Several processes that need the same shard fetch it once.

    Raises:
        InputError: it does not exist, may not be read, or could not be fetched in some two minutes of trying.
    """
    if isinstance(shard, Path):
        return shard
    path = _cache_path(shard)
    if not _touch(path):
        with exclusive_writer(path.with_suffix(".lock.d"), on_wait=lambda message: None):
            if not _touch(path):
                _fetch(shard, path)
        _evict(path.parent, keep=path)
    return path


def prefetch(shards: Sequence[ShardFile], *, threads: int = 4) -> None:
    """Fetch remote shards in the background, in order; failures are left to whoever needs the shard."""
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if remote:
        pool = _prefetch_pool(threads)
        for shard in remote:
            pool.submit(_fetch_quietly, shard)


@lru_cache(maxsize=1)
def _prefetch_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="shards")


def _fetch_quietly(shard: RemoteShard) -> None:
    with contextlib.suppress(InputError, OSError):
        local_path(shard)


def _cache_path(shard: RemoteShard) -> Path:
    key = hashlib.sha256(shard_identity(shard).encode()).hexdigest()[:32]
    return cache_home() / "remote-shards" / f"{key}.tar"


def _touch(path: Path) -> bool:
    """Mark a cached shard as used now; return whether it is there."""
    try:
        os.utime(path)
    except OSError:
        return path.is_file()
    return True


def _fetch(shard: RemoteShard, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if shard.url.startswith(PIPE):
        _run_command(shard, part)
    else:
        _fetch_parts(shard.url, version(shard).size, part)
    part.replace(path)


def _run_command(shard: RemoteShard, part: Path) -> None:
    command = shard.url.removeprefix(PIPE)

    def run() -> None:
        with part.open("wb") as file:
            result = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if result.returncode:
            lines = result.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"exit status {result.returncode}{': ' + lines[-1] if lines else ''}")

    _with_retries(shard.url, run, delays=_RETRY_DELAYS_S[:3])


def _fetch_parts(url: str, size: int, part: Path) -> None:
    file_system, path = _file_system(url)
    if size < 0:  # a server that does not say how long the file is cannot send parts of it
        _with_retries(url, lambda: file_system.get_file(path, str(part)))
        return
    with part.open("ab") as file:
        while (start := file.tell()) < size:
            stop = min(start + _PART_BYTES, size)
            file.write(_with_retries(url, partial(_part, file_system, path, start, stop)))
        if file.tell() > size:  # left behind by another version
            file.truncate(0)
            raise InputError(f"{url} has changed while it was read.", hint="try again")


def _part(file_system: Any, path: str, start: int, stop: int) -> bytes:
    content: bytes = file_system.cat_file(path, start=start, end=stop)
    if len(content) != stop - start:
        # A server that ignores the range sends the whole file.
        if len(content) >= stop and start == 0:
            return content
        raise OSError(f"{len(content):,} bytes came where {stop - start:,} were asked for")
    return content


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise MissingExtraError("fsspec", extra="remote", purpose=f"Reading {url}") from error
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise MissingExtraError(
            error.name or f"the fsspec package for {url.split('://')[0]}", extra="remote", purpose=f"Reading {url}"
        ) from error
    except ValueError as error:
        raise InputError(f"{url} cannot be read: {error}.", hint="use s3://, gs://, https:// or hf://") from error


def _with_retries(url: str, call: Callable[[], _T], *, delays: Sequence[float] | None = None) -> _T:
    for delay in (*(_RETRY_DELAYS_S if delays is None else delays), None):
        try:
            return call()
        except MissingExtraError:
            raise
        except Exception as error:  # each file system raises its own types
            status = _status(error)
            # fsspec raises FileNotFoundError also for servers that cannot be reached; the cause is the difference.
            if status == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
                raise InputError(f"The shard {url} does not exist.") from error
            if status in (401, 403) or isinstance(error, PermissionError):
                raise InputError(
                    f"The shard {url} may not be read: {_reason(error)}.",
                    hint="check the credentials that its store expects, such as AWS_PROFILE for s3://",
                ) from error
            is_final = status is not None and 300 <= status < 500 and status not in (408, 425, 429)
            if delay is None or is_final:
                raise InputError(
                    f"The shard {url} could not be fetched: {_reason(error)}.",
                    hint="check that it can be reached; what was fetched is kept, so that another start continues",
                ) from error
        time.sleep(delay)
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore or huggingface_hub, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        status = getattr(cause, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__ or cause.__context__
    return None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _cache_bytes() -> int:
    text = os.environ.get(CACHE_BYTES_VARIABLE, "")
    try:
        gigabytes = float(text) if text else _DEFAULT_CACHE_GB
        if not 0 < gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{CACHE_BYTES_VARIABLE} is {text!r}; expected a positive number of gigabytes.") from None
    return int(gigabytes * 1e9)


def _evict(folder: Path, *, keep: Path) -> None:
    """Remove the shards used least recently until the rest fits; an open one stays readable until it is closed."""
    files = sorted(_files(folder), key=lambda item: item[0], reverse=True)
    room = _cache_bytes() - sum(size for _, size, path in files if path == keep)
    for _, size, path in files:
        if path == keep:
            continue
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            yield stat.st_mtime, stat.st_size, path
