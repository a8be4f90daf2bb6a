"""Paths: what one that a user named leads to, whether a text is one, and the standard places.

The answer is yes, no or a sentence, whatever was typed. `Path.is_file` raises an OSError for a name that is too long or
lies in a folder that may not be entered, and a ValueError for one with a NUL.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NewType

from clip_rd_edge.errors import InputError, UsageError, near_matches, quoted

AnyPath = str | os.PathLike[str]
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # the beginning of one; C:// begins a path of Windows
_OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}
_OF_MACOS = "._"  # before a file's name, on a disk that is not formatted for a Mac


def is_left_by_system(path: Path) -> bool:
    """Return whether a file manager or macOS, and nobody else, puts files of this name into folders."""
    return path.name in _OF_FILE_MANAGERS or path.name.startswith(_OF_MACOS)


def as_text(value: Any) -> Any:
    """Return a path object as text, and any other value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def require_paths(name: str, value: Any) -> None:
    """Raise UsageError if the option `name` is neither a path nor a list of them."""
    for path in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            hint = "pass a text or a pathlib.Path; . is this folder"
            raise UsageError(f"{name} is {path!r}; expected a path or a name.", hint=hint, option=name)


def is_file(path: AnyPath) -> bool:
    """Return whether this is a regular file; raises as `exists`."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: AnyPath) -> bool:
    """Return whether this is a folder; raises as `exists`."""
    return stat.S_ISDIR(_mode(path))


def sorted_paths(paths: Iterable[Path]) -> list[Path]:
    """Return paths in the order of their names, the same on every system: on Windows, paths compare without case."""
    return sorted(paths, key=lambda path: path.parts)


def expand_home(text: str) -> Path:
    """Return a path with ~ at its beginning replaced by the home folder; as it is, if the user does not exist.

    `Path.expanduser` raises for the latter, as for the text "~100 people".
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111


def file_identity(path: Path) -> tuple[int, int, int, int] | None:
    """Return what distinguishes a file from another in its place, or None if it cannot be read.

    Size and time are not enough: OSTree, Nix and squashfs give all files the same time, that of 1970.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def exists(path: AnyPath) -> bool:
    """Return whether there is anything at this path."""
    return _mode(path) != 0


def why_no_file(path: Path) -> str:
    """Return why a path that `is_file` denies names no file, such as `does not exist. Did you mean 'a.csv'?`."""
    if mode := _mode(path):
        return f"is {kind_of(mode)}."
    if _exists(path, Path.is_symlink):
        return "is a link to something that does not exist."
    return f"does not exist.{near_files(path)}"


def kind_of(mode: int) -> str:
    """Return what something other than a regular file is, by its mode as from `Path.stat`."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def _mode(path: AnyPath) -> int:
    """Return the type and the permissions of what is at a path, or 0 if there is nothing."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        # EINVAL: on Windows, a name that no file can have, such as hf-hub:ORG/REPO.
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            return 0
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"Cannot read {quoted(path)}: {reason}.", hint="check the path") from error


# /data, ./data, ../data, ~/data, C:\data and \\server\data; not a/b, which may be words.
_ROOTED = re.compile(r"(\.{0,2}|~)/|\.{1,2}\\|[A-Za-z]:[\\/]|\\\\")


_NAME_WITH_SUFFIX = re.compile(r"\S{1,255}\.\w{1,5}")


def looks_like_path(text: str, *, suffixes: Collection[str]) -> bool:
    """Return whether a text that could also be words was probably meant as a path.

    It was if it begins like one, ends in one of `suffixes`, has a / after the name of an existing folder, or is one
    word with a suffix that is close to the name of an existing file.
    """
    folder, slash, _ = text.rpartition("/")
    return bool(
        _ROOTED.match(text)
        or text.lower().endswith(tuple(suffixes))
        or (slash and _exists(Path(folder), Path.is_dir))
        or (_NAME_WITH_SUFFIX.fullmatch(text) and near_files(Path(text)))
    )


_MAX_COMPARED = 5_000


def near_files(path: Path) -> str:
    """Return ` Did you mean …?` with the files in the folder of a missing file whose names are close to its own.

    Empty if the folder cannot be listed, as that of others' homes, or has more files than are compared in a moment.
    """
    try:
        with os.scandir(path.parent) as files:
            listed = [file.name for file in itertools.islice(files, _MAX_COMPARED + 1)]
    except (OSError, ValueError):
        return ""
    if len(listed) > _MAX_COMPARED:
        return ""
    prefix = "" if path.parent == Path() else f"{path.parent}{os.sep}"
    # Its own name is among them if it is a link that leads nowhere.
    names = [name for name in listed if not name.startswith(".") and name != path.name]
    return near_matches(path.name, names, prefix=prefix)


def _exists(path: Path, predicate: Callable[[Path], bool]) -> bool:
    try:
        return predicate(path)
    except (OSError, ValueError):
        return False


def cache_home() -> Path:
    """Return $CLIP_RD_EDGE_CACHE, or else `clip-rd-edge` in the user's cache folder; it may not exist yet."""
    if override := os.environ.get("CLIP_RD_EDGE_CACHE"):
        return Path(override)
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent) / "clip-rd-edge"
    try:
        home = Path.home()
    except RuntimeError:  # a service under a number that no account has: the root is its home, as containers set it
        home = Path(os.sep)
    return home / ".cache" / "clip-rd-edge"


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_path(name: str) -> Path:
    """Return the location of a shipped file or folder, such as `benchmarks/suites/quickstart.yaml`."""
    installed = _PACKAGE / "_shipped" / name
    return installed if installed.exists() else _PACKAGE.parent / name


Typed = NewType("Typed", str)


def typed(place: str | os.PathLike[str]) -> Typed:
    """Return what was typed in this call, or a path that this program made, as such: for callers that know that."""
    return Typed(os.fspath(place))


def several(places: AnyPath | Sequence[AnyPath]) -> tuple[Typed, ...]:
    """Return places that were typed as texts, of which there may be any number."""
    each = places if isinstance(places, tuple | list) else (places,)
    return tuple(typed(place) for place in each)


class Recorded:
    """A place that a file records, in a struct that is read from it: compared and shown, and never opened.

    It is not a text, so that nothing that takes a path takes it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str | list[str]) -> None:
        self._value = value

    def plain(self) -> str | list[str]:
        """Return the recorded text, to compare it, to show it and to write it again."""
        return self._value
