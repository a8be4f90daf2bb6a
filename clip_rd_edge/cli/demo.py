"""`clip-rd-edge demo`: a page to try bundles on."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._options import ManyOption, threads_option


@click.command("demo", short_help="A page with camera or images, to try bundles on.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option(
    "--labels", cls=ManyOption, multiple=True,
    help='What the page starts with: "a cat" "a dog" …, or a text file with one per line.',
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: the network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free.")
@threads_option
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
def command(
    bundles: tuple[Path, ...], labels: tuple[str, ...], host: str, port: int, threads: int | None, open_page: bool
) -> None:
    """Serve a page on this machine: drop an image or start the camera, type labels, see the bars move.

    Give several bundles to feel the difference between them. Nothing is loaded from the internet. Ctrl-C ends it.

    \b
    clip-rd-edge demo bundles/fp32 bundles/int8 --labels "a cat" "a dog"
    """
    import clip_rd_edge as edge
    from clip_rd_edge.runtime.labels import read_label_list
    from clip_rd_edge.web.app import is_loopback

    def ready(url: str) -> None:
        click.echo(url)
        if not is_loopback(host):
            click.echo(
                "warning: everybody on this network can use the page and send images to it; there is no password and "
                "no encryption. Browsers give their camera only to pages of this machine or with https.",
                err=True,
            )
        click.echo("Ctrl-C ends it.", err=True)
        if open_page:
            click.launch(url)

    edge.demo(bundles, labels=read_label_list(labels), host=host, port=port, threads=threads, ready=ready)
