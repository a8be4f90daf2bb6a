"""`clip-rd-edge search`: search an index by text or image."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import device_option, threads_option
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.printable import one_line


@click.command("search", short_help="Search an index by text or image.")
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Number of images to print.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Current path of the bundle, if it was moved.")
@threads_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.option("-0", "--null", is_flag=True, help="Print only the paths, each followed by NUL, as for xargs -0.")
def command(
    index: Path,
    query: str,
    top: int,
    bundle: Path | None,
    threads: int | None,
    device: str,
    as_json: bool,
    null: bool,
) -> None:
    """Print the images in INDEX that are nearest to QUERY, which is a text or the path of an image.

    Each line has the cosine similarity, a tab, and the image's path, in which control characters are escaped.

    \b
    clip-rd-edge search photos.index "a red car"
    clip-rd-edge search photos.index photos/car.jpg --top 5
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import json_line

    if as_json and null:
        raise UsageError("--json and --null cannot be combined.", hint="omit one of them")
    for hit in edge.search(index, query, top=top, bundle=bundle, threads=threads, device=device):
        if as_json:
            line = {"image": str(hit.path), "similarity": round(hit.similarity, 6)}
            echo(json_line(line))
        elif null:
            echo(f"{hit.path}\0", nl=False)
        else:
            echo(f"{hit.similarity:.3f}\t{one_line(hit.path)}")
