"""`clip-rd-edge build`: from a user's own images to a bundle on a device."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli.options import command_of
from clip_rd_edge.cli.output import echo
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.utils.text import as_word


@command_of(Build, "build")
def build(given: dict[str, Any]) -> None:
    """Build a bundle for a device from your own images: look, hold back, distil, export, compare.

    \b
    clip-rd-edge build photos/ --target cpu-arm -o flowers
    clip-rd-edge build pairs.csv --target cpu-x86 --hours 8 -o captions \\
        --teacher ViT-B-16@laion400m_e32
    clip-rd-edge build photos/ --labels "a cat" "a dog" --target cpu-arm -o pets

    DATA is a folder with a sub-folder of images for each class, a table of images and captions, or a folder of images
    with --labels. Each stage keeps its result in OUT. The same command goes on where it was interrupted, and does
    nothing where nothing has changed; with another --target, it trains nothing again.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli.console import console_reporter, note
    from clip_rd_edge.runtime.labels import parse_labels

    with console_reporter() as reporter:
        built = edge.build(**{**given, "labels": parse_labels(given.get("labels", ()))}, reporter=reporter)
    for number, line in enumerate(built.verdict):
        echo(line if not number else f"- {line}", prose=True)
    echo(f"\nReport: {built.report}\nBundle: {built.folder}")
    note(f"next: clip-rd-edge classify {as_word(built.folder)} photo.jpg")
    note(f"more: clip-rd-edge evaluate {as_word(built.folder)} --task {as_word(built.held_out)} --per-class")
