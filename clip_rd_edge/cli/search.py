"""`clip-rd-edge search`: search an index by text or image."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import device_option, threads_option


@click.command("search", short_help="Search an index by text or image.")
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Number of images to print.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Current path of the bundle, if it was moved.")
@threads_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
def command(
    index: Path, query: str, top: int, bundle: Path | None, threads: int | None, device: str, as_json: bool
) -> None:
    """Print the images in INDEX that are nearest to QUERY, which is a text or the path of an image.

    Each line has the cosine similarity, a tab, and the image's path.

    \b
    clip-rd-edge search photos.index "a red car"
    clip-rd-edge search photos.index photos/car.jpg --top 5
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import json_line

    for hit in edge.search(index, query, top=top, bundle=bundle, threads=threads, device=device):
        if as_json:
            line = {"image": str(hit.path), "similarity": round(hit.similarity, 6)}
            echo(json_line(line))
        else:
            echo(f"{hit.similarity:.3f}\t{hit.path}")
