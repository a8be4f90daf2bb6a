"""Batches the items of concurrent requests for the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings

_Waiting = tuple[Any, "asyncio.Future[Embeddings]"]


class Batcher:
    """Runs a tower for items of several requests at once.

    While the model computes one batch, the items that arrive meanwhile wait and make up the next one: an idle server
    answers at once, and a busy one computes full batches. Nothing waits for a batch to fill. The model's thread takes
    its next batch itself, and so does not stand idle while the event loop is busy with requests and answers.

    Args:
        encode: embeds a batch of items, (N, D).
        executor: where `encode` runs; one worker, which the towers share in turn, so that they do not compete for the
            cores.
        max_batch: max number of items per call of `encode`.
        on_batch: called with the size of each batch, on the model's thread.
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
        self._waiting: deque[_Waiting] = deque()
        self._lock = Lock()
        self._runs = False  # whether the executor has or gets a batch

    async def embed(self, items: Sequence[Any]) -> Embeddings:
        """Embed a request's items, (N, D); if the caller is cancelled, those that still wait are dropped."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Embeddings]] = [loop.create_future() for _ in items]
        with self._lock:
            self._waiting.extend(zip(items, futures, strict=True))
            starts, self._runs = not self._runs, True
        if starts:
            self._executor.submit(self._run, loop)
        if len(futures) == 1:
            return (await futures[0])[None]
        return np.stack(await asyncio.gather(*futures))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Compute one batch, hand its rows to the event loop, and get in line for the next one."""
        batch = self._next_batch()
        futures = [future for _, future in batch]
        if batch:
            self._on_batch(len(batch))
            try:
                rows = self._encode([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 — whatever it is, it is the answer of these requests alone
                loop.call_soon_threadsafe(_fail, futures, error)
            else:
                loop.call_soon_threadsafe(_deliver, futures, rows)
        with self._lock:
            self._runs = continues = bool(self._waiting)
        if continues:
            with suppress(RuntimeError):  # the server has stopped, and nobody waits any more
                self._executor.submit(self._run, loop)

    def _next_batch(self) -> list[_Waiting]:
        """Take the items that have waited longest, but for those that nobody waits for any more."""
        batch: list[_Waiting] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch:
                item, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((item, future))
        return batch


def _deliver(futures: Sequence[asyncio.Future[Embeddings]], rows: Embeddings) -> None:
    for future, row in zip(futures, rows, strict=True):
        if not future.done():
            future.set_result(row)


def _fail(futures: Sequence[asyncio.Future[Embeddings]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
