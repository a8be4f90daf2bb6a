"""Keep an index up to date while images come and go.

The folder is listed again and again: that needs no package, and works on network shares, which send no events for
what other machines write. The pause grows with the time that a listing takes, so that watching costs at most a few
percent of a core; and, up to a minute, with the time of an update, not counting the embedding of new images.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import INDEX_FILE, Stamp
from clip_rd_edge.runtime.index_folder import Listing
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


class _Images:
    """The images of a watched folder, divided by whether they are still being written."""

    def __init__(self) -> None:
        self._seen = dict[str, tuple[Stamp, float]]()  # each image's last stamp, and since when it has that
        self._messages = dict[str, float]()  # since when each has come

    def look(self, listing: Listing, known: Collection[str], now: float) -> Watched:
        """Return the files that nobody is writing to, and of the known ones those that are gone but stay for now.

        A file that by its own times is old enough counts as settled at once. While any others are being written, which
        may be those that are gone under another name, they stay for BROKEN_S.
        """
        first, old = not self._seen, self._seen
        self._seen = {}
        for name, stamp in (dict.fromkeys(known, _GONE) | listing.stamps).items():
            age_s = time.time() - max(stamp[1:2] if first else stamp[1:]) / 1e9
            is_settled = stamp != _GONE and age_s > SETTLE_S
            unchanged = name in old and old[name][0] == stamp
            self._seen[name] = old[name] if unchanged else (stamp, now - SETTLE_S if is_settled else now)
        take = {name for name in listing.stamps if now - self._seen[name][1] >= SETTLE_S}
        patience_s = SETTLE_S if len(take) == len(listing.stamps) else BROKEN_S
        gone = self._seen.keys() - listing.stamps.keys()
        return Watched(listing, take, {name for name in gone if now - self._seen[name][1] < patience_s})

    def lasting(self, messages: Sequence[str], now: float) -> list[str]:
        """Return the messages that have come for BROKEN_S, each once: before, a file's writer may only be slow."""
        self._messages = {message: self._messages.get(message, now) for message in messages}
        new = [message for message, since in self._messages.items() if now - since >= BROKEN_S]
        self._messages |= dict.fromkeys(new, math.inf)
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
    that cannot be read is tried again every BROKEN_S, and reported after that. While the folder is not there, or has no
    images, the index stays as it is. An index that somebody else writes, or removes, is brought up to date again.

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
    waiting, is_first = False, True
    tried, tried_at = dict[str, Stamp](), -math.inf  # what the last update has looked at
    while not stop.is_set():
        started = clock()
        listing, update, embedding_s = Listing(folder), None, 0.0
        if not listing.stamps and not waiting:
            reporter.note(f"{folder} has no images: waiting for some")
        waiting = not listing.stamps
        if waiting:  # an unmounted folder has none, and removes none
            tried_at = -math.inf
        else:
            watched = images.look(listing, indexer.stamps, started)
            # What cannot be read is tried again now and then: an update reads the whole index.
            is_due = started - tried_at >= BROKEN_S
            if (is_due and listing.unreadable) or _differs(watched, indexer, {} if is_due else tried):
                update = indexer.update(watched)
                tried, tried_at = {name: listing.stamps[name] for name in watched.take}, started
        if update is not None:
            embedding_s = update.embedding_s if update.embedded else 0.0  # and not of what stays broken
            update.unreadable = images.lasting(update.unreadable, started)
            if update.embedded or update.removed or update.unreadable or (is_first and update.kept):
                is_first = False
                yield update
        work_s = clock() - started - embedding_s  # saves above all, which take the longer the larger the index is
        wait(max(POLL_S, min(_MAX_REST_S, REST * work_s)))


def _differs(watched: Watched, indexer: Indexer, tried: dict[str, Stamp]) -> bool:
    """Return whether an update has anything to do but to try again what it has just tried."""
    stamps, known = watched.listing.stamps, indexer.stamps | tried
    return (
        any(known.get(name) != stamps[name] for name in watched.take)
        or bool(indexer.stamps.keys() - stamps.keys() - set(watched.stay))
        or file_identity(indexer.path / INDEX_FILE) != indexer.identity
    )


def _wait(stop: threading.Event, seconds: float) -> None:
    """Wait until `stop` is set, in parts: on Windows, a signal is handled only when a wait is over."""
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        stop.wait(min(left, _WAIT_S))
