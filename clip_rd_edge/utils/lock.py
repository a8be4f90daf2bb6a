"""One writer a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from clip_rd_edge.errors import UsageError

LOCK = ".lock"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within the block, no other process that asks the same may write the folder, which is made if missing.

    Afterwards the lock's file is gone, and so is the folder where it was made here and nothing was written into it.

    Raises:
        UsageError: another process writes it at this moment, or `folder` is a file.
    """
    if folder.is_file():
        raise UsageError(f"The output {folder} is a file; expected a folder.", hint="choose another -o")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _locked(path)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile sees that it holds a file that is gone.
        with contextlib.suppress(OSError):  # Windows removes no open file: there it stays, unlocked
            path.unlink()
        os.close(file)
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(file)
        except OSError as error:
            holder = os.pread(file, 32, 0).decode(errors="replace") if hasattr(os, "pread") else ""
            os.close(file)
            process = f", process {holder}" if holder.isdigit() else ""
            raise UsageError(
                f"{path.parent} is being written by another run{process}.",
                hint="wait until it is done, or choose another -o",
            ) from error
        if _is_still(path, file):
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
            return file
        os.close(file)


def _take(file: int) -> None:
    """Lock an open file, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
