"""What the commands that serve have in common: the address they listen on, and what they print once they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import grouped


def server_options(port: int) -> Callable[[Any], Any]:
    """Return a decorator that adds `--host` and `--port`."""
    server = grouped("Server")
    host_option = server(
        "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
        help="Address to listen on; 0.0.0.0 for the network.",
    )  # fmt: skip
    port_option = server(
        "--port", type=click.IntRange(0, 65535), default=port, show_default=True, metavar="N",
        help="Port to listen on; 0 uses any free port.",
    )  # fmt: skip
    return lambda command: host_option(port_option(command))


def print_addresses(url: str, host: str) -> list[str]:
    """Print the address of a server, and those for other machines, if it listens to them; return the latter."""
    from clip_rd_edge.web.app import network_urls

    others = network_urls(host, urlsplit(url).port or 0)
    for address in dict.fromkeys([url, *others]):
        echo(address)
    return others


def print_how_to_stop(host: str, *, warning: str) -> None:
    """Print how to stop a server, after a warning if other machines can reach it."""
    from clip_rd_edge.web.guard import is_loopback

    if not is_loopback(host):
        echo(f"warning: {warning}", err=True)
    echo("Press Ctrl-C to stop.", err=True)
