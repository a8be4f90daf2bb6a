"""The page of `demo`: its files, the bundles that it shows, and its requests."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.labels import LabelBank, Taught, taught_bytes
from clip_rd_edge.bundle.manifest import MANIFEST, read_manifest
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load, open_image_tower
from clip_rd_edge.runtime.taught import nothing_taught, taught_among
from clip_rd_edge.serving import protocol
from clip_rd_edge.serving.guard import LOOPBACK, Guard, RefusedError, error_response
from clip_rd_edge.serving.protocol import PageLabels, UploadedImage, require_few_labels
from clip_rd_edge.serving.server import PAGE, Handler, answered, json_response, read_body, serve_file
from clip_rd_edge.serving.shared import Classifiers, keep
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.structs import decode_request

MAX_PARALLEL = 2  # images classified at the same time
MAX_QUEUED = 16  # requests that may wait; a single page never sends more than one at a time
MAX_SETS = 64  # label lists that are kept
BANK_TOP = 20  # labels returned when classifying among a bundle's own labels
# Of errors that are no RefusedError; the page has a message for each status, and shows none of the server's words.
_BUSY, _LABELS_LOST, _BUNDLE_GONE, _OTHER_MODEL, _BAD_LABELS = 429, 409, 410, 412, 422


class _Opened:
    """A bundle that is open, and what was computed with it."""

    def __init__(self, encoder: BundleEncoder) -> None:
        self.encoder, self._classifiers = encoder, Classifiers()

    @cached_property
    def _untaught(self) -> Taught:
        return self.encoder.taught or nothing_taught(self.encoder)

    def taught(self, labels: PageLabels) -> tuple[Taught, LabelBank]:
        try:
            rows = labels.rows(self.encoder.manifest.embedding_size)
        except InputError as error:
            raise RefusedError(_OTHER_MODEL, str(error)) from error
        return taught_among(self.encoder, self._untaught, list(dict.fromkeys(labels.labels)), rows)

    async def classifier(self, labels: PageLabels | None) -> ZeroShotClassifier:
        make = partial(asyncio.to_thread, self._new_classifier, labels)
        return await self._classifiers.get(labels.key if labels is not None else "", make)

    def _new_classifier(self, labels: PageLabels | None) -> ZeroShotClassifier:
        if labels is None or not labels.taught:
            return ZeroShotClassifier(self.encoder, None if labels is None else labels.labels, cache=False)
        twin = copy(self.encoder)
        twin.label_bank = self.taught(labels)[1]
        return ZeroShotClassifier(twin, None, cache=False)


class ServedBundle:
    """A bundle that is opened for the demo, and opened again when it has been exported anew.

    Args:
        shown: what the page calls it; None for the name of the folder.
    """

    def __init__(
        self, folder: Path, *, shown: str | None = None, threads: int | None = None, force: bool = False
    ) -> None:
        self.folder, self.shown = folder, shown or folder.resolve().name
        self._threads, self._force = threads, force
        self._lock = threading.Lock()
        self._identity: tuple[int, ...] | None = None  # of the manifest last opened
        self._opened: _Opened
        read_manifest(folder)  # raises a clear error for a folder that is not a bundle
        self._info = self._describe()
        if not (self._info["texts"] or self._info["bank"]):
            raise InputError(
                f"The bundle {folder} has no text tower and no labels: there is nothing to classify images among.",
                hint="export it with --labels, or without --no-text-tower",
            )

    def opened(self) -> _Opened:
        """Return the current content of the folder."""
        identity = file_identity(self.folder / MANIFEST)
        if identity is None:
            raise RefusedError(_BUNDLE_GONE, f"The bundle {self.folder} was removed.")
        with self._lock:
            if self._identity != identity:
                encoder = load(self.folder, threads=self._threads, force=self._force)
                open_image_tower(encoder)
                self._opened, self._identity = _Opened(encoder), identity
            return self._opened

    def info(self) -> dict[str, Any]:
        """Return what the page shows about the bundle; if it was removed, the last known information."""
        with suppress(ClipRdEdgeError, RefusedError):
            self._info = self._describe()
        return self._info

    def _describe(self) -> dict[str, Any]:
        encoder = self.opened().encoder
        description, bank = encoder.describe(), encoder.label_bank
        return {
            "name": description.name,
            "folder": self.shown,
            "precision": description.precision,
            "size_bytes": description.size_bytes,
            "bank": len(bank.names) if bank else 0,
            "texts": encoder.has_text_tower,  # whether it embeds other labels than those of its bank, too
        }

    async def classify(self, content: bytes, labels: PageLabels | None, embedding: bool = False) -> dict[str, Any]:
        """Classify an image file among labels; return the likeliest, and how long each step took.

        Args:
            content: the bytes of the image file.
            labels: the labels; None uses the bundle's own and returns the BANK_TOP most likely.
            embedding: return the image's embedding, too, in base64 of float16.
        """
        opened, asked = await asyncio.to_thread(self.opened), time.perf_counter()
        try:
            classifier = await opened.classifier(labels)
        except InputError as error:
            if labels is not None and opened.encoder.has_text_tower:
                raise  # the labels themselves are refused
            raise RefusedError(_BUNDLE_GONE, str(error)) from error  # exported anew without what the page asks it for
        labels_ms = (time.perf_counter() - asked) * 1e3
        answer = await asyncio.to_thread(_answer, opened.encoder, classifier, content, labels, embedding)
        return answer | {"labels_ms": labels_ms}

    def taught(self, labels: PageLabels) -> bytes:
        """Return what `clip-rd-edge teach` takes for a folder of images: the content of taught.npz."""
        return taught_bytes(self.opened().taught(labels)[0])


def _answer(
    encoder: BundleEncoder, classifier: ZeroShotClassifier, content: bytes, labels: PageLabels | None, embedding: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    image = open_image(UploadedImage(content), max_pixels=protocol.MAX_PIXELS)
    pixels = preprocess(image, encoder.manifest.preprocessing)[None]
    preprocessed = time.perf_counter()
    embeddings = encoder.encode_pixels(pixels)
    top = BANK_TOP if labels is None else len(labels.labels)
    # A camera also sees what is neither taught nor beside it; without stored nouns, that would take a minute.
    measured = classifier.calibration is not None or (labels is not None and bool(labels.taught))
    none = measured and encoder.background is not None
    (predictions,) = classifier.classify_embeddings(embeddings, top=top, deciding={"none": none})
    return {
        "labels": [prediction.label for prediction in predictions],
        "probabilities": [round(prediction.probability, 5) for prediction in predictions],
        "open_ms": (preprocessed - started) * 1e3,
        "model_ms": (time.perf_counter() - preprocessed) * 1e3,
        "embedding": base64.b64encode(embeddings.astype("<f2").tobytes()).decode() if embedding else "",
    }


class Demo:
    """The request handlers of the demo.

    Args:
        bundles: folders of the bundles, in the order that the page shows them.
        labels: labels that the page starts with; None leaves the choice to the page.

    Attributes:
        label_sets: the last MAX_SETS lists that were sent, by key: the frames of a camera need not each carry one.
        pending: classify requests in progress or queued.
    """

    def __init__(
        self,
        bundles: Sequence[Path],
        *,
        labels: Sequence[str] | None = None,
        threads: int | None = None,
        force: bool = False,
    ):
        self.start_labels = list(labels or [])
        self.label_sets: OrderedDict[str, PageLabels] = OrderedDict()
        if self.start_labels:  # refused now, rather than with each image
            require_few_labels(self.start_labels)
        last = [folder.resolve().name for folder in bundles]
        names = [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, bundles, strict=True)]
        self.served = [
            ServedBundle(folder, shown=name, threads=threads, force=force)
            for folder, name in zip(bundles, names, strict=True)
        ]
        self.pending, self._room = 0, asyncio.Semaphore(MAX_PARALLEL)

    async def bundles(self, request: Request) -> Response:
        """Return the bundles and the labels to start with."""
        # In a thread, as one that was exported anew is opened first.
        infos = await asyncio.to_thread(lambda: [bundle.info() for bundle in self.served])
        return json_response({"bundles": infos, "labels": self.start_labels})

    async def labels(self, request: Request) -> Response:
        """Store a list of labels, or `PageLabels`; return the key by which classify requests refer to it."""
        try:
            body = await read_body(request)
            is_list = body.lstrip()[:1] != b"{"
            labels = PageLabels(decode_request(body, list)) if is_list else decode_request(body, PageLabels)
            labels.require_few()
        except InputError as error:
            return error_response(_BAD_LABELS, str(error), error.hint)
        keep(self.label_sets, labels.key, labels, MAX_SETS)
        return json_response({"key": labels.key})

    async def classify(self, request: Request) -> Response:
        """Classify the image in the body with ?bundle=NUMBER among ?labels=KEY (without a key: the bundle's own).

        With &name=NAME, as the page calls the bundle, a bundle that got the number in a restart is not used instead.
        With &embedding=1, the answer has the image's embedding, too.
        """
        bundle, labels = self._asked(request)
        content = await read_body(request)  # before it counts: an unfinished request takes nobody's turn
        if self.pending >= MAX_PARALLEL + MAX_QUEUED:
            raise RefusedError(_BUSY, "Too many images at once; try again in a moment.")
        self.pending += 1
        try:
            embedding = request.query_params.get("embedding") == "1"
            async with self._room:
                return json_response(await bundle.classify(content, labels, embedding))
        finally:
            self.pending -= 1

    async def taught(self, request: Request) -> Response:
        """Return what the images of ?labels=KEY have taught ?bundle=NUMBER, for `clip-rd-edge teach`."""
        bundle, labels = self._asked(request)
        if labels is None or not labels.taught:
            raise InputError("Nothing has been taught.")
        async with self._room:
            content = await asyncio.to_thread(bundle.taught, labels)
        return Response(content, media_type="application/octet-stream")

    def _asked(self, request: Request) -> tuple[ServedBundle, PageLabels | None]:
        bundle = self._bundle(request.query_params.get("bundle", "0"), request.query_params.get("name"))
        key = request.query_params.get("labels", "")
        labels = self.label_sets.get(key) if key else None
        if key and labels is None:
            raise RefusedError(_LABELS_LOST, "These labels are no longer known; send them again.")
        return bundle, labels

    def _bundle(self, number: str, name: str | None) -> ServedBundle:
        bundle = {str(index): bundle for index, bundle in enumerate(self.served)}.get(number)
        if bundle is None or name not in (None, bundle.shown):
            raise RefusedError(_BUNDLE_GONE, f"There is no bundle {number[:20]!r}, or it is another one now.")
        return bundle


def make_app(demo: Demo, *, host: str = LOOPBACK) -> Starlette:
    """Return the ASGI application of a `Demo`, protected by `Guard`, for a server that listens on `host`."""
    return Starlette(
        routes=[
            Route("/", serve_file(PAGE / "index.html")),
            Route("/api/bundles", demo.bundles),
            Route("/api/labels", _answered(demo.labels), methods=["POST"]),
            Route("/api/classify", _answered(demo.classify), methods=["POST"]),
            Route("/api/taught.npz", _answered(demo.taught)),
            *(Route(f"/{path.name}", serve_file(path)) for path in PAGE.iterdir()),
        ],
        middleware=[Middleware(Guard, host=host, respond=error_response, full=_BUSY)],
    )


def _answered(handler: Handler) -> Handler:
    return answered(handler, respond=error_response, status_of=_status_of)


def _status_of(error: ClipRdEdgeError) -> int:
    """Return 400 where the request is at fault, and 500 where the bundle or the machine is."""
    return 400 if isinstance(error, UsageError) and not isinstance(error, ConfigError) else 500
