"""Access control for a server on this machine: which hosts and origins may send requests, and how large they may be.

Any page on the web can make a browser send requests to this machine. Checking Host prevents DNS rebinding (a foreign
name that resolves to 127.0.0.1); checking Origin blocks requests from other sites' pages. X-Forwarded-Host and its like
are not read, for anyone can send them.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.process import end_calls, handled_by, leave_lost_terminal, stop_signals
from clip_rd_edge.utils.structs import is_natural

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 25_000_000
BODY_TIMEOUT_S = 20.0  # for a request body to arrive
MAX_BODIES_BYTES = 200_000_000  # of all requests that are received or answered at a time
_HEADERS = {  # of every response
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_ONCE = ("host", "origin", "authorization", "content-length", "transfer-encoding")
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
_RAW_NAMES = {name for name, _ in _RAW_HEADERS}


class TooLargeError(Exception):
    """The request body exceeds MAX_BODY_BYTES."""


class FullError(Exception):
    """The bodies of all requests together exceed MAX_BODIES_BYTES, and this one had to make room."""


class _Body:
    """What has arrived of a request's body; `given_up` is set when others need the room."""

    def __init__(self) -> None:
        self.size, self.is_complete = 0, False
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Guard:
    """Middleware that rejects foreign hosts, foreign origins and large bodies, and adds security headers.

    Reading a body raises `TooLargeError` or `FullError` if it exceeds a limit. When all bodies together exceed theirs,
    those that began first and are still not complete are given up: clients that send theirs slowly, or never end them,
    keep nobody out.

    Args:
        app: the application to protect.
        host: address or name that the server listens on; whoever chose a name reaches the server by it.
        names: further host names that requests may use, as from `host_names`. Their pages may send requests, too: a
            proxy in front of the server passes on the site's Origin, but mostly the server's own address as Host.
        token_required: every request carries a secret that a foreign page does not know, so that Host and Origin need
            no check.
        respond: makes the response of a refusal from its status and message.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        names: Collection[str] = (),
        token_required: bool = False,
        respond: Callable[[int, str], Response] | None = None,
    ) -> None:
        self.app, self._respond = app, respond or error_response
        self.loopback = is_loopback(host)
        self.named = {*names} - {""}  # without `host`: a page of another port of 127.0.0.1 is foreign
        self.names = {*self.named, host.lower()} - {""}
        self.token_required = token_required
        self._bodies: dict[_Body, None] = {}  # of all requests that are not answered yet, in the order of their begin
        self._last_allowed: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            status, message = refusal
            await self._respond(status, message)(scope, receive, _with_headers(send))
            return
        if not scope["path"].isprintable():  # no file and no route; NUL is an error where files are looked for
            await self._respond(404, "Not found.")(scope, receive, _with_headers(send))
            return
        body = _Body()

        async def receive_counted() -> Message:
            """Count the bytes, for bodies without a Content-Length."""
            message = await (receive() if body.is_complete else _unless_given_up(body, receive))
            body.size += len(message.get("body", b""))
            body.is_complete = not message.get("more_body", False)
            if body.size > MAX_BODY_BYTES:
                raise TooLargeError
            self._make_room(body)
            return message

        self._bodies[body] = None
        try:
            await self.app(scope, receive_counted, _with_headers(send))
        finally:
            self._bodies.pop(body, None)

    def _make_room(self, body: _Body) -> None:
        """Give up bodies until all fit; raise FullError if `body` is the one to give up."""
        total = sum(other.size for other in self._bodies)
        for other in list(self._bodies):
            if total <= MAX_BODIES_BYTES:
                return
            if not other.is_complete and other is not body:
                total -= other.size
                other.given_up.set_result(None)
                del self._bodies[other]
        if total > MAX_BODIES_BYTES:
            raise FullError

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        names = headers.keys()
        if any(names.count(name) > 1 for name in _ONCE) or {"content-length", "transfer-encoding"} <= set(names):
            # A proxy in front may have read the other one.
            return 400, f"The request has two of the headers that it may have once: {', '.join(_ONCE)}."
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.token_required:
            # Without any Host, it is no browser's: probes of load balancers send none with HTTP/1.0.
            if (host or origin) and not self._allows(host):
                return 403, f"The host {host!r} is not allowed; use the address that clip-rd-edge printed."
            if origin is not None and not self._allows_page(origin, host):
                message = f"Requests from pages of {origin} to {host!r} are not allowed"
                return 403, f"{message}; a proxy has to pass on Host unchanged."
        length = headers.get("content-length", "0")
        if not is_natural(length) or int(length) > MAX_BODY_BYTES:
            return 413, too_large_message()
        return None

    def _allows(self, host: str) -> bool:
        """Return whether requests may name a host; the last one is remembered, for most name the same."""
        if host != self._last_allowed:
            if _hostname(host) not in self.names and not allowed_host(host, loopback=self.loopback):
                return False
            self._last_allowed = host
        return True

    def _allows_page(self, origin: str, host: str) -> bool:
        """Return whether pages of an origin may send requests to this Host: its own, and those of a given name."""
        scheme, _, site = origin.partition("://")
        return scheme in ("http", "https") and (site == host or _hostname(site) in self.named)


async def _unless_given_up(body: _Body, receive: Receive) -> Message:
    """Return the next message; raise FullError if the body is given up before it comes."""
    message: asyncio.Future[Message] = asyncio.ensure_future(receive())
    waiting: set[asyncio.Future[Any]] = {message, body.given_up}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if body.given_up.done():
            raise FullError
        return message.result()
    finally:
        message.cancel()


def is_loopback(host: str) -> bool:
    """Return whether a server on `host` can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_host(host: str, *, loopback: bool) -> bool:
    """Return whether a Host header names this machine.

    Loopback names are always allowed. If the server is open to the network, so are all IP addresses and this machine's
    host name: unlike a foreign name, they cannot be used for DNS rebinding.
    """
    name = _hostname(host)
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        hostname = socket.gethostname().lower()
        return not loopback and name in {hostname, f"{hostname}.local"}
    return address.is_loopback or not loopback


def _hostname(host: str) -> str:
    """Return the name in a Host header without its port, or an empty string if it is anything else than NAME:PORT."""
    try:
        parts = urlsplit(f"//{host}")
        is_valid = parts.netloc == host and "@" not in host and parts.port != 0  # a wrong port raises
        return parts.hostname or "" if is_valid else ""
    except ValueError:
        return ""


def host_names(names: str | Collection[str]) -> set[str]:
    """Return the host names in what a user gives, a single one or several: NAME, NAME:PORT or http://NAME:PORT."""
    hosts = set()
    for name in [names] if isinstance(names, str) else names:
        host = _hostname(name.strip().rpartition("://")[2].partition("/")[0])
        if not host:
            raise UsageError(
                f"{name!r} has no host name.", hint="name the host alone, such as {allow_host} clip-server"
            )
        hosts.add(host)
    return hosts


def error_response(status: int, message: str, *, hint: str = "") -> JSONResponse:
    """Return a JSON response with an error message and a hint."""
    return JSONResponse({"error": message, "hint": hint}, status_code=status)


def too_large_message() -> str:
    """Return the message for TooLargeError."""
    return f"The request is too large; the limit is {MAX_BODY_BYTES // 1_000_000} MB."


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [header for header in message.get("headers", ()) if header[0].lower() not in _RAW_NAMES]
            message["headers"] = [*own, *_RAW_HEADERS]
        await send(message)

    return send_with_headers


MAX_CONNECTIONS = 256
OPEN_FILES = 1024  # the usual limit of a process; a shell of macOS has 256
REQUEST_TIMEOUT_S = 10.0  # for the head of the first request to arrive
MAX_HEAD_BYTES = 64_000  # of a request; of what follows its body, too
MAX_AHEAD, MAX_AHEAD_BYTES = 64, 256_000  # requests that arrive before the answer to an earlier one, and their bytes
MAX_LOG_LINES, LOG_PERIOD_S = 20, 60.0


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type,unused-ignore]
    """One HTTP connection. One too many ends the oldest that waits for its client, never one that is being answered.

    So clients that hold connections open, or send their requests slowly, keep nobody out. Requests are parsed by
    httptools if it is installed, and by h11 otherwise, whose limit of a request's head and trailers is uvicorn's
    setting; httptools has none, and calls the methods that begin with `on_`. Neither limits what arrives before it is
    its turn, as uvicorn reads on while a request is answered.
    """

    in_fields = False  # whether header fields may follow: of the head, or after the last chunk of the body
    field_bytes = 0  # received since they began
    ahead_bytes = 0  # received since a request is being answered

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and start to wait for its first request."""
        super().connection_made(transport)
        self.opened_at = time.monotonic()
        if len(self.connections) > connection_limit():
            waiting = [connection for connection in self.connections if connection.waits_for_client]
            oldest = min(waiting, key=lambda connection: connection.opened_at)
            self.connections.discard(oldest)
            oldest.transport.abort()
        self.timer = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT_S, self._end_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; its timer would keep it in memory."""
        self.timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_fields, self.field_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is complete. What is raised here ends the parsing, and the answer is 400."""
        self.in_fields = False
        if len(self.pipeline) >= MAX_AHEAD:
            raise OverflowError
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """A chunk begins, or after the last one, trailers."""
        self.in_fields, self.field_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        """A part of the body has arrived."""
        self.in_fields = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has ended."""
        self.in_fields = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what arrives; refuse fields without an end, and too much before the answer to an earlier request."""
        self.field_bytes += len(data) if self.in_fields else 0
        self.ahead_bytes = 0 if self.waits_for_client else self.ahead_bytes + len(data)
        super().data_received(data)
        if self.in_fields and self.field_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")
        elif self.ahead_bytes > MAX_AHEAD_BYTES:
            self.transport.abort()

    @property
    def waits_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def connection_limit() -> int:
    """Return how many connections are kept: with what else is open, fewer than files that this process may open.

    That limit is raised to OPEN_FILES where it may be: without a file for it, a connection cannot even be refused.
    """
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    unlimited = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == unlimited else min(hard, OPEN_FILES)
    if soft != unlimited and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_CONNECTIONS if soft == unlimited else min(MAX_CONNECTIONS, soft // 2)


class LogLimit(logging.Filter):
    """Lets MAX_LOG_LINES records pass in LOG_PERIOD_S; the next one after that says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._period_began, self._lines = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        now = time.monotonic()
        if now - self._period_began > LOG_PERIOD_S:
            left_out = self._lines - MAX_LOG_LINES
            self._period_began, self._lines = now, 0
            if left_out > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out:,} lines before were left out)", ()
        self._lines += 1
        return self._lines <= MAX_LOG_LINES


async def read_body(request: Request) -> bytes:
    """Return the body of a request; raise TimeoutError if it takes longer than BODY_TIMEOUT_S to arrive."""
    return await asyncio.wait_for(request.body(), BODY_TIMEOUT_S)


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
