"""The handlers and routes of `clip-rd-edge serve`."""

from __future__ import annotations

import asyncio
import base64
import hmac
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clip_rd_edge.contract.bundle import MANIFEST
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.preprocess import Pixels, preprocess
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.embed import open_image_tower
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import INDEX_FILE, Index, nearest, read_graph, read_index, require_same_model
from clip_rd_edge.runtime.index_graph import Graph
from clip_rd_edge.serving import protocol
from clip_rd_edge.serving.batching import Batcher
from clip_rd_edge.serving.metrics import CONTENT_TYPE, Metrics
from clip_rd_edge.serving.protocol import Item
from clip_rd_edge.utils.host import resident_memory_bytes
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.structs import UnknownFieldError, decode_request
from clip_rd_edge.web.app import read_body
from clip_rd_edge.web.guard import FullError, Guard, TooLargeError, host_names, too_large_message
from clip_rd_edge.web.models import MAX_PIXELS, LabelSets, UploadedImage, label_key

RETRY_AFTER_S = 1
OPENERS = 2  # threads that decode images
_FEW_CHARACTERS = 1000  # that are tokenised at once: a change of threads takes longer
_MAX_CLASSIFIERS = 8  # label lists whose embeddings are kept
Handler = Callable[[Request], Awaitable[Response]]


class BusyError(ClipRdEdgeError):
    """The server has as much work as it accepts."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much the server takes on.

    Attributes:
        max_batch: max number of items per call of a tower.
        max_items: max number of items of all requests that are not answered yet; a larger request is accepted only if
            there is no other. What exceeds it is answered with 503.
        max_requests: max number of requests that are answered at a time, once they are complete; the same holds.
    """

    max_batch: int = 16
    max_items: int = 1024
    max_requests: int = 256


class Service:
    """The request handlers.

    Args:
        encoder: the bundle.
        index: folder of an index of that bundle, for /search; None serves no search.
        limits: how much the server takes on.
        version: of this package, which clients are told.

    Raises:
        InputError: there is no index, or another bundle created it.
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
        self._classifiers: OrderedDict[str, ZeroShotClassifier] = OrderedDict()
        self._index_folder = index
        self._index_identity: tuple[int, ...] | None = None
        self._index: tuple[Index, Embeddings, Graph | None] | None = None
        if index is not None:
            self._read_index()
        open_image_tower(encoder)
        if encoder.has_text_tower:
            encoder.encode_texts(["a photo"])  # the first request waits for neither tower
        if encoder.label_bank is not None:  # now: an update may put another bundle into the folder while this runs
            self._classifier(None)

    async def embeddings(self, request: Request) -> Response:
        """POST /embeddings: llama.cpp's form, a list with one matrix of one row per item."""
        items = protocol.llama_items(decode_request(await request.body(), protocol.LlamaRequest))
        rows, _ = await self._embed(items)
        return _json([{"index": number, "embedding": [row.tolist()]} for number, row in enumerate(rows)])

    async def openai_embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: OpenAI's form."""
        body = decode_request(await request.body(), protocol.OpenAiRequest)
        items = protocol.openai_items(body, embedding_size=self.description.embedding_size)
        rows, tokens = await self._embed(items)
        encoded = [_base64(row) if body.encoding_format == "base64" else row.tolist() for row in rows]
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": self.description.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        entry, name = self._model_entry(), request.path_params["name"]
        if name not in (entry["id"], *entry["aliases"]):
            return _error(404, f"There is no model {name!r}; this server has {entry['id']!r}.")
        return _json(entry)

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
        return _json(
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
        return _json({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        text = self.metrics.render(pending=self.pending_items, memory_bytes=resident_memory_bytes())
        return Response(text, media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(protocol.openapi(self.version, search=self.searches))

    async def classify(self, request: Request) -> Response:
        """POST /classify."""
        body = decode_request(await request.body(), protocol.ClassifyRequest)
        if body.labels is not None:
            LabelSets().add(body.labels)  # refuses what is no list of labels
        classifier = await self._run(self._classifier, body.labels)
        (row,), _ = await self._embed([Item(image=protocol.decode_image(body.image))])
        (predictions,) = classifier.classify_embeddings(row[None], top=body.top, none_below=body.none_below)
        return _json({"predictions": [{"label": label, "probability": p} for label, p in predictions]})

    async def search(self, request: Request) -> Response:
        """POST /search."""
        body = decode_request(await request.body(), protocol.SearchRequest)
        if bool(body.query.strip()) == bool(body.image):
            raise InputError("Expected either a query or an image.")
        protocol.require_length(body.query, "The query")
        item = Item(image=protocol.decode_image(body.image)) if body.image else Item(text=body.query)
        (row,), _ = await self._embed([item])
        try:
            hits = await asyncio.to_thread(self._nearest, row, body.top)
        except InputError as error:  # not the client's: the index was removed, or replaced by another bundle's
            raise ClipRdEdgeError(str(error), hint=error.hint) from error
        return _json({"hits": [{"path": str(hit.path), "similarity": hit.similarity} for hit in hits]})

    @property
    def searches(self) -> bool:
        """Whether there is an index to search."""
        return self._index_folder is not None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count a request while it is answered.

        Raises:
            BusyError: as many as the limit allows are being answered already.
        """
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
            pool.shutdown(cancel_futures=True)

    @property
    def _context_length(self) -> int:
        return self.encoder.manifest.tokenizer.context_length

    async def _embed(self, items: Sequence[Item]) -> tuple[list[Embeddings], int]:
        """Return the embedding of each item, (D,), in order, and the number of tokens of the texts.

        Raises:
            BusyError: there are too many items of other requests.
            InputError: an image cannot be opened.
        """
        if self.pending_items and self.pending_items + len(items) > self.limits.max_items:
            raise BusyError(f"{self.pending_items:,} items wait already; the limit is {self.limits.max_items:,}.")
        self.pending_items += len(items)
        try:
            texts = [item.text for item in items if item.text is not None]
            images = [
                UploadedImage(item.image, f"of item {number}")
                for number, item in enumerate(items)
                if item.image is not None
            ]
            embedded_texts, tokens = await self._embed_texts(texts) if texts else ((), 0)
            embedded_images = await self._embed_images(images) if images else ()
        finally:
            self.pending_items -= len(items)
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
        loop = asyncio.get_running_loop()
        opened = [loop.run_in_executor(self._openers, self._open, image) for image in images]
        try:
            pixels = await asyncio.gather(*opened)
        finally:
            for future in opened:  # if one cannot be opened, the others keep no other request waiting
                future.cancel()
        return await self._images.embed(pixels)

    def _open(self, image: UploadedImage) -> Pixels:
        return preprocess(open_image(image, max_pixels=MAX_PIXELS), self.encoder.manifest.preprocessing)

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run what uses the model on the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._model, work, *arguments)

    def _classifier(self, labels: Sequence[str] | None) -> ZeroShotClassifier:
        key = label_key(labels) if labels is not None else ""
        if key not in self._classifiers:
            self._classifiers[key] = ZeroShotClassifier(self.encoder, labels, cache=False)
            while len(self._classifiers) > _MAX_CLASSIFIERS:
                self._classifiers.popitem(last=False)
        self._classifiers.move_to_end(key)
        return self._classifiers[key]

    def _nearest(self, row: Embeddings, top: int) -> Any:
        index, rows, graph = self._read_index()
        return nearest(index, rows, row, top=top, graph=graph)

    def _read_index(self) -> tuple[Index, Embeddings, Graph | None]:
        """Return the index, read again if it was updated."""
        folder = self._index_folder
        assert folder is not None  # /search has no route without an index
        current = file_identity(folder / INDEX_FILE)
        if self._index is None or current != self._index_identity:
            index, rows = read_index(folder)
            if self._index is not None and index.model != self._index[0].model:
                raise ClipRdEdgeError(
                    f"Another bundle has made the index {folder} again since this server started.",
                    hint=f"Restart clip-rd-edge serve with that bundle, {index.bundle}.",
                )
            require_same_model(self.encoder, index, folder)
            self._index, self._index_identity = (index, rows, read_graph(folder, index)), current
        return self._index


def _stacked(encode: Callable[[Any], Embeddings]) -> Callable[[Sequence[Any]], Embeddings]:
    """Return a function that embeds a list of inputs without a batch dimension."""
    return lambda inputs: encode(np.stack(inputs))


def _base64(row: Embeddings) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def make_app(
    service: Service, *, token: str = "", loopback: bool = True, names: str | Collection[str] = ()
) -> Starlette:
    """Return the ASGI application.

    Args:
        token: the bearer token that every request but /health needs; empty for none.
        loopback: whether the server listens only on this machine.
        names: further host names that requests may use; see `web.guard`.

    Raises:
        UsageError: one of them is no host name.
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
    guard = Middleware(Guard, loopback=loopback, names=host_names(names), token_required=bool(token), respond=_error)

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
    return _error(error.status_code, message, headers=dict(error.headers or {}))


def _answer(path: str, handler: Handler, service: Service, token: str) -> Handler:
    """Wrap a handler: check the token, turn expected errors into answers in OpenAI's form, and count."""

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        if token and path != "/health" and not _authorised(request, token):
            response = _error(401, "The bearer token is missing or wrong.", headers={"WWW-Authenticate": "Bearer"})
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
        return _error(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
    except FullError:
        return _error(503, "Too much is being sent at once.", headers={"Retry-After": str(RETRY_AFTER_S)})
    except TooLargeError:
        return _error(413, too_large_message())
    except (asyncio.TimeoutError, TimeoutError):
        return _error(408, "The request did not arrive in time.")
    except ClientDisconnect:
        return _error(400, "The connection was closed before the request was complete.")
    except UnknownFieldError as error:
        return _error(422, f"{error} {error.hint}")
    except InputError as error:
        return _error(400, " ".join(filter(None, (str(error), error.hint))))
    except ClipRdEdgeError as error:
        return _error(500, " ".join(filter(None, (str(error), error.hint))))


async def _unless_it_leaves(handler: Handler, request: Request) -> Response:
    """Return the handler's response; cancel it if the client closes the connection, so that nothing is computed for it.

    Raises:
        ClientDisconnect: the client has closed the connection.
    """
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


def _error(status: int, message: str, *, headers: dict[str, str] | None = None) -> Response:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        503: "unavailable_error",
    }
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return _json({"error": {"code": status, "message": message, "type": kind, "param": None}}, status, headers)
