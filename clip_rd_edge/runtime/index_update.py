"""Create and update an index of an image folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, in_batches
from clip_rd_edge.errors import InputError, UsageError, install_command
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import (
    GRAPH_FROM,
    INDEX_FILE,
    Entry,
    Index,
    Stamp,
    is_index,
    keys_file,
    leftovers,
    model_key,
    open_graph,
    read_index,
    remember,
    without_damage,
    write_content,
    write_index,
)
from clip_rd_edge.runtime.index_folder import NO_STAMP, Listing, Source, compare, may_hide, out_of_sight
from clip_rd_edge.runtime.load import EmbeddedBatch, embed_images, embed_images_on_cluster
from clip_rd_edge.runtime.search_graph import build_graph, keys_of, usearch_is_installed
from clip_rd_edge.utils.arrays import npy_bytes
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import exists, file_identity, is_file, is_folder, near_files
from clip_rd_edge.utils.text import SILENT, Reporter

ANSWERED = 0.2  # share of random texts for which a search finds something
_NOUN_STEP, _COMPARED_ROWS = 4, 1 << 16  # of the nouns, one in so many; rows compared with them at once
SAVE_EVERY_S = 20.0  # the most work that a kill -9 can lose of an index that is saved fast
REST = 20  # a pause is at least this many times as long as the work before it, such as a save of the whole index


@dataclass(kw_only=True)
class Update:
    """The result of an update.

    Attributes:
        kept, embedded, removed: numbers of images.
        unreadable: one message per image or subfolder that could not be read, or whose name is not UTF-8.
        approximate: whether search is approximate, because the index has a graph.
        embedding_s: how long it took to embed images, in seconds.
    """

    kept: int = 0
    embedded: int = 0
    removed: int = 0
    unreadable: list[str] = field(default_factory=list)
    approximate: bool = False
    embedding_s: float = field(default=0.0, compare=False)


def update_index(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    stop: threading.Event | None = None,
    cluster: str | None = None,
    reporter: Reporter = SILENT,
) -> Update:
    """Create or update the index at `path` for the images in `folder`.

    An image whose size and times are those in the index counts as unchanged. If the index has an entry of the same
    size, the file is hashed: it may have been moved, copied or touched, and is embedded only if its content is new. The
    same holds for all of them if the folder was moved. Progress is saved every SAVE_EVERY_S seconds, less often where
    that takes long, and on an interruption. Another model's index is refused. If another process is writing to the
    index, the update waits for it.

    Args:
        stop: ends the update after the batch in which it is set, with everything saved that is embedded.
        cluster: address of a Ray cluster whose workers embed the images.
    """
    return Indexer(encoder, folder, path, stop=stop, cluster=cluster, reporter=reporter).update() or Update()


class Watched(NamedTuple):
    """What a watch found: the listing, the images to take of it, and those that are gone but stay for now."""

    listing: Listing
    take: Collection[str]
    stay: Collection[str]


class Indexer:
    """Writes the index of a folder, once or several times.

    Attributes:
        stamps: of the images in the index, by their path in the folder; empty before the first update.
        identity: of index.json as it was left.
    """

    def __init__(
        self,
        encoder: BundleEncoder,
        folder: Path,
        path: Path,
        *,
        stop: threading.Event | None,
        cluster: str | None = None,
        reporter: Reporter,
    ) -> None:
        if not is_folder(folder):
            reason = "is a file." if exists(folder) else f"does not exist.{near_files(folder)}"
            raise InputError(f"The folder {folder} {reason}", hint="name a folder with images")
        self._encoder, self._folder, self.path = encoder, folder, path
        self._stop, self._cluster, self._reporter = stop or threading.Event(), cluster, reporter
        self.stamps, self.identity = dict[str, Stamp](), file_identity(path / INDEX_FILE)

    def update(self, watched: Watched | None = None) -> Update | None:
        """Bring the index up to date; None if `stop` ended the wait for another process."""
        if self._cluster is None:  # else its workers are asked
            self._encoder.require_right(self._encoder.manifest.image)
        foreign = set(self.path.iterdir()) - leftovers(self.path) if is_folder(self.path) else set()
        if is_file(self.path) or (not is_index(self.path) and foreign - {self.path / LOCK_FILE}):
            raise UsageError(f"The output {self.path} exists and is not an index.", hint="choose another {output}")
        with exclusive_writer(self.path, on_wait=self._reporter.note, stop=self._stop) as may_write:
            update = self._update(watched) if may_write else None
        self.identity = file_identity(self.path / INDEX_FILE)
        return update

    def _update(self, watched: Watched | None) -> Update:
        before, rows = self._open()
        remember(self.path, self._encoder, self._folder)
        index, rows = without_damage(before, rows)
        if count := len(before.entries) - len(index.entries):
            self._reporter.note(f"{count:,} embeddings in {self.path} are damaged: they are computed again")
        listing = watched.listing if watched else Listing(self._folder)
        if not listing.stamps:
            stays = f", but {self.path} has {len(index.entries):,} from it, and stays as it is"
            raise InputError(
                f"The folder {self._folder} has no images{stays if index.entries else ''}.",
                hint="name a folder with images, mount the disk that they are on, or if they were deleted, delete the "
                "index, too",
            )
        kept, new, update = self._compare(index, listing, watched)
        unchanged = bool(before.embeddings) and [entry for entry, _ in kept] == before.entries
        if new or not unchanged or index.missing:
            numbers = np.array([row for _, row in kept], dtype=np.int64)
            parts = [([entry for entry, _ in kept], np.asarray(rows[numbers]))]
            growing = _Growing(self.path, index, parts, len(new), (len(kept), index.missing) if unchanged else None)
            try:
                self._embed(growing, new, update)
            finally:
                index, rows = growing.save()
        self.stamps = {entry.path: entry.stamp for entry in index.entries}
        if index.cutoff is None and len(rows) and (background := self._encoder.background) is not None:
            index = msgspec.structs.replace(index, cutoff=text_cutoff(rows, background))
            write_content(self.path, index)
        update.approximate = self._keep_graph(index, rows)
        return update

    def _open(self) -> tuple[Index, Embeddings]:
        """Return the index to go on with; one without entries, and without a file of embeddings, if there is none."""
        path, manifest = self.path, self._encoder.manifest
        folder, bundle = str(self._folder.resolve()), str(self._encoder.folder.resolve())
        if not is_index(path):
            empty = Index(folder=folder, bundle=bundle, model=model_key(manifest), embeddings="", entries=[])
            return empty, np.zeros((0, manifest.embedding_size), dtype=np.float32)
        index, rows = read_index(path)
        if index.model != model_key(manifest):
            raise UsageError(
                f"Another model made the index {path}, and all of its images would be embedded again.",
                hint="choose another {output}, or delete this one",
            )
        if index.folder != folder and not was_moved(index, self._folder):
            raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another {output}")
        if (index.bundle, index.folder) != (bundle, folder):  # moved; search looks where index.json says
            index = msgspec.structs.replace(index, bundle=bundle, folder=folder)
            write_content(path, index)
        return index, rows

    def _compare(
        self, index: Index, listing: Listing, watched: Watched | None
    ) -> tuple[list[tuple[Entry, int]], list[Source], Update]:
        """Return the entries that stay, each with its row in the index before, and the images to embed."""
        seen = (name for name, stamp in listing.stamps.items() if stamp != NO_STAMP)
        names = sorted(seen, key=lambda name: name.split("/"))
        chosen = names if watched is None else [name for name in names if name in watched.take]
        kept, new = compare(index.entries, [Source(self._folder, name, listing.stamps[name]) for name in chosen])
        places = {entry.path: row for row, entry in enumerate(index.entries)}
        missing = places.keys() - listing.stamps.keys()
        stay, emptied = out_of_sight(self._folder, missing)
        if watched is not None:
            stay.update(missing & set(watched.stay))
        untouched = stay | (listing.stamps.keys() - set(chosen))
        kept += [(entry, row) for row, entry in enumerate(index.entries) if entry.path in untouched]
        # In the order of the index, so that it shows if nothing changed. Not by row: equal images may all have that of
        # one.
        kept.sort(key=lambda known: places.get(known[0].path, len(places)))
        moved = Counter(entry.sha256 for entry, row in kept if places.get(entry.path) != row)
        lost = Counter(index.entries[places[name]].sha256 for name in missing - stay)
        update = Update(kept=len(kept), removed=(lost - moved).total(), unreadable=listing.unreadable + emptied)
        return kept, new, update

    def _embed(self, growing: _Growing, new: list[Source], update: Update) -> None:
        """Add batches of images to an index until `stop` is set, save it now and then, and count them in `update`."""
        self._reporter.update("embedding", 0, len(new))  # the first batch of large images takes many seconds
        embed = partial(embed_images_on_cluster, self._cluster) if self._cluster else embed_images
        batches: Iterator[EmbeddedBatch[Source]] = embed(self._encoder, new)
        resumed = time.monotonic()
        next_save = resumed + SAVE_EVERY_S
        for batch in batches:
            growing.parts.append(([source.entry() for source in batch.images], batch.embeddings))
            growing.missing -= len(batch.images) + len(batch.unreadable)
            update.embedded += len(batch.images)
            update.unreadable += map(str, batch.unreadable)
            self._reporter.update("embedding", len(new) - growing.missing, len(new))
            if self._stop.is_set():
                break
            if (began := time.monotonic()) > next_save and update.embedded:
                update.embedding_s += began - resumed
                growing.save()
                resumed = time.monotonic()
                next_save = resumed + max(SAVE_EVERY_S, REST * (resumed - began))
        update.embedding_s += time.monotonic() - resumed

    def _keep_graph(self, index: Index, rows: Embeddings) -> bool:
        """Build the graph of a large index that has none to use, or a worn one; return whether it has one now."""
        if len(rows) < GRAPH_FROM:
            return False
        graph = open_graph(self.path, index)
        if graph is not None and not graph.is_worn:
            return True
        if not usearch_is_installed():
            hint = install_command("usearch")
            note = f"search stays exact; with usearch it takes less time from {GRAPH_FROM:,} images on: {hint}"
            self._reporter.note(note)
            return False
        usable = graph is not None
        del graph  # closes the file, which Windows does not delete before
        built = build_graph(self.path, rows, threads=self._encoder.threads, stop=self._stop, reporter=self._reporter)
        if built is None:
            return usable
        index = msgspec.structs.replace(index, graph=built)
        write_bytes(keys_file(self.path, index), npy_bytes(keys_of(rows)))
        write_content(self.path, index)
        return True


def text_cutoff(rows: Embeddings, background: Embeddings) -> float:
    """Return the cosine that the best of N images reaches for one in five of texts that have nothing to do with them.

    Such texts are common nouns: few of them are in any folder. The more images, the higher it is.
    """
    nouns = background[::_NOUN_STEP]
    best = np.max([(rows[part] @ nouns.T).max(axis=0) for part in in_batches(len(rows), _COMPARED_ROWS)], axis=0)
    return float(np.quantile(best, 1 - ANSWERED))


def was_moved(index: Index, folder: Path) -> bool:
    """Return whether the image folder of an index is gone or empty, and most of its images are in `folder`."""
    if not may_hide(Path(index.folder), is_root=True):
        return False
    there = 0
    for entry in index.entries:
        with suppress(OSError, ValueError):  # a damaged index.json may have a path with NUL
            there += (folder / entry.path).stat().st_size == entry.size_bytes
    return there > len(index.entries) / 2


@dataclass
class _Growing:
    """An index while images are embedded.

    Attributes:
        parts: entries and their embeddings; together, since Ctrl-C may come between any two lines.
        missing: number of images that are still to be embedded.
        saved: numbers of images that the saved index has, and that it is missing; None if it is another one.
    """

    path: Path
    index: Index
    parts: list[tuple[list[Entry], Embeddings]]
    missing: int
    saved: tuple[int, int] | None

    def save(self) -> tuple[Index, Embeddings]:
        """Write the index with what it has now, and return it."""
        entries, rows = [entry for part, _ in self.parts for entry in part], np.concatenate([p for _, p in self.parts])
        self.parts[:] = [(entries, rows)]  # a large index may not fit twice
        if self.saved != (len(entries), self.missing):  # else none of the new images could be read
            index = msgspec.structs.replace(self.index, entries=entries, missing=self.missing, cutoff=None)
            self.index = write_index(self.path, index, rows)
            self.saved = len(entries), self.missing
        return self.index, rows
