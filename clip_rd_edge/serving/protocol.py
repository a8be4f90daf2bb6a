"""What clients send and get: requests in the forms of llama.cpp and OpenAI, and our own for classify and search.

Sources: llama.cpp's server (`tools/server/README.md`, /embeddings and /props) and OpenAI's API reference (embeddings).
Fields that are not listed here are ignored in the former, as both servers do, and refused in ours.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from threading import Lock
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.search_graph import MAX_TOP
from clip_rd_edge.utils.structs import PositiveInt, Share

MEDIA_MARKER = "<__media__>"  # stands for the image in a llama.cpp prompt; clients read it from /props
_DATA_URL = "data:image/"  # in any case
MAX_ITEMS = 2048  # per request, as OpenAI's
MAX_TEXT_LENGTH = 100_000  # characters: tokenising millions takes seconds, and models read a few hundred at most
_DATA = re.compile(r"data:[\w/+.-]*;base64,", re.IGNORECASE)


class Item(msgspec.Struct, frozen=True):
    """A text or the bytes of an image file to embed; one of the two is None."""

    text: str | None = None
    image: bytes | None = None


class LlamaItem(msgspec.Struct, frozen=True, kw_only=True):
    """An element of llama.cpp's `content`: a text, or the marker of an image and the image in base64."""

    prompt_string: str = ""
    multimodal_data: list[str] = []


class LlamaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /embeddings; `content` and `input` are two names of the same."""

    content: str | LlamaItem | list[str | LlamaItem] | None = None
    input: str | LlamaItem | list[str | LlamaItem] | None = None


class OpenAiRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/embeddings; a data URL of an image is embedded as that image."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class ClassifyRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /classify.

    Attributes:
        image: the image file in base64, or a data URL.
        labels: the labels; None uses the bundle's own.
        top: max number of labels to return.
        none_below: omit labels with a lower probability.
    """

    image: str
    labels: list[str] | None = None
    top: PositiveInt = 5
    none_below: Share = 0.0


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /search.

    Attributes:
        query, image: a text, or an image in base64.
        top: max number of images to return. All of a large index would take the server's time and memory.
    """

    query: str = ""
    image: str = ""
    top: Annotated[PositiveInt, msgspec.Meta(le=MAX_TOP)] = 10


def llama_items(request: LlamaRequest) -> list[Item]:
    """Return the items of a llama.cpp request."""
    content = request.content if request.content is not None else request.input
    elements = content if isinstance(content, list) else [] if content is None else [content]
    return _limited([_llama_item(element, number) for number, element in enumerate(elements)])


def _llama_item(element: str | LlamaItem, number: int) -> Item:
    text = element if isinstance(element, str) else element.prompt_string
    if isinstance(element, str) or not element.multimodal_data:
        if MEDIA_MARKER in text:
            raise InputError(f"Item {number} has {MEDIA_MARKER}, the place of an image, but no image.")
        return Item(text=text)
    if len(element.multimodal_data) > 1 or element.prompt_string.replace(MEDIA_MARKER, "").strip():
        raise InputError(
            f"Item {number} has {len(element.multimodal_data)} images and the prompt {element.prompt_string[:80]!r}; "
            "a CLIP model embeds one image or one text.",
            hint="send an item for each",
        )
    return Item(image=decode_image(element.multimodal_data[0], number))


def openai_items(request: OpenAiRequest, *, embedding_size: int) -> list[Item]:
    """Return the items of an OpenAI request."""
    if request.dimensions not in (None, embedding_size):
        raise InputError(f"dimensions is {request.dimensions}; this model has {embedding_size}.")
    texts = [request.input] if isinstance(request.input, str) else request.input
    return _limited([_openai_item(text, number) for number, text in enumerate(texts)])


def _openai_item(text: str, number: int) -> Item:
    if text[: len(_DATA_URL)].lower() == _DATA_URL:
        return Item(image=decode_image(text, number))
    if head := _DATA.match(text):
        raise InputError(f"Item {number} begins with {head[0]!r}; expected a text, or an image: {_DATA_URL}…;base64,…")
    return Item(text=text)


def _limited(items: list[Item]) -> list[Item]:
    if not items:
        raise InputError("There is nothing to embed: expected at least one text or image.")
    if len(items) > MAX_ITEMS:
        raise InputError(f"{len(items):,} items were sent; the limit is {MAX_ITEMS:,}.", hint="send several requests")
    for number, item in enumerate(items):
        if item.image is None and not (item.text or "").strip():
            raise InputError(f"Item {number} is empty.")
        require_length(item.text or "", f"Item {number}")
    return items


def require_length(text: str, name: str) -> None:
    """Raise InputError if a text is longer than MAX_TEXT_LENGTH."""
    if len(text) > MAX_TEXT_LENGTH:
        raise InputError(f"{name} has {len(text):,} characters; the limit is {MAX_TEXT_LENGTH:,}.")


def decode_image(text: str, number: int = 0) -> bytes:
    """Decode an image file from base64, with or without a data URL's head; raise InputError if it is not base64.

    Lines may be broken, as the command `base64` breaks them.
    """
    encoded = text.partition(",")[2] if text[:5].lower() == "data:" else text
    if "\n" in encoded:
        encoded = "".join(encoded.split())
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The image of item {number} is not base64: {error}.") from error


def openapi(version: str, *, search: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the server; without an index there is no /search."""
    bodies: dict[str, tuple[type[msgspec.Struct], str]] = {
        "/embeddings": (LlamaRequest, "Embed texts and images, in llama.cpp's form."),
        "/v1/embeddings": (OpenAiRequest, "Embed texts, or images as data URLs, in OpenAI's form."),
        "/classify": (ClassifyRequest, "Return the most likely labels of an image."),
        "/search": (SearchRequest, "Return the images of the index nearest to a text or an image."),
    }
    if not search:
        del bodies["/search"]
    gets = {
        "/v1/models": "The model, in OpenAI's form.",
        "/v1/models/{name}": "The model of that name, in OpenAI's form.",
        "/props": "The model, in llama.cpp's form.",
        "/health": "Whether the server answers; needs no token.",
        "/metrics": "Counters for Prometheus.",
    }
    schemas, components = msgspec.json.schema_components(
        [kind for kind, _ in bodies.values()], ref_template="#/components/schemas/{name}"
    )
    answers = {
        "200": {"description": "the answer"},
        "400": {"description": "the request is invalid"},
        "503": {"description": "too many requests: try again after Retry-After seconds"},
    }
    answer = {"200": answers["200"]}
    paths: dict[str, Any] = {path: {"get": {"summary": text, "responses": answer}} for path, text in gets.items()}
    paths["/v1/models/{name}"]["get"] |= {
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        "responses": {**answer, "404": {"description": "there is no such model"}},
    }
    for (path, (_, text)), schema in zip(bodies.items(), schemas, strict=True):
        sent = {"required": True, "content": {"application/json": {"schema": schema}}}
        refused = {} if path.endswith("/embeddings") else {"422": {"description": "a field is unknown"}}
        paths[path] = {"post": {"summary": text, "requestBody": sent, "responses": {**answers, **refused}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "clip-rd-edge", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}, {}],
    }


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
        batch = self._next_batch()
        futures = [future for _, future in batch]
        if batch:
            self._on_batch(len(batch))
            try:
                rows = self._encode([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 — whatever it is, it is the answer of these requests alone
                loop.call_soon_threadsafe(_fail, futures, error)
            else:
                loop.call_soon_threadsafe(_deliver, futures, rows)
        with self._lock:
            self._runs = continues = bool(self._waiting)
        if continues:
            with suppress(RuntimeError):  # the server has stopped, and nobody waits any more
                self._executor.submit(self._run, loop)

    def _next_batch(self) -> list[_Waiting]:
        """Take the items that have waited longest, but for those that nobody waits for any more."""
        batch: list[_Waiting] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch:
                item, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((item, future))
        return batch


def _deliver(futures: Sequence[asyncio.Future[Embeddings]], rows: Embeddings) -> None:
    for future, row in zip(futures, rows, strict=True):
        if not future.done():
            future.set_result(row)


def _fail(futures: Sequence[asyncio.Future[Embeddings]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
