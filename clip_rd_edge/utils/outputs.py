"""Folders that are whole or absent: a new one takes its place, also that of an old one, once all of it is there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import move, named_failures, unwritable_output
from clip_rd_edge.utils.paths import exists, is_file, is_folder, kind_of

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<key>[0-9a-f]{32})\.(?P<kind>new|tmp|old)")
_MARK_DIGITS = 8  # of the key
_DAY_S = 86_400.0  # since the last change of its name, too, which a time of modification leaves out
_MANY_FILES = 64  # each is waited for, which takes milliseconds; for more, the whole system is asked once


def require_free_output(path: Path, *, overwrite: bool, replaced: bool = True, ignoring: Collection[str] = ()) -> None:
    """Refuse an output path that is in use, or where `new_folder` could not put anything.

    Args:
        replaced: whether `new_folder` will replace `path`, so that the folder around it has to be writable.
        ignoring: names of files in the folder to ignore.
    """
    try:
        if exists(path) and not (is_file(path) or is_folder(path)):
            raise UsageError(
                f"The output {path} is {kind_of(path.stat().st_mode)}; expected a folder.",
                hint="choose another {output}",
            )
        in_use = is_file(path) or (is_folder(path) and any(child.name not in ignoring for child in path.iterdir()))
    except (InputError, OSError) as error:
        raise unwritable_output(path, error) from error
    if in_use and not overwrite:
        raise UsageError(
            f"The output {path} already exists and is not empty.",
            hint="choose another {output}, or replace it with {force}",
        )
    if replaced:
        _require_replaceable(path)


def _require_replaceable(path: Path) -> None:
    around = next((folder for folder in path.absolute().parents if exists(folder)), None)
    if around is None:  # of Windows
        raise unwritable_output(path, FileNotFoundError(errno.ENOENT, f"there is no {path.absolute().anchor}"))
    if not is_folder(around):
        raise unwritable_output(path, NotADirectoryError(errno.ENOTDIR, f"{around} is a file"))
    # Path.is_mount knows no Windows before Python 3.12; of ".", both would say yes.
    if os.path.ismount(path.resolve()):
        raise UsageError(
            f"The output {path} is where a volume is mounted, which cannot be replaced.",
            hint=f"name a folder in it: {{output}} {path / 'new'}",
        )
    if not os.access(around, os.W_OK | os.X_OK):
        raise unwritable_output(path, PermissionError(errno.EACCES, f"the folder {around} cannot be written to"))


def require_apart(output: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that replaces a folder in which something is that is still needed.

    Args:
        output: a folder that `new_folder` will replace.
        sources: what the output is made from; those that do not exist are ignored.
    """
    place = output.resolve()
    for source in sources:
        with suppress(InputError):  # no path, such as a long label; whoever reads it says so
            if not exists(source) or place not in (source.resolve(), *source.resolve().parents):
                continue
            relation = "is" if place == source.resolve() else "contains"
            raise UsageError(
                f"The output {output} {relation} {source}, which it would replace.", hint="choose another {output}"
            )
    if place in (Path.cwd(), *Path.cwd().parents):
        relation = "is" if place == Path.cwd() else "contains"
        raise UsageError(f"The output {output} {relation} the working folder.", hint="name a new folder in it")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds and removed otherwise.

    Its content is on the disk before it is renamed, so that a power failure leaves no folder of empty files. An
    existing file or folder at `path` is moved aside first and removed last, so `path` never mixes old and new files; it
    is moved back if the new one cannot take its place. Temporary folders that killed processes of this machine left are
    removed, and those of others after a day; what they moved aside, once the new one has its place: until then, it may
    be all that there is.

    Args:
        overwrite: if false, what another process has put there meanwhile is kept.
    """
    temporary = _beside(path, "tmp")
    with ExitStack() as stack:
        with named_failures(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            unheld = temporary.with_suffix(".new")
            stack.callback(_remove, unheld)
            unheld.mkdir()
            stack.enter_context(_held(unheld))
            stack.callback(_remove, temporary)
            move(unheld, temporary)  # only now, as nobody removes what is held
            _remove_abandoned(path, own=temporary)
        yield temporary
        _sync(temporary)
        old = _beside(path, "old")
        require_free_output(path, overwrite=overwrite, replaced=False)
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


def _beside(path: Path, kind: str) -> Path:
    """Return a new name for what `new_folder(path)` has beside it, which begins with this machine's mark."""
    return path.with_name(f".{path.name}.{_mark()}{uuid.uuid4().hex[_MARK_DIGITS:]}.{kind}")


def _mark() -> str:
    import platform

    return hashlib.sha256(platform.node().encode(errors="surrogateescape")).hexdigest()[:_MARK_DIGITS]


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Within the block, a folder is locked, unless folders cannot be, as on Windows and on network shares.

    Yields:
        Whether it is locked.
    """
    try:
        import fcntl

        file = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except BlockingIOError:
            raise
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(file)


def _remove_abandoned(path: Path, *, own: Path) -> None:
    """Remove others' temporary folders of `new_folder(path)` that no process holds; after a day where none can."""
    for folder in _leftovers(path, "tmp"):
        if folder != own and folder.is_dir():
            with suppress(OSError), _held(folder) as is_held:  # somebody else holds it, or has removed it
                if is_held or time.time() - folder.stat().st_ctime > _DAY_S:
                    _remove(folder)


def _leftovers(path: Path, kind: str) -> list[Path]:
    """Return what `new_folder(path)` calls `.tmp` or `.old`, of this process and of others; empty if that is secret.

    What another machine has there is among them after a day: on some network file systems, each sees its own locks
    alone, and would take for abandoned what the other is writing. Containers, which have a new name each time, leave
    theirs for good otherwise.
    """
    with suppress(OSError):
        named = [(other, _LEFTOVER.fullmatch(other.name)) for other in path.parent.iterdir()]
        return [
            other
            for other, match in named
            if match
            and (match["name"], match["kind"]) == (path.name, kind)
            and (match["key"].startswith(_mark()) or time.time() - other.lstat().st_ctime > _DAY_S)
        ]
    return []


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link if it is there; what cannot be removed is a leftover, and no reason to fail."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            _make_writable(path)
            shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _make_writable(folder: Path) -> None:
    """Make what is in a folder removable by its owner, who may have protected it."""
    with suppress(OSError):
        folder.chmod(0o700)
        for path in folder.rglob("*"):
            if not path.is_symlink() and (path.is_dir() or os.name == "nt"):
                path.chmod(0o700)


def _sync(folder: Path) -> None:
    """Wait until the files in a folder are on the disk."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in files:
        with path.open("rb" if os.name == "posix" else "rb+") as file:  # a copied file may be read-only
            os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of unfinished files and folders in `folder`, where nobody else writes files.

    A folder that another process is writing there, such as an export into a run's folder, stays where folders can be
    locked. What `new_folder` had moved aside without having put the new one in its place is moved back.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old" and not path.with_name(match["name"]).exists():
            move(path, path.with_name(match["name"]))
        elif path.is_dir() and not path.is_symlink():
            with suppress(BlockingIOError), _held(path):
                shutil.rmtree(path)
        else:
            path.unlink()


LOCK_FILE = ".lock"
_POLL_S = 0.1
# How often a folder that goes while it is made is made again. One that never stays is behind a link to nothing, or on a
# drive that is not there.
_ATTEMPTS, _PAUSE_S = 100, 0.01
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 1 << 30  # on Windows: no other process can read what is locked, which the content is not to be
_IS_WINDOWS = os.name == "nt"
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends
_held_locks: set[int] = set()  # file descriptors


def _forget_in_child() -> None:
    """Close the locks that a forked process inherits: they would outlast the process that holds them."""
    for file in _held_locks:
        os.close(file)
    _held_locks.clear()


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
    _held_locks.add(file)
    try:
        yield True
    finally:
        # Removed while locked: a process that has opened it meanwhile notices that the file is gone and retries.
        if file in _held_locks:  # not in a process that was forked meanwhile
            with contextlib.suppress(OSError):
                path.unlink()
            _held_locks.remove(file)
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
