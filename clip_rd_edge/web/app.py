"""The routes: the page, what it needs, and the classifying."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio.to_thread
import msgspec
import uvicorn
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError
from clip_rd_edge.web.guard import Guard, TooLargeError, refuse, too_large
from clip_rd_edge.web.models import GoneError, LabelSets, Model

PAGE = Path(__file__).with_name("page")
AT_ONCE = 2  # pictures that are worked on at the same time
WAITING = 16  # that may wait for it; the page of one person never has more than one
PATIENCE_S = 20.0  # for a body to arrive
Handler = Callable[[Request], Awaitable[Response]]


class Demo:
    """The page's server side.

    Args:
        bundles: folders, in the order in which the page offers them.
        labels: that the page starts with; None leaves it to the page.
        threads: of a model; None takes every core.

    Raises:
        InputError, ConfigError: a folder is no bundle, incomplete, or of a newer format.
    """

    def __init__(self, bundles: Sequence[Path], *, labels: Sequence[str] | None = None, threads: int | None = None):
        self.models = [Model(folder, threads=threads) for folder in bundles]
        self.first_labels = list(labels or [])
        self.label_sets = LabelSets()
        self.busy = 0
        self._limiter: CapacityLimiter | None = None

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(PAGE / "index.html")

    async def bundles(self, request: Request) -> Response:
        """The bundles, and the labels to start with."""
        facts = [model.facts() for model in self.models]
        return _json({"bundles": facts, "labels": self.first_labels})

    async def labels(self, request: Request) -> Response:
        """Take a list of labels; answers with the key that pictures are sent with."""
        try:
            sent = msgspec.json.decode(await _body(request), type=list)
        except msgspec.MsgspecError as error:
            raise InputError(f"The labels are no JSON list: {error}.") from error
        return _json({"key": self.label_sets.add(sent)})

    async def classify(self, request: Request) -> Response:
        """Classify the picture that is the body, by ?bundle=NUMBER among ?labels=KEY (none: the bundle's own)."""
        model = self._model(request.query_params.get("bundle", "0"))
        key = request.query_params.get("labels", "")
        labels = self.label_sets.get(key) if key else None
        if key and labels is None:
            return refuse(409, "These labels are no longer known; send them again.")
        if self.busy >= AT_ONCE + WAITING:
            return refuse(429, "Too many pictures at once; send it again in a moment.")
        self.busy += 1
        try:
            content = await _body(request)
            self._limiter = self._limiter or CapacityLimiter(AT_ONCE)
            answer = await anyio.to_thread.run_sync(model.answer, content, labels, limiter=self._limiter)
        finally:
            self.busy -= 1
        return _json(answer)

    def _model(self, number: str) -> Model:
        if not number.isdigit() or int(number) >= len(self.models):
            raise InputError(f"There is no bundle {number!r}; there are {len(self.models)}, counted from 0.")
        return self.models[int(number)]


def make_app(demo: Demo, *, loopback: bool = True) -> Starlette:
    """The ASGI application of a `Demo`, guarded."""
    return Starlette(
        routes=[
            Route("/", demo.page),
            Route("/api/bundles", demo.bundles),
            Route("/api/labels", _sentences(demo.labels), methods=["POST"]),
            Route("/api/classify", _sentences(demo.classify), methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(Guard, loopback=loopback)],
    )


def _sentences(handler: Handler) -> Handler:
    """Turns what is raised on purpose into a response with its sentence."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except TooLargeError:
            return refuse(413, too_large())
        except (asyncio.TimeoutError, TimeoutError):
            return refuse(408, f"The request did not arrive within {PATIENCE_S:.0f} s.")
        except ClientDisconnect:
            return refuse(400, "The connection was closed before all was sent.")
        except GoneError as error:
            return refuse(410, str(error), hint=error.hint)
        except ConfigError as error:  # the bundle's fault and not the request's
            return refuse(500, str(error), hint=error.hint)
        except UsageError as error:
            return refuse(400, str(error), hint=error.hint)
        except ClipRdEdgeError as error:
            return refuse(500, str(error), hint=error.hint)

    return handle


async def _body(request: Request) -> bytes:
    return await asyncio.wait_for(request.body(), PATIENCE_S)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


LOOPBACK = "127.0.0.1"


def serve(demo: Demo, *, host: str = LOOPBACK, port: int = 8765, ready: Callable[[str], None]) -> None:
    """Serve until it is interrupted.

    Args:
        host: address to listen on.
        port: 0 takes one that is free.
        ready: told the page's address once it can be opened.

    Raises:
        UsageError: the address cannot be listened on.
    """
    loopback = is_loopback(host)
    with _listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}/"
        config = uvicorn.Config(
            make_app(demo, loopback=loopback),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64_000,
        )
        ready(url)
        uvicorn.Server(config).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    # Before uvicorn, so that the port is known, and a refusal is a sentence and not a log line.
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named, asyncio turns Nagle's delay off; without, every answer comes 40 ms late.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)  # who opens the page as soon as it is told waits, and is not refused
    except OSError as error:
        if listening is not None:
            listening.close()
        raise UsageError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}.",
            hint="choose another with --port, or 0 for any that is free",
        ) from error
    return listening
