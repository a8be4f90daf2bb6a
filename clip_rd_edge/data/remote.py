"""Shards in object stores, on web servers and behind shell commands: their versions, and how they are fetched.

`s3://`, `gs://`, `https://`, `hf://` and whatever else fsspec reads, and `pipe:COMMAND` as in open_clip. A shard is
fetched whole, in parts that are each tried again when they fail, into a file that `data.shard_files` keeps.
"""

from __future__ import annotations

import json
import math
import os
import re
import ssl
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from clip_rd_edge.data.load import PIPE
from clip_rd_edge.data.tar import TarScan
from clip_rd_edge.errors import InputError, MissingExtraError, causes, needs_extra
from clip_rd_edge.utils.files import disk_full_error
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.text import shown_message, shown_source

_PART_BYTES = 8 << 20
_VERSION_TRIES = 4
_REQUESTING_THREADS = 16
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
T = TypeVar("T")
R = TypeVar("R")
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


def in_threads(function: Callable[[T], R], items: Sequence[T], *, threads: int) -> Iterator[R]:
    """Map as `map` does, by threads that end with the process.

    An executor's threads would keep a stopped process alive for as long as a store does not answer.
    """
    with ThreadPool(min(threads, len(items))) as pool:
        yield from pool.imap(function, items)


def ask_servers(shards: Sequence[ShardFile]) -> None:
    """Ask servers for the versions of shards, in parallel, also when they were asked before."""
    if urls := list(dict.fromkeys(shard.url for shard in shards if isinstance(shard, RemoteShard))):
        _forget_listings()
        found = in_threads(_remote_version, urls, threads=_REQUESTING_THREADS)
        _known_versions.update(zip(urls, found, strict=True))


def version(shard: ShardFile) -> Version:
    """Return the version of a shard, a remote one's as of when it was last asked for; raises InputError."""
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
    info: dict[str, Any] = _with_retries(url, partial(file_system.info, path))
    size = info.get("size")
    keys = [key for key in _VERSION_KEYS if key in info] or [key for key in _OTHER_VERSION_KEYS if key in info]
    return Version(-1 if size is None else int(size), " ".join(str(info[key]) for key in keys))


def _forget_listings() -> None:
    """Let file systems that cache the listing of a folder, as huggingface_hub's does, ask for it anew."""
    for file_system in tuple(_kept):
        file_system.invalidate_cache()


def shard_identity(shard: ShardFile) -> str:
    """Return a text that changes when a shard does: its location and its version."""
    size, mark = version(shard)
    location = str(shard.resolve()) if isinstance(shard, Path) else shard.url
    if location.startswith(PIPE):  # what a command writes depends on where it runs
        location = f"{location}\n{Path.cwd()}"
    return f"{location}\n{size}\n{mark}"


def fetch(shard: RemoteShard, part: Path) -> None:
    """Fetch a shard into a file."""
    if shard.url.startswith(PIPE):
        _with_retries(shard.url, partial(_run_command, shard, part), delays=_RETRY_DELAYS_S[:3], limit_s=math.inf)
        return
    expected = version(shard)
    file_system, path = _file_system(shard.url)
    if expected.size < 0:  # a server that does not say how long the file is cannot send parts of it
        _with_retries(shard.url, lambda: file_system.get_file(path, str(part)), limit_s=math.inf)
    else:
        with part.open("wb") as file:
            for start in range(0, expected.size, _PART_BYTES):
                stop = min(start + _PART_BYTES, expected.size)
                file.write(_with_retries(shard.url, partial(_part, file_system, path, start, stop)))
    # Also tells one that was replaced since it was indexed, and then left the cache. It is asked for more than once, as
    # each machine of a server farm may give the same file a mark of its own.
    for _ in range(_VERSION_TRIES):
        _forget_listings()
        if _remote_version(shard.url) == expected:
            return
    raise InputError(f"{shard} has changed while it was read.", hint="try again")


def _part(file_system: Any, path: str, start: int, stop: int) -> bytes:
    content: bytes = file_system.cat_file(path, start=start, end=stop)
    if len(content) != stop - start:
        # A server that ignores the range sends the whole file.
        if len(content) >= stop:
            return content[start:stop]
        raise OSError(f"{len(content):,} bytes came where {stop - start:,} were asked for")
    return content


def _run_command(shard: RemoteShard, part: Path) -> None:
    command = shard.url.removeprefix(PIPE)
    with part.open("wb") as file:
        result = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    failure = f"exit status {result.returncode}" if result.returncode else ""
    if not failure:
        # Of commands joined by |, the shell tells the last one's exit status alone: another's failure cuts the output.
        scan = TarScan(lambda: os.open(part, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        deque(scan, maxlen=0)
        failure = scan.damage if scan.is_cut_off else ""
    if failure:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{failure}{': ' + lines[-1] if lines else ''}")


def _file_system(url: str) -> tuple[Any, str]:
    purpose = f"Reading {shown_source(url)}"
    with needs_extra("fsspec", extra="remote", purpose=purpose):
        import fsspec
    try:
        file_system, path = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        package = error.name or f"the fsspec package for {url.split('://')[0]}"
        raise MissingExtraError(package, extra="remote", purpose=purpose) from error
    except ValueError as error:
        raise InputError(
            f"{shown_source(url)} cannot be read: {reason_of(error)}.", hint="use s3://, gs://, https:// or hf://"
        ) from error
    _kept.add(file_system)
    return file_system, path


def _options(url: str) -> dict[str, Any]:
    """Return options for the file system of a URL, beside those of fsspec's configuration, which they would replace.

    A call that a store does not answer fails within some two minutes, the library's own tries included: where each of
    three layers tries again, their times would multiply to hours.
    """
    import fsspec

    def configured(option: str, *protocols: str) -> dict[str, Any]:
        settings = [fsspec.config.conf.get(protocol, {}).get(option, {}) for protocol in protocols]
        return dict(settings[-1] or settings[0])

    if url.startswith(("s3://", "s3a://")):  # s3fs still tries five times, for 15 s each
        return {"config_kwargs": {**configured("config_kwargs", "s3", "s3a"), "retries": {"total_max_attempts": 1}}}
    if not url.startswith(("gs://", "gcs://")) and not _is_web(url):
        return {}
    import aiohttp

    silence_s = _READ_TIMEOUT_S if _is_web(url) else _GCS_READ_TIMEOUT_S
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=silence_s)
    if not _is_web(url):
        return {"requests_timeout": limits}
    # trust_env: the proxy of HTTPS_PROXY and NO_PROXY, and the passwords in ~/.netrc, as curl and urllib have them.
    return {"client_kwargs": {**configured("client_kwargs", "http", "https"), "timeout": limits, "trust_env": True}}


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _with_retries(
    url: str, call: Callable[[], T], *, delays: Sequence[float] | None = None, limit_s: float | None = None
) -> T:
    waits, end_s = iter(_RETRY_DELAYS_S if delays is None else delays), math.inf
    while True:
        try:
            return call()
        except Exception as error:  # each file system raises its own types
            if isinstance(error, MissingExtraError) or disk_full_error(error):  # this machine's
                raise
            end_s = min(end_s, time.monotonic() + (_RETRY_LIMIT_S if limit_s is None else limit_s))
            delay, left_s = next(waits, None), end_s - time.monotonic()
            if delay is None or left_s <= 0 or _is_final(error):
                for kind in {type(file_system) for file_system in tuple(_kept)}:
                    kind.clear_instance_cache()  # later calls connect anew, with the credentials that are set then
                problem = "does not exist" if _is_missing(error) else f"could not be fetched: {reason_of(error, url)}"
                hint = "run the command by itself: it must write a whole tar" if url.startswith(PIPE) else _REMOTE_HINT
                raise InputError(f"The shard {shown_source(url)} {problem}.", hint=hint) from error
        time.sleep(min(delay, left_s))


_REMOTE_HINT = (
    "check that it can be reached, its address, the credentials that its store expects (AWS_PROFILE for s3://, "
    "HF_TOKEN for hf://) and whether they or the signature of a URL have expired, its region (AWS_DEFAULT_REGION), "
    "this machine's clock, and certificates (SSL_CERT_FILE or AWS_CA_BUNDLE); shards that are fetched are kept"
)
_ERRNO = re.compile(r"^\[Errno \d+\] ")


def _is_missing(error: BaseException) -> bool:
    # fsspec raises FileNotFoundError also for servers that cannot be reached; the cause is the difference.
    return http_status(error) == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None)


def _is_final(error: BaseException) -> bool:
    """Return whether no later try would change an answer."""
    status, found = http_status(error), list(causes(error))
    is_refused = status is not None and 300 <= status < 500 and status not in (408, 425, 429)
    # About an address or a setting, and not about an answer that is not JSON or text.
    is_invalid = any(
        isinstance(one, ValueError) and not isinstance(one, (json.JSONDecodeError, UnicodeError))
        for one in (error, error.__cause__)
    )
    return (
        is_refused
        or is_invalid
        or _is_missing(error)
        or any(isinstance(cause, (PermissionError, ssl.SSLCertVerificationError)) for cause in found)
        or any("Credential" in type(cause).__name__ for cause in found)
    )


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore, huggingface_hub or gcsfs, if there is one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
        of_gcs = getattr(cause, "code", None) if type(cause).__name__ == "HttpError" else None
        for found in (getattr(cause, "status", None), getattr(response, "status_code", None), of_gcs):
            if isinstance(found, int):
                return found
    return None


def reason_of(error: BaseException, url: str = "") -> str:
    """Return the first line of an error's message, or of a cause's if the message is only the shard's URL.

    That is so in fsspec's errors about servers that cannot be reached; the message of its time-outs is empty.
    """
    texts = (_ERRNO.sub("", str(cause).strip()) for cause in causes(error))
    text = next((text for text in texts if text not in ("", url)), type(error).__name__)
    first, *others = text.splitlines()
    return shown_message(f"{first} {others[0].strip()}" if first.endswith(":") and others else first).rstrip(".")
