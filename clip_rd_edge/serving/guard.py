"""Who may send requests to a server on this machine, and how large they may be.

Any page on the web can make a browser send requests to this machine. Checking Host prevents DNS rebinding (a foreign
name that resolves to 127.0.0.1); checking Origin blocks requests from other sites' pages. X-Forwarded-Host and its like
are not read, for anyone can send them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_rd_edge.utils.structs import is_natural

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 25_000_000
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
Respond = Callable[[int, str, str], Response]  # to a status, a message and a hint, or an empty one


class RefusedError(Exception):
    """A request is not answered; its status is an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Body:
    def __init__(self) -> None:
        self.size, self.is_complete = 0, False  # of what has arrived
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Guard:
    """Middleware that rejects foreign hosts, foreign origins and large bodies, and adds security headers.

    Reading a body raises `RefusedError` if it exceeds a limit. When all bodies together exceed theirs, those that began
    first and are still not complete are given up: clients that send theirs slowly, or never end them, keep nobody out.

    Args:
        app: the application to protect.
        host: address or name that the server listens on; whoever chose a name reaches the server by it.
        names: further host names that requests may use, as from `host_names`. Their pages may send requests, too: a
            proxy in front of the server passes on the site's Origin, but mostly the server's own address as Host.
        token_required: every request carries a secret that a foreign page does not know, so that Host and Origin need
            no check.
        respond: makes the response of a refusal.
        full: the status when there is no room for more bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        names: Collection[str] = (),
        token_required: bool = False,
        respond: Respond,
        full: int = 503,
    ) -> None:
        self.app, self._respond, self._full = app, respond, full
        self.loopback = is_loopback(host)
        self.named = {*names} - {""}  # without `host`: a page of another port of 127.0.0.1 is foreign
        self.names = {*self.named, host.lower()} - {""}
        self.token_required = token_required
        self._bodies: dict[_Body, None] = {}  # of all requests that are not answered yet, in the order of their begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._require_allowed(Headers(scope=scope))
        except RefusedError as refused:
            response = self._respond(refused.status, str(refused), "")
            return await response(scope, receive, _with_headers(send))
        body = _Body()

        async def receive_counted() -> Message:
            """Count the bytes, for bodies without a Content-Length."""
            message = await (receive() if body.is_complete else self._unless_given_up(body, receive))
            body.size += len(message.get("body", b""))
            body.is_complete = not message.get("more_body", False)
            if body.size > MAX_BODY_BYTES:
                raise _too_large()
            self._make_room(body)
            return message

        self._bodies[body] = None
        try:
            await self.app(scope, receive_counted, _with_headers(send))
        finally:
            self._bodies.pop(body, None)

    def _make_room(self, body: _Body) -> None:
        """Give up bodies until all fit; refuse `body` if it is the one to give up."""
        total = sum(other.size for other in self._bodies)
        for other in list(self._bodies):
            if total <= MAX_BODIES_BYTES:
                return
            if not other.is_complete and other is not body:
                total -= other.size
                other.given_up.set_result(None)
                del self._bodies[other]
        if total > MAX_BODIES_BYTES:
            raise self._full_error()

    async def _unless_given_up(self, body: _Body, receive: Receive) -> Message:
        message: asyncio.Future[Message] = asyncio.ensure_future(receive())
        waiting: set[asyncio.Future[Any]] = {message, body.given_up}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if body.given_up.done():
                raise self._full_error()
            return message.result()
        finally:
            message.cancel()

    def _full_error(self) -> RefusedError:
        return RefusedError(self._full, "Too much is being sent at once; try again in a moment.")

    def _require_allowed(self, headers: Headers) -> None:
        names = headers.keys()
        if any(names.count(name) > 1 for name in _ONCE) or {"content-length", "transfer-encoding"} <= set(names):
            # A proxy in front may have read the other one.
            raise RefusedError(400, f"The request has two of the headers that it may have once: {', '.join(_ONCE)}.")
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.token_required:
            # Without any Host, it is no browser's: probes of load balancers send none with HTTP/1.0.
            named = _hostname(host) in self.names or allowed_host(host, loopback=self.loopback)
            is_foreign = origin is not None and not self._allows_page(origin, host)
            if ((host or origin) and not named) or is_foreign:
                message = f"Requests{f' from pages of {origin}' if is_foreign else ''} to {host!r} are not allowed"
                raise RefusedError(403, f"{message}; use the address that clip-rd-edge printed.")
        length = headers.get("content-length", "0")
        if not is_natural(length) or int(length) > MAX_BODY_BYTES:
            raise _too_large()

    def _allows_page(self, origin: str, host: str) -> bool:
        """Return whether pages of an origin may send requests to this Host: its own, and those of a given name."""
        scheme, _, site = origin.partition("://")
        return scheme in ("http", "https") and (site == host or _hostname(site) in self.named)


def _too_large() -> RefusedError:
    return RefusedError(413, f"The request is too large; the limit is {MAX_BODY_BYTES // 1_000_000} MB.")


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [header for header in message.get("headers", ()) if header[0].lower() not in _RAW_NAMES]
            message["headers"] = [*own, *_RAW_HEADERS]
        await send(message)

    return send_with_headers


def error_response(status: int, message: str, hint: str = "") -> JSONResponse:
    """Return a JSON response with an error message and a hint."""
    return JSONResponse({"error": message, "hint": hint}, status_code=status)


def is_loopback(host: str) -> bool:
    """Return whether a server on `host` can be reached only from this machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def allowed_host(host: str, *, loopback: bool) -> bool:
    """Return whether a Host header names this machine.

    Loopback names are always allowed. If the server is open to the network, so are all IP addresses and this machine's
    host name: unlike a foreign name, they cannot be used for DNS rebinding.
    """
    name = _hostname(host)
    if is_loopback(name) or loopback:
        return is_loopback(name)
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    hostname = socket.gethostname().lower()
    return name in {hostname, f"{hostname}.local"}


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
    several = [names] if isinstance(names, str) else names
    return {_hostname(name.strip().rpartition("://")[2].partition("/")[0]) for name in several}
