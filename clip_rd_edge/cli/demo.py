"""`clip-rd-edge demo`: a local web page for trying bundles."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import click

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._options import grouped
from clip_rd_edge.cli._server import print_addresses, print_how_to_stop
from clip_rd_edge.settings.deploying import Demo


@command_of(Demo, "demo")
@grouped("Page")("--open", "open_page", is_flag=True, help="Open the page in your browser.")
def command(given: dict[str, Any], open_page: bool) -> None:
    """Serve a web page from this machine: drop an image or start the camera, type labels, and watch the results.

    \b
    clip-rd-edge demo bundles/fp32 bundles/int8 --labels "a cat" "a dog"
    clip-rd-edge demo bundle --host 0.0.0.0

    With --host 0.0.0.0, the addresses for other machines are printed, too, and on a terminal a QR code for a phone.

    Pass several BUNDLEs to compare them on the page. Nothing is loaded from the internet. Ctrl-C stops the server.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.runtime.label_list import parse_labels

    host = given.get("host", "127.0.0.1")

    def ready(url: str) -> None:
        if others := print_addresses(url, host):
            _print_qr_code(others[0])
        print_how_to_stop(
            host,
            warning="Anyone on this network can use the page and send images to it; there is no password and no "
            "encryption. Browsers on other machines do not allow the camera, because the page is not https.",
        )
        if open_page:
            click.launch(url)

    labels = parse_labels(given.pop("labels", ()))
    edge.demo(**given, labels=labels, ready=ready)


def _print_qr_code(url: str) -> None:
    """Print a QR code of the URL to stderr, if that is a terminal."""
    if not _is_terminal(sys.stderr):
        return
    try:
        import segno
    except ModuleNotFoundError:
        return
    segno.make(url, error="l").terminal(out=sys.stderr, compact=True)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()
