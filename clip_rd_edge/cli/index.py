"""`clip-rd-edge index`: embed the images of a folder, to be searched."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._options import device_option, threads_option
from clip_rd_edge.errors import ClipRdEdgeError


@click.command("index", short_help="Embed the images of a folder, to be searched.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="INDEX", type=click.Path(path_type=Path), required=True, help="Folder of the index."
)
@threads_option
@device_option
def command(bundle: Path, folder: Path, output: Path, threads: int | None, device: str) -> None:
    """Embed the images in FOLDER and its sub-folders with BUNDLE, to be searched with clip-rd-edge search.

    The same command again embeds only what is new or has changed. Interrupt it at any time: what is done is kept.

    \b
    clip-rd-edge index bundle photos/ -o photos.index
    clip-rd-edge search photos.index "a red car"
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter:
        done = edge.index(bundle, folder, output, threads=threads, device=device, reporter=reporter)
    for reason in done.unreadable:
        click.echo(f"error: {reason}", err=True)
    click.echo(f"{done.embedded:,} embedded, {done.kept:,} kept, {done.gone:,} removed", err=True)
    click.echo(output)
    if done.unreadable:
        raise ClipRdEdgeError(f"{len(done.unreadable):,} images could not be read; the others are in the index.")
