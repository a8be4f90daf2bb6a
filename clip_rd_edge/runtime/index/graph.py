"""Approximate search past a million images: usearch's graph (HNSW) of an index's embeddings, in float16.

    graph-KEY.usearch   the graph; its keys are the rows of the index at the time that it was built
    graph-rows-KEY.npy  of each key, the present row, -1 for an image that is gone, and the first key with the same
                        embedding, which alone is in the graph: (2, keys) int64

A graph outlives updates: rows that it does not have are compared one by one, until they or the lost keys are more than
REBUILD_SHARE of it. What it finds is ranked by the float32 embeddings, so similarities are exact, and only whether an
image is found is approximate. Copies of an image, such as black frames, would be linked to each other alone, and cut
the graph into parts: it has only one of them. Without usearch, or if a file is missing or damaged, search is exact.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import uuid
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.utils.arrays import load_array
from clip_rd_edge.utils.files import new_file, write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

GRAPH_FROM = 1_000_000  # images: below, comparing all rows takes less than 60 ms
MAX_TOP = 1_000  # results; more are searched exactly
REBUILD_SHARE = 0.1
# Of usearch: links per node, and nodes visited when building and when searching. Higher is more accurate, and slower.
# 256 would do for images as queries, since links are between similar images; a text is far from all, and needs more.
_LINKS, _VISITED_BUILDING, _VISITED_SEARCHING = 16, 64, 4096
_CANDIDATES = 128  # ranked exactly, or 4 per result
_BLOCK = 1 << 20  # bytes that are read or written at once
_CHUNK = 10_000  # rows between two reports of progress
GRAPH_FILES = "graph-*"  # names of the files
_HEADER_BYTES = 64
_BYTES_PER_KEY = 128  # at least, of its links

Rows = npt.NDArray[np.int64]


class GraphFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of an index, as index.json names it.

    Attributes:
        file, rows: names of the two files.
        keys: number of images that it was built from.
        links_at: where its links begin in `file`, behind the embeddings.
        crc32: of the links.
        rows_crc32: of `rows`.
    """

    file: str
    rows: str
    keys: int
    links_at: int = 0
    crc32: int = -1
    rows_crc32: int = -1


class Graph(NamedTuple):
    """An opened graph.

    Attributes:
        index: usearch's index.
        rows: the present row of each key, or -1.
        others: rows that it does not have.
        keys: those whose images are there, sorted by `firsts`.
        firsts: of each of `keys`, the key in the graph that has the same embedding.
    """

    index: Any
    rows: Rows
    others: Rows
    keys: Rows
    firsts: Rows

    def candidates(self, query: Embeddings, top: int) -> Rows | None:
        """Return the rows that may be among the `top` nearest to a query (D,).

        None if the graph proposes fewer than `top` images that are still there: the others near the query are gone,
        such as with a folder of similar images; or if it fails.
        """
        count = max(_CANDIDATES, 4 * top)
        try:
            found = self.index.search(query, count).keys.astype(np.int64)
        except RuntimeError:
            return None
        start = np.searchsorted(self.firsts, found)
        copies = np.minimum(np.searchsorted(self.firsts, found, side="right") - start, top)
        places = np.repeat(start - (np.cumsum(copies) - copies), copies) + np.arange(copies.sum())
        rows = self.rows[self.keys[places]]  # nearest first
        present = rows[rows >= 0][:count]
        return np.concatenate([present, self.others]) if len(present) >= top else None


class BuiltGraph(NamedTuple):
    """A graph of all images of an index: usearch's index, and of each row the first with the same embedding."""

    index: Any
    firsts: Rows


def usearch_is_installed() -> bool:
    """Return whether usearch is installed."""
    return find_spec("usearch") is not None


def _first_copies(rows: Embeddings) -> Rows:
    """Return, per embedding, the first row that has the same in float16, as the graph has it."""
    weights = np.random.default_rng(0).integers(1 << 64, size=rows.shape[1], dtype=np.uint64)
    keys = np.arange(len(rows))
    digests = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].astype(np.float16)
        digests[start : start + len(part)] = part.view(np.uint16).astype(np.uint64) @ weights
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    firsts = first[inverse].astype(np.int64)
    copies = keys[firsts != keys]
    for start in range(0, len(copies), _CHUNK):
        some = copies[start : start + _CHUNK]
        differ = (rows[some].astype(np.float16) != rows[firsts[some]].astype(np.float16)).any(axis=1)
        firsts[some[differ]] = some[differ]
    return firsts


def build_graph(
    rows: Embeddings,
    *,
    path: Path | None = None,
    threads: int | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> BuiltGraph | None:
    """Build the graph of embeddings (N, D), which takes minutes for a million.

    Args:
        path: where it is going to be written.
        stop: ends the work when it is set; then None is returned.
    """
    from usearch.index import Index

    firsts = _first_copies(rows)
    chosen = np.flatnonzero(firsts == np.arange(len(rows)))
    if path is not None and shutil.disk_usage(path).free < len(chosen) * (rows.shape[1] * 2 + _BYTES_PER_KEY):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    graph = Index(
        ndim=rows.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_LINKS,
        expansion_add=_VISITED_BUILDING,
        expansion_search=_VISITED_SEARCHING,
    )
    for start in range(0, len(chosen), _CHUNK):
        if stop is not None and stop.is_set():
            return None
        keys = chosen[start : start + _CHUNK]
        graph.add(keys, np.asarray(rows[keys]), threads=threads or 0)
        reporter.update("building the search graph", start + len(keys), len(chosen))
    return BuiltGraph(graph, firsts)


def write_graph(path: Path, graph: BuiltGraph) -> GraphFiles:
    """Write a graph into the folder of an index."""
    index, firsts = graph
    name = f"graph-{uuid.uuid4().hex[:12]}.usearch"
    with new_file(path / name) as file:
        try:
            index.save(file.name)
        except RuntimeError:
            _fill(file, index.serialized_length)
            raise
    links_at = len(index) * index.ndim * 2
    crc32 = _crc32(path / name, links_at)
    files = GraphFiles(file=name, rows="", keys=len(firsts), links_at=links_at, crc32=crc32)
    return write_rows(path, files, np.arange(len(firsts)), firsts)


def _crc32(path: Path, links_at: int) -> int:
    """Return a checksum of a graph's header and links, which usearch follows wherever they lead.

    Damaged embeddings only make it miss images; they are most of the file, which a search need not read.
    """
    with path.open("rb") as file:
        value = zlib.crc32(file.read(_HEADER_BYTES))
        file.seek(links_at)
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _fill(file: IO[bytes], size: int) -> None:
    """Write a file up to a size, so that the system says why usearch could not, which does not tell."""
    file.seek(0, os.SEEK_END)
    while file.tell() < size:
        file.write(bytes(_BLOCK))
    file.flush()


def write_rows(path: Path, files: GraphFiles, rows: Rows, firsts: Rows) -> GraphFiles:
    """Write the present row of each key, and its first copy, to a new file; return the graph that names it."""
    name = f"graph-rows-{uuid.uuid4().hex[:12]}.npy"
    content = io.BytesIO()
    np.save(content, np.stack([rows, firsts]).astype(np.int64))
    write_bytes(path / name, content.getbuffer())
    return msgspec.structs.replace(files, rows=name, rows_crc32=zlib.crc32(content.getbuffer()))


def read_rows(path: Path, files: GraphFiles) -> tuple[Rows, Rows] | None:
    """Return the row of each key, and its first copy, or None if the file is missing or damaged."""
    try:
        content = (path / files.rows).read_bytes()
        both = load_array(io.BytesIO(content))
    except (OSError, ValueError, EOFError):
        return None
    if zlib.crc32(content) != files.rows_crc32 or both.shape != (2, files.keys) or both.dtype.kind != "i":
        return None
    return both[0].astype(np.int64), both[1].astype(np.int64)


def moved_rows(rows: Rows, kept: Rows, count: int) -> Rows:
    """Return the row of each key after an update.

    Args:
        rows: of each key before it.
        kept: rows before the update that are kept, in their new order.
        count: rows before the update.
    """
    new = np.full(count + 1, -1, dtype=np.int64)  # the last entry is that of the key -1
    new[kept] = np.arange(len(kept))
    return new[rows]


def is_worn(rows: Rows, count: int) -> bool:
    """Return whether a graph has lost, or lacks, so many of `count` images that it should be built again."""
    present = int((rows >= 0).sum())
    return max(len(rows) - present, count - present) > REBUILD_SHARE * max(len(rows), 1)


def open_graph(path: Path, files: GraphFiles, count: int, *, memory_mapped: bool = True) -> Graph | None:
    """Open the graph of an index with `count` images; None if usearch or a file is missing, or damaged."""
    both = read_rows(path, files)
    if both is None or not usearch_is_installed():
        return None
    rows, firsts = both
    from usearch.index import Index

    try:
        if _crc32(path / files.file, files.links_at) != files.crc32:
            return None
        graph = Index.restore(str(path / files.file), view=memory_mapped)
    except Exception:  # noqa: BLE001 — whatever it is, comparing all rows answers as well
        return None
    if graph is None or len(graph) != (firsts == np.arange(files.keys)).sum() or (rows >= count).any():
        return None
    graph.expansion_search = _VISITED_SEARCHING
    missing = np.ones(count, dtype=bool)
    missing[rows[rows >= 0]] = False
    keys = np.flatnonzero(rows >= 0)
    keys = keys[np.argsort(firsts[keys], kind="stable")]
    return Graph(graph, rows, np.flatnonzero(missing), keys, firsts[keys])
