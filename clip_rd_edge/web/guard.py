"""What stands before every request: who may ask, and how much they may send.

A page anywhere on the web can make a browser send requests to this machine. Host is checked against rebinding of
names (a foreign name that resolves to 127.0.0.1), Origin against foreign pages.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 25_000_000
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class TooLargeError(Exception):
    """More was sent than MAX_BODY_BYTES."""


class Guard:
    """Refuses foreign hosts, foreign origins and large bodies; adds the headers that keep a page to itself.

    Args:
        app: what is guarded.
        loopback: whether the server listens on this machine alone.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool) -> None:
        self.app = app
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            status, sentence = refusal
            await refuse(status, sentence)(scope, receive, _with_headers(send))
            return
        await self.app(scope, _limited(receive), _with_headers(send))

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not allowed_host(host, loopback=self.loopback):
            return 403, f"The host {host!r} is not served; use the address that clip-rd-edge demo printed."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, f"Requests from pages of {origin} are not served."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return 413, too_large()
        return None


def allowed_host(host: str, *, loopback: bool) -> bool:
    """Whether a Host header names this machine: by loopback, or, where the network is served, also by an address or
    by the machine's own name. An address cannot be rebound, a name of somebody else's can."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        own = socket.gethostname().lower()
        return not loopback and name in {own, f"{own}.local"}
    return address.is_loopback or not loopback


def refuse(status: int, sentence: str, *, hint: str = "") -> JSONResponse:
    """A response that says in a sentence what was wrong."""
    return JSONResponse({"error": sentence, "hint": hint}, status_code=status)


def too_large() -> str:
    """The sentence for TooLargeError."""
    return f"More was sent than the {MAX_BODY_BYTES // 1_000_000} MB that are taken."


def _limited(receive: Receive) -> Receive:
    """Counts what comes in, for a body that does not say its length."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise TooLargeError
        return message

    return counted


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
