"""The index that `serve` searches: read into memory, and again when it was updated, while requests are answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index.graph import Graph
from clip_rd_edge.runtime.index.image_index import (
    INDEX_FILE,
    Entry,
    Index,
    read_graph,
    read_index,
    require_same_model,
)
from clip_rd_edge.utils.paths import file_identity

_ENTRIES_FREED = 10_000  # at a time
_READING_S = 1.0  # that a search waits for an index that was updated; less than a client's patience

Opened = tuple[Index, Embeddings, Graph | None]


class ServedIndex:
    """An index that others may update.

    Args:
        folder: of the index.
        encoder: the bundle that made it.
    """

    def __init__(self, folder: Path, encoder: BundleEncoder) -> None:
        self._folder, self._encoder = folder, encoder
        self._identity = file_identity(folder / INDEX_FILE)  # of the index.json that was read last
        self._error: ClipRdEdgeError | None = None  # why that cannot be searched
        self._reading: asyncio.Task[None] | None = None
        self._opened = self._open()

    async def current(self) -> Opened:
        """Return the index, read again if it was updated; the one before, where reading takes long."""
        identity = await asyncio.to_thread(file_identity, self._folder / INDEX_FILE)
        if self._reading is None and (identity != self._identity or self._error is not None):
            self._reading = asyncio.create_task(self._read_again())
            finished, _ = await asyncio.wait([self._reading], timeout=_READING_S)
            for reading in finished:
                reading.result()  # raises what is not expected
        if self._error is not None and identity == self._identity:
            # Not an InputError, as the client's mistakes are: it was removed, or replaced by another bundle's.
            raise ClipRdEdgeError(str(self._error), hint=self._error.advice) from self._error
        return self._opened

    async def _read_again(self) -> None:
        try:
            identity = await asyncio.to_thread(file_identity, self._folder / INDEX_FILE)
            try:
                opened = await asyncio.to_thread(self._open, self._opened[0].model)
            except ClipRdEdgeError as error:
                self._identity, self._error = identity, error
                return
            entries = list(self._opened[0].entries)
            self._opened, self._identity, self._error = opened, identity, None
            await asyncio.to_thread(_free_in_parts, entries)
        finally:
            self._reading = None

    def _open(self, model: str | None = None) -> Opened:
        """Read the index; `model` is the key of the one that has made it so far."""
        index, rows = read_index(self._folder, memory_mapped=False)
        if model is not None and index.model != model:
            raise ClipRdEdgeError(
                f"Another bundle has made the index {self._folder} again since this server started.",
                hint=f"Restart clip-rd-edge serve with that bundle, {index.bundle}.",
            )
        require_same_model(self._encoder, index, self._folder)
        return index, rows, read_graph(self._folder, index, memory_mapped=False)


def _free_in_parts(entries: list[Entry]) -> None:
    """Empty a list: all at once, the memory of a million entries is freed while no other thread runs."""
    while entries:
        del entries[-_ENTRIES_FREED:]
