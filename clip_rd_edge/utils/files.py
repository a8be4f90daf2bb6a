"""Files that are whole or absent, and the sentences for what goes wrong with them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from clip_rd_edge.errors import ClipRdEdgeError, DiskFullError, InputError, UnreachableError, UsageError, causes
from clip_rd_edge.utils.paths import cache_home, near_files
from clip_rd_edge.utils.text import is_unicode

T = TypeVar("T")
MAX_TEXT_BYTES = 1 << 24  # of a list of names or templates
_IS_WINDOWS = os.name == "nt"
_PATIENCE_S, _PAUSE_S = 5.0, 0.02  # for other programs to close a file, on Windows
_DIGEST_BYTES = hashlib.sha256().digest_size  # before what a cache keeps
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, reading it in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files under a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def is_plain_name(name: str) -> bool:
    """Return whether `name`, read from a file, is a relative path with / as separator that stays in its folder.

    Backslashes and colons are refused on every system, since they separate folders and drives on some.
    """
    return (
        bool(name)
        and not any(character in "\\:" or not character.isprintable() for character in name)
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file that replaces `path` if the block succeeds, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            move(temporary, path)
        except PermissionError as error:
            if not _IS_WINDOWS:
                raise
            raise unwritable_output(path, error, hint="close it there, and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, perhaps to the name of a file that it replaces."""
    try:
        _patiently(lambda: source.replace(target))
    except PermissionError:
        if not _IS_WINDOWS:
            raise
        reason = "another program has it open, or it may not be changed"
        raise PermissionError(errno.EACCES, reason, str(target)) from None


def _patiently(act: Callable[[], T]) -> T:
    """Return `act()`; on Windows, try for some seconds if it is refused.

    There, no file can be replaced while a process has it open, such as a search that reads an index, or a virus
    scanner, and none can be opened just when it is replaced.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act()
        except PermissionError:
            if not _IS_WINDOWS or time.monotonic() > end:
                raise
        time.sleep(_PAUSE_S)


def write_bytes(path: Path, *content: bytes | memoryview) -> None:
    """Write a file of one or several parts atomically, creating its folder if it is missing."""
    with new_file(path) as file:
        file.writelines(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def read_cached(path: Path) -> bytes | None:
    """Return what `write_cached` wrote, or None if there is nothing, or something damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(kept).digest() != digest:
        return None
    with suppress(OSError):  # a read-only cache
        os.utime(path)
    return kept


def write_cached(path: Path, content: bytes, *, max_bytes: int) -> None:
    """Write a file of a cache, whose least recently used files beyond `max_bytes` are deleted.

    Silently do nothing if the content is larger than that, or cannot be written.
    """
    if _DIGEST_BYTES + len(content) > max_bytes:
        return
    with suppress(OSError):
        write_bytes(path, hashlib.sha256(content).digest() + content)
        files = []
        for other in path.parent.iterdir():  # another process may delete some at the same time
            with suppress(FileNotFoundError):
                seen = other.stat()
                files.append((seen.st_mtime_ns, seen.st_size, other))
        total = sum(size for _, size, _ in files)
        for _, size, other in sorted(files):
            if total <= max_bytes:
                return
            other.unlink(missing_ok=True)
            total -= size


def require_utf8_path(path: Path) -> None:
    """Refuse a path for a model that is not UTF-8: safetensors cannot write its weights there."""
    if not is_unicode(str(path.absolute())):
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UsageError(f"The path of {shown} is not UTF-8, as weights need.", hint="choose another {output}")


def unwritable_output(path: Path, error: Exception, *, hint: str = "choose another -o") -> UsageError:
    """Return the error for an output that cannot be written, or for a place in the cache, which no -o has named."""
    cause = error.__cause__ or error
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    if cache_home() in path.parents:
        return UsageError(
            f"The cache {path} cannot be written: {reason}.", hint="name another folder with CLIP_RD_EDGE_CACHE"
        )
    return UsageError(f"The output {path} cannot be written: {reason}.", hint=hint)


@contextmanager
def named_failures(output: Path, *, hint: str = "choose another -o") -> Iterator[None]:
    """Within the block, a system error, other than of a full disk, becomes one that the output cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise unwritable_output(output, error, hint=hint) from error


def disk_full_error(error: BaseException) -> DiskFullError | None:
    """Return a one-sentence error if `error` or one of its causes is a full disk, else None.

    What an UnreachableError was raised from does not count: its own message names what is full, and what helps there.
    """
    for cause in causes(error):
        if isinstance(cause, UnreachableError):  # the cache of shards, or the memory that processes share
            return None
        if isinstance(cause, DiskFullError):
            return cause
        if _errno(cause) in _DISK_FULL:
            filename = getattr(cause, "filename", None)
            where = f" for {filename}" if filename else ""
            problem = f"There is no space left on the disk{where}"
            hint = "free some space, or choose another {output}; temporary files are written to the folder in TMPDIR"
            if _errno(cause) == errno.EFBIG:
                problem = f"A file{where} is larger than its file system, or a limit of this shell, allows"
                hint = "see ulimit -f, or choose another {output}; FAT keeps no file of 4 GB"
            return DiskFullError(f"{problem}.", hint=hint)
    return None


_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
# What the system says when the machine, a disk or the network fails, and not when something is wrong with a file. Not
# every system has all of them.
_NAMES = (
    "EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "EREMOTEIO", "ENXIO", "ENODEV", "ENOTCONN", "ETIMEDOUT",
    "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
)  # fmt: skip
_FAILURES = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}


def machine_failure(error: BaseException) -> UnreachableError | None:
    """Return a one-sentence error if `error` or one of its causes shows that a machine, disk or network fails."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _FAILURES:
            what = f"Cannot read or write {cause.filename or 'a file'}: {cause.strerror}"
            if isinstance(error, ClipRdEdgeError):
                what = str(error)
            advice = "; raise their limit first: ulimit -n 4096" if cause.errno in _TOO_MANY_FILES else ""
            return UnreachableError(f"{what.rstrip('.')}{advice}.")
        if _NO_THREAD.search(str(cause)):
            return UnreachableError(
                "The system starts no further thread or process; raise their limit first: ulimit -u, or --pids-limit "
                "of a container."
            )
    return None


# How Python, and libraries in Rust and C++, report that a thread cannot be started; the latter is the system's EAGAIN.
_NO_THREAD = re.compile("can't start new thread|Resource temporarily unavailable")


# How libraries in Rust, such as safetensors and tokenizers, report an error of the operating system.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _RUST_ERROR.search(str(error))
    return int(match[1]) if match else None


def _open_to_read(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except PermissionError:
        if path.is_dir():  # which Windows says of a folder, too
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
        raise


def read_limited(path: Path, max_bytes: int, *, hint: str = "") -> bytes:
    """Return the content of a file, or raise InputError if it cannot be read; or with the hint, if it is too large.

    The size of a regular file is checked before it is read; a device or a pipe is read up to the limit.
    """
    try:
        with _patiently(lambda: _open_to_read(path)) as file:
            status = os.fstat(file.fileno())
            is_regular = stat.S_ISREG(status.st_mode)
            too_large = is_regular and status.st_size > max_bytes
            content = b"" if too_large else file.read() if is_regular else file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read {path}: {reason}.{near_files(path)}", hint="check the path") from error
    if too_large or len(content) > max_bytes:
        raise InputError(f"{path} is larger than the {max_bytes:,} bytes that such a file may have.", hint=hint)
    return content


def read_text_limited(path: Path) -> str:
    """Return the content of a UTF-8 text file; raise InputError as `read_limited`, or if it is not UTF-8."""
    try:
        return read_limited(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.", hint="save it as UTF-8"
        ) from error


def text_lines(text: str) -> list[str]:
    """Return the lines of a text file, without their ends (LF, CRLF or CR).

    `str.splitlines` also splits at characters that occur within texts from the web, such as U+0085 and U+2028.
    """
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def now_in(folder: Path) -> float:
    """Return the time by the clock that gives the files in a folder their times, in seconds as `time.time`.

    That of a shared folder is its server's, from which this machine's may differ by any amount.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
