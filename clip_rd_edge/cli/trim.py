"""`clip-rd-edge trim`: a smaller text tower."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.settings.modelling import Trim
from clip_rd_edge.utils.text import as_word


@command_of(Trim, "trim")
def command(given: dict[str, Any]) -> None:
    """Leave out layers and tokens of MODEL's text tower, of which the tokens are the largest part.

    \b
    clip-rd-edge trim runs/seeing --text-layers 2 --vocabulary 7500 \\
        --texts nouns.txt -o runs/trimmed
    clip-rd-edge distill --texts nouns.txt --teacher runs/seeing \\
        --student runs/trimmed --batch-size 256 --lr 5e-4 -o runs/small-text

    MODEL is a run's folder or another open_clip model. The result embeds images as MODEL does, but not texts: it is
    what a student starts from, which then learns MODEL's embeddings of texts in minutes.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, say

    with console_reporter() as reporter:
        folder = edge.trim(**given, reporter=reporter)
    model, texts = as_word(given["model"]), as_word(given.get("texts", "FILE"))
    say(
        f"next: clip-rd-edge distill --texts {texts} --teacher {model} --student {as_word(folder)} "
        f"--batch-size 256 --lr 5e-4 -o {as_word(f'{folder}-student')}"
    )
    echo(f"local-dir:{folder}")
