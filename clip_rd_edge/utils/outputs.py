"""Folders that are whole or absent, with one writer at a time."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import move, named_failures
from clip_rd_edge.utils.paths import exists, is_file, is_folder, kind_of

if TYPE_CHECKING:
    from filelock import FileLock

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.(?P<kind>tmp|old)")
_DAY_S = 86_400.0
_MANY_FILES = 64  # each is waited for, which takes milliseconds; for more, the whole system is asked once


def require_free_output(path: Path, *, overwrite: bool, ignoring: Collection[str] = ()) -> None:
    """Refuse an output path that is in use.

    Args:
        ignoring: names of files in the folder to ignore.
    """
    with named_failures(path):
        if exists(path) and not (is_file(path) or is_folder(path)):
            kind = kind_of(path.stat().st_mode)
            raise UsageError(f"The output {path} is {kind}; expected a folder.", hint="choose another {output}")
        in_use = is_file(path) or (is_folder(path) and any(child.name not in ignoring for child in path.iterdir()))
    if in_use and not overwrite:
        raise UsageError(
            f"The output {path} already exists and is not empty.",
            hint="choose another {output}, or replace it with {force}",
        )


def require_apart(output: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that `new_folder` would put in the place of one of the sources, or of the working folder."""
    for source in (*sources, Path.cwd()):
        with suppress(InputError):  # not a path, such as a long label; whoever reads it reports it
            if exists(source) and output.resolve() in (source.resolve(), *source.resolve().parents):
                relation = "is" if output.resolve() == source.resolve() else "contains"
                raise UsageError(
                    f"The output {output} {relation} {source}, which it would replace.", hint="choose another {output}"
                )


@contextmanager
def new_folder(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds and removed otherwise.

    Its content is on the disk before it is renamed, so that a power failure leaves no folder of empty files. An
    existing file or folder at `path` is moved aside first and removed last, so `path` never mixes old and new files; it
    is moved back if the new one cannot take its place. Temporary folders that killed processes left are removed after a
    day, since another process may be at work in a younger one; what these had moved aside is removed once the new
    folder has its place: until then, it may be all that there is.
    """
    if os.path.ismount(path.resolve()):  # Path.is_mount does not work on Windows before Python 3.12
        raise UsageError(
            f"The output {path} is where a volume is mounted, which cannot be replaced.",
            hint=f"name a folder in it: {{output}} {path / 'new'}",
        )
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}") for kind in ("tmp", "old"))
    try:
        with named_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        for other in _leftovers(path, "tmp"):
            with suppress(OSError):
                if time.time() - other.stat().st_ctime > _DAY_S:
                    _remove(other)
        with named_failures(path):
            temporary.mkdir()
        yield temporary
        _sync(temporary)
        require_free_output(path, overwrite=overwrite)
        with named_failures(path):
            if path.exists():
                move(path, old)
            try:
                move(temporary, path)
            except BaseException:
                if old.exists():
                    move(old, path)
                raise
        for replaced in {old, *_leftovers(path, "old")}:
            _remove(replaced)
    finally:
        _remove(temporary)


def _leftovers(path: Path, kind: str) -> list[Path]:
    """Return what `new_folder(path)` calls `.tmp` or `.old`, of this process and of others; empty if that is secret."""
    with suppress(OSError):
        named = [(other, _LEFTOVER.fullmatch(other.name)) for other in path.parent.iterdir()]
        return [other for other, match in named if match and match.group("name", "kind") == (path.name, kind)]
    return []


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link if it is there; what cannot be removed is a leftover, and no reason to fail."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in files:
        with path.open("rb" if os.name == "posix" else "rb+") as file:  # a copied file may be read-only
            os.fsync(file.fileno())


def remove_leftovers(folder: Path, *, of: Collection[str] | None = None) -> None:
    """Remove what killed processes left of unfinished files and folders in `folder`, where nobody else writes files.

    What `new_folder` had moved aside without having put the new one in its place is moved back.

    Args:
        of: the names of the folders that nobody else writes there either, such as an export; None for any.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (of is not None and path.is_dir() and match["name"] not in of):
            continue
        if match["kind"] == "old" and not path.with_name(match["name"]).exists():
            move(path, path.with_name(match["name"]))
        else:
            _remove(path)


LOCK_FILE = ".lock"
_POLL_S = 0.1
# How often a folder that goes while it is made is made again: its last writer removes it if it is empty.
_ATTEMPTS, _PAUSE_S = 100, 0.01
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def exclusive_writer(
    folder: Path,
    *,
    on_wait: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    option: str = "{output}",
) -> Iterator[bool]:
    """Lock a folder, creating it if it is missing, against other processes that use this lock.

    Afterwards the lock file is removed, and so is the folder if it was created here and is still empty. Nothing is
    locked on a file system without locks, as some of clusters are.

    Args:
        on_wait: if another process holds the lock, called once with a sentence about it, and the lock is waited
            for; None does not wait.
        stop: ends the wait when it is set.
        option: that names the folder, in a hint.

    Yields:
        Whether the folder may be written: False only if `stop` has ended the wait.
    """
    from filelock import FileLock  # takes 50 ms, and most commands lock nothing

    created = not exists(folder)
    # Without locks, no marker in place of one, which a kill would leave there.
    lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        with named_failures(folder, hint=f"choose another {option}"):
            may_write = _acquire(lock, on_wait, stop or threading.Event())
        yield may_write
    finally:
        try:
            if lock.is_locked:
                # Removed while locked: a process that has opened it meanwhile sees that the file is gone and retries.
                with suppress(OSError):
                    (folder / LOCK_FILE).unlink()
        finally:
            lock.release()
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _acquire(lock: FileLock, on_wait: Callable[[str], None] | None, stop: threading.Event) -> bool:
    """Wait for a lock; return whether the folder may be written, which it may not if `stop` has ended the wait."""
    from filelock import Timeout

    path, waiting, attempts = Path(lock.lock_file), False, 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # not filelock, which makes what a link leads to
            lock.acquire()
        except Timeout as held:
            holder = ""
            with suppress(OSError, ValueError):
                holder = f", process {int(path.read_text())}"
            message = f"{path.parent} is being written by another run{holder}"
            if on_wait is None:
                raise UsageError(f"{message}.", hint="wait until it finishes, or choose another {output}") from held
            if not waiting:
                on_wait(f"{message}: waiting for it")
            waiting = True
            if stop.wait(_POLL_S):
                return False
        except (FileNotFoundError, FileExistsError):
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with suppress(OSError):
                path.unlink()
            return True
        else:
            with suppress(OSError):  # a full disk; on Windows, nothing can be written to what is locked
                path.write_text(str(os.getpid()))
            return True
