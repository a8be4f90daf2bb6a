"""`clip-rd-edge index`: embed a folder of images for searching."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, device_option, grouped, threads_option
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.printable import one_line


@click.command("index", cls=GroupedCommand, short_help="Embed a folder of images for searching.")
@click.argument("bundle", type=PathName())
@click.argument("folder", type=PathName())
@grouped("Output")("-o", "--output", metavar="INDEX", type=PathName(), required=True, help="Folder for the index.")
@threads_option
@device_option
def command(bundle: Path, folder: Path, output: Path, threads: int | None, device: str) -> None:
    """Embed the images in FOLDER and its subfolders with BUNDLE, for clip-rd-edge search.

    \b
    clip-rd-edge index bundle photos/ -o photos.index
    clip-rd-edge search photos.index "a red car"

    Run the command again to update the index: only new and changed images are embedded. It can be interrupted at any
    time without losing its progress.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter:
        update = edge.index(bundle, folder, output, threads=threads, device=device, reporter=reporter)
    for reason in update.unreadable:
        echo(f"error: {one_line(reason)}", err=True)
    echo(f"{update.embedded:,} embedded, {update.kept:,} kept, {update.removed:,} removed", err=True)
    echo(output)
    if update.unreadable:
        count = len(update.unreadable)
        raise InputError(
            f"{count:,} image{'s' * (count > 1)} or folder{'s' * (count > 1)} could not be read; the others are in the "
            "index."
        )
