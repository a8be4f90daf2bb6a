"""Create and update an index: compare the image folder with it, embed what is new, and save as it goes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.errors import DiskFullError, InputError, UsageError, causes
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.embed import EmbeddedBatch, embed_images, embed_images_on_cluster
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index.folder import (
    Plan,
    Source,
    Watched,
    not_mounted,
    plan_update,
    printable_path,
    was_moved,
)
from clip_rd_edge.runtime.index.graph import (
    GRAPH_FROM,
    GraphFiles,
    Rows,
    build_graph,
    is_worn,
    moved_rows,
    read_rows,
    usearch_is_installed,
    write_graph,
    write_rows,
)
from clip_rd_edge.runtime.index.image_index import (
    INDEX_FILE,
    NEXT,
    Entry,
    Index,
    delete,
    indexed_folder,
    is_index,
    leftovers,
    model_key,
    read_graph,
    read_index,
    remember_bundle,
    without_damage,
    write_content,
    write_index,
)
from clip_rd_edge.utils.files import disk_full_error, now_in
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import exists, is_file, is_folder, near_files
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.text import is_unicode

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
