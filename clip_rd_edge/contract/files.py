"""Files and folders that are either whole or absent.

Everything is written under a temporary name beside its target, flushed, and renamed: a reader never takes a
half-written thing for a finished one, whenever the writer was killed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_rd_edge.errors import ClipRdEdgeError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Size of a file, or of all files under a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def refuse_unless_free(path: Path, *, overwrite: bool, ignoring: Collection[str] = ()) -> None:
    """Refuse an output path that is in use.

    Args:
        ignoring: names in the folder that do not count.

    Raises:
        UsageError: `path` is a file, or a folder with something in it, and `overwrite` is false.
    """
    in_use = path.is_file() or (path.is_dir() and any(each.name not in ignoring for each in path.iterdir()))
    if in_use and not overwrite:
        raise UsageError(
            f"The output {path} exists already and is not empty.",
            hint="choose another -o, or replace it with --force",
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `path` if the block ends well, replacing what stood there, else vanishes.

    What stood there is moved aside before and removed after, so that `path` is at no moment half old and half new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def full_disk(error: BaseException) -> ClipRdEdgeError | None:
    """Where `error`, or what it came of, is a disk that is full: the same in one sentence; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            where = f" for {cause.filename}" if cause.filename else ""
            return ClipRdEdgeError(
                f"There is no space left on the disk{where}; no half-written file or folder is left behind.",
                hint="free some, or choose another -o; temporary files lie where the variable TMPDIR says",
            )
        cause = cause.__cause__ or cause.__context__
    return None
