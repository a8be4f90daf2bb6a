"""`clip-rd-edge index`: embed a folder of pictures, to be searched."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._device import device_option
from clip_rd_edge.errors import ClipRdEdgeError


@click.command("index", short_help="Embed a folder of pictures, to be searched.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="INDEX", type=click.Path(path_type=Path), required=True, help="Folder of the index."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the model; default: every core.")
@device_option
def command(bundle: Path, folder: Path, output: Path, threads: int | None, device: str) -> None:
    """Embed the pictures in FOLDER and its sub-folders with BUNDLE, to be searched with clip-rd-edge search.

    The same command again embeds only what is new or has changed. Interrupt it at any time: what is done stays.

    \b
    clip-rd-edge index bundle photos/ -o photos.index
    clip-rd-edge search photos.index "a red car"
    """
    from clip_rd_edge.cli._progress import progress_bar
    from clip_rd_edge.runtime.index import update_index
    from clip_rd_edge.runtime.load import load

    encoder = load(bundle, threads=threads, device=device, spin=False)
    with progress_bar() as bar:
        task = bar.add_task("embedding", total=None, note="")
        done = update_index(
            encoder, folder, output, progress=lambda count, total: bar.update(task, completed=count, total=total)
        )
    for reason in done.unreadable:
        click.echo(f"error: {reason}", err=True)
    click.echo(f"{done.embedded:,} embedded, {done.kept:,} kept, {done.gone:,} gone", err=True)
    click.echo(output)
    if done.unreadable:
        raise ClipRdEdgeError(f"{len(done.unreadable):,} pictures could not be read; the others are in the index.")
