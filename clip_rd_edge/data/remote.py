"""Shards in object stores, on web servers and behind shell commands: their versions, and how they are fetched.

`s3://`, `gs://`, `https://`, `hf://` and whatever else fsspec reads, and `pipe:COMMAND` as in open_clip. A shard is
fetched whole and in parts, each tried again when it fails, into a file that `data.shards.cache` keeps.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from clip_rd_edge.data.store_errors import http_status, is_web, reason_of, refusal
from clip_rd_edge.data.tar import TarScan
from clip_rd_edge.errors import InputError, MissingExtraError, UnreachableError
from clip_rd_edge.utils.files import disk_full_error
from clip_rd_edge.utils.paths import URL, Typed
from clip_rd_edge.utils.text import shown_source

PIPE = "pipe:"
_PART_BYTES = 8 << 20
_PROBE_BYTES = 1 << 16
_VERSION_TRIES = 4
_PARALLEL_REQUESTS = 16
# A server that answers with errors for two minutes is waited for; most recover within seconds.
_RETRY_DELAYS_S = (0.5, 1, 2, 4, 8, 16, 30, 30, 30)
_RETRY_LIMIT_S = 120.0  # from the first failure to the start of the last try
# A connection that says nothing for this long is given up and tried again. There is no limit on a whole answer: a large
# part over a slow network takes what it takes.
_CONNECT_TIMEOUT_S = 30.0
_READ_TIMEOUT_S = 60.0
_GCS_READ_TIMEOUT_S = 15.0  # gcsfs tries six times itself, which no option changes
# Under these names, file systems of fsspec say what changes with the content; without any, when it changed.
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "VersionId", "LastModified")
_OTHER_VERSION_KEYS = ("blob_id", "Last-Modified", "last_modified", "mtime", "modified", "modificationTime")
_T = TypeVar("_T")
# All file systems in use, so that they outlive a fork. fsspec drops its parent's in a child, and a session that is then
# collected removes its connections from the event queue that both processes share: the parent hears of no answer on
# them any more, and waits until it times out.
_kept = set[Any]()


@dataclass(frozen=True)
class RemoteShard:
    """A shard at a URL, or the standard output of a command after `pipe:`."""

    url: Typed

    @property
    def name(self) -> str:
        """The file's name, without folders and without the query of a URL."""
        return PurePosixPath(str(self)).name

    def __str__(self) -> str:
        return shown_source(self.url)


ShardFile = Path | RemoteShard


class Version(NamedTuple):
    """What changes when a shard changes: its size in bytes (-1 if unknown) and a mark, such as its ETag."""

    size: int
    mark: str


# By URL, as of when their servers were last asked: shards that are in use are read as these versions.
_known_versions = dict[str, Version]()


def is_remote(pattern: str) -> bool:
    """Return whether a pattern names shards elsewhere."""
    return bool(URL.search(pattern)) or pattern.startswith(PIPE)


def versions(shards: Sequence[ShardFile]) -> list[Version]:
    """Return the version that each shard has now; servers are asked in parallel, also when they were before."""
    if urls := list(dict.fromkeys(shard.url for shard in shards if isinstance(shard, RemoteShard))):
        _forget_listings()
        _known_versions.update(_remote_versions(urls))
    return [version(shard) for shard in shards]


def _remote_versions(urls: Sequence[str]) -> dict[str, Version]:
    """Ask for versions in threads that end with the process.

    Those of an executor would keep one that is stopped from ending for as long as they try again.
    """
    waiting, answers = deque(urls), queue.SimpleQueue[tuple[str, Version | BaseException]]()

    def ask() -> None:
        with contextlib.suppress(IndexError):  # nothing waits any more
            while True:
                url = waiting.popleft()
                try:
                    answers.put((url, _remote_version(url)))
                except BaseException as error:  # noqa: BLE001 — whoever waits for the answers raises it
                    answers.put((url, error))

    for _ in range(min(_PARALLEL_REQUESTS, len(urls))):
        threading.Thread(target=ask, name="versions", daemon=True).start()
    found = dict[str, Version]()
    while len(found) < len(urls):
        with contextlib.suppress(queue.Empty):
            url, answer = answers.get(timeout=1)  # Ctrl-C on Windows interrupts no longer wait
            if isinstance(answer, BaseException):
                waiting.clear()
                raise answer
            found[url] = answer
    return found


def version(shard: ShardFile) -> Version:
    """Return the version of a shard, a remote one's as of when it was last asked for; raises as `versions`."""
    if isinstance(shard, Path):
        try:
            stat = shard.stat()
        except OSError as error:
            raise InputError(f"Cannot read the shard {shard}: {error.strerror or error}.") from error
        return Version(stat.st_size, str(stat.st_mtime_ns))
    if shard.url not in _known_versions:
        _known_versions[shard.url] = _remote_version(shard.url)
    return _known_versions[shard.url]


def _remote_version(url: str) -> Version:
    if url.startswith(PIPE):
        return Version(-1, "")  # known only by its output
    file_system, path = _file_system(url)
    info = _with_retries(url, partial(_info, file_system, path))
    size = info.get("size")
    keys = [key for key in _VERSION_KEYS if key in info] or [key for key in _OTHER_VERSION_KEYS if key in info]
    return Version(-1 if size is None else int(size), " ".join(str(info[key]) for key in keys))


def _info(file_system: Any, path: str) -> dict[str, Any]:
    try:
        info: dict[str, Any] = file_system.info(path)
    except OSError as error:
        if isinstance(error, PermissionError) or (
            http_status(error) == 400 and not isinstance(error, FileNotFoundError)
        ):
            # The answer to this request says why; that to a request of the head says nothing.
            file_system.cat_file(path, start=0, end=1)
        raise
    return info


def _forget_listings() -> None:
    """Let file systems that keep what a folder holds, as huggingface_hub's does, ask for it anew."""
    for file_system in tuple(_kept):
        file_system.invalidate_cache()


def shard_identity(shard: ShardFile) -> str:
    """Return a text that changes when a shard is another one: its location and its version."""
    size, mark = version(shard)
    location = str(shard.resolve()) if isinstance(shard, Path) else shard.url
    if location.startswith(PIPE):  # what a command writes depends on where it runs
        try:
            location = f"{location}\n{Path.cwd()}"
        except FileNotFoundError as error:
            raise UnreachableError(
                "The working folder does not exist any more.", hint="cd into one that does"
            ) from error
    return f"{location}\n{size}\n{mark}"


def fetch(shard: RemoteShard, part: Path) -> None:
    """Fetch a shard into a file; what is already in it is continued."""
    if shard.url.startswith(PIPE):
        _run_command(shard, part)
        return
    expected = version(shard)
    _fetch_parts(shard.url, expected.size, part)
    # Also tells one that was replaced since it was indexed, and then left the cache. It is asked for more than once, as
    # each machine of a server farm may give the same file a mark of its own.
    is_other = all(_version_now(shard.url) != expected for _ in range(_VERSION_TRIES))
    if part.stat().st_size > expected.size >= 0 or is_other:
        part.write_bytes(b"")
        raise InputError(f"{shard} has changed while it was read.", hint="try again")


def _version_now(url: str) -> Version:
    _forget_listings()
    return _remote_version(url)


def _run_command(shard: RemoteShard, part: Path) -> None:
    command = shard.url.removeprefix(PIPE)

    def run() -> None:
        with part.open("wb") as file:
            result = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        # Of commands joined by |, the shell tells the last one's exit status alone: another's failure cuts the output.
        if failure := f"exit status {result.returncode}" if result.returncode else _cut_off(part):
            _require_room(part)
            lines = result.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"{failure}{': ' + lines[-1] if lines else ''}")

    _with_retries(shard.url, run, delays=_RETRY_DELAYS_S[:3], limit_s=math.inf)


def _require_room(path: Path) -> None:
    """Raise OSError if no more can be written to a file: of a full disk, a command says only that it has failed."""
    with path.open("ab") as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _cut_off(path: Path) -> str:
    """Return where a tar is cut off, or nothing."""
    scan = TarScan(lambda: os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
    for _ in scan:
        pass
    return scan.damage if scan.is_cut_off else ""


def _fetch_parts(url: str, size: int, part: Path) -> None:
    file_system, path = _file_system(url)
    if size < 0:  # a server that does not say how long the file is cannot send parts of it
        _with_retries(url, lambda: file_system.get_file(path, str(part)), limit_s=math.inf)
        return
    # Not opened for appending: where a file system has no locks, two processes may write the same bytes, but each to
    # their own place.
    part.touch()
    with part.open("r+b") as file:
        while (start := file.seek(0, io.SEEK_END)) < size:
            content = _with_retries(url, partial(_part, file_system, path, start, min(start + _PART_BYTES, size)))
            file.seek(start)
            file.write(content)
            file.flush()


def _part(file_system: Any, path: str, start: int, stop: int) -> bytes:
    content: bytes = file_system.cat_file(path, start=start, end=stop)
    if len(content) != stop - start:
        # A server that ignores the range sends the whole file.
        if len(content) >= stop:
            return content[start:]
        raise OSError(f"{len(content):,} bytes came where {stop - start:,} were asked for")
    return content


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise MissingExtraError("fsspec", extra="remote", purpose=f"Reading {shown_source(url)}") from error
    try:
        file_system, path = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        raise MissingExtraError(
            error.name or f"the fsspec package for {url.split('://')[0]}",
            extra="remote",
            purpose=f"Reading {shown_source(url)}",
        ) from error
    except ValueError as error:
        raise InputError(
            f"{shown_source(url)} cannot be read: {reason_of(error)}.", hint="use s3://, gs://, https:// or hf://"
        ) from error
    _kept.add(file_system)
    return file_system, path


def _options(url: str) -> dict[str, Any]:
    """Return options for the file system of a URL, beside those of fsspec's configuration.

    A call that a store does not answer fails within some two minutes, the library's own tries included: where each of
    three layers tries again, their times would multiply to hours.
    """
    if url.startswith(("s3://", "s3a://")):  # s3fs still tries five times, for 15 s each
        return _beside_configured(("s3", "s3a"), "config_kwargs", retries={"total_max_attempts": 1})
    if url.startswith(("gs://", "gcs://")):
        return {"requests_timeout": _limits(_GCS_READ_TIMEOUT_S)}
    if is_web(url):
        # trust_env: the proxy of HTTPS_PROXY and NO_PROXY, and the passwords in ~/.netrc, as curl and urllib have them.
        limits = _limits(_READ_TIMEOUT_S)
        return _beside_configured(("http", "https"), "client_kwargs", timeout=limits, trust_env=True)
    return {}


def _limits(silence_s: float) -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=silence_s)


def _beside_configured(protocols: Sequence[str], option: str, **values: Any) -> dict[str, Any]:
    """Return an option with further values beside those that fsspec's configuration names, which it would replace."""
    import fsspec

    configured = dict[str, Any]()
    for protocol in protocols:
        configured = fsspec.config.conf.get(protocol, {}).get(option, configured)
    return {option: {**configured, **values}}


def _with_retries(
    url: str, call: Callable[[], _T], *, delays: Sequence[float] | None = None, limit_s: float | None = None
) -> _T:
    limit_s = _RETRY_LIMIT_S if limit_s is None else limit_s
    first_failure: float | None = None
    for delay in (*(_RETRY_DELAYS_S if delays is None else delays), None):
        try:
            return call()
        except MissingExtraError:
            raise
        except Exception as error:  # each file system raises its own types
            if disk_full_error(error):  # this machine's
                raise
            if final := refusal(url, error):
                _forget_file_systems()
                raise final from error
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            left_s = first_failure + limit_s - now
            status = http_status(error)
            is_final = status is not None and 300 <= status < 500 and status not in (408, 425, 429)
            if delay is None or left_s <= 0 or is_final:
                raise InputError(
                    f"The shard {shown_source(url)} could not be fetched: {reason_of(error, url)}.",
                    hint="run the command by itself: it must write a whole tar"
                    if url.startswith(PIPE)
                    else "check that it can be reached; what was fetched is kept, so that another start continues",
                ) from error
        time.sleep(min(delay, left_s))
    raise AssertionError("unreachable")


def _forget_file_systems() -> None:
    """Let later calls connect anew, with the credentials and the region that are set then."""
    for kind in {type(file_system) for file_system in tuple(_kept)}:
        kind.clear_instance_cache()
