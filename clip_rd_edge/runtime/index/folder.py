"""The image folder of an index: which files are new, moved or unchanged, and which are only out of sight."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.images import DANGLING, require_image
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.index.image_index import Entry, Index
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.text import is_unicode

_SECOND_NS = 1_000_000_000
_COARSE_S = 2.0  # FAT keeps times to two seconds
_LARGE_BYTES = 1 << 26  # what is larger is looked at before all of it is read into memory
_UNSURE = -1  # a modification time that the next update does not trust


class Source:
    """An image file whose SHA-256 is computed when its content is read, so that it is read only once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        stat = self.path.stat()  # before reading: a change in between is noticed by the next update
        self.size_bytes, self.modified_ns, self.changed_ns = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        # Where times are whole seconds, a change just after the file was read would not show.
        if stat.st_mtime_ns % _SECOND_NS == 0 and abs(time.time() - stat.st_mtime) <= _COARSE_S:
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


def was_moved(index: Index, folder: Path) -> bool:
    """Return whether the image folder of an index is gone or empty, and most of its images are in `folder`."""
    if not is_empty_folder(Path(index.folder)):
        return False
    there = 0
    for entry in index.entries:
        with suppress(OSError, ValueError):  # a damaged index.json may have a path with NUL
            there += (folder / entry.path).stat().st_size == entry.size_bytes
    return there > len(index.entries) / 2


def find_sources(folder: Path, names: list[str]) -> tuple[list[Source], dict[str, str]]:
    """Return the files without those that were deleted since they were listed, and messages about the unreadable.

    These are links to nothing, and files that cannot be looked at.
    """
    sources, messages = [], {}
    for name in names:
        try:
            sources.append(Source(folder, name))
        except OSError as error:
            path, reason = folder / name, error.strerror or str(error)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                if not path.is_symlink():
                    continue
                reason = DANGLING
            messages[name] = f"Cannot read the image {path}: {reason}."
    return sources, messages


def is_gone(path: Path) -> bool:
    """Return whether there is nothing at a path for certain."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has a name with NUL
        return True
    except OSError:
        return False
    return False


def out_of_sight(folder: Path, names: Collection[str], listed_ns: int) -> tuple[set[str], list[str]]:
    """Return the images, of those that are not found, that may still be there, and messages about emptied folders.

    They are in folders that cannot be read, or that are empty and have not changed since before the images were listed:
    had they been deleted, the folder would have changed later, so the disk that was mounted there is not.
    """
    counts = Counter(name.rpartition("/")[0] for name in names)  # by folder: there may be a million images
    above = {inner: {inner, *map(str, PurePosixPath(inner).parents)} for inner in counts}
    around = set[str]().union(*above.values()) - {"", "."}
    closed = {parent for parent in around if not _can_be_listed(folder / parent)}
    emptied = {parent for parent in around - closed if is_empty_folder(folder / parent, before_ns=listed_ns)}
    lost = {inner for inner, parents in above.items() if not parents.isdisjoint(closed | emptied)}
    messages = []
    for parent in sorted(emptied):
        count = sum(counts[inner] for inner, parents in above.items() if parent in parents)
        messages.append(
            f"The folder {folder / parent} is empty; {count:,} image{'s' * (count > 1)} of it "
            f"stay{'s' * (count == 1)} in the index: mount the disk that was there, or delete the folder."
        )
    return {name for name in names if name.rpartition("/")[0] in lost}, messages


def not_mounted(folder: Path, names: Collection[str], listed_ns: int) -> Collection[str]:
    """Return the images, of those that cannot be read although they were listed, whose disk has gone away since."""
    return names if is_empty_folder(folder) else out_of_sight(folder, names, listed_ns)[0]


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
    """Return whether a folder can be read, or is not there at all."""
    try:
        next(folder.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        return not folder.is_symlink()  # what it leads to may be unmounted
    except OSError:
        return False
    return True


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


@dataclass(frozen=True)
class Plan:
    """What an update does to an index.

    Attributes:
        kept: entries that stay, each with its row in the index before.
        new: images to embed.
        removed: number of images that are gone.
        unreadable: one message per image or subfolder that could not be read, or whose name is not UTF-8.
        unreadable_images: those of images that could not be read, by their path in the folder.
        vanished: paths of images that were listed before, and are not there any more.
    """

    kept: list[tuple[Entry, int]]
    new: list[Source]
    removed: int
    unreadable: list[str]
    unreadable_images: dict[str, str]
    vanished: set[str]


class Watched(NamedTuple):
    """What a watch found in a folder, by paths in it.

    Attributes:
        settled: the images to take; others that are there keep the entry that they have, and so do all if the folder
            was unmounted since it was listed.
        waiting: images that keep the entry that they have, there or not, as do those of `settled`: what is gone may
            come again under another name.
    """

    settled: Collection[str]
    waiting: Collection[str] = ()


def plan_update(folder: Path, path: Path, index: Index, watched: Watched | None, *, last_listed_ns: int) -> Plan | None:
    """Compare the folder with the index at `path`; None if a watch found the folder unmounted.

    Args:
        watched: as for `update_index`.
        last_listed_ns: when the folder was listed for the index.
    """
    folders: list[InputError] = []  # that cannot be read
    images = list_images(folder, on_unreadable=folders.append)
    named = {image: image.relative_to(folder).as_posix() for image in images}
    names = [name for name in named.values() if is_unicode(name)]
    chosen = names if watched is None else [name for name in names if name in watched.settled]
    sources, broken = find_sources(folder, chosen)
    unmounted = not images or is_empty_folder(folder)  # since the watch has listed it, or since it was listed above
    if unmounted and watched is not None:
        return None
    if unmounted and not index.entries:
        raise InputError(f"The folder {folder} has no images.", hint="name a folder with images")
    if unmounted:
        raise InputError(
            f"The folder {folder} has no images, but {path} has {len(index.entries):,} of it, and stays as it is.",
            hint="mount the disk that they are on; or if they were deleted, delete the index, too",
        )
    present = (set(names) - set(chosen)) | {source.name for source in sources} | broken.keys()
    places = {entry.path: row for row, entry in enumerate(index.entries)}
    gone = places.keys() - present
    hidden, emptied = out_of_sight(folder, gone, last_listed_ns)
    if folders:  # which may have been listed, but not entered, or for a moment only could not be read
        hidden |= {name for name in gone if not is_gone(folder / name)}
    if watched is not None:
        hidden |= {name for name in gone if name in watched.settled or name in watched.waiting}
    unsettled = hidden | broken.keys() | (set(names) - set(chosen))
    kept, new = compare(index.entries, sources)
    kept += [(entry, row) for row, entry in enumerate(index.entries) if entry.path in unsettled]
    # In the order of the index, so that it shows if nothing changed. Not by row: equal images may all have that of one.
    kept.sort(key=lambda known: places.get(known[0].path, len(places)))
    moved = Counter(entry.sha256 for entry, row in kept if places.get(entry.path) != row)
    lost = Counter(index.entries[places[name]].sha256 for name in gone - hidden)
    badly_named = [
        f"The name of {printable_path(image)} is not UTF-8, as index.json is; rename it."
        for image, name in named.items()
        if not is_unicode(name)
    ]
    return Plan(
        kept=kept,
        new=new,
        removed=(lost - moved).total(),
        unreadable=[*map(str, folders), *emptied, *broken.values(), *badly_named],
        unreadable_images=broken,
        vanished=set(watched.settled if watched else ()) - (set(named.values()) - set(chosen)) - present,
    )


def printable_path(path: Path) -> str:
    """Return a path whose name may not be UTF-8, for a message."""
    return os.fsencode(path).decode(errors="backslashreplace")
