"""What a path that a user named leads to. The answer is yes, no or a sentence, whatever was typed.

`Path.is_file` raises an OSError for a name that is too long or lies in a folder that may not be entered, and a
ValueError for one with a NUL.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from clip_rd_edge.errors import InputError

AnyPath = str | os.PathLike[str]


def as_text(value: Any) -> Any:
    """Return a path object as text, and any other value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def is_file(path: AnyPath) -> bool:
    """Return whether this is a regular file; raises as `exists`."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: AnyPath) -> bool:
    """Return whether this is a folder; raises as `exists`."""
    return stat.S_ISDIR(_mode(path))


def exists(path: AnyPath) -> bool:
    """Return whether there is anything at this path.

    Raises:
        InputError: the system cannot tell, since the path is too long, for example.
    """
    return _mode(path) != 0


def _mode(path: AnyPath) -> int:
    """Return the type and the permissions of what is at a path, or 0 if there is nothing."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        # EINVAL: on Windows, a name that no file can have, such as hf-hub:ORG/REPO.
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            return 0
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"Cannot read {os.fspath(path)!r}: {reason}.", hint="check the path") from error
