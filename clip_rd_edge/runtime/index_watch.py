"""Keep an index up to date while images come and go.

The folder is listed again and again: that needs no package, and works on network shares, which send no events for
what other machines write. The pause grows with the time that a listing takes, so that watching costs at most a few
percent of a core; and, up to a minute, with the time of an update, not counting the embedding of new images.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import INDEX_FILE
from clip_rd_edge.runtime.index_folder import Listing, Stamp
from clip_rd_edge.runtime.index_update import REST, Indexer, Update, Watched
from clip_rd_edge.runtime.load import open_image_tower
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.text import SILENT, Reporter

POLL_S = 2.0
_MAX_REST_S = 60.0  # listing a million files takes many seconds, and building the graph of their index minutes
SETTLE_S = 2.0  # a file that has not changed for this long counts as written
BROKEN_S = 60.0  # one that cannot be read is reported if it has not changed for this long: its writer may be slow
_WAIT_S = 0.5
_GONE = (-2, -2, -2)  # of one that was there before


class _Seen(NamedTuple):
    """A file as it was last listed, and since when it has been like that."""

    stamp: Stamp
    since: float


class _Images:
    """The images of a watched folder, divided by whether they are still being written."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] | None = None
        self._indexed: dict[str, Stamp] = {}  # as of the last update, whether they could be read or not
        self._failed: dict[str, str] = {}  # messages that are not yet reported
        self._said: set[str] = set()

    def look(self, listing: Listing, now: float) -> None:
        """Note what is there. A file that by its own times is old enough counts as settled at once."""
        first, old = self._seen is None, self._seen or {}
        gone = self._indexed.keys() - listing.stamps.keys()
        self._seen = {}
        for name, stamp in (listing.stamps | dict.fromkeys(gone, _GONE)).items():
            age_s = time.time() - max(stamp[1:2] if first else stamp[1:]) / 1e9
            is_settled = stamp != _GONE and age_s > SETTLE_S
            unchanged = name in old and old[name].stamp == stamp
            self._seen[name] = old[name] if unchanged else _Seen(stamp, now - SETTLE_S if is_settled else now)

    def settled(self, listing: Listing, now: float) -> Watched:
        """Return the files that nobody is writing to, and those that are gone but stay for now.

        While any others are being written, which may be those that are gone under another name, they stay for BROKEN_S.
        """
        seen = self._seen or {}
        take = {name for name, (stamp, since) in seen.items() if stamp != _GONE and now - since >= SETTLE_S}
        gone = {name: since for name, (stamp, since) in seen.items() if stamp == _GONE}
        patience_s = SETTLE_S if len(take) + len(gone) == len(seen) else BROKEN_S
        return Watched(listing, take, {name for name, since in gone.items() if now - since < patience_s})

    def differ(self, watched: Watched) -> bool:
        """Return whether an update has anything to do."""
        stamps = watched.listing.stamps
        gone = self._indexed.keys() - stamps.keys() - set(watched.stay)
        return bool(gone) or any(self._indexed.get(name) != stamps[name] for name in watched.take)

    def take(self, watched: Watched, update: Update, indexer: Indexer) -> None:
        """Note what an update has seen, and take those messages from it that may be about unfinished files."""
        stamps, failed = watched.listing.stamps, indexer.failed
        left = {name: stamp for name, stamp in self._indexed.items() if name in stamps or name in watched.stay}
        left |= {name: stamps[name] for name in watched.take}
        self._indexed = {name: stamp for name, stamp in left.items() if name not in indexer.again}
        self._failed = {name: text for name, text in self._failed.items() if name not in watched.take} | failed
        update.unreadable = self._once([text for text in update.unreadable if text not in failed.values()])

    def broken(self, now: float) -> list[str]:
        """Return the messages about files that cannot be read and have not changed since, each once."""
        seen = self._seen or {}
        names = [name for name in self._failed if name in seen and now - seen[name].since >= BROKEN_S]
        return self._once([self._failed.pop(name) for name in names if seen[name].stamp != _GONE])

    def _once(self, messages: Sequence[str]) -> list[str]:
        new = [message for message in messages if message not in self._said]
        self._said.update(new)
        return new


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
    that cannot be read is tried again when it changes, or as long as the system refuses to read it, and reported after
    BROKEN_S without a change. While the folder is not there, or has no images, the index stays as it is. An index that
    somebody removes, or writes an older copy over, is brought up to date again, once it has not changed for SETTLE_S.

    Args:
        stop: ends the watch when it is set, with everything saved that is embedded; None watches for ever.
        wait, clock: pause for some seconds, and tell the time in seconds.

    Yields:
        What each update has done; the first as soon as the images that are there are in the index.
    """
    stop = stop or threading.Event()
    wait = wait or partial(_wait, stop)
    indexer, images = Indexer(encoder, folder, path, stop=stop, reporter=reporter), _Images()
    open_image_tower(encoder)  # now: an update may put another bundle into its folder before there are images
    waiting, is_first, count = False, True, 0
    files, files_since = dict[str, object](), -math.inf  # of an index that somebody else has written, or removed
    while not stop.is_set():
        started = clock()
        listing, update, messages = Listing(folder), None, list[str]()
        if not listing.stamps and not waiting:
            reporter.note(f"{folder} has no images: waiting for some")
        waiting = not listing.stamps
        if listing.stamps:  # an unmounted folder has none, and removes none
            images.look(listing, started)
            watched, messages = images.settled(listing, started), images.broken(started)
            replaced = file_identity(path / INDEX_FILE) != indexer.identity
            if replaced and (now := _identities(path)) != files:
                files, files_since = now, started
            is_whole = not replaced or started - files_since >= SETTLE_S
            if is_whole and (replaced or images.differ(watched)) and (update := indexer.update(watched)) is not None:
                images.take(watched, update, indexer)
                count = update.kept + update.embedded
        embedding_s = update.embedding_s if update is not None else 0.0
        update = update or Update(kept=count)
        update.unreadable += messages
        if update.embedded or update.removed or update.unreadable or (is_first and count):
            is_first = False
            yield update
        work_s = clock() - started - embedding_s  # saves above all, which take the longer the larger the index is
        wait(max(POLL_S, min(_MAX_REST_S, REST * work_s)))


def _identities(path: Path) -> dict[str, object]:
    with suppress(OSError):  # gone
        return {file.name: file_identity(file) for file in path.iterdir()}
    return {}


def _wait(stop: threading.Event, seconds: float) -> None:
    """Wait until `stop` is set, in parts: on Windows, a signal is handled only when a wait is over."""
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        stop.wait(min(left, _WAIT_S))
