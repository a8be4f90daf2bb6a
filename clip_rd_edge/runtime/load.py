"""Open a bundle as an encoder, and embed many images: threads open and preprocess them ahead of the model."""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, Encoder, TowerEncoder, image_batch_size, in_batches
from clip_rd_edge.bundle.formats import FORMATS, encoder_of, format_of
from clip_rd_edge.bundle.images import (
    ImageFile,
    ImageInput,
    as_images,
    as_rgb,
    in_bounded_batches,
    open_image,
)
from clip_rd_edge.bundle.manifest import (
    MANIFEST,
    Manifest,
    damaged_files,
    is_bundle,
    read_manifest,
    require_intact_manifest,
    require_intact_tower,
)
from clip_rd_edge.bundle.preprocess import Pixels, Preprocessing, fast_decode_edge, preprocess
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime.backends.onnxruntime import IN_BF16, OPENVINO_PROCESSORS, PROVIDERS, import_onnxruntime
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, RunOptions, require_threads
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.process import end_calls

if TYPE_CHECKING:
    from PIL import Image


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    runtime: str | None = None,
    device: str = AUTO,
    spin: bool = True,
    force: bool = False,
    manifest: Manifest | None = None,
) -> BundleEncoder:
    """Open a bundle. Each tower is loaded when it is first used, and its checksum compared (see `bundle.manifest`).

    Args:
        threads: threads per tower; None leaves the choice to the runtime, which uses every core.
        runtime: the inference engine; None uses the one that the bundle was exported for. If its TensorRT engines
            cannot run here, the ONNX files that they were built from run on the CPU.
        device: one of `settings.deploying.Device`. `auto` chooses a GPU or OpenVINO if ONNX Runtime's package for it is
            installed, and the CPU otherwise, and always for INT8 and in OpenVINO itself. OpenVINO's devices run a
            bundle made for OpenVINO, or with `runtime="openvino"`, in OpenVINO itself, and others in ONNX Runtime, or
            in OpenVINO if only that is installed; `openvino-bf16` computes in bfloat16, always in OpenVINO. `tensorrt`
            runs the engines of a bundle made for it, and others in ONNX Runtime. `describe().device` is the one chosen.
        spin: False for embedding many images in ONNX Runtime: see `backends.onnxruntime.open_session`.
        force: use a tower, with a warning, although this processor is known to compute its INT8 wrongly. Otherwise the
            first use raises UsageError.
        manifest: of the bundle, if it has been read already.
    """
    folder = Path(bundle)
    if manifest is None:
        folder = _without_links(folder) if is_bundle(folder) else folder
        manifest = read_manifest(folder)
        require_intact_manifest(folder, manifest)
    require_threads(threads)
    engine = runtime or _runtime_for(device, manifest)
    _require_readable(manifest, engine)
    options = RunOptions(threads=threads, device=device, spin=spin, required=runtime is not None)
    encoder: BundleEncoder = encoder_of(engine)(folder, manifest, options)
    encoder.force = force
    return encoder


def copy_bundle(bundle: Path, manifest: Manifest, folder: Path) -> None:
    """Copy a bundle's manifest and the files that it lists, all as they were exported, into a new folder."""
    require_intact_manifest(bundle, manifest)
    if damaged := damaged_files(bundle, manifest):
        raise UsageError(f"The bundle {bundle} is damaged: {', '.join(damaged)}.", hint="copy or export it again")
    for tower in manifest.towers.values():
        require_intact_tower(bundle, manifest, tower)
    for name in (MANIFEST, *manifest.files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, folder / name)


def _without_links(folder: Path) -> Path:
    """Return the folder that a path leads to: what is read later is of the same bundle if a link is switched meanwhile.

    A path without links is returned as it was given, since messages name it.
    """
    real = folder.resolve()
    return folder if os.fspath(real) == os.path.abspath(folder) else real  # noqa: PTH100 — it removes `..`


def _require_readable(manifest: Manifest, engine: str) -> None:
    own = format_of(manifest.target)
    reads_onnx = any(info.runtime == engine and info.is_onnx for info in FORMATS.values())
    if engine != own.runtime and not (own.is_onnx and reads_onnx):
        raise UsageError(
            f"The runtime {engine!r} does not run this bundle, whose files are {'ONNX' if own.is_onnx else own.title}.",
            hint=f"omit the runtime: {own.runtime} runs it",
        )


def _runtime_for(device: str, manifest: Manifest) -> str:
    info = format_of(manifest.target)
    own = info.runtime
    if device in (AUTO, own) or not info.is_onnx or (device == "cpu" and own != "tensorrt"):
        return own
    if device == IN_BF16 or (device in OPENVINO_PROCESSORS and (own == "openvino" or _only_openvino_itself())):
        return "openvino"
    return FORMATS["onnx"].runtime  # the others are its devices, whatever the bundle was exported for


def _only_openvino_itself() -> bool:
    available = import_onnxruntime().get_available_providers()
    return bool(find_spec("openvino")) and PROVIDERS["openvino"].name not in available


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
    again and again. A list of files is opened by threads, as in `embed_images`.
    """
    entries, parts = as_images(images), list[Embeddings]()
    kept = isinstance(entries, Sequence)  # a list holds all of its images, which then need no copies
    files = [Path(entry) for entry in entries if isinstance(entry, str | os.PathLike)] if kept else []
    if isinstance(entries, Sequence) and len(files) == len(entries) > 1 and isinstance(encoder, TowerEncoder):
        for embedded in embed_images(encoder, files, quick=quick):
            if embedded.unreadable:
                raise embedded.unreadable[0]
            parts.append(embedded.embeddings)
        return np.concatenate(parts)
    min_edge = fast_decode_edge(encoder.describe().preprocessing) if quick else None
    for batch in in_bounded_batches((_to_rgb(image, min_edge, copy=not kept) for image in entries), BATCH_SIZE):
        parts.append(encoder.encode_images(batch))
        del batch  # before the next images are opened
    return np.concatenate(parts) if parts else encoder.encode_images([])


def _to_rgb(image: ImageInput, min_edge: int | None, *, copy: bool) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        return open_image(Path(image), min_edge=min_edge)
    rgb = as_rgb(image)
    return rgb.copy() if copy and rgb is image else rgb


def embed_images(
    encoder: TowerEncoder, images: Iterable[P], *, batch_size: int = BATCH_SIZE, quick: bool = False
) -> Iterator[EmbeddedBatch[P]]:
    """Embed images batch by batch; yield the batches in input order.

    While the caller handles one batch, the model embeds the next one and threads open the images of the one after
    that. Pillow and ONNX Runtime release Python's lock while they work, so threads are enough. An image that cannot be
    read is reported in its batch and does not stop the others.

    Args:
        images: paths, or anything else that `open_image` opens. A generator is read at most three batches ahead.
        quick: decode large JPEGs at a fraction of their size (`open_image(min_edge=…)`).
    """
    description = encoder.describe()
    preprocessing, size = description.preprocessing, description.embedding_size
    open_pixels = partial(_open_pixels, preprocessing, fast_decode_edge(preprocessing) if quick else None)

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
    except BaseException as error:
        if not isinstance(error, Exception | GeneratorExit):  # a signal
            over = end_calls(130)
            model.shutdown(cancel_futures=True)
            over.set()
        raise
    finally:
        # If the caller stops early or presses Ctrl-C, do not wait for images that are no longer needed.
        openers.shutdown(wait=False, cancel_futures=True)
        model.shutdown(cancel_futures=True)


def _open_pixels(preprocessing: Preprocessing, min_edge: int | None, image: ImageFile) -> Pixels | InputError:
    try:
        return preprocess(open_image(image, min_edge=min_edge), preprocessing)
    except InputError as error:
        return error
    except MemoryError:
        return InputError(f"Cannot read the image {image}: there is not enough memory to resize it.")


def embed_images_on_cluster(address: str, encoder: BundleEncoder, images: Sequence[P]) -> Iterator[EmbeddedBatch[P]]:
    """Embed images as `embed_images` does, in the same batches, by a Ray cluster whose machines have the bundle."""
    from clip_rd_edge.utils.cluster import map_on_cluster  # late: hardly anybody has a cluster

    chunks = [images[part] for part in in_batches(len(images), _CHUNK_BATCHES * BATCH_SIZE)]
    make = partial(_make_worker, encoder.folder.resolve(), encoder.manifest, force=encoder.force)
    for batches in map_on_cluster(address, make, chunks):
        yield from batches


def _make_worker(
    bundle: Path, manifest: Manifest, *, force: bool = False
) -> Callable[[Sequence[P]], list[EmbeddedBatch[P]]]:

    encoder = load(bundle, force=force)
    if encoder.manifest != manifest:
        raise InputError(f"The bundle {bundle} differs on this machine.", hint="give all machines the same bundle")
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
