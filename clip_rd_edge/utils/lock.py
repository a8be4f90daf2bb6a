"""One writer per folder: a lock that the operating system releases when its process ends, even if it crashes."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import unwritable_output
from clip_rd_edge.utils.paths import exists, is_file

LOCK_FILE = ".lock"
_POLL_S = 0.1
# How often a folder that goes while it is made is made again. One that never stays is behind a link to nothing, or on a
# drive that is not there.
_ATTEMPTS, _PAUSE_S = 100, 0.01
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 1 << 30  # on Windows: no other process can read what is locked, which the content is not to be
_IS_WINDOWS = os.name == "nt"
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends
_held: set[int] = set()  # file descriptors


def _forget_in_child() -> None:
    """Close the locks that a forked process inherits: they would outlast the process that holds them."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
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
        on_wait: if another process holds the lock, called once with a sentence that says so, and the lock is waited
            for; None does not wait.
        stop: ends the wait when it is set.
        option: that names the folder, in a hint.

    Yields:
        Whether the folder may be written: False only if `stop` has ended the wait.
    """
    path = folder / LOCK_FILE
    try:
        if is_file(folder):
            raise UsageError(f"The output {folder} is a file; expected a folder.", hint=f"choose another {option}")
        created = not exists(folder)
        file = _acquire(path, on_wait, stop or threading.Event())
    except (InputError, OSError) as error:
        raise unwritable_output(folder, error, hint=f"choose another {option}") from error
    if file is None:
        yield False
        return
    _held.add(file)
    try:
        yield True
    finally:
        # Removed while locked: a process that has opened it meanwhile notices that the file is gone and retries.
        if file in _held:  # not in a process that was forked meanwhile
            with contextlib.suppress(OSError):
                path.unlink()
            _held.remove(file)
            os.close(file)
            if _IS_WINDOWS:  # where no open file is removed: neither was this one, nor is one that another has opened
                with contextlib.suppress(OSError):
                    path.unlink()
        if created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _acquire(path: Path, on_wait: Callable[[str], None] | None, stop: threading.Event) -> int | None:
    """Return the locked file, or None if `stop` was set while another process held the lock."""
    waiting, attempts = False, 0
    while True:
        # Its last holder may remove the folder at any moment, also while `mkdir` finds out what is there already.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file, writable = _open(path)
        except (FileNotFoundError, FileExistsError):
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
            continue
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in _HELD_ELSEWHERE:
                if writable:
                    return file
                os.close(file)  # on NFS, only a file that may be written can be locked
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
            try:
                os.lseek(file, 0, os.SEEK_SET)
                holder = os.read(file, 32).decode(errors="replace")
            finally:
                os.close(file)
            process = f", process {holder}" if holder.isdigit() else ""
            message = f"{path.parent} is being written by another run{process}"
            if on_wait is None:
                raise UsageError(f"{message}.", hint="wait until it finishes, or choose another {output}") from error
            if not waiting:
                on_wait(f"{message}: waiting for it")
            waiting = True
            if stop.wait(_POLL_S):
                return None
            continue
        try:
            if _is_same_file(path, file):
                if writable:
                    os.ftruncate(file, 0)
                    os.write(file, str(os.getpid()).encode())
                    return file
                path.unlink()  # its holder was killed
        except BaseException:  # a full disk, perhaps; still open, it would lock this process itself out
            os.close(file)
            raise
        os.close(file)


def _open(path: Path) -> tuple[int, bool]:
    """Open or create a lock file; return also whether it may be written, as one of another account may not."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o644), True
    except PermissionError:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or one that may not be created
            return os.open(path, os.O_RDONLY | _BINARY), False
        return os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o644), True


def _lock(file: int) -> None:
    """Lock an open file, or raise OSError without waiting."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(file, 0, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
