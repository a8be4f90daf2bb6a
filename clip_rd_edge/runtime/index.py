"""An index of a picture folder: what was embedded, and the nearest of it to a text or a picture.

    index.json           folder, bundle, and for each picture its path, size, time and SHA-256
    embeddings-KEY.npy   theirs, (N, D) float32, row by row

index.json names its embeddings file and is written last, under a temporary name: whenever an indexing is interrupted,
the folder holds the index of some moment before.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.contract.encoder import Embeddings, greatest
from clip_rd_edge.contract.images import ImageInput, as_rgb, images_below
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.runtime.backends.providers import AUTO
from clip_rd_edge.runtime.embed import embed_images
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.io import read_json, sha256_of, write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

INDEX_VERSION = 1
_FILE = "index.json"


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A picture that was embedded; `path` is relative to the index's folder, with / between its parts."""

    path: str
    size_bytes: int
    modified_ns: int
    sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """index.json.

    Attributes:
        folder: the pictures', absolute.
        bundle: the one that embedded them, absolute.
        model: `model_key` of that bundle.
        embeddings: name of the file with the rows, one an entry.
    """

    version: int
    folder: str
    bundle: str
    model: str
    embeddings: str
    entries: list[Entry]


class Hit(NamedTuple):
    """A picture and its cosine similarity to what was searched for."""

    path: Path
    similarity: float


def model_key(manifest: Manifest) -> str:
    """Changes when the same picture might get another embedding: with the image tower or the preprocessing."""
    tower = manifest.files.get(manifest.image.file, "")
    return hashlib.sha256(tower.encode() + msgspec.json.encode(manifest.preprocessing)).hexdigest()


def is_index(path: Path) -> bool:
    """Whether there is an index at `path`."""
    return (path / _FILE).is_file()


def read_index(path: Path) -> tuple[Index, Embeddings]:
    """An index and its rows, which are read from disk as they are used.

    Raises:
        InputError: there is no index.
        ConfigError: it is damaged, or of a newer format.
    """
    if not is_index(path):
        raise InputError(f"{path} is no index: it has no {_FILE}.", hint="make one with clip-rd-edge index")
    index = read_json(path / _FILE, Index)
    if index.version > INDEX_VERSION:
        raise ConfigError(f"{path / _FILE} has version {index.version}; this clip-rd-edge reads up to {INDEX_VERSION}.")
    try:
        rows = np.load(path / index.embeddings, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"The index {path} is damaged: {error}.", hint="remove it and index again") from error
    if rows.ndim != 2 or len(rows) != len(index.entries):
        raise ConfigError(f"The index {path} has {len(index.entries)} pictures for rows of shape {rows.shape}.")
    return index, rows


def write_index(path: Path, index: Index, rows: Embeddings) -> None:
    """Write an index in place of the one at `path`; what `index` says of its embeddings file is passed over."""
    old = set(path.glob("embeddings-*.npy"))
    buffer = io.BytesIO()
    np.save(buffer, rows.astype(np.float32, copy=False))
    name = f"embeddings-{uuid.uuid4().hex[:12]}.npy"
    write_bytes(path / name, buffer.getvalue())
    write_bytes(path / _FILE, msgspec.json.encode(msgspec.structs.replace(index, embeddings=name)))
    for file in old:
        with suppress(OSError):  # Windows keeps a file that somebody searches in: the next indexing removes it
            file.unlink()


def nearest(index: Index, rows: Embeddings, query: Embeddings, *, top: int) -> list[Hit]:
    """The pictures nearest to a query embedding, (D,) or (1, D), nearest first, the earlier of equals first.

    One product over all rows, exact, at the pace of the memory: for a hundred thousand pictures it takes less than
    opening their index, which names them all. A graph (usearch) answers faster once it is built, and building it takes
    longer than embedding: `python benchmarks/scripts/search.py 100000 --graph` measures both.
    """
    similarities = np.asarray(rows @ query.reshape(-1))
    best = greatest(similarities, top).tolist()
    return [Hit(Path(index.folder, index.entries[i].path), float(similarities[i])) for i in best]


SAVE_EVERY_S = 20.0  # what a kill -9 may cost


@dataclass(kw_only=True)
class Update:
    """What was done: pictures kept as they were, embedded, dropped, and why the others could not be read."""

    kept: int = 0
    embedded: int = 0
    gone: int = 0
    unreadable: list[str] = field(default_factory=list)


class _Source:
    """A picture's file, whose SHA-256 is taken as it is read, so that it is read once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        stat = self.path.stat()  # before the file is read: a change meanwhile is seen the next time
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


def update_index(encoder: BundleEncoder, folder: Path, path: Path, *, reporter: Reporter = SILENT) -> Update:
    """Make the index at `path` say what is in `folder` now.

    A picture with the size and time that the index has is taken for unchanged. Another is hashed where the index has
    one of its size: it may have been moved, copied or only touched, and is embedded only if its content is new. What
    is done is saved every SAVE_EVERY_S, and when it is interrupted.

    Raises:
        InputError: the folder is not there, or has no picture.
        UsageError: `path` holds something else, or another folder's index.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.", hint="check the path")
    index, rows = _start(encoder, folder.resolve(), path)
    found = [picture.relative_to(folder).as_posix() for picture in images_below(folder)]
    if not found and not index.entries:
        raise InputError(f"The folder {folder} has no pictures.")
    kept, new = _compare(index.entries, [_Source(folder, name) for name in found])
    entries, parts = [entry for entry, _ in kept], [np.asarray(rows[[row for _, row in kept]])]
    gone = len({entry.path for entry in index.entries} - set(found))
    update = Update(kept=len(kept), gone=gone)
    if entries == index.entries and not new and is_index(path):
        return update

    def save() -> None:
        write_index(path, msgspec.structs.replace(index, entries=entries), np.concatenate(parts))

    saved = time.monotonic()
    try:
        for batch in embed_images(encoder, new):
            parts.append(batch.embeddings)
            entries += [source.entry() for source in batch.images]
            update.embedded += len(batch.images)
            update.unreadable += map(str, batch.unreadable)
            reporter.update("embedding", update.embedded + len(update.unreadable), len(new))
            if time.monotonic() - saved > SAVE_EVERY_S:
                save()
                saved = time.monotonic()
    finally:
        save()
    return update


def _start(encoder: BundleEncoder, folder: Path, path: Path) -> tuple[Index, Embeddings]:
    """The index to go on from: the one at `path`, or an empty one where there is none or another model made it."""
    fresh = Index(
        version=INDEX_VERSION,
        folder=str(folder),
        bundle=str(encoder.folder.resolve()),
        model=model_key(encoder.manifest),
        embeddings="",
        entries=[],
    )
    nothing = np.zeros((0, encoder.manifest.embedding_size), dtype=np.float32)
    if not is_index(path):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UsageError(f"The output {path} holds something else than an index.", hint="choose another -o")
        return fresh, nothing
    index, rows = read_index(path)
    if index.folder != fresh.folder:
        raise UsageError(f"{path} is the index of another folder, {index.folder}.", hint="choose another -o")
    if index.model != fresh.model:
        return fresh, nothing
    return msgspec.structs.replace(index, bundle=fresh.bundle), rows


def _compare(known: list[Entry], sources: list[_Source]) -> tuple[list[tuple[Entry, int]], list[_Source]]:
    """What the index has already, each with its row, and what is to be embedded."""
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
        digest = sha256_of(source.path) if source.size_bytes in sizes else ""
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
    threads: int | None = None,
    device: str = AUTO,
) -> list[Hit]:
    """The images of the index at `path` that are nearest to a query, nearest first.

    Args:
        query: a text, or an image; a text that is the path of a file means that image.
        bundle: where the bundle that made the index lies now; None takes where it was.

    Raises:
        InputError: the query is empty, there is no index, or the bundle is not the one that made it.
    """
    if isinstance(query, str) and not query.strip():
        raise InputError("The query is empty.", hint='give a text, such as "a red car", or the path of a picture')
    index, rows = read_index(path)
    encoder = load(bundle or index.bundle, threads=threads, device=device)
    if model_key(encoder.manifest) != index.model:
        raise InputError(
            f"The bundle {encoder.folder} is not the one that made the index {path}.",
            hint=f"clip-rd-edge index {encoder.folder} {index.folder} -o {path}",
        )
    if isinstance(query, str) and not Path(query).is_file():
        return nearest(index, rows, encoder.encode_texts([query]), top=top)
    return nearest(index, rows, encoder.encode_images([as_rgb(query)]), top=top)
