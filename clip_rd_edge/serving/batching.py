"""Batches the items of concurrent requests for the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from clip_rd_edge.contract.encoder import Embeddings


class Batcher:
    """Runs a tower for items of several requests at once.

    While the model computes one batch, the items that arrive meanwhile wait and make up the next one: an idle server
    answers at once, and a busy one computes full batches. Nothing waits for a batch to fill.

    Args:
        encode: embeds a batch of items, (N, D).
        executor: where `encode` runs; one worker, which the towers share, so that they do not compete for the cores.
        max_batch: max number of items per call of `encode`.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Embeddings],
        executor: Executor,
        *,
        max_batch: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._encode, self._executor = encode, executor
        self._max_batch, self._on_batch = max_batch, on_batch
        self._waiting: deque[tuple[Any, asyncio.Future[Embeddings]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def embed(self, items: Sequence[Any]) -> Embeddings:
        """Embed a request's items, (N, D); if the caller is cancelled, those that still wait are dropped."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Embeddings]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return np.stack(await asyncio.gather(*futures))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch: list[tuple[Any, asyncio.Future[Embeddings]]] = []
            while self._waiting and len(batch) < self._max_batch:
                item, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((item, future))
            if not batch:
                return
            self._on_batch(len(batch))
            try:
                rows = await loop.run_in_executor(self._executor, self._encode, [item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 — whatever it is, it is the answer of these requests alone
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), row in zip(batch, rows, strict=True):
                if not future.done():
                    future.set_result(row)
