"""The teacher's embeddings that the term `bank` compares with: from its store, or those of the last pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.store import HalfArray, TeacherStore, TeacherStores, keys_file, load_rows, read_rows
from clip_rd_edge.losses.terms import Bank, Ensemble


def make_bank(
    config: RunConfig,
    pairs: int,
    store: TeacherStores | None,
    ensemble: Ensemble | None,
    device: torch.device,
    *,
    source: str | None = None,
) -> TeacherBank | None:
    """Return the bank of a run, None if its objective does not need one.

    Args:
        pairs: number of pairs that the run trains on. Without a store, the bank holds no more: further entries would be
            those of the same pairs in earlier epochs.
        store: where the run's embeddings come from; None if they are computed as training goes.
        ensemble: how those of the teachers become one; None without a teacher.
        source: see `QueueBank`.
    """
    if not config.recipe.objective.needing("bank") or is_texts_alone(config):
        return None
    size = config.recipe.bank_size
    if store is not None and ensemble is not None:
        return StoredBank(store, ensemble, size=size, seed=config.seed, device=device)
    return QueueBank(min(size, pairs), device, source=source)


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
        rng, stores = np.random.default_rng(seed), stored.stores

        def choice(count: int) -> npt.NDArray[np.int64]:
            return np.sort(rng.choice(count, min(size, count), replace=False, shuffle=False))

        def joined(parts: Sequence[HalfArray]) -> Tensor:
            readable = np.logical_and.reduce([part.any(axis=1) for part in parts])  # bad ones are zeros
            return ensemble.join([torch.from_numpy(part[readable]).to(device).float() for part in parts])

        pairs = choice(stores[0].manifest.pairs)
        images = [read_rows(partial(store.images, 0), pairs) for store in stores]
        common = _common_captions(stores)
        captions = choice(len(common[0]) if common else stores[0].captions)
        own = [rows[captions] for rows in common] or [captions]
        texts = [read_rows(store.texts, rows) for store, rows in zip(stores, own, strict=True)]
        self._bank = Bank(joined(images), joined(texts))

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """Return the bank, which a batch does not change."""
        return self._bank


def _common_captions(stores: Sequence[TeacherStore]) -> list[npt.NDArray[np.int64]]:
    """Return the rows of the captions that all of several stores have, in the same order; nothing for a single store.

    A caption that could not be read while one of them was built is missing there alone.
    """
    if len(stores) == 1:
        return []
    keys = [load_rows(keys_file(store.folder))[:, 0] for store in stores]
    common = reduce(np.intersect1d, keys)
    return [np.searchsorted(own, common) for own in keys]


class QueueBank:
    """The teacher's embeddings of the last pairs, those of the step included, in a ring buffer.

    Args:
        size: max number of pairs.
        source: names the teachers: a state with the embeddings of others is not loaded, as they lie in another space.
    """

    def __init__(self, size: int, device: torch.device, *, source: str | None = None) -> None:
        self._size, self._device, self._source = size, device, source
        self._rows = torch.empty(2, 0, 0)  # (2, size, D): images and texts; the embedding size is that of the batches
        self._seen = 0

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """Return the bank of a step whose global batch has these embeddings of the teacher, (B, D) each."""
        if not self._seen:
            self._rows = image.new_empty(2, self._size, image.shape[1])
        newest = torch.stack([image, text])[:, -self._size :]
        positions = torch.arange(self._seen, self._seen + newest.shape[1], device=image.device) % self._size
        self._rows[:, positions] = newest
        self._seen += newest.shape[1]
        return Bank(*self._filled())

    def drop_not_finite(self) -> None:
        """Drop embeddings that are not finite: with them, the loss of every further step would not be, either."""
        rows = self._filled()
        rows = rows.roll(-(self._seen % rows.shape[1]), dims=1)  # the oldest first
        rows = rows[:, rows.isfinite().all(dim=2).all(dim=0)]
        if rows.shape[1] < self._filled().shape[1]:
            self._seen = rows.shape[1]
            self._rows[:, : self._seen] = rows

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings, for a checkpoint."""
        return {"seen": self._seen, "rows": self._filled().clone(), "source": self._source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        if state["source"] != self._source:
            return
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


TeacherBank = StoredBank | QueueBank  # all processes have the same one, whatever their number
