"""Create and update an index of an image folder, once, or again and again while images come and go."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.image_files import list_images, look_at_images
from clip_rd_edge.bundle.images import DANGLING, require_image
from clip_rd_edge.errors import ConfigError, DiskFullError, InputError, UsageError, causes
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.embed import EmbeddedBatch, embed_images, embed_images_on_cluster, open_image_tower
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import (
    GRAPH_FROM,
    INDEX_FILE,
    NEXT,
    Entry,
    GraphFiles,
    Index,
    Rows,
    build_graph,
    delete,
    indexed_folder,
    is_index,
    is_worn,
    leftovers,
    model_key,
    moved_rows,
    read_graph,
    read_index,
    read_rows,
    remember_bundle,
    usearch_is_installed,
    without_damage,
    write_content,
    write_graph,
    write_index,
    write_rows,
)
from clip_rd_edge.utils.files import disk_full_error, now_in, sha256_of
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import exists, file_identity, is_file, is_folder, near_files
from clip_rd_edge.utils.reporting import SILENT, Reporter
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


SAVE_EVERY_S = 20.0  # the most work that a kill -9 can lose of an index that is saved fast
REST = 20  # a pause is at least this many times as long as the work before it, such as a save of the whole index


@dataclass(kw_only=True)
class Update:
    """The result of an update.

    Attributes:
        kept, embedded, removed: numbers of images.
        unreadable: one message per image or subfolder that could not be read, or whose name is not UTF-8.
        unreadable_images: those of images that could not be read, by their path in the folder.
        refused: paths of the images among them whose content the system did not give, as while another program has them
            open on Windows.
        approximate: whether search is approximate, because the index has a graph.
        vanished: paths of images that were listed, here or by a watch, and were not there when they were looked at.
        embedding_s: how long it took to embed images, in seconds.
        skipped: nothing was done, because the folder was gone, or empty, when a watch looked at it again, or `stop` was
            set while another process was writing.
    """

    kept: int = 0
    embedded: int = 0
    removed: int = 0
    unreadable: list[str] = field(default_factory=list)
    unreadable_images: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    approximate: bool = False
    vanished: set[str] = field(default_factory=set)
    embedding_s: float = field(default=0.0, compare=False)
    skipped: bool = False


def update_index(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    watched: Watched | None = None,
    stop: threading.Event | None = None,
    require: Callable[[], object] | None = None,
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
        watched: what a watch found in the folder; None takes all images.
        stop: ends the update after the batch in which it is set, with everything saved that is embedded, and the wait
            for another process at once.
        require: called before anything is written, once nobody else writes to the index, to refuse what is there then.
        cluster: address of a Ray cluster whose workers embed the images.
    """
    if not is_folder(folder):
        if watched is not None:
            return Update(skipped=True)
        raise no_folder_error(folder)
    for location in (folder.resolve(), encoder.folder.resolve()):
        if not is_unicode(str(location)):
            raise InputError(f"The path {printable_path(location)} is not UTF-8, as index.json is.", hint="rename it")
    if cluster is None:  # else its workers are asked
        encoder.require_right(encoder.manifest.image)
    # What is not an index, or of another folder, is refused before a lock is created in it.
    if not is_index(path) or indexed_folder(path) != str(folder.resolve()):
        _start(encoder, folder.resolve(), path)
    try:
        with exclusive_writer(path, on_wait=reporter.say, stop=stop) as may_write:
            if not may_write:
                return Update(skipped=True)
            if require is not None:
                require()
            remember_bundle(path, encoder)
            return _update(encoder, folder, path, watched=watched, stop=stop, cluster=cluster, reporter=reporter)
    except Exception as error:
        if (full := disk_full_error(error)) is None:
            raise
        raise _without_space(path, full) from error


def _without_space(path: Path, error: DiskFullError) -> DiskFullError:
    """Return the error of a full disk, with what is left of the index."""
    count = len(read_index(path)[0].entries) if is_index(path) else 0
    kept = f"{path} is an index of the {count:,} images that were saved before" if count else f"{path} is no index yet"
    return DiskFullError(
        f"{str(error).partition(';')[0]}; {kept}.",
        hint="free some space, then run the same command again, which embeds those that are missing",
    )


def _update(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    watched: Watched | None,
    stop: threading.Event | None,
    cluster: str | None,
    reporter: Reporter,
) -> Update:
    saved_at, index, rows = _start(encoder, folder.resolve(), path, reporter)
    # An index without that time was written later, by hours if it is large.
    last_listed_ns = index.listed_ns or ((saved_at / INDEX_FILE).stat().st_mtime_ns if index.entries else 0)
    if saved_at == path:  # what was begun with another model has been given up
        shutil.rmtree(path / NEXT, ignore_errors=True)
    current = str(encoder.folder.resolve()), str(folder.resolve())
    if (index.bundle, index.folder) != current:  # moved; search looks where index.json says, though no image is new
        index = msgspec.structs.replace(index, bundle=current[0], folder=current[1])
        write_content(saved_at, index)
    found, (index, rows) = index.entries, without_damage(index, rows)
    if len(index.entries) < len(found):
        reporter.say(f"{len(found) - len(index.entries):,} embeddings in {path} are damaged: they are computed again")
    listed_ns = int(now_in(path) * 1e9)
    plan = plan_update(folder, path, index, watched, last_listed_ns=last_listed_ns)
    if plan is None:
        return Update(kept=len(index.entries), skipped=True)
    update = Update(
        kept=len(plan.kept),
        removed=plan.removed,
        unreadable=plan.unreadable,
        unreadable_images=plan.unreadable_images,
        vanished=plan.vanished,
    )
    unchanged = is_index(saved_at) and [entry for entry, _ in plan.kept] == found
    if saved_at == path and unchanged and not plan.new and not index.missing:
        update.approximate = _keep_graph(path, index, rows, encoder.threads, stop, reporter)
        return update
    growing = _GrowingIndex(path, saved_at, index, rows, plan, listed_ns=listed_ns, unchanged=unchanged)
    reporter.update("embedding", 0, len(plan.new))  # the first batch of large images takes many seconds
    batches = embed_images_on_cluster(cluster, encoder, plan.new) if cluster else embed_images(encoder, plan.new)
    try:
        _embed(batches, folder, growing, update, stop, reporter)
    finally:
        saved, merged = growing.save()
    if saved_at != path:
        if saved.missing:
            return update
        saved = write_index(path, saved, merged)
        shutil.rmtree(saved_at, ignore_errors=True)
    update.approximate = _keep_graph(path, saved, merged, encoder.threads, stop, reporter)
    return update


class _GrowingIndex:
    """An index while images are embedded: what it has, and what of that is saved.

    Attributes:
        new: the images to embed, in order.
        done: how many of them were embedded, or could not be read.
        unmounted: how many of these could not be read because their disk has gone away.
        listed_ns: when the images were listed.
    """

    def __init__(
        self,
        path: Path,
        saved_at: Path,
        index: Index,
        rows: Embeddings,
        plan: Plan,
        *,
        listed_ns: int,
        unchanged: bool,
    ) -> None:
        """Begin with what `plan` keeps of an index and its rows; `unchanged` if that is what `saved_at` has."""
        self._path, self._saved_at, self._before = path, saved_at, index
        self._kept = np.array([row for _, row in plan.kept], dtype=np.int64)
        # Together: Ctrl-C may come between any two lines.
        self._parts = [([entry for entry, _ in plan.kept], np.asarray(rows[self._kept]))]
        self._graph: GraphFiles | None = None
        self._saved = (index, rows) if unchanged else None
        self.new, self.listed_ns = plan.new, listed_ns
        self.done = self.unmounted = 0

    def add(self, entries: list[Entry], embeddings: Embeddings) -> None:
        """Add embedded images."""
        self._parts.append((entries, embeddings))

    def save(self) -> tuple[Index, Embeddings]:
        """Write the index with what it has now, and return it."""
        count, missing = sum(len(part) for part, _ in self._parts), len(self.new) - self.done + self.unmounted
        if self._saved is not None and (len(self._saved[0].entries), self._saved[0].missing) == (count, missing):
            return self._saved  # such as when none of the new images can be read
        merged = np.concatenate([part for _, part in self._parts])
        # A large index may not fit twice.
        self._parts[:] = [([entry for part, _ in self._parts for entry in part], merged)]
        if self._before.graph and self._graph is None and len(self._kept) + len(self.new) >= GRAPH_FROM:
            self._graph = _moved_graph(self._path, self._before.graph, self._kept, len(self._before.entries))
        index = msgspec.structs.replace(
            self._before, entries=self._parts[0][0], graph=self._graph, missing=missing, listed_ns=self.listed_ns
        )
        self._saved = write_index(self._saved_at, index, merged), merged
        return self._saved


def _embed(
    batches: Iterable[EmbeddedBatch[Source]],
    folder: Path,
    growing: _GrowingIndex,
    update: Update,
    stop: threading.Event | None,
    reporter: Reporter,
) -> None:
    """Add batches of images to an index until `stop` is set, save it now and then, and count them in `update`."""
    resumed = time.monotonic()
    next_save = resumed + SAVE_EVERY_S
    for batch in batches:
        growing.add([source.entry() for source in batch.images], batch.embeddings)
        update.embedded += len(batch.images)
        update.unreadable += map(str, batch.unreadable)
        chunk = growing.new[growing.done : growing.done + len(batch.images) + len(batch.unreadable)]
        read = {source.name for source in batch.images}
        failed = [source.name for source in chunk if source.name not in read]
        update.unreadable_images.update(zip(failed, map(str, batch.unreadable), strict=True))
        update.refused.update(name for name, error in zip(failed, batch.unreadable, strict=True) if _refused(error))
        if failed:  # now: the disk may be back when all is done
            update.vanished |= {name for name in failed if not os.path.lexists(folder / name)}
            growing.unmounted += len(not_mounted(folder, failed, growing.listed_ns))
        growing.done += len(chunk)
        reporter.update("embedding", growing.done, len(growing.new))
        if stop is not None and stop.is_set():
            break
        if (began := time.monotonic()) > next_save and update.embedded:
            update.embedding_s += began - resumed
            growing.save()
            resumed = time.monotonic()
            next_save = resumed + max(SAVE_EVERY_S, REST * (resumed - began))
    update.embedding_s += time.monotonic() - resumed


def no_folder_error(folder: Path) -> InputError:
    """Return the error for what is no folder, with the names that are close to its own."""
    reason = "is a file." if exists(folder) else f"does not exist.{near_files(folder)}"
    return InputError(f"The folder {folder} {reason}", hint="name a folder with images")


def _refused(error: InputError) -> bool:
    """Return whether an image could not be read because of the system, and not of its content."""
    return any(isinstance(cause, OSError) and cause.errno is not None for cause in causes(error))


def _moved_graph(path: Path, graph: GraphFiles, kept: Rows, count: int) -> GraphFiles | None:
    """Write the rows of a graph after an update, see `moved_rows`; return None if those before it cannot be read."""
    if (keys := read_rows(path, graph)) is None:
        return None
    return write_rows(path, graph, moved_rows(keys[0], kept, count), keys[1])


def _keep_graph(
    path: Path,
    index: Index,
    rows: Embeddings,
    threads: int | None,
    stop: threading.Event | None,
    reporter: Reporter,
) -> bool:
    """Build the graph of a large index if it has none that can be used, or a worn one; return whether it has one."""
    if len(rows) < GRAPH_FROM:
        return False
    graph = read_graph(path, index)
    usable = graph is not None
    if graph is not None and not is_worn(graph.rows, len(rows)):
        return True
    if not usearch_is_installed():
        hint = install_command("usearch")
        reporter.say(f"search stays exact; with usearch it takes less time from {GRAPH_FROM:,} images on: {hint}")
        return False
    del graph  # closes the file, which Windows does not delete before
    delete(leftovers(path, index.graph if usable else None) - {path / index.embeddings})
    built = build_graph(rows, path=path, threads=threads, stop=stop, reporter=reporter)
    if built is None:
        return usable
    index = msgspec.structs.replace(index, graph=write_graph(path, built))
    write_content(path, index)
    delete(leftovers(path, index.graph) - {path / index.embeddings})
    return True


def _start(
    encoder: BundleEncoder, folder: Path, path: Path, reporter: Reporter = SILENT
) -> tuple[Path, Index, Embeddings]:
    """Return the index to go on with, empty if there is none, and the folder to save it in.

    That is `path`, or NEXT in it while another model's index is there.
    """
    empty = Index(
        folder=str(folder),
        bundle=str(encoder.folder.resolve()),
        model=model_key(encoder.manifest),
        embeddings="",
        entries=[],
    )
    no_rows = np.zeros((0, encoder.manifest.embedding_size), dtype=np.float32)
    if not is_index(path):
        ours = {path / LOCK_FILE, *leftovers(path)}
        if is_file(path) or (is_folder(path) and set(path.iterdir()) - ours):
            raise UsageError(f"The output {path} exists and is not an index.", hint="choose another {output}")
        return path, empty, no_rows
    index, rows = read_index(path)
    if index.folder != empty.folder and not was_moved(index, folder):
        raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another {output}")
    if index.model == empty.model:
        return path, index, rows
    reporter.say(
        f"another model made {path}: its {len(index.entries):,} images are embedded again, and it stays until then"
    )
    if is_index(path / NEXT):
        index, rows = read_index(path / NEXT)
        if (index.folder, index.model) == (empty.folder, empty.model):
            return path / NEXT, index, rows
    return path / NEXT, empty, no_rows


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
