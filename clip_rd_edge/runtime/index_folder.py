"""The image folder of an index: its images, which of them are new or moved, and which are only out of sight."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

from clip_rd_edge.bundle.image_files import look_at_images
from clip_rd_edge.bundle.images import require_image
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.index import Entry, Stamp
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.text import is_unicode

_SECOND_NS = 1_000_000_000
_COARSE_S = 2.0  # FAT keeps times to two seconds
_LARGE_BYTES = 1 << 26  # what is larger is looked at before all of it is read into memory
_UNSURE = -1  # a modification time that the next update does not trust
NO_STAMP: Stamp = (-1, -1, -1)  # of a file that cannot be looked at


class Listing:
    """The images of a folder, by their path in it.

    Attributes:
        stamps: of the images; NO_STAMP of those that cannot be looked at.
        unreadable: messages about these, about folders that cannot be read, and about names that are not UTF-8.
    """

    def __init__(self, folder: Path) -> None:
        self.stamps, self.unreadable = dict[str, Stamp](), list[str]()
        start = len(os.fspath(folder / "_")) - 1  # relative_to would take half of the time
        for path, found in look_at_images(folder, on_unreadable=lambda error: self.unreadable.append(str(error))):
            name = os.fspath(path)[start:].replace(os.sep, "/")
            if not is_unicode(name):
                shown = os.fsencode(path).decode(errors="backslashreplace")
                self.unreadable.append(f"The name of {shown} is not UTF-8: rename it to have it indexed.")
            elif found is not None:
                self.stamps[name] = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            else:
                try:
                    require_image(path)
                except InputError as error:
                    self.stamps[name] = NO_STAMP
                    self.unreadable.append(str(error))


class Source:
    """An image file whose SHA-256 is computed when its content is read, so that it is read only once."""

    def __init__(self, folder: Path, name: str, stamp: Stamp) -> None:
        self.path, self.name, self.sha256 = folder / name, name, ""
        self.size_bytes, self.modified_ns, changed_ns = stamp
        # Where times are whole seconds, a change just after the file was read would not show.
        if self.modified_ns % _SECOND_NS == 0 and abs(time.time() - self.modified_ns / 1e9) <= _COARSE_S:
            self.modified_ns = _UNSURE
        self._stamp = self.size_bytes, self.modified_ns, changed_ns

    def read_bytes(self) -> bytes:
        if self.size_bytes > _LARGE_BYTES:
            require_image(self.path)
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        return content

    def entry(self, sha256: str = "") -> Entry:
        return Entry(self.name, *self._stamp, sha256 or self.sha256)

    def __str__(self) -> str:
        return str(self.path)


def compare(known: list[Entry], sources: list[Source]) -> tuple[list[tuple[Entry, int]], list[Source]]:
    """Split the files into those already in the index, with their rows, and those to embed."""
    rows = {entry.path: row for row, entry in enumerate(known)}
    sizes = {entry.size_bytes for entry in known}
    # Where several images have the size and time of one, as bitmaps from an archive may, they may have changed places.
    stamps = Counter((entry.size_bytes, entry.modified_ns) for entry in known)
    contents = {entry.sha256: row for row, entry in enumerate(known)}
    kept, new = list[tuple[Entry, int]](), list[Source]()
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


def out_of_sight(folder: Path, names: Collection[str]) -> tuple[set[str], list[str]]:
    """Return the images, of those that are not found, that may still be there, and messages about emptied folders.

    They cannot be looked at, or are in a folder that cannot be read, or that is empty, as the mount point of a missing
    disk is.
    """

    @cache
    def hiding(inner: str) -> str | None:
        """Return the outermost, of a folder and those around it, that hides its images."""
        outer = hiding(inner.rpartition("/")[0]) if inner else None
        return outer if outer is not None else inner if may_hide(folder / inner, is_root=not inner) else None

    behind = Counter(hiding(name.rpartition("/")[0]) for name in names)
    return {name for name in names if hiding(name.rpartition("/")[0]) is not None or not is_gone(folder / name)}, [
        f"The folder {folder / inner} is empty; {count:,} image{'s' * (count > 1)} of it stay{'s' * (count == 1)} in "
        "the index: mount the disk that was there, or delete the folder."
        for inner, count in behind.items()
        if inner is not None and os.access(folder / inner, os.R_OK | os.X_OK)
    ]


def may_hide(folder: Path, *, is_root: bool) -> bool:
    """Return whether a folder is empty, cannot be read, or is a link to nothing; the root also if it is gone."""
    try:
        return next(folder.iterdir(), None) is None
    except (FileNotFoundError, NotADirectoryError):
        return is_root or folder.is_symlink()
    except OSError:
        return True


def is_gone(path: Path) -> bool:
    """Return whether there is nothing at a path for certain."""
    with suppress(OSError):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has a name with NUL
            return True
    return False
