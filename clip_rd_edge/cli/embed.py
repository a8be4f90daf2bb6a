"""`clip-rd-edge embed`: compute a teacher's embeddings once, for many runs."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.settings.training import Embed
from clip_rd_edge.utils.text import as_word


@command_of(Embed, "embed")
def command(given: dict[str, Any]) -> None:
    """Compute a teacher's embeddings once, for many runs of distill with --store.

    \b
    clip-rd-edge embed --data pairs.csv --teacher runs/teacher --views 8 -o store
    clip-rd-edge distill --data pairs.csv --teacher runs/teacher --views 8 \\
        --store store --student resnet18 -o runs/stored

    An interrupted command is continued by the same one. Under torchrun, and with --ray, many machines share the work.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, first_process, say

    with console_reporter() as reporter:
        folder = edge.embed(**given, reporter=reporter)
    if first_process:
        store = as_word(folder)
        say(f"next: clip-rd-edge distill, with the same data, teacher and views, and --store {store}")
        echo(folder)
