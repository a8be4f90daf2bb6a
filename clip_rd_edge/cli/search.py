"""`clip-rd-edge search`: search an index by text or image."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import grouped
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.deploying import Search
from clip_rd_edge.utils.text import one_line

_output = grouped("Output")


@command_of(Search, "search")
@_output("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@_output("-0", "--null", is_flag=True, help="Print only the paths, each followed by NUL, as for xargs -0.")
def command(given: dict[str, Any], as_json: bool, null: bool) -> None:
    """Print the images in INDEX that are nearest to QUERY, which is a text or the path of an image.

    \b
    clip-rd-edge search photos.index "a red car"
    clip-rd-edge search photos.index photos/car.jpg --top 5
    clip-rd-edge search photos.index "a car" --bundle bundle --folder /mnt/pics

    Each line has the cosine similarity, a tab, and the image's path, in which control characters are escaped. An index
    that another machine made is searched with a copy of its bundle.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import json_line
    from clip_rd_edge.runtime.index.folder import is_gone

    if as_json and null:
        raise UsageError("--json and --null cannot be combined.", hint="omit one of them")
    hits = edge.search(**given)
    for hit in hits:
        if as_json:
            line = {"image": str(hit.path), "similarity": round(hit.similarity, 6)}
            echo(json_line(line))
        elif null:
            echo(f"{hit.path}\0", nl=False)
        else:
            echo(f"{hit.similarity:.3f}\t{one_line(hit.path)}")
    if gone := sum(is_gone(hit.path) for hit in hits):  # and not one that this account may not look at
        where = (
            "index the folder again"
            if "folder" in given
            else "say where the folder is now with --folder, or index it again"
        )
        echo(f"warning: Of these {len(hits):,} images, {gone:,} are not there any more.\nhint: {where}", err=True)
    if hits.missing:
        name = one_line(given["index"])
        echo(
            f"warning: {name} has {hits.indexed:,} of {hits.indexed + hits.missing:,} images: indexing was "
            "interrupted, by Ctrl-C or a disk that went away, or is still running; the same index command goes on",
            err=True,
        )
