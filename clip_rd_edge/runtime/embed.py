"""Embed many images: threads open and preprocess images ahead of the model, so that it never waits."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, Encoder, TowerEncoder, image_batch_size, in_batches
from clip_rd_edge.bundle.images import (
    ImageFile,
    ImageInput,
    as_images,
    as_rgb,
    image_path,
    in_bounded_batches,
    open_image,
)
from clip_rd_edge.bundle.preprocess import Pixels, fast_decode_edge, preprocess
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.process import end_calls

if TYPE_CHECKING:
    from PIL import Image

    from clip_rd_edge.bundle.manifest import Manifest
    from clip_rd_edge.runtime.encoder import BundleEncoder

BATCH_SIZE = 32
_MAX_OPENERS = 8  # threads; on Linux they run at a lower priority than the model
_CHUNK_BATCHES = 8  # that a worker of a cluster embeds at a time
_BATCHES_AHEAD = 3  # one in the model, one being opened, and one ready in between
P = TypeVar("P", bound=ImageFile)
_Gathered = tuple[Sequence[P], Pixels | None, Sequence[InputError]]  # a batch that is ready for the model


@dataclass(frozen=True, kw_only=True)
class EmbeddedBatch(Generic[P]):
    """One batch of results, in input order.

    Attributes:
        images: the n images that could be read.
        embeddings: their embeddings, (n, D).
        unreadable: one error per image that could not be read.
    """

    images: Sequence[P]
    embeddings: Embeddings
    unreadable: Sequence[InputError]


def encode_inputs(encoder: Encoder, images: ImageInput | Iterable[ImageInput], *, quick: bool = False) -> Embeddings:
    """Embed an image or images in any form, (N, D).

    Only a batch of them is in memory. Each is converted before the next is drawn: cameras and decoders fill one buffer
    again and again. Files that come first are opened by threads, as in `embed_images`.

    Args:
        quick: as for `embed_images`.
    """
    entries, others = iter(as_images(images)), list[ImageInput]()

    def leading_files() -> Iterator[Path]:
        for image in entries:
            if not isinstance(image, str | os.PathLike):
                others.append(image)
                return
            yield image_path(image)

    parts, files = list[Embeddings](), leading_files()
    first: list[Path] = list(islice(files, 2))
    if len(first) == 2 and isinstance(encoder, TowerEncoder):
        for embedded in embed_images(encoder, chain(first, files), quick=quick):
            if embedded.unreadable:
                raise embedded.unreadable[0]
            parts.append(embedded.embeddings)
        first = []
    min_edge = fast_decode_edge(encoder.describe().preprocessing) if quick else None
    kept = isinstance(images, Sequence)  # a list holds all of its images, which then need no copies
    rgb_images = (_to_rgb(image, min_edge, copy=not kept) for image in chain(first, others, entries))
    for batch in in_bounded_batches(rgb_images, BATCH_SIZE):
        parts.append(encoder.encode_images(batch))
        del batch  # before the next images are opened
    return np.concatenate(parts) if parts else encoder.encode_images([])


def _to_rgb(image: ImageInput, min_edge: int | None, *, copy: bool) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        return open_image(image_path(image), min_edge=min_edge)
    rgb = as_rgb(image)
    return rgb.copy() if copy and rgb is image else rgb


def embed_images(
    encoder: TowerEncoder,
    images: Iterable[P],
    *,
    batch_size: int = BATCH_SIZE,
    quick: bool = False,
) -> Iterator[EmbeddedBatch[P]]:
    """Embed images batch by batch.

    While the caller handles one batch, the model embeds the next one and threads open the images of the one after
    that. Pillow and ONNX Runtime release Python's lock while they work, so threads are enough. An image that cannot be
    read is reported in its batch and does not stop the others.

    Args:
        encoder: the model; only its image tower is used.
        images: paths, or anything else that `open_image` opens. A generator is read at most three batches ahead.
        batch_size: images per call of the image tower, at least 1.
        quick: decode large JPEGs at a fraction of their size (`open_image(min_edge=…)`).

    Yields:
        The batches, in input order.
    """
    preprocessing = encoder.describe().preprocessing
    size = encoder.describe().embedding_size
    min_edge = fast_decode_edge(preprocessing) if quick else None

    def open_pixels(image: P) -> Pixels | InputError:
        try:
            return preprocess(open_image(image, min_edge=min_edge), preprocessing)
        except InputError as error:
            return error
        except MemoryError:
            return InputError(f"Cannot read the image {image}: there is not enough memory to resize it.")

    def gather(batch: Sequence[tuple[P, Future[Pixels | InputError]]]) -> _Gathered[P]:
        opened = [(image, future.result()) for image, future in batch]
        readable = [(image, pixels) for image, pixels in opened if not isinstance(pixels, InputError)]
        errors = [error for _, error in opened if isinstance(error, InputError)]
        pixels = np.stack([pixels for _, pixels in readable]) if readable else None
        return [image for image, _ in readable], pixels, errors

    def embed(gathered: Future[_Gathered[P]]) -> EmbeddedBatch[P]:
        readable, pixels, errors = gathered.result()
        rows = np.zeros((0, size), dtype=np.float32) if pixels is None else encoder.encode_pixels(pixels)
        return EmbeddedBatch(images=readable, embeddings=rows, unreadable=errors)

    batch_size = image_batch_size(batch_size, preprocessing)
    remaining = iter(images)
    openers = ThreadPoolExecutor(min(_MAX_OPENERS, usable_cores()), initializer=_lower_priority)
    model = ThreadPoolExecutor(1)
    try:
        ahead: deque[Future[EmbeddedBatch[P]]] = deque()
        while True:
            while len(ahead) < _BATCHES_AHEAD:
                batch = [(image, openers.submit(open_pixels, image)) for image in islice(remaining, batch_size)]
                if not batch:
                    break
                # Gather in an opener thread: the pool takes tasks in order, so all of this batch have been started.
                ahead.append(model.submit(embed, openers.submit(gather, batch)))
            if not ahead:
                return
            yield ahead.popleft().result()
    except (Exception, GeneratorExit):
        raise
    except BaseException:  # a signal
        over = end_calls(130)
        model.shutdown(cancel_futures=True)
        over.set()
        raise
    finally:
        # If the caller stops early or presses Ctrl-C, do not wait for images that are no longer needed.
        openers.shutdown(wait=False, cancel_futures=True)
        model.shutdown(cancel_futures=True)


def embed_images_on_cluster(address: str, encoder: BundleEncoder, images: Sequence[P]) -> Iterator[EmbeddedBatch[P]]:
    """Embed images as `embed_images` does, in the same batches, by the workers of a Ray cluster.

    Args:
        address: as for `map_on_cluster`; the cluster's machines need the same bundle and images.
    """
    from clip_rd_edge.utils.cluster import map_on_cluster  # late: hardly anybody has a cluster

    chunks = [images[part] for part in in_batches(len(images), _CHUNK_BATCHES * BATCH_SIZE)]
    make = partial(_make_worker, encoder.folder.resolve(), encoder.manifest, force=encoder.force)
    for batches in map_on_cluster(address, make, chunks):
        yield from batches


def _make_worker(
    bundle: Path, manifest: Manifest, *, force: bool = False
) -> Callable[[Sequence[P]], list[EmbeddedBatch[P]]]:
    from clip_rd_edge.runtime.load import load

    encoder = load(bundle, force=force)
    if encoder.manifest != manifest:
        raise InputError(f"The bundle {bundle} is another one here.", hint="give all machines the same bundle")
    encoder.require_right(encoder.manifest.image)
    return lambda chunk: list(embed_images(encoder, chunk))


def open_image_tower(encoder: TowerEncoder) -> None:
    """Load the image tower by embedding a blank image, so that no real image's time includes the loading."""
    height, width = encoder.describe().preprocessing.size
    encoder.encode_pixels(np.zeros((1, 3, height, width), dtype=np.float32))


def _lower_priority() -> None:
    """Let the model's threads run first."""
    if sys.platform == "linux":  # where priorities are per thread
        with suppress(OSError):  # services and containers may be forbidden to
            os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))
