"""The teacher's embeddings that the term `bank` compares with: from a teacher's store, or those of the last pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.loader import EmbeddingSource
from clip_rd_edge.distillation.store import (
    SHARD_SIZE,
    TeacherStore,
    TeacherStores,
    embedding_file,
    image_shard,
    is_embedding,
    shard_rows,
    text_shard,
)
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.losses.ensemble import Ensemble
from clip_rd_edge.losses.terms import Bank
from clip_rd_edge.utils.arrays import load_array

_Rows = npt.NDArray[np.int64]


class TeacherBank(Protocol):
    """A bank during training. All processes have the same one, whatever their number."""

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """Return the bank of a step whose global batch has these embeddings of the teacher, (B, D) each."""
        ...

    def drop_not_finite(self) -> None:
        """Drop embeddings that are not finite: with them, the loss of every further step would not be, either."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        ...


def make_bank(
    config: RunConfig,
    pairs: int,
    cache: EmbeddingSource | None,
    ensemble: Ensemble | None,
    device: torch.device,
    *,
    source: str | None = None,
) -> TeacherBank | None:
    """Return the bank of a run, None if its objective does not need one.

    Args:
        pairs: number of pairs that the run trains on. Without a cache, the bank holds no more: further entries would be
            those of the same pairs in earlier epochs.
        cache: where the run's embeddings come from; None if they are computed as training goes.
        ensemble: how those of the teachers become one; None without a teacher.
        source: see `QueueBank`.
    """
    if not config.recipe.objective.needing("bank") or is_texts_alone(config):
        return None
    size = config.recipe.bank_size
    if isinstance(cache, TeacherStores) and ensemble is not None:
        return StoredBank(cache, ensemble, size=size, seed=config.seed, device=device)
    return QueueBank(min(size, pairs), device, source=source)


def require_same_kind(*, began_stored: bool, is_stored: bool) -> None:
    """Check that a resumed run has the kind of bank that it began with, from a teacher's store or not."""
    if began_stored and not is_stored:
        raise UsageError(
            "The run began with a bank from a teacher's store; expected to go on with it.",
            hint="add the {store} and {views} of the run, or start a new run",
        )
    if is_stored and not began_stored:
        raise UsageError(
            "The run began without a teacher's store, with a bank of the last pairs; expected to go on without one.",
            hint="omit {store}, or start a new run",
        )


class StoredBank:
    """Embeddings from a teacher's store, the same in every step: all of view 0, or a random part of them.

    Args:
        ensemble: how the embeddings of the teachers become one.
        size: max number of images, and of captions.
        seed: of the choice.
    """

    def __init__(
        self, stored: TeacherStores, ensemble: Ensemble, *, size: int, seed: int, device: torch.device
    ) -> None:
        rng = np.random.default_rng(seed)
        caches, common = stored.caches, _common_captions(stored.caches)

        def side(path: Callable[[TeacherStore, int], Path], totals: list[int], rows: list[_Rows] | None) -> Tensor:
            count = len(rows[0]) if rows else totals[0]
            chosen = np.sort(rng.choice(count, min(size, count), replace=False, shuffle=False))
            parts = [
                _read_rows(
                    partial(path, cache),
                    rows[number][chosen] if rows else chosen,
                    total=totals[number],
                    width=cache.manifest.embedding_size,
                )
                for number, cache in enumerate(caches)
            ]
            readable = _readable(parts, partial(path, caches[0]))
            return ensemble.join([torch.from_numpy(part).to(device).float() for part in readable])

        pairs, captions = [cache.manifest.pairs for cache in caches], [cache.captions for cache in caches]
        self._bank = Bank(
            side(lambda cache, shard: image_shard(cache.folder, 0, shard), pairs, None),
            side(lambda cache, shard: text_shard(cache.folder, shard), captions, common),
        )

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """See `TeacherBank`."""
        return self._bank

    def drop_not_finite(self) -> None:
        """Do nothing: there are none, see `_readable`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the kind alone: the embeddings are in the cache."""
        return {"kind": "stored"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TeacherBank`."""
        require_same_kind(began_stored=state["kind"] == "stored", is_stored=True)


def _common_captions(caches: Sequence[TeacherStore]) -> list[_Rows] | None:
    """Return the rows of the captions that all caches have, in the same order; None if all have the same ones.

    A caption that could not be read while one of them was built is missing there alone.
    """
    if len(caches) == 1:
        return None
    keys = [load_array(cache.folder / "texts" / "keys.npy", memory_mapped=True) for cache in caches]
    if all(np.array_equal(keys[0], other) for other in keys[1:]):
        return None
    common = reduce(np.intersect1d, keys)
    return [np.searchsorted(own, common) for own in keys]


def _read_rows(path: Callable[[int], Path], chosen: _Rows, *, total: int, width: int) -> npt.NDArray[np.float16]:
    """Read rows of shards of together `total` rows, (K, width), in ascending order."""
    parts = []
    for rows in np.split(chosen, np.flatnonzero(np.diff(chosen // SHARD_SIZE)) + 1):
        shard = int(rows[0]) // SHARD_SIZE
        with embedding_file(path(shard), shard_rows(shard, total), width=width) as file:
            parts.append(np.stack([file[row] for row in (rows % SHARD_SIZE).tolist()]))
    return np.concatenate(parts)


def _readable(parts: Sequence[npt.NDArray[np.float16]], path: Callable[[int], Path]) -> list[npt.NDArray[np.float16]]:
    """Return the rows of each teacher without those that could not be embedded by one of them."""
    readable = np.logical_and.reduce([is_embedding(part) for part in parts])
    if not readable.any():
        raise InputError(
            f"None of the {len(readable):,} embeddings chosen for the bank from {path(0).parent} could be computed.",
            hint="increase the recipe's bank_size, or repair the data and build the cache again",
        )
    return [part[readable] for part in parts]


class QueueBank:
    """The teacher's embeddings of the last pairs, those of the step included, in a ring buffer.

    Args:
        size: max number of pairs.
        source: names the teachers: a state with the embeddings of others is not loaded. None if it is not known.
    """

    def __init__(self, size: int, device: torch.device, *, source: str | None = None) -> None:
        self._size, self._device, self._source = size, device, source
        self._rows = torch.empty(2, 0, 0)  # (2, size, D): images and texts; the embedding size is that of the batches
        self._seen = 0

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """See `TeacherBank`."""
        if not self._seen:
            self._rows = image.new_empty(2, self._size, image.shape[1])
        newest = torch.stack([image, text])[:, -self._size :]
        positions = torch.arange(self._seen, self._seen + newest.shape[1], device=image.device) % self._size
        self._rows[:, positions] = newest
        self._seen += newest.shape[1]
        return Bank(*self._filled())

    def drop_not_finite(self) -> None:
        """See `TeacherBank`."""
        rows = self._filled()
        rows = rows.roll(-(self._seen % rows.shape[1]), dims=1)  # the oldest first
        rows = rows[:, rows.isfinite().all(dim=2).all(dim=0)]
        if rows.shape[1] < self._filled().shape[1]:
            self._seen = rows.shape[1]
            self._rows[:, : self._seen] = rows

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings."""
        return {"kind": "queue", "seen": self._seen, "rows": self._filled().clone(), "source": self._source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TeacherBank`."""
        require_same_kind(began_stored=state["kind"] == "stored", is_stored=False)
        source = state.get("source")  # earlier versions did not record it
        if self._source and source and source != self._source:
            return  # the embeddings of another teacher lie in another space
        rows, seen = state["rows"].to(self._device), state["seen"]
        count = rows.shape[1]
        if count != min(seen, self._size):  # the data have become more or fewer pairs: the oldest row comes first
            rows = rows.roll(-(seen % count), dims=1)[:, -self._size :]
            seen = count = rows.shape[1]
        self._rows = rows.new_empty(2, self._size, rows.shape[2])
        self._rows[:, :count] = rows
        self._seen = seen

    def _filled(self) -> Tensor:
        return self._rows[:, : min(self._seen, self._size)]
