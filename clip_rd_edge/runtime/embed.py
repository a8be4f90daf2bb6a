"""Many picture files to embeddings, at the pace of the model: threads open and preprocess ahead of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.encoder import Embeddings, TowerEncoder
from clip_rd_edge.contract.preprocess import Pixels, open_image, preprocess
from clip_rd_edge.errors import InputError

BATCH_SIZE = 32
_MOST_WORKERS = 8


class EmbeddedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Some pictures in the order in which they were asked for.

    Attributes:
        paths: those that could be read, n of them.
        embeddings: theirs, (n, D).
        unreadable: for each of the others, the sentence that says why.
    """

    paths: Sequence[Path]
    embeddings: Embeddings
    unreadable: Sequence[InputError]


def embed_files(
    encoder: TowerEncoder, paths: Iterable[Path], *, batch_size: int = BATCH_SIZE, workers: int | None = None
) -> Iterator[EmbeddedBatch]:
    """Embed picture files batch by batch, opening those of the next batch while the model works on this one.

    Pillow and ONNX Runtime let go of Python's lock while they work, so that threads are enough. An unreadable
    picture is handed over as such and stops nothing.

    Args:
        encoder: whose image tower is used.
        paths: taken only as far ahead as two batches need, so that a long list may be a generator.
        batch_size: pictures that the tower sees at once, at least 1.
        workers: threads that open pictures; None takes one a core, 8 at most.
    """
    how = encoder.describe().preprocessing
    size = encoder.describe().embedding_size

    def pixels_of(path: Path) -> Pixels | InputError:
        try:
            return preprocess(open_image(path), how)
        except InputError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(workers or min(_MOST_WORKERS, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[Path, Future[Pixels | InputError]]] = deque()
        try:
            while True:
                for path in islice(remaining, 2 * batch_size - len(ahead)):
                    ahead.append((path, pool.submit(pixels_of, path)))
                if not ahead:
                    return
                batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
                yield _embed(encoder, [(path, opened.result()) for path, opened in batch], size)
        finally:
            # A consumer that stops early, or Ctrl-C, shall not wait for pictures that nobody wants.
            pool.shutdown(wait=False, cancel_futures=True)


def _embed(encoder: TowerEncoder, opened: Sequence[tuple[Path, Pixels | InputError]], size: int) -> EmbeddedBatch:
    readable = [(path, pixels) for path, pixels in opened if not isinstance(pixels, InputError)]
    return EmbeddedBatch(
        paths=[path for path, _ in readable],
        embeddings=encoder.encode_pixels(np.stack([pixels for _, pixels in readable]))
        if readable
        else np.zeros((0, size), dtype=np.float32),
        unreadable=[error for _, error in opened if isinstance(error, InputError)],
    )
