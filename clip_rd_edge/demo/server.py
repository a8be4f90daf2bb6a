"""Run the demo until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from clip_rd_edge.demo.app import Demo, make_app
from clip_rd_edge.errors import UsageError

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
