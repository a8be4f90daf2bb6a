"""The server of `serve` and `demo`: what it answers to errors, and what it spends on its clients."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.serving.guard import LOOPBACK, RefusedError, Respond, is_loopback
from clip_rd_edge.utils.process import end_calls, handled_by, stop_signals

BODY_TIMEOUT_S = 20.0  # for a request body to arrive
REQUEST_TIMEOUT_S = 10.0  # for the head of the first request to arrive
MAX_CONNECTIONS = 256
MAX_HEAD_BYTES = 64_000  # of a request; of what follows its body, too
MAX_AHEAD = 64  # requests that arrive before the answer to an earlier one
Handler = Callable[[Request], Awaitable[Response]]
PAGE, SITE = Path(__file__).with_name("page"), Path(__file__).with_name("site")  # of `demo`, and of `serve`
# Not as `mimetypes` has them, from the registry on Windows: a browser runs no script that is served as text/plain.
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def answered(handler: Handler, *, respond: Respond, status_of: Callable[[ClipRdEdgeError], int]) -> Handler:
    """Wrap a handler so that expected errors become responses; those of the server itself are logged, too."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except RefusedError as refused:
            return respond(refused.status, str(refused), "")
        except (asyncio.TimeoutError, TimeoutError):
            return respond(408, f"The request did not arrive within {BODY_TIMEOUT_S:.0f} s.", "")
        except ClientDisconnect:
            return respond(400, "The connection was closed before the request was complete.", "")
        except ClipRdEdgeError as error:
            status = status_of(error)
            if status >= 500:
                logging.getLogger("uvicorn.error").error("%s", error)
            return respond(status, str(error), error.hint)

    return handle


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def read_body(request: Request) -> bytes:
    """Return the body of a request; raise TimeoutError if it takes longer than BODY_TIMEOUT_S to arrive."""
    return await asyncio.wait_for(request.body(), BODY_TIMEOUT_S)


async def unless_it_leaves(handler: Handler, request: Request) -> Response:
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


def page_files(search: bool) -> dict[str, Path]:
    """Return the files of the pages by their addresses: the search page, if there is an index, and that of the API."""
    files = {"/docs": "docs.html", "/docs.js": "docs.js", "/api.js": "api.js", "/site.css": "site.css"}
    files |= {"/": "search.html", "/search.js": "search.js"} if search else {"/": "docs.html"}
    shared = {f"/{name}": PAGE / name for name in ("style.css", "icon.svg")}
    return {path: SITE / name for path, name in files.items()} | shared


def serve_file(path: Path) -> Callable[[Request], Response]:
    """Return a handler that answers with a file of a page, with the same type on every machine."""
    return lambda request: FileResponse(path, media_type=_MEDIA_TYPES[path.suffix])


class LimitedProtocol(HttpToolsProtocol):
    """One HTTP connection. One too many ends the oldest that waits for its client, never one that is being answered.

    So clients that hold connections open, or send their requests slowly, keep nobody out. httptools, which calls the
    methods that begin with `on_`, limits neither heads and trailers nor what arrives ahead of its turn.
    """

    cycle: Any  # the last request, of which there is none at first
    idle_bytes = 0  # received since a head was complete or a part of a body arrived

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened_at = time.monotonic()
        if len(self.connections) > connection_limit():
            ours = (connection for connection in self.connections if isinstance(connection, LimitedProtocol))
            waiting = [connection for connection in ours if connection.waits_for_client]
            oldest = min(waiting, key=lambda connection: connection.opened_at)
            self.connections.discard(oldest)
            oldest.transport.abort()
        self.timer = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT_S, self._end_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()  # which would keep the connection in memory
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """What is raised here ends the parsing, and the answer is 400."""
        if len(self.pipeline) >= MAX_AHEAD:
            raise OverflowError
        self.idle_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.idle_bytes = 0
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        """Parse what arrives; end a connection that sends a head or trailers without an end."""
        self.idle_bytes += len(data)
        super().data_received(data)
        if self.idle_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    @property
    def waits_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def connection_limit() -> int:
    """Return how many connections are kept: without a file for it, a connection cannot even be refused."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)


def run_server(app: Starlette, *, host: str, port: int, ready: Callable[[str], None], stop_within_s: int) -> None:
    """Run an application until one of the `stop_signals`; requests in progress have `stop_within_s` seconds to finish.

    Args:
        host: address to listen on.
        port: port to listen on; 0 uses any free port.
        ready: called with the server's URL once it accepts connections; for a server on all addresses (0.0.0.0 or ::),
            with the one on this machine.
    """
    with _listen(host, port) as listener:
        config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            log_level="error",  # a warning is what any client can cause, as often as it likes
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing asks who the client is
            timeout_keep_alive=30,
            timeout_graceful_shutdown=stop_within_s,
        )
        ready(url_of({"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host), listener.getsockname()[1]))
        _run(_Server(config), listener)


class _Server(uvicorn.Server):
    """A server that any stop signal stops, and that ends models which run longer than requests in progress may."""

    _over = threading.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGHUP as well, since an event loop may swallow what another handler raises; all act afterwards."""
        others = set(stop_signals()) - {signal.SIGINT, signal.SIGTERM}
        with super().capture_signals(), handled_by(self.handle_exit, others):
            yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving; until `run` has returned, which waits for all threads, no model computes anything."""
        await super().shutdown(sockets)
        self._over = end_calls(128 + signal.SIGTERM)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self._over.set()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run a server until it ends; in a thread of its own within an event loop, as in the cell of a notebook."""
    if asyncio._get_running_loop() is None:
        server.run(sockets=[listener])
        return
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(server.run, sockets=[listener]).result()
        finally:
            server.should_exit = True  # after Ctrl-C, which reaches this thread alone


def url_of(host: str, port: int) -> str:
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
    return [url_of(address, port) for address in addresses if address and not is_loopback(address)]


def _source_address(family: socket.AddressFamily, destination: str) -> str:
    """Return this machine's address on the way to `destination`, or an empty string; nothing is sent."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))
        return str(probe.getsockname()[0])
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
