"""Keep an index up to date while images come and go.

The folder is listed again and again: that needs no package, and works on network shares, which send no events for what
other machines write. The pause grows with the time that a listing takes, so that watching costs at most a few percent
of a core, and up to a minute with that of an update, without what embedding the new images took.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clip_rd_edge.bundle.image_files import look_at_images
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.runtime.embed import open_image_tower
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index.folder import Watched
from clip_rd_edge.runtime.index.image_index import INDEX_FILE, is_index, model_key, read_index
from clip_rd_edge.runtime.index.update import REST, Update, no_folder_error, update_index
from clip_rd_edge.utils.paths import file_identity, is_folder
from clip_rd_edge.utils.reporting import SILENT, Reporter

POLL_S = 2.0
_MAX_REST_S = 60.0  # listing a million files takes many seconds, and building the graph of their index minutes
SETTLE_S = 2.0  # a file that has not changed for this long counts as written
_WAIT_S = 0.5
BROKEN_S = 60.0  # one that cannot be read is reported if it has not changed for this long: its writer may be slow

Stamp = tuple[int, int, int]  # size in bytes, and times of modification and change in nanoseconds
_NO_STAMP = (-1, -1, -1)  # of a file that cannot be looked at
_GONE = (-2, -2, -2)  # of one that was indexed, and is not there any more


class _Seen(NamedTuple):
    """A file as it was last listed, and since when it has been like that."""

    stamp: Stamp
    since: float


class _Images:
    """The images of a folder, told apart by whether they are still being written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, _Seen] | None = None
        self._indexed: dict[str, Stamp] = {}  # as of the last update, whether they could be read or not
        self._unreadable: dict[str, str] = {}  # messages that are not yet reported
        self._refused: set[str] = set()  # those whose content the system did not give
        self._said: set[str] = set()  # of folders that cannot be read, and names that are not UTF-8

    def look(self, now: float) -> bool:
        """List the folder; return whether it has images. An unmounted folder has none, and removes none."""
        listed = _stamps(self._folder)
        if not listed:
            return False
        old = self._seen
        listed |= dict.fromkeys(self._indexed.keys() - listed.keys(), _GONE)
        self._seen = {}
        for name, stamp in listed.items():
            if old is None:  # those that were there before the start, unless somebody is writing just now
                age_s = time.time() - stamp[1] / 1e9
                self._seen[name] = _Seen(stamp, now - SETTLE_S if age_s > SETTLE_S else now)
            else:
                unchanged = name in old and old[name].stamp == stamp
                self._seen[name] = old[name] if unchanged else _Seen(stamp, now)
        self._take_back_refused()
        return True

    def settling(self, now: float) -> list[str]:
        """Return the files that somebody may be writing to, or have moved."""
        return [name for name, seen in (self._seen or {}).items() if now - seen.since < SETTLE_S]

    def look_again(self, names: list[str], now: float) -> None:
        """Look at some files without listing the folder; the next listing says which of them are gone."""
        seen = self._seen or {}
        for name in names:
            if (stamp := _stamp(self._folder / name)) != seen[name].stamp:
                seen[name] = _Seen(stamp, now)

    def _take_back_refused(self) -> None:
        """Let the next update take the images that can be read now, though their stamps have not changed."""
        for name in sorted(self._refused):
            with suppress(OSError):
                if name in (self._seen or {}):
                    (self._folder / name).read_bytes()
                    self._indexed.pop(name, None)
                    self._unreadable.pop(name, None)
                self._refused.remove(name)

    def settled(self, now: float) -> dict[str, Stamp]:
        """Return the files that nobody is writing to, and those that are gone.

        While any others are being written, which may be those that are gone under another name, they are so for
        certain after BROKEN_S.
        """
        quiet = {name: seen for name, seen in (self._seen or {}).items() if now - seen.since >= SETTLE_S}
        busy = any(seen.stamp != _GONE for name, seen in (self._seen or {}).items() if name not in quiet)
        gone_before = now - (BROKEN_S if busy else SETTLE_S)
        return {name: seen.stamp for name, seen in quiet.items() if seen.stamp != _GONE or seen.since <= gone_before}

    def waiting(self, settled: dict[str, Stamp]) -> set[str]:
        """Return all others."""
        return (self._seen or {}).keys() - settled.keys()

    def differ(self, settled: dict[str, Stamp]) -> bool:
        """Return whether an update has anything to do."""
        return any(self._indexed.get(name, _GONE) != stamp for name, stamp in settled.items())

    def take(self, settled: dict[str, Stamp], update: Update) -> None:
        """Note what an update has seen, and take those messages from it that may be about unfinished files."""
        settled = {name: stamp for name, stamp in settled.items() if name not in update.vanished}  # unmounted?
        self._indexed = {name: stamp for name, stamp in (self._indexed | settled).items() if stamp != _GONE}
        known = self._said | set(update.unreadable_images.values())
        update.unreadable = [message for message in update.unreadable if message not in known]
        self._said.update(update.unreadable)
        self._refused = update.refused - update.vanished
        retried = update.unreadable_images
        self._unreadable = {**{name: text for name, text in self._unreadable.items() if name not in settled}, **retried}

    def broken(self, now: float) -> list[str]:
        """Return the messages about files that cannot be read and have not changed since, each once."""
        names = [
            name
            for name in self._unreadable
            if (seen := (self._seen or {}).get(name)) and seen.stamp != _GONE and now - seen.since >= BROKEN_S
        ]
        return [self._unreadable.pop(name) for name in names]


class _IndexFiles:
    """The files of the index, which somebody may remove, or copy another index over."""

    def __init__(self, path: Path, model: str) -> None:
        self._path, self._model = path, model
        self._files: dict[str, object] = {}
        self._since = 0.0
        self.take()

    def take(self) -> None:
        """Note that the index is as this watch left it."""
        self._written = file_identity(self._path / INDEX_FILE)

    def are_replaced(self) -> bool:
        """Return whether somebody else has written, or removed, the index."""
        return file_identity(self._path / INDEX_FILE) != self._written

    def require_own_model(self) -> None:
        """Refuse an index of another model that somebody has put there."""
        if self.are_replaced() and is_index(self._path) and read_index(self._path)[0].model != self._model:
            raise UsageError(
                f"Another model's index has been put at {self._path}: it stays, and the watch ends.",
                hint="watch with the bundle that made it, or choose another {output}",
            )

    def are_whole(self, now: float) -> bool:
        """Return whether an update may go on from them: as they were left, or no longer being copied."""
        if not self.are_replaced():
            return True
        files: dict[str, object] = {}
        with suppress(OSError):  # gone
            files = {file.name: file_identity(file) for file in self._path.iterdir()}
        if files != self._files:
            self._files, self._since = files, now
        if now - self._since < SETTLE_S:
            return False
        try:
            self.require_own_model()
        except ConfigError:
            if now - self._since >= BROKEN_S:
                raise
            return False
        return True


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Return the stamps of the images in a folder, without those that are gone already."""
    start = len(os.fspath(folder / "_")) - 1  # relative_to would take half of the time
    stamps = {}
    for path, found in look_at_images(folder, on_unreadable=lambda error: None):
        stamp = _stamp(path) if found is None else (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if stamp != _GONE:
            stamps[os.fspath(path)[start:].replace(os.sep, "/")] = stamp
    return stamps


def _stamp(path: Path) -> Stamp:
    """Return the stamp of a file, _GONE, or _NO_STAMP, in which case the update reports it."""
    try:
        try:
            stat = path.stat()
        except OSError:
            stat = path.lstat()  # what it leads to is gone: the update reports it as it does other unreadable images
    except (FileNotFoundError, NotADirectoryError):
        return _GONE
    except OSError:
        return _NO_STAMP
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _wait(stop: threading.Event, seconds: float) -> None:
    """Wait until `stop` is set, in parts: on Windows, a signal is handled only when a wait is over."""
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        stop.wait(min(left, _WAIT_S))


def watch_index(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
    wait: Callable[[float], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Create or update the index at `path` as `update_index` does, and again whenever images come, change or go.

    A file is embedded once it has not changed for SETTLE_S. It leaves the index once it has been gone for as long and
    nobody is writing others, which may be what is gone under other names: renamed images keep their embeddings. One
    that cannot be read is tried again when it changes, or when the system no longer refuses to read it, and reported
    after BROKEN_S without a change. While the folder is not there, or has no images, the index stays as it is. An index
    that somebody removes, or writes an older copy over, is brought up to date again, once it has not changed for
    SETTLE_S and is whole.

    Args:
        stop: ends the watch when it is set, with everything saved that is embedded; None watches for ever.
        reporter: shows progress.
        wait, clock: pause for some seconds, and tell the time in seconds.

    Yields:
        What each update has done; the first as soon as the images that are there are in the index.
    """
    if not is_folder(folder):
        raise no_folder_error(folder)
    stop = stop or threading.Event()
    wait = wait or partial(_wait, stop)
    open_image_tower(encoder)  # now: an update may put another bundle into its folder before there are images
    images, index, waiting = _Images(folder), _IndexFiles(path, model_key(encoder.manifest)), False
    count = 0  # of the images in the index, as of the last update
    while not stop.is_set():
        started = now = clock()
        there = images.look(started)
        if there and REST * (clock() - started) > POLL_S and (names := images.settling(started)):
            listed = clock()
            wait(SETTLE_S)
            if stop.is_set():
                return
            now = clock()
            started += now - listed  # the pause is no work
            images.look_again(names, now)
        if not there and not waiting:
            reporter.say(f"{folder} has no images: waiting for some")
        waiting = not there
        settled, embedding_s = images.settled(now) if there else {}, 0.0
        messages = images.broken(now) if there else []
        replaced = index.are_replaced()
        if index.are_whole(now) and there and (replaced or images.differ(settled)):
            update = update_index(
                encoder,
                folder,
                path,
                watched=Watched({name for name, stamp in settled.items() if stamp != _GONE}, images.waiting(settled)),
                stop=stop,
                require=index.require_own_model,  # again: another writer may have been waited for
                reporter=reporter,
            )
            embedding_s = update.embedding_s
            if update.skipped:  # its images are still to be taken
                update.kept = count
            else:
                images.take(settled, update)
                index.take()
                count = update.kept + update.embedded
            update.unreadable += messages
            if not update.skipped or messages:
                yield update
        elif messages:
            yield Update(kept=count, unreadable=messages)
        work_s = clock() - started - embedding_s  # saves above all, which take the longer the larger the index is
        wait(max(POLL_S, min(_MAX_REST_S, REST * work_s)))
