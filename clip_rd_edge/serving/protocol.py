"""What clients send and get: requests in the forms of llama.cpp and OpenAI, and our own for classify and search.

Sources: llama.cpp's server (`tools/server/README.md`, /embeddings and /props) and OpenAI's API reference (embeddings).
Fields that are not listed here are ignored in the former, as both servers do, and refused in ours.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.search_graph import MAX_TOP
from clip_rd_edge.utils.structs import PositiveInt, decode_request

if TYPE_CHECKING:
    from clip_rd_edge.runtime.classifier import Deciding

MEDIA_MARKER = "<__media__>"  # stands for the image in a llama.cpp prompt; clients read it from /props
MAX_ITEMS = 2048  # per request, as OpenAI's
MAX_TEXT_LENGTH = 100_000  # characters: tokenising millions takes seconds, and models read a few hundred at most
MAX_LABELS = 2_000
MAX_LABEL_LENGTH = 300  # characters
MAX_TAUGHT = 2_000_000  # bytes of JSON with what teaches a page's labels: 1,400 images with 512 entries
MAX_PIXELS = 52_000_000  # of an uploaded image: those of sensors with 50 megapixels have up to 50.3 million
_DATA_URL = re.compile(r"data:(image/|[\w/+.-]*;base64,)", re.IGNORECASE)
_FORM = "multipart/form-data"
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_FIELD_NAME = re.compile(rb'[;\s]name="([^"]*)"', re.IGNORECASE)
_MAX_FIELDS = MAX_LABELS + 10


@dataclass(frozen=True)
class UploadedImage:
    """An image from a request, in the form that `open_image` takes; `place` follows "the image" in messages."""

    content: bytes
    place: str = "that was sent"

    def read_bytes(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.place


Item = str | UploadedImage  # a text or an image to embed


def item_image(content: bytes, number: int = 0) -> UploadedImage:
    """Return the image of an item, which messages name by its number."""
    return UploadedImage(content, f"of item {number}")


class PageLabels(msgspec.Struct, frozen=True):
    """The labels of the demo's page, and for some of them the embeddings of images, in base64 of float16."""

    labels: list[Any]
    taught: dict[str, list[str]] = {}

    @property
    def key(self) -> str:
        return label_key([*self.labels, msgspec.json.encode(self.taught).decode()] if self.taught else self.labels)

    def require_few(self) -> None:
        """Raise InputError as `require_few_labels`, or if there are too many images."""
        require_few_labels(self.labels)
        if len(msgspec.json.encode(self.taught)) > MAX_TAUGHT:
            raise InputError("The labels have too many images.", hint="teach a bundle from folders: clip-rd-edge teach")

    def rows(self, size: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the embeddings by label, (N, size)."""
        found = {}
        for name, texts in self.taught.items():
            content = b"".join(decode_image(text) for text in texts)
            rows = np.frombuffer(content[: len(content) // (2 * size) * 2 * size], "<f2").reshape(-1, size)
            if not len(rows) or len(rows) != len(texts) or not (np.isfinite(rows).all(axis=1) & rows.any(axis=1)).all():
                raise InputError(f"The embeddings that teach {name[:40]!r} are of another model.")
            found[name] = normalise(rows.astype(np.float32))
        return found


def require_few_labels(labels: Sequence[Any]) -> None:
    """Raise InputError if a client's labels are not texts, too long or too many."""
    are_short = all(isinstance(label, str) and label.strip() and len(label) <= MAX_LABEL_LENGTH for label in labels)
    if not (1 <= len(labels) <= MAX_LABELS and are_short):
        raise InputError(
            f"There are {len(labels):,} labels; expected 1 to {MAX_LABELS:,}, of 1 to {MAX_LABEL_LENGTH} characters.",
            hint="leave some out; the number of those that a bundle is exported with is not limited",
        )


def label_key(labels: Sequence[str]) -> str:
    """Return a key for a list of labels, derived from its content."""
    return hashlib.sha256(msgspec.json.encode(list(labels))).hexdigest()[:32]


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
        labels: the labels; without any, the bundle's own.
        top: max number of labels to return.
        none: return no label for an image that none fits.
        refuse_known: the same, with this share of images of known things that may be refused.
        multi: give each label a probability by itself.
        raw: leave the bundle's calibration out.
    """

    image: str
    labels: list[str] | None = None
    top: PositiveInt = 5
    none: bool = False
    refuse_known: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    multi: bool = False
    raw: bool = False

    @property
    def deciding(self) -> Deciding:
        """The request's settings of how answers are decided."""
        return {"none": self.none, "refuse_known": self.refuse_known, "multi": self.multi, "raw": self.raw}


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /search.

    Attributes:
        query, image: a text, or an image in base64.
        top: max number of images to return.
    """

    query: str = ""
    image: str = ""
    top: Annotated[PositiveInt, msgspec.Meta(le=MAX_TOP)] = 10


Asked = TypeVar("Asked", ClassifyRequest, SearchRequest)


def read_request(
    body: bytes, kind: type[Asked], *, content_type: str, query: Iterable[tuple[str, str]]
) -> tuple[Asked, bytes]:
    """Return a request to classify or search, and the image in it, which is empty if there is none.

    It is JSON; or a form, as of `curl -F image=@photo.jpg`; or the image file alone. With the latter two, the other
    fields may stand in the address, such as `?labels=a+cat&labels=a+dog`.
    """
    if not content_type.lower().startswith(_FORM):
        if content_type.lower().startswith("application/json") or body.lstrip()[:1] in (b"", b"{"):
            request = decode_request(body, kind)
            return request, decode_image(request.image) if request.image else b""
        return request_of(query, kind), body
    image, fields = b"", list(query)
    for name, content in _form_fields(body, content_type):
        if name == "image":
            image = content
        else:
            fields.append((name, content.decode(errors="replace")))
    return request_of(fields, kind), image


def request_of(fields: Iterable[tuple[str, str]], kind: type[Asked]) -> Asked:
    """Return a request from the fields of a form or an address; its image comes by itself."""
    values: dict[str, Any] = {"image": ""}
    for name, value in fields:
        if name == "labels":
            values.setdefault(name, []).append(value)
        elif name != "image":
            values[name] = value
    return decode_request(msgspec.json.encode(values), kind, strict=False)


def _form_fields(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Return the fields of a form by name, as RFC 7578 has them."""
    match = _BOUNDARY.search(content_type)
    separator = f"\r\n--{match[1] or match[2]}".encode() if match else b"\r\n--"
    _, *parts = (b"\r\n" + body).split(separator, _MAX_FIELDS + 1)
    split = [part.partition(b"\r\n\r\n") for part in parts[:-1]]
    names = [name for head, blank, _ in split if blank and (name := _FIELD_NAME.search(head))]
    if not match or not names or len(names) < len(split) or not parts[-1].startswith(b"--"):
        raise InputError(f"The form is incomplete, has a field without a name, or more than {_MAX_FIELDS:,} fields.")
    return [(name[1].decode(errors="replace"), part[2]) for name, part in zip(names, split, strict=True)]


def llama_items(request: LlamaRequest) -> list[Item]:
    """Return the items of a llama.cpp request."""
    content = request.content if request.content is not None else request.input
    elements = content if isinstance(content, list) else [] if content is None else [content]
    return _limited([_llama_item(element, number) for number, element in enumerate(elements)])


def _llama_item(element: str | LlamaItem, number: int) -> Item:
    text = element if isinstance(element, str) else element.prompt_string
    images = [] if isinstance(element, str) else element.multimodal_data
    if not images and MEDIA_MARKER not in text:
        return text
    if len(images) != 1 or text.replace(MEDIA_MARKER, "").strip():
        raise InputError(
            f"Item {number} has {len(images)} images and the prompt {text[:80]!r}; expected one image or one text.",
            hint="send an item for each",
        )
    return item_image(decode_image(images[0], number), number)


def openai_items(request: OpenAiRequest, *, embedding_size: int) -> list[Item]:
    """Return the items of an OpenAI request."""
    if request.dimensions not in (None, embedding_size):
        raise InputError(f"dimensions is {request.dimensions}; this model has {embedding_size}.")
    texts = [request.input] if isinstance(request.input, str) else request.input
    items = enumerate(texts)
    return _limited([item_image(decode_image(t, i), i) if _DATA_URL.match(t) else t for i, t in items])


def _limited(items: list[Item]) -> list[Item]:
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InputError(f"{len(items):,} texts and images were sent; expected 1 to {MAX_ITEMS:,} at a time.")
    for number, item in enumerate(items):
        if isinstance(item, str):
            require_length(item, f"Item {number}")
    return items


def require_length(text: str, name: str) -> None:
    """Raise InputError if a text is empty, or longer than MAX_TEXT_LENGTH."""
    if not text.strip() or len(text) > MAX_TEXT_LENGTH:
        raise InputError(f"{name} is empty, or has more than {MAX_TEXT_LENGTH:,} characters: {len(text):,}.")


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
        "/classify": (ClassifyRequest, "Return the most likely labels of an image."),
        "/search": (SearchRequest, "Return the images of the index nearest to a text or an image."),
        "/embeddings": (LlamaRequest, "Embed texts and images, in llama.cpp's form."),
        "/v1/embeddings": (OpenAiRequest, "Embed texts, or images as data URLs, in OpenAI's form."),
    }
    gets = {
        "/search": "Return the images of the index nearest to a text.",
        "/thumbnail/{id}": "A small JPEG of an image that was found, at the address in its hit.",
        "/v1/models": "The model, in OpenAI's form.",
        "/v1/models/{name}": "The model of that name, in OpenAI's form.",
        "/props": "The model, in llama.cpp's form.",
        "/health": "Whether the server answers; needs no token.",
        "/metrics": "Counters for Prometheus.",
    }
    if not search:
        del bodies["/search"], gets["/search"], gets["/thumbnail/{id}"]
    kinds, place = [kind for kind, _ in bodies.values()], "#/components/schemas/{name}"
    schemas, components = msgspec.json.schema_components(kinds, ref_template=place)
    paths: dict[str, Any] = {}
    for (path, (_, summary)), schema in zip(bodies.items(), schemas, strict=True):
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        statuses = [200, 400, 503]
        if not path.endswith("/embeddings"):  # what `read_request` takes
            image = {"type": "string", "contentMediaType": "application/octet-stream"}
            form = {"allOf": [schema, {"properties": {"image": image}}]}
            content |= {_FORM: {"schema": form}, "image/*": {"schema": image}}
            statuses.append(422)
        body = {"requestBody": {"required": True, "content": content}}
        paths[path] = {"post": _operation(f"POST {path}", summary, body, statuses)}
    for path, summary in gets.items():
        fields = [("query", "q", True, "string"), ("query", "top", False, "integer")] if path == "/search" else []
        fields += [("path", name, True, "string") for name in re.findall(r"{(\w+)}", path)]
        given = [
            {"name": n, "in": place, "required": must, "schema": {"type": kind}} for place, n, must, kind in fields
        ]
        statuses = [200, 400, 503] if path == "/search" else [200, 404] if given else [200]
        get = _operation(f"GET {path}", summary, {"parameters": given} if given else {}, statuses)
        paths.setdefault(path, {})["get"] = get
    return {
        "openapi": "3.1.0",
        "info": {"title": "clip-rd-edge", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}, {}],
    }


_STATUSES = {
    200: "the answer",
    400: "the request is invalid",
    404: "there is none",
    422: "a field is unknown",
    503: "too many requests: try again after Retry-After seconds",
}
_SAMPLES = {  # as documentation pages show them; URL stands for the server's address
    "POST /classify": "curl -F image=@photo.jpg -F labels='a cat' -F labels='a dog' URL/classify",
    "POST /search": "curl -F image=@photo.jpg URL/search",
    "GET /search": "curl 'URL/search?q=a+red+car&top=5'",
    "POST /embeddings": """curl -d '{"content": "a red car"}' URL/embeddings""",
    "POST /v1/embeddings": """curl -d '{"input": ["a red car"]}' URL/v1/embeddings""",
}


def _operation(name: str, summary: str, takes: dict[str, Any], statuses: Iterable[int]) -> dict[str, Any]:
    responses = {str(status): {"description": _STATUSES[status]} for status in statuses}
    sample = {"x-codeSamples": [{"lang": "Shell", "source": _SAMPLES[name]}]} if name in _SAMPLES else {}
    return {"summary": summary, **takes, "responses": responses, **sample}
