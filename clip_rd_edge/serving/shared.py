"""What concurrent requests share: batches of their items, classifiers, the index with its thumbnails, and counters."""

from __future__ import annotations

import asyncio
import io
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import INDEX_FILE, Index, nearest_rows, open_graph, read_index, require_same_model
from clip_rd_edge.runtime.search_graph import Graph
from clip_rd_edge.serving.guard import RefusedError
from clip_rd_edge.serving.protocol import MAX_PIXELS
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.structs import is_natural

PREFIX = "clip_rd_edge_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_READING_S = 1.0  # that a search waits for an index that was updated; less than a client's patience
_MAX_CLASSIFIERS = 8  # label lists whose embeddings are kept
THUMBNAIL_EDGE = 320  # pixels
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """Counts values by ascending upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """Return the samples of the histogram; `labels` are as in `tower="image"`."""
        lines, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum:.6f}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """The server's counters."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batches = {tower: Histogram(SIZES) for tower in ("image", "text")}

    def finish(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request of a known path."""
        self.requests[path, status] += 1
        self.seconds.setdefault(path, Histogram(SECONDS)).observe(seconds)

    def render(self, *, pending: int, memory_bytes: int | None) -> str:
        """Return all metrics as text, with the number of waiting items and the resident memory, or None if unknown."""
        lines = [f"# TYPE {PREFIX}requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append(f"# TYPE {PREFIX}request_seconds histogram")
        for path, histogram in sorted(self.seconds.items()):
            lines += histogram.lines(f"{PREFIX}request_seconds", f'path="{path}"')
        lines.append(f"# TYPE {PREFIX}batch_size histogram")
        for tower, histogram in self.batches.items():
            lines += histogram.lines(f"{PREFIX}batch_size", f'tower="{tower}"')
        lines.append(f"# TYPE {PREFIX}pending_items gauge")
        lines.append(f"{PREFIX}pending_items {pending}")
        if memory_bytes is not None:
            lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {memory_bytes}"]
        return "\n".join(lines) + "\n"


def keep(kept: OrderedDict[str, Any], key: str, value: object, count: int) -> None:
    """Put a value among those used last, of which this many are kept."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > count:
        kept.popitem(last=False)


class Classifiers:
    """The classifiers of the label lists used last; a request waits for one that is being made for another."""

    def __init__(self) -> None:
        self._kept = OrderedDict[str, ZeroShotClassifier]()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def get(self, key: str, make: Callable[[], Awaitable[ZeroShotClassifier]]) -> ZeroShotClassifier:
        """Return the classifier of the labels with this key, made unless it is kept."""
        async with self._turns.setdefault(key, asyncio.Lock()):
            classifier = self._kept.get(key) or await make()
            keep(self._kept, key, classifier, _MAX_CLASSIFIERS)
            return classifier


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
        if batch := self._next_batch():
            self._on_batch(len(batch))
            try:
                rows: Embeddings | Exception = self._encode([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 — whatever it is, it is the answer of these requests alone
                rows = error
            loop.call_soon_threadsafe(_deliver, [future for _, future in batch], rows)
        with self._lock:
            self._runs = continues = bool(self._waiting)
        if continues:
            with suppress(RuntimeError):  # the server has stopped, and nobody waits any more
                self._executor.submit(self._run, loop)

    def _next_batch(self) -> list[_Waiting]:
        """Take the items that have waited longest, except those that nobody waits for any more."""
        batch: list[_Waiting] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch:
                item, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((item, future))
        return batch


def _deliver(futures: Sequence[asyncio.Future[Embeddings]], rows: Embeddings | Exception) -> None:
    for number, future in enumerate(futures):
        if future.done():  # given up
            continue
        if isinstance(rows, Exception):
            future.set_exception(rows)
        else:
            future.set_result(rows[number])


_Opened = tuple[Index, Embeddings, Graph | None]


class ServedIndex:
    """An index that others may update: read into memory, and again when it was updated, while requests are answered.

    Args:
        images: the image folder that the user named, from which thumbnails are made; None for none: the one that the
            index names may be anybody's choice.
    """

    def __init__(self, folder: Path, encoder: BundleEncoder, images: Path | None = None) -> None:
        self._folder, self._encoder, self.images = folder, encoder, images
        self._identity = file_identity(folder / INDEX_FILE)  # of the index.json that was read last
        self._reading: asyncio.Task[_Opened] | None = None  # of one that was updated
        self._opened = self._open()

    async def current(self) -> _Opened:
        """Return the index, read again if it was updated; the one before, where reading takes long."""
        identity, reading = await asyncio.to_thread(file_identity, self._folder / INDEX_FILE), self._reading
        if identity != self._identity and (reading is None or reading.done()):
            self._identity = identity
            reading = self._reading = asyncio.create_task(asyncio.to_thread(self._open))
            await asyncio.wait([reading], timeout=_READING_S)
        if reading is not None and reading.done():
            try:
                self._opened = reading.result()
            except ClipRdEdgeError as error:
                self._identity = None  # tried again at the next search
                # Not an InputError, as the client's mistakes are: it was removed, or replaced by another bundle's.
                raise ClipRdEdgeError(str(error), hint=error.advice) from error
        return self._opened

    async def search(self, query: Embeddings, *, top: int) -> tuple[list[dict[str, Any]], float | None]:
        """Return the images nearest to a query, with the addresses of their thumbnails, and the cut-off for texts."""
        index, rows, graph = await self.current()
        found = await asyncio.to_thread(nearest_rows, index, rows, query, top=top, graph=graph)
        hits = []
        for row, similarity in found:
            hit = {"path": str(Path(self.images or index.folder, index.entries[row].path)), "similarity": similarity}
            hits.append(hit | ({"thumbnail": f"/thumbnail/{_thumbnail_id(index, row)}"} if self.images else {}))
        return hits, index.cutoff

    def thumbnail(self, name: str) -> bytes:
        """Return a small JPEG of an image, by the id that `search` has given it.

        Raises:
            RefusedError: the index has no such image any more, or it does not lie in the image folder.
        """
        index = self._opened[0]
        row = name.partition("-")[0]
        known = is_natural(row) and len(row) < 10 and int(row) < len(index.entries)
        if self.images is not None and known and name == _thumbnail_id(index, int(row)):
            path = (self.images / index.entries[int(row)].path).resolve()
            if path.is_relative_to(self.images.resolve()):
                with suppress(InputError):  # it is gone, or damaged
                    image = open_image(path, min_edge=THUMBNAIL_EDGE, max_pixels=MAX_PIXELS)
                    image.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
                    content = io.BytesIO()
                    image.save(content, "JPEG", quality=80)
                    return content.getvalue()
        raise RefusedError(404, "There is no such image.")

    def _open(self) -> _Opened:
        index, rows = read_index(self._folder, memory_mapped=False)
        require_same_model(self._encoder, index, self._folder)
        return index, rows, open_graph(self._folder, index, memory_mapped=False)


def _thumbnail_id(index: Index, row: int) -> str:
    """Return an id of an image that no other image gets when the index is updated."""
    return f"{row}-{index.entries[row].sha256[:16]}"
