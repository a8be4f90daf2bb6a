"""An index of an image folder, to search by text or image.

    index.json           image folder, bundle, and per image its path, size, modification time and SHA-256
    embeddings-KEY.npy   the images' embeddings, (N, D) float32, one row per entry
    graph-KEY.…          from a million images on: for approximate search, see `runtime.index_graph`

index.json names its embeddings file and is written last and atomically: if indexing is interrupted, the folder still
holds a valid, older index. Writers wait for each other (`utils.lock`). Readers take no lock, so that a folder that they
cannot write to can be searched: if the embeddings are gone that index.json named, they read the new index.json.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.contract.bundle import Manifest, is_bundle
from clip_rd_edge.contract.encoder import Embeddings, require_finite, top_indices
from clip_rd_edge.contract.images import IMAGE_SUFFIXES, ImageInput, as_rgb, list_images
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.backends.providers import AUTO
from clip_rd_edge.runtime.embed import embed_images
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index_graph import (
    GRAPH_FILES,
    GRAPH_FROM,
    MAX_TOP,
    Graph,
    GraphFiles,
    build_graph,
    is_worn,
    moved_rows,
    open_graph,
    read_rows,
    usearch_is_installed,
    write_graph,
    write_rows,
)
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.arrays import load_array
from clip_rd_edge.utils.io import is_plain_name, looks_like_path, near_files, read_json, sha256_of, write_bytes
from clip_rd_edge.utils.lock import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import exists, is_file, is_folder
from clip_rd_edge.utils.reporting import SILENT, Reporter

INDEX_VERSION = 1
_FILE, _ROWS = "index.json", "embeddings-"


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """An indexed image; `path` is relative to the image folder, with / as separator."""

    path: str
    size_bytes: int
    modified_ns: int
    sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The content of index.json.

    Attributes:
        folder: absolute path of the image folder.
        bundle: absolute path of the bundle that embedded the images.
        model: `model_key` of that bundle.
        embeddings: name of the embeddings file, which has one row per entry.
        graph: the files of approximate search; None if search is exact.
    """

    version: int
    folder: str
    bundle: str
    model: str
    embeddings: str
    entries: list[Entry]
    graph: GraphFiles | None = None


class Hit(NamedTuple):
    """An image and its cosine similarity to the query."""

    path: Path
    similarity: float


def model_key(manifest: Manifest) -> str:
    """Return a key of the model that embeds images: of the image tower, its precision, and the preprocessing.

    It covers neither runtime nor device: the same bundle gives nearly the same embeddings everywhere, within the limits
    of `verify`, so an index that one machine made is searched, and updated, on another.
    """
    tower = "".join(manifest.files.get(name, "") for name in manifest.files_of(manifest.image))
    # Only a bundle in bfloat16 computes in another precision than its file says, which is that of the float32 bundle.
    precision = "bf16" if manifest.image.precision.startswith("bf16") else ""
    return hashlib.sha256(tower.encode() + precision.encode() + msgspec.json.encode(manifest.preprocessing)).hexdigest()


def is_index(path: Path) -> bool:
    """Return whether `path` is the folder of an index."""
    return is_file(path / _FILE)


def read_index(path: Path) -> tuple[Index, Embeddings]:
    """Read an index and its embeddings, which are memory-mapped.

    Raises:
        InputError: `path` is not an index.
        ConfigError: the index is damaged or has a newer format.
    """
    if not is_index(path):
        raise InputError(f"{path} is not an index: it has no {_FILE}.", hint="create one with clip-rd-edge index")
    missing = ""
    while True:
        index = read_json(path / _FILE, Index)
        if index.version > INDEX_VERSION:
            raise ConfigError(
                f"{path / _FILE} has version {index.version}; this clip-rd-edge reads up to {INDEX_VERSION}."
            )
        for name in (index.embeddings, *((index.graph.file, index.graph.rows) if index.graph else ())):
            if not is_plain_name(name):
                raise ConfigError(f"{path / _FILE} names the file {name!r}, which is not inside the index.")
        try:
            rows = load_array(path / index.embeddings, memory_mapped=True)
            break
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, FileNotFoundError) and index.embeddings != missing:
                missing = index.embeddings  # a writer may have replaced both files since index.json was read
                continue
            raise ConfigError(
                f"The index {path} is damaged: {error}.", hint="delete it and index the folder again"
            ) from error
    if rows.ndim != 2 or len(rows) != len(index.entries) or rows.dtype != np.float32:
        raise ConfigError(
            f"The index {path} has {len(index.entries)} images but embeddings of shape {rows.shape} and type "
            f"{rows.dtype}.",
            hint="delete it and index the folder again",
        )
    return index, rows


def write_index(path: Path, index: Index, rows: Embeddings) -> Index:
    """Write an index, replacing the one at `path`; return it with the new name of its embeddings file.

    Call this with the folder locked: it deletes what older writers have left.
    """
    old_files = _leftovers(path, index.graph)
    buffer = io.BytesIO()
    np.save(buffer, rows.astype(np.float32, copy=False))
    name = f"{_ROWS}{uuid.uuid4().hex[:12]}.npy"
    write_bytes(path / name, buffer.getvalue())
    index = msgspec.structs.replace(index, embeddings=name)
    write_bytes(path / _FILE, msgspec.json.encode(index))
    _delete(old_files)
    return index


def _delete(files: set[Path]) -> None:
    for file in files:
        with suppress(OSError):  # Windows cannot delete a file that a search has open: the next update deletes it
            file.unlink()


def _leftovers(path: Path, graph: GraphFiles | None = None) -> set[Path]:
    """Return the files of a writer other than index.json and `graph`: also what a kill left half written."""
    patterns = (f"{_ROWS}*.npy", f".{_ROWS}*.tmp", f".{_FILE}.*.tmp", GRAPH_FILES)
    files = {file for pattern in patterns for file in path.glob(pattern)}
    return files - ({path / graph.file, path / graph.rows} if graph else set())


def nearest(index: Index, rows: Embeddings, query: Embeddings, *, top: int, graph: Graph | None = None) -> list[Hit]:
    """Return the images nearest to a query embedding, (D,) or (1, D), nearest first; ties keep the index's order.

    Without a graph, or for more than MAX_TOP results, the search is exact: one matrix product over all rows, limited by
    memory bandwidth. For 100,000 images it takes less time than reading index.json. With a graph, only the rows that it
    proposes are compared: `python benchmarks/scripts/search.py 100000 --graph` measures both.
    """
    query = query.reshape(-1)
    if rows.shape[1] != len(query):
        raise ConfigError(
            f"The index has embeddings of {rows.shape[1]} entries; expected {len(query)}, the model's.",
            hint="delete it and index the folder again",
        )
    candidates = np.sort(graph.candidates(query, top)) if graph is not None and top <= MAX_TOP else None
    compared = rows if candidates is None else rows[candidates]
    similarities = require_finite(np.asarray(compared @ query), "An image of the index, or the query,")
    best = top_indices(similarities, top)
    numbers = best if candidates is None else candidates[best]
    return [
        Hit(Path(index.folder, index.entries[number].path), float(similarities[i]))
        for i, number in zip(best.tolist(), numbers.tolist(), strict=True)
    ]


def read_graph(path: Path, index: Index) -> Graph | None:
    """Open the graph of an index; None if it has none, or it cannot be used here: then search is exact."""
    return open_graph(path, index.graph, len(index.entries)) if index.graph else None


SAVE_EVERY_S = 20.0  # the most work that a kill -9 can lose


@dataclass(kw_only=True)
class Update:
    """The result of an update.

    Attributes:
        kept, embedded, removed: numbers of images.
        unreadable: one message per image or subfolder that could not be read, or whose name is not UTF-8.
        unreadable_images: those of images that could not be read, by their path in the folder.
        approximate: whether search is approximate, because the index has a graph.
    """

    kept: int = 0
    embedded: int = 0
    removed: int = 0
    unreadable: list[str] = field(default_factory=list)
    unreadable_images: dict[str, str] = field(default_factory=dict)
    approximate: bool = False


class _Source:
    """An image file whose SHA-256 is computed when its content is read, so that it is read only once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        stat = self.path.stat()  # before reading: a change in between is noticed by the next update
        self.size_bytes, self.modified_ns = stat.st_size, stat.st_mtime_ns
        self.sha256 = ""

    def read_bytes(self) -> bytes:
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        return content

    def entry(self, sha256: str = "") -> Entry:
        return Entry(
            path=self.name,
            size_bytes=self.size_bytes,
            modified_ns=self.modified_ns,
            sha256=sha256 or self.sha256,
        )

    def __str__(self) -> str:
        return str(self.path)


def update_index(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    settled: Collection[str] | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> Update:
    """Create or update the index at `path` for the images in `folder`.

    An image whose size and modification time are those in the index counts as unchanged. If the index has an entry of
    the same size, the file is hashed: it may have been moved, copied or touched, and is embedded only if its content is
    new. Progress is saved every SAVE_EVERY_S seconds, and on an interruption. If another process is writing to the
    index, the update waits for it.

    Args:
        settled: paths in the folder of the images to take; others keep the entry that they have. None takes all.
        stop: ends the update after the batch in which it is set, with everything saved that is embedded.

    Raises:
        InputError: the folder does not exist, or has no images, or its path is not UTF-8.
        UsageError: `path` contains something else, or the index of another folder.
    """
    if not is_folder(folder):
        reason = "is a file" if exists(folder) else "does not exist"
        raise InputError(f"The folder {folder} {reason}.", hint="name a folder with images")
    for location in (folder.resolve(), encoder.folder.resolve()):
        if not _is_utf8(str(location)):
            raise InputError(f"The path {_printable(location)} is not UTF-8, as index.json is.", hint="rename it")
    _start(encoder, folder.resolve(), path)  # refuse a folder that is not an index before creating a lock in it
    with exclusive_writer(path, on_wait=reporter.say):
        return _update(encoder, folder, path, settled=settled, stop=stop, reporter=reporter)


def _update(
    encoder: BundleEncoder,
    folder: Path,
    path: Path,
    *,
    settled: Collection[str] | None,
    stop: threading.Event | None,
    reporter: Reporter,
) -> Update:
    index, rows = _start(encoder, folder.resolve(), path)
    folders: list[InputError] = []  # that cannot be read
    images = list_images(folder, on_unreadable=folders.append)
    names = [name for image in images if _is_utf8(name := image.relative_to(folder).as_posix())]
    if not images and settled is not None:  # the folder was unmounted since it was listed
        return Update(kept=len(index.entries))
    if not images and not index.entries:
        raise InputError(f"The folder {folder} has no images.", hint="name a folder with images")
    unsettled = set() if settled is None else set(names) - set(settled)
    kept, new = _compare(index.entries, _sources(folder, [name for name in names if name not in unsettled]))
    kept += [(entry, row) for row, entry in enumerate(index.entries) if entry.path in unsettled]
    entries, parts = [entry for entry, _ in kept], [np.asarray(rows[[row for _, row in kept]])]
    update = Update(kept=len(kept), removed=len({entry.path for entry in index.entries} - set(names)))
    update.unreadable += map(str, folders)
    update.unreadable += [
        f"The name of {_printable(image)} is not UTF-8, as index.json is; rename it."
        for image in images
        if not _is_utf8(str(image.relative_to(folder)))
    ]
    if entries == index.entries and not new and is_index(path):
        update.approximate = _keep_graph(path, index, rows, encoder.threads, stop, reporter)
        return update
    graph = None
    if index.graph and (keys := read_rows(path, index.graph)) is not None and len(kept) + len(new) >= GRAPH_FROM:
        moved = moved_rows(keys, np.array([row for _, row in kept], dtype=np.int64), len(index.entries))
        graph = write_rows(path, index.graph, moved)

    def save() -> tuple[Index, Embeddings]:
        merged = np.concatenate(parts)
        return write_index(path, msgspec.structs.replace(index, entries=entries, graph=graph), merged), merged

    last_saved, done = time.monotonic(), 0
    try:
        for batch in embed_images(encoder, new):
            parts.append(batch.embeddings)
            entries += [source.entry() for source in batch.images]
            update.embedded += len(batch.images)
            update.unreadable += map(str, batch.unreadable)
            chunk = new[done : done + len(batch.images) + len(batch.unreadable)]
            read = {source.name for source in batch.images}
            failed = [source.name for source in chunk if source.name not in read]
            update.unreadable_images.update(zip(failed, map(str, batch.unreadable), strict=True))
            done += len(chunk)
            reporter.update("embedding", done, len(new))
            if stop is not None and stop.is_set():
                break
            if time.monotonic() - last_saved > SAVE_EVERY_S:
                save()
                last_saved = time.monotonic()
    finally:
        saved, merged = save()
    update.approximate = _keep_graph(path, saved, merged, encoder.threads, stop, reporter)
    return update


def _keep_graph(
    path: Path,
    index: Index,
    rows: Embeddings,
    threads: int | None,
    stop: threading.Event | None,
    reporter: Reporter,
) -> bool:
    """Build the graph of a large index if it has none, or a worn one; return whether it has one."""
    if len(rows) < GRAPH_FROM:
        return False
    keys = read_rows(path, index.graph) if index.graph else None
    if keys is not None and not is_worn(keys, len(rows)):
        return True
    if not usearch_is_installed():
        hint = install_command("usearch")
        reporter.say(f"search stays exact; with usearch it takes less time from {GRAPH_FROM:,} images on: {hint}")
        return index.graph is not None
    graph = build_graph(rows, threads=threads, stop=stop, reporter=reporter)
    if graph is None:
        return index.graph is not None
    index = msgspec.structs.replace(index, graph=write_graph(path, graph))
    write_bytes(path / _FILE, msgspec.json.encode(index))
    _delete(_leftovers(path, index.graph) - {path / index.embeddings})
    return True


def _start(encoder: BundleEncoder, folder: Path, path: Path) -> tuple[Index, Embeddings]:
    """Return the index at `path`, or an empty one if there is none or another model created it."""
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
        ours = {path / LOCK_FILE, *_leftovers(path)}
        if is_file(path) or (is_folder(path) and set(path.iterdir()) - ours):
            raise UsageError(f"The output {path} exists and is not an index.", hint="choose another -o")
        return empty, no_rows
    index, rows = read_index(path)
    if index.folder != empty.folder:
        raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another -o")
    if index.model != empty.model:
        return empty, no_rows
    return msgspec.structs.replace(index, bundle=empty.bundle), rows


def _sources(folder: Path, names: list[str]) -> list[_Source]:
    """Return the files, without those that were deleted since they were listed."""
    sources = []
    for name in names:
        with suppress(FileNotFoundError):
            sources.append(_Source(folder, name))
    return sources


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python represents a byte that is not UTF-8 as half a surrogate pair
        return False
    return True


def _printable(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _compare(known: list[Entry], sources: list[_Source]) -> tuple[list[tuple[Entry, int]], list[_Source]]:
    """Split the files into those already in the index, with their rows, and those to embed."""
    rows = {entry.path: row for row, entry in enumerate(known)}
    sizes = {entry.size_bytes for entry in known}
    contents = {entry.sha256: row for row, entry in enumerate(known)}
    kept: list[tuple[Entry, int]] = []
    new: list[_Source] = []
    for source in sources:
        row = rows.get(source.name)
        if row is not None and source.entry(known[row].sha256) == known[row]:
            kept.append((known[row], row))
            continue
        digest = ""
        if source.size_bytes in sizes:
            with suppress(OSError):  # reported when it is opened
                digest = sha256_of(source.path)
        if digest in contents:
            kept.append((source.entry(digest), contents[digest]))
        else:
            new.append(source)
    return kept, new


def search_index(
    path: Path,
    query: ImageInput,
    *,
    top: int = 10,
    bundle: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    exact: bool = False,
    threads: int | None = None,
    device: str = AUTO,
) -> list[Hit]:
    """Search the index at `path` for the images nearest to a query; nearest first.

    Args:
        query: a text or an image; a string that is the path of a file is opened as an image.
        top: number of images to return.
        bundle: current path of the bundle that created the index; None uses the path in the index.
        folder: current path of the image folder; None uses the path in the index.
        exact: compare all images, even if the index has a graph.
        threads, device: see `runtime.load.load`.

    Raises:
        InputError: the query is empty or the path of no image, there is no index, the bundle has been moved, or another
            bundle created the index.
    """
    if isinstance(query, str) and not query.strip():
        raise InputError("The query is empty.", hint='pass a text, such as "a red car", or the path of an image')
    if isinstance(query, str):
        query = _text_or_image(query)
    index, rows = read_index(path)
    if folder is not None:
        index = msgspec.structs.replace(index, folder=os.fspath(folder))
    if bundle is None and not is_bundle(Path(index.bundle)):
        raise InputError(
            f"The bundle that created the index {path} is not at {index.bundle} any more.",
            hint="name its current path with --bundle",
        )
    encoder = load(bundle or index.bundle, threads=threads, device=device)
    if model_key(encoder.manifest) != index.model:
        raise InputError(
            f"The bundle {encoder.folder} is not the one that created the index {path}.",
            hint=f"create it again: clip-rd-edge index {encoder.folder} {index.folder} -o {path}",
        )
    embedding = encoder.encode_texts([query]) if isinstance(query, str) else encoder.encode_images([as_rgb(query)])
    return nearest(index, rows, embedding, top=top, graph=None if exact else read_graph(path, index))


def _text_or_image(query: str) -> str | Path:
    """Return the path of the image that a query names, or else the query, which is a text.

    Raises:
        InputError: the query looks like a path, but is not that of an image file.
    """
    path = Path(query).expanduser()
    with suppress(OSError, ValueError):  # a text may be too long for a path
        if path.is_file():
            return path
        if looks_like_path(query, suffixes=IMAGE_SUFFIXES):
            if path.is_dir():
                raise InputError(
                    f"The query {query!r} is a folder; expected a text or the path of an image.",
                    hint="name one of its images",
                )
            raise InputError(
                f"The query {query!r} looks like the path of an image, but there is no such file.{near_files(path)}",
                hint="check the path, or describe the image in words",
            )
    return query
