"""Many images to embeddings, at the pace of the model: threads open and preprocess ahead of it."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from clip_rd_edge.contract.encoder import Embeddings, TowerEncoder
from clip_rd_edge.contract.images import ImageFile, open_image
from clip_rd_edge.contract.preprocess import Pixels, preprocess, quick_edge
from clip_rd_edge.errors import InputError

BATCH_SIZE = 32
_MOST_WORKERS = 8
_BATCHES_AHEAD = 3  # one with the model, one that is being opened, and one opened in full, so that none waits
P = TypeVar("P", bound=ImageFile)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBatch(Generic[P]):
    """Some images in the order in which they were asked for.

    Attributes:
        images: those that could be read, n of them.
        embeddings: theirs, (n, D).
        unreadable: for each of the others, the sentence that says why.
    """

    images: Sequence[P]
    embeddings: Embeddings
    unreadable: Sequence[InputError]


def embed_images(
    encoder: TowerEncoder,
    images: Iterable[P],
    *,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    quick: bool = False,
) -> Iterator[EmbeddedBatch[P]]:
    """Embed images batch by batch: while the caller has one batch, the model works on the next, and threads open the
    images of the one after it.

    Pillow and ONNX Runtime let go of Python's lock while they work, so that threads are enough. An unreadable
    image is handed over as such and stops nothing.

    Args:
        encoder: whose image tower is used.
        images: paths, or whatever else `open_image` opens; taken only as
            far ahead as three batches need, so that a long list may be a generator.
        batch_size: images that the tower sees at once, at least 1.
        workers: threads that open images; None takes one a core, 8 at most. They give way to the model.
        quick: decode large JPEGs at a fraction of their size (`open_image(at_least=…)`).
    """
    how = encoder.describe().preprocessing
    size = encoder.describe().embedding_size
    at_least = quick_edge(how) if quick else None

    def pixels_of(image: P) -> Pixels | InputError:
        try:
            return preprocess(open_image(image, at_least=at_least), how)
        except InputError as error:
            return error

    def gather(batch: Sequence[tuple[P, Future[Pixels | InputError]]]) -> _Gathered[P]:
        return _gather([(image, opened.result()) for image, opened in batch])

    def embed(gathered: Future[_Gathered[P]]) -> EmbeddedBatch[P]:
        return _embed(encoder, gathered.result(), size)

    remaining = iter(images)
    workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    openers = ThreadPoolExecutor(workers, initializer=_give_way)
    model = ThreadPoolExecutor(1)
    try:
        ahead: deque[Future[EmbeddedBatch[P]]] = deque()
        while True:
            while len(ahead) < _BATCHES_AHEAD:
                batch = [(image, openers.submit(pixels_of, image)) for image in islice(remaining, batch_size)]
                if not batch:
                    break
                # By an opener: they take tasks in turn, so that each of the batch's is done or being done by then.
                ahead.append(model.submit(embed, openers.submit(gather, batch)))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        # A consumer that stops early, or Ctrl-C, shall not wait for images that nobody wants.
        openers.shutdown(wait=False, cancel_futures=True)
        model.shutdown(cancel_futures=True)


def open_image_tower(encoder: TowerEncoder) -> None:
    """Embed a blank image, so that none waits for the tower to be loaded, nor has its time told as the model's."""
    height, width = encoder.describe().preprocessing.size
    encoder.encode_pixels(np.zeros((1, 3, height, width), dtype=np.float32))


def _give_way() -> None:
    """Let the model run first, where a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))


@dataclass(frozen=True)
class _Gathered(Generic[P]):
    """A batch that is ready for the model; `pixels` are None where no image could be read."""

    images: Sequence[P]
    pixels: Pixels | None
    unreadable: Sequence[InputError]


def _gather(opened: Sequence[tuple[P, Pixels | InputError]]) -> _Gathered[P]:
    readable = [(image, pixels) for image, pixels in opened if not isinstance(pixels, InputError)]
    return _Gathered(
        [image for image, _ in readable],
        np.stack([pixels for _, pixels in readable]) if readable else None,
        [error for _, error in opened if isinstance(error, InputError)],
    )


def _embed(encoder: TowerEncoder, batch: _Gathered[P], size: int) -> EmbeddedBatch[P]:
    nothing = np.zeros((0, size), dtype=np.float32)
    embeddings = nothing if batch.pixels is None else encoder.encode_pixels(batch.pixels)
    return EmbeddedBatch(images=batch.images, embeddings=embeddings, unreadable=batch.unreadable)
