"""What `clip-rd-edge serve` answers to other programs: embeddings, classification and search."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_rd_edge.bundle.encoder import Embeddings, fill_template, in_batches, normalise
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.labels import LabelBank
from clip_rd_edge.bundle.manifest import MANIFEST
from clip_rd_edge.bundle.preprocess import Pixels, preprocess
from clip_rd_edge.errors import ClipRdEdgeError, InputError, with_hint
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.labels import NO_LABELS
from clip_rd_edge.runtime.load import open_image_tower
from clip_rd_edge.serving import protocol
from clip_rd_edge.serving.guard import LOOPBACK, Guard, RefusedError, host_names
from clip_rd_edge.serving.protocol import Item, UploadedImage, item_image, label_key, require_few_labels
from clip_rd_edge.serving.server import (
    Handler,
    answered,
    json_response,
    page_files,
    read_body,
    serve_file,
    unless_it_leaves,
)
from clip_rd_edge.serving.shared import CONTENT_TYPE, Batcher, Classifiers, Metrics, ServedIndex
from clip_rd_edge.utils.host import resident_memory_bytes
from clip_rd_edge.utils.structs import UnknownFieldError, decode_request

OPENERS = 2  # threads that decode images
MAX_REQUESTS = 256  # that are answered at a time, once they are complete; others get 503
RETRY_AFTER_S = 1
_BUSY = 503
_BATCHES_AHEAD = 3  # of opened images: one in the model, one being opened, and one ready in between
_FEW_CHARACTERS = 1000  # that are tokenised at once: a change of threads takes longer


class Service:
    """The request handlers.

    Args:
        index: folder of an index of that bundle, for /search; None serves no search.
        images: the folder of the indexed images, for thumbnails; None serves none.
        max_batch: max number of items per call of a tower.
        max_items: max number of items of all requests that are not answered yet; a larger request is accepted only if
            there is no other. What exceeds it is answered with 503.
    """

    def __init__(
        self,
        encoder: BundleEncoder,
        *,
        index: Path | None = None,
        images: Path | None = None,
        max_batch: int = 16,
        max_items: int = 1024,
        version: str = "",
    ) -> None:
        self.max_batch, self.max_items, self.version = max_batch, max_items, version
        self.encoder, self.metrics = encoder, Metrics()
        self.active_requests = self.pending_items = 0
        self.description = encoder.describe()
        self._created = int((encoder.folder / MANIFEST).stat().st_mtime)  # now: the folder may go while this runs
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="opener")
        batches = self.metrics.batches
        encode_images, encode_texts = _stacked(encoder.encode_pixels), _stacked(encoder.encode_ids)
        self._images = Batcher(encode_images, self._model, max_batch=max_batch, on_batch=batches["image"].observe)
        self._texts = Batcher(encode_texts, self._model, max_batch=max_batch, on_batch=batches["text"].observe)
        self._room = asyncio.Semaphore(_BATCHES_AHEAD * max_batch)  # for opened images, of all requests
        self._classifiers = Classifiers()
        self._index = ServedIndex(index, encoder, images) if index is not None else None
        open_image_tower(encoder)
        if encoder.has_text_tower:
            encoder.encode_texts(["a photo"])  # the first request waits for neither tower
        _ = encoder.label_bank  # read now: an update may put another bundle into the folder while this runs

    async def embeddings(self, request: Request) -> Response:
        """Embed in llama.cpp's form: a list with one matrix of one row per item."""
        items = protocol.llama_items(decode_request(await request.body(), protocol.LlamaRequest))
        rows, _ = await self._embed(items)
        return json_response([{"index": number, "embedding": [row.tolist()]} for number, row in enumerate(rows)])

    async def openai_embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: OpenAI's form."""
        body = decode_request(await request.body(), protocol.OpenAiRequest)
        items = protocol.openai_items(body, embedding_size=self.description.embedding_size)
        rows, tokens = await self._embed(items)
        is_base64 = body.encoding_format == "base64"  # as msgspec encodes bytes
        encoded = [row.astype("<f4").tobytes() if is_base64 else row.tolist() for row in rows]
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": self.description.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        entry, name = self._model_entry(), request.path_params["name"]
        if name not in (entry["id"], *entry["aliases"]):
            return _error_response(404, f"There is no model {name!r}; this server has {entry['id']!r}.")
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
        return json_response({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        text = self.metrics.render(pending=self.pending_items, memory_bytes=resident_memory_bytes())
        return Response(text, media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return json_response(protocol.openapi(self.version, search=self.searches))

    async def classify(self, request: Request) -> Response:
        body, image = await _asked(request, protocol.ClassifyRequest)
        if body.labels is not None:
            require_few_labels(body.labels)
        key, make = label_key(body.labels or []), partial(self._new_classifier, body.labels)
        classifier = await self._classifiers.get(key, make)
        (row,), _ = await self._embed([item_image(image)])
        answer = partial(classifier.classify_embeddings, row[None], top=body.top, deciding=body.deciding)
        (predictions,) = await asyncio.to_thread(answer)  # without a background, the bundle embeds one now
        return json_response({"predictions": [{"label": label, "probability": p} for label, p in predictions]})

    async def search(self, request: Request) -> Response:
        return await self._search(*await _asked(request, protocol.SearchRequest))

    async def search_text(self, request: Request) -> Response:
        fields = [("query" if name == "q" else name, value) for name, value in request.query_params.multi_items()]
        return await self._search(protocol.request_of(fields, protocol.SearchRequest), b"")

    async def _search(self, body: protocol.SearchRequest, image: bytes) -> Response:
        if bool(body.query.strip()) == bool(image):
            raise InputError("Expected either a query or an image.")
        if not image:
            protocol.require_length(body.query, "The query")
        (row,), _ = await self._embed([item_image(image) if image else body.query])
        assert self._index is not None  # /search has no route without an index
        hits, cutoff = await self._index.search(row, top=body.top)
        return json_response({"hits": hits, "cutoff": None if image else cutoff})

    async def thumbnail(self, request: Request) -> Response:
        assert self._index is not None
        loop, name = asyncio.get_running_loop(), request.path_params["id"]
        with self._counted(1):
            content = await loop.run_in_executor(self._openers, self._index.thumbnail, name)
        return Response(content, media_type="image/jpeg")

    @property
    def searches(self) -> bool:
        return self._index is not None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count a request while it is answered."""
        if self.active_requests >= MAX_REQUESTS:
            raise RefusedError(_BUSY, f"{self.active_requests:,} requests are being answered already.")
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    def close(self) -> None:
        for pool in (self._model, self._openers):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _context_length(self) -> int:
        return self.encoder.manifest.tokenizer.context_length

    async def _embed(self, items: Sequence[Item]) -> tuple[list[Embeddings], int]:
        """Return the embedding of each item, (D,), in order, and the number of tokens of the texts."""
        texts = [item for item in items if isinstance(item, str)]
        images = [item for item in items if not isinstance(item, str)]
        with self._counted(len(items)):
            of_texts, tokens = await self._embed_texts(texts) if texts else ((), 0)
            of_images = await self._embed_images(images) if images else ()
        rows = {str: iter(of_texts), UploadedImage: iter(of_images)}
        return [next(rows[type(item)]) for item in items], tokens

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
        return preprocess(open_image(image, max_pixels=protocol.MAX_PIXELS), self.encoder.manifest.preprocessing)

    @contextmanager
    def _counted(self, items: int) -> Iterator[None]:
        if self.pending_items and self.pending_items + items > self.max_items:
            raise RefusedError(_BUSY, f"{self.pending_items:,} items wait already; the limit is {self.max_items:,}.")
        self.pending_items += items
        try:
            yield
        finally:
            self.pending_items -= items

    async def _new_classifier(self, labels: Sequence[str] | None) -> ZeroShotClassifier:
        encoder, bank = self.encoder, self.encoder.label_bank or NO_LABELS
        names = tuple(dict.fromkeys(labels or ()))
        if names and encoder.has_text_tower and await asyncio.to_thread(bank.find, names) is None:
            rows = bank.completed(names, await self._embed_labels(bank.untaught(names)))
            encoder, labels = copy(encoder), None
            encoder.label_bank = LabelBank(names, rows)  # from which the classifier takes them as they are
        work = partial(ZeroShotClassifier, encoder, labels, cache=False)
        return await asyncio.get_running_loop().run_in_executor(self._model, work)

    async def _embed_labels(self, labels: Sequence[str]) -> Embeddings:
        """Return the labels' embeddings, as `bundle.encoder.label_embeddings` does, in turn with other requests.

        No more prompts wait than fill a batch, and so many items are counted: thousands of labels keep no other request
        waiting, and get it no 503.
        """
        templates, size = self.description.templates, self.max_batch
        means = list[Embeddings]()
        with self._counted(min(len(labels) * len(templates), size)):
            for part in in_batches(len(labels), size):
                prompts = [fill_template(template, label) for label in labels[part] for template in templates]
                rows = [(await self._embed_texts(prompts[batch]))[0] for batch in in_batches(len(prompts), size)]
                means.append(np.concatenate(rows).reshape(len(labels[part]), len(templates), -1).mean(axis=1))
        return normalise(np.concatenate(means))


def _stacked(encode: Callable[[Any], Embeddings]) -> Callable[[Sequence[Any]], Embeddings]:
    return lambda inputs: encode(np.stack(inputs))


async def _asked(request: Request, kind: type[protocol.Asked]) -> tuple[protocol.Asked, bytes]:
    content_type, query = request.headers.get("content-type", ""), request.query_params.multi_items()
    return protocol.read_request(await request.body(), kind, content_type=content_type, query=query)


def make_app(
    service: Service, *, token: str = "", host: str = LOOPBACK, names: str | Collection[str] = ()
) -> Starlette:
    """Return the ASGI application.

    Args:
        token: the bearer token that every request but /health needs; empty for none.
        host: that the server listens on.
        names: further host names that requests may use; see `serving.guard` for both.
    """
    handlers: dict[str, Handler] = {
        "POST /embeddings": service.embeddings,
        "POST /embedding": service.embeddings,
        "POST /v1/embeddings": service.openai_embeddings,
        "POST /classify": service.classify,
        "GET /v1/models": service.models,
        "GET /v1/models/{name:path}": service.model,
        "GET /models": service.models,
        "GET /props": service.props,
        "GET /health": service.health,
        "GET /metrics": service.prometheus,
        "GET /openapi.json": service.openapi,
    }
    if service.searches:
        handlers |= {"POST /search": service.search, "GET /search": service.search_text}
        handlers["GET /thumbnail/{id}"] = service.thumbnail
    routes = []
    for operation, handler in handlers.items():
        method, path = operation.split()
        computes = method == "POST" or path in ("/search", "/thumbnail/{id}")
        routes.append(Route(path, _answer(path, handler, service, token, computes=computes), methods=[method]))
    # They hold nothing of the bundle, and ask for the token themselves.
    routes += [Route(path, serve_file(file), methods=["GET"]) for path, file in page_files(service.searches).items()]
    guard = Middleware(
        Guard, host=host, names=host_names(names), token_required=bool(token), respond=_error_response, full=_BUSY
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    unrouted: dict[Any, Any] = {HTTPException: _unrouted}
    return Starlette(routes=routes, middleware=[guard], lifespan=lifespan, exception_handlers=unrouted)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """Answer a request that no handler takes."""
    allowed = (error.headers or {}).get("Allow", "")
    expected = f"{request.method} is not answered, but {allowed}" if allowed else "there is nothing; see /docs"
    message = f"At {request.url.path}, {expected}."
    response = _error_response(error.status_code, message)
    response.headers.update(error.headers or {})
    return response


def _answer(path: str, handler: Handler, service: Service, token: str, *, computes: bool) -> Handler:
    """Wrap a handler: check the token, turn expected errors into answers in OpenAI's form, and count."""

    async def checked(request: Request) -> Response:
        if token and path != "/health" and not _authorised(request, token):
            raise RefusedError(401, "The bearer token is missing or wrong.")
        if not computes:
            return await handler(request)
        # Before it counts: requests that are never complete take nobody's turn. The handler gets the body from here.
        await read_body(request)
        with service.turn():
            return await unless_it_leaves(handler, request)

    answer = answered(checked, respond=_error_response, status_of=_status_of)

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        response = await answer(request)
        service.metrics.finish(path, response.status_code, time.perf_counter() - started)
        return response

    return handle


def _status_of(error: ClipRdEdgeError) -> int:
    return 422 if isinstance(error, UnknownFieldError) else 400 if isinstance(error, InputError) else 500


def _authorised(request: Request, token: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())


def _error_response(status: int, message: str, hint: str = "") -> Response:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"code": status, "message": with_hint(message, hint), "type": kind, "param": None}
    headers = {_BUSY: {"Retry-After": str(RETRY_AFTER_S)}, 401: {"WWW-Authenticate": "Bearer"}}
    return json_response({"error": error}, status, headers.get(status))
