"""Create and update an index: compare the image folder with it, embed what is new, and save as it goes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.image_files import list_images
from clip_rd_edge.errors import DiskFullError, InputError, UsageError, causes
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.embed import embed_images, embed_images_on_cluster
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index.folder import (
    Source,
    compare,
    find_sources,
    is_empty_folder,
    is_gone,
    not_mounted,
    out_of_sight,
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
    INDEX_VERSION,
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
    write_index,
)
from clip_rd_edge.utils.files import disk_full_error, now_in, write_bytes
from clip_rd_edge.utils.lock import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import exists, is_file, is_folder
from clip_rd_edge.utils.printable import is_unicode
from clip_rd_edge.utils.reporting import SILENT, Reporter

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
        vanished: paths of images that were listed, here or in `settled`, and were not there when they were looked at.
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
    settled: Collection[str] | None = None,
    stop: threading.Event | None = None,
    require: Callable[[], object] | None = None,
    cluster: str | None = None,
    reporter: Reporter = SILENT,
) -> Update:
    """Create or update the index at `path` for the images in `folder`.

    An image whose size and modification time are those in the index counts as unchanged. If the index has an entry of
    the same size, the file is hashed: it may have been moved, copied or touched, and is embedded only if its content is
    new. The same holds for all of them if the folder was moved. Progress is saved every SAVE_EVERY_S seconds, less
    often where that takes long, and on an interruption. Another model's index stays until all images are embedded
    again. If another process is writing to the index, the update waits for it.

    Args:
        settled: paths in the folder of the images to take; others keep the entry that they have, and so do all if the
            folder was unmounted since it was listed. None takes all.
        stop: ends the update after the batch in which it is set, with everything saved that is embedded, and the wait
            for another process at once.
        require: called before anything is written, once nobody else writes to the index, to refuse what is there then.
        cluster: address of a Ray cluster whose workers embed the images.

    Raises:
        InputError: the folder does not exist, or has no images, or its path is not UTF-8.
        UsageError: `path` contains something else, or the index of another folder; or the image tower's
            INT8 gives wrong answers here.
        DiskFullError: there is no space left; what was saved before is kept.
    """
    if not is_folder(folder):
        if settled is not None:
            return Update(skipped=True)
        reason = "is a file" if exists(folder) else "does not exist"
        raise InputError(f"The folder {folder} {reason}.", hint="name a folder with images")
    for location in (folder.resolve(), encoder.folder.resolve()):
        if not is_unicode(str(location)):
            raise InputError(f"The path {_printable(location)} is not UTF-8, as index.json is.", hint="rename it")
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
            return _update(encoder, folder, path, settled=settled, stop=stop, cluster=cluster, reporter=reporter)
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
    settled: Collection[str] | None,
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
        write_bytes(saved_at / INDEX_FILE, msgspec.json.encode(index))
    listed_ns = int(now_in(path) * 1e9)
    plan = _plan(folder, path, index, settled, last_listed_ns=last_listed_ns)
    if plan is None:
        return Update(kept=len(index.entries), skipped=True)
    new, update = plan.new, plan.update
    entries = [entry for entry, _ in plan.kept]
    unchanged = entries == index.entries and is_index(saved_at)
    if saved_at == path and unchanged and not new and not index.missing:
        update.approximate = _keep_graph(path, index, rows, encoder.threads, stop, reporter)
        return update
    kept_rows = np.array([row for _, row in plan.kept], dtype=np.int64)
    parts = [(entries, np.asarray(rows[kept_rows]))]  # together: Ctrl-C may come between any two lines
    graph: GraphFiles | None = None
    on_disk = (index, rows) if unchanged else None

    def save() -> tuple[Index, Embeddings]:
        nonlocal graph, on_disk
        count, missing = sum(len(part) for part, _ in parts), len(new) - done + unmounted_images
        if on_disk is not None and (len(on_disk[0].entries), on_disk[0].missing) == (count, missing):
            return on_disk  # such as when none of the new images can be read
        merged = np.concatenate([part for _, part in parts])
        parts[:] = [([entry for part, _ in parts for entry in part], merged)]  # a large index may not fit twice
        if index.graph and graph is None and len(kept_rows) + len(new) >= GRAPH_FROM:
            graph = _moved_graph(path, index.graph, kept_rows, len(index.entries))
        entries = parts[0][0]
        current = msgspec.structs.replace(index, entries=entries, graph=graph, missing=missing, listed_ns=listed_ns)
        on_disk = write_index(saved_at, current, merged), merged
        return on_disk

    resumed = time.monotonic()
    next_save = resumed + SAVE_EVERY_S
    done = unmounted_images = 0
    reporter.update("embedding", 0, len(new))  # the first batch of large images takes many seconds
    try:
        for batch in embed_images_on_cluster(cluster, encoder, new) if cluster else embed_images(encoder, new):
            parts.append(([source.entry() for source in batch.images], batch.embeddings))
            update.embedded += len(batch.images)
            update.unreadable += map(str, batch.unreadable)
            chunk = new[done : done + len(batch.images) + len(batch.unreadable)]
            read = {source.name for source in batch.images}
            failed = [source.name for source in chunk if source.name not in read]
            update.unreadable_images.update(zip(failed, map(str, batch.unreadable), strict=True))
            update.refused.update(name for name, error in zip(failed, batch.unreadable, strict=True) if _refused(error))
            if failed:  # now: the disk may be back when all is done
                update.vanished |= {name for name in failed if not os.path.lexists(folder / name)}
                unmounted_images += len(not_mounted(folder, failed, listed_ns))
            done += len(chunk)
            reporter.update("embedding", done, len(new))
            if stop is not None and stop.is_set():
                break
            if (began := time.monotonic()) > next_save and update.embedded:
                update.embedding_s += began - resumed
                save()
                resumed = time.monotonic()
                next_save = resumed + max(SAVE_EVERY_S, REST * (resumed - began))
        update.embedding_s += time.monotonic() - resumed
    finally:
        saved, merged = save()
    if saved_at != path:
        if saved.missing:
            return update
        saved = write_index(path, saved, merged)
        shutil.rmtree(saved_at, ignore_errors=True)
    update.approximate = _keep_graph(path, saved, merged, encoder.threads, stop, reporter)
    return update


@dataclass(frozen=True)
class _Plan:
    """What an update does to an index.

    Attributes:
        kept: entries that stay, each with its row in the index before.
        new: images to embed.
        update: the result as far as it is known.
    """

    kept: list[tuple[Entry, int]]
    new: list[Source]
    update: Update


def _plan(
    folder: Path, path: Path, index: Index, settled: Collection[str] | None, *, last_listed_ns: int
) -> _Plan | None:
    """Compare the folder with the index at `path`; None if a watch found the folder unmounted.

    Args:
        last_listed_ns: when the folder was listed for the index.
    """
    folders: list[InputError] = []  # that cannot be read
    images = list_images(folder, on_unreadable=folders.append)
    named = {image: image.relative_to(folder).as_posix() for image in images}
    names = [name for name in named.values() if is_unicode(name)]
    chosen = names if settled is None else [name for name in names if name in settled]
    sources, broken = find_sources(folder, chosen)
    unmounted = not images or is_empty_folder(folder)  # since the watch has listed it, or since it was listed above
    if unmounted and settled is not None:
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
    unsettled = hidden | broken.keys() | (set(names) - set(chosen))
    kept, new = compare(index.entries, sources)
    kept += [(entry, row) for row, entry in enumerate(index.entries) if entry.path in unsettled]
    # In the order of the index, so that it shows if nothing changed. Not by row: equal images may all have that of one.
    kept.sort(key=lambda known: places.get(known[0].path, len(places)))
    kept_rows, removed = {row for _, row in kept}, gone - hidden  # a row of one that was moved is kept
    count = sum(entry.path in removed and row not in kept_rows for row, entry in enumerate(index.entries))
    update = Update(kept=len(kept), removed=count)
    update.unreadable += [*map(str, folders), *emptied, *broken.values()]
    update.unreadable_images.update(broken)
    update.vanished = set(settled or ()) - (set(named.values()) - set(chosen)) - present
    update.unreadable += [
        f"The name of {_printable(image)} is not UTF-8, as index.json is; rename it."
        for image, name in named.items()
        if not is_unicode(name)
    ]
    return _Plan(kept, new, update)


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
    write_bytes(path / INDEX_FILE, msgspec.json.encode(index))
    delete(leftovers(path, index.graph) - {path / index.embeddings})
    return True


def _start(
    encoder: BundleEncoder, folder: Path, path: Path, reporter: Reporter = SILENT
) -> tuple[Path, Index, Embeddings]:
    """Return the index to go on with, empty if there is none, and the folder to save it in.

    That is `path`, or NEXT in it while another model's index is there.
    """
    empty = Index(
        version=INDEX_VERSION,
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
            raise UsageError(f"The output {path} exists and is not an index.", hint="choose another -o")
        return path, empty, no_rows
    index, rows = read_index(path)
    if index.folder != empty.folder and not was_moved(index, folder):
        raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another -o")
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


def _printable(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")
