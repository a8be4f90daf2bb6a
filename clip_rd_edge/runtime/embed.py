"""Many pictures to embeddings, at the pace of the model: threads open and preprocess ahead of it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from clip_rd_edge.contract.encoder import Embeddings, TowerEncoder
from clip_rd_edge.contract.preprocess import Picture, Pixels, open_image, preprocess
from clip_rd_edge.errors import InputError

BATCH_SIZE = 32
_MOST_WORKERS = 8
P = TypeVar("P", bound=Picture)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBatch(Generic[P]):
    """Some pictures in the order in which they were asked for.

    Attributes:
        pictures: those that could be read, n of them.
        embeddings: theirs, (n, D).
        unreadable: for each of the others, the sentence that says why.
    """

    pictures: Sequence[P]
    embeddings: Embeddings
    unreadable: Sequence[InputError]


def embed_pictures(
    encoder: TowerEncoder, pictures: Iterable[P], *, batch_size: int = BATCH_SIZE, workers: int | None = None
) -> Iterator[EmbeddedBatch[P]]:
    """Embed pictures batch by batch, opening those of the next batch while the model works on this one.

    Pillow and ONNX Runtime let go of Python's lock while they work, so that threads are enough. An unreadable
    picture is handed over as such and stops nothing.

    Args:
        encoder: whose image tower is used.
        pictures: paths, or whatever else `open_image` opens; taken only as
            far ahead as two batches need, so that a long list may be a generator.
        batch_size: pictures that the tower sees at once, at least 1.
        workers: threads that open pictures; None takes one a core, 8 at most.
    """
    how = encoder.describe().preprocessing
    size = encoder.describe().embedding_size

    def pixels_of(picture: P) -> Pixels | InputError:
        try:
            return preprocess(open_image(picture), how)
        except InputError as error:
            return error

    remaining = iter(pictures)
    with ThreadPoolExecutor(workers or min(_MOST_WORKERS, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[P, Future[Pixels | InputError]]] = deque()
        try:
            while True:
                for picture in islice(remaining, 2 * batch_size - len(ahead)):
                    ahead.append((picture, pool.submit(pixels_of, picture)))
                if not ahead:
                    return
                batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
                yield _embed(encoder, [(picture, opened.result()) for picture, opened in batch], size)
        finally:
            # A consumer that stops early, or Ctrl-C, shall not wait for pictures that nobody wants.
            pool.shutdown(wait=False, cancel_futures=True)


def _embed(encoder: TowerEncoder, opened: Sequence[tuple[P, Pixels | InputError]], size: int) -> EmbeddedBatch[P]:
    readable = [(picture, pixels) for picture, pixels in opened if not isinstance(pixels, InputError)]
    return EmbeddedBatch(
        pictures=[picture for picture, _ in readable],
        embeddings=encoder.encode_pixels(np.stack([pixels for _, pixels in readable]))
        if readable
        else np.zeros((0, size), dtype=np.float32),
        unreadable=[error for _, error in opened if isinstance(error, InputError)],
    )
