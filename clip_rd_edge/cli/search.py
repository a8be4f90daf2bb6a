"""`clip-rd-edge search`: the pictures of an index that are nearest to a text or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.cli._device import device_option
from clip_rd_edge.errors import InputError

if TYPE_CHECKING:
    from clip_rd_edge.contract.encoder import Embeddings
    from clip_rd_edge.runtime.encoder import BundleEncoder


@click.command("search", short_help="Find pictures of an index by text or picture.")
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="How many pictures to show.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Where the bundle lies now, if it was moved.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the model; default: every core.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(
    index: Path, query: str, top: int, bundle: Path | None, threads: int | None, device: str, as_json: bool
) -> None:
    """Show the pictures of INDEX that are nearest to QUERY: a text, or the path of a picture.

    Each line has the cosine similarity and the picture's path.

    \b
    clip-rd-edge search photos.index "a red car"
    clip-rd-edge search photos.index photos/car.jpg --top 5
    """
    import json

    from clip_rd_edge.runtime.index import model_key, nearest, read_index
    from clip_rd_edge.runtime.load import load

    if not query.strip():
        raise InputError("The query is empty.", hint='give a text, such as "a red car", or the path of a picture')
    known, rows = read_index(index)
    encoder = load(bundle or known.bundle, threads=threads, device=device)
    if model_key(encoder.manifest) != known.model:
        raise InputError(
            f"The bundle {encoder.folder} is not the one that made the index {index}.",
            hint=f"clip-rd-edge index {encoder.folder} {known.folder} -o {index}",
        )
    for hit in nearest(known, rows, _embed(encoder, query), top=top):
        if as_json:
            line = {"picture": str(hit.path), "similarity": round(hit.similarity, 6)}
            click.echo(json.dumps(line, ensure_ascii=False))
        else:
            click.echo(f"{hit.similarity:.3f}\t{hit.path}")


def _embed(encoder: BundleEncoder, query: str) -> Embeddings:
    """The embedding of a picture where `query` is a file's path, else of the text as it stands, (1, D)."""
    if Path(query).is_file():
        from clip_rd_edge.contract.images import open_image

        return encoder.encode_images([open_image(Path(query))])
    return encoder.encode_texts([query])
