"""Create and update an index of an image folder."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, in_batches
from clip_rd_edge.errors import InputError, UsageError, causes, install_command
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import (
    GRAPH_FROM,
    INDEX_FILE,
    NEXT,
    Entry,
    Index,
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
from clip_rd_edge.runtime.index_folder import (
    Listing,
    Source,
    compare,
    is_empty_folder,
    is_gone,
    out_of_sight,
)
from clip_rd_edge.runtime.load import embed_images, embed_images_on_cluster
from clip_rd_edge.runtime.search_graph import build_graph, keys_of, usearch_is_installed
from clip_rd_edge.utils.arrays import npy_bytes
from clip_rd_edge.utils.files import now_in, write_bytes
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
    that takes long, and on an interruption. Another model's index stays until all images are embedded again. If another
    process is writing to the index, the update waits for it.

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
        identity: of index.json as it was left.
        failed: messages about the images that the last update could not read, by their path in the folder.
        again: paths of those that the system refused to read, as while another program has them open on Windows.
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
        self._encoder, self._folder, self._path = encoder, folder, path
        self._stop, self._cluster, self._reporter = stop or threading.Event(), cluster, reporter
        self._has_written = False
        self.identity = file_identity(path / INDEX_FILE)
        self.failed, self.again = dict[str, str](), set[str]()

    def update(self, watched: Watched | None = None) -> Update | None:
        """Bring the index up to date; None if `stop` ended the wait for another process, or the disk has gone."""
        if self._cluster is None:  # else its workers are asked
            self._encoder.require_right(self._encoder.manifest.image)
        foreign = set(self._path.iterdir()) - leftovers(self._path) if is_folder(self._path) else set()
        if is_file(self._path) or (not is_index(self._path) and foreign - {self._path / LOCK_FILE}):
            raise UsageError(f"The output {self._path} exists and is not an index.", hint="choose another {output}")
        with exclusive_writer(self._path, on_wait=self._reporter.note, stop=self._stop) as may_write:
            update = self._update(watched) if may_write else None
        if update is not None:
            self.identity = file_identity(self._path / INDEX_FILE)
        return update

    def _update(self, watched: Watched | None) -> Update | None:
        place, index, rows = self._open()
        remember(self._path, self._encoder, self._folder)
        if place == self._path:  # what was begun with another model has been given up
            shutil.rmtree(self._path / NEXT, ignore_errors=True)
        found, (index, rows) = index.entries, without_damage(index, rows)
        if len(index.entries) < len(found):
            count = len(found) - len(index.entries)
            self._reporter.note(f"{count:,} embeddings in {self._path} are damaged: they are computed again")
        listing = watched.listing if watched else Listing(self._folder)
        listed_ns = int((now_in(self._path) - (time.monotonic() - listing.began)) * 1e9)
        if not listing.stamps or is_empty_folder(self._folder):  # it may have gone since it was listed
            if watched is not None:
                return None
            stays = f", but {self._path} has {len(index.entries):,} from it, and stays as it is"
            raise InputError(
                f"The folder {self._folder} has no images{stays if index.entries else ''}.",
                hint="name a folder with images, mount the disk that they are on, or if they were deleted, delete the "
                "index, too",
            )
        kept, new, update = self._compare(index, listing, watched)
        unchanged = is_index(place) and [entry for entry, _ in kept] == found
        if not (place == self._path and unchanged and not new and not index.missing):
            growing = _Growing(place, index, rows, kept, new, listed_ns=listed_ns, unchanged=unchanged)
            try:
                self._embed(growing, update)
            finally:
                index, rows = growing.save()
            if place != self._path:
                if index.missing:
                    return update
                index = write_index(self._path, index, rows)
                shutil.rmtree(place, ignore_errors=True)
        self._has_written = True
        if index.cutoff is None and len(rows) and (background := self._encoder.background) is not None:
            index = msgspec.structs.replace(index, cutoff=text_cutoff(rows, background))
            write_content(self._path, index)
        update.approximate = keep_graph(
            self._path, index, rows, threads=self._encoder.threads, stop=self._stop, reporter=self._reporter
        )
        return update

    def _open(self) -> tuple[Path, Index, Embeddings]:
        """Return the index to go on with, empty if there is none, and the folder to save it in.

        That is `path`, or NEXT in it while another model's index is there.
        """
        path, manifest = self._path, self._encoder.manifest
        folder, bundle = str(self._folder.resolve()), str(self._encoder.folder.resolve())
        empty = Index(folder=folder, bundle=bundle, model=model_key(manifest), embeddings="", entries=[])
        no_rows = np.zeros((0, manifest.embedding_size), dtype=np.float32)
        if not is_index(path):
            return path, empty, no_rows
        index, rows = read_index(path)
        if index.folder != folder and not was_moved(index, self._folder):
            raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another {output}")
        if index.model == empty.model:
            if (index.bundle, index.folder) != (bundle, folder):  # moved; search looks where index.json says
                index = msgspec.structs.replace(index, bundle=bundle, folder=folder)
                write_content(path, index)
            return path, index, rows
        if self._has_written:
            raise UsageError(
                f"Another model's index has been put at {path}: it stays, and the watch ends.",
                hint="watch with the bundle that made it, or choose another {output}",
            )
        self._reporter.note(
            f"another model made {path}: its {len(index.entries):,} images are embedded again, and it stays until then"
        )
        if is_index(path / NEXT):
            index, rows = read_index(path / NEXT)
            if (index.folder, index.model) == (folder, empty.model):
                return path / NEXT, msgspec.structs.replace(index, bundle=bundle), rows
        return path / NEXT, empty, no_rows

    def _compare(
        self, index: Index, listing: Listing, watched: Watched | None
    ) -> tuple[list[tuple[Entry, int]], list[Source], Update]:
        """Return the entries that stay, each with its row in the index before, and the images to embed."""
        names = sorted(listing.stamps.keys() - listing.messages.keys(), key=lambda name: name.split("/"))
        chosen = names if watched is None else [name for name in names if name in watched.take]
        kept, new = compare(index.entries, [Source(self._folder, name, listing.stamps[name]) for name in chosen])
        places = {entry.path: row for row, entry in enumerate(index.entries)}
        missing = places.keys() - listing.stamps.keys()
        stay, emptied = out_of_sight(self._folder, missing, index.listed_ns)
        stay |= {name for name in missing - stay if not is_gone(self._folder / name)}
        if watched is not None:
            stay.update(missing & set(watched.stay))
        gone, seen = missing - stay, stay | (listing.stamps.keys() - set(chosen))
        kept += [(entry, row) for row, entry in enumerate(index.entries) if entry.path in seen]
        # In the order of the index, so that it shows if nothing changed. Not by row: equal images may all have that of
        # one.
        kept.sort(key=lambda known: places.get(known[0].path, len(places)))
        moved = Counter(entry.sha256 for entry, row in kept if places.get(entry.path) != row)
        lost = Counter(index.entries[places[name]].sha256 for name in gone)
        self.failed, self.again = dict(listing.messages), set()
        unreadable = [*listing.others, *emptied, *listing.messages.values()]
        return kept, new, Update(kept=len(kept), removed=(lost - moved).total(), unreadable=unreadable)

    def _embed(self, growing: _Growing, update: Update) -> None:
        """Add batches of images to an index until `stop` is set, save it now and then, and count them in `update`."""
        new = growing.new
        self._reporter.update("embedding", 0, len(new))  # the first batch of large images takes many seconds
        batches = (
            embed_images_on_cluster(self._cluster, self._encoder, new)
            if self._cluster
            else embed_images(self._encoder, new)
        )
        resumed = time.monotonic()
        next_save = resumed + SAVE_EVERY_S
        for batch in batches:
            growing.parts.append(([source.entry() for source in batch.images], batch.embeddings))
            update.embedded += len(batch.images)
            chunk = new[growing.done : growing.done + len(batch.images) + len(batch.unreadable)]
            read = {source.name for source in batch.images}
            failed = dict(
                zip((source.name for source in chunk if source.name not in read), batch.unreadable, strict=True)
            )
            update.unreadable += map(str, failed.values())
            self.failed.update((name, str(error)) for name, error in failed.items())
            self.again.update(  # because of the system, and not of their content
                name
                for name, error in failed.items()
                if any(isinstance(cause, OSError) and cause.errno is not None for cause in causes(error))
            )
            if failed:  # now: the disk may be back when all is done
                is_away = is_empty_folder(self._folder)
                away = failed if is_away else out_of_sight(self._folder, failed, growing.listed_ns)[0]
                growing.unmounted += len(away)
            growing.done += len(chunk)
            self._reporter.update("embedding", growing.done, len(new))
            if self._stop.is_set():
                break
            if (began := time.monotonic()) > next_save and update.embedded:
                update.embedding_s += began - resumed
                growing.save()
                resumed = time.monotonic()
                next_save = resumed + max(SAVE_EVERY_S, REST * (resumed - began))
        update.embedding_s += time.monotonic() - resumed


def keep_graph(
    path: Path,
    index: Index,
    rows: Embeddings,
    *,
    threads: int | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> bool:
    """Build the graph of a large index if it has none that can be used, or a worn one; return whether it has one."""
    if len(rows) < GRAPH_FROM:
        return False
    graph = open_graph(path, index)
    if graph is not None and not graph.is_worn:
        return True
    if not usearch_is_installed():
        hint = install_command("usearch")
        reporter.note(f"search stays exact; with usearch it takes less time from {GRAPH_FROM:,} images on: {hint}")
        return False
    usable = graph is not None
    del graph  # closes the file, which Windows does not delete before
    built = build_graph(path, rows, threads=threads, stop=stop, reporter=reporter)
    if built is None:
        return usable
    index = msgspec.structs.replace(index, graph=built)
    write_bytes(keys_file(path, index), npy_bytes(keys_of(rows)))
    write_content(path, index)
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
    if not is_empty_folder(Path(index.folder)):
        return False
    there = 0
    for entry in index.entries:
        with suppress(OSError, ValueError):  # a damaged index.json may have a path with NUL
            there += (folder / entry.path).stat().st_size == entry.size_bytes
    return there > len(index.entries) / 2


class _Growing:
    """An index while images are embedded: what it has, and what of that is saved.

    Attributes:
        parts: entries and their embeddings; together, since Ctrl-C may come between any two lines.
        new: the images to embed, in order.
        done: how many of them were embedded, or could not be read.
        unmounted: how many of these could not be read because their disk has gone away.
        listed_ns: when the images were listed.
    """

    def __init__(
        self,
        place: Path,
        index: Index,
        rows: Embeddings,
        kept: list[tuple[Entry, int]],
        new: list[Source],
        *,
        listed_ns: int,
        unchanged: bool,
    ) -> None:
        """Begin with what is kept of an index and its rows; `unchanged` if that is what `place` has."""
        self._place, self._before = place, index
        numbers = np.array([row for _, row in kept], dtype=np.int64)
        self.parts = [([entry for entry, _ in kept], np.asarray(rows[numbers]))]
        self._saved = (index, rows) if unchanged else None
        self.new, self.listed_ns = new, listed_ns
        self.done = self.unmounted = 0

    def save(self) -> tuple[Index, Embeddings]:
        """Write the index with what it has now, and return it."""
        count, missing = sum(len(part) for part, _ in self.parts), len(self.new) - self.done + self.unmounted
        if self._saved is not None and (len(self._saved[0].entries), self._saved[0].missing) == (count, missing):
            return self._saved  # such as when none of the new images can be read
        entries, rows = [entry for part, _ in self.parts for entry in part], np.concatenate([p for _, p in self.parts])
        self.parts[:] = [(entries, rows)]  # a large index may not fit twice
        index = msgspec.structs.replace(
            self._before, entries=entries, missing=missing, listed_ns=self.listed_ns, cutoff=None
        )
        self._saved = write_index(self._place, index, rows), rows
        return self._saved
