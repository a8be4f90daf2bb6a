"""The demo's server: serves the page and its files, and classifies images."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import anyio.to_thread
import msgspec
import uvicorn
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError
from clip_rd_edge.utils.process import end_calls, handled_by, leave_lost_terminal, stop_signals
from clip_rd_edge.utils.structs import decode_request
from clip_rd_edge.web.guard import (
    LOOPBACK,
    FullError,
    Guard,
    TooLargeError,
    error_response,
    is_loopback,
    too_large_message,
)
from clip_rd_edge.web.limits import MAX_HEAD_BYTES, LimitedProtocol, LogLimit
from clip_rd_edge.web.models import BundleRemovedError, LabelSets, ServedBundle, distinct_names

PAGE = Path(__file__).with_name("page")
# Not as `mimetypes` has them, from the registry on Windows: a browser runs no script that is served as text/plain.
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_PARALLEL = 2  # images classified at the same time
MAX_QUEUED = 16  # requests that may wait; a single page never sends more than one at a time
BODY_TIMEOUT_S = 20.0  # for a request body to arrive
_BUSY = "Too many images at once; try again in a moment."
Handler = Callable[[Request], Awaitable[Response]]


class Demo:
    """The request handlers of the demo.

    Args:
        bundles: folders of the bundles, in the order that the page shows them.
        labels: labels that the page starts with, as for `LabelSets.add`; None leaves the choice to the page.
        threads, force: as for `runtime.load.load`.
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
        self.label_sets = LabelSets()
        if self.start_labels:  # refused now, rather than with each image
            self.label_sets.add(self.start_labels)
        names = distinct_names(bundles)
        self.served = [
            ServedBundle(folder, shown=name, threads=threads, force=force)
            for folder, name in zip(bundles, names, strict=True)
        ]
        self.pending = 0  # classify requests in progress or queued
        self._limiter: CapacityLimiter | None = None
        self._lister: CapacityLimiter | None = None

    async def bundles(self, request: Request) -> Response:
        """Return the bundles and the labels to start with."""
        # In a thread, as one that was exported anew is opened first; one at a time, as files need threads, too.
        self._lister = self._lister or CapacityLimiter(1)
        infos = await anyio.to_thread.run_sync(lambda: [bundle.info() for bundle in self.served], limiter=self._lister)
        return _json({"bundles": infos, "labels": self.start_labels})

    async def labels(self, request: Request) -> Response:
        """Store a list of labels; return the key by which classify requests refer to it."""
        try:
            labels = decode_request(await read_body(request), list)
            return _json({"key": self.label_sets.add(labels)})
        except InputError as error:
            return error_response(422, str(error), hint=error.hint)

    async def classify(self, request: Request) -> Response:
        """Classify the image in the body with ?bundle=NUMBER among ?labels=KEY (without a key: the bundle's own).

        With &name=NAME, as the page calls the bundle, another one that has the number since a restart is not asked.
        """
        bundle = self._bundle(request.query_params.get("bundle", "0"), request.query_params.get("name"))
        key = request.query_params.get("labels", "")
        labels = self.label_sets.get(key) if key else None
        if key and labels is None:
            return error_response(409, "These labels are no longer known; send them again.")
        content = await read_body(request)  # before it counts: an unfinished request takes nobody's turn
        if self.pending >= MAX_PARALLEL + MAX_QUEUED:
            return error_response(429, _BUSY)
        self.pending += 1
        try:
            self._limiter = self._limiter or CapacityLimiter(MAX_PARALLEL)
            result = await anyio.to_thread.run_sync(bundle.classify, content, labels, limiter=self._limiter)
        finally:
            self.pending -= 1
        return _json(result)

    def _bundle(self, number: str, name: str | None) -> ServedBundle:
        bundle = {str(index): bundle for index, bundle in enumerate(self.served)}.get(number)
        if name is not None and (bundle is None or bundle.shown != name):
            raise BundleRemovedError(f"Bundle {number[:20]!r} is not {name[:300]!r} any more.", hint="reload the page")
        if bundle is None:
            raise InputError(f"Unknown bundle {number[:20]!r}; expected a number from 0 to {len(self.served) - 1}.")
        return bundle


def make_app(demo: Demo, *, host: str = LOOPBACK) -> Starlette:
    """Return the ASGI application of a `Demo`, protected by `Guard`, for a server that listens on `host`."""
    return Starlette(
        routes=[
            Route("/", serve_file(PAGE / "index.html")),
            Route("/api/bundles", demo.bundles),
            Route("/api/labels", _report_errors(demo.labels), methods=["POST"]),
            Route("/api/classify", _report_errors(demo.classify), methods=["POST"]),
            *(Route(f"/{path.name}", serve_file(path)) for path in PAGE.iterdir()),
        ],
        middleware=[Middleware(Guard, host=host)],
    )


def serve_file(path: Path) -> Callable[[Request], Response]:
    """Return a handler that answers with a file of a page, with the same type on every machine."""
    return lambda request: FileResponse(path, media_type=_MEDIA_TYPES[path.suffix])


def _report_errors(handler: Handler) -> Handler:
    """Wrap a handler so that expected errors become JSON responses with their messages."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except TooLargeError:
            return error_response(413, too_large_message())
        except FullError:
            return error_response(429, _BUSY)
        except (asyncio.TimeoutError, TimeoutError):
            return error_response(408, f"The request did not arrive within {BODY_TIMEOUT_S:.0f} s.")
        except ClientDisconnect:
            return error_response(400, "The connection was closed before the request was complete.")
        except BundleRemovedError as error:
            return error_response(410, str(error), hint=error.hint)
        except ConfigError as error:  # the bundle is at fault, not the request
            return _failure(error)
        except UsageError as error:
            return error_response(400, str(error), hint=error.hint)
        except ClipRdEdgeError as error:
            return _failure(error)

    return handle


def _failure(error: ClipRdEdgeError) -> Response:
    """Answer with status 500. The page shows none of the server's messages, so the log has it, too."""
    logging.getLogger("uvicorn.error").error("%s", error)
    return error_response(500, str(error), hint=error.hint)


async def read_body(request: Request) -> bytes:
    """Return the body of a request; raise TimeoutError if it takes longer than BODY_TIMEOUT_S to arrive."""
    return await asyncio.wait_for(request.body(), BODY_TIMEOUT_S)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def serve(demo: Demo, *, host: str = LOOPBACK, port: int = 8765, ready: Callable[[str], None]) -> None:
    """Serve the demo until it is interrupted.

    Args:
        demo: the request handlers.
        host: address to listen on.
        port: port to listen on; 0 uses any free port.
        ready: called with the page's URL once the page can be opened; for a server on all addresses (0.0.0.0 or ::),
            with the one on this machine.
    """
    run_server(make_app(demo, host=host), host=host, port=port, ready=ready, stop_within_s=2)


def run_server(app: Starlette, *, host: str, port: int, ready: Callable[[str], None], stop_within_s: int) -> None:
    """Run an application until one of the `stop_signals`; requests in progress have `stop_within_s` seconds to finish.

    Args:
        host, port, ready: as for `serve`.
    """
    with _listen(host, port) as listener:
        url = url_of({"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host), listener.getsockname()[1])
        config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing asks who the client is
            timeout_keep_alive=30,
            timeout_graceful_shutdown=stop_within_s,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        log_limit, loggers = LogLimit(), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
        for logger in loggers:
            logger.addFilter(log_limit)
        try:
            ready(url)
            _run(_Server(config), listener)
        finally:
            for logger in loggers:
                logger.removeFilter(log_limit)


class _Server(uvicorn.Server):
    """A server that ends the models which still run when the time of the requests in progress is over."""

    _over = threading.Event()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving; until `run` has returned, which waits for all threads, no model computes anything."""
        await super().shutdown(sockets)
        self._over = end_calls(128 + signal.SIGTERM)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        try:
            super().run(sockets)
        finally:
            self._over.set()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run a server until it ends; in a thread of its own within an event loop, as in the cell of a notebook."""
    if not _is_in_event_loop():
        with _stopped_by_lost_terminal(server):
            server.run(sockets=[listener])
        return
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(server.run, sockets=[listener]).result()
        finally:
            server.should_exit = True  # after Ctrl-C, which reaches this thread alone


@contextmanager
def _stopped_by_lost_terminal(server: uvicorn.Server) -> Iterator[None]:
    """Within the block, SIGHUP stops the server, which knows the other `stop_signals`, and then acts as outside.

    An event loop may swallow what another handler raises.
    """
    received = list[int]()

    def handle(number: int, _: FrameType | None) -> None:
        leave_lost_terminal()
        received.append(number)
        server.should_exit = True

    with handled_by(handle, set(stop_signals()) - {signal.SIGINT, signal.SIGTERM}):
        yield
    if received:
        signal.raise_signal(received[0])


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def url_of(host: str, port: int) -> str:
    """Return the URL of a server."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def network_urls(host: str, port: int) -> list[str]:
    """Return the URLs under which other machines reach a server that listens on `host`, most likely first."""
    if is_loopback(host):
        return []
    if host not in ("", "0.0.0.0", "::"):
        return [url_of(host, port)]
    addresses = [_source_address(socket.AF_INET, "192.0.2.1")]
    if host == "::":
        addresses.append(_source_address(socket.AF_INET6, "2001:db8::1"))
    try:
        resolved = socket.getaddrinfo(socket.gethostname(), port, type=socket.SOCK_STREAM)
    except OSError:
        resolved = []
    addresses += [str(entry[4][0]) for entry in resolved if entry[0] == socket.AF_INET or host == "::"]
    usable = (address for address in addresses if address and not is_loopback(address) and "%" not in address)
    return [url_of(address, port) for address in dict.fromkeys(usable)]


def _source_address(family: socket.AddressFamily, destination: str) -> str:
    """Return this machine's address on the way to `destination`, or an empty string; nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _listen(host: str, port: int) -> socket.socket:
    # Bind before starting uvicorn: the port is known, and a failure is an error message rather than a log line.
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With an explicit protocol asyncio sets TCP_NODELAY; without it, every response is delayed by 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # On Windows, SO_REUSEADDR lets a second server share a used port.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((host, port))
        listener.listen(256)  # connections before uvicorn is ready wait in the backlog and are not refused
    except OSError as error:
        if listener is not None:
            listener.close()
        wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        hint = "choose another port with {port}, or 0 for any free port"
        if wrong_host:
            hint = "name an address of this machine: {host} 127.0.0.1, or {host} 0.0.0.0 for the network"
        raise UsageError(f"Cannot listen on {host}, port {port}: {error.strerror or error}.", hint=hint) from error
    return listener
