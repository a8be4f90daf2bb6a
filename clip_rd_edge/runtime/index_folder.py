"""The image folder of an index: its images, which of them are new or moved, and which are only out of sight."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from clip_rd_edge.bundle.image_files import look_at_images
from clip_rd_edge.bundle.images import DANGLING, require_image
from clip_rd_edge.runtime.index import Entry
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.text import is_unicode

_SECOND_NS = 1_000_000_000
_COARSE_S = 2.0  # FAT keeps times to two seconds
_LARGE_BYTES = 1 << 26  # what is larger is looked at before all of it is read into memory
_UNSURE = -1  # a modification time that the next update does not trust
Stamp = tuple[int, int, int]  # size in bytes, and times of modification and change in nanoseconds
_NO_STAMP = (-1, -1, -1)  # of a file that cannot be looked at


class Listing:
    """The images of a folder, by their path in it.

    Attributes:
        stamps: of the images; _NO_STAMP of those that cannot be looked at.
        messages: about these, by their path.
        others: messages about folders that cannot be read, and names that are not UTF-8.
        began: when, as `time.monotonic` has it.
    """

    def __init__(self, folder: Path) -> None:
        self.began = time.monotonic()
        self.stamps, self.messages, self.others = dict[str, Stamp](), dict[str, str](), list[str]()
        start = len(os.fspath(folder / "_")) - 1  # relative_to would take half of the time
        for path, found in look_at_images(folder, on_unreadable=lambda error: self.others.append(str(error))):
            name = os.fspath(path)[start:].replace(os.sep, "/")
            if not is_unicode(name):
                shown = os.fsencode(path).decode(errors="backslashreplace")
                self.others.append(f"The name of {shown} is not UTF-8: rename it to have it indexed.")
            elif found is not None:
                self.stamps[name] = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            elif reason := _why_not_there(path):
                self.stamps[name], self.messages[name] = _NO_STAMP, f"Cannot read the image {path}: {reason}."


def _why_not_there(path: Path) -> str:
    """Return why a listed file cannot be looked at, or an empty string if it is gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return DANGLING if path.is_symlink() else ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Source:
    """An image file whose SHA-256 is computed when its content is read, so that it is read only once."""

    def __init__(self, folder: Path, name: str, stamp: Stamp) -> None:
        self.path, self.name = folder / name, name
        self.size_bytes, self.modified_ns, self.changed_ns = stamp
        # Where times are whole seconds, a change just after the file was read would not show.
        if self.modified_ns % _SECOND_NS == 0 and abs(time.time() - self.modified_ns / 1e9) <= _COARSE_S:
            self.modified_ns = _UNSURE
        self.sha256 = ""

    def read_bytes(self) -> bytes:
        if self.size_bytes > _LARGE_BYTES:
            require_image(self.path)
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        return content

    def entry(self, sha256: str = "") -> Entry:
        return Entry(
            path=self.name,
            size_bytes=self.size_bytes,
            modified_ns=self.modified_ns,
            sha256=sha256 or self.sha256,
            changed_ns=self.changed_ns,
        )

    def __str__(self) -> str:
        return str(self.path)


def compare(known: list[Entry], sources: list[Source]) -> tuple[list[tuple[Entry, int]], list[Source]]:
    """Split the files into those already in the index, with their rows, and those to embed."""
    rows = {entry.path: row for row, entry in enumerate(known)}
    sizes = {entry.size_bytes for entry in known}
    # Where several images have the size and time of one, as bitmaps from an archive may, they may have changed places.
    stamps = Counter((entry.size_bytes, entry.modified_ns) for entry in known)
    contents = {entry.sha256: row for row, entry in enumerate(known)}
    kept: list[tuple[Entry, int]] = []
    new: list[Source] = []
    for source in sources:
        row = rows.get(source.name)
        sure = source.modified_ns != _UNSURE and stamps[source.size_bytes, source.modified_ns] == 1
        if row is not None and sure and source.entry(known[row].sha256) == known[row]:
            kept.append((known[row], row))
            continue
        digest = ""
        if source.size_bytes in sizes:
            with suppress(OSError):  # reported when it is opened
                digest = sha256_of(source.path)
        if row is not None and digest == known[row].sha256:  # touched, or had its mode changed
            kept.append((source.entry(digest), row))
        elif digest in contents:
            kept.append((source.entry(digest), contents[digest]))
        else:
            new.append(source)
    return kept, new


def out_of_sight(folder: Path, names: Collection[str], listed_ns: int) -> tuple[set[str], list[str]]:
    """Return the images, of those that are not found, that may still be there, and messages about emptied folders.

    They are in folders that cannot be read, or that are empty and have not changed since before the images were listed:
    had they been deleted, the folder would have changed later, so a disk that was mounted there is missing.
    """
    emptied = Counter[str]()

    @cache
    def hiding(inner: str) -> list[tuple[str, bool]]:
        """Return those of a folder and the folders around it that hide their images, and whether they are emptied."""
        around = [str(path) for path in (PurePosixPath(inner), *PurePosixPath(inner).parents) if path.name]
        found = [(name, is_empty_folder(folder / name, before_ns=listed_ns)) for name in around]
        return [(name, empty) for name, empty in found if empty or not _can_be_listed(folder / name)]

    hidden = {name for name in names if hiding(name.rpartition("/")[0])}
    for name in hidden:
        emptied.update(inner for inner, empty in hiding(name.rpartition("/")[0]) if empty)
    return hidden, [
        f"The folder {folder / inner} is empty; {count:,} image{'s' * (count > 1)} of it stay{'s' * (count == 1)} in "
        "the index: mount the disk that was there, or delete the folder."
        for inner, count in sorted(emptied.items())
    ]


def is_empty_folder(folder: Path, *, before_ns: int | None = None) -> bool:
    """Return whether a folder is empty, and has not changed since `before_ns`; without that, also if it is gone."""
    try:
        stat = folder.stat()
        # Tools that copy folders set the time of modification, but none can set that of the change (not on Windows).
        changed_ns = max(stat.st_mtime_ns, stat.st_ctime_ns)
        return next(folder.iterdir(), None) is None and (before_ns is None or changed_ns < before_ns)
    except OSError:
        return before_ns is None


def _can_be_listed(folder: Path) -> bool:
    try:
        next(folder.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        return not folder.is_symlink()  # what it leads to may be unmounted
    except OSError:
        return False
    return True


def is_gone(path: Path) -> bool:
    """Return whether there is nothing at a path for certain."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has a name with NUL
        return True
    except OSError:
        return False
    return False
