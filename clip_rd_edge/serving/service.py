"""The handlers of `clip-rd-edge serve`: they embed, classify and search for all requests together."""

from __future__ import annotations

import asyncio
import base64
import hmac
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clip_rd_edge.bundle.encoder import Embeddings, fill_template, in_batches, normalise
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.labels import LabelBank
from clip_rd_edge.bundle.manifest import MANIFEST
from clip_rd_edge.bundle.preprocess import Pixels, preprocess
from clip_rd_edge.errors import ClipRdEdgeError, InputError, with_hint
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.embed import open_image_tower
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import (
    INDEX_FILE,
    Entry,
    Index,
    nearest,
    open_graph,
    read_index,
    require_same_model,
)
from clip_rd_edge.runtime.search_graph import Graph
from clip_rd_edge.serving import protocol
from clip_rd_edge.serving.demo import MAX_PIXELS, LabelSets, UploadedImage, label_key
from clip_rd_edge.serving.protocol import Batcher, Item
from clip_rd_edge.serving.server import (
    LOOPBACK,
    FullError,
    Guard,
    TooLargeError,
    host_names,
    read_body,
    too_large_message,
)
from clip_rd_edge.utils.host import resident_memory_bytes
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.structs import CheckedStruct, PositiveInt, UnknownFieldError, decode_request

OPENERS = 2  # threads that decode images
_BATCHES_AHEAD = 3  # of opened images: one in the model, one being opened, and one ready in between
_FEW_CHARACTERS = 1000  # that are tokenised at once: a change of threads takes longer
_MAX_CLASSIFIERS = 8  # label lists whose embeddings are kept


class BusyError(ClipRdEdgeError):
    """The server has as much work as it accepts."""


class Limits(CheckedStruct, frozen=True, kw_only=True):
    """How much the server takes on.

    Attributes:
        max_batch: max number of items per call of a tower.
        max_items: max number of items of all requests that are not answered yet; a larger request is accepted only if
            there is no other. What exceeds it is answered with 503.
        max_requests: max number of requests that are answered at a time, once they are complete; the same holds.
    """

    max_batch: PositiveInt = 16
    max_items: PositiveInt = 1024
    max_requests: PositiveInt = 256


class Service:
    """The request handlers.

    Args:
        encoder: the bundle.
        index: folder of an index of that bundle, for /search; None serves no search.
        limits: how much the server takes on.
        version: of this package, which clients are told.
    """

    def __init__(
        self,
        encoder: BundleEncoder,
        *,
        index: Path | None = None,
        limits: Limits | None = None,
        version: str = "",
    ) -> None:
        self.limits, self.version = limits or Limits(), version
        self.encoder, self.metrics = encoder, Metrics()
        self.active_requests = self.pending_items = 0
        self.description = encoder.describe()
        self._created = int((encoder.folder / MANIFEST).stat().st_mtime)  # now: the folder may go while this runs
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="opener")
        size, batches = self.limits.max_batch, self.metrics.batches
        encode_images, encode_texts = _stacked(encoder.encode_pixels), _stacked(encoder.encode_ids)
        self._images = Batcher(encode_images, self._model, max_batch=size, on_batch=batches["image"].observe)
        self._texts = Batcher(encode_texts, self._model, max_batch=size, on_batch=batches["text"].observe)
        self._room = asyncio.Semaphore(_BATCHES_AHEAD * size)  # for opened images, of all requests
        self._classifiers: OrderedDict[str, ZeroShotClassifier] = OrderedDict()
        # By the key of the labels: one request embeds them, and the others with the same ones wait for it.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._index = ServedIndex(index, encoder) if index is not None else None
        open_image_tower(encoder)
        if encoder.has_text_tower:
            encoder.encode_texts(["a photo"])  # the first request waits for neither tower
        if encoder.label_bank is not None:  # now: an update may put another bundle into the folder while this runs
            self._classifiers[label_key([])] = ZeroShotClassifier(encoder, None, cache=False)

    async def embeddings(self, request: Request) -> Response:
        """POST /embeddings: llama.cpp's form, a list with one matrix of one row per item."""
        items = protocol.llama_items(decode_request(await request.body(), protocol.LlamaRequest))
        rows, _ = await self._embed(items)
        return json_response([{"index": number, "embedding": [row.tolist()]} for number, row in enumerate(rows)])

    async def openai_embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: OpenAI's form."""
        body = decode_request(await request.body(), protocol.OpenAiRequest)
        items = protocol.openai_items(body, embedding_size=self.description.embedding_size)
        rows, tokens = await self._embed(items)
        encoded = [_base64(row) if body.encoding_format == "base64" else row.tolist() for row in rows]
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": self.description.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        entry, name = self._model_entry(), request.path_params["name"]
        if name not in (entry["id"], *entry["aliases"]):
            return error_response(404, f"There is no model {name!r}; this server has {entry['id']!r}.")
        return json_response(entry)

    def _model_entry(self) -> dict[str, Any]:
        modalities = ["text", "image"] if self.encoder.has_text_tower else ["image"]
        return {
            "id": self.description.name,
            "object": "model",
            "created": self._created,
            "owned_by": "clip-rd-edge",
            "aliases": sorted({self.encoder.folder.resolve().name, "clip-rd-edge"} - {self.description.name}),
            "architecture": {"input_modalities": modalities, "output_modalities": ["embedding"]},
            "meta": {"n_ctx": self._context_length, "n_embd": self.description.embedding_size},
        }

    async def props(self, request: Request) -> Response:
        """GET /props."""
        return json_response(
            {
                "default_generation_settings": {"n_ctx": self._context_length},
                "total_slots": 1,
                "model_path": str(self.encoder.folder),
                "modalities": {"vision": True, "audio": False},
                "media_marker": protocol.MEDIA_MARKER,
                "chat_template": "",
                "build_info": f"clip-rd-edge {self.version}",
            }
        )

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        text = self.metrics.render(pending=self.pending_items, memory_bytes=resident_memory_bytes())
        return Response(text, media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(protocol.openapi(self.version, search=self.searches))

    async def classify(self, request: Request) -> Response:
        """POST /classify."""
        body = decode_request(await request.body(), protocol.ClassifyRequest)
        if body.labels is not None:
            LabelSets().add(body.labels)  # refuses what is no list of labels
        classifier = await self._classifier(body.labels)
        (row,), _ = await self._embed([Item(image=protocol.decode_image(body.image))])
        (predictions,) = classifier.classify_embeddings(row[None], top=body.top, none_below=body.none_below)
        return json_response({"predictions": [{"label": label, "probability": p} for label, p in predictions]})

    async def search(self, request: Request) -> Response:
        """POST /search."""
        body = decode_request(await request.body(), protocol.SearchRequest)
        if bool(body.query.strip()) == bool(body.image):
            raise InputError("Expected either a query or an image.")
        protocol.require_length(body.query, "The query")
        item = Item(image=protocol.decode_image(body.image)) if body.image else Item(text=body.query)
        (row,), _ = await self._embed([item])
        assert self._index is not None  # /search has no route without an index
        index, rows, graph = await self._index.current()
        hits = await asyncio.to_thread(nearest, index, rows, row, top=body.top, graph=graph)
        return json_response({"hits": [{"path": str(hit.path), "similarity": hit.similarity} for hit in hits]})

    @property
    def searches(self) -> bool:
        """Whether there is an index to search."""
        return self._index is not None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count a request while it is answered."""
        if self.active_requests >= self.limits.max_requests:
            raise BusyError(f"{self.active_requests:,} requests are being answered already.")
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._model, self._openers):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _context_length(self) -> int:
        return self.encoder.manifest.tokenizer.context_length

    async def _embed(self, items: Sequence[Item]) -> tuple[list[Embeddings], int]:
        """Return the embedding of each item, (D,), in order, and the number of tokens of the texts."""
        with self._counted(len(items)):
            texts = [item.text for item in items if item.text is not None]
            images = [
                UploadedImage(item.image, f"of item {number}")
                for number, item in enumerate(items)
                if item.image is not None
            ]
            embedded_texts, tokens = await self._embed_texts(texts) if texts else ((), 0)
            embedded_images = await self._embed_images(images) if images else ()
        rows_of_texts, rows_of_images = iter(embedded_texts), iter(embedded_images)
        return [next(rows_of_texts if item.text is not None else rows_of_images) for item in items], tokens

    async def _embed_texts(self, texts: Sequence[str]) -> tuple[Embeddings, int]:
        if sum(map(len, texts)) <= _FEW_CHARACTERS:
            ids = self.encoder.tokenize(texts)
        else:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(self._openers, self.encoder.tokenize, texts)
        tokens = int(np.count_nonzero(ids != self.encoder.manifest.tokenizer.pad_id))
        return await self._texts.embed(list(ids)), tokens

    async def _embed_images(self, images: Sequence[UploadedImage]) -> Embeddings:
        tasks = [asyncio.ensure_future(self._embed_image(image)) for image in images]
        try:
            return np.concatenate(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # if one cannot be opened, the others keep no other request waiting
                task.cancel()

    async def _embed_image(self, image: UploadedImage) -> Embeddings:
        """Return the embedding of an image, (1, D). A small file may be large when opened, so few are at a time."""
        async with self._room:
            pixels = await asyncio.get_running_loop().run_in_executor(self._openers, self._open, image)
            return await self._images.embed([pixels])

    def _open(self, image: UploadedImage) -> Pixels:
        return preprocess(open_image(image, max_pixels=MAX_PIXELS), self.encoder.manifest.preprocessing)

    @contextmanager
    def _counted(self, items: int) -> Iterator[None]:
        """Count the items of a request while they are embedded; raises BusyError as `_embed`."""
        if self.pending_items and self.pending_items + items > self.limits.max_items:
            raise BusyError(f"{self.pending_items:,} items wait already; the limit is {self.limits.max_items:,}.")
        self.pending_items += items
        try:
            yield
        finally:
            self.pending_items -= items

    async def _classifier(self, labels: Sequence[str] | None) -> ZeroShotClassifier:
        """Return the classifier among these labels, or those of the bundle; raises as `_embed`."""
        key = label_key(labels or [])
        async with self._turns.setdefault(key, asyncio.Lock()):
            if key not in self._classifiers:
                self._classifiers[key] = await self._new_classifier(labels)
                while len(self._classifiers) > _MAX_CLASSIFIERS:
                    self._classifiers.popitem(last=False)
            self._classifiers.move_to_end(key)
            return self._classifiers[key]

    async def _new_classifier(self, labels: Sequence[str] | None) -> ZeroShotClassifier:
        encoder, bank = self.encoder, self.encoder.label_bank
        names = tuple(dict.fromkeys(labels or ()))
        is_stored = bank is not None and await asyncio.to_thread(bank.find, names) is not None
        if names and encoder.has_text_tower and not is_stored:
            rows = await self._embed_labels(names)
            encoder, labels = copy(encoder), None
            encoder.label_bank = LabelBank(names, rows)  # from which the classifier takes them as they are
        work = partial(ZeroShotClassifier, encoder, labels, cache=False)
        return await asyncio.get_running_loop().run_in_executor(self._model, work)

    async def _embed_labels(self, labels: Sequence[str]) -> Embeddings:
        """Return the labels' embeddings, as `bundle.encoder.label_embeddings` does, in turn with other requests.

        No more prompts wait than fill a batch, and so many items are counted: thousands of labels keep no other request
        waiting, and get it no 503. Raises BusyError as `_embed`.
        """
        templates, size = self.description.templates, self.limits.max_batch
        means = list[Embeddings]()
        with self._counted(min(len(labels) * len(templates), size)):
            for part in in_batches(len(labels), size):
                prompts = [fill_template(template, label) for label in labels[part] for template in templates]
                rows = [(await self._embed_texts(prompts[batch]))[0] for batch in in_batches(len(prompts), size)]
                means.append(np.concatenate(rows).reshape(len(labels[part]), len(templates), -1).mean(axis=1))
        return normalise(np.concatenate(means))


def _stacked(encode: Callable[[Any], Embeddings]) -> Callable[[Sequence[Any]], Embeddings]:
    """Return a function that embeds a list of inputs without a batch dimension."""
    return lambda inputs: encode(np.stack(inputs))


def _base64(row: Embeddings) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with what msgspec encodes."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error_response(status: int, message: str, *, headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's form."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        503: "unavailable_error",
    }
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return json_response({"error": {"code": status, "message": message, "type": kind, "param": None}}, status, headers)


RETRY_AFTER_S = 1
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    service: Service, *, token: str = "", host: str = LOOPBACK, names: str | Collection[str] = ()
) -> Starlette:
    """Return the ASGI application.

    Args:
        token: the bearer token that every request but /health needs; empty for none.
        host: that the server listens on.
        names: further host names that requests may use; see `serving.server` for both.
    """
    posts: dict[str, Handler] = {
        "/embeddings": service.embeddings,
        "/embedding": service.embeddings,
        "/v1/embeddings": service.openai_embeddings,
        "/classify": service.classify,
    }
    if service.searches:
        posts["/search"] = service.search
    gets: dict[str, Handler] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.model,
        "/models": service.models,
        "/props": service.props,
        "/health": service.health,
        "/metrics": service.prometheus,
        "/openapi.json": service.openapi,
    }
    routes = [
        Route(path, _answer(path, handler, service, token), methods=[method])
        for method, handlers in (("POST", posts), ("GET", gets))
        for path, handler in handlers.items()
    ]
    guard = Middleware(Guard, host=host, names=host_names(names), token_required=bool(token), respond=error_response)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    unrouted: dict[Any, Any] = {HTTPException: _unrouted}
    return Starlette(routes=routes, middleware=[guard], lifespan=lifespan, exception_handlers=unrouted)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """Answer a request that no handler takes."""
    allowed = (error.headers or {}).get("Allow", "")
    expected = f"{request.method} is not answered, but {allowed}" if allowed else "there is nothing; see /openapi.json"
    message = f"At {request.url.path}, {expected}."
    return error_response(error.status_code, message, headers=dict(error.headers or {}))


def _answer(path: str, handler: Handler, service: Service, token: str) -> Handler:
    """Wrap a handler: check the token, turn expected errors into answers in OpenAI's form, and count."""

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        if token and path != "/health" and not _authorised(request, token):
            response = error_response(
                401, "The bearer token is missing or wrong.", headers={"WWW-Authenticate": "Bearer"}
            )
        else:
            response = await _result(handler, request, service)
        service.metrics.finish(path, response.status_code, time.perf_counter() - started)
        return response

    return handle


def _authorised(request: Request, token: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())


async def _result(handler: Handler, request: Request, service: Service) -> Response:
    try:
        if request.method != "POST":
            return await handler(request)
        # Before it counts: requests that are never complete take nobody's turn. The handler gets the body from here.
        await read_body(request)
        with service.turn():
            return await _unless_it_leaves(handler, request)
    except BusyError as error:
        return error_response(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
    except FullError:
        return error_response(503, "Too much is being sent at once.", headers={"Retry-After": str(RETRY_AFTER_S)})
    except TooLargeError:
        return error_response(413, too_large_message())
    except (asyncio.TimeoutError, TimeoutError):
        return error_response(408, "The request did not arrive in time.")
    except ClientDisconnect:
        return error_response(400, "The connection was closed before the request was complete.")
    except UnknownFieldError as error:
        return error_response(422, with_hint(str(error), error.hint))
    except InputError as error:
        return error_response(400, with_hint(str(error), error.hint))
    except ClipRdEdgeError as error:
        return error_response(500, with_hint(str(error), error.hint))


async def _unless_it_leaves(handler: Handler, request: Request) -> Response:
    """Return the handler's response; cancel it if the client closes the connection, to compute nothing for it."""
    task = asyncio.current_task()
    assert task is not None
    end = asyncio.ensure_future(request.receive())  # the body is complete: what comes next is the connection's end
    left = False

    def leave(end: asyncio.Future[Any]) -> None:
        nonlocal left
        if not end.cancelled():
            left = True
            task.cancel()

    end.add_done_callback(leave)
    try:
        return await handler(request)
    except asyncio.CancelledError:
        if not left:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise ClientDisconnect from None
    finally:
        end.remove_done_callback(leave)
        end.cancel()


_ENTRIES_FREED = 10_000  # at a time
_READING_S = 1.0  # that a search waits for an index that was updated; less than a client's patience

Opened = tuple[Index, Embeddings, Graph | None]


class ServedIndex:
    """An index that others may update.

    Args:
        folder: of the index.
        encoder: the bundle that made it.
    """

    def __init__(self, folder: Path, encoder: BundleEncoder) -> None:
        self._folder, self._encoder = folder, encoder
        self._identity = file_identity(folder / INDEX_FILE)  # of the index.json that was read last
        self._error: ClipRdEdgeError | None = None  # why that cannot be searched
        self._reading: asyncio.Task[None] | None = None
        self._opened = self._open()

    async def current(self) -> Opened:
        """Return the index, read again if it was updated; the one before, where reading takes long."""
        identity = await asyncio.to_thread(file_identity, self._folder / INDEX_FILE)
        if self._reading is None and (identity != self._identity or self._error is not None):
            self._reading = asyncio.create_task(self._read_again())
            finished, _ = await asyncio.wait([self._reading], timeout=_READING_S)
            for reading in finished:
                reading.result()  # raises what is not expected
        if self._error is not None and identity == self._identity:
            # Not an InputError, as the client's mistakes are: it was removed, or replaced by another bundle's.
            raise ClipRdEdgeError(str(self._error), hint=self._error.advice) from self._error
        return self._opened

    async def _read_again(self) -> None:
        try:
            identity = await asyncio.to_thread(file_identity, self._folder / INDEX_FILE)
            try:
                opened = await asyncio.to_thread(self._open, self._opened[0].model)
            except ClipRdEdgeError as error:
                self._identity, self._error = identity, error
                return
            entries = list(self._opened[0].entries)
            self._opened, self._identity, self._error = opened, identity, None
            await asyncio.to_thread(_free_in_parts, entries)
        finally:
            self._reading = None

    def _open(self, model: str | None = None) -> Opened:
        """Read the index; `model` is the key of the one that has made it so far."""
        index, rows = read_index(self._folder, memory_mapped=False)
        if model is not None and index.model != model:
            raise ClipRdEdgeError(
                f"Another bundle has made the index {self._folder} again since this server started.",
                hint=f"Restart clip-rd-edge serve with that bundle, {index.bundle}.",
            )
        require_same_model(self._encoder, index, self._folder)
        return index, rows, open_graph(self._folder, index, memory_mapped=False)


def _free_in_parts(entries: list[Entry]) -> None:
    """Empty a list: all at once, the memory of a million entries is freed while no other thread runs."""
    while entries:
        del entries[-_ENTRIES_FREED:]


PREFIX = "clip_rd_edge_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """Counts values by upper bounds.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
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
        """Return all metrics as text.

        Args:
            pending: items of requests that are not answered yet.
            memory_bytes: resident memory of the process, or None if it is unknown.
        """
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
