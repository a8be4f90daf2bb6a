"""`clip-rd-edge demo`: a page to try bundles on."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._labels import LabelsOption, read_labels


@click.command("demo", short_help="A page with camera or pictures, to try bundles on.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option(
    "--labels", cls=LabelsOption, multiple=True,
    help='What the page starts with: "a cat" "a dog" …, or a text file with one a line.',
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: the network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free.")
@click.option("--threads", type=click.IntRange(1), help="Threads of a model; default: every core.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
def command(
    bundles: tuple[Path, ...], labels: tuple[str, ...], host: str, port: int, threads: int | None, open_page: bool
) -> None:
    """Serve a page on this machine: drop a picture or start the camera, type labels, see the bars move.

    Give several bundles to feel the difference between them. Nothing is loaded from the internet. Ctrl-C ends it.

    \b
    clip-rd-edge demo bundles/fp32 bundles/int8 --labels "a cat" "a dog"
    """
    from clip_rd_edge.demo.app import Demo, is_loopback, serve

    demo = Demo(bundles, labels=read_labels(labels), threads=threads)

    def ready(url: str) -> None:
        click.echo(url)
        if not is_loopback(host):
            click.echo(
                "warning: everybody on this network can use the page and send it pictures; there is no password and no "
                "encryption. Browsers give their camera to pages of this machine or with https only.",
                err=True,
            )
        click.echo("Ctrl-C ends it.", err=True)
        if open_page:
            click.launch(url)

    serve(demo, host=host, port=port, ready=ready)
