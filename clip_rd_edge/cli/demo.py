"""`clip-rd-edge demo`: a local web page for trying bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

import click

from clip_rd_edge.cli._options import GroupedCommand, ManyOption, PathName, complete_labels, grouped, threads_option
from clip_rd_edge.cli._server import print_addresses, print_how_to_stop, server_options

_page = grouped("Page")


@click.command("demo", cls=GroupedCommand, short_help="Try bundles on a local web page, with a camera or image files.")
@click.argument("bundles", nargs=-1, required=True, type=PathName(), metavar="BUNDLE...")
@_page(
    "--labels", cls=ManyOption, multiple=True, metavar="LABEL...|FILE", shell_complete=complete_labels,
    help='Initial labels such as "a cat" "a dog", everyday, or a label file (see classify); at most 2,000.  [default: '
    "the labels in the bundle, else the page's own]",
)  # fmt: skip
@server_options(8765)
@threads_option
@_page("--open", "open_page", is_flag=True, help="Open the page in your browser.")
def command(
    bundles: tuple[Path, ...], labels: tuple[str, ...], host: str, port: int, threads: int | None, open_page: bool
) -> None:
    """Serve a web page from this machine: drop an image or start the camera, type labels, and watch the results.

    \b
    clip-rd-edge demo bundles/fp32 bundles/int8 --labels "a cat" "a dog"
    clip-rd-edge demo bundle --host 0.0.0.0

    With --host 0.0.0.0, the addresses for other machines are printed, too, and on a terminal a QR code for a phone.

    Pass several BUNDLEs to compare them on the page. Nothing is loaded from the internet. Ctrl-C stops the server.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.runtime.label_list import parse_labels

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

    edge.demo(bundles, labels=parse_labels(labels), host=host, port=port, threads=threads, ready=ready)


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
