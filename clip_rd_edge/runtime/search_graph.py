"""Approximate search in an index past a million images: usearch's graph (HNSW) of its embeddings in float16.

A graph outlives updates: rows that it does not have are compared one by one, until they or the lost keys are more than
REBUILD_SHARE of it. What it finds is ranked by the float32 embeddings, so similarities are exact, and only whether an
image is found is approximate. Copies of an image, such as black frames, would be linked to each other alone, and cut
the graph into parts: it has only one of them. Without usearch, or if a file is missing or damaged, search is exact.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings, in_batches
from clip_rd_edge.utils.files import new_file
from clip_rd_edge.utils.text import SILENT, Reporter

MAX_TOP = 1_000  # results; more are searched exactly
REBUILD_SHARE = 0.1
# Of usearch: links per node, and nodes visited when building and when searching. Higher is more accurate, and slower.
# 256 would do for images as queries, since links are between similar images; a text is far from all, and needs more.
_LINKS, _VISITED_BUILDING, _VISITED_SEARCHING = 16, 64, 4096
_CANDIDATES = 128  # ranked exactly, or 4 per result
_CHUNK = 10_000  # rows at a time, between two reports of progress
_HEADER_BYTES, _READ_BYTES = 64, 1 << 20
_BYTES_PER_KEY = 128  # at least, of its links

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class GraphFile(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of an index, as index.json names it.

    Attributes:
        links_at: where its links begin, behind the embeddings.
        crc32: of its header and links, which usearch follows wherever they lead. Damaged embeddings only make it miss
            images; they are most of the file, which a search need not read.
    """

    name: str
    links_at: int
    crc32: int


class Graph:
    """The graph of an index, opened by usearch, for rows with these keys, (N,).

    Attributes:
        others: rows that it does not have.
        is_worn: whether it has lost, or lacks, so many images that it should be built again.
    """

    def __init__(self, index: Any, keys: Keys) -> None:
        self._index, self._order = index, np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        known = np.asarray(index.keys, dtype=np.uint64)
        self.others: Rows = np.flatnonzero(~np.isin(keys, known))
        lost = len(known) - int(np.isin(known, self._keys).sum())
        self.is_worn = max(lost, len(self.others)) > REBUILD_SHARE * len(known)

    def candidates(self, query: Embeddings, top: int) -> Rows | None:
        """Return the rows that may be among the `top` nearest to a query (D,).

        None if the graph proposes fewer than `top` images that are still there: the others near the query are gone,
        such as with a folder of similar images; or if it fails.
        """
        count = max(_CANDIDATES, 4 * top)
        try:
            found = self._index.search(query, count).keys  # nearest first
        except RuntimeError:
            return None
        start = np.searchsorted(self._keys, found)
        copies = np.minimum(np.searchsorted(self._keys, found, side="right") - start, top)
        places = np.repeat(start - (np.cumsum(copies) - copies), copies) + np.arange(copies.sum())
        present = self._order[places][:count]
        return np.concatenate([present, self.others]) if len(present) >= top else None


def usearch_is_installed() -> bool:
    """Return whether usearch is installed."""
    return find_spec("usearch") is not None


def keys_of(rows: Embeddings) -> Keys:
    """Return a key per embedding, (N,), the same for those that are equal in float16, as the graph has them."""
    factors = np.cumprod(np.full(rows.shape[1], 0x9E3779B97F4A7C15, dtype=np.uint64))
    keys = np.empty(len(rows), dtype=np.uint64)
    for part in in_batches(len(rows), _CHUNK):
        keys[part] = rows[part].astype(np.float16).view(np.uint16).astype(np.uint64) @ factors
    return keys


def build_graph(
    path: Path,
    rows: Embeddings,
    *,
    threads: int | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> GraphFile | None:
    """Write the graph of embeddings (N, D) into a folder, which takes minutes for a million; None if `stop` was set."""
    from usearch.index import Index

    keys = keys_of(rows)
    _, chosen = np.unique(keys, return_index=True)
    if shutil.disk_usage(path).free < len(chosen) * (rows.shape[1] * 2 + _BYTES_PER_KEY):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    graph = Index(
        ndim=rows.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_LINKS,
        expansion_add=_VISITED_BUILDING,
        expansion_search=_VISITED_SEARCHING,
    )
    for part in in_batches(len(chosen), _CHUNK):
        if stop is not None and stop.is_set():
            return None
        some = np.sort(chosen[part])
        graph.add(keys[some], np.asarray(rows[some]), threads=threads or 0)
        reporter.update("building the search graph", part.stop, len(chosen))
    name, links_at = f"graph-{uuid.uuid4().hex[:12]}.usearch", len(graph) * rows.shape[1] * 2
    with new_file(path / name) as file:
        graph.save(file.name)
    return GraphFile(name=name, links_at=links_at, crc32=_crc32_of_links(path / name, links_at))


def restore_graph(path: Path, file: GraphFile, keys: Keys, *, memory_mapped: bool) -> Graph | None:
    """Open a graph for rows with these keys; None if it is damaged."""
    from usearch.index import Index

    if _crc32_of_links(path / file.name, file.links_at) != file.crc32:
        return None
    graph = Index.restore(str(path / file.name), view=memory_mapped)
    if graph is None:
        return None
    graph.expansion_search = _VISITED_SEARCHING
    return Graph(graph, keys)


def _crc32_of_links(path: Path, links_at: int) -> int:
    with path.open("rb") as file:
        value = zlib.crc32(file.read(_HEADER_BYTES))
        file.seek(links_at)
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value
