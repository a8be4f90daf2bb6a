"""What went wrong with a request to a store of shards, in words: each library raises errors of its own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import queue
import re
import ssl
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from clip_rd_edge.data.tar import TarScan
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError, UnreachableError, UsageError, causes
from clip_rd_edge.utils.files import disk_full_error, now_in
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import URL, Typed, cache_home
from clip_rd_edge.utils.text import shown_message, shown_source

_CREDENTIALS_HINT = (
    "check the credentials that its store expects, such as AWS_PROFILE for s3:// or HF_TOKEN for hf://, and renew them "
    "if they have expired"
)
# botocore's errors about a profile, or a login, that is not there; those about credentials say so in their names.
_CREDENTIALS_ERRORS = ("ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError")
# Further ones about settings, beside ValueErrors.
_SETTINGS_ERRORS = ("ParamValidationError", "InvalidConfigError", "ConfigParseError", "ConfigNotFound", "NoRegionError")
_ERRNO = re.compile(r"^\[Errno \d+\] ")


def refusal(url: str, error: BaseException) -> InputError | None:
    """Return the error for what no later try would change, if this is such an answer."""
    status, reason, shard = http_status(error), reason_of(error, url), shown_source(url)
    names = {type(cause).__name__ for cause in causes(error)}
    # fsspec raises FileNotFoundError also for servers that cannot be reached; the cause is the difference.
    if status == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
        return InputError(f"The shard {shard} does not exist{f': {reason}' if 'bucket' in reason else ''}.")
    if any("Credential" in name for name in names) or names.intersection(_CREDENTIALS_ERRORS):
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=_CREDENTIALS_HINT)
    if status in (401, 403) or isinstance(error, PermissionError):
        hint = _CREDENTIALS_HINT
        if "request time" in reason:  # such as "The difference between the request time and the current time …"
            hint = "set this machine's clock, with which requests are signed"
        elif is_web(url) and "?" in url:
            hint = "its signature may have expired: name the shards by new URLs, which {resume} takes, too"
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=hint)
    if status in (301, 400) and (region := _bucket_region(error)):
        return InputError(
            f"The bucket of the shard {shard} is in the region {region}, but was looked for in another one.",
            hint=f"set the region: AWS_DEFAULT_REGION={region}",
        )
    if status == 400 and not is_web(url):  # so S3 answers to a token that has expired
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=_CREDENTIALS_HINT)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
        why = next(filter(None, (getattr(cause, "verify_message", "") for cause in causes(error))), reason)
        return InputError(
            f"The shard {shard} could not be fetched: its server's certificate is refused: {why}.",
            hint="check this machine's clock, or name a file with your network's certificates: SSL_CERT_FILE, for "
            "s3:// AWS_CA_BUNDLE",
        )
    if names.intersection(_SETTINGS_ERRORS) or any(map(_is_invalid_value, (error, error.__cause__))):
        return InputError(
            f"The shard {shard} could not be fetched: {reason}.",
            hint="check its address, and the settings of its store, such as AWS_ENDPOINT_URL for s3://",
        )
    return None


def is_web(url: str) -> bool:
    """Return whether a URL is that of a web server, and not of a store with a protocol of its own."""
    return url.startswith(("http://", "https://"))


def _is_invalid_value(error: BaseException | None) -> bool:
    """Return whether an error is about an address or a setting, and not about an answer that is no JSON, or no text."""
    return isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeError))


def _bucket_region(error: BaseException) -> str | None:
    """Return the region that an S3 store names in its answer to a request in another one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            region: str | None = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
            return region
    return None


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore, huggingface_hub or gcsfs, if there is one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for status in (getattr(cause, "status", None), getattr(response, "status_code", None), _gcs_status(cause)):
            if isinstance(status, int):
                return status
    return None


def _gcs_status(error: BaseException) -> int | None:
    if type(error).__name__ == "HttpError":
        return getattr(error, "code", None)
    # gcsfs says no more of a refusal than that.
    return 403 if type(error) is OSError and str(error).startswith("Forbidden: ") else None


def reason_of(error: BaseException, url: str = "") -> str:
    """Return the first line that an error says, or one of its causes, if it says nothing but the shard's URL.

    So do fsspec's errors on servers that cannot be reached; its time-outs say nothing at all.
    """
    texts = (_ERRNO.sub("", str(cause).strip()) for cause in causes(error))
    text = next((text for text in texts if text not in ("", url)), type(error).__name__)
    first, *others = text.splitlines()
    return shown_message(f"{first} {others[0].strip()}" if first.endswith(":") and others else first).rstrip(".")


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
