"""What the commands that serve have in common: the address they listen on, and what they print once they do."""

from __future__ import annotations

from urllib.parse import urlsplit

from clip_rd_edge.cli._echo import echo


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
